"""Variants of a task: another expert on the same scenes, and another account of what is done.

    task        LIBERO's own: pick and place
    lift_once   lift the bowl once, put it back where it was, rise to where the grasp was approached
                from, and stay there

`lift_once` asks for memory: above the bowl, with open fingers, the image and the EEF's pose are the
same before the lift (go down) and after it (stay). A policy of one frame answers both alike, so
that it lifts again and again, or never.
"""

import numpy as np

from harness.metrics import rises
from runtime import UserError
from sim.expert import EXPERTS, GRASP, HOVER, STRAY, PickPlaceExpert
from sim.libero_env import CLOSE, OPEN, OPEN_WIDTH

VARIANTS = ("task", "lift_once")
STAY_STEPS = 60  # control steps that a demonstration stays after its release
# share of the servo's gain at which the hovers are approached; metres at which the pause ends
SHARE, SETTLED = 0.3, 0.003
# metres above rest: a lift begins below DOWN and counts from UP on, so that a wobble is no lift
DOWN, UP = 0.02, 0.05
NEAR_REST = 0.03  # metres beside its old place at which the bowl is back
LOW, OUT = 0.03, 0.06  # metres of the EEF above its grasp's height: gone down again, out of the way
# control steps that the arm has to stay out: more than twice what a window of 8 decisions remembers
OUT_STEPS = 100


class LiftOnceExpert(PickPlaceExpert):
    """rise - hover - pause - descend - close - lift - lower - open - retract - stay.

    Pause and stay are the same pose over the bowl. The expert is `done` after STAY_STEPS of the
    stay, and keeps commanding it.
    """

    def _phase(self, scene, eef):
        phase, near = self.phase, lambda target, tol: np.linalg.norm(target - eef) < tol
        above = scene.position(self.pick) + self.offset + [0, 0, HOVER]
        # a part of the way only: at the full gain it overshoots by 1 cm, no two hovers look alike
        gently = eef + SHARE * (above - eef)
        if phase == "hover":
            return gently, OPEN, "pause" if near(above, 0.010) else None
        if phase == "pause":
            return gently, OPEN, "descend" if near(above, SETTLED) or self.count > 25 else None
        if phase == "lift":
            return self.top, CLOSE, "lower" if near(self.top, 0.010) else None
        # put the bowl back where it was grasped; having strayed, lift it again
        if phase == "lower":
            if np.linalg.norm((eef - self.held)[:2]) > STRAY:
                return self.top, CLOSE, "lift"
            return self.held, CLOSE, "open" if near(self.held, 0.004) or self.count > 25 else None
        if phase == "retract":
            return gently, OPEN, "stay" if near(above, 0.010) else None
        if phase in ("stay", "done"):
            return gently, OPEN, "done" if phase == "stay" and self.count >= STAY_STEPS else None
        # rise, descend, close and open are as in the task
        return super()._phase(scene, eef)


def new_expert(grasp="side", variant="task"):
    """A new expert for a grasp and a variant. Raises UserError where no expert has both."""
    if variant == "task":
        return EXPERTS[grasp]()
    if grasp != "side":
        raise UserError(
            f"--grasp {grasp}: --variant {variant} has an expert for the grasp 'side' only"
        )
    return LiftOnceExpert()


class Task:
    """Account of an episode of LIBERO's task: the scene's goal predicate decides, so nothing has to
    be booked.
    """

    def __init__(self, scene):
        self.scene = scene

    def note(self, bowl, eef, gripper, width):
        pass

    def done(self, out_steps=None):
        return self.scene.success()


def new_account(scene, variant):
    """The account of an episode that starts in the scene's current state. Call `note` at every
    control step, then `done` tells whether the task is done.
    """
    return LiftOnce(scene.position(scene.pick)) if variant == "lift_once" else Task(scene)


class LiftOnce:
    """Account of an episode of `lift_once`. rest (3,) m: where the bowl stands at its start."""

    def __init__(self, rest):
        self.rest, self.heights, self.arm = np.array(rest), [], []
        # the step of the first release; how many steps, up to now, all has been as it should end
        self.back_at, self.out = None, 0

    def note(self, bowl, eef, gripper, width):
        """Book a control step: positions (3,) m of bowl and EEF, gripper command, width between the
        fingers in m.
        """
        # heights in m of the bowl above its rest, and of the EEF above where it grasps
        self.heights.append(bowl[2] - self.rest[2])
        self.arm.append(eef[2] - self.rest[2] - GRASP[2])
        put_back = (
            self.lifts > 0
            and gripper == OPEN
            and width > OPEN_WIDTH
            and self.heights[-1] < DOWN
            and np.linalg.norm((bowl - self.rest)[:2]) < NEAR_REST
        )
        if put_back and self.back_at is None:
            self.back_at = len(self.arm) - 1
        self.out = self.out + 1 if put_back and self.arm[-1] > OUT else 0

    @property
    def lifts(self):
        """How often the bowl was lifted."""
        return rises(self.heights, DOWN, UP)

    @property
    def returns(self):
        """How often the arm, once out after the first release, went down again."""
        # `rises` counts ways up; with the sign changed they are ways down
        return 0 if self.back_at is None else rises(-np.array(self.arm[self.back_at :]), -OUT, -LOW)

    def done(self, out_steps=OUT_STEPS):
        """True if the bowl was lifted exactly once and is back, and the arm has since stayed out
        for `out_steps` control steps without going down again.
        """
        return self.out >= out_steps and self.lifts == 1 and self.returns == 0

    def outcome(self):
        """One of harness.metrics.LIFT_OUTCOMES.

        miss: never lifted. again: lifted or reached for again. kept: not put back and let go. once:
        done. unfinished: anything else.
        """
        if not self.lifts:
            return "miss"
        if self.lifts > 1 or self.returns:
            return "again"
        return "kept" if self.back_at is None else "once" if self.done() else "unfinished"
