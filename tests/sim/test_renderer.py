"""The renderer's environment: each variable that robosuite cannot use is named in one sentence, or
made to work."""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT

from runtime import UserError
from sim.libero_env import Scene
from sim.renderer import all_devices_visible, check_platform, choose_device, kind_of
from sim.simulator import rendered_by


def start(*words, **variables):
    """Run Python in the repository with these environment variables set -> CompletedProcess."""
    # an earlier test may have set them
    unset = ("MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", "PYOPENGL_PLATFORM", "CUDA_VISIBLE_DEVICES")
    environ = {k: v for k, v in os.environ.items() if k not in unset}
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "variable, value",
    [
        ("MUJOCO_GL", "osmesa"),
        ("MUJOCO_GL", "bogus"),
        ("PYOPENGL_PLATFORM", "glx"),
        ("MUJOCO_EGL_DEVICE_ID", "99"),
        ("MUJOCO_EGL_DEVICE_ID", "-1"),
    ],
)
def test_check_setup_names_the_variable(variable, value):
    """One line with the variable and its value; without the check forty lines of traceback end
    elsewhere."""
    done = start("-m", "sim.check_setup", **{variable: value})
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"{variable}={value}" in done.stderr and "unset" in done.stderr


def test_an_evaluation_is_refused_before_its_workers_start():
    """eval.py and its siblings ask before anything starts, not in the first worker half a minute
    later."""
    done = start("eval.py", "--policy", "expert", "--n_episodes", "1", MUJOCO_EGL_DEVICE_ID="99")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "MUJOCO_EGL_DEVICE_ID=99" in done.stderr, done.stderr


@pytest.mark.parametrize("visible", ["", "3", "GPU-8f7e0000-0000", "0,1"])
def test_robosuite_renders_whatever_cuda_devices_are_visible(visible):
    """No GPU, one other than the first, a UUID, several: robosuite asserts or fails on int('')
    unless we choose its device."""
    code = (
        "from sim.simulator import rendered_by; import os; "
        "print(rendered_by(), repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    )
    done = start("-c", code, CUDA_VISIBLE_DEVICES=visible)
    # torch finds it as the user set it
    assert done.returncode == 0 and done.stdout.split()[-1] == repr(visible), done.stderr


def test_check_setup_says_what_simulates_and_what_renders():
    """A user on a GPU machine whose images come from llvmpipe, the CPU, must see that here."""
    done = start("-m", "sim.check_setup")
    name = rendered_by()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{name}: {kind_of(name)}" in done.stdout, done.stdout + done.stderr
    assert "mujoco 3.3." in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "environ, devices, device",
    [
        ({}, [1, 1], 0),
        ({}, [0, 1], 1),
        ({"CUDA_VISIBLE_DEVICES": "1"}, [1, 1, 1], 1),
        ({"CUDA_VISIBLE_DEVICES": "2,0"}, [1, 1, 1], 2),
        ({"CUDA_VISIBLE_DEVICES": "7"}, [1, 1], 0),
        ({"CUDA_VISIBLE_DEVICES": "1"}, [1, 0], 0),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1"}, [1], 0),
        ({"CUDA_VISIBLE_DEVICES": ""}, [1], 0),
        ({"MUJOCO_EGL_DEVICE_ID": "1", "CUDA_VISIBLE_DEVICES": "0"}, [1, 1], 1),
        ({"MUJOCO_EGL_DEVICE_ID": ""}, [1], 0),
    ],
)
def test_the_device_is_the_first_visible_one_that_works(environ, devices, device):
    """robosuite takes device 0 or fails, although another would do."""
    assert choose_device(environ, devices) == device


@pytest.mark.parametrize(
    "value, devices",
    [
        ("5", [1]),
        ("2", [1, 1]),
        ("one", [1]),
        ("1", [1, 0]),
        ("\u0663", [1] * 9),
        (None, [0]),
        (None, []),
    ],
)
def test_an_impossible_device_is_refused(value, devices):
    """Out of range, no number, not to be initialised, or no device at all."""
    with pytest.raises(
        UserError, match="MUJOCO_EGL_DEVICE_ID=" + value if value else "none can be used"
    ):
        choose_device({"MUJOCO_EGL_DEVICE_ID": value} if value else {}, devices)


def test_an_empty_variable_counts_as_unset():
    """`MUJOCO_GL= python ...` is how a shell unsets it for one command."""
    check_platform({"MUJOCO_GL": "", "PYOPENGL_PLATFORM": " EGL "})


def test_the_visible_devices_come_back(monkeypatch):
    """They are hidden only while robosuite is imported, also where that fails: torch needs them
    afterwards."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(RuntimeError), all_devices_visible():
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
        raise RuntimeError
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_asking_for_the_renderer_leaves_a_scene_rendering():
    """Its context must not stay current, nor leave none: the scene's next image would be another's,
    or a segmentation fault."""
    scene = Scene(image_size=32, clean=True)
    before = scene.render()
    rendered_by.__wrapped__()
    np.testing.assert_array_equal(scene.render(), before)
    scene.close()
