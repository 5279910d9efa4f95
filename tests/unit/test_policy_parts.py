"""Targets, loss and decoding of the volume: from a coordinate to a distribution and back."""

import argparse
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nets import cross_entropy
from nets.history import FingerLinear
from nets.volume import (
    flat_index,
    local_soft_argmax,
    soft_argmax_at,
    soft_targets,
    sparse_cross_entropy,
)
from policy import PolicyConfig, add_config_flags, flag

settings.register_profile("quick", max_examples=50, deadline=None, derandomize=True)
settings.load_profile("quick")

SHAPE = (8, 12, 16)  # unequal, so that a transposed axis shows
coordinate = lambda low, high: st.tuples(*(st.floats(low, n - 1 + high) for n in SHAPE)).map(
    lambda x: torch.tensor([x], dtype=torch.float64)
)
INTERIOR, ANYWHERE = coordinate(2.0, -2.0), coordinate(-30.0, 30.0)


def unflatten(index):
    """Flat indices -> bins (...,3), by torch's own rule."""
    return torch.stack(torch.unravel_index(index, SHAPE), -1)


def test_a_flat_index_addresses_what_torch_flattened():
    """Flat indices address logits that torch flattened.

    With one axis out of order every target would be elsewhere.
    """
    volume = torch.arange(8 * 12 * 16).view(SHAPE)
    bins = torch.tensor([[0, 0, 0], [1, 2, 3], [7, 11, 15]])
    assert flat_index(bins, SHAPE).tolist() == [volume[tuple(b)].item() for b in bins]


@given(ANYWHERE, st.sampled_from([0.0, 0.3, 0.7, 1.5]))
def test_soft_targets_are_a_distribution(point, sigma):
    """Weights are nonnegative and sum to one, and indices stay inside, for any coordinate."""
    index, weight = soft_targets(point, SHAPE, sigma)
    assert (weight >= 0).all() and weight.sum().item() == pytest.approx(1, abs=1e-9)
    assert (index >= 0).all() and (index < 8 * 12 * 16).all()


@given(ANYWHERE)
def test_hard_target_is_the_nearest_bin(point):
    """sigma 0 is one-hot at the nearest bin, clamped to the border."""
    index, weight = soft_targets(point, SHAPE, 0.0)
    nearest = [min(max(round(x), 0), n - 1) for x, n in zip(point[0].tolist(), SHAPE)]
    assert unflatten(index)[0].tolist() == [nearest] and weight.tolist() == [[1.0]]


@given(INTERIOR)
def test_soft_target_expectation_is_the_coordinate(point):
    """A soft target tells where between the bins the coordinate lies. Decoding recovers this."""
    index, weight = soft_targets(point, SHAPE, 0.7)
    mean = (unflatten(index) * weight[..., None]).sum(1)
    assert (mean - point).abs().max() < 0.05


@pytest.mark.parametrize("sigma", [0.0, 0.7])
def test_targets_outside_are_clamped_to_the_border(sigma):
    """A point outside the volume trains the border bin next to it, never one on the other side."""
    index, weight = soft_targets(torch.tensor([[-5.0, 20.0, 3.0]]), SHAPE, sigma)
    assert unflatten(index[0, weight[0].argmax()]).tolist() == [0, 11, 3]
    far = unflatten(index)[weight > 0]
    assert far[:, 0].max() <= 2 and far[:, 1].min() >= 9


@given(st.lists(ANYWHERE, min_size=1, max_size=3), st.sampled_from([0.0, 0.7]), st.integers(0, 99))
def test_sparse_cross_entropy_equals_dense(points, sigma, seed):
    """The loss is the ordinary cross-entropy against the same target stored over the whole
    volume.
    """
    index, weight = soft_targets(torch.cat(points), SHAPE, sigma)
    logits = 3 * torch.randn(
        len(points), 8 * 12 * 16, generator=torch.Generator().manual_seed(seed)
    )
    dense = torch.zeros(logits.shape).scatter_add(1, index, weight.float())
    expected = torch.nn.functional.cross_entropy(logits, dense, reduction="none")
    torch.testing.assert_close(
        sparse_cross_entropy(logits, index, weight.float()), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_rows_at_once_cost_what_single_ones_do(dtype, monkeypatch):
    """A GPU takes all rows of logits at once, a CPU one after the other.

    Loss and gradient are the same.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 700, generator=generator).to(dtype).requires_grad_()
    index, weight = (
        torch.randint(0, 700, (5, 9), generator=generator),
        torch.rand(5, 9, generator=generator),
    )
    found = []
    for rows in (1, 2, 5):
        monkeypatch.setattr(cross_entropy, "rows_at_once", lambda _, rows=rows: rows)
        loss = sparse_cross_entropy(logits, index, weight)
        found.append((loss.detach(), *torch.autograd.grad((loss * torch.arange(5)).sum(), logits)))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-6, atol=1e-7)


@given(INTERIOR, st.sampled_from([0.5, 0.7]))
def test_local_soft_argmax_recovers_a_subcell_centre(point, sigma):
    """A Gaussian's centre is found to 0.05 cells, so the grid does not limit the resolution."""
    grid = torch.stack(
        torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in SHAPE), indexing="ij"), -1
    )
    logits = -((grid - point[0]) ** 2).sum(-1).view(1, -1) / (2 * sigma**2)
    assert (local_soft_argmax(logits, SHAPE) - point).abs().max() < 0.05


