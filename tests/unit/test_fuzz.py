"""Every reader with damaged inputs: each ends in success or in one UserError, and success never
gives other numbers silently. Damages are seeded; FUZZ=3000 FUZZ_SEED=7 in the environment asks
for more and other ones.
"""

import io
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import with_basis, write_synthetic_demos, write_synthetic_episodes
from damage import damage

import deploy_dino_kv
import rot_utils
import train
from figures import report
from formats import smith300
from formats.dataset import open_dataset
from harness import checkpoint, records
from nets import feature_cache as features
from registry import look_up
from runtime import UserError, append_jsonl, write_json
from study import matrix_table

N, SEED = int(os.environ.get("FUZZ", 300)), int(os.environ.get("FUZZ_SEED", 0))
SIZE = 16


class FrozenFeatures(torch.nn.Module):
    """A backbone without a network, with as much as a policy asks for: its one map is the mean
    of four pixels.
    """

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
        write_synthetic_episodes(folder / "recordings", 1, 40, SIZE) / "episode_00000" / "frames",
        folder / "frames",
    )
    with np.load(folder / "recordings" / "episode_00000" / "episode.npz") as file:
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
    shutil.rmtree(folder / "recordings")


def write_cache(folder):
    read_cache(folder)


def read_demonstrations(path):
    demos = open_dataset(path, SIZE).demos
    images = [d.images([0, 20, len(d) - 1]) for d in demos]
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
        lambda f: write_synthetic_episodes(f / "recordings", 2, 40, SIZE),
        lambda f: read_demonstrations(f / "recordings"),
        (
            "recordings/episode_00000/episode.npz",
            "recordings/dataset.json",
            "recordings/episode_00001/frames/000020.png",
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


# -- the test


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Every kind of input undamaged, and what a reader makes of it."""
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
    """Any other exception would be a traceback for the user.

    Other numbers without an error would train a policy on what nobody recorded.
    """
    place = list(KINDS).index(kind)
    numbers = range(place, N, len(KINDS))
    wrong = [
        fault
        for number in numbers
        if (fault := attempt(kind, number, sound, tmp_path / str(number)))
    ]
    assert not wrong, f"{len(wrong)} of {len(numbers)}:\n" + "\n".join(wrong)
