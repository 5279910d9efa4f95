"""The verdict: every policy in every setting, one table.

    python run_matrix.py --dry_run                        # what would run, and what is done already
    python run_matrix.py                                  # collect -> cache -> train -> evaluate,
                                                          all rows x columns
    python run_matrix.py --rows para a_pointer b --columns position --seeds 0 1
    python run_matrix.py --columns in_dist pro_swap pro_object viewpoint_hemisphere position_near_far
    python run_matrix.py --preset full --ray auto --gpus 1            # as tasks of a Ray cluster with a shared file system
    python run_matrix.py --table --readme docs/results.md   # only the table, from what is there; into a page too

Every step is one of the repository's own commands, with its log in OUT/logs. A step whose results
are complete and were made by the same flags is not done again, so that the same command goes on
after a kill, and adds rows to a table. A failed step is reported, what does not need it goes on,
and the exit code is 1.
"""

import copy
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import flags
from formats import hdf5
from registry import look_up
from runtime import UserError, command_line, git_commit, read_json, run_script, versions
from study import matrix_table
from study.graph import Local, Node, Ray, pending, run_graph

ROOT = Path(__file__).resolve().parent
STEPS = {"small": 2500, "full": 10_000}  # of training, the same for every row whatever its machine
# what --export takes, of the whole and of each evaluation
SMALL_FILES = (
    "table.json",
    "table.md",
    "table.png",
    "nodes.jsonl",
    "summary.json",
    "episodes.jsonl",
    "settings.json",
    "protocol.json",
    "sheet.jpg",
)
# flags that leave an episode's result as it is
INCIDENTAL = re.compile(r" --(workers|timeout|n_episodes|n_videos) \S+")


class Row(NamedTuple):
    """A policy: its --model_type and further flags of its training; or an untrained one, its
    --policy.

    demos: where it is trained on demonstrations of its own, which of OWN_DEMOS.
    """

    model_type: str = None
    flags: tuple = ()
    policy: str = None
    demos: str = ""


class Column(NamedTuple):
    """What is trained on, a --setting of collect_demos.py; what is tested, layouts of eval.py with
    their numbers of episodes.

    split: of the setting's conditions, where it is not the default. suite: a LIBERO-PRO suite that
    is tested in place of the one that is trained on, on its own init states.
    """

    setting: str
    layouts: dict
    split: str = None
    suite: str = None

    @property
    def data(self):
        """Name of the demonstrations: columns with the same share them, and what is trained on
        them.
        """
        return f"{self.setting}_{self.split}" if self.split else self.setting

    def demos(self, own=""):
        """Name of the demonstrations of a row with demonstrations of its own, one of OWN_DEMOS, or
        of all others.
        """
        return f"{self.data}_{own}" if own else self.data

    def cell(self, layout):
        """A tested layout's name in the table."""
        return "_".join(
            [layout, *filter(None, [self.split, self.suite and self.suite.rpartition("_")[2]])]
        )


