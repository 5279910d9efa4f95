"""Command lines: every script and every policy's config refuses absurd values in one sentence
as soon as they are typed.
"""

import argparse
import dataclasses
import importlib
import math
import re

import pytest
from helpers import ROOT

import flags
import train
from registry import REGISTRY, look_up
from runtime import UserError

SCRIPTS = (
    "study.bench",
    "collect_demos",
    "compare",
    "convert_demos",
    "study.compare_rotation",
    "deploy_dino_kv",
    "study.diagnose",
    "study.listening",
    "eval",
    "study.openloop",
    "precompute_rotation_pca",
    "figures.report",
    "run_matrix",
    "serve",
    *("study.premise", "study.bench_gpu", "study.stalled", "study.demo_curve"),
    "sim.picture_proof",
)
# values by flag, of every policy and of single ones
NUMBERS = {
    "--val_fraction": "0 2",
    "--seed": "-1",
    "--lr": "nan -1 inf",
    "--warmup": "-5",
    "--max_steps": "0 1.5",
    "--n_demos": "0",
    "--grid": "0",
    "--n_height_bins": "0",
    "--width": "0",
    "--dilations": "a,b 1,,2 0",
    "--image_size": "0 100000",
    "--min_travel": "nan -1",
    "--waypoint_stride": "0",
    "--n_window": "0",
    "--sigma": "0",
    "--batch_size": "0",
    "--shift_aug": "nan",
    "--clip": "0",
    "--patience": "-1 1.5",
    "--cooldown": "-1",
    "--save_every": "0",
}
OTHERS = {
    "autoregressive": {
        "--n_heads": "0",
        "--context": "0",
        "--temperature": "nan 0",
        "--recent_hires": "-1",
        "--smooth_weight": "inf",
    },
    "act": {"--n_rot_bins": "0", "--dropout": "1 nan", "--eef_noise_share": "2"},
    "voxel_ar": {"--shortest_wave": "0", "--n_waves": "0"},
    "dino_volume_kv_full": {
        "--rotation_sigma": "nan",
        "--tf_layers": "0",
        "--rotation_weight": "-1",
    },
}
TRAINING = [
    (name, flag, value)
    for name, refused in {"para": NUMBERS, **OTHERS}.items()
    for flag, values in refused.items()
    for value in values.split()
]


def parser_of(name):
    return importlib.import_module(name).build_parser()


def parsers():
    """Every parser of a script and of a model type, by name."""
    return {
        **{name: parser_of(name) for name in SCRIPTS},
        **{f"train {name}": train.build_parser(look_up(name).config) for name in REGISTRY},
    }


@pytest.mark.parametrize(
    "script, words",
    [
        ("study.bench", "features"),
        ("study.bench_gpu", "--device cpu"),
        ("study.demo_curve", "folder"),
        ("study.listening", "--ckpt a.safetensors --dataset a.hdf5"),
        ("study.stalled", "folder --decisions 3"),
        ("compare", "A=a B=b"),
    ],
)
def test_figures_replace_no_other_commands_file(script, words, tmp_path):
    """Refused before anything is read or measured, and the file stays as it was."""
    file = tmp_path / "summary.json"
    file.write_text('{"success_rate": 1.0}')
    flag = "--json" if script == "compare" else "--out"
    with pytest.raises(UserError, match="summary.json: is another command's file"):
        importlib.import_module(script).main([*words.split(), flag, str(file)])
    assert file.read_text() == '{"success_rate": 1.0}'


@pytest.mark.parametrize("model_type, flag, value", TRAINING)
def test_training_refuses_an_absurd_value(model_type, flag, value):
    """The value is refused at once.

    Otherwise minutes of collecting and caching would pass before a traceback, or a run would go on
    to its end without a gradient.
    """
    with pytest.raises(UserError) as error:
        train.parse_args(["--model_type", model_type, flag, value])
    message = str(error.value)
    assert flag in message and value in message and "--help" in message and "\n" not in message


@pytest.mark.parametrize(
    "script, words",
    [
        ("eval", "--recycle 0"),
        ("eval", "--workers 0"),
        ("eval", "--temperature nan"),
        ("eval", "--seed -1"),
        ("eval", "--grid 0"),
        ("eval", "--n_episodes 0"),
        ("eval", "--video_every 0"),
        ("eval", "--n_videos -1"),
        ("collect_demos", "--workers 0"),
        ("collect_demos", "--n_demos 0"),
        ("collect_demos", "--push_rate nan"),
        ("collect_demos", "--image_size 0"),
        ("collect_demos", "--start_jitter inf"),
        ("collect_demos", "--task_ids -1"),
        ("collect_demos", "--task_id -1"),
        ("deploy_dino_kv", "--limit -1"),
        ("precompute_rotation_pca", "--n_demos 0"),
        ("run_matrix", "--seeds -1"),
        ("run_matrix", "--train_minutes nan"),
        ("run_matrix", "--jobs 0"),
        ("study.compare_rotation", "--seeds 0"),
        ("study.openloop", "--max_val 0"),
        ("study.openloop", "--val_fraction 0"),
        ("study.bench", "--rounds 0"),
        ("study.diagnose", "--n_demos 0"),
        ("study.listening", "--first 0"),
    ],
)
def test_a_script_refuses_an_absurd_value(script, words):
    """Otherwise `--recycle 0` would start workers for ever, and `--workers 0` would write a
    summary with n = 0.
    """
    flag, value = words.split()
    with pytest.raises(UserError) as error:
        parser_of(script).parse_args([flag, value])
    assert flag in str(error.value) and value in str(error.value) and "\n" not in str(error.value)


