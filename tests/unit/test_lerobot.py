"""LeRobot's dataset format: what is written is read back, pictures are upright and unmirrored or
refused, and each fault of a folder is named with its remedy.
"""

import json
import shutil

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SIZE, STEPS, write_synthetic_demos
from helpers import nearest_is_its_own

import convert_demos
from data import WaypointDataset
from formats import lerobot_statistics, lerobot_writer, pictures
from formats.dataset import open_dataset
from formats.lerobot import placed_as_said
from formats.libero_cameras import TASKS, agentview, camera_of_task, find_task
from policy import PolicyConfig
from rot_utils import rotvec_to_matrix
from runtime import UserError

DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
MP4 = "videos/observation.images.image/chunk-000/file-000.mp4"
KNOWN = "put both moka pots on the stove"


@pytest.fixture(scope="session")
def folder(synthetic_demos, tmp_path_factory):
    """The synthetic demonstrations as a LeRobot folder, PNG. Shared: do not write to it."""
    out = tmp_path_factory.mktemp("lerobot") / "png"
    convert_demos.main([str(synthetic_demos), "--out", str(out)])
    return out


@pytest.fixture(scope="session")
def video_folder(synthetic_demos, tmp_path_factory):
    """The same with H.264 videos. Shared: do not write to it."""
    out = tmp_path_factory.mktemp("lerobot") / "mp4"
    convert_demos.main([str(synthetic_demos), "--out", str(out), "--video"])
    return out


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def change_json(path, **values):
    """Set keys of a JSON file; None removes one."""
    said = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in said.items() if v is not None}))


def change_column(path, name, function):
    """A column of a Parquet file becomes function(list of its cells); None removes it."""
    table = pq.read_table(path)
    at, column = table.column_names.index(name), table[name]
    table = table.remove_column(at)
    if (cells := function(column.to_pylist())) is not None:
        table = table.append_column(name, pa.array(cells))
    pq.write_table(table, path)


# -- written and read back ------------------------------------------------------------------------


def test_demonstrations_come_back_as_they_were(synthetic_demos, folder):
    """Numbers to a float32's digits, cameras and PNG images exactly, and what was pushed."""
    before, after = open_dataset(synthetic_demos), open_dataset(folder)
    assert after.format == "lerobot" and after.image_size == before.image_size
    for key in ("task_suite", "task_id", "language", "seed"):
        assert after.attributes[key] == before.attributes[key]
    for a, b in zip(before.demos, after.demos, strict=True):
        for name in ("actions", "ee_pos", "gripper_states"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-6)
        np.testing.assert_allclose(
            rotvec_to_matrix(a.ee_ori), rotvec_to_matrix(b.ee_ori), atol=1e-6
        )
        assert (a.perturbed == b.perturbed).all()
        assert np.array_equal(a.K, b.K) and np.array_equal(a.E, b.E)
        frames = [STEPS - 1, 0, 7, 7]
        assert np.array_equal(a.images(frames), b.images(frames))
    assert any(d.perturbed.any() for d in after.demos)


def test_videos_give_the_same_frames_within_their_compression(synthetic_demos, video_folder):
    """H.264 at quality 18 changes grain by some grey levels; a frame off by one, or one of another
    episode, differs by the blob's whole colour.
    """
    before, after = open_dataset(synthetic_demos), open_dataset(video_folder)
    for a, b in zip(before.demos, after.demos, strict=True):
        frames = [STEPS - 1, 0, 11, 11]
        stored, read = a.images(frames).astype(int), b.images(frames).astype(int)
        # red of the blob (230, 30, 40) stands out from the grain (90 to 130)
        red = lambda images: images[..., 0] - images[..., 1] > 90
        assert (red(stored) != red(read)).mean() < 0.01
        assert np.abs(stored - read).mean() < 12
        one_by_one = np.concatenate([b.images([i]) for i in range(STEPS)])
        nearest_is_its_own(one_by_one, a.images(range(STEPS)))


