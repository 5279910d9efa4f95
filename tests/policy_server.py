"""A small policy server of openpi's protocol, in a process of its own: `policy_server.py [PORT]
[JSON]`.

It prints its port. What it answers is told by the request's prompt, so that one process has every
fault. JSON: {"metadata": what a client is told first, "dies": at which connection it exits, in
the middle of an episode}. It knows nothing of this repository.
"""

import json
import os
import sys
import time

import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve


def array(values):
    values = np.asarray(values)
    return {
        b"__ndarray__": True,
        b"data": values.tobytes(),
        b"dtype": values.dtype.str,
        b"shape": values.shape,
    }


def hang(stay):
    time.sleep(60)


def die(stay):
    os._exit(3)


# openpi's own answers are float32 or float64, ten to fifty actions each
ANSWERS = {
    "nan": lambda stay: msgpack.packb({"actions": array(stay * np.nan)}),
    "shape": lambda stay: msgpack.packb({"actions": array(stay[:, :6])}),
    "none": lambda stay: msgpack.packb({"actions": array(stay[:0])}),
    "words": lambda stay: msgpack.packb({"actions": ["up", "down"]}),
    "keys": lambda stay: msgpack.packb({"action": array(stay)}),
    "list": lambda stay: msgpack.packb([1, 2]),
    "bytes": lambda stay: b"\xc1\xff garbage",
    "torn": lambda stay: msgpack.packb({"actions": {**array(stay), b"shape": (9, 7)}}),
    "text": lambda stay: "Traceback (most recent call last):\nKeyError: 'observation/depth'",
    "one": lambda stay: msgpack.packb({"actions": array(stay[0])}),
    "up": lambda stay: msgpack.packb({"actions": array(stay + np.eye(7)[2] * [0.25])}),
    "hang": hang,
    "die": die,
}


def main(port=0, options="{}"):
    options, count = json.loads(options), [0]

    def serve_client(connection):
        count[0] += 1
        number, requests = count[0], 0
        connection.send(msgpack.packb(options.get("metadata", {})))
        try:
            for message in connection:
                requests += 1
                if number == options.get("dies") and requests == 2:
                    os._exit(3)
                request = msgpack.unpackb(message)
                # open fingers, no movement
                stay = np.zeros((10, 7))
                stay[:, 6] = -1
                answer = ANSWERS.get(request["prompt"])
                stays = msgpack.packb({"actions": array(stay)})
                connection.send(answer(stay) if answer else stays)
        except ConnectionClosed:
            pass

    with serve(serve_client, "127.0.0.1", int(port), max_size=None, compression=None) as server:
        print(server.socket.getsockname()[1], flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
