"""The demonstration format: errors name key and remedy, official files are turned upright,
splits are disjoint.
"""

import dataclasses
import re

import h5py
import numpy as np
import pytest
from conftest import OPENS, PUSHED, SIZE, STEPS, agentview, write_synthetic_demos
from helpers import put

from camera import project
from formats import demos, hdf5, libero_hdf5, parts
from formats.dataset import open_dataset
from rot_utils import rotvec_to_matrix
from runtime import UserError
from sim import settings

NAME = "bad.hdf5"


def write_bad(folder, mutate, **options):
    """A small file that is valid but for what `mutate(file)` changes."""
    path = write_synthetic_demos(folder / NAME, n_demos=2, steps=STEPS, size=16, **options)
    with h5py.File(path, "r+") as file:
        mutate(file)
    return path


def replace(key, change, demo="demo_1"):
    """A mutation that replaces one array of one demo by `change(array)`."""

    def mutate(file):
        group = file["data"][demo]
        value = group[key][()]
        del group[key]
        group[key] = change(value)

    return mutate


def delete(key):
    def mutate(file):
        del file[key]

    return mutate


def no_demos(file):
    for name in list(file["data"]):
        del file["data"][name]


def mirrored(E):
    E[:3, 0] *= -1  # still orthonormal, determinant -1
    return E


