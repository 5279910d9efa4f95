"""A row of LeRobot's batch: one episode, from waypoints to one action per control step."""

from sim.expert import servo_action
from sim.rollout import check_waypoint
from sim.servo import Servo


class Row:
    """One episode of one robot.

    decide: observation -> Waypoint, called when a decision is due, as in sim/rollout.run_episode.
    zero_rotation: the gripper keeps its orientation. least: control steps that a decision takes
    where there is nothing to do.
    """

    def __init__(self, decide, zero_rotation=True, least=1):
        self.decide = decide
        self.servo = Servo(zero_rotation=zero_rotation, least=least)
        self.decisions = 0

    def action(self, observation):
        """The OSC_POSE action (7,) in [-1, 1] for an Observation of sim/libero_env.py.

        Raises PolicyError for a waypoint that is not finite.
        """
        eef, eef_rot = observation.eef_pos, observation.eef_rot
        while self.servo.due(eef, eef_rot):
            answer = self.decide(observation)
            check_waypoint(answer)
            self.servo.follow(answer, eef, eef_rot)
            self.decisions += 1
        target, rotation = self.servo.step()
        return servo_action(eef, target, self.servo.gripper, rotation=rotation, eef_rot=eef_rot)
