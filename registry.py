"""Policies by name: --model_type NAME -> (policy class, config class, dataset class). A new policy is one line here."""
from typing import NamedTuple

from data import WaypointDataset
from data_ar import WindowDataset
from model import ParaConfig, TrajectoryHeatmapPredictor
from model_autoregressive import AutoregressiveConfig, AutoregressivePolicy
from runtime import UserError


class Entry(NamedTuple):
    policy: type
    config: type
    dataset: type


REGISTRY = {
    "para": Entry(TrajectoryHeatmapPredictor, ParaConfig, WaypointDataset),
    "autoregressive": Entry(AutoregressivePolicy, AutoregressiveConfig, WindowDataset),
}


def look_up(model_type):
    """The Entry of a model type. Raises UserError for an unknown one."""
    if model_type not in REGISTRY:
        raise UserError(f"--model_type {model_type}: unknown; there are {', '.join(REGISTRY)}")
    return REGISTRY[model_type]
