"""T5 in sample.py, evaluate.py, export.py, serve.py and runs.py; the run has learnt two answers."""
import json
import runpy

import pytest
import torch
from serving import ask, complete, served
from tiny import REPO, read_metrics, run_script, run_train

import evaluate
import export
import runs
import sample
from nanotune.errors import UserError
from nanotune.evaluation.tasks import answer_scores, mean_and_error
from nanotune.generation.fast import open_model

LINES = "prompt,completion\n" + "".join(
    f"Line {'ab'[i % 2]} {'cdefghijkl'[i // 2 % 10] * (1 + i // 20)},{('bad', 'a cab')[i % 2]}\n"
    for i in range(120))


@pytest.fixture(scope="module")
def trained(t5_folders, tmp_path_factory):
    """(out_dir, dataset): the answer to "Line a ..." is "bad", to "Line b ..." it is "a cab"."""
    base = tmp_path_factory.mktemp("trained")
    (base / "lines.csv").write_text(LINES)
    runpy.run_path(str(REPO / "data" / "pairs" / "prepare.py"))["main"]([
        f"--input={base / 'lines.csv'}", f"--tokenizer={t5_folders[0]}",
        f"--out_dir={base / 'data'}", "--test_fraction=0.2"])
    run_train(base / "data", base / "out", init_from=t5_folders[0], block_size=None, eval_iters=0,
              max_iters=160, eval_interval=160, batch_size=8, gradient_accumulation_steps=1,
              decay_lr=False, dropout=0.0)
    assert read_metrics(base / "out")[-1]["val_loss"] < 0.1
    return base / "out", base / "data"


@pytest.fixture
def script(monkeypatch, capsys):
    """script(module, **fields) -> (status, stdout, stderr)"""
    def call(module, **fields):
        argv = [f"--{name}={value}" for name, value in fields.items()]
        return run_script(monkeypatch, capsys, module.main, [*argv, *(
            [] if module is export else ["--device=cpu"] + ["--dtype=float32"] * (
                "dtype" not in fields))])
    return call


def test_a_sample_is_only_the_answer(trained, script):
    _, out, err = script(sample, out_dir=trained[0], start="Line a c", num_samples=2,
                         temperature=0, compile="True")
    assert out == ("bad\n" + "-" * 15 + "\n") * 2 and "cut" not in err
    _, out, err = script(sample, out_dir=trained[0], start="Line b c", num_samples=2,
                         temperature=0, max_new_tokens=4)
    assert out.startswith("a c\n") and "2 of 2 answers were cut at --max_new_tokens=4" in err


