"""The voxel-token policies B and C: what a step may know, whose camera places its voxels, and
from where positions are measured.
"""

import copy

import numpy as np
import pytest
import torch
from conftest import agentview

import model_voxel_ar
from figures import plots
from model_voxel_ar import VoxelConfig, VoxelPolicy
from model_voxel_ar_rel import RelativeVoxelConfig, RelativeVoxelPolicy
from nets import layers_voxel as lv
from runtime import UserError

SMALL = {
    "image_size": 64,
    "grid": 12,
    "n_height_bins": 6,
    "n_rot_bins": 6,
    "dim": 24,
    "n_layers": 2,
    "n_heads": 2,
    "mlp_ratio": 2,
    "key_width": 8,
    "n_waves": 5,
    "context": 3,
}
CHANNELS, B, T = [6, 5], 2, 3
KINDS = {
    "B": (VoxelPolicy, VoxelConfig, {}),
    "C window": (RelativeVoxelPolicy, RelativeVoxelConfig, {}),
    "C xyz": (RelativeVoxelPolicy, RelativeVoxelConfig, {"anchor_axes": "xyz"}),
    "C last": (RelativeVoxelPolicy, RelativeVoxelConfig, {"anchor": "last"}),
    "C episode": (RelativeVoxelPolicy, RelativeVoxelConfig, {"anchor": "episode"}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, **changes):
    """A policy in eval mode whose weights are no longer the initial ones."""
    torch.manual_seed(0)
    policy, config, own = KINDS[kind]
    policy = policy(config(**{**SMALL, **own, **changes}), CHANNELS)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return policy.eval()


def windows(steps=T, seed=0):
    """A batch of windows with random images along random paths. Every frame has its own camera."""
    g = torch.Generator().manual_seed(seed)
    K, E = (torch.from_numpy(x).expand(B, steps, *x.shape).clone() for x in agentview(64))
    E[..., :3, 3] += 0.05 * torch.randn(B, steps, 3, generator=g, dtype=torch.float64)
    path = torch.tensor([0.0, 0.0, 1.05]) + 0.05 * torch.randn(
        B, steps, 3, generator=g, dtype=torch.float64
    )
    return {
        "features": [
            torch.randn(B, steps, n, s, s, generator=g).half() for n, s in zip(CHANNELS, (8, 4))
        ],
        "eef_pos": path,
        "first_eef": path[:, 0].clone(),
        "gripper_width": 0.08 * torch.rand(B, steps, generator=g),
        "K": K,
        "E": E,
        "target_pos": path + 0.03,
        "target_rot": torch.eye(3, dtype=torch.float64).expand(B, steps, 3, 3),
        "target_gripper": torch.randint(0, 2, (B, steps), generator=g),
        "mask": torch.ones(B, steps),
        "valid": torch.ones(B, steps, dtype=torch.bool),
    }


@torch.no_grad()
def logits(policy, batch):
    """(B,T,G,Z,H,W), the distribution from which everything is decoded."""
    rows = torch.arange(batch["mask"].numel())
    return policy.run(batch, batch["eef_pos"], rows)[0].unflatten(0, batch["mask"].shape)


def frames(batch, t):
    """Frame t as `decide` gets it, of the batch's first item."""
    return {
        k: [m[:1, t] for m in batch[k]] if k == "features" else batch[k][:1, t]
        for k in ("features", "eef_pos", "gripper_width", "K", "E")
    }


@every_kind
def test_a_step_knows_nothing_of_later_ones(kind):
    """Another image, camera, finger width or EEF at t + 1 leaves all answers up to t unchanged,
    and changes that at t + 1.
    """
    policy, batch = make(kind), windows()
    before = logits(policy, batch)
    for key in ("features", "E", "gripper_width", "eef_pos"):
        other = copy.deepcopy(batch)
        for x in other[key] if key == "features" else [other[key]]:
            x[:, 2] += 0.05 * (100 if key == "features" else 1)
        after = logits(policy, other)
        torch.testing.assert_close(after[:, :2], before[:, :2], rtol=0, atol=1e-5)
        assert (after[:, 2] - before[:, 2]).abs().max() > 1e-3, key


@every_kind
def test_a_step_reads_its_past_and_its_own_image(kind):
    """The earlier EEF changes the answer, as history is used.

    An earlier image or camera does not, as keys are the current voxels.
    """
    policy, batch = make(kind), windows()
    before = logits(policy, batch)
    for key, matters in (("eef_pos", True), ("features", False), ("E", False)):
        other = copy.deepcopy(batch)
        for x in other[key] if key == "features" else [other[key]]:
            x[:, 1] += 0.05 * (100 if key == "features" else 1)
        assert ((logits(policy, other)[:, 2] - before[:, 2]).abs().max() > 1e-4) == matters, key


@every_kind
@pytest.mark.parametrize("context", [3, 2])
def test_acting_equals_training(kind, context):
    """Decisions one by one, which keep only EEF tokens, equal the last frame of the same
    window, also beyond the context. So what was trained is what acts.
    """
    policy, batch = make(kind, context=context), windows(5)
    policy.reset()
    for t in range(5):
        out = policy.decide(frames(batch, t))
        span = slice(max(0, t - context + 1), t + 1)
        window = {
            k: [m[:1, span] for m in v]
            if k == "features"
            else v[:1]
            if k == "first_eef"
            else v[:1, span]
            for k, v in batch.items()
        }
        with torch.no_grad():
            last = torch.tensor([window["mask"].shape[1] - 1])
            expected = {k: v[None] for k, v in policy.decided(window, last, acting=True).items()}
        torch.testing.assert_close(
            out["position"][0], expected["position"][0, -1:], rtol=0, atol=1e-4
        )
        assert out["gripper"].item() == expected["gripper"][0, -1]
        assert out["rotation"].shape == (1, 1, 3, 3)


@pytest.mark.parametrize(
    "kind, axes", [("B", ""), ("C window", "xy"), ("C last", "xy"), ("C xyz", "xyz")]
)
def test_who_survives_a_moved_world(kind, axes):
    """Robot, camera and heights move together.

    C's distribution stays the same up to rounding along the axes that it measures from the EEF, and
    along no other. B's changes along all. This is their whole difference.
    """
    policy, batch = make(kind), windows()
    before, low_high = logits(policy, batch), policy.height_range.clone()
    for i, axis in enumerate("xyz"):
        offset = torch.zeros(3, dtype=torch.float64).index_fill(0, torch.tensor(i), 0.21)
        moved = copy.deepcopy(batch)
        for key in ("eef_pos", "first_eef"):
            moved[key] += offset
        moved["E"][..., :3, 3] += offset
        policy.height_range = low_high + offset[2]
        change = (logits(policy, moved) - before).abs().max()
        assert change < 1e-3 if axis in axes else change > 0.05, axis


def test_an_anchor_that_never_changes_is_no_anchor():
    """C with the episode's first EEF as its anchor, where all episodes start at one pose as in
    LIBERO, is B with turned weights. Both have the same distributions, so this anchor says
    nothing about relative coordinates.
    """
    relative, absolute, batch = make("C episode"), make("B"), windows()
    batch["first_eef"] = torch.tensor([[-0.2, 0.05, 1.17]], dtype=torch.float64).expand(B, 3)
    weights = copy.deepcopy(relative.state_dict())
    start = relative.anchors(batch["eef_pos"], batch["first_eef"])[0, 0]
    # Wg R(a): its rows by R(a) transposed
    turn = lambda weight, offset: lv.shift_encoding(weight, -offset, relative.waves)
    weights["positional.weight"] = turn(weights["positional.weight"], start)
    weights["height.weight"] = turn(weights["height.weight"], start[2:])
    absolute.load_state_dict(weights)
    torch.testing.assert_close(
        logits(absolute, batch), logits(relative, batch), rtol=1e-4, atol=1e-4
    )


def test_each_anchor_is_another_model():
    """--anchor window, last and episode give three different models once the path has left its
    start.
    """
    batch = windows()
    batch["first_eef"] = batch["first_eef"] + 0.1
    found = [logits(make(kind), batch)[:, 1:] for kind in ("C window", "C last", "C episode")]
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(found) for b in found[:i])


