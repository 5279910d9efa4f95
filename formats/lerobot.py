"""LeRobot's dataset format, versions 3.0 and 2.1: folders of LIBERO demonstrations, read.

    DATASET/meta/info.json ...  see `formats.lerobot_tables`
    DATASET/meta/cameras.json   ours, optional:
      {
        "camera": "observation.images.image",    the feature that is read
        "image_orientation": "mirrored",         how its images are stored, see below
        "intrinsics": [3 rows], "extrinsics": [4 rows],     of every episode
        "tasks": {"INSTRUCTION": {"intrinsics": ..., "extrinsics": ...}},   or of a task
        "episodes": {"0": {"intrinsics": ..., "extrinsics": ...}}           or of an episode
      }

Intrinsics are in pixels of the stored images, extrinsics camera-to-world in metres, OpenCV axes,
both of the upright, unmirrored picture. Where that file has no camera, it comes from the features
`observation.camera_intrinsics` (9) and `observation.camera_extrinsics` (16), and without those from
LIBERO's 40 tasks, by their instruction.

Public LIBERO data holds MuJoCo's pictures, whose rows come bottom first, turned by 180 degrees:
they are upright and mirrored left to right ("mirrored", the default). "upright", "flipped" (bottom
row first) and "rotated" (the true picture turned by 180 degrees) are read too. Every image is
upright and unmirrored once it is read, which is checked against the recorded EEF
(`formats.pictures`).

Columns are taken as public LIBERO data has them: `observation.state` (8) is the EEF's position in
m, its axis-angle in rad up to 2 pi, and the two finger joints in m; `action` (7) the OSC_POSE
action with the gripper's command last, -1 open and +1 closed. `formats.lerobot_writer` may add
`expert_action` (7), what the demonstrator meant where `action` is what was carried out, and
`perturbed`, true while something else moved the robot. Time is the frame index.
"""

from collections import Counter
from pathlib import Path

import numpy as np

import camera
from formats.checks import check_said, check_values
from formats.demos import Demo
from formats.interface import Demonstrations
from formats.lerobot_images import check_videos, read_embedded, read_video
from formats.lerobot_tables import ACTION, AGAIN, STATE, Tables
from formats.libero_cameras import TASKS, camera_of_task, find_task, plain
from formats.pictures import ORIENTATIONS, check_pictures, upright
from formats.smith300 import square_intrinsics
from rot_utils import matrix_to_rotvec, rotvec_to_matrix
from runtime import UserError, read_json

# the third-person camera, by the names that public datasets give it
CAMERAS = ("observation.images.image", "observation.images.agentview", "image")
CAMERA_K, CAMERA_E = "observation.camera_intrinsics", "observation.camera_extrinsics"
EXPERT, PERTURBED = "expert_action", "perturbed"
PARTS = ("0 to 2", "3 to 5", "6 and 7")  # of a state: position, rotation, fingers
PROVENANCE = "provenance.json"  # in meta/, of folders that this repository writes
MATRICES = {"intrinsics": [[float] * 3] * 3, "extrinsics": [[float] * 4] * 4}
OF_EPISODE = {**MATRICES, "support?": float}
CAMERAS_FORM = {
    "camera?": str,
    "support?": float,
    "image_orientation?": str,
    "intrinsics?": MATRICES["intrinsics"],
    "extrinsics?": MATRICES["extrinsics"],
    "tasks?": {...: OF_EPISODE},
    "episodes?": {...: OF_EPISODE},
}


