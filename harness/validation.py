"""What a policy does on held-out demonstrations, without a simulator: errors, whether it looks, and
free-running rollouts.

Policies without a history have batches of frames (B,...), those with one windows (B,T,...) of which
the newest frames are scored.
"""

import numpy as np
import torch

from camera import project, unproject
from data import gripper_segments, waypoint_labels
from data_ar import following_frames
from formats.demos import seen_by, told_otherwise
from harness.metrics import coverage, distance_to_polyline, jerk

SHIFT_PX = 20.0  # the EEF input's displacement in `looks`
DEAF = 0.01  # metres: who moves by less in `listens` has not heard
EPS = (4, 8, 16)  # pixels of free-space coverage


def to_device(batch, device):
    """A batch on a device; features are a list of tensors."""
    move = lambda v: [maps.to(device) for maps in v] if isinstance(v, list) else v.to(device)
    return {name: move(value) for name, value in batch.items()}


def to_pixels(points, K, E):
    """World points (...,3) -> pixels (...,2)."""
    return np.stack(project(points, K, E)[:2], -1)


# -- the newest frames of windows -----------------------------------------------------------------


def newest_rows(batch):
    """The newest frame of each window, as rows (B,) of the flattened (B*T)."""
    B, T = batch["valid"].shape
    return torch.arange(B, device=batch["valid"].device) * T + batch["valid"].sum(1) - 1


def newest(batch, out):
    """Window batches as batches of single frames: targets and predictions of the newest frames.

    Every tensor (B,T,...) becomes (B,1,...) where it is about waypoints: one for each frame.
    Batches without a history come back as they are.
    """
    if "valid" not in batch:
        return batch, out
    rows = newest_rows(batch)
    pick = lambda x: x.flatten(0, 1)[rows]  # (B,T,...) -> (B,...)
    single = {name: pick(batch[name]) for name in ("eef_pos", "K", "E")}
    # of waypoints (B,...) -> (B,1,...), as of a policy that answers one
    for name in ("target_pos", "target_rot", "target_gripper", "mask"):
        single[name] = pick(batch[name])[:, None]
    return single, {name: pick(value)[:, None] for name, value in out.items()}


def predict_newest(policy, batch):
    """Predictions about the frames that are scored -> (batch, predictions) as of `newest`.

    A policy with a history computes those of the newest frames alone.
    """
    if not policy.has_history:
        return batch, policy.predict(batch)
    out = policy.decided(batch, newest_rows(batch))  # (B,...), the other frames cost nothing
    return newest(batch, {})[0], {name: value[:, None] for name, value in out.items()}


def newest_loss(policy, batch):
    """The policy's loss on the frames that are scored: of a window the newest alone."""
    if policy.has_history:
        # mask 0 everywhere but on the newest frames; the others stay as context
        mask = batch["mask"]
        only = torch.zeros_like(mask).flatten().index_fill(0, newest_rows(batch), 1)
        batch = {**batch, "mask": mask * only.view_as(mask)}
    return policy.loss(batch)


def without_past(batch):
    """Windows (B,T,...) of the newest frames alone (B,1,...), as firsts of their episodes."""
    rows = newest_rows(batch)
    pick = lambda x: x.flatten(0, 1)[rows][:, None]
    alone = {}
    for name, value in batch.items():
        if name not in ("first_eef", "instruction"):
            alone[name] = [pick(m) for m in value] if isinstance(value, list) else pick(value)
    told = {name: batch[name] for name in batch if name == "instruction"}
    # the episode starts where the newest frame is
    return {**alone, **told, "first_eef": alone["eef_pos"][:, 0]}


# -- errors ---------------------------------------------------------------------------------------


