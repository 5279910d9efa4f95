"""The renderer's environment variables: robosuite cannot use some values.

Each is made to work, or named in one sentence.
"""

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
    """Run Python in the repository with these environment variables -> CompletedProcess."""
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
    """`check_setup` prints one line with the variable and its value.

    Without the check a traceback of forty lines ends somewhere else.
    """
    done = start("-m", "sim.check_setup", **{variable: value})
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"{variable}={value}" in done.stderr and "unset" in done.stderr


def test_an_evaluation_is_refused_before_its_workers_start():
    """eval.py and the other scripts check before anything starts, not in the first worker half a
    minute later.
    """
    done = start("eval.py", "--policy", "expert", "--n_episodes", "1", MUJOCO_EGL_DEVICE_ID="99")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "MUJOCO_EGL_DEVICE_ID=99" in done.stderr, done.stderr


@pytest.mark.parametrize("visible", ["", "3", "GPU-8f7e0000-0000", "0,1"])
def test_robosuite_renders_whatever_cuda_devices_are_visible(visible):
    """CUDA_VISIBLE_DEVICES may name no GPU, another than the first, a UUID or several.

    robosuite itself asserts or fails on int('') with them, so its device is chosen for it.
    """
    code = (
        "from sim.simulator import rendered_by; import os; "
        "print(rendered_by(), repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    )
    done = start("-c", code, CUDA_VISIBLE_DEVICES=visible)
    # torch finds it as the user set it
    assert done.returncode == 0 and done.stdout.split()[-1] == repr(visible), done.stderr


def test_check_setup_says_what_simulates_and_what_renders():
    """check_setup names the renderer: a user of a GPU may get images from llvmpipe, on the CPU."""
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
    """The first EGL device that works is chosen.

    robosuite takes device 0 or fails, even if another would work.
    """
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
    """A device is refused that is out of range, no number, or cannot be initialised; so is a
    machine without any.
    """
    with pytest.raises(
        UserError, match="MUJOCO_EGL_DEVICE_ID=" + value if value else "none can be used"
    ):
        choose_device({"MUJOCO_EGL_DEVICE_ID": value} if value else {}, devices)


def test_an_empty_variable_counts_as_unset():
    """An empty variable counts as unset: `MUJOCO_GL= python ...` is how a shell unsets it for one
    command.
    """
    check_platform({"MUJOCO_GL": "", "PYOPENGL_PLATFORM": " EGL "})


def test_the_visible_devices_come_back(monkeypatch):
    """CUDA devices are hidden only while robosuite is imported, also if the import fails: torch
    needs them afterwards.
    """
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(RuntimeError), all_devices_visible():
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
        raise RuntimeError
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_asking_for_the_renderer_leaves_a_scene_rendering():
    """After the check the scene's GL context is current again, and not the check's or none.

    Otherwise the scene's next image would come from another context, or the process would crash.
    """
    scene = Scene(image_size=32, clean=True)
    before = scene.render()
    rendered_by.__wrapped__()
    np.testing.assert_array_equal(scene.render(), before)
    scene.close()
