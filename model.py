"""GPT-2 and GPT-Neo in one file: the model, its loss, its cache.

Letters in the shape comments:
    B batch   T time (tokens in a row)   S tokens seen so far, cache included
    C channels (n_embd)   nh heads   hs head size (C / nh)   V vocabulary

References: GPT-2, Radford et al. 2019 and https://github.com/openai/gpt-2; GPT-Neo, Black et al.
2021; the modules' names are GPT-2's and nanoGPT's, so that their files load.
"""
import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanotune.errors import UserError
from nanotune.formats import hf, hub
from nanotune.generation.generate import stream
from nanotune.text.loader import IGNORED


class HeadChunk(NamedTuple):
    """How much the head works on at a time."""
    rows: int          # of logits that exist at once, in float32; in half precision twice as many
    softmax_rows: int  # of those together through the softmax's passes: a CPU's cache holds them
    ids: int           # of the vocabulary in one matrix product


ALL = 2**31  # more than there are
# on a CPU 256 * V * 4 bytes = 51 MB for GPT-2; on a GPU, of whichever make, as many as keep it busy
HEAD_CHUNK = {"cpu": HeadChunk(256, 16, 2048), "cuda": HeadChunk(1024, ALL, ALL)}


def head_chunk(device_type, dtype):
    rows, softmax_rows, ids = HEAD_CHUNK.get(device_type, HEAD_CHUNK["cuda"])
    if torch.compiler.is_compiling():  # Inductor makes one pass of several
        softmax_rows = ids = ALL
    return HeadChunk(rows * 4 // dtype.itemsize, softmax_rows, ids)


ACTIVATIONS = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # GPT-2's and GPT-Neo's
    "gelu": F.gelu,                                    # exact: nanoGPT's own checkpoints have it
}


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304           # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True                 # in LayerNorms and Linears
    activation: str = "gelu_tanh"
    n_inner: int | None = None        # width of the MLP; None: 4 * n_embd
    norm_eps: float = 1e-5
    tied_head: bool = True            # the head is the token embedding
    attn_scale: float | None = None   # None: 1 / sqrt(hs); GPT-Neo: 1
    qkv_bias: bool | None = None      # None: as bias; GPT-Neo: False
    local_window: int | None = None   # GPT-Neo: odd layers see the last so many tokens
    doc_end: int | None = None        # tokens see their own document only, which this id ends


class KVCache:
    """Keys and values of every layer for one batch, filled from position 0.

    `pos` is the number of tokens that stand in it. Reset it to start over without allocating.
    `pad`, where it is set, (B,), is how many of a row's first tokens are filling, which nothing
    looks at: so prompts of several lengths, flush right, go through as one batch.
    """
    to_the_end = True  # what append() returns ends with the tokens that it was given

    def __init__(self, config, batch_size, length=None, device=None, dtype=None):
        length = min(length or config.block_size, config.block_size)
        hs = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.n_head, length, hs)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.pos, self.pad = 0, None

    def columns(self, T):
        """The columns that the next T tokens go to, (T,), and how many are looked at then, S."""
        return torch.arange(self.pos, self.pos + T, device=self.k.device), self.pos + T

    def advance(self, T):
        self.pos += T

    def append(self, layer, k, v):
        """Writes (B, nh, T, hs) behind what is there; returns all, (B, nh, S, hs) each."""
        end = self.pos + k.size(2)
        self.k[layer, :, :, self.pos:end] = k
        self.v[layer, :, :, self.pos:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def attention_mask(row, S, seen=None, to_the_end=True, window=None):
    """(T, S) bool, True where the tokens that stand in the columns `row` (T,) of S may look; with
    `seen`, (B, 1, T, S) bool, only where that is True too; None where causal alone will do.
    to_the_end says that they are the last T of S."""
    T = len(row)
    if window is not None and window >= S:
        window = None
    if to_the_end and window is None and (T == 1 or (T == S and seen is None)):
        return seen
    column = torch.arange(S, device=row.device)
    mask = column <= row[:, None]
    mask = mask if window is None else mask & (column > row[:, None] - window)
    return mask if seen is None else mask & seen


def additive(mask, dtype):
    """A bool mask as what attention adds: 0 where it is True, else -inf."""
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), -torch.inf)


def beside_filling(pad, row, S):
    """Rows with `pad` (B,) tokens of filling at their left, the tokens in the columns `row` (T,) of
    each: their positions, (B, T), and what they may look at of S, (B, 1, T, S) bool."""
    column = torch.arange(S, device=pad.device)
    seen = (column >= pad[:, None])[:, None, None]
    # a filling token sees itself: a softmax over nothing would be NaN
    seen = seen | (column == row[:, None])
    return (row - pad[:, None]).clamp(min=0), seen


