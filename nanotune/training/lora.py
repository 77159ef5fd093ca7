"""LoRA: a frozen model learns by small matrices beside its own (Hu et al. 2021).

    add_lora(model, rank=16)     # from outside; the model knows nothing of it
    ...                          # train: only the adapters have gradients and moments
    merge_lora(model)            # a plain GPT again, which computes the same

For a layer y = W x the adapter adds SCALE * B A x, A (rank, in) drawn at random, B (out, rank)
zeros, so that training begins with the model as it was.
"""
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

LAYERS = ("c_attn", "c_proj", "c_fc")  # of attention and MLP: all matrices of a block
SCALE = 2.0  # LoRA's alpha / rank, at the usual alpha = 2 rank


class LoRALinear(nn.Module):
    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        like = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.lora_b = nn.Parameter(torch.empty(base.out_features, rank, **like))

    def init_weights(self, generator):
        bound = 1 / math.sqrt(self.base.in_features)
        nn.init.uniform_(self.lora_a, -bound, bound, generator=generator)
        nn.init.zeros_(self.lora_b)

    def forward(self, x):
        low = F.linear(x, self.lora_a.to(x.dtype))  # (B, T, rank)
        return self.base(x) + SCALE * F.linear(low, self.lora_b.to(low.dtype))

    @torch.no_grad()
    def merged(self):
        weight = self.base.weight
        weight += (self.lora_b @ self.lora_a).mul_(SCALE).to(weight.dtype)
        return self.base


def add_lora(model, rank, seed=0):
    """Freezes the model and puts an adapter beside each matrix of its blocks, in place. The draws
    depend on the seed alone."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if name in LAYERS:
                adapter = LoRALinear(layer, rank)
                if layer.weight.device.type != "meta":
                    adapter.init_weights(generator)
                setattr(parent, name, adapter)


def merge_lora(model):
    """Adds each adapter to its matrix and takes it away, in place; all weights train again."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, LoRALinear):
                setattr(parent, name, layer.merged())
    model.requires_grad_(True)


def adapters(model):
    """{name: parameter} of the adapters; empty for a model without."""
    return {name: param for name, param in model.named_parameters()
            if name.endswith((".lora_a", ".lora_b"))}
