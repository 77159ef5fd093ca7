"""GPT-2 and GPT-Neo in one file: the model, its loss, its cache.

Letters in the shape comments:
    B batch   T new tokens in a row   S all tokens in a row, those in the cache included
    C channels (n_embd)   nh heads   hs head size (C / nh)   V vocabulary

References: GPT-2, Radford et al. 2019 and https://github.com/openai/gpt-2; GPT-Neo, Black et al.
2021. Modules have the names of GPT-2 and nanoGPT, so that their checkpoints load.
"""
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanotune.attention import attention, attention_bytes, dropout
from nanotune.errors import UserError
from nanotune.formats import hf, hf_config, hub
from nanotune.generation.generate import read_prompts, stream, take_rows
from nanotune.head import Head, head_bytes, head_chunk, head_loss
from nanotune.text.loader import IGNORED

ACTIVATIONS = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # GPT-2's and GPT-Neo's
    "gelu": F.gelu,                                    # exact: nanoGPT's own checkpoints
}


@dataclass(frozen=True)
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
    tied_head: bool = True            # the head shares the weights of the token embedding
    attn_scale: float | None = None   # None: 1 / sqrt(hs); GPT-Neo: 1
    qkv_bias: bool | None = None      # None: same as bias; GPT-Neo: False
    local_window: int | None = None   # GPT-Neo: odd layers attend to this many last tokens
    doc_end: int | None = None        # attend only within a document, which ends with this id
    takes_pairs: ClassVar[bool] = False  # True for T5: pairs of source and target


class KVCache:
    """The keys and values of all layers for one batch, at most `length` tokens per row.

    `pos` is the number of tokens in the cache. `pad` (B,), if not None, is the number of padding
    tokens that each row begins with; they are masked.
    """
    to_the_end = True  # the new tokens are the last T columns that append() returns

    def __init__(self, config: GPTConfig, batch_size: int, length: int | None = None,
                 device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        length = min(length or config.block_size, config.block_size)
        shape = (config.n_layer, batch_size, config.n_head, length, config.n_embd // config.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.pos, self.pad = 0, None

    @property
    def full(self) -> bool:
        """Returns whether there is no room for another token."""
        return self.pos == self.k.size(3)

    def rewind(self, pos: int) -> None:
        """Keeps the first `pos` tokens and drops the rest, without a copy."""
        self.pos = pos

    def reorder(self, rows: torch.Tensor) -> None:
        """Replaces row i with row rows[i], for beam search; rows (B,)."""
        self.k, self.v = (take_rows(whole, rows, self.pos) for whole in (self.k, self.v))
        self.pad = None if self.pad is None else self.pad[rows]

    def columns(self, T: int) -> tuple[torch.Tensor, int]:
        """Returns the columns of the next T tokens, (T,), and S. Call it before append()."""
        S = self.pos + T
        # views of all layers at once: slicing in each layer takes longer
        self.new = [cached[:, :, :, self.pos:S].unbind(0) for cached in (self.k, self.v)]
        self.whole = [cached[:, :, :, :S].unbind(0) for cached in (self.k, self.v)]
        return torch.arange(self.pos, S, device=self.k.device), S

    def advance(self, T: int) -> None:
        self.pos += T

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        """Writes the new k, v (B, nh, T, hs) of a layer; returns all, (B, nh, S, hs) each."""
        for views, new in zip(self.new, (k, v)):
            views[layer].copy_(new)
        return [views[layer] for views in self.whole]


def attention_mask(query, S, seen=None, to_the_end=True, window=None):
    """Returns a mask (T, S) bool, True if the token in column query[t] may attend to column s; None
    if the causal mask of attention() is enough. `seen` (B, 1, T, S) bool: also apply it.
    `to_the_end`: `query` is the last T columns. `window`: attend to this many last tokens."""
    T = len(query)
    if window is not None and window >= S:
        window = None
    if to_the_end and window is None and (T == 1 or (T == S and seen is None)):
        return seen
    key = torch.arange(S, device=query.device)
    mask = key <= query[:, None]
    mask = mask if window is None else mask & (key > query[:, None] - window)
    return mask if seen is None else mask & seen


def additive(mask, dtype):
    """Converts a bool mask to an additive one: 0 if True, else -inf."""
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), -torch.inf)


