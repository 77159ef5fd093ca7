"""Matrices as generation wants them: attached from outside, as lora.py is.

    pack(model, device, dtype)    # in place; then the model generates and scores, and never trains

A generated token multiplies each matrix by one row a sample, so that the time goes into reading
the weights. In half precision they are cast once, so that half the bytes are kept and read. In
float32 on an x86 CPU oneDNN lays them out in its own order, and reads them at the speed of memory
where torch's default, MKL, reached half of it on an AMD Zen 3, and a sixth for 10 samples.
"""
from functools import partial

import torch
import torch.nn as nn

from model import Linear


class PackedLinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def cast(linear, dtype):
    """The layer in the dtype that autocast would cast it to at each use."""
    linear.weight = nn.Parameter(linear.weight.detach())  # a tied head's own from here on
    return linear.to(dtype)


def can_pack(device, dtype):
    """The two operators are those that torch.compile uses on x86; no public name leads to them,
    and so they are looked for."""
    return (device.type == "cpu" and dtype == torch.float32
            and torch.backends.cpu.get_cpu_capability().startswith("AVX")
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"))


@torch.no_grad()
def pack(model, device, dtype):
    """Replaces the matrices of a GPT, one at a time, so that memory does not double: in half
    precision (under autocast) by cast ones, in float32 on an x86 CPU by packed ones; leaves any
    other as it is. A tied head is there twice then: the embedding looks its rows up in the old.
    Switches cuDNN's attention off, for the whole process."""
    if not isinstance(model, nn.Module):  # an ONNX file's
        return
    # cuDNN plans anew, for longer than a token takes, for each length that a cache comes to
    torch.backends.cuda.enable_cudnn_sdp(False)
    if dtype != torch.float32:
        made = partial(cast, dtype=dtype)
    elif can_pack(device, dtype):
        made = PackedLinear
    else:
        return
    for parent in [module for module in model.modules() if not isinstance(module, Linear)]:
        for name in [name for name, layer in parent.named_children() if isinstance(layer, Linear)]:
            setattr(parent, name, made(getattr(parent, name)))
