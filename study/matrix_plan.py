"""The commands behind the matrix, and what counts as done: a graph of collections, feature caches,
trainings and evaluations, in the order in which cells should be finished.
"""

import re
import shlex
import sys
from pathlib import Path

from formats import hdf5
from registry import look_up
from runtime import UserError, read_json
from sim.settings import GRID
from study.graph import Node
from study.matrix import COLUMNS, INCIDENTAL, OWN_DEMOS, ROWS, STEPS

ROOT = Path(__file__).resolve().parents[1]
# in a command line: such a flag with its value, where it has one
INCIDENTAL_FLAG = re.compile(rf" ({'|'.join(sorted(INCIDENTAL))})( (?!--)\S+)?(?= |$)")
# what tells two trainings by one command apart
OF_TRAINING = ("commit", "step", "minutes")
# flags of eval.py that nothing but waypoints have
OF_WAYPOINTS = ("--trace", "--stop_stalled")
# what is read of a run's config.json and of an evaluation's summary.json
TRAINED = {"command": str, "dataset": {"command?": str}, "args": {"max_steps": int}}
EVALUATED = {"command": str, "n": int, "crashes": int, "trained": ({"command": str}, None)}


# -- what was made, and by which command ----------------------------------------------------------


def python(script, *words):
    """argv of one of the repository's scripts."""
    return [sys.executable, str(ROOT / script), *(str(w) for w in words)]


def typed_words(command):
    """A command of `python` as a user types it."""
    return ["python", Path(command[1]).name, *command[2:]]


def typed(command):
    """The same as the script itself stores it, see runtime.command_line."""
    return shlex.join(typed_words(command))


def same(stored, command):
    """True if a stored command line and an argv ask for the same results. Older ones were stored
    without quotes.
    """
    # stored with quotes, and as older versions stored it
    asked = (typed(command), " ".join(typed_words(command)))
    return INCIDENTAL_FLAG.sub("", stored) in [INCIDENTAL_FLAG.sub("", text) for text in asked]


def refuse(what, stored, command):
    raise UserError(
        f"{what}: was made by `{stored}`, asked for is `{typed(command)}`; "
        "give another --out, or remove it"
    )


def dataset_command(path):
    """The command that collected a dataset; "" for one that does not say, or is not there."""
    if not path.is_file():
        return ""
    # ends the error of a file that cannot be read
    remedy = "remove it, or copy it again"
    with hdf5.open_file(path, remedy) as file:
        data = hdf5.group(path, file, "data", remedy)
        return str(hdf5.attributes(path, data, remedy).get("command", ""))


def lacks_dataset(path, command):
    """What a dataset lacks, "" for nothing. The file gets its name once it is whole.

    Raises UserError for one that another command made.
    """
    if not path.is_file():
        return f"{path} is missing"
    if not same(dataset_command(path), command):
        # a whole file from other flags is never overwritten
        refuse(path, dataset_command(path), command)
    return ""


def lacks_training(run, command, dataset):
    """What a run folder lacks to be finished, "" for nothing.

    Raises UserError for one of other flags, or of other demonstrations than `dataset` holds.
    """
    if not (run / "config.json").is_file():
        return f"{run} is missing"
    config = read_json(run / "config.json", "run of train.py", form=TRAINED)
    if not same(config["command"], command):
        refuse(run, config["command"], command)
    # the dataset may have been collected anew since this training
    if dataset.is_file() and config["dataset"].get("command", "") != dataset_command(dataset):
        raise UserError(
            f"{run}: was trained on other demonstrations than {dataset} holds now; "
            "give another --out, or remove it"
        )
    if not (run / "checkpoint.json").is_file():
        return f"{run} has no checkpoint yet"
    form = {"step": int, "finished?": bool}
    reached = read_json(run / "checkpoint.json", "run of train.py", form=form)
    # --patience may end a training before its last step
    step, most = reached["step"], config["args"]["max_steps"]
    done = step >= most or reached.get("finished", False)
    return "" if done else f"{run} stopped at step {step} of {most}"


def lacks_evaluation(folder, command, n, training=None):
    """What an evaluation of n episodes lacks. training: (run folder, the training's argv)."""
    if not (folder / "summary.json").is_file():
        return f"{folder} is not finished"
    summary = read_json(folder / "summary.json", "evaluation", form=EVALUATED)
    if not same(summary["command"], command):
        return f"{folder} was made by other flags"
    if training:
        run, asked = training
        # the training that its checkpoint names; a resumed one names the run folder instead of
        # flags
        made = (summary["trained"] or {"command": ""})["command"]
        resumed = made.endswith((f" --resume {shlex.quote(str(run))}", f" --resume {run}"))
        if not same(made, asked) and not resumed:
            return f"{folder} is of a policy that was trained by other flags"
        if (run / "checkpoint.json").is_file():
            now = read_json(run / "checkpoint.json", "run of train.py", form=dict)
            if any(summary["trained"].get(key) != now.get(key) for key in OF_TRAINING):
                return f"{folder} is of an earlier training in {run}; remove {folder}"
    crashed = f", {summary['crashes']} crashed" if summary["crashes"] else ""
    return "" if summary["n"] == n else f"{folder} has {summary['n']} of {n} episodes{crashed}"


