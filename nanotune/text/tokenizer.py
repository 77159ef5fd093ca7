"""Converts text to token ids and back: GPT-2's BPE, a character vocabulary, or a tokenizer.json.

Three classes with one interface, AnyTokenizer:
    n_vocab       all ids are less than n_vocab
    eot           the end-of-text id, or None
    name          what to call the tokenizer in a message
    identity      a hash of the vocabulary: two tokenizers are the same if it is equal
    encode(text)  -> list of ids; <|endoftext|> in the text becomes eot (if not None)
    decode(ids)   -> text
    n_bytes(ids)  -> the UTF-8 bytes of text that the ids decode to; end-of-text counts 0
    spec          plain data to keep in a checkpoint; tokenizer_from_spec() reads it
    to_json()     -> the content of a tokenizer.json that transformers loads
encode() of a CharTokenizer raises UserError for a character that is not in its vocabulary.
"""
import hashlib
import json
import pickle
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from nanotune.errors import UserError

EOT = "<|endoftext|>"
GPT2_VOCAB_SIZES = (50257, 50304)  # plain, and padded to a multiple of 64
# sha256 of canonical() of GPT-2's vocabulary: tells whether a tokenizer.json is GPT-2's
GPT2_IDENTITY = "140f02bb05c0d82c3e45f14050c6be40a9b6fe2773b7dfce0fbb815918c30199"


class GPT2Tokenizer:
    """GPT-2's byte pair encoding, by tiktoken, which downloads the vocabulary once and caches it.

    The first encode, decode, n_bytes or to_json raises UserError if it cannot be downloaded.
    """
    n_vocab, eot, identity, name = 50257, 50256, GPT2_IDENTITY, "GPT-2's BPE"
    spec = {"kind": "gpt2"}  # noqa: RUF012

    def __init__(self) -> None:
        self.encoding = None  # loaded at first use: training does not need it

    def load(self):
        """Returns the tiktoken.Encoding. Raises UserError if it cannot be downloaded."""
        if self.encoding is None:
            import tiktoken
            try:
                self.encoding = tiktoken.get_encoding("gpt2")
            except Exception as e:  # whatever requests, urllib3 or the file system raise
                raise UserError(
                    f"tiktoken cannot fetch GPT-2's vocabulary ({type(e).__name__}); on a machine "
                    "with network run `TIKTOKEN_CACHE_DIR=tiktoken python -c \"import tiktoken; "
                    "tiktoken.get_encoding('gpt2')\"`, copy that folder here, and set "
                    "TIKTOKEN_CACHE_DIR to it") from None
        return self.encoding

    def encode(self, text: str) -> list[int]:
        return self.load().encode(text, allowed_special={EOT})

    def decode(self, ids: Iterable[int]) -> str:
        return self.load().decode(list(ids))

    def n_bytes(self, ids: Iterable[int]) -> int:
        return len(self.load().decode_bytes([i for i in ids if i != self.eot]))

    def to_json(self) -> str:
        return gpt2_json(self)


class CharTokenizer:
    """A vocabulary of single characters, as in nanoGPT's meta.pkl; `itos` lists them by id."""
    eot, name = None, "a character vocabulary"

    def __init__(self, itos: Iterable[str]) -> None:
        self.itos = list(itos)
        self.stoi = {c: i for i, c in enumerate(self.itos)}
        self.n_vocab = len(self.itos)
        self.spec = {"kind": "characters", "itos": self.itos}
        self.identity = digest(canonical(self.stoi))

    def encode(self, text: str) -> list[int]:
        unknown = next((c for c in text if c not in self.stoi), None)
        if unknown is not None:
            raise UserError(f"the character {unknown!r} is not in the model's vocabulary of "
                            f"{self.n_vocab}: {''.join(self.itos)!r}")
        return [self.stoi[c] for c in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.itos[i] for i in ids)

    def n_bytes(self, ids: Iterable[int]) -> int:
        return len(self.decode(ids).encode())

    def to_json(self) -> str:
        return characters_json(self)


class JsonTokenizer:
    """A tokenizer.json of the `tokenizers` library, given as text.

    Raises UserError, which names the file `where`, if the text is no tokenizer.json.
    """
    name = "a tokenizer.json"

    def __init__(self, text: str, where: str | Path = "tokenizer.json") -> None:
        from tokenizers import Tokenizer
        try:
            self.tokenizer = Tokenizer.from_str(text)
        except Exception as e:  # the library raises a bare Exception
            raise UserError(f"{where} is no tokenizer.json ({e})") from None
        vocab = self.tokenizer.get_vocab()
        self.n_vocab = max(vocab.values()) + 1
        self.eot = vocab.get(EOT)
        self.spec = {"kind": "json", "json": text}
        self.identity = digest(canonical(vocab))
        self.is_byte_level = "ByteLevel" in str(json.loads(text).get("decoder"))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def n_bytes(self, ids: Iterable[int]) -> int:
        ids = [i for i in ids if i != self.eot]
        if self.is_byte_level:  # its tokens have one character per byte
            return sum(len(self.tokenizer.id_to_token(i)) for i in ids)
        return len(self.decode(ids).encode())

    def to_json(self) -> str:
        return self.spec["json"]


AnyTokenizer = GPT2Tokenizer | CharTokenizer | JsonTokenizer


