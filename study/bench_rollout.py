"""Episodes an hour: our loop beside robosuite's own loop with a render a control step, as LeRobot's
evaluation of LIBERO does it.

The same policy decides the same episodes in each, alternating on the same workers, so that paths,
steps and outcomes are equal and the cost alone differs.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from figures.pages import markdown_table
from harness.records import newest_checkpoint, read_episodes
from runtime import UserError
from sim import settings
from sim.cameras import RENDERS
from sim.decisions import Decider, RemoteAgent
from sim.layouts import LAYOUTS, episode_state
from sim.libero_env import Scene
from sim.rollout import run_episode
from sim.simulator import simulator
from sim.workers import run_jobs

THEIRS = "robosuite's, a render a step"
LOOPS = {  # name -> (physics and render of Scene, whether every control step is rendered)
    "ours": ("lean", "exact", False),
    # for cost alone: a policy that was trained on exact images may decide otherwise
    "ours, fast render": ("lean", "fast", False),
    "ours, robosuite's physics": ("robosuite", "exact", False),
    THEIRS: ("robosuite", "exact", True),
}
# whole evaluations that are compared
OURS, FAST, OTHER = "this commit", "this commit, fast render", "the other"
STEPS = 280  # of an episode at most, as published evaluations of LIBERO-Spatial
PARTS = ("physics", "render", "features", "policy", "rest", "layout")


class MeasuredScene(Scene):
    """A Scene that books its own steps and renders, and renders every step where it is told to."""

    each_step, seconds = False, None  # None: while it is built, nothing is booked

    def begin(self, physics, each_step):
        """Step and render so from here on, with the account at zero."""
        # a swap of the stepping loop alone: model and state stay
        self.use_physics(physics)
        # LIBERO's own environment computes its observations at every step, and all are wanted there
        for observable in self.env.env._observables.values():
            observable.set_enabled(each_step)
        self.each_step, self.seconds, self.counts = each_step, defaultdict(float), defaultdict(int)

    def step(self, action):
        self._book("physics", lambda: super(MeasuredScene, self).step(action))
        if self.each_step:
            self.render()

    def render(self):
        return self._book("render", super().render)

    # adds the seconds and the calls of `call` to the account
    def _book(self, name, call):
        if self.seconds is None:
            return call()
        start = time.perf_counter()
        result = call()
        self.seconds[name] += time.perf_counter() - start
        self.counts[name] += 1
        return result


class RolloutWorker:
    """A job is (loop, episode) -> its account. config: of the policy; steps: of an episode."""

    def __init__(self, layout, config, steps, address):
        start = time.perf_counter()
        setting = LAYOUTS[layout].setting
        self.layout, self.stride, self.steps = layout, config["waypoint_stride"], steps
        clean = settings.clean_by_default(setting)
        # a scene for each render, built once for all jobs; `built` tells its seconds apart
        self.scenes = {
            render: MeasuredScene(image_size=config["image_size"], clean=clean, render=render)
            for render in RENDERS
        }
        self.agent, self.built = RemoteAgent(address), time.perf_counter() - start

    def run(self, job):
        loop, index = job
        physics, render, each_step = LOOPS[loop]
        scene = self.scenes[render]
        scene.begin(physics, False)  # to place the objects is no part of the loop
        start, cpu = time.perf_counter(), time.process_time()
        state, _ = episode_state(scene, self.layout, index)
        placed = time.perf_counter()
        scene.begin(physics, each_step)  # a random layout rebuilds the model
        row, _, _ = run_episode(
            scene, self.agent, state, max_steps=self.steps, waypoint_stride=self.stride
        )
        whole = time.perf_counter() - start
        # `rest` is what nobody booked, messages to the network among it
        parts = {**scene.seconds, **self.agent.seconds, "layout": placed - start}
        parts["rest"] = whole - sum(parts.values())
        return {
            "seconds": parts,
            "wall": whole,
            "cpu": time.process_time() - cpu,
            "built": self.built,
            "counts": dict(scene.counts),
            "outcome": [row[k] for k in ("outcome", "steps", "decisions", "first_success")],
        }

    def close(self):
        for scene in self.scenes.values():
            scene.close()


def bench_rollout(args):
    """Tables by number of workers: of the loops, or with --against of whole evaluations beside
    those of another checkout.
    """
    if args.ckpt is None:
        args.ckpt, sentence = newest_checkpoint()
        print(sentence)
    n = args.episodes or 4
    found = {
        "title": "rollout",
        "checkpoint": args.ckpt.name,
        "layout": args.layout,
        "episodes": n,
        "max_steps": STEPS,
        "device": args.device,
        "simulator": simulator(),
    }
    if args.against:
        return found | {"against": [against(args, n, workers) for workers in args.workers]}
    return found | {"loops": [loops(args, n, workers) for workers in args.workers]}


def loops(args, n, workers, steps=STEPS):
    """n episodes in each loop, on so many workers -> the table, JSON-able."""
    start = time.perf_counter()
    # theirs is what the others are compared with
    chosen = [loop for loop in LOOPS if loop == THEIRS or loop in (args.loops or LOOPS)]
    # one process holds the network; the workers send it observations
    with Decider(_policy, (args.ckpt, args.device)) as network:
        loaded, config = time.perf_counter() - start, network.about["config"]
        # a round is as many episodes as there are workers: at a time they run the same loop
        rounds = [range(i, min(i + workers, n)) for i in range(0, n, workers)]
        jobs = [(loop, i) for chunk in rounds for loop in chosen for i in chunk]
        made_of = (args.layout, config, steps, network.address)
        # recycle is beyond the number of jobs: no worker is replaced, and none builds its scenes
        # twice
        outcomes = list(run_jobs(jobs, RolloutWorker, made_of, workers, recycle=len(jobs) + 1))
    if broken := [o.error for o in outcomes if o.error]:
        raise UserError(f"an episode failed: {broken[0].strip().splitlines()[-1]}")
    by_loop = {loop: [o.result for o in outcomes if o.job[0] == loop] for loop in chosen}
    paths = {
        loop: {o.job[1]: o.result["outcome"] for o in outcomes if o.job[0] == loop}
        for loop in chosen
    }
    # compared are rates by the clock, and CPU time, which other programs disturb less
    table = {loop: account(rows, workers) for loop, rows in by_loop.items()}
    slowest = table[THEIRS]
    for cell in table.values():
        cell["ratio"] = cell["episodes_an_hour"] / slowest["episodes_an_hour"]
        cell["cpu_ratio"] = slowest["cpu"] / cell["cpu"]
    found = {
        "workers": workers,
        "set_up": {
            "network": loaded,
            "scene": float(np.mean([o.result["built"] for o in outcomes])),
        },
        # the fast render changes images and so may change decisions; the exact loops must agree
        "equal_outcomes": all(
            paths[loop] == paths[THEIRS] for loop in chosen if LOOPS[loop][1] == "exact"
        ),
        "outcomes": paths,
        "table": table,
    }
    show(found)
    return found


def _policy(path, device):
    """The one process with torch: the checkpoint's sessions on a device."""
    from harness.sessions import PolicySessions

    return PolicySessions.load(path, device)


