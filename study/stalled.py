"""How often the rule of --stop_stalled would have been wrong, and what it would have saved.

    python eval.py --ckpt X --layout position --teleport --zero_rotation --trace --out runs/eval/x
    python -m study.stalled runs/eval/x --decisions 10 20 30 50 --out results/stalled.json

It reads evaluations with --trace that ran to their end, and applies the rule of sim/stalled.py to
each episode afterwards. The rule is wrong where what it would have left out changed the outcome: a
first success, or a first release, came after the step at which it would have ended the episode.
"""

from pathlib import Path

import numpy as np

import flags
from figures.pages import markdown_table
from harness.records import read_episodes
from runtime import UserError, command_line, git_commit, may_replace, run_script, write_json
from sim.stalled import DECISIONS, PERIOD, TOLERANCE, first_stall

REMEDY = "run eval.py with --trace and without --stop_stalled"


def read_traces(folder):
    """An evaluation's episodes -> [(row, states (N,D), steps (N,))] of those that have a trace.
    Raises UserError where there is none, or where the rule has ended some already.
    """
    found = []
    for row in read_episodes(folder):
        path = Path(folder) / "traces" / f"{row['episode']:03d}.npz"
        # crashed episodes have no outcome to be changed; not every episode has a trace
        if "crash" in row or not path.is_file():
            continue
        if "stalled" in row:
            raise UserError(f"{folder}: episode {row['episode']} was ended as stalled; {REMEDY}")
        try:
            with np.load(path) as trace:
                found.append((row, trace["states"], trace["steps"]))
        except Exception as error:  # zipfile, zlib, NumPy and the system each have their own
            raise UserError(f"{path}: no trace of an episode; {REMEDY}") from error
    if not found:
        raise UserError(f"{folder}: has no traces; {REMEDY}")
    return found


def judged(row, states, steps, decisions, tolerance, period):
    """What the rule does to an episode -> None where it never ends it, else {"step" at which it
    does, "saved" control steps, "saved_decisions", "wrong": whether the outcome came later}.

    states (N,D) and steps (N,) are those of the decisions; the rest is as in `first_stall`.
    """
    last = first_stall(states, decisions, tolerance, period)
    if last is None:
        return None
    step = int(steps[last])
    # control steps of the first success and the first release, None where there was none
    reached = [row["first_success"], row.get("first_release")]
    return {
        "step": step,
        "saved": row["steps"] - step,
        "saved_decisions": len(states) - 1 - last,
        "wrong": any(when is not None and when > step for when in reached),
    }


def tally(episodes, decisions, tolerance, period):
    """Episodes of `read_traces` under one rule -> counts and shares, JSON-able."""
    # one verdict an episode, None where the rule leaves it alone
    found = [judged(*episode, decisions, tolerance, period) for episode in episodes]
    ended = [f for f in found if f]
    failed = [row for row, _, _ in episodes if not row["success"]]
    share = lambda part, whole: part / whole if whole else None
    return {
        "decisions": decisions,
        "episodes": len(episodes),
        "failed": len(failed),
        "ended": len(ended),
        "wrong": sum(f["wrong"] for f in ended),
        "wrong_episodes": [
            row["episode"] for (row, _, _), f in zip(episodes, found) if f and f["wrong"]
        ],
        "steps_saved": share(
            sum(f["saved"] for f in ended), sum(row["steps"] for row, _, _ in episodes)
        ),
        "decisions_saved": share(
            sum(f["saved_decisions"] for f in ended), sum(len(s) for _, s, _ in episodes)
        ),
    }


def build_parser():
    parser = flags.Parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="evaluations with --trace")
    parser.add_argument(
        "--decisions",
        nargs="+",
        type=flags.at_least(2),
        default=[DECISIONS],
        help=f"in a row that have to be alike ({DECISIONS})",
    )
    parser.add_argument(
        "--tolerance",
        type=flags.positive,
        default=TOLERANCE,
        help=f"within which they are, metres and radians ({TOLERANCE})",
    )
    parser.add_argument(
        "--period", type=flags.count, default=PERIOD, help=f"states that may take turns ({PERIOD})"
    )
    parser.add_argument("--out", type=flags.new_file(".json"), help="also write the figures here")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    may_replace(args.out, "tolerance", "period", "evaluations")
    read = {folder: read_traces(folder) for folder in args.folders}
    groups = {folder.name: episodes for folder, episodes in read.items()}
    # several evaluations are also judged together
    if len(groups) > 1:
        groups["all"] = [episode for episodes in read.values() for episode in episodes]
    found = {
        name: [tally(episodes, n, args.tolerance, args.period) for n in args.decisions]
        for name, episodes in groups.items()
    }
    percent = lambda share: "-" if share is None else f"{100 * share:.0f}%"
    head = ["evaluation", "alike", "episodes", "failed", "ended", "wrongly", "steps", "decisions"]
    rows = [
        [
            name,
            t["decisions"],
            t["episodes"],
            t["failed"],
            t["ended"],
            t["wrong"],
            percent(t["steps_saved"]),
            percent(t["decisions_saved"]),
        ]
        for name, tallies in found.items()
        for t in tallies
    ]
    print(markdown_table(head, rows))
    if args.out:
        rule = {"tolerance": args.tolerance, "period": args.period}
        write_json(
            args.out,
            {"command": command_line(), "commit": git_commit(), **rule, "evaluations": found},
        )


if __name__ == "__main__":
    run_script(main)
