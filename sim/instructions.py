"""Instructions that are not the task's own: which object of a scene they name, and which task's
sentence names another object than the task does.

In LIBERO-Spatial every scene has two bowls, and the sentence of another task names the second one
by where it stands. A Request is what such a sentence asks for in the scene: a Scene that is asked
for it (`Scene.ask_for`) has LIBERO's predicate judge the named bowl, and the expert pick it.
"""

import argparse
from dataclasses import dataclass

from runtime import UserError
from sim.simulator import parsed_bddl
from sim.tasks import Task, chosen_tasks, find_task

OTHER = "other"


@dataclass(frozen=True)
class Request:
    """What a sentence asks for in a scene.

    task: whose sentence it is; named: name of the scene's object that it is about; goal: LIBERO's
    (predicate, object, place), which is the task's own, of that object.
    """

    task: Task
    named: str
    goal: tuple


def _placed(task):
    """{object: (where it stands, its category)} of a Task's BDDL, and the object to pick."""
    said = parsed_bddl(task.bddl)
    category = {name: kind for kind, names in said["objects"].items() for name in names}
    places = {names[0]: names[1] for _, *names in said["initial_state"] if len(names) == 2}
    goal = said["goal_state"][0]
    found = {name: (place, category[name]) for name, place in places.items() if name in category}
    return found, goal[1] if len(goal) == 3 and goal[1] in category else None


def picked_object(task):
    """Name of the object that a Task's first goal is about, None where it is about a fixture."""
    return _placed(task)[1]


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

    Raises UserError where the sentence names no object of the scene, or asks for two things.
    """
    if asked == OTHER:
        own = picked_object(task)
        tasks = [one for one in chosen_tasks(task.suite) if asks_for_one(one)]
        found = next((t for t in tasks if named_object(task, t) not in (None, own)), None)
        if found is None:
            raise UserError(
                f"--instruction_of other: no sentence of {task.suite} names another object in the "
                f"scene of {task.key}; leave it out, or choose another task"
            )
        return found
    found = find_task(task.suite, asked)
    if named_object(task, found) is None:
        raise UserError(
            f"--instruction_of {asked}: {found.language!r} names nothing in the scene of "
            f"{task.key}; give --instruction_of other"
        )
    if not asks_for_one(found):
        raise UserError(
            f"--instruction_of {asked}: {found.language!r} asks for several things, and one is "
            "counted here; give a task that asks for one"
        )
    return found


def asks_for_one(task):
    """Whether a Task is done once one thing holds, as a Request is."""
    return len(parsed_bddl(task.bddl)["goal_state"]) == 1


def request(task, asked):
    """The Request of another task's sentence in a Task's scene. asked: as of `spoken_task`, None
    for the scene's own sentence, which is no request. Raises UserError as `spoken_task` does.
    """
    if asked is None:
        return None
    said = spoken_task(task, asked)
    named = named_object(task, said)
    # where to, the sentence's own task says: its bowl may have another number in this scene
    predicate, _, *place = parsed_bddl(said.bddl)["goal_state"][0]
    return Request(said, named, (predicate, named, *place))


def is_told(index, share):
    """Whether the demonstration of this index is one of those to which another sentence is said.
    share: of all demonstrations; at 0.5 every second one, 1, 3, 5, ...
    """
    return int((index + 1) * share) > int(index * share)


def attributes(request):
    """What a demonstration says of the Request that it was recorded for. It is read again by
    `Demo.instruction` and by `request_of`.
    """
    return {"language": request.task.language, "instruction_of": request.task.index}


def request_of(task, attributes, where):
    """The Request that a demonstration in a Task's scene says it was recorded for, None for the
    task's own sentence. attributes: its own; where: file and demonstration, for the message.
    """
    index = attributes.get("instruction_of")
    if not isinstance(index, int | None):
        raise UserError(f"{where}: attribute 'instruction_of' is {index!r}, no task's number")
    return request(task, index)


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
    return said(task, args.instruction_of)


def said(task, asked):
    """What rows record of another task's sentence: {"instruction", "named"}, {} for none. asked: as
    of `request`.
    """
    found = request(task, asked)
    return {"instruction": found.task.language, "named": found.named} if found else {}


def listens(config):
    """Whether a checkpoint's policy is told instructions, by its config. "auto" is of before there
    were any.
    """
    return config.get("text", "none") not in ("none", "auto")


def check(args, config):
    """Raise UserError for an instruction that nobody listens to. config: of the checkpoint, None
    without one.
    """
    given = [n for n in ("instruction", "instruction_of") if getattr(args, n) is not None]
    given += ["plus language"] if args.plus == "language" else []
    if len(given) > 1:
        raise UserError(f"--{' and --'.join(given)}: give one of them")
    # these two are told by the scene's goal
    knowing = given == ["instruction_of"] and args.policy in ("expert", "oracle")
    if not given or knowing or args.policy == "remote":
        return
    if config is None:
        raise UserError(f"--{given[0]}: --policy {args.policy} listens to nothing; leave it out")
    if not listens(config):
        raise UserError(
            f"--{given[0]}: {args.ckpt} was trained without instructions; train it on data of "
            "several, or with --text learned"
        )
