"""Policies by name: --model_type NAME -> (policy class, config class, dataset class). A new policy
is one line here.
"""

from typing import NamedTuple

from data import WaypointDataset
from data_ar import WindowDataset
from data_smith300_volume import VolumeDataset
from model import ParaConfig, TrajectoryHeatmapPredictor
from model_act import ActConfig, ActPolicy
from model_autoregressive import AutoregressiveConfig, AutoregressivePolicy
from model_dino_volume_kv import DinoVolumeKV, DinoVolumeKVConfig
from model_dino_volume_kv_full import DinoVolumeKVFull, DinoVolumeKVFullConfig
from model_voxel_ar import VoxelConfig, VoxelPolicy
from model_voxel_ar_rel import RelativeVoxelConfig, RelativeVoxelPolicy
from runtime import UserError


class Entry(NamedTuple):
    policy: type
    config: type
    dataset: type


# The dataset class goes by what a sample is: a frame, a window of frames, or a frame with the
# rotation basis of its dataset.
REGISTRY = {
    "para": Entry(TrajectoryHeatmapPredictor, ParaConfig, WaypointDataset),
    "act": Entry(ActPolicy, ActConfig, WaypointDataset),
    "autoregressive": Entry(AutoregressivePolicy, AutoregressiveConfig, WindowDataset),
    "voxel_ar": Entry(VoxelPolicy, VoxelConfig, WindowDataset),
    "voxel_ar_rel": Entry(RelativeVoxelPolicy, RelativeVoxelConfig, WindowDataset),
    "dino_volume_kv": Entry(DinoVolumeKV, DinoVolumeKVConfig, VolumeDataset),
    "dino_volume_kv_full": Entry(DinoVolumeKVFull, DinoVolumeKVFullConfig, VolumeDataset),
}


def look_up(model_type):
    """The Entry of a model type. Raises UserError for an unknown one."""
    if model_type not in REGISTRY:
        raise UserError(f"--model_type {model_type}: unknown; there are {', '.join(REGISTRY)}")
    return REGISTRY[model_type]
