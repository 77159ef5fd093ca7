"""An OpenAI or gpt-2-simple TensorFlow checkpoint as a Hugging Face folder.

    python import_tf.py --tf_dir=checkpoint/run1 --out_dir=run1-hf
    python train.py config/finetune_shakespeare.py --init_from=run1-hf

tf_dir holds what those programs write: checkpoint, model-N.index, model-N.data-*, hparams.json;
and encoder.json with vocab.bpe, from which the tokenizer's files are made. TensorFlow is wanted by
this script alone: pip install -r requirements-tf.txt
"""
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import torch

from checkpoint import write_folder
from configurator import configure
from distributed import run
from hf_folder import write_hf
from model import GPT, GPTConfig
from tokenizer import from_vocab_and_merges

WRITTEN = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
           "tokenizer_config.json")
HPARAMS = {"n_vocab": "vocab_size", "n_ctx": "block_size", "n_embd": "n_embd", "n_head": "n_head",
           "n_layer": "n_layer"}
# what training leaves beside the weights: an optimizer's slots, its powers, counters
SLOT = re.compile(r"(.*)/(Adam|Adam_1|AdamW|AdamW_1|Momentum|Adagrad|RMSProp|RMSProp_1)")
COUNTER = re.compile(r"(.*/)?(beta[12]_power|global_step)(_\d+)?")


@dataclass
class Config:
    tf_dir: str = "checkpoint/run1"  # the folder with the TensorFlow checkpoint
    out_dir: str = "run1-hf"     # the Hugging Face folder to write
    overwrite: bool = False      # replace an earlier import there


def read_config(folder):
    """The GPTConfig that hparams.json describes."""
    path = folder / "hparams.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; it came with the pretrained model: copy it from "
                         "that model's folder")
    try:
        hparams = json.loads(path.read_text(encoding="utf-8"))
        return GPTConfig(**{ours: int(hparams[theirs]) for theirs, ours in HPARAMS.items()})
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{path} does not give {', '.join(HPARAMS)} ({e}); copy it anew") from None


def find_prefix(folder):
    """The checkpoint's path without its endings: the one that the file `checkpoint` names (it may
    have moved since), or the only one. Raises ValueError where a file of it is missing."""
    if not folder.is_dir():
        raise ValueError(f"--tf_dir={folder} is no folder")
    indexes = [p.with_suffix("") for p in sorted(folder.glob("*.index"))]
    if (folder / "checkpoint").is_file():
        text = (folder / "checkpoint").read_text(encoding="utf-8")
        named = re.search(r'^model_checkpoint_path: "(.*)"', text, re.MULTILINE)
        if named:  # a path on the machine that trained, with either kind of slash
            indexes = [folder / PureWindowsPath(named[1]).name]
    if len(indexes) != 1:
        raise ValueError(f"{folder} has no file `checkpoint` that names a checkpoint, and "
                         f"{len(indexes)} .index files; give the folder of one run")
    prefix = indexes[0]
    shards = sorted(p.name for p in folder.glob(f"{prefix.name}.data-*-of-*"))
    total = int(shards[0].rpartition("-of-")[2]) if shards else 1
    wanted = [f"{prefix.name}.data-{i:05}-of-{total:05}" for i in range(total)]
    missing = [name for name in [f"{prefix.name}.index", *wanted]
               if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; copy the whole folder anew")
    return prefix


def tf_names(config):
    """{TensorFlow's name: our parameter's}, in the order of the model."""
    names = {"model/wte": "transformer.wte.weight", "model/wpe": "transformer.wpe.weight"}
    norms = [("ln_f", "ln_f")]
    for layer in range(config.n_layer):
        theirs, ours = f"h{layer}", f"h.{layer}"
        norms += [(f"{theirs}/ln_{i}", f"{ours}.ln_{i}") for i in (1, 2)]
        for module in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj"):
            for tf, kind in (("w", "weight"), ("b", "bias")):
                names[f"model/{theirs}/{module}/{tf}"] = (
                    f"transformer.{ours}.{module.replace('/', '.')}.{kind}")
    for theirs, ours in norms:
        names |= {f"model/{theirs}/g": f"transformer.{ours}.weight",
                  f"model/{theirs}/b": f"transformer.{ours}.bias"}
    return names


def check_names(found, wanted, prefix):
    """Raises ValueError for a variable that is missing, or that is neither the model's nor an
    optimizer's."""
    foreign = sorted(name for name in found - wanted if not COUNTER.fullmatch(name)
                     and not ((slot := SLOT.fullmatch(name)) and slot[1] in wanted))
    if foreign:
        raise ValueError(f"{prefix} holds variables that are not GPT-2's: {', '.join(foreign[:3])}"
                         + (f" and {len(foreign) - 3} more" if foreign[3:] else ""))
    missing = sorted(wanted - found)
    if missing:
        raise ValueError(f"{prefix} lacks {', '.join(missing[:3])}"
                         + (f" and {len(missing) - 3} more" if missing[3:] else "")
                         + "; is hparams.json that of this model?")


@torch.no_grad()
def read_model(prefix, config):
    """The GPT with each variable of the checkpoint in its place."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no notices about instruction sets
    try:
        import tensorflow as tf
    except ImportError:
        raise ValueError("reading a TensorFlow checkpoint needs TensorFlow: "
                         "pip install -r requirements-tf.txt") from None
    names, model = tf_names(config), GPT.empty(config)
    params = dict(model.named_parameters())
    try:
        reader = tf.train.load_checkpoint(str(prefix))
        check_names(set(reader.get_variable_to_shape_map()), set(names), prefix)
        for theirs, ours in names.items():
            tensor = torch.from_numpy(reader.get_tensor(theirs)).float()
            if theirs.endswith("/w"):  # (1, in, out), where a Linear holds (out, in)
                tensor = tensor.squeeze(0).t()
            if tensor.shape != params[ours].shape:
                raise ValueError(f"{prefix}: {theirs} is {tuple(tensor.shape)} where hparams.json "
                                 f"means {tuple(params[ours].shape)}")
            params[ours].copy_(tensor)
    except (tf.errors.OpError, RuntimeError, IndexError) as e:  # the reader's, for a torn file
        raise ValueError(f"{prefix} is damaged ({str(e).splitlines()[0][:200]}); copy it anew"
                         ) from None
    return model


def read_tokenizer(folder, vocab_size):
    """The tokenizer of encoder.json and vocab.bpe, or None where they are not there."""
    vocab, merges = folder / "encoder.json", folder / "vocab.bpe"
    if not (vocab.is_file() and merges.is_file()):
        print(f"{folder} holds no encoder.json with vocab.bpe: no tokenizer files are written")
        return None
    tokenizer = from_vocab_and_merges(vocab, merges)
    if tokenizer.n_vocab > vocab_size:
        raise ValueError(f"{vocab} has {tokenizer.n_vocab} tokens, hparams.json {vocab_size}; they "
                         "are of two models")
    return tokenizer


def main(argv):
    cfg = configure(Config, argv)
    folder = Path(cfg.tf_dir)
    prefix = find_prefix(folder)
    config = read_config(folder)

    def write(target):
        model = read_model(prefix, config)
        write_hf(target, model, read_tokenizer(folder, config.vocab_size), torch.float32)
        print(f"wrote {cfg.out_dir}: {model.num_params() / 1e6:.2f}M parameters of {prefix.name}")

    write_folder(cfg.out_dir, write, WRITTEN, cfg.overwrite)


if __name__ == "__main__":
    run(main)
