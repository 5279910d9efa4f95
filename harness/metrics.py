"""Numbers that results are reported with: confidence intervals, paired comparisons, smoothness,
free-space coverage.
"""

import numpy as np

OUTCOMES = ("miss", "grasp", "place", "released")  # how far an episode of pick and place came
# how far one of the variant lift_once came
LIFT_OUTCOMES = ("miss", "kept", "again", "unfinished", "once")
# the outcome of an episode in which the policy's own code failed: a failure like any other
ERROR = "error"
EARLY = 280  # control steps at which published success rates on LIBERO-Spatial stop


def wilson(successes, n, level=0.95):
    """Wilson score interval of a success rate -> (low, high); (0, 1) when n is 0."""
    from scipy.stats import binomtest  # here, as it takes a second that no worker should wait for

    if n == 0:
        return 0.0, 1.0
    interval = binomtest(int(successes), int(n)).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(better, worse):
    """Exact two-sided McNemar test of paired successes -> p.

    better, worse: pairs in which only the one, or only the other, succeeds. Under the null
    hypothesis either is as likely: the binomial test of the two counts. Exact form as in Fagerland,
    Lydersen, Laake 2013, "The McNemar test for binary matched-pairs data".
    """
    from scipy.stats import binomtest

    return float(binomtest(int(better), int(better + worse)).pvalue) if better + worse else 1.0


def holm(p_values):
    """Holm's adjusted p values, in the order given.

    If all below 0.05 are rejected, the chance of any false rejection is at most 5%. Source: Holm
    1979, "A simple sequentially rejective multiple test procedure".
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    # the smallest p times n, the next times n - 1 ...; the running maximum keeps their order
    adjusted[order] = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    return np.minimum(adjusted, 1.0).tolist()


def seeds_interval(outcomes, draws=4000):
    """95% interval of a success rate over training seeds -> (low, high).

    outcomes: one {episode: bool} for each seed. One seed gives Wilson's interval over its episodes,
    which says nothing about another training. With several, seeds and episodes are drawn anew with
    replacement; all seeds have the same layouts, so the same episodes are drawn for each. The
    interval is never narrower than Wilson's over all episodes: a bootstrap of successes alone
    cannot fail.
    """
    low, high = wilson(sum(sum(o.values()) for o in outcomes), sum(map(len, outcomes)))
    if len(outcomes) < 2:
        return low, high
    episodes = sorted(set().union(*outcomes))
    # (seeds, episodes)
    # NaN: an episode that this seed has no result of
    table = np.array([[o.get(e, np.nan) for e in episodes] for o in outcomes], dtype=float)
    rng = np.random.default_rng(0)  # the same table gives the same interval
    # two-level bootstrap: each draw picks seeds, and episodes that all of them share
    seeds = rng.integers(len(table), size=(draws, len(table)))
    drawn = rng.integers(len(episodes), size=(draws, len(episodes)))
    # each seed's rate over the episodes that are drawn and known
    known = ~np.isnan(table)
    wins = np.where(known, table, 0.0)[:, drawn].sum(-1)  # (seeds, draws)
    counts = known[:, drawn].sum(-1)  # (seeds, draws)
    rates = (wins / np.maximum(counts, 1)).T  # (draws, seeds)
    # mean of the drawn seeds' rates; percentiles over the draws
    by_seed = np.take_along_axis(rates, seeds, axis=1)
    drawn_low, drawn_high = np.percentile(by_seed.mean(axis=1), [2.5, 97.5])
    return min(low, float(drawn_low)), max(high, float(drawn_high))


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
