"""Finetunes a GPT or a T5, or pretrains a GPT, with one process or many.

    python train.py config/finetune_shakespeare.py
    python train.py config/finetune_shakespeare.py --init_from=gpt2 --batch_size=4
    torchrun --standalone --nproc_per_node=4 train.py config/finetune_shakespeare.py
    python train.py config/finetune_shakespeare.py --init_from=resume
    torchrun --standalone --nproc_per_node=4 --max-restarts=3 train.py ... --auto_resume=True

A step takes gradient_accumulation_steps * batch_size samples, split among the processes. Its
samples and random numbers depend only on the seed and the step, so a stopped run resumes exactly.
"""
import math
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import nanotune.threads  # noqa: F401

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from configurator import (
    AboveZero,
    AtLeast0,
    AtLeast1,
    EscapedText,
    Fraction,
    NonNegative,
    Rank,
    Seconds,
    Seed,
    UpTo1000,
    UpTo65536,
)
from nanotune import files
from nanotune.cli import StopSignals, resume_command, run
from nanotune.device import DtypeName, autocast, matmul_peak, peak_memory
from nanotune.errors import NonFiniteLoss, UserError
from nanotune.evaluation.perplexity import evaluate_loss
from nanotune.formats import checkpoint
from nanotune.generation.generate import stream
from nanotune.training import distributed, logbook, plan, resume, settings, state_dicts
from nanotune.training import optimizer as optimizers
from nanotune.training.distributed import broadcast, sum_over_ranks
from nanotune.training.run import (
    Run,
    check,
    config_to_save,
    dry_run,
    out_dir_lock,
    print_choices,
    read_config,
    set_up,
)

MAX_SKIPPED = 10  # the run stops if the float16 scaler skips this many steps in a row
# no cuDNN: it plans each new cache length anew, which takes longer than computing a token
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class Config:
    ONE_OF: ClassVar = (("epochs", "max_iters"),)
    # I/O
    out_dir: str = "out"              # the folder of the run
    eval_interval: AtLeast1 = 2000    # steps between evaluations; also at the first and last step
    log_interval: AtLeast1 = 1        # steps between printed losses
    eval_iters: AtLeast0 = 2400  # windows of block_size per split; 0: all of val, as many of train
    eval_only: bool = False           # evaluate once and stop; write nothing
    dry_run: bool = False             # print the plan and the predicted memory; load no weights
    always_save_checkpoint: bool = True  # write ckpt.pt at each evaluation; False: only if better
    init_from: str = "scratch"  # scratch, resume, gpt2*, a hub id, a Hugging Face folder, a run
    overwrite: bool = False           # replace the run in out_dir with a new one
    auto_resume: bool = False  # resume if out_dir has a saved state, else start from init_from
    force_resume: bool = False  # resume even if seed, data, block_size or global batch differ
    save_interval: AtLeast1 | None = None  # steps between saves of state.pt; None: eval_interval
    keep_states: UpTo1000 = 2  # states to keep: if the newest is damaged, an older one is used
    sample_interval: AtLeast0 = 0     # evaluations between printed samples; 0: none
    sample_start: EscapedText = "\n"  # the sample's prompt
    # wandb
    wandb_log: bool = False
    wandb_project: str = "nanotune"
    wandb_run_name: str | None = None  # None: out_dir
    tensorboard: bool = False         # log to out_dir/tensorboard
    # data
    dataset: str = "openwebtext"      # a folder in data/, or a path
    gradient_accumulation_steps: UpTo65536 = 5 * 8  # micro-steps per step, over all processes
    batch_size: UpTo65536 = 12        # samples per micro-step
    block_size: AtLeast1 | None = None  # tokens per sample; None: the model's, 1024 from scratch
    separate_documents: bool = False  # tokens attend only to their own document
    source_length: AtLeast1 | None = None  # pairs: max tokens of a source; None: the model's, 512
    target_length: AtLeast1 | None = None  # pairs: max tokens of a target; None: the model's, 512
    # model (from scratch; a pretrained model takes only dropout)
    n_layer: UpTo1000 = 12
    n_head: UpTo65536 = 12
    n_embd: UpTo65536 = 768
    dropout: Fraction = 0.0           # for pretraining 0 is good, for finetuning try 0.1
    bias: bool = False                # biases in LayerNorms and Linears
    # optimizer
    learning_rate: NonNegative = 6e-4  # the maximum, reached after warmup
    max_iters: AtLeast0 = 600000      # steps in total
    epochs: AboveZero | None = None   # passes over the data, instead of max_iters
    weight_decay: NonNegative = 1e-1  # on matrices and embeddings only
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    grad_clip: NonNegative = 1.0      # clip the gradient to this norm; 0: no clipping
    patience: AtLeast0 = 0  # stop after this many evaluations without improvement; 0: never
    # memory
    weights: Literal["float32", "bfloat16"] = "float32"  # bfloat16: half the memory
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"  # moments: 8, 2, 0 bytes/weight
    recompute: bool = False  # recompute activations: saves memory, takes 4/3 of the time
    lora_rank: Rank = 0  # train only adapters of this rank; 0: train all weights
    # learning rate
    decay_lr: bool = True             # cosine decay after warmup; False: constant
    warmup_iters: AtLeast0 = 2000     # steps of linear warmup
    lr_decay_iters: AtLeast0 | None = None  # None: max_iters
    min_lr: NonNegative | None = None  # None: learning_rate / 10
    # system
    parallel: Literal["ddp", "fsdp"] = "ddp"  # fsdp shards the model
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    timeout: Seconds = 600            # seconds to wait for a process that does not answer
    device: str = "auto"              # auto, cpu, cuda, cuda:N, mps
    dtype: DtypeName = "auto"         # float16 uses a GradScaler
    compile: bool | Literal["auto"] = "auto"  # auto: if torch.compile is known to work
    seed: Seed = 1337                 # for initial weights, data order and dropout


