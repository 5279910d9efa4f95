"""study.bench train: two checkouts take turns, and the steps of each are counted apart."""

import argparse
from pathlib import Path

import pytest

from runtime import UserError
from study.bench_train import measure

TRAINING = """
import sys, time, torch
assert "--model_type" in sys.argv and "--cache" in sys.argv
weight = torch.nn.Parameter(torch.ones(3))
for lr in (1.0, 0.1):  # an estimate beforehand, then the training
    optimizer = torch.optim.AdamW([weight], lr=lr)
    for _ in range(4 if lr == 1.0 else 1000):
        weight.grad = torch.ones(3)
        time.sleep({seconds})
        optimizer.step()
        print("a line that is no measurement")
"""


@pytest.fixture
def checkout(tmp_path):
    """seconds a step -> folder of a checkout whose training takes that long."""

    def make(name, script):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.py").write_text(script)
        return tmp_path / name

    return make


ARGS = argparse.Namespace(
    preset="small", dataset=Path("x.hdf5"), cache=Path("cache"), device="cpu", rounds=3
)


def test_a_slower_checkout_has_the_lower_rate(checkout):
    """Each checkout gets its own rate, whatever the other does and prints."""
    folders = {
        name: checkout(name, TRAINING.format(seconds=seconds))
        for name, seconds in (("here", 0.002), ("against", 0.02))
    }
    found = measure("para", folders, ARGS)
    assert 20 < found["against"]["wall"]["median"] < 50 < found["here"]["wall"]["median"] < 500
    assert found["against"]["wall"]["low"] <= found["against"]["wall"]["high"]


def test_a_training_that_fails_says_why(checkout):
    """The error is the training's last line, not a broken pipe."""
    broken = checkout("broken", "raise SystemExit('no such dataset')")
    with pytest.raises(UserError, match="no such dataset"):
        measure("para", {"here": broken}, ARGS)
