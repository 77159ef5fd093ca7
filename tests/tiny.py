"""Helpers for the tests of whole runs: a small dataset of characters, the fields of a run that
takes a fraction of a second, and a checkpoint in nanoGPT's format."""
import json
import pickle
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import train
from nanotune.cli import run
from nanotune.training import logbook

torch.set_num_threads(1)  # tiny tensors gain nothing from more threads

REPO = Path(__file__).resolve().parents[1]
FIELDS = dict(
    n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=2, gradient_accumulation_steps=2,
    max_iters=6, eval_interval=3, eval_iters=2, learning_rate=1e-2, warmup_iters=0,
    dropout=0.1, device="cpu", dtype="float32")


def write_dataset(folder, n_train=2000, n_val=400, alphabet="\n abcdefghijklmnop", seed=0):
    """Write train.bin, val.bin and nanoGPT's meta.pkl; return the folder. The model can learn that
    most characters are followed by the next one of the alphabet."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.RandomState(seed)
    for split, n in (("train", n_train), ("val", n_val)):
        jumps = np.where(rng.rand(n) < 0.8, 1, rng.randint(0, len(alphabet), n))
        (jumps.cumsum() % len(alphabet)).astype("<u2").tofile(folder / f"{split}.bin")
    meta = {"vocab_size": len(alphabet), "itos": dict(enumerate(alphabet)),
            "stoi": {c: i for i, c in enumerate(alphabet)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def write_pairs(folder, n=40, split="train", longest=(24, 9), seed=0, vocab_size=61):
    """Write n pairs of texts of random ids >= 2; each text ends with id 1. Return the pairs,
    [(source, target)]."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.RandomState(seed)
    pairs = [tuple([*rng.randint(2, vocab_size, rng.randint(most)).tolist(), 1] for most in longest)
             for _ in range(n)]
    np.array([i for pair in pairs for ids in pair for i in ids], "<u2").tofile(
        folder / f"{split}.bin")
    np.array([list(map(len, pair)) for pair in pairs], "<u4").tofile(folder / f"{split}.pairs.bin")
    return pairs


def arguments(dataset, out_dir, /, **fields):
    """The command line of a tiny run. A field that is None keeps its default."""
    fields = {"dataset": dataset, "out_dir": out_dir} | FIELDS | fields
    return [f"--{name}={value}" for name, value in fields.items() if value is not None]


def run_train(dataset, out_dir, /, **fields):
    """Train in this process without drawing loss.png (half a second); return the exit status."""
    with mock.patch.object(logbook, "draw"), pytest.raises(SystemExit) as end:
        train.main(arguments(dataset, out_dir, **fields))
    return end.value.code or 0


def run_script(monkeypatch, capsys, main, argv):
    """Run a script's main() in this process as a user would: (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, argv)])
    capsys.readouterr()
    status = 0
    try:
        run(main)
    except SystemExit as end:
        status = end.code or 0
    out, err = capsys.readouterr()
    return status, out, err


def read_metrics(out_dir):
    lines = Path(out_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def losses(out_dir):
    """The entries of metrics.jsonl without times and memory: equal for a run and its repetition."""
    return [{k: v for k, v in entry.items() if k not in ("ms", "tok_s", "mfu", "memory")}
            for entry in read_metrics(out_dir)]


def nanogpt_checkpoint(bias=False, compiled=False, dataset="chars", vocab_size=18):
    """(the content of nanoGPT's ckpt.pt after 4 steps, batch 2 x 2, on one process; the names of
    its parameters in the order of the optimizer's numbers)."""
    def layer(path, *shape):
        yield f"{path}.weight", torch.randn(shape, generator=rng) * 0.2 + (len(shape) == 1)
        if bias:
            yield f"{path}.bias", torch.randn(shape[0], generator=rng) * 0.2

    rng = torch.Generator().manual_seed(0)
    T, L, C = FIELDS["block_size"], FIELDS["n_layer"], FIELDS["n_embd"]
    named = [("transformer.wte.weight", torch.randn(vocab_size, C, generator=rng) * 0.2),
             ("transformer.wpe.weight", torch.randn(T, C, generator=rng) * 0.2)]
    for i in range(L):
        for part, *shape in (("ln_1", C), ("attn.c_attn", 3 * C, C), ("attn.c_proj", C, C),
                             ("ln_2", C), ("mlp.c_fc", 4 * C, C), ("mlp.c_proj", C, 4 * C)):
            named += layer(f"transformer.h.{i}.{part}", *shape)
    params = {name: torch.nn.Parameter(p) for name, p in [*named, *layer("transformer.ln_f", C)]}
    matrices = [name for name, p in params.items() if p.dim() >= 2]
    vectors = [name for name, p in params.items() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": [params[n] for n in matrices], "weight_decay": 0.1},
         {"params": [params[n] for n in vectors], "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.95))
    for _ in range(4):
        for p in params.values():
            p.grad = torch.randn(p.shape, generator=rng)
        optimizer.step()
    state = {name: p.detach() for name, p in params.items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    prefix = "_orig_mod." if compiled else ""
    config = dict(
        out_dir="out", eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False,
        always_save_checkpoint=True, init_from="scratch", wandb_log=False, wandb_project="owt",
        wandb_run_name="gpt2", dataset=str(dataset), gradient_accumulation_steps=2, batch_size=2,
        block_size=T, n_layer=L, n_head=2, n_embd=C, dropout=0.0, bias=bias, learning_rate=6e-4,
        max_iters=600000, weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1.0, decay_lr=True,
        warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5, backend="nccl", device="cuda",
        dtype="bfloat16", compile=True)
    data = {"model": {prefix + name: p for name, p in state.items()},
            "optimizer": optimizer.state_dict(),
            "model_args": dict(n_layer=L, n_head=2, n_embd=C, block_size=T, bias=bias,
                               vocab_size=vocab_size, dropout=0.0),
            "iter_num": 4, "best_val_loss": torch.tensor(2.5), "config": config}
    return data, matrices + vectors
