"""Rotations in NumPy alone, so that a robot's laptop can import it. Quaternions are (x, y, z, w);
matrices act on columns.

The second half is the 1D rotation basis: demonstrations that turn their gripper mostly about one
axis need one number for it.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from runtime import UserError, atomic_path, fits, one_line, read_json

BASIS_FILE = "rotation_pca_basis.npz"
SPACES = ("euler", "so3")
EV_GATE = 0.85  # share of the variance that one axis must explain
NEAR_SINGULAR = np.radians(75)  # pitch beyond which roll and yaw begin to trade places
# arrays of the npz: dtype kind (U text, f float) and the shapes that are allowed
BASIS_KEYS = {
    "space": ("U", [()]),
    "mean": ("f", [(3,), (3, 3)]),
    "principal_axis": ("f", [(3,)]),
    "pca_min": ("f", [()]),
    "pca_max": ("f", [()]),
    "ev_ratio": ("f", [(3,)]),
    "provenance": ("U", [()]),
}
# forms of `runtime.fits`: a "?" marks a key that may be missing
PROVENANCE_FORM = {"fingerprints?": [str], "dataset?": str}
STATS_FORM = {
    "model_type?": str,
    "backbone_identity?": str,
    "height_range": [float, float],
    "n_window": int,
    "image_size": int,
    "rotation": (
        {"kind": str, "n_bins": int, "basis": dict},
        {"kind": str, "n_bins": int, "euler_range": [[float, float]]},
    ),
}
PRECOMPUTE = "compute it with `python precompute_rotation_pca.py --dataset PATH`"


def quat_to_matrix(quat):
    """Unit quaternions (...,4) xyzw -> rotation matrices (...,3,3)."""
    x, y, z, w = np.moveaxis(np.asarray(quat, dtype=float), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), (0, 1), (-2, -1))


def rotvec_to_matrix(rotvec):
    """Axis-angle vectors (...,3) in radians -> rotation matrices (...,3,3): Rodrigues' formula."""
    rotvec = np.asarray(rotvec, dtype=float)
    angle = np.linalg.norm(rotvec, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(rotvec, -1, 0)
    o = np.zeros_like(x)
    # (...,3,3), the cross product with rotvec: S = angle * [axis]x, so that
    # R = I + sin(angle) [axis]x + (1 - cos(angle)) [axis]x^2 = I + a S + b S^2
    S = np.moveaxis(np.array([[o, -z, y], [z, o, -x], [-y, x, o]]), (0, 1), (-2, -1))
    a = np.sinc(angle / np.pi)  # sin(angle) / angle, finite at 0
    # 1 - cos = 2 sin^2(angle / 2), which loses no digits near 0:
    b = 0.5 * np.sinc(angle / (2 * np.pi)) ** 2  # (1 - cos(angle)) / angle^2
    return np.eye(3) + a * S + b * (S @ S)


def matrix_to_quat(matrix):
    """Rotation matrices (...,3,3) -> unit quaternions (...,4) xyzw with w >= 0.

    Shepperd's method: row i of `products` is 4 q_i times the quaternion, and the row of the largest
    component is taken.
    """
    m = np.moveaxis(np.asarray(matrix, dtype=float), (-2, -1), (0, 1))
    xy, xz, yz = m[0, 1] + m[1, 0], m[0, 2] + m[2, 0], m[1, 2] + m[2, 1]
    xw, yw, zw = m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]
    trace = m[0, 0] + m[1, 1] + m[2, 2]
    products = np.array(
        [
            [1 + 2 * m[0, 0] - trace, xy, xz, xw],
            [xy, 1 + 2 * m[1, 1] - trace, yz, yw],
            [xz, yz, 1 + 2 * m[2, 2] - trace, zw],
            [xw, yw, zw, 1 + trace],
        ]
    )
    products = np.moveaxis(products, (0, 1), (-2, -1))
    # the largest component divides the others without losing digits
    best = np.diagonal(products, axis1=-2, axis2=-1).argmax(-1)
    q = np.take_along_axis(products, best[..., None, None], -2)[..., 0, :]
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    # q and -q are one rotation: w >= 0 picks one, with an angle in [0, pi]
    return np.where(q[..., 3:] < 0, -q, q)


