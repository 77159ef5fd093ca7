"""Tiny Shakespeare in GPT-2's tokens: 301,966 for training, 36,059 for validation.

    python data/shakespeare/prepare.py [--input=FILE] [--tokenizer=NAME] [--out_dir=DIR]

Downloads 1.1 MB from karpathy/char-rnn, or reads --input: the same file or any other text.
The last tenth of the characters is for validation.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fetch


def main(argv: list[str] | None = None) -> None:
    p = fetch.parser(__doc__, Path(__file__).parent, "read this text instead of a download")
    args = p.parse_args(argv)
    train, val = fetch.split_text(fetch.shakespeare(args.input, args.out_dir))
    counts = fetch.encode_dataset(args.out_dir, train, val, fetch.choose_tokenizer(args.tokenizer))
    fetch.print_next("finetune_shakespeare", args.out_dir, counts,
                     fetch.init_from_option(args.tokenizer))


if __name__ == "__main__":
    fetch.run(main)
