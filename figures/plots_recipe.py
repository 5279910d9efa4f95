"""Picture of what trains, validates and tests with the recipe: bowl and plate from above, cameras
by their orbit and from above. Nothing is simulated or rendered.
"""

from dataclasses import replace

import numpy as np
from matplotlib.patches import Rectangle

from figures.plots import _save, plt
from sim import recipe, settings, verdict

COLOURS = {"train": "#00aa6e", "val": "#3c78ff", "test": "#eb3c3c", "low": "#f0a000"}
N_DEMOS = 300  # demonstrations that are drawn


def trained(turn_spread):
    """The first demonstrations as drawn, before any is refused -> list of settings.Condition."""
    found = []
    for i in range(N_DEMOS):
        clean = recipe.is_clean("train", 0, i)
        condition = recipe.drawn("train", 0, i, 0, clean)
        rng = np.random.default_rng([i, 1])
        (view,) = recipe.views(rng, "train", turn_spread, 1, recipe.LOOSE_CAMERA["train"])
        found.append(replace(view, places=condition.places))
    return found


def draw(path, turn_spread=recipe.TURN_SPREAD["train"]):
    """Write the picture of the recipe's conditions as a PNG."""
    demos = trained(turn_spread)
    figure = plt.figure(figsize=(15, 5), layout="constrained")
    table = figure.add_subplot(1, 3, 1)
    _positions(table, demos)
    orbits = figure.add_subplot(1, 3, 2, projection="polar")
    _orbits(orbits, demos)
    _above(figure.add_subplot(1, 3, 3), demos)
    for axes in (table, orbits):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, fontsize=8)
    _save(figure, path)


def _positions(axes, demos):
    """Bowl (filled) and plate (ring) of every condition, as the image has them: y to the right, the
    robot at the top.
    """
    sets = {"train": demos, "val": verdict.positions("val"), "test": verdict.positions("test")}
    for part, found in sets.items():
        for name, face in ((recipe.BOWL, COLOURS[part]), (recipe.PLATE, "none")):
            x, y = np.array([c.place_of[name] for c in found]).T
            label = f"{part}: {'bowl' if name == recipe.BOWL else 'plate'}"
            axes.scatter(y, x, 14, facecolors=face, edgecolors=COLOURS[part], label=label)
        low, high = recipe.Y[part]
        axes.add_patch(Rectangle((low, -0.31), high - low, 0.41, color=COLOURS[part], alpha=0.1))
    for places, mark, label in ((recipe.USUAL, "P", "benchmark"), (recipe.SWAPPED, "X", "swap")):
        for name, face in ((recipe.BOWL, "black"), (recipe.PLATE, "white")):
            x, y = places[name]
            what = {"label": f"{label}, joint: held out"} if face == "black" else {}
            axes.scatter(y, x, 70, marker=mark, c=face, edgecolors="black", zorder=3, **what)
    axes.set(xlabel="y, m (the image's right)", ylabel="x, m (away from the robot)", aspect=1)
    axes.invert_yaxis()
    axes.set_title("bowl (filled) and plate (ring), from above")


def _orbits(axes, demos):
    """Cameras by their orbit: the radius is theta, the angle phi, 0 down as the camera goes."""
    axes.set_theta_zero_location("S")
    sets = {
        "train": demos,
        "val": verdict.val_views(),
        "test": verdict.views(),
        "low": verdict.low_views(),
    }
    names = {"low": "test: viewpoint_low"}
    for part, found in sets.items():
        at = np.radians([c.phi for c in found]), [c.theta for c in found]
        axes.scatter(*at, 10, c=COLOURS[part], label=names.get(part, part))
    axes.set_title("cameras: degrees from agentview (turns not shown)")


def _above(axes, demos):
    """Where the cameras stand and look, from above."""
    _, E = settings.default_camera()
    sets = {"train": demos[:100], "test": verdict.views() + verdict.low_views()}
    for part, found in sets.items():
        cameras = [settings.orbit(E, c.theta, c.phi) for c in found]
        turned = [settings.turned(m, c.turn, recipe.BASE) for m, c in zip(cameras, found)]
        x, y, dx, dy = np.array([[*m[:2, 3], *m[:2, 2]] for m in turned]).T
        axes.quiver(y, x, dy, dx, color=COLOURS[part], width=0.003, scale=9, angles="xy")
    axes.scatter(recipe.BASE[1], recipe.BASE[0], 60, marker="s", c="black")
    axes.text(recipe.BASE[1] + 0.05, recipe.BASE[0], "robot", va="center")
    axes.set(xlabel="y, m", ylabel="x, m", aspect=1, xlim=(-1.1, 1.1), ylim=(1.0, -0.8))
    axes.set_title("cameras from above: training ones are turned about the robot")
