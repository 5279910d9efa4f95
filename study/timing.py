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

    before = status("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    call()
    return status("VmHWM:") - before


def in_fresh_process(function, *arguments):
    """What `function(*arguments)` returns in a process of its own: memory freed before and used
    again is no growth there.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)
