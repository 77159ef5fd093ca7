"""A recorded step computes the same as the model's own step, for a token in any column."""
import contextlib
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_gpt
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from nanotune.generation import fast
from nanotune.generation.fast import ALIGNED, Decoder, cuda_graph, for_generation
from nanotune.generation.generate import stream
from nanotune.head import Head

NEO = dict(local_window=4, attn_scale=1.0, qkv_bias=False)
PROMPTS = torch.randint(61, (3, 5), generator=torch.Generator().manual_seed(1))


def freeze(step):
    """A stand-in for a CUDA graph on any device: replays the operators of one step() on the same
    tensors. Numbers computed by Python keep the values of the recording."""
    return make_fx(step)()


class Frozen(Decoder):
    """A Decoder that records with freeze() and counts its recordings."""
    def __init__(self, model):
        super().__init__(model, freeze)
        self.records = 0

    def record(self, idx, cache):
        self.records += 1
        return super().record(idx, cache)


def drawn(model, idx=PROMPTS, new=9, pad=(0, 0, 0), **options):
    options = dict(temperature=0) | options
    prompts = [row[n:] for row, n in zip(idx.tolist(), pad)]
    return torch.stack(list(stream(model, prompts, new, **options)), 1)


# 9 new tokens fit in the context of 16; with 40 the window slides 3 times
@pytest.mark.parametrize("fields, new", [
    ({}, 40), (dict(bias=False), 9), (dict(tied_head=False), 9), (NEO, 9), (NEO, 40)])
def test_recorded_steps_draw_the_same_tokens(fields, new):
    model = tiny_gpt(61, **fields)
    decoder = Frozen(model)
    tokens = drawn(decoder, new=new)
    assert decoder.records == 1
    assert torch.equal(tokens, drawn(model, new=new))
    assert len(tokens.unique()) > 4


def test_recorded_steps_give_the_models_logits(fields=NEO):
    model = tiny_gpt(61, **fields)
    decoder, idx = Frozen(model), PROMPTS
    cache, plain = decoder.new_cache(3), model.new_cache(3)
    with torch.no_grad():
        for part in idx.split([2, 1, 1, 1], dim=1):
            torch.testing.assert_close(decoder.step(part, cache), model.step(part, plain))
        assert cache.pos == plain.pos == 5
        first = decoder.step(idx[:, :1], cache)
        kept = first.clone()
        decoder.step(idx[:, 1:2], cache)
    assert torch.equal(first, kept)  # not overwritten


@pytest.mark.parametrize("new", [8, 30])
def test_recorded_steps_draw_the_same_tokens_for_padded_rows(new):
    model, pad = tiny_gpt(61, **NEO), (0, 3, 1)
    assert torch.equal(drawn(Frozen(model), new=new, pad=pad), drawn(model, new=new, pad=pad))


def test_a_step_is_recorded_for_each_cache():
    model = tiny_gpt(61)
    decoder = Frozen(model)
    for idx in (PROMPTS, PROMPTS[:2].flip(1), PROMPTS):
        assert torch.equal(drawn(decoder, idx), drawn(model, idx))
    assert decoder.records == 3


def test_recorded_steps_sample_the_same_tokens():
    model, options = tiny_gpt(61), dict(temperature=0.8, top_k=20, stop_token=7)
    first, second = (drawn(m, new=12, generator=torch.Generator().manual_seed(3), **options)
                     for m in (Frozen(model), model))
    assert torch.equal(first, second)


def test_recorded_steps_give_the_models_logits_under_autocast():
    model = tiny_gpt(61)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        decoder = Frozen(model)
        cache, plain = decoder.new_cache(3), model.new_cache(3)
        assert cache.k.dtype == torch.bfloat16
        for part in PROMPTS.split([4, 1], dim=1):
            found, expected = decoder.step(part, cache), model.step(part, plain)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def test_the_cache_is_rounded_up_to_aligned_columns_within_the_context():
    decoder = Frozen(tiny_gpt(61, block_size=100))
    assert decoder.new_cache(1, 17).k.size(3) == 2 * ALIGNED
    assert decoder.new_cache(1, 100).k.size(3) == 100
    assert decoder.new_cache(1).k.size(3) == 100


class Counted:
    """A step that counts its calls."""
    def __init__(self):
        self.calls, self.result = 0, torch.ones(1)

    def __call__(self):
        self.calls += 1
        return self.result


@pytest.fixture
def no_gpu(monkeypatch):
    """Replace torch.cuda's functions for capturing with stubs; return the list of calls."""
    called = []

    class Named:
        def __init__(self, *args):
            pass

        def __getattr__(self, name):
            return lambda *args: called.append(name)

    for name in ("Stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Named)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Named)
    return called


def test_a_step_is_captured_after_it_has_run(no_gpu):
    """Checks only the order of the calls, without a GPU."""
    step = Counted()
    replay = cuda_graph(step)
    assert step.calls == 3 and no_gpu == ["wait_stream", "wait_stream"]
    assert replay() is step.result and step.calls == 3 and no_gpu[2:] == ["replay"]


def test_if_capture_fails_the_step_is_used_without_it(no_gpu, monkeypatch, capsys):
    @contextlib.contextmanager
    def broken(graph):
        yield
        raise RuntimeError("CUDA error: not permitted when stream is capturing\nmore\n")
    monkeypatch.setattr(torch.cuda, "graph", broken)
    step = Counted()
    assert cuda_graph(step) is step
    err = capsys.readouterr().err
    assert err.startswith("warning: ") and err.count("\n") == 1 and "not permitted" in err


def test_an_error_of_the_step_itself_is_raised(no_gpu):
    def step():
        raise RuntimeError("of the model's own")
    with pytest.raises(RuntimeError, match="of the model's own"):
        cuda_graph(step)


def test_for_generation_adapts_the_model_to_device_and_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    (cpu, gpu), f32 = map(torch.device, ("cpu", "cuda:0")), torch.float32
    bf16 = torch.bfloat16
    onnx = SimpleNamespace()
    assert for_generation(onnx, cpu, f32, compiled=False) is onnx
    model = tiny_gpt(61)
    assert for_generation(model, cpu, bf16, compiled=False) is model
    model = for_generation(tiny_gpt(61), cpu, f32, compiled=True)
    assert model.compiled and model.capture is None and isinstance(model.model.lm_head, Head)
    model = for_generation(tiny_gpt(61), gpu, bf16, compiled=False)
    assert not model.compiled and model.capture is fast.cuda_graph
    assert model.model.lm_head.product.weight.dtype == bf16


def test_without_a_compiler_generation_continues_uncompiled(monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise RuntimeError("no working C++ compiler\nlong story")

    monkeypatch.setattr(torch, "compile", lambda forward: fails)
    model = tiny_gpt(61)
    tokens = drawn(Decoder(model, compiled=True), new=40)
    assert torch.equal(tokens, drawn(model, new=40))
    assert capsys.readouterr().err == ("warning: torch.compile failed here (no working C++ "
                                       "compiler); continuing without it: slower, same results\n")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@pytest.mark.parametrize("fields", [{}, NEO], ids=["gpt2", "neo"])
def test_a_compiled_step_draws_the_same_tokens(fields):
    """The step is compiled once for all columns, even if the context slides, and copies no keys."""
    model = tiny_gpt(61, **fields)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        tokens, (code,) = run_and_get_code(drawn, Decoder(model, compiled=True), new=40)
    assert torch.equal(tokens, drawn(model, new=40))
    assert "empty_strided_cpu((3, 1, 16)" in code and "empty_strided_cpu((3, 2, 16, 8)" not in code
