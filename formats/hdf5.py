"""HDF5 files that are damaged, half written, open elsewhere or made by others.

Each access gives a value or one sentence. Shapes, types and storage are looked at before anything
is read, because a file of 14 kB can say that it holds 10^10 rows.
"""

import contextlib
import math
from pathlib import Path

import h5py
import numpy as np

from runtime import UserError, one_line

DEFLATE = 1100  # the most that gzip makes of a byte
SMALL = 2**24  # bytes that are read whatever the file's size


@contextlib.contextmanager
def guarded(where, remedy):
    """A context in which errors of h5py and NumPy about a damaged file become a UserError.

    where: file and key, for the message.
    """
    try:
        yield
    # already a sentence, from a check inside
    except UserError:
        raise
    except Exception as error:
        # KeyError, OSError, RuntimeError, MemoryError: it depends on the byte
        reason = one_line(error)
        raise UserError(
            f"{where}: cannot be read, the file is damaged ({reason}); {remedy}"
        ) from error


def open_file(path, remedy):
    """Open an HDF5 file for reading.

    Raises UserError if it is absent, no HDF5, truncated, or open for writing elsewhere.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}; {remedy} --out {path}")
    try:
        return h5py.File(path, "r")
    except PermissionError:
        raise UserError(f"{path}: may not be read by you; ask its owner") from None
    except Exception as error:
        text = one_line(error)
        # HDF5 locks what is open for writing, and marks it in the file
        if isinstance(error, BlockingIOError) or "unable to lock" in text or "already open" in text:
            raise UserError(
                f"{path}: another program has it open for writing ({text}); wait until it "
                "has closed it, and leave the file alone meanwhile"
            ) from error
        raise UserError(f"{path}: truncated or not an HDF5 file ({text}); {remedy}") from error


def create(path):
    """A new HDF5 file for writing, in the layout of HDF5 1.10.

    In it headers, indices and links carry checksums too. In h5py's default layout a flipped bit in
    the index of an array makes the array read as zeros.
    """
    return h5py.File(path, "w", libver=("v110", "v110"))


def write_array(parent, key, value):
    """Write an array with a checksum, so that a flipped bit is an error when it is read."""
    # HDF5 filters work on chunks, which a scalar and an empty array do not have
    checked = {"fletcher32": True} if np.ndim(value) and np.size(value) else {}
    parent.create_dataset(key, data=value, **checked)


def set_attributes(node, values):
    """Write {name: value} as attributes of a node.

    Text is stored with its length, inside the header: text of any length, which is what h5py makes
    of a str, lies in a heap that has no checksum.
    """
    for name, value in values.items():
        if isinstance(value, str) and value:
            value = np.array(value.encode(), h5py.string_dtype("utf-8", len(value.encode())))
        node.attrs[name] = value


def group(path, parent, key, remedy):
    """The group parent[key]."""
    return _node(path, parent, key, remedy, h5py.Group, "group")


def dataset(path, parent, key, remedy, tail=None, kinds="fiub"):
    """The dataset parent[key], unread, with its type, shape and storage checked.

    tail: its shape behind the rows, None for any length; kinds: the dtypes that are allowed, by
    NumPy's letters. Raises UserError with file, key and remedy.
    """
    found = _node(path, parent, key, remedy, h5py.Dataset, "array")
    where = place(path, parent, key)
    with guarded(where, remedy):
        # from the header: no value is read yet
        shape, dtype = found.shape, found.dtype
        if shape is None:
            raise UserError(f"{where}: has no data space, it is empty; {remedy}")
        if dtype.kind not in kinds:
            wanted = "numbers" if "u" in kinds else "floating-point numbers"
            raise UserError(f"{where}: has dtype {dtype}, {wanted} are expected; {remedy}")
        # float16 has eleven bits: a millimetre at two metres
        if kinds == "f" and dtype.itemsize < 4:
            raise UserError(f"{where}: has dtype {dtype}, which rounds to millimetres; {remedy}")
        # first axis: rows; None stands for any length
        if tail is not None and not (
            len(shape) == 1 + len(tail) and all(n in (None, m) for n, m in zip(tail, shape[1:]))
        ):
            wanted = ", ".join(["T", *("S" if n is None else str(n) for n in tail)])
            raise UserError(f"{where}: has shape {shape}, ({wanted}) is expected; {remedy}")
        _check_storage(found, where, remedy)
    return found


def _check_storage(found, where, remedy):
    """Raise UserError for a dataset that holds more than the file does, or parts never written."""
    # such values lie in other files, or there are none
    if found.is_virtual or found.external or not found.size:
        return
    # a file of 14 kB can claim 10^10 rows: no compression makes that much of it
    in_file = found.id.get_storage_size()
    if found.nbytes > max(SMALL, DEFLATE * in_file) or not in_file:
        raise UserError(
            f"{where}: says that it holds {found.shape} values, {found.nbytes:.3g} bytes, "
            f"of which {in_file} are in the file; {remedy}"
        )
    if found.chunks:
        sizes = found.shape, found.chunks
        # chunks along each axis, rounded up, make the number of all
        expected = math.prod(-(-n // c) for n, c in zip(*sizes))
        places = set()
        # the chunks that the file really has, by the index of their first value
        found.id.chunk_iter(lambda chunk: places.add(chunk.chunk_offset))
        # of a damaged index: where no part can begin
        astray = [p for p in places if any(i % c or i >= n for i, n, c in zip(p, *sizes))]
        missing = expected - len(places) + len(astray)
        if missing:
            raise UserError(
                f"{where}: {missing} of its {expected} parts were never written or are lost, they "
                f"would read as zeros; {remedy}"
            )


def array(path, parent, key, remedy, tail=None, kinds="fiub"):
    """The values of a dataset, checked as by `dataset`. Raises UserError for NaN and Inf too."""
    found = dataset(path, parent, key, remedy, tail, kinds)
    where = place(path, parent, key)
    with guarded(where, remedy):
        value = found[()]
        if not np.isfinite(value).all():
            first = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
            raise UserError(
                f"{where}: has NaN or Inf, first at index {first}; drop this demo or {remedy}"
            )
    return value


def holds(path, parent, key, remedy):
    """True if the group has an entry of this name."""
    with guarded(place(path, parent, key), remedy):
        return key in parent


def attributes(path, node, remedy):
    """All attributes of a node as plain Python values.

    Text becomes str, however it is stored.
    """
    where = f"{path}: {_name(node)}"
    with guarded(where, remedy):
        names = list(node.attrs)
    found = {}
    for name in names:
        with guarded(f"{where}, attribute '{name}'", remedy):
            found[name] = _plain(node.attrs[name])
    return found


def _plain(value):
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, h5py.Empty):
        return None
    if isinstance(value, np.ndarray) and value.shape == ():
        value = value[()]
    # arrays of text: bytes (S) or objects (O), one by one
    if isinstance(value, np.ndarray) and value.dtype.kind in "SO":
        return [_plain(v) for v in value]
    return _plain(value.item()) if isinstance(value, np.generic) else value


def place(path, parent, key):
    """The name of an entry in messages, as "file: data/demo_0/obs/ee_pos"."""
    return f"{path}: {_name(parent)}/{key}".replace(": /", ": ")


def _name(node):
    return (node.name or "").lstrip("/")


def _node(path, parent, key, remedy, kind, what):
    where = place(path, parent, key)
    with guarded(where, remedy):
        # a link that leads nowhere is there, and says so when it is followed
        if key not in parent and parent.get(key, getlink=True) is None:
            raise UserError(f"{where}: key is missing; {remedy}")
        found = parent[key]
    if not isinstance(found, kind):
        raise UserError(f"{where}: is no {what}, though one is expected there; {remedy}")
    return found
