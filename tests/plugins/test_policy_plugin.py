"""What the LeRobot policy plugin adds to our own code, tested without LeRobot: the servo that gives
one action a step, pictures turned upright, cameras by task."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from formats.libero_cameras import PROBLEMS, SUPPORTS
from runtime import UserError
from sim.libero_env import CLOSE, Observation
from sim.rollout import OracleAgent, PolicyError, expert_path, run_episode
from sim.simulator import parsed_bddl
from sim.tasks import SUITES, find_task
from waypoint import Waypoint

PLUGIN = ROOT / "plugins" / "lerobot_policy_para" / "src" / "lerobot_policy_para"


def module(name):
    """A file of the plugin, without the package, which needs LeRobot."""
    spec = importlib.util.spec_from_file_location(f"plugin_{name}", PLUGIN / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


Row = module("row").Row
cameras, images = module("cameras"), module("images")


@pytest.mark.parametrize("grasp", ["side", "rim"])
def test_the_servo_gives_the_actions_of_our_own_loop(scene, grasp, tmp_path, monkeypatch):
    """LeRobot's loop asks for one action a step. It gets, number by number, what run_episode would
    have done: the drive to a waypoint, the hold in which the fingers move, and the turning.
    """
    state = scene.init_states()[3]
    path = expert_path(scene, state, tmp_path, grasp)
    still = grasp == "side"
    ours = []
    with monkeypatch.context() as patched:
        step = scene.step
        patched.setattr(scene, "step", lambda action: (ours.append(np.array(action)), step(action)))
        done, *_ = run_episode(scene, OracleAgent(), state, zero_rotation=still, path=path)
    assert done["released"]

    scene.begin_episode(state)
    agent = OracleAgent()
    agent.start(scene, path)
    row = Row(lambda o: agent.act(o, int(row.servo.gripper == CLOSE)), zero_rotation=still)
    theirs = []
    for _ in range(done["steps"]):
        theirs.append(row.action(scene.observe(image=False)))
        scene.step(theirs[-1])
    # before its first decision run_episode lets the objects come to rest
    np.testing.assert_array_equal(theirs, ours[-done["steps"] :])
    assert row.decisions == done["decisions"]
    assert still or np.abs(np.array(theirs)[:, 3:6]).max() > 0.1


def standing(position=(0.0, 0.0, 1.0)):
    """An Observation of an EEF that does not move."""
    return Observation(None, np.array(position), np.eye(3), None, None, None, None, None)


def answer(position, gripper=-1.0):
    position = np.array(position, dtype=float)
    return Waypoint(position, None, gripper, position[None], np.array([gripper]))


def test_a_waypoint_out_of_reach_is_asked_again():
    """After ten steps towards a waypoint the policy decides anew, wherever the arm is."""
    row = Row(lambda o: answer([0.5, 0, 1]))
    for _ in range(31):
        assert row.action(standing())[0] == 1
    assert row.decisions == 4


def test_fingers_get_their_time():
    """Where the waypoint closes the gripper, the EEF stands still for the hold of ten steps."""
    row = Row(lambda o: answer([0, 0, 1.0], 1.0))
    actions = np.array([row.action(standing()) for _ in range(10)])
    assert row.decisions == 1 and (actions[:, 6] == 1).all() and not actions[:, :6].any()
    row.action(standing())
    assert row.decisions == 2


def test_a_waypoint_that_is_not_finite_is_refused():
    """NaN would go on to the motors."""
    row = Row(lambda o: answer([np.nan, 0, 1]))
    with pytest.raises(PolicyError, match="NaN"):
        row.action(standing())


def test_lerobots_pictures_are_turned_upright_and_unmirrored(scene):
    """Camera matrices hold for the picture as it is seen: LeRobot's is turned by 180 degrees after
    MuJoCo gave its rows bottom first."""
    seen = scene.render()
    bottom_first = torch.from_numpy(seen[::-1].copy()).permute(2, 0, 1)
    lerobots = bottom_first.flip(-2, -1)
    turned = images.upright(lerobots[None])[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(turned, seen)
    assert (images.upright(lerobots, "upright") == lerobots).all()
    with pytest.raises(UserError, match="sideways: unknown; there are lerobot and upright"):
        images.upright(lerobots, "sideways")


def test_each_task_of_the_four_suites_has_its_scenes_camera():
    """An observation without a camera gets that of its task's scene. Tasks of libero_90, whose
    instructions stand in several scenes, get none or the right one.
    """
    for suite in SUITES:
        for index in range(90 if suite == "libero_90" else 10):
            task = find_task(suite, index)
            problem = parsed_bddl(task.bddl)["problem_name"]
            scene = re.match("libero_(?:kitchen_)?(.+)_manipulation", problem)[1]
            found = cameras.scene_of(task.language)
            assert found == scene or found is None and suite == "libero_90", (task, found)
            if found:
                assert (
                    cameras.support_of({"task": [task.language]}, 0) == SUPPORTS[PROBLEMS[problem]]
                )


def test_the_table_has_the_simulators_camera(scene):
    """K in pixels and E of the tabletop scene are those that the simulator renders with."""
    K, E = cameras.agentview("tabletop", scene.image_size)
    np.testing.assert_allclose(K, scene.camera()[0], rtol=1e-9)
    np.testing.assert_allclose(E, scene.camera()[1], atol=1e-6)
    assert cameras.support_of({}, 0, "tabletop") == scene.support
    assert cameras.support_of({"task": ["fold the towel"]}, 0) is None


def test_an_observations_own_camera_comes_first():
    """A moved camera travels with the observation, and the task's scene is not asked."""
    K, E = cameras.agentview("floor", 100)
    batch = {
        cameras.INTRINSICS: torch.tensor(K)[None],
        cameras.EXTRINSICS: torch.tensor(E)[None],
        "task": ["turn on the stove"],
    }
    np.testing.assert_array_equal(cameras.camera_of(batch, 0, 100)[1], E)


