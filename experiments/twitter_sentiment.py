"""Compares GPT-2, GPT-Neo, T5 and a baseline on Twitter sentiment, on the same splits.

    python experiments/twitter_sentiment.py        (or: make sentiment)
    python experiments/twitter_sentiment.py --models=FOLDER,gpt2 --input=tweets.csv
    python experiments/twitter_sentiment.py --train="--batch_size=4 --gradient_accumulation_steps=2"

For each split, it runs data/twitter_sentiment/prepare.py with the split's seed; for T5, again with
--pairs. For each model and split, it runs train.py with config/finetune_twitter_sentiment.py or
finetune_t5_sentiment.py, then evaluate.py --task=classify. At the end it prints a table of macro
F1: means, standard deviations over the splits, and standard errors for the number of test tweets.

The baseline is logistic regression on TF-IDF of words and pairs of words, trained on the same
tweets. To continue an experiment that was stopped, run the same command again: finished parts are
not repeated.
"""
import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from nanotune.cli import run  # noqa: E402
from nanotune.errors import UserError  # noqa: E402
from nanotune.evaluation.tasks import check_sklearn, classification_scores  # noqa: E402
from nanotune.formats.checkpoint import model_config  # noqa: E402
from nanotune.formats.hub import find_pretrained  # noqa: E402
from nanotune.text.tokenizer import GPT2Tokenizer  # noqa: E402

BASELINE = "TF-IDF + logistic regression"


def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", default="gpt2,EleutherAI/gpt-neo-125m,google-t5/t5-base",
                   help="values of --init_from, separated by commas (default: gpt2, gpt-neo-125m "
                        "and t5-base)")
    p.add_argument("--splits", type=int, default=3,
                   help="number of splits, with seeds 0, 1, ... (default: 3)")
    p.add_argument("--input", type=Path, help="Sentiment140's CSV (default: download it)")
    p.add_argument("--samples", type=int, default=10000, help="tweets in all (default: 10000)")
    p.add_argument("--out_dir", type=Path, default=Path("out-sentiment"),
                   help="folder for splits, runs and the table (default: out-sentiment)")
    p.add_argument("--train", default="", metavar="ARGS", help="more arguments for train.py")
    return p.parse_args(argv)


def check_same_experiment(args):
    """Raises UserError if out_dir has runs with other settings. Splits and models may be added.
    """
    settings = {"samples": args.samples, "train": args.train,
                "input": str(args.input.resolve()) if args.input else None}
    path = args.out_dir / "settings.json"
    if not path.is_file():
        args.out_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    differ = [f"--{k} was {before.get(k)}" for k in settings if settings[k] != before.get(k)]
    if differ:
        raise UserError(f"{args.out_dir} has runs with other settings ({'; '.join(differ)}): use "
                        "those settings or another --out_dir")


def command(script, *options):
    """Runs a script of this repository in the root folder. If it fails, exits with its status."""
    line = [sys.executable, str(ROOT / script), *map(str, options)]
    print("$ " + shlex.join(["python", script, *line[2:]]), flush=True)
    status = subprocess.run(line, cwd=ROOT).returncode
    if status:
        print("stopped; to continue from here, run the same command again", file=sys.stderr)
        sys.exit(status)


def prepare(args, seed, model=None):
    """Returns the folder of a split. Prepares the split if it is not there. With a
    `model`, the split has the same tweets as pairs, encoded with the model's tokenizer."""
    name = f"split-{seed}" + (f"-{short_name(model)}" if model else "")
    folder = args.out_dir.resolve() / name
    form = [f"--tokenizer={source_of(model)}", "--pairs"] if model else []
    if not (folder / "test.jsonl").is_file():
        source = [f"--input={args.input.resolve()}"] if args.input else []
        if not source and (seed > 0 or model):  # all use the first split's download
            first = args.out_dir.resolve() / "split-0"
            source = [f"--input={download}" for download in first.glob("*.zip")]
        command("data/twitter_sentiment/prepare.py", f"--seed={seed}", f"--out_dir={folder}",
                f"--samples={args.samples}", *form, *source)
    return folder


