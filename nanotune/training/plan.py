"""Predicts what a run needs before it begins: tokens, epochs, parameters, disk, memory."""
import shutil
from dataclasses import astuple, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from nanotune.device import DTYPES, device_memory
from nanotune.formats.checkpoint import model_class
from nanotune.training.distributed import World
from nanotune.training.lora import adapters, add_lora
from nanotune.training.optimizer import moments_per_scale

ADAMW_COPIES = 3  # a state file holds the weights and two moments of them


def describe(n_params: int, tokens_per_iter: int, iters: int, train_tokens: int, val_tokens: int,
             world: World, dtype: torch.dtype, compiled: bool, dataset: str) -> list[str]:
    """Returns lines of text about the model, the data and the number of epochs."""
    epochs = iters * tokens_per_iter / train_tokens
    ranks = f" x {world.size} processes" if world.size > 1 else ""
    precision = str(dtype).removeprefix("torch.") + (", compiled" if compiled else "")
    return [
        f"model: {n_params / 1e6:.2f}M parameters, {world.device}{ranks}, {precision}",
        f"data: {dataset}, {train_tokens:,} training tokens, {val_tokens:,} for validation",
        f"tokens per iteration: {tokens_per_iter:,}; {iters} iterations make {epochs:.2f} epochs "
        f"(1 epoch = {train_tokens / tokens_per_iter:.1f} iterations)",
    ]


def describe_saves(n_params: int, out_dir: str, keep_states: int, shares: int,
                   sizes: tuple[int, int] | None = None) -> list[str]:
    """Returns lines of text about the disk and, if sharded (shares > 1), the memory of a save; the
    last warns if the disk is too small. `sizes`: bytes of ckpt.pt and state.pt; None: float32."""
    model_bytes, state_bytes = sizes or (4 * n_params, 4 * n_params * ADAMW_COPIES)
    there = next(path for path in (Path(out_dir), *Path(out_dir).absolute().parents)
                 if path.is_dir())
    free = shutil.disk_usage(there).free
    # the new state is written before an old one is deleted
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


def save_bytes(model, cfg):
    """(bytes of ckpt.pt, bytes of state.pt); a LoRA run saves only the adapters."""
    saved = adapters(model).values() or list(model.parameters())
    model_bytes = sum(p.numel() * p.element_size() for p in saved)
    return model_bytes, model_bytes + sum(moment_bytes(p.numel(), cfg.optimizer) for p in saved)


