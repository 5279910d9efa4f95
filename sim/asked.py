"""What an evaluation's flags come to: a checkpoint's own settings, refusals, the folder's name, and
what a folder's episodes have in common.
"""

import canonical
from harness.records import demos_simulator, run_name, simulator_changes
from harness.summary import place_of
from runtime import UserError, git_commit
from sim import layouts, remote, settings
from sim.layouts import LAYOUTS
from sim.simulator import simulator, simulator_versions
from sim.tasks import find_task, init_states, trained_elsewhere
from sim.variants import new_expert

# what may change between a command and the one that goes on with its episodes
FREE = (
    "out",
    "workers",
    "recycle",
    "timeout",
    "n_episodes",
    "n_videos",
    "video_every",
    "device",
    "trace",
    *("server", "server_timeout"),
    "task_ids",
)


def as_trained(args, info, config):
    """Take what was not given from a checkpoint: image size and stride from its config; render,
    task, grasp, variant, scene and split from its demonstrations.

    Raises UserError for a --render or --split other than those that it was trained on.
    """
    for name in ("image_size", "waypoint_stride"):
        given = getattr(args, name)
        if given not in (None, config[name]):
            raise UserError(
                f"--{name} {given}: {args.ckpt} was trained with {config[name]}, which it keeps; "
                "leave the flag out"
            )
        setattr(args, name, config[name])
    trained_on = info.get("dataset", {})
    rendered = trained_on.get("render", "exact")
    args.render = args.render or rendered
    if args.render != rendered:
        raise UserError(
            f"--render {args.render}: {args.ckpt} was trained on images of --render {rendered}, "
            f"which look otherwise; give --render {rendered}, or train on demonstrations of "
            f"collect_demos.py --render {args.render}"
        )
    for name in ("task_suite", "variant"):
        if getattr(args, name) is None:
            setattr(args, name, trained_on.get(name))
    if args.task_id is None:
        args.task_id = int(trained_on.get("task_id", 0))
    # another task than the one that was trained on may be grasped otherwise
    here = find_task(args.task_suite or "libero_spatial", args.task_id)
    if args.grasp is None and not trained_elsewhere(info, here):
        args.grasp = trained_on.get("grasp")
    # the verdict's rows are compared episode by episode: theirs is the layout's scene for all
    as_layout = LAYOUTS[args.layout].frozen is not None
    if args.clean_scene is None and "clean_scene" in trained_on and not as_layout:
        args.clean_scene = trained_on["clean_scene"] == "True"
    # a split belongs to its setting; trained in another setting, any split may be tested
    same_setting = trained_on.get("setting") == LAYOUTS[args.layout].setting
    if same_setting and trained_on.get("split"):
        args.split = args.split or trained_on["split"]
        if args.split != trained_on["split"]:
            raise UserError(
                f"--split {args.split}: {args.ckpt} was trained on split {trained_on['split']}, "
                "so that training conditions could be among those tested; leave the flag out, or "
                "train on that split"
            )
    trained = f"{info['model_type']}, step {info.get('step')}"
    print(f"{args.ckpt}: {trained}, backbone {info['backbone_identity']}")


# flags that one kind of policy reads, and the value of each where it was not given
READ_BY = {
    "checkpoint": {
        **{"ckpt": None, "feedback": None, "sample": None, "temperature": None},
        **{"backbone_weights": None, "text_weights": None},
    },
    "oracle": {"grid": 64, "n_height_bins": 32, "margin": 0},
    "remote": {"replan_steps": 5, "send_size": None, "label": None, "server_timeout": 120.0},
}


def refuse_unread(args):
    """Raise UserError for a flag that --policy does not read. Before flags are filled in."""
    for policy, names in READ_BY.items():
        given = [n for n, usual in names.items() if getattr(args, n) != usual]
        if given and args.policy != policy:
            raise UserError(
                f"--{given[0]}: --policy {args.policy} does not read it, --policy {policy} does; "
                "leave it out"
            )
    if args.policy in ("expert", "remote") and args.waypoint_stride is not None:
        raise UserError(
            f"--waypoint_stride: --policy {args.policy} answers no waypoints; leave it out"
        )


