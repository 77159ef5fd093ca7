"""bench.py: each case runs and measures what its name says. No test checks a speed."""
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_examples import script
from tiny import arguments, run_script

import bench
import train
from model import GPT, GPTConfig
from nanotune.errors import UserError
from nanotune.formats.checkpoint import load_model

TINY = bench.Config(model="tiny", against="none", repeats=1, steps=1, block_size=32, device="cpu",
                    max_new_tokens=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench")
    bench.make_folders(str(path), "tiny", 32, "float32", tokens=2000)
    return path


def test_a_case_that_does_not_exist_is_refused(monkeypatch):
    machine = dict(device="cpu", name="CPU", torch="2", dtype="float32", dtypes=["float32"])
    monkeypatch.setattr(bench, "run_process", lambda argv: (json.dumps(machine), 0.0, 0))
    with pytest.raises(UserError, match="--only=LORA matches no case: float32 AdamW; "):
        bench.main(["memory", "--model=tiny", "--only=LORA"])


def test_flops_per_token_equal_those_of_the_model():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257, n_layer=24, n_head=16, n_embd=1024))
    cost = bench.cost_of_token("gpt2-medium", 1024)
    assert cost["flops"] == model.flops_per_token() == 6 * cost["N"] + 12 * 24 * 1024 * 1024


def test_both_ways_of_loading_give_equal_weights(folder, monkeypatch):
    pytest.importorskip("transformers")
    loaded = []
    monkeypatch.setattr(bench, "timed_load", lambda load: loaded.append(load()))
    bench.load_ours(str(folder))
    bench.load_by_copy(str(folder))
    ours, copied = loaded[0][0].state_dict(), loaded[1].state_dict()
    assert all(torch.equal(tensor, copied[name]) for name, tensor in ours.items())


def test_transformers_trains_and_samples(folder):
    pytest.importorskip("transformers")
    rivals = script("experiments/rivals.py")
    found = rivals.train_transformers(str(folder), 2, 16, 1, 0, "cpu", "float32", compiled=False)
    assert found["tok/s"] > 0
    found = rivals.sample_transformers(str(folder), 2, 4, "cpu", "float32", compiled=False)
    assert found["tok/s"] > 0


def test_a_gguf_file_holds_the_models_tensors(folder, tmp_path):
    gguf = pytest.importorskip("gguf")
    model, _ = load_model(str(folder / "hf"))
    script("experiments/rivals.py").write_gguf(model, tmp_path / "f32.gguf")
    read = gguf.GGUFReader(tmp_path / "f32.gguf")
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in read.tensors}
    assert len(tensors) == len(list(model.parameters()))
    block = model.transformer.h[1]
    assert torch.equal(tensors["token_embd.weight"], model.lm_head.weight)
    assert torch.equal(tensors["blk.1.attn_qkv.weight"], block.attn.c_attn.weight)
    assert torch.equal(tensors["blk.1.ffn_down.bias"], block.mlp.c_proj.bias)


def test_ctranslate2_samples(folder, tmp_path):
    pytest.importorskip("ctranslate2")
    sample = script("experiments/rivals.py").sample_ctranslate2
    found = sample(str(folder / "hf"), str(tmp_path), "float32", 2, 4)
    assert found["tok/s"] > 0 and found["size"] > 0


def test_against_accepts_a_package_a_nanogpt_folder_or_llama_bench(tmp_path):
    (tmp_path / "train.py").touch()
    executable = tmp_path / "llama-bench"
    executable.touch(mode=0o755)
    names = {"transformers": "transformers", "ctranslate2": "ctranslate2", "none": "none",
             str(tmp_path): "nanoGPT", str(executable): "llama.cpp",
             str(tmp_path / "train.py"): None, "nowhere": None}
    assert {name: bench.rival_of(replace(TINY, against=name)) for name in names} == names


def test_a_rival_has_a_case_for_each_number_format_that_it_supports(tmp_path, folder):
    executable = tmp_path / "llama-bench"
    executable.touch(mode=0o755)
    cfg, forms = replace(TINY, against=str(executable)), ["float32", "bfloat16", "int8", "int4"]
    assert list(bench.runtime_cases(cfg, folder, forms)) == [
        "llama.cpp F32", "llama.cpp BF16", "llama.cpp Q8_0", "llama.cpp Q4_0"]
    cfg = replace(TINY, against="ctranslate2")
    assert list(bench.runtime_cases(cfg, folder, forms)) == ["CTranslate2 float32",
                                                             "CTranslate2 int8"]
    assert bench.runtime_cases(TINY, folder, forms) == {}


def test_a_load_reports_seconds_and_memory(folder):
    found = bench.timed_load(lambda: load_model(str(folder / "hf")))
    assert found["seconds"] > 0 and found["memory/weights"] >= 0


