"""A scene of LIBERO: one task in the real simulator.

A `Scene` gives upright images with calibrated cameras (sim/cameras.py), reads and sets states,
finds valid random layouts (sim/placement.py), and steps OSC actions (sim/physics.py). Images are
rendered only when asked for: a render costs twenty control steps.
"""

from dataclasses import dataclass

import numpy as np

from rot_utils import quat_to_matrix
from runtime import UserError
from sim import kept_model
from sim.cameras import FAST_QUALITY, Agentview
from sim.placement import ROBOT_DOF, Placement
from sim.simulator import built, libero, parsed_bddl, release_memory
from sim.tasks import clean_bddl, find_task, init_states

ACTION_SCALE = 0.05  # metres of goal offset per unit of a position action (OSC_POSE)
ROTATION_SCALE = 0.5  # radians of goal offset per unit of a rotation action
WAIT_STEPS = 12  # control steps in which the objects of an init state come to rest
OPEN_WIDTH = 0.06  # metres between the fingers above which the gripper has let go of a bowl's rim
OPEN, CLOSE = -1.0, 1.0


@dataclass
class Observation:
    """What the robot sees at one control step.

    image: (S,S,3) uint8 upright RGB, or None when not rendered; eef_pos (3,) m and eef_rot (3,3) in
    the world; gripper_qpos (2,) finger joints in m; joint_pos (7,) rad; K (3,3) px; E (4,4)
    camera-to-world, OpenCV axes. eef_quat (4,) xyzw is eef_rot again. instruction: what is asked
    for, in words; support: height in m of the surface that the objects stand on, None if not known.
    """

    image: np.ndarray
    eef_pos: np.ndarray
    eef_rot: np.ndarray
    eef_quat: np.ndarray
    gripper_qpos: np.ndarray
    joint_pos: np.ndarray
    K: np.ndarray
    E: np.ndarray
    instruction: str = ""
    support: float = None

    @property
    def gripper_width(self):
        return float(np.abs(self.gripper_qpos).sum())


