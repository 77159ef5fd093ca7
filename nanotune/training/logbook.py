"""What one sees of a run: lines, a bar on a terminal, metrics.jsonl, loss.png, wandb.

metrics.jsonl has a line an evaluation, {"step", "train_loss", "val_loss"}, and a line a logged
iteration, {"iter", "loss", "lr", "ms", "tok_s", "mfu", "memory"}; losses in nats a token, memory
the most bytes so far.
"""
import importlib.util
import json
import os
import sys

from tqdm import tqdm

from nanotune.errors import UserError


class Logbook:
    """Writes nothing on ranks other than the first. `start` is the step that the run begins at:
    what metrics.jsonl holds from there on, left by a run that was cut off later, is dropped."""
    def __init__(self, out_dir, start, max_iters, is_main, wandb_run=None):
        self.is_main, self.wandb_run, self.disk_failed = is_main, wandb_run, False
        self.metrics_path = os.path.join(out_dir, "metrics.jsonl")
        self.picture_path = os.path.join(out_dir, "loss.png")
        self.bar = tqdm(total=max_iters, initial=start, unit="it", leave=False, dynamic_ncols=True,
                        disable=not (is_main and sys.stderr.isatty()))
        if is_main:
            self.entries = kept_entries(self.metrics_path, start)
            self.on_disk(rewrite, self.metrics_path, map(json.dumps, self.entries))

    def say(self, text):
        if self.is_main:
            self.bar.clear()
            print(text, flush=True)
            self.bar.refresh()

    def warn(self, text):
        self.say(f"warning: {text}")

    def record(self, entry, step):
        if not self.is_main:
            return
        self.entries.append(entry)
        self.on_disk(write_line, self.metrics_path, json.dumps(entry))
        if self.wandb_run is not None:
            self.wandb_run.log({k: v for k, v in entry.items() if v is not None}, step=step)

    def on_disk(self, write, *args):
        """Metrics and pictures are not worth a run: a disk that does not take them is told once."""
        try:
            write(*args)
        except OSError as e:
            if not self.disk_failed:
                self.warn(f"cannot write to {os.path.dirname(self.metrics_path)} ({e.strerror}): "
                          "metrics.jsonl and loss.png lack what follows")
            self.disk_failed = True

    def evaluation(self, step, train_loss, val_loss):
        self.say(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        self.record({"step": step, "train_loss": train_loss, "val_loss": val_loss}, step)
        if self.is_main:
            self.on_disk(draw, self.entries, self.picture_path)

    def iteration(self, step, loss, lr, seconds, tokens, mfu=None, skipped=0, memory=None):
        """One logged step; mfu is a fraction, or None where the device's peak is not known."""
        tok_s = tokens / seconds
        line = f"iter {step}: loss {loss:.4f}, time {seconds * 1e3:.2f}ms, tok/s {tok_s:,.0f}"
        line += "" if mfu is None else f", mfu {mfu:.2%}"
        self.say(line + (f", {skipped} steps skipped by the scaler" if skipped else ""))
        self.record({"iter": step, "loss": loss, "lr": lr, "ms": round(seconds * 1e3, 3),
                     "tok_s": round(tok_s, 1), "mfu": mfu and round(mfu, 4), "memory": memory},
                    step)

    def close(self, status=0):
        self.bar.close()
        if self.wandb_run is not None:
            self.wandb_run.finish(exit_code=status)


def write_line(path, line):
    with open(path, "a", encoding="utf-8") as f:
        f.write(line + "\n")


def rewrite(path, lines):
    """A kill in the middle leaves the old file: what it held is not computed again."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.writelines(line + "\n" for line in lines)
    os.replace(f"{path}.tmp", path)


def kept_entries(path, start):
    """The entries of a metrics file that a run from `start` on does not write again: its
    evaluations up to `start`, its iterations before. A line cut short by a crash is dropped."""
    if not os.path.isfile(path):
        return []
    kept = []
    with open(path, encoding="utf-8") as f:
        for line in f:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if entry.get("step", start) <= start and entry.get("iter", -1) < start:
                kept.append(entry)
    return kept


def draw(entries, path):
    """loss.png: the loss of each logged step and of each evaluation, over the steps."""
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
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(path)


def check_wandb():
    """Raises UserError where wandb is asked for and not installed: before training, not after."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb_log=True needs the wandb package: pip install wandb (or leave it "
                        "off: metrics.jsonl and loss.png are written anyway)")


def start_wandb(project, name, run_id, config, out_dir):
    """Begins the wandb run, or goes on with the one of this id (WANDB_MODE=offline works)."""
    import wandb
    return wandb.init(project=project, name=name, id=run_id, resume="allow", config=config,
                      dir=out_dir)
