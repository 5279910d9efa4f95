"""The matrix's table: rates and paired tests from evaluations, as Markdown, picture and page."""

import json
import re
import shutil

import numpy as np
import pytest
from evaluations import outcomes, write_evaluation
from helpers import ROOT
from PIL import Image

import run_matrix
from figures import plots_rates
from harness.statistics import mcnemar, wilson
from runtime import UserError, append_jsonl
from study import matrix, matrix_plan, matrix_table
from study.matrix import RECIPES
from study.matrix_table import MARKS


@pytest.fixture
def results(tmp_path):
    """Evaluations: on one layout PARA with two seeds, B with one, and blind; on another layout
    B without PARA.
    """
    write_evaluation(tmp_path, "para-shifted-s0", outcomes(12), released=outcomes(10))
    write_evaluation(tmp_path, "para-shifted-s1", outcomes(14))
    write_evaluation(tmp_path, "b-shifted-s0", np.roll(outcomes(18), 2), crashes=1)
    write_evaluation(tmp_path, "blind-shifted", outcomes(0))
    write_evaluation(tmp_path, "b-position-s0", outcomes(5))
    append_jsonl(
        tmp_path / "nodes.jsonl",
        {"node": "train-b-in_dist-s0", "code": 0, "started": 1, "seconds": 90},
    )
    append_jsonl(
        tmp_path / "nodes.jsonl",
        {"node": "eval-b-shifted-s0", "code": 1, "started": 1, "seconds": 30},
    )
    return tmp_path


def table_of(folder):
    run_matrix.main(["--table", "--out", str(folder)])
    found = json.loads((folder / "table.json").read_text())
    return found, {(c["row"], c["layout"]): c for c in found["cells"]}


# -- numbers


def test_cells_pool_seeds_and_keep_them_apart(results):
    """n counts the episodes of all seeds.

    Crashed episodes are no failures, and every number comes from the rows.
    """
    found, cells = table_of(results)
    para, b = cells["para", "shifted"], cells["b", "shifted"]
    assert (para["n"], para["success"]["rate"], para["released"]["rate"]) == (
        40,
        pytest.approx(26 / 40),
        pytest.approx(24 / 40),
    )
    low, high = para["success"]["interval"]
    assert low <= wilson(26, 40)[0]
    assert high >= wilson(26, 40)[1]
    assert para["success"]["by_seed"] == {"s0": 0.6, "s1": 0.7}
    assert b["success"]["interval"] == list(wilson(18, 20))
    assert para["outcomes"] == {"miss": 14, "grasp": 0, "place": 2, "released": 24, "error": 0}
    assert (b["n"], b["crashes"]) == (20, 1)
    assert b["steps"] == (18 * 100 + 2 * 600) / 20
    assert b["jerk_mm"] == pytest.approx(2.9)
    assert b["coverage_16px"] == 1.0
    assert b["train_minutes"] == 5.0
    assert b["decisions_per_second"] == pytest.approx(10)
    assert cells["blind", "shifted"]["train_minutes"] is None
    assert cells["blind", "shifted"]["decisions_per_second"] is None
    assert found["minutes"] == {"train": 1.5, "eval": 0.5}
    assert list(cells) == [
        ("blind", "shifted"),
        ("para", "shifted"),
        ("b", "shifted"),
        ("b", "position"),
    ]


def test_pairs_are_the_same_episodes_of_the_same_seed(results):
    """B with one seed is compared with PARA's same seed.

    An untrained policy is compared with all of PARA's seeds, but its 20 episodes count once.
    Nothing is compared with itself.
    """
    _, cells = table_of(results)
    # wins 2..19, PARA's seed 0 wins 0..11
    b = cells["b", "shifted"]["success"]["against_reference"]
    assert (b["n"], b["better"], b["worse"], b["difference"]) == (20, 8, 2, 0.3)
    assert b["p"] == mcnemar(8, 2)
    blind = cells["blind", "shifted"]["success"]["against_reference"]
    assert (blind["n"], blind["better"], blind["worse"]) == (20, 0, 14)
    assert blind["difference"] == pytest.approx(-0.65)
    assert blind["p"] == mcnemar(0, 14)
    assert [blind["by_seed"][s]["worse"] for s in ("s0", "s1")] == [12, 14]
    # two comparisons
    assert blind["p_holm"] == pytest.approx(2 * blind["p"]) and b["p_holm"] == b["p"]
    assert cells["para", "shifted"]["success"]["against_reference"] is None
    # PARA was not evaluated there
    assert cells["b", "position"]["success"]["against_reference"] is None
    released = cells["b", "shifted"]["released"]["against_reference"]
    assert (released["better"], released["worse"]) == (10, 2)


