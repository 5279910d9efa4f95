"""`lift_once`, the task that needs memory: how it is scored and labelled, and its expert in the
real simulator.
"""

import h5py
import numpy as np
import pytest
from conftest import write_synthetic_demos
from helpers import run, train_flags
from test_data import track

import collect_demos
import eval as evaluation
from data import held_frames, waypoint_labels
from data_ar import following_frames, standing_since, window_frames
from harness.metrics import rises
from runtime import UserError
from sim.expert import GRASP, servo_action
from sim.libero_env import CLOSE, OPEN
from sim.rollout import OracleAgent, expert_path, run_episode, run_expert
from sim.variants import OUT_STEPS, LiftOnce, LiftOnceExpert, new_expert

REST = np.array([0.1, 0.2, 0.9])
# (EEF above the grasp, bowl above rest), m
REACH, LIFTING, BACK, OUTSIDE = (0.1, 0.0), (0.1, 0.1), (0.0, 0.0), (0.1, 0.0)


@pytest.mark.parametrize(
    "trace, expected",
    [
        ([0, 0.01, 0.04, 0.01], 0),
        ([0, 0.06, 0.1, 0], 1),
        ([0, 0.06, 0.04, 0.06, 0.03, 0.06, 0], 1),
        ([0.1, 0.1], 0),
        ([0, 0.1, 0.01, 0.1, 0.01, 0.1], 3),
        ([], 0),
    ],
)
def test_rises_count_with_hysteresis(trace, expected):
    """A lift is a rise above 5 cm from below 2 cm.

    Shaking in between does not count, and neither does hanging from the first step on.
    """
    assert rises(trace, 0.02, 0.05) == expected


def account(*phases, aside=0.0):
    """A LiftOnce that has seen phases of ((EEF above the grasp's height, bowl above rest) in m,
    gripper command, steps). aside: metres between a lifted bowl's new place and its old one.
    """
    once = LiftOnce(REST)
    for (arm, bowl), gripper, steps in phases:
        for _ in range(steps):
            once.note(
                REST + np.array([aside if once.lifts else 0, 0, bowl]),
                REST + np.array([0, 0, GRASP[2] + arm]),
                gripper,
                0.04 - 0.04 * gripper,
            )
    return once


LIFT = [(REACH, OPEN, 5), (BACK, OPEN, 3), (LIFTING, CLOSE, 9), (BACK, CLOSE, 3), (BACK, OPEN, 10)]


@pytest.mark.parametrize(
    "phases, lifts, outcome",
    [
        ([*LIFT, (OUTSIDE, OPEN, OUT_STEPS)], 1, "once"),
        ([*LIFT, (OUTSIDE, OPEN, OUT_STEPS - 1)], 1, "unfinished"),
        ([*LIFT, (BACK, OPEN, 300)], 1, "unfinished"),
        (LIFT + LIFT + [(OUTSIDE, OPEN, OUT_STEPS)], 2, "again"),
        ([*LIFT, (OUTSIDE, OPEN, 5), (BACK, OPEN, 5), (OUTSIDE, OPEN, OUT_STEPS)], 1, "again"),
        ([*LIFT[:3], (LIFTING, CLOSE, 300)], 1, "kept"),
        ([(OUTSIDE, OPEN, 300)], 0, "miss"),
        (
            [
                (OUTSIDE, OPEN, 5),
                (BACK, OPEN, 5),
                (BACK, CLOSE, 5),
                (REACH, CLOSE, 5),
                (REACH, OPEN, 300),
            ],
            0,
            "miss",
        ),
    ],
)
def test_only_one_lift_put_back_and_left_counts(phases, lifts, outcome):
    """A success is exactly one lift that is put back, followed by OUT_STEPS during which the arm is
    away and does not reach down again.
    """
    once = account(*phases)
    assert (once.lifts, once.outcome(), once.done()) == (lifts, outcome, outcome == "once")


def test_a_bowl_put_down_elsewhere_is_not_back():
    """Within 3 cm of its old place the bowl counts as back, at 4 cm it does not."""
    assert account(*LIFT, (OUTSIDE, OPEN, OUT_STEPS), aside=0.02).done()
    assert account(*LIFT, (OUTSIDE, OPEN, OUT_STEPS), aside=0.04).outcome() == "kept"


def test_windows_in_the_stay_hold_staying_frames_alone():
    """A window of 8 frames that ends late in the stay holds only staying frames.

    One that ends early still holds the release.
    """
    demo = track([-1] * 5 + [1] * 20 + [-1] * 80)
    demo.ee_pos[40:] = demo.ee_pos[40]
    target, _, _, usable = waypoint_labels(demo, 5, 1, min_travel=0.02, stay=True)
    window = lambda last: window_frames(
        following_frames(demo, target[:, 0]), last, 8, ~held_frames(demo)
    )
    late, early = window(90), window(45)
    assert usable[90] and len(late) == 8 and min(late) >= 40 and set(np.diff(late)) == {5}
    assert usable[45] and 25 in early