def test_training_sees_the_same_samples(synthetic_demos, folder, backbone, tmp_path):
    """Labels, states, cameras and features of both are those of one recording."""
    config = PolicyConfig(backbone="efficientnet_lite0", image_size=SIZE, waypoint_stride=2)
    made = []
    for path in (synthetic_demos, folder):
        demos = open_dataset(path, SIZE, 2).demos
        made.append(WaypointDataset(demos, config, backbone, 2, tmp_path / "cache", False))
    a, b = made
    assert len(a) == len(b) > 10
    first, second = a.batch(range(len(a))), b.batch(range(len(b)))
    for key in ("eef_pos", "gripper_width", "target_pos", "target_rot", "K", "E"):
        np.testing.assert_allclose(first[key], second[key], atol=1e-6)
    assert (first["target_gripper"] == second["target_gripper"]).all()
    assert (first["mask"] == second["mask"]).all()
    assert all((m == n).all() for m, n in zip(first["features"], second["features"]))


def as_version_2(folder, out):
    """A LeRobot folder of version 2.1 with the same episodes: a file an episode, JSON lines."""
    info = json.loads((folder / "meta" / "info.json").read_text())
    table = pq.read_table(folder / DATA)
    (out / "meta").mkdir(parents=True)
    (out / "data" / "chunk-000").mkdir(parents=True)
    episodes = []
    for row in pq.read_table(folder / EPISODES).to_pylist():
        index, length = row["episode_index"], row["length"]
        part = table.slice(row["dataset_from_index"], length)
        pq.write_table(part, out / "data" / "chunk-000" / f"episode_{index:06d}.parquet")
        line = {"episode_index": index, "tasks": row["tasks"], "length": length}
        episodes.append(json.dumps(line) + "\n")
    (out / "meta" / "episodes.jsonl").write_text("".join(episodes))
    task = {"task_index": 0, "task": "pick up the blob"}
    (out / "meta" / "tasks.jsonl").write_text(json.dumps(task) + "\n")
    info["codebase_version"] = "v2.1"
    info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    (out / "meta" / "info.json").write_text(json.dumps(info))
    shutil.copy(folder / "meta" / "cameras.json", out / "meta" / "cameras.json")
    return out


def test_version_2_1_is_read_as_version_3(folder, tmp_path):
    """One file an episode and JSON lines hold the same demonstrations."""
    new, old = open_dataset(folder), open_dataset(as_version_2(folder, tmp_path / "old"))
    assert old.fingerprint == new.fingerprint and len(old) == len(new)


def test_metadatas_fps_changes_nothing(folder, video_folder, tmp_path):
    """Public LIBERO data says 10 fps of a robot at 20: time is the frame index."""
    copy = copied(folder, tmp_path)
    change_json(copy / "meta" / "info.json", fps=10)
    assert open_dataset(copy).fingerprint == open_dataset(folder).fingerprint


def test_one_task_of_several_is_chosen(synthetic_demos, tmp_path):
    """--task takes an index, an instruction, or words of it."""
    other = tmp_path / "other.hdf5"
    write_synthetic_demos(other, n_demos=2, seed=1)
    with h5py.File(other, "r+") as file:
        file["data"].attrs["language"] = "push the blob"
    out = tmp_path / "both"
    convert_demos.main([str(synthetic_demos), str(other), "--out", str(out)])
    assert len(open_dataset(out)) == 6
    for asked in ("1", "push the blob", "push", 1):
        chosen = open_dataset(out, task=asked)
        assert len(chosen) == 2 and chosen.attributes["language"] == "push the blob"
    for asked in ("7", "blob", "fold"):
        with pytest.raises(UserError, match=r"--task .*0: pick up the blob; 1: push the blob"):
            open_dataset(out, task=asked)
    with pytest.raises(UserError, match="holds one task"):
        open_dataset(other, task="0")


def test_axis_angles_beyond_pi_are_the_same_rotation():
    """robosuite keeps a quaternion's sign: vectors of angles up to 2 pi, the rotations of ours."""
    rng = np.random.default_rng(0)
    quats = rng.normal(size=(50, 4))
    quats /= np.linalg.norm(quats, axis=1, keepdims=True)
    from rot_utils import quat_to_matrix

    found = lerobot_writer.axis_angle(quats, np.full((50, 3), np.nan))
    assert np.linalg.norm(found, axis=1).max() > np.pi + 1
    np.testing.assert_allclose(rotvec_to_matrix(found), quat_to_matrix(quats), atol=1e-9)
    # no quaternion was stored
    zero = lerobot_writer.axis_angle(np.zeros((1, 4)), np.ones((1, 3)))
    assert (zero == 1).all()


