"""Pretrained weights as transformers and the hub store them: find, check, read into a GPT.

    config_file, weight_files = find_pretrained("gpt2")    # or a local folder
    fields = config_from_hf(read_json(config_file), "gpt2")  # those of model.GPTConfig
    fill_from_hf(gpt, weight_files)                        # each tensor once, each parameter once

What the files may hold, and each is tested: OpenAI's gpt2 repos have keys without the
`transformer.` prefix and masks stored as buffers; finetuned ones have the prefix, perhaps a head
of their own; GPT-Neo's have q, k and v apart; weights in any dtype, whole or in shards, as
safetensors or as pytorch_model.bin.
"""
import json
import pickle
import re
import zipfile
from functools import partial
from pathlib import Path

import torch

# our field: GPT-2's key, GPT-Neo's key
HF_SIZES = {
    "block_size": ("n_positions", "max_position_embeddings"),
    "vocab_size": ("vocab_size", "vocab_size"),
    "n_layer": ("n_layer", "num_layers"),
    "n_head": ("n_head", "num_heads"),
    "n_embd": ("n_embd", "hidden_size"),
    "n_inner": ("n_inner", "intermediate_size"),
    "norm_eps": ("layer_norm_epsilon", "layer_norm_epsilon"),
}
# transformers' defaults, which a config.json may leave out
HF_DEFAULTS = {"n_inner": None, "intermediate_size": None, "layer_norm_epsilon": 1e-5}
HF_ATTENTION_TYPES = [[["global", "local"], 12]]  # GPT-Neo's
HF_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# numerics that this model does not have: key and the one value that it does
HF_REFUSED = {"scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
              "add_cross_attention": False}
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json",
                "pytorch_model.bin", "pytorch_model.bin.index.json")


def config_from_hf(hf, name):
    """The GPTConfig fields of a config.json (as a dict). Raises ValueError for what GPT is not."""
    kind = hf.get("model_type")
    if kind not in ("gpt2", "gpt_neo"):
        raise ValueError(f"{name} is a {kind!r} model; nanotune takes those of model_type gpt2 "
                         "and gpt_neo")
    for key, ours in HF_REFUSED.items():
        if hf.get(key, ours) != ours:
            raise ValueError(f"{name}: its config.json has {key}={hf[key]}, whose numerics "
                             f"nanotune does not have (only {key}={ours})")
    activation = hf.get("activation_function", "gelu_new")
    if activation not in HF_ACTIVATIONS:
        raise ValueError(f"{name}: its config.json has activation_function={activation}; nanotune "
                         f"has {', '.join(HF_ACTIVATIONS)}")
    neo = kind == "gpt_neo"
    try:
        sizes = {ours: HF_DEFAULTS[keys[neo]] if keys[neo] in HF_DEFAULTS and keys[neo] not in hf
                 else hf[keys[neo]] for ours, keys in HF_SIZES.items()}
    except KeyError as e:
        raise ValueError(f"{name}: its config.json lacks {e}") from None
    fields = sizes | {"activation": HF_ACTIVATIONS[activation],
                      "tied_head": hf.get("tie_word_embeddings", True)}
    if not neo:
        return fields | {"attn_scale": None if hf.get("scale_attn_weights", True) else 1.0}
    types = hf.get("attention_types", HF_ATTENTION_TYPES)
    layers = [kind for pattern, times in types for kind in pattern * times]
    if layers != (["global", "local"] * len(layers))[:fields["n_layer"]]:
        raise ValueError(f"{name}: its config.json has attention_types={types}; nanotune "
                         "alternates global and local, one a layer")
    return fields | {"attn_scale": 1.0, "qkv_bias": False,
                     "local_window": hf.get("window_size", 256)}


