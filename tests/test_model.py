"""The GPT compared with transformers and PyTorch: logits, loss, cached generation, sampling."""
import math

import pytest
import torch
from conftest import greedy_reference, hf_model, tiny_gpt
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_file
from model import GPT, GPTConfig
from nanotune import head
from nanotune.errors import UserError
from nanotune.generation.generate import sample_token, stream
from nanotune.head import HeadChunk

NEO = dict(attn_scale=1.0, qkv_bias=False, local_window=5, n_layer=3)


def ids(*shape, vocab=61, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


# -----------------------------------------------------------------------------
# numerics

@pytest.mark.parametrize("fields", [
    dict(),
    dict(n_inner=40, layer_norm_epsilon=1e-2),
    dict(activation_function="gelu"),
    dict(activation_function="gelu_pytorch_tanh", n_head=1, n_layer=3),
    dict(scale_attn_weights=False, n_head=4),
    dict(tie_word_embeddings=False),
    dict(n_positions=300, n_embd=8),
    dict(neo=True),
    dict(neo=True, intermediate_size=24, layer_norm_epsilon=1e-2, activation_function="gelu"),
    dict(neo=True, num_layers=2, attention_types=[[["global", "local"], 1]], window_size=1),
    dict(neo=True, max_position_embeddings=300, hidden_size=8, window_size=256),
    dict(neo=True, max_position_embeddings=300, hidden_size=8, window_size=7),
], ids=lambda fields: " ".join(f"{k}={v}" for k, v in fields.items() if k != "attention_types")
       or "defaults")
def test_logits_equal_those_of_transformers(fields, write_hf):
    theirs = hf_model(**fields)
    ours = GPT.from_pretrained(write_hf(theirs)).eval()
    idx = ids(2, ours.config.block_size)
    with torch.no_grad():
        expected, logits = theirs(idx).logits, ours.logits(idx)
    assert expected.std() > 0.3  # so that a wrong logit would show
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_a_model_without_biases_equals_one_with_zero_biases():
    plain = tiny_gpt(61, bias=False)
    assert not [name for name, _ in plain.named_parameters() if name.endswith("bias")]
    biased = tiny_gpt(61, seed=5)
    missing, unexpected = biased.load_state_dict(plain.state_dict(), strict=False)
    assert missing and not unexpected
    with torch.no_grad():
        for name, param in biased.named_parameters():
            if name in missing:
                param.zero_()
        torch.testing.assert_close(plain.logits(ids(2, 16)), biased.logits(ids(2, 16)))


def test_initial_weights_have_gpt2s_standard_deviations():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, block_size=64, n_layer=8, n_head=2, n_embd=128))
    block = model.transformer.h[3]
    residual = 0.02 / math.sqrt(2 * 8)
    for weight, std in ((model.transformer.wte.weight, 0.02), (model.transformer.wpe.weight, 0.02),
                        (block.attn.c_attn.weight, 0.02), (block.mlp.c_fc.weight, 0.02),
                        (block.attn.c_proj.weight, residual), (block.mlp.c_proj.weight, residual)):
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.03)
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            assert not param.any()
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("tied", [True, False])
def test_each_parameter_is_in_one_optimizer_group(tied):
    model = tiny_gpt(61, tied_head=tied)
    decayed, plain = model.param_groups(0.1)
    grouped = [id(p) for group in (decayed, plain) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith("weight") and "ln_" not in names[id(p)]
               for p in decayed["params"])
    assert all(names[id(p)].endswith("bias") or "ln_" in names[id(p)] for p in plain["params"])


def test_parameters_and_flops_are_counted():
    c = GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=16)
    tied, untied = GPT(c), GPT(GPTConfig(**vars(c) | {"tied_head": False}))
    block = (16 * 48 + 48) + (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16) + 4 * 16
    assert tied.num_params() == 61 * 16 + 16 * 16 + 2 * block + 2 * 16
    assert untied.num_params() == tied.num_params() + 61 * 16
    assert tied.flops_per_token() == 6 * (tied.num_params() - 16 * 16) + 12 * 2 * 16 * 16


def test_dropout_is_drawn_only_in_training():
    model = tiny_gpt(61, dropout=0.5)
    idx = ids(2, 16)
    with torch.no_grad():
        assert torch.equal(model.logits(idx), model.logits(idx))
        model.train()
        torch.manual_seed(3)
        first = model.logits(idx)
        second = model.logits(idx)
        torch.manual_seed(3)
        again = model.logits(idx)
    assert torch.equal(first, again) and not torch.allclose(first, second)


