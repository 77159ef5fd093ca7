"""Model files with impossible values: each script prints a one-line error."""
import json
import shutil

import pytest
import torch
from conftest import TEXT, hf_model, hf_tensors, tiny_gpt
from tiny import arguments, run_script

import evaluate
import export
import sample
import train
from nanotune import files
from nanotune.errors import UserError
from nanotune.formats import checkpoint
from nanotune.formats.checkpoint import load_model
from nanotune.text.tokenizer import CharTokenizer
from nanotune.training import lora

CHARS = CharTokenizer(sorted(set(TEXT)))
KEY = "transformer.h.0.mlp.c_fc.weight"
NAN, INF = float("nan"), float("inf")


def refused(source, match, load=load_model, **options):
    with pytest.raises(UserError, match=match) as error:
        load(str(source), **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


# -----------------------------------------------------------------------------
# config fields

SIZES = (0, -1, "x", 2.0, True, [1], {}, 10**30, NAN)
VALUES = [(False, key, value) for key, values in {
    "n_head": (*SIZES, None), "n_layer": (*SIZES, None), "n_embd": (*SIZES, None),
    "n_positions": (*SIZES, None), "vocab_size": (*SIZES, None), "n_inner": SIZES,
    "layer_norm_epsilon": ("1e-5", -1, None, True, NAN, INF, [1]),
    "tie_word_embeddings": ("false", None, 1, []), "scale_attn_weights": ("false", [], None),
    "activation_function": (5, [], {}, None, "a\nb"), "add_cross_attention": ([1], "x" * 999),
    "model_type": (["gpt2"], {}, 5, None, "a\nb"),
}.items() for value in values] + [
    (True, "num_heads", 0), (True, "hidden_size", "x"), (True, "window_size", 0),
    (True, "window_size", None)]


@pytest.mark.parametrize("neo", [False, True], ids=["gpt2", "neo"])
def test_impossible_values_in_config_json_are_refused(neo, write_hf):
    folder = write_hf(hf_model(neo=neo))
    right = json.loads((folder / "config.json").read_text())
    for of_neo, key, value in VALUES:
        if of_neo == neo:
            (folder / "config.json").write_text(json.dumps(right | {key: value}))
            message = "is a .* model" if key == "model_type" else f"config.json has {key}="
            refused(folder, message)
            refused(folder, message, checkpoint.model_config)


def test_impossible_values_in_a_checkpoint_are_refused(make_run):
    out_dir, model = make_run(CHARS)
    data = checkpoint.model_data(model, 0, 1.0, {}, CHARS)
    for key, values in {"n_head": SIZES, "bias": ("x", None), "dropout": ("x", 7, NAN),
                        "norm_eps": ("x",), "tied_head": (None,), "local_window": ("x",),
                        "attn_scale": ("x",), "doc_end": (-1,), "qkv_bias": (3,)}.items():
        for value in values:
            args = data["model_args"] | {key: value}
            files.save(out_dir / "ckpt.pt", data | {"model_args": args})
            refused(out_dir, f"model_args has {key}=")
            refused(out_dir, f"model_args has {key}=", checkpoint.model_config)
    files.save(out_dir / "ckpt.pt", data | {"model_args": 5})
    refused(out_dir, "ckpt.pt is damaged")
    refused(out_dir, "ckpt.pt is damaged", checkpoint.model_config)


@pytest.mark.parametrize("hparams, message", [
    ({"n_head": 0}, "n_head=0"), ({"n_head": "x"}, "n_head='x'"), ({"n_layer": -1}, "n_layer=-1"),
    ({"n_ctx": 2.5}, "n_ctx=2.5"), ({"n_embd": None}, "n_embd=None"), ([1], "damaged"),
])
def test_impossible_values_in_a_tensorflow_checkpoint_are_refused(tmp_path, hparams, message):
    right = dict(n_vocab=9, n_ctx=8, n_embd=4, n_head=2, n_layer=1)
    (tmp_path / "m.index").touch()
    (tmp_path / "m.data-00000-of-00001").touch()
    (tmp_path / "hparams.json").write_text(
        json.dumps(right | hparams if isinstance(hparams, dict) else hparams))
    refused(tmp_path, f"hparams.json .*{message}")


def test_json_that_is_nested_too_deeply_is_refused(write_hf):
    folder = write_hf(hf_model())
    (folder / "config.json").write_text('{"a": ' + "[" * 100_000)
    refused(folder, "config.json is damaged")


# -----------------------------------------------------------------------------
# shards

@pytest.mark.parametrize("weight_map", [
    [1], "x", None, 5, {}, {"a": 5}, {"a": None}, {"a": ["x"]}, {"a": 5, "b": "part.safetensors"},
    {"a": "../outside.safetensors"}, {"a": "ABSOLUTE"}, {"a": "x/../../outside.safetensors"},
    {"a": "C:part.safetensors"}, {"a": "..\\outside.safetensors"}, {"a": ".."}, {"a": ""},
    {"a": "x\0y"}, {"a": "a\nb"}, {"a": "x" * 5000},
], ids=lambda value: repr(value)[:40])
def test_an_index_that_names_no_file_in_its_folder_is_refused(weight_map, write_hf, tmp_path):
    """Even if the file outside has the right weights."""
    folder = write_hf(hf_model())
    outside = (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    if weight_map == {"a": "ABSOLUTE"}:
        weight_map = {"a": str(outside)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, r"model.safetensors.index.json is damaged \(its weight_map")


def test_shards_may_be_in_a_subfolder(write_hf):
    folder = write_hf(hf_model())
    (folder / "below").mkdir()
    (folder / "model.safetensors").rename(folder / "below" / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {KEY: "below/part.safetensors"}}))
    load_model(str(folder))


