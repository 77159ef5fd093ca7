"""A run keeps its options and a resume uses them; also best.pt, log files, MFU, epochs."""
import json
import os
import re
import shlex
import types

import numpy as np
import pytest
import torch
from conftest import tiny_gpt
from tiny import arguments, nanogpt_checkpoint, run_script, run_train, write_dataset

import evaluate
import sample
import train
from nanotune import files
from nanotune.errors import UserError
from nanotune.text.loader import TokenBin, open_dataset
from nanotune.training import logbook, lora, resume, run, settings

FIELDS = dict(learning_rate=5e-3, dropout=0.1, decay_lr=False)


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "data" / "words")


@pytest.fixture
def out(dataset, tmp_path):
    """The out_dir of a run of 3 steps."""
    assert run_train(dataset, tmp_path / "out", max_iters=3, **FIELDS) == 0
    return tmp_path / "out"


def resume_run(monkeypatch, capsys, out, *argv):
    """Resume with further arguments; returns (exit status, stdout and stderr)."""
    status, output, err = run_script(monkeypatch, capsys, train.main, [
        f"--out_dir={out}", "--init_from=resume", "--device=cpu", *argv])
    return status, output + err


def config_of(out):
    return files.load(out / "state.pt")["config"]


def test_settings_json_has_each_option_by_section(out, dataset):
    content = json.loads((out / "settings.json").read_text())
    assert content["version"] == 1 and content["torch"] == torch.__version__
    assert content["command"].startswith("python train.py --dataset=")
    assert content["settings"]["optimizer"]["learning_rate"] == 5e-3
    assert content["settings"]["data"]["dataset"] == str(dataset)
    flat = {name: value for section in content["settings"].values()
            for name, value in section.items()}
    assert flat == {name: value for name, value in config_of(out).items()
                    if name != "settings_version"}


def test_a_resume_needs_only_out_dir(out, dataset, tmp_path, monkeypatch, capsys):
    """The weights are those of a run that never stopped."""
    status, output = resume_run(monkeypatch, capsys, out, "--max_iters=6")
    assert status == 0 and "max_iters: 3 -> 6\n" in output and output.count(" -> ") == 1
    assert run_train(dataset, tmp_path / "once", max_iters=6, **FIELDS) == 0
    one, other = (files.load(folder / "state.pt") for folder in (out, tmp_path / "once"))
    for name, weight in one["model"].items():
        assert torch.equal(weight, other["model"][name]), name
    assert one["config"]["init_from"] == other["config"]["init_from"] == "scratch"


def test_options_changed_at_a_resume_are_printed_and_kept(out, monkeypatch, capsys, tmp_path):
    (tmp_path / "c.py").write_text("learning_rate = 1e-2\ndropout = 0.1\n")
    status, output = resume_run(monkeypatch, capsys, out, str(tmp_path / "c.py"), "--max_iters=4")
    assert status == 0 and "learning_rate: 0.005 -> 0.01\n" in output and "dropout: " not in output
    assert config_of(out)["learning_rate"] == 1e-2
    written = json.loads((out / "settings.json").read_text())["settings"]
    assert written["optimizer"]["learning_rate"] == 1e-2


@pytest.mark.parametrize("argv, message", [
    (["--n_layer=3"], "--n_layer=3: the run in .* was started with n_layer=2, which a resume can"),
    (["--weights=bfloat16"], "was started with weights=float32, which a resume cannot change"),
    (["--init_from=gpt2", "--auto_resume"], "was started with init_from=scratch, which a resume"),
    (["--seed=5"], "seed was 1337, now 5; give the old values, or --force_resume=True"),
    (["--batch_size=3"], "global batch was 4, now 6"),
])
def test_options_that_a_resume_cannot_change_are_refused(out, argv, message, monkeypatch, capsys):
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    argv = [f"--out_dir={out}", "--init_from=resume", "--device=cpu", "--max_iters=9", *argv]
    status, _, err = run_script(monkeypatch, capsys, train.main, argv)
    assert status == 1 and err.count("\n") == 1
    assert re.search(message, err), err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_same_command_with_auto_resume_starts_and_resumes(dataset, tmp_path, monkeypatch,
                                                              capsys):
    """The run keeps the --init_from that it started from."""
    base, out = tmp_path / "base", tmp_path / "out"
    assert run_train(dataset, base, max_iters=1) == 0
    for steps in (2, 3):
        assert run_train(dataset, out, init_from=base, auto_resume=True, max_iters=steps,
                         n_layer=None, n_head=None, n_embd=None) == 0
    assert config_of(out)["init_from"] == str(base)
    assert files.load(out / "state.pt")["iter_num"] == 3


