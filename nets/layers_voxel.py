"""Exact attention to voxel tokens that are never built.

Voxel (z, n) is height bin z on the ray of pixel n. With the key projection absorbed into the query,
q' = Wk^T q:

    token    Wg PE(xyz) + image[n]
    score    (Wg^T q') . PE(xyz) + q' . image[n]
    output   Wv (Wg sum p PE + sum_n (sum_z p) image[n])

So nothing of size V x d exists, for V = Z N voxels of width d. The softmax runs online over chunks
of pixels. Its V probabilities are kept for the backward pass where they have room (KEPT_BYTES), and
are computed again where not.

PE holds sin/cos pairs, so PE(x - a) = R(a) PE(x) with a block-diagonal rotation R(a). An anchor `a`
per query turns the query and the output, never the tokens. A voxel's world z is its height bin, the
same for all pixels, so only the x and y parts of PE need a table of V rows.

Letters: B batch, Q queries, h heads, D width of a head, d = h D width of a token, C image channels,
N pixels, Z height bins, F wavelengths, P = 6 F numbers of a PE, V = Z N voxels, M rows (queries x
heads) that share a table.
"""

import copy
import importlib.util
import math

import torch

from nets.maps import product

CHUNK = 131072  # scores at a time: 512 KB of fp32 stay in a core's cache
KEPT_BYTES = 64e6  # of probabilities that a layer keeps for its backward pass, at most
# a row's shift is renewed when a score exceeds it by this: e^20 times 1e5 voxels is far from fp32's
# end
SLACK = 20.0


def wavelengths(n=8, shortest=0.04, longest=3.0):
    """F wavelengths (F,) in metres, in a geometric series.

    The shortest still tells neighbouring voxels (1.5 cm) apart: the limit is 2 voxels. The longest
    is unique over a workspace of a metre or more.
    """
    return torch.logspace(math.log10(shortest), math.log10(longest), n, dtype=torch.float64)


def encode_position(x, waves):
    """Positions x (...,A) in metres -> (..., A 2 F): per axis F sines, then F cosines of 2 pi x /
    wavelength.

    Computed and returned in float64, also under autocast.
    """
    angle = (2 * math.pi) * x.double()[..., None] / waves.to(x.device)
    return torch.stack([angle.sin(), angle.cos()], -2).flatten(-3)


def shift_encoding(code, offset, waves):
    """R(offset) code: turns PE(x) into PE(x - offset), by the formulas of sin(x - a), cos(x - a).

    code (..., A 2 F), offset (...,A) in metres, broadcast. R(-a) is the transpose of R(a), so
    q . R(a) k = R(-a) q . k: a query can be turned instead of all keys.
    """
    turn = encode_position(offset, waves).to(code.dtype).unflatten(-1, (-1, 2, len(waves)))
    sin, cos = turn.unbind(-2)
    s, c = code.unflatten(-1, (-1, 2, len(waves))).unbind(-2)
    return torch.stack([s * cos - c * sin, c * cos + s * sin], -2).flatten(-3)


def turned(turns, dtype):
    """sin and cos of 2 pi turns, in `dtype`; turns are float64."""
    # whole turns are taken off in float64: float32 would lose the phase of the short waves
    angle = (turns - turns.round()).to(dtype).mul_(2 * math.pi)
    return angle.sin(), angle.cos()


