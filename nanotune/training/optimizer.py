"""AdamW for float32 or bfloat16 weights, with float32 or 8-bit moments; Adafactor for float32.

    weights   optimizer    implementation   bytes per parameter: weight + gradient + moments
    float32   adamw        torch, fused     4 + 4 + 8   = 16
    float32   adamw8bit    torchao          4 + 4 + 2.1 = 10.1
    bfloat16  adamw        RoundedAdamW     2 + 2 + 8   = 12
    bfloat16  adamw8bit    torchao          2 + 2 + 2.1 = 6.1
    float32   adafactor    torch            4 + 4 + 0   = 8, and 4 per row and column of a matrix

A bfloat16 has 8 significant bits: an update of 1e-5 to a weight of 0.1 is far below half a unit in
the last place, and rounding to nearest would drop it at every step. So updates are computed in
float32 and rounded stochastically: up or down at random, so that the expectation is exact. The
random numbers are torch's; seeding torch makes them reproducible.
"""
import logging
import math
from collections.abc import Sequence

import torch

from nanotune.device import compile_error, lacks_bfloat16
from nanotune.errors import UserError
from nanotune.torch_private import no_recompile_limit, without_dynamo
from nanotune.training.distributed import total_norm

NAMES = ("adamw", "adamw8bit", "adafactor")
MOMENTS_PER_SCALE = (256, 128, 64)  # of 8-bit moments; the first that divides a tensor's size
LEAST_8BIT = 4096        # elements; smaller tensors have float32 moments, as in torchao
CHUNK = 2**22            # elements to update at a time: 16 MB per buffer in float32


def make_optimizer(name: str, groups: list[dict], lr: float, betas: tuple[float, float],
                   device: torch.device) -> torch.optim.Optimizer:
    """Returns AdamW (Loshchilov and Hutter 2019), or Adafactor (Shazeer and Stern 2018), which uses
    no betas, on these parameter groups.

    `name` is one of NAMES; for adamw8bit call check_8bit first. The dtype of the weights selects
    the implementation: see the table at the top of this file.
    """
    if name == "adamw8bit":
        return make_8bit(groups, lr, betas, in_float32=lacks_bfloat16(device))
    if name == "adafactor":
        # torch squares the first eps, so 1e-15 is the paper's 1e-30. torch's default, None, gives
        # 1e-7, which is larger than the mean squared gradient of a large model
        return without_dynamo(torch.optim.Adafactor)(groups, lr=lr, eps=(1e-15, 1e-3))
    if any(p.dtype != torch.float32 for group in groups for p in group["params"]):
        return without_dynamo(RoundedAdamW)(groups, lr, betas)
    return without_dynamo(torch.optim.AdamW)(groups, lr=lr, betas=betas,
                                             fused=device.type in ("cpu", "cuda"))


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of all groups; torchao keeps it in a tensor, torch in a float."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


# -----------------------------------------------------------------------------
# bfloat16 weights

def round_stochastically(x: torch.Tensor) -> torch.Tensor:
    """Returns float32 x as bfloat16, each element rounded up or down so that its expectation is
    exact. Overwrites x."""
    bits = x.view(torch.int32)
    bits += torch.empty_like(bits).random_(0, 1 << 16)  # may carry into the upper half
    bits &= -1 << 16
    return x.bfloat16()


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) for bfloat16 weights, with float32 moments and
    stochastic rounding. Its state has the same keys as torch.optim.AdamW's."""
    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float],
                 eps: float = 1e-8) -> None:
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates each parameter that has a gradient; `closure` is ignored."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)

    def update(self, p, group):
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        step_size = group["lr"] / (1 - beta1 ** state["step"].item())
        correction = math.sqrt(1 - beta2 ** state["step"].item())
        whole = (p.view(-1), p.grad.reshape(-1), state["exp_avg"].view(-1),
                 state["exp_avg_sq"].view(-1))
        for weights, grad, mean, square in zip(*(t.split(CHUNK) for t in whole)):
            grad, new = grad.float(), weights.float()
            mean.lerp_(grad, 1 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            new.mul_(1 - group["lr"] * group["weight_decay"])
            new.addcdiv_(mean, (square.sqrt() / correction).add_(group["eps"]), value=-step_size)
            round_into(weights, new)


def round_into(weights, new):
    """Rounds the float32 values `new` into bfloat16 weights, and overwrites `new`. Does nothing for
    float32 weights: `new` is then a view of them."""
    if new.dtype == weights.dtype:
        return
    for part, values in zip(weights.view(-1).split(CHUNK), new.view(-1).split(CHUNK)):
        part.copy_(round_stochastically(values))


class LossScaler(torch.amp.GradScaler):
    """GradScaler that also unscales bfloat16 gradients, for which torch has no CUDA kernel
    (pytorch issue 127176)."""
    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]
                 if p.grad is not None]
        if not any(grad.dtype == torch.bfloat16 for grad in grads):
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        for grad in grads:
            grad.mul_(inv_scale)  # a power of 2: exact
        found_inf.copy_(~total_norm(grads).isfinite())
        return {found_inf.device: found_inf}


# -----------------------------------------------------------------------------
# 8-bit moments

