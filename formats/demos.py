"""The demonstration format: LIBERO's own HDF5 layout plus cameras. Write, read, validate.

    data                       attrs: format, task_suite, task_id, image_orientation, versions,
                               seed, command, num_demos, ...
    data/demo_i                attrs: num_samples, source, seed, fixtures, init_state, bowl and
                               plate ...
      actions (T,7)            the expert's OSC_POSE action at each state, what a policy should
                               learn
      executed_actions (T,7)   what was sent to the robot; differs from `actions` where the robot
                               was pushed
      perturbed (T,) bool      true while the robot is pushed
      states (T,S)             flattened MuJoCo states, before the action
      rewards, dones (T,), robot_states (T,9)
      obs/agentview_rgb (T,H,W,3) uint8, ee_pos (T,3), ee_ori (T,3) axis-angle, ee_states (T,6),
          gripper_states (T,2), joint_states (T,7)
      camera/agentview_intrinsics (3,3), agentview_extrinsics (4,4)   camera-to-world, OpenCV axes

Observation t belongs to state t. `image_orientation` is 'upright' here; official LIBERO files hold
rows bottom first ('flipped'), and reading turns them over.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import camera
from formats import hdf5
from rot_utils import matrix_to_rotvec, rotvec_to_matrix
from runtime import UserError, fits, one_line

FORMAT = "para-libero-1"
# control steps that opening or closing takes; frames inside such a hold are no training samples
GRIPPER_STEPS = 10
IMAGE, CAMERA_K, CAMERA_E = (
    "obs/agentview_rgb",
    "camera/agentview_intrinsics",
    "camera/agentview_extrinsics",
)
LOW_DIM = {
    "actions": (7,),
    "obs/ee_pos": (3,),
    "obs/ee_ori": (3,),
    "obs/gripper_states": (2,),
    "obs/joint_states": (7,),
}
MIRRORED = "_mirrored"  # suffix of a demonstration's name whose images are read left to right
RECOLLECT = "collect it again with collect_demos.py"
ORIENTATIONS = ("upright", "flipped")
FARTHEST = 20.0  # metres: no arm on a table is farther from its world's origin
SEEN = 0.5  # share of a dataset's frames in which the EEF has to be inside the image
# metres by which fingers that are told to close are wider apart than open ones where the sign is
# wrong
REVERSED = 0.005
ADD_CAMERA = "add cameras with `python collect_demos.py --replay FILE`"


@dataclass
class Demo:
    """The low-dimensional part of a demonstration, in memory. Shapes as in the module's docstring."""

    name: str
    actions: np.ndarray
    ee_pos: np.ndarray
    ee_ori: np.ndarray
    gripper_states: np.ndarray
    states: np.ndarray
    perturbed: np.ndarray
    K: np.ndarray
    E: np.ndarray
    image_size: int
    attrs: dict

    def __len__(self):
        return len(self.actions)


def mirrored(demo):
    """A Demo seen in the mirror of the plane y = 0, in which the robot, its table and agentview
    lie: what is to the left is to the right.

    Positions, rotations, commands and the camera are reflected; images are flipped where they are
    read, by the name's suffix MIRRORED. The hand is symmetric about its own xz plane, so a
    reflected rotation is again one: R' = M R M, M = diag(1, -1, 1). `states` stay as recorded: no
    simulator state has this look.
    """
    # of vectors, and of axes of rotation
    flip, turn = np.array([1.0, -1, 1]), np.array([-1.0, 1, -1])
    actions = demo.actions.copy()
    actions[:, :6] *= np.concatenate([flip, turn])
    K, E = demo.K.copy(), demo.E.copy()
    K[0, 2] = demo.image_size - K[0, 2]
    # the camera's own x is reflected too, or it would be left-handed
    E[:3, :3] = flip[:, None] * E[:3, :3] * np.array([-1.0, 1, 1])
    E[:3, 3] = flip * E[:3, 3]
    return replace(
        demo,
        name=demo.name + MIRRORED,
        actions=actions,
        ee_pos=demo.ee_pos * flip,
        ee_ori=demo.ee_ori * turn,
        K=K,
        E=E,
    )


