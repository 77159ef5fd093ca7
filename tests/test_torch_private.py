"""Private names of torch: training and generation also work without them, at lower speed."""
import contextlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_gpt

from nanotune import torch_private
from nanotune.generation.fast import pack

CPU = torch.device("cpu")


def test_without_torchs_checks_of_the_cpu_bfloat16_is_not_used(monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert torch_private.cpu_has_bfloat16() is False


def test_without_mkldnns_operators_no_matrix_is_packed(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    model = tiny_gpt(61)
    before = dict(model.named_modules())
    pack(model, CPU, torch.float32)
    assert not torch_private.can_pack_linear() and dict(model.named_modules()) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from importing torch._dynamo
def test_an_optimizer_without_dynamo_gives_the_same_weights():
    """Runs in a new process: in this one, other tests have imported torch._dynamo."""
    code = """
import sys, torch
from nanotune.training.optimizer import make_optimizer
def trained(make):
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(8, 8))
    optimizer = make([{"params": [w], "weight_decay": 0.1}])
    for _ in range(3):
        (w ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    return w
theirs = {"adamw": lambda g: torch.optim.AdamW(g, 0.1, (0.9, 0.95), fused=True),
          "adafactor": lambda g: torch.optim.Adafactor(g, 0.1, eps=(1e-15, 1e-3))}
ours = {name: trained(lambda g: make_optimizer(name, g, 0.1, (0.9, 0.95), torch.device("cpu")))
        for name in theirs}
assert "torch._dynamo" not in sys.modules
assert all(torch.equal(ours[name], trained(theirs[name])) for name in theirs)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_compilation_can_be_undone():
    model = torch.nn.Linear(2, 2)
    assert not torch_private.is_compiled(model) and not torch_private.is_compiled(object())
    model.compile()
    assert torch_private.is_compiled(model)
    torch_private.undo_compile(model)
    assert not torch_private.is_compiled(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_without_torchs_recompile_limit_the_context_does_nothing(monkeypatch):
    assert not isinstance(torch_private.no_recompile_limit(), contextlib.nullcontext)
    monkeypatch.delattr(torch._dynamo.utils, "disable_cache_limit")
    with torch_private.no_recompile_limit() as lifted:
        assert lifted is None
