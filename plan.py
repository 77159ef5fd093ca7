"""What a run will take, told before it begins: tokens, epochs, parameters, disk."""
import shutil
import time
from functools import lru_cache
from pathlib import Path

import torch

ADAMW_COPIES = 3  # a state file holds the weights and two moments of them


def describe(n_params, tokens_per_iter, iters, train_tokens, val_tokens, world, dtype, compiled,
             dataset):
    """The plan as lines of text."""
    epochs = iters * tokens_per_iter / train_tokens
    ranks = f" x {world.size} processes" if world.size > 1 else ""
    precision = str(dtype).removeprefix("torch.") + (", compiled" if compiled else "")
    return [
        f"model: {n_params / 1e6:.2f}M parameters, {world.device}{ranks}, {precision}",
        f"data: {dataset}, {train_tokens:,} training tokens, {val_tokens:,} for validation",
        f"tokens per iteration: {tokens_per_iter:,}; {iters} iterations make {epochs:.2f} epochs "
        f"(1 epoch = {train_tokens / tokens_per_iter:.1f} iterations)",
    ]


def describe_saves(n_params, out_dir, keep_states, shares):
    """What saves take on disk and, where the model is in shares, in memory: lines of text, the
    last of them a warning where the disk cannot hold it. Sizes are those of float32."""
    model_bytes = 4 * n_params
    state_bytes = ADAMW_COPIES * model_bytes
    free = shutil.disk_usage(out_dir).free
    # the newest is written whole before an old one goes
    most = model_bytes + state_bytes * (keep_states + 1)
    held = sum(path.stat().st_size for path in Path(out_dir).glob("*.pt"))
    lines = [f"a save takes {spell_bytes(model_bytes)} (ckpt.pt) + {spell_bytes(state_bytes)} "
             f"(state.pt); with keep_states={keep_states} {out_dir} needs up to "
             f"{spell_bytes(most)}, of which it holds {spell_bytes(held)}; "
             f"{spell_bytes(free)} are free"]
    if shares > 1:
        lines.append(f"fsdp: each process holds {spell_bytes(4 * model_bytes / shares)} of weights,"
                     f" gradients and moments, 1/{shares} of the whole; at a save rank 0 gathers "
                     f"{spell_bytes(state_bytes)} in its CPU memory")
    if most - held > free:
        lines.append(f"warning: the disk of {out_dir} cannot hold that: free "
                     f"{spell_bytes(most - held - free)}, lower --keep_states, or choose another "
                     "--out_dir")
    return lines


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
