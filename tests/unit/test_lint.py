"""`make lint` and the commit hooks run the same checks, and each stops what is wrong."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAMS = ("ruff check", "ruff format", "lint-imports")


def test_make_lint_and_the_commit_hooks_run_the_same_programs():
    """Otherwise one would let a fault through that the other finds after the push."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    target = re.search(r"(?m)^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text())[1]
    for program in PROGRAMS:
        assert f"entry: .venv/bin/{program}" in hooks, program
        assert f"$(VENV)/bin/{program}" in target, program


def test_make_test_fails_on_what_lint_finds():
    """`make test` includes lint, as CI runs nothing else."""
    done = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True)
    for program in PROGRAMS:
        assert f"bin/{program}" in done.stdout, done.stdout + done.stderr


@pytest.fixture
def checkout(tmp_path):
    """A repository with the hooks, the packages of the import contract, and the environment."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in (".pre-commit-config.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for package in ROOT.glob("*/__init__.py"):
        shutil.copytree(
            package.parent,
            folder / package.parent.name,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    (folder / ".venv").symlink_to(sys.prefix)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    return folder


def hooks(folder, file):
    """Run pre-commit on one file of a checkout -> CompletedProcess."""
    subprocess.run(["git", "add", "--intent-to-add", file], cwd=folder, check=True)
    return subprocess.run(
        [folder / ".venv" / "bin" / "pre-commit", "run", "--files", file, "--color", "never"],
        cwd=folder,
        env={**os.environ, "PRE_COMMIT_HOME": str(folder / "hooks")},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "line, failed",
    [
        ("ROWS = 3", set()),
        ("import os", {"ruff check"}),
        ("ROWS=3", {"ruff format"}),
        ("import sim.rollout as rollout\n\nROLLOUT = rollout", {"imports go down"}),
    ],
    ids=["sound", "rule", "format", "contract"],
)
def test_a_commit_with_a_fault_is_stopped(line, failed, checkout):
    """Each hook sees its own kind of fault, and a sound file passes all three."""
    (checkout / "nets" / "fresh.py").write_text(f'"""A fresh module."""\n\n{line}\n')
    done = hooks(checkout, "nets/fresh.py")
    assert done.returncode == bool(failed), done.stdout + done.stderr
    outcomes = dict(re.findall(r"(?m)^([\w ]+?)\.+(Passed|Failed)$", done.stdout))
    assert outcomes.keys() == {"ruff check", "ruff format", "imports go down"}, done.stdout
    assert {name for name, outcome in outcomes.items() if outcome == "Failed"} == failed, (
        done.stdout
    )