def within_documents(idx, end):
    """The same for packed rows, idx (B, T), whose tokens are to see their own document alone; the
    token `end` is a document's last."""
    ends = idx == end
    document = ends.cumsum(1) - ends.long()
    column = torch.arange(idx.size(1), device=idx.device)
    begin = torch.where(F.pad(ends[:, :-1], (1, 0)), column, 0).cummax(1).values
    return column - begin, (document[:, :, None] == document[:, None])[:, None]


class Linear(nn.Linear):
    """Computes in the dtype of x, or in autocast's, whichever dtype its weights are kept in."""
    def forward(self, x):
        if self.weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Embedding(nn.Embedding):
    """Draws nothing without memory: PyTorch then imports its compiler, which takes 2 seconds."""
    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class LayerNorm(nn.LayerNorm):
    """Computes in the dtype of x, whichever dtype its gain and bias are in (with FSDP bfloat16)."""
    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        if config.n_embd % config.n_head:
            raise UserError(f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head}")
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=qkv_bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.layer, self.n_head = layer, config.n_head
        self.dropout, self.scale = config.dropout, config.attn_scale

    def forward(self, x, cache=None, mask=None):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
            q = q.to(k.dtype)
        # (B, nh, T, hs) x (B, nh, S, hs) -> (B, nh, T, hs)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, n_inner, bias=config.bias)
        self.c_proj = Linear(n_inner, config.n_embd, bias=config.bias)
        self.activation, self.dropout = ACTIVATIONS[config.activation], config.dropout

    def forward(self, x):
        x = self.c_proj(self.activation(self.c_fc(x)))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        norm = partial(LayerNorm, config.n_embd, eps=config.norm_eps, bias=config.bias)
        self.ln_1 = norm()
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = norm()
        self.mlp = MLP(config)

    def forward(self, x, cache=None, mask=None):
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))


class HeadLoss(torch.autograd.Function):
    """Sum of cross-entropies of x @ weight.T, a few rows of logits at a time.

    The gradients are worked out while a chunk's logits are at hand, (p - 1[target]) times the
    other factor, so that the logits of all rows, the largest tensor of a small GPT by far, never
    exist and no softmax is computed twice. The idea is that of Liger Kernel, Hsu et al. 2024.
    """
    @staticmethod
    def forward(ctx, x, weight, targets, dtype, with_grad):  # x (N, C), weight (V, C), targets (N,)
        size = head_chunk(x.device.type, dtype)
        # weights kept in less than dtype are cast in parts, where it goes by parts, each time anew
        in_parts = weight.dtype.itemsize < dtype.itemsize and len(weight) > size.ids
        w = weight if in_parts else weight.to(dtype)
        loss = torch.zeros((), device=x.device)
        dx = torch.empty_like(x) if with_grad else None
        dw = (torch.zeros_like(weight, dtype=torch.float32)
              if with_grad and ctx.needs_input_grad[1] else None)  # none where it is frozen
        for begin in range(0, len(x), size.rows):
            rows = slice(begin, begin + size.rows)
            xc = x[rows].to(dtype)                # (n, C)
            logits = times_head(xc, w, size.ids)  # (n, V)
            for some, target in zip(logits.split(size.softmax_rows),
                                    targets[rows].split(size.softmax_rows)):
                loss += cross_entropy_(some, target, with_grad)
            if with_grad:  # they are p - 1[target] now
                dx[rows] = times_head_back(logits, w, size.ids)
            if dw is not None:
                add_product(dw, logits, xc, size.ids)
        ctx.dx, ctx.dw = dx, dw
        return loss

    @staticmethod
    def backward(ctx, grad):
        assert ctx.dx is not None, "a second backward of one loss"
        dx, dw = ctx.dx.mul_(grad), None if ctx.dw is None else ctx.dw.mul_(grad)
        ctx.dx = ctx.dw = None  # scaled in place, for want of memory: good for one backward
        return dx, dw, None, None, None


def cross_entropy_(logits, targets, with_grad):
    """logits (n, V), targets (n,) -> the sum of their cross-entropies, worked out in float32;
    with_grad leaves its gradient, p - 1[target], in the place of the logits."""
    counts = (targets != IGNORED).float()[:, None]
    targets = targets.clamp(min=0)[:, None]
    p = logits.float()
    highest, at_target = p.amax(-1, keepdim=True), p.gather(-1, targets)
    p = p.sub_(highest).exp_()
    total = p.sum(-1, keepdim=True)
    if with_grad:
        p.mul_(counts / total).scatter_add_(-1, targets, -counts)
        if p.dtype != logits.dtype:
            logits.copy_(p)
    return ((total.log() + highest - at_target) * counts).sum()


