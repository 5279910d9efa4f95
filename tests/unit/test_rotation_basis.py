"""The 1D rotation basis: decoding inverts encoding to half a bin, values wrap and clamp,
foreign and damaged files are refused.
"""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import rot_utils
from rot_utils import (
    RotationBasis,
    euler_to_matrix,
    fingerprint,
    fit_basis,
    frechet_mean,
    load_basis,
    matrix_to_quat,
    matrix_to_rotvec,
    reconstruction_error,
    rotation_angle,
    rotvec_to_matrix,
    save_basis,
    wrap_angle,
)
from runtime import UserError

settings.register_profile("quick", max_examples=50, deadline=None, derandomize=True)
settings.load_profile("quick")

unit = lambda: (
    arrays(float, 3, elements=st.floats(-1, 1))
    .filter(lambda v: np.linalg.norm(v) > 0.1)
    .map(lambda v: v / np.linalg.norm(v))
)
ROTVEC = arrays(float, 3, elements=st.floats(-1.8, 1.8))
BINS, SHARE = st.integers(1, 64), st.floats(0, 1)
DOWN = np.array([np.pi, 0, 0])  # roll, pitch, yaw of a gripper that points down


def so3_basis(mean, axis, low, width):
    return RotationBasis(
        "so3", rotvec_to_matrix(mean), axis, low, low + width, np.array([1.0, 0, 0])
    )


def euler_basis(yaw, low, width):
    """Turns about the vertical of a gripper that points down: roll lies at the cut between +pi
    and -pi.
    """
    return RotationBasis(
        "euler",
        DOWN + np.array([0, 0, yaw]),
        np.array([0.0, 0, 1]),
        low,
        low + width,
        np.array([1.0, 0, 0]),
    )


YAW, TREMOR = np.radians(60), np.radians(1)


def turning(rng, n=400, pitch=0.0, yaw=YAW, noise=TREMOR):
    """Rotations (n,3,3) of a gripper at a pitch that turns about the vertical by +-yaw, with a
    tremor."""
    turns = euler_to_matrix(np.stack([0 * (t := rng.uniform(-yaw, yaw, n)), 0 * t, t], -1))
    return (
        turns
        @ euler_to_matrix(np.array([0, pitch, 0]))
        @ rotvec_to_matrix(rng.normal(scale=noise, size=(n, 3)))
    )


BASES = st.one_of(
    st.builds(so3_basis, ROTVEC, unit(), st.floats(-3.1, 2), st.floats(0.05, 2 * np.pi - 0.01)),
    st.builds(euler_basis, st.floats(-3, 3), st.floats(-1.5, 0), st.floats(0.05, 1.5)),
)


@given(BASES, SHARE, BINS)
def test_rotations_come_back_from_their_bins_to_half_a_bin(basis, share, n_bins):
    """Over the whole range a rotation comes back within half a bin.

    If encoding used N - 1 and decoding N, it would be off by up to a whole bin at one end.
    """
    value = basis.low + share * (basis.high - basis.low)
    half = (basis.high - basis.low) / n_bins / 2
    back = basis.decode(basis.encode(basis.rotation(value), n_bins), n_bins)
    assert abs(basis.from_bin(basis.to_bin(value, n_bins), n_bins) - value) <= half + 1e-9
    error = rotation_angle(back, basis.rotation(value))
    # the two ends are nearly one rotation
    full = basis.high - basis.low > 2 * np.pi - 0.1 and min(share, 1 - share) < 0.02
    assert error <= half + 1e-6 or full


@given(BASES, BINS)
def test_bins_are_fixed_points(basis, n_bins):
    """What a bin decodes to encodes to that bin again, also for the first and the last."""
    bins = np.arange(n_bins)
    np.testing.assert_array_equal(basis.encode(basis.decode(bins, n_bins), n_bins), bins)


@pytest.mark.parametrize(
    "share, n_bins, expected",
    [
        (0, 48, 0),
        (1, 48, 47),
        (0.5, 48, 24),
        (1 / 48 - 1e-9, 48, 0),
        (1 / 48 + 1e-9, 48, 1),
        (47 / 48 + 1e-9, 48, 47),
        (0.3, 1, 0),
    ],
)
def test_bins_are_of_equal_width_with_the_top_in_the_last(share, n_bins, expected):
    """The bin is min(floor(norm N), N - 1): all have one width, and the top of the range is in
    the last.
    """
    basis = so3_basis(np.zeros(3), np.array([0, 0, 1.0]), -1.0, 2.0)
    assert basis.to_bin(-1 + 2 * share, n_bins) == expected


