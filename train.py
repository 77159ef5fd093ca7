"""Finetunes or pretrains a GPT, on one process or many.

    python train.py config/finetune_shakespeare.py
    python train.py config/finetune_shakespeare.py --init_from=gpt2 --batch_size=4
    torchrun --standalone --nproc_per_node=4 train.py config/finetune_shakespeare.py
    python train.py config/finetune_shakespeare.py --init_from=resume

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
import uuid
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import logbook
import plan
import tokenizer as tokenizers
from configurator import configure
from distributed import (
    barrier,
    join,
    pick_compile,
    pick_dtype,
    read_world,
    run,
    sum_over_ranks,
)
from evaluate import evaluate_loss
from loader import TokenBin, dataset_folder, open_tokens
from model import GPT, GPTConfig, stream

MAX_SKIPPED = 10  # fp16 steps in a row that the scaler may skip


@dataclass
class Config:
    # I/O
    out_dir: str = "out"
    eval_interval: int = 2000    # steps between evaluations; also at step 0 and at the last
    log_interval: int = 1
    eval_iters: int = 200        # batches of batch_size windows an evaluation; 0: the whole split
    eval_only: bool = False      # evaluate once and stop; writes nothing
    always_save_checkpoint: bool = True  # ckpt.pt at each evaluation; False: only the best so far
    init_from: str = "scratch"   # scratch, resume, gpt2*, a hub id, a Hugging Face folder, a run
    overwrite: bool = False      # begin a new run in an out_dir that holds one
    force_resume: bool = False   # resume although seed, dataset, block_size or global batch differ
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
    # learning rate
    decay_lr: bool = True        # cosine decay after warmup; False: constant
    warmup_iters: int = 2000
    lr_decay_iters: int | None = None  # None: max_iters
    min_lr: float | None = None  # None: learning_rate / 10
    # system
    backend: str = "auto"        # auto, nccl, gloo
    device: str = "auto"         # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"          # auto, float32, bfloat16, float16 (with a GradScaler)
    compile: bool | str = "auto"  # auto: where torch.compile is known to work
    seed: int = 1337             # of weights, data order and dropout


@dataclass
class Progress:
    """Where a run stands: what state.pt holds beside weights, optimizer and scaler."""
    step: int = 0                # optimizer steps taken
    evaluated: int = -1          # the step of the last evaluation
    best_val_loss: float = math.inf
    best_train_loss: float = math.inf  # of the same evaluation
    best_step: int = 0
    worse: int = 0               # evaluations since then
    warned: bool = False         # of overfitting, since then
    skipped: int = 0             # fp16 steps that the scaler skipped, in all
    run_id: str = ""


# -----------------------------------------------------------------------------
# setup: everything that one process can check comes before the processes join

def check_config(cfg, world):
    """Raises ValueError for fields that do not go together."""
    accumulation = cfg.gradient_accumulation_steps
    for name in ("batch_size", "gradient_accumulation_steps", "eval_interval", "log_interval",
                 "n_layer", "n_head", "n_embd"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"--{name}={getattr(cfg, name)} must be at least 1")
    for name in ("eval_iters", "max_iters", "learning_rate", "weight_decay", "grad_clip",
                 "warmup_iters", "patience", "sample_interval"):
        if getattr(cfg, name) < 0:
            raise ValueError(f"--{name}={getattr(cfg, name)} must be at least 0")
    for name in ("dropout", "beta1", "beta2"):
        if not 0 <= getattr(cfg, name) < 1:
            raise ValueError(f"--{name}={getattr(cfg, name)} must be in [0, 1)")
    if cfg.block_size is not None and cfg.block_size < 1:
        raise ValueError(f"--block_size={cfg.block_size} must be at least 1")
    if not 0 <= cfg.seed < 2**32:
        raise ValueError(f"--seed={cfg.seed} must be in [0, 2**32)")
    if accumulation % world.size:
        lower = accumulation - accumulation % world.size
        raise ValueError(
            f"--gradient_accumulation_steps={accumulation} does not divide among {world.size} "
            f"processes; use a multiple, such as {lower or world.size}")
    if cfg.wandb_log:
        logbook.check_wandb()


def check_out_dir(cfg):
    """Raises ValueError where out_dir cannot be written or holds a run that would be lost."""
    out_dir = Path(cfg.out_dir)
    held = [f for f in (checkpoint.MODEL_FILE, checkpoint.STATE_FILE) if (out_dir / f).exists()]
    if held and cfg.init_from != "resume" and not cfg.overwrite:
        raise ValueError(f"{out_dir} holds a run already ({', '.join(held)}): go on with it by "
                         "--init_from=resume, replace it by --overwrite=True, or choose another "
                         "--out_dir")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out_dir).close()
    except OSError as e:
        raise ValueError(f"--out_dir={out_dir} cannot be written ({e.strerror}); choose "
                         "another") from None


def load_start(cfg, tokenizer, folder):
    """(model, saved state or None, its path) that the run begins with, as init_from says."""
    if cfg.init_from == "resume":
        saved, path = load_state(cfg)
        check_same_run(cfg, saved, path)
        source, model = cfg.out_dir, checkpoint.model_from(saved, path, cfg.dropout)
        held = checkpoint.tokenizer_from(saved)
        if cfg.block_size is not None:
            model.crop_block_size(cfg.block_size)
    elif cfg.init_from == "scratch":
        torch.manual_seed(cfg.seed)
        vocab_size = 50304 if tokenizer.n_vocab == 50257 else tokenizer.n_vocab
        return GPT(GPTConfig(
            block_size=cfg.block_size or 1024, vocab_size=vocab_size, n_layer=cfg.n_layer,
            n_head=cfg.n_head, n_embd=cfg.n_embd, dropout=cfg.dropout, bias=cfg.bias)), None, None
    else:
        source, saved, path = cfg.init_from, None, None
        model, held = checkpoint.load_model(source, cfg.block_size, cfg.dropout)
    tokenizers.check_same(held, tokenizer, source, folder)
    return model, saved, path


def load_state(cfg):
    """(state, its path): ours, or a nanoGPT ckpt.pt, which holds its optimizer."""
    path = Path(cfg.out_dir) / checkpoint.STATE_FILE
    if path.is_file():
        return checkpoint.load(path), path
    path = Path(cfg.out_dir) / checkpoint.MODEL_FILE
    if not path.is_file():
        raise ValueError(f"--init_from=resume: {cfg.out_dir} holds no checkpoint; check --out_dir, "
                         "or begin with another --init_from")
    saved = checkpoint.load(path)
    if "optimizer" not in saved:
        raise ValueError(f"--init_from=resume: {cfg.out_dir} holds {checkpoint.MODEL_FILE}, but no "
                         f"{checkpoint.STATE_FILE} to go on from; begin a new run with its weights "
                         f"by --init_from={cfg.out_dir} --out_dir=ANOTHER")
    return saved, path


def check_same_run(cfg, saved, path):
    """Raises ValueError where a resumed run would read other data than the one it continues."""
    then = saved.get("config", {})
    ours = asdict(cfg) | {"block_size": cfg.block_size or saved["model_args"].get("block_size"),
                          "global batch": cfg.batch_size * cfg.gradient_accumulation_steps}
    theirs = then | {"block_size": saved["model_args"].get("block_size")}
    if "batch_size" in then:
        theirs["global batch"] = then["batch_size"] * then.get("gradient_accumulation_steps", 1)
    differ = [f"{key} was {theirs[key]}, now {ours[key]}"
              for key in ("seed", "dataset", "block_size", "global batch")
              if key in theirs and theirs[key] != ours[key]]
    if differ and not cfg.force_resume:
        raise ValueError(f"{path} is of another run: {'; '.join(differ)}; give the old values, or "
                         "--force_resume=True to go on with the new ones")


def progress_of(saved):
    """The Progress of a saved state, nanoGPT's too; a fresh one where there is none."""
    if saved is None:
        return Progress(run_id=uuid.uuid4().hex[:8])
    if "progress" in saved:
        return Progress(**saved["progress"])
    step = int(saved["iter_num"])
    return Progress(step=step, best_step=step, best_val_loss=float(saved["best_val_loss"]),
                    run_id=uuid.uuid4().hex[:8])


