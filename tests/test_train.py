"""train.py: the learning rate, a step, the loop, non-finite numbers, files, each bad input."""
import json
import math
import os
import re
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import (
    arguments,
    losses,
    nanogpt_checkpoint,
    read_metrics,
    run_script,
    run_train,
    write_dataset,
)
from torch.nn import functional as F

import train
from configurator import configure
from nanotune import files
from nanotune.errors import NonFiniteLoss, UserError
from nanotune.formats import checkpoint
from nanotune.text.loader import TokenBin
from nanotune.training import logbook
from train import Config, learning_rate_at


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "chars")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def set_up(dataset, out, **fields):
    argv = arguments(dataset, out, **fields)
    cfg = configure(Config, argv)
    return train.set_up(cfg, argv, train.check(cfg))


def weights_of(path):
    return files.load(path)["model"]


def assert_same_weights(a, b, atol=0.0):
    a, b = weights_of(a), weights_of(b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=name)


def evaluations(out):
    return [entry["step"] for entry in read_metrics(out) if "step" in entry]


# -----------------------------------------------------------------------------
# the learning rate

def test_warmup_is_linear_and_never_zero():
    cfg = Config(learning_rate=1.0, warmup_iters=4, max_iters=100)
    assert [learning_rate_at(cfg, s) for s in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_cosine_falls_from_the_highest_rate_to_min_lr():
    cfg = Config(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=30, max_iters=50)
    assert learning_rate_at(cfg, 10) == 1.0
    assert learning_rate_at(cfg, 15) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate_at(cfg, 20) == pytest.approx(0.55)
    assert learning_rate_at(cfg, 30) == pytest.approx(0.1)
    assert learning_rate_at(cfg, 49) == pytest.approx(0.1)


def test_the_rate_falls_by_default_to_a_tenth_at_max_iters():
    cfg = Config(learning_rate=3.0, warmup_iters=0, max_iters=20)
    assert learning_rate_at(cfg, 0) == 3.0
    assert learning_rate_at(cfg, 20) == pytest.approx(0.3)
    cfg.min_lr = 0.0
    assert learning_rate_at(cfg, 20) == 0.0


def test_a_constant_rate_has_no_warmup():
    cfg = Config(learning_rate=3e-5, decay_lr=False, warmup_iters=100, max_iters=20)
    assert {learning_rate_at(cfg, s) for s in range(25)} == {3e-5}


COUNT = st.integers(0, 12)


@given(COUNT, COUNT, COUNT, st.sampled_from([None, 0.0, 0.3, 1.0]))
def test_the_rate_rises_then_falls_for_any_warmup_decay_and_max_iters(warmup, decay, iters, min_lr):
    cfg = Config(learning_rate=1.0, min_lr=min_lr, warmup_iters=warmup, lr_decay_iters=decay,
                 max_iters=iters)
    rates = [learning_rate_at(cfg, s) for s in range(15)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


# -----------------------------------------------------------------------------
# a step

@pytest.mark.parametrize("masked", [False, True])
def test_one_batch_of_eight_equals_eight_micro_batches_of_one(tmp_path, dataset, masked):
    if masked:  # long parts have no target: micro-batches have unequal numbers of targets
        keep = np.repeat(np.random.RandomState(0).rand(50) < 0.4, 40)
        keep.astype(np.uint8).tofile(dataset / "train.mask.bin")
    shapes = ((8, 1), (1, 8), (2, 4))
    for batch_size, micro_steps in shapes:
        run_train(dataset, tmp_path / f"out{batch_size}", batch_size=batch_size,
                  gradient_accumulation_steps=micro_steps, dropout=0.0, eval_iters=0,
                  learning_rate=1e-3)
    whole = losses(tmp_path / "out8")
    assert len(whole) == 9
    for batch_size, _ in shapes[1:]:
        for one, other in zip(whole, losses(tmp_path / f"out{batch_size}")):
            assert one == pytest.approx(other, abs=1e-4)
        assert_same_weights(tmp_path / "out8" / "ckpt.pt", tmp_path / f"out{batch_size}/ckpt.pt",
                            atol=1e-4)


def test_the_logged_loss_is_the_mean_over_targets_that_count(dataset, out):
    np.random.RandomState(0).randint(0, 2, 2000).astype(np.uint8).tofile(
        dataset / "train.mask.bin")
    fields = dict(batch_size=3, gradient_accumulation_steps=4, dropout=0.0)
    r = set_up(dataset, out, **fields)
    x, y = TokenBin(dataset / "train.bin", 16, 18, seed=1337).batch(0, 12)
    with torch.no_grad():
        expected = F.cross_entropy(r.model.logits(x).flatten(0, 1), y.flatten(), ignore_index=-1)
    run_train(dataset, out, max_iters=1, **fields)
    first = next(entry for entry in read_metrics(out) if "iter" in entry)
    assert first["loss"] == pytest.approx(expected.item(), abs=1e-5)


def test_a_step_equals_one_of_adamw_on_the_mean_loss(dataset, out):
    """The loop in plain torch has clipping, weight decay on matrices only, and scheduled rates."""
    fields = dict(dropout=0.0, max_iters=3, grad_clip=0.5, warmup_iters=1, weight_decay=0.5,
                  bias=True)
    model = set_up(dataset, out, **fields).model
    data = TokenBin(dataset / "train.bin", 16, 18, seed=1337)
    decayed = [p for name, p in model.named_parameters() if p.dim() == 2]
    other = [p for name, p in model.named_parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.5},
                                   {"params": other, "weight_decay": 0.0}], betas=(0.9, 0.95))
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = (5e-3, 1e-2, 5.5e-3)[step]
        x, y = data.batch(4 * step, 4)
        optimizer.zero_grad()
        F.cross_entropy(model.logits(x).flatten(0, 1), y.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    run_train(dataset, out, **fields)
    ours = weights_of(out / "ckpt.pt")
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.detach(), rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("bias", [False, True])
def test_each_parameter_is_in_one_group_and_only_matrices_decay(dataset, out, bias):
    r = set_up(dataset, out, bias=bias, weight_decay=0.3)
    placed = [p for group in r.optimizer.param_groups for p in group["params"]]
    assert len(placed) == len({id(p) for p in placed})
    assert {id(p) for p in placed} == {id(p) for p in r.model.parameters() if p.requires_grad}
    for group in r.optimizer.param_groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.3 if p.dim() >= 2 else 0.0)


