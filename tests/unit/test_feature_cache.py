"""Features on disk: exactly the live numbers, computed once, and never those of other pictures."""

import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import SIZE, write_synthetic_demos, write_synthetic_episodes
from test_backbone import pictures

import convert_demos
from data import WaypointDataset
from formats import stamp
from formats.dataset import open_dataset
from formats.demos import Demo, mirrored
from model import ParaConfig
from nets.feature_cache import Group, cached_features, feature_cache, images_key

CONFIG = ParaConfig(backbone="efficientnet_lite0", image_size=SIZE, waypoint_stride=5, n_window=3)


class Counting:
    """A backbone that counts how often it is run."""

    def __init__(self, backbone):
        self.backbone, self.calls = backbone, 0
        self.name, self.channels, self.identity = (
            backbone.name,
            backbone.channels,
            backbone.identity,
        )
        self.device = backbone.device

    def __call__(self, images):
        self.calls += 1
        return self.backbone(images)


def test_cached_features_equal_live_ones_and_are_read_the_second_time(backbone, tmp_path):
    """Training sees exactly the numbers that the robot will see, and computes them once."""
    counting, images = Counting(backbone), pictures()
    first = cached_features(counting, images, tmp_path)
    assert counting.calls == len(images)  # one by one on a CPU, as a policy sees them
    live = [
        torch.cat(m)
        for m in zip(*(backbone(torch.from_numpy(images[i : i + 1])) for i in range(len(images))))
    ]
    for cached, now in zip(first, live):
        assert cached.dtype == np.float16 and torch.equal(torch.from_numpy(np.array(cached)), now)
    second = cached_features(counting, images, tmp_path)
    assert counting.calls == len(images)
    assert all(np.array_equal(a, b) for a, b in zip(first, second))


def test_one_pixel_makes_another_cache_entry(backbone, tmp_path):
    """Other images never get an old entry, however small the difference."""
    counting, images = Counting(backbone), pictures(2)
    cached_features(counting, images, tmp_path)
    images[1, 3, 4, 2] ^= 1
    cached_features(counting, images, tmp_path)
    assert counting.calls == 4 and len(list(tmp_path.rglob("*.npy"))) == 2 * len(backbone.channels)


def test_another_backbone_makes_another_cache_entry(backbone, tmp_path):
    """Another backbone's entry is never used."""
    counting, other, images = Counting(backbone), Counting(backbone), pictures(2)
    other.identity += "-other"
    cached_features(counting, images, tmp_path)
    cached_features(other, images, tmp_path)
    assert (counting.calls, other.calls) == (2, 2)


def test_a_killed_computation_leaves_no_entry(backbone, tmp_path):
    """Features are on disk wholly or not at all."""

    def dies(images):
        if dies.calls:
            raise KeyboardInterrupt
        dies.calls += 1
        return backbone(images)

    dies.calls, dies.channels, dies.identity, dies.device = (
        0,
        backbone.channels,
        backbone.identity,
        backbone.device,
    )
    with pytest.raises(KeyboardInterrupt):
        cached_features(dies, pictures(), tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_features_come_back_under_their_demos_name(backbone, tmp_path):
    """Many demos: each name gets its own images' features."""
    a, b = pictures(2, seed=1), pictures(3, seed=2)
    maps = feature_cache(
        backbone, [Group("a", lambda: a), Group("b", lambda: b)], tmp_path, progress=False
    )
    assert [len(maps["a"][0]), len(maps["b"][0])] == [2, 3]
    np.testing.assert_array_equal(maps["b"][1], cached_features(backbone, b, tmp_path)[1])


def test_equal_demos_do_not_race(backbone, tmp_path):
    """The same images under several names (a demo stored twice) share one entry, also when threads
    write it at once."""
    for seed in range(5):
        images = pictures(1, seed=seed)
        wanted = [Group(name, lambda images=images: images) for name in "abcd"]
        maps = feature_cache(backbone, wanted, tmp_path, progress=False)
        assert all(np.array_equal(maps[name][0], maps["a"][0]) for name in "bcd")


# -- the index: features of pictures that are not read again


class Colours:
    """A backbone that answers at once: its one map is the mean of four by four pixels. Counts the
    images that it sees.
    """

    name, channels, identity, device = "colours", [3], "colours", torch.device("cpu")
    seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return [torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2).float(), 4).half()]


@pytest.fixture
def settled(monkeypatch):
    """Files are trusted from the moment on at which they were written."""
    monkeypatch.setattr(stamp, "SETTLED", 0)


