"""formats/tf.py: reads checkpoints written by TensorFlow with the names of OpenAI's GPT-2."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT, tiny_json
from tiny import arguments, run_script

import export
import train
from nanotune.formats.checkpoint import load_model
from nanotune.text.tokenizer import JsonTokenizer

HPARAMS = {"n_vocab": 300, "n_ctx": 16, "n_embd": 8, "n_head": 2, "n_layer": 2}


@pytest.fixture(scope="session")
def tf():
    """TensorFlow; without it the tests are skipped. It is large, and only this file needs it."""
    return pytest.importorskip("tensorflow", reason="needs requirements-tf.txt")


def variables(h, seed=0):
    """{name: array} of a GPT-2 with the names and shapes of OpenAI's model.py."""
    rng, C = np.random.RandomState(seed), h["n_embd"]
    shapes = {"wte": (h["n_vocab"], C), "wpe": (h["n_ctx"], C), "ln_f/g": (C,), "ln_f/b": (C,)}
    for i in range(h["n_layer"]):
        shapes |= {f"h{i}/{norm}/{part}": (C,) for norm in ("ln_1", "ln_2") for part in "gb"}
        for module, n, m in (("attn/c_attn", C, 3 * C), ("attn/c_proj", C, C),
                             ("mlp/c_fc", C, 4 * C), ("mlp/c_proj", 4 * C, C)):
            shapes |= {f"h{i}/{module}/w": (1, n, m), f"h{i}/{module}/b": (m,)}
    return {f"model/{name}": (rng.randn(*shape) * 0.3 + name.endswith("/g")).astype(np.float32)
            for name, shape in shapes.items()}


def forward(v, h, ids):
    """The logits of these variables, (T, V): GPT-2 written in numpy."""
    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        return x * v[f"model/{name}/g"] + v[f"model/{name}/b"]

    def conv(x, name):
        return x @ v[f"model/{name}/w"][0] + v[f"model/{name}/b"]

    T, hs = len(ids), h["n_embd"] // h["n_head"]
    x = v["model/wte"][ids] + v["model/wpe"][:T]
    for i in range(h["n_layer"]):
        qkv = conv(norm(x, f"h{i}/ln_1"), f"h{i}/attn/c_attn")
        q, k, w = (t.reshape(T, -1, hs).swapaxes(0, 1) for t in np.split(qkv, 3, -1))
        scores = q @ k.swapaxes(1, 2) / np.sqrt(hs)
        p = np.exp(scores) * np.tril(np.ones((T, T)))
        mixed = (p / p.sum(-1, keepdims=True) @ w).swapaxes(0, 1).reshape(T, -1)
        x = x + conv(mixed, f"h{i}/attn/c_proj")
        m = conv(norm(x, f"h{i}/ln_2"), f"h{i}/mlp/c_fc")
        m = 0.5 * m * (1 + np.tanh(np.sqrt(2 / np.pi) * (m + 0.044715 * m**3)))
        x = x + conv(m, f"h{i}/mlp/c_proj")
    return norm(x, "ln_f") @ v["model/wte"].T


@pytest.fixture
def write_tf(tf, tmp_path):
    """write_tf(arrays) saves them as gpt-2-simple does; returns the folder."""
    def write(arrays, name="run1", hparams=HPARAMS):
        folder = tmp_path / name
        folder.mkdir()
        v1 = tf.compat.v1
        with tf.Graph().as_default(), v1.Session() as session:
            saved = [v1.get_variable(name, initializer=array) for name, array in arrays.items()]
            session.run(v1.global_variables_initializer())
            v1.train.Saver(saved).save(session, str(folder / "model"), global_step=1000)
        (folder / "hparams.json").write_text(json.dumps(hparams))
        return folder
    return write


def write_vocabulary(folder):
    """Write encoder.json and vocab.bpe, which old programs use instead of tokenizer.json."""
    spec = json.loads(tiny_json())
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    (folder / "encoder.json").write_text(json.dumps(vocab))
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]),
                                      encoding="utf-8")
    return JsonTokenizer(tiny_json())


@torch.no_grad()
def check_logits(model, arrays):
    ids = np.random.RandomState(1).randint(HPARAMS["n_vocab"], size=16)
    expected = forward(arrays, HPARAMS, ids)
    assert np.abs(expected).max() > 1
    got = model.logits(torch.from_numpy(ids)[None])[0].numpy()
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_logits_and_tokenizer_are_those_of_the_checkpoint(write_tf):
    arrays = variables(HPARAMS)
    folder = write_tf(arrays)
    tokenizer = write_vocabulary(folder)
    model, found = load_model(str(folder))
    check_logits(model.eval(), arrays)
    assert found.identity == tokenizer.identity
    text = "Line 7: what's more,\n\n it <|endoftext|> ends"
    assert found.encode(text) == tokenizer.encode(text)


def test_optimizer_slots_are_ignored(write_tf):
    arrays = variables(HPARAMS)
    slots = {f"{name}/{slot}": np.zeros_like(a) for name, a in arrays.items()
             for slot in ("Adam", "Adam_1")}
    counters = {"beta1_power": np.float32(0.9), "beta2_power": np.float32(1),
                "global_step": np.int64(1000)}
    folder = write_tf(arrays | slots | counters)
    model, tokenizer = load_model(str(folder))
    check_logits(model.eval(), arrays)
    assert tokenizer is None  # no encoder.json, and not the size of GPT-2's vocabulary


