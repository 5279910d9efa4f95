"""Finetuning: start from another checkpoint's tensors, hold its volume head still for a while,
watch its loss afterwards.
"""

from harness.checkpoint import load_tensors
from runtime import UserError

# buffers that describe the new data's rotations, whatever the checkpoint says
OWN = ("rotation_basis", "euler_range")
# the volume means something else where these differ, though every shape fits
SAME = ("image_size", "grid", "n_height_bins")
CREEP = 0.05  # nats by which the held-out volume loss may grow after the freeze


def init_from(policy, path):
    """Load a checkpoint's tensors into a policy by name and shape -> {"loaded", "dropped", "fresh"}
    lists of names, printed.

    Height range and feature normalisation come along, for the volume head's sake; what describes
    rotations stays the new data's. Raises UserError for other features, another grid, or a
    checkpoint of which nothing fits.
    """
    tensors, info = load_tensors(path)
    if "config" not in info or "backbone_identity" not in info:
        raise UserError(f"--init_from {path}: holds no policy; give a run's checkpoint.safetensors")
    if info["backbone_identity"] != policy.backbone.identity:
        raise UserError(
            f"--init_from {path}: was trained on the features {info['backbone_identity']}, here they are "
            f"{policy.backbone.identity}; give the same --backbone, --image_size and --backbone_weights"
        )
    for name in SAME:
        old, new = info["config"].get(name), getattr(policy.config, name, None)
        if old is not None and new is not None and old != new:
            raise UserError(
                f"--init_from {path}: has --{name} {old}, here it is {new}: its volume would mean something else; "
                f"give --{name} {old}"
            )
    stored = {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
    state = policy.state_dict()
    fits = {
        k: v for k, v in stored.items() if k in state and state[k].shape == v.shape and k not in OWN
    }
    trained = [k for k, _ in policy.named_parameters() if k in fits]
    if not trained:
        raise UserError(
            f"--init_from {path}: no tensor of {info.get('model_type')} fits by name and shape; give a related checkpoint"
        )
    low, high = state["height_range"].tolist() if "height_range" in fits else (0, 0)
    report = {
        "loaded": sorted(fits),
        "dropped": sorted(set(stored) - set(fits)),
        "fresh": sorted(set(state) - set(fits)),
    }
    policy.load_state_dict(fits, strict=False)
    shape = lambda tensors, k: f"{k} {tuple(tensors[k].shape)}"
    print(f"{path}: {len(fits)} of {len(stored)} tensors loaded by name and shape")
    print("  dropped: " + (", ".join(shape(stored, k) for k in report["dropped"]) or "none"))
    print("  re-initialised: " + (", ".join(shape(state, k) for k in report["fresh"]) or "none"))
    if "height_range" in fits:
        kept = fits["height_range"].tolist()
        if low < kept[0] - 1e-9 or high > kept[1] + 1e-9:
            print(
                f"  warning: heights here span {low:.3f} to {high:.3f} m, the checkpoint's bins {kept[0]:.3f} to {kept[1]:.3f} m: "
                "waypoints beyond are clamped"
            )
    return report


def hold_volume(policy):
    """Drop the gradients of the volume head and of all that it reads: the optimiser then leaves
    them as they are, to the bit.
    """
    for p in policy.volume_parameters():
        p.grad = None


def volume_creep(rows, freeze_steps):
    """What became of the held-out volume loss after the freeze, in one sentence; None while there
    is nothing to compare.

    rows: of metrics.jsonl. -> (sentence, True if the loss has crept up by more than CREEP).
    """
    found = [(r["step"], r["val/volume_ce"]) for r in rows if "val/volume_ce" in r]
    before, after = (
        [v for s, v in found if s <= freeze_steps],
        [v for s, v in found if s > freeze_steps],
    )
    if not before or not after:
        return None
    grown = after[-1] - before[-1]
    verdict = (
        f"it creeps up by {grown:.3f} nats: lower --lr, or freeze for longer"
        if grown > CREEP
        else "it does not creep up"
    )
    return (
        f"volume loss on held-out demonstrations {before[-1]:.3f} at the end of the freeze, {after[-1]:.3f} now: {verdict}",
        grown > CREEP,
    )
