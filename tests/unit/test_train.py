"""Training without a simulator: its budget, its loop, its saved state."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import SIZE
from helpers import ROOT, run
from safetensors.torch import load_file

import train
from data import check_cells, check_shift
from formats.mixture import open_mixture
from harness import checkpoint, trainer
from harness.recipe import Recipe
from harness.records import read_metrics
from harness.run_folder import (
    begin,
    check_same_backbone,
    check_same_data,
    check_there,
    chosen,
    claimed,
    cut_log,
)
from registry import REGISTRY, look_up
from runtime import (
    Distributed,
    StopSignal,
    UserError,
    append_jsonl,
    choose_precision,
    write_json,
)


def flags(dataset, folder, steps, *further):
    """argv of a training on the synthetic demonstrations that takes seconds."""
    command = (
        f"train.py --dataset {dataset} --out {folder} --max_steps {steps} --image_size {SIZE} "
        "--grid 14 --backbone efficientnet_lite0 --batch_size 4 --wandb off --precision fp32"
    )
    return [*shlex.split(command), *further]


# -- budgets


@pytest.mark.parametrize("preset", ["small", "full"])
@pytest.mark.parametrize("name", REGISTRY)
def test_every_preset_names_its_own_steps_and_rate(name, preset):
    """Every preset names its steps and learning rate.

    Otherwise it would train 500 steps at 1e-3 whatever its size, fewer on a GPU than the small one.
    """
    args, config = train.parse_args(["--model_type", name, "--preset", preset])
    assert {"max_steps", "lr"} <= config.presets[preset].keys()
    small, full = (config.presets[p]["max_steps"] for p in ("small", "full"))
    assert full > small and args.max_steps == config.presets[preset]["max_steps"]


@pytest.mark.parametrize("name", REGISTRY)
def test_a_longer_training_validates_no_more_often(name):
    """A validation costs as much as some hundred steps: a training beyond the preset's has ten,
    or as many as the preset has.

    A shorter one keeps the preset's interval, and what is typed is taken as it is.
    """
    preset = look_up(name).config.presets["small"]
    steps, usual = preset["max_steps"], preset["val_every"]

    def every(*typed):
        return train.parse_args(["--model_type", name, "--preset", "small", *typed])[0].val_every

    assert every() == every("--max_steps", "20") == usual
    longer = 10 * steps
    assert longer // every("--max_steps", str(longer)) == max(10, steps // usual)
    assert every("--max_steps", str(longer), "--val_every", "7") == 7


def test_a_budget_in_minutes_is_refused(tmp_path):
    """With a time budget a slower machine would end with another policy.

    One sentence says what to give instead.
    """
    with pytest.raises(UserError, match="--max_minutes 5: budgets are steps.*--max_steps"):
        train.parse_args(["--model_type", "para", "--max_minutes", "5"])
    write_json(
        tmp_path / "old" / "config.json",
        {
            "argv": ["--max_minutes", "5"],
            "args": {"model_type": "para"},
            "config": {"backbone": "efficientnet_lite0"},
        },
    )
    with pytest.raises(
        UserError,
        match="--resume .*old: was started with --max_minutes.*checkpoint.safetensors still loads",
    ):
        train.parse_args(["--resume", str(tmp_path / "old")])


def test_the_learning_rate_ends_at_zero_with_the_last_step():
    """The learning rate depends on the step alone, and reaches zero at the last."""
    args, _ = train.parse_args(
        ["--model_type", "para", "--max_steps", "1000", "--lr", "1e-3", "--warmup", "10"]
    )
    rates = [trainer.learning_rate(args, step) for step in range(1000)]
    assert max(rates) == pytest.approx(1e-3, rel=1e-3) and rates.index(max(rates)) == 9
    assert rates[-1] < 1e-8 and rates[0] == pytest.approx(1e-4)


# -- a run folder


@pytest.mark.parametrize("more", [["--max_steps", "9"], ["--nonsense"], ["--device=cpu"]])
def test_resume_takes_no_other_flag(more):
    """It goes on by the run's own, so another would be ignored in silence."""
    for words in (["--resume", "runs/x", *more], [*more, "--resume=runs/x"]):
        with pytest.raises(UserError, match=f"^{more[0]}: --resume goes on by the run's own flags"):
            train.parse_args(words)


