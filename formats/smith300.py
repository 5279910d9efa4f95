"""The format "smith300": a real robot's recordings, a folder an episode. Write, read, validate.

    DATASET/
      dataset.json             optional: {"format": "smith300-1", and provenance: task_suite,
                               task_id, grasp, command, seed, ...}; a checkpoint takes from it which
                               task eval.py runs
      rotation_pca_basis.npz   written by precompute_rotation_pca.py
      episode_00000/
        frames/000000.png ...  RGB, PNG or JPG in alphabetical order, or instead of the folder one
                               video.mp4
        episode.npz            T rows each, row t recorded together with frame t:
          eef_pos_t (T,3)        EEF position in metres, in the world (or robot base) frame of
                                 `extrinsics`
          eef_euler_t (T,3)      roll, pitch, yaw in radians, R = Rz(yaw) Ry(pitch) Rx(roll)
          gripper_t (T,)         gripper command, 0 open to 1 closed; above 0.5 counts as closed
          intrinsics (3,3)       K in pixels of the frames as they are stored, lens distortion
                                 removed
          extrinsics (4,4)       camera-to-world, OpenCV axes (x right, y down, z forward), rigid
          gripper_width_t (T,)   optional: metres between the fingers as measured; else taken from
                                 the command
          perturbed_t (T,)       optional: true while something else than the demonstrator moved the
                                 robot
          states_t (T,S)         optional: the simulator's flattened states, where one made the
                                 recording; eval.py renders one to check that it sees what was
                                 trained on

Frames are upright. They may be oblong: reading cuts out the central square, scales it to the
policy's image size, and changes K along with it. Episodes become `demos.Demo` objects, so that
labels are made as for LIBERO's HDF5 files.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

import camera
from formats.checks import check_values
from formats.demos import Demo
from formats.interface import Demonstrations
from rot_utils import euler_to_matrix, matrix_to_rotvec
from runtime import UserError, one_line, read_json, write_json, writing

FORMAT = "smith300-1"
ROWS = {"eef_pos_t": (3,), "eef_euler_t": (3,), "gripper_t": ()}
OPTIONAL_ROWS = {"gripper_width_t": (), "perturbed_t": (), "states_t": (None,)}  # None: any length
REAL = ("eef_pos_t", "eef_euler_t")
CAMERA = {"intrinsics": (3, 3), "extrinsics": (4, 4)}
FRAME_SUFFIXES = (".png", ".jpg", ".jpeg")
MODES = ("RGB", "RGBA", "L", "LA", "P", "1")
ORIENTATION_TAG = 0x0112  # of EXIF
OPEN_GRIPPER = 0.08  # metres between open fingers, where the width was not recorded
AGAIN = "record this episode again, or move its folder out of the dataset"


class EpisodeFolder(Demonstrations):
    """The episodes of a folder, as demonstrations."""

    format = "smith300"

    @staticmethod
    def accepts(path):
        # the last format that is asked: a missing path is reported as a missing folder
        return not path.is_file()

    def read(self, image_size, limit):
        folders = episode_folders(self.path)[:limit]
        # a recording without provenance is fine, a training then knows no task
        stamp = self.path / "dataset.json"
        said = read_stamp(stamp) if stamp.exists() else {}
        found = [read_episode(folder, image_size) for folder in folders]
        return found, {"num_demos": len(folders), **said}

    def images(self, demo, frames):
        return read_frames(self.path / demo.name, frames, demo.image_size)

    def files(self, demo):
        source = frame_files(self.path / demo.name)
        return [source] if isinstance(source, Path) else source


def episode_folders(path):
    """Episode folders of a dataset in alphabetical order. Raises UserError for no folder, a foreign
    one, or no episode.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such folder; a smith300 dataset is a folder of episode folders, see "
            "formats/smith300.py"
        )
    stamp = path / "dataset.json"
    said = read_stamp(stamp).get("format") if stamp.exists() else FORMAT
    if said != FORMAT:
        raise UserError(f"{stamp}: format is {said!r}, '{FORMAT}' is expected; convert the dataset")
    found = in_order(p for p in path.iterdir() if p.is_dir() and p.name.startswith("episode"))
    if not found:
        raise UserError(
            f"{path}: zero episodes: neither HDF5 files, nor LeRobot's meta/, nor folders "
            "episode_...; name a dataset, or collect one with collect_demos.py"
        )
    return found


def in_order(paths):
    """Sort paths by name, with numbers in names by value: 2.png comes before 10.png."""

    def by_value(path):
        # "10.png" -> "", 10, ".png": texts and numbers in turn, so like is compared with like
        parts = re.split("([0-9]+)", path.name)
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]

    return sorted(paths, key=by_value)


