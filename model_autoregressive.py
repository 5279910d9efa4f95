"""A, the autoregressive policy: one waypoint a step from a window of past frames and EEF positions.

A frame's group of tokens is {its patches, the last known EEF, a learned query, the instruction
where there are several}. Attention is bidirectional inside a group and causal across groups
(nets/layers.py). The query of frame t knows the EEF that image t shows and everything before, never
its target. So every frame of a window is supervised in one pass. Heads on the query:

    pointer  the query makes the weights of a 1x1 convolution over per-cell features: one joint
             softmax over gripper x height x cell. The features are a small convolutional trunk on
             the image features, with a mark at the EEF's cell. So the transformer says what to look
             for, and what lies around a cell says where. --key_patches adds the transformer's patch
             outputs, which have seen the whole table
    mlp      an MLP over absolute cells and gripper, heights by a linear layer

The EEF's position is noised in training on its way into the transformer (with --noisy_mark at the
mark too). Demonstrations whose layouts hardly differ let a network predict the next waypoint from
the current state without looking; noise makes looking the better bet.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import flags
from nets.history import FingerLinear, HistoryConfig, HistoryPolicy
from nets.layers import FLEX_HEAD, FrameBlock, Resolutions, fourier
from nets.maps import dilated_convolutions, mark_cell, product, projected, ray_layers
from nets.text import WIDTH
from policy import check_heads, finger_numbers, finger_state, flag
from runtime import UserError

# frames; the code is cyclic, so that an episode may be of any length
TIME_PERIOD, TIME_FREQUENCIES = 64, 5
SPACE_FREQUENCIES = 6  # over image widths: the finest wave is 1/16 image, 28 px
QUERY = 1  # its place among a group's own two tokens; the EEF comes first


@dataclass
class AutoregressiveConfig(HistoryConfig):
    """Configuration of AutoregressivePolicy."""

    grid: int = flag(56, "prediction grid H = W", low=2)
    context: int = flag(8, "frames T that attention sees")
    dim: int = flag(384, "width d of the transformer")
    n_layers: int = flag(6, "layers")
    n_heads: int = flag(6, "attention heads")
    mlp_ratio: int = flag(4, "feed-forward width over d")
    attention: str = flag(
        "auto",
        "one FlexAttention call, or a call a frame; auto: the first on a GPU",
        ("auto", "sdpa", "flex"),
    )
    patch_grid: int = flag(28, "patch tokens a side")
    recent_hires: int = flag(
        0, "the K newest frames at --patch_grid, older ones at half of it; 0: all alike", low=0
    )
    head: str = flag(
        "pointer", "query . cell features, or an MLP over absolute cells", ("pointer", "mlp")
    )
    # the pointer's cell features
    key_width: int = flag(64, "channels of the pointer's cell features")
    dilations: str = flag(
        "1,2,4",
        "dilations of the convolutions over the pointer's cell features",
        kind=flags.int_list,
    )
    key_patches: bool = flag(
        False, "the transformer's patch outputs are part of the pointer's keys"
    )
    rays: bool = flag(
        False,
        "the pointer's cells know where their rays pass the EEF's height and which way they rise, "
        "and so where the camera is",
    )
    eef_mark: bool = flag(
        True, "the query marks the last known EEF's cell before the pointer's convolutions"
    )
    # what tokens are told of place and time
    anchor: str = flag(
        "frame",
        "positions relative to each frame's own EEF (exact cache), or to the newest frame's",
        ("frame", "current"),
    )
    temporal: bool = flag(True, "temporal embedding")
    patch_position: bool = flag(False, "absolute 2D position embedding of patches and EEF")
    relative: bool = flag(True, "embedding of positions relative to the last known EEF")
    eef_noise_px: float = flag(
        14.0, "training noise of the EEF's pixel position, standard deviation"
    )
    eef_noise_m: float = flag(0.017, "training noise of the EEF's height, metres")
    coarse_to_fine: bool = flag(
        False, "the cell, then an offset inside it, instead of the soft-argmax about the cell"
    )
    smooth_weight: float = flag(
        0.0, "weight of the squared second difference (grid cells) of a free-running rollout"
    )

    # small: 7x7 patches and two trained frames of each of four windows make a step cost a third of
    # 14x14 and all eight
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
            "patch_grid": 7,
            "key_width": 48,
            "batch_size": 4,
            "trained_frames": 2,
            "lr": 1e-3,
            "max_steps": 2500,
            "val_every": 1250,
        },
    }


class AutoregressivePolicy(HistoryPolicy):
    """See the module's docstring. `channels`: of the backbone's maps."""

    def __init__(self, config, channels):
        super().__init__(config, channels)
        c, d = config, config.dim
        check_heads(c)
        if c.attention == "flex" and d // c.n_heads < FLEX_HEAD:
            raise UserError(
                f"--attention flex: heads are {d // c.n_heads} wide (--dim / --n_heads) "
                f"and it needs {FLEX_HEAD}; use sdpa"
            )
        # young frames show patches and the group's own tokens; old ones these and pooled patches
        self.n_patches, n_old = c.patch_grid**2, (c.patch_grid // 2) ** 2 if c.recent_hires else 0
        n_own = 2 + (self.text is not None)
        self.resolutions = Resolutions(c.recent_hires, self.n_patches + n_own, self.n_patches)
        if self.text is not None:
            self.instruction = nn.Linear(WIDTH, d)
        self.project = nn.ModuleList([nn.Conv2d(n, d, 1) for n in channels])
        self.token = nn.Parameter(torch.randn(2, d) * 0.5)  # EEF, query
        # the EEF's height, its last move, fingers
        self.state = nn.Linear(2 * SPACE_FREQUENCIES + 3 + c.fingers - 1, d)
        linear = lambda n: nn.Linear(n, d, bias=False)
        if c.temporal:
            self.temporal = linear(2 * TIME_FREQUENCIES)
        if c.relative:
            self.relative = nn.ModuleList([linear(2 * SPACE_FREQUENCIES) for _ in "yx"])
        if c.patch_position:
            self.position = nn.ModuleList([linear(2 * SPACE_FREQUENCIES) for _ in "yx"])
        if n_old:
            self.coarse = nn.Parameter(torch.randn(d) * 0.5)  # tells pooled patches from patches
        self.blocks = nn.ModuleList(
            [FrameBlock(d, c.n_heads, c.mlp_ratio, c.attention) for _ in range(c.n_layers)]
        )
        self.norm = nn.LayerNorm(d)
        states = c.fingers if c.finger_heads else 1
        if c.head == "pointer":
            width = c.key_width
            self.key_project = nn.ModuleList([nn.Conv2d(n, width, 1) for n in channels])
            if c.key_patches:
                self.key_patches = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, width))
            # for every cell, and for the EEF's cell besides
            self.key_query = nn.Linear(d, 2 * width if c.eef_mark else width)
            if c.rays:
                self.key_rays = ray_layers(width)
            self.key_trunk = dilated_convolutions(width, map(int, c.dilations.split(",")))
            self.film = self.films(1 + len(c.dilations.split(",")), width)
            self.pointer = FingerLinear(d, 2 * c.n_height_bins * width, states)
            self.prior = nn.Parameter(torch.randn(states, 2 * c.n_height_bins, width) * width**-0.5)
            # at first the prior, the same for every query, decides
            nn.init.normal_(self.pointer.linear.weight, std=0.1 * d**-0.5)
        else:
            self.cell_hidden = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU())
            self.cell_head = FingerLinear(4 * d, 2 * c.side**2, states)
            self.height_head = FingerLinear(d, 2 * c.n_height_bins, states)
        if c.coarse_to_fine:
            self.offset_head = nn.Sequential(
                nn.Linear(d + (c.key_width if c.head == "pointer" else 0), d),
                nn.GELU(),
                nn.Linear(d, 3),
            )
        self.rotation = nn.Linear(d, 3 * c.n_rot_bins)
        self.check()
        self.reset()

    # -- tokens ------------------------------------------------------------------------------------

    def eef_coordinates(self, batch):
        """Every frame's last known EEF as volume coordinates zyx (B,T,3) float32, with noise in
        training."""
        c, eef = self.config, self.coordinates(batch["eef_pos"], batch).float()
        if self.training and c.eef_noise_share > 0:
            low, high = self.height_range.float()
            # metres and pixels -> height bins and cells
            scale = torch.stack(
                [
                    c.eef_noise_m / (high - low) * c.n_height_bins,
                    *[torch.tensor(c.eef_noise_px * c.grid / c.image_size, device=eef.device)] * 2,
                ]
            )
            eef = eef + scale * self.noise(eef)
        return eef

    def share(self, coordinates):
        """Volume coordinates zyx -> shares of height range and image, about [-0.5, 0.5]."""
        c = self.config
        size = torch.tensor([c.n_height_bins, c.grid, c.grid], device=coordinates.device)
        first = torch.tensor([0, c.margin, c.margin], device=coordinates.device)
        return (coordinates - first + 0.5) / size - 0.5

    def place(self, tables, y, x):
        """Positions y (...,H) and x (...,W) -> embeddings (...,H,W,d), a y part plus an x part."""
        parts = [table(fourier(p, SPACE_FREQUENCIES)) for table, p in zip(tables, (y, x))]
        return parts[0][..., :, None, :] + parts[1][..., None, :, :]

    def patches(self, features, side, anchor):
        """Backbone maps of frames -> patch tokens (B,T,side^2,d) with position embeddings, relative
        to anchor (B,T,2), yx shares."""
        B, T = anchor.shape[:2]
        tokens = 0
        for maps, project in zip(features, self.project):
            # (B*T,C,H,W), then side x side: finer maps are pooled, coarser ones interpolated
            maps = maps.flatten(0, 1)
            if maps.shape[-1] > side:
                maps = F.adaptive_avg_pool2d(maps, side)
            elif maps.shape[-1] < side:
                maps = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
            tokens = tokens + project(maps)
        tokens = tokens.permute(0, 2, 3, 1).unflatten(0, (B, T))  # (B,T,H,W,d)
        centres = (torch.arange(side, device=anchor.device) + 0.5) / side - 0.5
        if self.config.relative:
            tokens = tokens + self.place(
                self.relative, centres - anchor[..., :1], centres - anchor[..., 1:]
            )
        if self.config.patch_position:
            tokens = tokens + self.place(self.position, centres, centres)
        return tokens.flatten(2, 3)

    def tokens(self, features, eef, before, batch, start, told):
        """Groups of tokens (B,T,N,d) from eef (B,T,3), volume coordinates. before (B,1,3): those of
        the frame before the first, or of the first itself. start (B,): the first frame's number in
        its episode, or any number in training. told (B,WIDTH): the instruction, or None."""
        c = self.config
        eef = self.share(eef)
        anchor = eef[..., 1:] if c.anchor == "frame" else self.newest(eef[..., 1:], batch)
        # shares since the frame before (B,T,3)
        moved = eef - torch.cat([self.share(before), eef[:, :-1]], 1)
        fingers = finger_numbers(batch["gripper_width"], c)
        # (B,T,d); moves are told in tenths of the height range and of the image
        state = self.state(
            torch.cat([fourier(eef[..., 0], SPACE_FREQUENCIES), 10 * moved, fingers], -1)
        )
        # (B,T,2,d): EEF, query
        pair = self.token + torch.stack([state, torch.zeros_like(state)], 2)
        # (B,T,2) -> (B,T,1,d)
        at = lambda tables, yx: self.place(tables, yx[..., :1], yx[..., 1:])[..., 0, :]
        if c.relative:
            pair = pair + at(self.relative, eef[..., 1:] - anchor)
        if c.patch_position:
            pair = pair + at(self.position, eef[..., 1:])
        groups = [self.patches(features, c.patch_grid, anchor), pair]
        # behind the query, the same in each frame
        if told is not None:
            word = self.instruction(told)[:, None, None]
            groups.append(word.expand(-1, eef.shape[1], -1, -1))
        if c.recent_hires:
            groups.append(self.patches(features, c.patch_grid // 2, anchor) + self.coarse)
        x = torch.cat(groups, 2)
        # the frame's number, by a code that all tokens of its group share
        if c.temporal:
            number = start[:, None] + torch.arange(eef.shape[1], device=eef.device)
            code = fourier(number.float(), TIME_FREQUENCIES, 2 * torch.pi / TIME_PERIOD)
            x = x + self.temporal(code)[:, :, None]
        return x

    def newest(self, eef, batch):
        """eef (B,T,2) -> the newest valid frame's entry, for every frame (B,T,2)."""
        last = (
            batch["valid"].sum(1) - 1
            if "valid" in batch
            else torch.full((len(eef),), eef.shape[1] - 1, device=eef.device)
        )
        return eef[torch.arange(len(eef), device=eef.device), last][:, None].expand_as(eef)

    # -- the network -------------------------------------------------------------------------------

    def encode(self, x, past=None):
        """Tokens (B,T,N,d) -> query outputs (B,T,d), patch outputs (B,T,H*W,d) of the layer before
        the last, cache. past: an earlier call's cache."""
        c, cache = self.config, []
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            if last:
                patches = x[:, :, : self.n_patches]
            # the last layer computes the query alone: nobody reads the others
            rows = slice(self.n_patches + QUERY, self.n_patches + QUERY + 1) if last else None
            x, kept = block(x, c.context, self.resolutions, past[i] if past else None, rows)
            cache.append(kept)
        return self.norm(x[:, :, 0]), patches, cache

    def cell_features(self, features, patches, query, eef, cameras, told):
        """The pointer's keys (N,C,H,W) of N frames, from maps [(N,C,H,W)], patch outputs (N,H*W,d),
        query outputs (N,d), the EEF's coordinates zyx (N,3), the cameras {"K", "E"} and the
        instruction's vectors (N,WIDTH) or None."""
        c = self.config
        size = {"size": (c.grid, c.grid), "mode": "bilinear", "align_corners": False}
        added = self.key_query(query)
        x = self.film.at(0, projected(features, self.key_project, c.grid, c.margin), told)
        x = x + added[:, : c.key_width, None, None]
        # coarse, but of the whole table: the transformer's patches, resized to the grid
        if c.key_patches:
            coarse = (
                self.key_patches(patches).transpose(1, 2).unflatten(2, (c.patch_grid, c.patch_grid))
            )
            x = x + F.pad(F.interpolate(coarse, **size), [c.margin] * 4)
        if c.eef_mark:
            x = mark_cell(x, eef[:, 1:], added[:, c.key_width :])
        if c.rays:
            x = x + self.key_rays(
                self.cell_rays({**cameras, "eef_pos": self.points(eef.double(), cameras)})
            )
        return self.film.along(self.key_trunk, x, told)

    def head(self, features, patches, query, eef, widths, cameras, told):
        """N frames -> logits (N,2,Z,H,W), cell features (N,C,H,W) or None. eef (N,3) coordinates,
        widths (N,) m between the fingers, cameras {"K" (N,3,3), "E" (N,4,4)}; others as above."""
        c, state = self.config, finger_state(widths, self.config)
        if c.head == "mlp":
            cells = self.cell_head(self.cell_hidden(query), state).view(-1, 2, 1, c.side, c.side)
            heights = self.height_head(query, state).view(-1, 2, c.n_height_bins, 1, 1)
            return cells + heights.log_softmax(2), None  # p(gripper, cell) p(height | gripper)
        keys = self.cell_features(features, patches, query, eef, cameras, told)
        prior = self.prior[state.clamp(max=len(self.prior) - 1)]  # (N,2Z,C)
        # the convolution's filters, one for each gripper command and height (N,2Z,C)
        weights = self.pointer(query, state).unflatten(-1, (-1, c.key_width)) + prior
        logits = product(weights, keys.flatten(2))
        return logits.view(-1, 2, *self.volume_shape), keys

    def run(self, batch, eef, start, rows=None, exact=False):
        """Windows -> (logits (N,2,Z,H,W), keys, query (N,d)) of the frames `rows` (N,) of the
        flattened (B*T), None for all. exact: mark the cells of eef (B,T,3) itself."""
        features = self.normalised(batch["features"])
        told = self.instruction_vectors(batch)
        query, patches, _ = self.encode(self.tokens(features, eef, eef[:, :1], batch, start, told))
        flat = lambda x: x.flatten(0, 1) if rows is None else x.flatten(0, 1)[rows]
        told = None if told is None else flat(told[:, None].expand(-1, eef.shape[1], -1))
        query = flat(query)
        # the noise is for the transformer: the mark is by default where the image shows the EEF
        marked = (
            eef
            if exact or self.config.noisy_mark
            else self.coordinates(batch["eef_pos"], batch).float()
        )
        logits, keys = self.head(
            [flat(f) for f in features],
            flat(patches),
            query,
            flat(marked),
            flat(batch["gripper_width"]),
            {k: flat(batch[k]) for k in "KE"},
            told,
        )
        return logits, keys, query

    def offset(self, keys, query, coordinates):
        """Offset zyx (N,3) in [-0.5, 0.5] inside the cell at integer coordinates (N,3)."""
        if keys is not None:  # the pointer's offset sees the features of the chosen cell too
            flat = (coordinates[:, 1] * self.config.side + coordinates[:, 2]).long()
            query = torch.cat(
                [query, keys.flatten(2)[torch.arange(len(keys), device=keys.device), :, flat]], -1
            )
        return 0.5 * self.offset_head(query).float().tanh()

    # -- the policy's interface --------------------------------------------------------------------

    def supervised(self, batch):
        """Which of the B*T frames are trained on: flat indices."""
        mask = batch["mask"]
        # older frames' positions are relative to the newest EEF, which is their future: not trained
        if self.config.anchor == "current":
            newest = (
                torch.arange(mask.shape[1], device=mask.device)
                == batch["valid"].sum(1, keepdim=True) - 1
            )
            mask = mask * newest
        return self.trained_rows(mask)

    def loss(self, batch):
        """Cross-entropies of gripper x volume and of rotation over the supervised frames, in nats.
        --coarse_to_fine and --smooth_weight add a part each."""
        c, B = self.config, len(batch["mask"])
        eef = self.eef_coordinates(batch)
        start = torch.zeros(B, dtype=torch.long, device=eef.device)
        if self.training:
            # a window may lie anywhere in an episode: a random phase of the time code
            start = (self.shard.draw(torch.rand, (B,), eef.device) * TIME_PERIOD).long()
        # one pass over whole windows, heads and losses for the supervised frames alone
        rows = self.supervised(batch)
        pick = lambda x: x.flatten(0, 1)[rows]
        mask = pick(batch["mask"])
        coordinates = self.coordinates(batch["target_pos"], batch)
        logits, keys, query = self.run(batch, eef, start, rows)
        parts = {
            "volume_ce": self.masked_mean(
                self.volume_loss(
                    logits.flatten(1), pick(coordinates), pick(batch["target_gripper"])
                ),
                mask,
            ),
            "rotation_ce": self.masked_mean(
                self.rotation_loss(
                    self.rotation(query).unflatten(-1, (3, c.n_rot_bins)), pick(batch["target_rot"])
                ),
                mask,
            ),
        }
        total = parts["volume_ce"] + c.rotation_weight * parts["rotation_ce"]
        if c.coarse_to_fine:
            # the true cell, and the true offset inside it as the target
            true = pick(coordinates).float()
            cell = torch.minimum(
                true.round().clamp(min=0), torch.tensor(self.volume_shape, device=true.device) - 1
            )
            error = F.smooth_l1_loss(
                self.offset(keys, query, cell),
                (true - cell).clamp(-0.5, 0.5),
                reduction="none",
                beta=0.1,
            )
            parts["offset_l1"] = self.masked_mean(error.mean(-1), mask)
            total = total + parts["offset_l1"]
        if c.smooth_weight > 0 and self.training:
            parts["smoothness"] = self.smoothness(batch, logits, start, rows)
            total = total + c.smooth_weight * parts["smoothness"]
        return {"loss": total, **{k: v.detach() for k, v in parts.items()}}

    def smoothness(self, batch, logits, start, rows):
        """Mean squared second difference of waypoints, in cells and bins, at the frames `rows`.

        It is a free-running rollout of one step from everywhere: each frame knows the prediction of
        the frame before it, or where that one is not trained (--trained_frames) the measured EEF.
        """
        B, T = batch["mask"].shape
        measured = self.coordinates(batch["eef_pos"], batch).float()
        with torch.no_grad():
            # where each frame's waypoint led
            reached = torch.cat([measured[:, 1:], measured[:, -1:]], 1).flatten(0, 1)
            reached[rows] = self.decode_volume(logits.float())[0].to(reached.dtype)
        known = torch.cat([measured[:, :1], reached.view(B, T, 3)[:, :-1]], 1)
        # a second pass, with gradients, from where the first one led
        again, _, _ = self.run(batch, known, start, rows, exact=True)
        volume = again.float().logsumexp(1).flatten(1).softmax(-1).view(-1, *self.volume_shape)
        # the expected waypoint zyx (N,3), differentiable where a peak is not
        mean = torch.stack(
            [
                (
                    volume.sum([a for a in (1, 2, 3) if a != axis])
                    * torch.arange(n, device=volume.device)
                ).sum(-1)
                for axis, n in zip((1, 2, 3), self.volume_shape)
            ],
            -1,
        )
        before = torch.cat([known[:, :1], known[:, :-1]], 1).flatten(0, 1)[rows]
        has_before = batch["mask"].flatten()[rows] * (rows % T > 0)
        # next - 2 now + before; a window's first frame has none before
        bend = mean - 2 * known.flatten(0, 1)[rows] + before
        return self.masked_mean((bend**2).sum(-1), has_before)

    def decide_rows(self, batch, logits, keys, query, shape):
        """Head outputs of N = prod(shape) frames -> {"position" (*shape,3) m, "gripper" (*shape),
        "rotation" (*shape,3,3)}."""
        c, logits = self.config, self.sampled(logits.float())
        coordinates, gripper = self.decode_volume(logits)
        if c.coarse_to_fine:
            best = self.peak(logits, gripper)
            coordinates = best + self.offset(keys, query, best).double()
        position = self.points(coordinates.view(*shape, 3), batch)
        rotation = self.decode_rotation(self.rotation(query).unflatten(-1, (3, c.n_rot_bins)))
        return {
            "position": position,
            "gripper": gripper.view(shape),
            "rotation": rotation.view(*shape, 3, 3),
        }

    def peak(self, logits, gripper):
        """Integer coordinates zyx (N,3) of the highest logit under the chosen command."""
        best = (
            logits[torch.arange(len(logits), device=logits.device), gripper].flatten(1).argmax(-1)
        )
        _, H, W = self.volume_shape
        return torch.stack([best // (H * W), best // W % H, best % W], -1).double()

    def decided(self, batch, rows):
        """Waypoints of frames `rows` (N,) of the flattened (B*T): {"position" (N,3) m, "gripper"
        (N,), "rotation" (N,3,3)}."""
        eef = self.eef_coordinates(batch)
        outputs = self.run(
            batch, eef, torch.zeros(len(eef), dtype=torch.long, device=eef.device), rows
        )
        return self.decide_rows(
            {k: batch[k].flatten(0, 1)[rows] for k in "KE"}, *outputs, (len(rows),)
        )

    def predict(self, batch):
        """The next waypoint of every frame of windows: {"position" (B,T,3) m, "gripper" (B,T),
        "rotation" (B,T,3,3)}."""
        shape = batch["gripper_width"].shape
        rows = torch.arange(shape.numel(), device=batch["K"].device)
        return {k: v.unflatten(0, shape) for k, v in self.decided(batch, rows).items()}

    def attention(self, batch):
        """How each frame's query attends to its frame's patches in the last layer: (B,T,H,W),
        summing to one."""
        eef, c = self.eef_coordinates(batch), self.config
        start = torch.zeros(len(eef), dtype=torch.long, device=eef.device)
        told = self.instruction_vectors(batch)
        x = self.tokens(self.normalised(batch["features"]), eef, eef[:, :1], batch, start, told)
        for block in self.blocks[:-1]:
            x, _ = block(x, c.context, self.resolutions)
        weights = self.blocks[-1].weights(x, self.n_patches + QUERY, self.n_patches)
        return weights.unflatten(-1, (c.patch_grid, c.patch_grid))

    # -- closed loop -------------------------------------------------------------------------------

    def reset(self, generator=None):
        super().reset(generator)
        self.number, self.past, self.window = 0, None, []
        self.before, self.last_waypoint = None, None

    def decide(self, batch):
        """The waypoint for one observation (B = 1) that follows those since `reset`.

        Keys and values of earlier frames come from the cache. With --anchor current the window is
        computed anew, for every frame's tokens change with the newest EEF.
        """
        # a window of one frame (1,1,...); the instruction is the window's
        wide = lambda v: [m[:, None] for m in v] if isinstance(v, list) else v[:, None]
        frame = {k: v if k == "instruction" else wide(v) for k, v in batch.items()}
        frame["eef_pos"] = self.last_known(frame["eef_pos"])
        if self.config.anchor == "current":
            out = self.decide_window(frame)
        else:
            # one step: the new frame's tokens read themselves and the cache
            features, eef = self.normalised(frame["features"]), self.eef_coordinates(frame)
            before = eef if self.before is None else self.before
            start = torch.full((1,), self.number, device=eef.device)
            told = self.instruction_vectors(frame)
            query, patches, cache = self.encode(
                self.tokens(features, eef, before, frame, start, told), self.past
            )
            # the next frame and these fill the context
            keep = self.config.context - 1
            self.past = [(k[:, -keep:], v[:, -keep:]) for k, v in cache] if keep else None
            self.before = eef if keep else None
            now = self.now(frame)
            logits, keys = self.head(
                [f[:, 0] for f in features],
                patches[:, 0],
                query[:, 0],
                eef[:, 0],
                now["gripper_width"],
                {k: now[k] for k in "KE"},
                told,
            )
            out = self.decide_rows(
                frame, self.without_reached(logits, now), keys, query[:, 0], (1, 1)
            )
        self.number, self.last_waypoint = self.number + 1, out["position"]
        return out

    def decide_window(self, frame):
        """The newest frame's waypoint, from the last `context` frames computed anew."""
        self.window = [*self.window, frame][-self.config.context :]
        # one window of all kept frames (1,T,...); features are lists of maps
        join = lambda parts: (
            [torch.cat(m, 1) for m in zip(*parts)]
            if isinstance(parts[0], list)
            else torch.cat(parts, 1)
        )
        keys = [k for k in frame if k != "instruction"]
        batch = {**frame, **{k: join([f[k] for f in self.window]) for k in keys}}
        eef = self.eef_coordinates(batch)
        start = torch.full((1,), self.number - len(self.window) + 1, device=eef.device)
        logits, keys, query = self.run(
            batch, eef, start, torch.tensor([eef.shape[1] - 1], device=eef.device)
        )
        return self.decide_rows(
            frame, self.without_reached(logits, self.now(frame)), keys, query, (1, 1)
        )

    @staticmethod
    def now(frame):
        """The one frame of a window of length 1, without its time dimension."""
        return {k: frame[k][:, 0] for k in ("eef_pos", "gripper_width", "K", "E")}
