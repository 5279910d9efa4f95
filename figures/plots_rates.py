"""Pictures of success rates with their intervals: the verdict over policies and settings, a
comparison of a few results, and rates against demonstrations.

Readable in grey and by the colour-blind: what colours tell apart, shapes tell too.
"""

import textwrap

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from figures.plots import _save, plt

# of Okabe and Ito's palette: a dark and a light one, apart in grey as well
PLAIN, RECIPE = "#d55e00", "#0072b2"
FLOOR, CEILING = "#dddddd", "#444444"
SERIES = (RECIPE, PLAIN, "#009e73")  # two lines each, open and full
SHIFT = 0.17  # rows by which plain and recipe stand apart
POINTS = {"textcoords": "offset points", "fontsize": 10}


def interval(axis, found, row, colour, marker, filled):
    """One rate with its 95% interval, in percent, at the height of a row; a tick for each seed.

    found: {"rate", "interval", "by_seed"}.
    """
    low, high = (100 * bound for bound in found["interval"])
    rate = 100 * found["rate"]
    axis.plot([low, high], [row, row], color=colour, linewidth=1.6, solid_capstyle="butt")
    if len(found["by_seed"]) > 1:
        seeds = [100 * value for value in found["by_seed"].values()]
        axis.plot(seeds, [row] * len(seeds), "|", color=colour, markersize=7)
    face = colour if filled else "white"
    axis.plot(rate, row, marker, color=colour, markerfacecolor=face, markersize=6)


def sparse(axis, rates):
    """Pale lines at the rates, along "x" or "y", below everything else; a frame of two sides."""
    axis.grid(axis=rates, color="#eeeeee")
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def verdict(cells, rows, columns, recipes, names, path, caption):
    """Every policy in every setting: a panel a column, a line a policy, plain and with the recipe.

    cells: {(row, column): {"rate", "interval", "by_seed", "otherwise"}}, as in table.json; rows:
    plain policies from the top; recipes: {plain row: its rows with the recipe, of which the first
    that a column has is drawn}; names: {row: what stands on the axis}. "blind" is the floor and
    "oracle" the ceiling of a column, "expert" of `moved_midway`, where the oracle follows the path
    of a bowl that was not moved. A cell made by other commands has a star.
    """
    figure, axes = plt.subplots(
        1,
        len(columns),
        figsize=(1.1 + 1.2 * len(columns), 1.5 + 0.42 * len(rows)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, column in zip(axes[0], columns):
        if floor := cells.get(("blind", column)):
            axis.axvspan(-5, 100 * floor["rate"], color=FLOOR, linewidth=0, zorder=0)
        highest = "expert" if column == "moved_midway" else "oracle"
        if ceiling := cells.get((highest, column)):
            axis.axvline(100 * ceiling["rate"], color=CEILING, linestyle=(0, (3, 2)), zorder=1)
        for y, row in enumerate(rows):
            recipe = next((r for r in recipes.get(row, ()) if (r, column) in cells), None)
            both = ((row, PLAIN, "o", False), (recipe, RECIPE, "D", True))
            # the plain one above, the recipe below; alone, on the line itself
            there = [kind for kind in both if (kind[0], column) in cells]
            for kind in there:
                name, *style = kind
                height = y + (SHIFT if kind is both[1] else -SHIFT) * (len(there) - 1)
                found = cells[name, column]
                interval(axis, found, height, *style)
                if found["otherwise"]:
                    axis.annotate("*", (100 * found["rate"], height), (4, 1), **POINTS)
        axis.set_title("\n".join(textwrap.wrap(column.replace("_", " "), 10)), fontsize=9)
        axis.set(xlim=(-5, 105), xticks=(0, 50, 100), ylim=(len(rows) - 0.4, -0.6))
        axis.tick_params(labelsize=8, length=2)
        sparse(axis, "x")
    axes[0, 0].set_yticks(range(len(rows)), [names.get(row, row) for row in rows], fontsize=9)
    legend(figure)
    figure.supxlabel(caption, fontsize=9)
    _save(figure, path)


def legend(figure):
    """What shapes and lines of the verdict mean, above the panels."""
    mark = {"color": PLAIN, "marker": "o", "markerfacecolor": "white"}
    figure.legend(
        handles=[
            Line2D([], [], **mark, label="plain"),
            Line2D([], [], color=RECIPE, marker="D", label="with the recipe"),
            Line2D(
                [], [], color=CEILING, linestyle=(0, (3, 2)), label="the ceiling: oracle, or expert"
            ),
            Patch(color=FLOOR, label="blind, the floor"),
        ],
        loc="outside upper center",
        ncols=4,
        frameon=False,
        fontsize=9,
    )


def comparison(results, path, caption):
    """A few results, a line each: left their rates, right their differences from the first.

    results: [{"name", "n", "rate", "interval", "by_seed", "against": None or {"difference",
    "interval", "p_holm", "paired"}}].
    """
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 1.3 + 0.42 * len(results)), sharey=True, width_ratios=(1, 1)
    )
    for row, found in enumerate(results):
        interval(left, found, row, RECIPE if found["against"] else CEILING, "o", True)
        if against := found["against"]:
            low, high = (100 * bound for bound in against["interval"])
            difference = 100 * against["difference"]
            right.plot([low, high], [row, row], color=RECIPE, linewidth=1.6)
            right.plot(difference, row, "D", color=RECIPE, markersize=6)
            text = f"p {against['p_holm']:.2g}, {'paired' if against['paired'] else 'unpaired'}"
            right.annotate(
                text, (difference, row), (0, 6), ha="center", **{**POINTS, "fontsize": 8}
            )
    labels = [f"{found['name']}, n = {found['n']}" for found in results]
    left.set_yticks(np.arange(len(results)), labels, fontsize=9)
    left.set(xlim=(-3, 103), ylim=(len(results) - 0.4, -0.6), xlabel=caption)
    right.axvline(0, color=CEILING, linewidth=1)
    right.set_xlabel(f"points more than {results[0]['name']}")
    for axis in (left, right):
        sparse(axis, "x")
    figure.tight_layout()
    _save(figure, path)


