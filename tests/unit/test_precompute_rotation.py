"""The gate before the 1D rotation target: it stops data that turns about several axes, names
the remedy, and writes a basis that loads.
"""

import shutil

import h5py
import numpy as np
import pytest
from conftest import write_synthetic_demos, write_synthetic_episodes
from helpers import run

import convert_demos
from data_smith300_volume import VolumeDataset, find_basis
from formats.dataset import open_dataset
from formats.demos import split_demos
from formats.mixture import open_mixture
from model_dino_volume_kv_full import DinoVolumeKVFullConfig
from precompute_rotation_pca import build_parser, precompute
from rot_utils import BASIS_FILE, euler_to_matrix, fingerprint, load_basis, matrix_to_rotvec
from runtime import UserError


def several_axes(path):
    """Turn a demonstration file's rotations into ones about all three axes."""
    with h5py.File(path, "r+") as file:
        for i, name in enumerate(file["data"]):
            ori = file["data"][name]["obs/ee_ori"]
            angles = 0.5 * np.sin(np.outer(np.arange(len(ori)), [0.31, 0.23, 0.17]) + i)
            ori[...] = np.stack([matrix_to_rotvec(r) for r in euler_to_matrix(angles)])
    return path


def left(folder):
    return sorted(
        p.name for p in folder.iterdir() if "rotation_pca" in p.name or p.name.startswith(".tmp")
    )


def script(*flags):
    """Run the script in this process -> its exit code.

    A subprocess for each call would make the test slow.
    """
    return precompute(**vars(build_parser().parse_args([str(f) for f in flags])))


@pytest.mark.parametrize("space", ["so3", "euler"])
def test_a_libero_file_gets_its_basis(space, tmp_path, capsys):
    """Only yaw varies: both spaces are tabled, and the chosen one is written beside the file
    with picture and provenance.
    """
    path = write_synthetic_demos(tmp_path / "demos.hdf5", n_demos=3)
    assert script("--dataset", path, "--space", space) == 0
    out, err = capsys.readouterr()
    assert "| so3" in out and "| euler" in out and f"{space} (chosen)" in out and err == ""
    assert left(tmp_path) == [BASIS_FILE, "rotation_pca_basis.png"]
    basis = load_basis(
        tmp_path / BASIS_FILE, [fingerprint(d.ee_ori) for d in open_dataset(path).demos]
    )
    assert basis.space == space and basis.ev_ratio[0] > 0.85
    assert basis.provenance["demos"] == 2 and basis.provenance["allow_low_ev"] is False
    assert basis.provenance["command"] and basis.provenance["commit"]


def test_validation_demonstrations_stay_unseen(tmp_path, capsys):
    """Axis and range are those of the demonstrations that train.py trains on, whatever the
    held-out one does. A training with another split is refused, and the sentence names the
    flag.
    """
    path = write_synthetic_demos(tmp_path / "demos.hdf5", n_demos=4)
    assert script("--dataset", path, "--val_fraction", 0.25) == 0
    before = load_basis(tmp_path / BASIS_FILE)
    with h5py.File(path, "r+") as file:  # the last one validates: it now turns much farther
        ori = file["data/demo_3/obs/ee_ori"]
        ori[...] = np.stack(
            [
                matrix_to_rotvec(r)
                for r in euler_to_matrix(np.outer(np.linspace(0, 1, len(ori)), [0.9, -0.7, 2.0]))
            ]
        )
    assert script("--dataset", path, "--val_fraction", 0.25) == 0
    assert "1 demonstrations held out" in capsys.readouterr().out
    after = load_basis(tmp_path / BASIS_FILE)
    assert (before.low, before.high) == (after.low, after.high)
    assert np.array_equal(before.axis, after.axis)
    demos, config = open_dataset(path).demos, DinoVolumeKVFullConfig()
    for part in (demos[:3], demos[3:]):
        assert find_basis(part, config).low == after.low
    VolumeDataset.check_split(demos[:3], config)
    with pytest.raises(UserError, match="3 demonstrations, which are not the 2.*--val_fraction"):
        VolumeDataset.check_split(demos[:2], config)
    with pytest.raises(UserError, match="not the 4"):  # as a basis of an earlier version was fitted
        VolumeDataset.check_split(demos, config)


