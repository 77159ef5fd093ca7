"""Fixtures shared by several test files: tiny datasets, Hugging Face folders, models and runs.

No test uses the network. Tests that need a file below ../shared (GPT-2's vocabulary, a real model)
are skipped if it does not exist.
"""
import json
import os
import pickle
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported

import numpy as np
import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file
from tiny import write_dataset, write_pairs

from model import GPT, GPTConfig
from nanotune import files
from nanotune.formats import checkpoint
from nanotune.text.tokenizer import EOT, tokenizer_of_dataset

SHARED = Path(__file__).resolve().parents[2] / "shared"
START, PAD = "<|startoftext|>", "<|pad|>"
TEXT = "".join(f"Line {i}: what's more, it ends.\n" for i in range(60))

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None,
                          max_examples=50)
settings.load_profile("repeatable")


def pytest_make_parametrize_id(val):
    """Use the values of dicts, lists, tuples and dtypes in test ids; pytest would number them."""
    return ascii(val)[:100] if isinstance(val, dict | list | tuple | torch.dtype) else None


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Use one thread: tiny tensors gain nothing from a second, and sums do not depend on the
    number of cores."""
    torch.set_num_threads(1)


@pytest.fixture
def shared():
    """shared("models/x") returns the path of ../shared/models/x; skips the test if it is absent."""
    def find(path):
        if not (SHARED / path).exists():
            pytest.skip(f"no ../shared/{path}")
        return SHARED / path
    return find


@pytest.fixture
def gpt2_vocabulary(shared, monkeypatch):
    """Make tiktoken load GPT-2's vocabulary offline, from TIKTOKEN_CACHE_DIR or ../shared."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("data/tiktoken")))


@pytest.fixture
def ranks(monkeypatch):
    """ranks(rank, size) sets the environment variables that torchrun sets."""
    def pretend(rank, size):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", size),
                            ("LOCAL_WORLD_SIZE", size)):
            monkeypatch.setenv(name, str(value))
    return pretend


def tiny_json(text=TEXT, vocab_size=300):
    """The text of a tokenizer.json: a byte-level BPE trained on `text`, with end-of-text."""
    from tokenizers import ByteLevelBPETokenizer
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=vocab_size, show_progress=False,
                                  special_tokens=[EOT])
    return tokenizer.to_str()


