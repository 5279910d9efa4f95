"""Episodes that cannot succeed any more, because what happens repeats.

A policy that is a function of one image answers an equal image equally, and the simulator has no
chance in it. So where state and decision come back again and again, they do so for ever. The rule
asks for DECISIONS decisions in a row in which everything stays within TOLERANCE: all joints of arm,
fingers, objects and fixtures, the waypoint, and both gripper commands; or in which it goes through
up to PERIOD such states in turn.

It can be wrong. Below the tolerance something may creep (an object that slides by a hundredth of a
millimetre a step) until an image changes that a decision hangs on. A policy with a history may
count its decisions, and needs as many equal ones in its window as it remembers. With --sample the
next draw may differ. `python -m study.stalled` tells from recorded traces how often that was so.
"""

import numpy as np

DECISIONS = 30  # in a row
TOLERANCE = 0.001  # m, rad, or of a quaternion's numbers
PERIOD = 4  # states that may take turns


def repeats(states, tolerance=TOLERANCE, period=PERIOD):
    """True if states (K,D), one a decision, stand still or take turns: every p-th of them stays
    within `tolerance`, for a p of at most `period`.
    """
    # range of each of the D numbers over the decisions
    within = lambda part: np.ptp(part, axis=0).max() <= tolerance
    return any(all(within(states[r::p]) for r in range(p)) for p in range(1, period + 1))


def first_stall(states, decisions=DECISIONS, tolerance=TOLERANCE, period=PERIOD):
    """Index of the decision after which states (N,D) are stalled, None where they never are."""
    for end in range(decisions, len(states) + 1):
        if repeats(states[end - decisions : end], tolerance, period):
            return end - 1
    return None


class Watch:
    """Notes the state at every decision of an episode.

    stop: `note` says when the episode is stalled; without it states are only recorded.
    """

    def __init__(self, stop=False):
        self.stop, self.states, self.steps = stop, [], []

    def note(self, scene, waypoint, gripper, step):
        """Note the state before a decision is carried out -> True if the episode is to end now.
        gripper: the command that holds now; step: the control step.
        """
        asked = [*waypoint.position, waypoint.gripper, gripper]
        self.states.append(np.concatenate([scene.joints(), asked]))
        self.steps.append(step)
        recent = np.array(self.states[-DECISIONS:])
        return self.stop and len(recent) == DECISIONS and repeats(recent)

    def save(self, path):
        """Write an npz of what was noted: states (N,D) and control steps (N,), one a decision."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, states=np.array(self.states), steps=np.array(self.steps))
