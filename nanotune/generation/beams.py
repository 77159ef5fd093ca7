"""Beam search: keeps the num_beams most likely partial answers, instead of one.

    answers = beam_search(model, prompts, 100, num_beams=4)  # ids of the best answer to each prompt

The algorithm is that of generate(num_beams=..., do_sample=False, early_stopping=False) in
transformers 5. A model is as for stream().
"""
from collections.abc import Sequence
from typing import Any

import torch

from nanotune.errors import UserError

NEVER = -1e9  # the score of a beam that must not be chosen


def check_length_penalty(cfg: Any) -> None:
    """Raises UserError if a script's config has a length_penalty, but no num_beams."""
    if cfg.num_beams is None and cfg.length_penalty != 1:
        raise UserError("--length_penalty ranks beams: give --num_beams too, such as --num_beams=4")


class Search:
    """The beams of one prompt: the active beams, and the best of the ended ones."""
    def __init__(self, num_beams: int, length_penalty: float, stop_token: int | None) -> None:
        self.n, self.penalty, self.stop_token = num_beams, length_penalty, stop_token
        self.beams = [[] for _ in range(num_beams)]   # the new tokens of each
        self.scores = [0.0] + [NEVER] * (num_beams - 1)  # log p; at first only one counts
        self.rows = list(range(num_beams))  # the beam of the previous step that each continues
        self.ended, self.done = [], False   # [(score, tokens)], best first

    def add(self, scores: list[float], rows: list[int], tokens: list[int], last: bool) -> None:
        """Adds the best continuations, best first: log p, beam and next token of each. A
        continuation that ends counts only if it is among the first n. With `last` all end."""
        live, length = [], len(self.beams[0]) + 1
        for rank, (score, row, token) in enumerate(zip(scores, rows, tokens)):
            if not last and token != self.stop_token:
                live.append((score, row, [*self.beams[row], token]))
            elif rank < self.n:
                self.ended.append((self.normalized(score, length), [*self.beams[row], token]))
        self.ended = sorted(self.ended, key=lambda pair: -pair[0])[:self.n]
        best = self.normalized(live[0][0], length) if live else NEVER
        self.done = not live or (len(self.ended) == self.n and best <= self.ended[-1][0])
        if not self.done:  # otherwise the beams are no longer used
            self.scores, self.rows, self.beams = map(list, zip(*live[:self.n]))

    def normalized(self, score, length):
        return score / length ** self.penalty


@torch.no_grad()
def beam_search(model: Any, prompts: Sequence[list[int]], max_new_tokens: int, num_beams: int,
                length_penalty: float = 1.0, stop_token: int | None = None,
                n_vocab: int | None = None) -> list[list[int]]:
    """Returns the ids of the best of num_beams answers to each of B prompts. An answer's score is
    log p / number of tokens ** length_penalty; it ends with stop_token or after max_new_tokens.

    A prompt's search ends when num_beams answers have ended and no active beam, at its present
    length, scores higher than the worst of them. Ids of n_vocab and above are never chosen.
    When a GPT's context is full, its later half is read again, as in stream().
    """
    n = num_beams
    cache, logits = model.start(prompts, max_new_tokens)
    rows = torch.arange(len(prompts), device=logits.device).repeat_interleave(n)
    cache.reorder(rows)
    logits = logits[rows]
    searches = [Search(n, length_penalty, stop_token) for _ in prompts]
    for left in range(max_new_tokens, 0, -1):
        logp = logits[:, :n_vocab].log_softmax(-1)                             # (B n, V)
        scores = torch.tensor([search.scores for search in searches], device=logits.device)
        both = (logp + scores.view(-1, 1)).view(len(prompts), -1)              # (B, n V)
        # 2 n: at most n of them end, so n can continue
        found, at = (part.tolist() for part in both.topk(min(2 * n, both.size(1))))
        for search, best, columns in zip(searches, found, at):
            if not search.done:
                row, token = zip(*(divmod(column, logp.size(1)) for column in columns))
                search.add(best, row, token, last=left == 1)
        if all(search.done for search in searches):
            break
        rows = [number * n + row for number, search in enumerate(searches) for row in search.rows]
        new = [beam for search in searches for beam in search.beams]
        if cache.full:
            half = max(1, model.config.block_size // 2)
            cache, logits = model.start([[*prompts[i // n], *beam][-half:]
                                         for i, beam in enumerate(new)], left - 1, cache)
        else:
            cache.reorder(torch.tensor(rows, device=logits.device))
            ids = torch.tensor([beam[-1:] for beam in new], device=logits.device)
            logits = model.step(ids, cache)
    return [search.ended[0][1] for search in searches]
