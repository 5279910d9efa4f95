"""Several datasets trained on together: read, refused, split, drawn from, recorded."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from conftest import SENTENCES, SIZE, write_synthetic_episodes, write_task

import convert_demos
from data import WaypointDataset
from formats.demos import split_demos
from formats.mixture import open_mixture
from harness import checkpoint, trainer
from harness.reference import protocol_references
from policy import PolicyConfig
from runtime import UserError


@pytest.fixture(scope="module")
def lerobot(suite, tmp_path_factory):
    """The same demonstrations as one LeRobot dataset of three tasks."""
    out = tmp_path_factory.mktemp("lerobot") / "all"
    files = [str(suite / f"libero_spatial_{task}.hdf5") for task in SENTENCES]
    convert_demos.main([*files, "--out", str(out)])
    return out


def test_a_folder_is_its_files_in_the_order_of_their_numbers(suite):
    """A suite is named by one folder: file 10 comes after file 2, other files do not count, and
    files can be named one by one as well.
    """
    found = open_mixture([suite], SIZE)
    assert found.tasks == ["libero_spatial_0", "libero_spatial_2", "libero_spatial_10"]
    assert len(found.demos) == found.attributes["num_demos"] == 14
    assert {d.group: d.instruction for d in found.demos} == {
        f"libero_spatial_{task}": words for task, words in SENTENCES.items()
    }
    assert found.attributes["task_suite"] == "libero_spatial"
    assert not {"task_id", "language"} & found.attributes.keys()
    files = [suite / f"libero_spatial_{task}.hdf5" for task in (2, 0)]
    assert open_mixture(files, limit=3).tasks == ["libero_spatial_2", "libero_spatial_0"]
    assert len(open_mixture(files, limit=3).demos) == 6
    hashes = [part["hash"] for part in found.described()]
    assert len(set(hashes)) == 3
    assert [part["hash"] for part in open_mixture(files).described()] == [hashes[1], hashes[0]]


def test_demonstrations_that_a_folder_does_not_give_are_named(suite, tmp_path, capsys):
    """A suite of which one task is still being collected would be trained on as if it were whole.
    Either suffix of HDF5 is one.
    """
    folder = tmp_path / "suite"
    shutil.copytree(suite, folder)
    (folder / "libero_spatial_10.hdf5").rename(folder / "libero_spatial_10.h5")
    open_mixture([folder], SIZE)
    assert "left out" not in capsys.readouterr().err
    (folder / "libero_spatial_3.hdf5.parts").mkdir()
    write_synthetic_episodes(folder / "recorded", 1)
    assert len(open_mixture([folder], SIZE).tasks) == 3
    said = capsys.readouterr().err
    assert "libero_spatial_3.hdf5.parts, a collection that is not finished" in said
    assert "recorded, a smith300 folder: name it by itself" in said


def test_one_dataset_alone_stays_what_it_is(synthetic_demos):
    """What a single file says of itself reaches the checkpoint unchanged."""
    found = open_mixture([synthetic_demos])
    assert found.attributes is found.datasets[0].attributes and len(found.datasets) == 1


@pytest.mark.parametrize("order", [1, -1])
def test_the_task_s_own_view_goes_with_moved_cameras(order, suite, tmp_path):
    """Together they are of `cameras`; a setting whose conditions are another test's is refused."""
    plain, moved = suite / "libero_spatial_0.hdf5", write_task(tmp_path, 10, 2, setting="cameras")
    assert open_mixture([plain, moved][::order]).attributes["setting"] == "cameras"
    assert open_mixture([plain, suite / "libero_spatial_2.hdf5"]).attributes.get("setting") is None
    turned = write_task(tmp_path / "turned", 10, 2, setting="viewpoint")
    with pytest.raises(UserError, match="its setting is"):
        open_mixture([moved, turned][::order])


@pytest.mark.parametrize("name, value", [("render", "fast"), ("variant", "lift_once")])
def test_datasets_that_do_not_go_together_are_refused(name, value, suite, tmp_path):
    """Images drawn otherwise, or another variant: one sentence names both files and the key."""
    other = write_task(tmp_path, 10, 2, **{name: value})
    with pytest.raises(UserError, match=f"libero_spatial_10.hdf5: its {name} is {value}, that of"):
        open_mixture([suite / "libero_spatial_0.hdf5", other])


def test_a_dataset_that_is_given_twice_is_refused(suite):
    """It would be trained on twice as often, and copies of a held-out demonstration trained on."""
    with pytest.raises(UserError, match="holds the same demonstrations as"):
        open_mixture([suite, suite / "libero_spatial_0.hdf5"])


def test_a_dataset_and_its_conversion_are_refused(suite, lerobot):
    """A float's last bits differ, the demonstrations do not: one could be held out and the other
    trained on.
    """
    with pytest.raises(UserError, match="is demo_0 of .*libero_spatial_0.hdf5 in another format"):
        open_mixture([suite / "libero_spatial_0.hdf5", lerobot])


@pytest.mark.parametrize("name, value", [("part", "val"), ("render", "fast"), ("split", "outer")])
def test_what_one_dataset_says_once_is_not_lost_in_a_conversion(name, value, suite, tmp_path):
    """Validation conditions would be trained on, fast pictures be taken for exact ones."""
    other, out = write_task(tmp_path, 10, 2, **{name: value}), tmp_path / "out"
    files = [str(suite / "libero_spatial_0.hdf5"), str(other)]
    for order in (1, -1):
        with pytest.raises(UserError, match=f"libero_spatial_.*hdf5: its {name} is .*by itself"):
            convert_demos.main([*files[::order], "--out", str(out)])
    assert not out.exists()
    moved = write_task(tmp_path / "moved", 10, 2, setting="cameras")
    convert_demos.main([files[0], str(moved), "--out", str(out)])
    assert open_mixture([out]).attributes["setting"] == "cameras"


