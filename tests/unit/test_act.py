"""ACT beyond the contract of all policies: the scale of its answers, its inputs, its noise, and
its average over the last chunks.
"""

import math

import numpy as np
import pytest
import torch
from conftest import look_at

from model_act import ActConfig, ActPolicy, multi_head, sine_places, weighted_mean
from nets.layers import attend
from runtime import UserError

CHANNELS, MEAN, STD = (5, 7), np.array([0.1, -0.2, 1.0]), np.array([0.2, 0.1, 0.05])


VIEWS = ([0.75, 0.0, 1.65], [0.7, 0.2, 1.6], [0.7, -0.3, 1.7])  # cameras of the training data


def camera(position):
    """(4,4) of a camera that looks at the table's middle."""
    return torch.from_numpy(look_at(position, [0.0, 0.0, 1.0]))


def policy(views=VIEWS, **changes):
    torch.manual_seed(0)
    config = ActConfig(
        n_window=3,
        dim=16,
        n_layers=1,
        n_heads=2,
        mlp_ratio=1,
        patch_grid=4,
        n_rot_bins=8,
        **changes,
    )
    made = ActPolicy(config, CHANNELS)
    made.fit_statistics(
        {
            "position": (MEAN, STD),
            "euler_range": np.array([[-1.0, 1.0]] * 3),
            "features": [(np.zeros(n, np.float32), np.ones(n, np.float32)) for n in CHANNELS],
            "poses": torch.stack([camera(v) for v in views]).numpy(),
        }
    )
    return made.eval()


def batch(n=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator)
    E = camera(VIEWS[0]).expand(n, 4, 4).clone()
    return {
        "features": [random(n, CHANNELS[0], 16, 16).half(), random(n, CHANNELS[1], 8, 8).half()],
        "eef_pos": random(n, 3).double() * 0.1,
        "gripper_width": torch.full((n,), 0.07),
        "K": torch.eye(3).double().expand(n, 3, 3),
        "E": E,
        "target_pos": torch.from_numpy(MEAN + STD).expand(n, 3, 3),
        "target_rot": torch.eye(3).double().expand(n, 3, 3, 3),
        "target_gripper": torch.zeros(n, 3, dtype=torch.long),
        "mask": torch.ones(n, 3),
    }


@torch.no_grad()
def test_positions_are_scaled_by_the_data():
    """An output of zero is the data's mean, an output of one a standard deviation more, in metres.

    For targets one deviation above the mean their losses are 1 and 0.
    """
    made, data = policy(), batch()
    made.position.weight.zero_()
    for value, error in ((0.0, 1.0), (1.0, 0.0)):
        made.position.bias.fill_(value)
        np.testing.assert_allclose(
            made.predict(data)["position"],
            np.broadcast_to(MEAN + value * STD, (2, 3, 3)),
            atol=1e-6,
        )
        assert made.loss(data)["position_l1"].item() == pytest.approx(error, abs=1e-5)


@torch.no_grad()
def test_the_camera_is_an_input_that_can_be_left_out():
    """With a camera token another camera changes the answer.

    Without it, as ACT was published, it does not.
    """
    data, moved = batch(), batch()
    moved["E"][:, :3] = torch.from_numpy(look_at([0.6, 0.5, 1.5], [0.0, 0.0, 1.0]))[:3]
    for token in (True, False):
        made = policy(camera_token=token)
        same = torch.equal(made.predict(data)["position"], made.predict(moved)["position"])
        assert same != token


@torch.no_grad()
def test_a_camera_that_never_moved_in_training_is_not_listened_to():
    """Weights of a number that was always the same are arbitrary.

    Another value of it in use would move the answer by as much.
    """
    made, data, moved = policy(views=VIEWS[:1] * 3), batch(), batch()
    moved["E"][:] = camera([0.6, 0.5, 1.5])
    torch.testing.assert_close(made.predict(data)["position"], made.predict(moved)["position"])