def test_statistics_of_images_are_those_of_their_pixels():
    """Counted by grey level, or pixel by pixel: one answer."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (3, 8, 8, 3), dtype=np.uint8)
    found = lerobot_statistics.Statistics()
    found.add({}, {"image": images})
    told = {k: np.ravel(v) for k, v in found.total()["image"].items()}
    pixels = images.reshape(-1, 3) / 255
    np.testing.assert_allclose(told["mean"], pixels.mean(0))
    np.testing.assert_allclose(told["std"], pixels.std(0))
    np.testing.assert_allclose(told["max"], pixels.max(0))
    np.testing.assert_allclose(told["q50"], np.median(pixels, 0), atol=1.5 / 255)


# -- cameras and pictures -------------------------------------------------------------------------


def test_known_tasks_have_the_camera_of_their_scene():
    """A task of each suite, and none of an unknown one."""
    assert find_task(KNOWN) == ("libero_10", 8)
    assert find_task("Open the middle drawer of the cabinet ") == ("libero_goal", 0)
    K, E = camera_of_task(KNOWN, 256)
    assert abs(K[0, 0] - 309.02) < 0.01 and np.allclose(E, agentview("table", 256)[1])
    object_task = "pick up the milk and place it in the basket"
    assert abs(camera_of_task(object_task, 256)[1][2, 3] - 0.65) < 1e-9
    assert camera_of_task("fold the towel", 256) is None


def test_camera_comes_from_the_file_then_the_frames_then_the_task(folder, tmp_path):
    """Without meta/cameras.json a task of LIBERO has its scene's camera; others are refused."""
    copy = copied(folder, tmp_path)
    (copy / "meta" / "cameras.json").unlink()
    with pytest.raises(UserError, match=r"camera is not known, 'pick up the blob'.*cameras\.json"):
        open_dataset(copy)
    # the same frames of a task whose scene has another camera: the EEF is where nothing moves
    change_column(copy / "meta" / "tasks.parquet", "task", lambda cells: [KNOWN])
    change_column(copy / EPISODES, "tasks", lambda cells: [[KNOWN]] * len(cells))
    from formats.lerobot import LeRobotFolder

    unchecked = type("Unchecked", (LeRobotFolder,), {"check": lambda self: None})
    read = unchecked(copy)
    assert np.allclose(read.demos[0].E, agentview("table", SIZE)[1])
    assert (read.attributes["task_suite"], read.attributes["task_id"]) == ("libero_10", 8)


def test_a_scene_of_libero_pro_stays_what_it_is():
    """Its suites have other scenes under the same sentences: by the sentence alone it would be
    another scene, and its pictures be compared with that one's. What a sentence contradicts is not
    believed.
    """
    sentence = TASKS["libero_spatial"][3]
    says = lambda suite, index: placed_as_said({"task_suite": suite, "task_id": index}, sentence)
    assert says("libero_spatial", 3) and says("libero_spatial_swap", 3)
    assert says("libero_90", 3)  # whose sentences are not known here
    assert not (says("libero_spatial", 2) or says("libero_goal", 3) or says("libero_10", 3))


def test_a_support_is_said_beside_the_camera(folder, tmp_path):
    """For all episodes, for those of a task, or for one: the nearest counts. Without it the file's
    own task tells, and what is no height is refused.
    """
    copy = copied(folder, tmp_path)
    cameras = copy / "meta" / "cameras.json"
    supports = lambda: [demo.support for demo in open_dataset(copy).demos]
    said = json.loads(cameras.read_text())
    assert said.pop("support") == 0.9
    cameras.write_text(json.dumps(said))
    assert supports() == [0.9] * 4  # libero_spatial's
    one = {key: said[key] for key in ("intrinsics", "extrinsics")}
    change_json(cameras, support=0.7, episodes={"2": {**one, "support": 0.3}})
    assert supports() == [0.7, 0.7, 0.3, 0.7]
    change_json(cameras, tasks={"pick up the blob": {**one, "support": 0.5}})
    assert supports() == [0.5, 0.5, 0.3, 0.5]
    change_json(cameras, support="high")
    with pytest.raises(UserError, match="cameras.json.*support"):
        open_dataset(copy)