def test_several_datasets_have_one_basis(tmp_path, capsys):
    """A folder of files and one more: the basis knows all of them, lies where a training on them
    looks for it, and its axis is that of all. What one lacks is said of that file.
    """
    (tmp_path / "suite").mkdir()
    paths = [tmp_path / "suite" / f"libero_spatial_{i}.hdf5" for i in range(2)]
    paths.append(tmp_path / "other.hdf5")
    for i, path in enumerate(paths):
        write_synthetic_demos(path, n_demos=3 + i)
    given = [tmp_path / "suite", paths[2]]
    assert script("--dataset", *given) == 0
    assert left(tmp_path / "suite") == [BASIS_FILE, "rotation_pca_basis.png"]
    train, held_out = split_demos(open_mixture(given).demos)
    basis = find_basis(train, DinoVolumeKVFullConfig())
    # a part that begins in another folder finds it too
    assert find_basis([*train[::-1], *held_out], DinoVolumeKVFullConfig()).low == basis.low
    VolumeDataset.check_split(train, DinoVolumeKVFullConfig())
    # nothing of the folder in which it lies need be in a part, once it was looked for among all
    config = VolumeDataset.located(DinoVolumeKVFullConfig(), [*train, *held_out])
    foreign = [demo for demo in held_out if demo.source.path == paths[2]]
    assert foreign and find_basis(foreign, config).low == basis.low
    assert basis.provenance["demos"] == len(train) < 12
    assert basis.provenance["dataset"] == "suite other.hdf5"
    # alone the first file is foreign to nothing, yet not what the basis was fitted to
    with pytest.raises(UserError, match="which are not the"):
        VolumeDataset.check_split(open_dataset(paths[0]).demos, DinoVolumeKVFullConfig())
    for path in paths:
        several_axes(path)
    capsys.readouterr()
    assert script("--dataset", *given) == 3
    assert f"{given[0]} {given[1]}: one axis explains" in capsys.readouterr().err


def test_one_task_of_several_has_a_basis(suite, tmp_path):
    """Of a dataset of several tasks train.py may take one; the basis is then of that one."""
    files = [str(suite / f"libero_spatial_{task}.hdf5") for task in (0, 2)]
    folder, out = tmp_path / "both", tmp_path / "basis.npz"
    convert_demos.main([*files, "--out", str(folder)])
    assert script("--dataset", folder, "--task", "1", "--out", out) == 0
    config = DinoVolumeKVFullConfig(basis=out)
    train, held_out = split_demos(open_mixture([folder], task="1").demos)
    VolumeDataset.check_split(train, config)
    assert load_basis(out).provenance["task"] == "1"
    with pytest.raises(UserError, match="--task and --val_fraction"):
        VolumeDataset.check_split([*train, *held_out], config)


def test_the_gate_stops(tmp_path, capsys):
    """Motion about several axes gives a non-zero exit code, a remedy and no file.

    With the override the basis is written and says so.
    """
    path = several_axes(write_synthetic_demos(tmp_path / "demos.hdf5", n_demos=3))
    assert script("--dataset", path) == 3 and left(tmp_path) == []
    err = capsys.readouterr().err
    assert all(
        word in err for word in ("0.85", "--allow_low_ev", "--rotation euler", "nothing is written")
    )
    assert script("--dataset", path, "--allow_low_ev") == 0
    basis = load_basis(tmp_path / BASIS_FILE)
    assert basis.ev_ratio[0] < 0.85 and basis.provenance["allow_low_ev"] is True


def test_a_dataset_that_fails_in_euler_passes_in_so3(tmp_path, capsys):
    """A gripper points ahead (pitch -90 deg) and turns about the vertical, as on a mobile base.

    Raw Euler angles fail the gate, with a warning about the singularity and the advice to use so3.
    so3 passes with nearly all of the variance.
    """
    path = write_synthetic_episodes(tmp_path / "izzy", n_episodes=6, size=16, pitch=-np.pi / 2)
    assert script("--dataset", path, "--space", "euler") == 3 and left(path) == []
    err = capsys.readouterr().err
    assert "trade places" in err and "--space so3 passes" in err
    assert script("--dataset", path) == 0
    assert load_basis(path / BASIS_FILE).ev_ratio[0] > 0.95
    assert left(path) == [BASIS_FILE, "rotation_pca_basis.png"]


def test_an_old_basis_survives_a_stopped_run(tmp_path):
    """A run that the gate stops leaves an existing basis as it is."""
    path = write_synthetic_demos(tmp_path / "demos.hdf5", n_demos=2)
    assert script("--dataset", path) == 0
    before = (tmp_path / BASIS_FILE).read_bytes()
    assert script("--dataset", several_axes(path)) == 3
    assert (tmp_path / BASIS_FILE).read_bytes() == before


def test_bad_data_is_refused_in_one_sentence(synthetic_episodes, tmp_path):
    """Errors of both readers come through as one line and exit code 2."""
    path = shutil.copytree(synthetic_episodes, tmp_path / "izzy")
    (path / "episode_00002" / "episode.npz").unlink()
    done = run("precompute_rotation_pca.py", "--dataset", path, cwd=tmp_path, ok=False)
    assert done.returncode == 2
    assert "episode_00002" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(UserError, match="no such file"):
        script("--dataset", tmp_path / "absent.hdf5")
