"""What a LeRobot folder says in its tables: of versions 3.0 and 2.1, checked, images apart.

meta/info.json                       version, features, fps, where the other files lie
3.0: meta/tasks.parquet              instruction -> task_index
     meta/episodes/*/*.parquet       where each episode's rows and videos lie
     data/chunk-000/file-000.parquet many episodes, one after another
2.1: meta/tasks.jsonl, meta/episodes.jsonl, data/chunk-000/episode_000000.parquet
meta/cameras.json                    ours, optional: see `formats.lerobot`
"""

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from runtime import UserError, fits, one_line, read_json, read_jsonl

AGAIN = "download or write the dataset again"
FLOATS = ("float", "double")  # pyarrow's names
# what a feature may be called: LeRobot's name first, then that of openpi's LIBERO data
STATE, ACTION = ("observation.state", "state"), ("action", "actions")
INFO_FORM = {
    "codebase_version": str,
    "fps": (int, float),
    "features": {...: {"dtype": str, "shape": (list, None)}},
    "data_path": str,
    "video_path?": (str, None),
    "chunks_size?": int,
}


@dataclass
class Episode:
    """One episode: which it is, where its images lie, and its numbers.

    index: that of the dataset; task: its instruction; file, first_row: the Parquet file of its rows
    and the first of them; video, start: the file of its images and the time in s of the first, None
    and 0 where they lie in the Parquet file; rows {column: array (T,...)}.
    """

    index: int
    task: str
    length: int
    file: Path
    first_row: int = 0
    video: Path = None
    start: float = 0.0
    rows: dict = field(default_factory=dict)


