"""GPT-Neo: the configs of the models on the hub, and finetuning from a pytorch_model.bin."""
from dataclasses import replace

import pytest
import torch
from conftest import hf_model, hf_tensors
from tiny import losses, run_train

import sample
from model import GPT, GPTConfig
from nanotune.formats import checkpoint, hf_config

# the fields of EleutherAI's config.json files that change the model: (fields, number of parameters)
HUB = {
    "gpt-neo-125m": (dict(hidden_size=768, num_layers=12, num_heads=12,
                          attention_types=[[["global", "local"], 6]]), 125_198_592),
    "gpt-neo-1.3B": (dict(hidden_size=2048, num_layers=24, num_heads=16,
                          attention_types=[[["global", "local"], 12]]), 1_315_575_808),
    "gpt-neo-2.7B": (dict(hidden_size=2560, num_layers=32, num_heads=20,
                          attention_types=[[["global", "local"], 16]]), 2_651_307_520),
}
COMMON = dict(
    model_type="gpt_neo", architectures=["GPTNeoForCausalLM"], activation_function="gelu_new",
    attention_dropout=0, embed_dropout=0, resid_dropout=0, intermediate_size=None,
    layer_norm_epsilon=1e-5, max_position_embeddings=2048, vocab_size=50257, window_size=256,
    bos_token_id=50256, eos_token_id=50256, gradient_checkpointing=False, use_cache=True,
    initializer_range=0.02, summary_type="cls_index", tokenizer_class="GPT2Tokenizer")


def windows(config):
    """The number of tokens that each layer sees, None for all, measured in a narrow model."""
    model, seen = GPT(replace(config, n_embd=16, n_head=2, vocab_size=61)), []
    def look(module, args):
        mask = args[2]  # 0 for a visible token, else -inf
        seen.append(None if mask is None else int((mask == 0).sum(1).max()))

    for block in model.transformer.h:
        block.attn.register_forward_pre_hook(look)
    model.logits(torch.zeros(1, 300, dtype=torch.long))
    return seen


@pytest.mark.parametrize("name", HUB)
def test_the_hubs_configs_give_the_known_sizes_and_windows(name):
    fields, n_params = HUB[name]
    fields = fields | {"attention_layers": ["global", "local"] * (fields["num_layers"] // 2)}
    config = GPTConfig(**hf_config.config_from_hf(COMMON | fields, name))
    with torch.device("meta"):
        model = GPT(config)
    assert model.num_params() == n_params
    assert windows(config)[:4] == [None, 256, None, 256]
    assert model.config.block_size == 2048 and model.transformer.h[0].attn.c_attn.bias is None


@pytest.fixture
def neo_folder(write_hf):
    """(a GPT-Neo folder like older ones of the hub, transformers' model). pytorch_model.bin is in
    float16, with masks and with a copy of the embedding as the head."""
    theirs = hf_model(neo=True, vocab_size=40).half().float()
    tensors = {key: t.half() for key, t in hf_tensors(theirs).items()}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    for layer in range(3):
        stem = f"transformer.h.{layer}.attn.attention"
        tensors[f"{stem}.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.uint8).tril()
        tensors[f"{stem}.masked_bias"] = torch.tensor(-1e9)
    return write_hf(theirs, tensors, layout="pytorch_model.bin", name="neo"), theirs


TEXT = "".join(f"line {i} of a text, and more of it.\n" for i in range(60))


@pytest.mark.parametrize("block_size", [4, 12])  # less than the window of 5, and more
def test_gpt_neo_is_finetuned_cropped_and_resumed(
        block_size, neo_folder, make_dataset, tmp_path, capsys):
    folder, theirs = neo_folder
    data, tokenizer = make_dataset("chars", text=TEXT)
    (folder / "meta.pkl").write_bytes((data / "meta.pkl").read_bytes())
    fields = dict(block_size=block_size, n_layer=None, n_head=None, n_embd=None)
    assert run_train(data, tmp_path / "whole", init_from=folder, **fields) == 0
    assert run_train(data, tmp_path / "parts", init_from=folder, max_iters=3,
                     lr_decay_iters=6, **fields) == 0
    assert run_train(data, tmp_path / "parts", init_from="resume", **fields) == 0
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert [e for e in whole if "step" in e] == [e for e in parts if "step" in e]
    first, last = ([e["val_loss"] for e in whole if "step" in e][i] for i in (0, -1))
    assert last < first

    for saved in ("whole", "parts"):
        model, _ = checkpoint.load_model(str(tmp_path / saved))
        assert model.config.local_window == 5 and model.config.block_size == block_size
    # the run started from transformers' model: the same logits
    start, _ = checkpoint.load_model(str(folder), block_size)
    idx = torch.tensor([tokenizer.encode(TEXT[:block_size])])
    with torch.no_grad():
        torch.testing.assert_close(start.eval().logits(idx), theirs(idx).logits, atol=1e-4, rtol=0)
    capsys.readouterr()
    sample.main([f"--out_dir={tmp_path / 'whole'}", "--start=line", "--max_new_tokens=30",
                 "--num_samples=1", "--temperature=0", "--device=cpu", "--dtype=float32"])
    assert len(capsys.readouterr().out) > 30
