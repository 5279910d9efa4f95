"""A graph of commands: each runs as soon as what it needs is there, on this machine or as tasks of
a Ray cluster.

A node is done when its results are complete, whoever made them. A killed run therefore goes on
where it was. A failed node is reported with the last line of its log; nodes that do not need it go
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

    lacks: a function that tells what the results lack, "" when they are complete. A node without
    it runs whenever a node that needs it has to run, or when no node needs it. resume: (path,
    command to run instead once this path is there). cpus, gpus: what it occupies.
    """

    name: str
    command: list
    deps: tuple = ()
    lacks: Callable[[], str] = None
    resume: tuple = None
    cpus: float = 1
    gpus: float = 0


def pending(nodes):
    """The nodes that have to run, in the order given.

    A node has to run if it is not done and if either no node needs it, or a node that has to run
    does. Raises ValueError for two nodes of one name, or for a node that needs one that is missing.
    """
    # names have to be unique, and what is needed has to be there
    by_name = {node.name: node for node in nodes}
    if len(by_name) != len(nodes):
        raise ValueError("two nodes of one name")
    order = list(TopologicalSorter({node.name: node.deps for node in nodes}).static_order())
    unknown = sorted(set(order) - set(by_name))
    if unknown:
        raise ValueError(f"nodes are needed that there are not: {unknown}")
    todo = set()
    # from what nobody needs, down to what needs nothing
    for name in reversed(order):
        node = by_name[name]
        # a finished training needs no dataset: look at results only if someone will use them
        users = [other.name for other in nodes if name in other.deps]
        asked = not users or any(user in todo for user in users)
        if asked and (node.lacks is None or node.lacks()):
            todo.add(name)
    return [node for node in nodes if node.name in todo]


# loaded once, as nothing may be loaded between fork and exec
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
        # the log reads like a terminal: the command, then its output
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
            return 127  # as a shell says of a command that cannot be started
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
            size = file.seek(0, 2)
            # the end of the file is enough, a log may be long
            file.seek(max(0, size - 8192))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    # a progress bar rewrites its line after a carriage return
    lines = text.replace("\r", "\n").split("\n")
    return next((line.strip()[:width] for line in reversed(lines) if line.strip()), "")


class Local:
    """Runs commands on this machine, `jobs` at a time."""

    def __init__(self, jobs=1):
        self.slots = jobs
        self.pool = concurrent.futures.ThreadPoolExecutor(jobs)
        self.running = set()  # processes

    def check(self, nodes):
        """Any command can be tried here."""

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
            # what has not ended within a minute
            process.kill()
        self.pool.shutdown()


class Ray:
    """Runs commands as tasks of a Ray cluster whose machines share the file system. Ray starts a
    task again whose worker died.
    """

    slots = float("inf")  # Ray itself queues what has no room yet

    def __init__(self, address):
        try:
            import ray
        except ImportError as error:
            advice = "run `make setup`"
            raise UserError(f"--ray: the package ray is not installed; {advice}") from error
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
            ) from error

        def task(repository, *arguments):
            sys.path.insert(0, repository)  # all that a worker knows of it
            return importlib.import_module("study.graph").execute(*arguments)

        self.remote = ray.remote(task)

    def check(self, nodes):
        """Raise UserError for a node that no machine of the cluster could ever run."""
        machines = [m["Resources"] for m in self.ray.nodes() if m["Alive"]]
        for node in nodes:
            # one machine must have all of it: a task does not span machines
            able = [
                machine
                for machine in machines
                if machine.get("CPU", 0) >= node.cpus and machine.get("GPU", 0) >= node.gpus
            ]
            if not able:
                raise UserError(
                    f"{node.name}: asks for {node.cpus:g} CPUs and {node.gpus:g} GPUs, "
                    "which no machine of the cluster has"
                )

    def start(self, node, log, cwd):
        task = self.remote.options(
            name=node.name, num_cpus=node.cpus, num_gpus=node.gpus, max_retries=RAY_RETRIES
        )
        repository = str(Path(__file__).resolve().parents[1])
        return task.remote(repository, node.command, node.resume, str(log), str(cwd))

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


