"""The stage that picks an object and places it: on a plate, stove or cabinet, in a drawer, basket
or bowl. Metres in the world frame.
"""

import numpy as np

from runtime import UserError
from sim.clearance import Boxes, clearance, up
from sim.grasps import choose
from sim.keyposes import KeyPose, Stage
from sim.libero_env import CLOSE, OPEN
from waypoint import MET

# above grasp, above where the gripper closed, above where it let go (at least, at most)
HOVER, LIFT, RETRACT = 0.10, 0.14, (0.05, 0.10)
LIFT_ASIDE = 0.05  # the same where the object only stands aside
RELEASE = 0.012  # above the surface at which the object is let go
PASSING = 0.025  # height between what is carried and what it passes
FINGERTIP = 0.0125  # below the EEF
SIDES = 0.005  # room that the open gripper has where it lets go
LIFTED = 0.03  # above its rest an object is held
SLIPPED = 0.04  # in the fingers, sideways: then the object was lost
ASIDE = 0.03  # from a point on the table at which an object counts as put there


class PickPlace(Stage):
    """rise - hover - descend - close - lift - carry - lower - open - retract.

    pick: an object's name; place: name of an object, fixture or goal site, or a point (2,) on the
    table; preferred: name of the grasp to take where there is room.
    """

    back = {"descend": "hover", "lower": "carry"}

    def __init__(self, scene, pick, place, preferred=None):
        super().__init__(scene)
        self.pick, self.place, self.preferred = pick, place, preferred
        self.missed = []  # names of grasps

    def goal(self):
        """The point (3,) above which the object is let go."""
        if isinstance(self.place, str):
            return self.scene.position(self.place)
        return np.array([*self.place, self.scene.support])

    def achieved(self):
        if isinstance(self.place, str):
            return self.scene.success()
        off = self.scene.position(self.pick)[:2] - self.place
        return np.linalg.norm(off) < ASIDE

    def poses(self, eef):
        scene, pick = self.scene, self.pick
        self.boxes = Boxes(scene, without=(None, pick))
        self.grasp = choose(scene, self.boxes, pick, self.goal(), self.preferred, self.missed)
        if self.grasp is None:
            raise UserError(
                f"{scene.task.key}: the scripted expert has no grasp for {pick}, which is wider "
                "than its fingers open; choose another task, or --replay demonstrations of it"
            )
        self.word = self.grasp.name
        self.rest = scene.position(pick)[2]
        self.at = scene.position(pick) + self.grasp.offset
        self.hang = self.at[2] - self._bottom()
        self.grip = self.release = None
        # over all that stands on the way
        passed = self.boxes.skyline(eef, self.at)
        self.hover = max(self.at[2] + HOVER, passed + FINGERTIP + PASSING)
        self.passed = self.boxes.skyline(self.at, self.goal())

        turn = self.grasp.rotation
        # fingers that met hold nothing: they open above the object, as closed ones drop nothing
        width = scene.observe(image=False).gripper_width
        way, back = (CLOSE, "return") if width < MET else (OPEN, None)
        reopened = [
            KeyPose(back, self._over_object, CLOSE, turn),
            KeyPose("reopen", None, OPEN, turn),
        ]
        return [
            KeyPose("rise", np.array([*eef[:2], self.hover]), way, turn),
            *(reopened if back else ()),
            KeyPose("hover", self._over_object, OPEN, turn),
            KeyPose("descend", lambda: self.at, OPEN, turn, tight=True),
            KeyPose("close", None, CLOSE, turn),
            KeyPose("lift", self._over_grasp, CLOSE, turn),
            KeyPose("carry", self._over_goal, CLOSE, turn),
            KeyPose("lower", lambda: self.release, CLOSE, turn, tight=True),
            KeyPose("open", None, OPEN, turn),
            KeyPose("retract", self._over_release, OPEN, turn),
        ]

    def _bottom(self):
        """Height of the object's lowest point."""
        return Boxes(self.scene, only=(self.pick,)).low[:, 2].min()

    def _over_object(self):
        # it may have been touched: where it is now
        self.at = self.scene.position(self.pick) + self.grasp.offset
        return np.array([*self.at[:2], self.hover])

    def carried_height(self):
        """Height of the EEF while the object is carried."""
        lift = LIFT if isinstance(self.place, str) else LIFT_ASIDE
        return max(self.at[2] + lift, self.passed + self.hang + PASSING)

    def _over_grasp(self):
        return np.array([*self.at[:2], self.carried_height()])

    def _over_goal(self):
        return np.array([*self.release[:2], self.carried_height()])

    def _over_release(self):
        # as high as it carried: higher up the camera loses it where things stand high
        return self.held + up(np.clip(self.carried_height() - self.held[2], *RETRACT))

    def _let_go(self):
        """Where the EEF lets go (3,): the object's own axis over the goal, its foot just above the
        surface there, or higher until the open gripper touches nothing.
        """
        goal, table = self.goal(), self.scene.support
        height = max(table, self.boxes.surface(goal[:2])) + self.hang + RELEASE
        point = np.array([*(goal[:2] + self.grip), height])
        boxes, turn = Boxes(self.scene, without=(None, self.pick)), self.grasp.rotation
        while (
            point[2] < goal[2] + 0.3
            and clearance(boxes, point, turn, table, approach=(0.0,)) < SIDES
        ):
            point[2] += 0.01
        return point

    def failure(self, phase, eef):
        at = self.scene.position(self.pick)
        if phase == "lift":
            if at[2] < self.rest + LIFTED:
                self.missed.append(self.grasp.name)
                return "missed"
            # as the object really sits in the fingers
            self.grip = (eef - at)[:2]
            self.hang = max(self.hang, eef[2] - self._bottom())
            self.release = self._let_go()
        if phase == "carry" and np.linalg.norm((eef - at)[:2] - self.grip) > SLIPPED:
            return "lost"
        return None
