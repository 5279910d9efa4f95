"""Shared fixtures: small synthetic demonstrations with a true camera, a small backbone, an
unreachable hub."""

import os
import pickle
import shlex
import shutil
import signal
import sys
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "egl")
# two test processes share the machine's cores, and Mesa draws with threads too
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LP_NUM_THREADS", "1")
# what --device auto means: tests/gpu alone are about GPUs
os.environ.setdefault("PARA_DEVICE", "cpu")
ROOT = Path(__file__).resolve().parent.parent
# modules and packages lie in the repository's root
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "unit")]

import h5py
import helpers
import numpy as np
import pytest
from filelock import FileLock

from camera import intrinsics, look_at, project
from formats import hdf5, lerobot_writer, libero_hdf5, smith300
from formats.dataset import open_dataset
from rot_utils import (
    basis_path,
    euler_to_matrix,
    fingerprint,
    fit_basis,
    matrix_to_euler,
    matrix_to_quat,
    matrix_to_rotvec,
    rotvec_to_matrix,
    save_basis,
)
from sim.libero_env import Observation

# The longest files start first, so that two processes share the suite evenly. The second begins
# with one that does not wait for the demonstrations that the first collects.
FIRST = (
    "test_readme.py",
    "test_settings.py",
    "test_pipeline.py",
    "test_checkpoints.py",
    "test_rotation_pipeline.py",
    "test_matrix.py",
    "test_train.py",
    "test_contract.py",
    "test_device.py",
    "test_extending.py",
    "test_variants.py",
)


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST)
    )


SIZE = 64  # pixels of the synthetic images
STEPS, CLOSES, OPENS = 40, 10, 26  # a demo's length and the frames of its two gripper changes
PUSHED = (3, 4)  # perturbed frames of the even demos


def agentview(size=SIZE):
    """(K, E) of a camera like agentview: one metre from the table's middle, looking down at it from
    the front."""
    return intrinsics(45, size), look_at([0.75, 0.0, 1.65], [0.0, 0.0, 1.0])


def pick_and_place(rng, steps=STEPS):
    """EEF positions (T,3) m of one smooth pick and place that stands still while the gripper moves,
    commands (T,)."""
    # random xyz in m, heights of a table at 0.9 m: start above, pick and place near it
    start, pick, place = (
        rng.uniform([-0.15, -0.2, z], [0.15, 0.2, z + 0.03]) for z in (1.15, 0.95, 0.98)
    )
    over = (pick + place) / 2 + [0, 0, 0.1]
    # frame -> position; between them the path is straight. It rests for 10 frames while the gripper
    # closes, and again while it opens
    knots = {
        0: start,
        CLOSES: pick,
        CLOSES + 10: pick,
        CLOSES + 13: over,
        OPENS: place,
        OPENS + 10: place,
        steps - 1: start,
    }
    # each coordinate interpolated by itself, (T,3); command 1 closes, -1 opens
    times = np.array(sorted(knots))
    path = np.stack(
        [np.interp(np.arange(steps), times, [knots[t][d] for t in times]) for d in range(3)], -1
    )
    return path, np.where((np.arange(steps) >= CLOSES) & (np.arange(steps) < OPENS), 1.0, -1.0)


def render(rng, position, K, E, size):
    """(S,S,3) uint8: a table with grain, and a red blob where the EEF is seen."""
    image = rng.integers(90, 130, (size, size, 3), dtype=np.uint8)
    u, v, _ = project(position, K, E)
    # pixel centres; the blob's radius is a sixteenth of the image
    y, x = np.mgrid[:size, :size] + 0.5
    image[np.hypot(x - u, y - v) < size / 16] = (230, 30, 40)
    return image


