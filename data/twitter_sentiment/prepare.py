r"""Tweets and their sentiment: Sentiment140 (Go, Bhayani and Huang 2009) as prompts and answers.

    python data/twitter_sentiment/prepare.py [--input=FILE] [--seed=0] [--out_dir=DIR]
    python train.py config/finetune_twitter_sentiment.py
    python evaluate.py --task=classify --out_dir=out-twitter-sentiment --dataset=twitter_sentiment

With --pairs --tokenizer=google-t5/t5-base they are pairs for config/finetune_t5_sentiment.py.

The prompt is "Tweet: ...\nSentiment:", the completion " positive" or " negative". As many of each
are drawn by --seed; a twentieth is kept for the test (test.jsonl), and of the rest a twentieth
validates: the test never chooses a checkpoint. Of tweets that are the same one is taken.

Downloads 81 MB (1.6 million tweets) unless --input names the CSV: six columns without a header,
target (0 negative, 4 positive), id, date, query, user, text; latin-1 or UTF-8; or the .zip.
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


# {whether they are pairs: the form of a prompt and of its completion}. T5 knows the prefix of SST-2
# from its pretraining (Raffel et al. 2020, appendix D)
FORMS = {False: ("Tweet: {}\nSentiment:", " {}"), True: ("sst2 sentence: {}", "{}")}


def read_content(path: Path) -> str:
    """The CSV as text, out of the .zip too. Latin-1 decodes anything, so UTF-8 is tried first."""
    if not path.is_file():
        raise UserError(f"--input={path}: no such file")
    content = path.read_bytes()
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                if MEMBER not in archive.namelist():
                    raise UserError(f"{path} holds no {MEMBER}")
                content = archive.read(MEMBER)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} is damaged ({error}); fetch it again") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def read_tweets(path: Path, tokenizer: fetch.AnyTokenizer) -> list[tuple[str, str]]:
    """(text, label) of each labelled row, of tweets that are the same the first; says what was
    left out. Spaces are evened and HTML's &amp; and the like undone."""
    tweets, rows, unlabelled = {}, 0, 0
    for where, row in fetch.read_rows(path, read_content(path), strict=False):
        rows += 1
        if len(row) != 6:
            raise UserError(f"{where}: {len(row)} columns where Sentiment140 has 6: target, id, "
                            "date, query, user, text")
        if "\n" in row[5]:
            raise UserError(f"{where}: a tweet goes on over the line's end: the quote that opens "
                            "it is not closed on its line")
        target, text = row[0].strip(), " ".join(html.unescape(row[5]).split())
        if target not in LABELS and target not in UNLABELLED:
            raise UserError(f"{where}: the target, the first column, is {target[:20]!r}; it must "
                            "be 0 (negative) or 4 (positive), and there is no header")
        fetch.check_no_end(where, "tweet", text, tokenizer)
        if target in UNLABELLED or not text:
            unlabelled += 1
        else:
            tweets.setdefault(text, LABELS[target])
    if not rows:
        raise UserError(f"{path} is empty; it should hold Sentiment140's CSV")
    print(f"{path}: {rows:,} rows; left out: {unlabelled:,} without a label or text, "
          f"{rows - unlabelled - len(tweets):,} that repeat others")
    return list(tweets.items())


def split(tweets: list[tuple[str, str]], samples: int, test_fraction: float, val_fraction: float,
          seed: int, pairs: bool = False) -> dict[str, list[fetch.Example]]:
    """As many examples of each label in each split, in a drawn order; says how many were taken."""
    rng = random.Random(seed)
    by_label = {label: sorted(text for text, its in tweets if its == label)
                for label in LABELS.values()}
    fewest = min(by_label, key=lambda label: len(by_label[label]))
    if not by_label[fewest]:
        raise UserError(f"no tweet is {fewest}: with a single label there is nothing to tell "
                        "apart; give the whole CSV, which is sorted by label")
    each = min(samples // len(LABELS), len(by_label[fewest]))
    print(f"{each * len(LABELS):,} tweets taken, {each:,} of each label"
          + (f", not the {samples:,} asked for: only {each:,} distinct ones are {fewest}"
             if each < samples // len(LABELS) else ""))
    splits = {"train": [], "val": [], "test": []}
    n_test = round(each * test_fraction)
    n_val = round((each - n_test) * val_fraction)
    if min(n_test, n_val, each - n_test - n_val) < 1:
        raise UserError(f"{each} tweets of a label make a split of none: give --samples or more "
                        "tweets, or other fractions")
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
    p = fetch.parser(__doc__, Path(__file__).parent, "the CSV or the .zip, if at hand")
    p.add_argument("--samples", type=int, default=10000, help="tweets in all (default: 10000)")
    p.add_argument("--test_fraction", type=float, default=0.05, help="(default: 0.05)")
    p.add_argument("--val_fraction", type=float, default=0.05,
                   help="of what the test leaves (default: 0.05)")
    p.add_argument("--seed", type=int, default=0, help="draws the tweets and the split")
    p.add_argument("--pairs", action="store_true", help="pairs for T5, see --tokenizer")
    p.add_argument("--loss_on", default="completion", choices=["all", "completion"],
                   help="which tokens are learnt (default: completion)")
    p.add_argument("--block_size", type=int, default=1024,
                   help="longer examples are counted (default: 1024, GPT-2's context)")
    args = p.parse_args(argv)
    if args.samples < 6:
        raise UserError(f"--samples={args.samples}: must be at least 6, one of each label in each "
                        "split")
    for name in ("test_fraction", "val_fraction"):
        fetch.check_fraction(name, getattr(args, name))
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
                         fetch.model_option(args.tokenizer), context=0)
        return
    counts = fetch.write_examples(args.out_dir, splits, tokenizer, args.loss_on, args.block_size)
    fetch.print_next("finetune_twitter_sentiment", args.out_dir, counts,
                     fetch.model_option(args.tokenizer), context=512)


if __name__ == "__main__":
    fetch.run(main)
