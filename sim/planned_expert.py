"""The expert for whole suites: one state machine over key poses, which tries a stage again where it
failed. It reads the objects' poses from the simulator.
"""

import numpy as np

from formats.demos import GRIPPER_STEPS
from rot_utils import rotation_angle
from runtime import UserError
from sim.libero_env import OPEN
from sim.manoeuvres import Drag, LayBottle, OpenDrawer, TurnKnob
from sim.object_facts import DRAGGED, PREFERRED_ASIDE, kind, preferred_grasp, side_of
from sim.pick_place import PickPlace
from sim.tasks import unperturbed

TRIES = 3  # of each stage
SIDES = ("-y", "+y", "top")  # first words of grasps' names, other words are manoeuvres and failures
STRAY = 0.02  # metres off the line above which a way down is broken off and begun again
# metres at which a pose is reached, and control steps after which it is left anyway
TIGHT, LOOSE = 0.004, 0.012
TIGHT_STEPS, LOOSE_STEPS = 30, 60
# radians that the gripper may still have to turn when it leaves a loose pose; and control steps
# after which it leaves all the same
TURNED, TURN_STEPS = np.radians(4), 40
# metres below its target at which a rise is left: what follows goes on up
RISEN = 0.02
# where a bowl stands meanwhile that an open drawer would hang over: x, y in metres
MEANWHILE = np.array([-0.12, 0.06])
CLOSED = -0.1  # metres of a drawer's slide above which it has to be opened first


def stages(scene):
    """The stages [Stage] that what a scene is asked for takes. Raises UserError where the expert
    cannot do it.
    """
    goals = scene.env.env.parsed_problem["goal_state"]
    predicate, *names = goals[0]
    task, preferred = unperturbed(scene.asked).key, preferred_of(scene)
    if len(goals) == 1 and predicate == "open" and names[0].startswith("wooden_cabinet"):
        return [OpenDrawer(scene, *cabinet_drawer(names[0]))]
    if len(goals) == 1 and predicate == "turnon":
        return [TurnKnob(scene, names[0])]
    if len(goals) != 1 or predicate not in ("on", "in") or names[0] not in scene.objects:
        wanted = ", ".join(f"({' '.join(goal)})" for goal in goals)
        raise UserError(
            f"{scene.task.key}: the scripted expert cannot do {wanted}; choose a task with one "
            "goal, or replay demonstrations of this one with --replay"
        )
    pick, place = names
    if kind(pick) in DRAGGED:
        return [Drag(scene, pick, place)]
    if place.startswith("wine_rack"):
        return [LayBottle(scene, pick, place)]
    placing = PickPlace(scene, pick, place, preferred)
    if predicate == "in" and place.startswith("wooden_cabinet"):
        cabinet, level = cabinet_drawer(place)
        if scene.sim.data.get_joint_qpos(f"{cabinet}_{level}_level") > CLOSED:
            # the open drawer would hang over the object
            aside = PickPlace(scene, pick, MEANWHILE, PREFERRED_ASIDE.get(task))
            return [aside, OpenDrawer(scene, cabinet, level), placing]
    return [placing]


def preferred_of(scene):
    """The name of the grasp that is preferred for what a scene is asked for, or None."""
    return preferred_grasp(unperturbed(scene.task).key, unperturbed(scene.asked).key)


def cabinet_drawer(region):
    """("wooden_cabinet_1", "top") of "wooden_cabinet_1_top_region"."""
    cabinet, level, _ = region.rsplit("_", 2)
    return cabinet, level


class PlannedExpert:
    """Goes through its stages' key poses; see sim/expert.py for how an expert is used.

    rotation: the pose's, also where the gripper only has to go on pointing down. Left to itself it
    tilts by up to 15 degrees in places that the arm hardly reaches, and misses.
    log: a list of words, the grasps and manoeuvres tried and what failed.
    """

    max_steps = 400  # control steps of an episode at most: a drawer and two times a bowl take 310

    def plan(self, scene):
        self.scene, self.stages, self.stage = scene, stages(scene), 0
        self.log, self.done = [], False
        self.tries = 0
        self._try(scene.observe(image=False).eef_pos)
        return self

    @property
    def phase(self):
        return self.poses[self.index].phase

    @property
    def rotation(self):
        return self.poses[self.index].rotation

    @property
    def by_its_side(self):
        """Whether it has gripped by the preferred grasp's side alone, so far. A policy that is
        shown two sides of one rim has to guess, with the object in its fingers, where it hangs.
        """
        preferred = preferred_of(self.scene)
        gripped = [word for word in self.log if word.split()[0] in SIDES]
        return preferred is None or {side_of(word) for word in gripped} <= {side_of(preferred)}

    def _try(self, eef):
        """Plan the current stage from here."""
        stage = self.stages[self.stage]
        self.poses, self.index, self.count = stage.poses(eef), 0, 0
        self.tries += 1
        self.log.append(stage.word)

    def act(self, scene, eef, eef_rot):
        """Target position (3,) and gripper (-1 opens, +1 closes) for the next control step."""
        # A pose that is reached commands nothing: the next one answers in the same step.
        while not self.done:
            self._go_back_if_strayed(eef)
            pose = self.poses[self.index]
            target, over = self._pursue(pose, eef, eef_rot)
            if not over:
                self.count += 1
                return target, pose.gripper
            self._leave(pose, eef)
        return eef, OPEN

    def _go_back_if_strayed(self, eef):
        """On a way down that was pushed aside, go back to the pose above it."""
        pose, back = self.poses[self.index], self.stages[self.stage].back
        if pose.phase in back and np.linalg.norm((pose.position() - eef)[:2]) > STRAY:
            phases = [p.phase for p in self.poses]
            self.index, self.count = phases.index(back[pose.phase]), 0

    def _pursue(self, pose, eef, eef_rot):
        """(target (3,), whether the pose is done with)."""
        stage, target = self.stages[self.stage], pose.position()
        if target is None:
            # stand still where the phase began until the fingers have moved
            if self.count == 0:
                stage.held = eef.copy()
            return stage.held, self.count >= GRIPPER_STEPS
        if pose.phase == "rise":
            return target, eef[2] > target[2] - RISEN
        distance = np.linalg.norm(target - eef)
        if pose.tight:
            return target, distance < TIGHT or self.count > TIGHT_STEPS
        turning = rotation_angle(pose.rotation, eef_rot) > TURNED
        reached = distance < LOOSE or self.count > LOOSE_STEPS
        return target, reached and not (turning and self.count < TURN_STEPS)

    def _leave(self, pose, eef):
        """Go on behind a pose: to the next one, to another try, or to the next stage."""
        stage = self.stages[self.stage]
        failure = stage.failure(pose.phase, eef)
        last = self.index == len(self.poses) - 1
        if failure is None and last and not stage.achieved():
            failure = "undone"
        if failure is None and not last:
            self.index, self.count = self.index + 1, 0
            return
        if failure is not None:
            self.log.append(failure)
            if self.tries < TRIES:
                return self._try(eef)
        if failure is None and self.stage < len(self.stages) - 1:
            self.stage, self.tries = self.stage + 1, 0
            return self._try(eef)
        self.done = True
