"""Where an episode takes place: init state, view and position by layout and index.

`benchmark` is LIBERO's own init states. `shifted` moves the task's objects 4-5 cm, each by itself.
`viewpoint` and `viewpoint_shifted` are these two, each episode seen from the next of the test views
of sim/settings.py. `position` takes the test positions in turn, with the same few random layouts at
each. `val`, `val_shifted` and so on are random layouts, views and positions apart from all of
these, for tuning; in `val_cameras` each episode's camera is drawn as demonstrations draw theirs.

`verdict_...` are fresh sets of the same kinds, see sim/verdict.py. `verdict_position` moves bowl
and plate each by itself, `verdict_viewpoint_low` has the views that a grid decodes badly. In
`moved_midway` the bowl is set aside while the robot acts, see sim/events.py. `val_verdict_...` and
`val_moved_midway` are for tuning.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from runtime import UserError
from sim import instructions, moved_cameras, settings, verdict
from sim.events import MovedMidway
from sim.placement import JOINT_JITTER

ATTEMPTS = 60  # at a random layout


class Layout(NamedTuple):
    """setting, part: of sim/settings.py, whose conditions the episodes have in turn; or
    `frozen`, a function that gives them. shift_seed: first seed of the shifts of bowl and plate,
    None for no shift. moved: whether the bowl is set aside midway.
    """

    setting: str
    part: str
    frozen: Callable = None
    shift_seed: int = None
    moved: bool = False


# First seeds of shifts do not come from settings.random_seed, so that the shifted test layouts stay
# as published.
LAYOUTS = {
    "benchmark": Layout("in_dist", "test"),
    "shifted": Layout("in_dist", "test", shift_seed=3_000),
    "val": Layout("in_dist", "val"),
    "val_shifted": Layout("in_dist", "val", shift_seed=90_000_000),
    "val_cameras": Layout("cameras", "val"),
    "viewpoint": Layout("viewpoint", "test"),
    "viewpoint_shifted": Layout("viewpoint", "test", shift_seed=3_000),
    "val_viewpoint": Layout("viewpoint", "val"),
    "val_viewpoint_shifted": Layout("viewpoint", "val", shift_seed=90_000_000),
    "position": Layout("position", "test"),
    "val_position": Layout("position", "val"),
    # the verdict's
    "verdict_shifted": Layout("in_dist", "test", shift_seed=81_000_000),
    "verdict_viewpoint": Layout("views", "test", verdict.views),
    "verdict_viewpoint_low": Layout("views", "test", verdict.low_views),
    "verdict_viewpoint_shifted": Layout("views", "test", verdict.views, shift_seed=81_000_000),
    "verdict_position": Layout("places", "test", lambda: verdict.positions("test")),
    "moved_midway": Layout("in_dist", "test", moved=True),
    "val_verdict_viewpoint": Layout("views", "val", verdict.val_views),
    "val_verdict_viewpoint_shifted": Layout(
        "views", "val", verdict.val_views, shift_seed=90_000_000
    ),
    "val_verdict_position": Layout("places", "val", lambda: verdict.positions("val")),
    "val_verdict_swap": Layout("swap", "val", verdict.val_swaps),
    "val_moved_midway": Layout("in_dist", "val", moved=True),
}


def conditions(layout, split=None):
    """The settings.Conditions that a layout's episodes have in turn. Raises UserError for a split
    that its setting does not have.
    """
    found = LAYOUTS[layout]
    if found.frozen is None:
        return settings.conditions(found.setting, found.part, split)
    settings.resolve_split(found.setting, split)
    return found.frozen()


def training_shift(layout, split=None):
    """(dx, dy) m from the benchmark's mean layout to that of the setting's training demonstrations,
    which a blind replay knows. The verdict's training has the benchmark's, or none.
    """
    found = LAYOUTS[layout]
    if found.frozen is not None:
        return 0.0, 0.0
    trained = settings.conditions(found.setting, "train", split)
    mean = lambda name: sum(getattr(c, name) for c in trained) / len(trained)
    return mean("dx"), mean("dy")


def init_state_of(layout, index, n=50):
    """The number of the benchmark's init state that an episode starts from, None for a random
    layout. n: how many there are.
    """
    found = LAYOUTS[layout]
    return index % n if found.part == "test" and found.setting != "position" else None


def distinct(layout, split=None, n=50):
    """How many of its episodes differ, None where all do. n: the benchmark's init states."""
    found = LAYOUTS[layout]
    if init_state_of(layout, 0) is None or found.shift_seed is not None or found.moved:
        return None
    return math.lcm(n, len(conditions(layout, split)))


def event(layout, index):
    """What happens in an episode, one of sim/events.py, or None."""
    found = LAYOUTS[layout]
    if not found.moved:
        return None
    if found.part == "val":
        return MovedMidway("val_moved_midway", index)
    return MovedMidway("moved_midway", index, verdict.DRAW)


def has_what_moves(layout, task):
    """Whether a Task's goal names an object, where a layout moves it; True for one that moves none.
    (Open drawer) names none.
    """
    found = LAYOUTS[layout]
    moves = found.shift_seed is not None or found.moved
    return not moves or instructions.picked_object(task) is not None


def episode_state(scene, layout, index, split=None):
    """Put the camera where an episode has it -> (its init state (S,), its settings.Condition).

    Both depend on layout, split and index alone, whatever was tested before and on which worker.
    """
    found, given = LAYOUTS[layout], conditions(layout, split)
    if found.moved and scene.pick is None:
        raise UserError(f"{layout}: the goal of {scene.task.key} names no object to set aside")
    condition = given[index % len(given)]
    if init_state_of(layout, index) is not None:
        # the benchmark's init states in turn
        states = scene.init_states()
        state = states[init_state_of(layout, index, len(states))]
        if condition.places:
            state = scene.place_objects(state, condition.place_of)
            if state is None:
                raise RuntimeError(f"{layout} {index}: its places are bad in this scene")
    else:
        # a random layout, drawn for this episode
        draw = ("val_layout", index)
        if found.setting == "position":  # the same layouts at every position
            draw = f"{found.part}_position", index // len(given)
        state = first_valid(scene, *draw, scene.common_shift(condition), condition.place_of)
    if found.shift_seed is not None:
        state = scene.shifted_layout(state, found.shift_seed + index)
    # the camera last: a random layout rebuilds the model
    if found.setting == "cameras":
        seed = moved_cameras.view_seed(
            settings.random_seed("val_cameras", 0, index), scene.task.index
        )
        return state, moved_cameras.put(scene, np.random.default_rng(seed), unmoved=0.0)
    scene.set_view(condition)
    return state, condition


def first_valid(scene, purpose, index, offsets, places=None):
    """The first good random layout (S,) for an index of a purpose of sim/settings.py. It is the
    same for every --seed. offsets: see `Placement.random_layout`; places: {name: (x, y)} m, of
    objects that are put there instead.

    Raises RuntimeError after ATTEMPTS bad ones.
    """
    for attempt in range(ATTEMPTS):
        seed = settings.random_seed(purpose, 0, index, attempt)
        if places:
            state = scene.placed_layout(seed, JOINT_JITTER, places)
        else:
            state = scene.random_layout(seed, offsets=offsets)
        if state is not None:
            return state
    crowded = ""
    if offsets:
        by = next(iter(offsets.values()))
        crowded = f", objects shifted by {by}: in a full scene they meet others, see --clean_scene"
    raise RuntimeError(f"{ATTEMPTS} resets in a row were bad for {purpose} {index}{crowded}")
