"""The worker that records demonstrations of the scripted expert, and the recorder of one
demonstration. Each demonstration is a job of sim/workers.py.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from formats import hdf5, libero_hdf5, smith300
from formats.libero_cameras import ONE_SCENE
from formats.parts import part_path
from rot_utils import matrix_to_euler, matrix_to_rotvec, rotvec_to_matrix
from runtime import atomic_path
from sim import instructions, mistakes, moved_cameras, recipe, settings
from sim.expert import servo_action
from sim.libero_env import OPEN, OPEN_WIDTH, Scene
from sim.moved_cameras import VIEWS
from sim.tasks import find_task
from sim.variants import STAY_STEPS, new_account, new_expert

DISPLACE_STEPS = 60  # control steps of the way to a displaced start
# share of the image, along its edges, in which a turned camera may not show EEF, object or goal
IN_VIEW = 0.1
OUTLINE = 0.7  # share of an object's radius at which it may not be hidden
ATTEMPTS = 300  # at a good demonstration: of a hard setting nine in ten layouts are bad
PUSHABLE = ("rise", "hover", "descend", "lift", "carry", "lower", "retract")  # not in gripper holds


class Recorder:
    """Collects one demonstration's rows, with an image of every `frame_stride`-th state."""

    def __init__(self, scene, frame_stride=1):
        self.scene, self.frame_stride = scene, frame_stride
        self.rows, self.images = [], []
        self.condition = None  # the settings.Condition that it was recorded in

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


class Scenes:
    """A worker's scenes, the clean one and the full one, each made when it is first asked for."""

    def __init__(self, args):
        self.args, self.made = args, {}

    def __getitem__(self, clean):
        if clean not in self.made:
            a = self.args
            self.made[clean] = Scene(a.task_suite, a.task_id, a.image_size, clean, render=a.render)
        return self.made[clean]

    def close(self):
        for scene in self.made.values():
            scene.close()


