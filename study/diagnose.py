"""Where a policy goes wrong: one-step errors at the decisions of recorded demonstrations, by phase
and by part of the answer.

    # conditions that nothing is trained on
    python collect_demos.py --setting position --part val --out data/position_val.hdf5
    python -m study.diagnose --dataset data/position_val.hdf5 \\
        --ckpt runs/A/checkpoint.safetensors runs/B/checkpoint.safetensors

At each decision a policy sees the recorded image and the recorded EEF. `reach` is until the gripper
closes, `carry` from then on. Reported for each: pixel error, its bias (mean, to the image's right
and down), height error, and the error on the table that the pixel alone makes (at the true height);
how often the gripper's command is right. Written: errors.json, errors.md, errors.png.
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

import flags
from camera import unproject
from figures import plots
from figures.pages import markdown_table
from formats.demos import seen_by
from formats.mixture import open_mixture
from harness.checkpoint import load_policy
from harness.records import run_names
from harness.validation import free_run, to_pixels
from runtime import command_line, git_commit, run_script, write_json

PHASES = ("reach", "carry")


def one_step(policy, demo):
    """Errors of a policy at a demonstration's decisions -> {"phase" (N,) index into PHASES, "at"
    (N,2) px where the waypoint is, "offset" (N,2) px predicted minus true, "height" (N,) m
    likewise, "table" (N,) m, "gripper" (N,) bool right}."""
    demo = seen_by(demo, policy.config)  # as `free_run` answers: its heights, its view
    # fed="measured": every decision starts from the recorded EEF, so that errors do not add up
    run = free_run(policy, demo, policy.config, fed="measured")
    at, predicted = (to_pixels(p, demo.K, demo.E) for p in (run["true"], run["predicted"]))
    # the predicted pixel at the true height: its error on the table is the pixel's alone
    level = unproject(*predicted.T, run["true"][:, 2], demo.K, demo.E)
    closed = demo.actions[:, 6] > 0
    return {
        # the command in force at a decision is that of the step before it
        "phase": closed[np.maximum(run["frames"] - 1, 0)].astype(int),
        "at": at,
        "offset": predicted - at,
        "height": run["predicted"][:, 2] - run["true"][:, 2],
        "table": np.linalg.norm((level - run["true"])[:, :2], axis=-1),
        "gripper": run["gripper"] == closed[run["targets"]],
    }


def phase_row(found, phase):
    """Summary of one phase of errors that `one_step` found, of several demonstrations joined; None
    where the phase has no decision.
    """
    part = found["phase"] == phase
    if not part.any():
        return None
    offset, height, table = (found[k][part] for k in ("offset", "height", "table"))
    # (N,) lengths of the offsets; their mean vector is the bias
    px = np.linalg.norm(offset, axis=-1)
    return {
        "n": int(part.sum()),
        "px_median": float(np.median(px)),
        "px_p90": float(np.percentile(px, 90)),
        "bias_px": offset.mean(0).tolist(),
        "height_cm_median": float(100 * np.median(np.abs(height))),
        "height_cm_p90": float(100 * np.percentile(np.abs(height), 90)),
        "height_cm_bias": float(100 * height.mean()),
        "table_cm_median": float(100 * np.median(table)),
        "table_cm_p90": float(100 * np.percentile(table, 90)),
        "gripper": float(found["gripper"][part].mean()),
    }


def table(rows):
    """Rows {name: {phase: row or None}} as Markdown."""
    head = [
        "policy",
        "phase",
        "decisions",
        "px, median / 90%",
        "bias right, down, px",
        "height, cm, median / 90% (bias)",
        "on the table, cm, median / 90%",
        "gripper right",
    ]
    lines = []
    for name, phases in rows.items():
        for phase, r in phases.items():
            if not r:
                continue
            height = f"{r['height_cm_median']:.2f} / {r['height_cm_p90']:.2f}"
            lines.append(
                [
                    name,
                    phase,
                    str(r["n"]),
                    f"{r['px_median']:.1f} / {r['px_p90']:.1f}",
                    "{:+.1f}, {:+.1f}".format(*r["bias_px"]),
                    f"{height} ({r['height_cm_bias']:+.2f})",
                    f"{r['table_cm_median']:.2f} / {r['table_cm_p90']:.2f}",
                    f"{100 * r['gripper']:.0f}%",
                ]
            )
    return markdown_table(head, lines)


def build_parser():
    parser = flags.Parser(__doc__)
    parser.add_argument("--ckpt", type=Path, nargs="+", required=True)
    parser.add_argument(
        "--dataset",
        type=Path,
        required=True,
        help="demonstrations of conditions that nothing was trained on",
    )
    parser.add_argument("--n_demos", type=flags.count, help="use only the first N demonstrations")
    parser.add_argument("--backbone_weights", type=Path)
    parser.add_argument("--text_weights", type=Path)
    parser.add_argument("--out", type=flags.new_folder, default=Path("runs/diagnosis"))
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    found, rows, image = {}, {}, None
    for name, ckpt in zip(run_names(args.ckpt), args.ckpt):
        policy, _, _ = load_policy(
            ckpt, "cpu", args.backbone_weights, text_weights=args.text_weights
        )
        recordings = open_mixture([args.dataset], policy.config.image_size, args.n_demos)
        demos, attributes = recordings.demos, recordings.attributes
        each = [one_step(policy, demo) for demo in tqdm(demos, desc=name, unit="demo")]
        found[name] = {k: np.concatenate([e[k] for e in each]) for k in each[0]}
        rows[name] = {phase: phase_row(found[name], i) for i, phase in enumerate(PHASES)}
        # the first demonstration's first frame, for errors.png
        image = demos[0].images([0])[0] if image is None else image
    plots.error_maps(image, found, PHASES, args.out / "errors.png")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "errors.md").write_text(table(rows) + "\n")
    write_json(
        args.out / "errors.json",
        {
            "command": command_line(),
            "commit": git_commit(),
            "dataset": str(args.dataset),
            "n_demos": len(demos),
            "setting": str(attributes.get("setting")),
            "part": str(attributes.get("part")),
            "rows": rows,
        },
    )
    print(table(rows))
    print(f"{args.out}: errors.json, errors.md, errors.png")


if __name__ == "__main__":
    run_script(main)
