"""Frozen features on disk: computed once, then read.

    FOLDER/BACKBONE/KEY.0.npy ...   an entry, one file for each map (N,C,H,W) float16; KEY is a hash
                                    of the images' bytes, BACKBONE the identity of what saw them
    FOLDER/index/STAMP              text "KEY N": images that were read under this stamp

Reading and hashing the images takes longer than all else at a training's start. An index entry
saves it: images whose stamp is known have a known key. A stamp is text that its maker promises to
change with the images (`formats.stamp`); where there is none, or no entry for it, or an entry that
is no such text, the images are read.
"""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from nets.backbone import GPU_BATCH, each_on_one_thread
from runtime import UserError, atomic_path


class Group(NamedTuple):
    """Images whose features are asked for together: of a demonstration.

    read: gives them, (N,S,S,3) uint8; stamp: gives their stamp, None where they have none.
    """

    name: object
    read: Callable
    stamp: Callable = lambda: None


def cached_features(backbone, images, folder="cache/features"):
    """Images (N,S,S,3) uint8 -> their features, computed once and then read from the cache: a list
    of read-only memmaps (N,C,H,W) float16.

    A CPU takes images one by one, as in use: batches round differently. A GPU takes GPU_BATCH at a
    time. An entry is written atomically, so a killed computation leaves none.
    """
    return _features_of_key(backbone, images_key(images), images, folder)


def images_key(images):
    """24 hex digits that name images (N,S,S,3) uint8 by their bytes."""
    return hashlib.blake2b(np.ascontiguousarray(images), digest_size=12).hexdigest()


def _features_of_key(backbone, key, images, folder):
    """As `cached_features`, of images whose key is known."""
    found = stored_entry(backbone, key, len(images), folder)
    # a missing or damaged map makes all of the entry computed anew
    if found is not None:
        return found
    batch = 1 if backbone.device.type == "cpu" else GPU_BATCH
    # each map goes to the CPU at once: a GPU holds one batch of features
    chunks = [
        [m.cpu().numpy() for m in backbone(torch.from_numpy(images[i : i + batch]))]
        for i in range(0, len(images), batch)
    ]
    paths = entry_paths(backbone, key, folder)
    for i, path in enumerate(paths):
        with atomic_path(path) as scratch, open(scratch, "wb") as file:
            np.save(file, np.concatenate([c[i] for c in chunks]))
    return [np.load(p, mmap_mode="r") for p in paths]


def entry_paths(backbone, key, folder):
    """The files of a cache entry, one for each map."""
    maps = range(len(backbone.channels))
    return [Path(folder) / backbone.identity / f"{key}.{i}.npy" for i in maps]


def stored_entry(backbone, key, n, folder):
    """The maps of n images as a list of read-only memmaps, None unless all are there and whole."""
    paths = entry_paths(backbone, key, folder)
    found = [stored_maps(path, n, c) for path, c in zip(paths, backbone.channels)]
    return None if any(maps is None for maps in found) else found


def stored_maps(path, n, channels):
    """One file of a cache entry as a read-only memmap (N,C,H,W) float16.

    None where the file is missing, cut short or of another shape.
    """
    try:
        maps = np.load(path, mmap_mode="r")
    except Exception:  # OSError, ValueError, EOFError: it depends on where the file ends
        return None
    return (
        maps
        if maps.ndim == 4 and maps.shape[:2] == (n, channels) and maps.dtype == np.float16
        else None
    )


# -- the index ------------------------------------------------------------------------------------


def index_path(stamp, folder):
    """The file of a stamp's index entry."""
    return Path(folder) / "index" / hashlib.blake2b(stamp.encode(), digest_size=12).hexdigest()


def indexed(stamp, folder):
    """(key, number of images) that the index has for a stamp; None for none, or a damaged one."""
    try:
        text = index_path(stamp, folder).read_bytes()
    except OSError:
        return None
    found = re.fullmatch(rb"([0-9a-f]{24}) ([0-9]{1,9})\n", text)
    return found and (found[1].decode(), int(found[2]))


def add_to_index(stamp, key, n, folder):
    """Write a stamp's index entry, atomically. A cache that may only be read is left as it is."""
    with contextlib.suppress(UserError), atomic_path(index_path(stamp, folder)) as scratch:
        scratch.write_text(f"{key} {n}\n")


def features_of_group(backbone, group, folder):
    """The maps of a Group, as of `cached_features`. Images are read only where they have to be."""
    stamp = group.stamp()
    known = indexed(stamp, folder) if stamp else None
    if known:
        found = stored_entry(backbone, *known, folder)
        if found is not None:
            return found
    images = group.read()
    key = images_key(images)
    maps = _features_of_key(backbone, key, images, folder)
    # images that were changed while they were read may have the old stamp and be half new
    if stamp and group.stamp() == stamp:
        add_to_index(stamp, key, len(images), folder)
    return maps


def feature_cache(backbone, groups, folder="cache/features", progress=True):
    """Features of many Groups of images, through the cache: {name: maps}.

    maps: as of `cached_features`.
    """
    groups = list(groups)
    on_cpu = backbone.device.type == "cpu"
    threads = os.cpu_count() if on_cpu else 2  # on a GPU one reads images while the other computes
    with (
        each_on_one_thread() if on_cpu else contextlib.nullcontext(),
        ThreadPoolExecutor(threads) as pool,
        tqdm(
            total=len(groups),
            desc=f"features of {backbone.name}",
            unit="demo",
            disable=not progress,
        ) as bar,
    ):
        found, images, start = {}, 0, time.perf_counter()
        maps = pool.map(lambda group: features_of_group(backbone, group, folder), groups)
        # each result is assigned to found[name], in the groups' order
        for group, found[group.name] in zip(groups, maps):
            images += len(found[group.name][0])
            bar.set_postfix_str(
                f"{images / (time.perf_counter() - start):.0f} images/s", refresh=False
            )
            bar.update()
        return found
