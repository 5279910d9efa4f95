"""Datasets, checkpoints and results say which simulator they come from, and a change of MuJoCo
between them is reported.
"""

import json
import re
import subprocess

import pytest
from helpers import ROOT

import runtime
from eval import where_run
from formats import demos, smith300
from harness.records import demos_simulator, simulator_changes
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
    assert demos_simulator(info)["mujoco"] == found


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
    """A row without a checkpoint names simulator and commit alone, without a warning."""
    assert set(where_run({})) == {"simulator", "commit"} and not capsys.readouterr().out


@pytest.mark.parametrize(
    "theirs, warned",
    [
        ("NVIDIA H100 80GB HBM3/PCIe/SSE2", True),
        ("llvmpipe (LLVM 19.1.1, 512 bits)", False),
        (None, False),
    ],
)
def test_evaluating_on_another_renderer_is_said(theirs, warned):
    """Images drawn by a GPU differ a little from those of Mesa on a CPU: both names are said, and
    nothing is refused. Another version of the same renderer is not reported.
    """
    ours = {"mujoco": "3.3.2", "renderer": "llvmpipe (LLVM 15.0.6, 256 bits)"}
    versions = {"mujoco": "3.3.2"}
    found = demos_simulator({"dataset": {"versions": versions, "renderer": theirs}})
    sentences = simulator_changes(found, ours)
    assert len(sentences) == warned
    assert not warned or theirs in sentences[0] and ours["renderer"] in sentences[0]


def test_a_replay_names_the_renderer_of_its_images():
    """The physics of a replay is its source's, its images are its own."""
    ours, theirs = {"mujoco": "3.3.2", "renderer": "llvmpipe"}, {"mujoco": "2.3.7"}
    attributes = {"versions": json.dumps(ours), "replayed_versions": json.dumps(theirs)}
    assert demos.drawn_by(attributes) == "llvmpipe"
    assert demos.drawn_by({"versions": ours}) == "llvmpipe" and demos.drawn_by({}) is None


def test_no_result_names_a_place_of_its_machine():
    """Commands and tracebacks are read elsewhere, where such a path says nothing."""
    place = re.compile(r"(?<![\w.])/(work|tmp|home|root|mnt|opt)/")
    # what is committed: a user's own results may say where they were made
    listed = ["git", "ls-files", "results", "docs", "checkpoints"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    texts = [name for name in names if name.endswith((".json", ".jsonl", ".md"))]
    if not texts:
        pytest.skip("no checkout of git")
    assert [name for name in texts if place.search((ROOT / name).read_text())] == []


def test_a_copy_names_the_commit_that_it_was_told(monkeypatch):
    """On a machine that got the files alone, results would be of an unknown commit, and among
    another history of that one's: 24 trainings were."""
    monkeypatch.setenv("PARA_COMMIT", "8a1265d012")
    monkeypatch.setattr(runtime, "_git", lambda *words: "d071b474c7")
    assert runtime.git_commit.__wrapped__() == "8a1265d012"

    def no_checkout(*words):
        raise subprocess.CalledProcessError(128, words)

    monkeypatch.setattr(runtime, "_git", no_checkout)
    assert runtime.git_commit.__wrapped__() == "8a1265d012"
    monkeypatch.delenv("PARA_COMMIT")
    assert runtime.git_commit.__wrapped__() == "unknown"
