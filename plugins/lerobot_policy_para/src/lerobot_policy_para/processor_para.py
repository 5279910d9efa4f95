"""Between LeRobot's observations and the policy: the images upright, everything on its device."""

from dataclasses import dataclass

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

from runtime import ending

from .images import upright


@dataclass
@ProcessorStepRegistry.register(name="para_upright_images")
class UprightImages(ObservationProcessorStep):
    """Images (B,3,H,W) of an observation, upright and not mirrored. images: how they come in."""

    images: str = "lerobot"

    def observation(self, observation):
        with ending("lerobot"):
            return {
                key: upright(value, self.images) if key.startswith(OBS_IMAGES) else value
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
