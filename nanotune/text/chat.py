r"""Encodes conversations as tokens, with a mask of those that count in the loss.

    attach(tokenizer, Template())       # stored as plain data in the tokenizer's spec
    messages = read_messages(fields["messages"], "FILE, line 1")
    ids, mask = encode_chat(tokenizer, messages)            # a whole conversation, to train on
    ids, dropped = chat_prompt(tokenizer, messages, most)   # up to the assistant's next text

The default template is plain text, so that it needs no new tokens:

    System: Be brief.
    ###
    User: What is 2 + 2?
    ###
    Assistant: 4
    ###

A turn is a role, a text with a space before it, and the end "\n###\n", at which generation stops. A
text has no white space around it and does not contain the end, so no text can end or begin a turn.
End-of-text comes only after the whole conversation.

Role, text and end are encoded one by one, so training and generation have the same ids. GPT-2's
pattern splits between them anyway, so transformers, which encodes the whole conversation at once
with the template's jinja(), gets the same ids.
"""
import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nanotune.errors import UserError
from nanotune.text.read import check_surrogates
from nanotune.text.tokenizer_files import read_optional

ROLES = ("system", "user", "assistant")
KEY = "nanotune_chat"  # the template's key in tokenizer_config.json


class Message(NamedTuple):
    """A turn; `content` has no white space around it."""
    role: str
    content: str


@dataclass(frozen=True)
class Template:
    """The text of each role, what comes before a text, and what ends a turn."""
    system: str = "System:"
    user: str = "User:"
    assistant: str = "Assistant:"
    before: str = " "
    end: str = "\n###\n"

    def spec(self) -> dict[str, str]:
        """Returns the template as plain data, which template_from() reads."""
        return asdict(self)

    def text(self, messages: Sequence[Message]) -> str:
        """Returns a conversation as one text."""
        return "".join(f"{getattr(self, role)}{self.before}{content}{self.end}"
                       for role, content in messages)

    def jinja(self) -> str:
        """Returns the chat_template for transformers; it refuses the same texts as check_text().
        """
        roles = "".join(f"{'el' if i else ''}if message['role'] == {role!r} %}}"
                        f"{{{{ {getattr(self, role)!r} }}}}{{% " for i, role in enumerate(ROLES))
        return (
            "{% for message in messages %}"
            f"{{% set text = {self.before!r} + message['content'] | trim %}}"
            f"{{% if {self.end!r} in text or (eos_token and eos_token in text) %}}"
            "{{ raise_exception('A message holds the mark that ends a turn') }}{% endif %}"
            f"{{% {roles}else %}}{{{{ raise_exception('Unknown role') }}}}{{% endif %}}"
            f"{{{{ text + {self.end!r} }}}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {self.assistant!r} }}}}{{% endif %}}")


def template_from(spec: Any, where: str) -> Template | None:
    """Returns the template of a spec, or None if the spec is None. Raises UserError, which begins
    with `where`, if the spec is damaged."""
    if spec is None:
        return None
    if not isinstance(spec, dict) or spec.keys() != asdict(Template()).keys():
        raise UserError(f"{where}: its chat template is damaged; it must have "
                        f"{', '.join(asdict(Template()))}")
    template = Template(**spec)
    if not all(isinstance(text, str) for text in astuple(template)) or not template.end:
        raise UserError(f"{where}: its chat template is damaged; its parts must be strings")
    return template


def template_of_folder(folder: str | Path) -> Template | None:
    """Returns the template in a folder's tokenizer_config.json, or None if it has none. Raises
    UserError if it is damaged."""
    file = Path(folder) / "tokenizer_config.json"
    return template_from(read_optional(file).get(KEY), str(file))


def attach(tokenizer: Any, template: Template | None) -> Any:
    """Returns the tokenizer with this template, also in its `spec`; unchanged if either is None."""
    if tokenizer is not None and template is not None:
        tokenizer.chat, tokenizer.spec = template, tokenizer.spec | {"chat": template.spec()}
    return tokenizer


def chat_config(tokenizer: Any) -> bytes:
    """Returns the tokenizer_config.json of a dataset's folder; template_of_folder() reads the
    template in it."""
    return json.dumps(tokenizer.special | {KEY: tokenizer.chat.spec()}, indent=2).encode()


