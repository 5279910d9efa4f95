"""Pictures of the settings in sim/settings.py: every view rendered, every position marked. A scene
(sim/libero_env.py) is given.
"""

import numpy as np
from PIL import Image, ImageDraw

import canonical
from camera import project
from figures import plots
from sim import moved_cameras, settings

COLOURS = {
    "train": (0, 170, 110),
    "val": (60, 120, 255),
    "test": (235, 60, 60),
    "excluded": (120,) * 3,
    "unused": (190,) * 3,
}
TILE, CAPTION, EDGE = 128, 13, 3  # pixels


def tile(image, part, caption):
    """A render (S,S,3) as a small captioned tile, framed in its part's colour."""
    canvas = Image.new("RGB", (TILE, TILE + CAPTION), COLOURS[part])
    side = TILE - 2 * EDGE
    canvas.paste(
        Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS), (EDGE, EDGE)
    )
    ImageDraw.Draw(canvas).text((EDGE, TILE - 1), caption, fill="white")
    return canvas


def in_rows(tiles):
    """Tiles in rows of as many as there are phis."""
    return [tiles[i : i + len(settings.PHIS)] for i in range(0, len(tiles), len(settings.PHIS))]


def write_sheet(rows, path):
    """Rows of tiles as a PNG."""
    size = (len(settings.PHIS) * TILE, len(rows) * (TILE + CAPTION))
    sheet = Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * TILE, y * (TILE + CAPTION)))
    plots.write_png(sheet, path, colors=80)


def views(scene, split, path):
    """Every view of the viewpoint setting. A row a theta, its phis ascending: green trains, red
    tests, grey is excluded; the last row, blue, validates."""
    found = [
        (c.theta, c.phi, c, part)
        for part in settings.PARTS
        for c in settings.conditions("viewpoint", part, split)
    ]
    found += [(c.theta, c.phi, c, "excluded") for _, c, _ in settings.excluded(split)]
    # validation views lie between the grid's angles: they get rows of their own below
    on_grid = lambda c: c.phi in settings.PHIS
    rows, others = {theta: [] for theta in settings.THETAS}, []
    for theta, phi, c, part in sorted(found, key=lambda view: view[:2]):
        scene.set_view(c)
        image = tile(scene.render(), part, f"{part} {theta:.1f}, {phi:.1f} deg")
        (rows[theta] if on_grid(c) else others).append(image)
    write_sheet([*rows.values(), *in_rows(others)], path)


def positions(scene, split, path):
    """Where the bowl stands at each position of the position setting, marked in the default view:
    green trains, blue validates, red tests, grey is unused. Beside it the four corners of the grid,
    rendered."""
    base, K_E = scene.state(), scene.camera()
    picture = Image.fromarray(scene.render())
    draw, bowl = ImageDraw.Draw(picture), scene.position(scene.pick)
    parts = {
        c: part for part in settings.PARTS for c in settings.conditions("position", part, split)
    }
    # metres that the bowl is moved by in the world, from its default position
    for dx in settings.DX:
        for dy in settings.DY:
            u, v, _ = project(bowl + np.array([dx, dy, 0]), *K_E)
            part = parts.get(settings.Condition(dx=dx, dy=dy), "unused")
            r = 2 if part == "unused" else 4
            draw.ellipse((u - r, v - r, u + r, v + r), fill=COLOURS[part], outline="white")
    corners = []
    # the extremes, rendered; shift_objects says None where the moved objects touch something
    for dx in settings.DX[[0, -1]]:
        for dy in settings.DY[[0, -1]]:
            c = settings.Condition(dx=dx, dy=dy)
            if scene.shift_objects(base, scene.common_shift(c)) is None:
                raise RuntimeError(
                    f"position {dx:.2f}, {dy:.2f} m: the shifted objects touch something"
                )
            corners.append(tile(scene.render(), parts.get(c, "unused"), f"{dx:+.2f}, {dy:+.2f} m"))
    side = 4 * TILE
    whole = Image.new("RGB", (side + 2 * TILE, side), "white")
    whole.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (0, 0))
    for i, corner in enumerate(corners):
        whole.paste(corner, (side + i % 2 * TILE, i // 2 * (TILE + CAPTION)))
    legend = ImageDraw.Draw(whole)
    for i, part in enumerate((*settings.PARTS, "unused")):
        # unused are the positions of the grid that no part has
        n = sum(p == part for p in parts.values()) or len(settings.DX) * len(settings.DY) - len(
            parts
        )
        legend.text(
            (side + 8, 2 * (TILE + CAPTION) + 8 + 14 * i),
            f"{part}: {n} positions",
            fill=COLOURS[part],
        )
    plots.write_png(whole, path)


def cameras(scene, split, path):
    """Cameras of the setting `cameras`, as demonstrations draw them, in rows of eight; below each
    row the same images in one view, see canonical.py.
    """
    rng = np.random.default_rng(settings.random_seed("train", 0, 0))
    # the task's own view, at the height of what is picked
    subject = scene.position(scene.subject)
    one = canonical.view_of(*scene.camera(), subject[2], subject)
    own, seen = [], []
    for _ in range(32):
        view = moved_cameras.drawn(rng, 1)[0]
        scene.set_view(settings.Condition(moved=view))
        turned, tilted, distance, pan, pitch = view
        caption = f"{turned:.0f} {tilted:.0f} x{distance:.2f} {pan:.0f} {pitch:.0f}"
        image = scene.render()
        _, _, warp = canonical.camera_of(*scene.camera(), len(image), one)
        own.append(tile(image, "train", caption))
        seen.append(tile(canonical.warped(image, warp), "unused", f"{turned:.0f} {tilted:.0f}"))
    eights = [range(i, i + 8) for i in range(0, 32, 8)]
    write_sheet(in_rows([t[i] for eight in eights for t in (own, seen) for i in eight]), path)


PICTURES = {"viewpoint": views, "position": positions, "cameras": cameras}
