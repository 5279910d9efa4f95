"""Demonstrations of several datasets, to be trained on together: of a suite's tasks, a file each.

Cameras may differ: each demonstration has its own. What may not differ is named in ALIKE.
"""

import sys
from pathlib import Path

import numpy as np

from formats.dataset import SUFFIXES, open_dataset
from formats.lerobot import LeRobotFolder
from formats.smith300 import in_order
from rot_utils import rotation_angle, rotvec_to_matrix
from runtime import UserError

# attributes that all datasets have in common, with what holds where a dataset does not say
ALIKE = {"render": "exact", "variant": "task", "setting": "in_dist", "split": ""}
# settings that differ in their cameras alone: the task's own view is one of those that `cameras`
# draws, so together they are of `cameras`
CAMERAS_ALONE = {"in_dist", "cameras"}
COPY = 1e-4  # between numbers of one demonstration in two formats, at most
RENDER_AGAIN = "collect one of them again with the other's"


class Mixture:
    """Several `interface.Demonstrations` as one.

    datasets: in the order given; demos: of all of them; attributes: of the only dataset, or what
    all of several say alike, with their number of demonstrations. Raises UserError for datasets
    that do not go together, and for one that is given twice.
    """

    def __init__(self, datasets):
        self.datasets = list(datasets)
        self.demos = [demo for dataset in self.datasets for demo in dataset.demos]
        self.attributes = self.datasets[0].attributes
        if len(self.datasets) > 1:
            self._check()
            self.attributes = self._common()

    def _check(self):
        first = self.datasets[0]
        for other in self.datasets[1:]:
            if unlike := difference(first.attributes, other.attributes):
                name, ours, theirs = unlike
                raise UserError(
                    f"--dataset {other.path}: its {name} is {theirs}, that of {first.path} is "
                    f"{ours}, and one training takes one; {RENDER_AGAIN}, or train on them apart"
                )
        known = {}
        for dataset in self.datasets:
            if twin := known.get(dataset.fingerprint):
                raise UserError(
                    f"--dataset {dataset.path}: holds the same demonstrations as {twin}; "
                    "leave one of them out"
                )
            known[dataset.fingerprint] = dataset.path
        if len({dataset.format for dataset in self.datasets}) > 1:
            self._check_conversions()

    def _check_conversions(self):
        """Raise UserError for a demonstration that is there in two formats, whose numbers differ in
        their last bits: one copy could be held out and the other trained on.
        """
        by_length = {}
        for demo in self.demos:
            for other in by_length.setdefault(len(demo), []):
                another_format = other.source.format != demo.source.format
                if another_format and any(same_rows(other, demo, k) for k in ("ee_pos", "actions")):
                    raise UserError(
                        f"--dataset {demo.source.path}: {demo.name} is {other.name} of "
                        f"{other.source.path} in another format; leave one of the two out"
                    )
            by_length[len(demo)].append(demo)

    def _common(self):
        said = [dataset.attributes for dataset in self.datasets]
        # compared as text: NumPy's arrays and numbers have no single truth
        same = lambda key: all(key in s and str(s[key]) == str(said[0][key]) for s in said)
        found = {key: said[0][key] for key in said[0] if same(key)}
        return {**found, **of_both_settings(said), "num_demos": len(self.demos)}

    @property
    def tasks(self):
        """Names of the tasks among the demonstrations, in their order."""
        return list(dict.fromkeys(demo.group for demo in self.demos))

    @property
    def sentences(self):
        """{task: its instructions}, in the order of the demonstrations: several where other tasks'
        sentences are said in its scene.
        """
        requests = dict.fromkeys(demo.request for demo in self.demos)
        return {task: [words for group, words in requests if group == task] for task in self.tasks}

    def turned(self):
        """{task: the largest angle in degrees by which a demonstration turns its gripper away from
        where it began}.
        """
        found = dict.fromkeys(self.tasks, 0.0)
        for demo in self.demos:
            rotation = rotvec_to_matrix(demo.ee_ori)
            largest = float(np.degrees(rotation_angle(rotation[:1], rotation).max()))
            found[demo.group] = round(max(found[demo.group], largest), 2)
        return found

    def check_frames(self, frame_stride):
        """Raise UserError unless every k-th frame has an image in all of several datasets."""
        if len(self.datasets) == 1:
            return
        strides = sorted({demo.image_stride for demo in self.demos})
        bad = next((d for d in self.demos if frame_stride % d.image_stride), None)
        if bad is not None:
            raise UserError(
                f"--frame_stride {frame_stride}: {bad.source.path} has an image of every "
                f"{bad.image_stride}. frame, the datasets together of every "
                f"{', '.join(map(str, strides))}.; give a multiple of all of these"
            )

    def described(self):
        """What each dataset is, JSON-able: [{path, hash, format, demonstrations, tasks}]."""
        return [
            {
                "path": str(d.path),
                "hash": d.fingerprint,
                "format": d.format,
                "demonstrations": len(d),
                "tasks": list(dict.fromkeys(demo.group for demo in d.demos)),
            }
            for d in self.datasets
        ]


