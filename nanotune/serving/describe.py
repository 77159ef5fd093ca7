"""Tells about a served model: its kind and size, its run's step, losses and settings.

    about = describe_model("out-mine", source, model)
    run = describe_run(source)
"""
import math
import time
from pathlib import Path
from typing import Any

import torch

from nanotune.formats.checkpoint import history_of, model_class
from nanotune.training.logbook import read_entries

MOST_POINTS = 1000  # of a curve of logged iterations: more do not show


def describe_model(name: str, source: str, model: Any) -> dict:
    """Returns an entry of /v1/models: OpenAI's fields, and kind, parameters, context (tokens); of a
    run also step, val_loss (nats per token) and dataset, else None."""
    history = history_of(source)
    with torch.device("meta"):  # a packed model, or an ONNX file's, has no parameters to count
        made = model_class(model.config)(model.config)
    onnx = ", ONNX" if source.endswith(".onnx") else ""
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": "nanotune",
            "kind": made.family + onnx, "parameters": made.num_params(),
            "context": plain(model.config.block_size), "step": history.get("iter_num"),
            "val_loss": finite(history.get("best_val_loss")),
            "dataset": (history.get("config") or {}).get("dataset"),
            "has_run": Path(source, "metrics.jsonl").is_file()}


def describe_run(source: str) -> dict:
    """Returns {"settings", "batch", "evaluations"} of a run: the fields that it was trained with,
    [[iter, loss], ...] of logged iterations, thinned out, and [[step, train_loss, val_loss], ...]
    of evaluations. Reads the files again, so a run that trains shows its latest."""
    entries = read_entries(Path(source, "metrics.jsonl"))
    batch = [[e["iter"], finite(e["loss"])] for e in entries if "iter" in e]
    settings = history_of(source).get("config") or {}
    return {"settings": {key: plain(value) for key, value in settings.items()},
            "batch": batch[::1 + len(batch) // MOST_POINTS],
            "evaluations": [[e["step"], finite(e["train_loss"]), finite(e["val_loss"])]
                            for e in entries if "step" in e]}


def finite(value):
    """A number (or a tensor of one) as a float; None, which JSON has, for NaN and infinity."""
    return None if value is None or not math.isfinite(value) else float(value)


def plain(value):
    """A setting as JSON can hold it."""
    return finite(value) if isinstance(value, float) else value
