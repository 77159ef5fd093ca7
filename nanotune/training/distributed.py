"""Runs training on many processes: torchrun's environment, DDP or FSDP2, sums over the ranks.

A single process runs the same code; the sums and barriers below then do nothing.
"""
import datetime
import os
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from nanotune.cli import say
from nanotune.device import autocast, compile_error, pick_compile, pick_device
from nanotune.errors import UserError
from nanotune.torch_private import undo_compile

# {pair of options that no test covers: what to use instead}
UNTESTED = {
    ("parallel=fsdp", "dtype=float16"): "use --dtype=bfloat16, --dtype=float32 or --parallel=ddp",
    ("parallel=fsdp", "weights=bfloat16"): "use --parallel=ddp, or --weights=float32: fsdp already "
                                           "shards the memory",
    ("parallel=fsdp", "optimizer=adamw8bit"): "use --parallel=ddp or --optimizer=adamw",
    ("parallel=fsdp", "lora=yes"): "use --parallel=ddp or --lora_rank=0",
    ("optimizer=adamw8bit", "lora=yes"): "use --optimizer=adamw: adapters need little memory",
    ("optimizer=adamw8bit", "device=mps"): "use --optimizer=adamw",
    ("parallel=fsdp", "optimizer=adafactor"): "use --parallel=ddp or --optimizer=adamw",
    ("optimizer=adafactor", "lora=yes"): "use --optimizer=adamw: adapters need little memory",
    ("optimizer=adafactor", "device=mps"): "use --optimizer=adamw",
    ("optimizer=adafactor", "weights=bfloat16"): "use --weights=float32 or --optimizer=adamw8bit",
    ("optimizer=adafactor", "dtype=float16"): "use --dtype=bfloat16, --dtype=float32 or "
                                              "--optimizer=adamw",
    ("device=mps", "processes=many"): "run one process, or --device=cpu",
}


@dataclass(frozen=True)
class World:
    """This process among `size` processes, and its device."""
    rank: int  # in [0, size)
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_world(device: str = "auto") -> World:
    """Returns the World of torchrun's variables, rank 0 of 1 without them; joins no group.

    `device` is as in pick_device. Raises UserError if this machine has no such device.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0)) if under_torchrun() else None
    return World(rank=int(os.environ.get("RANK", 0)), size=int(os.environ.get("WORLD_SIZE", 1)),
                 device=pick_device(device, local_rank))


def under_torchrun():
    return "RANK" in os.environ


def check_combination(world: World, **chosen: object) -> None:
    """Raises UserError if two of the chosen options are a pair of UNTESTED."""
    if world.size == 1:  # parallel has no effect
        chosen.pop("parallel", None)
    chosen |= {"device": world.device.type, "processes": "many" if world.size > 1 else "one"}
    have = {f"{name}={str(value).removeprefix('torch.')}" for name, value in chosen.items()}
    for (one, other), fix in UNTESTED.items():
        if {one, other} <= have:
            raise UserError(f"{one} and {other} cannot be combined; {fix}")


def join(world: World, backend: str = "auto", timeout: float = 600) -> None:
    """Joins the process group, unless this process has joined already, and sets the CUDA device.
    Outside torchrun there is no group.

    `backend` is nccl, gloo or auto. `timeout` is the seconds to wait for a process that does not
    answer, here and in each later collective. Raises torch.distributed.DistError if not all
    processes join in that time.
    """
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if not under_torchrun() or dist.is_initialized():
        return
    # a config with nccl, nanoGPT's default, also runs on the CPU
    if backend == "auto" or (backend == "nccl" and world.device.type != "cuda"):
        backend = "nccl" if world.device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store = fresh_store(store, rank, size, timeout)
    # without device_id, nccl's barrier() warns that it guesses the device
    device = world.device if backend == "nccl" else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout,
                            device_id=device)


def fresh_store(store, rank, size, timeout):
    """A PrefixStore over torchrun's store with a prefix that no earlier attempt used.

    torchrun keeps its store over restarts, so a process could read the address of a dead process
    (pytorch issue 135712). The restart count cannot be the prefix: it differs among machines. So
    each rank writes a random name to hello/RANK. Rank 0 writes its prefix to welcome/NAME for the
    latest name of each rank, until all other ranks have written here/RANK under that prefix.
    """
    name = uuid.uuid4().hex
    if rank != 0:
        store.set(f"hello/{rank}", name)
        part = dist.PrefixStore(store.get(f"welcome/{name}").decode(), store)
        part.set(f"here/{rank}", "")
        return part
    part, end = dist.PrefixStore(name, store), time.monotonic() + timeout.total_seconds()
    while size > 1 and not part.check([f"here/{other}" for other in range(1, size)]):
        if time.monotonic() > end:
            raise dist.DistStoreError(f"timed out: not all {size} processes joined")
        for other in range(1, size):
            if store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", name)
        time.sleep(0.02)
    return part


def barrier() -> None:
    """Waits for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def broadcast(world: World, value: Any) -> Any:
    """Returns rank 0's value, which must be picklable, on all ranks. All ranks must call this."""
    values = [value]
    if world.size > 1:
        dist.broadcast_object_list(values, device=world.device)
    return values[0]