def read_stamp(path):
    """dataset.json as a dictionary. Raises UserError where it is none."""
    return read_json(
        path,
        "smith300 dataset",
        "write it again or remove it",
        {"format?": str, "part?": str, "variant?": str},
    )


def load_arrays(path):
    """All arrays of an episode.npz as float64, {key: array}.

    Each is checked, and then its length against the others'. Raises UserError.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: file is missing; {AGAIN}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:
        # zipfile, zlib, NumPy and the system each have their own for a damaged file
        raise UserError(
            f"{path}: truncated or not an npz file ({type(error).__name__}: {error}); {AGAIN}"
        ) from error
    for key, shape in {**ROWS, **OPTIONAL_ROWS, **CAMERA}.items():
        if key in arrays:
            check_array(path, key, arrays[key], shape)
            arrays[key] = arrays[key].astype(float)
        elif key not in OPTIONAL_ROWS:
            raise UserError(f"{path}: key '{key}' is missing; {AGAIN}")
    # row t of every array is of frame t
    length = len(arrays["eef_pos_t"])
    for key in (*ROWS, *OPTIONAL_ROWS):
        if key in arrays and len(arrays[key]) != length:
            raise UserError(
                f"{path}: {key} has {len(arrays[key])} rows, eef_pos_t has {length}; {AGAIN}"
            )
    # units and ranges: radians, and a command between 0 and 1
    largest = np.abs(arrays["eef_euler_t"]).max(initial=0)
    if largest > 2 * np.pi + 1e-6:
        raise UserError(
            f"{path}: eef_euler_t has an angle of {largest:.4g}, radians are expected; convert "
            "degrees with numpy.radians"
        )
    gripper = arrays["gripper_t"]
    if gripper.size and (gripper.min() < 0 or gripper.max() > 1):
        raise UserError(
            f"{path}: gripper_t spans {gripper.min():g} to {gripper.max():g}, 0 (open) to 1 "
            f"(closed) is expected; rescale it, or {AGAIN}"
        )
    return arrays


def check_array(path, key, value, shape):
    """Raise UserError unless an array holds finite numbers and has the right shape.

    shape (None: any length) is that of a row, or of the whole array where it is of the camera.
    """
    if value.dtype.kind not in "fiub":
        raise UserError(f"{path}: {key} has dtype {value.dtype}, numbers are expected; {AGAIN}")
    # cameras have one array an episode, everything else a row a frame
    if key in CAMERA:
        found, wanted = value.shape, shape
    else:
        found = value.shape[1:] if value.ndim else None
        wanted = f"({', '.join(['T', *(str(n or 'S') for n in shape)])})"
    fits = found is not None and len(found) == len(shape)
    if not fits or any(n not in (None, m) for n, m in zip(shape, found)):
        raise UserError(f"{path}: {key} has shape {value.shape}, {wanted} is expected; {AGAIN}")
    if not np.isfinite(value).all():
        first = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
        raise UserError(f"{path}: {key} has NaN or Inf, first at index {first}; {AGAIN}")
    # whole numbers of metres or radians, or float16, would have lost the millimetres
    if (key in REAL and value.dtype.kind != "f") or value.dtype == np.float16:
        raise UserError(
            f"{path}: {key} has dtype {value.dtype}, which rounds metres and radians; {AGAIN}"
        )


def frame_files(folder):
    """The frames' image files in order, or the one video.

    Raises UserError where there is neither, or both.
    """
    video, frames = folder / "video.mp4", folder / "frames"
    if video.is_file() and frames.is_dir():
        raise UserError(
            f"{folder}: has both frames/ and video.mp4, and they may differ; remove one"
        )
    if video.is_file():
        return video
    # macOS leaves a ._NAME.png beside every NAME.png
    is_frame = lambda p: p.suffix.lower() in FRAME_SUFFIXES and not p.name.startswith(".")
    files = in_order(filter(is_frame, frames.iterdir())) if frames.is_dir() else []
    if not files:
        raise UserError(
            f"{folder}: frames are missing, neither frames/*.png or *.jpg nor video.mp4; {AGAIN}"
        )
    # 3.png beside 003.png: which is frame 3?
    numbers = [re.sub("0*([0-9]+)", r"\1", p.stem) for p in files]
    for first, second, a, b in zip(files, files[1:], numbers, numbers[1:]):
        if a == b:
            raise UserError(
                f"{folder}: {first.name} and {second.name} are two frames of one number; remove one"
            )
    return files


def video_reader(path):
    """imageio's reader of a video. Raises UserError where it cannot be read."""
    import imageio.v2 as imageio

    try:
        # each stored frame once: at a variable rate ffmpeg would repeat some and leave out others
        once = ["-fps_mode", "passthrough"]
        return imageio.get_reader(path, format="FFMPEG", output_params=once)
    except Exception as error:  # imageio wraps ffmpeg's failures in several types
        raise UserError(f"{path}: truncated or no video ({one_line(error)}); {AGAIN}") from error


