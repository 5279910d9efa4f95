"""Train a policy.

    python train.py --model_type para                     # default dataset; collected first where there is none
    python train.py --model_type para --max_steps 2500 --dataset data/x.hdf5 --seed 1
    python train.py --resume runs/NAME                    # go on after a kill or Ctrl-C
    torchrun --nproc_per_node 2 train.py --model_type para
"""
import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch: huge pages take a third off a CPU step

import argparse
import copy
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import demos as demo_files
import finetune
import flags
import plots
import settings
from backbone import Backbone, resolve_backbone
from checkpoint import load_tensors, save_policy, save_tensors
from data import shifted_sideways
from policy import add_config_flags
from registry import REGISTRY, look_up
from runtime import (RunLogger, StopSignal, UserError, append_jsonl, autocast, command_line, git_commit, init_distributed,
                     read_jsonl, run_script, seed_everything, versions, write_json)
from validation import free_run, predict_newest, rollout_line, rollout_summary, to_device, to_pixels, validate

DEFAULT_DATASET = Path("data/libero_spatial_0.hdf5")
BUDGETS_ARE_STEPS = ("budgets are steps, so that a slower machine ends with the same policy; give --max_steps N. "
                     "To stop early press Ctrl-C or send SIGTERM: the run is saved, and --resume goes on")


class RefuseMinutes(argparse.Action):
    """--max_minutes, which an earlier version had: one sentence instead of an unknown flag."""

    def __call__(self, parser, namespace, values, option_string=None):
        raise UserError(f"--max_minutes {values}: {BUDGETS_ARE_STEPS}")


