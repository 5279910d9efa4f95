"""A policy's answer. It needs no torch: a simulator's worker follows it without any network."""

from dataclasses import dataclass

import numpy as np

# metres between the fingers: below, they have met, and hold nothing; a rim leaves 3.3 to 9 mm
MET = 0.003


@dataclass
class Waypoint:
    """The next EEF target in the world frame, and the trajectory that it is the first of.

    position (3,) m; rotation (3,3), or None to keep the gripper's; gripper: -1 opens, +1 closes;
    trajectory (T,3) m; grippers (T,) in {-1, +1}; rotations (T,3,3), or None.
    """

    position: np.ndarray
    rotation: np.ndarray
    gripper: float
    trajectory: np.ndarray
    grippers: np.ndarray
    rotations: np.ndarray = None
