"""What is written is whole or not there at all, replaces nothing that belongs to others, and ends
in one sentence where it cannot be written.
"""

import argparse
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import write_synthetic_demos, write_synthetic_episodes
from helpers import ROOT
from PIL import Image

import collect_demos
import precompute_rotation_pca
import runtime
from figures import plots
from formats import parts, smith300
from formats.dataset import open_dataset
from harness import checkpoint, records
from runtime import UserError, read_json, versions, write_json
from sim import collected, instructions
from sim.tasks import find_task
from sim.workers import Outcome
from study import survey
from study.matrix_plan import same

CASES = ROOT / "tests" / "cases"


def refused(call, *words):
    """Call, expect a UserError of one line that holds all the words -> its text."""
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


# -- writing


WRITERS = {
    "json": lambda p: runtime.write_json(p, {"a": "x" * 9000}),
    "jsonl": lambda p: runtime.append_jsonl(p, {"a": "x" * 9000}),
    "checkpoint": lambda p: checkpoint.save_tensors(p, {"w": torch.zeros(9000)}, {}),
    "picture": lambda p: plots.write_png(
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)), p
    ),
    "episode": lambda p: smith300.write_episode(
        p, {"a": np.random.default_rng(0).random(9000)}, []
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_sentence_and_loses_nothing(name, tmp_path):
    """A full disk ends in one sentence, and the old file stays.

    In the test the disk is 'full' above 4 kB a file.
    """
    path = tmp_path / "out.png"
    path.mkdir() if name == "episode" else path.write_bytes(b"kept\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        refused(lambda: WRITERS[name](path), "out.png", "cannot be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert path.is_dir() or path.read_bytes().startswith(b"kept\n")
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_path_below_a_file_is_one_sentence(name, tmp_path):
    """A path whose parent is a file gives one sentence, as a read-only folder does."""
    (tmp_path / "file").touch()
    refused(lambda: WRITERS[name](tmp_path / "file" / "out.png"), "out.png", "cannot be written")


def test_a_checkpoint_has_the_mode_of_the_umask(tmp_path):
    """Checkpoints follow the umask. With mode 600 colleagues on a cluster could not read a run."""
    before = os.umask(0o022)
    try:
        checkpoint.save_tensors(tmp_path / "c.safetensors", {"w": torch.zeros(2)}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "c.safetensors").stat().st_mode) == 0o644


def test_a_stored_command_can_be_typed_again(monkeypatch):
    """A stored command is quoted, so it can be typed again with a space in a path.

    Commands that were stored unquoted still compare as equal.
    """
    monkeypatch.setattr(sys, "argv", ["/x/train.py", "--out", "my runs/a"])
    assert runtime.command_line() == "python train.py --out 'my runs/a'"
    monkeypatch.setattr(sys, "argv", [str(ROOT / "study" / "bench.py"), "voxel"])
    assert runtime.command_line() == "python -m study.bench voxel"
    argv = [sys.executable, "/x/train.py", "--out", "my runs/a"]
    assert same("python train.py --out 'my runs/a'", argv)
    assert same("python train.py --out my runs/a", argv)
    assert not same("python train.py --out other", argv)


# -- what may be replaced


def test_only_a_dataset_of_this_program_is_overwritten(tmp_path):
    """`--overwrite --format smith300 --out FOLDER` removes only folders that this program wrote."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years")
    refused(lambda: parts.check_replaceable(home, True, "smith300"), "thesis.tex", "left alone")
    dataset = write_synthetic_episodes(tmp_path / "izzy", 1, 40, 16)
    parts.check_replaceable(dataset, True, "smith300")
    refused(lambda: parts.check_replaceable(dataset, False, "smith300"), "--overwrite")
    refused(lambda: parts.check_replaceable(dataset, True, "libero"), "is a folder")
    (dataset / "notes.txt").touch()
    refused(lambda: parts.check_replaceable(dataset, True, "smith300"), "notes.txt")
    (tmp_path / "notes.hdf5").write_text("no dataset")
    refused(
        lambda: parts.check_replaceable(tmp_path / "notes.hdf5", True, "libero"),
        "no file of demonstrations",
    )
    parts.check_replaceable(
        Path(shutil.copy(CASES / "h5_valid.hdf5", tmp_path / "d.hdf5")), True, "libero"
    )
    refused(lambda: parts.check_replaceable(Path("."), True, "libero"), "--out")


def test_only_a_basis_is_replaced_by_a_basis(synthetic_demos, tmp_path):
    """`precompute_rotation_pca.py --out FILE` replaces only a basis, never another file."""
    target = tmp_path / "basis.npz"
    np.savez(target, eef_pos_t=np.zeros(3))
    before = target.read_bytes()
    parser = precompute_rotation_pca.build_parser()
    typed = lambda *flags: parser.parse_args(["--dataset", *map(str, (synthetic_demos, *flags))])
    run = lambda *flags: precompute_rotation_pca.precompute(**vars(typed(*flags)))
    refused(lambda: run("--out", target), "basis.npz", "no rotation basis")
    assert target.read_bytes() == before
    refused(lambda: run("--out", synthetic_demos), "--out")
    target.unlink()
    target.with_suffix(".png").touch()
    refused(lambda: run("--out", target), "basis.png")


# -- commands


def test_an_unknown_suite_is_said_at_once(monkeypatch):
    """`--survey nope` is refused before any simulator starts."""
    monkeypatch.setattr(survey, "run_jobs", lambda *a, **k: pytest.fail("a worker was started"))
    run = lambda *words: collect_demos.main(["--survey", *words])
    refused(lambda: run("nope"), "nope")
    refused(lambda: run("libero_spatial", "--task_ids", "10"), "0 to 9")
    refused(lambda: run("libero_spatial", "--first_state", "30"), "--n_demos 50", "20 init states")


@pytest.mark.parametrize(
    "words, said",
    [
        ("--task_id 3 --task_ids 1", "--task_id"),
        ("--replay x.hdf5 --task_id 3", "--task_id"),
        ("--replay x.hdf5 --seed 3", "--seed"),
        ("--video", "--video"),
        ("--instruction_share 0.3", "--instruction_share"),
        ("--setting cameras --turn_spread 40", "--turn_spread"),
    ],
)
def test_a_collection_takes_no_flag_that_it_ignores(words, said):
    """It would be recorded in the dataset, and have changed nothing."""
    refused(lambda: collect_demos.main(words.split()), said, "no effect")


def test_conditions_do_not_give_the_sentence_away():
    """Taken in turn, an even number of views would each be seen with one of two sentences."""
    words = "--setting viewpoint --split hemisphere --no-clean_scene --instruction_of other"
    args = collect_demos.build_parser().parse_args([*words.split(), "--n_demos", "52"])
    task = find_task("libero_spatial", 0)
    refused(lambda: collected.check_told(args, task), "--instruction_share", "give away which")
    for changed in ({"instruction_share": 0.3}, {"split": "outer"}, {"instruction_share": 1.0}):
        collected.check_told(argparse.Namespace(**{**vars(args), **changed}), task)


def test_a_survey_takes_no_flag_that_it_ignores():
    """Nor does a collection take one that a survey alone reads. Tasks are chosen in both."""
    run = lambda *words: collect_demos.main(["--survey", "libero_spatial", *words])
    refused(lambda: run("--out", "table.json"), "--out", "no effect")
    refused(lambda: run("--task_id", "3"), "--task_id", "no effect")
    refused(lambda: run("--seed", "1", "--setting", "cameras"), "--setting, --seed", "no effect")
    refused(lambda: collect_demos.main(["--first_state", "5"]), "--first_state", "no effect")
    refused(lambda: collect_demos.main(["--layouts", "random"]), "--layouts", "no effect")


class Survey:
    """Stands in for the pool of a survey's workers: every task succeeds once."""

    def __init__(self, monkeypatch, folder):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(survey, "run_jobs", self.answer)
        self.jobs = []

    def answer(self, jobs, *args, **kwargs):
        self.jobs = [index for _, index in jobs]
        one = {"success": True, "steps": 9, "released": True, "grasps": ["side"], "outside": 0.0}
        return [Outcome(job, [one]) for job in jobs]

    def run(self, *words):
        collect_demos.main(["--survey", "libero_spatial", *words])
        return {p.stem: read_json(p, "table")["rows"] for p in Path("results").glob("*.json")}


def test_a_survey_of_some_tasks_names_theirs(monkeypatch, tmp_path):
    """A row is of the task with its number, not of the first of those asked for."""
    pool = Survey(monkeypatch, tmp_path)
    words = ("--n_demos", "1", "--instruction_of", "other")
    (rows,) = pool.run(*words, "--task_ids", "3,1").values()
    assert pool.jobs == [1, 3] and [row["task_id"] for row in rows] == [1, 3]
    for row in rows:
        task = find_task("libero_spatial", row["task_id"])
        assert row["task"] == task.name
        assert row["instruction"] == instructions.request(task, "other").task.language
    # others are added
    (rows,) = pool.run(*words, "--task_ids", "3,4").values()
    assert pool.jobs == [4] and [row["task_id"] for row in rows] == [1, 3, 4]


def test_a_survey_replaces_no_other_one(monkeypatch, tmp_path):
    """Of other states it is another table; that of another expert is left alone."""
    pool = Survey(monkeypatch, tmp_path)
    pool.run("--task_ids", "0")
    found = pool.run("--task_ids", "0", "--first_state", "20", "--n_demos", "20")
    assert found.keys() == {"expert_libero_spatial", "expert_libero_spatial_states_20_39"}
    monkeypatch.setattr(survey, "expert_version", lambda: "another")
    refused(lambda: pool.run("--task_ids", "1"), "results/expert_libero_spatial.json", "left alone")
    assert len(read_json("results/expert_libero_spatial.json", "table")["rows"]) == 1


def test_a_suite_is_collected_into_a_folder_and_goes_on(tmp_path, capsys):
    """What is there is kept. Another number of demonstrations, and other flags, are refused."""
    folder = tmp_path / "suite"
    collect = lambda *words: collect_demos.main(["--task_ids", "0,3", "--out", f"{folder}", *words])
    # an unknown task is said before anything is written
    refused(lambda: collect_demos.main(["--task_ids", "0,10", "--out", f"{folder}"]), "0 to 9")
    refused(lambda: collect_demos.main(["--task_ids", "0-3"]), "0,3,5")
    assert not folder.exists()
    # as a run leaves it that was killed between its last file and its end
    args = collect_demos.build_parser().parse_args(["--seed", "5"])
    collect_demos.claim(folder, args, versions()["mujoco"])
    for index in (0, 3):
        write_synthetic_demos(folder / f"libero_spatial_{index}.hdf5", n_demos=2, size=16)
    collect("--seed", "5", "--n_demos", "2")
    assert capsys.readouterr().out.count("is there already") == 2
    refused(lambda: collect("--seed", "5", "--n_demos", "1"), "libero_spatial_0.hdf5", "2 demonst")
    refused(lambda: collect("--seed", "6", "--n_demos", "2"), "other settings")


def test_more_demonstrations_are_recorded_behind_those_that_are_there(tmp_path, monkeypatch):
    """The first two of three are the two of before: neither lost nor recorded once more, and what
    was counted with them is kept. A killed one has lost nothing.
    """
    folder, out = tmp_path / "suite", tmp_path / "suite" / "libero_spatial_0.hdf5"
    words = ["--task_ids", "0", "--out", str(folder), "--n_demos"]
    args = collect_demos.build_parser().parse_args([])
    collect_demos.claim(folder, args, versions()["mujoco"])
    write_synthetic_demos(out, n_demos=2, size=16, bad_resets=7, frame_stride=1)
    before = open_dataset(out).demos

    def record(args, task, parts_folder):
        assert [parts.readable(parts.part_path(parts_folder, i)) for i in (0, 1)] == [True, True]
        if killed:
            raise KeyboardInterrupt
        one = write_synthetic_demos(tmp_path / "one.hdf5", n_demos=1, size=16, seed=9)
        with h5py.File(one) as file, h5py.File(parts.part_path(parts_folder, 2), "w") as copy:
            file.copy("data/demo_0", copy, "demo")
        return read_json(parts_folder / "counts.json", "counts")

    monkeypatch.setattr(collect_demos, "record_missing", record)
    killed = True
    with pytest.raises(KeyboardInterrupt):
        collect_demos.main([*words, "3"])
    assert len(open_dataset(out)) == 2
    killed = False
    collect_demos.main([*words, "3"])
    found = open_dataset(out)
    assert len(found) == 3 and found.attributes["bad_resets"] == 7
    for old, new in zip(before, found.demos):
        np.testing.assert_array_equal(old.actions, new.actions)
        np.testing.assert_array_equal(old.images([0, 5]), new.images([0, 5]))
    assert not list(folder.glob("*.parts"))


def test_a_disk_that_fills_up_leaves_a_folder_of_parts(tmp_path, monkeypatch):
    """The last step of a smith300 collection: until the folder is the dataset the same command goes
    on, and the dataset that it replaces is there.
    """
    folder, out = tmp_path / "out.parts", tmp_path / "out"
    for path in (folder, out):
        write_synthetic_episodes(path, 2)
    write_json(folder / "settings.json", {"seed": 5})
    (folder / ".tmp1.half").mkdir()
    episodes = sorted(folder.glob("episode_*"))

    def full(*args):
        raise OSError(28, "No space left on device")

    for module, name in ((smith300, "write_dataset_stamp"), (runtime.os, "replace")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, full)
            with pytest.raises((OSError, UserError)):
                parts.gather(folder, episodes, out, {})
        assert (folder / "settings.json").is_file() and len(list(folder.glob("episode_*"))) == 2
        assert len(list(out.glob("episode_*"))) == 2
    parts.gather(folder, episodes, out, {"task_suite": "x"})
    assert not folder.exists() and read_json(out / "dataset.json", "stamp")["task_suite"] == "x"
    assert {p.name for p in out.iterdir()} == {"dataset.json", *(p.name for p in episodes)}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_fewer_demonstrations_than_are_finished_are_refused(tmp_path):
    """They would be removed with the folder of parts, hours of work, without a word."""
    for kind in ("demo_{:05d}.hdf5", "episode_{:05d}"):
        folder = tmp_path / kind[:4]
        folder.mkdir()
        for i in range(3):
            (folder / kind.format(i)).mkdir()
        parts.refuse_fewer(folder, 3)
        refused(
            lambda folder=folder: parts.refuse_fewer(folder, 2), "--n_demos 2", "give --n_demos 3"
        )


def test_replays_are_not_written_between_their_sources(tmp_path):
    """The same command again would replay them too."""
    write_synthetic_demos(tmp_path / "a.hdf5", 1, size=16)
    words = ["--replay", str(tmp_path), "--out", str(tmp_path), "--setting", "cameras"]
    refused(lambda: collect_demos.main(words), "holds files that are replayed")


def test_the_committed_checkpoints_are_found_from_anywhere(tmp_path, monkeypatch):
    """The committed checkpoints are found from every working directory."""
    monkeypatch.chdir(tmp_path)
    assert records.newest_checkpoint()[0].is_file()


def test_a_reader_that_leaves_ends_a_script_quietly(tmp_path):
    """`deploy ... | head -1` ends without a BrokenPipeError."""
    code = (
        "import runtime\n"
        "def main():\n    for i in range(10**6): print(i, flush=True)\n"
        "runtime.run_script(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=60) != 0


def test_wandb_without_a_login_is_one_sentence(tmp_path, monkeypatch):
    """A missing login is one sentence before the features are computed."""
    for name, value in (
        ("WANDB_API_KEY", ""),
        ("HOME", str(tmp_path)),
        ("NETRC", str(tmp_path / "netrc")),
        ("WANDB_BASE_URL", "http://localhost:9"),
        ("WANDB_INIT_TIMEOUT", "2"),
    ):
        monkeypatch.setenv(name, value)
    refused(lambda: runtime.RunLogger(tmp_path, "online", {}), "--wandb online", "wandb login")
