"""Attempts that fail: the bowl is missed, and the arm goes on for a while as if it held it.

No expert's demonstration shows that. A policy whose own grasp fails is then where nothing was ever
shown, and carries nothing to the plate. Demonstrations that begin with such an attempt show what
comes after it: the way back to the bowl. The attempt itself is not learnt from.
"""

import numpy as np

from formats.demos import GRIPPER_STEPS
from sim.expert import GRASP, HOVER, LIFT, RELEASE
from sim.libero_env import CLOSE, OPEN

LIFTED = 0.02  # metres above its rest at which the object is held: no mistake then
# metres: how far beside the grasp the fingers close, or else how far above it
BESIDE, ABOVE = (0.03, 0.06), (0.03, 0.06)
WAY = 40  # control steps of each part of the way at most
NEAR = 0.012  # metres from a target at which the next part begins


def attempt(scene, rng):
    """An attempt at picking scene.pick that misses -> iterator over (target (3,) m, gripper
    command), one for each control step. Step the scene between them.

    It ends right after the fingers have closed, on the way up, on the way to the goal, or there,
    with the fingers opened again.
    """
    grasp = scene.position(scene.pick) + GRASP
    if rng.random() < 0.5:
        angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(*BESIDE)
        off = np.array([far * np.cos(angle), far * np.sin(angle), rng.uniform(0, 0.01)])
    else:
        off = np.array([*rng.normal(0, 0.01, 2), rng.uniform(*ABOVE)])
    up, grasp = np.array([0, 0, 1]), grasp + off
    yield from _go(scene, grasp + HOVER * up, OPEN)
    yield from _go(scene, grasp, OPEN)
    yield from _stand(scene, CLOSE)
    # how far it gets: 0 nowhere, below 1 a part of the way up, below 2 of the way to the goal
    far = rng.uniform(0, 2.5)
    top = grasp + LIFT * min(far, 1) * up
    yield from _go(scene, top, CLOSE)
    if far <= 1:
        return
    goal = np.array([*(scene.position(scene.place)[:2] + GRASP[:2]), top[2]])
    yield from _go(scene, top + min(far - 1, 1) * (goal - top), CLOSE)
    if far > 2:
        yield from _go(scene, np.array([*goal[:2], grasp[2] + RELEASE]), CLOSE)
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
