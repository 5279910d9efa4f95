"""Instructions that are not the task's own: which object of a scene they name, and which task's
sentence names another object than the task does.

In LIBERO-Spatial every scene has two bowls, and the sentence of another task names the second one
by where it stands.
"""

import argparse

from runtime import UserError
from sim.simulator import parsed_bddl
from sim.tasks import find_task, number_of_tasks

OTHER = "other"


def _placed(task):
    """{object: (where it stands, its category)} of a Task's BDDL, and the object to pick."""
    said = parsed_bddl(task.bddl)
    category = {name: kind for kind, names in said["objects"].items() for name in names}
    places = {names[0]: names[1] for _, *names in said["initial_state"] if len(names) == 2}
    goal = said["goal_state"][0]
    found = {name: (place, category[name]) for name, place in places.items() if name in category}
    return found, goal[1] if len(goal) == 3 and goal[1] in category else None


def named_object(task, spoken):
    """Name of the object in a Task's scene that the sentence of the Task `spoken` is about: the
    only one of its kind, or of several the one that stands where that task's own does. None where
    there is none.
    """
    (here, _), (there, subject) = _placed(task), _placed(spoken)
    place, kind = there.get(subject, (None, None))
    alike = {name: where for name, (where, of_kind) in here.items() if of_kind == kind}
    if len(alike) > 1:
        alike = {name: where for name, where in alike.items() if where == place}
    return next(iter(alike), None)


def spoken_task(task, asked):
    """The Task whose sentence is spoken in a Task's scene. asked: its number in the suite, or
    "other" for the first one whose sentence names another object there.

    Raises UserError where the sentence names no object of the scene.
    """
    if asked == OTHER:
        _, own = _placed(task)
        tasks = [find_task(task.suite, i) for i in range(number_of_tasks(task.suite))]
        found = next((t for t in tasks if named_object(task, t) not in (None, own)), None)
        if found is None:
            raise UserError(
                f"--instruction_of other: no sentence of {task.suite} names another object in the "
                f"scene of {task.key}; leave it out, or give --instruction"
            )
        return found
    found = find_task(task.suite, asked)
    if named_object(task, found) is None:
        raise UserError(
            f"--instruction_of {asked}: {found.language!r} names nothing in the scene of "
            f"{task.key}; give --instruction_of other"
        )
    return found


def of_task(text):
    """The type of --instruction_of: a task's number, or "other"."""
    if text != OTHER and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a task's number nor other")
    return text if text == OTHER else int(text)


def spoken(args, task):
    """What eval.py's flags say in a Task's scene, as rows record it: {} for its own sentence.

    "instruction": the words; with --instruction_of "named": the object that they name there.
    """
    if args.instruction is not None:
        return {"instruction": args.instruction}
    if args.instruction_of is None:
        return {}
    said = spoken_task(task, args.instruction_of)
    return {"instruction": said.language, "named": named_object(task, said)}


def check(args, config):
    """Raise UserError for an instruction that nobody listens to. config: of the checkpoint, None
    without one.
    """
    given = [n for n in ("instruction", "instruction_of") if getattr(args, n) is not None]
    if len(given) == 2:
        raise UserError("--instruction and --instruction_of: give one of them")
    if not given or args.policy == "remote":
        return
    if config is None:
        raise UserError(f"--{given[0]}: --policy {args.policy} listens to nothing; leave it out")
    if config.get("text") not in ("learned", "clip"):
        raise UserError(
            f"--{given[0]}: {args.ckpt} was trained without instructions; train it on data of "
            "several, or with --text learned"
        )