def config_to_hf(config):
    """The config.json (as a dict) that transformers reads as this model.GPTConfig."""
    neo = config.local_window is not None
    hf = {keys[neo]: getattr(config, ours) for ours, keys in HF_SIZES.items()}
    names = {ours: theirs for theirs, ours in reversed(HF_ACTIVATIONS.items())}
    hf |= {"activation_function": names[config.activation],
           "tie_word_embeddings": config.tied_head}
    if not neo:
        return hf | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
                     "scale_attn_weights": config.attn_scale is None}
    pattern = [[["global", "local"], config.n_layer // 2]]
    if config.n_layer % 2:
        pattern.append([["global"], 1])
    return hf | {"model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"],
                 "attention_types": pattern, "window_size": config.local_window}


# layers, heads, width of OpenAI's own, so that a run can be planned before they are downloaded
GPT2_SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280),
              "gpt2-xl": (48, 25, 1600)}


def find_config(name):
    """The config.json, as a dict, of a local folder or a hub id; without a download for GPT-2's."""
    if name in GPT2_SIZES:
        n_layer, n_head, n_embd = GPT2_SIZES[name]
        return dict(model_type="gpt2", vocab_size=50257, n_positions=1024, n_layer=n_layer,
                    n_head=n_head, n_embd=n_embd)
    file = (local_file(Path(name), "config.json") if Path(name).is_dir()
            else hub_file(name, "config.json"))
    if file is None:
        raise ValueError(f"{name} has no config.json: no Hugging Face model")
    return read_json(file)


def find_pretrained(name):
    """(config.json, [weight files]) of a local folder, or of a hub id: from the hub's cache on
    this machine, downloaded where it is not there. Raises ValueError that says what is missing."""
    if Path(name).is_dir():
        fetch = partial(local_file, Path(name))
    else:
        fetch = partial(hub_file, name)
    config = fetch("config.json")
    if config is None:
        raise ValueError(f"{name} has no config.json: no Hugging Face model")
    for file in WEIGHT_FILES:
        path = fetch(file)
        if path is None:
            continue
        if not file.endswith(".index.json"):
            return config, [path]
        shards = sorted(set(read_json(path).get("weight_map", {}).values()))
        paths = [fetch(shard) for shard in shards]
        if None in paths:
            raise ValueError(f"{name}: the shard {shards[paths.index(None)]} that {file} names is "
                             "missing; fetch it again")
        return config, paths
    raise ValueError(f"{name} has none of {', '.join(WEIGHT_FILES)}"
                     + ("" if Path(name).is_dir() else
                        "; or the hub cannot be reached just now: try again"))


def read_json(file):
    """A file's JSON object as a dict; ValueError where it holds none."""
    try:
        data = json.loads(Path(file).read_bytes())
    except ValueError as e:  # no JSON, or no UTF-8
        raise ValueError(f"{file} is damaged ({e}); fetch it again") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} is damaged (no JSON object); fetch it again")
    return data


def local_file(folder, file):
    return str(folder / file) if (folder / file).is_file() else None


