"""Pictures: loss curves, trajectory overlays, contact sheets."""

import io

import matplotlib

# draws into memory: no window, no display
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw

from camera import project
from harness.records import scored_rows
from runtime import atomic_path

SHEET_LIMIT = 200_000  # bytes of a contact sheet, so that results can be committed
TRUE, PREDICTED = "#00e5a0", "#ff3d6e"
FARTHEST = 0.25  # image sides beyond the image that a picture's frame follows points to


def write_png(image, path, colors=None):
    """Write a PIL image. colors: of a palette; renders keep their looks with 256, and take a
    quarter of the space.
    """
    image = image.convert("RGB").quantize(colors, dither=Image.Dither.NONE) if colors else image
    with atomic_path(path) as scratch:
        image.save(scratch, format="PNG", optimize=True)


def write_small_jpeg(image, path, limit=SHEET_LIMIT):
    """Write a PIL image as a JPEG of at most `limit` bytes: of a lower quality, then smaller."""
    image, size, quality = image.convert("RGB"), image.size, 85
    while True:
        with io.BytesIO() as file:
            image.resize(size, Image.LANCZOS).save(
                file, format="JPEG", quality=quality, optimize=True
            )
            data = file.getvalue()
        if len(data) <= limit or min(size) < 64:
            break
        # first at the price of quality, down to 65, then of size
        if quality > 65:
            quality -= 10
        else:
            size = tuple(round(0.85 * side) for side in size)
    with atomic_path(path) as scratch:
        scratch.write_bytes(data)


def _save(figure, path):
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=90, bbox_inches="tight")
        if path.suffix == ".jpg":
            write_small_jpeg(Image.open(file), path)
        else:
            write_png(Image.open(file), path)
    # pyplot keeps every figure that is not closed
    plt.close(figure)


