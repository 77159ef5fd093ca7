"""Builds one ONNX graph of a GPT, for prompts and for decoding.

    inputs   input_ids (B, T) int64
             past_key_values.N.key and .value (B, nh, P, hs) float32, for each layer N; P may be 0
             logits_to_keep (1,) int64, optional: how many of the last positions get logits
    outputs  logits (B, T, V) float32
             present.N.key and .value (B, nh, P + T, hs): the past of the next call

B, T and P are dynamic; P + T is at most block_size. onnx_graph.py has the operators.
"""
import math
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from onnx import TensorProto

from model import GPT
from nanotune.formats.onnx_graph import SCHEMES, Graph, Tensors

INLINE_LIMIT = 1.9e9  # bytes; more go to a second file: protobuf's limit is 2 GB


def write_onnx(model: GPT, path: str | Path, quantize: str = "none",
               tokenizer_spec: dict | None = None) -> None:
    """Writes a float32 GPT on the CPU to `path`; weights over INLINE_LIMIT go to path.data.

    `quantize` is a key of SCHEMES. The file's metadata holds the config and `tokenizer_spec`, a
    tokenizer's `spec`, so that sampling needs no other file. Raises UserError if the model's sizes
    cannot be quantized.
    """
    bytes_per_param = 4 if quantize == "none" else 1.04  # scales included; int4 takes less
    external = model.num_params() * bytes_per_param > INLINE_LIMIT
    with open(f"{path}.data", "wb") if external else nullcontext() as file:
        graph = Graph(model, Tensors(file), SCHEMES[quantize], "transformer.wte.weight")
        build(graph)
    graph.save(path, {"config": asdict(model.config), "quantize": quantize,
                      "tokenizer": tokenizer_spec})


def build(g):
    c = g.config
    g.declare(g.inputs, "input_ids", TensorProto.INT64, "B", "T")
    g.declare(g.outputs, "logits", TensorProto.FLOAT, "B", "kept", c.vocab_size)
    first, end = g.span()
    x = g.op("Add", [g.embedding(), g.op(                                         # (B, T, C)
        "Slice", [g.weight("transformer.wpe.weight"), first, end, g.ints("axis_0", 0)])])
    local = local_mask(g, first, end) if c.local_window else ""
    for layer in range(c.n_layer):
        x = block(g, x, f"transformer.h.{layer}", layer, local * (layer % 2))
    g.head(norm(g, g.last(x), "transformer.ln_f"))


def block(g, x, name, layer, mask):
    h = g.linear(norm(g, x, f"{name}.ln_1"), f"{name}.attn.c_attn")
    h = g.linear(attention(g, h, layer, mask), f"{name}.attn.c_proj")
    x = g.op("Add", [x, h])
    h = g.linear(norm(g, x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
    tanh = "tanh" if g.config.activation == "gelu_tanh" else "none"
    h = g.linear(g.op("Gelu", [h], approximate=tanh), f"{name}.mlp.c_proj")
    return g.op("Add", [x, h])


def attention(g, qkv, layer, mask):
    """(B, T, 3 C) -> (B, T, C); reads the layer's past and outputs its present."""
    c = g.config
    hs = c.n_embd // c.n_head
    q, k, v = g.op("Split", [qkv], 3, axis=2, num_outputs=3)
    past, present = g.past(layer, hs)
    return g.op("Attention", [q, k, v, mask, *past], [f"attention.{layer}", *present],
                q_num_heads=c.n_head, kv_num_heads=c.n_head, is_causal=1,
                scale=1 / math.sqrt(hs) if c.attn_scale is None else c.attn_scale)[0]


def local_mask(g, first, end):
    """(T, S) bool for GPT-Neo's odd layers: True for keys less than local_window before a query."""
    return g.op("Greater", [g.distances(first, end), g.ints("window", -g.config.local_window)])


def norm(g, x, name):
    bias = [g.weight(f"{name}.bias")] if f"{name}.bias" in g.weights else []
    return g.op("LayerNormalization", [x, g.weight(f"{name}.weight"), *bias],
                axis=-1, epsilon=g.config.norm_eps)