def hub_file(repo, file):
    """The path of a hub repo's file, or None where the repo, or the cache offline, lacks it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    try:
        return hf_hub_download(repo, file)
    except LocalEntryNotFoundError:  # no answer from the hub, and not in the cache
        if file == "config.json":    # without which there is no model
            raise ValueError(hub_unreachable(repo)) from None
        return None
    except EntryNotFoundError:
        return None
    except GatedRepoError:
        raise ValueError(f"{repo} is gated: accept its terms on the hub, then run "
                         "`hf auth login`") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ValueError(f"{repo} is no folder on this machine and no model on the hub (or a "
                         "private one: then run `hf auth login`)") from None
    except Exception as e:  # what the file system, or the HTTP library of the day, raises
        raise ValueError(f"{hub_unreachable(repo)} ({type(e).__name__}: {e})") from None


def hub_unreachable(repo):
    return (f"the Hugging Face hub cannot be reached for {repo}, which is neither a folder nor in "
            "the cache on this machine; on one with network run `hf download "
            f"{repo} --local-dir FOLDER`, copy FOLDER here, and give --init_from=FOLDER")


def open_safetensors(file):
    from safetensors import SafetensorError, safe_open
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as e:
        raise ValueError(f"{file} is damaged ({e}); fetch it again") from None


def load_torch_bin(file):
    """The state dict of a pytorch_model.bin, its pages read as they are used (all at once where
    torch before 1.6 wrote it, which is no zip file); no code is run."""
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True,
                               mmap=zipfile.is_zipfile(file)))
    except pickle.UnpicklingError:
        raise ValueError(f"{file} carries code or objects beside plain weights, or is damaged; "
                         "refused, none of it was run") from None
    except Exception as e:  # torch.load raises many kinds for a damaged file
        raise ValueError(f"{file} is damaged ({type(e).__name__}); fetch it again") from None


def read_tensors(file, only=("",)):
    """Yields (key, tensor) of one weight file; `only` is what keys must end with. A safetensors
    file is opened anew for each tensor: its pages are mapped, and would else all stay resident
    beside the model."""
    if not file.endswith(".safetensors"):
        yield from ((k, t) for k, t in load_torch_bin(file).items() if k.endswith(only))
        return
    with open_safetensors(file) as f:
        keys = [key for key in f.keys() if key.endswith(only)]  # noqa: SIM118 (no mapping)
    for key in keys:
        with open_safetensors(file) as f:
            yield key, f.get_tensor(key)


def head_is_tied(weight_files, tied):
    """Whether the head is the token embedding: as config.json says (`tied`), but for finetuned
    files whose head differs although their config says tied."""
    found = {}
    for file in weight_files:
        for key, tensor in read_tensors(file, only=("lm_head.weight", "wte.weight")):
            found[key.removeprefix("transformer.")] = tensor
    if len(found) < 2:
        return tied
    return tied and torch.equal(found["lm_head.weight"], found["wte.weight"])


BUFFERS = re.compile(r"\.attn\.(attention\.)?(bias|masked_bias)$")  # masks, stored as if weights
CONV1D = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")


def our_place(key, neo):
    """(parameter name, which third of its rows or None, transposed?) of a hub tensor's key."""
    if key == "lm_head.weight":
        return key, None, False
    name = "transformer." + key.removeprefix("transformer.")
    if not neo:  # GPT-2's Conv1D holds (in, out) where a Linear holds (out, in)
        return name, None, bool(CONV1D.search(key))
    name = name.replace("attn.attention.out_proj", "attn.c_proj")
    match = re.fullmatch(r"(.*)\.attn\.attention\.([qkv])_proj\.(weight|bias)", name)
    if match is None:
        return name, None, False
    return f"{match[1]}.attn.c_attn.{match[3]}", "qkv".index(match[2]), False


@torch.no_grad()
def fill_from_hf(model, weight_files):
    """Copies each tensor of the files into its parameter. Raises ValueError unless each tensor is
    used once or is a known buffer, and each parameter is filled once."""
    params = dict(model.named_parameters())
    neo = model.config.local_window is not None
    missing = {(name, part) for name in params
               for part in (range(3) if neo and ".c_attn." in name else [None])}
    for file in weight_files:
        for key, tensor in read_tensors(file):
            if BUFFERS.search(key) or (key == "lm_head.weight" and model.config.tied_head):
                continue
            name, part, transposed = our_place(key, neo)
            if (name, part) not in missing:
                raise ValueError(f"{file}: the tensor {key} has no place in the model, or came "
                                 "twice")
            missing.remove((name, part))
            target = params[name] if part is None else params[name].chunk(3)[part]
            expected = target.shape[::-1] if transposed else target.shape
            if tensor.shape != expected:
                raise ValueError(f"{file}: {key} is {tuple(tensor.shape)} where config.json "
                                 f"means {tuple(expected)}")
            target.copy_(tensor.t() if transposed else tensor)
    if missing:
        names = sorted({name for name, _ in missing})
        raise ValueError(f"{', '.join(weight_files)}: no tensor for {', '.join(names[:3])}"
                         + (f" and {len(names) - 3} more" if names[3:] else ""))
