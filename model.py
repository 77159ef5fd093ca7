"""GPT-2 and GPT-Neo in one file: the model, its loss, its cache.

Letters in the shape comments:
    B batch   T time (tokens in a row)   S tokens seen so far, cache included
    C channels (n_embd)   nh heads   hs head size (C / nh)   V vocabulary

References: GPT-2, Radford et al. 2019 and https://github.com/openai/gpt-2; GPT-Neo, Black et al.
2021; the modules' names are GPT-2's and nanoGPT's, so that their files load.
"""
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanotune.errors import UserError
from nanotune.formats import hf, hub
from nanotune.generation.generate import read_prompts, stream
from nanotune.head_loss import head_bytes, head_chunk, head_loss
from nanotune.text.loader import IGNORED

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

    `pos` is the number of tokens in it. `pad`, if set, (B,), is how many of a row's first tokens
    are padding, which is masked: so prompts of several lengths are read as one batch.
    """
    to_the_end = True  # the new tokens are the last T columns that append() returns

    def __init__(self, config, batch_size, length=None, device=None, dtype=None):
        length = min(length or config.block_size, config.block_size)
        hs = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.n_head, length, hs)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.pos, self.pad = 0, None

    @property
    def full(self) -> bool:
        """Whether there is no room for another token."""
        return self.pos == self.k.size(3)

    def rewind(self, pos: int) -> None:
        """Drops what comes after the first `pos` tokens; nothing is allocated again."""
        self.pos = pos

    def reorder(self, rows: torch.Tensor) -> None:
        """Makes row i continue what row rows[i] holds, rows (B,): a beam that goes on."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.pad = None if self.pad is None else self.pad[rows]

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

    @property
    def family(self) -> str:
        """What it is called."""
        return "GPT-2" if self.config.local_window is None else "GPT-Neo"

    @property
    def is_masked(self) -> bool:
        """Whether attention in training gets a mask beside causality."""
        return self.config.doc_end is not None or self.config.local_window is not None

    def blocks(self) -> Sequence[nn.Module]:
        """The layers, alike in size: what is sharded, and recomputed, one at a time."""
        return self.transformer.h

    def tied_names(self) -> dict[str, str]:
        """{name: the name of the same parameter elsewhere}."""
        return {"lm_head.weight": "transformer.wte.weight"} if self.config.tied_head else {}

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

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """idx, targets (B, T) -> the loss in nats, *summed* over the targets that are not -1."""
        x = self.hidden(idx).flatten(0, 1)
        return head_loss(x, self.lm_head.weight, targets.flatten(), self.compute_dtype)

    def logits(self, idx: torch.Tensor) -> torch.Tensor:
        """idx (B, T) -> logits of all positions, (B, T, V): the largest tensor of a small GPT."""
        return self.lm_head(self.hidden(idx))

    def start(self, prompts: list[list[int]], room: int, cache: KVCache | None = None):
        """(cache, logits (B, V)) after B prompts; the cache has room for `room` tokens more, as far
        as the context goes. One that is given is used again."""
        return read_prompts(self, prompts, room, cache)

    def step(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """idx (B, T), the next tokens of each row -> logits (B, V) after the last of them."""
        return self.lm_head(self.hidden(idx, cache)[:, -1]).float()

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

    def logits_at(self, idx: torch.Tensor, targets: torch.Tensor) -> Iterator[torch.Tensor]:
        """idx, targets (B, T) -> logits of the positions whose target is not -1, in order, (n, V)
        float32: yielded some rows at a time."""
        x = self.hidden(idx)[targets != IGNORED]
        rows = head_chunk(x.device.type, torch.float32).rows
        return (self.lm_head(part).float() for part in x.split(rows))

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

    def activation_bytes(self, batch_size: int, device_type: str,
                         dtype: torch.dtype) -> tuple[int, int]:
        """(bytes that the forward pass keeps for the backward, bytes that it works in besides).

        Of a token in a block, with width C, inner width I and e bytes per number, it keeps the
        inputs of two norms in float32; their outputs, q, k, v and attention's output, e each; the
        MLP's inner layer before and after the activation. Dropout adds its masks, and autocast the
        matrices in the dtype of the products. With recompute only the inputs of the blocks are
        kept, and one block at a time is there as a whole.
        """
        c, e = self.config, dtype.itemsize
        inner, tokens = c.n_inner or 4 * c.n_embd, batch_size * c.block_size
        token = 2 * 4 * c.n_embd + 6 * e * c.n_embd + 2 * e * inner
        if c.dropout and device_type == "cpu":  # attention then writes out all pairs, thrice
            token += 4 * e * c.n_embd + 12 * c.n_head * c.block_size
        elif c.dropout:
            token += 2 * c.n_embd
        cast = sum(p.numel() * e for p in self.transformer.h[0].parameters()
                   if p.dim() >= 2 and p.dtype != dtype)
        # gradients on their way through a block
        backward = tokens * (2 * e * inner + 2 * 4 * c.n_embd)
        if self.recompute:
            return c.n_layer * 4 * c.n_embd * tokens, token * tokens + cast + backward
        return c.n_layer * (token * tokens + cast), backward

    def head_bytes(self, batch_size: int, device_type: str, dtype: torch.dtype) -> tuple[int, int]:
        """(bytes while the loss is computed, bytes at the end of the backward) for the head."""
        rows = batch_size * self.config.block_size
        return head_bytes(self.lm_head.weight, rows, device_type, dtype)

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

    def crop_vocab(self, n_vocab: int) -> None:
        """Keeps the first n_vocab tokens: cuts the padding of a vocabulary."""
        self.config = replace(self.config, vocab_size=n_vocab)
        for module in (self.transformer.wte, self.lm_head):
            module.weight = nn.Parameter(module.weight.detach()[:n_vocab].clone())
        self.transformer.wte.num_embeddings = self.lm_head.out_features = n_vocab
        self.tie_head()

    def new_cache(self, batch_size, length=None):
        return KVCache(self.config, batch_size, length, self.device, self.compute_dtype)

    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, **options) -> torch.Tensor:
        """idx (B, T) and what follows it, (B, T + new), as nanoGPT's; options as for stream()."""
        new = stream(self, idx.tolist(), max_new_tokens, temperature, top_k, **options)
        return torch.cat([idx] + [token[:, None] for token in new], dim=1)

    @property
    def device(self) -> torch.device:
        return self.transformer.ln_f.weight.device

    @property
    def stream_dtype(self):
        """The residual stream's: that of the vectors, which set_dtype leaves in float32."""
        return self.transformer.ln_f.weight.dtype

    @property
    def compute_dtype(self):
        """What products are computed in: autocast's dtype where it is on, else the stream's."""
        autocast = torch.is_autocast_enabled(self.device.type)
        return torch.get_autocast_dtype(self.device.type) if autocast else self.stream_dtype

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