ROWS = {
    "blind": Row(policy="blind"),
    "oracle": Row(policy="oracle"),
    "expert": Row(policy="expert"),
    "para": Row("para"),
    "act": Row("act"),
    "a_mlp": Row("autoregressive", ("--head", "mlp")),
    "a_pointer": Row("autoregressive", ("--head", "pointer")),
    "b": Row("voxel_ar"),
    "c": Row("voxel_ar_rel"),
    "d": Row("dino_volume_kv"),
}
ATTEMPTS = {  # to lift `viewpoint`, then `position`; they run only where asked for
    "para_rays": Row("para", ("--rays",)),
    "a_rays": Row("autoregressive", ("--head", "pointer", "--rays")),
    "para_mirror": Row("para", ("--mirror",)),
    "a_pointer_mirror": Row("autoregressive", ("--head", "pointer", "--mirror")),
    "b_mirror": Row("voxel_ar", ("--mirror",)),
    "c_mirror": Row("voxel_ar_rel", ("--mirror",)),
    "para_shift_aug": Row(
        "para", ("--shift_aug", "128", "--dilations", "1,2,4,8,16"), demos="starts"
    ),
    "para_turned": Row("para", ("--shift_aug", "128", "--dilations", "1,2,4,8,16"), demos="turns"),
    "a_turned": Row(
        "autoregressive", ("--shift_aug", "128", "--dilations", "1,2,4,8,16"), demos="turns"
    ),
    "b_turned": Row(
        "voxel_ar",
        ("--shift_aug", "128", "--dilations", "1,2,4,8,16", "--turn_back"),
        demos="turns",
    ),
    "c_turned": Row(
        "voxel_ar_rel",
        ("--shift_aug", "128", "--dilations", "1,2,4,8,16", "--turn_back"),
        demos="turns",
    ),
}
ROWS.update(ATTEMPTS)
COLUMNS = {
    "in_dist": Column("in_dist", {"benchmark": 50, "shifted": 50}),
    "viewpoint": Column("viewpoint", {"viewpoint": 64}),
    "viewpoint_shifted": Column("viewpoint", {"viewpoint_shifted": 64}),
    "position": Column("position", {"position": 100}),
    "viewpoint_hemisphere": Column("viewpoint", {"viewpoint": 64}, split="hemisphere"),
    "position_near_far": Column("position", {"position": 100}, split="near_far"),
    # plate and cookie box have changed places
    "pro_swap": Column("in_dist", {"benchmark": 50}, suite="libero_spatial_swap"),
    # bowls and plate look different
    "pro_object": Column("in_dist", {"benchmark": 50}, suite="libero_spatial_object"),
}
REFERENCE = "para"
OWN_DEMOS = {  # flags of their collection; the name of the dataset ends in theirs
    "starts": ("--start_spread", "0.3"),  # the arm starts elsewhere
    # and is seen from elsewhere about the robot's base
    "turns": ("--start_spread", "0.3", "--turn_spread", "40"),
}
CELLS = list(
    dict.fromkeys(column.cell(layout) for column in COLUMNS.values() for layout in column.layouts)
)


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
    asked = (typed(command), " ".join(typed_words(command)))
    return INCIDENTAL.sub("", stored) in [INCIDENTAL.sub("", text) for text in asked]


def refuse(what, stored, command):
    raise UserError(
        f"{what}: was made by `{stored}`, asked for is `{typed(command)}`; give another --out, or remove it"
    )


def dataset_command(path):
    """The command that collected a dataset; "" for one that does not say, or is not there."""
    if not path.is_file():
        return ""
    remedy = "remove it, or copy it again"
    with hdf5.open_file(path, remedy) as file:
        return str(
            hdf5.attributes(path, hdf5.group(path, file, "data", remedy), remedy).get("command", "")
        )


def lacks_dataset(path, command):
    """What a dataset lacks. The file appears under its name once it is whole."""
    if not path.is_file():
        return f"{path} is missing"
    if not same(dataset_command(path), command):
        refuse(path, dataset_command(path), command)
    return ""


def lacks_training(run, command, dataset):
    """What a run folder lacks to be finished."""
    if not (run / "config.json").is_file():
        return f"{run} is missing"
    config = read_json(
        run / "config.json",
        "run of train.py",
        form={"command": str, "dataset": {"command?": str}, "args": {"max_steps": int}},
    )
    if not same(config["command"], command):
        refuse(run, config["command"], command)
    if dataset.is_file() and config["dataset"].get("command", "") != dataset_command(dataset):
        raise UserError(
            f"{run}: was trained on other demonstrations than {dataset} holds now; give another --out, or remove it"
        )
    if not (run / "checkpoint.json").is_file():
        return f"{run} has no checkpoint yet"
    info, limits = (
        read_json(run / "checkpoint.json", "run of train.py", form={"step": int}),
        config["args"],
    )
    if info["step"] < limits["max_steps"]:
        return f"{run} stopped at step {info['step']} of {limits['max_steps']}"
    return ""


