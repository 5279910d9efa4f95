"""Early stopping: where a training ends, what it keeps, and that a kill changes neither."""

import json
import shlex
import signal

import pytest
import torch
from conftest import SIZE
from helpers import interrupt, run
from safetensors.torch import load_file
from test_train import torchrun

from harness.recipe import Recipe
from harness.trainer import Trainer, learning_rate
from runtime import Distributed, read_json, write_json
from study.matrix_plan import lacks_training


def flags(dataset, folder, *further):
    """argv of a short training with --patience; at this rate the held-out error soon rises."""
    command = (
        f"train.py --model_type act --dataset {dataset} --out {folder} --image_size {SIZE} "
        "--backbone efficientnet_lite0 --batch_size 4 --wandb off --precision fp32 --dim 16 "
        "--n_layers 1 --patch_grid 4 --max_steps 40 --val_every 2 --val_samples 12 --save_every 3 "
        "--patience 2 --cooldown 3 --lr 0.05 --warmup 1"
    )
    return [*shlex.split(command), *map(str, further)]


class Shown(Trainer):
    """A Trainer that is shown held-out errores and writes nothing: where it ends follows."""

    def __init__(self, recipe, errors):
        self.recipe, self.errors, self.dist = recipe, iter(errors), Distributed()
        self.step, self.end, self.best_step, self.best_error = 0, recipe.max_steps, 0, float("inf")
        self.kept = []

    def validate(self):
        self.metrics = {"val/cm_mean": next(self.errors)}

    def save_checkpoint(self, **further):
        self.kept.append(self.step)

    def go(self):
        """Take the steps -> the step at which it ends."""
        while self.step < self.end:
            self.step += 1
            if self.due()[1]:
                self.look_at_held_out()
        return self.end


def recipe(**values):
    names = dict.fromkeys(Recipe.__dataclass_fields__, 0)
    common = {"max_steps": 100, "val_every": 10, "save_every": 10, "lr": 1.0, "freeze_steps": 0}
    return Recipe(**{**names, **common, **values})


def test_a_training_ends_after_so_many_validations_without_a_lower_error():
    """Two validations after the lowest the rate begins to fall; a lower error meanwhile is kept."""
    trainer = Shown(recipe(patience=2, cooldown=15), [5.0, 3.0, 4.0, 3.5, 2.9, 9.0])
    # the lowest at 20, at 40 two validations were no better: 15 steps more, the last one validated
    assert trainer.go() == 55 and trainer.kept == [10, 20, 50]
    # it always gets better, so the budget ends it
    assert Shown(recipe(patience=2), range(100, 0, -1)).go() == 100


def test_without_patience_every_step_is_trained():
    """A rising held-out error changes nothing, and no checkpoint is written at a validation."""
    trainer = Shown(recipe(), range(100))
    assert trainer.go() == 100 and trainer.kept == []


def test_the_rate_of_a_training_without_a_known_end_falls_in_its_cooldown():
    """A cosine would end before the error has settled, or not have fallen where training stops."""
    open_ended = recipe(patience=2, cooldown=10, warmup=4)
    rates = [learning_rate(open_ended, step, end=50) for step in range(50)]
    assert rates[0] == 0.25 and set(rates[3:41]) == {1.0}
    assert rates[41:] == pytest.approx([0.9 - 0.1 * i for i in range(9)])


@pytest.fixture(scope="module")
def whole(synthetic_demos, tmp_path_factory):
    """The folder of a training that its patience has ended, and what was printed."""
    folder = tmp_path_factory.mktemp("patience")
    done = run(*flags(synthetic_demos, "run"), cwd=folder)
    return folder / "run", done.stdout


def errors(folder):
    """{step: held-out error} of a run."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["val/cm_mean"] for row in rows if "val/cm_mean" in row}


def test_the_checkpoint_has_the_best_weights_and_says_so(whole):
    """The checkpoint is of the lowest held-out error, the state of the last step.

    Its header tells how long was trained in all and which step it is of.
    """
    folder, printed = whole
    info, found = read_json(folder / "checkpoint.json", "run"), errors(folder)
    best, last = info["best_step"], info["step"]
    assert best == min(found, key=found.get) < last == max(found) < 40 and info["finished"]
    assert info["metrics"]["val/cm_mean"] == found[best]
    assert f"{last} steps, the weights of step {best}" in printed
    assert info["resolved"]["patience"] == 2 and "patience 2 x 2 steps" in printed
    kept, state = (load_file(folder / f"{n}.safetensors") for n in ("checkpoint", "state"))
    same = [torch.equal(kept[n], state[n]) for n in kept if n.startswith("model.position.")]
    assert same == [False, False]


def test_a_training_that_was_killed_ends_where_the_whole_one_did(whole, synthetic_demos, tmp_path):
    """The state remembers the lowest error and the end; a resumed run keeps the same weights."""
    folder, _ = whole
    stopped = tmp_path / "run"
    began = lambda: (stopped / "state.safetensors").exists()
    interrupt(flags(synthetic_demos, "run"), tmp_path, began, signal.SIGTERM)
    run("train.py", "--resume", "run", cwd=tmp_path)
    one, other = (read_json(f / "checkpoint.json", "run") for f in (folder, stopped))
    assert [one[k] for k in ("step", "best_step")] == [other[k] for k in ("step", "best_step")]
    one, other = (load_file(f / "checkpoint.safetensors") for f in (folder, stopped))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_processes_learn_of_the_end_from_the_first(synthetic_demos, tmp_path):
    """One process alone validates; the other would wait in a collective for ever."""
    done = torchrun(*flags(synthetic_demos, "pair", "--max_steps", 14), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    info = read_json(tmp_path / "pair" / "checkpoint.json", "run")
    assert info["finished"] and info["step"] == max(errors(tmp_path / "pair"))


def test_a_matrix_takes_a_training_that_ended_early_for_finished(tmp_path):
    """Or it would be resumed for ever; one that was killed on its way is not finished."""
    command = ["python", "train.py", "--patience", "2"]
    write_json(
        tmp_path / "config.json",
        {
            "command": "python train.py --patience 2",
            "dataset": {"command": ""},
            "args": {"max_steps": 40},
        },
    )
    lacks = lambda: lacks_training(tmp_path, command, tmp_path / "absent.hdf5")
    write_json(tmp_path / "checkpoint.json", {"step": 12})
    assert lacks() == f"{tmp_path} stopped at step 12 of 40"
    write_json(tmp_path / "checkpoint.json", {"step": 12, "finished": True})
    assert lacks() == ""