class Run:
    """One run of a graph: which nodes wait, which are at work, which failed and why."""

    def __init__(self, nodes, backend, folder, cwd, title):
        self.backend, self.folder, self.cwd = backend, folder, cwd
        self.waiting = {node.name: node for node in pending(nodes)}
        self.running = {}  # handle of the backend -> (node, seconds since the epoch)
        self.failed, self.starts = {}, {}
        n_done = len(nodes) - len(self.waiting)
        # a log that is no terminal gets a line a minute
        interval = 1 if sys.stderr.isatty() else 60
        self.bar = tqdm(
            total=len(nodes),
            initial=n_done,
            desc=title,
            unit="node",
            miniters=0,
            mininterval=interval,
        )

    def log(self, name):
        """Where a node's output goes."""
        return self.folder / "logs" / f"{name}.log"

    def start_ready(self):
        """Start what needs nothing more, as far as there is room; give up what never can start."""
        # in the order of the plan, so that early cells are finished first
        for node in list(self.waiting.values()):
            broken = [name for name in node.deps if name in self.failed]
            # those that this pass has started are among them
            unfinished = self.waiting.keys() | {other.name for other, _ in self.running.values()}
            if broken:
                del self.waiting[node.name]
                self.fail(node.name, f"not started, {broken[0]} failed")
            elif len(self.running) < self.backend.slots and not unfinished & set(node.deps):
                self.start(self.waiting.pop(node.name))

    def start(self, node):
        """Hand a node to the backend."""
        self.starts[node.name] = self.starts.get(node.name, 0) + 1
        handle = self.backend.start(node, self.log(node.name), self.cwd)
        self.running[handle] = node, time.time()

    def collect(self):
        """Wait a second for nodes that end, and see whether they did what they were for."""
        for handle in self.backend.wait(self.running, timeout=1.0):
            node, since = self.running.pop(handle)
            code = self.backend.result(handle)
            self.record(node, code, since)
            if code < 0 and self.starts[node.name] < TRIES:
                self.start(node)  # a signal ended it, as where memory ran out
                continue
            # exit code 0 is no proof: the results are asked, as before the start
            lack = node.lacks() if node.lacks and not code else ""
            if code:
                lack = f"exit code {code}"
            if lack:
                log = self.log(node.name)
                self.fail(node.name, f"{lack}: {last_line(log)} (log: {log})")
            else:
                self.bar.update()

    def record(self, node, code, since):
        """A row of nodes.jsonl about a command that ended."""
        seconds = round(time.time() - since, 1)
        row = {"node": node.name, "code": code, "started": round(since), "seconds": seconds}
        append_jsonl(self.folder / "nodes.jsonl", row)

    def fail(self, name, why):
        """Say and keep why a node failed."""
        self.failed[name] = why
        tqdm.write(f"{name}: {why}")
        self.bar.update()

    def show(self):
        """The last lines of two logs, behind the bar."""
        lines = []
        for node, _ in list(self.running.values())[:2]:
            lines.append(f"{node.name}: {last_line(self.log(node.name), 70)}")
        self.bar.set_postfix_str("; ".join(lines), refresh=False)
        self.bar.update(0)

    def close(self):
        """End what still runs, and record it."""
        self.backend.close(list(self.running))
        for node, since in self.running.values():
            self.record(node, -signal.SIGTERM, since)
        self.bar.close()


def run_graph(nodes, backend, folder, cwd=".", title="graph"):
    """Run the nodes that are not done -> {name: why it failed, or was not started}.

    A log per node in folder/logs, a row per command that ended, or was ended with the run, in
    folder/nodes.jsonl, one bar with the last lines of the logs. SIGTERM ends a run as Ctrl-C does:
    commands may save, and KeyboardInterrupt is raised.
    """
    cwd = Path(cwd).resolve()
    run = Run(nodes, backend, cwd / folder, cwd, title)
    # only the main thread may set handlers of signals
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _interrupt) if in_main else None
    try:
        # before anything starts: a node that can never run ends the run at once
        backend.check(run.waiting.values())
        while run.waiting or run.running:
            run.start_ready()
            if run.running:
                run.collect()
                run.show()
    finally:
        # after Ctrl-C, SIGTERM or an error too
        run.close()
        if in_main:
            signal.signal(signal.SIGTERM, before)
    return run.failed
