"""The loss of a language-model head, a few rows of logits at a time.

    loss = head_loss(x, weight, targets, dtype)    # summed over the targets that are not -1

The logits of all rows are the largest tensor of a small model by far: they never exist at once.
Letters in the shape comments: N rows, C channels, V vocabulary, n rows of a chunk.
"""
from typing import NamedTuple

import torch

from nanotune.text.loader import IGNORED


class HeadChunk(NamedTuple):
    """How much the head works on at a time."""
    rows: int          # of logits that exist at once, in float32; in half precision twice as many
    softmax_rows: int  # of those together through the softmax's passes: a CPU's cache holds them
    ids: int           # of the vocabulary in one matrix product


ALL = 2**31  # more than there are
# on a CPU 256 * V * 4 bytes = 51 MB for GPT-2; on a GPU, of whichever make, as many as keep it busy
HEAD_CHUNK = {"cpu": HeadChunk(256, 16, 2048), "cuda": HeadChunk(1024, ALL, ALL)}


def head_chunk(device_type, dtype):
    rows, softmax_rows, ids = HEAD_CHUNK.get(device_type, HEAD_CHUNK["cuda"])
    if torch.compiler.is_compiling():  # Inductor makes one pass of several
        softmax_rows = ids = ALL
    return HeadChunk(rows * 4 // dtype.itemsize, softmax_rows, ids)


def head_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
              dtype: torch.dtype) -> torch.Tensor:
    """x (N, C), weight (V, C), targets (N,) -> the sum of the cross-entropies of x @ weight.T, in
    nats, over the targets that are not -1; products are computed in `dtype`."""
    device = x.device.type
    # on a GPU the indexing is a sync point; compiled graphs want fixed shapes
    if device == "cpu" and not torch.compiler.is_compiling():
        counts = targets != IGNORED  # of a prompt and its short answer a tenth may count: the head,
        x, targets = x[counts], targets[counts]  # most of a small model, skips the rest
    with torch.autocast(device, enabled=False):  # `dtype` says it, chunk by chunk
        return HeadLoss.apply(x, weight, targets, dtype, torch.is_grad_enabled())


class HeadLoss(torch.autograd.Function):
    """head_loss() without the selection of rows.

    The gradients are worked out while a chunk's logits are at hand, (p - 1[target]) times the
    other factor, so that the logits of all rows, the largest tensor of a small GPT by far, never
    exist and no softmax is computed twice. The idea is that of Liger Kernel, Hsu et al. 2024.
    """
    @staticmethod
    def forward(ctx, x, weight, targets, dtype, with_grad):  # x (N, C), weight (V, C), targets (N,)
        size = head_chunk(x.device.type, dtype)
        # weights kept in less than dtype are cast in parts, where it goes by parts, each time anew
        in_parts = weight.dtype.itemsize < dtype.itemsize and len(weight) > size.ids
        w = weight if in_parts else weight.to(dtype)
        loss = torch.zeros((), device=x.device)
        dx = torch.empty_like(x) if with_grad else None
        dw = (torch.zeros_like(weight, dtype=torch.float32)
              if with_grad and ctx.needs_input_grad[1] else None)  # none where it is frozen
        for begin in range(0, len(x), size.rows):
            rows = slice(begin, begin + size.rows)
            xc = x[rows].to(dtype)                # (n, C)
            logits = times_head(xc, w, size.ids)  # (n, V)
            for some, target in zip(logits.split(size.softmax_rows),
                                    targets[rows].split(size.softmax_rows)):
                loss += cross_entropy_(some, target, with_grad)
            if with_grad:  # they are p - 1[target] now
                dx[rows] = times_head_back(logits, w, size.ids)
            if dw is not None:
                add_product(dw, logits, xc, size.ids)
        ctx.dx, ctx.dw = dx, dw
        return loss

    @staticmethod
    def backward(ctx, grad):
        assert ctx.dx is not None, "a second backward of one loss"
        dx, dw = ctx.dx.mul_(grad), None if ctx.dw is None else ctx.dw.mul_(grad)
        ctx.dx = ctx.dw = None  # scaled in place, for want of memory: good for one backward
        return dx, dw, None, None, None


def cross_entropy_(logits, targets, with_grad):
    """logits (n, V), targets (n,) -> the sum of their cross-entropies, worked out in float32;
    with_grad leaves its gradient, p - 1[target], in the place of the logits."""
    counts = (targets != IGNORED).float()[:, None]
    targets = targets.clamp(min=0)[:, None]
    p = logits.float()
    highest, at_target = p.amax(-1, keepdim=True), p.gather(-1, targets)
    p = p.sub_(highest).exp_()
    total = p.sum(-1, keepdim=True)
    if with_grad:
        p.mul_(counts / total).scatter_add_(-1, targets, -counts)
        if p.dtype != logits.dtype:
            logits.copy_(p)
    return ((total.log() + highest - at_target) * counts).sum()


def times_head(x, w, span):
    """x (n, C) @ w.T -> (n, V), in the dtype of x, `span` ids at a time: so a w (V, C) of another
    dtype need not be cast whole, and MKL is faster than with all of them."""
    if len(w) <= span:
        return x @ w.t()
    out = x.new_empty(len(x), len(w))
    for columns, part in zip(out.split(span, 1), w.split(span)):
        columns.copy_(x @ part.to(x.dtype).t())
    return out


def times_head_back(p, w, span):
    """p (n, V) @ w -> (n, C), likewise where the dtypes differ."""
    if w.dtype == p.dtype:
        return p @ w
    return sum(some @ part.to(p.dtype) for some, part in zip(p.split(span, 1), w.split(span)))


def add_product(dw, p, x, span):
    """dw (V, C) += p.T @ x, where dw is in float32; for p and x in half precision `span` ids at a
    time, since PyTorch makes a float32 copy of what it adds to a float32."""
    if p.dtype == dw.dtype:
        dw.addmm_(p.t(), x)
        return
    scale = 16 if p.dtype == torch.float16 else 1  # sums over rows beyond 65504 would overflow
    x = x / scale
    for part, some in zip(dw.split(span), p.split(span, 1)):
        part.add_(some.t() @ x, alpha=scale)


def head_bytes(weight: torch.Tensor, n_rows: int, device_type: str,
               dtype: torch.dtype) -> tuple[int, int]:
    """(bytes while the loss is computed, bytes at the end of the backward pass) for a head (V, C)
    and n_rows of a batch: a few rows of logits, the head in the dtype of the product, its gradient
    in float32; at the end its gradient and that of the embedding, before they are added."""
    (V, C), e = weight.shape, dtype.itemsize
    size = head_chunk(device_type, dtype)
    rows, ids = min(size.rows, n_rows), min(size.ids, V)
    during = rows * V * e
    if e < 4:
        during += min(size.softmax_rows, rows) * V * 4
    if weight.dtype != dtype:
        during += (ids if weight.dtype.itemsize < e else V) * C * e
    if not weight.requires_grad:
        return during, 0
    during += weight.numel() * 4
    if e < 4:
        during += ids * C * e
    return during, 2 * weight.numel() * weight.element_size()
