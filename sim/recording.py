"""The worker that records demonstrations of the scripted expert, and the recorder of one
demonstration. Each demonstration is a job of sim/workers.py.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from camera import project
from formats import hdf5, libero_hdf5, smith300
from formats.parts import part_path
from rot_utils import matrix_to_euler, matrix_to_rotvec, rotvec_to_matrix
from runtime import atomic_path
from sim import settings
from sim.expert import servo_action
from sim.libero_env import OPEN, OPEN_WIDTH, Scene
from sim.variants import STAY_STEPS, new_account, new_expert

# control steps: of a demonstration, and of the way to a displaced start
MAX_STEPS = 250
DISPLACE_STEPS = 60
# share of the image, along its edges, in which a turned camera may not show EEF, object or goal
IN_VIEW = 0.1
PUSHABLE = ("rise", "hover", "descend", "lift", "carry", "lower", "retract")  # not in gripper holds


class Recorder:
    """Collects one demonstration's rows, with an image of every `frame_stride`-th state."""

    def __init__(self, scene, frame_stride=1):
        self.scene, self.frame_stride = scene, frame_stride
        self.rows, self.images = [], []

    def add(self, action, executed, perturbed):
        """Record the scene's current state with the action (7,) meant for it. executed (7,): what
        is carried out, another one where `perturbed`.
        """
        seen = len(self.rows) % self.frame_stride == 0
        o = self.scene.observe(image=seen)
        ori = matrix_to_rotvec(o.eef_rot)  # LIBERO's files hold axis times angle, rad
        if seen:
            self.images.append(o.image)
        self.rows.append(
            {
                "states": self.scene.state(),
                "actions": action,
                "executed_actions": executed,
                "perturbed": perturbed,
                "obs/ee_pos": o.eef_pos,
                "obs/ee_ori": ori,
                "obs/ee_states": np.concatenate([o.eef_pos, ori]),
                "obs/gripper_states": o.gripper_qpos,
                "obs/joint_states": o.joint_pos,
                "robot_states": np.concatenate([o.gripper_qpos, o.eef_pos, o.eef_quat]),
            }
        )

    def write(self, path, **attrs):
        """Write the demonstration to its own HDF5 file, atomically. attrs: further attributes."""
        arrays = {key: np.stack([row[key] for row in self.rows]) for key in self.rows[0]}
        # as in LIBERO's files, the last frame is the rewarded one
        done = np.zeros(len(self.rows), np.uint8)
        done[-1] = 1
        K, E = self.scene.camera()
        arrays.update(
            {"rewards": done, "dones": done, libero_hdf5.CAMERA_K: K, libero_hdf5.CAMERA_E: E}
        )
        arrays["attrs"] = {
            "num_samples": len(self.rows),
            "init_state": arrays["states"][0],
            "fixtures": json.dumps(self.scene.fixtures()),
            **attrs,
        }
        with atomic_path(path) as scratch, hdf5.create(scratch) as file:
            group, images = file.create_group("demo"), np.stack(self.images)
            libero_hdf5.write_demo(group, arrays, images, self.frame_stride)

    def write_episode(self, folder, video):
        """Write the demonstration as a smith300 episode folder, atomically."""
        column = lambda key: np.stack([row[key] for row in self.rows]).astype(float)
        K, E = self.scene.camera()
        smith300.write_episode(
            folder,
            {
                "eef_pos_t": column("obs/ee_pos"),
                "eef_euler_t": matrix_to_euler(rotvec_to_matrix(column("obs/ee_ori"))),
                "gripper_t": (column("actions")[:, 6] > 0).astype(float),
                "perturbed_t": column("perturbed"),
                "states_t": column("states"),
                "gripper_width_t": np.abs(column("obs/gripper_states")).sum(-1),
                "intrinsics": K,
                "extrinsics": E,
            },
            self.images,
            video,
        )


