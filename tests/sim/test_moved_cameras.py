"""Demonstrations of any task from moved cameras: where they stand, and that a demonstration says
so.
"""

import shutil

import h5py
import numpy as np
import pytest
from conftest import SIZE
from helpers import ROOT, run

import canonical
from camera import project
from formats.dataset import open_dataset
from formats.demos import split_demos
from sim import layouts
from sim import moved_cameras as cameras
from sim.libero_env import Scene
from sim.settings import Condition

DRAWN = [cameras.drawn(np.random.default_rng(seed), 1)[0] for seed in range(400)]
MOVED = np.array([view for view in DRAWN if view != cameras.AS_IT_IS])


def test_the_ranges_are_those_that_are_written_down():
    """All of each range is used, and nothing beyond it; a fifth keep the task's own view. The page
    has the same numbers.
    """
    assert (cameras.TURNED, cameras.TILTED, cameras.AWAY, cameras.IN_PLACE) == (75, 15, 2, 10)
    page = (ROOT / "docs" / "libero_plus.md").read_text()
    said = "turned about the table by up to 75 degrees, half of them also tilted by up to 15"
    assert f"{said}, half up to twice as far, half turned in place by up to 10" in page
    turned, tilted, distance, pan, pitch = MOVED.T
    assert 0.15 < 1 - len(MOVED) / len(DRAWN) < 0.25
    for values, low, high in (
        (turned, -cameras.TURNED, cameras.TURNED),
        (tilted, 0, cameras.TILTED),
        (distance, 1, cameras.AWAY),
        (pan, -cameras.IN_PLACE, cameras.IN_PLACE),
        (pitch, -cameras.IN_PLACE, cameras.IN_PLACE),
    ):
        assert low <= values.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < values.max() <= high
    # each kind of change is in half of them
    for values, still in ((tilted, 0), (distance, 1), (pan, 0)):
        assert 0.4 < np.mean(values != still) < 0.6


@pytest.mark.parametrize("view", [(30.0, 0.0, 1.0, 0.0, 0.0), (-75.0, 15.0, 2.0, 10.0, -10.0)])
def test_a_camera_stands_where_its_view_says(scene, view):
    """Turned about the vertical through the world's origin, as far as before and twice as far."""
    scene.set_view(Condition(moved=cameras.AS_IT_IS))
    _, before = scene.camera()
    scene.set_view(Condition(moved=view))
    _, after = scene.camera()
    scene.set_view(Condition())
    np.testing.assert_allclose(scene.camera()[1], before, atol=1e-6)
    far = lambda E: np.linalg.norm(E[:3, 3] - cameras.PIVOT)
    assert far(after) == pytest.approx(view[2] * far(before), abs=1e-4)
    angle = np.degrees(np.arctan2(*after[1::-1, 3])) - np.degrees(np.arctan2(*before[1::-1, 3]))
    assert angle == pytest.approx(view[0], abs=1e-3)


@pytest.mark.parametrize(
    "view", [(0.0, 0.0, 1.0, 9.0, -7.0), (-40.0, 10.0, 1.8, 0.0, 0.0), (60.0, 5.0, 1.3, -6.0, 8.0)]
)
def test_a_warped_picture_is_what_the_simulator_shows_from_there(scene, view):
    """A moved camera's image, turned and zoomed to the task's own view, against the simulator's
    picture by a camera that stands there, looks so and has that focal length.
    """
    scene.set_view(Condition())
    one = canonical.view_of(*scene.camera(), 0.93, None)
    scene.set_view(Condition(moved=view))
    K, E = scene.camera()
    new_K, new_E, warp = canonical.camera_of(K, E, scene.image_size, one)
    old = scene.render()
    warped, seen = (
        canonical.warped(image, warp).astype(float) for image in (old, np.ones_like(old))
    )
    index = scene.sim.model.camera_name2id("agentview")
    own = scene.sim.model.cam_fovy[index]
    try:
        scene.sim.model.cam_fovy[index] = np.degrees(
            2 * np.arctan(scene.image_size / 2 / new_K[0, 0])
        )
        scene.set_camera(new_E)
        np.testing.assert_allclose(scene.camera()[0], new_K)
        there = scene.render().astype(float)
    finally:
        scene.sim.model.cam_fovy[index] = own
        scene.set_view(Condition())
    inside = (seen == 1).all(-1)
    assert inside.mean() > 0.4
    apart = lambda image: np.abs(image - there)[inside].mean()
    # what is left is the light, which MuJoCo has shine where the camera looks
    assert apart(warped) < 0.35 * apart(old.astype(float))
    for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
        assert apart(np.roll(warped, step, axis)) > 1.05 * apart(warped)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Folder of two tasks' demonstrations with moved cameras."""
    folder = tmp_path_factory.mktemp("cameras")
    run(
        "collect_demos.py --task_suite libero_spatial --task_ids 2,3 --setting cameras --n_demos 4 "
        f"--image_size {SIZE} --push_rate 0 --frame_stride 4 --render fast --workers 2 --out both",
        cwd=folder,
    )
    return folder / "both"


