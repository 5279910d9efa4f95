"""DinoVolumeKV and DinoVolumeKVFull beyond the contract: the factored volume, both
configurations, finetuning and deployment.
"""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from conftest import SIZE

import deploy_dino_kv
from formats.dataset import open_dataset
from harness import checkpoint, finetune
from model_dino_volume_kv import (
    DinoVolumeKV,
    DinoVolumeKVConfig,
    IndexEncoding,
    sinusoid,
    symmetric_soft_argmax,
)
from model_dino_volume_kv_full import (
    DinoVolumeKVFull,
    DinoVolumeKVFullConfig,
    pack_basis,
    unpack_basis,
)
from registry import REGISTRY, look_up
from rot_utils import euler_to_matrix, load_stats, rotation_angle
from runtime import UserError, write_json

SMALL = {
    "backbone": "efficientnet_lite0",
    "image_size": SIZE,
    "n_window": 4,
    "grid": 16,
    "n_height_bins": 8,
    "width": 16,
    "dim": 32,
    "waypoint_stride": 2,
}
V7 = {"tf_layers": 2, "token_enc": "learned", "rotation": "euler", "n_rot_bins": 32, "n_heads": 2}
NEW = {"tf_layers": 5, "token_enc": "sin", "rotation": "pca", "n_rot_bins": 48, "n_heads": 2}


class Setting:
    """Datasets and policies on the synthetic episodes."""

    def __init__(self, path, backbone, cache):
        self.path, self.backbone, self.cache = path, backbone, cache

    def dataset(self, config):
        read = look_up("dino_volume_kv_full").dataset
        return read(
            open_dataset(self.path, SIZE).demos,
            config,
            self.backbone,
            cache=self.cache,
            progress=False,
        )

    def policy(self, seed=0, parent=False, **changes):
        torch.manual_seed(seed)
        config = (DinoVolumeKVConfig if parent else DinoVolumeKVFullConfig)(**{**SMALL, **changes})
        policy = (DinoVolumeKV if parent else DinoVolumeKVFull)(
            config, self.backbone.channels
        ).attach(self.backbone)
        policy.fit_statistics(self.dataset(config).statistics())
        return policy

    def batch(self, policy, n=6):
        dataset = self.dataset(policy.config)
        return dataset.batch(np.linspace(0, len(dataset) - 1, n).astype(int))


@pytest.fixture(scope="module")
def setting(synthetic_episodes, backbone, tmp_path_factory):
    return Setting(synthetic_episodes, backbone, tmp_path_factory.mktemp("cache"))


def train_steps(policy, batch, steps, lr=3e-3, hold=0):
    optimizer = torch.optim.AdamW(policy.param_groups(0.01), lr=lr)
    losses = []
    for step in range(steps):
        out = policy.train()(batch)
        optimizer.zero_grad(set_to_none=True)
        out["loss"].backward()
        if step < hold:
            finetune.hold_volume(policy)
        optimizer.step()
        losses.append(out["loss"].item())
    return losses


# -- the volume


def test_every_logit_is_query_times_key(setting):
    """logits[t,z,y,x] = query(t,z) .

    key(y,x) / sqrt(dim). The fast convolution computes this formula, with the axes in this order.
    """
    policy = setting.policy(parent=True)
    features = torch.randn(2, SMALL["width"], 16, 16)
    with torch.no_grad():
        logits, queries, keys = (
            policy.volume_logits(features),
            policy.queries(),
            policy.key(features),
        )
    assert logits.shape == (2, 4, 8, 16, 16)
    for b, t, z, y, x in ((0, 0, 0, 0, 0), (1, 3, 7, 15, 2), (0, 2, 5, 1, 9)):
        expected = queries[t, z] @ keys[b, :, y, x] / SMALL["dim"] ** 0.5
        assert logits[b, t, z, y, x].item() == pytest.approx(expected.item(), abs=1e-4)