class VoxelTable:
    """PE of the voxels of G cameras: constants without gradient, to be kept while cameras stand.

    origin, slope (G,N,2): x and y of the ray of pixel n in metres are origin + slope * height,
    exactly affine (see `camera.unproject`). heights (Z,) m, evenly spaced; waves (F,) m. Rays that
    never reach the heights (level with the camera, infinite) are put at 0.

    `xy` (G,Z,4F,N) and `z` (Z,2F) are the codes. `items` has for each camera the batch items that
    it took; at first item g is camera g's.
    """

    def __init__(self, origin, slope, heights, waves, dtype=torch.float32):
        rays = torch.cat([origin, slope], -1).double()
        rays = torch.where(rays.isfinite().all(-1, keepdim=True), rays, 0.0)
        self.heights, self.waves = heights.double(), waves.double().to(rays.device)
        self.z = encode_position(self.heights[:, None], self.waves).to(dtype)
        origin, slope = rays.transpose(1, 2)[:, :, None].split(2, 1)  # (G,2,1,N)
        Z, F, scale = len(heights), len(waves), 1 / self.waves[:, None]
        self.items = [slice(g, g + 1) for g in range(len(rays))]
        if torch.compiler.is_compiling():
            # every sine by itself: a graph fuses them, and writing in place would break it
            o, s = origin[:, None], slope[:, None]  # (G,1,2,1,N)
            at = (o + s * self.heights[:, None, None, None]) * scale  # (G,Z,2,F,N)
            self.xy = torch.stack(turned(at, dtype), 3).flatten(2, 4)
            return
        # metres between heights
        step = (self.heights[-1] - self.heights[0]) / max(Z - 1, 1)
        self.xy = torch.empty(len(rays), Z, 4 * F, rays.shape[1], dtype=dtype, device=rays.device)
        # a camera at a time; out (Z,2,2,F,N): heights, x and y, sin and cos
        for out, o, s in zip(self.xy.view(len(rays), Z, 2, 2, F, -1), origin, slope):
            out[0, :, 0], out[0, :, 1] = turned((o + s * self.heights[0]) * scale, dtype)
            done = 1
            # the next `done` heights are the first `done`, turned by `done` steps (angle addition):
            # six sines instead of 32
            while done < Z:
                old, new = out[: Z - done][:done], out[done : 2 * done]
                sin, cos = turned(s * (step * done) * scale, dtype)
                torch.mul(old[:, :, 0], cos, out=new[:, :, 0]).addcmul_(old[:, :, 1], sin)
                torch.mul(old[:, :, 1], cos, out=new[:, :, 1]).addcmul_(old[:, :, 0], sin, value=-1)
                done *= 2

    def select(self, which):
        """The same tables for a batch whose item i was taken by camera which[i] (B,)."""
        chosen = copy.copy(self)
        places = lambda g: (which == g).nonzero()[:, 0].to(self.z.device)
        # with one camera a slice: all items, as a view
        chosen.items = (
            [places(g) for g in range(len(self.xy))] if len(self.xy) > 1 else [slice(None)]
        )
        return chosen

    @staticmethod
    def joined(tables):
        """One table of several of one camera each, with the same heights; theirs are not copied."""
        whole = copy.copy(tables[0])
        whole.xy = [table.xy[0] for table in tables]
        whole.items = [slice(g, g + 1) for g in range(len(tables))]
        return whole

    @property
    def shape(self):
        """(Z, N)."""
        return self.xy[0].shape[0], self.xy[0].shape[2]


class _Attend(torch.autograd.Function):
    """Softmax p over the voxels of the scores code . PE + image_score.

    code (B,R,P), image_score (B,R,N), R = Q h -> (sum p PE (B,R,P), sum_z p (B,R,N), log-sum-exp
    (B,R)).
    """

    @staticmethod
    def forward(ctx, code, image_score, table, chunk, way, learning):
        B, R, P = code.shape
        # bytes of all probabilities
        size = B * R * math.prod(table.shape) * code.element_size()
        ctx.kept = []  # a Kept for each camera
        pooled, pixels, lse = (
            code.new_empty(code.shape),
            torch.empty_like(image_score),
            code.new_empty(B, R),
        )
        attend, ctx.backward_rows = rows_of(code, way)
        keeps = learning and attend is forward_rows and size <= KEPT_BYTES
        # all items of one camera share a table: their rows go through it together
        for xy, item in zip(table.xy, table.items):
            a, b = code[item], image_score[item]
            # a tuple of none or one, for the other ways take no Kept
            ctx.kept.append((Kept(),) if keeps else ())
            sums = attend(
                *(a.reshape(-1, P), b.reshape(-1, b.shape[-1]), xy, table.z, chunk), *ctx.kept[-1]
            )
            pooled[item], pixels[item] = sums[0].view_as(a), sums[1].view_as(b)
            lse[item] = sums[2].view(a.shape[:2])
        ctx.table, ctx.chunk = table, chunk
        ctx.save_for_backward(code, image_score, pooled, pixels, lse)
        return pooled, pixels, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_pooled, d_pixels, d_lse):
        code, image_score, pooled, pixels, lse = ctx.saved_tensors
        d_code, d_score = torch.empty_like(code), torch.empty_like(image_score)
        # with d p = d_pooled . PE + d_pixels, the slope of a softmax and its log-sum-exp is
        # d score = p (d p + d lse - sum p d p), and sum p d p is known from the outputs
        shift = d_lse - (d_pooled * pooled).sum(-1) - (d_pixels * pixels).sum(-1)
        flat = lambda x, item: x[item].flatten(0, 1)
        for xy, item, kept in zip(ctx.table.xy, ctx.table.items, ctx.kept):
            rows = [flat(x, item) for x in (code, image_score, lse, d_pooled, d_pixels, shift)]
            da, db = ctx.backward_rows(*rows, xy, ctx.table.z, ctx.chunk, *kept)
            d_code[item], d_score[item] = da.view_as(code[item]), db.view_as(image_score[item])
        return d_code, d_score, None, None, None, None


