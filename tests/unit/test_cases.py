"""Small inputs of tests/cases, each valid but for one thing.

Every reader refuses its input in one sentence with file, key and remedy.
"""

import io
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import write_synthetic_demos, write_synthetic_episodes
from helpers import ROOT
from PIL import Image

import convert_demos
import deploy_dino_kv
import rot_utils
import runtime
from figures import plots
from formats import libero_hdf5, smith300
from formats.dataset import open_dataset
from harness import checkpoint, records
from runtime import UserError
from sim import rollout

CASES = ROOT / "tests" / "cases"


def refused(call, *words):
    """Call, expect a UserError of one line that holds all the words -> its text."""
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


# -- HDF5


def replaced(key, make):
    """A damage: `make(group, key, old value)` writes a replacement of data/demo_0/KEY."""

    def change(file):
        group = file["data/demo_0"]
        value = group[key][()]
        del group[key]
        make(group, key, value)

    return change


def data_is_dataset(file):
    del file["data"]
    file["data"] = np.zeros(3)


H5 = {
    "a group for an array": (
        replaced("actions", lambda g, k, v: g.create_group(k)),
        "data/demo_0/actions",
        "is no array",
    ),
    "an array for a group": (data_is_dataset, "data", "is no group"),
    "a dangling link": (
        replaced(
            "obs/ee_pos", lambda g, k, v: g.__setitem__(k, h5py.ExternalLink("none.hdf5", "/x"))
        ),
        "obs/ee_pos",
    ),
    "no rows": (
        replaced("states", lambda g, k, v: g.__setitem__(k, 1.0)),
        "data/demo_0/states",
        "shape ()",
    ),
    "no data space": (
        replaced("states", lambda g, k, v: g.__setitem__(k, h5py.Empty("f8"))),
        "data/demo_0/states",
        "no data space",
    ),
    "more rows than the file": (
        replaced("states", lambda g, k, v: g.create_dataset(k, (10**10, 3), "f8")),
        "states",
        "are in the file",
    ),
    "images never written": (
        replaced(
            libero_hdf5.IMAGE,
            lambda g, k, v: g.create_dataset(k, v.shape, "u1", chunks=(1, *v.shape[1:])),
        ),
        libero_hdf5.IMAGE,
        "are in the file",
    ),
    "some images never written": (
        replaced(
            libero_hdf5.IMAGE,
            lambda g, k, v: g.create_dataset(
                k, v.shape, "u1", chunks=(1, *v.shape[1:])
            ).__setitem__(0, v[0]),
        ),
        libero_hdf5.IMAGE,
        "never written",
    ),
    "positions as whole numbers": (
        replaced("obs/ee_pos", lambda g, k, v: g.__setitem__(k, v.astype(int))),
        "obs/ee_pos",
        "int64",
    ),
    "positions in millimetres": (
        replaced("obs/ee_pos", lambda g, k, v: g.__setitem__(k, 1000 * v)),
        "obs/ee_pos",
        "millimetres",
    ),
    "fingers in millimetres": (
        replaced("obs/gripper_states", lambda g, k, v: g.__setitem__(k, 1000 * v)),
        "obs/gripper_states",
        "millimetres",
    ),
    "angles in degrees": (
        replaced("obs/ee_ori", lambda g, k, v: g.__setitem__(k, np.degrees(v))),
        "obs/ee_ori",
        "degrees",
    ),
    "an orientation that nobody knows": (
        lambda f: f["data"].attrs.__setitem__("image_orientation", "sideways"),
        "image_orientation",
        "upright, flipped",
    ),
    "an orientation that is a list": (
        lambda f: f["data"].attrs.__setitem__("image_orientation", [1, 2]),
        "image_orientation",
    ),
    "a part that is a list": (lambda f: f["data"].attrs.__setitem__("part", [1, 2]), "part"),
    "a number of demonstrations that is a list": (
        lambda f: f["data"].attrs.__setitem__("num_demos", [1, 2]),
        "num_demos",
    ),
    "more demonstrations than there are": (
        lambda f: f["data"].attrs.__setitem__("num_demos", 2),
        "num_demos",
        "1 demonstrations",
    ),
    "an orientation that is a number": (
        lambda f: f["data"].attrs.__setitem__("image_orientation", 3),
        "image_orientation",
    ),
}


