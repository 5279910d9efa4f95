"""What an evaluation says as a whole, of its episodes: summary.json, and what a user reads."""

from collections import Counter

import numpy as np

from harness.metrics import EARLY, ERROR, LIFT_OUTCOMES, OUTCOMES, within
from harness.records import scored_rows
from harness.statistics import wilson
from runtime import command_line, git_commit

PIXELS = (4, 8, 16)  # distances at which a path counts as near another
# what a cell says of its policy's training
TRAINED = (
    "command",
    "commit",
    "seed",
    "step",
    "minutes",
    "train_demos",
    "backbone_identity",
)


def place_of(args):
    """Name of what eval.py's flags test in: a layout, or a kind of LIBERO-Plus's variants."""
    return f"plus_{args.plus}" if args.plus else args.layout


def summarise(rows, args, info):
    """Per-episode rows -> the summary of an evaluation.

    args: of eval.py; info: of the checkpoint, or {} where no checkpoint acts.
    """
    scored = scored_rows(rows)
    n, lifting = len(scored), args.variant == "lift_once"
    outcomes = (*(LIFT_OUTCOMES if lifting else OUTCOMES), ERROR)
    # episodes that --stop_stalled ended, and how often the bowl was lifted (lift_once)
    stalled = sum("stalled" in r for r in scored)
    lifts = dict(sorted(Counter(r["lifts"] for r in scored).items())) if lifting else {}
    return {
        "model_type": info.get("model_type", args.policy),
        "policy": args.policy,
        "variant": args.variant,
        "setting": f"{args.layout}, {args.variant}" if lifting else place_of(args),
        "split": args.split,
        "clean_scene": args.clean_scene,
        "task_suite": args.task_suite,
        "task_id": args.task_id,
        "n": n,
        "crashes": len(rows) - n,
        "max_steps": args.max_steps,
        **rates(scored),
        "outcomes": {o: sum(r["outcome"] == o for r in scored) for o in outcomes},
        **({"lifts": lifts} if lifting else {}),
        **({"stop_stalled": True, "stalled": stalled} if args.stop_stalled else {}),
        **told(scored),
        **means(scored),
        "workers": args.workers,
        "seed": args.seed,
        "command": command_line(),
        "commit": git_commit(),
        "checkpoint": str(args.ckpt) if args.ckpt else None,
        "trained": {k: info.get(k) for k in TRAINED} if info else None,
    }


def told(scored):
    """Of episodes that were told of an object: how many went to it, with the Wilson interval; {}
    for others. An episode went to what it lifted first, or touched first where it lifted nothing.
    """
    rows = [r for r in scored if r.get("named")]
    if not rows:
        return {}
    went = sum((r["first_lifted"] or r["first_touched"]) == r["named"] for r in rows)
    return {
        "instruction": rows[0]["instruction"],
        "went_to_named": went,
        "went_to_named_rate": went / len(rows),
        "went_to_named_interval": wilson(went, len(rows)),
    }


def rates(scored):
    """Rates of success and release of scored episodes, each with its Wilson interval.

    At the end of the episodes, and within EARLY steps.
    """
    n, found = len(scored), {}
    # at the end of the episode, and within the steps of published rates
    for steps in (None, EARLY):
        for key in ("success", "released"):
            reached = sum(within(r, key, steps) for r in scored)
            name = key if steps is None else f"{key}_{steps}"
            # summary.json names the interval of success alone "interval"
            interval = "interval" if name == "success" else f"{name}_interval"
            found[f"{name}_rate"] = reached / n if n else None
            found[interval] = wilson(reached, n)
    return found


def means(scored):
    """Mean numbers of scored episodes, None where no episode has them."""

    def mean(key):
        values = [r[key] for r in scored if r.get(key) is not None]
        return round(float(np.mean(values)), 4) if values else None

    near = [f"{name}_{px}px" for name in ("coverage", "on_path") for px in PIXELS]
    # "mean_steps" is the mean of each row's "steps"; the others have one name in both
    names = ["mean_steps", "jerk_mm", "third_difference_mm", *near, "path_length_ratio"]
    # by activity: "features", "policy", "total" ...
    seconds = {
        k: round(float(np.mean([r["seconds"][k] for r in scored])), 3)
        for k in (scored[0]["seconds"] if scored else ())
    }
    return {
        **{name: mean(name.removeprefix("mean_")) for name in names},
        "seconds_per_episode": seconds or None,
    }


def print_summary(s):
    """The summary as a user reads it."""
    crashed = f", {s['crashes']} crashed and not scored" if s["crashes"] else ""
    errors = s["outcomes"][ERROR]
    failed = f", {errors} failed by an error of the policy" if errors else ""
    task = f"{s['task_suite']} task {s['task_id']}, {s['setting']} layout"
    print(f"\n{s['model_type']} on {task}, n = {s['n']}{crashed}{failed}")
    if not s["n"]:
        return
    listed = lambda pairs: ", ".join(pairs)
    if s["variant"] == "lift_once":
        show("lifted once, then stayed out", percent(s["success_rate"], s["interval"]))
        show("lifts in an episode", listed(f"{k} in {v}" for k, v in s["lifts"].items()))
    else:
        show_rate(s, "success (LIBERO's predicate)", "success", "interval")
        show_rate(s, "placed and released", "released", "released_interval")
    if "went_to_named" in s:
        went = percent(s["went_to_named_rate"], s["went_to_named_interval"])
        show("went to the named object", f"{went}, told {s['instruction']!r}")
    show("outcomes", listed(f"{k} {v}" for k, v in s["outcomes"].items()))
    if s.get("stop_stalled"):
        show("stalled, ended as failures", s["stalled"])
    print(
        f"  steps {s['mean_steps']:.0f}, "
        f"jerk (mean second difference of the path) {s['jerk_mm']:.3f} mm/step^2, "
        f"mean third difference {s['third_difference_mm']:.3f} mm/step^3"
    )
    # only where an expert's path was there to compare with
    if s["path_length_ratio"] is not None:
        near = lambda name: listed(f"{s[f'{name}_{px}px']:.3f} at {px} px" for px in PIXELS)
        print(
            f"  of the expert's path near the executed one {near('coverage')}; "
            f"of the executed path near the expert's {near('on_path')}; "
            f"{s['path_length_ratio']:.2f} times as long"
        )
    seconds = s["seconds_per_episode"]
    show("seconds per episode", listed(f"{k} {v:.2f}" for k, v in seconds.items()))


def show(name, value):
    print(f"  {name:<30}{value}")


def show_rate(s, name, key, interval):
    """One rate of a summary: within EARLY steps, and at the end."""
    early = percent(s[f"{key}_{EARLY}_rate"], s[f"{key}_{EARLY}_interval"])
    late = percent(s[f"{key}_rate"], s[interval])
    show(name, f"{early} in {EARLY} steps, {late} in {s['max_steps']}")


def percent(rate, interval):
    low, high = interval
    return f"{100 * rate:.1f}% (95% {100 * low:.0f}-{100 * high:.0f}%)"
