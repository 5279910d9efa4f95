"""Does a LeRobot dataset's camera show the robot where its pictures do? Proved by rendering.

    # train.py does this with what it is to train on
    python -m sim.picture_proof data/libero
    python -m sim.picture_proof data/libero --task 3

A recording of a LIBERO task tells where its hand was. The task's robot is brought there and drawn
through the camera that the dataset claims. Its hand is looked for in the recorded picture, by
OpenCV's template matching: where it was drawn, elsewhere, and in the picture's reflections. What
stands fixed in the scene, a cabinet or a stove, is looked for likewise: that is of the task. Other
objects are left out, since where they were is not recorded.

One frame of a few episodes of one task is looked at, for each kind of scene: while the arm is on
its way to its first grasp the hand is in sight, and holds nothing.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import camera
import flags
from formats.dataset import open_dataset
from formats.libero_cameras import scene_of_task
from formats.pictures import ORIENTATIONS, TURNED, orientation_instead, upright
from rot_utils import matrix_to_rotvec, rotvec_to_matrix
from runtime import UserError, run_script
from sim.libero_env import Scene
from sim.simulator import rendered_by

EPISODES = 5  # looked at, of each kind of scene
SIDE = 160  # px at most at which pictures are compared
BORDER = 0.12  # of the image's side: the hand reaches so far beyond the point between its fingers
MARGIN = 3  # px beside a thing that are compared too: its outline
PLACE = 0.03  # of the image's side: by how much a thing may lie beside where it was drawn
LEAST = 60  # px of a thing that is looked for
# Correlations from which on the hand, and what stands fixed, are found. With the right task and
# camera 0.75 to 0.97, and 0.79 to 0.94; in reflections at most 0.34, and in scenes with other
# fixtures at most 0.46.
HAND, FIXED = 0.55, 0.6
POSITION = 0.01  # metres by which the robot may miss the recorded position of its hand
BURIED = -5.0  # metres: height of objects that are not to be seen
# inverse kinematics by damped least squares: damping, rounds at most, rad of a round at most
DAMPING, ROUNDS, STRIDE = 1e-4, 200, 0.2
GEOM = 5  # MuJoCo's number for geoms in a segmentation


@dataclass
class Pose:
    """One recorded frame.

    position (3,) m and rotation (3,3) of the EEF; fingers (2,) m; picture (S,S,3) uint8 upright; K
    (3,3) in pixels of that picture; E (4,4).
    """

    position: np.ndarray
    rotation: np.ndarray
    fingers: np.ndarray
    picture: np.ndarray
    K: np.ndarray
    E: np.ndarray


@dataclass
class Match:
    """How well a drawn thing is found in a picture: the correlation where it was drawn, the highest
    anywhere, and how far off (2,) that is, columns and rows as shares of the image's side.
    """

    here: float
    best: float
    off: np.ndarray


# -- what was recorded ----------------------------------------------------------------------------


def pose_of(demo, side):
    """The Pose of a Demo whose reflections show the hand elsewhere: of the frames before the first
    grasp the one in which it is farthest from the picture's middle. None where it is never in view.
    """
    K = demo.K * (side / demo.image_size)
    K[2, 2] = 1.0
    u, v, depth = camera.project(demo.ee_pos, K, demo.E)
    low, high = np.minimum(u, v), np.maximum(u, v)
    inside = (depth > 0) & (low > BORDER * side) & (high < (1 - BORDER) * side)
    before = np.cumsum(demo.actions[:, 6] > 0) == 0
    frames = np.flatnonzero(inside & before if (inside & before).any() else inside)
    if not len(frames):
        return None
    aside = np.minimum(np.abs(u - side / 2), np.abs(v - side / 2))[frames]
    frame = int(frames[aside.argmax()])
    small = Image.fromarray(demo.images([frame])[0]).resize((side, side), Image.BOX)
    return Pose(
        demo.ee_pos[frame],
        rotvec_to_matrix(demo.ee_ori[frame]),
        demo.gripper_states[frame],
        np.asarray(small),
        K,
        demo.E,
    )


def groups_of(demos):
    """{instruction: its Demos}, one task for each kind of scene among LIBERO's 40."""
    tasks, kinds = {}, {}
    for demo in demos:
        tasks.setdefault(demo.instruction, []).append(demo)
    for instruction in tasks:
        if kind := scene_of_task(instruction):
            kinds.setdefault(kind, instruction)
    return {instruction: tasks[instruction] for instruction in kinds.values()}


# -- what the simulator shows ---------------------------------------------------------------------


