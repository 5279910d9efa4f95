"""The scripts as users run them: real simulator, real kills, resumes, bad input.

Images are small and steps few, the code is the same.
"""

import json
import shlex
import shutil
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers import SIZE, interrupt, run, train_flags
from safetensors.torch import load_file

from formats import libero_hdf5
from formats.dataset import open_dataset
from harness.records import read_metrics
from runtime import UserError
from sim import settings

# -- collect_demos.py


def test_collect_resumes_after_kill(collected):
    """A SIGKILL loses no finished demonstration, and the resumed file is whole and valid."""
    path, kept, done = collected
    assert kept and "2 demonstrations" in done.stdout
    assert "1/2" in done.stderr and "0/2" not in done.stderr  # it goes on from the first one
    recordings = open_dataset(path, int(SIZE))
    found, attributes = recordings.demos, recordings.attributes
    assert len(found) == 2 and not path.with_name(path.name + ".parts").exists()
    assert attributes["image_orientation"] == "upright"
    assert {"mujoco", "renderer"} <= json.loads(attributes["versions"]).keys()


def test_demonstrations_are_successful_pick_and_places(collected):
    """The expert's demonstrations close once, open once and lift the gripper from the grasp.

    They differ from each other.
    """
    found = open_dataset(collected[0]).demos
    starts = []
    for demo in found:
        closed = demo.actions[:, 6] > 0
        assert np.abs(np.diff(closed.astype(int))).sum() == 2 and not closed[0] and not closed[-1]
        starts.append(demo.ee_pos[0])
        assert demo.ee_pos[closed][:, 2].max() > demo.ee_pos[closed][0, 2] + 0.1
    assert np.ptp(np.stack(starts), axis=0).max() > 0.002  # the start pose is jittered


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """Collect two demonstrations with other starts and turned cameras -> their file."""
    folder = tmp_path_factory.mktemp("spread")
    run(
        f"collect_demos.py --start_spread 0.3 --turn_spread 40 --clean_scene --n_demos 2 "
        f"--image_size {SIZE} --workers 1 --push_rate 0 --out spread.hdf5",
        cwd=folder,
    )
    return folder / "spread.hdf5"


def test_demonstrations_can_start_beside_the_start(spread):
    """--start_spread: in the first recorded frame the EEF is up to that far to the side of its
    usual start, at about its height. The demonstration is whole from there on.
    """
    starts = np.stack([d.ee_pos[0] for d in open_dataset(spread, int(SIZE)).demos])
    moved = starts - [-0.2085, 0.0, 1.1733]  # libero_spatial's own
    assert (np.abs(moved[:, 1]) < 0.35).all()
    assert np.abs(moved[:, 1]).max() > 0.05
    assert (np.abs(moved[:, 0]) < 0.15).all()
    assert (np.abs(moved[:, 2]) < 0.05).all()


def test_demonstrations_can_be_seen_from_cameras_turned_about_the_robot(spread):
    """--turn_spread: each demonstration has its own camera, as far from the robot's base as
    agentview, as high and as steep. The images show the robot where that camera says.
    """
    base, (_, E) = np.array([-0.66, 0.0]), settings.default_camera()
    cameras = np.stack([d.E for d in open_dataset(spread, int(SIZE)).demos])
    away = cameras[:, :2, 3] - base
    turns = np.degrees(np.arctan2(away[:, 1], away[:, 0]))
    assert (np.abs(turns) < 40).all() and np.ptp(turns) > 3
    assert np.allclose(np.linalg.norm(away, axis=1), E[0, 3] - base[0], atol=0.01)
    assert np.allclose(cameras[:, 2], E[2], atol=1e-3)
    for camera, turn in zip(cameras, turns):
        assert np.allclose(settings.turned(E, turn, base), camera, atol=0.01)
    test_images_show_the_eef_where_the_camera_says([spread])