def chosen(dataset, limit, n=None):
    """At most `limit` indices of a dataset, or of n of its samples, evenly spread; a third as many
    of windows.

    All frames of a window are read, though only the newest is scored.
    """
    n = len(dataset) if n is None else n
    if dataset.config.has_history:
        limit = max(1, limit // 3)
    return np.linspace(0, n - 1, min(limit, n)).astype(int)


@torch.no_grad()
def validate(policy, dataset, device, batch_size=16, limit=400):
    """Loss and decoded errors on held-out demonstrations -> {"val/NAME": number}.

    Of the first waypoint: error in cm (mean, median, 90th percentile) and px (median), gripper
    accuracy, and rotation error in degrees (median, 95th percentile; of all waypoints too) where
    the policy turns. Of the trajectory: coverage at 4, 8 and 16 px, and jerk in cm/step^2 beside
    the truth's. Then the numbers of `looks`. limit: frames to look at, see `chosen`.
    """
    policy.eval()
    losses, sizes, errors = [], [], []
    indices = chosen(dataset, limit)
    for i in range(0, len(indices), batch_size):
        batch = to_device(dataset.batch(indices[i : i + batch_size]), device)
        loss = newest_loss(policy, batch)
        losses.append({name: value.item() for name, value in loss.items()})
        sizes.append(len(indices[i : i + batch_size]))
        # errors of every sample; means and percentiles come at the end, over all of them
        single, out = predict_newest(policy, batch)
        found = {**first_errors(single, out), **path_errors(single, out)}
        errors.append({**found, **turn_errors(single, out)} if policy.turns else found)

    # of samples: the last batch may be small
    mean = lambda name: np.average([loss[name] for loss in losses], weights=sizes)
    row = {name: mean(name) for name in losses[0]}
    all_errors = {name: np.concatenate([part[name] for part in errors]) for name in errors[0]}
    row.update(error_summary(all_errors))
    row.update(looks(policy, dataset, device, batch_size, min(limit, 96)))
    policy.train()
    return {f"val/{name}": round(float(value), 5) for name, value in row.items()}


def first_errors(batch, out):
    """Errors of the first waypoint (B,)."""
    true, predicted = batch["target_pos"].cpu().numpy(), out["position"].double().cpu().numpy()
    K, E = batch["K"].cpu().numpy(), batch["E"].cpu().numpy()
    true, predicted = true[:, 0], predicted[:, 0]
    apart_px = to_pixels(true, K, E) - to_pixels(predicted, K, E)
    return {
        "cm": 100 * np.linalg.norm(true - predicted, axis=-1),
        "px": np.linalg.norm(apart_px, axis=-1),
        "gripper": (out["gripper"] == batch["target_gripper"])[:, 0].cpu().numpy(),
    }


def turn_errors(batch, out):
    """Angles in degrees between true and predicted rotations.

    "degrees" (B,) of the first waypoint, "every_degrees" of all unmasked ones.
    """
    turn = out["rotation"].double() @ batch["target_rot"].transpose(-1, -2)
    # trace of a rotation by an angle: 1 + 2 cos(angle)
    cosine = (torch.diagonal(turn, dim1=-2, dim2=-1).sum(-1) - 1) / 2
    degrees = torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))  # (B,T)
    return {
        "degrees": degrees[:, 0].cpu().numpy(),
        "every_degrees": degrees[batch["mask"] > 0].cpu().numpy(),
    }


def path_errors(batch, out):
    """Coverage and jerk (B,) of trajectories, see `validate`."""
    true, predicted = batch["target_pos"].cpu().numpy(), out["position"].double().cpu().numpy()
    K, E = batch["K"].cpu().numpy()[:, None], batch["E"].cpu().numpy()[:, None]
    true_px, predicted_px = to_pixels(true, K, E), to_pixels(predicted, K, E)
    start_px = to_pixels(batch["eef_pos"].cpu().numpy()[:, None], K, E)  # (B,1,2)
    # the predicted line starts where the EEF is
    lines = np.concatenate([start_px, predicted_px], 1)  # (B,T+1,2)
    known = batch["mask"].cpu().numpy() > 0
    # waypoints behind a push (mask 0) are left out of the coverage
    found = {
        f"coverage_{eps}px": [
            coverage(points[shown], line, eps) for points, shown, line in zip(true_px, known, lines)
        ]
        for eps in EPS
    }
    found["jerk_cm"] = [100 * jerk(points) for points in predicted]
    found["true_jerk_cm"] = [100 * jerk(points) for points in true]
    return found


