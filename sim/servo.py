"""The servo: a policy's waypoint becomes one target a control step, until the next decision is due.

It drives towards the waypoint, changes the gripper only near the waypoint that asks for it, and
holds still while the fingers move. It sees positions alone, so that it works for a simulator here
and for one behind a socket (serve.py).
"""

import numpy as np

from formats.demos import GRIPPER_STEPS
from rot_utils import rotation_angle
from sim.expert import TURNED
from sim.libero_env import OPEN
from waypoint import Waypoint

# control steps at most towards one waypoint; metres at which it is reached
SERVO_STEPS, SERVO_TOLERANCE = 10, 0.006
# the gripper changes only this near to the waypoint that asks for it (metres)
FLIP_DISTANCE = 0.012
# metres within which a waypoint of a predicted trajectory counts as passed: half of the
# min_travel that training keeps between waypoints
REACHED = 0.01


def ahead(waypoint, eef, gripper, eef_rot=None):
    """The trajectory's first waypoint that is not reached yet, with what follows it.

    It is not reached where `eef` (3,) is farther than REACHED, or the gripper is to change, or,
    given `eef_rot` (3,3) where rotations are servoed too, the gripper still has to turn. A policy
    without memory that hovers over a bowl and answers "hover" would otherwise do so for ever,
    although its trajectory goes on.
    """
    for k, (point, command) in enumerate(zip(waypoint.trajectory, waypoint.grippers)):
        rotation = waypoint.rotation if waypoint.rotations is None else waypoint.rotations[k]
        turned = (
            eef_rot is not None
            and rotation is not None
            and rotation_angle(rotation, eef_rot) > TURNED
        )
        if command != gripper or turned or np.linalg.norm(point - eef) > REACHED:
            return Waypoint(
                point,
                rotation,
                float(command),
                waypoint.trajectory[k:],
                waypoint.grippers[k:],
                None if waypoint.rotations is None else waypoint.rotations[k:],
            )
    return waypoint


class Servo:
    """Drives to one waypoint after the other. Ask `due` at every control step: if a decision is
    due, give it to `follow` and ask again, else take `step`.

    teleport: drive to the waypoint, for at most SERVO_STEPS; without it take `waypoint_stride`
    steps towards it, arrived or not. zero_rotation: keep the gripper's orientation. least: control
    steps that a waypoint takes at least which is reached already.

    gripper: the command that holds now, -1 open or +1 close.
    """

    def __init__(self, teleport=True, zero_rotation=True, waypoint_stride=5, least=1):
        self.teleport, self.zero_rotation = teleport, zero_rotation
        self.steps_a_drive, self.least = SERVO_STEPS if teleport else waypoint_stride, least
        self.gripper, self.waypoint = OPEN, None
        # where it goes to, for how many more control steps, and whether that is a drive or a hold
        self.target = self.rotation = None
        self.left, self.driving = 0, False

    def follow(self, waypoint, eef, eef_rot):
        """Take on a decision -> the waypoint of its trajectory that is driven to, see `ahead`.

        eef (3,) m and eef_rot (3,3): where the end-effector is.
        """
        rotation = None if self.zero_rotation else eef_rot
        self.waypoint = ahead(waypoint, eef, self.gripper, rotation)
        self.target = self.waypoint.position
        self.rotation = None if self.zero_rotation else self.waypoint.rotation
        self.left, self.driving = self.steps_a_drive, True
        return self.waypoint

    def due(self, eef):
        """True where a decision is due, the last one being carried out. eef (3,) m: the
        end-effector now."""
        if self.driving:
            away = np.linalg.norm(self.waypoint.position - eef)
            arrived = self.teleport and away < SERVO_TOLERANCE
            if arrived or not self.left:
                self._end_drive(eef, away, arrived)
        return not self.left

    def _end_drive(self, eef, away, arrived):
        driven = self.steps_a_drive - self.left
        self.left, self.driving = 0, False
        if self.waypoint.gripper != self.gripper and away < FLIP_DISTANCE:
            # the EEF stands still while the fingers move
            self.gripper = self.waypoint.gripper
            self.target, self.rotation, self.left = eef, None, GRIPPER_STEPS
        elif arrived:
            # already there and nothing to do: time passes all the same
            self.left = max(1, self.least - driven)

    def step(self):
        """The target of the next control step: position (3,) m, and rotation (3,3) or None."""
        self.left -= 1
        return self.target, self.rotation
