"""Replay of a LIBERO HDF5 file: what it says of itself, and the worker that renders its
demonstrations again from their stored states. Each demonstration is a job of sim/workers.py.
"""

from collections import Counter
from pathlib import Path

import numpy as np

from formats import hdf5, libero_hdf5
from formats.demos import simulated_with
from formats.parts import part_path
from runtime import UserError, fits
from sim import settings
from sim.recording import Recorder, Scenes
from sim.tasks import task_of_bddl

REPLAYED = "drop this demo, or take another file"
# attributes that a replayed file may have, see runtime.fits
REPLAY_FORM = {
    "variant?": str,
    "setting?": str,
    "split?": str,
    "part?": str,
    "bddl_file_name?": str,
    "clean_scene?": (bool, int),
}


def take_from_replayed(args):
    """Take what was not given from the file that is replayed -> {package: version} of the simulator
    that its states come from. Raises UserError for a file that cannot be replayed.
    """
    path = args.replay
    with libero_hdf5.open_demos(path) as file:
        n_demos = len(libero_hdf5.demo_names(file))
        attributes = libero_hdf5.file_attributes_of(path, file)
    if fault := fits(attributes, REPLAY_FORM):
        raise UserError(f"{path}: data, attributes: {fault}; {REPLAYED}")
    if not n_demos:
        raise UserError(f"{path}: data holds no demo_0, demo_1, ...: zero demonstrations")
    if args.task_suite is None:
        if "bddl_file_name" not in attributes:
            raise UserError(
                f"{path}: attribute 'bddl_file_name' is missing; give --task_suite and --task_id"
            )
        task = task_of_bddl(attributes["bddl_file_name"])
        args.task_suite, args.task_id = task.suite, task.index
    args.n_demos = min(n_demos, args.n_demos or n_demos)
    args.variant = attributes.get("variant", args.variant)
    args.setting = attributes.get("setting", "in_dist")
    args.split = attributes.get("split") or None
    args.part = attributes.get("part", "train")  # validation conditions stay what they are
    # of the recipe each demonstration says it
    if args.clean_scene is None and args.setting != "recipe":
        args.clean_scene = bool(attributes.get("clean_scene", False))
    return simulated_with(attributes)


class ReplayWorker:
    """Re-renders one demonstration of an existing file from its stored states. The camera is the
    stored one, or the task's where the file has none.
    """

    def __init__(self, args, folder):
        self.args, self.folder, self.scenes = args, Path(folder), Scenes(args)

    def run(self, index):
        """Replay the demonstration of an index of the file -> Counter of what is amiss.

        Raises UserError for a damaged file, or one of another task.
        """
        # read and check what the file holds; the two optional arrays are this repository's
        path = self.args.replay
        with libero_hdf5.open_demos(path) as file:
            name = libero_hdf5.demo_names(file)[index]
            group = hdf5.group(path, file["data"], name, REPLAYED)
            states = hdf5.array(path, group, "states", REPLAYED, (None,), "f")
            rows = {"actions": hdf5.array(path, group, "actions", REPLAYED, (7,), "f")}
            for key, tail in (("executed_actions", (7,)), ("perturbed", ())):
                if hdf5.holds(path, group, key, REPLAYED):
                    rows[key] = hdf5.array(path, group, key, REPLAYED, tail)
            fixtures, E = libero_hdf5.stored_fixtures(path, group), None
            if hdf5.holds(path, group, libero_hdf5.CAMERA_E, REPLAYED):
                E = hdf5.array(path, group, libero_hdf5.CAMERA_E, REPLAYED)
                libero_hdf5.check_camera(np.eye(3), E, f"{path}: data/{name}")
            attributes = hdf5.attributes(path, group, REPLAYED)
            kept = {
                k: attributes[k]
                for k in ("setting", "clean_scene", *vars(settings.Condition()))
                if k in attributes
            }
        # a dataset of the recipe has demonstrations of both scenes
        self.scene = self.scenes[bool(kept.get("clean_scene", self.args.clean_scene))]
        # every array has a row for each state
        for key, value in rows.items():
            if len(value) != len(states):
                raise UserError(
                    f"{path}: data/{name}/{key}: has {len(value)} rows, "
                    f"states has {len(states)}; {REPLAYED}"
                )
        actions = rows["actions"]
        executed, perturbed = (
            rows.get("executed_actions", actions),
            rows.get("perturbed", np.zeros(len(actions))) != 0,
        )
        if states.shape[1] != len(self.scene.state()):
            raise UserError(
                f"{path}: data/{name}/states: has {states.shape[1]} numbers a row, the task's "
                f"simulator has {len(self.scene.state())}; is it another task's? "
                "Give --task_suite and --task_id"
            )
        # render each state; fixtures and camera belong to the model, and stay for all of them
        self.scene.set_fixtures(fixtures)
        self.scene.set_camera(E)
        recorder = Recorder(self.scene, self.args.frame_stride)
        for state, action, done, pushed in zip(states, actions, executed, perturbed):
            self.scene.set_state(state)
            recorder.add(action, done, bool(pushed))
        recorder.write(
            part_path(self.folder, index),
            source=f"replay of {Path(self.args.replay).name} {name}",
            pick=self.scene.pick or "",
            place=self.scene.place or "",
            success=self.scene.success(),
            **kept,
        )
        return Counter(not_successful_at_the_end=int(not self.scene.success()))

    def close(self):
        self.scenes.close()