def same_rows(one, other, name):
    """Whether two demonstrations of one length have the same rows, but for the last digits. Of a
    replay the actions are the recording's, and positions are read anew, half a millimetre off.
    """
    rows = [getattr(demo, name)[:, :6] for demo in (one, other)]
    return bool(rows[0].any()) and np.allclose(*rows, rtol=0, atol=COPY)


def difference(one, other, alike=ALIKE):
    """(name, value, value) of the first attribute that two datasets may not differ in and do; None
    where they go together. one, other: their attributes.
    """
    for name, usual in alike.items():
        ours, theirs = (str(said.get(name, usual)) for said in (one, other))
        if ours != theirs and not {ours, theirs} <= CAMERAS_ALONE:
            return name, ours or "none", theirs or "none"
    return None


def of_both_settings(said):
    """{"setting": "cameras"} where some of several datasets' attributes say that and others say the
    task's own camera, else {}.
    """
    both = len({str(attributes.get("setting", ALIKE["setting"])) for attributes in said}) > 1
    return {"setting": "cameras"} if both else {}


def datasets_in(path):
    """The datasets at a path: itself, or those of a folder of HDF5 files or of LeRobot folders."""
    path = Path(path)
    if not path.is_dir() or LeRobotFolder.accepts(path):
        return [path]
    # hidden ones are leftovers, and macOS's notes on a file
    inside = in_order(p for p in path.iterdir() if not p.name.startswith("."))
    found = [p for p in inside if p.suffix in SUFFIXES and p.is_file()]
    found += [p for p in inside if p.is_dir() and LeRobotFolder.accepts(p)]
    return found or [path]


def left_out(path, taken):
    """What lies in a folder of datasets, looks like demonstrations and is not among those that are
    `taken`, of `datasets_in`: one sentence, "" where there is nothing.
    """
    if taken == [Path(path)]:
        return ""
    folders = [p for p in in_order(Path(path).iterdir()) if p.is_dir()]
    unfinished = [p.name for p in folders if p.suffix == ".parts"]
    episodes = [
        p.name
        for p in folders
        if p.suffix != ".parts" and any(each.is_dir() for each in p.glob("episode*"))
    ]
    said = [f"{name}, a collection that is not finished" for name in unfinished]
    said += [f"{name}, a smith300 folder: name it by itself" for name in episodes]
    return f"{path}: left out: {'; '.join(said)}" if said else ""


def open_mixture(paths, image_size=None, limit=None, task=None):
    """The Mixture of the datasets at `paths`, each a dataset or a folder of some.

    limit: only the first so many demonstrations of each; others as of `dataset.open_dataset`.
    Prints what a folder holds beside them that looks like demonstrations.
    """
    found = []
    for path in paths:
        taken = datasets_in(path)
        found += taken
        if remark := left_out(path, taken):
            print(f"note: {remark}", file=sys.stderr)
    return Mixture(open_dataset(path, image_size, limit, task) for path in found)
