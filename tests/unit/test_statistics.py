"""Statistics of success rates: published examples, hand-computed ones, and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from harness import statistics

# -- one rate


@pytest.mark.parametrize(
    "wins, n, low, high",
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
        (0, 0, 0.0, 1.0),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_wilson_intervals_are_those_of_the_literature(wins, n, low, high):
    """The interval of success rates has the published values, also at 0% and 100%."""
    np.testing.assert_allclose(statistics.wilson(wins, n), (low, high), atol=5e-5)


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_wilson_interval_holds_its_rate(case):
    """The interval lies in [0, 1] and holds the observed rate.

    It mirrors when wins and losses swap.
    """
    wins, n = case
    low, high = statistics.wilson(wins, n)
    assert 0 <= low <= wins / n + 1e-12 and wins / n - 1e-12 <= high <= 1
    mirrored = statistics.wilson(n - wins, n)
    np.testing.assert_allclose((1 - mirrored[1], 1 - mirrored[0]), (low, high), atol=1e-12)


# -- a table of comparisons, several seeds of training


def test_holm_adjusts_as_the_literature_says():
    """The values are those of R's p.adjust: each p times the number of tests left, at least the
    adjusted smaller p, at most 1.
    """
    np.testing.assert_allclose(statistics.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.9]) == [1.0, 1.0] and statistics.holm([]) == []


def test_an_interval_over_seeds_knows_that_seeds_differ():
    """Two trainings at 20% and 80% are not 50 +- 7%: the interval reaches both.

    Equal trainings have the interval of their episodes, and one training has Wilson's.
    """
    outcome = lambda wins, n=100: {i: i < wins for i in range(n)}
    low, high = statistics.seeds_interval([outcome(20), outcome(80)])
    assert low < 0.25 and high > 0.75
    low, high = statistics.seeds_interval([outcome(50), outcome(50)])
    assert 0.38 < low < 0.42 and 0.58 < high < 0.62  # the same episodes are solved: they count once
    assert statistics.seeds_interval([outcome(30)]) == statistics.wilson(30, 100)
    # two seeds on the same 100 layouts are no 200 layouts
    assert statistics.seeds_interval([outcome(100), outcome(100)]) == statistics.wilson(100, 100)
    low, high = statistics.seeds_interval([outcome(99), outcome(100)])
    assert low <= statistics.wilson(99, 100)[0] and high == 1.0


# -- two policies


@pytest.mark.parametrize("better, worse", [(1, 9), (0, 5), (7, 7), (0, 0), (30, 12), (121, 59)])
def test_mcnemar_is_the_exact_binomial_test(better, worse):
    """p equals that of the two-sided binomial test over the discordant pairs."""
    expected = binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert statistics.mcnemar(better, worse) == pytest.approx(expected, rel=1e-9)
    assert statistics.mcnemar(better, worse) == statistics.mcnemar(worse, better)
    assert statistics.mcnemar(0, 5) == 0.0625 and statistics.mcnemar(1, 9) == 22 / 1024


def test_a_paired_interval_is_that_of_the_literature():
    """Bonett's own example, of 26 and 4 unequal pairs among 48: 0.2548 to 0.6252 (statpsych)."""
    found = statistics.paired_interval([1] * 26 + [-1] * 4 + [0] * 18)
    np.testing.assert_allclose(found, (0.2548067, 0.6251933), atol=1e-7)
    mirrored = statistics.paired_interval([-1] * 26 + [1] * 4 + [0] * 18)
    np.testing.assert_allclose(mirrored, (-0.6251933, -0.2548067), atol=1e-7)
    # equal results of five episodes do not say that there is no difference
    low, high = statistics.paired_interval([0] * 5)
    assert low < -0.3 and high > 0.3


def test_a_paired_interval_covers_as_often_as_it_says():
    """Over 2000 drawn evaluations of 30 pairs it holds the true difference in 93 to 98%."""
    rng = np.random.default_rng(0)
    # only the one wins in 25%, only the other in 10%
    drawn = rng.choice([1, -1, 0], p=[0.25, 0.1, 0.65], size=(2000, 30))
    gained, lost = (drawn == 1).sum(1), (drawn == -1).sum(1)
    pairs = [[1] * g + [-1] * w + [0] * (30 - g - w) for g, w in zip(gained, lost)]
    intervals = np.array([statistics.paired_interval(p) for p in pairs])
    covered = (intervals[:, 0] <= 0.15) & (intervals[:, 1] >= 0.15)
    assert 0.93 <= covered.mean() <= 0.98


def test_newcombes_interval_is_the_published_one():
    """56/70 against 48/80, the first example of Newcombe's paper: 0.0524 to 0.3339."""
    low, high = statistics.newcombe(56, 70, 48, 80)
    np.testing.assert_allclose((low, high), (0.0524, 0.3339), atol=5e-5)


def test_fishers_test_is_that_of_the_tea():
    """Fisher's own example, 3 of 4 cups against 1 of 4: p = 34/70."""
    assert statistics.fisher(3, 4, 1, 4) == pytest.approx(34 / 70)


# -- several seeds


