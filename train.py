"""Finetunes or pretrains a GPT, on one process or many.

    python train.py config/finetune_shakespeare.py
    python train.py config/finetune_shakespeare.py --init_from=gpt2 --batch_size=4
    torchrun --standalone --nproc_per_node=4 train.py config/finetune_shakespeare.py
    python train.py config/finetune_shakespeare.py --init_from=resume
    torchrun --standalone --nproc_per_node=4 --max-restarts=3 train.py ... --auto_resume=True

A step takes gradient_accumulation_steps * batch_size samples, shared among the processes. What it
computes depends on the seed and the step alone: so a stopped run resumes exactly.
"""
import math
import os
import shlex
import signal
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from configurator import configure
from model import GPT, GPTConfig
from nanotune import files
from nanotune.cli import run
from nanotune.device import (
    DTYPES,
    autocast,
    matmul_peak,
    peak_memory,
    pick_compile,
    pick_dtype,
    tune_malloc,
)
from nanotune.errors import NonFiniteLoss, UserError
from nanotune.evaluation.perplexity import evaluate_loss
from nanotune.formats import checkpoint
from nanotune.generation.generate import stream
from nanotune.text.loader import TokenBin, dataset_folder, open_tokens
from nanotune.text.tokenizer import check_same_tokenizer, tokenizer_of_dataset
from nanotune.training import distributed, logbook, lora, plan, resume, state_dicts
from nanotune.training import optimizer as optimizers
from nanotune.training.distributed import read_world, share, sum_over_ranks

MAX_SKIPPED = 10  # fp16 steps in a row that the scaler may skip
# not cuDNN's, which plans anew, for longer than a token takes, for each length of a cache
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class Config:
    # I/O
    out_dir: str = "out"
    eval_interval: int = 2000    # steps between evaluations; also at step 0 and at the last
    log_interval: int = 1
    eval_iters: int = 200        # batches of batch_size windows an evaluation; 0: the whole split
    eval_only: bool = False      # evaluate once and stop; writes nothing
    dry_run: bool = False        # print the plan, memory included, and stop; loads no weights
    always_save_checkpoint: bool = True  # ckpt.pt at each evaluation; False: only the best so far
    init_from: str = "scratch"   # scratch, resume, gpt2*, a hub id, a Hugging Face folder, a run
    overwrite: bool = False      # begin a new run in an out_dir that holds one
    auto_resume: bool = False    # resume where out_dir holds a state, else begin as init_from says
    force_resume: bool = False   # resume although seed, dataset, block_size or global batch differ
    save_interval: int | None = None  # steps between saves of state.pt; None: at each evaluation
    keep_states: int = 2         # states that stay on disk: a damaged one falls back to the last
    sample_interval: int = 0     # show a sample at every so many evaluations; 0: never
    sample_start: str = "\n"     # the sample's prompt
    # wandb
    wandb_log: bool = False
    wandb_project: str = "nanotune"
    wandb_run_name: str = "gpt2"
    # data
    dataset: str = "openwebtext"  # a folder below data/, or a path
    gradient_accumulation_steps: int = 5 * 8  # micro-steps a step, over all processes
    batch_size: int = 12         # samples a micro-step
    block_size: int | None = None  # None: the model's own, 1024 from scratch; less crops it
    separate_documents: bool = False  # tokens see their own document only, up to its end-of-text
    # model (from scratch; a pretrained one brings its own, and takes the dropout)
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0         # for pretraining 0 is good, for finetuning try 0.1
    bias: bool = False           # biases in LayerNorms and Linears
    # optimizer
    learning_rate: float = 6e-4  # the highest
    max_iters: int = 600000      # steps in all
    weight_decay: float = 1e-1   # on matrices and embeddings only
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0       # largest norm of the gradient; 0: no clipping
    patience: int = 0            # stop after so many evaluations without a better one; 0: never
    # memory
    weights: str = "float32"     # bfloat16: half of it for weights and gradients
    optimizer: str = "adamw"     # adamw8bit: moments in 2 bytes a weight, not 8 (needs torchao)
    recompute: bool = False      # work activations out again in the backward pass: 4/3 of the time
    lora_rank: int = 0           # train adapters of this rank beside frozen weights; 0: all weights
    # learning rate
    decay_lr: bool = True        # cosine decay after warmup; False: constant
    warmup_iters: int = 2000
    lr_decay_iters: int | None = None  # None: max_iters
    min_lr: float | None = None  # None: learning_rate / 10
    # system
    parallel: str = "ddp"        # on several processes: ddp copies the model, fsdp shares it out
    backend: str = "auto"        # auto, nccl, gloo
    timeout: int = 600           # seconds to wait for a process that does not answer
    device: str = "auto"         # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"          # auto, float32, bfloat16, float16 (with a GradScaler)
    compile: bool | str = "auto"  # auto: where torch.compile is known to work
    seed: int = 1337             # of weights, data order and dropout


