"""One contract for every policy in the registry, and for the checkpoints that carry them."""

import copy
import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from conftest import SIZE, observations_of
from safetensors.torch import load_file, save_file

from formats.dataset import open_dataset
from harness import checkpoint, records
from harness.sessions import PolicySessions
from registry import REGISTRY, look_up
from rot_utils import matrix_to_euler, wrap_angle
from runtime import UserError

SMALL = {
    "backbone": "efficientnet_lite0",
    "image_size": SIZE,
    "n_window": 3,
    "waypoint_stride": 5,
    "grid": 16,
    "n_height_bins": 8,
    "n_rot_bins": 8,
    "width": 16,
    "dim": 32,
    "n_layers": 2,
    "n_blocks": 1,
    "n_heads": 2,
    "context": 3,
    "patch_grid": 4,
    "key_width": 8,
}
TARGETS = ("target_pos", "target_rot", "target_gripper", "mask")


def small_config(entry, **changes):
    """The policy's config, with small values in those fields that it has."""
    names = {f.name for f in dataclasses.fields(entry.config)}
    return entry.config(**{k: v for k, v in {**SMALL, **changes}.items() if k in names})


class Case:
    """A policy of one type, fitted to the synthetic demos and not trained, with its dataset and
    observations."""

    def __init__(self, name, path, backbone, cache):
        self.name, self.path, self.backbone = name, path, backbone
        self.entry = look_up(name)
        self.config = small_config(self.entry)
        self.demos = open_dataset(path).demos
        self.dataset = self.entry.dataset(
            self.demos, self.config, backbone, cache=cache, progress=False
        )
        self.statistics = self.dataset.statistics()

    def policy(self, seed=0):
        torch.manual_seed(seed)
        policy = self.entry.policy(self.config, self.backbone.channels).attach(self.backbone)
        policy.fit_statistics(self.statistics)
        return policy

    def batch(self, n=8):
        return self.dataset.batch(np.linspace(0, len(self.dataset) - 1, n).astype(int))

    def observations(self, frames=(0, 5, 10)):
        return observations_of(self.demos[0], frames)


