"""Extreme values, files and paths: a one-line error before anything is allocated."""
import errno
import zipfile

import pytest
import torch
from tiny import arguments, run_script, run_train

import evaluate
import export
import sample
import train
from nanotune import files
from nanotune.cli import bad_path
from nanotune.errors import UserError
from nanotune.formats import checkpoint, hf_config
from nanotune.generation.generate import sample_token
from nanotune.training import plan, resume, run


@pytest.fixture(scope="module")
def out(dataset, tmp_path_factory):
    """The folder of a run. Tests must not change it."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert run_train(dataset, out, max_iters=1) == 0
    return out


def refused(monkeypatch, capsys, main, argv):
    """Run a script that must fail; return the one-line error."""
    status, output, err = run_script(monkeypatch, capsys, main, argv)
    assert (status, err.count("\n")) == (1, 1) and err.startswith("error: "), output + err
    return err


@pytest.mark.parametrize("script, field, message", [
    *((train, f"--{name}=1000000000", f"--{name}=1000000000 must be at least 1 and at most {most}")
      for name, most in (("batch_size", 65536), ("gradient_accumulation_steps", 65536),
                         ("n_layer", 1000), ("n_embd", 65536), ("keep_states", 1000))),
    (train, f"--timeout={10**15}", "--timeout=1000000000000000 must be at least 1 and at most"),
    (train, "--lora_rank=1000000000", "must be at least 0 and at most 65536"),
    (train, f"--warmup_iters={10**400}", "--warmup_iters is too large"),
    (train, f"--max_iters=-{10**400}", "--max_iters is too large"),
    (train, "--learning_rate=nan", "--learning_rate must be a number, got 'nan'"),
    (train, "--device=xpu", "--device=xpu is not supported; use auto, cpu"),
    (train, "--backend=foo", "--backend=foo is not supported; use auto, nccl or gloo"),
    (train, "--out_dir=", "--out_dir is empty"),
    (evaluate, "--device=meta", "--device=meta is not supported"),
    (sample, "--num_samples=1000000000", "must be at least 1 and at most 65536"),
    (sample, "--temperature=1e308", "must be at least 0 and at most 100"),
    (sample, "--temperature=inf", "--temperature must be a number"),
    (sample, "--repetition_penalty=1e-320", "must be at least 0.01 and at most 100"),
    (sample, f"--seed={10**30}", "--seed is too large")],
    ids=lambda value: getattr(value, "__name__", str(value)[:40]))
def test_extreme_values_of_fields_are_refused(
        dataset, tmp_path, monkeypatch, capsys, script, field, message):
    argv = arguments(dataset, tmp_path / "out") if script is train else []
    assert message in refused(monkeypatch, capsys, script.main, [*argv, field])
    assert not (tmp_path / "out").exists()


LONG = "x" * 5000


@pytest.mark.parametrize("script, field", [
    *((train, field) for field in ("out_dir", "dataset", "init_from")),
    *((evaluate, field) for field in ("out_dir", "dataset", "input", "split")),
    (sample, "init_from"), (sample, "start"), (export, "export_dir")],
    ids=lambda value: getattr(value, "__name__", value))
def test_a_path_of_5000_characters_is_a_one_line_error(
        dataset, out, tmp_path, monkeypatch, capsys, script, field):
    argv = (arguments(dataset, tmp_path / "new") if script is train else [f"--out_dir={out}"])
    argv += [f"--dataset={dataset}"] * (script is evaluate)
    value = f"FILE:{LONG}" if field == "start" else LONG
    line = refused(monkeypatch, capsys, script.main, [*argv, f"--{field}={value}"])
    assert "File name too long" in line


@pytest.mark.parametrize("folder", ["", ".", "/"], ids=["empty", "current", "root"])
def test_a_folder_without_a_name_is_a_one_line_error(out, tmp_path, monkeypatch, capsys, folder):
    monkeypatch.chdir(tmp_path)
    argv = [f"--out_dir={out}", f"--export_dir={folder}"]
    assert "give one with a name" in refused(monkeypatch, capsys, export.main, argv)


def test_a_path_that_the_system_refuses_is_a_one_line_error():
    assert bad_path(PermissionError(errno.EACCES, "Permission denied", "a/b")) == (
        "a/b: Permission denied; give another path")
    assert bad_path(FileNotFoundError(errno.ENOENT, "No such file", "a/b")) is None  # a bug
    assert bad_path(OSError(errno.ENAMETOOLONG, "File name too long")) is None


@pytest.mark.parametrize("options", [dict(temperature=1e-45), dict(temperature=1e-320),
                                     dict(top_p=1e-320), dict(top_p=1e-320, top_k=2)])
def test_a_tiny_temperature_or_top_p_takes_the_most_likely_token(options):
    logits = torch.tensor([[3.0, -1.0, 2.9], [-5.0, 1.0, 0.0]])
    assert sample_token(logits, **options).tolist() == [0, 1]


def test_a_run_that_does_not_fit_in_memory_allocates_nothing(
        dataset, out, tmp_path, monkeypatch, capsys):
    def allocate(*args, **kwargs):
        raise AssertionError("allocated")

    monkeypatch.setattr(plan, "device_memory", lambda device: 1e7)
    for name in ("GPT", "lora"):
        monkeypatch.setattr(run, name, allocate)
    for fields in (dict(init_from="scratch"), dict(init_from=out, lora_rank=8)):
        line = refused(monkeypatch, capsys, train.main,
                       arguments(dataset, tmp_path / "new", **fields))
        assert "peak memory of the process" in line and "that does not fit" in line


def test_files_named_almost_like_a_state_are_not_touched(dataset, out, tmp_path):
    run_train(dataset, tmp_path, max_iters=1)
    for name in ("state.1backup.pt", "state.old.pt", "state.²².pt", f"state.{'9' * 99}.pt"):
        (tmp_path / name).write_bytes(b"mine")
    assert [path.name for path in resume.state_files(tmp_path)] == ["state.pt", "state.1.pt"]
    assert run_train(dataset, tmp_path, max_iters=2, overwrite=True) == 0
    assert (tmp_path / "state.1backup.pt").read_bytes() == b"mine"


def test_a_checkpoint_that_unpacks_to_far_more_than_its_size_is_refused(out, tmp_path, monkeypatch):
    """The zip's index has the size, so nothing is unpacked."""
    path = tmp_path / "ckpt.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    for read in (files.load, files.peek):
        with pytest.raises(UserError, match="unpacks to 10,000,000 bytes, far more than its size"):
            read(path)


