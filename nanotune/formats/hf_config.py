"""Reads and writes Hugging Face's config.json, and knows how each model_type names things.

    fields = config_from_hf(read_json(config_file), name)   # the fields of model.GPTConfig
    hf = config_to_hf(fields)                               # the content of config.json

One Layout per model_type serves both directions.
"""
import re
from dataclasses import dataclass

from nanotune.errors import UserError

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# options that change the numerics: {key: the only value that GPT supports}
REFUSED = {"scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
           "add_cross_attention": False}


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
