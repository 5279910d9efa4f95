"""An evaluation's episodes: nothing about them depends on what else runs."""

import numpy as np
import pytest
from helpers import run

import eval as evaluation
from runtime import git_commit, read_jsonl
from sim.workers import run_jobs

STEPS = 12


def rows(args, network, jobs, n_workers):
    """Run episodes in the given order on so many workers -> {episode: its row without the clock},
    {episode: state and waypoint at each decision}.
    """
    served = (args, network.address, network.about["reference"])
    found = {o.job: o.result for o in run_jobs(jobs, evaluation.EvalWorker, served, n_workers)}
    for row in found.values():
        del row["seconds"]
    traces = {job: np.load(args.out / "traces" / f"{job:03d}.npz")["states"] for job in jobs}
    return found, traces


@pytest.mark.parametrize("task", [0, 5])
def test_a_policy_is_evaluated_where_the_expert_can_do_nothing(task, trained, tmp_path):
    """Of LIBERO-10, two things to bring somewhere and a book too wide for the fingers: the episode
    is played and scored, and only the comparison with the expert's path is missing. The expert
    itself is refused.
    """
    checkpoint = trained[0] / "checkpoint.safetensors"
    words = f"--task_suite libero_10 --task_id {task} --n_episodes 1 --workers 1 --n_videos 0"
    words = f"{words} --max_steps {STEPS}".split()
    acted = ["--ckpt", checkpoint, "--teleport", "--zero_rotation", "--no-clean_scene"]
    run("eval.py", *acted, *words, "--out", "out", cwd=tmp_path)
    (row,) = read_jsonl(tmp_path / "out" / "episodes.jsonl")
    assert (row["success"], row["steps"], row["coverage_8px"]) == (False, STEPS, None)
    assert row["commit"] == git_commit()
    refused = run("eval.py", "--policy", "expert", *words, cwd=tmp_path, ok=False)
    assert refused.returncode == 2 and "the scripted expert" in refused.stderr


def test_outcomes_do_not_depend_on_workers_and_order(trained, tmp_path):
    """Rows, states and waypoints are equal bit by bit for one worker, and for two workers that
    share the network and start with other episodes. Otherwise a result would change with the
    machine.
    """
    checkpoint = trained[0] / "checkpoint.safetensors"
    words = ["--ckpt", str(checkpoint), "--layout", "shifted", "--teleport", "--zero_rotation"]
    words += [
        "--max_steps",
        str(STEPS),
        "--n_videos",
        "0",
        "--clean_scene",
        "--trace",
        "--out",
        str(tmp_path),
    ]
    args = evaluation.build_parser().parse_args(words)
    with evaluation.network_of(args) as network:
        evaluation.prepare(args, network)
        alone, traces = rows(args, network, [0, 1], 1)
        beside, others = rows(args, network, [1, 0], 2)
    assert alone == beside and set(alone) == {0, 1}
    for job, states in traces.items():
        np.testing.assert_array_equal(states, others[job])
        assert len(states) == alone[job]["decisions"] > 1
    assert not np.array_equal(traces[0][0], traces[1][0])
