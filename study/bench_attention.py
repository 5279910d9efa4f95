"""What attention costs, for study/bench.py: A's block-causal one over frames, and B's and C's to
voxel tokens that are never built.
"""

import tempfile
import time
from collections import defaultdict
from types import SimpleNamespace

import numpy as np

from study.timing import alternate, in_fresh_process, peak_mb

# (batch, side of the grid, height bins, token width d, queries Q); side^2 * bins voxels
VOXEL_CASES = [
    (batch, side, bins, d, Q)
    for side, bins in ((28, 16), (56, 32))
    for d in (128, 384)
    for batch in (1, 4)
    for Q in (1, 8, 21)
]
VOXEL_QUICK = [(1, 28, 16, 128, 8)]
VOXEL_HEADS = 4


class VoxelCase:
    """One size of attention to voxel tokens, forward and backward, on random features; each batch
    item has its own camera.
    """

    def __init__(self, batch, side, bins, d, Q, device):
        import torch

        import camera
        from nets import layers_voxel as lv

        self.device, self.waves, self.name = (
            device,
            lv.wavelengths(),
            f"batch {batch}, V {side * side * bins}, d {d}, Q {Q}",
        )
        torch.manual_seed(0)
        # inputs that are parameters or activations: each gets a gradient
        make = lambda *shape, scale=1.0: (scale * torch.randn(*shape)).to(device).requires_grad_()
        h, D, P = VOXEL_HEADS, d // VOXEL_HEADS, 6 * len(self.waves)
        self.inputs = {
            # h heads of width D, P numbers of a position's encoding; (B,Q,h,D), (B,d,N), (d,P),
            # then the projections (h,D,d)
            "query": make(batch, Q, h, D),
            "image": make(batch, d, side * side),
            "positional": make(d, P, scale=P**-0.5),
            "key": make(h, D, d, scale=d**-0.5),
            "value": make(h, D, d, scale=d**-0.5),
        }
        # the loss is a weighted sum of the outputs, so every output has a gradient of its own
        self.weight = torch.randn(batch, Q, h, D).to(device)
        # cameras 2 m up that look straight down; from item to item they move 0.1 m on every axis
        E = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)).repeat(
            batch, 1, 1
        )
        E[:, :3, 3] = (
            torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64) + 0.1 * torch.arange(batch)[:, None]
        )
        K = torch.from_numpy(camera.intrinsics(45, 448)).expand(batch, 3, 3)
        pixel = camera.cell_to_pixel(torch.arange(side, dtype=torch.float64), side, 448)
        v, u = (x.flatten() for x in torch.meshgrid(pixel, pixel, indexing="ij"))
        self.heights = torch.linspace(0.9, 1.3, bins, dtype=torch.float64).to(device)
        # a ray is a line in height: its xyz at height 0, and how far it moves a metre up, (B,N,3)
        at = lambda height: camera.unproject(u, v, height, K[:, None], E[:, None]).to(device)
        self.origin, far = at(torch.zeros(1)), at(torch.ones(1))
        self.slope = far - self.origin
        self.table = None

    def make_table(self):
        from nets import layers_voxel as lv

        return lv.VoxelTable(self.origin[..., :2], self.slope[..., :2], self.heights, self.waves)

    def finish(self, out):
        import torch

        grads = torch.autograd.grad((out * self.weight).sum(), list(self.inputs.values()))
        if self.device != "cpu":
            torch.cuda.synchronize()
        return out.detach(), *grads

    def built(self, autocast=False):
        """All tokens built and projected, then scaled_dot_product_attention (FlashAttention where
        there is one).
        """
        import torch
        import torch.nn.functional as F

        from nets import layers_voxel as lv

        q, image, positional, key, value = self.inputs.values()
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=autocast):
            # (B,Z,N,3)
            xyz = self.origin[:, None] + self.slope[:, None] * self.heights[:, None, None]
            # (B,Z,N,d)
            token = lv.encode_position(xyz, self.waves).float() @ positional.T + image.mT[:, None]
            k, v = (
                (token.flatten(1, 2) @ w.flatten(0, 1).T).unflatten(-1, w.shape[:2]).transpose(1, 2)
                for w in (key, value)
            )
            out = F.scaled_dot_product_attention(q.transpose(1, 2).to(k.dtype), k, v).transpose(
                1, 2
            )
        return self.finish(out.float())

    def built_bf16(self):
        return self.built(autocast=True)

    def absorbed(self):
        """The same without tokens, its table made anew for a camera never seen before."""
        from nets import layers_voxel as lv

        return self.finish(lv.voxel_attention(table=self.make_table(), **self.inputs)[0])

    def absorbed_again(self):
        """The same with the table kept from an earlier step: a camera that stands still, or the
        next layer.
        """
        from nets import layers_voxel as lv

        self.table = self.table or self.make_table()
        return self.finish(lv.voxel_attention(table=self.table, **self.inputs)[0])

    def peak_mb(self, way):
        """Memory beyond the inputs at its peak, MB: on a GPU what is allocated, else the process's
        resident pages.
        """
        import torch

        if self.device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            getattr(self, way)()
            return (torch.cuda.max_memory_allocated() - before) / 1e6
        # libraries load their code at the first call
        VoxelCase(1, 8, 2, 16, 1, "cpu").__getattribute__(way)()
        return peak_mb(getattr(self, way))