@pytest.mark.parametrize("content", [
    None, b"{", b"[]", b"{}", pytest.param(b"[" * 100_000, id="nested"), b"\xff"])
def test_a_damaged_settings_file_is_a_warning(out, content, monkeypatch, capsys):
    good = (out / "settings.json").read_text()
    (out / "settings.json").unlink()
    if content is not None:
        (out / "settings.json").write_bytes(content)
    status, output = resume_run(monkeypatch, capsys, out)
    assert status == 0
    assert "settings.json is missing" in output or "settings.json is damaged" in output
    again = json.loads((out / "settings.json").read_text())
    assert again["settings"] == json.loads(good)["settings"]


def test_a_settings_file_of_a_newer_version_is_refused(out, monkeypatch, capsys):
    content = json.loads((out / "settings.json").read_text()) | {"version": 99}
    (out / "settings.json").write_text(json.dumps(content))
    status, output = resume_run(monkeypatch, capsys, out)
    assert status == 1 and "was written by a newer nanotune (version 99" in output


def test_a_resume_without_its_dataset_is_refused(out, dataset, monkeypatch, capsys):
    dataset.rename(dataset.with_name("other"))
    status, output = resume_run(monkeypatch, capsys, out)
    assert status == 1 and output.count("\n") == 1 and "words does not exist; run: python" in output


def test_a_run_of_the_first_edition_can_be_resumed(out, monkeypatch, capsys):
    """Its eval_iters counts batches, it has no settings.json, and a resume overwrote init_from."""
    for name in ("state.pt", "ckpt.pt"):
        data = files.load(out / name)
        del data["config"]["settings_version"]
        data["config"] |= {"eval_iters": 3, "batch_size": 2, "init_from": "resume"}
        files.save(out / name, data)
    (out / "settings.json").unlink()
    config = settings.read_run_config(out)
    assert config["eval_iters"] == 6 and "init_from" not in config
    status, output = resume_run(monkeypatch, capsys, out, "--max_iters=4")
    assert status == 0 and "settings.json" not in output
    assert config_of(out)["eval_iters"] == 6 and (out / "settings.json").is_file()