def test_dropout_depends_only_on_seed_and_step(dataset, out):
    np.zeros(2000, dtype="<u2").tofile(dataset / "train.bin")  # all batches are equal
    r = set_up(dataset, out, dropout=0.5)
    values = []
    for step in (0, 0, 1):
        torch.rand(3)  # earlier draws have no effect
        r.optimizer.zero_grad()
        values.append(float(train.forward_backward(r, step)))
    assert values[0] == values[1] != values[2]


# -----------------------------------------------------------------------------
# the loop

@pytest.mark.parametrize("max_iters, at", [(0, [0]), (1, [0, 1]), (6, [0, 3, 6]),
                                           (7, [0, 3, 6, 7])])
def test_a_run_takes_max_iters_steps_and_saves_at_each_evaluation(dataset, out, monkeypatch,
                                                                  max_iters, at):
    saves = []
    real = files.save
    monkeypatch.setattr(files, "save", lambda path, data, keep: (
        saves.append((path.name, data["iter_num"])), real(path, data, keep)))
    assert run_train(dataset, out, max_iters=max_iters) == 0
    assert evaluations(out) == at
    assert [entry["iter"] for entry in read_metrics(out) if "iter" in entry] == [*range(max_iters)]
    assert saves == [(name, step) for step in at for name in ("ckpt.pt", "state.pt")]
    state = files.load(out / "state.pt")
    assert state["iter_num"] == max_iters
    assert all(s["step"] == max_iters for s in state["optimizer"].values())


def test_steps_are_logged_every_log_interval(dataset, out):
    run_train(dataset, out, log_interval=4)
    assert [entry["iter"] for entry in read_metrics(out) if "iter" in entry] == [0, 4]


def test_training_lowers_the_loss(dataset, out):
    run_train(dataset, out, max_iters=100, eval_interval=100, eval_iters=0, batch_size=8)
    first, last = (entry["val_loss"] for entry in read_metrics(out) if "step" in entry)
    assert first == pytest.approx(math.log(18), abs=0.1)
    # the entropy of the text is 1.07 nats: one next token has the probability 0.8 + 0.2 / 18, each
    # other 0.2 / 18
    assert 1.0 < last < 1.4


@pytest.mark.parametrize("eval_iters, expected", [(0, [12, 12]), (3, [3, 3]), (100, [100, 12])])
def test_eval_iters_0_reads_all_of_val_and_as_many_windows_of_train(
        tmp_path, out, monkeypatch, eval_iters, expected):
    """The windows are evenly spaced. A split that has fewer windows is read whole."""
    read = []
    monkeypatch.setattr(train, "evaluate_loss", lambda model, data, windows, *_: read.append(
        (windows, data.windows())) or 1.0)
    dataset = write_dataset(tmp_path / "words", n_train=2000, n_val=190)
    run_train(dataset, out, max_iters=0, block_size=16, eval_iters=eval_iters)
    assert [len(windows) for windows, _ in read] == expected
    (windows, _), (val_windows, whole_val) = read
    assert eval_iters or val_windows == whole_val
    assert (windows[0], windows[-1][0] > 1900) == ((0, 0), True)