@every_kind
def test_training_noises_the_known_eef_alone(kind):
    """Training adds noise to the EEF wherever it enters, and never to the targets.

    In use there is none.
    """
    policy, batch = make(kind), windows()
    assert torch.equal(policy.noised(batch["eef_pos"]), batch["eef_pos"])
    policy.train()
    noise = policy.noised(batch["eef_pos"].expand(B, T, 3)) - batch["eef_pos"]
    assert noise.abs().max() > 1e-3
    assert noise.abs().max() < 0.2
    assert noise.diff(dim=1).abs().max() > 1e-3
    policy.config.eef_noise_own = 0.0  # common to a window: the moves inside it stay
    noise = policy.noised(batch["eef_pos"].expand(B, T, 3)) - batch["eef_pos"]
    assert noise.abs().max() > 1e-3 and noise.diff(dim=1).abs().max() < 1e-6
    policy.config.eef_noise_share = 0.0
    assert torch.equal(policy.noised(batch["eef_pos"]), batch["eef_pos"])


def test_feedback_chooses_the_eef_that_a_step_knows():
    """measured takes the given EEF; predicted its own waypoints after the first; hybrid:2
    changes from the one to the other after two decisions.
    """
    batch, used = windows(4), {}
    for feedback in ("measured", "predicted", "hybrid:2"):
        policy = make("B", feedback=feedback)
        policy.check()
        policy.reset()
        used[feedback], answers = [], []
        for t in range(4):
            answers.append(policy.decide(frames(batch, t))["position"][0])
            used[feedback].append(torch.equal(policy.past[-1][0], batch["eef_pos"][:1, t]))
            assert used[feedback][-1] or torch.equal(policy.past[-1][0], answers[t - 1])
    assert used == {
        "measured": [True] * 4,
        "predicted": [True] + [False] * 3,
        "hybrid:2": [True, True, False, False],
    }
    with pytest.raises(UserError, match="hybrid"):
        make("B", feedback="hybrid:0").check()


