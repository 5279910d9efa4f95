"""Episodes of a policy behind a socket (harness/remote.py), in the conventions of LIBERO's public
data: what it sees, and what is done with its actions.

    observation/image         (S,S,3) uint8, agentview, turned by 180 degrees as MuJoCo gives it,
                              that is mirrored left to right
    observation/wrist_image   the same of the camera on the hand
    observation/state         (8,) EEF position in m, axis-angle in rad, two finger joints in m
    prompt                    the task in words

    actions                   (N,7) OSC deltas at 20 Hz: 1 is 5 cm or 0.5 rad; gripper -1 opens, +1
                              closes. Values beyond [-1, 1] are clipped, as robosuite does.

A server may ask for other things by an entry "request" of its metadata, see WISHES. Each episode
has a connection of its own, so that a server with a memory begins anew.
"""

import json
import re
import time
import traceback

import numpy as np
from PIL import Image

import flags
from harness.remote import AnswerError, Server, ServerLost, actions_of
from runtime import UserError, fits
from sim.rollout import Episode, failed, result_row

WRIST = "robot0_eye_in_hand"
# px: openpi's evaluation renders 256 and sends 224
RENDERED, SENT = 256, 224
# what metadata["request"] may say, a form of `runtime.fits`, and what holds where it is silent
WISHES = {"image_size?": int, "wrist_image?": bool, "camera?": bool, "seed?": bool}
DEFAULT = {"wrist_image": True, "camera": False, "seed": False}
LARGEST = 1024  # px that a server may ask for
# seconds without an answer that may be allowed: more than a day, and the system's clock overflows
PATIENCE = flags.Number(float, above=0, high=86400.0)
AGAIN = 10.0  # seconds at most for which a server that refuses is tried: it may be starting
# flags of --policy remote, and what `agree` adds to them
NAMES = ("server", "server_timeout", "replan_steps", "send_size", "label", "wishes", "metadata")


def add_flags(group):
    """The flags of eval.py --policy remote."""
    add = group.add_argument
    add("--server", metavar="HOST:PORT", help="a policy server of openpi's protocol")
    several = "actions of an answer that are carried out before the next request"
    add("--replan_steps", type=flags.count, default=5, help=several)
    sent = "side of the images that are sent (as the server asks, else 224)"
    add("--send_size", type=flags.pixels, help=sent)
    silent = "seconds without an answer after which the server counts as hung"
    add("--server_timeout", type=PATIENCE, default=120.0, help=silent)
    add("--label", help="the policy's name in results (as the server says, else remote)")


def agree(args):
    """Ask the server of --policy remote what it wants, before any simulator starts, and set what
    was not given: image_size (rendered), send_size, label, metadata (as text) and wishes (dict).

    Raises UserError where nobody answers, what answers is no policy server, or a flag is missing.
    """
    if args.policy != "remote":
        if args.server:
            raise UserError(f"--server {args.server}: give --policy remote too, or leave it out")
        return
    if not args.server:
        raise UserError("--policy remote: where is it? Give --server HOST:PORT")
    server = Server(args.server, args.server_timeout)
    try:
        metadata = server.connect(min(AGAIN, args.server_timeout))
    except (AnswerError, ServerLost) as error:
        raise UserError(
            f"--server {args.server}: is no policy server of openpi's: {error}"
        ) from error
    finally:
        server.close()
    asked = metadata.get("request", {})
    fault = fits(asked, WISHES)
    size = asked.get("image_size") if not fault else None
    if size is not None and not 8 <= size <= LARGEST:
        fault = f"key 'image_size' is {size}, 8 to {LARGEST} is expected"
    if fault:
        raise UserError(
            f"--server {args.server}: its metadata's 'request': {fault}; mend the server"
        )
    args.wishes = {**DEFAULT, **{k: v for k, v in asked.items() if k in DEFAULT}}
    args.image_size = args.image_size or size or RENDERED
    args.send_size = args.send_size or size or min(SENT, args.image_size)
    # of this repository's servers: how the pictures were drawn that it was trained on
    if (told := metadata.get("render")) in ("exact", "fast"):
        if args.render not in (None, told):
            raise UserError(
                f"--render {args.render}: the policy at {args.server} was trained on --render "
                f"{told}; leave --render out"
            )
        args.render = told
    # it names a folder
    args.label = re.sub(r"[^\w.-]+", "_", str(args.label or metadata.get("policy", "remote")))[:60]
    args.metadata = json.dumps(metadata, sort_keys=True, default=repr)
    print(f"{args.server}: {args.label}, its metadata {args.metadata[:300]}")


