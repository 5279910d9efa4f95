"""Recordings of a real robot: what was written is read back, and each fault of an episode is
named with its remedy.
"""

import shutil
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import pytest
from conftest import SIZE, STEPS, agentview, with_basis, write_synthetic_episodes
from helpers import put

from camera import project
from data_smith300_volume import VolumeDataset
from formats import smith300
from formats.dataset import open_dataset
from formats.smith300 import read_frames
from policy import PolicyConfig
from rot_utils import BASIS_FILE, euler_to_matrix, rotation_angle, rotvec_to_matrix
from runtime import UserError


@dataclass
class Config(PolicyConfig):
    n_window: int = 8
    rotation: str = "pca"
    basis: str = ""


CONFIG = Config(backbone="efficientnet_lite0", image_size=SIZE, n_window=8, waypoint_stride=2)


@pytest.fixture
def dataset(tmp_path):
    """A small valid dataset of two episodes for the tests to damage."""
    path = write_synthetic_episodes(tmp_path / "recordings", n_episodes=2, steps=30, size=32)
    add_states(path)
    return path


def add_states(path, steps=30):
    """Give the second episode simulator states (T,5), which the first one does not have."""
    file = path / "episode_00001" / "episode.npz"
    with np.load(file) as f:
        arrays = dict(f)
    np.savez(file, **arrays, states_t=np.arange(5.0 * steps).reshape(steps, 5))


def change(key, function):
    """A mutation of the second episode's episode.npz: key becomes function(value), or is
    removed where that is None.
    """

    def mutate(path):
        file = path / "episode_00001" / "episode.npz"
        with np.load(file) as f:
            arrays = dict(f)
        value = function(arrays.pop(key))
        np.savez(file, **({**arrays, key: value} if value is not None else arrays))

    return mutate


def cut(name, keep):
    def mutate(path):
        file = path / "episode_00001" / name
        file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])

    return mutate


def resize_one(path):
    from PIL import Image

    file = path / "episode_00001" / "frames" / "000003.png"
    Image.open(file).resize((32, 40)).save(file)


