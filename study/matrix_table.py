"""The table of rows (policies) x layouts: rates with intervals, paired tests, where the time went;
as JSON, Markdown, PNG, HTML.

Everything is computed from the per-episode rows of evaluations in FOLDER/evals/ROW-LAYOUT[-sSEED]
and from FOLDER/nodes.jsonl. The rate of several seeds of training is the mean of their rates.
Evaluations that run_matrix.py would not have made stand apart, marked *.
"""

import collections
import html
import re
import shlex
from pathlib import Path

import numpy as np

from figures import plots, plots_rates
from figures.pages import STYLE, embed, figure, html_table, markdown_table, percent
from harness.metrics import EARLY, ERROR, OUTCOMES, within
from harness.records import read_tabled, scored_episodes
from harness.statistics import holm, paired_comparison, seeds_interval
from runtime import UserError, atomic_path, read_jsonl, write_json
from study.matrix import INCIDENTAL, PLACES, RECIPES, REFERENCES

FILES = ("table.json", "table.md", "table.png", "report.html", "verdict.png")
MARKS = "<!-- matrix -->", "<!-- /matrix -->"
RATES = ("success", "released")
RATES_NAMES = {"success": "LIBERO's predicate", "released": "placed and released"}
NEAR = tuple(f"{name}_{e}px" for name in ("coverage", "on_path") for e in (4, 8, 16))
PATHS = 9  # column of the long table at which paths and training begin
NAMES = {  # of the rows that the verdict's picture has a line for
    "para": "PARA",
    "act": "ACT",
    "a_mlp": "A, MLP head",
    "a_pointer": "A, pointer",
    "b": "B",
    "c": "C",
    "d": "D, volume head",
}
MEANS = ("steps", "jerk_mm", "third_difference_mm", *NEAR, "path_length_ratio")
BUDGET = {"--max_steps", "--max_minutes"}  # of a training: in columns of their own


# -- which command made it ------------------------------------------------------------------------


def words_of(command):
    """Words of a stored command line. Older ones were stored without quotes, and where a word of
    theirs has an apostrophe no shell could read them: these are split at blanks.
    """
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()


def flags_of(command):
    """A stored command line -> {flag: value}, as argparse reads it: the last of a repeated flag."""
    found, name = {}, None
    # after `python SCRIPT`
    for word in words_of(command)[2:]:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            found[name] = value
        elif name:
            # a flag of several values keeps them all, with blanks between
            found[name] = f"{found[name]} {word}".strip()
    return found


def differing(made, asked, ignored):
    """Flags that two command lines do not share, as text; "" for none. Of paths only the name
    counts that says what is in them.
    """
    made, asked = flags_of(made), flags_of(asked)
    name = {
        "--ckpt": lambda value: Path(value).parent.name,
        "--dataset": lambda value: Path(value).stem,
    }
    value = lambda flags, flag: name.get(flag, str)(flags[flag]) if flag in flags else "left out"
    # flags of either side, in a fixed order for the text
    names = sorted((made.keys() | asked.keys()) - ignored)
    return ", ".join(
        f"{n} {value(made, n)} for {value(asked, n)}"
        for n in names
        if value(made, n) != value(asked, n)
    )


def made_otherwise(folder, summary, asked):
    """Why an evaluation is none that run_matrix.py makes, as text; "" for one that is.

    asked: the two command lines by which run_matrix.py would make it, (evaluation, training or
    None); None where it never would make such a one.
    """
    if asked is None:
        return "run_matrix.py has no such seed"
    evaluation, training = asked
    # a folder with another name than its --out was copied or renamed by hand
    place = flags_of(summary["command"]).get("--out", "")
    why = [] if Path(place).name == Path(folder).name else [f"copied from {place or 'elsewhere'}"]
    if found := differing(summary["command"], evaluation, INCIDENTAL | PLACES):
        why.append(f"evaluation with {found}")
    trained = (summary["trained"] or {}).get("command")
    if training and trained:
        # a resumed training stores --resume FOLDER instead of its flags: its folder has to fit
        resumed = flags_of(trained).get("--resume")
        same = resumed and Path(resumed).name == Path(flags_of(training)["--out"]).name
        if found := "" if same else differing(trained, training, PLACES | INCIDENTAL | BUDGET):
            why.append(f"training with {found}")
    return "; ".join(why)


