"""Waypoints as classes over image cells x height bins.

Here are the conversion between world and volume, the targets, the loss and the decoding. A volume
coordinate is (z, y, x): height bin, cell row, cell column, continuous, with bin i centred at i.

Dimensions: B batch, T waypoints (or frames), N samples, C channels, H W grid, Z height bins, K
sparse targets, G gripper commands, V = G*Z*H*W classes.

With a margin the volume has cells beyond the image's edges, numbered from the outermost on: H = W =
grid + 2 margin, and the image begins at cell `margin`. Such a cell has a ray as any other, but no
picture: its image features are zeros, which is what convolutions find beyond an edge anyway.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import camera
from nets.cross_entropy import product_cross_entropy, sparse_cross_entropy
from nets.text import InstructedConfig, InstructedPolicy
from policy import fingers_closed, flag

HEIGHT_MARGIN = 0.02  # metres beyond the heights of the training data that the bins still cover
STEEP = 0.1  # metres of height that a ray loses at least over a metre of depth, see `cell_rays`


def neighbours(radius, dims, device):
    """Integer offsets (K,dims) of a cube with the given radius."""
    steps = torch.arange(-radius, radius + 1, device=device)
    return torch.cartesian_prod(*[steps] * dims).view(-1, dims)


def soft_targets(coordinates, shape, sigma, radius=2):
    """Sparse Gaussian targets about continuous coordinates.

    coordinates (N,D) in bins, shape (D,), sigma in bins -> flat indices (N,K), weights (N,K) that
    sum to one over the K = (2 radius + 1)^D bins. Bins outside weigh nothing. sigma 0 gives the
    nearest bin alone (a hard target). Coordinates outside are clamped to the border.
    """
    limit = torch.tensor(shape, device=coordinates.device, dtype=coordinates.dtype) - 1
    inside = torch.minimum(coordinates.clamp(min=0), limit)
    nearest = inside.round().long()
    if sigma <= 0:
        bins = nearest[:, None]  # (N,1,D)
        weights = torch.ones(len(nearest), 1, device=nearest.device, dtype=coordinates.dtype)
    else:
        bins = nearest[:, None] + neighbours(radius, len(shape), nearest.device)  # (N,K,D)
        valid = ((bins >= 0) & (bins <= limit.long())).all(-1)
        # centred at the true coordinate, not at its bin: where it lies inside the bin is learned
        # too
        weights = torch.exp(-((bins - inside[:, None]) ** 2).sum(-1) / (2 * sigma**2)) * valid
        weights = weights / weights.sum(-1, keepdim=True)
        # bins outside weigh 0: any valid index does for them
        bins = torch.minimum(bins.clamp(min=0), limit.long())
    return flat_index(bins, shape), weights


def flat_index(bins, shape):
    """Integer bins (...,D) -> row-major flat indices (...)."""
    flat = bins[..., 0]
    for d in range(1, len(shape)):
        flat = flat * shape[d] + bins[..., d]
    return flat


def local_soft_argmax(logits, shape, radius=2):
    """Expected coordinate (N,D) under the softmax in a cube about the argmax of logits (N,V).

    V = prod(shape). radius 0 is the plain argmax. This is more precise than a cell, and it does not
    average several modes, as a soft-argmax over the whole volume does.
    """
    return soft_argmax_at(logits, logits.argmax(-1), 0, shape, radius)


def soft_argmax_at(logits, best, first, shape, radius):
    """`local_soft_argmax` (N,D) about a peak that is known.

    best (N,): its flat index in a volume of `shape`; first (N,) or 0: where that volume begins in
    a row of logits.
    """
    # the flat index taken apart into one per dimension, the last first
    parts = []
    for size in reversed(shape):
        parts.append(best % size)
        best = best // size
    bins = torch.stack(parts[::-1], -1)  # (N,D)
    if radius == 0:
        return bins.double()
    around = bins[:, None] + neighbours(radius, len(shape), logits.device)
    limit = torch.tensor(shape, device=logits.device) - 1
    valid = ((around >= 0) & (around <= limit)).all(-1)
    clamped = torch.minimum(around.clamp(min=0), limit)
    index = flat_index(clamped, shape) + torch.as_tensor(first, device=logits.device)[..., None]
    near = logits.gather(-1, index).double().masked_fill(~valid, -torch.inf)
    mean = (near.softmax(-1)[..., None] * clamped).sum(1)
    # between allowed bins the mean may fall into one that is excluded (-inf): then it is the peak
    place = flat_index(mean.round().long(), shape) + torch.as_tensor(first, device=logits.device)
    excluded = logits.gather(-1, place[..., None]) == -torch.inf  # (N,1)
    return torch.where(excluded, bins.double(), mean)


@dataclass
class VolumeConfig(InstructedConfig):
    """What policies that classify waypoints over image cells x height bins share."""

    grid: int = flag(64, "prediction grid H = W", low=2)
    n_height_bins: int = flag(32, "height bins Z", low=2)
    margin: int = flag(
        0,
        "cells by which the volume reaches beyond each edge of the image, for waypoints that the "
        "image does not show",
        low=0,
    )
    target: str = flag("soft", "one-hot or Gaussian cell and height targets", ("soft", "hard"))
    sigma: float = flag(0.7, "standard deviation of soft targets, cells and bins", above=0)
    decode: str = flag("soft", "local soft-argmax, or plain argmax", ("soft", "argmax"))

    @property
    def side(self):
        """Cells along a side of the volume, H = W: those of the image and of its margin."""
        return self.grid + 2 * self.margin


class VolumeGeometry(InstructedPolicy):
    """A policy whose waypoints are (cell, height bin), with conversions between world and volume.

    Points have any leading dimensions (...,3). A batch's cameras have the first of these: K (B,3,3)
    serves points (B,T,3).
    """

    def __init__(self, config, channels):
        super().__init__(config, channels)
        # metres: world heights that the bins span, until fit_statistics sets them
        self.register_buffer("height_range", torch.tensor([0.9, 1.3], dtype=torch.float64))

    def fit_statistics(self, statistics):
        """Set the parent's statistics and the heights' range, HEIGHT_MARGIN wider than the data."""
        super().fit_statistics(statistics)
        low, high = statistics["height_range"]
        self.height_range.copy_(torch.tensor([low - HEIGHT_MARGIN, high + HEIGHT_MARGIN]))

    @property
    def volume_shape(self):
        return self.config.n_height_bins, self.config.side, self.config.side

    @property
    def beyond(self):
        """Pixels by which the volume reaches beyond each edge of the image."""
        return self.config.margin * self.config.image_size / self.config.grid

    # -- between world and volume ------------------------------------------------------------------

    def pixel_to_cell(self, pixel):
        """Pixel coordinates -> continuous cells, of which the first lies `margin` before the
        image's.
        """
        c = self.config
        return camera.pixel_to_cell(pixel, c.grid, c.image_size) + c.margin

    def cell_to_pixel(self, cell):
        """Continuous cells -> pixel coordinates, which in the margin lie outside the image."""
        c = self.config
        return camera.cell_to_pixel(cell - c.margin, c.grid, c.image_size)

    def cameras(self, batch, ndim):
        """The batch's K and E with ones inserted, to serve points of `ndim` dimensions."""
        K, E = batch["K"], batch["E"]
        while K.ndim < ndim + 1:
            K, E = K.unsqueeze(-3), E.unsqueeze(-3)
        return K, E

    def cells(self, points, batch):
        """World points (...,3) -> continuous cells yx (...,2)."""
        # u runs along x, the columns, and v along y, the rows
        u, v, _ = camera.project(points, *self.cameras(batch, points.ndim))
        return torch.stack([self.pixel_to_cell(v), self.pixel_to_cell(u)], -1)

    def coordinates(self, points, batch):
        """World points (...,3) -> continuous volume coordinates zyx (...,3)."""
        z = camera.height_to_bin(points[..., 2], *self.height_range, self.config.n_height_bins)
        return torch.cat([z[..., None], self.cells(points, batch)], -1)

    def points(self, coordinates, batch):
        """Continuous volume coordinates zyx (...,3) -> world points (...,3)."""
        n_bins = self.config.n_height_bins
        height = camera.bin_to_height(coordinates[..., 0], *self.height_range, n_bins)
        v, u = (self.cell_to_pixel(coordinates[..., i]) for i in (1, 2))
        return camera.unproject(u, v, height, *self.cameras(batch, coordinates.ndim))

    def cell_rays(self, batch):
        """What each cell's ray tells of the camera: (B,4,H,W) float32, of single frames (B,...).

        Channels 0 and 1: where the ray passes the EEF's height, to the right of the EEF and ahead
        of it, in units of 10 cm, clamped at 1 m. Channels 2 and 3: the same parts of the ray's
        direction, times 4. They tell a moved camera from the default one: which way "up" goes
        through cells and height bins depends on it. Rays that hardly descend, above the horizon of
        anything on a table, are taken as descending by STEEP.

        Right and ahead are the camera's, so that turning the world with the camera changes nothing.
        Told in the world's x and y, a policy trained on one half of the table knew where that is,
        and went there whatever it saw.
        """
        (K, E), eef = self.cameras(batch, 4), batch["eef_pos"][:, None, None]
        cells = torch.arange(self.config.side, device=K.device, dtype=K.dtype)
        pixels = self.cell_to_pixel(cells)
        v, u = torch.meshgrid(pixels, pixels, indexing="ij")
        direction = camera.ray(u, v, K, E)  # (B,H,W,3)
        # world x and y per metre of z; direction z is negative, as cameras look down
        slope = direction[..., :2] / direction[..., 2:].clamp(max=-STEEP)
        # from the camera's position E[:3, 3] along the ray to the EEF's height
        passed = E[..., :2, 3] + slope * (eef[..., 2:] - E[..., 2:3, 3]) - eef[..., :2]
        # rows: the camera's right along the floor, and ahead, a quarter turn from it (B,1,1,2,2)
        right = F.normalize(E[..., :2, 0], dim=-1)
        axes = torch.stack([right, torch.stack([-right[..., 1], right[..., 0]], -1)], -2)
        passed, along = (
            (axes @ vectors[..., None])[..., 0]
            for vectors in (passed, F.normalize(direction, dim=-1)[..., :2])
        )
        return torch.cat([10 * passed.clamp(-1, 1), 4 * along], -1).permute(0, 3, 1, 2).float()

    # -- losses and decoding -----------------------------------------------------------------------

    def volume_targets(self, coordinates, gripper=None):
        """Coordinates zyx (N,3) -> target classes (N,K) and their probabilities (N,K) float32.

        gripper (N,) in {0, 1}: the command, where it is an axis of the volume.
        """
        c = self.config
        index, share = soft_targets(
            coordinates, self.volume_shape, c.sigma if c.target == "soft" else 0.0
        )
        # the gripper is the outermost axis: class = gripper * Z*H*W + class in the volume
        if gripper is not None:
            index = index + gripper[:, None] * math.prod(self.volume_shape)
        return index, share.float()

    def volume_loss(self, logits, coordinates, gripper=None):
        """Cross-entropy (N,) of logits (N, G*Z*H*W) at coordinates zyx (N,3); gripper (N,) in {0,
        1} where G = 2 is joint.
        """
        return sparse_cross_entropy(logits, *self.volume_targets(coordinates, gripper))

    def product_loss(self, weights, bias, maps, coordinates, gripper=None):
        """`volume_loss` (B,T) of the volumes weights (T,G*Z,C) . maps (B,C,H,W) + bias (T,G*Z).

        The volumes are never stored. coordinates zyx (B,T,3), gripper (B,T) or None.
        """
        B, T = coordinates.shape[:2]
        gripper = None if gripper is None else gripper.flatten()
        index, share = self.volume_targets(coordinates.flatten(0, 1), gripper)
        return product_cross_entropy(
            weights[None], bias[None], maps.flatten(2), index.view(B, T, -1), share.view(B, T, -1)
        )

    def decode_volume(self, logits):
        """Logits (N,G,Z,H,W) -> coordinates zyx (N,3), gripper (N,) in {0..G-1}: the command of the
        highest peak.
        """
        # of each command's volume the peak: its place and its value, (N,G)
        volumes = logits.flatten(2)
        best = volumes.argmax(-1)
        gripper = volumes.gather(-1, best[..., None])[..., 0].argmax(-1)
        # the chosen volume is read where it lies: to copy it takes longer than to find its peak
        best = best.gather(1, gripper[:, None])[:, 0]
        radius = 2 if self.config.decode == "soft" else 0
        found = soft_argmax_at(
            logits.flatten(1), best, gripper * volumes.shape[2], self.volume_shape, radius
        )
        return found, gripper

    def without_reached(self, logits, batch):
        """Logits (N,2,Z,H,W) with -inf at voxels where the EEF already is, gripper unchanged.

        No label lies nearer than `min_travel`, and a policy that answers "stay" would answer so for
        ever. Where `stay` is an answer, logits are returned as they are. batch: eef_pos (N,3),
        gripper_width (N,), K, E.
        """
        if self.config.stay:
            return logits
        Z, H, W = self.volume_shape
        bins = lambda n: torch.arange(n, device=logits.device, dtype=torch.float64)
        # the centre of every voxel (Z,H,W,3), and in the world (N,Z,H,W,3)
        zyx = torch.stack(torch.meshgrid(bins(Z), bins(H), bins(W), indexing="ij"), -1)
        points = self.points(zyx.expand(len(logits), -1, -1, -1, -1), batch)
        distance = (points - batch["eef_pos"].double()[:, None, None, None]).norm(dim=-1)
        reached = distance < 0.75 * self.config.min_travel  # (N,Z,H,W)
        # the command that the fingers show; with the other one, any place is an answer
        command = fingers_closed(batch["gripper_width"], self.config)
        same = F.one_hot(command, logits.shape[1]).bool()[..., None, None, None]  # (N,2,1,1,1)
        return logits.masked_fill(reached[:, None] & same, -torch.inf)
