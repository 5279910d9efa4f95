"""Does a policy's answer depend on what it is told? Asked of demonstrations, without a simulator.

    python -m study.listening --dataset data/spatial_fixed --out results/listening.json \\
        --ckpt runs/A/checkpoint.safetensors runs/B/checkpoint.safetensors

In scenes with demonstrations of several sentences a policy sees the first images of a held-out one
twice: told its own sentence, and told the scene's next. Soon the path shows which object is meant,
so that only the first decisions ask. Reported for each scene and sentence, in cm on the table:
`right`, from the recorded waypoint to the answer to its own sentence; `wrong`, to the answer to the
other one; `apart`, between the two answers. A policy that does not listen has 0 apart. `cosine` is
that of the two sentences' vectors, as the policy's encoder makes them.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import flags
from figures.pages import markdown_table
from formats.demos import seen_by, split_demos, told_otherwise
from formats.mixture import open_mixture
from harness.checkpoint import load_policy
from harness.records import run_names
from harness.validation import decide, decision_frames
from runtime import UserError, command_line, git_commit, may_replace, run_script, write_json

PARTS = ("right", "wrong", "apart")


@torch.inference_mode()
def answers(policy, demo, sentence, frames, images):
    """Waypoints (n,3) m at n frames of a demonstration and their images, told a sentence."""
    told = dataclasses.replace(demo, attrs={**demo.attrs, "task": sentence})
    policy.eval().reset()
    found = [
        decide(policy, told, image, frame, demo.ee_pos[frame])[0][0]
        for frame, image in zip(frames, images)
    ]
    policy.reset()
    return np.array(found)


def distances(policy, demo, other, n):
    """A demonstration told its own sentence and another -> {part: (n,) m, on the table}."""
    demo = seen_by(demo, policy.config)
    frames, targets = (part[:n] for part in decision_frames(demo, policy.config))
    images = list(demo.images(frames))  # read once, for both
    right, wrong = (
        answers(policy, demo, words, frames, images) for words in (demo.instruction, other)
    )
    true = demo.ee_pos[targets]
    table = lambda a, b: np.linalg.norm((a - b)[:, :2], axis=-1)
    return {"right": table(right, true), "wrong": table(wrong, true), "apart": table(right, wrong)}


@torch.inference_mode()
def cosine(policy, sentence, other):
    """Of two sentences' vectors, by the policy's encoder."""
    one, two = (policy.text(policy.instructed(words)["instruction"]) for words in (sentence, other))
    return F.cosine_similarity(one, two).item()


def listen(policy, demos, n, label=""):
    """[{"scene", "told", "instead", "n_demos", "cosine", and the mean of each part in cm}], a row
    for each sentence.
    """
    found, instead = {}, {}
    for i, j in tqdm(told_otherwise(demos).items(), desc=label, unit="demo"):
        instead[demos[i].request] = demos[j].instruction
        apart = distances(policy, demos[i], demos[j].instruction, n)
        found.setdefault(demos[i].request, []).append({k: v.mean() for k, v in apart.items()})
    mean = lambda rows, part: float(100 * np.mean([row[part] for row in rows]))
    return [
        {
            "scene": scene,
            "told": words,
            "instead": instead[scene, words],
            "n_demos": len(rows),
            "cosine": cosine(policy, words, instead[scene, words]),
            **{part: mean(rows, part) for part in PARTS},
        }
        for (scene, words), rows in sorted(found.items())
    ]


def table(found):
    """{policy: rows of `listen`} as Markdown, with the mean over each policy's rows."""
    shown = lambda values: [f"{v:.1f}" for v in values]
    lines = []
    for name, rows in found.items():
        for row in rows:
            kept = shown(row[part] for part in PARTS)
            likeness = f"{row['cosine']:.2f}"
            lines.append([name, row["scene"], row["told"], row["n_demos"], *kept, likeness])
        means = [np.mean([row[part] for row in rows]) for part in PARTS]
        n = sum(row["n_demos"] for row in rows)
        lines.append([name, "all", "", n, *shown(means), ""])
    head = ["policy", "scene", "told", "demonstrations", *PARTS, "cosine"]
    return markdown_table(head, lines)


def build_parser():
    parser = flags.Parser(__doc__)
    parser.add_argument("--ckpt", type=Path, nargs="+", required=True)
    parser.add_argument("--dataset", type=Path, nargs="+", required=True)
    parser.add_argument(
        "--first", type=flags.count, default=4, help="decisions of each demonstration"
    )
    parser.add_argument("--backbone_weights", type=Path)
    parser.add_argument("--text_weights", type=Path)
    parser.add_argument("--out", type=flags.new_file(".json"), help="also write the figures here")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    may_replace(args.out, "first", "rows")
    found = {}
    for name, ckpt in zip(run_names(args.ckpt), args.ckpt):
        policy, info, _ = load_policy(
            ckpt, "cpu", args.backbone_weights, text_weights=args.text_weights
        )
        if policy.text is None:
            raise UserError(f"{ckpt}: is told nothing (--text none); give one trained on sentences")
        typed = info.get("args", {})
        demos = open_mixture(args.dataset, policy.config.image_size, typed.get("n_demos")).demos
        # what this checkpoint's training held out
        held_out = split_demos(demos, typed.get("val_fraction", 0.15))[1]
        found[name] = listen(policy, held_out, args.first, name)
        if not found[name]:
            raise UserError(
                f"{args.dataset[0]}: no scene has demonstrations of two sentences; collect some "
                "with --instruction_of other"
            )
    print(table(found))
    if args.out:
        made = {"command": command_line(), "commit": git_commit(), "first": args.first}
        write_json(args.out, {**made, "rows": found})


if __name__ == "__main__":
    run_script(main)
