"""A pool of spawned worker processes for simulator jobs: recycled, replaced after a crash or a
hang, no job lost.

EGL contexts do not survive a fork, so each worker is spawned, makes its own, and is replaced after
`recycle` jobs. A worker that dies (segmentation fault, out of memory, kill) or gives no answer in
time is replaced and its job is tried again. A worker whose parent dies leaves.

A worker is any object with `run(job)` and `close()`. It sends pairs through its pipe: ("ready",
None), ("refused", sentence) or ("unusable", traceback) once, then ("done", result) or ("error",
traceback) for each job.

pebble.ProcessPool (5.2.3, tried) recycles and times out too. It was not taken: the reason for which
an initializer fails is logged and not handed to the caller, a worker's `close` is not called, a
lost job is not tried again, and its workers outlive a parent that is killed. Adding these would
take most of this file.
"""

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import threading
import time
import traceback
from multiprocessing.connection import wait

from runtime import UserError

# One thread each: several workers with two threads each make features ten times slower on two
# cores.
THREADS = {
    "OMP_NUM_THREADS": "1",
    "LP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
# seconds without an answer after which a worker counts as hung: the longest episodes take minutes
TIMEOUT = 1800.0
STARTS = 3  # workers in a row that may die before their first job


@contextlib.contextmanager
def one_thread_each():
    """While inside, processes are started with THREADS: libraries read them when imported."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(THREADS)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@dataclasses.dataclass
class Outcome:
    """What became of a job: `result`, or `error` (a traceback, or how the worker died).

    died: the worker's process ended or hung, each time; False where the job itself raised.
    """

    job: object
    result: object = None
    error: str = None
    died: bool = False


def leave_with_parent():
    """End this process when its parent has ended, even if that was killed. Nobody would collect
    its results.
    """

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _child(connection, factory, arguments):
    leave_with_parent()
    try:
        worker = factory(*arguments)
    except UserError as error:
        connection.send(("refused", str(error)))
        return
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
    """One worker process and the job it is on. It has `timeout` seconds to start, and as many for
    each job.
    """

    def __init__(self, context, factory, arguments, timeout):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_child, args=(theirs, factory, arguments), daemon=True
        )
        with one_thread_each():
            self.process.start()
        theirs.close()  # or the pipe would stay open when the worker dies
        self.job, self.done, self.ready = None, 0, False
        self.timeout, self.deadline = timeout, time.monotonic() + timeout

    def give(self, job):
        self.job, self.deadline = job, time.monotonic() + self.timeout
        # it died meanwhile: its pipe then reads as closed, and the job is tried again
        with contextlib.suppress(OSError):
            self.connection.send(job)

    def answer(self):
        """The pair that the worker sent, or ("died", how)."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return "died", f"worker exited with code {self.process.exitcode}"

    def kill(self):
        self.process.kill()
        self.process.join(timeout=20)  # a process stuck in a driver may outlive even that
        self.connection.close()

    def stop(self):
        # None instead of a job ends the worker's loop: it closes its simulator and exits
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join(timeout=20)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


def run_jobs(
    jobs,
    factory,
    arguments=(),
    n_workers=2,
    recycle=25,
    tries=2,
    timeout=TIMEOUT,
    before_start=lambda: None,
):
    """Run `factory(*arguments).run(job)` for each job on `n_workers` spawned processes -> iterator
    over an Outcome per job, in the order in which they finish.

    A job whose worker dies, or gives no answer for `timeout` seconds, is tried `tries` times in
    all. A job that raises is reported at once. before_start: called whenever a worker is about to
    start, to mend what it needs. Raises UserError for numbers that are out of range, and where the
    factory does; RuntimeError with the worker's traceback if one cannot be made for another reason.
    """
    for name, value in (("workers", n_workers), ("recycle", recycle), ("tries", tries)):
        if value < 1:
            raise UserError(f"--{name} {value}: at least 1 is needed")
    if not timeout > 0:
        raise UserError(f"--timeout {timeout:g}: seconds, more than 0")
    context = multiprocessing.get_context("spawn")

    def start():
        before_start()
        return _Slot(context, factory, arguments, timeout)

    return _Pool(start, n_workers, recycle, tries).outcomes(collections.deque(jobs))


class _Pool:
    """Up to `n_workers` slots, and how often each job was tried. `start()` makes a _Slot."""

    def __init__(self, start, n_workers, recycle, tries):
        self.start, self.n_workers, self.recycle, self.tries = start, n_workers, recycle, tries
        self.slots, self.attempts, self.failed_starts = [], collections.Counter(), 0

    def outcomes(self, queue):
        """Yield the outcomes of the jobs in a queue."""
        try:
            # no more workers than jobs
            self.slots = [self.start() for _ in range(min(self.n_workers, len(queue)))]
            while self.slots:
                self._hand_out(queue)
                for slot, kind, value in self._answers():
                    if outcome := self._settle(slot, kind, value, queue):
                        yield outcome
        finally:  # also where the caller stops iterating
            for slot in self.slots:
                if slot.job is None and slot.ready:
                    slot.stop()
                else:  # in a job that nobody will collect, or a start that nobody waits for
                    slot.kill()

    def _hand_out(self, queue):
        """Give jobs to idle slots; renew those that have done enough, end those without a job."""
        for slot in [s for s in self.slots if s.ready and s.job is None]:
            if not queue:
                self.slots.remove(slot)
                slot.stop()
            elif slot.done >= self.recycle:
                # the new worker starts while the old one ends
                self.slots[self.slots.index(slot)] = self.start()
                slot.stop()
            else:
                slot.give(queue.popleft())

    def _answers(self):
        """Wait for the next answer, or the next deadline -> [(slot, kind, value)]."""
        if not self.slots:
            return []
        soonest = min(slot.deadline for slot in self.slots)
        connections = [slot.connection for slot in self.slots]
        answered = wait(connections, max(0.0, soonest - time.monotonic()))
        found = []
        for slot in self.slots:
            # also where the caller came back late and the deadline has passed
            if slot.connection in answered:
                found.append((slot, *slot.answer()))
            elif time.monotonic() >= slot.deadline:
                why = f"worker gave no answer for {slot.timeout:g} s and was killed"
                found.append((slot, "died", why))
        return found

    def _settle(self, slot, kind, value, queue):
        """Book an answer -> the job's Outcome, or None: the worker started, or the job is tried
        again.
        """
        if kind == "ready":
            slot.ready, self.failed_starts = True, 0
            return None
        if kind == "refused":
            raise UserError(value)
        if kind == "unusable":
            raise RuntimeError(f"a worker could not start:\n{value}")
        job, slot.job, slot.done = slot.job, None, slot.done + 1
        if kind == "died":
            again = self._replace(slot, job, value, queue)
            if again or job is None:
                return None
        if kind == "done":
            return Outcome(job, value)
        return Outcome(job, None, value, kind == "died")

    def _replace(self, slot, job, why, queue):
        """Replace a slot whose worker died -> True if its job is tried again."""
        self.slots.remove(slot)
        slot.kill()
        self.failed_starts += not slot.ready
        if self.failed_starts > STARTS:
            raise RuntimeError(f"workers die before their first job: {why}")
        # by its text, as a job may be of a kind that no Counter takes as a key
        self.attempts[repr(job)] += 1
        again = job is not None and self.attempts[repr(job)] < self.tries
        if again:  # in its place: eval.py's first job is its protocol's check
            queue.appendleft(job)
        if queue:
            self.slots.append(self.start())
        return again
