"""A run's folder through crashes: its states, whose they are, how the last run ended.

    state.pt      the latest state            state.1.pt   the one before (keep_states=2), ...
    run.json      the run's id, the step of its latest state, and whether a process works on it

A state that is damaged, or of another run, is passed over for the one before. A run.json that
still says "running" when a run is resumed was left by one that had no time for a last word.
"""
import contextlib
import json
import math
import os
import socket
import uuid
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch

from model import GPT
from nanotune import files
from nanotune.errors import UserError, first_line
from nanotune.formats import checkpoint
from nanotune.formats.checkpoint import MODEL_FILE, STATE_FILE
from nanotune.training import lora, state_dicts
from nanotune.training.distributed import share

RUN_FILE = "run.json"


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


def new_progress():
    return Progress(run_id=uuid.uuid4().hex[:8])


@dataclass
class Start:
    """What a run begins with. Rank 0 alone reads it from disk."""
    model: object                  # a GPT; its GPTConfig on the way to the other ranks
    progress: Progress = field(default_factory=new_progress)
    stepped: bool = False          # whether there is an optimizer's state
    optimizer: dict = field(default_factory=dict)  # {parameter name: {"exp_avg": ..., ...}}
    scaler: dict | None = None
    # of the state that it was read from
    path: Path | None = None
    config: dict = field(default_factory=dict)  # the run's, as it was then
    tokenizer: object = None
    lora: dict | None = None       # the rank, the base and its hash, of a LoRA run
    ours: bool = True              # False: nanoGPT's, which has no run id
    passed_over: tuple = ()        # newer states that could not serve
    warnings: tuple = ()


# -----------------------------------------------------------------------------
# resuming

def resumes(cfg):
    """Whether a run goes on with what out_dir holds."""
    return cfg.init_from == "resume" or (cfg.auto_resume and bool(state_files(cfg.out_dir)))


def state_files(out_dir):
    """The states of a folder that exist, newest first."""
    numbered = sorted(Path(out_dir).glob("state.[0-9]*.pt"),
                      key=lambda path: int(path.suffixes[0][1:]))
    return [path for path in (Path(out_dir) / STATE_FILE, *numbered) if path.is_file()]


def barely_begun(out_dir):
    """Whether all that a folder holds is the ckpt.pt of step 0: killed before its first state."""
    try:
        return files.load(Path(out_dir) / MODEL_FILE)["iter_num"] == 0
    except (UserError, KeyError):
        return False


def load_start(out_dir, dropout, dtype, any_run=False):
    """The Start that the newest sound state of the folder's own run makes; `any_run` takes that of
    another too. Raises UserError where there is none, which says what can still be had."""
    paths = state_files(out_dir) or [Path(out_dir) / MODEL_FILE]
    if not paths[0].is_file():
        raise UserError(f"--init_from=resume: {out_dir} holds no checkpoint; check --out_dir, or "
                        "begin with another --init_from")
    last = read_run_file(out_dir)
    reasons = []
    for path in paths:
        try:
            start = read_start(path, dropout, dtype)
            if not any_run:
                check_run_id(start, last)
            break
        except UserError as e:
            reasons.append(str(e))
    else:
        raise UserError(reasons[0] if paths[0].name == MODEL_FILE
                        else nothing_left(out_dir, reasons))
    start.passed_over = tuple(paths[:len(reasons)])
    start.warnings = (*tell_losses(start, reasons, last, reached_step(out_dir)),
                      *check_model_file(start.progress, Path(out_dir) / MODEL_FILE))
    return start


def read_start(path, dropout, dtype=torch.float32):
    """A state file, or a nanoGPT ckpt.pt, which holds its optimizer, as a Start. UserError for
    one that is not whole: each part is read here, so that an older state can serve instead."""
    saved = files.load(path)
    if "optimizer" not in saved:
        raise UserError(f"--init_from=resume: {path} holds a model, but no state.pt to go on from "
                        "lies beside it; begin a new run with its weights by "
                        f"--init_from={path.parent} --out_dir=ANOTHER")
    with files.checked_parse(path):
        model = checkpoint.model_from(saved, path, dropout, dtype)
        optimizer = state_dicts.checked_optimizer_state(model, saved["optimizer"], path)
        return Start(model, progress_of(saved), bool(optimizer), optimizer,
                     saved.get("scaler") or None, path, config_of(saved),
                     checkpoint.tokenizer_from(saved), saved.get("lora"), "progress" in saved)


def config_of(saved):
    """The config that a state was saved with, with what check_same_run compares."""
    config = dict(saved.get("config") or {})
    config["block_size"] = saved["model_args"].get("block_size")
    if "batch_size" in config:
        config["global batch"] = (int(config["batch_size"])
                                  * int(config.get("gradient_accumulation_steps", 1)))
    return config


def check_same_run(cfg, start):
    """Raises UserError where a resumed run would read other data than the one it continues."""
    then = {"optimizer": "adamw", "lora_rank": 0} | start.config
    for key in ("optimizer", "lora_rank"):
        if getattr(cfg, key) != then[key]:
            raise UserError(f"{start.path} is of a run with {key}={then[key]}: give "
                            f"--{key}={then[key]}, or begin a new run with its model by "
                            f"--init_from={start.path.parent} --out_dir=ANOTHER")
    now = asdict(cfg) | {"block_size": cfg.block_size or then["block_size"],
                         "global batch": cfg.batch_size * cfg.gradient_accumulation_steps}
    differ = [f"{key} was {then[key]}, now {now[key]}"
              for key in ("seed", "dataset", "block_size", "global batch")
              if key in then and then[key] != now[key]]
    if differ and not cfg.force_resume:
        raise UserError(f"{start.path} is of another run: {'; '.join(differ)}; give the old "
                        "values, or --force_resume=True to go on with the new ones")


