"""The cameras of public LIBERO data, by task, and what their scenes stand on: those datasets hold
neither.

All 40 tasks have one of four agentviews, which differ by the kind of scene. Positions and rotations
are those that LIBERO's own classes of scenes set (`_setup_camera`); the field of view is MuJoCo's
default, 45 degrees.
"""

import numpy as np

import camera
from rot_utils import quat_to_matrix

FOVY = 45.0  # degrees, vertical
# two rotations, wxyz as MuJoCo has them: from above the table, and from nearer to the floor
STEEP = (0.6380177736282349, 0.3048497438430786, 0.30484986305236816, 0.6380177736282349)
FLAT = (0.6182166934013367, 0.3432307541370392, 0.3432314395904541, 0.6182177066802979)
# kind of scene: position in m in the world, rotation
SCENES = {
    "table": ((0.6586131746834771, 0.0, 1.6103500240372423), STEEP),
    "floor": ((0.8965773716836134, 5.216182733499864e-07, 0.65), FLAT),
    "living_room": ((0.6065773716836134, 0.0, 0.96), FLAT),
    "study": ((0.4586131746834771, 0.0, 1.6103500240372423), STEEP),
}
# kind of scene: height in m of the surface that its objects stand on
SUPPORTS = {"table": 0.90, "floor": 0.0, "living_room": 0.41, "study": 0.867}
# kind of scene by what LIBERO's own files call the problem, in small letters
PROBLEMS = {
    "libero_tabletop_manipulation": "table",
    "libero_kitchen_tabletop_manipulation": "table",
    "libero_floor_manipulation": "floor",
    "libero_living_room_tabletop_manipulation": "living_room",
    "libero_study_tabletop_manipulation": "study",
}
ONE_SCENE = {"libero_goal"}  # suites whose tasks share a scene, and are told apart by words alone
# suite: its tasks' instructions in the suite's order
_BOWL = "pick up the black bowl {} and place it on the plate"
_BASKET = "pick up the {} and place it in the basket"
TASKS = {
    "libero_spatial": (
        _BOWL.format("between the plate and the ramekin"),
        _BOWL.format("next to the ramekin"),
        _BOWL.format("from table center"),
        _BOWL.format("on the cookie box"),
        _BOWL.format("in the top drawer of the wooden cabinet"),
        _BOWL.format("on the ramekin"),
        _BOWL.format("next to the cookie box"),
        _BOWL.format("on the stove"),
        _BOWL.format("next to the plate"),
        _BOWL.format("on the wooden cabinet"),
    ),
    "libero_object": (
        _BASKET.format("alphabet soup"),
        _BASKET.format("cream cheese"),
        _BASKET.format("salad dressing"),
        _BASKET.format("bbq sauce"),
        _BASKET.format("ketchup"),
        _BASKET.format("tomato sauce"),
        _BASKET.format("butter"),
        _BASKET.format("milk"),
        _BASKET.format("chocolate pudding"),
        _BASKET.format("orange juice"),
    ),
    "libero_goal": (
        "open the middle drawer of the cabinet",
        "put the bowl on the stove",
        "put the wine bottle on top of the cabinet",
        "open the top drawer and put the bowl inside",
        "put the bowl on top of the cabinet",
        "push the plate to the front of the stove",
        "put the cream cheese in the bowl",
        "turn on the stove",
        "put the bowl on the plate",
        "put the wine bottle on the rack",
    ),
    "libero_10": (
        "put both the alphabet soup and the tomato sauce in the basket",
        "put both the cream cheese box and the butter in the basket",
        "turn on the stove and put the moka pot on it",
        "put the black bowl in the bottom drawer of the cabinet and close it",
        "put the white mug on the left plate and put the yellow and white mug on the right plate",
        "pick up the book and place it in the back compartment of the caddy",
        "put the white mug on the plate and put the chocolate pudding to the right of the plate",
        "put both the alphabet soup and the cream cheese box in the basket",
        "put both moka pots on the stove",
        "put the yellow and white mug in the microwave and close it",
    ),
}
SCENE_OF_SUITE = {"libero_spatial": "table", "libero_object": "floor", "libero_goal": "table"}
# of libero_10 by task
SCENE_OF_LONG_TASK = (
    *("living_room", "living_room", "table", "table", "living_room"),
    *("study", "living_room", "living_room", "table", "table"),
)
# of every task by its key, such as libero_spatial_0
SCENE_OF_KEY = {
    f"{suite}_{index}": SCENE_OF_SUITE.get(suite) or SCENE_OF_LONG_TASK[index]
    for suite, instructions in TASKS.items()
    for index in range(len(instructions))
}


def find_task(instruction):
    """(suite, index) of the LIBERO task with an instruction, or None for one of no suite."""
    words = plain(instruction)
    for suite, instructions in TASKS.items():
        if words in instructions:
            return suite, instructions.index(words)
    return None


def plain(instruction):
    """An instruction as TASKS has it: small letters, single spaces, no full stop."""
    return " ".join(instruction.lower().split()).rstrip(".")


def agentview(scene, size):
    """(K (3,3), E (4,4)) of a kind of scene's agentview, for square images of `size` pixels."""
    position, (w, x, y, z) = SCENES[scene]
    # of length 1 to the last digit, as MuJoCo makes it
    quat = np.array([x, y, z, w]) / np.linalg.norm([x, y, z, w])
    E = camera.extrinsics_from_mujoco(np.array(position), quat_to_matrix(quat))
    return camera.intrinsics(FOVY, size), E


def scene_of_task(instruction):
    """The kind of scene, a key of SCENES, of the LIBERO task with an instruction, or None for an
    unknown task.
    """
    found = find_task(instruction)
    return SCENE_OF_KEY[f"{found[0]}_{found[1]}"] if found else None


def support_of_task(instruction):
    """Height in m of what the objects of a LIBERO task stand on, or None for an unknown task."""
    return SUPPORTS.get(scene_of_task(instruction))


def camera_of_task(instruction, size):
    """(K, E) of the LIBERO task with an instruction, or None for an unknown task."""
    scene = scene_of_task(instruction)
    return agentview(scene, size) if scene else None
