"""One process decides for all simulators.

If it dies, hangs or raises, no episode is lost or gets another's answer. Processes are really
spawned; the policies are plain arithmetic.
"""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime import UserError
from sim.decisions import Decider, RemoteAgent, RemoteError
from sim.workers import run_jobs

SECONDS = {"features": 0.5, "policy": 0.25}


class Counts:
    """Sessions whose answer holds the seed, the number of observations so far, and the
    observation.
    """

    batch, threads, about = 3, 2, "what there is to know"

    def __init__(self, folder=None):
        self.folder = folder and Path(folder)

    def open(self):
        return SimpleNamespace(seed=None, count=0)

    def begin(self, session, seed):
        session.seed, session.count = seed, 0

    def answer(self, requests):
        return [self.act(*request) for request in requests]

    def act(self, session, observation):
        session.count += 1
        return (session.seed, session.count, observation), SECONDS


class Raises(Counts):
    """A policy with a bug."""

    def act(self, session, observation):
        return "Traceback ...\nValueError: a bug of mine"


class DiesOnce(Counts):
    """Ends its process the first time it sees observation 3."""

    def act(self, session, observation):
        if observation == 3 and not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os._exit(7)
        return super().act(session, observation)


class HangsOnce(Counts):
    """Does not answer observation 3 the first time."""

    def act(self, session, observation):
        if observation == 3 and not (self.folder / "hung").exists():
            (self.folder / "hung").touch()
            time.sleep(600)
        return super().act(session, observation)


def refused():
    raise UserError("absent.safetensors: no such checkpoint")


def broken():
    raise ValueError("no network here")


class Worker:
    """A job is an episode of five observations. The worker must not import the network for it."""

    def __init__(self, address):
        self.agent = RemoteAgent(address)

    def run(self, job):
        self.agent.start(None, None, seed=job)
        answers = [self.agent.act(number, 0) for number in range(5)]
        return answers, self.agent.seconds

    def close(self):
        pass


def episode(job):
    """What a job of Worker returns, whatever else runs."""
    return [(job, number + 1, number) for number in range(5)], SECONDS


def outcomes(decider, n_workers, jobs=range(6), timeout=60):
    served = (decider.address,)
    found = run_jobs(jobs, Worker, served, n_workers, timeout=timeout, before_start=decider.ensure)
    return {o.job: (o.result, o.error) for o in found}


@pytest.mark.parametrize("n_workers", [1, 3])
def test_each_episode_gets_its_own_answers(n_workers):
    """Requests of several simulators are answered in batches, each by its own session."""
    with Decider(Counts) as decider:
        assert decider.about == "what there is to know"
        assert outcomes(decider, n_workers) == {job: (episode(job), None) for job in range(6)}


@pytest.mark.parametrize("policy", [DiesOnce, HangsOnce])
def test_a_network_that_dies_or_hangs_costs_no_episode(policy, tmp_path):
    """The network's process is started again, and the episodes that lost it are tried again."""
    with Decider(policy, (str(tmp_path),), timeout=3) as decider:
        before = decider.process.pid
        assert outcomes(decider, 2) == {job: (episode(job), None) for job in range(6)}
        assert decider.process.pid != before and list(tmp_path.iterdir())


def test_an_error_of_the_policy_says_what_it_was():
    """The episode's row ends with the policy's own last line, not with one about a socket."""
    with Decider(Raises) as decider:
        agent = RemoteAgent(decider.address)
        agent.start(None, None)
        with pytest.raises(RemoteError) as caught:
            agent.act(1, 0)
        assert str(caught.value).splitlines()[-1] == "ValueError: a bug of mine"


def test_a_network_that_cannot_be_made_says_why():
    """Bad input gives its one sentence, and any other error its traceback."""
    with pytest.raises(UserError, match=r"^absent.safetensors: no such checkpoint$"):
        Decider(refused)
    with pytest.raises(RuntimeError, match="ValueError: no network here"):
        Decider(broken)


def test_nothing_is_left_behind():
    """Neither the process nor its socket's folder outlives the evaluation."""
    with Decider(Counts) as decider:
        folder, process = Path(decider.address).parent, decider.process
        assert folder.exists() and process.is_alive()
    assert not folder.exists() and not process.is_alive()
