"""T5 in one file: the model, its loss, its cache. Same structure as model.py.

Letters in the shape comments:
    B batch   S source tokens   T target tokens, the new ones if there is a cache
    P target tokens, those in the cache included
    C channels (n_embd)   nh heads   hs head size   V vocabulary

References: T5, Raffel et al. 2020; its version 1.1 (flan-t5 too) has the gate of Shazeer 2020, "GLU
Variants Improve Transformer". Checked against transformers' T5ForConditionalGeneration.
"""
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model import GPT, Embedding, KVCache, Linear, additive
from nanotune.attention import dropout
from nanotune.errors import UserError
from nanotune.formats import hf, hf_config, hub
from nanotune.generation.generate import take_rows
from nanotune.head import Head, head_bytes, head_chunk, head_loss
from nanotune.text.loader import IGNORED


@dataclass(frozen=True)
class T5Config:
    vocab_size: int = 32128
    n_layer: int = 6                  # of the encoder
    n_decoder_layer: int = 6
    n_head: int = 8
    n_embd: int = 512
    head_size: int = 64               # n_head * head_size need not be n_embd
    n_inner: int = 2048               # width of the MLP
    gated: bool = False               # False: MLP with ReLU; True: GELU with a gate (1.1)
    n_buckets: int = 32               # of relative positions
    max_distance: int = 128           # positions farther apart share a bucket
    dropout: float = 0.0
    norm_eps: float = 1e-6
    tied_head: bool = True            # the head shares the weights of the embedding
    scale_head: bool = True           # the head's input is divided by sqrt(n_embd); 1.1: False
    start_id: int = 0                 # the decoder's first input
    pad_id: int = 0                   # the decoder's input for padding
    end_id: int = 1                   # the last token of sources and targets
    source_length: int = 512          # in training, longer sources are cut to this
    target_length: int = 512
    block_size: ClassVar[float] = math.inf  # positions are relative: any length works
    takes_pairs: ClassVar[bool] = True


class T5Cache:
    """The decoder's keys and values of all layers for one batch, at most `length` tokens per row,
    and those of the source. `pos` is the number of target tokens in the cache."""
    def __init__(self, config: T5Config, batch_size: int, length: int,
                 device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        shape = (config.n_decoder_layer, batch_size, config.n_head, length, config.head_size)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.pos = 0
        self.source, self.mask = None, None  # from encode(): (B, S, C); (B, 1, 1, S)
        self.source_kv = [None] * config.n_decoder_layer  # (k, v) per layer, from the first step on
        self.prompt = torch.arange(batch_size, device=device)  # each row's prompt number

    full, rewind, columns = KVCache.full, KVCache.rewind, KVCache.columns
    append, advance = KVCache.append, KVCache.advance

    def reorder(self, rows: torch.Tensor) -> None:
        """Replaces row i with row rows[i], for beam search; rows (B,)."""
        self.k, self.v = (take_rows(whole, rows, self.pos) for whole in (self.k, self.v))
        if torch.equal(self.prompt[rows], self.prompt):  # the beams of a prompt have one source
            return
        self.prompt = self.prompt[rows]
        self.source, self.mask = self.source[rows], self.mask[rows]
        self.source_kv = [kv and tuple(t[rows] for t in kv) for kv in self.source_kv]


def bucket_of(distance: torch.Tensor, n_buckets: int, max_distance: int,
              both_ways: bool) -> torch.Tensor:
    """Returns the bucket of each distance, which is the key's position minus the query's. The first
    half of the buckets have one distance each; the others widen logarithmically up to max_distance.
    With `both_ways` (the encoder) there are two such series, for keys before the query and after;
    else all keys after the query have bucket 0.
    """
    first = torch.zeros_like(distance)
    if both_ways:
        n_buckets //= 2
        first = (distance > 0) * n_buckets
        far = distance.abs()
    else:
        far = (-distance).clamp(min=0)
    half = n_buckets // 2
    ratio = (far.clamp(min=half) / half).log() / math.log(max_distance / half)  # 1: max_distance
    wide = (half + (ratio * (n_buckets - half)).long()).clamp(max=n_buckets - 1)
    return first + torch.where(far < half, far, wide)


class RMSNorm(nn.Module):
    """Divides by the root of the mean square, which is computed in float32; has no bias."""
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.eps = config.norm_eps

    def forward(self, x):
        x = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * x


def attend(q, k, v, mask, dropout):
    """(B, T, nh hs) x heads (B, nh, S, hs) -> (B, T, nh hs). T5 does not scale the products: the
    initial weights of q are smaller instead. In self-attention, `mask` includes the bias."""
    B, T, _ = q.size()
    q = q.view(B, T, k.size(1), -1).transpose(1, 2).to(k.dtype)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=1.0)
    return y.transpose(1, 2).reshape(B, T, -1)