def libero_state(observation):
    """The state (8,) of an Observation: EEF position in m, its rotation as axis times angle in rad,
    two finger joints in m.

    The angle is 2 arccos(w) of MuJoCo's own quaternion, between 0 and 2 pi, as robosuite's
    quat2axisangle has it. One that was brought below pi would be another number to a policy.
    """
    xyz, w = observation.eef_quat[:3], np.clip(observation.eef_quat[3], -1.0, 1.0)
    length = np.sqrt(1.0 - w * w)
    turned = np.zeros(3) if np.isclose(length, 0.0) else xyz * 2.0 * np.arccos(w) / length
    return np.concatenate([observation.eef_pos, turned, observation.gripper_qpos])


def turned_by_180(image, size):
    """An upright image (S,S,3) as public LIBERO data have it, resized to (size,size,3).

    MuJoCo's rows come bottom first; that picture turned by 180 degrees is the upright one mirrored.
    """
    image = np.ascontiguousarray(image[:, ::-1])
    if size == len(image):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


class ServerAgent:
    """The client of the policy server of eval.py's flags, once `agree` has filled them in."""

    def __init__(self, args):
        self.server = Server(args.server, args.server_timeout)
        self.send_size, self.wishes = args.send_size, args.wishes
        self.seconds, self.seed = {}, 0

    def start(self, scene, seed):
        """Connect for a new episode. Raises what `Server.connect` does."""
        self.seconds, self.seed = {"features": 0.0, "policy": 0.0}, seed
        self.server.connect(min(AGAIN, self.server.timeout))

    def act(self, observation, wrist, prompt):
        """The actions (N,7) for an Observation. wrist: upright image of the camera on the hand.

        Raises ServerLost and AnswerError, see harness/remote.py.
        """
        request = {
            "observation/image": turned_by_180(observation.image, self.send_size),
            "observation/state": libero_state(observation),
            "prompt": prompt,
        }
        if wrist is not None:
            request["observation/wrist_image"] = turned_by_180(wrist, self.send_size)
        if self.wishes["camera"]:
            # of the picture mirrored back, at the size that is sent
            K = observation.K * (self.send_size / len(observation.image))
            K[2, 2] = 1.0
            request["observation/camera_intrinsics"] = K
            request["observation/camera_extrinsics"] = observation.E
            request["observation/support"] = observation.support
        if self.wishes["seed"]:
            request["seed"] = self.seed
        start = time.perf_counter()
        answer = self.server.ask(request)
        self.seconds["policy"] += time.perf_counter() - start
        return actions_of(answer)


def run_actions(
    scene,
    agent,
    state,
    max_steps=600,
    replan_steps=5,
    video_every=0,
    path=None,
    variant="task",
    seed=0,
    event=None,
):
    """Run one closed-loop episode of a ServerAgent from `state` (S,) -> what `rollout.run_episode`
    answers, in the same account.

    Of each answer the first `replan_steps` actions are carried out, fewer where it has fewer. An
    answer that cannot be carried out ends the episode as a failure, outcome "error". Raises
    ServerLost where the server dies or hangs: that is no episode.
    """
    started = time.perf_counter()
    scene.begin_episode(state)
    episode = Episode(scene, max_steps, video_every, variant, event)
    decisions, thumbs, failure = 0, [], None
    try:
        agent.start(scene, seed)
        while not episode.over:
            observation, wrist = look(episode, agent.wishes["wrist_image"])
            actions = agent.act(observation, wrist, scene.instruction)
            decisions += 1
            thumbs.append(observation.image[::4, ::4])
            for action in actions[:replan_steps]:
                if episode.over:
                    break
                # the sign alone moves the fingers; zero keeps them
                episode.gripper = float(np.sign(action[6])) or episode.gripper
                episode.take(action)
    except AnswerError:
        failure = traceback.format_exc()
    finally:
        agent.server.close()
    row = result_row(scene, episode, agent, decisions, path, started)
    return failed(row, failure) if failure else row, episode.frames, thumbs


def look(episode, with_wrist):
    """(Observation, upright image of the camera on the hand, or None)."""
    observation = episode.observe(image=True)
    if not with_wrist:
        return observation, None
    start = time.perf_counter()
    wrist = episode.scene.render(WRIST)
    episode.seconds["render"] += time.perf_counter() - start
    return observation, wrist