def test_a_folder_that_was_moved_is_read(write_tf):
    """The file `checkpoint` may contain a path of another machine, or be missing."""
    folder = write_tf(variables(HPARAMS))
    for path in ("/content/checkpoint/run1/model-1000", r"C:\run1\model-1000"):
        (folder / "checkpoint").write_text(f'model_checkpoint_path: "{path}"\n')
        load_model(str(folder))
    (folder / "checkpoint").unlink()
    load_model(str(folder))


def test_a_checkpoint_can_be_exported_planned_and_trained(write_tf, tmp_path, capsys):
    """Trained once with all weights and once with adapters. The plan needs no TensorFlow."""
    arrays = variables(HPARAMS)
    folder = write_tf(arrays)
    tokenizer = write_vocabulary(folder)
    data = tmp_path / "data"
    data.mkdir()
    (data / "tokenizer.json").write_text(tiny_json())
    ids = np.array(tokenizer.encode(TEXT), dtype="<u2")
    for split in ("train", "val"):
        ids.tofile(data / f"{split}.bin")
    export.main([f"--init_from={folder}", "--format=hf", f"--export_dir={tmp_path / 'hf'}"])
    exported, _ = load_model(str(tmp_path / "hf"))
    rows = exported.transformer.wte.weight.detach().numpy()
    assert np.array_equal(rows, arrays["model/wte"])
    for name, rank in (("whole", 0), ("lora", 2)):
        argv = arguments(data, tmp_path / name, init_from=folder, lora_rank=rank, max_iters=2,
                         n_layer=None, n_head=None, n_embd=None)
        train.main([*argv, "--dry_run=True"])
        assert "model: 0.0" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            train.main(argv)
        trained, found = load_model(str(tmp_path / name))
        assert found.identity == tokenizer.identity
        moved = trained.transformer.h[0].mlp.c_fc.weight.detach().numpy()
        assert not np.array_equal(moved, arrays["model/h0/mlp/c_fc/w"][0].T)


# -----------------------------------------------------------------------------
# refused input

@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """refused(folder) runs export.py on it, which must fail; returns the one-line error."""
    def run(folder):
        argv = [f"--init_from={folder}", "--format=hf", f"--export_dir={tmp_path / 'refused'}"]
        status, _, err = run_script(monkeypatch, capsys, export.main, argv)
        assert status == 1 and err.count("error: ") == err.count("\n") == 1
        assert not (tmp_path / "refused").exists()
        return err
    return run


def test_missing_files_are_named(refused, tmp_path):
    """This is checked before TensorFlow is imported."""
    assert "does not exist" in refused(tmp_path / "nowhere")
    folder = tmp_path / "run1"
    folder.mkdir()
    assert "nor hparams.json" in refused(folder)
    (folder / "hparams.json").write_text("{}")
    assert "0 .index files" in refused(folder)
    (folder / "hparams.json").unlink()
    (folder / "model-9.index").touch()
    assert "lacks model-9.data-00000-of-00001" in refused(folder)
    (folder / "model-9.data-00001-of-00003").touch()
    assert "lacks model-9.data-00000-of-00003, model-9.data-00002-of-00003" in refused(folder)
    for i in (0, 2):
        (folder / f"model-9.data-0000{i}-of-00003").touch()
    assert "hparams.json does not exist" in refused(folder)
    (folder / "hparams.json").write_text('{"n_vocab": 300}')
    assert "n_ctx" in refused(folder)
    (folder / "model-10.index").touch()
    assert "2 .index files" in refused(folder)
    (folder / "checkpoint").write_text('model_checkpoint_path: "model-8"\n')
    assert "lacks model-8.index" in refused(folder)


def test_unknown_missing_and_misshapen_variables_are_named(write_tf, refused):
    arrays = variables(HPARAMS)
    assert "discriminator/w" in refused(write_tf(
        arrays | {"discriminator/w": np.zeros(3, np.float32)}, "foreign"))
    del arrays["model/h1/mlp/c_fc/b"]
    assert "lacks model/h1/mlp/c_fc/b" in refused(write_tf(arrays, "fewer"))
    wide = HPARAMS | {"n_ctx": 32}
    assert "model/wpe has shape (16, 8)" in refused(write_tf(variables(HPARAMS), "other", wide))


@pytest.mark.parametrize("change, message", [
    (lambda a: a * np.float32("nan"), "h0/ln_1/g has values that are NaN"),
    (lambda a: a.astype(np.int32), "h0/ln_1/g is not dense and floating-point"),
    (lambda a: a.astype(np.complex64), "h0/ln_1/g is not dense and floating-point"),
    (lambda a: a.astype(str), "damaged"),
], ids=["NaN", "integers", "complex", "text"])
def test_weights_that_are_not_finite_floats_are_refused(write_tf, refused, change, message):
    arrays = variables(HPARAMS)
    arrays["model/h0/ln_1/g"] = change(arrays["model/h0/ln_1/g"])
    assert message in refused(write_tf(arrays))


def test_a_damaged_shard_is_refused(write_tf, refused):
    folder = write_tf(variables(HPARAMS))
    shard = next(Path(folder).glob("*.data-*"))
    shard.write_bytes(shard.read_bytes()[:500])
    assert "damaged" in refused(folder)


def test_without_tensorflow_the_command_to_install_it_is_printed(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    folder = tmp_path / "run1"
    folder.mkdir()
    for name in ("model-1.index", "model-1.data-00000-of-00001"):
        (folder / name).touch()
    (folder / "hparams.json").write_text(json.dumps(HPARAMS))
    assert "pip install -r requirements-tf.txt" in refused(folder)
