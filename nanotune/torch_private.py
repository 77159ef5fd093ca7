"""The private names of torch that the project uses, each with its fallback.

Others: subclasses in training/optimizer.py override _unscale_grads_ of GradScaler and _new_buffer
of torchao's AdamW8bit, and head.py reads a tensor's _version.
"""
import contextlib
import inspect

import torch
import torch.nn as nn


def cpu_has_bfloat16() -> bool:
    """Returns whether the CPU multiplies bfloat16 natively, with AMX or avx512_bf16; False if torch
    cannot tell."""
    probes = (getattr(torch.cpu, name, None)
              for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(probe is not None and probe() for probe in probes)


def can_pack_linear(dtype: torch.dtype = torch.float32) -> bool:
    """Returns whether oneDNN can reorder a matrix of this dtype for packed_linear(); else use a
    plain nn.Linear. torch.compile uses the same operators on x86."""
    supported = torch.float32, *[torch.bfloat16] * cpu_has_bfloat16()
    return (dtype in supported and torch.backends.cpu.get_cpu_capability().startswith("AVX")
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"))


def pack_linear(weight: torch.Tensor) -> torch.Tensor:
    """Returns weight (N, K) in oneDNN's order, for packed_linear()."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


# {activation: its (name, algorithm) in _linear_pointwise}
FUSED = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


def packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None,
                  activation: str | None = None) -> torch.Tensor:
    """x (..., K) -> x @ weight.T + bias, (..., N), through an activation, a key of FUSED."""
    name, algorithm = FUSED[activation]
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], algorithm)


def is_compiled(model) -> bool:
    """Returns whether model.compile() is in effect; False if torch cannot tell."""
    return getattr(model, "_compiled_call_impl", None) is not None


def undo_compile(model: nn.Module) -> None:
    """Makes the model eager again after model.compile(); torch has no public function for it."""
    model._compiled_call_impl = None


def no_recompile_limit() -> contextlib.AbstractContextManager:
    """A context in which a function may be compiled for any number of shapes. Outside it, torch
    runs the function eagerly from the ninth shape on."""
    limit = getattr(torch._dynamo.utils, "disable_cache_limit", None)
    return limit() if limit else contextlib.nullcontext()


def without_dynamo(optimizer: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Returns the optimizer class without torch's wrappers for compiled optimizers, whose import of
    torch._dynamo takes about a second. Our optimizers are never compiled."""
    methods = {name: inspect.unwrap(getattr(optimizer, name))
               for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict")}
    step = torch.no_grad()(inspect.unwrap(optimizer.step))
    return type(optimizer.__name__, (optimizer,), {"step": step, **methods})