def test_eval_only_writes_nothing(tmp_path, dataset, out, capsys):
    train.main(arguments(dataset, out, eval_only=True))
    printed = capsys.readouterr().out
    assert not out.exists()
    run_train(dataset, out, max_iters=0)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("step 0"))
    assert line in printed
    before = {f: f.read_bytes() for f in out.iterdir()}
    train.main(arguments(dataset, out, eval_only=True, init_from=out))
    assert line in capsys.readouterr().out
    assert {f: f.read_bytes() for f in out.iterdir()} == before


def script_losses(monkeypatch, pairs):
    """Make successive evaluations give these (train, val) losses."""
    pairs = iter(pairs)
    monkeypatch.setattr(train, "evaluate_splits", lambda r: list(next(pairs)))


def test_patience_stops_a_run_and_the_best_checkpoint_is_kept(dataset, out, monkeypatch, capsys):
    script_losses(monkeypatch, [(3, 3), (2.5, 2), (2.4, 2.2), (2.3, 2.1), (2.2, 2.3)])
    assert run_train(dataset, out, max_iters=100, patience=3, always_save_checkpoint=False) == 0
    assert evaluations(out) == [0, 3, 6, 9, 12]
    assert "stopped early" in capsys.readouterr().out
    best = files.load(out / "ckpt.pt")
    assert (best["iter_num"], best["best_val_loss"]) == (3, 2)
    assert files.load(out / "state.pt")["iter_num"] == 12


def test_a_better_evaluation_resets_the_count_of_patience(dataset, out, monkeypatch):
    script_losses(monkeypatch, [(3, 3), (3, 3.1), (3, 2.9), (3, 3), (3, 3), (3, 1)])
    run_train(dataset, out, max_iters=100, patience=2)
    assert evaluations(out) == [0, 3, 6, 9, 12]


def test_always_save_checkpoint_keeps_the_latest(dataset, out, monkeypatch):
    script_losses(monkeypatch, [(3, 3), (2, 2), (3, 3)])
    run_train(dataset, out)
    latest = files.load(out / "ckpt.pt")
    assert (latest["iter_num"], latest["best_val_loss"]) == (6, 2)


@pytest.mark.parametrize("pairs", [
    [(3, 3), (2.5, 2), (2.4, 2.2), (2.3, 2.3)],
    [(3, 3), (2.5, 2), (2.6, 2.2), (2.3, 2.3)],  # at first the loss rises on both splits
])
def test_overfitting_gives_one_warning_with_the_best_step(dataset, out, monkeypatch, capsys, pairs):
    script_losses(monkeypatch, pairs)
    run_train(dataset, out, max_iters=9)
    warnings = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning")]
    assert len(warnings) == 1
    assert "overfitting" in warnings[0] and "2.0000 at step 3" in warnings[0]


@pytest.mark.parametrize("pairs", [
    [(3, 3), (2.5, 2), (2.7, 2.2), (2.8, 2.3)],  # both splits rise
    [(3, 3), (2.5, 2), (2.4, 2.001), (2.3, 2.019)],  # validation rises by less than 1 %
])
def test_a_loss_that_rises_little_or_on_both_splits_is_not_overfitting(
        dataset, out, monkeypatch, capsys, pairs):
    script_losses(monkeypatch, pairs)
    run_train(dataset, out, max_iters=9)
    assert "overfitting" not in capsys.readouterr().out


def test_a_run_without_any_improvement_says_so(dataset, out, monkeypatch, capsys):
    script_losses(monkeypatch, [(3, 3), (3.1, 3.1), (3.2, 3.2)])
    run_train(dataset, out)
    assert "no evaluation was better than the one at step 0" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# numbers that are not finite

