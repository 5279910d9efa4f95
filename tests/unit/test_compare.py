"""compare.py: reads results of eval.py, LeRobot and CSV, pairs them, and refuses bad input."""

import json

import numpy as np
import pytest
from evaluations import write_evaluation
from helpers import ROOT
from PIL import Image

import compare
from harness import statistics
from harness.outcomes import read_lerobot, read_runs, suite_and_layout
from runtime import UserError, append_jsonl, write_json

EVALS = ROOT / "results" / "matrix" / "evals"


def compared(tmp_path, *words):
    """The JSON that compare.py writes."""
    compare.main([*map(str, words), "--json", str(tmp_path / "found.json")])
    return json.loads((tmp_path / "found.json").read_text())


def lerobot(path, successes, group="libero_spatial", number=0):
    """An eval_info.json as lerobot-eval writes it."""
    metrics = {"sum_rewards": [0.0] * len(successes), "successes": successes, "video_paths": []}
    task = {"task_group": group, "task_id": number, "metrics": metrics}
    overall = {"pc_success": 100 * float(np.mean(successes)), "n_episodes": len(successes)}
    write_json(path, {"per_task": [task], "per_group": {group: overall}, "overall": overall})
    return path


def sheet(path, text):
    path.write_text(text)
    return path


# -- numbers


def test_committed_results_compare_as_the_matrix_says(tmp_path):
    """B against PARA, two seeds each: numbers of results/matrix/table.json, found anew."""
    table = json.loads((EVALS.parent / "table.json").read_text())["cells"]
    cell = next(
        c for c in table if (c["row"], c["layout"]) == ("b", "viewpoint") and not c["otherwise"]
    )
    words = [f"PARA={EVALS}/para-viewpoint-s*", f"B={EVALS}/b-viewpoint-s*"]
    for metric, expected in (
        ("success", cell["success"]),
        ("success_280", cell["success"]["early"]),
    ):
        _, b = compared(tmp_path, *words, "--metric", metric)["results"]
        assert b["rate"] == pytest.approx(expected["rate"])
        np.testing.assert_allclose(b["interval"], expected["interval"], atol=0.02)
        pair, other = b["against"], expected["against_reference"]
        for key in ("n", "better", "worse", "difference", "p"):
            assert pair[key] == pytest.approx(other[key]), key
        assert list(pair["by_seed"]) == ["0", "1"]


def test_episodes_pair_with_lerobots_by_init_state(tmp_path, capsys):
    """LeRobot's tenth episode is our tenth of the benchmark: pairs, by hand 3 won and 1 lost.

    Against our shifted layout, which LeRobot has not seen, nothing pairs.
    """
    ours = np.array([1, 1, 1, 1, 0, 1, 1, 1, 1, 1], bool)
    theirs = [True, False, False, False, True, True, True, True, True, True]
    folder = write_evaluation(tmp_path, "para-benchmark-s0", ours)
    write_json(folder / "settings.json", {"task_suite": "libero_spatial", "task_id": "0"})
    file = lerobot(tmp_path / "eval_info.json", theirs)
    pair = compared(tmp_path, f"L={file}", folder)["results"][1]["against"]
    assert (pair["paired"], pair["n"], pair["better"], pair["worse"]) == (True, 10, 3, 1)
    assert pair["p"] == statistics.mcnemar(3, 1)
    shifted = write_evaluation(tmp_path, "para-shifted-s0", ours)
    write_json(shifted / "settings.json", {"task_suite": "libero_spatial", "task_id": "0"})
    found = compared(tmp_path, f"L={file}", shifted)
    pair = found["results"][1]["against"]
    assert not pair["paired"] and pair["p"] == statistics.fisher(9, 10, 7, 10)
    np.testing.assert_allclose(pair["interval"], statistics.newcombe(9, 10, 7, 10))
    assert any("layout (shifted, benchmark)" in note for note in found["notes"])


