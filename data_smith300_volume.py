"""Waypoints with a 1D rotation basis, from smith300 folders (the format: smith300.py) and from LIBERO-format HDF5 files."""
from data import WaypointDataset
from rot_utils import basis_path, fingerprint, load_basis


class VolumeDataset(WaypointDataset):
    """Samples as of `data.WaypointDataset`, and the dataset's rotation basis.

    With a config whose `rotation` is "pca" the basis is loaded when the dataset is made, before any feature is computed: from
    `config.basis`, or from beside the data. Raises UserError if it is missing, damaged, or was computed from other demonstrations.
    """
    def __init__(self, path, demos, config, backbone, *args, **kwargs):
        self.basis = None
        if getattr(config, "rotation", "euler") == "pca":
            self.basis = load_basis(config.basis or basis_path(path), [fingerprint(d.ee_ori) for d in demos])
        super().__init__(path, demos, config, backbone, *args, **kwargs)

    def statistics(self, n=256):
        """As of WaypointDataset, and "rotation_basis": RotationBasis or None."""
        return {**super().statistics(n), "rotation_basis": self.basis}
