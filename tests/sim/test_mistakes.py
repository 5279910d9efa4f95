"""Demonstrations that begin with a grasp that fails: it fails, and the expert makes it good."""

import numpy as np
import pytest
from conftest import SIZE
from helpers import run

import collect_demos
from data import waypoint_labels
from formats.dataset import open_dataset
from runtime import UserError
from sim import collected, mistakes
from sim.expert import PickPlaceExpert, servo_action
from sim.libero_env import CLOSE, OPEN, Scene
from sim.planned_expert import PlannedExpert


def settled(scene, index=0):
    """Put the scene into an init state."""
    scene.begin_episode(scene.init_states()[index])


def drive(scene, target, gripper, rotation=None):
    """One control step towards a target (3,) m, and a rotation (3,3)."""
    now = scene.observe(image=False)
    scene.step(servo_action(now.eef_pos, target, gripper, rotation=rotation, eef_rot=now.eef_rot))


def attempted(scene, seed, grasp="side"):
    """Carry an attempt out -> the largest height (m) that the bowl was lifted by."""
    rest, heights = scene.position(scene.pick)[2], [0.0]
    plan = mistakes.plan_of(scene, grasp)
    for target, gripper in mistakes.attempt(scene, np.random.default_rng(seed), plan):
        drive(scene, target, gripper, plan.rotation)
        heights.append(scene.position(scene.pick)[2] - rest)
    return max(heights)


def test_attempts_miss_the_bowl_and_end_at_any_place(scene):
    """Most miss, so that few are drawn again; they end from the grasp to the plate, most with
    closed fingers that hold nothing.
    """
    ends, widths, lifted = [], [], []
    for seed in range(8):
        settled(scene)
        bowl, plate = scene.position(scene.pick), scene.position(scene.place)
        lifted.append(attempted(scene, seed) > mistakes.LIFTED)
        now = scene.observe(image=False)
        ends.append((now.eef_pos - bowl)[:2] @ (plate - bowl)[:2] / np.sum((plate - bowl)[:2] ** 2))
        widths.append(now.gripper_width)
    assert sum(lifted) <= 2
    assert min(ends) < 0.2 and max(ends) > 0.8
    assert sum(width < 0.003 for width in widths) >= 4


def test_the_expert_goes_back_with_closed_fingers_and_opens_above_the_bowl(scene):
    """On the way they stay closed: whatever they may hold is not dropped."""
    settled(scene)
    # an attempt that ends with closed fingers on the way to the plate
    seed = next(s for s in range(20) if 1.3 < end_of(s) < 2)
    assert attempted(scene, seed) < mistakes.LIFTED
    expert, opened_at = PickPlaceExpert().plan(scene), None
    for _ in range(expert.max_steps):
        eef = scene.observe(image=False).eef_pos
        target, gripper = expert.act(scene, eef)
        if expert.done:
            break
        if opened_at is None and gripper == OPEN:
            opened_at = eef - scene.position(scene.pick) - expert.offset
        assert opened_at is not None or gripper == CLOSE
        scene.step(servo_action(eef, target, gripper))
    assert np.linalg.norm(opened_at[:2]) < 0.02 and opened_at[2] > 0.08
    assert expert.done and scene.success()


def test_the_planned_expert_makes_a_failing_grasp_good():
    """In the drawer of libero_spatial 4 the attempt stays clear of its walls. The expert comes back
    with closed fingers, opens them above the bowl, and brings it to the plate.
    """
    scene = Scene("libero_spatial", 4, int(SIZE), render="fast")
    try:
        settled(scene)
        assert mistakes.can_fail(scene, "planned")
        # one that ends with closed fingers
        assert attempted(scene, 1, "planned") < mistakes.LIFTED
        assert scene.observe(image=False).gripper_width < 0.003
        expert, opened_at, phases = PlannedExpert().plan(scene), None, []
        while not expert.done and len(phases) < expert.max_steps:
            now = scene.observe(image=False)
            target, gripper = expert.act(scene, now.eef_pos, now.eef_rot)
            phases.append(expert.phase)
            if opened_at is None and gripper == OPEN:
                opened_at = now.eef_pos - scene.position(scene.pick)
            drive(scene, target, gripper, expert.rotation)
        # high up already, there is nothing to rise over
        assert [p for p in dict.fromkeys(phases) if p != "rise"][:2] == ["return", "reopen"]
        assert np.linalg.norm(opened_at[:2]) < 0.08 and opened_at[2] > 0.1
        assert scene.success()
    finally:
        scene.close()


def test_tasks_without_a_grasp_make_no_mistake():
    """Opening a drawer: there is nothing to miss, whatever the rate."""
    scene = Scene("libero_goal", 0, int(SIZE), render="fast")
    try:
        settled(scene)
        assert not mistakes.can_fail(scene, "planned")
    finally:
        scene.close()


def end_of(seed):
    """How far an attempt of a seed gets, see mistakes.attempt: it is drawn after the grasp."""
    rng = np.random.default_rng(seed)
    if rng.random() < 0.5:
        rng.uniform(size=3)
    else:
        rng.normal(size=2), rng.uniform()
    return rng.uniform(0, 2.5)


def test_nothing_is_learnt_from_the_attempt(tmp_path):
    """Its frames are in the file, as context for policies with a history, and train nothing."""
    run(
        f"collect_demos.py --n_demos 1 --image_size {SIZE} --push_rate 0 --mistake_rate 1 "
        "--clean_scene --render fast --workers 1 --out mistakes.hdf5",
        cwd=tmp_path,
    )
    (demo,) = open_dataset(tmp_path / "mistakes.hdf5", int(SIZE)).demos
    attempt = int(np.argmin(demo.perturbed))  # the first frame that is the expert's
    assert attempt > 30 and not demo.perturbed[attempt:].any()
    _, _, _, usable = waypoint_labels(demo, 5, 1, min_travel=0.02)
    assert not usable[:attempt].any() and usable[attempt:].sum() > 30


@pytest.mark.parametrize("flags", ["--grasp rim", "--variant lift_once"])
def test_no_other_expert_makes_a_mistake_good(flags):
    with pytest.raises(UserError, match="--mistake_rate 0.5: only the grasps `side` and `planned`"):
        collect_demos.main(["--mistake_rate", "0.5", *flags.split()])


def test_loose_cameras_are_the_recipes():
    with pytest.raises(UserError, match="--loose_camera: only --setting recipe"):
        collect_demos.main(["--loose_camera", "1"])


def test_the_recipe_makes_no_mistakes_that_its_expert_cannot_make_good():
    """--setting recipe with another grasp: its own rate of mistakes is not taken over."""
    for grasp, rate in (("side", 0.5), ("planned", 0.5), ("rim", 0.0)):
        words = ["--setting", "recipe", "--grasp", grasp]
        args = collect_demos.build_parser().parse_args(words)
        collected.fill_spreads(args)
        assert args.mistake_rate == rate and args.loose_camera == 1
