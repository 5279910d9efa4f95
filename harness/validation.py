"""What a policy does on held-out demonstrations, without a simulator: errors, whether it looks, and
free-running rollouts.
"""

import numpy as np
import torch

from camera import project, unproject
from data import gripper_segments, waypoint_labels
from data_ar import following_frames
from harness.metrics import coverage, distance_to_polyline, jerk

SHIFT_PX = 20.0  # the EEF input's displacement in `looks`
EPS = (4, 8, 16)  # pixels of free-space coverage


def to_device(batch, device):
    move = lambda v: [m.to(device) for m in v] if isinstance(v, list) else v.to(device)
    return {k: move(v) for k, v in batch.items()}


def newest_rows(batch):
    """The newest frame of each window, as rows (B,) of the flattened (B*T)."""
    B, T = batch["valid"].shape
    return torch.arange(B, device=batch["valid"].device) * T + batch["valid"].sum(1) - 1


def newest(batch, out):
    """Window batches as single-frame ones: targets and predictions of each window's newest frame,
    one waypoint each. Batches without a history come back as they are."""
    if "valid" not in batch:
        return batch, out
    rows = newest_rows(batch)
    pick = lambda x: x.flatten(0, 1)[rows]
    single = {k: pick(batch[k]) for k in ("eef_pos", "K", "E")}
    single.update(
        {k: pick(batch[k])[:, None] for k in ("target_pos", "target_rot", "target_gripper", "mask")}
    )
    return single, {k: pick(v)[:, None] for k, v in out.items()}


def predict_newest(policy, batch):
    """`newest` of the policy's predictions; a policy with a history decides about those frames
    alone.
    """
    if not policy.has_history:
        return batch, policy.predict(batch)
    out = policy.decided(batch, newest_rows(batch))
    return newest(batch, {})[0], {k: v[:, None] for k, v in out.items()}


def newest_loss(policy, batch):
    """The policy's loss on the frames that are scored: of windows the newest alone, as of a policy
    without a history.
    """
    if policy.has_history:
        only = (
            torch.zeros_like(batch["mask"])
            .flatten()
            .index_fill(0, newest_rows(batch), 1)
            .view_as(batch["mask"])
        )
        batch = {**batch, "mask": batch["mask"] * only}
    return policy.loss(batch)


def to_pixels(points, K, E):
    """World points (...,3) -> pixels (...,2)."""
    return np.stack(project(points, K, E)[:2], -1)


def chosen(dataset, limit):
    """At most `limit` indices, evenly spread; fewer of windows, of which only the newest frame is
    scored but others are read.
    """
    limit = limit if not dataset.config.has_history else max(1, limit // 3)
    return np.linspace(0, len(dataset) - 1, min(limit, len(dataset))).astype(int)


@torch.no_grad()
def validate(policy, dataset, device, batch_size=16, limit=400):
    """Loss and decoded errors on held-out demonstrations.

    Of the first waypoint: error in cm (median, 90th percentile) and px (median), gripper accuracy,
    rotation error in degrees (median, 95th percentile; of all waypoints too). Of the trajectory:
    coverage at 4, 8 and 16 px and jerk in cm/step^2 beside the truth's. And `looks`. No rotation
    errors of a policy that does not turn.
    """
    policy.eval()
    losses, cm, px, gripper, degrees, cover, jerks = (
        [],
        [],
        [],
        [],
        [],
        {e: [] for e in EPS},
        ([], []),
    )
    every_degrees = []
    indices = chosen(dataset, limit)
    for i in range(0, len(indices), batch_size):
        batch = to_device(dataset.batch(indices[i : i + batch_size]), device)
        losses.append({k: v.item() for k, v in newest_loss(policy, batch).items()})
        batch, out = predict_newest(policy, batch)
        true, predicted = batch["target_pos"].cpu().numpy(), out["position"].double().cpu().numpy()
        K, E = batch["K"].cpu().numpy()[:, None], batch["E"].cpu().numpy()[:, None]
        true_px, predicted_px = to_pixels(true, K, E), to_pixels(predicted, K, E)
        cm.extend(100 * np.linalg.norm(true[:, 0] - predicted[:, 0], axis=-1))
        px.extend(np.linalg.norm(true_px[:, 0] - predicted_px[:, 0], axis=-1))
        gripper.extend((out["gripper"] == batch["target_gripper"])[:, 0].cpu().numpy())
        if policy.turns:
            turn = out["rotation"].double() @ batch["target_rot"].transpose(-1, -2)
            cosine = (torch.diagonal(turn, dim1=-2, dim2=-1).sum(-1) - 1) / 2
            turned = torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))  # (B,T)
            degrees.extend(turned[:, 0].cpu().numpy())
            every_degrees.extend(turned[batch["mask"] > 0].cpu().numpy())
        for j in range(len(true)):
            known = batch["mask"][j].cpu().numpy() > 0
            start = to_pixels(batch["eef_pos"][j].cpu().numpy(), K[j, 0], E[j, 0])[None]
            for eps, values in cover.items():
                values.append(
                    coverage(true_px[j][known], np.concatenate([start, predicted_px[j]]), eps)
                )
            for values, points in zip(jerks, (predicted[j], true[j])):
                values.append(100 * jerk(points))
    row = {f"val/{k}": float(np.mean([l[k] for l in losses])) for k in losses[0]}
    rotation_errors = {}
    if policy.turns:
        rotation_errors = {
            "val/rotation_deg_median": np.median(degrees),
            "val/rotation_deg_p95": np.percentile(degrees, 95),
            "val/rotation_deg_all_median": np.median(every_degrees),
            "val/rotation_deg_all_p95": np.percentile(every_degrees, 95),
        }
    row.update(
        {
            "val/cm_median": np.median(cm),
            "val/cm_p90": np.percentile(cm, 90),
            "val/px_median": np.median(px),
            "val/gripper_accuracy": np.mean(gripper),
            **rotation_errors,
            **{f"val/coverage_{e}px": np.mean(v) for e, v in cover.items()},
            "val/jerk_cm": np.mean(jerks[0]),
            "val/true_jerk_cm": np.mean(jerks[1]),
        }
    )
    row.update(
        {
            f"val/{k}": v
            for k, v in looks(policy, dataset, device, batch_size, min(limit, 96)).items()
        }
    )
    policy.train()
    return {k: round(float(v), 5) for k, v in row.items()}


