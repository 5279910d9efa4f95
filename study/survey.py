"""How often the scripted expert succeeds on every task of a suite; `collect_demos.py --survey`
prints it.
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from figures.pages import markdown_table
from harness.statistics import wilson
from runtime import command_line, versions, write_json
from sim.libero_env import Scene
from sim.rollout import expert_episode
from sim.tasks import find_task
from sim.workers import run_jobs


class SurveyWorker:
    """Runs the expert on benchmark init states of one task per job, without rendering."""

    def __init__(self, n_states):
        self.n_states = n_states

    def run(self, job):
        """Job (suite, task index) -> (successes, n, mean steps); None where the goal is not of the
        form (On object target), which alone the expert can do.
        """
        # nothing is rendered: the expert reads object poses from the simulator
        scene = Scene(*job, image_size=64, rendering=False)
        try:
            # the expert knows one kind of task: put a movable object on a target
            if (
                scene.pick not in scene.objects
                or scene.env.env.parsed_problem["goal_state"][0][0] != "on"
            ):
                return None
            wins, steps = 0, []
            for state in scene.init_states()[: self.n_states]:
                path = expert_episode(scene, state)
                wins += path.success
                steps.append(len(path.positions))
            return wins, len(steps), float(np.mean(steps))
        finally:
            scene.close()

    def close(self):
        pass


def survey(suite, n_tasks, n_states, workers, timeout):
    """Table the expert's success rate on the first tasks of a suite, `n_states` init states each,
    and write it to results/.

    timeout: seconds that a task may take.
    """
    for i in range(n_tasks):
        # an unknown suite, or one with fewer tasks, is said before a simulator starts
        find_task(suite, i)
    jobs = [(suite, i) for i in range(n_tasks)]
    rows = {}
    # recycle=1: each task gets a fresh process; results come as they finish
    for outcome in tqdm(
        run_jobs(jobs, SurveyWorker, (n_states,), workers, recycle=1, timeout=timeout),
        total=len(jobs),
        desc="survey",
    ):
        # a table that lacks a task's numbers says why: the last line of its error
        rows[outcome.job[1]] = (
            outcome.result if outcome.error is None else outcome.error.strip().splitlines()[-1]
        )
    lines, table = [], []
    # printed in the order of the tasks
    for _, i in jobs:
        task, row = find_task(suite, i), rows[i]
        if isinstance(row, tuple):
            low, high = wilson(row[0], row[1])
            lines.append(
                [i, task.language, f"{row[0]}/{row[1]}", f"{low:.2f}-{high:.2f}", f"{row[2]:.0f}"]
            )
            table.append(
                {
                    "task_id": i,
                    "task": task.name,
                    "successes": row[0],
                    "n": row[1],
                    "interval": [low, high],
                    "mean_steps": row[2],
                }
            )
        else:
            lines.append([i, task.language, row or "not a pick-and-place goal", "", ""])
            table.append(
                {
                    "task_id": i,
                    "task": task.name,
                    "successes": None,
                    "why": row or "not a pick-and-place goal",
                }
            )
    print(markdown_table(["task", "", "success", "95% interval", "mean steps"], lines))
    write_json(
        Path("results") / f"expert_{suite}.json",
        {"command": command_line(), "versions": versions(), "rows": table},
    )