def test_dropout_is_applied_in_the_same_places_as_in_gpt2(monkeypatch):
    rates, attention = [], model_file.attention

    def spy_attention(q, k, v, mask, scale, dropout):
        rates.append(("attention", dropout))
        return attention(q, k, v, mask, scale, dropout)

    def spy_dropout(x, p, training):
        rates.append(("residual", p if training else 0.0))
        return x

    monkeypatch.setattr(model_file, "attention", spy_attention)
    monkeypatch.setattr(model_file, "dropout", spy_dropout)
    model = tiny_gpt(61, dropout=0.25).train()
    model.logits(ids(1, 4))
    # once after the embeddings; per layer: attention's weights, its projection, the MLP's
    assert rates == [("residual", 0.25)] + 2 * [("attention", 0.25), ("residual", 0.25),
                                                ("residual", 0.25)]
    rates.clear()
    model.eval().logits(ids(1, 4))
    assert {rate for _, rate in rates} == {0.0}


@pytest.mark.parametrize("fields, message", [
    (dict(n_embd=17), "n_embd=17 must be a multiple of n_head=2"),
    (dict(activation="relu"), "activation 'relu'.*gelu_tanh or gelu"),
])
def test_bad_sizes_and_activations_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        tiny_gpt(61, **fields)


def test_crop_block_size_keeps_the_first_positions_and_refuses_other_sizes():
    model = tiny_gpt(61)
    idx = ids(2, 7)
    with torch.no_grad():
        whole = model.logits(idx)
        model.crop_block_size(7)
        torch.testing.assert_close(model.logits(idx), whole)
    assert model.config.block_size == 7 and model.transformer.wpe.weight.shape == (7, 16)
    assert model.transformer.wpe.weight.requires_grad
    with pytest.raises(UserError, match="block_size=8 is more than the 7 positions"):
        model.crop_block_size(8)
    for size in (0, -3):
        with pytest.raises(UserError, match=f"block_size={size} must be at least 1"):
            model.crop_block_size(size)
    assert model.config.block_size == 7


# -----------------------------------------------------------------------------
# loss

def targets_with_gaps(*shape):
    targets = ids(*shape, seed=2)
    targets[0, 2:] = -1          # with 5 rows per chunk, one chunk has no target
    targets[-1, ::3] = -1
    return targets


def loss_and_gradients(model, loss):
    model.zero_grad(set_to_none=True)
    (loss * 0.37).backward()     # not 1: backward must multiply by it
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()
                           if p.grad is not None}


def reference_loss(model, idx, targets):
    return F.cross_entropy(model.logits(idx).float().flatten(0, 1), targets.flatten(),
                           ignore_index=-1, reduction="sum")


@pytest.mark.parametrize("rows", [1, 5, 7, 21, 512])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_equal_those_of_cross_entropy(rows, tied, monkeypatch):
    monkeypatch.setitem(head.HEAD_CHUNK, "cpu", HeadChunk(rows, 2, 8))
    model, idx, targets = tiny_gpt(61, tied_head=tied), ids(3, 7), targets_with_gaps(3, 7)
    expected, gradients = loss_and_gradients(model, reference_loss(model, idx, targets))
    loss, ours = loss_and_gradients(model, model(idx, targets))
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, gradients, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(idx, targets), expected, rtol=1e-5, atol=1e-5)
        assert not model(idx, targets).requires_grad


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_micro_batches_add_up(tied):
    """backward() of one loss scales gradients in place; those of other losses must not change."""
    model, idx, targets = tiny_gpt(61, tied_head=tied), ids(3, 7), targets_with_gaps(3, 7)
    _, expected = loss_and_gradients(model, reference_loss(model, idx, targets))
    model.zero_grad(set_to_none=True)
    losses = [model(idx[i:i + 1], targets[i:i + 1]) for i in range(3)]  # before any backward
    for loss in losses:
        (loss * 0.37).backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_loss_without_targets_is_zero_and_so_are_its_gradients():
    model, idx = tiny_gpt(61), ids(2, 7)
    loss, gradients = loss_and_gradients(model, model(idx, torch.full_like(idx, -1)))
    assert loss == 0 and all(not g.any() for g in gradients.values())


