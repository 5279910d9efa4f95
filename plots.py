"""Pictures: loss curves, trajectory overlays, contact sheets."""
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from runtime import atomic_path

TRUE, PREDICTED = "#00e5a0", "#ff3d6e"


def _save(figure, path):
    with atomic_path(path) as scratch:
        figure.savefig(scratch, format="png", dpi=90, bbox_inches="tight")
    plt.close(figure)


def loss_curve(rows, path):
    """Training and validation loss, and the validation error of the first waypoint, over steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
    for key, label in (("train/loss", "training"), ("val/loss", "validation")):
        points = [(r["step"], r[key]) for r in rows if key in r]
        if points:
            left.plot(*zip(*points), label=label, marker="o" if "val" in key else None, markersize=3)
    left.set(xlabel="step", ylabel="loss (nats)", title="loss")
    left.legend()
    for key, label in (("val/cm_median", "median"), ("val/cm_p90", "90th percentile")):
        points = [(r["step"], r[key]) for r in rows if key in r]
        if points:
            right.plot(*zip(*points), label=label, marker="o", markersize=3)
    right.set(xlabel="step", ylabel="3D error of the first waypoint (cm)", title="validation", ylim=(0, None))
    right.legend()
    _save(figure, path)


def trajectory_overlay(images, eef, true, predicted, frames, path):
    """True (green) and predicted (red) future EEF positions on images (N,S,S,3). eef (N,2), true and predicted (N,T,2) px."""
    columns = 3
    figure, axes = plt.subplots(-(-len(images) // columns), columns, figsize=(12, 4 * -(-len(images) // columns)), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, start, t, p, frame in zip(axes.flat, images, eef, true, predicted, frames):
        axis.imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
        for points, colour, label in ((t, TRUE, "true"), (p, PREDICTED, "predicted")):
            line = np.concatenate([start[None], points])
            axis.plot(line[:, 0], line[:, 1], color=colour, marker="o", markersize=4, linewidth=1.5, label=label)
        axis.plot(*start, marker="x", color="white", markersize=8)
        axis.set(xlim=(0, image.shape[1]), ylim=(image.shape[0], 0), title=f"frame {frame}")
    axes.flat[0].legend(loc="lower left", fontsize=8)
    _save(figure, path)


def contact_sheet(strips, labels, path, side=120):
    """Episodes as rows of small frames: strips is a list of image lists (S,S,3), labels one text each."""
    columns = max(len(s) for s in strips)
    figure, axes = plt.subplots(len(strips), columns, figsize=(1.35 * columns, 1.5 * len(strips)), squeeze=False)
    for row, strip, label in zip(axes, strips, labels):
        for axis in row:
            axis.axis("off")
        for axis, image in zip(row, strip):
            step = max(1, len(image) // side)
            axis.imshow(image[::step, ::step])
        row[0].set_title(label, loc="left", fontsize=8)
    _save(figure, path)
