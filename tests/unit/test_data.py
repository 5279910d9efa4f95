"""Labels and samples: where the EEF will be, clipped at gripper changes, without frames that
are pushed or held.
"""

import shutil
from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import CLOSES, OPENS, PUSHED, SIZE, STEPS, write_synthetic_demos

import camera
import formats.dataset
from data import WaypointDataset, gripper_segments, shifted_sideways, waypoint_labels
from data_ar import WindowDataset
from formats.dataset import open_dataset
from formats.demos import GRIPPER_STEPS, Demo, mirrored
from formats.interface import Demonstrations
from model import ParaConfig
from model_autoregressive import AutoregressiveConfig
from rot_utils import rotation_angle, rotvec_to_matrix
from runtime import UserError

CONFIG = ParaConfig(backbone="efficientnet_lite0", image_size=SIZE, waypoint_stride=5, n_window=3)


class Track(SimpleNamespace):
    """The part of a Demo that labels are made from."""

    def __len__(self):
        return len(self.actions)


def track(commands, pushed=()):
    actions = np.zeros((len(commands), 7))
    actions[:, 6] = commands
    perturbed = np.zeros(len(commands), bool)
    perturbed[list(pushed)] = True
    ee_pos = np.zeros((len(commands), 3))
    # always on its way, so that only the last frame stands still
    ee_pos[:, 0] = 0.02 * np.arange(len(commands))
    return Track(actions=actions, perturbed=perturbed, ee_pos=ee_pos)


OPEN_CLOSE = [-1] * 6 + [1] * 14  # closes at frame 6, held until frame 15


@pytest.fixture(scope="module")
def dataset(synthetic_demos, backbone, tmp_path_factory):
    return WaypointDataset(
        open_dataset(synthetic_demos).demos,
        CONFIG,
        backbone,
        cache=tmp_path_factory.mktemp("cache"),
        progress=False,
    )


def test_gripper_commands_become_segments_and_changes():
    """The change frame is the first with the new command."""
    closed, changes = gripper_segments(track([*OPEN_CLOSE, -1, -1]).actions)
    assert changes.tolist() == [6, 20]
    assert closed.tolist() == [0] * 6 + [1] * 14 + [0, 0]


@pytest.mark.parametrize(
    "stride, frame, expected",
    [
        (1, 0, [1, 2, 3]),
        (2, 0, [2, 4, 6]),
        (2, 1, [3, 5, 6]),
        (5, 0, [5, 6, 6]),
        (5, 4, [6, 6, 6]),
        (3, 6, [6, 6, 6]),
        (3, 7, [10, 13, 16]),
        (5, 7, [12, 17, 19]),
        (5, 19, [19, 19, 19]),
    ],
)
def test_targets_are_clipped_at_the_gripper_change_and_at_the_end(stride, frame, expected):
    """A waypoint lies neither beyond the next gripper change (the robot would cut the grasp) nor
    beyond the end."""
    target, _, _, _ = waypoint_labels(track(OPEN_CLOSE), stride, 3)
    assert target[frame].tolist() == expected


def test_gripper_label_is_the_command_at_the_waypoint():
    """Before the change waypoints say open.

    The waypoint at the change, and the change frame itself, say close.
    """
    _, gripper, _, _ = waypoint_labels(track(OPEN_CLOSE), 2, 3)
    assert gripper[0].tolist() == [0, 0, 1]  # waypoints 2, 4, 6
    assert gripper[3].tolist() == [0, 1, 1]  # waypoints 5, 6, 6
    assert gripper[6].tolist() == [1, 1, 1]
    assert gripper[10].tolist() == [1, 1, 1]


def test_held_frames_are_left_out():
    """While the gripper moves the image stays the same, and the command is already given.

    Of a hold only the change frame trains.
    """
    *_, usable = waypoint_labels(track(OPEN_CLOSE), 5, 3)
    held = range(7, 6 + GRIPPER_STEPS)
    assert np.flatnonzero(~usable).tolist() == [*held, 19]


def test_frames_that_stand_still_are_left_out():
    """A label "stay" without a gripper change ahead teaches a fixed point.

    With a change ahead it is the grasp itself.
    """
    demo = track([-1] * 8 + [1] * 22)
    demo.ee_pos[4:9] = demo.ee_pos[8]  # waits for the grasp
    demo.ee_pos[20:] = demo.ee_pos[20]  # waits for nothing
    *_, usable = waypoint_labels(demo, 2, 3)
    assert usable[6:9].all() and not usable[4] and not usable[20:].any() and usable[18]


