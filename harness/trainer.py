"""The loop that trains a policy: what a step is, how processes share it, and what a continuation
needs.

A step follows from the weights and from (seed, step): its samples, its noise, its learning rate.
The wall clock decides nothing, and neither does the number of processes: two of them end with the
weights of one, up to the order in which floats are summed.
"""

import copy
import math
import resource
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from data import shifted_sideways
from harness import finetune
from harness.checkpoint import load_tensors, save_policy, save_tensors, with_prefix
from harness.records import read_metrics
from harness.run_folder import cut_log
from harness.validation import to_device, validate
from policy import Shard
from runtime import UserError, autocast

# what a continuation has to know besides tensors; with --patience the second line too
REACHED = ("step", "minutes", "validation_minutes")
BEST = ("end", "best_step", "best_error")
# --patience goes by where the waypoints are. The loss would end a training too soon: the gripper's
# cross-entropy rises, as answers become surer, while positions still get better.
JUDGED_BY = "val/cm_mean"
LOOK_EVERY = 10  # steps between two looks at a GPU's numbers, for which the CPU has to wait


class Batches:
    """Which samples a step trains on, over all processes: a pure function of (seed, step).

    So a resumed run sees the same samples. n: of the dataset.
    """

    def __init__(self, seed, n, batch_size):
        self.seed, self.n, self.batch_size = seed, n, min(batch_size, n)
        self.epoch, self.order = None, None

    def __getitem__(self, step):
        """Indices (batch_size,) of a step's samples; an epoch leaves out what fills no batch."""
        epoch, i = divmod(step, self.n // self.batch_size)
        # a new order each epoch, from the seed alone; kept until the next one
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
        return self.order[i * self.batch_size : (i + 1) * self.batch_size]


class BalancedBatches:
    """As `Batches`, with as many samples of each task as of any other.

    Samples come in rounds. A round has one of each task, in an order of its own, so that a batch
    that is smaller than a round favours none. groups: indices (N,) of each task's samples. A task
    with fewer samples sees them more often.
    """

    def __init__(self, seed, groups, batch_size):
        self.seed, self.groups = seed, groups
        self.batch_size = min(batch_size, sum(map(len, groups)))
        # the last order of each task's samples, and which epoch of the task it is of
        self.orders = [(None, None)] * len(groups)

    def __getitem__(self, step):
        """Indices (batch_size,) of a step's samples."""
        first, n_tasks = step * self.batch_size, len(self.groups)
        picked = []
        for number in range(first, first + self.batch_size):
            turn, place = divmod(number, n_tasks)
            if place == 0 or number == first:
                order = np.random.default_rng([self.seed, turn, n_tasks]).permutation(n_tasks)
            picked.append(self._sample(order[place], turn))
        return np.array(picked)

    def _sample(self, task, turn):
        """The sample of a task in a round: each once, then again in another order."""
        epoch, i = divmod(turn, len(self.groups[task]))
        if self.orders[task][0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, int(task), 1])
            self.orders[task] = epoch, rng.permutation(self.groups[task])
        return self.orders[task][1][i]


def batches_of(seed, dataset, batch_size):
    """Which samples of a dataset each step trains on: balanced where there are several tasks."""
    groups = dataset.samples_by_task()
    if len(groups) == 1:
        return Batches(seed, len(dataset), batch_size)
    return BalancedBatches(seed, groups, batch_size)


def seed_of(*numbers):
    """One seed from several numbers; in another order they give another seed."""
    # 63 bits, as of a signed whole number
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def spoken(metrics):
    """Validation metrics in a line."""
    return ", ".join(f"{name.removeprefix('val/')} {value:.3g}" for name, value in metrics.items())


def learning_rate(recipe, step, end=None):
    """Linear warm-up, then a cosine to zero at the last step.

    With --patience the end is not known in advance: after the warm-up the rate is constant, and
    linear to zero over the last --cooldown steps before `end`.
    """
    # 0 to 1 over the warm-up; what follows runs from step 0 on, and the two are multiplied
    warm = min(1.0, (step + 1) / max(1, recipe.warmup))
    if recipe.patience:
        return recipe.lr * warm * min(1.0, (end - step) / max(1, recipe.cooldown))
    return recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * step / recipe.max_steps))


# -- how long it will take -----------------------------------------------------------------------


