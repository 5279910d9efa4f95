"""PARA, the single-frame baseline: localise the next waypoints in an image-aligned volume instead of regressing them.

448 px image -> frozen patch features -> 1x1 projection, bilinear to the prediction grid -> a learned embedding at the
current EEF's cell -> three 3x3 convolutions with GELU -> 1x1 convolution to volume logits (B, T, Z, H, W), one joint softmax
per future waypoint. (cell, height bin) is unprojected through the known camera to a 3D point. Gripper and rotation come from
the feature at the target's cell (the true one in training, the predicted one in use), or the gripper is one more axis of the
joint softmax.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import camera
from policy import Policy, PolicyConfig, flag, flat_index, local_soft_argmax, soft_targets, sparse_cross_entropy
from rot_utils import euler_to_matrix, matrix_to_euler, wrap_angle

HEIGHT_MARGIN = 0.02  # metres beyond the heights of the training data that the bins still cover
HALF_OPEN = 0.04  # metres between the fingers
ROTATION_MARGIN = 0.02  # radians, likewise


@dataclass
class ParaConfig(PolicyConfig):
    """Configuration of TrajectoryHeatmapPredictor."""
    grid: int = flag(64, "prediction grid H = W")
    n_height_bins: int = flag(32, "height bins Z")
    n_rot_bins: int = flag(32, "bins per Euler axis")
    width: int = flag(64, "channels of the convolutional trunk")
    target: str = flag("soft", "one-hot or Gaussian cell and height targets", ("soft", "hard"))
    sigma: float = flag(0.7, "standard deviation of soft targets, cells and bins")
    gripper_head: str = flag("joint", "gripper as an axis of the joint softmax, or a head of its own at the target's cell",
                             ("joint", "separate"))
    dilations: str = flag("1,2,4", "dilations of the trunk's convolutions: with 1,1,1 a cell 4 cells from the EEF does not see its mark")
    eef_height: bool = flag(True, "the EEF's embedding depends on its height (interpolated between height bins)")
    eef_gripper: bool = flag(True, "the EEF's embedding, and one added to every cell, depend on whether the fingers are measured open or closed")
    rotation_weight: float = flag(0.1, "weight of the rotation loss")
    decode: str = flag("soft", "local soft-argmax, or plain argmax", ("soft", "argmax"))


class TrajectoryHeatmapPredictor(Policy):
    """See the module's docstring. `channels`: of the backbone's maps."""

    def __init__(self, config, channels):
        super().__init__(config)
        c, width = config, config.width
        self.n_gripper = 2 if c.gripper_head == "joint" else 1
        self.project = nn.ModuleList([nn.Conv2d(n, width, 1) for n in channels])
        self.eef_embedding = nn.Parameter(torch.randn(2 if c.eef_gripper else 1, c.n_height_bins if c.eef_height else 1, width) * 0.5)
        # a far cell does not see the EEF's mark: that nothing is held yet has to be known at the plate too
        self.gripper_embedding = nn.Parameter(torch.randn(2, width) * 0.5) if c.eef_gripper else None
        dilations = [int(d) for d in c.dilations.split(",")]
        self.trunk = nn.Sequential(*[layer for d in dilations
                                     for layer in (nn.Conv2d(width, width, 3, padding=d, dilation=d), nn.GELU())])
        self.volume = nn.Conv2d(width, c.n_window * self.n_gripper * c.n_height_bins, 1)
        self.step_embedding = nn.Parameter(torch.randn(c.n_window, width) * 0.5)
        self.rotation = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3 * c.n_rot_bins))
        if c.gripper_head == "separate":
            self.gripper = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 2))
        for i, n in enumerate(channels):
            self.register_buffer(f"feature_mean_{i}", torch.zeros(n))
            self.register_buffer(f"feature_std_{i}", torch.ones(n))
        self.register_buffer("height_range", torch.tensor([0.9, 1.3], dtype=torch.float64))  # metres
        self.register_buffer("euler_range", torch.tensor([[-np.pi, np.pi]] * 3, dtype=torch.float64))  # radians, unwrapped

    def fit_statistics(self, statistics):
        """Height and Euler ranges and feature normalisation from the training data; see `data.WaypointDataset.statistics`."""
        low, high = statistics["height_range"]
        self.height_range.copy_(torch.tensor([low - HEIGHT_MARGIN, high + HEIGHT_MARGIN]))
        euler = torch.as_tensor(statistics["euler_range"])
        self.euler_range.copy_(euler + torch.tensor([-ROTATION_MARGIN, ROTATION_MARGIN]))
        for i, (mean, std) in enumerate(statistics["features"]):
            getattr(self, f"feature_mean_{i}").copy_(torch.as_tensor(mean))
            getattr(self, f"feature_std_{i}").copy_(torch.as_tensor(std))

    # -- the network -------------------------------------------------------------------------------------------------

    def trunk_features(self, batch):
        """Features of the prediction grid (B,C,H,W), with the EEF's cell marked."""
        grid, x = self.config.grid, 0
        for i, (maps, project) in enumerate(zip(batch["features"], self.project)):
            mean, std = getattr(self, f"feature_mean_{i}"), getattr(self, f"feature_std_{i}")
            maps = (maps.float() - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
            x = x + F.interpolate(project(maps), size=(grid, grid), mode="bilinear", align_corners=False)
        y_cell, x_cell = self.cells(batch["eef_pos"], batch).round().long().clamp(0, grid - 1).unbind(-1)
        mark = torch.zeros(len(x), 1, grid, grid, device=x.device, dtype=x.dtype)
        mark[torch.arange(len(x)), 0, y_cell, x_cell] = 1
        x = x + mark * self.eef_vector(batch)[..., None, None]
        if self.gripper_embedding is not None:
            x = x + self.gripper_embedding[(batch["gripper_width"] < HALF_OPEN).long()][..., None, None]
        return self.trunk(x)

    def eef_vector(self, batch):
        """The EEF's embedding (B,C), interpolated linearly between the embeddings of the nearest height bins."""
        table, last = self.eef_embedding, self.eef_embedding.shape[1] - 1  # (G,Z,C)
        bins = camera.height_to_bin(batch["eef_pos"][:, 2], *self.height_range, last + 1).clamp(0, last)
        low = bins.floor().long().clamp(max=max(0, last - 1))
        share = (bins - low).to(table.dtype)[:, None]
        closed = (batch["gripper_width"] < HALF_OPEN).long() * (len(table) - 1)
        return (1 - share) * table[closed, low] + share * table[closed, (low + 1).clamp(max=last)]

    def volume_logits(self, features):
        """Trunk features (B,C,H,W) -> logits (B,T,G,Z,H,W), G = 2 gripper commands when they are joint, else 1."""
        c = self.config
        return self.volume(features).view(len(features), c.n_window, self.n_gripper, c.n_height_bins, c.grid, c.grid)

    def at_cells(self, features, cells):
        """Trunk features (B,C,H,W) at integer cells (B,T,2) yx, plus the waypoint's embedding -> (B,T,C)."""
        flat = flat_index(cells, (self.config.grid,) * 2)  # (B,T)
        picked = features.flatten(2).gather(2, flat[:, None].expand(-1, features.shape[1], -1))  # (B,C,T)
        return picked.transpose(1, 2) + self.step_embedding

    # -- geometry ----------------------------------------------------------------------------------------------------

    def cells(self, points, batch):
        """World points (B,3) or (B,T,3) -> continuous cells yx (...,2)."""
        K, E = batch["K"], batch["E"]
        if points.ndim == 3:
            K, E = K[:, None], E[:, None]
        u, v, _ = camera.project(points, K, E)
        to_cell = lambda x: camera.pixel_to_cell(x, self.config.grid, self.config.image_size)
        return torch.stack([to_cell(v), to_cell(u)], -1)

    def coordinates(self, points, batch):
        """World points (B,T,3) -> continuous volume coordinates zyx (B,T,3)."""
        z = camera.height_to_bin(points[..., 2], *self.height_range, self.config.n_height_bins)
        return torch.cat([z[..., None], self.cells(points, batch)], -1)

    def points(self, coordinates, batch):
        """Continuous volume coordinates zyx (B,T,3) -> world points (B,T,3)."""
        c = self.config
        height = camera.bin_to_height(coordinates[..., 0], *self.height_range, c.n_height_bins)
        v, u = (camera.cell_to_pixel(coordinates[..., i], c.grid, c.image_size) for i in (1, 2))
        return camera.unproject(u, v, height, batch["K"][:, None], batch["E"][:, None])

    def euler_bins(self, rotation):
        """Rotations (B,T,3,3) -> bins (B,T,3) per Euler axis; angles are unwrapped about the middle of their range."""
        low, high = self.euler_range[:, 0].cpu().numpy(), self.euler_range[:, 1].cpu().numpy()
        middle = (low + high) / 2
        euler = wrap_angle(matrix_to_euler(rotation.cpu().numpy()), middle)
        bins = np.floor((euler - low) / (high - low) * self.config.n_rot_bins).astype(int)
        return torch.from_numpy(bins.clip(0, self.config.n_rot_bins - 1)).to(rotation.device)

    def decode_rotation(self, logits):
        """Logits (B,T,3,bins) -> rotations (B,T,3,3) at the bins' centres."""
        share = (logits.argmax(-1).double() + 0.5) / self.config.n_rot_bins
        low, high = self.euler_range.unbind(-1)
        return torch.from_numpy(euler_to_matrix((low + share * (high - low)).cpu().numpy())).to(logits.device)

    # -- the policy's interface ----------------------------------------------------------------------------------------

    def loss(self, batch):
        """Cross-entropies of volume, rotation and (if separate) gripper, averaged over the unmasked waypoints, in nats."""
        c, mask = self.config, batch["mask"].flatten()
        mean = lambda values: (values * mask).sum() / mask.sum().clamp(min=1)
        features = self.trunk_features(batch)
        coordinates = self.coordinates(batch["target_pos"], batch)
        shape = (c.n_height_bins, c.grid, c.grid)
        index, weight = soft_targets(coordinates.flatten(0, 1), shape, c.sigma if c.target == "soft" else 0.0)
        if self.n_gripper == 2:
            index = index + batch["target_gripper"].flatten()[:, None] * int(np.prod(shape))
        logits = self.volume_logits(features).flatten(0, 1).flatten(1)  # (B*T, G*Z*H*W)
        parts = {"volume_ce": mean(sparse_cross_entropy(logits, index, weight.float()))}
        cells = coordinates[..., 1:].round().long().clamp(0, c.grid - 1)
        picked = self.at_cells(features, cells)
        rotation = self.rotation(picked).unflatten(-1, (3, c.n_rot_bins)).flatten(0, 1).float()  # (B*T,3,bins)
        bins = self.euler_bins(batch["target_rot"]).flatten(0, 1)
        parts["rotation_ce"] = mean(F.cross_entropy(rotation.transpose(1, 2), bins, reduction="none").mean(-1))
        if self.n_gripper == 1:
            gripper = self.gripper(picked).flatten(0, 1).float()
            parts["gripper_ce"] = mean(F.cross_entropy(gripper, batch["target_gripper"].flatten(), reduction="none"))
        total = sum(parts.values()) + (c.rotation_weight - 1) * parts["rotation_ce"]
        return {"loss": total, **{k: v.detach() for k, v in parts.items()}}

    def predict(self, batch):
        c = self.config
        features = self.trunk_features(batch)
        logits = self.volume_logits(features).float().flatten(0, 1)  # (B*T,G,Z,H,W)
        picked_gripper = logits.flatten(2).amax(-1).argmax(-1)  # (B*T,) the command of the highest peak
        volume = logits[torch.arange(len(logits)), picked_gripper].flatten(1)
        coordinates = local_soft_argmax(volume, (c.n_height_bins, c.grid, c.grid), 2 if c.decode == "soft" else 0)
        coordinates = coordinates.view(-1, c.n_window, 3)
        picked = self.at_cells(features, coordinates[..., 1:].round().long().clamp(0, c.grid - 1))
        gripper = picked_gripper.view(-1, c.n_window) if self.n_gripper == 2 else self.gripper(picked).argmax(-1)
        rotation = self.decode_rotation(self.rotation(picked).unflatten(-1, (3, c.n_rot_bins)))
        return {"position": self.points(coordinates, batch), "gripper": gripper, "rotation": rotation}
