"""v7 against the new rotation head, and the new one with y/x embeddings: same data, same steps,
several seeds, held-out episodes.

    python -m study.compare_rotation --dataset data/rim.hdf5 --seeds 3 --max_steps 500 \\
        --out results/rotation
    python -m study.compare_rotation --run v7=runs/v7_0 --run v7=runs/v7_1 \\
        --run new=runs/new_0 --run new=runs/new_1

The first trains what is not trained yet (further flags go to train.py as they are), in
RUNS/NAME_SEED, and then compares; after a kill the same command goes on. The second compares
finished runs: each --run is NAME=FOLDER, runs of one name are its seeds. Written are summary.json,
the tables as table.md, and PNGs; rotations are drawn on the axis of the dataset's
rotation_pca_basis.npz.
"""

import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

import flags
from data import waypoint_labels
from figures import plots_rotation
from figures.pages import markdown_table
from formats.demos import seen_by, split_demos
from formats.mixture import open_mixture
from harness.checkpoint import load_policy
from harness.records import read_metrics
from harness.validation import decision_frames, to_pixels
from rot_utils import basis_path, load_basis, rotation_angle, rotvec_to_matrix
from runtime import UserError, command_line, git_commit, read_json, run_script, versions, write_json

# flags of train.py for each configuration; v7 is the head before the rotation basis
CELLS = {
    "v7": [
        "--tf_layers",
        "2",
        "--token_enc",
        "learned",
        "--rotation",
        "euler",
        "--n_rot_bins",
        "32",
    ],
    "new": [],
    "new_yx": ["--yx_embedding"],
}
METRICS = {
    "val/rotation_ce": "rotation CE above the labels' entropy, nats an angle",
    "val/top1_pixel": "top-1 pixel",
    "val/top1_height": "height",
    "val/top1_gripper": "gripper",
    "val/top1_rotation": "rotation",
    "val/top1_joint": "joint",
    "val/rotation_deg_all_median": "rotation error, deg, median",
    "val/rotation_deg_all_p95": "95%",
    "val/cm_median": "position error, cm, median",
}
AXIS_M = 0.05  # half of the drawn closing direction


# -- training -------------------------------------------------------------------------------------


def script(name, *arguments):
    """Run another script of the repository. Raises UserError where it fails."""
    code = subprocess.run(
        [sys.executable, (Path(__file__).resolve().parents[1] / name), *map(str, arguments)]
    ).returncode
    if code:
        raise UserError(
            f"{name} ended with exit code {code}; what it wrote stays, the same command goes on"
        )


def train_flags(args, name, seed, further):
    """What train.py gets for one configuration and seed."""
    return [
        "--model_type",
        "dino_volume_kv_full",
        "--dataset",
        str(args.dataset),
        "--seed",
        str(seed),
        "--max_steps",
        str(args.max_steps),
        "--out",
        str(args.runs / f"{name}_{seed}"),
        *CELLS[name],
        *further,
    ]


def train_cells(args, further):
    """Train every cell and seed that is not finished -> ["NAME=FOLDER"]."""
    runs = []
    if not basis_path(args.dataset).exists():
        # the new head turns about the principal axis that this file names
        script("precompute_rotation_pca.py", "--dataset", args.dataset)
    # all configurations with one seed, then the next: a killed run has whole comparisons
    for seed in range(args.seeds):
        for name in CELLS:
            folder, flags = args.runs / f"{name}_{seed}", train_flags(args, name, seed, further)
            runs.append(f"{name}={folder}")
            if not (folder / "config.json").exists():
                script("train.py", *flags)
            else:
                # a started run: of these flags, and finished now or resumed
                refuse_other_flags(folder, flags)
                if not finished(folder):
                    script("train.py", "--resume", folder)
            # a signal ends train.py with exit code 0 after it has saved
            if not finished(folder):
                raise UserError(f"{folder}: was stopped before its end; the same command goes on")
    return runs


def refuse_other_flags(folder, flags):
    """Raise UserError for a run that was trained with other flags."""
    form = {"argv": [str]}
    made = read_json(folder / "config.json", "run of train.py", form=form)["argv"]
    if made != flags:
        raise UserError(
            f"{folder}: was trained with `{' '.join(made)}`, asked for is `{' '.join(flags)}`; "
            "give another --runs"
        )


