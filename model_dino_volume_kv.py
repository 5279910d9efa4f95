"""DinoVolumeKV: all waypoints at once, from a volume that is a product of queries and keys.

    logits[t,z,y,x] = query(t,z) . key(y,x) / sqrt(dim)

Queries do not know the image. They are encodings of the height bin and of the waypoint's number,
sinusoidal or learned, through an MLP. Keys come from the pixel features of model.PixelTrunk, in
which the EEF's cell is marked. A waypoint's keypoint is its voxel (z, y, x). Gripper and rotation
are read at the keypoint: the true one in training (teacher forcing), the decoded one in use.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from model import PixelTrunk, TrunkConfig
from policy import flag
from runtime import UserError

ENCODINGS = ("sin", "learned")


@dataclass
class DinoVolumeKVConfig(TrunkConfig):
    """Configuration of DinoVolumeKV."""

    n_window: int = flag(8, "future waypoints T")
    grid: int = flag(56, "prediction grid H = W", low=2)
    dim: int = flag(128, "channels of queries, keys and tokens (d_model)")
    height_enc: str = flag("sin", "encoding of the height bin in the queries", ENCODINGS)
    time_enc: str = flag("sin", "encoding of the waypoint's number in the queries", ENCODINGS)
    rotation_weight: float = flag(0.5, "weight of the rotation loss")
    rotation_decode: str = flag(
        "soft",
        "soft-argmax over the bins about the highest, or that bin's centre",
        ("soft", "argmax"),
    )

    presets = {
        **TrunkConfig.presets,
        "small": {**TrunkConfig.presets["small"], "max_steps": 1600, "val_every": 400},
    }


def sinusoid(index, dim, base=10000.0):
    """Positional encoding of index (...) -> (...,dim): sines and cosines at frequencies
    base^(-2i/dim) (Vaswani et al. 2017).
    """
    frequency = base ** (-torch.arange(0, dim, 2, device=index.device, dtype=torch.float32) / dim)
    angle = index[..., None].float() * frequency
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


class IndexEncoding(nn.Module):
    """Integer index (...) in 0..n-1 -> (...,dim): "sin", a sinusoid through a linear layer, or
    "learned", a table.
    """

    def __init__(self, kind, n, dim):
        super().__init__()
        self.kind, self.dim = kind, dim
        if kind == "sin":
            if dim % 2:
                raise UserError(f"--dim {dim}: sines and cosines need an even one")
            self.linear = nn.Linear(dim, dim)
        else:
            self.table = nn.Parameter(torch.randn(n, dim) * 0.5)

    def forward(self, index):
        return self.linear(sinusoid(index, self.dim)) if self.kind == "sin" else self.table[index]


def symmetric_soft_argmax(logits, radius):
    """Expected bin (...) under the softmax of logits (...,bins) in a window about the highest one.

    The window has equally many bins on both sides: `radius`, or as many as there are before the
    nearer end. If only one side were cut off, every value near an end would be pulled inwards.
    """
    last, best = logits.shape[-1] - 1, logits.argmax(-1, keepdim=True)
    apart = torch.arange(last + 1, device=logits.device) - best
    # bins on either side (...,1)
    reach = torch.minimum(best, last - best).clamp(max=radius)
    shares = logits.double().masked_fill(apart.abs() > reach, -torch.inf).softmax(-1)
    # the highest bin plus the expected offset from it
    return best[..., 0].double() + (shares * apart).sum(-1)


class DinoVolumeKV(PixelTrunk):
    """See the module's docstring. A subclass changes what is read off at the keypoints:
    `build_heads`, `predict_from_keypoints`.
    """

    holds_volume = True
    # prefixes of the parameters that are no part of the volume
    heads = ("token_", "gripper_head", "rotation_head")

    def __init__(self, config, channels):
        super().__init__(config, channels)
        c = config
        self.height_code = IndexEncoding(c.height_enc, c.n_height_bins, c.dim)
        self.time_code = IndexEncoding(c.time_enc, c.n_window, c.dim)
        # the two factors of the volume: queries (T,Z,dim) and keys (B,dim,H,W)
        self.query = nn.Sequential(nn.Linear(c.dim, c.dim), nn.GELU(), nn.Linear(c.dim, c.dim))
        self.key = nn.Conv2d(c.width, c.dim, 1)
        self.build_heads()

    def build_heads(self):
        c = self.config
        self.token_pixel = nn.Linear(c.width, c.dim)
        self.token_time = IndexEncoding(c.time_enc, c.n_window, c.dim)
        self.gripper_head = nn.Linear(c.dim, 2)
        self.rotation_head = nn.Linear(c.dim, 3 * c.n_rot_bins)

    def volume_parameters(self):
        return [p for name, p in self.named_parameters() if not name.startswith(self.heads)]

    # -- the network -------------------------------------------------------------------------------

    def queries(self):
        """(T,Z,C), the same for every image."""
        device, c = self.height_range.device, self.config
        time, height = (
            torch.arange(c.n_window, device=device),
            torch.arange(c.n_height_bins, device=device),
        )
        return self.query(self.time_code(time)[:, None] + self.height_code(height)[None])

    def volume_logits(self, features):
        """Trunk features (B,C,H,W) -> logits (B,T,Z,H,W)."""
        queries, keys = self.queries() * self.config.dim**-0.5, self.key(features)
        T, Z, C = queries.shape
        # a 1x1 convolution with the queries as its filters: a product with every cell's key
        return F.conv2d(keys, queries.to(keys.dtype).reshape(T * Z, C, 1, 1)).unflatten(1, (T, Z))

    def keypoints(self, coordinates):
        """Continuous coordinates zyx (B,T,3) -> the nearest bins inside, integers."""
        last = torch.tensor(self.volume_shape, device=coordinates.device) - 1
        return torch.minimum(coordinates.round().long().clamp(min=0), last)

    def predict_from_keypoints(self, features, kp_zyx, valid=None):
        """Trunk features (B,C,H,W), keypoints (B,T,3) int, valid (B,T) bool or None for all ->
        gripper logits (B,T,2), rotation logits (B,T,A,bins) of the A angles that a rotation is told
        by."""
        time = torch.arange(kp_zyx.shape[1], device=kp_zyx.device)
        # one token a waypoint (B,T,dim), from the pixel feature and the waypoint's number
        token = F.gelu(
            self.token_pixel(self.at_cells(features, kp_zyx[..., 1:])) + self.token_time(time)
        )
        return self.gripper_head(token), self.rotation_head(token).unflatten(
            -1, (3, self.config.n_rot_bins)
        )

    # -- rotation: three Euler angles here, as of policy.FittedPolicy ------------------------------

    def decoded_bins(self, logits):
        """Rotation logits (...,A,bins) -> bins (...,A) float64. With --rotation_decode soft they
        may lie between two bins."""
        c = self.config
        # two deviations: 95% of the training target's bell
        radius = math.ceil(2 * c.rotation_sigma) if c.rotation_decode == "soft" else 0
        return symmetric_soft_argmax(logits, radius)

    def decode_rotation(self, logits):
        """Logits (...,3,bins) -> rotations (...,3,3)."""
        return self.euler_rotation(self.decoded_bins(logits))

    # -- the policy's interface --------------------------------------------------------------------

    def loss(self, batch):
        """Cross-entropies of volume, gripper and rotation in nats, averaged over the unmasked
        waypoints.

        In evaluation also the share of waypoints whose highest logit is the true one (top-1), for
        each part and for all parts together.
        """
        c, mask = self.config, batch["mask"].flatten()
        features, coordinates = (
            self.trunk_features(batch),
            self.coordinates(batch["target_pos"], batch),
        )
        # the same logits as `volume_logits`, never stored in training: a product without bias
        queries = self.queries() * c.dim**-0.5  # (T,Z,C)
        volume = self.product_loss(
            queries, queries.new_zeros(queries.shape[:2]), self.key(features), coordinates
        )
        # teacher forcing: the heads read the true keypoints
        keypoints = self.keypoints(coordinates)
        gripper, rotation = self.predict_from_keypoints(features, keypoints, batch["mask"] > 0)
        gripper, rotation = gripper.flatten(0, 1).float(), rotation.flatten(0, 1)
        target_gripper, target_rot = (
            batch["target_gripper"].flatten(),
            batch["target_rot"].flatten(0, 1),
        )
        parts = {
            "volume_ce": self.masked_mean(volume.flatten(), mask),
            "gripper_ce": self.masked_mean(
                F.cross_entropy(gripper, target_gripper, reduction="none"), mask
            ),
            "rotation_ce": self.masked_mean(self.rotation_loss(rotation, target_rot), mask),
        }
        total = parts["volume_ce"] + parts["gripper_ce"] + c.rotation_weight * parts["rotation_ce"]
        # top-1 needs the logits themselves
        if not self.training:
            logits = self.volume_logits(features).flatten(0, 1).flatten(1)  # (B*T, Z*H*W)
            # (B*T,3) bool: the highest voxel agrees in z, y and x
            best = torch.stack(
                torch.unravel_index(logits.argmax(-1), self.volume_shape), -1
            ) == keypoints.flatten(0, 1)
            right = {
                "pixel": best[:, 1:].all(-1),
                "height": best[:, 0],
                "gripper": gripper.argmax(-1) == target_gripper,
                "rotation": (rotation.argmax(-1) == self.rotation_bins(target_rot)).all(-1),
            }
            right["joint"] = torch.stack(list(right.values())).all(0)
            parts.update({f"top1_{k}": self.masked_mean(v.float(), mask) for k, v in right.items()})
        return {"loss": total, **{k: v.detach() for k, v in parts.items()}}

    def predict(self, batch):
        features = self.trunk_features(batch)
        # the volume first: where each waypoint lies says where its gripper and rotation are read
        logits = self.volume_logits(features).float()
        coordinates, _ = self.decode_volume(logits.flatten(0, 1)[:, None])
        coordinates = coordinates.view(*logits.shape[:2], 3)
        gripper, rotation = self.predict_from_keypoints(features, self.keypoints(coordinates))
        return {
            "position": self.points(coordinates, batch),
            "gripper": gripper.argmax(-1),
            "rotation": self.decode_rotation(rotation),
            "rotation_logits": rotation.float(),
        }

    def deployment_stats(self):
        """What turns this policy's bins into metres and radians, JSON-able; see
        rot_utils.load_stats."""
        c = self.config
        return {
            "image_size": c.image_size,
            "n_window": c.n_window,
            "waypoint_stride": c.waypoint_stride,
            "grid": c.grid,
            "n_height_bins": c.n_height_bins,
            "height_range": self.height_range.tolist(),
            "rotation": self.rotation_stats(),
            # files from before there was a choice have neither
            **({"margin": c.margin} if c.margin else {}),
            **({"heights": c.heights} if c.heights != "world" else {}),
        }

    def rotation_stats(self):
        return {
            "kind": "euler",
            "n_bins": self.config.n_rot_bins,
            "euler_range": self.euler_range.tolist(),
        }
