"""The rotation scripts as users run them, on demonstrations from the real simulator: collect, gate,
train, finetune, deploy, evaluate."""

import json
import shlex
import signal

import numpy as np
import pytest
from helpers import SIZE, interrupt, run
from safetensors.torch import load_file

from formats.dataset import open_dataset
from rot_utils import BASIS_FILE, load_basis, load_stats

COLLECT = shlex.split(
    "collect_demos.py --grasp rim --layout_spread 0.05 --push_rate 0 --clean_scene --render fast "
    f"--image_size {SIZE} --n_demos 2 --workers 1"
)


def train_flags(dataset, out, *flags):
    command = (
        f"train.py --model_type dino_volume_kv_full --dataset {dataset} --out {out} "
        f"--backbone efficientnet_lite0 --image_size {SIZE} --grid 14 --width 8 --dim 16 "
        "--batch_size 4 --val_every 2 --save_every 2 --wandb off --precision fp32"
    )
    return [*shlex.split(command), *flags]


@pytest.fixture(scope="session")
def rim(tmp_path_factory):
    """A smith300 folder of two rim grasps with its basis, whose collection was killed in the middle
    -> (path, the part that was kept).
    """
    folder = tmp_path_factory.mktemp("rim")
    arguments = (*COLLECT, "--format", "smith300", "--out", "izzy")
    parts = folder / "izzy.parts"
    assert (
        interrupt(arguments, folder, lambda: list(parts.glob("episode_*")), signal.SIGKILL)
        == -signal.SIGKILL
    )
    kept = {p.name: p.stat().st_mtime_ns for p in parts.glob("episode_*")}
    assert kept and not (folder / "izzy").exists()
    run(*arguments, cwd=folder)
    run("precompute_rotation_pca.py", "--dataset", "izzy", "--allow_low_ev", cwd=folder)
    return folder / "izzy", kept


@pytest.fixture(scope="session")
def v7(rim, tmp_path_factory):
    """A run folder of v7 after a few steps."""
    folder = tmp_path_factory.mktemp("v7")
    further = "--max_steps 4 --tf_layers 2 --token_enc learned --rotation euler --n_rot_bins 32"
    run(*train_flags(rim[0], "v7", *shlex.split(further)), cwd=folder)
    return folder / "v7"


def test_collected_episodes_are_valid_and_turn(rim):
    """The simulator's episodes are read like a robot's, survive a kill, and their grasps have yaws
    of their own."""
    path, kept = rim
    recordings = open_dataset(path, int(SIZE))
    demos, attributes = recordings.demos, recordings.attributes
    assert len(demos) == 2
    assert attributes["grasp"] == "rim"
    assert attributes["task_suite"] == "libero_spatial"
    assert all((path / name).stat().st_mtime_ns == time for name, time in kept.items())
    assert sorted(
        p.name for p in path.iterdir() if not p.name.startswith(("episode", "rotation"))
    ) == ["dataset.json"]
    yaws = []
    for demo in demos:
        with np.load(path / demo.name / "episode.npz") as f:
            changes = np.flatnonzero(np.diff(f["gripper_t"]))
            yaws.append(np.degrees(f["eef_euler_t"][changes[0], 2]))
            assert len(changes) == 2 and f["gripper_width_t"].max() > 0.06
    assert np.ptp(yaws) > 8
    basis = load_basis(path / BASIS_FILE)
    # it is the vertical about which they turn
    assert basis.provenance["demos"] == 1 and abs((basis.mean @ basis.axis)[2]) > 0.9


def test_v7_trains_from_scratch(v7):
    """Training leaves a checkpoint and statistics, and its metrics hold the parts of the top-1 and
    rotation errors.
    """
    rows = [json.loads(line) for line in (v7 / "metrics.jsonl").read_text().splitlines()]
    last = [r for r in rows if "val/volume_ce" in r][-1]
    assert {
        "val/top1_joint",
        "val/top1_rotation",
        "val/rotation_deg_all_median",
        "val/rotation_deg_all_p95",
        "val/rotation_ce",
    } <= last.keys()
    assert load_stats(v7 / "checkpoint_stats.json")["rotation"]["kind"] == "euler"


