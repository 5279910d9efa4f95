"""study.bench memory tells an evaluation's processes apart."""

import subprocess
import sys

import pytest

from study.bench_memory import memory_by_role

# a parent with two children, as eval.py has them: one with the simulator, one with torch
PARENT = """
import subprocess, sys
code = "import {}; print('loaded', flush=True); import sys; sys.stdin.read()"
for library in ("mujoco", "torch"):
    child = subprocess.Popen([sys.executable, "-c", code.format(library)], stdin=subprocess.PIPE)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_worker_is_told_from_the_network():
    """The larger of the two processes is the one with torch here. It was reported as the worker."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", PARENT], **pipes, text=True) as parent:
        loaded = [parent.stdout.readline() for _ in range(2)]
        found = memory_by_role(parent.pid)
        parent.stdin.close()
    assert loaded == ["loaded\n"] * 2
    assert 10 < found["worker"]["rss"] < found["network"]["rss"]
    assert all(memory["anon"] <= memory["rss"] <= memory["peak"] for memory in found.values())