def error_summary(errors):
    """`validate`'s numbers, from the errors of all samples."""
    means = (*(f"coverage_{eps}px" for eps in EPS), "jerk_cm", "true_jerk_cm")
    row = {
        "cm_mean": np.mean(errors["cm"]),
        "cm_median": np.median(errors["cm"]),
        "cm_p90": np.percentile(errors["cm"], 90),
        "px_median": np.median(errors["px"]),
        "gripper_accuracy": np.mean(errors["gripper"]),
    }
    if "degrees" in errors:
        row["rotation_deg_median"] = np.median(errors["degrees"])
        row["rotation_deg_p95"] = np.percentile(errors["degrees"], 95)
        row["rotation_deg_all_median"] = np.median(errors["every_degrees"])
        row["rotation_deg_all_p95"] = np.percentile(errors["every_degrees"], 95)
    return {**row, **{name: np.mean(errors[name]) for name in means}}


# -- whether it looks -----------------------------------------------------------------------------


@torch.no_grad()
def looks(policy, dataset, device, batch_size=16, limit=96):
    """Tests that a policy looks at the image instead of guessing from its own state.

    All are about the first waypoint of the newest frame. shift_px: how far the prediction moves
    (median, px) when every EEF position in the input moves by 20 px, each sample in its own
    direction. blank_ratio: the factor by which the median error grows when the images are blank.
    no_past_mm, of policies with a history: how far the prediction moves (median, mm) when all
    frames before the newest are removed; near 0 the policy is one of a single frame. deaf_share:
    see `listens`.
    """
    policy.eval()
    size = dataset.config.image_size
    # one blank image serves all samples: its maps [(C,H,W)]
    blank = dataset.backbone(torch.full((1, size, size, 3), 128, dtype=torch.uint8))
    blank = [maps.to(device)[0] for maps in blank]  # grey
    moved, errors, blank_errors, past_moves = [], [], [], []
    apart = lambda a, b: np.linalg.norm(a - b, axis=-1)
    indices = chosen(dataset, limit)
    for i in range(0, len(indices), batch_size):
        batch = to_device(dataset.batch(indices[i : i + batch_size]), device)
        single, out = predict_newest(policy, batch)
        true = first_pixels(single, single["target_pos"])
        plain = first_pixels(single, out["position"])
        errors.extend(apart(plain, true))

        # the EEF aside: does the answer follow the image, or the state?
        single, other = predict_newest(policy, with_moved_eef(policy, batch, i))
        moved.extend(apart(first_pixels(single, other["position"]), plain))

        # the image gone: does the error grow?
        empty = [b.expand_as(maps) for b, maps in zip(blank, batch["features"])]
        single, other = predict_newest(policy, {**batch, "features": empty})
        blank_errors.extend(apart(first_pixels(single, other["position"]), true))

        # the past gone: does the answer change?
        if policy.has_history:
            _, other = predict_newest(policy, without_past(batch))
            metres = (other["position"] - out["position"])[:, 0].double().norm(dim=-1)
            past_moves.extend(1000 * metres.cpu().numpy())
    found = {
        "shift_px": np.median(moved),
        "blank_ratio": np.median(blank_errors) / max(np.median(errors), 1e-9),
    }
    if past_moves:
        found["no_past_mm"] = np.median(past_moves)
    return {**found, **listens(policy, dataset, device, batch_size, limit)}


