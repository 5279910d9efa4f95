"""What the fingers tell a policy: open, closed, or closed upon nothing."""

import pytest
import torch
from test_contract import Case, small_config

from policy import MET, finger_numbers, finger_state
from registry import REGISTRY

OPEN, HELD, EMPTY = 0.078, 0.0034, 0.0022


def test_fingers_that_met_are_a_state_of_their_own():
    """A bowl's rim leaves 3.3 to 9 mm between them, nothing 1 mm, 2 while they still close."""
    widths = torch.tensor([OPEN, HELD, EMPTY])
    assert finger_state(widths, 2).tolist() == [0, 1, 1]
    assert finger_state(widths, 3).tolist() == [0, 1, 2]
    assert finger_numbers(widths, 2).tolist() == [[0], [1], [1]]
    assert finger_numbers(widths, 3).tolist() == [[0, 0], [1, 0], [1, 1]]
    assert EMPTY < MET < HELD


@pytest.mark.parametrize("name", REGISTRY)
def test_each_policy_can_tell_fingers_that_met(name, synthetic_demos, backbone, tmp_path):
    """With --fingers 3 the answer depends on whether closed fingers hold something, with 2 it does
    not; open fingers are told apart by both.
    """
    for n, told in ((2, False), (3, True)):
        case = Case(name, synthetic_demos, backbone, tmp_path)
        case.config = small_config(case.entry, fingers=n)
        policy, batch = case.policy().eval(), case.batch(4)

        def losses(width, policy=policy, batch=batch):
            torch.manual_seed(0)
            widths = torch.full_like(batch["gripper_width"], width)
            with torch.no_grad():
                return float(policy({**batch, "gripper_width": widths})["loss"])

        assert (losses(HELD) != losses(EMPTY)) == told
        assert losses(HELD) != losses(OPEN)
