"""Runs one model for many clients: a queue, and one thread that generates.

    engine = Engine("out-mine", open_model("out-mine", device, dtype), max_queue=16)
    job = engine.submit(request)        # raises Busy if too many wait
    while (pieces := job.results.get()) is not None: ...
    engine.cancel(job)                  # ends it within a token, or removes it from the queue

One thread does all work on a model: requests are answered in order of arrival, and CUDA graphs and
OpenMP's workers, which belong to a thread, are created once. A client that reads slowly does not
delay others: its results wait in the job.
"""
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Condition, Thread
from typing import NamedTuple

import torch

from nanotune.device import autocast
from nanotune.errors import out_of_memory
from nanotune.generation.fast import Model
from nanotune.generation.generate import TextPieces, stream, text_before


class Busy(Exception):
    """The queue is full."""


class Token(NamedTuple):
    """A token's text, its log-probability (None for a prompt's first token), and the most likely
    tokens at its position, {text: log-probability}; at temperature 1 without the penalty."""
    text: str
    logprob: float | None
    top: dict[str, float] | None


@dataclass
class Piece:
    """New text of the sample `row`. At the sample's end `finish` is stop or length, and `count` is
    its number of tokens. `tokens`, if log-probabilities are requested, are the text's tokens."""
    row: int
    text: str
    tokens: list[Token]
    finish: str | None = None
    count: int = 0


@dataclass
class Request:
    """A batch to generate: one sample for each prompt (ids), with the options of stream()."""
    prompts: list[list[int]]
    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0                # 0: all
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stops: list[str] = field(default_factory=list)
    logprobs: int | None = None   # number of alternatives per token; None: no probabilities
    echo: list[str] | None = None  # texts of the prompts, to send first


@dataclass(eq=False)
class Job:
    """A submitted request. `results` gives one list of Piece per token, then None or the exception
    that ended the job."""
    request: Request
    results: SimpleQueue = field(default_factory=SimpleQueue)
    cancelled: bool = False


