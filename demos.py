"""The demonstration format: LIBERO's own HDF5 layout plus cameras. Write, read, validate.

    data                       attrs: format, task_suite, task_id, image_orientation, versions, seed, command, num_demos, ...
    data/demo_i                attrs: num_samples, source, seed, fixtures, init_state, bowl and plate ...
      actions (T,7)            the expert's OSC_POSE action at each state, what a policy should learn
      executed_actions (T,7)   what was sent to the robot; differs from `actions` where the robot was pushed
      perturbed (T,) bool      true while the robot is pushed
      states (T,S)             flattened MuJoCo states, before the action
      rewards, dones (T,), robot_states (T,9)
      obs/agentview_rgb (T,H,W,3) uint8, ee_pos (T,3), ee_ori (T,3) axis-angle, ee_states (T,6),
          gripper_states (T,2), joint_states (T,7)
      camera/agentview_intrinsics (3,3), agentview_extrinsics (4,4)   camera-to-world, OpenCV axes

Observation t belongs to state t. `image_orientation` is 'upright' here; official LIBERO files hold rows bottom first
('flipped'), and reading turns them over.
"""
import json
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np

from rot_utils import matrix_to_rotvec, rotvec_to_matrix
from runtime import UserError

FORMAT = "para-libero-1"
GRIPPER_STEPS = 10  # control steps that opening or closing takes; frames inside such a hold are no training samples
IMAGE, CAMERA_K, CAMERA_E = "obs/agentview_rgb", "camera/agentview_intrinsics", "camera/agentview_extrinsics"
LOW_DIM = {"actions": (7,), "obs/ee_pos": (3,), "obs/ee_ori": (3,), "obs/gripper_states": (2,), "obs/joint_states": (7,)}
MIRRORED = "_mirrored"  # suffix of a demonstration's name whose images are read left to right
RECOLLECT = "collect it again with collect_demos.py"
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
    """A Demo seen in the mirror of the plane y = 0, in which the robot, its table and agentview lie: what is to the left is to the right.

    Positions, rotations, commands and the camera are reflected; images are flipped where they are read, by the name's suffix
    MIRRORED. The hand is symmetric about its own xz plane, so a reflected rotation is again one: R' = M R M, M = diag(1, -1, 1).
    `states` stay as recorded: no simulator state has this look.
    """
    flip, turn = np.array([1.0, -1, 1]), np.array([-1.0, 1, -1])  # of vectors, and of axes of rotation
    actions = demo.actions.copy()
    actions[:, :6] *= np.concatenate([flip, turn])
    K, E = demo.K.copy(), demo.E.copy()
    K[0, 2] = demo.image_size - K[0, 2]
    E[:3, :3] = flip[:, None] * E[:3, :3] * np.array([-1.0, 1, 1])  # the camera's own x is reflected too, or it would be left-handed
    E[:3, 3] = flip * E[:3, 3]
    return replace(demo, name=demo.name + MIRRORED, actions=actions, ee_pos=demo.ee_pos * flip, ee_ori=demo.ee_ori * turn, K=K, E=E)


def turned_back(demo, E):
    """A Demo whose world is moved until its camera is at camera-to-world E (4,4), by a turn about a vertical and a shift along the floor.

    Positions, rotations and commands move along, heights and what the image shows stay: demonstrations whose cameras were turned about the
    robot (`collect_demos.py --turn_spread`) come to show robots turned before one camera. `states` stay as recorded.
    Raises UserError where such a move does not take one camera to the other.
    """
    move = E @ np.linalg.inv(demo.E)
    turn = move[:3, :3]
    if np.abs(turn[2] - [0, 0, 1]).max() > 1e-3 or abs(move[2, 3]) > 2e-3:
        raise UserError(f"{demo.name}: its camera is higher or steeper than agentview, no turn about a vertical takes one to the other; "
                        "leave --turn_back out")
    actions = demo.actions.copy()
    actions[:, :3], actions[:, 3:6] = actions[:, :3] @ turn.T, actions[:, 3:6] @ turn.T
    return replace(demo, actions=actions, ee_pos=demo.ee_pos @ turn.T + move[:3, 3], ee_ori=matrix_to_rotvec(turn @ rotvec_to_matrix(demo.ee_ori)),
                   E=np.array(E, dtype=float))


def write_demo(group, demo, images):
    """Write one demonstration into an HDF5 group.

    demo: {path inside the group: array}, with `attrs` a dict; images (T,H,W,3) uint8, upright.
    """
    for key, value in demo["attrs"].items():
        group.attrs[key] = value
    for key, value in demo.items():
        if key != "attrs":
            group[key] = value
    group.create_dataset(IMAGE, data=images, chunks=(1, *images.shape[1:]), compression="gzip", compression_opts=1)