def test_a_frozen_head_gets_no_gradient_and_other_gradients_are_the_same():
    model, idx, targets = tiny_gpt(61), ids(3, 7), targets_with_gaps(3, 7)
    model.lm_head.weight.requires_grad_(False)
    _, gradients = loss_and_gradients(model, reference_loss(model, idx, targets))
    _, ours = loss_and_gradients(model, model(idx, targets))
    assert "transformer.wte.weight" not in ours and len(ours) == len(list(model.parameters())) - 1
    torch.testing.assert_close(ours, gradients, rtol=1e-4, atol=1e-4)


def test_loss_with_bfloat16_weights_equals_that_of_their_values_in_float32(monkeypatch):
    """The head's weights are cast in parts; the result is the same as casting them whole."""
    monkeypatch.setitem(head.HEAD_CHUNK, "cpu", HeadChunk(5, 2, 8))
    model, idx, targets = tiny_gpt(61, tied_head=False), ids(3, 7), targets_with_gaps(3, 7)
    model.set_dtype(torch.bfloat16)
    loss, ours = loss_and_gradients(model, model(idx, targets))
    for param in model.parameters():
        param.data = param.data.float()
    expected, gradients = loss_and_gradients(model, reference_loss(model, idx, targets))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient.float(), gradients[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("rows", [5, 512])
def test_loss_under_bf16_autocast_is_as_exact_as_pytorchs(rows, monkeypatch):
    monkeypatch.setitem(head.HEAD_CHUNK, "cpu", HeadChunk(rows, 2, 8))
    model, idx, targets = tiny_gpt(61), ids(3, 7), targets_with_gaps(3, 7)
    exact, exact_gradients = loss_and_gradients(model, reference_loss(model, idx, targets))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, targets)
        expected = reference_loss(model, idx, targets)
    assert loss != exact  # the matrix products were in bfloat16
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    _, expected = loss_and_gradients(model, expected)
    _, ours = loss_and_gradients(model, loss)
    for name, gradient in ours.items():
        assert gradient.dtype == torch.float32
        # about as near to the exact gradient as PyTorch's own loss
        error = (gradient - exact_gradients[name]).norm() / exact_gradients[name].norm()
        theirs = (expected[name] - exact_gradients[name]).norm() / exact_gradients[name].norm()
        assert error < max(2 * theirs, 0.01), name


def test_float16_products_do_not_overflow():
    """The GradScaler's factor is applied after these products, so it cannot prevent an overflow."""
    dw = torch.zeros(3, 2)
    head.add_product(dw, -torch.ones(512, 3).half(), 200 * torch.ones(512, 2).half(), 2)
    assert torch.equal(dw, torch.full((3, 2), -512 * 200.0))


def test_loss_never_has_all_logits_in_memory(monkeypatch):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    monkeypatch.setitem(head.HEAD_CHUNK, "cpu", HeadChunk(8, 2, 100))
    model, idx = tiny_gpt(500, n_embd=4, n_layer=1), ids(8, 16, vocab=500)
    with Largest() as seen:
        model(idx, idx).backward()
    assert 8 * 500 <= seen.numel < 16 * 500  # of 8 * 16 rows in all
    with Largest() as seen:
        reference_loss(model, idx, idx)
    assert seen.numel == 8 * 16 * 500        # Largest does see logits


# -----------------------------------------------------------------------------
# generation

@pytest.mark.parametrize("fields", [dict(), NEO, dict(block_size=1), dict(block_size=7)],
                         ids=["gpt2", "neo", "block 1", "block 7"])
@pytest.mark.parametrize("prompt, new", [(1, 15), (5, 11), (5, 50), (16, 3), (40, 30)])
def test_cached_generation_equals_uncached(fields, prompt, new):
    model, idx = tiny_gpt(61, **fields), ids(3, prompt)
    expected = greedy_reference(model, idx, new)
    assert torch.equal(model.generate(idx, new, temperature=0), expected)
    assert len(expected[:, prompt:].unique()) > 1 or new < 4  # the tokens vary