class LeRobotFolder(Demonstrations):
    """The episodes of a LeRobot folder, as demonstrations."""

    format = "lerobot"
    many_tasks = True

    @staticmethod
    def accepts(path):
        return (path / "meta").is_dir()

    def read(self, image_size, limit):
        self.tables = Tables(self.path)
        file = self.path / "meta" / "cameras.json"
        self.cameras = (
            read_json(file, "LeRobot dataset", AGAIN, CAMERAS_FORM) if file.exists() else {}
        )
        self.orientation = self.cameras.get("image_orientation", "mirrored")
        if self.orientation not in ORIENTATIONS:
            raise UserError(
                f"{file}: image_orientation is {self.orientation!r}, one of "
                f"{', '.join(ORIENTATIONS)} is expected"
            )
        self.image = self._image_feature()
        self.shape = self._image_shape()  # (width, height)
        size = self._size(image_size)

        instruction = self._instruction()
        episodes = self.tables.episodes(self.image, instruction, limit)
        if self.tables.info["features"][self.image]["dtype"] == "video":
            if self.tables.version[0] == 2:
                self.tables.with_videos(episodes, self.image)
            check_videos(episodes, self.tables.info["fps"])
        self.tables.read_rows(episodes, self._columns())
        self.episodes = {f"episode_{e.index:06d}": e for e in episodes}
        found = [self._demo(name, e, size) for name, e in self.episodes.items()]
        return found, self._attributes(found)

    def images(self, demo, frames):
        episode, fps = self.episodes[demo.name], self.tables.info["fps"]
        if episode.video:
            stored = read_video(episode, frames, fps, self.shape, demo.image_size)
        else:
            stored = read_embedded(episode, frames, self.image, self.shape, demo.image_size)
        return upright(stored, self.orientation)

    def files(self, demo):
        episode = self.episodes[demo.name]
        # where an episode's images begin, and how they are stored, its metadata say
        said = sorted(p for p in (self.path / "meta").rglob("*") if p.is_file())
        return [*said, episode.file, *filter(None, [episode.video])]

    def check(self):
        super().check()
        remedy = 'set "image_orientation": "{}" in ' + f"{self.path / 'meta' / 'cameras.json'}"
        check_pictures(self.demos, self.path, self.orientation, remedy)

    # -- what is read -----------------------------------------------------------------------------

    def _instruction(self):
        """The instruction of the task that is asked for, by index or by words; None for all."""
        if self.task is None:
            return None
        tasks, asked = self.tables.tasks, str(self.task).strip()
        if asked.isdecimal():
            found = [tasks[int(asked)]] if int(asked) in tasks else []
        else:
            # the whole instruction before a part of several
            found = [t for t in tasks.values() if t == asked]
            found = found or [t for t in tasks.values() if asked.lower() in t.lower()]
        if len(found) != 1:
            listed = "; ".join(f"{i}: {t}" for i, t in sorted(tasks.items())[:50])
            raise UserError(
                f"--task {asked}: fits {len(found)} tasks of {self.path}, which has {listed}"
            )
        return found[0]

    def _image_feature(self):
        """Name of the feature that holds the third-person camera's images."""
        there, where = self.tables.image_features(), self.path / "meta" / "cameras.json"
        asked = self.cameras.get("camera")
        if asked is not None and asked not in there:
            raise UserError(
                f"{where}: camera is {asked!r}, the dataset has {', '.join(there) or 'no images'}"
            )
        found = asked or next((name for name in CAMERAS if name in there), None)
        if found is None and len(there) == 1:
            found = there[0]
        if found is None:
            raise UserError(
                f"{self.path}: which of its cameras is the third-person one is not known, it has "
                f'{", ".join(there) or "none"}; name it as "camera" in {where}'
            )
        return found

    def _image_shape(self):
        """(width, height) of the stored images, as meta/info.json has it."""
        shape = self.tables.info["features"][self.image]["shape"] or []
        numbers = [n for n in shape if isinstance(n, int) and n > 0]
        if len(numbers) != 3 or 3 not in (shape[0], shape[2]):
            raise UserError(
                f"{self.path / 'meta' / 'info.json'}: features: '{self.image}' has shape {shape}, "
                f"[height, width, 3] is expected; {AGAIN}"
            )
        # channels last, or first
        height, width = shape[:2] if shape[2] == 3 else shape[1:]
        return width, height

    def _size(self, image_size):
        """Side of the images in pixels: what is asked for, or the shorter side."""
        width, height = self.shape
        size = image_size or min(width, height)
        if min(width, height) < size:
            raise UserError(
                f"{self.path}: its images are {width}x{height}, {size} px are asked for; give "
                f"--image_size {min(width, height)} or less"
            )
        return size

    def _columns(self):
        """{column: numbers a row} that are read."""
        columns = {self.tables.feature(STATE, 8): 8, self.tables.feature(ACTION, 7): 7}
        if self.tables.has(EXPERT):
            columns[self.tables.feature([EXPERT], 7)] = 7
        if self.tables.has(PERTURBED):
            columns[PERTURBED] = 0
        if self.tables.has(CAMERA_K) and self.tables.has(CAMERA_E):
            columns[self.tables.feature([CAMERA_K], 9)] = 9
            columns[self.tables.feature([CAMERA_E], 16)] = 16
        return columns

    def _demo(self, name, episode, size):
        """The Demo of an Episode, its numbers and its camera checked."""
        where, rows = f"{episode.file}: episode {episode.index}", episode.rows
        state, action = (next(rows[n] for n in names if n in rows) for names in (STATE, ACTION))
        perturbed = rows.get(PERTURBED, np.zeros(episode.length)) > 0.5
        K, E = self._camera(episode, where)
        support = {**self.cameras, **(self._said_of(episode) or {})}.get("support")
        demo = Demo(
            name=name,
            actions=rows.get(EXPERT, action),
            ee_pos=state[:, :3],
            ee_ori=state[:, 3:6],
            gripper_states=state[:, 6:8],
            states=np.zeros((episode.length, 0)),
            perturbed=perturbed,
            K=square_intrinsics(K, *self.shape, size),
            E=E,
            image_size=size,
            attrs={
                "task": episode.task,
                "libero": task_key(episode.task),
                "source": str(episode.video or episode.file),
                **({} if support is None else {"support": support}),
            },
        )
        check_values(demo, *(f"{where}, state {numbers}" for numbers in PARTS))
        # robosuite's angles reach 2 pi, ours stop at pi: the same rotations
        demo.ee_ori = matrix_to_rotvec(rotvec_to_matrix(demo.ee_ori))
        return demo

    def _said_of(self, episode):
        """The entry of an episode or its task in meta/cameras.json, None where there is none."""
        found = self.cameras.get("episodes", {}).get(str(episode.index))
        return found or self.cameras.get("tasks", {}).get(episode.task)

    def _camera(self, episode, where):
        """(K, E) of an episode, in pixels of the stored images. Raises UserError for none."""
        file, stored = self.path / "meta" / "cameras.json", self.cameras
        found = self._said_of(episode)
        if not found and "intrinsics" in stored and "extrinsics" in stored:
            found = stored
        if found:
            K, E = (np.array(found[key], float) for key in MATRICES)
            where = f"{file}: episode {episode.index}"
        elif CAMERA_K in episode.rows:
            K, E = episode.rows[CAMERA_K], episode.rows[CAMERA_E]
            if np.ptp(K, axis=0).max() > 1e-3 or np.ptp(E, axis=0).max() > 1e-4:
                raise UserError(f"{where}: its camera moves, one that stands still is expected")
            K, E = K[0].reshape(3, 3), E[0].reshape(4, 4)
        else:
            square = min(self.shape)
            known = camera_of_task(episode.task, square)
            if known is None or self.shape[0] != self.shape[1]:
                raise UserError(
                    f"{where}: its camera is not known, {episode.task!r} at "
                    f"{self.shape[0]}x{self.shape[1]} px is none of LIBERO's 40 tasks; write its "
                    f"intrinsics and extrinsics into {file}, see docs/lerobot_data.md"
                )
            K, E = known
        if fault := camera.fault(K, E, self.shape):
            raise UserError(f"{where}: {fault[0]}; calibrate the camera at this size")
        return K, E

    def _attributes(self, found):
        """What the dataset says of itself, or what its one task's instruction tells."""
        file = self.path / "meta" / PROVENANCE
        said = read_json(file, "LeRobot dataset", AGAIN) if file.exists() else {}
        check_said(said, file)
        tasks = Counter(d.attrs["task"] for d in found)
        attributes = {"num_demos": len(found), **said}
        known = {"task_suite", "task_id"} <= said.keys()
        # where other tasks' sentences are said, the scene is the dataset's
        placed = known and "instruction_of" in said
        if len(tasks) == 1:
            instruction = next(iter(tasks))
            attributes["language"] = instruction
            # a known scene is no other's of the same sentence, as LIBERO-PRO's suites have them
            believed = known and placed_as_said(said, instruction)
            if not believed and (place := find_task(instruction)):
                attributes["task_suite"], attributes["task_id"] = place
        else:
            # of several tasks each episode says its own; in one scene each its own sentence
            for key in ("language", *(() if placed else ("task_suite", "task_id"))):
                attributes.pop(key, None)
        return attributes


def placed_as_said(said, instruction):
    """Whether an instruction is that of the task that a dataset names, or of the one that it
    perturbs; True of a suite whose sentences are not known here.
    """
    suite, index = str(said["task_suite"]), int(said["task_id"])
    base = next((s for s in TASKS if suite == s or suite.startswith(f"{s}_")), None)
    return base is None or plain(instruction) in TASKS[base][index : index + 1]


def task_key(instruction):
    """Key of the LIBERO task with an instruction, "" for one of none."""
    found = find_task(instruction)
    return f"{found[0]}_{found[1]}" if found else ""


def is_ours(path):
    """True if a folder was written by `formats.lerobot_writer`."""
    return (Path(path) / "meta" / PROVENANCE).is_file()