@pytest.mark.parametrize("name", REGISTRY)
def test_what_there_was_no_flag_for_stays_as_it_was(name, tmp_path):
    """A run or checkpoint from before a flag has the weights that it was made with, whatever the
    flag's default is by now.
    """
    config_class = look_up(name).config
    known = {field.name for field in dataclasses.fields(config_class)}
    assert config_class.older.keys() <= known
    run = {"argv": ["--model_type", name], "args": {"model_type": name}}
    write_json(tmp_path / "config.json", {**run, "config": {"backbone": "efficientnet_lite0"}})
    resumed, _ = train.parse_args(["--resume", str(tmp_path)])
    stored = dataclasses.asdict(config_class())
    for flag in config_class.older:
        del stored[flag]
    loaded = checkpoint.fill_config(config_class, stored, "old.safetensors")
    for flag, value in config_class.older.items():
        assert getattr(resumed, flag) == getattr(loaded, flag) == value
        assert getattr(config_class(), flag) != value


def test_a_run_goes_on_as_it_began(tmp_path):
    """Presets and defaults may be others by now: steps, rate, labels and weights are stored."""
    args = {"model_type": "act", "preset": "small", "max_steps": 2500, "patience": 0, "lr": 5e-4}
    config = {"backbone": "efficientnet_lite0", "rotation_weight": 0.5, "waypoint_stride": 4}
    run = {"argv": ["--model_type", "act", "--dataset", "a b.hdf5"], "args": args, "config": config}
    write_json(tmp_path / "config.json", run)
    resumed, _ = train.parse_args(["--resume", str(tmp_path)])
    assert {**vars(resumed), **args, **config} == vars(resumed)
    assert resumed.dataset == [Path("a b.hdf5")] and resumed.out == tmp_path


def test_a_run_goes_on_with_its_own_features(tmp_path):
    """Other weights of the same backbone have the same shapes, and other features."""
    write_json(tmp_path / "config.json", {"backbone_identity": "dinov2-448px-1"})
    check_same_backbone(tmp_path, "dinov2-448px-1")
    with pytest.raises(UserError, match="was trained on features of dinov2-448px-1, here .*px-2"):
        check_same_backbone(tmp_path, "dinov2-448px-2")
    write_json(tmp_path / "config.json", {})  # of a run that is too old to say
    check_same_backbone(tmp_path, "dinov2-448px-2")


def test_maps_end_where_the_image_does():
    """A map that covers more than the image would be stretched over it."""
    for size, grids in ((448, [56, 28]), (256, [32, 16]), (448, [28])):
        check_cells(size, grids)
    with pytest.raises(UserError, match="--image_size 360: .*45 and 23 cells.*as 352"):
        check_cells(360, [45, 23])


def test_resume_sees_that_the_data_are_others(suite, tmp_path):
    """Demonstrations that were trained on could now be held out, in whichever way they changed."""
    files = [suite / f"libero_spatial_{task}.hdf5" for task in (0, 2, 10)]
    described = lambda paths: open_mixture(paths).described()
    write_json(tmp_path / "config.json", {"datasets": described(files[:2])})
    check_same_data(tmp_path, described(files[:2]))
    for others in (files[:1], files, files[1::-1], [files[0], files[2]]):
        with pytest.raises(UserError, match="--resume .*hdf5 is not what it was.*put the old data"):
            check_same_data(tmp_path, described(others))
    write_json(tmp_path / "config.json", {})  # of a run that is too old to say
    check_same_data(tmp_path, described(files))


def test_trainings_of_the_same_second_have_folders_of_their_own(tmp_path):
    """Three seeds begun in one line must not write over each other."""
    named = [claimed(tmp_path / "runs" / "para_1").name for _ in range(3)]
    assert named == ["para_1", "para_1_2", "para_1_3"]


def test_a_run_that_was_killed_before_its_first_save_leaves_no_log(tmp_path):
    """The next one in its folder begins its own; one that goes on has no step twice."""
    log = tmp_path / "metrics.jsonl"
    for step in (1, 10, 20):
        append_jsonl(log, {"step": step, "train/loss": 9.0})
    begin(tmp_path, {})
    assert read_metrics(tmp_path) == [] and (tmp_path / "config.json").is_file()
    for step in (1, 10, 10, 20):
        append_jsonl(log, {"step": step, "train/loss": 1.0})
    cut_log(tmp_path, 10)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 10, 10]


