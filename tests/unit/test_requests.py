"""Demonstrations of another task's sentence in a task's scene: which they are, what they say, how
they are divided and drawn. No simulator.
"""

import argparse

import pytest
from conftest import ELSEWHERE, SIZE, write_task

import collect_demos
import convert_demos
from data import WaypointDataset
from eval import build_parser
from formats.demos import split_demos
from formats.mixture import open_mixture
from harness.reference import protocol_references
from policy import PolicyConfig
from runtime import UserError
from sim import asked, instructions
from sim.tasks import find_task
from study.survey import table_row


def told(index, share):
    return [i for i in range(index) if instructions.is_told(i, share)]


def test_the_share_that_is_told_is_spread_evenly():
    """Every second demonstration by default, so that any first ones are of both kinds."""
    assert told(6, 0.5) == [1, 3, 5]
    assert told(8, 0.25) == [3, 7] and told(3, 1.0) == [0, 1, 2]
    assert len(told(48, 0.7)) == 33


def test_a_demonstration_says_its_own_sentence(both):
    """Without it the policy would be told of one bowl and shown the other."""
    found = open_mixture([both], SIZE)
    assert [d.instruction == ELSEWHERE for d in found.demos] == [False, True] * 8
    # the scene, by which a training frame is rendered again, is the same for both
    assert found.tasks == ["libero_spatial_0"]
    assert list(protocol_references(found.demos)) == list(protocol_references(found.demos[:1]))
    own = found.demos[0].instruction
    assert found.sentences == {"libero_spatial_0": [own, ELSEWHERE]}


def test_each_sentence_of_a_scene_is_held_out_and_drawn_alike(both, backbone, tmp_path):
    """Divided by task alone, one sentence could be trained on and never held out."""
    demos = open_mixture([both], SIZE).demos
    train, held = split_demos(demos, 0.15)
    assert [d.instruction == ELSEWHERE for d in held] == [False, True]
    # one of the other sentence is too few, whatever there is of the scene's own
    with pytest.raises(UserError, match=f"1 demonstration of task .*_0' told '{ELSEWHERE}'"):
        split_demos([*demos[::2], demos[1]])
    config = PolicyConfig(image_size=SIZE)
    dataset = WaypointDataset(train[:4], config, backbone, 4, tmp_path, progress=False)
    groups = dataset.samples_by_task()
    assert len(groups) == 2
    for d, samples in zip((0, 1), groups):
        assert set(dataset.demo[samples] % 2) == {d}


def test_a_lerobot_episode_keeps_its_sentence_and_its_scene(both, tmp_path):
    """The sentence is another task's, the scene is not."""
    out = tmp_path / "lerobot"
    convert_demos.main([str(both), "--out", str(out)])
    read = open_mixture([out], SIZE)
    assert [d.instruction == ELSEWHERE for d in read.demos] == [False, True] * 8
    assert read.tasks == ["libero_spatial_0"]
    another = write_task(tmp_path, 2, 2)
    with pytest.raises(UserError, match="instruction_of.*convert each by itself"):
        convert_demos.main([str(both), str(another), "--out", str(tmp_path / "mixed")])


def test_what_is_asked_for_is_where_the_sentence_s_own_task_puts_it():
    """Its object by this scene's name, its predicate and place."""
    spatial = instructions.request(find_task("libero_spatial", 7), "other")
    assert (spatial.task.index, spatial.goal) == (9, ("on", "akita_black_bowl_2", "plate_1"))
    bottle = instructions.request(find_task("libero_goal", 8), 2)
    assert bottle.goal == ("on", "wine_bottle_1", "wooden_cabinet_1_top_side")
    assert instructions.request(find_task("libero_goal", 8), None) is None
    with pytest.raises(UserError, match=r"a.hdf5: data/demo_0: attribute 'instruction_of' is 'x'"):
        where = "a.hdf5: data/demo_0"
        instructions.request_of(find_task("libero_goal", 8), {"instruction_of": "x"}, where)


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--instruction_share 1.5 --no-clean_scene", "--instruction_share 1.5"),
        ("--format smith300 --no-clean_scene", "a smith300 episode says no sentence"),
        ("--setting viewpoint", "give --no-clean_scene"),
        ("--instruction_of 4 --no-clean_scene", "names nothing in the scene"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_a_simulator_starts(words, sentence, tmp_path):
    out = tmp_path / "demos.hdf5"
    with pytest.raises(UserError, match=sentence):
        collect_demos.main(["--instruction_of", "other", *words.split(), "--out", str(out)])
    assert not out.with_name("demos.hdf5.parts").exists()


def test_a_scene_without_another_sentence_is_skipped_and_named(monkeypatch, tmp_path, capsys):
    """The other tasks' files are collected all the same."""

    def request(task, words, of=instructions.request):
        if task.index == 1:
            raise UserError("no sentence names another object")
        return of(task, words)

    collected = []
    monkeypatch.setattr(instructions, "request", request)
    record = lambda args, fewer: collected.append(args.task_id)
    monkeypatch.setattr(collect_demos, "collect_task", record)
    words = f"--task_ids 0,1,2 --instruction_of other --out {tmp_path}/all"
    collect_demos.main(words.split())
    assert collected == [0, 2]
    assert "libero_spatial_1: skipped, no sentence names another object" in capsys.readouterr().out


def test_folders_from_before_go_on(tmp_path):
    """Flags that were not there, and are not given, are no other settings."""
    parse = lambda words: collect_demos.build_parser().parse_args(words.split())
    plain = collect_demos.asked_of(parse(""), "3.3")
    assert not {"instruction_of", "instruction_share", "moved_anew"} & plain.keys()
    assert collect_demos.asked_of(parse("--instruction_of 2"), "3.3")["instruction_share"] == 0.5


def test_an_evaluation_that_judged_the_task_s_own_object_does_not_go_on():
    """Its rows count another success than those that would follow."""
    parse = lambda words: build_parser().parse_args([*words.split(), "--render", "exact"])
    assert "judged" not in asked.stamp_of(parse(""), {})
    assert asked.stamp_of(parse("--instruction_of other"), {})["judged"] == "named object"


def test_expert_and_oracle_can_be_told_and_blind_cannot():
    """The first two know the goal, the last repeats the task's own path."""
    flags = lambda policy, of=1, plus=None: argparse.Namespace(
        instruction=None, instruction_of=of, policy=policy, plus=plus
    )
    for policy in ("expert", "oracle", "remote"):
        instructions.check(flags(policy), None)
    with pytest.raises(UserError, match="--policy blind listens to nothing"):
        instructions.check(flags("blind"), None)
    # LIBERO-Plus's sentences
    for policy in ("expert", "oracle", "blind"):
        with pytest.raises(
            UserError, match=f"--plus language: --policy {policy} listens to nothing"
        ):
            instructions.check(flags(policy, None, "language"), None)
    with pytest.raises(UserError, match="--instruction_of and --plus language: give one of them"):
        instructions.check(flags("expert", 1, "language"), None)


def test_a_survey_says_which_sentence_was_followed():
    """Its row names the sentence and the object."""
    task = find_task("libero_spatial", 0)
    episode = {"success": True, "steps": 9, "released": True, "grasps": ["+y 0"], "outside": 0.0}
    row = table_row(task, [episode], instructions.said(task, "other"))
    assert row["named"] == "akita_black_bowl_2" and "next to the ramekin" in row["instruction"]