def test_a_comparison_of_one_seed_says_which_beside_rates_of_several(results):
    """PARA's rate is of two seeds, B's of one: what stands beside is a comparison of that one."""
    table_of(results)
    lines = (results / "table.md").read_text().splitlines()
    b, blind = (next(x for x in lines if x.startswith(f"| {r} | shifted")) for r in ("b", "blind"))
    assert ", s0 alone), p" in b and "s1" not in b
    # against each of the two
    assert "alone" not in blind and ", seeds -" in blind


def test_rows_with_the_recipe_are_compared_with_paras(tmp_path):
    """And rows without one of its parts with the whole: against plain PARA policy and recipe would
    be one difference.
    """
    for name, wins in (("para", 5), ("para_recipe", 18), ("c_recipe", 20), ("c", 6)):
        write_evaluation(tmp_path, f"{name}-shifted-s0", outcomes(wins))
    write_evaluation(tmp_path, "c_recipe_without_hand-shifted-s0", outcomes(10))
    found, cells = table_of(tmp_path)
    assert {row: cell["reference"] for (row, _), cell in cells.items()} == {
        **{"para": "para", "para_recipe": "para", "c": "para", "c_recipe": "para_recipe"},
        "c_recipe_without_hand": "c_recipe",
    }
    against = lambda row: cells[row, "shifted"]["success"]["against_reference"]
    assert against("para") is None and against("c")["difference"] == pytest.approx(0.05)
    assert against("c_recipe")["difference"] == pytest.approx(0.1)
    assert against("c_recipe_without_hand")["difference"] == pytest.approx(-0.5)
    text = (tmp_path / "table.md").read_text()
    assert "(para; of c_recipe it is para_recipe; of c_recipe_without_hand it is c_recipe)" in text


def test_rates_within_280_steps_stand_beside_those_at_the_end(results):
    """Published rates stop at 280 control steps.

    The table has both, from the step of the first success, also for old rows.
    """
    rows = results / "evals" / "b-position-s0" / "episodes.jsonl"
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    late = [
        {**r, "first_success": 300, "steps": 310} if r["episode"] in (0, 1) else r for r in found
    ]
    rows.write_text("".join(json.dumps(r) + "\n" for r in late))
    cell = table_of(results)[1]["b", "position"]
    for key in ("success", "released"):
        assert (cell[key]["early"]["rate"], cell[key]["rate"]) == (3 / 20, 5 / 20)
    assert "15% (5-36) / 25% (11-47), n = 20" in (results / "table.md").read_text()


def test_what_other_commands_made_is_marked_and_not_pooled(results):
    """An evaluation with another flag, or copied under another name, is a row of its own with a
    star and the reason. Only what run_matrix.py makes is pooled and compared. A checkout with
    changes gets a plus.
    """
    shutil.rmtree(results / "evals" / "para-shifted-s1")
    write_evaluation(results, "para-shifted-s1", outcomes(20), extra=" --feedback predicted")
    write_evaluation(
        results, "c-shifted-s0", outcomes(5), extra=" --out runs/elsewhere", commit="0123456789+"
    )
    cells = json.loads(json.dumps(table_of(results)[0]["cells"]))
    own, other = [c for c in cells if (c["row"], c["layout"]) == ("para", "shifted")]
    assert (own["n"], own["success"]["rate"], own["otherwise"]) == (20, 0.6, {})
    assert other["n"] == 20 and "--feedback predicted for left out" in other["otherwise"]["s1"]
    assert not other["success"]["against_reference"]
    copied = next(c for c in cells if c["row"] == "c")
    assert "copied from runs/elsewhere" in copied["otherwise"]["s0"] and copied["uncommitted"]
    text = (results / "table.md").read_text()
    assert "| para | shifted |" in text
    assert "| para* | shifted |" in text
    assert "| c*+ | shifted |" in text


