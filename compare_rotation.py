"""v7 against the new rotation head: held-out numbers over seeds, and pictures over validation episodes.

    python compare_rotation.py --run v7=runs/v7_0 --run v7=runs/v7_1 --run new=runs/new_0 --run new=runs/new_1 --out results/rotation

Each --run is NAME=FOLDER of a finished train.py run; runs of one name are its seeds. All must have been trained on one dataset, whose
rotation_pca_basis.npz gives the axis on which rotations are drawn. Writes summary.json, the table as table.md, and PNGs.
"""
import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

import demos as demo_files
import plots_rotation
from checkpoint import load_policy
from data import waypoint_labels
from registry import look_up
from rot_utils import basis_path, load_basis, rotation_angle, rotvec_to_matrix
from runtime import UserError, command_line, git_commit, read_jsonl, run_script, versions, write_json

METRICS = {"val/rotation_ce": "rotation CE, nats an axis", "val/top1_pixel": "top-1 pixel", "val/top1_height": "height", "val/top1_gripper": "gripper",
           "val/top1_rotation": "rotation", "val/top1_joint": "joint", "val/rotation_deg_all_median": "rotation error, deg, median",
           "val/rotation_deg_all_p95": "95%", "val/cm_median": "position error, cm, median"}


@torch.inference_mode()
def episode_predictions(policy, dataset, demo):
    """A policy's first waypoint at every frame of an episode, frames seen as live -> {"gripper" (N,), "rotation" (N,3,3), "logits" (N,T,A,bins)}."""
    images = dataset._images(demo.name, range(len(demo)))
    tensor = lambda x: torch.as_tensor(np.asarray(x))[None]
    found = defaultdict(list)
    for i, image in enumerate(images):
        out = policy.predict({"features": policy.backbone(torch.from_numpy(image[None])), "eef_pos": tensor(demo.ee_pos[i]), "K": tensor(demo.K),
                              "E": tensor(demo.E), "gripper_width": tensor(np.abs(demo.gripper_states[i]).sum())})
        found["gripper"].append(int(out["gripper"][0, 0]))
        found["rotation"].append(out["rotation"][0, 0].numpy())
        found["logits"].append(out["rotation_logits"][0].numpy())
    return {k: np.array(v) for k, v in found.items()}


def transitions(gripper):
    """(closes, opens) of commands (N,) in {0, 1}."""
    change = np.diff(gripper)
    return int((change > 0).sum()), int((change < 0).sum())


def final_metrics(folder):
    """The last validation row of a run, and its rotation cross-entropies [(step, nats)]."""
    rows = [r for r in read_jsonl(folder / "metrics.jsonl") if "val/rotation_ce" in r]
    if not rows:
        raise UserError(f"{folder}: metrics.jsonl has no validation of a volume policy; give a folder of a finished train.py run")
    return rows[-1], [(r["step"], r["val/rotation_ce"]) for r in rows]


def table(cells):
    """{name: [row a seed]} -> Markdown lines, mean and range over the seeds."""
    lines = ["| | seeds | " + " | ".join(METRICS.values()) + " |", "|---" * (len(METRICS) + 2) + "|"]
    for name, rows in cells.items():
        values = [[r[k] for r in rows] for k in METRICS]
        lines.append(f"| {name} | {len(rows)} | " + " | ".join(f"{np.mean(v):.3g} ({min(v):.3g}-{max(v):.3g})" for v in values) + " |")
    return "\n".join(lines)


