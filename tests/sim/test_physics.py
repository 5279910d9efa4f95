"""The lean control loop gives the numbers of robosuite's own loop, and a reset without compiling
gives those of one with it. Both are compared bit by bit.
"""

import numpy as np
import pytest

from sim import kept_model
from sim.libero_env import CLOSE, OPEN, Scene
from sim.physics import NO_SENSORS
from sim.rollout import expert_episode

# With the fixture it is about: a bowl on a ramekin that slides, a drawer with the bowl in it, a
# stove and a rack, the cabinet's top, and a plain place on the table.
EXPERT_TASKS = [
    ("libero_spatial", 5),
    ("libero_spatial", 4),
    ("libero_goal", 8),
    ("libero_goal", 4),
    ("libero_spatial", 2),
]
DRAWER, STOVE = ("libero_90", 24), ("libero_goal", 7)


@pytest.fixture
def open_scene():
    """Makes scenes without rendering, and closes them at the end."""
    made = []

    def make(suite, task):
        made.append(Scene(suite, task, rendering=False))
        return made[-1]

    yield make
    for scene in made:
        scene.close()


def record(scene, act):
    """Run `act()` in a scene -> (actions, the state after each)."""
    actions, states = [], []
    step = scene.step

    def noted(action):
        actions.append(np.array(action, dtype=float))
        step(action)
        states.append(scene.state())

    scene.step = noted
    act()
    del scene.step
    return actions, states


def assert_robosuite_agrees(scene, start, actions, states):
    """Replay actions in robosuite's own loop.

    Raises AssertionError with the first control step after which the states differ.
    """
    scene.use_physics("robosuite")
    scene.set_state(start)
    for i, (action, state) in enumerate(zip(actions, states)):
        scene.step(action)
        np.testing.assert_array_equal(scene.state(), state, err_msg=f"control step {i}")
    scene.use_physics("lean")


@pytest.mark.parametrize("suite, task", EXPERT_TASKS)
def test_an_expert_episode_is_robosuites_bit_by_bit(suite, task, open_scene):
    """Positions and velocities agree after every control step, contacts included.

    A loop that were only close would give other outcomes than LIBERO.
    """
    scene = open_scene(suite, task)
    start = scene.init_states()[1]
    actions, states = record(scene, lambda: expert_episode(scene, start))
    assert len(actions) > 90
    assert_robosuite_agrees(scene, start, actions, states)


@pytest.mark.parametrize("suite, task", [DRAWER, STOVE])
def test_rough_handling_is_robosuites_bit_by_bit(suite, task, open_scene):
    """Random saturated actions agree too: they turn, grasp, and hit drawers and knobs."""
    scene, rng = open_scene(suite, task), np.random.default_rng(0)
    start = scene.init_states()[0]

    def act():
        scene.set_state(start)
        for _ in range(6):
            action = rng.uniform(-1.5, 1.5, 7) * [1, 1, 1, 1, 1, 1, 0] - [0, 0, 0.5, 0, 0, 0, 0]
            action[6] = rng.choice([OPEN, 0, CLOSE])
            for _ in range(8):
                scene.step(action)

    actions, states = record(scene, act)
    assert_robosuite_agrees(scene, start, actions, states)


def burner(scene):
    """Whether the stove's burner is visible."""
    model = scene.sim.model
    return model.site_rgba[model.site_name2id("flat_stove_1_burner")][3] > 0


def test_a_stove_that_is_turned_on_shows_its_burner(open_scene):
    """LIBERO does work of its own after a step, and both loops do it: cameras see the burner."""
    scene = open_scene(*STOVE)
    knob = 1 + scene.sim.model.get_joint_qpos_addr("flat_stove_1_button")
    seen = []
    for physics in ("robosuite", "lean"):
        scene.use_physics(physics)
        for angle in (0.0, 1.0, 0.0):
            state = scene.init_states()[0]
            state[knob] = angle
            scene.set_state(state)
            scene.step([0, 0, 0, 0, 0, 0, OPEN])
            seen.append(burner(scene))
            assert scene.success() == burner(scene)
    assert seen == [False, True, False] * 2


def numbers(scene):
    """All numbers that decide what a scene does and shows: state, solver's warm start, model."""
    model, data = scene.sim.model._model, scene.sim.data
    found = {"state": scene.state(), "start": np.array(data.qacc_warmstart)}
    for name in dir(model):
        value = getattr(model, name) if name[0] != "_" else None
        if isinstance(value, np.ndarray):
            found[name] = value.copy()
    return found


def test_a_reset_without_compiling_is_one_with_it(open_scene):
    """Layout, fixtures, camera and simulation are those of a newly compiled model, whatever was
    edited in between. One random number more would change the layouts of a seed.
    """
    scene = open_scene("libero_spatial", 0)
    model, drawn = scene.sim.model, []
    for anew in (False, True):
        scene.set_camera(np.eye(4))
        scene.set_fixtures({"flat_stove_1": [1, 2, 3, 1, 0, 0, 0]})
        scene.step([1, 0, 0, 0, 0, 0, CLOSE])
        if anew:
            kept_model.let_go(scene.env.env)
        scene.reset([4, 2])
        drawn.append((numbers(scene), np.random.random()))
        assert (scene.sim.model is model) != anew
    (kept, after_kept), (compiled, after_compiled) = drawn
    assert after_kept == after_compiled
    for name, value in compiled.items():
        np.testing.assert_array_equal(kept[name], value, err_msg=name)


def test_the_lean_loop_is_for_liberos_setup_alone(open_scene):
    """Other controllers are refused: OSC_POSE's formulas would drive them without a warning.

    The lean loop switches off sensors, which nobody reads; robosuite's own loop keeps them and is
    compared with all of its work.
    """
    scene = open_scene("libero_object", 0)
    assert scene.sim.model.opt.disableflags & NO_SENSORS
    scene.use_physics("robosuite")
    assert not scene.sim.model.opt.disableflags & NO_SENSORS
    scene.robot.controller.uncoupling = False
    with pytest.raises(RuntimeError, match="OSC_POSE in its default settings"):
        scene.use_physics("lean")
