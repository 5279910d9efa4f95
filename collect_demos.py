"""Demonstrations from the real simulator, in LIBERO's HDF5 layout with cameras.

    python collect_demos.py --n_demos 48                             # scripted expert, libero_spatial task 0
    python collect_demos.py --task_suite libero_goal --task_id 4     # a long free-space movement
    python collect_demos.py --setting viewpoint                      # training views of sim/settings.py; position: training positions
    python collect_demos.py --setting viewpoint --show views.png     # only a picture of all its conditions
    python collect_demos.py --grasp rim --layout_spread 0.05         # grasps around the rim: yaw varies with the objects
    python collect_demos.py --grasp rim --format smith300            # the same as a folder of real-robot episodes
    python collect_demos.py --variant lift_once --n_demos 40         # needs memory: lift once, put back, stay
    python collect_demos.py --replay OFFICIAL.hdf5 --image_size 448  # official states, re-rendered, cameras added
    python collect_demos.py --survey libero_spatial                  # the expert's success rate on every task

Each finished demo is its own file in OUT.parts until all are there; a killed run goes on from them.
"""

import argparse
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

import flags
from camera import project
from figures import plots_settings
from formats import hdf5, libero_hdf5, smith300
from formats.demos import simulated_with
from formats.parts import check_replaceable, gather, merge, part_path, readable
from rot_utils import matrix_to_euler, matrix_to_rotvec, rotvec_to_matrix
from runtime import UserError, atomic_path, command_line, fits, read_json, run_script, write_json
from sim import settings
from sim.expert import EXPERTS, servo_action
from sim.libero_env import OPEN, OPEN_WIDTH, Scene
from sim.placement import JOINT_JITTER
from sim.simulator import simulator_versions
from sim.tasks import env_metadata, find_task, task_of_bddl
from sim.variants import STAY_STEPS, VARIANTS, new_account, new_expert
from sim.workers import TIMEOUT, run_jobs

MAX_STEPS = 250
DISPLACE_STEPS = 60
# share of the image, along its edges, in which a turned camera may not show EEF, object or goal
IN_VIEW = 0.1
REPLAYED = "drop this demo, or take another file"
REPLAY_FORM = {
    "variant?": str,
    "setting?": str,
    "split?": str,
    "part?": str,
    "bddl_file_name?": str,
    "clean_scene?": (bool, int),
}
PUSHABLE = ("rise", "hover", "descend", "lift", "carry", "lower", "retract")  # not in gripper holds