# what is wrong; words that the message must hold: the place, the key, the remedy
EPISODE = "episode_00001"
CASES = {
    "no arrays": (
        lambda p: (p / EPISODE / "episode.npz").unlink(),
        EPISODE,
        "episode.npz",
        "record",
    ),
    "truncated arrays": (cut("episode.npz", 0.6), EPISODE, "truncated", "record"),
    "empty arrays": (cut("episode.npz", 0), EPISODE, "truncated", "record"),
    "no position": (change("eef_pos_t", lambda v: None), EPISODE, "eef_pos_t", "record"),
    "no rotation": (change("eef_euler_t", lambda v: None), EPISODE, "eef_euler_t", "record"),
    "no gripper": (change("gripper_t", lambda v: None), EPISODE, "gripper_t", "record"),
    "no intrinsics": (change("intrinsics", lambda v: None), EPISODE, "intrinsics", "record"),
    "no extrinsics": (change("extrinsics", lambda v: None), EPISODE, "extrinsics", "record"),
    "NaN position": (change("eef_pos_t", put((4, 2), np.nan)), EPISODE, "eef_pos_t", "(4, 2)"),
    "Inf angle": (change("eef_euler_t", put((4, 2), np.inf)), EPISODE, "eef_euler_t", "(4, 2)"),
    "NaN camera": (change("extrinsics", put((0, 3), np.nan)), EPISODE, "extrinsics", "NaN"),
    "two coordinates": (change("eef_pos_t", lambda v: v[:, :2]), EPISODE, "eef_pos_t", "(T, 3)"),
    "gripper as a column": (change("gripper_t", lambda v: v[:, None]), EPISODE, "gripper_t", "(T)"),
    "scalar gripper": (change("gripper_t", lambda v: v[0]), EPISODE, "gripper_t", "(T)"),
    "states in a row": (change("states_t", lambda v: v[:, 0]), EPISODE, "states_t", "(T, S)"),
    "text": (
        change("eef_pos_t", lambda v: np.array(["a"] * len(v))),
        EPISODE,
        "eef_pos_t",
        "dtype",
    ),
    "short angles": (change("eef_euler_t", lambda v: v[:-3]), EPISODE, "eef_euler_t", "27 rows"),
    "short gripper": (change("gripper_t", lambda v: v[:-1]), EPISODE, "gripper_t", "29 rows"),
    "gripper in millimetres": (
        change("gripper_t", lambda v: 85 * v),
        EPISODE,
        "gripper_t",
        "rescale",
    ),
    "3x4 extrinsics": (change("extrinsics", lambda v: v[:3]), EPISODE, "extrinsics", "(4, 4)"),
    "stretched extrinsics": (
        change("extrinsics", lambda v: v * [[1.1], [1], [1], [1]]),
        EPISODE,
        "extrinsics",
        "orthonormal",
    ),
    "mirrored extrinsics": (
        change("extrinsics", lambda v: v * [-1, 1, 1, 1]),
        EPISODE,
        "extrinsics",
        "determinant 1",
    ),
    "intrinsics of another size": (
        change("intrinsics", lambda v: v * [[20], [20], [1]]),
        EPISODE,
        "intrinsics",
        "calibrate",
    ),
    "no frames": (lambda p: shutil.rmtree(p / EPISODE / "frames"), EPISODE, "frames", "record"),
    "a frame missing": (
        lambda p: (p / EPISODE / "frames" / "000007.png").unlink(),
        EPISODE,
        "29 frames",
        "30 rows",
    ),
    "frame cut in its header": (
        cut("frames/000007.png", 0.005),
        "000007.png",
        "truncated",
        "record",
    ),
    "frames of two sizes": (resize_one, EPISODE, "32x40", "record"),
    "frames and video": (
        lambda p: (p / EPISODE / "video.mp4").touch(),
        EPISODE,
        "video.mp4",
        "remove one",
    ),
    "zero episodes": (
        lambda p: [shutil.rmtree(e) for e in p.glob("episode_*")],
        "recordings",
        "zero episodes",
        "collect_demos.py",
    ),
    "foreign dataset": (
        lambda p: (p / "dataset.json").write_text('{"format": "other-2"}'),
        "dataset.json",
        "other-2",
        "convert",
    ),
    "cut dataset.json": (
        lambda p: (p / "dataset.json").write_text('{"format'),
        "dataset.json",
        "truncated",
        "remove",
    ),
    "no dataset": (shutil.rmtree, "recordings", "no such folder", "formats/smith300.py"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_episode_is_named_with_key_and_remedy(case, dataset):
    """One sentence names the episode, the key and the remedy, before anything is trained."""
    mutate, *words = CASES[case]
    mutate(dataset)
    with pytest.raises(UserError) as error:
        open_dataset(dataset)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message, message


def test_small_frames_are_refused(dataset):
    """Frames are scaled down and never up: a policy for 448 px would see blur."""
    with pytest.raises(UserError, match="--image_size 32"):
        open_dataset(dataset, 448)


def test_a_frame_damaged_inside_is_named(dataset):
    """A half-copied frame has a good header.

    It is found when it is decoded, and does not reach the policy as grey.
    """
    cut("frames/000007.png", 0.5)(dataset)
    with pytest.raises(UserError, match="000007.png: truncated"):
        read_frames(dataset / EPISODE, [6, 7], 32)


def test_a_written_episode_is_read_back(synthetic_episodes):
    """Positions, rotations, commands and camera are read as they were written, and labels see
    both gripper changes.
    """
    recordings = open_dataset(synthetic_episodes, SIZE)
    demos, attributes = recordings.demos, recordings.attributes
    assert [d.name for d in demos] == [f"episode_{i:05d}" for i in range(4)]
    assert attributes["task_suite"] == "libero_spatial"
    for demo in demos:
        with np.load(synthetic_episodes / demo.name / "episode.npz") as f:
            np.testing.assert_array_equal(demo.ee_pos, f["eef_pos_t"])
            assert (
                rotation_angle(
                    rotvec_to_matrix(demo.ee_ori), euler_to_matrix(f["eef_euler_t"])
                ).max()
                < 1e-6
            )
            np.testing.assert_array_equal(demo.actions[:, 6] > 0, f["gripper_t"] > 0.5)
        assert len(demo) == STEPS and np.abs(np.diff(demo.actions[:, 6])).sum() == 4
        np.testing.assert_allclose(demo.K, agentview()[0])
        assert np.abs(demo.gripper_states[demo.actions[:, 6] < 0]).sum(1).min() > 0.06
    assert len(open_dataset(synthetic_episodes, SIZE, 2).demos) == 2


@pytest.mark.parametrize("video, wide", [(False, 0), (False, 20), (True, 0), (True, 20)])
def test_the_eef_is_seen_where_the_camera_says(video, wide, tmp_path):
    """Frame t belongs to row t, and cropping to a square moves K along: the blob is at the
    EEF's pixel, in PNGs and in video.
    """
    path = write_synthetic_episodes(tmp_path / "recordings", n_episodes=1, video=video, wide=wide)
    demos = open_dataset(path, SIZE // 2).demos
    frames = [25, 3, 14]
    images = read_frames(path / demos[0].name, frames, SIZE // 2)
    assert images.shape == (3, SIZE // 2, SIZE // 2, 3) and images.dtype == np.uint8
    for image, frame in zip(images.astype(int), frames):
        red = np.argwhere(image[..., 0] - image[..., 1] > 90) + 0.5
        u, v, _ = project(demos[0].ee_pos[frame], demos[0].K, demos[0].E)
        assert len(red) and np.abs(red.mean(0) - [v, u]).max() < 1.5


def test_a_variable_rate_pairs_each_row_with_its_own_frame(tmp_path):
    """As phones and cameras of robots write videos: a player repeats frames and leaves some out."""
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=20)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
        times = np.cumsum([50, 12, 50, 200, 12, 12, 50, 150, 50, 12] * 2)
        for number, time in enumerate(times):
            gray = np.full((64, 64, 3), 10 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(gray, format="rgb24")
            frame.pts, frame.time_base = int(time), Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    assert smith300.frame_sizes(path)[0] == 20
    wanted = [3, 4, 7, 8, 13, 19]
    found = smith300.read_frames(tmp_path, wanted, 64)
    assert [round(image.mean() / 10) for image in found] == wanted


def test_a_damaged_video_is_named(tmp_path):
    """A video without its index, as after a crash of the recorder, is refused in one sentence."""
    path = write_synthetic_episodes(tmp_path / "recordings", n_episodes=1, video=True)
    file = path / "episode_00000" / "video.mp4"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match="video.mp4: truncated or no video"):
        open_dataset(path)


def test_an_episode_is_replaced_whole(tmp_path):
    """An episode may be written twice, as by a worker that outlived its parent.

    Then the second one is there, with no frame of the first.
    """
    arrays = {"eef_pos_t": np.zeros((3, 3))}
    for n in (5, 3):
        smith300.write_episode(
            tmp_path / "episode_00000", arrays, np.full((n, 8, 8, 3), n, np.uint8)
        )
    assert [p.name for p in tmp_path.iterdir()] == ["episode_00000"]
    images = read_frames(tmp_path / "episode_00000", range(3), 8)
    assert len(list((tmp_path / "episode_00000" / "frames").iterdir())) == 3 and (images == 3).all()


def test_a_failed_write_leaves_no_episode(tmp_path):
    """A kill during writing leaves no folder that looks like an episode."""
    with pytest.raises((TypeError, ValueError, AttributeError)):
        smith300.write_episode(
            tmp_path / "episode_00000", {"eef_pos_t": np.zeros((2, 3))}, ["no image"]
        )
    assert list(tmp_path.iterdir()) == []


# -- the dataset


def test_the_dataset_has_the_interface_of_the_others(synthetic_episodes, backbone, tmp_path):
    """Eight waypoints in metres with rotations and commands, the frame's own features, and
    statistics with the basis."""
    import torch

    path = synthetic_episodes
    demos = open_dataset(path, SIZE).demos
    dataset = VolumeDataset(demos, CONFIG, backbone, cache=tmp_path / "cache", progress=False)
    batch = dataset.batch([0, 5, 9])
    assert batch["target_pos"].shape == (3, 8, 3)
    assert batch["target_rot"].shape == (3, 8, 3, 3)
    assert batch["mask"].all()
    demo, frame = dataset.demos[dataset.demo[5]], dataset.frame[5]
    np.testing.assert_array_equal(batch["eef_pos"][1], demo.ee_pos[frame])
    live = backbone(torch.from_numpy(read_frames(path / demo.name, [frame], SIZE)))
    assert all(torch.equal(a[1], b[0]) for a, b in zip(batch["features"], live))
    statistics = dataset.statistics()
    assert statistics["rotation_basis"].ev_ratio[0] > 0.95
    assert statistics["height_range"][0] < statistics["height_range"][1]


def test_a_missing_basis_stops_before_the_features(dataset, backbone, tmp_path):
    """Without a basis the sentence says how to compute it, before time goes into features."""
    demos = open_dataset(dataset).demos
    with pytest.raises(UserError, match="precompute_rotation_pca.py"):
        VolumeDataset(demos, CONFIG, backbone, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_foreign_basis_stops(dataset, backbone, tmp_path):
    """A basis that was copied from other recordings is refused. The Euler head needs none."""
    other = with_basis(write_synthetic_episodes(tmp_path / "other", 2, 30, 32, seed=9))
    shutil.copy(other / BASIS_FILE, dataset / BASIS_FILE)
    demos = open_dataset(dataset).demos
    with pytest.raises(UserError, match="foreign basis, computed from other"):
        VolumeDataset(demos, CONFIG, backbone, cache=tmp_path / "cache")


def test_libero_files_are_read_too(synthetic_demos):
    """One call opens both formats: the path tells which it is."""
    recordings = open_dataset(synthetic_demos, SIZE)
    assert recordings.format == "libero" and len(recordings) == 4
    assert recordings.attributes["format"].startswith("para-libero")


def test_a_simulators_states_come_along(dataset):
    """A recording from the simulator keeps its states, which eval.py renders to check its protocol.

    A robot's has none.
    """
    demos = open_dataset(dataset).demos
    assert demos[0].states.size == 0 and len(demos[0].states) == 30
    np.testing.assert_array_equal(demos[1].states[2], [10, 11, 12, 13, 14])


def test_images_come_from_either_format(dataset, synthetic_demos):
    """One call reads a demonstration's frames in either format."""
    np.testing.assert_array_equal(
        open_dataset(dataset)[EPISODE].images([3]), read_frames(dataset / EPISODE, [3], 32)
    )
    assert open_dataset(synthetic_demos)["demo_1"].images([0, 5]).shape == (2, SIZE, SIZE, 3)
