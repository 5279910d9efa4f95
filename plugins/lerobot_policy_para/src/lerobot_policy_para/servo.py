"""From waypoints to one action per control step.

`eval.py` asks the policy, drives to the waypoint for some steps, and asks again. LeRobot asks for
one action at each step of 20 Hz. `Servo` is the loop of sim/rollout.run_episode turned inside out:
what that loop would do next is what `action` answers.
"""

import numpy as np

from formats.demos import GRIPPER_STEPS
from sim.expert import servo_action
from sim.libero_env import OPEN
from sim.rollout import FLIP_DISTANCE, SERVO_STEPS, SERVO_TOLERANCE, ahead, check_waypoint


class Servo:
    """One episode of one robot.

    decide: observation -> Waypoint, called when a decision is due. zero_rotation: the gripper keeps
    its orientation. least: control steps that a decision takes where there is nothing to do.
    """

    def __init__(self, decide, zero_rotation=True, least=1):
        self.decide, self.zero_rotation, self.least = decide, zero_rotation, least
        self.gripper, self.decisions = OPEN, 0
        self.loop = self._loop()
        next(self.loop)

    def action(self, observation):
        """The OSC_POSE action (7,) in [-1, 1] for an Observation of sim/libero_env.py.

        Raises PolicyError for a waypoint that is not finite.
        """
        return self.loop.send(observation)

    # a generator: each `yield` gives a step's action and takes the observation after it
    def _loop(self):
        now = yield
        while True:
            answer = self.decide(now)
            check_waypoint(answer)
            self.decisions += 1
            turning = None if self.zero_rotation else now.eef_rot
            waypoint = ahead(answer, now.eef_pos, self.gripper, turning)
            target = waypoint.position
            rotation = None if self.zero_rotation else waypoint.rotation
            steps = 0
            # drive there
            while steps < SERVO_STEPS and distance(target, now) >= SERVO_TOLERANCE:
                now = yield self._towards(target, rotation, now)
                steps += 1
            # the EEF stands still while the fingers move
            if waypoint.gripper != self.gripper and distance(target, now) < FLIP_DISTANCE:
                self.gripper, held = waypoint.gripper, now.eef_pos
                for _ in range(GRIPPER_STEPS):
                    now = yield self._towards(held, None, now)
            # already there and nothing to do: time passes all the same
            elif distance(target, now) < SERVO_TOLERANCE:
                for _ in range(max(1, self.least - steps)):
                    now = yield self._towards(target, rotation, now)

    def _towards(self, target, rotation, now):
        return servo_action(
            now.eef_pos, target, self.gripper, rotation=rotation, eef_rot=now.eef_rot
        )


def distance(target, observation):
    """Metres from the EEF to a target (3,)."""
    return np.linalg.norm(target - observation.eef_pos)
