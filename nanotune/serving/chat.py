"""Requests and answers of /v1/chat/completions, in OpenAI's form.

    completion = parse_chat(body, engines, limits)    # raises ApiError
    answer = ChatAnswer(completion)
    answer.chunk(piece)         # one event of a stream
    answer.whole(results)       # the whole answer at once

Fields are those of /v1/completions, with messages instead of prompt, and without echo and logprobs.
If a conversation is longer than the context, its oldest messages are dropped; dropped_messages, an
addition to OpenAI's fields, is their number.
"""
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any

from nanotune.errors import UserError
from nanotune.serving.api import (
    KNOWN,
    ApiError,
    Completion,
    Limits,
    check_fields,
    check_max_tokens,
    check_stops,
    pick_engine,
    usage,
)
from nanotune.serving.engine import Engine, Piece, Request
from nanotune.text.chat import (
    Message,
    chat_prompt,
    check_template,
    ends_of_turn,
    read_messages,
    room_for_answer,
)

CHAT_KNOWN = {key: kind for key, kind in KNOWN.items() if key not in ("prompt", "echo", "logprobs")
              } | {"messages": (list, None), "max_completion_tokens": KNOWN["max_tokens"]}
CHAT_NEUTRAL = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "logprobs": False,
                "top_logprobs": None, "response_format": {"type": "text"}, "tools": [],
                "tool_choice": "none", "stream_options": None, "store": False, "user": None}


def parse_chat(body: Any, engines: Mapping[str, Engine], limits: Limits) -> Completion:
    """Checks a request's body, parsed from JSON. Raises ApiError, which names the field."""
    given = check_fields(body, CHAT_KNOWN, CHAT_NEUTRAL)
    engine, n = pick_engine(given, engines), given.pop("n", 1)
    tokenizer, size = engine.model.tokenizer, engine.model.plain.config.block_size
    if n > limits.max_batch:
        raise ApiError(400, f"n is {n}; this server allows at most {limits.max_batch} samples per "
                       "request", "n")
    if (longer := given.pop("max_completion_tokens", None)) is not None:
        given.setdefault("max_tokens", longer)
    check_max_tokens(given.get("max_tokens", 0), limits)
    try:
        check_template(tokenizer, engine.name)
    except UserError as e:
        raise ApiError(400, f"{e}; use /v1/completions", "model") from None
    room = room_for_answer(size, given.get("max_tokens", limits.max_tokens))
    try:
        messages = checked_messages(given.pop("messages", None))
        ids, dropped = chat_prompt(tokenizer, messages, size - room)
    except UserError as e:
        raise ApiError(400, str(e), "messages") from None
    given.setdefault("max_tokens", min(limits.max_tokens, max(1, size - len(ids))))
    request = Request(
        prompts=[ids] * n, stops=[*ends_of_turn(tokenizer), *check_stops(given.pop("stop", []))],
        seed=given.pop("seed", secrets.randbelow(2**32)),
        **{key: value for key, value in given.items() if key != "stream"})
    return Completion(engine, request, len(ids), given.get("stream", False), dropped)


def checked_messages(value: Any) -> list[Message]:
    """The messages of a request. A content may be a list of text parts. Raises UserError if the
    messages are invalid, one has an unsupported field, or the last is not the user's."""
    plain = [message | {"content": text_of(message["content"])}
             if isinstance(message, dict) and "content" in message else message
             for message in value] if isinstance(value, list) else value
    messages = read_messages(plain, "messages")
    for number, message in enumerate(plain, 1):
        other = next((key for key, field in message.items()
                      if key not in ("role", "content") and field is not None), None)
        if other is not None:
            raise UserError(f"messages: message {number}: {other[:99]} is not supported; leave it "
                            "out")
    if messages[-1].role != "user":
        raise UserError("messages: the last must be a user's; the model answers it")
    return messages


def text_of(content: Any) -> Any:
    """A list of parts {"type": "text", "text"} as one text; anything else unchanged."""
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts
             if isinstance(part, dict) and part.get("type") == "text"]
    whole = len(texts) == len(parts) > 0 and all(isinstance(text, str) for text in texts)
    return "".join(texts) if whole else content


class ChatAnswer:
    """The answer to a conversation. White space at the beginning of its texts is removed."""
    def __init__(self, completion: Completion) -> None:
        self.prompt_tokens = completion.prompt_tokens
        self.has_text = [False] * len(completion.request.prompts)
        self.role_sent = list(self.has_text)
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()),
                     "model": completion.engine.name, "dropped_messages": completion.dropped}

    def text(self, piece):
        """The text of a piece, without white space at the beginning of the whole text."""
        text = piece.text if self.has_text[piece.row] else piece.text.lstrip()
        self.has_text[piece.row] |= bool(text)
        return text

    def chunk(self, piece: Piece) -> dict:
        """Returns an event of a stream."""
        delta = {} if self.role_sent[piece.row] else {"role": "assistant"}
        self.role_sent[piece.row] = True
        choice = {"index": piece.row, "delta": delta | {"content": self.text(piece)},
                  "logprobs": None, "finish_reason": piece.finish}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice]}

    def whole(self, results: Iterable[list[Piece]]) -> dict:
        """Returns the answer with the whole text of each sample."""
        texts, finish, generated = [""] * len(self.has_text), [None] * len(self.has_text), 0
        for pieces in results:
            for piece in pieces:
                texts[piece.row] += self.text(piece)
                finish[piece.row] = piece.finish
                generated += piece.count if piece.finish else 0
        choices = [{"index": row, "message": {"role": "assistant", "content": text},
                    "logprobs": None, "finish_reason": finish[row]}
                   for row, text in enumerate(texts)]
        return {**self.head, "object": "chat.completion", "choices": choices,
                "usage": usage(self.prompt_tokens, generated)}
