"""Training itself, without a simulator: budgets, the loop, its state."""
import json

import pytest

import train
from conftest import SIZE
from helpers import run
from registry import REGISTRY
from runtime import UserError, write_json


def flags(dataset, folder, steps, *further):
    """argv of a training of seconds on the synthetic demonstrations."""
    return ["train.py", "--dataset", dataset, "--image_size", SIZE, "--grid", 14, "--width", 8, "--max_steps", steps, "--backbone",
            "efficientnet_lite0", "--batch_size", 4, "--wandb", "off", "--precision", "fp32", "--out", folder, *further]


# -- budgets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["small", "full"])
@pytest.mark.parametrize("name", REGISTRY)
def test_every_preset_names_its_own_steps_and_rate(name, preset):
    """A preset that leaves them to the parser trains 500 steps at 1e-3, whatever its size: on a GPU fewer than the small one."""
    args, config = train.parse_args(["--model_type", name, "--preset", preset])
    assert {"max_steps", "lr"} <= config.presets[preset].keys()
    small, full = (config.presets[p]["max_steps"] for p in ("small", "full"))
    assert full > small and args.max_steps == config.presets[preset]["max_steps"]


def test_a_budget_in_minutes_is_refused(tmp_path):
    """With the wall clock in it a slower machine ends with another policy: one sentence says what to give instead."""
    with pytest.raises(UserError, match="--max_minutes 5: budgets are steps.*--max_steps"):
        train.parse_args(["--model_type", "para", "--max_minutes", "5"])
    write_json(tmp_path / "old" / "config.json", {
        "argv": ["--max_minutes", "5"], "args": {"model_type": "para"}, "config": {"backbone": "efficientnet_lite0"}})
    with pytest.raises(UserError, match="--resume .*old: was started with --max_minutes.*checkpoint.safetensors still loads"):
        train.parse_args(["--resume", str(tmp_path / "old")])


def test_the_learning_rate_ends_at_zero_with_the_last_step():
    """It depends on the step alone."""
    args, _ = train.parse_args(["--model_type", "para", "--max_steps", "1000", "--lr", "1e-3", "--warmup", "10"])
    rates = [train.learning_rate(args, step) for step in range(1000)]
    assert max(rates) == pytest.approx(1e-3, rel=1e-3) and rates.index(max(rates)) == 9
    assert rates[-1] < 1e-8 and rates[0] == pytest.approx(1e-4)


def test_training_says_how_long_it_will_take(synthetic_demos, tmp_path):
    """Before the first step there is an estimate from measured steps of the run's own batch size; afterwards the minutes of training
    and of validation are told apart."""
    done = run(*flags(synthetic_demos, "run", 3, "--batch_size", 6, "--val_every", 2), cwd=tmp_path)
    assert "3 steps of batch 6: about 0.0 minutes of training on this machine" in done.stdout
    rows = json.loads((tmp_path / "run" / "profile.jsonl").read_text().splitlines()[0])["rows"]
    assert [r["batch"] for r in rows] == [2, 4, 6]
    assert train.expected_minutes([{"batch": 6, "step_ms": 300.0}], 6, 400) == pytest.approx(2.0)
    info = json.loads((tmp_path / "run" / "checkpoint.json").read_text())
    assert info["minutes"] > 0 and info["validation_minutes"] > 0
    assert "of training and" in done.stdout and "of validation" in done.stdout
