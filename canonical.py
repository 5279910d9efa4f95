"""One view of the workspace for all cameras: each image as a camera at the same place would take it
that looks at one point, upright, and shows it at one scale. NumPy and Pillow.

A camera that turns in place, or zooms, sees the same rays of light in other pixels: with K and E
known it can be turned and zoomed back by a homography, without knowing any depth. What is left of a
moved camera is where it stands.

    train.py --canonical_view fit     of the camera that most training demonstrations have;
                                      with --init_from, the checkpoint's

A view is four numbers in a text, "x y z scale": the point in world metres, and the pixels that a
metre at this point has. Images of a camera that looks so already are left as they are, bit by bit.
"""

from collections import Counter

import numpy as np
from PIL import Image

import camera
from runtime import UserError

FIT = "fit"  # instead of a view: find it
STILL = 0.05  # pixels: an image whose corners would move by less is left as it is
STEEP = 0.02  # sine of the angle from the vertical within which a view direction tells no upright
HORIZON = 1e-6  # metres of depth for one at the new camera's: less is not before the old one
# RGB of what the camera does not see: ImageNet's mean, 0 after the backbone's normalisation
UNSEEN = (124, 116, 104)


def parsed(view):
    """A view's text -> (point (3,) m, pixels a metre). Raises UserError for any other text."""
    try:
        *point, scale = map(float, view.split())
    except ValueError:
        point, scale = (), 0.0
    if len(point) != 3 or not np.isfinite([*point, scale]).all() or scale <= 0:
        raise UserError(
            f"--canonical_view {view!r}: is not 'x y z scale', a point in metres and pixels a "
            f"metre above 0; give these, or {FIT}"
        )
    return np.array(point), scale


def fitted(demos):
    """The view of the camera that most demonstrations have, of several the first, at the lowest
    height that the EEF reaches: about where things are handled. Where that camera's axis does not
    get there, at the EEF's mean position.
    """
    # a simulator repeats a camera to the last digits but one
    cameras = [(*demo.K.ravel().round(3), *demo.E.ravel().round(5)) for demo in demos]
    common, _ = Counter(cameras).most_common(1)[0]
    K, E = (getattr(demos[cameras.index(common)], name) for name in "KE")
    positions = np.concatenate([demo.ee_pos for demo in demos])
    return view_of(K, E, positions[:, 2].min(), positions.mean(0))


def view_of(K, E, height, otherwise):
    """The view that the camera K (3,3), E (4,4) has of the point at which its axis meets a height
    in metres, of `otherwise` (3,) m where it does not.
    """
    axis, centre = E[:3, 2], E[:3, 3]
    drop = centre[2] - height
    meets = drop > 0 and -axis[2] > STEEP
    point = centre + drop / -axis[2] * axis if meets else otherwise
    scale = K[1, 1] / np.linalg.norm(point - centre)
    return " ".join(f"{x:.6f}" for x in (*point, scale))


def resolved(view, demos):
    """What was asked for, "" for none, with FIT found from the demonstrations that are trained on.

    Raises UserError for a text that is no view.
    """
    if view == FIT:
        return fitted(demos)
    if view:
        parsed(view)
    return view


def camera_of(K, E, size, view):
    """The camera that a view makes of K (3,3), E (4,4) of images of `size` pixels -> (K, E, warp).

    warp: what `warped` takes, () where the camera looks so already.
    """
    if not view:
        return K, E, ()
    point, scale = parsed(view)
    # turned in place, then zoomed about the middle of the image
    at = turned_to(E, point)
    focal = scale * np.linalg.norm(point - E[:3, 3])
    zoomed = np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1.0]])
    # of the new image's pixels (u, v, 1): their rays in the world, and where the old one has them
    warp = K @ E[:3, :3].T @ at[:3, :3] @ np.linalg.inv(zoomed)
    corners = corners_of(size)
    old = warp @ corners
    if (old[2] > 0).all() and np.abs(old[:2] / old[2] - corners[:2]).max() < STILL:
        return K, E, ()
    return zoomed, at, tuple(warp.ravel())


def corners_of(size):
    """An image's corners as columns (u, v, 1), pixels (3,4)."""
    return np.array([[0, size, 0, size], [0, 0, size, size], [1.0, 1, 1, 1]])


def turned_to(E, point):
    """Camera-to-world E (4,4) turned in place until it looks at a point (3,) m, upright."""
    forward = (point - E[:3, 3]) / np.linalg.norm(point - E[:3, 3])
    if np.hypot(*forward[:2]) > STEEP:
        return camera.look_at(E[:3, 3], point)
    # straight down or up: the image's own right stays right
    right = E[:3, 0] - (E[:3, 0] @ forward) * forward
    right /= np.linalg.norm(right)
    turned = E.copy()
    turned[:3, :3] = np.stack([right, np.cross(forward, right), forward], -1)
    return turned


def warped(image, warp):
    """Image (S,S,3) uint8 as the camera of `camera_of` sees it, bilinear; UNSEEN where the old one
    did not look.
    """
    if not warp:
        return image
    size, H = len(image), np.reshape(warp, (3, 3))
    # at the old camera's horizon or behind it there is no pixel, and Pillow divides by this number,
    # which is least at a corner
    whole = (H[2] @ corners_of(size)).min() > HORIZON
    if not whole and abs(H[2, 2]) < 1e-9:  # Pillow's last number is 1
        H = H + np.diag([0, 0, 1e-9])
    new = np.array(
        Image.fromarray(image).transform(
            (size, size),
            Image.Transform.PERSPECTIVE,
            (H / H[2, 2]).ravel()[:8],
            Image.Resampling.BILINEAR,
            fillcolor=UNSEEN,
        )
    )
    if not whole:
        u, v = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
        new[H[2, 0] * u + H[2, 1] * v + H[2, 2] <= HORIZON] = UNSEEN
    return new
