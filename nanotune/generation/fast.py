"""Opens a model and makes it fast for generation: packed matrices, one CUDA graph per token.

    model = open_model("out-mine", device, dtype)                   # then stream(model.fast, ...)
    model = for_generation(model, device, dtype, compiled=False)    # for a loaded model
    pack(model, device, dtype)                                      # the matrices only

Packing: a generated token multiplies each matrix by one row per sample, so most time goes into
reading the weights. In half precision the weights are cast once, which halves the bytes. On an x86
CPU oneDNN stores them in its own order, in float32 and, if the CPU supports it, bfloat16. oneDNN
reads them at nearly the memory bandwidth. On an AMD Zen 3, MKL (torch's default for float32)
reached half of that bandwidth for one sample, and a sixth for 10 samples.

Graphs: a step of one token has hundreds of kernels of a few microseconds each, which a GPU runs
faster than Python launches them. The step is recorded once as a CUDA graph and then launched as a
whole, with fixed shapes and memory; torch.compile, if requested, also fuses its kernels. The cost:
each step reads the whole cache, including empty columns. From gpt-fast (PyTorch team 2023).
"""
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.nn import functional as F

from model import GPT, KVCache
from nanotune.attention import attention
from nanotune.device import compile_error
from nanotune.errors import UserError, first_line
from nanotune.formats.checkpoint import check_dtype, load_model
from nanotune.formats.onnx_model import OnnxGPT
from nanotune.generation.generate import read_prompts
from nanotune.head import Head, add_mean, is_half
from nanotune.text.tokenizer import AnyTokenizer
from nanotune.torch_private import can_pack_linear, pack_linear, packed_linear

ALIGNED = 16  # attention on a GPU copies a mask unless its width is a multiple of this


@dataclass
class Model:
    """A loaded model: the model itself, `plain`, and its fastest form for stream(), `fast`."""
    plain: Any
    fast: Any
    tokenizer: AnyTokenizer
    device: torch.device
    dtype: torch.dtype


def open_model(source: str, device: torch.device, dtype: torch.dtype, compiled: bool = False
               ) -> Model:
    """Loads a model from any source of load_model. Raises UserError as load_model does, and if the
    model has no tokenizer or cannot compute in `dtype`."""
    model, tokenizer = load_model(source, device=device, with_onnx=True)
    if tokenizer is None:
        raise UserError(f"{source} has no tokenizer file: put its tokenizer.json into the folder")
    check_dtype(model, dtype)
    tokenizer.encode("")  # loads GPT-2's vocabulary, or fails, before the first prompt
    model.eval()
    return Model(model, for_generation(model, device, dtype, compiled), tokenizer, device, dtype)


def for_generation(model: GPT | OnnxGPT, device: torch.device, dtype: torch.dtype,
                   compiled: bool) -> "GPT | OnnxGPT | Decoder":
    """Returns the fastest form of a model for stream(): packed, and on a GPU recorded as a graph.
    Changes the model, which must be in evaluation mode, in place; it cannot train afterwards."""
    if not isinstance(model, nn.Module):  # an exported ONNX model
        return model
    pack(model, device, dtype, onednn=not compiled)  # Inductor packs by itself
    if not hasattr(model, "new_cache"):  # a T5: its steps have no fixed shapes to record
        return model
    if device.type == "cuda":
        torch.cuda.set_device(device)  # graphs and streams belong to the current device
        return Decoder(model, cuda_graph, compiled)
    return Decoder(model, compiled=True) if compiled else model


# -----------------------------------------------------------------------------
# packed matrices

class PackedLinear(nn.Module):
    """x (..., K) -> x @ weight.T + bias in the weight's dtype, the weight in oneDNN's order."""
    def __init__(self, weight, bias):
        super().__init__()
        self.packed, self.bias, self.dtype = pack_linear(weight), bias, weight.dtype

    def forward(self, x, activation=None):
        return packed_linear(x.to(self.dtype), self.packed, self.bias, activation)


class CastLinear(nn.Module):
    """As PackedLinear, without changing the weight's order."""
    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x):
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class PackedHead(nn.Module):
    """A Head in half precision; `linear_type` is the class of the layer that multiplies."""
    def __init__(self, head, dtype, linear_type):
        super().__init__()
        weight, self.mean = head.centred(dtype)
        self.product = linear_type(weight, None)

    def forward(self, x):
        return add_mean(self.product(x), x, self.mean)


