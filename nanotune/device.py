"""Picks the device, the dtype and whether to compile; measures a device's memory and speed."""
import ctypes
import importlib.util
import os
import sys
import timeit
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from nanotune.errors import UserError, first_line
from nanotune.torch_private import cpu_has_bfloat16

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def autocast(device: torch.device, dtype: torch.dtype, cache: bool = False) -> torch.autocast:
    """Returns a context in which matrix products run in `dtype`; float32 disables it.

    `cache` keeps each cast matrix until the context ends. This saves time if the context has many
    passes; with a single pass it only takes memory, most of all with recompute.
    """
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=cache)


def pick_device(name: str = "auto", local_rank: int | None = None) -> torch.device:
    """Returns the device of that name; 'auto' is the GPU if there is one, else the CPU.

    Under torchrun pass `local_rank`: cuda then means cuda:local_rank. Raises UserError if the name
    is unknown or this machine has no such device.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device={name} is not supported; use auto, cpu, cuda, cuda:N or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device=mps: this machine has no Metal GPU; use --device=cpu")
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise UserError(f"--device={name}: PyTorch finds no CUDA GPU here; use --device=cpu, or "
                        "install the CUDA build of torch and NVIDIA's driver")
    index = (device.index or 0) if local_rank is None else local_rank
    if index >= torch.cuda.device_count():
        raise UserError(f"cuda:{index} does not exist: this machine has "
                        f"{torch.cuda.device_count()} GPU(s); lower --nproc_per_node or --device")
    return torch.device("cuda", index)


def lacks_bfloat16(device: torch.device) -> bool:
    """Returns whether the device is a GPU older than Ampere (capability 8), such as a T4.

    PyTorch stores and casts bfloat16 there, but does not multiply it fast or compile it.
    torch.cuda.is_bf16_supported returns True there, since it counts emulation.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the dtype that matrix products run in; `name` is auto or a key of DTYPES.

    'auto' is bfloat16 if the hardware has it (a GPU of capability 8 and up, a CPU with AMX or
    avx512_bf16), float16 on older GPUs, else float32.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.float16 if lacks_bfloat16(device) else torch.bfloat16
    if device.type == "cpu" and cpu_has_bfloat16():
        return torch.bfloat16
    return torch.float32


def pick_compile(choice: str | bool, device: torch.device, sharded: bool = False,
                 weights: torch.dtype = torch.float32) -> bool:
    """Returns whether to call torch.compile; `choice` is auto, True or False, and `weights` the
    dtype of the parameters.

    'auto' compiles if that is known to work: on a GPU of capability 7 and up, with Triton, if the
    model is not sharded, and not for bfloat16 weights on a GPU that lacks bfloat16.
    """
    if choice != "auto":
        return choice
    if weights == torch.bfloat16 and lacks_bfloat16(device):  # would fail after minutes
        return False
    return (not sharded and device.type == "cuda"
            and torch.cuda.get_device_capability(device)[0] >= 7
            and importlib.util.find_spec("triton") is not None)


def compile_error(call: Callable[[], object]) -> str | None:
    """Calls a compiled function; returns the first line of the error that it raised, or None."""
    try:
        call()
    except Exception as e:  # Dynamo, Inductor, Triton and the C++ compiler each raise their own
        return first_line(e)  # not e, which keeps the failed call's tensors alive
    return None


# from glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def tune_malloc() -> None:
    """Makes glibc keep freed memory, which the next micro-step uses again.

    By default glibc returns large blocks to the system, and the system clears the pages of each new
    block. That takes a tenth of a step. Returning every block would save 8 % of the memory of a run
    with recompute, but a step would take 1.7 times as long (GPT-2 124M, 1 x 1024 tokens). Does
    nothing with other C libraries, which have no such option.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl; Windows
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)


def device_memory(device: torch.device) -> int | None:
    """Returns the device's total memory in bytes, or None if unknown.

    For a CPU: the machine's memory, or the container's limit if that is lower.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if not hasattr(os, "sysconf"):  # Windows
        return None
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    files = [Path("/sys/fs/cgroup/memory.max"),
             Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    limits = [path.read_text().strip() for path in files if path.is_file()]
    return min([whole, *(int(text) for text in limits if text.isdigit())])


def peak_memory(device: torch.device) -> int | None:
    """Returns the peak memory so far in bytes, or None if unknown.

    On a GPU: the memory allocated by torch. On a CPU: the resident memory of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or importlib.util.find_spec("resource") is None:  # Windows
        return None
    import resource
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


@lru_cache(maxsize=1)
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measures and returns the FLOP/s of a matrix product; MFU is a fraction of it.

    The size doubles until a product takes 10 ms, since a CPU without instructions for the dtype
    (float16) may need seconds for a large one. Returns the best result of all sizes.
    """
    peak, size, seconds = 0.0, 256, 0.0
    while seconds < 0.01 and size <= 8192:
        a = torch.ones(size, size, device=device, dtype=dtype)
        a @ a  # warms up
        seconds = least_seconds(lambda a=a: a @ a, device)
        peak = max(peak, 2 * size**3 / seconds)
        size *= 2
    return peak


def least_seconds(call: Callable[[], object], device: torch.device, times: int = 3) -> float:
    """Calls `times` times and returns the shortest duration in seconds.

    The longer durations may be due to other processes.
    """
    def finished():
        call()
        synchronize(device)

    synchronize(device)
    return min(timeit.repeat(finished, number=1, repeat=times))


def synchronize(device: torch.device) -> None:
    """Waits for the work queued on a GPU; does nothing for a CPU."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