# -----------------------------------------------------------------------------
# setup: what one process can check comes before the processes join; rank 0 alone reads and writes
# out_dir and init_from, so that machines need no common disk

def check_config(cfg, world, dtype):
    """Raises UserError for fields that do not go together."""
    accumulation = cfg.gradient_accumulation_steps
    for name in ("batch_size", "gradient_accumulation_steps", "eval_interval", "log_interval",
                 "n_layer", "n_head", "n_embd", "block_size", "save_interval", "keep_states",
                 "timeout"):
        if getattr(cfg, name) is not None and getattr(cfg, name) < 1:
            raise UserError(f"--{name}={getattr(cfg, name)} must be at least 1")
    for name in ("eval_iters", "max_iters", "learning_rate", "weight_decay", "grad_clip",
                 "warmup_iters", "patience", "sample_interval", "lora_rank"):
        if getattr(cfg, name) < 0:
            raise UserError(f"--{name}={getattr(cfg, name)} must be at least 0")
    for name in ("dropout", "beta1", "beta2"):
        if not 0 <= getattr(cfg, name) < 1:
            raise UserError(f"--{name}={getattr(cfg, name)} must be in [0, 1)")
    if not 0 <= cfg.seed < 2**32:
        raise UserError(f"--seed={cfg.seed} must be in [0, 2**32)")
    if accumulation % world.size:
        lower = accumulation - accumulation % world.size
        raise UserError(
            f"--gradient_accumulation_steps={accumulation} does not divide among {world.size} "
            f"processes; use a multiple, such as {lower or world.size}")
    if cfg.parallel not in ("ddp", "fsdp"):
        raise UserError(f"--parallel={cfg.parallel}: use ddp or fsdp")
    if cfg.auto_resume and cfg.overwrite:
        raise UserError("--auto_resume=True goes on with what --overwrite=True would replace at "
                        "each restart: give one of them")
    for name, known in (("weights", ("float32", "bfloat16")), ("optimizer", optimizers.NAMES)):
        if getattr(cfg, name) not in known:
            raise UserError(f"--{name}={getattr(cfg, name)}: use {' or '.join(known)}")
    if cfg.lora_rank and cfg.init_from == "scratch":
        raise UserError("--lora_rank leaves the weights as they are, and --init_from=scratch "
                        "draws them at random: give a pretrained --init_from, or --lora_rank=0")
    if cfg.lora_rank and cfg.init_from != "resume" and (
            Path(cfg.init_from).resolve() == Path(cfg.out_dir).resolve()):
        raise UserError(f"--out_dir={cfg.out_dir} is the base of this LoRA run too, which its "
                        "adapters would replace; choose another --out_dir")
    distributed.check_pairs(world, parallel=cfg.parallel, dtype=dtype, weights=cfg.weights,
                            optimizer=cfg.optimizer, lora="yes" if cfg.lora_rank else "no")
    if cfg.optimizer == "adamw8bit" and not cfg.dry_run:
        optimizers.check_8bit(world.device)
    if cfg.wandb_log:
        logbook.check_wandb()


def check_out_dir(cfg):
    """Raises UserError where out_dir cannot be written or holds a run that would be lost."""
    out_dir = Path(cfg.out_dir)
    held = [f.name for f in (out_dir / checkpoint.MODEL_FILE, *resume.state_files(out_dir))
            if f.exists()]
    if held and not resume.resumes(cfg) and not cfg.overwrite and not (
            cfg.auto_resume and resume.barely_begun(out_dir)):
        raise UserError(f"{out_dir} holds a run already ({', '.join(held)}): go on with it by "
                        "--init_from=resume, replace it by --overwrite=True, or choose another "
                        "--out_dir")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out_dir).close()
    except OSError as e:
        raise UserError(f"--out_dir={out_dir} cannot be written ({e.strerror}); choose "
                        "another") from None