def test_images_of_other_frames_are_refused_before_any_feature(suite, tmp_path):
    """A file with every third image and a stride of two: said at once, not after minutes."""
    found = open_mixture([suite])
    found.demos[5].image_stride = 3
    with pytest.raises(UserError, match="--frame_stride 2: .*libero_spatial_2.* every 3. frame"):
        found.check_frames(2)
    found.check_frames(6)


@pytest.mark.parametrize("kind", ["suite", "lerobot"])
def test_every_task_holds_the_same_fraction_out(kind, request):
    """Split over all files at once, a task's demonstrations could all be trained on, or none.
    Of LeRobot's, whose tasks are in one dataset, likewise.
    """
    demos = open_mixture([request.getfixturevalue(kind)]).demos
    train, val = (Counter(d.group for d in part) for part in split_demos(demos, 0.25))
    names = [f"libero_spatial_{task}" for task in SENTENCES]
    if kind == "lerobot":  # these sentences are none of LIBERO's
        names = list(SENTENCES.values())
    assert [train[n] for n in names] == [3, 6, 1] and [val[n] for n in names] == [1, 2, 1]


def test_a_task_with_one_demonstration_is_refused(suite):
    """Its only demonstration would be held out, or none of it: the sentence names the task."""
    demos = open_mixture([suite]).demos[3:]
    with pytest.raises(UserError, match="1 demonstration of task 'libero_spatial_0': .*at least 2"):
        split_demos(demos)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 8])
def test_each_task_is_trained_on_as_often(batch_size):
    """Tasks with 5, 40 and 7 samples: every task gets as many samples as any other, every sample of
    a task as many as any other of it, and a step's samples follow from its number alone.
    """
    sizes = (5, 40, 7)
    groups = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    batches = trainer.BalancedBatches(3, groups, batch_size)
    picked = [batches[step] for step in range(840 // batch_size)]
    assert all(len(p) == batch_size for p in picked)
    for group in groups:
        times = Counter(i for i in np.concatenate(picked).tolist() if i in group)
        assert sum(times.values()) == 280
        assert set(times) == set(group.tolist())
        assert max(times.values()) - min(times.values()) <= 1
    again = trainer.BalancedBatches(3, groups, batch_size)
    for step in (41, 7, 80):
        np.testing.assert_array_equal(again[step], picked[step])
    other = trainer.BalancedBatches(4, groups, batch_size)
    assert any((other[step] != picked[step]).any() for step in range(9))


def test_one_task_is_drawn_from_as_before(synthetic_demos, backbone, tmp_path):
    """A training on one task keeps its samples, and so its weights, bit for bit."""
    config = PolicyConfig(backbone="efficientnet_lite0", image_size=SIZE)
    demos = open_mixture([synthetic_demos]).demos
    dataset = WaypointDataset(demos, config, backbone, cache=tmp_path, progress=False)
    batches = trainer.batches_of(5, dataset, 4)
    assert type(batches) is trainer.Batches
    order = np.random.default_rng([5, 0]).permutation(len(dataset))
    np.testing.assert_array_equal(batches[1], order[4:8])


def test_a_frame_of_each_task_is_kept_for_the_protocol(suite, synthetic_demos):
    """States of several tasks have the same length: each frame is known by its task. Of one task
    the names are those of older checkpoints.
    """
    names = {f"protocol_{part}" for part in ("state", "extrinsics", "image")}
    assert protocol_references(open_mixture([synthetic_demos]).demos).keys() == names
    found = protocol_references(open_mixture([suite]).demos)
    assert found.keys() == {f"{n}@libero_spatial_{task}" for n in names for task in SENTENCES}


def test_a_checkpoint_knows_its_tasks_and_datasets(told, suite):
    """The header names every task with its instruction and every dataset with its hash, bins span
    the heights of all of them, and the words of the instructions are learned.
    """
    path = told[0] / "checkpoint.safetensors"
    policy, info, _ = checkpoint.load_policy(path)
    mixture = open_mixture([suite])
    assert info["tasks"] == {f"libero_spatial_{task}": words for task, words in SENTENCES.items()}
    # the run trained on a copy of the folder
    named = lambda part: {k: v for k, v in part.items() if k != "path"}
    assert [named(p) for p in info["datasets"]] == [named(p) for p in mixture.described()]
    assert info["turned"].keys() == info["tasks"].keys()
    assert all(5 < degrees < 40 for degrees in info["turned"].values())
    assert info["config"]["text"] == info["resolved"]["text"] == "learned"
    assert "3 tasks, told by --text learned" in told[1].stdout
    assert info["train_demos"] == 11 and info["val_demos"] == 3
    heights = np.concatenate([d.ee_pos[:, 2] for d in split_demos(mixture.demos)[0]])
    low, high = policy.height_range.tolist()
    assert low < heights.min() and high > heights.max()
    config = json.loads((told[0] / "config.json").read_text())
    assert config["args"]["dataset"] == "data/libero_spatial" == config["resolved"]["dataset"]
