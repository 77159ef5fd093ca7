"""Where a run computes: torchrun's environment, device, dtype; DDP or FSDP2; sums over the ranks.

One process and many run the same code: with one, the sums and waits below do nothing.
"""
import ctypes
import datetime
import errno
import importlib.util
import os
import sys
import time
import traceback
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# pairs that no test covers, and what to take instead; DESIGN.md, "What goes together"
UNTESTED = {
    ("parallel=fsdp", "dtype=float16"): "use --dtype=bfloat16, --dtype=float32 or --parallel=ddp",
    ("parallel=fsdp", "weights=bfloat16"): "use --parallel=ddp, or --weights=float32: fsdp shares "
                                           "the memory out already",
    ("parallel=fsdp", "optimizer=adamw8bit"): "use --parallel=ddp or --optimizer=adamw",
    ("parallel=fsdp", "lora=yes"): "use --parallel=ddp or --lora_rank=0",
    ("optimizer=adamw8bit", "lora=yes"): "use --optimizer=adamw: adapters take little anyway",
    ("optimizer=adamw8bit", "device=mps"): "use --optimizer=adamw",
    ("device=mps", "processes=many"): "run one process, or --device=cpu",
}


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


def check_pairs(world, **chosen):
    """Raises ValueError where two of the chosen values were never tested together."""
    if world.size == 1:  # nothing is shared: parallel means nothing
        chosen.pop("parallel", None)
    chosen |= {"device": world.device.type, "processes": "many" if world.size > 1 else "one"}
    have = {f"{name}={str(value).removeprefix('torch.')}" for name, value in chosen.items()}
    for (one, other), mend in UNTESTED.items():
        if {one, other} <= have:
            raise ValueError(f"{one} and {other} do not go together; {mend}")


def join(world, backend="auto", timeout=600):
    """Joins the process group (a no-op for one process outside torchrun); timeout in seconds: so
    long a process waits for one that does not answer, here and in each later exchange."""
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if not under_torchrun():
        return
    # a config that names nccl, as nanoGPT's default did, still runs on CPU
    if backend == "auto" or (backend == "nccl" and world.device.type != "cuda"):
        backend = "nccl" if world.device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store = fresh_part(store, rank, size, timeout)
    device = world.device if backend == "nccl" else None  # else barrier() warns that it guesses it
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout,
                            device_id=device)


def fresh_part(store, rank, size, timeout):
    """A part of torchrun's store that no earlier attempt wrote to. torchrun keeps its store over
    restarts, where a process could find the address of one that is gone (pytorch issue 135712),
    and its restart count differs among machines. So each rank says hello under a name drawn at
    random, and rank 0 welcomes whoever said hello last until all are in its part."""
    name = uuid.uuid4().hex
    if rank != 0:
        store.set(f"hello/{rank}", name)
        part = dist.PrefixStore(store.get(f"welcome/{name}").decode(), store)
        part.set(f"here/{rank}", "")
        return part
    part, end = dist.PrefixStore(name, store), time.monotonic() + timeout.total_seconds()
    while size > 1 and not part.check([f"here/{other}" for other in range(1, size)]):
        if time.monotonic() > end:
            raise dist.DistStoreError(f"timed out: not all of {size} processes came")
        for other in range(1, size):
            if store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", name)
        time.sleep(0.02)
    return part


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def share(world, value):
    """Rank 0's value, plain data, on all ranks."""
    held = [value]
    if world.size > 1:
        dist.broadcast_object_list(held, device=world.device)
    return held[0]


def sum_over_ranks(*values, device="cpu"):
    """The sums over all ranks of a few numbers, as floats; note: this is a CPU-GPU sync point."""
    sums = torch.tensor([float(v) for v in values], dtype=torch.float64)
    if dist.is_initialized():
        sums = sums.to(device)  # nccl adds up on the GPU
        dist.all_reduce(sums)
    return sums.tolist()


# -----------------------------------------------------------------------------
# one model on many processes

def parallelize(model, world, parallel, dtype, compile_choice, batch):
    """(the model as its forward is called in training, whether it is compiled): on its device,
    with rank 0's weights. DDP copies it to all ranks, FSDP2 leaves each a share. An optimizer is
    made after this. The batch is what compilation is tried on."""
    sharded = world.size > 1 and parallel == "fsdp"
    if sharded:
        shard(model, world, dtype)
    else:
        model.to(world.device)
        model.tie_head()
    compiled = (pick_compile(compile_choice, world.device, sharded, model.lm_head.weight.dtype)
                and compile_or_fall_back(model, batch, world, dtype))
    if sharded or world.size == 1:
        return model, compiled
    devices = [world.device.index] if world.device.type == "cuda" else None
    ddp = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    return ddp, compiled


def shard(model, world, dtype):
    """FSDP2: each rank keeps its share of each parameter, and so of its gradient and moments: the
    blocks one by one, then the root with the embeddings, ln_f and the head. Blocks are gathered in
    `dtype`; shares, root, residual stream and the sums over ranks stay float32."""
    # imported where needed: these take 2 seconds
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    whole = model.state_dict() if world.is_main else {}
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    mesh = dist.init_device_mesh(world.device.type, (world.size,))
    for block in model.transformer.h:  # the whole goes to the device a block at a time
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    set_model_state_dict(model, whole, options=StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True))


