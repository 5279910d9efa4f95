"""How often the scripted expert succeeds on every task of a suite, and how it grasps;
`collect_demos.py --survey` prints it.
"""

from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from camera import project
from figures.pages import markdown_table
from harness.statistics import wilson
from runtime import UserError, command_line, fits, read_json, versions, write_json
from sim import instructions
from sim.expert import default_grasp
from sim.libero_env import OPEN_WIDTH, Scene
from sim.rollout import expert_episode, expert_version
from sim.settings import random_seed
from sim.tasks import chosen_tasks, init_states
from sim.variants import new_expert
from sim.workers import run_jobs

DRAWS = 30  # of a random layout, before it counts as impossible


class SurveyWorker:
    """Runs the expert from the states of one task per job, without rendering.

    states: numbers of init states, or of random layouts. grasp: as of sim/expert.py, or None for
    each task's own. asked: whose sentence the expert follows, see `instructions.spoken_task`.
    """

    def __init__(self, states, layouts, grasp, asked=None):
        self.states, self.layouts, self.grasp, self.asked = states, layouts, grasp, asked

    def run(self, job):
        """Job (suite, task index) -> its episodes [dict], or the sentence that says why the expert
        cannot do the task.
        """
        # nothing is rendered: the expert reads object poses from the simulator
        scene = Scene(*job, rendering=False)
        try:
            scene.ask_for(instructions.request(scene.task, self.asked))
            grasp = self.grasp or default_grasp(scene.asked)
            new_expert(grasp).plan(scene)
            return [self.episode(scene, grasp, number) for number in self.states]
        except UserError as reason:
            return str(reason)
        finally:
            scene.close()

    def episode(self, scene, grasp, number):
        """What came of the state of this number."""
        expert = new_expert(grasp)
        path = expert_episode(scene, self.start(scene, number), expert=expert)
        u, v, _ = project(path.positions, *scene.camera())
        inside = (np.minimum(u, v) >= 0) & (np.maximum(u, v) < scene.image_size)
        # LIBERO's predicate after the retract; and the fingers have let go
        released = path.success and scene.observe(image=False).gripper_width > OPEN_WIDTH
        return {
            "state": number,
            "success": path.success,
            "released": bool(released and expert.done),
            "steps": len(path.positions),
            "grasps": list(expert.log) or [grasp],
            "outside": round(float(1 - inside.mean()), 4),
        }

    def start(self, scene, number):
        """The state (S,) that an episode starts from."""
        if self.layouts == "benchmark":
            return scene.init_states()[number]
        for attempt in range(DRAWS):
            state = scene.random_layout(random_seed("val", 0, number, attempt))
            if state is not None:
                return state
        raise RuntimeError(f"{scene.task.key}: {DRAWS} draws gave no layout in which all stand")

    def close(self):
        pass


def table_row(task, outcome, said=None):
    """A task's row of the results. outcome: episodes [dict], or a sentence; said: another task's
    sentence, as eval.py's rows record it.
    """
    row = {"task_id": task.index, "task": task.name, **(said or {})}
    if isinstance(outcome, str):
        return {**row, "successes": None, "why": outcome}
    wins, n = sum(e["success"] for e in outcome), len(outcome)
    return {
        **row,
        "successes": wins,
        "n": n,
        "interval": list(wilson(wins, n)),
        "mean_steps": float(np.mean([e["steps"] for e in outcome])),
        "released": sum(e["released"] for e in outcome),
        "grasps": Counter(", ".join(e["grasps"]) for e in outcome),
        "outside": float(np.mean([e["outside"] for e in outcome])),
        "episodes": outcome,
    }


def survey(args):
    """Table the expert's success rate on the tasks of a suite and write it to results/, after each
    task: the same command goes on from there, and other tasks are added.

    args: collect_demos.py's, of which survey, task_ids, n_demos (states a task), first_state,
    layouts, grasp, instruction_of, workers and timeout (seconds that a task may take) count.
    """
    suite, states = args.survey, range(args.first_state, args.first_state + (args.n_demos or 50))
    # an unknown suite, or one with fewer tasks, is said before a simulator starts
    tasks = chosen_tasks(suite, args.task_ids)
    if args.layouts == "benchmark":
        available = min(len(init_states(task)) for task in tasks)
        if states.stop > available:
            raise UserError(
                f"--n_demos {len(states)}: from --first_state {states.start} on {suite} has "
                f"{max(0, available - states.start)} init states a task"
            )
    asked = args.instruction_of
    told = None if asked is None else f"told_{asked}"
    numbers = None if states == range(50) else f"states_{states.start}_{states.stop - 1}"
    words = [w for w in (args.grasp, args.layouts, told, numbers) if w not in (None, "benchmark")]
    name = "_".join(["expert", suite, *words])
    path = Path("results") / f"{name}.json"
    made_by = {
        "states": [states.start, states.stop],
        "layouts": args.layouts,
        "grasp": args.grasp,
        "expert": expert_version(),
        **({} if asked is None else {"instruction_of": asked}),
    }
    rows = finished(path, made_by)
    jobs = [(suite, task.index) for task in tasks if task.index not in rows]
    worker = (states, args.layouts, args.grasp, asked)
    by_index = {task.index: task for task in tasks}
    # recycle=1: each task gets a fresh process; results come as they finish
    bar = tqdm(total=len(tasks), initial=len(tasks) - len(jobs), desc="survey")
    for outcome in run_jobs(
        jobs, SurveyWorker, worker, args.workers, recycle=1, timeout=args.timeout
    ):
        index = outcome.job[1]
        # a table that lacks a task's numbers says why: the last line of its error
        error = outcome.error and outcome.error.strip().splitlines()[-1]
        result = error or outcome.result
        task = by_index[index]
        said = {} if isinstance(result, str) else instructions.said(task, asked)
        rows[index] = table_row(task, result, said)
        table = [rows[i] for i in sorted(rows)]
        write_json(
            path,
            {"command": command_line(), "versions": versions(), "made_by": made_by, "rows": table},
        )
        bar.update()
    bar.close()
    print(printed([rows[task.index] for task in tasks], tasks))


def finished(path, made_by):
    """{task's index: row} that a survey of the same states by the same expert has written.

    Raises UserError where another one has: its table is not replaced.
    """
    if not path.exists():
        return {}
    stored = read_json(path, "survey", "remove the file")
    if fits(stored, {"made_by": dict, "rows": [dict]}) or stored["made_by"] != made_by:
        raise UserError(
            f"{path}: is of another expert or simulator, and is left alone; move it, or remove it"
        )
    return {row["task_id"]: row for row in stored["rows"] if row["successes"] is not None}


def printed(rows, tasks):
    """The table as Markdown."""
    lines = []
    for row, task in zip(rows, tasks):
        if row["successes"] is None:
            lines.append([task.index, task.language, row["why"], "", "", "", ""])
            continue
        low, high = row["interval"]
        lines.append(
            [
                task.index,
                row.get("instruction", task.language),
                f"{row['successes']}/{row['n']}",
                f"{low:.2f}-{high:.2f}",
                f"{row['mean_steps']:.0f}",
                "; ".join(f"{words} ({n})" for words, n in row["grasps"].items()),
                f"{row['outside']:.0%}",
            ]
        )
    head = ["task", "", "success", "95% interval", "mean steps", "grasps", "outside the image"]
    return markdown_table(head, lines)
