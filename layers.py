"""Attention over windows of frames: block-causal, without scores of the whole window, with an exact cache.

A frame is a group of N tokens. Inside a group attention is bidirectional; across groups it is causal and sees the last
`context` frames. Since no token's inputs change later, keys and values of past frames can be kept (`FrameBlock`'s `past`).
"""
import torch
import torch.nn.functional as F
from torch import nn


def fourier(x, n_frequencies, base=torch.pi):
    """Sines and cosines of x (...) at frequencies base * 2^k -> (..., 2 n_frequencies)."""
    angles = x[..., None] * (base * 2.0 ** torch.arange(n_frequencies, device=x.device, dtype=x.dtype))
    return torch.cat([angles.sin(), angles.cos()], -1)


class Resolutions:
    """Which tokens of a group later frames see. A group is [high-resolution patches, EEF, query, low-resolution patches]:
    for `recent` frames, its own included, the first `n_young` tokens; after that, those from `old_start` on. recent 0: all, always.
    """

    def __init__(self, recent=0, n_young=0, old_start=0):
        self.recent, self.n_young, self.old_start = recent, n_young, old_start

    def gather(self, x, first, t):
        """Tokens of x (B,T,N,h,e) that frame t sees of frames first..t -> (B,h,M,e)."""
        if not self.recent:
            return x[:, first:t + 1].flatten(1, 2).transpose(1, 2)
        split = max(first, t - self.recent + 1)
        parts = [x[:, first:split, self.old_start:].flatten(1, 2), x[:, split:t + 1, :self.n_young].flatten(1, 2)]
        return torch.cat(parts, 1).transpose(1, 2)

    def visible(self, query_frame, key_frame, key_token, context):
        """The same rule elementwise on integer tensors -> bool: for masks, dense or compiled."""
        age = query_frame - key_frame
        seen = (age >= 0) & (age < context)
        if not self.recent:
            return seen
        return seen & torch.where(age < self.recent, key_token < self.n_young, key_token >= self.old_start)


def frame_attention(q, k, v, context, resolutions=Resolutions()):
    """Block-causal attention, exact, by one unmasked call a frame over the prefix that it sees.

    q (B,Tq,Nq,h,e) belongs to the last Tq frames of k, v (B,Tk,N,h,e) -> (B,Tq,Nq,h,e). No score is computed in vain,
    which is twice as fast as a mask on a CPU, and none is stored.
    """
    if q.is_cuda and q.shape[1] > 1:
        return flex_frame_attention(q, k, v, context, resolutions)
    out, offset = [], k.shape[1] - q.shape[1]
    for i in range(q.shape[1]):
        t = offset + i
        first = max(0, t - context + 1)
        seen = (resolutions.gather(x, first, t) for x in (k, v))
        out.append(F.scaled_dot_product_attention(q[:, i].transpose(1, 2), *seen).transpose(1, 2))
    return torch.stack(out, 1)


def dense_mask(n_query_frames, n_query, n_frames, n_tokens, context, resolutions=Resolutions(), device=None):
    """The rule as a boolean mask (Tq*Nq, Tk*N), True where attended: what tests and the benchmark compare with."""
    q = torch.arange(n_query_frames, device=device).repeat_interleave(n_query) + n_frames - n_query_frames
    index = torch.arange(n_frames * n_tokens, device=device)
    return resolutions.visible(q[:, None], index // n_tokens, index % n_tokens, context)


_compiled = {}


def flex_frame_attention(q, k, v, context, resolutions=Resolutions()):
    """`frame_attention` as one FlexAttention call, whose empty blocks are skipped (compiled on a GPU)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    (B, Tq, Nq, h, e), (Tk, N) = q.shape, k.shape[1:3]
    key = (Tq, Nq, Tk, N, context, resolutions.recent, resolutions.n_young, resolutions.old_start, q.device)
    if key not in _compiled:
        def mask(_, __, i, j):
            return resolutions.visible(i // Nq + Tk - Tq, j // N, j % N, context)
        _compiled[key] = create_block_mask(mask, None, None, Tq * Nq, Tk * N, device=q.device)
    if "call" not in _compiled:
        _compiled["call"] = torch.compile(flex_attention, dynamic=False)
    call = _compiled["call"] if q.is_cuda else flex_attention
    flat = lambda x: x.flatten(1, 2).transpose(1, 2)  # (B,T,N,h,e) -> (B,h,T*N,e)
    out = call(flat(q), flat(k), flat(v), block_mask=_compiled[key])
    return out.transpose(1, 2).unflatten(1, (Tq, Nq))


class FrameBlock(nn.Module):
    """Pre-norm transformer block over groups of tokens (B,T,N,d)."""

    def __init__(self, dim, n_heads, mlp_ratio=4):
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x, context, resolutions=Resolutions(), past=None, rows=None):
        """x (B,T,N,d), the newest T frames; past: (k, v) of frames before them. rows: compute these tokens only, a slice.

        Returns (rows of x (B,T,R,d), (k, v) of all frames, to be passed as `past` later).
        """
        y = self.norm1(x)
        k, v = self.kv(y).unflatten(-1, (2, self.n_heads, -1)).unbind(3)  # (B,T,N,h,e)
        if past is not None:
            k, v = (torch.cat(pair, 1) for pair in zip(past, (k, v)))
        if rows is not None:
            x, y = x[:, :, rows], y[:, :, rows]
        q = self.q(y).unflatten(-1, (self.n_heads, -1))
        x = x + self.out(frame_attention(q, k, v, context, resolutions).flatten(-2))
        return x + self.mlp(self.norm2(x)), (k, v)

    def weights(self, x, row, n_tokens):
        """How token `row` of each frame of x (B,T,N,d) weighs the first `n_tokens` of its own frame: (B,T,n_tokens), mean over
        heads, summing to one over these tokens."""
        y = self.norm1(x)
        k = self.kv(y[:, :, :n_tokens]).unflatten(-1, (2, self.n_heads, -1))[:, :, :, 0]
        q = self.q(y[:, :, row]).unflatten(-1, (self.n_heads, -1))
        scores = torch.einsum("bthe,btnhe->bthn", q, k) / q.shape[-1] ** 0.5
        return scores.softmax(-1).mean(2)
