"""A graph of commands: each runs as soon as what it needs is there, on this machine or as tasks of
a Ray cluster.

Whether a node is done is asked of its results, whoever made them, so that a killed run goes on
where it was. A failed node is reported with the last line of its log; what does not need it goes
on.
"""

import concurrent.futures
import ctypes
import dataclasses
import importlib
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path

from tqdm import tqdm

from runtime import UserError, append_jsonl

TRIES = 3  # starts of a command that a signal killed, as out of memory
RAY_RETRIES = 3  # further starts of a task whose Ray worker died
PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclasses.dataclass
class Node:
    """A command and what it needs.

    lacks: what its results lack, "" when they are complete; without it the node has no results to
    be asked for, and runs before a node that needs it, or when nothing does. resume: (path, command
    to run instead once this path is there).
    """

    name: str
    command: list
    deps: tuple = ()
    lacks: Callable[[], str] = None
    resume: tuple = None
    cpus: float = 1
    gpus: float = 0


def pending(nodes):
    """The nodes that have to run, in the order given: those not done that nobody needs, or that one
    of these needs.
    """
    by_name = {node.name: node for node in nodes}
    if len(by_name) != len(nodes):
        raise ValueError("two nodes of one name")
    order = list(TopologicalSorter({node.name: node.deps for node in nodes}).static_order())
    if set(order) != set(by_name):
        raise ValueError(
            f"nodes are needed that there are not: {sorted(set(order) - set(by_name))}"
        )
    needed_by = {name: [n.name for n in nodes if name in n.deps] for name in by_name}
    todo = set()
    for name in reversed(order):
        asked = not needed_by[name] or any(other in todo for other in needed_by[name])
        if asked and (by_name[name].lacks is None or by_name[name].lacks()):
            todo.add(name)
    return [node for node in nodes if node.name in todo]


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent():
    """To be called between fork and exec."""
    if _libc:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _interrupt(*_):
    """A handler of SIGTERM; a second one is not waited for."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise KeyboardInterrupt


def execute(command, resume, log, cwd, running=None):
    """Run a command here, its output appended to `log` -> exit code, negative for the signal that
    ended it.

    It dies with the process that started it (on Linux): a second try after a kill must not find the
    first one still at work.
    """
    if resume and Path(cwd, resume[0]).exists():
        command = resume[1]
    log = Path(cwd, log)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        try:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent,
            )
        except OSError as error:
            file.write(f"{error}\n".encode())
            return 127
        if running is not None:
            running.add(process)
        code = process.wait()
        if running is not None:
            running.discard(process)
        return code


def last_line(log, width=160):
    """The last line of a log, or of the progress bar at its end."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 8192))
            lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    except OSError:
        return ""
    return next((line.strip()[:width] for line in reversed(lines) if line.strip()), "")


class Local:
    """Runs commands on this machine, `jobs` at a time."""

    def __init__(self, jobs=1):
        self.slots, self.pool, self.running = (
            jobs,
            concurrent.futures.ThreadPoolExecutor(jobs),
            set(),
        )

    def check(self, nodes):
        pass

    def start(self, node, log, cwd):
        return self.pool.submit(execute, node.command, node.resume, log, cwd, self.running)

    def wait(self, handles, timeout):
        return concurrent.futures.wait(handles, timeout, concurrent.futures.FIRST_COMPLETED).done

    def result(self, handle):
        return handle.result()

    def close(self, handles):
        for process in list(self.running):
            process.terminate()  # train.py saves and leaves
        concurrent.futures.wait(handles, 60)
        for process in list(self.running):
            process.kill()
        self.pool.shutdown()


