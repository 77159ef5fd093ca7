"""DDP and FSDP2 compute the same as one process, also if resumed on more or fewer processes."""
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import write_tokenizer
from ranks import Job, run_ranks
from tiny import arguments, losses, write_dataset

import evaluate
import train
from configurator import configure
from nanotune import cli, files
from nanotune.errors import UserError
from nanotune.formats import checkpoint
from nanotune.text import loader
from nanotune.text.tokenizer import tokenizer_of_dataset
from nanotune.training import distributed, run

FIELDS = dict(dropout=0.0, gradient_accumulation_steps=4, max_iters=6,
              eval_iters=0, keep_states=1)


@pytest.fixture(scope="module")
def make(dataset, tmp_path_factory):
    """make(name, size, **fields) trains on `size` ranks without an error; returns the out_dir."""
    def train_on(name, size, seconds=120, **fields):
        out = tmp_path_factory.getbasetemp() / "parallel" / name
        argv = arguments(dataset, out, **FIELDS | fields)
        statuses, output = run_ranks(size, argv, out.with_suffix(f".log{size}"), seconds=seconds)
        assert statuses == [0] * size, output
        return out
    return train_on


@pytest.fixture(scope="module")
def one(make):
    """The out_dir of the reference run, on one process."""
    return make("one", 1)


def assert_same_curve(a, b, atol=1e-4):
    """Compare all logged losses and evaluations."""
    ours, theirs = losses(a), losses(b)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs):
        assert one == pytest.approx(other, abs=atol)


def assert_same_state(a, b, atol=0.0):
    """Compare keys, types, dtypes, shapes and numbers: all runs write the same format."""
    a, b = (files.load(folder / checkpoint.STATE_FILE) for folder in (a, b))
    assert a.keys() == b.keys()
    assert type(a["model"]) is type(b["model"])
    assert list(a["model"]) == list(b["model"])
    assert list(a["optimizer"]) == list(b["optimizer"])
    tensors = [(a["model"][name], b["model"][name]) for name in a["model"]]
    for name, moments in a["optimizer"].items():
        assert moments.keys() == b["optimizer"][name].keys()
        tensors += [(moments[key], b["optimizer"][name][key]) for key in moments]
    for ours, theirs in tensors:
        assert type(ours) is type(theirs) is torch.Tensor
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    # the tied head and the embedding share their data
    assert len({t.data_ptr() for t in a["model"].values()}) == len(a["model"]) - 1


@pytest.mark.parametrize("size, parallel, batch_size, steps", [
    (1, "ddp", 1, 8), (1, "ddp", 8, 1), (2, "ddp", 2, 4), (2, "fsdp", 1, 8), (4, "fsdp", 2, 4),
    pytest.param(2, "fsdp", 2, 4, marks=pytest.mark.slow),
    pytest.param(4, "ddp", 2, 4, marks=pytest.mark.slow),
    pytest.param(4, "ddp", 1, 8, marks=pytest.mark.slow),
    pytest.param(3, "fsdp", 1, 9, marks=pytest.mark.slow),
])
def test_any_split_among_processes_and_micro_steps_gives_the_same_run(make, one, size, parallel,
                                                                      batch_size, steps):
    name = f"{parallel}-{size}-{batch_size}x{steps}"
    out = make(name, size, parallel=parallel, batch_size=batch_size,
               gradient_accumulation_steps=steps)
    if batch_size * steps != 8:  # three processes do not divide eight samples
        one = make("one-of-9", 1, batch_size=batch_size, gradient_accumulation_steps=steps)
    assert_same_curve(out, one)
    assert_same_state(out, one, atol=1e-4)


@pytest.mark.parametrize("first, then", [
    ((2, "fsdp"), (1, "ddp")),
    pytest.param((1, "ddp"), (2, "fsdp"), marks=pytest.mark.slow),
    pytest.param((2, "ddp"), (4, "fsdp"), marks=pytest.mark.slow),
    pytest.param((4, "fsdp"), (2, "ddp"), marks=pytest.mark.slow),
], ids=lambda side: f"{side[1]} on {side[0]}")
def test_a_run_can_be_resumed_on_more_or_fewer_processes(make, one, first, then):
    name = f"{first[1]}{first[0]}-then-{then[1]}{then[0]}"
    make(name, first[0], parallel=first[1], max_iters=3, lr_decay_iters=6)
    out = make(name, then[0], parallel=then[1], init_from="resume", lr_decay_iters=6)
    assert_same_curve(out, one)
    assert_same_state(out, one, atol=1e-4)


@pytest.mark.parametrize("size, parallel, dtype", [
    (2, "fsdp", "float32"),
    *(pytest.param(*cell, marks=pytest.mark.slow) for cell in (
        (2, "ddp", "float32"), (1, "ddp", "bfloat16"), (2, "ddp", "bfloat16"),
        (2, "fsdp", "bfloat16"), (1, "ddp", "float16"), (2, "ddp", "float16")))])