def build_parser(config_class=None):
    parser = flags.Parser(__doc__)
    parser.add_argument("--model_type", default="para", choices=list(REGISTRY))
    parser.add_argument("--dataset", type=Path, default=DEFAULT_DATASET, help=f"LIBERO-format HDF5, or a smith300 folder ({DEFAULT_DATASET})")
    parser.add_argument("--n_demos", type=flags.count, help="use only the first N demonstrations")
    parser.add_argument("--out", type=flags.new_folder, help="run folder (runs/MODEL_DATE)")
    parser.add_argument("--init_from", type=Path, metavar="CKPT", help="finetune: start from this checkpoint's tensors that fit by name and shape")
    parser.add_argument("--freeze_steps", type=flags.whole, default=500, help="with --init_from: steps in which the volume head stays as it is")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run folder; its own flags are used")
    parser.add_argument("--backbone_weights", type=Path, help="local file of backbone weights")
    parser.add_argument("--cache", type=flags.new_folder, default=Path("cache/features"), help="folder of cached features")
    parser.add_argument("--cache_only", action="store_true", help="compute the features that this training needs, and stop")
    parser.add_argument("--frame_stride", type=flags.count, default=2, help="train on every k-th frame of a demonstration")
    parser.add_argument("--val_fraction", type=flags.fraction, default=0.15, help="share of demonstrations held out")
    parser.add_argument("--mirror", action="store_true", help="train on each demonstration's reflection in the robot's plane of symmetry too")
    parser.add_argument("--shift_aug", type=flags.not_negative, default=0, metavar="PX", help="train on images moved sideways by up to so many pixels, each by its own")
    parser.add_argument("--turn_back", action="store_true", help="turn each demonstration's world until its camera is where agentview is (--turn_spread)")
    parser.add_argument("--batch_size", type=flags.count, default=16, help="samples a step, over all processes")
    parser.add_argument("--lr", type=flags.positive, default=1e-3)
    parser.add_argument("--weight_decay", type=flags.not_negative, default=0.01)
    parser.add_argument("--warmup", type=flags.whole, default=30, help="steps of linear warm-up, then a cosine to zero")
    parser.add_argument("--clip", type=flags.positive, default=1.0, help="gradient norm")
    parser.add_argument("--max_steps", type=flags.count, default=500,
                        help="steps of the whole training, at whose end the cosine is zero")
    parser.add_argument("--max_minutes", action=RefuseMinutes, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument("--val_every", type=flags.count, default=100, help="steps")
    parser.add_argument("--val_samples", type=flags.count, default=400, help="frames that a validation looks at, a third as many windows")
    parser.add_argument("--save_every", type=flags.count, default=100, help="steps")
    parser.add_argument("--seed", type=flags.whole, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="auto: bf16 on a GPU, and on a CPU that has it")
    parser.add_argument("--compile", action="store_true", help="torch.compile the policy")
    parser.add_argument("--wandb", default="offline", choices=("online", "offline", "off"))
    if config_class:
        add_config_flags(parser, config_class)
        if config_class.presets:
            parser.add_argument("--preset", choices=["auto", *config_class.presets], default="auto",
                                help="sizes: " + "; ".join(f"{k} {v or 'the defaults'}" for k, v in config_class.presets.items())
                                + "; auto: small without a GPU")
    return parser


def parse_args(argv=None):
    """Flags, --model_type first because it decides which others there are -> (args, config)."""
    first, _ = build_parser().parse_known_args([a for a in (sys.argv[1:] if argv is None else argv) if a not in ("-h", "--help")])
    if first.resume:
        stored = first.resume / "config.json"
        if not stored.is_file():
            raise UserError(f"--resume {first.resume}: no {stored}, so this is no run folder")
        values = json.loads(stored.read_text())
        if any(word.startswith("--max_minutes") for word in values["argv"]):
            raise UserError(f"--resume {first.resume}: was started with --max_minutes, and {BUDGETS_ARE_STEPS}; "
                            "its checkpoint.safetensors still loads, train anew to go further")
        config_class = look_up(values["args"]["model_type"]).config
        args = with_preset(build_parser(config_class), [*values["argv"], *(["--preset", values["args"]["preset"]] if "preset" in values["args"] else [])])
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
            gpu = args.device.startswith("cuda") or args.device == "auto" and torch.cuda.is_available()
            args.preset = "full" if gpu else "small"
        config_class, chosen = look_up(args.model_type).config, args.preset
        parser.set_defaults(**config_class.presets[chosen])
        args = parser.parse_args(argv)
        args.preset = chosen
        print(f"--preset {chosen}")
    return args


def ensure_dataset(args, dist):
    """Collect the default dataset where it is asked for and not there. Raises UserError for another missing file."""
    if args.dataset == DEFAULT_DATASET and not args.dataset.is_file() and dist.is_main:
        print(f"{args.dataset} is not there yet: collecting it (48 demonstrations, several minutes)")
        subprocess.run([sys.executable, Path(__file__).with_name("collect_demos.py"), "--out", args.dataset], check=True)
    barrier(dist)


def barrier(dist):
    if dist.world > 1:
        torch.distributed.barrier()


def batch_indices(seed, step, n, batch_size, cache={}):
    """Indices of one step's batch: a pure function of (seed, step), so that a resumed run sees the same batches."""
    per_epoch = max(1, n // batch_size)
    epoch, i = divmod(step, per_epoch)
    if cache.get("key") != (seed, epoch, n):
        cache.update(key=(seed, epoch, n), order=np.random.default_rng([seed, epoch]).permutation(n))
    return cache["order"][i * batch_size:(i + 1) * batch_size]


def learning_rate(args, step):
    """Linear warm-up, then a cosine to zero at --max_steps."""
    warm = min(1.0, (step + 1) / max(1, args.warmup))
    return args.lr * warm * 0.5 * (1 + math.cos(math.pi * step / args.max_steps))


def profile_steps(policy, dataset, device, precision, batch_size):
    """Step time and peak memory of a copy of the policy at batch 2, 4 and the run's own -> list of rows, printed."""
    rows = []
    for size in sorted({2, 4, batch_size}):
        twin = copy.deepcopy(policy)
        optimizer = torch.optim.AdamW(twin.parameters())
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(4):
            start = time.perf_counter()
            batch = to_device(dataset.batch(np.arange(size) % len(dataset)), device)
            with autocast(device, precision):
                loss = twin(batch)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        if device.startswith("cuda"):
            memory, kind = torch.cuda.max_memory_allocated() / 1e6, "allocated on the GPU"
        else:
            memory, kind = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, "peak RSS of the process"
        rows.append({"batch": size, "step_ms": round(1000 * float(np.median(times[1:])), 1), "memory_mb": round(memory, 1),
                     "memory_kind": kind})
        print(f"batch {size}: {rows[-1]['step_ms']} ms a step, {rows[-1]['memory_mb']} MB {kind}")
    return rows


def expected_minutes(rows, batch_size, steps):
    """Minutes that so many steps will take on this machine, from the rows of `profile_steps`."""
    return steps * next(r["step_ms"] for r in rows if r["batch"] == batch_size) / 60_000


def protocol_reference(dataset, demo, side=56):
    """A recorded frame's state, camera and small image. eval.py renders the state and compares: a flip cannot go unnoticed.
    Recordings of a real robot have no states to render."""
    if not demo.states.size:
        return {}
    image = dataset._images(demo.name, [0])[0]
    size = len(image) // side * side
    small = image[:size, :size].reshape(side, size // side, side, size // side, 3).mean((1, 3))
    return {"protocol_state": torch.from_numpy(demo.states[0]), "protocol_extrinsics": torch.from_numpy(demo.E),
            "protocol_image": torch.from_numpy(small.round().astype(np.uint8))}


def save_state(path, policy, optimizer, info):
    """All that a bit-identical continuation needs, in one atomic file."""
    tensors = {f"model.{k}": v for k, v in policy.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in state.items()})
    tensors["rng"] = torch.get_rng_state()
    save_tensors(path, tensors, info)


def load_state(path, policy, optimizer):
    """Restore `save_state` -> its info: step, minutes, validation_minutes."""
    tensors, info = load_tensors(path)
    policy.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    state = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".")
            state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["rng"])
    return info