def finished(folder):
    """True if train.py has come to its end: it draws the curve last."""
    return (folder / "loss.png").exists()


# -- what is measured -----------------------------------------------------------------------------


@torch.inference_mode()
def episode_predictions(policy, maps, demo, batch_size=16):
    """A policy's answers at every frame of an episode, from its features [(N,C,H,W)] -> {"position"
    (N,3), "gripper" (N,), "rotation" (N,3,3)} of the first waypoint, and "logits" (N,T,A,bins)."""
    found = defaultdict(list)
    for start in range(0, len(demo), batch_size):
        part = slice(start, min(start + batch_size, len(demo)))
        n = part.stop - start
        # two fingers, measured from the middle with opposite signs: m between them
        width = np.abs(demo.gripper_states[part]).sum(-1)
        out = policy.predict(
            {
                "features": [m[part] for m in maps],
                "eef_pos": torch.from_numpy(demo.ee_pos[part]),
                "gripper_width": torch.from_numpy(width),
                "K": torch.from_numpy(demo.K).expand(n, 3, 3),
                "E": torch.from_numpy(demo.E).expand(n, 4, 4),
                **{k: v.expand(n, -1) for k, v in policy.instructed(demo.instruction).items()},
            }
        )
        for key in ("position", "gripper", "rotation"):
            # (n,T,...) -> the first waypoint alone, which is the one that is executed
            found[key].append(out[key][:, 0].numpy())
        found["logits"].append(out["rotation_logits"].numpy())
    return {k: np.concatenate(v) for k, v in found.items()}


def executed(gripper, demo, config):
    """Commands (N,) answered at every frame -> those that a robot would execute: (commands of the
    decisions (M,), the same held over the frames (N,)).

    A robot decides where the demonstration's waypoints are reached. It holds a command until its
    next decision.
    """
    frames, _ = decision_frames(demo, config)
    decided = gripper[frames]
    # each decision's command up to the frame of the next decision, (M,) -> (N,)
    return decided, np.repeat(decided, np.diff([*frames, len(gripper)]))


def bin_widths(policy):
    """Degrees (A,) that a bin of each angle spans."""
    stats = policy.rotation_stats()
    ranges = np.array(
        [[stats["basis"]["low"], stats["basis"]["high"]]]
        if stats["kind"] == "pca"
        else stats["euler_range"]
    )
    return np.degrees(ranges[:, 1] - ranges[:, 0]) / stats["n_bins"]


def rotation_nats(policy, logits, rotation):
    """Logits (N,A,bins) at true rotations (N,3,3) -> two measures that do not depend on how many
    angles and bins there are, (N,) each.

    whole: cross-entropies above the labels' entropy, summed over the angles. density: -ln of the
    probability per degree at the truth, for the angle with the widest range alone. Angles that
    span few degrees are easy, and do not count in it.
    """
    # (N,A,bins) log probabilities; (A,) degrees a bin
    log_share, widths = torch.from_numpy(logits).double().log_softmax(-1), bin_widths(policy)
    turning, rotation = int(widths.argmax()), torch.from_numpy(rotation)
    # rotation_loss is a mean over the angles: times their number it is the sum
    whole = policy.rotation_loss(torch.from_numpy(logits), rotation) * len(widths)
    bins = policy.rotation_bins(rotation)[:, turning]
    # a bin's probability over its width is a density per degree
    return whole.numpy(), np.log(widths[turning]) - log_share[
        torch.arange(len(bins)), turning, bins
    ].numpy()


def transitions(gripper):
    """(closes, opens) of commands (N,) in {0, 1}."""
    change = np.diff(gripper)
    return int((change > 0).sum()), int((change < 0).sum())


def unsteadiness(rotation):
    """Mean angle between the rotations (N,3,3) of one frame and the next, degrees."""
    return float(np.degrees(rotation_angle(rotation[1:], rotation[:-1])).mean())


def guess_nats(targets):
    """Score of a guesser who only knows how often each bin occurs: nats an angle above the entropy
    of the labels (N,A,bins).
    """
    targets = torch.as_tensor(targets).double()
    # the guesser answers the mean distribution at every frame
    mean = targets.mean(0, keepdim=True).expand_as(targets)
    return float(
        torch.nn.functional.kl_div(mean.log(), targets, reduction="none")
        # 0 log 0 is 0; torch says NaN where the guesser's share is 0 too
        .nan_to_num(0.0)
        .sum(-1)
        .mean()
    )


