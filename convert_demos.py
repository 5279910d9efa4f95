"""Demonstrations for LeRobot: HDF5 files become a dataset folder of version 3.0.

    python convert_demos.py data/libero_spatial_0.hdf5
    # several tasks in one dataset; H.264 videos instead of PNG, a tenth of the size
    python convert_demos.py data/a.hdf5 data/b.hdf5 --out data/both_lerobot --video

Files need an image of every frame (`collect_demos.py --frame_stride 1`, or `--replay` for one that
has not). docs/lerobot_data.md says what is written. train.py reads the folder as it does a file.
"""

from pathlib import Path

from tqdm import tqdm

import flags
from formats import lerobot_writer
from formats.mixture import ALIKE, difference, of_both_settings
from formats.parts import check_replaceable
from runtime import UserError, run_script


def convert(files, out, video, overwrite):
    """Write the demonstrations of HDF5 files as one LeRobot folder -> its number of episodes.

    Raises UserError for a file that cannot be read, and for a folder that may not be replaced.
    """
    check_replaceable(out, overwrite, "lerobot")
    sources, said = [], []
    for path in files:
        found, attributes = lerobot_writer.sources_of(path)
        sources += found
        said.append(attributes)
    if len({(a.get("task_suite"), a.get("task_id")) for a in said}) > 1 and any(
        "instruction_of" in a for a in said
    ):
        raise UserError(
            "several files, some with other tasks' sentences (instruction_of): of one dataset of "
            "theirs nobody could tell whose scene a sentence was said in; convert each by itself"
        )
    for path, attributes in zip(files[1:], said[1:]):
        # of validation conditions nothing is trained, and the dataset must go on saying so
        if unlike := difference(said[0], attributes, {**ALIKE, "part": "train"}):
            name, ours, theirs = unlike
            raise UserError(
                f"{path}: its {name} is {theirs}, that of {files[0]} is {ours}, and one dataset "
                "says one; convert it by itself"
            )
    # what holds of every file holds of the dataset
    common = {k: v for k, v in said[0].items() if all(a.get(k) == v for a in said)}
    common |= of_both_settings(said)
    bar = lambda demos: tqdm(demos, desc=f"writing {out}", unit="demo")
    lerobot_writer.write_dataset(out, sources, common, video, bar)
    return len(sources)


def build_parser():
    parser = flags.Parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="HDF5 demonstrations")
    parser.add_argument("--out", type=Path, help="folder to write (FILE_lerobot, without .hdf5)")
    parser.add_argument(
        "--video", action="store_true", help="H.264 videos instead of PNG, which lose a little"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder written before")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.out is None and len(args.files) > 1:
        raise UserError("--out: several files become one dataset; give it a name")
    out = args.out or args.files[0].with_name(f"{args.files[0].stem}_lerobot")
    n = convert(args.files, out, args.video, args.overwrite)
    print(f"{out}: {n} demonstrations in LeRobot's format; train on it with --dataset {out}")


if __name__ == "__main__":
    run_script(main)
