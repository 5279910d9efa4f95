"""Statistics of success rates: intervals, comparisons of two policies, several seeds of training,
numbers of episodes, and runs that are still going.

What scipy or statsmodels has is theirs. Written out here are the interval of a paired difference,
the bootstrap over seeds and episodes, the number of paired episodes and the sequential test, each
with its source. Libraries are imported where they are used: they take one to two seconds, which no
simulator's worker should wait for.
"""

import math

import numpy as np

LEVEL = 0.95  # of every interval
POWER = 0.8  # chance to find a difference that is there, for numbers of episodes
DRAWS = 4000  # of a bootstrap
TAILS = 2.5, 97.5  # percentiles of a bootstrap's draws that bound LEVEL of them

# -- one rate -------------------------------------------------------------------------------------


def wilson(successes, n, level=LEVEL):
    """Wilson score interval of a success rate -> (low, high); (0, 1) when n is 0."""
    from scipy.stats import binomtest

    if n == 0:
        return 0.0, 1.0
    interval = binomtest(int(successes), int(n)).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


# -- two policies on the same episodes ------------------------------------------------------------


def mcnemar(better, worse):
    """Exact two-sided McNemar test of paired successes -> p.

    better, worse: pairs in which only the one, or only the other, succeeds. Under the null
    hypothesis either is as likely: the binomial test of the two counts. Exact form as in Fagerland,
    Lydersen, Laake 2013, "The McNemar test for binary matched-pairs data".
    """
    from scipy.stats import binomtest

    return float(binomtest(int(better), int(better + worse)).pvalue) if better + worse else 1.0


def paired_interval(differences, level=LEVEL):
    """Interval of the mean difference of paired episodes -> (low, high).

    differences (n,): 1 where only the one succeeds, -1 where only the other, else 0; or means of
    such over seeds, whose variance this counts too high. Wald's interval with one pair more of
    either kind: Bonett, Price 2012, "Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data".
    """
    from scipy.stats import norm

    differences = np.asarray(differences, dtype=float)
    n = len(differences) + 2
    gained = (np.maximum(differences, 0).sum() + 1) / n
    lost = (np.maximum(-differences, 0).sum() + 1) / n
    middle = gained - lost
    half = norm.ppf((1 + level) / 2) * math.sqrt((gained + lost - middle**2) / n)
    return max(-1.0, float(middle - half)), min(1.0, float(middle + half))


# -- two policies on different episodes -----------------------------------------------------------


def newcombe(successes, n, other_successes, other_n, level=LEVEL):
    """Newcombe's interval of the difference of two unpaired success rates -> (low, high).

    Newcombe 1998, "Interval estimation for the difference between independent proportions", method
    10, from statsmodels.
    """
    from statsmodels.stats.proportion import confint_proportions_2indep

    low, high = confint_proportions_2indep(
        successes, n, other_successes, other_n, compare="diff", method="newcomb", alpha=1 - level
    )
    return float(low), float(high)


def square_and_add(rate, interval, other, other_interval):
    """Interval of the difference of two unpaired rates from an interval of each -> (low, high).

    With Wilson's intervals it is `newcombe`; here for several seeds, with `seeds_interval`. Zou,
    Donner 2008, "Construction of confidence limits about effect measures: a general approach".
    """
    difference = rate - other
    low = math.hypot(rate - interval[0], other_interval[1] - other)
    high = math.hypot(interval[1] - rate, other - other_interval[0])
    return max(-1.0, difference - low), min(1.0, difference + high)


def fisher(successes, n, other_successes, other_n):
    """Fisher's exact two-sided test of two unpaired success rates -> p."""
    from scipy.stats import fisher_exact

    table = [[successes, n - successes], [other_successes, other_n - other_successes]]
    return float(fisher_exact(table).pvalue)


# -- a table of comparisons -----------------------------------------------------------------------


def holm(p_values):
    """Holm's adjusted p values, in the order given.

    If all below 0.05 are rejected, the chance of any false rejection is at most 5%. Source: Holm
    1979, "A simple sequentially rejective multiple test procedure"; from statsmodels.
    """
    from statsmodels.stats.multitest import multipletests

    if not len(p_values):
        return []
    return multipletests(p_values, method="holm")[1].tolist()


# -- several seeds of training --------------------------------------------------------------------


def two_level_means(values, draws=DRAWS):
    """Two-level bootstrap of the mean over seeds -> (draws,) means.

    values: one {episode: number} for each seed. Seeds and episodes are drawn anew with replacement;
    all seeds have the same layouts, so the same episodes are drawn for each. rliable's bootstrap
    draws runs alone, as its tasks are fixed.
    """
    episodes = sorted(set().union(*values))
    # (seeds, episodes); NaN: an episode that this seed has no result of
    table = np.array([[v.get(e, np.nan) for e in episodes] for v in values], dtype=float)
    rng = np.random.default_rng(0)  # the same table gives the same interval
    seeds = rng.integers(len(table), size=(draws, len(table)))
    drawn = rng.integers(len(episodes), size=(draws, len(episodes)))
    # each seed's mean over the episodes that are drawn and known
    known = ~np.isnan(table)
    sums = np.where(known, table, 0.0)[:, drawn].sum(-1)  # (seeds, draws)
    counts = known[:, drawn].sum(-1)  # (seeds, draws)
    means = (sums / np.maximum(counts, 1)).T  # (draws, seeds)
    return np.take_along_axis(means, seeds, axis=1).mean(axis=1)


