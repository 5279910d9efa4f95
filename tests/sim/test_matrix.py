"""The matrix: which commands, what counts as done, the table's numbers; and one row and column of
it for real."""

import json
import shlex
import shutil

import numpy as np
import pytest
from helpers import ROOT, SIZE, run
from scipy.stats import binomtest

import eval as evaluation
import run_matrix
from harness.metrics import mcnemar, wilson
from runtime import UserError, append_jsonl, write_json
from sim import settings
from study import matrix_table
from study.graph import pending

FEATURES = "efficientnet_lite0-448px-0123"


def write_evaluation(
    folder,
    cell,
    success,
    released=None,
    features=FEATURES,
    crashes=0,
    extra="",
    commit="0123456789",
):
    """An evaluation as eval.py leaves it: success and released (n,) bool. extra: flags of the
    evaluation that run_matrix.py has not."""
    out, layout, trained = folder / "evals" / cell, cell.split("-")[1], cell.count("-") == 2
    known = cell.split("-")[0] in run_matrix.ROWS
    evaluated, training = (
        run_matrix.recipe(
            run_matrix.parse_args(["--out", str(folder)]), *(*cell.split("-"), "")[:3]
        )
        if known
        else ("", "")
    )
    released = success if released is None else released
    for i, (won, freed) in enumerate(zip(success, released)):
        outcome = "released" if freed else "place" if won else "miss"
        append_jsonl(
            out / "episodes.jsonl",
            {
                "episode": i,
                "init_state": i,
                "layout": layout,
                "seed": 0,
                "outcome": outcome,
                "success": bool(won),
                "released": bool(freed),
                "steps": 100 if won else 600,
                "first_success": 90 if won else None,
                "decisions": 12,
                "jerk_mm": 2.0 + won,
                "coverage_4px": 0.5,
                "coverage_8px": 0.75,
                "coverage_16px": None if i == 0 else 1.0,
                "seconds": {
                    "render": 1.0,
                    "physics": 1.0,
                    "features": 0.9 * trained,
                    "policy": 0.3 * trained,
                    "total": 2.0,
                },
            },
        )
    for i in range(crashes):
        append_jsonl(
            out / "episodes.jsonl", {"episode": len(success) + i, "layout": layout, "crash": "boom"}
        )
    write_json(
        out / "summary.json",
        {
            "model_type": cell.split("-")[0],
            "setting": layout,
            "n": len(success),
            "crashes": crashes,
            "seed": 0,
            "command": evaluated + extra,
            "commit": commit,
            "trained": {
                "minutes": 5.0,
                "step": 500,
                "backbone_identity": features,
                "command": training,
            }
            if trained
            else None,
        },
    )
    return out


def outcomes(wins, n=20):
    return np.arange(n) < wins


@pytest.fixture
def results(tmp_path):
    """PARA with two seeds, B with one, blind: on one layout; B on another one too, without PARA."""
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


@pytest.mark.parametrize("better, worse", [(1, 9), (0, 5), (7, 7), (0, 0), (30, 12), (121, 59)])
def test_mcnemar_is_the_exact_binomial_test(better, worse):
    """p is that of the two-sided binomial test of the discordant pairs."""
    expected = binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert mcnemar(better, worse) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(better, worse) == mcnemar(worse, better)
    assert mcnemar(0, 5) == 0.0625 and mcnemar(1, 9) == 22 / 1024


def test_cells_pool_seeds_and_keep_them_apart(results):
    """n counts the episodes of all seeds; crashed ones are no failures; every number comes from the
    rows."""
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
    """B (one seed) is compared with PARA's same seed; an untrained policy with all of PARA's, its
    20 episodes once each and not once a seed; nothing with itself."""
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


def test_rates_within_280_steps_stand_beside_those_at_the_end(results):
    """Published rates stop at 280 control steps: the table says both, from the step of the first
    success, old rows too."""
    rows = results / "evals" / "b-position-s0" / "episodes.jsonl"
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    late = [
        {**r, "first_success": 300, "steps": 310} if r["episode"] in (0, 1) else r for r in found
    ]
    rows.write_text("".join(json.dumps(r) + "\n" for r in late))
    cell = table_of(results)[1]["b", "position"]
    for key in ("success", "released"):
        assert (cell[key]["early"]["rate"], cell[key]["rate"]) == (3 / 20, 5 / 20)
    assert "15 / 25% (11-47), n = 20" in (results / "table.md").read_text()