def short_name(model):
    """Returns gpt-neo-125m for EleutherAI/gpt-neo-125m, and the last folder of a path."""
    return Path(model).resolve().name


def source_of(model):
    """Returns a hub id, or the full path of a local model: the scripts run in the root folder."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def train_and_evaluate(args, model, seed, folder):
    """Trains and tests a model on a split, unless predictions.jsonl exists. Returns macro F1."""
    pairs = model_config(model).takes_pairs
    config = "finetune_t5_sentiment" if pairs else "finetune_twitter_sentiment"
    folder = prepare(args, seed, model) if pairs else folder
    out_dir = args.out_dir.resolve() / f"{short_name(model)}-{seed}"
    predictions = out_dir / "predictions.jsonl"
    if not predictions.is_file():
        started = (out_dir / "state.pt").is_file()
        command("train.py", f"config/{config}.py", f"--dataset={folder}",
                f"--out_dir={out_dir}", f"--seed={1337 + seed}", *shlex.split(args.train),
                f"--init_from={'resume' if started else source_of(model)}")
        command("evaluate.py", "--task=classify", f"--dataset={folder}", f"--out_dir={out_dir}")
    rows = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    truth, predicted = [row["label"] for row in rows], [row["predicted"] for row in rows]
    return classification_scores(truth, predicted, sorted(set(truth)))["macro_f1"]


def baseline(folder):
    """Returns macro F1 of logistic regression trained on the tweets of the split's train.bin."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    text = GPT2Tokenizer().decode(np.fromfile(folder / "train.bin", "<u2").tolist())
    pairs = [example.rpartition(":") for example in text.split("<|endoftext|>") if example]
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
                          LogisticRegression(max_iter=1000))
    model.fit([prompt for prompt, _, _ in pairs], [label.strip() for _, _, label in pairs])
    with open(folder / "test.jsonl", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    truth = [row["completion"].strip() for row in rows]
    predicted = model.predict([row["prompt"].rpartition(":")[0] for row in rows]).tolist()
    return classification_scores(truth, predicted, sorted(set(truth)))["macro_f1"]


def table(results, tests):
    """Returns {model: [macro F1 of each split]} as a Markdown table; `tests` is the number of test
    tweets per split. The standard error of the mean is computed as for a proportion of all test
    tweets, which is an approximation for macro F1."""
    splits = len(next(iter(results.values())))
    lines = ["| macro F1, % | " + " | ".join(f"split {i}" for i in range(splits))
             + " | mean | standard error | standard deviation |",
             "| --- |" + " --- |" * (splits + 3)]
    for model, scores in results.items():
        mean = statistics.mean(scores)
        error = math.sqrt(mean * (1 - mean) / (tests * splits))
        spread = f"{100 * statistics.stdev(scores):.1f}" if splits > 1 else "-"
        lines.append(f"| {model} | " + " | ".join(f"{100 * score:.1f}" for score in scores)
                     + f" | {100 * mean:.1f} | {100 * error:.1f} | {spread} |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    args = arguments(argv)
    models = [name for name in args.models.split(",") if name]
    if args.splits < 1 or not models:
        raise UserError("--splits must be at least 1, and --models must name at least one model")
    if len(set(map(short_name, models))) < len(models):
        raise UserError(f"--models={args.models}: two models have the same name; rename a folder")
    if args.input is not None and not args.input.is_file():
        raise UserError(f"--input={args.input}: no such file")
    check_sklearn()
    for model in models:  # fail now, not hours later
        if not Path(model).is_dir():
            find_pretrained(model)
    check_same_experiment(args)
    folders = [prepare(args, seed) for seed in range(args.splits)]
    results = {BASELINE: [baseline(folder) for folder in folders]}
    for model in models:
        results[short_name(model)] = [
            train_and_evaluate(args, model, seed, folder) for seed, folder in enumerate(folders)]
    tests = len((folders[0] / "test.jsonl").read_text(encoding="utf-8").splitlines())
    text = table(results, tests)
    (args.out_dir / "results.md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    run(main)
