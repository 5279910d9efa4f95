"""ACT, the baseline that regresses the chunk of waypoints as numbers, not as places in the image.

Pooled patches of the same frozen features, a token of proprioception and one of the camera ->
transformer encoder -> decoder with one learned query a waypoint -> absolute world xyz (L1,
normalised by the training data), gripper command, rotation in bins.

After Zhao et al. 2023, "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware". It
differs from the paper so that the rows of a table differ in the head alone:

- Labels, features and the closed loop are PARA's. So a chunk is T waypoints instead of T control
  steps, and each waypoint brings a new chunk instead of temporal ensembling.
- There is no CVAE. It tells apart the ways in which people do the same thing, and a scripted expert
  has one way.
- The camera's pose is an input, since the other policies know the camera too. `--no-camera_token`
  is as published.
- The EEF's position is noised in training, as in the history policies. A regressor too would rather
  guess the next waypoint from where it is than look. `--eef_noise_m 0` turns the noise off.

The last two points are in its favour.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nets.layers import attend
from policy import FittedConfig, FittedPolicy, check_heads, fingers_closed, flag

# a patch covers 2 x 2 cells of the pooled maps: its token still tells where inside it something is
POOLED = 2


@dataclass
class ActConfig(FittedConfig):
    """Configuration of ActPolicy."""

    n_window: int = flag(6, "future waypoints T, the chunk")
    dim: int = flag(512, "width d of the transformer")
    n_layers: int = flag(4, "encoder layers")
    n_decoder_layers: int = flag(1, "decoder layers")
    n_heads: int = flag(8, "attention heads")
    mlp_ratio: int = flag(4, "feed-forward width over d")
    dropout: float = flag(0.1, "dropout in the transformer", below=1)
    patch_grid: int = flag(14, "patch tokens a side")
    camera_token: bool = flag(True, "a token of the camera's pose")
    gripper_weight: float = flag(1.0, "weight of the gripper loss")
    eef_noise_share: float = flag(
        0.7, "share of samples with a noised EEF position in training", high=1
    )
    eef_noise_m: float = flag(0.02, "its standard deviation along each axis, metres")

    presets = {
        "full": {
            "lr": 3e-4,
            "warmup": 500,
            "max_steps": 10_000,
            "val_every": 1000,
            "save_every": 500,
        },
        "small": {
            "dim": 128,
            "n_layers": 3,
            "n_heads": 4,
            "mlp_ratio": 2,
            "dropout": 0.0,
            "lr": 1e-3,
            "max_steps": 2500,
            "val_every": 500,
        },
    }


def multi_head(attention, x, memory):
    """The output (B,Q,d) of an nn.MultiheadAttention for queries x (B,Q,d) and memory (B,S,d).

    It is computed by nets.layers.attend, which trains faster in bf16 on a CPU.
    """
    weight, bias, d = attention.in_proj_weight, attention.in_proj_bias, attention.embed_dim
    heads = lambda y: y.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # (B,h,N,e)
    # torch packs the projections of query, key and value in this order
    query = heads(F.linear(x, weight[:d], bias[:d]))
    key, value = map(heads, F.linear(memory, weight[d:], bias[d:]).chunk(2, -1))
    out = attend(query, key, value, attention.dropout if attention.training else 0.0)
    return attention.out_proj(out.transpose(1, 2).flatten(2))


class EncoderLayer(nn.TransformerEncoderLayer):
    """torch's encoder layer, with `multi_head` as its attention in training."""

    def _sa_block(self, x, *masks, **options):
        return self.dropout1(multi_head(self.self_attn, x, x))


class DecoderLayer(nn.TransformerDecoderLayer):
    """torch's decoder layer, with `multi_head` as its attention."""

    def _sa_block(self, x, *masks, **options):
        return self.dropout1(multi_head(self.self_attn, x, x))

    def _mha_block(self, x, memory, *masks, **options):
        return self.dropout2(multi_head(self.multihead_attn, x, memory))