def test_a_paired_comparison_counts_an_episode_once_whatever_its_seeds():
    """Three seeds of the same ten episodes are ten episodes: p is not that of thirty."""
    seed = {i: 1 if i < 4 else 0 for i in range(10)}
    found = statistics.paired_comparison({"s0": seed, "s1": seed, "s2": seed})
    assert (found["n"], found["better"], found["worse"]) == (10, 4, 0)
    assert found["p"] == statistics.mcnemar(4, 0)
    assert found["difference"] == pytest.approx(0.4)
    low, high = found["interval"]
    alone_low, alone_high = found["by_seed"]["s0"]["interval"]
    assert low <= alone_low and high >= alone_high


def test_the_interval_of_a_difference_knows_that_seeds_differ():
    """+60 points with one seed and -20 with another is no +20 that is sure."""
    better = {i: 1 if i < 30 else 0 for i in range(50)}
    worse = {i: -1 if i < 10 else 0 for i in range(50)}
    low, high = statistics.paired_comparison({"s0": better, "s1": worse})["interval"]
    assert low < -0.15 and high > 0.55


# -- how many episodes


def power_of_mcnemar(n, gained, lost):
    """Exact chance that McNemar's p is below 0.05 with n pairs."""
    chance = 0.0
    for unequal in range(1, n + 1):
        wins = np.arange(unequal + 1)
        small = np.array([statistics.mcnemar(w, unequal - w) < 0.05 for w in wins])
        found = binom.pmf(wins[small], unequal, gained / (gained + lost)).sum()
        chance += binom.pmf(unequal, n, gained + lost) * found
    return chance


def test_so_many_paired_episodes_find_the_difference():
    """With Connor's number the exact power is near 80%; with half of it, far below."""
    n = statistics.paired_episodes(0.3, 0.2)
    # by hand: ((1.960 sqrt(0.3) + 0.842 sqrt(0.26)) / 0.2)^2 = 56.4
    assert n == 57
    assert 0.7 < power_of_mcnemar(n, 0.25, 0.05) < 0.9
    assert power_of_mcnemar(n // 2, 0.25, 0.05) < 0.55
    assert statistics.paired_episodes(0.3, 0) is None


def test_no_number_of_paired_episodes_is_too_small_for_a_small_p():
    """Where one policy wins every episode, five are not enough: McNemar's p is 0.0625."""
    assert statistics.paired_episodes(1, 1) == 6


def test_so_many_unpaired_episodes_are_those_of_the_textbook():
    """80% against 60%, by hand: (1.960 sqrt(2 0.7 0.3) + 0.842 sqrt(0.16 + 0.24))^2 / 0.2^2 =
    81.2 each.
    """
    assert statistics.unpaired_episodes(0.8, 0.6) == 82
    assert statistics.unpaired_episodes(0.6, 0.8) == 82
    assert statistics.unpaired_episodes(0.6, 0.6) is None
    # pairs that agree as if they were none need about as many
    paired = statistics.paired_episodes(0.8 * 0.4 + 0.2 * 0.6, 0.2)
    assert abs(paired - 82) < 6


# -- runs that are still going


def test_e_values_are_those_by_hand():
    """Two wins: 2^2 times the integral of t^2 = 4/3. A win and a loss: 2^2 B(2,2) = 2/3."""
    np.testing.assert_allclose(statistics.e_values([1, 1]), [1, 4 / 3])
    np.testing.assert_allclose(statistics.e_values([1, 0]), [1, 2 / 3])
    np.testing.assert_allclose(statistics.e_values([0, 0]), statistics.e_values([1, 1]))
    wins = statistics.e_values([1] * 12)
    np.testing.assert_allclose(wins[-1], 2**12 / 13)
    assert statistics.anytime_p([]) == 1.0


def test_looking_after_every_episode_does_not_raise_the_false_alarms():
    """Of 4000 fair coins at most 5% ever reach e = 20 in 400 tosses, where McNemar's p, looked at
    after every toss, is below 0.05 at some time in more than 20% of them.
    """
    rng = np.random.default_rng(0)
    coins = rng.random((4000, 400)) < 0.5
    assert np.mean([statistics.anytime_p(wins) <= 0.05 for wins in coins]) <= 0.05
    # p of every count of wins at every length, looked up: (length, wins)
    won, n = coins[:200].cumsum(1), np.arange(1, 401)
    p = 2 * binom.cdf(np.minimum(won, n - won), n, 0.5)
    assert np.mean((p <= 0.05).any(1)) > 0.2


def test_a_martingale_is_one_on_average():
    """The mean e-value after ten fair tosses, over all 1024 outcomes, is 1 exactly."""
    tosses = (np.arange(1024)[:, None] >> np.arange(10)) % 2
    last = [statistics.e_values(wins)[-1] for wins in tosses]
    assert math.fsum(last) / 1024 == pytest.approx(1)


def test_a_clear_difference_ends_a_run_early():
    """Where one policy wins 90% of the unequal pairs, half of the runs may stop within 15."""
    rng = np.random.default_rng(0)
    first = [np.argmax(statistics.e_values(w) >= 20) for w in rng.random((300, 200)) < 0.9]
    assert np.median(first) <= 15
