"""Tiny Shakespeare as characters: 1,003,854 for training, 111,540 for validation, 65 distinct.

    python data/shakespeare_char/prepare.py [--input=FILE] [--out_dir=DIR]

Downloads 1.1 MB from karpathy/char-rnn, or reads --input: the same file or any other text.
The characters are saved in meta.pkl, in nanoGPT's format.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fetch


def main(argv: list[str] | None = None) -> None:
    p = fetch.parser(__doc__, Path(__file__).parent, "read this text instead of a download",
                     tokenizers="")
    args = p.parse_args(argv)
    train, val = fetch.split_text(fetch.shakespeare(args.input, args.out_dir))
    counts = fetch.encode_dataset(args.out_dir, train, val, fetch.char_tokenizer(train + val))
    fetch.print_next("train_shakespeare_char", args.out_dir, counts)


if __name__ == "__main__":
    fetch.run(main)
