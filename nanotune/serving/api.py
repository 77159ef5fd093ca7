"""Requests and answers of /v1/completions, in OpenAI's form.

    completion = parse_completion(body, engines, limits)    # raises ApiError
    answer = Answer(completion)
    answer.chunk(piece)         # one event of a stream
    answer.whole(results)       # the whole answer at once

Additions to OpenAI's fields: top_k and repetition_penalty. Log-probabilities are at temperature 1
without the penalty. chat.py does the same for conversations, with the checks of this file.
"""
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from configurator import Interval
from nanotune.errors import UserError
from nanotune.generation.generate import encode_prompt
from nanotune.serving.engine import Engine, Piece, Request
from nanotune.text.read import check_surrogates

# {field: (type, allowed numbers)}; a number that is left out or null gets its default
NUMBERS = {
    "max_tokens": (int, Interval(0)), "temperature": (float, Interval(0, 10, "[]")),
    "top_k": (int, Interval(0, 2**31)), "top_p": (float, Interval(0, 1, "[]")),
    "repetition_penalty": (float, Interval(0.01, 100, "[]")), "n": (int, Interval(1)),
    "seed": (int, Interval(0, 2**63)), "logprobs": (int, Interval(0, 20, "[]")),
}
OTHERS = {"model": str, "echo": bool, "stream": bool, "prompt": str | list, "stop": str | list}
KNOWN = NUMBERS | {key: (kind, None) for key, kind in OTHERS.items()}
# {unsupported field of OpenAI's: its default}; only the default and null are allowed
UNSUPPORTED = {"frequency_penalty": 0, "presence_penalty": 0, "best_of": 1, "logit_bias": {},
               "suffix": None, "stream_options": None, "user": None}
MOST_STOPS, LONGEST_STOP = 4, 200
TYPES = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error",
         500: "server_error", 503: "server_error"}


class ApiError(Exception):
    """An error response: the HTTP status, a one-line message, and the field that is wrong."""
    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param

    def body(self) -> dict:
        """Returns the error in OpenAI's form."""
        kind = TYPES.get(self.status, TYPES[400])
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": None}}


@dataclass
class Limits:
    """Maximum tokens per sample and samples per request (prompts x n)."""
    max_tokens: int = 2048
    max_batch: int = 16


@dataclass
class Completion:
    """A checked request: the engine to run it, and how to answer."""
    engine: Engine
    request: Request
    prompt_tokens: int
    stream: bool
    dropped: int = 0  # messages of a conversation that did not fit


def parse_completion(body: Any, engines: Mapping[str, Engine], limits: Limits) -> Completion:
    """Checks a request's body, parsed from JSON. Raises ApiError, which names the field."""
    given = check_fields(body, KNOWN, UNSUPPORTED)
    engine, n = pick_engine(given, engines), given.pop("n", 1)
    check_max_tokens(given.setdefault("max_tokens", min(16, limits.max_tokens)), limits)
    prompts = strings("prompt", given.pop("prompt", ""))
    if len(prompts) * n > limits.max_batch:
        raise ApiError(400, f"{len(prompts)} prompts x n={n} make {len(prompts) * n} samples; this "
                       f"server allows at most {limits.max_batch} per request",
                       "n" if len(prompts) <= limits.max_batch else "prompt")
    ids = [prompt_ids(engine, text, i) for i, text in enumerate(prompts, 1)]
    stream, echo = given.pop("stream", False), given.pop("echo", False)
    if echo and engine.model.plain.config.takes_pairs:
        raise ApiError(400, "echo is not supported: this model answers a prompt and does not "
                       "continue it; leave it out", "echo")
    request = Request(
        prompts=[row for row in ids for _ in range(n)], stops=check_stops(given.pop("stop", [])),
        seed=given.pop("seed", secrets.randbelow(2**32)),
        echo=[text for text in prompts for _ in range(n)] if echo else None, **given)
    return Completion(engine, request, sum(map(len, ids)), stream)


def check_fields(body: Any, known: Mapping[str, tuple], neutral: Mapping[str, Any]) -> dict:
    """Returns {field: value} of a request's body, without null and neutral fields. `known` has the
    type of each field and the Interval of numbers; `neutral` is as UNSUPPORTED. Raises ApiError
    for an unknown field, a wrong type or a number out of bounds."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    given = {key: check_field(key, value, known, neutral) for key, value in body.items()}
    return {key: value for key, value in given.items() if value is not None}


def pick_engine(given: dict, engines: Mapping[str, Engine]) -> Engine:
    """Removes the field model from `given` and returns its engine, by default the first."""
    name = given.pop("model", next(iter(engines)))
    if name not in engines:
        raise ApiError(404, f"there is no model {shown(name)}; GET /v1/models lists them", "model")
    return engines[name]


def check_max_tokens(max_tokens: int, limits: Limits) -> None:
    """Raises ApiError if max_tokens is above the server's limit."""
    if max_tokens > limits.max_tokens:
        raise ApiError(400, f"max_tokens is {max_tokens}; this server generates at most "
                       f"{limits.max_tokens}", "max_tokens")


