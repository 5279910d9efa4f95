"""The scripted experts, and the servo that follows them. They read the objects' poses from the
simulator.

Two pick a bowl by its rim and place it: `side` always at the bowl's -y rim, with the start's
orientation, and `rim` at a point of the rim that depends on where bowl and plate stand, with the
gripper turned along. `planned` does whole suites, see sim/planned_expert.py.
Positions are in metres in the world frame: x away from the robot, z up.
"""

import numpy as np

from formats.demos import GRIPPER_STEPS
from rot_utils import euler_to_matrix, matrix_to_rotvec, rotvec_to_matrix
from sim.libero_env import ACTION_SCALE, CLOSE, OPEN, ROTATION_SCALE
from sim.object_facts import SIDE_TASKS
from sim.planned_expert import PlannedExpert
from sim.tasks import unperturbed

# EEF relative to the bowl when the fingers straddle its -y rim, metres
GRASP = np.array([0.0, -0.048, 0.0366])
# metres above grasp or release, above where the gripper closed, above where it let go
HOVER, LIFT, RETRACT = 0.10, 0.14, 0.10
RELEASE = 0.012  # how far above the height of the grasp the bowl is let go
# a bowl on the plate stands as if the plate's surface were 4 mm below the plate's own origin
PLATE_RISE = -0.004
STRAY = 0.02  # metres off the line above which a descent is broken off and the hover repeated
# see `rim_angle`; from -75 to 75 deg the arm reaches, and grasps, every rim point
RIM_GAIN, RIM_LIMIT = 2.0, np.radians(60)
SHUT = 0.02  # metres between the fingers: below, they are closed when an episode begins
TURNED = np.radians(5)  # rotation error above which the gripper still has to turn
PHASES = (
    *("rise", "hover", "reopen", "descend", "close", "lift", "carry", "lower", "open"),
    *("retract", "done"),
)


def servo_action(eef_pos, target, gripper, gain=2.0, rotation=None, eef_rot=None):
    """OSC_POSE action (7,) in [-1, 1] that moves the EEF towards `target` (3,) m.

    Translation: clip(gain (target - eef) / 5 cm, -1, 1). Rotation: zero without `rotation`, else
    from `eef_rot` (3,3) towards `rotation` (3,3), clip(log(rotation . eef_rot^T) / 0.5 rad, -1, 1).
    Raises ValueError for a target, rotation or gripper that is not finite: the controller would
    pass NaN on to the motors.
    """
    for name, value in (("target", target), ("rotation", rotation), ("gripper", gripper)):
        if value is not None and not np.isfinite(value).all():
            raise ValueError(
                f"servo_action: the {name} has NaN or Inf: {np.asarray(value).tolist()}"
            )
    # the rotation vector, in the world frame, that takes eef_rot to rotation
    turn = (
        np.zeros(3)
        if rotation is None
        else np.clip(matrix_to_rotvec(rotation @ eef_rot.T) / ROTATION_SCALE, -1, 1)
    )
    return np.concatenate(
        [np.clip(gain * (target - eef_pos) / ACTION_SCALE, -1, 1), turn, [gripper]]
    )


def rim_angle(pick, place):
    """Angle in radians about the vertical by which the `rim` grasp is turned from the bowl's -y
    side. pick, place: positions (3,) or (2,) m of bowl and plate.

    It is RIM_GAIN times the angle between the direction from plate to bowl and -x, at most
    RIM_LIMIT. A policy can see it, as both objects are in the image. A bowl straight beside its
    plate (task 0 as LIBERO has it) is grasped as by `side`. Objects shifted by a few centimetres
    give +-30 degrees, which the gain spreads over the whole of what the arm reaches.
    """
    x, y = np.asarray(place[:2]) - np.asarray(pick[:2])
    return float(np.clip(RIM_GAIN * np.arctan2(y, x), -RIM_LIMIT, RIM_LIMIT))