def test_windows_reach_back_over_the_pause():
    """A window that ends late in the pause before the grasp, or after it, still holds the way
    there. Otherwise its first frame would hang in mid-air and look like the stay, with the label
    "go down".
    """
    demo = track([-1] * 50)
    demo.ee_pos[20:36] = demo.ee_pos[20]  # it pauses, then goes on
    demo.ee_pos[36:] -= 15 * 0.02 * np.eye(3)[0]
    target, _, _, _ = waypoint_labels(demo, 5, 1, min_travel=0.02, stay=True)
    window = lambda last, since: window_frames(
        following_frames(demo, target[:, 0]), last, 8, ~held_frames(demo), since
    )
    since = standing_since(demo.ee_pos)
    assert since[19] == 19 and since[34] == since[20] == 20 and since[36] == 36
    assert window(33, None) == [33] and window(33, since) == [0, 5, 10, 15, 33]
    assert window(40, since)[:4] == [0, 5, 10, 15] and window(40, since)[-1] == 40


def test_what_has_no_meaning_is_refused():
    """lift_once does not exist for the rim grasp, the blind replay and the oracle.

    One sentence says so before anything starts.
    """
    with pytest.raises(UserError, match="--grasp rim"):
        new_expert("rim", "lift_once")
    for policy in ("blind", "oracle"):
        with pytest.raises(UserError, match=f"--policy {policy}"):
            evaluation.prepare(
                evaluation.build_parser().parse_args(["--policy", policy, "--variant", "lift_once"])
            )
    # in a replay
    with pytest.raises(UserError, match="--setting, --start_spread would have no effect"):
        collect_demos.main(
            ["--replay", "some.hdf5", "--setting", "position", "--start_spread", "0.3"]
        )


def test_the_variant_travels_from_data_to_evaluation(tmp_path):
    """A checkpoint trained on lift_once knows its variant: staying is a valid answer, and eval.py
    takes the variant without a flag.
    """
    path = write_synthetic_demos(tmp_path / "demos.hdf5", size=112)
    with h5py.File(path, "a") as file:
        file["data"].attrs["variant"] = "lift_once"
    run(*train_flags(path, "run", 1), cwd=tmp_path)
    args = evaluation.build_parser().parse_args(
        ["--ckpt", str(tmp_path / "run" / "checkpoint.safetensors")]
    )
    with evaluation.network_of(args) as network:
        info = evaluation.prepare(args, network)
    assert args.variant == "lift_once"
    assert args.out.name.endswith("lift_once")
    assert info["config"]["stay"] is True


# -- the real simulator


def test_one_image_does_not_tell_before_from_after_the_lift(scene):
    """The expert hovers at one pose twice, before its grasp and after its release.

    The two images are far more alike than the first one and that of its next waypoint. A policy of
    one frame therefore cannot tell whether to go down or to stay.
    """
    scene.begin_episode(scene.init_states()[0])
    expert, seen, above = LiftOnceExpert().plan(scene), {}, {}
    while not expert.done:
        phase, now = expert.phase, scene.observe(image=False)
        target, gripper = expert.act(scene, now.eef_pos)
        paused, going_down = (
            phase == "pause" and expert.phase == "descend",
            phase == "descend" and expert.count == 5,
        )
        if paused or going_down or expert.done:
            seen[phase], above[phase] = (
                scene.observe().image.astype(float),
                now.eef_pos - scene.position(scene.pick),
            )
        scene.step(servo_action(now.eef_pos, target, gripper))
    apart = lambda a, b: np.abs(seen[a] - seen[b]).mean()
    assert np.linalg.norm(above["pause"] - above["stay"]) < 0.004
    assert apart("pause", "stay") < 0.5 * apart("pause", "descend")


def test_expert_lifts_exactly_once_and_a_policy_without_memory_does_not(scene, tmp_path):
    """The expert succeeds by the variant's own criterion.

    The oracle follows the same path but knows its place on it only from the EEF's position, and
    fails, because the bowl is put back where it was taken.
    """
    state = scene.init_states()[1]
    path = expert_path(scene, state, tmp_path, variant="lift_once")
    row, _, _ = run_expert(scene, state, variant="lift_once")
    assert path.success and (row["outcome"], row["lifts"], row["success"]) == ("once", 1, True)
    row, _, _ = run_episode(
        scene, OracleAgent(), state, max_steps=120, path=path, variant="lift_once"
    )
    assert (row["outcome"], row["lifts"], row["success"]) == ("miss", 0, False)