@pytest.fixture(scope="module", params=list(REGISTRY))
def case(request, synthetic_demos, backbone, tmp_path_factory):
    return Case(request.param, synthetic_demos, backbone, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def para(synthetic_demos, backbone, tmp_path_factory):
    return Case("para", synthetic_demos, backbone, tmp_path_factory.mktemp("cache"))


def answers(policy, observations):
    """A policy's Waypoints in one episode."""
    policy.eval().reset()
    torch.manual_seed(0)  # a policy that samples draws the same
    return [policy.act(o) for o in observations]


def same(a, b):
    """True if two nested values are equal to the last bit."""
    if dataclasses.is_dataclass(a):
        return same(vars(a), vars(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return np.array_equal(np.asarray(a), np.asarray(b))


def predict(policy, batch):
    torch.manual_seed(0)
    with torch.no_grad():
        return policy.eval().predict(batch)


def loss(policy, batch):
    torch.manual_seed(0)
    return policy.train()(batch)


# -- every policy


def test_loss_is_finite_and_differentiable(case):
    """The loss is one finite number with a gradient; the other numbers are reported without one."""
    out = loss(case.policy(), case.batch())
    assert out["loss"].shape == () and torch.isfinite(out["loss"]) and out["loss"].requires_grad
    assert not any(v.requires_grad for k, v in out.items() if k != "loss")


def test_every_parameter_learns(case):
    """Each trainable parameter gets a finite gradient that is not zero.

    A parameter without one breaks DDP, or never learns.
    """
    policy = case.policy()
    with torch.no_grad():
        for p in policy.parameters():
            # away from zero initialisations, behind which gradients vanish at first
            p.add_(0.02 * torch.randn_like(p))
    loss(policy, case.batch())["loss"].backward()
    for name, p in policy.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and torch.isfinite(p.grad).all(), name
            assert p.grad.abs().max() > 0, name


def test_every_parameter_is_optimised(case):
    """param_groups holds each trainable parameter once."""
    policy = case.policy()
    grouped = [id(p) for group in policy.param_groups(0.01) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in policy.parameters() if p.requires_grad)


def test_only_the_weights_of_layers_decay(case):
    """Weight decay applies to the matrices of linear layers, convolutions and attention.

    It would pull tokens, embeddings, positions, priors, norms and biases to zero, so it leaves them
    alone.
    """
    policy = case.policy()
    names = {id(p): name for name, p in policy.named_parameters()}
    decaying, plain = (
        {names[id(p)] for p in group["params"]} for group in policy.param_groups(0.01)
    )
    apart = {
        "token",
        "age",
        "place",
        "queries",
        "kinds",
        "prior",
        "coarse",
        "eef_embedding",
        "gripper_embedding",
        "step_embedding",
        "table",
    }
    for name, p in policy.named_parameters():
        kind = name.rpartition(".")[2]
        assert (name in plain) == (kind in apart or p.ndim < 2), name
        assert name in plain or kind in ("weight", "in_proj_weight"), name
    assert decaying and [g["weight_decay"] for g in policy.param_groups(0.01)] == [0.01, 0.0]


def test_rotation_labels_are_soft(case):
    """A rotation in the next bin costs less than one far away, in every policy.

    With one-hot labels of a few dozen episodes the bins between would get none. Labels sum to one,
    and the loss is zero at them.
    """
    policy, config = case.policy(), case.config
    rotation = case.batch()["target_rot"].flatten(0, -3)[:1]
    bins = policy.rotation_bins(rotation)
    targets = policy.rotation_targets(rotation)
    assert targets.shape == (*bins.shape, config.n_rot_bins)
    assert torch.equal(targets.argmax(-1), bins)
    torch.testing.assert_close(targets.sum(-1), torch.ones(bins.shape))
    assert policy.rotation_loss(targets.log(), rotation).item() == pytest.approx(0, abs=1e-5)
    toward = torch.where(bins < config.n_rot_bins // 2, 1, -1)
    sure = lambda b: 5 * torch.nn.functional.one_hot(b, config.n_rot_bins).float()
    near, far = (policy.rotation_loss(sure(bins + n * toward), rotation).item() for n in (1, 4))
    assert near < far


def test_rotation_bins_are_those_of_numpy(case):
    """The bins that a policy computes on its device equal those of NumPy, with which a robot
    decodes them.
    """
    policy, rotation = case.policy(), case.batch(20)["target_rot"].flatten(0, -3)
    if hasattr(policy, "rotation_basis"):
        expected = policy.basis.encode(rotation.numpy(), case.config.n_rot_bins)[..., None]
    else:
        low, high = policy.euler_range.numpy().T
        euler = wrap_angle(matrix_to_euler(rotation.numpy()), (low + high) / 2)
        expected = (
            np.floor((euler - low) / (high - low) * case.config.n_rot_bins)
            .astype(int)
            .clip(0, case.config.n_rot_bins - 1)
        )
    np.testing.assert_array_equal(policy.rotation_bins(rotation), expected)


def test_what_a_caller_must_know_is_what_batches_and_answers_show(case):
    """The policy's properties (history, number of waypoints, rotations) agree with its batches and
    answers. Callers rely on them when they feed, validate and follow it.
    """
    policy, batch = case.policy(), case.batch()
    windows = batch["eef_pos"].shape[1:-1]  # (T,) of windows, () of single frames
    assert policy.has_history == bool(windows) == ("valid" in batch) == case.config.has_history
    assert policy.n_frames == (windows[0] if windows else 1)
    (waypoint,) = answers(policy, case.observations(frames=(0,)))
    assert policy.n_waypoints == len(waypoint.trajectory) == len(waypoint.grippers)
    out = predict(policy, batch)
    assert policy.turns == ("rotation" in out) == (waypoint.rotation is not None)
    rows = torch.tensor([0, out["position"].shape[1] + 1])  # of the first sample and the second
    torch.manual_seed(0)
    with torch.no_grad():
        some = policy.eval().decided(batch, rows)
    for name, value in some.items():
        torch.testing.assert_close(value, out[name].flatten(0, 1)[rows], rtol=1e-4, atol=1e-4)


def test_the_batch_is_left_alone(case):
    """Neither loss nor predict changes the batch: the data loader or the next call may still hold
    it.
    """
    policy, batch = case.policy(), case.batch()
    before = copy.deepcopy(batch)
    loss(policy, batch)["loss"].backward()
    predict(policy, batch)
    assert same(batch, before)


def test_predictions_have_the_documented_shapes_and_units(case):
    """Predictions are positions in metres, commands in {0, 1} and proper rotations, from a batch
    without targets.
    """
    batch = {k: v for k, v in case.batch().items() if k not in TARGETS}
    out = predict(case.policy(), batch)
    B, T = case.batch()["mask"].shape
    shapes = {"position": (B, T, 3), "gripper": (B, T), "rotation": (B, T, 3, 3)}
    assert {key: tuple(out[key].shape) for key in shapes} == shapes
    assert torch.isfinite(out["position"]).all()
    assert set(out["gripper"].unique().tolist()) <= {0, 1}
    R = out["rotation"].double()
    torch.testing.assert_close(
        R @ R.mT, torch.eye(3, dtype=R.dtype).expand_as(R), atol=1e-5, rtol=0
    )
    assert (torch.linalg.det(R) > 0).all()


def test_targets_do_not_leak_into_predictions(case):
    """A prediction never reads the answer: other targets, masks and commands leave it equal to the
    bit.
    """
    policy, batch = case.policy(), case.batch()
    other = dict(batch)
    other["target_pos"] = batch["target_pos"].flip(0) + 0.05
    other["target_rot"] = batch["target_rot"].mT.contiguous()
    other["target_gripper"] = 1 - batch["target_gripper"]
    other["mask"] = torch.zeros_like(batch["mask"])
    out = predict(policy, batch)
    assert same(out, predict(policy, other))
    assert same(out, predict(policy, {k: v for k, v in batch.items() if k not in TARGETS}))


def test_masked_targets_do_not_train(case):
    """What lies behind a masked waypoint does not change the loss; an unmasked one does."""
    policy, batch = case.policy(), case.batch()
    batch["mask"] = torch.ones_like(batch["mask"])
    batch["mask"][:, -1] = 0
    other = copy.deepcopy(batch)
    other["target_pos"][:, -1] += 0.1
    other["target_gripper"][:, -1] = 1 - other["target_gripper"][:, -1]
    # their sum could stay the same by chance
    parts = lambda b: torch.stack([v.detach() for v in loss(policy, b).values()])
    before = parts(batch)
    torch.testing.assert_close(parts(other), before, rtol=1e-6, atol=0)
    other["target_pos"][:, 0] += 0.1
    assert (parts(other) - before).abs().max() > 1e-4


def test_a_wholly_masked_batch_is_finite(case):
    """A batch with nothing to learn gives a finite loss and gradient, no 0/0 that would ruin the
    weights."""
    policy, batch = case.policy(), case.batch()
    batch["mask"] = torch.zeros_like(batch["mask"])
    out = loss(policy, batch)["loss"]
    out.backward()
    assert torch.isfinite(out)
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters() if p.grad is not None)


def test_the_same_seed_gives_the_same_numbers(case):
    """Weights, loss, gradient and predictions are functions of the seed."""
    one, two, other = case.policy(0), case.policy(0), case.policy(1)
    batch = case.batch()
    for policy in (one, two):
        loss(policy, batch)["loss"].backward()
    assert (
        loss(one, batch)["loss"].item()
        == loss(two, batch)["loss"].item()
        != loss(other, batch)["loss"].item()
    )
    grads = [[p.grad for p in policy.parameters() if p.grad is not None] for policy in (one, two)]
    assert same(*grads) and same(predict(one, batch), predict(two, batch))


def test_loss_falls_on_a_fixed_batch(case):
    """Sixty steps on one batch bring the loss down well: labels, loss and gradient belong
    together."""
    policy, batch = case.policy(), case.batch()
    optimizer = torch.optim.AdamW(policy.param_groups(0.01), lr=3e-3)
    losses = []
    for _ in range(60):
        out = loss(policy, batch)["loss"]
        optimizer.zero_grad()
        out.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses.append(out.item())
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_act_answers_in_the_world(case):
    """act gives a Waypoint: the trajectory's first point, a proper rotation, a command of -1 or +1;
    and its time."""
    policy = case.policy()
    for waypoint in answers(policy, case.observations()):
        assert waypoint.position.shape == (3,) and np.isfinite(waypoint.trajectory).all()
        np.testing.assert_array_equal(waypoint.trajectory[0], waypoint.position)
        assert waypoint.gripper in (-1.0, 1.0) and set(waypoint.grippers) <= {-1.0, 1.0}
        if waypoint.rotation is not None:
            np.testing.assert_allclose(
                waypoint.rotation @ waypoint.rotation.T, np.eye(3), atol=1e-5
            )
    assert policy.seconds["features"] > 0 and policy.seconds["policy"] > 0


@pytest.mark.parametrize("batch", [1, 4])
def test_an_episode_s_answers_do_not_depend_on_the_others(case, batch):
    """Two episodes whose observations alternate, alone or in one batch, are answered bit by bit as
    if each ran alone. So --workers changes no outcome. In batches of 4 the company changes, and so
    does the place in the batch.
    """
    sessions = PolicySessions(case.policy().eval(), batch)
    frames = (0, 5, 10), (30, 20, 25)
    episodes = [list(case.observations(chosen)) for chosen in frames]
    torch.set_num_threads(1)

    def begun(number):
        session = sessions.open()
        sessions.begin(session, seed=number)
        return session

    def alone(number):
        session = begun(number)
        return [sessions.answer([(session, seen)])[0][0] for seen in episodes[number]]

    expected = [alone(0), alone(1)]
    first, second, answered = begun(0), begun(1), []
    for one, other in zip(*episodes):
        asked = [(second, other), (first, one)]
        answered.append(
            sessions.answer(asked) if batch > 1 else [sessions.answer([a])[0] for a in asked]
        )
    assert same([row[1][0] for row in answered], expected[0])
    assert same([row[0][0] for row in answered], expected[1])
    assert not same(*expected)


def test_every_batch_has_the_same_shape(para, monkeypatch):
    """A GPU chooses kernels by shape, and these round differently.

    Answers would depend on how many simulators happen to wait.
    """
    sessions, shapes = PolicySessions(para.policy().eval(), batch=4), []
    features = type(sessions.policy).features
    seen = lambda self, images: shapes.append(images.shape) or features(self, images)
    monkeypatch.setattr(type(sessions.policy), "features", seen)
    observations = list(para.observations())
    for n in (1, 3):
        sessions.answer([(sessions.open(), o) for o in observations[:n]])
    assert shapes == [(4, SIZE, SIZE, 3)] * 2


def test_reset_starts_afresh(case):
    """An episode's answers do not depend on the episode before."""
    policy = case.policy()
    first = answers(policy, case.observations())
    answers(policy, case.observations(frames=(30, 35, 39)))
    assert same(answers(policy, case.observations()), first)


def test_a_policy_that_ignores_the_features_is_noticed(case):
    """The features of another sample change the loss.

    A policy that only knows the EEF would pass all other tests.
    """
    policy, batch = case.policy(), case.batch()
    swapped = {**batch, "features": [m.flip(0) for m in batch["features"]]}
    assert abs(loss(policy, batch)["loss"].item() - loss(policy, swapped)["loss"].item()) > 1e-5


# -- checkpoints


def test_a_loaded_policy_answers_as_the_saved_one(case, tmp_path, capsys):
    """A loaded policy answers exactly like the saved one, brings its provenance and extras, and is
    ready to act."""
    policy, path = case.policy(), tmp_path / "checkpoint.safetensors"
    expected = answers(policy, case.observations())
    checkpoint.save_policy(path, policy, case.name, {"command": "test"}, {"ema": torch.arange(3.0)})
    loaded, info, extra = checkpoint.load_policy(path, backbone=case.backbone)
    assert same(answers(loaded, case.observations()), expected)
    assert not loaded.training and info["command"] == "test" and extra["ema"].tolist() == [0, 1, 2]
    assert dataclasses.asdict(loaded.config) == dataclasses.asdict(policy.config)
    assert json.loads(path.with_suffix(".json").read_text())["model_type"] == case.name
    assert capsys.readouterr().out == ""  # nothing is older or missing
    # frozen features are named, not stored
    assert not [k for k in load_file(path) if "backbone" in k]


@pytest.fixture
def saved(para, tmp_path):
    """A whole PARA checkpoint."""
    path = tmp_path / "policy.safetensors"
    checkpoint.save_policy(path, para.policy(), "para", {})
    return path


def rewrite(path, tensors=lambda t: None, info=lambda i: None):
    """Change a checkpoint's tensors and header in place."""
    found, header = checkpoint.load_tensors(path)
    tensors(found)
    info(header)
    checkpoint.save_tensors(path, found, header)


def spoil(tensors):
    tensors["model.volume.weight"][0, 0] = float("nan")


DAMAGE = {
    "missing tensor": (lambda p: rewrite(p, lambda t: t.pop("model.volume.bias")), "volume.bias"),
    "wrong shape": (
        lambda p: rewrite(p, lambda t: t.update({"model.volume.bias": torch.zeros(5)})),
        "shape (5,)",
    ),
    "NaN tensor": (lambda p: rewrite(p, spoil), "volume.weight"),
    "Inf buffer": (
        lambda p: rewrite(p, lambda t: t["model.height_range"].fill_(float("inf"))),
        "height_range",
    ),
    "surplus tensor": (
        lambda p: rewrite(p, lambda t: t.update({"model.bogus": torch.zeros(2)})),
        "bogus",
    ),
    "no header": (lambda p: save_file(load_file(p), p), "foreign"),
    "training state": (
        lambda p: checkpoint.save_tensors(
            p, {"model.x": torch.zeros(1)}, {"step": 3, "minutes": 1.0}
        ),
        "checkpoint.safetensors",
    ),
    "other features": (
        lambda p: rewrite(
            p, info=lambda i: i.update(backbone_identity="efficientnet_lite0-64px-0123")
        ),
        "--backbone_weights",
    ),
    "unknown field": (
        lambda p: rewrite(p, info=lambda i: i["config"].update(n_dreams=3)),
        "n_dreams",
    ),
    "unknown model": (lambda p: rewrite(p, info=lambda i: i.update(model_type="parrot")), "parrot"),
    "missing config": (lambda p: rewrite(p, info=lambda i: i.pop("config")), "config"),
    "not safetensors": (lambda p: p.write_text("hello\n" * 100), "not a safetensors file"),
    "empty": (lambda p: p.write_bytes(b""), "truncated"),
    "cut in the header": (lambda p: p.write_bytes(p.read_bytes()[:100]), "truncated"),
    "cut in the tensors": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "truncated"),
    "absent": (lambda p: p.unlink(), "no such checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_checkpoint_is_named(damage, saved, para):
    """One sentence names the file and the fault: a robot must not move with half a policy."""
    change, word = DAMAGE[damage]
    change(saved)
    with pytest.raises(UserError) as error:
        checkpoint.load_policy(saved, backbone=para.backbone)
    message = str(error.value)
    assert word in message and "\n" not in message, message
    assert saved.name in message, message


def test_a_run_folder_is_told_from_its_checkpoint(tmp_path):
    """It is what a user has at hand: the file in it is named."""
    (tmp_path / "checkpoint.safetensors").touch()
    with pytest.raises(UserError, match="is a folder; give .*checkpoint.safetensors"):
        checkpoint.load_policy(tmp_path)


def test_an_older_checkpoint_loads_with_defaults(saved, para, capsys):
    """A field added since gets its default, and the user is told which."""
    rewrite(saved, info=lambda i: [i["config"].pop(k) for k in ("sigma", "decode")])
    policy, _, _ = checkpoint.load_policy(saved, backbone=para.backbone)
    printed = capsys.readouterr().out
    assert "decode" in printed and "sigma" in printed and saved.name in printed
    assert policy.config.sigma == type(policy.config)().sigma


def test_a_failed_write_keeps_the_old_checkpoint(saved, para, monkeypatch):
    """A kill or a full disk in the middle of writing leaves the old file whole and no scraps."""
    before = saved.read_bytes()

    def half(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(UserError, match=f"{saved.name}: cannot be written .No space left"):
        checkpoint.save_policy(saved, para.policy(1), "para", {})
    assert saved.read_bytes() == before
    assert sorted(p.name for p in saved.parent.iterdir()) == ["policy.json", "policy.safetensors"]


def test_bare_eval_takes_the_newest_checkpoint(tmp_path):
    """Without --ckpt the newest run's file is used, or else a committed one.

    If there is none, the error names the remedy.
    """
    runs, committed = tmp_path / "runs", tmp_path / "checkpoints"
    with pytest.raises(UserError, match="train.py"):
        records.newest_checkpoint(runs, committed)
    for age, path in enumerate(
        [
            runs / "new" / "checkpoint.safetensors",
            runs / "old" / "checkpoint.safetensors",
            committed / "para.safetensors",
        ]
    ):
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    assert (
        records.newest_checkpoint(tmp_path / "none", committed)[0] == committed / "para.safetensors"
    )
    (committed / "para_task.safetensors").touch()
    # a clone's times say nothing: of several the baseline is taken
    (committed / "voxel_ar_task.safetensors").touch()
    assert (
        records.newest_checkpoint(tmp_path / "none", committed)[0]
        == committed / "para_task.safetensors"
    )
    path, sentence = records.newest_checkpoint(runs, committed)
    assert path == runs / "new" / "checkpoint.safetensors" and str(path) in sentence


def test_an_unknown_model_type_lists_the_known_ones():
    """A mistyped --model_type lists the known ones."""
    with pytest.raises(UserError, match="para"):
        look_up("parra")
