"""The robot's side of dino_volume_kv and dino_volume_kv_full: images and EEF states in,
trajectories out as JSON lines.

    python deploy_dino_kv.py --ckpt runs/NAME/checkpoint.safetensors --source data/izzy/episode_00000        # a recorded episode
    python deploy_dino_kv.py --ckpt CKPT --source video.mp4 --state episode.npz                              # a video and its states
    camera_driver | python deploy_dino_kv.py --ckpt CKPT --source - --state camera.npz                       # live

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
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import camera
import flags
from formats import smith300
from formats.checks import FARTHEST, SEEN
from harness.checkpoint import load_policy, stats_path
from rot_utils import RotationBasis, load_stats, matrix_to_euler
from runtime import UserError, choose_device, fits, one_line, run_script

# of standard input
LINE_FORM = {
    "image?": str,
    "image_base64?": str,
    "eef_pos": [float] * 3,
    "gripper_width": float,
    "intrinsics?": [[float] * 3] * 3,
    "extrinsics?": [[float] * 4] * 4,
}


def load(args):
    """The policy, ready to act, checked against its statistics. Raises UserError for another policy
    or foreign statistics.
    """
    device = choose_device(args.device)
    stats = load_stats(args.stats or stats_path(args.ckpt))
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for answers alone
        policy, info, _ = load_policy(args.ckpt, device, args.backbone_weights)
    own = policy.deployment_stats()
    if own is None:
        raise UserError(
            f"{args.ckpt}: is a {info['model_type']}; only dino_volume_kv and dino_volume_kv_full are deployed by this script"
        )
    same = lambda d: json.dumps(
        {k: d[k] for k in own},
        sort_keys=True,
        default=lambda v: (
            {k: x for k, x in v.to_dict().items() if k != "provenance"}
            if isinstance(v, RotationBasis)
            else str(v)
        ),
    )
    if isinstance(own["rotation"].get("basis"), dict):
        own = {
            **own,
            "rotation": {
                **own["rotation"],
                "basis": RotationBasis.from_dict(own["rotation"]["basis"]),
            },
        }
    if not set(own) <= set(stats) or same(own) != same(stats):
        raise UserError(
            f"{args.stats or stats_path(args.ckpt)}: belongs to another checkpoint than {args.ckpt}; copy both from one run"
        )
    return policy


def recorded(source, state, size):
    """Observations of a smith300 episode folder, or of a video with its episode.npz."""
    if not source.exists():
        raise UserError(
            f"{source}: no such episode folder or video; give a folder of a smith300 dataset, a video, or - for standard input"
        )
    if source.is_dir() and not state:
        # all that training asks of an episode, but for the size of its frames
        smith300.read_episode(source)
    state = state or (source if source.is_dir() else source.parent) / "episode.npz"
    arrays = smith300.load_arrays(state)
    frames = smith300.frame_files(source) if source.is_dir() else source
    count, sizes = smith300.frame_sizes(frames)
    if count != len(arrays["eef_pos_t"]):
        raise UserError(
            f"{source}: {count} frames, but {state} has {len(arrays['eef_pos_t'])} rows; they do not belong together"
        )
    if len(sizes) > 1:
        raise UserError(f"{source}: frames of different sizes; {smith300.AGAIN}")
    shape = sizes.pop()
    smith300.check_camera(arrays["intrinsics"], arrays["extrinsics"], state, shape)
    check_in_view(arrays["eef_pos_t"], arrays["intrinsics"], arrays["extrinsics"], shape, state)
    width = arrays.get(
        "gripper_width_t", np.where(arrays["gripper_t"] > 0.5, 0.0, smith300.OPEN_GRIPPER)
    )
    K = smith300.square_intrinsics(arrays["intrinsics"], *shape, size)
    for i, image in enumerate(smith300.iterate_frames(frames, size)):
        yield SimpleNamespace(
            image=image,
            eef_pos=arrays["eef_pos_t"][i],
            gripper_width=width[i],
            K=K,
            E=arrays["extrinsics"],
        )


def check_in_view(positions, K, E, shape, where):
    """Raise UserError where an episode's camera sees its EEF in fewer than half of the frames."""
    seen = camera.in_view(positions, K, E, shape).mean()
    if seen < SEEN:
        raise UserError(
            f"{where}: the EEF is inside the image in {100 * seen:.0f}% of the frames by this camera; are positions and "
            "extrinsics in metres, camera-to-world with OpenCV axes, and the intrinsics of this image size?"
        )


