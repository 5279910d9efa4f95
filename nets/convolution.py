"""A frozen convolution and the activation after it, in one pass over memory on a CPU.

PyTorch calls oneDNN with a fused activation only from compiled graphs. Here its operator is called
as it is: nothing is compiled, and the module moves with `.to()`.
"""

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers.padding import get_same_padding
from torch import nn

# activation -> what the operator calls it: name, scalars, algorithm
POINTWISE = {
    nn.Identity: ("none", [], ""),
    nn.ReLU: ("relu", [], ""),
    nn.ReLU6: ("hardtanh", [0.0, 6.0], ""),
}


def has_onednn():
    """True where PyTorch is built with oneDNN and has the operator."""
    return torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_convolution_pointwise"
    )


def can_replace(module):
    """True for a convolution that `OneDnnConvolution` stands for."""
    # other subclasses compute their weights anew in each call
    if type(module) is Conv2dSame:
        return module.dilation == (1, 1)
    plain = type(module) is nn.Conv2d and module.padding_mode == "zeros"
    return plain and not isinstance(module.padding, str)


class OneDnnConvolution(nn.Module):
    """A convolution and its activation, for inference.

    convolution: nn.Conv2d, or timm's Conv2dSame, which pads as TensorFlow does; activation: one of
    the types in POINTWISE; size: (H,W) of the inputs. Elsewhere than on a CPU, in another type, at
    another size, the two modules run as they are.
    """

    def __init__(self, convolution, activation, size):
        super().__init__()
        self.convolution, self.activation, self.size = convolution, activation, tuple(size)
        self.pointwise = POINTWISE[type(activation)]
        weight, self.padding = symmetrically_padded(convolution, self.size)
        # not saved: it is the convolution's own, with zeros around it
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, x):
        c = self.convolution
        if x.device.type != "cpu" or x.dtype != torch.float32 or x.shape[2:] != self.size:
            return self.activation(c(x))
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, c.bias, self.padding, c.stride, c.dilation, c.groups, *self.pointwise
        )


def symmetrically_padded(convolution, size):
    """Weights (O,I,h,w) and padding [rows, columns] with which a plain convolution of inputs of
    `size` computes what `convolution` does.

    TensorFlow pads an even side at its end alone, which costs a copy of the whole input. A kernel
    with a row of zeros in front, and the padding on both sides, meets the same pixels.
    """
    weight, padding = convolution.weight.detach(), convolution.padding
    if type(convolution) is nn.Conv2d:
        return weight, list(padding)
    sides = zip(size, convolution.kernel_size, convolution.stride, convolution.dilation)
    # pixels on both ends together, one more of them at the end where the number is odd
    total = [get_same_padding(*side) for side in sides]
    rows, columns = (n % 2 for n in total)
    weight = F.pad(weight, (columns, 0, rows, 0)).contiguous(memory_format=torch.channels_last)
    return weight, [(n + 1) // 2 for n in total]
