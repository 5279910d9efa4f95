"""What an evaluation came to, episode by episode, whoever ran it: eval.py's folder, LeRobot's
eval_info.json, or a plain CSV file.
"""

import csv
import io
import re
from pathlib import Path
from typing import NamedTuple

from harness.metrics import EARLY, within
from runtime import UserError, read_json, read_jsonl

METRICS = ("success", f"success_{EARLY}", "released")
# what an episode is known by, of which some files lack some
FIELDS = ("task", "layout", "episode", "seed")
# what both sides of a comparison should have in common, as eval.py's settings.json names it
PROTOCOL = ("task", "layout", "variant", "split", "max_steps", "render", "clean_scene")
PROTOCOL += ("teleport", "zero_rotation", "stop_stalled", "mujoco", "instruction", "instruction_of")
# eval.py leaves these out of settings.json, or its older versions did
USUAL = {"render": "exact", "stop_stalled": "False", "variant": "task"}
USUAL |= dict.fromkeys(("instruction", "instruction_of"), "None")
LIBERO_SUITES = {f"libero_{name}" for name in ("spatial", "object", "goal", "10", "90")}
PRO_SUITES = ("swap", "object", "lan", "task", "env")  # endings of LIBERO-PRO's suites
# column of a CSV file -> names that it is accepted under
COLUMNS = {
    "success": ("success", "is_success"),
    "task": ("task", "task_id"),
    "layout": ("layout", "setting"),
    "episode": ("episode", "init_state", "episode_ix", "episode_index"),
    "seed": ("seed",),
    "train_seed": ("train_seed",),
    "released": ("released",),
    "first_success": ("first_success",),
}
# LeRobot's file does not say which init states its own environment played
TAKEN_FOR_GRANTED = "the benchmark's in their order"
YES, NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")
# forms of `runtime.fits`, of what is used here
SCORED = {"episode": int, "success": bool, "layout?": str, "seed?": int}
CRASHED = {"episode": int, "crash": str}
LEROBOT_TASKS = {
    "per_task": [{"task_group": str, "task_id": int, "metrics": {"successes": [bool]}}]
}
LEROBOT_ONE = {"per_episode": [{"episode_ix": int, "success": bool, "seed?": (int, None)}]}


class Key(NamedTuple):
    """What an episode is known by; None for what its file does not say."""

    task: str = None
    layout: str = None
    episode: object = None
    seed: object = None


class Run(NamedTuple):
    """One evaluation of one training.

    episodes: {Key: row}, or {number: row} where no file names its episodes; crashed: keys of
    episodes that the simulator lost; protocol: {name: text} of PROTOCOL, as far as known;
    train_seed: of the policy, None if unknown.
    """

    path: Path
    kind: str
    episodes: dict
    crashed: frozenset = frozenset()
    protocol: dict = {}
    train_seed: object = None

    def fields(self):
        """Names of FIELDS that every episode has."""
        keys = [*self.episodes, *self.crashed]
        named = all(isinstance(k, Key) for k in keys)
        return {f for f in FIELDS if named and all(getattr(k, f) is not None for k in keys)}

    def won(self, metric):
        """{key: bool} by a metric. Raises UserError where the file does not say."""
        return {k: reached(row, metric, self.path) for k, row in self.episodes.items()}


def reached(row, metric, path):
    """Whether an episode's row counts as won by one of METRICS."""
    key, steps = ("success", EARLY) if metric == METRICS[1] else (metric, None)
    needed = "first_success" if steps and row["success"] else key
    if row.get(needed) is None:
        raise UserError(
            f"{path}: has no {needed} of its episodes, which --metric {metric} needs; "
            "use --metric success"
        )
    return within(row, key, steps)


# -- reading --------------------------------------------------------------------------------------


def read_runs(path):
    """The runs in a file or evaluation folder -> [Run]; a CSV file may hold several training seeds.

    Raises UserError in one sentence for what is none of the three kinds, or damaged.
    """
    path = Path(path)
    parts = sorted(path.glob("*/episodes.jsonl"))
    if parts and not (path / "episodes.jsonl").is_file():
        # of several tasks, a folder each; suite.json comes once all are there
        return finished(path, [run for part in parts for run in read_ours(part)])
    if path.is_dir():
        inside = [path / name for name in ("episodes.jsonl", "eval_info.json")]
        found = next((p for p in inside if p.is_file()), None)
        if found is None:
            raise UserError(
                f"{path}: holds neither episodes.jsonl of eval.py nor eval_info.json of LeRobot; "
                "name the folder of one evaluation"
            )
        path = found
    if not path.is_file():
        raise UserError(f"{path}: there is no such file or folder; name an existing evaluation")
    readers = {".jsonl": read_ours, ".json": read_lerobot, ".csv": read_csv}
    if path.suffix not in readers:
        raise UserError(
            f"{path}: is no episodes.jsonl, eval_info.json or .csv file; give one of these, "
            "or the folder of an evaluation"
        )
    return finished(path, readers[path.suffix](path))


