"""Demonstrations from the real simulator, in LIBERO's HDF5 layout with cameras.

    # the scripted expert, libero_spatial task 0; then a long free-space movement
    python collect_demos.py --n_demos 48
    python collect_demos.py --task_suite libero_goal --task_id 4
    # training views of sim/settings.py (position: training positions); only a picture of them
    python collect_demos.py --setting viewpoint
    python collect_demos.py --setting viewpoint --show views.png
    # one dataset for every column: bowl, plate, camera and start each drawn by itself
    python collect_demos.py --setting recipe --n_demos 192 --render fast
    # any task, each demonstration's camera drawn by itself
    python collect_demos.py --task_suite libero_object --task_ids all --setting cameras
    # grasps around the rim: yaw varies with the objects; the same as real-robot episodes
    python collect_demos.py --grasp rim --layout_spread 0.05
    python collect_demos.py --grasp rim --format smith300
    # as a LeRobot dataset, see docs/lerobot_data.md
    python collect_demos.py --format lerobot
    # needs memory: lift once, put back, stay
    python collect_demos.py --variant lift_once --n_demos 40
    # official states, re-rendered, cameras added; a folder of files, or some of its tasks
    python collect_demos.py --replay OFFICIAL.hdf5 --image_size 448
    python collect_demos.py --replay FOLDER --task_ids 0,3 --out REPLAYED
    # the same demonstrations before other cameras; another --seed, others again
    python collect_demos.py --replay FOLDER --setting cameras --seed 1 --out MOVED
    # every task of a suite, a file each
    python collect_demos.py --task_suite libero_object --task_ids all --n_demos 20
    # every second one picks what another task's sentence says here, see docs/instructions.md
    python collect_demos.py --task_suite libero_spatial --task_ids all --instruction_of other
    # the expert's success rate on every task
    python collect_demos.py --survey libero_spatial

Each finished demo is its own file in OUT.parts until all are there; a killed run goes on from them.
"""

import argparse
import json
import shutil
from collections import Counter
from pathlib import Path

from tqdm import tqdm

import flags
from figures import plots_recipe, plots_settings
from formats import lerobot_writer, libero_hdf5
from formats.parts import (
    check_replaceable,
    gather,
    merge,
    part_path,
    readable,
    refuse_fewer,
    take_apart,
)
from runtime import UserError, command_line, read_json, run_script, write_json
from sim import collected, instructions, recipe, settings
from sim.cameras import RENDERS
from sim.expert import EXPERTS
from sim.libero_env import Scene
from sim.placement import JOINT_JITTER
from sim.recording import ExpertWorker
from sim.replay import (
    SETTINGS,
    ReplayWorker,
    files_of,
    is_finished,
    settings_text,
    take_from_replayed,
)
from sim.simulator import simulator_versions
from sim.tasks import chosen_tasks, env_metadata, find_task
from sim.variants import VARIANTS, new_expert
from sim.workers import TIMEOUT, run_jobs

# flags that nothing but a survey reads: giving them elsewhere is an error
SURVEY_ALONE = ("first_state", "layouts")
# flags that do not decide what a demonstration holds: a run may be finished with others
FREE = (
    "workers",
    "timeout",
    "out",
    "n_demos",
    "overwrite",
    "show",
    "task_ids",
    *("survey", *SURVEY_ALONE),
)
# flags that a survey reads: giving others is an error
SURVEYED = (
    *("survey", "task_ids", "n_demos", *SURVEY_ALONE),
    *("grasp", "instruction_of", "workers", "timeout"),
)
# flags that a replay takes from its file or does not need: giving one is an error
NOT_REPLAYED = (
    "format",
    "grasp",
    "variant",
    "setting",
    "part",
    "split",
    "start_jitter",
    "start_spread",
    "turn_spread",
    "loose_camera",
    "mistake_rate",
    "push_rate",
    "layout_spread",
    "video",
    *("instruction_of", "instruction_share"),
)


def show(args):
    """Draw every condition of a setting, rendered, into one picture."""
    if args.setting == "in_dist":
        raise UserError("--show: in_dist has one condition only; give another --setting")
    if args.setting == "recipe":
        plots_recipe.draw(args.show, args.turn_spread)
        print(args.show)
        return
    # objects as in the first init state, from which the picture varies view or positions
    suite = args.task_suite or "libero_spatial"
    scene = Scene(suite, args.task_id, args.image_size, args.clean_scene, render=args.render)
    scene.begin_episode(scene.init_states()[0])
    plots_settings.PICTURES[args.setting](scene, args.split, args.show)
    scene.close()
    for part in settings.PARTS if args.setting != "cameras" else ():
        n_conditions = len(settings.conditions(args.setting, part, args.split))
        print(f"{args.setting} {args.split}, {part}: {n_conditions} conditions")
    for part, c, why in settings.excluded(args.split) if args.setting == "viewpoint" else ():
        print(f"excluded from {part}: theta {c.theta:.1f}, phi {c.phi:.1f} deg, {why}")
    print(args.show)


