"""T5 compared with transformers' T5ForConditionalGeneration: numbers, generation, files."""
import json

import pytest
import torch
from conftest import hf_t5, save_tokenizer

import t5
from nanotune.errors import UserError
from nanotune.formats import checkpoint, hf, hf_config
from nanotune.formats.checkpoint import load_model
from nanotune.generation.fast import for_generation
from nanotune.generation.generate import stream
from nanotune.text.tokenizer import tokenizer_of_folder
from nanotune.training.lora import adapters, add_lora, merge_lora
from t5 import T5, T5Config, bucket_of

GATED = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)  # as t5-v1_1 and flan
SHAPES = {
    "relu, tied": {},
    "gated, untied": GATED | {"tied": False},
    "odd d_kv, more decoder layers": dict(d_kv=5, num_decoder_layers=3),
    "fewer buckets, 4 heads": dict(num_heads=4, relative_attention_num_buckets=8,
                                   relative_attention_max_distance=20),
}


def tensors_of(theirs):
    """The tensors that save_pretrained writes: each tied weight once."""
    return {name: p.detach().clone() for name, p in theirs.named_parameters()}


@pytest.fixture
def make_t5(write_hf):
    """make_t5(shape of SHAPES) -> (transformers' model, our T5 loaded from its folder)."""
    def make(shape="relu, tied", **fields):
        theirs = hf_t5(**SHAPES[shape] | fields)
        tied = {} if SHAPES[shape].get("tied", True) else {"tie_word_embeddings": False}
        folder = write_hf(theirs, tensors_of(theirs), **tied)
        return theirs, T5.from_pretrained(str(folder)).eval()
    return make