class Tables:
    """A LeRobot folder's tables.

    path; info, of meta/info.json; version, (3, 0) or (2, 1); tasks {task_index: instruction}.
    Raises UserError with file, key and remedy for what cannot be read.
    """

    def __init__(self, path):
        self.path = Path(path)
        where = self.path / "meta" / "info.json"
        self.info = read_json(where, "LeRobot dataset", AGAIN, INFO_FORM)
        self.version = _version(where, self.info["codebase_version"])
        if self.info["fps"] <= 0:
            raise UserError(f"{where}: fps is {self.info['fps']}, above 0 is expected; {AGAIN}")
        self.tasks = self._read_tasks()

    def _read_tasks(self):
        """{task_index: instruction}."""
        if self.version[0] == 2:
            file = self.path / "meta" / "tasks.jsonl"
            rows = read_jsonl(file, AGAIN, {"task_index": int, "task": str})
            found = {row["task_index"]: row["task"] for row in rows}
        else:
            file = self.path / "meta" / "tasks.parquet"
            table = read_table(file)
            # the instructions are pandas' index, under one of two names
            texts = [
                n for n in table.column_names if str(table[n].type) in ("string", "large_string")
            ]
            if "task_index" not in table.column_names or len(texts) != 1:
                raise UserError(
                    f"{file}: has the columns {', '.join(table.column_names)}, task_index and one "
                    f"of instructions are expected; {AGAIN}"
                )
            found = dict(zip(table["task_index"].to_pylist(), table[texts[0]].to_pylist()))
        if not found:
            raise UserError(f"{file}: names no task; {AGAIN}")
        sound = lambda key, text: isinstance(key, int) and isinstance(text, str)
        if odd := [key for key, text in found.items() if not sound(key, text)]:
            raise UserError(f"{file}: task_index {odd[0]!r} has no number or no text; {AGAIN}")
        return found

    # -- features ---------------------------------------------------------------------------------

    def feature(self, names, length):
        """The name that a feature of `length` numbers has here, of several that it may have.

        Raises UserError where it has none of them, or another shape.
        """
        where = f"{self.path / 'meta' / 'info.json'}: features"
        found = next((n for n in names if n in self.info["features"]), None)
        if found is None:
            raise UserError(
                f"{where}: '{names[0]}' is missing; LIBERO data is expected, whose state has 8 "
                "numbers and whose action has 7"
            )
        shape = self.info["features"][found]["shape"]
        if shape != [length]:
            raise UserError(
                f"{where}: '{found}' has shape {shape}, [{length}] is expected (state: EEF "
                "position, axis-angle, two fingers; action: OSC_POSE and gripper)"
            )
        return found

    def has(self, name):
        """True if the dataset has a feature of this name."""
        return name in self.info["features"]

    def image_features(self):
        """Names of the features that are images or videos."""
        features = self.info["features"].items()
        return [name for name, f in features if f["dtype"] in ("image", "video")]

    # -- episodes ---------------------------------------------------------------------------------

    def episodes(self, image, task=None, limit=None):
        """The Episodes in order, without their rows: of one instruction, the first so many.

        image: name of the images' feature.
        """
        listed = self._listed_v2() if self.version[0] == 2 else self._listed_v3(image)
        if twice := [i for i, n in Counter(e.index for e in listed).items() if n > 1]:
            raise UserError(f"{self.path}: episode {twice[0]} is listed twice; {AGAIN}")
        found = [e for e in listed if task in (None, e.task)][:limit]
        if not found:
            raise UserError(f"{self.path}: zero episodes{f' of {task!r}' if task else ''}; {AGAIN}")
        return found

    def _listed_v2(self):
        """Episodes of version 2.1: each has a file of rows and one of each video."""
        file = self.path / "meta" / "episodes.jsonl"
        form = {"episode_index": int, "tasks": [str], "length": int}
        found = []
        for row in read_jsonl(file, AGAIN, form):
            index = row["episode_index"]
            at = {"episode_index": index, "episode_chunk": index // self._chunk()}
            found.append(
                Episode(
                    index, _first(file, row["tasks"]), row["length"], self._file("data_path", at)
                )
            )
        return found

    def with_videos(self, episodes, image):
        """Set the video of version 2.1's episodes, each of which has one of its own."""
        for episode in episodes:
            at = {"video_key": image, "episode_index": episode.index}
            at["episode_chunk"] = episode.index // self._chunk()
            episode.video = self._file("video_path", at)

    def _listed_v3(self, image):
        """Episodes of version 3.0, from all files of meta/episodes."""
        folder = self.path / "meta" / "episodes"
        files = sorted(folder.glob("*/*.parquet"))
        if not files:
            raise UserError(f"{folder}: holds no chunk-000/file-000.parquet; {AGAIN}")
        video = self.info["features"][image]["dtype"] == "video"
        places = ["data/chunk_index", "data/file_index"]
        of_video = [f"videos/{image}/{k}" for k in ("chunk_index", "file_index", "from_timestamp")]
        form = {"episode_index": int, "tasks": [str], "length": int, **dict.fromkeys(places, int)}
        if video:
            form.update(zip(of_video, (int, int, float)))
        found = []
        for file in files:
            for number, row in enumerate(read_table(file, list(form)).to_pylist()):
                if fault := fits(row, form):
                    raise UserError(f"{file}: row {number}: {fault}; {AGAIN}")
                at = {"chunk_index": row[places[0]], "file_index": row[places[1]]}
                episode = Episode(
                    row["episode_index"],
                    _first(file, row["tasks"]),
                    row["length"],
                    self._file("data_path", at),
                )
                if video:
                    chunk, which, episode.start = (row[c] for c in of_video)
                    at = {"video_key": image, "chunk_index": chunk, "file_index": which}
                    episode.video = self._file("video_path", at)
                found.append(episode)
        return sorted(found, key=lambda e: e.index)

    def _chunk(self):
        return max(1, self.info.get("chunks_size") or 1000)

    def _file(self, key, values):
        """A file of the dataset, from the pattern in info.json."""
        where, pattern = f"{self.path / 'meta' / 'info.json'}: {key}", self.info.get(key)
        try:
            name = pattern.format(**values)
        except (AttributeError, KeyError, IndexError, ValueError, TypeError) as error:
            raise UserError(f"{where} is {pattern!r}, which names no file; {AGAIN}") from error
        file = self.path / name
        if not file.resolve().is_relative_to(self.path.resolve()):
            raise UserError(f"{where} is {pattern!r}, which leads out of the dataset; {AGAIN}")
        return file

    def read_rows(self, episodes, columns):
        """Fill the episodes' rows: each a float array (T,) or (T,N) of these columns.

        columns {name: N, 0 for a number a row}. Raises UserError for NaN, other shapes, missing or
        repeated frames.
        """
        shapes = {"episode_index": 0, "frame_index": 0, **columns}
        for file in dict.fromkeys(e.file for e in episodes):
            table = read_table(file, list(shapes))
            arrays = {n: _numbers(file, n, table[n], size) for n, size in shapes.items()}
            for episode in (e for e in episodes if e.file == file):
                _take(episode, arrays)


def _take(episode, arrays):
    """Set an episode's rows and its first row, of the arrays of its whole file."""
    rows = np.flatnonzero(arrays["episode_index"] == episode.index)
    where = f"{episode.file}: episode {episode.index}"
    if len(rows) != episode.length:
        raise UserError(
            f"{where}: has {len(rows)} rows, meta/episodes says {episode.length}; {AGAIN}"
        )
    if episode.length < 2:
        raise UserError(f"{where}: has {episode.length} frames, at least 2 are needed; {AGAIN}")
    frames = arrays["frame_index"][rows]
    if (np.diff(rows) != 1).any() or (frames != np.arange(len(rows))).any():
        raise UserError(f"{where}: frame_index is not 0, 1, 2 ... row after row; {AGAIN}")
    episode.first_row = int(rows[0])
    kept = slice(rows[0], rows[-1] + 1)
    episode.rows = {
        n: a[kept] for n, a in arrays.items() if n not in ("episode_index", "frame_index")
    }


def _version(where, text):
    """(3, 0) of "v3.0"."""
    parts = text.removeprefix("v").split(".")
    if not (len(parts) >= 2 and all(p.isdecimal() for p in parts[:2])):
        raise UserError(f"{where}: codebase_version is {text!r}, v3.0 or v2.1 is expected; {AGAIN}")
    version = int(parts[0]), int(parts[1])
    if version[0] not in (2, 3):
        raise UserError(
            f"{where}: codebase_version is {text!r}, v3.0 and v2.1 are read; convert it with "
            "LeRobot's own scripts"
        )
    return version


def _first(file, tasks):
    # an episode with several instructions in turn is of the first
    if not tasks:
        raise UserError(f"{file}: an episode has no task; {AGAIN}")
    return tasks[0]


# -- Parquet --------------------------------------------------------------------------------------


@contextlib.contextmanager
def guarded(path):
    """A context in which the errors of a missing or damaged file become a UserError."""
    if not Path(path).is_file():
        raise UserError(f"{path}: file is missing; {AGAIN}")
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # pyarrow and PyAV have many kinds, and the system's own
        raise UserError(
            f"{path}: cannot be read, it is damaged or of another kind ({one_line(error)}); {AGAIN}"
        ) from error


def open_parquet(path):
    """A pyarrow ParquetFile; pages that carry a checksum are checked by it."""
    return pq.ParquetFile(path, page_checksum_verification=True)


def read_table(path, columns=None):
    """Columns of a Parquet file as a pyarrow table. Raises UserError where one is missing."""
    with guarded(path), open_parquet(path) as file:
        there = file.schema_arrow.names
        missing = [c for c in columns or () if c not in there]
        if missing:
            raise UserError(f"{path}: column '{missing[0]}' is missing; {AGAIN}")
        return file.read(columns)


def _numbers(path, name, column, size):
    """A pyarrow column as floats (T,), or (T,size) of lists. Raises UserError for NaN."""
    where = f"{path}: {name}"
    with guarded(path):
        values = column.combine_chunks()
        if size:
            lengths = set(pc.list_value_length(values).unique().to_pylist())
            if lengths - {size}:
                raise UserError(
                    f"{where}: has rows of {sorted(lengths, key=str)} numbers, {size} are "
                    f"expected; {AGAIN}"
                )
            values = values.flatten()
        if values.null_count:
            raise UserError(f"{where}: has an empty cell; {AGAIN}")
        found = values.to_numpy(zero_copy_only=False).astype(float)
        found = found.reshape(-1, size) if size else found
    if not np.isfinite(found).all():
        first = tuple(int(i) for i in np.argwhere(~np.isfinite(found))[0])
        raise UserError(
            f"{where}: has NaN or Inf, first at index {first}; leave this episode out, or {AGAIN}"
        )
    return found
