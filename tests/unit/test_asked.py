"""What an evaluation's flags come to: those of a checkpoint, those that nobody reads, episodes that
would repeat.
"""

import pytest

from eval import HOPELESS, build_parser, give_up_if_hopeless, note_protocol, prepare
from runtime import UserError
from sim import layouts
from sim.asked import as_trained, refuse_unread
from sim.layouts import LAYOUTS
from sim.workers import Outcome

CONFIG = {"image_size": 448, "waypoint_stride": 8}
OBJECT, SWAP = "--task_suite libero_object", "--task_suite libero_spatial_swap"
INFO = {"model_type": "para", "backbone_identity": "x"}


def flags(words=""):
    return build_parser().parse_args(words.split())


@pytest.mark.parametrize(
    "words, reader",
    [
        ("--policy oracle --ckpt a.safetensors", "checkpoint"),
        ("--policy blind --sample", "checkpoint"),
        ("--policy expert --feedback measured", "checkpoint"),
        ("--policy remote --temperature 2", "checkpoint"),
        ("--grid 32", "oracle"),
        ("--policy blind --margin 4", "oracle"),
        ("--policy expert --n_height_bins 8", "oracle"),
        ("--label pi0", "remote"),
        ("--policy oracle --replan_steps 3", "remote"),
        ("--send_size 64", "remote"),
        ("--policy expert --backbone_weights w", "checkpoint"),
        ("--policy oracle --text_weights w", "checkpoint"),
        ("--server_timeout 5", "remote"),
    ],
)
def test_a_flag_that_the_policy_does_not_read_is_refused(words, reader):
    """It would be recorded, and have changed nothing."""
    with pytest.raises(UserError, match=f"does not read it, --policy {reader} does; leave it out"):
        refuse_unread(flags(words))


@pytest.mark.parametrize("policy", ["expert", "remote"])
def test_a_stride_of_what_answers_no_waypoints_is_refused(policy):
    """Oracle, blind and checkpoint read it."""
    refuse_unread(flags("--policy blind --waypoint_stride 3"))
    with pytest.raises(UserError, match=f"--waypoint_stride: --policy {policy} answers no"):
        refuse_unread(flags(f"--policy {policy} --waypoint_stride 3"))


@pytest.mark.parametrize("layout", ["shifted", "val_viewpoint_shifted", "moved_midway"])
def test_a_layout_that_moves_nothing_of_a_task_is_refused(layout):
    """(Open drawer) names no object: its "shifted" episodes would be the benchmark's, twice."""
    words = f"--policy oracle --task_suite libero_goal --n_episodes 2 --layout {layout}"
    prepare(flags(f"{words} --task_id 1"))
    with pytest.raises(UserError, match=f"--layout {layout}: .*libero_goal_0.* names no object"):
        prepare(flags(f"{words} --task_id 0"))
    prepare(flags("--policy oracle --task_suite libero_goal --task_id 0 --n_episodes 2"))


def test_flags_that_are_read_are_taken():
    """Each with the policy that reads it."""
    refuse_unread(flags("--ckpt a.safetensors --sample --temperature 2 --feedback hybrid:4"))
    refuse_unread(flags("--policy oracle --grid 32 --n_height_bins 8 --margin 4"))
    refuse_unread(flags("--policy remote --label pi0 --replan_steps 3 --send_size 64"))


@pytest.mark.parametrize("name", CONFIG)
def test_what_a_checkpoint_keeps_is_not_given_otherwise(name):
    """Image size and stride are its config's: another value would be ignored."""
    as_trained(flags(f"--{name} {CONFIG[name]}"), INFO, CONFIG)
    with pytest.raises(UserError, match=f"--{name} 64: .* was trained with {CONFIG[name]}"):
        as_trained(flags(f"--{name} 64"), INFO, CONFIG)


@pytest.mark.parametrize(
    "trained_on, words, grasp",
    [
        ({"task_suite": "libero_spatial", "task_id": "0", "grasp": "side"}, "", "side"),
        ({"task_suite": "libero_spatial", "task_id": "0", "grasp": "side"}, "--task_id 3", None),
        ({"task_suite": "libero_spatial", "task_id": "0", "grasp": "side"}, OBJECT, None),
        ({"task_suite": "libero_spatial", "task_id": "0", "grasp": "side"}, SWAP, "side"),
        ({"task_suite": "libero_spatial_swap", "task_id": "0", "grasp": "planned"}, "", "planned"),
        ({"task_suite": "libero_spatial", "grasp": "planned"}, "--task_id 3", "planned"),
        ({"task_suite": "libero_spatial"}, "", None),
        ({"task_suite": "libero_spatial", "grasp": "planned"}, "--grasp rim", "rim"),
    ],
)
def test_a_grasp_is_of_the_task_that_was_trained_on(trained_on, words, grasp):
    """Of another task's expert the coverage would be measured against a path that nobody takes."""
    args = flags(words)
    as_trained(args, {**INFO, "dataset": trained_on}, CONFIG)
    assert args.grasp == grasp


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_layout_repeats_episodes_unseen(name):
    """An init state in the same condition is the same episode: it would count twice in n and in the
    interval. Layouts that draw by the episode's number have no end.
    """
    layout, most, conditions = LAYOUTS[name], layouts.distinct(name), layouts.conditions(name)
    drawn = layout.shift_seed is not None or layout.moved or layout.setting == "position"
    assert (most is None) == (drawn or layout.part == "val")
    if most is None:
        return
    shown = lambda i: (layouts.init_state_of(name, i), str(conditions[i % len(conditions)]))
    assert len({shown(i) for i in range(most)}) == most == len({shown(i) for i in range(2 * most)})
    refused = f"--n_episodes {most + 1}: .*{most} different episodes of --layout {name}"
    with pytest.raises(UserError, match=refused):
        prepare(flags(f"--policy blind --layout {name} --n_episodes {most + 1}"))


def test_a_failed_protocol_scores_nothing(tmp_path):
    """An evaluation with a mirrored image or a gripper of the other sign ends before it begins."""
    with pytest.raises(UserError, match="protocol check failed, nothing is scored: .*flipped"):
        note_protocol(Outcome("protocol", error="Traceback\nRuntimeError: flipped"), tmp_path)
    assert not list(tmp_path.iterdir())
    note_protocol(Outcome("protocol", {"distinct_init_states": 50}), tmp_path)
    assert (tmp_path / "protocol.json").exists()


def test_an_evaluation_without_hope_ends(tmp_path):
    """Six episodes that all crashed, or all ended in the policy's error; with one that ran it goes
    on.
    """
    crashed = [{"episode": i, "crash": "no memory"} for i in range(HOPELESS)]
    broken = [{"episode": i, "outcome": "error", "error": "shape"} for i in range(HOPELESS)]
    ran = {"episode": 9, "outcome": "miss"}
    for rows, said in ((crashed, "all crashed.*no memory"), (broken, "error of the policy.*shape")):
        with pytest.raises(UserError, match=said):
            give_up_if_hopeless(rows, tmp_path)
        give_up_if_hopeless(rows[1:], tmp_path)
        give_up_if_hopeless([*rows, ran], tmp_path)