@given(BASES, st.floats(0.01, 0.5), st.integers(2, 64))
def test_values_outside_are_clamped_to_the_nearer_end(basis, beyond, n_bins):
    """A rotation a little outside the range trains and decodes as the nearer end, never as the
    other.
    """
    if basis.high - basis.low > 4:  # nearly a whole turn: beyond one end lies the other
        return
    ends = basis.encode(basis.rotation(np.array([basis.low - beyond, basis.high + beyond])), n_bins)
    assert ends.tolist() == [0, n_bins - 1]


@given(ROTVEC, unit(), st.floats(-3, 3), st.integers(-2, 2))
def test_so3_values_wrap(mean, axis, value, turns):
    """A value plus whole turns is the same rotation and encodes alike, also where the log map
    jumps at pi.
    """
    basis = so3_basis(mean, axis, -3.1, 6.2)
    shifted = RotationBasis("so3", basis.mean, axis, 1.0, 5.0, basis.ev_ratio)  # a range across pi
    assert wrap_angle(
        basis.value(basis.rotation(value + 2 * np.pi * turns)) - value
    ) == pytest.approx(0, abs=1e-6)
    across = np.linspace(1.01, 4.99, 9)
    np.testing.assert_allclose(shifted.value(shifted.rotation(across)), across, atol=1e-6)


def test_euler_is_unwrapped_about_the_mean():
    """A gripper that points down has roll +pi in one frame and -pi in the next.

    That is no motion.
    """
    rng = np.random.default_rng(0)
    euler = DOWN + np.stack(
        [rng.normal(0, 0.02, 300), rng.normal(0, 0.02, 300), rng.uniform(-1, 1, 300)], -1
    )
    rolls = rot_utils.matrix_to_euler(euler_to_matrix(euler))[:, 0]
    assert rolls.min() < -3 and rolls.max() > 3  # the cut is really crossed
    basis = fit_basis(euler_to_matrix(euler), "euler")
    assert basis.ev_ratio[0] > 0.99 and abs(basis.axis[2]) > 0.99
    assert (basis.low, basis.high) == pytest.approx((-1, 1), abs=0.1)


@given(ROTVEC, unit(), ROTVEC)
def test_the_value_is_the_nearest_on_the_axis(mean, axis, other):
    """A rotation off the axis is encoded as the nearest rotation on it: no neighbouring value
    is closer.
    """
    basis = so3_basis(mean, axis, -np.pi, 2 * np.pi)
    R = rotvec_to_matrix(other)
    best = rotation_angle(basis.rotation(basis.value(R)), R)
    grid = rotation_angle(basis.rotation(np.linspace(-np.pi, np.pi, 181)), R)
    assert best <= grid.min() + 1e-6


@given(ROTVEC, st.integers(0, 99))
def test_frechet_mean_is_the_centre(centre, seed):
    """The logs at the mean sum to zero wherever the rotations lie, and the mean turns with them."""
    spread = rotvec_to_matrix(np.random.default_rng(seed).normal(scale=0.5, size=(40, 3)))
    mean = frechet_mean(rotvec_to_matrix(centre) @ spread)
    assert (
        np.linalg.norm(matrix_to_rotvec(mean.T @ rotvec_to_matrix(centre) @ spread).mean(0)) < 1e-8
    )
    assert rotation_angle(mean, rotvec_to_matrix(centre) @ frechet_mean(spread)) < 1e-6


@given(arrays(float, (5, 3), elements=st.floats(-1.8, 1.8)))
def test_log_map_works_on_stacks(rotvecs):
    """Many rotations at once give what they give one by one."""
    R = rotvec_to_matrix(rotvecs)
    np.testing.assert_array_equal(matrix_to_quat(R), np.stack([matrix_to_quat(r) for r in R]))
    np.testing.assert_allclose(matrix_to_rotvec(R), rotvecs, atol=1e-7)


@pytest.mark.parametrize("space", rot_utils.SPACES)
def test_fit_finds_the_axis(space):
    """For a gripper turned about the vertical the axis is the vertical and the range that of
    the turn. Little is lost.
    """
    R = turning(np.random.default_rng(1)) @ euler_to_matrix(DOWN)
    basis = fit_basis(R, space)
    vertical = basis.axis if space == "euler" else basis.mean @ basis.axis
    assert abs(vertical[2]) > 0.99
    assert basis.ev_ratio[0] > 0.98
    assert basis.ev_ratio.sum() == pytest.approx(1)
    assert basis.high - basis.low == pytest.approx(np.radians(120), abs=0.1)
    assert np.degrees(np.median(reconstruction_error(basis, R))) < 2