@pytest.mark.parametrize("case", H5)
def test_a_strange_hdf5_file_is_named_with_its_key(case, tmp_path):
    """Each ends in one sentence, not in TypeError, KeyError or MemoryError.

    An array of 10^10 rows is not read into memory, and images that were never written do not pass
    as black ones.
    """
    change, *words = H5[case]
    path = shutil.copy(CASES / "h5_valid.hdf5", tmp_path / "bad.hdf5")
    open_dataset(path)
    with h5py.File(path, "r+") as file:
        change(file)
    refused(lambda: open_dataset(path), "bad.hdf5", *words)


@pytest.mark.parametrize(
    "stored", [np.bytes_("flipped"), "flipped", np.array("flipped", dtype=h5py.string_dtype())]
)
def test_an_orientation_is_read_however_its_text_was_stored(stored, tmp_path):
    """'flipped' is understood as text and as fixed-length bytes.

    The latter was once read as upright, so every image was upside down without a warning.
    """
    path = shutil.copy(CASES / "h5_valid.hdf5", tmp_path / "d.hdf5")
    with h5py.File(path, "r+") as file:
        file["data"].attrs["image_orientation"] = stored
        raw = file["data/demo_0"][libero_hdf5.IMAGE][0]
    image = open_dataset(path)["demo_0"].images([0])[0]
    np.testing.assert_array_equal(image, raw[::-1])


def test_a_task_of_a_replayed_file_is_text(tmp_path):
    """bddl_file_name comes back as text even if it is stored as bytes, which pathlib refuses."""
    with libero_hdf5.open_demos(CASES / "h5_bddl_bytes.hdf5") as file:
        assert isinstance(libero_hdf5.file_attributes_of("x", file)["bddl_file_name"], str)


def test_an_hdf5_file_needs_no_suffix(tmp_path):
    """A file without a suffix is read as HDF5, not refused as a missing folder."""
    path = shutil.copy(CASES / "h5_valid.hdf5", tmp_path / "data")
    assert len(open_dataset(path)) == 1