class ExpertWorker:
    """Records one scripted demonstration per job (an index) into its own file."""

    def __init__(self, args, folder):
        self.args, self.folder, self.scenes = args, Path(folder), Scenes(args)
        self.conditions = settings.conditions(args.setting, args.part, args.split)
        task = find_task(args.task_suite, args.task_id)
        self.request = instructions.request(task, args.instruction_of)

    def run(self, index):
        """Try seeds of this index until one gives a good demonstration -> Counter of what was
        filtered out. Raises RuntimeError after ATTEMPTS seeds without one.
        """
        args, counts = self.args, Counter()
        clean = args.clean_scene
        if clean is None:  # half of the recipe's demonstrations each
            clean = recipe.is_clean(args.part, args.seed, index)
        self.scene = self.scenes[clean]
        told = self.request is not None and instructions.is_told(index, args.instruction_share)
        self.scene.ask_for(self.request if told else None)
        for attempt in range(ATTEMPTS):
            seed, condition = self.lay_out(index, attempt)
            if condition is None:
                counts["bad_resets"] += 1
                continue
            self.view_rng = np.random.default_rng(moved_cameras.view_seed(seed, args.task_id))
            recorder = self.record(np.random.default_rng([*seed, 7]), condition)
            if isinstance(recorder, str):
                counts[recorder] += 1
                continue
            if args.format == "smith300":
                recorder.write_episode(part_path(self.folder, index, "smith300"), args.video)
            else:
                recorder.write(
                    part_path(self.folder, index),
                    seed=seed,
                    source="scripted expert",
                    grasp=args.grasp,
                    variant=args.variant,
                    pick=self.scene.pick or "",
                    place=self.scene.place or "",
                    setting=args.setting,
                    **(instructions.attributes(self.request) if told else {}),
                    **self.described(recorder.condition),
                )
            return counts
        raise RuntimeError(
            f"{ATTEMPTS} seeds in a row gave no good demonstration for index {index} "
            f"({dict(counts)}): give less --layout_spread, --start_spread or --turn_spread, or "
            "another --seed"
        )

    def lay_out(self, index, attempt):
        """Put a demonstration's objects into the scene -> (seed, settings.Condition, or None for a
        bad layout).
        """
        args, scene = self.args, self.scene
        if args.setting == "recipe":
            seed = settings.random_seed(recipe.PURPOSE[args.part], args.seed, index, attempt)
            condition = recipe.drawn(args.part, args.seed, index, attempt, scene.clean)
            state = scene.placed_layout(seed, args.start_jitter, condition.place_of)
        else:
            seed = settings.random_seed(args.part, args.seed, index, attempt)
            # tasks that share a scene would otherwise share all their layouts
            seed += [args.task_id] * (args.task_suite in ONE_SCENE)
            condition = self.conditions[index % len(self.conditions)]
            offsets = scene.common_shift(condition)
            state = scene.random_layout(seed, args.start_jitter, args.layout_spread, offsets)
        return seed, None if state is None else condition

    def described(self, condition):
        """A demonstration's condition as attributes of its group."""
        found = condition.described(self.args.setting)
        if self.args.setting == "recipe":
            found["clean_scene"] = self.scene.clean
            found["places"] = json.dumps(found["places"])  # attributes hold no tables
        return found

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

    def aim(self, rng, condition):
        """Put the camera where a demonstration has it -> the settings.Condition with its view, or
        None where no view of the recipe shows EEF, object and goal.

        Turned about the robot's base by up to +- turn_spread degrees: where every object stands to
        one side of the robot, an arm's looks alone would tell which way to go. Views are drawn
        until one is good. After VIEWS, a camera that is only turned stays where it is.
        """
        scene, spread, base = self.scene, self.args.turn_spread, self.scene.position_of_base()[:2]
        of_recipe = self.args.setting == "recipe"
        if self.args.setting == "cameras":
            return moved_cameras.put(scene, self.view_rng)
        if of_recipe:
            views = recipe.views(rng, self.args.part, spread, VIEWS, self.args.loose_camera)
            found = [replace(view, places=condition.places) for view in views]
        else:
            turns = rng.uniform(-spread, spread, VIEWS) if spread else [0.0]
            found = [replace(condition, turn=float(turn)) for turn in turns]
        for view in found:
            # from the task's own view: orbited and put as by hand, then turned
            scene.set_view(view)
            if view.turn:
                scene.set_camera(settings.turned(scene.camera()[1], view.turn, base))
            seen = self.in_view() and (not of_recipe or self.unhidden())
            if seen or not spread and not of_recipe:
                return view
        scene.set_view(condition)
        return None if of_recipe else condition

    def in_view(self):
        """True if the camera shows EEF, object and goal, and not at the image's edge."""
        scene = self.scene
        things = [scene.position(n) for n in (scene.pick, scene.place) if n]
        return moved_cameras.shows(scene, [scene.observe(image=False).eef_pos, *things], IN_VIEW)

    def unhidden(self):
        """True if nothing, such as the cabinet, stands before the object or the goal."""
        scene = self.scene
        for name in (scene.pick, scene.place):
            # the middle, a little above the table, and four points around it
            around = (
                OUTLINE * recipe.RADIUS[name] * np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
            )
            points = scene.position(name) + np.insert(around, 2, 0.01, axis=1)
            if any(scene.hidden(point, f"{name}_main") for point in points):
                return False
        return True

    def record(self, rng, condition):
        """Run the expert from the current state -> Recorder, or why there is none: "views_refused",
        "failed_demos", "other_sides" of the object gripped than the task's own.
        """
        scene, recorder = self.scene, Recorder(self.scene, self.args.frame_stride)
        scene.begin_episode(scene.state())
        if self.args.start_spread:
            self.displace(rng)
        # after the layout, whose reset puts the camera back
        recorder.condition = self.aim(rng, condition)
        if recorder.condition is None:
            return "views_refused"
        mistaken = rng.random() < self.args.mistake_rate
        mistaken = mistaken and mistakes.can_fail(scene, self.args.grasp)
        if mistaken and not self.mistake(rng, recorder):
            return "mistakes_that_succeeded"
        expert, push, pushing = new_expert(self.args.grasp, self.args.variant).plan(scene), None, 0
        account = new_account(scene, self.args.variant)
        if not expert.by_its_side:
            return "other_sides"
        # one control step: ask the expert, perhaps push, record, carry out
        for _ in range(expert.max_steps):
            now = scene.observe(image=False)
            eef = now.eef_pos
            target, gripper = expert.act(scene, eef, now.eef_rot)
            if expert.done:
                break
            account.note(scene.position(scene.subject), eef, gripper, now.gripper_width)
            action = servo_action(
                eef, target, gripper, rotation=expert.rotation, eef_rot=now.eef_rot
            )
            # A push replaces the expert's action for 3 to 6 steps. The recorded `actions` stay the
            # expert's, so that a policy learns to come back from beside the path.
            if not pushing and expert.phase in PUSHABLE and rng.random() < self.args.push_rate / 10:
                direction = rng.normal(size=3)
                # not into the table
                low = eef[2] < scene.support + 0.15
                direction[2] = abs(direction[2]) if low else direction[2]
                push, pushing = direction / np.abs(direction).max(), int(rng.integers(3, 7))
            executed = np.concatenate([push, np.zeros(3), [gripper]]) if pushing else action
            recorder.add(action, executed, bool(pushing))
            scene.step(executed)
            pushing = max(0, pushing - 1)
        # a demonstration counts only if the task is done and the gripper has let go
        held_open = scene.observe(image=False).gripper_width > OPEN_WIDTH
        if not (expert.done and account.done(STAY_STEPS) and held_open):
            return "failed_demos"
        return recorder if expert.by_its_side else "other_sides"

    def mistake(self, rng, recorder):
        """Record a failing attempt, see sim/mistakes.py -> False if it does not fail.

        All its frames are `perturbed`: they are context, and nothing is learnt from them.
        """
        scene = self.scene
        rest = scene.position(scene.pick)[2]
        plan = mistakes.plan_of(scene, self.args.grasp)
        for target, gripper in mistakes.attempt(scene, rng, plan):
            now = scene.observe(image=False)
            action = servo_action(
                now.eef_pos, target, gripper, rotation=plan.rotation, eef_rot=now.eef_rot
            )
            recorder.add(action, action, True)
            scene.step(action)
            if scene.position(scene.pick)[2] > rest + mistakes.LIFTED:
                return False
        return True

    def close(self):
        self.scenes.close()
