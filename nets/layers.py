"""Attention over windows of frames: block-causal, with an exact cache, and without storing the
scores of the whole window.

A frame is a group of N tokens. Inside a group attention is bidirectional. Across groups it is
causal and sees the last `context` frames. No token's inputs change later, so keys and values of
past frames can be kept (`FrameBlock`'s `past`).

Beside the legend of policy.py: d width of a token, h heads, e = d / h width of a head.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

FLEX_HEAD = 16  # the smallest width of a head that compiled FlexAttention supports
SHAPES = 64  # that it is compiled for at most


def fourier(x, n_frequencies, base=torch.pi):
    """Sines and cosines of x (...) at frequencies base * 2^k -> (..., 2 n_frequencies)."""
    angles = x[..., None] * (
        base * 2.0 ** torch.arange(n_frequencies, device=x.device, dtype=x.dtype)
    )
    return torch.cat([angles.sin(), angles.cos()], -1)


@dataclass(frozen=True)
class Resolutions:
    """Which tokens of a frame's group are seen, by the frame itself and by later ones.

    A group is [high-resolution patches, EEF, query, low-resolution patches]. While the frame is one
    of the newest `recent`, its first `n_young` tokens are seen; later, those from `old_start` on.
    recent 0: all tokens, always.
    """

    recent: int = 0
    n_young: int = 0
    old_start: int = 0

    def gather(self, x, first, t):
        """Tokens of x (B,T,N,h,e) that frame t sees of frames first..t -> (B,h,M,e)."""
        if not self.recent:
            return x[:, first : t + 1].flatten(1, 2).transpose(1, 2)
        # frames before `split` are old, seen at low resolution
        split = max(first, t - self.recent + 1)
        parts = [
            x[:, first:split, self.old_start :].flatten(1, 2),
            x[:, split : t + 1, : self.n_young].flatten(1, 2),
        ]
        return torch.cat(parts, 1).transpose(1, 2)

    def visible(self, query_frame, key_frame, key_token, context):
        """The same rule elementwise on integer tensors -> bool, for dense and compiled masks.

        query_frame and key_frame number the frames; key_token is a token's place in its group.
        """
        age = query_frame - key_frame
        seen = (age >= 0) & (age < context)
        if not self.recent:
            return seen
        return seen & torch.where(
            age < self.recent, key_token < self.n_young, key_token >= self.old_start
        )


def attend(q, k, v, dropout=0.0):
    """softmax(q k^T / sqrt(e)) v of heads q (...,Q,e), k and v (...,S,e). dropout: of the softmax.

    A CPU that trains in bf16 takes plain products: the backward pass of torch's fused kernel takes
    five times as long there.
    """
    if q.dtype != torch.bfloat16 or q.is_cuda or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    # scaled before the product: Q e numbers instead of Q S
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    return F.dropout(scores.softmax(-1), dropout) @ v


def frame_attention(q, k, v, context, resolutions=Resolutions(), way="auto"):
    """Exact block-causal attention: q (B,Tq,Nq,h,e) of the last Tq frames of k, v (B,Tk,N,h,e) ->
    (B,Tq,Nq,h,e).

    way: "sdpa", one unmasked call a frame over the prefix that it sees. No score is computed in
    vain, which is twice as fast as a mask on a CPU, and none is stored. "flex", one compiled
    FlexAttention call. "auto", flex on a GPU for whole frames of heads that it supports, else sdpa.
    """
    # FlexAttention does not pay for a single query a frame, as in the last layer
    many = q.shape[1] > 1 and q.shape[2] > 1
    if way == "flex" or way == "auto" and q.is_cuda and many and q.shape[-1] >= FLEX_HEAD:
        return flex_frame_attention(q, k, v, context, resolutions)
    # with a cache there are more keys than queries: the first query belongs to frame `offset`
    out, offset = [], k.shape[1] - q.shape[1]
    for i in range(q.shape[1]):
        t = offset + i
        first = max(0, t - context + 1)
        seen = (resolutions.gather(x, first, t) for x in (k, v))
        out.append(attend(q[:, i].transpose(1, 2), *seen).transpose(1, 2))
    return torch.stack(out, 1)


def dense_mask(
    n_query_frames, n_query, n_frames, n_tokens, context, resolutions=Resolutions(), device=None
):
    """The rule as a boolean mask (Tq*Nq, Tk*N), True where attended.

    Tests and the benchmark compare the other ways with it.
    """
    # the frame of each query (Tq*Nq,); queries are of the last frames
    q = (
        torch.arange(n_query_frames, device=device).repeat_interleave(n_query)
        + n_frames
        - n_query_frames
    )
    index = torch.arange(n_frames * n_tokens, device=device)
    return resolutions.visible(q[:, None], index // n_tokens, index % n_tokens, context)


@functools.lru_cache(maxsize=64)
def block_mask(Tq, Nq, Tk, N, context, resolutions, device):
    """The rule as FlexAttention's mask of blocks, of queries (Tq*Nq) over keys (Tk*N)."""
    from torch.nn.attention.flex_attention import create_block_mask

    # batch and head do not matter; i and j number the flattened queries and keys
    def mask(_, __, i, j):
        return resolutions.visible(i // Nq + Tk - Tq, j // N, j % N, context)

    return create_block_mask(mask, None, None, Tq * Nq, Tk * N, device=device)


@functools.cache
def compiled_flex():
    """FlexAttention, compiled anew for every shape. Uncompiled, it would store all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_frame_attention(q, k, v, context, resolutions=Resolutions(), compile=None):
    """`frame_attention` as one FlexAttention call, which skips empty blocks of the mask.

    compile: whether to compile it; None: on a GPU only. A shape beyond the SHAPES-th raises, where
    torch would silently go on with dense scores.
    """
    from torch.nn.attention.flex_attention import flex_attention

    (Tq, Nq), (Tk, N) = q.shape[1:3], k.shape[1:3]
    flat = lambda x: x.flatten(1, 2).transpose(1, 2)  # (B,T,N,h,e) -> (B,h,T*N,e)
    mask = block_mask(Tq, Nq, Tk, N, context, resolutions, q.device)
    with torch._dynamo.config.patch(
        recompile_limit=SHAPES,
        accumulated_recompile_limit=4 * SHAPES,
        fail_on_recompile_limit_hit=True,
    ):
        call = compiled_flex() if q.is_cuda or compile else flex_attention
        out = call(flat(q), flat(k), flat(v), block_mask=mask)
    return out.transpose(1, 2).unflatten(1, (Tq, Nq))


class FrameBlock(nn.Module):
    """Pre-norm transformer block over groups of tokens (B,T,N,d)."""

    def __init__(self, dim, n_heads, mlp_ratio=4, attention="auto"):
        super().__init__()
        self.n_heads, self.attention = n_heads, attention  # see frame_attention
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv, self.out = (
            nn.Linear(dim, dim),
            nn.Linear(dim, 2 * dim),
            nn.Linear(dim, dim),
        )
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim)
        )

    def forward(self, x, context, resolutions=Resolutions(), past=None, rows=None):
        """x (B,T,N,d), the newest T frames -> (x (B,T,R,d) of R tokens, (k, v) of all frames).

        past: the (k, v) that an earlier call returned, of the frames before these. rows: a slice of
        the tokens to compute; None: all, R = N.
        """
        y = self.norm1(x)
        k, v = self.kv(y).unflatten(-1, (2, self.n_heads, -1)).unbind(3)  # (B,T,N,h,e)
        # frames in order of time: the cached ones come first
        if past is not None:
            k, v = (torch.cat(pair, 1) for pair in zip(past, (k, v)))
        # only now: keys and values are those of all tokens, queries those of `rows`
        if rows is not None:
            x, y = x[:, :, rows], y[:, :, rows]
        q = self.q(y).unflatten(-1, (self.n_heads, -1))
        x = x + self.out(frame_attention(q, k, v, context, resolutions, self.attention).flatten(-2))
        return x + self.mlp(self.norm2(x)), (k, v)

    def weights(self, x, row, n_tokens):
        """How token `row` of each frame of x (B,T,N,d) attends to the first `n_tokens` of its own
        frame: (B,T,n_tokens), the mean over heads, summing to one over these tokens."""
        y = self.norm1(x)
        k = self.kv(y[:, :, :n_tokens]).unflatten(-1, (2, self.n_heads, -1))[:, :, :, 0]
        q = self.q(y[:, :, row]).unflatten(-1, (self.n_heads, -1))
        # (B,T,h,n_tokens)
        scores = torch.einsum("bthe,btnhe->bthn", q, k) / q.shape[-1] ** 0.5
        return scores.softmax(-1).mean(2)
