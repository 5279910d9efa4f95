"""The README's picture: image, volume, waypoint; from a committed checkpoint and a rendered frame.

PYTHONPATH=. python docs/pictures/approach.py        # writes docs/pictures/approach.jpg
"""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

import camera
from harness.checkpoint import load_policy
from sim.libero_env import Scene

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CHECKPOINT = ROOT / "checkpoints" / "para_libero_spatial_0.safetensors"
STATE, FRAMES_IN = 3, 12  # the benchmark's init state, and control steps until its objects rest
SHARE = 0.05  # of a waypoint's highest probability: below it a voxel is not drawn
COLOURS = matplotlib.colormaps["plasma"]


def decide(policy, observation):
    """Observation -> probabilities (T,Z,H,W) over the volume, and the Waypoint."""
    tensor = lambda x: torch.as_tensor(np.asarray(x), dtype=torch.float64)[None]
    with torch.inference_mode():
        batch = {
            "features": policy.backbone(torch.from_numpy(observation.image[None])),
            "eef_pos": tensor(observation.eef_pos),
            "gripper_width": tensor(observation.gripper_width),
            "K": tensor(observation.K),
            "E": tensor(observation.E),
        }
        logits = policy.volume_logits(policy.trunk_features(batch))[0]  # (T,G,Z,H,W)
    p = logits.float().flatten(1).softmax(-1).view_as(logits).sum(1)
    return p.numpy(), policy.act(observation)


def pixels(points, observation):
    """World points (N,3) -> pixels u, v (N,)."""
    u, v, _ = camera.project(points, observation.K, observation.E)
    return u, v


def draw_image(axes, observation):
    """What the policy sees."""
    axes.imshow(observation.image)
    u, v = pixels(observation.eef_pos[None], observation)
    axes.plot(u, v, "o", ms=9, mfc="none", mec="cyan", mew=2)
    axes.annotate(
        "end-effector",
        (u[0] + 10, v[0]),
        (u[0] + 40, v[0] - 25),
        color="cyan",
        arrowprops={"color": "cyan", "arrowstyle": "-"},
    )
    axes.set_title("1  image, end-effector, camera")


def draw_volume(axes, observation, p, colours):
    """The volume over the image: one distribution a waypoint. p (T,Z,H,W)."""
    n, n_heights, side, _ = p.shape
    size = observation.image.shape[0]
    floor = observation.image[:: size // side // 2, :: size // side // 2] / 255
    ys, xs = np.mgrid[0 : side : floor.shape[0] * 1j, 0 : side : floor.shape[1] * 1j]
    axes.plot_surface(
        xs,
        ys,
        np.full_like(xs, -1),
        facecolors=0.35 + 0.65 * floor,
        rstride=1,
        cstride=1,
        shade=False,
        zorder=0,
    )
    for i in range(n):
        z, y, x = np.nonzero(p[i] > SHARE * p[i].max())
        strength = p[i][z, y, x] / p[i].max()
        rgba = np.repeat(colours[i][None], len(z), 0)
        rgba[:, 3] = 0.1 + 0.9 * strength
        axes.scatter(
            x, y, z, s=6 + 26 * strength, c=rgba, marker="s", depthshade=False, lw=0, zorder=1 + i
        )
    axes.set(xlim=(0, side), ylim=(side, 0), zlim=(-1, n_heights))
    axes.set_xlabel("image column", labelpad=-8)
    axes.set_ylabel("image row", labelpad=-8)
    axes.set_zlabel("height bin", labelpad=-8)
    axes.tick_params(labelsize=7, pad=-3)
    axes.view_init(elev=24, azim=-62)
    axes.set_box_aspect((1, 1, 0.75), zoom=1.0)


def draw_answer(axes, observation, waypoint, colours):
    """What the policy answers: a trajectory of 3D points."""
    axes.imshow(observation.image)
    u, v = pixels(waypoint.trajectory, observation)
    start = pixels(observation.eef_pos[None], observation)
    axes.plot(np.append(start[0], u), np.append(start[1], v), "-", color="white", lw=1.5)
    axes.scatter(u, v, s=45, c=colours, edgecolors="white", lw=1, zorder=3)
    x, y, z = waypoint.position
    axes.annotate(
        f"next waypoint\n{x:.2f}, {y:.2f}, {z:.2f} m",
        (u[0], v[0]),
        (u[0] - 5, v[0] - 95),
        color="white",
        va="center",
        ha="left",
        arrowprops={"color": "white", "arrowstyle": "-"},
    )
    axes.set_title("3  unprojected: 3D waypoints")


def draw(observation, p, waypoint, path):
    """Three panels into a JPEG."""
    colours = COLOURS(np.linspace(0.15, 0.9, len(p)))
    figure = Figure(figsize=(12, 4.1))
    left = figure.add_axes((0.005, 0.03, 0.30, 0.84))
    middle = figure.add_axes((0.31, 0.0, 0.37, 0.92), projection="3d", computed_zorder=False)
    right = figure.add_axes((0.695, 0.03, 0.30, 0.84))
    draw_image(left, observation)
    draw_volume(middle, observation, p, colours)
    figure.text(0.495, 0.905, "2  where next? one softmax a waypoint", ha="center", fontsize=12)
    draw_answer(right, observation, waypoint, colours)
    for axes in (left, right):
        axes.set_axis_off()
    figure.savefig(path, dpi=110, pil_kwargs={"quality": 88})


def main():
    torch.set_num_threads(1)
    policy, _, _ = load_policy(CHECKPOINT)
    scene = Scene("libero_spatial", 0, policy.config.image_size)
    scene.set_state(scene.init_states()[STATE])
    for _ in range(FRAMES_IN):
        scene.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
    observation = scene.observe()
    p, waypoint = decide(policy, observation)
    draw(observation, p, waypoint, HERE / "approach.jpg")
    print(HERE / "approach.jpg")


if __name__ == "__main__":
    main()