def matrix_to_rotvec(matrix):
    """Log map: rotation matrices (...,3,3) -> axis-angle (...,3), angles in [0, pi] radians."""
    q = matrix_to_quat(matrix)
    norm = np.linalg.norm(q[..., :3], axis=-1, keepdims=True)
    # angle = 2 atan2(|xyz|, w) along xyz / |xyz|; near 0 that is 2 xyz
    return q[..., :3] * np.where(
        norm < 1e-12, 2.0, 2 * np.arctan2(norm, q[..., 3:]) / np.maximum(norm, 1e-12)
    )


def matrix_to_euler(matrix):
    """Rotation matrices (...,3,3) -> roll, pitch, yaw (...,3) in radians with R = Rz(yaw) Ry(pitch)
    Rx(roll).
    """
    m = np.asarray(matrix, dtype=float)
    # the bottom row of R is (-sin p, cos p sin r, cos p cos r)
    roll = np.arctan2(m[..., 2, 1], m[..., 2, 2])
    pitch = np.arctan2(-m[..., 2, 0], np.hypot(m[..., 2, 1], m[..., 2, 2]))
    return np.stack([roll, pitch, np.arctan2(m[..., 1, 0], m[..., 0, 0])], axis=-1)


def euler_to_matrix(euler):
    """Roll, pitch, yaw (...,3) in radians -> rotation matrices (...,3,3), R = Rz(yaw) Ry(pitch)
    Rx(roll).
    """
    basis = np.eye(3)
    turn = lambda axis, angle: rotvec_to_matrix(angle[..., None] * basis[axis])
    roll, pitch, yaw = np.moveaxis(np.asarray(euler, dtype=float), -1, 0)
    return turn(2, yaw) @ turn(1, pitch) @ turn(0, roll)


def wrap_angle(angle, centre=0.0):
    """Angles in radians, wrapped into [centre - pi, centre + pi).

    A gripper that points down has a roll of +-pi, and binning must not cut there.
    """
    return centre + (np.asarray(angle) - centre + np.pi) % (2 * np.pi) - np.pi


def circular_mean(angle):
    """Mean direction of angles (N,...) in radians over the first axis."""
    return np.arctan2(np.sin(angle).mean(axis=0), np.cos(angle).mean(axis=0))


def rotation_angle(a, b):
    """Angle in radians between rotations (...,3,3) and (...,3,3)."""
    cosine = (np.einsum("...ij,...ij->...", a, b) - 1) / 2
    return np.arccos(np.clip(cosine, -1, 1))


# -- the 1D rotation basis


def frechet_mean(rotations, tolerance=1e-10, steps=100):
    """Rotation (3,3) with the least mean squared angle to rotations (N,3,3).

    Karcher's iteration, mean <- mean . exp(mean of the logs), from the chordal mean: the rotation
    nearest to the matrices' average, by SVD. Stops at a step below `tolerance` radians.
    """
    u, _, vt = np.linalg.svd(np.mean(rotations, axis=0))
    # the determinant's sign keeps it a rotation where u @ vt would be a reflection
    mean = u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt
    for _ in range(steps):
        # tangent vectors (N,3) at the mean, in its own frame
        step = matrix_to_rotvec(mean.T @ rotations).mean(axis=0)
        mean = mean @ rotvec_to_matrix(step)
        if np.linalg.norm(step) < tolerance:
            break
    return mean


