"""Hugging Face models: every layout of their files, bad files and configs, and a local hub."""
import functools
import json
import threading
import time
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from conftest import PAD, START, hf_model, hf_tensors, save_tokenizer, tiny_gpt
from huggingface_hub import constants

from model import GPT, GPTConfig
from nanotune.errors import UserError
from nanotune.formats import checkpoint, hf_config
from nanotune.text.tokenizer import EOT, tokenizer_of_folder, tokenizer_of_source

KEY = "transformer.h.1.mlp.c_fc.weight"


def same_logits(folder, theirs, block_size=24, dropout=0.0):
    """Load the folder, assert that its logits equal those of transformers, and return the model."""
    ours = GPT.from_pretrained(str(folder), dropout)
    ours.crop_block_size(block_size)
    assert ours.training and {p.dtype for p in ours.parameters()} == {torch.float32}
    idx = torch.arange(2 * ours.config.block_size).view(2, -1) % 61
    with torch.no_grad():
        torch.testing.assert_close(ours.eval().logits(idx), theirs(idx).logits, atol=1e-4, rtol=0)
    return ours


# -----------------------------------------------------------------------------
# layouts

def with_masks(tensors, n_layer, prefix=""):
    """`tensors` with the masks that older files store like weights."""
    masks = {}
    for layer in range(n_layer):
        masks[f"{prefix}h.{layer}.attn.bias"] = torch.ones(24, 24).tril().view(1, 1, 24, 24)
        if prefix:
            masks[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return masks | tensors


def openai(tensors):
    """The layout of OpenAI's repos: no prefix, and masks."""
    return with_masks({k.removeprefix("transformer."): t for k, t in tensors.items()}, 2)


LAYOUTS = {
    "plain": lambda tensors: tensors,
    "OpenAI's": openai,
    "masks": lambda tensors: with_masks(tensors, 2, "transformer."),
    "equal head": lambda tensors: tensors | {
        "lm_head.weight": tensors["transformer.wte.weight"].clone()},
    "fp16": lambda tensors: {k: t.half() for k, t in tensors.items()},
    "bf16": lambda tensors: {k: t.bfloat16() for k, t in tensors.items()},
    "fp64": lambda tensors: {k: t.double() for k, t in tensors.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("file", [
    "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_every_layout_of_gpt2_is_loaded(layout, file, write_hf):
    theirs = hf_model()
    tensors = LAYOUTS[layout](hf_tensors(theirs))
    with torch.no_grad():  # round to the file's dtype
        for name, param in theirs.named_parameters():
            stored = tensors.get(name, tensors.get(name.removeprefix("transformer.")))
            param.copy_(stored)
    ours = same_logits(write_hf(theirs, tensors, file), theirs)
    assert ours.config.tied_head and ours.lm_head.weight is ours.transformer.wte.weight


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("says_tied", [True, False], ids=["config ties", "config unties"])
def test_an_untied_head_is_loaded_whatever_the_config_says(file, says_tied, write_hf):
    theirs = hf_model(tie_word_embeddings=False)
    folder = write_hf(theirs, layout=file, tie_word_embeddings=says_tied)
    ours = same_logits(folder, theirs)
    assert not ours.config.tied_head
    assert not torch.equal(ours.lm_head.weight, ours.transformer.wte.weight)


def test_a_head_that_the_config_unties_stays_untied_even_if_equal(write_hf):
    theirs = hf_model(tie_word_embeddings=False)
    with torch.no_grad():
        theirs.lm_head.weight.copy_(theirs.transformer.wte.weight)
    ours = same_logits(write_hf(theirs), theirs)
    assert ours.lm_head.weight is not ours.transformer.wte.weight


@pytest.mark.parametrize("file", ["model.safetensors", "model.safetensors.index.json",
                                  "pytorch_model.bin"])
def test_gpt_neo_is_loaded_from_files_with_masks(file, write_hf):
    theirs = hf_model(neo=True)
    tensors = hf_tensors(theirs)
    for layer in range(3):
        stem = f"transformer.h.{layer}.attn.attention"
        tensors[f"{stem}.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril()
        tensors[f"{stem}.masked_bias"] = torch.tensor(-1e9)
    same_logits(write_hf(theirs, tensors, file), theirs)


def test_folders_of_save_pretrained_are_loaded(tmp_path):
    for neo in (False, True):
        theirs = hf_model(neo=neo)
        theirs.save_pretrained(tmp_path / str(neo))
        same_logits(tmp_path / str(neo), theirs)


def test_a_bin_from_before_torch_1_6_is_loaded(write_hf):
    """Older repos of the hub have such files. They are no zip files and cannot be memory-mapped."""
    theirs = hf_model()
    folder = write_hf(theirs, {}, layout="pytorch_model.bin")
    torch.save(hf_tensors(theirs), folder / "pytorch_model.bin",
               _use_new_zipfile_serialization=False)
    same_logits(folder, theirs)


def test_safetensors_are_preferred_to_a_bin(write_hf):
    theirs = hf_model()
    folder = write_hf(theirs)
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    same_logits(folder, theirs)


def test_a_loaded_model_takes_a_shorter_context_and_dropout(write_hf):
    theirs = hf_model()
    ours = same_logits(write_hf(theirs), theirs, block_size=10, dropout=0.25)
    assert ours.config.block_size == 10 and ours.transformer.wpe.weight.shape == (10, 16)
    assert ours.config.dropout == ours.transformer.h[0].mlp.dropout == 0.25
    assert [block.attn.dropout for block in ours.transformer.h] == [0.25, 0.25]
    with pytest.raises(UserError, match="block_size=25 is more than the 24 positions"):
        GPT.from_pretrained(str(write_hf(theirs))).crop_block_size(25)


def test_a_real_model_gives_transformers_logits(shared):
    folder = shared("models/gutenberg-17m")
    from transformers import GPT2LMHeadModel
    theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    ours = GPT.from_pretrained(str(folder)).eval()
    idx = torch.randint(50257, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(idx), theirs(idx).logits, atol=1e-4, rtol=0)


# -----------------------------------------------------------------------------
# weights that do not fit

def without(key):
    return lambda tensors: {k: t for k, t in tensors.items() if k != key}


def with_tensor(key, *shape):
    return lambda tensors: tensors | {key: torch.ones(*shape)}


@pytest.mark.parametrize("neo, change, message", [
    (False, without(KEY), f"no tensor for {KEY};"),
    (False, without("transformer.wte.weight"), "no tensor for transformer.wte.weight;"),
    (False, lambda tensors: {}, r"no tensor for (transformer\S+, ){2}\S+ and 25 more"),
    (True, without("transformer.h.1.attn.attention.k_proj.weight"),
     "no tensor for transformer.h.1.attn.c_attn.weight;"),
    (False, with_tensor("score.weight", 2, 16), "score.weight is not part of the model"),
    (False, with_tensor("transformer.h.2.ln_1.weight", 16), "h.2.ln_1.weight is not part"),
    (False, with_tensor("h.1.mlp.c_fc.weight", 16, 64), r"h.1.mlp.c_fc.\w+ .*stored twice"),
    (True, with_tensor("transformer.h.0.attn.attention.q_proj.bias", 16),
     "q_proj.bias is not part of the model"),
    (False, with_tensor(KEY, 64, 16), rf"{KEY} has shape \(64, 16\).* implies \(16, 64\)"),
    (False, with_tensor("transformer.wpe.weight", 23, 16), r"wpe.weight .*\(23, 16\).*\(24, 16"),
    (False, with_tensor("transformer.ln_f.bias", 1), r"ln_f.bias has shape \(1,\).*\(16,\)"),
    (True, with_tensor("transformer.h.0.attn.attention.v_proj.weight", 16, 1),
     r"v_proj.weight has shape \(16, 1\).*\(16, 16\)"),
    (False, with_tensor("lm_head.weight", 60, 16), r"lm_head.weight has shape \(60, 16\)"),
])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_tensors_that_do_not_fit_are_refused(neo, change, message, file, write_hf):
    theirs = hf_model(neo=neo)
    folder = write_hf(theirs, change(hf_tensors(theirs)), file)
    with pytest.raises(UserError, match=message) as error:
        GPT.from_pretrained(str(folder))
    assert file in str(error.value) and "\n" not in str(error.value)


def test_a_head_does_not_replace_a_missing_embedding(write_hf):
    """safetensors' save_model writes a tied weight once, perhaps as the head. The error names the
    missing tensor."""
    theirs = hf_model()
    tensors = hf_tensors(theirs)
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    with pytest.raises(UserError, match=r"no tensor for transformer.wte.weight"):
        GPT.from_pretrained(str(write_hf(theirs, tensors)))


def test_a_missing_untied_head_is_refused(write_hf):
    theirs = hf_model(tie_word_embeddings=False)
    folder = write_hf(theirs, without("lm_head.weight")(hf_tensors(theirs)))
    with pytest.raises(UserError, match=r"no tensor for lm_head.weight"):
        GPT.from_pretrained(str(folder))


@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
def test_the_same_tensor_in_two_shards_is_refused(stem, write_hf):
    theirs = hf_model()
    folder = write_hf(theirs, layout=f"{stem}.index.json")
    first, second = (folder / f"part-{i}-of-2.{stem}" for i in (1, 2))
    second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=r"part-2\S+: the tensor \S+ is not part .*twice"):
        GPT.from_pretrained(str(folder))


# -----------------------------------------------------------------------------
# damaged files

@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:-9], lambda data: data[:len(data) // 2],
    lambda data: b"<html>" + data, lambda data: b"version https://git-lfs.github.com/spec/v1\n",
], ids=["empty", "cut", "half", "html", "LFS pointer"])
def test_damaged_weights_are_refused(file, damage, write_hf):
    folder = write_hf(hf_model(), layout=file)
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    with pytest.raises(UserError, match=rf"{file} .*damaged.*") as error:
        GPT.from_pretrained(str(folder))
    assert "\n" not in str(error.value)


def test_a_bin_that_is_not_a_state_dict_is_refused(write_hf):
    folder = write_hf(hf_model(), layout="pytorch_model.bin")
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin is damaged"):
        GPT.from_pretrained(str(folder))


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_a_bin_that_carries_code_is_refused_and_not_run(zipped, write_hf, tmp_path):
    folder = write_hf(hf_model(), layout="pytorch_model.bin")
    torch.save({"transformer.wte.weight": Code(str(tmp_path / "run"))},
               folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"pytorch_model.bin carries code .*nothing in it was run"):
        GPT.from_pretrained(str(folder))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text, message", [
    (b"", "config.json is damaged"), (b"{", "config.json is damaged"),
    (b"\xff\xfe{}", "config.json is damaged"), (b"[]", "config.json is damaged"),
    (b"{}", "is a None model"),
])
def test_a_damaged_config_is_refused(text, message, write_hf):
    folder = write_hf(hf_model())
    (folder / "config.json").write_bytes(text)
    with pytest.raises(UserError, match=message):
        GPT.from_pretrained(str(folder))


def test_missing_files_are_refused(write_hf, tmp_path):
    folder = write_hf(hf_model(), layout="model.safetensors.index.json")
    (folder / "part-2-of-2.model.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard part-2-of-2.model.safetensors, listed .* missing"):
        GPT.from_pretrained(str(folder))
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"has none of model.safetensors, .*pytorch_model.bin"):
        GPT.from_pretrained(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config.json"):
        GPT.from_pretrained(str(folder))


# -----------------------------------------------------------------------------
# configs

def edit_json(file, change):
    """change() changes the content of a JSON file in place."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("neo, fields, message", [
    (False, dict(model_type="llama"), "is a 'llama' model; .*gpt2, gpt_neo, t5"),
    (False, dict(model_type="gpt_neox"), "is a 'gpt_neox' model"),
    (False, dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    (False, dict(reorder_and_upcast_attn=True), "reorder_and_upcast_attn=True"),
    (False, dict(add_cross_attention=True), "add_cross_attention=True"),
    (False, dict(activation_function="relu"), "activation_function='relu'; .* supports gelu_new"),
    (True, dict(activation_function="silu"), "activation_function='silu'"),
    (True, dict(attention_layers=["global"] * 3), r"attention_layers=\['global', 'global', 'glob"),
    (True, dict(attention_layers=["local", "global", "local"]), "attention_layers="),
    (True, dict(attention_layers=["global", "local"]), "attention_layers=.* for 3 layers"),
    (True, dict(attention_layers=None), "attention_layers=None"),
    *((True, dict(attention_types=types), "attention_types=") for types in (
        [[["global"], 3]], [[["local", "global"], 1], [["local"], 1]], [[["global", "local"], 1]],
        [], 5, "x", [5], [[["global", "local"], "x"]], [[["global", "local"], 10**12]], {"a": 1})),
])
def test_unsupported_configs_are_refused(neo, fields, message, write_hf):
    folder = write_hf(hf_model(neo=neo), **fields)
    if "attention_types" in fields:
        edit_json(folder / "config.json", lambda hf: hf.pop("attention_layers"))
    with pytest.raises(UserError, match=message) as error:
        GPT.from_pretrained(str(folder))
    assert "\n" not in str(error.value)


def as_transformers_reads(config):
    """A config.json with the values that transformers fills in."""
    from transformers import AutoConfig
    kind = config["model_type"]
    rest = {key: value for key, value in config.items() if key != "model_type"}
    return json.loads(AutoConfig.for_model(kind, **rest).to_json_string())


@pytest.mark.parametrize("neo", [False, True], ids=["gpt2", "neo"])
def test_a_missing_key_means_transformers_default(neo):
    """Configs without each key in turn, without all keys, and with other names of the sizes."""
    whole = dict(layer_norm_epsilon=1e-3, activation_function="gelu", tie_word_embeddings=False)
    whole |= dict(num_layers=24, attention_types=None, window_size=7, intermediate_size=40) if neo \
        else dict(scale_attn_weights=False, n_inner=40)
    whole = json.loads(hf_model(neo=neo).config.to_json_string()) | whole
    whole.pop("attention_layers", None)
    layout = hf_config.LAYOUTS[whole["model_type"]]
    assert set(layout.fields.values()) <= layout.defaults.keys() <= whole.keys()
    configs = [{k: v for k, v in whole.items() if k != key}
               for key in layout.defaults] + [{"model_type": whole["model_type"]}]
    configs += [whole | {other: 24} for other in layout.other_names]
    if neo:  # attention_layers has precedence over attention_types
        configs.append(whole | dict(num_layers=3, attention_layers=["global", "local", "global"]))
    found = [hf_config.config_from_hf(config, "x") for config in configs]
    assert found == [hf_config.config_from_hf(as_transformers_reads(c), "x") for c in configs]
    assert len({str(fields) for fields in found}) >= len(layout.defaults)


NEO = dict(attn_scale=1.0, qkv_bias=False, local_window=5)


@pytest.mark.parametrize("fields", [
    dict(), dict(n_inner=40, norm_eps=1e-3), dict(activation="gelu"), dict(attn_scale=1.0),
    dict(tied_head=False), NEO, NEO | dict(n_layer=3, n_inner=24), NEO | dict(n_layer=1),
])
def test_configs_are_the_same_after_a_round_trip_through_transformers(fields):
    from transformers import AutoConfig
    config = tiny_gpt(61, **fields).config
    theirs = json.loads(json.dumps(hf_config.config_to_hf(asdict(config))))
    assert GPTConfig(**hf_config.config_from_hf(theirs, "x")) == config
    # through transformers' own reading and writing too
    kind = theirs.pop("model_type")
    again = json.loads(AutoConfig.for_model(kind, **theirs).to_json_string())
    assert asdict(GPTConfig(**hf_config.config_from_hf(again, "x"))) == asdict(config)


# -----------------------------------------------------------------------------
# the hub

@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A local hub with the folders of `hub.repos`, {id: folder}. A request for another id is
    answered with `hub.other`: (status, error code)."""
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            repo, _, file = self.path[1:].partition("/resolve/main/")
            path = hub.repos[repo] / file if repo in hub.repos else None
            hub.asked.append(file)
            if path is None or not path.is_file():
                status, code = (404, "EntryNotFound") if path else hub.other
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                return self.end_headers()
            data = path.read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("ETag", f'"{file}{len(data)}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data[:hub.cut.get(file)])
                self.close_connection = file in hub.cut

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    hub = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.daemon_threads = True
    hub.repos, hub.asked, hub.cut, hub.other = {}, [], {}, (404, "RepoNotFound")
    url = f"http://127.0.0.1:{hub.server_port}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the library's retries
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", functools.partial(
        huggingface_hub.hf_hub_download, endpoint=url, cache_dir=tmp_path / "cache", token=False,
        etag_timeout=5))
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", functools.partial(
        huggingface_hub.hf_hub_url, endpoint=url))
    huggingface_hub.close_session()
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield hub
    hub.shutdown()
    hub.server_close()
    huggingface_hub.close_session()


