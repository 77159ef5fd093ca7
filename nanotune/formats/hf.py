"""Reads Hugging Face's weight files; writes a folder of weights, config and tokenizer.

    fill_parameters(params, fields, weight_files)           # params: {our name: tensor}
    write_hf(folder, fields, params, tokenizer, dtype)      # then reads back and compares

`fields` are those of GPTConfig or T5Config; hf_config.py reads and writes config.json. Supported
and tested: OpenAI's gpt2 repositories, whose keys lack the `transformer.` prefix and whose masks
are stored as buffers; finetuned models, which have the prefix and may have an untied head; T5,
whose embedding may be stored three times; weights in any dtype, in one file or in shards, as
safetensors or as pytorch_model.bin.
"""
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from nanotune.errors import UserError
from nanotune.formats.checks import check_weight
from nanotune.formats.hf_config import (
    check_hf_takes,
    config_from_hf,
    config_to_hf,
    keys_of,
    layout_of,
)
from nanotune.formats.hub import read_json
from nanotune.text.chat import KEY
from nanotune.text.tokenizer import AnyTokenizer, tokenizer_of_folder
from nanotune.text.tokenizer_files import SPECIAL, merges_as_strings, with_end_appended

# masks stored as weights; an unused table of old T5 files
BUFFERS = re.compile(r"\.attn\.(attention\.)?(bias|masked_bias)$"
                     r"|\.EncDecAttention\.relative_attention_bias\.weight$")

EMBEDDINGS = ("wte.weight", "shared.weight", "embed_tokens.weight")


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
        state = dict(torch.load(file, map_location="cpu", weights_only=True,
                                mmap=zipfile.is_zipfile(file)))
    except pickle.UnpicklingError:
        raise UserError(f"{file} carries code or objects other than weights, or is damaged; "
                        "nothing in it was run; use another copy, such as model.safetensors"
                        ) from None
    except Exception as e:  # torch.load raises many types for a damaged file
        raise UserError(f"{file} is damaged ({type(e).__name__}); fetch it again") from None
    if not all(isinstance(key, str) for key in state):
        raise UserError(f"{file} is damaged (its keys are not strings); fetch it again")
    return state


def read_tensors(file: str, only: tuple[str, ...] = ("",)) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (key, tensor) of one weight file, for weights whose key ends with one of `only`.

    A safetensors file is opened again for each tensor; otherwise all its mapped pages would stay in
    memory in addition to the model. Raises UserError if the file is damaged, carries code, or holds
    something other than finite floating-point weights.
    """
    def selected(keys):
        return [key for key in keys if key.endswith(only) and not BUFFERS.search(key)]

    if file.endswith(".safetensors"):
        with open_safetensors(file) as f:
            keys = selected(f.keys())

        def read(key):
            with open_safetensors(file) as f:
                return f.get_tensor(key)
    else:
        state = load_torch_bin(file)
        keys, read = selected(state), state.get
    for key in keys:
        tensor = read(key)
        check_weight(tensor, key, file)
        yield key, tensor


def head_is_tied(weight_files: list[str], tied: bool) -> bool:
    """Returns whether the head is the token embedding; `tied` is config.json's value.

    If the files hold a head that differs from the embedding, the answer is False: some finetuned
    models have one although their config says tied. Raises UserError if a file is damaged.
    """
    found = {}
    for file in weight_files:
        for key, tensor in read_tensors(file, only=("lm_head.weight", *EMBEDDINGS)):
            found[key.endswith("lm_head.weight")] = tensor
    return tied and (len(found) < 2 or torch.equal(found[False], found[True]))


@torch.no_grad()
def fill_parameters(params: dict[str, torch.Tensor], fields: dict,
                    weight_files: list[str]) -> None:
    """Copies the tensors of the files into `params`, {name: parameter} of a model with these config
    `fields`.

    Raises UserError if a file is damaged, a shape differs, a tensor is neither a parameter nor a
    known buffer, a weight is not finite, or a parameter is missing or stored twice.
    """
    layout, places = layout_of(fields), {}
    for name in params:
        keys, transposed = keys_of(name, layout)
        places |= {key: (name, part, len(keys), transposed) for part, key in enumerate(keys)}
    for file in weight_files:
        for key, tensor in read_tensors(file):
            if key == "lm_head.weight" and fields["tied_head"]:
                continue
            full = key if key == "lm_head.weight" else (
                layout.prefix + key.removeprefix(layout.prefix))
            if full in layout.copies:
                full = layout.copies[0]
                if full not in places:
                    check_copy(params[full], tensor, key, file)
                    continue
            if full not in places:
                raise UserError(f"{file}: the tensor {key} is not part of the model, or is stored "
                                "twice")
            name, part, parts, transposed = places.pop(full)
            target = params[name].chunk(parts)[part]
            expected = target.shape[::-1] if transposed else target.shape
            if tensor.shape != expected:
                raise UserError(f"{file}: {key} has shape {tuple(tensor.shape)}, but config.json "
                                f"implies {tuple(expected)}")
            target.copy_(tensor.t() if transposed else tensor)
    if places:
        names = sorted({name for name, *_ in places.values()})
        raise UserError(f"{', '.join(weight_files)}: no tensor for {', '.join(names[:3])}"
                        + (f" and {len(names) - 3} more" if names[3:] else "")
                        + "; use a complete copy of the model")


def check_copy(embedding, tensor, key, file):
    """Raises UserError unless another copy of the embedding equals the first."""
    if not torch.equal(embedding, tensor.to(embedding.dtype)):
        raise UserError(f"{file}: {key} must equal the shared embedding, but differs; use another "
                        "copy of the file")


# -----------------------------------------------------------------------------
# writing

def write_hf(folder: Path, fields: dict, params: dict[str, torch.Tensor],
             tokenizer: AnyTokenizer | None, dtype: torch.dtype) -> None:
    """Writes a model (config fields and {name: parameter}) in `dtype` and its tokenizer into a
    folder, then reads them back.

    Raises UserError if transformers cannot express the model, a weight is not finite in `dtype`,
    or the files differ when read back; OSError if the disk is full.
    """
    check_hf_takes(fields)
    layout = layout_of(fields)
    params = with_biases(params, layout) if layout.biases else with_head(params, fields)
    write_model(folder, fields, params, dtype, tokenizer)
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer, fields.get("block_size") or fields["source_length"],
                        layout.ends_prompts)
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
    read = tokenizer and tokenizer_of_folder(folder)
    if read and (read.identity, read.chat) != (tokenizer.identity, tokenizer.chat):
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


def with_head(params, fields):
    """A T5's parameters. If the head is tied and its input is not scaled, adds the head as a second
    tensor: transformers before 5 scales the input of every tied head."""
    tied = fields["tied_head"] and not fields["scale_head"]
    return params | ({"lm_head.weight": params["shared.weight"].clone()} if tied else {})


def tensors_to_hf(fields: dict, params: dict[str, torch.Tensor],
                  dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns {key: tensor in `dtype`} as transformers stores these parameters, without a tied
    head."""
    layout, tensors = layout_of(fields), {}
    for name, param in params.items():
        keys, transposed = keys_of(name, layout)
        for key, part in zip(keys, param.detach().to(dtype).chunk(len(keys))):
            tensors[key] = (part.t() if transposed else part).contiguous()
    return tensors


