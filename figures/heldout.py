"""Pictures of what a trained policy predicts on held-out demonstrations."""

import numpy as np
import torch
from tqdm import tqdm

from figures import plots
from harness.validation import (
    free_run,
    predict_newest,
    rollout_line,
    rollout_summary,
    to_device,
    to_pixels,
)


@torch.no_grad()
def overlays(policy, dataset, device, folder, n_episodes=3, n_frames=6):
    """Predicted against true trajectories drawn on frames of the first demonstrations; where a
    policy has them, its attention and its volumes too.
    """
    policy.eval()
    for episode in range(min(n_episodes, len(dataset.demos))):
        rows = np.flatnonzero(dataset.demo == episode)
        if not len(rows):  # all of its frames are pushed or in holds
            continue
        # frames evenly over the episode
        rows = rows[np.linspace(0, len(rows) - 1, min(n_frames, len(rows))).astype(int)]
        frames = dataset.frame[rows]
        images = dataset.demos[episode].images(frames)
        whole = to_device(dataset.batch(rows), device)
        picture = lambda kind, episode=episode: folder / f"{kind}_{episode}.png"

        start, true, predicted = trajectories(policy, whole)
        plots.trajectory_overlay(images, start, true, predicted, frames, picture("overlay"))

        # of windows (B,T,...), what belongs to the newest frame
        newest = whole["valid"].sum(1).cpu() - 1 if policy.has_history else None
        of_newest = lambda x, newest=newest: x[torch.arange(len(x)), newest].float().cpu().numpy()
        if hasattr(policy, "attention"):
            heat = of_newest(policy.attention(whole))
            beyond = policy.attention_beyond
            plots.attention_overlay(images, heat, frames, picture("attention"), beyond)
        if hasattr(policy, "distribution"):
            volumes = of_newest(policy.distribution(whole))
            plots.volume_projections(images, volumes, frames, picture("volume"), policy.beyond)


def trajectories(policy, whole):
    """Pixels of (EEF (B,2), true waypoints (B,T,2), predicted ones (B,T,2)) of a batch."""
    batch, out = predict_newest(policy, whole)
    array = lambda x: x.double().cpu().numpy()
    # (B,1,3,3), (B,1,4,4): one camera for the T waypoints of a sample
    K, E = array(batch["K"])[:, None], array(batch["E"])[:, None]
    start = to_pixels(array(batch["eef_pos"])[:, None], K, E)[:, 0]
    true = to_pixels(array(batch["target_pos"]), K, E)
    return start, true, to_pixels(array(out["position"]), K, E)


def free_runs(policy, dataset, folder, n_episodes=3):
    """Open-loop rollouts on the first demonstrations -> {"free/coverage_8px" ...}, also printed.

    The policy's predictions are fed back to it. Each rollout is drawn over the first image.
    """
    found = []
    bar = tqdm(dataset.demos[:n_episodes], desc="free-running", unit="demo")
    for episode, demo in enumerate(bar):
        # fed="predicted": no measured position corrects what has gone wrong
        run = free_run(policy, demo, dataset.config)
        found.append(run)
        first = demo.images([0])[0]
        path = to_pixels(run["path"], demo.K, demo.E)
        lines = {demo.name: rollout_line(run["predicted"], demo)}
        plots.paths_overlay(first, path, lines, folder / f"rollout_{episode}.png")
    row = {name: round(value, 5) for name, value in rollout_summary(found).items()}
    words = ", ".join(f"{name} {value:.3g}" for name, value in row.items())
    print(f"free-running on validation demonstrations: {words}")
    return {f"free/{name}": value for name, value in row.items()}
