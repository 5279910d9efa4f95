"""A demonstration, whatever format it was read from: mirrored, turned, divided, followed."""

import json
from dataclasses import dataclass, replace

import numpy as np

import camera
import canonical
from formats.libero_cameras import ONE_SCENE, PROBLEMS, SCENE_OF_KEY, SUPPORTS, scene_of_task
from rot_utils import fingerprint, matrix_to_rotvec, rotvec_to_matrix
from runtime import UserError

# control steps that opening or closing takes; frames inside such a hold are no training samples
GRIPPER_STEPS = 10
RECOLLECT = "collect it again with collect_demos.py"


@dataclass
class Demo:
    """What a demonstration of T frames holds besides its images, in memory.

    name: unique in its dataset; actions (T,7) the OSC_POSE action at each frame, its last number
    above 0 closes the gripper; ee_pos (T,3) m and ee_ori (T,3) axis-angle in rad, in the world;
    gripper_states (T,2) m, fingers; states (T,S) of the simulator, S = 0 where there is none;
    perturbed (T,) bool, true while the robot was pushed; K (3,3) in pixels of an image of
    `image_size`, E (4,4) camera-to-world with OpenCV axes; attrs: whatever else is known.
    """

    name: str
    actions: np.ndarray
    ee_pos: np.ndarray
    ee_ori: np.ndarray
    gripper_states: np.ndarray
    states: np.ndarray
    perturbed: np.ndarray
    K: np.ndarray
    E: np.ndarray
    image_size: int
    attrs: dict
    source: object = None  # the interface.Demonstrations that it is of, which has its images
    mirrored: bool = False  # images are turned left to right where they are read
    warp: tuple = ()  # of canonical.py: images are warped so where they are read, once mirrored
    lowered: float = None  # metres by which heights were lowered, see `measured`
    image_stride: int = 1  # every k-th frame has an image: 0, k, 2k, ...

    def __len__(self):
        return len(self.actions)

    @property
    def key(self):
        """What tells a demonstration from every other: every file has a demo_0."""
        return self.source.fingerprint, self.name, self.mirrored, *self.warp

    @property
    def task(self):
        """Key of its LIBERO task, such as libero_spatial_0; "" where its dataset does not say.

        A LeRobot dataset of several tasks says it of each episode.
        """
        said = self.source.attributes
        known = "task_suite" in said and "task_id" in said
        return f"{said['task_suite']}_{said['task_id']}" if known else self.attrs.get("libero", "")

    @property
    def instruction(self):
        """What was asked for, in words; "" where its dataset does not say.

        A LeRobot dataset says it of each episode, others of all but those demonstrations to which
        another task's sentence was said. LIBERO's own files hold it in their `problem_info`, a JSON
        text.
        """
        said = self.source.attributes
        words = self.attrs.get("task") or self.attrs.get("language") or said.get("language")
        return str(words) if words else self._problem("language_instruction")

    def _problem(self, key):
        """An entry of `problem_info`, LIBERO's own, as text; "" where there is none."""
        try:
            return str(json.loads(self.source.attributes["problem_info"])[key])
        except (KeyError, TypeError, ValueError):
            return ""

    @property
    def support(self):
        """Height in m of the surface that its scene's objects stand on: what its dataset says, as
        `support`, or that of its LIBERO task. None where neither is known.
        """
        said = self.source.attributes
        if (stated := self.attrs.get("support", said.get("support"))) is not None:
            if not isinstance(stated, (int, float)) or not np.isfinite(stated):
                raise UserError(
                    f"{self.source.path}: {self.name}: support is {stated!r}, a height in metres "
                    "is expected; mend the attribute"
                )
            return float(stated)
        # the scene's own task: another one's sentence may be said in it
        kind = SCENE_OF_KEY.get(self.task) if self.task else scene_of_task(self.instruction)
        return SUPPORTS.get(kind or PROBLEMS.get(self._problem("problem_name")))

    @property
    def group(self):
        """What its task is called: the key of a LIBERO task, else the instruction, else ""."""
        return self.task or self.instruction

    @property
    def scene(self):
        """What tells its scene from others: the task, but for LIBERO-Goal, whose ten share one."""
        suite, _, number = self.task.rpartition("_")
        return suite if suite in ONE_SCENE and number.isdecimal() else self.group

    @property
    def request(self):
        """What is asked for and where: (group, instruction). By it demonstrations are divided, and
        drawn equally often: in one scene one sentence may name another object than the next.
        """
        return self.group, self.instruction

    def images(self, frames):
        """Images (N,S,S,3) uint8 RGB, upright, of N frames, S = image_size. Reads these alone.

        Raises UserError where a frame has no image, see `image_stride`.
        """
        missing = [int(i) for i in frames if i % self.image_stride]
        if missing:
            raise UserError(
                f"{self.source.path}: {self.name} has images of frames 0, {self.image_stride}, "
                f"{2 * self.image_stride} ... and none of frame {missing[0]}; give --frame_stride "
                f"{self.image_stride} or a multiple of it, or collect with --frame_stride 1"
            )
        images = self.source.images(self, [int(i) for i in frames])
        if self.mirrored:
            images = np.ascontiguousarray(images[:, :, ::-1])
        return np.stack([canonical.warped(i, self.warp) for i in images]) if self.warp else images