class PackedBlock(nn.Module):
    """A block of a GPT with packed matrices, written as one function: on a CPU the calls of its 10
    modules take a fifth of a token's time. The activation is fused into c_fc's product."""
    def __init__(self, block, activation):
        super().__init__()
        self.block, self.activation = block, activation
        self.products = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        self.norms = [(norm.normalized_shape, norm.weight, norm.bias, norm.eps)
                      for norm in (block.ln_1, block.ln_2)]

    def forward(self, x, cache=None, mask=None):
        (c_attn, attn_proj, c_fc, mlp_proj), (ln_1, ln_2) = self.products, self.norms
        B, T, C = x.size()
        attn = self.block.attn
        qkv = c_attn.forward(torch.layer_norm(x, *ln_1)).view(B, T, 3, attn.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(attn.layer, k, v)
        y = attention(q.to(k.dtype), k, v, mask, attn.scale)
        x = x + attn_proj.forward(y.transpose(1, 2).reshape(B, T, C))
        return x + mlp_proj.forward(c_fc.forward(torch.layer_norm(x, *ln_2), self.activation))


@torch.no_grad()
def pack(model: GPT | OnnxGPT, device: torch.device, dtype: torch.dtype,
         onednn: bool = True) -> None:
    """Casts the matrices of a model to `dtype`, the dtype of autocast, and with `onednn` packs them
    on an x86 CPU. Replaces one at a time, so memory does not double. A tied head gets its own copy.
    Disables cuDNN's attention for the whole process."""
    if not isinstance(model, nn.Module):  # an exported ONNX model
        return
    # cuDNN makes a new plan for each cache length, which takes longer than a token
    torch.backends.cuda.enable_cudnn_sdp(False)
    onednn = onednn and device.type == "cpu" and can_pack_linear(dtype)
    if dtype == torch.float32 and not onednn:
        return
    linear_type = PackedLinear if onednn else CastLinear

    def replacement(layer):
        if isinstance(layer, Head) and is_half(dtype):
            return PackedHead(layer, dtype, linear_type)
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        return linear_type(layer.weight.detach().to(dtype), bias)

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, replacement(layer))
    if onednn and isinstance(model, GPT):
        blocks = (PackedBlock(block, model.config.activation) for block in model.blocks())
        model.transformer.h = nn.ModuleList(blocks)


# -----------------------------------------------------------------------------
# one step as one graph

class FixedCache:
    """A view of a KVCache with fixed shapes for steps of one token: the token's column is a tensor,
    and attention reads the whole cache with a mask."""
    to_the_end = False

    def __init__(self, cache):
        self.k = cache.k
        # a slice taken inside a compiled step would copy the whole cache
        self.layers = list(zip(cache.k, cache.v))
        self.column = torch.zeros(1, dtype=torch.long, device=cache.k.device)
        self.pad = None if cache.pad is None else cache.pad.clone()

    def place(self, cache):
        """Copies the position and the padding of the cache."""
        self.column.fill_(cache.pos)
        if self.pad is not None:
            self.pad.copy_(cache.pad) if cache.pad is not None else self.pad.zero_()

    def columns(self, T):
        return self.column, self.k.size(3)

    def advance(self, T):
        """Does nothing: Decoder.step advances the cache itself, outside the graph."""

    def append(self, layer, k, v):
        """Writes k, v (B, nh, 1, hs) into the column; returns all keys and values of the layer,
        (B, nh, S, hs) each."""
        for whole, new in zip(self.layers[layer], (k, v)):
            whole.index_copy_(2, self.column, new.to(whole.dtype))
        return self.layers[layer]


class Decoder:
    """A GPT for stream() that records the first step of one token on each cache and replays it for
    later steps. `capture` is cuda_graph, or None to record nothing. With `compiled`, torch.compile
    compiles the step first."""
    def __init__(self, model: GPT, capture: Callable[[Callable], Callable] | None = None,
                 compiled: bool = False) -> None:
        self.model, self.config = model, model.config
        self.capture, self.compiled = capture, compiled
        self.keys, self.replay = None, None  # the recorded step: its cache's keys, its replay

    @property
    def device(self) -> torch.device:
        return self.model.device

    def new_cache(self, batch_size: int, length: int | None = None) -> KVCache:
        return self.model.new_cache(batch_size, length and -(-length // ALIGNED) * ALIGNED)

    def start(self, prompts: Sequence[list[int]], room: int,
              cache: KVCache | None = None) -> tuple[KVCache, torch.Tensor]:
        return read_prompts(self, prompts, room, cache)

    def step(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """As GPT.step: idx (B, T) -> the logits after the last token, (B, V) float32."""
        if idx.size(1) > 1:
            return self.model.step(idx, cache)
        if self.keys is not cache.k:  # reordering to more rows creates new keys
            self.keys, self.replay = cache.k, self.record(idx, cache)
        logits = self.replay(idx)
        cache.advance(1)
        return logits

    def record(self, idx, cache):
        """A function idx (B, 1) -> logits (B, V) that replays a step on the cache."""
        token, fixed = idx.clone(), FixedCache(cache)
        fixed.place(cache)
        model_step = self.model.step
        if self.compiled:
            model_step = compiled_or_plain(model_step, token, fixed)

        def step():
            return model_step(token, fixed)

        replay = self.capture(step) if self.capture else step

        def play(idx):
            token.copy_(idx)
            fixed.place(cache)
            return replay().clone()  # the next replay overwrites these logits
        return play


def compiled_or_plain(step, token, cache):
    """Returns `step` compiled, after one run. The next step overwrites the column that this run
    writes. If compiling fails, warns and returns `step`."""
    compiled = torch.compile(step)
    failed = compile_error(lambda: compiled(token, cache))
    if failed:
        warn_of("torch.compile failed here", failed)
        return step
    return compiled


def warn_of(what, reason):
    print(f"warning: {what} ({reason}); continuing without it: slower, same results",
          file=sys.stderr)


def cuda_graph(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Records step() as a CUDA graph; returns a function that launches it and returns its result.
    If recording fails, warns and returns `step`."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warms up: libraries allocate memory in the first calls
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    try:
        # the outer context restores the stream, which a failed capture does not
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            result = step()
    except RuntimeError as e:
        warn_of("cannot record a CUDA graph", first_line(e))
        return step

    def replay():
        graph.replay()
        return result
    return replay
