"""The robot's side of dino_volume_kv and dino_volume_kv_full: images and EEF states in,
trajectories out as JSON lines.

A recorded episode, a video and its states, or a camera that runs:

    python deploy_dino_kv.py --ckpt CKPT --source data/izzy/episode_00000
    python deploy_dino_kv.py --ckpt CKPT --source video.mp4 --state episode.npz
    camera_driver | python deploy_dino_kv.py --ckpt CKPT --source - --state camera.npz

Standard input holds one JSON object a line: {"image": path of a PNG or JPG, or "image_base64": its
bytes, "eef_pos": [x, y, z] m, "gripper_width": m between the fingers, and optionally "intrinsics"
(3x3) and "extrinsics" (4x4), which then stay until the next ones}.

Each answer is one line: {"frame", "xyz" (T,3) m, "euler" (T,3) rad roll pitch yaw, R = Rz Ry Rx,
"gripper" (T,) -1 open +1 close, "latency_ms"}. Latency of each call and its parts go to standard
error. Beside the checkpoint lies <ckpt>_stats.json; the two must belong together.
"""

import base64
import contextlib
import io
import itertools
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import camera
import flags
from formats import smith300
from formats.checks import FARTHEST, SEEN, check_width
from harness.checkpoint import load_policy, stats_path
from rot_utils import RotationBasis, load_stats, matrix_to_euler
from runtime import UserError, choose_device, fits, one_line, run_script

NOTHING = "nothing is sent to the robot"
# the form of a line of standard input, see runtime.fits
LINE_FORM = {
    "image?": str,
    "image_base64?": str,
    "eef_pos": [float] * 3,
    "gripper_width": float,
    "intrinsics?": [[float] * 3] * 3,
    "extrinsics?": [[float] * 4] * 4,
}


# -- the policy -----------------------------------------------------------------------------------


def load(ckpt, stats=None, device="cpu", weights=None, text_weights=None):
    """The policy of a checkpoint, ready to act and checked against its statistics. stats: their
    file, <ckpt>_stats.json by default.

    Raises UserError for a policy that is not deployed, or statistics of another checkpoint.
    """
    device = choose_device(device)
    path = stats or stats_path(ckpt)
    stored = load_stats(path)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for answers alone
        policy, info, _ = load_policy(ckpt, device, weights, text_weights=text_weights)
    expected = policy.deployment_stats()
    if expected is None:
        raise UserError(
            f"{ckpt}: is a {info['model_type']}; "
            "only dino_volume_kv and dino_volume_kv_full are deployed by this script"
        )
    # the file may hold more than is compared
    part = {name: stored[name] for name in expected if name in stored}
    if comparable(part) != comparable(expected):
        raise UserError(
            f"{path}: belongs to another checkpoint than {ckpt}; copy both from one run"
        )
    return policy


def comparable(stats):
    """Statistics as one text, so that two of them can be compared. The provenance of a rotation
    basis is left out: it changes no answer.
    """
    rotation = dict(stats.get("rotation", {}))
    basis = rotation.get("basis")
    if isinstance(basis, dict):
        basis = RotationBasis.from_dict(basis)
    if isinstance(basis, RotationBasis):
        rotation["basis"] = {**basis.to_dict(), "provenance": None}
    return json.dumps({**stats, "rotation": rotation}, sort_keys=True, default=str)


# -- recordings -----------------------------------------------------------------------------------


def recorded(source, state, size):
    """Yield the observations of a smith300 episode folder, or of a video with its episode.npz.

    state: the npz, by default the one in the folder or beside the video. size: side in pixels of
    the policy's images. Raises UserError for recordings that do not fit together.
    """
    if not source.exists():
        raise UserError(
            f"{source}: no such episode folder or video; "
            "give a folder of a smith300 dataset, a video, or - for standard input"
        )
    if source.is_dir() and not state:
        # all that training asks of an episode, but for the size of its frames
        smith300.read_episode(source)
    state = state or (source if source.is_dir() else source.parent) / "episode.npz"
    arrays = smith300.load_arrays(state)
    K, E, positions = arrays["intrinsics"], arrays["extrinsics"], arrays["eef_pos_t"]
    frames = smith300.frame_files(source) if source.is_dir() else source
    # frames, states and camera have to belong together before anything is answered
    count, sizes = smith300.frame_sizes(frames)
    if count != len(positions):
        raise UserError(
            f"{source}: {count} frames, but {state} has {len(positions)} rows; "
            "they do not belong together"
        )
    if len(sizes) > 1:
        raise UserError(f"{source}: frames of different sizes; {smith300.AGAIN}")
    shape = sizes.pop()
    smith300.check_camera(K, E, state, shape)
    check_in_view(positions, K, E, shape, state)
    # an episode without measured widths: closed or open, as commanded
    commanded = np.where(arrays["gripper_t"] > 0.5, 0.0, smith300.OPEN_GRIPPER)
    width = arrays.get("gripper_width_t", commanded)
    # the policy sees the central square, scaled to size x size px: K belongs to that image
    square_K = smith300.square_intrinsics(K, *shape, size)
    for i, image in enumerate(smith300.iterate_frames(frames, size)):
        yield SimpleNamespace(
            image=image, eef_pos=positions[i], gripper_width=width[i], K=square_K, E=E
        )


