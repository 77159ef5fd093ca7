"""Attention in training on a CPU equals torch's, and dropout drops values at the given rate."""
import pytest
import torch
from conftest import tiny_gpt
from torch.nn import functional as F

from nanotune import attention
from nanotune.attention import ROWS, BlockAttention, attention_bytes, dropout, keep_mask


def qkv(B=2, nh=3, T=50, hs=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, nh, hs, dtype=torch.float64, generator=generator).to(dtype)
            .transpose(1, 2).requires_grad_() for _ in range(3)]


def with_gradients(function, inputs):
    out = function(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return out.detach(), *torch.autograd.grad(out, inputs, weights)


def torch_attention(mask=None, scale=None):
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)


def documents(T, B=2):
    """An additive mask of documents that end at different places in each row."""
    number = torch.stack([torch.arange(T) // 7, torch.arange(T) // 11])[:B]
    same = number[:, :, None] == number[:, None, :]
    seen = same & torch.ones(T, T, dtype=torch.bool).tril()
    return torch.where(seen, 0.0, -torch.inf).double()[:, None]


@pytest.mark.parametrize("T, rows", [(1, 4), (3, 4), (16, 4), (50, 16), (50, 128)])
@pytest.mark.parametrize("masked, scale", [(False, None), (True, None), (False, 1.0)])
def test_output_and_gradients_equal_torchs(T, rows, masked, scale, monkeypatch):
    monkeypatch.setattr(attention, "ROWS", rows)
    mask, inputs = documents(T) if masked else None, qkv(T=T)
    ours = with_gradients(lambda *t: attention.attention(*t, mask, scale), inputs)
    theirs = with_gradients(torch_attention(mask, scale), inputs)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_gradients_with_dropout_are_correct(monkeypatch):
    monkeypatch.setattr(attention, "ROWS", 4)

    def function(q, k, v):
        torch.manual_seed(1)  # the same weights are dropped in each call
        return attention.attention(q, k, v, None, None, 0.3)
    assert torch.autograd.gradcheck(function, qkv(1, 2, 10, 4))


def test_dropout_drops_weights_and_keeps_their_mean():
    """With values of 1 the output is the sum of the weights: 1 on average, but rarely exactly 1."""
    q, k, v = qkv(4, 4, 256, 8, torch.float32)
    torch.manual_seed(0)
    out = attention.attention(q, k, torch.ones_like(v), None, None, 0.25).detach()[..., 0]
    assert out.mean() == pytest.approx(1, abs=0.02)
    assert out[:, :, 0].unique().tolist() == pytest.approx([0, 1 / 0.75])  # row 0 has one weight
    assert out[:, :, 128:].std() > 0.01


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_bfloat16_is_close_to_float32(p):
    exact, half = qkv(T=200, hs=16, dtype=torch.float32), qkv(T=200, hs=16, dtype=torch.bfloat16)

    def function(q, k, v):
        torch.manual_seed(1)
        return attention.attention(q, k, v, None, None, p)
    for a, b in zip(with_gradients(function, exact), with_gradients(function, half)):
        assert b.dtype == torch.bfloat16 and (a - b).norm() < 0.02 * a.norm()


def test_inference_float16_and_compiled_code_use_torchs_attention(monkeypatch):
    monkeypatch.setattr(BlockAttention, "apply", lambda *args: pytest.fail("not torch's"))
    q, k, v = qkv(T=5, dtype=torch.float32)
    with torch.no_grad():
        attention.attention(q, k, v, None, None)
    attention.attention(q[:, :, -1:], k, v, None, None)  # one token with a cache
    half = [t.detach().half().requires_grad_() for t in (q, k, v)]
    attention.attention(*half, None, None)
    torch.compile(lambda *t: attention.attention(*t, None, None), backend="eager")(q, k, v)


@pytest.mark.parametrize("fields", [{}, dict(local_window=4), dict(doc_end=3)])
def test_a_models_loss_and_gradients_equal_those_with_torchs_attention(fields, monkeypatch):
    found, idx = [], torch.arange(32).view(2, 16) % 61
    for ours in (True, False):
        if not ours:
            monkeypatch.setattr("model.attention", lambda q, k, v, mask, scale, dropout:
                                F.scaled_dot_product_attention(q, k, v, mask, dropout,
                                                               mask is None, scale=scale))
        model = tiny_gpt(61, **fields).double()
        loss = model(idx, idx)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_recompute_stores_no_attention_weights():
    """save_for_backward() stores the weights, so checkpoint() can drop and recompute them."""
    model, idx = tiny_gpt(61, block_size=48), torch.arange(48).view(1, 48) % 61
    packed = []

    def count(recompute):
        model.recompute = recompute
        packed.clear()
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: packed.append(t.shape[-2:] == (48, 48)) or t, lambda t: t):
            model(idx, idx)
        return sum(packed)
    assert count(False) == 2 and count(True) == 0


@pytest.mark.parametrize("T", [5, ROWS, 3 * ROWS + 1])
def test_the_memory_plan_counts_the_stored_weights(T):
    q, k, v = qkv(1, 2, T, 4, torch.float32)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.nbytes if t.size(-1) != 4 else 0) or t, lambda t: t):
        attention.attention(q, k, v, None, None)
    assert sum(sizes) == attention_bytes(2, T, torch.float32)


# -----------------------------------------------------------------------------
# dropout

@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1 - 1e-7])
def test_each_value_is_kept_with_probability_1_minus_p_independently(p):
    torch.manual_seed(0)
    mask = keep_mask(torch.Size((1000, 1001)), p)
    assert mask.dtype == torch.bool and mask.shape == (1000, 1001)
    assert float(mask.float().mean()) == pytest.approx(1 - p, abs=0.002)
    # neighbouring values share one random number, but must be independent
    for step in range(1, 5):
        both = (mask.flatten()[step:] & mask.flatten()[:-step]).float().mean()
        assert float(both) == pytest.approx((1 - p) ** 2, abs=0.003)


def test_dropout_depends_only_on_torchs_seed():
    torch.manual_seed(3)
    first = keep_mask(torch.Size((100,)), 0.5)
    second = keep_mask(torch.Size((100,)), 0.5)
    torch.manual_seed(3)
    assert torch.equal(keep_mask(torch.Size((100,)), 0.5), first) and not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_scales_the_values_that_it_keeps(dtype):
    torch.manual_seed(0)
    x = torch.ones(1000, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.25, True)
    y.sum().backward()
    assert y.dtype == dtype and y.unique().tolist() == pytest.approx([0, 4 / 3], rel=0.01)
    assert torch.equal(x.grad, y.detach())


def test_dropout_keeps_all_at_rate_0_and_in_evaluation_and_drops_all_at_rate_1():
    x = torch.ones(10)
    assert dropout(x, 0.0, True) is x or torch.equal(dropout(x, 0.0, True), x)
    assert torch.equal(dropout(x, 0.5, False), x) and not dropout(x, 1.0, True).any()