@pytest.mark.slow
def test_training_reports_the_figures_of_train_py(folder):
    found = bench.train_ours(TINY, folder)
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    first = [json.loads(line) for line in lines if '"iter"' in line][bench.WARM_UP]
    assert found == {"tok/s": first["tok_s"], "memory": first["memory"]}
    assert first["memory"] > 1e8


@pytest.mark.slow
def test_sampling_reports_speed_and_memory(folder):
    found = bench.sample_ours(TINY, folder)
    assert found["tok/s"] > 0 and found["from the start"] > 0 and found["memory"] > 1e8


def test_memory_bandwidth_counts_the_weights_once_per_step():
    """GPT-2 124M in half precision, 10 samples, 300 tokens per second in total."""
    cfg, found = replace(TINY, num_samples=10), {"bandwidth": 1e11}
    found |= bench.cost_of_token("gpt2", 1024)
    case = bench.with_mbu(cfg, found, "ours, bfloat16", lambda: {"tok/s": 300.0})
    assert case == {"tok/s": 300.0, "MBU": pytest.approx(2 * 123.7e6 * 30 / 1e11, rel=0.001)}


def test_the_predicted_peak_is_read_from_the_printed_plan(dataset, tmp_path, monkeypatch, capsys):
    status, plan, _ = run_script(monkeypatch, capsys, train.main, arguments(
        dataset, tmp_path / "out", dry_run=True))
    assert status == 0 and bench.predicted_peak(plan) > 1e8


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "sample", "sample --exported=True", "load", "memory"])
def test_each_mode_prints_a_table_and_writes_its_results(mode, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("onnxruntime")
    fields = ["--model=tiny", "--repeats=2", "--steps=1", "--block_size=32", "--max_new_tokens=5",
              "--compiled=False", f"--out={tmp_path / 'bench.json'}"]
    status, out, err = run_script(monkeypatch, capsys, bench.main, [*mode.split(), *fields])
    assert status == 0, err
    assert re.search(r"^\| (nanotune|PyTorch|float32)", out, re.MULTILINE)
    results = json.loads((tmp_path / "bench.json").read_text())["results"]
    for found in results.values():
        assert all(len(values) == 2 for values in found.values())


@pytest.mark.parametrize("argv, message", [
    (["nonsense"], "train, sample, load, memory"), (["train", "--model=gpt3"], "--model=gpt3"),
    (["sample", "--against=nowhere"], "--against=nowhere"),
    (["sample", "--init_from=gpt2"], "--exported=True"),
    (["train", "--against=ctranslate2"], "ctranslate2 works only with `bench.py sample`"),
    (["sample", f"--against={sys.executable}", "--num_samples=2"], "llama-bench")])
def test_bad_arguments_are_a_one_line_error(argv, message, monkeypatch, capsys):
    status, _, err = run_script(monkeypatch, capsys, bench.main, argv)
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_a_case_that_fails_is_printed_and_left_out(capsys):
    def broken():
        raise UserError("no such thing")
    cases = {"ours": lambda: {"tok/s": 3.0}, "theirs": broken}
    assert bench.measure(cases, 2) == {"ours": {"tok/s": [3.0, 3.0]}}
    assert "theirs: no such thing" in capsys.readouterr().out


def test_the_table_has_medians_ranges_mfu_and_ratios():
    results = {"ours": {"tok/s": [90.0, 110.0, 100.0], "memory": [2e9]},
               "theirs": {"tok/s": [50.0, 50.0], "memory": [None]}}
    table = bench.table(results, peak_flops=200.0)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0] == ["", "tok/s", "memory", "MFU", "speedup of the first"]
    assert rows[2] == ["ours", "100.0 (90.0 to 110.0)", "2.00 GB", "50%", "1.00x"]
    assert rows[3] == ["theirs", "50.0", "-", "25%", "2.00x"]


def test_a_failed_process_is_reported_with_its_last_line(tmp_path):
    (tmp_path / "bad.py").write_text("print('first')\nraise SystemExit('the reason')\n")
    with pytest.raises(UserError, match=r"bad\.py failed: the reason"):
        bench.run_process([sys.executable, tmp_path / "bad.py"])


def test_importing_the_scripts_imports_nothing_slower_than_torch():
    heavy = {"transformers", "matplotlib", "onnx", "onnxruntime", "sklearn", "tiktoken", "wandb",
             "tokenizers", "torchao", "tensorflow", "pandas", "safetensors", "huggingface_hub",
             "torch._dynamo", "sympy"}  # these two: 2 s and 1 s; a model on meta may import them
    code = ("import sys, torch, train, sample, evaluate, export, bench\n"
            "from model import GPT, GPTConfig\n"
            "model = GPT.empty(GPTConfig(n_layer=1, n_head=1, n_embd=8), dtype=torch.bfloat16)\n"
            "model.generate(torch.zeros(1, 1, dtype=torch.long), 2, temperature=0)\n"
            "print(*sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=bench.ROOT, capture_output=True,
                          text=True, check=True)
    assert not heavy & set(done.stdout.split())
