"""Predicts what a run needs before it begins: tokens, epochs, parameters, disk, memory."""
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from nanotune.cli import say
from nanotune.device import DTYPES, device_memory
from nanotune.errors import UserError
from nanotune.formats.checkpoint import model_class
from nanotune.training.distributed import World
from nanotune.training.lora import adapters, add_lora
from nanotune.training.optimizer import moment_shape, moments_per_scale

FEW_STEPS = 10  # if --epochs makes fewer, the model hardly changes


def format_bytes(n: float) -> str:
    """Returns a number of bytes as text, such as 1.49 GB."""
    for unit in ("bytes", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"


# -----------------------------------------------------------------------------
# what train.py prints

def plan_lines(cfg: Any, config: Any, world: World, dtype: torch.dtype, compiled: bool,
               train_tokens: int, val_tokens: int,
               tokens_per_sample: float | None = None) -> list[str]:
    """Returns the plan of a train.Config and a model's config as lines of text; tokens_per_sample
    is block_size unless given."""
    model, iters = meta_model(config, cfg), cfg.max_iters
    samples = cfg.gradient_accumulation_steps * cfg.batch_size
    tokens_per_iter = samples * (tokens_per_sample or config.block_size)
    epochs = iters * tokens_per_iter / train_tokens
    ranks = f" x {world.size} processes" if world.size > 1 else ""
    precision = str(dtype).removeprefix("torch.") + (", compiled" if compiled else "")
    lines = [
        f"model: {model.num_params() / 1e6:.2f}M parameters, {world.device}{ranks}, {precision}",
        f"data: {cfg.dataset}, {train_tokens:,} training tokens, {val_tokens:,} for validation",
        f"tokens per iteration: {round(tokens_per_iter):,}; {iters} "
        f"{'iteration makes' if iters == 1 else 'iterations make'} {epochs:.2f} epochs "
        f"(1 epoch = {train_tokens / tokens_per_iter:.1f} iterations)",
    ]
    if epochs > 20 and cfg.init_from not in ("scratch", "resume"):
        lines.append(f"warning: {epochs:,.0f} epochs of finetuning: the model will memorize the "
                     "text; --epochs=3 is usual")
    if cfg.lora_rank:
        trained = sum(p.numel() for p in adapters(model).values())
        lines.append(f"LoRA of rank {cfg.lora_rank}: {trained / 1e6:.2f}M parameters are trained")
    return [*lines, *describe_saves(model, cfg, world),
            *describe_memory(config, cfg, world, dtype)[0]]


def describe_saves(model: torch.nn.Module, cfg: Any, world: World) -> list[str]:
    """Returns lines of text about the disk and, if sharded, the memory that a save takes; the last
    warns if the disk is too small."""
    saved = adapters(model).values() or list(model.parameters())
    model_bytes, out_dir = bytes_of(saved), Path(cfg.out_dir)
    state_bytes = model_bytes + sum(moment_bytes(p.shape, cfg.optimizer) for p in saved)
    there = next(path for path in (out_dir, *out_dir.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    # the new state is written before an old one is deleted
    models = 2 if cfg.always_save_checkpoint else 1
    most = models * model_bytes + state_bytes * (cfg.keep_states + 1)
    # a hard link, as best.pt may be, takes no space
    used = sum({path.stat().st_ino: path.stat().st_size for path in out_dir.glob("*.pt")}.values())
    best = "ckpt.pt, and as much for best.pt" if models == 2 else "ckpt.pt"
    lines = [f"a save takes {format_bytes(model_bytes)} ({best}) + {format_bytes(state_bytes)} "
             f"(state.pt); with keep_states={cfg.keep_states} {out_dir} needs up to "
             f"{format_bytes(most)}, of which it holds {format_bytes(used)}; "
             f"{format_bytes(free)} are free"]
    if shares_of(cfg, world) > 1:
        share = format_bytes(4 * model_bytes / world.size)
        lines.append(f"fsdp: each process holds {share} of weights, gradients and moments, "
                     f"1/{world.size} of the whole; at a save rank 0 gathers "
                     f"{format_bytes(state_bytes)} in its CPU memory")
    if most - used > free:
        lines.append(f"warning: the disk of {out_dir} is too small for that: free "
                     f"{format_bytes(most - used - free)}, lower --keep_states, or choose another "
                     "--out_dir")
    return lines


def print_plan(r: Any) -> None:
    """Logs the plan of a run.Run and warns of likely mistakes; only rank 0 does."""
    cfg, p = r.cfg, r.progress
    if not r.world.is_main:
        return
    for line in r.start.warnings:
        r.log.warn(line)
    data = r.data["train"]
    for line in plan_lines(cfg, data.largest(r.model.config), r.world, r.dtype, r.compiled,
                           *map(len, r.data.values()), data.tokens_per_sample):
        r.log.say(line)
    for line in warnings(cfg, data, r.tokenizer.eot):
        r.log.warn(line)
    if p.step:
        r.log.say(f"resuming at step {p.step} of {cfg.max_iters}")
    if p.step >= cfg.max_iters and p.evaluated == p.step:
        r.log.warn(f"the run is already at step {p.step}; raise --max_iters to train further")


def warnings(cfg: Any, data: Any, eot: int | None) -> list[str]:
    """Returns lines on likely mistakes: examples of the training data that are too long (eot is
    their end token), few steps, a long warmup."""
    lines = data.warnings(eot)
    if cfg.epochs and cfg.max_iters < FEW_STEPS:
        lower = [f"lower --{name}" for name in ("gradient_accumulation_steps", "batch_size")
                 if getattr(cfg, name) > 1]
        lines.append(f"only {cfg.max_iters} step{'s' * (cfg.max_iters > 1)}: "
                     f"{' or '.join([*lower[:1], 'raise --epochs'])}")
    if cfg.decay_lr and 0 < cfg.max_iters <= cfg.warmup_iters:
        lines.append(f"warmup_iters={cfg.warmup_iters} is not less than max_iters={cfg.max_iters}: "
                     "the learning rate never reaches --learning_rate; lower --warmup_iters")
    return lines


# -----------------------------------------------------------------------------
# memory

USABLE = 0.95     # fraction of a device's memory; driver, system and fragmentation take the rest
# bytes in a process on a CPU, measured on Linux with torch 2.13
PROCESS = 0.31e9   # torch and the tokenizer
COMPILER = 0.1e9   # torchao and Inductor
# {whether a model takes pairs: (holes in glibc's heap as a fraction of the activations, whether
# gradients and all activations are in memory together)}; measured for GPT-2's and t5-base's shapes.
# A T5 has few activations, since pairs are short, and two gradients as large as its embedding.
HEAP = {False: (0.85, False), True: (0.1, True)}


def memory(config: Any, cfg: Any, world: World, dtype: torch.dtype) -> dict[str, float]:
    """Returns {part: bytes} at the peak of a training step: allocated memory on a GPU, resident
    memory on a CPU. `config` is the model's, `cfg` a train.Config, `dtype` autocast's. Gradients
    are allocated after most activations are freed, but stay in memory for the next micro-steps."""
    model, shares = meta_model(config, cfg), shares_of(cfg, world)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = bytes_of(trained) / shares
    kept, block = model.activation_bytes(cfg.batch_size, world.device.type, dtype)
    during, after = model.head_bytes(cfg.batch_size, world.device.type, dtype)
    # whether the forward pass has gradients in memory: earlier micro-steps', or DDP's buckets
    early = cfg.gradient_accumulation_steps // world.size > 1 or world.size > 1
    parts = {
        "weights": bytes_of(model.parameters()) / shares,
        "optimizer": sum(moment_bytes(p.shape, cfg.optimizer) for p in trained) / shares,
        "process": 0.0,
    }
    if world.device.type == "cpu":
        parts["process"] = PROCESS + COMPILER * (cfg.optimizer == "adamw8bit")
        slack, together = HEAP[config.takes_pairs]
        kept *= 1 + slack * (not cfg.recompute)
        early = early or together
    phases = [{"gradients": gradients * early, "activations": kept + block, "logits": during},
              {"gradients": gradients, "activations": block, "logits": after}]
    return parts | max(phases, key=lambda phase: sum(phase.values()))


def meta_model(config: Any, cfg: Any) -> torch.nn.Module:
    """The model of a run on the meta device: shapes and dtypes, no memory."""
    model = make_meta_model(replace(config, dropout=cfg.dropout), cfg.weights, cfg.lora_rank)
    model.recompute = cfg.recompute
    return model


@lru_cache(maxsize=8)  # takes 0.3 s for gpt2-xl, and advise() calls it often
def make_meta_model(config, weights, lora_rank):
    model = model_class(config).empty(config, "meta", DTYPES[weights])
    if lora_rank:
        add_lora(model, lora_rank)
    return model


def shares_of(cfg, world):
    """The number of processes that share the weights, gradients and moments."""
    return world.size if cfg.parallel == "fsdp" else 1


def bytes_of(params):
    return sum(p.numel() * p.element_size() for p in params)


def moment_bytes(shape: Sequence[int], optimizer: str) -> int:
    """The bytes of the moments of a tensor of this shape."""
    numel = math.prod(shape)
    if optimizer == "adafactor":  # one number per row and per column of a matrix
        names = ("row_var", "col_var") if len(shape) > 1 else ("variance",)
        return sum(4 * math.prod(moment_shape(name, shape)) for name in names)
    block = moments_per_scale(numel) if optimizer == "adamw8bit" else None
    return 8 * numel if block is None else 2 * numel + 8 * numel // block


def describe_memory(config: Any, cfg: Any, world: World,
                    dtype: torch.dtype) -> tuple[list[str], bool]:
    """Returns (lines with the predicted peak and the device's memory, whether it fits). If it does
    not fit, the lines also name fields to change and the memory that each change saves."""
    device, ranks = world.device, world.size
    parts = memory(config, cfg, world, dtype)
    peak, whole = sum(parts.values()), device_memory(device)
    kind = "of the process" if device.type == "cpu" else "allocated"
    listed = ", ".join(f"{name} {format_bytes(n)}" for name, n in parts.items() if n)
    line = f"peak memory {kind}: {format_bytes(peak)} ({listed})"
    if whole is None:
        return [line], True
    on = device if ranks == 1 else f"{device} for each of {ranks} processes"
    share = whole / ranks if device.type == "cpu" else whole
    lines = [f"{line}; {on} has {format_bytes(share)}"]
    if peak <= share * USABLE:
        return lines, True
    return lines + advise(config, cfg, world, dtype, share * USABLE, peak), False


def check_memory(cfg: Any, config: Any, world: World, dtype: torch.dtype) -> None:
    """Warns if a run may not fit, before it allocates anything. Raises UserError if the predicted
    peak is over 10 times the memory, which cannot be an error of the prediction."""
    lines, fits = describe_memory(config, cfg, world, dtype)
    if fits or cfg.eval_only:  # the prediction is for training
        return
    if sum(memory(config, cfg, world, dtype).values()) > 10 * device_memory(world.device):
        raise UserError(f"{lines[0]}: that does not fit; use a smaller model or a lower "
                        "--batch_size")
    say("\n".join([*lines, "warning: the memory may be too small (see above): the system may kill "
                           "the run"]))


def advise(config, cfg, world, dtype, usable, peak):
    """Lines that name fields to change, each in addition to the ones before, until the run fits."""
    lines = [f"that does not fit: {format_bytes(peak)} are needed, {format_bytes(usable)} can be "
             "used"]
    for change in changes(config, cfg, world):
        tried = replace(cfg, **change)
        with_config = replace(config, **{name: value for name, value in change.items()
                                         if name == length_name(config)})
        left = sum(memory(with_config, tried, world, dtype).values())
        if left >= peak * 0.99:
            continue
        fields = " ".join(f"--{name}={value}" for name, value in change.items())
        saved, peak = peak - left, left
        fits = peak <= usable
        lines.append(f"  {fields} saves {format_bytes(saved)}: {format_bytes(peak)}"
                     + (", which fits" if fits else ""))
        cfg, config = tried, with_config
        if fits:
            return lines
    return lines + ["  still too much: use a smaller model (--init_from) or a larger device"]


def changes(config, cfg, world):
    """Yields field changes that save memory, first those that change the result least."""
    if cfg.batch_size > 1:
        yield {"batch_size": 1, "gradient_accumulation_steps":
               cfg.gradient_accumulation_steps * cfg.batch_size}
    if not cfg.recompute:
        yield {"recompute": True}
    if shares_of(cfg, world) == 1:
        if cfg.optimizer == "adamw" and not cfg.lora_rank:
            yield {"optimizer": "adamw8bit"}
        if cfg.weights == "float32":
            yield {"weights": "bfloat16"}
        if not cfg.lora_rank and cfg.init_from != "scratch":
            yield {"optimizer": "adamw", "lora_rank": 16}
    length = getattr(config, length_name(config))
    if length > 256:
        yield {length_name(config): length // 2}


def length_name(config):
    """The option that limits the tokens of a sample."""
    return "source_length" if config.takes_pairs else "block_size"
