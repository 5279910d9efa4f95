"""PARA, the single-frame baseline: localise the next waypoints in an image-aligned volume instead
of regressing them.

448 px image -> frozen patch features -> 1x1 projection, bilinear to the prediction grid -> a
learned embedding at the current EEF's cell -> three 3x3 convolutions with GELU -> 1x1 convolution
to volume logits (B,T,Z,H,W), one joint softmax per future waypoint. An instruction, where there are
several, scales and shifts the channels of the projection and of each convolution (FiLM).

(cell, height bin) is unprojected through the known camera to a 3D point. Rotation comes from the
feature at the target's cell: the true one in training (teacher forcing), the predicted one in use.
So does the gripper, or it is one more axis of the joint softmax.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import camera
import flags
from nets.maps import dilated_convolutions, mark_cell, projected, ray_layers
from nets.volume import VolumeConfig, VolumeGeometry, flat_index
from policy import finger_state, flag


@dataclass
class TrunkConfig(VolumeConfig):
    """Configuration of PixelTrunk."""

    n_window: int = flag(6, "future waypoints T")
    width: int = flag(64, "channels of the convolutional trunk")
    dilations: str = flag(
        "1,2,4",
        "dilations of the trunk's convolutions: "
        "with 1,1,1 a cell 4 cells from the EEF does not see its mark",
        kind=flags.int_list,
    )
    # what the cells are told of the EEF and of the camera
    eef_height: bool = flag(
        True, "the EEF's embedding depends on its height (interpolated between height bins)"
    )
    eef_gripper: bool = flag(
        True,
        "the EEF's embedding, and one added to every cell, depend on whether the fingers are "
        "measured open or closed",
    )
    rays: bool = flag(
        False,
        "every cell knows where its ray passes the EEF's height and which way it rises, "
        "and so where the camera is",
    )

    presets = {
        "full": {
            "lr": 1e-3,
            "warmup": 200,
            "max_steps": 10_000,
            "val_every": 1000,
            "save_every": 500,
        },
        "small": {
            "grid": 56,
            "width": 48,
            "batch_size": 8,
            "lr": 1e-3,
            "max_steps": 750,
            "val_every": 375,
        },
    }


@dataclass
class ParaConfig(TrunkConfig):
    """Configuration of TrajectoryHeatmapPredictor."""

    gripper_head: str = flag(
        "joint",
        "gripper as an axis of the joint softmax, or a head of its own at the target's cell",
        ("joint", "separate"),
    )


class PixelTrunk(VolumeGeometry):
    """Turns the backbone's maps into features of the prediction grid, with the EEF's cell marked.

    `channels`: of the maps, one number each.
    """

    def __init__(self, config, channels):
        super().__init__(config, channels)
        c, width = config, config.width
        self.project = nn.ModuleList([nn.Conv2d(n, width, 1) for n in channels])
        # (G,Z,C): by fingers and height bin, or one for all of them
        self.eef_embedding = nn.Parameter(
            torch.randn(
                c.fingers if c.eef_gripper else 1, c.n_height_bins if c.eef_height else 1, width
            )
            * 0.5
        )
        # added to every cell: far ones do not see the EEF's mark, but whether something is held
        # has to be known at the plate too
        self.gripper_embedding = (
            nn.Parameter(torch.randn(c.fingers, width) * 0.5) if c.eef_gripper else None
        )
        self.rays = ray_layers(width) if c.rays else None
        self.trunk = dilated_convolutions(width, map(int, c.dilations.split(",")))
        self.film = self.films(1 + len(c.dilations.split(",")), width)

    def trunk_features(self, batch):
        """Features of the prediction grid (B,C,H,W), with the EEF's cell marked."""
        c = self.config
        x = projected(self.normalised(batch["features"]), self.project, c.grid, c.margin)
        told = self.instruction_vectors(batch)
        x = self.film.at(0, x, told)
        x = mark_cell(x, self.cells(batch["eef_pos"], batch), self.eef_vector(batch))
        if self.gripper_embedding is not None:
            state = finger_state(batch["gripper_width"], c)
            fingers = self.gripper_embedding[state]  # (B,C)
            x = x + fingers[..., None, None].to(x.dtype)
        if self.rays is not None:
            x = x + self.rays(self.cell_rays(batch))
        return self.film.along(self.trunk, x, told)

    def eef_vector(self, batch):
        """The EEF's embedding (B,C), interpolated linearly between those of the two nearest height
        bins."""
        table, last = self.eef_embedding, self.eef_embedding.shape[1] - 1  # (G,Z,C)
        # continuous bins (B,), clamped to the table, which may have a single height
        bins = camera.height_to_bin(batch["eef_pos"][:, 2], *self.height_range, last + 1).clamp(
            0, last
        )
        low = bins.floor().long().clamp(max=max(0, last - 1))
        share = (bins - low).to(table.dtype)[:, None]
        # row of the table: always 0 where the fingers have no say (G = 1)
        state = finger_state(batch["gripper_width"], self.config).clamp(max=len(table) - 1)
        return (1 - share) * table[state, low] + share * table[state, (low + 1).clamp(max=last)]

    def at_cells(self, features, cells):
        """Trunk features (B,C,H,W) at integer cells (B,T,2) yx -> (B,T,C)."""
        flat = flat_index(cells, (self.config.side,) * 2)  # (B,T)
        by_cell = features.flatten(2).mT  # (B,HW,C), as it lies in memory
        return by_cell.gather(1, flat[..., None].expand(-1, -1, by_cell.shape[2]))


