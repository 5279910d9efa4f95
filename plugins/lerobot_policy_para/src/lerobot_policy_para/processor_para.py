"""Between LeRobot's observations and the policy: the images upright, everything on its device.

MuJoCo's rows come bottom first. LeRobot's LIBERO, and the public datasets, turn such an image by
180 degrees, which leaves it mirrored left to right. A camera matrix means the picture as it is
seen, so the mirror is undone here, once.
"""

from dataclasses import dataclass

import torch
from lerobot.configs import PipelineFeatureType, PolicyFeature
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    ObservationProcessorStep,
    PolicyProcessorPipeline,
    ProcessorStepRegistry,
    RenameObservationsProcessorStep,
    policy_action_to_transition,
    transition_to_policy_action,
)
from lerobot.utils.constants import (
    OBS_IMAGES,
    POLICY_POSTPROCESSOR_DEFAULT_NAME,
    POLICY_PREPROCESSOR_DEFAULT_NAME,
)

from runtime import UserError, ending

from .configuration_para import IMAGES


@dataclass
@ProcessorStepRegistry.register(name="para_upright_images")
class UprightImages(ObservationProcessorStep):
    """Images (B,3,H,W) of an observation, upright and not mirrored. images: how they come in."""

    images: str = "lerobot"

    def __post_init__(self):
        with ending("lerobot"):
            if self.images not in IMAGES:
                known = " and ".join(IMAGES)
                raise UserError(f"--policy.images={self.images}: unknown; there are {known}")

    def observation(self, observation):
        if self.images == "upright":
            return observation
        return {
            key: torch.flip(value, dims=[-1]) if key.startswith(OBS_IMAGES) else value
            for key, value in observation.items()
        }

    def get_config(self):
        return {"images": self.images}

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        return features


def make_para_pre_post_processors(config, dataset_stats=None):
    """LeRobot's two pipelines around the policy. Nothing is normalised here: a checkpoint holds the
    statistics of its own training data."""
    before = [
        RenameObservationsProcessorStep(rename_map={}),
        AddBatchDimensionProcessorStep(),
        UprightImages(images=config.images),
        DeviceProcessorStep(device=config.device),
    ]
    return (
        PolicyProcessorPipeline(steps=before, name=POLICY_PREPROCESSOR_DEFAULT_NAME),
        PolicyProcessorPipeline(
            steps=[DeviceProcessorStep(device="cpu")],
            name=POLICY_POSTPROCESSOR_DEFAULT_NAME,
            to_transition=policy_action_to_transition,
            to_output=transition_to_policy_action,
        ),
    )
