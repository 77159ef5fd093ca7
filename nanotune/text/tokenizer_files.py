"""Reads the tokenizer files of Hugging Face folders, and converts vocabularies to tokenizer.json.

Converts vocab.json with merges.txt (with tokens added in added_tokens.json or
tokenizer_config.json), a T5's spiece.model, GPT-2's vocabulary and character vocabularies. Also
reads the names of special tokens, and nanoGPT's meta.pkl.
"""
import hashlib
import json
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from nanotune.errors import UserError, first_line
from nanotune.formats.hub import read_json

EOT = "<|endoftext|>"
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
# files that name special tokens, all optional; the first file that has a key is used for it
NAMED_IN = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
            "config.json")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # of an added token
# tokenizer files that cannot be read alone. A folder that has only these is refused: GPT-2's
# tokenizer would be wrong for it
UNREADABLE = ("vocab.json", "merges.txt", "encoder.json", "vocab.txt", "tokenizer.model",
              "sentencepiece.bpe.model")
# file names of a byte-level BPE in older layouts: GPT-2's on the hub, and OpenAI's
VOCAB_AND_MERGES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))

# the error of tiktoken without a network
NO_VOCABULARY = (
    "tiktoken cannot download GPT-2's vocabulary ({}); on a machine with network run "
    "`TIKTOKEN_CACHE_DIR=tiktoken python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\"`, "
    "copy that folder here, and set TIKTOKEN_CACHE_DIR to it; or train a model from scratch, with "
    "--tokenizer=train or --tokenizer=char of data/text/prepare.py")


@contextmanager
def library_errors(message: str) -> Iterator[None]:
    """Turns errors of the tokenizers library into UserError: bare Exceptions, and panics of its
    Rust code, which are not subclasses of Exception."""
    try:
        yield
    except MemoryError:
        raise
    except BaseException as e:
        if isinstance(e, Exception) or type(e).__name__ == "PanicException":
            raise UserError(f"{message} ({first_line(e)})") from None
        raise


def canonical(vocab: dict[str, int]) -> str:
    """Returns a vocabulary, {token: id}, as one string, sorted by id."""
    return json.dumps(sorted(vocab.items(), key=lambda item: item[1]))


def digest(text: str) -> str:
    """Returns the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def folder_of(source: str | Path) -> str | Path:
    """Returns the folder of a model file (ckpt.pt, model.onnx); any other source unchanged."""
    return Path(source).parent if Path(source).is_file() else source


def read_utf8(path: Path) -> str:
    """Returns a tokenizer.json as text. Raises UserError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not a tokenizer.json ({e})") from None


def read_optional(path: Path) -> dict:
    """Returns the JSON object in a file, or {} if the file does not exist. Raises UserError if it
    is damaged."""
    return read_json(path) if path.is_file() else {}


def special_tokens(folder: Path) -> list[tuple[str, Any]]:
    """Returns [(key of SPECIAL, token or id), ...] from the files of a folder, in the order of
    NAMED_IN. Raises UserError if a file is damaged."""
    found = []
    for file in NAMED_IN:
        data = read_optional(folder / file)
        for key in SPECIAL:
            value = data.get(key, data.get(f"{key}_id"))
            value = value[0] if isinstance(value, list) and value else value
            found.append((key, value.get("content") if isinstance(value, dict) else value))
    return found


def added_tokens(folder: Path) -> dict[str, tuple[int | None, dict[str, bool]]]:
    """Returns {token: (id or None, flags)} of the special and added tokens in a folder's files.
    Raises UserError if a file is damaged."""
    config = read_optional(folder / "tokenizer_config.json")
    found = {token: (None, {}) for _, token in special_tokens(folder) if isinstance(token, str)}
    try:
        for id, token in config.get("added_tokens_decoder", {}).items():
            flags = {flag: token[flag] for flag in FLAGS if flag in token}
            found[token["content"]] = int(id), flags
        for token, id in read_optional(folder / "added_tokens.json").items():
            found[token] = int(id), found.get(token, (None, {}))[1]
        if not all(isinstance(token, str) and token for token in found):
            raise ValueError("a token is not a string")
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{folder}: its added tokens are damaged ({first_line(e)}); download "
                        "added_tokens.json and tokenizer_config.json again") from None
    return found


def add_tokens(tokenizer: Any, added: dict[str, tuple[int | None, dict[str, bool]]],
               folder: Path) -> None:
    """Adds tokens to a tokenizers.Tokenizer, in the order of their ids; those without an id only if
    the vocabulary has them. Raises UserError if an id is not the next free one."""
    from tokenizers import AddedToken
    known = {token: tokenizer.token_to_id(token) if id is None else id
             for token, (id, _) in added.items()}
    for token, id in sorted((item for item in known.items() if item[1] is not None),
                            key=lambda item: item[1]):
        flags = {"normalized": False} | added[token][1]
        tokenizer.add_special_tokens([AddedToken(token, special=True, **flags)])
        if tokenizer.token_to_id(token) != id:
            raise UserError(f"{folder}: the added token {token!r} has the id {id:,}, but the next "
                            f"free one is {tokenizer.token_to_id(token):,}; number added tokens "
                            "without a gap")


def with_added_tokens(text: str, folder: Path) -> str:
    """Returns a tokenizer.json with the tokens that other files of its folder add; a damaged
    tokenizer.json is returned unchanged. Raises UserError as add_tokens() does."""
    from tokenizers import Tokenizer
    added = {token: entry for token, entry in added_tokens(folder).items() if entry[0] is not None}
    if not added:
        return text
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception:  # JsonTokenizer says what is wrong
        return text
    missing = {token: added[token] for token in added if tokenizer.token_to_id(token) is None}
    add_tokens(tokenizer, missing, folder)
    return tokenizer.to_str() if missing else text