def test_only_frames_that_training_reads_are_rendered(collected):
    """By default every second frame is rendered: a render costs twenty control steps.

    States are kept for every frame. A frame without an image is refused with the remedy.
    """
    with h5py.File(collected[0]) as file:
        demo = file["data/demo_1"]
        assert demo.attrs["frame_stride"] == 2
        assert len(demo[libero_hdf5.IMAGE]) == -(-len(demo["states"]) // 2)
    recording = open_dataset(collected[0])
    assert recording.attributes["render"] == "exact"
    assert recording["demo_1"].images([0, 4]).shape == (2, int(SIZE), int(SIZE), 3)
    with pytest.raises(UserError, match="none of frame 3; give --frame_stride 2 or a multiple"):
        recording["demo_1"].images([0, 3])


def test_images_show_the_eef_where_the_camera_says(collected):
    """Images are upright and not mirrored: they change most where the projected gripper moves."""
    from camera import project

    found = open_dataset(collected[0], int(SIZE)).demos
    demo = found[0]
    images = demo.images([0, 30]).astype(float)
    change = np.abs(images[1] - images[0]).mean(-1)
    u, v, _ = project(demo.ee_pos[[0, 30]], demo.K, demo.E)

    def near(us, vs):
        return np.mean(
            [
                change[int(b) - 9 : int(b) + 9, int(a) - 9 : int(a) + 9].mean()
                for a, b in zip(us, vs)
            ]
        )

    size = int(SIZE)
    right = near(u, v)
    assert right > 1.5 * near(size - u, v) and right > 1.5 * change.mean()


def test_collect_leaves_an_existing_file_alone(collected):
    """An existing file is refused without --overwrite, so that nothing is lost."""
    before = collected[0].read_bytes()
    done = run(
        "collect_demos.py", "--n_demos", 1, "--out", collected[0], cwd=collected[0].parent, ok=False
    )
    assert done.returncode == 2
    assert "--overwrite" in done.stderr
    assert collected[0].read_bytes() == before


# -- train.py


def test_a_run_can_be_told_apart_and_looked_at_later(trained):
    """A run folder holds config, commit, versions, metrics, curve, overlays and profile."""
    folder, done = trained
    config = json.loads((folder / "config.json").read_text())
    assert config["commit"] and config["versions"]["torch"] and config["args"]["seed"] == 0
    assert config["backbone_identity"].startswith("efficientnet_lite0")
    assert config["dataset"]["versions"]["renderer"]
    header = json.loads((folder / "checkpoint.json").read_text())
    assert all(header[key] for key in ("command", "commit", "versions")) and header["seed"] == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("val/cm_median" in r for r in rows) and any("train/loss" in r for r in rows)
    assert any(0 <= r.get("free/coverage_8px", -1) <= 1 for r in rows)
    assert all(
        (folder / name).stat().st_size > 5000
        for name in ("loss.png", "overlay_0.png", "rollout_0.png")
    )
    profile = json.loads((folder / "profile.jsonl").read_text().splitlines()[0])["rows"]
    assert [r["batch"] for r in profile] == [2, 4]
    assert all(r["step_ms"] > 0 and r["memory_mb"] > 0 for r in profile)
    assert "batch 2" in done.stdout


def test_train_resumes_bit_identically(collected, tmp_path):
    """A run that SIGTERM and then SIGKILL stopped ends, once resumed, with the weights of an
    uninterrupted run. Random augmentations are included.
    """
    further = ("--mirror", "--shift_aug", 32, "--val_every", 9)
    flags = lambda folder: (*train_flags(collected[0], folder, 18), *further)
    run(*flags("whole"), cwd=tmp_path)
    state = tmp_path / "broken" / "state.safetensors"
    code = interrupt(flags("broken"), tmp_path, state.exists, signal.SIGTERM)
    assert code == 0  # SIGTERM saves and leaves in order
    first = state.stat().st_mtime_ns
    interrupt(
        ("train.py", "--resume", "broken"),
        tmp_path,
        lambda: state.stat().st_mtime_ns != first,
        signal.SIGKILL,
    )
    done = run("train.py", "--resume", "broken", cwd=tmp_path)
    assert "step 0\n" not in done.stdout  # it did go on from the saved step
    whole, broken = (
        load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "broken")
    )
    assert whole.keys() == broken.keys() and all(torch.equal(whole[k], broken[k]) for k in whole)
    # steps that were taken again after the kill stand in the log once
    whole, broken = ([r["step"] for r in read_metrics(tmp_path / n)] for n in ("whole", "broken"))
    assert whole == broken


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--dataset", "absent.hdf5"), ("absent.hdf5", "collect_demos.py")),
        (
            ("--backbone", "dinov2_vitb14", "--backbone_weights", "absent.pth"),
            ("--backbone_weights", "absent.pth"),
        ),
        (("--image_size", "224"), ("112 px", "--replay")),
        (("--resume", "absent_run"), ("--dataset", "--resume goes on by the run's own flags")),
        (("--max_steps", "0"), ("--max_steps", "at least 1")),
        (("--model_type", "dino_volume_kv_full", "--mirror"), ("--mirror", "--rotation euler")),
    ],
)
def test_train_refuses_bad_input_in_one_sentence(collected, tmp_path, flags, words):
    """Bad input gives exit code 2 and one line with the cause and the remedy, no traceback."""
    done = run(*train_flags(collected[0], "refused", 2), *flags, cwd=tmp_path, ok=False)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_a_run_that_is_not_there_is_not_resumed(tmp_path):
    """One line says that the folder holds no run."""
    done = run("train.py", "--resume", "absent_run", cwd=tmp_path, ok=False)
    assert done.returncode == 2, done.stderr
    assert all(
        word in done.stderr.strip().splitlines()[-1] for word in ("absent_run", "run folder")
    )