def lacks_evaluation(folder, command, n, training=None):
    """What an evaluation of n episodes lacks. training: (run folder, the training's argv)."""
    if not (folder / "summary.json").is_file():
        return f"{folder} is not finished"
    summary = read_json(
        folder / "summary.json",
        "evaluation",
        form={"command": str, "n": int, "crashes": int, "trained": ({"command": str}, None)},
    )
    if not same(summary["command"], command):
        return f"{folder} was made by other flags"
    if training:
        run, asked = training
        made = (summary["trained"] or {"command": ""})["command"]
        if not same(made, asked) and not made.endswith(
            (f" --resume {shlex.quote(str(run))}", f" --resume {run}")
        ):
            return f"{folder} is of a policy that was trained by other flags"
    crashed = f", {summary['crashes']} crashed" if summary["crashes"] else ""
    return "" if summary["n"] == n else f"{folder} has {summary['n']} of {n} episodes{crashed}"


# -- the graph ------------------------------------------------------------------------------------


def seen_frames(row, preset):
    """What the frames that a row needs features of depend on: rows with the same share one step
    that fills the cache.
    """
    config = look_up(row.model_type).config
    context = config.presets[preset].get("context", config.context)
    return (f"windows{context}" if config.has_history else "frames") + (
        "-mirrored" if "--mirror" in row.flags else ""
    )


class Plan:
    """The nodes of the rows x columns asked for, in the order in which cells should be finished."""

    def __init__(self, args):
        self.args, self.nodes = args, {}
        for seed in args.seeds:
            for column in args.columns:
                for name in args.rows:
                    self.add_row(name, COLUMNS[column], seed)

    def add(self, name, command, deps=(), lacks=None, **rest):
        self.nodes.setdefault(name, Node(name, command, tuple(d for d in deps if d), lacks, **rest))
        return name

    def add_row(self, name, column, seed):
        """A row's nodes in a column; those of a policy without training, or of another column too,
        are there once.
        """
        row = ROWS[name]
        training = self.training(name, row, column, seed) if row.model_type else None
        for layout, n in column.layouts.items():
            self.evaluation(
                name,
                row,
                column,
                layout,
                self.args.n_episodes or n,
                seed if training else None,
                training,
            )

    def weights(self):
        return (
            ["--backbone_weights", self.args.backbone_weights] if self.args.backbone_weights else []
        )

    def dataset(self, row, column):
        """(its name, its file, the node that collects it or None)."""
        args, data = self.args, column.demos(row.demos)
        if data in args.dataset:
            return data, Path(args.dataset[data]), None
        out = args.out / "demos" / f"{data}.hdf5"
        command = python(
            "collect_demos.py",
            "--setting",
            column.setting,
            *(["--split", column.split] if column.split else []),
            *OWN_DEMOS.get(row.demos, ()),
            *(["--n_demos", args.n_demos] if args.n_demos else []),
            "--workers",
            args.workers,
            *args.collect_flags,
            "--out",
            out,
        )
        return (
            data,
            out,
            self.add(
                f"collect-{data}",
                command,
                lacks=lambda: lacks_dataset(out, command),
                cpus=args.workers,
            ),
        )

    def training(self, name, row, column, seed):
        """(node, run folder, argv)."""
        args = self.args
        data, dataset, collected = self.dataset(row, column)
        run = args.out / "runs" / f"{name}-{data}-s{seed}"
        command = python(
            "train.py",
            "--model_type",
            row.model_type,
            *row.flags,
            "--preset",
            args.preset,
            "--backbone",
            args.backbone,
            *self.weights(),
            "--dataset",
            dataset,
            "--seed",
            seed,
            "--max_steps",
            args.train_steps or STEPS[args.preset],
            "--wandb",
            "off",
            *args.train_flags,
            *args.row_flags.get(name, []),
            "--out",
            run,
        )
        limits = dict(cpus=args.train_cpus, gpus=args.gpus)
        cached = self.add(
            f"cache-{data}-{seen_frames(row, args.preset)}",
            [*command, "--cache_only"],
            [collected],
            **limits,
        )
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
        cell = f"{name}-{column.cell(layout)}" + ("" if seed is None else f"-s{seed}")
        out = args.out / "evals" / cell
        if training:
            node, run, asked = training
            who = [
                "--ckpt",
                run / "checkpoint.safetensors",
                *self.weights(),
                "--device",
                args.device,
            ]
        else:
            node, who = None, ["--policy", row.policy]
        command = python(
            "eval.py",
            *who,
            "--teleport",
            "--zero_rotation",
            "--max_steps",
            600,
            "--layout",
            layout,
            *(["--split", column.split] if column.split else []),
            *(["--task_suite", column.suite] if column.suite else []),
            "--n_episodes",
            n,
            "--n_videos",
            args.n_videos,
            "--workers",
            args.workers,
            *args.eval_flags,
            "--out",
            out,
        )
        gpus = args.gpus if training and args.device != "cpu" else 0
        self.add(
            f"eval-{cell}",
            command,
            [node],
            lambda: lacks_evaluation(out, command, n, training and (run, asked)),
            cpus=args.workers,
            gpus=gpus,
        )


