"""Heights measured from what a scene's objects stand on: where it is known from, what every policy
then sees and answers, and what is said where it is not known.
"""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from conftest import observations_of, write_synthetic_demos
from helpers import run, train_flags
from test_contract import Case, answers, same
from test_remote import request as asked

import camera
import serve
from formats.dataset import open_dataset
from formats.demos import measured, mirrored, seen_by, split_demos
from formats.libero_cameras import TASKS
from formats.mixture import open_mixture
from harness.checkpoint import load_policy, save_policy
from harness.finetune import init_from
from harness.hints import hints, said_of_heights
from harness.validation import free_run, to_pixels
from policy import PolicyConfig
from registry import REGISTRY
from runtime import UserError
from study import diagnose, openloop

TABLE, FLOOR = 0.9, 0.0
UP = np.array([0, 0, TABLE])


def standing_on(demo, support):
    """The same demonstration in a scene that stands at another height than the table's."""
    sunk = TABLE - support
    attrs = {**demo.attrs, "support": support}
    return dataclasses.replace(
        demo, ee_pos=demo.ee_pos - [0, 0, sunk], E=camera.lowered(demo.E, sunk), attrs=attrs
    )


def seen(demo, support, frames=(0, 5, 10)):
    """Observations of a demonstration whose scene stands at `support`, which they say."""
    moved = standing_on(demo, support)
    return [dataclasses.replace(o, support=support) for o in observations_of(moved, frames)]


@pytest.fixture(scope="module", params=list(REGISTRY))
def case(request, synthetic_demos, backbone, tmp_path_factory):
    """A policy whose heights are from the support, and demonstrations on table and floor."""
    made = Case(request.param, synthetic_demos, backbone, tmp_path_factory.mktemp("world"))
    made.config = dataclasses.replace(made.config, heights="support")
    made.demos = [standing_on(d, (TABLE, FLOOR)[i % 2]) for i, d in enumerate(made.demos)]
    made.world, made.dataset = (
        made.dataset,
        made.entry.dataset(
            made.demos, made.config, backbone, cache=tmp_path_factory.mktemp("s"), progress=False
        ),
    )
    made.statistics = made.dataset.statistics()
    return made


def test_data_of_table_and_floor_are_the_same(case):
    """Samples and statistics are those of scenes on the table, but for the zero of heights."""
    indices = np.linspace(0, len(case.dataset) - 1, 8).astype(int)
    ours, theirs = case.dataset.batch(indices), case.world.batch(indices)
    for name in ("eef_pos", "target_pos"):
        torch.testing.assert_close(ours[name][..., 2], theirs[name][..., 2] - TABLE)
        torch.testing.assert_close(ours[name][..., :2], theirs[name][..., :2])
    torch.testing.assert_close(ours["E"][..., 2, 3], theirs["E"][..., 2, 3] - TABLE)
    assert same(ours["K"], theirs["K"]) and same(ours["features"], theirs["features"])
    np.testing.assert_allclose(
        case.statistics["height_range"], case.world.statistics()["height_range"] - TABLE
    )


def test_a_policy_answers_in_the_world(case):
    """The same scene on the floor is answered as on the table, lower by the table's height: bins,
    cells and history know heights from the support alone.
    """
    policy = case.policy()
    high, low = (answers(policy, seen(case.world.demos[0], s)) for s in (TABLE, FLOOR))
    for a, b in zip(high, low):
        np.testing.assert_allclose(a.position, b.position + UP, atol=1e-6)
        np.testing.assert_allclose(a.trajectory, b.trajectory + UP, atol=1e-6)
        assert same(a.grippers, b.grippers)
        assert a.rotation is None or np.allclose(a.rotation, b.rotation)
    heights = np.array([a.position[2] for a in high])
    assert (heights > TABLE - 0.1).all() and (heights < TABLE + 0.6).all()


def test_measured_once_is_measured(case):
    """Datasets, and free runs on what they hold, take demonstrations measured before or not."""
    policy, raw, done = case.policy(), case.demos[1], case.dataset.demos[1]
    assert measured(done, "support") is done and seen_by(raw, case.config).lowered == FLOOR
    assert same(
        free_run(policy, raw, case.config)["predicted"],
        free_run(policy, done, case.config)["predicted"],
    )


def test_studies_answer_in_one_zero_of_heights(case):
    """Where a policy goes wrong, and rollouts drawn beside the truth: pixels of the scene, from
    whatever the policy measures heights.
    """
    policy, demo = case.policy(), case.demos[1]
    found = diagnose.one_step(policy, demo)
    (run,) = openloop.roll([demo], policy, "measured", case.name)
    true = demo.ee_pos[run["targets"]]
    np.testing.assert_allclose(run["true"], true)
    np.testing.assert_allclose(found["at"], to_pixels(true, demo.K, demo.E), atol=1e-6)
    apart = to_pixels(run["predicted"], demo.K, demo.E) - found["at"]
    np.testing.assert_allclose(found["offset"], apart, atol=1e-6)


def test_a_scene_that_does_not_say_is_refused(case):
    """By a policy that was trained so: one sentence with the remedy."""
    (first,) = observations_of(case.world.demos[0], (0,))
    assert first.support is None
    with pytest.raises(UserError, match="--heights support.*support. in metres"):
        case.policy().act(first)


