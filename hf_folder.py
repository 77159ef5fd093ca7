"""A GPT and its tokenizer as the folder that transformers loads with no further word.

    write_hf(folder, model, tokenizer, torch.float16)

config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json: the
way back of pretrained.py. What was written is read back and compared, tensor by tensor.
"""
import json
import shutil
from itertools import pairwise
from pathlib import Path

import torch

import tokenizer as tokenizers
from model import GPT
from pretrained import CONV1D, config_from_hf, config_to_hf
from tokenizer import EOT


def write_hf(folder, model, tokenizer, dtype):
    """Writes the files of a GPT and of its tokenizer (None: there is none) into a folder. Raises
    ValueError where the model does not fit transformers or the dtype, or does not read back."""
    check_hf_takes(model.config)
    write_model(folder, model, dtype, tokenizer and tokenizer.eot)
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer, model.config.block_size)
    check_written(folder, model, tokenizer, dtype)


@torch.no_grad()
def check_written(folder, model, tokenizer, dtype):
    """Raises ValueError unless the folder holds this model, bit by bit, and this tokenizer."""
    read = dict(GPT.from_pretrained(str(folder)).named_parameters())
    for name, param in model.named_parameters():
        if not torch.equal(read.pop(name), param.to(dtype).float()):
            raise ValueError(f"{name} does not read back as it was written; check the disk")
    assert not any(bool(bias.any()) for bias in read.values()), "added biases are zero"
    if tokenizer is not None and tokenizers.of_folder(folder).identity != tokenizer.identity:
        raise ValueError("tokenizer.json does not read back as it was written; check the disk")


# -----------------------------------------------------------------------------
# the model

def check_hf_takes(config):
    """Raises ValueError for a GPTConfig that neither GPT-2 nor GPT-Neo of transformers can be."""
    neo = config.local_window is not None
    hf = config_to_hf(config)
    back = config_from_hf(hf, "the model")
    fixed = {"attn_scale"} | ({"qkv_bias"} if neo else set())
    wrong = [name for name in sorted(fixed) if getattr(config, name) != back.get(name)]
    if wrong:
        raise ValueError(f"transformers' {hf['model_type']} has no {wrong[0]}="
                         f"{getattr(config, wrong[0])}; --format=onnx takes it")


def tensors_to_hf(model, dtype):
    """{key: tensor} as transformers stores this GPT: a tied head once, as the embedding; biases
    that the model has not as zeros, since transformers' modules always have them."""
    config, tensors = model.config, {}
    neo = config.local_window is not None
    sizes = {"c_attn": 3 * config.n_embd, "c_fc": config.n_inner or 4 * config.n_embd}
    for name, tensor in model.named_parameters():  # a tied head comes once
        tensor = tensor.detach().to(dtype)
        if neo and ".c_attn." in name:
            for letter, part in zip("qkv", tensor.chunk(3)):
                key = name.replace("attn.c_attn", f"attn.attention.{letter}_proj")
                tensors[key] = part.contiguous()
            continue
        key = name.replace("attn.c_proj", "attn.attention.out_proj") if neo else name
        tensors[key] = (tensor.t() if not neo and CONV1D.search(name) else tensor).contiguous()
        module, _, part = key.rpartition(".")
        if part == "weight" and module.rpartition(".")[2] not in ("wte", "wpe", "lm_head"):
            size = sizes.get(module.rpartition(".")[2], config.n_embd)
            tensors.setdefault(f"{module}.bias", torch.zeros(size, dtype=dtype))
    return tensors


def write_model(folder, model, dtype, eot=None):
    """Writes model.safetensors, config.json and generation_config.json; eot is the end-of-text id.
    Raises ValueError for weights that the dtype does not hold, OSError where the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    tensors = tensors_to_hf(model, dtype)
    worst = next((key for key, t in tensors.items() if not bool(t.isfinite().all())), None)
    if worst is not None:
        raise ValueError(f"{worst} has values that are not finite in {dtype}; use bfloat16 or "
                         "float32, and look at the model's loss")
    ends = {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}
    config = config_to_hf(model.config) | ends | {"dtype": str(dtype).removeprefix("torch.")}
    for name, content in (("config.json", config), ("generation_config.json", ends)):
        Path(folder, name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    file = Path(folder, "model.safetensors")
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as e:  # what it raises for the operating system's errors too
        raise OSError(str(e)) from e
    shutil.copymode(Path(folder, "config.json"), file)  # save_file leaves it to the owner alone


# -----------------------------------------------------------------------------
# the tokenizer

def write_tokenizer(folder, tokenizer, max_length):
    """Writes tokenizer.json and tokenizer_config.json; max_length, in tokens, is the model's
    context."""
    to_json = {"gpt2": gpt2_json, "characters": characters_json, "json": lambda t: t.spec["json"]}
    text = to_json[tokenizer.spec["kind"]](tokenizer)
    Path(folder, "tokenizer.json").write_text(text, encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length,
              "clean_up_tokenization_spaces": False}
    if tokenizer.eot is not None:
        config |= {"bos_token": EOT, "eos_token": EOT, "unk_token": EOT}
    Path(folder, "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n",
                                                     encoding="utf-8")


def gpt2_json(tokenizer):
    """GPT-2's tokenizer.json out of tiktoken's ranks: a token's rank is its id, and the merge that
    makes a token is of the two parts that the merges before it leave of its bytes."""
    from tokenizers import AddedToken, ByteLevelBPETokenizer
    encoding, letters = tokenizer.load(), byte_letters()
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(tokenizer.eot)}
    spell = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = [tuple(spell[part] for part in parts_of(token, ranks))
              for token in ranks if len(token) > 1]
    made = ByteLevelBPETokenizer({spell[token]: rank for token, rank in ranks.items()}, merges)
    made.add_special_tokens([AddedToken(EOT, special=True, normalized=False)])
    return made.to_str()


def byte_letters():
    """The letter that GPT-2's vocabulary writes for each byte: itself where it is printable, and
    else the next code point from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def parts_of(token, ranks):
    """The two parts of a token of several bytes that byte pair encoding joins last."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        at = pairs.index(min(pairs))
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return parts


def characters_json(tokenizer):
    """A character vocabulary as tokenizer.json. Like encode(), it refuses a character that is not
    in it, since it has no token for the unknown."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    made = Tokenizer(models.WordLevel(tokenizer.stoi))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return made.to_str()
