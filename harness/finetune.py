"""Finetuning: start from another checkpoint's tensors, hold its volume head still for a while,
watch its loss afterwards.
"""

from dataclasses import replace

from canonical import FIT
from harness.checkpoint import load_tensors, with_prefix
from runtime import UserError, read_json

# buffers that describe the new data's rotations, whatever the checkpoint says
OF_THE_DATA = ("rotation_basis", "euler_range")
WORDS = "text.table"  # embeddings, a row for each word of the vocabulary
# the volume means something else where these differ, though every shape fits
# (not so with another margin: cells are added around those of the image, which keep theirs)
SAME = ("image_size", "grid", "n_height_bins", "heights")
FREEZE_STEPS = 500  # where none are asked for
CREEP = 0.05  # nats by which the held-out volume loss may grow after the freeze


def init_from(policy, path):
    """Load a checkpoint's tensors into a policy by name and shape, and print which.

    Returns {"loaded", "dropped", "fresh"}: lists of names. The height range and the normalisation
    of features are the checkpoint's, as its volume head needs them. What describes rotations stays
    that of the new data, and embeddings of other words are learned anew. Raises UserError for other
    features, another grid, or a checkpoint of which nothing fits.
    """
    tensors, info = load_tensors(path)
    check_related(path, info, policy.config, policy.backbone.identity)
    stored = with_prefix(tensors, "model.")
    state = policy.state_dict()
    words = info["config"].get("vocabulary", ""), getattr(policy.config, "vocabulary", "")
    # every tensor that has a namesake of the same shape, but for those that describe the new data,
    # and embeddings of other words, which lie in alphabetical order
    fitting = {
        name: tensor
        for name, tensor in stored.items()
        if name in state
        and state[name].shape == tensor.shape
        and name not in OF_THE_DATA
        and (not name.endswith(WORDS) or words[0] == words[1])
    }
    if not any(name in fitting for name, _ in policy.named_parameters()):
        raise UserError(
            f"--init_from {path}: no tensor of {info.get('model_type')} fits by name and shape; "
            "give a related checkpoint"
        )
    fitting = policy.adopt(fitting)
    # before loading: this data's range of heights, which the checkpoint's bins may not cover
    heights = state["height_range"].tolist() if "height_range" in fitting else None
    report = {
        "loaded": sorted(fitting),
        "dropped": sorted(set(stored) - set(fitting)),
        "fresh": sorted(set(state) - set(fitting)),
    }
    # not strict: what does not fit keeps its new weights
    policy.load_state_dict(fitting, strict=False)
    print(f"{path}: {len(fitting)} of {len(stored)} tensors loaded by name and shape")
    print(f"  dropped: {listed(report['dropped'], stored)}")
    print(f"  re-initialised: {listed(report['fresh'], state)}")
    if heights:
        warn_of_heights(heights, fitting["height_range"].tolist())
    return report


def checked(path, config, identity):
    """What `init_from` would refuse of a checkpoint, before features are computed -> the config.

    config: the policy's; where it asks for the view that fits the data, the checkpoint's takes its
    place: its cached features stay good. Another view is warned of.
    identity: of the backbone. Raises UserError for other features or another grid.
    """
    _, info = load_tensors(path)
    check_related(path, info, config, identity)
    view, asked = info["config"].get("canonical_view", ""), config.canonical_view
    if asked == FIT and view:
        print(f"{path}: images are seen in its view, '{view}'")
        return replace(config, canonical_view=view)
    warn_of_view(view, asked)
    return config


def check_related(path, info, config, identity):
    """Raise UserError unless a checkpoint's tensors mean the same to a config and its backbone."""
    if "config" not in info or "backbone_identity" not in info:
        raise UserError(f"--init_from {path}: holds no policy; give a run's checkpoint.safetensors")
    theirs = info["backbone_identity"]
    if theirs != identity:
        raise UserError(
            f"--init_from {path}: was trained on the features {theirs}, here they are {identity}; "
            "give the same --backbone, --image_size and --backbone_weights"
        )
    for name in SAME:
        # a field that a checkpoint is too old to have is at its default
        usual = getattr(type(config), name, None)
        old, new = info["config"].get(name, usual), getattr(config, name, None)
        if old is not None and new is not None and old != new:
            raise UserError(
                f"--init_from {path}: has --{name} {old}, here it is {new}: "
                f"its volume would mean something else; give --{name} {old}"
            )
    check_dilations(path, info, config)


