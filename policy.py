"""The interface that every policy has, and the pieces they share.

Dimensions: B batch, T waypoints (or frames), N tokens, C channels, H W grid, Z height bins, Q queries, G gripper commands.
Batches hold metres, radians, pixels and world coordinates; cells and bins exist only inside a policy:

    features [(B,C_i,H_i,W_i) float16], eef_pos (B,3), gripper_width (B,) between the fingers, K (B,3,3), E (B,4,4),
    target_pos (B,T,3), target_rot (B,T,3,3), target_gripper (B,T) in {0 open, 1 close}, mask (B,T) in {0, 1}

Policies with a history take windows of T frames instead, one waypoint each: what is (B,...) above is (B,T,...), see data_ar.py.
"""
import time
from dataclasses import dataclass, field, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import camera
from rot_utils import euler_to_matrix, matrix_to_euler, wrap_angle
from runtime import UserError

HALF_OPEN = 0.04  # metres between the fingers: below, they are measured closed
HEIGHT_MARGIN = 0.02  # metres beyond the heights of the training data that the bins still cover
ROTATION_MARGIN = 0.02  # radians, likewise
STEEP = 0.1  # metres of height that a ray loses over a metre of depth, at least, see `cell_rays`


def flag(default, help, choices=None):
    """A config field that becomes a command-line flag."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class PolicyConfig:
    """What every policy is configured by. It travels in the checkpoint. `presets`: {name: other defaults}, of train.py's flags too."""
    presets = {}
    backbone: str = flag("auto", "frozen features: auto, efficientnet_lite0, dinov2_vitb14, dinov2_vits14, dinov3_vits16, any timm model")
    image_size: int = flag(448, "image side, pixels")
    waypoint_stride: int = flag(5, "control steps between waypoints; at 1 nothing moves")
    min_travel: float = flag(0.02, "metres that a waypoint lies ahead at least: one nearer than a cell is where the EEF already is, for ever")
    retreat: bool = flag(False, "train on frames after the last release too")
    stay: bool = flag(False, "to stay is an answer, trained on (with the retreat) where a demonstration ends so")


def add_config_flags(parser, config_class):
    """One flag per field of a config dataclass."""
    group = parser.add_argument_group(config_class.__name__)
    for f in fields(config_class):
        kind = f.type if isinstance(f.type, type) else {"int": int, "float": float, "str": str, "bool": bool}[f.type]
        if kind is bool:
            import argparse
            group.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, default=f.default, help=f.metadata["help"])
        else:
            group.add_argument(f"--{f.name}", type=kind, default=f.default, choices=f.metadata["choices"],
                               help=f"{f.metadata['help']} ({f.default})")


@dataclass
class Waypoint:
    """What a policy answers: the next EEF target in the world frame and the trajectory it belongs to.

    position (3,) m; rotation (3,3) or None; gripper -1 opens, +1 closes; trajectory (T,3) m; grippers (T,) in {-1, +1}; rotations
    (T,3,3) or None.
    """
    position: np.ndarray
    rotation: np.ndarray
    gripper: float
    trajectory: np.ndarray
    grippers: np.ndarray
    rotations: np.ndarray = None


