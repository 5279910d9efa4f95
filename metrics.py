"""Numbers that results are reported with: confidence intervals, paired comparisons, jerk, free-space coverage."""
import math

import numpy as np

OUTCOMES = ("miss", "grasp", "place", "released")  # how far an episode of pick and place came


def wilson(successes, n, z=1.959963984540054):
    """Wilson score interval of a success rate, 95% by default -> (low, high); (0, 1) when n is 0.

    Source: Wilson 1927, eq. in Brown, Cai, DasGupta 2001, "Interval Estimation for a Binomial Proportion".
    """
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def mcnemar(better, worse):
    """Exact two-sided McNemar test of paired successes -> p. better, worse: pairs in which only the one, or only the other, succeeds.

    Under the null hypothesis either is as likely: the binomial tail of the smaller count, twice. Source: McNemar 1947; exact form as in
    Fagerland, Lydersen, Laake 2013, "The McNemar test for binary matched-pairs data".
    """
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**n)


def jerk(positions):
    """Mean norm of the second difference of a trajectory (T,D), in its own unit per step^2; 0 when T < 3."""
    positions = np.asarray(positions, dtype=float)
    if len(positions) < 3:
        return 0.0
    return float(np.linalg.norm(np.diff(positions, n=2, axis=0), axis=-1).mean())


def rises(values, low, high):
    """How often a trace (T,) rises above `high` after having been below `low`: small wobbles about one threshold do not count."""
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
    length2 = np.maximum((step**2).sum(-1), 1e-12)
    along = np.clip(((points[:, None] - start) * step).sum(-1) / length2, 0, 1)  # (N,M-1)
    return np.linalg.norm(points[:, None] - (start + along[..., None] * step), axis=-1).min(axis=1)


def coverage(truth, predicted, eps):
    """Free-space coverage: the fraction of ground-truth trajectory points (N,2) within `eps` pixels of the predicted
    trajectory (M,2), taken as a polyline. A policy that jumps over free space or cuts a corner loses those points."""
    return float((distance_to_polyline(truth, predicted) <= eps).mean())
