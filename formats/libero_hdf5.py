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
      obs/agentview_rgb (N,H,W,3) uint8, ee_pos (T,3), ee_ori (T,3) axis-angle, ee_states (T,6),
          gripper_states (T,2), joint_states (T,7)
      camera/agentview_intrinsics (3,3), agentview_extrinsics (4,4)   camera-to-world, OpenCV axes

Observation t belongs to state t. Where a demonstration's attribute `frame_stride` is k, image n is
of state k n; without it, as in official files, every state has one. `image_orientation` is
'upright' here; official LIBERO files hold rows bottom first ('flipped'), and reading turns them
over.
"""

import json
import re
from pathlib import Path

import numpy as np

import camera
from formats import hdf5
from formats.checks import check_values
from formats.demos import RECOLLECT, Demo
from formats.interface import Demonstrations
from runtime import UserError, fits, one_line

FORMAT = "para-libero-1"
IMAGE = "obs/agentview_rgb"
CAMERA_K, CAMERA_E = "camera/agentview_intrinsics", "camera/agentview_extrinsics"
LOW_DIM = {
    "actions": (7,),
    "obs/ee_pos": (3,),
    "obs/ee_ori": (3,),
    "obs/gripper_states": (2,),
    "obs/joint_states": (7,),
}
ORIENTATIONS = ("upright", "flipped")
ADD_CAMERA = "add cameras with `python collect_demos.py --replay FILE`"


class LiberoFile(Demonstrations):
    """The demonstrations of an HDF5 file."""

    format = "libero"

    @staticmethod
    def accepts(path):
        # a missing path with a suffix was meant to be a file
        return path.is_file() or bool(path.suffix) and not path.is_dir()

    def read(self, image_size, limit):
        with open_demos(self.path) as file:
            # masks and other groups may lie beside the demonstrations
            names = demo_names(file)
            attributes = file_attributes_of(self.path, file)
            check_number(self.path, names, attributes)
            ours = "format" in attributes
            found = [read_demo(self.path, file, name, image_size, ours) for name in names[:limit]]
            self.elsewhere = {d.name for d in found if images_elsewhere(file, d.name)}
        return found, attributes

    def images(self, demo, frames):
        # opened for each call, which comes from several threads
        with open_demos(self.path) as file:
            # image n is of frame n * image_stride
            stored = [i // demo.image_stride for i in frames]
            return read_images(self.path, file, demo.name, stored)

    def files(self, demo):
        return None if demo.name in self.elsewhere else [self.path]


def check_number(path, names, attributes):
    """Raise UserError where no demonstration is there, or another number than the file says."""
    if not names:
        raise UserError(
            f"{path}: data holds no demo_0, demo_1, ...: zero demonstrations; {RECOLLECT}"
        )
    stated = attributes.get("num_demos", len(names))
    if not isinstance(stated, int) or stated != len(names):
        raise UserError(
            f"{path}: data, attribute 'num_demos' is {stated}, {len(names)} demonstrations are "
            f"there; set it to {len(names)} if you dropped some, or {RECOLLECT}"
        )


def write_demo(group, demo, images, frame_stride=1):
    """Write one demonstration into an HDF5 group.

    demo: {path inside the group: array}, with `attrs` a dict; images (N,H,W,3) uint8, upright, of
    every `frame_stride`-th frame.
    """
    hdf5.set_attributes(group, {**demo["attrs"], "frame_stride": frame_stride})
    for key, value in demo.items():
        if key != "attrs":
            hdf5.write_array(group, key, value)
    chunk = (1, *images.shape[1:])  # one frame is read without the others
    group.create_dataset(IMAGE, data=images, chunks=chunk, compression="gzip", compression_opts=1)


def open_demos(path):
    """Open a demonstration file for reading.

    Raises UserError if it is absent, truncated, no HDF5, or being written.
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
        # by number: demo_2 comes before demo_10
        return sorted(
            (n for n in file["data"] if re.fullmatch("demo_[0-9]+", n)),
            key=lambda n: int(n.split("_")[1]),
        )