def test_the_retreat_is_left_out_unless_asked_for():
    """From frames after the last release a policy without memory would learn the approach
    backwards. A demonstration that ends closed has no retreat.
    """
    commands = [-1] * 5 + [1] * 20 + [-1] * 25
    *_, usable = waypoint_labels(track(commands), 5, 3)
    *_, whole = waypoint_labels(track(commands), 5, 3, retreat=True)
    assert usable[25] and not usable[26:].any() and whole[35:49].all()
    *_, closed = waypoint_labels(track(OPEN_CLOSE), 5, 3)
    assert closed[16:19].all()


def test_staying_at_the_end_is_trained_where_it_is_an_answer():
    """With `stay` the frames after the release are trained on.

    Where the path leads nowhere any more, the label lies `stride` steps later, and the EEF stays.
    All earlier frames, and all frames without the flag, keep their labels.
    """
    demo = track([-1] * 5 + [1] * 20 + [-1] * 35)
    demo.ee_pos[40:] = demo.ee_pos[40]  # 15 steps of retreat, then it stays
    target, gripper, _, usable = waypoint_labels(demo, 5, 3, min_travel=0.05, stay=True)
    plain, _, _, without = waypoint_labels(demo, 5, 3, min_travel=0.05)
    retreat = waypoint_labels(demo, 5, 3, min_travel=0.05, retreat=True)[3]
    first = 38  # 4 cm before it stays: nowhere on the rest of the path is it 5 cm away
    assert (target[first:, 0] == np.minimum(np.arange(first, 60) + 5, 59)).all()
    assert not gripper[first:].any()
    assert usable[35:].all() and not without[26:].any() and not retreat[40:].any()
    np.testing.assert_array_equal(target[:first, 0], plain[:first, 0])
    np.testing.assert_array_equal(usable[:26], without[:26])


def test_pushed_ways_are_masked():
    """A waypoint reached over a pushed frame does not answer the image.

    Waypoints before the push still do.
    """
    demo = track([-1] * 12, pushed=[4, 5])
    target, _, mask, usable = waypoint_labels(demo, 2, 3)
    assert target[0].tolist() == [2, 4, 6] and mask[0].tolist() == [True, True, False]
    assert target[2].tolist() == [4, 6, 8] and mask[2].tolist() == [True, False, False]
    assert mask[3].tolist() == [False, False, False]
    assert mask[6].tolist() == [True, True, True]  # the push is over
    assert np.flatnonzero(~usable).tolist() == [3, 4, 5, 11]


@pytest.mark.parametrize("seed", range(5))
def test_labels_equal_those_of_a_plain_loop(seed):
    """For any pattern of changes and pushes the vectorised labels equal those of a
    frame-by-frame loop over their definition.
    """
    rng = np.random.default_rng(seed)
    length, stride, n_window = 60, int(rng.integers(1, 7)), 4
    demo = track(np.repeat(rng.choice([-1, 1], 6), 10), pushed=rng.integers(0, length, 8))
    target, gripper, mask, usable = waypoint_labels(demo, stride, n_window)
    command = demo.actions[:, 6] > 0
    changes = [t for t in range(1, length) if command[t] != command[t - 1]]
    for i in range(length):
        end = next((t for t in changes if t >= i), length - 1)
        for k in range(n_window):
            t = min(i + (k + 1) * stride, end)
            assert target[i, k] == t and gripper[i, k] == command[t]
            assert mask[i, k] == (not demo.perturbed[i : max(t, i + 1)].any())
        held = any(t < i < t + GRIPPER_STEPS for t in changes)
        still = target[i, 0] == i and i not in changes
        retreat = changes and not command[changes[-1]] and i > changes[-1]
        assert usable[i] == (mask[i, 0] and not held and not still and not retreat)


def test_a_single_stretch_has_no_label_beyond_the_end():
    """Without a gripper change the last frame is the end."""
    target, _, mask, usable = waypoint_labels(track([-1] * 5), 2, 6)
    assert target.max() == 4 and mask.all() and usable[:4].all() and not usable[4]


# -- samples


