"""C, the voxel-token policy with EEF-relative positions. It is B with one override: the point that
xyz is measured from, the anchor.

World coordinates (B) should survive a moved camera. Coordinates relative to the EEF should also
survive a moved scene. The anchor turns queries and outputs (nets/layers_voxel.py). So each frame of
a window can have an anchor of its own in one pass, and no token changes.

Heights stay heights above the table (`--anchor_axes xy`): nothing lifts the table, and an image
shows badly how high the gripper is above it. With heights measured from the EEF too (`xyz`),
waypoints at the rim were off by 8 mm in height instead of 2.

    window   the EEF at the first frame of the context (default): later frames of a window share it
             and so see the motion
    last     the last known EEF of each step
    episode  the EEF at the episode's start. LIBERO's episodes all start from nearly the same pose,
             so this is a constant offset there. C with it is B with turned weights
             (tests/unit/test_voxel_policies.py), which tests nothing.
"""

from dataclasses import dataclass

from model_voxel_ar import VoxelConfig, VoxelPolicy
from policy import flag


@dataclass
class RelativeVoxelConfig(VoxelConfig):
    """Configuration of RelativeVoxelPolicy."""

    anchor: str = flag(
        "window",
        "xyz is relative to the EEF at: the first frame of the context, the episode's start, "
        "or the last known",
        ("window", "episode", "last"),
    )
    anchor_axes: str = flag(
        "xy",
        "axes measured from it: xy, where heights stay heights above the table, or xyz",
        ("xy", "xyz"),
    )


class RelativeVoxelPolicy(VoxelPolicy):
    """See the module's docstring."""

    def anchors(self, eef, first):
        # eef (B,T,3) and first (B,3), metres -> (B,T,3), see VoxelPolicy.anchors
        anchor = {"last": eef, "window": eef[:, :1], "episode": first[:, None]}[
            self.config.anchor
        ].expand_as(eef)
        # an anchor of height 0 leaves heights as they are
        return anchor * anchor.new_tensor([1.0, 1.0, float(self.config.anchor_axes == "xyz")])
