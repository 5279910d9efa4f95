"""Which camera an observation was taken with: its own, or that of LIBERO's scene.

LeRobot hands no camera to a policy. Our environment plugin does, as `observation.camera_intrinsics`
(B,3,3) px and `observation.camera_extrinsics` (B,4,4) camera-to-world with OpenCV axes, of the
upright image. Without them LIBERO's own agentview is meant, which is one of four, by scene.
"""

import numpy as np

from camera import fault
from formats import libero_cameras
from runtime import UserError

INTRINSICS, EXTRINSICS = "observation.camera_intrinsics", "observation.camera_extrinsics"
# scene, as --policy.scene names it -> kind of scene, as formats/libero_cameras.py does
KINDS = {
    "tabletop": "table",
    "study_tabletop": "study",
    "floor": "floor",
    "living_room_tabletop": "living_room",
}
# scene -> what its tasks' instructions begin or end with. LIBERO-Object puts one thing into the
# basket, LIBERO-Spatial the bowl onto the plate; all others are written out.
INSTRUCTIONS = {
    "living_room_tabletop": (
        "put both the alphabet soup and the tomato sauce in the basket",
        "put both the cream cheese box and the butter in the basket",
        "put both the alphabet soup and the cream cheese box in the basket",
        "put the white mug on the left plate and put the yellow and white mug on the right plate",
        "put the white mug on the plate and put the chocolate pudding to the right of the plate",
    ),
    "study_tabletop": ("pick up the book and place it in the back compartment of the caddy",),
    "floor": ("and place it in the basket",),
    "tabletop": (
        "and place it on the plate",
        "open the middle drawer of the cabinet",
        "open the top drawer and put the bowl inside",
        "push the plate to the front of the stove",
        "put the bowl on the plate",
        "put the bowl on the stove",
        "put the bowl on top of the cabinet",
        "put the cream cheese in the bowl",
        "put the wine bottle on the rack",
        "put the wine bottle on top of the cabinet",
        "turn on the stove",
        "turn on the stove and put the moka pot on it",
        "put the black bowl in the bottom drawer of the cabinet and close it",
        "put both moka pots on the stove",
        "put the yellow and white mug in the microwave and close it",
    ),
}


def scene_of(instruction):
    """The scene of a task of the four suites by its instruction; None for another one."""
    text = " ".join(instruction.lower().split())
    for scene, endings in INSTRUCTIONS.items():
        for ending in endings:
            # the two patterns are endings, of "pick up the ..."; the others are whole
            if text == ending or ending.startswith("and ") and text.endswith(ending):
                return scene
    return None


def agentview(scene, size):
    """(K (3,3), E (4,4)) of a scene's agentview at `size` pixels. Raises UserError for an unknown
    scene."""
    if scene not in KINDS:
        known = ", ".join(KINDS)
        raise UserError(f"--policy.scene={scene}: unknown; there are {known}")
    return libero_cameras.agentview(KINDS[scene], size)


def camera_of(batch, row, size, scene=None):
    """(K (3,3), E (4,4)) float64 of a row of LeRobot's batch, whose image has `size` pixels.

    scene: the one that is meant where the observation has no camera. Raises UserError where none is
    known, or where the observation's is no camera.
    """
    carried = [key for key in (INTRINSICS, EXTRINSICS) if key in batch]
    if len(carried) == 1:
        raise UserError(
            f"the observation has {carried[0]} alone; {INTRINSICS} and {EXTRINSICS} go together"
        )
    if carried:
        K, E = (np.asarray(batch[key][row].cpu(), dtype=np.float64) for key in carried)
        if wrong := fault(K, E, (size, size)):
            key = INTRINSICS if wrong[1] == "K" else EXTRINSICS
            raise UserError(f"{key} of row {row} {wrong[0]}")
        return K, E
    if scene is None:
        instruction = instruction_of(batch, row)
        scene = scene_of(instruction)
        if scene is None:
            raise UserError(
                f"the observation carries no camera ({INTRINSICS}, {EXTRINSICS}), and the task "
                f"'{instruction}' is none of LIBERO's four suites; give --policy.scene "
                f"({', '.join(KINDS)}), or use --env.type=libero_calibrated"
            )
    return agentview(scene, size)


def support_of(batch, row, scene=None):
    """Height in m of what the objects of a row's scene stand on, None for an unknown scene. scene:
    the one that is meant; without it that of the instruction.
    """
    kind = KINDS.get(scene or scene_of(instruction_of(batch, row)))
    return libero_cameras.SUPPORTS.get(kind)


def instruction_of(batch, row):
    """The task of a row in words, "" where the batch says none."""
    return batch["task"][row] if batch.get("task") else ""