def set_up(cfg, argv):
    """Everything that the loop works on, in one namespace."""
    world = read_world(cfg.device)
    check_config(cfg, world)
    dtype, compiled = pick_dtype(cfg.dtype, world.device), pick_compile(cfg.compile, world.device)
    folder = dataset_folder(cfg.dataset)
    for split in ("train", "val"):
        open_tokens(folder / f"{split}.bin", cfg.block_size or 1)
    if not cfg.eval_only:
        check_out_dir(cfg)
    tokenizer = tokenizers.of_dataset(folder)
    if cfg.sample_interval and not tokenizer.encode(cfg.sample_start):
        raise ValueError("--sample_start is empty; give it at least a character")
    model, saved, path = load_start(cfg, tokenizer, folder)
    if cfg.separate_documents and tokenizer.eot is None:
        raise ValueError("--separate_documents needs end-of-text between the documents, and "
                         f"{folder}'s {tokenizer.name} has none; leave it out")
    model.config = replace(
        model.config, doc_end=tokenizer.eot if cfg.separate_documents else None)
    data = {split: TokenBin(folder / f"{split}.bin", model.config.block_size,
                            model.config.vocab_size, cfg.seed) for split in ("train", "val")}

    model.to(world.device)
    model.tie_head()
    torch.set_float32_matmul_precision("high")  # TF32 for what stays float32 on a GPU
    optimizer = torch.optim.AdamW(
        model.param_groups(cfg.weight_decay), lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2),
        fused=world.device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    if saved is not None:
        checkpoint.load_optimizer_state(model, optimizer, saved["optimizer"], path)
        if saved.get("scaler"):
            scaler.load_state_dict(saved["scaler"])
    progress = progress_of(saved)

    join(world, cfg.backend)
    if compiled:
        compiled = compile_or_fall_back(model, data["train"], cfg, world, dtype)
    ddp = wrap(model, world)
    return SimpleNamespace(
        cfg=cfg, argv=argv, world=world, dtype=dtype, compiled=compiled, model=model, ddp=ddp,
        optimizer=optimizer, scaler=scaler, tokenizer=tokenizer, data=data, progress=progress)


