"""LeRobot's dataset format, version 3.0: written, from LIBERO's HDF5 layout with cameras.

In the convention of public LIBERO data (see `formats.lerobot`): images mirrored left to right,
which is MuJoCo's picture turned by 180 degrees; state (8), with robosuite's axis-angle; action (7)
was carried out; one frame a control step of 1/20 s. Beside that, for what pixels alone do not tell:
the camera, in meta/cameras.json and, where it differs between demonstrations, as features of every
frame; beside it the height of what the objects stand on, where that is known; and where the
recorded robot was pushed, what the demonstrator meant.
"""

import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from formats import hdf5, libero_hdf5
from formats.demos import RECOLLECT
from formats.lerobot import CAMERA_E, CAMERA_K, EXPERT, PERTURBED, PROVENANCE
from formats.lerobot_statistics import Statistics
from formats.lerobot_video import VideoFiles
from formats.pictures import upright
from runtime import UserError, replace_folder, write_json, writing

FORMAT = "para-lerobot-1"
FPS = 20  # control steps a second
IMAGE, STATE, ACTION = "observation.images.image", "observation.state", "action"
ORIENTATION = "mirrored"
FILE_BYTES, VIDEO_BYTES = 100 * 2**20, 200 * 2**20  # from which on a file is followed by another
FILES_A_CHUNK = 1000
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
AXES = ["x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3"]
# features of numbers: length and names
VECTORS = {
    STATE: (8, {"motors": [*AXES, "gripper", "gripper"]}),
    ACTION: (7, {"motors": [*AXES, "gripper"]}),
}
CAMERA = {CAMERA_K: (9, None), CAMERA_E: (16, None)}
# what LeRobot adds to every frame
COUNTERS = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
NOT_COPIED = ("format", "image_orientation", "num_demos", "total", "problem_info")