def test_the_default_volume_is_as_specified():
    """The volume is eight waypoints of 32 x 56 x 56 bins.

    Flags choose between v7 and the new head; the default is five layers and one linear layer over
    48 bins.
    """
    config = DinoVolumeKVFullConfig()
    policy = DinoVolumeKVFull(config, [4])
    assert (config.n_window, *policy.volume_shape) == (8, 32, 56, 56)
    assert config.dim == 128
    assert config.n_heads == 4
    assert len(policy.token_blocks) == 5 and isinstance(policy.rotation_head, torch.nn.Linear)
    assert policy.rotation_head.out_features == 48
    assert policy.token_blocks[0].mlp[0].out_features == 4 * 128
    v7 = DinoVolumeKVFull(
        DinoVolumeKVFullConfig(tf_layers=2, token_enc="learned", rotation="euler", n_rot_bins=32),
        [4],
    )
    assert len(v7.token_blocks) == 2
    assert v7.rotation_head.out_features == 3 * 32
    assert v7.token_height.table.shape == (32, 128)


def test_sinusoids_tell_indices_apart():
    """Every height bin and waypoint has its own code, and near ones are more alike."""
    codes = sinusoid(torch.arange(56), 32)
    distance = torch.cdist(codes, codes)
    assert codes.shape == (56, 32) and (distance + 9 * torch.eye(56)).min() > 0.05
    assert (distance[0, :4].diff() > 0).all()
    assert IndexEncoding("learned", 8, 32)(torch.tensor([[0, 7]])).shape == (1, 2, 32)


@pytest.mark.parametrize("kind", ["sin", "learned"])
def test_the_flag_chooses_the_query_encoding(setting, kind):
    """height_enc and time_enc each choose an encoding, and queries tell heights from times."""
    policy = setting.policy(parent=True, height_enc=kind, time_enc="sin")
    assert hasattr(policy.height_code, "table") == (kind == "learned")
    assert not hasattr(policy.time_code, "table")
    queries = policy.queries()
    assert queries.shape == (4, 8, 32) and (queries[1, 2] - queries[2, 1]).abs().max() > 1e-3


# -- the tokens