def refuse_without_meaning(args):
    """Raise UserError for flags that mean nothing together."""
    # the oracle has no memory, and would let go where it grasped
    if args.policy in ("blind", "oracle") and args.variant != "task":
        raise UserError(
            f"--policy {args.policy}: it has no plan for --variant {args.variant}; "
            "use expert or a checkpoint"
        )
    if args.variant != "task" and args.stop_stalled:
        raise UserError("--stop_stalled: to stay is an answer in --variant lift_once; leave it out")
    for name in ("stop_stalled", "trace"):
        if args.policy in ("expert", "remote") and getattr(args, name):
            raise UserError(f"--{name}: --policy {args.policy} answers no waypoints; leave it out")
    if args.canonical_view:
        if args.canonical_view == canonical.FIT:
            raise UserError(
                "--canonical_view fit: no training demonstrations are here to find it from; give "
                "'x y z scale', as a checkpoint's config has it"
            )
        canonical.parsed(args.canonical_view)
        if args.policy != "oracle":
            raise UserError(
                f"--canonical_view: is of --policy oracle alone, this is {args.policy}; leave it "
                "out (a checkpoint has its own)"
            )
    new_expert(args.grasp, args.variant)  # refuses a pair that it does not know


def refuse_layout(args, task, told):
    """Raise UserError for a --layout that moves what a Task does not have, or repeats itself within
    --n_episodes. told: whether another task's sentence is said, which names an object.
    """
    if not told and not layouts.has_what_moves(args.layout, task):
        raise UserError(
            f"--layout {args.layout}: {task.language!r} ({task.key}) names no object that could be "
            "moved; choose another task or layout"
        )
    # a repeated episode would count twice
    most = layouts.distinct(args.layout, args.split, len(init_states(task)))
    if most and not args.plus and args.n_episodes > most:
        raise UserError(
            f"--n_episodes {args.n_episodes}: {task.key} has {most} different episodes of "
            f"--layout {args.layout}, then they repeat; use 1 to {most}"
        )


def cell_name(args, info, task):
    """Name of an evaluation's folder, where --out is not given."""
    setting = LAYOUTS[args.layout].setting
    return "_".join(
        [
            *([run_name(args.ckpt)] if args.ckpt else []),
            info.get("model_type", args.label or args.policy),
            task.key,
            place_of(args),
            *([args.split] if args.split != settings.resolve_split(setting) else []),
            *([args.variant] if args.variant != "task" else []),
            *(["told_otherwise"] if args.instruction or args.instruction_of is not None else []),
        ]
    )


def where_run(info):
    """What every row and the summary say of the simulator, its versions and renderer, and of this
    repository, its commit.

    For a checkpoint also MuJoCo's version and the renderer behind its demonstrations. Prints a
    warning for each that is another one here.
    """
    # a run that goes on may be of newer code than its first episodes
    found = {"simulator": simulator(), "commit": git_commit()}
    if info:
        theirs = demos_simulator(info)
        # of a dataset that names no renderer, rows name none
        found.update({f"demos_{k}": v for k, v in theirs.items() if v or k == "mujoco"})
        for sentence in simulator_changes(theirs, simulator_versions()):
            print(f"warning: {sentence}")
    return found


def several_commits(rows, folder):
    """{"commits": those that rows name} where there are several, with a warning; else {}."""
    commits = list(dict.fromkeys(row["commit"] for row in rows if "commit" in row))
    if len(commits) < 2:
        return {}
    print(f"warning: {folder}: its episodes are of several commits: {', '.join(commits)}")
    return {"commits": commits}


def stamp_of(args, info):
    """What the episodes of a folder have in common, as settings.json holds it. A run goes on only
    in a folder with the same stamp.
    """
    asked = {k: str(v) for k, v in vars(args).items() if k not in FREE}
    if not args.stop_stalled:  # folders from before it was there go on
        del asked["stop_stalled"]
    # the same for flags that came later
    for name in ("instruction", "instruction_of", "text_weights", "plus"):
        if getattr(args, name) is None:
            del asked[name]
    if args.instruction_of is not None:
        asked["judged"] = "named object"  # not so in folders from before it was
    for name in ("margin", "canonical_view"):
        if not getattr(args, name):
            del asked[name]
    # and for --render
    if args.render == "exact":
        del asked["render"]
    # and for the flags of --policy remote
    if args.policy != "remote":
        for name in remote.NAMES:
            asked.pop(name, None)
    where = f"{info.get('commit')} step {info.get('step')} seed {info.get('seed')}"
    asked["trained"] = f"{where} {info.get('minutes')}"
    asked["mujoco"] = simulator_versions()["mujoco"]
    return asked