def account(rows, workers):
    """Episodes of one loop -> means, and what an hour holds."""
    mean = lambda values: float(np.mean(list(values)))
    seconds = {part: mean(r["seconds"].get(part, 0.0) for r in rows) for part in PARTS}
    # seconds of one step or one render: all seconds over all calls
    each = lambda part: (
        sum(r["seconds"].get(part, 0.0) for r in rows)
        / max(1, sum(r["counts"].get(part, 0) for r in rows))
    )
    return {
        "episodes_an_hour": 3600 * workers / mean(r["wall"] for r in rows),
        "wall": mean(r["wall"] for r in rows),
        "cpu": mean(r["cpu"] + r["seconds"]["features"] + r["seconds"]["policy"] for r in rows),
        "seconds": seconds,
        "ms_a_step": 1000 * each("physics"),
        "ms_a_render": 1000 * each("render"),
        "renders": mean(r["counts"].get("render", 0) for r in rows),
        "steps": mean(r["outcome"][1] for r in rows),
    }


def show(found):
    """Print one table of `loops`."""
    print(f"\n{found['workers']} worker(s); set-up, once: {rounded(found['set_up'])} s")
    print(f"equal outcomes of the loops with the exact render: {found['equal_outcomes']}")
    head = ["loop", "episodes an hour", "ratio", "CPU ratio", "ms a step", "ms a render", "renders"]
    head += [f"{part}, s" for part in PARTS]
    rows = [
        [
            name,
            f"{cell['episodes_an_hour']:.0f}",
            f"{cell['ratio']:.2f}",
            f"{cell['cpu_ratio']:.2f}",
            f"{cell['ms_a_step']:.1f}",
            f"{cell['ms_a_render']:.0f}",
            f"{cell['renders']:.0f}",
            *(f"{cell['seconds'][part]:.2f}" for part in PARTS),
        ]
        for name, cell in found["table"].items()
    ]
    print(markdown_table(head, rows))


