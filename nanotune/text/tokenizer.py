"""Converts text to token ids and back: GPT-2's BPE, a character vocabulary, or a tokenizer.json.

Three classes with one interface, AnyTokenizer, used for data, prompts and evaluation:
    n_vocab       all ids are less than n_vocab
    eot           the end-of-text id, or None
    special       {"eos_token": text, ...}: the special tokens by their role, for other programs
    special_ids   {"eos_token": id, ...}: their ids
    name          the tokenizer's name in messages
    identity      a hash of the vocabulary, to compare tokenizers
    encode(text)  -> list of ids; special tokens such as <|endoftext|> become their one id
    encode_batch(texts) -> list of arrays of ids, on all cores; texts must have no surrogates
    sliceable     whether a text gives the same ids if cut between a word and a space or newline
    decode(ids)   -> text
    n_bytes(ids)  -> the number of UTF-8 bytes of the ids' text; end-of-text counts 0
    files         {name: content} to keep in a dataset's folder; tokenizer_of_dataset() reads it
    spec          plain data to keep in a checkpoint; tokenizer_from_spec() reads it
    chat          the chat.Template of its dataset or model, or None
    to_json()     -> the content of a tokenizer.json that transformers loads
encode() raises UserError for text that the vocabulary cannot express.
"""
import json
import pickle
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nanotune.errors import UserError
from nanotune.formats import hub
from nanotune.text import chat
from nanotune.text.encode import encode_characters, encode_in_threads
from nanotune.text.tokenizer_files import (
    EOT,
    NAMED_IN,
    NO_VOCABULARY,
    UNREADABLE,
    VOCAB_AND_MERGES,
    canonical,
    characters_json,
    digest,
    folder_of,
    gpt2_json,
    json_of_sentencepiece,
    json_of_vocab_and_merges,
    keeps_words_apart,
    library_errors,
    read_meta,
    read_optional,
    read_utf8,
    special_tokens,
    with_added_tokens,
)

GPT2_VOCAB_SIZES = (50257, 50304)  # plain, and padded to a multiple of 64
# sha256 of canonical() of GPT-2's vocabulary
GPT2_IDENTITY = "140f02bb05c0d82c3e45f14050c6be40a9b6fe2773b7dfce0fbb815918c30199"
# if a tokenizer.json with GPT-2's vocabulary gives other ids for PROBE, it has another normalizer,
# pre-tokenizer, merges or flags of end-of-text
PROBE = "Hi it's 1234\n  E\u0301a <|endoftext|> x"
PROBE_IDS = [17250, 340, 338, 1105, 2682, 198, 220, 412, 136, 223, 64, 220, 50256, 2124]
END_NAMES = (EOT, "</s>")  # end-of-text if no file names it: GPT-2's, and T5's or RoBERTa's


class GPT2Tokenizer:
    """GPT-2's byte pair encoding with tiktoken, which downloads the vocabulary once and caches it.
    The first encode, decode, n_bytes or to_json raises UserError if it cannot be downloaded."""
    n_vocab, eot, identity, name = 50257, 50256, GPT2_IDENTITY, "GPT-2's BPE"
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT)
    special_ids = dict.fromkeys(special, eot)
    sliceable, chat = True, None
    spec, files = {"kind": "gpt2"}, {}

    def __init__(self) -> None:
        self.encoding = None  # loaded at first use: training does not need it

    def load(self) -> Any:
        """Returns the tiktoken.Encoding. Raises UserError if it cannot be downloaded."""
        if self.encoding is None:
            import tiktoken
            try:
                self.encoding = tiktoken.get_encoding("gpt2")
            except Exception as e:  # any error of requests, urllib3 or the file system
                raise UserError(NO_VOCABULARY.format(type(e).__name__)) from e
        return self.encoding

    def encode(self, text: str) -> list[int]:
        return self.load().encode(text, allowed_special={EOT})

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return encode_in_threads(partial(self.load().encode_to_numpy, allowed_special={EOT}), texts)

    def decode(self, ids: Iterable[int]) -> str:
        return self.load().decode(list(ids))

    def n_bytes(self, ids: Iterable[int]) -> int:
        return len(self.load().decode_bytes([i for i in ids if i != self.eot]))

    def to_json(self) -> str:
        return gpt2_json(self.load())


