"""Two or more results compared: rates, differences from the first, and whether a run that is still
going may stop.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from figures.pages import percent
from harness import outcomes
from harness.statistics import (
    POWER,
    anytime_p,
    e_values,
    fisher,
    holm,
    newcombe,
    paired_comparison,
    paired_episodes,
    seeds_interval,
    square_and_add,
    unpaired_episodes,
)
from runtime import UserError


class Result(NamedTuple):
    """A policy's evaluations: runs {seed of its training, or its place in the list: Run}."""

    name: str
    runs: dict

    @property
    def known(self):
        """Whether its runs are called by their seeds."""
        return all(name == str(run.train_seed) for name, run in self.runs.items())


def result_of(name, runs):
    """A Result of runs: by the seeds of their trainings where all are known and differ.

    Several tasks, or layouts, of one training are one run: an interval over seeds is not one over
    tasks.
    """
    runs = joined(runs)
    seeds = [run.train_seed for run in runs]
    labels = seeds if None not in seeds and len(set(seeds)) == len(seeds) else range(len(runs))
    return Result(name, {str(label): run for label, run in zip(labels, runs)})


def joined(runs):
    """Runs of one training, or of nobody knows which, that share no episode and differ in the task
    or layout -> one, of all their episodes.
    """
    by_training = {}
    for run in runs:
        by_training.setdefault(run.train_seed, []).append(run)
    found = []
    for parts in by_training.values():
        named = all("task" in run.fields() for run in parts)
        places = [{key[:2] for key in run.episodes} for run in parts] if named else []
        apart = named and sum(map(len, places)) == len(set().union(*places))
        found += [together(parts)] if len(parts) > 1 and apart else parts
    return found


def together(parts):
    """Several outcomes.Run as one."""
    names = dict.fromkeys(name for run in parts for name in run.protocol)
    said = {n: dict.fromkeys(r.protocol[n] for r in parts if n in r.protocol) for n in names}
    return parts[0]._replace(
        path=Path(os.path.commonpath([run.path for run in parts])),
        episodes={k: row for run in parts for k, row in run.episodes.items()},
        crashed=frozenset().union(*(run.crashed for run in parts)),
        protocol={name: " ".join(values) for name, values in said.items()},
    )


# -- whether they can be compared -----------------------------------------------------------------


def notes(results, reference):
    """What a reader should know before the numbers, one line each: where protocols differ, where
    they are unknown, and episodes that crashed.
    """
    found = []
    for result in results:
        runs = list(result.runs.values())
        if crashed := sum(len(run.crashed) for run in runs):
            found.append(f"{result.name}: {crashed} crashed episodes are not scored")
        if any("init_states" in run.protocol for run in runs):
            found.append(
                f"{result.name}: LeRobot's file does not say its init states, which are taken for "
                f"{outcomes.TAKEN_FOR_GRANTED}; with --env.init_states=false it has others, and "
                "no pair below means anything"
            )
        if unknown := sorted({run.kind for run in runs if "max_steps" not in run.protocol}):
            found.append(
                f"{result.name}: files of {', '.join(unknown)} do not say their protocol (control "
                "steps, render, simulator); make sure that it is the same"
            )
        if result is reference:
            continue
        if differing := differences(result, reference):
            found.append(f"{result.name} and {reference.name} differ in {', '.join(differing)}")
        pairs, left_out = pairs_of(result, reference)
        if pairs and left_out:  # without any pair the comparison says why
            found.append(
                f"{result.name} and {reference.name}: their difference is of fewer runs than their "
                f"rates, {'; '.join(left_out)}"
            )
    return found


def differences(result, reference):
    """Entries of the protocol that two results do not share, as ["max_steps (600, 280)", ...]."""
    found = []
    for name in outcomes.PROTOCOL:
        sides = [
            sorted({run.protocol[name] for run in r.runs.values() if name in run.protocol})
            for r in (result, reference)
        ]
        if all(sides) and sides[0] != sides[1]:
            found.append(f"{name} ({', '.join(' and '.join(values) for values in sides)})")
    return found


# -- numbers --------------------------------------------------------------------------------------


def rate(result, metric):
    """{"name", "n", "won", "rate" (mean of the seeds' rates), "interval", "by_seed"}."""
    # keys as text: a field that a file lacks cannot be sorted
    won = [{str(k): w for k, w in run.won(metric).items()} for run in result.runs.values()]
    rates = [float(np.mean(list(w.values()))) for w in won]
    return {
        "name": result.name,
        "n": sum(map(len, won)),
        "won": sum(sum(w.values()) for w in won),
        "rate": float(np.mean(rates)),
        "interval": list(seeds_interval(won)),
        "by_seed": dict(zip(result.runs, rates)),
    }


def runs_that_pair(result, reference):
    """[(seed, run, other run)] that are compared episode by episode: of the same seed of training;
    a single run with each of the other's.
    """
    one, other = result.runs, reference.runs
    if len(one) == 1:
        only = next(iter(one.values()))
        return [(seed, only, run) for seed, run in other.items()]
    if len(other) == 1:
        only = next(iter(other.values()))
        return [(seed, run, only) for seed, run in one.items()]
    if result.known != reference.known:  # a place in a list is no seed
        return []
    return [(seed, one[seed], other[seed]) for seed in one if seed in other]


