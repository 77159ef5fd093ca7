"""A GPT exported to ONNX: the same results, quantized weights, the scripts, errors."""
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from conftest import TEXT, tiny_gpt, tiny_json
from tiny import run_script

import evaluate
import export
import sample
from nanotune.errors import UserError
from nanotune.evaluation import tasks
from nanotune.formats import onnx_gpt, onnx_graph
from nanotune.formats.checkpoint import load_model
from nanotune.generation.generate import stream
from nanotune.text.loader import IGNORED
from nanotune.text.tokenizer import CharTokenizer, GPT2Tokenizer, JsonTokenizer

onnx = pytest.importorskip("onnx", reason="needs requirements-export.txt")
pytest.importorskip("onnxruntime", reason="needs requirements-export.txt")

from nanotune.formats.onnx_model import open_onnx  # noqa: E402 (after the skips above)

CHARS = CharTokenizer(sorted(set(TEXT)))
NEO = dict(local_window=5, attn_scale=1.0, qkv_bias=False, n_layer=3)
SIZES = dict(block_size=24, n_embd=32, vocab_size=61)


@pytest.fixture
def make_onnx(tmp_path):
    """make_onnx(quantize, **fields) exports a tiny GPT; returns (GPT, OnnxGPT, path)."""
    def make(quantize="none", **fields):
        model, path = tiny_gpt(**SIZES | fields), str(tmp_path / "model.onnx")
        onnx_gpt.write_onnx(model, path, quantize)
        return model, open_onnx(path)[0], path
    return make


def test_a_folder_with_one_graph_is_loaded_and_one_with_two_refused(make_onnx, tmp_path):
    _, _, path = make_onnx()
    assert type(load_model(str(tmp_path), with_onnx=True)[0]) is type(open_onnx(path)[0])
    with pytest.raises(UserError, match="can only be sampled from and evaluated"):
        load_model(str(tmp_path))
    (tmp_path / "other.onnx").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds model\.onnx, other\.onnx; give one of them"):
        load_model(str(tmp_path), with_onnx=True)


def random_ids(B, T, vocab_size=61):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(T))


# -----------------------------------------------------------------------------
# results of the graph

@pytest.mark.parametrize("fields", [
    dict(), dict(bias=False), dict(tied_head=False, activation="gelu", n_inner=40),
    dict(n_head=8, attn_scale=1.0), NEO,
], ids=["gpt2", "no biases", "own head", "small heads", "neo"])
@torch.no_grad()
def test_logits_equal_those_of_the_gpt_with_and_without_a_cache(make_onnx, fields):
    """For three rows: the whole text at once, and after a prompt in pieces of 1, 1, 12 and 3."""
    model, onnx_model, _ = make_onnx(**fields)
    idx = random_ids(3, 24)
    expected = model.logits(idx)
    assert expected.abs().max() > 1
    torch.testing.assert_close(onnx_model.logits(idx), expected, atol=1e-4, rtol=0)
    (cache, logits), pos = onnx_model.start(idx[:, :7].tolist(), 17), 7
    torch.testing.assert_close(logits, expected[:, 6], atol=1e-4, rtol=0)
    for piece in idx[:, 7:].split([1, 1, 12, 3], dim=1):
        logits, pos = onnx_model.step(piece, cache), pos + piece.size(1)
        assert cache.pos == pos
        torch.testing.assert_close(logits, expected[:, pos - 1], atol=1e-4, rtol=0)
    assert cache.full
    cache.rewind(2)
    torch.testing.assert_close(onnx_model.step(idx[:, 2:5], cache), expected[:, 4],
                               atol=1e-4, rtol=0)


@pytest.mark.parametrize("lengths", [(9, 9, 9), (9, 4, 1)], ids=["equal", "unequal"])
@torch.no_grad()
def test_tasks_give_the_graph_the_same_scores_as_the_gpt(make_onnx, lengths):
    """Labels of several tokens rewind the cache; prompts may have unequal lengths; answers may be
    longer than the context."""
    model, onnx_model, _ = make_onnx()
    prompts = [row[:n] for row, n in zip(random_ids(3, 9).tolist(), lengths)]
    labels = [[1, 2, 3], [4, 5], [6]]
    ours, theirs = (tasks.score_labels(m, prompts, labels, None, 3)
                    for m in (model, onnx_model))
    torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=0)
    ours, theirs = (tasks.answer(m, prompts, 40, None, 61, 3) for m in (model, onnx_model))
    assert ours == theirs
    pairs = [(prompt, label) for prompt, label in zip(prompts, labels)]
    for ours, theirs in zip(*(tasks.lambada(m, pairs, [7, 8], 2, "cpu")
                              for m in (model, onnx_model))):
        torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=0)


