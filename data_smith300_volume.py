"""Waypoints with a 1D rotation basis, from smith300 folders (the format: formats/smith300.py) and
from LIBERO-format HDF5 files.
"""

from data import WaypointDataset
from rot_utils import PRECOMPUTE, basis_path, fingerprint, load_basis
from runtime import UserError


class VolumeDataset(WaypointDataset):
    """Samples as of `data.WaypointDataset`, and the dataset's rotation basis.

    With a config whose `rotation` is "pca" the basis is loaded when the dataset is made, before any
    feature is computed: from `config.basis`, or from beside the data. Raises UserError if it is
    missing, damaged, or was computed from other demonstrations.
    """

    def __init__(self, path, demos, config, backbone, *args, **kwargs):
        self.basis = find_basis(path, demos, config)
        super().__init__(path, demos, config, backbone, *args, **kwargs)

    @staticmethod
    def check_split(path, demos, config):
        """Raise UserError unless the basis was fitted on exactly these demonstrations, those that
        are trained on: one that has seen validation demonstrations knows the range of what is held
        out."""
        basis = find_basis(path, demos, config)
        if basis and set(basis.provenance["fingerprints"]) != {
            fingerprint(d.ee_ori) for d in demos
        }:
            raise UserError(
                f"{config.basis or basis_path(path)}: was fitted on {len(basis.provenance['fingerprints'])} demonstrations, "
                f"which are not the {len(demos)} that are trained on here; {PRECOMPUTE}, with this training's --n_demos "
                "and --val_fraction"
            )

    def statistics(self, n=256):
        """As of WaypointDataset, and "rotation_basis": RotationBasis or None."""
        return {**super().statistics(n), "rotation_basis": self.basis}


def find_basis(path, demos, config):
    """The RotationBasis of a dataset that knows these demonstrations; None where `config` asks for
    none.
    """
    if getattr(config, "rotation", "euler") != "pca":
        return None
    return load_basis(config.basis or basis_path(path), [fingerprint(d.ee_ori) for d in demos])
