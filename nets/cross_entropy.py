"""Cross-entropy over millions of classes: the loss and its slope in one pass.

A volume's logits are the largest tensor of a training step, 10 million numbers at the preset small.
Their exponentials are computed once: the forward pass keeps softmax minus target, and the backward
pass only multiplies by it. A CPU takes the rows one after the other, so that each stays in the
core's cache. A GPU takes all at once.

Dimensions: N samples, Q queries of each, M = N Q rows of V classes, K classes of a sparse target;
C channels, P cells, R rows of weights a query, V = R P.
"""

import torch


def loss_and_slope(logits, index, share):
    """Cross-entropy (M,) of logits (M,V) against sparse targets, and its slope (M,V).

    index (M,K): target classes; share (M,K): their probabilities. The slope is softmax minus
    target. Both results are float32.
    """
    logits = logits.float()
    chances = logits.softmax(-1)
    # log-sum-exp without exponentials of its own: what the likeliest class lacks to be certain
    normaliser = logits.amax(-1) - chances.amax(-1).log()
    loss = normaliser - (logits.gather(-1, index) * share).sum(-1)
    # in place: the softmax becomes the slope
    return loss, chances.scatter_add_(-1, index, -share)


def rows_at_once(logits):
    """How many rows of logits (M,V) one operation takes: one on a CPU, elsewhere all."""
    # in a compiled graph the loop over rows would be unrolled
    one = logits.device.type == "cpu" and not torch.compiler.is_compiling()
    return 1 if one else max(1, len(logits))


class _SparseCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, index, share):
        loss = logits.new_empty(len(logits), dtype=torch.float32)
        slope = torch.empty_like(logits)
        n = rows_at_once(logits)
        for rows in (slice(i, i + n) for i in range(0, len(logits), n)):
            loss[rows], part = loss_and_slope(logits[rows], index[rows], share[rows])
            slope[rows] = part
        ctx.save_for_backward(slope)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        # d loss / d logits = softmax - target, kept by the forward pass
        return slope * grad[:, None].to(slope.dtype), None, None


def sparse_cross_entropy(logits, index, share):
    """Cross-entropy (M,) of logits (M,V) against sparse target distributions: index (M,K), share
    (M,K) summing to one. Computed in fp32 whatever the logits' type; differentiable in the logits
    alone."""
    return _SparseCrossEntropy.apply(logits, index, share.float())


class _ProductCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, bias, keys, index, share):
        (N, Q, _), (R, C), P = index.shape, weights.shape[2:], keys.shape[2]
        # views: weights that all samples share (1,Q,R,C) are not copied for each
        rounded = weights.to(keys.dtype).expand(N, Q, R, C)
        offset = bias.to(keys.dtype)[..., None].expand(N, Q, R, 1)
        loss = keys.new_empty(N, Q, dtype=torch.float32)
        slope = keys.new_empty(N, Q, R, P)
        if rows_at_once(slope.view(N * Q, -1)) == 1:
            # a volume (R,P) at a time: product, softmax and slope while it is in the cache
            for at in ((n, q) for n in range(N) for q in range(Q)):
                logits = torch.addmm(offset[at], rounded[at], keys[at[0]]).view(1, -1)
                loss[at], part = loss_and_slope(logits, index[at][None], share[at][None])
                slope[at] = part.view(R, P)
        else:
            # all volumes at once (N,Q*R,P)
            logits = torch.baddbmm(offset.flatten(1, 2), rounded.flatten(1, 2), keys)
            found, parts = loss_and_slope(*(x.reshape(N * Q, -1) for x in (logits, index, share)))
            loss.copy_(found.view(N, Q))
            slope.copy_(parts.view(N, Q, R, P))
        ctx.save_for_backward(weights, bias, keys, slope)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weights, bias, keys, slope = ctx.saved_tensors
        Q = slope.shape[1]
        grad = grad[..., None, None]  # (N,Q,1,1)
        slope = slope.flatten(1, 2)  # (N,Q*R,P)
        # the gradient scales the small factors of the products and not the slope of every class
        scaled = (weights * grad).to(keys.dtype).flatten(1, 2)  # (N,Q*R,C)
        d_keys = torch.bmm(slope.mT, scaled).mT  # channels last, see nets/maps.py
        # a channel of ones beside the keys: its weight is the bias, so one product gives both
        # gradients
        ones = keys.new_ones(len(keys), 1, keys.shape[2])
        d_both = torch.bmm(slope, torch.cat([keys, ones], 1).mT).float()
        d_both = d_both.unflatten(1, (Q, -1)) * grad  # (N,Q,R,C+1)
        # shared weights (1,Q,R,C) collect the gradients of all samples
        d_weights = d_both[..., :-1].sum_to_size(weights.shape).to(weights.dtype)
        return d_weights, d_both[..., -1].sum_to_size(bias.shape), d_keys, None, None


def product_cross_entropy(weights, bias, keys, index, share):
    """`sparse_cross_entropy` (N,Q) of logits that are a product and are never stored.

    The logits are weights (N,Q,R,C) or (1,Q,R,C) times keys (N,C,P), plus bias (N,Q,R) or (1,Q,R).
    index (N,Q,K) numbers classes in row-major order of (R,P); share (N,Q,K) sums to one. The
    product is in the keys' type. Differentiable in weights, bias and keys.
    """
    with torch.autocast(keys.device.type, enabled=False):
        return _ProductCrossEntropy.apply(weights, bias, keys, index, share.float())
