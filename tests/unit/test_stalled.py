"""When an episode counts as stalled: where states repeat, and nowhere else."""

import json

import numpy as np
import pytest

from runtime import UserError, append_jsonl
from sim.stalled import DECISIONS, TOLERANCE, first_stall, repeats
from study.stalled import main

K = 10


def hover(n, jitter=0.0):
    """States (n,4) that stand still apart from jitter."""
    return np.ones((n, 4)) + jitter * np.resize([0, 1], n)[:, None]


def test_what_stands_still_is_stalled_after_k_decisions():
    """Not before K decisions: a policy may hesitate for a while."""
    moving = np.arange(5)[:, None] * np.ones(4)
    assert first_stall(np.concatenate([moving, 9 * hover(K - 1)]), K) is None
    assert first_stall(np.concatenate([moving, 9 * hover(K + 5)]), K) == 5 + K - 1


@pytest.mark.parametrize("period, stalled", [(1, True), (3, True), (4, True), (5, False)])
def test_states_that_take_turns_are_stalled(period, stalled):
    """A policy that goes back and forth between waypoints will go on so.

    Longer rounds do not count: too few of them are seen.
    """
    rounds = np.resize(np.arange(period), 3 * K)[:, None] * np.ones(4)
    assert (first_stall(rounds, K) is not None) == stalled


@pytest.mark.parametrize("column", range(4))
def test_anything_that_changes_is_progress(column):
    """An object that slides, a command that flips or an arm that creeps counts as progress, if
    it moves by more than the tolerance over the decisions looked at.
    """
    states = hover(3 * K)
    states[:, column] += np.linspace(0, 5 * TOLERANCE, 3 * K)
    assert first_stall(states, K) is None
    states[:, column] = 1 + np.linspace(0, 0.9 * TOLERANCE, 3 * K)
    assert first_stall(states, K) == K - 1


def test_one_step_aside_starts_the_count_anew():
    """Only consecutive decisions count."""
    states = hover(2 * K)
    states[K - 2] += 0.1
    assert first_stall(states, K) == 2 * K - 2


def test_jitter_below_the_tolerance_is_rest():
    """Motion below the tolerance counts as rest: the servo leaves fractions of a millimetre."""
    assert repeats(hover(DECISIONS, 0.5 * TOLERANCE), period=1)
    assert not repeats(hover(DECISIONS, 2 * TOLERANCE), period=1)


# -- the tool that judges the rule


def evaluation(folder, first_success):
    """An evaluation of one episode with 40 decisions, one step each.

    It stands still from decision 5 to 30 and then moves. It succeeds at `first_success`, or never.
    """
    states = np.concatenate([np.arange(5), np.full(26, 9), 20 + np.arange(9)])[:, None] * np.ones(4)
    (folder / "traces").mkdir()
    np.savez_compressed(folder / "traces" / "000.npz", states=states, steps=np.arange(40))
    won = first_success is not None
    row = {"episode": 0, "outcome": "place" if won else "miss", "success": won, "released": False}
    row |= {"steps": 40, "first_success": first_success, "first_release": None, "decisions": 40}
    row |= {"jerk_mm": 1.0, **{f"coverage_{px}px": None for px in (4, 8, 16)}}
    row["seconds"] = {"features": 0.0, "policy": 0.0, "total": 1.0}
    append_jsonl(folder / "episodes.jsonl", row)
    return folder


@pytest.mark.parametrize("first_success, wrong", [(None, 0), (10, 0), (36, 1)])
def test_a_success_after_the_rule_would_have_fired_is_counted_as_wrong(
    first_success, wrong, tmp_path
):
    """The rule is wrong where --stop_stalled would change the outcome, however still the
    episode was.
    """
    folder = evaluation(tmp_path, first_success)
    out = tmp_path / "judged.json"
    main([str(folder), "--decisions", "10", "28", "--out", str(out)])
    short, long = json.loads(out.read_text())["evaluations"][tmp_path.name]
    assert (short["ended"], short["wrong"], short["failed"]) == (1, wrong, first_success is None)
    assert short["steps_saved"] == (40 - 14) / 40
    assert (long["ended"], long["wrong"], long["steps_saved"]) == (0, 0, 0)


def test_an_episode_that_was_ended_cannot_judge_the_rule(tmp_path):
    """Such an episode is refused: its outcome without the rule is unknown."""
    folder = evaluation(tmp_path, None)
    rows = (folder / "episodes.jsonl").read_text()
    (folder / "episodes.jsonl").write_text(
        rows.replace('"steps": 40', '"stalled": 40, "steps": 40')
    )
    with pytest.raises(UserError, match="ended as stalled"):
        main([str(folder)])


def test_an_evaluation_without_traces_is_named(tmp_path):
    """The sentence says what to run instead."""
    folder = evaluation(tmp_path, None)
    (folder / "traces" / "000.npz").write_bytes(b"half")
    with pytest.raises(UserError, match=r"000.npz: no trace"):
        main([str(folder)])
    (folder / "traces" / "000.npz").unlink()
    with pytest.raises(UserError, match="has no traces; run eval.py with --trace"):
        main([str(folder)])