def open_demos(path):
    """Open a demonstration file for reading. Raises UserError if it is absent, truncated or no HDF5."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; {RECOLLECT} --out {path}")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path}: truncated or not an HDF5 file ({error}); {RECOLLECT}")
    if "data" not in file:
        raise UserError(f"{path}: key 'data' is missing, so this is no LIBERO dataset; {RECOLLECT}")
    return file


def demo_names(file):
    """Demo groups in numerical order."""
    return sorted((n for n in file["data"] if n.startswith("demo_") and n[5:].isdigit()), key=lambda n: int(n.split("_")[1]))


def image_flipped(file):
    """True if the stored images have their rows bottom first, as official LIBERO files do."""
    return file["data"].attrs.get("image_orientation", "flipped") == "flipped"


def _array(path, group, key, shape=None):
    """Read group[key] and check it: present, numeric, finite, T rows of `shape`."""
    where = f"{path}: {group.name.lstrip('/')}/{key}"
    if key not in group:
        raise UserError(f"{where}: key is missing; {ADD_CAMERA if key.startswith('camera') else RECOLLECT}")
    try:
        value = group[key][()]
    except (OSError, AttributeError) as error:
        raise UserError(f"{where}: cannot be read, the file is damaged ({error}); {RECOLLECT}")
    if value.dtype.kind not in "fiub":
        raise UserError(f"{where}: has dtype {value.dtype}, numbers are expected; {RECOLLECT}")
    if not np.isfinite(value).all():
        first = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
        raise UserError(f"{where}: has NaN or Inf, first at index {first}; drop this demo or {RECOLLECT}")
    if shape is not None and value.shape[1:] != shape:
        raise UserError(f"{where}: has shape {value.shape}, (T, {', '.join(map(str, shape))}) is expected; {RECOLLECT}")
    return value


def check_camera(K, E, where):
    """Raise UserError unless K is an intrinsic matrix and E a rigid camera-to-world transform."""
    if K.shape != (3, 3) or K[0, 0] <= 0 or K[1, 1] <= 0 or not np.allclose(K[2], [0, 0, 1]):
        raise UserError(f"{where}/{CAMERA_K}: is no (3,3) intrinsic matrix [[fx,0,cx],[0,fy,cy],[0,0,1]]; {ADD_CAMERA}")
    if E.shape != (4, 4) or not np.allclose(E[3], [0, 0, 0, 1]):
        raise UserError(f"{where}/{CAMERA_E}: is no (4,4) camera-to-world transform; {ADD_CAMERA}")
    R = E[:3, :3]
    if not np.allclose(R @ R.T, np.eye(3), atol=1e-4) or np.linalg.det(R) < 0:
        raise UserError(f"{where}/{CAMERA_E}: its rotation is not orthonormal with determinant 1, points would be "
                        f"unprojected wrongly; {ADD_CAMERA}")


def read_demo(path, file, name, image_size=None):
    """Validate one demonstration and return its `Demo`; images stay on disk (see `read_images`).

    Raises UserError with file, key and remedy for a missing key, NaN or Inf, a wrong shape, size or dtype, arrays of
    unequal length, or a missing or impossible camera.
    """
    group = file["data"][name]
    arrays = {key: _array(path, group, key, shape) for key, shape in LOW_DIM.items()}
    states = _array(path, group, "states")
    perturbed = _array(path, group, "perturbed") if "perturbed" in group else np.zeros(len(states))
    K, E = _array(path, group, CAMERA_K), _array(path, group, CAMERA_E)
    check_camera(K, E, f"{path}: data/{name}")
    where = f"{path}: data/{name}/{IMAGE}"
    if IMAGE not in group:
        raise UserError(f"{where}: key is missing; {RECOLLECT}")
    images, length = group[IMAGE], len(arrays["actions"])
    if images.dtype != np.uint8:
        raise UserError(f"{where}: has dtype {images.dtype}, uint8 is expected; {RECOLLECT}")
    if images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
        raise UserError(f"{where}: has shape {images.shape}, (T, S, S, 3) is expected; {RECOLLECT}")
    if image_size and images.shape[1] != image_size:
        raise UserError(f"{where}: images are {images.shape[1]} px, {image_size} px are asked for; re-render them with "
                        f"`python collect_demos.py --replay {path} --image_size {image_size}`")
    for key, value in [*arrays.items(), ("states", states), ("perturbed", perturbed), (IMAGE, images)]:
        if len(value) != length:
            raise UserError(f"{path}: data/{name}/{key}: has {len(value)} rows, actions has {length}; {RECOLLECT}")
    if length < 2:
        raise UserError(f"{path}: data/{name}: has {length} steps, at least 2 are needed; {RECOLLECT}")
    return Demo(name, arrays["actions"], arrays["obs/ee_pos"], arrays["obs/ee_ori"], arrays["obs/gripper_states"], states,
                perturbed.astype(bool), K, E, images.shape[1], dict(group.attrs))


def read_demos(path, image_size=None, limit=None):
    """Validate a file and return (list of Demo, dict of its attributes). Raises UserError as `read_demo`, or for no demos."""
    with open_demos(path) as file:
        names = demo_names(file)[:limit]
        if not names:
            raise UserError(f"{path}: data holds no demo_0, demo_1, ...: zero demonstrations; {RECOLLECT}")
        return [read_demo(path, file, name, image_size) for name in names], dict(file["data"].attrs)


def read_images(path, file, name, indices):
    """Images (N,S,S,3) uint8, upright, of a demo's frames. Raises UserError where the file is damaged."""
    try:
        images = np.stack([file["data"][name][IMAGE][i] for i in indices])
    except OSError as error:
        raise UserError(f"{path}: data/{name}/{IMAGE}: cannot be read, the file is damaged ({error}); {RECOLLECT}")
    return np.ascontiguousarray(images[:, ::-1]) if image_flipped(file) else images