def frame_sizes(source):
    """(number of frames, set of their (width, height)) of a list of image files or a video."""
    if isinstance(source, Path):
        reader = video_reader(source)
        try:
            return reader.count_frames(), {tuple(reader.get_meta_data()["size"])}
        except Exception as error:
            raise UserError(
                f"{source}: truncated or no video ({one_line(error)}); {AGAIN}"
            ) from error
        finally:
            reader.close()
    # headers alone: no pixel is decoded
    sizes = set()
    for path in source:
        with open_image(path, path, AGAIN) as image:
            sizes.add(image.size)
    return len(source), sizes


@contextlib.contextmanager
def open_image(file, where, remedy):
    """A context with a PIL image of 8 bits a channel that is stored upright.

    file: its path, or an open file; where: its name in a message. Raises UserError for another kind
    of image, and for what cannot be decoded while the context is open.
    """
    try:
        with Image.open(file) as image:
            if image.mode not in MODES:
                raise UserError(
                    f"{where}: has pixels of mode {image.mode}, 8-bit RGB is expected (16 bits "
                    "would be cut off at 255); convert it"
                )
            turned = image.getexif().get(ORIENTATION_TAG, 1)
            if turned != 1:
                raise UserError(
                    f"{where}: its EXIF orientation is {turned}, so it is stored turned and K "
                    "could mean either; store it upright, without that mark"
                )
            yield image
    except UserError:
        raise
    except Exception as error:
        # OSError, SyntaxError, ValueError, DecompressionBombError: PIL has one for each format
        raise UserError(f"{where}: truncated or no image ({one_line(error)}); {remedy}") from error


def square_intrinsics(K, width, height, size):
    """K of the central square of a (width, height) image, scaled to `size` pixels."""
    side = min(width, height)
    # the square's corner becomes the origin, then pixels become larger or smaller
    # (3,3) on homogeneous pixels (u, v, 1)
    shift = np.array([[1, 0, -(width - side) / 2], [0, 1, -(height - side) / 2], [0, 0, 1.0]])
    return np.diag([size / side, size / side, 1.0]) @ shift @ K


