"""Open-loop rollouts of policies side by side on validation demonstrations: from the first frame
on, own predictions fed back.

    python -m study.openloop --ckpt runs/NAME/checkpoint.safetensors \\
        checkpoints/para_libero_spatial_0.safetensors
    # another file, e.g. one collected with --push_rate 0: no plan covers a push
    python -m study.openloop --ckpt ... --dataset calm.hdf5 --whole

At each decision of a recorded demonstration a policy sees the recorded image and takes its own
previous waypoint for the EEF's position. A policy of several waypoints is also rolled out in
chunks: all of them are used before it looks again. Reported: free-space coverage of the recorded
path by the predicted one, of all its points and of those inside the image, jerk of the waypoints
(mean norm of their second difference, mm) beside the truth's, jitter (the same of their errors:
jerk alone would praise who cuts corners), pixel error. Overlays show truth and predictions from the
first frame on.
"""

from pathlib import Path

from tqdm import tqdm

import flags
from figures import plots
from formats.demos import measured, split_demos
from formats.mixture import open_mixture
from harness.checkpoint import load_policy
from harness.validation import EPS, free_run, rollout_line, rollout_summary, to_pixels
from runtime import UserError, command_line, git_commit, run_script, write_json

# positions of `free_run`, m
POSITIONS = ("predicted", "true", "path")


def roll(demos, policy, fed, label):
    """`free_run` of a policy on each demonstration, with positions in the world's heights."""
    found = []
    for demo in tqdm(demos, desc=f"{label}, {fed}", unit="demo"):
        run = free_run(policy, demo, policy.config, fed)
        lowered = [0.0, 0.0, measured(demo, policy.config.heights).lowered or 0.0]
        found.append({**run, **{name: run[name] + lowered for name in POSITIONS}})
    return found


def build_parser():
    parser = flags.Parser(__doc__)
    parser.add_argument("--ckpt", type=Path, nargs="+", required=True)
    parser.add_argument("--dataset", type=Path, default=Path("data/libero_spatial_0.hdf5"))
    parser.add_argument(
        "--val_fraction",
        type=flags.fraction,
        default=0.15,
        help="as in training, whose held-out demonstrations are used",
    )
    parser.add_argument(
        "--n_demos",
        type=flags.count,
        help="use only the first N demonstrations of the file, as in training",
    )
    parser.add_argument(
        "--whole",
        action="store_true",
        help="use all demonstrations of the file: one that no checkpoint was trained on",
    )
    parser.add_argument(
        "--max_val", type=flags.count, help="at most so many validation demonstrations"
    )
    parser.add_argument("--backbone_weights", type=Path)
    parser.add_argument("--text_weights", type=Path)
    parser.add_argument("--out", type=flags.new_folder, default=Path("runs/openloop"))
    return parser


def held_out_demos(args, image_size):
    """The demonstrations that policies are rolled out on, and the names of their tasks."""
    recordings = open_mixture([args.dataset], image_size, args.n_demos)
    demos = recordings.demos
    if not args.whole:
        demos = split_demos(demos, args.val_fraction)[1]
    return demos[: args.max_val], recordings.tasks


def check_split(args, info, ckpt):
    """Raise UserError for a checkpoint whose training held out others than these flags ask for: it
    has been trained on them.
    """
    typed = info.get("args", {})
    for name in ("val_fraction", "n_demos"):
        theirs, ours = typed.get(name, getattr(args, name)), getattr(args, name)
        if theirs != ours:
            given = f"give --{name} {theirs}" if theirs is not None else f"leave --{name} out"
            raise UserError(
                f"--{name} {ours}: {ckpt} was trained with {theirs}, so that it has seen some of "
                f"the demonstrations that would be held out here; {given}"
            )


def roll_out(policy, info, ckpt, demos):
    """A policy rolled out in every way that it can be -> (rows of the table, {name: rollouts} of
    those that are drawn).
    """
    rows, paths = [], {}
    # how the EEF's position is known: recorded, own waypoint, own after all of a chunk are used
    for fed in ("measured", "predicted", *(["chunk"] if policy.n_waypoints > 1 else [])):
        rollouts = roll(demos, policy, fed, ckpt.stem)
        row = {"checkpoint": str(ckpt), "model_type": info["model_type"], "fed": fed}
        rows.append({**row, **rollout_summary(rollouts)})
        # with recorded positions no path of the policy's own comes about: nothing to draw
        if fed != "measured":
            chunk = f", {policy.n_waypoints} at a time" if fed == "chunk" else ""
            paths[info["model_type"] + chunk] = rollouts
    return rows, paths


def draw(paths, demos, folder):
    """Overlays of the first three demonstrations. paths: {name: rollouts}."""
    # every file of a folder has a demo_0
    several = len({demo.source.fingerprint for demo in demos}) > 1
    for i, demo in enumerate(demos[:3]):
        image = demo.images([0])[0]
        true = to_pixels(next(iter(paths.values()))[i]["path"], demo.K, demo.E)
        lines = {name: rollout_line(r[i]["predicted"], demo) for name, r in paths.items()}
        name = f"{demo.group}_{demo.name}".replace(" ", "_") if several else demo.name
        plots.paths_overlay(image, true, lines, folder / f"rollout_{name}.png")


def print_table(rows):
    """A line a row, in columns."""
    print(
        f"\n{'model':<24}{'fed':<11}{'coverage 4 / 8 / 16 px':<26}{'of points in view':<26}"
        f"{'2nd diff. mm (true)':<20}{'jitter mm':<11}px median / 90%"
    )
    for r in rows:
        near = lambda kind, r=r: " / ".join(f"{r[f'coverage_{e}px{kind}']:.3f}" for e in EPS)
        print(
            f"{r['model_type']:<24}{r['fed']:<11}{near(''):<26}{near('_in_view'):<26}"
            f"{r['jerk_mm']:6.1f} ({r['true_jerk_mm']:.1f}){'':<7}"
            f"{r['jitter_mm']:6.1f}{'':<5}{r['px_median']:.1f} / {r['px_p90']:.1f}"
        )


def main(argv=None):
    args = build_parser().parse_args(argv)
    rows, paths, demos = [], {}, None
    for ckpt in args.ckpt:
        policy, info, _ = load_policy(
            ckpt, "cpu", args.backbone_weights, text_weights=args.text_weights
        )
        size = policy.config.image_size
        if demos is None:
            demos, tasks = held_out_demos(args, size)
        # one set of demonstrations for all checkpoints, so one image size
        elif size != demos[0].image_size:
            raise UserError(
                f"{ckpt}: takes images of {size} px, {args.dataset} has {demos[0].image_size}"
            )
        if not args.whole:
            check_split(args, info, ckpt)
        more, drawn = roll_out(policy, info, ckpt, demos)
        rows += more
        # the same model type may come twice
        paths.update({f"{len(paths) + i}: {n}": r for i, (n, r) in enumerate(drawn.items())})
    draw(paths, demos, args.out)
    table = {
        "command": command_line(),
        "commit": git_commit(),
        "dataset": str(args.dataset),
        "tasks": tasks,
        "rows": rows,
    }
    write_json(args.out / "openloop.json", table)
    print_table(rows)
    print(f"{args.out}/openloop.json, rollout_*.png")


if __name__ == "__main__":
    run_script(main)