@pytest.mark.parametrize(
    "of_files, of_demo, supports",
    [
        ({"support": 0.7}, None, [0.7, 0.7, 0.9, 0.9]),
        ({"support": 0.7}, 0.3, [0.7, 0.3, 0.9, 0.9]),
        ({"task_suite": "mine"}, 0.3, [None, 0.3, 0.9, 0.9]),
        ({}, None, [0.9] * 4),
    ],
)
def test_supports_travel_too(synthetic_demos, tmp_path, of_files, of_demo, supports):
    """Two files of one dataset, the first with another support than its task's, or none known."""
    other = tmp_path / "other.hdf5"
    shutil.copy(synthetic_demos, other)
    with h5py.File(other, "r+") as file:
        file["data"].attrs.update(of_files)
        if of_demo is not None:
            file["data/demo_1"].attrs["support"] = of_demo
    out = tmp_path / "out"
    convert_demos.main([str(other), str(synthetic_demos), "--out", str(out)])
    n = len(open_dataset(synthetic_demos).demos)
    found = [demo.support for demo in open_dataset(out).demos]
    assert found[:2] + found[n : n + 2] == supports


def test_cameras_that_differ_travel_with_the_frames(synthetic_demos, tmp_path):
    """Each episode has its own camera, in meta/cameras.json and, without it, in every frame."""
    moved = tmp_path / "moved.hdf5"
    shutil.copy(synthetic_demos, moved)
    with h5py.File(moved, "r+") as file:
        E = file["data/demo_1/camera/agentview_extrinsics"][()]
        del file["data/demo_1/camera/agentview_extrinsics"]
        E[2, 3] += 0.01
        file["data/demo_1/camera/agentview_extrinsics"] = E
    out = tmp_path / "out"
    convert_demos.main([str(moved), "--out", str(out)])
    assert np.array_equal(open_dataset(out).demos[1].E, E)
    (out / "meta" / "cameras.json").unlink()
    cameras = [d.E for d in open_dataset(out).demos]
    assert np.allclose(cameras[1], E, atol=1e-6) and not np.allclose(cameras[0], cameras[1])


@pytest.mark.parametrize("stored", ["upright", "flipped", "rotated"])
def test_pictures_stored_otherwise_are_refused_and_named(folder, tmp_path, stored):
    """A dataset whose pictures are upright, upside down or turned is refused with the line that
    reads it; with that line it is read as it was.
    """
    copy = copied(folder, tmp_path)
    demos = {d.name: d.images(range(len(d))) for d in open_dataset(folder).demos}
    images = np.concatenate([pictures.upright(i, stored) for i in demos.values()])
    cell = lambda image: {"bytes": lerobot_writer._png(image), "path": None}
    change_column(copy / DATA, "observation.images.image", lambda _: [cell(i) for i in images])
    with pytest.raises(UserError, match=f'"image_orientation": "{stored}"'):
        open_dataset(copy)
    change_json(copy / "meta" / "cameras.json", image_orientation=stored)
    assert open_dataset(copy).fingerprint == open_dataset(folder).fingerprint


def test_pictures_of_other_episodes_are_refused(folder, tmp_path):
    """What moves in them does not go with the recorded EEF."""
    copy = copied(folder, tmp_path)
    change_column(copy / DATA, "observation.images.image", lambda cells: cells[::-1])
    with pytest.raises(UserError, match="does not go with|goes against"):
        open_dataset(copy)


def test_camera_of_another_place_is_refused(folder, tmp_path):
    """Moved by 25 cm to the side, it still sees the EEF, but not where the picture moves."""
    copy = copied(folder, tmp_path)
    said = json.loads((copy / "meta" / "cameras.json").read_text())
    said["extrinsics"][1][3] += 0.25
    change_json(copy / "meta" / "cameras.json", extrinsics=said["extrinsics"])
    with pytest.raises(UserError, match="near the recorded EEF.*another scene"):
        open_dataset(copy)


# -- faults of a folder ---------------------------------------------------------------------------

INFO, CAMERAS = "meta/info.json", "meta/cameras.json"
NUMBERS = ("observation.state", "action")


