"""The formats that exist, and the one call that opens a dataset of any of them."""

from pathlib import Path

from formats.lerobot import LeRobotFolder
from formats.libero_hdf5 import LiberoFile
from formats.smith300 import EpisodeFolder

SUFFIXES = (".hdf5", ".h5")  # of HDF5 files in a folder of datasets
# A path is of the first format that accepts it. A new format is a line here, before the last, which
# takes what no other knows and says what is missing.
FORMATS = (LiberoFile, LeRobotFolder, EpisodeFolder)


def open_dataset(path, image_size=None, limit=None, task=None):
    """The `interface.Demonstrations` at a path, read and checked; images stay on the disk.

    image_size: side of the images in pixels, None for that of the recording; limit: only the first
    so many demonstrations; task: only those of one task, where the dataset has several: its index
    or its instruction. Raises UserError with file, key and remedy for what cannot be read.
    """
    path = Path(path)
    form = next(f for f in FORMATS if f.accepts(path))
    return form(path, image_size, limit, task)