def test_what_other_commands_made_is_marked_and_not_pooled(results):
    """An evaluation with another flag, or copied in under another name, is a row of its own with a
    star and its reason; what is pooled and compared is what run_matrix.py makes. A dirty checkout
    has a plus."""
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
    """Where results lie and how long a training took are columns or names, not another recipe; all
    that decides the policy is."""
    asked = (
        "python train.py --model_type para --dataset a/demos/position.hdf5 --max_steps 2500 "
        "--seed 0 --out a/runs/x"
    )
    same = (
        "python train.py --seed 0 --model_type para --dataset b/position.hdf5 "
        "--max_steps 1000000 --max_minutes 8 --out b/runs/x"
    )
    ignored = matrix_table.INCIDENTAL | matrix_table.BUDGET
    assert matrix_table.differing(same, asked, ignored) == ""
    for other in (
        same + " --mirror",
        same.replace("position", "position_turns"),
        same + " --seed 1",
    ):
        assert matrix_table.differing(other, asked, ignored)


def test_the_committed_table_is_that_of_its_rows(tmp_path):
    """results/matrix/table.json follows from the committed episodes: eight evaluations that were
    copied in are marked."""
    shutil.copytree(ROOT / "results" / "matrix" / "evals", tmp_path / "evals")
    found, _ = table_of(tmp_path)
    committed = json.loads((ROOT / "results" / "matrix" / "table.json").read_text())
    assert found["cells"] == committed["cells"]
    assert sum(len(c["otherwise"]) for c in found["cells"]) == 8


def test_one_backbone_for_the_whole_table(results):
    """Rows that saw different features are no comparison: refused, with both named."""
    write_evaluation(results, "c-shifted-s0", outcomes(3), features="dinov2-448px-9999")
    with pytest.raises(UserError, match="one backbone.*0123.*9999|one backbone.*9999.*0123"):
        table_of(results)


def test_a_foreign_folder_is_named(results):
    """An evaluation under a name that is no cell is not silently left out."""
    write_evaluation(results, "parrot-shifted-s0", outcomes(3))
    with pytest.raises(UserError, match="parrot-shifted-s0"):
        table_of(results)


# -- as Markdown, picture, page


def test_table_goes_into_the_readme(results, tmp_path):
    """The text between the marks is replaced, the rest stays to the byte, twice gives the same."""
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n\n<!-- matrix -->\nold\n<!-- /matrix -->\n\nThe end.\n")
    for _ in range(2):
        run_matrix.main(["--table", "--out", str(results), "--readme", str(readme)])
        text = readme.read_text()
    assert text.startswith("# Title\n\n<!-- matrix -->\n| policy | shifted | position |")
    assert text.endswith("<!-- /matrix -->\n\nThe end.\n")
    assert "old" not in text and text.count("<!-- matrix -->") == 1
    assert "| para | 65 / 65% (43-85), n = 40 | - |" in text
    assert "| +30 (8:2), p 0.11 |" in text
    assert "2 in all" in text


def test_readme_without_marks_is_left_alone(results, tmp_path):
    """A file without the marks is refused in one sentence, and not written."""
    readme = tmp_path / "README.md"
    readme.write_text("nothing here <!-- matrix --> and no end")
    with pytest.raises(UserError, match="/matrix"):
        run_matrix.main(["--table", "--out", str(results), "--readme", str(readme)])
    assert readme.read_text() == "nothing here <!-- matrix --> and no end"


def test_page_shows_a_failure_of_each_cell(results):
    """The page holds the tables, the picture and one film a cell: a failure where one was
    filmed."""
    videos = results / "evals" / "b-shifted-s0" / "videos"
    videos.mkdir()
    (videos / "000_miss.mp4").write_bytes(b"lost")
    (videos / "002_released.mp4").write_bytes(b"won")
    (videos / "003_miss.mp4").write_bytes(b"left over from another run")  # its row says released
    table_of(results)
    page = (results / "report.html").read_text()
    assert page.count("<video") == 1
    assert "b, shifted s0, episode 0: miss" in page
    assert "65 / 65% (43-85), n = 40" in page
    assert "data:image/png" in page and "evals/b-shifted-s0\n" in page and 'src="http' not in page
    assert (results / "table.png").read_bytes()[:4] == b"\x89PNG"


def test_export_takes_small_files_only(results, tmp_path):
    """What is committed: table and rows, no films; and the table can be made again from it."""
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
    """--table without anything to table names the folder."""
    with pytest.raises(UserError, match="evals"):
        run_matrix.main(["--table", "--out", str(tmp_path)])


# -- which commands, and what counts as done