class TrajectoryHeatmapPredictor(PixelTrunk):
    """See the module's docstring. `channels`: of the backbone's maps."""

    def __init__(self, config, channels):
        super().__init__(config, channels)
        c, width = config, config.width
        self.n_gripper = 2 if c.gripper_head == "joint" else 1
        # one output channel for each waypoint, gripper command and height bin
        self.volume = nn.Conv2d(width, c.n_window * self.n_gripper * c.n_height_bins, 1)
        # waypoints may share a cell: this tells the heads which one is asked for
        self.step_embedding = nn.Parameter(torch.randn(c.n_window, width) * 0.5)
        self.rotation = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3 * c.n_rot_bins)
        )
        if c.gripper_head == "separate":
            self.gripper = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 2))

    def volume_logits(self, features):
        """Trunk features (B,C,H,W) -> logits (B,T,G,Z,H,W), G = 2 gripper commands when they are
        joint, else 1.
        """
        c = self.config
        # as a product, whose result lies in the order of decoding, unlike the convolution's
        weight = self.volume.weight.flatten(1).to(features.dtype)  # (T*G*Z,C)
        logits = weight @ features.flatten(2) + self.volume.bias[:, None].to(features.dtype)
        return logits.view(-1, c.n_window, self.n_gripper, *self.volume_shape)

    def loss(self, batch):
        """Cross-entropies of volume, rotation and (if separate) gripper, averaged over the unmasked
        waypoints, in nats.
        """
        c, mask = self.config, batch["mask"].flatten()
        features = self.trunk_features(batch)
        coordinates = self.coordinates(batch["target_pos"], batch)
        gripper = batch["target_gripper"].flatten()
        # the 1x1 convolution as a product, whose logits are never stored
        weights = self.volume.weight.view(c.n_window, -1, c.width)  # (T,G*Z,C)
        volume = self.product_loss(
            weights,
            self.volume.bias.view(c.n_window, -1),
            features,
            coordinates,
            batch["target_gripper"] if self.n_gripper == 2 else None,
        )
        parts = {"volume_ce": self.masked_mean(volume.flatten(), mask)}
        # teacher forcing: gripper and rotation are read at the true cell, features (B,T,C)
        picked = (
            self.at_cells(features, coordinates[..., 1:].round().long().clamp(0, c.side - 1))
            + self.step_embedding
        )
        # (B*T,3,bins)
        rotation = self.rotation(picked).unflatten(-1, (3, c.n_rot_bins)).flatten(0, 1)
        parts["rotation_ce"] = self.masked_mean(
            self.rotation_loss(rotation, batch["target_rot"].flatten(0, 1)), mask
        )
        if self.n_gripper == 1:
            logits = self.gripper(picked).flatten(0, 1).float()
            parts["gripper_ce"] = self.masked_mean(
                F.cross_entropy(logits, gripper, reduction="none"), mask
            )
        # every part counts once, rotation `rotation_weight` times
        total = sum(parts.values()) + (c.rotation_weight - 1) * parts["rotation_ce"]
        return {"loss": total, **{k: v.detach() for k, v in parts.items()}}

    def predict(self, batch):
        c = self.config
        features = self.trunk_features(batch)
        logits = self.volume_logits(features).float().flatten(0, 1)  # (B*T,G,Z,H,W)
        coordinates, picked_gripper = self.decode_volume(logits)
        coordinates = coordinates.view(-1, c.n_window, 3)
        # as in training, at the decoded cell instead of the true one
        picked = (
            self.at_cells(features, coordinates[..., 1:].round().long().clamp(0, c.side - 1))
            + self.step_embedding
        )
        # the command of the highest peak, or that of the separate head
        gripper = (
            picked_gripper.view(-1, c.n_window)
            if self.n_gripper == 2
            else self.gripper(picked).argmax(-1)
        )
        rotation = self.decode_rotation(self.rotation(picked).unflatten(-1, (3, c.n_rot_bins)))
        return {
            "position": self.points(coordinates, batch),
            "gripper": gripper,
            "rotation": rotation,
        }
