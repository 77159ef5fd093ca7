"""Checks config fields and weights read from a file, before a model is built from them.

The file may be damaged, edited by hand or from another program. Error messages are always one line.
"""
from pathlib import Path

import torch

from nanotune.errors import UserError

# {config field: (type, minimum, maximum)}; the maxima are far above those of any model
NUMBERS = {
    "block_size": (int, 1, 2**24), "vocab_size": (int, 1, 2**24), "n_layer": (int, 1, 1000),
    "n_head": (int, 1, 2**16), "n_embd": (int, 1, 2**20), "n_inner": (int, 1, 2**24),
    "local_window": (int, 1, 2**31), "doc_end": (int, 0, 2**31), "dropout": (float, 0, 1),
    "norm_eps": (float, 0, 1), "attn_scale": (float, 0, 1000), "n_decoder_layer": (int, 1, 10_000),
    "head_size": (int, 1, 2**20), "n_buckets": (int, 4, 2**16), "max_distance": (int, 2, 2**31),
    "start_id": (int, 0, 2**31), "pad_id": (int, 0, 2**31), "end_id": (int, 0, 2**31),
    "source_length": (int, 1, 2**24), "target_length": (int, 1, 2**24)}
FLAGS = ("bias", "qkv_bias", "tied_head", "gated", "scale_head")
OPTIONAL = ("n_inner", "local_window", "doc_end", "attn_scale", "qkv_bias")  # may be None


def short_repr(value: object) -> str:
    """Returns a value's repr for a message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_fields(fields: dict, where: str | Path, names: dict[str, str] | None = None,
                 optional: tuple[str, ...] = OPTIONAL) -> None:
    """Raises UserError if a config field has a wrong type, is out of range, or is None and not
    `optional`. `where` is the file, for messages; `names` maps fields to the file's names."""
    for field, value in fields.items():
        if value is None and field in optional:
            continue
        if field in FLAGS:
            right, allowed = type(value) is bool, "true or false"
        elif field in NUMBERS:
            kind, least, most = NUMBERS[field]
            right = type(value) in (int, kind) and least <= value <= most  # no bool, no NaN
            allowed = f"{'an integer' if kind is int else 'a number'} from {least} to {most}"
        else:
            continue
        if not right:
            raise UserError(f"{where} has {(names or {}).get(field, field)}={short_repr(value)}, "
                            f"which must be {allowed}; use another copy of it")


def check_weight(value: object, name: str, where: str | Path) -> None:
    """Raises UserError unless `value`, the entry `name` of the file `where`, is a dense tensor of
    finite floating-point numbers. Reads each number once."""
    if not isinstance(value, torch.Tensor):
        raise UserError(f"{where}: {name} must be a tensor, got {short_repr(value)}; use another "
                        "copy of it")
    if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
        raise UserError(f"{where}: {name} is not dense and floating-point ({value.dtype}, "
                        f"{value.layout}, {value.device}); use the model's original weights, not "
                        "quantized ones")
    # one NaN or infinity makes the sum NaN or infinite; isfinite() takes 20 times as long
    if not value.sum(dtype=torch.float32).isfinite():
        raise UserError(f"{where}: {name} has values that are NaN or infinite: the training "
                        "diverged or the file is damaged; use another copy of it")
