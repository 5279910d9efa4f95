"""Compare success rates of two or more evaluations, whoever ran them.

    # two evaluations of eval.py, episode by episode
    python compare.py results/matrix/evals/para-shifted-s0 results/matrix/evals/act-shifted-s0
    # several seeds of one policy, with a picture
    python compare.py A=runs/a_s0,runs/a_s1 B=runs/b_s0,runs/b_s1 --out comparison.png
    # lerobot-eval's file against a table of one's own
    python compare.py pi0=outputs/eval_info.json ours=robot.csv
    # runs that are still going: may they stop?
    python compare.py runs/eval/A runs/eval/B --sequential

A result is a folder of eval.py or its episodes.jsonl, LeRobot's eval_info.json, or a CSV file with
a column success. Episodes of the same task, layout, init state and seed on both sides are paired.
What the numbers are: docs/compare.md.
"""

import glob
import sys
from pathlib import Path

import flags
from figures.pages import markdown_table
from harness.outcomes import METRICS, read_runs
from runtime import UserError, command_line, git_commit, may_replace, run_script, write_json
from study import comparison


def build_parser():
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add(
        "results",
        nargs="+",
        metavar="RESULT",
        help="PATH, or NAME=PATH,PATH,... of several seeds; a path may be a pattern in quotes",
    )
    add("--reference", metavar="NAME", help="what the others are compared with (the first)")
    add("--metric", choices=METRICS, default="success", help="what counts as success")
    add("--sequential", action="store_true", help="say whether runs that still go may stop")
    add("--out", type=flags.new_file(".png"), metavar="FILE.png", help="draw rates and differences")
    add("--json", type=flags.new_file(".json"), metavar="FILE.json", help="write all numbers")
    return parser


def parse_result(word):
    """PATH or NAME=PATH,PATH -> a Result. A path with = or , in its name is taken as it is."""
    name, equals, rest = word.partition("=")
    if Path(word).exists() or not equals:
        name, rest = None, word
    words = [rest] if Path(rest).exists() else rest.split(",")
    paths = []
    for part in words:
        # a name that is there is no pattern
        found = [part] if Path(part).exists() else sorted(glob.glob(part))
        if not found:
            raise UserError(f"{part}: there is no such file or folder; name an existing evaluation")
        paths += map(Path, found)
    name = name or short_name(paths[0])
    # what a folder holds of one training is one run, before trainings are told apart
    runs = [run for path in paths for run in comparison.joined(read_runs(path))]
    return comparison.result_of(name, runs)


def short_name(path):
    """What a result is called without NAME=: its folder, or its own name where that says more."""
    own = path.stem not in ("episodes", "eval_info")
    return path.resolve().stem if path.is_file() and own else folder_of(path).name


def folder_of(path):
    path = path.resolve()
    return path.parent if path.is_file() else path


def main(argv=None):
    args = build_parser().parse_args(argv)
    if len(args.results) < 2:
        raise UserError("one result is no comparison; name two or more")
    may_replace(args.json, "metric", "results")
    results = [parse_result(word) for word in args.results]
    names = [result.name for result in results]
    if len(set(names)) < len(names):
        again = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two results are called {again}; tell them apart with NAME=PATH")
    if args.reference and args.reference not in names:
        raise UserError(
            f"--reference {args.reference}: no result is called so; give one of {names}"
        )
    reference = results[names.index(args.reference or names[0])]

    remarks = comparison.notes(results, reference)
    rows = comparison.compare(results, reference, args.metric, args.sequential)
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
    print(markdown_table(*comparison.table(rows)))
    for row in rows[1:] if args.sequential else ():
        print(comparison.advice(row, reference.name))
    for row in rows[1:]:
        if not row["against"]["paired"]:
            print(f"{row['name']} is compared unpaired: {row['against']['why']}")
    if args.json:
        made = {"command": command_line(), "commit": git_commit(), "metric": args.metric}
        write_json(args.json, {**made, "notes": remarks, "results": rows})
    if args.out:
        from figures import plots_rates

        plots_rates.comparison(rows, args.out, f"{args.metric}, %, with 95% intervals")
        print(args.out)
    return 0


if __name__ == "__main__":
    run_script(main)
