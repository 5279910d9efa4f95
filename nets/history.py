"""What policies with a history share: the last known EEF in use, noise on it in training, and
sampling of the waypoint.
"""

from dataclasses import dataclass

import torch
from torch import nn

from nets.text import FILM
from nets.volume import VolumeConfig, VolumeGeometry
from policy import flag
from runtime import UserError


@dataclass
class HistoryConfig(VolumeConfig):
    """What policies over windows of frames are configured by."""

    has_history = True
    older = {"film": False}
    # in training
    eef_noise_share: float = flag(0.7, "share of windows, and of frames, with noise", high=1)
    eef_noise_own: float = flag(
        0.5,
        "each frame's own noise over that of its window; "
        "at 0 the moves from frame to frame stay as they were",
    )
    noisy_mark: bool = flag(False, "that noise is on the mark at the EEF's cell too")
    trained_frames: int = flag(
        0,
        "frames of each window that a training step is about, others at every step; 0: all of them",
        low=0,
    )
    finger_heads: bool = flag(
        True, "the heads have weights of their own for each state of --fingers"
    )
    film: bool = flag(True, FILM)
    # in use
    feedback: str = flag(
        "measured",
        "last known EEF in use: measured, predicted, "
        "or hybrid:N (measured N steps, then predicted)",
    )
    sample: bool = flag(False, "sample the waypoint instead of taking the peak")
    temperature: float = flag(1.0, "of --sample", above=0)


def feedback_steps(feedback):
    """--feedback -> after how many decisions predictions are fed back (inf: never).

    Raises UserError for anything but measured, predicted and hybrid:N.
    """
    if feedback in ("measured", "predicted"):
        return float("inf") if feedback == "measured" else 1
    if feedback.startswith("hybrid:") and feedback[7:].isdigit() and int(feedback[7:]) > 0:
        return int(feedback[7:])
    raise UserError(f"--feedback {feedback}: use measured, predicted or hybrid:N with N >= 1")


class FingerLinear(nn.Module):
    """A linear layer with weights of its own for each of n_states of the fingers, see
    policy.finger_state, or one for all (n_states=1).

    Open fingers over the bowl ask for a descent, closed ones for the way to the plate. As one input
    among thousands they lost against an image that is like no training image; as a switch they have
    a say whatever the image is.
    """

    def __init__(self, inputs, outputs, n_states):
        super().__init__()
        self.n_states, self.linear = n_states, nn.Linear(inputs, n_states * outputs)

    def forward(self, x, state):
        """x (N,inputs), state (N,) in {0, 1, 2} -> (N,outputs)."""
        # (N,n_states,outputs), of which each row picks one; with one state that is always state 0
        y = self.linear(x).unflatten(-1, (self.n_states, -1))
        return y[torch.arange(len(x), device=x.device), state.clamp(max=self.n_states - 1)]


def padded_rows(mask, n):
    """Flat indices (B*n) of n frames of each window: those of mask (B,T) in {0, 1} first.

    A window with fewer is filled up with frames whose mask is 0, which no loss counts. The number
    of rows then does not depend on the mask. If it did, the CPU would wait for a GPU to count them,
    and a compiled graph would be compiled anew.
    """
    B, T = mask.shape
    # the stable sort puts ones first; the second one restores the order in time
    frames = mask.sort(dim=1, descending=True, stable=True).indices[:, :n].sort(dim=1).values
    return (torch.arange(B, device=mask.device)[:, None] * T + frames).flatten()


class HistoryPolicy(VolumeGeometry):
    """A policy over windows of frames.

    A subclass counts the decisions since `reset` in `number`, and keeps its last waypoint (1,1,3)
    or (1,3), in metres, in `last_waypoint`.
    """

    attention_beyond = 0.0  # pixels by which maps of `attention` reach beyond the image

    def check(self):
        feedback_steps(self.config.feedback)

    def noise(self, eef):
        """Unit noise (B,T,3) for EEF positions (B,T,3) in training, to be scaled by the caller.

        It is one draw for a whole window plus, `eef_noise_own` times as large, one for each frame.
        """
        draw = lambda kind, *shape: self.shard.draw(kind, shape, eef.device)
        # each draw applies to a share of windows, or of frames; elsewhere it is zero
        of_window, of_frame = (
            draw(torch.randn, *s) * (draw(torch.rand, *s[:-1], 1) < self.config.eef_noise_share)
            for s in ((len(eef), 1, 3), eef.shape)
        )
        return of_window + self.config.eef_noise_own * of_frame

    def trained_rows(self, mask):
        """Flat indices of those of the B*T frames that are trained on, from mask (B,T).

        There is at least one, masked or not, for a finite loss. In training they are at most
        `trained_frames` of each window, drawn at random: a window of few frames then weighs more
        than it would. A policy whose steps share nothing but EEF tokens computes the drawn ones
        alone.
        """
        n = self.config.trained_frames
        if self.training and 0 < n < mask.shape[1]:
            # keep the n highest draws of each window; where fewer than n frames are unmasked, the
            # n-th
            # highest is 0 and all of them stay
            draw = self.shard.draw(torch.rand, mask.shape, mask.device) * mask
            mask = mask * (draw >= draw.topk(n).values[:, -1:])
        if self.training and (mask.is_cuda or torch.compiler.is_compiling()):
            return padded_rows(mask, n or mask.shape[1])
        rows = mask.flatten().nonzero()[:, 0]
        return rows if len(rows) else torch.zeros(1, dtype=torch.long, device=mask.device)

    def last_known(self, eef):
        """The EEF position that a decision knows, in metres: the measured `eef`, or the waypoint
        before, as --feedback says.
        """
        predicts = self.number >= feedback_steps(self.config.feedback)
        return self.last_waypoint if predicts and self.last_waypoint is not None else eef

    def sampled(self, logits):
        """Logits (N,G,Z,H,W) as they are, or with --sample all but one voxel at -inf.

        That voxel is drawn from the softmax at --temperature.
        """
        if not self.config.sample:
            return logits
        chances = (logits.flatten(1) / self.config.temperature).softmax(-1)
        # one draw over gripper and volume together; decoding then finds this voxel alone
        voxel = torch.multinomial(chances, 1, generator=self.generator)
        nothing = torch.full_like(logits, -torch.inf).flatten(1)
        return nothing.scatter_(1, voxel, 0.0).view_as(logits)