class PickPlaceExpert:
    """rise - hover - descend - close - lift - carry - lower - open - retract, by the task's (On
    object target) goal. Where the fingers are closed at first, upon nothing, they open above the
    object: on the way a closed gripper cannot drop anything that it does hold.

    Call `plan(scene)` at an episode's start, then `act(scene, eef_pos)` at each control step ->
    (target (3,) m, gripper). `rotation` (3,3) is the orientation that the gripper turns to
    meanwhile, None where it keeps its own. After a push the current phase goes on from there. A
    descent that strayed goes back to its hover.
    """

    rotation, offset = None, GRASP
    max_steps = 250  # control steps of an episode at most
    log, by_its_side = (), True  # see PlannedExpert

    def plan(self, scene):
        self.pick, self.place = scene.pick, scene.place
        self.surface = PLATE_RISE if self.place in scene.objects else 0.0
        self.phase, self.count, self.grip = "rise", 0, None
        shut = scene.observe(image=False).gripper_width < SHUT
        self.approaching = CLOSE if shut else OPEN
        return self

    @property
    def done(self):
        return self.phase == "done"

    def _go(self, phase):
        self.phase, self.count = phase, 0

    def _stand(self, eef):
        """Where the EEF was when the phase began (3,): there it stands while the fingers move."""
        if self.count == 0:
            self.held = eef.copy()
        return self.held

    def act(self, scene, eef_pos, eef_rot=None):
        """Target position (3,) and gripper (-1 opens, +1 closes) for the next control step."""
        # A phase whose end is reached commands nothing: the next one answers in the same step.
        while True:
            target, gripper, leave = self._phase(scene, eef_pos)
            if not leave:
                self.count += 1
                return target, gripper
            self._go(leave)

    def _phase(self, scene, eef):
        """(target, gripper, next phase or None) in the current phase."""
        phase, near = self.phase, lambda target, tol: np.linalg.norm(target - eef) < tol
        grasp = scene.position(self.pick) + self.offset
        above = grasp + np.array([0, 0, HOVER])
        # approach
        if phase == "rise":  # over obstacles first: a bowl on the cabinet is approached from above
            target = np.array([eef[0], eef[1], above[2]])
            return target, self.approaching, "hover" if eef[2] > above[2] - 0.02 else None
        if phase == "hover":
            there = "descend" if self.approaching == OPEN else "reopen"
            return above, self.approaching, there if near(above, 0.010) else None
        if phase == "reopen":
            self.approaching = OPEN
            return self._stand(eef), OPEN, "descend" if self.count >= GRIPPER_STEPS else None
        if phase == "descend":
            if np.linalg.norm((eef - grasp)[:2]) > STRAY:
                return above, OPEN, "rise"
            # after 25 control steps the gripper closes wherever it is
            return grasp, OPEN, "close" if near(grasp, 0.004) or self.count > 25 else None
        if phase == "close":
            held = self._stand(eef)
            if self.count >= GRIPPER_STEPS:
                self.top = held + np.array([0, 0, LIFT])
                return self.top, CLOSE, "lift"
            return held, CLOSE, None
        if phase == "lift":
            return self.top, CLOSE, "carry" if near(self.top, 0.015) else None
        # transport: the targets are such that the bowl, not the EEF, ends at the goal's centre
        goal = scene.position(self.place)
        if phase in ("carry", "lower"):
            if self.grip is None:
                # where the rim sits in the fingers: from bowl to EEF, (2,) m, measured once lifted
                self.grip = (eef - scene.position(self.pick))[:2]
            release = np.array(
                [*(goal[:2] + self.grip), goal[2] + self.surface + GRASP[2] + RELEASE]
            )
            over = np.array([release[0], release[1], max(self.top[2], release[2] + HOVER)])
            if phase == "carry":
                return over, CLOSE, "lower" if near(over, 0.010) else None
            if np.linalg.norm((eef - release)[:2]) > STRAY:
                return over, CLOSE, "carry"
            return release, CLOSE, "open" if near(release, 0.004) or self.count > 25 else None
        # release: stand still until the fingers are open, then go straight up
        if phase == "open":
            held = self._stand(eef)
            if self.count >= GRIPPER_STEPS:
                self.top = held + np.array([0, 0, RETRACT])
                return self.top, OPEN, "retract"
            return held, OPEN, None
        if phase == "retract":
            return self.top, OPEN, "done" if near(self.top, 0.010) else None
        return eef, OPEN, None


class RimExpert(PickPlaceExpert):
    """Grasps at the rim point that `rim_angle` gives, with the gripper's yaw turned along. It
    descends only once the gripper is turned.
    """

    def plan(self, scene):
        super().plan(scene)
        self.angle = rim_angle(scene.position(self.pick), scene.position(self.place))
        turn = rotvec_to_matrix(np.array([0, 0, self.angle]))
        # both turn by the same angle; with a roll of pi the fingers point down, as at the start
        self.offset, self.rotation = turn @ GRASP, turn @ euler_to_matrix(np.array([np.pi, 0, 0]))
        return self

    def act(self, scene, eef_pos, eef_rot):
        # angle in radians that the gripper still has to turn
        self.left = np.linalg.norm(matrix_to_rotvec(self.rotation @ eef_rot.T))
        return super().act(scene, eef_pos)

    def _phase(self, scene, eef):
        target, gripper, leave = super()._phase(scene, eef)
        return target, gripper, None if leave == "descend" and self.left > TURNED else leave


EXPERTS = {"side": PickPlaceExpert, "rim": RimExpert, "planned": PlannedExpert}


def default_grasp(task, variant="task"):
    """The grasp of a Task where none is asked for: `side` where it was published, or `planned`."""
    plain = variant != "task" or unperturbed(task).key in SIDE_TASKS
    return "side" if plain else "planned"
