"""Several tasks in one evaluation: whose sentence is said, each task's flags, and the whole."""

import argparse
import json

import pytest
from evaluations import episode

from eval import build_parser
from harness.summary import summarise
from runtime import UserError, append_jsonl, write_json
from sim import instructions
from sim.tasks import chosen_tasks, find_task
from study import suites

SPATIAL = "libero_spatial"


def flags(words=""):
    return build_parser().parse_args(words.split())


@pytest.mark.parametrize("index, other", list(enumerate([1, 6, 8, 9, 9, 3, 7, 9, 1, 7])))
def test_every_scene_has_a_second_bowl_that_another_sentence_names(index, other):
    """Each scene of LIBERO-Spatial has a bowl that stands where another task's does."""
    task = find_task(SPATIAL, index)
    said = instructions.spoken(flags("--instruction_of other"), task)
    assert said == {
        "instruction": find_task(SPATIAL, other).language,
        "named": "akita_black_bowl_2",
    }
    assert instructions.named_object(task, task) == "akita_black_bowl_1"
    assert instructions.spoken(flags(f"--instruction_of {index}"), task)["named"][-1] == "1"


def test_of_different_things_the_sentence_names_the_one_of_its_kind():
    """In LIBERO-Object a thing is named by what it is, wherever it lies."""
    task = find_task("libero_object", 0)
    said = instructions.spoken(flags("--instruction_of other"), task)
    assert said["named"].rstrip("_1") in said["instruction"].replace(" ", "_")
    assert said["named"] != "alphabet_soup_1"


def test_sentences_that_say_nothing_there_are_refused():
    """One that names nothing in the scene, two at once, and listeners that do not listen."""
    with pytest.raises(UserError, match="--instruction_of 4: 'pick up .*drawer.* names nothing"):
        instructions.spoken(flags("--instruction_of 4"), find_task(SPATIAL, 0))
    both = flags("--instruction_of 4 --instruction x")
    told, deaf = {"text": "learned"}, {"text": "auto"}
    with pytest.raises(UserError, match="give one of them"):
        instructions.check(both, told)
    one = flags("--instruction x --ckpt a.safetensors")
    with pytest.raises(UserError, match="a.safetensors was trained without instructions"):
        instructions.check(one, deaf)
    with pytest.raises(UserError, match="--policy oracle listens to nothing"):
        instructions.check(flags("--instruction x --policy oracle"), None)
    # several things at once are no single object's: counted by one of them, half a task would do
    for asked in ("0", "other"):
        words = f"--instruction_of {asked}"
        with pytest.raises(UserError, match="asks for several things|names another object"):
            instructions.spoken(flags(words), find_task("libero_10", 1))
    instructions.check(one, told)
    with pytest.raises(UserError, match="neither a task's number nor other"):
        flags("--instruction_of bowl")
    assert instructions.spoken(one, None) == {"instruction": "x"}


@pytest.mark.parametrize(
    "suite, words, steps, kept",
    [
        (SPATIAL, "", 280, True),
        ("libero_goal", "", 300, False),
        (SPATIAL, "--max_steps 99 --no-zero_rotation", 99, False),
    ],
)
def test_steps_and_orientation_are_the_tasks_own(suite, words, steps, kept, tmp_path):
    """Published steps of each suite, and the start's orientation in tasks whose demonstrations
    keep it, unless flags say otherwise.
    """
    info = {"turned": {f"{SPATIAL}_2": 9.0, "libero_goal_2": 60.0}}
    one = suites.of_one(flags(words), find_task(suite, 2), tmp_path, info)
    assert (one.max_steps, bool(one.zero_rotation), one.n_videos) == (steps, kept, 1)
    assert (one.task_suite, one.task_id, one.out) == (suite, 2, tmp_path / f"{suite}_2")
    # of a checkpoint that does not say how its demonstrations turn, as of one task alone
    assert suites.of_one(flags(), find_task(suite, 3), tmp_path, info).zero_rotation is None


def write_task(args, network):
    """What an evaluation of one task leaves: of task 2 nobody succeeds, task 3 fails."""
    if args.task_id == 3:
        raise UserError("no room there")
    went = {"instruction": "x", "named": "b", "first_touched": "a", "first_lifted": "b"}
    rows = []
    for i in range(3 + args.task_id):
        won = args.task_id == 1 and i != 0
        row = {**episode(i, "benchmark", won, won, False), "third_difference_mm": 1.0}
        # lifted decides before touched
        rows.append({**row, **went, "first_lifted": ("b", "c", None)[i % 3]})
        append_jsonl(args.out / "episodes.jsonl", rows[-1])
    given = {"variant": "task", "split": None, "clean_scene": None}
    asked = argparse.Namespace(**{**vars(args), **given})
    write_json(args.out / "summary.json", summarise(rows, asked, {}))
    args.n_episodes = len(rows)


