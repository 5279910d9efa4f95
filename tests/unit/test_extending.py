"""docs/extending.md works as written: its policy is put into a copy of the repository and
trained.
"""

import re
import shlex
import shutil

import pytest
from conftest import ROOT, SIZE
from helpers import run

PAGE = (ROOT / "docs" / "extending.md").read_text()
# the contract's tests that run over every policy
CONTRACT = re.findall(
    r"(?m)^def test_\w+\(case\b", (ROOT / "tests" / "unit" / "test_contract.py").read_text()
)
# what the page's commands get in addition: small, and of data that is at hand
SMALL = {
    "pytest": ["-q", "-p", "no:cacheprovider"],
    "train.py": [
        *["--max_steps", 3, "--val_every", 3, "--image_size", SIZE, "--batch_size", 4],
        *["--backbone", "efficientnet_lite0", "--wandb", "off", "--out", "run"],
    ],
}


def block(kind, title):
    """The page's fenced block of a kind and a title."""
    found = re.findall(rf'```{kind} title="{re.escape(title)}"\n(.*?)```', PAGE, re.S)
    assert len(found) == 1, (kind, title)
    return found[0]


def added(text, changes):
    """A file's text with the `+` lines of a diff, each after the context line above it."""
    lines, at = text.splitlines(), None
    for change in changes.splitlines():
        sign, line = change[0], change[1:]
        if sign == "+":
            at += 1
            lines.insert(at, line)
        else:
            assert lines.count(line) == 1, f"registry.py has no line {line!r}"
            at = lines.index(line)
    return "\n".join(lines) + "\n"


@pytest.fixture
def checkout(tmp_path):
    """A copy of the code and of the contract's tests, with the page's policy in it."""
    folder = tmp_path / "checkout"
    for path in [
        *ROOT.glob("*.py"),
        *(f for p in ROOT.glob("*/__init__.py") for f in p.parent.glob("*.py")),
        *(ROOT / "tests").glob("*.py"),
        ROOT / "tests" / "unit" / "test_contract.py",
        ROOT / "pytest.ini",
    ]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (folder / "model_linear.py").write_text(block("python", "model_linear.py"))
    registry = folder / "registry.py"
    registry.write_text(added(registry.read_text(), block("diff", "registry.py")))
    return folder


def test_a_policy_written_by_the_page_passes_the_contract_and_trains(checkout, synthetic_demos):
    """The page's policy passes the contract and trains.

    A page that leaves out what a policy needs would mislead everybody.
    """
    commands = [shlex.split(line)[1:] for line in block("bash", "your policy").splitlines()]
    assert [words[-1] for words in commands] == ["linear", "linear"]
    for words in commands:
        script, *flags = words[1:] if words[0] == "-m" else words
        if script == "train.py":
            flags += ["--dataset", synthetic_demos]
        place = str(checkout / script) if script.endswith(".py") else script
        done = run(place, *flags, *SMALL[script], cwd=checkout)
        if script == "pytest":
            # some of the contract's tests have several cases
            passed = int(re.search(r"(?m)^(\d+) passed", done.stdout)[1])
            assert passed >= len(CONTRACT), done.stdout
    assert (checkout / "run" / "checkpoint.safetensors").is_file()