def profile_steps(policy, dataset, device, precision, batch_size):
    """Step time and peak memory of training at batch 2, 4 and the run's own -> rows, printed.

    The steps train a copy of the policy.
    """
    rows = []
    for size in sorted({2, 4, batch_size}):
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        # a copy is trained: the policy itself starts with the weights it has
        times = time_steps(copy.deepcopy(policy), dataset, device, precision, size)
        milliseconds = round(1000 * float(np.median(times[1:])), 1)  # the first one warms up
        memory, kind = peak_memory(device)
        rows.append(
            {"batch": size, "step_ms": milliseconds, "memory_mb": memory, "memory_kind": kind}
        )
        print(f"batch {size}: {milliseconds} ms a step, {memory} MB {kind}")
    return rows


def time_steps(policy, dataset, device, precision, size, n=4):
    """Train a policy for `n` steps on the first samples -> seconds of each."""
    optimizer = torch.optim.AdamW(policy.parameters())
    times = []
    for _ in range(n):
        start = time.perf_counter()
        batch = to_device(dataset.batch(np.arange(size) % len(dataset)), device)
        with autocast(device, precision):
            loss = policy(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        # a GPU's step is over only when the GPU says so
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def peak_memory(device):
    """Peak memory so far -> (MB, which memory that is)."""
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_allocated() / 1e6, 1), "allocated on the GPU"
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(kilobytes / 1e3, 1), "peak RSS of the process"


def expected_minutes(rows, batch_size, steps):
    """Minutes that `steps` steps will take on this machine.

    rows: of `profile_steps`, in which batch_size is one of the sizes.
    """
    return steps * next(r["step_ms"] for r in rows if r["batch"] == batch_size) / 60_000


# -- the state that a continuation needs ---------------------------------------------------------


def save_state(path, policy, optimizer, info):
    """Write all that a continuation needs, in one atomic file.

    On a CPU the continuation is bit-identical. No generator is among it: noise follows from (seed,
    step). The optimizer's tensors go by the names of their parameters.
    """
    tensors = {f"model.{k}": v for k, v in policy.state_dict().items()}
    for name, parameter in policy.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
    save_tensors(path, tensors, info)