def listens(policy, dataset, device, batch_size, limit):
    """Whether the sentence decides where a demonstration's first image shows several to choose from
    -> {"deaf_share"}: the share of demonstrations in scenes of several sentences at whose first
    sample the waypoint moves by less than DEAF when another one is said.

    {} where no scene has several, or the policy is told nothing. limit: as of `chosen`, or a suite
    of many demonstrations would be validated for longer than the rest takes.
    """
    first = dict(zip(*np.unique(dataset.demo, return_index=True)))
    others = {} if dataset.instruction is None else told_otherwise(dataset.demos)
    asked = [d for d in others if d in first]
    asked = [asked[i] for i in chosen(dataset, limit, len(asked))]
    moved = []
    for i in range(0, len(asked), batch_size):
        some = asked[i : i + batch_size]
        batch = to_device(dataset.batch([first[d] for d in some]), device)
        words = dataset.instruction[[others[d] for d in some]].to(device)
        _, own = predict_newest(policy, batch)
        _, other = predict_newest(policy, {**batch, "instruction": words})
        moved.append((own["position"] - other["position"])[:, 0].double().norm(dim=-1))
    if not moved:
        return {}
    return {"deaf_share": (torch.cat(moved) < DEAF).double().mean().item()}


def first_pixels(single, positions):
    """Pixels (B,2) of the first of positions (B,T,3)."""
    first = positions[:, 0].double().cpu().numpy()
    return to_pixels(first, single["K"].cpu().numpy(), single["E"].cpu().numpy())


def with_moved_eef(policy, batch, start):
    """A batch whose EEF positions are SHIFT_PX aside, in directions that are even and repeatable.

    start: number of its first sample.
    """
    eef = batch["eef_pos"]
    turns = np.arange(start, start + len(eef)) * 0.618 % 1  # multiples of the golden ratio
    angle = torch.as_tensor(2 * np.pi * turns, device=eef.device)  # (B,)
    if policy.has_history:
        angle = angle[:, None]  # the same for all frames of a window
    # aside in the image, at the same height above the table
    u, v, _ = project(eef, batch["K"], batch["E"])
    u, v = u + SHIFT_PX * angle.cos(), v + SHIFT_PX * angle.sin()
    return {**batch, "eef_pos": unproject(u, v, eef[..., 2], batch["K"], batch["E"])}


# -- free-running ---------------------------------------------------------------------------------


def decision_frames(demo, config):
    """Frames (N,) of a demonstration at which decisions fall, and frames (N,) of their waypoints.

    From its first frame up to the last gripper change. Where not every frame has an image
    (`Demo.image_stride`), a decision falls on the last frame that has one: with every second, at
    most one control step (50 ms) early.
    """
    labels = waypoint_labels(
        demo, config.waypoint_stride, 1, config.retreat, config.min_travel, config.stay
    )
    target = labels[0][:, 0]
    following = following_frames(demo, target)
    _, changes = gripper_segments(demo.actions)
    end = changes[-1] if len(changes) else len(demo) - 1
    # from each decision to the frame that its waypoint is reached at, past the gripper's holds
    following = following - following % demo.image_stride
    frames = [0]
    while following[frames[-1]] > frames[-1] and target[frames[-1]] < end:
        frames.append(int(following[frames[-1]]))
    return frames, target[frames]


