"""Check the environment: Python, pinned packages, rendering. Prints what simulates and what
renders, or one error with the command to run or the environment variable to change."""

import importlib.metadata
import re
import sys
from pathlib import Path

from runtime import UserError, run_script
from sim.renderer import kind_of
from sim.simulator import rendered_by, simulator


def main():
    if sys.version_info[:2] != (3, 11):
        raise UserError(
            f"Python {sys.version.split()[0]}: 3.11 is needed; "
            "make setup PYTHON=/path/to/python3.11"
        )
    # every package that requirements.txt pins, as {name: version}
    pins = dict(
        re.findall(
            r"^([A-Za-z0-9_.-]+)==([^\s;]+)",
            (Path(__file__).resolve().parents[1] / "requirements.txt").read_text(),
            re.M,
        )
    )
    for name, version in pins.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"package {name} is not installed; run `make setup`") from None
        if found != version:
            raise UserError(
                f"package {name} is {found}, {version} is pinned; "
                "run `rm .venv/.installed && make setup`"
            )
    print(f"environment ok: {len(pins)} pinned packages; {simulator()}: {kind_of(rendered_by())}")


if __name__ == "__main__":
    run_script(main)
