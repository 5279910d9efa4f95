"""The table of rows (policies) x layouts: rates with intervals, paired tests, where the time went; as JSON, Markdown, PNG, HTML.

Everything is computed from the per-episode rows of evaluations in FOLDER/evals/ROW-LAYOUT[-sSEED] and FOLDER/nodes.jsonl. Seeds
of training are pooled: n counts episodes of all of them.
"""
import collections
import html
from pathlib import Path

import numpy as np

import plots
from metrics import OUTCOMES, mcnemar, wilson
from pages import STYLE, embed, figure, html_table, markdown_table, percent, read_json
from runtime import UserError, atomic_path, read_jsonl, write_json

FILES = ("table.json", "table.md", "table.png", "report.html")
MARKS = "<!-- matrix -->", "<!-- /matrix -->"
RATES = ("success", "released")
MEANS = ("steps", "jerk_mm", "coverage_4px", "coverage_8px", "coverage_16px")


def read_cells(folder, rows, layouts):
    """Finished evaluations -> [{"row", "layout", "runs": {seed or "": {"folder", "summary", "episodes": {index: row}}}}], in the
    order of `rows` and `layouts`. Raises UserError where trained policies saw different features."""
    cells, features = {}, {}
    for path in sorted(Path(folder, "evals").glob("*/summary.json")):
        row, layout, seed = (*path.parent.name.split("-"), "")[:3]
        if row not in rows or layout not in layouts:
            raise UserError(f"{path.parent}: its name is no ROW-LAYOUT-sSEED of the table; move it elsewhere")
        episodes = {r["episode"]: r for r in read_jsonl(path.with_name("episodes.jsonl")) if "crash" not in r}
        summary = read_json(path, "finished evaluation")
        if not episodes:
            continue
        run = {"folder": path.parent, "summary": summary, "episodes": episodes}
        cells.setdefault((row, layout), {"row": row, "layout": layout, "runs": {}})["runs"][seed] = run
        if summary["trained"]:
            features.setdefault(summary["trained"]["backbone_identity"], path.parent)
    if len(features) > 1:
        raise UserError("one backbone for the whole table: " + ", but ".join(f"{where} saw {n}" for n, where in features.items()))
    return sorted(cells.values(), key=lambda c: (rows.index(c["row"]), layouts.index(c["layout"])))


def paired(cell, reference, key):
    """A cell against another one on the same episodes, those of the same seed of training (a policy without one against all of
    them). Pairs of several seeds are taken as independent.

    -> {"n" pairs, "better", "worse" (pairs in which only the one or only the other succeeds), "difference" of the rates, "p"
    exact McNemar}, or None where nothing is shared.
    """
    pairs = []
    for seed, other in reference["runs"].items():
        own = cell["runs"].get(seed) or cell["runs"].get("")
        if own:
            shared = own["episodes"].keys() & other["episodes"].keys()
            pairs += [(own["episodes"][i][key], other["episodes"][i][key]) for i in shared]
    if not pairs:
        return None
    better, worse = (sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))
    return {"n": len(pairs), "better": better, "worse": worse, "difference": (better - worse) / len(pairs),
            "p": mcnemar(better, worse)}


def numbers(cell, reference):
    """All that the table says of a cell, JSON-able. reference: the cell that it is compared with, or None."""
    episodes = [e for run in cell["runs"].values() for e in run["episodes"].values()]
    trained = [run["summary"]["trained"] for run in cell["runs"].values() if run["summary"]["trained"]]
    mean = lambda values: float(np.mean(values)) if len(values) else None
    thinking = sum(e["seconds"]["features"] + e["seconds"]["policy"] for e in episodes)
    found = {"row": cell["row"], "layout": cell["layout"], "seeds": sorted(cell["runs"]), "n": len(episodes),
             "crashes": sum(run["summary"]["crashes"] for run in cell["runs"].values())}
    for key in RATES:
        wins = sum(e[key] for e in episodes)
        by_seed = {seed: mean([e[key] for e in run["episodes"].values()]) for seed, run in cell["runs"].items()}
        found[key] = {"rate": wins / len(episodes), "interval": wilson(wins, len(episodes)), "by_seed": by_seed,
                      "against_reference": paired(cell, reference, key) if reference not in (None, cell) else None}
    found["outcomes"] = {o: sum(e["outcome"] == o for e in episodes) for o in OUTCOMES}
    found.update({key: mean([e[key] for e in episodes if e[key] is not None]) for key in MEANS})
    found["train_minutes"] = mean([t["minutes"] for t in trained])
    found["train_steps"] = mean([t["step"] for t in trained])
    found["decisions_per_second"] = sum(e["decisions"] for e in episodes) / thinking if thinking else None
    found["seconds_per_episode"] = mean([e["seconds"]["total"] for e in episodes])
    found["commands"] = [run["summary"]["command"] for run in cell["runs"].values()]
    found["commits"] = sorted({run["summary"]["commit"] for run in cell["runs"].values()})
    return found


def time_spent(folder):
    """Minutes by kind of step, of all commands that ran, failures included: {"collect": ..., "train": ...}."""
    spent = collections.Counter()
    for row in read_jsonl(Path(folder, "nodes.jsonl")):
        spent[row["node"].split("-")[0]] += row["seconds"] / 60
    return {kind: round(minutes, 2) for kind, minutes in spent.items()}


# -- as text ---------------------------------------------------------------------------------------------------------------


def versus(pair):
    """A paired comparison as text: percentage points, pairs won and lost, p."""
    if pair is None:
        return "-"
    return f"{100 * pair['difference']:+.0f} ({pair['better']}:{pair['worse']}), p {pair['p']:.2g}"


def number(value, form):
    return "-" if value is None else format(value, form)


