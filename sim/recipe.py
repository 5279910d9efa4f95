"""The recipe: one set of demonstrations for every column of the verdict. NumPy only.

Bowl and plate stand anywhere in the training half of the table, each drawn by itself, so that
neither tells where the other is. Half of the demonstrations are in the clean scene, half in the
full one: there the cookies are drawn like the plate, ramekin and second bowl stay near their usual
places, which tells the two bowls apart. Each demonstration has a camera of its own, orbited by up
to THETA["train"] degrees in any direction, nearer or farther and turned in place, then turned about
the robot's base. Half begin with a grasp that fails, which the expert makes good.

    y, m      -0.22 .. -0.07 | -0.05 .. 0.00 | 0.00 .. 0.26
    is for    the test       | validation    | training

Nothing of the test side is trained on. Joint layouts of a test are drawn again, see `held_out`.
What is drawn depends on part, --seed, index and attempt alone.
"""

from dataclasses import replace

import numpy as np

from runtime import UserError
from sim import settings

# the task that the recipe is made for, and its objects
TASK = ("libero_spatial", 0)
BOWL, PLATE, COOKIES, RAMEKIN, OTHER_BOWL = (
    "akita_black_bowl_1",
    "plate_1",
    "cookies_1",
    "glazed_rim_porcelain_ramekin_1",
    "akita_black_bowl_2",
)
# metres; all objects of a layout have their y in the same range
Y = {"train": (0.0, 0.26), "val": (-0.05, 0.0), "test": (-0.22, -0.07)}
X = {BOWL: (-0.30, -0.03), PLATE: (-0.18, 0.09), COOKIES: (-0.30, 0.09)}
# mean places (2,) m over the init states of libero_spatial; LIBERO-PRO swaps plate and cookies
USUAL = {
    BOWL: (-0.052, 0.200),
    PLATE: (0.064, 0.199),
    COOKIES: (0.071, 0.028),
    RAMEKIN: (-0.199, 0.200),
    OTHER_BOWL: (-0.180, 0.321),
}
SWAPPED = {**USUAL, PLATE: USUAL[COOKIES], COOKIES: USUAL[PLATE]}
# to validate on: plate and cookies at places of each other's kind, the bowl elsewhere
VAL_SWAP = {**USUAL, BOWL: (-0.15, 0.08), PLATE: (0.02, 0.17), COOKIES: (-0.02, 0.015)}
JITTER = 0.025  # metres in x and in y, of objects that stay near their usual places
# degrees between a camera and agentview, seen from the workspace; directions are free
THETA = {"train": (0.0, 9.0), "val": (10.5, 12.5)}
# metres on the table: radius of each object, and room that is kept between two
RADIUS = {BOWL: 0.06, PLATE: 0.08, COOKIES: 0.052, RAMEKIN: 0.045, OTHER_BOWL: 0.06}
ROOM = 0.012
# a bowl's foot is narrow: its rim may be over the plate's, as in the benchmark, 12 cm apart
BOWL_TO_PLATE = 0.115
# share of layouts in which the bowl is drawn before the plate: what is drawn last has to go where
# room is left
BOWL_FIRST = 0.6
TRIES = 200  # at a place, until the layout is begun anew
# where the outer finger comes down beside the bowl's rim, from the bowl's centre, and its radius
FINGER, TO_FINGER, FINGER_RADIUS = "finger", np.array([0.0, -0.09]), 0.015
# low and high corners of the stove's plate in the full scene, with its own jitter
STOVE = np.array([[-0.375, -0.255], [-0.16, -0.04]])
# metres around both places of a pair of bowl and plate that is held out: `shifted` moves each by
# 5 cm from where the init states have it, give or take 1.5 cm
HELD_OUT = ((USUAL, 0.08), (SWAPPED, 0.05), (VAL_SWAP, 0.05))
BASE = (-0.66, 0.0)  # of the robot, metres
# A camera is also put there as by hand: degrees of roll, of pan and of tilt, times the distance.
# Orbits alone keep the pivot in the middle of every image, upright and at one scale: a policy then
# learns images where it should learn rays.
ROLL, PAN, DISTANCE = 6.0, 3.0, (0.9, 1.15)
# defaults of the flags by which collect_demos.py varies start, camera and attempts, by part
START_SPREAD = {"train": 0.3, "val": 0.0}
TURN_SPREAD = {"train": 40.0, "val": 0.0}
LOOSE_CAMERA = {"train": 1.0, "val": 0.0}
# share of demonstrations that begin with a grasp that fails, see sim/mistakes.py
MISTAKE_RATE = {"train": 0.5, "val": 0.0}
N_DEMOS = {"train": 192, "val": 24}
PURPOSE = {"train": "recipe", "val": "val_recipe"}


