"""The head of a language model: its logits, and the loss computed from a few rows at a time.

    logits = head(x)                             # Head is a matrix without bias
    loss = head_loss(x, head, targets, dtype)    # summed over the targets that are not -1

head_loss() never has all logits in memory: they are by far the largest tensor of a small model.
Letters in the shape comments: N rows, C channels, V vocabulary, n rows of a chunk.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F

from nanotune.text.loader import IGNORED


class Head(nn.Linear):
    """A linear layer without bias from C channels to the logits of V ids.

    In half precision it multiplies by its weights minus their mean row. This subtracts the same
    number from all logits of a row; that number is added back in float32. The logits of the
    released GPT-2 are near -100, where neighboring bfloat16 numbers are 0.5 apart. Minus their mean
    they are small.
    """
    def __init__(self, n_embd: int, n_vocab: int) -> None:
        super().__init__(n_embd, n_vocab, bias=False)
        self.keeping, self.copy = False, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., C) -> logits (..., V), in float32 if the product is in half precision."""
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        if not is_half(dtype):
            return F.linear(x, self.weight.to(x.dtype))
        weight, mean = self.centred(dtype)
        return add_mean(F.linear(x.to(dtype), weight), x, mean)

    def centred(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (the weights minus their mean row in `dtype`, (V, C); that row in float32, (C,)).
        The result is cached if the weights are frozen, and within keep()."""
        if torch.compiler.is_compiling():
            return centre(self.weight, dtype)
        now = dtype, self.weight.data_ptr(), self.weight._version
        if self.copy is None or self.copy[0] != now:
            self.copy = now, centre(self.weight, dtype)
        result = self.copy[1]
        if self.weight.requires_grad and not self.keeping:
            self.copy = None
        return result

    @contextmanager
    def keep(self) -> Iterator[None]:
        """A context in which the weights do not change, so that they are centred only once."""
        self.keeping = True
        try:
            yield
        finally:
            self.keeping, self.copy = False, None


@torch.no_grad()
def centre(weight, dtype, span=2048):
    """weight (V, C) -> (weight minus its mean row, in `dtype`; the mean row, (C,) float32). Works
    on `span` rows at a time, to save memory."""
    mean = weight.mean(0, dtype=torch.float32)
    if torch.compiler.is_compiling():  # Inductor fuses the subtraction and the cast
        return (weight - mean).to(dtype), mean
    centred = torch.empty_like(weight, dtype=dtype, requires_grad=False)
    for out, rows in zip(centred.split(span), weight.split(span)):
        out.copy_(rows - mean)
    return centred, mean


def is_half(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 2


def add_mean(logits: torch.Tensor, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """logits (..., V) + x (..., C) @ mean (C,), in float32."""
    return logits.float().add_((x.float() * mean).sum(-1, keepdim=True))


class HeadChunk(NamedTuple):
    """The sizes of the chunks that the head computes."""
    rows: int          # rows of logits at once in float32; twice as many in half precision
    softmax_rows: int  # rows of one softmax: few enough for a CPU's cache
    ids: int           # ids of the vocabulary in one matrix product


ALL = 2**31  # no limit
# 256 rows of GPT-2 in float32 take 51 MB; GPUs need more rows to be busy
HEAD_CHUNK = {"cpu": HeadChunk(256, 16, 2048), "cuda": HeadChunk(1024, ALL, ALL)}


def head_chunk(device_type: str, dtype: torch.dtype) -> HeadChunk:
    """Returns the sizes to use for products in `dtype` on a device."""
    rows, softmax_rows, ids = HEAD_CHUNK.get(device_type, HEAD_CHUNK["cuda"])
    if torch.compiler.is_compiling():  # Inductor fuses the passes
        softmax_rows = ids = ALL
    return HeadChunk(rows * 4 // dtype.itemsize, softmax_rows, ids)


def head_loss(x: torch.Tensor, head: Head, targets: torch.Tensor,
              dtype: torch.dtype) -> torch.Tensor:
    """x (N, C), targets (N,) -> the cross-entropy of the head's logits, () in nats, summed over the
    targets that are not -1. Matrix products are computed in `dtype`, sums in float32; both in
    float64 if that is `dtype`.

    In half precision the logits are computed from the centred weights. This changes neither the
    softmax nor the gradient of x, since the gradients of a row of logits sum to zero."""
    device = x.device.type
    # skips rows without a target: 9 of 10 for a prompt with a short answer. Not on a GPU, where
    # indexing synchronizes, and not in compiled code, which needs fixed shapes
    if device == "cpu" and not torch.compiler.is_compiling():
        counts = targets != IGNORED
        x, targets = x[counts], targets[counts]
    with torch.autocast(device, enabled=False):  # HeadLoss casts to `dtype` by chunks
        w = head.centred(dtype)[0] if is_half(dtype) else None
        return HeadLoss.apply(x, head.weight, w, targets, dtype, torch.is_grad_enabled())


class HeadLoss(torch.autograd.Function):
    """head_loss() without the selection of rows.

    The forward pass also computes the gradients, from p - 1[target] of each chunk of logits, so no
    softmax is computed twice. As in Liger Kernel, Hsu et al. 2024.
    """
    @staticmethod
    def forward(ctx, x, weight, w, targets, dtype, with_grad):
        # x (N, C), weight (V, C), targets (N,); w (V, C), weight in `dtype` and centred, or None
        size = head_chunk(x.device.type, dtype)
        if w is None:
            # weights of a smaller dtype are cast in parts, again for each chunk of rows
            in_parts = weight.dtype.itemsize < dtype.itemsize and len(weight) > size.ids
            w = weight if in_parts else weight.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        loss = torch.zeros((), device=x.device, dtype=wide)
        dx = torch.empty_like(x) if with_grad else None
        dw = (torch.zeros_like(weight, dtype=wide)
              if with_grad and ctx.needs_input_grad[1] else None)  # None: the head is frozen
        for begin in range(0, len(x), size.rows):
            rows = slice(begin, begin + size.rows)
            xc = x[rows].to(dtype)                # (n, C)
            logits = times_head(xc, w, size.ids)  # (n, V)
            for some, target in zip(logits.split(size.softmax_rows),
                                    targets[rows].split(size.softmax_rows)):
                loss += cross_entropy_(some, target, with_grad)
            if with_grad:  # logits now holds p - 1[target]
                dx[rows] = times_head_back(logits, w, size.ids)
            if dw is not None:
                add_product(dw, logits, xc, size.ids)
        ctx.dx, ctx.dw = dx, dw
        return loss

    @staticmethod
    def backward(ctx, grad):
        assert ctx.dx is not None, "backward() ran twice for one loss"
        dx, dw = ctx.dx.mul_(grad), None if ctx.dw is None else ctx.dw.mul_(grad)
        ctx.dx = ctx.dw = None  # scaled in place, to save memory: only one backward is possible
        return dx, dw, None, None, None, None


def cross_entropy_(logits, targets, with_grad):
    """logits (n, V), targets (n,) -> the sum of their cross-entropies, computed in float32.
    If with_grad, overwrites the logits with their gradient, p - 1[target]."""
    p = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counts = (targets != IGNORED).to(p.dtype)[:, None]
    targets = targets.clamp(min=0)[:, None]
    highest, at_target = p.amax(-1, keepdim=True), p.gather(-1, targets)
    p = p.sub_(highest).exp_()
    total = p.sum(-1, keepdim=True)
    if with_grad:
        p.mul_(counts / total).scatter_add_(-1, targets, -counts)
        if p.dtype != logits.dtype:
            logits.copy_(p)
    return ((total.log() + highest - at_target) * counts).sum()


def times_head(x, w, span):
    """x (n, C) @ w.T -> (n, V), in the dtype of x, `span` ids at a time: a w (V, C) of another
    dtype is then not cast as a whole, and MKL is faster."""
    if len(w) <= span:
        return x @ w.t()
    out = x.new_empty(len(x), len(w))
    for columns, part in zip(out.split(span, 1), w.split(span)):
        columns.copy_(x @ part.to(x.dtype).t())
    return out


def times_head_back(p, w, span):
    """p (n, V) @ w -> (n, C), `span` ids at a time if the dtypes differ."""
    if w.dtype == p.dtype:
        return p @ w
    return sum(some @ part.to(p.dtype) for some, part in zip(p.split(span, 1), w.split(span)))


def add_product(dw, p, x, span):
    """dw (V, C) float32 += p.T @ x. If p and x are in half precision, `span` ids at a time, since
    PyTorch copies the product to float32 before it adds it."""
    if p.dtype == dw.dtype:
        dw.addmm_(p.t(), x)
        return
    scale = 16 if p.dtype == torch.float16 else 1  # float16 sums above 65504 overflow
    x = x / scale
    for part, some in zip(dw.split(span), p.split(span, 1)):
        part.add_(some.t() @ x, alpha=scale)


def head_bytes(weight: torch.Tensor, n_rows: int, device_type: str,
               dtype: torch.dtype) -> tuple[int, int]:
    """Returns (bytes while the loss is computed, bytes at the end of the backward pass) of a head
    (V, C) and a batch of n_rows. In the loss: a chunk of logits, the cast head, the head's gradient
    in float32. At the end: the gradients of the head and of the embedding, before they are added.
    A frozen head keeps its cast copy."""
    (V, C), e = weight.shape, dtype.itemsize
    size = head_chunk(device_type, dtype)
    rows, ids = min(size.rows, n_rows), min(size.ids, V)
    during = rows * V * e
    if e < 4:
        during += min(size.softmax_rows, rows) * V * 4
    cast = 0
    if is_half(dtype) or weight.dtype != dtype:
        cast = (ids if weight.dtype.itemsize < e else V) * C * e
    during += cast
    if not weight.requires_grad:
        return during, cast if is_half(dtype) else 0
    during += weight.numel() * 4
    if e < 4:
        during += ids * C * e
    return during, 2 * weight.numel() * weight.element_size()
