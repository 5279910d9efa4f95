"""ACT, the baseline that regresses the chunk of waypoints as numbers, not as places in the image.

Patches of the same frozen features, a token of proprioception and one of the camera -> transformer
encoder -> decoder with one learned query a waypoint -> absolute world xyz (L1, normalised by the
training data), gripper command, rotation in bins. In use, what the last chunks say about the same
waypoint is averaged. An instruction, where there are several, is a token too, and scales and shifts
the patches' channels (FiLM), as in MT-ACT (Bharadhwaj et al. 2023, "RoboAgent").

After Zhao et al. 2023, "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware", its
code and LeRobot's. docs/act.md compares it with them piece by piece.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nets.layers import attend
from nets.text import FILM, WIDTH, InstructedConfig, InstructedPolicy
from policy import check_heads, finger_numbers, fingers_closed, flag
from runtime import UserError

# a patch covers 2 x 2 cells of the pooled maps: its token still tells where inside it something is
POOLED = 2
STILL_CAMERA = 1e-3  # deviation below which a number of E counts as the same for all cameras
WAVELENGTH = 10_000.0  # of the slowest sine of a place, over that of the fastest


@dataclass
class ActConfig(InstructedConfig):
    """Configuration of ActPolicy."""

    older = {"film": False}
    n_window: int = flag(6, "future waypoints T, the chunk")
    dim: int = flag(512, "width d of the transformer")
    n_layers: int = flag(4, "encoder layers")
    n_decoder_layers: int = flag(1, "decoder layers")
    n_heads: int = flag(8, "attention heads")
    mlp_ratio: int = flag(4, "feed-forward width over d")
    dropout: float = flag(0.1, "dropout in the transformer", below=1)
    patch_grid: int = flag(14, "patch tokens a side")
    places: str = flag(
        "sine", "places of patches: fixed sines or learned vectors", choices=("sine", "learned")
    )
    film: bool = flag(True, FILM)
    camera_token: bool = flag(True, "a token of the camera: intrinsics and pose")
    gripper_weight: float = flag(1.0, "weight of the gripper loss")
    eef_noise_share: float = flag(
        0.7, "share of samples with a noised EEF position in training", high=1
    )
    eef_noise_m: float = flag(0.02, "its standard deviation along each axis, metres")
    ensemble: bool = flag(True, "in use, average what the last chunks say about a waypoint")
    ensemble_decay: float = flag(
        0.01, "m of the average's weights exp(-m i), where i = 0 is the oldest chunk"
    )

    presets = {
        "full": {
            "lr": 3e-4,
            "warmup": 500,
            "max_steps": 20_000,
            "val_every": 1000,
            "save_every": 500,
            "patience": 4,
            "cooldown": 2000,
        },
        "small": {
            "dim": 128,
            "n_layers": 3,
            "n_heads": 4,
            "mlp_ratio": 2,
            "dropout": 0.0,
            "lr": 1e-3,
            "max_steps": 10_000,
            "val_every": 500,
            "patience": 4,
            "cooldown": 1000,
        },
    }


def sine_places(side, d):
    """Sine positions of a grid's cells (side^2, d), as DETR and ACT have them: the first half of
    the numbers is about the row, the second about the column, each from 0 to 2 pi over the image.
    """
    angle = 2 * math.pi * torch.arange(1, side + 1) / side
    # d / 4 wavelengths, a sine and a cosine of each
    slower = WAVELENGTH ** (torch.arange(d // 4) / (d // 4))
    waves = angle[:, None] / slower
    of_one = torch.cat([waves.sin(), waves.cos()], -1)  # (side,d/2)
    rows, columns = of_one[:, None].expand(-1, side, -1), of_one.expand(side, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)


def cells(maps, side):
    """Maps (B,C,H,W) pooled to side x side cells."""
    return maps if maps.shape[-1] == side else F.adaptive_avg_pool2d(maps, side)


def multi_head(attention, query, key, value=None):
    """The output (B,Q,d) of an nn.MultiheadAttention for query (B,Q,d) and key, value (B,S,d).

    value: the key where it is None. It is computed by nets.layers.attend, which trains faster in
    bf16 on a CPU.
    """
    value = key if value is None else value
    # torch packs the projections of query, key and value in this order
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # (B,h,N,e)
        for x, w, b in zip((query, key, value), weights, biases)
    )
    out = attend(q, k, v, attention.dropout if attention.training else 0.0)
    return attention.out_proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A layer of the encoder, or of the decoder (`crossed`), which looks at a memory too.

    Places are added to queries and keys of every attention and not to its values, as in DETR.
    """

    def __init__(self, config, crossed):
        super().__init__()
        d, n_heads, drop = config.dim, config.n_heads, config.dropout
        attention = lambda: nn.MultiheadAttention(d, n_heads, drop, batch_first=True)
        self.norm, self.attention = nn.LayerNorm(d), attention()
        if crossed:
            self.cross_norm, self.cross = nn.LayerNorm(d), attention()
        self.mlp = nn.Sequential(
            nn.LayerNorm(d),
            nn.Linear(d, config.mlp_ratio * d),
            nn.GELU(),
            nn.Dropout(drop),
            nn.Linear(config.mlp_ratio * d, d),
        )
        self.dropout = nn.Dropout(drop)

    def forward(self, x, places, memory=None, memory_places=None):
        """x (B,N,d) at `places` (N,d), the decoder's memory (B,S,d) at its own -> (B,N,d)."""
        y = self.norm(x)
        x = x + self.dropout(multi_head(self.attention, y + places, y + places, y))
        if memory is not None:
            query = self.cross_norm(x) + places
            x = x + self.dropout(multi_head(self.cross, query, memory + memory_places, memory))
        return x + self.dropout(self.mlp(x))


