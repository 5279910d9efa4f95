"""Damages for the fuzz test: a file is truncated, flipped, retyped, reshaped, emptied or swapped.

Each function draws one damage from a generator, applies it and says what it did. A seed therefore
names a damage.
"""

import copy
import json

import h5py
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from harness import checkpoint

# an array's retyping twice: most of what goes wrong is that
HDF5_DAMAGES = ["drop", "array", "array", "group", "link"]
HDF5_DAMAGES += ["null", "sparse", "swap", "attribute", "rename"]
OTHER_VALUES = [None, True, "text", -1, 1e400, float("nan")]
OTHER_VALUES += [[], {}, [1, 2], {"a": 1}, 2**70, "é", 0.5]
DTYPES = (torch.float16, torch.int64, torch.bool, torch.float64)


def damage_bytes(path, rng):
    """Truncate, flip, drop, empty, swap or append bytes -> what was done."""
    content = bytearray(path.read_bytes())
    what = rng.choice(["truncate", "flip", "drop", "empty", "swap", "append"])
    a, b = sorted(int(x) for x in rng.integers(0, len(content) + 1, 2))
    if what == "truncate":
        del content[a:]
    elif what == "flip":
        for i in rng.integers(0, len(content), int(rng.integers(1, 9))) if content else ():
            content[i] ^= int(rng.integers(1, 256))
    elif what == "drop":
        del content[a:b]
    elif what == "empty":
        content = bytearray()
    elif what == "swap":
        n = min(b - a, len(content) - b)
        content[a : a + n], content[b : b + n] = content[b : b + n], content[a : a + n]
    else:
        content += rng.bytes(7)
    path.write_bytes(content)
    return f"{what} bytes"


def damaged_array(value, rng):
    """An array that is retyped, reshaped, emptied, cut or full of NaN -> (array or text, what was
    done)."""
    value = np.asarray(value)
    choices = {
        "text": lambda: np.full(value.shape, b"x"),
        "strings": lambda: "text",
        "whole numbers": lambda: value.astype(np.int64),
        "halves": lambda: value.astype(np.float16),
        "complex": lambda: value.astype(complex),
        "flat": lambda: value.reshape(-1),
        "an axis more": lambda: value[None],
        "transposed": lambda: value.T,
        "scalar": lambda: value.reshape(-1)[0],
        "no rows": lambda: value[:0],
        "a row less": lambda: value[:-1],
        "big-endian": lambda: value.astype(">f8"),
        "NaN": lambda: np.where(
            np.arange(value.size).reshape(value.shape) == value.size // 2, np.nan, value
        ),
        "Inf": lambda: value.astype(float) * np.inf,
        "object": lambda: np.array([None], dtype=object),
    }
    what = str(rng.choice(list(choices)))
    try:
        return choices[what](), what
    except (ValueError, TypeError, IndexError):
        return np.zeros(0), "empty"


def damage_attribute(holder, rng):
    """Drop or retype one attribute -> (what was done, whether it may pass unseen)."""
    attributes = list(holder.attrs) or ["image_orientation"]
    key = str(rng.choice([*attributes, "image_orientation"]))
    old = holder.attrs.get(key, "x")
    value = rng.choice(["drop", "bytes", "number", "list", "empty", "other"])
    if value == "drop" and key in holder.attrs:
        del holder.attrs[key]
    else:
        holder.attrs[key] = {
            "bytes": np.bytes_(str(old)),
            "number": 3.5,
            "list": [1, 2, 3],
            "empty": h5py.Empty("f"),
            "other": "sideways",
            "drop": "flipped",
        }[value]
    unseen = key == "image_orientation" and value == "drop" or key == "format"
    return f"attribute {key} {value}", unseen


def damage_hdf5(path, rng):
    """Damage what an HDF5 file is made of: its arrays, groups, links and attributes -> (what was
    done, whether it may pass unseen)."""
    with h5py.File(path, "r+") as file:
        nodes = [None]
        file.visit(nodes.append)
        name = str(rng.choice(nodes[1:]))
        what = str(rng.choice(HDF5_DAMAGES))
        parent, key = file[name].parent, name.rpartition("/")[2]
        node = file[name]
        if what == "attribute":
            return damage_attribute(file["data"] if rng.random() < 0.7 else node, rng)
        if what == "swap":
            group = name.rpartition("/")[0]
            others = [n for n in nodes[1:] if n.rpartition("/")[0] == group and n != name]
            if others:
                other = str(rng.choice(others)).rpartition("/")[2]
                parent.move(key, "x"), parent.move(other, key), parent.move("x", other)
            return f"swap {name}", True
        if what == "rename":
            parent.move(key, key + "_")
            return f"rename {name}", False
        value = node[()] if isinstance(node, h5py.Dataset) and node.shape is not None else None
        shape = getattr(node, "shape", None)
        del parent[key]
        if what == "array" and value is not None:
            changed, how = damaged_array(value, rng)
            if getattr(changed, "dtype", None) == np.dtype(object):
                parent.create_dataset(key, data=["a", "b"], dtype=h5py.string_dtype())
            else:
                parent[key] = changed
            return f"{name} {how}", False
        if what == "group" or what == "array":
            parent.create_dataset(key, data=1.0) if value is None else parent.create_group(key)
        elif what == "link":
            outside = rng.random() < 0.5
            parent[key] = (
                h5py.ExternalLink("nowhere.hdf5", "/x") if outside else h5py.SoftLink("/nowhere")
            )
        elif what == "null":
            parent[key] = h5py.Empty("f8")
        elif what == "sparse":
            # a few bytes on the disk that claim 80 GB
            huge = (10**10, *(shape or (7,))[1:])
            parent.create_dataset(key, huge, "f8", chunks=True if rng.random() < 0.5 else None)
        return f"{what} {name}", False