def test_a_csv_file_pairs_by_its_columns(tmp_path):
    """Columns in any order and under any accepted name; rows in any order."""
    one = sheet(tmp_path / "one.csv", "init_state;Success\n2;1\n1;0\n3;true\n")
    two = sheet(tmp_path / "two.csv", "success,episode,who\nno,3,x\n1,1,x\n1,2,x\n")
    pair = compared(tmp_path, one, two)["results"][1]["against"]
    assert (pair["n"], pair["better"], pair["worse"]) == (3, 1, 1)
    bare = sheet(tmp_path / "bare.csv", "success\n1\n1\n0\n")
    pair = compared(tmp_path, one, bare)["results"][1]["against"]
    assert not pair["paired"] and "no episode or init state" in pair["why"]


def test_training_seeds_in_one_csv_file_are_bootstrapped(tmp_path):
    """train_seed makes several runs: the interval is that over seeds and episodes."""
    rows = [f"{s},{i},{int(i < wins)}" for s, wins in ((0, 2), (1, 8)) for i in range(10)]
    file = sheet(tmp_path / "a.csv", "\n".join(["train_seed,episode,success", *rows]))
    other = sheet(tmp_path / "b.csv", "success\n" + "1\n0\n" * 5)
    found = compared(tmp_path, file, other)["results"]
    assert found[0]["by_seed"] == {"0": 0.2, "1": 0.8}
    assert found[0]["interval"][0] <= 0.2 and found[0]["interval"][1] >= 0.8
    # the difference of the unpaired ones reaches as far
    low, high = found[1]["against"]["interval"]
    assert low < -0.3 and high > 0.3


def test_protocols_that_differ_are_named(tmp_path):
    """The committed row under another simulator: a line says which, and nothing else differs."""
    found = compared(
        tmp_path, EVALS / "para-shifted-s0", ROOT / "results" / "mujoco_3.3.2" / "para_shifted"
    )
    assert found["notes"] == ["para_shifted and para-shifted-s0 differ in mujoco (3.3.2, 3.17.0)"]


def test_three_results_are_adjusted_and_drawn(tmp_path, capsys):
    """Holm over both comparisons, the reference by name, and a picture."""
    words = [EVALS / f"{row}-shifted-s0" for row in ("a_pointer", "act", "para")]
    out = tmp_path / "rates.png"
    rows = compared(tmp_path, *words, "--reference", "para-shifted-s0", "--out", out)["results"]
    assert [r["name"].split("-")[0] for r in rows] == ["para", "a_pointer", "act"]
    pointer, act = (r["against"] for r in rows[1:])
    assert act["p_holm"] == pytest.approx(2 * act["p"]) and pointer["p_holm"] == pointer["p"]
    with Image.open(out) as image:
        assert 500 < image.width < 1000
    assert "| act-shifted-s0 | 50 | 0% (0-7) | -92 (" in capsys.readouterr().out


# -- runs that are still going


