"""Samples that are windows of frames, for policies with a history.

A window ends at a usable frame and runs backwards along the decisions that would have led there:
the frame before f is one whose next waypoint is f. So frame t's image shows the robot where the
waypoint of t-1 was, and the last known EEF position of frame t is the one that its image shows; the
next waypoint is never among the inputs. Every frame of a window has its label, as in data.py.
Windows that reach the episode's start are shorter. They are padded at their end, where causal
attention cannot see the padding.
"""

import numpy as np
import torch

from data import STILL, WaypointDataset, gripper_segments, held_frames, paths_of, waypoint_labels
from formats.demos import GRIPPER_STEPS
from runtime import UserError

NEAR = 3  # control steps by which a decision may have missed the frame that follows it


def following_frames(demo, target):
    """Frame (T,) at which the next decision after each frame's own is taken.

    It is the frame of that waypoint, target (T,), or the end of the gripper's hold there.
    """
    _, changes = gripper_segments(demo.actions)
    # a waypoint at a gripper change is followed by a hold, in which the robot waits for its fingers
    hold = np.where(np.isin(target, changes), GRIPPER_STEPS, 0)
    return np.minimum(target + hold, len(demo) - 1)


def standing_since(positions):
    """The first frame (T,) of the pause that each frame is in, itself where the EEF moves.

    positions (T,3) m. A pause reaches back as long as the EEF is within STILL of where it is now.
    """
    since = np.arange(len(positions))
    for frame, position in enumerate(positions):
        while since[frame] > 0 and np.linalg.norm(positions[since[frame] - 1] - position) < STILL:
            since[frame] -= 1
    return since


def window_frames(following, last, length, allowed, since=None):
    """Frames (at most `length`, ascending) of the window that ends at frame `last`.

    following (T,) from `following_frames`; allowed (T,) bool, frames at which a decision can be
    taken. since (T,) from `standing_since`, for demonstrations that pause: the decision that led to
    a frame late in a pause led to the pause's beginning, so that frame is looked for too.
    """
    frames = [last]
    while len(frames) < length:
        # earlier frames whose decision leads onward, and by how many steps it misses this one
        before = np.flatnonzero(allowed[: frames[0]])
        # a frame that is its own next (the last one) leads nowhere
        before = before[following[before] > before]
        if not len(before):
            break
        misses = np.abs(following[before] - frames[0])
        if misses.min() > NEAR and since is not None:
            # no decision leads to this frame: does one lead to where its pause began?
            misses = np.abs(following[before] - since[frames[0]])
        if misses.min() > NEAR:
            break
        # of several that miss by as little, the latest
        frames.insert(0, int(before[np.flatnonzero(misses == misses.min())[-1]]))
    return frames