def load_start(cfg, tokenizer, folder):
    """The resume.Start that the run begins with, as init_from says."""
    weights = DTYPES[cfg.weights]
    if resume.resumes(cfg):
        start = resume.load_start(cfg.out_dir, cfg.dropout, weights, any_run=cfg.force_resume)
        resume.check_same_run(cfg, start)
        check_same_tokenizer(start.tokenizer, tokenizer, cfg.out_dir, folder)
        if cfg.block_size is not None:
            start.model.crop_block_size(cfg.block_size)
        return start
    if cfg.init_from == "scratch":
        torch.manual_seed(cfg.seed)
        model = GPT(scratch_config(cfg, tokenizer))
        model.set_dtype(weights)
        return resume.Start(model)
    model, held = checkpoint.load_model(cfg.init_from, cfg.block_size, cfg.dropout, dtype=weights)
    check_same_tokenizer(held, tokenizer, cfg.init_from, folder)
    if not cfg.lora_rank:
        return resume.Start(model)
    lora.add_lora(model, cfg.lora_rank, cfg.seed)
    return resume.Start(model, lora=dict(
        rank=cfg.lora_rank, base=cfg.init_from, hash=checkpoint.hash_of(cfg.init_from),
        weights=cfg.weights))


def scratch_config(cfg, tokenizer):
    return GPTConfig(
        block_size=cfg.block_size or 1024,
        vocab_size=50304 if tokenizer.n_vocab == 50257 else tokenizer.n_vocab,
        n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, dropout=cfg.dropout,
        bias=cfg.bias)


def open_data(cfg, folder, model, world):
    """{split: TokenBin}. Raises UserError where this machine's files are not rank 0's."""
    data = {split: TokenBin(folder / f"{split}.bin", model.config.block_size,
                            model.config.vocab_size, cfg.seed) for split in ("train", "val")}
    for split in data.values():
        mine = len(split), zlib.crc32(split.tokens[:2**20])
        if share(world, mine) != mine:
            raise UserError(f"{split.path.absolute()} of process {world.rank} differs from that "
                            "of process 0: copy the folder to each machine")
    return data


def set_up(cfg, argv):
    """Everything that the loop works on, in one namespace."""
    world = read_world(cfg.device)
    dtype = pick_dtype(cfg.dtype, world.device)
    check_config(cfg, world, dtype)
    if world.device.type == "cpu":
        tune_malloc(lean=cfg.recompute)
    folder = dataset_folder(cfg.dataset)
    for split in ("train", "val"):
        open_tokens(folder / f"{split}.bin", cfg.block_size or 1)
    if world.is_main and not cfg.eval_only:
        check_out_dir(cfg)
    tokenizer = tokenizer_of_dataset(folder)
    if cfg.sample_interval and not tokenizer.encode(cfg.sample_start):
        raise UserError("--sample_start is empty; give it at least a character")
    if cfg.separate_documents and tokenizer.eot is None:
        raise UserError("--separate_documents needs end-of-text between the documents, and "
                        f"{folder} with {tokenizer.name} has none; leave it out")
    start = load_start(cfg, tokenizer, folder) if world.is_main else None

    distributed.join(world, cfg.backend, cfg.timeout)
    start = resume.spread(start, world, DTYPES[cfg.weights])
    model, progress = start.model, start.progress
    model.config = replace(
        model.config, doc_end=tokenizer.eot if cfg.separate_documents else None)
    if model.config.doc_end is not None or model.config.local_window is not None:
        torch.backends.cuda.enable_cudnn_sdp(False)  # NaN under masks: pytorch issue 196678
    data = open_data(cfg, folder, model, world)
    model.recompute = cfg.recompute
    torch.set_float32_matmul_precision("high")  # TF32 for what stays float32 on a GPU
    forward, compiled = distributed.parallelize(
        model, world, cfg.parallel, dtype, cfg.compile, data["train"].batch(0, cfg.batch_size))
    optimizer = optimizers.make_optimizer(
        cfg.optimizer, model.param_groups(cfg.weight_decay), cfg.learning_rate,
        (cfg.beta1, cfg.beta2), world.device)
    if start.stepped:
        state_dicts.load_optimizer_state(model, optimizer, start.optimizer, start.path, world)
    scaler = optimizers.LossScaler(world.device.type, enabled=dtype == torch.float16)
    if start.scaler:
        scaler.load_state_dict(start.scaler)
    start.model = start.optimizer = None  # a sharded run holds its share alone from here on
    return SimpleNamespace(
        cfg=cfg, argv=argv, world=world, dtype=dtype, compiled=compiled, model=model,
        forward=forward, optimizer=optimizer, scaler=scaler, tokenizer=tokenizer, data=data,
        start=start, progress=progress, tried_step=progress.step if start.path else None,
        not_saved={})


