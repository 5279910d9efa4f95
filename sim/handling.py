"""Which object an episode's gripper touched first, and which was lifted first."""

import numpy as np

LIFTED = 0.03  # metres above rest at which an object counts as grasped


class Handling:
    """Account of a scene's movable objects from its state of now on.

    touched, lifted: the first object's name, None for none yet.
    """

    def __init__(self, scene):
        self.scene, self.touched, self.lifted = scene, None, None
        self.rest = {name: float(scene.position(name)[2]) for name in scene.objects}
        model = scene.sim.model
        numbers = lambda thing: [model.geom_name2id(geom) for geom in thing.contact_geoms]
        # by geom: the object that it is of, -1 for none; and whether it is of the gripper
        self.owner, self.grips = np.full(model.ngeom, -1), np.zeros(model.ngeom, bool)
        for i, name in enumerate(self.rest):
            self.owner[numbers(scene.env.env.objects_dict[name])] = i
        self.grips[numbers(scene.robot.gripper)] = True

    def note(self):
        """Book the state that the last step led to."""
        if self.touched is None:
            self.touched = self._touching()
        if self.lifted is None:
            height = lambda name: self.scene.position(name)[2]
            risen = (name for name, z in self.rest.items() if height(name) > z + LIFTED)
            self.lifted = next(risen, None)

    def _touching(self):
        """Name of an object that the gripper touches now, or None."""
        pairs = np.array(self.scene.sim.data.contact.geom).reshape(-1, 2)
        # a pair may name the gripper first, or last
        for ours, theirs in ((0, 1), (1, 0)):
            met = self.owner[pairs[self.grips[pairs[:, ours]], theirs]]
            if (met >= 0).any():
                return list(self.rest)[met.max()]
        return None