def turned_back(demo, E):
    """A Demo whose world is moved until its camera is at camera-to-world E (4,4), by a turn about a
    vertical and a shift along the floor.

    Positions, rotations and commands move along, heights and what the image shows stay:
    demonstrations whose cameras were turned about the robot (`collect_demos.py --turn_spread`) come
    to show robots turned before one camera. `states` stay as recorded. Raises UserError where such
    a move does not take one camera to the other.
    """
    move = E @ np.linalg.inv(demo.E)
    turn = move[:3, :3]
    if np.abs(turn[2] - [0, 0, 1]).max() > 1e-3 or abs(move[2, 3]) > 2e-3:
        raise UserError(
            f"{demo.name}: its camera is higher or steeper than agentview, no turn about a vertical takes one to the other; "
            "leave --turn_back out"
        )
    actions = demo.actions.copy()
    actions[:, :3], actions[:, 3:6] = actions[:, :3] @ turn.T, actions[:, 3:6] @ turn.T
    return replace(
        demo,
        actions=actions,
        ee_pos=demo.ee_pos @ turn.T + move[:3, 3],
        ee_ori=matrix_to_rotvec(turn @ rotvec_to_matrix(demo.ee_ori)),
        E=np.array(E, dtype=float),
    )


def write_demo(group, demo, images):
    """Write one demonstration into an HDF5 group.

    demo: {path inside the group: array}, with `attrs` a dict; images (T,H,W,3) uint8, upright.
    """
    for key, value in demo["attrs"].items():
        group.attrs[key] = value
    for key, value in demo.items():
        # with checksums: a flipped bit in a position is then an error and not another position
        if key != "attrs":
            checked = {"fletcher32": True} if np.ndim(value) and np.size(value) else {}
            group.create_dataset(key, data=value, **checked)
    group.create_dataset(
        IMAGE, data=images, chunks=(1, *images.shape[1:]), compression="gzip", compression_opts=1
    )


def open_demos(path):
    """Open a demonstration file for reading. Raises UserError if it is absent, truncated, no HDF5
    or being written.
    """
    path = Path(path)
    file = hdf5.open_file(path, RECOLLECT)
    try:
        if not hdf5.holds(path, file, "data", RECOLLECT):
            raise UserError(
                f"{path}: key 'data' is missing, so this is no LIBERO dataset; {RECOLLECT}"
            )
        hdf5.group(path, file, "data", RECOLLECT)
    except UserError:
        file.close()
        raise
    return file


def demo_names(file):
    """Demo groups in numerical order."""
    with hdf5.guarded(f"{file.filename}: data", RECOLLECT):
        return sorted(
            (n for n in file["data"] if re.fullmatch("demo_[0-9]+", n)),
            key=lambda n: int(n.split("_")[1]),
        )


def file_attributes_of(path, file):
    """Attributes of a file's `data` group, decoded. Raises UserError for a format or an image
    orientation that nobody knows.
    """
    found = hdf5.attributes(path, file["data"], RECOLLECT)
    ours = str(found.get("format", "")).startswith("para-libero")
    if ours and found["format"] != FORMAT:
        raise UserError(
            f"{path}: data, attribute 'format' is {found['format']!r}, this version reads {FORMAT}; update the repository"
        )
    # official files do not say it
    orientation = found.get("image_orientation", None if ours else "flipped")
    if not isinstance(orientation, str) or orientation not in ORIENTATIONS:
        raise UserError(
            f"{path}: data, attribute 'image_orientation' is {orientation!r}, one of {', '.join(ORIENTATIONS)} is "
            f"expected; {RECOLLECT}"
        )
    part = found.get("part", "train")
    if not isinstance(part, str) or part not in ("train", "val"):
        raise UserError(
            f"{path}: data, attribute 'part' is {part!r}, train or val is expected; {RECOLLECT}"
        )
    return {**found, "image_orientation": orientation} if "image_orientation" in found else found


def image_flipped(file):
    """True if the stored images have their rows bottom first, as official LIBERO files do."""
    return file_attributes_of(file.filename, file).get("image_orientation", "flipped") == "flipped"


def check_camera(K, E, where, size=None):
    """Raise UserError unless K is an intrinsic matrix (of a `size` px image) and E a rigid
    camera-to-world transform.
    """
    found = camera.fault(K, E, size and (size, size))
    if found:
        raise UserError(
            f"{where}/{CAMERA_K if found[1] == 'K' else CAMERA_E}: {found[0]}; {ADD_CAMERA}"
        )


