"""Are a demonstration's images still those that were read before? Told without reading them.

A stamp names the dataset's fingerprint, the demonstration, the frames, and of every file that the
images are made from its path, size, inode and times of change. What is trusted: that the system
gives a file that was written to another time. A time set back by hand (`touch -d`, `cp -p`) is
noticed by the inode's own time, which no program can set. Not noticed: bytes changed below the file
system, as by a failing disk, and files that a server with a wrong clock changed twice within the
difference.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import time
from pathlib import Path

import canonical

# Seconds for which a file is not trusted after it was written: file systems count time in ticks,
# of up to two seconds, and a second change within one would leave no trace.
SETTLED = 2.0
DECODERS = ("h5py", "pillow", "av", "imageio", "imageio-ffmpeg")


def images_stamp(demo, frames):
    """Text that differs wherever a Demo's images of `frames` may differ; None where that cannot be
    told: images in files that are not known, gone, or just written.
    """
    files = demo.source.files(demo)
    if files is None:
        return None
    seen, newest = [], 0
    for path in files:
        try:
            found = os.stat(path)
        except OSError:
            return None
        times = (found.st_mtime_ns, found.st_ctime_ns)
        seen.append((os.path.abspath(path), found.st_size, found.st_ino, *times))
        newest = max(newest, *times)
    if time.time_ns() - newest < SETTLED * 1e9:
        return None
    rows = [int(i) for i in frames]
    return json.dumps([reader(), *demo.key, demo.image_size, rows, seen])


@functools.cache
def reader():
    """Hash of what makes images of files: this package, canonical.py and the libraries that decode.
    A change of any may change the images. Found once.
    """
    digest = hashlib.blake2b(digest_size=12)
    for path in (*sorted(Path(__file__).parent.glob("*.py")), Path(canonical.__file__)):
        digest.update(path.read_bytes())
    for name in DECODERS:
        try:
            digest.update(f"{name} {importlib.metadata.version(name)}".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    return digest.hexdigest()