def curves(rows, path):
    """Rates against demonstrations a task, a panel a column, a line a series.

    rows: [{"series", "demos", "column", "success_rate", "success_interval"}].
    """
    columns = list(dict.fromkeys(row["column"] for row in rows))
    series = list(dict.fromkeys(row["series"] for row in rows))
    demos = sorted({row["demos"] for row in rows})
    figure, axes = plt.subplots(
        1,
        len(columns),
        figsize=(1 + 4 * len(columns), 3.7),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, column in zip(axes[0], columns):
        for i, name in enumerate(series):
            own = [row for row in rows if (row["column"], row["series"]) == (column, name)]
            rates = np.array([row["success_rate"] for row in own])
            bounds = np.array([row["success_interval"] for row in own]).reshape(-1, 2)
            # side by side, where intervals would hide each other
            x = np.array([row["demos"] for row in own]) * 1.04 ** (i - (len(series) - 1) / 2)
            colour = SERIES[i // 2 % len(SERIES)]
            axis.errorbar(
                x,
                100 * rates,
                100 * np.abs(bounds - rates[:, None]).T,
                color=colour,
                marker="oD"[i % 2],
                markerfacecolor=("white", colour)[i % 2],
                linestyle=("--", "-")[i % 2],
                linewidth=1.4,
                elinewidth=0.8,
                label=name,
            )
        axis.set(xscale="log", ylim=(-4, 104), title=column, xlabel="demonstrations a task")
        axis.set_xticks(demos, demos)
        axis.minorticks_off()
        sparse(axis, "y")
    axes[0, 0].set_ylabel("success, %")
    # above the panels, where no line can run through it
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    _save(figure, path)