def finished(path, runs):
    """The runs in a path. Raises UserError where none has a finished episode."""
    if not any(run.episodes for run in runs):
        raise UserError(f"{path}: holds no finished episode; run its evaluation first")
    return runs


def read_ours(path):
    """eval.py's episodes.jsonl, with the settings.json and summary.json beside it if there."""
    rows = read_jsonl(path, "remove that line, its episode is run again", (SCORED, CRASHED))
    beside = lambda name: path.with_name(name).is_file()
    settings = (
        read_json(path.with_name("settings.json"), "evaluation") if beside("settings.json") else {}
    )
    summary = (
        read_json(path.with_name("summary.json"), "evaluation") if beside("summary.json") else {}
    )
    suite, number = (settings.get(k, summary.get(k)) for k in ("task_suite", "task_id"))
    task = f"{suite}/{number}" if suite is not None else None
    layout = settings.get("layout")
    episodes, crashed = {}, set()
    for row in rows:
        # of an episode that was run again, the last row counts
        key = Key(task, row.get("layout", layout), row["episode"], row.get("seed", 0))
        if "crash" in row:
            crashed.add(key)
        else:
            episodes[key] = row
    known = {k: str(v) for k, v in {**summary, **settings}.items() if k in PROTOCOL}
    versions = summary.get("versions") or {}
    protocol = {**(USUAL if settings else {}), **known}
    if "mujoco" not in protocol and versions.get("mujoco"):
        protocol["mujoco"] = versions["mujoco"]
    if task:
        protocol["task"] = task
    if layouts := sorted({k.layout for k in episodes if k.layout}):
        protocol["layout"] = " ".join(layouts)
    return [
        Run(
            path,
            "eval.py",
            episodes,
            frozenset(crashed - set(episodes)),
            protocol,
            seed_of(settings, summary),
        )
    ]


def seed_of(settings, summary):
    """Seed of the training of the policy that an evaluation of eval.py is of; None if unknown."""
    trained = summary.get("trained")
    if isinstance(trained, dict) and trained.get("seed") is not None:
        return trained["seed"]
    # settings.json has it while the evaluation is still going
    found = re.search(r" seed (\d+)", str(settings.get("trained")))
    return int(found[1]) if found else None


def suite_and_layout(group):
    """A group of LeRobot's tasks -> (suite, our layout, None where unknown, its first episode):
    LIBERO's suites by LeRobot's own environment, SUITE_LAYOUT or SUITE_LAYOUT_fromN by
    plugins/lerobot_env_libero_calibrated.
    """
    group, _, first = re.fullmatch(r"(.*?)(_from(\d+))?", group).groups()
    first = int(first or 0)
    perturbed = {f"{suite}_{kind}" for suite in LIBERO_SUITES for kind in PRO_SUITES}
    if group in perturbed:
        return group, None, first
    for suite in (*perturbed, *LIBERO_SUITES):
        if group == suite:
            return suite, "benchmark", first
        if group.startswith(f"{suite}_"):
            return suite, group.removeprefix(f"{suite}_"), first
    return group, None, first


def read_lerobot(path):
    """LeRobot's eval_info.json: per_task with successes in the order of the episodes, or the older
    per_episode. Its LIBERO environment takes the benchmark's init states in that order.
    """
    remedy = "give the eval_info.json that lerobot-eval wrote"
    found = read_json(path, "evaluation of LeRobot", remedy, (LEROBOT_TASKS, LEROBOT_ONE))
    episodes = {}
    for task in found.get("per_task", ()):
        group, layout, first = suite_and_layout(task["task_group"])
        number = task["task_id"]
        for i, success in enumerate(task["metrics"]["successes"], first):
            episodes[Key(f"{group}/{number}", layout, i)] = {"success": success}
    for row in found.get("per_episode", ()):
        episodes[Key(None, None, row["episode_ix"], row.get("seed"))] = {"success": row["success"]}
    protocol = {}
    if any(task["task_group"] in LIBERO_SUITES for task in found.get("per_task", ())):
        protocol["init_states"] = TAKEN_FOR_GRANTED
    for name in ("task", "layout"):
        values = sorted({str(getattr(k, name)) for k in episodes})
        if values and "None" not in values:
            protocol[name] = " ".join(values)
    return [Run(path, "LeRobot", episodes, protocol=protocol)]


