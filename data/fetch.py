"""Shared code of the prepare.py scripts: downloads, splits, encodes and writes texts.

A dataset is a folder with train.bin and val.bin: token ids as little-endian uint16, without a
header. The folder also has the tokenizer: meta.pkl (characters), tokenizer.json (the tokenizers
library), or no file, which means GPT-2's byte pair encoding. If only some tokens count in the loss,
train.mask.bin and val.mask.bin have one byte per token: 1 if it counts, else 0.

A dataset of pairs, for T5, has train.pairs.bin and val.pairs.bin: two little-endian uint32 per
pair, the numbers of source tokens and of target tokens. In the .bin file each source is followed by
its target. Both end with the end token, which the numbers include.
"""
import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import random
import runpy
import shlex
import ssl
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
from tqdm import tqdm

DATA = Path(__file__).resolve().parent
sys.path.append(str(DATA.parent))
from nanotune import cli  # noqa: E402 (no package is installed)
from nanotune.errors import UserError  # noqa: E402
from nanotune.formats.hub import note_folder, read_json  # noqa: E402
from nanotune.text.chat import (  # noqa: E402, F401 (F401: for the scripts)
    ROLES,
    Message,
    Template,
    attach,
    chat_config,
    check_text,
    encode_turns,
    read_messages,
)
from nanotune.text.documents import (  # noqa: E402, F401
    TOKEN,
    Document,
    Pieces,
    document_end,
    encode,
    find_documents,
    read_pieces,
    read_texts,
    slices,
)
from nanotune.text.read import check_surrogates, read_jsonl, read_text  # noqa: E402, F401
from nanotune.text.tokenizer import (  # noqa: E402, F401 (F401: for the scripts)
    EOT,
    AnyTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    JsonTokenizer,
    tokenizer_of_dataset,
    tokenizer_of_source,
    without_end,
)

LENGTH = np.dtype("<u4")
MIN_TOKENS = 8                  # a shorter split is a mistake
# limits of the printed command: fewer steps train too little; train.py warns about more epochs
MIN_STEPS, MAX_EPOCHS = 30, 20
# files that describe the .bin files: deleted when the .bin files are replaced
COMPANIONS = ("meta.pkl", "tokenizer.json", "tokenizer_config.json", "train.mask.bin",
              "val.mask.bin", "train.pairs.bin", "val.pairs.bin", "test.jsonl")
SETTINGS_FILE = "settings.json"     # of a run of train.py
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}   # of a table's columns
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


# -----------------------------------------------------------------------------
# the command line