def json_of_vocab_and_merges(vocab: Path, merges: Path) -> str:
    """Returns the tokenizer.json of a byte-level BPE, with the tokens that its folder adds. Raises
    UserError if a file is damaged, or an added token's id is not the next free one."""
    from tokenizers import ByteLevelBPETokenizer
    folder = vocab.parent
    prefix = read_optional(folder / "tokenizer_config.json").get("add_prefix_space", False)
    try:
        tokenizer = ByteLevelBPETokenizer.from_file(str(vocab), str(merges),
                                                    add_prefix_space=bool(prefix))
    except Exception as e:  # the library raises a bare Exception
        raise UserError(f"{vocab} and {merges.name} are not a vocabulary "
                        f"({first_line(e)})") from None
    add_tokens(tokenizer, {EOT: (None, {})} | added_tokens(folder), folder)
    return tokenizer.to_str()


class PlainUnpickler(pickle.Unpickler):
    """Reads built-in containers, text and numbers; refuses anything that would run code."""
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def read_meta(path: Path) -> list[str]:
    """Returns the characters of a nanoGPT meta.pkl by id; runs no code from the file. Raises
    UserError if it is damaged."""
    try:
        with open(path, "rb") as f:
            itos = PlainUnpickler(f).load()["itos"]
        return ["" + itos[i] for i in range(len(itos))]  # TypeError if not text
    except Exception as e:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path} is not a plain character vocabulary ({e}); run its prepare.py "
                        "again") from None


def json_of_sentencepiece(folder: Path) -> str:
    """Returns the tokenizer.json of a T5 that has only spiece.model, such as t5-v1_1, converted by
    transformers. Raises UserError if a needed package is not installed or the file is damaged."""
    try:
        from transformers import T5TokenizerFast
        return T5TokenizerFast.from_pretrained(folder).backend_tokenizer.to_str()
    except Exception as e:  # each of the packages raises its own
        raise UserError(f"{folder / 'spiece.model'} cannot be converted ({first_line(e)}); run: "
                        "pip install transformers sentencepiece protobuf, or add a tokenizer.json "
                        "to the folder, such as that of google-t5/t5-small") from None


def merges_as_strings(text: str) -> str:
    """Returns a tokenizer.json with its merges as "a b", which every version of the tokenizers
    library reads; ["a", "b"] needs 0.20. Keeps pairs if a token contains a space."""
    data = json.loads(text)
    merges = data["model"].get("merges") or []
    if any(isinstance(merge, str) or " " in "".join(merge) for merge in merges):
        return text
    data["model"]["merges"] = [" ".join(merge) for merge in merges]
    return json.dumps(data, ensure_ascii=False) if merges else text


def keeps_words_apart(parts: dict) -> bool:
    """Returns whether a tokenizer.json, as a dict, gives the same ids if a text is cut between a
    word and a space or newline. It does if it splits words as GPT-2's does, and no added token
    contains white space or strips the white space after it."""
    splits = parts.get("pre_tokenizer") or {}
    return (splits.get("type") == "ByteLevel" and splits.get("use_regex", True)
            and not splits.get("add_prefix_space") and parts.get("normalizer") is None
            and not any(token.get("rstrip") or re.search(r"\s", token["content"])
                        for token in parts.get("added_tokens") or ()))


def with_end_appended(text: str, end: str, id: int) -> str:
    """Returns a tokenizer.json that appends the token `end` to a text, as T5's does. An existing
    post-processor is kept instead."""
    data = json.loads(text)
    if data.get("post_processor") is None:
        parts = [{"Sequence": {"id": "A", "type_id": 0}},
                 {"SpecialToken": {"id": end, "type_id": 0}}]
        data["post_processor"] = {
            "type": "TemplateProcessing", "single": parts, "pair": parts,
            "special_tokens": {end: {"id": end, "ids": [id], "tokens": [end]}}}
    return json.dumps(data, ensure_ascii=False)


def gpt2_json(encoding: Any) -> str:
    """Returns GPT-2's tokenizer.json from its tiktoken.Encoding, in which the ids are the ranks of
    the merges. The merge of a token joins the two parts that earlier merges form from its bytes."""
    from tokenizers import AddedToken, ByteLevelBPETokenizer
    letters = byte_letters()
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(encoding.eot_token)}
    spell = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = [tuple(spell[part] for part in parts_of(token, ranks))
              for token in ranks if len(token) > 1]
    tokenizer = ByteLevelBPETokenizer({spell[token]: rank for token, rank in ranks.items()}, merges)
    tokenizer.add_special_tokens([AddedToken(EOT, special=True, normalized=False)])
    return tokenizer.to_str()


def byte_letters():
    """{byte: the character for it in GPT-2's vocabulary}: printable bytes are themselves, the
    others are the code points from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def parts_of(token, ranks):
    """The two parts that byte pair encoding joins last to form a token of several bytes."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        at = pairs.index(min(pairs))
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return parts


def characters_json(stoi: dict[str, int]) -> str:
    """Returns a character vocabulary as tokenizer.json. It has no unknown token, so that encoding
    an unknown character fails, as in CharTokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    tokenizer = Tokenizer(models.WordLevel(stoi))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer.to_str()
