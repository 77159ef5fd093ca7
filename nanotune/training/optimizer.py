"""AdamW, whatever the weights and its moments are kept in.

    weights   optimizer    made by          bytes a parameter, gradient included
    float32   adamw        torch, fused     4 + 4 + 8   = 16
    float32   adamw8bit    torchao          4 + 4 + 2.1 = 10.1
    bfloat16  adamw        RoundedAdamW     2 + 2 + 8   = 12
    bfloat16  adamw8bit    torchao          2 + 2 + 2.1 = 6.1

A bfloat16 has 8 significant bits: next to a weight of 0.1 an update of 1e-5 is far below half a
unit in the last place, and rounding to the nearest would drop it each time. So updates are worked
out in float32 and rounded up or down at random, with the probabilities that make the expectation
exact (stochastic rounding); the draws are torch's, so that who seeds them repeats them.
"""
import logging
import math

import torch

from nanotune.device import lacks_bfloat16
from nanotune.errors import UserError, first_line
from nanotune.training.distributed import total_norm

NAMES = ("adamw", "adamw8bit")
MOMENTS_PER_SCALE = (256, 128, 64)  # of 8-bit moments; the most that divides a tensor
LEAST_8BIT = 4096        # elements; smaller tensors keep float32 moments, as in torchao
CHUNK = 2**22            # elements that an update works on at a time: 16 MB each in float32


def make_optimizer(name, groups, lr, betas, device):
    """The optimizer of a run on these parameter groups; check_8bit comes before."""
    if name == "adamw8bit":
        return make_8bit(groups, lr, betas, in_float32=lacks_bfloat16(device))
    if any(p.dtype != torch.float32 for group in groups for p in group["params"]):
        return RoundedAdamW(groups, lr, betas)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=device.type in ("cpu", "cuda"))


def set_rate(optimizer, lr):
    """Sets the learning rate of all groups: torchao keeps it in a tensor, torch in a number."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


# -----------------------------------------------------------------------------
# bfloat16 weights

def round_stochastically(x):
    """x (float32) as bfloat16, each element up or down with the probabilities that keep its
    expectation. Works in x, which it spoils."""
    bits = x.view(torch.int32)
    bits += torch.empty_like(bits).random_(0, 1 << 16)  # carries into the upper half, or not
    bits &= -1 << 16
    return x.bfloat16()


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) for weights in bfloat16: moments in float32, updates in
    float32 with stochastic rounding. Its state has the names of torch's."""
    def __init__(self, groups, lr, betas, eps=1e-8):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))

    @torch.no_grad()
    def step(self, closure=None):
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
            put(weights, new)


def put(weights, new):
    """Gives weights in bfloat16 their new values, which are in float32 and spoilt. Of weights in
    float32 `new` is the weights themselves."""
    if new.dtype == weights.dtype:
        return
    for part, values in zip(weights.view(-1).split(CHUNK), new.view(-1).split(CHUNK)):
        part.copy_(round_stochastically(values))


class LossScaler(torch.amp.GradScaler):
    """torch's, which with weights in bfloat16 has such gradients to unscale: its CUDA kernel does
    not know them (pytorch issue 127176)."""
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

def check_8bit(device):
    """Raises UserError where torchao is missing, or what compiles its update to machine code."""
    # GPU kernels that a CPU cannot load; what torchao still does in torch's old way
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import torchao.optim  # noqa: F401
    except ImportError as e:
        raise UserError(f"--optimizer=adamw8bit needs torchao ({e}): pip install torchao, or use "
                        "--optimizer=adamw") from None
    try:  # a toy first: the real ones come after the first gradient
        torch.compile(toy_update, fullgraph=True)(torch.ones(8, device=device))
    except Exception as e:  # Inductor, Triton and the C++ compiler each raise their own
        mend = ("a C++ compiler (on Debian and Ubuntu: apt install g++)" if device.type == "cpu"
                else "Triton and a C compiler (on Debian and Ubuntu: apt install gcc)")
        raise UserError(f"--optimizer=adamw8bit compiles its update, which failed here "
                        f"({first_line(e)}): it needs {mend}; or use --optimizer=adamw") from None


def toy_update(x):
    return x * 2 + 1


def moments_per_scale(numel):
    """How many 8-bit moments of a tensor share a scale; None where it keeps float32. gpt2-xl's
    50257 x 1600 embedding is no multiple of 256, torchao's own size, and takes 64."""
    if numel < LEAST_8BIT:
        return None
    return next((block for block in MOMENTS_PER_SCALE if numel % block == 0), None)


def make_8bit(groups, lr, betas, in_float32=False):
    """torchao's AdamW8bit, each tensor with the block size that divides it, or float32 moments;
    in_float32 has bfloat16 weights updated as float32 ones, a tensor at a time, for GPUs that
    bfloat16 is not compiled for. Dettmers et al. 2022, "8-bit Optimizers via Block-wise
    Quantization"."""
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
            with torch._dynamo.utils.disable_cache_limit():  # a function for each shape
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
                     True, False)  # AdamW; rounding comes next
            put(p.detach(), new)

    return FittedAdamW8bit(groups, lr=lr, betas=betas, bf16_stochastic_round=True)


# -----------------------------------------------------------------------------
# state as plain tensors, which is what a checkpoint holds

def plain_state(state):
    """One parameter's state for a file: an 8-bit moment as NAME.codes and NAME.scale."""
    plain = {}
    for name, value in state.items():
        if hasattr(value, "codes"):
            plain |= {f"{name}.codes": value.codes, f"{name}.scale": value.scale}
        else:
            plain[name] = value
    return plain


@torch.no_grad()
def fill_state(optimizer, p, plain):
    """Gives a parameter the state that plain_state made. Raises UserError where it is another
    optimizer's."""
    eight_bit = hasattr(optimizer, "_new_buffer")
    names = {name.removesuffix(".codes") for name in plain if not name.endswith(".scale")}
    if names != {"step", "exp_avg", "exp_avg_sq"}:
        raise UserError(f"the optimizer state holds {', '.join(sorted(names))}, which is not "
                        "AdamW's")
    state = {"step": plain["step"].clone()}
    for name in ("exp_avg", "exp_avg_sq"):
        quantised = f"{name}.codes" in plain
        if eight_bit:
            value = optimizer._new_buffer(p, signed=name == "exp_avg")
        else:
            value = torch.zeros_like(p, dtype=torch.float32)
        if quantised != hasattr(value, "codes"):
            raise UserError("the optimizer state is of --optimizer="
                            f"{NAMES[quantised]}: resume with that")
        if quantised:
            value.codes.copy_(plain[f"{name}.codes"])
            value.scale.copy_(plain[f"{name}.scale"])
        else:
            value.copy_(plain[name])
        state[name] = value
    optimizer.state[p] = state