def widened(interval, values):
    """An interval, widened to the bootstrap's over seeds and episodes where there are several
    seeds; never narrower, as a bootstrap of successes alone cannot fail.
    """
    low, high = interval
    if len(values) < 2:
        return low, high
    drawn_low, drawn_high = np.percentile(two_level_means(values), TAILS)
    return min(low, float(drawn_low)), max(high, float(drawn_high))


def seeds_interval(outcomes):
    """95% interval of a success rate over training seeds -> (low, high).

    outcomes: one {episode: bool} for each seed. One seed gives Wilson's interval over its episodes,
    which says nothing about another training. With several, the bootstrap over seeds and episodes,
    never narrower than Wilson's over the episodes, each with its mean over seeds: these share its
    layout, so that they make no more episodes of it.
    """
    episodes = set().union(*outcomes)
    successes = sum(np.mean([o[e] for o in outcomes if e in o]) for e in episodes)
    # whole numbers on either side, and none farther for a last bit
    fewest, most = math.floor(successes + 1e-6), math.ceil(successes - 1e-6)
    low, high = wilson(fewest, len(episodes))[0], wilson(most, len(episodes))[1]
    return widened((low, high), outcomes)


def seeds_difference(differences):
    """95% interval of a paired difference over training seeds -> (low, high).

    differences: one {episode: -1, 0 or 1} for each seed. One seed gives `paired_interval`, which
    says nothing about another training. With several, the bootstrap over seeds and episodes, never
    narrower than the interval of each episode's mean over seeds.
    """
    episodes = sorted(set().union(*differences))
    means = [float(np.mean([d[e] for d in differences if e in d])) for e in episodes]
    return widened(paired_interval(means), differences)


def paired_comparison(by_seed):
    """Two policies on the same episodes -> {"n" episodes, "better", "worse" (episodes in which only
    the one or only the other succeeds, or succeeds with more seeds), "difference" of the rates,
    "interval", "p" exact McNemar, "by_seed" {seed: the same of it alone}}.

    by_seed: {seed: {episode: -1, 0 or 1}}. Every episode counts once, with its mean over seeds,
    which share its layout.
    """

    def compared(found, interval):
        better, worse = (sum(sign * d > 0 for d in found) for sign in (1, -1))
        return {
            "n": len(found),
            "better": better,
            "worse": worse,
            "difference": float(np.mean(found)),
            "interval": interval,
            "p": mcnemar(better, worse),
        }

    by_episode = {}
    for differences in by_seed.values():
        for episode, difference in differences.items():
            by_episode.setdefault(episode, []).append(difference)
    means = [float(np.mean(d)) for d in by_episode.values()]
    each = {s: list(d.values()) for s, d in by_seed.items()}
    return {
        **compared(means, seeds_difference(list(by_seed.values()))),
        "by_seed": {s: compared(found, paired_interval(found)) for s, found in each.items()},
    }


# -- how many episodes ----------------------------------------------------------------------------


def paired_episodes(discordant, difference, power=POWER, level=LEVEL):
    """How many paired episodes find a difference of two rates -> whole number; None for none.

    discordant: share of episodes in which only one of the two succeeds; difference: of the rates,
    at most that share. Source: Connor 1987, "Sample size for testing differences in proportions for
    the paired-sample design".
    """
    from scipy.stats import norm

    if difference == 0:
        return None
    wanted, found = norm.ppf((1 + level) / 2), norm.ppf(power)
    spread = wanted * math.sqrt(discordant) + found * math.sqrt(discordant - difference**2)
    # where one wins every unequal episode, as many are needed as make McNemar's p small at all
    least = math.log2(2 / (1 - level)) / discordant
    return math.ceil(max((spread / difference) ** 2, least))


def unpaired_episodes(rate, other, power=POWER, level=LEVEL):
    """How many episodes of each policy find a difference of two unpaired rates -> whole number;
    None for none. From statsmodels, the normal approximation.
    """
    from statsmodels.stats.proportion import samplesize_proportions_2indep_onetail

    if rate == other:
        return None
    # two-sided at this level: one-sided at half of it; the function takes the sides itself
    n = samplesize_proportions_2indep_onetail(
        rate - other, other, power, alpha=1 - level, alternative="two-sided"
    )
    return math.ceil(float(np.squeeze(n)))


# -- runs that are still going --------------------------------------------------------------------


def e_values(wins):
    """Evidence after each unequal pair of episodes that two policies are not equal -> (n,).

    wins (n,) bool, in order: whether the one or the other succeeded alone. Under the null
    hypothesis each is a fair coin, and the values are a nonnegative martingale that starts at 1:
    the chance that they ever reach 1 / alpha is at most alpha (Ville's inequality), however often
    one looks and whenever one stops.

    A mixture over the coin's bias with a uniform prior, which for w wins and l losses is
    2^(w + l) B(w + 1, l + 1): Robbins 1970, "Statistical methods related to the law of the iterated
    logarithm"; as an e-process in Ramdas, Grunwald, Vovk, Shafer 2023, "Game-theoretic statistics
    and safe anytime-valid inference".
    """
    from scipy.special import betaln

    won = np.cumsum(np.asarray(wins, dtype=float))
    n = np.arange(1, len(won) + 1)
    return np.exp(n * math.log(2) + betaln(won + 1, n - won + 1))


def anytime_p(wins):
    """p that is valid whenever one looks -> number in (0, 1]: one by the largest e-value so far."""
    values = e_values(wins)
    return float(min(1.0, 1 / values.max())) if len(values) else 1.0
