"""run_matrix.py: which commands it plans, when a cell counts as done, and one cell run for real."""

import json
import shlex
import shutil

import pytest
from evaluations import outcomes, write_evaluation
from helpers import SIZE, run

import eval as evaluation
import run_matrix
from runtime import UserError, write_json
from sim import layouts
from study.graph import pending
from study.matrix import RECIPE, WITHOUT

# -- which commands, and what counts as done


def plan(*flags):
    """The nodes that run_matrix.py plans for some flags, by name.

    Flags are words, or one string.
    """
    words = shlex.split(flags[0]) if len(flags) == 1 else list(flags)
    return run_matrix.Plan(run_matrix.parse_args(words)).nodes


def test_the_whole_matrix_is_planned(tmp_path):
    """Every row is planned in every column.

    There is one collection a setting and one cache a kind of samples; in_dist's two layouts are
    evaluated from one training.
    """
    nodes = plan(f"--out {tmp_path} --seeds 0 1")
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
    """The mirrored attempt runs only when asked for.

    It is trained with --mirror on the same demonstrations, and fills its own cache.
    """
    nodes = plan(f"--out {tmp_path} --rows b b_mirror --columns position")
    assert "--mirror" in nodes["train-b_mirror-position-s0"].command
    assert "--mirror" not in nodes["train-b-position-s0"].command
    assert nodes["train-b_mirror-position-s0"].deps == ("cache-position-windows8-mirrored",)
    assert sum(n.startswith("collect") for n in nodes) == 1
    assert not [n for n in plan(f"--out {tmp_path}") if "mirror" in n]


def test_other_starts_are_demonstrations_of_their_own(tmp_path):
    """The attempt with shifted images is trained on demonstrations with other starts.

    It is tested on the same cell as PARA.
    """
    nodes = plan(f"--out {tmp_path} --rows para para_shift_aug --columns position")
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
    turned = plan(f"--out {tmp_path} --rows para_turned a_turned b_turned --columns position")
    assert "--start_spread 0.3 --turn_spread 40" in shlex.join(
        turned["collect-position_turns"].command
    )
    assert turned["train-a_turned-position_turns-s0"].deps[0].startswith("cache-position_turns")
    assert "eval-para_turned-position-s0" in turned
    assert "--turn_back" in turned["train-b_turned-position_turns-s0"].command
    assert "--turn_back" not in turned["train-a_turned-position_turns-s0"].command
    given = plan(
        f"--out {tmp_path} --rows para_shift_aug --columns position "
        f"--dataset position_starts={__file__}"
    )
    assert not [n for n in given if n.startswith("collect")]
    assert not [
        n for n in plan(f"--out {tmp_path}") if "shift_aug" in n or "starts" in n or "turn" in n
    ]


def test_recipe_is_trained_once_for_all_columns(tmp_path):
    """A recipe's row has one dataset and one training, whatever columns it is tested in.

    Rows beside it keep those of the column.
    """
    nodes = plan(f"--out {tmp_path} --rows para para_recipe c_recipe --columns verdict pro_swap")
    assert sorted(n for n in nodes if n.startswith("collect")) == [
        "collect-in_dist",
        "collect-recipe",
    ]
    assert "--setting recipe" in shlex.join(nodes["collect-recipe"].command)
    trained = sorted(n for n in nodes if n.startswith("train"))
    assert trained == [
        "train-c_recipe-recipe-s0",
        "train-para-in_dist-s0",
        "train-para_recipe-recipe-s0",
    ]
    for cell in ("benchmark", "verdict_position", "moved_midway", "benchmark_swap"):
        assert nodes[f"eval-para_recipe-{cell}-s0"].deps == ("train-para_recipe-recipe-s0",)
    # C answers in world coordinates
    assert "--turn_back" in nodes["train-c_recipe-recipe-s0"].command
    given = plan(f"--out {tmp_path} --rows c_recipe --columns verdict --dataset recipe={__file__}")
    assert not [n for n in given if n.startswith("collect")]
    # they run only when asked for
    assert not [n for n in plan(f"--out {tmp_path}") if "recipe" in n]


def test_a_run_can_end_before_evaluations(tmp_path):
    """--until train makes the trainings and what they need: another machine evaluates them."""
    nodes = plan(f"--out {tmp_path} --rows blind b --columns in_dist --until train").values()
    names = lambda stage: [node.name for node in run_matrix.up_to(stage, nodes)]
    first = ["collect-in_dist", "cache-in_dist-windows8"]
    assert names("collect") == first[:1] and names("cache") == first
    assert names("train") == [*first, "train-b-in_dist-s0"]
    assert len(names(None)) == len(nodes) == 3 + 2 * 2


