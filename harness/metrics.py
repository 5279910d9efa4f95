"""Numbers of an episode that results are reported with: how far it came and when, smoothness,
free-space coverage.
"""

import numpy as np

OUTCOMES = ("miss", "grasp", "place", "released")  # how far an episode of pick and place came
# how far one of the variant lift_once came
LIFT_OUTCOMES = ("miss", "kept", "again", "unfinished", "once")
# the outcome of an episode in which the policy's own code failed: a failure like any other
ERROR = "error"
EARLY = 280  # control steps at which published success rates on LIBERO-Spatial stop


def within(row, key, steps=None):
    """Whether an episode's row reached `key` ("success" or "released"), within `steps` if given.

    steps: control steps. Older rows lack `first_release`: an episode ends with its release, so its
    length says when that was.
    """
    if not row[key] or steps is None:
        return bool(row[key])
    if key == "success":
        return row["first_success"] <= steps
    return row.get("first_release", row["steps"]) <= steps


def jerk(positions, order=2):
    """Mean norm of the differences of a trajectory (T,D), in its unit per step^order.

    0 when T <= order. Order 2 is what tables call jerk here, after the definition that this project
    started from: it is an acceleration. Order 3, the third difference, is the jerk of physics.
    """
    positions = np.asarray(positions, dtype=float)
    if len(positions) <= order:
        return 0.0
    return float(np.linalg.norm(np.diff(positions, n=order, axis=0), axis=-1).mean())


def path_length(positions):
    """Length of a path (T,D) in its own unit."""
    return float(np.linalg.norm(np.diff(np.asarray(positions, dtype=float), axis=0), axis=-1).sum())


def rises(values, low, high):
    """How often a trace (T,) rises above `high` after it was below `low`.

    Two thresholds, so that small wobbles about one do not count.
    """
    count, below = 0, False
    for value in values:
        if value < low:
            below = True
        elif below and value > high:
            count, below = count + 1, False
    return count


def distance_to_polyline(points, line):
    """Distance of each point (N,D) to the nearest point of a polyline (M,D) -> (N,)."""
    points, line = np.asarray(points, dtype=float), np.asarray(line, dtype=float)
    if len(line) == 1:
        return np.linalg.norm(points - line[0], axis=-1)
    start, step = line[:-1], np.diff(line, axis=0)
    # pieces of no length would divide by zero
    length2 = np.maximum((step**2).sum(-1), 1e-12)
    # how far along each piece, from 0 to 1, its nearest point lies: (N,M-1)
    along = np.clip(((points[:, None] - start) * step).sum(-1) / length2, 0, 1)
    nearest = start + along[..., None] * step  # (N,M-1,D)
    return np.linalg.norm(points[:, None] - nearest, axis=-1).min(axis=1)


def coverage(truth, predicted, eps):
    """Free-space coverage: the share of true points within `eps` px of the predicted path.

    truth (N,2), predicted (M,2) px; the prediction is taken as a polyline. A policy that jumps over
    free space or cuts a corner loses those points. One that wanders does not: swap the arguments to
    measure that, as the share of predicted points near the truth.
    """
    return float((distance_to_polyline(truth, predicted) <= eps).mean())
