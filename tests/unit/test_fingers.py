"""What the fingers tell a policy: open, closed, or closed upon nothing."""

import dataclasses

import numpy as np
import pytest
import torch
from test_contract import Case, small_config

from formats.dataset import open_dataset
from harness.hints import hints, said_of_fingers
from policy import MET, PolicyConfig, finger_numbers, finger_state
from registry import REGISTRY

OPEN, HELD, EMPTY = 0.078, 0.0034, 0.0022
BAR = 0.047  # a drawer's, in the fingers


def test_fingers_that_met_are_a_state_of_their_own():
    """A bowl's rim leaves 3.3 to 9 mm between them, nothing 1 mm, 2 while they still close."""
    widths = torch.tensor([OPEN, HELD, EMPTY])
    assert finger_state(widths, PolicyConfig(fingers=2)).tolist() == [0, 1, 1]
    assert finger_state(widths, PolicyConfig(fingers=3)).tolist() == [0, 1, 2]
    assert finger_numbers(widths, PolicyConfig(fingers=2)).tolist() == [[0], [1], [1]]
    assert finger_numbers(widths, PolicyConfig(fingers=3)).tolist() == [[0, 0], [1, 0], [1, 1]]
    assert EMPTY < MET < HELD


def losses(case, *widths):
    """The loss of the case's policy on its batch with all fingers so wide, for each width."""
    policy, batch = case.policy().eval(), case.batch(4)

    def loss(width):
        torch.manual_seed(0)
        fingers = torch.full_like(batch["gripper_width"], width)
        with torch.no_grad():
            return float(policy({**batch, "gripper_width": fingers})["loss"])

    return map(loss, widths)


@pytest.mark.parametrize("name", REGISTRY)
def test_each_policy_can_tell_fingers_that_met(name, synthetic_demos, backbone, tmp_path):
    """With --fingers 3 the answer depends on whether closed fingers hold something, with 2 it does
    not; open fingers are told apart by both.
    """
    for n, told in ((2, False), (3, True)):
        case = Case(name, synthetic_demos, backbone, tmp_path)
        case.config = small_config(case.entry, fingers=n)
        held, empty, opened = losses(case, HELD, EMPTY, OPEN)
        assert (held != empty) == told
        assert held != opened


@pytest.mark.parametrize("name", REGISTRY)
def test_each_policy_can_tell_a_wide_grip_from_open_fingers(
    name, synthetic_demos, backbone, tmp_path
):
    """Fingers around a drawer's bar are nearer to open ones than to closed ones. By --open_width
    above what they hold they are closed, below it they are taken for open.
    """
    for open_width, told in ((0.04, False), (0.07, True)):
        case = Case(name, synthetic_demos, backbone, tmp_path)
        case.config = small_config(case.entry, open_width=open_width)
        bar, held, opened = losses(case, BAR, HELD, OPEN)
        assert (bar != opened) == told
        assert (bar != held) == (not told)


def test_a_training_says_what_is_wider_than_its_open_width(synthetic_demos, backbone, tmp_path):
    """How many demonstrations hold something that is taken for open fingers, and the remedy; the
    frames in which fingers close on their way from open do not count.
    """
    dataset = Case("para", synthetic_demos, backbone, tmp_path).dataset
    assert said_of_fingers(dataset) is None and hints(dataset) == []
    demos = open_dataset(synthetic_demos).demos
    wide = dataclasses.replace(demos[0], gripper_states=np.full((len(demos[0]), 2), BAR / 2))
    dataset.demos = [wide, *demos[1:]]
    (sentence,) = hints(dataset)
    assert sentence.startswith(f"1 of {len(demos)} demonstrations hold something")
    assert "--open_width 0.048 does not" in sentence
    dataset.config = dataclasses.replace(dataset.config, open_width=0.048)
    assert hints(dataset) == []
