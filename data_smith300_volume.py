"""Samples with the rotation basis of their dataset: folders of a real robot's episodes ("smith300",
see formats/smith300.py), or any other format.
"""

import dataclasses

from data import WaypointDataset
from rot_utils import PRECOMPUTE, basis_path, fingerprint, load_basis
from runtime import UserError


class VolumeDataset(WaypointDataset):
    """Samples as of `data.WaypointDataset`, and the dataset's rotation basis.

    With a config whose `rotation` is "pca" the basis is loaded when the dataset is made, before any
    feature is computed: from `config.basis`, or from beside the data. Raises UserError if it is
    missing, damaged, or was computed from other demonstrations.
    """

    def __init__(self, demos, config, backbone, *args, **kwargs):
        # before the features, which take minutes: a missing basis is reported at once
        self.basis = find_basis(demos, config)
        super().__init__(demos, config, backbone, *args, **kwargs)

    @staticmethod
    def located(config, demos):
        """The config with its basis found beside one of all demonstrations: a part of a split may
        be of another dataset than the one that it stands beside.
        """
        if config.rotation != "pca" or config.basis:
            return config
        return dataclasses.replace(config, basis=str(basis_file(demos, config)))

    @staticmethod
    def check_split(demos, config):
        """Raise UserError unless the basis was fitted on exactly these demonstrations, those that
        are trained on: one that has seen validation demonstrations knows the range of what is held
        out."""
        basis = find_basis(demos, config)
        if basis is None:
            return
        # by content, not by name: a fingerprint is of a demonstration's rotations
        fitted = set(basis.provenance["fingerprints"])
        if fitted != {fingerprint(d.ee_ori) for d in demos}:
            raise UserError(
                f"{basis_file(demos, config)}: was fitted on "
                f"{len(basis.provenance['fingerprints'])} demonstrations, which are not the "
                f"{len(demos)} that are trained on here; {PRECOMPUTE}, with this training's "
                "--n_demos, --task and --val_fraction"
            )

    def statistics(self, n=256):
        """As of WaypointDataset, and "rotation_basis": RotationBasis or None."""
        return {**super().statistics(n), "rotation_basis": self.basis}


def basis_file(demos, config):
    """Where the basis of demonstrations is: `config.basis`, or beside one of their datasets."""
    if config.basis:
        return config.basis
    # one of several datasets has it, and a part of a split may begin with another
    places = list(dict.fromkeys(basis_path(demo.source.path) for demo in demos))
    return next((place for place in places if place.exists()), places[0])


def find_basis(demos, config):
    """The RotationBasis that knows these demonstrations; None where `config` asks for none."""
    if config.rotation != "pca":
        return None
    return load_basis(basis_file(demos, config), [fingerprint(d.ee_ori) for d in demos])
