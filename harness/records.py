"""What runs and evaluations leave in their folders, read and checked.

Scripts that draw, compare and resume read it here. A form (see `runtime.fits`) names what is used
of a file; what else it holds is left alone, so that older results stay readable.
"""

from pathlib import Path

from runtime import UserError, read_json, read_jsonl

# whatever folder a script is called from
COMMITTED = Path(__file__).resolve().parents[1] / "checkpoints"
# forms of `runtime.fits`: "name?" may be missing, a tuple is any of its forms, `...` any key
RATE, INTERVAL, NUMBER = (float, None), [float, float], ("number", None)
COVERAGES = {f"coverage_{px}px": NUMBER for px in (4, 8, 16)}
MEASURED = {
    f"{key}?": NUMBER
    for key in (
        "third_difference_mm",
        "path_length_ratio",
        *(f"on_path_{px}px" for px in (4, 8, 16)),
    )
}

STILL = 20.0  # degrees that a task's demonstrations may turn the gripper by and count as keeping it
# summary.json: for a report, and for the matrix's table
TRAINED = {"command": (str, None), "step": (int, None), "minutes": NUMBER, "backbone_identity": str}
SUMMARY = {
    "model_type": str,
    "setting": str,
    "n": int,
    "crashes": int,
    "success_rate": RATE,
    "interval": INTERVAL,
    "released_rate": RATE,
    "released_interval": INTERVAL,
    "outcomes": {...: int},
    "mean_steps": NUMBER,
    "jerk_mm": NUMBER,
    **COVERAGES,
    "seconds_per_episode": ({"total": float}, None),
    "command": str,
    "commit": str,
    "trained": (TRAINED, None),
}
TABLED = {
    "crashes": int,
    "command": str,
    "commit": str,
    "trained": (
        {
            "step": (int, None),
            "minutes": NUMBER,
            "backbone_identity": str,
            "command?": (str, None),
            "commit?": (str, None),
        },
        None,
    ),
}

# episodes.jsonl: an episode that ran, and one whose worker died
SCORED = {
    "episode": int,
    "layout?": str,
    "outcome": str,
    "success": bool,
    "released": bool,
    "steps": int,
    "first_success": (int, None),
    "first_release?": (int, None),
    "decisions": int,
    "jerk_mm": NUMBER,
    **COVERAGES,
    **MEASURED,
    "seconds": {"features": float, "policy": float, "total": float},
}
CRASHED = {"episode": int, "layout?": str, "crash": str}

# config.json of a run: for a report, and to go on; metrics.jsonl
CONFIG = {
    "args": {"model_type": str},
    "command": str,
    "commit": str,
    "seed": int,
    "parameters": int,
    "train_demos": int,
    "backbone_identity": str,
    "dataset": {"language?": str, "command?": str},
}
RESUME = {"args": {"model_type": str, "preset?": str}, "argv": [str], "config": {"backbone": str}}
METRIC = {
    "step": int,
    **{
        f"{key}?": "number"
        for key in (
            "train/loss",
            "val/loss",
            "val/cm_median",
            "val/cm_p90",
            "val/volume_ce",
            "val/rotation_ce",
        )
    },
}
AGAIN = "run the command that made it again"


def read_config(run):
    """config.json of a run folder."""
    return read_json(Path(run) / "config.json", "run of train.py", AGAIN, CONFIG)


def read_tabled(folder):
    """The entries of an evaluation's summary.json that the matrix's table shows."""
    remedy = "finish it with the command that began it"
    return read_json(Path(folder) / "summary.json", "finished evaluation", remedy, TABLED)


def read_summary(folder):
    """summary.json of a finished evaluation."""
    path, remedy = Path(folder) / "summary.json", "finish it with the command that began it"
    if not path.exists() and (Path(folder) / "suite.json").is_file():
        remedy = "it is of several tasks: name the folders in it"
    summary = read_json(path, "finished evaluation", remedy, SUMMARY)
    # types fit; now whether the numbers can be: rates of some episodes, between 0 and 1
    n, rates = summary["n"], [summary["success_rate"], summary["released_rate"]]
    scored = [*rates, *(summary[key] for key in ("mean_steps", "jerk_mm", "seconds_per_episode"))]
    bounds = [
        r for r in (*rates, *summary["interval"], *summary["released_interval"]) if r is not None
    ]
    if n < 0 or n and None in scored or not all(0 <= r <= 1 for r in bounds):
        raise UserError(
            f"{path}: says n = {n} with rates {rates}, which no evaluation gives; {remedy}"
        )
    return summary


def read_episodes(folder, layout=None):
    """Rows of an evaluation's episodes.jsonl, crashed ones among them.

    layout: which one they must be of. Raises UserError for a damaged line, or rows of another
    layout.
    """
    path = Path(folder) / "episodes.jsonl"
    rows = read_jsonl(path, "remove that line, its episode is run again", (SCORED, CRASHED))
    # rows of before layouts were named count as of the one that is asked for
    foreign = {row["layout"] for row in rows if layout and row.get("layout", layout) != layout}
    if foreign:
        raise UserError(
            f"{path}: holds episodes of layout {', '.join(sorted(foreign))}, {layout} is "
            "asked for; give another --out, or remove the folder"
        )
    return rows