def split_heads(x, n_head):
    """Returns k and v of x (B, S, 2 nh hs), each (B, nh, S, hs)."""
    return (t.view(*t.shape[:2], n_head, -1).transpose(1, 2) for t in x.chunk(2, dim=2))


class SelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.width = config.n_head * config.head_size
        self.c_attn = Linear(config.n_embd, 3 * self.width, bias=False)
        self.c_proj = Linear(self.width, config.n_embd, bias=False)
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout

    def forward(self, x, mask, cache):
        q, kv = self.c_attn(x).split((self.width, 2 * self.width), dim=2)
        k, v = split_heads(kv, self.n_head)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        return self.c_proj(attend(q, k, v, mask, self.dropout if self.training else 0.0))


class CrossAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.width = config.n_head * config.head_size
        self.c_q = Linear(config.n_embd, self.width, bias=False)
        self.c_kv = Linear(config.n_embd, 2 * self.width, bias=False)
        self.c_proj = Linear(self.width, config.n_embd, bias=False)
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout

    def forward(self, x, source, mask, cache):
        kv = cache and cache.source_kv[self.layer]
        if kv is None:
            kv = tuple(split_heads(self.c_kv(source), self.n_head))
            if cache is not None:
                cache.source_kv[self.layer] = kv
        y = attend(self.c_q(x), *kv, mask, self.dropout if self.training else 0.0)
        return self.c_proj(y)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated, self.dropout = config.gated, config.dropout
        self.c_fc = Linear(config.n_embd, (1 + config.gated) * config.n_inner, bias=False)
        self.c_proj = Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        x = self.c_fc(x)
        if self.gated:
            x, gate = x.chunk(2, dim=2)
            x = F.gelu(x, approximate="tanh") * gate
        else:
            x = F.relu(x)
        return self.c_proj(dropout(x, self.dropout, self.training))


class Block(nn.Module):
    """A layer of the encoder, or of the decoder if `cross`."""
    def __init__(self, config, layer, cross):
        super().__init__()
        self.ln_1 = RMSNorm(config)
        self.attn = SelfAttention(config, layer)
        if cross:
            self.ln_x = RMSNorm(config)
            self.cross = CrossAttention(config, layer)
        self.ln_2 = RMSNorm(config)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x, mask, source=None, source_mask=None, cache=None):
        x = x + self.drop(self.attn(self.ln_1(x), mask, cache))
        if source is not None:
            x = x + self.drop(self.cross(self.ln_x(x), source, source_mask, cache))
        return x + self.drop(self.mlp(self.ln_2(x)))

    def drop(self, x):
        return dropout(x, self.dropout, self.training)


