"""A run that was stopped, killed or crashed resumes exactly, as if it had never stopped."""
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from ranks import run_ranks
from tiny import (
    REPO,
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
from nanotune import files
from nanotune.errors import UserError
from nanotune.formats import checkpoint
from nanotune.text.loader import TokenBin

# with the same number of threads, sums are bitwise the same
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
# with lr_decay_iters, the learning rates do not depend on max_iters
FIELDS = dict(lr_decay_iters=6, warmup_iters=2, min_lr=1e-3, dropout=0.2)


class Crash(BaseException):
    """Ends the run like a crash: the code under test does not catch it."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(dataset, out_dir) of six steps without a stop; tests must not change them."""
    folder = tmp_path_factory.mktemp("whole")
    write_dataset(folder / "chars")
    assert run_train(folder / "chars", folder / "out", **FIELDS) == 0
    return folder / "chars", folder / "out"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def assert_same_run(a, b, rel=0.0):
    """Compare weights, moments, scaler and progress bitwise, and losses within `rel`. `rel` is
    above 0 for runs that add up in another order."""
    for name in ("ckpt.pt", "state.pt"):
        one, other = files.load(a / name), files.load(b / name)
        assert one.keys() == other.keys()
        for key in one["model"]:
            assert torch.equal(one["model"][key], other["model"][key]), key
        assert one["iter_num"] == other["iter_num"]
        assert one["best_val_loss"] == other["best_val_loss"]
        for key, state in one.get("optimizer", {}).items():
            assert state.keys() == other["optimizer"][key].keys()
            for moment in state:
                assert torch.equal(state[moment], other["optimizer"][key][moment]), (key, moment)
        assert one.get("scaler") == other.get("scaler")
        if "progress" in one:
            assert one["progress"] | {"run_id": ""} == other["progress"] | {"run_id": ""}
    for one, other in zip(losses(a), losses(b), strict=True):
        assert one == pytest.approx(other, rel=rel, abs=0)


def at_step(monkeypatch, step, act):
    real = train.forward_backward

    def forward_backward(r, now):
        if now == step:
            act()
        return real(r, now)

    monkeypatch.setattr(train, "forward_backward", forward_backward)


# -----------------------------------------------------------------------------
# exact resumes

@pytest.mark.parametrize("fields", [{}, {"always_save_checkpoint": False}])
def test_a_run_resumed_at_step_3_of_6_is_bitwise_the_same(whole, out, fields):
    dataset, expected = whole
    assert run_train(dataset, out, max_iters=3, **FIELDS, **fields) == 0
    assert files.load(out / "state.pt")["iter_num"] == 3
    assert run_train(dataset, out, init_from="resume", **FIELDS, **fields) == 0
    # each evaluation is better than the one before, so the best model is the latest
    assert_same_run(out, expected)


@pytest.mark.parametrize("first", [1, 2, 4, 5])
def test_a_run_stopped_by_a_signal_resumes_exactly_at_any_step(whole, out, monkeypatch, first):
    """Also between evaluations. Each entry of metrics.jsonl is written once."""
    dataset, expected = whole
    with monkeypatch.context() as patch:
        at_step(patch, first - 1, lambda: signal.raise_signal(signal.SIGTERM))
        assert run_train(dataset, out, **FIELDS) == 143
    for name in ("state.pt", "ckpt.pt"):
        assert files.load(out / name)["iter_num"] == first
    assert run_train(dataset, out, init_from="resume", **FIELDS) == 0
    assert_same_run(out, expected)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_prints_a_command_that_works(whole, out, monkeypatch, capsys, number,
                                                        status):
    dataset, expected = whole
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: signal.raise_signal(number))
        assert run_train(dataset, out, **FIELDS, overwrite=True) == status
    assert signal.getsignal(number) is before
    command = capsys.readouterr().out.splitlines()[-1].strip()
    python, script, *argv = shlex.split(command)
    assert (python, script) == ("python", "train.py")
    assert argv[-1] == "--init_from=resume" and "--overwrite=True" not in argv
    with pytest.raises(SystemExit) as end:
        train.main(argv)
    assert not end.value.code
    assert_same_run(out, expected)