def pairs_of(result, reference):
    """([(seed, run, other run, fields that their episodes pair by)], [why a run has no pair])."""
    found, why = [], []
    for seed, run, other in runs_that_pair(result, reference):
        names, reason = outcomes.pairing(run, other)
        if names is None:
            why.append(reason)
        else:
            found.append((seed, run, other, names))
    if 1 not in (len(result.runs), len(reference.runs)):
        alone = sorted(result.runs.keys() ^ reference.runs.keys())
        if result.known != reference.known:
            why.append("the seeds of training are known on one side alone")
        elif not found and not why:
            why.append("no seed of training is on both sides")
        elif alone:
            why.append(f"seed {', '.join(alone)} is on one side alone")
    return found, why


def against(result, reference, metric, sequential=False):
    """A result compared with the reference -> {"paired", "difference", "interval", "p",
    "episodes_needed", ...}, see `paired_comparison`; without pairs "why" there are none.
    """
    if sequential and len(result.runs) + len(reference.runs) > 2:
        raise UserError(
            f"--sequential: {result.name} and {reference.name} have several seeds, whose episodes "
            "share their layouts and come in no order in time; give one run of each"
        )
    by_seed, wins = {}, []
    pairs, why = pairs_of(result, reference)
    for seed, run, other, names in pairs:
        mine, theirs = (
            {outcomes.short(key, names): won for key, won in r.won(metric).items()}
            for r in (run, other)
        )
        by_seed[seed] = {
            str(key): mine[key] - theirs[key] for key in outcomes.shared(run, other, names)
        }
        in_order = outcomes.in_order(run, other, names)
        wins += [mine[key] for key in in_order if mine[key] != theirs[key]]
    if not by_seed:
        return {"paired": False, "why": "; ".join(why), **unpaired(result, reference, metric)}
    found = paired_comparison(by_seed)
    needed = paired_episodes(unequal_share(by_seed), found["difference"])
    found = {"paired": True, **found, "episodes_needed": needed}
    if sequential:
        found["sequential"] = {
            "unequal": len(wins),
            "won": int(sum(wins)),
            "e": float(e_values(wins)[-1]) if wins else 1.0,
            "p": anytime_p(wins),
        }
    return found


def unequal_share(by_seed):
    """Share of seeds in which an episode is won by one side only, in the mean over episodes.
    by_seed: {seed: {episode: difference}}.
    """
    apart = {}
    for pairs in by_seed.values():
        for episode, difference in pairs.items():
            apart.setdefault(episode, []).append(abs(difference))
    return float(np.mean([np.mean(each) for each in apart.values()]))


def unpaired(result, reference, metric):
    """Newcombe's interval, its like of several seeds, and Fisher's test of the pooled episodes."""
    one, other = (rate(r, metric) for r in (result, reference))
    counts = one["won"], one["n"], other["won"], other["n"]
    if len(result.runs) == len(reference.runs) == 1:
        interval = newcombe(*counts)
    else:
        interval = square_and_add(one["rate"], one["interval"], other["rate"], other["interval"])
    return {
        "n": min(one["n"], other["n"]),
        "difference": one["rate"] - other["rate"],
        "interval": list(interval),
        "p": fisher(*counts),
        "episodes_needed": unpaired_episodes(one["rate"], other["rate"]),
    }


def compare(results, reference, metric, sequential=False):
    """[Result] -> [{**rate, "against": None of the reference, else `against`}], the reference
    first. p is adjusted by Holm over all comparisons: "p_holm".
    """
    others = [r for r in results if r is not reference]
    found = [{**rate(reference, metric), "against": None}]
    for result in others:
        compared = against(result, reference, metric, sequential)
        found.append({**rate(result, metric), "against": compared})
    family = [row["against"] for row in found[1:]]
    for pair, p in zip(family, holm([pair["p"] for pair in family])):
        pair["p_holm"] = p
    return found


# -- as text --------------------------------------------------------------------------------------


def table(rows):
    """(head, rows) of strings for `markdown_table`."""
    first = rows[0]["name"]
    adjusted = "p (Holm)" if len(rows) > 2 else "p"
    head = ["", "n", "rate (95%)", f"points more than {first} (95%)", adjusted]
    head += ["won:lost", f"episodes for {100 * POWER:.0f}% power"]
    return head, [[r["name"], r["n"], rate_text(r), *difference_text(r["against"])] for r in rows]


def rate_text(row):
    """A rate with its interval, and that of each seed where there are several."""
    seeds = [f"{100 * value:.0f}" for value in row["by_seed"].values()]
    by_seed = f", seeds {' '.join(seeds)}" if len(seeds) > 1 else ""
    return percent(row["rate"], row["interval"]) + by_seed


def difference_text(pair):
    """The cells of a comparison."""
    if pair is None:
        return ["-"] * 4
    low, high = (f"{100 * bound:+.0f}" for bound in pair["interval"])
    counts = f"{pair['better']}:{pair['worse']} of {pair['n']}" if pair["paired"] else "unpaired"
    needed = "-" if pair["episodes_needed"] is None else pair["episodes_needed"]
    difference = f"{100 * pair['difference']:+.0f} ({low} to {high})"
    return [difference, f"{pair['p_holm']:.2g}", counts, needed]


def advice(row, reference):
    """What the sequential test says of a comparison, as a line."""
    pair, name = row["against"], row["name"]
    if "sequential" not in pair:
        return f"{name}: no sequential test without pairs ({pair['why']})"
    found = pair["sequential"]
    counts = f"{found['won']} of {found['unequal']} unequal pairs won"
    numbers = f"{counts}, e = {found['e']:.3g}, p at any time {found['p']:.2g}"
    if found["p"] > 0.05:
        return f"{name}: go on; {numbers}"
    better = name if found["won"] * 2 > found["unequal"] else reference
    return f"{name}: may stop, {better} is better; {numbers}"