class Policy(nn.Module):
    """A policy: `loss` over a batch, `act` on an observation. `seconds` adds up where `act` spends its time."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self._backbone = []  # in a list, so that the frozen features are no part of the state dict
        self.seconds = {"features": 0.0, "policy": 0.0}

    @property
    def backbone(self):
        return self._backbone[0]

    def attach(self, backbone):
        """Give the policy its frozen features (see backbone.py), which are not saved with it. Returns self."""
        self._backbone = [backbone]
        return self

    def fit_statistics(self, statistics):
        """Set normalisation buffers from the training data (see data.py)."""
        raise NotImplementedError

    def loss(self, batch):
        """Batch -> {"loss": scalar, further detached numbers}."""
        raise NotImplementedError

    def predict(self, batch):
        """Batch without targets -> {"position" (B,T,3), "gripper" (B,T) in {0, 1}, "rotation" (B,T,3,3)} as tensors."""
        raise NotImplementedError

    def forward(self, batch):
        return self.loss(batch)  # so that DistributedDataParallel's hooks run

    def check(self):
        """Raise UserError for settings that contradict each other."""

    def reset(self):
        """Start of an episode: forget the history."""

    def volume_parameters(self):
        """Parameters of the volume head and of all that it reads: what `--freeze_steps` holds still in a finetune."""
        return []

    def deployment_stats(self):
        """JSON-able numbers that a robot needs beside the checkpoint to read the policy's answers; none for most policies."""
        return None

    def param_groups(self, weight_decay):
        """Optimiser groups: matrices and kernels decay, biases, norms and embeddings do not."""
        trainable = [p for p in self.parameters() if p.requires_grad]
        return [{"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
                {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0}]

    def decide(self, batch):
        """`predict` for one observation (B = 1), in the order in which an episode brings them; T is the trajectory's."""
        return self.predict(batch)

    @torch.inference_mode()
    def act(self, observation):
        """Observation -> Waypoint."""
        start = time.perf_counter()
        device = next(self.parameters()).device
        maps = [m.to(device) for m in self.backbone(torch.from_numpy(observation.image[None]))]
        middle = time.perf_counter()
        tensor = lambda x: torch.as_tensor(np.asarray(x), dtype=torch.float64, device=device)[None]
        out = self.decide({"features": maps, "eef_pos": tensor(observation.eef_pos), "K": tensor(observation.K),
                           "gripper_width": tensor(observation.gripper_width), "E": tensor(observation.E)})
        position = out["position"][0].double().cpu().numpy()
        grippers = np.where(out["gripper"][0].cpu().numpy() > 0, 1.0, -1.0)
        rotations = out["rotation"][0].double().cpu().numpy()
        self.seconds["features"] += middle - start
        self.seconds["policy"] += time.perf_counter() - middle
        return Waypoint(position[0], rotations[0], float(grippers[0]), position, grippers, rotations)


def neighbours(radius, dims, device):
    """Integer offsets (K,dims) of a cube with the given radius."""
    line = torch.arange(-radius, radius + 1, device=device)
    return torch.cartesian_prod(*[line] * dims).view(-1, dims)


def soft_targets(coordinates, shape, sigma, radius=2):
    """Sparse Gaussian targets about continuous coordinates.

    coordinates (N,D) in bins, shape (D,) bins -> flat indices (N,K), weights (N,K) that sum to one over the bins inside.
    sigma 0 gives the nearest bin alone (a hard target). Coordinates outside are clamped to the border.
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
        weights = torch.exp(-((bins - inside[:, None]) ** 2).sum(-1) / (2 * sigma**2)) * valid
        weights = weights / weights.sum(-1, keepdim=True)
        bins = torch.minimum(bins.clamp(min=0), limit.long())
    return flat_index(bins, shape), weights


def flat_index(bins, shape):
    """Integer bins (...,D) -> row-major flat indices (...)."""
    flat = bins[..., 0]
    for d in range(1, len(shape)):
        flat = flat * shape[d] + bins[..., d]
    return flat


class _SparseCrossEntropy(torch.autograd.Function):
    """The volume has 26 million logits a batch: one pass and one temporary in each direction, where autograd's logsumexp,
    gather and scatter take six."""

    @staticmethod
    def forward(ctx, logits, index, weight):
        top = logits.amax(-1, keepdim=True).float()
        normaliser = torch.stack([(row.float() - m).exp_().sum().log() for row, m in zip(logits, top)]) + top[:, 0]
        ctx.save_for_backward(logits, index, weight, normaliser)
        return normaliser - (logits.gather(-1, index).float() * weight).sum(-1)

    @staticmethod
    def backward(ctx, grad):
        logits, index, weight, normaliser = ctx.saved_tensors
        slope = torch.empty_like(logits)
        for row, out, z, g in zip(logits, slope, normaliser, grad):  # a row fits the cache
            out.copy_((row.float() - z).exp_().mul_(g))
        slope.scatter_add_(-1, index, (-weight * grad[:, None]).to(slope.dtype))
        return slope, None, None


def sparse_cross_entropy(logits, index, weight):
    """Cross-entropy (N,) of logits (N,V) against sparse target distributions: index (N,K), weight (N,K) summing to one.
    Computed in fp32 whatever the logits' type; differentiable in the logits alone."""
    return _SparseCrossEntropy.apply(logits, index, weight.float())


def local_soft_argmax(logits, shape, radius=2):
    """Expected coordinate (N,D) under the softmax restricted to a cube about the argmax of logits (N,V), V = prod(shape).

    radius 0 is the plain argmax. Sub-cell precision without the bias that a global soft-argmax has for several modes.
    """
    best = logits.argmax(-1)
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
    near = logits.gather(-1, flat_index(clamped, shape)).double().masked_fill(~valid, -torch.inf)
    return (near.softmax(-1)[..., None] * clamped).sum(1)


@dataclass
class FittedConfig(PolicyConfig):
    """What policies with rotations in bins share."""
    n_rot_bins: int = flag(32, "bins per Euler axis")
    rotation_weight: float = flag(0.1, "weight of the rotation loss")


class FittedPolicy(Policy):
    """A policy with statistics of its training data as buffers: normalised features, rotations in bins per Euler axis.
    `channels`: of the backbone's maps."""

    def __init__(self, config, channels):
        super().__init__(config)
        for i, n in enumerate(channels):
            self.register_buffer(f"feature_mean_{i}", torch.zeros(n))
            self.register_buffer(f"feature_std_{i}", torch.ones(n))
        self.register_buffer("euler_range", torch.tensor([[-np.pi, np.pi]] * 3, dtype=torch.float64))  # radians, unwrapped

    def fit_statistics(self, statistics):
        """Euler ranges and feature normalisation from the training data; see `data.WaypointDataset.statistics`."""
        euler = torch.as_tensor(statistics["euler_range"])
        self.euler_range.copy_(euler + torch.tensor([-ROTATION_MARGIN, ROTATION_MARGIN]))
        for i, (mean, std) in enumerate(statistics["features"]):
            getattr(self, f"feature_mean_{i}").copy_(torch.as_tensor(mean))
            getattr(self, f"feature_std_{i}").copy_(torch.as_tensor(std))

    def normalised(self, features):
        """Backbone maps [(...,C,H,W) float16] -> the same in float32 with zero mean and unit deviation a channel."""
        return [(maps.float() - getattr(self, f"feature_mean_{i}").view(-1, 1, 1)) / getattr(self, f"feature_std_{i}").view(-1, 1, 1)
                for i, maps in enumerate(features)]

    def euler_bins(self, rotation):
        """Rotations (...,3,3) -> bins (...,3) per Euler axis; angles are unwrapped about the middle of their range."""
        low, high = self.euler_range[:, 0].cpu().numpy(), self.euler_range[:, 1].cpu().numpy()
        euler = wrap_angle(matrix_to_euler(rotation.cpu().numpy()), (low + high) / 2)
        bins = np.floor((euler - low) / (high - low) * self.config.n_rot_bins).astype(int)
        return torch.from_numpy(bins.clip(0, self.config.n_rot_bins - 1)).to(rotation.device)

    def decode_rotation(self, logits):
        """Logits (...,3,bins) -> rotations (...,3,3) at the bins' centres."""
        return self.euler_rotation(logits.argmax(-1).double())

    def euler_rotation(self, bins):
        """Bins (...,3) per Euler axis, which may lie between two -> rotations (...,3,3)."""
        low, high = self.euler_range.unbind(-1)
        euler = low + (bins + 0.5) / self.config.n_rot_bins * (high - low)
        return torch.from_numpy(euler_to_matrix(euler.cpu().numpy())).to(bins.device)

    def rotation_loss(self, logits, rotation):
        """Cross-entropy (N,) averaged over the axes, of logits (N,3,bins) at rotations (N,3,3)."""
        return F.cross_entropy(logits.float().transpose(1, 2), self.euler_bins(rotation), reduction="none").mean(-1)


@dataclass
class VolumeConfig(FittedConfig):
    """What policies that classify waypoints over image cells x height bins share."""
    grid: int = flag(64, "prediction grid H = W")
    n_height_bins: int = flag(32, "height bins Z")
    target: str = flag("soft", "one-hot or Gaussian cell and height targets", ("soft", "hard"))
    sigma: float = flag(0.7, "standard deviation of soft targets, cells and bins")
    decode: str = flag("soft", "local soft-argmax, or plain argmax", ("soft", "argmax"))


class VolumeGeometry(FittedPolicy):
    """A policy whose waypoints are (cell, height bin): the way between world and volume.

    Points have any leading dimensions (...,3); cameras of a batch have the first of them: K (B,3,3) serves points (B,T,3).
    """

    def __init__(self, config, channels):
        super().__init__(config, channels)
        self.register_buffer("height_range", torch.tensor([0.9, 1.3], dtype=torch.float64))  # metres

    def fit_statistics(self, statistics):
        """As of the parent, and the range of heights."""
        super().fit_statistics(statistics)
        low, high = statistics["height_range"]
        self.height_range.copy_(torch.tensor([low - HEIGHT_MARGIN, high + HEIGHT_MARGIN]))

    @property
    def volume_shape(self):
        return self.config.n_height_bins, self.config.grid, self.config.grid

    # -- between world and volume ------------------------------------------------------------------------------------

    def cameras(self, batch, ndim):
        """The batch's K and E with ones inserted, so that they serve points of `ndim` dimensions."""
        K, E = batch["K"], batch["E"]
        while K.ndim < ndim + 1:
            K, E = K.unsqueeze(-3), E.unsqueeze(-3)
        return K, E

    def cells(self, points, batch):
        """World points (...,3) -> continuous cells yx (...,2)."""
        u, v, _ = camera.project(points, *self.cameras(batch, points.ndim))
        to_cell = lambda x: camera.pixel_to_cell(x, self.config.grid, self.config.image_size)
        return torch.stack([to_cell(v), to_cell(u)], -1)

    def coordinates(self, points, batch):
        """World points (...,3) -> continuous volume coordinates zyx (...,3)."""
        z = camera.height_to_bin(points[..., 2], *self.height_range, self.config.n_height_bins)
        return torch.cat([z[..., None], self.cells(points, batch)], -1)

    def points(self, coordinates, batch):
        """Continuous volume coordinates zyx (...,3) -> world points (...,3)."""
        c = self.config
        height = camera.bin_to_height(coordinates[..., 0], *self.height_range, c.n_height_bins)
        v, u = (camera.cell_to_pixel(coordinates[..., i], c.grid, c.image_size) for i in (1, 2))
        return camera.unproject(u, v, height, *self.cameras(batch, coordinates.ndim))

    def cell_rays(self, batch):
        """What tells a moved camera from the default one, cell by cell, of single frames (B,...) -> (B,4,H,W) float32.

        Where the cell's ray passes the EEF's height, x and y from the EEF in 10 cm (at most 1 m), and how far along x and y it gets
        with a metre of height: which way "up" goes through cells and height bins depends on the camera. Rays that hardly descend,
        above the horizon of anything on a table, are taken as descending by STEEP.
        """
        c, (K, E), eef = self.config, self.cameras(batch, 4), batch["eef_pos"][:, None, None]
        line = camera.cell_to_pixel(torch.arange(c.grid, device=K.device, dtype=K.dtype), c.grid, c.image_size)
        v, u = torch.meshgrid(line, line, indexing="ij")
        direction = camera.ray(u, v, K, E)  # (B,H,W,3)
        slope = direction[..., :2] / direction[..., 2:].clamp(max=-STEEP)
        passed = E[..., :2, 3] + slope * (eef[..., 2:] - E[..., 2:3, 3]) - eef[..., :2]
        return torch.cat([10 * passed.clamp(-1, 1), slope], -1).permute(0, 3, 1, 2).float()

    # -- losses and decoding -----------------------------------------------------------------------------------------

    def volume_loss(self, logits, coordinates, gripper=None):
        """Cross-entropy (N,) of logits (N, G*Z*H*W) at coordinates zyx (N,3); gripper (N,) in {0, 1} where G = 2 is joint."""
        c = self.config
        index, weight = soft_targets(coordinates, self.volume_shape, c.sigma if c.target == "soft" else 0.0)
        if gripper is not None:
            index = index + gripper[:, None] * int(np.prod(self.volume_shape))
        return sparse_cross_entropy(logits, index, weight.float())

    def decode_volume(self, logits):
        """Logits (N,G,Z,H,W) -> coordinates zyx (N,3), gripper (N,) in {0..G-1}: the command of the highest peak."""
        gripper = logits.flatten(2).amax(-1).argmax(-1)
        volume = logits[torch.arange(len(logits), device=logits.device), gripper].flatten(1)
        return local_soft_argmax(volume, self.volume_shape, 2 if self.config.decode == "soft" else 0), gripper

    def elsewhere(self, logits, batch):
        """Logits (N,2,Z,H,W) without the voxels where the EEF already is, gripper unchanged: no label lies nearer than
        `min_travel`, and a policy that answers "here" would answer so for ever. As they are where `stay` is an answer.
        batch: eef_pos (N,3), gripper_width (N,), K, E."""
        if self.config.stay:
            return logits
        Z, H, W = self.volume_shape
        line = lambda n: torch.arange(n, device=logits.device, dtype=torch.float64)
        zyx = torch.stack(torch.meshgrid(line(Z), line(H), line(W), indexing="ij"), -1)
        points = self.points(zyx.expand(len(logits), -1, -1, -1, -1), batch)
        here = (points - batch["eef_pos"].double()[:, None, None, None]).norm(dim=-1) < 0.75 * self.config.min_travel  # (N,Z,H,W)
        command = fingers_closed(batch["gripper_width"])
        same = F.one_hot(command, logits.shape[1]).bool()[..., None, None, None]  # (N,2,1,1,1)
        return logits.masked_fill(here[:, None] & same, -torch.inf)


def dilated_convolutions(width, dilations):
    """A trunk of 3x3 convolutions with GELU, `width` channels throughout, one for each dilation."""
    return nn.Sequential(*[layer for d in dilations for layer in (nn.Conv2d(width, width, 3, padding=d, dilation=d), nn.GELU())])


def ray_layers(width):
    """From `cell_rays` to what is added to maps of `width` channels."""
    return nn.Sequential(nn.Conv2d(4, width, 1), nn.GELU(), nn.Conv2d(width, width, 1))


def fingers_closed(widths):
    """Widths between the fingers in m -> 1 where they are measured closed, else 0; long, of the same shape."""
    return (widths < HALF_OPEN).long()


def mark_cell(x, cells, vector):
    """Add vector (N,C) to maps x (N,C,H,W) at cells (N,2) yx, rounded and kept inside."""
    limit = torch.tensor(x.shape[2:], device=x.device) - 1
    place = torch.minimum(cells.round().long().clamp(min=0), limit)
    mark = torch.zeros(len(x), 1, *x.shape[2:], device=x.device, dtype=x.dtype)
    mark[torch.arange(len(x), device=x.device), 0, place[:, 0], place[:, 1]] = 1
    return x + mark * vector[..., None, None]


def check_heads(config):
    """Raise UserError unless --n_heads divides --dim."""
    if config.dim % config.n_heads:
        raise UserError(f"--dim {config.dim} is no multiple of --n_heads {config.n_heads}")


def masked_mean(values, mask):
    """Mean of values (N,) where mask (N,) is one; 0 where it never is."""
    return (values * mask).sum() / mask.sum().clamp(min=1)
