"""Exports a model for other programs: as a Hugging Face folder, as ONNX in float32, int8 or int4,
or as PEFT adapters of a LoRA run.

    python export.py --out_dir=out-shakespeare --format=hf --export_dir=shakespeare-hf
    python export.py --init_from=gpt2 --format=onnx --quantize=int8 --export_dir=gpt2-int8
    python export.py --out_dir=out-lora --format=peft --export_dir=lora-peft

Files are read back and compared with the model before the folder gets its final name.
"""
import importlib.util
import math
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import nanotune.threads  # noqa: F401

import torch

from configurator import configure
from nanotune.cli import run
from nanotune.device import DTYPES
from nanotune.errors import UserError
from nanotune.files import check_replaceable, write_folder
from nanotune.formats.checkpoint import (
    check_dtype,
    history_of,
    load_model,
    pick_source,
    read_adapters,
)
from nanotune.formats.hf import write_hf, write_tokenizer
from nanotune.formats.onnx_model import open_onnx
from nanotune.formats.peft import name_of_base, needs_export, write_peft
from nanotune.text.loader import IGNORED
from nanotune.text.tokenizer import GPT2_VOCAB_SIZES
from nanotune.training.logbook import kept_entries
from nanotune.training.plan import format_bytes

# files that an export writes; a folder with any other file is never replaced
WRITTEN = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
           "tokenizer_config.json", "README.md", "model*.onnx", "model*.onnx.data",
           "encoder*.onnx", "decoder*.onnx", "adapter_model.safetensors", "adapter_config.json")


@dataclass
class Config:
    # model
    out_dir: str = "out"              # export ckpt.pt of this run
    init_from: str = "resume"         # resume: out_dir; else a hub id, a Hugging Face folder, a run
    # output
    format: Literal["hf", "onnx", "peft"] = "hf"  # peft: adapters of a LoRA run
    export_dir: str = "export"        # the folder to write
    overwrite: bool = False           # replace an earlier export in export_dir
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of --format=hf
    quantize: Literal["none", "int8", "int4"] = "none"  # of --format=onnx


def check_config(cfg):
    if cfg.format != "onnx" and cfg.quantize != "none":
        raise UserError(f"--quantize={cfg.quantize} needs --format=onnx; to make a Hugging "
                        "Face folder smaller, use --dtype=float16 or bfloat16")
    if cfg.format != "hf" and cfg.dtype != "float32":
        raise UserError(f"--dtype={cfg.dtype} needs --format=hf; to make an ONNX file smaller, "
                        "use --quantize=int8 or int4")
    if cfg.format == "onnx":
        for package in ("onnx", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                raise UserError(f"--format=onnx needs the {package} package: "
                                "pip install -r requirements-export.txt")


def cut_padding(model, tokenizer):
    """Drops the rows with which train.py pads GPT-2's vocabulary: other programs may sample their
    ids. Keeps other rows without a token, which may belong to added tokens. Prints the result."""
    tokens, rows = tokenizer.n_vocab, model.config.vocab_size
    if (tokens, rows) == GPT2_VOCAB_SIZES:
        model.crop_vocab(tokens)
        print(f"cut the vocabulary from {rows} rows to the tokenizer's {tokens}: the rest is "
              "padding")
    elif rows > tokens:
        print(f"kept the {rows - tokens} rows of the vocabulary that have no token: the "
              f"tokenizer has {tokens}, the model {rows}; other programs may sample their ids")


# -----------------------------------------------------------------------------
# ONNX

def write_onnx_folder(folder, model, tokenizer, quantize):
    """Writes the graph (two for a T5) and tokenizer.json, for programs without nanotune. Checks
    the graphs. Returns the extension of their names, such as "int8.onnx"."""
    from nanotune.formats import onnx_gpt, onnx_t5
    kind = "onnx" if quantize == "none" else f"{quantize}.onnx"
    spec, c = tokenizer and tokenizer.spec, model.config
    if c.takes_pairs:
        path = onnx_t5.write_onnx(model, folder, quantize, spec)
    else:
        path = folder / f"model.{kind}"
        onnx_gpt.write_onnx(model, path, quantize, spec)
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer, c.source_length if c.takes_pairs else c.block_size,
                        ends_prompts=c.takes_pairs)
    check_onnx(str(path), model, quantize)
    return kind