# -----------------------------------------------------------------------------
# one step

def learning_rate_at(cfg, step):
    """The rate of a step: linear warmup, then cosine decay to min_lr, or constant."""
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


def seed_draws(*numbers):
    """Seeds torch's generators, on all devices, from a few numbers such as (seed, step)."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1)


def forward_backward(r, step):
    """Accumulates the gradients of this rank's micro-batches; returns their summed loss divided
    by the targets of the *global* batch, so that the ranks' values add up to the mean loss."""
    cfg, world = r.cfg, r.world
    micro_steps = cfg.gradient_accumulation_steps
    first = step * micro_steps * cfg.batch_size
    count = max(1, r.data["train"].count_targets(first, micro_steps * cfg.batch_size))
    total = 0.0
    for micro in range(world.rank, micro_steps, world.size):
        x, y = r.data["train"].batch(first + micro * cfg.batch_size, cfg.batch_size)
        if world.device.type == "cuda":  # pinned memory lets the copy run beside the GPU's work
            x, y = x.pin_memory(), y.pin_memory()
        x, y = x.to(world.device, non_blocking=True), y.to(world.device, non_blocking=True)
        seed_draws(cfg.seed, step, 1 + micro)  # dropout: the same however ranks share the batch
        last = micro + world.size >= micro_steps
        with distributed.gradient_sync(r.forward, last):
            with autocast(world.device, r.dtype):
                loss = r.forward(x, y) / count
            # DDP and FSDP take the mean over ranks, where the global batch wants the sum
            r.scaler.scale(loss * world.size).backward()
        total = total + loss.detach()
    return total


def gradient_norm(r):
    """The norm of the whole gradient, a tensor, and as a float; note: this is a CPU-GPU sync."""
    r.scaler.unscale_(r.optimizer)
    norm = distributed.total_norm([p.grad for p in r.model.parameters() if p.grad is not None])
    return norm, float(norm)