def read_demo(path, file, name, image_size=None, ours=False):
    """Validate one demonstration and return its `Demo`; images stay on disk (see `read_images`).

    ours: whether the file is of this repository's format, in which `perturbed` is never missing.
    Raises UserError with file, key and remedy for a missing key, NaN or Inf, a wrong shape, size or
    dtype, arrays of unequal length, or a missing or impossible camera.
    """
    group = hdf5.group(path, file["data"], name, RECOLLECT)
    images = hdf5.dataset(path, group, IMAGE, RECOLLECT, kinds="fiubS")
    where, shape = f"{path}: data/{name}/{IMAGE}", images.shape
    if images.dtype != np.uint8:
        raise UserError(f"{where}: has dtype {images.dtype}, uint8 is expected; {RECOLLECT}")
    if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2]:
        raise UserError(f"{where}: has shape {shape}, (T, S, S, 3) is expected; {RECOLLECT}")
    if image_size and shape[1] != image_size:
        raise UserError(
            f"{where}: images are {shape[1]} px, {image_size} px are asked for; re-render them with "
            f"`python collect_demos.py --replay {path} --image_size {image_size}`"
        )
    rows = {
        key: hdf5.array(path, group, key, RECOLLECT, tail, "f") for key, tail in LOW_DIM.items()
    }
    rows["states"] = hdf5.array(path, group, "states", RECOLLECT, (None,), "f")
    # official files know no pushes
    pushed = ours or hdf5.holds(path, group, "perturbed", RECOLLECT)
    rows["perturbed"] = (
        hdf5.array(path, group, "perturbed", RECOLLECT, ())
        if pushed
        else np.zeros(len(rows["states"]))
    )
    length = len(rows["actions"])
    for key, n in [*((key, len(value)) for key, value in rows.items()), (IMAGE, shape[0])]:
        if n != length:
            raise UserError(
                f"{path}: data/{name}/{key}: has {n} rows, actions has {length}; {RECOLLECT}"
            )
    if length < 2:
        raise UserError(
            f"{path}: data/{name}: has {length} steps, at least 2 are needed; {RECOLLECT}"
        )
    K, E = (hdf5.array(path, group, key, ADD_CAMERA, kinds="f") for key in (CAMERA_K, CAMERA_E))
    check_camera(K, E, f"{path}: data/{name}", shape[1])
    demo = Demo(
        name,
        rows["actions"],
        rows["obs/ee_pos"],
        rows["obs/ee_ori"],
        rows["obs/gripper_states"],
        rows["states"],
        rows["perturbed"] != 0,
        K,
        E,
        shape[1],
        hdf5.attributes(path, group, RECOLLECT),
    )
    check_values(demo, f"{path}: data/{name}/obs/ee_pos", f"{path}: data/{name}/obs/ee_ori")
    return demo


def check_values(demo, positions, angles):
    """Raise UserError for positions that cannot be metres, and rotations that cannot be radians.
    positions, angles: where they are.
    """
    farthest = np.abs(demo.ee_pos).max()
    if farthest > FARTHEST:
        raise UserError(
            f"{positions}: reaches {farthest:.4g}, metres are expected; divide millimetres by 1000"
        )
    largest = np.linalg.norm(demo.ee_ori, axis=-1).max()
    if largest > 2 * np.pi + 1e-6:
        raise UserError(
            f"{angles}: has an angle of {largest:.4g}, radians are expected; convert degrees with numpy.radians"
        )


def check_dataset(demos, path):
    """Raise UserError where the cameras of a dataset do not see the EEF, or its gripper commands
    say the reverse of its fingers.
    """
    seen = np.mean(np.concatenate([_seen(d, d.ee_pos, d.K, d.E) for d in demos]))
    if seen < SEEN:
        raise UserError(
            f"{path}: the EEF is inside the image in {100 * seen:.0f}% of the frames by the stored cameras, at least "
            f"{100 * SEEN:.0f}% is expected; {likely_cause(demos)}"
        )
    if np.mean([_looks_inverse(d) for d in demos]) >= SEEN:
        raise UserError(
            f"{path}: the cameras lie on their side, and their inverses stand upright and see the EEF: it looks like the "
            "inverse transform (world-to-camera); store numpy.linalg.inv of the extrinsics"
        )
    settled = [settled_widths(d) for d in demos]
    opened, closed = (np.concatenate([s[i] for s in settled]) for i in range(2))
    if len(opened) and len(closed) and np.median(closed) > np.median(opened) + REVERSED:
        raise UserError(
            f"{path}: the gripper's fingers are {np.median(closed):.3f} m apart where the command is to close and "
            f"{np.median(opened):.3f} m where it is to open; the command's sign is reversed, in HDF5 +1 closes and -1 opens, "
            "in smith300 1 closes and 0 opens"
        )