@torch.no_grad()
def check_onnx(path, model, quantize):
    """Prints the largest difference between onnxruntime's and PyTorch's logits, with and without a
    past. Raises UserError if it is too large; for a quantized model, if it is not finite."""
    read, _ = open_onnx(path)
    prompts, new, x, y = check_inputs(model.config)
    expected, whole = (torch.cat(list(m.logits_at(x, y))) for m in (model, read))
    cache, last = read.start(prompts, new.size(1) + 1)
    if new.size(1):
        last = read.step(new, cache)
    difference = max(float((whole - expected).abs().max()),
                     float((last - expected.view(2, -1, expected.size(1))[:, -1]).abs().max()))
    largest = float(expected.abs().max())
    print(f"logits differ from PyTorch's by at most {difference:.2g}; the largest logit is "
          f"{largest:.1f}")
    if not difference < (max(1e-3, 1e-5 * largest) if quantize == "none" else math.inf):
        raise UserError(f"{Path(path).name} does not compute the model's logits; try another "
                        "onnxruntime: pip install -U onnxruntime")


def check_inputs(config):
    """Returns (prompts, the tokens that follow them, inputs, targets): two rows of random ids. A
    T5's sources differ in length."""
    length = int(min(32, config.block_size))
    generator = torch.Generator().manual_seed(1337)
    ids = torch.randint(config.vocab_size, (2, length + 1), generator=generator)
    x, y = ids[:, :-1].clone(), ids[:, 1:]
    if not config.takes_pairs:
        return x[:, :max(1, length // 2)].tolist(), x[:, max(1, length // 2):], x, y
    x[:, -1] = config.end_id
    x[1, length // 2:] = torch.tensor([config.end_id, *[IGNORED] * (length - length // 2 - 1)])
    return [row[row != IGNORED].tolist() for row in x], y[:, :-1], x, y


# -----------------------------------------------------------------------------
# PEFT

def write_adapters(folder, model, source, tokenizer):
    """Writes the adapters of a LoRA run; returns the name of their base model in transformers.
    Prints the command that exports the base model, if transformers cannot load it."""
    spec, adapters = read_adapters(source)
    write_peft(folder, asdict(model.config), adapters, spec, tokenizer)
    base, name = spec["base"], name_of_base(spec["base"])
    if needs_export(base):
        print("transformers also needs the base model of these adapters: python export.py "
              f"--init_from={base} --format=hf --export_dir={name}")
    return name


# -----------------------------------------------------------------------------
# the model card

SETTINGS = ("init_from", "dataset", "max_iters", "batch_size", "gradient_accumulation_steps",
            "block_size", "source_length", "target_length", "learning_rate", "weight_decay",
            "dropout", "seed")


def card(cfg, source, model, facts, use):
    """The text of README.md: the model, its training, its losses, how to use the files."""
    config, pairs = model.config, model.config.takes_pairs
    layers = f"{config.n_layer} + {config.n_decoder_layer}" if pairs else config.n_layer
    context = "" if pairs else f"a context of {config.block_size} tokens and "
    task = "text2text-generation" if pairs else "text-generation"
    library = {"hf": "transformers", "peft": "peft", "onnx": None}[cfg.format]
    lines = ["---", *([f"library_name: {library}"] if library else []),
             f"pipeline_tag: {task}", "---", "", f"# {Path(source).name}", "",
             f"{'LoRA adapters for a' if cfg.format == 'peft' else 'A'} {model.family} model of "
             f"{model.num_params() / 1e6:.2f}M parameters ({layers} layers, {config.n_head} heads, "
             f"{config.n_embd} wide), {context}a vocabulary of {config.vocab_size}.", ""]
    return "\n".join(lines + training_lines(source, facts) + ["", "## Use", "", use])


def training_lines(source, facts):
    """The card's lines about training; for a pretrained model, only its name."""
    if not facts:
        return [f"Exported by nanotune from `{Path(source).name}`, unchanged."]
    config = facts["config"] or {}
    adapted = ["lora_rank"] if config.get("lora_rank") else []
    settings = [f"- {name}: {public_name(config[name])}" for name in [*SETTINGS, *adapted]
                if name in config and config[name] not in ("resume", None)]
    best = facts["best_val_loss"]
    lines = ["## Training", "", f"Trained by nanotune for {facts['iter_num']} iterations.", "",
             *settings, f"- best validation loss: {float(best):.4f} nats per token"]
    evaluations = [e for e in kept_entries(Path(source, "metrics.jsonl"), facts["iter_num"])
                   if "step" in e]
    if evaluations:
        lines += ["", "| step | train loss | validation loss |", "| --- | --- | --- |"]
        lines += [f"| {e['step']} | {e['train_loss']:.4f} | {e['val_loss']:.4f} |"
                  for e in evaluations]
    return lines


def public_name(value):
    """A value of the config, without the folders of an absolute path, which are private."""
    local = isinstance(value, str) and Path(value).is_absolute()
    return Path(value).name if local else value


HF_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
ids = tokenizer("To be", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))
```
"""


HF_USE_CHAT = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
messages = [{{"role": "user", "content": "Hello"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True,
                                       return_tensors="pt")
new = model.generate(**inputs, max_new_tokens=50, stop_strings=[{end!r}], tokenizer=tokenizer)
print(tokenizer.decode(new[0, inputs.input_ids.shape[1]:]))
```
"""


HF_USE_PAIRS = """```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForSeq2SeqLM.from_pretrained("{name}")
ids = tokenizer("Good day.", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0], skip_special_tokens=True))
```
"""


PEFT_USE = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{name}")
ids = tokenizer("To be", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=50)[0]))
```
"""


ONNX_USE = """```
python sample.py --init_from={name}/model.{kind} --start="To be"
```

Elsewhere, without torch or nanotune (`pip install onnxruntime tokenizers`):

```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("{name}/tokenizer.json")
options = onnxruntime.SessionOptions()
options.log_severity_level = 3  # errors only
session = onnxruntime.InferenceSession("{name}/model.{kind}", options)
inputs = session.get_inputs()  # input_ids, past_key_values.0.key, past_key_values.0.value, ...
past = [np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in inputs[1:]]
ids = new = tokenizer.encode("To be").ids
for _ in range(20):
    feeds = dict(zip([i.name for i in inputs], [np.array([new]), *past]))
    logits, *past = session.run(None, feeds)
    new = [int(logits[0, -1].argmax())]
    ids = ids + new
print(tokenizer.decode(ids))
```
"""


ONNX_USE_PAIRS = """```
python sample.py --init_from={name} --start="Good day." --temperature=0
```

Elsewhere, without torch or nanotune (`pip install onnxruntime tokenizers`):

```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("{name}/tokenizer.json")
options = onnxruntime.SessionOptions()
options.log_severity_level = 3  # errors only
encoder = onnxruntime.InferenceSession("{name}/encoder.{kind}", options)
decoder = onnxruntime.InferenceSession("{name}/decoder.{kind}", options)
source = np.array([tokenizer.encode("Good day.").ids])  # with its end token
feeds = {{"attention_mask": np.ones_like(source)}}
found = encoder.run(None, {{"input_ids": source, **feeds}})
feeds |= dict(zip([o.name for o in encoder.get_outputs()], found))
past = [i for i in decoder.get_inputs() if i.name.startswith("past_key_values")]
feeds |= {{i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in past}}
ids, new = [], {start}
while new != {end} and len(ids) < 50:
    logits, *found = decoder.run(None, {{"input_ids": np.array([[new]]), **feeds}})
    feeds |= dict(zip([i.name for i in past], found))
    new = int(logits[0, -1].argmax())
    ids.append(new)
print(tokenizer.decode(ids))
```
"""


def main(argv: list[str]) -> None:
    cfg = configure(Config, argv)
    check_config(cfg)
    check_replaceable(Path(cfg.export_dir), WRITTEN, cfg.overwrite)
    source = pick_source(cfg.out_dir, cfg.init_from)
    model, tokenizer = load_model(source)
    pairs = model.config.takes_pairs
    if pairs and cfg.format == "peft":
        raise UserError("--format=peft does not support T5; use --format=hf, which merges adapters")
    check_dtype(model, DTYPES[cfg.dtype])
    model.eval()
    if tokenizer is not None and cfg.format != "peft":  # adapters have no vocabulary
        cut_padding(model, tokenizer)

    name, history = Path(cfg.export_dir).name, history_of(source)

    def write(folder):
        if cfg.format == "hf":
            write_hf(folder, asdict(model.config), dict(model.named_parameters()), tokenizer,
                     DTYPES[cfg.dtype])
            use = (HF_USE_PAIRS if pairs else HF_USE).format(name=name)
            if tokenizer is not None and tokenizer.chat is not None:
                use = HF_USE_CHAT.format(name=name, end=tokenizer.chat.end)
        elif cfg.format == "peft":
            use = PEFT_USE.format(name=name, base=write_adapters(folder, model, source, tokenizer))
        else:
            kind = write_onnx_folder(folder, model, tokenizer, cfg.quantize)
            use = ONNX_USE.format(name=name, kind=kind) if not pairs else (
                ONNX_USE_PAIRS.format(name=name, kind=kind, start=model.config.start_id,
                                      end=model.config.end_id))
        text = card(cfg, source, model, history, use)
        Path(folder, "README.md").write_text(text, encoding="utf-8")

    write_folder(cfg.export_dir, write, WRITTEN, cfg.overwrite)
    size = sum(file.stat().st_size for file in Path(cfg.export_dir).glob("*model*"))
    print(f"wrote {cfg.export_dir} (weights {format_bytes(size)})")
    dataset = (history.get("config") or {}).get("dataset")
    if cfg.format == "onnx" and dataset:
        argv = ["python", "evaluate.py", f"--init_from={cfg.export_dir}", f"--dataset={dataset}"]
        print(f"check its loss: {shlex.join(argv)}")


if __name__ == "__main__":
    run(main)
