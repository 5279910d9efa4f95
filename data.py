"""Samples of single frames in metres, radians and pixels, from demonstrations and cached features.

The label of frame i is where the EEF is `waypoint_stride` control steps later on the recorded
trajectory, or as much later as it takes to have moved by `min_travel`. It is clipped at the next
gripper change, and that change is the gripper's label. Some frames are left out:

- those inside a gripper's hold, at which no decision is ever taken;
- those whose way to the first waypoint was disturbed by a push, or is of an attempt that fails;
- those that stand still with no change to come: after the last release they would teach a fixed
  point, and a policy that mistakes a hover for it never moves again;
- the retreat after the last release (unless `retreat`): without memory, rising from the placed bowl
  looks like the approach to it, played backwards.

With `stay` the last two are trained on: where a demonstration ends by staying, a label is where it
stays, `waypoint_stride` steps later.
"""

from functools import partial

import numpy as np
import torch
from torch.utils.data import Dataset

import camera
from formats.demos import GRIPPER_STEPS, next_waypoint, seen_by
from formats.stamp import images_stamp
from nets.feature_cache import Group, feature_cache
from rot_utils import circular_mean, matrix_to_euler, rotvec_to_matrix, wrap_angle
from runtime import UserError

STILL = 0.01  # metres


def check_shift(limit, image_size, grids):
    """Raise UserError for a limit (px) of `shifted_sideways` that is above 0 and moves nothing, and
    for maps that cannot be moved as far as their camera.

    grids: sides of the feature maps, in cells.
    """
    cell = image_size // min(grids)
    if limit and (image_size % min(grids) or any(grid % min(grids) for grid in grids)):
        raise UserError(
            f"--shift_aug {limit:g}: feature maps of {' and '.join(map(str, grids))} cells have no "
            f"common cell in an image of {image_size} px, so that maps and camera would move "
            "apart; give an --image_size that is a multiple of 16, or leave --shift_aug out"
        )
    if 0 < limit < cell:
        raise UserError(
            f"--shift_aug {limit:g}: feature maps move by whole cells, of {cell} px here, so that "
            f"nothing would move; give at least {cell}, or 0"
        )


def check_cells(image_size, grids):
    """Raise UserError where feature maps of `grids` cells a side do not end where the image does:
    resized to it, each cell would show what lies up to a cell beside it.
    """
    if any(image_size % grid for grid in grids):
        cells = " and ".join(map(str, grids))
        raise UserError(
            f"--image_size {image_size}: feature maps of {cells} cells do not end where this image "
            f"does, and would be stretched; give a multiple of 16, as {image_size // 16 * 16}"
        )


def shifted_sideways(batch, limit, draws, image_size):
    """A batch whose images are moved sideways, each by its own number of pixels.

    The camera's principal point moves with the image, so cells, heights and rays keep their
    meaning. A policy can then no longer learn where in the image the table is. The shift is exact
    but for the columns that come into view, which repeat the edge. Feature maps move by whole cells
    of the coarsest, so that a limit below one moves nothing.

    limit: the largest shift in pixels, less where the EEF or a waypoint would leave the image;
    draws (B,): random numbers in [0, 1); image_size in pixels.
    """
    features, K, E = batch["features"], batch["K"], batch["E"]
    # pixels by which a shift goes: one cell of the coarsest map, a whole number of cells of all
    cell = image_size // min(maps.shape[-1] for maps in features)
    # all points that have to stay in the image (B,N,3), and each sample's first camera
    points = [batch[k].reshape(len(K), -1, 3).double() for k in ("eef_pos", "target_pos")]
    first_K, first_E = K.reshape(len(K), -1, 3, 3)[:, :1], E.reshape(len(E), -1, 4, 4)[:, :1]
    # (B,N) pixel columns; a window's frames share one camera, so the first serves all its points
    u, _, _ = camera.project(torch.cat(points, 1), first_K, first_E)
    # how far it may go to the left and to the right (B,), in whole cells
    bounds = lambda x: (x / cell).clamp(-limit / cell, limit / cell)
    least = bounds(-u.amin(1)).clamp(max=0).ceil()
    most = bounds(image_size - u.amax(1)).clamp(min=0).floor()
    # uniform over the whole numbers least ... most, both included
    columns = least + (torch.as_tensor(draws, device=u.device) * (most - least + 1)).floor()
    moved = []
    for maps in features:
        width = maps.shape[-1]
        # cells of this map for one cell of the coarsest
        step = cell * width // image_size
        # column x of the moved map shows what was at x - shift; beyond the edge, the edge repeats
        source = torch.arange(width, device=maps.device) - step * columns.long()[:, None]  # (B,W)
        # (B,1,...,1,W), to gather along the last axis of (B,C,H,W) or (B,T,C,H,W)
        source = source.clamp(0, width - 1).view(len(maps), *[1] * (maps.ndim - 2), width)
        moved.append(maps.gather(-1, source.expand_as(maps)))
    # the principal point moves with the image, so that every ray keeps its direction in the world
    K = K.clone()
    K[..., 0, 2] += (cell * columns).to(K.dtype).view(-1, *[1] * (K.ndim - 3))
    return {**batch, "features": moved, "K": K}


