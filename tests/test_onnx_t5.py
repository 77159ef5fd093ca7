"""A T5 exported to two ONNX graphs: the same results, shared weights, the scripts, errors."""
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import save_tokenizer
from serving import ask, complete, served
from tiny import REPO, run_script, write_pairs

import evaluate
import export
import sample
from nanotune import files
from nanotune.errors import UserError
from nanotune.evaluation import perplexity, tasks
from nanotune.formats import checkpoint
from nanotune.formats.checkpoint import load_model
from nanotune.generation.fast import open_model
from nanotune.generation.generate import stream
from nanotune.text.loader import IGNORED, open_dataset
from nanotune.text.tokenizer import tokenizer_of_folder
from nanotune.training.distributed import World
from t5 import T5, T5Config

onnx = pytest.importorskip("onnx", reason="needs requirements-export.txt")
pytest.importorskip("onnxruntime", reason="needs requirements-export.txt")

from nanotune.formats import onnx_graph, onnx_t5  # noqa: E402 (after the skips above)
from nanotune.formats.onnx_model import check_opset, open_onnx  # noqa: E402

SIZES = dict(vocab_size=61, n_layer=2, n_decoder_layer=2, n_head=2, n_embd=32, head_size=16,
             n_inner=48)
GATED = dict(gated=True, tied_head=False, scale_head=False, n_decoder_layer=3, head_size=12)


def tiny_t5(seed=0, **fields):
    """A T5 in evaluation mode whose weights are large enough for each part to matter."""
    torch.manual_seed(seed)
    model = T5(T5Config(**SIZES | fields)).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.add_(torch.randn_like(param) * (0.3 if "ln_" in name or "bias" in name else 0.05))
    return model


@pytest.fixture
def make_onnx(tmp_path):
    """make_onnx(quantize, **fields) exports a tiny T5; returns (T5, OnnxT5, decoder's path)."""
    def make(quantize="none", **fields):
        model = tiny_t5(**fields)
        path = str(onnx_t5.write_onnx(model, tmp_path, quantize))
        return model, open_onnx(path)[0], path
    return make


def pairs(B=3, S=150, T=140, vocab_size=61):
    """(x, y): longer than the largest distance of the position buckets; two rows are padded."""
    ids = torch.randint(2, vocab_size, (B, S + T), generator=torch.Generator().manual_seed(S))
    x, y = ids[:, :S].clone(), ids[:, S:].clone()
    x[1, S // 2:], y[1, T // 3:] = IGNORED, IGNORED
    x[2, 1:], y[2, 0] = IGNORED, IGNORED
    return x, y


# -----------------------------------------------------------------------------
# results of the graphs

@pytest.mark.parametrize("fields", [dict(), GATED, dict(n_buckets=8, max_distance=20, n_layer=3)],
                         ids=["t5", "v1.1", "other buckets"])
@torch.no_grad()
def test_logits_and_loss_equal_those_of_the_t5(make_onnx, fields):
    model, onnx_model, _ = make_onnx(**fields)
    x, y = pairs()
    expected, found = (torch.cat(list(m.logits_at(x, y))) for m in (model, onnx_model))
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(onnx_model(x, y), model(x, y))
    y[:] = IGNORED
    assert onnx_model(x, y) == 0


@torch.no_grad()
def test_steps_with_a_cache_equal_those_of_the_t5(make_onnx):
    """Targets in pieces; the cache is rewound, reordered, and given more rows."""
    model, onnx_model, _ = make_onnx(**GATED)
    x, y = pairs(T=70)
    y = y.clamp(min=2)
    caches, first = zip(*(m.start([row[row != IGNORED].tolist() for row in x], 80)
                          for m in (model, onnx_model)))
    torch.testing.assert_close(first[1], first[0], atol=1e-4, rtol=0)

    def step(ids):
        expected, found = (m.step(ids, cache) for m, cache in zip((model, onnx_model), caches))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert caches[0].pos == caches[1].pos

    for piece in y.split([1, 1, 65, 3], dim=1):
        step(piece)
    for cache in caches:
        cache.rewind(5)
    step(y[:, 5:7])
    for rows in ([2, 0, 2, 1], [1, 1, 0, 3], [3, 2, 1, 0]):  # the sources change, too
        for cache in caches:
            cache.reorder(torch.tensor(rows))
        step(torch.tensor([[7], [8], [9], [10]]))


@pytest.mark.parametrize("options", [dict(temperature=0),
                                     dict(temperature=0.9, top_k=20, top_p=0.95)],
                         ids=["greedy", "sampled"])
def test_generation_and_label_scores_equal_those_of_the_t5(make_onnx, options):
    model, onnx_model, _ = make_onnx()
    prompts = [[5, 6, 7, 8], [9], [5, 6]]
    ours, theirs = (torch.stack(list(stream(
        m, prompts, 30, generator=torch.Generator().manual_seed(1), **options)))
        for m in (model, onnx_model))
    assert torch.equal(ours, theirs)
    ours, theirs = (tasks.score_labels(m, prompts, [[1, 2, 3], [4, 5], [6]], None, 3)
                    for m in (model, onnx_model))
    torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=0)