def labels(demo, config):
    """(target (N,T) frames, gripper (N,T), mask (N,T), usable (N,)) of a demonstration, the retreat
    left out as in training.
    """
    return waypoint_labels(
        demo, config.waypoint_stride, config.n_window, config.retreat, config.min_travel
    )


def training_record(folder):
    """The last validation row of a run, and its rotation cross-entropies [(step, nats)]."""
    rows = [r for r in read_metrics(folder) if "val/rotation_ce" in r]
    if not rows:
        raise UserError(
            f"{folder}: metrics.jsonl has no validation of a volume policy; "
            "give a folder of a finished train.py run"
        )
    return rows[-1], [(r["step"], r["val/rotation_ce"]) for r in rows]


def held_out(info, policy):
    """The demonstrations that a run has held out for validation, as its policy sees them."""
    args = info["args"]
    demos = open_mixture([args["dataset"]], policy.config.image_size, args.get("n_demos")).demos
    held = split_demos(demos, args["val_fraction"])[1]
    return [seen_by(demo, policy.config) for demo in held]


def measure(policy, demos, features):
    """What one run does on held-out episodes -> (row, [predictions an episode])."""
    c, row, found = policy.config, defaultdict(list), []
    for demo, maps in zip(demos, features):
        target, _, mask, usable = labels(demo, c)
        found.append(episode_predictions(policy, maps, demo))
        # up to the last frame that training uses; (N,3,3) rotation of each first waypoint
        last, true = np.flatnonzero(usable)[-1] + 1, rotvec_to_matrix(demo.ee_ori)[target[:, 0]]
        gripper = found[-1]["gripper"]
        # gripper changes at every frame, and at the decisions that a robot would take
        for kind, commands in (("", gripper[:last]), ("executed_", executed(gripper, demo, c)[0])):
            closes, opens = transitions(commands)
            row[f"{kind}closes"].append(closes)
            row[f"{kind}opens"].append(opens)
        # (N,T), the waypoints that training uses
        known = mask & usable[:, None]
        whole, density = rotation_nats(
            policy, found[-1]["logits"][known], rotvec_to_matrix(demo.ee_ori)[target[known]]
        )
        row["whole"].extend(whole)
        row["density"].extend(density)
        row["unsteadiness_deg"].append(unsteadiness(found[-1]["rotation"][:last]))
        row["true_unsteadiness_deg"].append(unsteadiness(true[:last]))
        row["degrees"].extend(np.degrees(rotation_angle(found[-1]["rotation"], true))[usable])
    return row, found


# -- tables and pictures --------------------------------------------------------------------------


def spread(values, form=".3g"):
    """Mean and range over the seeds, as a table cell."""
    return f"{np.mean(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def tables(summary):
    """The comparison as Markdown: validation at the end of training, then whole episodes, a row a
    configuration.
    """
    head, rows = ["", "seeds", *METRICS.values(), "CE, mean over training", "CE of a guesser"], []
    for name, s in summary.items():
        by_seed = [spread(s[k]) for k in [*(m[4:] for m in METRICS), "rotation_ce_mean"]]
        rows.append([name, s["seeds"], *by_seed, f"{s['guess_nats']:.3g}"])
    training = markdown_table(head, rows)
    head, rows = (
        [
            "",
            "episodes x seeds",
            "closes an episode, mean, most",
            "opens",
            "at most one each",
            "as executed: at most one each",
            "rotation error, deg, median, 95%",
            "turn from frame to frame, deg (demonstrated)",
            "whole rotation, nats, by seed",
            "-ln density of the turning angle, nats, by seed",
        ],
        [],
    )
    count = lambda values: f"{np.mean(values):.2f}, {max(values)}"
    for name, s in summary.items():
        once, acted = (
            np.mean([c <= 1 and o <= 1 for c, o in zip(s[f"{k}closes"], s[f"{k}opens"])])
            for k in ("", "executed_")
        )
        rows.append(
            [
                name,
                len(s["closes"]),
                count(s["closes"]),
                count(s["opens"]),
                f"{100 * once:.0f}%",
                f"{100 * acted:.0f}%",
                f"{s['episode_deg_median']:.2f}, {s['episode_deg_p95']:.2f}",
                f"{np.mean(s['unsteadiness_deg']):.2f} ({np.mean(s['true_unsteadiness_deg']):.2f})",
                spread(s["whole_nats"]),
                spread(s["density_nats"]),
            ]
        )
    return f"{training}\n\n{markdown_table(head, rows)}"


