"""How the tests run the scripts: as subprocesses, in a folder of their own."""
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZE = "112"


def command(*arguments):
    return [sys.executable, *map(str, arguments)]


def run(*arguments, cwd, ok=True, timeout=400):
    """Run a script of the repository in `cwd` -> CompletedProcess; its output is shown when it fails."""
    done = subprocess.run(command(ROOT / arguments[0], *arguments[1:]), cwd=cwd, capture_output=True, text=True, timeout=timeout)
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


def interrupt(arguments, cwd, when, number, timeout=300):
    """Start a script, send it a signal as soon as `when()` holds, wait for its end -> exit code."""
    process = subprocess.Popen(command(ROOT / arguments[0], *arguments[1:]), cwd=cwd, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.time() + timeout
    while not when() and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, f"{arguments[0]} ended before it could be interrupted"
    process.send_signal(number)
    return process.wait(timeout=60)


def train_flags(dataset, folder, steps):
    return ("train.py", "--dataset", dataset, "--image_size", SIZE, "--grid", 14, "--width", 8, "--max_steps", steps, "--backbone",
            "efficientnet_lite0", "--batch_size", 4, "--val_every", 3, "--save_every", 2, "--wandb", "off", "--out", folder,
            "--precision", "fp32")


def put(index, number):
    """A change of an array: `number` at `index`."""
    def change(value):
        value[index] = number
        return value
    return change