def wrap(model, world):
    """The model as its forward is called in training: under DDP where there are several ranks."""
    if world.size == 1:
        return model
    devices = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def compile_or_fall_back(model, data, cfg, world, dtype):
    """Compiles the model in place and tries it; where that fails, on any rank, stays eager."""
    model.compile()
    x, y = (t.to(world.device) for t in data.batch(0, cfg.batch_size))
    try:
        with autocast(world, dtype):
            model(x, y).backward()
        failed = None
    except Exception as e:  # Dynamo, Inductor, Triton and the C++ compiler each raise their own
        failed = e
    model.zero_grad(set_to_none=True)
    if sum_over_ranks(failed is not None, device=world.device)[0] == 0:
        return True
    model._compiled_call_impl = None  # what model.compile() set
    if world.is_main:
        reason = str(failed).strip().splitlines()[0][:200] if failed else "on another rank"
        print(f"warning: torch.compile failed ({reason}); going on without, slower but the same; "
              "--compile=False silences this", file=sys.stderr)
    return False


def autocast(world, dtype):
    return torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32)


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
        with r.ddp.no_sync() if world.size > 1 and not last else nullcontext():
            with autocast(world, r.dtype):
                loss = r.ddp(x, y) / count
            # DDP takes the mean over ranks, where the global batch wants the sum
            r.scaler.scale(loss * world.size).backward()
        total = total + loss.detach()
    return total