def test_a_file_that_is_being_written_is_left_alone(tmp_path):
    """A file that another process writes is refused with the advice to wait.

    It is not called truncated, as that remedy would overwrite it.
    """
    path = shutil.copy(CASES / "h5_valid.hdf5", tmp_path / "d.hdf5")
    writer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, h5py; f = h5py.File(sys.argv[1], 'r+'); print(1, flush=True); input()",
            str(path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        writer.stdout.readline()
        message = refused(lambda: open_dataset(path), "d.hdf5", "open for writing", "wait")
        assert "collect" not in message and "truncated" not in message
    finally:
        writer.communicate(b"\n")


@pytest.mark.parametrize(
    "attribute, text",
    [
        ("model_file", "<mujoco><body"),
        ("model_file", 3.0),
        ("fixtures", "{"),
        ("fixtures", '{"stove": [1, 2]}'),
    ],
)
def test_broken_fixtures_are_named_with_file_and_key(attribute, text, tmp_path):
    """The sentence names file and key, which the parser's own error does not."""
    path = shutil.copy(CASES / "h5_valid.hdf5", tmp_path / "d.hdf5")
    with h5py.File(path, "r+") as file:
        file["data/demo_0"].attrs[attribute] = text
        refused(
            lambda: libero_hdf5.stored_fixtures(path, file["data/demo_0"]),
            "d.hdf5",
            "data/demo_0",
            attribute,
        )


def said_by(form, folder, name, value):
    """A small dataset of a format, in which an attribute has another value -> its path."""
    if form == "smith300":
        path = write_synthetic_episodes(folder / "episodes", 2)
        said = {"format": "smith300-1", "task_suite": "libero_spatial", "task_id": 0, name: value}
        (path / "dataset.json").write_text(json.dumps(said))
        return path
    path = write_synthetic_demos(folder / "d.hdf5", 2)
    if form == "lerobot":
        convert_demos.main([str(path), "--out", str(folder / "lerobot")])
        file = folder / "lerobot" / "meta" / "provenance.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
        return folder / "lerobot"
    with h5py.File(path, "r+") as file:
        file["data"].attrs[name] = h5py.Empty("f") if value is None else value
    return path


@pytest.mark.parametrize("form", ["hdf5", "lerobot", "smith300"])
@pytest.mark.parametrize(
    "name, value",
    [("task_id", None), ("task_id", "first"), ("task_id", -1), ("task_id", 1.5), ("grasp", 3)],
)
def test_what_a_dataset_says_of_itself_is_checked_where_it_is_read(form, name, value, tmp_path):
    """A training would end in a checkpoint that is refused: its header takes these over."""
    path = said_by(form, tmp_path, name, value)
    refused(lambda: open_dataset(path), path.name, f"'{name}' is", "expected; mend or remove it")


@pytest.mark.parametrize("form", ["hdf5", "lerobot", "smith300"])
def test_a_task_number_may_be_text(form, tmp_path):
    assert open_dataset(said_by(form, tmp_path, "task_id", "7")).demos[0].task.endswith("_7")


# -- cameras and grippers


WRONG = {
    "OpenGL axes": lambda K, E: (K, E @ np.diag([1.0, -1, -1, 1])),
    "inverse transform (world": lambda K, E: (K, np.linalg.inv(E)),
    "extrinsics in millimetres": lambda K, E: (
        K,
        E * np.array([[1, 1, 1, 1000]] * 3 + [[1, 1, 1, 1]]),
    ),
}


@pytest.mark.parametrize("cause", WRONG)
def test_a_camera_that_does_not_see_the_eef_is_refused_with_the_cause(cause, tmp_path):
    """A policy would train on such data to the end and learn nothing."""
    path = write_synthetic_episodes(tmp_path / "recordings", 2, 40, 32)
    for episode in path.glob("episode_*"):
        with np.load(episode / "episode.npz") as file:
            arrays = dict(file)
        arrays["intrinsics"], arrays["extrinsics"] = WRONG[cause](
            arrays["intrinsics"], arrays["extrinsics"]
        )
        np.savez(episode / "episode.npz", **arrays)
    refused(lambda: open_dataset(path), "recordings", cause)


def test_intrinsics_of_another_image_size_are_refused(tmp_path):
    """K belongs to 448 px, the images have 16: the principal point lies outside, or the focal
    length does not fit.
    """
    path = write_synthetic_demos(tmp_path / "d.hdf5", 2, 40, 16)
    with h5py.File(path, "r+") as file:
        for name in file["data"]:
            file["data"][name][libero_hdf5.CAMERA_K][:2] *= 28
    refused(lambda: open_dataset(path), "d.hdf5", libero_hdf5.CAMERA_K, "image size")


def test_millimetres_are_refused():
    """Projections are the same if everything is a thousand times larger.

    Only the size of the numbers tells.
    """
    refused(lambda: open_dataset(CASES / "smith_mm"), "episode_0", "eef_pos_t", "millimetres")


@pytest.mark.parametrize("width", [80.0, -5.0])
def test_recorded_widths_that_no_gripper_has_are_refused(width, tmp_path):
    """In millimetres every width would count as open."""
    path = write_synthetic_episodes(tmp_path / "recordings", 1, 40, 32)
    file = path / "episode_00000" / "episode.npz"
    with np.load(file) as stored:
        arrays = dict(stored)
    np.savez(file, **{**arrays, "gripper_width_t": np.full(len(arrays["eef_pos_t"]), width)})
    refused(lambda: open_dataset(path), "episode_00000", "gripper_width_t", "0 to 0.3 metres")


def test_a_reversed_gripper_is_refused(tmp_path):
    """The commands say open where the recorded fingers close.

    Training would take them as they are.
    """
    path = write_synthetic_demos(tmp_path / "d.hdf5", 2, 40, 16)
    with h5py.File(path, "r+") as file:
        for name in file["data"]:
            file["data"][name]["actions"][:, 6] *= -1
    refused(lambda: open_dataset(path), "d.hdf5", "reversed")


def test_euler_angles_in_degrees_are_refused(tmp_path):
    """Degrees would wrap into angles that look like radians."""
    path = write_synthetic_episodes(tmp_path / "recordings", 1, 40, 32)
    with np.load(path / "episode_00000" / "episode.npz") as file:
        arrays = dict(file)
    np.savez(
        path / "episode_00000" / "episode.npz",
        **{**arrays, "eef_euler_t": np.degrees(arrays["eef_euler_t"])},
    )
    refused(lambda: open_dataset(path), "eef_euler_t", "degrees")


# -- frames


def test_frames_of_16_bits_are_refused():
    """A conversion to 8 bits would turn every value above 255 white."""
    refused(lambda: open_dataset(CASES / "smith_16bit"), "frames/0.png", "8-bit")


def test_an_exif_orientation_is_refused(tmp_path):
    """The pixels are stored turned, and it is unknown to which orientation K belongs."""
    exif = Image.Exif()
    exif[smith300.ORIENTATION_TAG] = 6
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    refused(lambda: smith300.decode_image(tmp_path / "a.jpg", 8), "a.jpg", "EXIF orientation is 6")


def test_frames_come_by_number_and_macos_files_are_ignored(tmp_path):
    """2.png comes before 10.png, so that images and states belong together.

    macOS's ._1.png is no frame.
    """
    (tmp_path / "frames").mkdir()
    for i in range(12):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "frames" / f"{i}.png")
    (tmp_path / "frames" / "._1.png").write_bytes(b"\0")
    assert smith300.read_frames(tmp_path, range(12), 4)[:, 0, 0, 0].tolist() == list(range(12))
    shutil.copy(tmp_path / "frames" / "3.png", tmp_path / "frames" / "03.png")
    refused(lambda: smith300.frame_files(tmp_path), "3.png", "remove one")