class Kept:
    """What `forward_rows` may leave to `backward_rows`, so that no score is computed twice.

    For each chunk of n pixels: the softmax over the pixels of one height, `shares` (Z,M,n), and the
    log-sum-exp of each height, `heights` (Z,M)."""

    def __init__(self):
        self.shares, self.heights = [], []


def rows_of(code, way="auto"):
    """(forward, backward) functions over the rows of one table.

    way: "chunks" that fit a CPU's cache, "whole" volumes of scores at once, or "fused" kernels.
    "auto": chunks on a CPU; on a GPU fused for float32 where there is Triton, else whole.
    """
    if way == "auto":
        triton = code.dtype == torch.float32 and importlib.util.find_spec("triton")
        way = "chunks" if not code.is_cuda else "fused" if triton else "whole"
    if way == "fused":
        # not at the top: Triton is not everywhere
        from nets import layers_voxel_triton as fused

        return fused.forward_rows, fused.backward_rows
    return {
        "chunks": (forward_rows, backward_rows),
        "whole": (whole_forward_rows, whole_backward_rows),
    }[way]


def chunks(M, N, chunk):
    """Slices over N pixels, such that M rows of scores fill about `chunk` numbers (None: CHUNK)."""
    step = max(64, CHUNK // M) if chunk is None else max(1, chunk // M)
    return [slice(i, min(i + step, N)) for i in range(0, N, step)]


def forward_rows(code, image_score, xy, z, chunk, kept=None):
    """Rows code (M,P), image_score (M,N) on one table xy (Z,4F,N), z (Z,2F) -> sum p PE (M,P),
    sum_z p (M,N), lse (M,). kept: Kept, to be filled.

    Each height of a chunk has a softmax of its own. Its log-sum-exp, against that of the first,
    says what it weighs among all: an online softmax.
    """
    (M, N), (Z, split, _) = image_score.shape, xy.shape
    # the z part of a score is the same for all pixels: no table of voxels, (M,Z) numbers
    a, height_score = code[:, :split].contiguous(), code[:, split:] @ z.T  # (M,Z)
    pooled, by_height = torch.zeros_like(a), torch.zeros_like(height_score)
    pixels = torch.zeros_like(image_score)
    shift = None  # (M,1), what weights are measured against
    for part in chunks(M, N, chunk):
        n = part.stop - part.start
        score = code.new_empty(M, n)
        shares = code.new_empty(1 if kept is None else Z, M, n)
        heights = code.new_empty(Z, M)
        for k in range(Z):
            # scores (M,n) of one height
            torch.add(image_score[:, part], height_score[:, k : k + 1], out=score)
            score.addmm_(a, xy[k, :, part])
            share = torch.softmax(score, 1, out=shares[k % len(shares)])
            # without exponentials of its own: the highest share is exp(highest score - lse)
            lse = score.amax(1, keepdim=True) - share.amax(1, keepdim=True).log()
            heights[k] = lse[:, 0]
            # sums so far are measured against `shift`; where a score leaves it behind, they are
            # rescaled
            if shift is None:
                shift = lse
            elif (lse - shift > SLACK).any():
                shrink = torch.exp(shift - torch.maximum(lse, shift))
                shift = torch.maximum(lse, shift)
                for total in (pooled, by_height, pixels):
                    total *= shrink
            weight = torch.exp(lse - shift)
            pixels[:, part].addcmul_(share, weight)
            by_height[:, k : k + 1] += weight
            pooled.addcmul_(share @ xy[k, :, part].T, weight)
        if kept is not None:
            kept.shares.append(shares)
            kept.heights.append(heights)
    total = by_height.sum(1, keepdim=True)
    # z's part of sum p PE needs only the sum over each height's pixels
    pooled = torch.cat([pooled, by_height @ z], 1).div_(total)
    return pooled, pixels.div_(total), (shift + total.log())[:, 0]


def backward_rows(code, image_score, lse, d_pooled, d_pixels, shift, xy, z, chunk, kept=None):
    """Gradients of `forward_rows` with respect to code (M,P) and image_score (M,N).

    shift (M,) is the row's d lse - sum p d p. Without `kept` the scores are computed again.
    """
    (M, N), (Z, split, _) = image_score.shape, xy.shape
    a, g = code[:, :split].contiguous(), d_pooled[:, :split].contiguous()
    # less the log-sum-exp, so that exp(score) is the probability
    height_score = code[:, split:] @ z.T - lse[:, None]
    # what of d p + d lse - sum p d p does not depend on the pixel
    height_slope = d_pooled[:, split:] @ z.T + shift[:, None]
    d_a, d_height = torch.zeros_like(a), torch.zeros_like(height_score)
    d_score = torch.zeros_like(image_score)
    for i, part in enumerate(chunks(M, N, chunk)):
        p, slope = code.new_empty(2, M, part.stop - part.start)
        for k in range(Z):
            # slope (M,n) = p (d p + shift) of one height
            torch.add(d_pixels[:, part], height_slope[:, k : k + 1], out=slope)
            slope.addmm_(g, xy[k, :, part])
            if kept is None:
                torch.add(image_score[:, part], height_score[:, k : k + 1], out=p)
                slope *= p.addmm_(a, xy[k, :, part]).exp_()
            else:
                # a pixel's share of its height, times the height's share of all
                slope *= kept.shares[i][k]
                slope *= torch.exp(kept.heights[i][k] - lse)[:, None]
            d_score[:, part] += slope
            d_height[:, k] += slope.sum(1)
            # the gradient of code: slopes times PE, x and y here and z below
            d_a.addmm_(slope, xy[k, :, part].T)
    return torch.cat([d_a, d_height @ z], 1), d_score


def whole_scores(code, image_score, xy, z):
    """Scores (Z,M,N) of rows code (M,P), image_score (M,N)."""
    split = xy.shape[1]
    return torch.matmul(code[:, :split], xy) + (z @ code[:, split:].T)[..., None] + image_score


def whole_forward_rows(code, image_score, xy, z, chunk=None):
    """As forward_rows, with all M V scores in memory at once; `chunk` has no meaning here."""
    # (Z,M,N)
    p = whole_scores(code, image_score, xy, z)
    lse = p.logsumexp((0, 2))  # (M,)
    p = p.sub_(lse[:, None]).exp_()
    pooled = torch.cat([torch.bmm(p, xy.mT).sum(0), p.sum(2).T @ z], 1)
    return pooled, p.sum(0), lse


def whole_backward_rows(code, image_score, lse, d_pooled, d_pixels, shift, xy, z, chunk=None):
    """As backward_rows, with all M V scores in memory at once; `chunk` has no meaning here."""
    p = whole_scores(code, image_score - lse[:, None], xy, z).exp_()
    slope = whole_scores(d_pooled, d_pixels + shift[:, None], xy, z).mul_(p)
    return torch.cat([torch.bmm(slope, xy.mT).sum(0), slope.sum(2).T @ z], 1), slope.sum(0)


def attend_in_graph(code, image_score, table):
    """`_Attend` by differentiable operations alone, for a compiled graph: a table for each item.

    All B R V scores are in memory at once. Returns what `_Attend` does.
    """
    split = table.xy.shape[2]
    z_score = code[..., split:] @ table.z.T  # (B,R,Z)
    xy_score = torch.einsum("brp,bzpn->brzn", code[..., :split], table.xy)
    scores = xy_score + z_score[..., None] + image_score[:, :, None]
    lse = scores.flatten(2).logsumexp(-1)  # (B,R)
    p = (scores - lse[..., None, None]).exp()
    pooled = [torch.einsum("brzn,bzpn->brp", p, table.xy), p.sum(-1) @ table.z]
    return torch.cat(pooled, -1), p.sum(2), lse


def position_logits_in_graph(code, table):
    """`_PositionLogits` by differentiable operations alone, see `attend_in_graph`."""
    split = table.xy.shape[2]
    xy = torch.einsum("bqp,bzpn->bqzn", code[..., :split], table.xy)
    return xy + (code[..., split:] @ table.z.T)[..., None]


def voxel_attention(
    query,
    table,
    image,
    positional,
    key,
    value,
    projection=None,
    anchor=None,
    chunk=None,
    way="auto",
):
    """Multi-head attention of queries to all voxels of their frame, exact, without building a
    token.

    query (B,Q,h,D)
    table: VoxelTable of the B items' cameras
    image (B,C,N): features of the pixels
    positional Wg (d,P): from PE to tokens
    key, value (h,D,d): act on tokens
    projection (d,C): from image features to tokens, or None when C = d
    anchor (B,Q,3), metres: positions are measured from it, per query
    chunk: scores at a time; way: see `rows_of`

    Returns out (B,Q,h,D), lse (B,Q,h) of the scaled scores, for `merge_attention`, and the
    attention over pixels (B,Q,h,N). All have gradients into query, image, positional, key, value
    and projection. Geometry is float32 under autocast, float64 when the table is.
    """
    B, Q, h, D = query.shape
    # the key projection absorbed into the query, which then acts on tokens
    absorbed = torch.einsum("bqhd,hde->bqhe", query, key) / math.sqrt(D)  # (B,Q,h,d)
    image_query = absorbed if projection is None else absorbed @ projection
    image_score = product(image_query.flatten(1, 2), image)  # (B,Q*h,N)
    exact = table.z.dtype
    with torch.autocast(query.device.type, enabled=False):
        positional = positional.to(exact)
        code = absorbed.to(exact) @ positional  # (B,Q,h,P)
        if anchor is not None:
            # turned once instead of every voxel: q . PE(x - a) = R(-a) q . PE(x)
            code = shift_encoding(code, -anchor[:, :, None], table.waves)
        rows, image_score = code.flatten(1, 2), image_score.to(exact)
        if torch.compiler.is_compiling():
            pooled, pixels, lse = attend_in_graph(rows, image_score, table)
        else:
            # asked here: inside `forward` gradients are always off
            learning = torch.is_grad_enabled()
            pooled, pixels, lse = _Attend.apply(rows, image_score, table, chunk, way, learning)
        pooled = pooled.view(B, Q, h, -1)
        if anchor is not None:
            # and back: sum p PE(x - a) = R(a) sum p PE(x)
            pooled = shift_encoding(pooled, anchor[:, :, None], table.waves)
        position = pooled @ positional.T
    # the image's part of the output: a ray's pixel counts for all its heights
    seen = (pixels.to(image.dtype) @ image.mT).unflatten(1, (Q, h))  # (B,Q,h,C)
    tokens = position + (seen if projection is None else seen @ projection.T)
    return (
        torch.einsum("bqhe,hde->bqhd", tokens, value),
        lse.view(B, Q, h),
        pixels.view(B, Q, h, -1),
    )


def dense_attention(query, key, value, allowed=None):
    """Ordinary attention that also returns its log-sum-exp.

    query (B,Q,h,D), key and value (B,S,h,D), allowed (B,Q,S) bool, None for all -> out (B,Q,h,D),
    lse (B,Q,h). A query that may read nothing gets zeros and -inf, which `merge_attention` leaves
    out.
    """
    # at least float32 under autocast
    score = (
        torch.einsum("bqhd,bshd->bqhs", query, key).float()
        if query.dtype != torch.float64
        else torch.einsum("bqhd,bshd->bqhs", query, key)
    )
    score = score / math.sqrt(query.shape[-1])
    if allowed is None:
        return torch.einsum(
            "bqhs,bshd->bqhd", score.softmax(-1).to(value.dtype), value
        ), score.logsumexp(-1)
    nothing = ~allowed.any(-1)[:, :, None]  # (B,Q,1)
    # a query without keys reads all of them for now: a softmax over nothing would be NaN
    score = score.masked_fill(~(allowed[:, :, None] | nothing[..., None]), -torch.inf)
    weight = score.softmax(-1).masked_fill(nothing[..., None], 0)
    return torch.einsum("bqhs,bshd->bqhd", weight.to(value.dtype), value), score.logsumexp(
        -1
    ).masked_fill(nothing, -torch.inf)


def merge_attention(out1, lse1, out2, lse2):
    """Join attention over two disjoint sets of keys: exactly one softmax over both.

    out (...,D), lse (...) of each -> (out, lse). Gradients run through both log-sum-exps. One of
    the two sets may be empty (-inf).
    """
    # e^lse1 / (e^lse1 + e^lse2), the first set's share of the softmax
    share = torch.sigmoid(lse1 - lse2)[..., None].to(out1.dtype)
    return share * out1 + (1 - share) * out2, torch.logaddexp(lse1, lse2)


class _PositionLogits(torch.autograd.Function):
    """code . PE of every voxel -> (B,Q,Z,N)."""

    @staticmethod
    def forward(ctx, code, table):
        B, Q, P = code.shape
        (Z, N), split = table.shape, table.xy[0].shape[1]
        # z's part, the same for all pixels of a height
        out = (code[..., split:] @ table.z.T)[..., None].repeat(1, 1, 1, N)
        for xy, item in zip(table.xy, table.items):
            a = code[item][..., :split].reshape(-1, split)
            rows = out[item].view(-1, Z, N)  # a view for one camera, a copy for several
            rows.transpose(0, 1).baddbmm_(a.expand(Z, -1, -1), xy)  # all heights at once
            if not isinstance(item, slice):
                out[item] = rows.view(-1, Q, Z, N)
        ctx.table = table
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        table, split = ctx.table, ctx.table.xy[0].shape[1]
        grad = grad.contiguous()
        d_code = grad.new_zeros(*grad.shape[:2], split)
        for xy, item in zip(table.xy, table.items):
            rows = grad[item].flatten(0, 1)
            d_code[item] = (
                torch.bmm(rows.transpose(0, 1), xy.mT).sum(0).view(-1, grad.shape[1], split)
            )
        return torch.cat([d_code, grad.sum(-1) @ table.z], -1), None


def voxel_logits(query, table, image, positional, height_query, anchor=None):
    """Logits (B,Q,Z,N) of queries over all voxels, in the table's dtype.

    They are query (B,Q,d) . (Wg PE(xyz - anchor)) + height_query (B,Q,Z,C) . image (B,C,N), with
    positional Wg (d,P) and anchor (B,Q,3) in metres. A height_query that is the same for all
    heights gives the plain product with the token. One that depends on the height lets
    p(height | pixel) depend on the image at that pixel, which an additive score cannot.
    """
    B, Q, Z, C = height_query.shape
    exact = table.z.dtype
    seen = product(height_query.flatten(1, 2), image)  # (B,Q*Z,N)
    with torch.autocast(query.device.type, enabled=False):
        code = query.to(exact) @ positional.to(exact)
        if anchor is not None:
            code = shift_encoding(code, -anchor, table.waves)
        if torch.compiler.is_compiling():
            return position_logits_in_graph(code, table) + seen.view(B, Q, Z, -1)
        return _PositionLogits.apply(code, table) + seen.view(B, Q, Z, -1)
