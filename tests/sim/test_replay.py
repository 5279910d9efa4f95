"""LIBERO's own HDF5 files are re-rendered from their states, and not where the premise is wrong."""

import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import ROOT, SIZE, run
from official import play, write_official

from formats import libero_hdf5
from formats.dataset import open_dataset
from formats.demos import simulated_with
from runtime import UserError
from sim import replay
from sim.libero_env import Scene

PAGE = (ROOT / "docs" / "data_formats.md").read_text()
# the arm comes down, the fingers stay open
DOWN = np.array([[0.2, 0.2, -1.0, 0, 0, 0, -1.0]] * 12)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """(folder with an official file of the full scene, images (12,S,S,3) that a replay should have,
    positions (12,3), the scene)."""
    folder = tmp_path_factory.mktemp("official")
    scene = Scene(image_size=int(SIZE))
    scene.begin_episode(scene.init_states()[0])
    demo = play(scene, DOWN)
    write_official(folder / "official_demo.hdf5", scene, [demo])
    images, positions = [], []
    for state in demo["states"]:
        scene.set_state(state)
        seen = scene.observe()
        images.append(seen.image)
        positions.append(seen.eef_pos)
    yield folder, np.stack(images), np.stack(positions), scene
    scene.close()


@pytest.fixture
def changed(official, tmp_path):
    """A function that copies the official file and changes it."""

    def copy(change, name="other_demo.hdf5"):
        path = tmp_path / name
        shutil.copy(official[0] / "official_demo.hdf5", path)
        with h5py.File(path, "r+") as file:
            change(file["data"])
        return path

    return copy


def put(group, key, value):
    del group[key]
    group[key] = value


def test_the_official_files_model_says_where_its_fixtures_stand(official):
    """Cabinet and stove are in no state: without their poses they would be drawn elsewhere."""
    with h5py.File(official[0] / "official_demo.hdf5") as file:
        poses = libero_hdf5.stored_fixtures("file", file["data/demo_0"])
    placed = official[3].fixtures()
    for name, pose in placed.items():
        np.testing.assert_allclose(poses[name], pose, atol=1e-5)
    assert len(placed) > 1


def test_replay_restores_official_files(official, changed, tmp_path):
    """A folder of official files: that of --task_ids is re-rendered from its states, upright, with
    a camera; one whose images are of other states fails, and the other stays. The same command then
    finds it there, at once.
    """
    folder = tmp_path / "files"
    shutil.copytree(official[0], folder)

    # the picture of something else: rows of noise
    def noise(data):
        images = data["demo_0/obs/agentview_rgb"]
        images[:] = np.random.default_rng(0).integers(0, 255, images.shape, dtype=np.uint8)

    def other(data):
        name = data.attrs["bddl_file_name"]
        data.attrs["bddl_file_name"] = name.replace(
            "between_the_plate_and_the_ramekin", "next_to_the_ramekin"
        )

    changed(noise).rename(folder / "noise_demo.hdf5")
    changed(other).rename(folder / "task_1_demo.hdf5")
    (command,) = re.findall(r'title="a folder of official files"\npython (.*)', PAGE)
    command = command.replace("FOLDER", str(folder)).replace("REPLAYED", "replayed")
    command += f" --image_size {SIZE} --frame_stride 1 --workers 1"
    done = run(command, cwd=tmp_path, ok=False)
    assert done.returncode == 2 and "1 of 2 files failed" in done.stderr
    assert "is rendered otherwise here than it was recorded" in done.stderr
    assert "MuJoCo 3.3.2" in done.stderr and "Traceback" not in done.stderr
    assert "MuJoCo of an unknown version" in done.stdout
    recordings = open_dataset(tmp_path / "replayed/official_demo_replayed.hdf5", int(SIZE))
    new, attributes = recordings.demos, recordings.attributes
    assert simulated_with(attributes) == {} and attributes["image_orientation"] == "upright"
    assert "grasp" not in attributes  # which nobody knows
    _, images, positions, scene = official
    # while it moves, MuJoCo's body poses are one physics step (2 ms) older than its state, in
    # LIBERO's own files as well
    np.testing.assert_allclose(new[0].ee_pos, positions, atol=1e-3)
    np.testing.assert_allclose(new[0].E, scene.camera()[1], atol=1e-9)
    found = new[0].images(range(12)).astype(int)
    assert np.abs(found - images.astype(int)).mean() < 1.0
    # nothing is made twice
    (folder / "noise_demo.hdf5").unlink()
    assert "is there already" in run(command, cwd=tmp_path).stdout
    refused = run(f"{command} --image_size 64", cwd=tmp_path, ok=False)
    assert refused.returncode == 2 and "made with other settings" in refused.stderr


def test_the_premise_is_measured(official):
    """In the real scene: true for the file as it is; the wrong state, images the other way up and
    an EEF elsewhere are each told, with the versions.
    """
    path, scene = official[0] / "official_demo.hdf5", official[3]
    with h5py.File(path) as file:
        seen = replay.first_observation(path, file, "demo_0", file["data/demo_0"])
        states = file["data/demo_0/states"][()]
        replay.check_premise(scene, states[1], seen, "file")
    grey = replay.image_differences(scene.render(), seen["image"])
    assert grey["as it is"] < 5 and min(v for k, v in grey.items() if k != "as it is") > 12
    for change, words in (
        ({"image": seen["image"][::-1]}, "upside down"),
        ({"ee_pos": seen["ee_pos"] + [0, 0.03, 0]}, "the EEF is 30 mm"),
    ):
        with pytest.raises(UserError, match=words) as error:
            replay.check_premise(scene, states[1], {**seen, **change}, "file")
        assert "LIBERO's: 2.3" in str(error.value) and "robosuite 1.4.0" in str(error.value)


def test_files_are_chosen_by_task(official, changed, tmp_path):
    """--task_ids names numbers of a suite; what names no task, or nothing, is refused."""
    (path,) = replay.files_of([official[0]], [0])
    assert path == Path(official[0]) / "official_demo.hdf5"
    with pytest.raises(UserError, match="no .hdf5 file of --task_ids 3"):
        replay.files_of([official[0]], [3])
    with pytest.raises(UserError, match="two files are called official_demo"):
        replay.files_of([official[0], path])
    nameless = changed(lambda data: data.attrs.__delitem__("bddl_file_name"))
    with pytest.raises(UserError, match="'bddl_file_name' is missing"):
        replay.files_of([nameless], [0])
