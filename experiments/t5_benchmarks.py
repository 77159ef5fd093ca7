"""T5 compared with transformers' T5 on the tweets of data/twitter_sentiment, with random weights.

    python experiments/t5_benchmarks.py train --input=tweets.csv --dtype=bfloat16
    python experiments/t5_benchmarks.py generate --input=tweets.csv
    python experiments/t5_benchmarks.py export --input=tweets.csv
    python experiments/t5_benchmarks.py f1 --input=tweets.csv

train      pairs per second and peak memory of t5-base's shape: nanotune; a plain loop with
           transformers that pads to the longest row of a batch; the same loop with padding to
           300 + 200 tokens, as in SimpleT5
generate   about 500 predictions of t5-small's shape, in batches and one at a time
f1         macro F1 of a small T5 trained from scratch by train.py and by a transformers loop; three
           splits
export     ONNX in float32, int8 and int4: size and greedy speed of t5-base's shape compared with
           PyTorch in float32; F1 of the small T5 of f1, which is trained first if f1 has not run

Needs `pip install transformers`. The cases of train run in turns, each in a separate process.
Seconds are CPU time of one thread, so that other programs on the machine do not count. The
tokenizer is trained on the tweets.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from nanotune.cli import run  # noqa: E402
from nanotune.device import DTYPES, autocast, peak_memory, tune_malloc  # noqa: E402
from nanotune.evaluation.tasks import (  # noqa: E402
    answer,
    answer_scores,
    classification_scores,
)
from nanotune.formats.checkpoint import load_model  # noqa: E402
from nanotune.formats.hf import write_hf  # noqa: E402
from nanotune.generation.fast import pack  # noqa: E402
from nanotune.generation.generate import stream  # noqa: E402
from nanotune.text.loader import open_dataset  # noqa: E402
from nanotune.text.read import read_text  # noqa: E402
from nanotune.text.tokenizer import JsonTokenizer, tokenizer_of_folder  # noqa: E402
from nanotune.training.optimizer import make_optimizer  # noqa: E402
from t5 import T5, T5Config  # noqa: E402

CPU = torch.device("cpu")
SHAPES = {"base": dict(n_layer=12, n_decoder_layer=12, n_head=12, n_embd=768, n_inner=3072),
          "small": {},
          "tiny": dict(n_layer=2, n_decoder_layer=2, n_head=4, n_embd=128, head_size=32,
                       n_inner=512, vocab_size=4000)}
LONGEST, SIMPLE_T5 = None, (300, 200)  # padding: to the longest row of a batch, or to 300 + 200
LEARNING_RATE = 1e-3                   # for the tiny model


def command(script, *options):
    subprocess.run([sys.executable, ROOT / script, *map(str, options)], check=True, cwd=ROOT)


def train_tokenizer(folder, source, size):
    """Returns a Unigram tokenizer of tweets, with T5's special tokens and ids, and the labels as
    tokens. It is kept in `folder`, because training it again gives other tokens."""
    if folder.is_dir():
        return tokenizer_of_folder(folder)
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    trained = Tokenizer(models.Unigram())
    trained.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    lines = read_text(source).splitlines() + ["positive", "negative"] * 1000
    trained.train_from_iterator(lines, trainers.UnigramTrainer(
        vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False))
    names = zip(("pad_token", "eos_token", "unk_token"), special)
    folder.mkdir(parents=True)
    for name, content in JsonTokenizer(trained.to_str(), special=names).files.items():
        (folder / name).write_bytes(content)
    return tokenizer_of_folder(folder)


def make_folder(args, shape, seed=0):
    """Returns the folder of a T5 with random weights and the folders of the splits. Creates those
    that do not exist."""
    folder = args.out_dir.resolve() / f"t5-{shape}"
    if not folder.is_dir():
        folder.mkdir(parents=True)
        config = T5Config(**SHAPES[shape])
        torch.manual_seed(seed)
        write_hf(folder, vars(config), dict(T5(config).named_parameters()),
                 train_tokenizer(args.out_dir.resolve() / "tokenizer", args.input, 4000),
                 torch.float32)
    splits = [args.out_dir.resolve() / f"split-{seed}" for seed in range(3)]
    for seed, split in enumerate(splits):
        if not (split / "test.jsonl").is_file():
            command("data/twitter_sentiment/prepare.py", f"--input={args.input.resolve()}",
                    f"--tokenizer={folder}", "--pairs", f"--seed={seed}", f"--out_dir={split}")
    return folder, splits


# -----------------------------------------------------------------------------
# training

def shuffled_batches(split, size, lengths, seed=0):
    """Yields shuffled batches of pairs, like a DataLoader, padded to the longest row or `lengths`.
    """
    config = T5Config(source_length=512, target_length=512)
    data, rng = open_dataset(split / "train.bin", config), np.random.RandomState(seed)
    while True:
        order = rng.permutation(len(data.lengths))
        for start in range(0, len(order) - size + 1, size):
            pairs = order[start:start + size].tolist()
            rows, (S, T) = data.read(pairs), lengths or data.read_lengths[pairs].max(0)
            yield tuple(torch.nn.functional.pad(row, (0, int(n) - row.size(1)), value=-1)
                        for row, n in zip(rows, (S, T)))


def transformers_loss(model):
    """Returns a function (x, y) -> the summed loss of a transformers model."""
    def loss(x, y):
        return (y >= 0).sum() * model(
            input_ids=x.clamp(min=0), attention_mask=(x >= 0).long(),
            labels=y.masked_fill(y < 0, -100)).loss
    return loss


def case(args):
    """Trains one case for a few steps. Prints the seconds per step and the peak memory as JSON."""
    from transformers import AutoModelForSeq2SeqLM
    folder, splits = make_folder(args, args.shape)
    dtype, size = DTYPES[args.dtype], args.batch_size
    if args.case == "nanotune":
        tune_malloc()
        model, _ = load_model(str(folder), dropout=0.1)
        data = open_dataset(splits[0] / "train.bin", model.config, global_batch=size)
        batches, loss_of = (data.batch(n * size, size) for n in range(10**6)), model
    else:
        model = AutoModelForSeq2SeqLM.from_pretrained(folder).train()
        batches = shuffled_batches(splits[0], size, SIMPLE_T5 if args.case == "300" else LONGEST)
        loss_of = transformers_loss(model)
    params = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    optimizer = make_optimizer("adamw", params, 1e-4, (0.9, 0.999), CPU)
    model.train()
    torch.set_num_threads(1)
    seconds = []
    for _ in range(args.steps + 1):
        began, (x, y) = time.process_time(), next(batches)
        with autocast(CPU, dtype, cache=args.case != "nanotune"):
            loss = loss_of(x, y) / (y >= 0).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.process_time() - began)
    print(json.dumps({"seconds": seconds[1:], "memory": peak_memory(CPU)}))


def train(args):
    make_folder(args, args.shape)
    cases = {"nanotune": 32, "longest": 32, "300": 8}  # pairs per step; SimpleT5's default is 8
    found = {name: [] for name in cases}
    for _ in range(args.rounds):
        for name, size in cases.items():
            argv = [sys.executable, __file__, "case", f"--case={name}", f"--batch_size={size}",
                    f"--steps={args.steps}", f"--dtype={args.dtype}", f"--input={args.input}",
                    f"--out_dir={args.out_dir}", f"--shape={args.shape}"]
            done = subprocess.run(argv, check=True, capture_output=True, text=True)
            r = json.loads(done.stdout.splitlines()[-1])
            found[name].append((size / statistics.mean(r["seconds"]), r["memory"]))
    ours = statistics.median(speed for speed, _ in found["nanotune"])
    for name, results in found.items():
        speed = statistics.median(speed for speed, _ in results)
        print(f"{args.dtype} {name}: {speed:.2f} pairs/s, {max(m for _, m in results) / 1e9:.2f} "
              f"GB; nanotune is {ours / speed:.2f} times as fast")


# -----------------------------------------------------------------------------
# generation and F1

def test_rows(split):
    lines = (split / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def generate(args):
    folder, splits = make_folder(args, "small")
    model, tokenizer = load_model(str(folder))
    pack(model.eval(), CPU, DTYPES[args.dtype])
    prompts = [tokenizer.encode(row["prompt"]) for row in test_rows(splits[0])]
    torch.set_num_threads(1)
    seconds = {}
    for size in (32, 1) * args.rounds:
        began = time.process_time()
        with autocast(CPU, DTYPES[args.dtype], cache=True):
            answer(model, prompts, 4, tokenizer.eot, tokenizer.n_vocab, size)
        seconds.setdefault(size, []).append(time.process_time() - began)
    batched, single = (statistics.median(seconds[size]) for size in (32, 1))
    print(f"{len(prompts)} predictions: {batched:.1f} s in batches of 32, {single:.1f} s one at a "
          f"time, {single / batched:.1f} times as long")


def loop_f1(folder, split, steps, seed):
    """Returns macro F1 of transformers' model after a plain loop. Uses the weights with the
    lowest validation loss, which is computed every steps // 6 steps."""
    from transformers import AutoModelForSeq2SeqLM
    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dropout_rate=0.1)
    tokenizer = load_model(str(folder))[1]
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (0.9, 0.999),
                                  weight_decay=0.0)
    val = open_dataset(split / "val.bin", T5Config())
    batches, best, weights = shuffled_batches(split, 32, LONGEST, seed), float("inf"), None
    for step in range(steps + 1):
        if step % (steps // 6) == 0:
            model.eval()
            with torch.no_grad():
                loss = float(transformers_loss(model)(*val.read(val.windows())))
            if loss < best:
                best, weights = loss, {k: v.clone() for k, v in model.state_dict().items()}
        model.train()
        x, y = next(batches)
        (transformers_loss(model)(x, y) / (y >= 0).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.load_state_dict(weights)
    model.eval()
    rows, predicted = test_rows(split), []
    for row in rows:
        ids = torch.tensor([[*tokenizer.encode(row["prompt"]), tokenizer.eot]])
        new = model.generate(ids, max_new_tokens=8)[0, 1:].tolist()
        text = tokenizer.decode([i for i in new if i > 2]).strip()
        predicted.append(text if text in ("positive", "negative") else None)
    truth = [row["completion"] for row in rows]
    return classification_scores(truth, predicted, ["negative", "positive"])["macro_f1"]


def train_tiny(args, folder, split, seed):
    """Returns the out_dir of a small T5 on a split. Trains it first if needed."""
    out_dir = args.out_dir.resolve() / f"tiny-{seed}"
    if not (out_dir / "predictions.jsonl").is_file():
        command("train.py", "config/finetune_t5_sentiment.py", f"--dataset={split}",
                f"--init_from={folder}", f"--out_dir={out_dir}", f"--seed={seed}",
                f"--learning_rate={LEARNING_RATE}", "--dtype=float32", "--log_interval=100")
        command("evaluate.py", "--task=classify", f"--dataset={split}", f"--out_dir={out_dir}")
    return out_dir


def f1(args):
    folder, splits = make_folder(args, "tiny")
    found = []
    for seed in range(args.rounds * len(splits)):
        split = splits[seed % len(splits)]
        out_dir = train_tiny(args, folder, split, seed)
        lines = (out_dir / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        ours = classification_scores([row["label"] for row in rows],
                                     [row["predicted"] for row in rows],
                                     ["negative", "positive"])["macro_f1"]
        found.append((ours, loop_f1(folder, split, 846, seed)))
        error = (ours * (1 - ours) / len(rows)) ** 0.5
        print(f"{split.name}, seed {seed}: train.py {ours:.1%}, transformers loop "
              f"{found[-1][1]:.1%}, standard error of one score {error:.1%}", flush=True)
    for name, scores in zip(("train.py", "transformers loop"), zip(*found)):
        print(f"{name}: mean {statistics.mean(scores):.1%}, standard deviation between runs "
              f"{statistics.stdev(scores):.1%}")


# -----------------------------------------------------------------------------
# ONNX

def export_forms(args, source, name):
    """Exports a model in each form that does not exist yet. Returns {form: folder}."""
    forms = {"float32": "none", "int8": "int8", "int4": "int4"}
    folders = {form: args.out_dir.resolve() / f"{name}-{form}" for form in forms}
    for form, folder in folders.items():
        if not folder.is_dir():
            command("export.py", f"--init_from={source}", "--format=onnx",
                    f"--quantize={forms[form]}", f"--export_dir={folder}")
    return folders


def export(args):
    folder, _ = make_folder(args, "base")
    folders = export_forms(args, folder, "onnx-base")
    torch.set_num_threads(1)
    models = {"PyTorch": load_model(str(folder))[0].eval()} | {
        f"ONNX, {form}": load_model(str(path), with_onnx=True)[0]
        for form, path in folders.items()}
    sizes = [4 * models["PyTorch"].num_params(), *(
        sum(file.stat().st_size for file in path.glob("*.onnx*")) for path in folders.values())]
    pack(models["PyTorch"], CPU, torch.float32)
    for n_source, n_target in ((32, 32), (400, 60)):
        ids = np.random.RandomState(0).randint(3, 4000, n_source).tolist()
        seconds = {name: [] for name in models}
        for _ in range(args.rounds + 1):  # the first warms up
            for name, model in models.items():
                began = time.process_time()
                with torch.no_grad():
                    list(stream(model, [ids], n_target, temperature=0))
                seconds[name].append(time.process_time() - began)
        medians = {name: statistics.median(found[1:]) for name, found in seconds.items()}
        for (name, median), size in zip(medians.items(), sizes):
            print(f"{n_source} + {n_target} tokens, {name}: {size / 1e6:.0f} MB "
                  f"({size / sizes[0]:.1%}), {median:.2f} s, "
                  f"{medians['PyTorch'] / median:.1f} times as fast", flush=True)
    export_f1(args)


def export_f1(args):
    """Prints F1 of the small T5 in each form, on the test tweets of all three splits. The T5 was
    trained on the first split, which may contain test tweets of the others."""
    folder, splits = make_folder(args, "tiny")
    out_dir = train_tiny(args, folder, splits[0], 0)
    rows = [row for split in splits for row in test_rows(split)]
    truth, labels = [row["completion"] for row in rows], ["negative", "positive"]
    folders = {"PyTorch": out_dir} | {
        f"ONNX, {form}": path
        for form, path in export_forms(args, out_dir, "onnx-tiny").items()}
    for name, source in folders.items():
        model, tokenizer = load_model(str(source), with_onnx=True)
        found, _ = answer(model.eval(), [tokenizer.encode(row["prompt"]) for row in rows], 8,
                          tokenizer.eot, tokenizer.n_vocab, 32)
        texts = list(map(tokenizer.decode, found))
        scores = classification_scores(truth, [t if t in labels else None for t in texts], labels)
        words = statistics.mean(answer_scores(*pair)[1] for pair in zip(truth, texts))
        print(f"small T5, {name}: macro F1 {scores['macro_f1']:.2%}, F1 of words {words:.2%}, "
              f"{len(rows):,} tweets", flush=True)


def main(argv):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["train", "generate", "f1", "export", "case"])
    p.add_argument("--input", type=Path, required=True, help="Sentiment140's CSV")
    p.add_argument("--out_dir", type=Path, default=Path("out-t5-benchmarks"))
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--shape", default="base", choices=SHAPES)
    p.add_argument("--steps", type=int, default=8,
                   help="timed steps, after an untimed one (default: 8)")
    p.add_argument("--rounds", type=int, default=2, help="rounds of all cases (default: 2)")
    p.add_argument("--case", default="nanotune", help=argparse.SUPPRESS)
    p.add_argument("--batch_size", type=int, default=32, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    {"train": train, "generate": generate, "f1": f1, "export": export,
     "case": case}[args.what](args)


if __name__ == "__main__":
    run(main)