def plan(*flags):
    return run_matrix.Plan(run_matrix.parse_args(list(flags))).nodes


def test_the_whole_matrix_is_planned(tmp_path):
    """Every row in every column; a collection a setting, a cache a kind of samples, in_dist's two
    layouts from one training."""
    nodes = plan("--out", str(tmp_path), "--seeds", "0", "1")
    kinds = {
        kind: sorted(n for n in nodes if n.startswith(kind))
        for kind in ("collect", "cache", "train", "eval")
    }
    assert kinds["collect"] == ["collect-in_dist", "collect-position", "collect-viewpoint"]
    assert kinds["cache"] == [
        f"cache-{s}-{k}"
        for s in ("in_dist", "position", "viewpoint")
        for k in ("frames", "windows8")
    ]
    assert len(kinds["train"]) == 7 * 3 * 2 and len(kinds["eval"]) == 7 * 4 * 2 + 2 * 4
    assert (
        nodes["eval-b-benchmark-s1"].deps
        == nodes["eval-b-shifted-s1"].deps
        == ("train-b-in_dist-s1",)
    )
    assert nodes["train-b-in_dist-s1"].deps == ("cache-in_dist-windows8",)
    assert nodes["cache-in_dist-windows8"].deps == ("collect-in_dist",)
    assert nodes["eval-blind-position"].deps == ()
    command = shlex.join(nodes["train-a_mlp-viewpoint-s1"].command)
    for flag in ("--head mlp", "--seed 1", "--max_steps 2500", "--preset small"):
        assert flag in command
    assert "--backbone efficientnet_lite0" in command
    assert "--setting viewpoint" in shlex.join(nodes["collect-viewpoint"].command)
    assert "--layout position --n_episodes 100" in shlex.join(nodes["eval-oracle-position"].command)


def test_reflections_are_rows_of_their_own(tmp_path):
    """An attempt is asked for by name, is trained with --mirror, and fills a cache of its own from
    the same demonstrations."""
    nodes = plan("--out", str(tmp_path), "--rows", "b", "b_mirror", "--columns", "position")
    assert "--mirror" in nodes["train-b_mirror-position-s0"].command
    assert "--mirror" not in nodes["train-b-position-s0"].command
    assert nodes["train-b_mirror-position-s0"].deps == ("cache-position-windows8-mirrored",)
    assert sum(n.startswith("collect") for n in nodes) == 1
    assert not [n for n in plan("--out", str(tmp_path)) if "mirror" in n]


def test_other_starts_are_demonstrations_of_their_own(tmp_path):
    """The attempt with shifted images is trained on demonstrations that start elsewhere and tested
    on the same cell as PARA."""
    nodes = plan(
        "--out", str(tmp_path), "--rows", "para", "para_shift_aug", "--columns", "position"
    )
    collect, train = (
        nodes["collect-position_starts"].command,
        nodes["train-para_shift_aug-position_starts-s0"].command,
    )
    assert "--start_spread 0.3" in shlex.join(collect)
    assert collect[-1] == train[train.index("--dataset") + 1]
    assert "--shift_aug 128" in shlex.join(train)
    assert "--start_spread" not in nodes["collect-position"].command
    assert nodes["eval-para_shift_aug-position-s0"].deps == (
        "train-para_shift_aug-position_starts-s0",
    )
    turned = plan(
        "--out",
        str(tmp_path),
        "--rows",
        "para_turned",
        "a_turned",
        "b_turned",
        "--columns",
        "position",
    )
    assert "--start_spread 0.3 --turn_spread 40" in shlex.join(
        turned["collect-position_turns"].command
    )
    assert turned["train-a_turned-position_turns-s0"].deps[0].startswith("cache-position_turns")
    assert "eval-para_turned-position-s0" in turned
    assert "--turn_back" in turned["train-b_turned-position_turns-s0"].command
    assert "--turn_back" not in turned["train-a_turned-position_turns-s0"].command
    given = plan(
        "--out",
        str(tmp_path),
        "--rows",
        "para_shift_aug",
        "--columns",
        "position",
        "--dataset",
        f"position_starts={__file__}",
    )
    assert not [n for n in given if n.startswith("collect")]
    assert not [
        n for n in plan("--out", str(tmp_path)) if "shift_aug" in n or "starts" in n or "turn" in n
    ]


