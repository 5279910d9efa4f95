"""Evaluations as eval.py leaves them, written without a simulator."""

import numpy as np

import run_matrix
from runtime import append_jsonl, write_json

FEATURES = "efficientnet_lite0-448px-0123"


def episode(i, layout, won, freed, trained):
    """One episode's row."""
    return {
        "episode": i,
        "init_state": i,
        "layout": layout,
        "seed": 0,
        "outcome": "released" if freed else "place" if won else "miss",
        "success": bool(won),
        "released": bool(freed),
        "steps": 100 if won else 600,
        "first_success": 90 if won else None,
        "decisions": 12,
        "jerk_mm": 2.0 + won,
        "coverage_4px": 0.5,
        "coverage_8px": 0.75,
        # a measure may be missing of an episode
        "coverage_16px": None if i == 0 else 1.0,
        "seconds": {
            "render": 1.0,
            "physics": 1.0,
            # a policy without training spends no time in a network
            "features": 0.9 * trained,
            "policy": 0.3 * trained,
            "total": 2.0,
        },
    }


def write_evaluation(
    folder,
    cell,
    success,
    released=None,
    features=FEATURES,
    crashes=0,
    extra="",
    commit="0123456789",
):
    """Write an evaluation as eval.py leaves it; return its folder. success, released: (n,) bool.
    extra: flags in its command that run_matrix.py would not give."""
    # cell: ROW-LAYOUT, or ROW-LAYOUT-sSEED of a trained policy
    row, layout, *seed = cell.split("-")
    out, trained = folder / "evals" / cell, bool(seed)
    evaluated = training = ""
    if row in run_matrix.ROWS:
        # the commands that run_matrix.py itself would have used
        args = run_matrix.parse_args(["--out", str(folder)])
        evaluated, training = run_matrix.recipe(args, row, layout, *seed or [""])
    released = success if released is None else released
    for i, (won, freed) in enumerate(zip(success, released)):
        append_jsonl(out / "episodes.jsonl", episode(i, layout, won, freed, trained))
    for i in range(crashes):
        crash = {"episode": len(success) + i, "layout": layout, "crash": "boom"}
        append_jsonl(out / "episodes.jsonl", crash)
    summary = {
        "model_type": row,
        "setting": layout,
        "n": len(success),
        "crashes": crashes,
        "seed": 0,
        "command": evaluated + extra,
        "commit": commit,
        "trained": None,
    }
    if trained:
        summary["trained"] = {
            "minutes": 5.0,
            "step": 500,
            "backbone_identity": features,
            "command": training,
        }
    write_json(out / "summary.json", summary)
    return out


def outcomes(wins, n=20):
    """(n,) bool, of which the first `wins` are true."""
    return np.arange(n) < wins
