"""--device: what its values mean, and one sentence at once for a device that is not there."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from helpers import run

import deploy_dino_kv
import eval as evaluation
import train
from runtime import UserError, choose_device


@pytest.fixture
def gpus(monkeypatch):
    """A machine on which torch sees two GPUs, or as many as given."""

    def see(n=2):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)

    return see


def test_a_gpu_without_a_number_is_this_process_s(gpus, monkeypatch):
    """--device cuda means the GPU of the local rank, as auto does.

    torch.cuda.set_device refuses a device without a number.
    """
    gpus()
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert choose_device("cuda") == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("PARA_DEVICE")
    assert choose_device("cuda") == choose_device("auto") == "cuda:1"
    assert choose_device("cuda:0") == "cuda:0"


def test_a_gpu_is_taken_where_there_is_one(gpus, monkeypatch):
    """auto takes a GPU where there is one, else the CPU.

    PARA_DEVICE overrides it, as in these tests.
    """
    gpus()
    assert choose_device() == "cpu"
    monkeypatch.delenv("PARA_DEVICE")
    assert choose_device() == "cuda:0"
    gpus(0)
    assert choose_device() == choose_device("cpu") == "cpu"


@pytest.mark.parametrize(
    "device, word",
    [("foo", "unknown"), ("meta", "unknown"), ("cuda", "sees no GPU"), ("cuda:7", "sees no GPU")],
)
def test_a_device_that_is_not_there_is_one_sentence(device, word, gpus):
    """The sentence names the flag and what to use instead."""
    gpus(0)
    with pytest.raises(UserError, match=f"--device {device}: .*{word}.*use"):
        choose_device(device)


def test_more_processes_than_gpus_are_refused(gpus, monkeypatch):
    """The third process of a job on two GPUs says which GPU is missing."""
    gpus()
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="--device cuda: GPU 2 is not there, torch sees 2"):
        choose_device("cuda")


@pytest.mark.parametrize("device", ["foo", "cuda"])
def test_scripts_refuse_a_device_at_once(device, gpus, tmp_path):
    """Scripts refuse a device before they read data, load a checkpoint or start a worker."""
    gpus(0)
    absent = tmp_path / "absent.safetensors"
    calls = [
        lambda: train.train(
            *train.parse_args(["--dataset", str(tmp_path / "absent.hdf5"), "--device", device])
        ),
        lambda: evaluation.evaluate(
            evaluation.build_parser().parse_args(["--ckpt", str(absent), "--device", device])
        ),
        lambda: deploy_dino_kv.deploy(
            deploy_dino_kv.build_parser().parse_args(
                ["--ckpt", str(absent), "--source", "-", "--device", device]
            )
        ),
    ]
    for call in calls:
        with pytest.raises(UserError, match=f"--device {device}: "):
            call()


def test_evaluation_takes_the_gpu_by_default():
    """Evaluation takes a GPU by default, as training does."""
    assert evaluation.build_parser().parse_args([]).device == "auto"


def test_the_gpu_tests_own_code_runs(tmp_path):
    """Machines for `make gpu` are rare, so its code is run here on the CPU, at small sizes."""
    chosen = "not training and not two_ranks"
    run(
        f"pytest tests/gpu -q -p no:cacheprovider -k '{chosen}'",
        cwd=ROOT,
        variables={"PARA_GPU_TEST_DEVICE": "cpu"},
    )
    out = tmp_path / "cpu.json"
    run(f"study.bench_gpu --device cpu --quick --rounds 1 --out {out}", cwd=ROOT)
    assert out.is_file()


def test_demonstrations_are_read_without_a_video_library():
    """A machine for `make gpu` has torch, timm and h5py, and no PyAV: only videos need it."""
    read = "import sys; sys.modules['av'] = None; import collect_demos, train, formats.dataset"
    done = subprocess.run([sys.executable, "-c", read], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_make_gpu_without_a_gpu_says_so():
    """Without a GPU `make gpu` fails with one sentence.

    A page of skipped tests would look like success.
    """
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        ["make", "gpu", f"PY={sys.executable}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode and "error: make gpu needs a GPU" in done.stderr
