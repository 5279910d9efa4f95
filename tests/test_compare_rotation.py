"""The comparison of rotation heads: its measures, and what it trains and what it leaves alone."""
import json

import numpy as np
import pytest

import compare_rotation
from compare_rotation import CELLS, build_parser, finished, guess_nats, train_cells, train_flags, transitions, unsteadiness
from rot_utils import euler_to_matrix
from runtime import UserError


def test_measures():
    """A guesser's nats are the labels' entropy, averaged over the axes; transitions and turns are counted frame by frame."""
    sure = np.eye(8)[np.array([[0, 7], [1, 7], [2, 7], [3, 7]])]  # (4,2,8)
    assert guess_nats(sure[:, :1]) == pytest.approx(np.log(4)) and guess_nats(sure) == pytest.approx(np.log(4) / 2)
    assert guess_nats(np.full((3, 1, 8), 1 / 8)) == pytest.approx(0)
    assert transitions(np.array([0, 0, 1, 1, 0, 1, 1])) == (2, 1)
    yaw = np.radians([0.0, 3.0, 3.0, -3.0])
    assert unsteadiness(euler_to_matrix(np.stack([0 * yaw, 0 * yaw, yaw], -1))) == pytest.approx(3)


@pytest.fixture
def done(tmp_path, synthetic_episodes):
    """(flags of the comparison, its folder of trainings), every one of them finished."""
    args = build_parser().parse_args(["--dataset", str(synthetic_episodes), "--seeds", "2", "--runs", str(tmp_path / "runs")])
    for name in CELLS:
        for seed in range(2):
            folder = tmp_path / "runs" / f"{name}_{seed}"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps({"argv": train_flags(args, name, seed, ["--lr", "0.002"])}))
            (folder / "loss.png").touch()
    return args, tmp_path / "runs"


def test_finished_trainings_are_left_alone(done, monkeypatch):
    """The same command again trains nothing; one that was stopped is resumed, and no other."""
    args, folder = done
    calls = []
    monkeypatch.setattr(compare_rotation, "script", lambda *call: calls.append(call))
    expected = [f"{name}={folder / name}_{seed}" for seed in range(2) for name in CELLS]
    assert train_cells(args, ["--lr", "0.002"]) == expected and calls == []
    (folder / "new_1" / "loss.png").unlink()
    assert not finished(folder / "new_1")
    with pytest.raises(UserError, match="new_1: was stopped"):
        train_cells(args, ["--lr", "0.002"])
    assert calls == [("train.py", "--resume", folder / "new_1")]


def test_runs_with_other_flags_are_refused(done):
    """Results of one --lr never pass for those of another: the folder and both commands are named."""
    args, _ = done
    with pytest.raises(UserError, match="v7_0: was trained with .*--lr 0.002.*give another --runs"):
        train_cells(args, [])
