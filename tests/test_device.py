"""The device: which one is picked, its dtype, and whether the model is compiled."""
import pytest
import torch

from configurator import configure
from nanotune import device as devices
from nanotune.device import pick_compile, pick_device, pick_dtype
from nanotune.errors import UserError
from train import Config

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def cards(monkeypatch):
    """cards(n, capability) makes torch see n GPUs of this compute capability."""
    def pretend(n, capability=(8, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return pretend


def test_auto_picks_a_gpu_if_there_is_one(cards, monkeypatch):
    cards(2)
    assert pick_device() == CUDA
    cards(0)
    assert pick_device() == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device() == torch.device("mps")


def test_each_process_has_its_own_gpu(cards, ranks):
    cards(2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    ranks(1, 2)
    assert pick_device("cuda", local_rank=1) == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"cuda:2 .* has 2 GPU.*--nproc_per_node"):
        pick_device("auto", local_rank=2)


def test_a_gpu_that_does_not_exist_is_refused(cards):
    cards(1)
    with pytest.raises(UserError, match=r"cuda:3 .* has 1 GPU"):
        pick_device("cuda:3")


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16),
                                               ((9, 0), torch.bfloat16)])
def test_auto_dtype_is_bfloat16_only_on_a_gpu_that_does_not_emulate_it(
        cards, monkeypatch, capability, dtype):
    cards(1, capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # even if it is emulated
    assert pick_dtype("auto", CUDA) == dtype


@pytest.mark.parametrize("amx, avx512", [(False, False), (True, False), (False, True)],
                         ids=["neither", "AMX", "AVX-512"])
def test_auto_dtype_on_a_cpu_is_bfloat16_only_with_amx_or_avx512(monkeypatch, amx, avx512):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    assert pick_dtype("auto", CPU) == (torch.bfloat16 if amx or avx512 else torch.float32)


def test_a_given_dtype_is_used_and_an_unknown_one_is_refused():
    assert pick_dtype("float16", CPU) == torch.float16
    assert pick_dtype("auto", torch.device("mps")) == torch.float32
    with pytest.raises(UserError, match="--dtype=half is not supported; use auto, float32, bfl"):
        configure(Config, ["--dtype=half"])


def test_autocast_keeps_cast_weights_only_if_asked_to():
    for fields, kept in (({}, False), ({"cache": True}, True)):
        with devices.autocast(CPU, torch.bfloat16, **fields):
            assert torch.is_autocast_enabled("cpu")
            assert torch.is_autocast_cache_enabled() == kept


def test_auto_compiles_only_where_compilation_works(cards, monkeypatch):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: object())
    cards(1, (7, 0))
    assert pick_compile("auto", CUDA) is True
    assert pick_compile("auto", CPU) is False
    assert pick_compile(False, CUDA) is False
    assert pick_compile(True, CPU) is True
    cards(1, (7, 5))
    assert pick_compile("auto", CUDA, weights=torch.bfloat16) is False
    assert pick_compile(True, CUDA, weights=torch.bfloat16) is True
    cards(1, (6, 1))
    assert pick_compile("auto", CUDA) is False
    cards(1, (8, 0))
    assert pick_compile("auto", CUDA, weights=torch.bfloat16) is True
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    assert pick_compile("auto", CUDA) is False