def test_a_second_ctrl_c_stops_at_once(whole, out, monkeypatch, capsys):
    dataset, expected = whole

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # a background job ignores SIGINT
    with monkeypatch.context() as patch:
        at_step(patch, 4, twice)
        status, _, err = run_script(patch, capsys, train.main, arguments(dataset, out, **FIELDS))
    assert status == 130
    assert "Traceback" not in err
    assert files.load(out / "state.pt")["iter_num"] == 3
    assert signal.getsignal(signal.SIGINT) is before
    run_train(dataset, out, init_from="resume", **FIELDS)
    assert_same_run(out, expected)


@pytest.mark.parametrize("at", [0, 1, 3, 4, 6, 7, 11])
def test_a_run_that_crashed_during_a_save_resumes_or_starts_again(whole, out, monkeypatch, at):
    """The crash is just before rename number `at`, counted from 0. The renamed files are run.json,
    settings.json, and at each of steps 0, 3 and 6 ckpt.pt, best.pt, state.pt and run.json."""
    dataset, expected = whole
    renames = []
    real = os.replace

    def replace(*paths):
        renames.append(paths)
        if len(renames) > at:
            raise Crash
        real(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        with pytest.raises(Crash):
            train.main(arguments(dataset, out, **FIELDS))
    if not (out / "state.pt").exists():  # a resume is refused
        assert at < 5
        with pytest.raises(UserError, match=r"no checkpoint|no state\.pt"):
            run_train(dataset, out, init_from="resume", **FIELDS)
        run_train(dataset, out, overwrite=True, **FIELDS)
    else:
        assert run_train(dataset, out, init_from="resume", **FIELDS) == 0
    assert_same_run(out, expected)


def test_a_run_that_crashed_in_the_first_step_resumes(whole, out, monkeypatch):
    """state.pt of step 0 has no moments yet."""
    dataset, expected = whole

    def crash():
        raise Crash

    with monkeypatch.context() as patch:
        at_step(patch, 0, crash)
        with pytest.raises(Crash):
            train.main(arguments(dataset, out, **FIELDS))
    assert run_train(dataset, out, init_from="resume", **FIELDS) == 0
    assert_same_run(out, expected)


def test_metrics_are_cut_back_to_the_resumed_step(whole, out, monkeypatch):
    dataset, expected = whole

    def crash():
        with open(out / "metrics.jsonl", "a") as f:
            f.write('{"iter": 5, "lo')
        raise Crash

    with monkeypatch.context() as patch:
        at_step(patch, 5, crash)
        with pytest.raises(Crash):
            train.main(arguments(dataset, out, **FIELDS))
    assert '"iter": 4' in (out / "metrics.jsonl").read_text()
    run_train(dataset, out, init_from="resume", **FIELDS)
    assert losses(out) == losses(expected)


def test_a_resume_can_split_the_batch_in_another_way(whole, out):
    dataset, _ = whole
    run_train(dataset, out, max_iters=3, **FIELDS | {"dropout": 0.0})
    run_train(dataset, out, init_from="resume", batch_size=1, gradient_accumulation_steps=4,
              **FIELDS | {"dropout": 0.0})
    once = out.with_name("once")
    run_train(dataset, once, **FIELDS | {"dropout": 0.0})
    for one, other in zip(losses(out), losses(once)):
        assert one == pytest.approx(other, abs=1e-4)


def test_a_resume_keeps_the_count_of_patience(whole, out, monkeypatch):
    dataset, _ = whole
    pairs = iter([(3, 3), (3, 3.1), (3, 3.2), (3, 3.3), (3, 3.4)])
    monkeypatch.setattr(train, "evaluate_splits", lambda r: list(next(pairs)))
    run_train(dataset, out, max_iters=6, patience=3)
    run_train(dataset, out, max_iters=60, patience=3, init_from="resume")
    assert [e["step"] for e in read_metrics(out) if "step" in e] == [0, 3, 6, 9]


def test_resuming_a_finished_run_changes_nothing(whole, out, capsys):
    dataset, _ = whole
    run_train(dataset, out, **FIELDS)
    before = {name: (out / name).read_bytes() for name in ("ckpt.pt", "state.pt")}
    kept = read_metrics(out)
    capsys.readouterr()
    assert run_train(dataset, out, init_from="resume", **FIELDS) == 0
    assert "raise --max_iters to train further" in capsys.readouterr().out
    assert {name: (out / name).read_bytes() for name in before} == before
    assert read_metrics(out) == kept
    assert run_train(dataset, out, init_from="resume", **FIELDS, max_iters=8) == 0
    assert files.load(out / "state.pt")["iter_num"] == 8


# -----------------------------------------------------------------------------
# a resume with other options or data

@pytest.mark.parametrize("changed, message", [
    ({"seed": 5}, r"seed was 1337, now 5"),
    ({"block_size": 8}, r"block_size was 16, now 8"),
    ({"batch_size": 3}, r"global batch was 4, now 6"),
    ({"gradient_accumulation_steps": 1, "seed": 7},
     r"seed was 1337, now 7; global batch was 4, now 2"),
])
def test_a_resume_with_another_seed_or_batch_is_refused_unless_forced(whole, out, monkeypatch,
                                                                      capsys, changed, message):
    dataset, expected = whole
    out.mkdir()
    (out / "state.pt").write_bytes((expected / "state.pt").read_bytes())
    argv = arguments(dataset, out, init_from="resume", max_iters=8, **changed)
    status, _, err = run_script(monkeypatch, capsys, train.main, argv)
    assert status == 1
    assert err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err) and "--force_resume=True" in err
    assert run_train(dataset, out, init_from="resume", force_resume=True, max_iters=8,
                     **changed) == 0
    state = files.load(out / "state.pt")
    assert state["iter_num"] == 8
    block_size = changed.get("block_size", 16)
    assert state["model_args"]["block_size"] == block_size
    wpe = state["optimizer"]["transformer.wpe.weight"]
    assert wpe["exp_avg"].shape == wpe["exp_avg_sq"].shape == (block_size, 16)
    # the forced run can then be resumed without force
    assert run_train(dataset, out, init_from="resume", max_iters=9, **changed) == 0