def test_pro_suites_and_other_splits_are_columns(tmp_path):
    """LIBERO-PRO's suites test what in_dist trained, splits have demonstrations and trainings of
    their own; the plain columns' commands, by which finished cells are known, have neither flag;
    the table knows every cell."""
    nodes = plan(
        "--out",
        str(tmp_path),
        "--rows",
        "blind",
        "para",
        "--columns",
        "in_dist",
        "pro_swap",
        "pro_object",
        "position",
        "position_near_far",
        "viewpoint_hemisphere",
    )
    assert sorted(n for n in nodes if n.startswith("collect")) == [
        "collect-in_dist",
        "collect-position",
        "collect-position_near_far",
        "collect-viewpoint_hemisphere",
    ]
    assert sum(n.startswith("train") for n in nodes) == 4
    assert sum(n.startswith("eval") for n in nodes) == 2 * 7
    asked = {name: shlex.join(node.command) for name, node in nodes.items()}
    for cell, suite in (("swap", "libero_spatial_swap"), ("object", "libero_spatial_object")):
        assert nodes[f"eval-para-benchmark_{cell}-s0"].deps == ("train-para-in_dist-s0",)
        for name in (f"eval-para-benchmark_{cell}-s0", f"eval-blind-benchmark_{cell}"):
            assert f"--layout benchmark --task_suite {suite} --n_episodes 50" in asked[name]
    for name in (
        "collect-position_near_far",
        "eval-blind-position_near_far",
        "eval-para-position_near_far-s0",
    ):
        assert "--split near_far" in asked[name]
    assert nodes["eval-para-viewpoint_hemisphere-s0"].deps == (
        "train-para-viewpoint_hemisphere-s0",
    )
    assert "demos/viewpoint_hemisphere.hdf5" in asked["train-para-viewpoint_hemisphere-s0"]
    for name in (
        "collect-in_dist",
        "collect-position",
        "eval-para-benchmark-s0",
        "eval-para-position-s0",
    ):
        assert "--split" not in asked[name] and "--task_suite" not in asked[name]
    for name in (n for n in nodes if n.startswith("eval")):
        args = evaluation.build_parser().parse_args(nodes[name].command[2:])
        assert settings.conditions(*evaluation.LAYOUTS[args.layout], args.split)
        assert name.split("-")[2] in run_matrix.CELLS


def test_flags_reach_their_commands(tmp_path):
    """Overrides go where they belong: a given dataset is not collected, a row's flags reach that
    row alone."""
    data = tmp_path / "mine.hdf5"
    data.touch()
    nodes = plan(
        "--out",
        str(tmp_path),
        "--rows",
        "para",
        "act",
        "--columns",
        "in_dist",
        "--dataset",
        f"in_dist={data}",
        "--row_flags",
        "act=--lr 5e-4",
        "--train_flags",
        "--batch_size 4",
        "--n_episodes",
        "3",
        "--train_steps",
        "7",
        "--gpus",
        "0.5",
        "--preset",
        "full",
    )
    assert not [n for n in nodes if n.startswith("collect")]
    para, act = (nodes[f"train-{r}-in_dist-s0"] for r in ("para", "act"))
    assert "--lr" not in para.command
    assert shlex.join(act.command).count("--lr 5e-4") == 1
    assert act.gpus == 0.5
    for node in (para, act):
        assert all(
            f in shlex.join(node.command)
            for f in ("--batch_size 4", "--max_steps 7", "--preset full", str(data))
        )
    assert "--n_episodes 3" in shlex.join(nodes["eval-act-shifted-s0"].command)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--dataset", "elsewhere=x.hdf5"], ("elsewhere", "viewpoint")),
        (["--dataset", "in_dist=absent.hdf5"], ("absent.hdf5", "no such file")),
        (["--row_flags", "parrot=--lr 1"], ("parrot", "a_pointer")),
        (["--n_episodes", "0"], ("--n_episodes: 0", "at least 1")),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(flags, words):
    """One sentence with the flag and the remedy."""
    with pytest.raises(UserError) as error:
        run_matrix.parse_args(flags)
    assert all(w in str(error.value) for w in words)


@pytest.fixture
def finished(tmp_path):
    """A finished training and evaluation of PARA, as the commands leave them -> (flags, {node: its
    files' folder})."""
    flags = ["--out", str(tmp_path), "--rows", "para", "--columns", "position", "--n_episodes", "5"]
    nodes = plan(*flags)
    train, test = nodes["train-para-position-s0"], nodes["eval-para-position-s0"]
    run_folder = tmp_path / "runs" / "para-position-s0"
    write_json(
        run_folder / "config.json",
        {"command": run_matrix.typed(train.command), "dataset": {}, "args": {"max_steps": 2500}},
    )
    write_json(run_folder / "checkpoint.json", {"step": 2500, "minutes": 8.003})
    out = write_evaluation(tmp_path, "para-position-s0", outcomes(3, 5))
    summary = json.loads((out / "summary.json").read_text())
    summary["command"], summary["trained"]["command"] = (
        run_matrix.typed(test.command),
        run_matrix.typed(train.command),
    )
    write_json(out / "summary.json", summary)
    return flags, run_folder, out


