"""Reads and writes Hugging Face's config.json, and maps our names to those of each model_type.

    fields = config_from_hf(read_json(config_file), name)   # fields of GPTConfig or T5Config
    hf = config_to_hf(fields)                               # the content of config.json

One Layout per model_type is used in both directions.
"""
import re
from dataclasses import dataclass, replace

from nanotune.errors import UserError
from nanotune.formats.checks import check_fields, short_repr

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# options that change the numerics: {key: the supported values, the default first}
SUPPORTED = {"scale_attn_by_inverse_layer_idx": (False,), "reorder_and_upcast_attn": (False,),
             "add_cross_attention": (False,), "scale_attn_weights": (True, False),
             "activation_function": tuple(ACTIVATIONS), "feed_forward_proj": ("relu", "gated-gelu")}
# architectures of a T5 with a head; the second is the name used before 2020
T5_HEADS = ("T5ForConditionalGeneration", "T5WithLMHeadModel")


# -----------------------------------------------------------------------------
# one Layout per model_type

@dataclass(frozen=True)
class Layout:
    """The names of our config fields and modules in one model_type. In a module's name, * is the
    block's number."""
    architecture: str
    fields: dict[str, str]             # {our field: key in config.json}
    defaults: dict[str, object]        # {key: transformers' value if config.json lacks it}
    other_names: dict[str, str]        # {alternative key: key}; the alternative wins if both exist
    modules: dict[str, tuple[str, ...]]  # {our module: transformers', stacked by rows if several}
    transposed: tuple[str, ...]        # modules whose weights are stored as (in, out)
    prefix: str = "transformer."       # of the keys; some files leave it out
    copies: tuple[str, ...] = ()       # keys of the embedding; files have one or several of them
    biases: bool = True                # whether transformers' modules have biases
    ends_prompts: bool = False         # whether a prompt ends with the end token


def t5_modules(gated):
    """{our module: transformers' modules} of T5."""
    table = {}
    for stack, mlp in (("encoder", 1), ("decoder", 2)):
        ours, theirs = f"{stack}.h.*", f"{stack}.block.*.layer"
        attention, dense = f"{theirs}.0.SelfAttention", f"{theirs}.{mlp}.DenseReluDense"
        table |= {
            f"{stack}.bias": (f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias",),
            f"{stack}.ln_f": (f"{stack}.final_layer_norm",),
            f"{ours}.ln_1": (f"{theirs}.0.layer_norm",),
            f"{ours}.attn.c_attn": tuple(f"{attention}.{x}" for x in "qkv"),
            f"{ours}.attn.c_proj": (f"{attention}.o",),
            f"{ours}.ln_2": (f"{theirs}.{mlp}.layer_norm",),
            f"{ours}.mlp.c_fc": tuple(f"{dense}.{x}" for x in (["wi_0", "wi_1"] if gated
                                                               else ["wi"])),
            f"{ours}.mlp.c_proj": (f"{dense}.wo",)}
    ours, theirs = "decoder.h.*", "decoder.block.*.layer.1"
    return table | {
        f"{ours}.ln_x": (f"{theirs}.layer_norm",),
        f"{ours}.cross.c_q": (f"{theirs}.EncDecAttention.q",),
        f"{ours}.cross.c_kv": tuple(f"{theirs}.EncDecAttention.{x}" for x in "kv"),
        f"{ours}.cross.c_proj": (f"{theirs}.EncDecAttention.o",)}


BLOCK = "transformer.h.*"
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
        modules={f"{BLOCK}.attn.c_attn": tuple(f"{BLOCK}.attn.attention.{x}_proj" for x in "qkv"),
                 f"{BLOCK}.attn.c_proj": (f"{BLOCK}.attn.attention.out_proj",)},
        transposed=()),
    "t5": Layout(
        "T5ForConditionalGeneration",
        fields={"vocab_size": "vocab_size", "n_layer": "num_layers",
                "n_decoder_layer": "num_decoder_layers", "n_head": "num_heads",
                "n_embd": "d_model", "head_size": "d_kv", "n_inner": "d_ff",
                "n_buckets": "relative_attention_num_buckets",
                "max_distance": "relative_attention_max_distance", "dropout": "dropout_rate",
                "norm_eps": "layer_norm_epsilon", "tied_head": "tie_word_embeddings",
                "scale_head": "scale_decoder_outputs", "start_id": "decoder_start_token_id",
                "pad_id": "pad_token_id", "end_id": "eos_token_id"},
        defaults={"vocab_size": 32128, "num_layers": 6, "num_decoder_layers": None,
                  "num_heads": 8, "d_model": 512, "d_kv": 64, "d_ff": 2048,
                  "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
                  "dropout_rate": 0.1, "layer_norm_epsilon": 1e-6, "feed_forward_proj": "relu",
                  "tie_word_embeddings": True, "decoder_start_token_id": None, "pad_token_id": 0,
                  "eos_token_id": 1},
        other_names={"hidden_size": "d_model", "num_attention_heads": "num_heads",
                     "num_hidden_layers": "num_layers", "head_dim": "d_kv"},
        modules=t5_modules(gated=False),
        transposed=(), prefix="", biases=False, ends_prompts=True,
        copies=("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")),
}
T5_GATED = replace(LAYOUTS["t5"], modules=t5_modules(gated=True))


def model_type_of(fields: dict) -> str:
    """Returns the model_type of a model with these fields of GPTConfig or T5Config."""
    if "head_size" in fields:
        return "t5"
    return "gpt2" if fields["local_window"] is None else "gpt_neo"


def layout_of(fields: dict) -> Layout:
    """Returns the Layout of a model with these config fields."""
    return T5_GATED if fields.get("gated") else LAYOUTS[model_type_of(fields)]