def voxel_peak_mb(case, way, device):
    """`VoxelCase.peak_mb`, on a CPU in a process of its own."""
    return (
        VoxelCase(*case, device).peak_mb(way)
        if device != "cpu"
        else in_fresh_process(_voxel_peak, case, way)
    )


def _voxel_peak(case, way):
    return VoxelCase(*case, "cpu").peak_mb(way)


class RandomBackbone:
    """Features of the shipped backbone's shapes without its cost: what a training step reads from
    the cache.
    """

    name, identity, channels = "random", "random", [40, 112]

    def __init__(self):
        import torch

        self.device = torch.device("cpu")

    def __call__(self, images):
        import torch

        return [
            torch.randn(len(images), 40, 56, 56).half(),
            torch.randn(len(images), 112, 28, 28).half(),
        ]


def random_windows(config, folder, n_demos=2, steps=60):
    """A WindowDataset over random paths under one camera, random features cached in `folder`."""
    import camera
    from data_ar import WindowDataset
    from formats.demos import Demo

    def images(demo, frames):
        """Of which only the bytes count: they are the key of the cache."""
        number = lambda f: np.full((1, 1, 3), 100 * int(demo.name) + f, np.uint16)
        return np.stack([number(f).view(np.uint8) for f in frames])

    # as much of a dataset's source as WindowDataset asks for
    source = SimpleNamespace(
        path="random", fingerprint="random", images=images, files=lambda demo: None
    )
    # 2 m up, looking straight down; OpenCV axes, so y and z are turned over
    E = np.diag([1.0, -1.0, -1.0, 1.0])
    E[:3, 3] = 0, 0, 2.0
    demos = []
    for d in range(n_demos):
        rng = np.random.default_rng(d)
        path = np.array([0, 0, 1.1]) + np.linspace(
            [0, 0, 0], rng.uniform([-0.3, -0.3, -0.1], [0.3, 0.3, 0.1]), steps
        )
        actions = np.zeros((steps, 7))
        # the gripper closes at the last step: one stretch a demonstration
        actions[:, 6] = np.where(np.arange(steps) < steps - 1, -1.0, 1.0)
        # rotation vector of pi about x: the gripper points down; fingers 8 cm apart, open
        down, fingers = np.tile([np.pi, 0, 0], (steps, 1)), np.tile([0.04, -0.04], (steps, 1))
        demos.append(
            Demo(
                str(d),
                actions,
                path,
                down,
                fingers,
                np.zeros((steps, 0)),
                np.zeros(steps, bool),
                camera.intrinsics(45, config.image_size),
                E,
                config.image_size,
                {},
                source,
            )
        )
    return WindowDataset(demos, config, RandomBackbone(), cache=folder, progress=False)


def training_steps(policy, dataset, batch, precision, n):
    """Seconds of n training steps and of their parts, {"step", "read", ...: (n,)}, after one that
    warms up.
    """
    import torch

    from runtime import autocast

    optimizer, spent = torch.optim.AdamW(policy.param_groups(0.01), lr=1e-3), defaultdict(list)
    # shorter ones would flatter
    whole = [i for i, window in enumerate(dataset.windows) if len(window) == dataset.config.context]
    # one step: read, forward, backward, update; the clock is read between them
    for step in range(n + 1):
        clock = [time.perf_counter()]
        # a stride of 7 through the windows, so that steps take other windows
        data = dataset.batch([whole[7 * (step * batch + i) % len(whole)] for i in range(batch)])
        clock.append(time.perf_counter())
        with autocast("cpu", precision):
            loss = policy(data)["loss"]
        clock.append(time.perf_counter())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clock.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        clock.append(time.perf_counter())
        # step 0 warms up
        if step:
            for part, seconds in zip(("read", "forward", "backward", "optimizer"), np.diff(clock)):
                spent[part].append(seconds)
            spent["step"].append(clock[-1] - clock[0])
    return spent