def test_a_run_that_is_still_going_is_read_up_to_its_first_gap(tmp_path, capsys):
    """Episode 6 is not finished while 7 to 9 are: only pairs before it count, as quick episodes
    overtake. A crashed one is no gap.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, won, missing in ((one, True, 6), (two, False, None)):
        for i in (7, 8, 9, *range(7)):
            if i == 2 and folder == one:
                append_jsonl(folder / "episodes.jsonl", {"episode": i, "crash": "boom"})
            elif i != missing:
                append_jsonl(folder / "episodes.jsonl", {"episode": i, "success": won})
    found = compared(tmp_path, two, one, "--sequential")["results"][1]["against"]
    # 0, 1, 3, 4, 5
    assert (found["n"], found["sequential"]["unequal"], found["sequential"]["won"]) == (8, 5, 5)
    assert found["sequential"]["e"] == pytest.approx(2**5 / 6)
    assert "one: go on" in capsys.readouterr().out
    append_jsonl(one / "episodes.jsonl", {"episode": 6, "success": True})
    found = compared(tmp_path, two, one, "--sequential")["results"][1]["against"]["sequential"]
    assert found["e"] == pytest.approx(2**9 / 10)
    assert "one: may stop, one is better" in capsys.readouterr().out


# -- bad input


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("a.csv", "won,episode\n1,1\n", "no column 'success'"),
        ("a.csv", "success,episode\nmaybe,1\n", "line 2: success is 'maybe'"),
        ("a.csv", "success,episode\n1,1\n0,1\n", "line 3: repeats episode 1"),
        ("a.csv", "success\n", "no finished episode"),
        ("a.csv", "", "no column 'success'"),
        ("a.csv", b"\xff\xfe\x00", "UTF-8"),
        ("eval_info.json", "{}", "per_task"),
        (
            "eval_info.json",
            '{"per_task": [{"task_group": "x", "task_id": 0, "metrics": {}}]}',
            "succ",
        ),
        ("episodes.jsonl", '{"episode": 1}\n', "success"),
        ("episodes.jsonl", "", "no finished episode"),
        ("a.txt", "1", "episodes.jsonl, eval_info.json or .csv"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, name, text, said):
    """Each names the file and what is wrong."""
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said) as error:
        read_runs(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_bad_words_are_refused_in_one_sentence(tmp_path):
    """What cannot be compared is said before anything is computed."""
    a = str(EVALS / "para-shifted-s0")
    c, d = (str(EVALS / f"para-viewpoint-s{seed}") for seed in (0, 1))
    for words, said in (
        ([a], "two or more"),
        ([a, a], "called para-shifted-s0"),
        ([a, "runs/nowhere"], "runs/nowhere"),
        ([a, f"B={a}", "--reference", "C"], "--reference C"),
        ([a, f"B={a}", "--out", "x.jpg"], "x.jpg"),
        ([a, f"B={tmp_path}"], "neither episodes.jsonl"),
        ([a, f"B={c},{d}", "--sequential"], "have several seeds"),
    ):
        with pytest.raises(UserError, match=said):
            compare.main(words)


def test_a_metric_that_a_file_lacks_is_refused(tmp_path):
    """LeRobot's file has no steps: no success within 280 of them can be made up."""
    file = lerobot(tmp_path / "eval_info.json", [True, False])
    with pytest.raises(UserError, match="first_success.*success_280"):
        compare.main([str(EVALS / "para-shifted-s0"), str(file), "--metric", "success_280"])


def test_lerobots_older_file_is_read(tmp_path):
    """Its per_episode rows, with seeds."""
    rows = [{"episode_ix": i, "success": i > 0, "seed": 100 + i, "sum_reward": 0} for i in range(3)]
    write_json(tmp_path / "eval_info.json", {"per_episode": rows, "aggregated": {}})
    (run,) = read_runs(tmp_path)
    assert list(run.won("success").values()) == [False, True, True]
    assert run.fields() == {"episode", "seed"}


def test_episodes_of_the_calibrated_environment_pair_by_layout():
    """What lerobot-eval wrote of our layouts, committed, against eval.py's rows of the same."""
    for layout in ("benchmark", "shifted"):
        (run,) = read_lerobot(ROOT / "results" / "lerobot_eval" / f"{layout}.json")
        keys = {("libero_spatial/0", layout, i) for i in range(20)}
        assert {(k.task, k.layout, k.episode) for k in run.episodes} == keys
    # a suite of LIBERO-PRO is no layout
    assert suite_and_layout("libero_spatial_swap") == ("libero_spatial_swap", None, 0)
    assert suite_and_layout("libero_10_val_shifted") == ("libero_10", "val_shifted", 0)
    # and has layouts of its own in ours
    swapped = ("libero_spatial_swap", "benchmark", 50)
    assert suite_and_layout("libero_spatial_swap_benchmark_from50") == swapped
    assert suite_and_layout("libero_object_object_shifted")[:2] == (
        "libero_object_object",
        "shifted",
    )


