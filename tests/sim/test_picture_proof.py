"""The simulator's own picture of a recorded pose tells whether a LeRobot dataset's camera, pictures
and task belong together. The recording is real.
"""

import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from formats.lerobot import LeRobotFolder
from formats.libero_cameras import TASKS
from formats.pictures import ORIENTATIONS
from harness.proof import prove_pictures
from runtime import UserError
from sim.picture_proof import FIXED, Match, groups_of, judge, prove

# what opening a dataset checks by itself must not hide what is checked here
Unchecked = type("Unchecked", (LeRobotFolder,), {"check": lambda self: None})


@pytest.fixture
def proven(lerobot_dataset, scene, monkeypatch):
    """A function: change what was read of the dataset, and prove it in the session's scene."""
    monkeypatch.setattr(scene, "close", lambda: None)

    def proved(change=lambda read: None):
        read = Unchecked(lerobot_dataset)
        change(read)
        return prove(read, groups_of(read.demos), lambda *task, **how: scene)

    return proved


def test_a_right_dataset_is_proven(proven):
    """The hand is found where its camera shows it, far above what any other place reaches."""
    told = proven()
    assert "the hand is where the camera shows it in 2 of 'pick up the black bowl" in told
    assert float(told.split("correlation ")[1][:4]) > 0.7


@pytest.mark.parametrize("orientation", sorted(set(ORIENTATIONS) - {"mirrored"}))
def test_reflections_are_refused_and_named(proven, orientation):
    """Read in a wrong way, the message has the line that reads it rightly."""

    def change(read):
        read.orientation = orientation

    with pytest.raises(UserError, match=r'"image_orientation": "mirrored" in .*cameras\.json'):
        proven(change)


def moved(read):
    for demo in read.demos:
        demo.E = demo.E.copy()
        demo.E[1, 3] += 0.1


def scaled(read):
    for demo in read.demos:
        demo.K = demo.K * np.array([[2, 1, 1], [1, 2, 1], [1, 1, 1]])


def shuffled(read):
    for demo in read.demos:
        demo.ee_pos = demo.ee_pos[::-1]


def raised(read):
    """As if the robot stood elsewhere: the floor's is 0.9 m below the table's."""
    for demo in read.demos:
        demo.ee_pos = demo.ee_pos + np.array([0, 0, 0.9])
        demo.E = demo.E.copy()
        demo.E[2, 3] += 0.9


@pytest.mark.parametrize(
    "change, words",
    [
        (moved, "% of the image's side to the right .* is the camera that of these pictures"),
        (scaled, "hand is not where the camera shows it|never well inside"),
        (shuffled, "hand is not where the camera shows it"),
        (raised, "cm out of the reach of the robot .* another task"),
    ],
)
def test_a_wrong_camera_or_task_is_refused(proven, change, words):
    """Ten centimetres, another focal length, states of other frames, a robot that stands elsewhere:
    each is told by its likely cause.
    """
    with pytest.raises(UserError, match=words) as error:
        proven(change)
    assert "\n" not in str(error.value)


def test_a_cabinet_that_stands_elsewhere_is_another_task():
    """The hand fits in every task of the same table; what stands on it does not."""
    good = [Match(0.9, 0.9, np.zeros(2))]
    hands = {name: good if name == "upright" else [Match(0.1, 0.3, np.ones(2))] for name in ("x",)}
    hands = {"upright": good, **hands}
    for found, expected in ((FIXED + 0.05, None), (FIXED - 0.05, "another task")):
        fixed = [Match(found, found, np.zeros(2))]
        told = judge("open it", "mirrored", np.zeros(1), hands, fixed, "{}")
        assert told is None if expected is None else expected in told


def test_one_task_of_each_kind_of_scene_is_looked_at():
    """Forty tasks have four kinds; instructions that are no LIBERO task have none."""
    suites = [*TASKS["libero_spatial"], *TASKS["libero_object"], *TASKS["libero_10"], "fold it"]
    found = groups_of([SimpleNamespace(instruction=words) for words in suites])
    assert list(found) == [TASKS["libero_spatial"][0], TASKS["libero_object"][0]] + [
        TASKS["libero_10"][i] for i in (0, 5)
    ]


def test_training_refuses_what_the_simulator_contradicts(lerobot_dataset, tmp_path):
    """A tabletop recording under the name of a floor task: the stated check of its movements
    passes, the robot of that task cannot reach it. --trust_pictures is named.
    """
    copy = shutil.copytree(lerobot_dataset, tmp_path / "copy")
    words = TASKS["libero_object"][1]
    for path, name in (
        (copy / "meta/tasks.parquet", "task"),
        (copy / "meta/episodes/chunk-000/file-000.parquet", "tasks"),
    ):
        table = pq.read_table(path)
        cells = [words if name == "task" else [words]] * len(table)
        at = table.column_names.index(name)
        pq.write_table(table.set_column(at, name, pa.array(cells)), path)
    read = LeRobotFolder(copy)
    with pytest.raises(UserError, match=r"reach of the robot in 'pick .*; --trust_pictures trains"):
        prove_pictures([read])


def test_without_a_renderer_it_is_said_and_trained(lerobot_dataset, monkeypatch, capfd):
    """On a machine that cannot render, the stated check of opening the dataset has to do."""
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    prove_pictures([LeRobotFolder(lerobot_dataset)])
    told = capfd.readouterr().out
    assert "not compared with the simulator's pictures: MUJOCO_GL=glfw" in told