def _seen(demo, positions, K, E):
    return camera.in_view(positions, K, E, (demo.image_size, demo.image_size))


def _looks_inverse(demo):
    """True if a camera is rolled onto its side (its x axis is far from level, images are upright)
    and its inverse is not. A camera like agentview, 45 degrees above the table, sees the EEF the
    one way and the other."""
    inverse = np.linalg.inv(demo.E)
    return (
        abs(demo.E[2, 0]) > 0.5
        and abs(inverse[2, 0]) < 0.2
        and inverse[2, 1] < 0
        and _seen(demo, demo.ee_pos, demo.K, inverse).mean() >= SEEN
    )


def likely_cause(demos):
    """Which usual mistake would explain cameras that do not see the EEF: each is undone and looked
    at.
    """

    def scaled(K, size):  # K of a whole image of another size has its centre elsewhere
        factor = size / (2 * K[0, 2])
        return np.diag([factor, factor, 1]) @ K

    opengl = np.diag([1.0, -1, -1, 1])
    metres = np.array([[1, 1, 1, 1e-3]] * 3 + [[1, 1, 1, 1]])
    repairs = {
        "positions in millimetres: divide them by 1000": lambda d: (d.ee_pos / 1000, d.K, d.E),
        "extrinsics in millimetres: divide their translation by 1000": lambda d: (
            d.ee_pos,
            d.K,
            d.E * metres,
        ),
        "OpenGL axes (y up, z backward): multiply the extrinsics by diag(1,-1,-1,1) from the right": lambda d: (
            d.ee_pos,
            d.K,
            d.E @ opengl,
        ),
        "the inverse transform (world-to-camera): store numpy.linalg.inv of the extrinsics": lambda d: (
            d.ee_pos,
            d.K,
            np.linalg.inv(d.E),
        ),
        "the inverse transform with OpenGL axes: store inv(diag(1,-1,-1,1) @ E)": lambda d: (
            d.ee_pos,
            d.K,
            np.linalg.inv(opengl @ d.E),
        ),
        "the intrinsics of another image size: scale them to the images": lambda d: (
            d.ee_pos,
            scaled(d.K, d.image_size),
            d.E,
        ),
    }
    share = {
        what: np.mean(np.concatenate([_seen(d, *repair(d)) for d in demos]))
        for what, repair in repairs.items()
    }
    best = max(share, key=share.get)
    if share[best] >= SEEN:
        return f"it looks like {best} (then {100 * share[best]:.0f}%)"
    return "are the positions and extrinsics in metres and one world frame, camera-to-world with OpenCV axes, and K of this image size?"


def settled_widths(demo):
    """Widths between the fingers (m) where the gripper has been told to open, and where to close,
    for GRIPPER_STEPS on end.
    """
    widths, closing = np.abs(demo.gripper_states).sum(-1), demo.actions[:, 6] > 0
    changes = np.flatnonzero(np.diff(closing)) + 1
    since = (
        np.arange(len(widths))
        - np.concatenate([[0], changes])[np.searchsorted(changes, np.arange(len(widths)), "right")]
    )
    return [widths[(since >= GRIPPER_STEPS) & (closing == state)] for state in (False, True)]


def read_demos(path, image_size=None, limit=None):
    """Validate a file and return (list of Demo, dict of its attributes). Raises UserError as
    `read_demo`, or for no demos.
    """
    with open_demos(path) as file:
        names = demo_names(file)
        if not names:
            raise UserError(
                f"{path}: data holds no demo_0, demo_1, ...: zero demonstrations; {RECOLLECT}"
            )
        attributes = file_attributes_of(path, file)
        stated = attributes.get("num_demos", len(names))
        if not isinstance(stated, int) or stated != len(names):
            raise UserError(
                f"{path}: data, attribute 'num_demos' is {stated}, {len(names)} demonstrations are there; set "
                f"it to {len(names)} if you dropped some, or {RECOLLECT}"
            )
        ours = "format" in attributes
        found = [read_demo(path, file, name, image_size, ours) for name in names[:limit]]
    check_dataset(found, path)
    return found, attributes


def read_images(path, file, name, indices):
    """Images (N,S,S,3) uint8, upright, of a demo's frames. Raises UserError where the file is
    damaged.
    """
    images = hdf5.dataset(path, hdf5.group(path, file["data"], name, RECOLLECT), IMAGE, RECOLLECT)
    with hdf5.guarded(f"{path}: data/{name}/{IMAGE}", RECOLLECT):
        images = np.stack([images[i] for i in indices])
    return np.ascontiguousarray(images[:, ::-1]) if image_flipped(file) else images


