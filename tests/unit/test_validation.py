"""Checks on held-out demonstrations: whether a policy looks, and open-loop rollouts.

The policies have known answers.
"""

from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import CLOSES, OPENS, SIZE, write_synthetic_demos

from data import WaypointDataset
from data_ar import WindowDataset
from figures.heldout import overlays
from formats.dataset import open_dataset
from formats.demos import GRIPPER_STEPS
from harness.validation import (
    SHIFT_PX,
    decision_frames,
    free_run,
    looks,
    newest,
    newest_loss,
    predict_newest,
    rollout_summary,
    to_pixels,
    validate,
)
from model import ParaConfig, TrajectoryHeatmapPredictor
from model_autoregressive import AutoregressiveConfig, AutoregressivePolicy
from model_voxel_ar import VoxelConfig, VoxelPolicy
from policy import Policy

COMMON = {"backbone": "efficientnet_lite0", "image_size": SIZE, "waypoint_stride": 5}


@pytest.fixture(scope="module", params=["single", "windows"])
def dataset(request, synthetic_demos, backbone, tmp_path_factory):
    """Synthetic demonstrations as single frames and as windows."""
    demos = open_dataset(synthetic_demos).demos
    kind, config = (
        (WaypointDataset, ParaConfig(**COMMON))
        if request.param == "single"
        else (WindowDataset, AutoregressiveConfig(**COMMON, context=3))
    )
    return kind(
        demos,
        config,
        backbone,
        cache=tmp_path_factory.mktemp("cache"),
        progress=False,
    )


class Known(Policy):
    """Answers the EEF's position plus an offset (never looks), or the place of the mean colour
    (only looks).
    """

    def __init__(self, dataset, blind):
        super().__init__(dataset.config)
        self.blind, self.anchor = blind, torch.nn.Parameter(torch.zeros(1))

    def predict(self, batch):
        eef = batch["eef_pos"] if batch["eef_pos"].ndim == 3 else batch["eef_pos"][:, None]
        if not self.blind:
            grain = batch["features"][0].double().mean((-1, -2, -3))  # a number of the image alone
            eef = (
                torch.zeros_like(eef)
                + torch.tensor([0.0, 0.0, 1.0])
                + 0.1 * grain.reshape(*eef.shape[:-1], 1)
            )
        return {
            "position": eef,
            "gripper": torch.zeros(eef.shape[:2], dtype=torch.long),
            "rotation": torch.eye(3, dtype=torch.float64).expand(*eef.shape[:2], 3, 3),
        }


def test_looks_tells_a_guesser_from_a_looker(dataset):
    """A policy that answers from its state moves by the whole shift and ignores blank images.

    One that looks does not move at all.
    """
    guess, look = (looks(Known(dataset, blind), dataset, "cpu") for blind in (True, False))
    assert guess["shift_px"] == pytest.approx(SHIFT_PX, rel=1e-6)
    assert guess["blank_ratio"] == pytest.approx(1)
    assert look["shift_px"] == 0 and look["blank_ratio"] != 1


class Unturning(Known):
    """Answers no rotations."""

    turns = False

    def predict(self, batch):
        return {k: v for k, v in super().predict(batch).items() if k != "rotation"}

    def loss(self, batch):
        return {"loss": self.anchor.sum()}


def test_a_policy_that_does_not_turn_is_validated_and_acts(dataset, backbone):
    """Without rotations their errors are absent and everything else stays.

    In use the gripper keeps its rotation.
    """
    policy = Unturning(dataset, True).attach(backbone)
    row = validate(policy, dataset, "cpu", limit=6)
    assert row["val/cm_median"] > 0 and not [k for k in row if "rotation" in k]
    demo = dataset.demos[0]
    observation = SimpleNamespace(
        image=demo.images([0])[0], eef_pos=demo.ee_pos[0], gripper_width=0.08, K=demo.K, E=demo.E
    )
    waypoint = policy.act(observation)
    assert waypoint.rotation is None and waypoint.rotations is None
    np.testing.assert_array_equal(waypoint.position, demo.ee_pos[0])