COLLECT, REPLAY = "collect_demos.py", "--replay"
# what is wrong, what the message must say besides the file's name: the key, the remedy
CASES = {
    "no data": (delete("data"), "data", COLLECT),
    "zero demos": (no_demos, "zero demonstrations", COLLECT),
    "actions missing": (delete("data/demo_1/actions"), "data/demo_1/actions", COLLECT),
    "states missing": (delete("data/demo_1/states"), "data/demo_1/states", COLLECT),
    "ee_pos missing": (delete("data/demo_1/obs/ee_pos"), "data/demo_1/obs/ee_pos", COLLECT),
    "no observations": (delete("data/demo_1/obs"), "data/demo_1/obs", COLLECT),
    "images missing": (
        delete(f"data/demo_1/{libero_hdf5.IMAGE}"),
        f"data/demo_1/{libero_hdf5.IMAGE}",
        COLLECT,
    ),
    "NaN action": (
        replace("actions", put((3, 2), np.nan)),
        "data/demo_1/actions",
        "drop this demo",
    ),
    "Inf action": (
        replace("actions", put((3, 2), np.inf)),
        "data/demo_1/actions",
        "drop this demo",
    ),
    "NaN position": (
        replace("obs/ee_pos", put((0, 0), np.nan)),
        "data/demo_1/obs/ee_pos",
        "drop this demo",
    ),
    "Inf position": (
        replace("obs/ee_pos", put((0, 0), -np.inf)),
        "data/demo_1/obs/ee_pos",
        "drop this demo",
    ),
    "NaN state": (replace("states", put((5, 1), np.nan)), "data/demo_1/states", "drop this demo"),
    "action shape": (replace("actions", lambda x: x[:, :6]), "data/demo_1/actions", COLLECT),
    "text for numbers": (
        replace("actions", lambda x: [b"a"] * len(x)),
        "data/demo_1/actions",
        COLLECT,
    ),
    "float images": (
        replace(libero_hdf5.IMAGE, lambda x: x / 255),
        f"data/demo_1/{libero_hdf5.IMAGE}",
        COLLECT,
    ),
    "grey images": (
        replace(libero_hdf5.IMAGE, lambda x: x[..., :1]),
        f"data/demo_1/{libero_hdf5.IMAGE}",
        COLLECT,
    ),
    "oblong images": (
        replace(libero_hdf5.IMAGE, lambda x: x[:, :8]),
        f"data/demo_1/{libero_hdf5.IMAGE}",
        COLLECT,
    ),
    "too few images": (
        replace(libero_hdf5.IMAGE, lambda x: x[:-1]),
        f"data/demo_1/{libero_hdf5.IMAGE}",
        COLLECT,
    ),
    "too few states": (replace("states", lambda x: x[:-3]), "data/demo_1/states", COLLECT),
    "too few positions": (
        replace("obs/ee_pos", lambda x: x[:-3]),
        "data/demo_1/obs/ee_pos",
        COLLECT,
    ),
    "too few pushed flags": (
        replace("perturbed", lambda x: x[:-3]),
        "data/demo_1/perturbed",
        COLLECT,
    ),
    "no camera": (delete("data/demo_1/camera"), "data/demo_1/camera", REPLAY),
    "no extrinsics": (
        delete(f"data/demo_1/{libero_hdf5.CAMERA_E}"),
        f"data/demo_1/{libero_hdf5.CAMERA_E}",
        REPLAY,
    ),
    "NaN camera": (
        replace(libero_hdf5.CAMERA_E, put((0, 3), np.nan)),
        f"data/demo_1/{libero_hdf5.CAMERA_E}",
        "",
    ),
    "stretched extrinsics": (
        replace(libero_hdf5.CAMERA_E, lambda E: E * [[1.1], [1], [1], [1]]),
        f"data/demo_1/{libero_hdf5.CAMERA_E}",
        REPLAY,
    ),
    "mirrored extrinsics": (
        replace(libero_hdf5.CAMERA_E, mirrored),
        f"data/demo_1/{libero_hdf5.CAMERA_E}",
        REPLAY,
    ),
    "3x4 extrinsics": (
        replace(libero_hdf5.CAMERA_E, lambda E: E[:3]),
        f"data/demo_1/{libero_hdf5.CAMERA_E}",
        REPLAY,
    ),
    "zero focal length": (
        replace(libero_hdf5.CAMERA_K, put((0, 0), 0.0)),
        f"data/demo_1/{libero_hdf5.CAMERA_K}",
        REPLAY,
    ),
    "one step": (
        lambda file: [
            replace(key, lambda x: x[:1])(file)
            for key in (*libero_hdf5.LOW_DIM, "states", "perturbed", libero_hdf5.IMAGE)
        ],
        "data/demo_1",
        COLLECT,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_file_is_named_with_key_and_remedy(case, tmp_path):
    """One sentence names the file, the key and the remedy, instead of a traceback hours into a
    run.
    """
    mutate, key, remedy = CASES[case]
    with pytest.raises(UserError) as error:
        open_dataset(write_bad(tmp_path, mutate))
    message = str(error.value)
    assert NAME in message and key in message and remedy in message, message
    assert "\n" not in message


def test_image_size_is_compared_with_the_one_asked_for(tmp_path):
    """Images of another size are refused with the command that renders them at the right one."""
    path = write_bad(tmp_path, lambda file: None)
    with pytest.raises(UserError, match=re.escape("--image_size 448")) as error:
        open_dataset(path, image_size=448)
    assert NAME in str(error.value)
    assert libero_hdf5.IMAGE in str(error.value)
    assert "16 px" in str(error.value)
    assert open_dataset(path, image_size=16).demos[0].image_size == 16


def thinned(path, stride=3):
    """Keep only the images of every `stride`-th frame of a file's first demonstration, and
    record this in the file.
    """
    with h5py.File(path, "a") as file:
        group = file["data/demo_0"]
        images = group[libero_hdf5.IMAGE][::stride]
        del group[libero_hdf5.IMAGE]
        group[libero_hdf5.IMAGE], group.attrs["frame_stride"] = images, stride
    return path


def test_images_of_every_third_frame_are_found_by_their_frame(tmp_path):
    """A file that stores only the images that training reads gives the same picture for the
    same frame.
    """
    path = write_synthetic_demos(tmp_path / NAME, n_demos=2, size=16)
    whole = open_dataset(path)["demo_0"].images([0, 9, 6])
    demo = open_dataset(thinned(path))["demo_0"]
    np.testing.assert_array_equal(demo.images([0, 9, 6]), whole)
    with pytest.raises(UserError, match="none of frame 7; give --frame_stride 3 or a multiple"):
        demo.images([6, 7])


@pytest.mark.parametrize("stride", [2, 0, "three"])
def test_a_frame_stride_that_the_images_do_not_have_is_named(stride, tmp_path):
    """A stored frame_stride that does not fit the stored images is refused: images would go to
    wrong frames.
    """
    path = thinned(write_synthetic_demos(tmp_path / NAME, n_demos=2, size=16))
    with h5py.File(path, "a") as file:
        file["data/demo_0"].attrs["frame_stride"] = stride
    with pytest.raises(UserError, match="frame_stride") as error:
        open_dataset(path)
    assert NAME in str(error.value) and COLLECT in str(error.value)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.97])