@pytest.mark.parametrize(
    "flags", [V7, NEW, {**NEW, "yx_embedding": True}], ids=["v7", "new", "new with yx"]
)
def test_both_volume_heads_learn_with_every_parameter(setting, flags):
    """v7, the new head and its ablation each fit one batch.

    Every parameter gets a gradient, and rotations decode.
    """
    policy = setting.policy(**flags)
    batch = setting.batch(policy)
    policy.train()(batch)["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters())
    losses = train_steps(policy, batch, 60)
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    with torch.no_grad():
        out, parts = policy.eval().predict(batch), policy.eval()(batch)
    errors = rotation_angle(out["rotation"].numpy(), batch["target_rot"].numpy())
    assert np.degrees(np.median(errors)) < 15
    assert (
        parts["top1_joint"]
        <= min(parts[f"top1_{k}"] for k in ("pixel", "height", "gripper", "rotation"))
        <= 1
    )


@pytest.mark.parametrize("flags", [V7, NEW], ids=["v7", "new"])
def test_rotation_targets_peak_at_the_bin(setting, flags):
    """Soft rotation labels peak at the true bin and give its neighbours a share; sigma 0 is
    one-hot. The loss is zero for the label itself, and its gradient is that of the
    cross-entropy.
    """
    policy, hard = (setting.policy(**flags, rotation_sigma=sigma) for sigma in (1.5, 0.0))
    rotation = setting.batch(policy)["target_rot"].flatten(0, 1)
    soft, bins = policy.rotation_targets(rotation), policy.rotation_bins(rotation)
    assert torch.equal(soft.argmax(-1), bins) and (soft > 0.05).sum(-1).min() > 1
    assert torch.equal(
        hard.rotation_targets(rotation), torch.nn.functional.one_hot(bins, soft.shape[-1]).float()
    )
    torch.testing.assert_close(
        policy.rotation_loss(soft.clamp_min(1e-30).log(), rotation),
        torch.zeros(len(rotation)),
        rtol=0,
        atol=1e-5,
    )
    logits = torch.randn(soft.shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(policy.rotation_loss(logits, rotation).sum(), logits)
    (expected,) = torch.autograd.grad(
        -(soft * logits.log_softmax(-1)).sum(-1).mean(-1).sum(), logits
    )
    torch.testing.assert_close(gradient, expected)


def test_tokens_read_the_keypoint_they_are_told(setting):
    """Teacher forcing: a waypoint's rotation logits change with the cell and the height of its
    keypoint, in use as in training.
    """
    policy = setting.policy(**NEW).eval()
    features, kp = (
        torch.randn(1, 16, 16, 16),
        torch.tensor([[[1, 2, 3], [4, 5, 6], [7, 8, 9], [2, 10, 11]]]),
    )
    at = lambda k: policy.predict_from_keypoints(features, k)[1][0, 1].detach()
    moved, raised = kp.clone(), kp.clone()
    moved[0, 1, 2] += 1
    raised[0, 1, 0] += 1
    assert (at(moved) - at(kp)).abs().max() > 1e-4 and (at(raised) - at(kp)).abs().max() > 1e-4


def test_cells_matter_only_with_the_flag(setting):
    """Without y and x embeddings the same feature at another cell gives the same answer.

    With them it does not.
    """
    for flag in (False, True):
        policy = setting.policy(**NEW, yx_embedding=flag).eval()
        features, kp = torch.ones(1, 16, 16, 16), torch.tensor([[[1, 2, 3]] * 4])
        a, b = (
            policy.predict_from_keypoints(features, k)[1].detach()
            for k in (kp, kp + torch.tensor([0, 5, 7]))
        )
        assert ((a - b).abs().max() > 1e-4) == flag


def test_masked_tokens_are_seen_by_nobody(setting):
    """A masked waypoint, beyond a push, does not reach the gripper and rotation of others
    through the attention.
    """
    policy = setting.policy(**NEW).eval()
    features, kp = torch.randn(1, 16, 16, 16), torch.randint(0, 8, (1, 4, 3))
    other = kp.clone()
    other[0, 3] = torch.tensor([0, 15, 15])
    valid = torch.tensor([[True, True, True, False]])
    a, b = (policy.predict_from_keypoints(features, k, valid) for k in (kp, other))
    for x, y in zip(a, b):
        torch.testing.assert_close(x[:, :3], y[:, :3])
    free = policy.predict_from_keypoints(features, other)[0][:, :3]
    assert (free - a[0][:, :3]).abs().max() > 1e-5  # unmasked it does


def test_the_basis_travels_as_a_buffer(setting):
    """A basis of either space survives packing, and the policy's bins are those of rot_utils."""
    policy = setting.policy(**NEW)
    basis = setting.dataset(policy.config).basis
    for key in ("mean", "axis", "ev_ratio"):
        np.testing.assert_array_equal(getattr(policy.basis, key), getattr(basis, key))
    euler = dataclasses.replace(basis, space="euler", mean=np.array([3.0, 0.1, -2]))
    np.testing.assert_array_equal(unpack_basis(pack_basis(euler)).mean, euler.mean)
    target = setting.batch(policy)["target_rot"]
    np.testing.assert_array_equal(
        policy.rotation_bins(target)[..., 0].numpy(), basis.encode(target.numpy(), 48)
    )
    logits = torch.nn.functional.one_hot(policy.rotation_bins(target), 48).float()
    assert (
        np.degrees(rotation_angle(policy.decode_rotation(logits).numpy(), target.numpy()).max()) < 8
    )


def test_a_policy_for_one_axis_needs_a_basis(setting, synthetic_episodes, tmp_path):
    """Without a basis the one-axis configuration stops at once and says how to compute it.

    v7 needs none.
    """
    config = DinoVolumeKVFullConfig(**{**SMALL, **NEW, "basis": str(tmp_path / "absent.npz")})
    with pytest.raises(UserError, match="precompute_rotation_pca.py"):
        setting.dataset(config)
    assert setting.dataset(dataclasses.replace(config, rotation="euler")).basis is None


# -- finetuning


@pytest.fixture
def v7_file(setting, tmp_path):
    policy = setting.policy(**V7)
    train_steps(policy, setting.batch(policy), 3)
    checkpoint.save_policy(tmp_path / "v7.safetensors", policy, "dino_volume_kv_full", {})
    return tmp_path / "v7.safetensors", policy


def test_the_volume_head_loads_unchanged(setting, v7_file, capsys):
    """v7 into the new head: every volume tensor, the height range and the volume logits equal
    the checkpoint's to the bit. What does not fit is named. What describes rotations comes from
    the new data.
    """
    path, old = v7_file
    policy = setting.policy(1, **NEW)
    own_basis = policy.rotation_basis.clone()
    report = finetune.init_from(policy, path)
    volume = {id(p) for p in policy.volume_parameters()}
    names = [n for n, p in policy.named_parameters() if id(p) in volume]
    assert {"query.0.weight", "key.weight", "trunk.0.weight", "height_code.linear.weight"} <= set(
        names
    )
    for name in [*names, "height_range", "feature_mean_0"]:
        assert torch.equal(policy.state_dict()[name], old.state_dict()[name]), name
    assert torch.equal(policy.rotation_basis, own_basis)
    assert {"rotation_head.weight", "token_height.table"} <= set(report["dropped"])
    assert {
        "rotation_head.weight",
        "token_height.linear.weight",
        "token_blocks.4.out.weight",
    } <= set(report["fresh"])
    assert not set(names) & set(report["fresh"])
    printed = capsys.readouterr().out
    assert "rotation_head.weight (96, 32)" in printed and "rotation_head.weight (48, 32)" in printed
    batch = setting.batch(policy)
    with torch.no_grad():
        logits = [p.eval().volume_logits(p.trunk_features(batch)) for p in (old, policy)]
    assert torch.equal(*logits)


def test_what_cannot_be_frozen_is_not_said_to_be():
    """PARA, A, B, C and ACT hold nothing: none are recorded, and asking for some is refused."""
    holding = {name for name in REGISTRY if look_up(name).policy.holds_volume}
    assert holding == {"dino_volume_kv", "dino_volume_kv_full"}
    for name in REGISTRY:
        policy_class = look_up(name).policy
        assert finetune.freeze_steps(None, policy_class) == (500 if name in holding else 0)
        assert finetune.freeze_steps(0, policy_class) == 0
        if name in holding:
            assert finetune.freeze_steps(7, policy_class) == 7
            continue
        with pytest.raises(UserError, match="--freeze_steps 7: .* has no volume head that could"):
            finetune.freeze_steps(7, policy_class)


@pytest.mark.parametrize("flags", [{"n_heads": 5}, {"dim": 33}])
def test_sizes_that_do_not_fit_are_refused(flags):
    """By name, and not by the first step of a training."""
    entry = look_up("dino_volume_kv_full")
    config = entry.config(**{"dim": 32, "n_heads": 3, **flags})
    with pytest.raises(UserError, match="--dim"):
        entry.policy(config, [8])


def test_the_freeze_really_freezes(setting, v7_file):
    """During the freeze the volume stays equal to the bit, weight decay included, and the heads
    learn. Afterwards the volume moves again.
    """
    policy = setting.policy(1, **NEW)
    finetune.init_from(policy, v7_file[0])
    batch = setting.batch(policy)
    names = {id(p): n for n, p in policy.named_parameters()}
    volume = [names[id(p)] for p in policy.volume_parameters()]
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    train_steps(policy, batch, 3, hold=3)
    after = policy.state_dict()
    assert volume and all(torch.equal(after[n], before[n]) for n in volume)
    assert not torch.equal(after["rotation_head.weight"], before["rotation_head.weight"])
    train_steps(policy, batch, 1, hold=0)
    assert all(
        not torch.equal(policy.state_dict()[n], before[n]) for n in volume if "embedding" not in n
    )


def test_what_is_new_in_the_volume_learns_in_the_freeze(setting, v7_file, tmp_path):
    """Held still, random layers in front of what was loaded would stay random. A run that is
    resumed within the freeze knows them too.
    """
    path, old = v7_file
    wide = {**NEW, "dilations": f"{old.config.dilations},8"}
    for resumed in (False, True):
        policy = setting.policy(1, **wide)
        begun = finetune.begin(policy, path, tmp_path, resumed)
        write_json(tmp_path / "config.json", begun)
        held = {id(p) for p in policy.volume_parameters()}
        names = {n for n, p in policy.named_parameters() if id(p) in held}
        new = {n for n in names if n.startswith("trunk.6")}
        assert new and new <= set(begun["initialised"]) and len(names - policy.fresh) > 5
        before = {k: v.clone() for k, v in policy.state_dict().items()}
        train_steps(policy, setting.batch(policy), 2, hold=2)
        moved = {n for n in names if not torch.equal(policy.state_dict()[n], before[n])}
        assert new <= moved <= policy.fresh


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"grid": 8}, "--grid 16"),
        ({"n_height_bins": 4}, "--n_height_bins 8"),
        ({"dilations": "1,1,1"}, "give --dilations 1"),
    ],
)
def test_another_volume_is_refused(setting, v7_file, changes, word):
    """Sinusoidal queries have shapes that fit any grid.

    A volume of another grid is refused all the same.
    """
    with pytest.raises(UserError, match=word):
        finetune.init_from(setting.policy(**{**NEW, **changes}), v7_file[0])


