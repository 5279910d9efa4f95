"""DinoVolumeKVFull: DinoVolumeKV whose gripper and rotation come from a transformer over the
trajectory's tokens.

A token is the pixel feature at a waypoint's keypoint plus embeddings of its height bin and number.
Two configurations:

    v7    --tf_layers 2 --token_enc learned --rotation euler --n_rot_bins 32
          three Euler angles of 32 bins each
    new   (the defaults) --tf_layers 5 --token_enc sin --rotation pca --n_rot_bins 48
          one axis, see rot_utils.RotationBasis

`--yx_embedding` adds embeddings of the keypoint's cell in either.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from model_dino_volume_kv import ENCODINGS, DinoVolumeKV, DinoVolumeKVConfig, IndexEncoding
from policy import bins_of, check_heads, euler_angles, flag, wrapped
from rot_utils import SPACES, RotationBasis


@dataclass
class DinoVolumeKVFullConfig(DinoVolumeKVConfig):
    """Configuration of DinoVolumeKVFull."""

    tf_layers: int = flag(5, "transformer layers over the trajectory's tokens")
    n_heads: int = flag(4, "attention heads")
    token_enc: str = flag(
        "sin", "encoding of height bin and waypoint number in the tokens", ENCODINGS
    )
    yx_embedding: bool = flag(False, "tokens know their keypoint's cell, by learned embeddings")
    rotation: str = flag(
        "pca", "one value on the dataset's principal axis, or three Euler angles", ("pca", "euler")
    )
    n_rot_bins: int = flag(48, "bins of the axis, or of each Euler angle", low=2)
    basis: str = flag("", "rotation basis file (rotation_pca_basis.npz beside the dataset)")


class TokenBlock(nn.Module):
    """Pre-norm transformer block over T tokens: attention, then a GELU MLP, four times as wide."""

    def __init__(self, dim, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        # a bias of the keys would never learn: it cancels in the softmax
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, visible=None):
        """x (B,T,C), visible (B,1,T,T) bool, True where attended -> (B,T,C)."""
        # (B,h,T,e) each
        q, k, v = (
            self.qkv(self.norm1(x)).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        x = x + self.out(
            F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2)
        )
        return x + self.mlp(self.norm2(x))


def pack_basis(basis):
    """RotationBasis -> vector (18,), a buffer of the policy: its checkpoint alone is enough to act.

    Entries: 0 the space, 1-9 the mean, 10-12 the axis, 13 and 14 the range in radians, 15-17 the
    explained-variance ratios.
    """
    # a matrix (3,3) in so3, three angles in euler, which leave the rest at zero
    mean = np.zeros(9)
    mean[: basis.mean.size] = basis.mean.ravel()
    return np.concatenate(
        [[SPACES.index(basis.space)], mean, basis.axis, [basis.low, basis.high], basis.ev_ratio]
    )


def unpack_basis(vector):
    """The inverse of `pack_basis`."""
    space = SPACES[int(vector[0])]
    mean = vector[1:10].reshape(3, 3) if space == "so3" else vector[1:4]
    return RotationBasis(
        space, mean, vector[10:13], float(vector[13]), float(vector[14]), vector[15:18]
    )


class DinoVolumeKVFull(DinoVolumeKV):
    """See the module's docstring."""

    def build_heads(self):
        c = self.config
        check_heads(c)
        self.n_angles = 1 if c.rotation == "pca" else 3
        self.token_pixel = nn.Linear(c.width, c.dim)
        self.token_height = IndexEncoding(c.token_enc, c.n_height_bins, c.dim)
        self.token_time = IndexEncoding(c.token_enc, c.n_window, c.dim)
        if c.yx_embedding:
            self.token_y, self.token_x = (IndexEncoding("learned", c.side, c.dim) for _ in range(2))
        self.token_blocks = nn.ModuleList(
            [TokenBlock(c.dim, c.n_heads) for _ in range(c.tf_layers)]
        )
        self.token_norm = nn.LayerNorm(c.dim)
        self.gripper_head = nn.Linear(c.dim, 2)
        self.rotation_head = nn.Linear(c.dim, self.n_angles * c.n_rot_bins)
        if c.rotation == "pca":
            # until fit_statistics: the world's z axis over a full turn
            unknown = RotationBasis(
                "so3", np.eye(3), np.array([0, 0, 1.0]), -np.pi, np.pi, np.array([1.0, 0, 0])
            )
            self.register_buffer("rotation_basis", torch.from_numpy(pack_basis(unknown)))

    def fit_statistics(self, statistics):
        """Set the parent's statistics and the rotation basis; see
        `data_smith300_volume.VolumeDataset.statistics`.
        """
        super().fit_statistics(statistics)
        if self.config.rotation == "pca":
            self.rotation_basis.copy_(torch.from_numpy(pack_basis(statistics["rotation_basis"])))

    @property
    def basis(self):
        """The RotationBasis that this policy tells rotations by."""
        return unpack_basis(self.rotation_basis.cpu().numpy())

    def predict_from_keypoints(self, features, kp_zyx, valid=None):
        # tokens (B,T,C): the pixel feature, which height and which waypoint it is
        z, y, x = kp_zyx.unbind(-1)
        time = torch.arange(kp_zyx.shape[1], device=kp_zyx.device)
        token = (
            self.token_pixel(self.at_cells(features, kp_zyx[..., 1:]))
            + self.token_height(z)
            + self.token_time(time)
        )
        if self.config.yx_embedding:
            token = token + self.token_y(y) + self.token_x(x)
        visible = None
        # (B,1,T,T): a waypoint beyond a push is no part of the trajectory, so nobody else sees it;
        # it sees itself, so that no row of the mask is empty
        if valid is not None:
            visible = (
                valid[:, None, :] | torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
            )[:, None]
        for block in self.token_blocks:
            token = block(token, visible)
        token = self.token_norm(token)
        return self.gripper_head(token), self.rotation_head(token).unflatten(
            -1, (self.n_angles, self.config.n_rot_bins)
        )

    def rotation_bins(self, rotation):
        if self.config.rotation == "euler":
            return super().rotation_bins(rotation)
        low, high = self.rotation_basis[13:15]
        # (...,1): one angle
        return bins_of(self.basis_values(rotation.double()), low, high, self.config.n_rot_bins)[
            ..., None
        ]

    def basis_values(self, rotation):
        """Rotations (...,3,3) float64 -> values (...) in radians on the basis' axis.

        This is RotationBasis.value on any device, from the packed basis.
        """
        packed, centre = self.rotation_basis, self.rotation_basis[13:15].mean()
        # A is the cross-product matrix of the axis, [axis]x
        x, y, z = axis = packed[10:13]
        o = torch.zeros_like(x)
        A = torch.stack([o, -z, y, z, o, -x, -y, x, o]).view(3, 3)
        relative = packed[1:10].view(3, 3).T @ rotation
        overlap = lambda other: (relative * other).sum((-2, -1))
        # so3: the value that maximises trace(relative^T exp(value A)), in closed form
        twist = wrapped(torch.atan2(overlap(A), -overlap(A @ A)), centre)
        # euler: the offset of (roll, pitch, yaw) from the mean, projected on the axis
        offset = wrapped(euler_angles(rotation) - packed[1:4], torch.zeros_like(o)) @ axis
        return torch.where(packed[0] == SPACES.index("so3"), twist, offset)

    def decode_rotation(self, logits):
        """Logits (...,A,bins) -> rotations (...,3,3)."""
        if self.config.rotation == "euler":
            return super().decode_rotation(logits)
        decoded = self.basis.decode(
            self.decoded_bins(logits)[..., 0].cpu().numpy(), self.config.n_rot_bins
        )
        return torch.from_numpy(decoded).to(logits.device)

    def rotation_stats(self):
        if self.config.rotation == "euler":
            return super().rotation_stats()
        return {"kind": "pca", "n_bins": self.config.n_rot_bins, "basis": self.basis.to_dict()}