def test_a_resume_with_another_dataset_is_refused_unless_forced(tmp_path, whole, out, monkeypatch,
                                                                capsys):
    dataset, expected = whole
    other = write_dataset(tmp_path / "other", seed=1)
    out.mkdir()
    (out / "state.pt").write_bytes((expected / "state.pt").read_bytes())
    status, _, err = run_script(monkeypatch, capsys, train.main,
                                arguments(other, out, init_from="resume"))
    assert status == 1 and err.count("\n") == 1
    assert f"dataset was {dataset}, now {other}" in err
    assert run_train(other, out, init_from="resume", force_resume=True, max_iters=7) == 0
    # another alphabet is refused even with force
    third = write_dataset(tmp_path / "third", alphabet="\n ABCDEFGHIJKLMNOP")
    status, _, err = run_script(monkeypatch, capsys, train.main, arguments(
        third, out, init_from="resume", force_resume=True))
    assert status == 1 and f"prepare the text again with --tokenizer={out}" in err


def swap_tokens(path):
    tokens = bytearray(path.read_bytes())
    tokens[-2:], tokens[:2] = tokens[:2], tokens[-2:]
    path.write_bytes(tokens)


@pytest.mark.parametrize("name, change", [
    ("train.bin", swap_tokens), ("val.bin", lambda path: os.truncate(path, 700)),
    ("train.mask.bin", lambda path: path.write_bytes(bytes(1999) + b"1"))],
    ids=["tokens swapped", "cut short", "a mask added"])