@dataclass(frozen=True)
class RotationBasis:
    """One axis of rotation about a mean, and the range that demonstrations cover on it.

    space "so3": R = mean . exp(value . axis). mean (3,3); axis (3,) unit, in the frame of the mean;
    value in radians.
    space "euler": (roll, pitch, yaw) = mean + value . axis. mean (3,) in radians.
    low, high: range of values; ev_ratio (3,): explained-variance ratios, largest first; provenance:
    what the basis was computed from.
    """

    space: str
    mean: np.ndarray
    axis: np.ndarray
    low: float
    high: float
    ev_ratio: np.ndarray
    provenance: dict = field(default_factory=dict)

    def value(self, rotation):
        """Rotations (...,3,3) -> values (...) in radians, unwrapped about the middle of the range.

        so3: the value whose rotation is nearest to the given one. That is its twist about the axis,
        which has the period 2 pi.
        """
        if self.space == "euler":
            # projection of the offsets (...,3) on the axis
            return euler_offsets(rotation, self.mean) @ self.axis
        x, y, z = self.axis
        A = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        # the nearest rotation exp(v A) maximises trace(relative^T exp(v A))
        relative = self.mean.T @ np.asarray(rotation, dtype=float)
        # exp(v A) = I + sin(v) A + (1 - cos(v)) A^2, so the trace is a sin(v) - b cos(v) +
        # constant, a and b the overlaps with A and A^2: largest at v = atan2(a, -b)
        overlap = lambda other: np.einsum("...ij,ij->...", relative, other)
        return wrap_angle(np.arctan2(overlap(A), -overlap(A @ A)), (self.low + self.high) / 2)

    def rotation(self, value):
        """Values (...) -> rotations (...,3,3)."""
        # (...,3): axis-angle in so3, roll, pitch, yaw in euler
        offset = np.asarray(value, dtype=float)[..., None] * self.axis
        return (
            euler_to_matrix(self.mean + offset)
            if self.space == "euler"
            else self.mean @ rotvec_to_matrix(offset)
        )

    def to_bin(self, value, n_bins):
        """Values (...) -> bins (...) int, min(floor(norm N), N - 1); a value outside the range goes
        to the bin at its end.
        """
        norm = (np.asarray(value, dtype=float) - self.low) / (self.high - self.low)
        return np.clip(np.floor(norm * n_bins), 0, n_bins - 1).astype(np.int64)

    def from_bin(self, bins, n_bins):
        """Bins (...), which may lie between two -> values (...): bin i is centred at (i + 0.5) / N
        of the range.
        """
        return self.low + (np.asarray(bins, dtype=float) + 0.5) / n_bins * (self.high - self.low)

    def encode(self, rotation, n_bins):
        """Rotations (...,3,3) -> bins (...)."""
        return self.to_bin(self.value(rotation), n_bins)

    def decode(self, bins, n_bins):
        """Bins (...) -> rotations (...,3,3) at their centres: the inverse of `encode` to half a
        bin.
        """
        return self.rotation(self.from_bin(bins, n_bins))

    def to_dict(self):
        """JSON-able, for `from_dict`."""
        listed = lambda v: v.tolist() if isinstance(v, np.ndarray) else v
        return {k: listed(getattr(self, k)) for k in self.__dataclass_fields__}

    @classmethod
    def from_dict(cls, d):
        return cls(
            d["space"],
            np.array(d["mean"]),
            np.array(d["axis"]),
            float(d["low"]),
            float(d["high"]),
            np.array(d["ev_ratio"]),
            d.get("provenance", {}),
        )


def euler_offsets(rotation, mean):
    """Rotations (...,3,3) -> roll, pitch, yaw relative to `mean` (3,), each in [-pi, pi)."""
    return wrap_angle(matrix_to_euler(rotation) - mean)


