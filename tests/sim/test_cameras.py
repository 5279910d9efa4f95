"""Renders of agentview: the exact one is LIBERO's picture, the fast one is near it and never mixed
up with it.
"""

import argparse

import numpy as np
import pytest

import eval as evaluation
from runtime import UserError
from sim.libero_env import Scene
from sim.simulator import libero

SIDE = 96


def libero_picture(task, state):
    """(S,S,3) uint8, upright: what LIBERO's own environment shows of a state."""
    env = libero()[2](
        bddl_file_name=task.bddl,
        camera_names=["agentview"],
        camera_heights=SIDE,
        camera_widths=SIDE,
    )
    env.reset()
    picture = env.set_init_state(state)["agentview_image"][::-1].copy()
    env.env.compiled = None
    env.close()
    return picture


@pytest.mark.parametrize("suite, task", [("libero_goal", 7), ("libero_90", 0), ("libero_10", 0)])
def test_the_exact_render_is_liberos_byte_by_byte(suite, task):
    """The exact render equals LIBERO's pixels on a table, in a kitchen and in a living room.

    Committed checkpoints and official data were made with these pixels.
    """
    scene = Scene(suite, task, image_size=SIDE)
    state = scene.init_states()[0]
    scene.set_state(state)
    picture = scene.render()
    scene.close()
    np.random.seed(0)  # as a Scene's seed: fixtures are placed by NumPy's global generator
    np.testing.assert_array_equal(picture, libero_picture(scene.task, state))


def test_the_fast_render_is_near_the_exact_one_and_stays_fast():
    """The fast render leaves out reflections and smoothed edges.

    It differs by less than 2.5 of 255 on average, and fewer than one pixel in twenty by more than
    16. A reset that keeps the GL context keeps the fast quality.
    """
    pictures = {}
    for quality in ("exact", "fast"):
        scene = Scene(image_size=448, render=quality)
        scene.set_state(scene.init_states()[0])
        pictures[quality] = scene.render()
        fixtures, camera = scene.fixtures(), scene.camera()[1]
        scene.reset([0, 1])
        scene.set_fixtures(fixtures)
        scene.set_state(scene.init_states()[0])
        np.testing.assert_array_equal(scene.camera()[1], camera)
        np.testing.assert_array_equal(scene.render(), pictures[quality])
        scene.close()
    difference = np.abs(pictures["fast"].astype(int) - pictures["exact"])
    assert 0.1 < difference.mean() < 2.5
    assert (difference.max(-1) > 16).mean() < 0.05


def test_scenes_of_one_process_draw_their_own_pictures():
    """Else the older of two scenes draws with the newer one's meshes, and loses its own when that
    one is closed or built anew."""
    scenes = [Scene(image_size=SIDE, clean=True, render=quality) for quality in ("exact", "fast")]
    alone = [scene.render() for scene in scenes]  # the newer one's context is the current one
    lone = Scene(image_size=SIDE, clean=True)
    np.testing.assert_array_equal(alone[0], lone.render())
    lone.close()
    for scene, picture in zip(scenes, alone):
        np.testing.assert_array_equal(scene.render(), picture)
    scenes[1].close()
    np.testing.assert_array_equal(scenes[0].render(), alone[0])
    scenes[0].close()


NOT_GIVEN = {"image_size": None, "waypoint_stride": None}


@pytest.mark.parametrize("trained, asked", [("fast", "exact"), ("exact", "fast")])
def test_a_checkpoint_sees_the_render_it_was_trained_on(trained, asked):
    """Another render than that of training is refused: the success rate would fall without a
    warning. A checkpoint that does not name its render was trained on exact images.
    """
    args = argparse.Namespace(render=asked, ckpt="run/checkpoint.safetensors", **NOT_GIVEN)
    info = {"dataset": {"render": trained} if trained == "fast" else {}}
    with pytest.raises(UserError, match=f"was trained on images of --render {trained}"):
        evaluation.as_trained(args, info, {"image_size": SIDE, "waypoint_stride": 5})


@pytest.mark.parametrize("trained", ["fast", "exact"])
def test_what_is_not_asked_for_is_what_the_checkpoint_was_trained_on(trained):
    """Without a --render flag the checkpoint's own render is used.

    Otherwise a checkpoint of fast pictures would be refused until its user finds the flag.
    """
    args = argparse.Namespace(
        **{"render": None, "ckpt": "run/checkpoint.safetensors", "layout": "shifted"},
        **{"task_suite": None, "task_id": None, "grasp": None, "variant": None},
        **{"clean_scene": None, "split": None, **NOT_GIVEN},
    )
    info = {"dataset": {"render": trained}, "model_type": "para", "backbone_identity": "x"}
    evaluation.as_trained(args, info, {"image_size": SIDE, "waypoint_stride": 5})
    assert args.render == trained