def test_budgets_and_places_are_no_other_command():
    """Where results lie and how long a training took do not make another recipe.

    Everything that decides the policy does.
    """
    asked = (
        "python train.py --model_type para --dataset a/demos/position.hdf5 --max_steps 2500 "
        "--seed 0 --out a/runs/x"
    )
    same = (
        "python train.py --seed 0 --model_type para --dataset b/position.hdf5 "
        "--max_steps 1000000 --max_minutes 8 --out b/runs/x"
    )
    ignored = matrix.PLACES | matrix.INCIDENTAL | matrix_table.BUDGET
    assert matrix_table.differing(same, asked, ignored) == ""
    for other in (
        same + " --mirror",
        same.replace("position", "position_turns"),
        same + " --seed 1",
    ):
        assert matrix_table.differing(other, asked, ignored)


@pytest.mark.parametrize("flag", sorted(matrix.INCIDENTAL))
def test_plan_and_table_agree_on_flags_that_change_no_episode(flag):
    """An evaluation that took another --timeout is done for the plan, and unmarked in the table."""
    value = "" if flag == "--trace" else " 9"
    for asked in ("python eval.py --seed 0 --out x", "python eval.py --out x --seed 0"):
        for made in (f"{asked} {flag}{value}", asked.replace(" --", f" {flag}{value} --", 1)):
            assert matrix_plan.same(made, asked.split())
            assert matrix_table.made_otherwise("x", row_of(made), (asked, None)) == ""
            more = f"{made} --clean_scene"
            assert not matrix_plan.same(more, asked.split())
            assert matrix_table.made_otherwise("x", row_of(more), (asked, None))


def row_of(command):
    """As much of a summary as says which command made it."""
    return {"command": command, "trained": None}


def test_a_quoted_command_asks_for_the_same_as_an_unquoted_one():
    """Commands are stored quoted where a path has a space.

    Older ones were stored without quotes.
    """
    quoted = "python eval.py --ckpt 'my runs/para s0/checkpoint.safetensors' --out 'my runs/x'"
    assert matrix_table.flags_of(quoted)["--out"] == "my runs/x"
    assert matrix_table.differing(quoted, quoted.replace("'", ""), set()) == ""
    old = "python eval.py --ckpt it's/checkpoint.safetensors --out runs/x"
    assert matrix_table.flags_of(old)["--ckpt"] == "it's/checkpoint.safetensors"


def test_the_ceiling_of_low_views_has_their_grid(tmp_path):
    """They are the views that a grid of 56 cells decodes badly."""
    words = f"--rows oracle --columns verdict in_dist --out {tmp_path / 'x'}"
    nodes = matrix_plan.Plan(run_matrix.parse_args(words.split())).nodes
    with_grid = {n for n, node in nodes.items() if "--grid 56" in " ".join(node.command)}
    assert "eval-oracle-verdict_viewpoint_low" in with_grid
    assert not {"eval-oracle-benchmark", "eval-oracle-shifted"} & with_grid


@pytest.mark.parametrize("name, page", [("matrix", "first_matrix"), ("verdict", "verdict")])
def test_the_committed_table_is_that_of_its_rows(name, page, tmp_path):
    """table.json follows from the committed episodes, and the page has the table.

    Eight evaluations of the first matrix that were copied in are marked.
    """
    shutil.copytree(ROOT / "results" / name / "evals", tmp_path / "evals")
    found, _ = table_of(tmp_path)
    committed = json.loads((ROOT / "results" / name / "table.json").read_text())
    numbers = lambda cells: [{k: v for k, v in c.items() if k != "otherwise"} for c in cells]
    assert numbers(found["cells"]) == numbers(committed["cells"])
    if name == "matrix":
        assert sum(len(c["otherwise"]) for c in found["cells"]) == 8
    text = (ROOT / "docs" / f"{page}.md").read_text()
    shown = text[text.index(MARKS[0]) + len(MARKS[0]) : text.index(MARKS[1])].strip()
    assert shown == (ROOT / "results" / name / "table.md").read_text().strip()


