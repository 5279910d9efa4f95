"""What --policy.type=para is configured by."""

from dataclasses import dataclass

from lerobot.configs import PreTrainedConfig
from lerobot.optim import AdamWConfig
from lerobot.utils.constants import OBS_IMAGES


@PreTrainedConfig.register_subclass("para")
@dataclass
class ParaConfig(PreTrainedConfig):
    """A checkpoint of this repository, of any of its policies, and how it is used.

    checkpoint: its .safetensors file; a folder that `ParaPolicy.save_pretrained` wrote has its own.
    backbone_weights: a local file of backbone weights, where the checkpoint was trained on one;
    text_weights: a local folder of the frozen text model, likewise.
    image: the observation's key of the agentview picture.
    images: how pictures lie in memory, "lerobot" or "upright", see images.py.
    scene: whose camera is meant where the observation carries none (see cameras.py); by default
    that of the observation's task.
    zero_rotation: keep the gripper's orientation; by default unless the policy turns and its
    demonstrations did. seed: of what a sampling policy draws.
    """

    checkpoint: str | None = None
    backbone_weights: str | None = None
    text_weights: str | None = None
    image: str = f"{OBS_IMAGES}.image"
    images: str = "lerobot"
    scene: str | None = None
    zero_rotation: bool | None = None
    seed: int = 0
    push_to_hub: bool = False

    def validate_features(self):
        """LeRobot's hook. What a policy needs is looked at in the first observation."""

    @property
    def observation_delta_indices(self):
        return None

    @property
    def action_delta_indices(self):
        return None

    @property
    def reward_delta_indices(self):
        return None

    def get_optimizer_preset(self):
        return AdamWConfig()

    def get_scheduler_preset(self):
        return None
