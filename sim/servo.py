"""The servo: a policy's waypoint becomes one target a control step, until the next decision is due.

It drives towards the waypoint, changes the gripper only near the waypoint that asks for it or where
the arm gets no nearer, and holds still while the fingers move. It sees the EEF alone, so that
it works for a simulator here and for one behind a socket (serve.py).
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
# metres at which a gripper that is commanded a rotation closes, if a drive gets it there: a knob, a
# drawer's bar and a plate's rim leave the fingers less room than a bowl
CLOSING_TOLERANCE = 0.002
# drives in a row that do not bring the EEF nearer, by so many metres, to where the gripper is to
# change; then it changes where the arm stands, if that is near enough (metres)
STALLED_DRIVES, PROGRESS, STALLED_DISTANCE = 2, 0.002, 0.03


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


def least_steps(variant, waypoint_stride):
    """Control steps that a waypoint takes at least which is reached already: in lift_once staying
    is an answer, which takes as long as in its demonstrations. variant: of sim/variants.py.
    """
    return waypoint_stride if variant == "lift_once" else 1


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
        # metres to the waypoint when the drive began; drives to a change that came no nearer to it
        self.began, self.stalled = np.inf, 0

    def follow(self, waypoint, eef, eef_rot):
        """Take on a decision -> the waypoint of its trajectory that is driven to, see `ahead`.

        eef (3,) m and eef_rot (3,3): where the end-effector is.
        """
        rotation = None if self.zero_rotation else eef_rot
        self.waypoint = ahead(waypoint, eef, self.gripper, rotation)
        self.target = self.waypoint.position
        self.rotation = None if self.zero_rotation else self.waypoint.rotation
        self.left, self.driving = self.steps_a_drive, True
        self.began = np.linalg.norm(self.target - eef)
        return self.waypoint

    def due(self, eef, eef_rot=None):
        """True where a decision is due, the last one being carried out. eef (3,) m: the
        end-effector now; eef_rot (3,3): without it, only positions say whether it has arrived."""
        if self.driving:
            away = np.linalg.norm(self.waypoint.position - eef)
            arrived = self.teleport and self._arrived(away, eef_rot)
            if arrived or not self.left:
                self._end_drive(eef, away, arrived)
        return not self.left

    def _arrived(self, away, eef_rot):
        """Whether the EEF, `away` metres from the waypoint, is near enough. A gripper that is
        commanded a rotation has turned before its fingers move, and closes only close by.
        """
        if self.rotation is None or self.waypoint.gripper == self.gripper:
            return away < SERVO_TOLERANCE
        if eef_rot is not None and rotation_angle(self.rotation, eef_rot) > TURNED:
            return False
        closing = self.waypoint.gripper != OPEN
        return away < (CLOSING_TOLERANCE if closing else SERVO_TOLERANCE)

    def _changes(self, away):
        """Whether the gripper changes now, a drive having ended `away` metres from where it is to:
        near there, or where drives bring the EEF no nearer any more, as at the end of its reach.
        """
        changing = self.waypoint.gripper != self.gripper
        self.stalled = self.stalled + 1 if changing and self.began - away <= PROGRESS else 0
        if not changing:
            return False
        out_of_reach = self.teleport and self.stalled >= STALLED_DRIVES
        return away < (STALLED_DISTANCE if out_of_reach else FLIP_DISTANCE)

    def _end_drive(self, eef, away, arrived):
        driven = self.steps_a_drive - self.left
        self.left, self.driving = 0, False
        if self._changes(away):
            self.stalled = 0
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
