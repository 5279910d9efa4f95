"""Datasets, checkpoints and results say which simulator they come from, and a change of MuJoCo
between them is reported.
"""

import json

import pytest

from eval import where_run
from formats import demos, smith300
from harness.records import demos_mujoco
from runtime import versions

OURS = versions()["mujoco"]


@pytest.mark.parametrize(
    "attributes, found",
    [
        ({"versions": json.dumps({"mujoco": "3.3.2"})}, "3.3.2"),
        ({"versions": {"mujoco": "3.3.2"}}, "3.3.2"),
        ({}, None),
        ({"versions": '{"mujoco": "3.3.2"}', "replayed_versions": '{"mujoco": "2.3.7"}'}, "2.3.7"),
        ({"versions": '{"mujoco": "3.3.2"}', "replayed_versions": "{}"}, None),
        ({"versions": "not JSON"}, None),
        ({"versions": "[1]"}, None),
    ],
)
def test_a_dataset_says_what_its_physics_was_simulated_with(attributes, found):
    """Datasets of both formats say it.

    A replay keeps its source's version, whatever rendered it anew.
    """
    assert demos.simulated_with(attributes).get("mujoco") == found


def test_a_folder_of_episodes_carries_versions(tmp_path):
    """dataset.json of the smith300 format holds the versions as they are written."""
    smith300.write_dataset_stamp(tmp_path, {"versions": {"mujoco": "3.3.2"}})
    assert demos.simulated_with(smith300.read_stamp(tmp_path / "dataset.json")) == {
        "mujoco": "3.3.2"
    }


@pytest.mark.parametrize(
    "info, found",
    [
        # older: what was installed when it was trained
        ({"versions": {"mujoco": "3.17.0"}, "dataset": {"task_id": "0"}}, "3.17.0"),
        (
            {"versions": {"mujoco": "3.3.2"}, "dataset": {"versions": {"mujoco": "3.17.0"}}},
            "3.17.0",
        ),
        ({"versions": {"mujoco": "3.3.2"}, "dataset": {"versions": {}}}, None),
        ({}, None),
    ],
)
def test_a_checkpoint_says_what_its_demonstrations_were_simulated_with(info, found):
    """The checkpoint names the dataset's version, not the one that was installed during
    training.
    """
    assert demos_mujoco(info) == found


@pytest.mark.parametrize(
    "theirs, warned",
    [("3.17.0", True), (None, True), (OURS, False), (OURS.rsplit(".", 1)[0] + ".99", False)],
)
def test_evaluating_under_another_mujoco_is_said(theirs, warned, capsys):
    """Another major.minor is reported: objects that stood still may slide.

    A patch release is not.
    """
    where = where_run({"dataset": {"versions": {"mujoco": theirs}}})
    assert where["demos_mujoco"] == theirs and f"mujoco {OURS}, robosuite " in where["simulator"]
    printed = capsys.readouterr().out
    assert printed.startswith("warning:") == warned and printed.count("\n") == warned
    assert not warned or (theirs or "unknown") in printed and OURS in printed


def test_the_expert_has_no_demonstrations(capsys):
    """A row without a checkpoint names the simulator alone, without a warning."""
    assert set(where_run({})) == {"simulator"} and not capsys.readouterr().out