class Stack(nn.Module):
    """The encoder, or the decoder if `cross`."""
    def __init__(self, config, n_layer, cross):
        super().__init__()
        self.bias = Embedding(config.n_buckets, config.n_head)  # shared by all layers
        self.h = nn.ModuleList(Block(config, layer, cross) for layer in range(n_layer))
        self.ln_f = RMSNorm(config)
        self.dropout, self.recompute = config.dropout, False
        self.buckets = dict(n_buckets=config.n_buckets, max_distance=config.max_distance,
                            both_ways=not cross)

    def position_bias(self, query, S):
        """Returns the bias (nh, T, S) of attention from columns `query` (T,) to columns 0 to S - 1.
        """
        distance = torch.arange(S, device=query.device) - query[:, None]
        return self.bias(bucket_of(distance, **self.buckets)).permute(2, 0, 1)

    def forward(self, x, *others):
        """x (B, T, C) -> (B, T, C); `others` are the arguments of each block."""
        x = dropout(x, self.dropout, self.training)
        for block in self.h:
            if self.recompute and torch.is_grad_enabled():
                # checkpoint restores the random state: dropout is the same
                x = checkpoint(block, x, *others, use_reentrant=False)
            else:
                x = block(x, *others)
        return dropout(self.ln_f(x), self.dropout, self.training)


def shift_right(y: torch.Tensor, config: T5Config) -> torch.Tensor:
    """y (B, T), targets padded with -1 -> the decoder's input, the token before each, (B, T)."""
    before = F.pad(y[:, :-1], (1, 0), value=config.start_id)
    return before.masked_fill(before == IGNORED, config.pad_id)


def pad_sources(prompts: Sequence[list[int]], end: int) -> torch.Tensor:
    """Returns sources as (B, S), padded with -1; the end token is appended to those without it."""
    rows = [torch.tensor([*ids] if ids[-1:] == [end] else [*ids, end]) for ids in prompts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)


