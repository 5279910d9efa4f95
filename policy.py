"""The interface that every policy has, and the pieces they share.

The letters of every shape in this repository:

    B batch    T waypoints of a sample, or frames of a window    N tokens, or rows of any kind
    C channels    H, W rows and columns of a grid or map    Z height bins    Q queries

Batches hold metres, radians, pixels and world coordinates; cells and bins exist only inside a
policy:

    features        [(B,C,H,W) float16], the backbone's maps, each of its own C, H and W
    eef_pos         (B,3) m, where the end-effector is
    gripper_width   (B,) m between the fingers
    K, E            (B,3,3) px, (B,4,4): intrinsics, and camera-to-world with OpenCV axes
    target_pos      (B,T,3) m, target_rot (B,T,3,3), target_gripper (B,T) in {0 open, 1 close}
    mask            (B,T) in {0, 1}, waypoints that are trained on
    instruction     (B,W), what is asked for, see nets/text.py; for policies that are told alone

A policy with a history (`has_history`) takes windows of T frames instead, one waypoint each: what
is (B,...) above is (B,T,...), but for the instruction, and `valid` (B,T) tells frames from padding,
see data_ar.py.
"""

import argparse
import copy
import time
from dataclasses import dataclass, field, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import camera
import canonical
import flags
from rot_utils import euler_to_matrix
from runtime import UserError
from waypoint import MET, Waypoint

ROTATION_MARGIN = 0.02  # radians beyond the training data's angles that the bins still cover
# layers whose weights weight decay is for
DECAYING = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


def flag(default, help, choices=None, kind=None, low=None, high=None, above=None, below=None):
    """A config field that becomes a command-line flag.

    Bounds are those of `flags.Number`; without them whole numbers start at 1, others at 0. kind:
    another type from flags.py.
    """
    kind = kind or flags.field_type(type(default), low, high, above, below)
    return field(default=default, metadata={"help": help, "choices": choices, "type": kind})


@dataclass
class PolicyConfig:
    """What every policy is configured by. It travels in the checkpoint.

    The first five names have no type annotation, so they are no flags: a policy's config class
    overrides them, some as flags. `presets` is {name: {flag: default}}, of train.py's flags too,
    and each preset sets its own max_steps and lr.
    """

    presets = {}
    older = {}  # {flag: value} of checkpoints from before there was a flag, if not its default
    has_history = False  # whether its samples are windows of frames
    context = 1  # frames that a decision sees
    n_window = 1  # waypoints that a decision answers
    rotation = "euler"  # or "pca": about one axis, which the dataset's basis names

    # from here on every field is a flag
    backbone: str = flag(
        "auto",
        "frozen features: auto, efficientnet_lite0, dinov2_vitb14, dinov2_vits14, dinov3_vits16, "
        "any timm model",
    )
    image_size: int = flag(448, "image side, pixels", kind=flags.pixels)
    canonical_view: str = flag(
        "",
        "turn and zoom every image to one view of the workspace, see canonical.py: fit, that of "
        "the camera that most training demonstrations have, or 'x y z scale' in metres and pixels "
        "a metre (images as they are)",
    )
    heights: str = flag(
        "world",
        "what heights are measured from: the world's zero, or the surface that a scene's objects "
        "stand on, for scenes on tables and on the floor together",
        ("world", "support"),
    )
    waypoint_stride: int = flag(5, "control steps between waypoints; at 1 nothing moves")
    fingers: int = flag(
        2,
        "states of the fingers that are told apart: open, closed and, of 3, closed upon nothing",
        choices=(2, 3),
    )
    open_width: float = flag(
        0.04,
        "metres between the fingers from which they count as open: more than what they hold",
        above=0,
    )
    min_travel: float = flag(
        0.02,
        "metres that a waypoint lies ahead at least: one nearer than a cell is where the EEF "
        "already is, for ever",
    )
    retreat: bool = flag(False, "train on frames after the last release too")
    stay: bool = flag(
        False, "to stay is an answer, trained on (with the retreat) where a demonstration ends so"
    )