def without_past(batch):
    """Windows (B,T,...) of which only the newest frames are left (B,1,...), each the first of its
    episode.
    """
    rows = newest_rows(batch)
    pick = lambda x: x.flatten(0, 1)[rows][:, None]
    alone = {
        k: [pick(m) for m in v] if isinstance(v, list) else v if k == "first_eef" else pick(v)
        for k, v in batch.items()
    }
    return {**alone, "first_eef": alone["eef_pos"][:, 0]}


@torch.no_grad()
def looks(policy, dataset, device, batch_size=16, limit=96):
    """Tests that a policy looks instead of guessing from its own state, on the first waypoint of
    the newest frame.

    shift_px: how far the predicted waypoint moves (median, px) when every EEF position it is given
    moves by 20 px, each sample in a direction of its own. blank_ratio: by what factor the median
    error grows when the images are blank. no_past_mm, of policies with a history: how far it moves
    (median, mm) when all frames before the newest are removed; near 0 the policy is one of a single
    frame.
    """
    policy.eval()
    size, moved, errors, blind, forgotten = dataset.config.image_size, [], [], [], []
    blank = dataset.backbone(torch.full((1, size, size, 3), 128, dtype=torch.uint8))
    indices = chosen(dataset, limit)
    first = lambda batch, out: to_pixels(
        out["position"][:, 0].double().cpu().numpy(),
        batch["K"].cpu().numpy(),
        batch["E"].cpu().numpy(),
    )
    for i in range(0, len(indices), batch_size):
        batch = to_device(dataset.batch(indices[i : i + batch_size]), device)
        # even, and repeatable
        angle = torch.as_tensor(
            2 * np.pi * (np.arange(i, i + len(batch["K"])) * 0.618 % 1), device=device
        )
        if policy.has_history:
            angle = angle[:, None]  # (B,1), the same in all frames of a window
        u, v, _ = project(batch["eef_pos"], batch["K"], batch["E"])
        shifted = {
            **batch,
            "eef_pos": unproject(
                u + SHIFT_PX * angle.cos(),
                v + SHIFT_PX * angle.sin(),
                batch["eef_pos"][..., 2],
                batch["K"],
                batch["E"],
            ),
        }
        empty = {
            **batch,
            "features": [b.to(device)[0].expand_as(m) for b, m in zip(blank, batch["features"])],
        }
        single, out = predict_newest(policy, batch)
        true = first(single, {"position": single["target_pos"]})
        plain = first(single, out)
        moved.extend(np.linalg.norm(first(*predict_newest(policy, shifted)) - plain, axis=-1))
        errors.extend(np.linalg.norm(plain - true, axis=-1))
        blind.extend(np.linalg.norm(first(*predict_newest(policy, empty)) - true, axis=-1))
        if policy.has_history:
            _, alone = predict_newest(policy, without_past(batch))
            forgotten.extend(
                1000
                * (alone["position"] - out["position"])[:, 0].double().norm(dim=-1).cpu().numpy()
            )
    found = {
        "shift_px": np.median(moved),
        "blank_ratio": np.median(blind) / max(np.median(errors), 1e-9),
    }
    return {**found, **({"no_past_mm": np.median(forgotten)} if forgotten else {})}


