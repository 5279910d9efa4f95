"""Every reader with damaged inputs: each ends in success or in one UserError, and success never
gives other numbers in silence.

Seeded; FUZZ=3000 FUZZ_SEED=7 in the environment asks for more and other inputs.
"""

import copy
import io
import json
import os
import shutil
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import with_basis, write_synthetic_demos, write_synthetic_episodes
from safetensors import safe_open
from safetensors.torch import save_file

import deploy_dino_kv
import rot_utils
import train
from figures import report
from formats import smith300
from harness import checkpoint, records
from nets import backbone as features
from registry import look_up
from runtime import UserError, append_jsonl, write_json
from study import matrix_table

N, SEED = int(os.environ.get("FUZZ", 300)), int(os.environ.get("FUZZ_SEED", 0))
SIZE = 16


class FrozenFeatures(torch.nn.Module):
    """What a policy asks of a backbone, without a network: four pixels' mean as the one map."""

    channels, grids, identity, name, device = (
        [3],
        [4],
        "frozen-features",
        "frozen",
        torch.device("cpu"),
    )

    def forward(self, images):
        return [
            torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2).float(), SIZE // 4).half()
        ]


# -- inputs: how each is written, and what a reader makes of it as numbers that can be compared


def write_run(folder):
    write_json(
        folder / "config.json",
        {
            "args": {"model_type": "para", "max_steps": 9, "preset": "small"},
            "argv": ["--model_type", "para"],
            "seed": 0,
            "commit": "c",
            "config": {"backbone": "efficientnet_lite0"},
            "command": "python train.py",
            "parameters": 5,
            "train_demos": 2,
            "backbone_identity": "frozen",
            "dataset": {"language": "pick", "command": "python collect_demos.py"},
        },
    )
    for step in range(3):
        append_jsonl(
            folder / "metrics.jsonl",
            {
                "step": step,
                "train/loss": 1.5,
                "val/loss": 2.0,
                "val/cm_median": 1.0,
                "val/cm_p90": 2.0,
            },
        )
    (folder / "loss.png").write_bytes(b"")


def write_evaluation(folder):
    rows = [
        {
            "episode": i,
            "layout": "shifted",
            "seed": 0,
            "outcome": "released",
            "success": True,
            "released": True,
            "steps": 80,
            "first_success": 70,
            "decisions": 20,
            "jerk_mm": 1.5,
            **{f"coverage_{e}px": 0.5 for e in (4, 8, 16)},
            "seconds": {"features": 0.1, "policy": 0.1, "total": 1.0},
        }
        for i in range(3)
    ]
    rows.append({"episode": 3, "layout": "shifted", "crash": "died"})
    for row in rows:
        append_jsonl(folder / "episodes.jsonl", row)
    write_json(folder / "settings.json", {"layout": "shifted"})
    write_json(
        folder / "summary.json",
        {
            "model_type": "para",
            "setting": "shifted",
            "n": 3,
            "crashes": 1,
            "success_rate": 1.0,
            "interval": [0.4, 1.0],
            "released_rate": 1.0,
            "released_interval": [0.4, 1.0],
            "outcomes": {"released": 3},
            "mean_steps": 80.0,
            "jerk_mm": 1.5,
            **{f"coverage_{e}px": 0.5 for e in (4, 8, 16)},
            "seconds_per_episode": {"total": 1.0},
            "command": "python eval.py",
            "commit": "c",
            "trained": {
                "command": "python train.py",
                "step": 9,
                "minutes": 1.0,
                "backbone_identity": "frozen",
            },
        },
    )


def write_checkpoint(folder):
    config = look_up("dino_volume_kv").config(
        image_size=SIZE, grid=4, n_height_bins=2, n_rot_bins=2, width=8, dim=8, n_window=2
    )
    policy = (
        look_up("dino_volume_kv").policy(config, FrozenFeatures.channels).attach(FrozenFeatures())
    )
    checkpoint.save_policy(
        folder / "c.safetensors", policy, "dino_volume_kv", {"step": 1, "dataset": {"task_id": "0"}}
    )