class CharTokenizer:
    """A vocabulary of single characters, as in nanoGPT's meta.pkl; `itos` lists them by id."""
    eot, name, sliceable, chat = None, "a character vocabulary", True, None
    special = special_ids = {}  # noqa: RUF012

    def __init__(self, itos: Iterable[str]) -> None:
        self.itos = list(itos)
        self.stoi = {c: i for i, c in enumerate(self.itos)}
        self.n_vocab = len(self.itos)
        self.spec = {"kind": "characters", "itos": self.itos}
        self.identity = digest(canonical(self.stoi))

    @property
    def files(self) -> dict[str, bytes]:
        meta = {"vocab_size": self.n_vocab, "itos": dict(enumerate(self.itos)), "stoi": self.stoi}
        return {"meta.pkl": pickle.dumps(meta)}

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return encode_characters(self.stoi, texts)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.itos[i] for i in ids)

    def n_bytes(self, ids: Iterable[int]) -> int:
        return len(self.decode(ids).encode())

    def to_json(self) -> str:
        return characters_json(self.stoi)


class JsonTokenizer:
    """A tokenizer.json of the `tokenizers` library, given as text. Truncation, padding and dropout,
    which the file may contain, are switched off. `special` is the result of special_tokens().
    Raises UserError, with `where` as the file's name, if the text is not a tokenizer.json."""
    name, chat = "a tokenizer.json", None

    def __init__(self, text: str, where: str | Path = "tokenizer.json",
                 special: Iterable[tuple[str, Any]] = ()) -> None:
        from tokenizers import Tokenizer
        with library_errors(f"{where} is not a tokenizer.json"):
            self.tokenizer = Tokenizer.from_str(text)
            dropout = getattr(self.tokenizer.model, "dropout", None)
            if self.tokenizer.truncation or self.tokenizer.padding or dropout:
                self.tokenizer.no_truncation()
                self.tokenizer.no_padding()
                if dropout:
                    self.tokenizer.model.dropout = None
                text = self.tokenizer.to_str()
            vocab = self.tokenizer.get_vocab()
            self.is_byte_level = "ByteLevel" in str(json.loads(text).get("decoder"))
        if not vocab:
            raise UserError(f"{where} has an empty vocabulary; use another copy of it")
        self.n_vocab = self.rows = max(vocab.values()) + 1
        self.special = self.known(special, vocab)
        self.special_ids = {key: vocab[token] for key, token in self.special.items()}
        self.eot = self.special_ids.get("eos_token")
        text = self.add_named(text)
        self.spec = {"kind": "json", "json": text, "special": self.special}
        parts = json.loads(text)
        self.sliceable = keeps_words_apart(parts)
        self.identity = digest(canonical(vocab))
        self.rules = self.eot, parts.get("normalizer"), parts.get("pre_tokenizer")
        self.added = {id: len(token.content.encode())
                      for id, token in self.tokenizer.get_added_tokens_decoder().items()}

    def add_named(self, text):
        """Marks as special the tokens that only other files name, so that encode() finds them;
        returns the new tokenizer.json."""
        from tokenizers import AddedToken
        marked = {token.content for token in self.tokenizer.get_added_tokens_decoder().values()}
        missing = [token for token in self.special.values() if token not in marked]
        if not missing:
            return text
        self.tokenizer.add_special_tokens([
            AddedToken(token, special=True, normalized=False) for token in missing])
        return self.tokenizer.to_str()

    def known(self, special, vocab):
        """{key: its first token in the vocabulary}; for eos_token, END_NAMES are tried last."""
        found = {}
        for key, value in [*special, *(("eos_token", token) for token in END_NAMES)]:
            is_id = type(value) is int and 0 <= value < 2**32
            token = self.tokenizer.id_to_token(value) if is_id else value
            if isinstance(token, str) and token in vocab:
                found.setdefault(key, token)
        return found

    @property
    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self.spec["json"].encode(),
                "tokenizer_config.json": json.dumps(self.special, indent=2).encode()}

    def encode(self, text: str) -> list[int]:
        with library_errors("this text cannot be encoded by the model's tokenizer"):
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.within_rows(ids)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        with library_errors("this text cannot be encoded by the model's tokenizer"):
            found = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(self.within_rows(encoding.ids), np.uint32) for encoding in found]

    def within_rows(self, ids):
        """Returns the ids. Raises UserError for an id without a row in the model."""
        beyond = self.rows < self.n_vocab and next((i for i in ids if i >= self.rows), None)
        if beyond:
            raise UserError(f"the text holds {self.tokenizer.id_to_token(beyond)!r}, whose id "
                            f"{beyond:,} is beyond the model's {self.rows:,} rows; leave it out")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def n_bytes(self, ids: Iterable[int]) -> int:
        ids = [i for i in ids if i != self.eot]
        if self.is_byte_level:  # tokens have one character per byte; added tokens are text
            return sum(self.added.get(i) or len(self.tokenizer.id_to_token(i)) for i in ids)
        return len(self.decode(ids).encode())

    def to_json(self) -> str:
        return self.spec["json"]