class ExpertWorker:
    """Records one scripted demonstration per job (an index) into its own file."""

    def __init__(self, args, folder):
        self.args, self.folder = args, Path(folder)
        self.scene = Scene(
            args.task_suite, args.task_id, args.image_size, args.clean_scene, render=args.render
        )
        self.conditions = settings.conditions(args.setting, args.part, args.split)

    def run(self, index):
        """Try seeds of this index until one gives a good demonstration -> Counter of what was
        filtered out. Raises RuntimeError after 30 seeds without one.
        """
        counts, condition = Counter(), self.conditions[index % len(self.conditions)]
        offsets = self.scene.common_shift(condition)
        for attempt in range(30):
            seed = settings.random_seed(self.args.part, self.args.seed, index, attempt)
            state = self.scene.random_layout(
                seed, self.args.start_jitter, self.args.layout_spread, offsets
            )
            if state is None:
                counts["bad_resets"] += 1
                continue
            # after the layout, whose reset puts the camera back
            self.scene.set_view(condition)
            recorder = self.record(np.random.default_rng([*seed, 7]))
            if recorder is None:
                counts["failed_demos"] += 1
                continue
            if self.args.format == "smith300":
                recorder.write_episode(part_path(self.folder, index, "smith300"), self.args.video)
            else:
                recorder.write(
                    part_path(self.folder, index),
                    seed=seed,
                    source="scripted expert",
                    grasp=self.args.grasp,
                    variant=self.args.variant,
                    pick=self.scene.pick,
                    place=self.scene.place,
                    setting=self.args.setting,
                    **condition.described(self.args.setting),
                )
            return counts
        raise RuntimeError(
            f"30 seeds in a row gave no good demonstration for index {index}: {dict(counts)}"
        )

    def displace(self, rng):
        """Drive the EEF, unrecorded, to a place beside its start: +- start_spread metres along y, a
        third of that along x.

        Where every demonstration starts from one pose and every object stands to one side of it,
        "go that way" is all there is to learn.
        """
        scene, spread = self.scene, self.args.start_spread
        aside = [rng.uniform(-spread, spread) / 3, rng.uniform(-spread, spread), 0.0]
        target = scene.observe(image=False).eef_pos + np.array(aside)
        for _ in range(DISPLACE_STEPS):
            eef = scene.observe(image=False).eef_pos
            if np.linalg.norm(target - eef) < 0.01:
                break
            scene.step(servo_action(eef, target, OPEN))

    def turn(self, rng):
        """Turn the camera about the robot's base by up to +- turn_spread degrees.

        Angles are drawn until one keeps EEF, object and goal in the image. After 50 the camera
        stays. Where every object stands to one side of the robot, an arm's looks alone would tell
        which way to go.
        """
        scene, spread = self.scene, self.args.turn_spread
        # EEF, object and goal, (N,3) m in the world
        points = np.stack(
            [
                scene.observe(image=False).eef_pos,
                *(scene.position(n) for n in (scene.pick, scene.place) if n),
            ]
        )
        (K, E), base = scene.camera(), scene.position_of_base()
        for degrees in rng.uniform(-spread, spread, 50):
            turned = settings.turned(E, degrees, base[:2])
            u, v, _ = project(points, K, turned)
            if (
                min(u.min(), v.min()) > IN_VIEW * scene.image_size
                and max(u.max(), v.max()) < (1 - IN_VIEW) * scene.image_size
            ):
                return scene.set_camera(turned)

    def record(self, rng):
        """Run the expert from the current state -> Recorder, or None if it failed."""
        scene, recorder = self.scene, Recorder(self.scene, self.args.frame_stride)
        scene.begin_episode(scene.state())
        if self.args.start_spread:
            self.displace(rng)
        if self.args.turn_spread:
            self.turn(rng)
        expert, push, pushing = new_expert(self.args.grasp, self.args.variant).plan(scene), None, 0
        account = new_account(scene, self.args.variant)
        # one control step: ask the expert, perhaps push, record, carry out
        for _ in range(MAX_STEPS):
            now = scene.observe(image=False)
            eef = now.eef_pos
            target, gripper = expert.act(scene, eef, now.eef_rot)
            if expert.done:
                break
            account.note(scene.position(scene.pick), eef, gripper, now.gripper_width)
            action = servo_action(
                eef, target, gripper, rotation=expert.rotation, eef_rot=now.eef_rot
            )
            # A push replaces the expert's action for 3 to 6 steps. The recorded `actions` stay the
            # expert's, so that a policy learns to come back from beside the path.
            if not pushing and expert.phase in PUSHABLE and rng.random() < self.args.push_rate / 10:
                direction = rng.normal(size=3)
                # not into the table
                direction[2] = abs(direction[2]) if eef[2] < 1.05 else direction[2]
                push, pushing = direction / np.abs(direction).max(), int(rng.integers(3, 7))
            executed = np.concatenate([push, np.zeros(3), [gripper]]) if pushing else action
            recorder.add(action, executed, bool(pushing))
            scene.step(executed)
            pushing = max(0, pushing - 1)
        # a demonstration counts only if the task is done and the gripper has let go
        held_open = scene.observe(image=False).gripper_width > OPEN_WIDTH
        return recorder if expert.done and account.done(STAY_STEPS) and held_open else None

    def close(self):
        self.scene.close()