def write_dataset(out, sources, attributes=None, video=False, progress=lambda demos: demos):
    """Write demonstrations as a LeRobot folder, and rename it into place when it is whole.

    out: the new folder; sources: list of (HDF5 file, demonstration's name, instruction), in order;
    attributes {key: value}: of the dataset, kept in meta/provenance.json; video: H.264 files, which
    lose a little, instead of PNG in the Parquet files; progress: wraps the list, for a bar. Raises
    UserError for a damaged source, and for one without an image of every frame.
    """
    out = Path(out)
    scratch = out.with_name(f".tmp{os.getpid()}.{out.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with writing(out):
            scratch.mkdir(parents=True)
            writer = _Writer(scratch, *_needed(sources), video)
            for path, name, instruction in progress(sources):
                writer.add(read_source(path, name), instruction)
            writer.finish(attributes or {})
            replace_folder(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# -- what is written ------------------------------------------------------------------------------


def sources_of(path):
    """The demonstrations of an HDF5 file as sources of `write_dataset`, and its attributes."""
    with libero_hdf5.open_demos(path) as file:
        names = libero_hdf5.demo_names(file)
        attributes = libero_hdf5.file_attributes_of(path, file)
        libero_hdf5.check_number(path, names, attributes)
        instruction = attributes.get("language")
        if not isinstance(instruction, str) or not instruction:
            # official files hold it among other things about the task
            instruction = _instruction_of(attributes.get("problem_info"))
        if not instruction:
            raise UserError(
                f"{path}: data, attribute 'language' is missing, the instruction that LeRobot asks "
                f"for; add it, or {RECOLLECT}"
            )
        # a demonstration may be of another sentence than its file
        said = {
            name: hdf5.attributes(path, hdf5.group(path, file["data"], name, RECOLLECT), RECOLLECT)
            for name in names
        }
    kept = {k: v for k, v in attributes.items() if k not in NOT_COPIED}
    return [(path, name, said[name].get("language") or instruction) for name in names], kept


def _instruction_of(text):
    try:
        found = json.loads(text)["language_instruction"]
    except (TypeError, ValueError, KeyError):
        return ""
    # older files hold it as a list of words
    return " ".join(found) if isinstance(found, list) else str(found)


def _needed(sources):
    """(whether the robot was pushed somewhere, whether the camera differs between demonstrations).

    Every demonstration of a dataset has the same features, so all are looked at before any is
    written.
    """
    pushed, cameras = False, set()
    for path, name, _ in sources:
        with libero_hdf5.open_demos(path) as file:
            demo = libero_hdf5.read_demo(path, file, name)
        pushed |= bool(demo.perturbed.any())
        cameras.add(demo.K.tobytes() + demo.E.tobytes())
    return pushed, len(cameras) > 1


def read_source(path, name):
    """A demonstration of an HDF5 file as LeRobot's columns: {feature: array (T,...)}.

    `IMAGE` holds the upright images (T,S,S,3). Beside them K (3,3), E (4,4) and `support`, the
    height in m of what the objects stand on or None. Raises UserError where it is damaged.
    """
    with libero_hdf5.open_demos(path) as file:
        demo = libero_hdf5.read_demo(path, file, name)
        attributes = libero_hdf5.file_attributes_of(path, file)
        demo.source = SimpleNamespace(path=path, attributes=attributes)
        if demo.image_stride != 1:
            raise UserError(
                f"{path}: data/{name} has an image of every {demo.image_stride}th frame, LeRobot "
                f"needs one of each; render them with `python collect_demos.py --replay {path} "
                "--frame_stride 1`"
            )
        group = file["data"][name]
        # what was carried out, where that is another thing
        executed, turn = demo.actions, demo.ee_ori
        if hdf5.holds(path, group, "executed_actions", RECOLLECT):
            executed = hdf5.array(path, group, "executed_actions", RECOLLECT, (7,), "f")
        if hdf5.holds(path, group, "robot_states", RECOLLECT):
            rows = hdf5.array(path, group, "robot_states", RECOLLECT, (9,), "f")
            _check_length(path, name, "robot_states", rows, demo)
            turn = axis_angle(rows[:, 5:], demo.ee_ori)
        _check_length(path, name, "executed_actions", executed, demo)
        images = libero_hdf5.read_images(path, file, name, range(len(demo)))
    camera = lambda matrix: np.tile(matrix.reshape(-1), (len(demo), 1))
    return {
        IMAGE: images,
        STATE: np.hstack([demo.ee_pos, turn, demo.gripper_states]),
        ACTION: executed,
        CAMERA_K: camera(demo.K),
        CAMERA_E: camera(demo.E),
        EXPERT: demo.actions,
        PERTURBED: demo.perturbed,
        "K": demo.K,
        "E": demo.E,
        "support": demo.support,
    }


def _check_length(path, name, key, value, demo):
    if len(value) != len(demo):
        where = f"{path}: data/{name}/{key}"
        raise UserError(f"{where}: has {len(value)} rows, actions has {len(demo)}; {RECOLLECT}")


def axis_angle(quats, otherwise):
    """robosuite's axis-angle (T,3), angles in [0, 2 pi], of quaternions (T,4) xyzw.

    A quaternion's sign is kept, as in public data: q and -q are one rotation and two vectors.
    otherwise (T,3): taken where a quaternion is not of length 1.
    """
    w = np.clip(quats[:, 3], -1, 1)
    angle, sine = 2 * np.arccos(w), np.sqrt(1 - w * w)
    found = quats[:, :3] * np.where(sine > 1e-8, angle / np.maximum(sine, 1e-8), 0.0)[:, None]
    whole = np.abs(np.linalg.norm(quats, axis=1) - 1) < 1e-3
    return np.where(whole[:, None], found, otherwise)


class _Writer:
    """A LeRobot folder in the making: rows and images go into growing files, tables come last."""

    def __init__(self, folder, pushed, moved, video):
        self.folder, self.pushed, self.moved, self.video = folder, pushed, moved, video
        self.tasks, self.rows, self.cameras = {}, [], []
        self.frames, self.side = 0, None
        self.statistics = Statistics()
        self.videos = VideoFiles(folder, VIDEO, IMAGE, FPS, VIDEO_BYTES, FILES_A_CHUNK)
        self.place, self.sink, self.parquet = -1, None, None

    def vectors(self):
        """{feature: (length, names)} of this dataset."""
        expert = {EXPERT: VECTORS[ACTION]} if self.pushed else {}
        # a feature that never changes teaches nothing, and is in meta/cameras.json
        return {**VECTORS, **expert, **(CAMERA if self.moved else {})}

    def add(self, demo, instruction):
        """Append a demonstration of `read_source`."""
        images = upright(demo[IMAGE], ORIENTATION)  # its own inverse
        length, index = len(images), len(self.rows)
        if self.side not in (None, images.shape[1]):
            raise UserError(
                f"{self.folder}: images of {self.side} and {images.shape[1]} px; one dataset has "
                "one size, render them anew with `python collect_demos.py --replay`"
            )
        self.side = images.shape[1]
        task = self.tasks.setdefault(instruction, len(self.tasks))
        values = {name: demo[name].astype(np.float32) for name in self.vectors()}
        if self.pushed:
            values[PERTURBED] = demo[PERTURBED].astype(bool)
        frames = np.arange(length)
        values["timestamp"] = (frames / FPS).astype(np.float32)
        values["frame_index"] = frames
        values["episode_index"] = np.full(length, index)
        values["index"] = self.frames + frames
        values["task_index"] = np.full(length, task)

        row = {"episode_index": index, "tasks": [instruction], "length": length}
        row.update(self._write_rows(values, images))
        row.update(dataset_from_index=self.frames, dataset_to_index=self.frames + length)
        if self.video:
            row.update(self.videos.add(images))
        row.update(self.statistics.add(values, {IMAGE: images}))
        row.update({"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        self.rows.append(row)
        self.cameras.append((demo["K"], demo["E"], demo["support"]))
        self.frames += length

    def _write_rows(self, values, images):
        """Append rows, an episode a group of rows -> where they lie."""
        columns = {name: _column(value) for name, value in values.items()}
        if not self.video:
            cells = [{"bytes": _png(image), "path": None} for image in images]
            kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            columns = {IMAGE: pa.array(cells, kind), **columns}
        table = pa.table(columns)
        if self.sink is None or self.sink.tell() + table.nbytes > FILE_BYTES:
            self._next_file(table.schema)
        self.parquet.write_table(table, row_group_size=len(table))
        chunk, file = divmod(self.place, FILES_A_CHUNK)
        return {"data/chunk_index": chunk, "data/file_index": file}

    def _next_file(self, schema):
        self._close_file()
        self.place += 1
        chunk, file = divmod(self.place, FILES_A_CHUNK)
        path = self.folder / DATA.format(chunk_index=chunk, file_index=file)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.sink = open(path, "wb")  # noqa: SIM115, it stays open for many episodes
        # with checksums, so that a flipped bit is an error when it is read
        self.parquet = pq.ParquetWriter(
            self.sink, schema, use_dictionary=False, write_page_checksum=True
        )

    def _close_file(self):
        if self.sink is not None:
            self.parquet.close()
            self.sink.close()

    def finish(self, attributes):
        """Close the files and write the tables. attributes: of the dataset."""
        self._close_file()
        self.videos.close()
        meta = self.folder / "meta"
        write_json(meta / "info.json", self.info())
        write_json(meta / "stats.json", self.statistics.total())
        write_json(meta / "cameras.json", self.camera_file())
        write_json(meta / PROVENANCE, {**attributes, "format": FORMAT})
        tasks = pa.table({"task_index": list(self.tasks.values()), "task": list(self.tasks)})
        self._write_table(_indexed_by_task(tasks), meta / "tasks.parquet")
        episodes = pa.Table.from_pylist(self.rows)
        self._write_table(episodes, self.folder / EPISODES.format(chunk_index=0, file_index=0))

    @staticmethod
    def _write_table(table, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, write_page_checksum=True)

    def info(self):
        """meta/info.json."""
        features = {
            IMAGE: {
                "dtype": "video" if self.video else "image",
                "shape": [self.side, self.side, 3],
                "names": ["height", "width", "channels"],
                **({"info": self.videos.info} if self.video else {}),
            }
        }
        for name, (length, names) in self.vectors().items():
            features[name] = {"dtype": "float32", "shape": [length], "names": names}
        if self.pushed:
            features[PERTURBED] = {"dtype": "bool", "shape": [1], "names": None}
        for name, dtype in COUNTERS.items():
            features[name] = {"dtype": dtype, "shape": [1], "names": None}
        return {
            "codebase_version": "v3.0",
            "robot_type": "panda",
            "total_episodes": len(self.rows),
            "total_frames": self.frames,
            "total_tasks": len(self.tasks),
            "chunks_size": FILES_A_CHUNK,
            "data_files_size_in_mb": FILE_BYTES // 2**20,
            "video_files_size_in_mb": VIDEO_BYTES // 2**20,
            "fps": FPS,
            "splits": {"train": f"0:{len(self.rows)}"},
            "data_path": DATA,
            "video_path": VIDEO if self.video else None,
            "features": features,
        }

    def camera_file(self):
        """meta/cameras.json: one camera and support, or those of each episode where they differ."""

        def entry(K, E, support):
            known = {} if support is None else {"support": support}
            return {"intrinsics": K.tolist(), "extrinsics": E.tolist(), **known}

        first = self.cameras[0]
        alike = all(np.array_equal(a, b) for c in self.cameras for a, b in zip(c, first))
        of_each = {"episodes": {str(i): entry(*c) for i, c in enumerate(self.cameras)}}
        return {
            "camera": IMAGE,
            "image_orientation": ORIENTATION,
            **(entry(*first) if alike else of_each),
        }


def _indexed_by_task(table):
    """A table whose column `task` pandas reads as its index, as LeRobot expects it."""
    of_type = {"int64": ("int64", "int64"), "string": ("unicode", "object")}
    columns = []
    for field in table.schema:
        kind, numpy_kind = of_type[str(field.type)]
        entry = {"name": field.name, "field_name": field.name, "metadata": None}
        columns.append({**entry, "pandas_type": kind, "numpy_type": numpy_kind})
    told = {"index_columns": ["task"], "column_indexes": [], "columns": columns}
    return table.replace_schema_metadata({"pandas": json.dumps(told)})


def _column(value):
    """An array (T,) or (T,N) as a pyarrow column."""
    if value.ndim == 1:
        return pa.array(value)
    return pa.FixedSizeListArray.from_arrays(pa.array(value.reshape(-1)), value.shape[1])


def _png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
