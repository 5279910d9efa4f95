"""Train a policy.

python train.py --model_type para     # default dataset, collected first where it is missing
python train.py --max_steps 2500 --seed 1 --dataset data/x.hdf5   # or a folder of several
python train.py --resume runs/NAME    # go on after a kill or Ctrl-C
torchrun --nproc_per_node 2 train.py --model_type para
"""

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout

import canonical
import flags
from data import check_cells, check_shift
from figures import heldout, plots
from formats import demos as demo_files
from formats.mixture import open_mixture
from harness import finetune, run_folder
from harness.hints import hints
from harness.proof import prove_pictures
from harness.recipe import Recipe
from harness.records import RESUME, read_metrics
from harness.reference import protocol_references
from harness.trainer import Trainer, spoken
from nets.backbone import Backbone, resolve_backbone
from nets.text import reader_of, vocabulary_of, words_of
from policy import add_config_flags
from registry import REGISTRY, look_up
from runtime import (
    RunLogger,
    StopSignal,
    UserError,
    append_jsonl,
    choose_device,
    choose_precision,
    command_line,
    git_commit,
    init_distributed,
    read_json,
    run_script,
    use_huge_pages,
    versions,
)
from sim import settings

DEFAULT_DATASET = Path("data/libero_spatial_0.hdf5")
BUDGETS_ARE_STEPS = (
    "budgets are steps, so that a slower machine ends with the same policy; give --max_steps N. "
    "To stop early press Ctrl-C or send SIGTERM: the run is saved, and --resume goes on"
)


# attributes of the dataset that a checkpoint keeps
ABOUT = (
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
    "render",
)
# what --help shows; --help_all shows the rest
FIRST = "model_type dataset out preset max_steps batch_size lr backbone seed device"


class RefuseMinutes(argparse.Action):
    """Refuses --max_minutes, a flag of an earlier version, with one sentence."""

    def __call__(self, parser, namespace, values, option_string=None):
        raise UserError(f"--max_minutes {values}: {BUDGETS_ARE_STEPS}")


def build_parser(config_class=None):
    """Flags of a training; with a policy's config class, that policy's own too."""
    parser = flags.Parser(__doc__, first=FIRST)
    add_run_flags(parser.add_argument_group("run"))
    add_data_flags(parser.add_argument_group("data"))
    add_training_flags(parser.add_argument_group("training"))
    # one flag for each field of the policy's config, see policy.flag
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
    what = "LIBERO-format HDF5, or a folder: smith300, LeRobot, or of several such"
    default = [DEFAULT_DATASET]
    add("--dataset", type=Path, nargs="+", default=default, help=f"{what} ({DEFAULT_DATASET})")
    add("--task", help="LeRobot: train on this task alone, its index or words of its instruction")
    what = "LeRobot: do not compare its pictures with the simulator's, see sim/picture_proof.py"
    add("--trust_pictures", action="store_true", help=what)
    add("--n_demos", type=flags.count, help="use only the first N demonstrations of a dataset")
    what = "share of each task's demonstrations held out"
    add("--val_fraction", type=flags.held_out, default=0.15, help=what)
    what = "train on every k-th frame of a demonstration"
    add("--frame_stride", type=flags.count, default=2, help=what)
    what = "train on each demonstration's reflection in the robot's plane of symmetry too"
    add("--mirror", action="store_true", help=what)
    what = "train on images moved sideways by up to so many pixels, each by its own"
    add("--shift_aug", type=flags.not_negative, default=0, metavar="PX", help=what)
    what = "turn each demonstration's world back by what its camera was turned (--turn_spread)"
    add("--turn_back", action="store_true", help=what)
    add("--backbone_weights", type=Path, help="local file of backbone weights")
    add("--text_weights", type=Path, help="local folder of the frozen text model, see --text")
    default = Path("cache/features")
    add("--cache", type=flags.new_folder, default=default, help="folder of cached features")
    what = "compute the features that this training needs, and stop"
    add("--cache_only", action="store_true", help=what)


