"""Builds one ONNX graph of a GPT, for prompts and for decoding.

    inputs   input_ids (B, T) int64
             past_key_values.N.key and .value (B, nh, P, hs) float32, for each layer N; P may be 0
             logits_to_keep (1,) int64, optional: how many of the last positions get logits
    outputs  logits (B, T, V) float32
             present.N.key and .value (B, nh, P + T, hs): the past of the next call

B, T and P are dynamic; P + T is at most block_size. In float32 the graph has only standard ONNX
operators (opset 23, whose Attention is fused and takes a past). Quantized, it also has two of
onnxruntime's: MatMulNBits, whose kernel quantizes its input too, by blocks, and multiplies in
int8; and GatherBlockQuantized. The embedding and a tied head share one tensor in each form.

The graph is built from the weights, operator by operator, rather than traced by torch's exporter:
a traced graph would need longer code to fix (past, shared embedding, quantized operators).
"""
import json
import math
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from model import GPT
from nanotune.errors import UserError
from nanotune.formats.onnx_model import ALL, METADATA

OPSET, IR_VERSION = 23, 10  # the first opset with Attention; onnxruntime 1.23 reads both
MICROSOFT = "com.microsoft"
# (bits per weight, most weights of a row per scale) of the layers, and of embedding and head,
# which in 4 bits would cost as much perplexity as all layers together
SCHEMES = {"none": None, "int8": ((8, 128), (8, 128)), "int4": ((4, 32), (8, 128))}
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
CLIPPED = (1, 0.95, 0.9, 0.85, 0.8)  # fractions of a 4-bit block's range to try as its scale
INLINE_LIMIT = 1.9e9        # bytes: protobuf's limit is 2 GB; more go to a second file


def write_onnx(model: GPT, path: str | Path, quantize: str = "none",
               tokenizer_spec: dict | None = None) -> None:
    """Writes a float32 GPT on the CPU to `path`, and to path.data if it is over 2 GB.

    `quantize` is a key of SCHEMES. The file's metadata holds the config and `tokenizer_spec`, a
    tokenizer's `spec`, so that sampling needs no other file. Raises UserError if the model's sizes
    cannot be quantized.
    """
    bytes_per_param = 4 if quantize == "none" else 1.04  # scales included; int4 takes less
    external = model.num_params() * bytes_per_param > INLINE_LIMIT
    with open(f"{path}.data", "wb") if external else nullcontext() as file:
        tensors = Tensors(file)
        graph = Graph(model, tensors, SCHEMES[quantize])
        graph.build()
        made = helper.make_model(
            helper.make_graph(graph.nodes, "gpt", graph.inputs, graph.outputs, tensors.protos),
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
            ir_version=IR_VERSION, producer_name=METADATA)
    helper.set_model_props(made, {METADATA: json.dumps({
        "config": asdict(model.config), "quantize": quantize, "tokenizer": tokenizer_spec})})
    onnx.save_model(made, path)


class Tensors:
    """The graph's constants: kept for the graph's file, or written to the open `file`."""
    def __init__(self, file=None):
        self.protos, self.file = [], file

    def add(self, name, array):
        """Adds an array under this name, which it returns."""
        if self.file is None or array.nbytes < 1024:
            self.protos.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
            return name
        proto = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL,
                            data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
        self.file.write(bytes(-self.file.tell() % 4096))  # page-aligned, for mmap
        place = {"location": Path(self.file.name).name, "offset": self.file.tell(),
                 "length": array.nbytes}
        for key, value in place.items():
            proto.external_data.add(key=key, value=str(value))
        self.file.write(np.ascontiguousarray(array).data)
        self.protos.append(proto)
        return name


