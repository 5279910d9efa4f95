"""A policy behind a socket, in openpi's protocol: WebSocket messages of msgpack, arrays as bytes.

    server  when a client connects: a dict of metadata, which may be empty
    client  one observation: {"observation/image": (S,S,3) uint8, "observation/state": (8,), ...}
    server  {"actions": (N,7), ...}; or a text, the traceback of what failed, before it closes

It is the contract between openpi's `WebsocketPolicyServer` and its `WebsocketClientPolicy`
(openpi-client 0.1.0): four lines, unchanged since they appeared, and spoken by the servers of many
other projects. This file is both sides' codec, and the client. The server is serve.py.
"""

import contextlib
import functools
import socket
import struct
import time

import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidURI, WebSocketException
from websockets.sync.client import connect

from runtime import UserError, one_line

ACTION = 7  # numbers of an action: translation, rotation vector, gripper
MAX_BYTES = 2**26  # of a message: garbage does not fill the memory
# arrays of booleans, whole numbers and floats; others could run code when they are read
KINDS = "biuf"
PAUSE = 0.5  # seconds between two tries at a server that refuses the connection
# what the network and websockets raise, at any moment: while connecting, too, a connection may end
BROKEN = (WebSocketException, OSError)


class AnswerError(Exception):
    """What the server answered cannot be carried out. It counts as the policy's failure."""


class ServerLost(Exception):
    """The server closed the connection, or gave no answer in time. The episode was not played to
    its end, and says nothing about the policy."""


class Unreachable(UserError):
    """Nobody answers at the server's address."""


# -- messages -------------------------------------------------------------------------------------


def _encoded(value):
    """An array or a NumPy number as openpi's msgpack_numpy writes it: a map with keys of bytes."""
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError(f"{type(value).__name__} cannot be sent")
    if value.dtype.kind not in KINDS + "US":
        raise TypeError(f"an array of dtype {value.dtype} cannot be sent")
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    data = np.ascontiguousarray(value).tobytes()
    return {b"__ndarray__": True, b"data": data, b"dtype": value.dtype.str, b"shape": value.shape}


def _decoded(found):
    """The array or number of a map that `_encoded` made; other maps stay as they are."""
    if b"__ndarray__" not in found and b"__npgeneric__" not in found:
        return found
    dtype = np.dtype(found[b"dtype"])
    if dtype.kind not in KINDS + "US":
        raise ValueError(f"an array of dtype {dtype} is not taken")
    if b"__npgeneric__" in found:
        return dtype.type(found[b"data"])
    # frombuffer and reshape check that the bytes are as many as the shape says
    return np.frombuffer(found[b"data"], dtype).reshape(found[b"shape"])


pack = functools.partial(msgpack.packb, default=_encoded)


def unpack(message):
    """The value of a message (bytes). Raises AnswerError for what is no msgpack, or no array."""
    try:
        return msgpack.unpackb(message, object_hook=_decoded)
    # msgpack, NumPy and UTF-8 each have their own
    except Exception as error:
        size = f"{len(message)} bytes"
        raise AnswerError(f"sent {size} that are no msgpack message ({one_line(error)})") from error


def actions_of(answer):
    """The actions (N,7) float64 of an answer, N >= 1; a single action (7,) counts as a chunk of
    one. Raises AnswerError for anything else, and for NaN and Inf.
    """
    if not isinstance(answer, dict):
        raise AnswerError(f"answered a {type(answer).__name__}, a dict with 'actions' is expected")
    if "actions" not in answer:
        keys = ", ".join(map(str, answer)) or "none"
        raise AnswerError(f"answered without the key 'actions' (its keys: {keys})")
    try:
        actions = np.asarray(answer["actions"])
        fits = actions.dtype.kind in KINDS
    except ValueError:  # lists of unequal lengths
        fits = False
    if not fits:
        raise AnswerError("answered 'actions' that are no array of numbers")
    if actions.shape == (ACTION,):
        actions = actions[None]
    if actions.ndim != 2 or not len(actions) or actions.shape[1] != ACTION:
        raise AnswerError(
            f"answered 'actions' of shape {actions.shape}, (N, {ACTION}) with N >= 1 is expected"
        )
    if not np.isfinite(actions).all():
        raise AnswerError(f"answered 'actions' with NaN or Inf: {actions.tolist()}")
    return actions.astype(np.float64)