def parser(description: str, folder: Path, input_help: str = "",
           tokenizers: str = "gpt2, a tokenizer.json, a folder, a run or a hub id (default: gpt2)",
           ) -> argparse.ArgumentParser:
    """Returns a parser with --out_dir (default: `folder`), and with --input and --tokenizer unless
    their help is ""."""
    p = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    if input_help:
        p.add_argument("--input", type=Path, metavar="FILE", help=input_help)
    if tokenizers:
        p.add_argument("--tokenizer", default="gpt2", metavar="NAME", help=tokenizers)
    p.add_argument("--out_dir", type=Path, default=folder, metavar="DIR",
                   help="folder for train.bin and val.bin (default: the script's folder)")
    return p


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a script's main(argv). A UserError, or an error of the file system such as a full disk,
    prints one line on stderr and ends with status 1."""
    def guarded(argv):
        try:
            main(argv)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UserError(str(error)) from error
        except KeyboardInterrupt:
            print("stopped; no half-written dataset is left", file=sys.stderr)
            raise
    cli.run(guarded)


# -----------------------------------------------------------------------------
# from a URL or a file to text

def download(url: str, path: Path, size: int | None = None, sha256: str | None = None,
             timeout: float = 30.0) -> Path:
    """Downloads `url` to `path`, atomically, unless `path` exists. Returns `path`.

    `timeout` is in seconds, for each read. Raises UserError if the download fails, is a web page,
    or does not have `size` bytes and the hash `sha256`. An existing file is checked too: nanoGPT's
    users put their own texts there.
    """
    if path.exists():
        if problem := file_problem(path, size, sha256):
            raise UserError(f"{path} is not the file of {url}: {problem}; delete it to download "
                            f"that file, or pass --input={path} to use this one")
        return path
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        receive(url, part, size, timeout)
        if problem := file_problem(part, size, sha256):
            raise UserError(problem)
        os.replace(part, path)
    except (UserError, ValueError, HTTPException, URLError, TimeoutError, ConnectionError) as error:
        reason = error if isinstance(error, HTTPError) else getattr(error, "reason", error)
        raise UserError(f"cannot download {url}: {reason or type(error).__name__}; "
                        f"download it yourself and pass --input=FILE") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def receive(url: str, part: Path, size: int | None, timeout: float) -> None:
    """Streams `url` to `part` with a progress bar."""
    context = ssl.create_default_context()
    with contextlib.suppress(ImportError):      # python.org's Python for macOS has no certificates
        import certifi
        context.load_verify_locations(certifi.where())
    request = Request(url, headers={"User-Agent": "nanotune"})
    with urlopen(request, timeout=timeout, context=context) as answer:
        # a login page or a proxy's error page may have status 200
        if answer.headers.get_content_type() == "text/html":
            raise UserError("the server sent a web page instead of the file")
        promised = int(answer.headers.get("Content-Length") or 0) or size
        with open(part, "wb") as f, tqdm(desc=part.stem, total=promised, unit="B",
                                         unit_scale=True, disable=None) as bar:
            while block := answer.read(1 << 16):
                bar.update(f.write(block))
    # http.client treats an early close of the connection as the end of the file
    if promised and (received := part.stat().st_size) != promised:
        raise UserError(f"received {received:,} of {promised:,} bytes")


def file_problem(path: Path, size: int | None, sha256: str | None) -> str:
    """Returns the problem with a downloaded file as text, or "" if there is none."""
    if size is not None and path.stat().st_size != size:
        return f"it has {path.stat().st_size:,} bytes, not {size:,}"
    with open(path, "rb") as f:
        if sha256 is not None and hashlib.file_digest(f, "sha256").hexdigest() != sha256:
            return f"its sha256 is not {sha256}"
    return ""


def shakespeare(source: Path | None, folder: Path) -> str:
    """Returns Tiny Shakespeare, from `source` or downloaded to `folder` (1,115,394 bytes). Raises
    UserError if it cannot be read or downloaded."""
    source = source or download(SHAKESPEARE, folder / "input.txt", 1_115_394, SHAKESPEARE_SHA256)
    text = read_text(source)
    if not text.strip():
        raise UserError(f"{source} is empty; it must contain the text to train on")
    return text


def load_with_datasets(name: str | Path, load: Callable[[Any], Any]) -> Any:
    """Returns load(datasets), where `datasets` is the package of that name. Raises UserError if the
    package is not installed, or cannot load the data; `name` is the data's name in the error."""
    try:
        import datasets
    except ImportError:
        raise UserError("this needs the datasets package: pip install datasets") from None
    try:
        return load(datasets)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise UserError(f"datasets cannot load {name}: {error.__cause__ or error}; download it "
                        "yourself and pass --input=FILE") from error


# -----------------------------------------------------------------------------
# a split is a list of pieces: (text, whether a document ends after it)

def split_text(text: str, val_fraction: float = 0.1) -> tuple[Pieces, Pieces]:
    """Returns (train, val) of one continuous text. val is its end. No end-of-text is added."""
    cut = int(len(text) * (1 - val_fraction))
    return [(text[:cut], False)], [(text[cut:], False)]


