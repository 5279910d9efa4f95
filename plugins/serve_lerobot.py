"""Serve a LeRobot policy to `eval.py --policy remote`, by openpi's protocol.

Run it in LeRobot's environment (Python 3.12), with websockets and msgpack beside it:

    python serve_lerobot.py outputs/train/act/checkpoints/last/pretrained_model --port 8000

It is made for policies of one observation step that remember nothing between two chunks and were
trained on LIBERO in LeRobot's convention:
observation.images.image (and image2, the camera on the hand), observation.state (8,), action (7,).
A chunk of actions an answer; a connection is an episode.
"""

import argparse
import contextlib
import sys
import threading
import traceback
from pathlib import Path

try:
    import msgpack
    import numpy as np
    import torch
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.server import serve
except ImportError as missing:
    remedy = "run this in LeRobot's environment, with websockets and msgpack beside it"
    print(f"error: {missing}; {remedy}", file=sys.stderr)
    sys.exit(2)

# LeRobot's names of what arrives
IMAGES = {
    "observation.images.image": "observation/image",
    "observation.images.image2": "observation/wrist_image",
}


def encode(array):
    return {
        b"__ndarray__": True,
        b"data": array.tobytes(),
        b"dtype": array.dtype.str,
        b"shape": array.shape,
    }


def decode(found):
    if b"__ndarray__" not in found:
        return found
    return np.frombuffer(found[b"data"], found[b"dtype"]).reshape(found[b"shape"])


class Server:
    """A LeRobot policy of a folder, with its processors."""

    def __init__(self, path):
        self.config = PreTrainedConfig.from_pretrained(path)
        self.policy = get_policy_class(self.config.type).from_pretrained(path).eval()
        self.before, self.after = make_pre_post_processors(self.config, path)
        self.one_at_a_time = threading.Lock()  # eval.py opens a connection for each worker
        self.images = {k: v for k, v in IMAGES.items() if k in self.config.image_features}

    def metadata(self):
        sides = {feature.shape[-1] for feature in self.config.image_features.values()}
        wrist = "observation.images.image2" in self.images
        request = {"image_size": max(sides), "wrist_image": wrist}
        return {"policy": f"lerobot_{self.config.type}", "request": request}

    @torch.inference_mode()
    def actions(self, request):
        """{"observation/image": (S,S,3) uint8, ...} -> (N,7)."""
        state = torch.tensor(request["observation/state"], dtype=torch.float32)
        batch = {"observation.state": state[None], "task": [request["prompt"]]}
        for name, key in self.images.items():
            image = torch.tensor(request[key]).permute(2, 0, 1)
            batch[name] = image[None].float() / 255
        chunk = self.policy.predict_action_chunk(self.before(batch))[0]
        # as many as the policy carries out itself
        chunk = chunk[: getattr(self.config, "n_action_steps", len(chunk))]
        return self.after(chunk).cpu().numpy()

    def serve_client(self, connection):
        self.policy.reset()
        with contextlib.suppress(ConnectionClosed):
            connection.send(msgpack.packb(self.metadata()))
            for message in connection:
                try:
                    request = msgpack.unpackb(message, object_hook=decode)
                    with self.one_at_a_time:
                        actions = self.actions(request)
                    answer = msgpack.packb({"actions": encode(actions)})
                except Exception:
                    # as openpi's servers do: the traceback as text, and the end
                    connection.send(traceback.format_exc())
                    return
                connection.send(answer)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="folder of a pretrained policy")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    if not (args.path / "config.json").is_file():
        return f"{args.path}: holds no config.json, a folder of LeRobot's pretrained_model does"
    server = Server(args.path)
    try:
        listening = serve(server.serve_client, "127.0.0.1", args.port, max_size=None)
    except (OSError, OverflowError) as error:
        return f"--port {args.port}: {error}; give another"
    with listening, contextlib.suppress(KeyboardInterrupt):
        print(f"{server.metadata()} at 127.0.0.1:{args.port}", flush=True)
        listening.serve_forever()
    return None


if __name__ == "__main__":
    if fault := main():
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
