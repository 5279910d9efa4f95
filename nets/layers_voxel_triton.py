"""`layers_voxel.forward_rows` and `backward_rows` as one fused Triton kernel each, for float32 on a
GPU.

A program owns a block of BM rows and a block of BN pixels, and walks up their rays height by
height. Scores live in registers only. Results that run over all pixels come out as one part per
block, and torch puts them together: no atomics, the same numbers every time. Products are in full
fp32 ("ieee"). The tests run the kernels in Triton's interpreter, on any machine; `study/bench.py
voxel` times them on a GPU.

Letters: M rows, N pixels, Z heights; P and PZ numbers of the x, y part and of the z part of a PE.
BP and BZ are P and PZ rounded up to powers of 2, as Triton's blocks have to be; masks cut the rest.
"""

import torch
import triton
import triton.language as tl

PIXELS = 32  # of a program; times 16-64 rows of scores, in registers


# In: code (M,P+PZ), height_score (M,Z), image_score (M,N), xy (Z,P,N), z_code (Z,PZ).
# Out, a part for each block of pixels: pooled (blocks,M,P+PZ), top and total (blocks,M), the
# highest
# score and the mass; pixels (M,N).
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
    # this program's rows (BM,) and pixels (BN,)
    rows, block = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    n, p, q = block * BN + tl.arange(0, BN), tl.arange(0, BP), tl.arange(0, BZ)
    row_ok, n_ok, p_ok, q_ok = rows < M, n < N, p < P, q < PZ
    # x, y part of the rows' codes (BM,BP), and their image scores (BM,BN)
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
    # an online softmax over heights: the highest score so far, and sums of exp(score - shift)
    shift = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    # sum p PE, its x, y part and its z part, and sum_z p
    u, uz, w = (
        tl.zeros([BM, BP], tl.float32),
        tl.zeros([BM, BZ], tl.float32),
        tl.zeros([BM, BN], tl.float32),
    )
    for k in range(Z):
        # codes of this height: x, y of the block's pixels (BP,BN), z of all pixels (BZ,)
        t = tl.load(
            xy + k * P * N + p[:, None] * N + n[None, :],
            mask=p_ok[:, None] & n_ok[None, :],
            other=0.0,
        )
        c = tl.load(z_code + k * PZ + q, mask=q_ok, other=0.0)
        h = tl.load(height_score + rows * Z + k, mask=row_ok, other=0.0)
        score = tl.dot(a, t, input_precision="ieee") + b + h[:, None]
        # pixels beyond the last one weigh nothing
        score = tl.where(n_ok[None, :], score, float("-inf"))
        # what was summed so far is rescaled to the new highest score
        new = tl.maximum(shift, tl.max(score, 1))
        shrink, e = tl.exp(shift - new), tl.exp(score - new[:, None])
        part = tl.sum(e, 1)
        mass = mass * shrink + part
        w = w * shrink[:, None] + e
        u = tl.dot(e, tl.trans(t), acc=u * shrink[:, None], input_precision="ieee")
        uz = uz * shrink[:, None] + part[:, None] * c[None, :]
        shift = new
    # one part for each block of pixels, not yet divided by its mass
    out = pooled + (block * M + rows[:, None]) * (P + PZ)
    tl.store(out + p[None, :], u, mask=row_ok[:, None] & p_ok[None, :])
    tl.store(out + P + q[None, :], uz, mask=row_ok[:, None] & q_ok[None, :])
    tl.store(pixels + rows[:, None] * N + n[None, :], w, mask=row_ok[:, None] & n_ok[None, :])
    tl.store(top + block * M + rows, shift, mask=row_ok)
    tl.store(total + block * M + rows, mass, mask=row_ok)


# In: as above, and d_pooled (M,P+PZ), height_slope (M,Z), d_pixels (M,N).
# Out: d_code (blocks,M,P+PZ), a part for each block of pixels, and d_score (M,N).
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
    # this program's rows (BM,) and pixels (BN,)
    rows, block = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    n, p, q = block * BN + tl.arange(0, BN), tl.arange(0, BP), tl.arange(0, BZ)
    row_ok, n_ok, p_ok, q_ok = rows < M, n < N, p < P, q < PZ
    both = row_ok[:, None] & n_ok[None, :]
    # codes a and slopes of the pooled codes g (BM,BP), image scores b and their slopes (BM,BN)
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
    # gradients of the codes, x, y part and z part, and of the image scores
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
        # height_score comes less the log-sum-exp: this is the probability itself
        weight = tl.exp(tl.dot(a, t, input_precision="ieee") + b + h[:, None])
        # d score = p (d p + d lse - sum p d p), see layers_voxel._Attend; s holds the last two
        # terms
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
    """Grid, (M, N, Z) and constants of a launch for M rows on a table xy (Z,P,N), z (Z,PZ)."""
    (Z, P, N), PZ = xy.shape, z.shape[1]
    # 16 is the least that tl.dot multiplies
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
    # (blocks,M,P+PZ); pixels (M,N) need no parts: each block of pixels writes its own
    pooled, pixels = code.new_empty(blocks, *code.shape), torch.empty_like(image_score)
    top, total = code.new_empty(2, blocks, M)
    _forward[grid](
        code, height_score, image_score, xy, z, pooled, pixels, top, total, *shape, **constants
    )
    # the softmax over all blocks, from each block's highest score and mass
    lse = (top + total.log()).logsumexp(0)  # (M,)
    # what a block's sums, measured against its highest score, count among all
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
    # with d lse - sum p d p (`shift`), which no pixel changes
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