class Graph:
    """Nodes, inputs and outputs of one GPT; constants have the names of its weights."""
    def __init__(self, model, tensors, scheme):
        self.config, self.tensors, self.scheme = model.config, tensors, scheme
        self.weights = {name: p.detach().numpy() for name, p in model.state_dict().items()}
        self.nodes, self.inputs, self.outputs = [], [], []

    def op(self, kind, inputs, outputs=1, **attributes):
        """Adds a node; returns the name of its output, or a list of names."""
        name = f"{kind}_{len(self.nodes)}"
        if isinstance(outputs, int):
            outputs = [f"{name}_{i}" for i in range(outputs)]
        domain = MICROSOFT if kind in ("MatMulNBits", "GatherBlockQuantized") else ""
        self.nodes.append(helper.make_node(kind, inputs, outputs, name, domain=domain,
                                           **attributes))
        return outputs[0] if len(outputs) == 1 else outputs

    def ints(self, name, *values):
        return self.tensors.add(name, np.array(values, dtype=np.int64))

    def weight(self, name):
        return self.tensors.add(name, self.weights[name])

    def build(self):
        c = self.config
        self.declare(self.inputs, "input_ids", TensorProto.INT64, ["B", "T"])
        self.declare(self.outputs, "logits", TensorProto.FLOAT, ["B", "kept", c.vocab_size])
        first = self.op("Shape", ["past_key_values.0.key"], start=2, end=3)   # (1,): P
        new = self.op("Shape", ["input_ids"], start=1, end=2)                 # (1,): T
        end = self.op("Add", [first, new])
        x = self.op("Add", [self.embedding(), self.op(                        # (B, T, C)
            "Slice", [self.weight("transformer.wpe.weight"), first, end, self.ints("axis_0", 0)])])
        local = self.local_mask(first, end) if c.local_window else ""
        for layer in range(c.n_layer):
            x = self.transformer_block(x, f"transformer.h.{layer}", layer, local * (layer % 2))
        self.declare(self.inputs, "logits_to_keep", TensorProto.INT64, [1])
        self.ints("logits_to_keep", ALL)  # an input with a default is optional
        x = self.op("Slice", [x, self.op("Neg", ["logits_to_keep"]), self.ints("to_end", ALL),
                              self.ints("axis_1", 1)])
        self.head(self.norm(x, "transformer.ln_f"))

    @staticmethod
    def declare(where, name, kind, shape):
        where.append(helper.make_tensor_value_info(name, kind, shape))

    def transformer_block(self, x, name, layer, mask):
        h = self.linear(self.norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn")
        h = self.linear(self.attention(h, layer, mask), f"{name}.attn.c_proj")
        x = self.op("Add", [x, h])
        h = self.linear(self.norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        tanh = "tanh" if self.config.activation == "gelu_tanh" else "none"
        h = self.linear(self.op("Gelu", [h], approximate=tanh), f"{name}.mlp.c_proj")
        return self.op("Add", [x, h])

    def attention(self, qkv, layer, mask):
        """(B, T, 3 C) -> (B, T, C); reads the layer's past and outputs its present."""
        c = self.config
        hs = c.n_embd // c.n_head
        q, k, v = self.op("Split", [qkv], 3, axis=2, num_outputs=3)
        past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        present = [f"present.{layer}.{kind}" for kind in ("key", "value")]
        for name, where, length in zip(past + present, [self.inputs] * 2 + [self.outputs] * 2,
                                       ["P", "P", "S", "S"]):
            self.declare(where, name, TensorProto.FLOAT, ["B", c.n_head, length, hs])
        return self.op("Attention", [q, k, v, mask, *past], [f"attention.{layer}", *present],
                       q_num_heads=c.n_head, kv_num_heads=c.n_head, is_causal=1,
                       scale=1 / math.sqrt(hs) if c.attn_scale is None else c.attn_scale)[0]

    def local_mask(self, first, end):
        """(T, S) bool, True for the last local_window tokens up to each: GPT-Neo's odd layers."""
        zero, one = self.tensors.add("zero", np.int64(0)), self.tensors.add("one", np.int64(1))
        first, end = (self.op("Squeeze", [n]) for n in (first, end))
        rows = self.op("Unsqueeze", [self.op("Range", [first, end, one]), self.ints("last", -1)])
        columns = self.op("Range", [zero, end, one])
        before = self.op("Sub", [rows, self.ints("window", self.config.local_window)])
        return self.op("Greater", [columns, before])

    def norm(self, x, name):
        bias = [self.weight(f"{name}.bias")] if f"{name}.bias" in self.weights else []
        return self.op("LayerNormalization", [x, self.weight(f"{name}.weight"), *bias],
                       axis=-1, epsilon=self.config.norm_eps)

    # weights that can be quantized

    def linear(self, x, name):
        bias = [self.weight(f"{name}.bias")] if f"{name}.bias" in self.weights else []
        name = f"{name}.weight"
        if self.scheme:
            self.quantized(name)
            return self.multiply(x, name, ["", "", *bias] if bias else [])
        x = self.op("MatMul", [x, self.tensors.add(name, self.weights[name].T)])
        return self.op("Add", [x, *bias]) if bias else x

    def coding(self, name):
        """(bits, block size) of a weight."""
        bits, most = self.scheme[name in (EMBEDDING, HEAD)]
        return bits, block_of(self.weights[name].shape[1], most)

    def quantized(self, name):
        """Adds a weight (N, K) as codes and scales."""
        codes, scales = quantize_rows(self.weights[name], *self.coding(name))
        self.tensors.add(f"{name}.codes", codes)
        self.tensors.add(f"{name}.scales", scales)

    def multiply(self, x, name, more=(), outputs=1):
        rows, width = self.weights[name].shape
        bits, block = self.coding(name)
        return self.op("MatMulNBits", [x, f"{name}.codes", f"{name}.scales", *more], outputs,
                       N=rows, K=width, bits=bits, block_size=block,
                       accuracy_level=4)  # 4: quantizes the input to int8 too

    def embedding(self):
        """input_ids (B, T) -> (B, T, C)."""
        if not self.scheme:
            return self.op("Gather", [self.weight(EMBEDDING), "input_ids"])
        self.quantized(EMBEDDING)
        bits, block = self.coding(EMBEDDING)
        # codes in the head's layout, (V, blocks, bytes), so that the two share one tensor
        scales = self.op("Unsqueeze", [f"{EMBEDDING}.scales", self.ints("scales_axis", 2)])
        x = self.op("GatherBlockQuantized", [f"{EMBEDDING}.codes", "input_ids", scales],
                    bits=bits, block_size=block, gather_axis=0, quantize_axis=2)
        return self.op("Reshape", [x, self.ints("joined", 0, 0, self.config.n_embd)])

    def head(self, x):
        """(B, T, C) -> logits (B, T, V)."""
        name = EMBEDDING if self.config.tied_head else HEAD
        if not self.config.tied_head:
            self.quantized(name) if self.scheme else self.weight(name)
        if self.scheme:
            self.multiply(x, name, outputs=["logits"])
            return
        # Gemm reads the embedding in place; a Transpose node would be folded into a second copy
        shape = self.op("Concat", [self.op("Shape", [x], start=0, end=2), self.ints("minus_1", -1)],
                        axis=0)
        rows = self.op("Reshape", [x, self.ints("rows", -1, self.config.n_embd)])
        self.op("Reshape", [self.op("Gemm", [rows, name], transB=1), shape], ["logits"])


def block_of(width: int, most: int) -> int:
    """The largest power of two up to `most` that divides a row's width. Raises UserError if it is
    less than 16."""
    block = math.gcd(width, most)
    if block < 16:
        raise UserError(f"a width of {width} cannot be quantized: onnxruntime needs a multiple of "
                        "16; export with --quantize=none")
    return block


def quantize_rows(weight: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, K) float32 -> codes (N, K / block, block * bits / 8) uint8, scales (N, K / block).

    A weight is about (code - 2^(bits - 1)) * scale. A byte holds two 4-bit codes, the first in the
    low half. In 4 bits the weight of largest magnitude becomes -8, whatever its sign, so that the
    whole range -8 to 7 is used. It is clipped if that lowers the block's squared error.
    """
    rows = weight.reshape(len(weight), -1, block)
    middle = 2 ** (bits - 1)
    peak = np.take_along_axis(rows, np.abs(rows).argmax(-1)[..., None], -1)
    scales = np.abs(peak) / (middle - 1) if bits == 8 else -peak / middle
    scales[scales == 0] = 1
    if bits == 4:
        tried = [scales * np.float32(part) for part in CLIPPED]
        errors = [np.square(rows - rounded(rows, s, middle) * s).sum(-1) for s in tried]
        best = np.argmin(errors, 0)[None, ..., None]
        scales = np.take_along_axis(np.stack(tried), best, 0)[0]
    codes = (rounded(rows, scales, middle) + middle).astype(np.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    return codes, scales[..., 0].astype(np.float32)


def rounded(rows, scales, middle):
    return np.clip(np.rint(rows / scales), -middle, middle - 1)