def check_in_view(positions, K, E, shape, where):
    """Raise UserError where too few of an episode's EEF positions (T,3) m are inside its image, by
    formats.checks.SEEN. shape: (width, height) px.
    """
    seen = camera.in_view(positions, K, E, shape).mean()
    if seen < SEEN:
        raise UserError(
            f"{where}: the EEF is inside the image in {100 * seen:.0f}% of the frames by this "
            "camera; are positions and extrinsics in metres, camera-to-world with OpenCV axes, "
            "and the intrinsics of this image size?"
        )


# -- standard input -------------------------------------------------------------------------------


def stored_camera(path):
    """{"intrinsics": (3,3) px, "extrinsics": (4,4)} of an npz, or the one that it has. Raises
    UserError for a damaged file or other shapes.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in smith300.CAMERA if name in file}
    # zipfile, zlib, NumPy and the system each have their own for a damaged file
    except Exception as error:
        fault = f"missing, truncated or not an npz file ({one_line(error)})"
        advice = "give an npz with intrinsics and extrinsics"
        raise UserError(f"--state {path}: {fault}; {advice}") from error
    for name, value in found.items():
        shape = smith300.CAMERA[name]
        if value.shape != shape or value.dtype.kind not in "fiu":
            raise UserError(
                f"--state {path}: {name} has shape {value.shape} and dtype {value.dtype}, "
                f"numbers of shape {shape} are expected"
            )
    return {name: value.astype(float) for name, value in found.items()}


def live(stream, state, size):
    """Yield the observations of JSON lines, see the module's docstring. state: an npz with the
    camera, or None. size: side in pixels of the policy's images.

    Raises UserError for a line that holds anything else: the robot must not follow a guess.
    """
    camera_now = stored_camera(state) if state else {}
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        where = f"standard input, line {number}"
        row = parsed(line, where)
        squared, shape = decoded(row, where, size)
        # a camera in the line replaces the one before and stays until the next
        for name in smith300.CAMERA:
            if name in row:
                camera_now[name] = np.array(row[name], dtype=float)
        missing = [name for name in smith300.CAMERA if name not in camera_now]
        if missing:
            raise UserError(
                f"{where}: {' and '.join(missing)} unknown; "
                "give them in the line, or once with --state"
            )
        K, E = camera_now["intrinsics"], camera_now["extrinsics"]
        smith300.check_camera(K, E, where, shape)
        # catches millimetres
        eef = np.array(row["eef_pos"], dtype=float)
        if np.abs(eef).max() > FARTHEST:
            raise UserError(
                f"{where}: eef_pos reaches {np.abs(eef).max():.4g}, metres are expected; {NOTHING}"
            )
        square_K = smith300.square_intrinsics(K, *shape, size)
        width = float(row["gripper_width"])
        check_width(width, f"{where}: gripper_width")
        yield SimpleNamespace(image=squared, eef_pos=eef, gripper_width=width, K=square_K, E=E)


def parsed(line, where):
    """The object of a line, of LINE_FORM and with one image. Raises UserError for another."""
    try:
        row = json.loads(line.decode() if isinstance(line, bytes) else line)
    except (ValueError, RecursionError) as error:
        fault = f"is no JSON in UTF-8 ({one_line(error)})"
        raise UserError(f"{where}: {fault}; see --help for what a line holds") from error
    # an object at all, then exactly one image, then the form of the rest
    fault = fits(row, {})
    if not fault and ("image" in row) == ("image_base64" in row):
        fault = "one of image and image_base64 is expected"
    fault = fault or fits(row, LINE_FORM)
    if fault:
        raise UserError(f"{where}: {fault}; see --help for what a line holds, {NOTHING}")
    return row


def decoded(row, where, size):
    """The image of a line -> (its central square (size,size,3) uint8, its own (width, height))."""
    if "image" in row:
        file, name = row["image"], f"{where}: {row['image']}"
    else:
        name = where
        try:
            file = io.BytesIO(base64.b64decode(row["image_base64"], validate=True))
        except ValueError as error:
            fault = f"image_base64 is no base64 ({one_line(error)})"
            advice = "encode the bytes of a PNG or JPG file"
            raise UserError(f"{where}: {fault}; {advice}") from error
    with smith300.open_image(file, name, "send it again") as image:
        return smith300.square_image(image, size), image.size


# -- answers --------------------------------------------------------------------------------------


def checked(answer, frame):
    """The Waypoint as the object of a JSON line. Raises UserError for NaN or Inf, so that nothing
    is sent to the robot.
    """
    euler = matrix_to_euler(answer.rotations)
    if not all(np.isfinite(v).all() for v in (answer.trajectory, euler, answer.grippers)):
        raise UserError(
            f"frame {frame}: the policy's answer has NaN or Inf; {NOTHING}, "
            "check the checkpoint and the camera"
        )
    return {
        "frame": frame,
        "xyz": answer.trajectory.round(6).tolist(),
        "euler": euler.round(6).tolist(),
        "gripper": answer.grippers.astype(int).tolist(),
    }


def answer_all(policy, observations, limit=None, instruction="", support=None):
    """Answer observations, `limit` of them at most, with a line each -> their latencies in ms.

    instruction: what is asked for, of a policy that is told; support: height in m of what the
    objects stand on, of one that measures heights from there.
    """
    latencies = []
    policy.reset()
    # the one after the last is not waited for
    for frame, observation in enumerate(itertools.islice(observations, limit)):
        observation.instruction, observation.support = instruction, support
        # the clock of this call alone
        policy.seconds.update(features=0.0, policy=0.0)
        start = time.perf_counter()
        answer = policy.act(observation)
        latency = 1000 * (time.perf_counter() - start)
        latencies.append(latency)
        row = {**checked(answer, frame), "latency_ms": round(latency, 2)}
        # flushed: the robot waits for each line
        print(json.dumps(row, allow_nan=False), flush=True)
        parts = ", ".join(f"{name} {1000 * s:.1f}" for name, s in policy.seconds.items())
        print(f"frame {frame}: {latency:.1f} ms ({parts})", file=sys.stderr, flush=True)
    return latencies


def deploy(args):
    """Answer every observation of the source, and print the latencies to standard error."""
    policy = load(args.ckpt, args.stats, args.device, args.backbone_weights, args.text_weights)
    size = policy.config.image_size
    if policy.reader and not args.instruction:
        raise UserError(f"{args.ckpt}: is told what to do; give --instruction WORDS")
    if args.instruction and not policy.reader:
        raise UserError(f"--instruction: {args.ckpt} is told nothing; leave it out")
    if policy.config.heights == "support" and args.support is None:
        raise UserError(
            f"{args.ckpt}: measures heights from what the objects stand on; give --support METRES"
        )
    if str(args.source) == "-":
        # bytes: each line is decoded, and refused, by itself
        lines = getattr(sys.stdin, "buffer", sys.stdin)
        observations = live(lines, args.state, size)
    else:
        observations = recorded(args.source, args.state, size)
    latencies = answer_all(policy, observations, args.limit, args.instruction or "", args.support)
    if latencies:
        middle, slow = np.median(latencies), np.percentile(latencies, 95)
        print(
            f"{len(latencies)} calls: median {middle:.1f} ms, 95% {slow:.1f} ms, "
            f"first {latencies[0]:.1f} ms",
            file=sys.stderr,
        )


def build_parser():
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, help="checkpoint.safetensors")
    add("--stats", type=Path, help="its statistics (<ckpt>_stats.json)")
    what = "smith300 episode folder, video, or - for JSON lines on standard input"
    add("--source", type=Path, required=True, help=what)
    what = "episode.npz of a video (the one beside it); of -, an npz with the camera"
    add("--state", type=Path, help=what)
    add("--instruction", metavar="WORDS", help="what to do, of a policy that is told")
    what = "height of what the objects stand on, of a policy trained with --heights support"
    add("--support", metavar="METRES", type=flags.finite, help=what)
    add("--limit", type=flags.whole, help="stop after so many frames")
    add("--backbone_weights", type=Path, help="local file of backbone weights")
    add("--text_weights", type=Path, help="local folder of the frozen text model, see --text")
    add("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    return parser


if __name__ == "__main__":
    run_script(lambda: deploy(build_parser().parse_args()))