def compile_or_fall_back(model, batch, world, dtype):
    """Compiles the model in place and tries it; where that fails, on any rank, stays eager. A
    sharded one cannot be relied on after a failure: there it is an error."""
    model.compile()
    x, y = (t.to(world.device) for t in batch)
    try:
        with autocast(world.device, dtype):
            model(x, y).backward()
        failed = None
    except Exception as e:  # Dynamo, Inductor, Triton and the C++ compiler each raise their own
        failed = first_line(e)  # not e itself, which holds on to what the failed pass allocated
    model.zero_grad(set_to_none=True)
    if sum_over_ranks(failed is not None, device=world.device)[0] == 0:
        return True
    reason = failed or "on another rank"
    if is_sharded(model):
        raise ValueError(f"torch.compile failed on the sharded model ({reason}); use "
                         "--compile=False")
    model._compiled_call_impl = None  # what model.compile() set
    if world.is_main:
        print(f"warning: torch.compile failed ({reason}); going on without, slower but the same; "
              "--compile=False silences this", file=sys.stderr)
    return False


def is_sharded(model):
    """Whether fully_shard was here; asked without importing it."""
    return hasattr(model, "set_requires_gradient_sync")


@contextmanager
def gradient_sync(model, last):
    """Around a micro-step's forward and backward: ranks exchange gradients in the last one only."""
    if is_sharded(model):
        model.set_requires_gradient_sync(last)
        yield
    elif isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def total_norm(grads):
    """The norm of all gradients together, over all shares of them; a tensor, alike on all ranks."""
    norm = torch.nn.utils.get_total_norm(grads)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


# -----------------------------------------------------------------------------
# device and dtype

def autocast(device, dtype, cache=False):
    """Matrix products in `dtype`. The cache keeps each matrix that was cast until the context's
    end: good for many tokens, and a loss of memory for one pass, with recompute above all."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=cache)


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
            raise ValueError(f"--dtype={name}: use auto, {', '.join(DTYPES)}")
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
            raise ValueError(f"--compile={choice}: use auto, True or False")
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


# -----------------------------------------------------------------------------
# the last word

def run(main):
    """Runs an entry script: what a user can mend ends as one line on stderr and status 1.

    That is a ValueError or FloatingPointError raised in a file of this project (one from inside a
    library is a bug and keeps its traceback), memory that ran out, and a process that is gone.
    Under torchrun rank 0 speaks for all: the others wait, and speak only if it had nothing to say
    and so did not end the job.
    """
    sys.stdout.reconfigure(errors="replace")  # a Windows console's code page lacks most characters
    status = 0
    try:
        main(sys.argv[1:])
    except SystemExit as end:
        status = end.code or 0
    except KeyboardInterrupt:
        status = 130
    except Exception as e:
        status, said = 1, last_word(e)
        if said is None and not dist.is_initialized():
            raise
        if said is None:
            traceback.print_exc()
        else:
            print(f"error: {said}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        end_now(status)
    if status:
        sys.exit(status)


def end_now(status):
    """Ends a process of a group without a destructor being run: DDP's, in torch 2.13 with gloo,
    now and then waits for a thread that waits for Python's lock, and the job would never end. After
    an error it does not wait for ranks that are gone either."""
    if status == 0:
        leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def last_word(e):
    """The line to end with, or None for an exception that is a bug; waits where rank 0 speaks."""
    if not isinstance(e, ValueError | FloatingPointError):
        return out_of_memory(e) or lost_peer(e)
    last = e.__traceback__
    while last.tb_next:
        last = last.tb_next
    if Path(last.tb_frame.f_code.co_filename).parent != Path(__file__).parent:
        return None
    if int(os.environ.get("RANK", 0)) != 0:
        time.sleep(5)
    return e


def first_line(error):
    """The first line of what an exception says, or its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def out_of_memory(e):
    """What to say of an exception that is memory running out, on the device or the host; or None.
    Host allocations fail as MemoryError (Python, numpy), RuntimeError (torch) or ENOMEM (mmap)."""
    text = str(e)
    device = isinstance(e, torch.OutOfMemoryError) or (  # Metal's, some of CUDA's
        isinstance(e, RuntimeError) and "out of memory" in text)
    host = (isinstance(e, MemoryError) or getattr(e, "errno", None) == errno.ENOMEM
            or "allocate memory" in text or "bad_alloc" in text)
    if not (device or host):
        return None
    where = "the device" if device else "this machine"
    reason = f" ({' '.join(text.split())[:160]})" if text else ""
    return (f"out of memory on {where}{reason}; lower --batch_size, and raise "
            "--gradient_accumulation_steps by as much to train the same, or lower --block_size; or "
            "take a smaller model, or --parallel=fsdp on more processes")


def lost_peer(e):
    """What to say of an exception that is another process gone or silent; or None."""
    text = " ".join(str(e).split())
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe",
             "Connection refused", "timed out", "Timed out", "No route to host", "store")
    if not (isinstance(e, dist.DistError) or "gloo" in text) or not any(s in text for s in signs):
        return None
    rank, size = os.environ.get("RANK", 0), os.environ.get("WORLD_SIZE", 1)
    sign = next(sign for sign in signs if sign in text)
    return (f"process {rank} of {size}: another process is gone or did not answer in time "
            f"({text[text.index(sign):][:80]}); its own message, if it had any, is above or in its "
            "terminal. The states on disk are good: start the job again with --auto_resume=True")