def check_dilations(path, info, config):
    """Raise UserError where convolutions of one dilation would be loaded as those of another."""
    old, new = info["config"].get("dilations"), getattr(config, "dilations", None)
    in_turn = zip(*(map(int, text.split(",")) for text in (old, new))) if old and new else ()
    if any(a != b for a, b in in_turn):
        raise UserError(
            f"--init_from {path}: has --dilations {old}, here they are {new}: its convolutions "
            f"would compute something else; give --dilations {old}, or more behind these"
        )


def listed(names, tensors):
    """Names with the shapes of their tensors."""
    return ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in names) or "none"


def warn_of_heights(ours, kept):
    """Warn where this data's heights leave the range of the checkpoint's bins.

    ours, kept: [low, high] in m, of this data and of the checkpoint.
    """
    if ours[0] < kept[0] - 1e-9 or ours[1] > kept[1] + 1e-9:
        print(
            f"  warning: heights here span {ours[0]:.3f} to {ours[1]:.3f} m, the checkpoint's bins "
            f"{kept[0]:.3f} to {kept[1]:.3f} m: waypoints beyond are clamped"
        )


def warn_of_view(theirs, ours):
    """Warn where images are seen in another view than the checkpoint's."""
    if theirs != ours:
        keep = f"--canonical_view '{theirs}'" if theirs else "no --canonical_view"
        print(
            f"  warning: images are seen in the view '{ours}' here, by the checkpoint in "
            f"'{theirs}'; {keep} keeps the checkpoint's"
        )


def freeze_steps(asked, policy_class):
    """Steps in which a finetune holds the volume head still; None asks for the usual number.

    Raises UserError where the policy's volume head cannot be held.
    """
    if asked and not policy_class.holds_volume:
        raise UserError(
            f"--freeze_steps {asked}: {policy_class.__name__} has no volume head that could be "
            "held while the rest learns; leave it out"
        )
    return FREEZE_STEPS * policy_class.holds_volume if asked is None else asked


def begin(policy, path, run, resumed):
    """A finetune's first weights, by `init_from`, and what of the volume is new among them, which
    `hold_volume` lets learn -> {"initialised": [names]}, for the run's config.json.

    run: the run folder; resumed: whether it holds a training state, which then has the weights.
    """
    if resumed:
        # runs from before it was kept held new weights too
        stored = read_json(run / "config.json", "run of train.py", form={"initialised?": [str]})
        fresh = stored.get("initialised", [])
    else:
        fresh = init_from(policy, path)["fresh"]
    policy.fresh = frozenset(fresh)
    return {"initialised": fresh}


def hold_volume(policy):
    """Drop the gradients of the volume head and of all that it reads, but for what `begin` found to
    be new: the loaded part would be read through random weights.

    The optimiser skips parameters without a gradient, so they stay as they are, to the bit.
    """
    held = {id(parameter) for parameter in policy.volume_parameters()}
    for name, parameter in policy.named_parameters():
        if id(parameter) in held and name not in policy.fresh:
            parameter.grad = None


def volume_creep(rows, freeze_steps):
    """How the held-out volume loss has changed since the freeze ended.

    rows: of metrics.jsonl. -> (sentence, True if the loss has grown by more than CREEP), or None
    while there is nothing to compare.
    """
    found = [(row["step"], row["val/volume_ce"]) for row in rows if "val/volume_ce" in row]
    # the last validation in the freeze against the last one after it
    before = [loss for step, loss in found if step <= freeze_steps]
    after = [loss for step, loss in found if step > freeze_steps]
    if not before or not after:
        return None
    grown = after[-1] - before[-1]
    verdict = "it does not creep up"
    if grown > CREEP:
        verdict = f"it creeps up by {grown:.3f} nats: lower --lr, or freeze for longer"
    sentence = (
        f"volume loss on held-out demonstrations {before[-1]:.3f} at the end of the freeze, "
        f"{after[-1]:.3f} now: {verdict}"
    )
    return sentence, grown > CREEP
