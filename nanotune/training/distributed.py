"""One run on many processes: torchrun's environment, DDP or FSDP2, sums over the ranks.

One process and many run the same code: with one, the sums and waits below do nothing.
"""
import datetime
import os
import sys
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nanotune.device import autocast, pick_compile, pick_device
from nanotune.errors import UserError, first_line

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
    own_card = local_rank if under_torchrun() else None
    return World(rank=int(os.environ.get("RANK", 0)), size=int(os.environ.get("WORLD_SIZE", 1)),
                 local_rank=local_rank, device=pick_device(device, own_card))


def under_torchrun():
    return "TORCHELASTIC_RUN_ID" in os.environ or "RANK" in os.environ


def check_pairs(world, **chosen):
    """Raises UserError where two of the chosen values were never tested together."""
    if world.size == 1:  # nothing is shared: parallel means nothing
        chosen.pop("parallel", None)
    chosen |= {"device": world.device.type, "processes": "many" if world.size > 1 else "one"}
    have = {f"{name}={str(value).removeprefix('torch.')}" for name, value in chosen.items()}
    for (one, other), mend in UNTESTED.items():
        if {one, other} <= have:
            raise UserError(f"{one} and {other} do not go together; {mend}")


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
    store = fresh_store(store, rank, size, timeout)
    device = world.device if backend == "nccl" else None  # else barrier() warns that it guesses it
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout,
                            device_id=device)


def fresh_store(store, rank, size, timeout):
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
        raise UserError(f"torch.compile failed on the sharded model ({reason}); use "
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
