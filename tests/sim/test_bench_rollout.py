"""The rollout benchmark runs the same episodes in every loop, and measures what it says."""

from argparse import Namespace

from study.bench_rollout import LOOPS, THEIRS, loops

STEPS = 20


def test_the_loops_run_the_same_episode_at_other_costs(trained, capsys):
    """All loops end alike, and only their costs differ.

    Otherwise a ratio would compare two different things. One loop renders at every step, the other
    at every decision.
    """
    ckpt = trained[0] / "checkpoint.safetensors"
    args = Namespace(ckpt=ckpt, layout="position", device="cpu", loops=None)
    found = loops(args, 1, 1, STEPS)
    table, ours = found["table"], found["outcomes"]["ours"][0]
    assert found["equal_outcomes"] and list(table) == list(LOOPS)
    steps, decisions = ours[1:3]
    assert steps == STEPS and table["ours"]["renders"] == decisions < STEPS
    assert table[THEIRS]["renders"] >= decisions + STEPS
    assert table["ours, fast render"]["steps"] == STEPS
    assert table[THEIRS]["ratio"] == 1 and table["ours"]["ratio"] > 1
    assert f"| {THEIRS} |" in capsys.readouterr().out
