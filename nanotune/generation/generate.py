"""Tokens from a model, one after the other, and the text that they spell.

    for token in stream(model, idx, 100, temperature=0.8): ...    # (B,) at a time

`model` is a GPT or an exported file: anything with config.block_size, new_cache and a call.
"""
import torch

from nanotune.text.tokenizer import EOT


@torch.no_grad()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_token=None,
           n_vocab=None, generator=None, use_cache=True, pad=None):
    """Yields the next token of each row, (B,), up to max_new_tokens times.

    temperature 0 takes the likeliest token. top_k keeps that many, top_p the fewest that hold
    this much probability. A row that drew stop_token repeats it; when all have, the stream ends.
    n_vocab is the tokenizer's size: ids from there on, a padded vocabulary's, are never drawn.
    pad (B,) says how many of a row's first ids are filling (see KVCache); it needs the cache.

    The context holds block_size tokens. When it is full, the window slides: the later half is
    read again from position 0, and generation goes on behind it. So the model always sees between
    a half and a whole context, and the second reading costs a token in block_size / 2.
    """
    block_size = model.config.block_size
    length = min(block_size, idx.size(1) + max_new_tokens)
    cache = model.new_cache(idx.size(0), length) if use_cache else None
    begin = max(0, idx.size(1) - block_size)  # where the window begins
    done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        if idx.size(1) - begin > block_size:
            begin = idx.size(1) - max(1, block_size // 2)
            if cache is not None:
                cache.pos = 0
        if pad is not None:
            cache.pad = (pad - begin).clamp(min=0)
        if cache is not None:
            logits = model(idx[:, begin + cache.pos:], cache=cache)
        else:
            logits = model(idx[:, begin:])[:, -1].float()
        token = sample_token(logits[:, :n_vocab], temperature, top_k, top_p, generator)
        if stop_token is not None:
            token = torch.where(done, stop_token, token)
            done |= token == stop_token
        yield token
        if stop_token is not None and bool(done.all()):  # note: a CPU-GPU sync point
            return
        idx = torch.cat([idx, token[:, None]], dim=1)


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """logits (B, V) -> ids (B,), drawn from what temperature, top_k and top_p leave. A row takes
    one uniform number, which its cumulated probabilities turn into an id."""
    if temperature == 0:
        return logits.argmax(-1)
    ids = None
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)
    elif top_p is not None and top_p < 1:
        logits, ids = logits.sort(descending=True)
    p = (logits / temperature).softmax(-1, dtype=torch.float32)
    upto = p.cumsum(-1)
    if top_p is not None and top_p < 1:
        p = p.masked_fill(upto - p >= top_p, 0.0)  # what stands before it holds enough already
        upto = p.cumsum(-1)
    draw = torch.rand(len(p), 1, device=p.device, generator=generator)
    # the first whose cumulated probability is above the draw, which rounds to below the whole:
    draw = draw * (upto[:, -1:] * (1 - 2**-23))  # never one of probability 0
    column = torch.searchsorted(upto, draw, right=True)
    return (column if ids is None else ids.gather(-1, column)).squeeze(-1)


class Writer:
    """Decodes one growing sample: text() is what stands before the stop text, whole characters
    only, since a character may span several tokens."""
    def __init__(self, tokenizer, prompt_ids, stop):
        self.tokenizer, self.ids = tokenizer, list(prompt_ids)
        self.stop = None if stop == EOT else stop  # that one is a token, and found without decoding
        self.prompt_length = len(tokenizer.decode(prompt_ids))
        self.done = False

    def add(self, token):
        if token == self.tokenizer.eot:
            self.done = True
        if not self.done:
            self.ids.append(token)
            self.done = self.stop in self.new_text() if self.stop else False

    def new_text(self):
        return self.tokenizer.decode(self.ids)[self.prompt_length:]

    def text(self):
        whole = self.tokenizer.decode(self.ids)
        new = whole[self.prompt_length:]
        return whole[:self.prompt_length] + (new.partition(self.stop)[0] if self.stop else new)
