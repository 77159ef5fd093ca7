"""Generates tokens one at a time, and decodes them to text.

    for token in stream(model, prompts, 100, temperature=0.8): ...    # token (B,)

A model is any object with the `config`, `start` and `step` of a GPT: a T5, a Decoder, an OnnxGPT.
"""
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from nanotune.errors import UserError
from nanotune.text.tokenizer import AnyTokenizer


def encode_prompt(tokenizer: AnyTokenizer, text: str, block_size: int, where: str) -> list[int]:
    """Returns the prompt's ids; an empty prompt becomes end-of-text, after which a document begins.
    Raises UserError if the prompt does not fit or cannot be encoded; `where` is the prompt's name
    in the message."""
    ids = tokenizer.encode(text)
    if not ids and tokenizer.eot is None:
        raise UserError(f"{where} is empty, and the model's vocabulary has no end-of-text to begin "
                        "with; give at least one character")
    if len(ids) > block_size:
        raise UserError(f"{where} has {len(ids)} tokens, the model reads at most {block_size}; "
                        "give a shorter prompt")
    return ids or [tokenizer.eot]


@torch.no_grad()
def stream(model: Any, prompts: Sequence[list[int]], max_new_tokens: int,
           temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           repetition_penalty: float = 1.0, stop_token: int | None = None,
           n_vocab: int | None = None, generator: torch.Generator | None = None,
           with_logits: bool = False) -> Iterator[Any]:
    """Yields the next token of each of B prompts, (B,), up to max_new_tokens times. Prompts may
    differ in length; a GPT reads only the last block_size tokens of each. A T5's prompts are
    sources, and the new tokens are the target.

    Sampling is as in sample_token(). repetition_penalty above 1 makes tokens that are already in
    the row less likely (Keskar et al. 2019, "CTRL"). A row that drew stop_token repeats it; when
    all rows have drawn it, the stream ends. Ids of n_vocab and above, the padding of a vocabulary,
    are not drawn.

    When the context is full, its later half is read again as a prompt. So the model always sees at
    least half a context. The cost is one prompt every block_size / 2 tokens.

    If with_logits, yields (token, logits): the model's logits (B, n_vocab), without the penalty.
    """
    cache, logits = model.start(prompts, max_new_tokens)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=logits.device)
    texts = [text_before(model, ids) for ids in prompts]
    seen = None if repetition_penalty == 1 else tokens_in(texts, logits)
    new = []
    for left in range(max_new_tokens, 0, -1):
        if new and cache.full:
            half = max(1, model.config.block_size // 2)
            rows = [[*ids, *added][-half:]
                    for ids, added in zip(prompts, torch.stack(new, 1).tolist())]
            cache, logits = model.start(rows, left, cache)
        elif new:
            logits = model.step(new[-1][:, None], cache)
        scores = logits if seen is None else penalize(logits, seen, repetition_penalty)
        token = sample_token(scores[:, :n_vocab], temperature, top_k, top_p, generator)
        if seen is not None:
            seen.scatter_(1, token[:, None], True)
        if stop_token is not None:
            token = torch.where(done, stop_token, token)
            done |= token == stop_token
        yield (token, logits[:, :n_vocab]) if with_logits else token
        if stop_token is not None and bool(done.all()):  # note: a CPU-GPU sync point
            return
        new.append(token)


def sample_token(logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None,
                 generator: torch.Generator | None = None) -> torch.Tensor:
    """logits (B, V) -> ids (B,) drawn from their softmax at this temperature; 0 takes the most
    likely. top_k keeps the k most likely tokens, top_p the fewest with this total probability. Each
    row uses one uniform random number, to invert the cumulative probabilities."""
    if temperature < 1e-5:  # the quotient below could overflow; 1e-5 gives the same token as 0
        return logits.argmax(-1)
    ids = None
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)
    elif top_p is not None and top_p < 1:
        logits, ids = logits.sort(descending=True)
    p = (logits / temperature).softmax(-1, dtype=torch.float32)
    upto = p.cumsum(-1)
    if top_p is not None and top_p < 1:
        enough = upto - p >= top_p  # the tokens before this one are enough
        enough[:, 0] = False  # keeps one token: a top_p of 1e-320 is 0 in float32
        p = p.masked_fill(enough, 0.0)
        upto = p.cumsum(-1)
    draw = torch.rand(len(p), 1, device=p.device, generator=generator)
    # below the sum even after rounding, so a token of probability 0 is never drawn
    draw = draw * (upto[:, -1:] * (1 - 2**-23))
    column = torch.searchsorted(upto, draw, right=True)
    return (column if ids is None else ids.gather(-1, column)).squeeze(-1)