class ActPolicy(InstructedPolicy):
    """See the module's docstring. `channels`: of the backbone's maps."""

    def __init__(self, config, channels):
        super().__init__(config, channels)
        c, d = config, config.dim
        check_heads(c)
        if c.places == "sine" and d % 4:
            raise UserError(f"--dim {d}: sines of rows and columns need a multiple of 4")
        self.register_buffer("position_mean", torch.zeros(3, dtype=torch.float64))  # metres
        self.register_buffer("position_std", torch.ones(3, dtype=torch.float64))
        self.project = nn.ModuleList([nn.Conv2d(n, d, POOLED, stride=POOLED) for n in channels])
        self.state = nn.Linear(3 + c.fingers - 1, d)  # EEF xyz, fingers
        if c.camera_token:
            # 4 numbers of K, 12 of E: its rows without the last, which all cameras share
            self.camera = nn.Linear(4 + 12, d)
            self.register_buffer("pose_mean", torch.zeros(12, dtype=torch.float64))
            self.register_buffer("pose_scale", torch.ones(12, dtype=torch.float64))
        if c.places == "learned":
            # y and x parts of the patches' places
            self.place = nn.Parameter(torch.randn(2, c.patch_grid, d) * 0.5)
        else:
            self.register_buffer("sines", sine_places(c.patch_grid, d), persistent=False)
        told = self.text is not None
        if told:
            self.instruction = nn.Linear(WIDTH, d)
        self.film = self.films(1, d)
        # places of the other tokens, and of the waypoints
        self.kinds = nn.Parameter(torch.randn(1 + c.camera_token + told, d) * 0.5)
        self.queries = nn.Parameter(torch.randn(c.n_window, d) * 0.5)
        self.encoder = nn.ModuleList([Block(c, crossed=False) for _ in range(c.n_layers)])
        self.decoder = nn.ModuleList([Block(c, crossed=True) for _ in range(c.n_decoder_layers)])
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.position = nn.Linear(d, 3)
        self.gripper = nn.Linear(d, 2)
        self.rotation = nn.Linear(d, 3 * c.n_rot_bins)
        self.reset()

    def fit_statistics(self, statistics):
        """Set the parent's statistics, those of EEF positions in metres, and those of cameras."""
        super().fit_statistics(statistics)
        for buffer, value in zip((self.position_mean, self.position_std), statistics["position"]):
            buffer.copy_(torch.as_tensor(value))
        if self.config.camera_token:
            poses = torch.as_tensor(statistics["poses"])[:, :3].flatten(1)  # (D,12)
            deviation = poses.std(0, correction=0)
            self.pose_mean.copy_(poses.mean(0))
            # a number that is the same in all of training means nothing where it differs in use
            varies = deviation > STILL_CAMERA
            self.pose_scale.copy_(varies / deviation.clamp(min=STILL_CAMERA))

    def adopt(self, tensors):
        """What varies in this data's cameras and did not in the checkpoint's is scaled by this
        data, and weighs nothing at first: the checkpoint's weights for it are as they began.
        """
        if not {"pose_mean", "pose_scale", "camera.weight"} <= tensors.keys():
            return tensors
        new = (tensors["pose_scale"] == 0) & (self.pose_scale.cpu() != 0)  # (12,)
        mean, scale = (
            torch.where(new, getattr(self, name).cpu(), tensors[name])
            for name in ("pose_mean", "pose_scale")
        )
        weight = tensors["camera.weight"].clone()
        weight[:, 4:][:, new] = 0
        return {**tensors, "pose_mean": mean, "pose_scale": scale, "camera.weight": weight}

    def scaled(self, positions):
        """World positions (...,3) in metres -> float32, with zero mean and unit deviation over the
        training data."""
        return ((positions - self.position_mean) / self.position_std).float()

    def camera_numbers(self, K, E):
        """K (B,3,3), E (B,4,4) -> (B,16): focal lengths and principal point from the image's middle
        in image sides, and the pose in deviations of the training data.
        """
        side = self.config.image_size
        inner = torch.stack([K[:, 0, 0], K[:, 1, 1], K[:, 0, 2], K[:, 1, 2]], -1) / side
        inner = inner - inner.new_tensor([0, 0, 0.5, 0.5])
        outer = (E[:, :3].flatten(1) - self.pose_mean) * self.pose_scale
        return torch.cat([inner, outer], -1).float()

    def noised(self, eef):
        """EEF positions (B,3), in training with noise along x, y and z for a share of them."""
        c = self.config
        if not self.training or c.eef_noise_m == 0:
            return eef
        draw = lambda kind, *shape: self.shard.draw(kind, shape, eef.device)
        chosen = draw(torch.rand, len(eef), 1) < c.eef_noise_share
        return eef + c.eef_noise_m * draw(torch.randn, *eef.shape) * chosen

    def tokens(self, batch):
        """Tokens (B,N,d) of the patches, the state, the camera and the instruction, and their
        places (N,d).
        """
        side, x = self.config.patch_grid, 0
        # pooled first: the smaller maps are cheaper to normalise, to the same result
        pooled = [cells(m.float(), POOLED * side) for m in batch["features"]]
        for maps, project in zip(self.normalised(pooled), self.project):
            x = x + project(maps)  # (B,d,H,W)
        told = self.instruction_vectors(batch)
        x = self.film.at(0, x, told).flatten(2).transpose(1, 2)  # (B,N,d), N = side^2
        fingers = finger_numbers(batch["gripper_width"], self.config)
        # one token of EEF and fingers, one of the camera, one of the instruction
        others = [self.state(torch.cat([self.scaled(self.noised(batch["eef_pos"])), fingers], -1))]
        if self.config.camera_token:
            others.append(self.camera(self.camera_numbers(batch["K"], batch["E"])))
        if told is not None:
            others.append(self.instruction(told))
        if self.config.places == "learned":
            # a patch's place is its row's vector plus its column's
            places = (self.place[0, :, None] + self.place[1]).flatten(0, 1)
        else:
            places = self.sines
        return torch.cat([x, torch.stack(others, 1)], 1), torch.cat([places, self.kinds])

    def run(self, batch):
        """Batch -> scaled positions (B,T,3), logits: gripper (B,T,2), rotation (B,T,3,bins)."""
        # the encoder mixes patches, state and camera: memory (B,N,d)
        memory, places = self.tokens(batch)
        for layer in self.encoder:
            memory = layer(memory, places)
        memory = self.encoder_norm(memory)
        # one query a waypoint, all at once: (B,T,d)
        x = self.queries.expand(len(memory), -1, -1)
        for layer in self.decoder:
            x = layer(x, self.queries, memory, places)
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
        return self.decoded(position, gripper.softmax(-1)[..., 1], rotation.float().softmax(-1))

    def decoded(self, position, closing, turning):
        """Scaled positions (B,T,3), chances to close (B,T) and of rotation bins (B,T,3,bins) ->
        `predict`'s answer.
        """
        return {
            # back to metres
            "position": position.double() * self.position_std + self.position_mean,
            "gripper": (closing > 0.5).long(),
            "rotation": self.decode_rotation(turning),
        }

    # -- temporal ensembling ----------------------------------------------------------------------

    def reset(self, generator=None):
        super().reset(generator)
        # chunks of the episode that still say something, oldest first: [(numbers (T,*), passed)]
        self.said, self.path, self.closed = [], None, None

    def decide(self, batch):
        """As of Policy. With --ensemble, what the last chunks say about a waypoint is averaged.

        A chunk's waypoints are passed one after another. How many the EEF has passed since the last
        decision is told by which of them it is nearest to. A change of the fingers ends all chunks.
        """
        if not self.config.ensemble:
            return self.predict(batch)
        eef = batch["eef_pos"][0]
        closed = int(fingers_closed(batch["gripper_width"], self.config)[0])
        passed = 0
        if self.path is not None:
            passed = int((self.path - eef).norm(dim=-1).argmin())
        T = self.n_waypoints
        kept = [(x, n + passed) for x, n in self.said if n + passed < T and closed == self.closed]
        position, gripper, rotation = self.run(batch)
        # all numbers of a waypoint as one row (T, 3 + 1 + 3 bins)
        chances = gripper[0].softmax(-1)[:, 1:], rotation[0].float().softmax(-1).flatten(1)
        new = torch.cat([position[0], *chances], -1).double()
        self.said, self.closed = [*kept[1 - T :], (new, 0)] if T > 1 else [(new, 0)], closed
        mean = weighted_mean(self.said, self.config.ensemble_decay)[None]
        turning = mean[..., 4:].unflatten(-1, (3, -1))
        out = self.decoded(mean[..., :3], mean[..., 3], turning)
        # where the EEF will be: here, then at each waypoint
        self.path = torch.cat([eef[None], out["position"][0]])
        return out


def weighted_mean(said, decay):
    """Means (T,D) of what chunks say about the T waypoints to come.

    said: [(chunk (T,D), waypoints of it that are passed)], oldest first; the newest speaks about
    all of them. A chunk's weight is exp(-decay i), where i = 0 is the oldest that speaks about the
    waypoint: Algorithm 2 of the paper.
    """
    means = []
    for k in range(len(said[-1][0])):
        rows = torch.stack([chunk[n + k] for chunk, n in said if n + k < len(chunk)])
        weights = torch.exp(-decay * torch.arange(len(rows), device=rows.device, dtype=rows.dtype))
        means.append(weights @ rows / weights.sum())
    return torch.stack(means)