def test_a_truncated_file_is_named(keep, tmp_path):
    """A half-copied file is called truncated, wherever it ends."""
    path = write_synthetic_demos(tmp_path / NAME, n_demos=2, size=16)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(UserError, match="truncated or not an HDF5 file") as error:
        open_dataset(path)
    assert NAME in str(error.value) and COLLECT in str(error.value)


def test_a_missing_file_and_one_that_is_no_hdf5_are_named(tmp_path):
    """A wrong path and a file of another kind are told apart, and each has its remedy."""
    with pytest.raises(UserError, match="no such file") as error:
        open_dataset(tmp_path / NAME)
    assert NAME in str(error.value) and COLLECT in str(error.value)
    (tmp_path / "bad.txt").write_text("hello, this is no dataset\n" * 100)
    with pytest.raises(UserError, match="not an HDF5 file") as error:
        open_dataset(tmp_path / "bad.txt")
    assert "bad.txt" in str(error.value) and COLLECT in str(error.value)


def test_a_damaged_image_chunk_is_named(tmp_path):
    """A flipped bit inside an image is found when the image is read, and does not reach the
    policy.
    """
    path = write_synthetic_demos(tmp_path / NAME, n_demos=2, size=16)
    with h5py.File(path) as file:
        chunk = file["data/demo_0"][libero_hdf5.IMAGE].id.get_chunk_info(7)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\xff" * chunk.size
    path.write_bytes(content)
    demo = open_dataset(path)["demo_0"]
    with pytest.raises(UserError, match="damaged") as error:
        demo.images([6, 7])
    assert NAME in str(error.value)
    assert libero_hdf5.IMAGE in str(error.value)
    assert COLLECT in str(error.value)


# Structures of HDF5 files without a checksum of their own: indices of arrays and of groups, and
# the heaps of their names and of text.
UNCHECKED = (b"TREE", b"SNOD", b"HEAP", b"GCOL")


def collected(folder, names=("demo_0", "demo_1")):
    """A file as collect_demos.py makes it: one part per demonstration, then joined."""
    source = write_synthetic_demos(folder / "source.hdf5", n_demos=len(names), size=16)
    paths = [folder / f"{name}.hdf5" for name in names]
    with h5py.File(source) as file:
        for name, path in zip(names, paths):
            with hdf5.create(path) as part:
                file.copy(file["data"][name], part, "demo")
        attributes = dict(file["data"].attrs)
    out = folder / "collected.hdf5"
    parts.merge(paths, out, {**attributes, "language": "pick up the blob"}, {"bad_resets": 0})
    return out


def test_a_flipped_byte_of_a_header_is_refused(tmp_path):
    """In a collected file every header, index and text has a checksum.

    In h5py's default layout damaged ones may read as zeros, without an error.
    """
    path = collected(tmp_path)
    content = path.read_bytes()
    assert content.count(b"OHDR") > 20 and not [s for s in UNCHECKED if s in content]
    at = [content.index(word) for word in (b"agentview_rgb", b"ee_pos", b"pick up the blob")]
    at += [i + 20 for i in range(len(content)) if content[i : i + 4] == b"FADB"]
    assert len(at) > 3
    for place in at:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match="collected.hdf5"):
            open_dataset(path).demos[0].images([0])
    path.write_bytes(content)
    found = open_dataset(path)
    assert len(found) == 2 and found.attributes["language"] == "pick up the blob"