def check_8bit(device: torch.device) -> None:
    """Raises UserError if torchao or the compiler that its update needs is missing."""
    # hides torchao's warnings: GPU kernels that a CPU cannot load, deprecated APIs of torch
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import torchao.optim  # noqa: F401
    except ImportError as e:
        raise UserError(f"--optimizer=adamw8bit needs torchao ({e}): pip install torchao, or use "
                        "--optimizer=adamw") from None
    # a small function: the real one compiles only after the first gradient
    small = torch.compile(lambda x: x * 2 + 1, fullgraph=True)
    failed = compile_error(lambda: small(torch.ones(8, device=device)))
    if failed:
        needed = ("a C++ compiler (on Debian and Ubuntu: apt install g++)" if device.type == "cpu"
                  else "Triton and a C compiler (on Debian and Ubuntu: apt install gcc)")
        raise UserError(f"--optimizer=adamw8bit cannot compile its update ({failed}): install "
                        f"{needed}, or use --optimizer=adamw")


def moments_per_scale(numel: int) -> int | None:
    """Returns how many 8-bit moments of a tensor share a scale, or None for float32 moments.

    torchao's own 256 does not divide gpt2-xl's 50257 x 1600 embedding, which gets 64.
    """
    if numel < LEAST_8BIT:
        return None
    return next((block for block in MOMENTS_PER_SCALE if numel % block == 0), None)


def make_8bit(groups, lr, betas, in_float32=False):
    """torchao's AdamW8bit (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"),
    with the block size of moments_per_scale for each tensor.

    in_float32 updates bfloat16 weights in float32, one tensor at a time: for GPUs on which
    bfloat16 does not compile.
    """
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import OptimState8bit

    class FittedAdamW8bit(AdamW8bit):
        def _new_buffer(self, p, signed):
            block = moments_per_scale(p.numel())
            if block is None:
                return torch.zeros_like(p, dtype=torch.float32)
            return OptimState8bit.zeros(p.shape, signed, block, p.device, dtype=p.dtype)

        @torch.no_grad()
        def step(self, closure=None):
            if not in_float32:
                return super().step(closure)
            from torchao.optim.adam import single_param_adam
            compiled = torch.compile(single_param_adam, fullgraph=True, dynamic=False)
            with no_recompile_limit():  # one compiled function per shape
                for group in self.param_groups:
                    for p in group["params"]:
                        if p.grad is not None:
                            self.update(p, group, compiled)

        def update(self, p, group, compiled):
            state, new = self.state[p], p.detach().float()
            if not state:
                state |= {"step": torch.tensor(0.0), "exp_avg": self._new_buffer(p, True),
                          "exp_avg_sq": self._new_buffer(p, False)}
            state["step"] += 1
            compiled(new, p.grad.float(), state["step"], state["exp_avg"], state["exp_avg_sq"],
                     None, group["lr"], *group["betas"], group["weight_decay"], group["eps"],
                     True, False)  # AdamW without rounding: round_into() rounds
            round_into(p.detach(), new)

    return FittedAdamW8bit(groups, lr=lr, betas=betas, bf16_stochastic_round=True)


# -----------------------------------------------------------------------------
# optimizer state as plain tensors, for checkpoints

def moment_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of a parameter's moment, by its name in the optimizer's state."""
    factored = {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, *shape[-1:])}
    return factored.get(name, tuple(shape))


def plain_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns one parameter's state as plain tensors, not copies; an 8-bit moment becomes
    NAME.codes and NAME.scale."""
    plain = {}
    for name, value in state.items():
        if hasattr(value, "codes"):
            plain |= {f"{name}.codes": value.codes, f"{name}.scale": value.scale}
        else:
            plain[name] = value
    return plain


@torch.no_grad()
def fill_state(optimizer: torch.optim.Optimizer, p: torch.Tensor,
               plain: dict[str, torch.Tensor]) -> None:
    """Copies a state from plain_state() into the optimizer's state of parameter `p`.

    Raises UserError if the state is of another optimizer.
    """
    eight_bit = hasattr(optimizer, "_new_buffer")
    names = {name.removesuffix(".codes") for name in plain if not name.endswith(".scale")}
    factored = isinstance(optimizer, torch.optim.Adafactor)
    moments = {"exp_avg", "exp_avg_sq"} if not factored else (
        {"row_var", "col_var"} if p.dim() > 1 else {"variance"})
    if names != moments | {"step"}:
        raise UserError(f"the optimizer state holds {', '.join(sorted(names))}, which is not "
                        f"{'Adafactor' if factored else 'AdamW'}'s")
    if factored:
        optimizer.state[p] = {"step": plain["step"].clone()} | {
            name: torch.empty(moment_shape(name, p.shape), device=p.device).copy_(plain[name])
            for name in moments}
        return
    state = {"step": plain["step"].clone()}
    for name in ("exp_avg", "exp_avg_sq"):
        quantized = f"{name}.codes" in plain
        if eight_bit:
            value = optimizer._new_buffer(p, signed=name == "exp_avg")
        else:
            value = torch.zeros_like(p, dtype=torch.float32)
        if quantized != hasattr(value, "codes"):
            raise UserError("the optimizer state is of --optimizer="
                            f"{NAMES[quantized]}: resume with that optimizer")
        if quantized:
            value.codes.copy_(plain[f"{name}.codes"])
            value.scale.copy_(plain[f"{name}.scale"])
        else:
            value.copy_(plain[name])
        state[name] = value
    optimizer.state[p] = state