def update(r, loss, norm, finite, step, skipped_in_a_row):
    """Clips and steps; returns how many steps in a row the fp16 scaler has now skipped. Raises
    NonFiniteLoss before the optimizer step where the loss or the gradient is not finite, on
    whichever rank: `loss` and `finite` are alike on all."""
    if not math.isfinite(loss) or not (finite or r.scaler.is_enabled()):
        what = "gradient norm is not finite" if math.isfinite(loss) else f"loss is {loss}"
        raise NonFiniteLoss(
            f"step {step}: the {what}; stopped before the step, so that the files in "
            f"{r.cfg.out_dir} are good; try a lower --learning_rate, a longer --warmup_iters, "
            "--grad_clip=1.0 or --dtype=float32, and look at the data")
    if r.cfg.grad_clip > 0 and finite:
        params = [p for p in r.model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(params, r.cfg.grad_clip, norm)
    seed_draws(r.cfg.seed, step, 0)  # alike on all ranks
    r.scaler.step(r.optimizer)
    r.scaler.update()
    r.optimizer.zero_grad(set_to_none=True)
    if finite:
        return 0
    r.progress.skipped += 1
    if skipped_in_a_row + 1 == MAX_SKIPPED:
        raise NonFiniteLoss(
            f"step {step}: the fp16 scaler skipped {MAX_SKIPPED} steps in a row, the gradients "
            "overflow; try a lower --learning_rate, --dtype=bfloat16 or --dtype=float32")
    return skipped_in_a_row + 1


# -----------------------------------------------------------------------------
# evaluation and saving

def evaluate_and_save(r):
    """Both splits' losses, a line, ckpt.pt where it is due, state.pt unless save_interval says."""
    cfg, p, log = r.cfg, r.progress, r.log
    train_loss, val_loss = evaluate_splits(r)
    if not math.isfinite(val_loss):
        raise NonFiniteLoss(
            f"step {p.step}: the validation loss is {val_loss}; stopped without saving, so that "
            f"the files in {cfg.out_dir} are good; try a lower --learning_rate or --dtype=float32")
    improved, before = val_loss < p.best_val_loss, replace(p)
    if improved:
        p.best_val_loss, p.best_train_loss, p.best_step = val_loss, train_loss, p.step
        p.worse, p.warned = 0, False
    else:
        p.worse += 1
        if train_loss < p.best_train_loss and not p.warned:
            log.warn(f"validation loss rises while training loss falls: overfitting; the best was "
                     f"{p.best_val_loss:.4f} at step {p.best_step}")
            p.warned = True
    p.evaluated = p.step
    log.evaluation(p.step, train_loss, val_loss)
    if improved or cfg.always_save_checkpoint:
        saved = save(r, checkpoint.MODEL_FILE)
        if not (saved or cfg.always_save_checkpoint):  # the best on disk is still the one before
            p.best_val_loss, p.best_train_loss = before.best_val_loss, before.best_train_loss
            p.best_step = before.best_step
    if cfg.save_interval is None:  # after the model: a kill in between repeats the evaluation
        save(r, checkpoint.STATE_FILE)
    evaluations = p.step // cfg.eval_interval
    if cfg.sample_interval and evaluations % cfg.sample_interval == 0:
        show_sample(r)


def evaluate_splits(r):
    return [evaluate_loss(r.model, r.data[split], r.cfg.eval_iters, r.cfg.batch_size, r.world,
                          r.dtype) for split in ("train", "val")]


def save(r, name):
    """Writes ckpt.pt or state.pt; returns whether that went well, alike on all ranks. All come
    here, since a sharded model is gathered; rank 0 writes. A disk that does not take it ends no
    run: that is told, and what was there before stays."""
    cfg, p, whole = r.cfg, r.progress, name == checkpoint.STATE_FILE
    weights = state_dicts.whole_weights(r.model)
    moments = state_dicts.optimizer_state(r.model, r.optimizer) if whole else None
    error = None
    if r.world.is_main:
        data = checkpoint.model_data(r.model, p.step, p.best_val_loss, asdict(cfg), r.tokenizer,
                                     weights, p.run_id, r.start.lora)
        if whole:
            data |= {"optimizer": moments, "scaler": r.scaler.state_dict(), "progress": asdict(p)}
        try:
            files.save(Path(cfg.out_dir) / name, data, cfg.keep_states if whole else 1)
        except files.WriteError as e:
            error = str(e)
            r.log.warn(f"step {p.step}: {error}. The run goes on, and tries again at the next save")
    r.not_saved[name] = error = share(r.world, error)
    if whole:
        r.tried_step = p.step
        if r.world.is_main and not error:
            resume.write_run_file(cfg.out_dir, p, "running", saved_step=p.step)
    return not error


@torch.no_grad()
def show_sample(r, length=120):
    """A sample of the model as it is; all ranks draw it, since a sharded one needs them all."""
    r.model.eval()
    generator = torch.Generator(r.world.device).manual_seed(r.cfg.seed)
    ids = r.tokenizer.encode(r.cfg.sample_start)
    # a compiled model would be compiled again, for these shapes
    with (torch.compiler.set_stance("force_eager"), sdpa_kernel(ANY_LENGTH),
          autocast(r.world.device, r.dtype, cache=True)):
        new = stream(r.model, torch.tensor([ids], device=r.world.device), length, temperature=0.8,
                     top_k=200, n_vocab=r.tokenizer.n_vocab, generator=generator)
        ids = ids + [int(token) for token in new]
    r.model.train()
    r.log.say("--- sample ---\n" + r.tokenizer.decode(ids) + "\n--------------")


# -----------------------------------------------------------------------------
# the loop

class StopSignals:
    """Ctrl-C and SIGTERM ask for a stop at the end of the step. A second Ctrl-C stops at once, but
    under torchrun, which sends its own signal after the terminal's."""
    def __enter__(self):
        self.received = 0
        self.before = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, number, frame):
        if self.received and number == signal.SIGINT and "RANK" not in os.environ:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *exc):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(r, signals):
    cfg, p, log = r.cfg, r.progress, r.log
    tokens_per_iter = cfg.gradient_accumulation_steps * cfg.batch_size * r.model.config.block_size
    peak = matmul_peak(r.world.device, r.dtype)
    began, timed, skipped = time.perf_counter(), 0, 0
    r.model.train()
    while True:
        step = p.step
        if (step % cfg.eval_interval == 0 or step == cfg.max_iters) and p.evaluated != step:
            evaluate_and_save(r)
            began, timed = time.perf_counter(), 0
        if cfg.save_interval and step % cfg.save_interval == 0 and r.tried_step != step:
            save(r, checkpoint.STATE_FILE)
        if cfg.patience and p.worse >= cfg.patience:
            log.say(f"no better validation loss in {p.worse} evaluations: stopped early")
            return 0
        if step >= cfg.max_iters:
            return 0

        lr = learning_rate_at(cfg, step)
        optimizers.set_rate(r.optimizer, lr)
        loss = forward_backward(r, step)
        norm, norm_value = gradient_norm(r)
        # all ranks learn together of a signal and of a NaN, though it were one rank's alone
        loss, stop, bad = sum_over_ranks(loss, signals.received, not math.isfinite(norm_value),
                                         device=r.world.device)
        skipped = update(r, loss, norm, not bad, step, skipped)
        p.step += 1

        timed += 1
        log.bar.update(1)
        if step % cfg.log_interval == 0:
            seconds = (time.perf_counter() - began) / timed
            flops = tokens_per_iter * r.model.flops_per_token() / seconds
            mfu = flops / (peak * r.world.size) if peak else None
            log.iteration(step, loss, lr, seconds, tokens_per_iter, mfu, p.skipped,
                          peak_memory(r.world.device))
            began, timed = time.perf_counter(), 0
        if stop:
            log.say(f"stopped by a signal after step {step}; go on with:\n"
                    f"  {resume_command(r.argv)}")
            return 128 + int(signals.received or signal.SIGTERM)


