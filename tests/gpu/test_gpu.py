"""What a GPU computes is what the CPU computes, up to rounding: `make gpu`.

PARA_GPU_TEST_DEVICE=cpu runs this code without a GPU, where most equalities are trivial.
"""

import copy
import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SIZE
from safetensors.torch import load_file
from test_backbone import pictures
from test_contract import Case

from harness.sessions import MICRO_BATCH, PolicySessions
from harness.validation import to_device
from nets import layers
from nets import layers_voxel as lv
from registry import REGISTRY

DEVICE = os.environ.get("PARA_GPU_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"),
]
TRAIN = shlex.split(
    f"train.py --model_type para --image_size {SIZE} --grid 14 "
    "--backbone efficientnet_lite0 --batch_size 4 --wandb off --precision fp32"
)


def far(a, b):
    """The largest difference of two tensors over the largest entry of the second."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(scope="module", params=list(REGISTRY))
def case(request, synthetic_demos, backbone, tmp_path_factory):
    return Case(request.param, synthetic_demos, backbone, tmp_path_factory.mktemp("cache"))


def test_the_backbone_gives_the_cpus_features(backbone, device):
    """Half precision on the GPU: features within 2% of the largest."""
    images = torch.from_numpy(pictures(4))
    moved = copy.deepcopy(backbone).to(device)
    for ours, theirs in zip(moved(images), backbone(images)):
        assert ours.device.type == device
        assert ours.dtype == torch.float16
        assert far(ours, theirs) < 0.02


def test_losses_and_gradients_are_the_cpus(case, device):
    """In fp32, every parameter's gradient within a hundredth of its largest entry."""
    found = []
    for where in ("cpu", device):
        # equal weights in both rounds: the case seeds their creation
        policy = case.policy().attach(copy.deepcopy(case.backbone)).to(where).train()
        torch.manual_seed(0)
        loss = policy(to_device(case.batch(), where))["loss"]
        loss.backward()
        found.append(
            (loss, {n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
        )
    (expected, slopes), (loss, moved) = found
    assert far(loss, expected) < 1e-4 and slopes.keys() == moved.keys()
    # gradients that are rounding alone are not compared
    largest = max(g.abs().max() for g in slopes.values())
    assert not {
        n: far(moved[n], g)
        for n, g in slopes.items()
        if g.abs().max() > 1e-5 * largest and far(moved[n], g) > 0.01
    }


def test_predictions_are_the_cpus(case, device):
    """The same features decide the same waypoints, within a millimetre."""
    batch, expected = case.batch(), None
    for where in ("cpu", device):
        policy = case.policy().attach(copy.deepcopy(case.backbone)).to(where).eval()
        with torch.no_grad():
            position = policy.predict(to_device(batch, where))["position"].double().cpu()
        expected = position if expected is None else expected
    assert (position - expected).norm(dim=-1).median() < 1e-3


def test_answers_do_not_depend_on_who_else_asks(case, device):
    """Simulators share the network: an observation is answered bit by bit alike, alone and in any
    place among up to MICRO_BATCH others."""
    policy = case.policy().attach(copy.deepcopy(case.backbone)).to(device).eval()
    sessions = PolicySessions(policy, MICRO_BATCH)
    observations = list(case.observations((0, 5, 10, 15, 20)))

    def answers(chosen):
        asked = [(sessions.open(), observations[i]) for i in chosen]
        found = zip(chosen, sessions.answer(asked))
        return {i: (answer[0].position, answer[0].trajectory) for i, answer in found}

    # each observation in a session of its own, then in company and in other places of the batch
    alone = {i: answers([i])[i] for i in range(5)}
    for company in ([0, 1, 2, 3, 4], [4, 2, 0], [3, 1]):
        for i, found in answers(company).items():
            assert all((a == b).all() for a, b in zip(found, alone[i]))


def test_act_answers_as_on_the_cpu(case, device):
    """An episode's decisions run on the GPU, features and all, and answer in the world."""
    policy = case.policy().attach(copy.deepcopy(case.backbone)).to(device).eval()
    policy.reset()
    for observation in case.observations():
        waypoint = policy.act(observation)
        assert torch.isfinite(torch.from_numpy(waypoint.trajectory)).all()
    assert policy.backbone.device.type == device


@pytest.mark.parametrize("recent", [0, 2])
@pytest.mark.parametrize("n", [7, 18])
def test_compiled_attention_equals_dense_attention(recent, n, device):
    """FlexAttention, compiled, forward and backward, against a call of scaled_dot_product_attention
    a frame."""
    # recent > 0: earlier frames are seen through their coarse tokens alone
    rule = layers.Resolutions(recent, n - 2, n - 4) if recent else layers.Resolutions()
    torch.manual_seed(0)
    inputs = [
        torch.randn(2, 5, n, 2, 32, device=device, requires_grad=device != "cpu") for _ in "qkv"
    ]
    found = []
    for way in ("flex", "sdpa"):
        out = layers.frame_attention(*inputs, 4, rule, way)
        # there it has no backward pass
        slopes = torch.autograd.grad(out.square().sum(), inputs) if device != "cpu" else ()
        found.append((out, *slopes))
    assert max(far(a, b) for a, b in zip(*found)) < 1e-2  # TF32 products inside the kernel


@pytest.mark.parametrize("way", ["whole", "fused"])
def test_fused_voxel_attention_equals_plain_torch(way, device):
    """Whole volumes of scores and the Triton kernels against the CPU's chunks, forward and
    backward."""
    if way == "fused" and device == "cpu":
        pytest.skip("tests/unit/test_layers_voxel.py runs the kernels in Triton's interpreter")
    torch.manual_seed(0)
    table = lv.VoxelTable(
        torch.rand(1, 77, 2), torch.rand(1, 77, 2), torch.linspace(0.9, 1.3, 3), lv.wavelengths()
    )
    # 21 rows (queries x heads), 77 pixels, 3 height bins, 48 numbers of a position's encoding
    code, scores = torch.randn(21, 48), torch.randn(21, 77)
    further = torch.randn(21, 48), torch.randn(21, 77), torch.randn(21)
    found = []
    for where, rows in (("cpu", "chunks"), (device, way)):
        forward, backward = lv.rows_of(code, rows)
        a, b, xy, z, *g = (x.to(where) for x in (code, scores, table.xy[0], table.z, *further))
        out = forward(a, b, xy, z, None)
        found.append((*out, *backward(a, b, out[2], *g, xy, z, None)))
    assert max(far(a, b) for a, b in zip(*reversed(found))) < 1e-4


def trained(folder, dataset, device, *further, launcher=()):
    """The weights of a short training in a process of its own."""
    # one thread: sums on the CPU are taken in one order
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        *launcher,
        *TRAIN,
        *shlex.split(
            f"--dataset {dataset} --out {folder} --device {device} "
            f"--cache {folder.parent / 'cache'}"
        ),
        *further,
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return load_file(folder / "checkpoint.safetensors")


def apart(one, other):
    return max(far(one[k], v) for k, v in other.items() if v.is_floating_point())


def test_a_training_learns_on_the_gpu_and_a_finished_one_is_left_alone(
    synthetic_demos, tmp_path, device
):
    """A training learns on the GPU, and --resume finds a finished run finished."""
    weights = trained(tmp_path / "run", synthetic_demos, device, "--max_steps", "8")
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows and all(torch.isfinite(v.float()).all() for v in weights.values())
    done = subprocess.run(
        [sys.executable, "train.py", "--resume", str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert apart(load_file(tmp_path / "run" / "checkpoint.safetensors"), weights) == 0


def test_two_ranks_end_with_the_weights_of_one(synthetic_demos, tmp_path, device):
    """Two processes, each on a GPU of its own, end with one process's weights."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    one = trained(tmp_path / "one", synthetic_demos, device, "--max_steps", "4")
    assert (
        apart(
            trained(
                tmp_path / "two", synthetic_demos, device, "--max_steps", "4", launcher=launcher
            ),
            one,
        )
        < 1e-2
    )
