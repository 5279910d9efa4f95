"""Stages that are no picking and placing: pull a drawer, turn a knob, drag a plate, lay a bottle
on a rack. Metres in the world frame.
"""

import numpy as np

from rot_utils import rotvec_to_matrix
from sim.clearance import up
from sim.grasps import DOWN, turned
from sim.keyposes import KeyPose, Stage
from sim.libero_env import CLOSE, OPEN
from sim.object_facts import DRAG_HEIGHT, DRAG_RADIUS

ABOVE = 0.09  # over a grasp
# the EEF from the origin of the stove's knob, in the middle of its bar: nearer to the origin, which
# is near the bar's end, the fingers slip off; and the degrees by which the knob is turned
KNOB_GRIP, KNOB_TURN = np.array([-0.016, 0, 0.037]), 60
# over the grip: clear of the knob, where the hand stands in line with it; and from where on the
# fingers stand on it
KNOB_CLEAR, ON_KNOB = 0.035, 0.01


def tilted(degrees):
    """The rotation (3,3) of a gripper whose fingers point down, but by so many degrees towards -y.
    They close in the y-z plane.
    """
    return rotvec_to_matrix(np.array([-np.radians(degrees), 0, 0])) @ DOWN


def approach(eef, point, rotation):
    """rise - hover - descend - close: the key poses that grip what is at point (3,) from above."""
    above = point + up(ABOVE)
    return [
        KeyPose("rise", np.array([*eef[:2], max(eef[2], above[2])]), OPEN),
        KeyPose("hover", above, OPEN, rotation),
        KeyPose("descend", point, OPEN, rotation, tight=True),
        KeyPose("close", None, CLOSE, rotation),
    ]


class OpenDrawer(Stage):
    """Grip a drawer's bar, with the gripper nearly level, and pull it out along +y, to where the
    cabinet of libero_goal faces. level: top, middle or bottom.
    """

    TILT = 80  # degrees; at 45 and less the hand hits the cabinet before the fingers hold
    # the way of the hand, up to the drawer's stop, and how far open counts
    PULL, ENOUGH = 0.155, 0.142
    TRAVEL = 1.20  # height at which the gripper turns, clear of everything

    def __init__(self, scene, cabinet, level):
        super().__init__(scene)
        self.joint = f"{cabinet}_{level}_level"
        model, body = scene.sim.model._model, f"{cabinet}_cabinet_{level}"
        # the bar is the drawer's one part that is 8 to 10 cm long
        longest = model.geom_size.max(1)
        bars = (longest > 0.04) & (longest < 0.05)
        bars &= model.geom_bodyid == model.body(body).id
        self.bar = int(np.flatnonzero(bars)[0])

    def achieved(self):
        return self.scene.sim.data.get_joint_qpos(self.joint) < -self.ENOUGH

    def poses(self, eef):
        out, turn = np.array([0, 1.0, 0]), tilted(self.TILT)
        bar = self.scene.sim.data._data.geom_xpos[self.bar] + up(0.004)
        before, pulled = bar + 0.09 * out, bar + self.PULL * out
        # to the side of the cabinet, where the arm has room to turn
        ready = np.array([before[0] - 0.03, before[1] + 0.06, self.TRAVEL])
        away = np.array([pulled[0] - 0.03, pulled[1] + 0.06, self.TRAVEL + 0.04])
        return [
            KeyPose("rise", np.array([*eef[:2], self.TRAVEL]), OPEN),
            KeyPose("tilt", ready, OPEN, turn),
            KeyPose("hover", before, OPEN, turn),
            KeyPose("descend", bar, OPEN, turn, tight=True),
            KeyPose("close", None, CLOSE, turn),
            KeyPose("pull", pulled, CLOSE, turn, tight=True),
            KeyPose("open", None, OPEN, turn),
            KeyPose("back", pulled + 0.05 * out, OPEN, turn),
            KeyPose("retract", away, OPEN),
        ]


class TurnKnob(Stage):
    """Grip the stove's knob and turn it by turning the gripper."""

    def __init__(self, scene, stove):
        super().__init__(scene)
        self.knob = scene.sim.model._model.body(f"{stove}_button").id

    def poses(self, eef):
        self.at = at = self.scene.sim.data._data.xpos[self.knob] + KNOB_GRIP
        end = turned(KNOB_TURN)
        *above, descend, close = approach(eef, at, DOWN)
        return [
            *above,
            # so near to the robot's base the hand strays by up to 3 cm on its way down
            KeyPose("align", at + up(KNOB_CLEAR), OPEN, DOWN, tight=True),
            descend,
            close,
            KeyPose("turn", at, CLOSE, end),
            KeyPose("open", None, OPEN, end),
            KeyPose("retract", at + up(ABOVE), OPEN, end),
        ]

    def failure(self, phase, eef):
        return "blocked" if phase == "descend" and eef[2] > self.at[2] + ON_KNOB else None


class Drag(Stage):
    """Grip the rim of a plate on the side that leads, and drag it over the table. Pushed from
    behind, the fingers slip over the rim.
    """

    def __init__(self, scene, pick, place):
        super().__init__(scene)
        self.pick, self.place = pick, place

    def poses(self, eef):
        plate, goal = self.scene.position(self.pick), self.scene.position(self.place)
        way = (goal - plate) * [1, 1, 0]
        ahead = way / np.linalg.norm(way)
        # the fingers close along the way; a turn by 180 degrees changes nothing
        yaw = np.degrees(np.arctan2(-ahead[0], ahead[1]))
        turn = turned((yaw + 90) % 180 - 90)
        at = plate + DRAG_RADIUS * ahead + up(DRAG_HEIGHT)
        return [
            *approach(eef, at, turn),
            KeyPose("drag", at + way, CLOSE, turn, tight=True),
            KeyPose("open", None, OPEN, turn),
            KeyPose("retract", at + way + up(0.1), OPEN, turn),
        ]


class LayBottle(Stage):
    """Grip a bottle's neck across x, and lay it on the rack's sloping shelf, its foot behind the
    lip.
    """

    TILT = 50  # degrees from upright, of bottle and gripper
    NECK = 0.136  # over the bottle's foot
    TRAVEL = 1.35
    # of the bottle's foot from the lip: up the shelf, and off it
    ALONG, OFF = 0.035, 0.036

    def __init__(self, scene, pick, place):
        super().__init__(scene)
        self.pick, self.place = pick, place

    def poses(self, eef):
        scene, across = self.scene, turned(90)
        # up the shelf, and away from it
        along = scene.sim.data.get_site_xmat(self.place).reshape(3, 3)[:, 2]
        normal = np.array([0, along[2], -along[1]])
        lean = np.radians(self.TILT)
        # from the leaning bottle's foot to its top
        axis = np.array([0, -np.sin(lean), np.cos(lean)])
        leaning = rotvec_to_matrix(np.array([lean, 0, 0])) @ across

        at = scene.position(self.pick) + up(self.NECK)
        foot = scene.position(self.place) + self.ALONG * along + self.OFF * normal
        end = foot + self.NECK * axis
        ready = np.array([end[0], -0.02, self.TRAVEL])
        return [
            *approach(eef, at, across),
            KeyPose("lift", np.array([*at[:2], self.TRAVEL]), CLOSE, across),
            KeyPose("carry", ready, CLOSE, across),
            KeyPose("lean", end + 0.08 * normal, CLOSE, leaning),
            KeyPose("lower", end, CLOSE, leaning, tight=True),
            KeyPose("open", None, OPEN, leaning),
            KeyPose("retract", end + 0.09 * axis, OPEN, leaning),
        ]
