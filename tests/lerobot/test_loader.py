"""LeRobot's own loader and checker on a dataset that was written here.

They run in LeRobot's environment, which `make lerobot` makes: .venv-lerobot, or LEROBOT_ENV=FOLDER.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import convert_demos
from formats.dataset import open_dataset

ENV = Path(os.environ.get("LEROBOT_ENV") or ROOT / ".venv-lerobot")
pytestmark = pytest.mark.skipif(
    not (ENV / "bin" / "lerobot-doctor").exists(),
    reason=f"{ENV} is no environment of LeRobot's; `make lerobot` makes one, LEROBOT_ENV names it",
)
# the checker's checks of what a writer can do wrong
PASSED = (
    *("Metadata & Format Compliance", "Temporal Consistency", "Video Integrity"),
    *("Feature Consistency", "Portability"),
)
READ = """
import json, sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

folder, out = sys.argv[1:]
data = LeRobotDataset("local/synthetic", root=folder)
frames = [data[i] for i in (0, 39, 40, 97)]
told = {
    "episodes": data.num_episodes,
    "frames": len(data),
    "fps": data.fps,
    "cameras": list(data.meta.camera_keys),
    "tasks": [f["task"] for f in frames],
    "frame_index": [int(f["frame_index"]) for f in frames],
    "mean": data.meta.stats["observation.images.image"]["mean"].ravel().tolist(),
}
# some steps of one episode at a time, as a policy that predicts chunks asks for them
chunks = LeRobotDataset(
    "local/synthetic", root=folder, episodes=[1], delta_timestamps={"action": [0, 0.05, 0.1]}
)
told["chunk"] = list(chunks[5]["action"].shape)
np.savez(
    out,
    images=np.stack([f["observation.images.image"].numpy() for f in frames]),
    states=np.stack([f["observation.state"].numpy() for f in frames]),
    actions=np.stack([f["action"].numpy() for f in frames]),
)
print(json.dumps(told))
"""


def run(arguments, tmp_path):
    """A program of LeRobot's environment, without a network -> what it printed."""
    variables = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hub"),
        "COLUMNS": "300",
    }
    done = subprocess.run(
        [ENV / "bin" / arguments[0], *map(str, arguments[1:])],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("video", [False, True], ids=["png", "video"])
def test_lerobot_reads_and_checks_what_is_written(synthetic_demos, tmp_path, video):
    """Its frames are ours, mirrored back; its checker finds nothing wrong with the files."""
    folder = tmp_path / "dataset"
    convert_demos.main(
        [str(synthetic_demos), "--out", str(folder), *(["--video"] if video else [])]
    )
    (tmp_path / "read.py").write_text(READ)
    printed = run(["python", "read.py", folder, tmp_path / "read.npz"], tmp_path)
    told = json.loads(printed.strip().splitlines()[-1])
    ours = open_dataset(folder)
    assert told["episodes"] == 4 and told["frames"] == 160 and told["fps"] == 20
    assert told["cameras"] == ["observation.images.image"]
    assert told["tasks"] == ["pick up the blob"] * 4
    assert told["frame_index"] == [0, 39, 0, 17] and told["chunk"] == [3, 7]
    with np.load(tmp_path / "read.npz") as read:
        arrays = dict(read)
    # (N,3,S,S) in [0, 1], mirrored -> (N,S,S,3)
    images = np.round(255 * arrays["images"].transpose(0, 2, 3, 1)[:, :, ::-1])
    demos = ours.demos
    places = [(demos[0], 0), (demos[0], 39), (demos[1], 0), (demos[2], 17)]
    for image, state, (demo, frame) in zip(images, arrays["states"], places, strict=True):
        # another decoder rounds otherwise
        assert np.abs(image - demo.images([frame])[0]).max() <= (4 if video else 0)
        np.testing.assert_allclose(state[:3], demo.ee_pos[frame], atol=1e-6)
    mean = np.concatenate([d.images(range(len(d))) for d in demos]).mean((0, 1, 2)) / 255
    np.testing.assert_allclose(told["mean"], mean, atol=0.01)
    printed = run(["lerobot-doctor", "check", folder], tmp_path)
    assert "FAIL" not in printed
    # the others judge the movements, which are a toy's here
    for name in PASSED:
        assert f"[PASS] {name}" in printed, printed