def test_dataset_holds_the_usable_frames(dataset):
    """Every usable frame of every demo is a sample, and no other."""
    for d, demo in enumerate(dataset.demos):
        # up to the release, holds left out
        expected = set(range(OPENS + 1)) - set(range(CLOSES + 1, CLOSES + 10))
        if demo.perturbed.any():  # the first waypoint, 5 steps on, is reached over a push
            expected -= set(range(max(0, PUSHED[0] - 4), PUSHED[1] + 1))
        assert set(dataset.frame[dataset.demo == d]) == expected


def test_batch_has_the_documented_shapes_and_types(dataset):
    """The batch is as policy.py's docstring says: metres in float64, masks in {0, 1}, features
    in float16.
    """
    batch = dataset.batch([0, 5, len(dataset) - 1, 2])
    B, T = 4, CONFIG.n_window
    expected = {
        "eef_pos": ((B, 3), torch.float64),
        "gripper_width": ((B,), torch.float64),
        "K": ((B, 3, 3), torch.float64),
        "E": ((B, 4, 4), torch.float64),
        "target_pos": ((B, T, 3), torch.float64),
        "target_rot": ((B, T, 3, 3), torch.float64),
        "target_gripper": ((B, T), torch.int64),
        "mask": ((B, T), torch.float32),
    }
    assert set(batch) == {"features", *expected}
    for key, (shape, dtype) in expected.items():
        assert tuple(batch[key].shape) == shape and batch[key].dtype == dtype, key
    grids = zip(dataset.backbone.channels, dataset.backbone.grids)
    assert [tuple(m.shape) for m in batch["features"]] == [(B, c, g, g) for c, g in grids]
    assert all(m.dtype == torch.float16 for m in batch["features"])
    assert all(set(batch[key].unique().tolist()) <= {0, 1} for key in ("target_gripper", "mask"))
    assert {k: tuple(v.shape) for k, v in dataset[3].items() if k != "features"}["target_pos"] == (
        1,
        T,
        3,
    )


def test_samples_carry_their_own_frame(dataset):
    """Position, targets, rotation and features of a sample belong to its demonstration and frame.

    None is shifted by one.
    """
    everything = dataset.batch(np.arange(len(dataset)))
    for index, (d, frame) in enumerate(zip(dataset.demo, dataset.frame)):
        demo = dataset.demos[d]
        ahead = waypoint_labels(demo, CONFIG.waypoint_stride, CONFIG.n_window)[0][frame]
        np.testing.assert_array_equal(everything["eef_pos"][index], demo.ee_pos[frame])
        np.testing.assert_array_equal(everything["target_pos"][index], demo.ee_pos[ahead])
        turn = rotation_angle(
            everything["target_rot"][index].numpy(), rotvec_to_matrix(demo.ee_ori[ahead])
        )
        assert turn.max() < 1e-6
    for index in (0, 9, len(dataset) // 2, len(dataset) - 1):
        demo, frame = dataset.demos[dataset.demo[index]], dataset.frame[index]
        batch = dataset.batch([index])
        live = dataset.backbone(torch.from_numpy(demo.images([frame])))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(batch["features"], live))


@pytest.fixture(scope="module")
def windows(dataset, tmp_path_factory):
    return WindowDataset(
        dataset.demos,
        AutoregressiveConfig(image_size=SIZE, context=3),
        dataset.backbone,
        cache=tmp_path_factory.mktemp("cache"),
        progress=False,
    )


