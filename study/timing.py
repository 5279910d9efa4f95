"""How benchmarks measure: callables side by side in one run, and the memory that a call needs at
its peak.
"""

import multiprocessing
import time
from pathlib import Path

import numpy as np


def alternate(variants, rounds):
    """Run callables in turn, A B A B ..., after a warm-up of each -> {name: median seconds}."""
    times = {name: [] for name in variants}
    for call in variants.values():
        call()
    # in turn: a slow spell of the machine hits every variant alike
    for _ in range(rounds):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(t)) for name, t in times.items()}


def peak_mb(call):
    """Memory of a CPU process beyond what it holds, at the peak of `call`, MB."""

    def status(key):
        """A row of the process's status, MB."""
        rows = Path("/proc/self/status").read_text().splitlines()
        return next(int(row.split()[1]) for row in rows if row.startswith(key)) / 1e3

    # VmRSS: resident now; VmHWM: the most that was resident; Linux alone tells these
    before = status("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    call()
    return status("VmHWM:") - before


def in_fresh_process(function, *arguments):
    """Call `function(*arguments)` in a fresh process and return its result.

    In a process that has freed memory before, a call may reuse it, and its peak shows no growth.
    """
    # spawn: a fork would start with the parent's memory
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)
