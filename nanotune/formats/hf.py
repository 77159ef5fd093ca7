"""Reads and writes Hugging Face's format: config.json, weight files, tokenizer files.

    fields = config_from_hf(read_json(config_file), name)   # the fields of model.GPTConfig
    fill_parameters(params, fields, weight_files)           # params: {our name: tensor}
    write_hf(folder, fields, params, tokenizer, dtype)      # then reads back and compares

One Layout per model_type serves both directions. It reads, and tests cover: OpenAI's gpt2
repositories, whose keys lack the `transformer.` prefix and whose masks are stored as buffers;
finetuned models, which have the prefix and may have an untied head; weights in any dtype, in one
file or in shards, as safetensors or as pytorch_model.bin.
"""
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from nanotune.errors import UserError
from nanotune.formats.hub import read_json
from nanotune.text.tokenizer import AnyTokenizer, tokenizer_of_folder
from nanotune.text.tokenizer_files import SPECIAL, merges_as_strings

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# options that change the numerics: {key: the only value that GPT supports}
REFUSED = {"scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
           "add_cross_attention": False}
BUFFERS = re.compile(r"\.attn\.(attention\.)?(bias|masked_bias)$")  # masks stored as weights


# -----------------------------------------------------------------------------
# one Layout per model_type

@dataclass(frozen=True)
class Layout:
    """The names of GPT's config fields and modules in one model_type."""
    architecture: str
    fields: dict[str, str]             # {our field: key in config.json}
    defaults: dict[str, object]        # {key: value if config.json lacks it}
    modules: dict[str, tuple[str, ...]]  # {our module: theirs, stacked by rows if several}
    transposed: tuple[str, ...]        # modules whose weights are stored as (in, out)


LAYOUTS = {
    "gpt2": Layout(
        "GPT2LMHeadModel",
        fields={"block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer",
                "n_head": "n_head", "n_embd": "n_embd", "n_inner": "n_inner",
                "norm_eps": "layer_norm_epsilon"},
        defaults={"n_inner": None, "layer_norm_epsilon": 1e-5},
        modules={},
        transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),  # Conv1D
    "gpt_neo": Layout(
        "GPTNeoForCausalLM",
        fields={"block_size": "max_position_embeddings", "vocab_size": "vocab_size",
                "n_layer": "num_layers", "n_head": "num_heads", "n_embd": "hidden_size",
                "n_inner": "intermediate_size", "norm_eps": "layer_norm_epsilon"},
        defaults={"intermediate_size": None, "layer_norm_epsilon": 1e-5},
        modules={"attn.c_attn": tuple(f"attn.attention.{part}_proj" for part in "qkv"),
                 "attn.c_proj": ("attn.attention.out_proj",)},
        transposed=()),
}


def model_type_of(fields: dict) -> str:
    """Returns the model_type that GPTConfig fields are written as."""
    return "gpt2" if fields["local_window"] is None else "gpt_neo"


def keys_of(name: str, layout: Layout) -> tuple[list[str], bool]:
    """Returns (the keys of the tensors that make up our parameter, stacked by rows; whether they
    are stored transposed)."""
    block = re.fullmatch(r"(transformer\.h\.\d+)\.(.+)\.(weight|bias)", name)
    if block is None:
        return [name], False
    path, module, kind = block.groups()
    theirs = layout.modules.get(module, (module,))
    return ([f"{path}.{their}.{kind}" for their in theirs],
            kind == "weight" and module in layout.transposed)


# -----------------------------------------------------------------------------
# config.json

def config_from_hf(hf: dict, name: str) -> dict:
    """Returns the GPTConfig fields of a config.json; `name` is the model's, for messages.

    Raises UserError if the model_type or an option is not supported, or a key is missing.
    """
    kind = hf.get("model_type")
    if kind not in LAYOUTS:
        raise UserError(f"{name} is a {kind!r} model; nanotune supports model_type "
                        f"{' and '.join(LAYOUTS)}")
    for key, ours in REFUSED.items():
        if hf.get(key, ours) != ours:
            raise UserError(f"{name}: its config.json has {key}={hf[key]}, but "
                            f"nanotune supports only {key}={ours}")
    activation = hf.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise UserError(f"{name}: its config.json has activation_function={activation}; nanotune "
                        f"has {', '.join(ACTIVATIONS)}")
    layout = LAYOUTS[kind]
    lacks = [key for key in layout.fields.values() if key not in layout.defaults | hf]
    if lacks:
        raise UserError(f"{name}: its config.json lacks {lacks[0]!r}")
    fields = {ours: (layout.defaults | hf)[key] for ours, key in layout.fields.items()}
    fields |= {"activation": ACTIVATIONS[activation],
               "tied_head": hf.get("tie_word_embeddings", True)}
    if kind == "gpt2":
        return fields | {"attn_scale": None if hf.get("scale_attn_weights", True) else 1.0}
    check_alternates(hf, fields["n_layer"], name)
    return fields | {"attn_scale": 1.0, "qkv_bias": False,
                     "local_window": hf.get("window_size", 256)}