@pytest.mark.parametrize("kind", ["dataset", "windows"])
def test_images_moved_sideways_are_the_same_geometry(kind, request):
    """Feature columns and projected pixels move by the same number of cells, so cells, heights
    and rays keep their meaning. No label leaves the image, the limit holds, shifts differ, and
    the given batch does not change.
    """
    dataset, limit = request.getfixturevalue(kind), 40
    before = dataset.batch(np.arange(0, len(dataset), 2))
    draws = np.random.default_rng(0).random(len(before["K"]))
    kept = {"K": before["K"].clone(), "features": [m.clone() for m in before["features"]]}
    after = shifted_sideways(before, limit, draws, SIZE)
    assert torch.equal(before["K"], kept["K"])
    assert all(map(torch.equal, before["features"], kept["features"]))
    lead = lambda x, n: x.reshape(len(before["K"]), -1, *x.shape[-n:])
    moved, found = [], set()
    for key in ("eef_pos", "target_pos"):
        points = lead(before[key], 1)
        old, new = (
            camera.project(points, lead(b["K"], 2)[:, :1], lead(b["E"], 2)[:, :1])
            for b in (before, after)
        )
        assert torch.equal(old[1], new[1]) and (new[0] >= 0).all() and (new[0] <= SIZE).all()
        moved.append(new[0] - old[0])
    moved = torch.cat(moved, 1)
    assert torch.allclose(moved, moved[:, :1], atol=1e-9) and moved.abs().max() <= limit
    for sample, pixels in enumerate(moved[:, 0].tolist()):
        for old, new in zip(before["features"], after["features"]):
            width = old.shape[-1]
            columns = round(pixels * width / SIZE)
            assert abs(columns - pixels * width / SIZE) < 1e-6
            source = np.clip(np.arange(width) - columns, 0, width - 1)
            np.testing.assert_array_equal(new[sample], old[sample][..., source])
            found.add(columns)
    assert min(found) < 0 < max(found)
    again = shifted_sideways(before, limit, draws, SIZE)
    assert torch.equal(again["K"], after["K"])
    assert torch.equal(shifted_sideways(before, 0, draws, SIZE)["K"], before["K"])


def test_demonstrations_of_one_name_keep_their_own_features(backbone, tmp_path):
    """Two files both have a demo_0.

    Features stored by name would be those of the last file, and with one path for all
    demonstrations its images would be used for both.
    """
    files = [write_synthetic_demos(tmp_path / f"{seed}.hdf5", 1, seed=seed) for seed in (1, 2)]
    first, second = (open_dataset(path).demos[0] for path in files)
    assert first.name == second.name and first.key != second.key
    second.perturbed[20:] = True  # so that it has fewer usable frames
    made = lambda demos: WaypointDataset(demos, CONFIG, backbone, cache=tmp_path, progress=False)
    both, alone = made([first, second]), [made([first]), made([second])]
    assert len(both) == len(alone[0]) + len(alone[1]) and len(alone[0]) != len(alone[1])
    for maps, *of_each in zip(*(d.features(np.arange(len(d))) for d in (both, *alone))):
        assert torch.equal(maps, torch.cat(of_each))
        assert not torch.equal(of_each[0][:1], of_each[1][:1])


@pytest.mark.parametrize("kind", ["dataset", "windows"])
def test_features_kept_on_a_device_are_the_same(kind, request):
    """Features kept in memory, as on a GPU, give the batches of features read from files one by
    one, padding included.
    """
    dataset = request.getfixturevalue(kind)
    kept, indices = copy(dataset), np.arange(0, len(dataset), 3)
    kept.keep_on("cpu")
    before, after = dataset.batch(indices), kept.batch(indices)
    assert before.keys() == after.keys() and kept.resident and not dataset.resident
    for key, value in before.items():
        assert (
            all(map(torch.equal, value, after[key]))
            if isinstance(value, list)
            else torch.equal(value, after[key])
        ), key
    assert not dataset.hold("cpu")  # where files in the system's memory do as well


def test_frame_stride_thins_the_frames(dataset, tmp_path):
    """frame_stride k keeps the usable frames whose number is a multiple of k."""
    thin = WaypointDataset(dataset.demos, CONFIG, dataset.backbone, 3, tmp_path, progress=False)
    pairs = [(d, f) for d, f in zip(dataset.demo, dataset.frame) if f % 3 == 0]
    assert list(zip(thin.demo, thin.frame)) == pairs


def test_window_and_stride_come_from_the_config(dataset, tmp_path):
    """A longer window lengthens every target; the first waypoint stays the same."""
    config = replace(CONFIG, n_window=6)
    longer = WaypointDataset(dataset.demos, config, dataset.backbone, 1, tmp_path, progress=False)
    longer = longer.batch([0, 1])
    assert longer["target_pos"].shape == (2, 6, 3)
    assert torch.equal(longer["target_pos"][:, :3], dataset.batch([0, 1])["target_pos"])


def test_statistics_span_the_data(dataset):
    """The ranges hold every height and every unwrapped Euler angle.

    Roll crosses +-pi and must not span a whole turn.
    """
    statistics = dataset.statistics()
    heights = np.concatenate([d.ee_pos[:, 2] for d in dataset.demos])
    assert tuple(statistics["height_range"]) == (heights.min(), heights.max())
    low, high = statistics["euler_range"].T
    assert (high - low < 1.5).all() and high[0] - low[0] > 0.05
    assert low[0] < np.pi < high[0] or low[0] < -np.pi < high[0]
    for (mean, std), channels in zip(statistics["features"], dataset.backbone.channels):
        assert mean.shape == std.shape == (channels,)
        assert np.isfinite(mean).all()
        assert (std > 0).all()


