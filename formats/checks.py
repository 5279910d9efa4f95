"""What is wrong with numbers that can be read: units, frames and signs that no recording has."""

from collections import defaultdict

import numpy as np

import camera
from formats.demos import GRIPPER_STEPS
from runtime import UserError

FARTHEST = 20.0  # metres: no arm on a table is farther from its world's origin
WIDEST, SLACK = 0.3, 0.01  # metres: no gripper opens as far; what closed fingers may give way
SEEN = 0.5  # share of a dataset's frames in which the EEF has to be inside the image
# metres by which fingers that are told to close are wider apart than open ones where the sign is
# wrong
REVERSED = 0.005


# what a dataset may say of itself: by these a checkpoint finds its task, its expert and its images
TEXTS = ("task_suite", "language", "grasp", "variant", "setting", "split", "render")


def check_said(attributes, path):
    """Raise UserError for attributes of a dataset that are not what they are read as: a training
    would end in a checkpoint that cannot be loaded.

    path: of the dataset, or of the file that says it.
    """
    for name in TEXTS:
        if name in attributes and not isinstance(attributes[name], str):
            raise UserError(
                f"{path}: its attribute '{name}' is {attributes[name]!r}, text is expected; mend "
                "or remove it"
            )
    task = attributes.get("task_id", 0)
    # official files and JSON may hold it as text
    if not (str(task).isdecimal() and isinstance(task, (int, str))):
        raise UserError(
            f"{path}: its attribute 'task_id' is {task!r}, a whole number from 0 on is expected; "
            "mend or remove it"
        )


def check_values(demo, positions, angles, fingers):
    """Raise UserError for positions and fingers that cannot be metres, and rotations that cannot be
    radians.

    positions, angles, fingers: file and key of each, for the message.
    """
    # Units show in the magnitude: no arm reaches 20 m, no axis-angle vector is longer than a turn.
    farthest = np.abs(demo.ee_pos).max()
    if farthest > FARTHEST:
        raise UserError(
            f"{positions}: reaches {farthest:.4g}, metres are expected; divide millimetres by 1000"
        )
    largest = np.linalg.norm(demo.ee_ori, axis=-1).max()
    if largest > 2 * np.pi + 1e-6:
        raise UserError(
            f"{angles}: has an angle of {largest:.4g}, radians are expected; convert degrees with "
            "numpy.radians"
        )
    widths = demo.gripper_states[:, 0] - demo.gripper_states[:, 1]
    for width in (widths.min(), widths.max()):
        check_width(width, fingers)


def check_width(metres, where):
    """Raise UserError for fingers that are not 0 to WIDEST m apart: in millimetres all would count
    as open.
    """
    if not -SLACK <= metres <= WIDEST:
        raise UserError(
            f"{where}: fingers {metres:.4g} apart, 0 to {WIDEST:g} metres are expected; divide "
            "millimetres by 1000"
        )


def check_dataset(demos, path):
    """Raise UserError where a dataset's cameras or its gripper's sign cannot be right.

    The cameras have to see the EEF, and the fingers have to follow the gripper commands.
    """
    # millimetres, OpenGL axes, the inverse and K of another size all show here
    seen = np.mean(np.concatenate([_seen(d, d.ee_pos, d.K, d.E) for d in demos]))
    if seen < SEEN:
        raise UserError(
            f"{path}: the EEF is inside the image in {100 * seen:.0f}% of the frames by the stored "
            f"cameras, at least {100 * SEEN:.0f}% is expected; {likely_cause(demos)}"
        )
    # an inverse transform may see the EEF too, and has then passed the check above
    if np.mean([_looks_inverse(d) for d in demos]) >= SEEN:
        raise UserError(
            f"{path}: the cameras lie on their side, and their inverses stand upright and see the "
            "EEF: it looks like the inverse transform (world-to-camera); store numpy.linalg.inv of "
            "the extrinsics"
        )
    # fingers that open on the command to close: the sign is the other way round
    # widths (N,), (M,) in all frames with the gripper settled: told to open, told to close
    settled = [settled_widths(d) for d in demos]
    opened, closed = (np.concatenate([s[i] for s in settled]) for i in range(2))
    if len(opened) and len(closed) and np.median(closed) > np.median(opened) + REVERSED:
        raise UserError(
            f"{path}: the gripper's fingers are {np.median(closed):.3f} m apart where the command "
            f"is to close and {np.median(opened):.3f} m where it is to open; the command's sign is "
            "reversed, in HDF5 +1 closes and -1 opens, in smith300 1 closes and 0 opens"
        )


