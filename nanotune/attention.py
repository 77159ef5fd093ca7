"""Attention and dropout: torch's, or a faster version for training on a CPU.

    y = attention(q, k, v, mask, scale, dropout)    # q (B, nh, T, hs), k and v (B, nh, S, hs)
    x = dropout(x, p, training)

On a CPU torch computes attention with dropout in float32 and keeps three tensors of all pairs of
tokens in memory. Without dropout torch spends as much time on masked pairs as on others. The
version here multiplies a few rows at a time and skips most pairs above the diagonal. It draws the
random numbers for dropout in a sixth of torch's time.
"""
import math

import torch
from torch.nn import functional as F

ROWS = 128  # rows per block: few enough to skip most masked pairs, enough for fast products


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
              scale: float | None, dropout: float = 0.0) -> torch.Tensor:
    """Causal attention: q (B, nh, T, hs), k, v (B, nh, S, hs) -> (B, nh, T, hs). `mask`, (T, S) or
    (B, 1, T, S), is added to the scores and must mask all later tokens. If it is None, only later
    tokens are masked, and T must be S or 1. `scale` None means 1 / sqrt(hs). `dropout` is the rate
    for the attention weights."""
    T, S = q.size(2), k.size(2)
    if (q.device.type == "cpu" and q.requires_grad and torch.is_grad_enabled() and T == S
            and q.dtype != torch.float16 and not torch.compiler.is_compiling()):
        with torch.autocast("cpu", enabled=False):
            scale = q.size(3) ** -0.5 if scale is None else scale
            return BlockAttention.apply(q, k, v, mask, scale, dropout)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale,
                                          is_causal=mask is None and T > 1)


class BlockAttention(torch.autograd.Function):
    """Causal attention, ROWS rows of scores at a time. The weights are kept for the backward pass;
    a weight that dropout drops is kept with a negative sign. Letters: N = B nh, r rows of a block,
    e columns up to the block's end."""
    @staticmethod
    def forward(ctx, q, k, v, mask, scale, p):  # q, k, v (B, nh, T, hs)
        (B, nh, T, _), shape = q.shape, q.shape
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))  # (N, T, hs)
        out, weights = torch.empty_like(q), []
        for begin, end in blocks(T):
            score = torch.bmm(q[:, begin:end], k[:, :end].transpose(1, 2)).mul_(scale)  # (N, r, e)
            if mask is None:
                later = torch.ones(end - begin, end - begin, dtype=torch.bool).triu_(1)
                score[:, :, begin:].masked_fill_(later, -math.inf)
            else:
                score.view(B, nh, *score.shape[1:]).add_(mask[..., begin:end, :end])
            weight = score.softmax(-1)
            if p:
                weight = torch.where(keep_mask(weight.shape, p), weight, -weight)
            out[:, begin:end] = torch.bmm(weight.clamp(min=0) if p else weight, v[:, :end])
            weights.append(weight)
        if p:
            out /= 1 - p
        ctx.save_for_backward(q, k, v, *weights)
        ctx.scale, ctx.p = scale, p
        return out.view(shape)

    @staticmethod
    def backward(ctx, grad):  # (B, nh, T, hs)
        q, k, v, *weights = ctx.saved_tensors
        shape, p, wide = grad.shape, ctx.p, torch.promote_types(q.dtype, torch.float32)
        grad = grad.flatten(0, 1)
        dq, dk, dv = torch.empty_like(q), *(torch.zeros_like(t, dtype=wide) for t in (k, v))
        grad = grad / (1 - p) if p else grad
        for (begin, end), weight in zip(blocks(q.size(1)), weights):
            row, rows = grad[:, begin:end], slice(begin, end)
            used = weight.clamp(min=0) if p else weight
            dv[:, :end] += torch.bmm(used.transpose(1, 2), row)
            dscore = torch.bmm(row, v[:, :end].transpose(1, 2)).mul_(used)  # (N, r, e)
            dscore -= weight.abs().mul_(dscore.sum(-1, keepdim=True))
            dq[:, rows] = torch.bmm(dscore, k[:, :end])
            dk[:, :end] += torch.bmm(dscore.transpose(1, 2), q[:, rows])
        dq, dk = dq.mul_(ctx.scale), dk.mul_(ctx.scale)
        return *(t.to(q.dtype).view(shape) for t in (dq, dk, dv)), None, None, None


def blocks(T):
    return [(begin, min(begin + ROWS, T)) for begin in range(0, T, ROWS)]


def attention_bytes(n_head: int, block_size: int, dtype: torch.dtype) -> int:
    """Returns the bytes of attention weights that attention() keeps for one sequence of a batch, in
    training on a CPU."""
    return n_head * dtype.itemsize * sum((end - begin) * end for begin, end in blocks(block_size))


def keep_mask(shape: torch.Size, p: float) -> torch.Tensor:
    """A bool mask of this shape on the CPU, True with probability 1 - p, rounded to 1 / 65536. Each
    64-bit random number is used for four elements, so this takes a sixth of bernoulli_()'s time."""
    numel, dropped = shape.numel(), min(round(p * 65536), 65535)  # fits in int16 below
    drawn = torch.empty(numel // 4 + 1, dtype=torch.int64).random_(-2**63, None)
    return (drawn.view(torch.int16)[:numel] >= dropped - 32768).view(shape)


def dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """Returns F.dropout(x, p, training); in training on a CPU, keep_mask() draws the mask."""
    if not (training and 0 < p < 1 and x.device.type == "cpu") or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    return (x * keep_mask(x.shape, p)).mul_(1 / (1 - p))
