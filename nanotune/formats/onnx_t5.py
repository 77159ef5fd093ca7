"""Builds two ONNX graphs of a T5, which share one file of weights.

    encoder  inputs   input_ids (B, S) int64
                      attention_mask (B, S) int64, 0 for padding
             outputs  cross.N.key and .value (B, nh, S, hs) float32, for each decoder layer N: the
                      keys and values of its cross-attention
    decoder  inputs   input_ids (B, T) int64, the tokens before each target, from start_id on
                      attention_mask, cross.N.key and .value, as above
                      past_key_values.N.key and .value (B, nh, P, hs); P may be 0
                      logits_to_keep (1,) int64, optional: how many of the last positions get logits
             outputs  logits (B, T, V) float32
                      present.N.key and .value (B, nh, P + T, hs): the past of the next call

B, S, T and P are dynamic. onnx_graph.py has the operators. Attention has scale 1. Its mask includes
the relative position bias, read from a table with one row per distance up to max_distance. Tokens
farther away have the bias of max_distance.
"""
import hashlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto

from nanotune.errors import UserError
from nanotune.formats.onnx_graph import SCHEMES, Graph, Tensors
from t5 import T5, bucket_of

FARTHEST = 2**16  # largest max_distance: the table has twice as many rows


def write_onnx(model: T5, folder: Path, quantize: str = "none",
               tokenizer_spec: dict | None = None) -> Path:
    """Writes a float32 T5 on the CPU as encoder.onnx, decoder.onnx and model.onnx.data; returns the
    decoder's path. `quantize` is a key of SCHEMES; the names contain it unless it is "none".

    The decoder's metadata holds `tokenizer_spec`, a tokenizer's `spec`. Raises UserError if the
    model's sizes cannot be quantized or its max_distance is over FARTHEST.
    """
    if model.config.max_distance > FARTHEST:
        raise UserError(f"max_distance={model.config.max_distance} is more than {FARTHEST}, the "
                        "limit of --format=onnx; use --format=hf")
    kind = "onnx" if quantize == "none" else f"{quantize}.onnx"
    graphs, tensors = {}, None
    with open(folder / f"model.{kind}.data", "wb") as file:
        for part, build in (("encoder", build_encoder), ("decoder", build_decoder)):
            tensors = Tensors(file, before=tensors)
            graphs[part] = Graph(model, tensors, SCHEMES[quantize], "shared.weight")
            build(graphs[part], getattr(model, part))
    with open(file.name, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # open_onnx compares it
    for part, other in (("encoder", "decoder"), ("decoder", "encoder")):
        graphs[part].save(folder / f"{part}.{kind}", {
            "config": asdict(model.config), "quantize": quantize, "part": part,
            "partner": f"{other}.{kind}", "data": f"model.{kind}.data", "digest": digest,
            "tokenizer": tokenizer_spec if part == "decoder" else None})
    return folder / f"decoder.{kind}"


def build_encoder(g, stack):
    c = g.config
    g.declare(g.inputs, "input_ids", TensorProto.INT64, "B", "S")
    S = g.op("Shape", ["input_ids"], start=1, end=2)
    bias = position_bias(g, stack, g.ints("axis_0", 0), S, causal=False)
    mask = g.op("Add", [bias, padding_mask(g)])                                   # (B, nh, S, S)
    x = g.embedding()                                                             # (B, S, C)
    for layer in range(c.n_layer):
        name = f"encoder.h.{layer}"
        q, k, v = queries_keys_values(g, x, name)
        h = g.op("Attention", [q, k, v, mask], q_num_heads=c.n_head, kv_num_heads=c.n_head,
                 scale=1.0)
        x = g.op("Add", [x, g.linear(h, f"{name}.attn.c_proj")])
        x = mlp(g, x, name)
    x = norm(g, x, "encoder.ln_f")
    for layer in range(c.n_decoder_layer):
        kv = g.linear(x, f"decoder.h.{layer}.cross.c_kv")
        for part, name in zip(g.op("Split", [kv], 2, axis=2, num_outputs=2),
                              cross(g, g.outputs, layer)):
            heads(g, part, [name])


def build_decoder(g, stack):
    c = g.config
    g.declare(g.inputs, "input_ids", TensorProto.INT64, "B", "T")
    g.declare(g.outputs, "logits", TensorProto.FLOAT, "B", "kept", c.vocab_size)
    first, end = g.span()
    mask = position_bias(g, stack, first, end, causal=True)
    one = g.ints("one_1", 1)
    rows = g.op("Concat", [one, one, g.op("Sub", [end, first]), one], axis=0)     # 1, 1, T, 1
    source_mask = g.op("Expand", [padding_mask(g), rows])  # onnxruntime does not broadcast T
    x = g.embedding()                                                             # (B, T, C)
    for layer in range(c.n_decoder_layer):
        name = f"decoder.h.{layer}"
        past, present = g.past(layer, c.head_size)
        h = g.op("Attention", [*queries_keys_values(g, x, name), mask, *past],
                 [f"attention.{layer}", *present], q_num_heads=c.n_head, kv_num_heads=c.n_head,
                 scale=1.0)[0]
        x = g.op("Add", [x, g.linear(h, f"{name}.attn.c_proj")])
        q = heads(g, g.linear(norm(g, x, f"{name}.ln_x"), f"{name}.cross.c_q"))
        h = g.op("Attention", [q, *cross(g, g.inputs, layer), source_mask], scale=1.0)
        h = g.op("Reshape", [g.op("Transpose", [h], perm=[0, 2, 1, 3]),
                             g.ints("joined_heads", 0, 0, c.n_head * c.head_size)])
        x = mlp(g, g.op("Add", [x, g.linear(h, f"{name}.cross.c_proj")]), name)
    x = norm(g, g.last(x), "decoder.ln_f")
    if c.scale_head:
        x = g.op("Mul", [x, g.tensors.add("scale", np.float32(c.n_embd ** -0.5))])
    g.head(x)


def cross(g, where, layer):
    """Declares the keys and values of a layer's cross-attention; returns their names."""
    c = g.config
    return [g.declare(where, f"cross.{layer}.{kind}", TensorProto.FLOAT, "B", c.n_head, "S",
                      c.head_size) for kind in ("key", "value")]


def padding_mask(g):
    """Declares attention_mask; returns the additive mask (B, 1, 1, S), -inf for padding, else 0."""
    seen = g.op("Cast", [g.declare(g.inputs, "attention_mask", TensorProto.INT64, "B", "S")],
                to=TensorProto.BOOL)
    added = g.op("Where", [seen, *(g.tensors.add(f"add_{x}", np.float32(x)) for x in (0, -np.inf))])
    return g.op("Unsqueeze", [added, g.ints("axes_1_2", 1, 2)])


@torch.no_grad()
def position_bias(g, stack, first, end, causal):
    """The bias (1, nh, T, S) of queries `first` to `end` to keys 0 to `end`; if `causal`, -inf for
    the keys after each query."""
    least, most = -g.config.max_distance, 1 if causal else g.config.max_distance
    table = stack.bias(bucket_of(torch.arange(least, most + 1), **stack.buckets)).numpy()
    if causal:
        table[-1] = -np.inf
    bounds = (g.tensors.add(f"distance_{n}", np.int64(n)) for n in (least, most))
    at = g.op("Clip", [g.distances(first, end), *bounds])
    row = g.op("Sub", [at, g.ints("distance_of_row_0", least)])
    name = f"{'decoder' if causal else 'encoder'}.bias"
    bias = g.op("Gather", [g.tensors.add(name, table), row])                      # (T, S, nh)
    return g.op("Unsqueeze", [g.op("Transpose", [bias], perm=[2, 0, 1]), g.ints("axis_0", 0)])


def queries_keys_values(g, x, name):
    return g.op("Split", [g.linear(norm(g, x, f"{name}.ln_1"), f"{name}.attn.c_attn")], 3, axis=2,
                num_outputs=3)


def heads(g, x, outputs=1):
    """(B, T, nh hs) -> (B, nh, T, hs)."""
    x = g.op("Reshape", [x, g.ints("heads", 0, 0, g.config.n_head, g.config.head_size)])
    return g.op("Transpose", [x], outputs, perm=[0, 2, 1, 3])


def mlp(g, x, name):
    h = g.linear(norm(g, x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
    if g.config.gated:
        h, gate = g.op("Split", [h], 2, axis=2, num_outputs=2)
        h = g.op("Mul", [g.op("Gelu", [h], approximate="tanh"), gate])
    else:
        h = g.op("Relu", [h])
    return g.op("Add", [x, g.linear(h, f"{name}.mlp.c_proj")])


def norm(g, x, name):
    return g.op("RMSNormalization", [x, g.weight(f"{name}.weight")], axis=-1,
                epsilon=g.config.norm_eps)
