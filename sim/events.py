"""What happens to a scene while the robot acts.

`moved_midway`: when the arm first hovers over the bowl, the bowl is set aside. A policy that looks
at every decision follows it, a plan that is played to its end does not.
"""

import numpy as np

from sim import settings
from sim.expert import GRASP

# metres: how far aside, how near to the grasp's xy the EEF hovers, how far above the grasp it has
# to be still, out of reach of the bowl's rim
ASIDE, HOVERS, ABOVE = 0.05, 0.03, 0.035
# metres that the bowl's new centre is from where it would have been grasped: a grasp that was
# planned before closes beside the bowl. Moved towards -y, its middle would come under the gripper.
BESIDE = 0.065
# directions that are tried in turn, each by the golden angle on from the last one
DIRECTIONS, GOLDEN = 24, np.pi * (3 - 5**0.5)


class MovedMidway:
    """Sets the scene's bowl ASIDE, once, in a direction that is drawn by the episode's index.

    purpose: one of settings.PURPOSES; seed: of the draw.
    `row`: None before, then what episodes record, {"step",
    "from", "to"}, positions (2,) m; {"step", "from", "to": None} where no direction was free.
    """

    def __init__(self, purpose, index, seed=0):
        rng = np.random.default_rng(settings.random_seed(purpose, seed, index))
        self.angles = rng.uniform(0, 2 * np.pi) + GOLDEN * np.arange(DIRECTIONS)
        self.row = None

    def note(self, scene, step):
        """Called after every control step: set the bowl aside if the arm hovers for the first
        time.
        """
        if self.row is not None:
            return
        bowl, eef = scene.position(scene.pick), scene.observe(image=False).eef_pos
        off = eef - (bowl + GRASP)
        if np.linalg.norm(off[:2]) > HOVERS or off[2] < ABOVE:
            return
        self.row = {"step": step, "from": bowl[:2].round(4).tolist(), "to": None}
        for angle in self.angles:
            aside = bowl[:2] + ASIDE * np.array([np.cos(angle), np.sin(angle)])
            planned = np.linalg.norm((bowl + GRASP)[:2] - aside)
            if planned > BESIDE and scene.set_aside(scene.pick, aside):
                self.row["to"] = scene.position(scene.pick)[:2].round(4).tolist()
                return
