"""A pool of spawned worker processes for simulator jobs: recycled, replaced after a crash, no job lost.

EGL contexts do not survive a fork and leak over long runs, so each worker is spawned, makes its own, and is replaced
after `recycle` jobs. A worker that dies (segmentation fault, out of memory, kill) is replaced and its job is tried again.
"""
import collections
import contextlib
import dataclasses
import multiprocessing
import os
import traceback
from multiprocessing.connection import wait

# One thread each: several workers with two threads each make features ten times slower on two cores.
THREADS = {"OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclasses.dataclass
class Outcome:
    """What became of a job: `result`, or `error` (a traceback, or how the worker died)."""
    job: object
    result: object = None
    error: str = None


def _child(connection, factory, arguments):
    try:
        worker = factory(*arguments)
    except BaseException:
        connection.send(("unusable", traceback.format_exc()))
        return
    connection.send(("ready", None))
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):  # the parent has gone
        while (job := connection.recv()) is not None:
            try:
                connection.send(("done", worker.run(job)))
            except Exception:
                connection.send(("error", traceback.format_exc()))
    worker.close()


class _Slot:
    """One worker process and the job it is on."""

    def __init__(self, context, factory, arguments):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_child, args=(theirs, factory, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.job, self.done, self.ready = None, 0, False

    def give(self, job):
        self.job = job
        with contextlib.suppress(OSError):  # it died meanwhile: its pipe then reads as closed, and the job is tried again
            self.connection.send(job)

    def stop(self):
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join(timeout=20)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


def run_jobs(jobs, factory, arguments=(), n_workers=2, recycle=25, tries=2):
    """Run `factory(*arguments).run(job)` for each job on `n_workers` spawned processes; yield an Outcome per job as it
    finishes. A job whose worker dies is tried `tries` times in all; a job that raises is reported at once.

    Raises RuntimeError with the worker's traceback if a worker cannot be made at all.
    """
    context = multiprocessing.get_context("spawn")
    queue, attempts = collections.deque(jobs), collections.Counter()
    n_workers = min(n_workers, len(queue))
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(THREADS)  # inherited by the children, which read it when they import torch
    slots = []
    try:
        slots = [_Slot(context, factory, arguments) for _ in range(n_workers)]
        while slots:
            for slot in [s for s in slots if s.ready and s.job is None]:
                if not queue:
                    slots.remove(slot)
                    slot.stop()
                elif slot.done >= recycle:
                    slots[slots.index(slot)] = _Slot(context, factory, arguments)
                    slot.stop()
                else:
                    slot.give(queue.popleft())
            if not slots:
                break
            for connection in wait([s.connection for s in slots]):
                slot = next(s for s in slots if s.connection is connection)
                try:
                    kind, value = connection.recv()
                except (EOFError, OSError):
                    slot.process.join()
                    kind, value = "died", f"worker exited with code {slot.process.exitcode}"
                if kind == "ready":
                    slot.ready = True
                    continue
                if kind == "unusable":
                    raise RuntimeError(f"a worker could not start:\n{value}")
                job, slot.job, slot.done = slot.job, None, slot.done + 1
                if kind == "died":
                    attempts["start" if job is None else repr(job)] += 1
                    if attempts["start"] > 3:
                        raise RuntimeError(f"workers die before their first job: {value}")
                    slots[slots.index(slot)] = _Slot(context, factory, arguments)
                    if job is None:
                        continue
                    if attempts[repr(job)] < tries:
                        queue.append(job)
                        continue
                yield Outcome(job, value if kind == "done" else None, None if kind == "done" else value)
    finally:
        for slot in slots:
            if slot.job is None:
                slot.stop()
            else:  # in the middle of a job that nobody will collect
                slot.process.kill()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