class ActPolicy(FittedPolicy):
    """See the module's docstring. `channels`: of the backbone's maps."""

    def __init__(self, config, channels):
        super().__init__(config, channels)
        c, d = config, config.dim
        check_heads(c)
        self.register_buffer("position_mean", torch.zeros(3, dtype=torch.float64))  # metres
        self.register_buffer("position_std", torch.ones(3, dtype=torch.float64))
        self.project = nn.ModuleList([nn.Conv2d(n, d, POOLED, stride=POOLED) for n in channels])
        # y and x parts of the patches' position embedding
        self.place = nn.Parameter(torch.randn(2, c.patch_grid, d) * 0.5)
        self.state = nn.Linear(3 + 1, d)  # EEF xyz, fingers
        if c.camera_token:
            # rows of E without the last, which is the same for all cameras
            self.camera = nn.Linear(12, d)
        layer = {
            "nhead": c.n_heads,
            "dim_feedforward": c.mlp_ratio * d,
            "dropout": c.dropout,
            "activation": "gelu",
            "batch_first": True,
            "norm_first": True,
        }
        self.encoder = nn.ModuleList([EncoderLayer(d, **layer) for _ in range(c.n_layers)])
        self.decoder = nn.ModuleList([DecoderLayer(d, **layer) for _ in range(c.n_decoder_layers)])
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.queries = nn.Parameter(torch.randn(c.n_window, d) * 0.5)
        self.position = nn.Linear(d, 3)
        self.gripper = nn.Linear(d, 2)
        self.rotation = nn.Linear(d, 3 * c.n_rot_bins)

    def fit_statistics(self, statistics):
        """Set the parent's statistics and the EEF positions' mean and deviation, metres."""
        super().fit_statistics(statistics)
        for buffer, value in zip((self.position_mean, self.position_std), statistics["position"]):
            buffer.copy_(torch.as_tensor(value))

    def scaled(self, positions):
        """World positions (...,3) in metres -> float32, with zero mean and unit deviation over the
        training data."""
        return ((positions - self.position_mean) / self.position_std).float()

    def tokens(self, batch):
        """Tokens (B,N,d) of the patches, the state and the camera."""
        side, eef, x = self.config.patch_grid, batch["eef_pos"], 0
        if self.training and self.config.eef_noise_m > 0:
            # a share of the samples gets noise, metres along x, y and z
            noised = (
                self.shard.draw(torch.rand, (len(eef), 1), eef.device) < self.config.eef_noise_share
            )
            eef = (
                eef
                + self.config.eef_noise_m
                * self.shard.draw(torch.randn, eef.shape, eef.device)
                * noised
            )
        for maps, project in zip(self.normalised(batch["features"]), self.project):
            x = x + project(F.adaptive_avg_pool2d(maps, POOLED * side))  # (B,d,H,W)
        # (B,N,d), N = side^2; a patch's position is its row's vector plus its column's
        x = x.flatten(2).transpose(1, 2) + (self.place[0, :, None] + self.place[1]).flatten(0, 1)
        closed = fingers_closed(batch["gripper_width"]).float()[:, None]
        # one token of EEF and fingers, one of the camera
        others = [self.state(torch.cat([self.scaled(eef), closed], -1))]
        if self.config.camera_token:
            others.append(self.camera(batch["E"][:, :3].flatten(1).float()))
        return torch.cat([x, torch.stack(others, 1)], 1)

    def run(self, batch):
        """Batch -> scaled positions (B,T,3), logits: gripper (B,T,2), rotation (B,T,3,bins)."""
        # the encoder mixes patches, state and camera: memory (B,N,d)
        memory = self.tokens(batch)
        for layer in self.encoder:
            memory = layer(memory)
        memory, x = self.encoder_norm(memory), self.queries.expand(len(memory), -1, -1)
        # one query a waypoint, all at once: (B,T,d)
        for layer in self.decoder:
            x = layer(x, memory)
        x = self.decoder_norm(x)
        return (
            self.position(x).float(),
            self.gripper(x).float(),
            self.rotation(x).unflatten(-1, (3, self.config.n_rot_bins)),
        )

    def loss(self, batch):
        """L1 of scaled positions (deviations of the data) and cross-entropies of gripper and
        rotation (nats), averaged over the unmasked waypoints."""
        c, mask = self.config, batch["mask"].flatten()
        position, gripper, rotation = (x.flatten(0, 1) for x in self.run(batch))
        # L1 in deviations of the training data, the mean of x, y and z
        error = (position - self.scaled(batch["target_pos"]).flatten(0, 1)).abs().mean(-1)
        parts = {
            "position_l1": self.masked_mean(error, mask),
            "gripper_ce": self.masked_mean(
                F.cross_entropy(gripper, batch["target_gripper"].flatten(), reduction="none"), mask
            ),
            "rotation_ce": self.masked_mean(
                self.rotation_loss(rotation, batch["target_rot"].flatten(0, 1)), mask
            ),
        }
        total = (
            parts["position_l1"]
            + c.gripper_weight * parts["gripper_ce"]
            + c.rotation_weight * parts["rotation_ce"]
        )
        return {"loss": total, **{k: v.detach() for k, v in parts.items()}}

    def predict(self, batch):
        position, gripper, rotation = self.run(batch)
        return {
            # back to metres
            "position": position.double() * self.position_std + self.position_mean,
            "gripper": gripper.argmax(-1),
            "rotation": self.decode_rotation(rotation),
        }
