"""Resumes a run from its folder, also after a crash.

    state.pt      the latest state            state.1.pt   the one before (keep_states=2), ...
    run.json      the run's id, the step of its latest state, and its status

If a state is damaged or of another run, the one before it is used. If run.json still says "running"
when a run is resumed, the previous process was killed.
"""
import contextlib
import json
import math
import os
import re
import socket
import uuid
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from nanotune import files
from nanotune.errors import UserError, first_line
from nanotune.formats import checkpoint
from nanotune.formats.checkpoint import BEST_FILE, MODEL_FILE, STATE_FILE
from nanotune.text.loader import PairBin, TokenBin
from nanotune.text.tokenizer import AnyTokenizer
from nanotune.training import logbook, lora, state_dicts
from nanotune.training.distributed import World, broadcast

RUN_FILE = "run.json"
# files that a run rewrites as a whole, other than its states
REWRITTEN = (MODEL_FILE, BEST_FILE, RUN_FILE, "settings.json", "metrics.jsonl")
LENGTHS = ("block_size", "source_length", "target_length")  # tokens of a sample
RUN_FIELDS = {"run_id": str, "status": str, "pid": int, "host": str, "saved_step": int | None}


@dataclass
class Progress:
    """A run's progress, which state.pt holds along with weights, optimizer and scaler. Losses are
    in nats per token."""
    step: int = 0                # optimizer steps taken
    evaluated: int = -1          # step of the last evaluation
    best_val_loss: float = math.inf
    best_train_loss: float = math.inf  # of the same evaluation
    best_step: int = 0
    worse: int = 0               # evaluations since best_step
    warned: bool = False         # of overfitting, since best_step
    skipped: int = 0             # float16 steps that the scaler skipped in total
    run_id: str = ""


def new_progress() -> Progress:
    """Returns the Progress of a new run, with a random run_id."""
    return Progress(run_id=uuid.uuid4().hex[:8])


@dataclass
class Start:
    """The model and state that a run begins with. Only rank 0 reads them from disk."""
    model: object                  # only its config while sent to the other ranks
    progress: Progress = field(default_factory=new_progress)
    stepped: bool = False          # whether there is an optimizer state
    optimizer: dict = field(default_factory=dict)  # {parameter name: {"exp_avg": ..., ...}}
    scaler: dict | None = None
    # from the state file, for a resumed run
    path: Path | None = None
    config: dict = field(default_factory=dict)  # the run's config when it was saved
    tokenizer: AnyTokenizer | None = None
    data: dict = field(default_factory=dict)  # {split: TokenBin.fingerprint}; {}: not known
    lora: dict | None = None       # of a LoRA run: the rank; the base, its hash and its dtype
    ours: bool = True              # False: nanoGPT's, which has no run id
    skipped_states: tuple = ()     # paths of newer states that cannot be used
    warnings: tuple = ()           # lines to print


# -----------------------------------------------------------------------------
# resuming

def resumes(cfg: Any) -> bool:
    """Returns whether a run with this train.Config resumes from its out_dir."""
    return cfg.init_from == "resume" or (cfg.auto_resume and bool(state_files(cfg.out_dir)))


def state_files(out_dir: str | Path) -> list[Path]:
    """Returns the state files of a folder, newest first."""
    numbered = [path for path in Path(out_dir).glob("state.*.pt")
                if re.fullmatch(r"state\.[0-9]{1,9}\.pt", path.name)]
    numbered.sort(key=lambda path: int(path.suffixes[0][1:]))
    return [path for path in (Path(out_dir) / STATE_FILE, *numbered) if path.is_file()]


def is_at_step_0(out_dir: str | Path) -> bool:
    """Returns whether ckpt.pt is of step 0. If there is no state either, the run was killed before
    its first save, and nothing is lost."""
    try:
        return files.load(Path(out_dir) / MODEL_FILE)["iter_num"] == 0
    except (UserError, KeyError):
        return False


