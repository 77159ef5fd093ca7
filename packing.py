"""Matrices laid out for generation on a CPU: attached from outside, as lora.py is.

    pack(model, device, dtype)    # in place; then the model generates and scores, and never trains

A generated token multiplies each matrix by one row a sample, so that the time goes into reading
the weights. oneDNN, once it has laid a matrix out in its own order, reads it at the speed of memory
where torch's default, MKL, reached half of it on an AMD Zen 3, and a sixth for 10 samples.
"""
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


def can_pack(device, dtype):
    """The two operators are those that torch.compile uses on x86; no public name leads to them,
    and so they are looked for."""
    return (device.type == "cpu" and dtype == torch.float32
            and torch.backends.cpu.get_cpu_capability().startswith("AVX")
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"))


@torch.no_grad()
def pack(model, device, dtype):
    """Replaces the matrices of a GPT that computes in float32 on an x86 CPU by packed ones, a few
    at a time, so that memory does not double; leaves any other as it is. A tied head is there
    twice then: the embedding looks its rows up in the plain one."""
    if not (isinstance(model, nn.Module) and can_pack(device, dtype)):
        return
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Linear):
                setattr(parent, name, PackedLinear(layer))
