"""The statistics of a LeRobot dataset: of each feature, over an episode and over all.

Numbers: over the frames, exact. Images: per channel in [0, 1], over some frames of each episode, as
LeRobot samples them.
"""

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
FRAMES = 100  # of an episode's images


class Statistics:
    """Statistics of a growing dataset."""

    def __init__(self):
        self.numbers = {}  # feature: [array (T,N) of each episode]
        self.levels = {}  # image feature: [counts (3,256) of grey levels, frames]

    def add(self, numbers, images):
        """Take an episode in -> {"stats/FEATURE/min": value ...} for its row of meta/episodes.

        numbers {feature: array (T,) or (T,N)}, images {feature: array (T,H,W,3) uint8}.
        """
        row = {}
        for name, value in numbers.items():
            value = np.asarray(value, float).reshape(len(value), -1)
            self.numbers.setdefault(name, []).append(value)
            row.update({f"stats/{name}/{k}": v for k, v in of_numbers(value).items()})
        for name, value in images.items():
            picked = np.unique(np.linspace(0, len(value) - 1, FRAMES).astype(int))
            counts = np.stack(
                [np.bincount(value[picked, ..., c].ravel(), minlength=256) for c in range(3)]
            )
            total = self.levels.setdefault(name, [np.zeros((3, 256)), 0])
            total[0], total[1] = total[0] + counts, total[1] + len(picked)
            found = of_levels(counts, len(picked))
            row.update({f"stats/{name}/{k}": v for k, v in found.items()})
        return row

    def total(self):
        """{feature: {"min": value ...}} over all episodes, for meta/stats.json."""
        numbers = {n: of_numbers(np.concatenate(v)) for n, v in self.numbers.items()}
        return {**{n: of_levels(*v) for n, v in self.levels.items()}, **numbers}


def of_numbers(values):
    """{"min": [N numbers] ..., "count": [T]} of an array (T,N)."""
    found = {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0),
        "std": values.std(0),
    }
    found.update({name: np.quantile(values, q, axis=0) for name, q in QUANTILES.items()})
    return {**{k: v.tolist() for k, v in found.items()}, "count": [len(values)]}


def of_levels(counts, frames):
    """{"min": (3,1,1) as lists ..., "count": [frames]} of counts (3,256) of grey levels.

    Values are in [0, 1].
    """
    level = np.arange(256) / 255
    share = counts / counts.sum(1, keepdims=True)  # (3,256)
    mean = share @ level
    found = {
        "min": np.array([level[row > 0].min() for row in counts]),
        "max": np.array([level[row > 0].max() for row in counts]),
        "mean": mean,
        "std": np.sqrt(np.maximum(share @ level**2 - mean**2, 0)),
    }
    # the level up to which a share of the pixels lies
    below = share.cumsum(1)
    for name, q in QUANTILES.items():
        found[name] = np.array([level[np.searchsorted(row, q)] for row in below])
    return {**{k: v.reshape(3, 1, 1).tolist() for k, v in found.items()}, "count": [frames]}
