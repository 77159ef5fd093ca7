"""Compares runs: a table, the settings in which they differ, and a plot of their losses.

    python runs.py                        # all runs in the current folder; writes runs.png
    python runs.py out-a out-b
    python runs.py out-a --picture=a.png

Reads settings from the checkpoints and losses from metrics.jsonl; changes nothing in a run.
"""
import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

from nanotune.cli import run
from nanotune.errors import UserError
from nanotune.formats.checkpoint import MODEL_FILE, model_config
from nanotune.training import resume, settings
from nanotune.training.curves import best_of, draw_runs
from nanotune.training.logbook import read_entries

# fields that do not affect the result, and init_from and dataset, which are columns of the table
NOT_COMPARED = ("out_dir", "wandb_run_name", "settings_version", "overwrite", "auto_resume",
                "force_resume", "eval_only", "dry_run", "init_from", "dataset")
DECAY_ONLY = ("warmup_iters", "lr_decay_iters", "min_lr")  # without effect if decay_lr is False


@dataclass
class Row:
    """A run, for the table; losses in nats per token."""
    name: str
    config: dict
    entries: list[dict]          # lines of metrics.jsonl
    tokens_per_step: int

    @property
    def steps(self) -> int:
        return max((entry.get("step", entry.get("iter", -1) + 1) for entry in self.entries),
                   default=0)

    @property
    def best(self) -> tuple[float, int] | None:
        """Returns (lowest validation loss, its step), or None before the first evaluation."""
        best = best_of(self.entries)
        return (best["val_loss"], best["step"]) if best else None

    @property
    def speed(self) -> float | None:
        """The median of the logged tokens per second."""
        speeds = [entry["tok_s"] for entry in self.entries if "iter" in entry]
        return statistics.median(speeds) if speeds else None


def read_run(folder: Path) -> Row:
    """Returns the Row of an out_dir. Raises UserError if it is not a run."""
    if folder.suffix == ".pt":
        folder = folder.parent
    config = settings.read_run_config(folder)
    if not config:
        raise UserError(f"{folder} is not a run: it has no readable {MODEL_FILE} or state.pt")
    entries, model = read_entries(folder / "metrics.jsonl"), model_config(str(folder))
    tokens = config.get("batch_size", 1) * config.get("gradient_accumulation_steps", 1)
    if model.takes_pairs:  # pairs differ in length: tokens per step from the logged speed
        logged = next((entry for entry in entries if "iter" in entry), {"tok_s": 0, "ms": 0})
        tokens = round(logged["tok_s"] * logged["ms"] / 1e3)
    else:
        tokens *= model.block_size
    config = settings.with_sizes(config, model)
    if not config.get("decay_lr", True):
        config = {name: value for name, value in config.items() if name not in DECAY_ONLY}
    return Row(str(folder), config, entries, tokens)


def find_runs() -> list[Path]:
    """Returns the runs in the current folder. Raises UserError if there is none."""
    found = sorted(path for path in Path().iterdir() if path.is_dir() and (
        (path / MODEL_FILE).is_file() or resume.state_files(path)))
    if not found:
        raise UserError("no run in the current folder; give folders: python runs.py OUT_DIR ...")
    return found


def print_table(rows: list[list[str]]) -> None:
    """Prints rows of cells; the first row is the header, the first column is left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width)
                                            for cell, width in zip(row[1:], widths[1:]))]
        print("  ".join(cells).rstrip())


def summary(row: Row) -> list[str]:
    """The table cells of a run."""
    best = f"{row.best[0]:.4f} at {row.best[1]:,}" if row.best else "-"
    return [row.name, str(row.config.get("init_from") or "?"), str(row.config.get("dataset")),
            f"{row.steps:,}", f"{row.steps * row.tokens_per_step:,}", best,
            f"{row.speed:,.0f}" if row.speed else "-"]


def differences(rows: list[Row]) -> list[list[str]]:
    """The table of fields in which the runs differ; only a header if there are none."""
    names = dict.fromkeys(name for row in rows for name in row.config)
    table = [["field", *(row.name for row in rows)]]
    for name in names:
        # escaped: sample_start may contain newlines
        values = [repr(str(row.config.get(name, "-")))[1:-1] for row in rows]
        if name not in NOT_COMPARED and len(set(values)) > 1:
            table.append([name, *values])
    return table


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="*", type=Path, metavar="OUT_DIR",
                   help="folders of runs (default: all in the current folder)")
    p.add_argument("--picture", default="runs.png", metavar="FILE",
                   help="file of the plot: .png, .pdf or .svg (default: runs.png)")
    args = p.parse_args(argv)
    if Path(args.picture).suffix not in (".png", ".pdf", ".svg") or (
            not Path(args.picture).absolute().parent.is_dir()):
        raise UserError(f"--picture={args.picture} must be a .png, .pdf or .svg file in a folder "
                        "that exists")
    rows = [read_run(folder) for folder in args.runs or find_runs()]
    header = ["run", "init_from", "dataset", "steps", "tokens", "best validation loss", "tokens/s"]
    print_table([header, *map(summary, rows)])
    differ = differences(rows)
    if len(differ) > 1:
        print()
        print_table(differ)
    draw_runs({row.name: row.entries for row in rows}, args.picture)
    print(f"\n{args.picture}: validation losses, and training losses in paler colors")


if __name__ == "__main__":
    run(main)
