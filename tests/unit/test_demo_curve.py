"""Success against demonstrations a task: what is read, tabled and drawn."""

import json

import pytest
from PIL import Image

from harness.statistics import wilson
from runtime import UserError, read_json, write_json
from study.demo_curve import main


def evaluated(folder, wins, n=50):
    """What eval.py --task_ids leaves of an evaluation."""
    folder.mkdir(parents=True)
    found = {"n": n, "success": wins, "success_rate": wins / n, "success_interval": wilson(wins, n)}
    write_json(folder / "suite.json", {**found, "commit": "abc", "tasks": []})


def test_every_rate_is_in_table_file_and_figure(tmp_path, capsys):
    """Columns and series in rows, demonstrations in the order of their number; what is not there
    yet is a dash.
    """
    folder, out = tmp_path / "runs", tmp_path / "curve.json"
    for name, wins in (("para-plain-2", 10), ("para-plain-10", 45), ("act-plain-2", 5)):
        evaluated(folder / name / "benchmark", wins)
    evaluated(folder / "para-plain-10" / "shifted", 40)
    main([str(folder), "--out", str(out)])
    lines = [
        [word.strip() for word in line.split("|")] for line in capsys.readouterr().out.split("\n")
    ]
    assert lines[0][1:-1] == ["", "demonstrations a task", "2", "10"]
    assert lines[2][1:-1] == ["benchmark", "act-plain", "10% (4-21)", "-"]
    assert lines[3][1:-1] == ["benchmark", "para-plain", "20% (11-33)", "90% (79-96)"]
    assert lines[4][1:-1] == ["shifted", "para-plain", "-", "80% (67-89)"]
    rows = read_json(out, "curve")["rows"]
    assert [row["success"] for row in rows] == [5, 10, 45, 40]
    assert {row["commit"] for row in rows} == {"abc"}
    with Image.open(out.with_suffix(".png")) as image:
        assert image.width > image.height > 100


@pytest.mark.parametrize("name", ["para", "para-all"])
def test_a_folder_that_says_no_number_is_named(name, tmp_path):
    evaluated(tmp_path / name / "benchmark", 1)
    with pytest.raises(UserError, match=f"{name}: its name is not SERIES-N"):
        main([str(tmp_path)])


def test_what_is_no_evaluation_is_named(tmp_path):
    with pytest.raises(UserError, match="runs/demo_curve.sh"):
        main([str(tmp_path)])
    evaluated(tmp_path / "para-1" / "benchmark", 1)
    path = tmp_path / "para-1" / "benchmark" / "suite.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "success_rate": "high"}))
    with pytest.raises(UserError, match="suite.json"):
        main([str(tmp_path)])
