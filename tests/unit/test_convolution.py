"""Convolutions by oneDNN answer what PyTorch's own do, and give way where they cannot."""

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from nets.convolution import OneDnnConvolution, has_onednn
from nets.fusion import with_onednn

pytestmark = pytest.mark.skipif(not has_onednn(), reason="PyTorch without oneDNN")


def filled(convolution):
    """The convolution, frozen, with weights and bias that differ from one another."""
    torch.manual_seed(0)
    for tensor in convolution.parameters():
        nn.init.normal_(tensor)
    return convolution.requires_grad_(False)


@pytest.mark.parametrize("size", [(12, 12), (13, 12), (11, 13)])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("groups", [1, 6])
def test_tensorflow_padding_meets_the_same_pixels(size, kernel, groups):
    """A kernel with zeros in front and padding on both sides is padding at the end: a shift by one
    pixel would show, at even and odd sizes."""
    convolution = filled(Conv2dSame(6, 6, kernel, stride=2, groups=groups))
    x = torch.randn(1, 6, *size).contiguous(memory_format=torch.channels_last)
    fused = OneDnnConvolution(convolution, nn.ReLU6(), size)
    torch.testing.assert_close(fused(x), convolution(x).clamp(0, 6), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", [nn.Identity(), nn.ReLU(), nn.ReLU6()])
def test_each_activation_is_applied(activation):
    """Each activation is applied, and after the bias."""
    convolution = filled(nn.Conv2d(4, 8, 1))
    x = 4 * torch.randn(1, 4, 9, 9)
    wanted = activation(convolution(x))
    found = OneDnnConvolution(convolution, activation, (9, 9))(x)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_another_size_or_type_takes_the_modules_themselves():
    """The padding was computed for one size: at another one it would be wrong, and in float64 the
    operator refuses."""
    convolution = filled(Conv2dSame(4, 4, 3, stride=2))
    fused = OneDnnConvolution(convolution, nn.ReLU(), (12, 12))
    x = torch.randn(1, 4, 13, 13)
    assert torch.equal(fused(x), convolution(x).relu())
    wanted = convolution.double()(x.double()).relu()
    assert torch.equal(fused.double()(x.double()), wanted)


class Network(nn.Module):
    """A list of one map. The activation `act` runs after both convolutions where `twice`."""

    def __init__(self, twice):
        super().__init__()
        self.first, self.second = filled(nn.Conv2d(3, 4, 3)), filled(nn.Conv2d(4, 4, 1))
        self.act, self.twice = nn.ReLU(), twice

    def forward(self, x):
        x = self.second(self.act(self.first(x)))
        return [self.act(x) if self.twice else x]


@pytest.mark.parametrize("twice", [False, True])
def test_an_activation_that_runs_twice_stays(twice):
    """An activation goes into its convolution, unless it also runs elsewhere."""
    model, x = Network(twice).eval(), torch.randn(1, 3, 8, 8)
    changed = with_onednn(model, x)
    torch.testing.assert_close(changed(x)[0], model(x)[0])
    assert isinstance(changed.first, OneDnnConvolution)
    assert isinstance(changed.act, nn.ReLU if twice else nn.Identity)
    assert isinstance(model.first, nn.Conv2d)  # the given one is left as it was