@torch.no_grad()
def test_finetuned_on_moved_cameras_it_listens_to_them():
    """A checkpoint of one camera has nothing to say of the numbers that its camera did not change:
    they are scaled by the new data, and at first change no answer. What did vary stays the
    checkpoint's.
    """
    still, moving = policy(views=VIEWS[:1] * 3), policy()
    taken = moving.adopt(still.state_dict())
    moving.load_state_dict(taken)
    assert (moving.pose_scale != 0).sum() >= 9
    data, moved = batch(), batch()
    moved["E"][:] = camera([0.6, 0.5, 1.5])
    assert not torch.equal(*(moving.camera_numbers(b["K"], b["E"]) for b in (data, moved)))
    for one in (data, moved):
        torch.testing.assert_close(moving.predict(one)["position"], still.predict(one)["position"])
    moving.camera.weight[:, 4:] = 1.0  # as training would
    answers = [moving.predict(b)["position"] for b in (data, moved)]
    assert not torch.allclose(*answers)
    other = policy(views=[[0.5, 0.1, 1.5], *VIEWS])
    state = policy().state_dict()
    assert all(torch.equal(v, state[k]) for k, v in other.adopt(state).items())


def test_poses_are_scaled_by_the_training_cameras():
    """The pose has mean 0 and deviation 1 over the cameras; nothing depends on the table's place.

    The principal point is measured from the image's middle, which --shift_aug moves.
    """
    made = policy()
    E, K = torch.stack([camera(v) for v in VIEWS]), torch.eye(3).double().repeat(3, 1, 1)
    K[:, 0, 2] = 224 + torch.tensor([0.0, 112.0, -112.0])
    numbers = made.camera_numbers(K, E)
    assert numbers[:, 2].tolist() == [0.0, 0.25, -0.25]
    pose = numbers[:, 4:]
    torch.testing.assert_close(pose.mean(0), torch.zeros(12), atol=1e-5, rtol=0)
    # a number varies among these cameras or it does not
    spread = pose.std(0, correction=0)
    torch.testing.assert_close(spread, spread.round(), atol=1e-5, rtol=0)
    assert spread.sum() >= 9


def test_a_width_without_whole_sines_is_refused():
    """Before anything is computed with it."""
    with pytest.raises(UserError, match="--dim 18: .*multiple of 4"):
        ActPolicy(ActConfig(dim=18, n_heads=2, places="sine"), CHANNELS)


def test_sines_tell_places_apart():
    """Every patch has its own place, and its row is in the first half alone."""
    places = sine_places(14, 32)
    assert len(torch.unique(places, dim=0)) == 196
    grid = places.unflatten(0, (14, 14))
    assert torch.equal(grid[3, 0, :16], grid[3, 9, :16])
    assert torch.equal(grid[0, 5, 16:], grid[8, 5, 16:])
    # once around over the image, as in DETR
    assert grid[6, 0, 0].item() == pytest.approx(math.sin(math.pi), abs=1e-5)


def test_noise_is_of_training_alone():
    """Training adds noise to the EEF unless --eef_noise_m is 0.

    In use the same observation has one answer.
    """
    data, noisy, plain = batch(), policy(dropout=0.0), policy(dropout=0.0, eef_noise_m=0.0)
    value = lambda made: made.loss(data)["loss"].item()
    assert value(noisy) == value(noisy)
    assert value(noisy.train()) != value(noisy) and value(plain.train()) == value(plain)


@torch.no_grad()
def test_a_patch_tells_where_inside_it_something_is():
    """Pooling keeps two cells along each side of a patch, so a blob that moves inside a patch moves
    the answer.
    """
    made, here, there = policy(), batch(1), batch(1)
    for data, column in ((here, 0), (there, 2)):  # one patch spans four cells of this map
        data["features"][0].zero_()
        data["features"][0][:, :, 0, column] = 5
    assert not torch.equal(made.predict(here)["position"], made.predict(there)["position"])


def test_heads_have_to_divide_the_width():
    """One sentence names both flags."""
    with pytest.raises(UserError, match="--dim 16.*--n_heads 3"):
        ActPolicy(ActConfig(dim=16, n_heads=3), CHANNELS)


