"""Steps a second of every policy, as train.py takes them, here and in another checkout."""

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from registry import REGISTRY
from runtime import UserError

ROOT = Path(__file__).resolve().parents[1]
PORTION = 4  # steps between two turns


class PacedTraining:
    """A training of `checkout` that goes on for PORTION steps at a time."""

    def __init__(self, checkout, model_type, args, folder):
        self.log = Path(folder) / "log"
        command = [
            *(sys.executable, ROOT / "study" / "paced.py", str(PORTION), "train.py"),
            *("--model_type", model_type, "--preset", args.preset, "--dataset", args.dataset),
            *("--cache", args.cache, "--out", Path(folder) / "run", "--device", args.device),
            # no validation and no checkpoint falls into what is measured
            *("--val_every", "1000000", "--save_every", "1000000", "--wandb", "off"),
        ]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                cwd=checkout,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def line(self):
        """The next line that the training reports. Raises UserError where it has ended instead."""
        found = self.process.stdout.readline()
        if not found:
            said = self.log.read_text().strip().splitlines()
            raise UserError(f"a training ended before it was measured: {' '.join(said[-1:])}")
        return found

    def portion(self):
        """PORTION steps on -> their {"wall_s", "cpu_s"}."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return json.loads(self.line())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


def rates(seconds):
    """Steps a second of portions -> {"median", "low", "high"}: the quartiles are the spread."""
    # long portions give low rates: percentiles of the rates, not of the seconds
    low, median, high = np.percentile(PORTION / np.array(seconds), [25, 50, 75])
    return {"median": round(median, 3), "low": round(low, 3), "high": round(high, 3)}


def measure(model_type, checkouts, args):
    """{name: {"wall", "cpu"}} rates of checkouts, which take turns; {name: folder}."""
    found = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        trainings = {}
        for name, checkout in checkouts.items():
            folder = Path(scratch) / name
            folder.mkdir()
            training = PacedTraining(checkout, model_type, args, folder)
            trainings[name] = stack.enter_context(training)
            training.line()  # it is ready; no other computes meanwhile
        for _ in range(args.rounds):
            for name, training in trainings.items():
                found[name].append(training.portion())
    return {
        name: {kind: rates([row[f"{kind}_s"] for row in rows]) for kind in ("wall", "cpu")}
        for name, rows in found.items()
    }


def bench_train(args):
    """Print and return steps a second by policy; beside those of --against and the ratio."""
    if not args.dataset.exists():
        raise UserError(f"--dataset {args.dataset}: no such file; collect_demos.py makes one")
    args.dataset, args.cache = args.dataset.resolve(), args.cache.resolve()
    checkouts = {"here": ROOT}
    if args.against:
        if not (args.against / "train.py").is_file():
            raise UserError(f"--against {args.against}: holds no train.py, so this is no checkout")
        checkouts["against"] = args.against.resolve()
    rows = {}
    print(f"steps a second, preset {args.preset}: median (quartiles) by the clock, and by CPU time")
    for model_type in args.models or list(REGISTRY):
        row = rows[model_type] = measure(model_type, checkouts, args)
        for name, found in row.items():
            wall, cpu = found["wall"], found["cpu"]
            print(
                f"  {model_type:<22}{name:<9}{wall['median']:8.2f} "
                f"({wall['low']:.2f} to {wall['high']:.2f}), CPU {cpu['median']:.2f}",
                flush=True,
            )
        if args.against:
            ratios = [
                row["here"][k]["median"] / row["against"][k]["median"] for k in ("wall", "cpu")
            ]
            print(f"  {'':<22}ratio    {ratios[0]:8.2f}, CPU {ratios[1]:.2f}", flush=True)
    return {"title": "training", "unit": "steps a second", "preset": args.preset, "rows": rows}