def update(r, loss, step, skipped_in_a_row):
    """Clips and steps; returns how many steps in a row the fp16 scaler has now skipped. Raises
    FloatingPointError before the optimizer step where the loss or the gradient is not finite."""
    r.scaler.unscale_(r.optimizer)
    params = [p for p in r.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    norm_value = float(norm)  # note: a CPU-GPU sync point
    finite = math.isfinite(norm_value)
    if not math.isfinite(loss) or not (finite or r.scaler.is_enabled()):
        what = f"gradient norm is {norm_value}" if math.isfinite(loss) else f"loss is {loss}"
        raise FloatingPointError(
            f"step {step}: the {what}; stopped before the step, so that the files in "
            f"{r.cfg.out_dir} are good; try a lower --learning_rate, a longer --warmup_iters, "
            "--grad_clip=1.0 or --dtype=float32, and look at the data")
    if r.cfg.grad_clip > 0 and finite:
        torch.nn.utils.clip_grads_with_norm_(params, r.cfg.grad_clip, norm)
    seed_draws(r.cfg.seed, step, 0)  # alike on all ranks
    r.scaler.step(r.optimizer)
    r.scaler.update()
    r.optimizer.zero_grad(set_to_none=True)
    if finite:
        return 0
    r.progress.skipped += 1
    if skipped_in_a_row + 1 == MAX_SKIPPED:
        raise FloatingPointError(
            f"step {step}: the fp16 scaler skipped {MAX_SKIPPED} steps in a row, the gradients "
            "overflow; try a lower --learning_rate, --dtype=bfloat16 or --dtype=float32")
    return skipped_in_a_row + 1


# -----------------------------------------------------------------------------
# evaluation and saving

def evaluate_and_save(r):
    """Both splits' losses, a line, ckpt.pt where it is due, state.pt always."""
    cfg, p, log = r.cfg, r.progress, r.log
    train_loss, val_loss = evaluate_splits(r)
    if not math.isfinite(val_loss):
        raise FloatingPointError(
            f"step {p.step}: the validation loss is {val_loss}; stopped without saving, so that "
            f"the files in {cfg.out_dir} are good; try a lower --learning_rate or --dtype=float32")
    improved = val_loss < p.best_val_loss
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
        save_model(r)
    save_state(r)
    evaluations = p.step // cfg.eval_interval
    if cfg.sample_interval and evaluations % cfg.sample_interval == 0:
        show_sample(r)


def evaluate_splits(r):
    return [evaluate_loss(r.model, r.data[split], r.cfg.eval_iters, r.cfg.batch_size, r.world,
                          r.dtype) for split in ("train", "val")]


def save_model(r):
    if r.world.is_main:
        checkpoint.save(Path(r.cfg.out_dir) / checkpoint.MODEL_FILE, checkpoint.model_data(
            r.model, r.progress.step, r.progress.best_val_loss, asdict(r.cfg), r.tokenizer))


def save_state(r):
    if r.world.is_main:
        state = checkpoint.model_data(r.model, r.progress.step, r.progress.best_val_loss,
                                      asdict(r.cfg), r.tokenizer)
        state |= {"optimizer": checkpoint.optimizer_state(r.model, r.optimizer),
                  "scaler": r.scaler.state_dict(), "progress": asdict(r.progress)}
        checkpoint.save(Path(r.cfg.out_dir) / checkpoint.STATE_FILE, state)


@torch.no_grad()
def show_sample(r, length=120):
    """A sample of the model as it is; all ranks draw it, since a sharded one needs them all."""
    r.model.eval()
    generator = torch.Generator(r.world.device).manual_seed(r.cfg.seed)
    ids = r.tokenizer.encode(r.cfg.sample_start)
    with autocast(r.world, r.dtype):
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
        if self.received and "RANK" not in os.environ:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *exc):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(r, signals):
    cfg, p, log = r.cfg, r.progress, r.log
    tokens_per_iter = cfg.gradient_accumulation_steps * cfg.batch_size * r.model.config.block_size
    peak = plan.matmul_peak(r.world.device, r.dtype)
    began, timed, skipped = time.perf_counter(), 0, 0
    r.model.train()
    while True:
        step = p.step
        if (step % cfg.eval_interval == 0 or step == cfg.max_iters) and p.evaluated != step:
            evaluate_and_save(r)
            began, timed = time.perf_counter(), 0
            if cfg.patience and p.worse >= cfg.patience:
                log.say(f"no better validation loss in {p.worse} evaluations: stopped early")
                break
        if step >= cfg.max_iters:
            break

        lr = learning_rate_at(cfg, step)
        for group in r.optimizer.param_groups:
            group["lr"] = lr
        loss = forward_backward(r, step)
        # note: a CPU-GPU sync point; all ranks learn of a NaN and of a signal together
        loss, stop = sum_over_ranks(loss, signals.received, device=r.world.device)
        skipped = update(r, loss, step, skipped)
        p.step += 1

        timed += 1
        log.bar.update(1)
        if step % cfg.log_interval == 0:
            seconds = (time.perf_counter() - began) / timed
            flops = tokens_per_iter * r.model.flops_per_token() / seconds
            mfu = flops / (peak * r.world.size) if peak else None
            log.iteration(step, loss, lr, seconds, tokens_per_iter, mfu, p.skipped)
            began, timed = time.perf_counter(), 0
        if stop:
            save_state(r)
            log.say(f"stopped by a signal after step {step}; the state is saved, go on with:\n"
                    f"  {resume_command(r.argv)}")
            return 128 + int(signals.received or signal.SIGTERM)
    return 0


