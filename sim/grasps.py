"""Where an object can be gripped, and which grasp is chosen: by clearance, by reach, and the same
one in all layouts of a task where it can be.
"""

from dataclasses import dataclass

import numpy as np

from rot_utils import euler_to_matrix, rotvec_to_matrix
from sim.clearance import Boxes, clearance, up
from sim.object_facts import (
    BELOW_TOP,
    BELOW_TOP_USUAL,
    RIM_HEIGHTS,
    RIM_RADIUS,
    TIP_ROOM,
    WIDEST,
    kind,
)

# the gripper's rotation when it points down, its fingers closing along y, as at the start
DOWN = euler_to_matrix(np.array([np.pi, 0, 0]))
# degrees in the order in which they are tried: few and coarse first
YAWS = (0, 30, -30, 60, -60, 90, 15, -15, 45, -45, 75, -75)
# metres of room from which on a grasp is taken; a task's own is kept with less, as the boxes are
# larger than what is in them
ROOM, KEPT_ROOM = 0.005, -0.005
# cosine of the tilt from which on a bowl leans; and degrees of yaw that a rim point is worth by so
# many metres that it is higher than another
LEANS, YAW_PER_METRE = 0.97, 2300
# metres from the robot's base, from above, beyond which the elbow locks straight
REACH = 0.77


def turned(degrees):
    """The rotation (3,3) of a gripper that points down, turned about the vertical."""
    return rotvec_to_matrix(np.array([0, 0, np.radians(degrees)])) @ DOWN


@dataclass
class Grasp:
    """One way to grip an object.

    name: side or "top", yaw, and "high" for the upper one of two heights; offset: from the object's
    origin to the EEF (3,) m in the world; yaw in degrees; room: metres between the open gripper and
    what is nearest, less what it is out of reach.
    """

    name: str
    offset: np.ndarray
    yaw: int
    room: float = None

    @property
    def rotation(self):
        return turned(self.yaw)


def grasps(scene, name):
    """All grasps of an object, in the order in which they are preferred where there is room."""
    if kind(name) not in RIM_RADIUS:
        return top_grasps(scene, name)
    axis, radius = axis_of(scene, name), RIM_RADIUS[kind(name)]
    if axis[2] > LEANS:
        return rim_grasps(radius, up(1))
    # at the rim's lower side the fingers would catch what the bowl leans on
    found = rim_grasps(radius, axis)
    return sorted(found, key=lambda grasp: abs(grasp.yaw) - YAW_PER_METRE * grasp.offset[2])


def axis_of(scene, name):
    """The object's own z axis (3,) in the world: up where it stands upright."""
    body = scene.env.env.obj_body_id[name]
    return scene.sim.data.body_xmat[body].reshape(3, 3)[:, 2]


def rim_grasps(radius, axis):
    """Grasps of a bowl whose rim stands between the fingers. axis (3,): the bowl's own."""
    found = []
    for height, word in zip(RIM_HEIGHTS, ("", " high")):
        for yaw in YAWS:
            for side, sign in (("-y", -1), ("+y", 1)):
                # the point of the rim turns along with the fingers, which straddle it
                turn = rotvec_to_matrix(np.array([0, 0, np.radians(yaw)]))
                side_way = turn @ [0, sign, 0]
                out = side_way - axis * (side_way @ axis)  # along the rim's plane
                offset = radius * out / np.linalg.norm(out) + height * axis
                found.append(Grasp(f"{side} {yaw}{word}", offset, yaw))
    return found


def top_grasps(scene, name):
    """Grasps from above, for each yaw along which the object is narrow enough."""
    own, origin = Boxes(scene, only=(name,)), scene.position(name)
    low, high = own.low.min(0), own.high.max(0)
    height = max(high[2] - BELOW_TOP.get(kind(name), BELOW_TOP_USUAL), low[2] + TIP_ROOM)
    middle = np.array([*(low + high)[:2] / 2, height])
    found = []
    for yaw in YAWS:
        near, far = own.extent(turned(yaw)[:, 1])
        if far - near < WIDEST:
            found.append(Grasp(f"top {yaw}", middle - origin, yaw))
    return found


def room(scene, boxes, grasp, name, goal):
    """Metres of room that a grasp has: clearance, less what object or goal (3,) is out of reach."""
    table, base = scene.support, scene.position_of_base()
    at = scene.position(name) + grasp.offset
    farthest = max(np.linalg.norm((point - base)[:2]) for point in (at, goal + grasp.offset))
    return clearance(boxes, at, grasp.rotation, table) - max(0.0, farthest - REACH)


def choose(scene, boxes, name, goal, preferred=None, tried=()):
    """The Grasp to take for an object that is to be brought to goal (3,), or None where it is too
    wide.

    preferred: name of the grasp that is taken as long as it has KEPT_ROOM. Then the first one with
    ROOM, else the one with most room. tried: names of grasps that missed, which come last.
    """
    options = grasps(scene, name)
    # the preferred grasp is of a bowl that stands; other objects' own axes point anywhere
    if kind(name) in RIM_RADIUS and axis_of(scene, name)[2] <= LEANS:
        preferred = None
    options = [g for g in options if g.name not in tried] or options
    for grasp in [g for g in options if g.name == preferred]:
        grasp.room = room(scene, boxes, grasp, name, goal)
        if grasp.room > KEPT_ROOM:
            return grasp
    for grasp in options:
        grasp.room = room(scene, boxes, grasp, name, goal)
        if grasp.room > ROOM:
            return grasp
    return max(options, key=lambda g: g.room, default=None)