def test_near_the_singularity_euler_fails_and_so3_does_not():
    """A gripper points ahead (pitch -90 deg) and turns about the vertical.

    Roll and yaw trade places with each tremor, so Euler explains less than the gate asks for and
    errs by tens of degrees. The log map finds the one axis.
    """
    R = turning(np.random.default_rng(2), pitch=np.radians(-88))
    euler, so3 = fit_basis(R, "euler"), fit_basis(R, "so3")
    assert euler.ev_ratio[0] < rot_utils.EV_GATE < 0.99 < so3.ev_ratio[0]
    p95 = lambda basis: np.degrees(np.percentile(reconstruction_error(basis, R), 95))
    assert p95(euler) > 20 and p95(so3) < 4


@given(st.integers(0, 99), unit())
def test_ratios_do_not_depend_on_the_world_frame(seed, axis):
    """In so3 the same motion in a turned world frame has the same ratios and range."""
    R = turning(np.random.default_rng(seed), 60)
    a, b = fit_basis(R), fit_basis(rotvec_to_matrix(axis) @ R)
    np.testing.assert_allclose(a.ev_ratio, b.ev_ratio, atol=1e-8)
    assert b.high - b.low == pytest.approx(a.high - a.low, abs=1e-6)


def test_rotations_that_stand_still_are_refused():
    """Without motion there is no axis. This is one sentence and not a NaN."""
    with pytest.raises(UserError, match="do not vary"):
        fit_basis(np.stack([euler_to_matrix(DOWN)] * 5))


# -- the file


@pytest.fixture
def saved(tmp_path):
    basis = fit_basis(
        turning(np.random.default_rng(3)), "so3", {"dataset": "mine", "fingerprints": ["a", "b"]}
    )
    save_basis(tmp_path / "rotation_pca_basis.npz", basis)
    return tmp_path / "rotation_pca_basis.npz", basis


def test_a_saved_basis_comes_back(saved):
    """File and dictionary hold every number, and nothing else is left beside the file."""
    path, basis = saved
    for back in (load_basis(path, ["a"]), RotationBasis.from_dict(basis.to_dict())):
        for key in basis.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(back, key), getattr(basis, key))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with np.load(path) as f:
        assert set(f) == {
            "mean",
            "principal_axis",
            "pca_min",
            "pca_max",
            "ev_ratio",
            "space",
            "provenance",
        }


CHANGES = {
    "missing key": (lambda d: d.pop("principal_axis"), "principal_axis"),
    "other space": (lambda d: d.update(space="se3"), "space"),
    "NaN": (lambda d: d.update(pca_min=np.nan), "NaN"),
    "long axis": (lambda d: d.update(principal_axis=np.ones(3)), "unit"),
    "short mean": (lambda d: d.update(mean=np.zeros(3)), "mean"),
    "no rotation": (lambda d: d.update(mean=2 * np.eye(3)), "mean"),
    "empty range": (lambda d: d.update(pca_max=d["pca_min"]), "pca_min"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_impossible_basis_is_named(change, saved):
    """One sentence names file, key and remedy: a robot must not turn by a wrong basis."""
    path, _ = saved
    with np.load(path) as f:
        arrays_ = dict(f)
    mutate, word = CHANGES[change]
    mutate(arrays_)
    np.savez(path, **arrays_)
    with pytest.raises(UserError) as error:
        load_basis(path)
    assert path.name in str(error.value)
    assert word in str(error.value)
    assert "precompute_rotation_pca.py" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"hello\n" * 50, None])
def test_a_damaged_or_missing_basis_is_named(content, saved):
    """A half-copied, a foreign and a missing file each give one sentence."""
    path, _ = saved
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match="rotation_pca_basis.npz"):
        load_basis(path)


def test_a_foreign_basis_is_refused(saved):
    """A basis of other demonstrations has another mean and range: labels would be clamped
    without a warning.
    """
    with pytest.raises(UserError, match="foreign basis, computed from mine"):
        load_basis(saved[0], ["a", "c"])
    ori = np.random.default_rng(0).normal(size=(9, 3))
    assert fingerprint(ori) == fingerprint(ori.copy()) != fingerprint(ori + 1e-3)


def test_a_laptop_needs_numpy_alone():
    """rot_utils imports neither torch nor SciPy nor HDF5."""
    heavy = ("torch", "scipy", "h5py", "matplotlib")
    code = f"import sys, rot_utils; print(*[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
