"""LeRobot datasets beside the simulator: the cameras of LIBERO's scenes, and its pictures."""

import importlib
import importlib.util
import json
import re

import numpy as np
import pytest
from helpers import ROOT

from camera import extrinsics_from_mujoco
from formats import libero_hdf5
from formats.dataset import open_dataset
from formats.libero_cameras import (
    PROBLEMS,
    SCENE_OF_KEY,
    SCENES,
    SUPPORTS,
    TASKS,
    agentview,
    camera_of_task,
    support_of_task,
)
from formats.pictures import ORIENTATIONS, check_pictures
from rot_utils import quat_to_matrix
from runtime import UserError
from sim.clearance import Boxes
from sim.expert import servo_action
from sim.libero_env import Scene
from sim.tasks import env_metadata, find_task, init_states
from sim.variants import new_expert


class Arena:
    """Takes a scene's cameras down, as an arena of MuJoCo's would."""

    def __init__(self):
        self.cameras = {}

    def set_camera(self, camera_name, pos, quat, camera_attribs=None):
        self.cameras[camera_name] = (np.array(pos), np.array(quat), camera_attribs)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_cameras_are_those_that_liberos_scenes_set(problem):
    """Position and rotation of agentview as LIBERO's own class of scene sets them, with MuJoCo's
    field of view.
    """
    # LIBERO's own register of its classes, by the name that BDDL files give
    scenes = importlib.import_module("libero.libero.envs").TASK_MAPPING
    arena = Arena()
    scenes[problem]._setup_camera(None, arena)
    position, (w, x, y, z), attributes = arena.cameras["agentview"]
    rotation = quat_to_matrix(np.array([x, y, z, w]) / np.linalg.norm([x, y, z, w]))
    _, E = agentview(PROBLEMS[problem], 256)
    np.testing.assert_allclose(E, extrinsics_from_mujoco(position, rotation), atol=1e-9)
    assert not attributes and set(PROBLEMS.values()) == set(SCENES)


@pytest.mark.parametrize("suite", TASKS)
def test_instructions_and_scenes_are_those_of_liberos_tasks(suite):
    """Every task's instruction leads to the camera of the scene that its BDDL file names."""
    for index, instruction in enumerate(TASKS[suite]):
        task = find_task(suite, index)
        assert task.language == instruction
        with open(task.bddl) as file:
            problem = re.search(r"\(problem (\w+)\)", file.read())[1].lower()
        expected = agentview(PROBLEMS[problem], 256)[1]
        assert np.array_equal(camera_of_task(instruction, 256)[1], expected)
        assert support_of_task(instruction) == SUPPORTS[PROBLEMS[problem]]


@pytest.mark.parametrize("suite, index", [("libero_spatial", 0), ("libero_object", 1)])
def test_a_scene_says_what_its_objects_stand_on(suite, index):
    """The height that its task is known for, on which its objects come to rest; and what it
    records names the kind of scene that it is.
    """
    scene = Scene(suite, index, rendering=False)
    support = support_of_task(scene.task.language)
    assert scene.support == support == scene.observe(image=False).support
    scene.begin_episode(init_states(scene.task)[0])
    lowest = Boxes(scene, only=scene.env.env.objects_dict).low[:, 2].min()
    assert support - 0.005 < lowest < support + 0.01
    env = env_metadata(scene.task)
    assert (
        PROBLEMS[json.loads(env["problem_info"])["problem_name"]]
        == SCENE_OF_KEY[f"{suite}_{index}"]
    )


def test_the_scenes_camera_is_the_one_that_was_recorded(lerobot_dataset):
    """libero_spatial's, from its instruction, to a tenth of a millimetre."""
    demo = open_dataset(lerobot_dataset).demos[0]
    K, E = camera_of_task(demo.attrs["task"], demo.image_size)
    np.testing.assert_allclose(demo.K, K, atol=1e-3)
    np.testing.assert_allclose(demo.E, E, atol=1e-4)


def test_pictures_of_the_simulator_are_told_from_their_reflections(lerobot_dataset, monkeypatch):
    """Read as it is stored, a dataset passes; read in any other way it is refused, and the message
    names the right one.
    """
    read = open_dataset(lerobot_dataset)
    for orientation in set(ORIENTATIONS) - {"mirrored"}:
        monkeypatch.setattr(read, "orientation", orientation)
        with pytest.raises(UserError, match="it is mirrored"):
            check_pictures(read.demos, lerobot_dataset, orientation, "it is {}")


def test_images_are_the_simulators_own_turned_by_180_degrees(lerobot_dataset, collected):
    """What is stored is what public LIBERO data stores: MuJoCo's rows, bottom first, turned."""
    read = open_dataset(lerobot_dataset)
    read.orientation = "upright"  # as it is stored
    stored = read.demos[0].images([0])[0]
    with libero_hdf5.open_demos(collected[0]) as file:
        seen = libero_hdf5.read_images(collected[0], file, "demo_0", [0])[0]
    of_mujoco = seen[::-1]
    assert np.array_equal(stored, of_mujoco[::-1, ::-1])


@pytest.mark.parametrize("layout, moves", [("val_moved_midway", True), ("val", False)])
def test_the_environment_for_lerobot_sets_the_bowl_aside_too(layout, moves):
    """As eval.py does, once the arm hovers over it: a layout is the same under either."""
    path = ROOT / "plugins" / "lerobot_env_libero_calibrated" / "src"
    path = path / "lerobot_env_libero_calibrated" / "environment.py"
    spec = importlib.util.spec_from_file_location("environment", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    env = made.CalibratedLibero(
        **{"suite": "libero_spatial", "task_id": 0, "layout": layout, "split": None},
        **{"clean": False, "size": 64, "render": "fast", "wrist": False},
        **{"episode_length": 99, "first_episode": 3, "stride": 1},
    )
    env.reset()
    scene, expert = env.scene, new_expert("side", "task").plan(env.scene)
    before = scene.position(scene.pick)[:2]
    while env.steps < 60 and not (env.event and env.event.row) and expert.phase != "close":
        now = scene.observe(image=False)
        target, gripper = expert.act(scene, now.eef_pos, now.eef_rot)
        env.step(servo_action(now.eef_pos, target, gripper, eef_rot=now.eef_rot))
    moved = np.linalg.norm(scene.position(scene.pick)[:2] - before)
    assert 5 < env.steps < 60
    assert moved == pytest.approx(0.05, abs=0.01) if moves else moved < 0.01
    env.close()