def load_start(out_dir: str | Path, dropout: float, dtype: torch.dtype,
               any_run: bool = False) -> Start:
    """Returns the Start of the newest usable state in a folder, its matrices in `dtype`.

    Uses only states of the folder's own run, or, with `any_run`, of any run. If there is none,
    raises UserError, which says whether ckpt.pt can be used instead.
    """
    paths = state_files(out_dir) or [Path(out_dir) / MODEL_FILE]
    if not paths[0].is_file():
        raise UserError(f"--init_from=resume: {out_dir} has no checkpoint; check --out_dir, or "
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
    start.skipped_states = tuple(paths[:len(reasons)])
    start.warnings = tuple(resume_warnings(start, reasons, last, reached_step(out_dir)))
    best = best_file_of(out_dir, start)
    if problem := best_file_problem(best, start.progress.run_id):
        start.progress.best_val_loss = start.progress.best_train_loss = math.inf
        start.warnings += (f"{best} {problem}: the next evaluation writes it, as the best so far",)
    return start


def read_start(path, dropout, dtype=torch.float32):
    """The Start of a state file, or of a nanoGPT ckpt.pt, which also holds the optimizer's state.

    Raises UserError if any part is damaged: all parts are read here, so that load_start can fall
    back to an older state.
    """
    saved = files.load(path)
    if "optimizer" not in saved:
        raise UserError(f"--init_from=resume: {path} holds a model, but its folder has no state.pt "
                        "to resume from; begin a new run from its weights with "
                        f"--init_from={path.parent} --out_dir=ANOTHER")
    with files.checked_parse(path):
        model = checkpoint.model_from(saved, path, dropout, dtype)
        optimizer = state_dicts.checked_optimizer_state(model, saved["optimizer"], path)
        return Start(model, progress_of(saved), bool(optimizer), optimizer,
                     saved.get("scaler") or None, path, config_of(saved),
                     checkpoint.tokenizer_from(saved), dict(saved.get("data", {})),
                     saved.get("lora"), "progress" in saved)


def config_of(saved):
    """The config that a state was saved with, and the values that check_same_run compares."""
    config = dict(saved.get("config") or {})
    config |= {name: saved["model_args"].get(name) for name in LENGTHS}
    if "batch_size" in config:
        config["global batch"] = (int(config["batch_size"])
                                  * int(config.get("gradient_accumulation_steps", 1)))
    return config


def check_same_run(cfg: Any, start: Start) -> None:
    """Raises UserError if a train.Config has another seed, dataset, LENGTHS or global batch than
    the run of `start`: these change the data. cfg.force_resume allows it."""
    then = start.config
    now = asdict(cfg) | {name: getattr(cfg, name) or then[name] for name in LENGTHS} | {
                         "global batch": cfg.batch_size * cfg.gradient_accumulation_steps}
    differ = [f"{key} was {then[key]}, now {now[key]}"
              for key in ("seed", "dataset", *LENGTHS, "global batch")
              if key in then and then[key] != now[key]]
    if differ and not cfg.force_resume:
        raise UserError(f"{start.path} is of another run: {'; '.join(differ)}; give the old "
                        "values, or --force_resume=True to use the new ones")


def check_same_data(cfg: Any, start: Start,
                    data: dict[str, TokenBin | PairBin]) -> None:
    """Raises UserError if a split's files changed since the state was saved, unless
    cfg.force_resume is set."""
    for split, now in data.items():
        if start.data.get(split, now.fingerprint) != now.fingerprint and not cfg.force_resume:
            raise UserError(f"{now.path} or its mask has changed since {start.path} was saved: put "
                            "the old files back, or give --force_resume=True to use the new ones")


def broadcast_start(start: Start | None, world: World, dtype: torch.dtype = torch.float32) -> Start:
    """Returns rank 0's Start on all ranks; the other ranks pass None. All ranks must call this.

    The other ranks get an uninitialized model and no optimizer state, which parallelize and
    state_dicts.load_optimizer_state fill.
    """
    facts = broadcast(world, start and replace(
        start, model=start.model.config, optimizer={}, tokenizer=None))
    if start is None:
        model = checkpoint.model_class(facts.model).empty(facts.model, dtype=dtype)
        start = replace(facts, model=model)
        if facts.lora:
            lora.add_lora(start.model, facts.lora["rank"])
    return start


def progress_of(saved):
    """The Progress of a saved state, ours or nanoGPT's. Raises TypeError if a field is damaged."""
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
    """Raises UserError if the state is of another run than the folder's run.json."""
    ours, theirs = last.get("run_id"), start.progress.run_id
    if ours and start.ours and theirs != ours:
        raise UserError(f"{start.path} is of run {theirs}, but this folder is of run {ours}: move "
                        "it to another folder, or resume it with --force_resume=True")


def best_file_of(out_dir, start):
    """The file with the best model of the run that is resumed; nanoGPT and nanotune's first edition
    have only ckpt.pt."""
    has_best = "settings_version" in start.config
    return Path(out_dir) / checkpoint.best_file(
        has_best and start.config.get("always_save_checkpoint", True))


def best_file_problem(path, run_id):
    """What is wrong with the file of the best model, or "". Reads no weights."""
    try:
        found = files.peek(path).get("run_id")
    except Exception as e:  # torch.load raises many kinds
        return "is missing" if not path.exists() else f"is damaged ({first_line(e)})"
    return "" if found in (None, run_id) else f"is of run {found}"


def nothing_left(out_dir, reasons):
    """The message if no state can be resumed: the reasons, and whether ckpt.pt can be used instead.
    """
    path = Path(out_dir) / MODEL_FILE
    try:
        step = files.load(path)["iter_num"]
        rest = (f"{path} is intact, with the weights of step {step}: begin a new run from them "
                f"with --init_from={out_dir} --out_dir=ANOTHER")
    except (UserError, KeyError):
        rest = f"{path} cannot be read either: start again with --overwrite=True"
    return f"no state in {out_dir} can be resumed ({' | '.join(reasons)}); {rest}"


def resume_warnings(start, reasons, last, reached):
    """Yields warnings: skipped states, how the previous process ended, which steps are lost."""
    step = start.progress.step
    if reasons:
        newest = last.get("saved_step")
        lost = f" (of step {newest})" if newest is not None and newest > step else ""
        yield (f"the newest state{lost} cannot be used: {' | '.join(reasons)}; resuming from "
               f"{start.path}, of step {step}")
    if last.get("status") == "running":
        again = f": steps {step} to {reached} are done again" if reached > step else ""
        yield (f"the last run (process {last.get('pid')} on {last.get('host')}) ended without a "
               "message: it was killed, perhaps for lack of memory (try a lower --batch_size), or "
               f"the machine or the disk failed; resuming from step {step}{again}")


def reached_step(out_dir: str | Path) -> int:
    """Returns how many steps were taken according to metrics.jsonl, 0 if it has no iteration."""
    entries = logbook.read_entries(Path(out_dir) / "metrics.jsonl", last=50)
    return max((entry.get("iter", -1) for entry in entries), default=-1) + 1


# -----------------------------------------------------------------------------
# run.json

def read_run_file(out_dir: str | Path) -> dict:
    """Returns the content of run.json without fields of a wrong type, {} if it is missing or
    damaged."""
    try:
        data = json.loads((Path(out_dir) / RUN_FILE).read_bytes())
        return {key: data.get(key) for key, kind in RUN_FIELDS.items()
                if isinstance(data.get(key), kind)}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def write_run_file(out_dir: str | Path, progress: Progress, status: str,
                   saved_step: int | None = None) -> None:
    """Writes run.json; `saved_step` is the step of the latest state, None if there is none.

    `status` is running, done, stopped (by a signal) or failed (with an error). On a full disk it
    overwrites the old file in place, which needs no space but is not atomic. Errors are ignored:
    the file is used only for warnings and check_run_id.
    """
    data = {"run_id": progress.run_id, "status": status, "pid": os.getpid(),
            "host": socket.gethostname(), "saved_step": saved_step}
    path, content = Path(out_dir) / RUN_FILE, json.dumps(data).encode()
    try:
        files.write_atomic(path, lambda f: f.write(content))
    except files.WriteError:
        with contextlib.suppress(OSError), open(path, "r+b") as f:
            f.write(content)
            f.truncate()


def begin(out_dir: str | Path, start: Start, best: str) -> None:
    """Prepares the folder for a run that writes its best model to the file `best`, and writes
    run.json with status running. Raises files.WriteError if the disk is full.

    A new run removes the files of an old one; a resumed run renames skipped states to .refused.
    """
    if start.path is None:
        clear(out_dir)
    elif best_file_of(out_dir, start).name != best and best_file_of(out_dir, start).is_file():
        files.link(best_file_of(out_dir, start), Path(out_dir) / best)
        if best == MODEL_FILE:  # else an outdated best.pt would stay
            (Path(out_dir) / BEST_FILE).unlink()
    for path in start.skipped_states:  # else saves would delete the good, older states first
        os.replace(path, path.with_suffix(".refused"))
    for name in (STATE_FILE, *REWRITTEN):
        # left by an interrupted save
        for path in Path(out_dir).glob(f"{name}.*tmp"):
            path.unlink(missing_ok=True)
    write_run_file(out_dir, start.progress, "running", start.progress.step if start.path else None)


def clear(out_dir):
    """Removes the files of a run."""
    for path in (*state_files(out_dir), *(Path(out_dir) / name for name in (
            *REWRITTEN, "train.log", "samples.txt", "loss.png"))):
        path.unlink(missing_ok=True)