def add_training_flags(group):
    """How long, how fast, and from which weights on."""
    add = group.add_argument
    add("--max_steps", type=flags.count, default=500, help="steps in all (the preset's)")
    add("--max_minutes", action=RefuseMinutes, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    what = "samples a step, over all processes (the preset's)"
    add("--batch_size", type=flags.count, default=16, help=what)
    add("--lr", type=flags.positive, default=1e-3, help="highest learning rate (the preset's)")
    what = "steps of linear warm-up, then a cosine to zero (30, or the preset's)"
    add("--warmup", type=flags.whole, default=30, help=what)
    add("--weight_decay", type=flags.not_negative, default=0.01, help="of AdamW")
    add("--clip", type=flags.positive, default=1.0, help="largest gradient norm")
    what = "steps between validations (the preset's, more in a longer training)"
    add("--val_every", type=flags.count, default=100, help=what)
    what = "frames that a validation looks at, a third as many windows"
    add("--val_samples", type=flags.count, default=400, help=what)
    what = "end after N validations without a lower error, keep the best weights (0: never)"
    add("--patience", type=flags.whole, default=0, metavar="N", help=what)
    what = "with --patience: steps at the end in which the learning rate goes to zero"
    add("--cooldown", type=flags.whole, default=0, help=what)
    what = "steps between checkpoints (100, or the preset's)"
    add("--save_every", type=flags.count, default=100, help=what)
    what = "finetune: start from this checkpoint's tensors that fit by name and shape"
    add("--init_from", type=Path, metavar="CKPT", help=what)
    what = "with --init_from: steps in which the volume head stays as it is (v7 and D: 500)"
    add("--freeze_steps", type=flags.whole, help=what)


def add_preset_flag(group, presets):
    """Add --preset. The help lists above it what each preset sets."""
    sizes = []
    for name, values in presets.items():
        words = " ".join(f"--{flag} {value}" for flag, value in values.items())
        sizes.append(f"{name}: {words or 'the defaults'}")
    group.description = "\n".join(sizes)
    what = "sizes; auto: full on a GPU, small without"
    group.add_argument("--preset", choices=["auto", *presets], default="auto", help=what)


def parse_args(argv=None):
    """Flags -> (args, config class). --model_type first: it decides which others there are."""
    argv = sys.argv[1:] if argv is None else list(argv)
    plain = [word for word in argv if word not in ("-h", "--help", "--help_all")]
    # without --help, which would be about a parser that knows no policy's flags
    first, _ = build_parser().parse_known_args(plain)
    if first.resume:
        run_folder.refuse_other_flags(argv)
        return resumed_args(first.resume)
    config_class = look_up(first.model_type).config
    return with_preset(build_parser(config_class), argv), config_class


def resumed_args(run):
    """`parse_args` for --resume: the flags of the command that began the run folder.

    Raises UserError for a folder that holds no run that can go on.
    """
    stored = run / "config.json"
    if not stored.is_file():
        raise UserError(f"--resume {run}: no {stored}, so this is no run folder")
    values = read_json(stored, "run of train.py", "train again with another --out", RESUME)
    argv = values["argv"]
    if any(word.startswith("--max_minutes") for word in argv):
        raise UserError(
            f"--resume {run}: was started with --max_minutes, and {BUDGETS_ARE_STEPS}; "
            "its checkpoint.safetensors still loads, train anew to go further"
        )
    # auto may mean another one by now
    if "preset" in values["args"]:
        argv = [*argv, "--preset", values["args"]["preset"]]
    # the command is parsed again as it was typed: paths, and flags that the run does not know yet
    config_class = look_up(values["args"]["model_type"]).config
    args = with_preset(build_parser(config_class), argv)
    args.resume = args.out = run
    run_folder.as_begun(args, values, config_class)
    return args, config_class


def with_preset(parser, argv):
    """Parse flags on top of the defaults that the model's --preset sets."""
    # once to learn which preset is asked for
    args = parser.parse_args(argv)
    if "preset" not in args:
        return args
    preset = args.preset
    if preset == "auto":
        preset = "full" if choose_device(args.device).startswith("cuda") else "small"
    # what is typed wins over the preset: it is read again, over other defaults
    parser.set_defaults(**look_up(args.model_type).config.presets[preset])
    every, steps = parser.get_default("val_every"), parser.parse_args(argv).max_steps
    often = max(10, parser.get_default("max_steps") // every)  # validations are no more than this
    parser.set_defaults(val_every=max(every, steps // often))
    args = parser.parse_args(argv)
    args.preset = preset
    print(f"--preset {preset}")
    return args


# -- what is trained on ---------------------------------------------------------------------------


class Prepared(NamedTuple):
    """What a training is about, before there is a policy."""

    config: object
    backbone: Backbone
    backbone_asked: str
    train_set: object
    val_set: object
    train_demos: int
    val_demos: int
    recordings: object  # the Mixture
    reference: dict  # tensors of `protocol_references`
    reader: object  # of instructions, None where the policy is told none


def prepare(args, config_class, device, progress):
    """Demonstrations, backbone and their features -> Prepared. Raises UserError for what cannot be
    trained on.
    """
    if args.resume:
        run_folder.check_there(args.resume, args.dataset)
    else:
        ensure_dataset(args.dataset)
    if args.freeze_steps and not (args.init_from or args.resume):
        raise UserError("--freeze_steps: is of --init_from, which is not given; leave it out")
    # each step may refuse, so the cheap ones come first: data, config, split, then features
    config = config_class(**{f: getattr(args, f) for f in config_class.__dataclass_fields__})
    recordings = open_mixture(args.dataset, config.image_size, args.n_demos, args.task)
    recordings.check_frames(args.frame_stride)
    if args.resume:
        run_folder.check_same_data(args.resume, recordings.described())
    config = config_for(args, config, recordings)
    train_demos, val_demos = demo_files.split_demos(recordings.demos, args.val_fraction)
    n_train, n_val, recorded = len(train_demos), len(val_demos), list(train_demos)
    config, reader = told(config, recordings, args)
    # before any feature is computed, which takes minutes
    dataset_class = look_up(args.model_type).dataset
    config = dataset_class.located(config, recordings.demos)
    dataset_class.check_split(train_demos, config)
    # once: in the first process, of a run that begins
    if progress and not args.resume and not args.trust_pictures:
        prove_pictures(recordings.datasets, args.task, args.n_demos)

    # the same demonstrations in a moved world; reflections are not validated on
    if args.turn_back:
        upright = lambda demo: demo_files.turned_back(demo, settings.unturned(demo.attrs))
        train_demos, val_demos = (list(map(upright, part)) for part in (train_demos, val_demos))
    if args.mirror:
        train_demos = train_demos + [demo_files.mirrored(demo) for demo in train_demos]

    # "auto" becomes a name and "fit" a view here, which the checkpoint stores
    asked, fast = config.backbone, recordings.attributes.get("render") == "fast"
    config = dataclasses.replace(config, backbone=resolve_backbone(asked, args.backbone_weights))
    backbone = Backbone(config.backbone, config.image_size, args.backbone_weights, fused=fast)
    backbone = backbone.to(device)
    if args.resume:
        run_folder.check_same_backbone(args.resume, backbone.identity)
    else:  # a run that was begun before this was refused goes on
        check_cells(config.image_size, backbone.grids)
        check_shift(args.shift_aug, config.image_size, backbone.grids)
    if args.init_from:
        policy_class = look_up(args.model_type).policy
        asked = None if args.resume and not policy_class.holds_volume else args.freeze_steps
        args.freeze_steps = finetune.freeze_steps(asked, policy_class)
        if not args.resume:
            config = finetune.checked(args.init_from, config, backbone.identity)
    measured = [demo_files.measured(demo, config.heights) for demo in train_demos]
    view = canonical.resolved(config.canonical_view, measured)
    config = dataclasses.replace(config, canonical_view=view)
    look_up(args.model_type).policy(config, backbone.channels)  # sizes that do not go together
    # label, then compute or read features
    train_set, val_set = (
        dataset_class(demos, config, backbone, args.frame_stride, args.cache, progress, reader)
        for demos in (train_demos, val_demos)
    )
    for sentence in hints(train_set) if progress else []:
        print(sentence)
    references = protocol_references(recorded)
    return Prepared(
        config, backbone, asked, train_set, val_set, n_train, n_val, recordings, references, reader
    )


def told(config, recordings, args):
    """What the policy is told -> (the config with --text resolved, the reader of instructions).

    Instructions are learned where the data have several. Raises UserError where one is missing, and
    for --mirror where one says left or right.
    """
    sentences = list(dict.fromkeys(demo.instruction for demo in recordings.demos))
    asked = getattr(config, "text", "none")
    if asked == "none" or asked == "auto" and len(sentences) == 1:
        return config if asked == "none" else dataclasses.replace(config, text="none"), None
    if "" in sentences:
        silent = next(demo for demo in recordings.demos if not demo.instruction)
        raise UserError(
            f"{silent.source.path}: does not say what was asked for (attribute 'language'), which "
            "--text needs; add it, or give --text none"
        )
    if args.mirror and (sided := [s for s in sentences if {"left", "right"} & set(words_of(s))]):
        raise UserError(
            f"--mirror: {sided[0]!r} would be said of the other side; leave it out, or give "
            "--text none"
        )
    text = "learned" if asked == "auto" else asked
    words = config.vocabulary or vocabulary_of(sentences)
    config = dataclasses.replace(config, text=text, vocabulary=words if text == "learned" else "")
    reader = reader_of(config, args.text_weights)
    if text != "learned":
        config = dataclasses.replace(config, text_features=reader.features)
    return config, reader


def config_for(args, config, recordings):
    """The config for a Mixture. Raises UserError where the two do not go together."""
    for dataset in recordings.datasets:
        if dataset.attributes.get("part") == "val":
            raise UserError(
                f"{dataset.path}: holds validation conditions (--part val), by which trained "
                "policies are judged; collect it without that flag"
            )
    moved = "--mirror" if args.mirror else "--turn_back" if args.turn_back else None
    if moved and config.rotation == "pca":
        raise UserError(
            f"{moved}: turns rotations away from those that the principal axis was computed from; "
            "leave it out, or give --rotation euler"
        )
    # a demonstration of lift_once ends by staying: that is an answer to be trained
    if recordings.attributes.get("variant") != "lift_once" or config.stay:
        return config
    print(
        f"{named(args.dataset)}: its demonstrations end by staying where they are, "
        "so that is trained too (--stay)"
    )
    return dataclasses.replace(config, stay=True)


def named(paths):
    """Paths as they are typed, with spaces between them."""
    return " ".join(map(str, paths))


def ensure_dataset(paths):
    """Collect the default dataset if it is asked for alone and missing."""
    path = DEFAULT_DATASET
    if paths == [path] and not path.is_file():
        print(f"{path} is not there yet: collecting it (48 demonstrations, several minutes)")
        collect = Path(__file__).with_name("collect_demos.py")
        if subprocess.run([sys.executable, collect, "--out", path]).returncode:
            raise UserError(f"{path}: was not collected, for the reason above; mend it, then again")


def first_alone(dist, lock, make):
    """Call `make(progress)` in one process of a torchrun job first, then in the others.

    Returns its result. The first fills the caches while the others wait at a file lock. In a
    barrier they would give up after ten minutes, while the first one still collects.
    """
    if dist.world == 1:
        return make(True)
    lock.parent.mkdir(parents=True, exist_ok=True)
    # whoever gets the lock is the first
    try:
        with FileLock(lock, timeout=0):
            return make(True)
    except Timeout:
        # the first one is at work, and done when the lock is free
        with FileLock(lock):
            pass
        return make(False)


# -- the training ---------------------------------------------------------------------------------


def train(args, config_class):
    """Prepare, build, fit, finish."""
    dist = init_distributed(args.device)
    # features are no run: its folder may be that of one
    where = args.out, args.model_type, args.resume
    folder = None if args.cache_only else run_folder.chosen(*where)
    lock = args.cache / f"{args.dataset[0].name}.lock"
    # what is trained on
    found = first_alone(
        dist, lock, lambda progress: prepare(args, config_class, dist.device, progress)
    )
    if args.cache_only:
        n_samples = f"{len(found.train_set)} + {len(found.val_set)} samples"
        print(f"{args.cache}: features of {n_samples}, backbone {found.backbone.identity}")
        return
    recipe = resolve(args, found, dist)
    # from here on a process waits for the others
    dist.join()
    # the training itself, then pictures, or a word on how to go on
    trainer = build(recipe, found, dist, folder, args)
    folder = trainer.folder
    if dist.is_main:
        announce(trainer, args.resume)
    with StopSignal() as stop:
        done = trainer.fit(stop)
    if dist.is_main and done:
        finish(trainer)
    elif dist.is_main:
        again = f"python train.py --resume {folder}"
        print(f"stopped at step {trainer.step}, saved; go on with `{again}`")
    trainer.logger.close()
    dist.leave()


def resolve(args, found, dist):
    """What was typed, with every "auto" resolved -> Recipe.

    Raises UserError for a batch that is too small for the processes.
    """
    # no batch is larger than the data
    batch_size = min(args.batch_size, len(found.train_set))
    if batch_size < dist.world:
        raise UserError(
            f"--batch_size {args.batch_size}: {batch_size} samples a step for {dist.world} "
            "processes; start fewer, or give a larger batch and more demonstrations"
        )
    # most flags are taken as they were typed
    names = {field.name for field in dataclasses.fields(Recipe)}
    typed = {name: value for name, value in vars(args).items() if name in names}
    came_to = {
        "preset": getattr(args, "preset", None),
        "dataset": named(args.dataset),
        "train_demos": found.train_demos,
        "val_demos": found.val_demos,
        "train_frames": len(found.train_set),
        "backbone": found.backbone.identity,
        "text": getattr(found.config, "text", "none"),
        "init_from": str(args.init_from) if args.init_from else None,
        "freeze_steps": (args.freeze_steps or 0) if args.init_from else 0,
        "batch_size": batch_size,
        "device": dist.device,
        "precision": choose_precision(dist.device, args.precision),
        "processes": dist.world,
    }
    return Recipe(**{**typed, **came_to})


def provenance(args, found, recipe):
    """Where a run comes from, JSON-able: for its config.json, its checkpoints and wandb."""
    # of the dataset: what it is, and the simulator that its physics comes from
    said = found.recordings.attributes
    about = {key: str(said[key]) for key in ABOUT if key in said}
    about["versions"] = demo_files.simulated_with(said)
    about["renderer"] = demo_files.drawn_by(said)
    typed = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    sentences = found.recordings.sentences
    return {
        "args": {**typed, "dataset": named(args.dataset)},
        "config": dataclasses.asdict(found.config),
        "command": command_line(),
        "commit": git_commit(),
        "versions": versions(),
        "seed": recipe.seed,
        "dataset": about,
        "datasets": found.recordings.described(),
        "tasks": {task: words[0] for task, words in sentences.items()},
        **({"sentences": sentences} if any(len(w) > 1 for w in sentences.values()) else {}),
        "turned": found.recordings.turned(),
        "train_demos": recipe.train_demos,
        "val_demos": recipe.val_demos,
        "train_frames": recipe.train_frames,
        "backbone_asked": found.backbone_asked,
        "backbone_identity": recipe.backbone,
        "resolved": dataclasses.asdict(recipe),
    }


def build(recipe, found, dist, folder, args):
    """The policy and all that trains it -> Trainer, at the step that the run folder has reached."""
    torch.manual_seed(recipe.seed)  # for the first weights; the trainer seeds each step anew
    policy_class = look_up(recipe.model_type).policy
    policy = policy_class(found.config, found.backbone.channels)
    policy = policy.attach(found.backbone, found.reader)
    policy = policy.to(dist.device)
    # normalisation before a checkpoint's tensors: --init_from replaces some of it
    policy.fit_statistics(found.train_set.statistics())
    # a run that was killed before its first save begins again
    weights = recipe.init_from, folder, (folder / run_folder.STATE).exists()
    begun = finetune.begin(policy, *weights) if recipe.init_from else {}

    # config.json is written once, when a run begins: --resume reads it
    record = {**provenance(args, found, recipe), **begun}
    record["parameters"] = sum(p.numel() for p in policy.parameters())
    if dist.is_main and not args.resume:
        if args.out:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = run_folder.claimed(folder)
        run_folder.begin(folder, {**record, "argv": sys.argv[1:]})
    logger = RunLogger(folder, args.wandb, record, dist.is_main)
    # a checkpoint has its policy's own config
    save_info = {key: value for key, value in record.items() if key != "config"}
    data = (found.train_set, found.val_set)
    trainer = Trainer(policy, *data, recipe, dist, folder, logger, save_info, found.reference)
    if args.resume:
        trainer.resume()
    return trainer


def announce(trainer, resume):
    """Say what is trained on what, and for how long."""
    folder, parameters = trainer.folder, trainer.save_info["parameters"]
    if trainer.policy.reader:
        tasks, sentences = trainer.save_info["tasks"], trainer.save_info.get("sentences", {})
        more = f", {sum(map(len, sentences.values()))} sentences in their scenes" * bool(sentences)
        print(f"{len(tasks)} tasks{more}, told by --text {trainer.policy.config.text}")
    print(f"{folder}: {parameters:,} parameters, step {trainer.step}\n{trainer.recipe}")
    # of policies with a 1D rotation target
    basis = getattr(trainer.train_set, "basis", None)
    if basis is not None:
        explained = float(basis.ev_ratio[0])
        trainer.logger.log(trainer.step, {"rotation/ev_ratio": explained})
        print(
            f"rotation basis ({basis.space}): one axis explains {explained:.3f} of the variance, "
            f"{np.degrees(basis.low):.1f} to {np.degrees(basis.high):.1f} deg"
        )
    if not resume:
        row = {"device": trainer.dist.device, "rows": trainer.estimate()}
        append_jsonl(folder / "profile.jsonl", row)


def finish(trainer):
    """Last validation, checkpoint and pictures."""
    folder, policy, val_set = trainer.folder, trainer.policy, trainer.val_set
    trainer.finish()
    plots.loss_curve(read_metrics(folder), folder / "loss.png")
    heldout.overlays(policy, val_set, trainer.dist.device, folder)
    trainer.logger.log(trainer.step, heldout.free_runs(policy, val_set, folder))
    steps = f"{trainer.step} steps"
    if trainer.recipe.patience:
        steps += f", the weights of step {trainer.best_step}"
    print(
        f"{folder}/checkpoint.safetensors: {steps}, {trainer.minutes:.1f} minutes of "
        f"training and {trainer.validation_minutes:.1f} of validation, {spoken(trainer.metrics)}"
    )


def main():
    use_huge_pages()
    train(*parse_args())


if __name__ == "__main__":
    run_script(main)