class Scene(Agentview, Placement):
    """One LIBERO task in the simulator.

    clean: without distractors and unused fixtures (fastest). rendering: False makes no rendering
    context, which saves a second, and works where nothing can be rendered. physics: see
    `use_physics`. render: one of cameras.RENDERS. task: a Task, instead of suite and index. Raises
    UserError for an unknown task.

    States (S,) are MuJoCo's, flattened: [time, qpos, qvel]. `qpos` begins with the arm's seven
    joints and the two fingers, then come the objects' free joints. Positions are in metres in the
    world frame.
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
        render="exact",
        task=None,
    ):
        OffScreenRenderEnv, ControlEnv = libero()[2:]
        self.task = task or find_task(task_suite, task_id)
        self.image_size, self.clean = image_size, clean
        self.physics, self.quality = physics, render  # both are set up anew after each reset
        np.random.seed(seed)  # fixtures are placed by NumPy's global generator
        bddl = clean_bddl(self.task) if clean else self.task.bddl
        if rendering:
            self.env = built(
                OffScreenRenderEnv,
                bddl_file_name=bddl,
                camera_heights=image_size,
                camera_widths=image_size,
                camera_names=["agentview"],
                use_camera_obs=False,
                renderer_config=FAST_QUALITY if render == "fast" else None,
            )
        else:
            self.env = built(
                ControlEnv, bddl_file_name=bddl, has_offscreen_renderer=False, use_camera_obs=False
            )
        self.env.reset()
        self._after_build()
        self.own_goals = self.env.env.parsed_problem["goal_state"]
        self.ask_for()
        self.nominal_z, self.leaning = self._nominal_rest()

    @property
    def sim(self):
        return self.env.sim

    @property
    def support(self):
        """Height in m of what the objects stand on: a table, or the floor at 0."""
        return max(0.0, float(self.env.env.workspace_offset[2]))

    @property
    def robot(self):
        return self.env.robots[0]

    def _after_build(self):
        release_memory()
        # This repository reads the simulation itself, so no observable is computed: 30% off a step.
        for observable in self.env.env._observables.values():
            observable.set_enabled(False)
        self.use_physics(self.physics)
        self.set_quality()
        model, index = self.sim.model, self.sim.model.camera_name2id("agentview")
        self.default_camera = np.array(model.cam_pos[index]), np.array(model.cam_quat[index])
        self.default_joints = np.array(self.robot.controller.initial_joint)
        self.posture = None

    def ask_for(self, request=None):
        """Ask for what a Request of sim/instructions.py says, None for the scene's own task.

        Of it are from now on what observations say (`instruction`), `pick` and `place`, and what
        LIBERO's predicate judges. asked: the Task whose sentence is said. Raises UserError where
        the scene has not all that the goal names.
        """
        goals = self.own_goals if request is None else [list(request.goal)]
        there = self.env.env.object_states_dict
        if lacking := [name for goal in goals for name in goal[1:] if name not in there]:
            raise UserError(
                f"{request.task.language!r}: the scene of {self.task.key} has no {lacking[0]}"
                + ("; give --no-clean_scene" if self.clean else "")
            )
        self.asked = self.task if request is None else request.task
        self.instruction = self.asked.language
        self.env.env.parsed_problem["goal_state"] = goals
        # (On object target) names both; a goal with one argument, as (Open drawer), has neither
        self.pick, self.place = goals[0][1:] if len(goals[0]) == 3 else (None, None)

    def use_physics(self, name):
        """Step with "lean", the loop of sim/physics.py, or with "robosuite"'s own: the same numbers
        at twice the cost."""
        from sim.physics import LOOPS  # it needs mujoco, which a Scene alone needs

        self.physics, self.loop = name, LOOPS[name](self.env.env)

    def reset(self, seed):
        """Draw a random layout from the benchmark's sampler, with the objects still in the air.

        The model is rebuilt, so moved cameras and fixtures are placed anew. seed: a list of uint32,
        see settings.random_seed.
        """
        np.random.seed(seed)  # robosuite's samplers draw from NumPy's global generator
        self.env.reset()
        self._after_build()

    # -- state

    def state(self):
        """The flattened state (S,) float64."""
        return self.sim.get_state().flatten()

    def joints(self):
        """Positions of all joints (N,): arm, fingers, objects and fixtures; m, rad, quaternions."""
        return np.array(self.sim.data.qpos)

    def set_state(self, state):
        """Put the simulation into `state` (S,) as at the start of an episode: controller, gripper
        and clock are reset too.

        Fixtures and cameras belong to the model and stay. Raises UserError if the length does not
        fit the model.
        """
        state = np.asarray(state, dtype=np.float64)
        expected = 1 + self.sim.model.nq + self.sim.model.nv
        if state.shape != (expected,):
            raise UserError(
                f"a state of {self.task.key} has {expected} numbers, got {state.shape}: "
                "wrong task or scene"
            )
        self.sim.reset()
        self.sim.set_state_from_flattened(state)
        self.sim.forward()
        self.env.env._post_process()  # a stove shows its burner where it is on
        # what robosuite keeps beside the simulator's state
        self.robot.gripper.current_action = np.zeros(self.robot.gripper.dof)
        self.robot.controller.update(force=True)  # else the first step jerks by 4 mm
        self.robot.controller.reset_goal()
        self.env.env.timestep, self.env.env.done = 0, False

    def set_posture(self, joints=None):
        """Let episodes begin with the controller of an arm that was built at other joints (7,) rad,
        or at its own again, until the next `reset`.

        The hand then turns to the orientation that it has there, and the joints are pulled there
        where that leaves the hand in place.
        """
        self.posture = None if joints is None else np.array(joints)
        self.robot.controller.initial_joint = np.array(
            self.default_joints if joints is None else joints
        )

    def init_states(self, task=None):
        """The benchmark's init states (N,S), as states of this scene. task: another task with the
        same objects, whose init states are taken. Raises UserError where its objects are others.
        """
        states, width = init_states(task or self.task), 1 + self.sim.model.nq + self.sim.model.nv
        if not self.clean and states.shape[1] != width:
            raise UserError(
                f"init states of {(task or self.task).key} have {states.shape[1]} numbers, a state "
                f"of {self.task.key} has {width}: other objects; choose another --task_suite"
            )
        return np.stack([self._from_full(s) for s in states]) if self.clean else states

    def _from_full(self, state):
        """Copy robot and object poses of a full-scene state into one of the clean scene."""
        # the full scene's free joints come in the order in which its BDDL names the objects
        full = parsed_bddl(self.task.bddl)["objects"]
        names = [name for group in full.values() for name in group]
        # time, robot, all velocities zero, then the poses of the objects that the clean scene has
        current = self.state()
        current[0] = state[0]
        current[1 : 1 + ROBOT_DOF] = state[1 : 1 + ROBOT_DOF]
        current[1 + self.sim.model.nq :] = 0
        for name in self.objects:
            # a free joint has seven numbers: xyz and the quaternion
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

    @property
    def subject(self):
        """Name of what the goal is about: the object to pick, or the fixture or site to change."""
        return self.pick or self.env.env.parsed_problem["goal_state"][0][1]

    def fixtures(self):
        """Poses of the fixtures {name: [x, y, z, qw, qx, qy, qz]}, which no state contains."""
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

    def position_of_base(self):
        """World position (3,) of the robot's base."""
        return np.array(self.sim.data.get_body_xpos("robot0_base"))

    def position(self, name):
        """World position (3,) of an object, fixture or goal site."""
        if name in self.env.env.obj_body_id:
            return np.array(self.sim.data.body_xpos[self.env.env.obj_body_id[name]])
        return np.array(self.sim.data.get_site_xpos(name))

    def observe(self, image=True):
        """The current Observation; `image=False` skips the render."""
        # As in LIBERO's data, the position is that of the grip site between the fingers, the
        # orientation that of the hand's body. MuJoCo's wxyz becomes xyzw.
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
            self.instruction,
            self.support,
        )

    # -- acting

    def step(self, action):
        """One control step (50 ms) with an OSC_POSE action (7,) in [-1, 1]: translation, rotation
        vector, gripper.
        """
        # the caller counts steps; LIBERO's horizon would raise in long episodes
        self.env.env.timestep = 0
        self.loop.step(np.asarray(action, dtype=np.float64))

    def begin_episode(self, state):
        """Set `state` and wait WAIT_STEPS with the gripper opening, as LIBERO evaluations do.

        The benchmark's init states have their objects in the air: they come to rest meanwhile.
        """
        orientation = None
        if self.posture is not None:
            # the controller takes its goal from where the arm is
            built = np.array(state, dtype=np.float64)
            built[1 : 1 + len(self.posture)] = self.posture
            self.set_state(built)
            orientation = np.array(self.robot.controller.goal_ori)
        self.set_state(state)
        if orientation is not None:
            self.robot.controller.goal_ori = orientation
        for _ in range(WAIT_STEPS):
            self.step([0, 0, 0, 0, 0, 0, OPEN])

    def success(self):
        """LIBERO's own goal predicate."""
        return bool(self.env.check_success())

    def close(self):
        """Free the rendering context and the model, once."""
        if not self.closed:
            kept_model.let_go(self.env.env)
            self.env.close()

    @property
    def closed(self):
        """Whether it has been closed: nothing else works from then on."""
        return not hasattr(self.env, "env")  # LIBERO's own close deletes it
