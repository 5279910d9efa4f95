"""The expert's grasp on the rim, in the real simulator without rendering: its yaw follows the
objects and is really reached.
"""

import ctypes
import gc
import sys
from pathlib import Path

import mujoco
import numpy as np
import pytest

from rot_utils import euler_to_matrix, matrix_to_euler, rotation_angle, rotvec_to_matrix
from sim import kept_model
from sim.expert import RIM_LIMIT, PickPlaceExpert, rim_angle, servo_action
from sim.libero_env import OPEN, OPEN_WIDTH, Scene
from sim.rollout import OracleAgent, expert_path, run_episode, run_expert

YAWS = (-24, 0, 27)  # degrees between the direction from bowl to plate and +x


@pytest.fixture(scope="module")
def scene():
    scene = Scene(image_size=64, clean=True)
    yield scene
    scene.close()


def layout(scene, degrees):
    """A state whose plate stands 16 cm from the bowl in a given direction."""
    state = scene.init_states()[0]
    bowl, plate = state[scene._address(scene.pick)][:2], state[scene._address(scene.place)][:2]
    wanted = bowl + 0.16 * np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])
    return scene.shift_objects(state, {scene.place: wanted - plate})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rebuilt_scene_leaves_no_memory_behind(scene):
    """Resets and renders do not make a worker grow, and leave nothing behind that could be freed.

    MuJoCo's last compiled XML and the freed memory that glibc keeps once took 0.5 GB of a full
    scene. The test process holds more than this scene, so it compares growth.
    """

    def megabytes():
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

    def rebuild(seed):
        kept_model.let_go(scene.env.env)  # else a reset compiles nothing
        scene.reset(seed)
        scene.render()
        return megabytes()

    first = max(rebuild(seed) for seed in range(2))
    assert rebuild(2) < first + 30
    held = megabytes()
    mujoco.MjModel.from_xml_string("<mujoco/>")
    ctypes.CDLL(None).malloc_trim(0)
    assert held - megabytes() < 100


def test_the_rim_angle_is_twice_the_plates_up_to_its_limit():
    """Plate straight ahead in +x: no turn. 15 degrees aside: twice that. Far aside: the limit, on
    the same side."""
    assert rim_angle([0, 0, 0.9], [0.2, 0, 0.9]) == 0
    aside = [np.cos(np.radians(15)), np.sin(np.radians(15)), 0.3]
    assert rim_angle([0, 0, 0.9], aside) == pytest.approx(np.radians(30))
    assert (
        rim_angle([0, 0, 0.9], [0.1, 0.1, 0.9])
        == pytest.approx(RIM_LIMIT)
        == -rim_angle([0, 0, 0.9], [0.1, -0.1, 0.9])
    )


def test_servo_action_turns_only_when_asked():
    """Without a rotation the action does not turn.

    With one its rotation part is the log of the remaining turn, in units of half a radian, clipped.
    """
    at, to, now = np.zeros(3), np.array([0.01, 0, 0]), euler_to_matrix(np.array([np.pi, 0, 0.2]))
    np.testing.assert_array_equal(servo_action(at, to, OPEN)[3:6], 0)
    small = servo_action(
        at, to, OPEN, rotation=rotvec_to_matrix(np.array([0, 0, 0.1])) @ now, eef_rot=now
    )
    np.testing.assert_allclose(small[3:6], [0, 0, 0.2], atol=1e-9)
    far = servo_action(
        at, to, OPEN, rotation=rotvec_to_matrix(np.array([0, 0, -2.0])) @ now, eef_rot=now
    )
    np.testing.assert_allclose(far[3:6], [0, 0, -1], atol=1e-9)
    np.testing.assert_array_equal(small[:3], servo_action(at, to, OPEN)[:3])


@pytest.mark.parametrize("degrees", YAWS)
def test_the_rim_expert_turns_and_succeeds(scene, degrees, tmp_path):
    """The bowl is placed and released.

    It was grasped with the yaw that the layout asks for, by the measured orientation of the
    fingers.
    """
    state = layout(scene, degrees)
    path = expert_path(scene, state, tmp_path, grasp="rim")
    assert path.success and scene.observe(image=False).gripper_width > OPEN_WIDTH
    grasped = path.rotations[path.changes[0]]
    yaw = np.degrees(matrix_to_euler(grasped)[2])
    assert yaw == pytest.approx(np.clip(2 * degrees, -60, 60), abs=8)
    assert np.degrees(np.abs(np.sin(matrix_to_euler(grasped)[:2]))).max() < 6  # still straight down
    again = expert_path(scene, state, tmp_path, grasp="rim")
    np.testing.assert_array_equal(again.rotations, path.rotations)
    row, _, _ = run_expert(scene, state, grasp="rim")
    assert row["released"]


def test_the_oracle_needs_the_rotation(scene, tmp_path):
    """The yaw matters: an oracle that follows the rim expert places the bowl with its rotations,
    and fails without them.
    """
    state = layout(scene, 27)
    path = expert_path(scene, state, tmp_path, grasp="rim")
    turned, _, _ = run_episode(
        scene, OracleAgent(), state, zero_rotation=False, max_steps=200, path=path
    )
    fixed, _, _ = run_episode(
        scene, OracleAgent(), state, zero_rotation=True, max_steps=200, path=path
    )
    assert turned["success"] and not fixed["released"]


def test_the_side_expert_never_turns(scene, tmp_path):
    """The plain grasp commands no rotation, and stores none."""
    path = expert_path(scene, layout(scene, 27), tmp_path)
    assert path.rotations is None and path.success and PickPlaceExpert().rotation is None
    assert (
        rotation_angle(scene.observe(image=False).eef_rot, euler_to_matrix(np.array([np.pi, 0, 0])))
        < 0.2
    )