class WindowDataset(WaypointDataset):
    """Windows of `config.context` frames; index i is the window that ends at the i-th usable frame.

    `batch(indices)` gives features [(B,T,C,H,W) float16], eef_pos (B,T,3), gripper_width (B,T), K
    (B,T,3,3), E (B,T,4,4), valid (B,T) bool (False: padding), first_eef (B,3) the EEF at the
    episode's start, instruction (B,W) for policies that are told, targets and mask of every frame
    as in policy.py: target_pos (B,T,3), mask (B,T) ...
    """

    def label(self, config, frame_stride):
        # as WaypointDataset.label; `starts` will hold the frames that each demonstration needs
        starts, rows = [], []
        self.windows = []
        for d, demo in enumerate(self.demos):
            # one waypoint a frame: the window's next frames carry the ones after
            target, gripper, mask, usable = waypoint_labels(
                demo, config.waypoint_stride, 1, config.retreat, config.min_travel, config.stay
            )
            following = following_frames(demo, target[:, 0])
            # whose features are needed: every one costs a pass of the backbone
            kept = np.arange(len(demo)) % frame_stride == 0
            allowed = ~held_frames(demo) & kept
            since = standing_since(demo.ee_pos) if config.stay else None
            # only the newest frame has to be usable; earlier ones may be context alone
            windows = [
                window_frames(following, last, config.context, allowed, since)
                for last in np.flatnonzero(usable & kept)
            ]
            # windows overlap: each frame's features and labels are stored once
            needed = sorted({f for w in windows for f in w})
            # windows hold rows: numbers of frames among all needed ones of all demonstrations
            place = {f: i for i, f in enumerate(needed)}
            start = sum(len(s) for s in starts)
            starts.append(needed)
            self.windows += [np.array([start + place[f] for f in w]) for w in windows]
            # a frame that is context alone has mask 0
            rows += [
                (d, i, f, target[f, 0], gripper[f, 0], float(usable[f]))
                for i, f in enumerate(needed)
            ]
        if not self.windows:
            raise UserError(
                f"{paths_of(self.demos)}: no usable frame, all are pushed or in gripper holds; "
                "collect more demonstrations"
            )
        row_demo, self.row_slot, row_frame, target, gripper, usable = (
            np.array(c) for c in zip(*rows)
        )
        self.row_demo, self.row_frame = row_demo, row_frame
        # T = 1 of `fill`: rows (N,), targets (N,1)
        self.fill(row_demo, row_frame, target[:, None], gripper[:, None], usable[:, None])
        # a window is known by its newest frame
        ends = np.array([w[-1] for w in self.windows])
        self.demo, self.frame = row_demo[ends], row_frame[ends]
        self.first_eef = torch.from_numpy(np.stack([demo.ee_pos[0] for demo in self.demos]))
        return starts

    def __len__(self):
        return len(self.windows)

    def last_features(self, indices):
        # from files: statistics are taken before features go to a GPU, or without one
        ends = [self.windows[i][-1] for i in indices]
        n_maps = len(self.backbone.channels)
        return [
            torch.from_numpy(np.stack([self.row_map(r, m) for r in ends])) for m in range(n_maps)
        ]

    def row_map(self, row, m):
        """The m-th map (C,H,W) of a row's frame, from its file."""
        return self.maps[self.row_demo[row]][m][self.row_slot[row]]

    def window_features(self, rows, valid):
        """Maps [(B,T,C,H,W) float16] of rows (B,T), zero where valid (B,T) says that they pad."""
        if not self.resident:
            return [self.stored_windows(rows, valid, m) for m in range(len(self.backbone.channels))]
        # rows (B,T) of maps (N,C,H,W) -> (B,T,C,H,W)
        features = []
        for maps in self.resident:
            picked = maps[torch.from_numpy(rows).to(maps.device)]
            known = torch.from_numpy(valid).to(maps.device)[..., None, None, None]
            zero = torch.zeros((), dtype=picked.dtype, device=picked.device)
            features.append(torch.where(known, picked, zero))
        return features

    def stored_windows(self, rows, valid, m):
        """The m-th of `window_features`, from files."""
        windows = np.zeros((*rows.shape, *self.row_map(rows[0, 0], m).shape), np.float16)
        for b, t in zip(*np.nonzero(valid)):
            windows[b, t] = self.row_map(rows[b, t], m)
        return torch.from_numpy(windows)

    def batch(self, indices):
        """Windows -> dict of tensors, see the class."""
        T = self.config.context
        # windows differ in length: valid (B,T) is True for their frames, padding stands at the end
        windows = [self.windows[i] for i in np.asarray(indices)]
        valid = np.array([[t < len(w) for t in range(T)] for w in windows])
        # padding repeats the last frame
        rows = np.array([[w[min(t, len(w) - 1)] for t in range(T)] for w in windows])
        features = self.window_features(rows, valid)
        pick = lambda x: x[rows]  # (N,...) -> (B,T,...)
        d = self.row_demo[rows]
        valid = torch.from_numpy(valid).to(self.mask.device)
        return {
            "features": features,
            "valid": valid,
            "eef_pos": pick(self.eef_pos),
            "first_eef": self.first_eef[d[:, 0]],
            "gripper_width": pick(self.gripper_width),
            "K": self.K[d],
            "E": self.E[d],
            "target_pos": pick(self.target_pos)[..., 0, :],
            "target_rot": pick(self.target_rot)[:, :, 0],
            "target_gripper": pick(self.target_gripper)[..., 0],
            "mask": pick(self.mask)[..., 0] * valid,
            **self.told(d[:, 0]),
        }
