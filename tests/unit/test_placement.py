"""`.to()` moves all tensors, and new ones are made on the device of their inputs.

Both are checked without a GPU.
"""

import copy

import pytest
import torch
from test_contract import Case

from registry import REGISTRY


@pytest.fixture(scope="module", params=list(REGISTRY))
def case(request, synthetic_demos, backbone, tmp_path_factory):
    return Case(request.param, synthetic_demos, backbone, tmp_path_factory.mktemp("cache"))


def tensors(value, path, seen):
    """(path, tensor) of every tensor in an object: parameters, buffers, attributes, and those
    inside lists, dicts and objects.
    """
    if id(value) in seen or isinstance(value, (str, bytes, int, float, bool, type(None), type)):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{path}.{key}", seen)
    elif isinstance(value, (list, tuple, set)):
        for i, item in enumerate(value):
            yield from tensors(item, f"{path}[{i}]", seen)
    elif hasattr(value, "__dict__") and not callable(value) or isinstance(value, torch.nn.Module):
        yield from tensors(vars(value), path, seen)


def used(case):
    """A policy with its own backbone that has trained a step and acted, so that everything that
    it keeps is there.
    """
    policy = case.policy()
    policy.attach(copy.deepcopy(case.backbone))
    policy.train()(case.batch(2))["loss"].backward()
    policy.eval().reset()
    for observation in case.observations():
        policy.act(observation)
    return policy


def test_every_tensor_moves(case):
    """After `.to()` no tensor of a policy stays behind: neither of the backbone, a table, a
    constant nor the episode's history.
    """
    policy = used(case).to("meta")
    found = list(tensors(policy, case.name, set()))
    assert len(found) > len(list(policy.parameters())) + len(list(policy.backbone.parameters()))
    assert not [path for path, tensor in found if not tensor.is_meta]


def test_the_backbone_stays_out_of_the_checkpoint(case):
    """The frozen features move with the policy. They are neither in its state dict nor trained."""
    policy = case.policy()
    assert not [k for k in policy.state_dict() if "backbone" in k]
    own = {id(p) for p in policy.parameters()}
    assert not [p for p in policy.backbone.parameters() if id(p) in own]


def test_nothing_is_made_on_the_default_device(case):
    """Loss, prediction and act make tensors on the device of their inputs.

    The test sets another default device: a tensor made without a device lands there and raises when
    it meets the others, as on a GPU.
    """
    policy, batch, observations = case.policy(), case.batch(2), list(case.observations())
    with torch.device("meta"):
        loss = policy.train()(batch)["loss"]
        loss.backward()
        with torch.no_grad():
            out = policy.eval().predict(batch)
        policy.reset()
        for observation in observations:
            policy.act(observation)
    assert loss.device.type == "cpu" and all(v.device.type == "cpu" for v in out.values())