def test_absurd_sizes_in_a_file_are_refused_before_a_model_is_built(out, monkeypatch):
    data = files.load(out / "ckpt.pt")
    monkeypatch.setattr(checkpoint, "model_class", None)
    for args in ({"n_layer": 10**7}, {"n_layer": "x"}):
        with pytest.raises(UserError), files.checked_parse("ckpt.pt"):
            checkpoint.model_from(data | {"model_args": data["model_args"] | args}, "ckpt.pt")
    neo = dict(model_type="gpt_neo", vocab_size=9, hidden_size=4, num_heads=2, num_layers=10**7,
               max_position_embeddings=8, window_size=4)
    with pytest.raises(UserError, match="has num_layers=10000000, which must be an integer from"):
        hf_config.config_from_hf(neo, "neo")
    with pytest.raises(UserError, match="supports only alternating global and local layers"):
        hf_config.config_from_hf(
            neo | {"num_layers": 4, "attention_types": [[["global"], 10**12]]}, "neo")


def test_control_characters_in_labels_are_escaped(capsys):
    evaluate.print_confusion(["good", "\x1b[31mbad\r", "é"], [[1, 0, 0, 0]] * 3)
    output = capsys.readouterr().out
    assert "\x1b" not in output and "\r" not in output
    assert output.count(r"\x1b[31mbad\r") == 2 and output.count("é") == 2
