r"""Reads users' text and .jsonl files: datasets, prompts, evaluation input.

    text = read_text(path)                     # no byte order mark; \r\n becomes \n
    for where, fields in read_jsonl(path):     # where: "FILE, line N", for messages

Text must be UTF-8. Each function raises UserError, with the file and what to do, for anything else.
"""
import codecs
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from nanotune.errors import UserError

BLOCK = 1 << 18  # bytes to read at once
SAMPLE = 4096  # bytes to search for signs of UTF-16
# {byte order mark: iconv's name of the encoding}; UTF-32 comes first: its mark begins with UTF-16's
BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32",
                    b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_text(path: str | Path) -> str:
    r"""Returns a UTF-8 file as text, without a byte order mark and with \r\n as \n: GPT-2's
    training text has hardly any \r. Raises UserError if the file is missing or not UTF-8 text."""
    return "".join(stream_text(path))


def stream_text(path: str | Path) -> Iterator[str]:
    """Yields the text of read_text() in parts of at most BLOCK + 1 characters. Raises UserError as
    read_text() does; for too many NUL characters, only after the last part."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    characters = nul = 0
    with open(path, "rb") as f:
        if encoding := wide_encoding(f.read(SAMPLE)):
            raise UserError(f"{path} is {encoding}, not UTF-8; {convert(encoding, path)}")
        f.seek(0)
        old_mac = not any(b"\n" in block for block in iter(lambda: f.read(BLOCK), b""))
        f.seek(0)
        for text in decode(f, path):
            characters, nul = characters + len(text), nul + text.count("\0")
            yield text.replace("\r", "\n") if old_mac else text.replace("\r\n", "\n")
    if nul * 100 > characters:
        raise UserError(f"{path} is not text: {nul:,} of its {characters:,} characters are NUL; if "
                        f"it is UTF-16, {convert('UTF-16LE', path)}")


def decode(f, path):
    r"""Yields the text of an open file in parts, which do not end between \r and \n."""
    decoder, rest = codecs.getincrementaldecoder("utf-8-sig")(), ""
    while True:
        block = f.read(BLOCK)
        try:
            text = rest + decoder.decode(block, final=not block)
        except UnicodeDecodeError as e:  # e.object ends where the block does
            raise UserError(f"{path} is not UTF-8: byte {e.object[e.start]:#04x} at offset "
                            f"{f.tell() - len(e.object) + e.start:,}; if it is Western European "
                            f"text, {convert('WINDOWS-1252', path)}") from None
        if not block:
            yield text
            return
        rest = "\r" if text.endswith("\r") else ""
        yield text.removesuffix("\r")


def wide_encoding(content):
    """The name of the UTF-16 or UTF-32 encoding of these bytes, or None.

    UTF-16 without a byte order mark is recognized by NUL bytes, the high bytes of ASCII characters.
    """
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            return encoding
    sample = content[:SAMPLE]
    for first, encoding in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        high, low = sample[first::2], sample[1 - first::2]
        if high.count(0) * 2 > len(high) > 0 and low.count(0) * 10 < len(low):
            return encoding
    return None


def convert(encoding, path):
    """The advice for a file in another encoding."""
    new = path.with_name(f"{path.stem}-utf8{path.suffix}")
    return (f"convert it: iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > "
            f"{shlex.quote(str(new))}")


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yields ('FILE, line N', fields) for each line of a .jsonl file that is not blank. Raises
    UserError if a line is not a JSON object, or a field has half of a surrogate pair."""
    for number, line in enumerate(split_lines(stream_text(path)), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as e:
            raise UserError(f"{where}: malformed JSON ({e.msg} at column {e.colno})") from None
        except (ValueError, RecursionError) as e:  # a number of 5,000 digits, deep nesting
            raise UserError(f"{where}: malformed JSON ({e})") from None
        if not isinstance(fields, dict):
            raise UserError(f"{where}: must be a JSON object, not {line.strip()[:40]}")
        for value in fields.values():
            if isinstance(value, str):
                check_surrogates(value, where)
        yield where, fields


def split_lines(parts):
    """Yields the lines of a text in parts, without their ends."""
    rest = ""
    for part in parts:
        *lines, rest = (rest + part).split("\n")
        yield from lines
    yield rest


def check_surrogates(text: str, where: str) -> None:
    """Raises UserError if `text` has a lone surrogate, which no tokenizer can encode. It comes from
    "\\ud83d" in JSON, or from a command line that is not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise UserError(f"{where}: character {e.start + 1:,} is {ascii(text[e.start])[1:-1]}, half "
                        "of a surrogate pair and not a character; remove it") from None
