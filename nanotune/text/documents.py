r"""Finds the documents in text files and encodes them a part at a time, so that memory does not
grow with the size of a file.

    documents = list(find_documents(path, mark="<|endoftext|>"))    # positions, not text
    pieces = [(document, True) for document in documents]           # True: a document ends there
    texts = read_texts(pieces, tokenizer.sliceable)
    for ids, lengths in encode(tokenizer, texts, sum(map(len, documents)), "train"):
        file.write(ids)

A piece may also be a str. The ids are the same as those of the whole text encoded at once.
"""
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanotune.errors import UserError
from nanotune.text.read import stream_text
from nanotune.text.tokenizer import AnyTokenizer

TOKEN = np.dtype("<u2")     # of a .bin file
SLICE = 1 << 16             # characters of a long text that one core encodes at once
BATCH = 1 << 22             # characters that all cores together encode at once
EDGE = 1 << 12              # characters kept of each end of a document, to trim it
WORD_END = re.compile(r".*\S(?=[ \n])", re.DOTALL)


@dataclass(slots=True)
class Document:
    """The characters `start` to `end` of stream_text(file). Supports len() and slices, like str."""
    file: Path
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, part: slice) -> "Document":
        start, end, _ = part.indices(len(self))
        return Document(self.file, self.start + start, self.start + max(start, end))


Pieces = list[tuple[str | Document, bool]]      # (text, whether a document ends after it)


# -----------------------------------------------------------------------------
# from files to documents

def find_documents(file: Path, mark: str | None, end: str | None = None) -> Iterator[Document]:
    """Yields the documents of a file, separated by a mark such as <|endoftext|>, except blank ones.
    Newlines around a mark are dropped with it. At the end of a document, the text `end` and white
    space after it are dropped. Raises UserError as stream_text() does."""
    start = length = 0      # the current document, in characters
    head = tail = ""        # its text; of a long document only both ends
    marked = False
    for part, separator in split_parts(stream_text(file), mark):
        length += len(part)
        if len(head) < EDGE or head.isspace():
            head += part
        else:
            tail += part
            tail = tail[max(0, len(tail.rstrip()) - EDGE):]
        if separator is None:
            continue
        marked = marked or separator != ""
        before, text = trim(head + tail, marked, end)
        between = length - len(head + tail)
        if text.strip():
            yield Document(file, start + before, start + before + len(text) + between)
        start += length + len(separator)
        length, head, tail = 0, "", ""


def trim(text, marked, end):
    """(Number of characters dropped at the start of a document, its text without what
    find_documents() drops). Newlines are dropped only if the file has marks."""
    before = 0
    if marked:
        before = len(text) - len(text.lstrip("\n"))
        text = text.strip("\n")
    if end and text.rstrip().endswith(end):
        text = text.rstrip().removesuffix(end)
    return before, text


def split_parts(parts: Iterable[str], mark: str | None) -> Iterator[tuple[str, str | None]]:
    """Splits a text at the marks: yields (text, separator). The separator is the mark if the mark
    follows, "" at the end of the text, and None where the next pair continues this document."""
    rest = ""
    for part in parts:
        rest += part
        if mark:
            *whole, rest = rest.split(mark)
            yield from ((text, mark) for text in whole)
        cut = max(0, len(rest) - len(mark or "") + 1)    # `rest` may end with part of a mark
        yield rest[:cut], None
        rest = rest[cut:]
    yield rest, ""


class Reader:
    """Reads a file's documents in order."""
    def __init__(self, file: Path) -> None:
        self.file, self.parts, self.part, self.at = file, stream_text(file), "", 0

    def read(self, document: Document) -> Iterator[str]:
        """Yields the parts of a document that begins at self.at or later."""
        while self.at + len(self.part) < document.end:
            if self.at + len(self.part) > document.start:
                yield self.part[max(0, document.start - self.at):]
            self.at += len(self.part)
            self.part = next(self.parts, None)
            if self.part is None:
                raise UserError(f"{self.file} became shorter while it was read; run this again")
        yield self.part[max(0, document.start - self.at):document.end - self.at]


def read_pieces(pieces: Pieces) -> Iterator[tuple[Iterator[str], bool]]:
    """Yields (the parts of a piece's text, whether a document ends after the piece). Consume all
    parts of a piece before the next piece. Reads a file once if its documents are in order."""
    reader = None
    for document, ends in pieces:
        if isinstance(document, str):
            yield iter((document,)), ends
            continue
        if reader is None or reader.file != document.file or reader.at > document.start:
            reader = Reader(document.file)
        yield reader.read(document), ends


# -----------------------------------------------------------------------------
# from documents to ids

def slices(parts: Iterable[str], length: int = SLICE) -> Iterator[str]:
    """Yields a text in slices of `length` characters or more, cut after a word and before a space
    or a newline: GPT-2's pattern never joins a word to the white space after it."""
    rest, seen = "", 0      # rest[:seen] was searched and has no place for a cut
    for part in parts:
        for start in range(0, len(part), length):
            if len(rest) >= length:
                if cut := WORD_END.match(rest, seen):
                    yield rest[:cut.end()]
                    rest, seen = rest[cut.end():], 0
                else:
                    seen = len(rest) - 1
            rest += part[start:start + length]
    yield rest


def read_texts(pieces: Pieces, sliceable: bool) -> Iterator[tuple[str, bool]]:
    """Yields (text, whether a document ends after it) for pieces, in slices if `sliceable`."""
    for parts, ends in read_pieces(pieces):
        last = None
        for text in slices(parts) if sliceable else ["".join(parts)]:
            if last is not None:
                yield last, False
            last = text
        yield last, ends


def document_end(tokenizer: AnyTokenizer) -> list[int]:
    """Returns the ids that end a document: end-of-text, else a newline, else none, depending on the
    vocabulary."""
    if tokenizer.eot is not None:
        return [tokenizer.eot]
    try:
        return tokenizer.encode("\n")
    except UserError:
        return []


def batches(texts: Iterable[tuple[str, bool]],
            length: int = BATCH) -> Iterator[list[tuple[str, bool]]]:
    """Yields the items in lists of about `length` characters."""
    batch, waiting = [], 0
    for text, ends in texts:
        batch.append((text, ends))
        waiting += len(text)
        if waiting >= length:
            yield batch
            batch, waiting = [], 0
    if batch:
        yield batch


def encode(tokenizer: AnyTokenizer, texts: Iterable[tuple[str, bool]], total: int,
           name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encodes texts on all cores, in batches of m: yields (ids of the batch, (n,) TOKEN; number of
    ids of each text, (m,)). Adds document_end() after a text whose second item is true. Shows a
    progress bar of `total` characters. Raises UserError if the vocabulary cannot express a text."""
    end = np.array(document_end(tokenizer), TOKEN)
    after = {True: end, False: end[:0]}
    with tqdm(desc=name, total=total, unit="char", unit_scale=True, disable=None) as bar:
        for batch in batches(texts):
            ids = tokenizer.encode_batch([text for text, _ in batch])
            ends = [after[ends] for _, ends in batch]
            pairs = list(zip(ids, ends, strict=True))
            yield (np.concatenate([part for pair in pairs for part in pair], dtype=TOKEN,
                                  casting="unsafe"),
                   np.array([len(text) + len(end) for text, end in pairs]))
            bar.update(sum(len(text) for text, _ in batch))
