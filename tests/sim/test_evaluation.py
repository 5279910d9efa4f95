"""An evaluation's episodes: nothing about them depends on what else runs."""

import numpy as np

import eval as evaluation
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
