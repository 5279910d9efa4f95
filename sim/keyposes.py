"""Key poses: what a scripted episode is made of. A stage is a list of them, planned from where the
objects are, and planned again when it failed.
"""

from dataclasses import dataclass

import numpy as np

from sim.grasps import DOWN


@dataclass
class KeyPose:
    """A pose that the EEF goes to, or stands still in.

    phase: its name; target: (3,) m in the world, a function that answers it where it depends on
    what happened before, or None to stand still while the fingers move; rotation (3,3) of the
    gripper; tight: it has to be reached to a few millimetres.
    """

    phase: str
    target: object
    gripper: float
    rotation: np.ndarray = None
    tight: bool = False

    def __post_init__(self):
        self.rotation = DOWN if self.rotation is None else self.rotation

    def position(self):
        """The target (3,) m now, None to stand still."""
        return self.target() if callable(self.target) else self.target


class Stage:
    """A part of an episode that has a goal of its own.

    held: where the EEF last stood still (3,) m, set by the expert. word: what it does, for reports.
    """

    # phase: an earlier one that is gone back to where the EEF strayed sideways
    back = {}

    def __init__(self, scene):
        self.scene, self.held, self.word = scene, None, type(self).__name__

    def poses(self, eef):
        """The list of KeyPose of a try that starts with the EEF at (3,) m."""
        raise NotImplementedError

    def failure(self, phase, eef):
        """A word for what went wrong in a phase that has ended, None if nothing did."""
        return None

    def achieved(self):
        """Whether the stage's goal is reached, asked after its last pose."""
        return self.scene.success()
