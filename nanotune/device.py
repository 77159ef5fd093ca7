"""The device: which one, its dtype, whether to compile, its memory and its speed."""
import ctypes
import importlib.util
import os
import sys
import time
from functools import lru_cache
from pathlib import Path

import torch

from nanotune.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(device, dtype, cache=False):
    """Matrix products in `dtype`. The cache keeps each matrix that was cast until the context's
    end: good for many tokens, and a loss of memory for one pass, with recompute above all."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=cache)


def pick_device(name="auto", local_rank=None):
    """'auto' is the GPU if there is one. Under torchrun, which gives a local_rank, cuda means this
    process's own card."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device={name}: use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device=mps: this machine has no Metal GPU; use --device=cpu")
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise UserError(f"--device={name}: PyTorch finds no CUDA GPU here; use --device=cpu, or "
                        "install the CUDA build of torch and NVIDIA's driver")
    index = (device.index or 0) if local_rank is None else local_rank
    if index >= torch.cuda.device_count():
        raise UserError(f"cuda:{index} is asked for, but this machine has "
                        f"{torch.cuda.device_count()} GPU(s); lower --nproc_per_node or --device")
    return torch.device("cuda", index)


def lacks_bfloat16(device):
    """Whether it is a GPU before Ampere, capability 8, such as a T4: PyTorch stores and casts
    bfloat16 there, but has no fast products of it and does not compile it.
    (torch.cuda.is_bf16_supported counts emulation.)"""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8


def pick_dtype(name, device):
    """The dtype that matrix products run in. 'auto' is bfloat16 only where it is native: on a
    GPU of capability 8 and up, on a CPU with AMX or avx512_bf16; float16 on older GPUs; float32
    elsewhere."""
    if name != "auto":
        if name not in DTYPES:
            raise UserError(f"--dtype={name}: use auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.float16 if lacks_bfloat16(device) else torch.bfloat16
    if device.type == "cpu":
        probes = (getattr(torch.cpu, name, None)
                  for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
        if any(probe is not None and probe() for probe in probes):
            return torch.bfloat16
    return torch.float32


def pick_compile(choice, device, sharded=False, weights=torch.float32):
    """'auto' compiles where that is known to work: CUDA of capability 7 and up, with Triton, not
    sharded, with weights in a dtype that the GPU knows."""
    if choice != "auto":
        if not isinstance(choice, bool):
            raise UserError(f"--compile={choice}: use auto, True or False")
        return choice
    if weights == torch.bfloat16 and lacks_bfloat16(device):  # minutes, and then nothing
        return False
    return (not sharded and device.type == "cuda"
            and torch.cuda.get_device_capability(device)[0] >= 7
            and importlib.util.find_spec("triton") is not None)


# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4


def tune_malloc(lean):
    """What glibc does with freed memory; other C libraries have no such switch, and nothing is
    done. By default it gives large blocks back, and the system clears pages for each new one."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl; Windows
        return
    if lean:  # all of a megabyte and more goes back: else holes in the heap are a third of what a
        # lean run of GPT-2 holds; that took 3 and 34 % more time in two runs on a virtual machine
        mallopt(M_MMAP_THRESHOLD, 2**20)
        mallopt(M_MMAP_MAX, 2**16)  # this and the next are glibc's own, which the other run changed
        mallopt(M_TRIM_THRESHOLD, 2**17)
    else:  # none does: the next micro-step takes the same again, and needs a tenth less time
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def device_memory(device):
    """Bytes of memory that the device has: of a GPU what it has in all, of a CPU what the machine
    has, or the container it runs in; None where that cannot be learnt."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if not hasattr(os, "sysconf"):  # Windows
        return None
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [Path("/sys/fs/cgroup/memory.max"),
              Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    held = [path.read_text().strip() for path in limits if path.is_file()]
    return min([whole, *(int(text) for text in held if text.isdigit())])


def peak_memory(device):
    """The most bytes so far: allocated by torch on a GPU, resident in the process on a CPU; None
    where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or importlib.util.find_spec("resource") is None:  # Windows
        return None
    import resource
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


@lru_cache(maxsize=1)
def matmul_peak(device, dtype):
    """Floating-point operations a second that a matrix product of this dtype reaches on the
    device, the best of some measured on the spot: what MFU is a share of. The product grows until
    it takes 10 ms, since a CPU may take seconds where it has no instructions for the dtype
    (float16)."""
    peak, size, seconds = 0.0, 256, 0.0
    while seconds < 0.01 and size <= 8192:
        a = torch.ones(size, size, device=device, dtype=dtype)
        a @ a  # warms up
        seconds = least_seconds(lambda a=a: a @ a, device)
        peak = max(peak, 2 * size**3 / seconds)
        size *= 2
    return peak


def least_seconds(call, device, times=3):
    """The shortest of some calls: something else may have had the processor in the others."""
    taken = []
    for _ in range(times):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        taken.append(time.perf_counter() - began)
    return min(taken)


def synchronize(device):
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
