"""B, the voxel-token policy: the action space is the token space.

A frame's tokens are the voxels of its image-aligned volume: Wg PE(world xyz) + the feature of the
voxel's pixel, where xyz is unprojected through that frame's camera. They are keys and values only,
and they are never built (nets/layers_voxel.py).

Each step has a learned query. In every layer it reads, in one softmax, the EEF tokens up to that
step, which are points in the same space, a token of the instruction where there are several, and
all voxels of its frame. At last it is compared with every voxel token. That product is the
distribution over the next waypoint. An instruction scales and shifts the channels of the image
features too (FiLM).

No step's query sees another step's image or a later EEF. So every frame of a window is trained in
one pass.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import camera
import flags
from nets import layers_voxel as lv
from nets.history import FingerLinear, HistoryConfig, HistoryPolicy
from nets.maps import dilated_convolutions, mark_cell, projected
from nets.text import WIDTH
from policy import check_heads, finger_numbers, finger_state, flag

MAX_TABLES = 64  # of cameras, 13 MB each at 56 x 56 x 32


@dataclass
class VoxelConfig(HistoryConfig):
    """Configuration of VoxelPolicy."""

    grid: int = flag(56, "voxel columns H = W: 56 with 32 height bins, or 28 with 16", low=2)
    context: int = flag(20, "EEF positions that a query sees")
    # queries and attention
    dim: int = flag(384, "width d of queries and tokens")
    n_layers: int = flag(4, "layers")
    n_heads: int = flag(4, "attention heads")
    mlp_ratio: int = flag(4, "feed-forward width over d")
    # image features and positions
    key_width: int = flag(64, "channels of the image features, before their projection to d")
    dilations: str = flag(
        "1,2,4",
        "dilations of the convolutions over image features: "
        "the first before attention, the rest before readout",
        kind=flags.int_list,
    )
    n_waves: int = flag(8, "wavelengths of the positional encoding, P = 6 times as many")
    shortest_wave: float = flag(0.04, "metres", above=0)
    longest_wave: float = flag(3.0, "metres", above=0)
    gripper_head: str = flag(
        "joint",
        "gripper as an axis of the joint softmax, or a head on the query",
        ("joint", "separate"),
    )
    eef_mark: bool = flag(
        True, "the query marks the last known EEF's cell before the readout's convolutions"
    )
    eef_noise_m: float = flag(
        0.02, "training noise of EEF positions, standard deviation in metres along x and along y"
    )
    eef_noise_height_m: float = flag(0.004, "the same along z")

    # small: a step costs what its frames cost, and two frames of each of four windows differ more
    # than four of each of two
    presets = {
        "full": {
            "lr": 3e-4,
            "warmup": 500,
            "max_steps": 10_000,
            "val_every": 1000,
            "save_every": 500,
        },
        "small": {
            "context": 8,
            "dim": 64,
            "n_layers": 2,
            "mlp_ratio": 2,
            "key_width": 48,
            "batch_size": 4,
            "trained_frames": 2,
            "lr": 1e-3,
            "max_steps": 2500,
            "val_every": 500,
        },
    }


class VoxelBlock(nn.Module):
    """Pre-norm block: queries (N,1,d) read EEF tokens and voxels in one softmax, then an MLP."""

    def __init__(self, dim, n_heads, mlp_ratio, n_voxels):
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.out = (
            nn.Linear(dim, dim),
            *(nn.Linear(dim, dim, bias=False) for _ in "kv"),
            nn.Linear(dim, dim),
        )
        # per head, log V: a handful of EEF tokens would drown among 100,000 voxels; with this bias
        # they start with half of the attention
        self.balance = nn.Parameter(torch.full((n_heads,), math.log(n_voxels)))
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim)
        )

    def forward(self, x, eef, known, voxels):
        """Queries x (N,1,d) -> x (N,1,d), attention over pixels (N,1,h,HW).

        eef (N,S,d): EEF tokens, of which known (N,1,S) may be read. voxels: the other arguments of
        voxel_attention.
        """
        heads = lambda y: y.unflatten(-1, (self.n_heads, -1))
        q = heads(self.q(self.norm1(x)))
        # (h,D,d) matrices, which act on query and output instead of every voxel
        key, value = (linear.weight.unflatten(0, (self.n_heads, -1)) for linear in (self.k, self.v))
        seen, lse, pixels = lv.voxel_attention(q, key=key, value=value, **voxels)
        past, past_lse = lv.dense_attention(q, heads(self.k(eef)), heads(self.v(eef)), known)
        # at equal scores the EEF tokens, however many, then weigh as much as all voxels together
        past_lse = past_lse + self.balance - known.sum(-1, keepdim=True).log()
        out, _ = lv.merge_attention(seen, lse, past.to(seen.dtype), past_lse.to(lse.dtype))
        x = x + self.out(out.flatten(-2))
        return x + self.mlp(self.norm2(x)), pixels


class VoxelPolicy(HistoryPolicy):
    """See the module's docstring. `channels`: of the backbone's maps."""

    def __init__(self, config, channels):
        super().__init__(config, channels)
        c, d, width = config, config.dim, config.key_width
        check_heads(c)
        self.register_buffer(
            "waves", lv.wavelengths(c.n_waves, c.shortest_wave, c.longest_wave), persistent=False
        )
        self.n_gripper = 2 if c.gripper_head == "joint" else 1
        # one convolution before attention, the others before readout, when the query has been added
        first, *others = map(int, c.dilations.split(","))
        self.project = nn.ModuleList([nn.Conv2d(n, width, 1) for n in channels])
        self.context = nn.Conv2d(width, width, 3, padding=first, dilation=first)
        self.trunk = dilated_convolutions(width, others)
        self.film = self.films(2 + len(others), width)
        # Wg, the same for voxels and EEF tokens
        self.positional = nn.Linear(6 * c.n_waves, d, bias=False)
        self.image = nn.Linear(width, d, bias=False)
        self.token = nn.Parameter(torch.randn(2, d) * 0.5)  # EEF, query
        self.age = nn.Parameter(torch.randn(c.context, d) * 0.1)  # how many steps ago
        self.state = nn.Linear(3 + c.fingers - 1, d)  # the EEF's last move, fingers
        self.start = nn.Linear(d, d)
        if self.text is not None:
            self.instruction = nn.Linear(WIDTH, d)
        self.blocks = nn.ModuleList(
            [
                VoxelBlock(d, c.n_heads, c.mlp_ratio, math.prod(self.volume_shape))
                for _ in range(c.n_layers)
            ]
        )
        self.norm = nn.LayerNorm(d)
        self.key_query = nn.Linear(d, 2 * width if c.eef_mark else width)
        states = c.fingers if c.finger_heads else 1
        # for each gripper command: d numbers against Wg PE, and width numbers twice against image
        # features, alike for all heights and by height
        self.pointer = FingerLinear(d, self.n_gripper * (d + 2 * width), states)
        self.prior = nn.Parameter(torch.randn(states, self.n_gripper, width) * width**-0.5)
        self.height = nn.Linear(2 * c.n_waves, width, bias=False)
        self.rotation = nn.Linear(d, 3 * c.n_rot_bins)
        if c.gripper_head == "separate":
            self.gripper = nn.Linear(d, 2)
        self._tables = {}  # VoxelTables by camera, see `table`
        self.check()
        self.reset()

    # -- where things are --------------------------------------------------------------------------

    def anchors(self, eef, first):
        """The points (B,T,3) in metres that each step measures positions from.

        None is the world's origin: B. eef (B,T,3): known EEF positions; first (B,3): the episode's
        first. A subclass overrides this.
        """
        return None

    def _apply(self, fn, recurse=True):
        self._tables = {}  # they lie where the policy lay
        return super()._apply(fn, recurse)

    def table(self, K, E):
        """VoxelTable of the cameras K (N,3,3), E (N,4,4) of N frames.

        Each camera's table is made once. The MAX_TABLES used last are kept. A compiled graph, which
        may not wait for the cameras' numbers, makes a table for each frame.
        """
        if torch.compiler.is_compiling():
            return self.new_table(K, E)
        limits = self.height_range.expand(len(K), 2)
        # a table depends on the camera and the heights: their bytes are its key
        cameras = torch.cat([K.flatten(1), E.flatten(1), limits], 1).cpu().numpy()
        keys = [row.tobytes() for row in cameras]
        # each camera once, in order of appearance; frames of a batch often share one
        order = list(dict.fromkeys(keys))
        for key in order:
            i = keys.index(key)
            # the newest last
            self._tables[key] = self._tables.pop(key, None) or self.new_table(K[[i]], E[[i]])
        # never one of this batch, even if it has more than MAX_TABLES
        for key in list(self._tables)[: -max(MAX_TABLES, len(order))]:
            del self._tables[key]
        which = torch.tensor([order.index(key) for key in keys])
        return lv.VoxelTable.joined([self._tables[key] for key in order]).select(which)

    def new_table(self, K, E):
        """VoxelTable of G cameras K (G,3,3), E (G,4,4)."""
        c = self.config
        # pixels of the cells' centres, u and v (N,) in row-major order
        cells = torch.arange(c.side, dtype=torch.float64, device=K.device)
        pixel = self.cell_to_pixel(cells)
        v, u = (x.flatten() for x in torch.meshgrid(pixel, pixel, indexing="ij"))
        # a ray's x and y are affine in its height: two points of it give slope and origin
        low, high = (camera.unproject(u, v, h, K[:, None], E[:, None]) for h in self.height_range)
        slope = (high - low)[..., :2] / (self.height_range[1] - self.height_range[0])
        bins = torch.arange(c.n_height_bins, dtype=torch.float64, device=K.device)
        heights = camera.bin_to_height(bins, *self.height_range, c.n_height_bins)
        return lv.VoxelTable(
            low[..., :2] - slope * self.height_range[0], slope, heights, self.waves
        )

    def noised(self, eef):
        """EEF positions (B,T,3) in metres, with noise in training, see `HistoryPolicy.noise`."""
        c = self.config
        if not self.training or c.eef_noise_share <= 0:
            return eef
        return eef + eef.new_tensor(
            [c.eef_noise_m, c.eef_noise_m, c.eef_noise_height_m]
        ) * self.noise(eef)

    # -- the network -------------------------------------------------------------------------------

    def eef_tokens(self, eef, widths, anchor, rows):
        """EEF tokens (N,S,d), S = T, and which of them each step knows (N,1,S) bool.

        rows (N,): the steps, in the flattened (B*T). eef (B,T,3) and widths between the fingers
        (B,T), metres. anchor (N,3) or None: where each step measures positions from.
        """
        B, T = widths.shape
        # window and step of each row
        b, t = rows // T, rows % T
        positions = eef[b]  # (N,S,3)
        if anchor is not None:
            positions = positions - anchor[:, None]
        code = lv.encode_position(positions, self.waves).to(self.positional.weight.dtype)
        # metres since the frame before, 0 at the first; as inputs in units of 10 cm
        moved = (eef - torch.cat([eef[:, :1], eef[:, :-1]], 1)).float()
        state = self.state(torch.cat([10 * moved, finger_numbers(widths, self.config)], -1))
        state = state[b]
        age = t[:, None] - torch.arange(T, device=rows.device)  # (N,S), negative in the future
        tokens = (
            self.token[0]
            + self.positional(code)
            + state
            + self.age[age.clamp(0, len(self.age) - 1)]
        )
        return tokens, ((age >= 0) & (age < self.config.context))[:, None]

    def image_features(self, features, told):
        """Normalised backbone maps [(N,C_i,H_i,W_i)], an instruction's vectors (N,WIDTH) or None ->
        features (N,C,H,W) of the grid.

        A 3x3 convolution gives each cell the context of its neighbours.
        """
        x = projected(features, self.project, self.config.grid, self.config.margin)
        x = self.context(self.film.at(0, x, told))
        return F.gelu(self.film.at(1, x, told))

    def run(self, batch, eef, rows):
        """Steps `rows` (N,) of the flattened (B*T) -> logits (N,G,Z,H,W), queries (N,d), and
        attention maps [(N,h,H,W)], one a layer. eef (B,T,3): as the EEF tokens tell it, metres."""
        B, T = batch["gripper_width"].shape
        flat = lambda x: x[rows // T, rows % T]
        anchor = self.anchors(eef, batch["first_eef"])
        anchor = None if anchor is None else flat(anchor)
        table = self.table(flat(batch["K"]), flat(batch["E"]))
        told = self.instruction_vectors(batch)
        told = None if told is None else told[rows // T]  # (N,WIDTH)
        # (N,C,H,W)
        image = self.image_features(self.normalised([flat(f) for f in batch["features"]]), told)
        tokens, known = self.eef_tokens(eef, batch["gripper_width"], anchor, rows)
        # the query starts from where the EEF is
        last_eef = tokens[torch.arange(len(rows), device=rows.device), rows % T]
        x = (self.token[1] + self.start(last_eef))[:, None]  # (N,1,d)
        # one more token beside those of the EEF, which every step knows
        if told is not None:
            tokens = torch.cat([tokens, self.instruction(told)[:, None].to(tokens.dtype)], 1)
            known = torch.cat([known, known.new_ones(len(rows), 1, 1)], 2)
        voxels = {
            "table": table,
            "image": image.flatten(2),
            "positional": self.positional.weight,
            "projection": self.image.weight,
            "anchor": None if anchor is None else anchor[:, None],
        }
        # layer by layer: the query reads EEF tokens and voxels
        maps = []
        for block in self.blocks:
            x, pixels = block(x, tokens, known, voxels)
            maps.append(pixels[:, 0].unflatten(-1, image.shape[2:]))
        query = self.norm(x[:, 0])
        # where the mark goes: by default not where the noise says, but where the image shows the
        # EEF
        cells = self.cells(
            flat(eef if self.config.noisy_mark else batch["eef_pos"]),
            {k: flat(batch[k]) for k in "KE"},
        )
        fingers = finger_state(flat(batch["gripper_width"]), self.config)
        return self.readout(query, image, table, anchor, cells, fingers, told), query, maps

    def readout(self, query, image, table, anchor, cells, fingers, told):
        """Queries (N,d) against all voxel tokens -> logits (N,G,Z,H,W).

        image (N,C,H,W): features of the grid; table: the frames' VoxelTable; anchor (N,3) or None;
        cells (N,2) yx: where the last known EEF is seen; fingers (N,): their states, see
        policy.finger_state; told (N,WIDTH) or None: an instruction's vectors.
        """
        c, width = self.config, self.config.key_width
        # the query tells the image features what is looked for: at every cell, and at the EEF's
        added = self.key_query(query)
        x = image + added[:, :width, None, None]
        if c.eef_mark:
            x = mark_cell(x, cells, added[:, width:])
        x = self.film.along(self.trunk, x, told, first=2).flatten(2)  # (N,C,HW)
        # weights for each gripper command: (N,G,d), (N,G,C), (N,G,C)
        position, plain, by_height = (
            self.pointer(query, fingers)
            .unflatten(-1, (self.n_gripper, -1))
            .split([c.dim, width, width], -1)
        )
        heights = table.heights.to(query.device)[None, :, None]  # (1,Z,1)
        if anchor is not None:
            heights = heights - anchor[:, None, 2:]
        # (N or 1,Z,C), a code of each height
        seen = self.height(lv.encode_position(heights, self.waves).to(self.height.weight.dtype))
        prior = self.prior[fingers.clamp(max=len(self.prior) - 1)]
        # (N,G,Z,C), what each height wants to see at a pixel
        height_query = (plain + prior)[:, :, None] + by_height[:, :, None] * seen[:, None]
        # divided by the square roots of the widths, as attention's scores are
        logits = lv.voxel_logits(
            position / math.sqrt(c.dim),
            table,
            x,
            self.positional.weight,
            height_query / math.sqrt(width),
            None if anchor is None else anchor[:, None].expand(-1, self.n_gripper, -1),
        )
        return logits.unflatten(-1, (c.side, c.side))

    # -- the policy's interface --------------------------------------------------------------------

    def loss(self, batch):
        """Cross-entropies of gripper x volume and of rotation over the unmasked frames of windows,
        in nats.
        """
        c, mask = self.config, batch["mask"]
        # only these steps are computed: no step needs another one's volume
        rows = self.trained_rows(mask)
        pick = lambda x: x.flatten(0, 1)[rows]
        logits, query, _ = self.run(batch, self.noised(batch["eef_pos"]), rows)
        mask, gripper = pick(mask), pick(batch["target_gripper"])
        coordinates = pick(self.coordinates(batch["target_pos"], batch))
        volume = self.volume_loss(
            logits.flatten(1), coordinates, gripper if self.n_gripper == 2 else None
        )
        rotation = self.rotation_loss(
            self.rotation(query).unflatten(-1, (3, c.n_rot_bins)), pick(batch["target_rot"])
        )
        parts = {
            "volume_ce": self.masked_mean(volume, mask),
            "rotation_ce": self.masked_mean(rotation, mask),
        }
        total = parts["volume_ce"] + c.rotation_weight * parts["rotation_ce"]
        if self.n_gripper == 1:
            parts["gripper_ce"] = self.masked_mean(
                F.cross_entropy(self.gripper(query).float(), gripper, reduction="none"), mask
            )
            total = total + parts["gripper_ce"]
        return {"loss": total, **{k: v.detach() for k, v in parts.items()}}

    def predict(self, batch):
        """The next waypoint of every frame of windows: {"position" (B,T,3), "gripper" (B,T),
        "rotation" (B,T,3,3)}.
        """
        parts = [self.decided(batch, rows) for rows in self.window_rows(batch)]
        return {k: torch.stack([p[k] for p in parts]) for k in parts[0]}

    def window_rows(self, batch):
        """Each window's steps as rows of the flattened (B*T): (B,T).

        Callers go window by window, for the volumes of a whole batch would fill the memory.
        """
        B, T = batch["gripper_width"].shape
        return torch.arange(B * T, device=batch["K"].device).view(B, T)

    def decided(self, batch, rows, acting=False):
        """Waypoints of steps `rows` (N,) of the flattened (B*T): {"position" (N,3), "gripper" (N,),
        "rotation" (N,3,3)}. acting: exclude places where the EEF already is."""
        c = self.config
        logits, query, _ = self.run(batch, self.noised(batch["eef_pos"]), rows)
        logits = logits.float()
        T = batch["gripper_width"].shape[1]
        # which places are reached depends on the command, so it has to be an axis of the volume
        if acting and self.n_gripper == 2:
            logits = self.without_reached(
                logits,
                {k: batch[k][rows // T, rows % T] for k in ("eef_pos", "gripper_width", "K", "E")},
            )
        coordinates, gripper = self.decode_volume(self.sampled(logits))
        cameras = {k: batch[k][rows // T, rows % T] for k in "KE"}
        # the command is the peak's, or that of a head on the query
        gripper = gripper if self.n_gripper == 2 else self.gripper(query).argmax(-1)
        return {
            "position": self.points(coordinates, cameras),
            "gripper": gripper,
            "rotation": self.decode_rotation(self.rotation(query).unflatten(-1, (3, c.n_rot_bins))),
        }

    @property
    def attention_beyond(self):
        return self.beyond  # it attends to voxels

    def attention(self, batch):
        """Where each step's query looks in its own frame in the last layer: (B,T,H,W), the mean
        over heads, summing to one.
        """
        return torch.stack(
            [
                self.run(batch, batch["eef_pos"], rows)[2][-1].mean(1)
                for rows in self.window_rows(batch)
            ]
        )

    def distribution(self, batch):
        """Each step's probabilities (B,T,Z,H,W) of the next waypoint over voxels, summed over the
        gripper commands."""
        return torch.stack(
            [
                self.run(batch, batch["eef_pos"], rows)[0]
                .float()
                .flatten(1)
                .softmax(-1)
                .view(-1, self.n_gripper, *self.volume_shape)
                .sum(1)
                for rows in self.window_rows(batch)
            ]
        )

    # -- closed loop -------------------------------------------------------------------------------

    def session(self):
        twin = super().session()
        twin._tables = {}  # sessions may decide at the same time, each in a thread
        return twin

    def reset(self, generator=None):
        super().reset(generator)
        self.number, self.last_waypoint = 0, None
        self.first, self.past = None, []

    def decide(self, batch):
        """The waypoint for one observation (B = 1) that follows those since `reset`.

        Of earlier frames only EEF positions and finger widths are kept.
        """
        # measured, or the waypoint before, as --feedback says
        eef = self.last_known(batch["eef_pos"])
        self.first = eef if self.first is None else self.first
        self.past = [*self.past, (eef, batch["gripper_width"])][-self.config.context :]
        positions, widths = (torch.stack(x, 1) for x in zip(*self.past))  # (1,S,3), (1,S)
        # a window of S steps as `decided` takes it: this image and camera as views in every step,
        # of
        # which only the last is computed
        frame = {
            k: [m[:, None].expand(-1, len(self.past), -1, -1, -1) for m in batch[k]]
            if k == "features"
            else batch[k][:, None].expand(-1, len(self.past), -1, -1)
            for k in ("features", "K", "E")
        }
        last = torch.tensor([len(self.past) - 1], device=eef.device)
        told = {k: v for k, v in batch.items() if k == "instruction"}
        window = {"eef_pos": positions, "gripper_width": widths, "first_eef": self.first}
        out = self.decided(
            {**frame, **window, **told},
            last,
            acting=True,
        )
        self.number, self.last_waypoint = self.number + 1, out["position"]
        return {k: v[None] for k, v in out.items()}