def scored_rows(rows):
    """Rows of episodes that ran, of rows among which some may have crashed: a crash is the
    simulator's or its worker's, and says nothing about the policy.
    """
    return [row for row in rows if "crash" not in row]


def scored_episodes(folder):
    """{episode: row} of an evaluation's episodes that did not crash. One that crashed and was tried
    again has its last row.
    """
    return {row["episode"]: row for row in scored_rows(read_episodes(folder))}


def check_stamp(folder, asked):
    """Raise UserError unless an evaluation folder is new, without any row, or was begun with the
    same settings.

    asked: JSON-able settings, as settings.json has them.
    """
    stamp, rows = Path(folder) / "settings.json", Path(folder) / "episodes.jsonl"
    remedy = f"give another --out, or remove {stamp.name} and {rows.name} there"
    if stamp.exists():
        same = read_json(stamp, "evaluation", remedy) == asked
        # one that was ended before its first episode holds nothing
        if not same and rows.exists() and rows.stat().st_size:
            raise UserError(f"{folder}: holds results of other settings; {remedy}")
    # rows without settings: nobody knows what they are of
    elif rows.exists():
        raise UserError(
            f"{folder}: holds episodes.jsonl without the settings.json that says what they "
            f"are of; {remedy}"
        )


def read_metrics(run):
    """Rows of a run's metrics.jsonl."""
    return read_jsonl(Path(run) / "metrics.jsonl", form=METRIC)


# -- checkpoints, of which no tensor is read ------------------------------------------------------


def demos_simulator(info):
    """What a checkpoint's demonstrations were simulated and drawn with, {"mujoco": version,
    "renderer": name}, None where it is unknown.

    Older checkpoints do not say the first. For them it is what was installed in training.
    """
    dataset = info.get("dataset", {})
    versions = dataset.get("versions", info.get("versions", {}))
    # of a replay the images are newer than the physics
    renderer = dataset.get("renderer") or versions.get("renderer")
    return {"mujoco": versions.get("mujoco"), "renderer": renderer}


def simulator_changes(theirs, ours):
    """What is another simulator for a policy than the one of its demonstrations -> sentences.

    theirs: as of `demos_simulator`; ours: {package: version} here, and "renderer".
    """
    found, mujoco = [], theirs["mujoco"]
    if mujoco is None or mujoco.split(".")[:2] != ours["mujoco"].split(".")[:2]:
        found.append(
            "the checkpoint's demonstrations were simulated with MuJoCo "
            f"{mujoco or 'of an unknown version'}, here runs {ours['mujoco']}: "
            "objects may rest and slide otherwise, see docs/premise.md"
        )
    # what follows in brackets are a driver's versions
    name = lambda renderer: renderer.partition(" (")[0]
    if theirs["renderer"] and name(theirs["renderer"]) != name(ours["renderer"]):
        found.append(
            f"the checkpoint's demonstrations were drawn by {theirs['renderer']}, here draws "
            f"{ours['renderer']}: pixels differ a little, see docs/speed.md"
        )
    return found


def run_name(path):
    """A checkpoint's short name: its run's folder, or its own where it lies alone."""
    return path.parent.name if path.name == "checkpoint.safetensors" else path.stem


def run_names(checkpoints):
    """The short names of several. Raises UserError where two have one name."""
    names = [run_name(c) for c in checkpoints]
    if len(set(names)) < len(names):
        raise UserError(f"--ckpt: two of {', '.join(names)} have one name; rename a folder")
    return names


def keeps_orientation(info):
    """Whether a checkpoint's demonstrations keep the gripper's orientation: a policy of theirs is
    played so where nobody says.

    Of several tasks: whether all turn it by less than STILL. Of one: the grasp `side` keeps it.
    info: the checkpoint's header.
    """
    turned = info.get("turned", {})
    # of a recording whose grasp nobody knows, how far it turned says all
    grasp = info.get("dataset", {}).get("grasp", None if turned else "side")
    if len(turned) < 2 and (grasp == "side" or not turned):
        return grasp == "side"
    return max(turned.values()) < STILL


def newest_checkpoint(runs="runs", committed=COMMITTED):
    """The newest run's checkpoint, else the newest committed one.

    Returns its path and a sentence that names it. Raises UserError where there is none.
    """
    places = (
        (runs, "*/checkpoint.safetensors", "the newest run's"),
        (committed, "para_*.safetensors", "the committed"),  # of several, the baseline
        (committed, "*.safetensors", "the committed"),
    )
    for folder, pattern, what in places:
        found = sorted(Path(folder).glob(pattern), key=lambda path: path.stat().st_mtime)
        if found:
            return found[-1], f"--ckpt not given: {what} checkpoint, {found[-1]}"
    raise UserError(
        "no checkpoint in runs/ or checkpoints/; train one with `python train.py --model_type para`"
    )
