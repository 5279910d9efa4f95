"""One process owns the network and answers the simulators' workers, which need neither torch nor
memory for it.

A worker's agent sends each observation through a socket and waits for the waypoint. The process
answers the waiting requests in batches (see harness/sessions.py). If it dies, the workers in the
middle of an episode leave too. Their episodes are tried again, as after any worker's death, and
the next worker to start brings up a new process.

    worker:  RemoteAgent --(kind, value)--> socket --> _listen --> queue --> _decide --> sessions
"""

import contextlib
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing.connection import Client, Listener

from runtime import UserError
from sim.workers import TIMEOUT, leave_with_parent, one_thread_each

CONNECT_SECONDS = 60  # that a worker waits for a process that is being brought up again
WAITING = 64  # workers whose connection may wait to be taken


class RemoteError(Exception):
    """The policy's own exception in the other process: its traceback is the message."""


class RemoteAgent:
    """A policy in another process, as an agent of sim/rollout.py. address: of its Decider."""

    needs_image = True

    def __init__(self, address):
        self.address, self.connection, self.seconds = address, None, {}

    def start(self, scene, path, seed=0):
        # one connection, and so one session, for all episodes of this worker
        if self.connection is None:
            self.connection = connected(self.address)
        self.seconds = {"features": 0.0, "policy": 0.0}
        self._ask("begin", seed)

    def act(self, observation, closed):
        answer = self._ask("act", observation)
        # the traceback of what the policy raised
        if isinstance(answer, str):
            raise RemoteError(answer)
        waypoint, self.seconds = answer
        return waypoint

    def _ask(self, kind, value):
        """The answer to a request. Ends this worker where nobody answers any more.

        It raises SystemExit, which no `except Exception` takes for an error of the policy. A worker
        that has left has its episode tried again.
        """
        try:
            self.connection.send((kind, value))
            return self.connection.recv()
        except (EOFError, OSError):
            raise SystemExit("the process that owns the network has gone") from None


def connected(address):
    """A connection to the Decider at an address. Ends this worker where none comes up."""
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        # While the process starts anew, the socket is not there yet, or nobody listens at it.
        try:
            # the authkey is the parent's: all processes that it starts inherit it
            return Client(address, authkey=bytes(multiprocessing.current_process().authkey))
        except (FileNotFoundError, ConnectionError) as error:
            if time.monotonic() > deadline:
                raise SystemExit(f"no network answers ({error})") from None
            time.sleep(0.2)


class Decider:
    """The parent's side: it starts a process that makes `factory(*arguments)`, such sessions as
    those of harness/sessions.py, and that answers at `address`.

    timeout: seconds after which a decision counts as hung, and the process ends itself. `about`:
    what the sessions say of themselves. Raises UserError with the sessions' reason where they
    refuse to be made, and RuntimeError with a traceback where the process fails.
    """

    def __init__(self, factory, arguments=(), timeout=TIMEOUT):
        self.folder = tempfile.mkdtemp(prefix="para_decisions_")
        self.address = os.path.join(self.folder, "socket")
        self.made_of = (self.address, factory, arguments, timeout)
        self.pipe = self.process = None
        self._start()
        # wait until the network is loaded: bad files are refused before any simulator starts
        try:
            kind, self.about = self.pipe.recv()
        except EOFError:
            kind, self.about = "died", None
        if kind != "ready":
            self.close()
            if kind == "refused":
                raise UserError(self.about)
            died = f"the network's process exited with code {self.process.exitcode}"
            raise RuntimeError(self.about or died)

    def _start(self):
        # spawned, not forked: neither threads nor a CUDA context survive a fork
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, *self.made_of), daemon=True)
        with one_thread_each():
            self.process.start()
        theirs.close()  # or the pipe would stay open when the process dies

    def ensure(self):
        """Bring the process up again if it has died. Called before each worker starts.

        A worker leaves when this process dies, so its replacement is the first sign of that death.
        """
        # a process that is just dying gets a moment to be seen as dead
        self.process.join(timeout=0.1)
        if not self.process.is_alive():
            self.pipe.close()
            self._start()  # its "ready" is not awaited: workers wait for it in `connected`

    def close(self):
        self.process.kill()
        self.process.join(timeout=20)
        self.pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


# -- in the process that owns the network ---------------------------------------------------------


def _serve(pipe, address, factory, arguments, timeout):
    leave_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this
    try:
        sessions = factory(*arguments)
    except UserError as error:
        return pipe.send(("refused", str(error)))
    except BaseException:
        return pipe.send(("unusable", traceback.format_exc()))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(address)  # of one that died
    authkey = bytes(multiprocessing.current_process().authkey)
    listener = Listener(address, "AF_UNIX", backlog=WAITING, authkey=authkey)
    # requests: (connection, session, observation); busy: {a deciding thread: since when}
    requests, busy = queue.SimpleQueue(), {}
    for _ in range(sessions.threads):
        _thread(_decide, sessions, requests, busy)
    _thread(_watch, busy, timeout)
    pipe.send(("ready", sessions.about))
    # one thread a worker: it takes in that worker's requests, and the deciding threads answer
    while True:
        # a worker that dies while it connects is the pool's affair
        with contextlib.suppress(EOFError, OSError, multiprocessing.AuthenticationError):
            _thread(_listen, listener.accept(), sessions, requests)


def _thread(target, *arguments):
    threading.Thread(target=target, args=arguments, daemon=True).start()


def _listen(connection, sessions, requests):
    """Take in a worker's requests until it leaves. It has one session, for one episode at a
    time.
    """
    session = sessions.open()
    with contextlib.suppress(EOFError, OSError), connection:
        while True:
            kind, value = connection.recv()
            if kind == "begin":
                sessions.begin(session, value)
                connection.send(None)
            else:
                requests.put((connection, session, value))


def _decide(sessions, requests, busy):
    """Answer the requests that wait, at most `sessions.batch` at a time. A batch that is not full
    does not wait for more.
    """
    this = threading.get_ident()
    while True:
        # the first request is waited for, the others are taken if they are there
        taken = [requests.get()]
        with contextlib.suppress(queue.Empty):
            while len(taken) < sessions.batch:
                taken.append(requests.get_nowait())
        busy[this] = time.monotonic()
        answers = sessions.answer([(session, observation) for _, session, observation in taken])
        del busy[this]
        for (connection, *_), answer in zip(taken, answers):
            with contextlib.suppress(OSError):  # it was killed meanwhile
                connection.send(answer)


def _watch(busy, timeout):
    """End the process once a decision hangs: no thread can be stopped."""
    while True:
        time.sleep(min(1.0, timeout / 4))
        now = time.monotonic()
        # a copy, as other threads write into it
        if any(now - since > timeout for since in list(busy.values())):
            print(
                f"a decision took more than {timeout:g} s, the network starts anew", file=sys.stderr
            )
            os._exit(1)
