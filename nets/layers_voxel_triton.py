"""`layers_voxel.forward_rows` and `backward_rows` as one fused Triton kernel each, for float32 on a
GPU.

A program owns a block of rows and a block of pixels and walks up their rays, so that scores live in
registers only. Results that run over all pixels come out a part per block and are put together by
torch: no atomics, the same numbers every time. Products are in full fp32 ("ieee"). Developed with
Triton's interpreter, which the tests run on any machine; timings on a GPU are for `study/bench.py
voxel` to say.
"""

import torch
import triton
import triton.language as tl

PIXELS = 32  # of a program; times 16-64 rows of scores, in registers


@triton.jit
def _forward(
    code,
    height_score,
    image_score,
    xy,
    z_code,
    pooled,
    pixels,
    top,
    total,
    M,
    N,
    Z,
    P: tl.constexpr,
    PZ: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    BZ: tl.constexpr,
):
    rows, block = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    n, p, q = block * BN + tl.arange(0, BN), tl.arange(0, BP), tl.arange(0, BZ)
    row_ok, n_ok, p_ok, q_ok = rows < M, n < N, p < P, q < PZ
    a = tl.load(
        code + rows[:, None] * (P + PZ) + p[None, :],
        mask=row_ok[:, None] & p_ok[None, :],
        other=0.0,
    )
    b = tl.load(
        image_score + rows[:, None] * N + n[None, :],
        mask=row_ok[:, None] & n_ok[None, :],
        other=0.0,
    )
    shift = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    u, uz, w = (
        tl.zeros([BM, BP], tl.float32),
        tl.zeros([BM, BZ], tl.float32),
        tl.zeros([BM, BN], tl.float32),
    )
    for k in range(Z):
        # (BP,BN)
        t = tl.load(
            xy + k * P * N + p[:, None] * N + n[None, :],
            mask=p_ok[:, None] & n_ok[None, :],
            other=0.0,
        )
        c = tl.load(z_code + k * PZ + q, mask=q_ok, other=0.0)
        h = tl.load(height_score + rows * Z + k, mask=row_ok, other=0.0)
        score = tl.dot(a, t, input_precision="ieee") + b + h[:, None]
        score = tl.where(n_ok[None, :], score, float("-inf"))
        new = tl.maximum(shift, tl.max(score, 1))
        shrink, e = tl.exp(shift - new), tl.exp(score - new[:, None])
        part = tl.sum(e, 1)
        mass = mass * shrink + part
        w = w * shrink[:, None] + e
        u = tl.dot(e, tl.trans(t), acc=u * shrink[:, None], input_precision="ieee")
        uz = uz * shrink[:, None] + part[:, None] * c[None, :]
        shift = new
    out = pooled + (block * M + rows[:, None]) * (P + PZ)
    tl.store(out + p[None, :], u, mask=row_ok[:, None] & p_ok[None, :])
    tl.store(out + P + q[None, :], uz, mask=row_ok[:, None] & q_ok[None, :])
    tl.store(pixels + rows[:, None] * N + n[None, :], w, mask=row_ok[:, None] & n_ok[None, :])
    tl.store(top + block * M + rows, shift, mask=row_ok)
    tl.store(total + block * M + rows, mass, mask=row_ok)