def todo(*flags):
    return [n.name for n in pending(list(plan(*flags).values()))]


def rewritten(path, **changes):
    write_json(path, {**json.loads(path.read_text()), **changes})


def test_a_done_cell_is_not_done_again(finished):
    """Same flags, same n: nothing to do, also with other numbers of workers and films, and with the
    demonstrations gone."""
    flags, _, _ = finished
    assert todo(*flags) == [] and todo(*flags, "--workers", "7", "--n_videos", "0") == []


def test_what_an_unfinished_cell_needs_is_done(finished):
    """More episodes, a crashed one, an unfinished training: the cell runs again, its training only
    where it is unfinished."""
    flags, run_folder, out = finished
    assert todo(*flags, "--n_episodes", "6") == ["eval-para-position-s0"]
    rewritten(out / "summary.json", n=4, crashes=1)
    assert todo(*flags) == ["eval-para-position-s0"]
    rewritten(run_folder / "checkpoint.json", step=900)
    assert todo(*flags) == [
        "collect-position",
        "cache-position-frames",
        "train-para-position-s0",
        "eval-para-position-s0",
    ]
    nodes = plan(*flags)
    path, command = nodes["train-para-position-s0"].resume
    assert path == str(run_folder / "state.safetensors")
    assert command[-2:] == ["--resume", str(run_folder)]


def test_a_run_of_other_flags_is_not_taken_for_this_one(finished):
    """A folder that other flags made is named with both commands, and neither used nor
    overwritten."""
    flags, _, out = finished
    (out / "summary.json").unlink()
    with pytest.raises(
        UserError,
        match="para-position-s0: was made by.*--max_steps 2500.*asked for is.*--max_steps 9",
    ):
        todo(*flags, "--train_steps", "9")


def test_an_evaluation_of_another_training_is_not_done(finished):
    """The same evaluation command on a policy that was trained by other flags is another cell; a
    resumed training is the same."""
    flags, run_folder, out = finished
    summary = json.loads((out / "summary.json").read_text())
    rewritten(
        out / "summary.json",
        trained={**summary["trained"], "command": f"python train.py --resume {run_folder}"},
    )
    assert todo(*flags) == []
    rewritten(
        out / "summary.json", trained={**summary["trained"], "command": "python train.py --lr 7"}
    )
    assert todo(*flags) == ["eval-para-position-s0"]


# -- for real


def test_matrix_runs_resumes_and_tables(collected, tmp_path):
    """PARA in distribution through the real commands: trained, evaluated, tabled; a row whose flags
    are wrong fails alone, with its log's last line and exit code 1; a second call without that row
    runs nothing and exits with 0."""
    flags = shlex.split(
        f"run_matrix.py --columns in_dist --dataset in_dist={collected[0]} --n_episodes 1 "
        "--n_videos 1 --workers 1 --out out "
        f"--train_flags '--max_steps 2 --image_size {SIZE} --batch_size 2' "
        "--eval_flags '--max_steps 10'"
    )
    done = run(
        *flags,
        *shlex.split("--rows para act --row_flags 'para=--grid 14 --width 8' 'act=--dim 7'"),
        cwd=tmp_path,
        ok=False,
    )
    assert done.returncode == 1, done.stderr
    assert "train-act-in_dist-s0: exit code 2: error: --dim 7 is no multiple" in done.stderr, (
        done.stderr
    )
    assert "eval-act-shifted-s0: not started" in done.stderr and "Traceback" not in done.stderr
    found = {
        (c["row"], c["layout"]): c
        for c in json.loads((tmp_path / "out" / "table.json").read_text())["cells"]
    }
    assert found.keys() == {("para", "benchmark"), ("para", "shifted")}
    assert all(c["n"] == 1 and c["steps"] == 10 and c["train_steps"] == 2 for c in found.values())
    assert (tmp_path / "out" / "report.html").read_text().count("<video") == 2
    rows = (tmp_path / "out" / "nodes.jsonl").read_text()
    again = run(*flags, "--rows", "para", "--row_flags", "para=--grid 14 --width 8", cwd=tmp_path)
    assert (tmp_path / "out" / "nodes.jsonl").read_text() == rows and "| para |" in again.stdout