def closing_directions(position, rotation, demo):
    """Segments (N,2,2) px along the EEF's y axis, in which the fingers close, at positions (N,3)
    with rotations (N,3,3).
    """
    # the second column of a rotation is the EEF's y axis in the world; (N,2,3) m
    ends = np.stack([position - AXIS_M * rotation[..., 1], position + AXIS_M * rotation[..., 1]], 1)
    return to_pixels(ends, demo.K, demo.E)


def draw(predictions, policies, demos, basis, out):
    """The pictures of the first seeds. predictions, policies: {name: of one run}."""
    episodes = []
    for i, demo in enumerate(demos):
        config = next(iter(policies.values())).config
        target, gripper, _, usable = labels(demo, config)
        last, rotation = np.flatnonzero(usable)[-1] + 1, rotvec_to_matrix(demo.ee_ori)
        value = lambda r: np.degrees(basis.value(r))
        models = {
            n: {
                "gripper": p[i]["gripper"][:last],
                "executed": executed(p[i]["gripper"], demo, config)[1],
                "value": value(p[i]["rotation"][:last]),
            }
            for n, p in predictions.items()
        }
        truth = {
            "gripper": gripper[:last, 0],
            "executed": executed(gripper[:, 0], demo, config)[1],
            "value": value(rotation[target[:last, 0]]),
        }
        episodes.append((demo.name, models, truth))
        # the further pictures show the first episode alone
        if i:
            continue
        # a frame a quarter of the way in, and eight frames over the whole episode
        frame = int(np.flatnonzero(usable)[usable.sum() // 4])
        shown = np.linspace(0, last - 1, 8).astype(int)
        for name, p in predictions.items():
            # (T,A,bins) -> of the last angle, which turns: yaw, or that about the axis
            shares = torch.from_numpy(p[i]["logits"][frame][:, -1]).double().softmax(-1).numpy()
            true = torch.from_numpy(rotation[target[frame]])
            bins = policies[name].rotation_bins(true)[:, -1].numpy()
            title, file = f"{name}, frame {frame}", out / f"distribution_{name}.png"
            plots_rotation.distribution_strip(shares, bins, title, file)
        segments = {
            "demonstration": closing_directions(
                demo.ee_pos[target[shown, 0]], rotation[target[shown, 0]], demo
            )
        }
        for name, p in predictions.items():
            segments[name] = closing_directions(
                p[i]["position"][shown], p[i]["rotation"][shown], demo
            )
        images = demo.images(shown)
        plots_rotation.rotation_overlay(images, segments, shown, out / "overlay.png")
    for key, label, name in (
        ("gripper", "close", "gripper"),
        ("executed", "close", "gripper_executed"),
        ("value", "rotation (deg)", "rotation"),
    ):
        plots_rotation.episode_strips(episodes, key, label, out / f"{name}.png")


def compare(args, runs):
    """Tables, pictures and summary of finished runs ["NAME=FOLDER"]."""
    folders = defaultdict(list)
    for text in runs:
        name, _, folder = text.partition("=")
        if not folder or not Path(folder).is_dir():
            raise UserError(f"--run {text}: NAME=FOLDER of a train.py run is expected")
        folders[name].append(Path(folder))
    records = {name: [training_record(f) for f in some] for name, some in folders.items()}
    summary, first, policies, backbone = {}, {}, {}, None
    for name, some in folders.items():
        rows = []
        for folder in some:
            policy, info, _ = load_policy(
                folder / "checkpoint.safetensors", weights=args.backbone_weights, backbone=backbone
            )
            # the first run says what all are measured on: its backbone and held-out episodes, whose
            # features are computed once
            if backbone is None:
                backbone, val = policy.backbone, held_out(info, policy)
                view = policy.config.canonical_view
                demos, basis, dataset = (
                    val[: args.n_episodes],
                    load_basis(basis_path(val[0].source.path)),
                    info["args"]["dataset"],
                )
                images = (d.images(range(len(d))) for d in demos)
                features = [
                    [torch.cat(m) for m in zip(*(backbone(torch.from_numpy(i[None])) for i in e))]
                    for e in images
                ]
            elif info["args"]["dataset"] != dataset:
                raise UserError(
                    f"{folder}: was trained on {info['args']['dataset']}, the runs before on "
                    f"{dataset}; compare runs on one dataset"
                )
            elif policy.config.canonical_view != view:
                raise UserError(
                    f"{folder}: its --canonical_view is {policy.config.canonical_view!r}, that of "
                    f"the runs before {view!r}; compare runs of one view"
                )
            row, found = measure(policy, demos, features)
            rows.append(row)
            # of a configuration's first seed: predictions and labels for pictures and the guesser
            if name not in first:
                first[name], policies[name] = found, policy
                targets = []
                for demo in val:
                    target, _, mask, usable = labels(demo, policy.config)
                    true = rotvec_to_matrix(demo.ee_ori)[target[mask & usable[:, None]]]
                    targets.append(policy.rotation_targets(torch.from_numpy(true)))
        # rates and errors over the frames of all seeds; nats stay apart by seed, for their range
        joined = {k: [v for row in rows for v in row[k]] for k in rows[0]}
        degrees = joined.pop("degrees")
        for kind in ("whole", "density"):
            joined.pop(kind)
            joined[f"{kind}_nats"] = [float(np.mean(row[kind])) for row in rows]
        summary[name] = {
            "seeds": len(rows),
            **{k[4:]: [last[k] for last, _ in records[name]] for k in METRICS},
            "rotation_ce_mean": [
                float(np.mean([v for _, v in curve])) for _, curve in records[name]
            ],
            "steps": [last["step"] for last, _ in records[name]],
            "guess_nats": guess_nats(torch.cat(targets)),
            **joined,
            "episode_deg_median": float(np.median(degrees)),
            "episode_deg_p95": float(np.percentile(degrees, 95)),
        }
    print(tables(summary))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(tables(summary) + "\n")
    curves = {n: [curve for _, curve in some] for n, some in records.items()}
    plots_rotation.rotation_curves(
        curves, {n: len(bin_widths(p)) for n, p in policies.items()}, args.out / "rotation_ce.png"
    )
    draw(first, policies, demos, basis, args.out)
    provenance = {
        "command": command_line(),
        "commit": git_commit(),
        "versions": versions(),
        "dataset": dataset,
    }
    names = {n: list(map(str, some)) for n, some in folders.items()}
    write_json(args.out / "summary.json", {**provenance, "runs": names, "cells": summary})
    print(
        f"{args.out}: summary.json, table.md, rotation_ce.png, gripper.png, "
        "gripper_executed.png, rotation.png, overlay.png, distribution_*.png"
    )


def build_parser():
    # or --backbone, meant for train.py, would be --backbone_weights
    parser = flags.Parser(__doc__, allow_abbrev=False)
    parser.add_argument(
        "--run", action="append", metavar="NAME=FOLDER", help="a finished run; once per seed"
    )
    parser.add_argument(
        "--dataset",
        type=Path,
        help="train on this dataset first: an HDF5 file or a smith300 folder",
    )
    parser.add_argument("--seeds", type=flags.count, default=3)
    parser.add_argument("--max_steps", type=flags.count, default=500, help="of each training")
    parser.add_argument(
        "--runs",
        type=flags.new_folder,
        default=Path("runs/rotation"),
        help="folder of the trainings",
    )
    parser.add_argument("--out", type=flags.new_folder, default=Path("results/rotation"))
    parser.add_argument(
        "--n_episodes",
        type=flags.count,
        default=10,
        help="validation episodes, at most, that are looked at frame by frame",
    )
    parser.add_argument("--backbone_weights", type=Path, help="local file of backbone weights")
    return parser


def main(argv=None):
    args, further = build_parser().parse_known_args(argv)
    if bool(args.run) == bool(args.dataset) or args.run and further:
        raise UserError(
            "give either --dataset, and what train.py shall get, "
            "or --run NAME=FOLDER for each finished run"
        )
    if args.dataset and args.backbone_weights:
        further += ["--backbone_weights", str(args.backbone_weights)]
    compare(args, train_cells(args, further) if args.dataset else args.run)


if __name__ == "__main__":
    run_script(main)
