"""runs/*.sh hold the commands behind the tables.

Each names a script that exists, and flags that it takes.
"""

import importlib
import re
import shlex
import subprocess

import pytest
from conftest import ROOT

import train
from registry import look_up

SCRIPTS = sorted((ROOT / "runs").glob("*.sh"))
PLAIN = re.compile(r"\$\{?(layout|head|name|policy|context|seed)\}?")  # of a loop
VALUES = {
    **{"layout": "shifted", "head": "new", "name": "a", "seed": "0"},
    **{"policy": "autoregressive", "context": "--context 1"},
}


def commands(path):
    """The Python commands of a shell script as words, with its variables filled in."""
    text = path.read_text().replace("\\\n", " ")
    flags = re.search(r'(?m)^flags="(.*)"$', text)
    text = text.replace("$flags", flags[1] if flags else "$flags")
    text = PLAIN.sub(lambda match: VALUES[match[1]], text)
    return [
        shlex.split(line)[1:]
        for line in map(str.strip, text.splitlines())
        if line.startswith("python ")
    ]


def test_every_table_can_be_made_again():
    """Every page with figures has a script of runs/ that makes them."""
    assert {path.stem for path in SCRIPTS} >= {
        "matrix",
        "baselines",
        "rotation",
        "openloop",
        "memory_task",
        "speed",
        "premise",
    }


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_the_tables_commands_are_taken_by_their_scripts(path):
    """A renamed flag or a moved script fails here, not after an hour of training."""
    assert subprocess.run(["bash", "-n", path]).returncode == 0 and path.stat().st_mode & 0o100
    assert commands(path)
    for words in commands(path):
        script, *given = (
            words[1:] if words[0] == "-m" else [words[0].removesuffix(".py"), *words[1:]]
        )
        module = importlib.import_module(script)
        if script == "train":
            parser = train.build_parser(look_up(given[given.index("--model_type") + 1]).config)
        elif script == "study.premise":
            continue  # it starts at once
        else:
            parser = module.build_parser()
        known, further = parser.parse_known_args(given)
        # which hands them to train.py
        assert not further or script == "study.compare_rotation", further
