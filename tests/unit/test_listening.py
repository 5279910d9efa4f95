"""study.listening: whether answers depend on the sentence."""

import json
import shlex

import pytest
import torch
from conftest import ELSEWHERE, SIZE, write_task
from test_contract import small_config

from data import WaypointDataset
from data_ar import WindowDataset
from formats.demos import told_otherwise
from formats.mixture import open_mixture
from harness import checkpoint
from harness.validation import decision_frames, looks
from nets.text import reader_of, vocabulary_of
from registry import look_up
from runtime import UserError
from study import listening


def told_policy(name, dataset, backbone, cache, n):
    """An untrained policy that can be told of a dataset's sentences, and its first n demonstrations
    as samples."""
    entry, demos = look_up(name), open_mixture([dataset], SIZE).demos
    words = vocabulary_of({demo.instruction for demo in demos})
    config = small_config(entry, text="learned", vocabulary=words, image_size=SIZE)
    reader = reader_of(config)
    torch.manual_seed(0)
    policy = entry.policy(config, backbone.channels).attach(backbone, reader)
    kind = WindowDataset if config.has_history else WaypointDataset
    data = kind(demos[:n], config, backbone, 4, cache, False, reader)
    policy.fit_statistics(data.statistics())
    return policy.eval(), data


@pytest.fixture
def deaf(both, backbone, tmp_path):
    """An untrained PARA that could be told of both blobs: its FiLM begins as the identity."""
    return told_policy("para", both, backbone, tmp_path, 4)[0]


def heard(policy):
    """The same policy, whose FiLM says something."""
    with torch.no_grad():
        for p in policy.film.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return policy


def test_a_policy_that_does_not_listen_answers_alike(both, deaf):
    """Nothing is apart, and right is wrong; once the sentence has a say, it is so no longer. Each
    sentence is a row, with its own demonstrations.
    """
    demos = open_mixture([both], SIZE).demos[:4]
    rows = listening.listen(deaf, demos, 3)
    assert [(row["told"], row["n_demos"]) for row in rows] == sorted(
        [(demos[0].instruction, 2), (ELSEWHERE, 2)]
    )
    for row in rows:
        assert row["instead"] in {row["told"] for row in rows} - {row["told"]}
        assert -1 <= row["cosine"] < 0.999  # by an encoder that is not trained, they differ
        assert row["apart"] == 0 and row["right"] == row["wrong"] > 0
    for row in listening.listen(heard(deaf), demos, 3):
        assert row["apart"] > 0.5 and row["right"] != row["wrong"]


def test_the_answers_are_those_to_the_sentence(both, deaf):
    """Where nothing is said in its stead, a demonstration's own sentence is."""
    demo = open_mixture([both], SIZE).demos[0]
    policy = heard(deaf)
    frames = decision_frames(demo, policy.config)[0][:2]
    images = list(demo.images(frames))
    own, other = (
        listening.answers(policy, demo, words, frames, images) for words in (None, ELSEWHERE)
    )
    found = listening.distances(policy, demo, ELSEWHERE, 2)
    apart = torch.tensor(own - other)[:, :2].norm(dim=-1)
    assert torch.allclose(torch.tensor(found["apart"]), apart) and apart.min() > 0


def test_scenes_of_one_sentence_are_not_asked(both, suite):
    """What they would be told instead no demonstration of theirs shows."""
    demos = open_mixture([both], SIZE).demos
    assert told_otherwise(demos[:4]) == {0: 1, 1: 0, 2: 1, 3: 0}
    assert told_otherwise(demos[::2]) == told_otherwise(open_mixture([suite]).demos) == {}


def test_tasks_of_one_scene_are_asked_against_each_other(tmp_path):
    """LIBERO-Goal's ten share their first picture, so that only the sentence tells them apart;
    those of other suites have scenes of their own.
    """
    for task in (0, 2):
        write_task(tmp_path, task, 2, task_suite="libero_goal")
    demos = open_mixture([tmp_path], SIZE).demos
    assert told_otherwise(demos) == {0: 2, 1: 2, 2: 0, 3: 0}


@pytest.mark.parametrize("name", ["para", "autoregressive"])
def test_validation_says_who_is_deaf(name, both, suite, backbone, tmp_path):
    """The share of demonstrations whose first answer no other sentence moves: all of them where the
    sentence has no say, few once it has. A figure of scenes with several sentences alone.
    """
    policy, dataset = told_policy(name, both, backbone, tmp_path, 4)
    with torch.no_grad():
        for p in policy.text.parameters():
            p.zero_()  # whatever is said
        assert looks(policy, dataset, "cpu", limit=6)["deaf_share"] == 1
        for p in policy.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        assert looks(policy, dataset, "cpu", limit=6)["deaf_share"] < 1
    policy, dataset = told_policy(name, suite, backbone, tmp_path, 2)
    assert "deaf_share" not in looks(policy, dataset, "cpu", limit=6)


def test_the_command_asks_held_out_demonstrations(both, suite, deaf, tmp_path, capsys):
    """The table and the file have each sentence, of demonstrations that training held out. A policy
    that is told nothing, and data of one sentence a scene, are refused.
    """
    path = tmp_path / "mine" / "checkpoint.safetensors"
    info = {"args": {"val_fraction": 0.25}, "backbone_asked": deaf.config.backbone}
    checkpoint.save_policy(path, deaf, "para", info)
    out = tmp_path / "listening.json"
    command = f"--ckpt {path} --dataset"
    listening.main(shlex.split(f"{command} {both} --first 2 --out {out}"))
    rows = json.loads(out.read_text())["rows"]["mine"]
    assert [row["n_demos"] for row in rows] == [2, 2]
    shown = capsys.readouterr().out
    assert f"| mine | libero_spatial_0 | {ELSEWHERE} | 2 |" in shown
    assert f"| mine | all |  | 4 | {(rows[0]['right'] + rows[1]['right']) / 2:.1f} |" in shown
    with pytest.raises(UserError, match="no scene has demonstrations of two sentences"):
        listening.main(shlex.split(f"{command} {suite}"))
    silent = look_up("para").policy(small_config(look_up("para")), deaf.backbone.channels)
    checkpoint.save_policy(path, silent.attach(deaf.backbone), "para", info)
    with pytest.raises(UserError, match="told nothing"):
        listening.main(shlex.split(f"{command} {both}"))