def test_a_checkpoint_without_its_state_is_kept(tmp_path):
    """Copied without the state it is all that there is of a run: neither overwritten, nor trained
    anew by --resume.
    """
    (tmp_path / "checkpoint.safetensors").touch()
    for resume in (None, tmp_path):
        with pytest.raises(UserError, match="holds a checkpoint and no state.safetensors"):
            chosen(tmp_path, "para", resume)
    (tmp_path / "state.safetensors").touch()
    assert chosen(tmp_path, "para", tmp_path) == tmp_path


def test_features_alone_need_no_new_folder(synthetic_demos, tmp_path, capsys):
    """A plan fills the cache again with the command of a training that was stopped half way."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.safetensors").touch()
    words = flags(synthetic_demos, tmp_path / "run", 5, "--cache_only", "--cache", tmp_path / "c")
    train.train(*train.parse_args([str(word) for word in words[1:]]))
    assert "features of" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["state.safetensors"]


def test_nothing_is_collected_for_a_run_that_goes_on(tmp_path):
    """From another folder its relative path leads nowhere."""
    with pytest.raises(UserError, match="--resume .*: data/x.hdf5 is not there; go on from where"):
        check_there(tmp_path, [Path("data/x.hdf5")])


def test_a_collection_that_fails_ends_in_a_sentence(tmp_path, monkeypatch):
    """Its own reason stands above; train.py adds no traceback."""
    monkeypatch.chdir(tmp_path)
    failed = subprocess.CompletedProcess([], 2)
    monkeypatch.setattr(train.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(UserError, match="libero_spatial_0.hdf5: was not collected"):
        train.ensure_dataset([train.DEFAULT_DATASET])


def test_a_shift_of_less_than_a_cell_is_refused():
    """Maps move by whole cells: less would be recorded as an augmentation, and never happen."""
    for limit in (0, 16, 20):
        check_shift(limit, 448, [56, 28])
    with pytest.raises(UserError, match="--shift_aug 15: .*of 16 px.*at least 16, or 0"):
        check_shift(15, 448, [56, 28])
    for size, grids in ((360, [45, 23]), (300, [18]), (448, [56, 24])):
        check_shift(0, size, grids)
        with pytest.raises(UserError, match="maps and camera would move apart"):
            check_shift(64, size, grids)


def test_training_says_how_long_it_will_take(synthetic_demos, tmp_path):
    """Before the first step an estimate is printed, measured with the run's own batch size.

    Afterwards the minutes of training and validation are told apart.
    """
    done = run(*flags(synthetic_demos, "run", 3, "--batch_size", 6, "--val_every", 2), cwd=tmp_path)
    assert "3 steps of batch 6: about 0.0 minutes of training on this machine" in done.stdout
    rows = json.loads((tmp_path / "run" / "profile.jsonl").read_text().splitlines()[0])["rows"]
    assert [r["batch"] for r in rows] == [2, 4, 6]
    assert trainer.expected_minutes([{"batch": 6, "step_ms": 300.0}], 6, 400) == pytest.approx(2.0)
    info = json.loads((tmp_path / "run" / "checkpoint.json").read_text())
    assert info["minutes"] > 0 and info["validation_minutes"] > 0
    assert "of training and" in done.stdout and "of validation" in done.stdout


def test_what_auto_came_to_is_printed_and_stored(state):
    """A run that only recorded `--precision auto` could not be repeated on another machine."""
    folder, printed = state
    stored = json.loads((folder / "config.json").read_text())
    resolved = stored["resolved"]
    assert stored["args"]["device"] == "auto" and resolved["device"] == "cpu"
    assert stored["args"]["preset"] == resolved["preset"] == "small"
    assert stored["backbone_identity"] == resolved["backbone"] != stored["args"]["backbone"]
    assert resolved["precision"] == "fp32" and resolved["max_steps"] == 2
    assert "auto" not in resolved.values()
    assert json.loads((folder / "checkpoint.json").read_text())["resolved"] == resolved
    assert str(Recipe(**resolved)) in printed


@pytest.mark.parametrize(
    "device, asked, found",
    [("cuda:1", "auto", "bf16"), ("cuda:1", "fp32", "fp32"), ("cpu", "bf16", "bf16")],
)
def test_a_precision_is_one_of_two(device, asked, found):
    """A record holds fp32 or bf16: `auto` would say nothing."""
    assert choose_precision(device, asked) == found
    assert choose_precision("cpu") in ("fp32", "bf16")


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="no huge pages here"
)
def test_huge_pages_are_asked_for_in_time():
    """torch reads the variable once.

    A tensor made during an import would come too early and cost a third of a CPU's speed, without a
    sign. Read is the advice on the tensor's mapping ("hg"): how many pages the kernel then finds
    free is the machine's affair.
    """
    code = (
        "import train, runtime, torch\n"
        "runtime.use_huge_pages()\n"
        "kept = torch.ones(16, 1024, 1024)\n"
        "for line in open('/proc/self/smaps'):\n"
        "    name, *rest = line.split()\n"
        "    if '-' in name:\n"
        "        first, end = (int(at, 16) for at in name.split('-'))\n"
        "    elif name == 'VmFlags:' and first <= kept.data_ptr() < end:\n"
        "        print(*rest)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert "hg" in done.stdout.split(), done.stderr


# -- several processes


def torchrun(*arguments, cwd, processes=2):
    """Run a script of the repository under torchrun -> CompletedProcess."""
    launch = shlex.split(
        f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node {processes}"
    )
    return subprocess.run(
        [*launch, str(ROOT / arguments[0]), *map(str, arguments[1:])],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


A = shlex.split(
    "--model_type autoregressive --context 3 --dim 16 --n_layers 2 --n_heads 2 "
    "--patch_grid 4 --key_width 8 --trained_frames 2 --n_height_bins 8"
)


def test_two_processes_end_with_the_weights_of_one(synthetic_demos, tmp_path):
    """Two gloo processes share each batch of five samples, so one has more.

    Noise, masks and sideways shifts differ between samples. The weights end as those of one
    process, up to the order of float sums, and differ from the initial ones.
    """
    common = lambda folder: flags(
        synthetic_demos, folder, 4, *A, "--batch_size", 5, "--shift_aug", 16, "--warmup", 1
    )
    run(*common("alone"), cwd=tmp_path)
    done = torchrun(*common("pair"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    alone, pair = (
        load_file(tmp_path / name / "checkpoint.safetensors") for name in ("alone", "pair")
    )
    assert alone.keys() == pair.keys()
    assert checkpoint.load_policy(tmp_path / "pair" / "checkpoint.safetensors")[1]["step"] == 4
    for name, value in alone.items():
        torch.testing.assert_close(
            pair[name].double(),
            value.double(),
            rtol=0,
            atol=2e-5,
            msg=lambda m, name=name: f"{name}: {m}",
        )
    losses = [
        [
            json.loads(row)["train/loss"]
            for row in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            if "train/loss" in row
        ]
        for name in ("alone", "pair")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_loss_that_is_not_finite_ends_every_process(synthetic_demos, tmp_path):
    """If only one process left, the others would hang in a collective.

    All stop and say why, and the last saved state stays.
    """
    done = torchrun(
        *flags(
            synthetic_demos,
            "pair",
            4,
            "--lr",
            1e30,
            "--clip",
            1e30,
            "--warmup",
            0,
            "--save_every",
            1,
        ),
        cwd=tmp_path,
    )
    assert done.returncode, done.stderr
    assert done.stderr.count("error: the loss or its gradient is not finite at step") == 2, (
        done.stderr
    )
    assert '/train.py", line' not in done.stderr  # torchrun's own traceback is all that there is
    assert all(
        torch.isfinite(v).all()
        for v in load_file(tmp_path / "pair" / "checkpoint.safetensors").values()
    )


def test_a_process_that_comes_second_waits_at_a_file(tmp_path):
    """One process computes the features before the processes join, however long it takes.

    A barrier would time out.
    """
    lock, seen = tmp_path / "cache" / "x.lock", []
    pair = Distributed(1, 2)
    slow = lambda progress: (time.sleep(0.3), seen.append(("first", progress)))
    thread = threading.Thread(target=train.first_alone, args=(pair, lock, slow))
    thread.start()
    while not lock.exists():
        time.sleep(0.01)
    train.first_alone(pair, lock, lambda progress: seen.append(("second", progress)))
    thread.join()
    assert seen == [("first", True), ("second", False)]


# -- state


@pytest.fixture(scope="module")
def state(synthetic_demos, tmp_path_factory):
    """The run folder after two steps, and what was printed."""
    folder = tmp_path_factory.mktemp("state")
    done = run(*flags(synthetic_demos, "run", 2), cwd=folder)
    return folder / "run", done.stdout


def test_another_seed_is_another_training(state, synthetic_demos, tmp_path):
    """Of weights and of samples: three seeds of a table are three trainings."""
    run(*flags(synthetic_demos, "run", 2, "--seed", 1), cwd=tmp_path)
    ours, theirs = (load_file(f / "checkpoint.safetensors") for f in (tmp_path / "run", state[0]))
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    header = json.loads((tmp_path / "run" / "checkpoint.json").read_text())
    assert header["seed"] == header["resolved"]["seed"] == 1


def test_a_state_holds_no_generator(state):
    """Noise follows from (seed, step) on every device and in every process.

    There is no generator to save or to forget.
    """
    tensors = load_file(state[0] / "state.safetensors")
    assert "rng" not in tensors and "optimizer.volume.weight.exp_avg" in tensors


DAMAGE = {
    "another model's": lambda t: t.update({"model.x": torch.zeros(3)}),
    "missing tensor": lambda t: t.pop("model.volume.bias"),
    "other shape": lambda t: t.update({"model.volume.bias": torch.zeros(3)}),
    "foreign moments": lambda t: t.update({"optimizer.0.exp_avg": torch.zeros(3)}),
    "half the moments": lambda t: t.pop("optimizer.volume.bias.exp_avg_sq"),
    "moments of another shape": lambda t: t.update(
        {"optimizer.volume.bias.exp_avg": torch.zeros(3)}
    ),
    "no step": lambda t: None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_state_that_does_not_fit_is_refused_in_one_sentence(damage, state, tmp_path):
    """A state of another model, of an earlier version or with damage: the sentence names file,
    tensor and remedy, without a traceback of torch.
    """
    state, _ = state
    tensors, info = checkpoint.load_tensors(state / "state.safetensors")
    DAMAGE[damage](tensors)
    path = tmp_path / "state.safetensors"
    checkpoint.save_tensors(path, tensors, {} if damage == "no step" else info)
    policy, _, _ = checkpoint.load_policy(state / "checkpoint.safetensors")
    optimizer = torch.optim.AdamW(policy.param_groups(0.01))
    with pytest.raises(UserError, match=f"{path}.*train anew"):
        trainer.load_state(path, policy, optimizer)
    assert trainer.load_state(state / "state.safetensors", policy, optimizer)["step"] == 2


def test_a_signal_before_the_first_step_ends_the_run(monkeypatch, tmp_path):
    """Features may take an hour. A stop is not kept until they are there: each demonstration's are
    already in the cache.
    """

    def prepare(*what):
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")

    monkeypatch.setattr(train, "prepare", prepare)
    args, config = train.parse_args(["--device", "cpu", "--out", f"{tmp_path / 'run'}"])
    # in the background of a shell, SIGINT is ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train.train(args, config)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_kept_for_the_loop_alone(number):
    """Once the weights are saved a signal ends the process as it usually does. So does a second."""
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.raised
        signal.raise_signal(number)
        assert stop.raised and signal.getsignal(number) is signal.SIG_DFL
    assert signal.getsignal(number) is before


def test_batches_made_ahead_come_in_order_and_no_further_than_asked():
    """A thread prepares the samples of later steps.

    Each step still gets its own, and memory holds only a few.
    """
    made = []

    def make(step):
        made.append(step)
        return f"batch {step}"

    ahead = trainer.Ahead(make, 3, 8, depth=2)
    assert [ahead.take() for _ in range(2)] == ["batch 3", "batch 4"]
    assert max(made) <= 6
    assert [ahead.take() for _ in range(3)] == ["batch 5", "batch 6", "batch 7"]
    ahead.close()
    assert made == [3, 4, 5, 6, 7]


def test_a_batch_that_cannot_be_made_ends_the_training_with_its_error():
    """If a file disappears while the thread reads ahead, training ends with that error and does
    not wait.
    """

    def make(step):
        raise UserError("features.npy: no such file")

    ahead = trainer.Ahead(make, 0, 5)
    with pytest.raises(UserError, match="no such file"):
        ahead.take()
    ahead.close()
