"""`--compile`: every policy's loss is one graph, which gives the numbers of the policy itself."""

import copy

import pytest
import torch
from test_contract import Case

from policy import Shard
from registry import REGISTRY


def losses(policy, call, batch):
    """One training step's loss, and the gradients by name. Noise is drawn as the trainer has it
    with --compile: from torch's own generator.
    """
    policy.train()
    torch.manual_seed(0)
    policy.shard = Shard()
    loss = call(copy.deepcopy(batch))["loss"]
    policy.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", list(REGISTRY))
def test_a_loss_compiles_without_a_graph_break(name, synthetic_demos, backbone, tmp_path):
    """A graph break costs a GPU a wait in every step; voxel policies had one at their cameras."""
    torch.compiler.reset()
    case = Case(name, synthetic_demos, backbone, tmp_path)
    policy, batch = case.policy(), case.batch(4)
    wanted, gradients = losses(policy, policy, batch)
    compiled = torch.compile(policy, backend="eager", fullgraph=True)
    found, others = losses(policy, compiled, batch)
    # in float32 some sums run in another order, and a table's sines are computed one by one
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert others.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(others[key], gradient, rtol=1e-2, atol=1e-3)