# -- the command ----------------------------------------------------------------------------------


def assignments(words, known, flag):
    """["NAME=VALUE", ...] -> dict. Raises UserError for an unknown name."""
    found = dict(word.partition("=")[::2] for word in words)
    for name in found.keys() - set(known):
        raise UserError(f"{flag} {name}: give NAME=VALUE with a NAME of {', '.join(known)}")
    return found


def build_parser():
    parser = flags.Parser(__doc__)
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=list(ROWS),
        default=[r for r in ROWS if r != "expert" and r not in ATTEMPTS],
    )
    parser.add_argument(
        "--columns", nargs="+", choices=list(COLUMNS), default=["in_dist", "viewpoint", "position"]
    )
    parser.add_argument(
        "--preset",
        choices=("small", "full"),
        default="small",
        help="small for two CPU cores, full for a GPU",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=flags.whole, default=[0], help="seeds of training"
    )
    parser.add_argument(
        "--backbone",
        default="efficientnet_lite0",
        help="features of the whole table (efficientnet_lite0)",
    )
    parser.add_argument("--backbone_weights", type=Path, help="local file of backbone weights")
    parser.add_argument(
        "--n_demos",
        type=flags.count,
        help="demonstrations of each setting (collect_demos.py's own number)",
    )
    parser.add_argument(
        "--train_steps",
        type=flags.count,
        help=f"of every training ({', '.join(f'{k}: {v}' for k, v in STEPS.items())})",
    )
    parser.add_argument(
        "--n_episodes",
        type=flags.count,
        help="episodes of every cell (50, viewpoint 64, position 100)",
    )
    parser.add_argument(
        "--n_videos", type=flags.whole, default=2, help="episodes of every cell that are filmed"
    )
    parser.add_argument(
        "--dataset",
        nargs="+",
        default=[],
        metavar="SETTING=FILE",
        help="demonstrations that are there already; of another split SETTING_SPLIT=FILE, with other starts SETTING_starts=FILE",
    )
    parser.add_argument(
        "--row_flags",
        nargs="+",
        default=[],
        metavar="ROW=FLAGS",
        help='further flags of a row\'s training, as act="--lr 5e-4"',
    )
    for step, script in (
        ("collect", "collect_demos.py"),
        ("train", "train.py"),
        ("eval", "eval.py"),
    ):
        parser.add_argument(
            f"--{step}_flags", default="", help=f"further flags of every {script}, in quotes"
        )
    parser.add_argument(
        "--out",
        type=flags.new_folder,
        default=Path("runs/matrix"),
        help="folder of all that is made",
    )
    parser.add_argument(
        "--workers",
        type=flags.count,
        default=2,
        help="simulator processes of a collection or evaluation",
    )
    parser.add_argument(
        "--jobs", type=flags.count, default=1, help="steps at a time on this machine"
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="device of evaluations; trainings take a GPU where they see one",
    )
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="run on this Ray cluster (auto: the one here)"
    )
    parser.add_argument(
        "--train_cpus",
        type=flags.positive,
        default=2,
        help="with --ray: CPUs that a training asks for",
    )
    parser.add_argument(
        "--gpus",
        type=flags.not_negative,
        default=0,
        help="with --ray: GPUs that a training asks for, or a share of one",
    )
    parser.add_argument("--dry_run", action="store_true", help="only print the commands")
    parser.add_argument(
        "--table", action="store_true", help="only make the table, from the evaluations in --out"
    )
    parser.add_argument(
        "--metric",
        choices=matrix_table.RATES,
        default="success",
        help="rate of the short table and the paired test",
    )
    parser.add_argument(
        "--readme",
        type=Path,
        help="write the table into this file too, between its <!-- matrix --> marks",
    )
    parser.add_argument(
        "--export",
        type=flags.new_folder,
        help="also copy the table and the evaluations' small files here, to be committed",
    )
    return parser