def check_field(key, value, known, neutral):
    """The value of a field, checked for type and bounds; None: use the default."""
    plain = key in neutral and value == neutral[key] and (
        isinstance(value, bool) is isinstance(neutral[key], bool))
    if plain or (value is None and (key in known or key in neutral)):
        return None
    if key not in known:
        raise ApiError(400, f"{key[:99]} is not supported; leave it out", key[:99])
    kind, interval = known[key]
    if interval is not None:
        if type(value) not in (int, kind):
            name = "an integer" if kind is int else "a number"
            raise ApiError(400, f"{key} must be {name}, not {shown(value)}", key)
        if not interval.holds(value):
            raise ApiError(400, f"{key} must be {interval}, not {shown(value)}", key)
        return kind(value)
    if not isinstance(value, kind):
        name = {str: "a string", bool: "true or false",
                list: "a list"}.get(kind, "a string or a list")
        raise ApiError(400, f"{key} must be {name}, not {shown(value)}", key)
    return value


def shown(value):
    """A value for a message; for a list or an object, which may be deep, only its type."""
    return f"a {type(value).__name__}" if isinstance(value, list | dict) else f"{value!r:.40}"


def strings(key, value):
    """A string or a list of strings as a list; each must be valid in UTF-8."""
    values = [value] if isinstance(value, str) else value
    if not values or not all(isinstance(text, str) for text in values):
        raise ApiError(400, f"{key} must be a string or a list of strings", key)
    for text in values:
        try:
            check_surrogates(text, key)
        except UserError as e:
            raise ApiError(400, str(e), key) from None
    return values


def check_stops(value):
    stops = strings("stop", value) if value else []
    if len(stops) > MOST_STOPS or any(not 0 < len(stop) <= LONGEST_STOP for stop in stops):
        raise ApiError(400, f"stop must be up to {MOST_STOPS} strings of 1 to {LONGEST_STOP} "
                       "characters", "stop")
    return stops


def prompt_ids(engine, text, number):
    model = engine.model
    try:
        return encode_prompt(model.tokenizer, text, model.plain.config.block_size,
                             f"prompt {number}")
    except UserError as e:
        raise ApiError(400, str(e), "prompt") from None


# -----------------------------------------------------------------------------
# answers

class Answer:
    """The answer to a completion."""
    def __init__(self, completion: Completion) -> None:
        self.prompt_tokens = completion.prompt_tokens
        self.with_logprobs = completion.request.logprobs is not None
        self.offsets = [0] * len(completion.request.prompts)  # the length of each text so far
        self.head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion",
                     "created": int(time.time()), "model": completion.engine.name}

    def chunk(self, piece: Piece) -> dict:
        """Returns an event of a stream."""
        return {**self.head, "choices": [self.choice(piece)]}

    def whole(self, results: Iterable[list[Piece]]) -> dict:
        """Returns the answer with the whole text of each sample."""
        rows, generated = [[] for _ in self.offsets], 0
        for pieces in results:
            for piece in pieces:
                rows[piece.row].append(self.choice(piece))
                generated += piece.count if piece.finish else 0
        return {**self.head, "choices": list(map(joined, rows)),
                "usage": usage(self.prompt_tokens, generated)}

    def choice(self, piece):
        logprobs = self.logprobs(piece) if self.with_logprobs else None
        self.offsets[piece.row] += len(piece.text)
        return {"index": piece.row, "text": piece.text, "logprobs": logprobs,
                "finish_reason": piece.finish}

    def logprobs(self, piece):
        begin, offsets, length = self.offsets[piece.row], [], 0
        for token in piece.tokens:
            offsets.append(begin + min(length, len(piece.text)))
            length += len(token.text)
        return {"tokens": [token.text for token in piece.tokens],
                "token_logprobs": [token.logprob for token in piece.tokens],
                "top_logprobs": [token.top for token in piece.tokens], "text_offset": offsets}


def usage(prompt_tokens: int, generated: int) -> dict[str, int]:
    """Returns the token counts of an answer."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": generated,
            "total_tokens": prompt_tokens + generated}


def joined(choices):
    """Joins the choices of one sample's pieces."""
    *_, last = choices
    logprobs = last["logprobs"] and {key: [x for choice in choices for x in choice["logprobs"][key]]
                                     for key in last["logprobs"]}
    return {**last, "text": "".join(choice["text"] for choice in choices), "logprobs": logprobs}
