"""Success against demonstrations a task: a table and a figure of what runs/demo_curve.sh has made.

    python -m study.demo_curve runs/demo_curve --out results/demo_curve.json

It reads FOLDER/SERIES-N/COLUMN/suite.json, as eval.py --task_ids writes it: SERIES is a policy and
its data, N its demonstrations a task. The figure stands beside --out.
"""

from pathlib import Path

import flags
from figures.pages import markdown_table, percent
from figures.plots_rates import curves
from runtime import (
    UserError,
    command_line,
    git_commit,
    may_replace,
    read_json,
    run_script,
    write_json,
)

FORM = {"n": int, "success": int, "success_rate": float, "success_interval": list, "commit": str}


def read(folder):
    """A folder of evaluations -> [{"series", "demos", "column", "n", "success", "success_rate",
    "success_interval", "commit"}], by column, series and demonstrations. Raises UserError where
    there is none.
    """
    rows = []
    for path in folder.glob("*/*/suite.json"):
        series, dash, demos = path.parents[1].name.rpartition("-")
        if not dash or not demos.isdigit():
            raise UserError(
                f"{path.parents[1]}: its name is not SERIES-N, N demonstrations a task; rename it"
            )
        found = read_json(path, "evaluation of a suite", form=FORM)
        if found.get("crashes") or found.get("missing"):
            raise UserError(f"{path}: lacks episodes that crashed or tasks; evaluate them again")
        row = {"series": series, "demos": int(demos), "column": path.parent.name}
        rows.append({**row, **{name: found[name] for name in FORM}})
    if not rows:
        raise UserError(
            f"{folder}: has no SERIES-N/COLUMN/suite.json; make them with runs/demo_curve.sh"
        )
    return sorted(rows, key=lambda row: (row["column"], row["series"], row["demos"]))


def table(rows):
    """The rates as Markdown: a line for each column and series, a number of demonstrations each."""
    demos = sorted({row["demos"] for row in rows})
    cells = {(row["column"], row["series"], row["demos"]): row for row in rows}
    shown = lambda cell: percent(cell["success_rate"], cell["success_interval"])
    lines = []
    for column, series in dict.fromkeys((row["column"], row["series"]) for row in rows):
        there = [cells.get((column, series, n)) for n in demos]
        lines.append([column, series, *[shown(cell) if cell else "-" for cell in there]])
    return markdown_table(["", "demonstrations a task", *demos], lines)


def build_parser():
    parser = flags.Parser(__doc__)
    parser.add_argument("folder", type=Path, help="with a folder for each training")
    parser.add_argument("--out", type=flags.new_file(".json"), help="also write the figures here")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    may_replace(args.out, "rows")
    rows = read(args.folder)
    print(table(rows))
    if args.out:
        made = {"command": command_line(), "commit": git_commit()}
        write_json(args.out, {**made, "rows": rows})
        curves(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    run_script(main)
