"""Evaluates a model: perplexity, classification, generated answers, LAMBADA.

    python evaluate.py --out_dir=out-shakespeare --dataset=shakespeare
    python evaluate.py --init_from=gpt2 --input=FILE.txt --stride=512
    python evaluate.py --task=classify --out_dir=out-twitter-sentiment --dataset=twitter_sentiment
    python evaluate.py --task=generate --out_dir=out-t5 --dataset=mine
    python evaluate.py --task=lambada --init_from=gpt2 --input=lambada_test.jsonl

perplexity   of a dataset's split or a text file; the loss is computed as in train.py
classify     a dataset's test.jsonl: generates labels, or with --method=likelihood picks the most
             likely label; prints accuracy, macro F1 and a confusion matrix
generate     a dataset's test.jsonl: generates answers (of a conversation, the last one); prints
             exact match, F1 of words, and ROUGE if rouge-score is installed
lambada      predicts the last word of each line {"text": "..."}; prints accuracy, with and without
             the stop-word filter, and perplexity

classify and generate write out_dir/predictions.jsonl, or with --init_from=MODEL
out_dir/predictions-MODEL.jsonl.
"""
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import nanotune.threads  # noqa: F401

import numpy as np
import torch

from configurator import AtLeast0, AtLeast1, Beams, LengthPenalty, UpTo65536, configure
from nanotune.cli import run
from nanotune.device import DtypeName, autocast, pick_dtype
from nanotune.errors import UserError
from nanotune.evaluation import perplexity, tasks
from nanotune.files import write_atomic
from nanotune.formats.checkpoint import check_dtype, history_of, load_model, pick_source
from nanotune.generation.beams import check_length_penalty
from nanotune.generation.fast import pack
from nanotune.text import chat
from nanotune.text.loader import dataset_folder, open_dataset, open_tokens, prepared
from nanotune.text.read import read_text
from nanotune.text.tokenizer import check_same_tokenizer, tokenizer_of_dataset
from nanotune.training.distributed import check_same_fields, join, read_world, sum_over_ranks


@dataclass
class Config:
    # task
    task: Literal["perplexity", "classify", "generate", "lambada"] = "perplexity"
    out_dir: str = "out"              # read ckpt.pt of this run; write predictions*.jsonl to it
    init_from: str = "resume"  # resume: out_dir; else a hub id, a folder, a run or an .onnx file
    dataset: str | None = None        # a folder in data/, or a path; None: the run's
    split: str = "val"  # perplexity: train or val
    input: str | None = None          # a text file instead of a dataset; lambada: lines {"text"}
    # options
    eval_iters: AtLeast0 = 0          # perplexity: number of windows, evenly spaced; 0: all
    stride: AtLeast1 | None = None  # perplexity: tokens between window starts; None: block_size
    detokenize: bool = False  # perplexity: remove the spaces that WikiText inserts
    method: Literal["generate", "likelihood"] = "generate"  # of --task=classify
    max_new_tokens: AtLeast1 | None = None  # None: 128 (generate), longest label + 1 (classify)
    num_beams: Beams | None = None    # generate, classify: number of beams; None: greedy
    length_penalty: LengthPenalty = 1.0  # beams: divide log p by tokens ** this; higher: longer
    batch_size: UpTo65536 | None = None  # None: 8 windows, or 32 prompts
    block_size: AtLeast1 | None = None  # tokens per window; None: the model's block_size
    device: str = "auto"              # auto, cpu, cuda, cuda:N, mps
    dtype: DtypeName = "auto"


