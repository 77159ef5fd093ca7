"""Sets up a run from its config: model, data, optimizer. A dry run only prints the plan.

Only rank 0 reads and writes out_dir and init_from, so machines need no shared disk.
"""
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from configurator import configure
from model import GPT, GPTConfig
from nanotune import files
from nanotune.device import DTYPES, pick_compile, pick_dtype, tune_malloc
from nanotune.errors import UserError
from nanotune.formats import checkpoint
from nanotune.text.loader import (
    SPLITS,
    PairBin,
    TokenBin,
    dataset_folder,
    open_dataset,
    open_tokens,
    prepared,
)
from nanotune.text.tokenizer import (
    AnyTokenizer,
    check_same_tokenizer,
    limit_rows,
    tokenizer_of_dataset,
)
from nanotune.training import distributed, lora, plan, resume, settings, state_dicts
from nanotune.training import optimizer as optimizers
from nanotune.training.distributed import World, gather, read_world
from nanotune.training.logbook import Logbook, check_tensorboard, check_wandb


@dataclass
class Run:
    """The state of train.py's loop, on each rank."""
    cfg: Any                     # a train.Config
    argv: list[str]
    world: World
    dtype: torch.dtype           # of matrix products
    compiled: bool
    model: GPT
    forward: torch.nn.Module     # the model, wrapped by DDP if used
    optimizer: torch.optim.Optimizer
    scaler: optimizers.LossScaler
    tokenizer: AnyTokenizer
    data: dict[str, TokenBin | PairBin]  # by split
    start: resume.Start          # what the run began with, without its model and optimizer
    progress: resume.Progress
    tried_step: int | None       # the step of the last save of state.pt, even if it failed
    not_saved: dict[str, str | None] = field(default_factory=dict)  # {file: why its save failed}
    log: Logbook | None = None
    begun: bool = False          # whether this run has begun to write to out_dir


def check_config(cfg: Any, world: World, dtype: torch.dtype) -> None:
    """Raises UserError if fields contradict each other or need a package that is missing."""
    accumulation = cfg.gradient_accumulation_steps
    if accumulation % world.size:
        lower = accumulation - accumulation % world.size
        raise UserError(
            f"--gradient_accumulation_steps={accumulation} does not divide among {world.size} "
            f"processes; use a multiple, such as {lower or world.size}")
    if not cfg.out_dir:
        raise UserError("--out_dir is empty; give a folder")
    if cfg.auto_resume and cfg.overwrite:
        raise UserError("--auto_resume=True resumes the run that --overwrite=True would replace at "
                        "each restart: give only one of them")
    if cfg.lora_rank and cfg.init_from == "scratch":
        raise UserError("--lora_rank freezes the weights, and --init_from=scratch draws them at "
                        "random: give a pretrained --init_from, or --lora_rank=0")
    base = checkpoint.run_file(cfg.init_from) or Path(cfg.init_from, checkpoint.MODEL_FILE)
    if cfg.lora_rank and cfg.init_from != "resume" and (
            base.parent.resolve() == Path(cfg.out_dir).resolve()):
        raise UserError(f"--out_dir={cfg.out_dir} is also the base of this LoRA run: the adapters "
                        "would replace the base model; choose another --out_dir")
    distributed.check_combination(world, parallel=cfg.parallel, dtype=dtype, weights=cfg.weights,
                            optimizer=cfg.optimizer, lora="yes" if cfg.lora_rank else "no")
    if cfg.optimizer == "adamw8bit" and not cfg.dry_run:
        optimizers.check_8bit(world.device)
    if cfg.wandb_log:
        check_wandb()
    if cfg.tensorboard:
        check_tensorboard()


@contextmanager
def out_dir_lock(cfg: Any, world: World) -> Iterator[None]:
    """A context in which only this run writes to out_dir; rank 0 creates it. Raises UserError if
    out_dir cannot be written, another run writes to it, or it holds a run that would be lost."""
    if not world.is_main or cfg.eval_only:
        yield
        return
    out_dir = Path(cfg.out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out_dir).close()
        open(out_dir / files.LOCK_FILE, "a").close()
    except OSError as e:
        raise UserError(f"--out_dir={out_dir} cannot be written ({e.strerror}); choose "
                        "another") from None
    with files.lock(out_dir):
        check_no_run_is_lost(cfg, out_dir)
        yield


def check_no_run_is_lost(cfg, out_dir):
    models = (out_dir / name for name in (checkpoint.MODEL_FILE, checkpoint.BEST_FILE))
    found = [f.name for f in (*models, *resume.state_files(out_dir)) if f.exists()]
    if found and not resume.resumes(cfg) and not cfg.overwrite and not (
            cfg.auto_resume and resume.is_at_step_0(out_dir)):
        raise UserError(f"{out_dir} already holds a run ({', '.join(found)}): resume it with "
                        "--init_from=resume, replace it with --overwrite=True, or choose another "
                        "--out_dir")