def check_alternates(hf, n_layer, name):
    """Raises UserError unless GPT-Neo's layers alternate between global and local attention."""
    types = hf.get("attention_types", [[["global", "local"], 12]])
    layers = [kind for pattern, times in types for kind in pattern * times]
    if layers != (["global", "local"] * len(layers))[:n_layer]:
        raise UserError(f"{name}: its config.json has attention_types={types}, but "
                        "nanotune supports only global and local layers in turn")


def config_to_hf(fields: dict) -> dict:
    """Returns the config.json that transformers reads as these GPTConfig fields."""
    kind = model_type_of(fields)
    layout = LAYOUTS[kind]
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    hf = {key: fields[ours] for ours, key in layout.fields.items()} | {
        "activation_function": names[fields["activation"]],
        "tie_word_embeddings": fields["tied_head"],
        "model_type": kind, "architectures": [layout.architecture]}
    if kind == "gpt2":  # n_ctx is for llama.cpp's converter to GGUF
        return hf | {"scale_attn_weights": fields["attn_scale"] is None,
                     "n_ctx": fields["block_size"]}
    pattern = [[["global", "local"], fields["n_layer"] // 2]]
    if fields["n_layer"] % 2:
        pattern.append([["global"], 1])
    return hf | {"attention_types": pattern, "window_size": fields["local_window"]}


def check_hf_takes(fields: dict) -> None:
    """Raises UserError if no model_type of transformers can express these GPTConfig fields."""
    hf = config_to_hf(fields)
    back = {"qkv_bias": None} | config_from_hf(hf, "the model")
    fixed = ["attn_scale"] + (["qkv_bias"] if hf["model_type"] == "gpt_neo" else [])
    wrong = next((name for name in fixed if fields[name] != back[name]), None)
    if wrong:
        raise UserError(f"transformers' {hf['model_type']} has no {wrong}={fields[wrong]}; "
                        "use --format=onnx")


# -----------------------------------------------------------------------------
# reading weights

def open_safetensors(file):
    from safetensors import SafetensorError, safe_open
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as e:
        raise UserError(f"{file} is damaged ({e}); fetch it again") from None


def load_torch_bin(file):
    """The state dict of a pytorch_model.bin, memory-mapped; runs no code from the file.

    Files of torch before 1.6 are not zip archives and are read whole.
    """
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True,
                               mmap=zipfile.is_zipfile(file)))
    except pickle.UnpicklingError:
        raise UserError(f"{file} carries code or objects beside plain weights, or is damaged; "
                        "it was refused and not run") from None
    except Exception as e:  # torch.load raises many kinds for a damaged file
        raise UserError(f"{file} is damaged ({type(e).__name__}); fetch it again") from None


def read_tensors(file: str, only: tuple[str, ...] = ("",)) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (key, tensor) of one weight file, for keys that end with one of `only`.

    A safetensors file is opened again for each tensor, else all its mapped pages stay resident
    beside the model. Raises UserError if the file is damaged or carries code.
    """
    if not file.endswith(".safetensors"):
        yield from ((k, t) for k, t in load_torch_bin(file).items() if k.endswith(only))
        return
    with open_safetensors(file) as f:
        keys = [key for key in f.keys() if key.endswith(only)]  # noqa: SIM118 (not a dict)
    for key in keys:
        with open_safetensors(file) as f:
            yield key, f.get_tensor(key)


def head_is_tied(weight_files: list[str], tied: bool) -> bool:
    """Returns whether the head is the token embedding; `tied` is what config.json says.

    False also if the files hold a head that differs from the embedding: some finetuned models have
    one although their config says tied. Raises UserError if a file is damaged.
    """
    found = {}
    for file in weight_files:
        for key, tensor in read_tensors(file, only=("lm_head.weight", "wte.weight")):
            found[key.removeprefix("transformer.")] = tensor
    if len(found) < 2:
        return tied
    return tied and torch.equal(found["lm_head.weight"], found["wte.weight"])


@torch.no_grad()
def fill_parameters(params: dict[str, torch.Tensor], fields: dict,
                    weight_files: list[str]) -> None:
    """Copies the tensors of the files into `params`, {name: parameter} of a GPT with these
    GPTConfig `fields`.

    Raises UserError if a file is damaged, a shape differs, a tensor is neither a parameter nor a
    known buffer, or a parameter is missing or comes twice.
    """
    layout, places = LAYOUTS[model_type_of(fields)], {}
    for name in params:
        keys, transposed = keys_of(name, layout)
        places |= {key: (name, part, len(keys), transposed) for part, key in enumerate(keys)}
    for file in weight_files:
        for key, tensor in read_tensors(file):
            if BUFFERS.search(key) or (key == "lm_head.weight" and fields["tied_head"]):
                continue
            full = key if key == "lm_head.weight" else (
                "transformer." + key.removeprefix("transformer."))
            if full not in places:
                raise UserError(f"{file}: the tensor {key} has no place in the model, or came "
                                "twice")
            name, part, parts, transposed = places.pop(full)
            target = params[name].chunk(parts)[part]
            expected = target.shape[::-1] if transposed else target.shape
            if tensor.shape != expected:
                raise UserError(f"{file}: {key} is {tuple(tensor.shape)} where config.json "
                                f"means {tuple(expected)}")
            target.copy_(tensor.t() if transposed else tensor)
    if places:
        names = sorted({name for name, *_ in places.values()})
        raise UserError(f"{', '.join(weight_files)}: no tensor for {', '.join(names[:3])}"
                        + (f" and {len(names) - 3} more" if names[3:] else ""))


# -----------------------------------------------------------------------------
# writing

def write_hf(folder: Path, fields: dict, params: dict[str, torch.Tensor],
             tokenizer: AnyTokenizer | None, dtype: torch.dtype) -> None:
    """Writes a GPT (GPTConfig fields, {name: parameter}) and its tokenizer into a folder, as
    `dtype`, and reads them back.

    Raises UserError if transformers cannot express the model, a weight is not finite in `dtype`,
    or what is read back differs; OSError if the disk is full.
    """
    check_hf_takes(fields)
    params = with_biases(params, LAYOUTS[model_type_of(fields)])
    write_model(folder, fields, params, dtype, tokenizer)
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer, fields["block_size"])
    check_written(folder, params, tokenizer, dtype)


@torch.no_grad()
def check_written(folder, params, tokenizer, dtype):
    """Raises UserError unless the folder holds exactly these parameters and this tokenizer."""
    fields = {"local_window": None} | config_from_hf(read_json(folder / "config.json"), folder)
    read = {name: torch.empty_like(param, dtype=torch.float32) for name, param in params.items()}
    fill_parameters(read, fields, [str(folder / "model.safetensors")])
    for name, param in params.items():
        if not torch.equal(read[name], param.to(dtype).float()):
            raise UserError(f"{name} does not read back as it was written; check the disk")
    if tokenizer is not None and tokenizer_of_folder(folder).identity != tokenizer.identity:
        raise UserError("tokenizer.json does not read back as it was written; check the disk")


def with_biases(params, layout):
    """The parameters, with zeros for biases that transformers' modules need and GPT lacks."""
    whole = {}
    for name, param in params.items():
        whole[name] = param.detach()
        module, _, kind = name.rpartition(".")
        split = len(keys_of(name, layout)[0]) > 1
        if kind == "weight" and not split and not module.endswith(("wte", "wpe", "lm_head")):
            zeros = torch.zeros(len(param), dtype=param.dtype)
            whole[f"{module}.bias"] = params.get(f"{module}.bias", zeros).detach()
    return whole