def names(table):
    """(rows, layouts) that a table has, each once."""
    return tuple(list(dict.fromkeys(c[key] for c in table)) for key in ("row", "layout"))


def short_table(table, metric):
    """(head, rows) of strings: a row a policy, a column a layout."""
    rows, layouts = names(table)
    at = {(c["row"], c["layout"]): c for c in table}
    text = lambda c: "-" if c is None else f"{percent(c[metric]['rate'], c[metric]['interval'])}, n = {c['n']}"
    return ["policy", *layouts], [[row, *(text(at.get((row, layout))) for layout in layouts)] for row in rows]


def long_table(table, metric, reference):
    """(head, rows) of strings: a row a cell."""
    head = ["policy", "layout", "n", "LIBERO success", "placed and released", f"against {reference}, points (won:lost)",
            "miss / grasp / place / released", "steps", "jerk", "coverage 4 / 8 / 16 px", "training min", "decisions/s"]
    rows = [[c["row"], c["layout"], str(c["n"]), *(percent(c[key]["rate"], c[key]["interval"]) for key in RATES),
             versus(c[metric]["against_reference"]), " / ".join(map(str, c["outcomes"].values())), number(c["steps"], ".0f"),
             number(c["jerk_mm"], ".2f"), " / ".join(number(c[f"coverage_{e}px"], ".2f") for e in (4, 8, 16)),
             number(c["train_minutes"], ".1f"), number(c["decisions_per_second"], ".1f")] for c in table]
    return head, rows


def explained(metric, reference, spent):
    """What has to be known to read the table."""
    label = {"success": "LIBERO's predicate", "released": "placed and released"}[metric]
    parts = ", ".join(f"{kind} {minutes:.0f}" for kind, minutes in spent.items())
    time = f" Minutes of all steps: {parts}; {sum(spent.values()):.0f} in all." if spent else ""
    return (f"Success by {label}, with n and Wilson 95% interval; against {reference} on the same episodes: difference in "
            f"percentage points, episodes that only the one or only {reference} solves, exact McNemar p. Jerk in mm/step²."
            + time)


def insert(path, text):
    """Put text between a file's marks. Raises UserError where they are not."""
    path = Path(path)
    try:
        before, _, rest = path.read_text().partition(MARKS[0])
    except OSError as error:
        raise UserError(f"--readme {path}: cannot be read ({error.strerror})")
    _, closed, after = rest.partition(MARKS[1])
    if not closed:
        raise UserError(f"--readme {path}: has no lines {MARKS[0]} and {MARKS[1]}; put them where the table belongs")
    with atomic_path(path) as scratch:
        scratch.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


# -- as a picture and a page -----------------------------------------------------------------------------------------------


def shown_video(cell, metric):
    """(file, caption) of the most telling film of a cell, a failure where one was filmed; None without any."""
    found = []
    for seed, run in cell["runs"].items():
        for path in sorted((run["folder"] / "videos").glob("*.mp4")):
            episode, outcome = path.stem.split("_", 1)
            row = run["episodes"].get(int(episode))
            if row and row["outcome"] == outcome:
                caption = f"{cell['row']}, {cell['layout']}{seed and ' ' + seed}, episode {int(episode)}: {outcome}"
                found.append((row[metric], path, caption))
    return min(found, key=lambda f: f[0])[1:] if found else None


def page(cells, table, metric, reference, spent, picture):
    """The HTML report."""
    def shown(head, rows, strong=()):
        return html_table([html.escape(h) for h in head], [[html.escape(c) for c in row] for row in rows], strong)
    parts = ["<!doctype html><meta charset=utf-8><title>The verdict</title>", f"<style>{STYLE}</style>",
             "<h1>Every policy in every setting</h1>", f"<p class=lead>{html.escape(explained(metric, reference, spent))}</p>",
             shown(*short_table(table, metric)), f'<img alt="success rates" src="{embed(picture, "image/png")}">',
             "<h2>All numbers</h2>", shown(*long_table(table, metric, reference), strong=(RATES.index(metric) + 3,)),
             "<h2>One episode a cell</h2>", "<p class=lead>A failure where one was filmed.</p>"]
    parts += [figure(*video) for video in (shown_video(cell, metric) for cell in cells) if video]
    parts += ["<h2>Commands</h2><pre>", *(html.escape(command) for c in table for command in c["commands"]), "</pre>"]
    return "\n".join(parts)


def write(cells, folder, metric, reference, info):
    """Write FILES into folder -> the Markdown. reference: the row that others are compared with; info: provenance."""
    folder, at = Path(folder), {(c["row"], c["layout"]): c for c in cells}
    table = [numbers(c, at.get((reference, c["layout"]))) for c in cells]
    spent = time_spent(folder)
    write_json(folder / FILES[0], {**info, "metric": metric, "reference": reference, "minutes": spent, "cells": table})
    text = "\n\n".join([markdown_table(*short_table(table, metric)), explained(metric, reference, spent),
                        markdown_table(*long_table(table, metric, reference))])
    with atomic_path(folder / FILES[1]) as scratch:
        scratch.write_text(text + "\n")
    rows, layouts = names(table)
    rates, labels = np.full((len(rows), len(layouts)), np.nan), {}
    for c in table:
        place = rows.index(c["row"]), layouts.index(c["layout"])
        rates[place], labels[place] = c[metric]["rate"], percent(c[metric]["rate"], c[metric]["interval"]).replace(" ", "\n") + f"\nn = {c['n']}"
    plots.rate_map(rows, layouts, rates, labels, folder / FILES[2])
    with atomic_path(folder / FILES[3]) as scratch:
        scratch.write_text(page(cells, table, metric, reference, spent, folder / FILES[2]))
    return text