def test_no_script_with_flags_is_left_out():
    """Of all files that make a parser, but train.py, whose policies each have one."""
    makes = re.compile(r"= (flags\.Parser|argparse\.ArgumentParser)\(")
    others = {"tests", "plugins", ".venv", ".venv-lerobot"}  # the last ones are what was installed
    paths = [p for p in ROOT.rglob("*.py") if not others & set(p.relative_to(ROOT).parts)]
    found = [p.relative_to(ROOT).with_suffix("") for p in paths if makes.search(p.read_text())]
    names = {".".join(path.parts) for path in found}
    assert names - {"train"} == set(SCRIPTS)


def test_every_number_of_every_parser_has_a_range():
    """No flag has a bare int or float as its type: these would take NaN and minus one."""
    for name, parser in parsers().items():
        for action in parser._actions:
            assert action.type not in (int, float), (
                f"{name}: {action.option_strings} has no range; take a type from flags.py"
            )
            if (
                isinstance(action.type, flags.Number)
                and action.default is not None
                and action.default is not argparse.SUPPRESS
            ):
                values = action.default if isinstance(action.default, list) else [action.default]
                assert all(action.type.holds(v) for v in values), (
                    f"{name}: {action.option_strings} refuses its own default"
                )


@pytest.mark.parametrize("name", REGISTRY)
def test_help_is_read_in_a_minute(name, monkeypatch):
    """--help shows the flags that users need first. Two hundred lines would hide them."""
    monkeypatch.setenv("COLUMNS", "80")
    parser = train.build_parser(look_up(name).config)
    lines = parser.format_help().splitlines()
    assert len(lines) <= 26 and "--help_all shows all" in lines[-1]
    assert sum(line.startswith("  --") for line in lines) == len(parser.first) == 10


def test_help_all_shows_every_flag(monkeypatch, capsys):
    """--help_all names every flag. Otherwise only readers of the code would find some."""
    with pytest.raises(SystemExit) as left:
        train.parse_args(["--model_type", "act", "--help_all"])
    text = capsys.readouterr().out
    assert left.value.code == 0 and "\ntraining:\n" in text and "\nActConfig:\n" in text
    for action in train.build_parser(look_up("act").config)._actions:
        times = sum(line.startswith(f"  {action.option_strings[0]}") for line in text.splitlines())
        hidden = action.help is argparse.SUPPRESS
        assert hidden or times >= 1, action.option_strings


def test_presets_lie_in_their_ranges():
    """Values of presets lie in their flags' ranges.

    They are not parsed, so nothing else would refuse them.
    """
    for name in REGISTRY:
        parser = train.build_parser(look_up(name).config)
        kinds = {action.dest: action.type for action in parser._actions}
        for preset in look_up(name).config.presets.values():
            assert all(
                kinds[k].holds(v) for k, v in preset.items() if isinstance(kinds[k], flags.Number)
            ), (name, preset)


@pytest.mark.parametrize(
    "change",
    [
        {"grid": 0},
        {"grid": "56"},
        {"grid": True},
        {"sigma": math.nan},
        {"dilations": None},
        {"decode": "loudest"},
        {"rays": 1},
    ],
)
def test_a_config_is_held_to_its_declaration(change):
    """Configs are checked too, as they also come from a checkpoint's header."""
    config = dataclasses.replace(look_up("para").config(), **change)
    with pytest.raises(UserError, match=f"--{next(iter(change))}"):
        flags.check_fields(config)


def test_a_range_says_itself():
    """The sentence names the allowed range with its bounds."""
    assert str(flags.count) == "a whole number of at least 1"
    assert str(flags.fraction) == "a finite number above 0 and below 1"
    assert str(flags.pixels) == "a whole number of at least 16 and of at most 4096"


@pytest.mark.parametrize(
    "script, flag",
    [("train", "--out"), ("train", "--cache"), ("eval", "--out"), ("run_matrix", "--out")],
)
def test_a_file_is_no_folder_to_write(script, flag, tmp_path):
    """`--out FILE` and `--out .` are refused at once, not after training or after the workers
    have started.
    """
    (tmp_path / "file").touch()
    for value in (str(tmp_path / "file"), str(tmp_path / "file" / "below"), "."):
        with pytest.raises(UserError, match=flag):
            parser_of(script).parse_args([flag, value])


@pytest.mark.parametrize("script", ["figures.report", "precompute_rotation_pca"])
def test_a_folder_is_no_file_to_write(script, tmp_path):
    """`--out .` for a file is refused in one sentence."""
    given = {"figures.report": ["--evals", "x"], "precompute_rotation_pca": ["--dataset", "x"]}[
        script
    ]
    for value in (str(tmp_path), ".", ""):
        with pytest.raises(UserError, match="--out"):
            parser_of(script).parse_args([*given, "--out", value])