AnyTokenizer = GPT2Tokenizer | CharTokenizer | JsonTokenizer


def tokenizer_from_spec(spec: dict) -> AnyTokenizer:
    """Returns the tokenizer of a `spec`. Raises UserError if its kind is unknown."""
    kind = spec.get("kind") if isinstance(spec, dict) else None
    if kind == "gpt2":
        found = GPT2Tokenizer()
    elif kind == "characters":
        found = CharTokenizer(spec["itos"])
    elif kind == "json":
        found = JsonTokenizer(spec["json"], special=spec.get("special", {}).items())
    else:
        raise UserError(f"the checkpoint's tokenizer is of kind {kind!r}; use a newer nanotune")
    return chat.attach(found, chat.template_from(spec.get("chat"), "the checkpoint"))


def tokenizer_of_folder(folder: str | Path) -> AnyTokenizer | None:
    """Returns the tokenizer of a dataset or model folder, with its chat template, or None if the
    folder has none. Reads meta.pkl (characters), tokenizer.json, a pair of VOCAB_AND_MERGES, or
    T5's spiece.model, the first that exists. Raises UserError if that file is damaged."""
    return chat.attach(without_chat(Path(folder)), chat.template_of_folder(folder))


def without_chat(folder):
    """tokenizer_of_folder() without the template."""
    if (folder / "meta.pkl").is_file():
        return CharTokenizer(read_meta(folder / "meta.pkl"))
    pairs = [(folder / vocab, folder / merges) for vocab, merges in VOCAB_AND_MERGES]
    pair = next((pair for pair in pairs if all(file.is_file() for file in pair)), None)
    file = folder / "tokenizer.json"
    if file.is_file():
        text = with_added_tokens(read_utf8(file), folder)
    elif pair is not None:
        file, text = pair[0], json_of_vocab_and_merges(*pair)
    elif (folder / "spiece.model").is_file():
        file, text = folder, json_of_sentencepiece(folder)
    else:
        foreign = [name for name in UNREADABLE if (folder / name).is_file()]
        if foreign:
            raise UserError(f"{folder} has {', '.join(foreign)}, but no tokenizer can be read from "
                            "that: download its tokenizer.json too")
        return None
    tokenizer = JsonTokenizer(text, file, special_tokens(folder))
    is_gpt2 = (tokenizer.identity, tokenizer.eot) == (GPT2_IDENTITY, GPT2Tokenizer.eot)
    return GPT2Tokenizer() if is_gpt2 and tokenizer.encode(PROBE) == PROBE_IDS else tokenizer