def test_the_loss_of_a_dataset_equals_that_of_the_t5(make_onnx, tmp_path):
    model, onnx_model, _ = make_onnx()
    write_pairs(tmp_path / "data", 9)
    data = open_dataset(tmp_path / "data" / "train.bin", model.config)
    world = World(0, 1, device=torch.device("cpu"))
    ours, theirs = (perplexity.perplexity_sums(m, data, data.windows(), 4, world, len)
                    for m in (model, onnx_model))
    assert ours == pytest.approx(theirs, rel=1e-5)


# -----------------------------------------------------------------------------
# one file of weights

def references(path):
    """{constant of a graph: (offset, length) in the file of weights}."""
    graph = onnx.load(path, load_external_data=False).graph
    places = {t.name: {e.key: e.value for e in t.external_data}
              for t in graph.initializer if t.external_data}
    assert {place["location"] for place in places.values()} == {
        re.sub("^decoder|^encoder", "model", path.name) + ".data"}
    return {name: (place["offset"], place["length"]) for name, place in places.items()}


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_both_graphs_share_one_embedding(make_onnx, quantize, tmp_path):
    model, _, path = make_onnx(quantize, vocab_size=4099)
    encoder, decoder = (references(tmp_path / re.sub("decoder", part, path.rpartition("/")[2]))
                        for part in ("encoder", "decoder"))
    name = "shared.weight" + ("" if quantize == "none" else ".codes")
    assert encoder[name] == decoder[name]
    large = [key for key, (_, length) in decoder.items() if int(length) >= 4099 * 16]
    assert large == [name]  # the tied head too
    size = next(tmp_path.glob("*.data")).stat().st_size
    whole = sum(p.numel() * 4 for p in model.parameters())
    assert size < whole * {"none": 1.2, "int8": 0.4, "int4": 0.38}[quantize]


