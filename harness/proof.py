"""Proof by the simulator, in a process of its own, that a training's pictures are what they should
be: it imports much, and draws NumPy's random numbers.
"""

import subprocess
import sys
from pathlib import Path

from runtime import UserError

ROOT = Path(__file__).resolve().parent.parent


def prove_pictures(datasets, task=None, n_demos=None):
    """Compare the pictures of LeRobot datasets among `datasets` with the simulator's, where there
    is one, and print what was found. task, n_demos: as of `formats.dataset.open_dataset`.

    Raises UserError where they contradict the recorded positions, or the simulator fails.
    """
    for dataset in (d for d in datasets if d.format == "lerobot"):
        asked = {"--task": task, "--n_demos": n_demos, "--image_size": dataset.image_size}
        words = [str(w) for pair in asked.items() if pair[1] is not None for w in pair]
        command = [sys.executable, "-m", "sim.picture_proof", dataset.path.resolve(), *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        print(done.stdout, end="")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise UserError(f"{last.removeprefix('error: ')}; --trust_pictures trains all the same")