@given(INTERIOR)
def test_decoding_a_perfect_prediction_gives_the_label(point):
    """Targets and decoding agree: the logits of a target decode to its coordinate."""
    index, weight = soft_targets(point, SHAPE, 0.7)
    logits = torch.full((1, 8 * 12 * 16), -40.0, dtype=torch.float64).scatter(
        1, index, weight.log()
    )
    assert (local_soft_argmax(logits, SHAPE) - point).abs().max() < 0.05


def test_radius_zero_is_the_argmax():
    """radius 0 gives the highest bin itself."""
    logits = torch.randn(5, 8 * 12 * 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(local_soft_argmax(logits, SHAPE, 0), unflatten(logits.argmax(-1)).double())


def test_a_second_mode_does_not_pull_the_answer():
    """With two modes the answer is the higher one.

    A global soft-argmax would give the empty place between them.
    """
    logits = torch.full(SHAPE, -20.0)
    logits[1, 2, 3], logits[6, 9, 12] = 5.0, 4.9
    assert (
        local_soft_argmax(logits.view(1, -1), SHAPE) - torch.tensor([[1, 2, 3]])
    ).abs().max() < 1e-3


@pytest.mark.parametrize("first", (0, 8 * 12 * 16))
def test_the_answer_is_not_a_bin_that_is_excluded(first):
    """Where bins on both sides of an excluded one are likely, the answer is the peak, not their
    mean, which is that bin.
    """
    logits = torch.full(SHAPE, -20.0)
    logits[4, 5, 6], logits[4, 5, 7], logits[4, 5, 8] = 5.0, -torch.inf, 4.9
    other = torch.zeros(1, 8 * 12 * 16)  # the volume of the other command
    both = torch.cat([other, other], 1)
    both[:, first : first + other.shape[1]] = logits.view(1, -1)
    best = logits.flatten().argmax()[None]
    found = soft_argmax_at(both, best, torch.tensor([first]), SHAPE, 2)
    assert torch.equal(found, torch.tensor([[4.0, 5.0, 6.0]], dtype=torch.float64))
    both[both == -torch.inf] = -20.0
    free = soft_argmax_at(both, best, torch.tensor([first]), SHAPE, 2)
    assert (free - torch.tensor([[4, 5, 7]])).abs().max() < 0.1


def test_decoding_stays_inside_at_a_corner():
    """At a corner the window is cut, and nothing outside has weight."""
    logits = torch.full(SHAPE, -30.0)
    logits[0, 11, 0] = 5.0
    assert (
        local_soft_argmax(logits.view(1, -1), SHAPE) - torch.tensor([[0, 11, 0]])
    ).abs().max() < 1e-6


def test_a_config_field_becomes_a_flag():
    """Each config field is a flag of its own type and default, so that it can be ablated."""

    @dataclass
    class Config(PolicyConfig):
        rate: float = flag(0.5, "a rate")
        deep: bool = flag(False, "a switch")
        kind: str = flag("soft", "a choice", ("soft", "hard"))

    parser = argparse.ArgumentParser()
    add_config_flags(parser, Config)
    assert Config(**vars(parser.parse_args([]))) == Config()
    changed = parser.parse_args(
        ["--waypoint_stride", "3", "--rate", "0.1", "--deep", "--kind", "hard"]
    )
    assert Config(**vars(changed)) == Config(waypoint_stride=3, rate=0.1, deep=True, kind="hard")
    with pytest.raises(SystemExit):
        parser.parse_args(["--kind", "other"])


def test_finger_heads_share_no_weight():
    """What a head learns with open fingers does not change its answer with closed ones.

    With one state it is a plain linear layer.
    """
    torch.manual_seed(0)
    layer, x = FingerLinear(5, 3, n_states=2), torch.randn(4, 5)
    before = layer(x, torch.ones(4, dtype=torch.long)).detach()
    layer(x, torch.zeros(4, dtype=torch.long)).square().sum().backward()
    with torch.no_grad():
        layer.linear.weight -= layer.linear.weight.grad
    assert torch.equal(layer(x, torch.ones(4, dtype=torch.long)), before)
    assert not torch.allclose(layer(x, torch.zeros(4, dtype=torch.long)), before)
    plain = FingerLinear(5, 3, n_states=1)
    assert torch.equal(plain(x, torch.tensor([0, 1, 0, 1])), plain.linear(x))
