"""What stands in the gripper's way: boxes around all that can be touched, and how far an open
gripper stays from them. Metres in the world frame, z up.
"""

import mujoco
import numpy as np

# The open gripper as boxes in the EEF's frame: two corners each. The origin lies between the
# fingertips, z points out of the hand, and the fingers open along y.
HAND = ((-0.032, -0.105, -0.124), (0.032, 0.105, -0.026))
# outside of the open fingers: from 39 mm beside the middle, thick at the hand, thin at the tip
FINGERS = tuple(
    ((-0.011, min(inner, outer), low), (0.011, max(inner, outer), high))
    for inner, outer, low, high in (
        (0.039, 0.067, -0.0486, -0.02),
        (0.039, 0.053, -0.02, 0.0125),
        (-0.039, -0.067, -0.0486, -0.02),
        (-0.039, -0.053, -0.02, 0.0125),
    )
)
# the gripper comes down from above: heights over the grasp at which it is looked at too
APPROACH = (0.0, 0.04, 0.08)
FAR = 0.1  # metres that stand for "nothing near"
# metres that a gripper inside of something counts as deeper, for each share of it that is inside
INSIDE = 0.05


def up(height):
    """A vector (3,) of so many metres upwards."""
    return np.array([0.0, 0.0, height])


def lattice(low, high, step):
    """Points (P,3) about `step` metres apart all over the box between two corners (3,)."""
    axes = [np.linspace(a, b, 2 + int((b - a) / step)) for a, b in zip(low, high)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def gripper_points():
    """Points (P,3) all over the open gripper, in the EEF's frame."""
    return np.concatenate([lattice(*HAND, 0.02), *(lattice(*box, 0.01) for box in FINGERS)])


def owners(scene):
    """For each geom the object or fixture that it is part of, "robot", or None."""
    model = scene.sim.model._model
    objects = {body: name for name, body in scene.env.env.obj_body_id.items()}
    found = []
    for body in model.geom_bodyid:
        # up the tree of bodies until one is known
        owner = None
        while body > 0 and owner is None:
            robot = model.body(body).name.startswith(("robot", "gripper", "mount"))
            owner = "robot" if robot else objects.get(body)
            body = model.body_parentid[body]
        found.append(owner)
    return found


class Boxes:
    """Boxes around the geoms that can be touched, where they are now; N of them, the robot's left
    out.

    centres (N,3) and halves (N,3) m, axes (N,3,3) with the box's axes as columns; low and high
    (N,3), the upright bounds. only, without: names of objects and fixtures; None in `without` is
    what belongs to neither, such as the table.
    """

    def __init__(self, scene, only=None, without=()):
        model, data = scene.sim.model._model, scene.sim.data._data
        touched = (model.geom_contype | model.geom_conaffinity) > 0
        touched &= model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE
        keep = [
            geom
            for geom, owner in enumerate(owners(scene))
            if touched[geom]
            and owner != "robot"
            and owner not in without
            and (only is None or owner in only)
        ]
        self.axes = data.geom_xmat[keep].reshape(-1, 3, 3)
        # geom_aabb: centre and half sizes in the geom's own frame
        own_centres, self.halves = model.geom_aabb[keep, :3], model.geom_aabb[keep, 3:]
        self.centres = data.geom_xpos[keep] + np.einsum("nij,nj->ni", self.axes, own_centres)
        reach = np.einsum("nij,nj->ni", np.abs(self.axes), self.halves)
        self.low, self.high = self.centres - reach, self.centres + reach

    def distance(self, points):
        """Metres (P,) from each point (P,3) to the nearest box, negative inside, at most FAR."""
        near = (self.low < points.max(0) + FAR).all(1) & (self.high > points.min(0) - FAR).all(1)
        axes, centres, halves = self.axes[near], self.centres[near], self.halves[near]
        # (P,N,3): beyond the faces of each box, along its own axes
        beyond = np.abs(np.einsum("nij,pni->pnj", axes, points[:, None] - centres)) - halves
        outside = np.linalg.norm(np.maximum(beyond, 0), axis=-1)
        return (outside + np.minimum(beyond.max(-1), 0)).min(1, initial=FAR)

    def extent(self, axis):
        """(lowest, highest) metres of all boxes along a direction (3,) from the world's origin."""
        middle = self.centres @ axis
        reach = (np.abs(np.einsum("nij,i->nj", self.axes, axis)) * self.halves).sum(1)
        return (middle - reach).min(), (middle + reach).max()

    def surface(self, xy, radius=0.02):
        """Height of the highest box at a small disc around xy (2,); -1 where there is none."""
        hit = (self.low[:, :2] < xy + radius) & (self.high[:, :2] > xy - radius)
        return self.high[hit.all(1), 2].max(initial=-1.0)

    def skyline(self, start, end, radius=0.10):
        """Height of the highest box within `radius` of the way from start to end, as seen from
        above; -1 where there is none.
        """
        start, end = np.asarray(start)[:2], np.asarray(end)[:2]
        count = 2 + int(np.linalg.norm(end - start) / 0.03)
        way = start + np.linspace(0, 1, count)[:, None, None] * (end - start)
        # (points,N,2): from the way to the box, zero above it
        gap = np.maximum(np.maximum(self.low[:, :2] - way, way - self.high[:, :2]), 0)
        near = (np.linalg.norm(gap, axis=-1) < radius).any(0)
        return self.high[near, 2].max(initial=-1.0)


def clearance(boxes, eef, rotation, table, approach=APPROACH):
    """Metres between the open gripper and what is nearest of boxes and table, while it comes down
    to `eef` (3,) with `rotation` (3,3); negative where it would hit.

    table: height of the table, of which 3 mm more may be touched.
    """
    points = eef + gripper_points() @ rotation.T
    gaps = points[:, 2] - table + 0.003
    for height in approach:
        gaps = np.minimum(gaps, boxes.distance(points + up(height)))
    return float(gaps.min() - INSIDE * (gaps < 0).mean())
