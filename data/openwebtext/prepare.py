"""OpenWebText in GPT-2's tokens: 9.04 billion for training (17 GB), 4.4 million for validation.

    python data/openwebtext/prepare.py [--input=FILE_OR_FOLDER] [--out_dir=DIR] [--num_proc=8]

Needs `pip install datasets`, about 100 GB of disk and a few hours. Downloads the 8,013,769
documents of Skylion007/openwebtext from the Hugging Face hub, or reads --input: .jsonl or .parquet
with a column "text", a folder of either, or a folder that datasets' save_to_disk wrote. End-of-text
follows each document. One document in 2,000 is for validation, drawn as in nanoGPT.
"""
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fetch
from fetch import UserError

HUB_ID = "Skylion007/openwebtext"       # parquet files, which need no loading script
KINDS = {".jsonl": "json", ".parquet": "parquet"}


def load_documents(source: Path | None, num_proc: int):
    """Returns a datasets.Dataset with the column "text", from `source` or the hub."""
    if source and not source.exists():
        raise UserError(f"--input={source}: no such file or folder")
    if source is None:
        def load(datasets):
            return datasets.load_dataset(HUB_ID, split="train", num_proc=num_proc)
    elif (source / "state.json").exists():
        def load(datasets):
            return datasets.load_from_disk(str(source))
    else:
        def load(datasets):
            kind, files = find_files(source)
            return datasets.load_dataset(kind, data_files=files, split="train")
    documents = fetch.load_with_datasets(source or HUB_ID, load)
    if "text" not in documents.column_names:
        raise UserError(f'{source or HUB_ID} has no column "text", only {documents.column_names}')
    return documents.select_columns("text")


def find_files(source: Path) -> tuple[str, list[str]]:
    """Returns datasets' name for the kind of files in `source`, and their sorted paths."""
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    suffixes = {f.suffix for f in files if f.suffix in KINDS and f.is_file()}
    if len(suffixes) != 1:
        raise UserError(f"--input={source}: must be .jsonl or .parquet files, all of one kind")
    suffix = suffixes.pop()
    return KINDS[suffix], [str(f) for f in files if f.suffix == suffix]


def tokenize(rows: dict[str, list[str]], name: str = "gpt2") -> dict[str, list[bytes]]:
    """Encodes texts to the bytes of a .bin file: a quarter of the disk space of int64 lists.

    GPT-2's tokenizer encodes <|endoftext|> in a text as plain text, as in nanoGPT.
    """
    tokenizer = fetch.tokenizer_of_source(name)
    is_gpt2 = isinstance(tokenizer, fetch.GPT2Tokenizer)
    encode = tokenizer.load().encode_to_numpy if is_gpt2 else tokenizer.encode
    plain = {"disallowed_special": ()} if is_gpt2 else {}
    end = np.array(fetch.document_end(tokenizer), fetch.TOKEN).tobytes()
    return {"ids": [np.asarray(encode(text, **plain)).astype(fetch.TOKEN).tobytes() + end
                    for text in rows["text"]]}


def arrays(tokenized, name: str) -> Iterator[np.ndarray]:
    """Yields the ids of a tokenized split, a thousand documents at a time."""
    with tqdm(desc=f"writing {name}", total=len(tokenized), unit="doc", disable=None) as bar:
        for rows in tokenized.iter(batch_size=1000):
            yield np.frombuffer(b"".join(rows["ids"]), dtype=fetch.TOKEN)
            bar.update(len(rows["ids"]))


def main(argv: list[str] | None = None) -> None:
    p = fetch.parser(__doc__, Path(__file__).parent, "read this path instead of a download")
    p.add_argument("--num_proc", type=int, default=os.cpu_count(),
                   help="processes that tokenize (default: one per core)")
    args = p.parse_args(argv)
    tokenizer = fetch.choose_tokenizer(args.tokenizer)
    tokenizer.encode("")        # loads it now: an error comes before the long download
    documents = load_documents(args.input, args.num_proc)
    if len(documents) < 2:
        raise UserError(f"--input={args.input}: needs at least 2 documents, has {len(documents)}")
    # datasets caches the split and the tokens, so a stopped run continues from there
    split = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    tokenized = split.map(tokenize, batched=True, remove_columns=["text"], desc="tokenizing",
                          fn_kwargs={"name": args.tokenizer},
                          num_proc=min(args.num_proc, len(split["test"])))
    counts = fetch.write_dataset(args.out_dir, arrays(tokenized["train"], "train"),
                                 arrays(tokenized["test"], "val"), tokenizer.files)
    fetch.print_next("train_gpt2", args.out_dir, counts)


if __name__ == "__main__":
    fetch.run(main)
