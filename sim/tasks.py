"""LIBERO's suites and tasks: what each asks for, its files, its init states."""

import atexit
import contextlib
import functools
import glob
import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime import UserError
from sim.simulator import libero, parsed_bddl

# LIBERO's suites; a LIBERO-PRO suite is called SUITE_KIND, as libero_spatial_swap
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")


@dataclass(frozen=True)
class Task:
    """A LIBERO task: where it is and what it asks for. states: file of its init states, where it is
    not the suite's.
    """

    suite: str
    index: int
    name: str
    language: str
    bddl: str
    states: str = None

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
    with contextlib.redirect_stdout(io.StringIO()):  # LIBERO prints while it makes a suite
        return suites[name]()


def find_task(suite, index):
    """The Task with an index in a suite. Raises UserError for an unknown one, and for one that is
    listed but not installed.
    """
    tasks = _suite(suite)
    if not 0 <= index < tasks.get_num_tasks():
        raise UserError(f"--task_id {index}: {suite} has tasks 0 to {tasks.get_num_tasks() - 1}")
    task = tasks.get_task(index)
    bddl = Path(libero()[1]("bddl_files")) / task.problem_folder / task.bddl_file
    if not bddl.is_file():
        raise UserError(
            f"--task_suite {suite}: LIBERO lists it, but its file {bddl} is not installed; "
            "choose another suite"
        )
    return Task(suite, index, task.name, task.language, str(bddl))


def number_of_tasks(suite):
    """How many tasks a suite has. Raises UserError for an unknown one."""
    return _suite(suite).get_num_tasks()


def chosen_tasks(suite, indices="all"):
    """[Task] of a suite at indices, "all" or None for every one. Raises UserError for an unknown
    suite or task.
    """
    every = indices in (None, "all")
    return [find_task(suite, i) for i in (range(number_of_tasks(suite)) if every else indices)]


def installed_suites():
    """({name of a suite: number of its tasks}, [names of suites that LIBERO lists, but whose files
    are not all installed]), LIBERO's suites before LIBERO-PRO's.
    """
    benchmark, path_of = libero()[:2]
    whole, hollow = {}, []
    names = benchmark.get_benchmark_dict()
    for name in sorted(names, key=lambda n: (SUITES.index(n) if n in SUITES else len(SUITES), n)):
        try:
            tasks = [_suite(name).get_task(i) for i in range(_suite(name).get_num_tasks())]
        except Exception:  # a suite that is only half registered
            tasks = []
        # for each task, whether both its BDDL file and its init states are there
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
    """The Task whose BDDL file has this name. Raises UserError for none.

    Official datasets store the path on their author's machine: its last folder is the suite.
    """
    folder, name = Path(bddl_file_name).parent.name, Path(bddl_file_name).stem
    for suite in dict.fromkeys([folder, *SUITES]):
        with contextlib.suppress(UserError):
            for index in range(_suite(suite).get_num_tasks()):
                if _suite(suite).get_task(index).name == name:
                    return find_task(suite, index)
    raise UserError(
        f"bddl_file_name '{bddl_file_name}': no installed LIBERO task has that name; "
        "give --task_suite and --task_id"
    )


def unperturbed(task):
    """The Task that a task of a LIBERO-PRO suite perturbs: of libero_spatial for one of
    libero_spatial_swap. A task without such a namesake is answered itself.
    """
    suite = next((s for s in SUITES if task.suite.startswith(f"{s}_")), task.suite)
    names = _suite(suite).get_task_names()
    return find_task(suite, names.index(task.name)) if task.name in names else task


def only_task(info):
    """Key of the only task that a checkpoint was trained on; None of several, or where it does not
    say. info: what its header holds.
    """
    of_dataset = info.get("dataset", {})
    said = "task_suite" in of_dataset and "task_id" in of_dataset
    key = [f"{of_dataset['task_suite']}_{of_dataset['task_id']}"] if said else []
    keys = list(info.get("tasks") or key)
    return keys[0] if len(keys) == 1 else None


def trained_elsewhere(info, task):
    """Whether a checkpoint was trained on one task alone and that is neither a Task nor the one
    that it perturbs. info: as of `only_task`.
    """
    return only_task(info) not in (None, task.key, unperturbed(task).key)


def init_states(task):
    """The benchmark's init states of a Task, (N,S) flattened MuJoCo states [time, qpos, qvel].

    Raises UserError where they cannot be read.
    """
    if task.states:
        import torch

        # one state, or several in rows
        return np.atleast_2d(np.asarray(torch.load(task.states, weights_only=False), np.float64))
    try:
        states = _suite(task.suite).get_task_init_states(task.index)
    except (
        Exception
    ) as error:  # official LIBERO calls torch.load, which since 2.6 refuses its pickled arrays
        import torch

        entry = _suite(task.suite).get_task(task.index)
        path = Path(libero()[1]("init_states")) / entry.problem_folder / entry.init_states_file
        if not path.is_file():
            raise UserError(f"init states of {task.key} cannot be read: {error}") from error
        states = torch.load(path, weights_only=False)
    return np.asarray(states, dtype=np.float64)


def clean_bddl(task):
    """Write a Task's BDDL without distractors, and without fixtures that its goal does not name ->
    the path of the file, which is removed at exit.
    """
    from bddl.parsing import scan_tokens

    # nested lists: [define, [problem, name], [:objects, a, b, -, category, c, ...], ...]
    tokens = scan_tokens(filename=task.bddl)
    section = {group[0]: group for group in tokens[1:]}
    wanted = set(section[":obj_of_interest"][1:]) | {"main_table"}
    # {name: (section, category)}: names come before their category, with a dash between
    typed = {}
    for key in (":objects", ":fixtures"):
        names = []
        for token in section[key][1:]:
            names.append(token)
            if len(names) > 1 and names[-2] == "-":
                typed.update(dict.fromkeys(names[:-2], (key, names[-1])))
                names = []
    # what is of interest may be a region of a fixture, as wooden_cabinet_1_top_region
    keep = [n for n in typed if n in wanted or any(w.startswith(n) for w in wanted)]
    for key in (":objects", ":fixtures"):
        section[key][1:] = [t for n in keep if typed[n][0] == key for t in (n, "-", typed[n][1])]
    # no fact and no region may name what is gone; r[1] is (:target NAME)
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


def env_metadata(task):
    """The attributes that LIBERO's datasets have for a Task, {name: text}."""
    problem = parsed_bddl(task.bddl)["problem_name"]  # small letters
    return {
        "bddl_file_name": f"bddl_files/{task.suite}/{Path(task.bddl).name}",
        "env_name": problem.title(),
        "problem_info": json.dumps(
            {
                "problem_name": problem,
                "domain_name": "robosuite",
                "language_instruction": task.language,
            }
        ),
    }