def fit_basis(rotations, space="so3", provenance=None):
    """Principal axis of rotations (N,3,3) -> RotationBasis.

    space: "so3" or "euler", see RotationBasis. Raises UserError if the rotations do not turn at
    all.
    """
    rotations = np.asarray(rotations, dtype=float)
    if space == "euler":
        euler = matrix_to_euler(rotations)
        mean = circular_mean(euler)
        # The circular mean says where to unwrap. Components need offsets that average to zero.
        mean = mean + wrap_angle(euler - mean).mean(axis=0)
        offsets = wrap_angle(euler - mean)
        offsets = offsets - offsets.mean(axis=0)
    else:
        # log map (N,3): axis-angle from the mean, in its frame
        mean = frechet_mean(rotations)
        offsets = matrix_to_rotvec(mean.T @ rotations)
    # principal components of offsets (N,3): directions in `axes`, largest first
    _, scale, axes = np.linalg.svd(offsets, full_matrices=False)
    # scale is a root of N summed squares: less than 1e-6 rad a rotation
    if scale[0] < 1e-6 * np.sqrt(len(rotations)):
        raise UserError(
            "the rotations do not vary at all, so they have no principal axis; use demonstrations "
            "that turn the gripper"
        )
    axis = axes[0] * np.sign(axes[0][np.abs(axes[0]).argmax()])  # of the two signs, one for certain
    # a first basis over a whole turn gives the values, whose range the second one has
    basis = RotationBasis(
        space, mean, axis, -np.pi, np.pi, scale**2 / (scale**2).sum(), provenance or {}
    )
    values = basis.value(rotations)
    return RotationBasis(
        space,
        mean,
        axis,
        float(values.min()),
        float(values.max()),
        basis.ev_ratio,
        basis.provenance,
    )


def reconstruction_error(basis, rotations):
    """Angles (N,) in radians that the one axis loses, before binning.

    From rotations (N,3,3) to the nearest rotations on the axis.
    """
    return rotation_angle(basis.rotation(basis.value(rotations)), rotations)


def basis_path(dataset):
    """Where a dataset's basis is: inside a dataset that is a folder, beside one that is a file."""
    dataset = Path(dataset)
    return (dataset if dataset.is_dir() else dataset.parent) / BASIS_FILE


def save_basis(path, basis):
    """Write a basis as npz, atomically: mean, principal_axis, pca_min, pca_max, ev_ratio, space,
    provenance (JSON).
    """
    with atomic_path(path) as scratch, open(scratch, "wb") as file:
        np.savez(
            file,
            mean=basis.mean,
            principal_axis=basis.axis,
            pca_min=basis.low,
            pca_max=basis.high,
            ev_ratio=basis.ev_ratio,
            space=basis.space,
            provenance=json.dumps(basis.provenance),
        )


def fingerprint(rows):
    """Digest (hex) of one demonstration's rows (T,N), to five digits.

    By that of its axis-angle vectors a basis knows the demonstrations that it was computed from.
    """
    rounded = np.round(np.asarray(rows, dtype=float), 5) + 0.0  # + 0.0: no negative zeros
    return hashlib.blake2b(rounded.tobytes(), digest_size=8).hexdigest()