# -----------------------------------------------------------------------------
# weights

WRONG = {
    "int64": torch.Tensor.long, "int8": torch.Tensor.char, "bool": torch.Tensor.bool,
    "complex": lambda t: t.to(torch.complex64), "infinite": lambda t: t / 0,
    "NaN in a row": lambda t: t.index_fill(0, torch.tensor([3]), NAN)}
WRONG_IN_A_PICKLE = WRONG | {
    "sparse": torch.Tensor.to_sparse, "meta": lambda t: t.to("meta"), "text": lambda t: "x",
    "list": lambda t: [1, 2],
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)}


@pytest.mark.filterwarnings("ignore:TypedStorage", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("key", [KEY, "transformer.wte.weight", "transformer.ln_f.bias"])
def test_weights_that_are_not_finite_floats_are_refused(key, write_hf, make_run):
    theirs = hf_model()
    out_dir, model = make_run(CHARS)
    data = checkpoint.model_data(model, 0, 1.0, {}, CHARS)
    for layout, kinds in (("model.safetensors", WRONG), ("pytorch_model.bin", WRONG_IN_A_PICKLE),
                          ("ckpt.pt", WRONG_IN_A_PICKLE)):
        for change in kinds.values():
            if layout == "ckpt.pt":
                weights = data["model"] | {key: change(data["model"][key])}
                files.save(out_dir / layout, data | {"model": weights})
                refused(out_dir, rf"ckpt.pt: {key} (is|has|must be) ")
            else:
                tensors = hf_tensors(theirs)
                folder = write_hf(theirs, tensors | {key: change(tensors[key])}, layout, layout)
                refused(folder, rf"{layout}: {key} (is|has|must be) ")


def test_tensor_names_that_are_not_strings_are_refused(write_hf):
    tensors = hf_tensors(hf_model())
    refused(write_hf(hf_model(), tensors | {5: torch.ones(1)}, "pytorch_model.bin"), "not strings")


def test_masks_may_be_of_any_type(write_hf):
    """Masks are not read. Here one is boolean and the other is -inf."""
    tensors = hf_tensors(hf_model())
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.bool)
    tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-INF)
    load_model(str(write_hf(hf_model(), tensors)))


def test_adapters_that_are_not_finite_are_refused(make_run, tmp_path):
    base, _ = make_run(CHARS)
    model = tiny_gpt(CHARS.n_vocab)
    lora.add_lora(model, 2)
    weights = {name: p.detach() for name, p in lora.adapters(model).items()}
    next(iter(weights.values()))[0, 0] = NAN
    spec = dict(rank=2, base=str(base), hash=checkpoint.hash_of(str(base)), weights="float32")
    (tmp_path / "adapted").mkdir()
    files.save(tmp_path / "adapted" / "ckpt.pt",
               checkpoint.model_data(model, 0, 1.0, {}, CHARS, weights, lora_spec=spec))
    refused(tmp_path / "adapted", "lora_a has values that are NaN")


# -----------------------------------------------------------------------------
# each script

def test_each_script_refuses_bad_model_files_in_one_line(
        write_hf, make_dataset, tmp_path, monkeypatch, capsys):
    dataset, _ = make_dataset("chars")
    tensors = hf_tensors(hf_model())
    nan = tensors | {KEY: tensors[KEY] * NAN}
    sources = {"n_head=0": write_hf(hf_model(), name="heads", n_head=0),
               "NaN": write_hf(hf_model(), nan, name="nan"),
               "weight_map": write_hf(hf_model(), layout="model.safetensors.index.json")}
    (sources["weight_map"] / "model.safetensors.index.json").write_text('{"weight_map": []}')
    for source in sources.values():
        shutil.copy(dataset / "meta.pkl", source)
    for message, source in sources.items():
        for main, argv in ((sample.main, ["--device=cpu"]),
                           (evaluate.main, [f"--dataset={dataset}", "--device=cpu"]),
                           (export.main, [f"--export_dir={tmp_path / 'new'}"]),
                           (train.main, arguments(dataset, tmp_path / "out"))):
            status, _, err = run_script(monkeypatch, capsys, main,
                                        [*argv, f"--init_from={source}"])
            assert status == 1 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "new").exists()