def tokenizer_of_source(source: str) -> AnyTokenizer | None:
    """Returns the tokenizer of a tokenizer.json, a folder or a hub id. Without tokenizer files,
    returns GPT-2's if the model has its vocabulary size, else None. OpenAI's models need no
    download. Raises UserError if the source is missing or damaged."""
    path = Path(source)
    if source in (*hub.GPT2_SHAPES, "distilgpt2") and not path.is_dir():
        return GPT2Tokenizer()
    if path.is_file():
        if path.name == "tokenizer.json":  # other files in its folder name end-of-text
            return tokenizer_of_folder(path.parent)
        return JsonTokenizer(read_utf8(path), path)
    if path.suffix == ".json":
        raise UserError(f"{source}: no such file")
    if not path.is_dir():
        path = hub.download(source, "config.json", "tokenizer.json", *NAMED_IN)
        if not (path / "tokenizer.json").is_file():
            hub.download(source, "config.json", *VOCAB_AND_MERGES[0], "added_tokens.json",
                         "spiece.model")
    return tokenizer_of_folder(path) or (
        gpt2_by_size(read_optional(path / "config.json").get("vocab_size")))


def gpt2_by_size(vocab_size: int | None) -> GPT2Tokenizer | None:
    """Returns GPT-2's tokenizer if `vocab_size`, of a model without tokenizer files, is GPT-2's."""
    return GPT2Tokenizer() if vocab_size in GPT2_VOCAB_SIZES else None


def tokenizer_of_dataset(folder: str | Path) -> AnyTokenizer:
    """Returns the tokenizer of a dataset folder: GPT-2's BPE if it has no tokenizer file. Raises
    UserError if the file is damaged."""
    return tokenizer_of_folder(folder) or (
        chat.attach(GPT2Tokenizer(), chat.template_of_folder(folder)))


def without_end(text: str, tokenizer: AnyTokenizer) -> str:
    """Returns the text without end-of-text at its end, so that a caller can add exactly one."""
    end = tokenizer.special.get("eos_token")
    return text.rstrip().removesuffix(end) if end and text.rstrip().endswith(end) else text


def limit_rows(tokenizer: AnyTokenizer | None, rows: int, source: str | Path) -> None:
    """Makes encode() refuse added tokens without a row in a model of `rows` rows, such as a [PAD]
    that only the tokenizer has. Raises UserError if end-of-text or other tokens have no row."""
    if tokenizer is None or tokenizer.n_vocab <= rows:
        return
    added = getattr(tokenizer, "added", {})
    if tokenizer.n_vocab - sum(i >= rows for i in added) > rows:
        raise UserError(f"{source}: its tokenizer has {tokenizer.n_vocab:,} tokens, the model "
                        f"{rows:,} rows; they belong to different models")
    if tokenizer.eot is not None and tokenizer.eot >= rows:
        raise UserError(f"{source}: the id of end-of-text, {tokenizer.eot:,}, is beyond the "
                        f"model's {rows:,} rows; name another eos_token in tokenizer_config.json")
    tokenizer.rows = rows
    tokenizer.special_ids = {key: id for key, id in tokenizer.special_ids.items() if id < rows}
    tokenizer.special = {key: tokenizer.special[key] for key in tokenizer.special_ids}


def check_same_tokenizer(model_tokenizer: AnyTokenizer | None, data_tokenizer: AnyTokenizer,
                         source: str | Path, folder: str | Path) -> None:
    """Raises UserError unless the model `source` and the dataset `folder` share a tokenizer."""
    if model_tokenizer is None:
        raise UserError(f"{source} has no tokenizer file, and its vocabulary does not have "
                        "GPT-2's size; put its tokenizer.json into the folder")
    both_json = type(model_tokenizer) is type(data_tokenizer) is JsonTokenizer
    if model_tokenizer.identity != data_tokenizer.identity or (
            both_json and model_tokenizer.rules != data_tokenizer.rules):
        raise UserError(
            f"{source} uses {model_tokenizer.name} ({model_tokenizer.n_vocab} tokens), but {folder}"
            f" was made with {data_tokenizer.name} ({data_tokenizer.n_vocab}): prepare the text "
            f"again with --tokenizer={folder_of(source)}")