def mirrored(demo):
    """A Demo seen in the mirror of the plane y = 0, in which the robot, its table and agentview
    lie: what is to the left is to the right.

    Positions, rotations, commands and the camera are reflected, and images where they are read.
    The hand is symmetric about its own xz plane, so a reflected rotation is again one:
    R' = M R M, M = diag(1, -1, 1). `states` stay as recorded: no simulator state looks like this.
    """
    # of vectors, and of axes of rotation
    # a rotation's axis is a pseudovector: its components in the plane change sign, the normal one
    # stays
    flip, turn = np.array([1.0, -1, 1]), np.array([-1.0, 1, -1])
    actions = demo.actions.copy()
    # action: a move in xyz, then a turn as axis-angle, both in world axes
    actions[:, :6] *= np.concatenate([flip, turn])
    K, E = demo.K.copy(), demo.E.copy()
    # column u becomes S - u, the principal point too
    K[0, 2] = demo.image_size - K[0, 2]
    # the camera's own x is reflected too, or it would be left-handed
    E[:3, :3] = flip[:, None] * E[:3, :3] * np.array([-1.0, 1, 1])
    E[:3, 3] = flip * E[:3, 3]
    return replace(
        demo,
        mirrored=not demo.mirrored,
        actions=actions,
        ee_pos=demo.ee_pos * flip,
        ee_ori=demo.ee_ori * turn,
        K=K,
        E=E,
    )


def seen_by(demo, config):
    """A Demo as a policy of a PolicyConfig sees it: heights as its `heights` says, images in its
    `canonical_view`. Raises UserError where it needs a support that is not known.
    """
    return seen_as(measured(demo, config.heights), config.canonical_view)


def measured(demo, heights):
    """A Demo whose heights, of EEF and camera, are those of the "world", or from its "support": the
    surface that its scene's objects stand on. `states` stay as recorded. Raises UserError where the
    support is asked for and not known.
    """
    if heights == "world" or demo.lowered is not None:
        return demo
    if demo.support is None:
        raise UserError(
            f"{demo.source.path}: {demo.name}: --heights support: what its objects stand on is not "
            "known, it is of none of LIBERO's suites; say its height in metres as `support`, an "
            "attribute of the dataset, or leave --heights out"
        )
    down = np.array([0.0, 0.0, demo.support])
    return replace(
        demo,
        ee_pos=demo.ee_pos - down,
        E=camera.lowered(demo.E, demo.support),
        lowered=demo.support,
    )


def seen_as(demo, view):
    """A Demo as it looks in a canonical view, "" for its own: camera, and images where they are
    read. One that looks so already is given back as it is.
    """
    K, E, warp = canonical.camera_of(demo.K, demo.E, demo.image_size, view)
    if not warp:
        return demo
    if demo.warp:  # seen in another view before: from the new pixels to that one's to the image's
        warp = tuple((np.reshape(demo.warp, (3, 3)) @ np.reshape(warp, (3, 3))).ravel())
    return replace(demo, K=K, E=E, warp=warp)


def turned_back(demo, E):
    """A Demo whose world is moved until its camera is at camera-to-world E (4,4).

    The move is a turn about a vertical and a shift along the floor. Positions, rotations and
    commands move along; heights and images stay. So demonstrations whose cameras were turned about
    the robot (`collect_demos.py --turn_spread`) come to show turned robots before one camera.
    `states` stay as recorded. Raises UserError where no such move takes one camera to the other.
    """
    # takes the recording's camera to E, and the world with it
    move = E @ np.linalg.inv(demo.E)
    turn = move[:3, :3]
    # the vertical has to stay vertical, and heights have to stay (2 mm)
    if np.abs(turn[2] - [0, 0, 1]).max() > 1e-3 or abs(move[2, 3]) > 2e-3:
        raise UserError(
            f"{demo.name}: its camera is higher or steeper than agentview, no turn about a "
            "vertical takes one to the other; leave --turn_back out, or train on HDF5 files: other "
            "formats do not keep how a recipe's camera was put"
        )
    actions = demo.actions.copy()
    # rows times R^T: a rotation of row vectors. Moves and turns are vectors, so nothing is shifted.
    actions[:, :3] = actions[:, :3] @ turn.T
    actions[:, 3:6] = actions[:, 3:6] @ turn.T
    return replace(
        demo,
        actions=actions,
        ee_pos=demo.ee_pos @ turn.T + move[:3, 3],
        ee_ori=matrix_to_rotvec(turn @ rotvec_to_matrix(demo.ee_ori)),
        E=np.array(E, dtype=float),
    )


