"""One LIBERO task of this repository's simulator as a Gymnasium environment."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from runtime import ending
from sim.layouts import episode_state, event
from sim.libero_env import Scene
from sim.tasks import find_task

WRIST = "robot0_eye_in_hand"


class CalibratedLibero(gym.Env):
    """One task in one layout; see LiberoCalibratedEnv for the arguments.

    An observation has, besides what LeRobot's own LIBERO has, the camera of its picture:
    `camera_intrinsics` (3,3) px and `camera_extrinsics` (4,4) camera-to-world with OpenCV axes.
    They mean the upright picture. `pixels` hold the rows as MuJoCo gives them, bottom first, which
    LeRobot's LiberoProcessorStep expects.

    Its episodes are first_episode, first_episode + stride, ... Each begins as in eval.py, with the
    layout's state for that index and 12 control steps of rest. It ends with LIBERO's predicate, or
    after `episode_length` steps.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    render_mode = "rgb_array"

    def __init__(
        self,
        suite,
        task_id,
        layout,
        split,
        clean,
        size,
        render,
        wrist,
        episode_length,
        first_episode,
        stride,
    ):
        task = find_task(suite, task_id)
        # names that LeRobot asks for
        self.task, self.task_description = task.name, task.language
        self._max_episode_steps = episode_length
        self.layout, self.split, self.wrist = layout, split, wrist
        self.episode, self.stride = None, stride
        self.first_episode, self.steps, self.picture = first_episode, 0, None
        self.event = None  # what happens meanwhile, in layouts that have something
        # the simulator starts with the first reset: in the process that steps it
        self.scene = None
        self.made_of = {
            "task_suite": suite,
            "task_id": task_id,
            "image_size": size,
            "clean": clean,
            "render": render,
        }
        self.action_space = spaces.Box(-1.0, 1.0, (7,), np.float32)
        self.observation_space = self._space(size)

    def _space(self, size):
        numbers = lambda *shape: spaces.Box(-np.inf, np.inf, shape, np.float64)
        names = ("image", "image2") if self.wrist else ("image",)
        pixels = {name: spaces.Box(0, 255, (size, size, 3), np.uint8) for name in names}
        robot = {
            "eef": spaces.Dict({"pos": numbers(3), "quat": numbers(4), "mat": numbers(3, 3)}),
            "gripper": spaces.Dict({"qpos": numbers(2)}),
            "joints": spaces.Dict({"pos": numbers(7)}),
        }
        return spaces.Dict(
            {
                "pixels": spaces.Dict(pixels),
                "robot_state": spaces.Dict(robot),
                "camera_intrinsics": numbers(3, 3),
                "camera_extrinsics": numbers(4, 4),
            }
        )

    def reset(self, *, seed=None, options=None):
        """Begin the next episode. seed changes nothing: an episode's index says all about it."""
        super().reset(seed=seed)
        with ending("lerobot"):
            if self.scene is None:
                self.scene = Scene(**self.made_of)
            # the first, or one row-stride further
            self.episode = (
                self.first_episode if self.episode is None else self.episode + self.stride
            )
            state, condition = episode_state(self.scene, self.layout, self.episode, self.split)
        self.scene.begin_episode(state)
        self.event = event(self.layout, self.episode)
        self.steps = 0
        described = {"theta": condition.theta, "phi": condition.phi}
        moved = {"dx": condition.dx, "dy": condition.dy}
        return self._observe(), {
            "is_success": False,
            "episode": self.episode,
            **described,
            **moved,
        }

    def step(self, action):
        self.scene.step(action)
        self.steps += 1
        if self.event:
            self.event.note(self.scene, self.steps)
        success = self.scene.success()
        over = self.steps >= self._max_episode_steps
        info = {"is_success": success, "episode": self.episode}
        return self._observe(), float(success), success, over and not success, info

    def _observe(self):
        now = self.scene.observe()
        self.picture = now.image
        pixels = {"image": np.ascontiguousarray(now.image[::-1])}
        if self.wrist:
            # its context is current since `observe`
            side = self.scene.image_size
            pixels["image2"] = self.scene.sim.render(width=side, height=side, camera_name=WRIST)
        return {
            "pixels": pixels,
            "robot_state": {
                "eef": {"pos": now.eef_pos, "quat": now.eef_quat, "mat": now.eef_rot},
                "gripper": {"qpos": now.gripper_qpos},
                "joints": {"pos": now.joint_pos},
            },
            "camera_intrinsics": now.K,
            "camera_extrinsics": now.E,
        }

    def render(self):
        """The picture (S,S,3) of the last observation, upright: LeRobot's videos show it."""
        return self.picture

    def close(self):
        if self.scene is not None:
            self.scene.close()
            self.scene = None