@pytest.mark.parametrize("file", ["model.safetensors", "model.safetensors.index.json",
                                  "pytorch_model.bin"])
def test_a_model_is_loaded_from_the_hub_and_then_from_the_cache(hub, file, write_hf, monkeypatch):
    theirs = hf_model()
    hub.repos["someone/gpt"] = write_hf(theirs, layout=file)
    same_logits("someone/gpt", theirs)
    assert hub.asked
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    same_logits("someone/gpt", theirs)
    assert not hub.asked


@pytest.mark.parametrize("kind", ["added", "old"])
def test_a_tokenizer_is_loaded_from_the_hub(hub, kind, tmp_path):
    """With all of its files, also those with the names of special tokens and with added tokens."""
    save_tokenizer(tmp_path / "odd", kind)
    (tmp_path / "odd" / "config.json").write_text("{}")
    hub.repos["someone/odd"] = tmp_path / "odd"
    found, ours = tokenizer_of_source("someone/odd"), tokenizer_of_folder(tmp_path / "odd")
    assert (found.spec, found.special) == (ours.spec, ours.special)
    assert set(ours.special.values()) == {EOT, START, PAD}


@pytest.mark.parametrize("how", ["refused", "unknown host"])
def test_an_unreachable_hub_is_reported_without_retries(how, monkeypatch, tmp_path):
    """The library's own retries, which take half a minute, are disabled."""
    url = {"refused": "http://127.0.0.1:9", "unknown host": "http://nosuch.invalid"}[how]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it retries"))
    for name in ("hf_hub_download", "hf_hub_url"):
        options = {"cache_dir": tmp_path, "token": False} if name == "hf_hub_download" else {}
        monkeypatch.setattr(huggingface_hub, name, functools.partial(
            getattr(huggingface_hub, name), endpoint=url, **options))
    with pytest.raises(UserError, match="hub cannot be reached for someone/gpt"):
        GPT.from_pretrained("someone/gpt")