def rounded(numbers):
    return ", ".join(f"{name} {value:.2f}" for name, value in numbers.items())


# -- against another checkout ---------------------------------------------------------------------


def against(args, n, workers):
    """Whole evaluations of n episodes, ours and another checkout's in turn, twice each -> means."""
    here = Path(__file__).resolve().parents[1]
    for checkout in (here, args.against):
        if not (checkout / "eval.py").is_file():
            raise UserError(
                f"--against {args.against}: no checkout of this repository, it has no eval.py"
            )
    kinds = {OURS: (here, args.ckpt), OTHER: (args.against, args.ckpt)}
    if args.fast_ckpt:
        kinds[FAST] = (here, args.fast_ckpt)
    runs = {name: [] for name in kinds}
    # in turn, A B A B: a slow spell of the machine hits both
    for _ in range(2):
        for name, (checkout, ckpt) in kinds.items():
            runs[name].append(evaluated(args, checkout, ckpt, n, workers))
    found = {name: averaged(rows) for name, rows in runs.items()}
    ratios = {name: ratio(found[name], found[OTHER]) for name in kinds if name != OTHER}
    commit = ["git", "-C", str(args.against), "rev-parse", "--short=10", "HEAD"]
    other = subprocess.run(commit, capture_output=True, text=True).stdout.strip()
    for name, numbers in ratios.items():
        print(f"\n{name} against {other}, {workers} worker(s): {rounded(numbers)} times")
        print(f"seconds an episode: {rounded(found[name]['seconds'])}")
    print(f"\n{OTHER}, seconds an episode: {rounded(found[OTHER]['seconds'])}")
    return found | {
        "workers": workers,
        "other_commit": other,
        "equal_outcomes": runs[OURS][0]["rows"] == runs[OTHER][0]["rows"],
        # summation runs in another order than it did: paths differ where success does not
        "equal_successes": runs[OURS][0]["successes"] == runs[OTHER][0]["successes"],
        "ratio": ratios,
        "runs": runs,
    }


def averaged(runs):
    """Several runs of `evaluated` -> their mean numbers."""
    mean = lambda values: float(np.mean(values))
    numbers = {key: mean([r[key] for r in runs]) for key in ("wall", "cpu", "episodes_an_hour")}
    parts = runs[0]["seconds"]
    return numbers | {"seconds": {p: mean([run["seconds"][p] for run in runs]) for p in parts}}


def ratio(ours, theirs):
    """How many times faster `ours` is, from two results of `averaged`."""
    return {
        "episodes_an_hour": ours["episodes_an_hour"] / theirs["episodes_an_hour"],
        "whole_command": theirs["wall"] / ours["wall"],
        "cpu": theirs["cpu"] / ours["cpu"],
    }


def evaluated(args, checkout, ckpt, n, workers):
    """One evaluation of a checkout, in a folder of its own, so that nothing is cached."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, checkout / "eval.py", "--ckpt", ckpt.resolve()]
        command += ["--teleport", "--zero_rotation", "--max_steps", STEPS, "--layout", args.layout]
        command += ["--n_episodes", n, "--n_videos", 0, "--workers", workers, "--device", "cpu"]
        command += ["--out", Path(folder) / "cell"]
        # CPU seconds of children that have ended, their own children among them
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            list(map(str, command)),
            cwd=folder,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(checkout)},
        )
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise UserError(f"{checkout}: its evaluation failed: {done.stderr.strip()[-300:]}")
        rows = sorted(read_episodes(Path(folder) / "cell"), key=lambda row: row["episode"])
    # an episode's own seconds, without process start and loading
    seconds = {p: float(np.mean([r["seconds"][p] for r in rows])) for p in rows[0]["seconds"]}
    return {
        "wall": wall,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "episodes_an_hour": 3600 * workers / seconds["total"],
        "seconds": seconds,
        "rows": [
            [row[k] for k in ("episode", "outcome", "steps", "first_success")] for row in rows
        ],
        "successes": [row["episode"] for row in rows if row["success"]],
    }