def test_a_rigid_camera_is_asked_of_a_recorded_episode_too():
    """`deploy --source FOLDER` refuses extrinsics that training refuses."""
    refused(
        lambda: list(deploy_dino_kv.recorded(CASES / "smith_nonrigid" / "episode_0", None, 4)),
        "extrinsics",
        "orthonormal",
    )


# -- live input


def live(lines, state=None):
    lines = lines if isinstance(lines, bytes) else json.dumps(lines).encode()
    return lambda: list(deploy_dino_kv.live(io.BytesIO(lines), state, 4))


LINE = {
    "image": str(CASES / "live.png"),
    "eef_pos": [0, 0, 1],
    "gripper_width": 0.08,
    "intrinsics": [[4, 0, 2], [0, 4, 2], [0, 0, 1]],
    "extrinsics": np.eye(4).tolist(),
}


def test_a_sound_line_is_an_observation():
    """The line that the tests below damage is valid."""
    observation = live(LINE)()[0]
    assert observation.image.shape == (4, 4, 3) and observation.eef_pos.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    "name, words",
    [
        ("image_true", ("line 1", "image")),
        ("latin1", ("line 1", "UTF-8")),
        ("nan_extrinsics", ("line 1", "extrinsics", "NaN")),
    ],
)
def test_a_bad_line_is_named(name, words):
    """`image: true` must not open standard output as a file, and NaN in the camera must not go to
    the robot.
    """
    refused(live((CASES / f"live_{name}.jsonl").read_bytes()), *words)


@pytest.mark.parametrize(
    "change",
    [
        {"intrinsics": [4, 0, 2, 0, 4, 2, 0, 0, 1]},
        {"eef_pos": ["0", "0", "1"]},
        {"gripper_width": True},
        {"eef_pos": [0, 0, 1000]},
        {"image_base64": "?"},
        {"extrinsics": (2 * np.eye(4)).tolist()},
        {"intrinsics": [[400, 0, 200], [0, 400, 200], [0, 0, 1]]},
        {"gripper_width": 1e400},
        {"gripper_width": 80},
        {"gripper_width": -1},
    ],
)
def test_a_line_of_the_wrong_form_is_refused(change):
    """Nine numbers in a row are no K, and texts are no numbers."""
    refused(live({**LINE, **change}), "line 1")


@pytest.mark.parametrize("state", ["state_cut.npz", "state_flat_K.npz", "absent.npz"])
def test_a_bad_state_file_is_named(state):
    """A cut, a flat or a missing state file gives one sentence."""
    refused(
        live({k: v for k, v in LINE.items() if k not in smith300.CAMERA}, CASES / state),
        state,
        "intrinsics",
    )


def test_the_observation_after_the_last_is_not_waited_for():
    """A camera that answers requests would wait for the robot, and the robot for it."""

    def source():
        raise AssertionError("asked for one more")
        yield

    policy = SimpleNamespace(reset=lambda: None)
    assert deploy_dino_kv.answer_all(policy, source(), limit=0) == []


def test_an_answer_with_nan_is_not_sent():
    """A robot never gets NaN, whatever caused it."""
    from policy import Waypoint

    answer = Waypoint(
        np.zeros(3), np.eye(3), 1.0, np.full((2, 3), np.nan), np.ones(2), np.stack([np.eye(3)] * 2)
    )
    refused(lambda: deploy_dino_kv.checked(answer, 7), "frame 7", "nothing is sent")


# -- bases, checkpoints, folders


@pytest.mark.parametrize("name", ["fingerprints_null", "pca_min_empty", "is_npy"])
def test_a_damaged_basis_is_named(name):
    """A basis with a damaged entry is refused with its name and the script that makes one."""
    refused(
        lambda: rot_utils.load_basis(CASES / f"basis_{name}.npz", ["a"]),
        f"basis_{name}.npz",
        "precompute_rotation_pca.py",
    )