def test_the_readme_has_the_verdicts_numbers():
    """Rates within 280 steps, in whole percent, of every row and column that it shows."""
    cells = json.loads((ROOT / "results" / "verdict" / "table.json").read_text())["cells"]
    rates = {(c["row"], c["layout"]): f"{100 * c['success']['early']['rate']:.0f}%" for c in cells}
    text = (ROOT / "README.md").read_text()
    head = r"(?m)^\| \| benchmark \| shifted \| viewpoint \| both .*\n.*\n"
    table = re.search(head + r"((\|.*\n)+)", text)
    names = {"PARA": "para_recipe", "A": "a_recipe", "B": "b_recipe", "C": "c_recipe"}
    layouts = ["benchmark", "verdict_shifted", "verdict_viewpoint", "verdict_viewpoint_shifted"]
    layouts += ["verdict_viewpoint_low", "verdict_position", "moved_midway", "benchmark_swap"]
    layouts += ["benchmark_object"]
    shown = [[c.strip() for c in line.strip("| ").split("|")] for line in table[1].splitlines()]
    assert [row[0] for row in shown] == list(names)
    for name, *row in shown:
        assert row == [rates[names[name], layout] for layout in layouts], name


def test_one_backbone_for_the_whole_table(results):
    """Rows on different features are not comparable: they are refused, and both are named."""
    write_evaluation(results, "c-shifted-s0", outcomes(3), features="dinov2-448px-9999")
    with pytest.raises(UserError, match="one backbone.*0123.*9999|one backbone.*9999.*0123"):
        table_of(results)


@pytest.mark.parametrize("name", ["parrot-shifted-s0", "para-shifted-s0-old"])
def test_a_foreign_folder_is_named(results, name):
    """A folder whose name is no cell is refused, not silently left out, nor taken for another."""
    shutil.copytree(results / "evals" / "para-shifted-s0", results / "evals" / name)
    with pytest.raises(UserError, match=f"{name}: its name is no ROW"):
        table_of(results)


# -- as Markdown, picture, page


def test_the_table_replaces_the_one_between_the_marks(results, tmp_path):
    """The text between the marks is replaced, and the rest stays equal to the byte.

    Twice gives the same.
    """
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n\n<!-- matrix -->\nold\n<!-- /matrix -->\n\nThe end.\n")
    for _ in range(2):
        run_matrix.main(["--table", "--out", str(results), "--readme", str(readme)])
        text = readme.read_text()
    assert text.startswith("# Title\n\n<!-- matrix -->\n| policy | shifted | position |")
    assert text.endswith("<!-- /matrix -->\n\nThe end.\n")
    assert "old" not in text and text.count("<!-- matrix -->") == 1
    assert "| para | 65% (43-85) / 65% (43-85), n = 40 | - |" in text
    assert (
        "| +30 [-1 to +56] (8:2, s0 alone), p 0.11 | +30 [-1 to +56] (8:2, s0 alone), p 0.11 |"
        in text
    )
    assert "2 in all" in text


def test_readme_without_marks_is_left_alone(results, tmp_path):
    """A file without the marks is refused in one sentence and not written."""
    readme = tmp_path / "README.md"
    readme.write_text("nothing here <!-- matrix --> and no end")
    with pytest.raises(UserError, match="/matrix"):
        run_matrix.main(["--table", "--out", str(results), "--readme", str(readme)])
    assert readme.read_text() == "nothing here <!-- matrix --> and no end"


def test_no_rate_of_the_page_is_coloured_as_good(results):
    """Rates of the page have no colour: a rate of 0% in green would mislead."""
    table_of(results)
    page = (results / "report.html").read_text()
    style, tables = page.split("</style>", 1)
    assert "td.rate { font-weight: 600; }" in style
    assert "<td class=rate>0% (0-16) / 0% (0-16)</td>" in tables


def test_the_page_shows_a_failure_of_each_cell(results):
    """The page holds the tables, the picture and one film per cell, of a failure where one was
    filmed.
    """
    videos = results / "evals" / "b-shifted-s0" / "videos"
    videos.mkdir()
    (videos / "000_miss.mp4").write_bytes(b"lost")
    (videos / "002_released.mp4").write_bytes(b"won")
    (videos / "003_miss.mp4").write_bytes(b"left over from another run")  # its row says released
    table_of(results)
    page = (results / "report.html").read_text()
    assert page.count("<video") == 1
    assert "b, shifted s0, episode 0: miss" in page
    assert "65% (43-85) / 65% (43-85), n = 40" in page
    assert "data:image/png" in page and "evals/b-shifted-s0\n" in page and 'src="http' not in page
    assert (results / "table.png").read_bytes()[:4] == b"\x89PNG"


