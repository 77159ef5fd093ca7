"""Optimizers: stochastic rounding for bfloat16 weights, 8-bit moments, Adafactor, loss scaling."""
import sys

import pytest
import torch

from nanotune.errors import UserError
from nanotune.training import optimizer as optimizers
from nanotune.training.optimizer import (
    LossScaler,
    RoundedAdamW,
    check_8bit,
    fill_state,
    make_optimizer,
    moments_per_scale,
    plain_state,
    round_stochastically,
    set_rate,
)

CPU = torch.device("cpu")
RATE, BETAS = 1e-2, (0.9, 0.95)


@pytest.fixture
def torchao(monkeypatch):
    """torchao, whose update is not compiled, because compiling takes minutes. Without torchao the
    test is skipped."""
    module = pytest.importorskip("torchao.optim")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return module


def params_of(dtype, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for shape in shapes]


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def groups_of(params):
    return [{"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]


# -----------------------------------------------------------------------------
# stochastic rounding

@pytest.mark.parametrize("value", [1.001, -1.001, 3e-5, -0.7071, 255.9])
def test_rounding_gives_one_of_two_neighbours_and_is_right_on_average(value):
    torch.manual_seed(0)
    rounded = round_stochastically(torch.full((100_000,), value)).float()
    ulp = abs(value) * 2**-7
    assert len(rounded.unique()) == 2
    assert (rounded - value).abs().max() < ulp
    # the mean of n draws has a standard error of at most ulp / 2 / sqrt(n); allow 5 of them
    assert rounded.mean().item() == pytest.approx(value, abs=5 * ulp / 2 / 100_000**0.5)


def test_values_that_bfloat16_represents_are_not_changed():
    exact = torch.tensor([0.0, 1.0, -2.5, 2.0**-126, 3.3895313892515355e38])
    assert torch.equal(round_stochastically(exact.clone()).float(), exact)


def test_rounding_depends_on_the_seed():
    x = torch.randn(1000)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(round_stochastically(x.clone()))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# -----------------------------------------------------------------------------
# RoundedAdamW

@pytest.mark.parametrize("chunk", [7, 2**22])
def test_rounded_adamw_on_float32_weights_equals_torchs_adamw(monkeypatch, chunk):
    monkeypatch.setattr(optimizers, "CHUNK", chunk)
    ours, theirs = (params_of(torch.float32, (5, 6), (6,)) for _ in range(2))
    one = RoundedAdamW(groups_of(ours), RATE, BETAS)
    other = torch.optim.AdamW(groups_of(theirs), lr=RATE, betas=BETAS)
    for step in range(5):
        for params, optimizer in ((ours, one), (theirs, other)):
            give_gradients(params, step)
            optimizer.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)
        for key, value in other.state[q].items():
            torch.testing.assert_close(one.state[p][key], value, atol=1e-6, rtol=1e-6)


def test_updates_far_below_the_resolution_of_bfloat16_add_up():
    """Bfloat16 has steps of 2^-8 below 1 and 2^-7 above. Rounded to nearest, 1 - 1e-4 is 1."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = RoundedAdamW([{"params": [p]}], 1e-4, BETAS)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.dtype == torch.bfloat16
    assert p.float().mean().item() == pytest.approx(1 - 100 * 1e-4, abs=5e-4)


def test_bfloat16_weights_train_as_float32_ones():
    ours, theirs = params_of(torch.bfloat16, (50, 60)), params_of(torch.bfloat16, (50, 60))
    theirs = [torch.nn.Parameter(p.detach().float()) for p in theirs]
    one = make_optimizer("adamw", groups_of(ours), RATE, BETAS, CPU)
    other = make_optimizer("adamw", groups_of(theirs), RATE, BETAS, CPU)
    assert isinstance(one, RoundedAdamW) and isinstance(other, torch.optim.AdamW)
    for step in range(10):
        give_gradients(ours, step)
        for p, q in zip(ours, theirs):
            q.grad = p.grad.float()
        one.step()
        other.step()
    drift = (ours[0].float() - theirs[0]).detach()
    assert drift.abs().mean() < 0.01 and abs(drift.mean().item()) < 1e-3  # after ten steps of 0.01
    state = one.state[ours[0]]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    torch.testing.assert_close(state["exp_avg_sq"], other.state[theirs[0]]["exp_avg_sq"])


# -----------------------------------------------------------------------------
# 8 bits

def test_the_moments_of_each_large_tensor_of_each_gpt2_are_quantized():
    """torchao alone does not quantize the moments of gpt2-xl's embedding, 50257 x 1600, and of its
    biases of 4800: 256 does not divide these sizes."""
    assert 50257 * 1600 % 256 and 4800 % 256
    for width in (768, 1024, 1280, 1600):
        for numel in (50257 * width, 50304 * width, 1024 * width, 3 * width * width,
                      width * width, 4 * width * width):
            assert moments_per_scale(numel) in (64, 128, 256)
    assert moments_per_scale(50257 * 1600) == 64 and moments_per_scale(50257 * 768) == 256
    assert moments_per_scale(4800) == 64
    assert moments_per_scale(1600) is None and moments_per_scale(64 * 64 + 1) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8bit_moments_train_as_float32_ones(torchao, dtype):
    shapes = (33, 1600), (64, 64), (1600,)  # 33 x 1600 is not a multiple of 128
    ours, theirs = params_of(dtype, *shapes), params_of(dtype, *shapes)
    theirs = [torch.nn.Parameter(p.detach().float()) for p in theirs]
    one = make_optimizer("adamw8bit", groups_of(ours), RATE, BETAS, CPU)
    other = torch.optim.AdamW(groups_of(theirs), lr=RATE, betas=BETAS)
    for step in range(10):
        give_gradients(ours, step)
        for p, q in zip(ours, theirs):
            q.grad = p.grad.float()
        one.step()
        other.step()
    for p, q in zip(ours, theirs):
        assert (p.float() - q).abs().mean() < 0.01  # after ten steps of 0.01
    blocks = [getattr(one.state[p]["exp_avg_sq"], "block_size", None) for p in ours]
    assert blocks == [64, 256, None]
    assert one.state[ours[2]]["exp_avg_sq"].dtype == torch.float32


def test_a_gpu_without_bfloat16_compiles_the_update_in_float32(torchao, monkeypatch):
    """The moments are the same. Bfloat16 weights differ only in their random rounding."""
    def compile(function, **_):
        def run(*args):
            seen.update(arg.dtype for arg in args[:2])
            return function(*args)
        return run

    monkeypatch.setattr(torch, "compile", compile)
    found = []
    for lacking in (True, False):
        monkeypatch.setattr(optimizers, "lacks_bfloat16", lambda device, lacking=lacking: lacking)
        params, seen = params_of(torch.bfloat16, (33, 1600), (64, 64)), set()
        params += params_of(torch.float32, (1600,))
        optimizer = make_optimizer("adamw8bit", groups_of(params), RATE, BETAS, CPU)
        for step in range(5):
            give_gradients(params, step)
            optimizer.step()
        assert (torch.bfloat16 in seen) != lacking
        found.append((params, optimizer))
    (ours, one), (theirs, other) = found
    for p, q in zip(ours, theirs):
        state, expected = plain_state(one.state[p]), plain_state(other.state[q])
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in state)
        assert p.dtype == q.dtype
        difference = (p.float() - q.float()).detach()
        assert difference.abs().mean() < 0.01 and abs(difference.mean().item()) < 1e-3
    assert torch.equal(ours[2], theirs[2])


# -----------------------------------------------------------------------------
# float16, with weights in bfloat16

@pytest.mark.parametrize("bad", [None, float("inf"), float("nan")])
def test_bfloat16_gradients_are_unscaled_as_by_torchs_grad_scaler(bad):
    found = []
    for make in (LossScaler, torch.amp.GradScaler):
        params = params_of(torch.bfloat16, (5, 6), (6,)) + params_of(torch.float32, (7,))
        before = [p.detach().clone() for p in params]
        optimizer, scaler = RoundedAdamW(groups_of(params), RATE, BETAS), make("cpu")
        scaler.scale(torch.ones(()))  # creates the scale
        give_gradients(params, 0)
        if bad is not None:
            params[0].grad[1, 2] = bad
        scaler.unscale_(optimizer)
        found.append([p.grad for p in params])
        torch.manual_seed(0)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**16 / (1 if bad is None else 2)
        moved = [not torch.equal(p, q) for p, q in zip(params, before)]
        assert moved == [bad is None] * 3
    for ours, theirs in zip(*found):
        assert torch.equal(ours.nan_to_num(3.0), theirs.nan_to_num(3.0))


def test_float32_gradients_are_unscaled_by_torchs_grad_scaler(monkeypatch):
    called = []
    monkeypatch.setattr(torch.amp.GradScaler, "_unscale_grads_",
                        lambda self, *args: called.append(args) or {CPU: args[2]})
    params = params_of(torch.float32, (5, 6))
    give_gradients(params, 0)
    scaler = LossScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.unscale_(torch.optim.AdamW(params))
    assert len(called) == 1


# -----------------------------------------------------------------------------
# Adafactor

@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_adafactor_equals_that_of_transformers(size):
    """Also if gradients are small, as in a large model after clipping."""
    from transformers.optimization import Adafactor
    shapes = (33, 48), (48,), (7, 5)
    ours, theirs = params_of(torch.float32, *shapes), params_of(torch.float32, *shapes)
    one = make_optimizer("adafactor", [{"params": ours, "weight_decay": 0.0}], 1e-2, BETAS, CPU)
    other = Adafactor(theirs, lr=1e-2, scale_parameter=True, relative_step=False,
                      warmup_init=False, weight_decay=0.0)
    started = [p.detach().clone() for p in ours]
    for step in range(12):
        give_gradients(ours, step)
        for p, q in zip(ours, theirs):
            p.grad *= size * (1 + step)
            p.grad[2] = 0  # as for a bucket of distances that no pair has
            q.grad = p.grad.clone()
        one.step()
        other.step()
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, rtol=2e-5, atol=1e-7)
    assert all((p - q).abs().max() > 1e-2 for p, q in zip(ours, started) if p.dim() > 1)


def test_adafactors_state_is_restored_and_that_of_adamw_refused():
    params = params_of(torch.float32, (33, 48), (48,))
    one, other, adamw = (make_optimizer(name, groups_of(params), RATE, BETAS, CPU)
                         for name in ("adafactor", "adafactor", "adamw"))
    give_gradients(params, 0)
    one.step()
    adamw.step()
    for p in params:
        plain = plain_state(one.state[p])
        fill_state(other, p, plain)
        again = plain_state(other.state[p])
        assert again.keys() == plain.keys() and all(again[k].equal(plain[k]) for k in plain)
        with pytest.raises(UserError, match="which is not AdamW's"):
            fill_state(adamw, p, plain)
        with pytest.raises(UserError, match="which is not Adafactor's"):
            fill_state(other, p, plain_state(adamw.state[p]))


# -----------------------------------------------------------------------------
# files

def test_8bit_state_is_saved_as_plain_tensors_and_restored(torchao):
    shapes = (33, 1600), (1600,)
    params = params_of(torch.bfloat16, *shapes)
    one, other = (make_optimizer("adamw8bit", groups_of(params), RATE, BETAS, CPU)
                  for _ in range(2))
    give_gradients(params, 0)
    one.step()
    for p in params:
        plain = plain_state(one.state[p])
        assert all(type(value) is torch.Tensor for value in plain.values())
        fill_state(other, p, plain)
        again = plain_state(other.state[p])
        assert again.keys() == plain.keys()
        assert all(torch.equal(again[key], plain[key]) for key in plain)
        assert not any(again[key].data_ptr() == plain[key].data_ptr() for key in plain)


def test_state_of_another_optimizer_is_refused(torchao):
    params = params_of(torch.bfloat16, (64, 64))
    eight, full = (make_optimizer(name, groups_of(params), RATE, BETAS, CPU)
                   for name in ("adamw8bit", "adamw"))
    give_gradients(params, 0)
    eight.step()
    full.step()
    with pytest.raises(UserError, match="is of --optimizer=adamw8bit"):
        fill_state(full, params[0], plain_state(eight.state[params[0]]))
    with pytest.raises(UserError, match="is of --optimizer=adamw:"):
        fill_state(eight, params[0], plain_state(full.state[params[0]]))
    with pytest.raises(UserError, match="momentum"):
        fill_state(full, params[0], {"momentum": torch.zeros(64, 64)})


def test_the_rate_is_set_in_each_group_of_each_optimizer(torchao):
    params = params_of(torch.float32, (64, 64), (64,))
    for name in optimizers.NAMES:
        optimizer = make_optimizer(name, groups_of(params), RATE, BETAS, CPU)
        set_rate(optimizer, 0.25)
        assert [float(group["lr"]) for group in optimizer.param_groups] == [0.25, 0.25]


def test_without_torchao_the_command_to_install_it_is_printed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"needs torchao .*pip install torchao"):
        check_8bit(CPU)


def test_without_a_compiler_the_command_to_install_one_is_printed(monkeypatch):
    pytest.importorskip("torchao.optim")

    def compile(function, **_):
        def run(*_):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore")
        return run

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(UserError, match=r"No working C.. compiler found.*apt install g..") as e:
        check_8bit(CPU)
    assert "\n" not in str(e.value)