def split_documents(documents: Sequence[str | Document], val_fraction: float = 0.1,
                    seed: int = 1337) -> tuple[Pieces, Pieces]:
    """Returns (train, val). val gets random whole documents, up to val_fraction of the characters.

    If val then has less than half of that share, because there is one document or a few long ones,
    it also gets the end of the longest training document. Raises UserError if val_fraction is not
    between 0 and 1.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"--val_fraction={val_fraction}: must be between 0 and 1")
    wanted, have, chosen = val_fraction * sum(map(len, documents)), 0, set()
    for i in random.Random(seed).sample(range(len(documents)), len(documents)):
        if have + len(documents[i]) <= wanted:
            chosen.add(i)
            have += len(documents[i])
    val = [(documents[i], True) for i in sorted(chosen)]
    train = [(text, True) for i, text in enumerate(documents) if i not in chosen]
    if have < wanted / 2:
        longest = max(range(len(train)), key=lambda i: len(train[i][0]))
        text = train[longest][0]
        cut = int(len(text) - (wanted - have))
        train[longest] = (text[:cut], False)
        val.append((text[cut:], True))
    return train, val


# -----------------------------------------------------------------------------
# encoding

def choose_tokenizer(name: str) -> AnyTokenizer:
    """Returns the tokenizer that --tokenizer names: gpt2, a tokenizer.json, a folder, a run or a
    hub id. Raises UserError if it is missing, damaged or too large for a .bin file."""
    try:
        tokenizer = tokenizer_of_source(name) or tokenizer_of_run(name)
    except UserError as error:
        raise UserError(f"--tokenizer={name}: {error}") from None
    note_folder(name)
    if tokenizer is None:
        raise UserError(f"--tokenizer={name} has no tokenizer.json, no vocab.json with merges.txt, "
                        "and no settings.json of a run; give the folder of the model's dataset")
    check_ids(tokenizer.n_vocab - 1, name)
    return tokenizer


def tokenizer_of_run(folder: str) -> AnyTokenizer | None:
    """Returns the tokenizer of the dataset that a run was trained on, or None if the folder is not
    a run's. Raises UserError if settings.json is damaged or the dataset does not exist."""
    file = Path(folder, SETTINGS_FILE)
    if not file.is_file():
        return None
    try:
        sections = read_json(file)["settings"].values()
        dataset = next(fields["dataset"] for fields in sections if "dataset" in fields)
    except (AttributeError, KeyError, StopIteration, TypeError):
        raise UserError(f"{file} names no dataset; give the folder of the run's dataset") from None
    for place in (DATA / dataset, Path(dataset)):
        if place.is_dir():
            return tokenizer_of_dataset(place)
    raise UserError(f"{DATA / dataset}, the dataset of this run, does not exist; give another "
                    "folder with the model's tokenizer.json")


def char_tokenizer(pieces: Pieces) -> CharTokenizer:
    """Returns a tokenizer with one id per distinct character, in sorted order, as in nanoGPT.
    Raises UserError if there are more than 65,536."""
    characters = set()
    for parts, _ in read_pieces(pieces):
        for part in parts:
            characters.update(part)
    tokenizer = CharTokenizer(sorted(characters))
    check_ids(tokenizer.n_vocab - 1, "the text's characters")
    return tokenizer


def split_at(mark: str | None, text: str) -> list[str]:
    """Splits a text at a mark, such as <|endoftext|>, into documents. If the text has the mark,
    newlines at both ends of a document are removed. Empty documents are dropped."""
    parts = text.split(mark) if mark else [text]
    parts = [part.strip("\n") for part in parts] if len(parts) > 1 else parts
    return [part for part in parts if part.strip()]


def check_ids(highest: int, name: str) -> None:
    """Raises UserError if an id does not fit in a .bin file (uint16)."""
    if highest > np.iinfo(TOKEN).max:
        raise UserError(f"{name}: ids up to {highest:,} do not fit in a .bin file, whose ids are "
                        f"below 65,536 (uint16); use a smaller vocabulary")


def train_bpe(pieces: Pieces, vocab_size: int) -> JsonTokenizer:
    """Trains a byte-level BPE with end-of-text as id 0. Raises UserError if vocab_size is not
    between 257 and 65536."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    if not 257 <= vocab_size <= 65536:
        raise UserError(f"--vocab_size={vocab_size}: must be between 257 (each byte, and "
                        f"end-of-text) and 65536")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOT],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    texts = (text for parts, _ in read_pieces(pieces) for text in slices(parts))
    tokenizer.train_from_iterator(texts, trainer)
    return JsonTokenizer(tokenizer.to_str(pretty=True))


# -----------------------------------------------------------------------------
# examples: a prompt and its completion

class Example(NamedTuple):
    prompt: str         # "" if the example is a plain text
    completion: str


def read_fields(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields ('FILE, line N', {column: value}) for each line of a .jsonl, or for each row of a .csv
    or .tsv, whose first row names the columns. Raises UserError if the file is malformed."""
    usual = {".csv": ",", ".tsv": "\t"}.get(path.suffix.lower())
    if usual is None:
        yield from read_jsonl(path)
        return
    content = read_text(path)
    first = content.partition("\n")[0].replace("\r", " ")
    widths = {mark: len(next(csv.reader([first], delimiter=mark), [])) for mark in SEPARATORS}
    separator = max(widths, key=lambda mark: (widths[mark], mark == usual))
    if separator != usual:
        print(f"{path}: its columns are separated by {SEPARATORS[separator]}")
    rows = read_rows(path, content, separator=separator)
    where, header = next(rows, (str(path), []))
    columns = [name.strip().lower() for name in header]
    if len(columns) == 1:
        print(f"{path}: the first row, {header[0]!r}, is used as the name of the only column")
        columns = ["text"]
    if len(set(columns)) < len(columns):
        raise UserError(f"{where}: two columns have the same name: {', '.join(columns)}")
    for where, row in rows:
        if len(row) != len(columns):
            raise UserError(f"{where}: {len(row)} fields, but the first row has {len(columns)}")
        yield where, dict(zip(columns, row))


