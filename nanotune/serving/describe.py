"""Describes a served model: its kind and size, and the step, losses and settings of its run.

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

MOST_POINTS = 1000  # of a curve of logged iterations; more would not be visible


def describe_model(name: str, source: str, model: Any) -> dict:
    """Returns an entry of /v1/models: OpenAI's fields, kind, parameters, context (tokens), and the
    run's step, val_loss (nats per token) and dataset, or None if there is no run."""
    history = history_of(source)
    with torch.device("meta"):  # a packed model, or an ONNX file's, has no parameters to count
        meta_model = model_class(model.config)(model.config)
    onnx = ", ONNX" if source.endswith(".onnx") else ""
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": "nanotune",
            "kind": meta_model.family + onnx, "parameters": meta_model.num_params(),
            "context": plain(model.config.block_size), "step": history.get("iter_num"),
            "val_loss": finite(history.get("best_val_loss")),
            "dataset": (history.get("config") or {}).get("dataset"),
            "has_run": Path(source, "metrics.jsonl").is_file()}


def describe_run(source: str) -> dict:
    """Returns {"settings", "batch", "evaluations"} of a run: its config, [[iter, loss], ...] of up
    to MOST_POINTS logged iterations, and [[step, train_loss, val_loss], ...] of evaluations. Reads
    the files again at each call, so a run that is training shows its latest values."""
    entries = read_entries(Path(source, "metrics.jsonl"))
    batch = [[e["iter"], finite(e["loss"])] for e in entries if "iter" in e]
    settings = history_of(source).get("config") or {}
    return {"settings": {key: plain(value) for key, value in settings.items()},
            "batch": batch[::1 + len(batch) // MOST_POINTS],
            "evaluations": [[e["step"], finite(e["train_loss"]), finite(e["val_loss"])]
                            for e in entries if "step" in e]}


def finite(value):
    """A number (or a tensor of one) as a float; None for NaN and infinity, which JSON lacks."""
    return None if value is None or not math.isfinite(value) else float(value)


def plain(value):
    """A setting as JSON can store it."""
    return finite(value) if isinstance(value, float) else value
