"""runs/*.sh hold the commands behind the tables.

Each names a script that exists, and flags that it takes.
"""

import importlib
import re
import shlex
import subprocess

import pytest
from conftest import ROOT

import eval as evaluation
import run_matrix
import train
from registry import look_up
from sim.asked import refuse_unread
from study.matrix_plan import Plan

SCRIPTS = sorted((ROOT / "runs").glob("*.sh"))
# of a loop; a variable that a script sets to a text in quotes has its last one
VALUES = {
    **{"layout": "shifted", "head": "new", "name": "a", "seed": "0", "n": "5", "steps": "100"},
    **{"policy": "autoregressive", "context": "--context 1", "model": "para", "kind": "camera"},
    **{"share": "0.5", "bound": "oracle", "run": "thirty"},
}
QUOTED = re.compile(r'(?m)^ *(?:[\w-]+\) )?(\w+)="(.*?)"(?: ;;)?$')


def commands(path):
    """The Python commands of a shell script as words, with its variables filled in."""
    text = re.sub(r"\$\(.*?\)+", "2", path.read_text().replace("\\\n", " "))  # what is computed
    values = {**VALUES, **dict(QUOTED.findall(text))}
    for _ in range(2):  # some texts name other variables
        text = re.sub(r"\$\{?(\w+)\}?", lambda found: values.get(found[1], found[0]), text)
    return [
        shlex.split(line.partition(" || ")[0])[1:]
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
def test_a_plans_evaluations_are_not_refused(path):
    """What run_matrix.py would type for hours is taken by eval.py, flags that go together or not
    included: one refused row would end the script after all others.
    """
    for words in commands(path):
        if words[0] != "run_matrix.py" or "--table" in words:
            continue
        nodes = Plan(run_matrix.parse_args(words[1:])).nodes
        typed = [n.command for name, n in nodes.items() if name.startswith("eval-")]
        assert typed
        for command in typed:
            args = evaluation.build_parser().parse_args(command[2:])
            refuse_unread(args)
            if args.policy != "checkpoint":
                evaluation.prepare(args)


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
            if given[0] == "--resume":
                continue  # with the flags of the command that began
            parser = train.build_parser(look_up(given[given.index("--model_type") + 1]).config)
        elif script == "study.premise":
            continue  # it starts at once
        else:
            parser = module.build_parser()
        known, further = parser.parse_known_args(given)
        # which hands them to train.py
        assert not further or script == "study.compare_rotation", further