def test_a_demonstration_knows_its_task_and_what_was_asked_for(synthetic_demos, tmp_path):
    """Of this repository's files, of LIBERO's own, whose text is inside a JSON, and of none."""
    known = open_dataset(synthetic_demos).demos[0]
    assert (known.task, known.instruction) == ("libero_spatial_0", "pick up the blob")
    path = write_synthetic_demos(tmp_path / "official.hdf5", n_demos=1, size=16)
    for said, words in (('{"language_instruction": "put it back"}', "put it back"), ("{", "")):
        with h5py.File(path, "a") as file:
            for name in ("language", "task_suite", "problem_info"):
                file["data"].attrs.pop(name, None)
            hdf5.set_attributes(file["data"], {"problem_info": said})
        demo = open_dataset(path).demos[0]
        assert (demo.task, demo.instruction) == ("", words)


def test_a_damaged_index_of_an_array_is_named(tmp_path):
    """Other and older files have indices without a checksum.

    Where one is damaged, rows would read as zeros.
    """
    sound, path = write_synthetic_demos(tmp_path / "new.hdf5", n_demos=1, size=16), tmp_path / NAME
    with h5py.File(sound) as source, h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update(source["data"].attrs)
        group, old = data.create_group("demo_0"), source["data/demo_0"]
        arrays = []
        old.visititems(lambda key, node: arrays.append(key) if hasattr(node, "shape") else None)
        rows = {key: old[key][()] for key in arrays if key != libero_hdf5.IMAGE}
        libero_hdf5.write_demo(group, {**rows, "attrs": {}}, old[libero_hdf5.IMAGE][()])
    content, expected = path.read_bytes(), open_dataset(sound).demos[0]
    # an index begins with TREE, its type 1 and its level; its first part's place is 32 bytes on
    nodes = [i for i in range(len(content)) if content[i : i + 6] == b"TREE\x01\x00"]
    refused = []
    for node in nodes:
        damaged = bytearray(content)
        damaged[node + 32] ^= 120
        path.write_bytes(damaged)
        try:
            found = open_dataset(path).demos[0]
        except UserError as error:
            refused.append(str(error))
            continue
        for key in ("actions", "ee_pos", "ee_ori", "gripper_states", "states", "K", "E"):
            np.testing.assert_array_equal(getattr(found, key), getattr(expected, key))
    assert len(refused) > 6 and all("are lost" in message for message in refused), refused


def test_a_valid_file_is_read_back(synthetic_demos):
    """What was written is read: names in numerical order, lengths, pushes, attributes and
    camera.
    """
    recordings = open_dataset(synthetic_demos, image_size=SIZE)
    read, attributes = recordings.demos, recordings.attributes
    assert [d.name for d in read] == [f"demo_{i}" for i in range(4)]
    assert attributes["format"] == libero_hdf5.FORMAT and read[0].attrs["source"] == "synthetic"
    for i, demo in enumerate(read):
        assert len(demo) == STEPS and demo.image_size == SIZE
        assert np.flatnonzero(demo.perturbed).tolist() == (list(PUSHED) if i % 2 == 0 else [])
        assert demo.actions[OPENS - 1, 6] == 1 and demo.actions[OPENS, 6] == -1
        np.testing.assert_array_equal(demo.K, agentview()[0])
    assert len(open_dataset(synthetic_demos, limit=3).demos) == 3


def test_demos_come_in_numerical_order(tmp_path):
    """demo_10 follows demo_9, not demo_1: the split by position must not depend on the alphabet."""
    path = write_bad(
        tmp_path, lambda file: [file["data"].move(f"demo_{i}", f"demo_{10 - i}") for i in (0, 1)]
    )
    with libero_hdf5.open_demos(path) as file:
        assert libero_hdf5.demo_names(file) == ["demo_9", "demo_10"]


