"""The closed loop's rules that need no simulator."""
import numpy as np

from demos import next_waypoint
from policy import Waypoint
from rollout import ahead
from rot_utils import euler_to_matrix


def waypoint(points, grippers):
    points = np.array(points, dtype=float)
    return Waypoint(points[0], None, float(grippers[0]), points, np.array(grippers, dtype=float))


def test_a_reached_waypoint_is_skipped():
    """Hovering, a trajectory "hover, descend, close" is followed from its descent: else the robot hovers for ever."""
    eef = np.array([0.1, 0.2, 1.0])
    found = ahead(waypoint([eef + 0.002, eef - [0, 0, 0.05], eef - [0, 0, 0.1]], [-1, -1, 1]), eef, -1.0)
    np.testing.assert_allclose(found.position, eef - [0, 0, 0.05])
    assert found.gripper == -1 and len(found.trajectory) == len(found.grippers) == 2


def test_a_gripper_change_is_never_skipped():
    """At the grasp itself the waypoint is where the EEF is, and closes: that is the decision to take."""
    eef = np.zeros(3)
    found = ahead(waypoint([eef, eef + 0.1], [1, 1]), eef, -1.0)
    assert found.gripper == 1 and not found.position.any()


def test_a_rotation_still_to_come_is_not_skipped():
    """Where rotations are servoed, a waypoint is reached only once the gripper has turned; what is skipped takes its rotation along."""
    eef, turn = np.zeros(3), euler_to_matrix(np.array([0, 0, 0.5]))
    plan = waypoint([eef, eef + 0.1], [-1, -1])
    plan.rotations, plan.rotation = np.stack([turn, np.eye(3)]), turn
    assert ahead(plan, eef, -1.0, np.eye(3)).rotation is not None and len(ahead(plan, eef, -1.0, np.eye(3)).trajectory) == 2
    skipped = ahead(plan, eef, -1.0, turn)
    np.testing.assert_array_equal(skipped.rotation, np.eye(3))
    assert len(skipped.rotations) == len(skipped.trajectory) == 1


def test_a_trajectory_that_stands_still_is_left_alone():
    """Where nothing lies ahead the first waypoint is kept."""
    eef = np.zeros(3)
    assert ahead(waypoint([eef, eef], [-1, -1]), eef, -1.0).position is not None
    assert len(ahead(waypoint([eef, eef], [-1, -1]), eef, -1.0).trajectory) == 2


def test_waypoints_lie_ahead_where_the_path_slows_down():
    """A waypoint is `stride` frames later, or as many more as it takes to be min_travel away, but never beyond its end."""
    x = np.concatenate([np.arange(10) * 0.02, 0.18 + np.arange(1, 11) * 0.001, 0.19 + np.arange(1, 6) * 0.02])
    positions = np.stack([x, 0 * x, 0 * x], -1)
    target = next_waypoint(positions, np.full(len(x), 23), 2, 0.02)
    frames = np.arange(len(x))
    assert (target[:8] == frames[:8] + 2).all()
    assert (np.linalg.norm(positions[target] - positions, axis=1)[:22] >= 0.02 - 1e-12).all()
    assert (target <= np.maximum(23, 0)).all() and target[22] == 23
    slow = next_waypoint(positions, np.full(len(x), 15), 2, 0.02)
    assert (slow[10:15] == 15).all()