def after_padding(pad, query, S):
    """Returns (positions (B, T), mask (B, 1, T, S) bool) of the tokens in columns `query` (T,), if
    the first pad[b] columns of row b are padding."""
    key = torch.arange(S, device=pad.device)
    seen = (key >= pad[:, None])[:, None, None]
    seen = seen | (key == query[:, None])  # padding sees itself: a softmax over no column is NaN
    return (query - pad[:, None]).clamp(min=0), seen


def within_documents(idx, end):
    """Returns (positions (B, T), mask (B, 1, T, T) bool) of packed rows idx (B, T). Tokens
    attend only to their own document; `end` is the last token of each document."""
    ends = idx == end
    document = ends.cumsum(1) - ends.long()
    column = torch.arange(idx.size(1), device=idx.device)
    begin = torch.where(F.pad(ends[:, :-1], (1, 0)), column, 0).cummax(1).values
    return column - begin, (document[:, :, None] == document[:, None])[:, None]


class Linear(nn.Linear):
    """Computes in the dtype of x, or in autocast's, whatever the dtype of its weights."""
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Embedding(nn.Embedding):
    """Skips initialization on the meta device: PyTorch would import its compiler (2 seconds)."""
    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class LayerNorm(nn.LayerNorm):
    """Computes in the dtype of x, whatever the dtype of its gain and bias (FSDP: bfloat16)."""
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
        y = attention(q, k, v, mask, self.scale, self.dropout if self.training else 0.0)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, n_inner, bias=config.bias)
        self.c_proj = Linear(n_inner, config.n_embd, bias=config.bias)
        self.activation, self.dropout = ACTIVATIONS[config.activation], config.dropout

    def forward(self, x):
        x = self.c_proj(self.activation(self.c_fc(x)))
        return dropout(x, self.dropout, self.training)


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