def gripper_segments(actions):
    """Gripper commands (T,) in {0 open, 1 close} and the frames at which they change.

    A change at frame i means that frame i is the first with the new command.
    """
    # actions[:, 6] is the gripper's: +1 closes, -1 opens
    closed = (actions[:, 6] > 0).astype(np.int64)
    return closed, np.flatnonzero(np.diff(closed)) + 1


def held_frames(demo):
    """Frames (T,) bool inside a gripper's hold, at which no decision is ever taken.

    A hold lasts GRIPPER_STEPS frames from a gripper change on. The frame of the change is not
    counted.
    """
    held = np.zeros(len(demo), bool)
    for change in gripper_segments(demo.actions)[1]:
        held[change + 1 : change + GRIPPER_STEPS] = True
    return held


def waypoint_labels(demo, stride, n_window, retreat=False, min_travel=0.0, stay=False):
    """Labels of the N frames of a Demo: (target, gripper, mask, usable).

    target (N,T), the frame whose EEF pose is the waypoint; gripper (N,T) in {0, 1}; mask (N,T)
    bool, waypoints that are reached without a push; usable (N,) bool, frames to train on. stride in
    control steps, min_travel in metres, retreat and stay as in the module's docstring.
    """
    length = len(demo)
    # how far each frame's trajectory may run: to the next gripper change, or to the last frame
    closed, changes = gripper_segments(demo.actions)
    frames = np.arange(length)
    following = np.searchsorted(changes, frames)  # the next change at or after each frame
    end = np.append(changes, length - 1)[following]
    following_waypoint = next_waypoint(demo.ee_pos, end, stride, min_travel)
    step = np.linalg.norm(demo.ee_pos[following_waypoint] - demo.ee_pos, axis=1)
    # it stays: no change is to come, and no frame from here to the end is farther
    staying = stay & (following == len(changes)) & (step < max(min_travel, STILL))
    following_waypoint = np.where(staying, np.minimum(frames + stride, end), following_waypoint)
    # waypoint after waypoint, each the next of the one before
    target = [following_waypoint]
    while len(target) < n_window:
        # a change is its own next waypoint: the trajectory ends there
        target.append(following_waypoint[target[-1]])
    target = np.stack(target, -1)
    # A push moves the EEF where the expert would not have gone: a label that lies behind one is
    # wrong.
    # number of pushed frames before each frame
    pushes = np.concatenate([[0], np.cumsum(demo.perturbed)])
    # no pushed frame in [i, target), nor i itself where the target is no way off
    mask = (pushes[target] == pushes[frames][:, None]) & ~demo.perturbed[:, None]
    held = held_frames(demo)
    still = np.linalg.norm(demo.ee_pos[target[:, 0]] - demo.ee_pos, axis=1) < STILL
    # at the change frame itself the old command still is
    in_force = np.append(closed[:1], closed[:-1])
    # left out: pushed, held, and standing still with the command to come already in force
    usable = mask[:, 0] & ~held & ~(still & (closed[target[:, 0]] == in_force) & ~staying)
    # the last release is the last change, to open fingers
    if not (retreat or stay) and len(changes) and not closed[changes[-1]]:
        usable[changes[-1] + 1 :] = False
    return target, closed[target], mask, usable


def paths_of(demos):
    """The paths of the demonstrations' datasets, as text."""
    return ", ".join(sorted({str(d.source.path) for d in demos}))