def stored_fixtures(path, group):
    """Fixture poses of a stored demo: our own attribute, or read out of the official files'
    `model_file` XML -> {name: 7 numbers}.
    """
    attributes = hdf5.attributes(path, group, RECOLLECT)
    key = "fixtures" if "fixtures" in attributes else "model_file"
    where = f"{path}: {group.name.lstrip('/')}, attribute '{key}'"
    if key not in attributes:
        return {}
    try:
        if key == "fixtures":
            poses = json.loads(attributes[key])
        else:
            poses = _fixtures_of_xml(attributes[key])
    except (ValueError, TypeError, SyntaxError) as error:  # a ParseError is a SyntaxError
        raise UserError(
            f"{where}: cannot be read ({one_line(error)}); drop this demo, or {RECOLLECT}"
        )
    if fault := fits(poses, {}) or next(
        filter(None, (fits(pose, [float] * 7) for pose in poses.values())), ""
    ):
        raise UserError(
            f"{where}: {fault}, poses of fixtures as 7 numbers; drop this demo, or {RECOLLECT}"
        )
    return poses


def _fixtures_of_xml(text):
    """{name: [x, y, z, w, x, y, z]} of the bodies of a MuJoCo model that cannot move."""
    import xml.etree.ElementTree as ElementTree

    poses = {}
    for body in ElementTree.fromstring(text).iter("body"):
        name = body.get("name", "")
        if (
            name.endswith(("_main", "_base"))
            and body.get("pos")
            and body.find("freejoint") is None
            and not body.findall("joint")
        ):
            quat = [float(x) for x in body.get("quat", "1 0 0 0").split()]
            poses[name.rsplit("_", 1)[0]] = [*[float(x) for x in body.get("pos").split()], *quat]
    return poses


def next_waypoint(positions, end, stride, min_travel=0.0):
    """The frame (T,) at which each frame's next waypoint lies on a recorded path.

    positions (T,3) m; end (T,) int, the last frame it may be (the next gripper change). It is
    `stride` frames later, or as many more as it takes to be `min_travel` metres away: where the
    path slows down, a waypoint nearer than a cell of the prediction decodes to where the EEF
    already is, and a policy without memory stays there for ever.
    """
    frames = np.arange(len(positions))
    target = np.minimum(frames + stride, end)
    while True:
        short = (np.linalg.norm(positions[target] - positions, axis=1) < min_travel) & (
            target < end
        )
        if not short.any():
            return target
        target[short] += 1


def split_demos(demos, val_fraction=0.15):
    """(train, validation) lists, split by demo: every k-th demo validates, at least one."""
    if len(demos) < 2:
        raise UserError(
            f"{len(demos)} demonstration: training needs at least 2, one of them for validation; {RECOLLECT}"
        )
    every = min(len(demos), max(2, round(1 / val_fraction)))
    return (
        [d for i, d in enumerate(demos) if i % every != every - 1],
        [d for i, d in enumerate(demos) if i % every == every - 1],
    )


def file_attributes(task, metadata, seed, command, versions):
    """Attributes of the `data` group of a file that this repository writes."""
    return {
        "format": FORMAT,
        "task_suite": task.suite,
        "task_id": task.index,
        "language": task.language,
        "image_orientation": "upright",
        "seed": seed,
        "command": command,
        "versions": json.dumps(versions),
        **metadata,
    }


def simulated_with(attributes):
    """Versions {package: version} of the simulator that a dataset's physics comes from; {} where it
    does not say.

    attributes: of either format. A replay renders anew what another version simulated, and says so
    in `replayed_versions`.
    """
    found = attributes.get("replayed_versions", attributes.get("versions", {}))
    if not isinstance(found, dict):
        try:
            found = json.loads(found)
        except (TypeError, ValueError):
            return {}
    return found if isinstance(found, dict) else {}


def replay_note(path, simulated, rendering):
    """A sentence on the MuJoCo versions of a replay: `simulated` its states (None: unknown),
    `rendering` its images.
    """
    if simulated == rendering:
        return f"{path}: states and images are of MuJoCo {rendering}"
    return (
        f"{path}: its states were simulated with MuJoCo {simulated or 'of an unknown version'}, its images are rendered "
        f"with {rendering}; the new file says so (replayed_versions)"
    )
