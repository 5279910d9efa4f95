"""C, the voxel-token policy with EEF-relative positions: B with one override, where xyz is measured from.

World coordinates (B) should survive a moved camera; coordinates relative to the EEF should also survive a moved scene. The
anchor turns queries and outputs (layers_voxel.py), so each frame of a window has its own in one pass and no token changes.

    window   the EEF at the first frame of the context (default): later frames of a window share it and so see the motion
    last     the last known EEF of each step
    episode  the EEF at the episode's start. LIBERO's episodes all start from nearly the same pose, so this is a constant
             offset there, and C with it is B with turned weights (tests/test_voxel_policies.py): it tests nothing.
"""
from dataclasses import dataclass

from model_voxel_ar import VoxelConfig, VoxelPolicy
from policy import flag


@dataclass
class RelativeVoxelConfig(VoxelConfig):
    """Configuration of RelativeVoxelPolicy."""
    anchor: str = flag("window", "xyz is relative to the EEF at: the first frame of the context, the episode's start, or the last known",
                       ("window", "episode", "last"))


class RelativeVoxelPolicy(VoxelPolicy):
    """See the module's docstring."""

    def anchors(self, eef, first):
        if self.config.anchor == "last":
            return eef
        return (eef[:, 0] if self.config.anchor == "window" else first)[:, None].expand_as(eef)
