"""Cameras that stand elsewhere, for any scene: agentview turned about the table, tilted, farther
away, turned in place, as LIBERO-Plus moves it. NumPy only.

    collect_demos.py --setting cameras

draws one of these for each demonstration, from the whole ranges below; a share of them keeps the
task's own view. Whoever trains on them and tests on LIBERO-Plus's cameras is tested inside the
training range, not beyond it.
"""

import numpy as np

from camera import extrinsics_from_mujoco, project
from rot_utils import matrix_to_quat, quat_to_matrix, rotvec_to_matrix
from sim.settings import Condition

PIVOT = np.array([0.0, 0.0, 0.8])  # metres; the camera tilts about it and moves away from it
# degrees about the world's vertical, up to +-; degrees upwards; times the distance from PIVOT;
# degrees in place, up to +-, about the vertical and about the world's y
TURNED, TILTED, AWAY, IN_PLACE = 75.0, 15.0, 2.0, 10.0
AS_IT_IS = (0.0, 0.0, 1.0, 0.0, 0.0)  # the task's own view
# share of the demonstrations that keep the task's view; of the others, the share that is tilted,
# that is farther away, and that is turned in place
UNMOVED, VARIED = 0.2, 0.5
BEYOND = 0.1  # share of the image by which object and goal may lie outside
VIEWS = 50  # that are drawn for a demonstration or an episode


def drawn(rng, n, unmoved=UNMOVED):
    """n views (turned, tilted, distance, pan, pitch), drawn in this order; with probability
    `unmoved` all are the task's own.
    """
    views = []
    for _ in range(n):
        turned, tilted = rng.uniform(-TURNED, TURNED), rng.uniform(0, TILTED)
        distance, (pan, pitch) = rng.uniform(1, AWAY), rng.uniform(-IN_PLACE, IN_PLACE, 2)
        is_tilted, is_away, is_in_place = rng.random(3) < VARIED
        view = (
            turned,
            tilted if is_tilted else 0.0,
            distance if is_away else 1.0,
            *((pan, pitch) if is_in_place else (0.0, 0.0)),
        )
        views.append(tuple(round(float(x), 4) for x in view))
    return [AS_IT_IS] * n if rng.random() < unmoved else views


def view_seed(seed, task_index):
    """Seed of an episode's or demonstration's cameras. seed: its words.

    task_index: apart by task too, a suite's files would all have the same cameras.
    """
    return [*seed, 11, task_index]


def put(scene, rng, unmoved=UNMOVED):
    """Put the camera at the first of VIEWS views that shows object and goal, or just misses them
    (BEYOND), else where the task has it -> settings.Condition. unmoved: see `drawn`.
    """
    of_task = Condition(moved=AS_IT_IS)
    points = [scene.position(n) for n in (scene.pick, scene.place) if n]
    for view in drawn(rng, VIEWS, unmoved):
        found = Condition(moved=view)
        scene.set_view(found)
        if not points or shows(scene, points, -BEYOND):
            return found
    scene.set_view(of_task)
    return of_task


def shows(scene, points, margin):
    """True if the camera has all of N points (3,) m further inside its picture than `margin`, a
    share of its side; below 0 they may lie outside by so much.
    """
    u, v, _ = project(np.stack(points), *scene.camera())
    low, high = margin * scene.image_size, (1 - margin) * scene.image_size
    return min(u.min(), v.min()) > low and max(u.max(), v.max()) < high


def moved(E, view):
    """Camera-to-world E (4,4), moved by a view (turned, tilted, distance, pan, pitch)."""
    # MuJoCo's camera looks along -z with y up
    return at(E[:3, 3], E[:3, :3] @ np.diag([1.0, -1.0, -1.0]), view)


def at(position, R, view, rounded=lambda position, R: (position, R)):
    """Camera-to-world (4,4) of MuJoCo's camera at position (3,) m with axes R (3,3), moved by a
    view. rounded: what becomes of a pose after each change.
    """
    turned, tilted, distance, pan, pitch = view
    if tilted:
        turn = about("y", -tilted)
        position, R = rounded(PIVOT + turn @ (position - PIVOT), turn @ R)
    turn = about("z", turned)
    position, R = rounded(turn @ position, turn @ R)
    if distance != 1:
        position, R = rounded(PIVOT + distance * (position - PIVOT), R)
    if pan:
        position, R = rounded(position, about("z", pan) @ R)
    if pitch:
        position, R = rounded(position, about("y", -pitch) @ R)
    return extrinsics_from_mujoco(position, R)


def about(axis, degrees):
    """Rotation (3,3) about an axis of the world."""
    return rotvec_to_matrix(np.radians(degrees) * np.eye(3)["xyz".index(axis)])


def to_four_digits(position, R):
    """A camera's pose as LIBERO-Plus writes it after each change: four digits of position and
    quaternion.
    """
    return position.round(4), quat_to_matrix(unit(matrix_to_quat(R).round(4)))


def unit(quat):
    """A quaternion (4,) of length 1."""
    return np.array(quat) / np.linalg.norm(quat)
