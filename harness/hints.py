"""What the training data says about flags: waypoints beyond the image, scenes on surfaces of
different heights, things wider than closed fingers are taken for.
"""

import numpy as np

import camera
from formats.checks import settled_widths

APART = 0.05  # metres by which surfaces differ that a hint is worth


def hints(dataset):
    """Sentences on the data that `dataset` (of data.py) is made of and on flags that suit it."""
    said = said_of_margin(dataset), said_of_heights(dataset), said_of_fingers(dataset)
    return [s for s in said if s]


def cells_beyond(dataset):
    """Cells of the prediction grid by which each target that is trained on lies beyond the image's
    nearest edge: (N,), 0 inside, infinite behind the camera.

    dataset: of data.py, made for a config with a `grid`.
    """
    # rows of windows are frames, each with its own demonstration
    demo = getattr(dataset, "row_demo", dataset.demo)
    array = lambda x: x.cpu().numpy()
    points, trained = array(dataset.target_pos), array(dataset.mask) > 0
    K, E = (array(x)[demo][:, None] for x in (dataset.K, dataset.E))
    with np.errstate(all="ignore"):
        u, v, depth = camera.project(points, K, E)  # (N,T)
    size, grid = dataset.config.image_size, dataset.config.grid
    pixels = np.stack([-u, u - size, -v, v - size]).max(0).clip(min=0)
    pixels = np.where(depth > 0, pixels, np.inf)
    return pixels[trained] * grid / size


def said_of_margin(dataset):
    """One sentence on targets beyond the image: how many, what --margin would hold them, and what
    becomes of them with the config's own. None where there are none, or the policy has no volume.
    """
    config = dataset.config
    if not hasattr(config, "margin"):
        return None
    beyond = cells_beyond(dataset)
    outside = beyond[beyond > 0]
    if not len(outside):
        return None
    share = f"{len(outside)} of {len(beyond)} targets ({len(outside) / len(beyond):.1%})"
    # what lies behind the camera has no cell
    farthest = outside[np.isfinite(outside)].max(initial=0.0)
    pixels = farthest * config.image_size / config.grid
    lost = int((beyond > config.margin).sum())
    fate = f"{lost} of them are taken for the border's cells" if lost else "all are held"
    return (
        f"{share} lie beyond the image, by up to {pixels:.0f} px: --margin {int(np.ceil(farthest))}"
        f" holds them; with --margin {config.margin} {fate}"
    )


def said_of_heights(dataset):
    """One sentence on scenes that stand on surfaces of different heights: what their heights span
    in the world, and from these surfaces. None where they do not, where they are not known, or the
    policy has no volume.
    """
    config, supports = dataset.config, [demo.support for demo in dataset.demos]
    if not hasattr(config, "n_height_bins") or config.heights != "world" or None in supports:
        return None
    if max(supports) - min(supports) < APART:
        return None
    span = lambda down: np.ptp(
        np.concatenate([d.ee_pos[:, 2] - s for d, s in zip(dataset.demos, down)])
    )
    world, above = span(np.zeros(len(supports))), span(supports)
    centimetres = lambda metres: f"{100 * metres / config.n_height_bins:.1f} cm"
    return (
        f"scenes stand on surfaces at {min(supports):g} to {max(supports):g} m: heights span "
        f"{world:.2f} m, {centimetres(world)} a bin; --heights support measures them from there, "
        f"{above:.2f} m, {centimetres(above)} a bin"
    )


def said_of_fingers(dataset):
    """One sentence on closed fingers that are taken for open ones, as what they hold is wide: in
    how many demonstrations, and what --open_width would tell them apart. None where there are none.
    """
    # between closed fingers, once they have settled
    widest = np.array([settled_widths(demo)[1].max(initial=0.0) for demo in dataset.demos])
    asked = dataset.config.open_width
    taken = widest >= asked
    if not taken.any():
        return None
    # the next whole millimetre above all that is held
    enough = (np.floor(1000 * widest.max()) + 1) / 1000
    return (
        f"{taken.sum()} of {len(widest)} demonstrations hold something at least {asked:g} m wide, "
        f"which --open_width {asked:g} takes for open fingers; --open_width {enough:g} does not"
    )
