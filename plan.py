"""What a run will take, told before it begins: tokens, epochs, parameters, disk."""
import shutil
import time
from functools import lru_cache

import torch

ADAMW_COPIES = 3  # a state file holds the weights and two moments of them


def describe(n_params, tokens_per_iter, iters, train_tokens, val_tokens, world, dtype, compiled,
             out_dir, dataset):
    """The plan as lines of text. Sizes in bytes are those of a save at float32."""
    epochs = iters * tokens_per_iter / train_tokens
    model_bytes = 4 * n_params
    state_bytes = ADAMW_COPIES * model_bytes
    ranks = f" x {world.size} processes" if world.size > 1 else ""
    precision = str(dtype).removeprefix("torch.") + (", compiled" if compiled else "")
    return [
        f"model: {n_params / 1e6:.2f}M parameters, {world.device}{ranks}, {precision}",
        f"data: {dataset}, {train_tokens:,} training tokens, {val_tokens:,} for validation",
        f"tokens per iteration: {tokens_per_iter:,}; {iters} iterations make {epochs:.2f} epochs "
        f"(1 epoch = {train_tokens / tokens_per_iter:.1f} iterations)",
        f"a save takes {spell_bytes(model_bytes)} (ckpt.pt) + {spell_bytes(state_bytes)} "
        f"(state.pt) in {out_dir}, where {spell_bytes(shutil.disk_usage(out_dir).free)} are free",
    ]


def spell_bytes(n):
    for unit in ("bytes", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"


@lru_cache(maxsize=1)
def matmul_peak(device, dtype):
    """Floating-point operations a second that a matrix product of this dtype reaches on the
    device, measured on the spot: what MFU is a share of. The product grows until it takes 10 ms,
    since a CPU may take seconds where it has no instructions for the dtype (float16)."""
    peak, size, seconds = 0.0, 256, 0.0
    while seconds < 0.01 and size <= 8192:
        a = torch.ones(size, size, device=device, dtype=dtype)
        a @ a  # warms up
        synchronize(device)
        began = time.perf_counter()
        a @ a
        synchronize(device)
        seconds = time.perf_counter() - began
        peak = max(peak, 2 * size**3 / seconds)
        size *= 2
    return peak


def synchronize(device):
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
