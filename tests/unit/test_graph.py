"""The graph of commands, run with real ones: order, resumption, failures and kills, on this
machine and on a Ray cluster.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from graphlib import CycleError
from pathlib import Path

import pytest
from conftest import ROOT

from runtime import UserError, read_jsonl
from study.graph import TRIES, Local, Node, Ray, last_line, pending, run_graph


def shell(line):
    return ["sh", "-c", line]


def makes(folder, name, *deps, line="", **rest):
    """A node that runs `line` and then writes its name into the file `name`.

    It is done once the file is there.
    """
    path = folder / name
    needed = "".join(f"test -f {d} || exit 9; " for d in deps)
    return Node(
        name,
        shell(f"{line}\n{needed}echo {name} >> order; touch {name}"),
        deps,
        lambda: "" if path.exists() else f"{name} is missing",
        **rest,
    )


def order(folder):
    path = folder / "order"
    return path.read_text().split() if path.exists() else []


def go(nodes, folder, jobs=1):
    return run_graph(nodes, Local(jobs), "out", folder)


def test_each_node_runs_once_after_what_it_needs(tmp_path):
    """A diamond of nodes runs in order, each once. The same call again runs nothing."""
    nodes = [
        makes(tmp_path, "d", "b", "c"),
        makes(tmp_path, "b", "a"),
        makes(tmp_path, "c", "a"),
        makes(tmp_path, "a"),
    ]
    assert go(nodes, tmp_path, jobs=2) == {}
    assert sorted(order(tmp_path)) == list("abcd")
    assert order(tmp_path)[0] == "a"
    assert order(tmp_path)[-1] == "d"
    assert go(nodes, tmp_path) == {} and len(order(tmp_path)) == 4
    rows = read_jsonl(tmp_path / "out" / "nodes.jsonl")
    assert sorted(r["node"] for r in rows) == list("abcd")
    assert all(r["code"] == 0 and r["seconds"] >= 0 for r in rows)


def test_nothing_starts_beside_what_it_needs(tmp_path):
    """With free slots a chain still runs one node after the other, in whatever order it is
    given.
    """
    for name, turn in (("forwards", 1), ("backwards", -1)):
        folder = tmp_path / name
        folder.mkdir()
        chain = [
            makes(folder, "a", line="sleep 0.2"),
            makes(folder, "b", "a", line="sleep 0.2"),
            makes(folder, "c", "b"),
        ]
        assert go(chain[::turn], folder, jobs=4) == {} and order(folder) == ["a", "b", "c"]


def test_what_is_done_is_asked_of_the_results(tmp_path):
    """A node that the final results no longer need does not run.

    One whose result is needed and missing does.
    """
    nodes = [makes(tmp_path, "a"), makes(tmp_path, "b", "a"), makes(tmp_path, "c", "b")]
    go(nodes, tmp_path)
    (tmp_path / "a").unlink()
    assert pending(nodes) == []
    (tmp_path / "c").unlink()
    assert [n.name for n in pending(nodes)] == ["c"]  # b is there, so a is not asked for
    (tmp_path / "b").unlink()
    assert [n.name for n in pending(nodes)] == ["a", "b", "c"]


def test_a_node_without_results_runs_with_those_that_need_it(tmp_path):
    """A step that only fills a cache runs before the nodes that need it.

    If none of them has to run, it does not run either.
    """
    made = tmp_path / "a"
    nodes = [
        Node("warm", shell("echo warm >> order")),
        Node(
            "a",
            shell("echo a >> order; touch a"),
            ("warm",),
            lambda: "" if made.exists() else "a is missing",
        ),
    ]
    go(nodes, tmp_path)
    go(nodes, tmp_path)
    assert order(tmp_path) == ["warm", "a"]


def test_a_failure_is_reported_and_the_rest_goes_on(tmp_path):
    """The failed node is reported with its log's last line, nodes that need it with that cause.

    Everything else is done.
    """
    nodes = [
        makes(tmp_path, "good"),
        makes(tmp_path, "bad", line="echo all went well; echo no space on the moon; exit 3"),
        makes(tmp_path, "after", "bad"),
        makes(tmp_path, "later", "after", "good"),
        makes(tmp_path, "other", "good"),
    ]
    failed = go(nodes, tmp_path)
    assert failed.keys() == {"bad", "after", "later"} and order(tmp_path) == ["good", "other"]
    assert "exit code 3: no space on the moon" in failed["bad"] and "bad.log" in failed["bad"]
    assert "bad failed" in failed["after"] and "after failed" in failed["later"]
    nodes[1].command = makes(tmp_path, "bad").command
    assert go(nodes, tmp_path) == {}
    assert order(tmp_path) == ["good", "other", "bad", "after", "later"]


def test_success_without_results_is_a_failure(tmp_path):
    """Exit code 0 does not make a node done: its results are checked."""
    node = Node("empty", shell("echo done"), (), lambda: "49 of 50 episodes")
    assert "49 of 50 episodes: done" in go([node], tmp_path)["empty"]


def test_a_command_that_does_not_exist_fails_alone(tmp_path):
    """A mistyped program is one failed node, not the end of the run."""
    failed = go([Node("typo", ["no-such-program-here"]), makes(tmp_path, "a")], tmp_path)
    assert failed.keys() == {"typo"}
    assert "no-such-program-here" in failed["typo"]
    assert order(tmp_path) == ["a"]


def test_a_killed_command_is_tried_again_and_goes_on(tmp_path):
    """A command that a signal ended, as the out-of-memory killer does, starts again with the
    command that resumes it.
    """
    node = makes(
        tmp_path,
        "a",
        line="touch state; kill -9 $$",
        resume=("state", shell("echo resumed >> order; touch a")),
    )
    assert go([node], tmp_path) == {} and order(tmp_path) == ["resumed"]
    hopeless = Node("b", shell("echo try >> tries; kill -9 $$"))
    assert "-9" in go([hopeless], tmp_path)["b"]
    assert len((tmp_path / "tries").read_text().split()) == TRIES


def test_jobs_run_side_by_side(tmp_path):
    """Two jobs run at a time: each waits for a file that only the other one writes."""
    wait = "for i in $(seq 200); do test -f {} && break; sleep 0.05; done; test -f {}"
    nodes = [
        makes(tmp_path, a, line=f"touch {a}.up; {wait.format(f'{b}.up', f'{b}.up')} || exit 5")
        for a, b in ("xy", "yx")
    ]
    assert go(nodes, tmp_path, jobs=2) == {}


def test_impossible_graphs_are_refused():
    """A cycle, a name used twice, or an unknown dependency is refused before anything runs."""
    with pytest.raises(CycleError):
        pending([Node("a", [], ("b",)), Node("b", [], ("a",))])
    with pytest.raises(ValueError, match="one name"):
        pending([Node("a", []), Node("a", [])])
    with pytest.raises(ValueError, match="ghost"):
        pending([Node("a", [], ("ghost",))])


def test_the_last_line_of_a_progress_bar(tmp_path):
    """A bar is one line with carriage returns, of which the last text counts."""
    log = tmp_path / "log"
    log.write_bytes(b"start\n 10%|#   |\r 50%|##  |\r 90%|### |\n\n")
    assert last_line(log) == "90%|### |" and last_line(tmp_path / "absent") == ""


def gone(pid, seconds=10):
    """True once a process has ended."""
    for _ in range(int(seconds / 0.05)):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_commands_die_with_the_run(tmp_path):
    """After a SIGKILL of the run its command does not go on: the next run would meet it in the
    same files.
    """
    code = (
        "import sys; from study.graph import *; "
        "run_graph([Node('long', ['sh', '-c', 'echo $$ > pid; exec sleep 60'])], Local(), 'out')"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()) and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert gone(int(pid.read_text()))


def test_a_run_that_is_ended_records_what_it_cut_off(tmp_path):
    """SIGTERM lets a command save, and nodes.jsonl gets a row with the time it took."""
    shell = 'trap "echo > saved; exit 0" TERM; echo > up; sleep 60 & wait'
    code = (
        "from study.graph import *; "
        f"run_graph([Node('long', {['sh', '-c', shell]!r})], Local(), 'out')"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    while not (tmp_path / "up").exists() and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) and (tmp_path / "saved").exists()
    rows = read_jsonl(tmp_path / "out" / "nodes.jsonl")
    assert [(row["node"], row["code"]) for row in rows] == [("long", -signal.SIGTERM)]


def test_ray_missing_is_said(monkeypatch):
    """--ray without the package names the command that installs it."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="make setup"):
        Ray("auto")


