"""Train a policy.

python train.py --model_type para     # default dataset, collected first where it is missing
python train.py --model_type para --max_steps 2500 --dataset data/x.hdf5 --seed 1
python train.py --resume runs/NAME    # go on after a kill or Ctrl-C
torchrun --nproc_per_node 2 train.py --model_type para
"""

import os

# before torch: huge pages take a third off a CPU step
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

import flags
from figures import plots
from formats import demos as demo_files
from harness import finetune
from harness.records import RESUME, read_metrics
from harness.trainer import Trainer
from harness.validation import (
    free_run,
    predict_newest,
    rollout_line,
    rollout_summary,
    to_device,
    to_pixels,
)
from nets.backbone import Backbone, resolve_backbone
from policy import add_config_flags
from registry import REGISTRY, look_up
from runtime import (
    RunLogger,
    StopSignal,
    UserError,
    append_jsonl,
    choose_device,
    command_line,
    git_commit,
    init_distributed,
    read_json,
    run_script,
    seed_everything,
    versions,
    write_json,
)
from sim import settings

DEFAULT_DATASET = Path("data/libero_spatial_0.hdf5")
BUDGETS_ARE_STEPS = (
    "budgets are steps, so that a slower machine ends with the same policy; give --max_steps N. "
    "To stop early press Ctrl-C or send SIGTERM: the run is saved, and --resume goes on"
)


# what --help shows; --help_all shows the rest
FIRST = "model_type dataset out preset max_steps batch_size lr backbone seed device"


class RefuseMinutes(argparse.Action):
    """--max_minutes, which an earlier version had: one sentence instead of an unknown flag."""

    def __call__(self, parser, namespace, values, option_string=None):
        raise UserError(f"--max_minutes {values}: {BUDGETS_ARE_STEPS}")


def build_parser(config_class=None):
    """Flags of a training; with a policy's config class, that policy's own too."""
    parser = flags.Parser(__doc__, first=FIRST)
    add_run_flags(parser.add_argument_group("run"))
    add_data_flags(parser.add_argument_group("data"))
    add_training_flags(parser.add_argument_group("training"))
    if config_class:
        add_config_flags(parser, config_class)
        if config_class.presets:
            add_preset_flag(parser.add_argument_group("sizes"), config_class.presets)
    return parser


def add_run_flags(group):
    """What is trained, where it is written, and on what machine."""
    add = group.add_argument
    names = ", ".join(REGISTRY)
    add(
        "--model_type",
        default="para",
        choices=list(REGISTRY),
        metavar="NAME",
        help=f"{names} (para)",
    )
    add("--out", type=flags.new_folder, help="run folder (runs/MODEL_DATE)")
    add("--resume", type=Path, metavar="RUN", help="go on with a run folder, by its own flags")
    add("--seed", type=flags.whole, default=0, help="of weights, samples and noise")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    precisions = ("auto", "fp32", "bf16")
    add("--precision", default="auto", choices=precisions, help="auto: bf16 where it is fast")
    add("--compile", action="store_true", help="torch.compile the policy")
    add("--wandb", default="offline", choices=("online", "offline", "off"), help="log there too")


def add_data_flags(group):
    """What is trained on."""
    add = group.add_argument
    what = "LIBERO-format HDF5, or a smith300 folder"
    add("--dataset", type=Path, default=DEFAULT_DATASET, help=what)
    add("--n_demos", type=flags.count, help="use only the first N demonstrations")
    what = "share of demonstrations held out"
    add("--val_fraction", type=flags.fraction, default=0.15, help=what)
    what = "train on every k-th frame of a demonstration"
    add("--frame_stride", type=flags.count, default=2, help=what)
    what = "train on each demonstration's reflection in the robot's plane of symmetry too"
    add("--mirror", action="store_true", help=what)
    what = "train on images moved sideways by up to so many pixels, each by its own"
    add("--shift_aug", type=flags.not_negative, default=0, metavar="PX", help=what)
    what = "turn each demonstration's world until its camera is where agentview is (--turn_spread)"
    add("--turn_back", action="store_true", help=what)
    add("--backbone_weights", type=Path, help="local file of backbone weights")
    default = Path("cache/features")
    add("--cache", type=flags.new_folder, default=default, help="folder of cached features")
    what = "compute the features that this training needs, and stop"
    add("--cache_only", action="store_true", help=what)