def read_rows(path: Path, content: str, strict: bool = True,
              separator: str = ",") -> Iterator[tuple[str, list[str]]]:
    """Yields ('FILE, line N', fields) for each row of a CSV except blank lines. N is the row's last
    line. Raises UserError if the CSV is malformed. Without `strict`, quotes need not match."""
    csv.field_size_limit(2**31 - 1)     # a field may be a whole document
    rows = csv.reader(io.StringIO(content, newline=""), strict=strict, delimiter=separator)
    try:
        for row in rows:
            if row:
                yield f"{path}, line {rows.line_num}", row
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: malformed CSV ({error}); put a field with "
                        'a comma, a quote or a line end in "quotes", and double each quote in it'
                        ) from None


# names of the columns of a prompt and its completion
PAIRS = (("prompt", "completion"), ("source_text", "target_text"), ("question", "answer"))


def add_example_options(p: argparse.ArgumentParser) -> None:
    """Adds the options that name the columns and divide the examples."""
    p.add_argument("--prompt_column", metavar="NAME", help="column of the prompt (see above)")
    p.add_argument("--completion_column", metavar="NAME",
                   help="column of the completion (see above)")
    add_split_options(p)


def add_split_options(p: argparse.ArgumentParser) -> None:
    """Adds the options that divide the examples."""
    p.add_argument("--val_fraction", type=float, default=0.1,
                   help="fraction for validation (default: 0.1)")
    p.add_argument("--val_input", type=Path, metavar="FILE",
                   help="validate on this file instead of a part of --input")
    p.add_argument("--test_fraction", type=float, default=0.0,
                   help="fraction for test.jsonl (default: 0)")
    p.add_argument("--seed", type=int, default=1337,
                   help="seed of the order and the split (default: 1337)")


def check_example_options(args: argparse.Namespace) -> None:
    """Raises UserError if an option of add_example_options() needs another or is out of range."""
    if args.prompt_column and not args.completion_column:
        raise UserError(f"--prompt_column={args.prompt_column} needs --completion_column too")
    check_fractions(args)


def pick_columns(where: str, fields: dict, args: argparse.Namespace,
                 pairs: Sequence[tuple[str | None, str]],
                 wanted: str) -> tuple[str | None, str]:
    """Returns the columns of prompt and completion: those of the options, or the first of `pairs`
    that the fields have. Raises UserError with the text `wanted` if there are none."""
    if args.completion_column:
        pairs = [(args.prompt_column, args.completion_column)]
        wanted = " and ".join(filter(None, pairs[0]))
    for prompt, completion in pairs:
        if completion in fields and (prompt is None or prompt in fields):
            return prompt, completion
    raise UserError(f"{where}: must have {wanted}; it has "
                    f"{', '.join(map(str, fields)) or 'nothing'}")