@torch.no_grad()
def free_run(policy, demo, config, fed="predicted"):
    """Open-loop rollout: the policy's waypoints along a recorded demonstration.

    At each of the demonstration's decisions the policy sees the recorded image and a last known EEF
    position: its previous waypoint (fed="predicted") or the recorded position ("measured"). With
    fed="chunk" a policy of several waypoints decides anew only when it has used them up, or after a
    change of the gripper; the EEF position is then its last waypoint.

    Returns {"predicted" (N,3) m, "true" (N,3) m, "path" (M,3) the recorded positions up to the last
    gripper change, "gripper" (N,) in {0, 1}, "frames" and "targets" (N,) of the decisions and their
    true waypoints, "aside" (M,) px from each recorded position to the predicted line, "in_view"
    (M,) whether the image shows it, "jerk_mm", "true_jerk_mm" (second differences of the
    waypoints), "jitter_mm" (of their errors), "px" (N,)}.
    """
    # decision by decision along the recording, which does not react: open loop
    demo = seen_by(demo, config)
    frames, targets = decision_frames(demo, config)
    _, changes = gripper_segments(demo.actions)
    policy.eval().reset()
    predicted, gripper, plan = [], [], []
    for image, frame, target in zip(demo.images(frames), frames, targets):
        if not plan:
            own = predicted[-1] if predicted and fed != "measured" else demo.ee_pos[frame]
            plan = decide(policy, demo, image, frame, own)
        # the plan's first waypoint is taken to be reached
        (position, command), *rest = plan
        predicted.append(position)
        gripper.append(command)
        plan = rest if fed == "chunk" and target not in changes else []
    policy.reset()

    predicted, true = np.array(predicted), demo.ee_pos[targets]
    path = demo.ee_pos[: targets[-1] + 1]
    to_px = lambda points: to_pixels(points, demo.K, demo.E)
    path_px = to_px(path)
    return {
        "predicted": predicted,
        "true": true,
        "path": path,
        "gripper": np.array(gripper),
        "frames": np.array(frames),
        "targets": targets,
        "aside": distance_to_polyline(path_px, rollout_line(predicted, demo)),
        "in_view": ((path_px >= 0) & (path_px <= config.image_size - 1)).all(-1),
        "jerk_mm": 1000 * jerk(predicted),
        "true_jerk_mm": 1000 * jerk(true),
        "jitter_mm": 1000 * jerk(predicted - true),
        "px": np.linalg.norm(to_px(predicted) - to_px(true), axis=-1),
    }


def decide(policy, demo, image, frame, eef):
    """The policy's waypoints at a recorded image -> [((3,) m, command in {0, 1})].

    image (H,W,3) uint8 of a demonstration's `frame`; eef (3,) m: where the policy is told to be.
    """
    device = next(policy.parameters()).device
    tensor = lambda x: torch.as_tensor(np.asarray(x), dtype=torch.float64, device=device)[None]
    # batch of one, as in Policy.act
    maps = policy.backbone(torch.from_numpy(image[None]))
    out = policy.decide(
        {
            "features": [m.to(device) for m in maps],
            "eef_pos": tensor(eef),
            "K": tensor(demo.K),
            "E": tensor(demo.E),
            "gripper_width": tensor(np.abs(demo.gripper_states[frame]).sum()),
            **policy.instructed(demo.instruction),
        }
    )
    positions = out["position"][0].double().cpu().numpy()
    return list(zip(positions, map(int, out["gripper"][0])))


def rollout_line(predicted, demo):
    """A demonstration's start and the waypoints (N,3) m predicted from there, pixels (N+1,2)."""
    return to_pixels(np.concatenate([demo.ee_pos[:1], predicted]), demo.K, demo.E)


def rollout_summary(rollouts):
    """Means of `free_run` over demonstrations.

    Coverage is over all their points together, and again over those that the images show: a policy
    that answers with a cell of the image can name no others.
    """
    aside, in_view = (np.concatenate([r[name] for r in rollouts]) for name in ("aside", "in_view"))
    row = {}
    for kind, part in (("", np.full_like(in_view, True)), ("_in_view", in_view)):
        for eps in EPS:
            share = float((aside[part] <= eps).mean()) if part.any() else 0.0
            row[f"coverage_{eps}px{kind}"] = share
    for name in ("jerk_mm", "true_jerk_mm", "jitter_mm"):
        row[name] = float(np.mean([r[name] for r in rollouts]))
    px = np.concatenate([r["px"] for r in rollouts])
    return {
        **row,
        "px_median": float(np.median(px)),
        "px_p90": float(np.percentile(px, 90)),
        "n_demos": len(rollouts),
        "n_points": len(aside),
        "n_in_view": int(in_view.sum()),
    }