def test_a_wholly_pushed_demo_is_survived(tmp_path, backbone):
    """A demonstration without a usable frame gives no sample and does not stop the others."""
    path = write_synthetic_demos(tmp_path / "pushed.hdf5", n_demos=2)
    read = open_dataset(path).demos
    read[0].perturbed[:] = True
    # no gripper change, whose frame would be usable; the last one is, but it is odd
    read[0].actions[:, 6] = -1
    dataset = WaypointDataset(read, CONFIG, backbone, 2, tmp_path / "cache", progress=False)
    assert set(dataset.demo) == {1}


def test_no_usable_frame_at_all_is_a_user_error(tmp_path, backbone):
    """Data that leaves nothing to train on is refused in one sentence, without an unpacking
    error.
    """
    path = write_synthetic_demos(tmp_path / "pushed.hdf5", n_demos=1)
    read = open_dataset(path).demos
    read[0].perturbed[:], read[0].actions[:, 6] = True, -1
    with pytest.raises(UserError, match="pushed.hdf5"):
        WaypointDataset(read, CONFIG, backbone, 2, tmp_path / "cache", progress=False)


class NpzFile(Demonstrations):
    """A format made for the test: one .npz with the numbers of one demonstration and its images."""

    format = "npz"

    @staticmethod
    def accepts(path):
        return path.suffix == ".npz"

    def read(self, image_size, limit):
        with np.load(self.path) as file:
            rows = {key: file[key] for key in file.files if key != "images"}
            size = file["images"].shape[1]
        return [Demo("only", **rows, image_size=size, attrs={})], {"language": "pick it up"}

    def images(self, demo, frames):
        with np.load(self.path) as file:
            return file["images"][frames]


def test_a_new_format_is_a_class_and_a_line(synthetic_demos, backbone, tmp_path, monkeypatch):
    """A new format needs the interface and no other change.

    It is trained on beside another format, frame by frame and mirrored.
    """
    known = open_dataset(synthetic_demos).demos[0]
    names = ["actions", "ee_pos", "ee_ori", "gripper_states", "states", "perturbed", "K", "E"]
    path = tmp_path / "recorded.npz"
    images = known.images(range(len(known)))
    np.savez(path, images=images, **{name: getattr(known, name) for name in names})
    monkeypatch.setattr(formats.dataset, "FORMATS", (NpzFile, *formats.dataset.FORMATS))

    recorded = open_dataset(path)
    demo = recorded["only"]
    assert (recorded.format, recorded.image_size, recorded.frames) == ("npz", SIZE, {"only": STEPS})
    assert recorded.attributes == {"language": "pick it up"} and demo.key != known.key
    np.testing.assert_array_equal(mirrored(demo).images([7, 3]), images[[7, 3], :, ::-1])

    both = WaypointDataset([known, demo], CONFIG, backbone, cache=tmp_path / "c", progress=False)
    half = len(both) // 2
    first, second = both.batch(np.arange(half)), both.batch(np.arange(half, 2 * half))
    assert all(map(torch.equal, first["features"], second["features"]))
    assert torch.equal(first["target_pos"], second["target_pos"])


def test_a_dataset_is_known_by_what_it_holds(synthetic_demos, tmp_path):
    """A copy has the same fingerprint.

    Other numbers, or the same numbers before another scene, have another: otherwise their features
    would be mixed up.
    """
    print_of = lambda path: open_dataset(path).fingerprint
    copied, other, repainted = (tmp_path / f"{name}.hdf5" for name in ("copy", "other", "paint"))
    shutil.copy(synthetic_demos, copied)
    shutil.copy(synthetic_demos, other)
    shutil.copy(synthetic_demos, repainted)
    with h5py.File(other, "r+") as file:
        file["data/demo_1/obs/ee_pos"][3] += 1e-6
    with h5py.File(repainted, "r+") as file:
        file["data/demo_1/obs/agentview_rgb"][0] //= 2
    assert print_of(copied) == print_of(synthetic_demos)
    assert len({print_of(path) for path in (synthetic_demos, other, repainted)}) == 3