@pytest.fixture(scope="module")
def cluster():
    """A real Ray cluster of two machines with one CPU each -> its address.

    The machines are two raylets on this one.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made.address
    made.shutdown()


def test_ray_runs_the_graph_and_survives_a_killed_worker(cluster, tmp_path):
    """Two tasks run at once on two machines, and the order is kept.

    A task whose worker is killed starts again, after its first command has ended.
    """
    wait = "for i in $(seq 600); do test -f {0} && break; sleep 0.05; done; test -f {0} || exit 5"
    pair = [
        makes(tmp_path, a, line=f"touch {a}.up; " + wait.format(f"{b}.up")) for a, b in ("xy", "yx")
    ]
    killed = makes(
        tmp_path,
        "killed",
        "x",
        "y",
        line="if ! test -f pids; then echo $PPID $$ > pids; exec sleep 100; fi",
    )
    bad = makes(tmp_path, "bad", line="echo no luck; exit 4")
    last = makes(tmp_path, "last", "killed")

    def kill():
        while not ((tmp_path / "pids").exists() and (tmp_path / "pids").read_text().endswith("\n")):
            time.sleep(0.05)
        os.kill(int((tmp_path / "pids").read_text().split()[0]), signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    failed = run_graph([*pair, killed, bad, last], Ray(cluster), "out", tmp_path)
    killer.join(1)
    assert failed.keys() == {"bad"} and "exit code 4: no luck" in failed["bad"]
    assert order(tmp_path)[-2:] == ["killed", "last"] and set(order(tmp_path)[:2]) == {"x", "y"}
    assert gone(int((tmp_path / "pids").read_text().split()[1]))


def test_ray_refuses_what_no_machine_can_run(cluster, tmp_path):
    """A step that asks for more than any machine has is refused: it would wait for ever."""
    with pytest.raises(UserError, match="64 CPUs"):
        run_graph([makes(tmp_path, "a", cpus=64)], Ray(cluster), "out", tmp_path)


def test_ray_without_a_cluster_is_said():
    """An address at which nothing answers gives one sentence at once."""
    with pytest.raises(UserError, match="ray start"):
        Ray("127.0.0.1:1")
