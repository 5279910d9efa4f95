"""The verdict: every policy in every setting, one table.

    # what would run, and what is done already
    python run_matrix.py --dry_run
    # collect -> cache -> train -> evaluate, all rows x columns
    python run_matrix.py
    python run_matrix.py --rows para a_pointer b --columns position --seeds 0 1
    python run_matrix.py --columns in_dist pro_swap viewpoint_hemisphere position_near_far
    # as tasks of a Ray cluster with a shared file system
    python run_matrix.py --preset full --ray auto --gpus 1
    # only the trainings, 16 at a time on a GPU; the same without --until goes on from them
    python run_matrix.py --until train --jobs 16
    # only the table, from what is there; into a page too
    python run_matrix.py --table --readme docs/first_matrix.md

Every step is one of the repository's own commands, with its log in OUT/logs. A step whose results
are complete and were made by the same flags is not done again, so that the same command goes on
after a kill, and adds rows to a table. A failed step is reported, what does not need it goes on,
and the exit code is 1. Rows and columns: study/matrix.py.
"""

import copy
import shlex
import shutil
import sys
from pathlib import Path

import flags
from runtime import UserError, command_line, git_commit, run_script, versions
from study import matrix_table
from study.graph import Local, Ray, pending, run_graph
from study.matrix import (
    ATTEMPTS,
    CELLS,
    COLUMNS,
    OWN_DEMOS,
    RECIPE,
    REFERENCE,
    ROWS,
    STEPS,
    WITHOUT,
    Column,
)
from study.matrix_plan import Plan, typed, typed_words

# flags that --help shows, in this order
FIRST = "rows columns seeds preset n_episodes jobs workers out dry_run table"
# of the graph, in this order; the name of a node begins with its stage
STAGES = ("collect", "cache", "train")
# what --export takes, of the whole and of each evaluation
SMALL_FILES = (
    "table.json",
    "table.md",
    "table.png",
    "verdict.png",
    "nodes.jsonl",
    "summary.json",
    "episodes.jsonl",
    "settings.json",
    "protocol.json",
    "sheet.jpg",
)


def assignments(words, known, flag):
    """["NAME=VALUE", ...] -> dict. Raises UserError for an unknown name, and one given twice."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in known or not equals:
            raise UserError(f"{flag} {word}: give NAME=VALUE with a NAME of {', '.join(known)}")
        if name in found:
            raise UserError(f"{flag} {word}: {name} was given before; give it once")
        found[name] = value
    return found


def build_parser():
    parser = flags.Parser(__doc__, FIRST)
    add_comparison_flags(parser.add_argument_group("what is compared"))
    add_command_flags(parser.add_argument_group("how it is made"))
    add_running_flags(parser.add_argument_group("where it runs"))
    add_table_flags(parser.add_argument_group("the table"))
    return parser


def add_comparison_flags(group):
    add = group.add_argument
    add(
        "--rows",
        nargs="+",
        choices=list(ROWS),
        default=[r for r in ROWS if r != "expert" and r not in (*ATTEMPTS, *RECIPE, *WITHOUT)],
        metavar="ROW",
        help=f"policies, of {', '.join(ROWS)}",
    )
    add(
        "--columns",
        nargs="+",
        choices=list(COLUMNS),
        default=["in_dist", "viewpoint", "position"],
        metavar="COLUMN",
        help=f"settings, of {', '.join(COLUMNS)}",
    )
    add("--seeds", nargs="+", type=flags.whole, default=[0], help="seeds of training")
    numbers = "50, viewpoint 64, position 100"
    add("--n_episodes", type=flags.count, help=f"episodes of every cell ({numbers})")


def add_command_flags(group):
    add = group.add_argument
    add(
        "--preset",
        choices=("small", "full"),
        default="small",
        help="small for two CPU cores, full for a GPU",
    )
    add("--backbone", default="efficientnet_lite0", help="features of the whole table")
    add("--backbone_weights", type=Path, help="local file of backbone weights")
    own = "demonstrations of each setting (collect_demos.py's own number)"
    add("--n_demos", type=flags.count, help=own)
    steps = ", ".join(f"{preset}: {n}" for preset, n in STEPS.items())
    add("--train_steps", type=flags.count, help=f"of every training ({steps})")
    add("--n_videos", type=flags.whole, default=2, help="filmed episodes of every cell")
    add(
        "--dataset",
        nargs="+",
        default=[],
        metavar="SETTING=FILE",
        help="demonstrations that are there already; of another split SETTING_SPLIT=FILE, "
        "with other starts SETTING_starts=FILE",
    )
    add(
        "--row_flags",
        nargs="+",
        default=[],
        metavar="ROW=FLAGS",
        help='further flags of a row\'s training, as act="--lr 5e-4"',
    )
    scripts = {"collect": "collect_demos.py", "train": "train.py", "eval": "eval.py"}
    for step, script in scripts.items():
        add(f"--{step}_flags", default="", help=f"further flags of every {script}, in quotes")


def add_running_flags(group):
    add = group.add_argument
    folder = "folder of all that is made"
    add("--out", type=flags.new_folder, default=Path("runs/matrix"), help=folder)
    simulators = "simulators of a collection or evaluation"
    add("--workers", type=flags.count, default=2, help=simulators)
    add("--jobs", type=flags.count, default=1, help="steps at a time on this machine")
    device = "of evaluations; trainings take a GPU where they see one"
    add("--device", default="cpu", help=device)
    add("--ray", metavar="ADDRESS", help="run on this Ray cluster (auto: the one here)")
    cpus = "with --ray: CPUs that a training asks for"
    add("--train_cpus", type=flags.positive, default=2, help=cpus)
    gpus = "with --ray: GPUs that a training asks for, or a share of one"
    add("--gpus", type=flags.not_negative, default=0, help=gpus)
    last = "end after this stage, evaluate nothing"
    add("--until", choices=STAGES, help=last)
    add("--dry_run", action="store_true", help="only print the commands")


def add_table_flags(group):
    add = group.add_argument
    only = "only make the table, from the evaluations in --out"
    add("--table", action="store_true", help=only)
    add(
        "--metric",
        choices=matrix_table.RATES,
        default="success",
        help="rate of the short table and the paired test",
    )
    add(
        "--readme",
        type=Path,
        help="write the table into this file too, between its <!-- matrix --> marks",
    )
    add(
        "--export",
        type=flags.new_folder,
        help="also copy the table and the evaluations' small files here, to be committed",
    )


# flags, with the words inside NAME=VALUE and quoted flags taken apart; UserError for unknown names
def parse_args(argv=None):
    args = build_parser().parse_args(argv)
    # SETTING, SETTING_SPLIT and SETTING_starts of every column
    known = [c.demos(own) for c in COLUMNS.values() for own in ("", *OWN_DEMOS)]
    settings = sorted({row.setting for row in ROWS.values() if row.setting})
    known += [Column(s, {}).demos(own) for s in settings for own in ("", *OWN_DEMOS)]
    args.dataset = assignments(args.dataset, known, "--dataset")
    row_flags = assignments(args.row_flags, ROWS, "--row_flags")
    args.row_flags = {name: split(text, f"--row_flags {name}") for name, text in row_flags.items()}
    for name in ("collect_flags", "train_flags", "eval_flags"):
        setattr(args, name, split(getattr(args, name), f"--{name}"))
    for setting, path in args.dataset.items():
        if not Path(path).is_file():
            raise UserError(f"--dataset {setting}={path}: there is no such file")
    if args.export and args.export.resolve() == args.out.resolve():
        raise UserError(f"--export {args.export}: is --out itself; give another folder")
    if args.backbone == "auto" and not args.table:
        # once: on the machines of a cluster it might be found differently
        from nets.backbone import resolve_backbone

        args.backbone = resolve_backbone("auto", args.backbone_weights)
    return args


def split(text, flag):
    """Flags in one word -> their words. Raises UserError for a quote that is not closed."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{flag}={text}: {error}; close the quote") from error