def canonical(vocab):
    """A vocabulary, {token: id}, as one string, sorted by id."""
    return json.dumps(sorted(vocab.items(), key=lambda item: item[1]))


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_from_spec(spec: dict) -> AnyTokenizer:
    """Returns the tokenizer with this `spec`. Raises UserError if its kind is unknown."""
    kind = spec.get("kind") if isinstance(spec, dict) else None
    if kind == "gpt2":
        return GPT2Tokenizer()
    if kind == "characters":
        return CharTokenizer(spec["itos"])
    if kind == "json":
        return JsonTokenizer(spec["json"])
    raise UserError(f"the checkpoint's tokenizer has an unknown kind, {kind!r}")


# file names of a byte-level BPE in older layouts: GPT-2's on the hub, and OpenAI's
VOCAB_AND_MERGES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def tokenizer_of_folder(folder: str | Path) -> AnyTokenizer | None:
    """Returns the tokenizer of a dataset or model folder, or None if the folder has none.

    Reads meta.pkl (characters), tokenizer.json, or a pair of VOCAB_AND_MERGES, the first that
    exists. Raises UserError if that file is damaged.
    """
    folder = Path(folder)
    if (folder / "meta.pkl").is_file():
        return CharTokenizer(read_meta(folder / "meta.pkl"))
    pairs = [(folder / vocab, folder / merges) for vocab, merges in VOCAB_AND_MERGES]
    pair = next((pair for pair in pairs if all(file.is_file() for file in pair)), None)
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_json_tokenizer(folder / "tokenizer.json")
    elif pair is not None:
        tokenizer = from_vocab_and_merges(*pair)
    else:
        return None
    return GPT2Tokenizer() if tokenizer.identity == GPT2_IDENTITY else tokenizer


def tokenizer_of_dataset(folder: str | Path) -> AnyTokenizer:
    """Returns the tokenizer of a dataset folder: GPT-2's BPE if it has no tokenizer file.

    Raises UserError if the file is damaged.
    """
    return tokenizer_of_folder(folder) or GPT2Tokenizer()


def check_same_tokenizer(model_tokenizer: AnyTokenizer | None, data_tokenizer: AnyTokenizer,
                         source: str | Path, folder: str | Path) -> None:
    """Raises UserError unless the model `source` and the dataset `folder` share a tokenizer."""
    if model_tokenizer is None:
        raise UserError(f"{source} has no tokenizer file, and its vocabulary does not have "
                        "GPT-2's size; put its tokenizer.json into the folder")
    if model_tokenizer.identity != data_tokenizer.identity:
        raise UserError(
            f"{source} reads {model_tokenizer.name} ({model_tokenizer.n_vocab} tokens), {folder} "
            f"was made with {data_tokenizer.name} ({data_tokenizer.n_vocab}): prepare the text "
            "again with the model's tokenizer")


def read_json_tokenizer(path):
    try:
        return JsonTokenizer(path.read_text(encoding="utf-8"), path)
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is no tokenizer.json ({e})") from None


def from_vocab_and_merges(vocab, merges):
    from tokenizers import AddedToken, ByteLevelBPETokenizer
    try:
        tokenizer = ByteLevelBPETokenizer.from_file(str(vocab), str(merges))
    except Exception as e:  # the library raises a bare Exception
        raise UserError(f"{vocab} and {merges.name} are no vocabulary ({e})") from None
    tokenizer.add_special_tokens([AddedToken(EOT, special=True, normalized=False)])
    return JsonTokenizer(tokenizer.to_str(), vocab)


class PlainUnpickler(pickle.Unpickler):
    """Reads built-in containers, text and numbers; refuses anything that would run code."""
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def read_meta(path):
    """The characters of a nanoGPT meta.pkl by id; runs no code from the file."""
    try:
        with open(path, "rb") as f:
            itos = PlainUnpickler(f).load()["itos"]
        return ["" + itos[i] for i in range(len(itos))]  # TypeError if not text
    except Exception as e:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path} is no plain character vocabulary ({e}); run its prepare.py "
                        "again") from None


# -----------------------------------------------------------------------------
# writing a tokenizer.json

def merges_as_strings(text: str) -> str:
    """Returns a tokenizer.json with its merges as "a b", which every version of the tokenizers
    library reads; before 0.20 it did not read ["a", "b"]. Keeps pairs if a token holds a space."""
    data = json.loads(text)
    merges = data["model"].get("merges") or []
    if any(isinstance(merge, str) or " " in "".join(merge) for merge in merges):
        return text
    data["model"]["merges"] = [" ".join(merge) for merge in merges]
    return json.dumps(data, ensure_ascii=False) if merges else text


def gpt2_json(tokenizer):
    """GPT-2's tokenizer.json, made from tiktoken's ranks, which are the ids.

    A token's merge joins the two parts that all earlier merges leave of its bytes.
    """
    from tokenizers import AddedToken, ByteLevelBPETokenizer
    encoding, letters = tokenizer.load(), byte_letters()
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(tokenizer.eot)}
    spell = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = [tuple(spell[part] for part in parts_of(token, ranks))
              for token in ranks if len(token) > 1]
    made = ByteLevelBPETokenizer({spell[token]: rank for token, rank in ranks.items()}, merges)
    made.add_special_tokens([AddedToken(EOT, special=True, normalized=False)])
    return made.to_str()


def byte_letters():
    """{byte: the character that GPT-2's vocabulary writes for it}: a printable byte is itself, the
    others are the code points from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def parts_of(token, ranks):
    """The two parts that byte pair encoding joins last to make a token of several bytes."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        at = pairs.index(min(pairs))
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return parts


def characters_json(tokenizer):
    """A character vocabulary as tokenizer.json. It has no unknown token, so that encoding fails
    for a character that is not in it, as with encode()."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    made = Tokenizer(models.WordLevel(tokenizer.stoi))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return made.to_str()
