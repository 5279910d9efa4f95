"""How LeRobot's pictures of LIBERO lie in memory, and how they are turned back.

MuJoCo's rows come bottom first. LeRobot's LIBERO, and the public datasets, turn such an image by
180 degrees, which leaves it mirrored left to right. A camera matrix means the picture as it is
seen.
"""

from runtime import UserError

# "lerobot": turned as above; "upright": as it is seen
ORIENTATIONS = ("lerobot", "upright")


def upright(images, orientation="lerobot"):
    """Images (...,H,W), tensors, as they are seen. Raises UserError for an unknown orientation."""
    if orientation not in ORIENTATIONS:
        known = " and ".join(ORIENTATIONS)
        raise UserError(f"--policy.images={orientation}: unknown; there are {known}")
    return images.flip(-1) if orientation == "lerobot" else images