def copy_files(source, target, names):
    """Copy the files of these names that exist from one folder to another."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).exists():
            shutil.copy(source / name, target / name)


def recipe(args, name, cell, seed):
    """The command lines by which these flags make a cell of the table -> (evaluation, training or
    None), or None where they make no such cell.

    name: a row; cell: a column's layout; seed: as "s0", "" for a policy without training.
    """
    # plan this one cell alone
    column = next(n for n, c in COLUMNS.items() if cell in map(c.cell, c.layouts))
    one = copy.copy(args)
    one.rows, one.columns, one.seeds = [name], [column], [int(seed[1:]) if seed else 0]
    nodes = Plan(one).nodes
    node = nodes.get("-".join(filter(None, ["eval", name, cell, seed])))
    if node is None:
        return None
    training = nodes[node.deps[0]].command if node.deps else None
    return typed(node.command), training and typed(training)


def up_to(stage, nodes):
    """The nodes of the stages up to one of STAGES, all for None."""
    wanted = STAGES[: STAGES.index(stage) + 1] if stage else None
    return [node for node in nodes if not wanted or node.name.partition("-")[0] in wanted]


def write_table(args):
    """Write table, picture and page into args.out, from all evaluations there -> the number of
    cells.
    """
    cells = matrix_table.read_cells(args.out, list(ROWS), CELLS, lambda *cell: recipe(args, *cell))
    if not cells:
        return 0
    info = {"command": command_line(), "commit": git_commit(), "versions": versions()}
    # into args.out, then a page's marks, then a folder to be committed
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
                f"--table: no finished evaluation in {args.out / 'evals'}; "
                "first run the same without --table"
            )
        return 0
    nodes = up_to(args.until, Plan(args).nodes.values())
    # every command in the order of the plan, those with complete results marked
    if args.dry_run:
        todo = {node.name for node in pending(nodes)}
        for node in nodes:
            line = shlex.join(typed_words(node.command))
            print(line if node.name in todo else f"# done: {line}")
        return 0
    # the table is written from what succeeded, even where a step failed
    runner = Ray(args.ray) if args.ray else Local(args.jobs)
    failed = run_graph(nodes, runner, args.out, title="matrix")
    if not args.until:
        write_table(args)
    for name, why in failed.items():
        print(f"{name}: {why}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
