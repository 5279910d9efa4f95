"""A process that has imported the libraries and forks for each script that a test runs: 5 s of CPU
less than a fresh interpreter.

Nothing of the repository is imported before the fork, no thread runs and no GL context exists. A
request is a line of JSON on stdin; the answers are the child's process id, then its exit code, a
line each. It leaves when stdin ends.
"""

import json
import os
import runpy
import sys

import h5py  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import numpy as np
import timm  # noqa: F401
import torch  # noqa: F401
import torchvision  # noqa: F401

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def become(request):
    """Turn this process into what `python SCRIPT ARGUMENTS` would be in a folder."""
    os.chdir(request["cwd"])
    os.environ.update(request["variables"])
    # file descriptors 0, 1, 2: stdin from nowhere, stdout and stderr into the files asked for
    for number, (path, flags) in enumerate(
        [(os.devnull, os.O_RDONLY)] + [(p, os.O_WRONLY | os.O_CREAT) for p in request["files"]]
    ):
        file = os.open(path, flags)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - it stays open while the script runs
    np.random.seed()  # a fork has its parent's state
    script, *rest = request["arguments"]
    if script == "-m":  # `python -m study.bench`, from the repository's root
        sys.argv, sys.path[0] = rest, ROOT
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    sys.argv, sys.path[0] = [script, *rest], os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")


def serve():
    """Answer requests until stdin ends -> the request, in the child that is to do it."""
    # line-buffered: whoever waits for an answer gets it at once
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            answers.close()
            return request  # in the child, which leaves the loop
        print(pid, file=answers)
        # one child at a time: the next request is read after this one has ended
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers)


if __name__ == "__main__":
    asked = serve()
    if asked:
        become(asked)