@pytest.mark.parametrize("fields", [dict(), GATED | dict(head_size=8)], ids=["t5", "v1.1"])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
@torch.no_grad()
def test_quantized_graphs_equal_the_t5_with_dequantized_weights(make_onnx, quantize, fields):
    """Within 10 %, because the graphs round the inputs of products to int8."""
    model, onnx_model, _ = make_onnx(quantize, **fields)
    for name, param in model.named_parameters():
        if param.dim() == 2 and ".bias." not in name:
            bits, most = onnx_graph.SCHEMES[quantize][name in ("shared.weight", "lm_head.weight")]
            block = onnx_graph.block_of(param.size(1), most)
            codes, scales = onnx_graph.quantize_rows(param.numpy().copy(), bits, block)
            if bits == 4:
                codes = np.stack([codes % 16, codes // 16], -1)
            codes = codes.reshape(len(param), -1, block).astype(np.float32) - 2 ** (bits - 1)
            param.copy_(torch.from_numpy((codes * scales[..., None]).reshape(param.shape)))
    x, y = pairs(S=40, T=20)
    expected, found = (torch.cat(list(m.logits_at(x, y))) for m in (model, onnx_model))
    assert 0 < (found - expected).std() < 0.1 * expected.std()


# -----------------------------------------------------------------------------
# in the scripts

@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(a run of a tiny T5 with a tokenizer, {quantize: its exported folder})."""
    base = tmp_path_factory.mktemp("exported")
    save_tokenizer(base / "tokenizer", "unigram")
    tokenizer = tokenizer_of_folder(base / "tokenizer")
    (base / "out").mkdir()
    files.save(base / "out" / "ckpt.pt", checkpoint.model_data(
        tiny_t5(vocab_size=24), 0, 1.0, {}, tokenizer))
    folders = {}
    for quantize in ("none", "int8"):
        folders[quantize] = base / quantize
        export.main([f"--out_dir={base / 'out'}", "--format=onnx", f"--quantize={quantize}",
                     f"--export_dir={folders[quantize]}"])
    return base / "out", folders


def test_an_exported_folder_or_either_graph_in_it_is_loaded(exported):
    out_dir, folders = exported
    assert sorted(path.name for path in folders["int8"].iterdir()) == [
        "README.md", "decoder.int8.onnx", "encoder.int8.onnx", "model.int8.onnx.data",
        "tokenizer.json", "tokenizer_config.json"]
    folder, tokenizer = folders["none"], load_model(str(out_dir))[1]
    for source in (folder, folder / "decoder.onnx", folder / "encoder.onnx"):
        model, found = load_model(str(source), with_onnx=True)
        assert found.identity == tokenizer.identity and model.config.n_layer == 2
    with pytest.raises(UserError, match="T5 takes --source_length"):
        load_model(str(folder), block_size=9, with_onnx=True)
    argv = [f"--out_dir={out_dir}", "--format=onnx", f"--export_dir={folder}"]
    with pytest.raises(UserError, match="--overwrite=True"):
        export.main(argv)
    export.main([*argv, "--overwrite=True"])


def test_sample_and_evaluate_print_the_same_for_an_export(exported, tmp_path, capsys):
    """The same answers from the same seed, and the same scores; only the names differ."""
    out_dir, folders = exported
    write_pairs(tmp_path / "data", 9, "val", vocab_size=20)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders["none"] / name, tmp_path / "data")
    # in other programs the exported tokenizer appends </s>; nanotune's reader does not
    (tmp_path / "data" / "test.jsonl").write_text("".join(
        json.dumps({"prompt": f"Line {c}", "completion": c}) + "\n" for c in "abcabd"))
    outputs = []
    for source in (out_dir, folders["none"]):
        common = [f"--init_from={source}", "--device=cpu", "--dtype=float32"]
        capsys.readouterr()
        sample.main([*common, "--start=Line a", "--num_samples=3", "--top_k=9",
                     "--max_new_tokens=20"])
        for task in ("perplexity", "generate"):
            evaluate.main([*common, f"--task={task}", f"--dataset={tmp_path / 'data'}",
                           f"--out_dir={tmp_path}"])
        text = capsys.readouterr().out.replace(str(source), "").replace(f"-{source.name}.", ".")
        outputs.append(re.sub(r"[\d.]+ s, [\d.]+ prompts per second", "", text))
    assert outputs[0] == outputs[1] and "exact match" in outputs[0] and "loss" in outputs[0]


def test_serve_gives_the_same_answers_with_the_graphs_as_with_the_run(exported):
    """The same tokens and log-probabilities."""
    out_dir, folders = exported
    models = {name: open_model(str(source), torch.device("cpu"), torch.float32)
              for name, source in (("run", out_dir), ("onnx", folders["none"] / "decoder.onnx"))}
    sources = {"run": out_dir, "onnx": folders["none"] / "decoder.onnx"}
    with served(models, sources={name: str(path) for name, path in sources.items()}) as server:
        about = json.loads(ask(server, "GET", "/v1/models")[2])["data"][1]
        assert about["kind"] == "T5, ONNX" and about["context"] is None
        body = dict(prompt=["Line a", "Line b c"], temperature=0, max_tokens=9, logprobs=2)
        ours, theirs = ([choice["logprobs"] for choice in complete(
            server, **body, model=name)["choices"]] for name in ("run", "onnx"))
        for one, other in zip(ours, theirs, strict=True):
            assert one["tokens"] == other["tokens"] and len(one["tokens"]) > 2
            assert one["token_logprobs"] == pytest.approx(other["token_logprobs"], abs=1e-4)
        status, _, content = ask(server, "POST", "/v1/completions", dict(
            model="onnx", prompt="Line a", num_beams=4))
        assert status == 400 and b"num_beams is not supported" in content


def test_the_program_of_the_model_card_runs_without_torch(exported):
    out_dir, folders = exported
    card = (folders["none"] / "README.md").read_text(encoding="utf-8")
    program = card.partition("```python\n")[2].partition("```")[0].replace("Good day.", "Line a")
    done = subprocess.run(
        [sys.executable, "-c", "import sys\nsys.modules['torch'] = None\n" + program],
        cwd=folders["none"].parent, check=True, capture_output=True, text=True)
    model, tokenizer = load_model(str(out_dir))
    new = torch.stack(list(stream(model.eval(), [tokenizer.encode("Line a")], 50, temperature=0,
                                  stop_token=tokenizer.eot)), 1)[0].tolist()
    assert len(new) > 3
    assert done.stdout == tokenizer.decode([id for id in new if id != tokenizer.eot]) + "\n"
    assert not done.stderr


def test_the_docs_show_the_program_of_the_model_card():
    card = export.ONNX_USE_PAIRS.format(name="t5-int8", kind="int8.onnx", start=0, end=1)
    text = (REPO / "docs" / "export.md").read_text(encoding="utf-8")
    assert card.partition("```python\n")[2] in text


# -----------------------------------------------------------------------------
# refused input

@pytest.fixture
def refused(monkeypatch, capsys):
    """refused(file, ...) runs sample.py on it, which must fail; returns the one-line error."""
    def run(file, *more):
        status, _, err = run_script(monkeypatch, capsys, sample.main,
                                    [f"--init_from={file}", "--start=Line a", *more])
        assert status == 1 and err.count("\n") == 1, err
        return err
    return run


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of the exported float32 folder, to be damaged."""
    return shutil.copytree(exported[1]["none"], tmp_path / "copy")


@pytest.mark.parametrize("part, other", [("decoder", "encoder"), ("encoder", "decoder")])
def test_a_graph_without_its_partner_is_refused(refused, folder, part, other):
    (folder / f"{other}.onnx").unlink()
    for source in (folder, folder / f"{part}.onnx"):
        error = refused(source)
        assert f"is the {part} of a T5 and needs {other}.onnx in the same folder" in error
    shutil.copy(folder / f"{part}.onnx", folder / f"{other}.onnx")
    assert "export" in refused(folder / f"{part}.onnx") or "copy of it" in refused(folder)


def test_graphs_and_weights_of_different_exports_are_refused(refused, folder, tmp_path):
    onnx_t5.write_onnx(tiny_t5(seed=1, vocab_size=24), tmp_path)
    shutil.copy(tmp_path / "encoder.onnx", folder)
    assert "are from different exports" in refused(folder)
    shutil.copy(tmp_path / "decoder.onnx", folder)
    assert "model.onnx.data is damaged or from another export" in refused(folder)
    (folder / "model.onnx.data").write_bytes((tmp_path / "model.onnx.data").read_bytes()[:9000])
    assert "incomplete" in refused(folder)
    (folder / "model.onnx.data").unlink()
    assert "incomplete" in refused(folder)
    shutil.copytree(tmp_path, folder / "two", ignore=shutil.ignore_patterns("copy"))
    for path in list((folder / "two").glob("*.onnx")):
        shutil.copy(path, path.with_name(path.name.replace(".onnx", ".int8.onnx")))
    assert "holds decoder.int8.onnx, decoder.onnx; give one of them" in refused(folder / "two")


@pytest.mark.parametrize("opset", [21, 22, 24, 99])
def test_another_opset_is_refused(refused, folder, opset):
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False)
    graph.opset_import[0].version = opset
    onnx.save(graph, folder / "decoder.onnx")
    assert "export it again" in refused(folder)  # onnxruntime refuses opsets that it lacks
    with pytest.raises(UserError, match=f"is for ONNX opset {opset}; nanotune runs opset 23"):
        check_opset(str(folder / "decoder.onnx"))
    check_opset(str(folder / "encoder.onnx"))


def test_float16_is_refused(refused, folder, exported, monkeypatch, capsys):
    assert "T5 overflows in float16" in refused(folder, "--dtype=float16")
    status, _, err = run_script(monkeypatch, capsys, export.main, [
        f"--out_dir={exported[0]}", "--format=onnx", "--dtype=float16"])
    assert status == 1 and "--dtype=float16 needs --format=hf" in err and err.count("\n") == 1


def change_metadata(path, change):
    graph = onnx.load(path, load_external_data=False)
    entry = graph.metadata_props[0]
    entry.value = json.dumps(change(json.loads(entry.value)))
    onnx.save(graph, path)


@pytest.mark.parametrize("fields", [
    dict(partner=5), dict(partner=""), dict(partner="decoder.onnx"), dict(part=[]),
    dict(part="encoder"), dict(digest="0"), dict(data="nowhere"), dict(data=None), dict(config={}),
    dict(part=None, partner=None), dict(tokenizer=5), dict(tokenizer=None)])
def test_damaged_metadata_is_refused(refused, folder, fields):
    change_metadata(folder / "decoder.onnx", lambda meta: meta | fields)
    refused(folder / "decoder.onnx")
    if "partner" not in fields:  # else the encoder still names the right partner
        refused(folder / "encoder.onnx")


@pytest.mark.parametrize("fields", [
    dict(n_head=4), dict(n_decoder_layer=3), dict(head_size=8), dict(vocab_size=9),
    dict(unknown=1), dict(end_id=99), dict(start_id=-1), dict(n_embd="x")])
def test_a_config_that_does_not_fit_the_graph_is_refused(refused, folder, fields):
    for name in ("encoder", "decoder"):
        change_metadata(folder / f"{name}.onnx", lambda meta: meta | {
            "config": meta["config"] | fields})
    refused(folder / "decoder.onnx")


def test_sizes_that_cannot_be_exported_are_refused(tmp_path):
    with pytest.raises(UserError, match="multiple of 16"):
        onnx_t5.write_onnx(tiny_t5(n_embd=24), tmp_path, "int8")
    with pytest.raises(UserError, match="max_distance=1000000"):
        onnx_t5.write_onnx(tiny_t5(max_distance=10**6), tmp_path)
