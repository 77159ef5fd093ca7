r"""Tweets and their sentiment: Sentiment140 (Go, Bhayani and Huang 2009) as prompts and answers.

    python data/twitter_sentiment/prepare.py [--input=FILE] [--seed=0] [--out_dir=DIR]
    python train.py config/finetune_twitter_sentiment.py
    python evaluate.py --task=classify --out_dir=out-twitter-sentiment --dataset=twitter_sentiment

--pairs --tokenizer=google-t5/t5-base writes pairs for config/finetune_t5_sentiment.py.

The prompt is "Tweet: ...\nSentiment:", the completion " positive" or " negative". --seed draws the
same number of tweets with each label, without duplicates. A twentieth is for the test (test.jsonl)
and a twentieth of the rest for validation, so the test set never chooses a checkpoint.

Downloads 81 MB (1.6 million tweets), or reads --input: the .zip, or its CSV in latin-1 or UTF-8.
The CSV has six columns without a header: target (0 negative, 4 positive), id, date, query, user,
text.
"""
import argparse
import html
import random
import sys
import zipfile
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fetch
from fetch import UserError

URL = "https://cs.stanford.edu/people/alecmgo/trainingandtestdata.zip"
MEMBER = "training.1600000.processed.noemoticon.csv"
LABELS = {"0": "negative", "4": "positive"}
UNLABELLED = ("", "2")      # 2 is neutral, in Sentiment140's small test file


# {--pairs: (format of a prompt, format of its completion)}. T5 was pretrained on SST-2 with this
# prefix (Raffel et al. 2020, appendix D)
FORMS = {False: ("Tweet: {}\nSentiment:", " {}"), True: ("sst2 sentence: {}", "{}")}


def read_content(path: Path) -> str:
    """Returns the text of the CSV, or of the CSV in the .zip. Tries UTF-8 first, because latin-1
    decodes anything."""
    if not path.is_file():
        raise UserError(f"--input={path}: no such file")
    content = path.read_bytes()
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                if MEMBER not in archive.namelist():
                    raise UserError(f"{path} does not contain {MEMBER}")
                content = archive.read(MEMBER)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} is damaged ({error}); download it again") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def read_tweets(path: Path, tokenizer: fetch.AnyTokenizer) -> list[tuple[str, str]]:
    """Returns (text, label) of each labelled row, without duplicates. Prints how many rows were
    left out. White space becomes single spaces, and HTML entities such as &amp; are decoded."""
    tweets, rows, unlabelled = {}, 0, 0
    for where, row in fetch.read_rows(path, read_content(path), strict=False):
        rows += 1
        if len(row) != 6:
            raise UserError(f"{where}: {len(row)} columns, but Sentiment140 has 6: target, id, "
                            "date, query, user, text")
        if "\n" in row[5]:
            raise UserError(f"{where}: a tweet has a line end: its opening quote is not closed on "
                            "the same line")
        target, text = row[0].strip(), " ".join(html.unescape(row[5]).split())
        if target not in LABELS and target not in UNLABELLED:
            raise UserError(f"{where}: the target, the first column, is {target[:20]!r}; it must "
                            "be 0 (negative) or 4 (positive), and the file must have no header")
        fetch.check_no_end(where, "tweet", text, tokenizer)
        if target in UNLABELLED or not text:
            unlabelled += 1
        else:
            tweets.setdefault(text, LABELS[target])
    if not rows:
        raise UserError(f"{path} is empty; it must contain Sentiment140's CSV")
    print(f"{path}: {rows:,} rows; left out: {unlabelled:,} without a label or text, "
          f"{rows - unlabelled - len(tweets):,} duplicates")
    return list(tweets.items())


def split(tweets: list[tuple[str, str]], samples: int, test_fraction: float, val_fraction: float,
          seed: int, pairs: bool = False) -> dict[str, list[fetch.Example]]:
    """Returns shuffled splits, each with the same number of examples of both labels. Prints how
    many tweets were drawn."""
    rng = random.Random(seed)
    by_label = {label: sorted(text for text, found in tweets if found == label)
                for label in LABELS.values()}
    fewest = min(by_label, key=lambda label: len(by_label[label]))
    if not by_label[fewest]:
        raise UserError(f"no tweet is {fewest}, and both labels are needed; give the whole CSV, "
                        "which is sorted by label")
    each = min(samples // len(LABELS), len(by_label[fewest]))
    print(f"{each * len(LABELS):,} tweets drawn, {each:,} of each label"
          + (f", fewer than --samples={samples}: only {each:,} distinct tweets are {fewest}"
             if each < samples // len(LABELS) else ""))
    splits = {"train": [], "val": [], "test": []}
    n_test = round(each * test_fraction)
    n_val = round((each - n_test) * val_fraction)
    if min(n_test, n_val, each - n_test - n_val) < 1:
        raise UserError(f"{each} tweets per label leave a split empty; give more tweets, a larger "
                        "--samples or other fractions")
    for label, texts in by_label.items():
        prompt, completion = FORMS[pairs]
        drawn = [fetch.Example(prompt.format(text), completion.format(label))
                 for text in rng.sample(texts, each)]
        splits["test"] += drawn[:n_test]
        splits["val"] += drawn[n_test:n_test + n_val]
        splits["train"] += drawn[n_test + n_val:]
    for examples in splits.values():
        rng.shuffle(examples)
    return splits


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = fetch.parser(__doc__, Path(__file__).parent, "read this CSV or .zip instead of a download")
    p.add_argument("--samples", type=int, default=10000, help="tweets in all (default: 10000)")
    p.add_argument("--test_fraction", type=float, default=0.05,
                   help="fraction for test.jsonl (default: 0.05)")
    p.add_argument("--val_fraction", type=float, default=0.05,
                   help="fraction of the rest for validation (default: 0.05)")
    p.add_argument("--seed", type=int, default=0,
                   help="seed of the tweets and the split (default: 0)")
    p.add_argument("--pairs", action="store_true", help="write pairs for T5 (with its --tokenizer)")
    p.add_argument("--loss_on", default="completion", choices=["all", "completion"],
                   help="tokens that the loss counts (default: completion)")
    p.add_argument("--block_size", type=int, default=1024,
                   help="print how many examples have more tokens (default: 1024)")
    args = p.parse_args(argv)
    if args.samples < 6:
        raise UserError(f"--samples={args.samples}: must be at least 6, one per label and split")
    fetch.check_fractions(args)
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    source = args.input or fetch.download(URL, args.out_dir / Path(URL).name)
    tokenizer = fetch.choose_tokenizer(args.tokenizer)
    splits = split(read_tweets(source, tokenizer), args.samples, args.test_fraction,
                   args.val_fraction, args.seed, args.pairs)
    if args.pairs:
        counts = fetch.write_pairs(args.out_dir, splits, tokenizer, (512, 512))
        fetch.print_next("finetune_t5_sentiment", args.out_dir, counts,
                         fetch.init_from_option(args.tokenizer), pairs=len(splits["train"]))
        return
    counts = fetch.write_examples(args.out_dir, splits, tokenizer, args.loss_on, args.block_size)
    fetch.print_next("finetune_twitter_sentiment", args.out_dir, counts,
                     fetch.init_from_option(args.tokenizer))


if __name__ == "__main__":
    fetch.run(main)
