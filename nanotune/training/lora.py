"""LoRA (Hu et al. 2021): adds small trainable matrices to a model and freezes its weights.

    add_lora(model, rank=16)     # replaces the layers; model.py does not change
    ...                          # train: only the adapters have gradients and moments
    merge_lora(model)            # a plain GPT again, with the same output

For a layer y = W x the adapter adds SCALE * B A x. A (rank, in) is random and B (out, rank) is
zero, so training begins with the output of the base model.
"""
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

LAYERS = ("c_attn", "c_q", "c_kv", "c_proj", "c_fc")  # all matrices of a block
SCALE = 2.0  # alpha / rank in the paper; alpha = 2 rank is usual


class LoRALinear(nn.Module):
    """A frozen linear layer with an adapter; the adapter's matrices are float32."""
    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        like = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.lora_b = nn.Parameter(torch.empty(base.out_features, rank, **like))

    def init_weights(self, generator: torch.Generator) -> None:
        """Draws A uniformly and sets B to zero."""
        bound = 1 / math.sqrt(self.base.in_features)
        nn.init.uniform_(self.lora_a, -bound, bound, generator=generator)
        nn.init.zeros_(self.lora_b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, in) -> (B, T, out)"""
        low = F.linear(x, self.lora_a.to(x.dtype))  # (B, T, rank)
        return self.base(x) + SCALE * F.linear(low, self.lora_b.to(low.dtype))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Adds the adapter to the base layer in place and returns the layer."""
        weight = self.base.weight
        weight += (self.lora_b @ self.lora_a).mul_(SCALE).to(weight.dtype)
        return self.base


def add_lora(model: nn.Module, rank: int, seed: int = 0) -> None:
    """Freezes the model and adds an adapter to each matrix of its blocks, in place.

    The initial values depend only on the seed; adapters on the meta device are not initialized.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if name in LAYERS:
                adapter = LoRALinear(layer, rank)
                if layer.weight.device.type != "meta":
                    adapter.init_weights(generator)
                setattr(parent, name, adapter)


def merge_lora(model: nn.Module) -> None:
    """Adds each adapter to its matrix and removes it, in place; all weights train again."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, LoRALinear):
                setattr(parent, name, layer.merged())
    model.requires_grad_(True)


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns {name: parameter} of the adapters, {} for a model without adapters."""
    return {name: param for name, param in model.named_parameters()
            if name.endswith((".lora_a", ".lora_b"))}