def tokens_in(prompts, logits):
    """A mask (B, V) bool, True for the tokens of each prompt."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, ids in zip(seen, prompts):
        row[torch.tensor(ids, dtype=torch.long, device=row.device)] = True
    return seen


def penalize(logits, seen, penalty):
    """Lowers the logits of seen tokens: divides positive ones, multiplies negative ones."""
    lower = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lower, logits)


def read_prompts(model: Any, prompts: Sequence[list[int]], room: int,
                 cache: Any = None) -> tuple[Any, torch.Tensor]:
    """Returns (cache, logits (B, V)) after the last block_size tokens of each of B prompts, which
    are left-padded to one length. A given KVCache is overwritten. A new one has room for `room`
    more tokens, up to block_size in all."""
    prompts = [ids[-model.config.block_size:] for ids in prompts]
    length = max(map(len, prompts))
    pad = [length - len(ids) for ids in prompts]
    x = torch.tensor([[0] * n + list(ids) for n, ids in zip(pad, prompts)], device=model.device)
    if cache is None:
        cache = model.new_cache(len(prompts), length + room)
    cache.rewind(0)
    cache.pad = torch.tensor(pad, device=model.device) if any(pad) else None
    return cache, model.step(x, cache)


def take_rows(cached: torch.Tensor, rows: torch.Tensor, pos: int) -> torch.Tensor:
    """Returns rows `rows` (N,) of a cache's keys or values, (layers, B, nh, S, hs), of which the
    first `pos` columns are filled. If N is B, works in place: a recorded step reads this memory."""
    if len(rows) != cached.size(1):
        return cached[:, rows]
    cached[:, :, :, :pos] = cached[:, rows, :, :pos]
    return cached


def text_before(model: Any, prompt: list[int]) -> list[int]:
    """Returns the ids that the new text continues: the prompt's, or none for a T5's answer."""
    return [] if model.config.takes_pairs else prompt


class TextPieces:
    """Decodes one sample to text, in pieces that are ready to print.

        for token in tokens: print(pieces.add(token), end="")
        print(pieces.rest())

    The text ends before the first of `stops` or the tokenizer's eot; `done` is then True. A piece
    has only whole characters. Text that may be the beginning of a stop waits for the next token.
    """
    CONTEXT = 8  # previous tokens to decode with the new ones: the text may depend on them

    def __init__(self, tokenizer: AnyTokenizer, prompt_ids: Sequence[int] = (),
                 stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops, self.done = tokenizer, stops, False
        self.window = list(prompt_ids)[-self.CONTEXT:]  # tokens to decode next
        self.shown = len(self.window)                   # how many of them were decoded before
        self.pending = ""                               # decoded, may be the beginning of a stop

    def add(self, token: int) -> str:
        """Returns the text that is ready after this token; "" after the end."""
        if self.done or token == self.tokenizer.eot:
            self.done = True
            return ""
        self.window.append(token)
        new = self.decode_new()
        if new.endswith("\ufffd"):  # an incomplete character or invalid bytes
            return ""
        self.window, self.shown = self.window[-self.CONTEXT:], min(len(self.window), self.CONTEXT)
        return self.before_stop(new)

    def decode_new(self):
        before = self.tokenizer.decode(self.window[:self.shown])
        return self.tokenizer.decode(self.window)[len(before):]

    def before_stop(self, new):
        """The pending text and `new`, up to a stop or to a possible beginning of one."""
        text = self.pending + new
        found = self.find_stop(text)
        self.done = found is not None
        keep = 0 if self.done else max((
            n for stop in self.stops for n in range(min(len(text) + 1, len(stop)))
            if text.endswith(stop[:n])), default=0)
        ready, self.pending = text[:found][:len(text) - keep], text[len(text) - keep:]
        return ready

    def find_stop(self, text):
        return min((text.find(stop) for stop in self.stops if stop in text), default=None)

    def rest(self) -> str:
        """Returns the pending text, without an incomplete character at its end; call it after the
        last token."""
        text = self.pending + self.decode_new().rstrip("\ufffd")
        return text[:self.find_stop(text)]