# -- the client -----------------------------------------------------------------------------------


class Server:
    """A connection to a policy server at an address, such as "127.0.0.1:8000" or "wss://host/path".

    timeout: seconds that connecting, or an answer, may take. `metadata`: what it says of itself.
    """

    def __init__(self, address, timeout):
        self.address, self.timeout = address, timeout
        self.connection, self.metadata = None, {}

    def connect(self, again=0.0):
        """Connect, anew where a connection is open -> the metadata.

        again: seconds for which a refused connection is tried again. Raises UserError where the
        address is none, Unreachable where nobody answers, ServerLost where the connection ends
        before the first message, and AnswerError where that is no dict.
        """
        self.close()
        deadline = time.monotonic() + again
        while self.connection is None:
            try:
                self.connection = self._opened()
            # a server that starts refuses, one that ends does so at any line of the handshake
            except (ConnectionError, ConnectionClosed, socket.gaierror) as error:
                if time.monotonic() > deadline:
                    raise self._not_opened(error) from error
                time.sleep(PAUSE)
            except (*BROKEN, ValueError) as error:
                raise self._not_opened(error) from error
        metadata = unpack(self._received())
        if not isinstance(metadata, dict):
            kind = type(metadata).__name__
            raise AnswerError(f"its first message is a {kind}, a dict of metadata is expected")
        self.metadata = metadata
        return metadata

    def _opened(self):
        uri = self.address if "://" in self.address else f"ws://{self.address}"
        # No pings: a server that computes does not answer them. No proxy: the address is meant.
        opened = connect(
            uri,
            legacy=True,  # a connection, not a context
            compression=None,
            max_size=MAX_BYTES,
            open_timeout=self.timeout,
            close_timeout=1.0,
            ping_interval=None,
            proxy=None,
        )
        # sending has a timeout of its own: a server that hangs reads nothing
        seconds, part = divmod(self.timeout, 1)
        limit = struct.pack("ll", int(seconds), int(1e6 * part))
        # a connection that has ended by now has no socket; the first message tells
        with contextlib.suppress(OSError):
            opened.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        return opened

    def _not_opened(self, error):
        # a port that is no number, a name that is none; a certificate's error is an OSError too
        if isinstance(error, (InvalidURI, ValueError)) and not isinstance(error, OSError):
            return UserError(
                f"--server {self.address}: is no address ({one_line(error)}); HOST:PORT is expected"
            )
        return Unreachable(
            f"--server {self.address}: no policy server answers there ({one_line(error)}); "
            "start it, then the same command goes on"
        )

    def ask(self, request):
        """The answer to a request, a dict of arrays, numbers and texts.

        Raises ServerLost where the connection breaks or no answer comes in time, and AnswerError
        where the answer is no msgpack message, or the server's traceback.
        """
        message = pack(request)
        if self.connection is None:
            raise ServerLost(f"{self.address}: no connection is open")
        try:
            self.connection.send(message)
        except BROKEN as error:
            raise self._lost(error) from error
        answer = self._received()
        # openpi's servers send an exception's traceback as text
        if isinstance(answer, str):
            last = answer.strip().splitlines()[-1:] or ["an empty text"]
            raise AnswerError(f"failed: {last[0][:300]}")
        return unpack(answer)

    def _received(self):
        try:
            return self.connection.recv(timeout=self.timeout)
        except TimeoutError as error:
            self.close()
            raise ServerLost(
                f"{self.address}: gave no answer for {self.timeout:g} s (--server_timeout)"
            ) from error
        except BROKEN as error:
            raise self._lost(error) from error

    def _lost(self, error):
        self.close()
        return ServerLost(f"{self.address}: the connection was lost ({one_line(error)})")

    def close(self):
        """Close the connection, if one is open."""
        if self.connection is not None:
            with contextlib.suppress(*BROKEN):
                self.connection.close()
            self.connection = None