def reach(scene, pose):
    """Bring a Scene's robot to a Pose -> by how many metres it misses the position."""
    import mujoco

    model, data, robot = scene.sim.model._model, scene.sim.data._data, scene.robot
    joints, columns = robot._ref_joint_pos_indexes, robot._ref_joint_vel_indexes
    site, hand = robot.eef_site_id, model.body(robot.robot_model.eef_name).id
    limits = model.jnt_range[model.dof_jntid[columns]]  # (7,2) rad
    data.qpos[joints] = robot.init_qpos
    data.qpos[robot._ref_gripper_joint_pos_indexes] = pose.fingers
    linear, angular = np.zeros((3, model.nv)), np.zeros((3, model.nv))
    for _ in range(ROUNDS):
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)  # Jacobians are about it
        missed = pose.position - data.site_xpos[site]
        turn = matrix_to_rotvec(pose.rotation @ data.xmat[hand].reshape(3, 3).T)
        error = np.concatenate([missed, turn])
        if np.abs(error).max() < 1e-4:
            break
        mujoco.mj_jacSite(model, data, linear, angular, site)
        J = np.concatenate([linear, angular])[:, columns]  # (6,7)
        step = J.T @ np.linalg.solve(J @ J.T + DAMPING * np.eye(6), error)
        step *= min(1.0, STRIDE / np.abs(step).max())
        data.qpos[joints] = np.clip(data.qpos[joints] + step, *limits.T)
    for name in scene.objects:
        data.qpos[scene.sim.model.get_joint_qpos_addr(f"{name}_joint0")[0] + 2] = BURIED
    mujoco.mj_forward(model, data)
    return float(np.linalg.norm(missed))


def draw(scene, pose):
    """A posed Scene through a Pose's camera: (picture (S,S,3), mask (S,S) bool of the hand with its
    fingers, [a mask of each thing that stands fixed in the scene]).
    """
    model, side = scene.sim.model, scene.image_size
    scene.set_camera(pose.E)
    fovy = 2 * np.arctan(side / 2 / pose.K[1, 1])
    model.cam_fovy[model.camera_name2id("agentview")] = np.degrees(fovy)
    picture = scene.render()
    seen = scene._draw(segmentation=True)[::-1]  # (S,S,2): a kind and a number
    hand = _mask(model, seen, model.body_name2id(scene.robot.robot_model.eef_name))
    bodies = scene.env.env.obj_body_id
    # the table is where the camera looks, whatever the task
    names = [n for n in scene.env.env.fixtures_dict if n in bodies and "table" not in n]
    return picture, hand, [_mask(model, seen, bodies[n]) for n in names]


def _mask(model, seen, root):
    """Pixels of a segmentation (S,S,2) that show a body, by its number, or what hangs on it."""
    shown = np.zeros(model.nbody, bool)
    shown[root] = True
    # a parent's number is below its children's
    for body in range(1, model.nbody):
        shown[body] |= shown[model.body_parentid[body]]
    geoms = np.flatnonzero(shown[model.geom_bodyid])
    return (seen[..., 0] == GEOM) & np.isin(seen[..., 1], geoms)


# -- the comparison -------------------------------------------------------------------------------


