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
from registry import look_up
from runtime import UserError, atomic_path, fits, one_line, write_json

# header entries: one marks our files, one says what they hold
KEY, DIGEST = "para_libero", "digest"
AGAIN = "train again, or copy it again"
POLICY_FORM = {  # of a policy's header; what else there is says where it comes from
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
    f"{key}?": str
    for key in (
        "task_suite",
        "task_id",
        "language",
        "grasp",
        "variant",
        "setting",
        "split",
        "clean_scene",
    )
}


def digest(tensors, header):
    """Hash (hex) of tensors and header: a flipped bit in a weight would drive a robot elsewhere
    without a word.
    """
    found = hashlib.blake2b(header.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def save_tensors(path, tensors, info):
    """Write tensors and a JSON-able `info` into one safetensors file, atomically."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    header = json.dumps(info, default=str)
    with atomic_path(path) as scratch:
        save_file(tensors, scratch, metadata={KEY: header, DIGEST: digest(tensors, header)})


def load_tensors(path):
    """Read a file of `save_tensors` -> (tensors, info). Raises UserError for an absent, damaged or
    foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}
    except (
        Exception
    ) as error:  # SafetensorError, OSError, and what torch raises for a dtype that it does not have
        raise UserError(
            f"{path}: not a safetensors file, or truncated ({one_line(error)}); {AGAIN}"
        )
    if KEY not in metadata:
        raise UserError(
            f"{path}: a foreign checkpoint, its header has no '{KEY}' entry; only train.py's files can be loaded"
        )
    # older files have none
    if DIGEST in metadata and metadata[DIGEST] != digest(tensors, metadata[KEY]):
        raise UserError(
            f"{path}: its contents are not those that were saved, bits have changed since; {AGAIN}"
        )
    try:
        info = json.loads(metadata[KEY])
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: header entry '{KEY}' is not valid JSON ({one_line(error)}); the file is damaged, {AGAIN}"
        )
    if fault := fits(info, {}):
        raise UserError(f"{path}: header entry '{KEY}' {fault}; the file is damaged, {AGAIN}")
    return tensors, info


def save_policy(path, policy, model_type, info, extra=None):
    """Write a policy's checkpoint. info: JSON-able provenance; extra: further tensors (saved as
    extra.NAME).
    """
    info = {
        "model_type": model_type,
        "config": dataclasses.asdict(policy.config),
        "channels": policy.backbone.channels,
        "backbone_identity": policy.backbone.identity,
        **info,
    }
    tensors = {f"model.{k}": v for k, v in policy.state_dict().items()}
    save_tensors(path, {**tensors, **{f"extra.{k}": v for k, v in (extra or {}).items()}}, info)
    write_json(Path(path).with_suffix(".json"), info)
    stats = policy.deployment_stats()
    if stats:
        write_json(
            stats_path(path),
            {"model_type": model_type, "backbone_identity": policy.backbone.identity, **stats},
        )


def stats_path(path):
    """<ckpt>_stats.json beside a checkpoint: bins, ranges and rotation basis, for readers without
    torch (rot_utils.load_stats).
    """
    return Path(path).with_name(f"{Path(path).stem}_stats.json")


def fill_config(config_class, stored, path):
    """A config from a checkpoint's fields. Fields that it does not know yet get their defaults, and
    are printed.
    """
    known = {f.name for f in dataclasses.fields(config_class)}
    missing, foreign = known - stored.keys(), stored.keys() - known
    if missing:
        print(f"{path}: older checkpoint, default values for {', '.join(sorted(missing))}")
    if foreign:
        raise UserError(
            f"{path}: config fields {', '.join(sorted(foreign))} are unknown to this version; update the repository"
        )
    return config_class(**stored)


def load_policy(path, device="cpu", weights=None, backbone=None):
    """Rebuild the policy of a checkpoint, backbone attached, ready to act -> (policy, info, extra
    tensors).

    weights: local backbone weights; backbone: one already made. Raises UserError if the file is
    damaged or foreign, if tensors are missing or of another shape, or if the backbone's weights are
    not those it was trained on.
    """
    tensors, info = load_tensors(path)
    if "model_type" not in info:
        raise UserError(
            f"{path}: holds a training state, not a policy; give the run's checkpoint.safetensors"
        )
    dataset = info.get("dataset", {})
    fault = fits(info, POLICY_FORM) or fits(dataset, DATASET_FORM)
    if (
        fault
        or not dataset.get("task_id", "0").isdecimal()
        or not info["channels"]
        or min(info["channels"]) < 1
    ):
        raise UserError(
            f"{path}: its header is damaged: {fault or 'channels or task_id are no counts'}; {AGAIN}"
        )
    try:
        entry = look_up(info["model_type"])
        policy = entry.policy(fill_config(entry.config, info["config"], path), info["channels"])
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}; {AGAIN}")
    except Exception as error:  # numbers that each may be, and that fit no network together
        raise UserError(
            f"{path}: no policy can be built by its header ({one_line(error)}); {AGAIN}"
        )
    model = {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
    expected = policy.state_dict()
    surplus = model.keys() - expected.keys()
    if surplus:
        raise UserError(
            f"{path}: tensors {', '.join(sorted(surplus))} are unknown to {info['model_type']}; update the repository"
        )
    for name, tensor in expected.items():
        if name not in model:
            raise UserError(
                f"{path}: tensor '{name}' is missing; the file is damaged or of another version"
            )
        if model[name].shape != tensor.shape:
            raise UserError(
                f"{path}: tensor '{name}' has shape {tuple(model[name].shape)}, {tuple(tensor.shape)} is expected; {AGAIN}"
            )
        if model[name].dtype != tensor.dtype:
            raise UserError(
                f"{path}: tensor '{name}' has dtype {model[name].dtype}, {tensor.dtype} is expected; {AGAIN}"
            )
        if not torch.isfinite(model[name].float()).all():
            raise UserError(f"{path}: tensor '{name}' has NaN or Inf; train again")
    policy.load_state_dict(model)
    backbone = backbone or Backbone(policy.config.backbone, policy.config.image_size, weights)
    if backbone.identity != info["backbone_identity"]:
        raise UserError(
            f"{path}: was trained on the features {info['backbone_identity']}, here they are {backbone.identity}; "
            "give the same weights with --backbone_weights PATH"
        )
    extra = {k[6:]: v for k, v in tensors.items() if k.startswith("extra.")}
    return policy.attach(backbone.to(device)).to(device).eval(), info, extra