def gather(world: World, value: Any) -> list[Any]:
    """Returns all ranks' values, which must be picklable. All ranks must call this."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def check_same_fields(world: World, fields: dict[str, object]) -> None:
    """Raises the same UserError on all ranks if a field's value differs among them. All ranks must
    call this."""
    first, *others = gather(world, fields)
    for rank, other in enumerate(others, 1):
        for name, value in other.items():
            if value != first[name]:
                raise UserError(f"--{name} is {first[name]} in process 0 and {value} in process "
                                f"{rank}: give all processes the same fields")


def sum_over_ranks(*values: float | torch.Tensor,
                   device: str | torch.device = "cpu") -> list[float]:
    """Returns the sum over all ranks of each value. All ranks must call this, each with
    the same number of values.

    A value on the GPU, or a GPU as `device`, makes the CPU wait for the GPU.
    """
    sums = torch.tensor([float(v) for v in values], dtype=torch.float64)
    if dist.is_initialized():
        sums = sums.to(device)  # nccl sums on the GPU
        dist.all_reduce(sums)
    return sums.tolist()


# -----------------------------------------------------------------------------
# one model on many processes

def parallelize(model: nn.Module, world: World, parallel: str, dtype: torch.dtype,
                compile_choice: str | bool,
                batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[nn.Module, bool]:
    """Moves a model with rank 0's weights to the device, with DDP or FSDP2, and compiles it.

    Returns (the module to call in training, whether it is compiled). DDP copies the model to all
    ranks, FSDP2 gives each rank a shard. Create the optimizer after this. `parallel` is ddp or
    fsdp, `dtype` is that of matrix products, `compile_choice` is as in pick_compile; `batch`, (B,
    T) inputs and targets, is used to try the compiled model. Raises UserError if compiling a
    sharded model fails.
    """
    sharded = world.size > 1 and parallel == "fsdp"
    if sharded:
        shard(model, world, dtype)
    else:
        model.to(world.device)
        model.tie_head()
    compiled = (pick_compile(compile_choice, world.device, sharded, next(model.parameters()).dtype)
                and compile_or_fall_back(model, batch, world, dtype))
    if sharded or world.size == 1:
        return model, compiled
    devices = [world.device.index] if world.device.type == "cuda" else None
    ddp = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    return ddp, compiled


def shard(model, world, dtype):
    """FSDP2: each rank keeps a shard of each parameter, and so of its gradient and moments.

    Shards each block, then the root (embeddings, ln_f, head). Blocks are gathered in `dtype`;
    shards, root, residual stream and reductions stay float32.
    """
    # imported here: these take 2 seconds
    from torch.distributed import fsdp
    from torch.distributed.checkpoint import state_dict as dcp
    whole = model.state_dict() if world.is_main else {}
    policy = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                       cast_forward_inputs=False)
    mesh = dist.init_device_mesh(world.device.type, (world.size,))
    for block in model.blocks():  # the device gets one whole block at a time
        fsdp.fully_shard(block, mesh=mesh, mp_policy=policy)
    fsdp.fully_shard(model, mesh=mesh)
    for method in ("encode", "step", "logits", "logits_at"):  # gather the weights as forward does
        if hasattr(model, method):
            fsdp.register_fsdp_forward_method(model, method)
    dcp.set_model_state_dict(model, whole, options=dcp.StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True))


def compile_or_fall_back(model, batch, world, dtype):
    """Compiles the model in place and tries it; returns whether that worked on all ranks.

    If not, the model stays eager. Raises UserError if the model is sharded, since it may then be
    broken.
    """
    model.compile()
    x, y = (t.to(world.device) for t in batch)
    with autocast(world.device, dtype):
        failed = compile_error(lambda: model(x, y).backward())
    model.zero_grad(set_to_none=True)
    if sum_over_ranks(failed is not None, device=world.device)[0] == 0:
        return True
    reason = failed or "on another rank"
    if is_sharded(model):
        raise UserError(f"torch.compile failed on the sharded model ({reason}); use "
                        "--compile=False")
    undo_compile(model)
    if world.is_main:
        say(f"warning: torch.compile failed ({reason}); continuing without it: slower, same "
            "results; --compile=False turns off this warning", sys.stderr)
    return False


def is_sharded(model: nn.Module) -> bool:
    """Returns whether fully_shard was applied to the model, without the slow import of fsdp."""
    return hasattr(model, "set_requires_gradient_sync")


@contextmanager
def gradient_sync(model: nn.Module, last: bool) -> Iterator[None]:
    """A context for a micro-step's forward and backward: ranks reduce gradients only if `last`."""
    if is_sharded(model):
        model.set_requires_gradient_sync(last)
        yield
    elif isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def total_norm(grads: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns the L2 norm of all gradients together, (), over all shards; the same on all ranks."""
    norm = torch.nn.utils.get_total_norm(grads)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
