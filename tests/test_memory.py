"""Training in less memory (bfloat16 weights, 8-bit moments, recompute), and the memory plan."""
import multiprocessing
import os
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import greedy_reference, tiny_gpt
from ranks import fork_context, run_ranks
from test_resume import FIELDS, assert_same_run
from tiny import arguments, losses, run_script, run_train, write_dataset

import train
from model import GPT, GPTConfig
from nanotune import device as devices
from nanotune import files
from nanotune.formats import checkpoint
from nanotune.training import optimizer as optimizers
from nanotune.training import plan, run
from nanotune.training.distributed import World
from train import Config

LEAN = dict(weights="bfloat16", optimizer="adamw8bit", recompute=True)
XL = GPTConfig(block_size=1024, vocab_size=50257, n_layer=48, n_head=25, n_embd=1600)
GPT2 = replace(XL, n_layer=12, n_head=12, n_embd=768)
ONE = Config(init_from="gpt2", batch_size=1, gradient_accumulation_steps=32)
GB = 1e9


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("memory") / "chars")


def uncompiled(rank=None):
    """Run torchao's update without compiling it, which takes minutes."""
    torch.compile = lambda function, **_: function


@pytest.fixture
def torchao(monkeypatch):
    pytest.importorskip("torchao.optim")
    monkeypatch.setattr(torch, "compile", torch.compile)  # restored at the end
    uncompiled()


# -----------------------------------------------------------------------------
# the model

