"""Both plugins inside LeRobot, in its own environment (Python 3.12):

plugins/setup.sh && .venv-lerobot/bin/python -m pytest tests/plugins
"""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

pytest.importorskip(
    "lerobot.envs",
    reason="LeRobot has an environment of its own: `make lerobot` makes it and runs this",
)

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.envs import make_env, make_env_pre_post_processors, preprocess_observation
from lerobot.policies import make_policy, make_pre_post_processors
from lerobot.scripts import lerobot_eval
from lerobot_env_libero_calibrated import LiberoCalibratedEnv
from lerobot_policy_para import ParaConfig, export

CKPT = "checkpoints/para_libero_spatial_0.safetensors"
SMALL = {"task_ids": [0], "layout": "val_viewpoint", "render": "fast", "episode_length": 20}
PAGE = (ROOT / "docs" / "lerobot_eval.md").read_text()
COMMANDS = [
    line.split(" #")[0]
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    for line in block.replace("\\\n", " ").splitlines()
]


def evaluate(words, monkeypatch, folder):
    """Run `lerobot-eval` with these words in the repository's root -> what it wrote."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lerobot-eval", *words, f"--output_dir={folder}"])
    lerobot_eval.main()
    return json.loads((folder / "eval_info.json").read_text())


class Loop:
    """LeRobot's rollout up to the policy: rows of an environment, and the processors around it."""

    def __init__(self, n_envs, policy_config, **env):
        config = LiberoCalibratedEnv(**{**SMALL, **env})
        (group,) = make_env(config, n_envs=n_envs).values()
        self.env = group[0]
        self.policy = make_policy(policy_config, env_cfg=config)
        self.before_env, _ = make_env_pre_post_processors(config, policy_config)
        self.before, self.after = make_pre_post_processors(
            policy_config, policy_config.pretrained_path
        )

    def batch(self, observation):
        """What the policy gets of an observation."""
        observation = preprocess_observation(observation)
        observation["task"] = list(self.env.call("task_description"))
        return self.before(self.before_env(observation))

    def actions(self, steps):
        """Actions (steps,B,7) of a rollout from the next episodes."""
        observation, _ = self.env.reset(options={"lerobot_new_rollout": True})
        self.policy.reset()
        done = []
        for _ in range(steps):
            action = self.after(self.policy.select_action(self.batch(observation)))
            done.append(action.numpy())
            observation, *_ = self.env.step(done[-1])
        return np.array(done)


@pytest.fixture(scope="module")
def loop():
    made = Loop(1, ParaConfig(checkpoint=str(ROOT / CKPT), device="cpu"))
    yield made
    made.env.close()


def test_the_policy_sees_the_picture_that_its_camera_means(loop):
    """Through all of LeRobot's turning the policy gets the scene's picture, pixel by pixel, with
    the moved camera it was drawn with and the EEF where it is."""
    observation, info = loop.env.reset(options={"lerobot_new_rollout": True})
    batch = loop.batch(observation)
    scene = loop.env.envs[0].unwrapped.scene
    seen = loop.policy._observation(
        batch, 0, loop.policy._images(batch)[0], loop.policy._state(batch)[0]
    )
    ours = scene.observe()
    np.testing.assert_array_equal(seen.image, ours.image)
    np.testing.assert_allclose(seen.E, ours.E, atol=1e-6)
    np.testing.assert_allclose(seen.K, ours.K, rtol=1e-6)
    np.testing.assert_allclose(seen.eef_pos, ours.eef_pos, atol=1e-6)
    np.testing.assert_allclose(seen.eef_rot, ours.eef_rot, atol=1e-5)
    np.testing.assert_allclose(seen.gripper_width, ours.gripper_width, atol=1e-6)
    # the camera of this layout is a moved one
    assert info["theta"][0] > 5