def replace_at(monkeypatch, steps, loss=None, grad=None):
    """At these steps, replace the loss, or one number of the gradient."""
    real = train.forward_backward

    def forward_backward(r, step):
        total = real(r, step)
        if step in steps and grad is not None:
            r.model.transformer.wpe.weight.grad[0, 0] = grad
        return torch.tensor(loss) if step in steps and loss is not None else total

    monkeypatch.setattr(train, "forward_backward", forward_backward)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The out_dir of a run without errors."""
    folder = tmp_path_factory.mktemp("good")
    run_train(write_dataset(folder / "chars"), folder / "out")
    return folder / "out"


@pytest.mark.parametrize("what", [{"loss": math.nan}, {"loss": math.inf}, {"grad": math.nan},
                                  {"grad": math.inf}])
def test_a_step_that_is_not_finite_stops_the_run(good, dataset, out, monkeypatch, capsys, what):
    with monkeypatch.context() as patch:
        replace_at(patch, [4], **what)
        status, _, err = run_script(patch, capsys, train.main, arguments(dataset, out))
    assert status == 1
    assert err.count("\n") == 1 and err.startswith("error: step 4: the ")
    assert ("loss is" if "loss" in what else "gradient norm is") in err
    assert "--learning_rate" in err
    for name in ("ckpt.pt", "state.pt"):
        assert files.load(out / name)["iter_num"] == 3
    # the files are good: a resume gives the weights of a run without the error
    assert run_train(dataset, out, init_from="resume") == 0
    assert_same_weights(out / "state.pt", good / "state.pt")


def test_the_optimizer_does_not_step_on_a_gradient_that_is_not_finite(dataset, out):
    r = set_up(dataset, out)
    loss = float(train.forward_backward(r, 0))
    r.model.transformer.ln_f.weight.grad[0] = math.inf
    before = {name: p.clone() for name, p in r.model.state_dict().items()}
    norm, value = train.gradient_norm(r)
    assert value == math.inf
    with pytest.raises(NonFiniteLoss, match="gradient norm is not finite"):
        train.update(r, loss, norm, False, 0, 0)
    assert all(torch.equal(p, before[name]) for name, p in r.model.state_dict().items())
    assert not r.optimizer.state


def test_a_learning_rate_that_is_far_too_high_is_a_one_line_error(dataset, out, monkeypatch,
                                                                  capsys):
    argv = arguments(dataset, out, learning_rate=1e30, grad_clip=0.0)
    status, _, err = run_script(monkeypatch, capsys, train.main, argv)
    assert status == 1
    assert err.startswith("error: step 1: the ") and err.count("\n") == 1
    assert files.load(out / "state.pt")["iter_num"] == 0


def test_a_validation_loss_that_is_not_finite_saves_nothing(dataset, out, monkeypatch, capsys):
    script_losses(monkeypatch, [(3, 3), (2, math.nan)])
    status, _, err = run_script(monkeypatch, capsys, train.main, arguments(dataset, out))
    assert status == 1
    assert "step 3: the validation loss is nan" in err and err.count("\n") == 1
    for name in ("ckpt.pt", "state.pt"):
        assert files.load(out / name)["iter_num"] == 0


def test_fp16_steps_that_the_scaler_skips_are_counted(dataset, out, monkeypatch, capsys):
    replace_at(monkeypatch, [1, 2, 4], grad=math.inf)
    assert run_train(dataset, out, dtype="float16") == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("iter")]
    assert [x.rpartition("mfu")[2].partition(", ")[2] for x in lines] == [
        "", "1 steps skipped by the scaler", "2 steps skipped by the scaler",
        "2 steps skipped by the scaler", "3 steps skipped by the scaler",
        "3 steps skipped by the scaler"]
    state = files.load(out / "state.pt")
    assert state["progress"]["skipped"] == 3
    assert state["scaler"]["scale"] == 2.0**16 / 2**3
    assert all(s["step"] == 3 for s in state["optimizer"].values())
    # a resumed run continues with the scale and the count
    run_train(dataset, out, dtype="float16", init_from="resume", max_iters=7)
    state = files.load(out / "state.pt")
    assert (state["progress"]["skipped"], state["scaler"]["scale"]) == (3, 2.0**13)


def test_ten_skipped_steps_in_a_row_stop_the_run(dataset, out, monkeypatch, capsys):
    replace_at(monkeypatch, [0, *range(2, 40)], grad=math.inf)
    status, printed, err = run_script(monkeypatch, capsys, train.main, arguments(
        dataset, out, dtype="float16", max_iters=50, eval_interval=50))
    assert status == 1
    assert err.startswith("error: step 11: the fp16 scaler skipped 10 steps in a row")
    assert err.count("\n") == 1
    assert "iter 10:" in printed
    assert files.load(out / "state.pt")["iter_num"] == 0


def test_fp16_has_the_losses_of_float32(tmp_path, dataset):
    for dtype in ("float32", "float16"):
        run_train(dataset, tmp_path / dtype, dtype=dtype, dropout=0.0)
    for one, other in zip(losses(tmp_path / "float32"), losses(tmp_path / "float16")):
        assert one == pytest.approx(other, abs=1e-2)


# -----------------------------------------------------------------------------
# compile

def test_a_compile_failure_falls_back_with_one_warning(tmp_path, dataset, monkeypatch, capsys):
    run_train(dataset, tmp_path / "eager")
    capsys.readouterr()

    def broken(call, **_):
        def fail(*args, **kwargs):
            raise RuntimeError("no C++ compiler\nand a page of its output")
        return fail

    monkeypatch.setattr(torch, "compile", broken)
    assert run_train(dataset, tmp_path / "fallen", compile=True) == 0
    printed, err = capsys.readouterr()
    assert err.splitlines() == ["warning: torch.compile failed (no C++ compiler); "
                                "continuing without it: slower, same results; --compile=False "
                                "turns off this warning"]
    assert "compiled" not in printed
    assert losses(tmp_path / "fallen") == losses(tmp_path / "eager")


def test_a_compiled_run_says_so_and_saves_plain_names(dataset, out, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda call, **_: (
        lambda *args, **kwargs: (calls.append(1), call(*args, **kwargs))[1]))
    assert run_train(dataset, out, compile=True) == 0
    assert "compiled" in capsys.readouterr().out
    assert len(calls) > 12
    names = weights_of(out / "ckpt.pt").keys()
    assert all(name.startswith(("transformer.", "lm_head.")) for name in names)


# -----------------------------------------------------------------------------
# init_from

def hf_folder(folder, dataset):
    """A GPT-2 of the dataset's characters as a Hugging Face folder; returns its tensors."""
    from safetensors.torch import save_file
    C, tensors = 16, {}
    rng = torch.Generator().manual_seed(3)
    shapes = {"wte.weight": (18, C), "wpe.weight": (32, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for part, *shape in (("ln_1", C), ("attn.c_attn", C, 3 * C), ("attn.c_proj", C, C),
                         ("ln_2", C), ("mlp.c_fc", C, 4 * C), ("mlp.c_proj", 4 * C, C)):
        shapes |= {f"h.0.{part}.weight": tuple(shape), f"h.0.{part}.bias": (shape[-1],)}
    for name, shape in shapes.items():
        tensors[f"transformer.{name}"] = torch.randn(shape, generator=rng) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1, "n_head": 2,
        "n_embd": C, "n_positions": 32, "vocab_size": 18, "activation_function": "gelu_new"}))
    (folder / "meta.pkl").write_bytes((dataset / "meta.pkl").read_bytes())
    return tensors