@every_kind
def test_the_fixed_camera_is_remembered_by_value(kind):
    """The table of a fixed camera is kept. Another camera or height range makes a new one."""
    policy, batch = make(kind), windows()
    still = {**batch, "E": batch["E"][:1, :1].expand(B, T, 4, 4)}
    one = logits(policy, still)
    kept = dict(policy._tables)
    assert len(kept) == 1
    assert torch.equal(logits(policy, still), one)
    assert all(policy._tables[k] is v for k, v in kept.items())
    other = logits(policy, batch)
    assert not torch.equal(other, one)
    policy.height_range += 0.05
    assert not torch.equal(logits(policy, batch), other)


def test_each_camera_s_table_is_made_once(monkeypatch):
    """Even if every batch holds other cameras of the dataset, each camera's table is made once.

    Beyond the limit the oldest one goes.
    """
    policy, batch, made = make("B"), windows(), []
    new_table = policy.new_table
    monkeypatch.setattr(policy, "new_table", lambda K, E: made.append(1) or new_table(K, E))
    at = lambda b: {**batch, "E": batch["E"][b : b + 1, :1].expand(B, T, 4, 4)}
    moved = at(0)["E"].clone()
    moved[..., 0, 3] += 0.01
    views = [at(0), {**batch, "E": moved}, {**batch, "E": torch.cat([at(0)["E"][:1], moved[1:]])}]
    first = [logits(policy, view) for view in views]
    assert len(made) == 2
    assert all(torch.equal(logits(policy, v), f) for v, f in zip(views, first))
    assert len(made) == 2
    monkeypatch.setattr(model_voxel_ar, "MAX_TABLES", 1)
    logits(policy, views[0])
    assert len(policy._tables) == 1 and len(made) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"gripper_head": "separate"},
        {"eef_mark": False},
        {"dilations": "1,2"},
        {"sample": True},
        {"target": "hard", "decode": "argmax"},
    ],
    ids=str,
)
def test_every_variant_learns_and_predicts(changes):
    """With every flag's other value all parameters train and predictions are finite."""
    policy, batch = make("C window", **changes).train(), windows()
    policy(batch)["loss"].backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0
        for p in policy.parameters()
    )
    assert policy.eval().predict(batch)["position"].isfinite().all()


def test_acting_never_answers_here():
    """In use no waypoint is the EEF's own position with the command already given: the robot
    would stay for ever.
    """
    policy, batch = make("B"), windows()
    with torch.no_grad():
        policy.prior.mul_(0)
        policy.pointer.linear.weight.mul_(0)
        policy.pointer.linear.bias.mul_(0)  # all voxels alike: the first would be taken
        zyx = torch.zeros(1, 3, dtype=torch.float64)
        frame = frames(batch, 0)
        frame["eef_pos"], frame["gripper_width"] = policy.points(zyx, frame), torch.tensor([0.08])
        policy.reset()
        out = policy.decide(frame)
    assert (
        out["position"][0, 0] - frame["eef_pos"][0]
    ).norm() > 0.5 * policy.config.min_travel or out["gripper"].item() == 1


@every_kind
def test_pictures_show_distributions(kind, tmp_path):
    """train.py draws distributions, over voxels and over the pixels that the query reads, and
    drawing them works.
    """
    policy, batch = make(kind), windows()
    with torch.no_grad():
        volume, heat = policy.distribution(batch), policy.attention(batch)
    assert volume.shape == (B, T, *policy.volume_shape)
    assert heat.shape == (B, T, SMALL["grid"], SMALL["grid"])
    for x, dims in ((volume, (2, 3, 4)), (heat, (2, 3))):
        torch.testing.assert_close(x.sum(dims), torch.ones(B, T), rtol=1e-4, atol=1e-4)
    plots.volume_projections(
        np.zeros((T, 64, 64, 3), np.uint8), volume[0].numpy(), range(T), tmp_path / "volume.png"
    )
    assert (tmp_path / "volume.png").stat().st_size > 5000


def test_trained_frames_are_drawn_anew():
    """With --trained_frames each step trains that many unmasked frames of each window, drawn anew.

    Validation covers all frames.
    """
    policy, mask = make("C window", trained_frames=2), torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0]])
    assert policy.trained_rows(mask).tolist() == [0, 1, 2, 3, 4]
    policy.train()
    draws = {tuple(policy.trained_rows(mask).tolist()) for _ in range(100)}
    assert draws == {(a, b, 4) for a in range(4) for b in range(a + 1, 4)}
    batch, steps = windows(), []
    run = policy.run
    policy.run = lambda batch, eef, rows: steps.append(len(rows)) or run(batch, eef, rows)
    assert torch.isfinite(policy.loss(batch)["loss"]) and steps == [2 * B]
    with pytest.raises(UserError, match="--trained_frames -1"):
        make("C window", trained_frames=-1)
