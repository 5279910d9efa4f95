"""An evaluation of several tasks of a suite: `eval.py --task_ids`.

Each task is evaluated into a folder of its own, so that a killed run goes on task by task and
episode by episode. suite.json and report.html beside them hold the whole.
"""

import argparse
import html
import math
from pathlib import Path

from figures.pages import STYLE, figure, html_table, markdown_table, percent, rate
from harness.metrics import within
from harness.records import STILL, read_summary, run_name, scored_episodes
from harness.statistics import wilson
from harness.summary import place_of, told
from runtime import UserError, atomic_path, command_line, git_commit, read_json, write_json
from sim import layouts, plus
from sim.tasks import chosen_tasks

# control steps at which published success rates stop
STEPS = {
    "libero_spatial": 280,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
USUAL_STEPS = 600
OWN = ("task_id", "zero_rotation", "grasp")  # settings that each task may have its own of
GROUP_COLUMNS = ("variants", "n", "success")
COLUMNS = ("task", "instruction", "n", "success", "placed and released", "steps")


def evaluate(args, network, evaluate_task):
    """Evaluate the tasks of --task_ids one after another -> the exit code, 1 without any episode.

    evaluate_task: of eval.py, for the flags of one task. A task that fails does not end the others.
    Raises UserError for it at the end.
    """
    info = network.about["info"] if network else {}
    suite = args.task_suite or info.get("dataset", {}).get("task_suite") or "libero_spatial"
    if args.task_id is not None:
        raise UserError("--task_id and --task_ids: give one of them")
    tasks = chosen_tasks(suite, args.task_ids)
    folder = args.out or Path("runs/eval") / folder_name(args, info, suite)
    failures, done = [], []
    if args.plus:
        variants = plus.chosen(suite, args.plus, tasks, args.n_episodes)
        tasks = [task for task in tasks if variants[task.index]]
    if args.task_ids == "all" and args.instruction_of is None:
        tasks = without_unmoved(args.layout, tasks)
    for task in tasks:
        print(f"\n{task.key}: {task.language}", flush=True)
        try:
            one = of_one(args, task, folder, info)
            if args.plus:
                one.n_episodes = len(variants[task.index])
            evaluate_task(one, network)
            # where it was not given, the evaluation has set it
            done.append((task, one.n_episodes))
        except UserError as error:
            failures.append(f"{task.key}: {error}")
            print(f"failed: {error}", flush=True)
    if done:
        done = with_earlier(done, suite, folder, earlier_numbers(args, suite))
        summary = summarised(args, suite, done, folder)
        there = {task.key for task, _ in done}
        summary["missing"] = [task.key for task in tasks if task.key not in there]
        write_json(folder / "suite.json", summary)
        write_page(summary, folder)
        print_suite(summary)
        print(f"  {folder}/suite.json, report.html")
    if failures:
        raise UserError(
            f"{len(failures)} of {len(tasks)} tasks failed, first {failures[0]}; the others are in "
            f"{folder}, the same command goes on"
        )
    return 0 if summary["n"] else 1


def earlier_numbers(args, suite):
    """How many episodes count of a task that an earlier command has finished: as many as of this
    command's, so that a rate of fewer is not one of some tasks' few and others' many.

    -> a call, for a Task.
    """
    if args.plus and args.n_episodes and args.task_ids == "all":
        chosen = plus.chosen(suite, args.plus, chosen_tasks(suite), args.n_episodes)
        return lambda task: len(chosen[task.index])
    return lambda task: args.n_episodes or math.inf


def with_earlier(done, suite, folder, most):
    """[(task, its episodes)], and those that earlier commands have finished in the same folder with
    the same settings, at most `most(task)` of each: the whole is of all that is there. Says which
    are of others.
    """
    now, settings = {task.index for task, _ in done}, settings_of(folder / done[0][0].key)
    for task in chosen_tasks(suite):
        if task.index in now or not (folder / task.key / "summary.json").is_file():
            continue
        if settings_of(folder / task.key) != settings:
            print(f"{task.key}: is there, of other settings, and left out")
        else:
            done = [*done, (task, most(task))] if most(task) else done
    return sorted(done, key=lambda pair: pair[0].index)


def settings_of(folder):
    """What the evaluation of one of several tasks has in common with the others."""
    path = folder / "settings.json"
    found = read_json(path, "evaluation") if path.is_file() else {}
    return {name: value for name, value in found.items() if name not in OWN}


def without_unmoved(layout, tasks):
    """The tasks of all in which a layout moves an object; says which are left out. Raises UserError
    where none is left.
    """
    left = [task for task in tasks if layouts.has_what_moves(layout, task)]
    if not left:
        raise UserError(f"--layout {layout}: no task of the suite names an object to be moved")
    for task in tasks:
        if task not in left:
            print(f"{task.key}: left out, {task.language!r} names no object that {layout} moves")
    return left


def folder_name(args, info, suite):
    """Name of the folder of all tasks, where --out is not given."""
    words = [run_name(args.ckpt)] if args.ckpt else []
    policy = args.label or args.policy
    words += [info.get("model_type", policy), suite, place_of(args)]
    told = args.instruction is not None or args.instruction_of is not None
    return "_".join(words + (["told_otherwise"] if told else []))


def of_one(args, task, folder, info):
    """The flags for one of several tasks. Where they were not given, the steps are the suite's,
    one episode is filmed, and the orientation is kept in tasks whose demonstrations keep it.
    """
    values = {"task_suite": task.suite, "task_id": task.index, "out": folder / task.key}
    values["max_steps"] = args.max_steps or STEPS.get(task.suite, USUAL_STEPS)
    values["n_videos"] = 1 if args.n_videos is None else args.n_videos
    turned = info.get("turned", {}).get(task.key)
    if args.zero_rotation is None and turned is not None:
        values["zero_rotation"] = turned < STILL
    return argparse.Namespace(**{**vars(args), **values})


# -- the whole ------------------------------------------------------------------------------------


def summarised(args, suite, tasks, folder):
    """The suite's summary, JSON-able, from the folders of its tasks: [(task, its episodes)]."""
    steps = args.max_steps or STEPS.get(suite, USUAL_STEPS)
    cells, every = [], []
    summaries = [read_summary(folder / task.key) for task, _ in tasks]
    for (task, n), summary in zip(tasks, summaries):
        # an earlier run in the same folder may have gone further
        rows = [r for index, r in scored_episodes(folder / task.key).items() if index < n]
        every += rows
        # what was said, where it was another task's sentence
        said = {row.get("instruction", task.language) for row in rows}
        words = said.pop() if len(said) == 1 else task.language
        known = {"instruction": words, "crashes": summary["crashes"]}
        cells.append({"task": task.key, **known, **rates(rows, steps)})
    first = summaries[0]
    kept = ("model_type", "policy", "setting", "split", "checkpoint", "trained", "versions")
    found = [c["success_rate"] for c in cells if c["n"]]
    return {
        "suite": suite,
        **{key: first.get(key) for key in kept},
        "steps": steps,
        **rates(every, steps),
        # tasks may have different numbers of episodes
        "mean_of_tasks": sum(found) / len(found) if found else None,
        "crashes": sum(cell["crashes"] for cell in cells),
        "tasks": cells,
        **groups(every, steps),
        "command": command_line(),
        "commit": git_commit(),
    }


def groups(rows, steps):
    """{"groups": counts and rates of LIBERO-Plus's variants by angle and distance, by radius or by
    level}; {} for other episodes.
    """
    names = sorted({row["group"] for row in rows if "group" in row})
    of = {name: [row for row in rows if row["group"] == name] for name in names}
    found = [{"group": name, **rates(of[name], steps)} for name in names]
    return {"groups": found} if found else {}


def rates(rows, steps):
    """Counts and rates within `steps` control steps, of episodes that ran."""
    n, found = len(rows), {"n": len(rows)}
    for key in ("success", "released"):
        reached = sum(within(r, key, steps) for r in rows)
        found[key] = reached
        found[f"{key}_rate"] = reached / n if n else None
        found[f"{key}_interval"] = wilson(reached, n)
    found["mean_steps"] = sum(r["steps"] for r in rows) / n if n else None
    # each task says another sentence
    return {**found, **{k: v for k, v in told(rows).items() if k != "instruction"}}


def table_rows(summary, shown):
    """Rows of the table of tasks, the whole at the end. shown: a rate and its interval as text."""
    rows = []
    whole = {"task": "all", "instruction": "", **summary}
    for cell in (*summary["tasks"], whole):
        row = [cell["task"], cell["instruction"], cell["n"]]
        for key in ("success", "released"):
            row.append(shown(cell[f"{key}_rate"], cell[f"{key}_interval"]) if cell["n"] else "-")
        row.append(f"{cell['mean_steps']:.0f}" if cell["n"] else "-")
        if "went_to_named" in summary:
            known = "went_to_named" in cell
            went = (cell["went_to_named_rate"], cell["went_to_named_interval"]) if known else ()
            row.append(shown(*went) if known else "-")
        rows.append(row)
    return rows


def group_rows(summary, shown):
    """Rows of the table of groups, under GROUP_COLUMNS."""
    return [
        [g["group"], g["n"], shown(g["success_rate"], g["success_interval"])]
        for g in summary.get("groups", ())
    ]


def columns(summary):
    named = ("went to the named object",) if "went_to_named" in summary else ()
    return [*COLUMNS, *named]


def print_suite(summary):
    """The suite's table as a user reads it."""
    title = f"{summary['model_type']} on {summary['suite']}, {summary['setting']} layout"
    print(f"\n{title}, within {summary['steps']} steps")
    print(markdown_table(columns(summary), table_rows(summary, percent)))
    if "groups" in summary:
        print("\n" + markdown_table(GROUP_COLUMNS, group_rows(summary, percent)))
    if summary["n"]:
        print(f"  mean of the tasks {100 * summary['mean_of_tasks']:.1f}%")
    if lacking := lacks(summary):
        print(f"  {lacking}")


def lacks(summary):
    """What a suite's rates are not of, as a sentence; "" where they are of all."""
    crashed = f"{summary['crashes']} episodes crashed" * bool(summary["crashes"])
    missing = f"tasks that failed: {', '.join(summary['missing'])}" * bool(summary["missing"])
    parts = "; ".join(filter(None, [crashed, missing]))
    return f"left out: {parts}" if parts else ""


def write_page(summary, folder):
    """report.html: the table, and one film of each task."""
    title = f"{summary['model_type']} on {summary['suite']}, {summary['setting']} layout"
    cells = [[html.escape(str(c)) for c in row[:2]] + row[2:] for row in table_rows(summary, rate)]
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>",
        f"<p class=lead>Within {summary['steps']} control steps; Wilson 95% intervals.</p>",
        html_table(columns(summary), [[str(c) for c in row] for row in cells], strong=(3,)),
        f"<p>{html.escape(lacks(summary))}</p>",
    ]
    if "groups" in summary:
        parts.append(html_table(GROUP_COLUMNS, group_rows(summary, rate), strong=(2,)))
    parts.append("<h2>One episode of each task</h2>")
    for cell in summary["tasks"]:
        films = sorted((folder / cell["task"] / "videos").glob("*.mp4"))
        if films:
            outcome = films[0].stem.partition("_")[2]
            parts.append(figure(films[0], f"{cell['task']}: {cell['instruction']} ({outcome})"))
    parts.append(f"<h2>Command</h2><pre>{html.escape(summary['command'])}</pre>")
    with atomic_path(folder / "report.html") as scratch:
        scratch.write_text("\n".join(parts))