def spell_bytes(n: float) -> str:
    """Returns a number of bytes as text, such as 1.49 GB."""
    for unit in ("bytes", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"


# -----------------------------------------------------------------------------
# what train.py prints

def plan_lines(cfg: Any, config: Any, world: World, dtype: torch.dtype, compiled: bool,
               train_tokens: int, val_tokens: int) -> tuple[list[str], bool]:
    """Returns (the plan of a train.Config and a GPTConfig as lines of text, whether it fits)."""
    model = meta_model(config, cfg)
    lines = describe(
        model.num_params(), cfg.gradient_accumulation_steps * cfg.batch_size * config.block_size,
        cfg.max_iters, train_tokens, val_tokens, world, dtype, compiled, cfg.dataset)
    if cfg.lora_rank:
        trained = sum(p.numel() for p in adapters(model).values())
        lines.append(f"LoRA of rank {cfg.lora_rank}: {trained / 1e6:.2f}M of them are trained")
    sharded = world.size > 1 and cfg.parallel == "fsdp"
    lines += describe_saves(model.num_params(), cfg.out_dir, cfg.keep_states,
                            world.size if sharded else 1, save_bytes(model, cfg))
    more, fits = describe_memory(config, cfg, world.device, dtype, world.size)
    return lines + more, fits


def tell_plan(r: Any) -> None:
    """Logs the plan of a run.Run and warns of likely mistakes; only rank 0 does."""
    cfg, p = r.cfg, r.progress
    if not r.world.is_main:
        return
    for line in r.start.warnings:
        r.log.warn(line)
    lines, fits = plan_lines(cfg, r.model.config, r.world, r.dtype, r.compiled,
                             *map(len, r.data.values()))
    for line in lines:
        r.log.say(line)
    if not fits:
        r.log.warn("the memory may not suffice, see above: the system may kill the run")
    data = r.data["train"]
    if data.mask is not None and r.tokenizer.eot is not None:  # prompts and completions
        long, examples = data.count_long(r.tokenizer.eot)
        if long:
            r.log.warn(f"{long:,} of {examples:,} examples are longer than block_size="
                       f"{data.block_size}: no window holds one whole, so the model sees the end "
                       "of one without its beginning; raise --block_size or shorten them")
    if p.step:
        r.log.say(f"resuming at step {p.step} of {cfg.max_iters}")
    if p.step >= cfg.max_iters and p.evaluated == p.step:
        r.log.warn(f"the run is at step {p.step} already: raise --max_iters to train on")
    if cfg.decay_lr and 0 < cfg.max_iters <= cfg.warmup_iters:
        r.log.warn(f"warmup_iters={cfg.warmup_iters} is not less than max_iters={cfg.max_iters}: "
                   "the learning rate never reaches --learning_rate; lower --warmup_iters")


# -----------------------------------------------------------------------------
# memory

USABLE = 0.95     # fraction of a device's memory; driver, system and fragmentation take the rest
# bytes in a process on a CPU, measured on Linux with torch 2.13
PROCESS = 0.31e9   # torch and the tokenizer
COMPILER = 0.1e9   # torchao and Inductor
HEAP_SLACK = 0.85  # holes in glibc's heap, as a fraction of the activations


def memory(config: Any, cfg: Any, device_type: str, dtype: torch.dtype,
           ranks: int = 1) -> dict[str, float]:
    """Returns {part: bytes} at the peak of a training step: allocated memory on a GPU, resident
    memory on a CPU. `config` is a GPTConfig, `cfg` a train.Config, `dtype` autocast's. Gradients
    appear when most activations are freed, but remain during the micro-steps after the first."""
    model = meta_model(config, cfg)
    params = list(model.parameters())
    trained = [p for p in params if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    kept, block = model.activation_bytes(cfg.batch_size, device_type, dtype)
    during, after = model.head_bytes(cfg.batch_size, device_type, dtype)
    whole = cfg.gradient_accumulation_steps // ranks > 1 or ranks > 1  # DDP buckets all gradients
    shares = ranks if cfg.parallel == "fsdp" else 1
    parts = {
        "weights": sum(p.numel() * p.element_size() for p in params) / shares,
        "optimizer": sum(moment_bytes(p.numel(), cfg.optimizer) for p in trained) / shares,
        "process": 0.0,
    }
    gradients /= shares
    if device_type == "cpu":
        parts["process"] = PROCESS + COMPILER * (cfg.optimizer == "adamw8bit")
        kept *= 1 + HEAP_SLACK * (not cfg.recompute)
    moments = [{"gradients": gradients * whole, "activations": kept + block, "logits": during},
               {"gradients": gradients, "activations": block, "logits": after}]
    return parts | max(moments, key=lambda moment: sum(moment.values()))


def meta_model(config: Any, cfg: Any) -> torch.nn.Module:
    """The model of a run on the meta device: shapes and dtypes, no memory."""
    model = make_meta_model(type(config), astuple(replace(config, dropout=cfg.dropout)),
                            cfg.weights, cfg.lora_rank)
    model.recompute = cfg.recompute
    return model


@lru_cache(maxsize=8)  # takes 0.3 s for gpt2-xl, and advise() calls it often
def make_meta_model(config_class, fields, weights, lora_rank):
    config = config_class(*fields)
    model = model_class(config).empty(config, "meta", DTYPES[weights])
    if lora_rank:
        add_lora(model, lora_rank)
    return model


def moment_bytes(numel: int, optimizer: str) -> int:
    """The bytes of the two moments of a tensor with `numel` numbers."""
    block = moments_per_scale(numel) if optimizer == "adamw8bit" else None
    return 8 * numel if block is None else 2 * numel + 8 * numel // block


def describe_memory(config: Any, cfg: Any, device: torch.device, dtype: torch.dtype,
                    ranks: int = 1) -> tuple[list[str], bool]:
    """Returns (lines with the predicted peak and the device's memory, whether it fits). If not, the
    lines also name fields to change and what each saves."""
    parts = memory(config, cfg, device.type, dtype, ranks)
    peak, whole = sum(parts.values()), device_memory(device)
    where = "the process" if device.type == "cpu" else "allocated"
    said = ", ".join(f"{name} {spell_bytes(n)}" for name, n in parts.items() if n)
    line = f"memory, {where} at its peak: {spell_bytes(peak)} ({said})"
    if whole is None:
        return [line], True
    on = device if ranks == 1 else f"{device} for each of {ranks} processes"
    share = whole / ranks if device.type == "cpu" else whole
    lines = [f"{line}; {on} has {spell_bytes(share)}"]
    if peak <= share * USABLE:
        return lines, True
    return lines + advise(config, cfg, device.type, dtype, ranks, share * USABLE, peak), False


def advise(config, cfg, device_type, dtype, ranks, usable, peak):
    """Lines that name fields to change, one after the other until the run fits."""
    lines = [f"that does not fit: {spell_bytes(peak)} of {spell_bytes(usable)} that can be used"]
    for change in changes(config, cfg, ranks):
        tried = replace(cfg, **change)
        with_config = replace(config, block_size=tried.block_size or config.block_size)
        left = sum(memory(with_config, tried, device_type, dtype, ranks).values())
        if left >= peak * 0.99:
            continue
        fields = " ".join(f"--{name}={value}" for name, value in change.items())
        saved, peak = peak - left, left
        fits = peak <= usable
        lines.append(f"  {fields} saves {spell_bytes(saved)}: {spell_bytes(peak)}"
                     + (", which fits" if fits else ""))
        cfg, config = tried, with_config
        if fits:
            return lines
    return lines + ["  then a smaller model (--init_from), or a larger device"]


def changes(config, cfg, ranks):
    """Yields field changes that save memory, first those that change the result least."""
    if cfg.batch_size > 1:
        yield {"batch_size": 1, "gradient_accumulation_steps":
               cfg.gradient_accumulation_steps * cfg.batch_size}
    if not cfg.recompute:
        yield {"recompute": True}
    if cfg.parallel == "ddp" or ranks == 1:
        if cfg.optimizer == "adamw" and not cfg.lora_rank:
            yield {"optimizer": "adamw8bit"}
        if cfg.weights == "float32":
            yield {"weights": "bfloat16"}
        if not cfg.lora_rank and cfg.init_from != "scratch":
            yield {"optimizer": "adamw", "lora_rank": 16}
    if config.block_size > 256:
        yield {"block_size": config.block_size // 2}