def add_config_flags(parser, config_class):
    """One flag per field of a config dataclass."""
    group = parser.add_argument_group(config_class.__name__)
    for f in fields(config_class):
        kind = f.metadata["type"]
        if kind is bool:
            group.add_argument(
                f"--{f.name}",
                action=argparse.BooleanOptionalAction,
                default=f.default,
                help=f.metadata["help"],
            )
        else:
            group.add_argument(
                f"--{f.name}",
                type=kind,
                default=f.default,
                choices=f.metadata["choices"],
                help=f"{f.metadata['help']} ({f.default})",
            )


@dataclass
class Shard:
    """Which samples of a training step this process holds: rank, rank + world, ... of `total`.

    total None: only those of the batch. Noise is drawn for all of them in every process, on the
    CPU, from a generator that is the same in each (None: torch's own). So what a sample gets
    depends neither on the number of processes nor on the device.
    """

    rank: int = 0
    world: int = 1
    total: int = None
    generator: torch.Generator = None

    def draw(self, kind, shape, device):
        """Random numbers (B,...), one row for each sample that this process holds.

        kind: torch.rand or torch.randn.
        """
        whole = kind((self.total or shape[0], *shape[1:]), generator=self.generator, device="cpu")
        # every process drew all rows, and takes its own
        return whole[self.rank :: self.world].to(device)