def check_task(task):
    """Raise UserError for a sim.tasks.Task that the recipe is not made for."""
    if (task.suite, task.index) != TASK:
        raise UserError(
            f"--setting recipe: it is made for the table of {TASK[0]} task {TASK[1]}, not for "
            f"{task.key}; leave out --task_suite and --task_id, or choose another --setting"
        )


def is_clean(part, seed, index):
    """True if a demonstration is in the clean scene: one of every two, in an order that is drawn.

    Where every second demonstration had it, the held-out ones could all be of one scene.
    Validation demonstrations all are: in the full scene the strip has the stove in it.
    """
    if part == "val":
        return True
    first = np.random.default_rng(settings.random_seed("recipe_scene", seed, index // 2))
    return bool(index % 2 == first.integers(2))


def drawn(part, seed, index, attempt, clean):
    """The places of a demonstration -> settings.Condition. Its camera is drawn by `views`, once
    it is known where the arm starts.

    clean: whether the scene holds bowl and plate alone.
    """
    rng = np.random.default_rng([*settings.random_seed(PURPOSE[part], seed, index, attempt), 31])
    return layout(rng, part, clean)


def layout(rng, part, clean):
    """A settings.Condition with the places of a part's objects, drawn until none meets another and
    no layout of a test is among them.
    """
    places = None
    while places is None:
        places = _places(rng, part, clean)
    return settings.Condition(places=tuple((n, *p) for n, p in places.items()))


def _places(rng, part, clean):
    """Places {name: (2,) m} of the objects, or None where they do not find room.

    One after the other: all at once, layouts would be few where several objects may be, and the
    bowl would hardly ever stand between plate and ramekin, where the benchmark has it.
    """
    places = {}
    if not clean:
        for name in (RAMEKIN, OTHER_BOWL):
            places[name] = (USUAL[name] + rng.uniform(-JITTER, JITTER, 2)).tolist()
        if not apart(places, clean):
            return None
    order = [BOWL, PLATE] if rng.random() < BOWL_FIRST else [PLATE, BOWL]
    for name in order if clean else [*order, COOKIES]:
        for _ in range(TRIES):
            places[name] = rng.uniform(*np.transpose([X[name], Y[part]])).tolist()
            if apart(places, clean) and not held_out(places):
                break
        else:
            return None
    return places


def held_out(places):
    """True for places {name: (2,) m} in which bowl and plate both stand near where a test has them,
    on the init states of libero_spatial or with plate and cookies swapped, or where the swap is
    validated.
    """
    if BOWL not in places or PLATE not in places:
        return False
    far = lambda name, usual: np.linalg.norm(np.subtract(places[name], usual[name]))
    return any(max(far(BOWL, at), far(PLATE, at)) < limit for at, limit in HELD_OUT)


def apart(places, clean):
    """True if no two objects of places {name: (2,) m} meet, and nothing stands where the gripper
    comes down to the bowl's rim.
    """
    far = lambda a, b: np.linalg.norm(np.subtract(a, b))
    # (name, place, radius) of all that may not meet, the gripper's finger among them
    things = [(n, p, RADIUS[n] + ROOM / 2) for n, p in places.items()]
    if BOWL in places:
        things.append((FINGER, np.add(places[BOWL], TO_FINGER), FINGER_RADIUS))
    for i, (a, at, radius) in enumerate(things):
        for b, other, theirs in things[:i]:
            least = BOWL_TO_PLATE if {a, b} == {BOWL, PLATE} else radius + theirs
            if {a, b} != {BOWL, FINGER} and far(at, other) < least:
                return False
        # the nearest point of the stove's plate
        if not clean and far(at, np.clip(at, *STOVE)) < radius:
            return False
    return True


def views(rng, part, turn_spread, n, loose=0.0):
    """n candidates for a demonstration's camera, drawn in this order -> [settings.Condition].

    turn_spread: degrees about the robot's base, up to +-; loose: share of ROLL, PAN and DISTANCE by
    which it is put as by hand. Validation views that decode badly are left out, see
    settings.decode_error.
    """
    found = []
    while len(found) < n:
        theta, phi = rng.uniform(*THETA[part]), rng.uniform(0, 360)
        view = settings.Condition(theta, phi, turn=rng.uniform(-turn_spread, turn_spread))
        if loose:
            roll, pan, tilt = loose * np.array([ROLL, PAN, PAN]) * rng.uniform(-1, 1, 3)
            distance = float(rng.uniform(*DISTANCE)) ** loose
            view = replace(view, roll=roll, pan=pan, tilt=tilt, distance=distance)
        if part == "train" or not settings.why_excluded(settings.Condition(theta, phi)):
            found.append(view)
    return found