class T5(nn.Module):
    """An encoder-decoder transformer."""
    family = "T5"
    is_masked = True  # attention has a mask in training

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = Embedding(config.vocab_size, config.n_embd)
        self.encoder = Stack(config, config.n_layer, cross=False)
        self.decoder = Stack(config, config.n_decoder_layer, cross=True)
        self.lm_head = Head(config.n_embd, config.vocab_size)
        self.tie_head()
        if not self.lm_head.weight.is_meta:  # else the weights come from a file
            self.apply(self.init_weights)

    # the same as GPT's
    num_params, param_groups, set_dtype = GPT.num_params, GPT.param_groups, GPT.set_dtype
    compute_dtype, empty = GPT.compute_dtype, classmethod(GPT.empty.__func__)

    @property
    def recompute(self) -> bool:
        """Returns whether the backward pass recomputes activations, block by block."""
        return self.encoder.recompute

    @recompute.setter
    def recompute(self, on: bool) -> None:
        self.encoder.recompute = self.decoder.recompute = on

    def blocks(self) -> Sequence[nn.Module]:
        """Returns the layers, which are sharded and recomputed one at a time."""
        return [*self.encoder.h, *self.decoder.h]

    def tied_names(self) -> dict[str, str]:
        """Returns {parameter name: the name of the same parameter elsewhere}."""
        return {"lm_head.weight": "shared.weight"} if self.config.tied_head else {}

    def tie_head(self) -> None:
        """Shares the embedding's weights with the head; to() may have split them."""
        if self.config.tied_head:
            self.lm_head.weight = self.shared.weight

    def init_weights(self, module):
        """Normal, with std 1 for embedding and head, 1 / sqrt(inputs) for a matrix, and
        1 / sqrt(inputs * hs) for the matrix of the queries, since attention does not scale."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features ** -0.5)
        if isinstance(module, SelfAttention | CrossAttention):
            queries = module.c_attn if isinstance(module, SelfAttention) else module.c_q
            with torch.no_grad():
                queries.weight[:module.width] *= self.config.head_size ** -0.5
        if isinstance(module, Stack):
            nn.init.normal_(module.bias.weight, std=self.config.n_embd ** -0.5)
        if module is self:  # apply() visits the model after its parts
            nn.init.normal_(self.shared.weight)
            nn.init.normal_(self.lm_head.weight)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x (B, S), sources padded with -1, and y (B, T), targets -> the loss, in nats *summed*
        over the targets that are not -1."""
        hidden = self.hidden(x, y).flatten(0, 1)
        return head_loss(hidden, self.lm_head, y.flatten(), self.compute_dtype)

    def hidden(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x (B, S), y (B, T) as in forward() -> the input of the head, (B, T, C)."""
        source, target = self.embed(x.clamp(min=0), shift_right(y, self.config))
        return self.decode(target, *self.encode_embedded(source, x != IGNORED))

    def embed(self, *ids):
        """Returns the embeddings (B, T, C) of each tensor of ids (B, T), with one lookup: the
        gradient of each lookup is as large as the table."""
        x = self.shared(torch.cat([i.flatten() for i in ids])).to(self.stream_dtype)
        return [part.view(*i.shape, -1) for part, i in zip(x.split([i.numel() for i in ids]), ids)]

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, S) sources padded with -1 -> the encoder's output, (B, S, C), and the additive mask
        of cross-attention, (B, 1, 1, S): 0, or -inf for padding."""
        return self.encode_embedded(*self.embed(x.clamp(min=0)), x != IGNORED)

    def encode_embedded(self, x, seen):
        """encode() of embeddings x (B, S, C); seen (B, S) bool is False for padding."""
        mask = additive(seen[:, None, None], self.stream_dtype)
        bias = self.encoder.position_bias(torch.arange(x.size(1), device=x.device), x.size(1))
        both = (bias + mask).to(self.compute_dtype)  # (B, nh, S, S)
        return self.encoder(x, both), mask.to(self.compute_dtype)

    def decode(self, x, source, source_mask, cache=None):
        """x (B, T, C), the embeddings of the tokens before each target -> the input of the head,
        (B, T, C)."""
        T = x.size(1)
        query, P = (torch.arange(T, device=x.device), T) if cache is None else cache.columns(T)
        mask = additive(torch.arange(P, device=x.device) <= query[:, None], self.stream_dtype)
        mask = (self.decoder.position_bias(query, P) + mask)[None]  # (1, nh, T, P)
        x = self.decoder(x, mask.to(source_mask.dtype), source, source_mask, cache)
        if cache is not None:
            cache.advance(T)
        return x * self.config.n_embd ** -0.5 if self.config.scale_head else x

    def start(self, prompts: Sequence[list[int]], room: int,
              cache: T5Cache | None = None) -> tuple[T5Cache, torch.Tensor]:
        """Reads B sources; appends the end token to those without it. Returns (a cache with room
        for `room` more tokens, logits of the first token of each target, (B, V))."""
        x = pad_sources(prompts, self.config.end_id).to(self.device)
        cache = T5Cache(self.config, len(x), 1 + room, self.device, self.compute_dtype)
        cache.source, cache.mask = self.encode(x)
        return cache, self.step(torch.full_like(x[:, :1], self.config.start_id), cache)

    def step(self, idx: torch.Tensor, cache: T5Cache) -> torch.Tensor:
        """idx (B, T), the next tokens of each row -> the logits after the last, (B, V) float32."""
        x = self.decode(*self.embed(idx), cache.source, cache.mask, cache)
        return self.lm_head(x[:, -1]).float()

    def logits_at(self, x: torch.Tensor, y: torch.Tensor) -> Iterator[torch.Tensor]:
        """x (B, S), y (B, T) -> chunks (n, V) float32 of the logits whose target is not -1."""
        hidden = self.hidden(x, y)[y != IGNORED]
        rows = head_chunk(hidden.device.type, torch.float32).rows
        return (self.lm_head(part).float() for part in hidden.split(rows))

    def flops_per_token(self, counted: float = 1.0) -> float:
        """Returns the FLOPs of forward and backward per source or target token: 6 N, where N is
        half of the weights, since a token passes only through the encoder or the decoder; 4 N for
        frozen weights. The head computes only the share `counted` of the tokens: the targets.
        Attention's products are left out: pairs are short."""
        head = self.lm_head.weight
        params = [p for p in self.parameters() if p is not head and p is not self.shared.weight]
        flops = sum((6 if p.requires_grad else 4) * p.numel() for p in params) / 2
        return flops + (6 if head.requires_grad else 4) * head.numel() * counted

    def activation_bytes(self, batch_size: int, device_type: str,
                         dtype: torch.dtype) -> tuple[int, int]:
        """Returns (bytes that the forward pass keeps for the backward, bytes of temporaries), for a
        batch of pairs of source_length and target_length tokens.

        A norm keeps its input and the normalized input, both in float32, and its output. Attention
        with a bias that needs a gradient keeps q, k, v and the weights of all pairs of tokens, all
        in float32; with dropout, three copies of the weights. Dropout keeps a mask; autocast keeps
        the matrices that it converted. With recompute only the inputs of the blocks are kept.
        """
        c, e, drops = self.config, dtype.itemsize, bool(self.config.dropout)
        S, T, width = c.source_length, c.target_length, c.n_head * c.head_size
        # bytes per token of a norm and its dropout, a query with its output, a key with its value
        norm, query, key = (8 + e + e * drops) * c.n_embd, (4 + e) * width, 8 * width
        pair = 4 * c.n_head * (3 if drops else 1)  # per pair of tokens: attention weights
        mlp = e * c.n_inner * ((4 + drops) if c.gated else (1 + 2 * drops))
        encoder = S * (2 * norm + query + key + pair * S + mlp)
        decoder = T * (3 * norm + 2 * query + key + pair * (S + T) + mlp) + S * key
        cast = [sum(p.numel() * e for p in stack.h[0].parameters()
                    if p.dim() >= 2 and p.dtype != dtype) for stack in (self.encoder, self.decoder)]
        kept = [batch_size * encoder + cast[0], batch_size * decoder + cast[1]]
        backward = batch_size * max(S, T) * (2 * e * c.n_inner * (1 + c.gated) + 8 * c.n_embd
                                             + 12 * c.n_head * S)
        if self.recompute:
            inputs = 4 * c.n_embd * batch_size * (c.n_layer * S + c.n_decoder_layer * T)
            return inputs, max(kept) + backward
        return c.n_layer * kept[0] + c.n_decoder_layer * kept[1], backward

    def head_bytes(self, batch_size: int, device_type: str, dtype: torch.dtype) -> tuple[int, int]:
        """See head.head_bytes; for a batch of targets of target_length tokens."""
        rows = batch_size * self.config.target_length
        return head_bytes(self.lm_head.weight, rows, device_type, dtype)

    def crop_block_size(self, block_size: int) -> None:
        """Raises UserError: T5 has no position embeddings to crop."""
        raise UserError(f"--block_size={block_size} is for models of plain text; T5 takes "
                        "--source_length and --target_length")

    def crop_vocab(self, n_vocab: int) -> None:
        """Keeps the first n_vocab rows of embedding and head."""
        self.config = replace(self.config, vocab_size=n_vocab)
        for module in (self.shared, self.lm_head):
            module.weight = nn.Parameter(module.weight.detach()[:n_vocab].clone())
        self.shared.num_embeddings = self.lm_head.out_features = n_vocab
        self.tie_head()

    @property
    def device(self) -> torch.device:
        return self.decoder.ln_f.weight.device

    @property
    def stream_dtype(self) -> torch.dtype:
        """Returns the dtype of the residual stream: float32, as set_dtype() casts only matrices."""
        return self.decoder.ln_f.weight.dtype

    @classmethod
    def from_pretrained(cls, name: str, dropout: float = 0.0, device: str | torch.device = "cpu",
                        dtype: torch.dtype = torch.float32) -> "T5":
        """Loads a hub id ('google-t5/t5-small', 'google/flan-t5-base', ...) or a Hugging Face
        folder. Returns a T5 in training mode, its matrices in `dtype`. Raises UserError if the
        files are missing, damaged or of another architecture."""
        config_file, weight_files = hub.find_pretrained(name)
        fields = hf_config.config_from_hf(hub.read_json(config_file), name)
        fields["tied_head"] = hf.head_is_tied(weight_files, tied=True)  # the weights decide
        config = T5Config(**fields | {"dropout": dropout})
        model = cls.empty(config, device, dtype)
        hf.fill_parameters(dict(model.named_parameters()), asdict(config), weight_files)
        return model
