"""A model made fast for generation, from outside: packed matrices, one graph a token.

    model = for_generation(model, device, dtype, compiled=False)    # then stream(model, ...)
    pack(model, device, dtype)                                      # the matrices only

Packing: a generated token multiplies each matrix by one row per sample, so that the time goes into
reading the weights. In half precision they are cast once: half the bytes are kept and read. In
float32 on an x86 CPU oneDNN lays them out in its own order, and reads them at the speed of memory;
torch's default, MKL, reached half of it on an AMD Zen 3, and a sixth for 10 samples.

Graphs: a step of one token has hundreds of kernels of a few microseconds each, which Python
launches slower than a GPU runs them. Such a step always has the same shapes and the same memory: it
is recorded once, as a CUDA graph, and from then on launched as a whole. torch.compile, if asked
for, also fuses its kernels. The cost: each step reads the whole cache, empty columns too. The idea
is that of gpt-fast (PyTorch team 2023).
"""
import sys
from functools import partial

import torch
import torch.nn as nn

from model import Linear
from nanotune.errors import first_line
from nanotune.generation.generate import read_prompts

ALIGNED = 16  # attention on a GPU wants masks of a multiple of so many columns, or copies them


def for_generation(model, device, dtype, compiled):
    """What stream() runs fastest on of a model in evaluation mode, which is changed in place and
    never trains again: packed matrices, steps of one token recorded on a GPU, or compiled."""
    if not isinstance(model, nn.Module):  # an ONNX file's
        return model
    if not compiled or dtype != torch.float32:  # Inductor has its own layout for float32
        pack(model, device, dtype)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # graphs and streams are the current one's
        return Decoder(model, cuda_graph, compiled)
    return Decoder(model, compiled=True) if compiled else model


# -----------------------------------------------------------------------------
# packed matrices

class PackedLinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def cast(linear, dtype):
    """The layer in the dtype that autocast would cast it to at each use."""
    linear.weight = nn.Parameter(linear.weight.detach())  # a tied head's own from here on
    return linear.to(dtype)


def can_pack(device, dtype):
    """The two operators are those that torch.compile uses on x86; no public name leads to them,
    and so they are looked for."""
    return (device.type == "cpu" and dtype == torch.float32
            and torch.backends.cpu.get_cpu_capability().startswith("AVX")
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"))


@torch.no_grad()
def pack(model, device, dtype):
    """Replaces the matrices of a GPT, one at a time, so that memory does not double: in half
    precision (under autocast) by cast ones, in float32 on an x86 CPU by packed ones; leaves any
    other as it is. A tied head is there twice then: the embedding looks its rows up in the old.
    Switches cuDNN's attention off, for the whole process."""
    if not isinstance(model, nn.Module):  # an ONNX file's
        return
    # cuDNN plans anew, for longer than a token takes, for each length that a cache comes to
    torch.backends.cuda.enable_cudnn_sdp(False)
    if dtype != torch.float32:
        made = partial(cast, dtype=dtype)
    elif can_pack(device, dtype):
        made = PackedLinear
    else:
        return
    for parent in [module for module in model.modules() if not isinstance(module, Linear)]:
        for name in [name for name, layer in parent.named_children() if isinstance(layer, Linear)]:
            setattr(parent, name, made(getattr(parent, name)))


# -----------------------------------------------------------------------------
# one step as one graph

class FixedCache:
    """A KVCache as a step of one token sees it, with shapes that stay: the column that the token
    goes to is a tensor, and what it looks at is the whole cache under a mask."""
    to_the_end = False

    def __init__(self, cache):
        self.k = cache.k
        # views: a slice that is taken of the whole in a compiled step copies the whole
        self.layers = list(zip(cache.k, cache.v))
        self.column = torch.zeros(1, dtype=torch.long, device=cache.k.device)
        self.pad = None if cache.pad is None else cache.pad.clone()

    def place(self, cache):
        """Makes the next token go where it does in the cache."""
        self.column.fill_(cache.pos)
        if self.pad is not None:
            self.pad.copy_(cache.pad) if cache.pad is not None else self.pad.zero_()

    def columns(self, T):
        return self.column, self.k.size(3)

    def advance(self, T):
        """Nothing: the cache itself moves on, outside of what is recorded."""

    def append(self, layer, k, v):
        """Writes (B, nh, 1, hs) into the column; returns the whole, (B, nh, S, hs) each."""
        for whole, new in zip(self.layers[layer], (k, v)):
            whole.index_copy_(2, self.column, new.to(whole.dtype))
        return self.layers[layer]


class Decoder:
    """A GPT for stream(). Its calls of one token are recorded at the first of them, for each cache
    anew, and played back from then on; all others are the model's own.

    capture(step) is a function that does what step() does, on the same memory: cuda_graph; None
    leaves the step as it is. compiled has torch.compile make one function of it before.
    """
    def __init__(self, model, capture=None, compiled=False):
        self.model, self.config = model, model.config
        self.capture, self.compiled = capture, compiled
        self.cache, self.play = None, None  # the cache that was recorded for, and its step

    @property
    def device(self):
        return self.model.device

    def new_cache(self, batch_size, length=None):
        return self.model.new_cache(batch_size, length and -(-length // ALIGNED) * ALIGNED)

    def start(self, prompts, room, cache=None):
        return read_prompts(self, prompts, room, cache)

    def step(self, idx, cache):
        if idx.size(1) > 1:
            return self.model.step(idx, cache)
        if self.cache is not cache:
            self.cache, self.play = cache, self.record(idx, cache)
        logits = self.play(idx)
        cache.advance(1)
        return logits

    def record(self, idx, cache):
        """The function idx (B, 1) -> logits (B, V) that plays a step back on the cache."""
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
            return replay().clone()  # the next logits come where these are
        return play


def compiled_or_plain(step, token, cache):
    """`step` compiled, and tried once: it writes the same column that the real step then writes
    again. If that fails, warns and returns `step` itself."""
    compiled = torch.compile(step)
    try:
        compiled(token, cache)
    except Exception as e:  # Dynamo, Inductor, Triton and the C++ compiler each raise their own
        warn_of("torch.compile failed here", e)
        return step
    return compiled


def warn_of(what, error):
    print(f"warning: {what} ({first_line(error)}); going on without, slower but the same",
          file=sys.stderr)


def cuda_graph(step):
    """A CUDA graph of step(), as a function that launches it and returns what step() did. Where
    there is none to be had, says so and returns step itself."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries allocate at first calls
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    try:
        # the outer one restores the stream, which a capture that fails leaves behind
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            result = step()
    except RuntimeError as e:
        warn_of("no CUDA graph of a step", e)
        return step

    def replay():
        graph.replay()
        return result
    return replay
