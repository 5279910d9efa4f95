"""Attention to voxel tokens that are never built, compared with a twin that builds them all."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, agentview, look_at

import camera
from camera import intrinsics
from nets import layers_voxel as lv

SIDE, HEIGHTS, D, HEADS, C = 5, 4, 12, 3, 7
WAVES = lv.wavelengths(5)
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def cameras(n, same):
    """K (n,3,3) and E (n,4,4) of one camera or of n different ones."""
    if same:
        return tuple(torch.from_numpy(x).repeat(n, 1, 1) for x in agentview(64))
    # one of them twice
    eyes = [(0.75 + 0.1 * i, 0.2 * i, 1.65 - 0.05 * i) for i in (0, 1, 0, 2)[:n]]
    return (
        torch.from_numpy(intrinsics(45, 64)).repeat(n, 1, 1),
        torch.stack([torch.from_numpy(look_at(eye, [0.0, 0.0, 1.0])) for eye in eyes]),
    )


def geometry(K, E, dtype=torch.float64, heights=HEIGHTS, side=SIDE):
    """(VoxelTable from the rays, xyz (B,Z,N,3) with every voxel unprojected by itself)."""
    centre = camera.cell_to_pixel(torch.arange(side, dtype=torch.float64), side, 64)
    v, u = (x.flatten() for x in torch.meshgrid(centre, centre, indexing="ij"))
    z = camera.bin_to_height(torch.arange(heights, dtype=torch.float64), 0.9, 1.3, heights)
    xyz = camera.unproject(u, v, z[:, None], K[:, None, None], E[:, None, None])
    _, which = torch.unique(torch.cat([K.flatten(1), E.flatten(1)], 1), dim=0, return_inverse=True)
    first = [which.tolist().index(g) for g in range(int(which.max()) + 1)]
    at = lambda h: camera.unproject(u, v, h, K[first, None], E[first, None])[..., :2]
    slope = at(torch.tensor(1.0)) - at(torch.tensor(0.0))
    return lv.VoxelTable(at(torch.tensor(0.0)), slope, z, WAVES, dtype).select(which), xyz


def weights(dtype=torch.float64, seed=0, batch=3, queries=2, projected=True, pixels=SIDE**2):
    """Inputs of voxel_attention, scaled so that the softmax is neither flat nor one-hot, all with
    gradients."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape, scale=1.0: (
        (scale * torch.randn(*shape, generator=generator, dtype=torch.float64))
        .to(dtype)
        .requires_grad_()
    )
    P = 6 * len(WAVES)
    found = {
        "query": make(batch, queries, HEADS, D // HEADS, scale=2),
        "image": make(batch, C if projected else D, pixels),
        "positional": make(D, P),
        "key": make(HEADS, D // HEADS, D, scale=0.3),
        "value": make(HEADS, D // HEADS, D),
    }
    return {**found, "projection": make(D, C)} if projected else found


def naive_attention(query, xyz, image, positional, key, value, projection=None, anchor=None):
    """The twin: each query's V tokens are built, then projected to keys and values.

    It has the outputs of voxel_attention.
    """
    B, Q, h, width = query.shape
    xyz = xyz[:, None].expand(-1, Q, -1, -1, -1)  # (B,Q,Z,N,3)
    if anchor is not None:
        xyz = xyz - anchor[:, :, None, None]
    position = lv.encode_position(xyz, WAVES).to(positional.dtype) @ positional.T
    # (B,Q,Z,N,d)
    token = position + (image.mT if projection is None else image.mT @ projection.T)[:, None, None]
    k, v = (torch.einsum("bqzne,hde->bqhznd", token, w) for w in (key, value))
    score = torch.einsum("bqhd,bqhznd->bqhzn", query, k) / math.sqrt(width)
    p = score.flatten(3).softmax(-1).view_as(score)
    return torch.einsum("bqhzn,bqhznd->bqhd", p, v), score.flatten(3).logsumexp(-1), p.sum(3)


def gradients(outputs, inputs, seed=1):
    """Gradients of a loss that weighs every output differently, lse and pixels among them."""
    generator = torch.Generator().manual_seed(seed)
    loss = sum(
        (o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)).sum()
        + o.square().sum()
        for o in outputs
    )
    return loss.detach(), torch.autograd.grad(loss, list(inputs.values()))


def compare(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("same", [True, False], ids=["one camera", "three cameras"])
@pytest.mark.parametrize("projected", [True, False], ids=["projected image", "image as it is"])
@pytest.mark.parametrize("anchored", [True, False], ids=["an anchor per query", "no anchor"])
def test_absorbed_attention_is_exact(same, projected, anchored):
    """Outputs, log-sum-exp, pixel map, loss and all gradients equal the twin's to 1e-10.

    Absorbing the projections is no approximation.
    """
    table, xyz = geometry(*cameras(3, same))
    inputs = weights(projected=projected)
    anchor = (
        torch.rand(3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        if anchored
        else None
    )
    found = lv.voxel_attention(table=table, anchor=anchor, chunk=37, **inputs)
    expected = naive_attention(xyz=xyz, anchor=anchor, **inputs)
    compare(found, expected, EXACT)
    (loss, grads), (expected_loss, expected_grads) = (
        gradients(found, inputs),
        gradients(expected, inputs),
    )
    compare([loss, *grads], [expected_loss, *expected_grads], EXACT)


def test_gradients_are_the_slopes_of_the_outputs():
    """The hand-written backward pass agrees with finite differences: the twin could share an
    error.
    """
    table, _ = geometry(*cameras(2, False))
    inputs = weights(batch=2, queries=1)
    assert torch.autograd.gradcheck(
        lambda *x: lv.voxel_attention(**dict(zip(inputs, x)), table=table),
        list(inputs.values()),
        fast_mode=True,
    )


@pytest.mark.parametrize("chunk", [1, 13, 60, 10**6])
def test_the_chunk_size_changes_no_answer(chunk):
    """The number of scores at a time changes no answer: the online softmax loses nothing
    between chunks.
    """
    table, _ = geometry(*cameras(3, False))
    inputs = weights()
    one, other = (lv.voxel_attention(table=table, chunk=c, **inputs) for c in (None, chunk))
    compare(one, other, EXACT)
    compare(gradients(one, inputs)[1], gradients(other, inputs)[1], EXACT)


@pytest.mark.parametrize("chunk", [None, 13])
def test_probabilities_computed_again_are_those_that_were_kept(chunk, monkeypatch):
    """A layer without memory for its probabilities computes them again in the backward pass,
    and its gradients are the same.
    """
    table, _ = geometry(*cameras(3, False))
    inputs = weights()
    kept = lv.voxel_attention(table=table, chunk=chunk, **inputs)
    monkeypatch.setattr(lv, "KEPT_BYTES", 0)
    again = lv.voxel_attention(table=table, chunk=chunk, **inputs)
    compare(gradients(kept, inputs)[1], gradients(again, inputs)[1], EXACT)


@pytest.mark.parametrize("anchored", [True, False], ids=["an anchor per query", "no anchor"])
def test_whole_volumes_equal_the_chunks(anchored):
    """All scores at once, as on a GPU, give the outputs and gradients of chunk by chunk, as on
    a CPU.
    """
    table, _ = geometry(*cameras(3, False))
    inputs = weights()
    anchor = (
        torch.rand(3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        if anchored
        else None
    )
    one, other = (
        lv.voxel_attention(table=table, anchor=anchor, way=way, **inputs)
        for way in ("chunks", "whole")
    )
    compare(one, other, EXACT)
    compare(gradients(one, inputs)[1], gradients(other, inputs)[1], EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [60, 1000])
def test_rising_scores_renew_the_shift(scale, dtype):
    """Later pixels may score hundreds more than the first ones: nothing overflows, and nothing
    earlier is lost.
    """
    table, xyz = geometry(*cameras(3, True), dtype=dtype)
    inputs = weights(dtype)
    ramp = torch.linspace(0, scale, SIDE**2, dtype=dtype)
    inputs["image"] = (inputs["image"] * ramp / 30).detach().requires_grad_()
    # scores in the thousands have 7 digits
    tolerance = EXACT if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-2}
    found, expected = (
        lv.voxel_attention(table=table, chunk=20, **inputs),
        naive_attention(xyz=xyz, **inputs),
    )
    compare(found, expected, tolerance)
    assert all(g.isfinite().all() for g in gradients(found, inputs)[1])


def test_factorised_attention_holds_in_float32():
    """In fp32 outputs agree with the float64 twin to 1e-4, and gradients to 1e-3 of their
    largest entry.
    """
    table, xyz = geometry(*cameras(3, False), dtype=torch.float32)
    inputs, exact = weights(torch.float32), weights()
    found, expected = lv.voxel_attention(table=table, **inputs), naive_attention(xyz=xyz, **exact)
    compare([o.double() for o in found], expected, {"rtol": 1e-4, "atol": 1e-4})
    for a, b in zip(gradients(found, inputs)[1], gradients(expected, exact)[1]):
        assert (a.double() - b).abs().max() < 1e-3 * b.abs().max()


def test_factorised_attention_holds_under_bf16_autocast():
    """Under bf16 autocast outputs stay within 3% of the largest entry, gradients within 10%.

    Positions are still encoded in fp32: two voxels 1 mm apart keep different scores, which bf16
    encodings would not.
    """
    table, xyz = geometry(*cameras(3, False), dtype=torch.float32)
    inputs, exact = weights(torch.float32), weights()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lv.voxel_attention(table=table, **inputs)
    expected = naive_attention(xyz=xyz, **exact)
    for a, b in zip(found, expected):
        assert (a.double() - b).abs().max() < 0.03 * b.abs().max()
    for a, b in zip(gradients(found, inputs)[1], gradients(expected, exact)[1]):
        assert (a.double() - b).abs().max() < 0.1 * b.abs().max()
    near = torch.tensor([[0.300, 0.1, 1.0], [0.301, 0.1, 1.0]], dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        code = lv.shift_encoding(
            lv.encode_position(near, WAVES).float(), torch.tensor([0.05, 0, 0]), WAVES
        )
    expected = lv.encode_position(near - torch.tensor([0.05, 0, 0]), WAVES)
    assert (code.double() - expected).abs().max() < 1e-6 < 0.1 * (code[1] - code[0]).abs().max()


def test_relative_positions_are_a_rotation():
    """R(a) PE(x) = PE(x - a), and R(-a) is its transpose.

    One anchor for all queries is the same as moving the camera by it.
    """
    x, a = torch.rand(2, 6, 3, dtype=torch.float64)
    code = lv.encode_position(x, WAVES)
    compare([lv.shift_encoding(code, a, WAVES)], [lv.encode_position(x - a, WAVES)], EXACT)
    q = torch.randn_like(code)
    compare(
        [(q * lv.shift_encoding(code, a, WAVES)).sum(-1)],
        [(lv.shift_encoding(q, -a, WAVES) * code).sum(-1)],
        EXACT,
    )
    K, E = cameras(3, False)
    moved, anchor = E.clone(), torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64)
    moved[:, :2, 3] -= anchor[:2]
    inputs = weights()
    by_anchor = lv.voxel_attention(
        table=geometry(K, E)[0], anchor=(anchor * torch.tensor([1, 1, 0])).expand(3, 2, 3), **inputs
    )
    compare(by_anchor, lv.voxel_attention(table=geometry(K, moved)[0], **inputs), EXACT)


def test_rays_are_affine_in_height():
    """Two heights on a pixel's ray give its x and y at all others, also for a tilted camera.

    The table relies on this.
    """
    table, xyz = geometry(*cameras(1, True))
    expected = lv.encode_position(xyz[0, ..., :2], WAVES)  # (Z,N,4F)
    compare([table.xy[0].transpose(1, 2)], [expected], EXACT)
    compare([table.z], [lv.encode_position(xyz[0, :, 0, 2:], WAVES)], EXACT)


def test_cameras_share_tables_by_value():
    """Frames of one camera share one table. With several cameras each frame gets its own."""
    assert len(geometry(*cameras(4, True))[0].xy) == 1
    table, _ = geometry(*cameras(4, False))
    assert len(table.xy) == 3
    assert sorted(i for item in table.items for i in item.tolist()) == [0, 1, 2, 3]


def test_a_ray_level_with_the_camera_is_finite():
    """A pixel on the horizon reaches no height. It must not turn a whole frame into NaN."""
    K, E = cameras(1, True)
    # SIDE is odd: the middle row is level
    E[0] = torch.from_numpy(look_at([0.75, 0.0, 1.0], [0.0, 0.0, 1.0]))
    table, _ = geometry(K, E)
    assert table.xy.isfinite().all()
    assert all(o.isfinite().all() for o in lv.voxel_attention(table=table, **weights(batch=1)))


def test_merged_attention_is_one_joint_softmax():
    """Voxels and a few dense tokens read together equal one softmax over both, with gradients
    through both log-sum-exps. A query without dense tokens reads its voxels alone, without NaN.
    """
    table, xyz = geometry(*cameras(3, False))
    inputs = weights()
    generator = torch.Generator().manual_seed(3)
    k, v = (
        torch.randn(
            3, 4, HEADS, D // HEADS, generator=generator, dtype=torch.float64
        ).requires_grad_()
        for _ in range(2)
    )
    allowed = torch.tensor([[True, False, True, True], [True, True, False, False]]).expand(3, 2, 4)
    all_inputs = {**inputs, "dense key": k, "dense value": v}
    out, lse, _ = lv.voxel_attention(table=table, **inputs)
    found = lv.merge_attention(out, lse, *lv.dense_attention(inputs["query"], k, v, allowed))

    token = (
        lv.encode_position(xyz, WAVES) @ inputs["positional"].T
        + (inputs["image"].mT @ inputs["projection"].T)[:, None]
    )
    voxel_k, voxel_v = (
        torch.einsum("bzne,hde->bznhd", token, inputs[n]).flatten(1, 2) for n in ("key", "value")
    )
    reach = torch.cat([torch.ones(3, 2, voxel_k.shape[1], dtype=torch.bool), allowed], 2)
    q, all_k, all_v = (
        x.transpose(1, 2)
        for x in (inputs["query"], torch.cat([voxel_k, k], 1), torch.cat([voxel_v, v], 1))
    )
    joint = F.scaled_dot_product_attention(q, all_k, all_v, reach[:, None]).transpose(1, 2)
    score = (
        (q @ all_k.mT / math.sqrt(D // HEADS))
        .masked_fill(~reach[:, None], -torch.inf)
        .logsumexp(-1)
        .transpose(1, 2)
    )
    compare(found, [joint, score], EXACT)
    compare(gradients(found, all_inputs)[1], gradients([joint, score], all_inputs)[1], EXACT)

    out, lse, _ = lv.voxel_attention(table=table, **inputs)
    nothing = lv.merge_attention(
        out, lse, *lv.dense_attention(inputs["query"], k, v, torch.zeros_like(allowed))
    )
    compare(nothing, [out, lse], EXACT)
    assert all(
        g.isfinite().all()
        for g in torch.autograd.grad(nothing[0].sum() + nothing[1].sum(), list(inputs.values()))
    )


@pytest.mark.parametrize("same", [True, False], ids=["one camera", "three cameras"])
@pytest.mark.parametrize("anchored", [True, False], ids=["an anchor per query", "no anchor"])
def test_logits_equal_the_product_with_every_token(same, anchored):
    """The factorised readout equals query .

    token with all tokens written out, plus each height's own view of the image.
    """
    table, xyz = geometry(*cameras(3, same))
    generator = torch.Generator().manual_seed(2)
    make = lambda *shape: torch.randn(
        *shape, generator=generator, dtype=torch.float64
    ).requires_grad_()
    inputs = {
        "query": make(3, 2, D),
        "image": make(3, C, SIDE**2),
        "positional": make(D, 6 * len(WAVES)),
        "height_query": make(3, 2, HEIGHTS, C),
    }
    anchor = (
        torch.rand(3, 2, 3, dtype=torch.float64, generator=generator)
        if anchored
        else torch.zeros(3, 2, 3, dtype=torch.float64)
    )
    found = lv.voxel_logits(table=table, anchor=anchor if anchored else None, **inputs)
    token = (
        lv.encode_position(xyz[:, None] - anchor[:, :, None, None], WAVES) @ inputs["positional"].T
    )
    expected = torch.einsum("bqd,bqznd->bqzn", inputs["query"], token) + torch.einsum(
        "bqzc,bcn->bqzn", inputs["height_query"], inputs["image"]
    )
    compare([found], [expected], EXACT)
    compare(gradients([found], inputs)[1], gradients([expected], inputs)[1], EXACT)


def test_heights_at_a_pixel_change_with_its_image():
    """p(height | pixel) changes with the image at that pixel.

    The additive score alone could not do that.
    """
    table, _ = geometry(*cameras(1, True))
    generator = torch.Generator().manual_seed(2)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    query, positional, heights = make(1, 1, D), make(D, 6 * len(WAVES)), make(1, 1, HEIGHTS, C)
    given = lambda image, heights: lv.voxel_logits(
        query, table, image, positional, heights
    ).softmax(2)[0, 0, :, 3]
    one, other = make(1, C, SIDE**2), make(1, C, SIDE**2)
    assert (given(one, heights) - given(other, heights)).abs().max() > 0.05
    flat = heights[:, :, :1].expand_as(heights)
    assert (given(one, flat) - given(other, flat)).abs().max() < 1e-12


def kept_numbers(out):
    """How many numbers the layer's own function has left for its backward pass, see `lv.Kept`."""
    nodes, seen = [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "kept"):
            held = [one for camera in node.kept for one in camera]
            return sum(x.numel() for one in held for x in (*one.shares, *one.heights))
        nodes += [before for before, _ in node.next_functions]
    raise AssertionError("the layer's function is not in the graph")


@pytest.mark.parametrize("room", [0, 64e6])
def test_nothing_of_a_token_volume_is_stored(room, monkeypatch):
    """Memory between forward and backward is a fraction of the tokens': no more than its inputs,
    and probabilities, one a voxel and query, where they have room.

    This is why the file exists.
    """
    monkeypatch.setattr(lv, "KEPT_BYTES", room)
    K, E = cameras(1, True)
    table, _ = geometry(K, E, torch.float32, heights=16, side=40)
    inputs = weights(torch.float32, batch=1, queries=1, pixels=1600)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        out = lv.voxel_attention(table=table, **inputs)
    out = out if torch.is_tensor(out) else out[0]
    probabilities = 16 * 1600 * HEADS
    assert kept_numbers(out) <= 1.1 * probabilities
    assert bool(kept_numbers(out)) == bool(room)
    assert max(kept) <= 1600 * C and sum(kept) < 16 * 1600 * D / 4


FUSED = """
import torch
from nets import layers_voxel as lv, layers_voxel_triton as fused
device = "cpu"
torch.manual_seed(0)
for M, N, Z, F in ((21, 77, 3, 8), (5, 32, 2, 5)):
    heights = torch.linspace(0.9, 1.3, Z)
    table = lv.VoxelTable(torch.rand(1, N, 2), torch.rand(1, N, 2), heights, lv.wavelengths(F))
    shapes = ((6 * F,), (N,), (6 * F,), (N,), ())
    code, scores, d_pooled, d_pixels, shift = (torch.randn(M, *s) for s in shapes)
    scores[:, 50:] += 90  # a block that drowns the others
    move = lambda *xs: [x.to(device) for x in xs]
    plain = lv.forward_rows(code, scores, table.xy[0], table.z, None)
    found = fused.forward_rows(*move(code, scores, table.xy[0], table.z))
    arguments = (code, scores, plain[2], d_pooled, d_pixels, shift, table.xy[0], table.z)
    plain += lv.backward_rows(*arguments, None)
    found += fused.backward_rows(*move(*arguments))
    for a, b in zip(found, plain):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)
print("agree")
"""


def test_fused_kernels_equal_the_chunks():
    """The Triton kernels agree with the chunked torch code, for rows, pixels and encodings that
    fill no block. Triton's interpreter runs them, so their arithmetic is tested without a GPU.
    """
    pytest.importorskip("triton")
    interpreted = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FUSED], cwd=ROOT, env=interpreted, capture_output=True, text=True
    )
    assert done.stdout.strip() == "agree", done.stderr