def tensors_to_hf(fields: dict, params: dict[str, torch.Tensor],
                  dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns {key: tensor in `dtype`} as transformers stores these parameters, without a tied
    head."""
    layout, tensors = LAYOUTS[model_type_of(fields)], {}
    for name, param in params.items():
        keys, transposed = keys_of(name, layout)
        for key, part in zip(keys, param.detach().to(dtype).chunk(len(keys))):
            tensors[key] = (part.t() if transposed else part).contiguous()
    return tensors


def write_model(folder: Path, fields: dict, params: dict[str, torch.Tensor], dtype: torch.dtype,
                tokenizer: AnyTokenizer | None = None) -> None:
    """Writes model.safetensors, config.json and generation_config.json, which say the ids of the
    tokenizer's special tokens. Raises UserError if a weight is not finite in `dtype`, OSError if
    the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    tensors = tensors_to_hf(fields, params, dtype)
    worst = next((key for key, t in tensors.items() if not bool(t.isfinite().all())), None)
    if worst is not None:
        raise UserError(f"{worst} has values that are not finite in {dtype}; use bfloat16 or "
                        "float32, and check the model's loss")
    special = special_names(tokenizer) if tokenizer is not None else {}
    ends = {f"{key}_id": tokenizer.encode(special[key])[0] if key in special else None
            for key in ("bos_token", "eos_token", "pad_token")}
    config = config_to_hf(fields) | ends | {"dtype": str(dtype).removeprefix("torch.")}
    for name, content in (("config.json", config), ("generation_config.json", ends)):
        Path(folder, name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    file = Path(folder, "model.safetensors")
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as e:  # also raised for errors of the file system
        raise OSError(str(e)) from e
    shutil.copymode(Path(folder, "config.json"), file)  # save_file makes it private to the owner


def write_tokenizer(folder: Path, tokenizer: AnyTokenizer, max_length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json; `max_length` is the model's context in
    tokens."""
    text = merges_as_strings(tokenizer.to_json())
    Path(folder, "tokenizer.json").write_text(text, encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length,
              "clean_up_tokenization_spaces": False} | special_names(tokenizer)
    if "pad_token" in config:  # a batch of prompts is padded so that each goes on where it ends
        config["padding_side"] = "left"
    Path(folder, "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n",
                                                     encoding="utf-8")


def special_names(tokenizer: AnyTokenizer) -> dict[str, str]:
    """Returns {"eos_token": text, ...}. Other programs need all of them: those that the tokenizer
    does not have are end-of-text."""
    end = tokenizer.special.get("eos_token")
    return (dict.fromkeys(SPECIAL, end) if end else {}) | tokenizer.special