def read_cells(folder, rows, layouts, recipe):
    """Finished evaluations -> [{"row", "layout", "otherwise": {seed: why}, "runs": {seed or "":
    {"folder", "summary", "episodes": {index: row}}}}], in the order of `rows` and `layouts`. Runs
    that run_matrix.py would not make are a cell of their own, with "otherwise". recipe(row, layout,
    seed): what `made_otherwise` asks for.

    Raises UserError where trained policies saw different features.
    """
    cells, features = {}, {}
    for path in sorted(Path(folder, "evals").glob("*/summary.json")):
        # ROW-LAYOUT-sSEED; without training there is no seed: ""
        row, layout, seed, *more = *path.parent.name.split("-"), "", ""
        known = row in rows and layout in layouts and re.fullmatch(r"(s\d+)?", seed)
        if not known or any(more):
            raise UserError(
                f"{path.parent}: its name is no ROW-LAYOUT-sSEED of the table; move it elsewhere"
            )
        episodes = scored_episodes(path.parent)
        summary = read_tabled(path.parent)
        if not episodes:
            continue
        why = made_otherwise(path.parent, summary, recipe(row, layout, seed))
        # runs by other commands do not mix with those of the plan: a cell of their own
        cell = cells.setdefault(
            (row, layout, bool(why)), {"row": row, "layout": layout, "otherwise": {}, "runs": {}}
        )
        cell["runs"][seed] = {"folder": path.parent, "summary": summary, "episodes": episodes}
        cell["otherwise"].update({seed: why} if why else {})
        if summary["trained"]:
            # policies on different backbones are no comparison of policies
            features.setdefault(summary["trained"]["backbone_identity"], path.parent)
    if len(features) > 1:
        raise UserError(
            "one backbone for the whole table: "
            + ", but ".join(f"{where} saw {n}" for n, where in features.items())
        )
    return sorted(
        cells.values(),
        key=lambda c: (rows.index(c["row"]), layouts.index(c["layout"]), bool(c["otherwise"])),
    )


# -- numbers --------------------------------------------------------------------------------------


def paired(cell, reference, key, steps=None):
    """A cell against another one on the same episodes and seeds of training (a policy without seeds
    against each of them) -> `paired_comparison`; None where nothing is shared. steps: see `rate`.
    """
    by_seed = {}
    # pair by pair: the same seed, and of it the episodes that both have
    for seed, other in reference["runs"].items():
        # the same seed of training, or the only run of a policy without seeds
        own = cell["runs"].get(seed) or cell["runs"].get("")
        if own and (shared := sorted(own["episodes"].keys() & other["episodes"].keys())):
            won = lambda run, i: int(within(run["episodes"][i], key, steps))
            by_seed[seed] = {i: won(own, i) - won(other, i) for i in shared}
    return paired_comparison(by_seed) if by_seed else None


def rate(cell, key, steps=None):
    """A cell's success rate, within so many steps if given: {"rate" mean of its seeds', "interval",
    "by_seed"}.
    """
    # seed -> {episode: success}, so that the interval can pair episodes over seeds
    won = {
        seed: {i: within(e, key, steps) for i, e in run["episodes"].items()}
        for seed, run in cell["runs"].items()
    }
    by_seed = {seed: float(np.mean(list(w.values()))) for seed, w in won.items()}
    return {
        "rate": float(np.mean(list(by_seed.values()))),
        "interval": seeds_interval(list(won.values())),
        "by_seed": by_seed,
    }


def numbers(cell, reference):
    """All that the table says of a cell, JSON-able. reference: the cell that it is compared with,
    or None.
    """
    episodes = [e for run in cell["runs"].values() for e in run["episodes"].values()]
    trained = [
        run["summary"]["trained"] for run in cell["runs"].values() if run["summary"]["trained"]
    ]
    mean = lambda values: float(np.mean(values)) if len(values) else None
    # seconds of the network alone, without simulator
    thinking = sum(e["seconds"]["features"] + e["seconds"]["policy"] for e in episodes)
    commits = [run["summary"]["commit"] for run in cell["runs"].values()]
    all_commits = [*commits, *(t.get("commit") for t in trained)]
    found = {
        "row": cell["row"],
        "layout": cell["layout"],
        "reference": reference and reference["row"],
        "seeds": sorted(cell["runs"]),
        "n": len(episodes),
        "otherwise": cell["otherwise"],
        "uncommitted": any(str(c).endswith("+") for c in all_commits),
        "crashes": sum(run["summary"]["crashes"] for run in cell["runs"].values()),
    }
    for key in RATES:
        # no comparison of the reference with itself, nor of what other commands made
        compared = reference not in (None, cell) and not cell["otherwise"]
        late, early = (
            {
                **rate(cell, key, steps),
                "against_reference": paired(cell, reference, key, steps) if compared else None,
            }
            for steps in (None, EARLY)
        )
        found[key] = {**late, "early": early}
    found["outcomes"] = {o: sum(e["outcome"] == o for e in episodes) for o in (*OUTCOMES, ERROR)}
    found.update({key: mean([e[key] for e in episodes if e.get(key) is not None]) for key in MEANS})
    found["train_minutes"] = mean([t["minutes"] for t in trained])
    found["train_steps"] = mean([t["step"] for t in trained])
    found["decisions_per_second"] = (
        sum(e["decisions"] for e in episodes) / thinking if thinking else None
    )
    found["seconds_per_episode"] = mean([e["seconds"]["total"] for e in episodes])
    found["commands"] = [run["summary"]["command"] for run in cell["runs"].values()]
    found["commits"] = sorted(set(commits))
    return found


