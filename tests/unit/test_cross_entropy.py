"""The loss over a volume's classes without the volume in memory, and the memory layout of its
gradient.
"""

import pytest
import torch
from torch import nn

from nets import cross_entropy
from nets.cross_entropy import product_cross_entropy, sparse_cross_entropy
from nets.maps import dilated_convolutions, mark_cell, product, projected


def product_case(shared, dtype=torch.float32):
    """(weights, bias, keys, index, share) of 3 samples, 2 queries, 5 rows a cell, 4 x 6 cells."""
    torch.manual_seed(0)
    n = 1 if shared else 3
    index = torch.randint(0, 5 * 24, (3, 2, 7))
    share = torch.rand(3, 2, 7).softmax(-1)
    tensors = torch.randn(n, 2, 5, 8), torch.randn(n, 2, 5), torch.randn(3, 8, 24).to(dtype)
    return *(t.requires_grad_() for t in tensors), index, share


def gradients(loss, inputs):
    """Gradients of a sum in which every row has its own weight."""
    weighed = (loss.flatten() * torch.arange(1.0, 1 + loss.numel())).sum()
    return torch.autograd.grad(weighed, inputs)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("shared", [True, False])
def test_the_loss_of_a_product_is_the_loss_of_its_logits(shared, rows, monkeypatch):
    """PARA's volume is never stored.

    Loss and gradients equal those of a stored volume, computed row by row as on a CPU and all at
    once as on a GPU.
    """
    monkeypatch.setattr(cross_entropy, "rows_at_once", lambda _: rows)
    weights, bias, keys, index, share = product_case(shared)
    logits = weights @ keys[:, None] + bias[..., None]  # (N,Q,R,P)
    expected = sparse_cross_entropy(
        logits.flatten(2).flatten(0, 1), index.flatten(0, 1), share.flatten(0, 1)
    )
    found = product_cross_entropy(weights, bias, keys, index, share)
    torch.testing.assert_close(found.flatten(), expected)
    inputs = weights, bias, keys
    for one, other in zip(gradients(found, inputs), gradients(expected, inputs)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_loss_of_a_bf16_product_differs_by_roundings_alone():
    """With keys in bf16, as autocast makes them, the loss is fp32's within bf16's precision."""
    exact = product_cross_entropy(*product_case(True))
    rounded = product_cross_entropy(*product_case(True, torch.bfloat16))
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)


def test_a_certain_class_has_a_finite_loss():
    """Logits far apart overflow no exponential: the loss is the distance itself."""
    logits = torch.tensor([[1000.0, 0.0, -1000.0]], requires_grad=True)
    loss = sparse_cross_entropy(logits, torch.tensor([[1]]), torch.ones(1, 1))
    assert loss.item() == 1000
    assert torch.autograd.grad(loss.sum(), logits)[0].tolist() == [[1, -1, 0]]


def test_a_product_over_cells_has_the_gradient_of_a_matrix_product():
    """The product with which B reads image features has the gradient of a matrix product."""
    torch.manual_seed(0)
    weights = torch.randn(2, 3, 4, requires_grad=True)
    cells = torch.randn(2, 4, 6, requires_grad=True)
    found, expected = product(weights, cells), weights @ cells
    torch.testing.assert_close(found, expected)
    for pair in zip(*(gradients(x, (weights, cells)) for x in (found, expected))):
        torch.testing.assert_close(*pair)


def test_a_marked_cell_is_the_only_one_that_changes():
    """The EEF's mark changes its own cell alone.

    A position outside the image marks a cell at the border.
    """
    x = torch.zeros(2, 3, 4, 5)
    marked = mark_cell(x, torch.tensor([[1.2, 2.6], [-7, 9]]), torch.ones(2, 3))
    assert marked.sum((1, 2, 3)).tolist() == [3, 3]
    assert (marked[0, :, 1, 3] == 1).all() and (marked[1, :, 0, 4] == 1).all()


def test_channels_lie_last_from_the_backbone_to_the_loss_and_back():
    """Activations and gradients keep channels last in memory.

    A gradient in another layout makes an activation's backward pass five times slower, and no
    result shows it.
    """
    torch.manual_seed(0)
    projections = nn.ModuleList([nn.Conv2d(5, 8, 1), nn.Conv2d(7, 8, 1)])
    trunk = dilated_convolutions(8, (1, 2))
    x = projected([torch.randn(2, 5, 6, 6), torch.randn(2, 7, 3, 3)], projections, 6)
    x = mark_cell(x, torch.zeros(2, 2), torch.ones(2, 8))
    layouts = []
    for layer in trunk:
        x = layer(x)
        layouts.append(x.is_contiguous(memory_format=torch.channels_last))
        x.register_hook(
            lambda g: layouts.append(g.is_contiguous(memory_format=torch.channels_last))
        )
    case = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3), x.flatten(2)
    loss = product_cross_entropy(*case, torch.zeros(2, 2, 1).long(), torch.ones(2, 2, 1))
    (loss.sum() + product(torch.randn(2, 3, 8), x.flatten(2)).sum()).backward()
    assert layouts == [True] * 2 * len(trunk)
