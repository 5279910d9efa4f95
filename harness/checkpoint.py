"""Checkpoints: one safetensors file whose header carries all that rebuilds the policy as JSON; a
readable copy stands beside it.

No pickle is ever loaded. Files are written under another name and renamed, so a kill leaves the old
one whole.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nets.backbone import Backbone
from nets.text import reader_of
from registry import look_up
from runtime import UserError, atomic_path, fits, one_line, write_json

KEY = "para_libero"  # header entry of what train.py says about a file, which marks it as ours
DIGEST = "digest"  # header entry of the hash of all that the file holds
AGAIN = "train again, or copy it again"
UPDATE = "update the repository"
# of a policy's header (see runtime.fits); what else there is says where it comes from
POLICY_FORM = {
    "model_type": str,
    "config": dict,
    "channels": [int],
    "backbone_identity": str,
    "step?": (int, None),
    "minutes?": (float, None),
    "seed?": (int, None),
    "commit?": (str, None),
    "command?": (str, None),
    "train_demos?": (int, None),
    "dataset?": dict,
}
DATASET_FORM = {
    "task_suite?": str,
    "task_id?": str,
    "language?": str,
    "grasp?": str,
    "variant?": str,
    "setting?": str,
    "split?": str,
    "clean_scene?": str,
}


# -- files of tensors -----------------------------------------------------------------------------


def digest(tensors, header):
    """Hash (hex) of tensors and header.

    Without it a flipped bit in a weight would drive a robot somewhere else, and nobody would know.
    """
    found = hashlib.blake2b(header.encode(), digest_size=16)
    # names, types and shapes too: the same bytes in another tensor are another policy
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # the tensor's bytes, whatever its type
        found.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def save_tensors(path, tensors, info):
    """Write tensors and a JSON-able `info` into one safetensors file, atomically."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    header = json.dumps(info, default=str)
    with atomic_path(path) as scratch:
        save_file(tensors, scratch, metadata={KEY: header, DIGEST: digest(tensors, header)})