def decision_frames(demo, config):
    """Frames of a demonstration at which decisions fall, from its first on, up to the last gripper
    change.
    """
    target, _, _, _ = waypoint_labels(
        demo, config.waypoint_stride, 1, config.retreat, config.min_travel, config.stay
    )
    following, (_, changes) = following_frames(demo, target[:, 0]), gripper_segments(demo.actions)
    end, frames = changes[-1] if len(changes) else len(demo) - 1, [0]
    while following[frames[-1]] > frames[-1] and target[frames[-1], 0] < end:
        frames.append(int(following[frames[-1]]))
    return frames, target[frames, 0]


@torch.no_grad()
def free_run(policy, demo, config, fed="predicted"):
    """Open-loop rollout on a demonstration from its first frame on: at each of its decisions the
    policy sees the recorded image and, as the last known EEF position, its own previous waypoint
    (fed="predicted") or the recorded one ("measured"). fed="chunk": a policy of several waypoints
    decides anew only when it has used them up, or after a change of the gripper, with its own last
    one.

    Returns {"predicted" (N,3) m, "true" (N,3) m, "path" (M,3) the recorded positions up to the last
    gripper change, "gripper" (N,) in {0, 1}, "frames" and "targets" (N,) of the decisions and their
    true waypoints, "aside" (M,) px from each recorded position to the predicted line, "in_view"
    (M,) whether the image shows it, "jerk_mm", "true_jerk_mm" (second differences of the
    waypoints), "jitter_mm" (of their errors), "px" (N,)}.
    """
    frames, targets = decision_frames(demo, config)
    device = next(policy.parameters()).device
    images = demo.images(frames)
    policy.eval().reset()
    tensor = lambda x: torch.as_tensor(np.asarray(x), dtype=torch.float64, device=device)[None]
    _, changes = gripper_segments(demo.actions)

    def decide(image, frame):
        """The policy's waypoints from here on: [((3,) m, command in {0, 1})]."""
        eef = demo.ee_pos[frame] if fed == "measured" or not predicted else predicted[-1]
        maps = [m.to(device) for m in policy.backbone(torch.from_numpy(image[None]))]
        out = policy.decide(
            {
                "features": maps,
                "eef_pos": tensor(eef),
                "K": tensor(demo.K),
                "E": tensor(demo.E),
                "gripper_width": tensor(np.abs(demo.gripper_states[frame]).sum()),
            }
        )
        return list(zip(out["position"][0].double().cpu().numpy(), map(int, out["gripper"][0])))

    predicted, gripper, plan = [], [], []
    for image, frame, target in zip(images, frames, targets):
        (position, command), *rest = plan or decide(image, frame)
        predicted.append(position)
        gripper.append(command)
        plan = rest if fed == "chunk" and target not in changes else []
    policy.reset()
    predicted, true, path = (
        np.array(predicted),
        demo.ee_pos[targets],
        demo.ee_pos[: targets[-1] + 1],
    )
    to_px = lambda points: to_pixels(points, demo.K, demo.E)
    return {
        "predicted": predicted,
        "true": true,
        "path": path,
        "gripper": np.array(gripper),
        "frames": np.array(frames),
        "targets": targets,
        "aside": distance_to_polyline(to_px(path), rollout_line(predicted, demo)),
        "in_view": ((to_px(path) >= 0) & (to_px(path) <= config.image_size - 1)).all(-1),
        "jerk_mm": 1000 * jerk(predicted),
        "true_jerk_mm": 1000 * jerk(true),
        "jitter_mm": 1000 * jerk(predicted - true),
        "px": np.linalg.norm(to_px(predicted) - to_px(true), axis=-1),
    }


def rollout_line(predicted, demo):
    """A demonstration's start and the waypoints (N,3) m predicted from there, pixels (N+1,2)."""
    return to_pixels(np.concatenate([demo.ee_pos[:1], predicted]), demo.K, demo.E)


def rollout_summary(rollouts):
    """Means of `free_run` over demonstrations; coverage over all their points together, and over
    those that images show: no policy that answers with a cell of the image can say the others."""
    aside, in_view = (np.concatenate([r[k] for r in rollouts]) for k in ("aside", "in_view"))
    covered = lambda eps, part: float((aside[part] <= eps).mean()) if part.any() else 0.0
    row = {
        f"coverage_{e}px{kind}": covered(e, part)
        for kind, part in (("", np.full_like(in_view, True)), ("_in_view", in_view))
        for e in EPS
    }
    row.update(
        {
            k: float(np.mean([r[k] for r in rollouts]))
            for k in ("jerk_mm", "true_jerk_mm", "jitter_mm")
        }
    )
    px = np.concatenate([r["px"] for r in rollouts])
    return {
        **row,
        "px_median": float(np.median(px)),
        "px_p90": float(np.percentile(px, 90)),
        "n_demos": len(rollouts),
        "n_points": len(aside),
        "n_in_view": int(in_view.sum()),
    }
