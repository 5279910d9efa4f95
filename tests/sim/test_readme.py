"""Every command of the README and of docs/ runs as written, only smaller, so that none goes
stale."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, SIZE, run

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
]
LINES = [
    line.split(" #")[0]
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
# one that stands in several places runs once
COMMANDS = list(dict.fromkeys(" ".join(line.split()) for line in LINES))
PYTHON = [c for c in COMMANDS if c.startswith("python ")]
TRAIN = shlex.split(
    f"--max_steps 2 --image_size {SIZE} --grid 14 --backbone efficientnet_lite0 "
    "--batch_size 2 --wandb off"
)
MODEL = {
    "para": ["--width", "8"],
    "dino_volume_kv_full": ["--dim", "16"],
    "autoregressive": shlex.split(
        "--context 3 --dim 16 --n_layers 2 --n_heads 2 --patch_grid 4 --key_width 8"
    ),
}
SMALL = {
    "collect_demos.py": ["--n_demos", "1", "--image_size", SIZE, "--push_rate", "0"],
    "eval.py": ["--n_episodes", "1", "--max_steps", "12", "--n_videos", "0", "--workers", "1"],
    "figures.report": [],
    "study.bench": ["--rounds", "1", "--quick"],
    "study.openloop": ["--max_val", "1"],
    "precompute_rotation_pca.py": ["--allow_low_ev"],
    "run_matrix.py": ["--dry_run"],
    "study.diagnose": ["--n_demos", "1"],
    "deploy_dino_kv.py": [],
    "study.compare_rotation": [
        *shlex.split("--seeds 1 --max_steps 1 --n_episodes 1"),
        *TRAIN[2:],
        *shlex.split("--dim 16"),
    ],
}


def test_readme_names_the_users_commands():
    """The two make targets and the users' bare commands stand in the README."""
    assert {"make demo", "make test"} <= set(COMMANDS)
    assert "python train.py --model_type para" in COMMANDS
    assert "python eval.py --teleport --zero_rotation --max_steps 600" in COMMANDS


def test_no_command_is_left_untried():
    """What stands in a block is run below, or is a make target, a torchrun of a command that is, or
    the activation."""
    rest = [c for c in COMMANDS if c not in PYTHON and c != "source .venv/bin/activate"]
    targets = re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text())
    for command in rest:
        first, *words = command.split()
        assert (
            first == "torchrun" and "train.py" in words or first == "make" and words[0] in targets
        ), command


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """Two tiny evaluations, A and B: the one that ran, and its copy."""
    folder = tmp_path_factory.mktemp("evaluated")
    run(
        f"eval.py --ckpt {trained[0] / 'checkpoint.safetensors'} --n_episodes 1 --max_steps 6 "
        "--n_videos 0 --workers 1 --out A",
        cwd=folder,
    )
    shutil.copytree(folder / "A", folder / "B")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Features and expert's paths, computed by the first command that asks, as in a user's
    folder."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("line", PYTHON)
def test_readme_command_runs(
    line, collected, trained, synthetic_episodes, cache, tmp_path, request
):
    """A README command as a subprocess: the same flags, then fewer steps and smaller images (the
    last of two flags wins)."""
    words = [word for word in shlex.split(line)[1:] if word != "-m"]
    script = words[0]
    if "--policy" in words and "expert" in words or "--survey" in words:
        small = (
            ["--n_episodes", "1", "--workers", "1", "--n_videos", "0"]
            if script == "eval.py"
            else ["--n_demos", "1", "--n_tasks", "1"]
        )
    elif script == "train.py":
        small = TRAIN + MODEL[words[words.index("--model_type") + 1]]
    else:
        small = SMALL[script]
    (tmp_path / "data").mkdir()
    for name in ("libero_spatial_0.hdf5", "rim.hdf5", "lift_once.hdf5", "position_val.hdf5"):
        (tmp_path / "data" / name).symlink_to(collected[0])
    (tmp_path / "data" / "izzy").symlink_to(synthetic_episodes)
    (tmp_path / "runs").mkdir()
    for name in ("NAME", "OTHER"):
        (tmp_path / "runs" / name).symlink_to(trained[0])
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    (tmp_path / "cache").symlink_to(cache)
    if "--replay" in words:
        (tmp_path / "OFFICIAL.hdf5").symlink_to(collected[0])
        small = ["--n_demos", "1", "--image_size", SIZE]
    elif script == "collect_demos.py" and "--survey" not in words:
        small = [
            *small,
            "--out",
            "fresh.hdf5",
            *["--clean_scene"] * ("--grasp" in words or "--variant" in words),
        ]
    if "dino_volume_kv_full" in words or script == "study.compare_rotation":
        run(
            "precompute_rotation_pca.py",
            "--dataset",
            "data/rim.hdf5",
            "--allow_low_ev",
            cwd=tmp_path,
        )
    if script == "figures.report":
        (tmp_path / "runs" / "eval").symlink_to(request.getfixturevalue("evaluated"))
    done = run(*words, *small, cwd=tmp_path)
    assert "Traceback" not in done.stderr


def test_bare_eval_says_which_checkpoint(trained, tmp_path):
    """Without --ckpt the newest run's checkpoint is taken, and named."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(trained[0])
    done = run(
        "eval.py --teleport --zero_rotation --max_steps 8 --n_episodes 1 --n_videos 0 --workers 1",
        cwd=tmp_path,
    )
    assert "newest run's checkpoint, runs/mine/checkpoint.safetensors" in done.stdout


def test_bare_train_collects_the_default_dataset_first(tmp_path):
    """`python train.py` without data starts the collection, with a bar, where users would look for
    it."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", "--model_type", "para", "--wandb", "off"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        seen = ""
        while "demonstrations of libero_spatial_0" not in seen:
            chunk = process.stdout.read(1)
            assert chunk, seen
            seen += chunk
    finally:
        os.killpg(process.pid, 9)
        process.wait()
    assert "collecting it" in seen and (tmp_path / "data" / "libero_spatial_0.hdf5.parts").is_dir()


def test_the_make_targets_exist_and_ci_calls_the_tests():
    """`make setup`, `make demo` and `make test` are real targets, and CI calls the tests."""
    for target in ("setup", "demo", "test"):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert Path(ROOT / "demo.sh").stat().st_mode & 0o100