def times_head(x, w, span):
    """x (n, C) @ w.T -> (n, V), in the dtype of x, `span` ids at a time: so a w (V, C) of another
    dtype need not be cast whole, and MKL is faster than with all of them."""
    if len(w) <= span:
        return x @ w.t()
    out = x.new_empty(len(x), len(w))
    for columns, part in zip(out.split(span, 1), w.split(span)):
        columns.copy_(x @ part.to(x.dtype).t())
    return out


def times_head_back(p, w, span):
    """p (n, V) @ w -> (n, C), likewise where the dtypes differ."""
    if w.dtype == p.dtype:
        return p @ w
    return sum(some @ part.to(p.dtype) for some, part in zip(p.split(span, 1), w.split(span)))


def add_product(dw, p, x, span):
    """dw (V, C) += p.T @ x, where dw is in float32; for p and x in half precision `span` ids at a
    time, since PyTorch makes a float32 copy of what it adds to a float32."""
    if p.dtype == dw.dtype:
        dw.addmm_(p.t(), x)
        return
    scale = 16 if p.dtype == torch.float16 else 1  # sums over rows beyond 65504 would overflow
    x = x / scale
    for part, some in zip(dw.split(span), p.split(span, 1)):
        part.add_(some.t() @ x, alpha=scale)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.activation not in ACTIVATIONS:
            raise UserError(f"activation {config.activation!r}: use {' or '.join(ACTIVATIONS)}")
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=Embedding(config.vocab_size, config.n_embd),
            wpe=Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias),
        ))
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.recompute = False  # in the backward pass, a block at a time, instead of keeping all
        self.tie_head()
        if not self.lm_head.weight.is_meta:  # else the weights come from a file
            self.apply(self.init_weights)

    def tie_head(self):
        """Makes the head the token embedding, again too where a change of device split them."""
        if self.config.tied_head:
            self.lm_head.weight = self.transformer.wte.weight

    def init_weights(self, module):
        """N(0, 0.02); what adds to the residual stream is scaled by its depth (GPT-2, 2.3)."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):  # apply() comes to a block after its parts
            for proj in (module.attn.c_proj, module.mlp.c_proj):
                nn.init.normal_(proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) -> logits (B, T, V); with targets (B, T) the loss *summed* over those that
        are not -1; with a cache the logits of the last position, (B, V), and the cache filled."""
        x = self.hidden(idx, cache)
        if cache is not None:
            return self.lm_head(x[:, -1]).float()
        if targets is None:
            return self.lm_head(x)
        return self.head_loss(x.flatten(0, 1), targets.flatten())

    def hidden(self, idx, cache=None):
        """idx (B, T) -> what the head reads, (B, T, C); the cache, if there is one, is filled."""
        T = idx.size(1)
        row, S = (torch.arange(T, device=idx.device), T) if cache is None else cache.columns(T)
        pos, seen = row, None
        if cache is not None and cache.pad is not None:
            pos, seen = beside_filling(cache.pad, row, S)
        elif cache is None and self.config.doc_end is not None:
            pos, seen = within_documents(idx, self.config.doc_end)
        to_the_end, local = cache is None or cache.to_the_end, self.config.local_window
        dtype = self.compute_dtype if cache is None else cache.k.dtype

        def mask_for(window=None):
            mask = attention_mask(row, S, seen, to_the_end, window)
            # of a bool mask attention makes an additive one, and training keeps it, in each layer
            return None if mask is None else additive(mask, dtype)

        whole = mask_for()
        masks = (whole, whole if local is None else mask_for(local))  # of even and odd layers
        x = self.transformer.wte(idx).to(self.stream_dtype) + self.transformer.wpe(pos)
        x = self.transformer.drop(x)  # (B, T, C)
        for layer, block in enumerate(self.transformer.h):
            mask = masks[layer % 2]
            if self.recompute and torch.is_grad_enabled():
                # draws the same dropout again
                x = checkpoint(block, x, cache, mask, use_reentrant=False)
            else:
                x = block(x, cache, mask)
        if cache is not None:
            cache.advance(T)
        return self.transformer.ln_f(x)

    def head_loss(self, x, targets):
        """x (N, C), targets (N,) -> the loss summed over the targets that are not -1."""
        device = x.device.type
        # elsewhere the indexing is a sync point, and compiled graphs want fixed shapes
        if device == "cpu" and not torch.compiler.is_compiling():
            counts = targets != IGNORED  # of a prompt and its short answer, a tenth may count:
            x, targets = x[counts], targets[counts]  # the head, most of a small GPT, skips the rest
        dtype = self.compute_dtype
        with torch.autocast(device, enabled=False):  # the dtype is said, chunk by chunk
            return HeadLoss.apply(x, self.lm_head.weight, targets, dtype, torch.is_grad_enabled())

    def logits_at(self, idx, where):
        """idx, where (B, T) -> logits of the positions where it is True, in order, (n, V) float32:
        yielded some rows at a time, since B x T x V of them would be the largest tensor by far."""
        x = self.hidden(idx)[where]
        for rows in x.split(head_chunk(x.device.type, torch.float32).rows):
            yield self.lm_head(rows).float()

    def num_params(self):
        """The number of parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Floating-point operations of forward and backward for one token at full context:
        6 N + 12 L C T, N without the position embeddings (PaLM, Chowdhery et al. 2022, app. B)."""
        c = self.config
        n = self.num_params() - self.transformer.wpe.weight.numel()
        if not c.tied_head:  # a tied one serves as the head, where it is a product
            n -= self.transformer.wte.weight.numel()
        return 6 * n + 12 * c.n_layer * c.n_embd * c.block_size

    def param_groups(self, weight_decay):
        """AdamW's two groups: decay for matrices and embeddings, none for biases and gains."""
        params = [p for p in self.parameters() if p.requires_grad]
        return [{"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
                {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]

    def crop_block_size(self, block_size):
        """Keeps the first block_size position embeddings: a shorter context takes less memory."""
        if block_size < 1:
            raise UserError(f"block_size={block_size} must be at least 1")
        if block_size > self.config.block_size:
            raise UserError(f"block_size={block_size} is more than the {self.config.block_size} "
                            "positions that the model was trained with; lower --block_size")
        self.config = replace(self.config, block_size=block_size)
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight.detach()[:block_size].clone(),
                                  requires_grad=wpe.weight.requires_grad)
        wpe.num_embeddings = block_size

    def new_cache(self, batch_size, length=None):
        device = self.transformer.ln_f.weight.device
        return KVCache(self.config, batch_size, length, device, self.compute_dtype)

    def generate(self, idx, max_new_tokens, **options):
        """idx (B, T) and what follows it, (B, T + new); options as for stream()."""
        new = list(stream(self, idx, max_new_tokens, **options))
        return torch.cat([idx] + [token[:, None] for token in new], dim=1)

    @property
    def stream_dtype(self):
        """The residual stream's: that of the vectors, which set_dtype leaves in float32."""
        return self.transformer.ln_f.weight.dtype

    @property
    def compute_dtype(self):
        """What products are computed in: autocast's dtype where it is on, else the stream's."""
        device = self.transformer.ln_f.weight.device.type
        autocast = torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if autocast else self.stream_dtype

    def set_dtype(self, dtype):
        """Keeps the matrices and embeddings in `dtype`. The vectors, a thousandth of the whole,
        stay in float32, since a norm's gain, near 1, would lose most of an update of 1e-5."""
        for param in self.parameters():
            if param.dim() >= 2:
                param.data = param.data.to(dtype)

    @classmethod
    def empty(cls, config, device="cpu", dtype=torch.float32):
        """A GPT whose weights are allocated, not initialised: for what fills each of them."""
        with torch.device("meta"):
            model = cls(config)
        model.set_dtype(dtype)
        for module in model.modules():  # not to_empty(), which imports sympy, a second
            for name, p in list(module.named_parameters(recurse=False)):
                memory = torch.empty(p.shape, dtype=p.dtype, device=device)
                setattr(module, name, nn.Parameter(memory))
        model.tie_head()
        return model

    @classmethod
    def from_pretrained(cls, name, block_size=None, dropout=0.0, device="cpu",
                        dtype=torch.float32):
        """A GPT with the weights of a hub id ('gpt2', 'EleutherAI/gpt-neo-125m', ...) or of a
        local Hugging Face folder, stored in any dtype, in training mode, its matrices in `dtype`.

        A smaller block_size crops the position embeddings. Raises UserError where the files
        cannot be had, hold another architecture, or do not fit it tensor for tensor.
        """
        config_file, weight_files = hub.find_pretrained(name)
        fields = hf.config_from_hf(hub.read_json(config_file), name)
        fields["tied_head"] = hf.head_is_tied(weight_files, fields["tied_head"])
        config = GPTConfig(**fields, dropout=dropout)
        model = cls.empty(config, device, dtype)
        hf.fill_parameters(dict(model.named_parameters()), asdict(config), weight_files)
        if block_size is not None:
            model.crop_block_size(block_size)
        return model