def test_a_demonstration_says_its_camera(both):
    """Two tasks of a suite: every demonstration has its own, stored as a view and as K and E that
    agree; object and goal are in the picture. The files do not share their cameras.
    """
    views = []
    for index in (2, 3):
        demos = open_dataset(both / f"libero_spatial_{index}.hdf5", int(SIZE)).demos
        scene = Scene("libero_spatial", index, int(SIZE), rendering=False)
        try:
            scene.set_state(scene.init_states()[0])
            own = scene.camera()[1]
            for demo in demos:
                view = tuple(demo.attrs["moved"])
                np.testing.assert_allclose(cameras.moved(own, view), demo.E, atol=1e-4)
                u, v, _ = project(demo.ee_pos[[0, -1]], demo.K, demo.E)
                # the last pose is above the plate
                assert 0 < u[-1] < int(SIZE)
                views.append(view)
        finally:
            scene.close()
    moved = [view for view in views if view != cameras.AS_IT_IS]
    assert len(set(moved)) == len(moved) > 3


def test_a_replay_shows_the_same_demonstration_from_elsewhere(both, tmp_path):
    """The same states and commands, another camera that is said and stored, its picture. Both are
    trained on or held out together; a file whose cameras are its setting's own is refused.
    """
    command = (
        f"collect_demos.py --image_size {SIZE} --frame_stride 4 --render fast --workers 1 "
        "--setting cameras --seed 1 --out again.hdf5 --replay"
    )
    path = both / "libero_spatial_2.hdf5"
    run(f"{command} {path} --n_demos 3", cwd=tmp_path)
    files = [open_dataset(p, int(SIZE)) for p in (path, tmp_path / "again.hdf5")]
    # by it an evaluation knows whose path its coverage is of
    assert [file.attributes["grasp"] for file in files] == ["planned", "planned"]
    for old, new in zip(files[0].demos, files[1].demos):
        np.testing.assert_array_equal(old.states, new.states)
        np.testing.assert_allclose(old.ee_pos, new.ee_pos, atol=1e-3)
        assert old.instruction == new.instruction
        assert tuple(old.attrs["moved"]) != tuple(new.attrs["moved"])
        assert np.abs(old.E - new.E).max() > 0.05
        assert np.abs(old.images([0])[0].astype(int) - new.images([0])[0]).mean() > 5
    train, held_out = split_demos([d for file in files for d in file.demos], 0.3)
    numbers = [{int(d.name.split("_")[1]) for d in part} for part in (train, held_out)]
    assert numbers == [{0, 1, 3}, {2}] and len(held_out) == 2

    own = shutil.copy(path, tmp_path / "own.hdf5")
    with h5py.File(own, "r+") as file:
        file["data"].attrs["setting"] = "recipe"
    refused = run(f"{command} {own}", cwd=tmp_path, ok=False)
    assert refused.returncode == 2
    assert "--setting recipe, whose cameras are its own" in refused.stderr


def test_cameras_to_tune_on_are_as_demonstrations_draw_them():
    """Each episode of val_cameras has a camera of its own, another one in each task, the same
    whatever was played before, never the task's own; its row says which.
    """
    seen = {}
    for task in (0, 2):
        scene = Scene("libero_spatial", task, int(SIZE), rendering=False)
        try:
            for index in (0, 1, 0):
                _, condition = layouts.episode_state(scene, "val_cameras", index)
                assert seen.setdefault((task, index), condition) == condition
                assert condition.described("cameras") == {"moved": condition.moved}
                points = [scene.position(n) for n in (scene.pick, scene.place)]
                assert cameras.shows(scene, points, -cameras.BEYOND)
        finally:
            scene.close()
    views = {condition.moved for condition in seen.values()}
    assert len(views) == len(seen) and cameras.AS_IT_IS not in views