def loss_curve(rows, path):
    """Training and validation loss, and the validation error of the first waypoint, over steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
    for key, label in (("train/loss", "training"), ("val/loss", "validation")):
        points = [(r["step"], r[key]) for r in rows if key in r]
        if points:
            left.plot(
                *zip(*points), label=label, marker="o" if "val" in key else None, markersize=3
            )
    left.set(xlabel="step", ylabel="loss (nats)", title="loss")
    left.legend()
    for key, label in (("val/cm_median", "median"), ("val/cm_p90", "90th percentile")):
        points = [(r["step"], r[key]) for r in rows if key in r]
        if points:
            right.plot(*zip(*points), label=label, marker="o", markersize=3)
    right.set(
        xlabel="step",
        ylabel="3D error of the first waypoint (cm)",
        title="validation",
        ylim=(0, None),
    )
    right.legend()
    _save(figure, path)


def framed(axis, size, points):
    """Limit an axis with an image of `size` px to it and to points (N,2) px beyond its edges -> how
    many points the image does not show. Points farther off than FARTHEST are counted alone.
    """
    points = np.asarray(points, dtype=float)
    room = 0.02 * size  # around a dot
    outside = ((points < 0) | (points > size)).any(-1)
    ends = []
    for coordinate in np.clip(points[outside], -FARTHEST * size, (1 + FARTHEST) * size).T:
        low, high = coordinate.min(initial=room), coordinate.max(initial=size - room)
        ends.append((min(0, low - room), max(size, high + room)))
    axis.set(xlim=ends[0], ylim=ends[1][::-1])
    return int(outside.sum())


def trajectory_overlay(images, eef, true, predicted, frames, path):
    """True (green) and predicted (red) future EEF positions on images (N,S,S,3). eef (N,2), true
    and predicted (N,T,2) px. Each title says how many of these lie beyond the image.
    """
    columns = 3
    figure, axes = plt.subplots(
        # rows, rounded up
        -(-len(images) // columns),
        columns,
        figsize=(12, 4 * -(-len(images) // columns)),
        squeeze=False,
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, start, t, p, frame in zip(axes.flat, images, eef, true, predicted, frames):
        # the image spans [0, S] on both axes, v downwards: the pixel coordinates of camera.project
        axis.imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
        for points, colour, label in ((t, TRUE, "true"), (p, PREDICTED, "predicted")):
            # from where the EEF is to each waypoint, (T+1,2)
            line = np.concatenate([start[None], points])
            axis.plot(
                line[:, 0],
                line[:, 1],
                color=colour,
                marker="o",
                markersize=4,
                linewidth=1.5,
                label=label,
            )
        axis.plot(*start, marker="x", color="white", markersize=8)
        beyond = framed(axis, len(image), np.concatenate([start[None], t, p]))
        axis.set_title(f"frame {frame}" + (f", {beyond} beyond the image" if beyond else ""))
    axes.flat[0].legend(loc="lower left", fontsize=8)
    _save(figure, path)


def extent(size, beyond=0.0):
    """Where an image of `size` px lies, or a map that reaches `beyond` px beyond each edge."""
    return (-beyond, size + beyond, size + beyond, -beyond)


def attention_overlay(images, maps, frames, path, beyond=0.0):
    """Attention over patches (N,H,W) as heat over images (N,S,S,3), a panel each. beyond: px by
    which the patches reach beyond each edge of the image.
    """
    figure, axes = plt.subplots(1, len(images), figsize=(3.2 * len(images), 3.4), squeeze=False)
    for axis, image, heat, frame in zip(axes[0], images, maps, frames):
        # grey below, so that colour is the heat alone
        axis.imshow(image.mean(-1), cmap="gray", extent=extent(len(image)))
        size = extent(len(image), beyond)
        axis.imshow(heat, cmap="inferno", alpha=0.55, extent=size, interpolation="bilinear")
        axis.set_title(f"frame {frame}")
        axis.axis("off")
    _save(figure, path)


def volume_projections(images, volumes, frames, path, beyond=0.0):
    """Distributions over voxels (N,Z,H,W) in three projections, a column an image (N,S,S,3): over
    the image (summed along the rays), height against image column, and height against image row;
    each scaled to its own highest value. beyond: as in `attention_overlay`."""
    figure, axes = plt.subplots(
        3, len(images), figsize=(3.2 * len(images), 6), squeeze=False, height_ratios=(3, 1, 1)
    )
    for column, image, volume, frame in zip(axes.T, images, volumes, frames):
        column[0].imshow(image.mean(-1), cmap="gray", extent=extent(len(image)))
        size = extent(len(image), beyond)
        column[0].imshow(volume.sum(0), cmap="inferno", alpha=0.55, extent=size)
        column[0].set_title(f"frame {frame}")
        column[0].axis("off")
        # (Z,W) summed over rows, (Z,H) summed over columns; height bin 0 at the bottom
        for axis, side, label in (
            (column[1], volume.sum(1), "image column"),
            (column[2], volume.sum(2), "image row"),
        ):
            axis.imshow(side, cmap="inferno", origin="lower", aspect="auto")
            axis.set(xlabel=label, ylabel="height bin")
    figure.tight_layout()
    _save(figure, path)


def paths_overlay(image, true, lines, path):
    """A recorded path (M,2) px and predicted ones {name: (N,2) px}, waypoints as dots, on an image
    (S,S,3), a panel each.
    """
    figure, axes = plt.subplots(1, len(lines), figsize=(5.4 * len(lines), 5.4), squeeze=False)
    for axis, (name, line) in zip(axes[0], lines.items()):
        axis.imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
        axis.plot(true[:, 0], true[:, 1], color=TRUE, linewidth=3, alpha=0.8, label="recorded path")
        axis.plot(
            line[:, 0],
            line[:, 1],
            color=PREDICTED,
            marker="o",
            markersize=4,
            linewidth=1.2,
            label="predicted, fed back",
        )
        beyond = framed(axis, len(image), np.concatenate([true, line]))
        axis.set_title(name + (f", {beyond} points beyond the image" if beyond else ""))
        axis.axis("off")
    axes[0, 0].legend(loc="lower left", fontsize=8)
    _save(figure, path)


def error_maps(image, found, phases, path):
    """A row per policy {name: {"at", "offset" (N,2) px, "phase" (N,)}}: left, arrows from where
    each waypoint is to where it was predicted, over an image (S,S,3); right, the offsets
    themselves, their mean as a cross. A colour a phase."""
    figure, axes = plt.subplots(len(found), 2, figsize=(10, 4.8 * len(found)), squeeze=False)
    for (left, right), (name, errors) in zip(axes, found.items()):
        left.imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
        for i, (phase, colour) in enumerate(zip(phases, (PREDICTED, "#4477aa"))):
            # of one phase: (n,2) px each
            at, offset = (errors[k][errors["phase"] == i] for k in ("at", "offset"))
            left.quiver(
                *at.T, *offset.T, angles="xy", scale_units="xy", scale=1, color=colour, width=0.003
            )
            right.scatter(*offset.T, s=6, alpha=0.5, color=colour, label=f"{phase}, n = {len(at)}")
            if len(at):
                right.plot(*offset.mean(0), "+", color=colour, markersize=16, markeredgewidth=3)
        left.set(
            xlim=(0, image.shape[1]),
            ylim=(image.shape[0], 0),
            title=f"{name}: true to predicted",
            xticks=[],
            yticks=[],
        )
        right.axhline(0, color="grey", linewidth=0.6)
        right.axvline(0, color="grey", linewidth=0.6)
        right.set(
            xlabel="px to the right",
            ylabel="px down",
            title="predicted minus true",
            xlim=(-60, 60),
            # v grows downwards, as in the image
            ylim=(60, -60),
        )
        right.legend(fontsize=8)
    figure.tight_layout()
    _save(figure, path)


def rate_map(rows, columns, rates, labels, path):
    """Success rates (R,C) as a heat map, NaN where there is none; labels {(row, column): text},
    indices.
    """
    figure, axis = plt.subplots(figsize=(1.5 + 1.5 * len(columns), 0.9 + 0.62 * len(rows)))
    axis.imshow(
        np.ma.masked_invalid(rates), cmap="RdYlGn", vmin=0, vmax=1, aspect="auto", alpha=0.75
    )
    for (row, column), text in labels.items():
        axis.text(column, row, text, ha="center", va="center", fontsize=8)
    # long names would run into each other
    axis.set_xticks(range(len(columns)), [name.replace("_", "\n") for name in columns])
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    _save(figure, path)


def write_strip(images, path):
    """Small frames (s,s,3) side by side in one PNG."""
    write_png(Image.fromarray(np.concatenate(images, axis=1)), path)


def readable_image(path):
    """An image file as an array, or None where there is none that can be read: a picture is no
    reason to lose an evaluation.
    """
    if not path.exists():
        return None
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # PIL has one for each format
        print(f"{path}: left out of the contact sheet, it cannot be read ({error})")
        return None


def sheet_from_strips(folder, rows, most=14):
    """Contact sheet of an evaluation, sheet.jpg: a row of frames per episode, failures first; from
    strips/*.png.
    """
    # failures first (False sorts first), then by number
    rows = sorted(scored_rows(rows), key=lambda r: (r["released"], r["episode"]))
    found = [(r, folder / "strips" / f"{r['episode']:03d}.png") for r in rows]
    found = [(r, image) for r, p in found if (image := readable_image(p)) is not None][:most]
    if not found:
        return
    figure, axes = plt.subplots(len(found), 1, figsize=(13, 1.55 * len(found)), squeeze=False)
    for axis, (row, image) in zip(axes[:, 0], found):
        axis.imshow(image)
        axis.set_anchor("W")  # a short strip begins where the others do
        axis.axis("off")
        axis.set_title(
            f"episode {row['episode']}: {row['outcome']}, {row['steps']} steps",
            loc="left",
            fontsize=8,
        )
    _save(figure, folder / "sheet.jpg")


def draw_plan(image, plan, K, E):
    """A copy of the image (S,S,3) with the waypoint (and the trajectory behind it) drawn in: red
    open, blue close. One beyond the image is a hollow dot at the edge, where it is nearest.
    """
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    u, v, _ = project(plan.trajectory, K, E)
    points = list(zip(u.tolist(), v.tolist()))
    draw.line(points, fill=(255, 255, 255), width=1)
    # drawn last and so on top: the first waypoint, the larger dot
    for i, ((x, y), gripper) in reversed(list(enumerate(zip(points, plan.grippers)))):
        r = 5 if i == 0 else 3
        colour = (60, 120, 255) if gripper > 0 else (255, 61, 110)
        white = (255, 255, 255)
        # the nearest place at which the whole dot is in the picture
        a, b = (min(max(p, r), side - 1 - r) for p, side in zip((x, y), picture.size))
        beyond = not (0 <= x <= picture.width and 0 <= y <= picture.height)
        if beyond:
            draw.ellipse((a - r, b - r, a + r, b + r), fill=white, outline=colour, width=2)
        else:
            draw.ellipse((x - r, y - r, x + r, y + r), fill=colour, outline=white)
    return np.asarray(picture)


def write_video(frames, K, E, path, fps):
    """MP4 (H.264) of frames [(image (S,S,3), plan or None)], plans drawn in."""
    import imageio.v2 as imageio

    images = [draw_plan(image, plan, K, E) if plan is not None else image for image, plan in frames]
    with atomic_path(path) as scratch:
        imageio.mimwrite(
            # macro_block_size: H.264 wants sides that are multiples of it, others are resized
            scratch,
            images,
            format="mp4",
            fps=fps,
            codec="libx264",
            quality=6,
            macro_block_size=16,
        )