@pytest.fixture
def read(monkeypatch):
    """Frames of demonstrations whose images are read, [(name, frames)], as they are read."""
    found, images = [], Demo.images

    def counted(demo, frames):
        found.append((demo.name, len(frames)))
        return images(demo, frames)

    monkeypatch.setattr(Demo, "images", counted)
    return found


def features(path, cache, backbone=None, change=lambda demo: demo):
    """Map (N,3,H,W) of all of a dataset's samples, as a training at `path` gets it."""
    demos = [change(demo) for demo in open_dataset(path).demos]
    backbone = backbone or Colours()
    dataset = WaypointDataset(demos, CONFIG, backbone, cache=cache, progress=False)
    return dataset.features(np.arange(len(dataset)))[0]


def write_folder(path):
    return write_synthetic_episodes(path, 2)


def write_video_folder(path):
    return write_synthetic_episodes(path, 2, video=True)


def write_file(path):
    return write_synthetic_demos(path.with_suffix(".hdf5"), 2)


def write_lerobot(path, *flags):
    source = write_synthetic_demos(path.with_suffix(".hdf5"), 2)
    convert_demos.main([str(source), "--out", str(path), *flags])
    return path


FORMATS = {
    "libero": write_file,
    "smith300": write_folder,
    "smith300-video": write_video_folder,
    "lerobot": write_lerobot,
    "lerobot-video": lambda path: write_lerobot(path, "--video"),
}


@pytest.mark.parametrize("form", FORMATS)
def test_a_warm_start_reads_no_images(form, settled, read, tmp_path):
    """Of every format: the second training on the same files reads no more pictures than opening
    them does, and has the same features."""
    path, backbone = FORMATS[form](tmp_path / "data"), Colours()
    open_dataset(path)
    opened = len(read)  # LeRobot's are compared with the recorded movements
    first = features(path, tmp_path / "cache", backbone)
    computed, began = backbone.seen, len(read)
    again = features(path, tmp_path / "cache", backbone)
    assert began == 2 * opened + 2 and len(read) == began + opened
    assert backbone.seen == computed > 0 and torch.equal(first, again)


def repaint_file(path, frame):
    with h5py.File(path, "r+") as file:
        # stored in chunks of a frame: with as many bytes as before
        images = file["data/demo_1/obs/agentview_rgb"]
        images[frame] = 255 - images[frame]


def test_a_changed_image_gives_new_features(settled, tmp_path):
    """One picture of a file is painted over, the file's fingerprint, its size and the time of its
    change stay: features are those of the new picture, as without a cache.
    """
    path, cache = tmp_path / "d.hdf5", tmp_path / "cache"
    write_synthetic_demos(path, 2)
    with h5py.File(path, "r+") as file:  # uncompressed, so that its size stays
        for demo in file["data"].values():
            images = demo["obs/agentview_rgb"][()]
            del demo["obs/agentview_rgb"]
            demo["obs"].create_dataset("agentview_rgb", data=images, chunks=(1, SIZE, SIZE, 3))
    before, old, print_ = path.stat(), features(path, cache), open_dataset(path).fingerprint
    repaint_file(path, 2)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert open_dataset(path).fingerprint == print_
    new = features(path, cache)
    assert torch.equal(new, features(path, tmp_path / "empty")) and not torch.equal(new, old)


def test_a_changed_frame_of_a_folder_gives_new_features(settled, read, tmp_path):
    """Of a folder's episodes, those with a frame that was replaced, or under another number, are
    read again, and no other."""
    path, cache = write_folder(tmp_path / "data"), tmp_path / "cache"
    old, frames = features(path, cache), path / "episode_00001" / "frames"
    shutil.copy(frames / "000004.png", frames / "000006.png")
    del read[:]
    assert not torch.equal(features(path, cache), old)
    assert [name for name, _ in read] == ["episode_00001"]
    # the same files, two frames in each other's place
    for a, b in (("000004", "x"), ("000008", "000004"), ("x", "000008")):
        (frames / f"{a}.png").rename(frames / f"{b}.png")
    assert torch.equal(features(path, cache), features(path, tmp_path / "empty"))


def test_images_in_another_file_are_read_each_time(settled, tmp_path):
    """A file may link to another that holds its pictures: a change there does not show in it."""
    path, cache = write_file(tmp_path / "d"), tmp_path / "cache"
    shutil.copy(path, tmp_path / "pictures.hdf5")
    with h5py.File(path, "r+") as file:
        del file["data/demo_1/obs/agentview_rgb"]
        there = h5py.ExternalLink("pictures.hdf5", "data/demo_1/obs/agentview_rgb")
        file["data/demo_1/obs/agentview_rgb"] = there
    demos = open_dataset(path).demos
    assert [demo.source.files(demo) for demo in demos] == [[path], None]
    old = features(path, cache)
    repaint_file(tmp_path / "pictures.hdf5", 2)
    new = features(path, cache)
    assert torch.equal(new, features(path, tmp_path / "empty")) and not torch.equal(new, old)