def load_start(cfg, tokenizer, folder, check_memory):
    """The resume.Start of a run from scratch, from a pretrained model, or resumed. Calls
    check_memory(config) before drawing random weights, but after loading weights from a file."""
    weights = DTYPES[cfg.weights]
    if resume.resumes(cfg):
        start = resume.load_start(cfg.out_dir, cfg.dropout, weights, any_run=cfg.force_resume)
        resume.check_same_run(cfg, start)
        if "settings_version" in start.config:
            start.warnings += tuple(filter(None, [settings.check_settings(cfg.out_dir)]))
        check_same_tokenizer(start.tokenizer, tokenizer, cfg.out_dir, folder)
        if cfg.block_size is not None:
            start.model.crop_block_size(cfg.block_size)
        check_memory(start.model.config)
        return start
    if cfg.init_from == "scratch":
        torch.manual_seed(cfg.seed)
        config = scratch_config(cfg, tokenizer)
        check_memory(config)
        model = GPT(config)
        model.set_dtype(weights)
        return resume.Start(model)
    model, model_tokenizer = checkpoint.load_model(cfg.init_from, cfg.block_size, cfg.dropout,
                                                   dtype=weights)
    check_same_tokenizer(model_tokenizer, tokenizer, cfg.init_from, folder)
    check_memory(model.config)
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


def run_config(cfg, config, tokenizer):
    """The model's config with the run's options. Raises UserError for an option that the model does
    not have."""
    known = {f.name for f in fields(config)}
    options = {name: getattr(cfg, name) for name in resume.LENGTHS}
    options["doc_end"] = tokenizer.eot if cfg.separate_documents else None
    for name, value in options.items():
        if value is not None and name not in known:
            option = "separate_documents" if name == "doc_end" else name
            kind = "plain text" if config.takes_pairs else "pairs, such as T5"
            raise UserError(f"--{option} is for models of {kind}; leave it out")
    return replace(config, **{name: value for name, value in options.items() if name in known
                              and (value is not None or name == "doc_end")})


def check_memory(cfg, config, world, tokenizer, folder):
    """Calls plan.check_memory for the largest batch, which depends on the data if it has pairs."""
    config = run_config(cfg, config, tokenizer)
    data = open_dataset(folder / "train.bin", config)
    plan.check_memory(cfg, data.largest(config), world, pick_dtype(cfg.dtype, world.device))


def open_splits(cfg, folder, config):
    """{split: its dataset}"""
    global_batch = cfg.batch_size * cfg.gradient_accumulation_steps
    return {split: open_dataset(folder / f"{split}.bin", config, cfg.seed,
                                global_batch=global_batch) for split in SPLITS}


# fields that may differ among ranks: paths, options of a machine, fields that only rank 0 uses
MAY_DIFFER = ("out_dir", "init_from", "overwrite", "auto_resume", "force_resume", "keep_states",
              "log_interval", "tensorboard", "wandb_log", "wandb_project", "wandb_run_name",
              "dataset", "backend", "timeout", "device")


def check_same_arguments(cfg, dtype, world):
    """Raises UserError if a field that affects the result differs among the ranks."""
    same = {name: value for name, value in asdict(cfg).items() if name not in MAY_DIFFER}
    distributed.check_same_fields(world, same | {"dtype": str(dtype)})


def check_same_data(data, world):
    """Raises UserError if the files of a rank differ from those of rank 0."""
    for split in data.values():
        files_of_ranks = gather(world, (str(split.path.absolute()), split.fingerprint))
        for rank, (path, fingerprint) in enumerate(files_of_ranks):
            if fingerprint != files_of_ranks[0][1]:
                raise UserError(f"{path} of process {rank} differs from that of process 0: copy "
                                "the folder to each machine")


def print_choices() -> None:
    """Prints the config files and the prepared datasets, for a command line without arguments."""
    print("Which run? Give a config file or fields (--help lists them):\n\n"
          "    python train.py config/finetune_shakespeare.py --init_from=gpt2\n\nConfig files:")
    for path in sorted(Path("config").glob("*.py")):
        first = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        print(f"    {path}  {first}")
    print("Datasets" + (prepared() or ": none is prepared; docs/data.md lists them"))


def read_config(cls: type, argv: list[str]) -> tuple[Any, list[str]]:
    """Returns (the train.Config of a command line, a line for each field of the resumed run that
    argv changes). A resumed run keeps the fields that it was trained with; rank 0 reads them."""
    cfg = configure(cls, argv)
    if cfg.init_from != "resume" and not cfg.auto_resume:
        return cfg, []
    if cfg.init_from == "resume":
        checkpoint.pick_source(cfg.out_dir, "resume")
    world = read_world(cfg.device)
    distributed.join(world, cfg.backend, cfg.timeout)
    config = distributed.broadcast(world, settings.read_run_config(cfg.out_dir)
                               if world.is_main and resume.resumes(cfg) else None)
    if not config:
        return cfg, []
    return settings.configure_resume(cls, argv, cfg.out_dir, config)