def load_basis(path, fingerprints=None):
    """Read `save_basis` -> RotationBasis.

    fingerprints: of demonstrations that the basis has to know, as those that it was computed from
    or those that were held out. Raises UserError for a missing, damaged or impossible file, and for
    one that was computed from other demonstrations.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no rotation basis there; {PRECOMPUTE}, or give --rotation euler")
    try:
        with np.load(path, allow_pickle=False) as f:
            arrays = {key: f[key] for key in BASIS_KEYS}
    except KeyError as error:
        raise UserError(
            f"{path}: key {one_line(error)} is missing, so this is no rotation basis; {PRECOMPUTE}"
        ) from error
    except Exception as error:
        # zipfile, zlib, NumPy and the system each have their own for a damaged file
        raise UserError(
            f"{path}: truncated or not an npz of a rotation basis ({one_line(error)}); {PRECOMPUTE}"
        ) from error
    # types and shapes before values: what follows computes with them
    for key, (kind, shapes) in BASIS_KEYS.items():
        value = arrays[key]
        if value.dtype.kind != kind or value.shape not in shapes:
            raise UserError(
                f"{path}: {key} has shape {value.shape} and dtype {value.dtype}, which no rotation "
                f"basis has; {PRECOMPUTE}"
            )
    try:
        provenance = json.loads(str(arrays["provenance"]))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: provenance is no JSON ({one_line(error)}); {PRECOMPUTE}"
        ) from error
    basis = RotationBasis(
        str(arrays["space"]),
        *(arrays[k].astype(float) for k in ("mean", "principal_axis")),
        float(arrays["pca_min"]),
        float(arrays["pca_max"]),
        arrays["ev_ratio"].astype(float),
        provenance,
    )
    check_basis(basis, path)
    # a basis copied along with other demonstrations would bin their rotations wrongly
    known = {*basis.provenance.get("fingerprints", ()), *basis.provenance.get("held_out", ())}
    if fingerprints is not None and not set(fingerprints) <= known:
        raise UserError(
            f"{path}: a foreign basis, computed from "
            f"{basis.provenance.get('dataset', 'another dataset')} and not from these "
            f"demonstrations; {PRECOMPUTE}"
        )
    return basis


def load_stats(path):
    """Read a checkpoint's <ckpt>_stats.json with NumPy alone -> its dictionary.

    rotation["basis"] in it is a RotationBasis, where the policy has one. Raises UserError for a
    missing, damaged or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such statistics; train.py writes them beside the checkpoint, copy both"
        )
    remedy = "copy it again from beside the checkpoint"
    stats = read_json(path, "folder of a checkpoint", remedy, STATS_FORM)
    # one axis with its basis, or three Euler angles with their ranges (3,2) rad
    rotation = stats["rotation"]
    try:
        if rotation["kind"] == "pca":
            rotation["basis"] = RotationBasis.from_dict(rotation["basis"])
            check_basis(rotation["basis"], path)
        elif np.shape(rotation["euler_range"]) != (3, 2):
            raise ValueError("euler_range is not (3, 2)")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: truncated or no checkpoint statistics ({type(error).__name__}: "
            f"{one_line(error)}); {remedy}"
        ) from error
    return stats


def check_basis(basis, where):
    """Raise UserError unless the basis can encode and decode rotations."""
    shape = (3, 3) if basis.space == "so3" else (3,)
    # each row: is it wrong, the array's name, what to say about it
    for wrong, key, what in (
        (
            basis.space not in SPACES,
            "space",
            f"is '{basis.space}', one of {', '.join(SPACES)} is expected",
        ),
        (basis.mean.shape != shape, "mean", f"has shape {basis.mean.shape}, {shape} is expected"),
        (
            basis.axis.shape != (3,),
            "principal_axis",
            f"has shape {basis.axis.shape}, (3,) is expected",
        ),
        (
            basis.ev_ratio.shape != (3,),
            "ev_ratio",
            f"has shape {basis.ev_ratio.shape}, (3,) is expected",
        ),
        (
            fits(basis.provenance, PROVENANCE_FORM) != "",
            "provenance",
            f"is damaged: {fits(basis.provenance, PROVENANCE_FORM)}",
        ),
        (
            not all(
                np.isfinite(v).all()
                for v in (basis.mean, basis.axis, basis.low, basis.high, basis.ev_ratio)
            ),
            "mean",
            "or another number is NaN or Inf",
        ),
        (
            basis.axis.shape == (3,) and abs(np.linalg.norm(basis.axis) - 1) > 1e-6,
            "principal_axis",
            "is no unit vector",
        ),
        (
            basis.space == "so3"
            and basis.mean.shape == shape
            and np.abs(basis.mean @ basis.mean.T - np.eye(3)).max() > 1e-6,
            "mean",
            "is no rotation matrix",
        ),
        (not basis.low < basis.high, "pca_min", "is not below pca_max"),
        (basis.high - basis.low > 4 * np.pi, "pca_max", "is more than two turns above pca_min"),
        (
            basis.ev_ratio.shape == (3,)
            and not (
                abs(basis.ev_ratio.sum() - 1) < 1e-6
                and (np.diff(basis.ev_ratio) <= 0).all()
                and basis.ev_ratio.min() >= 0
            ),
            "ev_ratio",
            "is no list of shares, largest first",
        ),
    ):
        if wrong:
            raise UserError(f"{where}: {key} {what}; {PRECOMPUTE}")
