r"""Your own task as pairs for T5: a source and the target to write.

    python data/pairs/prepare.py --input=FILE --tokenizer=google-t5/t5-small --out_dir=data/mine
    python train.py config/finetune_t5.py --dataset=mine
    python evaluate.py --task=generate --out_dir=out-t5 --dataset=mine

FILE is .jsonl, with one pair per line, or a .csv or .tsv whose first row names the columns:
source_text, target_text; prompt, completion; or question, answer. --prompt_column= and
--completion_column= name others.

--tokenizer must be the model's: a hub id or a folder. --prefix="summarize: " begins each source. T5
was pretrained with some prefixes (Raffel et al. 2020, appendix D); any other fixed text works too.
--test_fraction=0.05 writes that fraction to test.jsonl, for evaluate.py.
"""
import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fetch
from fetch import UserError

WANTED = "the columns source_text and target_text, or prompt and completion"


def read_pairs(rows: Iterator[tuple[str, dict]], tokenizer: fetch.AnyTokenizer,
               args: argparse.Namespace) -> Iterator[fetch.Example]:
    """Yields the pair of each row, the source with its prefix. Raises UserError if a text is empty
    or holds the end token."""
    for where, fields in rows:
        columns = fetch.pick_columns(where, fields, args, fetch.PAIRS, WANTED)
        if columns[0] is None:
            raise UserError("--completion_column needs --prompt_column too")
        texts = [fetch.without_end(fetch.as_text(where, fields, column), tokenizer)
                 for column in columns]
        for column, text in zip(columns, texts):
            if not text.strip():
                raise UserError(f"{where}: its {column} is empty; fill it or delete the row")
            fetch.check_no_end(where, column, text, tokenizer)
        yield fetch.Example(args.prefix + texts[0], texts[1])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = fetch.parser(__doc__, Path(__file__).parent, "a .jsonl, .csv or .tsv file",
                     "a hub id or folder of T5 (default: google-t5/t5-small)")
    p.set_defaults(tokenizer="google-t5/t5-small")
    p.add_argument("--prefix", default="", metavar="TEXT", help="begins each source (default: '')")
    fetch.add_example_options(p)
    for name in ("source", "target"):
        p.add_argument(f"--{name}_length", type=int, default=512, metavar="TOKENS",
                       help=f"print how many {name}s have more tokens (default: 512)")
    args = p.parse_args(argv)
    if args.input is None:
        raise UserError("no pairs are given; pass --input=FILE")
    fetch.check_surrogates(args.prefix, "--prefix")
    fetch.check_example_options(args)
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    tokenizer = fetch.choose_tokenizer(args.tokenizer)
    pairs = list(read_pairs(fetch.read_fields(args.input), tokenizer, args))
    val = [] if args.val_input is None else (
        list(read_pairs(fetch.read_fields(args.val_input), tokenizer, args)))
    if not pairs:
        raise UserError(f"{args.input} is empty; it must have one pair per line, with {WANTED}")
    splits = fetch.split_examples(pairs, val, args.val_fraction, args.test_fraction, args.seed)
    if not splits["train"]:
        raise UserError(f"{args.input}: {len(pairs)} pairs leave none for training; add more")
    counts = fetch.write_pairs(args.out_dir, splits, tokenizer,
                               (args.source_length, args.target_length))
    fetch.print_next("finetune_t5", args.out_dir, counts, fetch.init_from_option(args.tokenizer),
                     pairs=len(splits["train"]))


if __name__ == "__main__":
    fetch.run(main)
