"""The worker pool: no job is lost if a worker dies, raises or is replaced.

Workers are really spawned.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from runtime import UserError
from sim.workers import THREADS, run_jobs


class Square:
    """Squares its job and tells its process."""

    def run(self, job):
        return job * job, os.getpid()

    def close(self):
        pass


class Crash(Square):
    """Ends its process on the first try of job 2, and on every try of job 'always'."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def run(self, job):
        if job == "always":
            os._exit(3)
        marker = self.folder / f"{job}.tried"
        if job == 2 and not marker.exists():
            marker.touch()
            os._exit(7)
        return super().run(job)


class Raise(Square):
    """Fails on job 1."""

    def run(self, job):
        if job == 1:
            raise ValueError("job one is no good")
        return super().run(job)


class Unmakeable:
    """A worker whose simulator does not start."""

    def __init__(self):
        raise OSError("no EGL here")


class Refuses:
    """A worker that was asked for something that cannot be."""

    def __init__(self):
        raise UserError("the clean scene has no other bowl; give --no-clean_scene")


class DiesAtStart:
    """A worker whose process ends while it is made."""

    def __init__(self):
        os._exit(5)


class DiesIdle(Square):
    """Finishes its first job and ends its process before the next one is given."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def run(self, job):
        if not (self.folder / "died").exists():
            (self.folder / "died").touch()
            threading.Timer(0.1, os._exit, (9,)).start()
        return super().run(job)


class Hang(Square):
    """Does not answer on the first try of job 2, and on no try of job 'always'."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def run(self, job):
        marker = self.folder / f"{job}.tried"
        if job == "always" or job == 2 and not marker.exists():
            marker.touch()
            time.sleep(600)
        return super().run(job)


class HangsAtStart:
    """A worker whose simulator never gets ready."""

    def __init__(self):
        time.sleep(600)


class Sleep(Square):
    """Leaves its process id in a folder and sleeps."""

    def __init__(self, folder):
        (Path(folder) / str(os.getpid())).touch()

    def run(self, job):
        time.sleep(600)


class Threads(Square):
    """Tells the thread settings that it was given."""

    def run(self, job):
        return {name: os.environ.get(name) for name in THREADS}


def test_every_job_gets_its_result():
    """All jobs come back once, each with its own result, from processes other than this one."""
    outcomes = list(run_jobs(range(6), Square, n_workers=2))
    assert sorted((o.job, o.result[0]) for o in outcomes) == [(i, i * i) for i in range(6)]
    assert all(o.error is None and o.result[1] != os.getpid() for o in outcomes)


def test_no_jobs_start_no_worker():
    """Nothing to do starts nothing."""
    assert list(run_jobs([], Unmakeable)) == []


def test_a_crashed_worker_is_replaced_and_its_job_repeated(tmp_path):
    """A segmentation fault in the simulator costs a worker, not a job."""
    outcomes = list(run_jobs(range(5), Crash, (str(tmp_path),), n_workers=2))
    assert sorted((o.job, o.error) for o in outcomes) == [(i, None) for i in range(5)]
    assert (tmp_path / "2.tried").exists()


def test_a_repeated_job_keeps_its_place(tmp_path):
    """eval.py's first job is its check: episodes must not overtake it where a worker dies."""
    order = [outcome.job for outcome in run_jobs([2, 3, 4, 5], Crash, (tmp_path,), 1)]
    assert order == [2, 3, 4, 5]


def test_a_job_that_always_crashes_is_given_up(tmp_path):
    """After its tries a job is reported with how its worker died. The others are done."""
    outcomes = {
        o.job: o for o in run_jobs(["always", 1, 3], Crash, (str(tmp_path),), n_workers=1, tries=2)
    }
    assert "exited with code 3" in outcomes["always"].error
    assert outcomes[1].result[0] == 1 and outcomes[3].result[0] == 9


def test_a_job_that_hangs_times_out_and_is_tried_again(tmp_path):
    """A stuck EGL call would stop a run for ever.

    The worker that hangs is killed, and another does its job.
    """
    outcomes = list(run_jobs([1, 2, 3], Hang, (str(tmp_path),), n_workers=2, timeout=4))
    assert sorted((o.job, o.result[0], o.died) for o in outcomes) == [
        (1, 1, False),
        (2, 4, False),
        (3, 9, False),
    ]
    assert (tmp_path / "2.tried").exists()


def test_a_job_that_always_hangs_is_given_up(tmp_path):
    """After its tries it is reported like the death of a worker, not as an exception of the job.

    The others are done.
    """
    outcomes = {
        o.job: o
        for o in run_jobs(["always", 1], Hang, (str(tmp_path),), n_workers=1, tries=1, timeout=4)
    }
    assert "no answer for 4 s" in outcomes["always"].error and outcomes["always"].died
    assert outcomes[1].result[0] == 1