def test_rows_of_a_batch_are_episodes_of_their_own(loop):
    """Two rows answer what each would alone: neither servo nor history is shared."""
    both = Loop(2, ParaConfig(checkpoint=str(ROOT / CKPT), device="cpu"), first_episode=1)
    together = both.actions(15)
    both.env.close()
    loop.env.envs[0].unwrapped.episode = 0  # the next one is 1
    alone = [loop.actions(15)[:, 0] for _ in range(2)]
    np.testing.assert_allclose(together[:, 0], alone[0], atol=1e-5)
    np.testing.assert_allclose(together[:, 1], alone[1], atol=1e-5)
    assert np.abs(alone[0] - alone[1]).max() > 0.05


def test_a_row_that_has_ended_waits_for_the_others(loop):
    """The next episode has the next index, whether or not LeRobot's autoreset came before it."""
    env = loop.env
    env.reset(options={"lerobot_new_rollout": True})
    inner = env.envs[0].unwrapped
    before, inner._max_episode_steps = inner.episode, 2
    # over after two steps; the vector environment resets it by itself, and steps on
    ends = [env.step(np.zeros((1, 7), np.float32))[2:4] for _ in range(5)]
    assert [bool(truncated[0]) for _, truncated in ends][:2] == [False, True]
    assert not any(terminated[0] for terminated, _ in ends) and inner.episode == before
    assert inner.steps == 2
    env.reset(options={"lerobot_new_rollout": True})
    assert inner.episode == before + 1
    inner._max_episode_steps = SMALL["episode_length"]


def test_a_smaller_picture_is_brought_to_the_policys_size_with_its_camera():
    """At LeRobot's 360 px the decision is nearly that of 448: K goes with the picture. In the view
    that the policy was trained on: in another its decisions turn on a pixel.
    """
    usual = Loop(1, ParaConfig(checkpoint=str(ROOT / CKPT), device="cpu"), layout="val")
    observation, _ = usual.env.reset(options={"lerobot_new_rollout": True})
    batch = usual.batch(observation)
    usual.env.close()
    smaller = dict(batch)
    smaller["observation.images.image"] = torch.nn.functional.interpolate(
        batch["observation.images.image"], (360, 360), mode="area"
    )
    scale = torch.diag(torch.tensor([360 / 448, 360 / 448, 1.0]))
    smaller["observation.camera_intrinsics"] = scale @ batch["observation.camera_intrinsics"]
    found, policy = [], usual.policy
    for each in (batch, smaller):
        image, state = policy._images(each)[0], policy._state(each)[0]
        seen = policy._observation(each, 0, image, state)
        policy.network.begin(0)
        found.append((policy.network.act(seen).position, seen.K, seen.image.shape))
    assert np.linalg.norm(found[0][0] - found[1][0]) < 0.02  # metres
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-6)
    assert found[0][2] == found[1][2]


def test_an_exported_folder_is_the_same_policy(loop, tmp_path):
    """config.json, model.safetensors and both processors rebuild the policy that was exported."""
    export.export(ROOT / CKPT, tmp_path / "para")
    made = {p.name for p in (tmp_path / "para").iterdir()}
    assert {"config.json", "model.safetensors", "policy_preprocessor.json"} <= made
    config = PreTrainedConfig.from_pretrained(tmp_path / "para")
    config.pretrained_path = tmp_path / "para"
    observation, _ = loop.env.reset(options={"lerobot_new_rollout": True})
    policy = make_policy(config, env_cfg=LiberoCalibratedEnv(**SMALL))
    before, _ = make_pre_post_processors(config, config.pretrained_path)
    step = lambda p, b: p.select_action(b).numpy()
    loop.policy.reset()
    raw = loop.before_env(preprocess_observation(observation))
    np.testing.assert_array_equal(step(policy, before(raw)), step(loop.policy, loop.before(raw)))


def test_another_policy_gets_lerobots_own_observation():
    """A policy trained on public LIBERO data finds its two pictures and its 8-number state."""
    other = Loop(
        1,
        ParaConfig(checkpoint=str(ROOT / CKPT), device="cpu"),
        wrist=True,
        clean_scene=True,
        observation_width=256,
        observation_height=256,
    )
    observation, _ = other.env.reset(options={"lerobot_new_rollout": True})
    batch = other.before_env(preprocess_observation(observation))
    assert batch["observation.images.image2"].shape == (1, 3, 256, 256)
    assert batch["observation.state"].shape == (1, 8)
    # as in the public data: what is left in the picture is right in the scene
    picture = other.env.envs[0].render()
    turned = (255 * batch["observation.images.image"][0]).round().byte().permute(1, 2, 0)
    np.testing.assert_array_equal(turned.numpy(), picture[:, ::-1])
    other.env.close()