def adjust(table):
    """Put Holm's adjusted p, over all comparisons of a table, beside each p: "p_holm"."""
    for key in RATES:
        # one family of tests a metric and budget of steps: all comparisons in a column of the table
        for family in ([c[key] for c in table], [c[key]["early"] for c in table]):
            pairs = [c["against_reference"] for c in family if c["against_reference"]]
            for pair, p in zip(pairs, holm([pair["p"] for pair in pairs])):
                pair["p_holm"] = p


def time_spent(folder):
    """Minutes by kind of step, of all commands that ran, failures included: {"collect": ...,
    "train": ...}.
    """
    spent = collections.Counter()
    for row in read_jsonl(Path(folder, "nodes.jsonl"), form={"node": str, "seconds": float}):
        # nodes are called KIND-..., e.g. train-para-in_dist-s0
        spent[row["node"].split("-")[0]] += row["seconds"] / 60
    return {kind: round(minutes, 2) for kind, minutes in spent.items()}


# -- as text --------------------------------------------------------------------------------------


def versus(pair, several=False):
    """A paired comparison as text: percentage points with their interval, episodes won and lost, by
    seed where there are several, p by Holm. several: whether the rates beside it are of several
    seeds, so that a comparison of one says which.
    """
    if pair is None:
        return "-"
    points = lambda difference: f"{100 * difference:+.0f}"
    low, high = map(points, pair["interval"])
    seeds = [points(p["difference"]) for p in pair["by_seed"].values()]
    by_seed = f", seeds {' '.join(seeds)}" if len(seeds) > 1 else ""
    if several and not by_seed:
        by_seed = f", {' '.join(pair['by_seed'])} alone"
    counts = f"{pair['better']}:{pair['worse']}{by_seed}"
    return f"{points(pair['difference'])} [{low} to {high}] ({counts}), p {pair['p_holm']:.2g}"


def number(value, form):
    return "-" if value is None else format(value, form)


def names(table):
    """(rows, layouts) that a table has, each once."""
    return tuple(list(dict.fromkeys(c[key] for c in table)) for key in ("row", "layout"))


def marks(cell):
    """* for what run_matrix.py would not have made, + for a checkout other than its commit."""
    return "*" * bool(cell["otherwise"]) + "+" * cell["uncommitted"]


def shown_cells(table):
    """{(row, layout): the cell to show}. A cell that run_matrix.py would not make is shown only
    where there is no other.
    """
    # read_cells sorts the plan's own first, so reversed it comes last and stays
    return {(c["row"], c["layout"]): c for c in reversed(table)}


def both_rates(cell, metric):
    """A cell's rates within EARLY steps and at the end, each with its interval, as text."""
    early, late = (
        percent(found["rate"], found["interval"]) for found in (cell[metric]["early"], cell[metric])
    )
    return f"{early} / {late}{marks(cell)}"


def short_table(table, metric):
    """(head, rows) of strings: a row a policy, a column a layout."""
    rows, layouts = names(table)
    at = shown_cells(table)
    text = lambda c: "-" if c is None else f"{both_rates(c, metric)}, n = {c['n']}"
    return ["policy", *layouts], [
        [row, *(text(at.get((row, layout))) for layout in layouts)] for row in rows
    ]


def against(table, reference):
    """What the rows of a table are compared with, as text -> (for a head, for a sentence)."""
    rows, _ = names(table)
    own = {}
    for row in rows:
        if row in REFERENCES:
            own.setdefault(REFERENCES[row], []).append(row)
    if not own:
        return reference, reference
    apart = "; ".join(f"of {', '.join(of)} it is {name}" for name, of in own.items())
    return "the reference", f"the reference ({reference}; {apart})"


