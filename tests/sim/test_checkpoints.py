"""The committed checkpoints: they load, fit LIBERO's camera, and look at the image instead of
guessing from their own state."""

import pytest
import torch
from conftest import ROOT, made_once, with_basis
from helpers import run

from formats.dataset import open_dataset
from harness.checkpoint import load_policy
from harness.metrics import EARLY
from harness.validation import looks
from registry import look_up
from sim.layouts import episode_state
from sim.libero_env import Scene
from sim.rollout import PolicyAgent, run_episode

CHECKPOINTS = sorted((ROOT / "checkpoints").glob("*.safetensors"))
SHIFT_PX, BLANK_RATIO = 2.0, 3.0  # at most, at least


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """A demonstration of the full scene at the checkpoints' image size.

    No checkpoint was trained on its seed.
    """

    def collect(folder):
        run(
            f"collect_demos.py --n_demos 1 --seed 7 --workers 1 --out {folder / 'demo.hdf5'}",
            cwd=folder,
        )
        # D asks for one beside its data; its own travels in the checkpoint
        return with_basis(folder / "demo.hdf5")

    return made_once(tmp_path_factory, "full_size", collect)


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda p: p.stem)
def test_a_committed_checkpoint_looks(path, full_size, tmp_path):
    """A shift of the EEF input by 20 px hardly moves the waypoint, and blank images at least triple
    its error.
    """
    torch.set_num_threads(1)
    policy, info, _ = load_policy(path, "cpu", None)
    demos = open_dataset(full_size, policy.config.image_size).demos
    dataset = look_up(info["model_type"]).dataset(
        demos, policy.config, policy.backbone, 2, tmp_path, False
    )
    found = looks(policy, dataset, "cpu")
    assert found["shift_px"] <= SHIFT_PX and found["blank_ratio"] >= BLANK_RATIO, found


@pytest.mark.parametrize("name", ["para", "voxel_ar"])
def test_a_committed_checkpoint_solves_shifted_layouts(name):
    """Each solves at least two of the first three `shifted` test episodes.

    The blind replay solves 6% of that layout, and a head that passes the tests above may solve
    none. One single-frame policy and one with a history are tried.
    """
    torch.set_num_threads(1)
    policy, _, _ = load_policy(
        ROOT / "checkpoints" / f"{name}_libero_spatial_0.safetensors", "cpu", None
    )
    scene = Scene(image_size=policy.config.image_size)
    try:
        outcomes = []
        # the third decides only where the first two differ
        while max(outcomes.count(True), outcomes.count(False)) < 2:
            state, _ = episode_state(scene, "shifted", len(outcomes))
            row, _, _ = run_episode(scene, PolicyAgent(policy), state, max_steps=EARLY)
            outcomes.append(row["success"])
    finally:
        scene.close()
    assert outcomes.count(True) == 2, outcomes


def test_the_checkpoint_tests_have_checkpoints_to_test():
    """There are committed checkpoints, so the tests above run, and each is small enough for git."""
    assert CHECKPOINTS and all(p.stat().st_size < 10e6 for p in CHECKPOINTS)
