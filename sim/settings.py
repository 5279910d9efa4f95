"""The settings that policies are compared in: which conditions train, tune and test them. NumPy
only.

    in_dist    the task as LIBERO has it
    viewpoint  agentview orbited about the workspace, 8 thetas in 0..25 deg x 8 phis. Split `outer`:
               trained on the inner half of theta, tested on the outer half. `hemisphere`: tested on
               cameras to the right, trained on the others
    position   bowl and plate shifted together on a 16 x 16 grid. Split `left_right`: trained on the
               image's left half, 128 positions, tested on 20 of the right half. `near_far`: on the
               half near the robot, tested on the far half
    recipe     bowl, plate and camera of each demonstration drawn by themselves, see sim/recipe.py
    cameras    any task, each demonstration's camera drawn by itself, see sim/moved_cameras.py

Nothing is trained in the settings `views`, `places` and `swap`: they are those of sim/verdict.py.

A condition's place in its list is fixed: demonstration or episode i has condition i mod n.
Validation conditions lie on the test side, so that they can tune what is to extrapolate, and apart
from every test condition: views half-way between the grid's, positions at least two grid steps off.
Views in which a perfect classifier would decode points of the expert's path more than 3 cm off, or
that lose sight of bowl, plate or path, are excluded from every part, see `excluded`.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from camera import extrinsics_from_mujoco, intrinsics, look_at, project, quantise
from rot_utils import quat_to_matrix, rotvec_to_matrix
from runtime import UserError

THETAS, PHIS = np.linspace(0, 25, 8), 45.0 * np.arange(8)  # degrees
# metres; x away from the robot, y to the image's right
DX, DY = np.linspace(-0.25, 0.02, 16), np.linspace(-0.40, 0.06, 16)
# the default first
SPLITS = {
    "in_dist": (None,),
    "viewpoint": ("outer", "hemisphere"),
    "position": ("left_right", "near_far"),
    "recipe": (None,),
    "cameras": (None,),
}
PARTS = ("train", "val", "test")
# what random numbers are for; a purpose's place is part of its seeds: append, never reorder
PURPOSES = (
    "train",
    "val",
    "test_position",
    "val_position",
    "val_layout",
    "sample",
    "recipe",
    "val_recipe",
    "recipe_scene",
    "verdict_position",
    "val_verdict_position",
    "val_verdict_swap",
    "moved_midway",
    "val_moved_midway",
    "plus_order",
    "val_cameras",
)
# numbers of a Condition that a setting varies
VARIED = {
    "viewpoint": ("theta", "phi"),
    "position": ("dx", "dy"),
    "recipe": ("theta", "phi", "turn", "roll", "pan", "tilt", "distance"),
    "views": ("theta", "phi"),
    "cameras": ("moved",),
}
# settings whose scene is the full one unless another is asked for
FULL_SCENES = ("in_dist", "swap", "cameras")

# LIBERO's tabletop scenes: agentview, and the expert's path on libero_spatial task 0 (metres)
FOVY, CAMERA_POSITION = 45.0, np.array([0.6586131746834771, 0.0, 1.6103500240372423])
# xyzw
CAMERA_QUAT = np.array(
    [0.3048497438430786, 0.30484986305236816, 0.6380177736282349, 0.6380177736282349]
)
# the camera orbits about the point of its axis at this height, just above the table
PIVOT_HEIGHT = 0.92
BOWL, PLATE, START = (
    np.array([-0.05, 0.20, 0.8984]),
    np.array([0.075, 0.20, 0.9025]),
    np.array([-0.2085, 0.0, 1.1733]),
)
# the EEF above the bowl, at the grasp, lifted, above the plate, at the release, retracted
KEY_POINTS = np.array(
    [
        [-0.05, 0.152, 1.035],
        [-0.05, 0.152, 0.935],
        [-0.05, 0.152, 1.075],
        [0.075, 0.152, 1.075],
        [0.075, 0.152, 0.9471],
        [0.075, 0.152, 1.0471],
    ]
)
BOWL_RADIUS, PLATE_RADIUS = 0.06, 0.09
# the grid that `decode_error` assumes: pixels, cells, bins, metres beyond the path's heights
SIZE, GRID, N_HEIGHT_BINS, MARGIN = 448, 56, 32, 0.02
DECODE_LIMIT = 0.03  # metres


@dataclass(frozen=True)
class Condition:
    """What differs from the task as LIBERO has it: the camera's orbit in degrees, the objects'
    common shift in metres; the camera's turn about the robot's base in degrees, the places of
    objects by themselves, ((name, x, y), ...) in metres. roll, pan, tilt in degrees and distance,
    a factor: see `loosened`. moved: a view of sim/moved_cameras.py, () for the task's own.
    """

    theta: float = 0.0
    phi: float = 0.0
    dx: float = 0.0
    dy: float = 0.0
    turn: float = 0.0
    places: tuple = ()
    roll: float = 0.0
    pan: float = 0.0
    tilt: float = 0.0
    distance: float = 1.0
    moved: tuple = ()

    def described(self, setting):
        """The numbers that a setting varies, {name: value}, as demonstrations and episodes record
        them.
        """
        found = {k: getattr(self, k) for k in VARIED.get(setting, ())}
        if self.places:
            found["places"] = {n: [round(x, 4), round(y, 4)] for n, x, y in self.places}
        return found

    @property
    def place_of(self):
        """{name: (x, y)} m of the objects that are placed by themselves."""
        return {n: (x, y) for n, x, y in self.places}


def random_seed(purpose, seed, index, attempt=0):
    """128 bits as a list of four uint32, for one of PURPOSES.

    No two (purpose, seed, index, attempt) share them, whatever --seed is. A sum such as
    1000 * seed + index would be the same for several of them.
    """
    words = np.random.SeedSequence([PURPOSES.index(purpose), seed, index, attempt]).generate_state(
        4
    )
    return [int(word) for word in words]


def default_camera():
    """(K (3,3), E (4,4)) of agentview at SIZE px, where LIBERO's tabletop scenes have it."""
    unit = CAMERA_QUAT / np.linalg.norm(CAMERA_QUAT)  # LIBERO's own is 2e-7 longer
    return intrinsics(FOVY, SIZE), extrinsics_from_mujoco(CAMERA_POSITION, quat_to_matrix(unit))