def check_config(cfg, world):
    """Raises UserError if fields contradict each other or a file or package is missing."""
    if cfg.input is not None and not Path(cfg.input).is_file():
        raise UserError(f"--input={cfg.input}: no such file")
    if cfg.input is not None and cfg.task not in ("perplexity", "lambada"):
        raise UserError(f"--task={cfg.task} reads the dataset's test.jsonl: leave --input out")
    if cfg.eval_iters and (cfg.input or cfg.stride):
        raise UserError("--eval_iters picks windows of a dataset's split: leave --input and "
                        "--stride out, or leave --eval_iters out")
    if cfg.detokenize and cfg.input is None:
        raise UserError("--detokenize needs a text file: give --input=FILE")
    if cfg.task == "lambada" and cfg.input is None:
        raise UserError('--task=lambada needs --input=FILE of lines {"text": "..."}')
    if cfg.num_beams is not None and (cfg.task in ("perplexity", "lambada")
                                      or cfg.method == "likelihood"):
        raise UserError("--num_beams is for generated answers: --task=generate, or --task=classify "
                        "with --method=generate")
    check_length_penalty(cfg)
    if cfg.task == "classify":
        tasks.check_sklearn()
    if cfg.task != "perplexity" and world.size > 1:
        raise UserError(f"--task={cfg.task} runs in one process: use python, not torchrun")


def dataset_of(source):
    """Returns the dataset that a run was trained on. Raises UserError if `source` is not a run."""
    dataset = (history_of(source).get("config") or {}).get("dataset")
    if dataset is None:
        raise UserError(f"no text to evaluate on: {source} is not a run with a dataset; "
                        "give --dataset=NAME or --input=FILE" + prepared())
    return dataset


def read_input(cfg, tokenizer):
    """Returns (ids, number of words) of the --input file; words are separated by whitespace."""
    text = read_text(cfg.input)
    words = len(text.split())
    text = perplexity.detokenize_wikitext(text) if cfg.detokenize else text
    tokens = np.array(tokenizer.encode(text))
    if len(tokens) < 2:
        raise UserError(f"{cfg.input} has {len(tokens)} tokens; perplexity needs at least 2")
    return tokens, words


def run_perplexity(cfg, model, tokenizer, source, world):
    block_size, batch_size = model.config.block_size, cfg.batch_size or 8
    stride = cfg.stride or block_size
    pairs = model.config.takes_pairs
    if pairs and cfg.stride:
        raise UserError(f"--stride={stride} is for windows of plain text; leave it out for pairs")
    if stride > block_size:
        raise UserError(f"--stride={stride} would skip tokens: windows have {block_size} tokens; "
                        f"use at most --stride={block_size}")
    if cfg.input is None:
        name, tokens, words = f"{cfg.dataset} {cfg.split}", None, None
        path = dataset_folder(cfg.dataset) / f"{cfg.split}.bin"
    else:
        name = path = cfg.input
        tokens, words = read_input(cfg, tokenizer)
    data = open_dataset(path, model.config, tokens=tokens)
    for line in data.warnings(None) if pairs and world.is_main else []:
        print(f"note: {line}")
    # with eval_iters: the same windows as in train.py
    windows = data.windows(cfg.eval_iters, stride)
    sums = perplexity.perplexity_sums(model, data, windows, batch_size, world, tokenizer.n_bytes)
    r = perplexity.perplexity_of_sums(sum_over_ranks(*sums, device=world.device))
    if not world.is_main:
        return
    loss = r["loss"]
    print(f"{source} on {name}: loss {loss:.4f} nats per token, perplexity {exp(loss):.2f}, "
          + ("targets of pairs" if pairs else f"windows of {block_size}")
          + (f" every {stride}" if stride < block_size else ""))
    print(f"  standard error of the loss {r['standard_error']:.4f} over {r['windows']:,} "
          f"{'pairs' if pairs else 'windows'}; "
          f"{r['bits_per_byte']:.4f} bits per byte; {r['tokens']:,} tokens counted")
    if words:
        print(f"  perplexity {exp(loss * r['tokens'] / words):.2f} per word; {words:,} words, "
              "separated by whitespace")


def exp(x):
    return math.exp(min(x, 700))


def test_file(cfg):
    """Returns the path of the dataset's test.jsonl."""
    path = dataset_folder(cfg.dataset) / "test.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist: --task={cfg.task} needs held-out prompts and "
                        "answers; for a dataset of these run prepare.py with --test_fraction=0.05; "
                        "for plain text use --task=perplexity")
    return path


