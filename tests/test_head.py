"""The head in half precision: an offset of all logits of a row costs no precision."""
import pytest
import torch
from conftest import tiny_gpt
from torch.nn import functional as F

from model import GPT, GPTConfig
from nanotune.generation import fast
from nanotune.generation.generate import stream
from nanotune.head import Head, head_bytes, head_loss
from nanotune.training.lora import add_lora, merge_lora
from t5 import T5, T5Config

CPU = torch.device("cpu")
OFFSET = -100.0
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def inputs(n=64, C=32, V=500, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, C, generator=generator)
    x[:, 0] = 1.0  # so that column 0 of the head is added to the logits
    return x, torch.randint(V, (n,), generator=generator)


def a_head(offset=0.0, C=32, V=500):
    torch.manual_seed(1)
    head = Head(C, V)
    with torch.no_grad():
        head.weight.normal_(std=0.3)
        head.weight[:, 0] += offset
    return head


def in_half(dtype):
    return torch.autocast("cpu", dtype)


@HALF
def test_an_offset_costs_the_loss_and_its_gradients_no_precision(dtype):
    """The errors relative to float64 are as small with an offset of -100 as without."""
    errors = {}
    for offset in (0.0, OFFSET):
        found = []
        for compute in (torch.float64, dtype):
            head = a_head(offset)
            x, y = inputs()
            x = x.double() if compute == torch.float64 else x
            head = head.double() if compute == torch.float64 else head
            x.requires_grad_()
            loss = head_loss(x, head, y, compute)
            loss.backward()
            found.append((loss.detach().double(), x.grad.double(), head.weight.grad.double()))
        errors[offset] = [float((a - b).norm() / a.norm()) for a, b in zip(*found)]
    for plain, shifted in zip(errors[0.0], errors[OFFSET]):
        assert shifted < 2 * plain + 1e-4
    assert errors[OFFSET][0] < 1e-3 and errors[OFFSET][1] < 0.02


@HALF
def test_logits_are_float32_and_include_the_offset(dtype):
    head, (x, _) = a_head(OFFSET), inputs()
    exact = F.linear(x, head.weight)
    with torch.no_grad(), in_half(dtype):
        logits = head(x)
        plain = F.linear(x, head.weight).float()
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 0.05
    if dtype == torch.bfloat16:
        assert (plain - exact).abs().max() > 0.2  # what autocast alone would give
    assert (logits.argmax(-1) == exact.argmax(-1)).float().mean() > 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_full_precision_the_head_is_bitwise_equal_to_a_linear_layer(dtype):
    head, (x, _) = a_head(OFFSET).to(dtype), inputs()
    assert torch.equal(head(x.to(dtype)), F.linear(x.to(dtype), head.weight))


def test_bfloat16_weights_are_centred_too():
    head, (x, _) = a_head(OFFSET).bfloat16(), inputs()
    exact = F.linear(x, head.weight.float())
    with torch.no_grad(), in_half(torch.bfloat16):
        assert (head(x) - exact).abs().max() < 0.05
        assert torch.equal(head(x.bfloat16()), head(x.bfloat16().float()))


def with_offset(model, offset=OFFSET):
    """The same model with the head's rows moved along the bias of the last norm, so that all logits
    of a row change by the same number, about `offset`. Float32 gives the same probabilities."""
    with torch.no_grad():
        norm = model.transformer.ln_f
        norm.bias.normal_(std=1.0, generator=torch.Generator().manual_seed(3))
        norm.weight.mul_(0.3)
        bias = norm.bias
        model.lm_head.weight.add_(offset * bias / bias.square().sum())
    return model


def models(**fields):
    """[a model, the same model with an offset]. The head is not tied, so only the logits differ."""
    return [with_offset(tiny_gpt(61, tied_head=False, **fields), offset)
            for offset in (0.0, OFFSET)]