def config_to_save(r: Run) -> dict[str, Any]:
    """Returns the config to save in ckpt.pt and state.pt; init_from is that of the first start."""
    first = r.start.config.get("init_from", "resume") if r.start.path else r.cfg.init_from
    return asdict(r.cfg) | {"init_from": first, "settings_version": settings.VERSION}


def set_max_iters(cfg, data):
    """If --epochs is given, sets max_iters to the steps of that many epochs, rounded up."""
    if cfg.epochs is not None:
        samples_per_step = cfg.batch_size * cfg.gradient_accumulation_steps
        cfg.max_iters = math.ceil(cfg.epochs * data["train"].n_blocks / samples_per_step)


def check(cfg: Any) -> World:
    """Returns the World of a train.Config. Raises UserError if config or data are unusable; checks
    only what one process can check without the model and out_dir."""
    world = read_world(cfg.device)
    check_config(cfg, world, pick_dtype(cfg.dtype, world.device))
    folder = dataset_folder(cfg.dataset)
    for split in SPLITS:
        open_tokens(folder / f"{split}.bin", cfg.block_size or 1)
    return world


def set_up(cfg: Any, argv: list[str], world: World) -> Run:
    """Returns the Run of a checked train.Config and its command line `argv`; rank 0 must hold
    out_dir_lock. Raises UserError if the model does not fit the config or the data. Runs
    the checks that need only one process before the processes join."""
    dtype, folder = pick_dtype(cfg.dtype, world.device), dataset_folder(cfg.dataset)
    if world.device.type == "cpu":
        tune_malloc()
    tokenizer = tokenizer_of_dataset(folder)
    if cfg.sample_interval and not tokenizer.encode(cfg.sample_start):
        raise UserError("--sample_start has no tokens in this vocabulary; give other text")
    if cfg.separate_documents and tokenizer.eot is None:
        raise UserError("--separate_documents needs end-of-text between the documents, but "
                        f"{folder} with {tokenizer.name} has none; leave it out")
    start = load_start(cfg, tokenizer, folder, lambda config: check_memory(
        cfg, config, world, tokenizer, folder)) if world.is_main else None

    distributed.join(world, cfg.backend, cfg.timeout)
    check_same_arguments(cfg, dtype, world)
    start = resume.broadcast_start(start, world, DTYPES[cfg.weights])
    model, progress = start.model, start.progress
    limit_rows(tokenizer, model.config.vocab_size, folder)
    checkpoint.check_dtype(model, dtype)
    model.config = run_config(cfg, model.config, tokenizer)
    if model.is_masked:
        torch.backends.cuda.enable_cudnn_sdp(False)  # gives NaN with masks: pytorch issue 196678
    data = open_splits(cfg, folder, model.config)
    check_same_data(data, world)
    set_max_iters(cfg, data)
    resume.check_same_data(cfg, start, data)
    model.recompute = cfg.recompute
    torch.set_float32_matmul_precision("high")  # TF32 for float32 products on a GPU
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
    start.model = start.optimizer = None  # frees the whole model; a sharded run keeps its shards
    return Run(
        cfg=cfg, argv=argv, world=world, dtype=dtype, compiled=compiled, model=model,
        forward=forward, optimizer=optimizer, scaler=scaler, tokenizer=tokenizer, data=data,
        start=start, progress=progress, tried_step=progress.step if start.path else None)


def dry_run(cfg: Any) -> None:
    """Prints the plan of a train.Config; loads no weights. Raises UserError as set_up() does."""
    world = check(cfg)
    dtype, folder = pick_dtype(cfg.dtype, world.device), dataset_folder(cfg.dataset)
    tokenizer = tokenizer_of_dataset(folder)
    if cfg.init_from == "scratch":
        config = scratch_config(cfg, tokenizer)
    else:
        config = checkpoint.model_config(checkpoint.pick_source(
            cfg.out_dir, "resume" if resume.resumes(cfg) else cfg.init_from))
    config = run_config(cfg, config, tokenizer)
    data = open_splits(cfg, folder, config)
    set_max_iters(cfg, data)
    compiled = pick_compile(cfg.compile, world.device, weights=DTYPES[cfg.weights])
    lines = plan.plan_lines(cfg, data["train"].largest(config), world, dtype, compiled,
                            *map(len, data.values()), data["train"].tokens_per_sample)
    lines += [f"warning: {line}" for line in plan.warnings(cfg, data["train"], tokenizer.eot)]
    if world.is_main:
        print("\n".join(lines))
