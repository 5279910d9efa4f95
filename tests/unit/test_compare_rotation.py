"""The comparison of rotation heads: its measures, what it trains, and what it leaves alone."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from formats.dataset import open_dataset
from harness.validation import decision_frames
from model_dino_volume_kv_full import DinoVolumeKVFull, DinoVolumeKVFullConfig, pack_basis
from rot_utils import basis_path, euler_to_matrix, load_basis, rotvec_to_matrix
from runtime import UserError
from study import compare_rotation
from study.compare_rotation import (
    CELLS,
    bin_widths,
    build_parser,
    executed,
    finished,
    guess_nats,
    rotation_nats,
    train_cells,
    train_flags,
    transitions,
    unsteadiness,
)


def test_a_guesser_scores_the_entropy_and_turns_are_counted_by_frame():
    """A guesser's nats are the labels' entropy, averaged over the axes; transitions and turns are
    counted frame by frame."""
    sure = np.eye(8)[np.array([[0, 7], [1, 7], [2, 7], [3, 7]])]  # (4,2,8)
    assert guess_nats(sure[:, :1]) == pytest.approx(np.log(4))
    assert guess_nats(sure) == pytest.approx(np.log(4) / 2)
    assert guess_nats(np.full((3, 1, 8), 1 / 8)) == pytest.approx(0)
    assert transitions(np.array([0, 0, 1, 1, 0, 1, 1])) == (2, 1)
    yaw = np.radians([0.0, 3.0, 3.0, -3.0])
    assert unsteadiness(euler_to_matrix(np.stack([0 * yaw, 0 * yaw, yaw], -1))) == pytest.approx(3)


@pytest.fixture
def setting(synthetic_episodes):
    """Demonstrations, and untrained policies that know their range of rotations."""

    def policy(**options):
        made = DinoVolumeKVFull(
            DinoVolumeKVFullConfig(grid=16, n_height_bins=8, tf_layers=1, **options), [4]
        )
        made.euler_range.copy_(torch.tensor([[3.0, 3.3], [-0.1, 0.1], [-1.2, 1.2]]))
        if made.config.rotation == "pca":
            made.rotation_basis.copy_(
                torch.from_numpy(pack_basis(load_basis(basis_path(synthetic_episodes))))
            )
        return made

    return SimpleNamespace(demos=open_dataset(synthetic_episodes).demos, policy=policy)


def test_nats_do_not_depend_on_the_number_of_bins_or_angles(setting):
    """A flat distribution over the axis has the same density per degree in any number of bins, and
    the density at a certain bin is that bin's width; the whole rotation's cross-entropy is the sum
    over its angles."""
    demo = setting.demos[0]
    rotation = rotvec_to_matrix(demo.ee_ori[::7])
    for options, angles in (
        ({"rotation": "pca", "n_rot_bins": 48}, 1),
        ({"rotation": "pca", "n_rot_bins": 12}, 1),
        ({"rotation": "euler"}, 3),
    ):
        policy = setting.policy(**options)
        bins, widths = policy.config.n_rot_bins, bin_widths(policy)
        whole, density = rotation_nats(
            policy, np.zeros((len(rotation), angles, bins), np.float32), rotation
        )
        np.testing.assert_allclose(density, np.log(widths.max() * bins))  # the whole range
        sure = (
            50
            * torch.nn.functional.one_hot(
                policy.rotation_bins(torch.from_numpy(rotation)), bins
            ).float()
        )
        np.testing.assert_allclose(
            rotation_nats(policy, sure.numpy(), rotation)[1], np.log(widths.max()), atol=1e-3
        )
        per_angle = policy.rotation_loss(
            torch.zeros(len(rotation), angles, bins), torch.from_numpy(rotation)
        ).numpy()
        np.testing.assert_allclose(whole, angles * per_angle, rtol=1e-6)


def test_what_a_robot_executes_is_what_it_decides(setting):
    """A flicker between two decisions is never executed, one at a decision is.

    Held commands cover every frame up to the end.
    """
    demo, config = setting.demos[1], setting.policy().config
    frames, _ = decision_frames(demo, config)
    commands = (demo.actions[:, 6] > 0).astype(int)
    decided, held = executed(commands, demo, config)
    np.testing.assert_array_equal(decided, commands[frames])
    flicker = commands.copy()
    flicker[frames[1] + 1] ^= 1
    np.testing.assert_array_equal(executed(flicker, demo, config)[0], decided)
    flicker[frames[1]] ^= 1
    np.testing.assert_array_equal(
        np.flatnonzero(executed(flicker, demo, config)[0] != decided), [1]
    )
    assert len(held) == len(demo)
    assert held[frames[2]] == decided[2]
    assert held[frames[3] - 1] == decided[2]


@pytest.fixture
def done(tmp_path, synthetic_episodes):
    """(flags of the comparison, folder of its trainings), all finished."""
    args = build_parser().parse_args(
        ["--dataset", str(synthetic_episodes), "--seeds", "2", "--runs", str(tmp_path / "runs")]
    )
    for name in CELLS:
        for seed in range(2):
            folder = tmp_path / "runs" / f"{name}_{seed}"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(
                json.dumps({"argv": train_flags(args, name, seed, ["--lr", "0.002"])})
            )
            (folder / "loss.png").touch()
    return args, tmp_path / "runs"


def test_finished_trainings_are_left_alone(done, monkeypatch):
    """The same command again trains nothing. Only a training that was stopped is resumed."""
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
    """Results of one --lr never pass for those of another: the folder and both commands are
    named."""
    args, _ = done
    with pytest.raises(UserError, match="v7_0: was trained with .*--lr 0.002.*give another --runs"):
        train_cells(args, [])