def test_unrelated_and_damaged_checkpoints_are_refused(setting, v7_file, tmp_path):
    """A training state, other features and a half-copied file each give one sentence."""
    policy = setting.policy(**NEW)
    checkpoint.save_tensors(
        tmp_path / "state.safetensors", {"model.x": torch.zeros(1)}, {"step": 3}
    )
    tensors, info = checkpoint.load_tensors(v7_file[0])
    checkpoint.save_tensors(
        tmp_path / "other.safetensors", tensors, {**info, "backbone_identity": "other"}
    )
    checkpoint.save_tensors(tmp_path / "none.safetensors", {"model.x": torch.zeros(1)}, info)
    for name, word in (
        ("state", "holds no policy"),
        ("other", "--backbone"),
        ("none", "related"),
        ("absent", "no such checkpoint"),
    ):
        with pytest.raises(UserError, match=word):
            finetune.init_from(policy, tmp_path / f"{name}.safetensors")


def test_a_creeping_volume_loss_is_reported():
    """The held-out volume loss after the freeze is compared with that at its end.

    A rise is reported as a creep, a fall is not, and too early there is no report.
    """
    row = lambda step, value: {"step": step, "val/volume_ce": value}
    assert finetune.volume_creep([row(100, 5.0), {"step": 500, "train/loss": 1.0}], 500) is None
    sentence, creeps = finetune.volume_creep([row(500, 5.0), row(600, 4.5), row(700, 5.3)], 500)
    assert creeps and "5.000" in sentence and "0.300" in sentence
    assert finetune.volume_creep([row(500, 5.0), row(600, 5.3), row(700, 4.9)], 500)[1] is False