def test_a_resume_with_changed_data_is_refused_unless_forced(tmp_path, whole, monkeypatch, capsys,
                                                             name, change):
    dataset, out = (shutil.copytree(path, tmp_path / path.name) for path in whole)
    argv = arguments(dataset, out, init_from="resume", max_iters=7)
    state = torch.load(out / "state.pt")
    state["config"]["dataset"] = str(dataset)
    torch.save(state, out / "state.pt")
    change(dataset / name)
    before = (out / "state.pt").read_bytes()
    status, _, err = run_script(monkeypatch, capsys, train.main, argv)
    assert status == 1 and err.count("\n") == 1
    split = name.partition(".")[0]
    assert f"{dataset / split}.bin or its mask has changed since {out / 'state.pt'} was" in err
    assert (out / "state.pt").read_bytes() == before
    # states of the first edition have no fingerprint of the data
    (tmp_path / "old").mkdir()
    files.save(tmp_path / "old/state.pt", {
        key: value for key, value in state.items() if key != "data"})
    assert run_train(dataset, tmp_path / "old", init_from="resume", max_iters=7) == 0
    assert run_train(dataset, out, init_from="resume", max_iters=7, force_resume=True) == 0
    assert run_train(dataset, out, init_from="resume", max_iters=8) == 0


def cut_data_short(rank):
    """Cut train.bin short at step 3, as a script that overwrites the file would."""
    def forward_backward(r, step):
        if step == 3:
            os.truncate(r.data["train"].path, 2)
        return real(r, step)

    real, train.forward_backward = train.forward_backward, forward_backward


@pytest.mark.skipif(os.name == "nt", reason="Windows does not truncate a mapped file")
def test_data_cut_short_during_a_run_is_a_one_line_error(tmp_path):
    dataset = write_dataset(tmp_path / "words", n_train=200_000)
    statuses, output = run_ranks(1, arguments(dataset, tmp_path / "out"), tmp_path / "log",
                                 cut_data_short)
    assert statuses == [1], output
    assert "error: " in output
    assert "train.bin or its mask was cut short while it was in use" in output
    assert files.load(tmp_path / "out/state.pt")["iter_num"] == 3


def test_a_resume_with_a_larger_block_size_cannot_be_forced(whole, out, monkeypatch, capsys):
    dataset, expected = whole
    out.mkdir()
    (out / "state.pt").write_bytes((expected / "state.pt").read_bytes())
    status, _, err = run_script(monkeypatch, capsys, train.main, arguments(
        dataset, out, init_from="resume", force_resume=True, block_size=32))
    assert status == 1 and err.count("\n") == 1
    assert "block_size=32 is more than the 16" in err


def test_a_damaged_state_is_a_one_line_error(whole, out, monkeypatch, capsys):
    dataset, expected = whole
    out.mkdir()
    good = (expected / "state.pt").read_bytes()
    flipped = bytearray(good)
    weight = files.load(expected / "state.pt")["model"]["transformer.wpe.weight"]
    flipped[good.index(weight.numpy().tobytes())] ^= 1
    for content in (good[:-100], bytes(flipped)):
        (out / "state.pt").write_bytes(content)
        status, _, err = run_script(monkeypatch, capsys, train.main,
                                    arguments(dataset, out, init_from="resume"))
        assert status == 1 and err.count("\n") == 1
        assert str(out / "state.pt") in err and "damaged" in err
        assert (out / "state.pt").read_bytes() == content


# -----------------------------------------------------------------------------
# nanoGPT's checkpoint