def test_without_the_flag_nothing_changes(synthetic_demos, backbone, tmp_path):
    """The world's heights, whatever a scene stands on, are the default."""
    para = Case("para", synthetic_demos, backbone, tmp_path)
    policy, demo = para.policy(), para.demos[0]
    assert PolicyConfig().heights == "world" and measured(demo, "world") is demo
    plain = list(observations_of(demo, (0, 5)))
    told = [dataclasses.replace(o, support=TABLE) for o in plain]
    assert same(answers(policy, plain), answers(policy, told))


# -- where it is known from -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "support"),
    [
        ({}, 0.9),
        ({"task_suite": "libero_object", "task_id": 3}, 0.0),
        # the scene's, whatever sentence is said in it
        ({"task_suite": "libero_object", "task_id": 3, "language": TASKS["libero_goal"][0]}, 0.0),
        ({"task_suite": "libero_10", "task_id": 5}, 0.867),
        ({"task_suite": "libero_10", "task_id": 0}, 0.41),
        ({"task_suite": "my_kitchen", "support": 0.74}, 0.74),
        # LIBERO's own files say what the problem is called
        (
            {
                "task_suite": "libero_90",
                "problem_info": json.dumps(
                    {"problem_name": "libero_living_room_tabletop_manipulation"}
                ),
            },
            0.41,
        ),
        ({"task_suite": "my_kitchen"}, None),
        ({"task_suite": "libero_10", "task_id": 12}, None),
    ],
)
def test_a_file_tells_what_its_scene_stands_on(attributes, support, tmp_path):
    path = write_synthetic_demos(tmp_path / "demos.hdf5", 2, **attributes)
    demo = open_dataset(path).demos[0]
    assert demo.support == support
    assert mirrored(demo).support == support
    if support is not None:
        low = measured(demo, "support")
        np.testing.assert_allclose(low.ee_pos[:, 2], demo.ee_pos[:, 2] - support)
        return
    with pytest.raises(UserError, match=re.escape(f"{path}: demo_0: --heights support")):
        measured(demo, "support")


@pytest.mark.parametrize("said", ["high", float("nan"), float("inf")])
def test_a_support_that_is_no_height_is_refused(said, tmp_path):
    path = write_synthetic_demos(tmp_path / "demos.hdf5", 2, support=said)
    with pytest.raises(UserError, match="demo_0: support is .*metres is expected; mend"):
        _ = open_dataset(path).demos[0].support


def test_a_servers_request_says_it_or_its_task_does():
    said = lambda **more: serve.observation_of({**asked(), **more}, 16, np.eye(4)).support
    assert said() is None
    assert said(prompt="pick up the milk and place it in the basket") == 0.0
    assert said(prompt="turn on the stove", **{"observation/support": 0.3}) == 0.3
    with pytest.raises(serve.RequestError, match="observation/support"):
        said(**{"observation/support": np.nan})


# -- training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_files(tmp_path_factory):
    """Demonstrations of a scene on the table and of one on the floor."""
    folder = tmp_path_factory.mktemp("two")
    write_synthetic_demos(folder / "table.hdf5", 2, size=112, seed=1)
    floor = {"task_suite": "libero_object"}
    write_synthetic_demos(folder / "floor.hdf5", 2, size=112, seed=2, **floor)
    return folder


def test_a_hint_says_what_the_flag_would_do(two_files, backbone, tmp_path):
    """Where scenes stand on different surfaces, and only there."""
    entry, demos = REGISTRY["para"], open_mixture([two_files]).demos
    made = lambda demos, **flags: entry.dataset(
        demos,
        entry.config(backbone="efficientnet_lite0", image_size=demos[0].image_size, **flags),
        backbone,
        cache=tmp_path,
        progress=False,
    )
    (sentence,) = [s for s in hints(made(demos)) if "surfaces" in s]
    assert re.search(r"at 0 to 0.9 m: .*--heights support .* a bin$", sentence)
    assert said_of_heights(made(demos, heights="support")) is None
    assert said_of_heights(made(demos[:2])) is None


def test_train_asks_for_it_and_the_checkpoint_keeps_it(two_files, tmp_path):
    """Trained on both scenes at once, in one view, whose point is measured so too."""
    flags = train_flags(two_files, tmp_path / "run", 2)
    words = "--model_type para --heights support --canonical_view fit --trust_pictures"
    run(*flags, *words.split(), cwd=tmp_path)
    policy, _, _ = load_policy(tmp_path / "run" / "checkpoint.safetensors")
    train, _ = split_demos(open_mixture([two_files]).demos)
    lowest = min(d.ee_pos[:, 2].min() - d.support for d in train)
    assert policy.config.heights == "support"
    # in the world's heights it would be 0.9 m higher
    assert abs(float(policy.config.canonical_view.split()[2]) - lowest) < 0.1


def test_finetuning_with_other_heights_is_refused(synthetic_demos, backbone, tmp_path):
    """The volume's bins would mean something else, though every shape fits."""
    para = Case("para", synthetic_demos, backbone, tmp_path / "cache")
    path = tmp_path / "theirs.safetensors"
    save_policy(path, para.policy(), "para", {"step": 1})
    new = lambda heights: para.entry.policy(
        dataclasses.replace(para.config, heights=heights), backbone.channels
    ).attach(backbone)
    init_from(new("world"), path)
    with pytest.raises(UserError, match="--heights world, here it is support"):
        init_from(new("support"), path)