class Remembers(Known):
    """Answers where the EEF was in the oldest frame of the window that it gets."""

    def predict(self, batch):
        out = super().predict(batch)
        return {**out, "position": out["position"][:, :1].expand_as(out["position"])}


def test_looks_tells_whether_the_past_matters(dataset):
    """Without its past, a policy that answers from the oldest frame moves as far as the EEF came.

    One that uses only the newest frame does not move. A policy without a history has no such
    figure.
    """
    known, remembers = (looks(kind(dataset, True), dataset, "cpu") for kind in (Known, Remembers))
    if isinstance(dataset, WindowDataset):
        assert known["no_past_mm"] == 0 and remembers["no_past_mm"] > 20
    else:
        assert "no_past_mm" not in known


def test_newest_is_the_last_valid_frame(dataset):
    """Windows are scored on their newest frame, with the labels of a single-frame dataset."""
    batch = dataset.batch(np.arange(len(dataset)))
    single, out = newest(batch, {"position": batch["target_pos"]})
    assert single["target_pos"].shape[0] == len(dataset)
    assert torch.equal(out["position"], single["target_pos"])
    for i in (0, len(dataset) // 2, len(dataset) - 1):
        np.testing.assert_array_equal(
            single["eef_pos"][i], dataset.demos[dataset.demo[i]].ee_pos[dataset.frame[i]]
        )


def test_decision_frames_jump_over_gripper_holds(dataset):
    """Decisions of an open-loop rollout start at the first frame, never fall into a gripper's
    hold, and end at the release.
    """
    demo = dataset.demos[1]
    frames, targets = decision_frames(demo, dataset.config)
    assert frames[0] == 0 and targets[-1] == OPENS and CLOSES in targets
    assert not any(c < f < c + GRIPPER_STEPS for c in (CLOSES, OPENS) for f in frames)


def test_free_run_of_a_policy_that_stays_covers_nothing(dataset, synthetic_demos, backbone):
    """A policy that answers its own position never leaves the start once that is fed back.

    Jerk and coverage show it.
    """
    demo = dataset.demos[1]
    rollout = free_run(Known(dataset, True).attach(backbone), demo, dataset.config)
    np.testing.assert_allclose(
        rollout["predicted"], np.broadcast_to(demo.ee_pos[0], rollout["predicted"].shape)
    )
    assert rollout["jerk_mm"] == pytest.approx(0, abs=1e-9) and rollout["true_jerk_mm"] > 1
    assert rollout["jitter_mm"] == pytest.approx(rollout["true_jerk_mm"])  # of what it leaves out
    path = to_pixels(rollout["path"], demo.K, demo.E)
    near = np.linalg.norm(path - path[0], axis=1) <= 8
    assert rollout_summary([rollout])["coverage_8px"] == pytest.approx(near.mean())
    measured = free_run(Known(dataset, True).attach(backbone), demo, dataset.config, fed="measured")
    np.testing.assert_allclose(measured["predicted"], demo.ee_pos[measured["frames"]])


class Chunks(Known):
    """Answers four waypoints, each a centimetre above the last, and counts how often it is
    asked.
    """

    asked = 0

    def predict(self, batch):
        self.asked += 1
        eef = batch["eef_pos"].reshape(1, 1, 3) + 0.01 * torch.arange(1, 5)[
            None, :, None
        ] * torch.tensor([0.0, 0.0, 1.0])
        return {
            "position": eef,
            "gripper": torch.tensor([[0, 1, 0, 1]]),
            "rotation": torch.eye(3, dtype=torch.float64).expand(1, 4, 3, 3),
        }


def test_a_chunk_is_used_up_before_the_policy_looks_again(dataset, synthetic_demos, backbone):
    """The waypoints of a chunk come one after another, and the next chunk starts from the last one.

    A gripper change ends a chunk.
    """
    demo, policy = dataset.demos[1], Chunks(dataset, True).attach(backbone)
    rollout = free_run(policy, demo, dataset.config, fed="chunk")
    n = len(rollout["predicted"])
    np.testing.assert_allclose(
        rollout["predicted"][:, 2] - demo.ee_pos[0, 2], 0.01 * np.arange(1, n + 1), atol=1e-9
    )
    starts, since = [], 0
    for target in rollout["targets"]:
        starts.append(since == 0)
        since = 0 if target in (CLOSES, OPENS) or since == 3 else since + 1
    assert policy.asked == sum(starts) < n
    place = np.arange(n) - np.maximum.accumulate(np.where(starts, np.arange(n), 0))
    np.testing.assert_array_equal(rollout["gripper"], place % 2)


def test_free_run_reads_recordings_of_a_robot(dataset, synthetic_episodes, backbone):
    """The same rollout works on a smith300 folder, with frames from its image files."""
    demo = open_dataset(synthetic_episodes).demos[1]
    rollout = free_run(
        Known(dataset, True).attach(backbone),
        demo,
        dataset.config,
        fed="measured",
    )
    np.testing.assert_allclose(rollout["predicted"], demo.ee_pos[rollout["frames"]])
    assert len(rollout["frames"]) > 3 and 0 < rollout_summary([rollout])["coverage_8px"] <= 1


def test_points_outside_the_image_are_counted_apart(dataset, synthetic_demos, backbone):
    """Cells of the image cannot follow a path that leaves it.

    The summary also gives the coverage of the rest.
    """
    demo = dataset.demos[1]
    rollout = free_run(Known(dataset, True).attach(backbone), demo, dataset.config)
    assert rollout["in_view"].all()
    rollout["in_view"] = np.arange(len(rollout["path"])) >= 4
    rollout["aside"] = np.where(rollout["in_view"], 5.0, 40.0)
    row = rollout_summary([rollout])
    assert row["coverage_8px"] == pytest.approx(1 - 4 / row["n_points"])
    assert row["coverage_8px_in_view"] == 1.0
    assert row["coverage_4px_in_view"] == 0.0 and row["n_in_view"] == row["n_points"] - 4


@pytest.mark.parametrize("dataset", ["windows"], indirect=True)
@pytest.mark.parametrize("kind", ["A", "B"])
def test_the_newest_frames_alone_are_the_same(kind, dataset, backbone):
    """Deciding about the scored frames alone gives the decisions and the loss that all frames
    of a window give.
    """
    torch.manual_seed(0)
    size = dict(
        COMMON, context=3, grid=8, n_height_bins=4, dim=16, n_layers=2, n_heads=2, key_width=8
    )
    policy = (
        AutoregressivePolicy(AutoregressiveConfig(patch_grid=4, **size), backbone.channels)
        if kind == "A"
        else VoxelPolicy(VoxelConfig(**size), backbone.channels)
    ).eval()
    policy.fit_statistics(dataset.statistics())
    batch = dataset.batch([0, 5, len(dataset) - 1])
    with torch.no_grad():
        single, out = predict_newest(policy, batch)
        expected_single, expected = newest(batch, policy.predict(batch))
        assert out.keys() == expected.keys()
        assert torch.equal(single["target_pos"], expected_single["target_pos"])
        for key, value in expected.items():
            torch.testing.assert_close(out[key], value, rtol=1e-5, atol=1e-5)
        alone = [
            newest_loss(policy, dataset.batch([i]))["loss"].item() for i in (0, 5, len(dataset) - 1)
        ]
        assert newest_loss(policy, batch)["loss"].item() == pytest.approx(np.mean(alone), rel=1e-4)
    assert batch["mask"].sum() > 3  # the windows have more frames than are scored


def test_a_demonstration_without_a_usable_frame_has_no_picture(backbone, tmp_path):
    """The others have theirs: a training of hours would end in an error, again at each resume."""
    path = write_synthetic_demos(tmp_path / "d.hdf5", 3)
    with h5py.File(path, "r+") as file:
        file["data/demo_1/perturbed"][:] = True
    config = ParaConfig(**COMMON, grid=14, width=8)
    found = WaypointDataset(
        open_dataset(path).demos, config, backbone, cache=tmp_path / "c", progress=False
    )
    policy = TrajectoryHeatmapPredictor(config, backbone.channels).attach(backbone)
    policy.fit_statistics(found.statistics())
    overlays(policy, found, "cpu", tmp_path)
    assert [(tmp_path / f"overlay_{i}.png").exists() for i in range(3)] == [True, False, True]