def save_tokenizer(folder, kind):
    """Write a folder with a tokenizer of this kind. "words": whole words and [UNK]. "unigram": a
    Unigram model with </s>, like T5's. Other kinds: a BPE with added special tokens; "old" has the
    old layout, "truncated" cuts texts to 8 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "words":
        vocab = {"[UNK]": 0, "Line": 1, ":": 2, "[END]": 3}
        tokenizer = Tokenizer(models.WordLevel(vocab, "[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.add_special_tokens(["[UNK]", "[END]"])
        names = {"eos_token": "[END]", "unk_token": "[UNK]"}
    elif kind == "unigram":
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁Line", -3.0)]
        tokenizer = Tokenizer(models.Unigram([*pieces, *((c, -4.0) for c in "abcdefghijklm: ")], 2))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
        tokenizer.enable_padding(pad_id=0, pad_token="<pad>", length=64)
        names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    else:
        tokenizer = Tokenizer.from_str(tiny_json())
        tokenizer.add_special_tokens([START, PAD])
        names = {"bos_token": START, "eos_token": EOT, "pad_token": PAD, "unk_token": EOT}
        if kind == "truncated":
            tokenizer.enable_truncation(8)
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    tokenizer.save(str(folder / "tokenizer.json"))
    if kind == "old":
        split_into_old_files(folder)


def split_into_old_files(folder):
    """Replace tokenizer.json with vocab.json, merges.txt and the files of the old layout."""
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    names = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer.json").unlink()
    for name, content in {
            "vocab.json": data["model"]["vocab"],
            "added_tokens.json": {t["content"]: t["id"] for t in data["added_tokens"][1:]},
            "special_tokens_map.json": {key: {"content": token} for key, token in names.items()
                                        if key.endswith("_token")},
            "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}}.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(
        f"{a} {b}\n" for a, b in data["model"]["merges"]), encoding="utf-8")


def write_tokenizer(folder, kind, text=TEXT):
    """Write the tokenizer file of a kind into a folder: 'chars', 'json' or 'gpt2' (no file)."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "chars":
        itos = dict(enumerate(sorted(set(text))))
        meta = {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    elif kind == "json":
        (folder / "tokenizer.json").write_text(tiny_json(text), encoding="utf-8")
    return tokenizer_of_dataset(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The folder of a tiny dataset (see tiny.write_dataset). Tests must not change it."""
    return write_dataset(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture
def make_dataset(tmp_path):
    """make_dataset("chars" | "json" | "gpt2") writes TEXT as train.bin and val.bin below tmp_path,
    with the tokenizer file; returns (folder, tokenizer). "gpt2" needs gpt2_vocabulary."""
    def make(kind="chars", name="words", text=TEXT):
        folder = tmp_path / "data" / name
        tokenizer = write_tokenizer(folder, kind, text)
        ids = np.array(tokenizer.encode(text), dtype="<u2")
        ids[:len(ids) * 9 // 10].tofile(folder / "train.bin")
        ids[len(ids) * 9 // 10:].tofile(folder / "val.bin")
        return folder, tokenizer
    return make


def tiny_gpt(vocab_size, seed=0, **fields):
    """A GPT in evaluation mode; its weights are large enough that each part changes the logits."""
    torch.manual_seed(seed)
    fields = dict(block_size=16, n_layer=2, n_head=2, n_embd=16) | fields
    model = GPT(GPTConfig(vocab_size=vocab_size, **fields)).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.2)
    return model


def greedy_reference(model, idx, new):
    """Greedy generation without a cache. As in stream(), a full context is cut to its last half."""
    size, begin = model.config.block_size, max(0, idx.size(1) - model.config.block_size)
    for _ in range(new):
        if idx.size(1) - begin > size:
            begin = idx.size(1) - max(1, size // 2)
        with torch.no_grad():
            logits = model.logits(idx[:, begin:])[:, -1]
        idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], dim=1)
    return idx


@pytest.fixture
def make_run(tmp_path):
    """make_run(tokenizer) writes the ckpt.pt of a tiny model; returns (out_dir, model)."""
    def make(tokenizer, name="out-tiny", vocab_size=None, **fields):
        model = tiny_gpt(vocab_size or tokenizer.n_vocab, **fields)
        out_dir = tmp_path / name
        out_dir.mkdir(exist_ok=True)
        files.save(out_dir / checkpoint.MODEL_FILE,
                        checkpoint.model_data(model, 0, 1.0, {}, tokenizer))
        return out_dir, model
    return make


def hf_model(neo=False, seed=0, **fields):
    """transformers' GPT-2 or GPT-Neo, tiny, in evaluation mode, with large weights."""
    import transformers as t
    torch.manual_seed(seed)
    fields = dict(vocab_size=61, bos_token_id=0, eos_token_id=0) | fields
    if neo:
        sizes = dict(max_position_embeddings=24, hidden_size=16, num_layers=3, num_heads=2,
                     attention_types=[[["global", "local"], 1], [["global"], 1]], window_size=5)
        model = t.GPTNeoForCausalLM(t.GPTNeoConfig(**sizes | fields)).eval()
    else:
        sizes = dict(n_positions=24, n_embd=16, n_layer=2, n_head=2)
        model = t.GPT2LMHeadModel(t.GPT2Config(**sizes | fields)).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.2)
    return model


def hf_t5(tied=True, seed=0, **fields):
    """transformers' T5, tiny, in evaluation mode, with large weights."""
    import transformers as t
    torch.manual_seed(seed)
    sizes = dict(vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
                 decoder_start_token_id=0, dropout_rate=0.0)
    model = t.T5ForConditionalGeneration(t.T5Config(**sizes | fields)).eval()
    if not tied:  # the class ties the head whatever the config says
        model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().clone())
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.2)
    return model


@pytest.fixture(scope="session")
def t5_folders(tmp_path_factory):
    """(folder of a tiny T5, folder of a dataset of pairs). Both have the same tokenizer; the
    model has 4 more rows than the tokenizer has ids."""
    model, data = (tmp_path_factory.mktemp("t5") / name for name in ("model", "pairs"))
    save_tokenizer(model, "unigram")
    theirs = hf_t5(vocab_size=24, d_ff=32)  # int8 needs a multiple of 16
    (model / "config.json").write_text(theirs.config.to_json_string(use_diff=False))
    save_file({name: p.detach().clone() for name, p in theirs.named_parameters()},
              model / "model.safetensors")
    for split, n in (("train", 60), ("val", 12)):
        write_pairs(data, n, split, vocab_size=20, seed=n)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, data)
    return model, data


def hf_tensors(model):
    """The tensors that save_pretrained writes: the state dict without a tied head."""
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


@pytest.fixture
def write_hf(tmp_path):
    """write_hf(model, tensors) writes config.json and the weights; returns the folder. `layout` is
    the name of the file of weights, or of the index of two shards."""
    def write(model, tensors=None, layout="model.safetensors", name="hf", **config):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        tensors = hf_tensors(model) if tensors is None else tensors
        hf = json.loads(model.config.to_json_string()) | config
        (folder / "config.json").write_text(json.dumps(hf))
        save = save_file if "safetensors" in layout else torch.save
        if not layout.endswith(".index.json"):
            save(tensors, folder / layout)
            return folder
        keys, stem = list(tensors), layout.removesuffix(".index.json")
        shards = {f"part-1-of-2.{stem}": keys[::2], f"part-2-of-2.{stem}": keys[1::2]}
        for shard, names in shards.items():
            save({key: tensors[key] for key in names}, folder / shard)
        (folder / layout).write_text(json.dumps(
            {"weight_map": {key: shard for shard, names in shards.items() for key in names}}))
        return folder
    return write
