"""Offer a checkpoint to other programs, by openpi's protocol: a WebSocket server on this machine.

    # the newest run's checkpoint, else the committed one, as `eval.py --teleport --zero_rotation`
    python serve.py
    python serve.py --ckpt runs/NAME/checkpoint.safetensors --port 8000
    # several actions an answer, for a client that replans every 5 steps
    python serve.py --chunk 5

A client connects, receives a dict of metadata, and sends an observation at each control step; see
docs/your_policy.md for its keys, units and signs. The answer has "actions" (N,7), LIBERO's OSC
deltas: the servo's way to the waypoint that the policy decided on, as in eval.py. With --chunk 1
that is one action, and a decision is made only when the last one has been carried out. Each
connection has its own history, and an episode begins with it, with "reset": true, with another
prompt, or where the arm has jumped.
"""

import argparse
import contextlib
import errno
import threading
import traceback
from http import HTTPStatus
from pathlib import Path

import numpy as np
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve

import camera
import flags
from formats.libero_cameras import FOVY, camera_of_task, support_of_task
from harness.records import keeps_orientation, newest_checkpoint, run_name
from harness.remote import MAX_BYTES, AnswerError, pack, unpack
from rot_utils import matrix_to_quat, rotvec_to_matrix
from runtime import UserError, one_line, run_script
from sim.expert import servo_action
from sim.instructions import listens
from sim.libero_env import ACTION_SCALE, ROTATION_SCALE, Observation
from sim.servo import Servo, least_steps

# shares of an action's offset and turn that the EEF has made after a control step, for actions of
# a chunk beyond the first: least squares over 48 demonstrations, which it misses by 2.6 mm a step,
# and over the turning steps of 110, by 0.9 degrees
RESPONSE, TURN_RESPONSE = 0.21, 0.105
# metres that the EEF goes in a control step at most; a jump is longer by JUMP
FASTEST, JUMP = 0.03, 0.05


class RequestError(Exception):
    """A request that cannot be answered; the client is sent this sentence."""


class Episode:
    """What a connection remembers: the policy's session, the servo, and the view."""

    def __init__(self, sessions, args, view):
        self.sessions, self.args, self.view = sessions, args, view
        self.session, self.config = sessions.open(), sessions.about["config"]
        self.servo = self.eef = self.prompt = None

    def begin(self, request):
        """Forget the last episode. All that the policy draws comes from the request's seed."""
        self.sessions.begin(self.session, int(request.get("seed", 0)))
        stride = self.config["waypoint_stride"]
        variant = self.sessions.about["info"].get("dataset", {}).get("variant", "task")
        least = least_steps(variant, stride)
        self.servo = Servo(self.args.teleport, self.args.zero_rotation, stride, least)

    def is_new(self, request, eef):
        """True if a request, with the EEF at eef (3,) m, is the first of an episode."""
        farthest = JUMP + FASTEST * self.args.chunk
        return (
            self.servo is None
            or bool(request.get("reset"))
            or request.get("prompt") != self.prompt
            or np.linalg.norm(eef - self.eef) > farthest
        )

    def actions(self, request):
        """The actions (chunk,7) for a request. Raises RequestError."""
        observation = observation_of(request, self.config["image_size"], self.view)
        eef, rotation = observation.eef_pos, observation.eef_rot
        if listens(self.config) and not observation.instruction.strip():
            raise RequestError("prompt: is missing, and this policy is told what to do")
        if self.is_new(request, eef):
            self.begin(request)
        self.eef, self.prompt = eef, request.get("prompt")
        while self.servo.due(eef, rotation):
            self.servo.follow(self.decide(observation), eef, rotation)
        found = []
        while len(found) < self.args.chunk:
            target, turn = self.servo.step()
            gripper = self.servo.gripper
            action = servo_action(eef, target, gripper, rotation=turn, eef_rot=rotation)
            found.append(action)
            # where the EEF will be then; nobody looks, so a decision that is due has to wait
            eef = eef + RESPONSE * ACTION_SCALE * action[:3]
            turned = rotvec_to_matrix(TURN_RESPONSE * ROTATION_SCALE * action[3:6])
            rotation = turned @ rotation
            if len(found) < self.args.chunk and self.servo.due(eef, rotation):
                stay = np.concatenate([np.zeros(6), [self.servo.gripper]])
                found += [stay] * (self.args.chunk - len(found))
        return np.stack(found)

    def decide(self, observation):
        (answer,) = self.sessions.answer([(self.session, observation)])
        if isinstance(answer, str):
            raise RequestError(answer)
        return answer[0]


def observation_of(request, size, view):
    """A request -> an Observation with an upright image of `size` px, the policy's.

    view: camera-to-world (4,4) where the request brings no camera and its task has none. Raises
    RequestError for a missing key, a wrong shape, or numbers that are not finite.
    """
    image = array(request, "observation/image", (None, None, 3))
    if image.dtype != np.uint8 or image.shape[0] != image.shape[1]:
        what = f"{image.dtype} of shape {image.shape}"
        raise RequestError(f"observation/image: is {what}, (S, S, 3) uint8 is expected")
    state = array(request, "observation/state", (8,)).astype(float)
    # the camera: the request's, else that of the task in words, else the checkpoint's data's
    of_task = camera_of_task(str(request.get("prompt", "")), size)
    K, E = of_task or (camera.intrinsics(FOVY, size), view)
    if "observation/camera_intrinsics" in request:
        K = array(request, "observation/camera_intrinsics", (3, 3)) * (size / len(image))
        K[2, 2] = 1.0
    if "observation/camera_extrinsics" in request:
        E = array(request, "observation/camera_extrinsics", (4, 4)).astype(float)
    if E is None:
        raise RequestError("observation/camera_extrinsics: is missing, and no camera is known")
    if fault := camera.fault(K, E, (size, size)):
        raise RequestError(f"observation/camera: {fault[1]} {fault[0]}")
    # turned by 180 degrees, as LIBERO's data are, is mirrored: see sim/remote.py
    upright = np.ascontiguousarray(image[:, ::-1])
    if len(upright) != size:
        resized = Image.fromarray(upright).resize((size, size), Image.Resampling.BILINEAR)
        upright = np.asarray(resized)
    rotation = rotvec_to_matrix(state[3:6])
    joints = np.zeros(7)  # no policy reads them
    quat = matrix_to_quat(rotation)
    said = str(request.get("prompt", ""))
    support = support_of_task(said)
    if "observation/support" in request:
        support = float(array(request, "observation/support", ()))
    return Observation(upright, state[:3], rotation, quat, state[6:], joints, K, E, said, support)


