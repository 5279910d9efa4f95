"""Do the images show the movements that the numbers tell? Found without a simulator.

Where the arm moves, pixels change. The centre of the pixels that change between two frames goes
with the EEF's pixel, as the recorded camera projects it: to the right where the EEF goes to the
right, down where it goes down. Over the pairs of frames of some demonstrations the two are
correlated, along columns and along rows. A correlation below zero is a picture that is mirrored, or
upside down; none is a picture of something else. And the EEF has to lie where the image changes.
"""

import numpy as np
from PIL import Image

import camera
from runtime import UserError

# of stored images: (rows bottom first, columns right to left), as (False, False) is upright
ORIENTATIONS = {
    "upright": (False, False),
    "flipped": (True, False),
    "mirrored": (False, True),
    "rotated": (True, True),
}
# by what is reversed, (columns, rows): what that is called
TURNED = {
    (True, False): "mirrored left to right",
    (False, True): "upside down",
    (True, True): "turned by 180 degrees",
}
DEMOS, PAIRS = 12, 16  # looked at: demonstrations, and pairs of frames of each
GAP = 4  # frames from the first to the second of a pair
SIDE = 64  # pixels that images are scaled down to
CHANGE = 4.0  # grey levels from which a pixel counts as changed
LEAST = 50.0  # grey levels, summed over an image, from which on a pair counts
SPREAD = 0.01  # of the image's side: by how much the EEF has to move for an axis to be judged
NEAR = 0.1  # of the image's side: what is near the EEF
CORRELATION, SHARE = 0.3, 0.04  # that are asked for: with the EEF, and of the changes near it


def upright(images, orientation):
    """Images (N,H,W,3) as they are stored -> upright and unmirrored."""
    rows, columns = ORIENTATIONS[orientation]
    return np.ascontiguousarray(images[:, :: -1 if rows else 1, :: -1 if columns else 1])


def orientation_instead(read, turned):
    """How images are stored that were read as `read` and look `turned`, keys of ORIENTATIONS."""
    pairs = zip(ORIENTATIONS[read], ORIENTATIONS[turned])
    right = tuple(a != b for a, b in pairs)
    return next(name for name, found in ORIENTATIONS.items() if found == right)


def check_pictures(demos, path, orientation, remedy):
    """Raise UserError where the demonstrations' images are mirrored, upside down, or of something
    else.

    orientation: as which the images were read, a key of ORIENTATIONS; remedy: sentence's end, with
    a place for the right orientation. An axis along which no EEF moves is not judged.
    """
    picked = np.unique(np.linspace(0, len(demos) - 1, min(DEMOS, len(demos))).astype(int))
    measured = [movements(demos[i]) for i in picked]
    centres = np.concatenate([m[0] for m in measured])
    pixels = np.concatenate([m[1] for m in measured])
    near = np.concatenate([m[2] for m in measured])
    # columns, then rows; None where the EEF moves too little to tell
    found = [correlation(centres[:, axis], pixels[:, axis]) for axis in (0, 1)]
    told = ", ".join(
        f"{r:.2f} along {name}" for r, name in zip(found, ("columns", "rows")) if r is not None
    )
    against = [r is not None and r < -CORRELATION for r in found]
    if any(against):
        columns, rows = against
        turned = next(n for n, found in ORIENTATIONS.items() if found == (rows, columns))
        raise UserError(
            f"{path}: the images are {TURNED[columns, rows]}, what moves in them goes against the "
            f"recorded EEF (correlation {told}); "
            f"{remedy.format(orientation_instead(orientation, turned))}"
        )
    if any(r is not None and r < CORRELATION for r in found):
        raise UserError(
            f"{path}: what moves in the images does not go with the recorded EEF (correlation "
            f"{told}); are images, states and camera of the same episodes?"
        )
    if len(near) and near.mean() < SHARE:
        raise UserError(
            f"{path}: {100 * near.mean():.1f}% of what moves in the images is near the recorded "
            f"EEF, at least {100 * SHARE:.0f}% is expected; is the camera that of another scene?"
        )


def correlation(centres, pixels):
    """Pearson's correlation of two series (N,), or None where one hardly varies."""
    if len(pixels) < 3 or pixels.std() < SPREAD * SIDE or centres.std() < 1e-6:
        return None
    return float(np.corrcoef(centres, pixels)[0, 1])


def movements(demo):
    """Of a Demo's pairs of frames: (centres of the changes (N,2), EEF pixels (N,2), share of the
    changes near the EEF (N,)).

    Pixels are those of an image of SIDE, (column, row); the first two are without the mean over the
    demonstration. Pairs in which hardly anything changes are left out.
    """
    empty = np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0)
    if len(demo) <= GAP:
        return empty
    first = np.unique(np.linspace(0, len(demo) - 1 - GAP, PAIRS).astype(int))
    frames = np.unique(np.concatenate([first, first + GAP]))
    small = {i: _small(image) for i, image in zip(frames, demo.images(frames))}
    # mean over the channels, (N,SIDE,SIDE)
    changes = np.stack([np.abs(small[i + GAP] - small[i]).mean(-1) for i in first])
    # a camera's noise changes every pixel a little, what moves changes some of them more
    noise = np.median(changes, axis=(1, 2))[:, None, None]
    changes[changes < np.maximum(CHANGE, 3 * noise)] = 0
    total = changes.sum((1, 2))
    counts = total > LEAST
    if not counts.any():
        return empty
    changes, total = changes[counts], total[counts]
    # where the EEF is in the first and in the second frame of a pair, (2,N,2)
    ends = demo.ee_pos[np.stack([first[counts], first[counts] + GAP])]
    u, v, _ = camera.project(ends, demo.K, demo.E)
    pixels = np.stack([u, v], -1) * (SIDE / demo.image_size)
    # pixel centres
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    centres = np.stack([(changes * x).sum((1, 2)), (changes * y).sum((1, 2))], -1) / total[:, None]
    # from each pixel to the nearer of the two, (N,SIDE,SIDE)
    distance = np.hypot(x - pixels[..., 0, None, None], y - pixels[..., 1, None, None]).min(0)
    near = (changes * (distance < NEAR * SIDE)).sum((1, 2)) / total
    pixels = pixels.mean(0)
    return centres - centres.mean(0), pixels - pixels.mean(0), near


def _small(image):
    """(S,S,3) uint8 -> (SIDE,SIDE,3)."""
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.BOX), float)