@pytest.mark.parametrize(
    "batch, scene, words",
    [
        ({"task": ["fold the towel"]}, None, "no camera .* 'fold the towel' .* --policy.scene"),
        ({}, None, "carries no camera"),
        ({}, "attic", "--policy.scene=attic: unknown; there are tabletop"),
        ({cameras.INTRINSICS: torch.eye(3)[None]}, None, "alone"),
        (
            {cameras.INTRINSICS: torch.eye(3)[None], cameras.EXTRINSICS: torch.eye(4)[None]},
            None,
            "camera_intrinsics of row 0 has its principal point",
        ),
    ],
)
def test_a_missing_or_wrong_camera_is_refused_in_one_sentence(batch, scene, words):
    """Without a camera the volume would be unprojected to somewhere else."""
    with pytest.raises(UserError, match=words) as refused:
        cameras.camera_of(batch, 0, 448, scene)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "words, variables, words_lerobot, words_here",
    [
        (["plugins/serve_lerobot.py", "nope"], {}, "nope: holds no config.json", "LeRobot's env"),
        (
            ["plugins/setup.sh", "nope"],
            {"PYTHON": "nope"},
            "needs Python 3.12",
            "needs Python 3.12",
        ),
    ],
)
def test_scripts_beside_the_plugins_refuse_in_one_sentence(
    words, variables, words_lerobot, words_here
):
    """Exit code 2 and what to do, whether or not this environment has what they need."""
    command = [sys.executable, *words] if words[0].endswith(".py") else words
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True
    )
    # by its distribution: tests/lerobot is a folder of that name
    installed = {d.name for d in importlib.metadata.distributions()}
    expected = words_lerobot if {"lerobot", "websockets", "msgpack"} <= installed else words_here
    assert done.returncode == 2 and expected in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_what_is_installable_is_all_but_the_scripts():
    """The plugins import the repository's modules from its installation: a policy that is missing
    in pyproject.toml could not be loaded there.
    """
    import tomllib

    from test_layers import LAYERS, family

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    ground = set().union(*LAYERS[:-1])
    wanted = {f.stem for f in ROOT.glob("*.py") if f.stem in ground or family(f.stem)}
    assert set(listed["py-modules"]) == wanted
    assert {Path(p).name for p in listed["packages"]} <= {
        p.parent.name for p in ROOT.glob("*/*.py")
    }