def parse_args(argv=None):
    args = build_parser().parse_args(argv)
    args.dataset = assignments(
        args.dataset,
        [c.demos(own) for c in COLUMNS.values() for own in ("", *OWN_DEMOS)],
        "--dataset",
    )
    args.row_flags = {
        k: shlex.split(v) for k, v in assignments(args.row_flags, ROWS, "--row_flags").items()
    }
    for name in ("collect_flags", "train_flags", "eval_flags"):
        setattr(args, name, shlex.split(getattr(args, name)))
    for setting, path in args.dataset.items():
        if not Path(path).is_file():
            raise UserError(f"--dataset {setting}={path}: there is no such file")
    if args.backbone == "auto" and not args.table:
        # once: on the machines of a cluster it might be found differently
        from nets.backbone import resolve_backbone

        args.backbone = resolve_backbone("auto", args.backbone_weights)
    return args


def copy_files(source, target, names):
    """Copy those of the named files that there are."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).exists():
            shutil.copy(source / name, target / name)


def recipe(args, name, cell, seed):
    """The command lines (evaluation, training or None) by which these flags make a cell; None for a
    seed that cannot be.
    """
    column = next(n for n, c in COLUMNS.items() if cell in map(c.cell, c.layouts))
    one = copy.copy(args)
    one.rows, one.columns, one.seeds = [name], [column], [int(seed[1:]) if seed else 0]
    nodes = Plan(one).nodes
    node = nodes.get("-".join(filter(None, ["eval", name, cell, seed])))
    return node and (typed(node.command), typed(nodes[node.deps[0]].command) if node.deps else None)


def write_table(args):
    """Table, picture and page in args.out, from all evaluations there -> their number."""
    cells = matrix_table.read_cells(args.out, list(ROWS), CELLS, lambda *cell: recipe(args, *cell))
    if not cells:
        return 0
    info = {"command": command_line(), "commit": git_commit(), "versions": versions()}
    text = matrix_table.write(cells, args.out, args.metric, REFERENCE, info)
    if args.readme:
        matrix_table.insert(args.readme, text)
    if args.export:
        copy_files(args.out, args.export, SMALL_FILES)
        for folder in (run["folder"] for cell in cells for run in cell["runs"].values()):
            copy_files(folder, args.export / "evals" / folder.name, SMALL_FILES)
    print(text)
    print(f"{args.out}: " + ", ".join(matrix_table.FILES))
    return len(cells)


def main(argv=None):
    args = parse_args(argv)
    if args.table and not args.dry_run:
        if not write_table(args):
            raise UserError(
                f"--table: no finished evaluation in {args.out / 'evals'}; first run the same without --table"
            )
        return 0
    nodes = list(Plan(args).nodes.values())
    if args.dry_run:
        todo = {node.name for node in pending(nodes)}
        for node in nodes:
            line = shlex.join(typed_words(node.command))
            print(line if node.name in todo else f"# done: {line}")
        return 0
    failed = run_graph(
        nodes, Ray(args.ray) if args.ray else Local(args.jobs), args.out, title="matrix"
    )
    write_table(args)
    for name, why in failed.items():
        print(f"{name}: {why}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