class GPT(nn.Module):
    """A decoder-only transformer. Raises UserError if the config is inconsistent."""
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.activation not in ACTIVATIONS:
            raise UserError(f"activation {config.activation!r}: use {' or '.join(ACTIVATIONS)}")
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=Embedding(config.vocab_size, config.n_embd),
            wpe=Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias),
        ))
        self.lm_head = Head(config.n_embd, config.vocab_size)
        self.recompute = False  # recompute activations in the backward pass, block by block
        self.tie_head()
        if not self.lm_head.weight.is_meta:  # else the weights come from a file
            self.apply(self.init_weights)

    @property
    def family(self) -> str:
        """Returns the name of the model family."""
        return "GPT-2" if self.config.local_window is None else "GPT-Neo"

    @property
    def is_masked(self) -> bool:
        """Returns whether attention in training uses a mask other than the causal one."""
        return self.config.doc_end is not None or self.config.local_window is not None

    def blocks(self) -> Sequence[nn.Module]:
        """Returns the layers, which are sharded and recomputed one at a time."""
        return self.transformer.h

    def tied_names(self) -> dict[str, str]:
        """Returns {parameter name: the name of the same parameter elsewhere}."""
        return {"lm_head.weight": "transformer.wte.weight"} if self.config.tied_head else {}

    def tie_head(self) -> None:
        """Shares the token embedding's weights with the head; to() may have split them."""
        if self.config.tied_head:
            self.lm_head.weight = self.transformer.wte.weight

    def init_weights(self, module):
        """N(0, 0.02); projections to the residual stream are scaled by depth (GPT-2, sec. 2.3)."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):  # apply() visits a block after its parts
            for proj in (module.attn.c_proj, module.mlp.c_proj):
                nn.init.normal_(proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """idx, targets (B, T) -> the loss, in nats *summed* over the targets that are not -1."""
        x = self.hidden(idx).flatten(0, 1)
        return head_loss(x, self.lm_head, targets.flatten(), self.compute_dtype)

    def logits(self, idx: torch.Tensor) -> torch.Tensor:
        """idx (B, T) -> the logits of all positions, (B, T, V), a small GPT's largest tensor."""
        return self.lm_head(self.hidden(idx))

    def start(self, prompts: Sequence[list[int]], room: int,
              cache: KVCache | None = None) -> tuple[KVCache, torch.Tensor]:
        """Returns (cache, logits (B, V)) after B prompts, as generate.read_prompts does."""
        return read_prompts(self, prompts, room, cache)

    def step(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """idx (B, T), the next tokens of each row -> the logits after the last, (B, V) float32."""
        return self.lm_head(self.hidden(idx, cache)[:, -1]).float()

    def hidden(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """idx (B, T) -> the input of the head, (B, T, C); appends to the cache, if given."""
        T = idx.size(1)
        query, S = (torch.arange(T, device=idx.device), T) if cache is None else cache.columns(T)
        pos, seen = query, None
        if cache is not None and cache.pad is not None:
            pos, seen = after_padding(cache.pad, query, S)
        elif cache is None and self.config.doc_end is not None:
            pos, seen = within_documents(idx, self.config.doc_end)
        to_the_end, local = cache is None or cache.to_the_end, self.config.local_window
        dtype = self.compute_dtype if cache is None else cache.k.dtype

        def mask_for(window=None):
            mask = attention_mask(query, S, seen, to_the_end, window)
            # each layer would convert a bool mask and keep the result for backward
            return None if mask is None else additive(mask, dtype)

        whole = mask_for()
        masks = (whole, whole if local is None else mask_for(local))  # of even and odd layers
        x = self.transformer.wte(idx).to(self.stream_dtype) + self.transformer.wpe(pos)
        x = dropout(x, self.config.dropout, self.training)  # (B, T, C)
        for layer, block in enumerate(self.transformer.h):
            mask = masks[layer % 2]
            if self.recompute and torch.is_grad_enabled():
                # checkpoint restores the random state: dropout is the same
                x = checkpoint(block, x, cache, mask, use_reentrant=False)
            else:
                x = block(x, cache, mask)
        if cache is not None:
            cache.advance(T)
        return self.transformer.ln_f(x)

    def logits_at(self, idx: torch.Tensor, targets: torch.Tensor) -> Iterator[torch.Tensor]:
        """idx, targets (B, T) -> chunks (n, V) float32 of the logits whose target is not -1."""
        x = self.hidden(idx)[targets != IGNORED]
        rows = head_chunk(x.device.type, torch.float32).rows
        return (self.lm_head(part).float() for part in x.split(rows))

    def num_params(self) -> int:
        """Returns the number of parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, counted: float = 1.0) -> float:
        """Returns the FLOPs of forward and backward per token at full context: 6 N + 12 L C T, N
        without the position embeddings (PaLM, Chowdhery et al. 2022, app. B). 4 N for frozen
        weights, which have no gradient. `counted` is the share of tokens with a target: the head
        computes only these."""
        c, head = self.config, self.lm_head.weight
        lookups = {id(head), id(self.transformer.wte.weight), id(self.transformer.wpe.weight)}
        params = [(p, 1.0) for p in self.parameters() if id(p) not in lookups] + [(head, counted)]
        products = sum((6 if p.requires_grad else 4) * p.numel() * share for p, share in params)
        return products + 12 * c.n_layer * c.n_embd * c.block_size

    def activation_bytes(self, batch_size: int, device_type: str,
                         dtype: torch.dtype) -> tuple[int, int]:
        """Returns (bytes that the forward pass keeps for the backward, bytes of temporaries).

        Per token and block it keeps: the inputs of two norms, in float32; their outputs, q, k, v
        and attention's output; the MLP's inner layer before and after the activation. It also keeps
        dropout's masks, attention's weights on a CPU, and the matrices that autocast converted.
        With recompute it keeps only the inputs of the blocks.
        """
        c, e = self.config, dtype.itemsize
        inner, tokens = c.n_inner or 4 * c.n_embd, batch_size * c.block_size
        token = 2 * 4 * c.n_embd + 6 * e * c.n_embd + 2 * e * inner
        token += 2 * c.n_embd * (c.dropout > 0)
        if device_type == "cpu":
            token += attention_bytes(c.n_head, c.block_size, dtype) // c.block_size
        cast = sum(p.numel() * e for p in self.transformer.h[0].parameters()
                   if p.dim() >= 2 and p.dtype != dtype)
        backward = tokens * (2 * e * inner + 2 * 4 * c.n_embd)  # gradients inside a block
        if self.recompute:
            return c.n_layer * 4 * c.n_embd * tokens, token * tokens + cast + backward
        return c.n_layer * (token * tokens + cast), backward

    def head_bytes(self, batch_size: int, device_type: str, dtype: torch.dtype) -> tuple[int, int]:
        """See head.head_bytes; for a batch of full rows."""
        rows = batch_size * self.config.block_size
        return head_bytes(self.lm_head.weight, rows, device_type, dtype)

    def param_groups(self, weight_decay: float) -> list[dict]:
        """Returns AdamW's groups: decay for matrices and embeddings, none for biases and gains."""
        params = [p for p in self.parameters() if p.requires_grad]
        return [{"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
                {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]

    def crop_block_size(self, block_size: int) -> None:
        """Keeps the first block_size position embeddings. Raises UserError if there are fewer."""
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

    def crop_vocab(self, n_vocab: int) -> None:
        """Keeps the first n_vocab rows of embedding and head; the others are padding."""
        self.config = replace(self.config, vocab_size=n_vocab)
        for module in (self.transformer.wte, self.lm_head):
            module.weight = nn.Parameter(module.weight.detach()[:n_vocab].clone())
        self.transformer.wte.num_embeddings = self.lm_head.out_features = n_vocab
        self.tie_head()

    def new_cache(self, batch_size: int, length: int | None = None) -> KVCache:
        return KVCache(self.config, batch_size, length, self.device, self.compute_dtype)

    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, **options: Any) -> torch.Tensor:
        """idx (B, T) -> idx and its continuation, (B, T + new), as nanoGPT does. For options
        see stream()."""
        new = stream(self, idx.tolist(), max_new_tokens, temperature, top_k, **options)
        return torch.cat([idx] + [token[:, None] for token in new], dim=1)

    @property
    def device(self) -> torch.device:
        return self.transformer.ln_f.weight.device

    @property
    def stream_dtype(self) -> torch.dtype:
        """Returns the dtype of the residual stream: float32, as set_dtype() casts only matrices."""
        return self.transformer.ln_f.weight.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """Returns the dtype of matrix products: autocast's if enabled, else stream_dtype."""
        autocast = torch.is_autocast_enabled(self.device.type)
        return torch.get_autocast_dtype(self.device.type) if autocast else self.stream_dtype

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Casts the matrices and embeddings. The vectors, a thousandth of the parameters, stay in
        float32: a norm's gain, near 1, would lose most of an update of 1e-5."""
        for param in self.parameters():
            if param.dim() >= 2:
                param.data = param.data.to(dtype)

    @classmethod
    def empty(cls, config: GPTConfig, device: str | torch.device = "cpu",
              dtype: torch.dtype = torch.float32) -> "GPT":
        """Returns a GPT with uninitialised weights, its matrices in `dtype`."""
        with torch.device("meta"):
            model = cls(config)
        model.set_dtype(dtype)
        for module in model.modules():  # to_empty() would import sympy (1 second)
            for name, p in list(module.named_parameters(recurse=False)):
                memory = torch.empty(p.shape, dtype=p.dtype, device=device)
                setattr(module, name, nn.Parameter(memory))
        model.tie_head()
        return model

    @classmethod
    def from_pretrained(cls, name: str, dropout: float = 0.0, device: str | torch.device = "cpu",
                        dtype: torch.dtype = torch.float32) -> "GPT":
        """Loads a hub id ('gpt2', 'EleutherAI/gpt-neo-125m', ...) or a Hugging Face folder. Returns
        a GPT in training mode, its matrices in `dtype`. Raises UserError if the files are missing,
        damaged or of another architecture."""
        config_file, weight_files = hub.find_pretrained(name)
        fields = hf_config.config_from_hf(hub.read_json(config_file), name)
        fields["tied_head"] = hf.head_is_tied(weight_files, fields["tied_head"])
        model = cls.empty(GPTConfig(**fields, dropout=dropout), device, dtype)
        hf.fill_parameters(dict(model.named_parameters()), asdict(model.config), weight_files)
        return model
