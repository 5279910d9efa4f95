"""A policy behind a socket acts in the real simulator: its actions are carried out as LIBERO means
them, its faults are counted, and an evaluation survives its server.
"""

import contextlib
import json
import re
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, run, start
from servers import policy_server

from harness.checkpoint import load_policy
from harness.metrics import ERROR
from harness.remote import Server, ServerLost
from sim.remote import DEFAULT, ServerAgent, run_actions
from sim.rollout import PolicyAgent, run_episode

STEPS = 24
PAGE = (ROOT / "docs" / "your_policy.md").read_text()


def block(kind, title):
    """The block of docs/your_policy.md with a title."""
    (found,) = re.findall(rf'```{kind} title="{re.escape(title)}"\n(.*?)```', PAGE, re.S)
    return found.strip()


@pytest.fixture(scope="module")
def address():
    with policy_server() as found:
        yield found


def agent_of(address, **wishes):
    return ServerAgent(
        SimpleNamespace(
            server=address, server_timeout=60.0, send_size=64, wishes={**DEFAULT, **wishes}
        )
    )


def asked(scene, prompt, monkeypatch):
    """The scene with another instruction, by which tests/policy_server.py chooses its answer."""
    monkeypatch.setattr(scene, "instruction", prompt)
    return scene


def test_actions_are_carried_out_as_they_are(address, scene, monkeypatch):
    """One OSC action a control step, nothing between: the state is that of the same actions given
    to the simulator. Of ten actions an answer the first five are carried out.
    """
    state = scene.init_states()[0]
    scene.begin_episode(state)
    for _ in range(12):
        scene.step([0, 0, 0.25, 0, 0, 0, -1])
    expected = scene.state()
    asked(scene, "up", monkeypatch)
    row, _, thumbs = run_actions(scene, agent_of(address), state, 12, 5)
    np.testing.assert_array_equal(scene.state(), expected)
    assert (row["steps"], row["decisions"], row["outcome"]) == (12, 3, "miss")
    assert len(thumbs) == 3 and row["seconds"]["policy"] > 0


@pytest.mark.parametrize("fault", ["nan", "shape", "bytes", "text"])
def test_an_answer_that_cannot_be_followed_fails_the_episode(fault, address, scene, monkeypatch):
    """It stays in the denominator: a policy must not gain by failing. The robot does not move."""
    asked(scene, fault, monkeypatch)
    row, *_ = run_actions(scene, agent_of(address), scene.init_states()[0], 12)
    assert (row["outcome"], row["success"], row["steps"]) == (ERROR, False, 0)
    assert "AnswerError" in row["error"] and "crash" not in row


def test_a_server_that_hangs_is_no_episode(address, scene, monkeypatch):
    """It is counted as a crash, which the same command tries again, and not as a failure."""
    asked(scene, "hang", monkeypatch)
    agent = agent_of(address)
    begin = agent.start

    def impatient(*episode):
        begin(*episode)
        agent.server.timeout = 0.3  # of an answer: a busy machine connects more slowly

    agent.start = impatient
    with pytest.raises(ServerLost, match="no answer for 0.3 s"):
        run_actions(scene, agent, scene.init_states()[0], 12)


@pytest.fixture
def served(trained, tmp_path):
    """The address of serve.py with the trained checkpoint. It ends with the test: scripts are
    forked from one process, one at a time.
    """
    checkpoint = trained[0] / "checkpoint.safetensors"
    command = block("bash", "our checkpoint in other columns").removeprefix("python ")
    words = f"{command} --ckpt {checkpoint} --port 0"
    outputs = [tmp_path / "o", tmp_path / "e"]
    for file in outputs:
        file.touch()  # the fork makes them a moment later
    process = start(words, tmp_path, outputs)
    deadline = time.time() + 180
    try:
        while not (found := re.search(r"at (\S+), Ctrl", (tmp_path / "o").read_text())):
            assert process.poll() is None and time.time() < deadline, (tmp_path / "e").read_text()
            time.sleep(0.1)
        yield found[1]
    finally:
        # a server that lives on would keep every later script waiting
        process.kill()
        process.wait(20)


def test_serve_plays_the_episode_that_eval_plays(served, trained, scene):
    """The same decisions at the same steps, action by action, where the request brings image and
    camera as eval.py has them. A sign, a mirrored image or a missed hold would show at once.
    """
    state = scene.init_states()[3]
    scene.begin_episode(state)
    began = scene.observe(image=False)
    policy = load_policy(trained[0] / "checkpoint.safetensors", "cpu")[0]
    here, *_ = run_episode(scene, PolicyAgent(policy), state, max_steps=STEPS)
    ended = scene.observe(image=False)
    agent = agent_of(served, wrist_image=False, camera=True, seed=True)
    agent.send_size = scene.image_size
    there, *_ = run_actions(scene, agent, state, STEPS, 1)
    again = scene.observe(image=False)
    # thread counts differ between the processes: sums of the network round otherwise
    np.testing.assert_allclose(again.eef_pos, ended.eef_pos, atol=1e-6)
    np.testing.assert_allclose(again.gripper_qpos, ended.gripper_qpos, atol=1e-6)
    assert np.linalg.norm(ended.eef_pos - began.eef_pos) > 0.01
    assert there["jerk_mm"] == pytest.approx(here["jerk_mm"], abs=1e-3)
    assert there["decisions"] == STEPS > here["decisions"]


@contextlib.contextmanager
def adapter(folder):
    """Yield the address of the page's adapter, running."""
    (folder / "stay.py").write_text(block("python", "stay.py"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "stay.py", str(port)], cwd=folder)
    try:
        address = f"127.0.0.1:{port}"
        waiting = Server(address, 60.0)
        waiting.connect(again=60.0)
        waiting.close()
        yield address
    finally:
        process.kill()
        process.wait()


def test_an_evaluation_survives_its_server(tmp_path):
    """The server dies in the second episode: that is a counted crash. Nobody is there for the
    third: the evaluation stops in one sentence, and nothing is lost. With the page's adapter, at
    another port, the page's command plays the two that are missing.
    """
    words = block("bash", "a policy server in our columns").removeprefix("python ")
    words += (
        " --n_episodes 3 --workers 1 --max_steps 12 --clean_scene --image_size 64 --send_size 32 "
        "--n_videos 1 --server_timeout 8 --label stay --out cell"
    )
    rows = lambda: [json.loads(r) for r in (tmp_path / "cell/episodes.jsonl").open()]
    # the first connection asks for metadata, the second is the first episode's
    with policy_server(dies=3, metadata={"policy": "stay"}) as address:
        done = run(f"{words} --server {address}", cwd=tmp_path, ok=False)
    assert done.returncode == 2 and "no policy server answers" in done.stderr
    assert "the same command goes on" in done.stderr and "Traceback" not in done.stderr
    first, second = rows()
    assert first["decisions"] == 3 and "connection was lost" in second["crash"]
    with adapter(tmp_path) as address:
        run(f"{words} --server {address}", cwd=tmp_path)
    summary = json.loads((tmp_path / "cell/summary.json").read_text())
    assert (summary["n"], summary["crashes"], summary["model_type"]) == (3, 0, "stay")
    assert summary["remote"]["replan_steps"] == 5
    scored = [r for r in rows() if "crash" not in r]
    assert [r["episode"] for r in scored] == [0, 1, 2] and scored[0] == first
    # one action an answer is carried out before the next request
    assert scored[1]["decisions"] == 12 and list((tmp_path / "cell/videos").glob("000_*.mp4"))
