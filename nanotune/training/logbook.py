"""Logs a run: printed lines, a progress bar on a terminal, files in out_dir, wandb, TensorBoard.

train.log has the printed lines with times, samples.txt the samples with their steps, loss.png the
loss curves.

metrics.jsonl has one line per evaluation, {"step", "train_loss", "val_loss"}, and one per logged
iteration, {"iter", "loss", "lr", "ms", "tok_s", "mfu", "memory"}. Losses are in nats per token, mfu
is a fraction, memory is the peak so far in bytes.
"""
import importlib.util
import json
import netrc
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from nanotune import files
from nanotune.cli import say
from nanotune.errors import UserError
from nanotune.training.curves import draw


class Logbook:
    """Writes and prints on rank 0 only (`is_main`).

    `start` is the step that the run begins at. `wandb_run` and `tensorboard` are the results of
    start_wandb and start_tensorboard. Call begin() before the first entry; no file is written
    before that.
    """
    def __init__(self, out_dir: str, start: int, max_iters: int, is_main: bool,
                 wandb_run: Any = None, tensorboard: Any = None) -> None:
        self.start, self.entries, self.out_dir = start, [], Path(out_dir)
        self.is_main, self.wandb_run, self.tensorboard = is_main, wandb_run, tensorboard
        self.disk_failed, self.waiting = False, []  # lines for train.log, until begin()
        self.metrics_path = self.out_dir / "metrics.jsonl"
        self.bar = tqdm(total=max_iters, initial=start, unit="it", leave=False, dynamic_ncols=True,
                        disable=not (is_main and sys.stderr.isatty()))

    def begin(self) -> None:
        """Drops the entries of metrics.jsonl after `start`, which a resumed run writes again, and
        writes the lines printed so far to train.log."""
        if self.is_main:
            self.entries = kept_entries(self.metrics_path, self.start)
            self.on_disk(rewrite, self.metrics_path, map(json.dumps, self.entries))
            waiting, self.waiting = self.waiting, None
            for line in waiting:
                self.on_disk(write_line, self.out_dir / "train.log", line)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar and adds it to train.log; never fails."""
        if self.is_main:
            self.bar.clear()
            say(text)
            self.bar.refresh()
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}"
            if self.waiting is None:
                self.on_disk(write_line, self.out_dir / "train.log", line)
            else:
                self.waiting.append(line)

    def warn(self, text: str) -> None:
        """Prints a warning as say() does."""
        self.say(f"warning: {text}")

    def record(self, entry, step):
        if not self.is_main:
            return
        self.entries.append(entry)
        self.on_disk(write_line, self.metrics_path, json.dumps(entry))
        known = {key: value for key, value in entry.items() if value is not None}
        if self.wandb_run is not None:
            self.wandb_run.log(known, step=step)
        if self.tensorboard is not None:
            for key, value in known.items():
                self.tensorboard.add_scalar(key, value, step)

    def on_disk(self, write, *args):
        """Calls write(*args). A failure must not stop the run: the first one prints a warning."""
        try:
            write(*args)
        except (OSError, files.WriteError) as e:
            first, self.disk_failed = not self.disk_failed, True
            if first:
                reason = (e.__cause__ or e).strerror
                self.warn(f"cannot write to {self.out_dir} ({reason}): metrics.jsonl, train.log "
                          "and loss.png are incomplete from here on")

    def evaluation(self, step: int, train_loss: float, val_loss: float) -> None:
        """Logs an evaluation (losses in nats per token) and draws loss.png again, except after the
        first entry, so that the first step does not wait for matplotlib."""
        self.say(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        self.record({"step": step, "train_loss": train_loss, "val_loss": val_loss}, step)
        if self.is_main and len(self.entries) > 1:
            self.on_disk(draw, self.entries, self.out_dir / "loss.png")

    def sample(self, step: int, text: str) -> None:
        """Prints a sample and adds it to samples.txt."""
        self.say(f"--- sample ---\n{text}\n--------------")
        if self.is_main:
            self.on_disk(write_line, self.out_dir / "samples.txt",
                         f"=== step {step} ===\n{text}\n")

    def iteration(self, step: int, loss: float, lr: float, seconds: float, tokens: int,
                  mfu: float | None = None, skipped: int = 0, memory: int | None = None,
                  targets: int | None = None, note: str = "") -> None:
        """Logs a step: its loss (nats per token), learning rate, duration and number of tokens.

        `mfu` is a fraction, None if unknown; `skipped` is the number of steps that the loss scaler
        skipped so far; `memory` is the peak in bytes, None if unknown; `targets` is the number of
        tokens that count in the loss; `note` is printed after the loss.
        """
        tok_s = tokens / seconds
        text = "no token counts in the loss" if targets == 0 else f"loss {loss:.4f}{note}"
        line = f"iter {step}: {text}, time {seconds * 1e3:.2f}ms, tok/s {tok_s:,.0f}"
        line += "" if mfu is None else f", mfu {mfu:.2%}"
        self.say(line + (f", {skipped} steps skipped by the scaler" if skipped else ""))
        self.record({"iter": step, "loss": loss, "lr": lr, "ms": round(seconds * 1e3, 3),
                     "tok_s": round(tok_s, 1), "mfu": mfu and round(mfu, 4), "memory": memory},
                    step)

    def close(self, status: int = 0) -> None:
        """Closes the progress bar, TensorBoard, and the wandb run with this exit status."""
        self.bar.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb_run is not None:
            self.wandb_run.finish(exit_code=status)


def write_line(path, line):
    with open(path, "a", encoding="utf-8") as f:
        f.write(line + "\n")


def rewrite(path, lines):
    files.write_atomic(path, lambda f: f.writelines(f"{line}\n".encode() for line in lines))


def kept_entries(path: str | Path, start: int) -> list[dict]:
    """Returns the entries of a metrics file that a run from step `start` does not write again:
    evaluations up to `start`, iterations before it. Skips damaged lines and a missing file."""
    return [entry for entry in read_entries(path)
            if entry.get("step", start) <= start and entry.get("iter", -1) < start]


def read_entries(path: str | Path, last: int = 0) -> list[dict]:
    """Returns the entries of a metrics file, or only of its last `last` lines if `last` is not 0.
    Skips damaged lines, such as one that a crash cut short; the file may be missing."""
    try:
        lines = Path(path).read_bytes().splitlines()[-last:]
    except OSError:
        return []
    return list(filter(None, map(parse_entry, lines)))


def parse_entry(line):
    """A line as an entry with valid numbers, or None."""
    try:
        entry = json.loads(line)
        numbers = [entry[key] for key in (("step", "train_loss", "val_loss") if "step" in entry
                                          else ("iter", "loss"))]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    # below 1e300: JSON may have an integer that is too large for a float
    fine = isinstance(numbers[0], int) and all(
        isinstance(n, int | float) and abs(n) < 1e300 for n in numbers)
    return entry if fine else None


def check_wandb() -> None:
    """Raises UserError if wandb is not installed or has no key; call it before training."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb_log=True needs the wandb package: pip install wandb (or leave it "
                        "off: metrics.jsonl and loss.png do not need it)")
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or has_wandb_key():
        return
    raise UserError("--wandb_log=True needs a key: run `wandb login`, or set WANDB_API_KEY or "
                    "WANDB_MODE=offline")


def has_wandb_key():
    """Whether the environment or the netrc file has wandb's key, as wandb itself looks for it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def check_tensorboard() -> None:
    """Raises UserError if TensorBoard is not installed; call it before training."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard=True needs the tensorboard package: pip install tensorboard")


def start_tensorboard(out_dir: str, start: int) -> Any:
    """Returns a SummaryWriter for out_dir/tensorboard. TensorBoard hides points that earlier
    processes wrote for step `start` or later. View the curves with tensorboard --logdir=OUT_DIR."""
    from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(os.path.join(out_dir, "tensorboard"), purge_step=start)


def start_wandb(cfg: Any, run_id: str) -> Any:
    """Returns a new wandb run, or the one with this id resumed. WANDB_MODE=offline works."""
    import wandb
    return wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name or cfg.out_dir, id=run_id,
                      resume="allow", config=asdict(cfg), dir=cfg.out_dir)
