"""study.diagnose: one-step errors by phase and by part of the answer."""

import json
import shlex

import numpy as np
import pytest
import torch
from conftest import SIZE

from data import WaypointDataset
from formats.dataset import open_dataset
from harness import checkpoint
from harness.records import run_names
from harness.validation import decision_frames
from model import ParaConfig, TrajectoryHeatmapPredictor
from runtime import UserError
from study import diagnose, openloop
from study.diagnose import one_step, phase_row


@pytest.fixture
def policy(synthetic_demos, backbone, tmp_path):
    """An untrained PARA for the synthetic demonstrations."""
    torch.manual_seed(0)
    config = ParaConfig(
        backbone=backbone.name, image_size=SIZE, grid=14, width=8, n_height_bins=8, n_window=2
    )
    made = TrajectoryHeatmapPredictor(config, backbone.channels).attach(backbone).eval()
    data = WaypointDataset(
        open_dataset(synthetic_demos, SIZE).demos,
        config,
        backbone,
        cache=tmp_path / "cache",
        progress=False,
    )
    made.fit_statistics(data.statistics())
    return made


def test_a_known_error_is_found_in_its_own_part(synthetic_demos, policy, monkeypatch):
    """An answer 6 px to the right at the true height shows that bias, no height error and an
    error on the table. One 1 cm too high at the true pixel shows no error on the table.
    Decisions before the gripper closes are reach, later ones carry.
    """
    from camera import project, unproject

    demo = open_dataset(synthetic_demos).demos[1]
    frames, targets = decision_frames(demo, policy.config)
    true, closed = demo.ee_pos[targets], demo.actions[:, 6] > 0
    u, v, _ = project(true, demo.K, demo.E)
    answer = lambda points: {
        "frames": np.array(frames),
        "targets": targets,
        "true": true,
        "predicted": points,
        "gripper": closed[targets].astype(int),
    }
    monkeypatch.setattr(
        diagnose,
        "free_run",
        lambda *a, **k: answer(unproject(u + 6, v, true[:, 2], demo.K, demo.E)),
    )
    aside = one_step(policy, demo)
    monkeypatch.setattr(
        diagnose,
        "free_run",
        lambda *a, **k: answer(unproject(u, v, true[:, 2] + 0.01, demo.K, demo.E)),
    )
    high = one_step(policy, demo)
    assert aside["phase"][0] == 0
    assert set(aside["phase"]) == {0, 1}
    assert (np.diff(aside["phase"]) >= 0).all()
    for phase in (0, 1):
        a, h = phase_row(aside, phase), phase_row(high, phase)
        np.testing.assert_allclose(
            [*a["bias_px"], a["px_median"], a["height_cm_p90"]], [6, 0, 6, 0], atol=1e-6
        )
        np.testing.assert_allclose(
            [*h["bias_px"], h["height_cm_bias"], h["table_cm_p90"]], [0, 0, 1, 0], atol=1e-6
        )
        assert a["table_cm_median"] > 0.5 and a["gripper"] == h["gripper"] == 1
    assert phase_row({**aside, "phase": np.zeros(len(frames), int)}, 1) is None


def test_the_command_writes_table_and_picture(synthetic_demos, policy, tmp_path, capsys):
    """errors.json and errors.md hold both phases of each checkpoint, and the picture is there.

    Two runs of one name are refused.
    """
    path = tmp_path / "mine" / "checkpoint.safetensors"
    checkpoint.save_policy(
        path, policy, "para", {"args": {}, "backbone_asked": policy.config.backbone}
    )
    diagnose.main(
        shlex.split(
            f"--ckpt {path} --dataset {synthetic_demos} --n_demos 2 --out {tmp_path / 'out'}"
        )
    )
    found = json.loads((tmp_path / "out" / "errors.json").read_text())
    assert set(found["rows"]["mine"]) == {"reach", "carry"}
    assert found["n_demos"] == 2
    assert found["rows"]["mine"]["reach"]["n"] > 2
    assert "| mine | reach |" in (tmp_path / "out" / "errors.md").read_text()
    assert (tmp_path / "out" / "errors.png").stat().st_size > 5000
    with pytest.raises(UserError, match="one name"):
        run_names([path, path])


def test_a_folder_of_several_tasks_is_one_dataset(suite, policy, tmp_path, capsys):
    """As everywhere: with a picture of each task, whose demonstrations have the same names."""
    path, out = tmp_path / "mine" / "checkpoint.safetensors", tmp_path / "out"
    checkpoint.save_policy(
        path, policy, "para", {"args": {}, "backbone_asked": policy.config.backbone}
    )
    words = shlex.split(f"--ckpt {path} --dataset {suite} --n_demos 1")
    diagnose.main([*words, "--out", str(out)])
    assert json.loads((out / "errors.json").read_text())["n_demos"] == 3
    openloop.main([*words, "--whole", "--out", str(out)])
    tasks = [f"libero_spatial_{i}" for i in (0, 2, 10)]
    assert json.loads((out / "openloop.json").read_text())["tasks"] == tasks
    assert len(list(out.glob("rollout_libero_spatial_*_demo_0.png"))) == 3
