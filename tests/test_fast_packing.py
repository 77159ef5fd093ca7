"""Packed matrices compute what the plain ones do, and where they do not serve nothing changes."""
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
def test_packed_is_plain(fields):
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
def test_half_precision_is_autocast(fields, dtype):
    model, idx = tiny_gpt(61, **fields), torch.arange(24).view(2, 12) % 61
    with torch.no_grad(), torch.autocast("cpu", dtype):
        whole = model.logits(idx)
        new = model.generate(idx[:, :5], 30, temperature=0)
        fast.pack(model, CPU, dtype)
        assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
        assert model.transformer.wte.weight.dtype == torch.float32
        # oneDNN may add up in another order
        tolerance = 2e-2 if can_pack_linear(dtype) else 0
        torch.testing.assert_close(model.logits(idx), whole, atol=tolerance, rtol=0)
        if not tolerance:
            assert torch.equal(model.generate(idx[:, :5], 30, temperature=0), new)


def test_attention_has_no_plan_for_each_length():
    torch.backends.cuda.enable_cudnn_sdp(True)
    fast.pack(tiny_gpt(61), CPU, torch.float32)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("why", ["device", "processor"])
def test_where_it_does_not_serve_the_model_stays_as_it_is(why, monkeypatch):
    if why == "processor":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    model = tiny_gpt(61)
    before = [type(module) for module in model.modules()]
    fast.pack(model, torch.device("meta") if why == "device" else CPU, torch.float32)
    assert [type(module) for module in model.modules()] == before
