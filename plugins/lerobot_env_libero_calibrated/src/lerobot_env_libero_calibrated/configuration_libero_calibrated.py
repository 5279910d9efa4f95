"""What --env.type=libero_calibrated is configured by."""

from dataclasses import dataclass, field
from functools import partial

import gymnasium as gym
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig
from lerobot.envs.utils import _LazyAsyncVectorEnv, freeze_after_episode_end
from lerobot.processor import LiberoProcessorStep, PolicyProcessorPipeline
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from runtime import UserError, ending
from sim import settings
from sim.cameras import RENDERS
from sim.layouts import LAYOUTS
from sim.tasks import find_task, init_states

from .environment import CalibratedLibero


@EnvConfig.register_subclass("libero_calibrated")
@dataclass
class LiberoCalibratedEnv(EnvConfig):
    """LIBERO as this repository evaluates in it.

    task: a LIBERO or LIBERO-PRO suite; task_ids: which of its tasks, by default all.
    layout: where objects and camera stand, one of sim/layouts.py or several with commas.
    split: of the layout's setting; by default its first. clean_scene: without distractors; by
    default where the setting asks for it.
    episode_length: control steps at most. first_episode: index of the first episode; which init
    state, view and position an episode has depends on its index alone.
    observation_width, observation_height: pixels, alike. render: exact or fast, see sim/cameras.py.
    wrist: whether observations have `image2`, the wrist camera, which costs a second rendering.
    """

    task: str = "libero_spatial"
    task_ids: list[int] | None = None
    layout: str = "benchmark"
    split: str | None = None
    clean_scene: bool | None = None
    fps: int = 20
    episode_length: int = 600
    first_episode: int = 0
    observation_width: int = 448
    observation_height: int = 448
    render: str = "exact"
    wrist: bool = False
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        image = (self.observation_height, self.observation_width, 3)
        known = [
            (ACTION, ACTION, FeatureType.ACTION, (7,)),
            ("pixels/image", f"{OBS_IMAGES}.image", FeatureType.VISUAL, image),
            ("robot_state", OBS_STATE, FeatureType.STATE, (8,)),
            ("camera_intrinsics", "observation.camera_intrinsics", FeatureType.STATE, (3, 3)),
            ("camera_extrinsics", "observation.camera_extrinsics", FeatureType.STATE, (4, 4)),
        ]
        if self.wrist:
            known.append(("pixels/image2", f"{OBS_IMAGES}.image2", FeatureType.VISUAL, image))
        for name, policy_name, kind, shape in known:
            self.features[name] = PolicyFeature(type=kind, shape=shape)
            self.features_map[name] = policy_name

    @property
    def gym_kwargs(self):
        return {}

    def check(self):
        """(Names of layouts, task ids). Raises UserError for what no environment is made of."""
        layouts = [name.strip() for name in self.layout.split(",")]
        for name in layouts:
            if name not in LAYOUTS:
                known = ", ".join(LAYOUTS)
                raise UserError(f"--env.layout={name}: unknown; there are {known}")
            settings.resolve_split(LAYOUTS[name][0], self.split)
        if self.render not in RENDERS:
            raise UserError(f"--env.render={self.render}: unknown; there are {', '.join(RENDERS)}")
        if self.observation_width != self.observation_height or self.observation_width < 16:
            raise UserError(
                f"--env.observation_width={self.observation_width} and --env.observation_height="
                f"{self.observation_height}: give the same number of pixels, at least 16"
            )
        if self.fps != 20:
            raise UserError(f"--env.fps={self.fps}: a control step takes 1/20 s; leave it out")
        if self.episode_length < 1 or self.first_episode < 0:
            raise UserError(
                f"--env.episode_length={self.episode_length} and --env.first_episode="
                f"{self.first_episode}: give at least 1 step, and an index from 0"
            )
        return layouts, self._checked_tasks()

    def _checked_tasks(self):
        if self.task_ids is not None and not self.task_ids:
            raise UserError("--env.task_ids=[]: none; name some, or leave it out for all")
        ids = self.task_ids
        if ids is None:
            ids, index = [], 0
            # the last one is where the suite says so
            while True:
                try:
                    find_task(self.task, index)
                except UserError:
                    if not ids:
                        raise
                    break
                ids.append(index)
                index += 1
        for index in ids:
            init_states(find_task(self.task, index))  # are its files there?
        return ids

    def create_envs(self, n_envs, use_async_envs=False):
        """{suite_layout: {task id: vector environment of n_envs rows}}. Where the first episode is
        not 0, the name ends in `_fromN`, by which compare.py knows which ones were played.
        """
        with ending("lerobot"):
            layouts, ids = self.check()
        made, begun = {}, f"_from{self.first_episode}" if self.first_episode else ""
        for layout in layouts:
            setting = LAYOUTS[layout][0]
            clean = self.clean_scene
            clean = settings.clean_by_default(setting) if clean is None else clean
            for index in ids:
                rows = [
                    partial(
                        CalibratedLibero,
                        suite=self.task,
                        task_id=index,
                        layout=layout,
                        split=settings.resolve_split(setting, self.split),
                        clean=clean,
                        size=self.observation_width,
                        render=self.render,
                        wrist=self.wrist,
                        episode_length=self.episode_length,
                        first_episode=self.first_episode + row,
                        stride=n_envs,
                    )
                    for row in range(n_envs)
                ]
                made.setdefault(f"{self.task}_{layout}{begun}", {})[index] = vectorised(
                    rows, use_async_envs
                )
        return made

    def get_env_processors(self):
        # as LeRobot's LIBERO: its 8-number state, images turned by 180 degrees
        return (
            PolicyProcessorPipeline(steps=[LiberoProcessorStep()]),
            PolicyProcessorPipeline(steps=[]),
        )


def vectorised(rows, use_async_envs):
    """Rows (functions that make an environment) as one vector environment, each in a process of its
    own where that is asked for. A row whose episode has ended stands still until all have."""
    if use_async_envs and len(rows) > 1:
        return _LazyAsyncVectorEnv(rows)
    return gym.vector.SyncVectorEnv(
        [freeze_after_episode_end(row) for row in rows],
        autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP,
    )