class Ray:
    """Runs commands as tasks of a Ray cluster whose machines share the file system. Ray starts a
    task again whose worker died.
    """

    slots = float("inf")

    def __init__(self, address):
        try:
            import ray
        except ImportError:
            raise UserError("--ray: the package ray is not installed; run `make setup`")
        self.ray = ray
        try:
            host, colon, port = address.removeprefix("ray://").rpartition(":")
            if colon:
                # Ray itself would try for minutes
                socket.create_connection((host, int(port)), 10).close()
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"--ray {address}: no cluster there ({reason}); start one with `ray start --head`"
            )

        def task(repository, *arguments):
            sys.path.insert(0, repository)  # all that a worker knows of it
            return importlib.import_module("study.graph").execute(*arguments)

        self.remote = ray.remote(task)

    def check(self, nodes):
        """Raise UserError for a node that no machine of the cluster could ever run."""
        machines = [m["Resources"] for m in self.ray.nodes() if m["Alive"]]
        for node in nodes:
            if not any(
                m.get("CPU", 0) >= node.cpus and m.get("GPU", 0) >= node.gpus for m in machines
            ):
                raise UserError(
                    f"{node.name}: asks for {node.cpus:g} CPUs and {node.gpus:g} GPUs, which no machine of the "
                    "cluster has"
                )

    def start(self, node, log, cwd):
        task = self.remote.options(
            name=node.name, num_cpus=node.cpus, num_gpus=node.gpus, max_retries=RAY_RETRIES
        )
        return task.remote(
            str(Path(__file__).resolve().parents[1]), node.command, node.resume, str(log), str(cwd)
        )

    def wait(self, handles, timeout):
        return self.ray.wait(list(handles), num_returns=1, timeout=timeout)[0]

    def result(self, handle):
        try:
            return self.ray.get(handle)
        except self.ray.exceptions.RayError:
            return -signal.SIGKILL  # the worker died, each time

    def close(self, handles):
        for handle in handles:
            self.ray.cancel(handle, force=True)
        self.ray.shutdown()


def run_graph(nodes, backend, folder, cwd=".", title="graph"):
    """Run the nodes that are not done -> {name: why it failed, or was not started}.

    A log per node in folder/logs, a row per command that ended, or was ended with the run, in
    folder/nodes.jsonl, one bar with the last lines of the logs. SIGTERM ends a run as Ctrl-C does:
    commands may save, and KeyboardInterrupt is raised.
    """
    cwd = Path(cwd).resolve()
    folder = cwd / folder
    waiting = {node.name: node for node in pending(nodes)}
    log = lambda name: folder / "logs" / f"{name}.log"
    running, failed, attempts = {}, {}, {}
    shown = sys.stderr.isatty()
    bar = tqdm(
        total=len(nodes),
        initial=len(nodes) - len(waiting),
        desc=title,
        unit="node",
        miniters=0,
        mininterval=1 if shown else 60,
    )

    def record(node, code, since):
        append_jsonl(
            folder / "nodes.jsonl",
            {
                "node": node.name,
                "code": code,
                "started": round(since),
                "seconds": round(time.time() - since, 1),
            },
        )

    def fail(name, why):
        failed[name] = why
        tqdm.write(f"{name}: {why}")
        bar.update()

    def start(node):
        attempts[node.name] = attempts.get(node.name, 0) + 1
        running[backend.start(node, log(node.name), cwd)] = node, time.time()

    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _interrupt) if here else None
    try:
        backend.check(waiting.values())
        while waiting or running:
            for node in list(waiting.values()):
                broken = [d for d in node.deps if d in failed]
                # those that this pass has started too
                busy = {other.name for other, _ in running.values()}
                if broken:
                    del waiting[node.name]
                    fail(node.name, f"not started, {broken[0]} failed")
                elif len(running) < backend.slots and not any(
                    d in waiting or d in busy for d in node.deps
                ):
                    start(waiting.pop(node.name))
            if not running:
                continue
            for handle in backend.wait(running, timeout=1.0):
                (node, since), code = running.pop(handle), backend.result(handle)
                record(node, code, since)
                if code < 0 and attempts[node.name] < TRIES:
                    start(node)
                    continue
                lack = f"exit code {code}" if code else node.lacks() if node.lacks else ""
                if lack:
                    fail(node.name, f"{lack}: {last_line(log(node.name))} (log: {log(node.name)})")
                else:
                    bar.update()
            lines = [
                f"{node.name}: {last_line(log(node.name), 70)}" for node, _ in running.values()
            ]
            bar.set_postfix_str("; ".join(lines[:2]), refresh=False)
            bar.update(0)
    finally:
        backend.close(list(running))
        for node, since in running.values():
            record(node, -signal.SIGTERM, since)
        bar.close()
        if here:
            signal.signal(signal.SIGTERM, before)
    return failed