def write_model(folder: Path, fields: dict, params: dict[str, torch.Tensor], dtype: torch.dtype,
                tokenizer: AnyTokenizer | None = None) -> None:
    """Writes model.safetensors, config.json and generation_config.json. The latter two contain the
    ids of the tokenizer's special tokens. Raises UserError if a weight is not finite in `dtype`,
    OSError if the disk is full."""
    tensors = tensors_to_hf(fields, params, dtype)
    bad = next((key for key, t in tensors.items() if not bool(t.isfinite().all())), None)
    if bad is not None:
        raise UserError(f"{bad} has values that are not finite in {dtype}; use bfloat16 or "
                        "float32, and check the model's loss")
    ends = {f"{key}_id": tokenizer and tokenizer.special_ids.get(key, tokenizer.eot)
            for key in ("bos_token", "eos_token", "pad_token")}
    config = ends | config_to_hf(fields) | {"dtype": str(dtype).removeprefix("torch.")}
    generation = {key: config[key] for key in (*ends, "decoder_start_token_id") if key in config}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        Path(folder, name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_tensors(tensors, Path(folder, "model.safetensors"), like=Path(folder, "config.json"))


def save_tensors(tensors: dict[str, torch.Tensor], file: Path, like: Path) -> None:
    """Writes a safetensors file with the permissions of the file `like`: the library makes it
    readable only by its owner. Raises OSError if the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as e:  # also raised for errors of the file system
        raise OSError(str(e)) from e
    shutil.copymode(like, file)


def write_tokenizer(folder: Path, tokenizer: AnyTokenizer, max_length: int,
                    ends_prompts: bool = False) -> None:
    """Writes tokenizer.json and tokenizer_config.json; `max_length` is the model's context in
    tokens. With `ends_prompts`, tokenizer.json makes other programs append the end token."""
    text = merges_as_strings(tokenizer.to_json())
    if ends_prompts:
        text = with_end_appended(text, tokenizer.special["eos_token"], tokenizer.eot)
    Path(folder, "tokenizer.json").write_text(text, encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length,
              "clean_up_tokenization_spaces": False} | special_names(tokenizer)
    if tokenizer.chat is not None:
        config |= {KEY: tokenizer.chat.spec(), "chat_template": tokenizer.chat.jinja()}
    if "pad_token" in config:  # new tokens must directly follow each prompt of a batch
        config["padding_side"] = "left"
    Path(folder, "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n",
                                                     encoding="utf-8")


def special_names(tokenizer: AnyTokenizer) -> dict[str, str]:
    """Returns {"eos_token": text, ...}. Other programs need all special tokens, so those that the
    tokenizer lacks are set to end-of-text."""
    end = tokenizer.special.get("eos_token")
    return (dict.fromkeys(SPECIAL, end) if end else {}) | tokenizer.special