def bench_voxel_train(args):
    """Whole training steps of B's and C's preset `small` on the full volume, features read from the
    cache, and their parts.
    """
    import torch

    from registry import look_up

    rows, threads = [], torch.get_num_threads()
    # --precision auto takes the last
    kinds = ["fp32"] + ["bf16"] * torch.cpu._is_avx512_bf16_supported()
    print(f"\ntraining steps, preset small, {threads} threads; median ms")
    for name in ("voxel_ar", "voxel_ar_rel"):
        entry = look_up(name)
        preset, fields = entry.config.presets["small"], entry.config.__dataclass_fields__
        # a smaller volume for a quick look
        size = {"grid": 28, "n_height_bins": 16} if args.quick else {}
        config = entry.config(**{k: v for k, v in preset.items() if k in fields}, **size)
        batch, trained = preset["batch_size"], config.trained_frames or config.context
        volume = f"{config.grid}x{config.grid}x{config.n_height_bins} voxels"
        with tempfile.TemporaryDirectory() as folder:
            dataset = random_windows(config, folder)
            for kind in kinds:
                torch.manual_seed(0)
                spent = training_steps(
                    entry.policy(config, RandomBackbone.channels).train(),
                    dataset,
                    batch,
                    kind,
                    args.rounds,
                )
                rate = float(1 / np.mean(spent["step"]))
                median = {
                    part: round(1000 * float(np.median(seconds)), 1)
                    for part, seconds in spent.items()
                }
                windows = f"{trained} frames of each of {batch} windows of {config.context}"
                parts = ", ".join(f"{part} {ms:.0f}" for part, ms in median.items())
                print(
                    f"  {name}, {volume}, {windows}, {kind}: {rate:.2f} steps/s; {parts}",
                    flush=True,
                )
                rows.append(
                    {
                        "model_type": name,
                        "voxels": volume,
                        "batch": batch,
                        "context": config.context,
                        "trained_frames": trained,
                        "precision": kind,
                        "threads": threads,
                        "steps_per_s": round(rate, 3),
                        "ms": median,
                    }
                )
            del dataset
    return {"title": "training steps of voxel-token policies", "rows": rows}


def bench_voxel(args):
    """Tokens built against absorbed, forward and backward; with --train whole training steps."""
    if args.train:
        return bench_voxel_train(args)
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ways = ["built", "absorbed", "absorbed_again"] + ["built_bf16"] * (device != "cpu")
    rows = []
    print(
        f"\nattention to V voxel tokens, {VOXEL_HEADS} heads, forward and backward, {device}, "
        f"{torch.get_num_threads()} threads; difference: of outputs and gradients, relative to "
        "the largest entry of each"
    )
    print(
        f"  {'':<34}"
        + "".join(f"{w + ' ms':>18}" for w in ways)
        + f"{'times faster':>18}{'MB':>16}{'times less':>12}{'difference':>12}"
    )
    for sizes in VOXEL_QUICK if args.quick else VOXEL_CASES:
        case = VoxelCase(*sizes, device)
        # first that both compute the same, outputs and gradients; then time and memory
        found, expected = case.absorbed(), case.built()
        difference = max(
            ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected)
        )
        del found, expected
        seconds = alternate({w: getattr(case, w) for w in ways}, args.rounds)
        memory = {w: voxel_peak_mb(sizes, w, device) for w in ways}
        # on a GPU the rival is the fastest way to build tokens: bf16 with FlashAttention
        slow = seconds[ways[-1] if device != "cpu" else "built"]
        faster = [slow / seconds[w] for w in ("absorbed", "absorbed_again")]
        less = memory["built"] / memory["absorbed"]
        print(
            f"  {case.name:<34}"
            + "".join(f"{1000 * seconds[w]:>18.1f}" for w in ways)
            + f"{faster[0]:>9.1f}{faster[1]:>9.1f}"
            f"{memory['built']:>9.1f}{memory['absorbed']:>7.1f}{less:>12.1f}{difference:>12.1e}",
            flush=True,
        )
        rows.append(
            {
                "batch": sizes[0],
                "voxels": sizes[1] ** 2 * sizes[2],
                "d": sizes[3],
                "queries": sizes[4],
                "ms": {w: round(1000 * seconds[w], 2) for w in ways},
                "peak_mb": {w: round(m, 1) for w, m in memory.items()},
                "times_faster": [round(f, 2) for f in faster],
                "times_less_memory": round(less, 1),
                "difference": difference,
            }
        )
    return {"title": "attention to voxel tokens", "device": device, "rows": rows}


