"""What a GPU makes of it, timed by CUDA events: for `make gpu`.

    python -m study.bench_gpu     # results/gpu/<card>.json
    # the same code without a GPU, at small sizes
    python -m study.bench_gpu --device cpu --quick --out x.json

A's training step at full size against the rate of a plain matrix product measured beside it,
attention to voxel tokens in each of its ways, the latency of a decision, features a second.
"""

import time
from pathlib import Path

import numpy as np
import torch

import flags
from harness.validation import to_device
from model_autoregressive import AutoregressiveConfig
from nets.backbone import GPU_BATCH, Backbone
from runtime import (
    choose_device,
    command_line,
    git_commit,
    may_replace,
    run_script,
    versions,
    write_json,
)
from study.bench_attention import VoxelCase, decide_all, window_of


def milliseconds(call, device, rounds):
    """Median ms of a call after three that warm up, by events on a GPU."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        if device == "cpu":
            start = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - start))
            continue
        # kernels run after the call has returned: events on the stream are timed where they happen
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return round(float(np.median(times)), 3)


def matmul_rate(device, n, rounds):
    """Floating-point operations a second of a square bf16 product, 1e12."""
    # 2 n^3 operations a product; ms and 1e12 leave a factor of 1e-9
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in "ab")
    return 2 * n**3 / milliseconds(lambda: a @ b, device, rounds) / 1e9


def training_step(device, quick, rounds):
    """A's training step, by way of attention: ms, and the share of the matrix product's rate that
    it reaches.
    """
    from torch.utils.flop_counter import FlopCounterMode

    size = (
        {"dim": 32, "n_layers": 2, "n_heads": 2, "patch_grid": 7, "key_width": 8, "grid": 28}
        if quick
        else {}
    )
    frames, batch = (3, 1) if quick else (8, 16)
    rate, rows = matmul_rate(device, 256 if quick else 8192, rounds), []
    # FlexAttention is compiled for a GPU and has no backward pass on a CPU
    for way in ("sdpa", "flex") if device != "cpu" else ("sdpa",):
        policy, windows = window_of(
            AutoregressiveConfig(context=frames, attention=way, **size), frames, batch, True
        )
        policy, windows = policy.to(device), to_device(windows, device)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)

        # defaults bind the loop's variables of this round
        def step(policy=policy, windows=windows, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
                loss = policy(windows)["loss"]
            loss.backward()
            optimizer.step()

        row = {
            "attention": way,
            "batch": batch,
            "frames": frames,
            "ms": milliseconds(step, device, rounds),
        }
        # operations are counted of plain attention alone, in one further step
        if way == "sdpa":
            with FlopCounterMode(display=False) as counter:
                step()
            row["tflop"] = counter.get_total_flops() / 1e12
            row["share_of_matmul_rate"] = round(row["tflop"] / row["ms"] * 1000 / rate, 3)
        rows.append(row)
    return {"title": "A, training step", "matmul_tflops": round(rate, 2), "rows": rows}


def voxel_attention(device, quick, rounds):
    """Forward and backward of a layer, tokens built (in fp32, and in bf16 where FlashAttention is)
    and absorbed in each way.
    """
    from nets import layers_voxel as lv

    rows = []
    ways = ("chunks", "whole", *(("fused",) if device != "cpu" else ()))
    for size in (
        [(1, 8, 4, 16, 1)]
        if quick
        else [(4, 28, 16, 128, 1), (4, 56, 32, 128, 1), (16, 56, 32, 384, 1)]
    ):
        # (batch, side, height bins, token width, queries)
        case = VoxelCase(*size, device)
        # once for all ways: as of a camera that stands still
        table = case.make_table()
        row = {
            "case": case.name,
            "built": milliseconds(case.built, device, rounds),
            "built_bf16": milliseconds(case.built_bf16, device, rounds),
        }
        for way in ways:

            def call(case=case, table=table, way=way):
                return case.finish(lv.voxel_attention(table=table, way=way, **case.inputs)[0])

            row[way] = milliseconds(call, device, rounds)
        rows.append(row)
    return {"title": "attention to voxel tokens, forward and backward, ms", "rows": rows}


def decisions(device, quick, rounds):
    """A's newest decision of an episode, with the cache of keys and values."""
    size = (
        {"dim": 32, "n_layers": 2, "n_heads": 2, "patch_grid": 7, "key_width": 8, "grid": 28}
        if quick
        else {}
    )
    frames = 3 if quick else 8
    policy, windows = window_of(AutoregressiveConfig(context=frames, **size), frames, 1, False)
    # the history is filled once, then the same newest decision is timed again and again
    call = decide_all(policy.to(device), to_device(windows, device), True)
    return {"title": "A, a decision without its features", "ms": milliseconds(call, device, rounds)}


def features(device, quick, rounds):
    """Images a second of the shipped backbone by batch, and an image's latency."""
    backbone = Backbone("efficientnet_lite0", 64 if quick else 448).to(device)
    rows = []
    for batch in (1, 4) if quick else (1, 64, GPU_BATCH, 256):
        images = torch.randint(0, 255, (batch, backbone.size, backbone.size, 3), dtype=torch.uint8)
        # pictures come from host memory, and features go back to the cache there
        there_and_back = lambda images=images: [m.cpu() for m in backbone(images)]
        ms = milliseconds(there_and_back, device, rounds)
        rows.append({"batch": batch, "ms": ms, "images_per_s": round(1000 * batch / ms, 1)})
    return {"title": "features of efficientnet_lite0, to and from the GPU", "rows": rows}


def build_parser():
    parser = flags.Parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=flags.count, default=20)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--out", type=flags.new_file(".json"), help="(results/gpu/<card>.json)")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    device = choose_device(args.device)
    card = "cpu" if device == "cpu" else torch.cuda.get_device_name(device)
    out = args.out or Path("results/gpu") / f"{card.replace(' ', '_')}.json"
    may_replace(out, "card", "tables")
    found = {"card": card, "command": command_line(), "commit": git_commit()}
    found |= {"versions": versions(), "tables": []}
    # written after each: a lent machine may be taken back
    for bench in (training_step, voxel_attention, decisions, features):
        found["tables"].append(bench(device, args.quick, args.rounds))
        print(found["tables"][-1], flush=True)
        write_json(out, found)
    print(out)


if __name__ == "__main__":
    run_script(main)
