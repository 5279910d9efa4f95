"""The verdict's test conditions, drawn once and frozen, and the conditions that are tuned on in
their place. NumPy only.

Views lie between those of `viewpoint` and `val_viewpoint`, on both angles. Positions lie on the
test side of the table, see sim/recipe.py, bowl and plate each by itself. Validation has the
outermost training views, the strip between the two sides, and an exchange of plate and cookies at
other places than the test's.

This is the third draw, as the recipe was changed after looks at the first two, see docs/verdict.md.
"""

import functools

import numpy as np

from sim import recipe, settings

N = 50  # positions; episodes of each column
DRAW = 2  # the seed of what is drawn; those before were 0 and 1
# positions of the test at whose first attempt the expert fails, so that they are drawn again
DRAWN_AGAIN = {13: 1, 43: 1}
# degrees, as far in phi as can be from both older sets, and between those of the draws before
THETAS = (15.75, 17.45, 19.15, 20.95, 22.75, 24.5)
PHIS = 11.25 + 22.5 * np.arange(16)
VAL_THETAS, VAL_PHIS = (10.8, 11.5, 12.2), 45.0 * np.arange(8)
# metres by which objects of the validated exchange stand beside their places, +- in x and in y:
# as in the benchmark's init states
INIT_JITTER = 0.015


def _grid(thetas, phis):
    return [settings.Condition(theta, float(phi)) for theta in thetas for phi in phis]


@functools.cache
def views():
    """Test views that decode within 3 cm, spread -> list of settings.Condition."""
    return settings.spread([c for c in _grid(THETAS, PHIS) if not settings.why_excluded(c)])


@functools.cache
def low_views():
    """Test views that a grid decodes more than 3 cm off: cameras level with the path. A column of
    their own, in which the oracle is the ceiling.
    """
    return settings.spread([c for c in _grid(THETAS, PHIS) if settings.why_excluded(c)])


@functools.cache
def val_views():
    """Views at the outermost of the training angles, and not among them."""
    found = _grid(VAL_THETAS, VAL_PHIS)
    return settings.spread([c for c in found if not settings.why_excluded(c)])


@functools.cache
def positions(part):
    """N layouts of bowl and plate, on the test side or, with part "val", on the strip."""
    if part == "val":
        draws = [_rng("val_verdict_position", i) for i in range(N)]
    else:
        again = DRAWN_AGAIN.get
        draws = [_rng("verdict_position", i, again(i, 0), DRAW) for i in range(N)]
    return [recipe.layout(rng, part, clean=True) for rng in draws]


@functools.cache
def val_swaps():
    """N layouts with plate and cookies at each other's kind of place, and not at the test's."""
    return [_val_swap(_rng("val_verdict_swap", i)) for i in range(N)]


def _val_swap(rng):
    while True:
        places = {
            name: (at + rng.uniform(-INIT_JITTER, INIT_JITTER, 2)).tolist()
            for name, at in recipe.VAL_SWAP.items()
        }
        if recipe.apart(places, clean=False):
            return settings.Condition(places=tuple((n, *p) for n, p in places.items()))


def _rng(purpose, index, attempt=0, seed=0):
    return np.random.default_rng(settings.random_seed(purpose, seed, index, attempt))
