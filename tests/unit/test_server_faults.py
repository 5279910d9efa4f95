"""Wherever a policy server goes away, the client says so in one sentence: in the handshake, before
its first message, in the middle of one, while it is asked, and when the connection is closed.

Each server is a thread that holds the bare socket, so that each moment is forced and none is luck.
"""

import contextlib
import re
import select
import socket
import struct
import threading

import numpy as np
import pytest
from websockets.utils import accept_key

from harness.remote import AnswerError, Server, ServerLost, Unreachable
from runtime import UserError

METADATA = b"\x82\x01\x80"  # a frame of one byte: msgpack's empty dict
LATE = 60.0  # seconds: nothing here is a matter of time, except on a machine that is busy


def fin(peer):
    """The connection ends in order, as far as TCP is concerned."""
    peer.close()


def reset(peer):
    """The connection ends as that of a process that was killed with unread bytes."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def heard(peer):
    """What the client sends next: the handshake's request, or frames."""
    return peer.recv(2**16)


def shake_hands(peer):
    """The server's half of the opening handshake."""
    asked = heard(peer)
    while b"\r\n\r\n" not in asked:
        asked += heard(peer)
    (key,) = re.findall(rb"Sec-WebSocket-Key: (\S+)", asked)
    answer = (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {accept_key(key.decode())}\r\n\r\n"
    )
    peer.sendall(answer.encode())


@contextlib.contextmanager
def scripted(script):
    """Yield the address of a server that plays `script(socket)` to one client, then is gone."""
    listener = socket.create_server(("127.0.0.1", 0))

    def play():
        with contextlib.suppress(OSError):
            peer, _ = listener.accept()
            # nobody else is let in
            listener.close()
            with peer:
                script(peer)

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    try:
        yield "127.0.0.1:{1}".format(*listener.getsockname())
    finally:
        listener.close()
        thread.join(LATE)


@pytest.fixture(params=[fin, reset], ids=["fin", "reset"])
def end(request):
    return request.param


def one_sentence(error):
    assert "\n" not in str(error.value) and str(error.value)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"HTTP/1.1 101 Swi",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
        b"HTTP/1.1 302 Found\r\nLocation: ws://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
    ],
    ids=["nothing", "half", "ssh", "http", "elsewhere"],
)
def test_a_handshake_that_ends_is_nobody_there(said, end):
    """Whatever was said so far: no policy server answers at this address."""

    def script(peer):
        heard(peer)
        peer.sendall(said)
        end(peer)

    with scripted(script) as address, pytest.raises(Unreachable, match="no policy server") as error:
        Server(address, LATE).connect()
    one_sentence(error)


def test_a_connection_that_ends_before_the_handshake_is_nobody_there(end, monkeypatch):
    """A dying server's listener still accepts. Its connection is gone when the request is sent:
    websockets says so by ConnectionClosedError, which is no error of a handshake.
    """
    dial = socket.create_connection

    def dialled(*args, **kwargs):
        found = dial(*args, **kwargs)
        # wait until the end has arrived
        assert select.select([found], [], [], LATE)[0]
        return found

    monkeypatch.setattr(socket, "create_connection", dialled)
    with scripted(end) as address, pytest.raises(Unreachable, match="no policy server") as error:
        Server(address, LATE).connect()
    one_sentence(error)


@pytest.mark.parametrize("said", [b"", METADATA[:2], b"\x82\xff"], ids=["none", "half", "head"])
def test_a_server_that_ends_before_its_metadata_is_lost(said, end):
    """It was there: the same command may find it again."""

    def script(peer):
        shake_hands(peer)
        peer.sendall(said)
        end(peer)

    with (
        scripted(script) as address,
        pytest.raises(ServerLost, match="connection was los") as error,
    ):
        Server(address, LATE).connect()
    one_sentence(error)


@pytest.mark.parametrize(
    "said",
    [b"", b"\x82\x7e\x10", b"\x88\x02\x03\xf3", b"\x81\x01\xff", b"\x82\xff" + b"\xff" * 8, b"???"],
    ids=["nothing", "half", "close frame", "no utf-8", "too large", "no frame"],
)
def test_a_server_that_ends_while_it_is_asked_is_lost(said, end):
    """In whatever it says: the answer did not come, which is no fault of the policy."""

    def script(peer):
        shake_hands(peer)
        peer.sendall(METADATA)
        heard(peer)
        peer.sendall(said)
        end(peer)

    with scripted(script) as address:
        server = Server(address, LATE)
        assert server.connect() == {}
        with pytest.raises(ServerLost, match="connection was lost") as error:
            server.ask({"prompt": "go"})
        one_sentence(error)
        # and again: there is no connection now
        with pytest.raises(ServerLost, match="no connection is open"):
            server.ask({"prompt": "go"})
        server.close()


def test_a_server_that_ended_before_it_is_asked_is_lost(end):
    """The request cannot even be sent; closing afterwards, and twice, is no error."""
    gone = threading.Event()

    def script(peer):
        shake_hands(peer)
        peer.sendall(METADATA)
        end(peer)
        gone.set()

    with scripted(script) as address:
        server = Server(address, LATE)
        server.connect()
        assert gone.wait(LATE)
        with pytest.raises(ServerLost, match="connection was lost") as error:
            server.ask({"prompt": "go"})
        one_sentence(error)
        server.close()


@pytest.mark.parametrize("reaction", [fin, reset, heard], ids=["fin", "reset", "silence"])
def test_closing_is_no_error_whatever_the_server_does(reaction):
    """The episode is over: nothing that happens to the connection may change its result."""
    go, done = threading.Event(), threading.Event()

    def script(peer):
        shake_hands(peer)
        peer.sendall(METADATA)
        if reaction is heard:
            # the close frame is read and not answered
            assert heard(peer)
        else:
            reaction(peer)
            go.set()
        assert done.wait(LATE)

    with scripted(script) as address:
        server = Server(address, LATE)
        server.connect()
        assert reaction is heard or go.wait(LATE)
        server.close()
        assert server.connection is None
        server.close()
        done.set()


def test_a_server_that_reads_nothing_is_lost_in_time():
    """A request fills the buffers of the network and waits. The sockets' own timeout ends that."""
    done = threading.Event()

    def script(peer):
        shake_hands(peer)
        peer.sendall(METADATA)
        assert done.wait(LATE)

    with scripted(script) as address:
        # it counts for the handshake too, with a thread beside us
        server = Server(address, 1.0)
        server.connect()
        with pytest.raises(ServerLost, match=address) as error:
            server.ask({"observation/image": np.zeros((2048, 2048, 3), np.uint8)})
        one_sentence(error)
        done.set()


def test_a_first_message_that_is_a_text_is_no_policy_server():
    """A chat server, say: it is there and speaks WebSocket, but it is not the one that is meant."""

    def script(peer):
        shake_hands(peer)
        peer.sendall(b"\x81\x02hi")
        heard(peer)

    with scripted(script) as address:
        server = Server(address, LATE)
        with pytest.raises(AnswerError, match="no msgpack message") as error:
            server.connect()
        one_sentence(error)
        server.close()


@pytest.mark.parametrize(
    "address",
    ["", "here:port", "127.0.0.1:99999", "http://here", "ws://[::1", "a" * 70 + ".x:1", "ws://a@b"],
)
def test_an_address_that_is_none_is_refused(address):
    """As such, and not as a server that does not answer: no starting of it would help."""
    with pytest.raises(UserError, match="is no address") as error:
        Server(address, LATE).connect(again=LATE)
    assert not isinstance(error.value, Unreachable)
    one_sentence(error)