@pytest.mark.parametrize("command", [c for c in COMMANDS if "lerobot-eval" in c])
def test_commands_of_the_page_run(command, monkeypatch, tmp_path):
    """Each `lerobot-eval` of docs/lerobot_eval.md runs as written, only shorter."""
    words = [w for w in shlex.split(command) if w.startswith("--")]
    if "--policy.path=outputs/para" in words:
        # the page's line before it
        (line,) = [c for c in COMMANDS if "lerobot_policy_para.export" in c]
        *_, checkpoint, folder = line.split()
        assert folder == "outputs/para"
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["export", checkpoint, str(tmp_path / "para")])
        export.main()
        words = [w.replace("outputs/para", str(tmp_path / "para")) for w in words]
    short = ["--eval.n_episodes=1", "--eval.batch_size=1", "--env.episode_length=3"]
    names = {w.partition("=")[0] for w in short}
    words = [w for w in words if w.partition("=")[0] not in names]
    info = evaluate([*words, *short], monkeypatch, tmp_path / "out")
    assert all(task["metrics"]["successes"] == [False] for task in info["per_task"])
    for path in info["overall"]["video_paths"]:
        assert Path(path).stat().st_size > 1000


POLICY = ["--policy.type=para", "--policy.device=cpu", "--seed=0"]
ENV = ["--env.type=libero_calibrated", "--env.task_ids=[0]", "--env.render=fast"]
SHORT = ["--eval.n_episodes=1", "--eval.batch_size=1", "--env.episode_length=2"]


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([*POLICY, *ENV], "--policy.checkpoint: none is given; name a .safetensors file"),
        ([*POLICY, "--policy.checkpoint=README.md", *ENV], "README.md: not a safetensors file"),
        ([*POLICY, "--policy.checkpoint=gone.safetensors", *ENV], "gone.safetensors: no such"),
        (
            [*POLICY, f"--policy.checkpoint={CKPT}", *ENV, "--env.layout=upside_down"],
            "--env.layout=upside_down: unknown; there are benchmark, shifted",
        ),
        (
            [*POLICY, f"--policy.checkpoint={CKPT}", *ENV, "--env.task=libero_none"],
            "libero_none: no such LIBERO suite",
        ),
        (
            [*POLICY, f"--policy.checkpoint={CKPT}", *ENV, "--policy.image=observation.images.top"],
            "--policy.image=observation.images.top: the observation has no such image, it has "
            "observation.images.image",
        ),
        (
            [*POLICY, f"--policy.checkpoint={CKPT}", *ENV, "--policy.images=sideways"],
            "--policy.images=sideways: unknown",
        ),
    ],
    ids=["no_checkpoint", "no_safetensors", "gone", "layout", "suite", "image", "turning"],
)
def test_bad_input_ends_in_one_sentence(words, sentence, monkeypatch, tmp_path, capsys):
    """One line on stderr with the remedy and exit code 2, as everywhere, and no traceback."""
    with pytest.raises(SystemExit) as left:
        evaluate([*words, *SHORT], monkeypatch, tmp_path / "out")
    assert left.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(said) == 1 and sentence in said[0]


def test_a_task_without_a_known_camera_is_refused(loop, monkeypatch, capsys):
    """LeRobot's other environments hand no camera over: the sentence says what to give."""
    observation, _ = loop.env.reset(options={"lerobot_new_rollout": True})
    batch = loop.batch(observation)
    del batch["observation.camera_intrinsics"], batch["observation.camera_extrinsics"]
    batch["task"] = ["fold the towel"]
    monkeypatch.setattr(sys, "argv", ["lerobot-eval"])
    with pytest.raises(SystemExit):
        loop.policy.select_action(batch)
    assert "'fold the towel'" in capsys.readouterr().err
    loop.policy.reset()