def load_tensors(path):
    """Read a file of `save_tensors` -> (tensors, info).

    Raises UserError for an absent, damaged or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        inside = path / "checkpoint.safetensors"  # of a run folder
        remedy = f"is a folder; give {inside}" if inside.is_file() else "no such checkpoint"
        raise UserError(f"{path}: {remedy}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    # SafetensorError, OSError, and what torch raises for a dtype that it does not have
    except Exception as error:
        fault = f"not a safetensors file, or truncated ({one_line(error)})"
        raise UserError(f"{path}: {fault}; {AGAIN}") from error
    # readable, so: is it ours, is it what was saved, does its header say something
    if KEY not in metadata:
        raise UserError(
            f"{path}: a foreign checkpoint, its header has no '{KEY}' entry; "
            "only train.py's files can be loaded"
        )
    # older files have no digest
    if DIGEST in metadata and metadata[DIGEST] != digest(tensors, metadata[KEY]):
        raise UserError(
            f"{path}: its contents are not those that were saved, bits have changed since; {AGAIN}"
        )
    entry = f"{path}: header entry '{KEY}'"
    try:
        info = json.loads(metadata[KEY])
    except (ValueError, RecursionError) as error:
        fault = f"is not valid JSON ({one_line(error)})"
        raise UserError(f"{entry} {fault}; the file is damaged, {AGAIN}") from error
    if fault := fits(info, {}):
        raise UserError(f"{entry} {fault}; the file is damaged, {AGAIN}")
    return tensors, info


# -- policies -------------------------------------------------------------------------------------


def save_policy(path, policy, model_type, info, extra=None):
    """Write a policy's checkpoint, a readable copy of its header, and its deployment statistics.

    info: JSON-able provenance; extra: further tensors, saved as extra.NAME.
    """
    info = {
        "model_type": model_type,
        "config": dataclasses.asdict(policy.config),
        "channels": policy.backbone.channels,
        "backbone_identity": policy.backbone.identity,
        **({"text_identity": policy.reader.identity} if policy.reader else {}),
        **info,
    }
    # prefixes tell the policy's tensors from further ones in the same file
    tensors = {f"model.{name}": tensor for name, tensor in policy.state_dict().items()}
    tensors.update({f"extra.{name}": tensor for name, tensor in (extra or {}).items()})
    save_tensors(path, tensors, info)
    # the header again as plain JSON; no policy is rebuilt from this copy
    write_json(Path(path).with_suffix(".json"), info)
    stats = policy.deployment_stats()
    if stats:
        who = {"model_type": model_type, "backbone_identity": policy.backbone.identity}
        write_json(stats_path(path), {**who, **stats})


def stats_path(path):
    """<ckpt>_stats.json beside a checkpoint: bins, ranges and rotation basis.

    `rot_utils.load_stats` reads it without torch.
    """
    return Path(path).with_name(f"{Path(path).stem}_stats.json")


def fill_config(config_class, stored, path):
    """A config from the fields that a checkpoint stores.

    Fields that the checkpoint is too old to have get their defaults, and are printed, but for
    those that are `older` in the class. Raises UserError for fields that this version does not
    have.
    """
    known = {field.name for field in dataclasses.fields(config_class)}
    stored = {**config_class.older, **stored}
    missing, foreign = known - stored.keys(), stored.keys() - known
    if missing:
        print(f"{path}: older checkpoint, default values for {', '.join(sorted(missing))}")
    if foreign:
        names = ", ".join(sorted(foreign))
        raise UserError(f"{path}: config fields {names} are unknown to this version; {UPDATE}")
    return config_class(**stored)


def load_policy(path, device="cpu", weights=None, backbone=None, text_weights=None):
    """Rebuild a checkpoint's policy, ready to act -> (policy, info, extra tensors).

    weights: local backbone weights; backbone: one already made, attached instead of a new one;
    text_weights: of the frozen text model, of --text clip, sentence. Raises UserError if the file
    is damaged or foreign, if tensors are missing or of another shape, or if the weights of the
    backbone or of the text model are not those it was trained on.
    """
    tensors, info = load_tensors(path)
    check_header(path, info)
    policy = empty_policy(path, info)
    model = with_prefix(tensors, "model.")
    check_weights(path, model, policy.state_dict(), info["model_type"])
    policy.load_state_dict(model)
    if backbone is None:
        config, fast = policy.config, info.get("dataset", {}).get("render") == "fast"
        backbone = Backbone(config.backbone, config.image_size, weights, fused=fast)
    # features of other weights have the same shapes, and the policy would answer nonsense
    if backbone.identity != info["backbone_identity"]:
        raise UserError(
            f"{path}: was trained on the features {info['backbone_identity']}, here they are "
            f"{backbone.identity}; give the same weights with --backbone_weights PATH"
        )
    reader = reader_of(policy.config, text_weights)
    if reader and reader.identity != info.get("text_identity"):
        raise UserError(
            f"{path}: was trained on the sentences' features {info.get('text_identity')}, here "
            f"they are {reader.identity}; give the same weights with --text_weights"
        )
    policy = policy.attach(backbone.to(device), reader).to(device).eval()
    return policy, info, with_prefix(tensors, "extra.")


def with_prefix(tensors, prefix):
    """The tensors whose names start with a prefix, by the rest of their names."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def check_header(path, info):
    """Raise UserError unless a header says how to build a policy."""
    if "model_type" not in info:
        raise UserError(
            f"{path}: holds a training state, not a policy; give the run's checkpoint.safetensors"
        )
    # older files have no digest, so each entry is looked at before it is used
    dataset = info.get("dataset", {})
    fault = fits(info, POLICY_FORM) or fits(dataset, DATASET_FORM)
    if not fault and not dataset.get("task_id", "0").isdecimal():
        fault = "task_id is no number"
    if not fault and min(info["channels"], default=0) < 1:
        fault = "channels are no counts"
    if fault:
        raise UserError(f"{path}: its header is damaged: {fault}; {AGAIN}")


def empty_policy(path, info):
    """The policy of a header, with new weights. Raises UserError where none can be built."""
    try:
        entry = look_up(info["model_type"])
        return entry.policy(fill_config(entry.config, info["config"], path), info["channels"])
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}; {AGAIN}") from error
    except Exception as error:  # each number may be right, and all together fit no network
        fault = f"no policy can be built by its header ({one_line(error)})"
        raise UserError(f"{path}: {fault}; {AGAIN}") from error


def check_weights(path, model, expected, model_type):
    """Raise UserError unless a checkpoint's tensors are those of its policy.

    Names, shapes and types have to match, and all values have to be finite.
    """
    surplus = model.keys() - expected.keys()
    if surplus:
        names = ", ".join(sorted(surplus))
        raise UserError(f"{path}: tensors {names} are unknown to {model_type}; {UPDATE}")
    for name, tensor in expected.items():
        said = f"{path}: tensor '{name}'"
        if name not in model:
            raise UserError(f"{said} is missing; the file is damaged or of another version")
        found = model[name]
        if found.shape != tensor.shape:
            shapes = f"has shape {tuple(found.shape)}, {tuple(tensor.shape)} is expected"
            raise UserError(f"{said} {shapes}; {AGAIN}")
        if found.dtype != tensor.dtype:
            raise UserError(f"{said} has dtype {found.dtype}, {tensor.dtype} is expected; {AGAIN}")
        if not torch.isfinite(found.float()).all():
            raise UserError(f"{said} has NaN or Inf; train again")