def test_episodes_of_another_sentence_are_another_protocol(tmp_path):
    """Goal and judged object differ: equal rates would be of two tasks."""
    a, b = (suite(tmp_path / name, [1, 1]) for name in "ab")
    for path in b.glob("*/settings.json"):
        write_json(path, {**json.loads(path.read_text()), "instruction_of": "other"})
    notes = compared(tmp_path, a, b)["notes"]
    assert any("instruction_of" in note for note in notes)


def test_episodes_that_begin_later_keep_their_numbers(tmp_path):
    """--env.first_episode=50: the first row is episode 50, and pairs with nothing before it."""
    file = lerobot(tmp_path / "eval_info.json", [True, False], "libero_spatial_shifted_from50")
    (run,) = read_lerobot(file)
    assert [(k.layout, k.episode) for k in run.episodes] == [("shifted", 50), ("shifted", 51)]
    assert "init_states" not in run.protocol


def test_what_lerobots_file_does_not_say_is_said(tmp_path, capsys):
    """Its own environment's init states are the benchmark's, or drawn: a reader has to know."""
    file = lerobot(tmp_path / "eval_info.json", [True, False])
    folder = write_evaluation(tmp_path, "para-benchmark-s0", [True, True])
    write_json(folder / "settings.json", {"task_suite": "libero_spatial", "task_id": "0"})
    notes = compared(tmp_path, f"L={file}", folder)["notes"]
    assert any("--env.init_states=false" in note for note in notes)


def test_numbers_replace_no_result(tmp_path):
    """--json over one of the files that are compared would lose it; over its own it may."""
    a, b = sheet(tmp_path / "a.csv", "success\n1\n"), suite(tmp_path / "b", [1])
    settings = b / "task_0" / "settings.json"
    kept = settings.read_text()
    with pytest.raises(UserError, match="settings.json: is another command's file"):
        compare.main([str(a), str(b), "--json", str(settings)])
    assert settings.read_text() == kept
    with pytest.raises(UserError, match="no name that ends in .json"):
        compare.main([str(a), str(b), "--json", str(a)])
    compared(tmp_path, a, b)
    compared(tmp_path, a, b)


def test_tasks_are_no_seeds(tmp_path):
    """A suite's tasks, of one training, are one run: the interval is over episodes, as Wilson's.
    Two trainings of them are two. Named by its folder, or task by task.
    """
    suites = ROOT / "results" / "suites"
    a, b = (suites / f"para_spatial_stride8-s{seed}" / "benchmark" for seed in (0, 2))
    one, two = compared(tmp_path, f"A={a}", f"B={b}/libero_spatial_*")["results"]
    assert (one["n"], one["won"], two["n"], two["won"]) == (500, 500, 500, 491)
    assert list(one["by_seed"]) == ["0"] and list(two["by_seed"]) == ["2"]
    np.testing.assert_allclose(two["interval"], statistics.wilson(491, 500))
    pair = two["against"]
    assert (pair["n"], pair["better"], pair["worse"]) == (500, 0, 9)
    both = compared(tmp_path, f"A={a},{b}", f"B={b}")["results"][0]
    assert (both["n"], list(both["by_seed"])) == (1000, ["0", "2"])


def seeded(path, runs):
    """A CSV file of {train_seed or "": [won]}."""
    rows = [f"{s},{i},{int(w)}" for s, won in runs.items() for i, w in enumerate(won)]
    return sheet(path, "\n".join(["train_seed,episode,success", *rows]))


