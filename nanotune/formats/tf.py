"""Reads an OpenAI or gpt-2-simple TensorFlow checkpoint as a GPT.

    python export.py --init_from=checkpoint/run1 --format=hf --export_dir=run1-hf
    python train.py config/finetune_shakespeare.py --init_from=checkpoint/run1

The folder holds the files of those programs (checkpoint, model-N.index, model-N.data-*,
hparams.json) and the tokenizer (encoder.json, vocab.bpe). Only this module needs TensorFlow:
pip install -r requirements-tf.txt
"""
import os
import re
from dataclasses import replace
from pathlib import Path, PureWindowsPath

import torch

from model import GPT, GPTConfig
from nanotune.errors import UserError
from nanotune.formats.checks import check_fields, check_weight
from nanotune.formats.hub import read_json

HPARAMS = {"n_vocab": "vocab_size", "n_ctx": "block_size", "n_embd": "n_embd", "n_head": "n_head",
           "n_layer": "n_layer"}
# variables other than weights: the optimizer's slots and powers of beta, the step
SLOT = re.compile(r"(.*)/(Adam|Adam_1|AdamW|AdamW_1|Momentum|Adagrad|RMSProp|RMSProp_1)")
COUNTER = re.compile(r"(.*/)?(beta[12]_power|global_step)(_\d+)?")


def is_tf_checkpoint(folder: Path) -> bool:
    """Returns whether a folder has hparams.json or a .index file, and no config.json."""
    return (folder.is_dir() and not (folder / "config.json").is_file()
            and ((folder / "hparams.json").is_file() or any(folder.glob("*.index"))))


def weight_files(folder: Path) -> list[Path]:
    """Returns the index file and the data files of a folder's checkpoint. Raises UserError unless
    the folder has exactly one checkpoint with all its files."""
    prefix = find_prefix(folder)
    return sorted(p for p in folder.iterdir() if p.name.startswith(f"{prefix.name}."))


def read_config(folder: Path) -> GPTConfig:
    """Returns the GPTConfig of hparams.json. Raises UserError if it is missing or damaged."""
    path = folder / "hparams.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; copy it from the folder of the pretrained "
                        "model that the run started from")
    hparams = read_json(path)
    lacks = [name for name in HPARAMS if name not in hparams]
    if lacks:
        raise UserError(f"{path} lacks {', '.join(lacks)}; copy it again")
    fields = {ours: hparams[theirs] for theirs, ours in HPARAMS.items()}
    check_fields(fields, path, {ours: theirs for theirs, ours in HPARAMS.items()})
    return GPTConfig(**fields)


def find_prefix(folder):
    """The path, without suffix, of the checkpoint that the file `checkpoint` names (perhaps by a
    path on another machine), else of the only checkpoint. Raises UserError if a file is missing."""
    indexes = [p.with_suffix("") for p in sorted(folder.glob("*.index"))]
    if (folder / "checkpoint").is_file():
        text = (folder / "checkpoint").read_text(encoding="utf-8")
        named = re.search(r'^model_checkpoint_path: "(.*)"', text, re.MULTILINE)
        if named:  # a path on the machine that trained, with either kind of slash
            indexes = [folder / PureWindowsPath(named[1]).name]
    if len(indexes) != 1:
        raise UserError(f"{folder} has no file `checkpoint` that names a checkpoint, and "
                        f"{len(indexes)} .index files; give the folder of one run")
    prefix = indexes[0]
    shards = sorted(p.name for p in folder.glob(f"{prefix.name}.data-*-of-*"))
    total = int(shards[0].rpartition("-of-")[2]) if shards else 1
    expected = [f"{prefix.name}.data-{i:05}-of-{total:05}" for i in range(total)]
    missing = [name for name in [f"{prefix.name}.index", *expected]
               if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}; copy the whole folder again")
    return prefix


def tf_name(ours):
    """transformer.h.0.attn.c_attn.weight -> model/h0/attn/c_attn/w, as TensorFlow names it."""
    module, _, kind = ours.removeprefix("transformer.").rpartition(".")
    theirs = "model/" + module.replace("h.", "h", 1).replace(".", "/")
    if module in ("wte", "wpe"):
        return theirs
    return f"{theirs}/{'b' if kind == 'bias' else 'g' if 'ln_' in module else 'w'}"


def check_names(found, expected, prefix):
    """Raises UserError if a variable is missing, or is neither the model's nor the optimizer's."""
    foreign = sorted(name for name in found - expected if not COUNTER.fullmatch(name)
                     and not ((slot := SLOT.fullmatch(name)) and slot[1] in expected))
    if foreign:
        raise UserError(f"{prefix} holds variables that are not GPT-2's: {', '.join(foreign[:3])}"
                        + (f" and {len(foreign) - 3} more" if foreign[3:] else ""))
    missing = sorted(expected - found)
    if missing:
        raise UserError(f"{prefix} lacks {', '.join(missing[:3])}"
                        + (f" and {len(missing) - 3} more" if missing[3:] else "")
                        + "; check that hparams.json is from the same model")


@torch.no_grad()
def read_model(folder: Path, dropout: float = 0.0, device: str | torch.device = "cpu",
               dtype: torch.dtype = torch.float32) -> GPT:
    """Returns the checkpoint as a GPT on `device`, its matrices in `dtype`.

    Raises UserError if a file is missing or damaged, a variable does not fit the model, or
    TensorFlow is not installed.
    """
    prefix, config = find_prefix(folder), replace(read_config(folder), dropout=dropout)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides notices about instruction sets
    try:
        import tensorflow as tf
    except ImportError:
        raise UserError(f"{folder} is a TensorFlow checkpoint; to read it, run: "
                        "pip install -r requirements-tf.txt") from None
    model = GPT.empty(config, device, dtype)
    params = {tf_name(name): param for name, param in model.named_parameters()}
    try:
        reader = tf.train.load_checkpoint(str(prefix))
        check_names(set(reader.get_variable_to_shape_map()), params.keys(), prefix)
        for name, param in params.items():
            tensor = torch.from_numpy(reader.get_tensor(name))
            check_weight(tensor, name, prefix)
            if name.endswith("/w"):  # (1, in, out); a Linear has (out, in)
                tensor = tensor.squeeze(0).t()
            if tensor.shape != param.shape:
                raise UserError(f"{prefix}: {name} has shape {tuple(tensor.shape)}, but "
                                f"hparams.json implies {tuple(param.shape)}")
            param.copy_(tensor)
    except (tf.errors.OpError, RuntimeError, IndexError, TypeError) as e:
        # TensorFlow's errors for a damaged file; TypeError: values that are not numbers
        raise UserError(f"{prefix} is damaged ({str(e).splitlines()[0][:200]}); copy it again"
                        ) from None
    return model
