"""Pictures of rotations: the values on a principal axis, what is predicted of them over an episode,
and gripper commands.
"""

import numpy as np

from figures.plots import _save, plt

BLUE = "#4477aa"
COLOURS = (BLUE, "#ee6677", "#228833", "#ccbb44")


def rotation_histogram(values, ratios, episodes, chosen, path):
    """Distribution of the values on each space's principal axis, {space: (N,) deg}, with the
    explained-variance ratios, and the chosen space's values over each episode's frames [(T,)
    deg]."""
    figure, axes = plt.subplots(1, len(values) + 1, figsize=(4.2 * (len(values) + 1), 3.2))
    for axis, (space, v) in zip(axes, values.items()):
        axis.hist(v, bins=48, color=BLUE)
        axis.set(
            title=f"{space}: {', '.join(f'{r:.3f}' for r in ratios[space])} of variance",
            xlabel="value on the axis (deg)",
            ylabel="frames",
        )
    for episode in episodes:
        axes[-1].plot(episode, color=BLUE, alpha=0.4, linewidth=0.8)
    axes[-1].set(title=f"{chosen}: every episode", xlabel="frame", ylabel="value on the axis (deg)")
    figure.tight_layout()
    _save(figure, path)


def rotation_curves(runs, n_angles, path):
    """Held-out rotation cross-entropy over steps, {name: [[(step, nats an angle)] a seed]}, an
    angle's and summed over the {name: number of angles} that a rotation is told by: thin lines are
    seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    # left a mean over the angles; right their sum, which is comparable between heads of one and of
    # three angles
    for whole, axis in enumerate(axes):
        for colour, (name, seeds) in zip(COLOURS, runs.items()):
            for i, points in enumerate(seeds):
                steps, nats = np.transpose(points)
                axis.plot(
                    steps,
                    nats * (n_angles[name] if whole else 1),
                    color=colour,
                    linewidth=1.2,
                    marker="o",
                    markersize=3,
                    label=f"{name}, {n_angles[name]} angle{'s' * (n_angles[name] > 1)}"
                    if i == 0
                    else None,
                )
        axis.set(
            xlabel="step",
            ylabel="rotation cross-entropy (nats)",
            title="the whole rotation" if whole else "an angle",
            ylim=(0, None),
        )
        axis.legend()
    _save(figure, path)


def episode_strips(episodes, key, label, path):
    """A panel per episode: values (N,) of `key` at each frame, predicted and true. episodes:
    [(title, {name: {key: values}}, {key: true values})]."""
    figure, axes = plt.subplots(
        len(episodes), 1, figsize=(10, 2.2 * len(episodes)), squeeze=False, sharex=False
    )
    for axis, (title, models, true) in zip(axes[:, 0], episodes):
        axis.plot(true[key], color="black", linewidth=3, alpha=0.3, label="demonstration")
        for i, (colour, (name, values)) in enumerate(zip(COLOURS, models.items())):
            axis.plot(
                # commands are 0 or 1: shifted a little, so that equal lines do not hide each other
                values[key] + (0.03 * (i + 1) if label == "close" else 0),
                color=colour,
                linewidth=1.2,
                label=name,
            )
        axis.set(title=title, ylabel=label)
    axes[0, 0].legend(fontsize=8)
    axes[-1, 0].set(xlabel="frame")
    figure.tight_layout()
    _save(figure, path)


def distribution_strip(probabilities, true_bins, title, path):
    """One panel a waypoint: the predicted distribution (T,bins) over the rotation bins, the true
    bin (T,) marked.
    """
    figure, axes = plt.subplots(
        1, len(probabilities), figsize=(2 * len(probabilities), 2.2), sharey=True
    )
    for t, (axis, p, true) in enumerate(zip(axes, probabilities, true_bins)):
        axis.bar(range(len(p)), p, width=1.0, color=BLUE)
        axis.axvline(true, color="#ee6677", linewidth=1.2)
        axis.set(title=f"waypoint {t + 1}", xlabel="bin")
    axes[0].set(ylabel=title)
    figure.tight_layout()
    _save(figure, path)


def rotation_overlay(images, segments, frames, path):
    """Directions in which the fingers close, at the next waypoint, on images (N,S,S,3): {name:
    segments (N,2,2) px}, the first one in white."""
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 4.2 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, image, frame) in enumerate(zip(axes.flat, images, frames)):
        axis.imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
        for k, (colour, (name, lines)) in enumerate(zip(("white", *COLOURS), segments.items())):
            # the first, the demonstration, is wide, and the others are drawn over it
            axis.plot(*lines[i].T, color=colour, linewidth=2 if k else 5, label=name)
        axis.set(xlim=(0, image.shape[1]), ylim=(image.shape[0], 0), title=f"frame {frame}")
    axes[0, 0].legend(loc="lower left", fontsize=8, facecolor="grey")
    _save(figure, path)