# -- deployment


@pytest.fixture(scope="module")
def deployed(setting, tmp_path_factory):
    path = tmp_path_factory.mktemp("ckpt") / "checkpoint.safetensors"
    policy = setting.policy(**NEW)
    checkpoint.save_policy(path, policy, "dino_volume_kv_full", {})
    return path, policy.eval()


def deploy(*flags):
    return deploy_dino_kv.deploy(deploy_dino_kv.build_parser().parse_args([str(f) for f in flags]))


def test_words_for_a_policy_that_is_told_nothing_are_refused(deployed):
    with pytest.raises(UserError, match="--instruction: .*checkpoint.safetensors is told nothing"):
        deploy("--ckpt", deployed[0], "--source", "x", "--instruction", "pick it up")


def test_stats_are_read_with_numpy_alone(deployed):
    """<ckpt>_stats.json holds bins, ranges and basis.

    From it rot_utils decodes rotation bins as the policy does.
    """
    path, policy = deployed
    stats = load_stats(checkpoint.stats_path(path))
    assert stats["n_window"] == 4
    assert stats["height_range"] == policy.height_range.tolist()
    assert stats["rotation"]["n_bins"] == 48
    logits = torch.randn(3, 1, 48)
    ours = stats["rotation"]["basis"].decode(policy.decoded_bins(logits)[:, 0].numpy(), 48)
    np.testing.assert_allclose(ours, policy.decode_rotation(logits).numpy(), atol=1e-12)
    policy.config.rotation_decode = "argmax"
    ours = stats["rotation"]["basis"].decode(logits.argmax(-1)[:, 0].numpy(), 48)
    np.testing.assert_allclose(ours, policy.decode_rotation(logits).numpy(), atol=1e-12)
    policy.config.rotation_decode = "soft"