def test_pro_suites_and_other_splits_are_columns(tmp_path):
    """LIBERO-PRO suites test what in_dist trained; other splits have their own demonstrations and
    trainings. Commands of the plain columns have neither flag, as finished cells are known by their
    commands. The table knows every cell.
    """
    nodes = plan(
        f"--out {tmp_path} --rows blind para "
        "--columns in_dist pro_swap pro_object position position_near_far viewpoint_hemisphere"
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
        assert layouts.conditions(args.layout, args.split)
        assert name.split("-")[2] in run_matrix.CELLS


def test_flags_reach_their_commands(tmp_path):
    """Overrides go to the right commands: a given dataset is not collected, and a row's flags reach
    that row alone.
    """
    data = tmp_path / "mine.hdf5"
    data.touch()
    nodes = plan(
        f"--out {tmp_path} --rows para act --columns in_dist --dataset in_dist={data} "
        "--row_flags 'act=--lr 5e-4' --train_flags '--batch_size 4' --n_episodes 3 "
        "--train_steps 7 --gpus 0.5 --preset full"
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
        (["--row_flags", "act"], ("--row_flags act", "NAME=VALUE")),
        (["--row_flags", "act=--lr 1", "act=--lr 2"], ("act=--lr 2", "given before")),
        (["--out", "runs/one", "--export", "runs/../runs/one"], ("--export", "--out itself")),
        (["--n_episodes", "0"], ("--n_episodes: 0", "at least 1")),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(flags, words):
    """The error is one sentence with the flag and the remedy."""
    with pytest.raises(UserError) as error:
        run_matrix.parse_args(flags)
    assert all(w in str(error.value) for w in words)


@pytest.fixture
def finished(tmp_path):
    """Write a finished training and evaluation of PARA as the commands leave them -> (flags, {node:
    folder of its files}).
    """
    flags = ["--out", str(tmp_path), "--rows", "para", "--columns", "position", "--n_episodes", "5"]
    nodes = plan(*flags)
    train, test = nodes["train-para-position-s0"], nodes["eval-para-position-s0"]
    run_folder = tmp_path / "runs" / "para-position-s0"
    write_json(
        run_folder / "config.json",
        {"command": run_matrix.typed(train.command), "dataset": {}, "args": {"max_steps": 2500}},
    )
    reached = {"step": 2500, "minutes": 8.003, "commit": "0123456789"}
    write_json(run_folder / "checkpoint.json", reached)
    out = write_evaluation(tmp_path, "para-position-s0", outcomes(3, 5))
    summary = json.loads((out / "summary.json").read_text())
    summary["command"], summary["trained"]["command"] = (
        run_matrix.typed(test.command),
        run_matrix.typed(train.command),
    )
    summary["trained"].update(reached)
    write_json(out / "summary.json", summary)
    return flags, run_folder, out


def todo(*flags):
    return [n.name for n in pending(list(plan(*flags).values()))]


def rewritten(path, **changes):
    write_json(path, {**json.loads(path.read_text()), **changes})


def test_a_done_cell_is_not_done_again(finished):
    """With the same flags and the same n nothing is left to do, also for other numbers of workers
    and films, and after the demonstrations were deleted.
    """
    flags, _, _ = finished
    assert todo(*flags) == [] and todo(*flags, "--workers", "7", "--n_videos", "0") == []
    assert todo(*flags, "--eval_flags=--trace") == []


def test_what_an_unfinished_cell_needs_is_done(finished):
    """A cell runs again for more episodes, after a crashed episode, or after an unfinished
    training. Its training runs again only if that is unfinished.
    """
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
    """A folder that other flags made is refused with both commands.

    It is neither used nor overwritten.
    """
    flags, _, out = finished
    (out / "summary.json").unlink()
    with pytest.raises(
        UserError,
        match="para-position-s0: was made by.*--max_steps 2500.*asked for is.*--max_steps 9",
    ):
        todo(*flags, "--train_steps", "9")


def test_an_evaluation_of_an_earlier_training_is_not_done(finished):
    """The same command trained anew: a table would mix two trainings in one row."""
    flags, run_folder, out = finished
    rewritten(run_folder / "checkpoint.json", minutes=8.5)
    assert todo(*flags) == ["eval-para-position-s0"]
    # where the run is gone, its evaluations stand
    shutil.rmtree(run_folder)
    assert "eval-para-position-s0" not in todo(*flags)


def test_an_evaluation_of_another_training_is_not_done(finished):
    """The same evaluation of a policy that other flags trained does not count as done.

    One of a resumed training does.
    """
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
    """The real commands train, evaluate and table PARA in distribution.

    A row with wrong flags fails alone, with the last line of its log and exit code 1. A second call
    without that row runs nothing and exits with 0.
    """
    flags = shlex.split(
        f"run_matrix.py --columns in_dist --dataset in_dist={collected[0]} --n_episodes 1 "
        "--n_videos 1 --workers 1 --out out "
        f"--train_flags '--max_steps 2 --image_size {SIZE} --batch_size 2' "
        "--eval_flags '--max_steps 10 --clean_scene'"
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


def test_the_recipe_is_tried_without_each_of_its_parts(tmp_path):
    """One part is missing in each row: a flag of its training, or of its demonstrations."""
    rows = ["para_recipe", "para_recipe_without_fingers", "para_recipe_without_hand"]
    nodes = plan(f"--out {tmp_path} --columns val_verdict --rows {' '.join(rows)}")
    commands = [
        shlex.join(nodes[f"train-{row}-{data}-s0"].command)
        for row, data in zip(rows, ("recipe", "recipe", "recipe_without_hand"))
    ]
    whole, fingers, hand = (set(c.split()) for c in commands)
    assert whole - fingers == {"--fingers", "3", *(w for w in whole if rows[0] in w)}
    assert "--loose_camera 0" in shlex.join(nodes["collect-recipe_without_hand"].command)
    assert whole ^ hand == {w for w in whole ^ hand if "recipe" in w}
    usual = run_matrix.build_parser().get_default("rows")
    assert len(WITHOUT) == 16 and not set(WITHOUT) & set(usual)
    for name, row in WITHOUT.items():
        assert row != RECIPE[name.split("_without")[0]]