def damage(path):
    """Flip a byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def feature(copy, name, **values):
    """Change what meta/info.json says of a feature; with nothing to change it goes."""
    said = json.loads((copy / INFO).read_text())
    if values:
        said["features"][name].update(values)
    else:
        del said["features"][name]
    (copy / INFO).write_text(json.dumps(said))


def nan_state(cells):
    cells[60][2] = float("nan")
    return cells


FAULTS = {
    "no info": (lambda c: (c / INFO).unlink(), "info.json: missing"),
    "info is no json": (lambda c: (c / INFO).write_text("{"), "info.json"),
    "version": (lambda c: change_json(c / INFO, codebase_version="v1.6"), "codebase_version"),
    "fps": (lambda c: change_json(c / INFO, fps=0), "fps is 0"),
    "no data": (lambda c: (c / DATA).unlink(), "file is missing"),
    "half the data": (lambda c: truncate(c / DATA), "damaged"),
    "flipped byte": (lambda c: damage(c / DATA), "file-000.parquet"),
    "half the episodes": (lambda c: truncate(c / EPISODES), "damaged"),
    "no tasks": (lambda c: (c / "meta/tasks.parquet").unlink(), "tasks.parquet: file is missing"),
    "state of 7": (lambda c: feature(c, NUMBERS[0], shape=[7]), r"shape \[7\], \[8\] is expected"),
    "no action": (lambda c: feature(c, NUMBERS[1]), "'action' is missing"),
    "image shape": (
        lambda c: feature(c, "observation.images.image", shape=[64, 64]),
        r"\[height, width, 3\]",
    ),
    "other image size": (
        lambda c: feature(c, "observation.images.image", shape=[80, 80, 3]),
        "the image is 64x64|intrinsics",
    ),
    "NaN": (lambda c: change_column(c / DATA, NUMBERS[0], nan_state), r"NaN or Inf.*\(60, 2\)"),
    "column": (
        lambda c: change_column(c / DATA, NUMBERS[1], lambda _: None),
        "'action' is missing",
    ),
    "rows of 7": (
        lambda c: change_column(c / DATA, NUMBERS[0], lambda cells: [x[:7] for x in cells]),
        "rows of",
    ),
    "frames out of order": (
        lambda c: change_column(c / DATA, "frame_index", lambda cells: cells[::-1]),
        "frame_index",
    ),
    "lost rows": (
        lambda c: change_column(c / DATA, "episode_index", lambda cells: [0] * len(cells)),
        "has 160 rows",
    ),
    "no number of an episode": (
        lambda c: change_column(c / EPISODES, "episode_index", lambda cells: [None, *cells[1:]]),
        "file-000.parquet: row 0: key 'episode_index' is null",
    ),
    "numbers as text": (
        lambda c: change_column(c / EPISODES, "episode_index", lambda cells: [*map(str, cells)]),
        "key 'episode_index' is \"0\"",
    ),
    "a length as text": (
        lambda c: change_column(c / EPISODES, "length", lambda cells: [*map(str, cells)]),
        "key 'length' is",
    ),
    "tasks as text": (
        lambda c: change_column(c / EPISODES, "tasks", lambda cells: [x[0] for x in cells]),
        "key 'tasks' is",
    ),
    "tasks as numbers": (
        lambda c: change_column(c / EPISODES, "tasks", lambda cells: [[0] for _ in cells]),
        "key 'tasks' is",
    ),
    "a file by half a number": (
        lambda c: change_column(c / EPISODES, "data/file_index", lambda cells: [0.5] * len(cells)),
        "key 'data/file_index' is",
    ),
    "an episode twice": (
        lambda c: change_column(c / EPISODES, "episode_index", lambda cells: [0, 0, *cells[2:]]),
        "episode 0 is listed twice",
    ),
    "a task without number": (
        lambda c: change_column(c / "meta/tasks.parquet", "task_index", lambda cells: ["a"]),
        "tasks.parquet: ",
    ),
    "degrees": (
        lambda c: change_column(
            c / DATA,
            NUMBERS[0],
            lambda cells: [x[:3] + [57.3 * y for y in x[3:6]] + x[6:] for x in cells],
        ),
        "radians are expected",
    ),
    "millimetres": (
        lambda c: change_column(
            c / DATA, NUMBERS[0], lambda cells: [[1000 * y for y in x[:3]] + x[3:] for x in cells]
        ),
        "divide millimetres",
    ),
    "fingers in millimetres": (
        lambda c: change_column(
            c / DATA, NUMBERS[0], lambda cells: [x[:6] + [1000 * y for y in x[6:]] for x in cells]
        ),
        "state 6 and 7: fingers",
    ),
    "no image": (
        lambda c: change_column(
            c / DATA,
            "observation.images.image",
            lambda cells: [{"bytes": b"", "path": ""} for _ in cells],
        ),
        "holds no image",
    ),
    "orientation": (lambda c: change_json(c / CAMERAS, image_orientation="left"), "one of upright"),
    "camera's name": (lambda c: change_json(c / CAMERAS, camera="wrist"), "camera is 'wrist'"),
    "camera": (lambda c: change_json(c / CAMERAS, extrinsics=[[0.0] * 4] * 4), "cameras.json"),
    "half a camera": (lambda c: change_json(c / CAMERAS, extrinsics=[[1.0]]), "cameras.json"),
    "path outside": (
        lambda c: change_json(c / INFO, data_path="../{chunk_index}{file_index}.parquet"),
        "leads out of",
    ),
    "path of nothing": (lambda c: change_json(c / INFO, data_path="{x}"), "names no file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_one_sentence(folder, tmp_path, fault):
    """With file, key and remedy, before anything is trained."""
    copy = copied(folder, tmp_path)
    damaging, told = FAULTS[fault]
    damaging(copy)
    with pytest.raises(UserError, match=told) as error:
        open_dataset(copy).fingerprint  # noqa: B018, the first images are read for it
    assert "\n" not in str(error.value) and str(copy) in str(error.value)


@pytest.mark.parametrize("damaging", [lambda p: p.unlink(), truncate])
def test_a_missing_or_truncated_video_is_refused_at_once(video_folder, tmp_path, damaging):
    copy = copied(video_folder, tmp_path)
    damaging(copy / MP4)
    with pytest.raises(UserError, match="file-000.mp4"):
        open_dataset(copy)


def test_a_video_shorter_than_its_rows_is_refused(video_folder, tmp_path):
    """Rows without a picture would be trained on with another's."""
    copy = copied(video_folder, tmp_path)
    later = lambda cells: [c + 1 for c in cells]
    change_column(copy / EPISODES, "videos/observation.images.image/from_timestamp", later)
    with pytest.raises(UserError, match="has 160 frames, its episodes have 180"):
        open_dataset(copy)