def find(picture, drawn, mask, shift=(0, 0)):
    """Look for what a mask (S,S) shows of a drawn picture (S,S,3) in a recorded one -> Match.

    shift: (columns, rows) px by which the recorded camera's principal point is off the middle.
    """
    import cv2

    side = len(picture)
    grown = cv2.dilate(mask.astype(np.uint8), np.ones((2 * MARGIN + 1,) * 2, np.uint8))
    rows, columns = np.flatnonzero(grown.any(1)), np.flatnonzero(grown.any(0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    weight = np.repeat(grown[box][..., None], 3, -1).astype(np.float32)
    # (H,W) correlation of the box with the picture at each place
    images = picture.astype(np.float32), drawn[box].astype(np.float32)
    scores = cv2.matchTemplate(*images, cv2.TM_CCOEFF_NORMED, mask=weight)
    scores = np.nan_to_num(scores, posinf=0, neginf=0)
    y, x = np.mgrid[: scores.shape[0], : scores.shape[1]]
    off = np.stack([x - columns[0] - shift[0], y - rows[0] - shift[1]], -1) / side
    near = np.abs(off).max(-1) <= PLACE
    at = np.unravel_index(scores.argmax(), scores.shape)
    return Match(float(scores[near].max(initial=0)), float(scores[at]), off[at])


def compare(scene, poses):
    """Look for the hand and for what stands fixed in the pictures of Poses -> (metres missed (N,),
    {orientation: N Matches of the hand}, Matches of what stands fixed, of all pictures).
    """
    missed, hands, fixed = [], {name: [] for name in ORIENTATIONS}, []
    for pose in poses:
        missed.append(reach(scene, pose))
        drawn, hand, standing = draw(scene, pose)
        shift = pose.K[:2, 2] - scene.image_size / 2
        # each by itself: they stand a centimetre elsewhere in each demonstration
        seen = [mask for mask in standing if mask.sum() >= LEAST]
        fixed += [find(pose.picture, drawn, mask, shift) for mask in seen]
        if hand.sum() >= LEAST:
            for name, matches in hands.items():
                turned = upright(pose.picture[None], name)[0]
                matches.append(find(turned, drawn, hand, shift))
    return np.array(missed), hands, fixed


def judge(instruction, orientation, missed, hands, fixed, remedy):
    """What is wrong with pictures that were compared, a sentence without its subject, or None.

    orientation: as which they were read; remedy: has a place for the right one.
    """
    if np.median(missed) > POSITION:
        return (
            f"the recorded positions of the hand are {100 * np.median(missed):.0f} cm out of the "
            f"reach of the robot in {instruction!r}; are the episodes of another task?"
        )
    here = {name: np.mean([m.here for m in found] or [0]) for name, found in hands.items()}
    best = max(here, key=here.get)
    if best != "upright" and here[best] >= HAND:
        rows, columns = ORIENTATIONS[best]
        return (
            f"the images are {TURNED[columns, rows]}: so turned they show the hand where it was "
            f"recorded (correlation {here[best]:.2f}), as they are read they do not "
            f"({here['upright']:.2f}); {remedy.format(orientation_instead(orientation, best))}"
        )
    if here["upright"] < HAND:
        told = f"correlation {here['upright']:.2f}, at least {HAND} is expected"
        elsewhere = np.mean([m.best for m in hands["upright"]] or [0])
        off = np.median([m.off for m in hands["upright"]] or [[0, 0]], axis=0)
        if elsewhere >= HAND and np.abs(off).max() > PLACE:
            across = "right" if off[0] > 0 else "left"
            down = "down" if off[1] > 0 else "up"
            return (
                f"the hand is not where the camera shows it but {100 * abs(off[0]):.0f}% of the "
                f"image's side to the {across} and {100 * abs(off[1]):.0f}% {down} ({told}, there "
                f"{elsewhere:.2f}); is the camera that of these pictures?"
            )
        return (
            f"the hand is not where the camera shows it ({told}); are camera and states those of "
            "these pictures?"
        )
    standing = np.mean([m.here for m in fixed] or [1])
    if standing < FIXED:
        return (
            f"what stands fixed in the scene of {instruction!r} is not where it stands in the "
            f"images (correlation {standing:.2f}, at least {FIXED} is expected); are the episodes "
            "of another task?"
        )
    return None


def prove(recordings, groups, scene_of=Scene):
    """Compare a LeRobotFolder's pictures with the simulator's -> a sentence on what was found.

    groups: of its demonstrations, as `groups_of` has them; scene_of: makes a Scene. Raises
    UserError where the pictures contradict it.
    """
    told = []
    side, about = min(SIDE, recordings.image_size), recordings.attributes
    file = recordings.path / "meta" / "cameras.json"
    remedy = 'set "image_orientation": "{}" in ' + str(file)
    for instruction, demos in groups.items():
        picked = np.unique(np.linspace(0, len(demos) - 1, min(EPISODES, len(demos))).astype(int))
        poses = [pose_of(demos[i], side) for i in picked]
        poses = [pose for pose in poses if pose is not None]
        if not poses:
            raise UserError(
                f"{recordings.path}: the hand is never well inside the image by the camera of "
                f"{instruction!r}; is it that of another scene?"
            )
        # of the scene: the sentence may be another task's
        suite, _, index = demos[0].task.rpartition("_")
        # drawn as the recording was: stoves of the fast render have another colour
        how = {"clean": bool(about.get("clean_scene")), "render": about.get("render", "exact")}
        scene = scene_of(suite, int(index), image_size=side, **how)
        try:
            scene.set_state(scene.init_states()[0])
            missed, hands, fixed = compare(scene, poses)
        finally:
            scene.close()
        # of the recipe's demonstrations half have what stands fixed, half have not
        fixed = [] if about.get("setting") == "recipe" else fixed
        if fault := judge(instruction, recordings.orientation, missed, hands, fixed, remedy):
            raise UserError(f"{recordings.path}: {fault}")
        found = np.mean([m.here for m in hands["upright"]])
        told.append(f"{len(poses)} of {instruction!r} (correlation {found:.2f})")
    return f"the hand is where the camera shows it in {' and in '.join(told)}"


def build_parser():
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("dataset", type=Path, help="LeRobot folder")
    add("--task", help="this task alone, its index or words of its instruction")
    add("--n_demos", type=flags.count, help="use only the first N demonstrations")
    add("--image_size", type=flags.pixels, help="px at which the images are read (theirs)")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    recordings = open_dataset(args.dataset, args.image_size, args.n_demos, args.task)
    if recordings.format != "lerobot":
        raise UserError(f"{args.dataset}: is no LeRobot dataset, whose cameras are in question")
    groups = groups_of(recordings.demos)
    if not groups:
        print(f"{args.dataset}: no LIBERO task that is known, so no picture is compared")
        return
    try:
        rendered_by()
    except UserError as error:
        print(f"{args.dataset}: not compared with the simulator's pictures: {error}")
        return
    print(f"{args.dataset}: {prove(recordings, groups)}")


if __name__ == "__main__":
    run_script(main)
