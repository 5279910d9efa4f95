"""A checkpoint of this repository as a LeRobot policy: one OSC action per 20 Hz step."""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE

from harness.checkpoint import load_policy
from harness.records import keeps_orientation
from rot_utils import matrix_to_quat, rotvec_to_matrix
from runtime import UserError, ending
from sim.libero_env import Observation
from sim.servo import least_steps

from .cameras import camera_of, instruction_of, support_of
from .configuration_para import ParaConfig
from .row import Row

WEIGHTS = "model.safetensors"  # in a folder of `save_pretrained`: our checkpoint, as it is
# observation.state: EEF position (m), its rotation vector (rad), the two fingers' joints (m)
STATE = 8


class ParaPolicy(PreTrainedPolicy):
    """Any checkpoint of this repository behind LeRobot's interface.

    Each row of a batch is an episode of its own: a session of the network with its own history, and
    a servo. They share weights. Observations come from `make_para_pre_post_processors`.
    """

    config_class = ParaConfig
    name = "para"

    def __init__(self, config, **kwargs):
        super().__init__(config)
        with ending("lerobot"):
            if config.checkpoint is None:
                raise UserError(
                    "--policy.checkpoint: none is given; name a .safetensors file of train.py's, "
                    "or --policy.path with a folder that holds one"
                )
            device = torch.device(config.device or "cpu")
            self.network, self.about, _ = load_policy(
                config.checkpoint,
                device,
                config.backbone_weights,
                text_weights=config.text_weights,
            )
        if self.about.get("dataset", {}).get("render") == "fast":
            print(
                f"note: {config.checkpoint} was trained on pictures of --render fast; give "
                "--env.render=fast",
                file=sys.stderr,
            )
        self.zero_rotation = config.zero_rotation
        if self.zero_rotation is None:
            self.zero_rotation = keeps_orientation(self.about) or not self.network.turns
        self.rows = []
        self.episodes = 0  # that were begun, of all rows: each draws differently

    # -- acting

    def reset(self):
        """A new batch of episodes begins."""
        self.rows = []

    @torch.inference_mode()
    def select_action(self, batch, **kwargs):
        """Batch of observations -> actions (B,7) in [-1, 1]: translation (1 = 5 cm), rotation
        vector (1 = 0.5 rad), gripper (-1 opens, +1 closes).

        Raises UserError for an observation that lacks an image, a state or a camera.
        """
        with ending("lerobot"):
            images, state = self._images(batch), self._state(batch)
            if len(self.rows) != len(state):
                self.rows = [self._new_row() for _ in state]
            actions = []
            for i, row in enumerate(self.rows):
                actions.append(row.action(self._observation(batch, i, images[i], state[i])))
        return torch.from_numpy(np.stack(actions)).float().to(state.device)

    def predict_action_chunk(self, batch, **kwargs):
        """Actions (B,1,7): a step of the servo depends on where the last one led."""
        return self.select_action(batch)[:, None]

    def _new_row(self):
        session = self.network.session()
        session.begin(self.config.seed + self.episodes)
        self.episodes += 1
        # in lift_once staying is a decision, and takes as long as in its demonstrations
        variant = self.about.get("dataset", {}).get("variant", "task")
        least = least_steps(variant, self.network.config.waypoint_stride)
        return Row(session.act, self.zero_rotation, least)

    def _images(self, batch):
        if self.config.image not in batch:
            found = ", ".join(key for key in batch if key.startswith("observation.image"))
            raise UserError(
                f"--policy.image={self.config.image}: the observation has no such image, it has "
                f"{found or 'none'}"
            )
        images = batch[self.config.image]
        if images.shape[-1] != images.shape[-2]:
            raise UserError(
                f"{self.config.image} is {images.shape[-1]} x {images.shape[-2]} px; the policies "
                "are made for square images, give --env.observation_width and "
                "--env.observation_height alike"
            )
        return images

    def _state(self, batch):
        state = batch.get(OBS_STATE)
        if state is None or state.shape[-1] != STATE:
            found = "missing" if state is None else f"of {state.shape[-1]} numbers"
            raise UserError(
                f"{OBS_STATE} is {found}; LIBERO's has {STATE}: EEF position, rotation vector, "
                "two finger joints (--env.obs_type=pixels_agent_pos)"
            )
        return state

    def _observation(self, batch, row, image, state):
        """A row as this repository's Observation. image (3,H,H) in [0, 1], upright; state (8,)."""
        instruction = instruction_of(batch, row)
        if self.network.reader and not instruction.strip():
            raise UserError(
                "the policy is told what to do, and the observation says no task; give its 'task'"
            )
        given, wanted = image.shape[-1], self.network.config.image_size
        K, E = camera_of(batch, row, given, self.config.scene)
        if given != wanted:
            image = F.interpolate(
                image[None], (wanted, wanted), mode="bilinear", antialias=True, align_corners=False
            )[0]
            # pixels are measured from the image's corner, so that K scales with the side
            K = np.diag([wanted / given, wanted / given, 1.0]) @ K
        numbers = state.double().cpu().numpy()
        rotation = rotvec_to_matrix(numbers[3:6])
        return Observation(
            image=(image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy(),
            eef_pos=numbers[:3],
            eef_rot=rotation,
            eef_quat=matrix_to_quat(rotation),
            gripper_qpos=numbers[6:],
            joint_pos=None,  # no policy reads it
            K=K,
            E=E,
            # LeRobot's evaluation says each environment's task in words
            instruction=instruction,
            support=support_of(batch, row, self.config.scene),
        )

    # -- training, which train.py does

    def forward(self, batch):
        raise NotImplementedError(
            f"{ACTION}s are no waypoints: train with this repository's train.py --dataset FOLDER, "
            "which reads LeRobot's datasets, and evaluate its checkpoint here"
        )

    def get_optim_params(self):
        return self.network.param_groups(0.0)

    # -- files

    def _save_pretrained(self, save_directory, state_dict=None):
        """config.json, and the checkpoint as it is: its header says how the policy is built."""
        shutil.copyfile(self.config.checkpoint, Path(save_directory) / WEIGHTS)
        checkpoint, self.config.checkpoint = self.config.checkpoint, None
        try:
            self.config._save_pretrained(Path(save_directory))
        finally:
            self.config.checkpoint = checkpoint

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path, *, config=None, **kwargs):
        """The policy of a folder of `save_pretrained`, ready to act."""
        folder = Path(pretrained_name_or_path)
        if config is None:
            config = PreTrainedConfig.from_pretrained(folder)
        if config.checkpoint is None:
            config.checkpoint = str(folder / WEIGHTS)
        return cls(config).to(config.device).eval()