# -----------------------------------------------------------------------------
# one step

def learning_rate_at(cfg: Config, step: int) -> float:
    """The learning rate of a step: linear warmup, then cosine decay to min_lr; or constant."""
    if not cfg.decay_lr:
        return cfg.learning_rate
    min_lr = cfg.learning_rate / 10 if cfg.min_lr is None else cfg.min_lr
    decay_iters = cfg.max_iters if cfg.lr_decay_iters is None else cfg.lr_decay_iters
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    if step >= decay_iters:
        return min_lr
    ratio = (step - cfg.warmup_iters) / (decay_iters - cfg.warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (cfg.learning_rate - min_lr)


def seed_draws(*numbers: int) -> None:
    """Seeds torch's generators on all devices from integers such as (seed, step)."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1)


def count_targets(r: Run, step: int) -> int:
    """The number of targets in a step's *global* batch that count in the loss."""
    samples = r.cfg.gradient_accumulation_steps * r.cfg.batch_size
    return r.data["train"].count_targets(step * samples, samples)


def forward_backward(r: Run, step: int) -> torch.Tensor:
    """Accumulates the gradients of this rank's micro-batches. Returns their summed loss divided by
    the *global* number of targets: the sum over ranks is the mean loss, in nats per token."""
    cfg, world = r.cfg, r.world
    micro_steps = cfg.gradient_accumulation_steps
    first = step * micro_steps * cfg.batch_size
    count, total = max(1, count_targets(r, step)), 0.0
    for micro in range(world.rank, micro_steps, world.size):
        x, y = r.data["train"].batch(first + micro * cfg.batch_size, cfg.batch_size)
        if world.device.type == "cuda":  # pinned memory: the copy overlaps with the GPU's work
            x, y = x.pin_memory(), y.pin_memory()
        x, y = x.to(world.device, non_blocking=True), y.to(world.device, non_blocking=True)
        seed_draws(cfg.seed, step, 1 + micro)  # the same dropout for any number of ranks
        last = micro + world.size >= micro_steps
        with distributed.gradient_sync(r.forward, last):
            with autocast(world.device, r.dtype):
                loss = r.forward(x, y) / count
            # DDP and FSDP average over ranks; the global batch needs the sum
            r.scaler.scale(loss * world.size).backward()
        total = total + loss.detach()
    return total


def gradient_norm(r: Run) -> tuple[torch.Tensor, float]:
    """The norm of the whole gradient as a tensor and as a float. A CPU-GPU sync point."""
    r.scaler.unscale_(r.optimizer)
    norm = distributed.total_norm([p.grad for p in r.model.parameters() if p.grad is not None])
    return norm, float(norm)


def update(r: Run, loss: float, norm: torch.Tensor, finite: bool, step: int,
           skipped_in_a_row: int) -> int:
    """Clips the gradient and updates the weights. Returns how many steps in a row the float16
    scaler skipped. Raises NonFiniteLoss if they are MAX_SKIPPED, or before the update if the loss
    or, without a scaler, the gradient is not finite. All ranks pass the same `loss`, `finite`."""
    if not math.isfinite(loss) or not (finite or r.scaler.is_enabled()):
        what = "gradient norm is not finite" if math.isfinite(loss) else f"loss is {loss}"
        raise NonFiniteLoss(
            f"step {step}: the {what}; stopped before the step, so the files in "
            f"{r.cfg.out_dir} are intact; try a lower --learning_rate, a longer --warmup_iters, "
            "--grad_clip=1.0 or --dtype=float32, and check the data")
    if r.cfg.grad_clip > 0 and finite:
        params = [p for p in r.model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(params, r.cfg.grad_clip, norm)
    seed_draws(r.cfg.seed, step, 0)  # for stochastic rounding: equal on all ranks
    r.scaler.step(r.optimizer)
    r.scaler.update()
    r.optimizer.zero_grad(set_to_none=True)
    if finite:
        return 0
    r.progress.skipped += 1
    if skipped_in_a_row + 1 == MAX_SKIPPED:
        raise NonFiniteLoss(
            f"step {step}: the fp16 scaler skipped {MAX_SKIPPED} steps in a row: the gradients "
            "overflow; try a lower --learning_rate, --dtype=bfloat16 or --dtype=float32")
    return skipped_in_a_row + 1


# -----------------------------------------------------------------------------
# evaluation and saving

def evaluate_and_save(r: Run) -> None:
    """Evaluates both splits and logs the losses; writes ckpt.pt if due, and state.pt unless
    save_interval is set. Raises NonFiniteLoss if the validation loss is not finite."""
    cfg, p, log = r.cfg, r.progress, r.log
    train_loss, val_loss = evaluate_splits(r)
    if not math.isfinite(val_loss):
        raise NonFiniteLoss(
            f"step {p.step}: the validation loss is {val_loss}; stopped without saving, so the "
            f"files in {cfg.out_dir} are intact; try a lower --learning_rate or --dtype=float32")
    begin(r)
    improved, before = val_loss < p.best_val_loss, replace(p)
    if improved:
        p.best_val_loss, p.best_train_loss, p.best_step = val_loss, train_loss, p.step
        p.worse, p.warned = 0, False
    else:
        p.worse += 1
        rises = val_loss > 1.01 * p.best_val_loss  # 1 %: a smaller rise may be noise
        if rises and train_loss < p.best_train_loss and not p.warned:
            log.warn(f"validation loss rises while training loss falls: overfitting; the best was "
                     f"{p.best_val_loss:.4f} at step {p.best_step}")
            p.warned = True
    p.evaluated = p.step
    log.evaluation(p.step, train_loss, val_loss)
    if improved or cfg.always_save_checkpoint:
        saved = save(r, checkpoint.MODEL_FILE, improved and cfg.always_save_checkpoint)
        if improved and not saved:  # the best on disk is still the previous one
            vars(p).update(vars(before) | {"evaluated": p.step})
    if cfg.save_interval is None:  # last: a run killed before this save repeats the evaluation
        save(r, checkpoint.STATE_FILE)
    if cfg.sample_interval and p.step // cfg.eval_interval % cfg.sample_interval == 0:
        show_sample(r)


def begin(r: Run) -> None:
    """Prepares out_dir for this run, once. With overwrite this happens after the first evaluation:
    the old run stays intact until the new one is known to work."""
    if not r.begun:
        if r.world.is_main:
            try:
                resume.begin(r.cfg.out_dir, r.start,
                             checkpoint.best_file(r.cfg.always_save_checkpoint))
                settings.write_settings(r.cfg, config_to_save(r), r.argv, r.model.config)
            except files.WriteError as e:
                r.log.warn(str(e))
        r.log.begin()
    r.begun = True


def evaluate_splits(r: Run) -> list[float]:
    count = r.cfg.eval_iters or len(r.data["val"].windows())
    return [evaluate_loss(r.model, data, data.windows(count), r.cfg.batch_size, r.world, r.dtype)
            for data in r.data.values()]


def save(r: Run, name: str, as_best: bool = False) -> bool:
    """Writes ckpt.pt or state.pt on rank 0; all ranks must call it. Returns whether the write
    succeeded; if not, it warns, and the previous file is intact. Raises NonFiniteLoss if the
    weights are not finite: the file would replace a good one."""
    cfg, p, whole = r.cfg, r.progress, name == checkpoint.STATE_FILE
    weights = state_dicts.whole_weights(r.model)
    if not broadcast(r.world, state_dicts.are_finite(weights)):
        raise NonFiniteLoss(
            f"step {p.step}: the weights are not finite; stopped without saving, so the "
            f"files in {cfg.out_dir} are intact; try a lower --learning_rate or --dtype=float32")
    moments = state_dicts.optimizer_state(r.model, r.optimizer) if whole else None
    error = None
    if r.world.is_main:
        data = checkpoint.model_data(r.model, p.step, p.best_val_loss, config_to_save(r),
                                     r.tokenizer, weights, p.run_id, r.start.lora)
        if whole:
            data |= {"optimizer": moments, "scaler": r.scaler.state_dict(), "progress": asdict(p),
                     "data": {split: dataset.fingerprint for split, dataset in r.data.items()}}
        try:
            files.save(Path(cfg.out_dir) / name, data, cfg.keep_states if whole else 1)
            if as_best:
                files.link(Path(cfg.out_dir) / name, Path(cfg.out_dir) / checkpoint.BEST_FILE)
        except files.WriteError as e:
            error = str(e)
            r.log.warn(f"step {p.step}: {error}. The run goes on and tries again at the next save")
    r.not_saved[name] = error = broadcast(r.world, error)
    if whole:
        r.tried_step = p.step
        if r.world.is_main and not error:
            resume.write_run_file(cfg.out_dir, p, "running", saved_step=p.step)
    return not error


@torch.no_grad()
def show_sample(r, length=120):
    """Prints a sample of `length` new tokens. All ranks must call it: the model may be sharded."""
    r.model.eval()
    generator = torch.Generator(r.world.device).manual_seed(r.cfg.seed)
    ids, pairs = r.tokenizer.encode(r.cfg.sample_start), r.model.config.takes_pairs
    # eager: torch.compile would recompile for these shapes
    with (torch.compiler.set_stance("force_eager"), sdpa_kernel(ANY_LENGTH),
          r.model.lm_head.keep(), autocast(r.world.device, r.dtype, cache=True)):
        new = stream(r.model, [ids], length, temperature=0.8, top_k=200,
                     stop_token=r.tokenizer.eot if pairs else None,
                     n_vocab=r.tokenizer.n_vocab, generator=generator)
        new = [int(token) for token in new]
    r.model.train()
    texts = map(r.tokenizer.decode, [ids, new] if pairs else [ids + new])
    r.log.sample(r.progress.step, "\n".join(texts))


# -----------------------------------------------------------------------------
# the loop

def train(r: Run, signals: StopSignals) -> int:
    cfg, p, log = r.cfg, r.progress, r.log
    samples = cfg.gradient_accumulation_steps * cfg.batch_size
    tokens_per_iter = round(samples * r.data["train"].tokens_per_sample)
    peak = matmul_peak(r.world.device, r.dtype)
    began, timed, skipped = time.perf_counter(), 0, 0
    # explains why the first training loss differs from the evaluation's, which has no dropout
    note = f", with dropout {cfg.dropout}" if cfg.dropout else ""
    r.model.train()
    while True:
        step = p.step
        if (step % cfg.eval_interval == 0 or step == cfg.max_iters) and p.evaluated != step:
            evaluate_and_save(r)
            began, timed = time.perf_counter(), 0
        if cfg.save_interval and step % cfg.save_interval == 0 and r.tried_step != step:
            save(r, checkpoint.STATE_FILE)
            began, timed = time.perf_counter(), 0
        if cfg.patience and p.worse >= cfg.patience:
            log.say(f"no better validation loss in {p.worse} evaluations: stopped early")
            return 0
        if step >= cfg.max_iters:
            return 0

        lr = learning_rate_at(cfg, step)
        optimizers.set_rate(r.optimizer, lr)
        loss = forward_backward(r, step)
        norm, norm_value = gradient_norm(r)
        # a signal or a NaN on one rank reaches all ranks at the same step
        loss, stop, bad = sum_over_ranks(loss, signals.received, not math.isfinite(norm_value),
                                         device=r.world.device)
        skipped = update(r, loss, norm, not bad, step, skipped)
        p.step += 1

        timed += 1
        log.bar.update(1)
        if step % cfg.log_interval == 0:
            seconds = (time.perf_counter() - began) / timed
            targets = count_targets(r, step)
            flops = tokens_per_iter * r.model.flops_per_token(targets / tokens_per_iter) / seconds
            mfu = flops / (peak * r.world.size)
            log.iteration(step, loss, lr, seconds, tokens_per_iter, mfu if mfu <= 1 else None,
                          p.skipped, peak_memory(r.world.device), targets, note)
            note = ""
            began, timed = time.perf_counter(), 0
        if stop:
            return 128 + int(signals.received or signal.SIGTERM)


def log_end(r):
    p, cfg = r.progress, r.cfg
    best = Path(cfg.out_dir, checkpoint.best_file(cfg.always_save_checkpoint))
    source = cfg.out_dir if best.name == checkpoint.MODEL_FILE else best
    r.log.say(f"best validation loss {p.best_val_loss:.4f} at step {p.best_step}, in {best}; "
              f"sample from it: {shlex.join(['python', 'sample.py', f'--out_dir={source}'])}")
    if p.best_step == 0 and p.step:
        r.log.warn("no evaluation was better than the one at step 0: try another --learning_rate "
                   "or more data")


def finish(r: Run, status: int) -> None:
    """Writes the last step's state.pt, and ckpt.pt with always_save_checkpoint, unless they are
    written already; then prints how the run ended. Raises UserError if a file was not written."""
    if r.tried_step != r.progress.step:
        if r.cfg.always_save_checkpoint and r.progress.evaluated != r.progress.step:
            save(r, checkpoint.MODEL_FILE)
        save(r, checkpoint.STATE_FILE)
    if status:
        r.log.say(f"stopped by a signal after step {r.progress.step - 1}; resume with:\n"
                  f"  {resume_command(r.cfg.out_dir)}")
    for error in filter(None, r.not_saved.values()):
        raise UserError(error)
    if status == 0:
        log_end(r)


def main(argv: list[str]) -> None:
    if not argv:
        return print_choices()
    cfg, changes = read_config(Config, argv)
    if cfg.dry_run:
        return dry_run(cfg)
    world = check(cfg)
    with out_dir_lock(cfg, world):
        run_on(set_up(cfg, argv, world), changes)


def run_on(r: Run, changes: list[str]) -> None:
    """Evaluates, or trains and exits; `changes` are lines to print before training."""
    cfg, p, main_rank = r.cfg, r.progress, r.world.is_main
    if cfg.eval_only:
        train_loss, val_loss = evaluate_splits(r)
        if main_rank:
            print(f"step {p.step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        return
    wandb_run = logbook.start_wandb(cfg, p.run_id) if cfg.wandb_log and main_rank else None
    wanted = cfg.tensorboard and main_rank
    tensorboard = logbook.start_tensorboard(cfg.out_dir, p.step) if wanted else None
    r.log = logbook.Logbook(cfg.out_dir, p.step, cfg.max_iters, main_rank, wandb_run, tensorboard)
    for line in changes:
        r.log.say(line)
    plan.print_plan(r)
    if r.start.path or not cfg.overwrite:
        begin(r)
    ended, status = "failed", 1
    try:
        with StopSignals() as signals:
            status = train(r, signals)
            finish(r, status)
        ended = "stopped" if status else "done"
    finally:
        r.log.close(status)
        if main_rank and r.begun:
            resume.write_run_file(cfg.out_dir, p, ended, (
                None if r.not_saved.get(checkpoint.STATE_FILE) else r.tried_step))
    distributed.barrier()
    sys.exit(status)


if __name__ == "__main__":
    run(main)