def file_attributes_of(path, file):
    """Attributes of a file's `data` group as plain values.

    Raises UserError for an unknown format, image orientation or part.
    """
    found = hdf5.attributes(path, file["data"], RECOLLECT)
    # official files name no format
    ours = str(found.get("format", "")).startswith("para-libero")
    if ours and found["format"] != FORMAT:
        raise UserError(
            f"{path}: data, attribute 'format' is {found['format']!r}, this version reads "
            f"{FORMAT}; update the repository"
        )
    # official files do not say it
    orientation = found.get("image_orientation", None if ours else "flipped")
    if not isinstance(orientation, str) or orientation not in ORIENTATIONS:
        raise UserError(
            f"{path}: data, attribute 'image_orientation' is {orientation!r}, one of "
            f"{', '.join(ORIENTATIONS)} is expected; {RECOLLECT}"
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
        key = CAMERA_K if found[1] == "K" else CAMERA_E
        raise UserError(f"{where}/{key}: {found[0]}; {ADD_CAMERA}")


def read_demo(path, file, name, image_size=None, ours=False):
    """Validate one demonstration and return its `Demo`; images stay on disk (see `read_images`).

    ours: whether the file is of this repository's format, in which `perturbed` is never missing.
    Raises UserError with file, key and remedy for a missing key, NaN or Inf, a wrong shape, size or
    dtype, arrays of unequal length, or a missing or impossible camera.
    """
    where = f"{path}: data/{name}"
    group = hdf5.group(path, file["data"], name, RECOLLECT)
    n_images, side = image_shape(path, group, name, image_size)
    # low-dimensional arrays: shapes, dtypes and finite values one by one, then equal lengths
    rows = {}
    for key, tail in {**LOW_DIM, "states": (None,)}.items():
        rows[key] = hdf5.array(path, group, key, RECOLLECT, tail, "f")
    # official files know no pushes
    if ours or hdf5.holds(path, group, "perturbed", RECOLLECT):
        rows["perturbed"] = hdf5.array(path, group, "perturbed", RECOLLECT, ())
    else:
        rows["perturbed"] = np.zeros(len(rows["states"]))
    length = len(rows["actions"])
    for key, value in rows.items():
        if len(value) != length:
            n = len(value)
            raise UserError(f"{where}/{key}: has {n} rows, actions has {length}; {RECOLLECT}")
    attributes = hdf5.attributes(path, group, RECOLLECT)
    stride = image_stride(where, attributes, n_images, length)
    # a label needs a later frame
    if length < 2:
        raise UserError(f"{where}: has {length} steps, at least 2 are needed; {RECOLLECT}")
    # official files have no cameras; a replay adds them
    K, E = (hdf5.array(path, group, key, ADD_CAMERA, kinds="f") for key in (CAMERA_K, CAMERA_E))
    check_camera(K, E, where, side)
    demo = Demo(
        name=name,
        actions=rows["actions"],
        ee_pos=rows["obs/ee_pos"],
        ee_ori=rows["obs/ee_ori"],
        gripper_states=rows["obs/gripper_states"],
        states=rows["states"],
        perturbed=rows["perturbed"] != 0,
        K=K,
        E=E,
        image_size=side,
        attrs=attributes,
        image_stride=stride,
    )
    names = ("ee_pos", "ee_ori", "gripper_states")
    check_values(demo, *(f"{where}/obs/{name}" for name in names))
    return demo


def image_stride(where, attributes, n_images, length):
    """A demonstration has an image of every k-th frame -> k.

    length: its number of frames. Raises UserError if n_images is not the number that follows from
    k.
    """
    stride = attributes.get("frame_stride", 1)
    if not isinstance(stride, int) or stride < 1:
        raise UserError(
            f"{where}, attribute 'frame_stride' is {stride!r}, a whole number from 1 on is "
            f"expected; {RECOLLECT}"
        )
    # length / stride, rounded up: frame 0 has an image
    if n_images != -(-length // stride):
        raise UserError(
            f"{where}/{IMAGE}: has {n_images} rows, actions has {length} and frame_stride is "
            f"{stride}; {RECOLLECT}"
        )
    return stride


def image_shape(path, group, name, image_size):
    """(number, side in px) of a demonstration's stored images.

    Raises UserError unless they are square RGB of 8 bits, and of `image_size` where one is given.
    """
    images = hdf5.dataset(path, group, IMAGE, RECOLLECT, kinds="fiubS")
    where, shape = f"{path}: data/{name}/{IMAGE}", images.shape
    if images.dtype != np.uint8:
        raise UserError(f"{where}: has dtype {images.dtype}, uint8 is expected; {RECOLLECT}")
    if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2]:
        raise UserError(f"{where}: has shape {shape}, (T, S, S, 3) is expected; {RECOLLECT}")
    if image_size and shape[1] != image_size:
        raise UserError(
            f"{where}: images are {shape[1]} px, {image_size} px are asked for; re-render them "
            f"with `python collect_demos.py --replay {path} --image_size {image_size}`"
        )
    return shape[0], shape[1]


def images_elsewhere(file, name):
    """True if a demonstration's images lie in another file, to which this one links."""
    images = file[f"data/{name}/{IMAGE}"]
    return images.file.filename != file.filename or images.is_virtual or bool(images.external)


def read_images(path, file, name, indices):
    """Images (N,S,S,3) uint8, upright, of a demo: rows `indices` of those that are stored.

    Raises UserError where the file is damaged.
    """
    images = hdf5.dataset(path, hdf5.group(path, file["data"], name, RECOLLECT), IMAGE, RECOLLECT)
    with hdf5.guarded(f"{path}: data/{name}/{IMAGE}", RECOLLECT):
        images = np.stack([images[i] for i in indices])
    # rows from the bottom up are turned over, so that every reader sees upright images
    return np.ascontiguousarray(images[:, ::-1]) if image_flipped(file) else images


def stored_fixtures(path, group):
    """Poses of a stored demo's fixtures, {name: 7 numbers}: position (m) and quaternion wxyz.

    They come from this repository's own attribute, or from the `model_file` XML of official files.
    """
    attributes = hdf5.attributes(path, group, RECOLLECT)
    key = "fixtures" if "fixtures" in attributes else "model_file"
    if key not in attributes:
        return {}
    where = f"{path}: {group.name.lstrip('/')}, attribute '{key}'"
    parse = json.loads if key == "fixtures" else _fixtures_of_xml
    try:
        poses = parse(attributes[key])
    except (ValueError, TypeError, SyntaxError) as error:  # a ParseError is a SyntaxError
        raise UserError(
            f"{where}: cannot be read ({one_line(error)}); drop this demo, or {RECOLLECT}"
        ) from error
    # "" where nothing is wrong: first that it is an object, then each pose
    faults = [fits(poses, {})]
    if not faults[0]:
        faults += [fits(pose, [float] * 7) for pose in poses.values()]
    if fault := next(filter(None, faults), ""):
        raise UserError(
            f"{where}: {fault}, poses of fixtures as 7 numbers; drop this demo, or {RECOLLECT}"
        )
    return poses


def _fixtures_of_xml(text):
    """{name: [x, y, z, w, x, y, z]} of the bodies of a MuJoCo model that cannot move."""
    import xml.etree.ElementTree as ElementTree

    poses = {}
    for body in ElementTree.fromstring(text).iter("body"):
        name, position = body.get("name", ""), body.get("pos")
        moves = body.find("freejoint") is not None or body.findall("joint")
        if position and not moves and name.endswith(("_main", "_base")):
            # MuJoCo leaves out a rotation that is none; quaternions are wxyz
            pose = f"{position} {body.get('quat', '1 0 0 0')}"
            # the outer body's: inside a cabinet's _main is a _base, at its origin
            poses.setdefault(name.rsplit("_", 1)[0], [float(x) for x in pose.split()])
    return poses


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


def replay_note(path, simulated, rendering):
    """A sentence on the MuJoCo versions of a replay.

    simulated: that of its states, None if unknown; rendering: that of its images.
    """
    if simulated == rendering:
        return f"{path}: states and images are of MuJoCo {rendering}"
    return (
        f"{path}: its states were simulated with MuJoCo {simulated or 'of an unknown version'}, "
        f"its images are rendered with {rendering}; the new file says so (replayed_versions)"
    )