def write_synthetic_demos(
    path,
    n_demos=4,
    steps=STEPS,
    size=SIZE,
    seed=0,
    pushes=True,
    orientation="upright",
    **attributes,
):
    """Write a valid demonstration file like collect_demos.py's, without a simulator; return its
    path. attributes: of the file, beside the usual ones or instead of them."""
    K, E = agentview(size)
    with hdf5.create(path) as file:
        data = file.create_group("data")
        hdf5.set_attributes(
            data,
            {
                "format": libero_hdf5.FORMAT,
                "task_suite": "libero_spatial",
                "task_id": 0,
                "seed": seed,
                "language": "pick up the blob",
                "image_orientation": orientation,
                "num_demos": n_demos,
                **attributes,
            },
        )
        for i in range(n_demos):
            rng = np.random.default_rng([seed, i])
            position, gripper = pick_and_place(rng, steps)
            # the gripper points down: roll is pi
            yaw = np.linspace(0, rng.uniform(-0.5, 0.5), steps)
            tilt = 0.03 * np.sin(np.arange(steps) / 3)  # so that roll crosses +-pi
            rotation = euler_to_matrix(np.stack([np.pi + tilt, 0.5 * tilt, yaw], -1))
            orientation_vectors = np.stack([matrix_to_rotvec(r) for r in rotation])
            # LIBERO's action: displacement over the controller's 5 cm, rotation, gripper command
            actions = np.zeros((steps, 7))
            actions[:-1, :3], actions[:, 6] = np.diff(position, axis=0) / 0.05, gripper
            perturbed = np.zeros(steps, bool)
            # even demos are pushed aside in two frames, whose waypoints are not trained on
            perturbed[list(PUSHED)] = pushes and i % 2 == 0
            images = np.stack([render(rng, p, K, E, size) for p in position])
            arrays = {
                "actions": actions,
                "executed_actions": actions,
                "perturbed": perturbed,
                "states": rng.normal(size=(steps, 20)),
                "rewards": np.zeros(steps, np.uint8),
                "dones": np.zeros(steps, np.uint8),
                "robot_states": np.zeros((steps, 9)),
                "obs/ee_pos": position,
                "obs/ee_ori": orientation_vectors,
                "obs/ee_states": np.hstack([position, orientation_vectors]),
                # the two fingers, opposite signs: 4 cm and so 8 cm apart where open, else 0
                "obs/gripper_states": 0.02 * np.stack([1 - gripper, gripper - 1], -1),
                "obs/joint_states": rng.normal(size=(steps, 7)),
                libero_hdf5.CAMERA_K: K,
                libero_hdf5.CAMERA_E: E,
                "attrs": {"num_samples": steps, "source": "synthetic", "seed": seed},
            }
            # LIBERO's own files are upside down
            images = images[:, ::-1] if orientation == "flipped" else images
            libero_hdf5.write_demo(
                data.create_group(f"demo_{i}"), arrays, np.ascontiguousarray(images)
            )
    return Path(path)


def write_synthetic_episodes(
    path, n_episodes=4, steps=STEPS, size=SIZE, seed=0, pitch=0.0, video=False, wide=0
):
    """Write a valid smith300 folder without a robot; return its path.

    The gripper turns about the vertical to a yaw of the episode's own. pitch: radians by which it
    is tilted from straight down, so that -pi/2 points it ahead; wide: columns of margin at both
    sides of the frames.
    """
    K, E = agentview(size)
    # a margin at the left moves the principal point by as many columns
    K = K + np.array([[0, 0, wide], [0, 0, 0], [0, 0, 0]])
    for i in range(n_episodes):
        rng = np.random.default_rng([seed, i])
        position, gripper = pick_and_place(rng, steps)
        yaw = np.linspace(0, 1.0 if i % 2 else -1.0, steps)
        # rotations are never exactly about the vertical: small noise on all axes
        tremor = euler_to_matrix(rng.normal(scale=0.02, size=(steps, 3)))
        # turned about the world's vertical, after a half turn about x that points the gripper down
        turn = euler_to_matrix(np.stack([0 * yaw, 0 * yaw, yaw], -1)) @ euler_to_matrix(
            np.array([np.pi, 0, 0])
        )
        rotation = turn @ euler_to_matrix(np.array([0, pitch, 0])) @ tremor
        images = np.stack(
            [
                np.pad(render(rng, p, *agentview(size), size), ((0, 0), (wide, wide), (0, 0)))
                for p in position
            ]
        )
        smith300.write_episode(
            Path(path) / f"episode_{i:05d}",
            {
                "eef_pos_t": position,
                "eef_euler_t": matrix_to_euler(rotation),
                "gripper_t": (gripper > 0).astype(float),
                "intrinsics": K,
                "extrinsics": E,
            },
            images,
            video,
        )
    smith300.write_dataset_stamp(path, {"task_suite": "libero_spatial", "task_id": 0, "seed": seed})
    return Path(path)