def resume_command(argv):
    argv = [arg for arg in argv if not arg.startswith(("--init_from=", "--overwrite="))]
    size = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = f"torchrun --standalone --nproc_per_node={size}" if size else "python"
    return f"{launcher} train.py {shlex.join([*argv, '--init_from=resume'])}"


def plan_lines(cfg, config, world, dtype, compiled, train_tokens, val_tokens):
    """(What the run will take, as lines of text; whether it fits into memory)."""
    model = plan.meta_model(config, cfg)
    lines = plan.describe(
        model.num_params(), cfg.gradient_accumulation_steps * cfg.batch_size * config.block_size,
        cfg.max_iters, train_tokens, val_tokens, world, dtype, compiled, cfg.dataset)
    if cfg.lora_rank:
        trained = sum(p.numel() for p in lora.adapters(model).values())
        lines.append(f"LoRA of rank {cfg.lora_rank}: {trained / 1e6:.2f}M of them are trained")
    sharded = world.size > 1 and cfg.parallel == "fsdp"
    lines += plan.describe_saves(model.num_params(), cfg.out_dir, cfg.keep_states,
                                 world.size if sharded else 1, plan.save_bytes(model, cfg))
    told, fits = plan.describe_memory(config, cfg, world.device, dtype, world.size)
    return lines + told, fits


def dry_run(cfg):
    """Prints the plan of a run; reads its data's size and its model's, and no weights."""
    world = read_world(cfg.device)
    dtype = pick_dtype(cfg.dtype, world.device)
    check_config(cfg, world, dtype)
    folder = dataset_folder(cfg.dataset)
    if cfg.init_from == "scratch":
        config = scratch_config(cfg, tokenizer_of_dataset(folder))
    else:
        config = checkpoint.model_config(cfg.out_dir if resume.resumes(cfg) else cfg.init_from)
        config = replace(config, block_size=cfg.block_size or config.block_size)
    tokens = [len(open_tokens(folder / f"{split}.bin", config.block_size))
              for split in ("train", "val")]
    compiled = pick_compile(cfg.compile, world.device,
                                        weights=DTYPES[cfg.weights])
    lines, _ = plan_lines(cfg, config, world, dtype, compiled, *tokens)
    if world.is_main:
        print("\n".join(lines))