def test_a_pretrained_model_takes_block_size_and_dropout(tmp_path, dataset, out):
    tensors = hf_folder(tmp_path / "hf", dataset)
    r = set_up(dataset, out, init_from=tmp_path / "hf", dropout=0.3, block_size=8, n_layer=7)
    assert torch.equal(r.model.transformer.wpe.weight, tensors["transformer.wpe.weight"][:8])
    assert torch.equal(r.model.transformer.h[0].mlp.c_fc.weight,
                       tensors["transformer.h.0.mlp.c_fc.weight"].T)
    assert r.data["train"].block_size == r.model.config.block_size == 8
    assert (r.model.config.n_layer, r.model.config.dropout) == (1, 0.3)
    x, y = r.data["train"].batch(0, 2)
    assert r.model.train()(x, y) != r.model(x, y)  # dropout is on
    assert r.model.eval()(x, y) == r.model(x, y)
    assert set_up(dataset, out, init_from=tmp_path / "hf",
                  block_size=None).model.config.block_size == 32


def test_a_pretrained_model_finetunes(tmp_path, dataset, out):
    hf_folder(tmp_path / "hf", dataset)
    assert run_train(dataset, out, init_from=tmp_path / "hf") == 0
    assert files.load(out / "ckpt.pt")["model_args"]["n_layer"] == 1
    assert checkpoint.load_model(str(out))[1].encode("ab") == [2, 3]


def test_a_new_run_can_start_from_the_weights_of_another_run(tmp_path, dataset, out):
    run_train(dataset, tmp_path / "first")
    r = set_up(dataset, out, init_from=tmp_path / "first", block_size=8)
    first = weights_of(tmp_path / "first" / "ckpt.pt")
    assert torch.equal(r.model.lm_head.weight, first["lm_head.weight"])
    assert torch.equal(r.model.transformer.wpe.weight, first["transformer.wpe.weight"][:8])
    assert r.progress.step == 0 and not r.optimizer.state
    before = (tmp_path / "first" / "ckpt.pt").read_bytes()
    run_train(dataset, out, init_from=tmp_path / "first", max_iters=3)
    assert evaluations(out) == [0, 3]
    assert (tmp_path / "first" / "ckpt.pt").read_bytes() == before


def test_a_new_run_can_start_from_the_weights_of_nanogpt(tmp_path, dataset, out):
    (tmp_path / "theirs").mkdir()
    stored, _ = nanogpt_checkpoint(bias=True, compiled=True, dataset=dataset)
    torch.save(stored, tmp_path / "theirs" / "ckpt.pt")
    r = set_up(dataset, out, init_from=tmp_path / "theirs", dropout=0.2)
    assert r.model.config.activation == "gelu" and r.model.config.dropout == 0.2
    assert run_train(dataset, out, init_from=tmp_path / "theirs", max_iters=1) == 0
    assert files.load(out / "ckpt.pt")["model_args"]["activation"] == "gelu"


def test_block_size_from_scratch_is_1024_by_default(tmp_path, out):
    dataset = write_dataset(tmp_path / "long", n_train=4000, n_val=1100)
    assert set_up(dataset, out, block_size=None).model.config.block_size == 1024
    assert set_up(dataset, out, block_size=5).model.config.block_size == 5


def test_overwrite_starts_again_at_step_0(dataset, out):
    run_train(dataset, out)
    run_train(dataset, out, overwrite=True, max_iters=2, seed=5)
    assert evaluations(out) == [0, 2]
    assert files.load(out / "state.pt")["iter_num"] == 2


