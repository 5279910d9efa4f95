"""Replay of LIBERO's HDF5 files: what they say of themselves, and the worker that renders their
demonstrations again from their stored states. Each demonstration is a job of sim/workers.py.

LIBERO's own files (its scripts/create_dataset.py) have images of 128 px with their rows bottom
first, no cameras, and each demonstration's model as XML. Their observation t was made after action
t: it is of state t + 1. Here observation t is of state t.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from formats import hdf5, libero_hdf5
from formats.dataset import SUFFIXES
from formats.demos import simulated_with
from formats.mixture import CAMERAS_ALONE
from formats.parts import part_path
from runtime import UserError, fits
from sim import instructions, moved_cameras, settings
from sim.recording import Recorder, Scenes
from sim.simulator import simulator_versions
from sim.tasks import task_of_bddl

REPLAYED = "drop this demo, or take another file"
# attributes that a replayed file may have, see runtime.fits
REPLAY_FORM = {
    "variant?": str,
    "grasp?": str,
    "setting?": str,
    "split?": str,
    "part?": str,
    "bddl_file_name?": str,
    "clean_scene?": (bool, int),
    "instruction_of?": (str, int),
    "instruction_share?": float,
}

# The premise of a replay: from its states a file's first image looks as it was stored, by the mean
# difference in grey levels (0-255), and the EEF is where it was, in m.
GREY, EEF_OFF = 12.0, 0.01
# what a demonstration says of another task's sentence, see sim/instructions.py
TOLD = ("language", "instruction_of")
# entry of a finished file: the settings that it was replayed with
SETTINGS = "replay_settings"


def files_of(paths, tasks=None):
    """The HDF5 files that `--replay` names: files, and those that lie in folders.

    tasks [int]: only those of tasks with these numbers in their suites. Raises UserError where
    nothing is left, and for two files of one name.
    """
    found = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.glob("[!.]*") if p.suffix in SUFFIXES)
        found += inside if path.is_dir() else [path]
    if tasks is not None:
        found = [path for path in found if task_of_file(path).index in tasks]
    named = " ".join(map(str, paths))
    if not found:
        chosen = "" if tasks is None else f" of --task_ids {','.join(map(str, tasks))}"
        raise UserError(f"--replay {named}: no .hdf5 file{chosen} is there")
    twice = [stem for stem, n in Counter(path.stem for path in found).items() if n > 1]
    if twice:
        raise UserError(f"--replay {named}: two files are called {twice[0]}; rename one")
    return found


def task_of_file(path):
    """The Task that an HDF5 file's `bddl_file_name` names. Raises UserError."""
    with libero_hdf5.open_demos(path) as file:
        name = libero_hdf5.file_attributes_of(path, file).get("bddl_file_name")
    if not isinstance(name, str):
        raise UserError(
            f"{path}: data, attribute 'bddl_file_name' is missing; leave out --task_ids"
        )
    return task_of_bddl(name)


def is_finished(out, asked):
    """True if `out` is a replay with these settings (see `settings_text`), finished; False where
    nothing is there. Raises UserError where something else is there.
    """
    if not out.exists():
        return False
    with libero_hdf5.open_demos(out) as file:
        stored = hdf5.attributes(out, file["data"], REPLAYED).get(SETTINGS)
    if stored != asked:
        raise UserError(
            f"{out}: was made with other settings and is left alone; give --overwrite, or another "
            "--out"
        )
    return True


def settings_text(asked):
    """Settings as the text that a finished file holds."""
    return json.dumps(asked, sort_keys=True, default=str)


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
    args.grasp = attributes.get("grasp")  # of another's recording nobody knows
    recorded = attributes.get("setting", "in_dist")
    if args.setting == "cameras" and recorded not in CAMERAS_ALONE:
        raise UserError(
            f"{path}: is of --setting {recorded}, whose cameras are its own; --replay --setting "
            "cameras moves those of recordings before the task's own view or before moved ones"
        )
    args.moved_anew = args.setting == "cameras"  # else as recorded
    args.setting = "cameras" if args.moved_anew else recorded
    args.split = attributes.get("split") or None
    args.part = attributes.get("part", "train")  # validation conditions stay what they are
    # each demonstration says which sentence
    args.instruction_of = attributes.get("instruction_of")
    args.instruction_share = attributes.get("instruction_share", args.instruction_share)
    # of the recipe each demonstration says it
    if args.clean_scene is None and args.setting != "recipe":
        args.clean_scene = bool(attributes.get("clean_scene", False))
    return simulated_with(attributes)