def damage_npz(path, rng):
    with np.load(path) as file:
        arrays = dict(file)
    key = str(rng.choice(list(arrays)))
    what = str(rng.choice(["drop", "swap", "array", "array", "npy"]))
    if what == "drop":
        del arrays[key]
    elif what == "swap":
        other = str(rng.choice(list(arrays)))
        arrays[key], arrays[other] = arrays[other], arrays[key]
    elif what == "array":
        arrays[key], how = damaged_array(arrays[key], rng)
        what = f"{key} {how}"
    with open(path, "wb") as file:
        np.save(file, np.zeros(3)) if what == "npy" else np.savez(file, **arrays)
    return what


def damaged_value(value, rng):
    """A JSON value with one thing of it dropped, retyped, emptied, made NaN or exchanged -> (value,
    what was done)."""
    value = copy.deepcopy(value)
    here, path = value, []
    while isinstance(here, (dict, list)) and here:
        key = (
            list(here)[int(rng.integers(len(here)))]
            if isinstance(here, dict)
            else int(rng.integers(len(here)))
        )
        path.append(key)
        if rng.random() < 0.4 or not isinstance(here[key], (dict, list)) or not here[key]:
            break
        here = here[key]
    new = OTHER_VALUES[int(rng.integers(len(OTHER_VALUES)))]
    if not path:
        return new, "all"
    if rng.random() < 0.25:
        del here[path[-1]]
        return value, f"drop {path}"
    if rng.random() < 0.05:
        return new, f"all {new!r}"
    here[path[-1]] = new
    return value, f"{path} {new!r}"


def damage_json(path, rng):
    text = path.read_text()
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines()]
        i = int(rng.integers(len(rows)))
        rows[i], what = damaged_value(rows[i], rng)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return what
    value, what = damaged_value(json.loads(text), rng)
    path.write_text(("\ufeff" if rng.random() < 0.2 else "") + json.dumps(value))
    return what


def damage_safetensors(path, rng):
    """Damage a checkpoint's header or tensors; half of the time with no digest, as an older file ->
    (what, whether it may pass)."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        # safe_open is no dict: it has keys() alone
        tensors = {key: file.get_tensor(key) for key in list(file.keys())}
    key = str(rng.choice(list(tensors)))
    what = str(rng.choice(["header", "header", "text", "drop", "dtype", "shape", "NaN"]))
    if rng.random() < 0.7:
        metadata.pop(checkpoint.DIGEST)
    if what == "header":
        info, what = damaged_value(json.loads(metadata[checkpoint.KEY]), rng)
        metadata[checkpoint.KEY] = json.dumps(info)
    elif what == "text":
        metadata[checkpoint.KEY] = metadata[checkpoint.KEY][: int(rng.integers(200))]
    elif what == "drop":
        del tensors[key]
    elif what == "dtype":
        tensors[key] = tensors[key].to(DTYPES[int(rng.integers(len(DTYPES)))])
    elif what == "shape":
        tensors[key] = tensors[key].reshape(-1)[: max(1, tensors[key].numel() // 2)].contiguous()
    else:
        if tensors[key].is_floating_point():
            tensors[key] = torch.full_like(tensors[key], float("nan"))
    save_file(tensors, path, metadata=metadata)
    return what


def damage(path, rng):
    """Damage one file -> (what was done, whether a reader may take it without noticing)."""
    if rng.random() < 0.4:
        return damage_bytes(path, rng), path.suffix in (".json", ".jsonl")
    if path.suffix == ".hdf5":
        return damage_hdf5(path, rng)
    if path.suffix == ".npz":
        return damage_npz(path, rng), False
    if path.suffix in (".json", ".jsonl"):
        return damage_json(path, rng), True
    if path.suffix == ".safetensors":
        return damage_safetensors(path, rng), False
    return damage_bytes(path, rng), False