@triton.jit
def _backward(
    code,
    height_score,
    image_score,
    d_pooled,
    height_slope,
    d_pixels,
    xy,
    z_code,
    d_code,
    d_score,
    M,
    N,
    Z,
    P: tl.constexpr,
    PZ: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    BZ: tl.constexpr,
):
    rows, block = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    n, p, q = block * BN + tl.arange(0, BN), tl.arange(0, BP), tl.arange(0, BZ)
    row_ok, n_ok, p_ok, q_ok = rows < M, n < N, p < P, q < PZ
    both = row_ok[:, None] & n_ok[None, :]
    a = tl.load(
        code + rows[:, None] * (P + PZ) + p[None, :],
        mask=row_ok[:, None] & p_ok[None, :],
        other=0.0,
    )
    g = tl.load(
        d_pooled + rows[:, None] * (P + PZ) + p[None, :],
        mask=row_ok[:, None] & p_ok[None, :],
        other=0.0,
    )
    b = tl.load(image_score + rows[:, None] * N + n[None, :], mask=both, other=0.0)
    db = tl.load(d_pixels + rows[:, None] * N + n[None, :], mask=both, other=0.0)
    da, dz, out = (
        tl.zeros([BM, BP], tl.float32),
        tl.zeros([BM, BZ], tl.float32),
        tl.zeros([BM, BN], tl.float32),
    )
    for k in range(Z):
        t = tl.load(
            xy + k * P * N + p[:, None] * N + n[None, :],
            mask=p_ok[:, None] & n_ok[None, :],
            other=0.0,
        )
        c = tl.load(z_code + k * PZ + q, mask=q_ok, other=0.0)
        h = tl.load(height_score + rows * Z + k, mask=row_ok, other=0.0)
        s = tl.load(height_slope + rows * Z + k, mask=row_ok, other=0.0)
        weight = tl.exp(tl.dot(a, t, input_precision="ieee") + b + h[:, None])
        slope = weight * (tl.dot(g, t, input_precision="ieee") + db + s[:, None])
        slope = tl.where(both, slope, 0.0)
        out += slope
        da = tl.dot(slope, tl.trans(t), acc=da, input_precision="ieee")
        dz += tl.sum(slope, 1)[:, None] * c[None, :]
    to = d_code + (block * M + rows[:, None]) * (P + PZ)
    tl.store(to + p[None, :], da, mask=row_ok[:, None] & p_ok[None, :])
    tl.store(to + P + q[None, :], dz, mask=row_ok[:, None] & q_ok[None, :])
    tl.store(d_score + rows[:, None] * N + n[None, :], out, mask=both)


def sizes(M, xy, z):
    """Grid and constants of a launch."""
    (Z, P, N), PZ = xy.shape, z.shape[1]
    BM = min(64, max(16, triton.next_power_of_2(M)))
    blocks = triton.cdiv(N, PIXELS)
    constants = {
        "P": P,
        "PZ": PZ,
        "BM": BM,
        "BN": PIXELS,
        "BP": max(16, triton.next_power_of_2(P)),
        "BZ": max(16, triton.next_power_of_2(PZ)),
    }
    return (triton.cdiv(M, BM), blocks), (M, N, Z), constants


def forward_rows(code, image_score, xy, z, chunk=None):
    """As layers_voxel.forward_rows; `chunk` has no meaning here."""
    code, image_score = code.contiguous(), image_score.contiguous()
    grid, shape, constants = sizes(len(code), xy, z)
    M, (blocks, N) = len(code), (grid[1], shape[1])
    height_score = code[:, xy.shape[1] :] @ z.T
    pooled, pixels = code.new_empty(blocks, *code.shape), torch.empty_like(image_score)
    top, total = code.new_empty(2, blocks, M)
    _forward[grid](
        code, height_score, image_score, xy, z, pooled, pixels, top, total, *shape, **constants
    )
    lse = (top + total.log()).logsumexp(0)  # (M,)
    share = torch.exp(top - lse)  # (blocks,M)
    pixels *= share.T.repeat_interleave(PIXELS, 1)[:, :N]
    return torch.einsum("bmp,bm->mp", pooled, share), pixels, lse


def backward_rows(code, image_score, lse, d_pooled, d_pixels, shift, xy, z, chunk=None):
    """As layers_voxel.backward_rows; `chunk` has no meaning here."""
    code, image_score, d_pooled, d_pixels = (
        x.contiguous() for x in (code, image_score, d_pooled, d_pixels)
    )
    grid, shape, constants = sizes(len(code), xy, z)
    height_score = code[:, xy.shape[1] :] @ z.T - lse[:, None]
    height_slope = d_pooled[:, xy.shape[1] :] @ z.T + shift[:, None]
    d_code, d_score = code.new_empty(grid[1], *code.shape), torch.empty_like(image_score)
    _backward[grid](
        code,
        height_score,
        image_score,
        d_pooled,
        height_slope,
        d_pixels,
        xy,
        z,
        d_code,
        d_score,
        *shape,
        **constants,
    )
    return d_code.sum(0), d_score
