"""A trained policy that answers for many episodes at once.

Each episode has a session: the network is shared, its history is not. What an episode is answered
never depends on which others run:

    CPU  every observation is computed alone, on one thread of its own, as in an evaluation with a
         single worker: equal bit by bit
    GPU  images go through the backbone by MICRO_BATCH, missing ones filled up, so that every call
         has the same shape and takes the same kernels whoever is in it; what follows is small,
         and computed session by session
"""

import dataclasses
import os
import traceback

import numpy as np
import torch

from harness.checkpoint import load_policy
from runtime import UserError, choose_device

MICRO_BATCH = 8


def set_choices(policy, choices):
    """Set how a policy with a history is used.

    choices: {"feedback", "sample", "temperature": value, or None to keep the checkpoint's}. Raises
    UserError for a policy without a history, and for a temperature of what is not sampled.
    """
    for name, value in choices.items():
        if value is None:
            continue
        if not policy.has_history:
            raise UserError(
                f"--{name}: {type(policy).__name__} has no such choice; "
                "only policies with a history have"
            )
        setattr(policy.config, name, value)
    if choices.get("temperature") is not None and not policy.config.sample:
        raise UserError("--temperature: is read where waypoints are sampled; give --sample too")
    policy.check()


class PolicySessions:
    """A policy that is ready to act in many sessions; see the module's docstring.

    batch: observations that one call answers; threads: calls that run at a time; about: what an
    evaluation needs to know of the policy without torch. That is the checkpoint's info, the
    policy's config, the device, and the tensors that the protocol is checked against, as arrays.
    """

    def __init__(self, policy, batch=1, threads=1, about=None):
        self.policy, self.batch, self.threads, self.about = policy, batch, threads, about

    @classmethod
    def load(cls, path, device="auto", weights=None, choices=None, text_weights=None):
        """The sessions of a checkpoint's policy.

        weights, text_weights: see `checkpoint.load_policy`; choices: see `set_choices`. Raises
        UserError for bad files, devices and choices.
        """
        device = choose_device(device)
        policy, info, extra = load_policy(path, device, weights, text_weights=text_weights)
        set_choices(policy, choices or {})
        about = {
            "info": info,
            "config": dataclasses.asdict(policy.config),
            "device": device,
            "reference": {name: tensor.numpy() for name, tensor in extra.items()},
        }
        if device != "cpu":  # one thread gives a GPU all its work
            return cls(policy, MICRO_BATCH, 1, about)
        # one thread for each observation: sums are added in the same order whatever else runs
        torch.set_num_threads(1)
        return cls(policy, 1, os.cpu_count() or 1, about)

    def open(self):
        """A new session."""
        return self.policy.session()

    def begin(self, session, seed):
        """Begin an episode in a session. All that it draws at random comes from `seed`."""
        session.begin(seed)

    def answer(self, requests):
        """Answer at most `batch` requests [(session, observation)], in their order.

        Each answer is (waypoint, seconds by activity), or the traceback of what the policy raised.
        """
        if self.batch == 1:
            return [self._act(*request) for request in requests]
        # GPU: one backbone call for all images, then each session with its row of the maps
        try:
            maps = self._features([s.image_of(observation) for s, observation in requests])
        except Exception:
            return [traceback.format_exc()] * len(requests)
        # maps [(1,C,H,W)] of the i-th
        one = lambda i: [m[i : i + 1] for m in maps]
        return [self._act(*request, one(i)) for i, request in enumerate(requests)]

    def _features(self, images):
        """Images [(S,S,3)] -> the backbone's maps [(batch,C,H,W)].

        Copies of the first image fill the batch up, so every call has the same shape.
        """
        filled = images + images[:1] * (self.batch - len(images))
        return self.policy.features(np.stack(filled))

    @staticmethod
    def _act(session, observation, maps=None):
        # an exception fails this episode alone: its text is the answer
        try:
            return session.act(observation, maps), dict(session.seconds)
        except UserError as error:  # a sentence already
            return str(error)
        except Exception:
            return traceback.format_exc()