@pytest.mark.parametrize("name", ["header_json", "config_null"])
def test_a_damaged_header_is_named(name):
    """A header that is no JSON, or has no config, is refused with the file's name."""
    refused(
        lambda: checkpoint.load_policy(CASES / f"ckpt_{name}.safetensors"),
        f"ckpt_{name}",
        "copy it again",
    )


def test_a_flipped_bit_in_a_weight_is_noticed(tmp_path):
    """A checkpoint carries a digest of its content.

    A changed weight would drive the robot elsewhere without a warning.
    """
    path = tmp_path / "c.safetensors"
    checkpoint.save_tensors(path, {"w": torch.ones(8)}, {"step": 1})
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    refused(lambda: checkpoint.load_tensors(path), "c.safetensors", "bits have changed")


def test_folders_with_damaged_json_are_named(tmp_path):
    """Damaged JSON files of runs and evaluations are refused with their names."""
    import train

    refused(
        lambda: train.parse_args(["--resume", str(CASES / "run_config_empty")]),
        "config.json",
        "run of train.py",
    )
    refused(
        lambda: records.check_stamp(CASES / "eval_settings_empty", {}), "settings.json", "--out"
    )
    refused(lambda: records.read_summary(CASES / "eval_summary_latin1"), "summary.json", "utf-8")
    refused(
        lambda: records.read_summary(CASES / "eval_summary_empty_object"),
        "summary.json",
        "model_type",
    )
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf{}")
    assert runtime.read_json(tmp_path / "bom.json", "folder") == {}


def test_an_evaluation_that_was_ended_before_its_first_episode_begins_anew(tmp_path):
    """Its folder holds settings alone, of a command that was mistyped, say."""
    runtime.write_json(tmp_path / "settings.json", {"teleport": "False"})
    records.check_stamp(tmp_path, {"teleport": "True"})
    (tmp_path / "episodes.jsonl").write_text("{}\n")
    refused(lambda: records.check_stamp(tmp_path, {"teleport": "True"}), "other settings", "--out")
    records.check_stamp(tmp_path, {"teleport": "False"})


def test_episodes_of_another_layout_are_not_counted():
    """Rows of another layout, or without settings.json, are refused, not counted as this
    evaluation's.
    """
    refused(
        lambda: records.check_stamp(CASES / "eval_rows_foreign", {"layout": "benchmark"}),
        "settings.json",
        "--out",
    )
    refused(
        lambda: records.read_episodes(CASES / "eval_rows_foreign", "benchmark"),
        "shifted",
        "benchmark",
    )
    assert len(records.read_episodes(CASES / "eval_rows_foreign", "shifted")) == 1


def test_an_unreadable_strip_does_not_lose_an_evaluation(tmp_path):
    """After hours of episodes an empty PNG must not end the evaluation: the sheet leaves it out."""
    shutil.copytree(CASES / "eval_strip_empty", tmp_path / "e")
    rows = list(records.read_episodes(tmp_path / "e"))
    plots.sheet_from_strips(tmp_path / "e", rows)
    Image.new("RGB", (40, 4)).save(tmp_path / "e" / "strips" / "001.png")
    plots.sheet_from_strips(tmp_path / "e", [*rows, {**rows[0], "episode": 1}])
    assert (tmp_path / "e" / "sheet.jpg").exists()


def test_only_a_torn_last_line_is_left_out(tmp_path):
    """Only a last line that a kill cut off is left out.

    A damaged line in the middle is refused: an evaluation of 50 must not become one of 49.
    """
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2')
    assert runtime.read_jsonl(path) == [{"a": 1}]
    runtime.append_jsonl(path, {"a": 3})
    assert runtime.read_jsonl(path) == [{"a": 1}, {"a": 3}]
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": 3}\n')
    refused(lambda: runtime.read_jsonl(path), "rows.jsonl", "line 2")
    path.write_bytes(b'{"a": 1}\n[]\n')
    refused(lambda: runtime.read_jsonl(path), "rows.jsonl", "line 2")


def test_a_path_of_the_cache_that_is_cut_short_is_computed_anew(tmp_path):
    """A damaged expert path counts as missing, so that it is computed again."""
    np.savez(tmp_path / "p.npz", positions=np.zeros((4, 3)), closed=np.zeros(4, int), success=True)
    assert rollout.stored_path(tmp_path / "p.npz").success
    (tmp_path / "p.npz").write_bytes((tmp_path / "p.npz").read_bytes()[:200])
    assert rollout.stored_path(tmp_path / "p.npz") is None
    assert rollout.stored_path(tmp_path / "absent.npz") is None