def array(request, key, shape):
    """The finite array of a request at a key; None stands for any length."""
    if key not in request:
        raise RequestError(f"{key}: is missing (keys: {', '.join(map(str, request))})")
    found = np.asarray(request[key])
    fits = found.dtype.kind in "fiu" and found.ndim == len(shape)
    if not fits or any(n not in (None, m) for n, m in zip(shape, found.shape)):
        wanted = ", ".join("S" if n is None else str(n) for n in shape)
        raise RequestError(f"{key}: has shape {found.shape}, ({wanted}) is expected")
    if not np.isfinite(found).all():
        raise RequestError(f"{key}: has NaN or Inf")
    return found


def handler(sessions, args, metadata, view):
    """The function that serves one connection until the client leaves."""
    # a network takes as many requests at a time as its sessions have threads
    places = threading.Semaphore(sessions.threads)

    def serve_client(connection):
        episode = Episode(sessions, args, view)
        with contextlib.suppress(ConnectionClosed):
            connection.send(pack(metadata))
            for message in connection:
                try:
                    request = unpack(message)
                    if not isinstance(request, dict):
                        raise RequestError(f"a dict is expected, not a {type(request).__name__}")
                    with places:
                        answer = {"actions": episode.actions(request)}
                except (RequestError, AnswerError) as error:
                    answer = str(error)
                except Exception:
                    answer = traceback.format_exc()
                # as openpi's server does: a fault as text, and the end
                if isinstance(answer, str):
                    print(f"a request failed: {answer.strip().splitlines()[-1]}", flush=True)
                    connection.send(answer)
                    return
                connection.send(pack(answer))

    return serve_client


def health(connection, request):
    """openpi's check whether a server is there: GET /healthz."""
    return connection.respond(HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None


def metadata_of(args, about):
    """What a client is told when it connects."""
    info = about["info"]
    trained_on = info.get("dataset", {})
    where = f"{info.get('commit')} step {info.get('step')} seed {info.get('seed')}"
    return {
        "policy": info["model_type"],
        # by these an evaluation tells this policy from another one at the same address
        "checkpoint": run_name(args.ckpt),
        "trained": f"{where} {info.get('minutes')}",
        "teleport": args.teleport,
        "zero_rotation": args.zero_rotation,
        "task_suite": str(trained_on.get("task_suite", "")),
        "task_id": int(trained_on.get("task_id", 0)),
        "render": str(trained_on.get("render", "exact")),
        "chunk": args.chunk,
        "request": {
            "image_size": about["config"]["image_size"],
            "wrist_image": False,
            "camera": True,
            "seed": True,
        },
    }


def build_parser():
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", type=Path, help="its file (the newest run's, else the committed one)")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets others in")
    add("--port", type=flags.whole, default=8000, help="0: any that is free")
    add("--chunk", type=flags.count, default=1, help="actions an answer")
    on = argparse.BooleanOptionalAction
    add("--teleport", action=on, default=True, help="servo to each waypoint, as eval.py's flag")
    kept = "keep the start's orientation (as the checkpoint's demonstrations)"
    add("--zero_rotation", action=on, help=kept)
    add("--device", default="auto", help="of the network: auto, cpu, cuda or cuda:N")
    add("--backbone_weights", type=Path, help="local file of backbone weights")
    add("--text_weights", type=Path, help="local folder of the frozen text model, see --text")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.ckpt is None:
        args.ckpt, sentence = newest_checkpoint()
        print(sentence)
    from harness.sessions import PolicySessions  # here: --help needs no torch

    weights = {"weights": args.backbone_weights, "text_weights": args.text_weights}
    sessions = PolicySessions.load(args.ckpt, args.device, **weights)
    view = sessions.about["reference"].get("protocol_extrinsics")
    if args.zero_rotation is None:
        args.zero_rotation = keeps_orientation(sessions.about["info"])
        print("the gripper keeps its orientation" if args.zero_rotation else "the gripper turns")
    metadata = metadata_of(args, sessions.about)
    try:
        server = serve(
            handler(sessions, args, metadata, view),
            args.host,
            args.port,
            compression=None,
            max_size=MAX_BYTES,
            ping_interval=None,
            process_request=health,
        )
    except (OSError, OverflowError) as error:
        busy = getattr(error, "errno", None) == errno.EADDRINUSE
        remedy = "another program listens there; give another --port" if busy else one_line(error)
        raise UserError(f"--host {args.host} --port {args.port}: {remedy}") from error
    with server, contextlib.suppress(KeyboardInterrupt):
        host, port = server.socket.getsockname()[:2]
        print(f"{metadata['policy']} at {host}:{port}, Ctrl-C ends it", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    run_script(main)
