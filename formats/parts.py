"""Finished demonstrations: where they wait, how they become a dataset, what that may replace."""

import shutil

import h5py

from formats import hdf5, lerobot, libero_hdf5, smith300
from formats.demos import RECOLLECT
from runtime import UserError, atomic_path, replace_folder, write_json

# what a collection counts of its bad attempts, see sim/recording.py
COUNTED = ("bad_resets", "failed_demos", "other_sides", "views_refused", "mistakes_that_succeeded")
OF_PARTS = ("settings.json", "counts.json")  # of a collection that goes on, beside its episodes
BASIS = ("rotation_pca_basis.npz", "rotation_pca_basis.png")
# what a folder holds that this program writes: a smith300 one beside its episodes, a LeRobot one
WRITTEN = {
    "smith300": ("dataset.json", *OF_PARTS, *BASIS),
    "lerobot": ("meta", "data", "videos", *BASIS),
}


def merge(parts, out, attrs, counts):
    """Join the finished parts into one file, atomically, then drop them."""
    with atomic_path(out) as scratch, hdf5.create(scratch) as file:
        data = file.create_group("data")
        # num_samples of all demonstrations, an attribute of LIBERO's files
        total = 0
        for i, part in enumerate(parts):
            with h5py.File(part, "r") as source:
                # as stored: nothing is decompressed
                source.copy("demo", data, f"demo_{i}")
            total += data[f"demo_{i}"].attrs["num_samples"]
        hdf5.set_attributes(data, {**attrs, "num_demos": len(parts), "total": total, **counts})


def take_apart(path, folder):
    """A file's demonstrations as parts again, as `merge` had them, and what was counted: more are
    to be recorded behind them. The file stays until all are merged anew.
    """
    with libero_hdf5.open_demos(path) as file:
        for i, name in enumerate(libero_hdf5.demo_names(file)):
            part = part_path(folder, i)
            if part.exists() and readable(part):
                continue
            with atomic_path(part) as scratch, hdf5.create(scratch) as copy:
                file.copy(f"data/{name}", copy, "demo")
        said = libero_hdf5.file_attributes_of(path, file)
    tally = folder / "counts.json"
    if not tally.exists():
        write_json(tally, {name: said[name] for name in COUNTED if name in said})


def part_path(folder, index, form="libero"):
    """Where a finished demonstration waits for the others: a file, or a smith300 folder."""
    return folder / (f"episode_{index:05d}" if form == "smith300" else f"demo_{index:05d}.hdf5")


def refuse_fewer(folder, n_demos):
    """Raise UserError where a folder of parts holds demonstrations beyond the first n_demos: they
    would be removed with it.
    """
    numbers = (path.stem.rpartition("_") for path in folder.glob("*_?????*"))
    more = [int(n) for kind, _, n in numbers if kind in ("demo", "episode") and n.isdecimal()]
    if beyond := [n for n in more if n >= n_demos]:
        raise UserError(
            f"--n_demos {n_demos}: {folder} holds finished demonstrations beyond these, "
            f"{len(beyond)} would be lost; give --n_demos {max(beyond) + 1} or more, or another "
            "--out"
        )


def check_replaceable(out, overwrite, form):
    """Raise UserError unless a dataset may be written to `out`.

    It may where nothing is, and with --overwrite where a dataset of this program is.
    """
    if not out.name:
        raise UserError(f"--out {out}: has no name; give a file, or a folder of its own")
    if not out.exists():
        return
    if not overwrite:
        raise UserError(
            f"{out}: exists already and is left alone; give --overwrite, or another --out"
        )
    by_hand = "it is left alone; give another --out, or remove it by hand"
    if out.is_dir() != (form in WRITTEN):
        kind = "folder" if out.is_dir() else "file"
        raise UserError(
            f"--overwrite --out {out}: is a {kind}, and --format {form} writes the other; {by_hand}"
        )
    if out.is_dir():
        # ours by its stamp, and nothing in it that this program does not write
        stamp = out / "dataset.json"
        if form == "lerobot":
            ours, episodes = lerobot.is_ours(out), False
        else:
            ours = stamp.is_file() and smith300.read_stamp(stamp).get("format") == smith300.FORMAT
            episodes = True
        known = lambda p: (
            p.name in WRITTEN[form] or episodes and p.is_dir() and p.name.startswith("episode_")
        )
        foreign = [p.name for p in out.iterdir() if not known(p)]
        if not ours or foreign:
            found = ", ".join(sorted(foreign)[:3]) or "no stamp of it"
            raise UserError(
                f"--overwrite --out {out}: holds {found}, so it is not a folder that this "
                f"program wrote; {by_hand}"
            )
        return
    try:
        libero_hdf5.open_demos(out).close()
    except UserError:
        raise UserError(
            f"--overwrite --out {out}: is no file of demonstrations; {by_hand}"
        ) from None


def gather(folder, parts, out, attrs):
    """Make a folder of finished episodes the dataset: stamp it, clear it of the rest, rename it.

    Until it is the dataset it stays a folder of parts, so that the same command goes on after a
    full disk or a kill.
    """
    smith300.write_dataset_stamp(folder, attrs)
    # what an interrupted collection left beside the episodes
    kept = {*parts, *(folder / name for name in ("dataset.json", *OF_PARTS))}
    for other in folder.iterdir():
        if other not in kept:
            shutil.rmtree(other) if other.is_dir() else other.unlink()
    replace_folder(folder, out)
    for name in OF_PARTS:
        (out / name).unlink(missing_ok=True)


def readable(part):
    """True if a part left by an earlier run is whole."""
    if not part.suffix:
        return part.is_dir()  # renamed into place once it was
    try:
        with hdf5.open_file(part, RECOLLECT) as file:
            demo = hdf5.group(part, file, "demo", RECOLLECT)
            hdf5.dataset(part, demo, libero_hdf5.IMAGE, RECOLLECT)
            return True
    except UserError:
        return False