def long_table(table, metric, reference):
    """(head, rows) of strings: a row a cell."""
    other, _ = against(table, reference)
    head = [
        "policy",
        "layout",
        "n (seeds)",
        f"LIBERO success, {EARLY} steps / end",
        f"placed and released, {EARLY} steps / end",
        f"against {other} in {EARLY} steps, points (won:lost)",
        f"against {other} at the end",
        "miss / grasp / place / released / error",
        "steps",
        "jerk (2nd difference, mm/step²)",
        "3rd difference, mm/step³",
        "coverage 4 / 8 / 16 px",
        "on path 4 / 8 / 16 px",
        "path length",
        "training steps",
        "training min",
        "decisions/s",
    ]
    near = lambda c, name: " / ".join(number(c[f"{name}_{e}px"], ".2f") for e in (4, 8, 16))
    seeds = {(c["row"], c["layout"]): len(c["seeds"]) for c in table}
    several = lambda c: max(len(c["seeds"]), seeds.get((c["reference"], c["layout"]), 1)) > 1
    rows = [
        [
            c["row"] + marks(c),
            c["layout"],
            f"{c['n']} ({' '.join(c['seeds']) or '-'})",
            *(both_rates(c, key) for key in RATES),
            versus(c[metric]["early"]["against_reference"], several(c)),
            versus(c[metric]["against_reference"], several(c)),
            " / ".join(map(str, c["outcomes"].values())),
            number(c["steps"], ".0f"),
            number(c["jerk_mm"], ".2f"),
            number(c["third_difference_mm"], ".2f"),
            near(c, "coverage"),
            near(c, "on_path"),
            number(c["path_length_ratio"], ".2f"),
            number(c["train_steps"], ".0f"),
            number(c["train_minutes"], ".1f"),
            number(c["decisions_per_second"], ".1f"),
        ]
        for c in table
    ]
    return head, rows


def columns(table, which):
    """(head, rows) of some columns of a table."""
    head, rows = table
    return [head[i] for i in which], [[row[i] for i in which] for row in rows]


def explained(metric, reference, spent, table):
    """What has to be known to read the table."""
    label, (short, long) = RATES_NAMES[metric], against(table, reference)
    text = (
        f"Success by {label} within {EARLY} control steps / by the end of the episode, with 95% "
        "intervals: Wilson's over the episodes of one training, which says nothing about another; "
        "of several seeds the mean, with a bootstrap over seeds and episodes. "
        f"Against {long} on the same episodes, each once (with its mean over seeds): "
        "difference in percentage points with its interval (Bonett and Price's, of several seeds "
        "the bootstrap's), episodes that only the one or only "
        f"{short} solves, exact McNemar p, adjusted by Holm over the column. Jerk is the mean "
        "second difference of the executed path, an acceleration; the third difference is the "
        "jerk of physics. Coverage: share of the expert's path near the executed one; on path: "
        "share of the executed path near the expert's; path length: executed by expert's."
    )
    if spent:
        parts = ", ".join(f"{kind} {minutes:.0f}" for kind, minutes in spent.items())
        text += f" Minutes of all steps: {parts}; {sum(spent.values()):.0f} in all."
    apart = [
        f"{c['row']} {c['layout']} {seed}".strip() + f" ({why})"
        for c in table
        for seed, why in c["otherwise"].items()
    ]
    if apart:
        text += (
            " Marked *, made by other commands than run_matrix.py's and in no mean or comparison: "
            f"{'; '.join(apart)}."
        )
    if any(c["uncommitted"] for c in table):
        text += " Marked +: from a checkout with changes to its commit."
    return text


def insert(path, text):
    """Put text between a file's marks. Raises UserError where they are not."""
    path = Path(path)
    try:
        # before, mark, old table, mark, after: only what is between the marks changes
        before, _, rest = path.read_text().partition(MARKS[0])
    except OSError as error:
        raise UserError(f"--readme {path}: cannot be read ({error.strerror})") from error
    _, closed, after = rest.partition(MARKS[1])
    if not closed:
        raise UserError(
            f"--readme {path}: has no lines {MARKS[0]} and {MARKS[1]}; "
            "put them where the table belongs"
        )
    with atomic_path(path) as scratch:
        scratch.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


# -- as a picture and a page ----------------------------------------------------------------------


