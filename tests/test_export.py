"""export.py: the exported folders in transformers, PEFT and ONNX Runtime, and refused exports."""
import json
import shlex
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import TEXT, tiny_gpt, tiny_json
from safetensors.torch import load_file
from tiny import REPO, run_script, run_train, write_dataset

import evaluate
import export
import sample
from nanotune import files
from nanotune.formats import checkpoint, hf
from nanotune.formats.checkpoint import load_model
from nanotune.generation.generate import stream
from nanotune.text.tokenizer import (
    CharTokenizer,
    GPT2Tokenizer,
    JsonTokenizer,
    tokenizer_of_folder,
)
from nanotune.text.tokenizer_files import merges_as_strings
from nanotune.training import lora

CHARS, JSON = CharTokenizer(sorted(set(TEXT))), JsonTokenizer(tiny_json())
NEO = dict(local_window=5, attn_scale=1.0, qkv_bias=False, n_layer=3, block_size=24)


def export_hf(out_dir, folder, **fields):
    export.main([f"--out_dir={out_dir}", f"--export_dir={folder}",
                 *(f"--{k}={v}" for k, v in fields.items())])
    return folder


def in_transformers(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    return (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
            AutoTokenizer.from_pretrained(folder))


# -----------------------------------------------------------------------------
# the folder in transformers

@pytest.mark.parametrize("fields", [
    dict(), dict(bias=False), dict(tied_head=False, activation="gelu", n_inner=40),
    dict(attn_scale=1.0, qkv_bias=False), NEO, NEO | dict(bias=False),
], ids=["gpt2", "no biases", "own head", "unscaled", "neo", "neo without biases"])
@torch.no_grad()
def test_transformers_gives_the_same_logits_and_ids(make_run, tmp_path, fields):
    out_dir, model = make_run(JSON, **fields)
    theirs, their_tokenizer = in_transformers(export_hf(out_dir, tmp_path / "hf"))
    idx = torch.randint(JSON.n_vocab, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(idx).logits, model.logits(idx), atol=1e-5, rtol=1e-5)
    assert their_tokenizer(TEXT).input_ids == JSON.encode(TEXT)
    assert their_tokenizer.eos_token_id == theirs.generation_config.eos_token_id == JSON.eot


def test_transformers_greedy_text_equals_that_of_sample(make_run, tmp_path, capsys):
    out_dir, _ = make_run(CHARS, block_size=64)
    theirs, their_tokenizer = in_transformers(export_hf(out_dir, tmp_path / "hf"))
    ids = their_tokenizer("what's more", return_tensors="pt").input_ids
    text = their_tokenizer.decode(theirs.generate(ids, max_new_tokens=30, do_sample=False)[0])
    capsys.readouterr()
    sample.main([f"--out_dir={out_dir}", "--start=what's more", "--max_new_tokens=30",
                 "--num_samples=1", "--temperature=0"])
    assert capsys.readouterr().out == text + "\n" + "-" * 15 + "\n"


@pytest.mark.parametrize("tokenizer", [CHARS, JSON], ids=["characters", "tokenizer.json"])
def test_an_exported_folder_is_loaded_and_exported_again_unchanged(make_run, tmp_path, tokenizer):
    out_dir, model = make_run(tokenizer)
    back, back_tokenizer = load_model(str(export_hf(out_dir, tmp_path / "hf")))
    assert back_tokenizer.identity == tokenizer.identity
    for (name, ours), theirs in zip(model.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    again = export_hf(out_dir, tmp_path / "again", init_from=tmp_path / "hf")
    assert (again / "model.safetensors").read_bytes() == (
        tmp_path / "hf" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_exported_in_the_given_dtype(make_run, tmp_path, dtype):
    out_dir, model = make_run(CHARS)
    folder = export_hf(out_dir, tmp_path / "hf", dtype=str(dtype).removeprefix("torch."))
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert torch.equal(tensors["transformer.wte.weight"], model.lm_head.weight.to(dtype))
    assert {t.dtype for t in tensors.values()} == {dtype}
    from transformers import AutoModelForCausalLM
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == dtype


def test_gpt2s_padded_vocabulary_is_cut(capsys):
    """nanotune never draws the ids of the padding, but other programs would."""
    model, idx = tiny_gpt(50304, n_embd=4), torch.arange(8)[None]
    before = model.logits(idx)
    export.cut_padding(model, GPT2Tokenizer())
    assert "from 50304 rows to the tokenizer's 50257" in capsys.readouterr().out
    assert model.config.vocab_size == 50257
    torch.testing.assert_close(model.logits(idx), before[..., :50257])


@pytest.mark.parametrize("form", ["hf", "onnx"])
def test_rows_that_may_be_added_tokens_are_kept(make_run, tmp_path, form, capsys):
    out_dir, model = make_run(CHARS, vocab_size=CHARS.n_vocab + 7)
    folder = export_hf(out_dir, tmp_path / "new", format=form)
    assert "kept the 7 rows of the vocabulary" in capsys.readouterr().out
    back, _ = load_model(str(folder if form == "hf" else folder / "model.onnx"), with_onnx=True)
    assert back.config.vocab_size == CHARS.n_vocab + 7
    idx = torch.tensor([CHARS.encode("Line 1")])
    torch.testing.assert_close(back.eval().logits(idx), model.logits(idx), atol=1e-4, rtol=0)
    ours, theirs = (list(stream(m, idx.tolist(), 9, temperature=0, n_vocab=CHARS.n_vocab))
                    for m in (model, back))
    assert ours == theirs


def test_gpt2s_vocabulary_is_exported_from_tiktoken(gpt2_vocabulary, tmp_path):
    """transformers gives the same ids with the exported vocabulary and merges. The text tests the
    pre-tokenizer, bytes that are not a whole character, and the end-of-text token."""
    ours = GPT2Tokenizer()
    hf.write_tokenizer(tmp_path, ours, 1024)
    assert tokenizer_of_folder(tmp_path).identity == ours.identity
    from transformers import AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = TEXT + " it's 123  \n\n\t x\u00e9\u65e5\u672c \U0001f600 !!?<|endoftext|> unseen \x00"
    assert theirs(text).input_ids == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text


@pytest.mark.parametrize("fields", [{}, NEO], ids=["gpt2", "neo"])
def test_transformers_answers_a_batch_of_prompts(make_run, tmp_path, fields):
    """Prompts of different lengths get the same answers in one batch as alone."""
    from transformers import pipeline
    out_dir, _ = make_run(JSON, **fields | dict(block_size=64))
    folder = str(export_hf(out_dir, tmp_path / "hf"))
    generate = pipeline("text-generation", model=folder, tokenizer=folder, device="cpu")
    prompts = ["Line 7: what's more, it ends.", "Line", "it ends"]
    options = dict(max_new_tokens=12, do_sample=False, return_full_text=False)
    together = generate(prompts, batch_size=3, **options)
    assert together == [generate([prompt], **options)[0] for prompt in prompts]
    assert len({answer["generated_text"] for answer, in together}) > 1


def test_special_tokens_are_exported_as_they_were_loaded(make_run, tmp_path):
    """The end-of-text token may have another name. It also replaces a missing unk_token."""
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_str(tiny_json())
    tokenizer.add_special_tokens(["<start>", "<pad>", "<end>"])
    tokenizer.enable_truncation(4)
    names = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<pad>"}
    ours = JsonTokenizer(tokenizer.to_str(), special=names.items())
    out_dir, _ = make_run(ours)
    folder = export_hf(out_dir, tmp_path / "hf")
    theirs, their_tokenizer = in_transformers(folder)
    for key, token in (names | {"unk_token": "<end>"}).items():
        assert getattr(their_tokenizer, key) == token
    for config in (theirs.config, theirs.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == tuple(
            tokenizer.token_to_id(token) for token in ("<start>", "<end>", "<pad>"))
    assert their_tokenizer(TEXT).input_ids == ours.encode(TEXT)  # not truncated
    assert load_model(str(folder))[1].special == names | {"unk_token": "<end>"}


def test_the_config_has_the_keys_that_the_gguf_converter_reads(make_run, tmp_path):
    """The converter is class GPT2Model in llama.cpp's convert_hf_to_gguf.py."""
    out_dir, model = make_run(JSON)
    config = json.loads((export_hf(out_dir, tmp_path / "hf") / "config.json").read_text())
    c = model.config
    assert (config["n_layer"], config["n_ctx"], config["n_embd"], config["n_head"],
            config["layer_norm_epsilon"], config["architectures"]) == (
        c.n_layer, c.block_size, c.n_embd, c.n_head, c.norm_eps, ["GPT2LMHeadModel"])


def test_merges_are_written_as_strings_for_older_versions_of_tokenizers(make_run, tmp_path):
    out_dir, _ = make_run(JSON)
    folder = export_hf(out_dir, tmp_path / "hf")
    merges = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["merges"]
    assert len(merges) > 20 and all(isinstance(merge, str) for merge in merges)
    assert tokenizer_of_folder(folder).encode(TEXT) == JSON.encode(TEXT)
    spaced = json.dumps({"model": {"merges": [["a", " b"], ["c", "d"]]}})
    assert merges_as_strings(spaced) == spaced


def test_the_model_card_lists_settings_and_losses(tmp_path):
    dataset = write_dataset(tmp_path / "chars")
    assert run_train(dataset, tmp_path / "out") == 0
    card = (export_hf(tmp_path / "out", tmp_path / "hf") / "README.md").read_text("utf-8")
    best = files.load(tmp_path / "out" / "ckpt.pt")["best_val_loss"]
    assert f"best validation loss: {best:.4f}" in card
    assert "- learning_rate: 0.01\n" in card and "- dataset: chars\n" in card
    assert card.count("\n| ") == 2 + 3  # 2 lines of header, then steps 0, 3 and 6
    assert str(tmp_path) not in card


@pytest.mark.parametrize("form", ["hf", "onnx"])
def test_a_lora_run_is_exported_with_its_adapters_merged(tmp_path, form):
    dataset = write_dataset(tmp_path / "chars")
    assert run_train(dataset, tmp_path / "base", max_iters=3) == 0
    assert run_train(dataset, tmp_path / "out", init_from=tmp_path / "base", lora_rank=2) == 0
    folder = export_hf(tmp_path / "out", tmp_path / "new", format=form)
    assert "- lora_rank: 2\n" in (folder / "README.md").read_text(encoding="utf-8")
    source = folder if form == "hf" else folder / "model.onnx"
    (base, _), (merged, _), (back, _) = (
        load_model(str(path), with_onnx=True) for path in (tmp_path / "base", tmp_path / "out",
                                                           source))
    idx = torch.arange(12)[None]
    assert (merged.eval().logits(idx) - base.eval().logits(idx)).abs().max() > 0.01
    torch.testing.assert_close(back.eval().logits(idx), merged.logits(idx), atol=1e-5, rtol=1e-5)


@pytest.fixture
def make_lora_run(make_run, tmp_path):
    """make_lora_run(tokenizer, **fields) writes a run with adapters of rank 3, whose base is an
    exported folder; returns (out_dir, the base's folder)."""
    def make(tokenizer=JSON, base=None, **fields):
        out_dir, model = make_run(tokenizer, name="base", **fields)
        base = base or str(export_hf(out_dir, tmp_path / "base-hf"))
        lora.add_lora(model, 3)
        weights = {name: torch.randn_like(p) * 0.3 for name, p in lora.adapters(model).items()}
        spec = dict(rank=3, base=base, hash=checkpoint.hash_of(base), weights="float32")
        (tmp_path / "adapted").mkdir()
        files.save(tmp_path / "adapted" / "ckpt.pt", checkpoint.model_data(
            model, 0, 1.0, {}, tokenizer, weights, lora_spec=spec))
        return tmp_path / "adapted", base
    return make


in_peft = pytest.mark.filterwarnings(  # warnings of transformers and PEFT
    "ignore:`is_gradient_checkpointing`:FutureWarning", "ignore:Could not find a config file")


@in_peft
@pytest.mark.parametrize("fields", [
    dict(), dict(bias=False, tied_head=False, activation="gelu", n_inner=40), NEO,
], ids=["gpt2", "own head", "neo"])
@torch.no_grad()
def test_adapters_give_the_same_logits_in_peft(make_lora_run, tmp_path, fields):
    """PEFT also writes the same files when it saves the adapters."""
    peft = pytest.importorskip("peft", reason="needs requirements-dev.txt")
    out_dir, base = make_lora_run(**fields)
    folder = export_hf(out_dir, tmp_path / "peft", format="peft")
    theirs, _ = in_transformers(base)
    # PEFT warns if fan_in_fan_out is wrong
    with warnings.catch_warnings(action="error", category=UserWarning):
        theirs = peft.PeftModel.from_pretrained(theirs, folder).eval()
    ours, bare = (load_model(str(source))[0].eval() for source in (out_dir, base))
    idx = torch.randint(JSON.n_vocab, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(idx).logits, ours.logits(idx), atol=1e-4, rtol=1e-4)
    assert (bare.logits(idx) - ours.logits(idx)).abs().max() > 1
    theirs.save_pretrained(tmp_path / "again")
    again, written = (load_file(path / "adapter_model.safetensors")
                      for path in (tmp_path / "again", folder))
    assert again.keys() == written.keys()
    assert all(torch.equal(again[key], written[key]) for key in again)
    again, written = (json.loads((path / "adapter_config.json").read_text())
                      for path in (tmp_path / "again", folder))
    different = {key for key in written if written[key] != again[key]}
    # target_modules is a list in any order
    assert different <= {"base_model_name_or_path", "target_modules"}
    assert sorted(again["target_modules"]) == written["target_modules"]


@in_peft
def test_the_program_in_the_model_card_loads_the_adapters(
        make_lora_run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("peft", reason="needs requirements-dev.txt")
    out_dir, _ = make_lora_run(block_size=64)
    folder = export_hf(out_dir, tmp_path / "peft", format="peft")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card and "LoRA adapters for a GPT-2" in card
    assert str(tmp_path) not in card + (folder / "adapter_config.json").read_text()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(card.partition("```python\n")[2].partition("```")[0].replace("To be", "what's"), {})
    model, _ = load_model(str(out_dir))
    idx = torch.tensor([JSON.encode("what's")])
    assert capsys.readouterr().out == JSON.decode(
        model.eval().generate(idx, 50, temperature=0)[0].tolist()) + "\n"


def test_if_the_base_is_a_run_the_command_that_exports_it_is_printed(
        make_run, make_lora_run, tmp_path, capsys):
    make_run(JSON, name="base")
    out_dir, base = make_lora_run(base=str(tmp_path / "base"))
    folder = export_hf(out_dir, tmp_path / "peft", format="peft")
    assert (f"python export.py --init_from={base} --format=hf --export_dir=base-hf"
            in capsys.readouterr().out)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base-hf"


# -----------------------------------------------------------------------------
# ONNX: tests/test_onnx_model.py tests the results of the graph

def test_an_onnx_export_is_a_folder_with_model_card_and_tokenizer(make_run, tmp_path, capsys):
    out_dir, _ = make_run(JSON, n_embd=32)
    folder = export_hf(out_dir, tmp_path / "onnx", format="onnx")
    out = capsys.readouterr().out
    assert "logits differ from PyTorch's by at most" in out and "wrote" in out
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "model.onnx", "tokenizer.json", "tokenizer_config.json"]
    small = export_hf(out_dir, tmp_path / "int8", format="onnx", quantize="int8")
    assert (small / "model.int8.onnx").is_file()


def test_an_onnx_export_prints_the_command_that_evaluates_it(make_run, make_dataset, tmp_path,
                                                             capsys):
    folder, tokenizer = make_dataset("json")
    out_dir, model = make_run(tokenizer, n_embd=32)
    export_hf(out_dir, tmp_path / "unknown", format="onnx")
    assert "check its loss" not in capsys.readouterr().out  # the run names no dataset
    files.save(out_dir / "ckpt.pt", checkpoint.model_data(
        model, 0, 1.0, {"dataset": str(folder)}, tokenizer))
    export_hf(out_dir, tmp_path / "int 8", format="onnx", quantize="int8")
    line = capsys.readouterr().out.splitlines()[-1]
    python, script, *argv = shlex.split(line.removeprefix("check its loss: "))
    assert (python, script) == ("python", "evaluate.py")
    evaluate.main([*argv, "--device=cpu"])
    assert f"{tmp_path / 'int 8'} on {folder} val: loss" in capsys.readouterr().out


def test_the_program_in_the_model_card_runs_without_torch(make_run, tmp_path):
    out_dir, model = make_run(JSON, n_embd=32, block_size=64)
    export_hf(out_dir, tmp_path / "onnx", format="onnx")
    card = (tmp_path / "onnx" / "README.md").read_text(encoding="utf-8")
    program = card.partition("```python\n")[2].partition("```")[0].replace("To be", "what's")
    blocked = "import sys\nsys.modules['torch'] = None\n"
    done = subprocess.run([sys.executable, "-c", blocked + program], cwd=tmp_path, check=True,
                          capture_output=True, text=True)
    idx = torch.tensor([JSON.encode("what's")])
    expected = model.generate(idx, 20, temperature=0)[0].tolist()
    assert done.stdout == JSON.tokenizer.decode(expected) + "\n"
    assert not done.stderr


def test_the_docs_show_the_program_in_the_model_card():
    shown = (REPO / "docs" / "export.md").read_text(encoding="utf-8")
    card = export.ONNX_USE.format(name="mine-int8", kind="int8.onnx")
    assert card.partition("```python\n")[2] in shown


# -----------------------------------------------------------------------------
# refused exports, and the files that they leave

@pytest.fixture
def refused(monkeypatch, capsys):
    """refused(--key=value, ...) runs export.py; returns the one-line error."""
    def run(*argv):
        status, _, err = run_script(monkeypatch, capsys, export.main, argv)
        assert status == 1 and err.count("\n") == 1
        return err
    return run


def test_options_that_contradict_each_other_are_refused(refused):
    assert "hf, onnx or peft" in refused("--format=tflite")
    assert "--format=onnx" in refused("--quantize=int8")
    assert "--format=hf" in refused("--format=onnx", "--dtype=float16")
    assert "--format=hf" in refused("--format=peft", "--dtype=float16")
    assert "--format=onnx" in refused("--format=peft", "--quantize=int8")
    assert "int8" in refused("--format=onnx", "--quantize=int2")
    assert "float16" in refused("--dtype=float8")


def test_a_source_that_cannot_be_exported_is_refused(refused, tmp_path):
    assert "ckpt.pt" in refused(f"--out_dir={tmp_path}", f"--export_dir={tmp_path / 'hf'}")
    assert "does not exist" in refused("--out_dir=out-nowhere", f"--export_dir={tmp_path / 'hf'}")
    assert "sampled" in refused("--init_from=model.onnx", f"--export_dir={tmp_path / 'hf'}")
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_an_export_but_no_other_files(make_run, refused, tmp_path):
    out_dir, _ = make_run(CHARS)
    target = export_hf(out_dir, tmp_path / "hf")
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    argv = (f"--out_dir={out_dir}", f"--export_dir={target}")
    assert "--overwrite=True" in refused(*argv)
    assert before == {p.name: p.read_bytes() for p in target.iterdir()}
    export_hf(out_dir, target, overwrite=True, dtype="float16")
    assert (target / "model.safetensors").stat().st_size < len(before["model.safetensors"])
    (target / "thesis.txt").write_text("the only copy")
    assert "thesis.txt" in refused(*argv, "--overwrite=True")
    assert (target / "thesis.txt").read_text() == "the only copy"
    assert "is a file" in refused(argv[0], f"--export_dir={target / 'thesis.txt'}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out-tiny"]


def test_symbolic_links_and_subfolders_are_never_replaced(make_run, refused, tmp_path):
    out_dir, _ = make_run(CHARS)
    real = export_hf(out_dir, tmp_path / "real")
    (tmp_path / "empty").mkdir()
    for name in ("real", "empty", "nowhere", "loop"):
        link = tmp_path / "loop" if name == "loop" else tmp_path / f"to {name}"
        link.symlink_to(tmp_path / name)
        for overwrite in (False, True):
            assert f"{link} is a symbolic link" in refused(
                f"--out_dir={out_dir}", f"--export_dir={link}", f"--overwrite={overwrite}")
    weights = (real / "model.safetensors").rename(tmp_path / "precious")
    argv = (f"--out_dir={out_dir}", f"--export_dir={real}", "--overwrite=True")
    for target in (weights, tmp_path / "nowhere"):
        (real / "model.safetensors").symlink_to(target)
        assert "holds model.safetensors, which is not from an export" in refused(*argv)
        (real / "model.safetensors").unlink()
    (real / "model.old.onnx").mkdir()
    assert "holds model.old.onnx" in refused(*argv)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "empty", "loop", "out-tiny", "precious", "real", "to empty", "to nowhere", "to real"]


def test_an_export_may_be_below_a_linked_folder(make_run, tmp_path):
    out_dir, _ = make_run(CHARS)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    export_hf(out_dir, tmp_path / "link" / "hf")
    assert (tmp_path / "disk" / "hf" / "model.safetensors").is_file()


def test_the_current_folder_is_refused(make_run, refused, tmp_path, monkeypatch):
    out_dir, _ = make_run(CHARS)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "give one with a name" in refused(f"--out_dir={out_dir}", "--export_dir=.")


@pytest.mark.parametrize("form", ["hf", "onnx"])
def test_a_full_disk_leaves_no_partial_export(make_run, refused, tmp_path, form):
    """No partial folder and no temporary one is left, and an older export is not changed."""
    out_dir, _ = make_run(CHARS, n_embd=64)
    argv = (f"--out_dir={out_dir}", f"--format={form}", f"--export_dir={tmp_path / 'new'}")
    old = export_hf(out_dir, tmp_path / "old", format=form)
    before = {p.name: p.read_bytes() for p in old.iterdir()}
    resource = pytest.importorskip("resource", reason="limits on files are POSIX's")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert "cannot write" in refused(*argv)
        assert "cannot write" in refused(*argv[:2], f"--export_dir={old}", "--overwrite=True")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old", "out-tiny"]
    assert before == {p.name: p.read_bytes() for p in old.iterdir()}


def test_weights_that_overflow_the_dtype_are_refused(make_run, refused, tmp_path):
    out_dir, model = make_run(CHARS)
    model.transformer.wpe.weight.data[3, 3] = 1e6
    files.save(out_dir / "ckpt.pt", checkpoint.model_data(model, 0, 1.0, {}, CHARS))
    argv = (f"--out_dir={out_dir}", f"--export_dir={tmp_path / 'hf'}")
    assert "bfloat16" in refused(*argv, "--dtype=float16")
    export.main([*argv, "--dtype=bfloat16"])


def test_an_architecture_that_a_format_does_not_support_is_refused(make_run, refused, tmp_path):
    odd, _ = make_run(CHARS, attn_scale=0.5)
    argv = (f"--out_dir={odd}", f"--export_dir={tmp_path / 'new'}")
    assert "attn_scale=0.5" in refused(*argv)
    export.main([*argv, "--format=onnx"])
    narrow, _ = make_run(CHARS, name="narrow", n_embd=24)
    argv = (f"--out_dir={narrow}", f"--export_dir={tmp_path / 'int8'}")
    assert "multiple of 16" in refused(*argv, "--format=onnx", "--quantize=int8")
    assert not (tmp_path / "int8").exists()


def test_a_run_without_adapters_is_refused_for_peft(make_run, refused, tmp_path):
    out_dir, _ = make_run(CHARS)
    argv = ("--format=peft", f"--export_dir={tmp_path / 'x'}")
    for source in (f"--out_dir={out_dir}", f"--init_from={export_hf(out_dir, tmp_path / 'hf')}"):
        assert "has no adapters" in refused(source, *argv)
    assert not (tmp_path / "x").exists()


def test_without_onnx_the_error_names_the_requirements_file(monkeypatch, refused, tmp_path):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    assert "requirements-export.txt" in refused("--format=onnx", f"--export_dir={tmp_path / 'x'}")


def test_an_export_that_does_not_read_back_is_deleted(make_run, refused, tmp_path, monkeypatch):
    out_dir, _ = make_run(CHARS)

    def flawed(fields, params, dtype, right=hf.tensors_to_hf):
        tensors = right(fields, params, dtype)
        return tensors | {"transformer.h.1.ln_2.bias": torch.ones(fields["n_embd"])}

    monkeypatch.setattr(hf, "tensors_to_hf", flawed)
    argv = (f"--out_dir={out_dir}", f"--export_dir={tmp_path / 'hf'}")
    assert "transformer.h.1.ln_2.bias does not read back" in refused(*argv)
    assert not (tmp_path / "hf").exists()