class Recorder:
    """Collects one demonstration's rows and writes them as one HDF5 file."""

    def __init__(self, scene):
        self.scene, self.rows, self.images = scene, [], []

    def add(self, action, executed, perturbed):
        """Record the scene's current state with the action meant for it."""
        o = self.scene.observe()
        ori = matrix_to_rotvec(o.eef_rot)
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
        """Write the demonstration to its own file, atomically."""
        arrays = {key: np.stack([row[key] for row in self.rows]) for key in self.rows[0]}
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
            libero_hdf5.write_demo(file.create_group("demo"), arrays, np.stack(self.images))

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
        self.scene = Scene(args.task_suite, args.task_id, args.image_size, args.clean_scene)
        self.conditions = settings.conditions(args.setting, args.part, args.split)

    def run(self, index):
        """Try seeds of this index until one gives a good demonstration -> counts of what was
        filtered.
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
        third of that along x. Where every demonstration starts from one pose and every object
        stands to one side of it, "go that way" is all there is to learn."""
        scene, spread = self.scene, self.args.start_spread
        target = scene.observe(image=False).eef_pos + [
            rng.uniform(-spread, spread) / 3,
            rng.uniform(-spread, spread),
            0.0,
        ]
        for _ in range(DISPLACE_STEPS):
            eef = scene.observe(image=False).eef_pos
            if np.linalg.norm(target - eef) < 0.01:
                break
            scene.step(servo_action(eef, target, OPEN))

    def turn(self, rng):
        """Turn the camera about the robot's base by up to +- turn_spread degrees, by an angle at
        which EEF, object and goal stay in the image, or leave it where no such angle is drawn.
        Where every object stands to one side of the robot, an arm's looks alone would tell which
        way to go."""
        scene, spread = self.scene, self.args.turn_spread
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
        scene, recorder = self.scene, Recorder(self.scene)
        scene.begin_episode(scene.state())
        if self.args.start_spread:
            self.displace(rng)
        if self.args.turn_spread:
            self.turn(rng)
        expert, push, pushing = new_expert(self.args.grasp, self.args.variant).plan(scene), None, 0
        account = new_account(scene, self.args.variant)
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
            if not pushing and expert.phase in PUSHABLE and rng.random() < self.args.push_rate / 10:
                direction = rng.normal(size=3)
                # not into the table
                direction[2] = abs(direction[2]) if eef[2] < 1.05 else direction[2]
                push, pushing = direction / np.abs(direction).max(), int(rng.integers(3, 7))
            executed = np.concatenate([push, np.zeros(3), [gripper]]) if pushing else action
            recorder.add(action, executed, bool(pushing))
            scene.step(executed)
            pushing = max(0, pushing - 1)
        held_open = scene.observe(image=False).gripper_width > OPEN_WIDTH
        return recorder if expert.done and account.done(STAY_STEPS) and held_open else None

    def close(self):
        self.scene.close()


class ReplayWorker:
    """Re-renders one demo of an existing file from its stored states, through its own camera where
    it has one.
    """

    def __init__(self, args, folder):
        self.args, self.folder = args, Path(folder)
        self.scene = Scene(args.task_suite, args.task_id, args.image_size, args.clean_scene)

    def run(self, index):
        """Job: the demo's index -> counts."""
        path = self.args.replay
        with libero_hdf5.open_demos(path) as file:
            name = libero_hdf5.demo_names(file)[index]
            group = hdf5.group(path, file["data"], name, REPLAYED)
            states = hdf5.array(path, group, "states", REPLAYED, (None,), "f")
            rows = {"actions": hdf5.array(path, group, "actions", REPLAYED, (7,), "f")}
            for key, tail in (("executed_actions", (7,)), ("perturbed", ())):
                if hdf5.holds(path, group, key, REPLAYED):
                    rows[key] = hdf5.array(path, group, key, REPLAYED, tail)
            fixtures, E = libero_hdf5.stored_fixtures(path, group), None
            if hdf5.holds(path, group, libero_hdf5.CAMERA_E, REPLAYED):
                E = hdf5.array(path, group, libero_hdf5.CAMERA_E, REPLAYED)
                libero_hdf5.check_camera(np.eye(3), E, f"{path}: data/{name}")
            attributes = hdf5.attributes(path, group, REPLAYED)
            kept = {
                k: attributes[k]
                for k in ("setting", *vars(settings.Condition()))
                if k in attributes
            }
        for key, value in rows.items():
            if len(value) != len(states):
                raise UserError(
                    f"{path}: data/{name}/{key}: has {len(value)} rows, states has {len(states)}; {REPLAYED}"
                )
        actions = rows["actions"]
        executed, perturbed = (
            rows.get("executed_actions", actions),
            rows.get("perturbed", np.zeros(len(actions))) != 0,
        )
        if states.shape[1] != len(self.scene.state()):
            raise UserError(
                f"{path}: data/{name}/states: has {states.shape[1]} numbers a row, the task's simulator has "
                f"{len(self.scene.state())}; is it another task's? Give --task_suite and --task_id"
            )
        self.scene.set_fixtures(fixtures)
        self.scene.set_camera(E)
        recorder = Recorder(self.scene)
        for state, action, done, pushed in zip(states, actions, executed, perturbed):
            self.scene.set_state(state)
            recorder.add(action, done, bool(pushed))
        recorder.write(
            part_path(self.folder, index),
            source=f"replay of {Path(self.args.replay).name} {name}",
            pick=self.scene.pick or "",
            place=self.scene.place or "",
            success=self.scene.success(),
            **kept,
        )
        return Counter(not_successful_at_the_end=int(not self.scene.success()))

    def close(self):
        self.scene.close()