def test_the_settings_of_a_nanogpt_checkpoint_are_read(dataset, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    torch.save(nanogpt_checkpoint(dataset=dataset)[0], out / "ckpt.pt")
    status, output = resume_run(monkeypatch, capsys, out, "--max_iters=5", "--dtype=float32",
                                "--compile=False", "--eval_interval=1", "--eval_iters=2")
    assert status == 0 and "max_iters: 600000 -> 5" in output, output
    kept = config_of(out)
    assert (kept["learning_rate"], kept["warmup_iters"], kept["device"]) == (6e-4, 2000, "cpu")


# -----------------------------------------------------------------------------
# the best model, train.log, samples.txt

def best_at_step_3(monkeypatch):
    """Make the validation loss lowest at step 3."""
    losses = iter([2.0, 1.0, 1.5, 1.6])
    monkeypatch.setattr(train, "evaluate_splits", lambda r: [1.0, next(losses)])


def test_the_best_and_the_latest_model_are_kept(dataset, tmp_path, monkeypatch, capsys):
    best_at_step_3(monkeypatch)
    out = tmp_path / "my out"
    status, output, _ = run_script(monkeypatch, capsys, train.main, arguments(
        dataset, out, max_iters=9))
    assert status == 0
    best, latest = files.load(out / "best.pt"), files.load(out / "ckpt.pt")
    assert (best["iter_num"], latest["iter_num"]) == (3, 9)
    assert best["best_val_loss"] == latest["best_val_loss"] == 1.0
    command = output.splitlines()[-1].partition("sample from it: ")[2]
    assert f"best validation loss 1.0000 at step 3, in {out}/best.pt" in output
    assert shlex.split(command) == ["python", "sample.py", f"--out_dir={out}/best.pt"]
    sample.main([*shlex.split(command)[2:], "--device=cpu", "--max_new_tokens=3"])


def test_the_last_line_names_the_run_if_ckpt_is_the_best(dataset, tmp_path, monkeypatch, capsys):
    status, output, _ = run_script(monkeypatch, capsys, train.main, arguments(
        dataset, tmp_path / "out", always_save_checkpoint=False))
    assert status == 0 and output.rstrip().endswith(f"python sample.py --out_dir={tmp_path}/out")


@pytest.mark.parametrize("first", [True, False])
def test_the_best_model_is_kept_if_always_save_checkpoint_changes(dataset, tmp_path, monkeypatch,
                                                                  first):
    """The best model is moved to the file in which the resumed run keeps it."""
    best_at_step_3(monkeypatch)
    out = tmp_path / "out"
    assert run_train(dataset, out, max_iters=6, always_save_checkpoint=first) == 0
    assert run_train(dataset, out, init_from="resume", max_iters=9,
                     always_save_checkpoint=not first) == 0
    best = files.load(out / ("best.pt" if first is False else "ckpt.pt"))
    assert (best["iter_num"], best["best_val_loss"]) == (3, 1.0)


def test_a_best_model_without_other_files_is_not_overwritten(out, dataset):
    for name in ("ckpt.pt", "state.pt", "state.1.pt"):
        (out / name).unlink()
    with pytest.raises(UserError, match=r"already holds a run \(best\.pt\)"):
        train.main(arguments(dataset, out))


def test_a_best_model_that_cannot_be_written_gives_a_warning(dataset, tmp_path, monkeypatch,
                                                             capsys):
    """The run continues; the next better evaluation tries again."""
    def link(source, target):
        raise files.WriteError(f"cannot write {target}")
    with monkeypatch.context() as patch:
        patch.setattr(files, "link", link)
        _, output, _ = run_script(monkeypatch, capsys, train.main, arguments(
            dataset, tmp_path / "out", max_iters=3))
    assert "best.pt. The run goes on and tries again" in output
    assert files.load(tmp_path / "out/state.pt")["iter_num"] == 3


def test_without_always_save_checkpoint_the_best_model_is_ckpt_pt(dataset, tmp_path, monkeypatch):
    best_at_step_3(monkeypatch)
    assert run_train(dataset, tmp_path / "out", max_iters=9, always_save_checkpoint=False) == 0
    assert files.load(tmp_path / "out/ckpt.pt")["iter_num"] == 3
    assert not (tmp_path / "out/best.pt").exists()


def test_a_best_model_that_is_the_latest_takes_no_disk_space(out):
    assert os.path.samefile(out / "best.pt", out / "ckpt.pt")


def test_a_file_is_copied_if_it_cannot_be_linked(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"old")
    monkeypatch.setattr(files.os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no")))
    files.link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 2


def test_printed_lines_and_samples_are_kept_in_files(dataset, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    for steps, more in ((3, {}), (6, {"init_from": "resume"})):
        status, output, _ = run_script(monkeypatch, capsys, train.main, arguments(
            dataset, out, max_iters=steps, sample_interval=1, sample_start="abc", **more))
        assert status == 0
        log = (out / "train.log").read_text()
        for line in output.splitlines():
            assert line in log
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  step 0: train loss", log, re.MULTILINE)
    samples = re.findall(r"=== step (\d+) ===\nabc", (out / "samples.txt").read_text())
    assert samples == ["0", "3", "6"]
    assert run_train(dataset, out, max_iters=0, overwrite=True) == 0
    assert not (out / "samples.txt").exists()
    assert "step 3" not in (out / "train.log").read_text()


def test_tensorboard_gets_the_logged_numbers(dataset, tmp_path, monkeypatch):
    calls = []
    writer = types.SimpleNamespace(add_scalar=lambda *args: calls.append(args),
                                   close=lambda: calls.append("closed"))
    monkeypatch.setattr(run, "check_tensorboard", lambda: None)
    monkeypatch.setattr(logbook, "start_tensorboard", lambda out_dir, start: writer)
    assert run_train(dataset, tmp_path / "out", max_iters=2, tensorboard=True) == 0
    assert calls[-1] == "closed"
    assert {args[0] for args in calls[:-1]} >= {"loss", "val_loss", "train_loss", "tok_s"}


def test_tensorboard_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(logbook.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        logbook.check_tensorboard()


# -----------------------------------------------------------------------------
# settings in other scripts

def test_evaluation_does_not_depend_on_the_batch_size(dataset, tmp_path, monkeypatch, capsys):
    losses = []
    for size in (1, 2, 3, 8):
        status, output, _ = run_script(monkeypatch, capsys, train.main, arguments(
            dataset, tmp_path / "out", eval_only=True, batch_size=size, eval_iters=7,
            gradient_accumulation_steps=1))
        assert status == 0
        losses.append([float(word.strip(",")) for word in output.split() if "." in word])
    for found in losses[1:]:
        assert found == pytest.approx(losses[0], abs=1.1e-4)  # four digits are printed


def test_evaluate_uses_the_dataset_of_the_run(out, dataset, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, output, err = run_script(monkeypatch, capsys, evaluate.main, [
        f"--out_dir={out}", "--device=cpu"])
    assert status == 0 and f"on {dataset} val: loss" in output, err
    with pytest.raises(UserError, match=r"gpt2 is not a run with .*already: words"):
        evaluate.main(["--init_from=gpt2", "--device=cpu"])


def test_train_without_arguments_lists_config_files_and_datasets(tmp_path, monkeypatch, capsys,
                                                                 dataset):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "mine.py").write_text("# my own\nmax_iters = 1\n")
    train.main([])
    output = capsys.readouterr().out
    assert "config/mine.py  my own" in output and "prepared already: words" in output


# -----------------------------------------------------------------------------
# printed numbers

def test_flops_for_mfu_count_only_what_is_computed():
    """6 N + 12 L C T; 4 N for frozen weights; the head only for the share of targets that count."""
    model = tiny_gpt(61, tied_head=False)
    head, whole = model.lm_head.weight.numel(), model.flops_per_token()
    n = model.num_params() - (16 + 61) * 16  # without the embeddings
    assert whole == 6 * n + 12 * 2 * 16 * 16
    assert whole - model.flops_per_token(0.25) == 0.75 * 6 * head
    lora.add_lora(model, 2)
    trained = sum(p.numel() for p in lora.adapters(model).values())
    assert model.flops_per_token() == 4 * n + 6 * trained + 12 * 2 * 16 * 16


def test_mfu_is_left_out_if_the_measured_peak_is_too_low(dataset, tmp_path, monkeypatch, capsys):
    for peak, shown in ((1.0, False), (1e15, True)):
        monkeypatch.setattr(train, "matmul_peak", lambda device, dtype, peak=peak: peak)
        _, output, _ = run_script(monkeypatch, capsys, train.main, arguments(
            dataset, tmp_path / "out", max_iters=1, overwrite=True))
        assert (", mfu " in output) == shown


def test_the_first_line_says_that_its_loss_has_dropout(dataset, tmp_path, monkeypatch, capsys):
    for dropout, count in ((0.1, 1), (0.0, 0)):
        _, output, _ = run_script(monkeypatch, capsys, train.main, arguments(
            dataset, tmp_path / "out", max_iters=3, dropout=dropout, overwrite=True))
        assert output.count("with dropout 0.1") == count
        assert not count or ", with dropout 0.1, time" in next(
            line for line in output.splitlines() if line.startswith("iter 0"))


def test_a_step_without_targets_prints_no_loss(dataset, tmp_path, monkeypatch, capsys):
    mask = np.ones(2000, np.uint8)
    mask[:400] = 0
    for split, values in (("train", mask), ("val", np.ones(400, np.uint8))):
        values.tofile(dataset / f"{split}.mask.bin")
    monkeypatch.setattr(TokenBin, "position", lambda self, n: 0 if n < 4 else 1000)
    _, output, _ = run_script(monkeypatch, capsys, train.main, arguments(
        dataset, tmp_path / "out", max_iters=2))
    lines = [line for line in output.splitlines() if line.startswith("iter")]
    assert lines[0].startswith("iter 0: no token counts in the loss, time")
    assert lines[1].startswith("iter 1: loss ")


# -----------------------------------------------------------------------------
# epochs

def test_epochs_can_be_given_instead_of_max_iters(dataset, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    fields = dict(max_iters=None, batch_size=16, gradient_accumulation_steps=2, eval_interval=10**6)
    assert run_train(dataset, out, epochs=2, **fields) == 0
    steps = files.load(out / "state.pt")["iter_num"]
    data = open_dataset(dataset / "train.bin", resume_config(out))
    assert steps == -(-2 * data.n_blocks // 32) > 1
    status, output = resume_run(monkeypatch, capsys, out, "--epochs=3")
    assert status == 0 and "epochs: 2.0 -> 3.0" in output and "max_iters" not in output
    assert files.load(out / "state.pt")["iter_num"] == -(-3 * data.n_blocks // 32)


def resume_config(out):
    return resume.load_start(out, 0.0, torch.float32).model.config


def test_a_dry_run_prints_the_warnings_of_the_run(dataset, tmp_path, capsys):
    fields = dict(max_iters=None, epochs=1, gradient_accumulation_steps=16, batch_size=16,
                  warmup_iters=5)
    run_train(dataset, tmp_path / "a", **fields)
    train.main(arguments(dataset, tmp_path / "b", **fields, dry_run=True))
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning: ")]
    assert len(lines) == 4 and lines[:2] == lines[2:]
    assert lines[0] == "warning: only 1 step: lower --gradient_accumulation_steps or raise --epochs"
    assert "warmup_iters=5 is not less than max_iters=1" in lines[1]


def test_many_epochs_of_finetuning_give_a_warning(dataset, tmp_path, monkeypatch, capsys):
    base = tmp_path / "base"
    assert run_train(dataset, base, max_iters=0) == 0
    for fields, warned in ((dict(init_from=base, epochs=21), True),
                           (dict(init_from=base, epochs=19), False), (dict(epochs=30), False)):
        cfg = train.Config(dataset=str(dataset), out_dir=str(tmp_path / "out"), device="cpu",
                           batch_size=16, gradient_accumulation_steps=1, block_size=8,
                           **{name: str(value) if name == "init_from" else value
                              for name, value in fields.items()})
        run.dry_run(cfg)
        assert ("will memorize the text" in capsys.readouterr().out) == warned


def test_the_later_of_epochs_and_max_iters_wins(tmp_path):
    (tmp_path / "c.py").write_text("max_iters = 7\n")
    file = str(tmp_path / "c.py")
    cfg, _ = train.read_config(train.Config, [file, "--epochs=2"])
    assert (cfg.epochs, cfg.max_iters) == (2.0, train.Config.max_iters)
    cfg, _ = train.read_config(train.Config, ["--epochs=2", file])
    assert (cfg.epochs, cfg.max_iters) == (None, 7)
    with pytest.raises(UserError, match="--epochs and --max_iters contradict each other"):
        train.read_config(train.Config, ["--epochs=2", "--max_iters=7"])
    with pytest.raises(UserError, match=r"--epochs=0\.0 must be above 0"):
        train.read_config(train.Config, ["--epochs=0"])
