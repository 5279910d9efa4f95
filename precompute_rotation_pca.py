"""The principal axis of a dataset's rotations: the 1D rotation target of dino_volume_kv_full.

    python precompute_rotation_pca.py --dataset data/libero_spatial_0_rim.hdf5    # LIBERO-format HDF5
    python precompute_rotation_pca.py --dataset data/izzy                         # smith300 folder
    python precompute_rotation_pca.py --dataset data/izzy --space euler

Writes rotation_pca_basis.npz beside the dataset (inside it, where it is a folder) and
rotation_pca_basis.png. If one axis explains less than 0.85 of the variance, nothing is written and
the exit code is 3: a 1D target would throw away real motion.
"""

import sys
from pathlib import Path

import numpy as np

import flags
from figures import plots_rotation
from formats.dataset import open_dataset
from formats.demos import split_demos
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

GATE_EXIT = 3


def singular_share(rotations):
    """(largest pitch in degrees, share of frames with a pitch beyond 75 degrees) of rotations
    (N,3,3).
    """
    pitch = np.abs(matrix_to_euler(rotations)[:, 1])
    return float(np.degrees(pitch.max())), float((pitch > NEAR_SINGULAR).mean())


def table(bases, rotations, chosen):
    """The comparison of the spaces, a Markdown table."""
    lines = [
        "| space | explained variance | range (deg) | axis | lost by one axis (deg, median / 95%) |",
        "|---|---|---|---|---|",
    ]
    for space, basis in bases.items():
        lost = np.degrees(reconstruction_error(basis, rotations))
        lines.append(
            f"| {space}{' (chosen)' if space == chosen else ''} | {' / '.join(f'{r:.3f}' for r in basis.ev_ratio)} "
            f"| {np.degrees(basis.low):.1f} to {np.degrees(basis.high):.1f} | {' '.join(f'{a:+.2f}' for a in basis.axis)} "
            f"| {np.median(lost):.2f} / {np.percentile(lost, 95):.2f} |"
        )
    return "\n".join(lines)


def check_replaceable(path):
    """Raise UserError unless basis and picture may be written to `path`: nothing is there, or
    another basis.
    """
    by_hand = "it is left alone; give another --out, or remove it by hand"
    if path.exists():
        try:
            load_basis(path)
        except UserError as error:
            raise UserError(f"--out {path}: is there and is no rotation basis ({error}); {by_hand}")
    elif path.with_suffix(".png").exists():
        raise UserError(
            f"--out {path}: its picture would replace {path.with_suffix('.png')}, which is no basis's; {by_hand}"
        )


def precompute(args):
    """Fit both spaces, print the table, pass the gate, write basis and picture -> exit code."""
    path = Path(args.out) if args.out else basis_path(args.dataset)
    check_replaceable(path)
    all_demos = open_dataset(args.dataset, limit=args.n_demos).demos
    # as train.py splits them: validation must stay unseen
    demos, held_out = split_demos(all_demos, args.val_fraction)
    rotations, unseen = (
        rotvec_to_matrix(np.concatenate([d.ee_ori for d in part])) for part in (demos, held_out)
    )
    prints = lambda part: [fingerprint(d.ee_ori) for d in part]
    provenance = {
        "dataset": Path(args.dataset).name,
        "demos": len(demos),
        "frames": len(rotations),
        "fingerprints": prints(demos),
        "held_out": prints(held_out),
        "val_fraction": args.val_fraction,
        "command": command_line(),
        "commit": git_commit(),
        "gate": EV_GATE,
        "allow_low_ev": args.allow_low_ev,
    }
    bases = {space: fit_basis(rotations, space, provenance) for space in SPACES}
    chosen = bases[args.space]
    print(
        f"{args.dataset}: {len(demos)} demonstrations, {len(rotations)} frames\n{table(bases, rotations, args.space)}"
    )
    values = chosen.value(unseen)
    outside = float(((values < chosen.low) | (values > chosen.high)).mean())
    print(
        f"{len(held_out)} demonstrations held out: {100 * outside:.1f}% of their frames lie outside the range, and one axis loses "
        f"{np.degrees(np.median(reconstruction_error(chosen, unseen))):.2f} deg of them in the median"
    )
    largest, share = singular_share(rotations)
    if share > 0:
        print(
            f"warning: pitch reaches {largest:.1f} deg and is beyond 75 deg in {100 * share:.0f}% of the frames: near +-90 deg roll and yaw "
            f"trade places, and Euler angles are no measure of rotation there{'; use --space so3' if args.space == 'euler' else ''}",
            file=sys.stderr,
        )
    ev = float(chosen.ev_ratio[0])
    if ev < EV_GATE and not args.allow_low_ev:
        other = next(s for s in SPACES if s != args.space)
        advice = (
            f"--space {other} passes with {bases[other].ev_ratio[0]:.3f}, use it"
            if bases[other].ev_ratio[0] >= EV_GATE
            else "the motion really has several axes: keep the 3 x 32 Euler head (--rotation euler), leave out the demonstrations that "
            "turn otherwise, or give --allow_low_ev and lose what the table says"
        )
        print(
            f"error: {args.dataset}: one axis explains {ev:.3f} of the rotations' variance in {args.space}, at least {EV_GATE} is "
            f"needed; nothing is written; {advice}",
            file=sys.stderr,
        )
        return GATE_EXIT
    if ev < EV_GATE:
        print(
            f"warning: {ev:.3f} is below the gate of {EV_GATE}; written all the same (--allow_low_ev), and recorded so",
            file=sys.stderr,
        )
    save_basis(path, chosen)
    lengths = np.cumsum([len(d) for d in demos])[:-1]
    plots_rotation.rotation_histogram(
        {s: np.degrees(b.value(rotations)) for s, b in bases.items()},
        {s: b.ev_ratio for s, b in bases.items()},
        np.split(np.degrees(chosen.value(rotations)), lengths),
        args.space,
        path.with_suffix(".png"),
    )
    print(
        f"{path}: written ({args.space}, explained variance {ev:.3f}), picture {path.with_suffix('.png').name}"
    )
    return 0


def build_parser():
    parser = flags.Parser(__doc__)
    parser.add_argument(
        "--dataset", type=Path, required=True, help="LIBERO-format HDF5 file, or smith300 folder"
    )
    parser.add_argument(
        "--space",
        default="so3",
        choices=SPACES,
        help="so3: log map at the Frechet mean (so3); euler: unwrapped about the mean",
    )
    parser.add_argument(
        "--allow_low_ev",
        action="store_true",
        help="write it even if the gate is not passed; recorded in the basis",
    )
    parser.add_argument("--n_demos", type=flags.count, help="use only the first N demonstrations")
    parser.add_argument(
        "--val_fraction",
        type=flags.fraction,
        default=0.15,
        help="share of demonstrations that train.py will hold out: the basis is fitted without them",
    )
    parser.add_argument("--out", type=flags.new_file(".npz"), help="write the basis here instead")
    return parser


if __name__ == "__main__":
    run_script(lambda: precompute(build_parser().parse_args()))
