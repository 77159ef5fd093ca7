"""Logs a run: printed lines, a progress bar on a terminal, metrics.jsonl, loss.png, wandb.

metrics.jsonl has one line per evaluation, {"step", "train_loss", "val_loss"}, and one per logged
iteration, {"iter", "loss", "lr", "ms", "tok_s", "mfu", "memory"}. Losses are in nats per token, mfu
is a fraction, memory the peak so far in bytes.
"""
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanotune import files
from nanotune.cli import say
from nanotune.errors import UserError


class Logbook:
    """Writes and prints on rank 0 only (`is_main`).

    `start` is the step that the run begins at. `wandb_run` is what start_wandb returned. Call
    begin() before the first entry.
    """
    def __init__(self, out_dir: str, start: int, max_iters: int, is_main: bool,
                 wandb_run: Any = None) -> None:
        self.start, self.entries = start, []
        self.is_main, self.wandb_run, self.disk_failed = is_main, wandb_run, False
        self.metrics_path = os.path.join(out_dir, "metrics.jsonl")
        self.picture_path = os.path.join(out_dir, "loss.png")
        self.bar = tqdm(total=max_iters, initial=start, unit="it", leave=False, dynamic_ncols=True,
                        disable=not (is_main and sys.stderr.isatty()))

    def begin(self) -> None:
        """Drops entries of metrics.jsonl after the start, from a run that was stopped later."""
        if self.is_main:
            self.entries = kept_entries(self.metrics_path, self.start)
            self.on_disk(rewrite, self.metrics_path, map(json.dumps, self.entries))

    def say(self, text: str) -> None:
        """Prints a line above the progress bar; that it cannot be printed is no error."""
        if self.is_main:
            self.bar.clear()
            say(text)
            self.bar.refresh()

    def warn(self, text: str) -> None:
        """Prints a warning."""
        self.say(f"warning: {text}")

    def record(self, entry, step):
        if not self.is_main:
            return
        self.entries.append(entry)
        self.on_disk(write_line, self.metrics_path, json.dumps(entry))
        if self.wandb_run is not None:
            self.wandb_run.log({k: v for k, v in entry.items() if v is not None}, step=step)

    def on_disk(self, write, *args):
        """Calls write(*args). A failure must not stop the run: it warns, once."""
        try:
            write(*args)
        except (OSError, files.WriteError) as e:
            if not self.disk_failed:
                reason = (e.__cause__ or e).strerror
                self.warn(f"cannot write to {os.path.dirname(self.metrics_path)} ({reason}): "
                          "metrics.jsonl and loss.png are incomplete from here on")
            self.disk_failed = True

    def evaluation(self, step: int, train_loss: float, val_loss: float) -> None:
        """Logs an evaluation, losses in nats per token, and draws loss.png again."""
        self.say(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        self.record({"step": step, "train_loss": train_loss, "val_loss": val_loss}, step)
        if self.is_main:
            self.on_disk(draw, self.entries, self.picture_path)

    def iteration(self, step: int, loss: float, lr: float, seconds: float, tokens: int,
                  mfu: float | None = None, skipped: int = 0, memory: int | None = None) -> None:
        """Logs a step: its loss (nats per token), learning rate, duration and number of tokens.

        `mfu` is a fraction, None if unknown; `skipped` is how many steps the loss scaler skipped so
        far; `memory` the peak in bytes, None if unknown.
        """
        tok_s = tokens / seconds
        line = f"iter {step}: loss {loss:.4f}, time {seconds * 1e3:.2f}ms, tok/s {tok_s:,.0f}"
        line += "" if mfu is None else f", mfu {mfu:.2%}"
        self.say(line + (f", {skipped} steps skipped by the scaler" if skipped else ""))
        self.record({"iter": step, "loss": loss, "lr": lr, "ms": round(seconds * 1e3, 3),
                     "tok_s": round(tok_s, 1), "mfu": mfu and round(mfu, 4), "memory": memory},
                    step)

    def close(self, status: int = 0) -> None:
        """Closes the progress bar, and the wandb run with this exit status."""
        self.bar.close()
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
    """Returns the entries of a metrics file, or of its `last` lines. Skips lines that are no entry,
    cut short by a crash or damaged; the file may be missing."""
    try:
        lines = Path(path).read_bytes().splitlines()[-last:]
    except OSError:
        return []
    return list(filter(None, map(parse_entry, lines)))


def parse_entry(line):
    """A line as an entry that can be compared and drawn, or None."""
    try:
        entry = json.loads(line)
        numbers = [entry[key] for key in (("step", "train_loss", "val_loss") if "step" in entry
                                          else ("iter", "loss"))]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    # below 1e300: a long integer would be too large for a float
    fine = isinstance(numbers[0], int) and all(
        isinstance(n, int | float) and abs(n) < 1e300 for n in numbers)
    return entry if fine else None


def draw(entries, path):
    """Draws loss.png: the losses of logged steps and of evaluations, by step."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    series = (("iter", "loss", "batch", "0.8", "-"), ("step", "train_loss", "train", "C0", "o-"),
              ("step", "val_loss", "validation", "C1", "o-"))
    for x, y, label, color, style in series:
        points = [(entry[x], entry[y]) for entry in entries if x in entry]
        if points:
            axes.plot(*zip(*points), style, color=color, label=label, markersize=3)
    evaluations = [entry for entry in entries if "step" in entry]
    if evaluations:
        best = min(evaluations, key=lambda entry: entry["val_loss"])
        axes.axhline(best["val_loss"], color="C1", linewidth=0.5, linestyle="--")
        axes.set_title(f"best validation loss {best['val_loss']:.4f} at step {best['step']}",
                       fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(path)


def check_wandb() -> None:
    """Raises UserError if wandb is not installed; call it before training."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb_log=True needs the wandb package: pip install wandb (or leave it "
                        "off: metrics.jsonl and loss.png do not need it)")


def start_wandb(project: str, name: str, run_id: str, config: dict, out_dir: str) -> Any:
    """Returns a new wandb run, or the one with this id resumed. WANDB_MODE=offline works."""
    import wandb
    return wandb.init(project=project, name=name, id=run_id, resume="allow", config=config,
                      dir=out_dir)
