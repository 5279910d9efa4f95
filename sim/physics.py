"""One control step of LIBERO: 25 physics substeps under robosuite's OSC_POSE controller.

robosuite's own loop computes the forward dynamics three times a substep: `sim.forward`, the same
again inside the controller, and `sim.step`. Here each substep computes them once, and every number
is the same, bit for bit:

    mj_step1      positions, contacts and velocities of the state
    controller    torques from them, by robosuite's formulas in robosuite's order
    mj_step2      forces, accelerations, integration

It leaves out what nothing in this repository reads: observables, the force and torque sensors, the
robot's buffers of recent values, and the reward.

OSC_POSE is operational space control (Khatib, "A unified approach for motion and force control of
robot manipulators", 1987): an action is a small offset of the EEF's pose, and torques pull the EEF
there as a damped spring would.
"""

import mujoco
import numpy as np

ARM = 7  # joints; their positions, velocities and actuators come first in the model

NO_SENSORS = int(mujoco.mjtDisableBit.mjDSBL_SENSOR)


class ControlLoop:
    """Steps a robosuite environment with one Panda and OSC_POSE. Made anew after each reset."""

    def __init__(self, env):
        from robosuite.utils import control_utils

        self.formulas = control_utils
        self.env = env
        self.robot = env.robots[0]
        self.controller = self.robot.controller
        self.gripper = self.robot.gripper
        self.model = env.sim.model._model
        self.data = env.sim.data._data
        self._check_assumptions()

        self.substeps = int(env.control_timestep / env.model_timestep)
        self._look_up(env.sim.data._data)
        self.torque_low, self.torque_high = self.robot.torque_limits
        # a gripper command in [-1, 1] becomes finger positions in the actuators' range, (2,) each
        limits = self.model.actuator_ctrlrange[ARM:]
        self.finger_bias = 0.5 * (limits[:, 1] + limits[:, 0])
        self.finger_weight = 0.5 * (limits[:, 1] - limits[:, 0])

        # read by robosuite's buffers alone; the dynamics do not depend on them
        self.model.opt.disableflags |= NO_SENSORS

    def _look_up(self, data):
        """Views into MuJoCo's memory, which follow the simulation, and the Jacobian's buffer.

        nv is the number of the model's velocities; those of the arm are the first seven.
        """
        self.site = self.model.site(self.controller.eef_name).id
        self.position = data.site_xpos[self.site]
        self.orientation = data.site_xmat[self.site].reshape(3, 3)
        self.qvel, self.arm_qvel, self.arm_qpos = data.qvel, data.qvel[:ARM], data.qpos[:ARM]
        # gravity, Coriolis and centrifugal torques (7,), which the controller compensates
        self.bias_forces = data.qfrc_bias[:ARM]
        self.mass, self.mass_entries = data.qM, self._mass_entries()
        self.arm_ctrl, self.finger_ctrl = data.ctrl[:ARM], data.ctrl[ARM:]
        # (6,nv): the EEF's linear velocity in the first three rows, its angular one in the others
        self.jacobian = np.zeros((6, self.model.nv))
        self.jacobian_linear, self.jacobian_angular = self.jacobian[:3], self.jacobian[3:]

    def _check_assumptions(self):
        """Raise RuntimeError where robosuite is set up in a way that this loop does not follow."""
        controller = self.controller
        fine = (
            len(self.env.robots) == 1
            and controller.name == "OSC_POSE"
            and controller.impedance_mode == "fixed"
            and controller.interpolator_pos is None
            and controller.interpolator_ori is None
            and controller.uncoupling
            and list(controller.qvel_index) == list(range(ARM))
            and list(controller.qpos_index) == list(range(ARM))
            and list(self.robot._ref_joint_actuator_indexes) == list(range(ARM))
            and list(self.robot._ref_joint_gripper_actuator_indexes) == [ARM, ARM + 1]
            and self.model.nu == ARM + 2
        )
        if not fine:
            raise RuntimeError(
                f"the control loop of sim/physics.py is for one arm under OSC_POSE in its default "
                f"settings; this is {controller.name} of {len(self.env.robots)} robots"
            )

    def _mass_entries(self):
        """Where the arm's mass matrix (7,7) lies in MuJoCo's sparse `qM`, as indices (7,7)."""
        # A trick: expand a sparse matrix whose entries are their own numbers. They count from 1,
        # as 0 stands for what is not stored.
        numbered = np.arange(1.0, self.model.nM + 1)
        full = np.zeros((self.model.nv, self.model.nv))
        mujoco.mj_fullM(self.model, full, numbered)
        entries = full[:ARM, :ARM].astype(np.intp) - 1
        assert (entries >= 0).all()  # the arm is one chain
        return entries

    def step(self, action):
        """One control step with an action (7,): six of the arm, one of the gripper."""
        model, data = self.model, self.data
        step1, step2, solve = mujoco.mj_step1, mujoco.mj_step2, mujoco.mj_fwdConstraint
        self.env.timestep += 1
        # the fingers' command moves by `speed` a substep towards open or closed
        fingers = self.gripper.current_action  # (2,) in [-1, 1]
        creep = np.array([-1.0, 1.0]) * self.gripper.speed * np.sign(action[6:])
        for substep in range(self.substeps):
            step1(model, data)
            # Each solve starts from the last one's accelerations: robosuite's two forward passes,
            # with the controls of the last substep, leave the step a better start. So do these.
            mujoco.mj_fwdActuation(model, data)
            mujoco.mj_fwdAcceleration(model, data)
            solve(model, data)
            solve(model, data)
            # the goal is fixed for the control step, the torques follow the state in each substep
            if substep == 0:
                self._set_goal(action[:6])
            torques = np.maximum(self._torques(), self.torque_low)
            np.minimum(torques, self.torque_high, out=self.arm_ctrl)
            # PandaGripper.format_action and Manipulator.grip_action
            fingers = np.minimum(np.maximum(fingers + creep, -1.0), 1.0)
            self.finger_ctrl[:] = self.finger_bias + self.finger_weight * fingers
            step2(model, data)
        self.gripper.current_action = fingers
        self.env.cur_time += self.env.control_timestep
        self.env._post_process()  # a stove that was turned on shows its burner

    def _set_goal(self, action):
        """Set robosuite's goal for an action (6,): the EEF's pose now, moved by the action."""
        controller = self.controller
        controller.ee_pos = np.array(self.position)
        controller.ee_ori_mat = np.array(self.orientation)
        controller.new_update = False  # what it would read is what was just written
        controller.set_goal(action)
        controller.new_update = True

    def _torques(self):
        """Torques (7,) in Nm towards the goal, not yet clipped.

        The formulas are those of robosuite's OperationalSpaceController.run_controller. The order
        of the operations is its order too: another one would round otherwise.
        """
        # the EEF's Jacobian (3,nv) twice, and from it its velocities (3,) in m/s and rad/s
        controller, formulas = self.controller, self.formulas
        jacobian, linear, angular = self.jacobian, self.jacobian_linear, self.jacobian_angular
        mujoco.mj_jacSite(self.model, self.data, linear, angular, self.site)
        velocity = np.dot(linear, self.qvel)
        turning = np.dot(angular, self.qvel)
        # robosuite's arrays are in Fortran's order here, which decides in what order BLAS sums
        arm = jacobian[:, :ARM].copy(order="F")
        arm_linear = linear[:, :ARM].copy(order="F")
        arm_angular = angular[:, :ARM].copy(order="F")
        mass = self.mass[self.mass_entries].T

        # a damped spring from the EEF's pose to the goal: accelerations (3,), linear and angular
        kp, kd = controller.kp, controller.kd
        rotation_error = formulas.orientation_error(controller.goal_ori, self.orientation)
        force = (controller.goal_pos - self.position) * kp[:3] + -velocity * kd[:3]
        torque = rotation_error * kp[3:] + -turning * kd[3:]

        # the inertia that the EEF shows, (J M^-1 J^T)^-1, taken apart for translation and rotation
        _, inertia, rotational_inertia, nullspace = formulas.opspace_matrices(
            mass, arm, arm_linear, arm_angular
        )
        wrench = np.concatenate([np.dot(inertia, force), np.dot(rotational_inertia, torque)])
        torques = np.dot(arm.T, wrench) + self.bias_forces
        # motions of the arm that leave the EEF where it is: pull the joints to their initial pose
        torques += formulas.nullspace_torques(
            mass, nullspace, controller.initial_joint, self.arm_qpos, self.arm_qvel
        )
        return torques


class RobosuiteLoop:
    """robosuite's loop behind the same method. `ControlLoop` is compared with it."""

    def __init__(self, env):
        self.env = env
        # a ControlLoop may have switched them off
        env.sim.model.opt.disableflags &= ~NO_SENSORS

    def step(self, action):
        """One control step with an action (7,)."""
        self.env.step(action)


LOOPS = {"lean": ControlLoop, "robosuite": RobosuiteLoop}