def suite(folder, won, tasks=(0, 2, 10), crashed=()):
    """Evaluations of several tasks by nobody knows which training, as they are while they run; of
    `crashed` each episode crashed.
    """
    for number in (*tasks, *crashed):
        for i, success in enumerate(won):
            row = {"episode": i, "layout": "benchmark"}
            row |= {"crash": "boom"} if number in crashed else {"success": bool(success)}
            append_jsonl(folder / f"task_{number}" / "episodes.jsonl", row)
        settings = {"task_suite": "libero_90", "task_id": str(number), "layout": "benchmark"}
        write_json(folder / f"task_{number}" / "settings.json", settings)
    return folder


def test_two_suites_by_nobody_knows_whom_are_two_trainings(tmp_path):
    """Each is one run of all its tasks; tasks are no seeds here either."""
    a, b = suite(tmp_path / "a", [1, 1, 0]), suite(tmp_path / "b", [1, 0, 0])
    both, _ = compared(tmp_path, f"A={a},{b}", suite(tmp_path / "c", [1, 1, 1]))["results"]
    assert (both["n"], both["won"], list(both["by_seed"])) == (18, 9, ["0", "1"])


def test_a_suite_is_read_while_it_runs_and_where_a_task_only_crashed(tmp_path):
    """suite.json comes last; a task without a scored episode is counted as crashes."""
    folder = suite(tmp_path / "a", [1, 0], crashed=[3])
    found = compared(tmp_path, folder, suite(tmp_path / "b", [1, 1]))
    assert found["results"][0]["n"] == 6
    assert "a: 2 crashed episodes are not scored" in found["notes"]


def test_a_place_in_a_list_is_no_seed(tmp_path):
    """Runs whose seeds are known do not pair with those whose place in the list happens to be the
    same number.
    """
    known = seeded(tmp_path / "known.csv", {1: [1, 1], 2: [1, 0]})
    words = [seeded(tmp_path / f"{i}.csv", {"": [0, i]}) for i in range(2)]
    found = compared(tmp_path, known, f"B={words[0]},{words[1]}")["results"][1]["against"]
    assert not found["paired"] and "known on one side alone" in found["why"]


def test_a_seed_that_has_no_counterpart_is_named(tmp_path):
    """The difference is then of fewer runs than the rates beside it."""
    one = seeded(tmp_path / "one.csv", {0: [1, 1], 1: [1, 0], 2: [0, 0]})
    two = seeded(tmp_path / "two.csv", {1: [1, 1], 2: [1, 0], 3: [0, 0]})
    found = compared(tmp_path, one, two)
    assert list(found["results"][1]["against"]["by_seed"]) == ["1", "2"]
    assert any("seed 0, 3 is on one side alone" in note for note in found["notes"])


def test_seeds_that_have_not_come_equally_far_are_compared(tmp_path):
    """Episodes needed: from the share of unequal pairs by episode, as the difference is."""
    far, near = [1] * 60 + [0] * 40, [0] * 20
    one = seeded(tmp_path / "one.csv", {0: far, 1: near, 2: near})
    two = seeded(tmp_path / "two.csv", {0: [0] * 100, 1: near, 2: near})
    found = compared(tmp_path, one, two)["results"][1]["against"]
    assert found["episodes_needed"] > 0


def test_tasks_come_in_the_order_of_their_numbers(tmp_path):
    """Task 10 after task 2: both have finished 0 and 2, one of them 10."""
    a, b = suite(tmp_path / "a", [1, 1]), suite(tmp_path / "b", [0, 0], (0, 2))
    found = compared(tmp_path, a, b, "--sequential")["results"][1]["against"]
    assert found["sequential"]["unequal"] == 4


def test_an_episode_that_neither_run_has_is_a_gap(tmp_path):
    """It may be won by one of them later, and would come before those that are there."""
    for name, won in (("one", True), ("two", False)):
        for i in (0, 1, 3):
            append_jsonl(tmp_path / name / "episodes.jsonl", {"episode": i, "success": won})
    words = (tmp_path / "one", tmp_path / "two", "--sequential")
    found = compared(tmp_path, *words)["results"][1]["against"]
    assert found["sequential"]["unequal"] == 2
