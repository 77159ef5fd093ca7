"""Packed matrices compute the same as plain ones; where packing is not possible nothing changes."""
import pytest
import torch
from conftest import tiny_gpt

from model import KVCache
from nanotune.generation import fast
from nanotune.torch_private import can_pack_linear

CPU = torch.device("cpu")
NEO = dict(local_window=4, attn_scale=1.0, qkv_bias=False)


@pytest.mark.skipif(not can_pack_linear(), reason="no oneDNN for this CPU")
@pytest.mark.parametrize("fields", [{}, dict(bias=False), dict(tied_head=False), NEO])
def test_a_packed_model_computes_the_same(fields):
    model, idx = tiny_gpt(61, **fields), torch.arange(24).view(2, 12) % 61
    with torch.no_grad():
        whole = model.logits(idx)
        new = model.generate(idx[:, :5], 30, temperature=0)
        fast.pack(model, CPU, torch.float32)
        assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
        torch.testing.assert_close(model.logits(idx), whole, atol=1e-4, rtol=1e-4)
        cache = model.new_cache(2)
        for part in idx.split([7, 1, 1, 3], dim=1):
            logits = model.step(part, cache)
        torch.testing.assert_close(logits, whole[:, -1], atol=1e-4, rtol=1e-4)
        assert isinstance(cache, KVCache)
        assert torch.equal(model.generate(idx[:, :5], 30, temperature=0), new)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", [{}, dict(bias=False), dict(tied_head=False), NEO])
def test_packing_in_half_precision_computes_the_same_as_autocast(fields, dtype):
    model, idx = tiny_gpt(61, **fields), torch.arange(24).view(2, 12) % 61
    with torch.no_grad():
        exact = model.logits(idx)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        whole = model.logits(idx)
        new = model.generate(idx[:, :5], 30, temperature=0)
        fast.pack(model, CPU, dtype)
        assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
        assert model.transformer.wte.weight.dtype == torch.float32
        packed = model.logits(idx)
        if can_pack_linear(dtype):  # oneDNN may add up in another order
            assert (packed - exact).norm() < 1.5 * (whole - exact).norm()
        else:
            assert torch.equal(packed, whole)
            assert torch.equal(model.generate(idx[:, :5], 30, temperature=0), new)


@pytest.mark.skipif(not can_pack_linear(), reason="no oneDNN for this CPU")
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_a_fused_activation_computes_the_same(activation):
    model, idx = tiny_gpt(61, activation=activation), torch.arange(12).view(1, 12)
    with torch.no_grad():
        # large inputs, so that the two activations differ by more than atol
        for block in model.transformer.h:
            block.mlp.c_fc.weight.normal_(std=1.0)
        expected = model.logits(idx)
        fast.pack(model, CPU, torch.float32)
        assert model.transformer.h[0].activation == activation
        torch.testing.assert_close(model.logits(idx), expected, atol=2e-5, rtol=2e-5)


def test_packing_disables_cudnns_attention():
    torch.backends.cuda.enable_cudnn_sdp(True)
    fast.pack(tiny_gpt(61), CPU, torch.float32)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("why", ["device", "processor"])
def test_a_device_or_processor_without_packing_leaves_the_model_as_it_is(why, monkeypatch):
    if why == "processor":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    model = tiny_gpt(61)
    before = [type(module) for module in model.modules()]
    fast.pack(model, torch.device("meta") if why == "device" else CPU, torch.float32)
    assert [type(module) for module in model.modules()] == before