def load_state(path, policy, optimizer):
    """Restore `save_state` -> its info: step, minutes, validation_minutes, and with --patience
    end, best_step, best_error.

    Raises UserError for a state that is not this policy's.
    """
    tensors, info = load_tensors(path)
    advice = (
        "it is another policy's, an earlier version's or damaged; train anew with another --out"
    )
    # how far it was; then names and shapes of the weights, then the optimizer's
    reached = {key: info[key] for key in (*REACHED, *BEST) if key in info}
    if type(reached.get("step")) is not int or not all(
        type(v) in (int, float) for v in reached.values()
    ):
        raise UserError(f"{path}: its header names no step of a training; {advice}")
    stored = {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
    expected = policy.state_dict()
    for name in sorted(stored.keys() ^ expected.keys()):
        what = "unknown to this policy" if name in stored else "missing"
        raise UserError(f"{path}: tensor '{name}' is {what}; {advice}")
    for name, tensor in expected.items():
        if stored[name].shape != tensor.shape:
            raise UserError(
                f"{path}: tensor '{name}' has shape {tuple(stored[name].shape)}, "
                f"{tuple(tensor.shape)} is expected; {advice}"
            )
    load_moments(path, tensors, policy, optimizer, advice)
    policy.load_state_dict(stored)
    return reached


def load_moments(path, tensors, policy, optimizer, advice):
    """Restore the optimizer's part of `save_state`."""
    # "optimizer.NAME.KIND" -> {NAME: {KIND: tensor}}, KIND step, exp_avg or exp_avg_sq (of AdamW)
    moments = {}
    for key in (k for k in tensors if k.startswith("optimizer.")):
        name, _, kind = key[10:].rpartition(".")
        moments.setdefault(name, {})[kind] = tensors[key]
    parameters = dict(policy.named_parameters())
    for name in sorted(moments.keys() | parameters.keys()):
        shape = parameters[name].shape if name in parameters else None
        found = moments.get(name, {})
        # a parameter that was held still from the first step on has no moments yet
        if shape is None or found and found.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise UserError(
                f"{path}: the optimizer's tensors of '{name}' are not this policy's; {advice}"
            )
        if any(value.shape != shape for kind, value in found.items() if kind != "step"):
            raise UserError(
                f"{path}: the optimizer's tensors of '{name}' are not of shape "
                f"{tuple(shape)}; {advice}"
            )
    # the optimizer numbers its parameters, group by group; names do not depend on the order
    names = {id(p): name for name, p in parameters.items()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    optimizer.load_state_dict(
        {
            "state": {i: moments[n] for i, n in enumerate(order) if n in moments},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )


# -- the loop ------------------------------------------------------------------------------------


class Ahead:
    """`make(step)` for the steps from `first` to `end`, in order, made ahead of time by a thread.

    While a step is trained on, at most `depth` further results wait.
    """

    def __init__(self, make, first, end, depth=2):
        self.make, self.depth = make, depth
        self.steps = iter(range(first, end))
        self.thread = ThreadPoolExecutor(1)
        self.waiting = deque()

    def take(self):
        """The next step's result. Raises what `make` raised."""
        # order one more than is waited for, so that the thread has work while the caller trains
        while len(self.waiting) <= self.depth and (step := next(self.steps, None)) is not None:
            self.waiting.append(self.thread.submit(self.make, step))
        return self.waiting.popleft().result()

    def close(self):
        """Stop: make no more results."""
        self.thread.shutdown(cancel_futures=True)


class Trainer:
    """A policy, its optimizer and its data, in one process of a training.

    dist: this process's place; logger: RunLogger; save_info: provenance of the checkpoint;
    reference: its further tensors. `step` steps are done, in `minutes` of training and
    `validation_minutes`; `metrics` are those of the last validation. `end` is the last step. With
    --patience the lowest held-out error so far, `best_error` in cm, was that of `best_step`, whose
    weights are in the checkpoint.
    """

    def __init__(
        self, policy, train_set, val_set, recipe, dist, folder, logger, save_info, reference
    ):
        self.policy, self.train_set, self.val_set = policy, train_set, val_set
        self.recipe, self.dist, self.folder, self.logger = recipe, dist, folder, logger
        self.save_info, self.reference = save_info, reference
        self.state_path = folder / "state.safetensors"
        self.checkpoint_path = folder / "checkpoint.safetensors"
        groups = policy.param_groups(recipe.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, fused=True)
        # features to the GPU where they fit, see `WaypointDataset.hold`
        for part in (train_set, val_set):
            part.hold(dist.device)
        self.batches = batches_of(recipe.seed, train_set, recipe.batch_size)
        self.step, self.minutes, self.validation_minutes, self.metrics = 0, 0.0, 0.0, None
        self.end, self.best_step, self.best_error = recipe.max_steps, 0, math.inf

    def fit(self, stop):
        """Train to the last step -> True; or to a StopSignal, then save -> False."""
        recipe, device, is_main = self.recipe, self.dist.device, self.dist.is_main
        module = self.wrapped_policy()
        bar = tqdm(total=recipe.max_steps, initial=self.step, unit="step", disable=not is_main)
        bar.set_description("training")
        broken = torch.zeros((), dtype=torch.bool, device=device)
        stopping = False
        # batches are gathered by a thread while the step before is computed
        self.ahead = Ahead(self.samples, self.step, recipe.max_steps)
        self.policy.train()
        while self.step < self.end and not stopping:
            started = time.perf_counter()

            # one step: forward, backward, update
            self.set_learning_rate()
            batch = self.next_batch()
            with autocast(device, recipe.precision):
                parts = module(batch)
            self.optimizer.zero_grad(set_to_none=True)
            parts["loss"].backward()
            # before the clip: held gradients count in no norm
            if self.step < recipe.freeze_steps:
                finetune.hold_volume(self.policy)
            norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), recipe.clip)
            self.optimizer.step()
            parts = {name: value.detach() for name, value in parts.items()}  # the graph may go
            self.step += 1

            # A CPU's numbers are there at once. A GPU still computes: it is waited for only where
            # something is done with its numbers.
            broken |= ~torch.isfinite(parts["loss"]) | ~torch.isfinite(norm)
            # These follow from the step alone, so all processes meet in `agree_to_stop`.
            logs, validates, saves = self.due()
            if device == "cpu" or logs or validates or saves:
                stopping = self.agree_to_stop(stop.raised, broken)
            self.minutes += (time.perf_counter() - started) / 60

            # what the step was good for
            bar.update()
            if logs:
                bar.set_postfix(loss=f"{self.log(parts, norm):.2f}", refresh=False)
            # with --patience before a stop too: a resumed run has the same weights to choose from
            if validates and (recipe.patience or not stopping):
                self.look_at_held_out()
            # a training that validation has just ended is saved too
            if (saves or stopping or self.step == self.end) and is_main:
                self.save()
        bar.close()
        self.ahead.close()
        self.policy.shard = Shard()
        return not stopping

    def wrapped_policy(self):
        """What a step calls: the policy, shared with the other processes and compiled as asked."""
        # DDP averages the gradients of the processes, see Policy.masked_mean
        module = self.policy
        if self.dist.world > 1:
            module = torch.nn.parallel.DistributedDataParallel(module)
        return torch.compile(module) if self.recipe.compile else module

    def set_learning_rate(self):
        """Set the learning rate of the step to come, for all parameters."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step, self.end)

    def next_batch(self):
        """This process's samples of the next step, on its device; noise is seeded for it too."""
        seed, step = self.recipe.seed, self.step
        rank, world = self.dist.rank, self.dist.world
        # for dropout, each process its own
        torch.manual_seed(seed_of(seed, step, 1 + rank))
        # for the noise of samples, the same in every process
        generator = torch.Generator().manual_seed(seed_of(seed, step, 0))
        # a compiled graph takes none: a lone process then draws from torch's own, seeded above
        if self.recipe.compile and world == 1:
            generator = None
        self.policy.shard = Shard(rank, world, self.batches.batch_size, generator)
        return to_device(self.ahead.take(), self.dist.device)

    def samples(self, step):
        """This process's samples of a step, on the device that holds the dataset.

        A pure function of the step: `Ahead` calls it from a thread.
        """
        seed, rank, world = self.recipe.seed, self.dist.rank, self.dist.world
        indices = self.batches[step]
        batch = self.train_set.batch(indices[rank::world])
        if self.recipe.shift_aug > 0:
            # drawn for all samples of the step, then divided as the samples are
            draws = np.random.default_rng([seed, step]).random(len(indices))[rank::world]
            size = self.policy.config.image_size
            batch = shifted_sideways(batch, self.recipe.shift_aug, draws, size)
        return batch

    def due(self):
        """Whether the step that is reached is (logged, validated, saved)."""
        step, recipe = self.step, self.recipe
        logs = step % LOOK_EVERY == 0 or step == 1
        validates = step % recipe.val_every == 0 or step == recipe.freeze_steps
        # the last weights may be the best ones
        validates |= recipe.patience > 0 and step == self.end
        saves = step % recipe.save_every == 0 or step == self.end
        return logs, validates, saves

    def agree_to_stop(self, stopping, broken):
        """Whether any process wants to stop: they must leave together.

        Raises UserError in all of them if `broken` is true in one, after a loss or a gradient that
        is not finite.
        """
        if self.dist.world > 1:
            # the maximum over processes: 1 where any has said so
            said = torch.tensor([float(stopping), float(broken)], device=self.dist.device)
            torch.distributed.all_reduce(said, op=torch.distributed.ReduceOp.MAX)
            stopping, broken = said.tolist()
        if broken:
            raise UserError(
                f"the loss or its gradient is not finite at step {self.step}; "
                "the last saved state stays, lower --lr"
            )
        return bool(stopping)

    def log(self, parts, norm):
        """Log a step's numbers, averaged over the processes -> the loss."""
        # one transfer for all numbers; their mean over processes is that over all samples
        values = torch.stack([v.float() for v in parts.values()])
        if self.dist.world > 1:
            torch.distributed.all_reduce(values)
        found = dict(zip(parts, (values / self.dist.world).tolist()))
        row = {f"train/{name}": value for name, value in found.items()}
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        row["grad_norm"] = float(norm)
        self.logger.log(self.step, {**row, **self.measured_minutes()})
        return found["loss"]

    def measured_minutes(self):
        """Minutes of training and of validation, by name."""
        return {k: round(getattr(self, k), 4) for k in ("minutes", "validation_minutes")}

    def look_at_held_out(self):
        """Validate in the first process. With --patience keep the best weights, and bring the end
        nearer where they are old: all processes learn of it.
        """
        if self.dist.is_main:
            self.validate()
            tqdm.write(f"step {self.step}: {spoken(self.metrics)}")
        if not self.recipe.patience:
            return
        if self.dist.is_main:
            self.keep_best(self.metrics[JUDGED_BY])
        if self.dist.world > 1:
            end = torch.tensor(self.end, device=self.dist.device)
            torch.distributed.broadcast(end, 0)
            self.end = int(end)

    def keep_best(self, error):
        """Write a checkpoint if the held-out error of this step is the lowest so far; else, after
        --patience validations without a lower one, begin the cool-down. error: cm.
        """
        recipe = self.recipe
        if error < self.best_error:
            self.best_step, self.best_error = self.step, error
            self.save_checkpoint()
        elif self.step - self.best_step >= recipe.patience * recipe.val_every:
            # of several such ends the first one holds
            sooner = min(self.end, self.step + recipe.cooldown)
            if sooner < self.end:
                self.end = sooner
                tqdm.write(
                    f"no lower held-out error since step {self.best_step}: "
                    f"training ends at step {self.end}"
                )

    def restore_best(self):
        """Take the weights and the metrics of the step with the lowest held-out error."""
        tensors, info = load_tensors(self.checkpoint_path)
        self.policy.load_state_dict(with_prefix(tensors, "model."))
        self.metrics = info["metrics"]

    def validate(self):
        """Compute and log metrics on held-out demonstrations; their time is no training time."""
        started = time.perf_counter()
        limit = self.recipe.val_samples
        self.metrics = validate(self.policy, self.val_set, self.dist.device, limit=limit)
        self.validation_minutes += (time.perf_counter() - started) / 60
        self.logger.log(self.step, {**self.metrics, **self.measured_minutes()})
        # while a finetuned policy's volume head is free again, its loss may creep up
        rows = read_metrics(self.folder) if self.recipe.freeze_steps else []
        creep = finetune.volume_creep(rows, self.recipe.freeze_steps)
        if creep:
            tqdm.write(("warning: " if creep[1] else "") + creep[0])

    def save(self):
        """State of the step that is reached, and its checkpoint: with --patience that is of the
        best step instead, see `keep_best`.
        """
        reached = {k: getattr(self, k) for k in (*REACHED, *(BEST if self.recipe.patience else ()))}
        save_state(self.state_path, self.policy, self.optimizer, reached)
        if not self.recipe.patience:
            self.save_checkpoint()

    def save_checkpoint(self, **further):
        """Checkpoint of the weights as they are now. further: entries of its header."""
        info = {**self.save_info, "step": self.step, **self.measured_minutes(), **further}
        info["metrics"] = self.metrics or {}
        model_type = self.recipe.model_type
        save_policy(self.checkpoint_path, self.policy, model_type, info, self.reference)

    def finish(self):
        """Last validation and checkpoint. With --patience the best weights are taken back."""
        if self.recipe.patience:
            self.restore_best()
            self.save_checkpoint(best_step=self.best_step, finished=True)
            return
        # unless the loop has validated this very step
        if self.step % self.recipe.val_every or self.metrics is None:
            self.validate()
        self.save()

    def resume(self):
        """Go on from the run folder's saved state, if there is one; its log is cut to that."""
        if self.state_path.exists():
            vars(self).update(load_state(self.state_path, self.policy, self.optimizer))
        if self.dist.is_main:
            cut_log(self.folder, self.step)

    def estimate(self):
        """Time a few steps -> rows of `profile_steps`. Prints how long the training will take."""
        recipe, batch_size = self.recipe, self.batches.batch_size
        # samples of the largest share of a process: batch / world, rounded up
        share = -(-batch_size // self.dist.world)
        device, precision = self.dist.device, recipe.precision
        rows = profile_steps(self.policy, self.train_set, device, precision, share)
        minutes = expected_minutes(rows, share, recipe.max_steps)
        most = "at most " if recipe.patience else ""
        print(
            f"{most}{recipe.max_steps} steps of batch {batch_size}: about {minutes:.1f} minutes of "
            "training on this machine as it is now, validation and pictures besides"
        )
        return rows