def read_csv(path):
    """A CSV file with a header, see COLUMNS for names; other columns are left alone."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); save it so") from error
    # what the header separates its names with
    separator = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text), delimiter=separator)
    header = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
    names = {
        column: next((header[n] for n in accepted if n in header), None)
        for column, accepted in COLUMNS.items()
    }
    if names["success"] is None:
        raise UserError(
            f"{path}: its header has no column 'success'; columns are "
            f"{', '.join('/'.join(accepted) for accepted in COLUMNS.values())}"
        )
    by_seed = {}
    for line in reader:
        where = f"{path}: line {reader.line_num}"
        cells = {c: (line[n] or "").strip() for c, n in names.items() if n is not None}
        row = {"success": truth(cells["success"], where, "success")}
        if cells.get("released"):
            row["released"] = truth(cells["released"], where, "released")
        if cells.get("first_success"):
            row["first_success"] = whole(cells["first_success"], where, "first_success")
        episodes = by_seed.setdefault(number_or_text(cells.get("train_seed")), {})
        key = Key(
            cells.get("task") or None,
            cells.get("layout") or None,
            *(number_or_text(cells.get(name)) for name in ("episode", "seed")),
        )
        # without names of episodes nothing pairs, and equal rows are no repetition
        key = len(episodes) if key.episode is None else key
        if key in episodes:
            named = ", ".join(f"{f} {v}" for f, v in key._asdict().items() if v is not None)
            raise UserError(f"{where}: repeats {named}; keep one row of it")
        episodes[key] = row
    return [Run(path, "CSV", episodes, train_seed=seed) for seed, episodes in by_seed.items()]


def truth(text, where, column):
    """A cell of a CSV file as a bool."""
    if text.lower() not in YES + NO:
        raise UserError(f"{where}: {column} is '{text}'; write 1 or 0, true or false")
    return text.lower() in YES


def whole(text, where, column):
    """A cell of a CSV file as a whole number."""
    if not text.isdecimal():
        raise UserError(f"{where}: {column} is '{text}'; write a whole number of control steps")
    return int(text)


def number_or_text(text):
    """A cell of a CSV file that names an episode or seed: a number where it is one."""
    return None if not text else int(text) if text.isdecimal() else text


# -- pairing --------------------------------------------------------------------------------------


def pairing(one, other):
    """By which of FIELDS the episodes of two runs pair -> (fields, ""), or (None, why not)."""
    fields = one.fields() & other.fields()
    if "episode" not in fields:
        return None, "no episode or init state is named on both sides"
    names = [name for name in FIELDS if name in fields]
    for run in (one, other):
        if len({short(k, names) for k in run.episodes}) < len(run.episodes):
            return None, f"{run.path} has several episodes of the same {', '.join(names)}"
    if not shared(one, other, names):
        return None, f"no {', '.join(names)} is on both sides"
    return names, ""


def short(key, names):
    """An episode's key, of some fields."""
    return tuple(getattr(key, name) for name in names)


def shared(one, other, names):
    """Keys that both runs have, of some fields, in their order."""
    both = {short(k, names) for k in one.episodes} & {short(k, names) for k in other.episodes}
    return sorted(both, key=order)


def order(key):
    """Sorts keys whose fields are numbers or texts; numbers in a text by their size, so that task
    10 comes after task 2.
    """
    words = lambda part: re.split(r"(\d+)", part)
    by_size = lambda part: [(w.isdecimal(), int(w) if w.isdecimal() else w) for w in words(part)]
    return [(1, by_size(part)) if isinstance(part, str) else (0, part) for part in key]


def left_out(before, key, at):
    """Whether numbers of episodes of one task are missing between two keys. at: their place."""
    numbers = before[at], key[at]
    of_one = before[:at] == key[:at] and all(isinstance(n, int) for n in numbers)
    return of_one and numbers[1] > numbers[0] + 1


def in_order(one, other, names):
    """Keys that both runs have, up to the first that one of them has not finished, or both: a
    number that is left out.

    Where workers run several episodes at a time, a short one overtakes: to take what is there
    would favour whoever succeeds sooner. Crashed episodes are passed over.
    """
    at, before = names.index("episode"), None
    found, done = [], [{short(k, names) for k in run.episodes} for run in (one, other)]
    crashed = {short(k, names) for run in (one, other) for k in run.crashed}
    for key in sorted(done[0] | done[1] | crashed, key=order):
        if before is not None and left_out(before, key, at):
            break
        before = key
        if all(key in keys for keys in done):
            found.append(key)
        elif key not in crashed:
            break
    return found