@HALF
def test_a_model_with_an_offset_is_as_close_to_float32_as_one_without(dtype):
    """For the loss, the logits of evaluation, and a step of a packed model."""
    idx = torch.arange(24).view(2, 12) % 61
    errors = []
    for model in models():
        with torch.no_grad():
            loss, logits = model(idx, idx), torch.cat(list(model.logits_at(idx, idx)))
            expected = [loss / idx.numel(), logits.log_softmax(-1)]
            with in_half(dtype):
                loss, logits = model(idx, idx), torch.cat(list(model.logits_at(idx, idx)))
                found = [loss / idx.numel(), logits.log_softmax(-1)]
                fast.pack(model, CPU, dtype)
                cache = model.new_cache(2)
                step = model.step(idx, cache).log_softmax(-1)
            errors.append([float((a - b).abs().max()) for a, b in zip(expected, found)]
                          + [float((step - expected[1].view(2, 12, -1)[:, -1]).abs().max())])
    for plain, shifted in zip(*errors):
        assert shifted < 3 * plain + 1e-3, errors


def test_a_repetition_penalty_gets_logits_that_include_the_offset():
    """The penalty divides positive logits and multiplies negative ones, so the offset matters."""
    model = models()[1].eval()
    with torch.no_grad():
        expected = list(stream(model, [[1, 2, 3]], 1, temperature=0, repetition_penalty=1.5,
                               with_logits=True))
        with in_half(torch.bfloat16):
            found = list(stream(model, [[1, 2, 3]], 1, temperature=0, repetition_penalty=1.5,
                                with_logits=True))
    assert torch.equal(found[0][0], expected[0][0])
    torch.testing.assert_close(found[0][1], expected[0][1], atol=0.5, rtol=0)


def test_a_t5s_head_is_centred():
    model = T5(T5Config(vocab_size=61, n_layer=1, n_decoder_layer=1, n_head=2, n_embd=16,
                        head_size=8, n_inner=32, tied_head=False)).eval()
    assert isinstance(model.lm_head, Head)
    x, y = torch.arange(12).view(1, 12), torch.arange(6).view(1, 6)
    with torch.no_grad(), in_half(torch.bfloat16):
        before = model(x, y)
        model.lm_head.weight.add_(torch.randn(16, generator=torch.Generator().manual_seed(0)) * 10)
        torch.testing.assert_close(model(x, y), before, rtol=0.01, atol=0)


# -----------------------------------------------------------------------------
# the centred copy

def counted(monkeypatch):
    calls = []
    from nanotune import head
    real = head.centre
    monkeypatch.setattr(head, "centre", lambda *args: (calls.append(1), real(*args))[1])
    return calls


def test_a_frozen_head_is_centred_once(monkeypatch):
    calls, idx = counted(monkeypatch), torch.arange(12).view(1, 12)
    model = GPT(GPTConfig(vocab_size=61, block_size=16, n_layer=1, n_head=2, n_embd=16))
    with in_half(torch.bfloat16):
        model(idx, idx)
        model(idx, idx)
        assert len(calls) == 2 and model.lm_head.copy is None
        add_lora(model, 2)
        model(idx, idx).backward()
        before = model(idx, idx)
        assert len(calls) == 3
        with torch.no_grad():
            model.lm_head.weight.mul_(2)  # weights loaded later
        assert model(idx, idx) != before and len(calls) == 4
        merge_lora(model)
        model(idx, idx)
        assert model.lm_head.copy is None


def test_samples_of_a_training_run_keep_the_copy_only_while_they_are_drawn(monkeypatch):
    calls, model = counted(monkeypatch), tiny_gpt(61)
    with in_half(torch.bfloat16), model.lm_head.keep():
        list(stream(model, [[1, 2, 3]], 5))
        assert len(calls) == 1
    assert model.lm_head.copy is None


def test_the_copy_is_neither_saved_nor_a_parameter():
    model = tiny_gpt(61)
    names = set(model.state_dict())
    with model.lm_head.keep(), in_half(torch.bfloat16):
        list(stream(model, [[1, 2, 3]], 2))
        assert set(model.state_dict()) == names


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_the_memory_plan_counts_the_copy(weights):
    V, C, rows = 50000, 8, 4
    weight = torch.nn.Parameter(torch.empty(V, C, dtype=weights, device="meta"), False)
    copy, logits = V * C * 2, rows * V * 2 + rows * V * 4
    assert head_bytes(weight, rows, "cpu", torch.bfloat16) == (logits + copy, copy)
    assert head_bytes(weight, rows, "cpu", torch.float32)[1] == 0