@pytest.mark.parametrize("lengths", [(6, 6, 6), (6, 2, 4)], ids=["equal", "unequal"])
@torch.no_grad()
def test_a_cache_can_be_reordered(make_onnx, lengths):
    model, onnx_model, _ = make_onnx()
    prompts = [row[:n] for row, n in zip(random_ids(3, 6).tolist(), lengths)]
    caches = [m.start(prompts, 3)[0] for m in (model, onnx_model)]
    for order in ([2, 0, 2], [1, 1, 0]):
        for cache in caches:
            cache.reorder(torch.tensor(order))
        ours, theirs = (m.step(torch.tensor([[7], [8], [9]]), cache)
                        for m, cache in zip((model, onnx_model), caches))
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)


@torch.no_grad()
def test_loss_is_the_sum_over_targets_that_count(make_onnx):
    model, onnx_model, _ = make_onnx()
    idx, targets = random_ids(3, 20), random_ids(3, 21)[:, 1:].clone()
    targets[1, :13] = IGNORED
    targets[2] = IGNORED
    torch.testing.assert_close(onnx_model(idx, targets), model(idx, targets))
    targets[:] = IGNORED
    assert onnx_model(idx, targets) == model(idx, targets) == 0


@pytest.mark.parametrize("options", [
    dict(temperature=0), dict(temperature=0.9, top_k=20, top_p=0.95),
    dict(temperature=0, n_vocab=9)], ids=["greedy", "sampled", "few ids"])
def test_generation_equals_that_of_the_gpt(make_onnx, options):
    """The text is longer than the context, so the window slides and the cache starts over."""
    model, onnx_model, _ = make_onnx()
    ours, theirs = (
        torch.stack(list(stream(m, random_ids(2, 5).tolist(), 60,
                                generator=torch.Generator().manual_seed(1), **options)))
        for m in (model, onnx_model))
    assert torch.equal(ours, theirs)


def test_a_stop_token_ends_the_stream(make_onnx):
    model, onnx_model, _ = make_onnx()
    stop = int(model.generate(random_ids(1, 5), 4, temperature=0)[0, -1])
    ours, theirs = (list(stream(m, random_ids(1, 5).tolist(), 20, temperature=0, stop_token=stop))
                    for m in (model, onnx_model))
    assert ours == theirs and len(ours) <= 4


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_a_tied_head_is_the_tensor_of_the_embedding(make_onnx, quantize):
    _, _, path = make_onnx(quantize, vocab_size=4099)
    large = [t.name for t in onnx.load(path).graph.initializer if 4099 in t.dims and t.dims[1:]]
    assert [name for name in large if not name.endswith(".scales")] == [
        "transformer.wte.weight" + ("" if quantize == "none" else ".codes")]


def test_large_weights_are_in_a_second_file(make_onnx, monkeypatch, tmp_path):
    """Protobuf is limited to 2 GB; the limit is lowered to 0 here."""
    monkeypatch.setattr(onnx_gpt, "INLINE_LIMIT", 0)
    model, onnx_model, path = make_onnx()
    assert (tmp_path / "model.onnx").stat().st_size < 4 * model.num_params() / 2
    assert (tmp_path / "model.onnx.data").stat().st_size > 4 * model.num_params() * 0.9
    torch.testing.assert_close(onnx_model.logits(random_ids(2, 9)), model.logits(random_ids(2, 9)),
                               atol=1e-4, rtol=0)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(UserError, match="incomplete"):
        open_onnx(path)


# -----------------------------------------------------------------------------
# quantized