def test_file_without_pushes_is_undisturbed(tmp_path):
    """Official files record no pushes, so all their frames count as undisturbed."""

    def official(file):
        del file["data"].attrs["format"], file["data"].attrs["image_orientation"]
        for i in (0, 1):
            delete(f"data/demo_{i}/perturbed")(file)

    read = open_dataset(write_bad(tmp_path, official)).demos
    assert not read[0].perturbed.any() and read[0].perturbed.shape == (STEPS,)


@pytest.mark.parametrize("orientation", ["upright", "flipped", None])
def test_flipped_images_are_turned_over_on_reading(orientation, tmp_path, synthetic_demos):
    """Official files store rows bottom first and do not say so.

    Images are upright once read: the blob is at the EEF.
    """
    path = write_synthetic_demos(tmp_path / "official.hdf5", orientation=orientation or "flipped")
    with h5py.File(path, "r+") as file:
        if orientation is None:  # nor do they have this repository's format
            for name in ("image_orientation", "format"):
                del file["data"].attrs[name]
    demo = open_dataset(path)["demo_0"]
    images = demo.images([0, 25])
    np.testing.assert_array_equal(images, open_dataset(synthetic_demos)["demo_0"].images([0, 25]))
    assert images.flags.c_contiguous and images.dtype == np.uint8
    for image, frame in zip(images, (0, 25)):
        u, v, _ = project(demo.ee_pos[frame], demo.K, demo.E)
        assert tuple(image[int(v), int(u)]) == (230, 30, 40)


class Numbered(int):
    """A demonstration that is nothing but its number."""

    request = "", ""

    @property
    def states(self):
        return np.full((2, 9), float(self))


@pytest.mark.parametrize("n", [2, 3, 7, 20, 48])
@pytest.mark.parametrize("fraction", [0.05, 0.15, 0.5])
def test_no_demo_is_in_both_parts_of_a_split(n, fraction):
    """No demonstration is in both parts and none is lost.

    Both parts have at least one, and the split is always the same.
    """
    numbered = [Numbered(i) for i in range(n)]
    train, val = demos.split_demos(numbered, fraction)
    assert not set(train) & set(val) and sorted(train + val) == list(range(n))
    assert train and val
    assert (train, val) == demos.split_demos(numbered, fraction)
    assert n < 20 or abs(len(val) / n - fraction) < 0.06


def test_a_replay_without_states_is_held_out_with_its_recording(tmp_path):
    """LeRobot has no states, and a replay's positions are half a millimetre off; its actions are
    the recording's.
    """
    path = write_synthetic_demos(tmp_path / "d.hdf5", 6)
    own = [dataclasses.replace(d, states=np.zeros((len(d), 0))) for d in open_dataset(path).demos]
    moved = [dataclasses.replace(d, ee_pos=d.ee_pos + 0.0005) for d in own]
    train, val = demos.split_demos([*own, *moved[::-1]], 1 / 3)
    assert len(train) == 8 and len(val) == 4
    assert sorted(d.name for d in val) == sorted(2 * sorted({d.name for d in val}))


def test_a_split_of_one_demo_is_refused():
    """One demonstration cannot be split, and the message says how many are needed."""
    with pytest.raises(UserError, match="at least 2"):
        demos.split_demos([Numbered(0)])