def pairs(B=3, S=40, T=36, vocab_size=61):
    """(x, y) with padded rows; some targets inside a row are -1."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(2, vocab_size, (B, S), generator=generator)
    y = torch.randint(2, vocab_size, (B, T), generator=generator)
    x[1, 30:], x[2, 3:], y[1, 20:], y[2, 5:9] = -1, -1, -1, -1
    return x, y


def reference(theirs, x, y):
    return theirs(input_ids=x.clamp(min=0), attention_mask=(x != -1).long(),
                  labels=y.masked_fill(y == -1, -100))


def test_buckets_of_distances_are_those_of_the_paper():
    """Compare the smallest distance of each bucket."""
    back = bucket_of(-torch.arange(200), 32, 128, both_ways=False)
    first = [int((back == bucket).nonzero()[0]) for bucket in range(32)]
    assert first == [*range(16), 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    assert int(bucket_of(torch.arange(1, 9), 32, 128, both_ways=False).max()) == 0
    ahead = bucket_of(torch.arange(1, 200), 32, 128, both_ways=True)
    before = bucket_of(-torch.arange(200), 32, 128, both_ways=True)
    wide = [8, 12, 16, 23, 32, 46, 64, 91]
    assert [int((before == b).nonzero()[0]) for b in range(16)] == [*range(8), *wide]
    assert [int((ahead == 16 + b).nonzero()[0]) + 1 for b in range(1, 16)] == [*range(1, 8), *wide]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)],
                         ids=["float32", "float64"])
def test_logits_loss_and_gradients_equal_those_of_transformers(shape, dtype, tolerance, make_t5):
    theirs, ours = make_t5(shape)
    theirs.to(dtype), ours.to(dtype)
    ours.tie_head()
    x, y = pairs()
    expected = reference(theirs, x, y)
    scale = float(expected.logits.detach().abs().max())
    logits = ours.lm_head(ours.hidden(x, y))
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=tolerance * scale)
    at = torch.cat(list(ours.logits_at(x, y)))
    torch.testing.assert_close(at, logits[y != -1].float())
    loss = ours(x, y) / (y != -1).sum()
    torch.testing.assert_close(loss, expected.loss, rtol=tolerance, atol=tolerance)
    loss.backward(), expected.loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    layout = hf_config.layout_of(vars(ours.config))
    for name, param in ours.named_parameters():
        grad = torch.cat([grads[key] for key in hf_config.keys_of(name, layout)[0]])
        torch.testing.assert_close(param.grad, grad, rtol=tolerance, atol=10 * tolerance, msg=name)


def test_recompute_is_bitwise_the_same_and_bfloat16_near(make_t5):
    _, ours = make_t5("gated, untied")
    x, y = pairs()
    loss = ours(x, y)
    loss.backward()
    grads = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    ours.recompute = True
    again = ours(x, y)
    again.backward()
    assert again == loss and all(
        torch.equal(p.grad, g) for p, g in zip(ours.parameters(), grads))
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(ours(x, y) / loss - 1) < 0.02
    ours.set_dtype(torch.bfloat16)
    assert abs(ours(x, y) / loss - 1) < 0.02


# -----------------------------------------------------------------------------
# generation

def greedy(model, prompts, new=12, **options):
    return torch.stack(list(stream(model, prompts, new, temperature=0, **options)), 1)


PROMPTS = [[5, 9, 33, 1], [7, 8], [*range(2, 40), 1]]  # the second gets its end token


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_equal_those_of_transformers(shape, make_t5):
    """Alone and batched. transformers' cache fails if the decoder has more layers than the
    encoder."""
    theirs, ours = make_t5(shape)
    batched = greedy(ours, PROMPTS)
    for ids, together in zip(PROMPTS, batched):
        source = torch.tensor([ids if ids[-1] == 1 else [*ids, 1]])
        expected = theirs.generate(source, max_new_tokens=12, min_new_tokens=12, do_sample=False,
                                   use_cache="more decoder" not in shape, eos_token_id=None)
        assert greedy(ours, [ids]).tolist() == expected[:, 1:].tolist() == [together.tolist()]


def test_cached_steps_equal_one_forward_pass(make_t5):
    """Steps of one token and of several, also after a rewind and a reorder."""
    _, ours = make_t5("gated, untied")
    x, y = pairs(T=8)
    sources = [row[row != -1].tolist()[:-1] + [1] for row in x]
    x = torch.nn.utils.rnn.pad_sequence(map(torch.tensor, sources), True, -1)
    y = y.clamp(min=2)
    with torch.no_grad():
        whole = ours.lm_head(ours.hidden(x, y))
        cache, logits = ours.start(sources, room=len(y[0]))
        steps = [logits] + [ours.step(y[:, t:t + 1], cache) for t in range(7)]
        torch.testing.assert_close(torch.stack(steps, 1), whole)
        assert cache.pos == 8 and not cache.full
        cache.rewind(1)
        torch.testing.assert_close(ours.step(y[:, :5], cache), whole[:, 5])
        rows = torch.tensor([2, 0, 0])
        cache.reorder(rows)
        torch.testing.assert_close(ours.step(y[rows, 5:7], cache), whole[rows, 7])
        ours.step(y[rows, 7:], cache)
        assert cache.full


def test_a_model_packed_for_generation_gives_the_same_tokens(make_t5):
    _, ours = make_t5("gated, untied")
    expected = greedy(ours, PROMPTS, repetition_penalty=1.5)
    packed = for_generation(ours, torch.device("cpu"), torch.float32, compiled=True)
    assert packed is ours and greedy(packed, PROMPTS, repetition_penalty=1.5).equal(expected)


def test_the_repetition_penalty_ignores_tokens_of_the_source(make_t5):
    """As in transformers, it counts only generated tokens, so the first token has no penalty."""
    _, ours = make_t5()
    for token in range(2, 61):
        first = greedy(ours, [[token, 1]], 1)
        assert greedy(ours, [[token, 1]], 1, repetition_penalty=100.0).equal(first)


# -----------------------------------------------------------------------------
# files

def test_lora_adapts_each_matrix_and_merges(make_t5):
    _, ours = make_t5("gated, untied")
    x, y = pairs()
    before = ours(x, y)
    add_lora(ours, rank=2)
    assert ours(x, y) == before and len(adapters(ours)) == 2 * (2 * 4 + 2 * 7)
    with torch.no_grad():
        for param in adapters(ours).values():
            param.normal_(std=0.1)
    adapted = ours(x, y)
    assert abs(adapted - before) > 0.1
    merge_lora(ours)
    torch.testing.assert_close(ours(x, y), adapted)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_export_equals_the_model_of_transformers(shape, make_t5, tmp_path):
    import transformers
    theirs, ours = make_t5(shape)
    folder = tmp_path / "export"
    folder.mkdir()
    hf.write_hf(folder, vars(ours.config), dict(ours.named_parameters()), None, torch.float32)
    read = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    x, y = pairs()
    torch.testing.assert_close(reference(read, x, y).logits, reference(theirs, x, y).logits)
    back = T5.from_pretrained(str(folder)).eval()
    assert back.config == ours.config and back(x, y) == ours(x, y)


@pytest.mark.parametrize("style", ["4.x", "5.x"])
@pytest.mark.parametrize("shape, scale, tied", [
    ("relu, tied", True, True), ("gated, untied", False, False)])
def test_config_files_of_transformers_4_and_5_are_read(style, shape, scale, tied, make_t5,
                                                       write_hf):
    """In 4.x tie_word_embeddings also says whether to scale the head. In 5.x it is always true, and
    scale_decoder_outputs says whether to scale."""
    theirs, ours = make_t5(shape)
    keys = (dict(tie_word_embeddings=tied, scale_decoder_outputs=None) if style == "4.x"
            else dict(tie_word_embeddings=True, scale_decoder_outputs=scale))
    folder = write_hf(theirs, tensors_of(theirs), **keys)
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    read = T5.from_pretrained(str(folder)).eval()
    assert (read.config.scale_head, read.config.tied_head) == (scale, tied)
    assert read(*pairs()) == ours(*pairs())


def test_a_tied_head_that_is_not_scaled_is_written_untied(make_t5, tmp_path):
    """Versions of transformers before 5 would scale a tied head."""
    _, ours = make_t5("relu, tied", tie_word_embeddings=False)
    assert (ours.config.tied_head, ours.config.scale_head) == (True, False)
    hf.write_hf(tmp_path, vars(ours.config), dict(ours.named_parameters()), None, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    back = T5.from_pretrained(str(tmp_path))
    assert back.config == ours.config and back(*pairs()) == ours(*pairs())


def old_file(tensors):
    """As in old files of the hub: the embedding three times, and a table that is not used."""
    stray = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    return tensors | {f"{stack}.embed_tokens.weight": tensors["shared.weight"].clone()
                      for stack in ("encoder", "decoder")} | {stray: torch.zeros(32, 2)}


@pytest.mark.parametrize("layout", ["model.safetensors", "pytorch_model.bin",
                                    "model.safetensors.index.json"])
@pytest.mark.parametrize("half", [False, True])
def test_each_layout_of_files_on_the_hub_is_read(layout, half, make_t5, write_hf):
    theirs, ours = make_t5()
    tensors = old_file(tensors_of(theirs))
    tensors = {key: t.half() if half else t for key, t in tensors.items()}
    read, _ = load_model(str(write_hf(theirs, tensors, layout, name="old")))
    for (name, p), q in zip(read.named_parameters(), ours.parameters()):
        assert torch.equal(p, q.half().float() if half else q), name


def test_an_embedding_only_under_another_name_is_read(make_t5, write_hf):
    theirs, ours = make_t5()
    tensors = tensors_of(theirs)
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    read = T5.from_pretrained(str(write_hf(theirs, tensors, name="old")))
    assert torch.equal(read.shared.weight, ours.shared.weight)


def refused(call, *parts):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts)


@pytest.mark.parametrize("fields, parts", [
    (dict(feed_forward_proj="gated-silu"), ("feed_forward_proj='gated-silu'", "gated-gelu")),
    (dict(model_type="mt5"), ("'mt5'", "t5")), (dict(model_type="umt5"), ("'umt5'",)),
    (dict(model_type="longt5"), ("'longt5'",)),
    (dict(model_type="switch_transformers"), ("'switch_transformers'",)),
    (dict(architectures=["T5EncoderModel"]), ("T5EncoderModel", "head")),
    (dict(d_kv="x"), ("d_kv='x'", "integer")), (dict(d_ff=None), ("d_ff=None",)),
    (dict(relative_attention_num_buckets=0), ("relative_attention_num_buckets=0",)),
    (dict(d_model=17), ("16", "17")),
    (dict(num_decoder_layers=1), ("decoder.block.1", "not part of the model")),
])
def test_unsupported_configs_are_refused(fields, parts, write_hf):
    theirs = hf_t5()
    folder = write_hf(theirs, tensors_of(theirs), **fields)
    refused(lambda: load_model(str(folder)), *parts)


@pytest.mark.parametrize("change, parts", [
    (lambda t: t["decoder.embed_tokens.weight"].add_(1), ("embed", "differs")),
    (lambda t: t.pop("decoder.final_layer_norm.weight"), ("no tensor for decoder.ln_f.weight",)),
    (lambda t: [t.pop(k) for k in list(t) if k.startswith("decoder")], ("no tensor for",)),
    (lambda t: t["shared.weight"].fill_(float("nan")), ("shared.weight", "NaN")),
], ids=["embeddings differ", "no last norm", "no decoder", "NaN"])
def test_damaged_or_incomplete_weights_are_refused(change, parts, write_hf):
    theirs = hf_t5()
    tensors = old_file(tensors_of(theirs))
    change(tensors)
    refused(lambda: load_model(str(write_hf(theirs, tensors))), *parts)


def test_options_that_a_t5_excludes_are_refused(make_t5):
    _, ours = make_t5()
    refused(lambda: ours.crop_block_size(64), "--block_size=64", "--source_length")
    refused(lambda: checkpoint.check_dtype(ours, torch.float16), "T5", "--dtype=bfloat16")
    checkpoint.check_dtype(ours, torch.bfloat16)
    own = T5Config(vocab_size=8, tied_head=False)
    refused(lambda: hf_config.check_hf_takes(vars(own)), "scale_head=True")


def test_an_exported_tokenizer_appends_the_end_token(tmp_path, monkeypatch):
    """As T5's own tokenizer does. A folder with only spiece.model needs further packages."""
    import transformers
    save_tokenizer(tmp_path / "t5", "unigram")
    tokenizer = tokenizer_of_folder(tmp_path / "t5")
    (tmp_path / "out").mkdir()
    hf.write_tokenizer(tmp_path / "out", tokenizer, 512, ends_prompts=True)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert read("Line")["input_ids"] == [*tokenizer.encode("Line"), tokenizer.eot]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "spiece.model").write_bytes(b"\x0e\x01")
    (tmp_path / "old" / "config.json").write_text('{"model_type": "t5"}')
    refused(lambda: tokenizer_of_folder(tmp_path / "old"), "spiece.model", "sentencepiece")


def test_initial_weights_have_the_standard_deviations_of_mesh_tensorflow():
    """T5 does not scale attention, so the weights of queries start smaller."""
    torch.manual_seed(0)
    c = T5Config(vocab_size=600, n_embd=64, head_size=16, n_head=4, n_inner=256, n_layer=1,
                 n_decoder_layer=1)
    model = T5(c)
    q, k, _ = model.encoder.h[0].attn.c_attn.weight.chunk(3)
    cross = model.decoder.h[0].cross
    for weight, std in ((model.shared.weight, 1), (q, (64 * 16) ** -0.5), (k, 64 ** -0.5),
                        (cross.c_q.weight, (64 * 16) ** -0.5), (cross.c_kv.weight, 64 ** -0.5),
                        (cross.c_proj.weight, 64 ** -0.5), (model.encoder.bias.weight, 64 ** -0.5),
                        (model.decoder.h[0].mlp.c_proj.weight, 256 ** -0.5)):
        assert abs(float(weight.detach().std()) / std - 1) < 0.15
    assert t5.GPT.num_params(model) == sum(p.numel() for p in model.parameters())