def test_set_dtype_changes_matrices_and_not_vectors():
    model = tiny_gpt(7)
    model.set_dtype(torch.bfloat16)
    for param in model.parameters():
        assert param.dtype == (torch.bfloat16 if param.dim() >= 2 else torch.float32)
    assert model.lm_head.weight is model.transformer.wte.weight
    empty = GPT.empty(model.config, dtype=torch.bfloat16)
    assert [p.dtype for p in empty.parameters()] == [p.dtype for p in model.parameters()]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_bfloat16_weights_train_as_the_same_values_in_float32(autocast):
    """The losses agree within 1e-6. Gradients differ by rounding to bfloat16, a relative 2^-9."""
    idx = torch.arange(24).view(2, 12) % 7
    lean, full = tiny_gpt(7), tiny_gpt(7)
    lean.set_dtype(torch.bfloat16)
    full.load_state_dict({name: p.float() for name, p in lean.state_dict().items()})
    found = []
    for model in (lean, full):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = model(idx, idx)
        loss.backward()
        found.append(loss.item())
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    for (name, p), q in zip(lean.named_parameters(), full.parameters()):
        assert p.grad.dtype == p.dtype
        torch.testing.assert_close(p.grad.float(), q.grad, atol=2e-2, rtol=2**-6, msg=name)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_recompute_is_bitwise_the_same_also_with_dropout(compute):
    idx = torch.arange(24).view(2, 12) % 7
    found = []
    for recompute in (False, True):
        model = tiny_gpt(7, dropout=0.3).train()
        model.recompute = recompute
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16):
            loss = model(idx, idx)
        loss.backward()
        found.append([loss.detach(), torch.rand(1), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_cached_generation_with_bfloat16_weights_equals_uncached():
    model = tiny_gpt(7)
    model.set_dtype(torch.bfloat16)
    idx = torch.tensor([[1, 2, 3]])
    assert torch.equal(model.generate(idx, 10, temperature=0), greedy_reference(model, idx, 10))


# -----------------------------------------------------------------------------
# runs

def test_a_lean_run_keeps_and_saves_its_dtypes(dataset, tmp_path, torchao):
    """With n_embd=64 the matrices are large enough for 8-bit moments."""
    full, out = tmp_path / "full", tmp_path / "lean"
    assert run_train(dataset, full, **FIELDS, n_embd=64) == 0
    assert run_train(dataset, out, **FIELDS, n_embd=64, **LEAN) == 0
    state = files.load(out / "state.pt")
    for name, p in state["model"].items():
        assert p.dtype == (torch.bfloat16 if p.dim() >= 2 else torch.float32)
        if name in state["optimizer"]:
            quantised = "exp_avg.codes" in state["optimizer"][name]
            assert quantised == (p.numel() >= optimizers.LEAST_8BIT)
    model, _ = checkpoint.load_model(out)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    lean, _ = checkpoint.load_model(out, dtype=torch.bfloat16)
    assert torch.equal(lean.lm_head.weight.float(), model.lm_head.weight)
    for ours, theirs in zip(losses(out), losses(full)):
        if "val_loss" in ours:
            assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=0.01)


@pytest.mark.parametrize("fields", [
    dict(weights="bfloat16", dtype="bfloat16"), dict(weights="bfloat16", dtype="float16"),
    dict(n_embd=64, **LEAN)])
def test_a_run_resumed_at_step_3_of_6_is_bitwise_the_same(dataset, tmp_path, torchao, fields):
    for out, changes in (("whole", {}), ("parts", dict(max_iters=3)),
                         ("parts", dict(init_from="resume"))):
        assert run_train(dataset, tmp_path / out, **FIELDS | fields | changes) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_lean_run_resumes_on_a_gpu_without_bfloat16(dataset, tmp_path, torchao, monkeypatch):
    """As on a T4, but on a CPU: products in float16 with a loss scaler, updates in float32."""
    whole = tmp_path / "whole"
    fields = FIELDS | LEAN | dict(n_embd=64, dtype="float16")
    monkeypatch.setattr(optimizers, "lacks_bfloat16", lambda device: True)
    for out, changes in ((whole, {}), (tmp_path / "parts", dict(max_iters=3)),
                         (tmp_path / "parts", dict(init_from="resume"))):
        assert run_train(dataset, out, **fields | changes) == 0
    assert_same_run(whole, tmp_path / "parts")
    state = files.load(whole / "state.pt")
    assert state["scaler"] and state["progress"]["skipped"] < 3  # of 6 steps
    assert losses(whole)[-1]["val_loss"] < losses(whole)[0]["val_loss"]


def test_two_ranks_stopped_and_resumed_equal_one_process(dataset, tmp_path, torchao):
    """Only rank 0 reads the 8-bit moments. A sum over two ranks is the same in either order."""
    fields = FIELDS | LEAN | dict(n_embd=64)
    assert run_train(dataset, tmp_path / "one", **fields) == 0
    for changes in (dict(max_iters=3), dict(init_from="resume")):
        statuses, output = run_ranks(2, arguments(dataset, tmp_path / "two", **fields | changes),
                                     tmp_path / "logs", uncompiled)
        assert statuses == [0, 0], output
    assert_same_run(tmp_path / "one", tmp_path / "two", rel=1e-6)


def test_rounding_depends_only_on_seed_and_step(dataset, tmp_path):
    fields = FIELDS | dict(weights="bfloat16", max_iters=2, dropout=0.0)
    for out in ("a", "b"):
        torch.manual_seed(len(out) + ord(out))
        assert run_train(dataset, tmp_path / out, **fields) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_resume_refuses_another_optimizer_or_dtype_of_weights(dataset, tmp_path, torchao,
                                                                monkeypatch, capsys):
    """--force_resume=True permits another dtype."""
    out = tmp_path / "out"
    assert run_train(dataset, out, **FIELDS | dict(max_iters=2, n_embd=64)) == 0
    other = dict(max_iters=3, n_embd=64, weights="bfloat16", init_from="resume")
    status, _, error = run_script(monkeypatch, capsys, train.main,
                                  arguments(dataset, out, **FIELDS | other))
    assert status == 1 and "was started with weights=float32, which a resume cannot" in error
    assert run_train(dataset, out, **FIELDS | other, force_resume=True) == 0
    status, _, error = run_script(monkeypatch, capsys, train.main, arguments(
        dataset, out, **FIELDS | dict(n_embd=64, init_from="resume", optimizer="adamw8bit")))
    assert status == 1 and "was started with optimizer=adamw, which a resume cannot change" in error


@pytest.mark.parametrize("fields, message", [
    (dict(weights="float16"), "--weights=float16 is not supported; use float32 or bfloat16"),
    (dict(optimizer="sgd"), "--optimizer=sgd is not supported; use adamw, adamw8bit or adafactor"),
])
def test_unknown_weights_and_optimizers_are_refused(dataset, tmp_path, monkeypatch, capsys, fields,
                                                    message):
    status, _, error = run_script(monkeypatch, capsys, train.main, arguments(
        dataset, tmp_path / "out", **fields))
    assert status == 1 and message in error


@pytest.mark.parametrize("fields", [
    dict(weights="bfloat16"), dict(lora_rank=2, init_from="gpt2"), dict(dtype="float16")])
def test_options_that_adafactor_excludes_are_refused(dataset, tmp_path, monkeypatch, capsys,
                                                     fields):
    status, _, error = run_script(monkeypatch, capsys, train.main, arguments(
        dataset, tmp_path / "out", **dict(optimizer="adafactor") | fields))
    assert status == 1 and "cannot be combined" in error and error.count("\n") == 1


@pytest.mark.parametrize("fields", [
    dict(weights="bfloat16"), dict(optimizer="adamw8bit"), dict(optimizer="adafactor"),
    dict(lora_rank=2, init_from="gpt2")])
def test_lean_options_that_fsdp_excludes_are_refused(dataset, tmp_path, monkeypatch, capsys,
                                                     fields):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, error = run_script(monkeypatch, capsys, train.main, arguments(
        dataset, tmp_path / "out", parallel="fsdp", **fields))
    assert status == 1 and "cannot be combined" in error and error.count("\n") == 1


# -----------------------------------------------------------------------------
# the plan

def kept_by_autograd(model, idx, autocast):
    """Bytes that a forward pass keeps for the backward pass, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
          torch.autocast("cpu", autocast, enabled=autocast != torch.float32)):
        loss = model(idx, idx)
    del loss
    return sum(kept.values())


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def returned_when_freed(size):
    """Whether every second of 12 blocks is returned to the system when it is freed."""
    blocks = [torch.ones(size // 4) for _ in range(12)]
    before = resident()
    del blocks[::2]
    return before - resident() > 0.9 * 6 * size


def which_blocks_are_returned(pipe):
    torch.ones(7 * 2**20)  # 28 MB: once it is freed, glibc keeps freed blocks of up to that size
    for tuned in (False, True):
        if tuned:
            devices.tune_malloc()
        pipe.send((tuned, returned_when_freed(3 * 2**20), returned_when_freed(40 * 2**20)))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_tune_malloc_keeps_freed_memory_in_the_process():
    """By default glibc keeps blocks of 3 MB and returns blocks of 40 MB. Runs in a new process."""
    here, there = multiprocessing.Pipe()
    process = fork_context().Process(target=which_blocks_are_returned, args=(there,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert [here.recv() for _ in range(2)] == [(False, False, True), (True, False, False)]


def test_a_run_on_a_cpu_calls_tune_malloc(dataset, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "tune_malloc", lambda: asked.append(True))
    run_train(dataset, tmp_path / "out", max_iters=1)
    assert asked == [True]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("fields, compute", [
    ({}, torch.float32), ({}, torch.bfloat16), (dict(weights="bfloat16"), torch.bfloat16),
    (dict(weights="bfloat16"), torch.float32), (dict(recompute=True), torch.float32)])
def test_predicted_activations_are_those_that_autograd_keeps(fields, compute, dropout):
    """The bytes of one more layer agree within 4 %. With dropout they agree within 8 %, because
    the bytes of attention then depend on the kernel."""
    cfg = replace(Config(batch_size=2, dropout=dropout), **fields)
    real, predicted = [], []
    for n_layer in (2, 3):
        config = GPTConfig(block_size=64, vocab_size=11, n_layer=n_layer, n_head=4, n_embd=64,
                           dropout=dropout)
        model = GPT(config).train()
        model.set_dtype(getattr(torch, cfg.weights))
        model.recompute = cfg.recompute
        real.append(kept_by_autograd(model, torch.zeros(2, 64, dtype=torch.long), compute))
        predicted.append(model.activation_bytes(cfg.batch_size, "cpu", compute)[0])
    assert predicted[1] - predicted[0] == pytest.approx(real[1] - real[0],
                                                        rel=0.08 if dropout else 0.04)


def test_predicted_moments_are_those_that_the_optimizer_keeps(torchao):
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 100), (64, 64), (64,))]
    for name in optimizers.NAMES:
        optimizer = optimizers.make_optimizer(name, [{"params": params}], 1e-3, (0.9, 0.95),
                                              torch.device("cpu"))
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        for p in params:
            state = optimizers.plain_state(optimizer.state[p])
            real = sum(t.numel() * t.element_size() for key, t in state.items() if key != "step")
            assert plan.moment_bytes(p.shape, name) == real


def world(device="cuda", ranks=1):
    return World(rank=0, size=ranks, device=torch.device(device))


def total(config, cfg, device="cuda", dtype=torch.bfloat16, ranks=1):
    return sum(plan.memory(config, cfg, world(device, ranks), dtype).values())


def test_gpt2_xl_fits_the_memory_that_the_config_files_promise():
    """gpt2-xl has 1,557,611,200 weights: on a GPU it trains in 11 GB, or in 4.5 GB with LoRA."""
    lean = replace(ONE, **LEAN)
    parts = plan.memory(XL, lean, world(), torch.bfloat16)
    assert parts["weights"] == pytest.approx(2 * 1_557_611_200, rel=0.001)
    assert parts["gradients"] == parts["weights"]
    assert parts["optimizer"] == pytest.approx(2.035 * 1_557_611_200, rel=0.005)
    assert sum(parts.values()) < 11 * GB
    assert total(XL, replace(lean, optimizer="adamw", lora_rank=16)) < 4.5 * GB
    assert total(XL, ONE, "cpu", torch.float32) > 25 * GB


def test_gradients_add_to_the_peak_only_with_several_micro_batches_or_ddp():
    one, many = replace(ONE, gradient_accumulation_steps=1), ONE
    gradients = plan.memory(GPT2, many, world(), torch.float32)["gradients"]
    assert gradients == 4 * sum(p.numel() for p in plan.meta_model(GPT2, many).parameters())
    assert total(GPT2, one, dtype=torch.float32) < total(GPT2, many, dtype=torch.float32)
    ranks = replace(ONE, gradient_accumulation_steps=2)
    # each of two ranks has one micro-batch, but DDP's buckets keep the gradients
    assert total(GPT2, ranks, ranks=2) == total(GPT2, ranks)


def test_each_advised_option_saves_the_bytes_that_the_advice_says(monkeypatch):
    """Options are advised one by one until the run fits in 20 or 11 GB; in 3 GB it never fits."""
    for usable, last in ((20, "which fits"), (11, "which fits"), (3, "a larger device")):
        monkeypatch.setattr(plan, "device_memory", lambda device, n=usable: n * GB / plan.USABLE)
        lines, fits = plan.describe_memory(XL, ONE, world(), torch.bfloat16)
        assert not fits and last in lines[-1]
        cfg, before = ONE, total(XL, ONE)
        for line in lines[2:]:
            if not line.startswith("  --") or "block_size" in line:
                continue
            fields = dict(word.strip("-").split("=") for word in line.split() if "--" in word)
            cfg = replace(cfg, **{k: type(getattr(cfg, k))(v) for k, v in fields.items()})
            assert f"saves {plan.format_bytes(before - total(XL, cfg))}: " in line
            before = total(XL, cfg)
    monkeypatch.setattr(plan, "device_memory", lambda device: 80 * GB)
    lines, fits = plan.describe_memory(XL, ONE, world(), torch.bfloat16)
    assert fits and len(lines) == 1 and "cuda has 80.00 GB" in lines[0]
    for part in ("weights 6.23 GB", "gradients 6.23 GB", "optimizer 12.46 GB", "activations",
                 "logits"):
        assert part in lines[0]


def test_the_advice_has_no_options_that_are_refused_together():
    fsdp = replace(ONE, parallel="fsdp")
    assert not any("weights" in change or "lora_rank" in change
                   for change in plan.changes(XL, fsdp, world(ranks=4)))
    scratch = replace(ONE, init_from="scratch")
    assert not any("lora_rank" in change for change in plan.changes(XL, scratch, world()))
    assert total(XL, fsdp, ranks=4) < total(XL, ONE, ranks=4) / 2


def test_a_dry_run_of_each_lean_config_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    dataset = write_dataset(tmp_path / "chars", n_val=1200)
    for name, part in (("16gb", "optimizer 3.17 GB"), ("lora", "19.66M parameters are trained")):
        train.main([f"config/finetune_shakespeare_{name}.py", f"--dataset={dataset}",
                    f"--out_dir={tmp_path / 'out'}", "--device=cpu", "--dry_run=True"])
        output = capsys.readouterr().out
        for each in (part, "tokens per iteration: 32,768", "a save takes", "epochs", "peak memory",
                     "weights 3.1" if name == "16gb" else "weights 3.2"):
            assert each in output
    assert not (tmp_path / "out").exists()


def test_a_dry_run_works_with_any_init_from(dataset, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_train(dataset, out, max_iters=1) == 0
    for init_from in ("resume", str(out), "scratch"):
        train.main(arguments(dataset, out, dry_run=True, init_from=init_from))
        assert "model: 0.01M parameters, cpu, float32" in capsys.readouterr().out


def test_a_run_that_may_not_fit_prints_a_warning(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "device_memory", lambda device: 1e8)
    assert run_train(dataset, tmp_path / "out", max_iters=1) == 0
    output = capsys.readouterr().out
    assert "warning: the memory may be too small" in output and "that does not fit" in output