def test_a_resume_on_the_same_processes_is_bitwise_exact(make, size, parallel, dtype):
    """With dropout, in each dtype."""
    fields = dict(parallel=parallel, dtype=dtype, dropout=0.1, lr_decay_iters=6)
    name = f"{parallel}-{size}-{dtype}"
    whole = make(f"{name}-whole", size, **fields)
    make(f"{name}-parts", size, **fields, max_iters=2)
    parts = make(f"{name}-parts", size, **fields, init_from="resume")
    assert_same_state(whole, parts)


@pytest.mark.slow
def test_a_sharded_state_of_step_0_resumes_bitwise(make):
    """The state has no moments yet, and reading it must not create any."""
    fields = dict(parallel="fsdp", lr_decay_iters=6)
    whole = make("fsdp-from-0", 2, **fields)
    make("fsdp-at-0", 2, **fields, max_iters=0)
    parts = make("fsdp-at-0", 2, **fields, init_from="resume")
    assert_same_state(whole, parts)


def print_bytes(rank):
    """After each step, each rank prints the bytes of its weights, gradients and moments."""
    def update(r, *args):
        grads = [p.grad for p in r.model.parameters()]
        skipped = original(r, *args)
        tensors = [*r.model.parameters(), *grads,
                   *(t for state in r.optimizer.state.values() for t in state.values())]
        local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
        print("bytes:", sum(t.nbytes for t in local), "of", sum(t.nbytes for t in tensors),
              flush=True)
        return skipped

    original, train.update = train.update, update


@pytest.mark.parametrize("fields", [
    dict(n_embd=32), pytest.param(dict(n_layer=12, n_head=12, n_embd=768), marks=pytest.mark.slow)],
    ids=["tiny", "gpt2"])
def test_fsdp_shares_the_state_out_evenly(tmp_path, dataset, fields):
    """Each of two ranks has 45 to 55 % of the bytes: odd sizes do not halve, and step counts are
    not sharded."""
    argv = arguments(dataset, tmp_path / "out", **FIELDS | dict(
        parallel="fsdp", max_iters=1) | fields)
    statuses, output = run_ranks(2, argv, tmp_path / "log", print_bytes, seconds=250)
    assert statuses == [0, 0], output
    lines = [line for line in output.splitlines() if line.startswith(("fsdp:", "bytes:"))]
    print("", *lines, sep="\n")
    counts = [line.split() for line in lines if line.startswith("bytes:")]
    assert len(counts) == 2
    for _, local, _, whole in counts:
        assert 0.45 < int(local) / int(whole) < 0.55


@pytest.mark.slow
def test_fsdp_in_bfloat16_has_the_losses_of_ddp(make):
    """Layers compute in bfloat16; the weights on disk are float32."""
    fields = dict(dtype="bfloat16", learning_rate=1e-3)
    ddp, fsdp = (make(f"bf16-{p}", 2, parallel=p, **fields) for p in ("ddp", "fsdp"))
    assert_same_curve(ddp, fsdp, atol=0.002)
    state = files.load(fsdp / checkpoint.STATE_FILE)
    assert {t.dtype for t in state["model"].values()} == {torch.float32}


def test_a_run_with_fsdp_draws_samples_and_keeps_the_best_model(make):
    out = make("fsdp-samples", 2, parallel="fsdp", sample_interval=1, always_save_checkpoint=False,
               save_interval=2)
    output = (out.with_suffix(".log2") / "rank0.log").read_text()
    assert output.count("--- sample ---") == 3
    best = files.load(out / checkpoint.MODEL_FILE)
    assert math.isfinite(best["best_val_loss"])
    model, _ = checkpoint.load_model(str(out))  # as sample.py and evaluate.py do
    assert model.num_params() == sum(t.numel() for t in best["model"].values()) - (
        best["model"]["lm_head.weight"].numel())


@pytest.mark.slow
@pytest.mark.timeout(900)  # compiling on a CPU takes a minute or two
@pytest.mark.parametrize("size, fields, plain, atol", [
    (2, dict(parallel="fsdp", recompute=True), dict(parallel="fsdp"), 0),
    (2, dict(recompute=True), {}, 0),
    (2, dict(dtype="float16"), {}, 1e-2),
    (1, dict(compile=True), {}, 1e-3),
    (2, dict(compile=True), {}, 1e-3),
    (2, dict(parallel="fsdp", compile=True), dict(parallel="fsdp"), 1e-3),
    (1, dict(compile=True, recompute=True), {}, 1e-3),
    (1, dict(compile=True, dtype="bfloat16", weights="bfloat16"),
     dict(dtype="bfloat16", weights="bfloat16"), 0.02),
    (1, dict(compile=True, recompute=True, optimizer="adamw8bit"), dict(optimizer="adamw8bit"),
     1e-3)])