def test_the_whole_is_that_of_its_episodes(tmp_path, capsys):
    """The table has every task and all of them together, with intervals; a task that fails does
    not end the others, and is said at the end.
    """
    args = flags(f"--policy blind --task_suite {SPATIAL} --task_ids 1,2,3 --out {tmp_path}/all")
    with pytest.raises(UserError, match="1 of 3 tasks failed, first libero_spatial_3: no room"):
        suites.evaluate(args, None, write_task)
    summary = json.loads((tmp_path / "all" / "suite.json").read_text())
    assert (summary["n"], summary["success"], summary["steps"]) == (9, 3, 280)
    assert [(c["task"], c["success"], c["n"]) for c in summary["tasks"]] == [
        ("libero_spatial_1", 3, 4),
        ("libero_spatial_2", 0, 5),
    ]
    assert summary["mean_of_tasks"] == pytest.approx(0.375)
    assert (summary["missing"], summary["crashes"]) == ([f"{SPATIAL}_3"], 0)
    # what was said in the episodes, not the scene's own sentence
    assert {c["instruction"] for c in summary["tasks"]} == {"x"}
    low, high = summary["success_interval"]
    assert low < 3 / 9 < high
    # lifted b, c, nothing (touched a), b | b, c, nothing, b, c
    assert [c["went_to_named"] for c in summary["tasks"]] == [2, 2]
    printed = capsys.readouterr().out
    assert "| all |  | 9 | 33% (" in printed and "mean of the tasks 37.5%" in printed
    page = (tmp_path / "all" / "report.html").read_text()
    assert "tasks that failed: libero_spatial_3" in page and "went to the named object" in page


def test_episodes_beyond_those_asked_for_do_not_count(tmp_path):
    """A folder holds more of one task where an earlier run in it asked for more."""

    def two(args, network):
        write_task(args, network)
        args.n_episodes = 2  # as eval.py fills it in

    args = flags(f"--policy blind --task_suite {SPATIAL} --task_ids 1,2 --out {tmp_path}/all")
    suites.evaluate(args, None, two)
    summary = json.loads((tmp_path / "all" / "suite.json").read_text())
    assert [(c["success"], c["n"]) for c in summary["tasks"]] == [(1, 2), (0, 2)]
    assert (summary["success"], summary["n"]) == (1, 4)


def test_the_whole_is_of_all_that_the_folder_has(tmp_path):
    """A further command in it, for one task more, leaves no smaller table behind."""
    words = f"--policy blind --task_suite {SPATIAL} --out {tmp_path}/all --task_ids"
    suites.evaluate(flags(f"{words} 1,2"), None, write_task)
    suites.evaluate(flags(f"{words} 4"), None, write_task)
    summary = json.loads((tmp_path / "all" / "suite.json").read_text())
    assert [c["task"][-1] for c in summary["tasks"]] == ["1", "2", "4"]
    assert summary["n"] == 4 + 5 + 7
    # but for what another policy did there
    write_json(tmp_path / "all" / f"{SPATIAL}_1" / "settings.json", {"policy": "oracle"})
    suites.evaluate(flags(f"{words} 5"), None, write_task)
    summary = json.loads((tmp_path / "all" / "suite.json").read_text())
    assert [c["task"][-1] for c in summary["tasks"]] == ["2", "4", "5"]


def test_fewer_episodes_are_fewer_of_every_task(tmp_path):
    """Of one task five and of the others all would be a rate of neither. Crashed ones are said."""

    def two(args, network):
        write_task(args, network)
        summary = json.loads((args.out / "summary.json").read_text())
        write_json(args.out / "summary.json", {**summary, "crashes": 1})

    words = f"--policy blind --task_suite {SPATIAL} --out {tmp_path}/all --task_ids"
    suites.evaluate(flags(f"{words} 1,2"), None, write_task)
    suites.evaluate(flags(f"{words} 4 --n_episodes 2"), None, two)
    summary = json.loads((tmp_path / "all" / "suite.json").read_text())
    assert [c["n"] for c in summary["tasks"]] == [2, 2, 7]  # task 4 says how many it has
    assert summary["crashes"] == 1 and suites.lacks(summary) == "left out: 1 episodes crashed"


def test_one_task_or_several(tmp_path):
    """Both flags at once would leave open which is meant."""
    args = flags(f"--policy blind --task_id 1 --task_ids 1 --out {tmp_path}")
    with pytest.raises(UserError, match="--task_id and --task_ids: give one of them"):
        suites.evaluate(args, None, write_task)


def test_all_leaves_out_what_a_layout_does_not_move(capsys):
    """Drawer and stove are no objects: these tasks' shifted episodes would be the benchmark's."""
    tasks = chosen_tasks("libero_goal")
    left = [task.index for task in suites.without_unmoved("shifted", tasks)]
    assert left == [1, 2, 3, 4, 5, 6, 8, 9]
    assert "libero_goal_7: left out, 'turn on the stove'" in capsys.readouterr().out
    assert suites.without_unmoved("benchmark", tasks) == tasks
    with pytest.raises(UserError, match="--layout shifted: no task"):
        suites.without_unmoved("shifted", [tasks[0]])
