r"""Your own text as a dataset: a file, or a folder of files.

    python data/text/prepare.py --input=FILE_OR_FOLDER --out_dir=data/mine
    python train.py --init_from=gpt2 --dataset=mine --out_dir=out-mine

Each file is a document, with end-of-text after it; a folder is read with its subfolders, in the
order of the paths, hidden files left out. Where a file holds <|endoftext|>, as texts made for
gpt-2-simple do, it is several documents (--split_on=TEXT for another mark; --split_on= for none,
which keeps <|endoftext|> as ordinary text). A tenth of the documents validates; of a single one,
its end. Text must be UTF-8; a byte order mark is dropped, and Windows line ends become \n.

--tokenizer=gpt2        GPT-2's, to finetune a pretrained model (the default)
--tokenizer=char        characters; for a small model from scratch
--tokenizer=train       a byte-level BPE trained on this text, of --vocab_size; from scratch too
--tokenizer=FILE.json   a tokenizer.json, such as another dataset's or a pretrained model's
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fetch
from fetch import UserError


def find_files(source: Path, extensions: str) -> list[Path]:
    """The file itself, or the text files of a folder in the order of their paths."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"--input={source}: no such file or folder")
    wanted = {"." + e.strip().lstrip(".").lower() for e in extensions.split(",")}
    found = {}
    for path in source.rglob("*"):
        inside = path.relative_to(source)
        hidden = any(part.startswith(".") for part in inside.parts)     # .git, .venv, ...
        if path.suffix.lower() in wanted and path.is_file() and not hidden:
            found[inside.as_posix()] = path
    if not found:
        raise UserError(f"--input={source}: no files of {' '.join(sorted(wanted))} in that "
                        f"folder; --ext=.log,.tex takes others")
    return [found[name] for name in sorted(found)]


def read_documents(source: Path, extensions: str, mark: str) -> list[str]:
    """Every document of `source`; the newlines around a mark belong to it, and empty ones go."""
    documents = []
    for path in find_files(source, extensions):
        text = fetch.read_text(path)
        parts = text.split(mark) if mark else [text]
        documents += [part.strip("\n") for part in parts] if len(parts) > 1 else parts
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise UserError(f"--input={source} is empty; it should hold the text to train on")
    return documents


def choose_encoder(name: str, documents: list[str], train: fetch.Pieces,
                   vocab_size: int) -> fetch.Encoder:
    """The encoder that --tokenizer names; validation text does not train a BPE."""
    if name == "gpt2":
        return fetch.gpt2_encoder()
    if name == "char":
        return fetch.char_encoder("".join(documents))
    if name == "train":
        return fetch.json_encoder(fetch.train_bpe((text for text, _ in train), vocab_size))
    if not name.endswith(".json"):
        raise UserError(f"--tokenizer={name}: must be gpt2, char, train or a tokenizer.json file")
    if not Path(name).is_file():
        raise UserError(f"--tokenizer={name}: no such file")
    return fetch.json_encoder(Path(name).read_bytes(), name)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = fetch.parser(__doc__, Path(__file__).parent, "a text file, or a folder of them (required)")
    p.add_argument("--val_fraction", type=float, default=0.1, help="(default: 0.1)")
    p.add_argument("--tokenizer", default="gpt2", help="gpt2, char, train or FILE.json")
    p.add_argument("--vocab_size", type=int, default=8000,
                   help="of --tokenizer=train (default: 8000)")
    p.add_argument("--ext", default=".txt,.md", help="files of a folder (default: .txt,.md)")
    p.add_argument("--split_on", default=fetch.END_OF_TEXT, metavar="TEXT",
                   help=f"what parts documents in a file (default: {fetch.END_OF_TEXT})")
    args = p.parse_args(argv)
    if args.input is None:
        raise UserError("which text? pass --input=FILE_OR_FOLDER")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    documents = read_documents(args.input, args.ext, args.split_on)
    train, val = fetch.split_documents(documents, args.val_fraction)
    print(f"{args.input}: documents {len(documents):,}, characters {sum(map(len, documents)):,}")
    encoder = choose_encoder(args.tokenizer, documents, train, args.vocab_size)
    fetch.encode_dataset(args.out_dir, train, val, encoder)
    start = {"gpt2": "gpt2", "char": "scratch", "train": "scratch"}.get(args.tokenizer, "MODEL")
    name = fetch.dataset_name(args.out_dir)
    print(f"next: python train.py --init_from={start} --dataset={name} "
          f"--out_dir=out-{Path(name).name}")


if __name__ == "__main__":
    fetch.run(main)