def train(args, config_class):
    dist = init_distributed(args.device)
    stop = StopSignal()
    entry = look_up(args.model_type)
    ensure_dataset(args, dist)
    seed_everything(args.seed)
    config = config_class(**{f: getattr(args, f) for f in config_class.__dataclass_fields__})
    all_demos, attributes = entry.dataset.read(args.dataset, config.image_size, args.n_demos)
    if attributes.get("part") == "val":
        raise UserError(f"{args.dataset}: holds validation conditions (--part val), by which trained policies are judged; collect it without that flag")
    if attributes.get("variant") == "lift_once" and not config.stay:
        config.stay = True
        print(f"{args.dataset}: its demonstrations end by staying where they are, so that is trained too (--stay)")
    train_demos, val_demos = demo_files.split_demos(all_demos, args.val_fraction)
    if (args.mirror or args.turn_back) and getattr(config, "rotation", "euler") == "pca":
        raise UserError(f"{'--mirror' if args.mirror else '--turn_back'}: turns rotations away from those that the principal axis was computed from; "
                        "leave it out, or give --rotation euler")
    recorded = train_demos[0]
    if args.turn_back:
        train_demos, val_demos = ([demo_files.turned_back(d, settings.default_camera()[1]) for d in part] for part in (train_demos, val_demos))
    shown_demos = train_demos + [demo_files.mirrored(d) for d in train_demos] if args.mirror else train_demos
    asked = config.backbone
    config.backbone = resolve_backbone(asked, args.backbone_weights)
    backbone = Backbone(config.backbone, config.image_size, args.backbone_weights)
    folder = args.out or Path("runs") / f"{args.model_type}_{time.strftime('%Y%m%d_%H%M%S')}"
    state_path = folder / "state.safetensors"
    if folder.exists() and state_path.exists() and not args.resume:
        raise UserError(f"{folder}: holds a run already; go on with `python train.py --resume {folder}`, or give another --out")

    barrier(dist) if not dist.is_main else None  # rank 0 fills the feature cache, the others read it
    make = lambda part: entry.dataset(args.dataset, part, config, backbone, args.frame_stride, args.cache, dist.is_main)
    train_set, val_set = make(shown_demos), make(val_demos)
    barrier(dist) if dist.is_main else None
    if args.cache_only:
        print(f"{args.cache}: features of {len(train_set)} + {len(val_set)} samples, backbone {backbone.identity}")
        return

    policy = entry.policy(config, backbone.channels).attach(backbone).to(dist.device)
    policy.fit_statistics(train_set.statistics())
    if args.init_from and not args.resume:
        finetune.init_from(policy, args.init_from)
    freeze_steps = args.freeze_steps if args.init_from else 0
    optimizer = torch.optim.AdamW(policy.param_groups(args.weight_decay), lr=args.lr)
    reached = {"step": 0, "minutes": 0.0, "validation_minutes": 0.0}  # minutes: of training alone
    if args.resume and state_path.exists():
        reached.update(load_state(state_path, policy, optimizer))
    step = reached["step"]
    provenance = {"args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}, "config": vars(config),
                  "command": command_line(), "commit": git_commit(), "versions": versions(), "seed": args.seed,
                  "dataset": {k: str(attributes[k]) for k in ("task_suite", "task_id", "language", "command", "num_demos", "grasp", "variant",
                                                             "setting", "split", "clean_scene") if k in attributes},
                  "train_demos": len(train_demos), "val_demos": len(val_demos), "train_frames": len(train_set),
                  "parameters": sum(p.numel() for p in policy.parameters()), "backbone_asked": asked,
                  "backbone_identity": backbone.identity}
    if dist.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        if not args.resume:
            write_json(folder / "config.json", {**provenance, "argv": [a for a in sys.argv[1:]]})
        print(f"{folder}: {args.model_type}, {provenance['parameters']:,} parameters, backbone {backbone.identity} "
              f"(asked for: {asked}), {len(train_demos)} + {len(val_demos)} demonstrations, {len(train_set)} training frames, step {step}")
    logger = RunLogger(folder, args.wandb, provenance, dist.is_main)
    basis = getattr(train_set, "basis", None)
    if basis is not None and dist.is_main:
        logger.log(step, {"rotation/ev_ratio": float(basis.ev_ratio[0])})
        print(f"rotation basis ({basis.space}): one axis explains {basis.ev_ratio[0]:.3f} of the variance, "
              f"{np.degrees(basis.low):.1f} to {np.degrees(basis.high):.1f} deg")
    if dist.is_main and not args.resume:
        share = -(-args.batch_size // dist.world)
        profile = profile_steps(policy, train_set, dist.device, args.precision, share)
        append_jsonl(folder / "profile.jsonl", {"device": dist.device, "rows": profile})
        print(f"{args.max_steps} steps of batch {args.batch_size}: about {expected_minutes(profile, share, args.max_steps):.1f} "
              "minutes of training on this machine as it is now, validation and pictures besides")
    reference = protocol_reference(train_set, recorded)

    module = torch.nn.parallel.DistributedDataParallel(policy) if dist.world > 1 else policy
    module = torch.compile(module) if args.compile else module

    def save(metrics=None):
        if dist.is_main:
            save_state(state_path, policy, optimizer, {**reached, "step": step})
            info = {k: v for k, v in provenance.items() if k != "config"}
            save_policy(folder / "checkpoint.safetensors", policy, args.model_type,
                        {**info, "step": step, **rounded_minutes(), "metrics": metrics or {}}, reference)

    def rounded_minutes():
        return {k: round(reached[k], 4) for k in ("minutes", "validation_minutes")}

    def validated():
        """Metrics on held-out demonstrations; the time that they take is no training."""
        started = time.perf_counter()
        found = validate(policy, val_set, dist.device, limit=args.val_samples)
        reached["validation_minutes"] += (time.perf_counter() - started) / 60
        logger.log(step, {**found, **rounded_minutes()})
        return found

    def report_creep():
        found = finetune.volume_creep(read_jsonl(folder / "metrics.jsonl"), freeze_steps) if freeze_steps else None
        if found:
            tqdm.write(("warning: " if found[1] else "") + found[0])

    bar = tqdm(total=args.max_steps, initial=step, desc="training", unit="step", disable=not dist.is_main)
    metrics = None
    policy.train()
    while step < args.max_steps:
        started = time.perf_counter()
        indices = batch_indices(args.seed, step, len(train_set), args.batch_size)[dist.rank::dist.world]
        rate = learning_rate(args, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = train_set.batch(indices)
        if args.shift_aug > 0:  # drawn from (seed, step), so that a resumed run sees the same
            batch = shifted_sideways(batch, args.shift_aug, np.random.default_rng([args.seed, step, dist.rank]), config.image_size)
        with autocast(dist.device, args.precision):
            parts = module(to_device(batch, dist.device))
        if not torch.isfinite(parts["loss"]):
            raise UserError(f"the loss is {parts['loss'].item()} at step {step}; the last saved state stays, lower --lr")
        optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        if step < freeze_steps:
            finetune.hold_volume(policy)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.clip)
        optimizer.step()
        step += 1
        reached["minutes"] += (time.perf_counter() - started) / 60
        bar.update()
        bar.set_postfix(loss=f"{parts['loss'].item():.2f}", refresh=False)
        if step % 10 == 0 or step == 1:
            logger.log(step, {**{f"train/{k}": v.item() for k, v in parts.items()}, "lr": rate, "grad_norm": float(norm),
                              **rounded_minutes()})
        stopping = dist.all_true(stop.raised)
        if (step % args.val_every == 0 or step == freeze_steps) and not stopping and dist.is_main:
            metrics = validated()
            tqdm.write(f"step {step}: " + ", ".join(f"{k[4:]} {v:.3g}" for k, v in metrics.items()))
            report_creep()
        if step % args.save_every == 0 or stopping:
            save(metrics)
        barrier(dist)
        if stopping:
            bar.close()
            logger.close()
            if dist.is_main:
                print(f"stopped at step {step}, saved; go on with `python train.py --resume {folder}`")
            return
    bar.close()
    if dist.is_main:
        if step % args.val_every or metrics is None:
            metrics = validated()
            report_creep()
        save(metrics)
        plots.loss_curve(read_jsonl(folder / "metrics.jsonl"), folder / "loss.png")
        overlays(policy, val_set, dist.device, folder)
        logger.log(step, free_runs(policy, val_set, folder))
        print(f"{folder}/checkpoint.safetensors: {step} steps, {reached['minutes']:.1f} minutes of training and "
              f"{reached['validation_minutes']:.1f} of validation, "
              + ", ".join(f"{k[4:]} {v:.3g}" for k, v in metrics.items()))
    logger.close()
    if dist.world > 1:
        torch.distributed.destroy_process_group()


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
        plots.trajectory_overlay(images, to_px(batch["eef_pos"].cpu().numpy()[:, None])[:, 0], to_px(batch["target_pos"].cpu().numpy()),
                                 to_px(out["position"].double().cpu().numpy()), dataset.frame[rows], folder / f"overlay_{episode}.png")
        last = whole["valid"].sum(1).cpu() - 1 if "valid" in whole else None
        if hasattr(policy, "attention"):
            heat = policy.attention(whole)[torch.arange(len(rows)), last].float().cpu().numpy()
            plots.attention_overlay(images, heat, dataset.frame[rows], folder / f"attention_{episode}.png")
        if hasattr(policy, "distribution"):
            volumes = policy.distribution(whole)[torch.arange(len(rows)), last].cpu().numpy()
            plots.volume_projections(images, volumes, dataset.frame[rows], folder / f"volume_{episode}.png")


def free_runs(policy, dataset, folder, n_episodes=3):
    """Open-loop rollouts on validation episodes, own predictions fed back, drawn over the first image -> {"free/coverage_8px" ...}."""
    found = []
    for episode, demo in enumerate(tqdm(dataset.demos[:n_episodes], desc="free-running", unit="demo")):
        found.append(free_run(policy, dataset.path, demo, dataset.config))
        plots.paths_overlay(dataset._images(demo.name, [0])[0], to_pixels(found[-1]["path"], demo.K, demo.E),
                            {demo.name: rollout_line(found[-1]["predicted"], demo)}, folder / f"rollout_{episode}.png")
    row = {k: round(v, 5) for k, v in rollout_summary(found).items()}
    print("free-running on validation demonstrations: " + ", ".join(f"{k} {v:.3g}" for k, v in row.items()))
    return {f"free/{k}": v for k, v in row.items()}


if __name__ == "__main__":
    run_script(lambda: train(*parse_args()))