def attention_ways(frames, side, dim, heads):
    """{way: callable}, forward and backward of one layer's attention over a window, and the
    difference of their results.
    """
    import torch
    import torch.nn.functional as F

    from nets.layers import dense_mask, frame_attention

    torch.manual_seed(0)
    # tokens of a frame: its patches, the EEF's and the query
    N = side * side + 2
    # (1,T,N,h,D)
    q, k, v = (torch.randn(1, frames, N, heads, dim // heads, requires_grad=True) for _ in "qkv")
    weight, mask = (
        torch.randn(1, frames, N, heads, dim // heads),
        dense_mask(frames, N, frames, N, frames),
    )
    # (1,T,N,h,D) -> (1,h,TN,D): frames side by side, as plain attention takes them
    flat = lambda x: x.flatten(1, 2).transpose(1, 2)
    finish = lambda out: (out.detach(), *torch.autograd.grad((out * weight).sum(), (q, k, v)))
    ways = {
        "dense mask": lambda: finish(
            F.scaled_dot_product_attention(flat(q), flat(k), flat(v), attn_mask=mask)
            .transpose(1, 2)
            .unflatten(1, (frames, N))
        ),
        "block-causal": lambda: finish(frame_attention(q, k, v, frames)),
    }
    difference = max(
        (a - b).abs().max().item() for a, b in zip(ways["dense mask"](), ways["block-causal"]())
    )
    return ways, difference


def _attention_peak(case, way):
    return peak_mb(attention_ways(*case)[0][way])


def window_of(config, frames, batch, train):
    """(policy, batch of windows on random features) for step and decision times."""
    import torch

    from model_autoregressive import AutoregressivePolicy

    torch.manual_seed(0)
    policy = AutoregressivePolicy(config, [40, 112]).train(train)
    # 45 degrees over 448 px, 2 m up, looking straight down
    K = torch.tensor([[540.8, 0, 224], [0, 540.8, 224], [0, 0, 1]], dtype=torch.float64).expand(
        batch, frames, 3, 3
    )
    E = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)).repeat(
        batch, frames, 1, 1
    )
    E[..., 2, 3] = 2.0
    # world xyz in m, within reach above a table
    place = lambda: (
        torch.rand(batch, frames, 3, dtype=torch.float64) * 0.3 + torch.tensor([0, 0, 0.9])
    )
    return policy, {
        "features": [
            torch.randn(batch, frames, 40, 56, 56).half(),
            torch.randn(batch, frames, 112, 28, 28).half(),
        ],
        "eef_pos": place(),
        "target_pos": place(),
        "gripper_width": torch.full((batch, frames), 0.08),
        "K": K,
        "E": E,
        "valid": torch.ones(batch, frames, dtype=torch.bool),
        "mask": torch.ones(batch, frames),
        "target_rot": torch.eye(3, dtype=torch.float64).expand(batch, frames, 3, 3),
        "target_gripper": torch.zeros(batch, frames, dtype=torch.long),
    }


def decide_all(policy, windows, cached):
    """The newest decision of an episode: callable that takes it with the cache, or by computing the
    whole window.
    """
    import torch

    frames = windows["eef_pos"].shape[1]
    at = lambda t: {
        k: [m[:, t] for m in v] if isinstance(v, list) else v[:, t]
        for k, v in windows.items()
        if k in ("features", "eef_pos", "gripper_width", "K", "E")
    }
    # all decisions but the newest, once: they fill the history that `once` starts from
    with torch.inference_mode():
        policy.eval().reset()
        for t in range(frames - 1):
            policy.decide(at(t))
    kept = policy.number, policy.past, policy.before, policy.last_waypoint

    def once():
        with torch.inference_mode():
            # back to before the decision, so that every call takes the same one
            policy.number, policy.past, policy.before, policy.last_waypoint = kept
            return policy.decide(at(frames - 1))["position"][0, -1]

    def window():
        with torch.inference_mode():
            return policy.predict(windows)["position"][0, -1]

    return once if cached else window


def attention_of_a_layer(name, config, rounds):
    """Dense mask against block-causal attention, forward and backward: ms and MB of each."""
    case = (config.context, config.patch_grid, config.dim, config.n_heads)
    ways, difference = attention_ways(*case)
    seconds = alternate(ways, rounds)
    memory = {way: in_fresh_process(_attention_peak, case, way) for way in ways}
    dense, block = ways
    patches = f"{config.patch_grid}x{config.patch_grid} patches, d {config.dim}"
    print(
        f"\n{name}, {config.context} frames of {patches}: attention of a layer, forward and "
        f"backward\n  dense mask {1000 * seconds[dense]:.0f} ms, {memory[dense]:.0f} MB; "
        f"block-causal {1000 * seconds[block]:.0f} ms, {memory[block]:.0f} MB: "
        f"x{seconds[dense] / seconds[block]:.2f} in time, "
        f"x{memory[dense] / max(memory[block], 1):.2f} in memory; "
        f"largest difference {difference:.1e}",
        flush=True,
    )
    return {
        "attention_ms": {k: round(1000 * v, 1) for k, v in seconds.items()},
        "attention_mb": {k: round(v, 1) for k, v in memory.items()},
        "difference": difference,
    }


def newest_decision(config, rounds):
    """The newest decision of an episode, its window computed anew or with the cache: ms of each."""
    policy, windows = window_of(config, config.context, 1, False)
    calls = {
        "window computed anew": decide_all(policy, windows, False),
        "with the cache": decide_all(policy, windows, True),
    }
    # the two ways have to agree before their times are worth comparing
    apart = (calls["window computed anew"]() - calls["with the cache"]()).abs().max().item()
    anew, cached = alternate(calls, rounds).values()
    print(
        f"  newest decision: window {1000 * anew:.0f} ms, cache {1000 * cached:.0f} ms: "
        f"x{anew / cached:.1f}; apart {apart:.1e} m",
        flush=True,
    )
    return {"window": round(1000 * anew, 1), "cache": round(1000 * cached, 1)}


def training_step(config, batch, warm_up):
    """Time and peak memory of one training step."""
    import torch

    policy, windows = window_of(config, config.context, batch, True)
    optimizer = torch.optim.AdamW(policy.parameters())

    def step():
        optimizer.zero_grad()
        policy(windows)["loss"].backward()
        optimizer.step()

    if warm_up:
        step()
    start = time.perf_counter()
    peak = peak_mb(step)
    took = time.perf_counter() - start
    print(
        f"  training step, batch {batch}: {1000 * took:.0f} ms, "
        f"{peak:.0f} MB beyond weights and data",
        flush=True,
    )
    return {"batch": batch, "ms": round(1000 * took, 1), "peak_mb": round(peak, 1)}


def bench_attention(args):
    """The autoregressive policy: its attention, its decisions, its training step."""
    import torch

    from model_autoregressive import AutoregressiveConfig

    small = dict(AutoregressiveConfig.presets["small"])
    sizes = {
        "small": {k: small[k] for k in ("dim", "n_layers", "n_heads", "mlp_ratio", "patch_grid")},
        "full": {},
    }
    if args.quick:
        # tiny: only shows that the code runs
        sizes, lengths = (
            {
                "tiny": {
                    "dim": 32,
                    "n_layers": 2,
                    "n_heads": 2,
                    "patch_grid": 7,
                    "key_width": 8,
                    "grid": 28,
                }
            },
            (3,),
        )
    else:
        lengths = (8, 20)
    rows = []
    for name, size in sizes.items():
        for frames in lengths:
            config = AutoregressiveConfig(context=frames, **size)
            # full size is slow on a CPU: one round, no warm-up step
            rounds = 1 if name == "full" else args.rounds
            row = {
                "size": name,
                "frames": frames,
                **attention_of_a_layer(name, config, rounds),
                "decision_ms": newest_decision(config, rounds),
                "step": [],
            }
            for batch in (2, 4) if name != "full" else (2,):
                row["step"].append(training_step(config, batch, warm_up=name != "full"))
            rows.append(row)
    return {"title": "autoregressive policy", "threads": torch.get_num_threads(), "rows": rows}