def as_text(where: str, fields: dict, column: str) -> str:
    """Returns a field as text. Raises UserError if it is not a text or a number, or is NaN."""
    value = fields[column]
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return json.dumps(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: its {column} is {json.dumps(value)[:40]}, not a text")
    return value


def split_examples(examples: list[Example], val: list[Example], val_fraction: float,
                   test_fraction: float, seed: int,
                   test: Sequence[Example] = ()) -> dict[str, list[Example]]:
    """Removes duplicates, so that no example is in two splits; then shuffles and splits. `val` and
    `test`, unless empty, are used as these splits."""
    tested = dict.fromkeys(test)
    test, val = list(tested), [example for example in dict.fromkeys(val) if example not in tested]
    taken = {*val, *test}
    distinct = [example for example in dict.fromkeys(examples) if example not in taken]
    if len(distinct) < len(examples):
        print(f"note: {len(examples) - len(distinct):,} duplicate examples are left out")
    random.Random(seed).shuffle(distinct)
    n_test = round(len(distinct) * test_fraction)
    n_val = 0 if val else max(1, round(len(distinct) * val_fraction))
    return {"test": test or distinct[:n_test], "val": val or distinct[n_test:n_test + n_val],
            "train": distinct[n_test + n_val:]}


def check_fractions(args: argparse.Namespace) -> None:
    """Raises UserError if --val_fraction is not in (0, 1) or --test_fraction not in [0, 1)."""
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction={args.val_fraction}: must be between 0 and 1")
    if not 0 <= args.test_fraction < 1:
        raise UserError(f"--test_fraction={args.test_fraction}: must be at least 0 and below 1")


def check_no_end(where: str, name: str, text: str, tokenizer: AnyTokenizer) -> None:
    """Raises UserError, which begins with `where`, if the text of a field holds end-of-text."""
    end = tokenizer.special.get("eos_token")
    if end and end in text:
        raise UserError(f"{where}: its {name} holds {end}, which ends a document; remove it")


def encode_pairs(pairs: Sequence[Example], tokenizer: AnyTokenizer,
                 ends: tuple[bool, bool], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ids of all pairs, (n,); numbers of ids per prompt and completion, (N, 2)). Prompt
    and completion are encoded separately, as in generation. `ends` says for each of the two whether
    end-of-text follows it."""
    texts = (item for pair in pairs for item in zip(pair, ends))
    found = list(encode(tokenizer, texts, sum(len(text) for pair in pairs for text in pair), name))
    ids = np.concatenate([ids for ids, _ in found] or [np.zeros(0, TOKEN)])
    lengths = np.concatenate([lengths for _, lengths in found] or [np.zeros(0, int)])
    return ids, lengths.reshape(-1, 2)


def write_examples(out_dir: Path, splits: dict[str, list[Example]], tokenizer: AnyTokenizer,
                   loss_on: str, block_size: int) -> tuple[int, int]:
    """Writes train.bin and val.bin, their masks if loss_on is "completion", and test.jsonl. Returns
    the numbers of tokens in train.bin and val.bin. Prints how many examples are too long for a
    window of `block_size` ids."""
    files, lengths, tokens = dict(tokenizer.files), {}, {}
    for split in ("train", "val"):
        tokens[split], lengths[split] = encode_pairs(splits[split], tokenizer, (False, True), split)
        if loss_on == "completion":
            mask = np.tile(np.array([0, 1], np.uint8), len(splits[split]))
            files[f"{split}.mask.bin"] = np.repeat(mask, lengths[split].ravel()).tobytes()
    if splits["test"]:
        files["test.jsonl"] = jsonl(splits["test"])
    counts = write_dataset(out_dir, [tokens["train"]], [tokens["val"]], files)
    lengths = np.concatenate([lengths["train"], lengths["val"]]).sum(1)
    targets = "completions" if loss_on == "completion" else "all tokens"
    print("examples: " + ", ".join(f"{len(splits[s]):,} {s}" for s in ("train", "val", "test"))
          + f"; {np.mean(lengths):.1f} tokens on average, {lengths.max()} at most; "
          f"loss on {targets}")
    if long := int((lengths > block_size).sum()):
        print(f"note: {long:,} of {len(lengths):,} examples are longer than "
              f"--block_size={block_size}: they are kept, but do not fit in a window, so the model "
              "sees their end without their beginning; shorten them or raise --block_size")
    return counts


def write_pairs(out_dir: Path, splits: dict[str, list[Example]], tokenizer: AnyTokenizer,
                most: tuple[int, int]) -> tuple[int, int]:
    """Writes train.bin and val.bin, the lengths of their pairs, and test.jsonl. Returns the numbers
    of tokens in train.bin and val.bin. Prints how many sources and targets have more than `most`
    tokens, and how many tokens are unknown. Raises UserError if the tokenizer has no end token."""
    if tokenizer.eot is None:
        raise UserError(f"{tokenizer.name} has no end token, which ends each source and target; "
                        "use T5's tokenizer")
    files, lengths, tokens = dict(tokenizer.files), {}, {}
    for split in ("train", "val"):
        tokens[split], lengths[split] = encode_pairs(splits[split], tokenizer, (True, True), split)
        files[f"{split}.pairs.bin"] = lengths[split].astype(LENGTH).tobytes()
    if splits["test"]:
        files["test.jsonl"] = jsonl(splits["test"])
    counts = write_dataset(out_dir, [tokens["train"]], [tokens["val"]], files)
    lengths = np.concatenate([lengths["train"], lengths["val"]])
    print("pairs: " + ", ".join(f"{len(splits[s]):,} {s}" for s in ("train", "val", "test")) + "; "
          + ", ".join(f"{mean:.1f} tokens per {name}, {longest} at most" for name, mean, longest in
                      zip(("source", "target"), lengths.mean(0), lengths.max(0))))
    for name, limit, column in zip(("source", "target"), most, lengths.T):
        if long := int((column > limit).sum()):
            print(f"note: {long:,} of {len(column):,} {name}s are longer than "
                  f"--{name}_length={limit}: train.py cuts them at its own --{name}_length")
    print_unknown(tokenizer, np.concatenate([tokens["train"], tokens["val"]]))
    return counts


def print_unknown(tokenizer: AnyTokenizer, tokens: np.ndarray) -> None:
    """Prints how many of the tokens are the unknown token, if any."""
    name, id = tokenizer.special.get("unk_token"), tokenizer.special_ids.get("unk_token")
    unknown = int((tokens == id).sum()) if name else 0
    if unknown:
        print(f"note: {unknown:,} of {len(tokens):,} tokens are {name}, for characters that the "
              "vocabulary lacks (T5's lacks {, }, < and line ends): the model cannot distinguish "
              "or write them")


def jsonl(examples: Sequence[Example]) -> bytes:
    """Returns the content of a .jsonl file with one example per line."""
    return "".join(json.dumps(example._asdict(), ensure_ascii=False) + "\n"
                   for example in examples).encode("utf-8")


# -----------------------------------------------------------------------------
# writing

def encode_dataset(out_dir: Path, train: Pieces, val: Pieces,
                   tokenizer: AnyTokenizer) -> tuple[int, int]:
    """Encodes both splits and writes them with write_dataset(), whose result it returns."""
    ids = [(ids for ids, _ in encode(tokenizer, read_texts(pieces, tokenizer.sliceable),
                                     sum(len(text) for text, _ in pieces), name))
           for pieces, name in ((train, "train"), (val, "val"))]
    return write_dataset(out_dir, *ids, tokenizer.files)


def write_dataset(out_dir: Path, train: Iterable[np.ndarray], val: Iterable[np.ndarray],
                  files: dict[str, bytes]) -> tuple[int, int]:
    """Writes train.bin, val.bin and `files` ({name: content}). Returns the numbers of tokens in
    train.bin and val.bin. Raises UserError if a split has fewer than MIN_TOKENS tokens.

    All files are first written and fsynced as NAME.part, so an error leaves the old files. Then the
    old files, COMPANIONS included, are deleted and the new ones renamed; an error then leaves no
    file. train.bin is deleted first and renamed last, and val.bin is renamed after the files that
    describe it: a kill at any moment leaves the old dataset, the new one, or none that opens.
    """
    names = [*files, "val.bin", "train.bin"]
    out_dir.mkdir(parents=True, exist_ok=True)
    placed = []
    try:
        counts = write_part(out_dir, "train.bin", train), write_part(out_dir, "val.bin", val)
        if min(counts) < MIN_TOKENS:
            raise UserError(f"too little text: {counts[0]} training tokens and {counts[1]} for "
                            f"validation; both must be {MIN_TOKENS} or more: give more text")
        for name, content in files.items():
            write_part(out_dir, name, [np.frombuffer(content, np.uint8)])
        for name in ("train.bin", "val.bin", *COMPANIONS):
            (out_dir / name).unlink(missing_ok=True)
        for name in names:
            os.replace(out_dir / f"{name}.part", out_dir / name)
            placed.append(name)
    except BaseException:
        for name in [*placed, *(f"{name}.part" for name in names)]:
            (out_dir / name).unlink(missing_ok=True)
        raise
    print(f"{out_dir}: train.bin {counts[0]:,} tokens, val.bin {counts[1]:,} tokens")
    if min(counts) <= 1024 and "train.pairs.bin" not in files:
        print(f"note: a split is shorter than GPT-2's context of 1,024 tokens: train with "
              f"--block_size={min(counts) - 1} or less")
    return counts


def write_part(out_dir: Path, name: str, arrays: Iterable[np.ndarray]) -> int:
    """Writes arrays to NAME.part and fsyncs it. Returns the number of elements."""
    count = 0
    with open(out_dir / f"{name}.part", "wb") as f:
        for array in arrays:
            f.write(array.tobytes())
            count += array.size
        f.flush()
        os.fsync(f.fileno())
    return count


def print_next(config: str, out_dir: Path, counts: tuple[int, int], *options: str,
               pairs: int = 0, epochs: int | None = None) -> None:
    """Prints the command that trains on a dataset with the config file of that name. `pairs` is the
    number of training pairs, 0 for plain text. A split shorter than the config's block_size adds a
    smaller --block_size; little data adds the options of options_for_little_data()."""
    fields = {"block_size": 1024, "warmup_iters": 0} | runpy.run_path(
        str(DATA.parent / "config" / f"{config}.py"))
    block_size = min(fields["block_size"], min(counts) - 1)
    samples = pairs or max(1, (counts[0] - 1) // block_size - 1)     # as TokenBin.n_blocks
    chosen = {"epochs": epochs} if epochs else {}
    if "init_from" in fields:   # finetuning
        chosen |= options_for_little_data(fields, samples, epochs)
    if not pairs:
        chosen["block_size"] = block_size
    argv = ["python", "train.py", f"config/{config}.py", f"--dataset={dataset_name(out_dir)}",
            *options, *(f"--{name}={value}" for name, value in chosen.items()
                        if value != fields.get(name))]
    print(f"next: {shlex.join(argv)}")


def options_for_little_data(fields: dict[str, Any], samples: int,
                            epochs: int | None) -> dict[str, int]:
    """Returns {field: value} for about MIN_STEPS steps or more of finetuning. `fields` are those of
    a config file. Its max_iters is kept if it makes at most MAX_EPOCHS epochs of the samples."""
    batch_size, micro_steps = fields["batch_size"], fields["gradient_accumulation_steps"]
    epochs = epochs or fields.get("epochs")
    if not epochs and fields["max_iters"] * batch_size * micro_steps <= MAX_EPOCHS * samples:
        return {}
    epochs = max(epochs or 3, math.ceil(MIN_STEPS / samples))
    total = epochs * samples
    batch_size = min(batch_size, max(1, total // MIN_STEPS))
    micro_steps = min(micro_steps, max(1, total // (MIN_STEPS * batch_size)))
    steps = math.ceil(total / (batch_size * micro_steps))
    return {"epochs": epochs, "batch_size": batch_size, "gradient_accumulation_steps": micro_steps,
            "warmup_iters": min(fields["warmup_iters"], steps // 10),
            "eval_interval": min(fields["eval_interval"], max(1, steps // 3))}


def init_from_option(tokenizer: str) -> str:
    """Returns the --init_from option for the model of a --tokenizer: "MODEL" for a tokenizer.json
    or a dataset's folder, which do not name their model."""
    is_model = not Path(tokenizer).exists() or any(
        Path(tokenizer, name).is_file() for name in ("config.json", SETTINGS_FILE))
    return f"--init_from={tokenizer if is_model else 'MODEL'}"


def finetuning_config(train_tokens: int) -> str:
    """Returns the name of the config file for a text of this size, as in docs/training.md."""
    sizes = {"finetune_little_data": 250_000, "finetune_task": 12_000_000}
    return next((name for name, most in sizes.items() if train_tokens < most), "finetune_domain")


def dataset_name(out_dir: Path) -> str:
    """Returns the value of --dataset for a folder: its path in data/, or else its full path."""
    out_dir = out_dir.resolve()
    inside = out_dir.is_relative_to(DATA)
    return out_dir.relative_to(DATA).as_posix() if inside else str(out_dir)