@pytest.mark.parametrize("fields", [dict(), NEO], ids=["gpt2", "neo"])
@pytest.mark.parametrize("pieces", [[16], [1] * 16, [3, 1, 7, 5], [1, 15], [15, 1]])
def test_a_prompt_read_in_pieces_gives_the_logits_of_the_whole(fields, pieces):
    model, idx = tiny_gpt(61, **fields), ids(2, 16)
    cache, end = model.new_cache(2), 0
    with torch.no_grad():
        whole = model.logits(idx)
        for piece in pieces:
            logits = model.step(idx[:, end:end + piece], cache)
            end += piece
            assert cache.pos == end and logits.shape == (2, 61)
            torch.testing.assert_close(logits, whole[:, end - 1], atol=1e-5, rtol=1e-5)


def test_a_cache_rewound_to_0_can_be_used_again():
    model, idx = tiny_gpt(61), ids(2, 9)
    cache = model.new_cache(2, length=9)
    assert cache.k.shape == (2, 2, 2, 9, 8)
    with torch.no_grad():
        model.step(ids(2, 9, seed=7), cache)
        cache.rewind(0)
        torch.testing.assert_close(model.step(idx, cache), model.logits(idx)[:, -1])


def test_a_cache_under_autocast_is_bfloat16_and_its_logits_float32():
    model, idx = tiny_gpt(61), ids(2, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model.new_cache(2)
        assert cache.k.dtype == torch.bfloat16
        model.step(idx[:, :8], cache)
        logits = [model.step(idx[:, i:i + 1], cache) for i in range(8, 12)][-1]
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, model.logits(idx)[:, -1].float(), atol=0.1, rtol=0.1)


def reference_distribution(logits, temperature, top_k, top_p):
    """The distribution that sample_token should draw from, computed token by token."""
    weights = {i: math.exp(v / temperature) for i, v in enumerate(logits)}
    ranked = sorted(weights, key=weights.get, reverse=True)[:top_k]
    total = sum(weights[i] for i in ranked)
    kept, covered = [], 0.0
    for i in ranked:
        kept.append(i)
        covered += weights[i] / total
        if covered >= (1 if top_p is None else top_p):
            break
    total = sum(weights[i] for i in kept)
    return torch.tensor([weights[i] / total if i in kept else 0.0 for i in range(len(logits))])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 3, 50])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.55, 0.9, 1.0])
def test_sample_token_draws_from_the_distribution_cut_by_top_k_and_top_p(temperature, top_k, top_p):
    logits, draws = torch.tensor([0.3, 2.0, -1.0, 1.4, 0.9, -0.2, 1.1]), 20_000
    expected = reference_distribution(logits.tolist(), temperature, top_k, top_p)
    drawn = sample_token(logits.expand(draws, -1), temperature, top_k, top_p,
                         torch.Generator().manual_seed(0))
    share = drawn.bincount(minlength=7) / draws
    assert drawn.shape == (draws,)
    assert not share[expected == 0].any()
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((share - expected).abs() <= 4.5 * deviation).all()


def test_sample_token_treats_each_row_separately():
    logits = torch.tensor([[5.0, 0.0, 0.0, 1.0], [0.0, 0.1, 6.0, 0.2], [1.0, 9.0, 0.0, 0.0]])
    for options in (dict(temperature=0), dict(top_k=1), dict(top_p=0.01)):
        assert sample_token(logits, **options).tolist() == [0, 2, 1]
    assert sample_token(logits, temperature=1e-4).tolist() == [0, 2, 1]


@pytest.mark.parametrize("options", [dict(temperature=0), dict(temperature=5.0),
                                     dict(top_k=61), dict(top_p=0.999)])
def test_ids_beyond_the_tokenizer_are_never_drawn(options):
    model, idx = tiny_gpt(61), ids(4, 3, vocab=5)
    options["generator"] = torch.Generator().manual_seed(0)
    out = model.generate(idx, 60, n_vocab=5, **options)
    assert out.max() < 5
    assert model.generate(idx, 60, **options).max() >= 5


def test_a_stop_token_ends_only_its_own_row():
    model, idx = tiny_gpt(20), ids(3, 2, vocab=20)

    def draw(**options):
        generator = torch.Generator().manual_seed(4)
        return torch.stack(list(stream(model, idx.tolist(), 90, temperature=3.0,
                                       generator=generator, **options)), dim=1)
    free = draw()                # (3, 90)
    stop = int(free[0, 3])
    first = [row.index(stop) for row in free.tolist()]
    assert len(set(first)) == 3 and max(first) < 89  # if this fails, choose another seed
    out = draw(stop_token=stop)
    assert out.shape == (3, max(first) + 1)
    for row, expected, end in zip(out.tolist(), free.tolist(), first):
        assert row[:end] == expected[:end] and set(row[end:]) == {stop}