def test_a_mirrored_demonstration_is_the_same_geometry_left_to_right(tmp_path):
    """Every position is seen at the mirrored pixel.

    Camera and rotations stay right-handed, the closing direction is reflected with them, and the
    images are those pixels. Two mirrors cancel.
    """
    path = write_synthetic_demos(tmp_path / NAME, n_demos=1, size=32)
    demo = open_dataset(path).demos[0]
    demo.E[:3, 3] += [0.0, 0.07, 0.0]  # off the plane
    other = demos.mirrored(demo)
    libero_hdf5.check_camera(other.K, other.E, "mirrored")
    (u, v, d), (mu, mv, md) = (project(x.ee_pos, x.K, x.E) for x in (demo, other))
    np.testing.assert_allclose(mu, 32 - u, atol=1e-9)
    np.testing.assert_allclose([mv, md], [v, d], atol=1e-9)
    flip = np.diag([1.0, -1, 1])
    np.testing.assert_allclose(
        rotvec_to_matrix(other.ee_ori), flip @ rotvec_to_matrix(demo.ee_ori) @ flip, atol=1e-9
    )
    np.testing.assert_array_equal(other.actions[:, 1], -demo.actions[:, 1])
    np.testing.assert_array_equal(other.actions[:, [0, 2, 6]], demo.actions[:, [0, 2, 6]])
    np.testing.assert_array_equal(other.images([0, 5]), demo.images([0, 5])[:, :, ::-1])
    twice = demos.mirrored(other)
    np.testing.assert_array_equal(twice.images([0, 5]), demo.images([0, 5]))
    assert twice.key == demo.key != other.key
    for key in ("ee_pos", "ee_ori", "actions", "K", "E"):
        np.testing.assert_allclose(getattr(twice, key), getattr(demo, key), atol=1e-12)


def test_a_demonstration_turned_back_shows_the_same_through_another_camera(tmp_path):
    """Every position keeps its pixel, depth and height.

    Rotations and commands stay the same relative to the camera. A camera that is higher or steeper
    is refused.
    """
    path = write_synthetic_demos(tmp_path / NAME, n_demos=1, size=32)
    demo = open_dataset(path).demos[0]
    target = settings.turned(demo.E, 25, [-0.66, 0.1])
    other = demos.turned_back(demo, target)
    np.testing.assert_array_equal(other.E, target)
    np.testing.assert_allclose(
        project(other.ee_pos, other.K, other.E), project(demo.ee_pos, demo.K, demo.E), atol=1e-9
    )
    np.testing.assert_allclose(other.ee_pos[:, 2], demo.ee_pos[:, 2], atol=1e-9)
    seen = lambda d, vectors: vectors @ d.E[:3, :3]
    for part in (slice(0, 3), slice(3, 6)):
        np.testing.assert_allclose(
            seen(other, other.actions[:, part]), seen(demo, demo.actions[:, part]), atol=1e-9
        )
    np.testing.assert_allclose(
        other.E[:3, :3].T @ rotvec_to_matrix(other.ee_ori),
        demo.E[:3, :3].T @ rotvec_to_matrix(demo.ee_ori),
        atol=1e-9,
    )
    np.testing.assert_array_equal(other.actions[:, 6], demo.actions[:, 6])
    assert np.abs(other.ee_pos - demo.ee_pos)[:, :2].max() > 0.05
    with pytest.raises(UserError, match="leave --turn_back out"):
        demos.turned_back(demo, settings.orbit(settings.default_camera()[1], 20, 0))


def test_turn_back_undoes_the_turn_of_a_camera_that_was_orbited_too(tmp_path):
    """The recipe orbits a camera, puts it as by hand, then turns it: the world goes back by the
    turn alone.
    """
    path = write_synthetic_demos(tmp_path / NAME, n_demos=1, size=32)
    demo = open_dataset(path).demos[0]
    hand = {"roll": 4.0, "pan": -2.0, "tilt": 1.0, "distance": 1.1}
    orbited = settings.loosened(settings.orbit(settings.default_camera()[1], 8, 30), **hand)
    attrs = {"theta": 8.0, "phi": 30.0, **hand}
    turned = dataclasses.replace(demo, E=settings.turned(orbited, 35, [-0.66, 0.0]), attrs=attrs)
    back = demos.turned_back(turned, settings.unturned(turned.attrs))
    np.testing.assert_allclose(back.E, orbited, atol=1e-9)
    # about the robot's base, against the turn
    at = settings.turned(np.eye(4), -35, [-0.66, 0.0])
    np.testing.assert_allclose(back.ee_pos, demo.ee_pos @ at[:3, :3].T + at[:3, 3], atol=1e-9)