def test_a_result_that_waits_for_the_caller_is_no_hang(tmp_path):
    """A caller may write a video for longer than a job may take.

    It then gets the next result, and no worker was killed.
    """
    outcomes = []
    for outcome in run_jobs([1, 3, 4], Hang, (str(tmp_path),), n_workers=2, tries=1, timeout=4):
        outcomes.append(outcome)
        time.sleep(4.5 if len(outcomes) == 1 else 0)
    assert all(o.error is None for o in outcomes) and len(outcomes) == 3


@pytest.mark.parametrize(
    "name, value",
    [
        ("n_workers", 0),
        ("n_workers", -1),
        ("recycle", 0),
        ("tries", 0),
        ("timeout", 0),
        ("timeout", float("nan")),
    ],
)
def test_numbers_out_of_range_are_refused(name, value):
    """Zero workers would do no job, and workers replaced after zero jobs would be replaced for
    ever.
    """
    with pytest.raises(UserError, match=f"--{name.removeprefix('n_')} "):
        run_jobs(range(3), Square, **{name: value})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_leave_when_their_parent_is_killed(tmp_path):
    """After a SIGKILL of a collection no simulator goes on working."""
    code = (
        "from sim.workers import run_jobs; from test_workers import Sleep; "
        f"list(run_jobs([1, 2], Sleep, ({str(tmp_path)!r},)))"
    )
    here = Path(__file__).resolve().parent
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": f"{here}:{here.parents[1]}"}
    )
    deadline = time.time() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.time() < deadline:
        time.sleep(0.05)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    alive = lambda: [
        p
        for p in pids
        if Path(f"/proc/{p}/stat").exists() and " Z " not in Path(f"/proc/{p}/stat").read_text()
    ]
    deadline = time.time() + 10
    while (left := alive()) and time.time() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(pids) == 2 and not left


def test_a_worker_that_dies_between_jobs_is_replaced(tmp_path):
    """A worker may also die while the caller handles its result.

    The next job then goes to a new one.
    """
    outcomes = []
    for outcome in run_jobs([1, 2, 3], DiesIdle, (str(tmp_path),), n_workers=1):
        outcomes.append(outcome)
        time.sleep(0.5)  # the caller writes a file, the worker dies meanwhile
    assert sorted((o.job, o.error) for o in outcomes) == [(1, None), (2, None), (3, None)]


def test_a_job_that_raises_is_reported():
    """An exception is reported with its traceback on the first try, and the other jobs go on."""
    outcomes = {o.job: o for o in run_jobs(range(3), Raise, n_workers=1)}
    assert "ValueError: job one is no good" in outcomes[1].error
    assert "Traceback" in outcomes[1].error
    assert outcomes[1].result is None and outcomes[0].result[0] == 0 and outcomes[2].result[0] == 4


def test_recycling_changes_the_process():
    """Workers are replaced after `recycle` jobs, so that a leak of a driver stays small."""
    pids = [o.result[1] for o in run_jobs(range(5), Square, n_workers=1, recycle=2)]
    assert pids[0] == pids[1] and pids[2] == pids[3] and len(set(pids)) == 3


@pytest.mark.parametrize(
    "factory, reason",
    [
        (Unmakeable, "OSError: no EGL here"),
        (DiesAtStart, "exited with code 5"),
        (HangsAtStart, "no answer for 1 s"),
    ],
)
def test_a_worker_that_cannot_start_ends_the_run(factory, reason):
    """If a simulator never starts, the run ends with its own reason and does not try or wait
    for ever.
    """
    with pytest.raises(RuntimeError, match=reason):
        list(run_jobs(range(3), factory, n_workers=1, timeout=1 if factory is HangsAtStart else 60))


def test_what_a_worker_refuses_at_its_start_is_one_sentence():
    """As what it refuses in a job: the caller's user has no use for a traceback."""
    with pytest.raises(UserError, match="^the clean scene has no other bowl; give"):
        list(run_jobs(range(3), Refuses, n_workers=2))


def test_workers_have_one_thread_each_and_the_parent_is_left_alone(monkeypatch):
    """Two workers of two threads each are ten times slower on two cores.

    The caller's own settings come back.
    """
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    before = {name: os.environ.get(name) for name in THREADS}
    assert [o.result for o in run_jobs([0], Threads)] == [THREADS]
    assert {name: os.environ.get(name) for name in THREADS} == before


def test_leaving_early_ends_the_workers():
    """A caller that stops listening leaves no process behind."""
    import multiprocessing

    jobs = run_jobs(range(10), Square, n_workers=2)
    next(jobs)
    jobs.close()
    deadline = time.time() + 10
    while multiprocessing.active_children() and time.time() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()