@pytest.mark.parametrize("true", [0.0, 0.4, 3.3, 20.0, 46.7, 47.0])
def test_rotations_are_decoded_between_bins(true):
    """The centre of a Gaussian comes back.

    In the middle it is closer than the bin's centre, which may be half a bin off; near an end it is
    never farther.
    """
    logits = -0.5 * ((torch.arange(48) - true) / 2.0) ** 2
    assert abs(symmetric_soft_argmax(logits, 4).item() - true) < 0.45
    assert abs(symmetric_soft_argmax(logits, 0).item() - true) <= 0.5
    if 5 < true < 42:
        assert abs(symmetric_soft_argmax(logits, 4).item() - true) < 0.15


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        '{"rotation": {"kind": "pca"',
        '{"rotation": {"kind": "pca", "basis": {"space": "so3"}}}',
        None,
    ],
)
def test_damaged_stats_are_refused(content, tmp_path):
    """Half a file, another file and a missing file each give one sentence."""
    path = tmp_path / "checkpoint_stats.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="checkpoint_stats.json"):
        load_stats(path)


def test_heights_from_a_support_need_to_be_told(setting, synthetic_episodes, tmp_path, capsys):
    """On the robot nothing but a flag says what the objects stand on: without it nothing is
    answered, at zero the answers are those of a policy of the world's heights. The statistics say
    which of the two it is.
    """
    episode, said, policy = synthetic_episodes / "episode_00001", [], setting.policy(**NEW)
    for heights in ("world", "support"):
        path = tmp_path / heights / "checkpoint.safetensors"
        path.parent.mkdir()
        policy.config.heights = heights
        checkpoint.save_policy(path, policy, "dino_volume_kv_full", {})
        assert load_stats(checkpoint.stats_path(path)).get("heights", "world") == heights
        torch.manual_seed(0)
        deploy("--ckpt", path, "--source", episode, "--limit", 2, "--support", 0)
        said.append([json.loads(line)["xyz"] for line in capsys.readouterr().out.splitlines()])
    assert len(said[0]) == 2 and said[0] == said[1]
    with pytest.raises(UserError, match="what the objects stand on; give --support METRES"):
        deploy("--ckpt", path, "--source", episode)