def predictions(out_dir):
    return [json.loads(line) for line in (out_dir / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["generate", "likelihood"])
def test_a_t5_classifies(trained, script, method):
    out_dir, data = trained
    _, out, _ = script(evaluate, task="classify", out_dir=out_dir, dataset=data, method=method)
    assert "accuracy 100.00%, macro F1 100.00%; 24 prompts, 0 answers were not a label" in out
    rows = predictions(out_dir)
    assert len(rows) == 24 and {row["answer"] for row in rows} == {"bad", "a cab"}


def test_answers_of_a_t5_are_scored_and_cut_ones_are_marked(trained, script):
    """Batched answers equal those of one prompt at a time."""
    out_dir, data = trained
    files = []
    for size in (1, 5):
        _, out, _ = script(evaluate, task="generate", out_dir=out_dir, dataset=data,
                           batch_size=size)
        assert ("exact match 100.00% (standard error 0.00%), F1 of words 100.00% (0.00%); "
                "24 prompts, 0 answers cut") in out
        files.append((out_dir / "predictions.jsonl").read_text())
    assert files[0] == files[1]
    _, out, _ = script(evaluate, task="generate", out_dir=out_dir, dataset=data, max_new_tokens=5)
    rows = predictions(out_dir)
    cut = [row for row in rows if row["cut"]]
    assert 0 < len(cut) < 24 and all(row["target"] == "a cab" for row in cut)
    assert f"{len(cut)} answers cut by --max_new_tokens" in out and cut[0]["exact"] == 0


def test_the_loss_of_pairs_is_the_one_that_training_logged(trained, script):
    out_dir, data = trained
    _, out, _ = script(evaluate, out_dir=out_dir, dataset=data)
    logged = read_metrics(out_dir)[-1]["val_loss"]
    assert f"loss {logged:.4f} nats per token" in out and "targets of pairs" in out
    assert "over 12 pairs" in out


def test_an_answer_is_scored_by_exact_match_and_f1():
    assert answer_scores(" a cab", "a  cab\n") == (1.0, 1.0)
    assert answer_scores("a cab", "a a") == (0.0, 0.5)
    assert answer_scores("bad", "") == (0.0, 0.0) and answer_scores("", " ") == (1.0, 1.0)
    assert mean_and_error([1.0, 0.0]) == (0.5, 0.5)


def test_an_exported_t5_works_in_transformers_and_loads_again(trained, script, tmp_path):
    """With AutoTokenizer and AutoModelForSeq2SeqLM and no further settings."""
    import transformers
    folder = tmp_path / "hf"
    status, _, err = script(export, out_dir=trained[0], format="hf", export_dir=folder)
    assert status == 0, err
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    batch = tokenizer(["Line a c", "Line b kkk"], return_tensors="pt", padding=True)
    texts = tokenizer.batch_decode(model.generate(**batch, max_new_tokens=8),
                                   skip_special_tokens=True)
    assert texts == ["bad", "a cab"]
    card = (folder / "README.md").read_text()
    assert "A T5 model" in card and "2 + 2 layers" in card and "AutoModelForSeq2SeqLM" in card
    _, out, _ = script(sample, init_from=folder, start="Line b c", num_samples=1, temperature=0)
    assert out.startswith("a cab\n")


@pytest.mark.parametrize("module, fields, message", [
    (export, dict(format="peft"), "--format=peft does not support T5; use --format=hf"),
    (export, dict(dtype="float16"), "T5 overflows in float16"),
    (sample, dict(dtype="float16"), "T5 overflows in float16"),
    (evaluate, dict(dtype="float16"), "T5 overflows in float16"),
    (evaluate, dict(stride=4), "--stride=4 is for windows of plain text"),
    (evaluate, dict(input=__file__), "holds plain text, but T5 takes pairs"),
    (evaluate, dict(block_size=4), "T5 takes --source_length and --target_length"),
    (evaluate, dict(task="lambada", input="lambada.jsonl"), "which T5 cannot do; use a GPT"),
])
def test_options_that_a_t5_excludes_are_refused(trained, script, tmp_path, monkeypatch, module,
                                                fields, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lambada.jsonl").write_text('{"text": "Line a c"}\n')
    data = {"dataset": trained[1]} if module is evaluate else {}
    status, _, err = script(module, **{"out_dir": trained[0]} | data | fields)
    assert status == 1 and message in err and err.count("\n") == 1, err


def test_runs_py_lists_a_t5(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # runs.png is written there
    status, out, err = run_script(monkeypatch, capsys, runs.main, [trained[0]])
    assert status == 0 and str(trained[0]) in out and "inf" not in out, err


def test_serve_answers_with_a_t5(trained):
    """Whole and streamed, for several prompts, with logprobs; echo is refused."""
    model = open_model(str(trained[0]), torch.device("cpu"), torch.float32)
    with served({"t5": model}, sources={"t5": trained[0]}) as server:
        about = json.loads(ask(server, "GET", "/v1/models")[2])["data"][0]
        assert about["kind"] == "T5" and about["context"] is None
        body = dict(model="t5", prompt=["Line a c", "Line b c"], temperature=0, max_tokens=20)
        answer = complete(server, **body, logprobs=2)
        assert [choice["text"] for choice in answer["choices"]] == ["bad", "a cab"]
        assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
        events = complete(server, **body, stream=True)
        for index, text in enumerate(("bad", "a cab")):
            assert "".join(choice["text"] for event in events for choice in event["choices"]
                           if choice["index"] == index) == text
        status, _, content = ask(server, "POST", "/v1/completions", body | {"echo": True})
        assert status == 400 and b"does not continue it" in content
    with pytest.raises(UserError, match="float16"):
        open_model(str(trained[0]), torch.device("cpu"), torch.float16)


def test_a_folder_without_a_tokenizer_is_refused(trained, t5_folders, script, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((t5_folders[0] / name).read_bytes())
    status, _, err = script(sample, init_from=tmp_path)
    assert status == 1 and "has no tokenizer file" in err
    status, _, err = script(evaluate, init_from=tmp_path, dataset=trained[1])
    assert status == 1 and "has no tokenizer file" in err and err.count("\n") == 1
    assert torch.is_grad_enabled()