class Policy(nn.Module):
    """A policy: `loss` over a batch, `act` on an observation.

    Callers ask the policy what they have to know, and never guess it from a tensor's shape:
    `has_history`, `n_frames`, `n_waypoints`, `turns`. `seconds` adds up where `act` spends its
    time.
    """

    holds_volume = False  # whether a finetune can hold its volume head still
    fresh = frozenset()  # names of parameters that it lets learn meanwhile, see harness/finetune.py
    turns = True  # whether it answers rotations; one that does not keeps the gripper's

    def __init__(self, config):
        super().__init__()
        flags.check_fields(config)
        if config.canonical_view:
            canonical.parsed(config.canonical_view)
        self.config = config
        self._backbone = []  # in a list, so that the frozen features are no part of the state dict
        self.reader = None  # of instructions, see nets/text.py
        # wall-clock seconds of `act` since `begin`
        self.seconds = {"features": 0.0, "policy": 0.0}
        self.shard = Shard()  # set by the training loop, step by step
        self.generator = None

    @property
    def has_history(self):
        """Whether batches are windows of frames, see the module's docstring."""
        return self.config.has_history

    @property
    def n_frames(self):
        """Frames of a window, the newest among them; what is cached of them may carry more."""
        return self.config.context

    @property
    def n_waypoints(self):
        """Waypoints that a decision answers, each after the one before."""
        return self.config.n_window

    @property
    def backbone(self):
        return self._backbone[0]

    def attach(self, backbone, reader=None):
        """Give the policy its frozen features (see nets/backbone.py), which are not saved with it,
        and its reader of instructions. Returns self.
        """
        self._backbone, self.reader = [backbone], reader
        return self

    def instructed(self, sentence):
        """What a batch of one has besides for an instruction in words: {} where it is told none."""
        return {}

    def _apply(self, fn, recurse=True):
        """As of nn.Module (`.to()` ...), with the frozen features taken along.

        The episode is forgotten: its tensors would stay behind on the old device.
        """
        super()._apply(fn, recurse)
        for backbone in self._backbone:
            if isinstance(backbone, nn.Module):
                backbone._apply(fn)
        self.reset()
        return self

    def fit_statistics(self, statistics):
        """Set normalisation buffers from the training data (see data.py)."""
        raise NotImplementedError

    def loss(self, batch):
        """Batch -> {"loss": scalar, further detached numbers}."""
        raise NotImplementedError

    def predict(self, batch):
        """Predict a batch without targets -> tensors by name.

        "position" (B,T,3) m, "gripper" (B,T) in {0, 1}, and "rotation" (B,T,3,3) if the policy
        turns.
        """
        raise NotImplementedError

    def decided(self, batch, rows):
        """`predict` of windows for some frames alone: rows (N,) of the flattened (B*T).

        The answer has "position" (N,3) and so on. A policy that need not compute the other frames
        overrides it.
        """
        return {k: v.flatten(0, 1)[rows] for k, v in self.predict(batch).items()}

    def forward(self, batch):
        return self.loss(batch)  # so that DistributedDataParallel's hooks run

    def masked_mean(self, values, mask):
        """Mean of values (N,) where mask (N,) is one; 0 where it never is.

        In training it is the mean over the samples of all processes. Each returns its part of the
        sum, times the number of processes, so that the average of their gradients is the gradient
        of that mean. A mean of each process's own samples would give one with few unmasked samples
        too much weight.
        """
        # how many unmasked samples there are, in all processes of a training
        total, world = mask.sum(), self.shard.world if self.training else 1
        if world > 1:
            torch.distributed.all_reduce(total)
        # a lone process, or one that validates, has world = 1: the ordinary mean
        return world * (values * mask).sum() / total.clamp(min=1)

    def check(self):
        """Raise UserError for settings that contradict each other."""

    def reset(self, generator=None):
        """Start of an episode: forget the history. generator: torch.Generator on the policy's
        device that all random draws of the episode come from; without one from torch's own."""
        self.generator = generator

    def begin(self, seed):
        """Start of an episode whose random draws all come from `seed`; its clock starts at zero."""
        device = next(self.parameters()).device
        self.reset(torch.Generator(device).manual_seed(seed))
        self.seconds = {"features": 0.0, "policy": 0.0}

    def session(self):
        """The same network for another episode that runs at the same time.

        Weights and frozen features are shared between sessions. The history and the clock are not.
        """
        # shallow: both hold the same parameters, and what `reset` assigns is the twin's alone
        twin = copy.copy(self)
        twin.begin(0)
        return twin

    def volume_parameters(self):
        """Parameters of the volume head and of all that it reads, where `holds_volume`.

        `--freeze_steps` holds them still at the start of a finetune.
        """
        return []

    def adopt(self, tensors):
        """A checkpoint's tensors by name, from which a finetune starts -> those that this policy
        takes, fitted to the data that its statistics are of.
        """
        return tensors

    def deployment_stats(self):
        """JSON-able numbers that a robot needs beside the checkpoint; None for most policies."""
        return None

    def param_groups(self, weight_decay):
        """Optimiser groups: one with weight decay, one without.

        The weights of linear layers, convolutions and attention decay. Biases, norms and embeddings
        do not, nor does a parameter that a policy holds itself, as tokens and positions, whatever
        its shape.
        """
        # by type of layer: a policy's own matrices, as tokens and positions, are no weights of one
        weights = {
            id(p)
            for m in self.modules()
            if isinstance(m, DECAYING)
            for p in m.parameters(recurse=False)
            if p.ndim >= 2
        }
        trainable = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trainable if id(p) in weights], "weight_decay": weight_decay},
            {"params": [p for p in trainable if id(p) not in weights], "weight_decay": 0.0},
        ]

    def decide(self, batch):
        """`predict` for one observation (B = 1) of an episode, called in the episode's order.

        A policy with a history overrides it: it takes the observation without T and remembers it. T
        of the answer is the trajectory's.
        """
        return self.predict(batch)

    def camera_of(self, observation):
        """The camera that this policy sees an observation with -> (K (3,3), E (4,4), warp), see
        canonical.py.
        """
        c, K, E = self.config, np.asarray(observation.K), np.asarray(observation.E)
        E = camera.lowered(E, self.support_of(observation))
        return canonical.camera_of(K, E, c.image_size, c.canonical_view)

    def support_of(self, observation):
        """Height in m that this policy counts an observation's heights from. Raises UserError where
        it needs the support, and the observation has none.
        """
        if self.config.heights == "world":
            return 0.0
        support = getattr(observation, "support", None)
        if support is None:
            raise UserError(
                "the policy measures heights from what the objects stand on (--heights support), "
                "which this observation does not say; give its `support` in metres"
            )
        return float(support)

    def image_of(self, observation):
        """An observation's image (S,S,3) uint8 as this policy sees it."""
        return canonical.warped(observation.image, self.camera_of(observation)[2])

    @torch.inference_mode()
    def features(self, images):
        """Images (B,S,S,3) uint8 -> the backbone's maps [(B,C,H,W)] on this device.

        On a GPU it waits until they are computed.
        """
        device = next(self.parameters()).device
        maps = [m.to(device) for m in self.backbone(torch.from_numpy(images))]
        if device.type == "cuda":
            # or their time would be counted as that of whoever waits for them
            torch.cuda.synchronize(device)
        return maps

    @torch.inference_mode()
    def act(self, observation, maps=None):
        """Observation -> Waypoint.

        maps [(1,C,H,W)]: features of `image_of` the observation, where a caller has computed them
        already.
        """
        device = next(self.parameters()).device
        start = time.perf_counter()
        K, E, warp = self.camera_of(observation)
        if maps is None:
            maps = self.features(canonical.warped(observation.image, warp)[None])
        middle = time.perf_counter()
        up = np.array([0.0, 0.0, self.support_of(observation)])
        # float64, as camera geometry is computed; a batch of one: (1,...)
        tensor = lambda x: torch.as_tensor(np.asarray(x), dtype=torch.float64, device=device)[None]
        out = self.decide(
            {
                "features": maps,
                "eef_pos": tensor(observation.eef_pos - up),
                "K": tensor(K),
                "gripper_width": tensor(observation.gripper_width),
                "E": tensor(E),
                **self.instructed(getattr(observation, "instruction", "")),
            }
        )
        # of the one observation: (T,3), (T,), (T,3,3)
        position = out["position"][0].double().cpu().numpy() + up
        # -1 opens and +1 closes, as robosuite's actions have it, from {0, 1}
        grippers = np.where(out["gripper"][0].cpu().numpy() > 0, 1.0, -1.0)
        rotations = out["rotation"][0].double().cpu().numpy() if self.turns else None
        self.seconds["features"] += middle - start
        self.seconds["policy"] += time.perf_counter() - middle
        rotation = rotations[0] if self.turns else None
        return Waypoint(position[0], rotation, float(grippers[0]), position, grippers, rotations)


