"""Draws the losses of a run as loss.png, and of several runs in one picture.

Entries are those of metrics.jsonl: evaluations have step, train_loss and val_loss, iterations have
iter and loss. Losses are in nats per token.
"""
import os
from pathlib import Path
from typing import Any


def draw(entries: list[dict], path: str | Path) -> None:
    """Draws loss.png: the losses of logged steps and of evaluations, with the best marked."""
    figure, axes = new_figure()
    series = (("iter", "loss", "batch", "0.8", "-"), ("step", "train_loss", "train", "C0", "o-"),
              ("step", "val_loss", "validation", "C1", "o-"))
    for x, y, label, color, style in series:
        points = [(entry[x], entry[y]) for entry in entries if x in entry]
        if points:
            axes.plot(*zip(*points), style, color=color, label=label, markersize=3)
    best = best_of(entries)
    if best:
        axes.plot(best["step"], best["val_loss"], "*", color="C3", markersize=12, zorder=3,
                  label="best")
        axes.set_title(f"best validation loss {best['val_loss']:.4f} at step {best['step']}",
                       fontsize=10)
    finish(figure, axes, limits(entries), path)


def draw_runs(runs: dict[str, list[dict]], path: str | Path) -> None:
    """Draws {name: entries}: validation losses as lines, training losses in a paler color."""
    figure, axes = new_figure()
    for number, (name, entries) in enumerate(runs.items()):
        evaluations = [entry for entry in entries if "step" in entry]
        steps = [entry["step"] for entry in evaluations]
        for key, alpha in (("train_loss", 0.3), ("val_loss", 1.0)):
            axes.plot(steps, [entry[key] for entry in evaluations], "o-", color=f"C{number % 10}",
                      alpha=alpha, markersize=3, label=name if key == "val_loss" else None)
        best = best_of(entries)
        if best:
            axes.plot(best["step"], best["val_loss"], "*", color=f"C{number % 10}", markersize=12)
    shown = list(filter(None, map(limits, runs.values())))
    finish(figure, axes, shown and (min(low for low, _ in shown), max(high for _, high in shown)),
           path)


def best_of(entries: list[dict]) -> dict | None:
    """Returns the evaluation with the lowest validation loss, or None."""
    return min((entry for entry in entries if "step" in entry),
               key=lambda entry: entry["val_loss"], default=None)


def limits(entries: list[dict]) -> tuple[float, float] | None:
    """Returns the (lowest, highest) loss to show, or None for all. Covers the best validation
    loss and all evaluations after the first quarter. Covers the very first evaluation too, unless
    the others would then fill less than a quarter of the height, as with a first loss of 10.9. If
    only one evaluation is after the first quarter, always covers the very first."""
    evaluations = [entry for entry in entries if "step" in entry]
    later = evaluations[max(1, len(evaluations) // 4):]
    if not later:
        return None
    losses = [entry[key] for entry in later for key in ("train_loss", "val_loss")]
    losses.append(best_of(entries)["val_loss"])
    low, high = min(losses), max(losses)
    first = max(evaluations[0]["train_loss"], evaluations[0]["val_loss"])
    if len(later) == 1 or first - high <= 3 * (high - low):
        high = max(high, first)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 0.1
    return low - margin, high + margin


def new_figure() -> tuple[Any, Any]:
    """Returns (figure, axes). Imports matplotlib only here, since that takes half a second."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    return figure, figure.subplots()


def finish(figure, axes, shown, path):
    if shown:  # (lowest, highest) loss
        axes.set_ylim(*shown)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.2)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)
    figure.savefig(path)
