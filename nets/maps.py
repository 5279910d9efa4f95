"""Operations on feature maps (N,C,H,W) whose channels lie last in memory.

Convolutions and resizing are fastest in that layout, on a CPU and on a GPU's tensor cores alike. A
chain of layers keeps the layout by itself. A mark at a cell and a matrix product over cells would
lose it; the functions below keep it, in the gradient too.
"""

import torch
import torch.nn.functional as F
from torch import nn


def dilated_convolutions(width, dilations):
    """A trunk of 3x3 convolutions with GELU, `width` channels throughout, one for each dilation."""
    return nn.Sequential(
        *[
            layer
            for d in dilations
            for layer in (nn.Conv2d(width, width, 3, padding=d, dilation=d), nn.GELU())
        ]
    )


def ray_layers(width):
    """Layers from `VolumeGeometry.cell_rays` (N,4,H,W) to maps (N,width,H,W), to be added to
    features."""
    return nn.Sequential(nn.Conv2d(4, width, 1), nn.GELU(), nn.Conv2d(width, width, 1))


def projected(features, projections, grid, margin=0):
    """Backbone maps [(N,C_i,H_i,W_i)] -> their sum (N,C,side,side), each through its own 1x1
    convolution and resized to grid x grid, with `margin` cells of zeros around: side = grid + 2
    margin. Channels lie last in memory.

    Zeros are what a padded convolution finds beyond the edge in any case. Repeated edges would show
    a table where there may be none, the same for all cells of a row.
    """
    total = 0
    for maps, project in zip(features, projections):
        # before resizing, with which a 1x1 convolution commutes: fewer cells, as maps are coarser
        maps = project(maps.contiguous(memory_format=torch.channels_last))
        if maps.shape[-2:] != (grid, grid):
            maps = F.interpolate(maps, size=(grid, grid), mode="bilinear", align_corners=False)
        total = total + maps
    return F.pad(total, [margin] * 4) if margin else total


def mark_cell(x, cells, vector):
    """Add vector (N,C) to maps x (N,C,H,W) at cells (N,2) yx, which are rounded and clamped to the
    map."""
    limit = torch.tensor(x.shape[2:], device=x.device) - 1
    row, column = torch.minimum(cells.round().long().clamp(min=0), limit).unbind(-1)
    sample = torch.arange(len(x), device=x.device)
    # a view in which a cell's channels are one row of memory
    channels_last = x.permute(0, 2, 3, 1)  # (N,H,W,C)
    marked = channels_last.index_put((sample, row, column), vector.to(x.dtype), accumulate=True)
    return marked.permute(0, 3, 1, 2)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, cells):
        ctx.save_for_backward(weights, cells)
        return torch.bmm(weights, cells)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weights, cells = ctx.saved_tensors
        # the second is computed as (N,P,C), channels last, and seen as (N,C,P)
        return torch.bmm(grad, cells.mT), torch.bmm(grad.mT, weights).mT


def product(weights, cells):
    """Weights (N,R,C) times the cells of maps (N,C,P) -> (N,R,P), in the cells' type.

    The cells' gradient has its channels last, as the layers before it have. Autograd's would have
    them first.
    """
    with torch.autocast(cells.device.type, enabled=False):
        return _Product.apply(weights.to(cells.dtype), cells)