def spread(start, world, dtype=torch.float32):
    """Rank 0's Start on all ranks: the facts, and a model yet to be filled (parallelize does that,
    and state_dicts.load_optimizer_state). The other ranks give None."""
    facts = share(world, start and replace(
        start, model=start.model.config, optimizer={}, tokenizer=None))
    if start is None:
        start = replace(facts, model=GPT.empty(facts.model, dtype=dtype))
        if facts.lora:
            lora.add_lora(start.model, facts.lora["rank"])
    return start


def progress_of(saved):
    """The Progress of a saved state, nanoGPT's too."""
    if "progress" in saved:
        progress = Progress(**saved["progress"])
        for f in fields(Progress):
            kind = int | float if f.type is float else f.type
            if not isinstance(getattr(progress, f.name), kind):
                raise TypeError(f"progress: {f.name}")
        return progress
    step = int(saved["iter_num"])
    progress = new_progress()
    progress.step = progress.best_step = step
    progress.best_val_loss = float(saved["best_val_loss"])
    return progress


def check_run_id(start, last):
    """Raises UserError for a state that was copied into the folder of another run."""
    ours, theirs = last.get("run_id"), start.progress.run_id
    if ours and start.ours and theirs != ours:
        raise UserError(f"{start.path} is of run {theirs}, this folder's is {ours}: move it to a "
                        "folder of its own, or take it by --force_resume=True")


def check_model_file(progress, path):
    """Where ckpt.pt is missing or of another run, it is not the best so far that the state says it
    is: then the next evaluation counts as the best. Reads no more than the file's index."""
    try:
        run_id = torch.load(path, mmap=True, weights_only=True).get("run_id")
        if run_id in (None, progress.run_id):
            return
        wrong = f"is of run {run_id}"
    except Exception as e:  # torch.load raises many kinds
        wrong = "is missing" if not path.exists() else f"is damaged ({first_line(e)})"
    progress.best_val_loss = progress.best_train_loss = math.inf
    yield f"{path} {wrong}: the next evaluation writes it, as the best so far"


def nothing_left(out_dir, reasons):
    """The error where no state can serve: why, and whether the weights at least are whole."""
    path = Path(out_dir) / MODEL_FILE
    try:
        step = files.load(path)["iter_num"]
        rest = (f"{path} is whole, with the weights of step {step}: begin a new run with them by "
                f"--init_from={out_dir} --out_dir=ANOTHER")
    except (UserError, KeyError):
        rest = f"{path} cannot be read either: begin anew with --overwrite=True"
    return f"no state in {out_dir} can be resumed ({' | '.join(reasons)}); {rest}"


def tell_losses(start, reasons, last, reached):
    """Lines that say which states were passed over, how the last run ended, what is lost."""
    step = start.progress.step
    if reasons:
        newest = last.get("saved_step")
        lost = f" (of step {newest})" if newest is not None and newest > step else ""
        yield (f"the newest state{lost} cannot serve: {' | '.join(reasons)}; going on from "
               f"{start.path}, of step {step}")
    if last.get("status") == "running":
        again = f": steps {step} to {reached} are done again" if reached > step else ""
        yield (f"the last run (process {last.get('pid')} on {last.get('host')}) ended without a "
               "word: killed from outside, as the system does when memory runs out (try a lower "
               "--batch_size), or the machine went down, or the disk took nothing more; going on "
               f"from step {step}{again}")


def reached_step(out_dir):
    """The steps that metrics.jsonl says were taken: 0 where it says nothing."""
    try:
        lines = (Path(out_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return max((json.loads(line).get("iter", -1) for line in lines[-50:]
                    if line.endswith("}")), default=-1) + 1
    except (OSError, ValueError):
        return 0


# -----------------------------------------------------------------------------
# run.json

def read_run_file(out_dir):
    try:
        data = json.loads((Path(out_dir) / RUN_FILE).read_text(encoding="utf-8"))
        return data if isinstance(data, dict) else {}
    except (OSError, ValueError):
        return {}


def write_run_file(out_dir, progress, status, saved_step=None):
    """status: running, done, stopped (by a signal), failed (with a message). On a full disk it is
    written over the old one, whose room it has: at worst the hints that it gives are lost."""
    data = {"run_id": progress.run_id, "status": status, "pid": os.getpid(),
            "host": socket.gethostname(), "saved_step": saved_step}
    path, content = Path(out_dir) / RUN_FILE, json.dumps(data).encode()
    try:
        files.write_atomic(path, lambda f: f.write(content))
    except files.WriteError:
        with contextlib.suppress(OSError), open(path, "r+b") as f:
            f.write(content)
            f.truncate()


def begin(out_dir, start):
    """Makes the folder that of this run, and says that a process works on it."""
    if start.path is None:
        clear(out_dir)
    for path in start.passed_over:  # renamed, so that saves to come push no good one out
        os.replace(path, path.with_suffix(".refused"))
    for name in (STATE_FILE, MODEL_FILE, RUN_FILE):  # what a save that was cut off left
        Path(out_dir, f"{name}.tmp").unlink(missing_ok=True)
    write_run_file(out_dir, start.progress, "running", start.progress.step if start.path else None)


def clear(out_dir):
    """Removes a run that is to be replaced."""
    for path in (*state_files(out_dir), *(Path(out_dir) / name for name in (
            MODEL_FILE, RUN_FILE, "metrics.jsonl", "loss.png"))):
        path.unlink(missing_ok=True)