def test_an_episode_becomes_json_lines(deployed, synthetic_episodes, capsys):
    """From a folder comes one line a frame: the policy's trajectory, rotations as Euler angles,
    commands. Latency goes to standard error.
    """
    path, policy = deployed
    deploy("--ckpt", path, "--source", synthetic_episodes / "episode_00001", "--limit", 3)
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [r["frame"] for r in rows] == [0, 1, 2]
    assert captured.err.count("ms (features") == 3
    assert "median" in captured.err
    assert np.shape(rows[0]["xyz"]) == np.shape(rows[0]["euler"]) == (4, 3)
    assert set(rows[0]["gripper"]) <= {-1, 1}
    demo = open_dataset(synthetic_episodes, SIZE)["episode_00001"]
    image = demo.images([1])
    with torch.inference_mode():
        maps = policy.backbone(torch.from_numpy(image))
        tensor = lambda x: torch.as_tensor(np.asarray(x))[None]
        out = policy.predict(
            {
                "features": maps,
                "eef_pos": tensor(demo.ee_pos[1]),
                "gripper_width": tensor(np.abs(demo.gripper_states[1]).sum()),
                "K": tensor(demo.K),
                "E": tensor(demo.E),
            }
        )
    np.testing.assert_allclose(rows[1]["xyz"], out["position"][0], atol=1e-5)
    assert (
        rotation_angle(
            euler_to_matrix(np.array(rows[1]["euler"])), out["rotation"][0].numpy()
        ).max()
        < 1e-4
    )


def test_standard_input_gives_the_same_answers(deployed, synthetic_episodes, capsys, monkeypatch):
    """Live input gives the answers of recorded input.

    The camera is given once, images by path or by their bytes.
    """
    import base64

    path, _ = deployed
    folder = synthetic_episodes / "episode_00001"
    deploy("--ckpt", path, "--source", folder, "--limit", 2)
    recorded = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with np.load(folder / "episode.npz") as f:
        position, closed = f["eef_pos_t"], f["gripper_t"]
    images = sorted((folder / "frames").iterdir())
    rows = [
        {"eef_pos": position[i].tolist(), "gripper_width": 0.0 if closed[i] > 0.5 else 0.08}
        for i in range(2)
    ]
    rows[0]["image"] = str(images[0])
    rows[1]["image_base64"] = base64.b64encode(images[1].read_bytes()).decode()
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(json.dumps, rows)) + "\n\n"))
    deploy("--ckpt", path, "--source", "-", "--state", folder / "episode.npz")
    live = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for a, b in zip(live, recorded, strict=True):
        assert a["xyz"] == b["xyz"] and a["euler"] == b["euler"] and a["gripper"] == b["gripper"]


@pytest.mark.parametrize(
    "line, word",
    [
        ("{", "line 1"),
        ('{"image": "absent.png", "eef_pos": [0, 0, 1], "gripper_width": 0}', "absent.png"),
        ('{"eef_pos": [0, 0, 1]}', "image"),
        ('{"image": "IMAGE", "eef_pos": [0, 1], "gripper_width": 0}', "line 1"),
        ('{"image": "IMAGE", "eef_pos": [0, 0, NaN], "gripper_width": 0}', "NaN"),
        ('{"image": "IMAGE", "eef_pos": [0, 0, 1], "gripper_width": 0}', "--state"),
    ],
)
def test_a_bad_line_stops_with_its_number(
    deployed, synthetic_episodes, line, word, capsys, monkeypatch
):
    """A bad line is named with its number and gets no answer: a robot must not move on a
    half-read line.
    """
    folder = synthetic_episodes / "episode_00000"
    image = next((folder / "frames").iterdir())
    monkeypatch.setattr("sys.stdin", io.StringIO(line.replace("IMAGE", str(image)) + "\n"))
    state = ("--state", folder / "episode.npz") if word == "NaN" else ()
    with pytest.raises(UserError, match=word):
        deploy("--ckpt", deployed[0], "--source", "-", *state)
    assert capsys.readouterr().out == ""


def test_foreign_stats_and_other_policies_are_refused(deployed, setting, tmp_path):
    """Statistics of another run would turn the gripper by another axis; another kind of policy has
    none."""
    path, _ = deployed
    stats = json.loads(checkpoint.stats_path(path).read_text())
    stats["rotation"]["basis"]["low"] -= 0.1
    (tmp_path / "foreign.json").write_text(json.dumps(stats))
    with pytest.raises(UserError, match="another checkpoint"):
        deploy("--ckpt", path, "--stats", tmp_path / "foreign.json", "--source", "-")