def resume_command(argv):
    argv = [arg for arg in argv if not arg.startswith(("--init_from=", "--overwrite="))]
    size = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = f"torchrun --standalone --nproc_per_node={size}" if size else "python"
    return f"{launcher} train.py {shlex.join([*argv, '--init_from=resume'])}"


def tell_plan(r):
    """The plan, and what in it looks like a mistake."""
    cfg, p = r.cfg, r.progress
    tokens_per_iter = cfg.gradient_accumulation_steps * cfg.batch_size * r.model.config.block_size
    for line in plan.describe(
            r.model.num_params(), tokens_per_iter, cfg.max_iters, len(r.data["train"]),
            len(r.data["val"]), r.world, r.dtype, r.compiled, cfg.out_dir, cfg.dataset):
        r.log.say(line)
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


def clear_old_run(cfg):
    for name in (checkpoint.MODEL_FILE, checkpoint.STATE_FILE, "metrics.jsonl", "loss.png"):
        Path(cfg.out_dir, name).unlink(missing_ok=True)


def tell_end(r):
    p, cfg = r.progress, r.cfg
    r.log.say(f"best validation loss {p.best_val_loss:.4f} at step {p.best_step}; "
              f"{cfg.out_dir}/ckpt.pt is "
              + ("the latest" if cfg.always_save_checkpoint else "that one")
              + f"; sample from it: python sample.py --out_dir={cfg.out_dir}")
    if p.best_step == 0 and p.step:
        r.log.warn("no evaluation was better than the one at step 0: try another --learning_rate "
                   "or more data")


def main(argv):
    cfg = configure(Config, argv)
    r = set_up(cfg, argv)
    if cfg.eval_only:
        train_loss, val_loss = evaluate_splits(r)
        if r.world.is_main:
            print(f"step {r.progress.step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        return
    if r.world.is_main and cfg.init_from != "resume":
        clear_old_run(cfg)
    wandb_run = None
    if cfg.wandb_log and r.world.is_main:
        wandb_run = logbook.start_wandb(cfg.wandb_project, cfg.wandb_run_name, r.progress.run_id,
                                        asdict(cfg), cfg.out_dir)
    r.log = logbook.Logbook(cfg.out_dir, r.progress.step, cfg.max_iters, r.world.is_main, wandb_run)
    tell_plan(r)
    status = 1
    try:
        with StopSignals() as signals:
            status = train(r, signals)
        if status == 0:
            tell_end(r)
    finally:
        r.log.close(status)
    barrier()
    sys.exit(status)


if __name__ == "__main__":
    run(main)