def test_mirrored_and_other_frames_are_other_images(settled, tmp_path):
    """What is asked of a file is part of its stamp: left and right, frames, and the size to which
    they are scaled."""
    path = write_folder(tmp_path / "data")
    demo, small = open_dataset(path).demos[0], open_dataset(path, SIZE // 2).demos[0]
    made = [(demo, [0, 2]), (demo, [2, 0]), (mirrored(demo), [0, 2]), (small, [0, 2])]
    assert len({stamp.images_stamp(*each) for each in made}) == 4
    features(path, tmp_path / "cache")
    turned = features(path, tmp_path / "cache", change=mirrored)
    assert torch.equal(turned, features(path, tmp_path / "empty", change=mirrored))


def test_a_copy_shares_features(settled, read, tmp_path):
    """A dataset under another name is read once, and nothing is computed for it."""
    path, backbone = write_file(tmp_path / "d"), Colours()
    first = features(path, tmp_path / "cache", backbone)
    computed = backbone.seen
    shutil.copy2(path, tmp_path / "copy.hdf5")
    assert torch.equal(features(tmp_path / "copy.hdf5", tmp_path / "cache", backbone), first)
    assert backbone.seen == computed and len(read) == 4
    features(tmp_path / "copy.hdf5", tmp_path / "cache", backbone)
    assert len(read) == 4


def test_a_file_that_was_just_written_is_not_trusted(read, tmp_path):
    """A second change within one tick of the file system's clock would leave no trace."""
    path = write_file(tmp_path / "d")
    for _ in range(2):
        features(path, tmp_path / "cache")
    assert len(read) == 4 and not (tmp_path / "cache" / "index").exists()


@pytest.mark.parametrize("damage", [b"", b"0" * 24, b"\xff" * 26, b"0" * 24 + b" 7\n"])
def test_a_damaged_index_is_not_believed(damage, settled, tmp_path):
    """Whatever a kill or a full disk left of an entry: the pictures are read, and it is mended."""
    path, cache = write_file(tmp_path / "d"), tmp_path / "cache"
    first = features(path, cache)
    entries = {entry: entry.read_bytes() for entry in (cache / "index").iterdir()}
    for entry in entries:
        entry.write_bytes(damage)
    assert len(entries) == 2 and torch.equal(features(path, cache), first)
    assert {entry: entry.read_bytes() for entry in (cache / "index").iterdir()} == entries


def test_a_kill_while_the_index_is_written_leaves_it_usable(settled, read, tmp_path, monkeypatch):
    """No half entry is ever there; the same command goes on."""
    path, cache = write_file(tmp_path / "d"), tmp_path / "cache"

    def killed(scratch, target):
        if Path(target).parent.name == "index":
            raise KeyboardInterrupt
        return replace(scratch, target)

    replace = os.replace
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        features(path, cache)
    assert not list((cache / "index").iterdir())
    first = features(path, cache)
    del read[:]
    assert torch.equal(features(path, cache), first) and not read


def test_features_that_were_removed_are_computed_again(settled, tmp_path):
    """The index alone is no feature: a cache that somebody has cleared is filled."""
    path, cache = write_file(tmp_path / "d"), tmp_path / "cache"
    first = features(path, cache)
    shutil.rmtree(cache / "colours")
    assert torch.equal(features(path, cache), first)


def test_images_that_change_while_they_are_read_are_not_indexed(tmp_path):
    """The stamp is taken before and after: between them the file was written to."""
    stamps, images = iter("abbb"), pictures(2)
    group = Group("demo", lambda: images, lambda: next(stamps))
    for entries in (0, 1):
        feature_cache(Colours(), [group], tmp_path, progress=False)
        assert len(list(tmp_path.glob("index/*"))) == entries
    assert images_key(images) in next(tmp_path.glob("index/*")).read_text()


def test_a_cache_that_cannot_be_written_serves(settled, tmp_path):
    """Features of a shared, read-only folder need no index."""
    path, cache = write_file(tmp_path / "d"), tmp_path / "cache"
    first = features(path, cache)
    shutil.rmtree(cache / "index")
    # in root's tests a mode stops nobody, a file in the folder's place does
    (cache / "index").write_text("")
    assert torch.equal(features(path, cache), first)