def shown_video(cell, metric):
    """(file, caption) of the most telling film of a cell, a failure where one was filmed; None
    without any.
    """
    found = []
    for seed, run in cell["runs"].items():
        for path in sorted((run["folder"] / "videos").glob("*.mp4")):
            episode, outcome = path.stem.split("_", 1)
            row = run["episodes"].get(int(episode))
            if row and row["outcome"] == outcome:
                where = f"{cell['row']}, {cell['layout']}{seed and ' ' + seed}"
                caption = f"{where}, episode {int(episode)}: {outcome}"
                found.append((row[metric], path, caption))
    # False sorts before True: a failure first
    return min(found, key=lambda f: f[0])[1:] if found else None


def page(cells, table, metric, reference, spent, pictures):
    """The HTML report."""

    def shown(head, rows, strong=()):
        return html_table(
            [html.escape(h) for h in head], [[html.escape(c) for c in row] for row in rows], strong
        )

    long = long_table(table, metric, reference)
    parts = [
        "<!doctype html><meta charset=utf-8><title>The verdict</title>",
        f"<style>{STYLE}</style>",
        "<h1>Every policy in every setting</h1>",
        f"<p class=lead>{html.escape(explained(metric, reference, spent, table))}</p>",
        shown(*short_table(table, metric)),
        *(f'<img alt="success rates" src="{embed(p, "image/png")}">' for p in pictures),
        "<h2>All numbers</h2>",
        shown(*columns(long, range(PATHS)), strong=(RATES.index(metric) + 3,)),
        "<h2>Paths and training</h2>",
        shown(*columns(long, [0, 1, *range(PATHS, len(long[0]))])),
        "<h2>One episode a cell</h2>",
        "<p class=lead>A failure where one was filmed.</p>",
    ]
    parts += [figure(*video) for video in (shown_video(cell, metric) for cell in cells) if video]
    parts += [
        "<h2>Commands</h2><pre>",
        *(html.escape(command) for c in table for command in c["commands"]),
        "</pre>",
    ]
    return "\n".join(parts)


def draw_verdict(table, metric, path):
    """The verdict at a glance, of the cells of a table.json: within EARLY steps, plain against
    recipe. Attempts that are no policy's recipe have no line.
    """
    _, layouts = names(table)
    cells = {
        place: {**cell[metric]["early"], "otherwise": cell["otherwise"]}
        for place, cell in shown_cells(table).items()
    }
    tabled = {row for row, _ in cells}
    plain = [row for row in RECIPES if tabled & {row, *RECIPES[row]}]
    caption = f"{RATES_NAMES[metric]} within {EARLY} control steps, %, with 95% intervals"
    plots_rates.verdict(cells, plain, layouts, RECIPES, NAMES, path, caption)


def write(cells, folder, metric, reference, info):
    """Write FILES into folder -> the Markdown. reference: the row that those are compared with
    which have no other one in REFERENCES; info: provenance.
    """
    folder, at = Path(folder), {(c["row"], c["layout"]): c for c in cells if not c["otherwise"]}
    other = lambda c: at.get((REFERENCES.get(c["row"], reference), c["layout"]))
    table = [numbers(c, other(c)) for c in cells]
    adjust(table)
    spent = time_spent(folder)
    write_json(
        folder / FILES[0],
        {**info, "metric": metric, "reference": reference, "minutes": spent, "cells": table},
    )
    text = "\n\n".join(
        [
            markdown_table(*short_table(table, metric)),
            explained(metric, reference, spent, table),
            markdown_table(*long_table(table, metric, reference)),
        ]
    )
    with atomic_path(folder / FILES[1]) as scratch:
        scratch.write_text(text + "\n")
    rows, layouts = names(table)
    # NaN is an empty field of the picture
    rates, labels = np.full((len(rows), len(layouts)), np.nan), {}
    for c in shown_cells(table).values():
        place = rows.index(c["row"]), layouts.index(c["layout"])
        rates[place], labels[place] = (
            c[metric]["early"]["rate"],
            both_rates(c, metric).replace(" / ", "\n") + f"\nn = {c['n']}",
        )
    plots.rate_map(rows, layouts, rates, labels, folder / FILES[2])
    draw_verdict(table, metric, folder / FILES[4])
    pictures = folder / FILES[4], folder / FILES[2]
    with atomic_path(folder / FILES[3]) as scratch:
        scratch.write_text(page(cells, table, metric, reference, spent, pictures))
    return text
