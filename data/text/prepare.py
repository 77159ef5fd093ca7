r"""Your own text as a dataset: a file, or a folder of files.

    python data/text/prepare.py --input=FILE_OR_FOLDER --out_dir=data/mine
    python train.py --init_from=gpt2 --dataset=mine --out_dir=out-mine

Each file is a document, followed by end-of-text. A folder is read with its subfolders, in the order
of the paths, without hidden files. <|endoftext|> in a file separates documents, as in texts for
gpt-2-simple (--split_on=TEXT uses another mark; --split_on= uses none).

A tenth of the characters is for validation: whole documents, or the end of the longest if there are
few. Text must be UTF-8. A byte order mark is removed, and Windows line ends become \n.

--tokenizer=gpt2        GPT-2's, to finetune a pretrained model (the default)
--tokenizer=char        characters, for a small model from scratch
--tokenizer=train       a byte-level BPE of --vocab_size tokens, trained on this text; also for
                        a model from scratch
--tokenizer=NAME        another model's: a tokenizer.json, a folder, a run of train.py, or a hub id
"""
import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fetch
from fetch import UserError


def find_files(source: Path, extensions: str) -> list[Path]:
    """Returns the file, or the text files of a folder in the order of their paths. Prints how many
    other files the folder has."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"--input={source}: no such file or folder")
    wanted = {"." + e.strip().lstrip(".").lower() for e in extensions.split(",")}
    found, skipped = {}, Counter()
    for path in source.rglob("*"):
        inside = path.relative_to(source)
        if not path.is_file() or any(part.startswith(".") for part in inside.parts):    # .git, ...
            continue
        if path.suffix.lower() in wanted:
            found[inside.as_posix()] = path
        else:
            skipped[path.suffix.lower() or "no extension"] += 1
    if skipped:
        kinds = ", ".join(f"{extension} {count:,}" for extension, count in skipped.most_common(5))
        print(f"{source}: skipped {sum(skipped.values()):,} files with other extensions ({kinds}"
              f"{', ...' if len(skipped) > 5 else ''})")
    if not found:
        raise UserError(f"--input={source}: no {' '.join(sorted(wanted))} files in that folder; "
                        f"--ext=.log,.tex reads others")
    return [found[name] for name in sorted(found)]


def find_documents(source: Path, extensions: str, mark: str | None,
                   end: str | None = None) -> list[fetch.Document]:
    """Returns the documents of `source`. `mark` separates the documents of a file; the text `end`
    at the end of one is removed. Raises UserError, which names each file that cannot be read."""
    documents, problems = [], []
    for path in find_files(source, extensions):
        try:
            documents += fetch.find_documents(path, mark, end)
        except UserError as error:
            problems.append(str(error))
    if problems:
        count = f"{len(problems)} files cannot be read: " if problems[1:] else ""
        raise UserError(count + "; ".join(problems))
    if not documents:
        raise UserError(f"--input={source} is empty; it must contain the text to train on")
    return documents


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = fetch.parser(__doc__, Path(__file__).parent, "a text file, or a folder of them (required)",
                     "gpt2, char, train, a tokenizer.json, a folder, a run or a hub id "
                     "(default: gpt2)")
    p.add_argument("--val_fraction", type=float, default=0.1,
                   help="fraction for validation (default: 0.1)")
    p.add_argument("--val_input", type=Path, metavar="FILE",
                   help="validate on this file or folder instead of a part of --input")
    p.add_argument("--vocab_size", type=int, default=8000,
                   help="tokens of --tokenizer=train (default: 8000)")
    p.add_argument("--ext", default=".txt,.md",
                   help="extensions of the files to read in a folder (default: .txt,.md)")
    p.add_argument("--split_on", metavar="TEXT",
                   help="mark between documents of a file (default: end-of-text, <|endoftext|>)")
    args = p.parse_args(argv)
    if args.input is None:
        raise UserError("no text is given; pass --input=FILE_OR_FOLDER")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    tokenizer = None if args.tokenizer in ("char", "train") else (
        fetch.choose_tokenizer(args.tokenizer))
    end = fetch.EOT if tokenizer is None else tokenizer.special.get("eos_token")
    mark = end if args.split_on is None else args.split_on
    documents = find_documents(args.input, args.ext, mark, end)
    if args.val_input is None:
        train, val = fetch.split_documents(documents, args.val_fraction)
    else:
        train, val = ([(text, True) for text in part] for part in (
            documents, find_documents(args.val_input, args.ext, mark, end)))
    print(f"{args.input}: documents {len(documents):,}, characters {sum(map(len, documents)):,}")
    if args.tokenizer == "char":
        tokenizer = fetch.char_tokenizer(train + val)
    elif args.tokenizer == "train":     # not on validation text
        tokenizer = fetch.train_bpe(train, args.vocab_size)
    counts = fetch.encode_dataset(args.out_dir, train, val, tokenizer)
    out_dir = f"--out_dir=out-{args.out_dir.resolve().name}"
    if args.tokenizer == "char":
        fetch.print_next("train_shakespeare_char", args.out_dir, counts, out_dir)
    elif args.tokenizer == "train":
        fetch.print_next("quickstart_pretrain", args.out_dir, counts, out_dir)
    else:
        fetch.print_next(fetch.finetuning_config(counts[0]), args.out_dir, counts, out_dir,
                         fetch.init_from_option(args.tokenizer))


if __name__ == "__main__":
    fetch.run(main)