def square_image(image, size):
    """The central square of a PIL image or array -> (size,size,3) uint8.

    `square_intrinsics` gives its K.
    """
    image = (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB")
    side, (width, height) = min(image.size), image.size
    if (width, height) != (size, size):
        left, top = (width - side) / 2, (height - side) / 2
        image = image.resize((size, size), Image.BILINEAR, box=(left, top, left + side, top + side))
    return np.array(image)  # a copy: PIL's own memory is read-only


def read_episode(folder, image_size=None):
    """Validate one episode folder and return its `demos.Demo`; frames stay on disk.

    image_size: side that frames are scaled to; None leaves their shorter side. Raises UserError
    with file, key and remedy for whatever differs from the module's docstring.
    """
    folder = Path(folder)
    where, source = folder / "episode.npz", frame_files(folder)
    arrays = load_arrays(where)
    length = len(arrays["eef_pos_t"])
    # frames and rows have to pair up, all frames to be of one size
    n_frames, sizes = frame_sizes(source)
    if n_frames != length:
        raise UserError(
            f"{folder}: {n_frames} frames, but eef_pos_t in episode.npz has {length} rows; {AGAIN}"
        )
    if length < 2:
        raise UserError(f"{folder}: has {length} steps, at least 2 are needed; {AGAIN}")
    if len(sizes) > 1:
        listed = ", ".join(f"{w}x{h}" for w, h in sorted(sizes))
        raise UserError(f"{folder}: frames of different sizes, {listed}; {AGAIN}")
    width, height = sizes.pop()
    # the central square is as large as the shorter side; it is never scaled up
    side = min(width, height)
    size = image_size or side
    if side < size:
        raise UserError(
            f"{folder}: frames are {width}x{height}, {size} px are asked for; give --image_size "
            f"{side // 16 * 16} or less, or record larger frames"
        )
    K, E = arrays["intrinsics"], arrays["extrinsics"]
    # K is checked at the size it was calibrated at, and cut and scaled with the frames below
    check_camera(K, E, where, (width, height))
    # of actions only the gripper's command is known; its place stands in ee_pos
    closed = arrays["gripper_t"] > 0.5
    opening = arrays.get("gripper_width_t", np.where(closed, 0.0, OPEN_GRIPPER))
    actions = np.zeros((length, 7))
    actions[:, 6] = np.where(closed, 1.0, -1.0)
    rotvec = matrix_to_rotvec(euler_to_matrix(arrays["eef_euler_t"]))
    demo = Demo(
        name=folder.name,
        actions=actions,
        ee_pos=arrays["eef_pos_t"],
        ee_ori=rotvec,
        # two fingers, each half of the width, as LIBERO has them
        gripper_states=np.stack([opening / 2, -opening / 2], -1),
        states=arrays.get("states_t", np.zeros((length, 0))),
        perturbed=arrays.get("perturbed_t", np.zeros(length)) > 0.5,
        K=square_intrinsics(K, width, height, size),
        E=E,
        image_size=size,
        attrs={"source": str(source if isinstance(source, Path) else folder)},
    )
    check_values(demo, *(f"{where}: {key}" for key in (*REAL, "gripper_width_t")))
    return demo


def check_camera(K, E, where, size):
    """Raise UserError unless K is an intrinsic matrix with its centre inside the (width, height)
    frame and E a rigid transform.
    """
    found = camera.fault(K, E, size)
    if found:
        key = "intrinsics" if found[1] == "K" else "extrinsics"
        raise UserError(
            f"{where}: {key}: {found[0]}; calibrate the camera at this size, and store K and "
            "[R t; 0 1] with OpenCV axes"
        )


def iterate_frames(source, size):
    """Central squares (size,size,3) uint8 of all frames of `frame_files`, in order. Raises
    UserError where one cannot be decoded.
    """
    if not isinstance(source, Path):
        for path in source:
            yield decode_image(path, size)
        return
    reader, decoded = video_reader(source), 0
    try:
        for frame in reader:
            yield square_image(frame, size)
            decoded += 1
    except Exception as error:
        raise UserError(
            f"{source}: cannot be decoded at frame {decoded} ({one_line(error)}); {AGAIN}"
        ) from error
    finally:
        reader.close()


def decode_image(path, size):
    """Central square (size,size,3) uint8 of an image file."""
    with open_image(path, path, AGAIN) as image:
        return square_image(image, size)


def read_frames(folder, indices, size):
    """Frames (N,size,size,3) uint8 of an episode, central squares. Raises UserError where one
    cannot be decoded.
    """
    source, indices = frame_files(Path(folder)), [int(i) for i in indices]
    if not isinstance(source, Path):
        return np.stack([decode_image(source[i], size) for i in indices])
    # a video is decoded from its beginning: seeking lands on key frames, not on the frame asked for
    wanted, images = set(indices), {}
    for i, image in enumerate(iterate_frames(source, size)):
        if i in wanted:
            images[i] = image
        if len(images) == len(wanted):
            return np.stack([images[i] for i in indices])
    raise UserError(f"{source}: ends before frame {max(wanted)}; {AGAIN}")


def write_episode(folder, arrays, images, video=False, fps=20):
    """Write one episode folder, and rename it into place when it is whole.

    arrays: as in the module's docstring; images (T,H,W,3) uint8. Frames become PNG files, which
    lose nothing, or with `video` an H.264 video.mp4 of `fps` frames a second, a tenth of the size.
    """
    folder = Path(folder)
    # a killed process leaves a hidden folder, never half an episode
    scratch = folder.with_name(f".tmp{os.getpid()}.{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with writing(folder):
            _fill_episode(scratch, arrays, images, video, fps)
            # a worker that outlived its killed parent may have written the same episode meanwhile
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fill_episode(scratch, arrays, images, video, fps):
    """The files of an episode, into a new folder."""
    scratch.mkdir(parents=True)
    if video:
        import imageio.v2 as imageio

        # macro_block_size 1: imageio would scale frames to multiples of 16 px
        imageio.mimwrite(
            scratch / "video.mp4",
            list(images),
            format="FFMPEG",
            fps=fps,
            codec="libx264",
            quality=9,
            macro_block_size=1,
            output_params=["-pix_fmt", "yuv420p"],
        )
    else:
        (scratch / "frames").mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(scratch / "frames" / f"{i:06d}.png", compress_level=1)
    with open(scratch / "episode.npz", "wb") as file:
        np.savez_compressed(file, **arrays)


def write_dataset_stamp(path, attributes):
    """Write dataset.json, which says what the folder is and where it comes from."""
    write_json(Path(path) / "dataset.json", {"format": FORMAT, **attributes})