def generate_answers(cfg, model, tokenizer, prompts, limit, end=()):
    """Returns ([answer to each prompt], [whether it was cut]). An answer is cut after
    `limit` tokens or when the context is full. It ends before end-of-text or the ids `end`."""
    new, cut = tasks.answer(model, prompts, limit, tokenizer.eot, tokenizer.n_vocab,
                            cfg.batch_size or 32, end, cfg.num_beams, cfg.length_penalty)
    return [tokenizer.decode(ids) for ids in new], cut


def save_predictions(cfg, rows):
    """Writes out_dir/predictions.jsonl; with --init_from=MODEL predictions-MODEL.jsonl, so that the
    file of the run in out_dir is not replaced. Returns the path."""
    out_dir, model = Path(cfg.out_dir), Path(cfg.init_from).absolute().name
    name = "predictions" if cfg.init_from == "resume" else f"predictions-{model}"
    path = (out_dir.parent if out_dir.suffix == ".pt" else out_dir) / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda f: f.write("".join(
        json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")))
    return path


def run_classify(cfg, model, tokenizer, source, world):
    prompts, truth, labels = tasks.read_prompts(test_file(cfg), tokenizer, model.config.block_size)
    names = list(labels)
    began = time.perf_counter()
    if cfg.method == "likelihood":
        scores = tasks.score_labels(model, prompts, list(labels.values()), tokenizer.eot,
                                    cfg.batch_size or 32)
        predicted = answers = [names[i] for i in scores.argmax(1).tolist()]
    else:
        limit = cfg.max_new_tokens or max(map(len, labels.values())) + 1
        answers, _ = generate_answers(cfg, model, tokenizer, prompts, limit)
        predicted = [tasks.parse_label(text, names) for text in answers]
    seconds = time.perf_counter() - began
    r = tasks.classification_scores(truth, predicted, names)
    rows = [{"prompt": tokenizer.decode(ids), "label": label, "answer": text, "predicted": guess}
            for ids, label, text, guess in zip(prompts, truth, answers, predicted)]
    saved = save_predictions(cfg, rows)
    print(f"{source} on {cfg.dataset} test by {cfg.method}: accuracy {r['accuracy']:.2%}, "
          f"macro F1 {r['macro_f1']:.2%}; {len(prompts):,} prompts, {r['no_label']:,} answers were "
          f"not a label; {seconds:.1f} s, {len(prompts) / seconds:.1f} prompts per second; wrote "
          f"{saved}")
    if len(names) <= tasks.MOST_LABELS:
        print_confusion(names, r["confusion"])
    else:
        print(f"  no table of the {len(names)} labels: it has at most {tasks.MOST_LABELS} columns")


def print_confusion(names, confusion):
    """Prints a table: one row per true label, one column per answer."""
    columns = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in name)
               for name in (*names, "no label")]
    width = max(map(len, ["label", *columns])) + 2
    print("label".ljust(width) + "answered".rjust(width))
    print(" " * width + "".join(name.rjust(width) for name in columns))
    for name, counts in zip(columns, confusion):
        print(name.ljust(width) + "".join(f"{n:,}".rjust(width) for n in counts))


def run_generate(cfg, model, tokenizer, source, world):
    path, limit, end = test_file(cfg), cfg.max_new_tokens or 128, ()
    if tasks.has_chats(path):
        if cfg.num_beams is not None:
            raise UserError(f"{path} contains conversations; beam search does not stop at the "
                            "end of a turn: leave --num_beams out")
        prompts, targets, shortened = tasks.read_last_turns(
            path, tokenizer, model.config.block_size, limit)
        end = tokenizer.encode(tokenizer.chat.end)
        if shortened:
            print(f"note: {shortened:,} of {len(prompts):,} conversations were read without their "
                  "oldest turns, so that an answer fits into the context")
    else:
        prompts, targets = tasks.read_targets(path, tokenizer, model.config.block_size)
    began = time.perf_counter()
    answers, cut = generate_answers(cfg, model, tokenizer, prompts, limit, end)
    seconds = time.perf_counter() - began
    scores = list(map(tasks.answer_scores, targets, answers))
    rouge = tasks.rouge_scores(targets, answers)
    saved = save_predictions(cfg, [
        {"prompt": tokenizer.decode(ids), "target": target, "answer": text, "exact": exact,
         "f1": f1, "cut": was_cut, **more}
        for ids, target, text, (exact, f1), was_cut, more in zip(
            prompts, targets, answers, scores, cut, rouge)])
    exact, f1 = map(tasks.mean_and_error, zip(*scores))
    print(f"{source} on {cfg.dataset} test: exact match {exact[0]:.2%} (standard error "
          f"{exact[1]:.2%}), F1 of words {f1[0]:.2%} ({f1[1]:.2%}); {len(prompts):,} prompts, "
          f"{sum(cut):,} answers cut by --max_new_tokens; {seconds:.1f} s, "
          f"{len(prompts) / seconds:.1f} prompts per second; wrote {saved}")
    print_rouge(rouge)