def orbit(E, theta, phi):
    """Camera-to-world E (4,4), orbited about the pivot: the point of its axis at PIVOT_HEIGHT. It
    goes on looking at the pivot, upright.

    theta: degrees between the new place and the old one, seen from the pivot. phi: degrees of the
    direction in which the camera goes, 0 down, 90 to the image's right, 180 up.
    """
    # columns of R: the image's right, the image's down and the view direction, in the world
    R, position, (theta, phi) = E[:3, :3], E[:3, 3], np.radians([theta, phi])
    pivot = _pivot(E)
    sideways = np.cos(phi) * R[:, 1] + np.sin(phi) * R[:, 0]
    # on the sphere about the pivot, by theta from the old place in the direction of phi
    moved = np.eye(4)
    moved[:3, 3] = pivot + np.linalg.norm(position - pivot) * (
        np.sin(theta) * sideways - np.cos(theta) * R[:, 2]
    )
    # E's own roll is kept
    moved[:3, :3] = look_at(moved[:3, 3], pivot)[:3, :3] @ look_at(position, pivot)[:3, :3].T @ R
    return moved


def loosened(E, roll=0.0, pan=0.0, tilt=0.0, distance=1.0):
    """Camera-to-world E (4,4) as a hand would put it there: `distance` times as far from the pivot
    of `orbit`, and turned in place by degrees: roll about its view direction, then pan to the
    image's right and tilt down.
    """
    pivot, moved = _pivot(E), E.copy()
    moved[:3, 3] = pivot + distance * (E[:3, 3] - pivot)
    # about the camera's own axes: x right, y down, z forward
    for axis, degrees in ((2, roll), (1, pan), (0, -tilt)):
        moved[:3, :3] = moved[:3, :3] @ rotvec_to_matrix(np.radians(degrees) * np.eye(3)[axis])
    return moved


def unturned(attributes):
    """The camera-to-world (4,4) that a demonstration's camera had before it was turned: agentview,
    orbited where the setting orbits it. attributes: the demonstration's own.
    """
    _, E = default_camera()
    orbited = orbit(E, attributes.get("theta", 0.0), attributes.get("phi", 0.0))
    loose = {k: attributes[k] for k in ("roll", "pan", "tilt", "distance") if k in attributes}
    return loosened(orbited, **loose)


def _pivot(E):
    """The point (3,) m of a camera's axis at PIVOT_HEIGHT."""
    return E[:3, 3] + E[:3, 2] * (PIVOT_HEIGHT - E[2, 3]) / E[2, 2]


def turned(E, degrees, axis):
    """Camera-to-world E (4,4) turned by `degrees` about the vertical line through axis (2,) m,
    counterclockwise seen from above.

    Turned about the robot's base, the image looks as if the world, robot and all, were turned the
    other way: how an arm looks no longer tells on which side of the robot it is.
    """
    # x -> T x + (a - T a): the turn T that leaves the axis a where it is
    (c, s), turn = (np.cos(np.radians(degrees)), np.sin(np.radians(degrees))), np.eye(4)
    turn[:2, :2] = [[c, -s], [s, c]]
    turn[:2, 3] = np.asarray(axis) - turn[:2, :2] @ axis
    return turn @ E


def expert_line(step=0.005):
    """Points (N,3) every `step` metres along the expert's path from START through KEY_POINTS."""
    corners = np.concatenate([START[None], KEY_POINTS])
    legs = [
        np.linspace(a, b, 1 + math.ceil(np.linalg.norm(b - a) / step))
        for a, b in zip(corners, corners[1:])
    ]
    return np.concatenate(legs)


