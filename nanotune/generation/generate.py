"""Tokens from a model, one after the other, and the text that they spell.

    for token in stream(model, prompts, 100, temperature=0.8): ...    # (B,) at a time

A model is anything with `start` and `step`: a GPT, a Decoder (fast.py), an exported ONNX file.
"""
from collections.abc import Iterator, Sequence

import torch


@torch.no_grad()
def stream(model, prompts: Sequence[list[int]], max_new_tokens: int, temperature: float = 1.0,
           top_k: int | None = None, top_p: float | None = None, repetition_penalty: float = 1.0,
           stop_token: int | None = None, n_vocab: int | None = None,
           generator: torch.Generator | None = None) -> Iterator[torch.Tensor]:
    """Yields the next token of each of B prompts, (B,), up to max_new_tokens times. Prompts may
    differ in length; of one that is longer than the context the end is read.

    Sampling is as in sample_token(). repetition_penalty above 1 makes tokens that the row already
    holds less likely (Keskar et al. 2019, "CTRL"). A row that drew stop_token repeats it; when all
    have, the stream ends. n_vocab is the tokenizer's size: ids from there on, the padding of a
    vocabulary, are never drawn.

    If the context is full, the later half of it is read again as a prompt, and generation goes on
    from there: the model always sees between a half and a whole context, and reading again costs a
    token in block_size / 2.
    """
    block_size = model.config.block_size
    cache, logits = model.start([ids[-block_size:] for ids in prompts], max_new_tokens)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=logits.device)
    seen = None if repetition_penalty == 1 else tokens_in(prompts, logits)
    new = []
    for left in range(max_new_tokens, 0, -1):
        if new and cache.full:
            half = max(1, block_size // 2)
            rows = [[*ids, *ours][-half:]
                    for ids, ours in zip(prompts, torch.stack(new, 1).tolist())]
            cache, logits = model.start(rows, left, cache)
        elif new:
            logits = model.step(new[-1][:, None], cache)
        if seen is not None:
            logits = penalize(logits, seen, repetition_penalty)
        token = sample_token(logits[:, :n_vocab], temperature, top_k, top_p, generator)
        if seen is not None:
            seen.scatter_(1, token[:, None], True)
        if stop_token is not None:
            token = torch.where(done, stop_token, token)
            done |= token == stop_token
        yield token
        if stop_token is not None and bool(done.all()):  # note: a CPU-GPU sync point
            return
        new.append(token)


def sample_token(logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None,
                 generator: torch.Generator | None = None) -> torch.Tensor:
    """logits (B, V) -> ids (B,), drawn from their softmax at this temperature; 0 takes the most
    likely. top_k keeps that many tokens, top_p the fewest that hold this much probability. A row
    takes one uniform number, which its cumulated probabilities turn into an id."""
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
        p = p.masked_fill(upto - p >= top_p, 0.0)  # the tokens before it hold enough already
        upto = p.cumsum(-1)
    draw = torch.rand(len(p), 1, device=p.device, generator=generator)
    # the first whose cumulated probability is above the draw, which rounds to below the whole:
    draw = draw * (upto[:, -1:] * (1 - 2**-23))  # never one of probability 0
    column = torch.searchsorted(upto, draw, right=True)
    return (column if ids is None else ids.gather(-1, column)).squeeze(-1)


def tokens_in(prompts, logits):
    """(B, V) bool, True for the tokens of each prompt."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, ids in zip(seen, prompts):
        row[torch.tensor(ids, device=row.device)] = True
    return seen


def penalize(logits, seen, penalty):
    """Makes the logits of seen tokens lower: positive ones divided, negative ones multiplied."""
    lower = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lower, logits)


def read_prompts(model, prompts: Sequence[list[int]], room: int, cache=None):
    """(cache, logits (B, V)) after the prompts, left-padded to one length; a new cache has room for
    `room` tokens more. This is `start` of models with a KVCache."""
    length = max(map(len, prompts))
    pad = [length - len(ids) for ids in prompts]
    x = torch.tensor([[0] * n + list(ids) for n, ids in zip(pad, prompts)], device=model.device)
    if cache is None:
        cache = model.new_cache(len(prompts), length + room)
    cache.rewind(0)
    cache.pad = torch.tensor(pad, device=model.device) if any(pad) else None
    return cache, model.step(x, cache)


class TextPieces:
    """One sample's text, in pieces that are ready to print.

        for token in tokens: print(pieces.add(token), end="")
        print(pieces.rest())

    A piece holds whole characters only, since a character may span several tokens, and nothing of
    a stop text or of what may turn out to be one. The text ends before a stop text, or before the
    token eot. The cost per token does not grow with the text.
    """
    CONTEXT = 8  # tokens before the new ones that are decoded with them: a decoder may look back

    def __init__(self, tokenizer, prompt_ids: Sequence[int] = (), stop: str = ""):
        self.tokenizer, self.stop, self.done = tokenizer, stop, False
        self.window = list(prompt_ids)[-self.CONTEXT:]  # what the next decode sees
        self.shown = len(self.window)                   # how many of them are decoded already
        self.held = ""                                  # decoded, and perhaps part of a stop text

    def add(self, token: int) -> str:
        """The text that is ready now that this token has come; "" after the end."""
        if self.done or token == self.tokenizer.eot:
            self.done = True
            return ""
        self.window.append(token)
        new = self.decode_new()
        if new.endswith("\ufffd"):  # half a character, or bytes that are none
            return ""
        self.window, self.shown = self.window[-self.CONTEXT:], min(len(self.window), self.CONTEXT)
        return self.before_stop(new)

    def decode_new(self):
        before = self.tokenizer.decode(self.window[:self.shown])
        return self.tokenizer.decode(self.window)[len(before):]

    def before_stop(self, new):
        """`new` behind what was held back, up to a stop text; holds back what may begin one."""
        text = self.held + new
        if not self.stop:
            return text
        ready, found, _ = text.partition(self.stop)
        self.done = bool(found)
        keep = 0 if found else next(n for n in range(min(len(text), len(self.stop) - 1), -1, -1)
                                    if text.endswith(self.stop[:n]))
        self.held = ready[len(ready) - keep:]
        return ready[:len(ready) - keep]

    def rest(self) -> str:
        """What was held back, once no token follows."""
        text = self.held + self.decode_new()
        return text.partition(self.stop)[0] if self.stop else text
