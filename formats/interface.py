"""What a dataset of demonstrations is to all that reads it, and what a format has to do."""

import hashlib
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path

import numpy as np

from formats.checks import check_dataset, check_said
from runtime import UserError


class Demonstrations(ABC):
    """A dataset: the demonstrations at a path, read and checked, and their images.

    A format is one file with a subclass that has `format`, `accepts`, `read` and `images`, and a
    line in `formats.dataset.FORMATS`; `many_tasks` where it may hold several, `check` where more is
    to be checked than in every format, `files` so that images are not read again and again. What
    every format then has:

    path; format, its name; attributes {key: value}, what the dataset says of itself (its task,
    command, versions ...); demos, a list of Demo, which hold the calibration (K, E) and the number
    of frames (`len`); image_size, px; fingerprint.
    """

    format = None
    many_tasks = False

    def __init__(self, path, image_size=None, limit=None, task=None):
        """image_size: side of the images in pixels, None for that of the recording; limit: read
        the first so many demonstrations; task: only those of one, its index or its instruction,
        None for all. Raises UserError with file, key and remedy."""
        self.path, self.task = Path(path), task
        if task is not None and not self.many_tasks:
            raise UserError(f"--task {task}: {path} holds one task; leave --task out")
        self.demos, self.attributes = self.read(image_size, limit)
        check_said(self.attributes, self.path)
        # so that a demonstration reads its own images, wherever it goes
        for demo in self.demos:
            demo.source = self
        self.check()

    def check(self):
        """Raise UserError where the demonstrations contradict themselves.

        It looks at all of them: one may show too little to tell.
        """
        check_dataset(self.demos, self.path)

    @staticmethod
    @abstractmethod
    def accepts(path):
        """True if what lies at a Path is of this format, damaged or not. Looks at names alone."""

    @abstractmethod
    def read(self, image_size, limit):
        """(list of Demo, dict of attributes), everything checked but the pixels. At least one."""

    @abstractmethod
    def images(self, demo, frames):
        """Images (N,S,S,3) uint8 RGB, upright, of frames [int] of a Demo, read from the disk now.

        Called from several threads. Raises UserError where one is damaged.
        """

    def files(self, demo):
        """Paths of all files that a Demo's images depend on, in an order of their own; None where
        they are not known. Features are then looked up by the images' bytes, see `formats.stamp`.
        """
        return None

    def __len__(self):
        return len(self.demos)

    def __getitem__(self, name):
        """The Demo of this name."""
        return next(d for d in self.demos if d.name == name)

    @property
    def image_size(self):
        """Side of the images in pixels. Raises UserError where demonstrations differ in it."""
        sizes = sorted({d.image_size for d in self.demos})
        if len(sizes) > 1:
            raise UserError(
                f"{self.path}: its images are of {' and '.join(map(str, sizes))} px; one size is "
                "needed, give --image_size"
            )
        return sizes[0]

    @property
    def frames(self):
        """{name of a demonstration: its number of frames}."""
        return {d.name: len(d) for d in self.demos}

    @cached_property
    def fingerprint(self):
        """24 hex digits that tell its demonstrations from those of any other dataset.

        Over numbers, cameras and each first image: a replay in another scene is another dataset,
        a copy under another name is the same.
        """
        digest = hashlib.blake2b(digest_size=12)
        for d in self.demos:
            digest.update(d.name.encode())
            # without `attrs`: a command or a version that differs makes no other samples
            rows = (d.actions, d.ee_pos, d.ee_ori, d.gripper_states, d.perturbed, d.K, d.E)
            for value in (*rows, self.images(d, [0])):
                digest.update(repr(value.shape).encode() + np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()
