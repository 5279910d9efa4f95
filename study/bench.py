"""Speed, measured side by side in one run.

python -m study.bench features           # the frozen backbone as it is used, and as timm has it
python -m study.bench train              # training steps a second of every policy
python -m study.bench rollout --ckpt X   # episodes an hour: our loop, robosuite's own
python -m study.bench eval --ckpt X      # evaluation with 1 and 2 workers, where its seconds go
python -m study.bench memory --ckpt X    # of worker and network after each of 50 episodes (Linux)
python -m study.bench attention          # A: block-causal attention against a dense mask, the cache
python -m study.bench voxel [--quick]    # attention to voxel tokens: built, against absorbed
python -m study.bench voxel --train      # B and C: the parts of a training step

`train` and `rollout` take `--against CHECKOUT`: another commit's, which takes turns with this one.
`rollout` then compares whole evaluations and leaves the loops out.
"""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flags
from harness.records import read_summary
from registry import REGISTRY
from runtime import UserError, command_line, git_commit, may_replace, run_script, write_json
from study.bench_attention import bench_attention, bench_voxel
from study.bench_memory import bench_memory
from study.bench_rollout import LOOPS, bench_rollout
from study.bench_train import bench_train
from study.timing import alternate


def report(title, seconds, unit):
    """Print a table with ratios to the first row; return it."""
    first = next(iter(seconds.values()))
    print(f"\n{title}")
    for name, value in seconds.items():
        print(f"  {name:<44} {1000 * value:9.1f} ms {unit}   x{first / value:.2f}")
    return {"title": title, "unit": unit, "ms": {k: round(1000 * v, 2) for k, v in seconds.items()}}


def bench_features(args):
    """The shipped backbone on 448 px images."""
    import timm
    import torch

    from nets.backbone import Backbone, each_on_one_thread

    # the backbone as policies use it, and the same network as timm builds it
    frozen = Backbone("efficientnet_lite0")
    plain = timm.create_model(
        "tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=(2, 3)
    ).eval()
    images = torch.randint(0, 255, (8, 448, 448, 3), dtype=torch.uint8)
    # pixels in [-1, 1], (B,3,H,W): the plain model's input; `frozen` takes uint8 itself
    x = ((images.permute(0, 3, 1, 2).float() - 127.5) / 127.5).contiguous()
    cores = os.cpu_count()

    def one_by_one(call, items):
        with torch.inference_mode():
            for i in range(len(items)):
                call(items[i : i + 1])

    def by_threads():
        # a core an image; threads inside an operator would compete for the same cores
        with each_on_one_thread(), ThreadPoolExecutor(cores) as pool:
            list(pool.map(lambda i: frozen(images[i : i + 1]), range(len(images))))

    def trainable():
        plain.zero_grad()
        sum(m.sum() for m in plain(x)).backward()

    seconds = alternate(
        {
            "plain timm model": lambda: one_by_one(plain, x),
            "the same, batch of 8, forward and backward": trainable,
            "channels_last, traced and frozen": lambda: one_by_one(frozen, images),
            "traced and frozen, batch of 8": lambda: frozen(images),
            f"traced and frozen, {cores} images at once, a thread each": by_threads,
        },
        args.rounds,
    )
    return report(
        f"efficientnet_lite0 features, 448 px, {cores} cores",
        # every variant goes through the same 8 images
        {k: v / 8 for k, v in seconds.items()},
        "an image",
    )


def bench_eval(args):
    """Whole evaluations with 1 and 2 workers."""
    if not args.ckpt:
        raise UserError("study.bench eval needs --ckpt")
    rows, episodes = {}, args.episodes or 10
    with tempfile.TemporaryDirectory() as scratch:
        # process start and model loading are part of the wall time, as a user waits for them
        for workers in (1, 2):
            folder = Path(scratch) / str(workers)
            start = time.perf_counter()
            done = subprocess.run(
                [
                    sys.executable,
                    "eval.py",
                    "--ckpt",
                    args.ckpt,
                    "--teleport",
                    "--zero_rotation",
                    "--n_episodes",
                    str(episodes),
                    "--n_videos",
                    "0",
                    "--workers",
                    str(workers),
                    "--out",
                    folder,
                ],
            )
            wall = time.perf_counter() - start
            if done.returncode:
                raise UserError(f"the evaluation ended with exit code {done.returncode}, see above")
            spent = read_summary(folder)["seconds_per_episode"]
            rows[workers] = {"wall_per_episode": round(wall / episodes, 2), **spent}
    print(f"\nevaluation of {episodes} episodes: seconds per episode")
    for workers, row in rows.items():
        print(
            f"  {workers} worker{'s' * (workers > 1)}: "
            + ", ".join(f"{k} {v:.2f}" for k, v in row.items())
        )
    ratio = rows[1]["wall_per_episode"] / rows[2]["wall_per_episode"]
    print(f"  ratio of wall time, 1 to 2 workers: {ratio:.2f}")
    return {"title": "evaluation", "seconds": rows}


BENCHES = {
    "features": bench_features,
    "train": bench_train,
    "eval": bench_eval,
    "memory": bench_memory,
    "rollout": bench_rollout,
    "voxel": bench_voxel,
    "attention": bench_attention,
}


def build_parser():
    parser = flags.Parser(__doc__)
    parser.add_argument("what", nargs="?", choices=list(BENCHES), help="default: features")
    parser.add_argument("--ckpt", type=Path)
    parser.add_argument(
        "--dataset",
        type=Path,
        default=Path("data/libero_spatial_0.hdf5"),
        help="train: demonstrations",
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("cache/features"), help="train: cached features"
    )
    parser.add_argument("--models", nargs="+", choices=list(REGISTRY), help="train: these alone")
    parser.add_argument("--preset", default="small", help="train: as of train.py")
    parser.add_argument("--device", default="cpu", help="train, rollout: as of train.py")
    parser.add_argument(
        "--loops", nargs="+", choices=list(LOOPS), metavar="LOOP", help="rollout: these alone"
    )
    parser.add_argument("--episodes", type=flags.count, help="eval: 10, memory: 50")
    parser.add_argument("--layout", default="benchmark", help="memory: as of eval.py")
    parser.add_argument(
        "--workers",
        nargs="+",
        type=flags.count,
        default=[1, 2],
        help="rollout: simulators at a time",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="CHECKOUT",
        help="train, rollout: a checkout of another commit that takes turns with this one",
    )
    parser.add_argument(
        "--fast_ckpt",
        type=Path,
        metavar="PATH",
        help="rollout --against: a checkpoint trained on --render fast, evaluated on it too",
    )
    parser.add_argument("--rounds", type=flags.count, default=7)
    parser.add_argument("--quick", action="store_true", help="voxel, attention: a small size alone")
    parser.add_argument(
        "--train", action="store_true", help="voxel: training steps a second instead"
    )
    parser.add_argument(
        "--out", type=flags.new_file(".json"), help="also write the figures to this JSON file"
    )
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    may_replace(args.out, "cores", "tables")
    tables = [BENCHES[name](args) for name in ([args.what] if args.what else ["features"])]
    if args.out:
        write_json(
            args.out,
            {
                "command": command_line(),
                "commit": git_commit(),
                "cores": os.cpu_count(),
                "tables": tables,
            },
        )


if __name__ == "__main__":
    run_script(main)