def test_a_seed_gives_the_same_draws_and_sampling_does_not_change_the_model():
    model, idx = tiny_gpt(61), ids(2, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second, other = (model.generate(idx, 20, generator=torch.Generator().manual_seed(seed))
                            for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert first.shape == (2, 23) and torch.equal(first[:, :3], idx)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("fields", [dict(doc_end=7), dict(local_window=4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_is_created_once_in_the_dtype_of_attention(fields, dtype):
    """Otherwise each layer would create and keep its own mask of T x T numbers."""
    model, seen = tiny_gpt(61, n_layer=4, **fields), []
    for block in model.transformer.h:
        block.attn.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        model.logits(torch.arange(16)[None] % 11)
    masks = {id(mask): mask for mask in seen if mask is not None}
    assert len(seen) == 4 and len(masks) == 1
    assert {mask.dtype for mask in masks.values()} == {dtype}


@pytest.mark.parametrize("penalty", [1.3, 2.0])
@pytest.mark.parametrize("neo", [False, True])
def test_the_repetition_penalty_equals_that_of_transformers(neo, penalty, write_hf):
    theirs = hf_model(neo=neo)
    ours = GPT.from_pretrained(str(write_hf(theirs))).eval()
    for prompt in ([5, 9, 5], [1]):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None,
            attention_mask=torch.ones(1, len(prompt)), pad_token_id=0, repetition_penalty=penalty)
        new = stream(ours, [prompt], 16, temperature=0, repetition_penalty=penalty)
        found = [*prompt, *map(int, new)]
        assert found == expected[0].tolist()
        plain = [*prompt, *map(int, stream(ours, [prompt], 16, temperature=0))]
        assert found != plain


def test_the_repetition_penalty_counts_tokens_of_each_row_separately():
    model = tiny_gpt(61)
    prompts = [[1, 2, 3], [4], [4, 4, 9, 8]]
    options = dict(temperature=0, repetition_penalty=1.5)
    together = torch.stack(list(stream(model, prompts, 12, **options)), 1)
    for prompt, row in zip(prompts, together.tolist()):
        assert row == [int(token) for token in stream(model, [prompt], 12, **options)]


def test_a_stream_with_logits_yields_the_models_unchanged_logits():
    """The same tokens, and logits without the penalty and without padding of the vocabulary."""
    model, prompt = tiny_gpt(61), [1, 2, 3]
    options = dict(temperature=0.8, top_k=5, repetition_penalty=1.5, n_vocab=60)

    def draw(**more):
        return stream(model, [prompt], 12, **options, **more,
                      generator=torch.Generator().manual_seed(0))
    pairs = list(draw(with_logits=True))
    assert [int(token) for token, _ in pairs] == list(map(int, draw()))
    idx = torch.tensor([[*prompt, *(int(token) for token, _ in pairs)]])
    with torch.no_grad():
        expected = model.logits(idx)[0, 2:-1, :60]
    assert torch.allclose(torch.cat([logits for _, logits in pairs]), expected, atol=1e-4)


@pytest.mark.parametrize("lengths", [(6, 6, 6), (6, 2, 4)], ids=["equal", "unequal"])
@torch.no_grad()
def test_a_cache_can_be_rewound_and_reordered(lengths):
    """Beam search reorders the rows; scoring labels rewinds the cache."""
    model = tiny_gpt(61)
    prompts = [row[:n] for row, n in zip(ids(3, 6).tolist(), lengths)]
    cache, _ = model.start(prompts, 4)
    assert not cache.full
    cache.reorder(torch.tensor([2, 0, 2]))
    token = torch.tensor([[7], [8], [9]])
    found, rows = model.step(token, cache), [prompts[2], prompts[0], prompts[2]]
    for logits, row, new in zip(found, rows, (7, 8, 9)):
        torch.testing.assert_close(logits, model.logits(torch.tensor([[*row, new]]))[0, -1],
                                   atol=1e-5, rtol=1e-5)
    cache.rewind(6)
    torch.testing.assert_close(model.step(token, cache), found, atol=1e-6, rtol=1e-6)
    for _ in range(3):
        model.step(token, cache)
    assert cache.full