def with_basis(path, space="so3"):
    """Write the rotation basis of a dataset of either format beside it; return the dataset's
    path."""
    demos_ = open_dataset(path).demos
    rotations = rotvec_to_matrix(np.concatenate([d.ee_ori for d in demos_]))
    provenance = {
        "dataset": Path(path).name,
        "fingerprints": [fingerprint(d.ee_ori) for d in demos_],
    }
    save_basis(basis_path(path), fit_basis(rotations, space, provenance))
    return path


@pytest.fixture(scope="session")
def synthetic_demos(tmp_path_factory):
    """A valid small demonstration file, its rotation basis beside it. Shared: do not write to
    it."""
    return with_basis(write_synthetic_demos(tmp_path_factory.mktemp("demos") / "synthetic.hdf5"))


# a small suite: task 10 comes after task 2
SENTENCES = {0: "pick up the blob on the left", 2: "pick up the blob on the right", 10: "push it"}


def write_task(folder, task, n_demos, **attributes):
    """A file of one task of the small suite, named as collect_demos.py names it."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {"task_id": task, "language": SENTENCES[task], **attributes}
    return write_synthetic_demos(
        folder / f"libero_spatial_{task}.hdf5", n_demos, **{"seed": task, **said}
    )


@pytest.fixture(scope="session")
def suite(tmp_path_factory):
    """A folder with files of three tasks: 4, 8 and 2 demonstrations. Shared: do not write to it."""
    folder = tmp_path_factory.mktemp("suite") / "libero_spatial"
    for task, n in ((10, 2), (0, 4), (2, 8)):
        write_task(folder, task, n)
    (folder / "settings.json").write_text("{}")
    return folder


ELSEWHERE = "pick up the other blob"  # another task's sentence in a scene


@pytest.fixture(scope="session")
def both(tmp_path_factory):
    """A file of one scene with 8 demonstrations of its own sentence and 8 of another task's.
    Shared: do not write to it.
    """
    file = write_task(tmp_path_factory.mktemp("both"), 0, 16, instruction_of="other")
    with h5py.File(file, "r+") as opened:
        for i in range(1, 16, 2):
            attributes = opened[f"data/demo_{i}"].attrs
            attributes["language"], attributes["instruction_of"] = np.bytes_(ELSEWHERE), 2
    return file


@pytest.fixture(scope="session")
def told(suite, tmp_path_factory):
    """A run folder of two steps on the small suite, told what to do, and what was printed."""

    def train(folder):
        (folder / "data").mkdir()
        shutil.copytree(suite, folder / "data" / "libero_spatial")
        words = (
            "train.py --model_type para --dataset data/libero_spatial --out run --max_steps 2 "
            f"--image_size {SIZE} --grid 14 --width 8 --backbone efficientnet_lite0 "
            "--batch_size 4 --wandb off --precision fp32"
        )
        return folder / "run", helpers.run(*words.split(), cwd=folder)

    return made_once(tmp_path_factory, "told", train)


def observations_of(demo, frames):
    """What a scene would have shown at frames of a demonstration: an Observation each."""
    for image, i in zip(demo.images(frames), frames):
        rotation = rotvec_to_matrix(demo.ee_ori[i])
        yield Observation(
            image,
            demo.ee_pos[i],
            rotation,
            matrix_to_quat(rotation),
            demo.gripper_states[i],
            np.zeros(7),
            demo.K,
            demo.E,
        )


@pytest.fixture(scope="session")
def synthetic_episodes(tmp_path_factory):
    """A valid small smith300 folder with its rotation basis. Shared: do not write to it."""
    return with_basis(write_synthetic_episodes(tmp_path_factory.mktemp("smith300") / "izzy"))


@pytest.fixture(scope="session")
def backbone():
    """The shipped backbone at the synthetic images' size."""
    import torch

    from nets.backbone import Backbone

    torch.set_num_threads(1)
    return Backbone("efficientnet_lite0", SIZE)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """No network and an empty hub cache, whatever this machine has."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # the code then asks the hub's client, offline, at once
    monkeypatch.setenv("HTTPS_PROXY", "http://localhost:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the variable is read once, at import
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def made_once(tmp_path_factory, name, make):
    """Return `make(folder)`. The first test process that asks makes it, the others read it."""
    root = tmp_path_factory.getbasetemp()
    # each process has a folder of its own below one that they share
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    stored = root / f"{name}.pickle"
    with FileLock(root / f"{name}.lock"):
        # whoever has the lock first makes it; the others wait, and read
        if not stored.exists():
            folder = root / name
            folder.mkdir(exist_ok=True)
            # pickled: paths and the finished process, not the files themselves
            stored.write_bytes(pickle.dumps(make(folder)))
    return pickle.loads(stored.read_bytes())


@pytest.fixture(scope="session")
def only_scene():
    """The scene of `scene`, which costs 4 s of CPU and is built once in a process; its state, its
    fixtures and its attributes when it was new.
    """
    from sim.libero_env import Scene

    made = Scene(image_size=112, clean=True)
    yield made, made.state(), made.fixtures(), dict(vars(made))
    made.close()


@pytest.fixture(scope="module")
def scene(only_scene):
    """The default task in the real simulator, clean, with small images. Every file finds it as it
    was built: model, cameras, the robot's start, fixtures, state and attributes are put back.
    """
    made, state, fixtures, attributes = only_scene
    for name in vars(made).keys() - attributes.keys():
        delattr(made, name)
    for name in ("image_size", "instruction", "physics", "quality"):
        setattr(made, name, attributes[name])
    made.reset([0])
    made.set_fixtures(fixtures)
    made.set_state(state)
    return made


@pytest.fixture(scope="session")
def collected(tmp_path_factory):
    """Two demonstrations from the real simulator, whose collection was killed in the middle and
    went on -> (file, {part: its time}, the second process). The scene is the clean one: its images
    and steps cost a third."""

    def collect(folder):
        arguments = shlex.split(
            f"collect_demos.py --n_demos 2 --seed 7 --image_size {helpers.SIZE} "
            "--clean_scene --workers 1 --out demos.hdf5"
        )
        parts = folder / "demos.hdf5.parts"
        # killed once the first demonstration is on disk; the same command then goes on
        code = helpers.interrupt(
            arguments, folder, lambda: list(parts.glob("demo_*.hdf5")), signal.SIGKILL
        )
        assert code == -signal.SIGKILL and not (folder / "demos.hdf5").exists()
        kept = {p.name: p.stat().st_mtime_ns for p in parts.glob("demo_*.hdf5")}
        return folder / "demos.hdf5", kept, helpers.run(*arguments, cwd=folder)

    return made_once(tmp_path_factory, "collected", collect)


@pytest.fixture(scope="session")
def trained(collected, tmp_path_factory):
    """A run folder of a few steps on the collected demonstrations."""
    return made_once(
        tmp_path_factory,
        "trained",
        lambda folder: (
            folder / "run",
            helpers.run(*helpers.train_flags(collected[0], "run", 6), cwd=folder),
        ),
    )


@pytest.fixture(scope="session")
def lerobot_dataset(collected, tmp_path_factory):
    """The collected demonstrations as a LeRobot dataset, of every second frame. Shared: do not
    write to it."""

    def make(folder):
        path = folder / "every_second.hdf5"
        with h5py.File(collected[0]) as source, h5py.File(path, "w") as file:
            source.copy("data", file)
            for demo in file["data"].values():
                demo.attrs["frame_stride"] = 1
                length = len(demo["actions"])
                for place in (demo, demo["obs"]):
                    for key in [k for k, v in place.items() if isinstance(v, h5py.Dataset)]:
                        if len(place[key]) == length:
                            values = place[key][::2]
                            del place[key]
                            place[key] = values
        sources, attributes = lerobot_writer.sources_of(path)
        lerobot_writer.write_dataset(folder / "dataset", sources, attributes)
        return folder / "dataset"

    return made_once(tmp_path_factory, "lerobot_dataset", make)
