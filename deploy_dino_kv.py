"""The robot's side of dino_volume_kv and dino_volume_kv_full: images and EEF states in, trajectories out as JSON lines.

    python deploy_dino_kv.py --ckpt runs/NAME/checkpoint.safetensors --source data/izzy/episode_00000        # a recorded episode
    python deploy_dino_kv.py --ckpt CKPT --source video.mp4 --state episode.npz                              # a video and its states
    camera_driver | python deploy_dino_kv.py --ckpt CKPT --source - --state camera.npz                       # live

Standard input holds one JSON object a line: {"image": path of a PNG or JPG, or "image_base64": its bytes, "eef_pos": [x, y, z] m,
"gripper_width": m between the fingers, and optionally "intrinsics" (3x3) and "extrinsics" (4x4), which then stay until the next ones}.

Each answer is one line: {"frame", "xyz" (T,3) m, "euler" (T,3) rad roll pitch yaw, R = Rz Ry Rx, "gripper" (T,) -1 open +1 close, "latency_ms"}.
Latency of each call and its parts go to standard error. Beside the checkpoint lies <ckpt>_stats.json; the two must belong together.
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
from PIL import Image

import flags
import smith300
from checkpoint import load_policy, stats_path
from rot_utils import RotationBasis, load_stats, matrix_to_euler
from runtime import UserError, choose_device, run_script


def load(args):
    """The policy, ready to act, checked against its statistics. Raises UserError for another policy or foreign statistics."""
    device = choose_device(args.device)
    stats = load_stats(args.stats or stats_path(args.ckpt))
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for answers alone
        policy, info, _ = load_policy(args.ckpt, device, args.backbone_weights)
    own = policy.deployment_stats()
    if own is None:
        raise UserError(f"{args.ckpt}: is a {info['model_type']}; only dino_volume_kv and dino_volume_kv_full are deployed by this script")
    same = lambda d: json.dumps({k: d[k] for k in own}, sort_keys=True,
                                default=lambda v: {k: x for k, x in v.to_dict().items() if k != "provenance"} if isinstance(v, RotationBasis) else str(v))
    if isinstance(own["rotation"].get("basis"), dict):
        own = {**own, "rotation": {**own["rotation"], "basis": RotationBasis.from_dict(own["rotation"]["basis"])}}
    if not set(own) <= set(stats) or same(own) != same(stats):
        raise UserError(f"{args.stats or stats_path(args.ckpt)}: belongs to another checkpoint than {args.ckpt}; copy both from one run")
    return policy


def recorded(source, state, size):
    """Observations of a smith300 episode folder, or of a video with its episode.npz."""
    folder = source if source.is_dir() else source.parent
    state = state or folder / "episode.npz"
    arrays = smith300.load_arrays(state)
    frames = smith300.frame_files(source) if source.is_dir() else source
    count, sizes = smith300.frame_sizes(frames)
    if count != len(arrays["eef_pos_t"]):
        raise UserError(f"{source}: {count} frames, but {state} has {len(arrays['eef_pos_t'])} rows; they do not belong together")
    width = arrays.get("gripper_width_t", np.where(arrays["gripper_t"] > 0.5, 0.0, smith300.OPEN_GRIPPER))
    K = smith300.square_intrinsics(arrays["intrinsics"], *sizes.pop(), size)
    for i, image in enumerate(smith300.iterate_frames(frames, size)):
        yield SimpleNamespace(image=image, eef_pos=arrays["eef_pos_t"][i], gripper_width=width[i], K=K, E=arrays["extrinsics"])


def live(stream, state, size):
    """Observations of JSON lines, see the module's docstring."""
    camera = {}
    if state:
        with np.load(state) as file:
            camera = {k: file[k].astype(float) for k in smith300.CAMERA if k in file}
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            camera.update({k: np.array(row[k], dtype=float).reshape(s) for k, s in smith300.CAMERA.items() if k in row})
            image = Image.open(io.BytesIO(base64.b64decode(row["image_base64"])) if "image_base64" in row else row["image"])
            eef = np.array(row["eef_pos"], dtype=float).reshape(3)
            width = float(row["gripper_width"])
            squared = smith300.square_image(image, size)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(f"standard input, line {number}: {type(error).__name__}: {error}; see --help for what a line holds")
        missing = [k for k in smith300.CAMERA if k not in camera]
        if missing:
            raise UserError(f"standard input, line {number}: {' and '.join(missing)} unknown; give them in the line, or once with --state")
        smith300.check_camera(camera["intrinsics"], camera["extrinsics"], f"standard input, line {number}", image.size)
        if not np.isfinite([*eef, width]).all():
            raise UserError(f"standard input, line {number}: eef_pos or gripper_width is NaN or Inf; nothing is sent to the robot")
        yield SimpleNamespace(image=squared, eef_pos=eef, gripper_width=width, E=camera["extrinsics"],
                              K=smith300.square_intrinsics(camera["intrinsics"], *image.size, size))


def deploy(args):
    policy = load(args)
    size, latencies = policy.config.image_size, []
    observations = live(sys.stdin, args.state, size) if str(args.source) == "-" else recorded(args.source, args.state, size)
    policy.reset()
    for frame, observation in enumerate(observations):
        if args.limit is not None and frame >= args.limit:
            break
        policy.seconds.update(features=0.0, policy=0.0)
        start = time.perf_counter()
        answer = policy.act(observation)
        latencies.append(1000 * (time.perf_counter() - start))
        print(json.dumps({"frame": frame, "xyz": answer.trajectory.round(6).tolist(), "euler": matrix_to_euler(answer.rotations).round(6).tolist(),
                          "gripper": answer.grippers.astype(int).tolist(), "latency_ms": round(latencies[-1], 2)}), flush=True)
        parts = ", ".join(f"{k} {1000 * v:.1f}" for k, v in policy.seconds.items())
        print(f"frame {frame}: {latencies[-1]:.1f} ms ({parts})", file=sys.stderr, flush=True)
    if latencies:
        print(f"{len(latencies)} calls: median {np.median(latencies):.1f} ms, 95% {np.percentile(latencies, 95):.1f} ms, first "
              f"{latencies[0]:.1f} ms", file=sys.stderr)


def build_parser():
    parser = flags.Parser(__doc__)
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint.safetensors")
    parser.add_argument("--stats", type=Path, help="its statistics (<ckpt>_stats.json)")
    parser.add_argument("--source", type=Path, required=True, help="smith300 episode folder, video, or - for JSON lines on standard input")
    parser.add_argument("--state", type=Path, help="episode.npz of a video (the one beside it); for -, an npz with intrinsics and extrinsics")
    parser.add_argument("--limit", type=flags.whole, help="stop after so many frames")
    parser.add_argument("--backbone_weights", type=Path, help="local file of backbone weights")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    return parser


if __name__ == "__main__":
    run_script(lambda: deploy(build_parser().parse_args()))