# -- the graph ------------------------------------------------------------------------------------


def seen_frames(row, preset):
    """A name for the set of frames whose features a row needs. Rows with the same name share one
    step that fills the cache.
    """
    config = look_up(row.model_type).config
    context = config.presets[preset].get("context", config.context)
    frames = f"windows{context}" if config.has_history else "frames"
    return f"{frames}-mirrored" if "--mirror" in row.flags else frames


def optional(flag, value):
    """A flag and its value, nothing for no value."""
    return [flag, value] if value else []


class Plan:
    """The nodes of the rows x columns asked for, in the order in which cells should be finished."""

    def __init__(self, args):
        self.args, self.nodes = args, {}
        # first everything with one seed, then the next: a whole table early
        for seed in args.seeds:
            for column in args.columns:
                for name in args.rows:
                    self.add_row(name, COLUMNS[column], seed)

    def add(self, name, command, deps=(), lacks=None, **rest):
        deps = tuple(d for d in deps if d)
        # columns share demonstrations, caches and trainings: the first to ask adds the node
        self.nodes.setdefault(name, Node(name, command, deps, lacks, **rest))
        return name

    def add_row(self, name, column, seed):
        """Add a row's nodes in a column. Nodes that columns or seeds share are there once."""
        row = ROWS[name]
        training = self.training(name, row, column, seed) if row.model_type else None
        for layout, n in column.layouts.items():
            n = self.args.n_episodes or n
            self.evaluation(name, row, column, layout, n, seed if training else None, training)

    def weights(self):
        return optional("--backbone_weights", self.args.backbone_weights)

    def dataset(self, row, column):
        """(its name, its file, the node that collects it or None)."""
        args, data = self.args, column.demos(row.demos, row.setting)
        # given on the command line: nothing to collect
        if data in args.dataset:
            return data, Path(args.dataset[data]), None
        out = args.out / "demos" / f"{data}.hdf5"
        # a row with a setting of its own is trained once, for all columns
        split = None if row.setting else column.split
        words = ["--setting", row.setting or column.setting, *optional("--split", split)]
        words += [*OWN_DEMOS.get(row.demos, ()), *optional("--n_demos", args.n_demos)]
        words += ["--workers", args.workers, *args.collect_flags, "--out", out]
        command = python("collect_demos.py", *words)
        lacks = lambda: lacks_dataset(out, command)
        return data, out, self.add(f"collect-{data}", command, lacks=lacks, cpus=args.workers)

    def training(self, name, row, column, seed):
        """(node, run folder, argv)."""
        args = self.args
        data, dataset, collected = self.dataset(row, column)
        run = args.out / "runs" / f"{name}-{data}-s{seed}"
        words = ["--model_type", row.model_type, *row.flags, "--preset", args.preset]
        words += ["--backbone", args.backbone, *self.weights(), "--dataset", dataset]
        words += ["--seed", seed, "--max_steps", args.train_steps or STEPS[args.preset]]
        words += ["--wandb", "off", *args.train_flags, *args.row_flags.get(name, []), "--out", run]
        command = python("train.py", *words)
        limits = {"cpus": args.train_cpus, "gpus": args.gpus}
        # one node fills the cache of features for all rows that see the same frames, so that
        # trainings side by side do not compute them twice
        frames = f"cache-{data}-{seen_frames(row, args.preset)}"
        cached = self.add(frames, [*command, "--cache_only"], [collected], **limits)
        node = self.add(
            f"train-{name}-{data}-s{seed}",
            command,
            [cached],
            lambda: lacks_training(run, command, dataset),
            resume=(str(run / "state.safetensors"), python("train.py", "--resume", run)),
            **limits,
        )
        return node, run, command

    def evaluation(self, name, row, column, layout, n, seed, training):
        args = self.args
        # the folder's name is what matrix_table.py reads: ROW-LAYOUT or ROW-LAYOUT-sSEED
        cell = f"{name}-{column.cell(layout)}" + ("" if seed is None else f"-s{seed}")
        out = args.out / "evals" / cell
        if training:
            node, run, asked = training
            made = run, asked
            words = ["--ckpt", run / "checkpoint.safetensors", *self.weights()]
            words += ["--device", args.device]
        else:
            # nothing trained: the policy is known by name
            node = made = None
            words = ["--policy", row.policy]
            # the low views are those that this grid decodes badly
            if row.policy == "oracle" and layout.startswith("verdict"):
                words += ["--grid", GRID]
        words += ["--teleport", "--zero_rotation", "--max_steps", 600, "--layout", layout]
        words += [*optional("--split", column.split), *optional("--task_suite", column.suite)]
        words += ["--n_episodes", n, "--n_videos", args.n_videos, "--workers", args.workers]
        # the expert answers no waypoints that could be traced
        asked = [f for f in args.eval_flags if row.policy != "expert" or f not in OF_WAYPOINTS]
        command = python("eval.py", *words, *asked, "--out", out)
        lacks = lambda: lacks_evaluation(out, command, n, made)
        gpus = args.gpus if training and args.device != "cpu" else 0
        self.add(f"eval-{cell}", command, [node], lacks, cpus=args.workers, gpus=gpus)