def print_rouge(rows):
    """Prints the mean of each ROUGE score and its standard error."""
    if not rows[0]:
        print("  for ROUGE: pip install rouge-score")
        return
    means = {name: tasks.mean_and_error([row[key] for row in rows])
             for key, name in tasks.ROUGE.items()}
    print("  " + ", ".join(f"{name} {mean:.2%} (standard error {error:.2%})"
                           for name, (mean, error) in means.items()))


def run_lambada(cfg, model, tokenizer, source, world):
    if model.config.takes_pairs:
        raise UserError("--task=lambada predicts the next word of a text, which T5 cannot do; use "
                        "a GPT")
    pairs = []
    for where, fields in tasks.read_lines(Path(cfg.input), "text"):
        pair = tasks.split_last_word(fields["text"], tokenizer)
        if pair is None:
            raise UserError(f"{where}: needs at least two words, since the last is predicted "
                            "from the others; add words or remove the line")
        length = len(pair[0]) + len(pair[1])
        if length - 1 > model.config.block_size:  # the last token is only a target
            raise UserError(f"{where}: has {length} tokens, the model reads at most "
                            f"{model.config.block_size}; shorten or remove it")
        pairs.append(pair)
    losses, hits, filtered = tasks.lambada(
        model, pairs, tasks.stop_word_ids(tokenizer), cfg.batch_size or 32, world.device)
    n, accuracy = len(pairs), float(hits.float().mean())
    error = math.sqrt(accuracy * (1 - accuracy) / n)
    print(f"{source} on {cfg.input}: accuracy {accuracy:.2%} (standard error {error:.2%}), with "
          f"the stop-word filter {float(filtered.float().mean()):.2%}; perplexity "
          f"{exp(float(losses.double().mean())):.2f} per last word; {n:,} texts")


RUN = {"perplexity": run_perplexity, "classify": run_classify, "generate": run_generate,
       "lambada": run_lambada}


def main(argv: list[str]) -> None:
    cfg = configure(Config, argv)
    world = read_world(cfg.device)
    check_config(cfg, world)
    dtype = pick_dtype(cfg.dtype, world.device)
    source = pick_source(cfg.out_dir, cfg.init_from)
    if cfg.input is None:  # report missing data before the model is downloaded
        cfg.dataset = cfg.dataset or dataset_of(source)
        folder = dataset_folder(cfg.dataset)
        if cfg.task == "perplexity":
            open_tokens(folder / f"{cfg.split}.bin", 1)
    model, tokenizer = load_model(source, cfg.block_size, device=world.device, with_onnx=True)
    of_data = tokenizer if cfg.input is not None else tokenizer_of_dataset(folder)
    check_same_tokenizer(tokenizer, of_data, source, cfg.input or folder)
    chat.attach(tokenizer, tokenizer.chat or of_data.chat)
    check_dtype(model, dtype)
    model.eval()
    pack(model, world.device, dtype)
    join(world)
    check_same_fields(world, asdict(cfg) | {"device": world.device.type, "dtype": str(dtype)})
    with torch.no_grad(), autocast(world.device, dtype):
        RUN[cfg.task](cfg, model, tokenizer, source, world)


if __name__ == "__main__":
    run(main)