def write_live(folder):
    shutil.copytree(
        write_synthetic_episodes(folder / "izzy", 1, 40, SIZE) / "episode_00000" / "frames",
        folder / "frames",
    )
    with np.load(folder / "izzy" / "episode_00000" / "episode.npz") as file:
        np.savez(folder / "state.npz", intrinsics=file["intrinsics"], extrinsics=file["extrinsics"])
        camera = {k: file[k].tolist() for k in smith300.CAMERA}
        rows = [
            {
                "image": str(folder / "frames" / f"{i:06d}.png"),
                "eef_pos": p.tolist(),
                "gripper_width": 0.08,
                **(camera if i else {}),
            }
            for i, p in enumerate(file["eef_pos_t"][:3])
        ]
    (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.rmtree(folder / "izzy")


def write_cache(folder):
    read_cache(folder)


def read_demonstrations(path):
    demos, attributes = smith300.read_dataset(path, SIZE)
    images = [smith300.read_images(path, d.name, [0, 20, len(d) - 1], SIZE) for d in demos]
    return [
        v
        for d in demos
        for v in (d.actions, d.ee_pos, d.ee_ori, d.gripper_states, d.perturbed, d.K, d.E)
    ] + images


def read_checkpoint(folder):
    policy, _, _ = checkpoint.load_policy(folder / "c.safetensors", backbone=FrozenFeatures())
    return list(policy.state_dict().values())


def read_basis(folder):
    basis = rot_utils.load_basis(folder / rot_utils.BASIS_FILE, ())
    return [basis.mean, basis.axis, basis.low, basis.high, basis.ev_ratio]


def read_stats(folder):
    stats = rot_utils.load_stats(folder / "c_stats.json")
    return [stats["height_range"], stats["rotation"]["n_bins"]]


def read_run(folder):
    train.parse_args(["--resume", str(folder)])
    page, _ = report.build(folder, [])
    records.read_metrics(folder)
    return [len(page) > 0]


def read_evaluation(folder):
    records.check_stamp(folder, {"layout": "shifted"})
    rows = records.read_episodes(folder, "shifted")
    summary = records.read_summary(folder)
    report.success_table([summary]), report.markdown([summary])
    episodes = {r["episode"]: r for r in rows if "crash" not in r}
    if episodes:
        cell = {
            "row": "para",
            "layout": "shifted",
            "otherwise": {},
            "runs": {
                "s0": {
                    "folder": folder,
                    "summary": records.read_tabled(folder),
                    "episodes": episodes,
                }
            },
        }
        matrix_table.numbers(cell, None)
    return [True]


def read_live(folder):
    lines = io.BytesIO((folder / "lines.jsonl").read_bytes())
    found = list(deploy_dino_kv.live(lines, folder / "state.npz", SIZE))
    assert all(np.isfinite(v).all() for o in found for v in (o.eef_pos, o.K, o.E, o.gripper_width))
    return [v for o in found for v in (o.image, o.K)]


def read_cache(folder):
    images = np.random.default_rng(0).integers(0, 255, (3, SIZE, SIZE, 3), dtype=np.uint8)
    return [np.array(m) for m in features.cached_features(FrozenFeatures(), images, folder)]


# kind: (how it is written, how it is read, the files that are damaged, whether a damage that was
# not noticed must change nothing)
KINDS = {
    "hdf5": (
        lambda f: write_synthetic_demos(f / "d.hdf5", 2, 40, SIZE),
        lambda f: read_demonstrations(f / "d.hdf5"),
        "d.hdf5",
        True,
    ),
    "smith300": (
        lambda f: write_synthetic_episodes(f / "izzy", 2, 40, SIZE),
        lambda f: read_demonstrations(f / "izzy"),
        (
            "izzy/episode_00000/episode.npz",
            "izzy/dataset.json",
            "izzy/episode_00001/frames/000020.png",
        ),
        False,
    ),
    "basis": (
        lambda f: with_basis(write_synthetic_demos(f / "d.hdf5", 2, 40, SIZE)),
        read_basis,
        rot_utils.BASIS_FILE,
        False,
    ),
    "stats": (write_checkpoint, read_stats, "c_stats.json", False),
    "checkpoint": (write_checkpoint, read_checkpoint, "c.safetensors", True),
    "run": (write_run, read_run, ("config.json", "metrics.jsonl", "loss.png"), False),
    "evaluation": (
        write_evaluation,
        read_evaluation,
        ("summary.json", "episodes.jsonl", "settings.json"),
        False,
    ),
    "live": (write_live, read_live, ("lines.jsonl", "state.npz", "frames/000001.png"), False),
    "cache": (write_cache, read_cache, None, True),
}


# -- damages


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


def damage_hdf5(path, rng):
    """Damage what an HDF5 file is made of: its arrays, groups, links and attributes -> (what was
    done, whether it may pass unseen)."""
    with h5py.File(path, "r+") as file:
        nodes = [None]
        file.visit(nodes.append)
        name = str(rng.choice(nodes[1:]))
        what = str(
            rng.choice(
                [
                    "drop",
                    "array",
                    "array",
                    "group",
                    "link",
                    "null",
                    "sparse",
                    "swap",
                    "attribute",
                    "rename",
                ]
            )
        )
        parent, key = file[name].parent, name.rpartition("/")[2]
        node = file[name]
        if what == "attribute":
            holder = file["data"] if rng.random() < 0.7 else node
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
            return (
                f"attribute {key} {value}",
                key == "image_orientation" and value == "drop" or key == "format",
            )
        if what == "swap":
            others = [
                n
                for n in nodes[1:]
                if n.rpartition("/")[0] == name.rpartition("/")[0] and n != name
            ]
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
            parent[key] = (
                h5py.ExternalLink("nowhere.hdf5", "/x")
                if rng.random() < 0.5
                else h5py.SoftLink("/nowhere")
            )
        elif what == "null":
            parent[key] = h5py.Empty("f8")
        elif what == "sparse":
            parent.create_dataset(
                key,
                (10**10, *(shape or (7,))[1:]),
                "f8",
                chunks=True if rng.random() < 0.5 else None,
            )
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
    new = [None, True, "text", -1, 1e400, float("nan"), [], {}, [1, 2], {"a": 1}, 2**70, "é", 0.5][
        int(rng.integers(13))
    ]
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
        metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file}
    key = str(rng.choice(list(tensors)))
    what = str(rng.choice(["header", "header", "text", "drop", "dtype", "shape", "NaN"]))
    old = rng.random() < 0.7
    if old:
        metadata.pop(checkpoint.DIGEST)
    if what == "header":
        info, what = damaged_value(json.loads(metadata[checkpoint.KEY]), rng)
        metadata[checkpoint.KEY] = json.dumps(info)
    elif what == "text":
        metadata[checkpoint.KEY] = metadata[checkpoint.KEY][: int(rng.integers(200))]
    elif what == "drop":
        del tensors[key]
    elif what == "dtype":
        tensors[key] = tensors[key].to(
            [torch.float16, torch.int64, torch.bool, torch.float64][int(rng.integers(4))]
        )
    elif what == "shape":
        tensors[key] = tensors[key].reshape(-1)[: max(1, tensors[key].numel() // 2)].contiguous()
    else:
        tensors[key] = (
            torch.full_like(tensors[key], float("nan"))
            if tensors[key].is_floating_point()
            else tensors[key]
        )
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


# -- the test


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Every kind of input as it should be, and what a reader makes of it."""
    torch.set_num_threads(1)
    folder, found = tmp_path_factory.mktemp("sound"), {}
    for kind, (write, read, _, _) in KINDS.items():
        (folder / kind).mkdir()
        write(folder / kind)
        found[kind] = read(folder / kind)
    return SimpleNamespace(folder=folder, found=found)


def same(found, expected):
    """True if two readings are equal to a float's precision."""
    if len(found) != len(expected):
        return False
    return all(
        np.shape(a) == np.shape(b)
        and np.allclose(np.asarray(a, float), np.asarray(b, float), rtol=1e-6, atol=1e-6)
        for a, b in zip(found, expected)
    )


def attempt(kind, number, sound, folder):
    """Damage one input and read it -> "" if all is well, else what went wrong."""
    rng = np.random.default_rng([SEED, number])
    _, read, files, strict = KINDS[kind]
    shutil.copytree(sound.folder / kind, folder)
    if kind == "live":
        lines = folder / "lines.jsonl"
        lines.write_text(lines.read_text().replace(str(sound.folder / kind), str(folder)))
    files = (
        [files]
        if isinstance(files, str)
        else files or [p.relative_to(folder) for p in sorted(folder.rglob("*.npy"))]
    )
    path = folder / files[int(rng.integers(len(files)))]
    what, unseen = damage(path, rng)
    case = f"{kind} {number}, {path.name}: {what}"
    try:
        found = read(folder)
    except UserError as error:
        return (
            ""
            if "\n" not in str(error) and str(error).strip()
            else f"{case}: not one sentence: {error}"
        )
    except Exception as error:
        return f"{case}: {type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder)
    if strict and not unseen and kind != "cache" and not same(found, sound.found[kind]):
        return f"{case}: other numbers in silence"
    if kind == "cache" and [np.shape(m) for m in found] != [np.shape(m) for m in sound.found[kind]]:
        return f"{case}: other shapes"
    return ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_input_ends_in_success_or_one_sentence(kind, sound, tmp_path, capsys):
    """Another exception is a traceback for the user; other numbers in silence train a policy on
    what nobody recorded."""
    place = list(KINDS).index(kind)
    numbers = range(place, N, len(KINDS))
    wrong = [
        fault
        for number in numbers
        if (fault := attempt(kind, number, sound, tmp_path / str(number)))
    ]
    assert not wrong, f"{len(wrong)} of {len(numbers)}:\n" + "\n".join(wrong)