class WaypointDataset(Dataset):
    """Frames of demonstrations with their future waypoints.

    demos: list of Demo, of one dataset or of several; config: a PolicyConfig; backbone: the frozen
    features of nets/backbone.py; frame_stride: use every k-th frame; cache: folder of the features,
    computed where they are not there yet; reader: of instructions, see nets/text.py, None where the
    policy is told none. `batch(indices)` gives the dict of tensors described in policy.py. Raises
    UserError where no frame is usable.
    """

    def __init__(
        self,
        demos,
        config,
        backbone,
        frame_stride=1,
        cache="cache/features",
        progress=True,
        reader=None,
    ):
        demos = [seen_by(demo, config) for demo in demos]
        self.demos, self.config, self.backbone = demos, config, backbone
        self.resident = []  # features on a GPU, see `hold`
        # cameras by demonstration (D,3,3), (D,4,4): one camera films a whole demonstration
        self.K = torch.from_numpy(np.stack([d.K for d in demos]))
        self.E = torch.from_numpy(np.stack([d.E for d in demos]))
        # of each demonstration, (D,W)
        told = reader and torch.stack([reader(d.instruction) for d in demos])
        self.instruction = told
        # Labels first: they say which frames need features, and every frame costs a backbone pass.
        needed = self.label(config, frame_stride)
        # images are read only where the cache lacks their features, so they are given as a call
        groups = [
            Group(demo.key, partial(demo.images, frames), partial(images_stamp, demo, frames))
            for demo, frames in zip(demos, needed)
            if len(frames)
        ]
        maps = feature_cache(backbone, groups, cache, progress)
        # by dataset and demonstration: every file has a demo_0
        self.maps = [maps.get(demo.key) for demo in demos]

    @staticmethod
    def located(config, demos):
        """The config with what lies beside the data found: nothing here, see `VolumeDataset`.
        demos: all of a training, held out or not.
        """
        return config

    @staticmethod
    def check_split(demos, config):
        """Check what was computed from the training demonstrations in advance.

        Does nothing here; `VolumeDataset` checks its rotation basis. Raises UserError where it was
        computed from other demonstrations.
        """

    def label(self, config, frame_stride):
        """Set the samples' labels -> the frames (N,) of each demonstration that need features.

        A sample is (demonstration, slot, frame): its features are row `slot` of the demonstration's
        maps. Raises UserError where no frame is usable.
        """
        rows, needed = [], []
        for d, demo in enumerate(self.demos):
            target, gripper, mask, usable = waypoint_labels(
                demo,
                config.waypoint_stride,
                config.n_window,
                config.retreat,
                config.min_travel,
                config.stay,
            )
            usable &= np.arange(len(demo)) % frame_stride == 0
            needed.append(np.flatnonzero(usable))
            rows += [
                (d, slot, i, target[i], gripper[i], mask[i]) for slot, i in enumerate(needed[-1])
            ]
        if not rows:
            raise UserError(
                f"{paths_of(self.demos)}: no usable frame, all are pushed or in gripper holds; "
                "collect more demonstrations"
            )
        self.demo, self.slot, self.frame, target, gripper, mask = (np.array(c) for c in zip(*rows))
        self.fill(self.demo, self.frame, target, gripper, mask)
        return needed

    def fill(self, demo, frame, target, gripper, mask):
        """Set the low-dimensional tensors of N rows.

        demo, frame (N,): where each row is from; target (N,T): frames of its waypoints; gripper,
        mask (N,T).
        """
        # values: an array (T,...) of each demonstration; rows (N,) or (N,T) of their frames
        pick = lambda values, rows: torch.from_numpy(
            np.stack([values[d][i] for d, i in zip(demo, rows)])
        )
        positions = [d.ee_pos for d in self.demos]
        # the two fingers have coordinates of opposite sign, each its distance from the middle
        widths = [np.abs(d.gripper_states).sum(-1) for d in self.demos]
        rotations = [rotvec_to_matrix(d.ee_ori) for d in self.demos]
        # (N,3), (N,), then (N,T,3), (N,T,3,3), (N,T)
        self.eef_pos = pick(positions, frame)
        self.gripper_width = pick(widths, frame)
        self.target_pos = pick(positions, target)
        self.target_rot = pick(rotations, target)
        self.target_gripper = torch.from_numpy(gripper)
        self.mask = torch.from_numpy(mask.astype(np.float32))

    def samples_by_task(self):
        """Indices (N,) of the samples of each task, and of each sentence where a task's scene is
        told several, in the order of its first demonstration.
        """
        by_request = {}
        for d, demo in enumerate(self.demos):
            by_request.setdefault(demo.request, []).append(d)
        found = {asked: np.flatnonzero(np.isin(self.demo, d)) for asked, d in by_request.items()}
        if empty := [asked for asked, samples in found.items() if not len(samples)]:
            raise UserError(
                f"{paths_of(self.demos)}: no usable frame of task {empty[0][0]!r}, all are pushed "
                "or in gripper holds; collect more demonstrations of it"
            )
        return list(found.values())

    def hold(self, device):
        """Keep features and labels on a GPU from now on -> True if they are.

        Features become one fp16 tensor a map. They stay in files where they would take more than
        half of the free memory, and on a CPU: there the system keeps the files in memory.
        """
        if torch.device(device).type != "cuda":
            return False
        kept = [maps for maps in self.maps if maps is not None]
        size = sum(m.nbytes for maps in kept for m in maps)
        # the other half is for the training itself
        if size > torch.cuda.mem_get_info(device)[0] / 2:
            return False
        self.keep_on(device)
        return True

    def keep_on(self, device):
        """Keep features and labels in a device's memory; batches come from there."""
        kept = [maps for maps in self.maps if maps is not None]
        # one tensor (N,C,H,W) for each map, one demonstration after another
        n = sum(len(maps[0]) for maps in kept)
        self.resident = [
            torch.empty((n, *m.shape[1:]), dtype=torch.float16, device=device) for m in kept[0]
        ]
        # filled piece by piece: many trainings side by side share the files, and none of them
        # holds a copy of all features in the host's memory
        filled = 0
        for maps in kept:
            for resident, m in zip(self.resident, maps):
                resident[filled : filled + len(m)] = torch.from_numpy(np.array(m))
            filled += len(maps[0])
        # labels too, or every batch would copy them from the CPU
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))

    def __len__(self):
        return len(self.frame)

    def __getitem__(self, index):
        return self.batch([index])

    def features(self, indices):
        """Cached maps [(B,C,H,W) float16] of samples."""
        if self.resident:
            return [maps[torch.as_tensor(indices, device=maps.device)] for maps in self.resident]
        # from files: slot of the demonstration's map, sample by sample
        return [
            torch.from_numpy(np.stack([self.maps[self.demo[i]][m][self.slot[i]] for i in indices]))
            for m in range(len(self.backbone.channels))
        ]

    def last_features(self, indices):
        """Maps [(B,C,H,W) float16] of the samples' newest frames."""
        # a sample is one frame here; windows override this
        return self.features(indices)

    def batch(self, indices):
        """Samples -> dict of tensors, see policy.py."""
        indices = np.asarray(indices)
        d = self.demo[indices]
        return {
            "features": self.features(indices),
            "eef_pos": self.eef_pos[indices],
            "gripper_width": self.gripper_width[indices],
            "K": self.K[d],
            "E": self.E[d],
            "target_pos": self.target_pos[indices],
            "target_rot": self.target_rot[indices],
            "target_gripper": self.target_gripper[indices],
            "mask": self.mask[indices],
            **self.told(d),
        }

    def told(self, d):
        """A batch's instructions, of demonstrations d (B,); {} where the policy is told none."""
        return {} if self.instruction is None else {"instruction": self.instruction[d]}

    def statistics(self, n=256):
        """What policies normalise by.

        Over every frame: "height_range" (2,) m, "euler_range" (3,2) rad, unwrapped, "position"
        (mean (3,), std (3,)) m. Of every demonstration: "poses" (D,4,4), its camera-to-world. Over
        `n` samples: "features", [(mean (C,), std (C,))] for each map.
        """
        positions = np.concatenate([d.ee_pos for d in self.demos])
        heights = positions[:, 2]
        euler = matrix_to_euler(rotvec_to_matrix(np.concatenate([d.ee_ori for d in self.demos])))
        # a gripper that points down has a roll of +-pi: unwrapped, or it spans a whole turn
        euler = wrap_angle(euler, circular_mean(euler))
        # evenly over all demonstrations
        picked = np.linspace(0, len(self) - 1, min(n, len(self))).astype(int)
        features = []
        for maps in self.last_features(picked):
            maps = maps.float().cpu()  # (N,C,H,W)
            # per channel, over samples and places
            mean, deviation = maps.mean((0, 2, 3)), maps.std((0, 2, 3))
            features.append((mean.numpy(), deviation.clamp(min=1e-4).numpy()))
        return {
            "height_range": np.array([heights.min(), heights.max()]),
            "position": (positions.mean(0), positions.std(0).clip(min=1e-3)),
            "poses": self.E.cpu().numpy(),
            "euler_range": np.stack([euler.min(0), euler.max(0)], -1),
            "features": features,
        }