@pytest.mark.parametrize("bias, compiled", [(False, False), (True, True)])
def test_a_nanogpt_run_is_resumed_with_its_moments(whole, out, bias, compiled):
    """One step from its ckpt.pt equals one of AdamW with nanoGPT's moments, matched by name."""
    dataset, _ = whole
    stored, order = nanogpt_checkpoint(bias=bias, compiled=compiled, dataset=dataset)
    out.mkdir()
    torch.save(stored, out / "ckpt.pt")
    model, _ = checkpoint.load_model(str(out))
    params = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([{"params": [params[n] for n in order if params[n].dim() > 1]},
                                   {"params": [params[n] for n in order if params[n].dim() < 2]}])
    optimizer.load_state_dict(stored["optimizer"])  # sets the weight decay (0.1, 0.0) and betas
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    x, y = TokenBin(dataset / "train.bin", 16, 18, seed=1337).batch(4 * 4, 4)
    F.cross_entropy(model.logits(x).flatten(0, 1), y.flatten()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

    assert run_train(dataset, out, init_from="resume", max_iters=5, dropout=0.0, eval_interval=4,
                     learning_rate=1e-3, decay_lr=False, always_save_checkpoint=False,
                     compile=False) == 0  # nanoGPT's settings would compile: half a minute
    state = files.load(out / "state.pt")
    assert state["iter_num"] == 5
    for name, p in params.items():
        torch.testing.assert_close(state["model"][name], p.detach(), rtol=0, atol=1e-5, msg=name)
        assert state["optimizer"][name]["step"] == 5
    # a checkpoint must be better than nanoGPT's best loss, 2.5; this model is worse
    assert all(e["val_loss"] > 2.5 for e in read_metrics(out) if "step" in e)
    assert [e["step"] for e in read_metrics(out) if "step" in e] == [4, 5]
    assert state["best_val_loss"] == 2.5
    assert files.load(out / "ckpt.pt")["iter_num"] == 4


def test_a_nanogpt_run_with_another_batch_is_refused(whole, out, monkeypatch, capsys):
    dataset, _ = whole
    out.mkdir()
    torch.save(nanogpt_checkpoint(dataset=dataset)[0], out / "ckpt.pt")
    status, _, err = run_script(monkeypatch, capsys, train.main, arguments(
        dataset, out, init_from="resume", batch_size=4))
    assert status == 1 and "global batch was 4, now 8" in err and err.count("\n") == 1


# -----------------------------------------------------------------------------
# the script in a new process

@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_script_saves_and_prints_a_command_that_works(whole, tmp_path, number,
                                                                      status):
    dataset, _ = whole
    out = tmp_path / "out dir"
    fields = FIELDS | dict(max_iters=100_000, eval_interval=50_000, lr_decay_iters=100)
    command = [sys.executable, "train.py", *arguments(dataset, out, **fields)]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, env=ONE_THREAD) as process:
        lines = iter(process.stdout.readline, "")
        next(line for line in lines if line.startswith("iter 3:"))
        process.send_signal(number)
        printed = [*lines]
        assert process.stderr.read() == ""
        assert process.wait(60) == status
    step = int(re.search(r"after step (\d+)", printed[-2])[1])
    resume = printed[-1].strip().replace("python", shlex.quote(sys.executable), 1)
    done = subprocess.run(f"{resume} --max_iters={step + 3}", shell=True, cwd=REPO,
                          capture_output=True, text=True, timeout=120, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert f"resuming at step {step + 1} of {step + 3}" in done.stdout
    once = tmp_path / "once"
    run_train(dataset, once, **fields | {"max_iters": step + 3})
    for name in ("ckpt.pt", "state.pt"):
        one, other = files.load(out / name), files.load(once / name)
        assert all(torch.equal(one["model"][k], other["model"][k]) for k in one["model"])


@pytest.mark.slow
def test_a_killed_script_resumes_exactly(whole, tmp_path):
    dataset, _ = whole
    out = tmp_path / "out"
    fields = FIELDS | dict(max_iters=100_000, eval_interval=1, lr_decay_iters=100)
    command = [sys.executable, "train.py", *arguments(dataset, out, **fields)]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True,
                          env=ONE_THREAD) as process:
        lines = iter(process.stdout.readline, "")
        next(line for line in lines if line.startswith("iter 2:"))
        time.sleep(0.3)
        process.kill()
    step = files.load(out / "state.pt")["iter_num"]
    assert step >= 2
    assert run_train(dataset, out, init_from="resume", **fields | {"max_iters": step + 2}) == 0
    once = tmp_path / "once"
    run_train(dataset, once, **fields | {"max_iters": step + 2})
    assert_same_run(out, once)