@pytest.mark.parametrize(("bits", "block"), [(8, 128), (8, 16), (4, 32), (4, 16)])
def test_quantized_weights_are_near_the_originals(bits, block):
    weight = np.random.RandomState(0).randn(5, 256).astype(np.float32)
    weight[2] = 0
    codes, scales = onnx_graph.quantize_rows(weight, bits, block)
    assert codes.shape == (5, 256 // block, block * bits // 8) and scales.shape == (5, 256 // block)
    back = dequantized(weight, bits, block)
    largest = np.abs(weight.reshape(5, -1, block)).max(-1).repeat(block, -1)
    steps = 127 if bits == 8 else 8
    # at most half a step; clipped 4-bit weights differ by more
    most = 0.51 / 127 if bits == 8 else 1.01 - onnx_graph.CLIPPED[-1] * 7 / 8
    assert (np.abs(back - weight) <= largest * most).all()
    assert (back[2] == 0).all()
    assert np.abs(back - weight).mean() < largest.mean() / steps * 0.3


def test_clipping_lowers_the_error_of_each_block(monkeypatch):
    weight = np.random.RandomState(0).randn(9, 64).astype(np.float32)
    clipped = np.square(dequantized(weight, 4, 32) - weight)
    monkeypatch.setattr(onnx_graph, "CLIPPED", (1,))
    whole = np.square(dequantized(weight, 4, 32) - weight)
    by_block = [error.reshape(-1, 32).sum(-1) for error in (clipped, whole)]
    assert (by_block[0] <= by_block[1] + 1e-6).all() and clipped.mean() < whole.mean()


def dequantized(weight, bits, block):
    """The weights quantized and dequantized, by the definition of the format."""
    codes, scales = onnx_graph.quantize_rows(weight, bits, block)
    if bits == 4:
        codes = np.stack([codes % 16, codes // 16], -1)
    codes = codes.reshape(len(weight), -1, block).astype(np.float32) - 2 ** (bits - 1)
    return (codes * scales[..., None]).reshape(weight.shape)


@pytest.mark.parametrize("fields", [dict(), dict(tied_head=False, bias=False), NEO],
                         ids=["gpt2", "own head", "neo"])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
@torch.no_grad()
def test_a_quantized_graph_equals_the_gpt_with_dequantized_weights(make_onnx, quantize, fields):
    """Within 6 %, because the graph rounds the inputs of products to int8."""
    model, onnx_model, _ = make_onnx(quantize, **fields)
    for name, param in model.named_parameters():
        if param.dim() == 2 and "wpe" not in name:
            bits, most = onnx_graph.SCHEMES[quantize]["wte" in name or "lm_head" in name]
            block = onnx_graph.block_of(param.size(1), most)
            param.copy_(torch.from_numpy(dequantized(param.numpy().copy(), bits, block)))
    idx = random_ids(2, 24)
    expected = model.logits(idx)
    apart = onnx_model.logits(idx) - expected
    assert 0 < apart.std() < 0.06 * expected.std()


@torch.no_grad()
def test_quantizing_raises_perplexity_by_at_most_4_percent(shared, gpt2_vocabulary, tmp_path):
    """For a real model on Shakespeare: less than 0.5 % with int8, less than 4 % with int4."""
    model, _ = load_model(str(shared("models/gutenberg-17m")))
    model.eval()
    text = shared("data/tinyshakespeare/input.txt").read_text(encoding="utf-8")
    ids = torch.tensor(GPT2Tokenizer().encode(text[-9000:])[:2049]).long()
    x, y = ids[:-1].view(8, 256), ids[1:].view(8, 256)
    loss = float(model(x, y)) / y.numel()
    for quantize, most, size in (("int8", 0.005, 0.27), ("int4", 0.04, 0.25)):
        path = tmp_path / f"{quantize}.onnx"
        onnx_gpt.write_onnx(model, str(path), quantize)
        rise = math.exp(float(open_onnx(str(path))[0](x, y)) / y.numel() - loss) - 1
        assert rise < most, quantize
        assert path.stat().st_size < size * 4 * model.num_params()


# -----------------------------------------------------------------------------
# in the scripts

def test_sample_and_evaluate_print_the_same_for_an_export(make_dataset, make_run, tmp_path, capsys):
    """The same text from the same seed, and the same loss; only the names of the models differ."""
    folder, tokenizer = make_dataset("chars")
    out_dir, _ = make_run(tokenizer, block_size=32)
    export.main([f"--out_dir={out_dir}", "--format=onnx", f"--export_dir={tmp_path / 'onnx'}"])
    outputs = []
    for source in (out_dir, tmp_path / "onnx" / "model.onnx"):
        capsys.readouterr()
        sample.main([f"--init_from={source}", "--start=what's", "--num_samples=3", "--top_k=9",
                     "--max_new_tokens=50", "--stop=x", "--device=cpu", "--dtype=float32"])
        evaluate.main([f"--init_from={source}", f"--dataset={folder}", "--batch_size=3",
                       "--block_size=16", "--device=cpu", "--dtype=float32"])
        outputs.append(capsys.readouterr().out.replace(str(source), ""))
    assert outputs[0] == outputs[1] and "loss" in outputs[0]


def test_the_file_contains_its_tokenizer(make_run, tmp_path):
    tokenizer = JsonTokenizer(tiny_json())
    out_dir, _ = make_run(tokenizer, n_embd=32)
    export.main([f"--out_dir={out_dir}", "--format=onnx", "--quantize=int4",
                 f"--export_dir={tmp_path / 'onnx'}"])
    moved = (tmp_path / "onnx" / "model.int4.onnx").rename(tmp_path / "alone.onnx")
    model, found = load_model(str(moved), block_size=12, with_onnx=True)
    assert found.identity == tokenizer.identity and model.config.block_size == 12
    with pytest.raises(UserError, match="block_size=99"):
        load_model(str(moved), block_size=99, with_onnx=True)


# -----------------------------------------------------------------------------
# refused input

@pytest.fixture
def refused(monkeypatch, capsys):
    """refused(file) runs sample.py on it, which must fail; returns the one-line error."""
    def run(file):
        status, _, err = run_script(monkeypatch, capsys, sample.main, [f"--init_from={file}"])
        assert status == 1 and err.count("\n") == 1
        return err
    return run


def test_foreign_cut_and_missing_files_are_refused(refused, make_onnx, tmp_path):
    _, _, path = make_onnx()
    foreign = onnx.load(path)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    assert "not written by export.py" in refused(tmp_path / "foreign.onnx")
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "model.onnx").read_bytes()[:3000])
    assert "damaged" in refused(tmp_path / "cut.onnx")
    (tmp_path / "text.onnx").write_text("not a graph")
    assert "damaged" in refused(tmp_path / "text.onnx")
    assert "does not exist" in refused(tmp_path / "nowhere.onnx")
    assert "no tokenizer" in refused(path)


def changed(**fields):
    """Return a function that sets these fields of the config in the metadata."""
    def change(meta):
        return meta | {"config": meta["config"] | fields}
    change.__name__ = str(fields)  # the id of the test
    return change


@pytest.mark.parametrize("change", [
    "{", "[]", '"x"', "null", "5", pytest.param("[" * 100_000, id="nested"),
    pytest.param(lambda meta: {"tokenizer": None}, id="no config"),
    pytest.param(lambda meta: {"config": meta["config"]}, id="no tokenizer"),
    pytest.param(lambda meta: meta | {"config": [1]}, id="config=[1]"),
    pytest.param(lambda meta: meta | {"config": None}, id="config=None"),
    pytest.param(lambda meta: meta | {"tokenizer": 5}, id="tokenizer=5"),
    pytest.param(lambda meta: meta | {"tokenizer": {"kind": "characters"}}, id="no itos"),
    pytest.param(lambda meta: meta | {"tokenizer": {"kind": "characters", "itos": 5}}, id="itos=5"),
    changed(unknown=1),
    changed(n_head=0), changed(n_head="x"), changed(block_size=0), changed(block_size="x"),
    changed(n_head=4), changed(n_embd=64), changed(n_layer=3), changed(n_layer=1),
    changed(vocab_size=9), changed(vocab_size=True),
])
def test_damaged_metadata_is_a_one_line_error(refused, make_onnx, tmp_path, change):
    _, _, path = make_onnx()
    damaged = onnx.load(path)
    entry = damaged.metadata_props[0]
    entry.value = change if isinstance(change, str) else json.dumps(
        change(json.loads(entry.value)))
    onnx.save(damaged, tmp_path / "odd.onnx")
    error = refused(tmp_path / "odd.onnx")
    assert re.search("odd.onnx is damaged|its metadata |is of kind", error) and len(error) < 400


def test_without_onnxruntime_the_command_to_install_it_is_printed(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install -r requirements-export.txt" in refused("model.onnx")


def test_an_onnx_file_cannot_be_trained(tmp_path):
    with pytest.raises(UserError, match="sampled from and evaluated"):
        load_model("model.int8.onnx")