@dataclass
class FittedConfig(PolicyConfig):
    """What policies with rotations in bins share."""

    n_rot_bins: int = flag(32, "bins per Euler axis", low=2)
    rotation_weight: float = flag(0.1, "weight of the rotation loss")
    rotation_sigma: float = flag(
        2.0, "standard deviation of Gaussian rotation targets, bins; 0: one-hot"
    )


class FittedPolicy(Policy):
    """A policy with statistics of its training data as buffers: normalised features, rotations in
    bins per Euler axis. `channels`: of the backbone's maps."""

    def __init__(self, config, channels):
        super().__init__(config)
        # Placeholders of the right shape: `fit_statistics` or a checkpoint fills them.
        for i, n in enumerate(channels):
            self.register_buffer(f"feature_mean_{i}", torch.zeros(n))
            self.register_buffer(f"feature_std_{i}", torch.ones(n))
        # radians, unwrapped
        self.register_buffer(
            "euler_range", torch.tensor([[-np.pi, np.pi]] * 3, dtype=torch.float64)
        )

    def fit_statistics(self, statistics):
        """Euler ranges and feature normalisation from the training data; see
        `data.WaypointDataset.statistics`.
        """
        # (3,2), a little wider than the data, so that none lies on an end
        euler = torch.as_tensor(statistics["euler_range"])
        self.euler_range.copy_(euler + torch.tensor([-ROTATION_MARGIN, ROTATION_MARGIN]))
        for i, (mean, std) in enumerate(statistics["features"]):
            getattr(self, f"feature_mean_{i}").copy_(torch.as_tensor(mean))
            getattr(self, f"feature_std_{i}").copy_(torch.as_tensor(std))

    def normalised(self, features):
        """Backbone maps [(...,C,H,W) float16] -> the same in float32 with zero mean and unit
        deviation a channel.
        """
        # (C,1,1) against (...,C,H,W)
        return [
            (maps.float() - getattr(self, f"feature_mean_{i}").view(-1, 1, 1))
            / getattr(self, f"feature_std_{i}").view(-1, 1, 1)
            for i, maps in enumerate(features)
        ]

    def euler_bins(self, rotation):
        """Rotations (...,3,3) -> bins (...,3) per Euler axis; angles are unwrapped about the middle
        of their range.
        """
        low, high = self.euler_range.unbind(-1)
        # a range may cross +-pi: angles are brought next to it before they are binned
        euler = wrapped(euler_angles(rotation.double()), (low + high) / 2)
        return bins_of(euler, low, high, self.config.n_rot_bins)

    def decode_rotation(self, logits):
        """Logits (...,3,bins) -> rotations (...,3,3) at the bins' centres."""
        return self.euler_rotation(logits.argmax(-1).double())

    def euler_rotation(self, bins):
        """Bins (...,3), one for each Euler angle and maybe fractions -> rotations (...,3,3)."""
        low, high = self.euler_range.unbind(-1)
        # a bin stands for its centre
        euler = low + (bins + 0.5) / self.config.n_rot_bins * (high - low)
        return torch.from_numpy(euler_to_matrix(euler.cpu().numpy())).to(bins.device)

    def rotation_bins(self, rotation):
        """Rotations (...,3,3) -> bins (...,A) of the A predicted angles: here the 3 of Euler."""
        return self.euler_bins(rotation)

    def rotation_targets(self, rotation):
        """Rotations (N,3,3) -> target probabilities (N,A,bins).

        Gaussian by default. An episode holds one rotation, so one-hot labels of a few dozen
        episodes leave the bins between them without any, and what is memorised there is worse than
        a guess.
        """
        c, bins = self.config, self.rotation_bins(rotation)
        if c.rotation_sigma <= 0:
            return F.one_hot(bins, c.n_rot_bins).float()
        # (N,A,bins), distances to the label's bin; a bell over them that sums to one
        apart = torch.arange(c.n_rot_bins, device=bins.device) - bins[..., None]
        return (-0.5 * (apart / c.rotation_sigma) ** 2).softmax(-1)

    def rotation_loss(self, logits, rotation):
        """Cross-entropy above the labels' own entropy (N,), in nats an angle, of logits (N,A,bins)
        at rotations (N,3,3).
        """
        # KL divergence = cross-entropy - entropy of the targets: 0 is a perfect answer, soft or not
        return (
            F.kl_div(
                logits.float().log_softmax(-1), self.rotation_targets(rotation), reduction="none"
            )
            .sum(-1)
            .mean(-1)
        )


