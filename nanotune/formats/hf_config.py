"""Reads and writes Hugging Face's config.json, and knows how each model_type names things.

    fields = config_from_hf(read_json(config_file), name)   # the fields of model.GPTConfig
    hf = config_to_hf(fields)                               # the content of config.json

One Layout per model_type serves both directions.
"""
import re
from dataclasses import dataclass

from nanotune.errors import UserError
from nanotune.formats.checks import brief, check_fields

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# options that change the numerics: {key: the values that GPT supports, the default first}
SUPPORTED = {"scale_attn_by_inverse_layer_idx": (False,), "reorder_and_upcast_attn": (False,),
             "add_cross_attention": (False,), "scale_attn_weights": (True, False),
             "activation_function": tuple(ACTIVATIONS)}


# -----------------------------------------------------------------------------
# one Layout per model_type

@dataclass(frozen=True)
class Layout:
    """The names of GPT's config fields and modules in one model_type."""
    architecture: str
    fields: dict[str, str]             # {our field: key in config.json}
    defaults: dict[str, object]        # {key: transformers' value if config.json lacks it}
    other_names: dict[str, str]        # {another name of a key, which goes before it: the key}
    modules: dict[str, tuple[str, ...]]  # {our module: theirs, stacked by rows if several}
    transposed: tuple[str, ...]        # modules whose weights are stored as (in, out)


COMMON = {"vocab_size": "vocab_size", "norm_eps": "layer_norm_epsilon",
          "activation": "activation_function", "tied_head": "tie_word_embeddings"}
COMMON_DEFAULTS = {"vocab_size": 50257, "layer_norm_epsilon": 1e-5,
                   "activation_function": "gelu_new", "tie_word_embeddings": True}
LAYOUTS = {
    "gpt2": Layout(
        "GPT2LMHeadModel",
        fields=COMMON | {"block_size": "n_positions", "n_layer": "n_layer", "n_head": "n_head",
                         "n_embd": "n_embd", "n_inner": "n_inner"},
        defaults=COMMON_DEFAULTS | {"n_positions": 1024, "n_layer": 12, "n_head": 12,
                                    "n_embd": 768, "n_inner": None, "scale_attn_weights": True},
        other_names={"max_position_embeddings": "n_positions", "num_hidden_layers": "n_layer",
                     "num_attention_heads": "n_head", "hidden_size": "n_embd"},
        modules={},
        transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),  # Conv1D
    "gpt_neo": Layout(
        "GPTNeoForCausalLM",
        fields=COMMON | {"block_size": "max_position_embeddings", "n_layer": "num_layers",
                         "n_head": "num_heads", "n_embd": "hidden_size",
                         "n_inner": "intermediate_size", "local_window": "window_size"},
        defaults=COMMON_DEFAULTS | {"max_position_embeddings": 2048, "num_layers": 24,
                                    "num_heads": 16, "hidden_size": 2048,
                                    "intermediate_size": None, "window_size": 256,
                                    "attention_types": None},
        other_names={"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"},
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
    """Returns the GPTConfig fields of a config.json; `name` is the model's, for messages. A missing
    key means transformers' default.

    Raises UserError if the model_type, an option or a value is not supported.
    """
    kind, where = hf.get("model_type"), f"{name}: its config.json"
    if kind not in tuple(LAYOUTS):  # a tuple: the value may be a list
        raise UserError(f"{name} is a {brief(kind)} model; nanotune supports model_type "
                        f"{' and '.join(LAYOUTS)}")
    layout = LAYOUTS[kind]
    hf = layout.defaults | hf | {key: hf[other] for other, key in layout.other_names.items()
                                 if other in hf}
    for key, supported in SUPPORTED.items():
        if hf.get(key, supported[0]) not in supported:
            raise UserError(f"{where} has {key}={brief(hf[key])}; nanotune supports "
                            f"{', '.join(map(str, supported))}")
    fields = {ours: hf[key] for ours, key in layout.fields.items()}
    fields["activation"] = ACTIVATIONS[fields["activation"]]
    check_fields(fields, where, layout.fields, optional=("n_inner",))
    if kind == "gpt2":
        return fields | {"attn_scale": None if hf["scale_attn_weights"] else 1.0}
    check_alternates(hf, fields["n_layer"], where)
    return fields | {"attn_scale": 1.0, "qkv_bias": False}


def check_alternates(hf, n_layer, where):
    """Raises UserError unless GPT-Neo's layers alternate between global and local attention.
    attention_layers, a kind per layer, goes before attention_types."""
    key = "attention_layers" if "attention_layers" in hf else "attention_types"
    layers = hf[key]
    if key == "attention_types":
        types = [[["global", "local"], 12]] if layers is None else layers
        try:
            layers = [kind for pattern, times in types for kind in pattern * min(times, n_layer)]
        except (TypeError, ValueError):  # not a list of [pattern, times]
            layers = None
    if layers != (["global", "local"] * n_layer)[:n_layer]:
        raise UserError(f"{where} has {key}={brief(hf[key])} for {n_layer} layers; nanotune "
                        "supports only global and local layers in turn")


def config_to_hf(fields: dict) -> dict:
    """Returns the config.json that transformers reads as these GPTConfig fields."""
    kind = model_type_of(fields)
    layout = LAYOUTS[kind]
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    hf = {key: fields[ours] for ours, key in layout.fields.items()} | {
        "activation_function": names[fields["activation"]],
        "model_type": kind, "architectures": [layout.architecture]}
    if kind == "gpt2":  # n_ctx is for llama.cpp's converter to GGUF
        return hf | {"scale_attn_weights": fields["attn_scale"] is None,
                     "n_ctx": fields["block_size"]}
    pattern = [[["global", "local"], fields["n_layer"] // 2]]
    if fields["n_layer"] % 2:
        pattern.append([["global"], 1])
    return hf | {"attention_types": pattern}


def check_hf_takes(fields: dict) -> None:
    """Raises UserError if no model_type of transformers can express these GPTConfig fields."""
    hf = config_to_hf(fields)
    back = {"qkv_bias": None} | config_from_hf(hf, "the model")
    fixed = ["attn_scale"] + (["qkv_bias"] if hf["model_type"] == "gpt_neo" else [])
    wrong = next((name for name in fixed if fields[name] != back[name]), None)
    if wrong:
        raise UserError(f"transformers' {hf['model_type']} has no {wrong}={fields[wrong]}; "
                        "use --format=onnx")