def test_export_takes_small_files_only(results, tmp_path):
    """The export for git holds table and rows, no films, and the table can be made again from
    it.
    """
    videos = results / "evals" / "b-shifted-s0" / "videos"
    videos.mkdir()
    (videos / "000_miss.mp4").write_bytes(b"x")
    target = tmp_path / "committed"
    run_matrix.main(["--table", "--out", str(results), "--export", str(target)])
    assert (target / "evals" / "b-shifted-s0" / "episodes.jsonl").exists()
    assert not list(target.rglob("*.mp4"))
    again, _ = table_of(target)
    first = json.loads((results / "table.json").read_text())
    assert again["cells"] == first["cells"] and again["minutes"] == first["minutes"]


def test_no_evaluation_is_said(tmp_path):
    """--table with nothing to table names the folder."""
    with pytest.raises(UserError, match="evals"):
        run_matrix.main(["--table", "--out", str(tmp_path)])


# -- the verdict at a glance


def pixels_of(path, colour):
    """How many pixels of a picture have a colour, as "#rrggbb"."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return int((pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum())


def test_the_verdict_draws_every_policy_that_the_table_has(tmp_path, monkeypatch):
    """Drawn from the committed table.json alone, at most as wide as GitHub shows a README.

    Its recipe marks are those of recipe rows: without such rows there are none.
    """
    table = json.loads((ROOT / "results" / "matrix" / "table.json").read_text())["cells"]
    drawn = {}
    real = plots_rates.interval
    monkeypatch.setattr(
        plots_rates,
        "interval",
        lambda axis, found, *style: (
            drawn.setdefault(axis.get_title(), []).append(found["rate"])
            or real(axis, found, *style)
        ),
    )
    matrix_table.draw_verdict(table, "success", tmp_path / "whole.png")
    shown = sum(map(len, drawn.values()))
    recipes = {row for rows in RECIPES.values() for row in rows}
    known = {*RECIPES, *recipes}
    assert shown == len({(c["row"], c["layout"]) for c in table if c["row"] in known})
    with Image.open(tmp_path / "whole.png") as image:
        assert 600 < image.width <= 900
    plain = [c for c in table if c["row"] not in recipes]
    matrix_table.draw_verdict(plain, "success", tmp_path / "plain.png")
    # the key above the panels has one mark of each
    whole, without = (
        pixels_of(tmp_path / name, plots_rates.RECIPE) for name in ("whole.png", "plain.png")
    )
    assert whole > 2 * without > 0


def test_the_verdicts_colours_are_apart_in_grey():
    """Printed in grey, a recipe's colour is darker than a plain one's, and both than the floor."""
    grey = lambda colour: int(np.asarray(Image.new("RGB", (1, 1), colour).convert("L"))[0, 0])
    dark, light, floor = map(grey, (plots_rates.RECIPE, plots_rates.PLAIN, plots_rates.FLOOR))
    assert dark + 20 < light < floor - 50


def test_a_rate_within_280_steps_is_compared_too(results):
    """B's late episodes count at the end and not within 280 steps, against PARA's as well."""
    rows = results / "evals" / "b-shifted-s0" / "episodes.jsonl"
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    # the four that PARA's seed 0 also solves come late
    late = [
        {**r, "first_success": 300, "steps": 310} if r["episode"] in (2, 3, 4, 5) else r
        for r in found
    ]
    rows.write_text("".join(json.dumps(r) + "\n" for r in late))
    cell = table_of(results)[1]["b", "shifted"]["success"]
    at_end, early = cell["against_reference"], cell["early"]["against_reference"]
    assert (at_end["better"], at_end["worse"]) == (8, 2)
    assert (early["better"], early["worse"], early["p"]) == (8, 6, mcnemar(8, 6))
    low, high = early["interval"]
    assert early["difference"] == pytest.approx(0.1)
    assert low < 0.1 < high
    # Holm over the comparisons within 280 steps alone, of which blind's is the other
    assert early["p_holm"] == pytest.approx(early["p"])