# -----------------------------------------------------------------------------
# files and training output

def test_a_run_writes_and_prints_the_expected_files_and_lines(dataset, out, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(arguments(dataset, out, max_iters=4))
    assert not end.value.code
    printed, err = capsys.readouterr()
    assert err == ""
    assert sorted(os.listdir(out)) == [
        ".lock", "best.pt", "ckpt.pt", "loss.png", "metrics.jsonl", "run.json", "settings.json",
        "state.1.pt", "state.pt", "train.log"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    entries = read_metrics(out)
    assert [entry.get("step", entry.get("iter")) for entry in entries] == [0, 0, 1, 2, 3, 3, 4]
    assert entries[0].keys() == {"step", "train_loss", "val_loss"}
    assert entries[1].keys() == {"iter", "loss", "lr", "ms", "tok_s", "mfu", "memory"}
    assert entries[1]["lr"] == pytest.approx(1e-2) and entries[1]["memory"] > 1e8
    assert all(entry["ms"] > 0 and entry["tok_s"] > 0 and 0 <= entry["mfu"] < 1
               for entry in entries if "iter" in entry)
    first = entries[0]
    assert (f"step 0: train loss {first['train_loss']:.4f}, val loss {first['val_loss']:.4f}\n"
            in printed)
    assert f"iter 1: loss {entries[2]['loss']:.4f}, time " in printed
    for part in ("parameters", "tokens per iteration: 64", "epochs", str(out), "free"):
        assert part in printed.partition("step 0")[0]
    assert f"python sample.py --out_dir={out}" in printed


def test_samples_are_printed_and_do_not_change_the_run(tmp_path, dataset, capsys):
    run_train(dataset, tmp_path / "silent")
    assert "--- sample ---" not in capsys.readouterr().out
    for interval, shown in ((1, 3), (2, 2)):
        out = tmp_path / f"every{interval}"
        run_train(dataset, out, sample_interval=interval, sample_start="abc")
        samples = capsys.readouterr().out.split("--- sample ---\n")[1:]
        assert len(samples) == shown
        assert all(text.startswith("abc") for text in samples)
        assert losses(out) == losses(tmp_path / "silent")


FAKE_WANDB = '''
import json
def note(**what):
    with open({path!r}, "a") as f:
        f.write(json.dumps(what) + "\\n")
class Run:
    def log(self, entry, step): note(log=entry, step=step)
    def finish(self, exit_code): note(finish=True)
def init(**options):
    note(init=options)
    return Run()
'''


@pytest.fixture
def wandb_calls(tmp_path, monkeypatch):
    """Install a fake wandb that writes its calls to a file; returns a function that reads them."""
    (tmp_path / "fake").mkdir()
    notes = tmp_path / "notes.jsonl"
    (tmp_path / "fake" / "wandb.py").write_text(FAKE_WANDB.format(path=str(notes)))
    monkeypatch.syspath_prepend(tmp_path / "fake")
    monkeypatch.setenv("WANDB_API_KEY", "k")
    yield lambda: [json.loads(line) for line in notes.read_text().splitlines()]
    sys.modules.pop("wandb", None)


def test_a_resume_continues_the_same_wandb_run(dataset, out, wandb_calls):
    run_train(dataset, out, wandb_log=True, wandb_project="p", wandb_run_name="n", max_iters=3)
    run_train(dataset, out, wandb_log=True, wandb_project="p", wandb_run_name="n",
              init_from="resume")
    calls = wandb_calls()
    first, second = (call["init"] for call in calls if "init" in call)
    assert first["id"] == second["id"] and first["id"]
    assert first["resume"] == "allow"
    assert (first["project"], first["name"]) == ("p", "n")
    assert first["config"]["batch_size"] == 2
    logged = [call for call in calls if "log" in call]
    assert [call["step"] for call in logged] == [0, 0, 1, 2, 3, 3, 4, 5, 6]
    assert logged[0]["log"].keys() == {"step", "train_loss", "val_loss"}
    assert sum("finish" in call for call in calls) == 2


def test_wandb_without_a_key_is_refused_before_training(dataset, out, wandb_calls, monkeypatch,
                                                        tmp_path):
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match=r"needs a key: run `wandb login`"):
        train.main(arguments(dataset, out, wandb_log=True))
    assert not out.exists()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    logbook.check_wandb()
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_train(dataset, out, wandb_log=True, max_iters=1)
    init = next(call["init"] for call in wandb_calls() if "init" in call)
    assert init["name"] == str(out)  # the default name is the folder


def test_wandb_is_finished_if_the_run_fails(dataset, out, wandb_calls, monkeypatch):
    replace_at(monkeypatch, [1], loss=math.nan)
    with pytest.raises(NonFiniteLoss), mock.patch.object(logbook, "draw"):
        train.main(arguments(dataset, out, wandb_log=True))
    assert "finish" in wandb_calls()[-1]


def test_the_resume_command_can_be_pasted_into_a_shell(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert train.resume_command("my run") == (
        "python train.py '--out_dir=my run' --init_from=resume")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert train.resume_command("out") == (
        "torchrun --standalone --nproc_per_node=4 train.py --out_dir=out --init_from=resume")


# -----------------------------------------------------------------------------
# bad input: one line, exit status 1, and existing files are not changed

def missing_folder(tmp_path):
    return {"dataset": "nowhere"}, r"data/nowhere does not exist; run: python data/text/prepare"


def missing_bin(tmp_path):
    (tmp_path / "data/mine").mkdir(parents=True)
    (tmp_path / "data/mine/prepare.py").touch()
    return ({"dataset": "mine"},
            r"data/mine/train\.bin does not exist; run: python data/mine/prepare\.py")


def missing_val_bin(tmp_path):
    write_dataset(tmp_path / "other")
    (tmp_path / "other" / "val.bin").unlink()
    return {"dataset": tmp_path / "other"}, r"other/val\.bin does not exist; run: python"


def odd_bin(tmp_path):
    folder = write_dataset(tmp_path / "other")
    (folder / "train.bin").write_bytes(b"\0\0\0")
    return {"dataset": folder}, r"train\.bin has an odd size, 3 bytes"


def empty_bin(tmp_path):
    folder = write_dataset(tmp_path / "other")
    (folder / "val.bin").write_bytes(b"")
    return {"dataset": folder}, r"val\.bin is empty"


def short_bin(tmp_path):
    folder = write_dataset(tmp_path / "other", n_val=12)
    return {"dataset": folder}, r"val\.bin has 12 tokens.*--block_size=11 or less"


def short_bin_for_the_models_own_block_size(tmp_path):
    return {"block_size": None}, r"val\.bin has 400 tokens.*--block_size=399 or less"


def token_beyond_the_vocabulary(tmp_path):
    folder = write_dataset(tmp_path / "other")
    tokens = np.fromfile(folder / "train.bin", "<u2")
    tokens[77] = 18
    tokens.tofile(folder / "train.bin")
    return {"dataset": folder}, r"train\.bin: token 77 is 18"


def other_tokenizer(tmp_path):
    folder = write_dataset(tmp_path / "other", alphabet="\n ABCDEFGHIJKLMNOP")
    return {"dataset": folder, "init_from": tmp_path / "run"}, r"prepare the text again"


def gpt2_data_for_a_character_model(tmp_path):
    folder = write_dataset(tmp_path / "other")
    (folder / "meta.pkl").unlink()
    return {"dataset": folder, "init_from": tmp_path / "run"}, r"with GPT-2's BPE \(50257\)"


def meta_with_code(tmp_path):
    folder = write_dataset(tmp_path / "other")
    (folder / "meta.pkl").write_bytes(b"cos\nmkdir\n(S'" + str(tmp_path / "ran").encode()
                                      + b"'\ntR.")
    return {"dataset": folder}, r"meta\.pkl is not a plain character vocabulary.*mkdir"


def unknown_field(tmp_path):
    return {"learning_rat": 1}, r"--learning_rat: .*did you mean learning_rate\?"


def wrong_type(tmp_path):
    return {"batch_size": 1.5}, r"--batch_size must be an integer, got '1\.5'"


def zero_batch(tmp_path):
    return {"batch_size": 0}, r"--batch_size=0 must be at least 1"


def negative_rate(tmp_path):
    return {"learning_rate": -1.0}, r"--learning_rate=-1\.0 must be at least 0"


def negative_steps(tmp_path):
    return {"max_iters": -5}, r"--max_iters=-5 must be at least 0"


def beta_of_one(tmp_path):
    return {"beta2": 1.0}, r"--beta2=1\.0 must be in \[0, 1\)"


def dropout_of_one(tmp_path):
    return {"dropout": 1.0}, r"--dropout=1\.0 must be in \[0, 1\)"


def heads_that_do_not_divide(tmp_path):
    return {"n_head": 3}, r"n_embd=16 must be a multiple of n_head=3"


def unknown_path(tmp_path):
    return {"init_from": "./nowhere"}, r"\./nowhere does not exist"


def no_model_in_the_folder(tmp_path):
    return {"init_from": tmp_path / "chars"}, r"neither ckpt\.pt .* nor config\.json"


def other_architecture(tmp_path):
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert", "hidden_size": 16}')
    return {"init_from": folder}, r"bert"


def larger_block_size(tmp_path):
    return {"init_from": tmp_path / "run", "block_size": 17}, r"block_size=17 is more than the 16"


def cuda_absent(tmp_path):
    return {"device": "cuda"}, r"--device=cuda: PyTorch finds no CUDA GPU here; use --device=cpu"


def no_such_device(tmp_path):
    return {"device": "tpu"}, r"--device=tpu is not supported; use auto, cpu, cuda"


def no_such_dtype(tmp_path):
    return {"dtype": "int8"}, r"--dtype=int8 is not supported; use auto, float32"


def compile_maybe(tmp_path):
    return {"compile": "maybe"}, r"--compile=maybe is not supported; use auto, True or False"


def out_dir_below_a_file(tmp_path):
    return {"out_dir": tmp_path / "chars/meta.pkl/out"}, r"out_dir=.* cannot be written \(Not a"


def out_dir_a_file(tmp_path):
    return {"out_dir": tmp_path / "chars/meta.pkl"}, r"--out_dir=.* cannot be written"


def out_dir_in_proc(tmp_path):
    return {"out_dir": "/proc/nanotune"}, r"--out_dir=/proc/nanotune cannot be written"


def resume_without_a_checkpoint(tmp_path):
    return ({"init_from": "resume", "out_dir": tmp_path / "empty"},
            r"empty does not exist")


def resume_from_a_model_alone(tmp_path):
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped/ckpt.pt").write_bytes((tmp_path / "run/ckpt.pt").read_bytes())
    return {"init_from": "resume", "out_dir": tmp_path / "shipped"}, r"has no state\.pt to resume"


def wandb_missing(tmp_path):
    return {"wandb_log": True}, r"--wandb_log=True needs the wandb package: pip install wandb"


def sample_start_outside_the_vocabulary(tmp_path):
    return {"sample_interval": 1, "sample_start": "Zoo"}, r"the character 'Z' is not in the model"


def empty_sample_start(tmp_path):
    return {"sample_interval": 1, "sample_start": ""}, r"--sample_start has no tokens"


@pytest.mark.parametrize("case", [
    missing_folder, missing_bin, missing_val_bin, odd_bin, empty_bin, short_bin,
    short_bin_for_the_models_own_block_size, token_beyond_the_vocabulary, other_tokenizer,
    gpt2_data_for_a_character_model, meta_with_code, unknown_field, wrong_type, zero_batch,
    negative_rate, negative_steps, beta_of_one, dropout_of_one, heads_that_do_not_divide,
    unknown_path, no_model_in_the_folder, other_architecture, larger_block_size, cuda_absent,
    no_such_device, no_such_dtype, compile_maybe, out_dir_below_a_file, out_dir_a_file,
    out_dir_in_proc, resume_without_a_checkpoint, resume_from_a_model_alone, wandb_missing,
    sample_start_outside_the_vocabulary, empty_sample_start,
], ids=lambda case: case.__name__)
def test_bad_input_is_a_one_line_error_and_changes_no_file(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    dataset = write_dataset(tmp_path / "chars")
    run_train(dataset, tmp_path / "run", max_iters=1)
    before = {f: f.read_bytes() for f in (tmp_path / "run").iterdir()}
    fields, message = case(tmp_path)
    # even --overwrite=True deletes nothing until the new run has passed all checks
    fields = {"out_dir": tmp_path / "run", "overwrite": True} | fields
    argv = arguments(dataset, "x", **fields)
    status, _, err = run_script(monkeypatch, capsys, train.main, argv)
    assert status == 1
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert re.search(message, err), err
    assert {f: f.read_bytes() for f in (tmp_path / "run").iterdir()} == before
    assert not (tmp_path / "ran").exists()


def test_arguments_that_are_not_options_or_config_files_are_refused(tmp_path, dataset, out,
                                                                    monkeypatch, capsys):
    (tmp_path / "broken.py").write_text("batch_size = 4\nlearning_rate = 1 / 0\n")
    for argument, message in (("--batch_size", "--batch_size has no value"),
                              ("no_such_config.py", "no_such_config.py does not exist"),
                              (str(tmp_path / "broken.py"), "line 2: ZeroDivisionError")):
        status, _, err = run_script(monkeypatch, capsys, train.main,
                                    [*arguments(dataset, out), argument])
        assert status == 1
        assert err.startswith("error: ") and err.count("\n") == 1
        assert message in err


def test_a_new_run_in_the_folder_of_another_is_refused(dataset, out, monkeypatch, capsys):
    run_train(dataset, out, max_iters=1)
    before = {f: f.read_bytes() for f in out.iterdir()}
    status, _, err = run_script(monkeypatch, capsys, train.main, arguments(dataset, out))
    assert status == 1 and err.count("\n") == 1
    assert "already holds a run" in err
    assert "--init_from=resume" in err and "--overwrite=True" in err
    assert {f: f.read_bytes() for f in out.iterdir()} == before


def test_without_a_network_the_command_to_download_elsewhere_is_printed(dataset, out, monkeypatch,
                                                                        capsys):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_, **__):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    status, _, err = run_script(monkeypatch, capsys, train.main,
                                arguments(dataset, out, init_from="gpt2"))
    assert status == 1 and err.count("\n") == 1
    assert "hf download gpt2 --local-dir FOLDER" in err and "give FOLDER instead" in err