def default_number(args):
    """How many demonstrations are collected where --n_demos is not given.

    The smallest multiple of the number of training conditions that is at least 48, so that each is
    covered equally often. Validation conditions are covered once each. The recipe has numbers of
    its own, as nothing of it is covered twice.
    """
    if args.setting == "recipe":
        return recipe.N_DEMOS[args.part]
    n_conditions = len(settings.conditions(args.setting, args.part, args.split))
    rounds = 1 if args.part == "val" else -(-48 // n_conditions)  # rounded up
    return n_conditions * rounds


def asked_of(args, mujoco):
    """The settings that decide what demonstrations hold."""
    asked = {k: v for k, v in vars(args).items() if k not in FREE}
    if args.instruction_of is None:  # folders from before it was there go on
        del asked["instruction_of"], asked["instruction_share"]
    if not args.moved_anew:  # likewise
        del asked["moved_anew"]
    if args.replay:  # likewise: its grasp is the recording's, and decides nothing
        asked["grasp"] = "side"
    return {**asked, "mujoco": mujoco}  # one file, one physics


def claim(folder, args, mujoco):
    """Make the folder of finished parts, or go on with it. mujoco: the installed version.

    Raises UserError where the folder holds parts of other settings, or is something else.
    """
    asked = asked_of(args, mujoco)
    stamp = folder / "settings.json"
    again = "finish it with the same command, or give another --out"
    if folder.exists() and not stamp.exists():
        raise UserError(
            f"{folder}: is no folder of parts, it has no settings.json; "
            "remove it, or give another --out"
        )
    if stamp.exists() and read_json(stamp, "folder of parts", again) != asked:
        raise UserError(f"{folder}: holds parts of a run with other settings; {again}")
    write_json(stamp, asked)


def record_missing(args, task, folder):
    """Record the demonstrations that the folder lacks -> Counter of what was filtered out, by all
    runs. Raises UserError where demonstrations fail; the others stay.
    """
    # the counts of earlier runs go on
    tally, counts = folder / "counts.json", Counter()
    if tally.exists():
        remedy = "remove that file, it only counts"
        counts.update(read_json(tally, "folder of parts", remedy, {...: int}))
    jobs = [i for i in range(args.n_demos) if not readable(part_path(folder, i, args.format))]
    bar = tqdm(
        total=args.n_demos,
        initial=args.n_demos - len(jobs),
        desc=f"demonstrations of {task.key}",
        unit="demo",
    )
    # a failed demonstration does not end the others: the failures are reported at the end
    worker = ReplayWorker if args.replay else ExpertWorker
    failures = []
    for outcome in run_jobs(jobs, worker, (args, str(folder)), args.workers, timeout=args.timeout):
        if outcome.error:
            failures.append(outcome.error.strip().splitlines()[-1])
            tqdm.write(f"demo {outcome.job} failed: {failures[-1]}")
            continue
        counts.update(outcome.result)
        write_json(tally, counts)
        bar.update()
    bar.close()
    if failures:
        raise UserError(
            f"{len(failures)} of {args.n_demos} demonstrations failed, first: {failures[0]}; "
            f"the others are kept in {folder}, the same command resumes"
        )
    return counts


def file_attributes(args, task, made_with, simulated):
    """The attributes of the finished dataset. made_with: {package: version} here; simulated: that
    of a replayed file's states.
    """
    of_this_program = {
        **({"grasp": args.grasp} if args.grasp else {}),
        "variant": args.variant,
        "setting": args.setting,
        "part": args.part,
        "split": args.split or "",
        "render": args.render,
    }
    # each demonstration says which sentence
    if args.instruction_of is not None:
        of_this_program["instruction_of"] = args.instruction_of
        of_this_program["instruction_share"] = args.instruction_share
    # of the recipe each demonstration says it
    if args.clean_scene is not None:
        of_this_program["clean_scene"] = args.clean_scene
    attributes = libero_hdf5.file_attributes(
        task, {**env_metadata(task), **of_this_program}, args.seed, command_line(), made_with
    )
    if args.replay:
        attributes["replayed_versions"] = json.dumps(simulated)
        attributes[SETTINGS] = replay_settings(args, made_with["mujoco"])
    return attributes


def replay_settings(args, mujoco):
    """What a replayed file says of how it was made; with its number, as it may be of the first
    demonstrations alone.
    """
    return settings_text({**asked_of(args, mujoco), "n_demos": args.n_demos})


def replay(args):
    """Replay the files of --replay, each into a file of its own. One that is finished stays; one
    that fails does not end the others.
    """
    chosen = None if args.task_ids in (None, "all") else args.task_ids
    files = files_of(args.replay, chosen)
    if len(files) == 1 and args.task_ids is None and files == [Path(p) for p in args.replay]:
        args.replay = str(files[0])
        args.out = args.out or f"data/{collected.file_name(args)}"
        return collect(args)
    if args.task_suite:
        raise UserError("--task_suite: each replayed file names its own task; leave it out")
    folder, failures = Path(args.out or "data/replayed"), []
    if folder.resolve() in {path.parent.resolve() for path in files}:
        raise UserError(f"--out {folder}: holds files that are replayed; give another folder")
    for number, path in enumerate(files, 1):
        one = argparse.Namespace(**vars(args))
        one.replay, one.out = str(path), folder / f"{path.stem}_replayed.hdf5"
        print(f"file {number} of {len(files)}: {path}")
        try:
            collect(one, again=True)
        except UserError as error:
            failures.append(str(error))
            print(f"failed: {error}")
    if failures:
        raise UserError(
            f"{len(failures)} of {len(files)} files failed, first: {failures[0]}; "
            f"the others are in {folder}, the same command goes on"
        )


def collect(args, again=False, fewer=False):
    """Collect or replay into args.out, resuming from its parts. again: a finished replay of the
    same settings may be there, and stays. fewer: a file of the first demonstrations is.
    """
    out, made_with, simulated = Path(args.out), simulator_versions(), {}
    if args.replay:
        if out.resolve() == Path(args.replay).resolve():
            raise UserError(f"--out {out}: is the file that is replayed; give another")
        simulated, ours = take_from_replayed(args), made_with["mujoco"]
        print(libero_hdf5.replay_note(args.replay, simulated.get("mujoco"), ours))
    args.n_demos = args.n_demos or default_number(args)
    args.task_suite = args.task_suite or "libero_spatial"
    task = find_task(args.task_suite, args.task_id)
    if args.setting == "recipe" and not args.replay:
        recipe.check_task(task)
    if not args.replay:
        collected.check_told(args, task)
    # every demonstration is recorded into its own file, all are joined at the end
    folder = out.with_name(out.name + ".parts")
    if (
        again
        and not args.overwrite
        and is_finished(out, replay_settings(args, made_with["mujoco"]))
    ):
        return print(f"{out}: is there already")
    check_replaceable(out, args.overwrite or fewer, args.format)
    claim(folder, args, made_with["mujoco"])
    if fewer:
        take_apart(out, folder)
    refuse_fewer(folder, args.n_demos)
    counts = record_missing(args, task, folder)

    parts = [part_path(folder, i, args.format) for i in range(args.n_demos)]
    attributes = file_attributes(args, task, made_with, simulated)
    if args.format == "smith300":
        for name in ("format", "image_orientation"):  # of the other format
            del attributes[name]
        attributes.update({"versions": made_with, "num_demos": args.n_demos, **counts})
        gather(folder, parts, out, attributes)
    elif args.format == "lerobot":
        # through the HDF5 file that they would have become
        joined = folder / "joined.hdf5"
        merge(parts, joined, attributes, counts)
        lerobot_writer.write_dataset(out, *lerobot_writer.sources_of(joined), args.video)
        shutil.rmtree(folder)
    else:
        merge(parts, out, attributes, counts)
        shutil.rmtree(folder)
    # what was filtered out on the way: bad resets, failed demonstrations
    named = [f"{k.replace('_', ' ')} {v}" for k, v in counts.items() if v]
    filtered = ", ".join(named) or "nothing filtered"
    print(f"{out}: {args.n_demos} demonstrations of {task.key} ({filtered})")


def build_parser():
    parser = flags.Parser(__doc__)
    parser.add_argument(
        "--task_suite", help="LIBERO suite (default libero_spatial, or the replayed file's)"
    )
    parser.add_argument("--task_id", type=flags.whole, default=0)
    parser.add_argument(
        "--task_ids",
        type=flags.several,
        metavar="all|N,N",
        help="several tasks, a file each in the folder --out (data/SUITE); with --replay: only "
        "files of these tasks; with --survey: these (all)",
    )
    parser.add_argument(
        "--n_demos",
        type=flags.count,
        help="demonstrations (48, or the next multiple of a setting's conditions), "
        "replayed demos (all), or surveyed states",
    )
    parser.add_argument(
        "--setting",
        default="in_dist",
        choices=list(settings.SPLITS),
        help="what the training conditions vary, see sim/settings.py",
    )
    parser.add_argument(
        "--part",
        default="train",
        choices=("train", "val"),
        help="conditions to train on, or validation conditions, on "
        "which study/diagnose.py looks at errors and nothing is trained",
    )
    parser.add_argument(
        "--split", help="viewpoint: outer or hemisphere; position: left_right or near_far"
    )
    parser.add_argument(
        "--show",
        type=flags.new_file(".png"),
        metavar="FILE",
        help="only draw every condition of --setting into this PNG",
    )
    parser.add_argument("--out", help="HDF5 file to write (data/SUITE_TASK.hdf5)")
    parser.add_argument(
        "--replay",
        nargs="+",
        metavar="PATH",
        help="re-render LIBERO's HDF5 files, or folders of them, from their states",
    )
    parser.add_argument(
        "--survey", metavar="SUITE", help="only table the expert's success on each task of a suite"
    )
    parser.add_argument(
        "--first_state", type=flags.whole, default=0, help="survey init states from this one on"
    )
    parser.add_argument(
        "--layouts",
        default="benchmark",
        choices=("benchmark", "random"),
        help="survey the benchmark's init states, or layouts drawn as demonstrations' are",
    )
    parser.add_argument("--image_size", type=flags.pixels, default=448, help="pixels")
    parser.add_argument(
        "--frame_stride",
        type=flags.count,
        help="render and store every N-th frame (2, as training reads; rim, smith300, lerobot: 1)",
    )
    parser.add_argument(
        "--render",
        default="exact",
        choices=RENDERS,
        help="exact: LIBERO's picture; fast: without reflections and smoothed edges",
    )
    parser.add_argument(
        "--clean_scene",
        action=argparse.BooleanOptionalAction,
        help="without distractors and unused fixtures (for the settings viewpoint and position)",
    )
    parser.add_argument(
        "--start_jitter",
        type=flags.not_negative,
        default=JOINT_JITTER,
        help="std of the start joints, rad",
    )
    parser.add_argument(
        "--start_spread",
        type=flags.not_negative,
        help="start with the EEF moved by up to +- m along y, a third of it along x "
        "(0; recipe: 0.3)",
    )
    parser.add_argument(
        "--turn_spread",
        type=flags.not_negative,
        help="turn the camera about the robot's base, by up to +- degrees (0; recipe: 40)",
    )
    parser.add_argument(
        "--loose_camera",
        type=flags.Number(float, low=0, high=1),
        help="with --setting recipe: nearer or farther, rolled, panned and tilted; a share of "
        "6 degrees of roll, 3 of pan and tilt, 0.9 to 1.15 times the distance (recipe: 1)",
    )
    parser.add_argument(
        "--mistake_rate",
        type=flags.Number(float, low=0, high=1),
        help="share of demonstrations that begin with a grasp that fails and is made good; the "
        "attempt itself is not learnt from (0; recipe: 0.5)",
    )
    parser.add_argument(
        "--push_rate",
        type=flags.not_negative,
        default=0.15,
        help="pushes per 10 control steps of free motion",
    )
    parser.add_argument(
        "--layout_spread",
        type=flags.not_negative,
        default=0.0,
        help="further uniform shift of each task object, +- m",
    )
    parser.add_argument(
        "--grasp",
        choices=list(EXPERTS),
        help="planned: where there is room, for all tasks; side: always a bowl's -y rim; rim: "
        "around it, see expert.rim_angle (side on libero_spatial 0, libero_goal 1 and 4, else "
        "planned)",
    )
    parser.add_argument(
        "--variant",
        default="task",
        choices=VARIANTS,
        help="the task, or lift_once, see sim/variants.py",
    )
    parser.add_argument(
        "--instruction_of",
        type=instructions.of_task,
        metavar="N|other",
        help="do what this task's sentence says in the scene; other: the sentence that names the "
        "scene's other object (also with --survey)",
    )
    parser.add_argument(
        "--instruction_share",
        type=flags.positive,
        default=0.5,
        help="share of the demonstrations that --instruction_of is for; the others are the task's",
    )
    parser.add_argument(
        "--format",
        default="libero",
        choices=("libero", "smith300", "lerobot"),
        help="HDF5 file, folder of real-robot episodes, or LeRobot dataset",
    )
    parser.add_argument(
        "--video", action="store_true", help="smith300, lerobot: MP4 instead of PNG frames"
    )
    parser.add_argument("--workers", type=flags.count, default=2)
    parser.add_argument(
        "--timeout",
        type=flags.positive,
        default=TIMEOUT,
        help="seconds after which a demonstration counts as hung",
    )
    parser.add_argument("--seed", type=flags.whole, default=0)
    parser.add_argument("--overwrite", action="store_true")
    parser.set_defaults(moved_anew=False)  # --replay --setting cameras
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    # flags at other than their defaults
    given = [k for k in vars(args) if getattr(args, k) != parser.get_default(k)]
    if args.survey:
        from study.survey import survey  # it imports torch, which no worker of a collection needs

        refuse("--survey counts an expert's successes", [k for k in given if k not in SURVEYED])
        return survey(args)
    refuse("without --survey", [k for k in given if k in SURVEY_ALONE])
    if args.replay:
        useless = [k for k in given if k in NOT_REPLAYED]
        if args.setting == "cameras":  # which draws them anew
            useless = [k for k in useless if k != "setting"]
        refuse("--replay re-renders recorded states into an HDF5 file", useless)
    refuse_beside(args, given)
    if args.task_ids and not args.replay:
        return collect_tasks(args)
    collect_task(args)


def refuse_beside(args, given):
    """Raise UserError for a flag that another one takes the meaning from. given: names of flags at
    other than their defaults.
    """
    for why, holds, name in (
        ("--task_ids names the tasks", args.task_ids, "task_id"),
        ("each replayed file names its task", args.replay and not args.task_suite, "task_id"),
        ("a replay draws nothing", args.replay and args.setting != "cameras", "seed"),
        ("only smith300 and lerobot have films", args.format == "libero", "video"),
        ("without --instruction_of", args.instruction_of is None, "instruction_share"),
        ("--setting cameras turns the camera itself", args.setting == "cameras", "turn_spread"),
    ):
        if holds:
            refuse(why, [name] if name in given else [])


def refuse(why, names):
    """Raise UserError if there are names of flags that would have no effect, and say why."""
    if names:
        flagged = ", ".join(f"--{name}" for name in names)
        raise UserError(f"{why}: {flagged} would have no effect; leave it out")


def collect_tasks(args):
    """Collect several tasks of a suite, each into a file of its own in one folder. Files that are
    there already are kept: the same command goes on.

    Raises UserError where the folder is of other flags, or a file holds another number of
    demonstrations than asked for.
    """
    suite = args.task_suite or "libero_spatial"
    if args.show:
        raise UserError("--task_ids: does not go with --show; give --task_id")
    tasks = chosen_tasks(suite, args.task_ids)
    told = "" if args.instruction_of is None else f"_told_{args.instruction_of}"
    folder = Path(args.out or f"data/{suite}{told}")
    claim(folder, args, simulator_versions()["mujoco"])
    for task in tasks:
        try:
            instructions.request(task, args.instruction_of)
        except UserError as nothing_to_say:
            print(f"{task.key}: skipped, {nothing_to_say}")
            continue
        out = folder / (task.key + (".hdf5" if args.format == "libero" else ""))
        fewer = collected.holds_fewer(out, args)
        if out.exists() and not args.overwrite and not fewer:
            print(f"{out}: is there already")
            continue
        # a copy: what is filled in for one task is asked anew for the next
        one = argparse.Namespace(**{**vars(args), "task_id": task.index, "out": str(out)})
        collect_task(one, fewer)


def collect_task(args, fewer=False):
    """Collect, replay or show one task, with the flags filled in that were not given. fewer: its
    file holds the first of the demonstrations already.
    """
    args.grasp = args.grasp or collected.usual_grasp(args)
    new_expert(args.grasp, args.variant)  # refuses a pair that it does not know
    args.frame_stride = collected.chosen_stride(args)
    if not args.replay:
        args.split = settings.resolve_split(args.setting, args.split)
        if args.clean_scene is None:
            args.clean_scene = settings.clean_by_default(args.setting)
    collected.fill_spreads(args)
    if args.show:
        return show(args)
    if args.replay:
        return replay(args)
    args.out = args.out or f"data/{collected.file_name(args)}"
    collect(args, fewer=fewer)


if __name__ == "__main__":
    run_script(main)