class ReplayWorker:
    """Re-renders one demonstration of an existing file from its stored states.

    The camera is the stored one, or the task's where the file has none; with `--setting cameras`
    another one, drawn by --seed, number of the demonstration and task.
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
            seen = first_observation(path, file, name, group)
            attributes = hdf5.attributes(path, group, REPLAYED)
            kept = {
                k: attributes[k]
                for k in ("setting", "clean_scene", *TOLD, *vars(settings.Condition()))
                if k in attributes
            }
        # a dataset of the recipe has demonstrations of both scenes
        self.scene = self.scenes[bool(kept.get("clean_scene", self.args.clean_scene))]
        where = f"{path}: data/{name}"
        self.scene.ask_for(instructions.request_of(self.scene.task, kept, where))
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
        if seen:
            check_premise(self.scene, states[min(1, len(states) - 1)], seen, f"{path}: data/{name}")
        if self.args.moved_anew:
            kept.update(self.elsewhere(index, states[0]))
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

    def elsewhere(self, index, state):
        """Draw a demonstration's new camera and put it there -> the attributes that say so.

        state (S,): the demonstration's first one.
        """
        self.scene.set_state(state)
        seed = moved_cameras.view_seed([self.args.seed, index], self.args.task_id)
        found = moved_cameras.put(self.scene, np.random.default_rng(seed))
        return {**found.described("cameras"), "setting": "cameras"}

    def close(self):
        self.scenes.close()


def first_observation(path, file, name, group):
    """What an official file's demonstration saw first: {"image": (S,S,3) upright, "ee_pos": (3,) m,
    "mujoco": version of its simulator, or None}, as far as it holds them.

    {} for files of this repository, whose images are rendered from these states.
    """
    attributes = libero_hdf5.file_attributes_of(path, file)
    if "format" in attributes:
        return {}
    seen = {}
    if hdf5.holds(path, group, libero_hdf5.IMAGE, REPLAYED):
        libero_hdf5.image_shape(path, group, name, None)
        seen["image"] = libero_hdf5.read_images(path, file, name, [0])[0]
    if hdf5.holds(path, group, "obs/ee_pos", REPLAYED):
        seen["ee_pos"] = hdf5.array(path, group, "obs/ee_pos", REPLAYED, (3,))[0]
    return {**seen, "mujoco": simulated_with(attributes).get("mujoco")} if seen else {}


def check_premise(scene, state, seen, where):
    """Raise UserError unless the scene, put into `state` (S,), shows what was seen there: the EEF
    within EEF_OFF, the image within GREY, and no nearer to the stored one if it is turned over.

    seen: see `first_observation`; where: file and demonstration, for the message.
    """
    scene.set_state(state)
    faults = []
    if "ee_pos" in seen:
        apart = float(np.linalg.norm(scene.observe(image=False).eef_pos - seen["ee_pos"]))
        if apart > EEF_OFF:
            faults.append(f"the EEF is {1000 * apart:.0f} mm from where it was recorded")
    if "image" in seen:
        differences = image_differences(scene.render(), seen["image"])
        best = min(differences, key=differences.get)
        if differences["as it is"] > GREY or best != "as it is":
            told = ", ".join(f"{name} {grey:.1f}" for name, grey in differences.items())
            faults.append(f"the first image differs by so many grey levels: {told}")
    if faults:
        theirs, ours = seen["mujoco"] or "an unknown version (LIBERO's: 2.3)", simulator_versions()
        raise UserError(
            f"{where}: is rendered otherwise here than it was recorded, {' and '.join(faults)}; "
            f"its states are of MuJoCo {theirs}, here are MuJoCo {ours['mujoco']} and robosuite "
            f"{ours['robosuite']}: is it of another task or simulator?"
        )


def image_differences(image, stored):
    """Mean difference in grey levels of an upright image from a stored one (s,s,3), as it is and in
    the ways in which a stored one may be turned.
    """
    side = len(stored)
    small = Image.fromarray(image).resize((side, side), Image.Resampling.BOX)
    small = np.asarray(small).astype(float)
    views = {
        "as it is": small,
        "upside down": small[::-1],
        "mirrored": small[:, ::-1],
        "turned by 180 deg": small[::-1, ::-1],
    }
    return {name: float(np.abs(view - stored).mean()) for name, view in views.items()}