def show(args):
    """Draw every condition of a setting, rendered, into one picture."""
    if args.setting == "in_dist":
        raise UserError(
            "--show: in_dist has one condition only; give --setting viewpoint or position"
        )
    scene = Scene(
        args.task_suite or "libero_spatial", args.task_id, args.image_size, args.clean_scene
    )
    scene.begin_episode(scene.init_states()[0])
    plots_settings.PICTURES[args.setting](scene, args.split, args.show)
    scene.close()
    for part in settings.PARTS:
        print(
            f"{args.setting} {args.split}, {part}: {len(settings.conditions(args.setting, part, args.split))} conditions"
        )
    for part, c, why in settings.excluded(args.split) if args.setting == "viewpoint" else ():
        print(f"excluded from {part}: theta {c.theta:.1f}, phi {c.phi:.1f} deg, {why}")
    print(args.show)


def collect(args):
    """Collect or replay into args.out, resuming from its parts."""
    out, made_with = Path(args.out), simulator_versions()
    if args.replay:
        with libero_hdf5.open_demos(args.replay) as file:
            n_demos, attributes = (
                len(libero_hdf5.demo_names(file)),
                libero_hdf5.file_attributes_of(args.replay, file),
            )
        if fault := fits(attributes, REPLAY_FORM):
            raise UserError(f"{args.replay}: data, attributes: {fault}; {REPLAYED}")
        args.variant, simulated = (
            attributes.get("variant", args.variant),
            simulated_with(attributes),
        )
        if not n_demos:
            raise UserError(
                f"{args.replay}: data holds no demo_0, demo_1, ...: zero demonstrations"
            )
        if args.task_suite is None:
            if "bddl_file_name" not in attributes:
                raise UserError(
                    f"{args.replay}: attribute 'bddl_file_name' is missing; give --task_suite and --task_id"
                )
            task = task_of_bddl(attributes["bddl_file_name"])
            args.task_suite, args.task_id = task.suite, task.index
        worker, args.n_demos = ReplayWorker, min(n_demos, args.n_demos or n_demos)
        args.setting, args.split = (
            attributes.get("setting", "in_dist"),
            attributes.get("split") or None,
        )
        args.part = attributes.get("part", "train")  # validation conditions stay what they are
        args.clean_scene = (
            bool(attributes.get("clean_scene", False))
            if args.clean_scene is None
            else args.clean_scene
        )
        print(libero_hdf5.replay_note(args.replay, simulated.get("mujoco"), made_with["mujoco"]))
    else:
        n_conditions = len(settings.conditions(args.setting, args.part, args.split))
        worker, args.n_demos = (
            ExpertWorker,
            args.n_demos
            or (n_conditions if args.part == "val" else n_conditions * -(-48 // n_conditions)),
        )
    args.task_suite = args.task_suite or "libero_spatial"
    task = find_task(args.task_suite, args.task_id)
    folder = out.with_name(out.name + ".parts")
    unasked = ("workers", "timeout", "out", "n_demos", "overwrite", "survey", "n_tasks", "show")
    # one file, one physics
    asked = {
        **{k: v for k, v in vars(args).items() if k not in unasked},
        "mujoco": made_with["mujoco"],
    }
    check_replaceable(out, args.overwrite, args.format)
    stamp, again = folder / "settings.json", "finish it with the same command, or remove the folder"
    if folder.exists() and not stamp.exists():
        raise UserError(
            f"{folder}: is no folder of parts, it has no settings.json; remove it, or give another --out"
        )
    if stamp.exists() and read_json(stamp, "folder of parts", again) != asked:
        raise UserError(f"{folder}: holds parts of a run with other settings; {again}")
    write_json(stamp, asked)

    part = lambda i: part_path(folder, i, args.format)
    jobs = [i for i in range(args.n_demos) if not readable(part(i))]
    tally = folder / "counts.json"
    counts = Counter(
        read_json(tally, "folder of parts", "remove that file, it only counts", {...: int})
        if tally.exists()
        else {}
    )
    bar = tqdm(
        total=args.n_demos,
        initial=args.n_demos - len(jobs),
        desc=f"demonstrations of {task.key}",
        unit="demo",
    )
    failures = []
    for outcome in run_jobs(jobs, worker, (args, str(folder)), args.workers, timeout=args.timeout):
        if outcome.error:
            failures.append(outcome)
            tqdm.write(f"demo {outcome.job} failed: {outcome.error.strip().splitlines()[-1]}")
            continue
        counts.update(outcome.result)
        write_json(tally, counts)
        bar.update()
    bar.close()
    if failures:
        raise UserError(
            f"{len(failures)} of {args.n_demos} demonstrations failed, first: "
            f"{failures[0].error.strip().splitlines()[-1]}; the others are kept in {folder}, the same command resumes"
        )
    ours = {
        "grasp": args.grasp,
        "variant": args.variant,
        "setting": args.setting,
        "part": args.part,
        "split": args.split or "",
        "clean_scene": args.clean_scene,
    }
    attrs = libero_hdf5.file_attributes(
        task, {**env_metadata(task), **ours}, args.seed, command_line(), made_with
    )
    attrs.update({"replayed_versions": json.dumps(simulated)} if args.replay else {})
    if args.format == "smith300":
        own = {k: v for k, v in attrs.items() if k not in ("format", "image_orientation")}
        gather(
            folder,
            [part(i) for i in range(args.n_demos)],
            out,
            {**own, "versions": made_with, "num_demos": args.n_demos, **counts},
        )
    else:
        merge([part(i) for i in range(args.n_demos)], out, attrs, counts)
        shutil.rmtree(folder)
    filtered = (
        ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in counts.items() if v)
        or "nothing filtered"
    )
    print(f"{out}: {args.n_demos} demonstrations of {task.key} ({filtered})")


def build_parser():
    parser = flags.Parser(__doc__)
    parser.add_argument(
        "--task_suite", help="LIBERO suite (default libero_spatial, or the replayed file's)"
    )
    parser.add_argument("--task_id", type=flags.whole, default=0)
    parser.add_argument(
        "--n_demos",
        type=flags.count,
        help="demonstrations (48, or the next multiple of a setting's conditions), "
        "replayed demos (all), or surveyed states",
    )
    parser.add_argument(
        "--setting",
        default="in_dist",
        choices=list(settings.SPLITS),
        help="what the training conditions vary, see sim/settings.py",
    )
    parser.add_argument(
        "--part",
        default="train",
        choices=("train", "val"),
        help="conditions to train on, or validation conditions, on "
        "which study/diagnose.py looks at errors and nothing is trained",
    )
    parser.add_argument(
        "--split", help="viewpoint: outer or hemisphere; position: left_right or near_far"
    )
    parser.add_argument(
        "--show",
        type=flags.new_file(".png"),
        metavar="FILE",
        help="only draw every condition of --setting into this PNG",
    )
    parser.add_argument("--out", help="HDF5 file to write (data/SUITE_TASK.hdf5)")
    parser.add_argument(
        "--replay", metavar="FILE", help="re-render this LIBERO HDF5 from its states"
    )
    parser.add_argument(
        "--survey", metavar="SUITE", help="only table the expert's success on each task of a suite"
    )
    parser.add_argument(
        "--n_tasks", type=flags.count, default=10, help="survey only the suite's first N tasks"
    )
    parser.add_argument("--image_size", type=flags.pixels, default=448, help="pixels")
    parser.add_argument(
        "--clean_scene",
        action=argparse.BooleanOptionalAction,
        help="without distractors and unused fixtures (only for the settings viewpoint and position)",
    )
    parser.add_argument(
        "--start_jitter",
        type=flags.not_negative,
        default=JOINT_JITTER,
        help="std of the start joints, rad",
    )
    parser.add_argument(
        "--start_spread",
        type=flags.not_negative,
        default=0.0,
        help="start with the EEF moved by up to +- m along y, a third of it along x",
    )
    parser.add_argument(
        "--turn_spread",
        type=flags.not_negative,
        default=0.0,
        help="turn the camera about the robot's base, by up to +- degrees",
    )
    parser.add_argument(
        "--push_rate",
        type=flags.not_negative,
        default=0.15,
        help="pushes per 10 control steps of free motion",
    )
    parser.add_argument(
        "--layout_spread",
        type=flags.not_negative,
        default=0.0,
        help="further uniform shift of each task object, +- m",
    )
    parser.add_argument(
        "--grasp",
        default="side",
        choices=list(EXPERTS),
        help="side: always the bowl's -y rim; rim: around it, see expert.rim_angle",
    )
    parser.add_argument(
        "--variant",
        default="task",
        choices=VARIANTS,
        help="the task, or lift_once, see sim/variants.py",
    )
    parser.add_argument(
        "--format",
        default="libero",
        choices=("libero", "smith300"),
        help="HDF5 file, or folder of real-robot episodes",
    )
    parser.add_argument(
        "--video", action="store_true", help="smith300: an MP4 per episode instead of PNG frames"
    )
    parser.add_argument("--workers", type=flags.count, default=2)
    parser.add_argument(
        "--timeout",
        type=flags.positive,
        default=TIMEOUT,
        help="seconds after which a demonstration counts as hung",
    )
    parser.add_argument("--seed", type=flags.whole, default=0)
    parser.add_argument("--overwrite", action="store_true")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.survey:
        from study.survey import survey  # it imports torch, which no worker of a collection needs

        args.n_demos = args.n_demos or 50
        return survey(args.survey, args.n_tasks, args.n_demos, args.workers, args.timeout)
    drawn = [
        f"--{name}"
        for name in (
            "format",
            "grasp",
            "variant",
            "setting",
            "part",
            "split",
            "start_jitter",
            "start_spread",
            "turn_spread",
            "push_rate",
            "layout_spread",
            "video",
        )
        if getattr(args, name) != parser.get_default(name)
    ]
    if args.replay and drawn:
        raise UserError(
            f"--replay re-renders recorded states into an HDF5 file: {', '.join(drawn)} would have no effect; leave it out"
        )
    new_expert(args.grasp, args.variant)  # refuses a pair that it does not know
    if not args.replay:
        args.split = settings.resolve_split(args.setting, args.split)
        args.clean_scene = (
            settings.clean_by_default(args.setting)
            if args.clean_scene is None
            else args.clean_scene
        )
    if args.show:
        return show(args)
    if args.out is None:
        stem = (
            Path(args.replay).stem + "_replayed"
            if args.replay
            else f"{args.task_suite or 'libero_spatial'}_{args.task_id}"
        )
        stem += "" if args.grasp == "side" or args.replay else f"_{args.grasp}"
        stem += "" if args.variant == "task" else f"_{args.variant}"
        if args.setting != "in_dist":
            stem += f"_{args.setting}" + (
                "" if args.split == settings.SPLITS[args.setting][0] else f"_{args.split}"
            )
        stem += "" if args.part == "train" else "_val"
        args.out = f"data/{stem}_smith300" if args.format == "smith300" else f"data/{stem}.hdf5"
    collect(args)


if __name__ == "__main__":
    run_script(main)