def decode_error(E):
    """The largest distance in metres between a point of the expert's path and the centre of its
    cell and height bin, seen from camera-to-world E (4,4).
    """
    line, (K, _) = expert_line(), default_camera()
    low, high = line[:, 2].min() - MARGIN, line[:, 2].max() + MARGIN
    return float(
        np.linalg.norm(
            quantise(line, K, E, GRID, SIZE, low, high, N_HEIGHT_BINS) - line, axis=1
        ).max()
    )


def in_image(E, shift=(0.0, 0.0)):
    """True if bowl, plate and the expert's path lie inside the image seen from camera-to-world E
    (4,4). shift: (dx, dy) m by which bowl, plate and the path between them are moved.
    """
    # the outlines of bowl and plate as 24 points each
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    ring = np.stack([np.cos(angle), np.sin(angle), 0 * angle], -1)
    points = np.concatenate(
        [BOWL + BOWL_RADIUS * ring, PLATE + PLATE_RADIUS * ring, KEY_POINTS]
    ) + np.array([*shift, 0.0])
    u, v, depth = project(np.concatenate([START[None], points]), default_camera()[0], E)
    return bool((depth > 0).all() and min(u.min(), v.min()) >= 0 and max(u.max(), v.max()) <= SIZE)


@functools.cache
def why_excluded(condition):
    """Why the view of a Condition is left out of all parts, in words, or None."""
    E = orbit(default_camera()[1], condition.theta, condition.phi)
    if not in_image(E):
        return "bowl, plate or path outside the image"
    error = decode_error(E)
    return f"decodes up to {100 * error:.1f} cm off" if error > DECODE_LIMIT else None


def spread(items):
    """The items in an order whose first few are spread over all of them. It walks around the list
    in steps of about the golden section.
    """
    # a step without a common divisor with n visits every item once
    n = len(items)
    step = next((k for k in range(round(0.618 * n), n) if math.gcd(k, n) == 1), 1)
    return [items[i * step % n] for i in range(n)]


def _views(part, split):
    """All views of a part, with those that will be excluded."""
    # phi of cameras that go to the image's right, see `orbit`
    right = lambda phi: 0 < phi < 180
    if part == "val":  # half-way between the grid's views, and one a direction
        thetas, phis = (THETAS[1:] + THETAS[:-1]) / 2, PHIS + 22.5
        if split == "outer":
            return [Condition(thetas[4 + i % 3], phi) for i, phi in enumerate(phis)]
        return [
            Condition(theta, phi)
            for i, theta in enumerate(thetas[1:])
            for phi in phis[1:3][i % 2 :: 2]
        ]
    # at 0 all phis are one view
    grid = [Condition(theta, phi) for theta in THETAS for phi in PHIS if theta > 0 or phi == 0]
    # which of the grid's views test; the others train
    tests = (
        (lambda c: c.theta >= THETAS[4])
        if split == "outer"
        else (lambda c: c.theta > 0 and right(c.phi))
    )
    return [c for c in grid if tests(c) == (part == "test")]


def _positions(part, split):
    """All positions of a part. Every fourth row of the tested half tests, and rows between them
    validate.
    """
    # (16,16): a row for each dx, a column for each dy
    grid = np.array([[Condition(dx=dx, dy=dy) for dy in DY] for dx in DX])
    # rows across, columns from the trained half to the tested one
    grid = grid if split == "left_right" else grid.T
    rows, columns = {
        "train": (range(16), range(8)),
        "test": ((1, 5, 9, 13), (8, 10, 12, 13, 15)),
        "val": ((3, 7, 11, 15), (9, 14)),
    }[part]
    return [grid[r, c] for r in rows for c in columns]


def resolve_split(setting, split=None):
    """The split that is asked for, or the setting's default one. Raises UserError for a split that
    the setting does not have.
    """
    splits = SPLITS.get(setting, (None,))
    if split is None or split in splits:
        return split or splits[0]
    known = " or ".join(map(str, splits))
    raise UserError(
        f"--split {split}: setting {setting} has "
        + ("no splits" if known == "None" else f"{known}")
    )


def conditions(setting, part, split=None):
    """The conditions of one of PARTS, in their fixed order -> list of Condition. Raises UserError
    for an unknown split. Those of `recipe` and `cameras` are drawn by index, see there.
    """
    split = resolve_split(setting, split)
    if setting in ("in_dist", "recipe", "cameras"):
        return [Condition()]
    if setting == "position":
        return spread(_positions(part, split))
    return spread([c for c in _views(part, split) if not why_excluded(c)])


def excluded(split=None):
    """The viewpoint setting's views that no part uses -> [(part, Condition, why)]."""
    split = resolve_split("viewpoint", split)
    return [
        (part, c, why_excluded(c)) for part in PARTS for c in _views(part, split) if why_excluded(c)
    ]


def clean_by_default(setting):
    """True for settings in which distractors and fixtures would stand in the way: of the shifted
    objects, or of the moved camera's view. None for the recipe, which has both scenes.
    """
    return None if setting == "recipe" else setting not in FULL_SCENES