def test_options_that_work_together_change_no_loss(make, size, fields, plain, atol):
    """Combinations that no other test covers, compared with a run without the options."""
    few = dict(n_layer=1, max_iters=3)
    name = "-".join([str(size), *(f"{name}={value}" for name, value in fields.items())])
    out = make(name, size, seconds=600, **few, **fields)
    output = out.with_suffix(f".log{size}").joinpath("rank0.log").read_text()
    assert ("compiled" in output) == ("compile" in fields)
    assert_same_curve(out, make(f"{name}-plain", size, **few, **plain), atol=atol)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_compiled_run_with_adapters_has_the_losses_of_an_eager_one(make, one):
    fields = dict(init_from=one, lora_rank=2, n_layer=None, max_iters=3)
    compiled = make("lora-compiled", 1, seconds=600, compile=True, **fields)
    assert "compiled" in (compiled.with_suffix(".log1") / "rank0.log").read_text()
    assert_same_curve(compiled, make("lora", 1, **fields), atol=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size, fields", [(1, dict(compile=True)), (2, dict(parallel="fsdp")),
                                          (2, {})], ids=["compile", "fsdp", "ddp"])
def test_separate_documents_work_with_compile_fsdp_and_ddp(make, tmp_path, size, fields):
    """A tenth of the tokens end a document."""
    words = write_dataset(tmp_path / "words")
    (words / "meta.pkl").unlink()
    write_tokenizer(words, "json")
    eot = tokenizer_of_dataset(words).eot
    for split in ("train", "val"):
        ids = np.fromfile(words / f"{split}.bin", "<u2")
        ids[::10] = eot
        ids.tofile(words / f"{split}.bin")
    few = dict(dataset=words, separate_documents=True, max_iters=3)
    name = "documents-" + "-".join([str(size), *fields])
    out = make(name, size, seconds=600, **few, **fields)
    assert_same_curve(out, make(f"{name}-plain", 1, **few), atol=1e-3)


# -----------------------------------------------------------------------------
# refused input

def test_untested_pairs_of_options_are_refused():
    def world(size):
        return distributed.World(0, size, torch.device("cpu"))

    cfg = train.Config(parallel="fsdp", gradient_accumulation_steps=2)
    with pytest.raises(UserError, match=r"parallel=fsdp and dtype=float16 .*--dtype=bfloat16"):
        run.check_config(cfg, world(2), torch.float16)
    run.check_config(cfg, world(1), torch.float16)  # fsdp has no effect on one process
    run.check_config(cfg, world(2), torch.bfloat16)
    mps = distributed.World(0, 2, torch.device("mps"))
    with pytest.raises(UserError, match="device=mps and processes=many"):
        run.check_config(cfg, mps, torch.float32)
    with pytest.raises(UserError, match="--parallel=zero3 is not supported; use ddp or fsdp"):
        configure(train.Config, ["--parallel=zero3"])


def other_fields(rank, argv):
    """Rank 1 gets further arguments, as if another command was typed on its machine. Rank 1
    does not wait for rank 0 to print first."""
    if rank == 1:
        cli.time.sleep = lambda seconds: None
        for script in (run, evaluate):
            script.configure = lambda cls, first: configure(cls, [*first, *argv])


@pytest.mark.parametrize("field, message", [
    ("--learning_rate=0.5", "--learning_rate is 0.01 in process 0 and 0.5 in process 1"),
    ("--dtype=bfloat16", "--dtype is torch.float32 in process 0 and torch.bfloat16 in process 1"),
    ("--eval_only=True", "--eval_only is False in process 0 and True in process 1")])
def test_ranks_with_different_options_are_refused(tmp_path, dataset, field, message):
    argv = arguments(dataset, tmp_path / "out", **FIELDS)
    statuses, output = run_ranks(2, argv, tmp_path / "log", partial(other_fields, argv=[field]))
    assert statuses == [1, 1] and output.count(message) == 2 and "Traceback" not in output, output
    assert not (tmp_path / "out/run.json").exists()


def test_ranks_that_evaluate_with_different_options_are_refused(tmp_path, dataset, one):
    argv = [f"--out_dir={one}", f"--dataset={dataset}", "--device=cpu"]
    job = Job(2, argv, tmp_path, partial(other_fields, argv=["--split=train"]), script="evaluate")
    assert job.wait() == [1, 1]
    assert job.output().count("--split is val in process 0 and train in process 1") == 2


def test_options_without_effect_on_the_result_may_differ(tmp_path, dataset):
    argv = arguments(dataset, tmp_path / "out", **FIELDS | dict(max_iters=1))
    fields = ["--wandb_run_name=12:00", f"--out_dir={tmp_path / 'other'}", "--log_interval=7"]
    statuses, output = run_ranks(2, argv, tmp_path / "log", partial(other_fields, argv=fields))
    assert statuses == [0, 0], output


def other_data(rank):
    """Rank 1's machine has another version of the data."""
    if rank == 1:
        loader.TokenBin.fingerprint = (2000, 1)


def test_machines_with_different_data_are_refused(tmp_path, dataset):
    argv = arguments(dataset, tmp_path / "out", **FIELDS)
    statuses, output = run_ranks(2, argv, tmp_path / "log", other_data)
    assert 0 not in statuses
    assert "train.bin of process 1 differs from that of process 0: copy the folder" in output