def tell_plan(r):
    """The plan, and what in it looks like a mistake."""
    cfg, p = r.cfg, r.progress
    if not r.world.is_main:
        return
    for line in r.start.warnings:
        r.log.warn(line)
    lines, fits = plan_lines(cfg, r.model.config, r.world, r.dtype, r.compiled,
                             *(len(r.data[split]) for split in ("train", "val")))
    for line in lines:
        r.log.say(line)
    if not fits:
        r.log.warn("the memory may not suffice, see above; should the run be killed, that is why")
    data = r.data["train"]
    if data.mask is not None and r.tokenizer.eot is not None:  # prompts and completions
        long, examples = data.count_long(r.tokenizer.eot)
        if long:
            r.log.warn(f"{long:,} of {examples:,} examples are longer than block_size="
                       f"{data.block_size}: no window holds one whole, and the end of one is "
                       "learnt without its beginning; raise --block_size or shorten them")
    if p.step:
        r.log.say(f"resuming at step {p.step} of {cfg.max_iters}")
    if p.step >= cfg.max_iters and p.evaluated == p.step:
        r.log.warn(f"the run is at step {p.step} already: raise --max_iters to train on")
    if cfg.decay_lr and 0 < cfg.max_iters <= cfg.warmup_iters:
        r.log.warn(f"warmup_iters={cfg.warmup_iters} is no less than max_iters={cfg.max_iters}: "
                   "the learning rate never reaches its height")


def tell_end(r):
    p, cfg = r.progress, r.cfg
    r.log.say(f"best validation loss {p.best_val_loss:.4f} at step {p.best_step}; "
              f"{cfg.out_dir}/ckpt.pt is "
              + ("the latest" if cfg.always_save_checkpoint else "that one")
              + f"; sample from it: python sample.py --out_dir={cfg.out_dir}")
    if p.best_step == 0 and p.step:
        r.log.warn("no evaluation was better than the one at step 0: try another --learning_rate "
                   "or more data")


def finish(r, status):
    """The state of the last step, and where ckpt.pt is the latest that too, if they are not on
    disk yet. Raises UserError where one could not be written."""
    if r.tried_step != r.progress.step:
        if r.cfg.always_save_checkpoint and r.progress.evaluated != r.progress.step:
            save(r, checkpoint.MODEL_FILE)
        save(r, checkpoint.STATE_FILE)
    for error in filter(None, r.not_saved.values()):
        raise UserError(error)
    if status == 0:
        tell_end(r)


def main(argv):
    cfg = configure(Config, argv)
    if cfg.dry_run:
        return dry_run(cfg)
    r = set_up(cfg, argv)
    main_rank, p = r.world.is_main, r.progress
    if cfg.eval_only:
        train_loss, val_loss = evaluate_splits(r)
        if main_rank:
            print(f"step {p.step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        return
    if main_rank:
        resume.begin(cfg.out_dir, r.start)
    wandb_run = None
    if cfg.wandb_log and main_rank:
        wandb_run = logbook.start_wandb(cfg.wandb_project, cfg.wandb_run_name, p.run_id,
                                        asdict(cfg), cfg.out_dir)
    r.log = logbook.Logbook(cfg.out_dir, p.step, cfg.max_iters, main_rank, wandb_run)
    tell_plan(r)
    ended, status = "failed", 1
    try:
        with StopSignals() as signals:
            status = train(r, signals)
            finish(r, status)
        ended = "stopped" if status else "done"
    finally:
        r.log.close(status)
        if main_rank:
            resume.write_run_file(cfg.out_dir, p, ended, (
                None if r.not_saved.get(checkpoint.STATE_FILE) else r.tried_step))
    distributed.barrier()
    sys.exit(status)


if __name__ == "__main__":
    run(main)