def compare(args):
    runs = defaultdict(list)
    for text in args.run:
        name, _, folder = text.partition("=")
        if not folder or not Path(folder).is_dir():
            raise UserError(f"--run {text}: NAME=FOLDER of a train.py run is expected")
        runs[name].append(Path(folder))
    cells = {name: [final_metrics(f)[0] for f in folders] for name, folders in runs.items()}
    print(table(cells))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(table(cells) + "\n")
    plots_rotation.rotation_curves({n: [final_metrics(f)[1] for f in fs] for n, fs in runs.items()}, args.out / "rotation_ce.png")
    episodes, counts, errors = [], defaultdict(list), defaultdict(list)
    backbone, dataset, basis = None, None, None
    for name, folders in runs.items():
        for seed, folder in enumerate(folders):
            policy, info, _ = load_policy(folder / "checkpoint.safetensors", weights=args.backbone_weights, backbone=backbone)
            backbone = policy.backbone
            if dataset is None:
                path, entry = Path(info["args"]["dataset"]), look_up(info["model_type"])
                demos, _ = entry.dataset.read(path, policy.config.image_size, info["args"].get("n_demos"))
                _, val = demo_files.split_demos(demos, info["args"]["val_fraction"])
                basis = load_basis(basis_path(path))
                dataset = entry.dataset(path, val[:args.n_episodes], policy.config, backbone, 1000, args.cache, progress=False)
            elif str(path) != info["args"]["dataset"]:
                raise UserError(f"{folder}: was trained on {info['args']['dataset']}, the runs before on {path}; compare runs on one dataset")
            for i, demo in enumerate(dataset.demos):
                target, gripper, _, usable = waypoint_labels(demo, policy.config.waypoint_stride, policy.config.n_window, False, policy.config.min_travel)
                found = episode_predictions(policy, dataset, demo)
                last = np.flatnonzero(usable)[-1] + 1  # the retreat is not trained
                true = rotvec_to_matrix(demo.ee_ori)[target[:, 0]]
                counts[name].append(transitions(found["gripper"][:last]))
                errors[name].extend(np.degrees(rotation_angle(found["rotation"], true))[usable])
                if seed == 0:
                    if len(episodes) <= i:
                        episodes.append((demo.name, np.arange(last), {}, {"gripper": gripper[:last, 0], "value": np.degrees(basis.value(true[:last]))}))
                    episodes[i][2][name] = {"gripper": found["gripper"][:last], "value": np.degrees(basis.value(found["rotation"][:last]))}
                    if i == 0:
                        frame = int(np.flatnonzero(usable)[len(np.flatnonzero(usable)) // 4])
                        logits = torch.from_numpy(found["logits"][frame][:, -1]).double().softmax(-1).numpy()
                        bins = policy.rotation_bins(torch.from_numpy(rotvec_to_matrix(demo.ee_ori)[target[frame]]))[:, -1].numpy()
                        plots_rotation.distribution_strip(logits, bins, f"{name}, frame {frame}", args.out / f"distribution_{name}.png")
    plots_rotation.episode_strips(episodes, "gripper", "gripper", "close", args.out / "gripper.png")
    plots_rotation.episode_strips(episodes, "value", "value", "rotation (deg)", args.out / "rotation.png")
    summary = {name: {"seeds": len(rows), **{k[4:]: [r[k] for r in rows] for k in METRICS}, "closes": [c for c, _ in counts[name]],
                      "opens": [o for _, o in counts[name]], "rotation_deg_median": float(np.median(errors[name])),
                      "rotation_deg_p95": float(np.percentile(errors[name], 95))} for name, rows in cells.items()}
    for name, s in summary.items():
        print(f"{name}: {len(s['closes'])} episodes, closes {np.mean(s['closes']):.2f} (at most {max(s['closes'])}), opens {np.mean(s['opens']):.2f} (at most "
              f"{max(s['opens'])}) an episode; rotation at every frame {s['rotation_deg_median']:.2f} deg, 95% {s['rotation_deg_p95']:.2f} deg")
    write_json(args.out / "summary.json", {"command": command_line(), "commit": git_commit(), "versions": versions(), "dataset": str(path), "cells": summary})


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", required=True, metavar="NAME=FOLDER", help="a finished run; once per seed")
    parser.add_argument("--out", type=Path, default=Path("results/rotation"))
    parser.add_argument("--n_episodes", type=int, default=4, help="validation episodes of the pictures")
    parser.add_argument("--cache", type=Path, default=Path("cache/features"))
    parser.add_argument("--backbone_weights", type=Path, help="local file of backbone weights")
    return parser


if __name__ == "__main__":
    run_script(lambda: compare(build_parser().parse_args()))
