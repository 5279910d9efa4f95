"""Memory of an evaluation's processes, episode by episode: the worker, which holds the simulator,
and the process that owns the network. Linux alone, which tells it under /proc.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from runtime import UserError, read_jsonl

# the library that each process loads, and the other one does not
LIBRARIES = {"worker": "libmujoco", "network": "libtorch_cpu"}
FIELDS = {"rss": "VmRSS", "anon": "RssAnon", "peak": "VmHWM"}  # of /proc/PID/status


def descendants(pid):
    """Ids of the processes that descend from `pid`."""
    # child -> parent of every process; the fields of stat after the name in parentheses are state,
    # parent's id, ...
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = []
    for child in parents:
        # climb to `pid`, or to 0 where it is no ancestor
        above = parents[child]
        while above not in (pid, 0):
            above = parents.get(above, 0)
        if above == pid:
            found.append(child)
    return found


def memory_by_role(pid):
    """Memory (MB) of an evaluation -> {"worker": {"rss", "anon", "peak"}, "network": {...}}.

    pid: of eval.py. Of several workers it is the largest one's; 0 where there is none.
    """
    found = {role: dict.fromkeys(FIELDS, 0.0) for role in LIBRARIES}
    for child in descendants(pid):
        # a process may end while it is read; a zombie has no VmRSS
        with contextlib.suppress(OSError, KeyError):
            maps = Path(f"/proc/{child}/maps").read_text()
            status = Path(f"/proc/{child}/status").read_text()
            lines = dict(line.split(":", 1) for line in status.splitlines())
            memory = {
                key: round(int(lines[name].split()[0]) / 1024, 1) for key, name in FIELDS.items()
            }
            for role, library in LIBRARIES.items():
                if library in maps and memory["rss"] > found[role]["rss"]:
                    found[role] = memory
    return found


def bench_memory(args):
    """An evaluation in one worker that is never replaced: memory as each episode ends."""
    if not args.ckpt:
        raise UserError("study.bench memory needs --ckpt")
    n, held = args.episodes or 50, []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "eval.py", "--ckpt", args.ckpt, "--teleport", "--zero_rotation"]
        command += ["--n_episodes", n, "--layout", args.layout, "--workers", 1, "--out", folder]
        # the worker outlives all n episodes, so that growth of its memory would show
        command += ["--recycle", n + 1]
        process = subprocess.Popen([str(part) for part in command])
        while process.poll() is None:
            # a row is appended as its episode ends: measure once per new row
            for _ in read_jsonl(Path(folder) / "episodes.jsonl")[len(held) :]:
                held.append(memory_by_role(process.pid))
            time.sleep(0.1)
    if process.returncode:
        raise UserError(f"the evaluation ended with exit code {process.returncode}, see above")
    # the last row may come as the processes leave
    held = [memory for memory in held if all(part["rss"] for part in memory.values())]
    for role in LIBRARIES:
        rows = [memory[role] for memory in held]
        after = [f"{rows[i - 1]['rss']:.0f} after {i}" for i in (1, 10, 25, 50) if i <= len(rows)]
        print(f"{role}, {args.layout}, resident MB: {', '.join(after)} episodes; ", end="")
        print(f"peak {rows[-1]['peak']:.0f}")
    lists = {role: {key: [m[role][key] for m in held] for key in FIELDS} for role in LIBRARIES}
    return {
        "title": "memory of an evaluation's processes, one worker",
        "unit": "MB",
        "layout": args.layout,
        **lists,
    }
