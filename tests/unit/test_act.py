"""ACT beyond the contract of all policies: the scale of its answers, its inputs, and its noise."""

import numpy as np
import pytest
import torch
from conftest import look_at

from model_act import ActConfig, ActPolicy, multi_head
from nets.layers import attend
from runtime import UserError

CHANNELS, MEAN, STD = (5, 7), np.array([0.1, -0.2, 1.0]), np.array([0.2, 0.1, 0.05])


def policy(**changes):
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
        }
    )
    return made.eval()


def batch(n=2):
    generator = torch.Generator().manual_seed(1)
    random = lambda *shape: torch.randn(*shape, generator=generator)
    E = torch.from_numpy(look_at([0.75, 0.0, 1.65], [0.0, 0.0, 1.0])).expand(n, 4, 4).clone()
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