class Engine:
    """One model, its queue and its thread. `name` is the model's name in requests."""
    def __init__(self, name: str, model: Model, max_queue: int) -> None:
        self.name, self.model, self.max_queue = name, model, max_queue
        self.waiting, self.running, self.closed = deque(), None, False
        self.changed = Condition()
        self.thread = Thread(target=self.work, name=f"engine {name}", daemon=True)
        self.thread.start()

    def submit(self, request: Request) -> Job:
        """Puts a request into the queue. Raises Busy if max_queue others wait already."""
        job = Job(request)
        with self.changed:
            if len(self.waiting) + (self.running is not None) > self.max_queue:
                raise Busy
            self.waiting.append(job)
            self.changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Ends a job; does nothing if it has ended."""
        job.cancelled = True
        with self.changed:
            if job in self.waiting:
                self.waiting.remove(job)

    def close(self) -> None:
        """Ends all jobs, with a ConnectionAbortedError, and the thread."""
        with self.changed:
            self.closed = True
            if self.running is not None:
                self.running.cancelled = True
            for job in self.waiting:
                job.results.put(ConnectionAbortedError())
            self.changed.notify()
        self.thread.join()

    def work(self):
        if self.model.device.type == "cuda":  # each thread has its own current device
            torch.cuda.set_device(self.model.device)
        while (job := self.next_job()) is not None:
            try:
                for pieces in generate(self.model, job.request):
                    job.results.put(pieces)
                    if job.cancelled:
                        break
                job.results.put(ConnectionAbortedError() if job.cancelled else None)
            except Exception as e:  # the server continues; the client gets the error
                if not out_of_memory(e):
                    traceback.print_exc()
                job.results.put(e)

    def next_job(self):
        """Waits for the next job; None after close()."""
        with self.changed:
            self.running = None
            self.changed.wait_for(lambda: self.waiting or self.closed)
            if not self.closed:
                self.running = self.waiting.popleft()
            return self.running


# -----------------------------------------------------------------------------
# one request

def generate(model: Model, request: Request) -> Iterator[list[Piece]]:
    """Yields the new pieces of text after each token; with echo, the prompts first. A sample ends
    at end-of-text, at a stop, or after max_tokens."""
    r, tokenizer = request, model.tokenizer
    rows = [Row(i, tokenizer, text_before(model.plain, ids), r.stops)
            for i, ids in enumerate(r.prompts)]
    with autocast(model.device, model.dtype, cache=True):
        if r.echo is not None:
            yield echo(model, r)
        tokens = stream(
            model.fast, r.prompts, r.max_tokens, temperature=r.temperature, top_k=r.top_k or None,
            top_p=r.top_p, repetition_penalty=r.repetition_penalty, stop_token=tokenizer.eot,
            n_vocab=tokenizer.n_vocab, with_logits=True,
            generator=torch.Generator(model.device).manual_seed(r.seed))
        for ids, logits in tokens if r.max_tokens else ():
            known = [None] * len(rows)
            if r.logprobs is not None:
                known = describe(tokenizer, logits, ids, r.logprobs)
            found = [row.add(id, token) for row, id, token in zip(rows, ids.tolist(), known)
                     if row.finish is None]
            yield [piece for piece in found if piece is not None]
            if all(row.finish for row in rows):
                return
    yield [row.end() for row in rows if row.finish is None]


class Row:
    """A sample as it grows, and the tokens whose text is not ready yet."""
    def __init__(self, index, tokenizer, ids, stops):
        self.index, self.eot = index, tokenizer.eot
        self.pieces = TextPieces(tokenizer, ids, stops)
        self.pending, self.count, self.finish = [], 0, None

    def add(self, id, token):
        """The Piece that is ready after this id, or None; `token` is None without logprobs."""
        self.count += 1
        if id != self.eot and token is not None:
            self.pending.append(token)
        text = self.pieces.add(id)
        if self.pieces.done:
            return self.end(text)
        return self.piece(text) if text else None

    def end(self, text=""):
        self.finish = "stop" if self.pieces.done else "length"
        return self.piece(text + self.pieces.rest())

    def piece(self, text):
        tokens, self.pending = self.pending if text else [], []  # a stop's tokens have no text
        return Piece(self.index, text, tokens, self.finish, self.count)


def describe(tokenizer, logits, ids, k):
    """The Token of each of R ids (R,), with k alternatives each, from logits (R, V). A token that
    is part of a character has the text token_id:ID."""
    def text(id):
        found = tokenizer.decode([id])
        return f"token_id:{id}" if "\ufffd" in found else found

    logp = logits.float().log_softmax(-1)
    chosen = logp.gather(1, ids[:, None])[:, 0]
    tops = []
    for values, columns in zip(*(part.tolist() for part in logp.topk(min(k, logp.size(1))))):
        top = {}
        for id, value in zip(columns, values):
            top.setdefault(text(id), value)  # if tokens have the same text, the most likely
        tops.append(top)
    return [Token(text(id), value, top)
            for id, value, top in zip(ids.tolist(), chosen.tolist(), tops)]


def echo(model, request):
    """The prompts as pieces, with the log-probabilities of their tokens if requested."""
    found = {}  # the n samples of a prompt share them
    for ids, text in zip(request.prompts, request.echo):
        if request.logprobs is not None and tuple(ids) not in found:
            found[tuple(ids)] = prompt_tokens(model, ids, request.logprobs) if text else []
    return [Piece(row, text, found.get(tuple(ids), []))
            for row, (ids, text) in enumerate(zip(request.prompts, request.echo))]


@torch.no_grad()
def prompt_tokens(model, ids, k):
    """The Token of each of a prompt's ids."""
    tokens = [Token(model.tokenizer.decode(ids[:1]), None, None)]
    if len(ids) > 1:
        idx = torch.tensor([ids], device=model.device)
        for logits in model.plain.logits_at(idx[:, :-1], idx[:, 1:]):  # (n, V) at a time
            targets = idx[0, len(tokens):len(tokens) + len(logits)]
            tokens += describe(model.tokenizer, logits[:, :model.tokenizer.n_vocab], targets, k)
    return tokens
