"""Where a run computes: torchrun's environment, device, dtype, and sums over the ranks.

One process and many run the same code: with one, the sums and waits below do nothing.
"""
import datetime
import importlib.util
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class World:
    """This process among all: rank in [0, size), its number on its own machine, its device."""
    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0


def read_world(device="auto"):
    """The World that torchrun's variables describe (rank 0 of 1 without). Joins nothing yet."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    return World(rank=int(os.environ.get("RANK", 0)), size=int(os.environ.get("WORLD_SIZE", 1)),
                 local_rank=local_rank, device=pick_device(device, local_rank))


def under_torchrun():
    return "TORCHELASTIC_RUN_ID" in os.environ or "RANK" in os.environ


def join(world, backend="auto", timeout=1800):
    """Joins the process group (a no-op for one process outside torchrun); timeout in seconds."""
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if not under_torchrun():
        return
    # a config that names nccl, as nanoGPT's default did, still runs on CPU
    if backend == "auto" or (backend == "nccl" and world.device.type != "cuda"):
        backend = "nccl" if world.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(*values, device):
    """The sums over all ranks of a few numbers, as floats; note: this is a CPU-GPU sync point."""
    sums = torch.tensor([float(v) for v in values], dtype=torch.float64)
    if dist.is_initialized():
        sums = sums.to(device)  # nccl adds up on the GPU
        dist.all_reduce(sums)
    return sums.tolist()


def pick_device(name="auto", local_rank=0):
    """'auto' is the GPU where there is one; cuda means this process's own card under torchrun."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device={name}: use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device=mps: this machine has no Metal GPU; use --device=cpu")
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"--device={name}: PyTorch finds no CUDA GPU here; use --device=cpu, or "
                         "install the CUDA build of torch and NVIDIA's driver")
    index = local_rank if under_torchrun() else device.index or 0
    if index >= torch.cuda.device_count():
        raise ValueError(f"cuda:{index} is asked for, but this machine has "
                         f"{torch.cuda.device_count()} GPU(s); lower --nproc_per_node or --device")
    return torch.device("cuda", index)


def pick_dtype(name, device):
    """The dtype that matrix products run in. 'auto' is bfloat16 only where it is native: on a
    GPU of capability 8 and up (is_bf16_supported counts emulation too), on a CPU with AMX or
    avx512_bf16; float16 on older GPUs; float32 elsewhere."""
    if name != "auto":
        if name not in DTYPES:
            raise ValueError(f"--dtype={name}: use auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu":
        probes = (getattr(torch.cpu, name, None)
                  for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
        if any(probe is not None and probe() for probe in probes):
            return torch.bfloat16
    return torch.float32


def pick_compile(choice, device):
    """'auto' compiles where that is known to work: CUDA of capability 7 and up, with Triton."""
    if choice != "auto":
        if not isinstance(choice, bool):
            raise ValueError(f"--compile={choice}: use auto, True or False")
        return choice
    return (device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 7
            and importlib.util.find_spec("triton") is not None)


def run(main):
    """Runs an entry script: what a user can mend ends as one line on stderr and status 1.

    That is a ValueError or FloatingPointError raised in a file of this project; one from inside
    a library is a bug and keeps its traceback. Under torchrun rank 0 speaks for all: the others
    wait, and speak only if it had nothing to say and so did not end the job.
    """
    sys.stdout.reconfigure(errors="replace")  # a Windows console's code page lacks most characters
    try:
        main(sys.argv[1:])
    except (ValueError, FloatingPointError) as e:
        last = e.__traceback__
        while last.tb_next:
            last = last.tb_next
        if Path(last.tb_frame.f_code.co_filename).parent != Path(__file__).parent:
            raise
        if int(os.environ.get("RANK", 0)) != 0:
            time.sleep(30)
        print(f"error: {e}", file=sys.stderr, flush=True)
        os._exit(1) if dist.is_initialized() else sys.exit(1)  # no wait for ranks that are gone
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        leave()
