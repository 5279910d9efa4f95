"""How the tests run the scripts: as processes of their own, in a folder of their own."""

import atexit
import functools
import json
import os
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py

ROOT = Path(__file__).resolve().parent.parent
SIZE = "112"


# What robosuite, OpenCV and PyGame set when they are imported into the tests' own process
SET_BY_LIBRARIES = (
    *("MUJOCO_EGL_DEVICE_ID", "PYOPENGL_PLATFORM", "LP_NUM_THREADS", "LD_LIBRARY_PATH"),
    *("QT_QPA_PLATFORM_PLUGIN_PATH", "QT_QPA_FONTDIR", "PYGAME_HIDE_SUPPORT_PROMPT"),
)
AT_START = dict(os.environ)


def environment():
    """What a script would find in a user's shell: neither pytest's variables nor libraries'."""
    found = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    for key in SET_BY_LIBRARIES:
        found.pop(key, None)
        if key in AT_START:
            found[key] = AT_START[key]
    return found


class Forked:
    """A script that warm.py forked for; as much of subprocess.Popen as is needed here."""

    def __init__(self, server, arguments, cwd, files, variables):
        self.server, self.args, self.returncode = server, arguments, None
        request = {
            "arguments": [str(a) for a in arguments],
            "cwd": str(Path(cwd).resolve()),
            "files": [str(f) for f in files],
            "variables": variables,
        }
        # one line asks, one answers: the child's process id at once, its exit code later
        server.stdin.write(json.dumps(request).encode() + b"\n")
        self.pid = int(server.stdout.readline())

    def poll(self):
        # an exit code that can be read without waiting
        if self.returncode is None and select.select([self.server.stdout], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self.server.stdout], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self.server.stdout.readline())
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        os.kill(self.pid, 9)


@functools.cache
def warm():
    """(warm.py, running; the environment that it has)."""
    server = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "warm.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        cwd=ROOT,
        env=environment(),
    )
    atexit.register(server.communicate)  # it leaves when stdin ends
    return server, environment()


def started(script):
    """What Python is given to start a script in the root (train.py) or one in a package
    (study.bench)."""
    return [str(ROOT / script)] if script.endswith(".py") else ["-m", script]


def start(arguments, cwd, files, variables=None):
    """Start a script of the repository in `cwd`, its output and its errors into `files` -> a
    process. arguments: words, or a command as it is typed. variables: of the environment, which the
    repository's own code reads.

    It is a fork of warm.py, or a fresh interpreter where a test has changed the environment:
    libraries read that when they are imported.
    """
    script, *rest = shlex.split(arguments) if isinstance(arguments, str) else arguments
    # the fork has its parent's libraries, which have read the environment already: only an equal
    # one will do
    if hasattr(os, "fork") and sys.platform == "linux" and environment() == warm()[1]:
        return Forked(warm()[0], [*started(script), *rest], cwd, files, variables or {})
    with open(files[0], "wb") as out, open(files[1], "wb") as err:
        return subprocess.Popen(
            [sys.executable, *started(script), *map(str, rest)],
            cwd=cwd,
            env={**environment(), **(variables or {}), "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )


def run(*arguments, cwd, ok=True, timeout=400, variables=None):
    """Run a script of the repository in `cwd` -> CompletedProcess; its output is shown when it
    fails. arguments: words, or one string, the command as it is typed. variables: see `start`."""
    command = arguments[0] if len(arguments) == 1 else arguments
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        process = start(command, cwd, files, variables)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        out, err = (file.read_text() for file in files)
    assert not ok or process.returncode == 0, out + err
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def interrupt(arguments, cwd, when, number, timeout=300):
    """Start a script, send it a signal as soon as `when()` holds, wait for its end -> exit code."""
    process = start(arguments, cwd, [os.devnull, os.devnull])
    deadline = time.time() + timeout
    while not when() and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, f"{arguments[0]} ended before it could be interrupted"
    process.send_signal(number)
    return process.wait(timeout=60)


def train_flags(dataset, folder, steps):
    return shlex.split(
        f"train.py --dataset {dataset} --image_size {SIZE} --grid 14 --width 8 "
        f"--max_steps {steps} --backbone efficientnet_lite0 --batch_size 4 --val_every 3 "
        f"--save_every 2 --wandb off --out {folder} --precision fp32"
    )


def first_frames(source, target, n):
    """Copy a demonstration file, its demonstrations cut after n frames."""
    shutil.copy(source, target)
    with h5py.File(target, "r+") as file:
        for demo in file["data"].values():
            # all arrays with one row a frame are cut; others, as the camera, stay
            length, arrays = len(demo["actions"]), []
            demo.visititems(lambda name, node, found=arrays: found.append((name, node)))
            for name, node in arrays:
                if isinstance(node, h5py.Dataset) and node.shape[:1] == (length,):
                    kept = node[:n]
                    del demo[name]
                    demo[name] = kept
            demo.attrs["num_samples"] = n


def put(index, number):
    """A change of an array: `number` at `index`."""

    def change(value):
        value[index] = number
        return value

    return change


def shifts(scene, layout, index):
    """(dx, dy) m of bowl and plate (2,2) in an episode of a layout, from the benchmark's init state
    of the same index.
    """
    from sim.layouts import episode_state

    state, _ = episode_state(scene, layout, index)
    before = scene.init_states()[index]
    places = [scene._address(name) for name in (scene.pick, scene.place)]
    return [state[at][:2] - before[at][:2] for at in places]


def nearest_is_its_own(read, stored):
    """Assert of frames (N,S,S,3) read from a video that they show the red blob where the stored
    frames of their numbers do, rather than where those before or after do. Compression may lose it
    in one frame or another, so that all count together.
    """
    red = lambda images: images[..., 0].astype(int) - images[..., 1] > 90
    read, stored = red(read), red(stored)
    apart = lambda by: (read[1:-1] != stored[1 + by : len(stored) - 1 + by]).sum()
    assert apart(0) < 0.8 * min(apart(-1), apart(1)), [apart(by) for by in (-1, 0, 1)]