def _seen(demo, positions, K, E):
    # (T,) bool: is each frame's EEF inside the image by this camera?
    return camera.in_view(positions, K, E, (demo.image_size, demo.image_size))


def _looks_inverse(demo):
    """True if a camera looks like the inverse of an upright one.

    It is rolled onto its side (images are upright, so its x axis should be level) and its inverse
    is not. Whether it sees the EEF does not tell: a camera like agentview, 45 degrees above the
    table, sees it either way.
    """
    inverse = np.linalg.inv(demo.E)
    # E[2, 0], E[2, 1]: world heights of the camera's x and y axes; upright is x level, y down
    return (
        abs(demo.E[2, 0]) > 0.5
        and abs(inverse[2, 0]) < 0.2
        and inverse[2, 1] < 0
        and _seen(demo, demo.ee_pos, demo.K, inverse).mean() >= SEEN
    )


def likely_cause(demos):
    """Which usual mistake explains cameras that do not see the EEF.

    Each of `_mended` is tried: the remedy after which most frames see the EEF is named.
    """
    seen = defaultdict(list)
    for demo in demos:
        for cause, mended in _mended(demo).items():
            seen[cause].append(_seen(demo, *mended))
    share = {cause: np.mean(np.concatenate(parts)) for cause, parts in seen.items()}
    best = max(share, key=share.get)
    if share[best] >= SEEN:
        return f"it looks like {best} (then {100 * share[best]:.0f}%)"
    return (
        "are the positions and extrinsics in metres and one world frame, camera-to-world with "
        "OpenCV axes, and K of this image size?"
    )


def _mended(demo):
    """{a usual mistake with its remedy: (positions, K, E) of a Demo after that remedy}."""
    at, K, E = demo.ee_pos, demo.K, demo.E
    # on the right of E: the camera's y and z axes change sign
    opengl = np.diag([1.0, -1, -1, 1])
    # times E, element by element: the translation's column alone
    metres = np.array([[1, 1, 1, 1e-3]] * 3 + [[1, 1, 1, 1]])
    # K of a whole image of another size has its centre elsewhere
    # assuming that the principal point is the middle, as in nearly any camera
    factor = demo.image_size / (2 * K[0, 2])
    rescaled = np.diag([factor, factor, 1]) @ K
    axes = "OpenGL axes (y up, z backward): multiply the extrinsics by diag(1,-1,-1,1) from the"
    inverse = "the inverse transform (world-to-camera): store numpy.linalg.inv of the extrinsics"
    both = "the inverse transform with OpenGL axes: store inv(diag(1,-1,-1,1) @ E)"
    return {
        "positions in millimetres: divide them by 1000": (at / 1000, K, E),
        "extrinsics in millimetres: divide their translation by 1000": (at, K, E * metres),
        f"{axes} right": (at, K, E @ opengl),
        inverse: (at, K, np.linalg.inv(E)),
        both: (at, K, np.linalg.inv(opengl @ E)),
        "the intrinsics of another image size: scale them to the images": (at, rescaled, E),
    }


def settled_widths(demo):
    """Widths between the fingers (m) in frames where the gripper has settled: [open, closed].

    Settled means that the command was the same for GRIPPER_STEPS frames.
    """
    widths, closing = np.abs(demo.gripper_states).sum(-1), demo.actions[:, 6] > 0
    frames, changes = np.arange(len(widths)), np.flatnonzero(np.diff(closing)) + 1
    # (T,), the last change at or before each frame; the start counts as one
    last_change = np.concatenate([[0], changes])[np.searchsorted(changes, frames, "right")]
    settled = frames - last_change >= GRIPPER_STEPS
    return [widths[settled & (closing == command)] for command in (False, True)]
