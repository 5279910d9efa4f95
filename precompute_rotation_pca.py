"""The principal axis of a dataset's rotations: the 1D rotation target of dino_volume_kv_full.

    python precompute_rotation_pca.py --dataset data/libero_spatial_0_rim.hdf5   # LIBERO's HDF5
    python precompute_rotation_pca.py --dataset data/izzy                        # smith300 folder
    python precompute_rotation_pca.py --dataset data/izzy --space euler
    python precompute_rotation_pca.py --dataset data/libero_spatial              # all of a folder

Writes rotation_pca_basis.npz beside the dataset (inside it, where it is a folder; of several, that
of the first one, where train.py looks for it) and
rotation_pca_basis.png. If one axis explains less than 0.85 of the variance, nothing is written and
the exit code is 3: a 1D target would throw away real motion.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

import flags
from figures import plots_rotation
from formats.demos import split_demos
from formats.mixture import datasets_in, open_mixture
from rot_utils import (
    EV_GATE,
    NEAR_SINGULAR,
    SPACES,
    basis_path,
    fingerprint,
    fit_basis,
    load_basis,
    matrix_to_euler,
    reconstruction_error,
    rotvec_to_matrix,
    save_basis,
)
from runtime import UserError, command_line, git_commit, run_script

GATE_EXIT = 3  # neither 1, a traceback's, nor 2, a UserError's: scripts tell it from both


def singular_share(rotations):
    """How near rotations (N,3,3) come to the Euler angles' singularity.

    -> (largest pitch in degrees, share of frames with a pitch beyond 75 degrees).
    """
    # near a pitch of +-90 degrees roll and yaw trade places
    pitch = np.abs(matrix_to_euler(rotations)[:, 1])
    return float(np.degrees(pitch.max())), float((pitch > NEAR_SINGULAR).mean())


def table(bases, rotations, chosen):
    """The comparison of the spaces, a Markdown table."""
    lost = "lost by one axis (deg, median / 95%)"
    lines = [
        f"| space | explained variance | range (deg) | axis | {lost} |",
        "|---|---|---|---|---|",
    ]
    # one row a space, so that both can be compared before one is chosen
    for space, basis in bases.items():
        name = f"{space} (chosen)" if space == chosen else space
        shares = " / ".join(f"{ratio:.3f}" for ratio in basis.ev_ratio)
        span = f"{np.degrees(basis.low):.1f} to {np.degrees(basis.high):.1f}"
        axis = " ".join(f"{part:+.2f}" for part in basis.axis)
        lost = np.degrees(reconstruction_error(basis, rotations))
        loss = f"{np.median(lost):.2f} / {np.percentile(lost, 95):.2f}"
        lines.append(f"| {name} | {shares} | {span} | {axis} | {loss} |")
    return "\n".join(lines)


def check_replaceable(path):
    """Raise UserError unless basis and picture may be written to `path`.

    They may where nothing is, or another basis.
    """
    by_hand = "it is left alone; give another --out, or remove it by hand"
    picture = path.with_suffix(".png")
    # load_basis refuses whatever is no basis, and so nothing else is replaced
    if path.exists():
        try:
            load_basis(path)
        except UserError as error:
            fault = f"is there and is no rotation basis ({error})"
            raise UserError(f"--out {path}: {fault}; {by_hand}") from error
    elif picture.exists():
        raise UserError(
            f"--out {path}: its picture would replace {picture}, which is no basis's; {by_hand}"
        )


class Rotations(NamedTuple):
    """Rotations of a dataset, split as train.py splits it: validation must stay unseen."""

    demos: list
    held_out: list
    known: np.ndarray  # (N,3,3) of the frames of `demos`
    unseen: np.ndarray  # (M,3,3) of those held out


def read_rotations(datasets, n_demos, val_fraction, task=None):
    """The Rotations of each dataset's first `n_demos` demonstrations, or of all (None). task: of
    that one alone, as of train.py.
    """
    found = open_mixture(datasets, limit=n_demos, task=task)
    demos, held_out = split_demos(found.demos, val_fraction)
    # frames of all demonstrations of a part, stacked
    known, unseen = (
        rotvec_to_matrix(np.concatenate([demo.ee_ori for demo in part]))
        for part in (demos, held_out)
    )
    return Rotations(demos, held_out, known, unseen)


def fit_bases(found, provenance):
    """{space: basis} of Rotations. Each basis stores what it was fitted to."""
    # by these a training sees that a basis was fitted to its own demonstrations, and which ones
    prints = lambda part: [fingerprint(demo.ee_ori) for demo in part]
    about = {
        "demos": len(found.demos),
        "frames": len(found.known),
        "fingerprints": prints(found.demos),
        "held_out": prints(found.held_out),
        "command": command_line(),
        "commit": git_commit(),
        "gate": EV_GATE,
        **provenance,
    }
    return {space: fit_basis(found.known, space, about) for space in SPACES}


def say_how_it_fits(found, basis, space):
    """Print how well the basis fits demonstrations that it has not seen.

    Warns where Euler angles are no measure of rotation.
    """
    # angles about the axis (M,), which the policy's bins can say only inside the range
    values = basis.value(found.unseen)
    outside = float(((values < basis.low) | (values > basis.high)).mean())
    lost = np.degrees(np.median(reconstruction_error(basis, found.unseen)))
    print(
        f"{len(found.held_out)} demonstrations held out: {100 * outside:.1f}% of their frames lie "
        f"outside the range, and one axis loses {lost:.2f} deg of them in the median"
    )
    largest, share = singular_share(found.known)
    if share > 0:
        advice = "; use --space so3" if space == "euler" else ""
        print(
            f"warning: pitch reaches {largest:.1f} deg and is beyond 75 deg in {100 * share:.0f}% "
            "of the frames: near +-90 deg roll and yaw trade places, and Euler angles are no "
            f"measure of rotation there{advice}",
            file=sys.stderr,
        )


def refusal(named, bases, space):
    """Why a basis that does not pass the gate is not written, and what to do."""
    ratio = {name: basis.ev_ratio[0] for name, basis in bases.items()}
    other = next(name for name in SPACES if name != space)
    if ratio[other] >= EV_GATE:
        advice = f"--space {other} passes with {ratio[other]:.3f}, use it"
    else:
        advice = (
            "the motion really has several axes: train with --rotation euler, three angles, which "
            "needs no basis, leave out the demonstrations that turn otherwise, or give "
            "--allow_low_ev and lose what the table says"
        )
    return (
        f"error: {named}: one axis explains {ratio[space]:.3f} of the rotations' variance in "
        f"{space}, at least {EV_GATE} is needed; nothing is written; {advice}"
    )


def write(path, found, bases, space):
    """Write the basis of a space, and beside it a picture of both."""
    basis, picture = bases[space], path.with_suffix(".png")
    save_basis(path, basis)
    # where one demonstration ends and the next begins, in the rows of all
    ends = np.cumsum([len(demo) for demo in found.demos])[:-1]
    plots_rotation.rotation_histogram(
        {name: np.degrees(b.value(found.known)) for name, b in bases.items()},
        {name: b.ev_ratio for name, b in bases.items()},
        np.split(np.degrees(basis.value(found.known)), ends),
        space,
        picture,
    )
    explained = f"explained variance {basis.ev_ratio[0]:.3f}"
    print(f"{path}: written ({space}, {explained}), picture {picture.name}")


def precompute(
    dataset,
    space="so3",
    allow_low_ev=False,
    n_demos=None,
    val_fraction=0.15,
    out=None,
    task=None,
):
    """Fit both spaces, print the table, pass the gate, write basis and picture -> exit code.

    dataset: paths, and task: of several in one dataset, as train.py takes them.
    """
    path = Path(out) if out else basis_path(datasets_in(dataset[0])[0])
    named = " ".join(map(str, dataset))
    check_replaceable(path)
    found = read_rotations(dataset, n_demos, val_fraction, task)
    provenance = {
        "dataset": " ".join(Path(one).name for one in dataset),
        "val_fraction": val_fraction,
        **({} if task is None else {"task": task}),
        "allow_low_ev": allow_low_ev,
    }
    bases = fit_bases(found, provenance)
    print(f"{named}: {len(found.demos)} demonstrations, {len(found.known)} frames")
    print(table(bases, found.known, space))
    say_how_it_fits(found, bases[space], space)
    # the gate: below it one axis is no fair account of how the gripper turns
    ev = float(bases[space].ev_ratio[0])
    if ev < EV_GATE and not allow_low_ev:
        print(refusal(named, bases, space), file=sys.stderr)
        return GATE_EXIT
    if ev < EV_GATE:
        print(
            f"warning: {ev:.3f} is below the gate of {EV_GATE}; "
            "written all the same (--allow_low_ev), and recorded so",
            file=sys.stderr,
        )
    write(path, found, bases, space)
    return 0


def build_parser():
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    what = "datasets of any format, or folders of some; all that will be trained on"
    add("--dataset", type=Path, nargs="+", required=True, help=what)
    what = "so3: log map at the Frechet mean; euler: unwrapped about the mean"
    add("--space", default="so3", choices=SPACES, help=what)
    what = "write it even if the gate is not passed; recorded in the basis"
    add("--allow_low_ev", action="store_true", help=what)
    add("--n_demos", type=flags.count, help="use only the first N demonstrations of each")
    add("--task", help="LeRobot: of this task alone, as train.py will be told")
    what = "share of demonstrations that train.py will hold out: the basis is fitted without them"
    add("--val_fraction", type=flags.held_out, default=0.15, help=what)
    add("--out", type=flags.new_file(".npz"), help="write the basis here instead")
    return parser


if __name__ == "__main__":
    run_script(lambda: precompute(**vars(build_parser().parse_args())))