def keys_of(name: str, layout: Layout) -> tuple[list[str], bool]:
    """Returns (keys of the tensors that are our parameter when stacked by rows, whether they are
    stored transposed)."""
    path, _, kind = name.rpartition(".")
    module = re.sub(r"\.\d+\.", ".*.", path)
    number = "".join(re.findall(r"\.(\d+)\.", path))
    modules = layout.modules.get(module, (module,))
    keys = [f"{their.replace('*', number)}.{kind}" for their in modules]
    return keys, kind == "weight" and module.removeprefix(f"{BLOCK}.") in layout.transposed


# -----------------------------------------------------------------------------
# config.json

def config_from_hf(hf: dict, name: str) -> dict:
    """Returns the fields of GPTConfig or T5Config of a config.json. `name` is the model's name, for
    messages. Missing keys have transformers' defaults.

    Raises UserError if the model_type, an option or a value is not supported.
    """
    kind, where = hf.get("model_type"), f"{name}: its config.json"
    if kind not in tuple(LAYOUTS):  # a tuple: the value may be a list
        raise UserError(f"{name} is a {short_repr(kind)} model; nanotune supports model_type "
                        f"{', '.join(LAYOUTS)}")
    layout = LAYOUTS[kind]
    hf = layout.defaults | hf | {key: hf[other] for other, key in layout.other_names.items()
                                 if other in hf}
    for key, supported in SUPPORTED.items():
        if hf.get(key, supported[0]) not in supported:
            raise UserError(f"{where} has {key}={short_repr(hf[key])}; nanotune supports "
                            f"{', '.join(map(str, supported))}")
    if kind == "t5":
        return t5_fields(hf, where)
    fields = {ours: hf[key] for ours, key in layout.fields.items()}
    fields["activation"] = ACTIVATIONS[fields["activation"]]
    check_fields(fields, where, layout.fields, optional=("n_inner",))
    if kind == "gpt2":
        return fields | {"attn_scale": None if hf["scale_attn_weights"] else 1.0}
    check_alternates(hf, fields["n_layer"], where)
    return fields | {"attn_scale": 1.0, "qkv_bias": False}


def t5_fields(hf, where):
    """The T5Config fields of a config.json with defaults. Raises UserError as config_from_hf does.

    Before transformers 5, tie_word_embeddings also sets whether the head's input is scaled. Since
    then tie_word_embeddings is always true, and scale_decoder_outputs sets the scaling.
    """
    heads = hf.get("architectures") or [T5_HEADS[0]]
    if not set(heads) & set(T5_HEADS):
        raise UserError(f"{where} has architectures={short_repr(heads)}; nanotune supports "
                        f"{T5_HEADS[0]}, which has a head")
    hf = {"scale_decoder_outputs": hf["tie_word_embeddings"] is not False} | hf
    for key, other in (("num_decoder_layers", "num_layers"),
                       ("decoder_start_token_id", "pad_token_id")):
        hf[key] = hf[other] if hf[key] is None else hf[key]
    layout = LAYOUTS["t5"]
    fields = {ours: hf[key] for ours, key in layout.fields.items()}
    check_fields(fields, where, layout.fields, optional=())
    return fields | {"gated": hf["feed_forward_proj"] != "relu"}


def check_alternates(hf, n_layer, where):
    """Raises UserError unless GPT-Neo's layers alternate between global and local attention.
    attention_layers, one kind per layer, overrides attention_types."""
    key = "attention_layers" if "attention_layers" in hf else "attention_types"
    layers = hf[key]
    if key == "attention_types":
        types = [[["global", "local"], 12]] if layers is None else layers
        try:
            layers = [kind for pattern, times in types for kind in pattern * min(times, n_layer)]
        except (TypeError, ValueError):  # not a list of [pattern, times]
            layers = None
    if layers != (["global", "local"] * n_layer)[:n_layer]:
        raise UserError(f"{where} has {key}={short_repr(hf[key])} for {n_layer} layers; nanotune "
                        "supports only alternating global and local layers")


def config_to_hf(fields: dict) -> dict:
    """Returns the content of config.json for these config fields."""
    kind = model_type_of(fields)
    layout = LAYOUTS[kind]
    hf = {key: fields[ours] for ours, key in layout.fields.items()} | {
        "model_type": kind, "architectures": [layout.architecture]}
    if kind == "t5":
        return hf | {"feed_forward_proj": "gated-gelu" if fields["gated"] else "relu",
                     "tie_word_embeddings": fields["scale_head"], "is_encoder_decoder": True}
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    hf["activation_function"] = names[fields["activation"]]
    if kind == "gpt2":  # n_ctx is for llama.cpp's converter to GGUF
        return hf | {"scale_attn_weights": fields["attn_scale"] is None,
                     "n_ctx": fields["block_size"]}
    pattern = [[["global", "local"], fields["n_layer"] // 2]]
    if fields["n_layer"] % 2:
        pattern.append([["global"], 1])
    return hf | {"attention_types": pattern}


def check_hf_takes(fields: dict) -> None:
    """Raises UserError if no model_type of transformers can express these config fields."""
    hf = config_to_hf(fields)
    if hf["model_type"] == "t5":
        if fields["scale_head"] and not fields["tied_head"]:
            raise UserError("transformers before 5 has no T5 with scale_head=True and an untied "
                            "head (tied_head=False); use --format=onnx")
        return
    back = {"qkv_bias": None} | config_from_hf(hf, "the model")
    fixed = ["attn_scale"] + (["qkv_bias"] if hf["model_type"] == "gpt_neo" else [])
    wrong = next((name for name in fixed if fields[name] != back[name]), None)
    if wrong:
        raise UserError(f"transformers' {hf['model_type']} has no {wrong}={fields[wrong]}; "
                        "use --format=onnx")
