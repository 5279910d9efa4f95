"""When an episode counts as stalled: in what repeats, and in nothing that still moves."""

import numpy as np
import pytest

from sim.stalled import DECISIONS, TOLERANCE, first_stall, repeats

K = 10


def hover(n, jitter=0.0):
    """States (n,4) that stand still, but for jitter up and down."""
    return np.ones((n, 4)) + jitter * np.resize([0, 1], n)[:, None]


def test_what_stands_still_is_stalled_after_k_decisions():
    """Not before: a policy may hesitate for a while."""
    moving = np.arange(5)[:, None] * np.ones(4)
    assert first_stall(np.concatenate([moving, 9 * hover(K - 1)]), K) is None
    assert first_stall(np.concatenate([moving, 9 * hover(K + 5)]), K) == 5 + K - 1


@pytest.mark.parametrize("period, stalled", [(1, True), (3, True), (4, True), (5, False)])
def test_states_that_take_turns_are_stalled(period, stalled):
    """A policy that goes back and forth between waypoints goes on so. Longer rounds may run on:
    of those too few are seen."""
    rounds = np.resize(np.arange(period), 3 * K)[:, None] * np.ones(4)
    assert (first_stall(rounds, K) is not None) == stalled


@pytest.mark.parametrize("column", range(4))
def test_anything_that_changes_is_progress(column):
    """An object that slides, a command that flips, an arm that creeps: by more than the tolerance
    over the decisions looked at."""
    states = hover(3 * K)
    states[:, column] += np.linspace(0, 5 * TOLERANCE, 3 * K)
    assert first_stall(states, K) is None
    states[:, column] = 1 + np.linspace(0, 0.9 * TOLERANCE, 3 * K)
    assert first_stall(states, K) == K - 1


def test_one_step_aside_starts_the_count_anew():
    """Only decisions in a row count."""
    states = hover(2 * K)
    states[K - 2] += 0.1
    assert first_stall(states, K) == 2 * K - 2


def test_jitter_below_the_tolerance_is_rest():
    """The servo leaves fractions of a millimetre."""
    assert repeats(hover(DECISIONS, 0.5 * TOLERANCE), period=1)
    assert not repeats(hover(DECISIONS, 2 * TOLERANCE), period=1)