def stored_camera(path):
    """{"intrinsics", "extrinsics"} of an npz, those of the two that it has. Raises UserError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {k: file[k] for k in smith300.CAMERA if k in file}
    except (
        Exception
    ) as error:  # zipfile, zlib, NumPy and the system each have their own for a damaged file
        raise UserError(
            f"--state {path}: missing, truncated or not an npz file ({one_line(error)}); give an npz with intrinsics and extrinsics"
        )
    for key, value in found.items():
        if value.shape != smith300.CAMERA[key] or value.dtype.kind not in "fiu":
            raise UserError(
                f"--state {path}: {key} has shape {value.shape} and dtype {value.dtype}, numbers of shape "
                f"{smith300.CAMERA[key]} are expected"
            )
    return {k: v.astype(float) for k, v in found.items()}


def live(stream, state, size):
    """Observations of JSON lines, see the module's docstring. Raises UserError for a line that
    holds anything else.
    """
    camera_now = stored_camera(state) if state else {}
    for number, line in enumerate(stream, 1):
        where = f"standard input, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode() if isinstance(line, bytes) else line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where}: is no JSON in UTF-8 ({one_line(error)}); see --help for what a line holds"
            )
        if fault := fits(row, {}) or one_image(row) or fits(row, LINE_FORM):
            raise UserError(
                f"{where}: {fault}; see --help for what a line holds, nothing is sent to the robot"
            )
        squared, shape = decoded(row, where, size)
        camera_now.update({k: np.array(row[k], dtype=float) for k in smith300.CAMERA if k in row})
        if missing := [k for k in smith300.CAMERA if k not in camera_now]:
            raise UserError(
                f"{where}: {' and '.join(missing)} unknown; give them in the line, or once with --state"
            )
        smith300.check_camera(camera_now["intrinsics"], camera_now["extrinsics"], where, shape)
        eef = np.array(row["eef_pos"], dtype=float)
        if np.abs(eef).max() > FARTHEST:
            raise UserError(
                f"{where}: eef_pos reaches {np.abs(eef).max():.4g}, metres are expected; nothing is sent to the robot"
            )
        yield SimpleNamespace(
            image=squared,
            eef_pos=eef,
            gripper_width=float(row["gripper_width"]),
            E=camera_now["extrinsics"],
            K=smith300.square_intrinsics(camera_now["intrinsics"], *shape, size),
        )


def one_image(row):
    return (
        ""
        if ("image" in row) != ("image_base64" in row)
        else "one of image and image_base64 is expected"
    )


def decoded(row, where, size):
    """The image of a line -> (its central square (size,size,3) uint8, its own (width, height))."""
    try:
        file = (
            io.BytesIO(base64.b64decode(row["image_base64"], validate=True))
            if "image_base64" in row
            else row["image"]
        )
    except ValueError as error:
        raise UserError(
            f"{where}: image_base64 is no base64 ({one_line(error)}); encode the bytes of a PNG or JPG file"
        )
    name = where if "image_base64" in row else f"{where}: {row['image']}"
    with smith300.open_image(file, name, "send it again") as image:
        return smith300.square_image(image, size), image.size


def checked(answer, frame):
    """The answer as a JSON line's object. Raises UserError where a number is NaN or Inf: nothing is
    sent to the robot then.
    """
    euler = matrix_to_euler(answer.rotations)
    if not all(np.isfinite(v).all() for v in (answer.trajectory, euler, answer.grippers)):
        raise UserError(
            f"frame {frame}: the policy's answer has NaN or Inf; nothing is sent to the robot, check the checkpoint and the camera"
        )
    return {
        "frame": frame,
        "xyz": answer.trajectory.round(6).tolist(),
        "euler": euler.round(6).tolist(),
        "gripper": answer.grippers.astype(int).tolist(),
    }


def deploy(args):
    policy = load(args)
    size, latencies = policy.config.image_size, []
    # bytes: each line is decoded, and refused, by itself
    lines = getattr(sys.stdin, "buffer", sys.stdin)
    observations = (
        live(lines, args.state, size)
        if str(args.source) == "-"
        else recorded(args.source, args.state, size)
    )
    policy.reset()
    for frame, observation in enumerate(observations):
        if args.limit is not None and frame >= args.limit:
            break
        policy.seconds.update(features=0.0, policy=0.0)
        start = time.perf_counter()
        answer = policy.act(observation)
        latencies.append(1000 * (time.perf_counter() - start))
        print(
            json.dumps(
                {**checked(answer, frame), "latency_ms": round(latencies[-1], 2)}, allow_nan=False
            ),
            flush=True,
        )
        parts = ", ".join(f"{k} {1000 * v:.1f}" for k, v in policy.seconds.items())
        print(f"frame {frame}: {latencies[-1]:.1f} ms ({parts})", file=sys.stderr, flush=True)
    if latencies:
        print(
            f"{len(latencies)} calls: median {np.median(latencies):.1f} ms, 95% {np.percentile(latencies, 95):.1f} ms, first "
            f"{latencies[0]:.1f} ms",
            file=sys.stderr,
        )


def build_parser():
    parser = flags.Parser(__doc__)
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint.safetensors")
    parser.add_argument("--stats", type=Path, help="its statistics (<ckpt>_stats.json)")
    parser.add_argument(
        "--source",
        type=Path,
        required=True,
        help="smith300 episode folder, video, or - for JSON lines on standard input",
    )
    parser.add_argument(
        "--state",
        type=Path,
        help="episode.npz of a video (the one beside it); for -, an npz with intrinsics and extrinsics",
    )
    parser.add_argument("--limit", type=flags.whole, help="stop after so many frames")
    parser.add_argument("--backbone_weights", type=Path, help="local file of backbone weights")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    return parser


if __name__ == "__main__":
    run_script(lambda: deploy(build_parser().parse_args()))