def test_an_image_size_above_the_recordings_is_refused(folder):
    with pytest.raises(UserError, match=f"give --image_size {SIZE} or less"):
        open_dataset(folder, 2 * SIZE)
    # smaller is fine: the camera shrinks along
    demo = open_dataset(folder, SIZE // 2).demos[0]
    assert demo.images([0]).shape == (1, SIZE // 2, SIZE // 2, 3)
    assert abs(demo.K[0, 2] - SIZE / 4) < 1e-9


# -- faults of a conversion -----------------------------------------------------------------------


def test_frames_without_images_are_not_made_up(tmp_path, monkeypatch):
    """A file with an image of every second frame is refused with the command that renders all."""
    path = write_synthetic_demos(tmp_path / "sparse.hdf5", n_demos=1)
    with h5py.File(path, "r+") as file:
        demo = file["data/demo_0"]
        images = demo["obs/agentview_rgb"][::2]
        del demo["obs/agentview_rgb"]
        demo.create_dataset("obs/agentview_rgb", data=images)
        demo.attrs["frame_stride"] = 2
    with pytest.raises(UserError, match=r"every 2th frame|--replay .*--frame_stride 1"):
        convert_demos.main([str(path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp*"))


def test_what_this_program_did_not_write_is_left_alone(synthetic_demos, folder, tmp_path):
    """A folder is replaced only with --overwrite, and only one that was written here."""
    arguments = [str(synthetic_demos), "--out", str(tmp_path / "out")]
    shutil.copytree(folder, tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        convert_demos.main(arguments)
    convert_demos.main([*arguments, "--overwrite"])
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        convert_demos.main([*arguments, "--overwrite"])
    with pytest.raises(UserError, match="several files"):
        convert_demos.main([str(synthetic_demos), str(synthetic_demos)])