def stored_fixtures(group):
    """Fixture poses of a stored demo: our own attribute, or read out of the official files' `model_file` XML."""
    if "fixtures" in group.attrs:
        return json.loads(group.attrs["fixtures"])
    if "model_file" not in group.attrs:
        return {}
    import xml.etree.ElementTree as ElementTree
    poses = {}
    for body in ElementTree.fromstring(group.attrs["model_file"]).iter("body"):
        name = body.get("name", "")
        if name.endswith(("_main", "_base")) and body.get("pos") and body.find("freejoint") is None and not body.findall("joint"):
            quat = [float(x) for x in body.get("quat", "1 0 0 0").split()]
            poses[name.rsplit("_", 1)[0]] = [*[float(x) for x in body.get("pos").split()], *quat]
    return poses


def next_waypoint(positions, end, stride, min_travel=0.0):
    """The frame (T,) at which each frame's next waypoint lies on a recorded path.

    positions (T,3) m; end (T,) int, the last frame it may be (the next gripper change). It is `stride` frames later, or as
    many more as it takes to be `min_travel` metres away: where the path slows down, a waypoint nearer than a cell of the
    prediction decodes to where the EEF already is, and a policy without memory stays there for ever.
    """
    frames = np.arange(len(positions))
    target = np.minimum(frames + stride, end)
    while True:
        short = (np.linalg.norm(positions[target] - positions, axis=1) < min_travel) & (target < end)
        if not short.any():
            return target
        target[short] += 1


def split_demos(demos, val_fraction=0.15):
    """(train, validation) lists, split by demo: every k-th demo validates, at least one."""
    if len(demos) < 2:
        raise UserError(f"{len(demos)} demonstration: training needs at least 2, one of them for validation; {RECOLLECT}")
    every = min(len(demos), max(2, round(1 / val_fraction)))
    return ([d for i, d in enumerate(demos) if i % every != every - 1],
            [d for i, d in enumerate(demos) if i % every == every - 1])


def file_attributes(task, metadata, seed, command, versions):
    """Attributes of the `data` group of a file that this repository writes."""
    return {"format": FORMAT, "task_suite": task.suite, "task_id": task.index, "language": task.language,
            "image_orientation": "upright", "seed": seed, "command": command, "versions": json.dumps(versions), **metadata}


def simulated_with(attributes):
    """Versions {package: version} of the simulator that a dataset's physics comes from; {} where it does not say.

    attributes: of either format. A replay renders anew what another version simulated, and says so in `replayed_versions`.
    """
    found = attributes.get("replayed_versions", attributes.get("versions", {}))
    if not isinstance(found, dict):
        try:
            found = json.loads(found)
        except (TypeError, ValueError):
            return {}
    return found if isinstance(found, dict) else {}


def replay_note(path, simulated, rendering):
    """A sentence on the MuJoCo versions of a replay: `simulated` its states (None: unknown), `rendering` its images."""
    if simulated == rendering:
        return f"{path}: states and images are of MuJoCo {rendering}"
    return (f"{path}: its states were simulated with MuJoCo {simulated or 'of an unknown version'}, its images are rendered "
            f"with {rendering}; the new file says so (replayed_versions)")