def test_a_local_folder_named_gpt2_is_preferred_to_the_hub(write_hf, tmp_path, monkeypatch, capsys):
    """Its config, weights and tokenizer are used; a note says so."""
    theirs = hf_model()
    folder = write_hf(theirs, name="gpt2")
    save_tokenizer(folder, "words")
    monkeypatch.chdir(tmp_path)
    assert checkpoint.model_config("gpt2").n_layer == theirs.config.n_layer == 2
    model, tokenizer = checkpoint.load_model("gpt2")
    assert model.config.n_layer == 2 and tokenizer.special["eos_token"] == "[END]"
    assert tokenizer_of_source("gpt2").identity == tokenizer.identity
    assert "note: gpt2 is a local folder" in capsys.readouterr().out


def test_a_model_that_does_not_exist_on_the_hub_is_refused(hub):
    with pytest.raises(UserError, match="nobody/none is neither a folder on this machine nor"):
        GPT.from_pretrained("nobody/none")
    with pytest.raises(UserError, match="neither a folder on this machine nor a model"):
        GPT.from_pretrained("no such/name at all")


def test_a_gated_model_is_refused(hub):
    hub.other = (403, "GatedRepo")
    with pytest.raises(UserError, match=r"meta/x is gated: accept its terms"):
        GPT.from_pretrained("meta/x")


def test_a_repo_of_the_hub_without_a_model_is_refused(hub, write_hf):
    folder = hub.repos["someone/other"] = write_hf(hf_model())
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"someone/other has none of model.safetensors"):
        GPT.from_pretrained("someone/other")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"someone/other has no config.json"):
        GPT.from_pretrained("someone/other")


@pytest.mark.parametrize("how", ["offline", "down", "server error"])
def test_an_unreachable_hub_is_a_one_line_error_with_a_download_command(hub, how, monkeypatch):
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "down":
        hub.shutdown()
        hub.server_close()
    else:
        hub.other = (503, "")
    with pytest.raises(UserError, match=r"hub cannot be reached for gpt2, .*hf download gpt2 "
                                         r"--local-dir FOLDER.*give FOLDER instead") as error:
        GPT.from_pretrained("gpt2")
    assert "\n" not in str(error.value)


def test_an_interrupted_download_is_a_one_line_error(hub, write_hf):
    hub.repos["someone/gpt"] = write_hf(hf_model())
    hub.cut["model.safetensors"] = 100
    with pytest.raises(UserError, match="hub cannot be reached for someone/gpt") as error:
        GPT.from_pretrained("someone/gpt")
    assert "\n" not in str(error.value)