def test_validation_conditions_are_not_trained_on(synthetic_demos, tmp_path):
    """`collect_demos.py --part val` makes files for judging policies, and train.py refuses them."""
    path = shutil.copy(synthetic_demos, tmp_path / "val.hdf5")
    with h5py.File(path, "r+") as file:
        file["data"].attrs["part"] = "val"
    done = run(*train_flags(path, "refused", 2), "--image_size", 64, cwd=tmp_path, ok=False)
    assert done.returncode == 2, done.stderr
    assert "--part val" in done.stderr.strip().splitlines()[-1], done.stderr


# -- eval.py


def summary(folder):
    return json.loads((Path(folder) / "summary.json").read_text())


def test_expert_succeeds_through_eval_and_eval_resumes(tmp_path):
    """The real closed loop works end to end, and a killed evaluation goes on without repeating an
    episode."""
    flags = shlex.split(
        f"eval.py --policy expert --n_episodes 3 --n_videos 0 --image_size {SIZE} "
        "--clean_scene --workers 1 --out cell"
    )
    rows = tmp_path / "cell" / "episodes.jsonl"
    interrupt(flags, tmp_path, lambda: rows.exists() and rows.stat().st_size > 0, signal.SIGKILL)
    first = rows.read_text().splitlines()[0]
    run(*flags, cwd=tmp_path)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert rows.read_text().splitlines()[0] == first
    assert sorted(r["episode"] for r in found) == [0, 1, 2]
    assert sorted(r["init_state"] for r in found) == [0, 1, 2]
    cell = summary(tmp_path / "cell")
    assert cell["released_rate"] == 1.0 and cell["n"] == 3 and 0.4 < cell["interval"][0] < 0.5
    assert {"model_type", "setting", "success_rate", "command", "commit", "seed"} <= cell.keys()
    assert all({"commit", "seed", "simulator"} <= row.keys() for row in found)
    assert all(
        r["simulator"] == cell["simulator"] and cell["simulator"].startswith("mujoco ")
        for r in found
    )
    assert (
        json.loads((tmp_path / "cell" / "protocol.json").read_text())["distinct_init_states"] == 50
    )
    # rows whose protocol was never found right are no result: it is checked, also without episodes
    (tmp_path / "cell" / "protocol.json").unlink()
    run(*flags, cwd=tmp_path)
    assert (tmp_path / "cell" / "protocol.json").is_file()


def test_checkpoint_runs_in_closed_loop(trained, tmp_path):
    """A trained checkpoint acts in the simulator, also on the shifted layout.

    It leaves rows, a video and a sheet.
    """
    done = run(
        f"eval.py --ckpt {trained[0] / 'checkpoint.safetensors'} --teleport "
        "--zero_rotation --max_steps 12 --layout shifted --n_episodes 2 --n_videos 1 "
        "--workers 1 --out cell",
        cwd=tmp_path,
    )
    cell = summary(tmp_path / "cell")
    assert cell["n"] == 2
    assert cell["model_type"] == "para"
    assert "training_frame_difference" in done.stdout + done.stderr
    assert cell["demos_mujoco"] == cell["versions"]["mujoco"] and "warning" not in done.stdout
    assert list((tmp_path / "cell" / "videos").glob("*.mp4"))
    assert (tmp_path / "cell" / "sheet.jpg").exists()
    assert cell["seconds_per_episode"]["features"] > 0
    page = run(
        "figures.report", "--run", trained[0], "--evals", "cell", "--out", "page.html", cwd=tmp_path
    )
    html = (tmp_path / "page.html").read_text()
    assert "page.html" in page.stdout
    assert "data:video/mp4" in html
    assert 'src="http' not in html
    assert "para" in html


def test_rotation_and_plain_actions_run(trained, tmp_path):
    """Without --teleport and --zero_rotation the same checkpoint sends delta actions and
    rotations."""
    run(
        f"eval.py --ckpt {trained[0] / 'checkpoint.safetensors'} --max_steps 10 --n_episodes 1 "
        "--n_videos 0 --workers 1 --out cell",
        cwd=tmp_path,
    )
    assert summary(tmp_path / "cell")["mean_steps"] == 10


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--ckpt", "absent.safetensors"), ("absent.safetensors", "no such checkpoint")),
        (("--policy", "expert", "--n_episodes", "51"), ("--n_episodes", "50")),
        (
            ("--policy", "expert", "--task_suite", "libero_nothing"),
            ("libero_nothing", "libero_spatial"),
        ),
        (("--policy", "expert", "--task_id", "10"), ("--task_id", "0 to 9")),
    ],
)
def test_eval_refuses_bad_input_in_one_sentence(tmp_path, flags, words):
    """Bad input gives exit code 2 and one line with the cause and the remedy, no traceback."""
    done = run("eval.py", *flags, cwd=tmp_path, ok=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert all(w in done.stderr for w in words), done.stderr
