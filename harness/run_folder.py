"""The folder of a training: a new one, or one that a training goes on in."""

import itertools
import json
import time
from pathlib import Path

from harness.records import read_metrics
from runtime import UserError, atomic_path, read_json, write_json

STATE = "state.safetensors"
# flags that are taken from the command that began a run, not from what it stored as text
PATHS = {"resume", "out", "dataset", "cache", "init_from", "backbone_weights", "text_weights"}
# of config.json, for `check_same_data`; a run from before hashes were kept names none
TRAINED_ON = {"datasets?": [{"path": str, "hash": str}]}


def chosen(out, model_type, resume):
    """The folder that a run is written to. Raises UserError for one that holds another run."""
    folder = out or Path("runs") / f"{model_type}_{time.strftime('%Y%m%d_%H%M%S')}"
    if (folder / STATE).exists() and not resume:
        raise UserError(
            f"{folder}: holds a run already; go on with `python train.py --resume {folder}`, "
            "or give another --out"
        )
    if (folder / "checkpoint.safetensors").exists() and not (folder / STATE).exists():
        raise UserError(
            f"{folder}: holds a checkpoint and no {STATE}, from which alone a training goes on; "
            "copy that too, or train with another --out (from these weights: --init_from)"
        )
    return folder


def claimed(folder):
    """Make a folder that is named by its second -> it, or the next one that is free: trainings
    that begin in the same second must not write over each other.
    """
    for number in itertools.count(1):
        mine = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        try:
            mine.mkdir(parents=True)
            return mine
        except FileExistsError:
            continue


def begin(folder, config):
    """Write a new run's config.json. What a run logged here that was killed before its first save
    is not this one's, and goes.
    """
    for name in ("metrics.jsonl", "profile.jsonl"):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "config.json", config)


def cut_log(folder, step):
    """Take out of a run's metrics.jsonl what is of later steps than its saved state: these are
    taken again.
    """
    rows = read_metrics(folder)
    kept = [row for row in rows if row["step"] <= step]
    if len(kept) < len(rows):
        with atomic_path(folder / "metrics.jsonl") as scratch:
            scratch.write_text("".join(json.dumps(row) + "\n" for row in kept))


def refuse_other_flags(argv):
    """Raise UserError for a flag beside --resume, which takes those of the run."""
    words = iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        if name != "--resume":
            raise UserError(
                f"{word}: --resume goes on by the run's own flags and takes no other; leave it "
                "out, or train anew with another --out"
            )
        if not equals:
            next(words, None)


def as_begun(args, stored, config_class):
    """Set flags to what they were when a run began: presets and defaults may be others by now.

    stored: its config.json. Paths stay as they were typed, what "auto" and "fit" came to stays.
    """
    for name in (stored["args"].keys() & vars(args).keys()) - PATHS:
        setattr(args, name, stored["args"][name])
    usual = {"canonical_view": "", **config_class.older}
    for name in config_class.__dataclass_fields__:
        if name in stored["config"] or name in usual:
            setattr(args, name, stored["config"].get(name, usual.get(name)))


def check_there(folder, paths):
    """Raise UserError where a run's dataset is not there: nothing is collected in its place."""
    for path in paths:
        if not path.exists():
            raise UserError(
                f"--resume {folder}: {path} is not there; go on from where the run was begun, or "
                "put its data back"
            )


def check_same_backbone(folder, identity):
    """Raise UserError where a run's frozen features are not those that it began with."""
    stored = read_json(folder / "config.json", "run of train.py", form={"backbone_identity?": str})
    began = stored.get("backbone_identity", identity)
    if began != identity:
        raise UserError(
            f"--resume {folder}: was trained on features of {began}, here they are of {identity}; "
            "give it the same weights, or train anew with another --out"
        )


def check_same_data(folder, described):
    """Raise UserError where a run's datasets are not what they were: held-out demonstrations could
    be among those that it was trained on.

    described: of `Mixture.described`.
    """
    stored = read_json(folder / "config.json", "run of train.py", form=TRAINED_ON)
    for old, new in itertools.zip_longest(stored.get("datasets", described), described):
        if old and new and old["hash"] == new["hash"]:
            continue
        changed = new or old
        raise UserError(
            f"--resume {folder}: {changed['path']} is not what it was when the run began, and what "
            "was trained on could now be held out; put the old data back, or train anew with "
            "another --out"
        )