@pytest.mark.parametrize("other", [False, True])
def test_attention_is_that_of_torch(other):
    """The layers are torch's, with another way to compute attention.

    Checkpoints of either give the same answers.
    """
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 5, 16)
    memory = torch.randn(2, 7, 16) if other else x
    expected, _ = attention(x, memory, memory, need_weights=False)
    torch.testing.assert_close(multi_head(attention, x, memory), expected)


def test_products_answer_what_the_fused_kernel_does():
    """On a CPU in bf16, training uses plain products and acting uses torch's kernel.

    Both agree up to rounding, gradients too.
    """
    torch.manual_seed(0)
    heads = [torch.randn(2, 3, n, 16, requires_grad=True) for n in (5, 9, 9)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in heads]
    exact, found = attend(*heads), attend(*rounded)
    torch.testing.assert_close(found.float(), exact, rtol=0.03, atol=0.03)
    for one, other in zip(
        torch.autograd.grad(found.sum(), rounded), torch.autograd.grad(exact.sum(), heads)
    ):
        torch.testing.assert_close(one.float(), other, rtol=0.05, atol=0.05)


# -- temporal ensembling


def test_weights_fall_with_age_from_the_oldest_chunk_on():
    """Algorithm 2 of the paper: what speaks about a waypoint is counted from its oldest."""
    chunks = torch.arange(12.0).double().view(3, 4, 1) ** 2
    said = [(chunks[0], 2), (chunks[1], 1), (chunks[2], 0)]
    found = weighted_mean(said, decay=0.5)[:, 0]
    e = math.exp(-0.5)
    expected = [
        (4 + e * 25 + e**2 * 64) / (1 + e + e**2),
        (9 + e * 36 + e**2 * 81) / (1 + e + e**2),
        (49 + e * 100) / (1 + e),  # the oldest chunk ends before
        121.0,
    ]
    assert found.tolist() == pytest.approx(expected)


@torch.no_grad()
def test_waypoints_that_are_passed_are_those_up_to_where_the_eef_is():
    """The new chunk's first waypoint meets the old chunk's first one that lies ahead.

    The episode's first answer is one chunk alone.
    """
    made, first, second = policy(ensemble=True, ensemble_decay=0.5), batch(1), batch(1, seed=2)
    made.reset()
    old = made.decide(first)["position"][0]
    torch.testing.assert_close(old, made.predict(first)["position"][0])
    second["eef_pos"] = old[1:2] + 1e-4  # two waypoints are passed
    new = made.predict(second)["position"][0]
    found = made.decide(second)["position"][0]
    weight = 1 / (1 + math.exp(-0.5))
    torch.testing.assert_close(found[0], weight * old[2] + (1 - weight) * new[0])
    torch.testing.assert_close(found[1:], new[1:])


@pytest.mark.parametrize("change", ["nothing", "fingers", "reset", "no ensemble"])
@torch.no_grad()
def test_chunks_are_forgotten_where_they_say_nothing_any_more(change):
    """Chunks end at the change of the gripper and at the end of the episode.

    Without --ensemble every answer is of its own observation alone.
    """
    made = policy(ensemble=change != "no ensemble")
    first, second = batch(1), batch(1, seed=2)
    made.reset()
    made.decide(first)
    second["eef_pos"] = first["eef_pos"]
    if change == "fingers":
        second["gripper_width"] = torch.tensor([0.005])
    if change == "reset":
        made.reset()
    found, alone = made.decide(second)["position"], made.predict(second)["position"]
    assert torch.allclose(found, alone, atol=1e-6) == (change != "nothing")


@torch.no_grad()
def test_an_episode_that_hovers_remembers_no_more_than_a_chunk():
    """At one place for ever the list of chunks would grow without end."""
    made = policy(ensemble=True)
    made.reset()
    for seed in range(8):
        made.decide({**batch(1, seed=seed), "eef_pos": torch.zeros(1, 3).double()})
    assert len(made.said) == 3