def check_template(tokenizer: Any, source: str) -> None:
    """Raises UserError if the tokenizer has no template."""
    if tokenizer.chat is None:
        raise UserError(f"{source} has no chat template: it was not finetuned on conversations; "
                        "data/chat/prepare.py makes a dataset of them")


# -----------------------------------------------------------------------------
# messages

def read_messages(value: Any, where: str) -> list[Message]:
    """Returns a list of {"role", "content"} as messages, without white space around a text; other
    keys are ignored. Raises UserError, which begins with `where`, for anything else."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: must be a list of messages, each with role and content")
    messages = []
    for number, item in enumerate(value, 1):
        at = f"{where}: message {number}"
        if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
            raise UserError(f"{at} must be an object with role and content")
        role, content = item["role"], item["content"]
        if role not in ROLES:
            raise UserError(f"{at} has the role {role!r:.40}; use {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"{at}: its content must be a string, not {content!r:.40}")
        check_surrogates(content, at)
        if not content.strip():
            raise UserError(f"{at}: its content is empty; fill it or leave the message out")
        if role == "system" and number > 1:
            raise UserError(f"{at}: only the first message may have the role system")
        if role == "assistant" and not any(message.role == "user" for message in messages):
            raise UserError(f"{at}: an assistant answers a user; begin with a user's message")
        messages.append(Message(role, content.strip()))
    return messages


def ends_of_turn(tokenizer: Any) -> list[str]:
    """Returns the texts at which an answer stops and which no message may contain: the template's
    end and the spelling of end-of-text."""
    return list(filter(None, (tokenizer.chat.end, tokenizer.special.get("eos_token"))))


def check_text(text: str, tokenizer: Any, where: str) -> None:
    """Raises UserError if a text contains the end of a turn or end-of-text: the rest of the text
    would be another turn."""
    for mark in ends_of_turn(tokenizer):
        if mark in tokenizer.chat.before + text:
            raise UserError(f"{where} holds {mark!r}, which ends a turn; remove it")


# -----------------------------------------------------------------------------
# tokens

def encode_turns(tokenizer: Any,
                 messages: Sequence[Message]) -> list[tuple[list[int], list[int]]]:
    """Returns (ids, mask) of each turn; the mask is 1 for an assistant's text and its end, else 0.
    Raises UserError as check_text() does."""
    template = tokenizer.chat
    for number, message in enumerate(messages, 1):
        check_text(message.content, tokenizer, f"message {number}")
    heads = {role: tokenizer.encode(getattr(template, role))
             for role in {message.role for message in messages}}
    texts = tokenizer.encode_batch([template.before + message.content for message in messages])
    end, turns = tokenizer.encode(template.end), []
    for message, text in zip(messages, texts):
        head, body = heads[message.role], [*text.tolist(), *end]
        turns.append(([*head, *body],
                      [0] * len(head) + [int(message.role == "assistant")] * len(body)))
    return turns


def encode_chat(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Returns (ids, mask) of a conversation. Raises UserError as check_text() does."""
    turns = encode_turns(tokenizer, messages)
    return tuple([x for turn in turns for x in turn[part]] for part in (0, 1))


def chat_prompt(tokenizer: Any, messages: Sequence[Message],
                most: int) -> tuple[list[int], int]:
    """Returns (ids of a conversation up to the assistant's next text, number of messages left out).

    Leaves out the oldest messages, so that at most `most` ids remain. A system message is always
    kept; the first message kept after it is a user's. Raises UserError if the last message does not
    fit, or as check_text() does."""
    turns = [ids for ids, _ in encode_turns(tokenizer, messages)]
    answer = tokenizer.encode(tokenizer.chat.assistant)
    first = int(messages[0].role == "system")
    head = turns[0] if first else []
    begin, used, at = None, len(head) + len(answer), len(turns)
    while at > first and used + len(turns[at - 1]) <= most:
        at -= 1
        used += len(turns[at])
        begin = at if messages[at].role == "user" else begin
    if begin is None:
        last = len(head) + len(turns[-1]) + len(answer)
        raise UserError(f"the message takes {last} tokens{' with the system text' * first}; the "
                        f"model reads at most {most} before its answer: shorten it")
    return [*head, *(i for ids in turns[begin:] for i in ids), *answer], begin - first


def room_for_answer(block_size: int, max_new_tokens: int) -> int:
    """Returns the number of tokens of the context that a prompt must leave for the answer."""
    return min(max_new_tokens, max(1, block_size // 4))
