"""Every command of the README and of docs/ runs as written, only smaller, so none goes stale."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_synthetic_demos
from helpers import ROOT, SIZE, first_frames, run

from formats import lerobot_writer
from formats.libero_cameras import TASKS

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
# what the fixture `told` has run
TOLD = (
    "python train.py --model_type para --dataset data/libero_spatial_told_other "
    "--backbone efficientnet_lite0 --max_steps 10000 --out runs/SUITE"
)
BARE_EVAL = "python eval.py --teleport --zero_rotation --max_steps 600"
TRAIN = shlex.split(
    f"--max_steps 2 --image_size {SIZE} --grid 14 --backbone efficientnet_lite0 "
    "--batch_size 2 --wandb off"
)
MODEL = {
    "para": ["--width", "8"],
    "act": shlex.split("--dim 16 --n_layers 1 --n_heads 2 --cooldown 1"),
    "dino_volume_kv_full": ["--dim", "16"],
    "autoregressive": shlex.split(
        "--context 3 --dim 16 --n_layers 2 --n_heads 2 --patch_grid 4 --key_width 8"
    ),
}
SMALL = {
    "collect_demos.py": shlex.split(f"--n_demos 1 --image_size {SIZE} --push_rate 0 --render fast"),
    "eval.py": shlex.split("--n_episodes 1 --n_videos 0 --workers 1 --clean_scene --max_steps 12"),
    "figures.report": [],
    "study.bench": ["--rounds", "1", "--quick"],
    "study.openloop": ["--max_val", "1"],
    "precompute_rotation_pca.py": ["--allow_low_ev"],
    "run_matrix.py": ["--dry_run"],
    "compare.py": [],
    "study.diagnose": ["--n_demos", "1"],
    "study.listening": ["--first", "1"],
    "deploy_dino_kv.py": [],
    "convert_demos.py": [],
    "study.compare_rotation": [
        *shlex.split("--seeds 1 --max_steps 1 --n_episodes 1"),
        *TRAIN[2:],
        *shlex.split("--dim 16 --image_size 64"),
    ],
}


def test_readme_names_the_users_commands():
    """The README has the two make targets and the bare commands of users."""
    assert {"make demo", "make test"} <= set(COMMANDS)
    assert "python train.py --model_type para" in COMMANDS
    assert BARE_EVAL in COMMANDS


def test_no_command_is_left_untried():
    """Every command in a block is run below, or is a make target, a torchrun of a tested command,
    the activation of the environment, or in LeRobot's, where `make lerobot` runs it.
    """
    in_lerobot = ("plugins/setup.sh", ".venv-lerobot/bin/")
    rest = [c for c in COMMANDS if c not in PYTHON and c != "source .venv/bin/activate"]
    targets = re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text())
    for command in rest:
        first, *words = command.split()
        assert (
            first == "torchrun"
            and "train.py" in words
            or first == "make"
            and words[0] in targets
            or first.startswith(in_lerobot)
        ), command


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder of features and expert paths that the commands share, as in a user's checkout."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def users_folder(collected, trained, told, both, synthetic_episodes, cache):
    """Fill a folder with the files that a user has who followed the pages from the start."""

    def fill(folder):
        (folder / "data").mkdir()
        names = "libero_spatial_0 every_frame rim lift_once position_val spread"
        for name in (f"{name}.hdf5" for name in names.split()):
            (folder / "data" / name).symlink_to(collected[0])
        (folder / "data" / "izzy").symlink_to(synthetic_episodes)
        (folder / "data" / "spatial_fixed").symlink_to(both.parent)
        (folder / "runs").mkdir()
        for name in ("NAME", "OTHER"):
            (folder / "runs" / name).symlink_to(trained[0])
        (folder / "runs" / "SUITE").symlink_to(told[0])
        (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
        (folder / "cache").symlink_to(cache)
        # results/ itself is the user's own: a survey writes there
        (folder / "results").mkdir()
        for name in ("matrix", "mujoco_3.3.2"):
            (folder / "results" / name).symlink_to(ROOT / "results" / name)
        return folder

    return fill


@pytest.fixture(scope="module")
def bare_eval(users_folder, tmp_path_factory):
    """Run eval.py without --ckpt -> its folder, its process."""
    folder = users_folder(tmp_path_factory.mktemp("bare"))
    return folder, run(*shlex.split(BARE_EVAL)[1:], *SMALL["eval.py"], cwd=folder)


def smaller(words):
    """Further flags that make a command small: fewer steps, smaller images.

    Of a flag given twice the last counts.
    """
    script = words[0]
    if script == "train.py":
        name = words[words.index("--model_type") + 1]
        # ACT has no grid of cells
        flags = [*TRAIN[:4], *TRAIN[6:]] if name == "act" else TRAIN
        # synthetic pictures under a LIBERO task's name: the simulator's are others
        trusted = ["--trust_pictures"] if "data/libero" in words else []
        return flags + MODEL[name] + trusted
    if "--survey" in words:
        return ["--n_demos", "1", "--task_ids", "0"]
    if "--replay" in words:
        return ["--n_demos", "1", "--image_size", SIZE]
    if script == "collect_demos.py" and "--task_ids" in words:
        return [*SMALL[script], "--task_ids", "2", "--out", "fresh"]
    # the clean scene has no second bowl to be told of, and no box that is exchanged for the plate;
    # LIBERO-Plus has scenes of its own
    full = [word for word in SMALL.get(script, []) if word != "--clean_scene"]
    if script == "eval.py" and "val_verdict_swap" in words:
        return full
    if script == "eval.py" and ("--task_ids" in words or "--plus" in words):
        return [*full, "--task_ids", "2"]
    if script == "collect_demos.py":
        # LeRobot's episodes hold an image of every frame
        few = [] if "lerobot" in words else ["--frame_stride", "20"]
        return [*SMALL[script], *few, "--out", "fresh.hdf5", "--clean_scene"]
    if "--policy" in words:
        # the expert takes as long as it takes
        limited = SMALL[script] if "expert" not in words else SMALL[script][:-2]
        return limited
    return SMALL[script]


def write_lerobot(path):
    """A LeRobot dataset of two tasks, as public LIBERO data: the second is that of the pages."""
    sources = []
    for i, instruction in enumerate(TASKS["libero_spatial"][6:8]):
        file = path.with_name(f"task_{i}.hdf5")
        write_synthetic_demos(file, n_demos=2, size=int(SIZE), seed=i)
        sources += [(file, f"demo_{j}", instruction) for j in range(2)]
    lerobot_writer.write_dataset(path, sources)


@pytest.mark.parametrize("line", PYTHON)
def test_readme_command_runs(line, users_folder, collected, synthetic_demos, tmp_path, request):
    """A command of a page runs with its own flags and with further ones that make it small."""
    if line == TOLD:
        _, done = request.getfixturevalue("told")
        assert "3 tasks, told by --text learned" in done.stdout
        return
    if line == BARE_EVAL:
        _, done = request.getfixturevalue("bare_eval")
        assert "Traceback" not in done.stderr
        return
    folder, words = users_folder(tmp_path), [w for w in shlex.split(line)[1:] if w != "-m"]
    if "--plus" in words and not importlib.util.find_spec("liberoplus"):
        pytest.skip("needs `make plus`")
    if "--replay" in words:
        first_frames(collected[0], folder / "OFFICIAL.hdf5", 12)
    # they need every frame, and `collected` has an image of every second one
    for script, name in (
        ("study.compare_rotation", "rim.hdf5"),
        ("convert_demos.py", "every_frame.hdf5"),
    ):
        if words[0] == script:
            (folder / "data" / name).unlink()
            shutil.copy(synthetic_demos, folder / "data" / name)
    if "data/libero" in words:
        write_lerobot(folder / "data" / "libero")
    if "dino_volume_kv_full" in words or words[0] == "study.compare_rotation":
        run("precompute_rotation_pca.py --dataset data/rim.hdf5 --allow_low_ev", cwd=folder)
    if words[0] == "figures.report":
        evaluated = next((request.getfixturevalue("bare_eval")[0] / "runs" / "eval").iterdir())
        for name in ("A", "B"):
            shutil.copytree(evaluated, folder / "runs" / "eval" / name)
    done = run(*words, *smaller(words), cwd=folder)
    assert "Traceback" not in done.stderr
    if "--task_ids" in words and words[0] == "eval.py":
        goal = "libero_goal" in words
        name = "libero_goal_2" if goal else "libero_spatial_2"
        check_suite(folder, done.stdout, name, "--instruction_of" in words)


def check_suite(folder, printed, name, swapped):
    """An evaluation of a suite has left its table, its page, and rows that say what was touched."""
    (out,) = (folder / "runs" / "eval").iterdir()
    summary = json.loads((out / "suite.json").read_text())
    (task,) = summary["tasks"]
    assert (summary["steps"], summary["n"], task["task"]) == (12, 1, name)
    said = "put the wine bottle on top of the" if "goal" in name else "pick up the black bowl from"
    # told of the other bowl, the table has the sentence that was said
    said = "pick up the black bowl next to the plate" if swapped else said
    assert f"| {name} | {said}" in printed
    assert "mean of the tasks" in printed and "<table>" in (out / "report.html").read_text()
    row = json.loads((out / name / "episodes.jsonl").read_text())
    assert {"first_touched", "first_lifted"} <= row.keys()
    assert row.get("named") == ("akita_black_bowl_2" if swapped else None)
    if swapped:
        assert row["instruction"].startswith("pick up the black bowl next to the plate")
        assert task["went_to_named"] == 0 and "went to the named object" in printed


def test_bare_eval_says_which_checkpoint(bare_eval):
    """Without --ckpt eval.py takes the newest run's checkpoint, and names it."""
    _, done = bare_eval
    named = r"newest run's checkpoint, runs/(NAME|OTHER|SUITE)/checkpoint.safetensors"
    assert re.search(named, done.stdout), done.stdout


def test_bare_train_collects_the_default_dataset_first(tmp_path):
    """`python train.py` without data first collects the default dataset, with a progress bar."""
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