def add_training_flags(group):
    """How long, how fast, and from which weights on."""
    add = group.add_argument
    what = "steps of the whole training (the preset's)"
    add("--max_steps", type=flags.count, default=500, help=what)
    add("--max_minutes", action=RefuseMinutes, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    what = "samples a step, over all processes (the preset's)"
    add("--batch_size", type=flags.count, default=16, help=what)
    add("--lr", type=flags.positive, default=1e-3, help="highest learning rate (the preset's)")
    what = "steps of linear warm-up, then a cosine to zero (30, or the preset's)"
    add("--warmup", type=flags.whole, default=30, help=what)
    add("--weight_decay", type=flags.not_negative, default=0.01, help="of AdamW")
    add("--clip", type=flags.positive, default=1.0, help="largest gradient norm")
    what = "steps between validations (100, or the preset's)"
    add("--val_every", type=flags.count, default=100, help=what)
    what = "frames that a validation looks at, a third as many windows"
    add("--val_samples", type=flags.count, default=400, help=what)
    what = "steps between checkpoints (100, or the preset's)"
    add("--save_every", type=flags.count, default=100, help=what)
    what = "finetune: start from this checkpoint's tensors that fit by name and shape"
    add("--init_from", type=Path, metavar="CKPT", help=what)
    what = "with --init_from: steps in which the volume head stays as it is"
    add("--freeze_steps", type=flags.whole, default=500, help=what)


def add_preset_flag(group, presets):
    """--preset; what each preset sets stands above it."""
    sizes = []
    for name, values in presets.items():
        words = " ".join(f"--{flag} {value}" for flag, value in values.items())
        sizes.append(f"{name}: {words or 'the defaults'}")
    group.description = "\n".join(sizes)
    what = "sizes; auto: full on a GPU, small without"
    group.add_argument("--preset", choices=["auto", *presets], default="auto", help=what)


def parse_args(argv=None):
    """Flags, --model_type first because it decides which others there are -> (args, config)."""
    first, _ = build_parser().parse_known_args(
        [
            a
            for a in (sys.argv[1:] if argv is None else argv)
            if a not in ("-h", "--help", "--help_all")
        ]
    )
    if first.resume:
        stored = first.resume / "config.json"
        if not stored.is_file():
            raise UserError(f"--resume {first.resume}: no {stored}, so this is no run folder")
        values = read_json(stored, "run of train.py", "train again with another --out", RESUME)
        if any(word.startswith("--max_minutes") for word in values["argv"]):
            raise UserError(
                f"--resume {first.resume}: was started with --max_minutes, and {BUDGETS_ARE_STEPS}; "
                "its checkpoint.safetensors still loads, train anew to go further"
            )
        config_class = look_up(values["args"]["model_type"]).config
        args = with_preset(
            build_parser(config_class),
            [
                *values["argv"],
                *(["--preset", values["args"]["preset"]] if "preset" in values["args"] else []),
            ],
        )
        args.resume = args.out = first.resume
        args.backbone = values["config"]["backbone"]
    else:
        config_class = look_up(first.model_type).config
        args = with_preset(build_parser(config_class), argv)
    return args, config_class


def with_preset(parser, argv):
    """Parse flags on top of the defaults that the model's --preset sets."""
    args = parser.parse_args(argv)
    if "preset" in args:
        if args.preset == "auto":
            args.preset = "full" if choose_device(args.device).startswith("cuda") else "small"
        config_class, chosen = look_up(args.model_type).config, args.preset
        parser.set_defaults(**config_class.presets[chosen])
        args = parser.parse_args(argv)
        args.preset = chosen
        print(f"--preset {chosen}")
    return args


def ensure_dataset(args):
    """Collect the default dataset where it is asked for and not there."""
    if args.dataset == DEFAULT_DATASET and not args.dataset.is_file():
        print(
            f"{args.dataset} is not there yet: collecting it (48 demonstrations, several minutes)"
        )
        subprocess.run(
            [sys.executable, Path(__file__).with_name("collect_demos.py"), "--out", args.dataset],
            check=True,
        )


def first_alone(dist, lock, make):
    """What `make(progress)` returns, called by one process of a torchrun job first, which fills the
    caches, then by the others.

    They wait at a file lock. In a barrier they would give up after ten minutes, while the first one
    still collects.
    """
    if dist.world == 1:
        return make(True)
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            return make(True)
    except Timeout:
        with FileLock(lock):
            pass
        return make(False)


def protocol_reference(dataset, demo, side=56):
    """A recorded frame's state, camera and small image. eval.py renders the state and compares: a
    flip cannot go unnoticed. Recordings of a real robot have no states to render."""
    if not demo.states.size:
        return {}
    image = dataset._images(demo.name, [0])[0]
    size = len(image) // side * side
    small = image[:size, :size].reshape(side, size // side, side, size // side, 3).mean((1, 3))
    return {
        "protocol_state": torch.from_numpy(demo.states[0]),
        "protocol_extrinsics": torch.from_numpy(demo.E),
        "protocol_image": torch.from_numpy(small.round().astype(np.uint8)),
    }


class Prepared(NamedTuple):
    """What a training is about, before there is a policy."""

    config: object
    backbone: Backbone
    train_set: object
    val_set: object
    reference: dict  # tensors of `protocol_reference`
    provenance: dict


def prepare(args, config_class, device, progress):
    """Demonstrations, backbone and their features -> Prepared. Raises UserError for what cannot be
    trained on.
    """
    ensure_dataset(args)
    entry = look_up(args.model_type)
    config = config_class(**{f: getattr(args, f) for f in config_class.__dataclass_fields__})
    all_demos, attributes = entry.dataset.read(args.dataset, config.image_size, args.n_demos)
    if attributes.get("part") == "val":
        raise UserError(
            f"{args.dataset}: holds validation conditions (--part val), by which trained policies are judged; "
            "collect it without that flag"
        )
    if attributes.get("variant") == "lift_once" and not config.stay:
        config.stay = True
        print(
            f"{args.dataset}: its demonstrations end by staying where they are, so that is trained too (--stay)"
        )
    train_demos, val_demos = demo_files.split_demos(all_demos, args.val_fraction)
    if (args.mirror or args.turn_back) and getattr(config, "rotation", "euler") == "pca":
        raise UserError(
            f"{'--mirror' if args.mirror else '--turn_back'}: turns rotations away from those that the principal axis "
            "was computed from; leave it out, or give --rotation euler"
        )
    entry.dataset.check_split(args.dataset, train_demos, config)  # before any feature is computed
    recorded = train_demos[0]
    if args.turn_back:
        back = lambda demos: [
            demo_files.turned_back(d, settings.default_camera()[1]) for d in demos
        ]
        train_demos, val_demos = back(train_demos), back(val_demos)
    shown_demos = (
        train_demos + [demo_files.mirrored(d) for d in train_demos] if args.mirror else train_demos
    )
    asked = config.backbone
    config.backbone = resolve_backbone(asked, args.backbone_weights)
    backbone = Backbone(config.backbone, config.image_size, args.backbone_weights).to(device)
    make = lambda part: entry.dataset(
        args.dataset, part, config, backbone, args.frame_stride, args.cache, progress
    )
    train_set, val_set = make(shown_demos), make(val_demos)
    provenance = {
        "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "config": vars(config),
        "command": command_line(),
        "commit": git_commit(),
        "versions": versions(),
        "seed": args.seed,
        "dataset": {
            **{
                k: str(attributes[k])
                for k in (
                    "task_suite",
                    "task_id",
                    "language",
                    "command",
                    "num_demos",
                    "grasp",
                    "variant",
                    "setting",
                    "split",
                    "clean_scene",
                )
                if k in attributes
            },
            "versions": demo_files.simulated_with(attributes),
        },
        "train_demos": len(train_demos),
        "val_demos": len(val_demos),
        "train_frames": len(train_set),
        "backbone_asked": asked,
        "backbone_identity": backbone.identity,
    }
    return Prepared(
        config, backbone, train_set, val_set, protocol_reference(train_set, recorded), provenance
    )


def run_folder(args):
    """Where the run is written. Raises UserError for one that holds another run."""
    folder = args.out or Path("runs") / f"{args.model_type}_{time.strftime('%Y%m%d_%H%M%S')}"
    if (folder / "state.safetensors").exists() and not args.resume:
        raise UserError(
            f"{folder}: holds a run already; go on with `python train.py --resume {folder}`, or give another --out"
        )
    return folder


def build(args, found, dist, folder):
    """The policy and all that trains it -> Trainer, at the step that the run folder has reached."""
    policy = (
        look_up(args.model_type)
        .policy(found.config, found.backbone.channels)
        .attach(found.backbone)
        .to(dist.device)
    )
    policy.fit_statistics(found.train_set.statistics())
    if args.init_from and not args.resume:
        finetune.init_from(policy, args.init_from)
    provenance = {**found.provenance, "parameters": sum(p.numel() for p in policy.parameters())}
    if dist.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        if not args.resume:
            write_json(folder / "config.json", {**provenance, "argv": sys.argv[1:]})
    logger = RunLogger(folder, args.wandb, provenance, dist.is_main)
    save_info = {k: v for k, v in provenance.items() if k != "config"}
    trainer = Trainer(
        policy,
        found.train_set,
        found.val_set,
        args,
        dist,
        folder,
        logger,
        save_info,
        found.reference,
    )
    if args.resume:
        trainer.resume()
    return trainer


def announce(args, found, trainer):
    """Say what is trained on what, and for how long."""
    known, folder, basis = (
        trainer.save_info,
        trainer.folder,
        getattr(found.train_set, "basis", None),
    )
    print(
        f"{folder}: {args.model_type}, {known['parameters']:,} parameters, backbone {known['backbone_identity']} "
        f"(asked for: {known['backbone_asked']}), {known['train_demos']} + {known['val_demos']} demonstrations, "
        f"{known['train_frames']} training frames, step {trainer.step}"
    )
    if basis is not None:
        trainer.logger.log(trainer.step, {"rotation/ev_ratio": float(basis.ev_ratio[0])})
        print(
            f"rotation basis ({basis.space}): one axis explains {basis.ev_ratio[0]:.3f} of the variance, "
            f"{np.degrees(basis.low):.1f} to {np.degrees(basis.high):.1f} deg"
        )
    if not args.resume:
        append_jsonl(
            folder / "profile.jsonl", {"device": trainer.dist.device, "rows": trainer.estimate()}
        )


def finish(trainer):
    """Last validation, checkpoint and pictures."""
    folder, policy, val_set = trainer.folder, trainer.policy, trainer.val_set
    if trainer.step % trainer.args.val_every or trainer.metrics is None:
        trainer.validate()
    trainer.save()
    plots.loss_curve(read_metrics(folder), folder / "loss.png")
    overlays(policy, val_set, trainer.dist.device, folder)
    trainer.logger.log(trainer.step, free_runs(policy, val_set, folder))
    print(
        f"{folder}/checkpoint.safetensors: {trainer.step} steps, {trainer.minutes:.1f} minutes of training and "
        f"{trainer.validation_minutes:.1f} of validation, "
        + ", ".join(f"{k[4:]} {v:.3g}" for k, v in trainer.metrics.items())
    )


def train(args, config_class):
    """Prepare, build, fit, finish."""
    dist = init_distributed(args.device)
    stop = StopSignal()
    folder = run_folder(args)
    found = first_alone(
        dist,
        args.cache / f"{args.dataset.name}.lock",
        lambda progress: prepare(args, config_class, dist.device, progress),
    )
    if args.cache_only:
        print(
            f"{args.cache}: features of {len(found.train_set)} + {len(found.val_set)} samples, backbone {found.backbone.identity}"
        )
        return
    dist.join()
    seed_everything(args.seed)
    trainer = build(args, found, dist, folder)
    if dist.is_main:
        announce(args, found, trainer)
    done = trainer.fit(stop)
    if dist.is_main and done:
        finish(trainer)
    elif dist.is_main:
        print(
            f"stopped at step {trainer.step}, saved; go on with `python train.py --resume {folder}`"
        )
    trainer.logger.close()
    dist.leave()


@torch.no_grad()
def overlays(policy, dataset, device, folder, n_episodes=3, n_frames=6):
    """Predicted against true trajectories drawn on frames of validation episodes."""
    policy.eval()
    for episode in range(min(n_episodes, len(dataset.demos))):
        rows = np.flatnonzero(dataset.demo == episode)
        rows = rows[np.linspace(0, len(rows) - 1, min(n_frames, len(rows))).astype(int)]
        whole = to_device(dataset.batch(rows), device)
        batch, out = predict_newest(policy, whole)
        K, E = batch["K"].cpu().numpy()[:, None], batch["E"].cpu().numpy()[:, None]
        to_px = lambda points: to_pixels(points, K, E)
        images = dataset._images(dataset.demos[episode].name, dataset.frame[rows])
        plots.trajectory_overlay(
            images,
            to_px(batch["eef_pos"].cpu().numpy()[:, None])[:, 0],
            to_px(batch["target_pos"].cpu().numpy()),
            to_px(out["position"].double().cpu().numpy()),
            dataset.frame[rows],
            folder / f"overlay_{episode}.png",
        )
        last = whole["valid"].sum(1).cpu() - 1 if "valid" in whole else None
        if hasattr(policy, "attention"):
            heat = policy.attention(whole)[torch.arange(len(rows)), last].float().cpu().numpy()
            plots.attention_overlay(
                images, heat, dataset.frame[rows], folder / f"attention_{episode}.png"
            )
        if hasattr(policy, "distribution"):
            volumes = policy.distribution(whole)[torch.arange(len(rows)), last].cpu().numpy()
            plots.volume_projections(
                images, volumes, dataset.frame[rows], folder / f"volume_{episode}.png"
            )


def free_runs(policy, dataset, folder, n_episodes=3):
    """Open-loop rollouts on validation episodes, own predictions fed back, drawn over the first
    image -> {"free/coverage_8px" ...}.
    """
    found = []
    for episode, demo in enumerate(
        tqdm(dataset.demos[:n_episodes], desc="free-running", unit="demo")
    ):
        found.append(free_run(policy, dataset.path, demo, dataset.config))
        plots.paths_overlay(
            dataset._images(demo.name, [0])[0],
            to_pixels(found[-1]["path"], demo.K, demo.E),
            {demo.name: rollout_line(found[-1]["predicted"], demo)},
            folder / f"rollout_{episode}.png",
        )
    row = {k: round(v, 5) for k, v in rollout_summary(found).items()}
    print(
        "free-running on validation demonstrations: "
        + ", ".join(f"{k} {v:.3g}" for k, v in row.items())
    )
    return {f"free/{k}": v for k, v in row.items()}


if __name__ == "__main__":
    run_script(lambda: train(*parse_args()))
