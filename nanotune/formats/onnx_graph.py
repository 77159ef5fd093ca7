"""Building blocks of exported ONNX graphs: constants, nodes, matrices in float32, int8 or int4.

    tensors = Tensors(file)
    graph = Graph(model, tensors, SCHEMES["int8"], embedding="shared.weight")
    x = graph.linear(graph.embedding(), "h.0.mlp.c_fc")
    graph.save(path, metadata)

A float32 graph has only standard ONNX operators (opset 23, whose Attention is fused and takes past
keys and values). A quantized graph also has two of onnxruntime's: MatMulNBits, whose kernel also
quantizes its input, by blocks, and multiplies in int8; and GatherBlockQuantized. In both kinds of
graph the embedding and a tied head share one tensor.

Graphs are built operator by operator, not traced by torch's exporter: fixing a traced graph (past,
shared embedding, quantized operators) would take more code.
"""
import json
import math
from pathlib import Path
from typing import IO

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from nanotune.errors import UserError
from nanotune.formats.onnx_model import ALL, METADATA, OPSET

IR_VERSION = 10  # onnxruntime 1.23 reads it
MICROSOFT = "com.microsoft"
# (bits per weight, maximum weights per scale) of the layers, and of the embedding and the head. In
# 4 bits, the latter two would cost as much perplexity as all layers together.
SCHEMES = {"none": None, "int8": ((8, 128), (8, 128)), "int4": ((4, 32), (8, 128))}
HEAD = "lm_head.weight"
CLIPPED = (1, 0.95, 0.9, 0.85, 0.8)  # factors of a 4-bit block's scale to try


class Tensors:
    """A graph's constants, by name. They are saved in the graph or, from 1 KiB on, in the open
    `file`. Constants that `before`, another graph's Tensors, wrote to the same file are reused."""
    def __init__(self, file: IO[bytes] | None = None, before: "Tensors | None" = None) -> None:
        self.protos, self.file = {}, file
        self.before = {name: proto for name, proto in (before.protos if before else {}).items()
                       if proto.data_location == TensorProto.EXTERNAL}

    def add(self, name: str, array: np.ndarray) -> str:
        """Adds an array if `name` is new; returns `name`."""
        if name not in self.protos:
            self.protos[name] = self.before.get(name) or self.proto(name, array)
        return name

    def proto(self, name, array):
        if self.file is None or array.nbytes < 1024:
            return numpy_helper.from_array(np.ascontiguousarray(array), name)
        proto = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL,
                            data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
        self.file.write(bytes(-self.file.tell() % 4096))  # page-aligned, for mmap
        place = {"location": Path(self.file.name).name, "offset": self.file.tell(),
                 "length": array.nbytes}
        for key, value in place.items():
            proto.external_data.add(key=key, value=str(value))
        self.file.write(np.ascontiguousarray(array).data)
        return proto


class Graph:
    """Nodes, inputs and outputs of one graph; constants have the names of the model's weights."""
    def __init__(self, model: torch.nn.Module, tensors: Tensors, scheme: tuple | None,
                 embedding: str) -> None:
        self.config, self.tensors, self.scheme = model.config, tensors, scheme
        self.table = embedding  # the name of the embedding's weight
        self.weights = {name: p.detach().numpy() for name, p in model.state_dict().items()}
        self.nodes, self.inputs, self.outputs = [], [], []

    def save(self, path: str | Path, metadata: dict) -> None:
        """Writes the graph to `path`, with the metadata that open_onnx needs."""
        proto = helper.make_model(
            helper.make_graph(self.nodes, "graph", self.inputs, self.outputs,
                              list(self.tensors.protos.values())),
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
            ir_version=IR_VERSION, producer_name=METADATA)
        helper.set_model_props(proto, {METADATA: json.dumps(metadata)})
        onnx.save_model(proto, path)

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

    def declare(self, where, name, kind, *shape):
        where.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def past(self, layer, head_size):
        """Declares a layer's past (B, nh, P, hs) and present (B, nh, P + T, hs); returns the names
        [past key, past value], [present key, present value]."""
        return [[self.declare(where, f"{name}.{layer}.{kind}", TensorProto.FLOAT, "B",
                              self.config.n_head, length, head_size) for kind in ("key", "value")]
                for where, name, length in ((self.inputs, "past_key_values", "P"),
                                            (self.outputs, "present", "P + T"))]

    def span(self):
        """(P, P + T), (1,) each: the first position of the new tokens, and the end."""
        first = self.op("Shape", ["past_key_values.0.key"], start=2, end=3)
        return first, self.op("Add", [first, self.op("Shape", ["input_ids"], start=1, end=2)])

    def distances(self, first, end):
        """(T, S) int64: the key's position, 0 to `end`, minus the query's, `first` to `end`."""
        zero, one = self.tensors.add("zero", np.int64(0)), self.tensors.add("one", np.int64(1))
        first, end = (self.op("Squeeze", [n]) for n in (first, end))
        rows = self.op("Unsqueeze", [self.op("Range", [first, end, one]), self.ints("last", -1)])
        return self.op("Sub", [self.op("Range", [zero, end, one]), rows])

    def last(self, x):
        """(B, T, C) -> (B, kept, C), the last `logits_to_keep` positions; declares that input."""
        self.declare(self.inputs, "logits_to_keep", TensorProto.INT64, 1)
        self.ints("logits_to_keep", ALL)  # an input with a default is optional
        return self.op("Slice", [x, self.op("Neg", ["logits_to_keep"]), self.ints("to_end", ALL),
                                 self.ints("axis_1", 1)])

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
        bits, most = self.scheme[name in (self.table, HEAD)]
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
            return self.op("Gather", [self.weight(self.table), "input_ids"])
        self.quantized(self.table)
        bits, block = self.coding(self.table)
        # codes in the head's layout, (V, blocks, bytes), so that the two share one tensor
        scales = self.op("Unsqueeze", [f"{self.table}.scales", self.ints("scales_axis", 2)])
        x = self.op("GatherBlockQuantized", [f"{self.table}.codes", "input_ids", scales],
                    bits=bits, block_size=block, gather_axis=0, quantize_axis=2)
        return self.op("Reshape", [x, self.ints("joined", 0, 0, self.config.n_embd)])

    def head(self, x):
        """(B, T, C) -> logits (B, T, V)."""
        name = self.table if self.config.tied_head else HEAD
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
    whole range -8 to 7 is used. That weight is clipped if this lowers the block's squared error.
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