def test_finetune_freezes_then_thaws_and_deploys(v7, rim, tmp_path):
    """--init_from prints what it drops.

    The volume is fixed during the freeze and moves after it, and its loss is watched. The explained
    variance is logged, and the checkpoint deploys.
    """
    further = f"--init_from {v7 / 'checkpoint.safetensors'} --freeze_steps 3 --warmup 1"
    further += " --max_steps 4 --tf_layers 3"
    done = run(*train_flags(rim[0], "new", *shlex.split(further)), cwd=tmp_path)
    assert "dropped: " in done.stdout
    assert "rotation_head.weight" in done.stdout
    assert "one axis explains" in done.stdout
    assert "volume loss on held-out demonstrations" in done.stdout + done.stderr
    rows = [
        json.loads(line) for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    ]
    assert 0 < next(r["rotation/ev_ratio"] for r in rows if "rotation/ev_ratio" in r) <= 1
    losses = [r["val/volume_ce"] for r in rows if "val/volume_ce" in r]
    assert losses[0] == losses[1] != losses[2]  # steps 2, 3 and 4
    before, after = (load_file(p / "checkpoint.safetensors") for p in (v7, tmp_path / "new"))
    assert not np.array_equal(before["model.key.weight"], after["model.key.weight"])
    stats = load_stats(tmp_path / "new" / "checkpoint_stats.json")
    assert stats["rotation"]["kind"] == "pca"
    assert stats["height_range"] == before["model.height_range"].tolist()
    answer = run(
        f"deploy_dino_kv.py --ckpt {tmp_path / 'new' / 'checkpoint.safetensors'} "
        f"--source {rim[0] / 'episode_00000'} --limit 2",
        cwd=tmp_path,
    )
    assert len(answer.stdout.splitlines()) == 2 and " ms (" in answer.stderr
    run(
        f"study.compare_rotation --run v7={v7} --run new=new --out comparison --n_episodes 1",
        cwd=tmp_path,
    )
    cells = json.loads((tmp_path / "comparison" / "summary.json").read_text())["cells"]
    assert set(cells) == {"v7", "new"}
    assert cells["new"]["top1_joint"] == [
        [r for r in rows if "val/top1_joint" in r][-1]["val/top1_joint"]
    ]
    assert {p.name for p in (tmp_path / "comparison").glob("*.png")} == {
        "rotation_ce.png",
        "gripper.png",
        "gripper_executed.png",
        "rotation.png",
        "overlay.png",
        "distribution_v7.png",
        "distribution_new.png",
    }
    assert "| new | 1 | " in (tmp_path / "comparison" / "table.md").read_text()


def test_it_acts_in_the_simulator_with_its_rotation(v7, tmp_path):
    """A policy trained on smith300 episodes is evaluated in LIBERO with its rotations, against the
    rim expert's path. Before that a training frame is rendered again from its state.
    """
    run(
        f"eval.py --ckpt {v7 / 'checkpoint.safetensors'} --teleport --max_steps 15 --n_episodes 1 "
        "--n_videos 0 --workers 1 --layout shifted --clean_scene --out cell",
        cwd=tmp_path,
    )
    cell = json.loads((tmp_path / "cell" / "summary.json").read_text())
    assert cell["model_type"] == "dino_volume_kv_full" and cell["n"] == 1
    assert json.loads((tmp_path / "cell" / "settings.json").read_text())["grasp"] == "rim"
    assert (
        json.loads((tmp_path / "cell" / "protocol.json").read_text())["training_frame_difference"]
        < 12
    )


def test_training_without_a_basis_stops(collected, tmp_path):
    """Without a basis beside the file training ends with exit code 2 and the command that makes
    one, before any feature is computed.
    """
    done = run(*train_flags(collected[0], "stopped", "--max_steps", 2), cwd=tmp_path, ok=False)
    assert done.returncode == 2
    assert "precompute_rotation_pca.py" in done.stderr
    assert not (tmp_path / "cache").exists()