def euler_angles(rotation):
    """Rotations (...,3,3) -> roll, pitch, yaw (...,3) in radians: rot_utils.matrix_to_euler on any
    device.
    """
    m = lambda i, j: rotation[..., i, j]
    # R = Rz(yaw) Ry(pitch) Rx(roll)
    pitch = torch.atan2(-m(2, 0), torch.hypot(m(2, 1), m(2, 2)))
    return torch.stack([torch.atan2(m(2, 1), m(2, 2)), pitch, torch.atan2(m(1, 0), m(0, 0))], -1)


def wrapped(angle, centre):
    """Angles in radians, wrapped into [centre - pi, centre + pi): rot_utils.wrap_angle on any
    device.
    """
    return centre + torch.remainder(angle - centre + torch.pi, 2 * torch.pi) - torch.pi


def bins_of(value, low, high, n_bins):
    """Values (...) -> bins (...) of the range; one outside goes to the bin at its end."""
    return ((value - low) / (high - low) * n_bins).floor().long().clamp(0, n_bins - 1)


def fingers_closed(widths, config):
    """Widths between the fingers in m -> 1 where they are measured closed, nearer than
    `config.open_width`, else 0; long, of the same shape.
    """
    return (widths < config.open_width).long()


def finger_state(widths, config):
    """Widths between the fingers in m -> 0 open, 1 closed and, of `config.fingers` = 3 states, 2
    where they have met: they hold nothing. long, of the same shape.
    """
    closed = fingers_closed(widths, config)
    return closed + (widths < MET).long() if config.fingers == 3 else closed


def finger_numbers(widths, config):
    """Widths between the fingers (...) in m -> (...,n-1) float, what the fingers tell of n =
    `config.fingers` states: whether they are closed and, of 3, whether they have met.
    """
    state = finger_state(widths, config)
    return torch.stack([state >= k for k in range(1, config.fingers)], -1).float()


def check_heads(config):
    """Raise UserError unless --n_heads divides --dim."""
    if config.dim % config.n_heads:
        raise UserError(f"--dim {config.dim} is no multiple of --n_heads {config.n_heads}")