def next_waypoint(positions, end, stride, min_travel=0.0):
    """The frame (T,) at which each frame's next waypoint lies on a recorded path.

    positions (T,3) m; end (T,) int, the last frame it may be (the next gripper change). It is
    `stride` frames later, or as many more as it takes to be `min_travel` metres away: where the
    path slows down, a waypoint nearer than a cell of the prediction decodes to where the EEF
    already is, and a policy without memory stays there for ever.
    """
    # one frame later at a time, for those that are still too near
    frames = np.arange(len(positions))
    target = np.minimum(frames + stride, end)
    while True:
        # (T,) bool; `end` stops the search even where the EEF is still too near
        short = (np.linalg.norm(positions[target] - positions, axis=1) < min_travel) & (
            target < end
        )
        if not short.any():
            return target
        target[short] += 1


def told_otherwise(demos):
    """{i: j}: demonstration i and one of the same scene, j, that is told the scene's next sentence
    in alphabetical order. Of scenes with one sentence there are none.
    """
    first = {}  # {scene: {sentence: its first demonstration}}
    for i, demo in enumerate(demos):
        first.setdefault(demo.scene, {}).setdefault(demo.instruction, i)
    found = {}
    for i, demo in enumerate(demos):
        words = sorted(first[demo.scene])
        if len(words) > 1:
            following = words[(words.index(demo.instruction) + 1) % len(words)]
            found[i] = first[demo.scene][following]
    return found


def _happened(demo):
    """Rows (T,N) that a demonstration and its replay before another camera share to the last bit. A
    replay reads positions anew, half a millimetre off.
    """
    if demo.states.size:
        return demo.states
    return demo.actions[:, :6] if demo.actions[:, :6].any() else demo.ee_pos


def split_demos(demos, val_fraction=0.15):
    """(train, validation) lists, split by demo: every k-th demo of each task and sentence
    validates, at least one.

    Demonstrations with the same states, or actions where a format has no states, are one, seen from
    several cameras (`collect_demos.py --replay --setting cameras`): they are trained on or held out
    together.
    """
    by_request = {}  # {request: {what happened: numbers of its demonstrations}}
    for i, demo in enumerate(demos):
        same = by_request.setdefault(demo.request, {})
        same.setdefault(fingerprint(_happened(demo)), []).append(i)
    held_out = set()
    for (task, words), same in by_request.items():
        numbers = list(same.values())
        n = len(numbers)
        if n < 2:
            of_task = f" of task {task!r}" if len(by_request) > 1 else ""
            if sum(group == task for group, _ in by_request) > 1:
                of_task += f" told {words!r}"
            raise UserError(
                f"{n} demonstration{of_task}: training needs at least 2, one of them for "
                f"validation; {RECOLLECT}"
            )
        # evenly spread over the file, whose conditions may come in blocks
        every = min(n, max(2, round(1 / val_fraction)))
        # demonstrations k - 1, 2 k - 1, ... validate
        for views in numbers[every - 1 :: every]:
            held_out.update(views)
    return (
        [d for i, d in enumerate(demos) if i not in held_out],
        [d for i, d in enumerate(demos) if i in held_out],
    )


def drawn_by(attributes):
    """Name of the renderer of a dataset's images, None where it does not say. attributes: of a
    dataset of either format.
    """
    # a replay's images are its own, whatever simulated its physics
    own = {key: value for key, value in attributes.items() if key != "replayed_versions"}
    return simulated_with(own).get("renderer")


def simulated_with(attributes):
    """Versions {package: version} of the simulator that made a dataset's physics.

    {} where the dataset does not say. attributes: of a dataset of either format. A replay renders
    anew what another version simulated, and names that version in `replayed_versions`.
    """
    # HDF5 holds the versions as a JSON text, dataset.json as an object
    found = attributes.get("replayed_versions", attributes.get("versions", {}))
    if not isinstance(found, dict):
        try:
            found = json.loads(found)
        except (TypeError, ValueError):
            return {}
    return found if isinstance(found, dict) else {}
