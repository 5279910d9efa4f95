"""Attempts that fail: the bowl is missed, and the arm goes on for a while as if it held it.

No expert's demonstration shows that. A policy whose own grasp fails is then where nothing was ever
shown, and carries nothing to the plate. Demonstrations that begin with such an attempt show what
comes after it: the way back to the bowl. The attempt itself is not learnt from.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from formats.demos import GRIPPER_STEPS
from sim.clearance import Boxes, clearance
from sim.expert import GRASP, HOVER, LIFT, RELEASE
from sim.libero_env import CLOSE, OPEN
from sim.pick_place import PickPlace
from sim.planned_expert import stages

LIFTED = 0.02  # metres above its rest at which the object is held: no mistake then
# metres: how far beside the grasp the fingers close, or else how far above it
BESIDE, ABOVE = (0.03, 0.06), (0.03, 0.06)
WAY = 40  # control steps of each part of the way at most
NEAR = 0.012  # metres from a target at which the next part begins


@dataclass
class Plan:
    """What an attempt would do if it did not fail: metres in the world.

    grasp: (3,) of the EEF; hover, carried: its height on the way there, and with the object; goal
    (2,); release: height at which it would let go; rotation (3,3) of the gripper, None where it
    keeps its own; free: a function that tells of a point (3,) whether the open gripper has room.
    """

    grasp: np.ndarray
    hover: float
    carried: float
    goal: np.ndarray
    release: float
    rotation: np.ndarray = None
    free: Callable = lambda point: True


def plan_of(scene, grasp):
    """The Plan of an expert, of its name in sim/expert.py, in a scene."""
    if grasp == "planned":
        return _planned(scene)
    at = scene.position(scene.pick) + GRASP
    goal = scene.position(scene.place)[:2] + GRASP[:2]
    return Plan(at, at[2] + HOVER, at[2] + LIFT, goal, at[2] + RELEASE)


def can_fail(scene, grasp):
    """True if what a scene is asked for begins with picking something up."""
    return grasp != "planned" or isinstance(stages(scene)[0], PickPlace)


def _planned(scene):
    stage = stages(scene)[0]
    stage.poses(scene.observe(image=False).eef_pos)  # it chooses the grasp, and the heights
    turn, table, boxes = stage.grasp.rotation, scene.support, Boxes(scene)
    return Plan(
        stage.at,
        stage.hover,
        stage.carried_height(),
        stage.goal()[:2] + stage.grasp.offset[:2],
        # an empty gripper: as far above what is there as the object's foot would be
        max(stage.at[2], boxes.surface(stage.goal()[:2]) + stage.hang) + RELEASE,
        turn,
        lambda point: clearance(boxes, point, turn, table) > 0,
    )


def attempt(scene, rng, plan):
    """An attempt at picking scene.pick that misses -> iterator over (target (3,) m, gripper
    command), one for each control step. Step the scene between them.

    plan: a Plan. It ends right after the fingers
    have closed, on the way up, on the way to the goal, or there, with the fingers opened again.
    """
    if rng.random() < 0.5:
        angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(*BESIDE)
        off = np.array([far * np.cos(angle), far * np.sin(angle), rng.uniform(0, 0.01)])
    else:
        off = np.array([*rng.normal(0, 0.01, 2), rng.uniform(*ABOVE)])
    up = np.array([0, 0, 1])
    if not plan.free(plan.grasp + off):
        off = ABOVE[1] * up
    grasp = plan.grasp + off
    yield from _go(scene, grasp + (plan.hover - plan.grasp[2]) * up, OPEN)
    yield from _go(scene, grasp, OPEN)
    yield from _stand(scene, CLOSE)
    # how far it gets: 0 nowhere, below 1 a part of the way up, below 2 of the way to the goal
    far = rng.uniform(0, 2.5)
    top = grasp + (plan.carried - plan.grasp[2]) * min(far, 1) * up
    yield from _go(scene, top, CLOSE)
    if far <= 1:
        return
    goal = np.array([*plan.goal, top[2]])
    yield from _go(scene, top + min(far - 1, 1) * (goal - top), CLOSE)
    if far > 2:
        yield from _go(scene, np.array([*goal[:2], plan.release + off[2]]), CLOSE)
        if rng.random() < 0.5:
            yield from _stand(scene, OPEN)


def _go(scene, target, gripper):
    for _ in range(WAY):
        if np.linalg.norm(scene.observe(image=False).eef_pos - target) < NEAR:
            return
        yield target, gripper


def _stand(scene, gripper):
    here = scene.observe(image=False).eef_pos
    for _ in range(GRIPPER_STEPS):
        yield here, gripper
