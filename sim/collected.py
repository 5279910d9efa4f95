"""What a collection's flags come to: what was not given, refusals, the name of the file."""

from pathlib import Path

from formats.dataset import open_dataset
from runtime import UserError
from sim import instructions, recipe, settings
from sim.expert import default_grasp
from sim.tasks import find_task


def holds_fewer(out, args):
    """Whether one of several tasks' files holds fewer demonstrations than are asked for, by flags
    that its folder's stamp has: the others are recorded behind them. Raises UserError where it
    holds more, and of formats that cannot be taken apart.
    """
    if args.overwrite or args.n_demos is None or not out.exists():
        return False
    there = len(open_dataset(out))
    if there > args.n_demos:
        raise UserError(
            f"{out}: holds {there} demonstrations, --n_demos {args.n_demos} asks for fewer; train "
            "on so many with train.py --n_demos, or give another --out"
        )
    if there < args.n_demos and args.format != "libero":
        raise UserError(
            f"{out}: holds {there} demonstrations, and more cannot be put behind them in --format "
            f"{args.format}; give another --out and another --seed, and train on both"
        )
    return there < args.n_demos


def fill_spreads(args):
    """Set --start_spread, --turn_spread, --loose_camera and --mistake_rate where they were not
    given: nothing is varied, but by the recipe. Raises UserError for a --layout_spread beside its
    places, a loose camera without it, mistakes that no expert makes good.
    """
    of_recipe = args.setting == "recipe" and not args.replay
    if of_recipe and args.layout_spread:
        raise UserError(
            f"--layout_spread {args.layout_spread}: --setting recipe draws each object's place "
            "from a whole half of the table; leave it out"
        )
    if args.loose_camera and not of_recipe:
        raise UserError("--loose_camera: only --setting recipe has it; give that, or leave it out")
    makes_good = args.grasp != "rim" and args.variant == "task"
    if args.mistake_rate and not makes_good:
        raise UserError(
            f"--mistake_rate {args.mistake_rate}: only the grasps `side` and `planned` of the task "
            f"itself make a mistake good, this is {args.grasp!r} of {args.variant!r}; leave it out"
        )
    for name, usual in (
        ("start_spread", recipe.START_SPREAD),
        ("turn_spread", recipe.TURN_SPREAD),
        ("loose_camera", recipe.LOOSE_CAMERA),
        ("mistake_rate", recipe.MISTAKE_RATE),
    ):
        if getattr(args, name) is None:
            usable = of_recipe and (makes_good or name != "mistake_rate")
            setattr(args, name, usual[args.part] if usable else 0.0)


def usual_grasp(args):
    """The grasp where none was given: the task's. For a replay `side`, until its file is read, as
    `sim.replay.take_from_replayed` does.
    """
    if args.replay:
        return "side"
    task = find_task(args.task_suite or "libero_spatial", args.task_id)
    request = instructions.request(task, args.instruction_of)
    return default_grasp(request.task if request else task, args.variant)


def chosen_stride(args):
    """Every how many frames an image is stored. The default is what training reads, and every
    frame with `--grasp rim`, whose study of rotations looks at all of them.

    Raises UserError for a stride above 1 with smith300 and lerobot, which hold every frame.
    """
    if args.format == "libero":
        return args.frame_stride or (1 if args.grasp == "rim" else 2)
    if (args.frame_stride or 1) > 1:
        raise UserError(
            f"--frame_stride {args.frame_stride}: a {args.format} episode holds every frame; "
            "leave it out, or give --format libero"
        )
    return 1


def file_name(args):
    """Name of the dataset where --out is not given: its task and what differs from the defaults."""
    words = [f"{args.task_suite or 'libero_spatial'}_{args.task_id}"]
    if args.replay:
        words = [Path(args.replay).stem, "replayed"]
    if args.grasp != usual_grasp(args):
        words.append(args.grasp)
    if args.variant != "task":
        words.append(args.variant)
    if args.setting != "in_dist":
        words.append(args.setting)
        if args.split != settings.SPLITS[args.setting][0]:
            words.append(args.split)
    if args.instruction_of is not None:
        words.append(f"told_{args.instruction_of}")
    if args.part != "train":
        words.append("val")
    return "_".join(words) + (".hdf5" if args.format == "libero" else f"_{args.format}")


def check_told(args, task):
    """Raise UserError for a collection in a Task's scene whose sentence cannot be recorded."""
    if args.instruction_of is None:
        return
    if args.instruction_share > 1:
        raise UserError(f"--instruction_share {args.instruction_share}: give a share, at most 1")
    if args.format == "smith300":
        raise UserError(
            "--instruction_of: a smith300 episode says no sentence; give --format libero or lerobot"
        )
    if args.clean_scene is not False:
        raise UserError(
            "--instruction_of: the clean scene has the task's own objects alone; give "
            "--no-clean_scene"
        )
    instructions.request(task, args.instruction_of)
    n = len(settings.conditions(args.setting, args.part, args.split))
    told = [instructions.is_told(i, args.instruction_share) for i in range(args.n_demos)]
    seen = [{i % n for i, one in enumerate(told) if one == said} for said in (True, False)]
    if n > 1 and all(seen) and not seen[0] & seen[1]:
        raise UserError(
            f"--instruction_share {args.instruction_share}: of the {n} conditions of --setting "
            f"{args.setting}, taken in turn, each would be seen with one of the two sentences "
            "alone, and give away which; give another share"
        )
