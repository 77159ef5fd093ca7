"""LoRA: the adapted layers, runs that train adapters, and merging when a model is loaded."""
import pytest
import torch
from conftest import tiny_gpt
from ranks import run_ranks
from test_resume import FIELDS, assert_same_run
from tiny import arguments, losses, run_script, run_train, write_dataset

import evaluate
import sample
import train
from nanotune import files
from nanotune.errors import UserError
from nanotune.evaluation.perplexity import evaluate_loss
from nanotune.formats import checkpoint
from nanotune.text.loader import TokenBin
from nanotune.training.distributed import read_world
from nanotune.training.lora import LAYERS, SCALE, LoRALinear, adapters, add_lora, merge_lora

NEO = dict(attn_scale=1.0, qkv_bias=False, local_window=4)


def shake(model, seed=1):
    """Give the adapters random values, because new adapters do not change the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in adapters(model).values():
            param.normal_(0, 0.3, generator=generator)
    return model


@pytest.fixture
def idx():
    return torch.arange(24).view(2, 12) % 7


# -----------------------------------------------------------------------------
# the layers

@pytest.mark.parametrize("fields", [{}, NEO, dict(bias=False)], ids=["gpt2", "neo", "no biases"])
def test_adding_or_merging_adapters_does_not_change_the_logits(idx, fields):
    model = tiny_gpt(7, **fields)
    names, before = list(model.state_dict()), model.logits(idx)
    add_lora(model, rank=3)
    assert torch.equal(model.logits(idx), before)
    after = shake(model).logits(idx)
    assert (after - before).abs().max() > 0.1
    merge_lora(model)
    assert list(model.state_dict()) == names
    assert all(param.requires_grad for param in model.parameters())
    torch.testing.assert_close(model.logits(idx), after, atol=1e-4, rtol=1e-4)


def test_an_adapter_adds_scale_times_b_times_a():
    layer = LoRALinear(torch.nn.Linear(5, 4), 2)
    torch.nn.init.normal_(layer.lora_a)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(3, 5)
    expected = layer.base(x) + SCALE * x @ (layer.lora_b @ layer.lora_a).t()
    torch.testing.assert_close(layer(x), expected)


def test_each_matrix_of_a_block_gets_an_adapter_and_nothing_else_does():
    model = tiny_gpt(7)
    matrices = {name for name, p in model.named_parameters() if ".h." in name and p.dim() == 2}
    add_lora(model, rank=2)
    found = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert {f"{name}.weight" for name in found} == matrices
    assert {name.rpartition(".")[2] for name in found} == {"c_attn", "c_proj", "c_fc"} < set(LAYERS)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapters(model)) and len(trained) == 2 * len(found)


def test_new_adapters_depend_only_on_the_seed():
    torch.manual_seed(5)
    one = adapters(_with_lora(seed=1))
    torch.manual_seed(6)
    same, other = adapters(_with_lora(seed=1)), adapters(_with_lora(seed=2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def _with_lora(seed):
    model = tiny_gpt(7)
    add_lora(model, rank=2, seed=seed)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_merged_matrices(idx, dtype):
    """dL/dB = SCALE dL/dW A^T, with frozen weights of either dtype."""
    model = tiny_gpt(7)
    model.set_dtype(dtype)
    add_lora(model, rank=2)
    shake(model)
    model(idx, idx).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    params = adapters(model)
    name = "transformer.h.1.mlp.c_fc"
    grad_b, a = params[f"{name}.lora_b"].grad, params[f"{name}.lora_a"].detach()
    model.set_dtype(torch.float32)
    merge_lora(model)
    model(idx, idx).backward()
    expected = SCALE * model.transformer.h[1].mlp.c_fc.weight.grad @ a.t()
    torch.testing.assert_close(grad_b, expected, atol=1e-3, rtol=1e-3)


# -----------------------------------------------------------------------------
# runs

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(dataset, out_dir of a finished run, out_dir of a LoRA run of six steps with that base)."""
    folder = tmp_path_factory.mktemp("lora")
    dataset = write_dataset(folder / "chars")
    assert run_train(dataset, folder / "base", max_iters=3) == 0
    assert run_train(dataset, folder / "adapted", **lora_fields(folder / "base")) == 0
    return dataset, folder / "base", folder / "adapted"


def lora_fields(base, **fields):
    return FIELDS | dict(init_from=base, lora_rank=2) | fields


def test_a_run_learns_and_saves_only_adapters(base):
    _, model_dir, out = base
    evaluations = [entry["val_loss"] for entry in losses(out) if "val_loss" in entry]
    assert evaluations[-1] < evaluations[0]
    data, state = files.load(out / "ckpt.pt"), files.load(out / "state.pt")
    names = set(data["model"])
    assert names == set(state["model"]) == set(state["optimizer"])
    assert all(name.endswith(("lora_a", "lora_b")) for name in names)
    assert data["lora"] == dict(rank=2, base=str(model_dir), weights="float32",
                                hash=checkpoint.hash_of(model_dir))


def test_the_logged_loss_is_that_of_the_loaded_model(base):
    dataset, _, out = base
    model, tokenizer = checkpoint.load_model(out)
    assert not adapters(model)
    data = TokenBin(dataset / "val.bin", model.config.block_size, tokenizer.n_vocab)
    loss = evaluate_loss(model, data, data.windows(2), 2, read_world("cpu"), torch.float32)
    assert loss == pytest.approx(losses(out)[-1]["val_loss"], abs=1e-5)


def test_sample_and_evaluate_load_a_lora_run(base, monkeypatch, capsys):
    dataset, _, out = base
    status, output, _ = run_script(monkeypatch, capsys, sample.main, [
        f"--out_dir={out}", "--device=cpu", "--num_samples=1", "--max_new_tokens=5"])
    assert status == 0 and "-----" in output
    status, output, _ = run_script(monkeypatch, capsys, evaluate.main, [
        f"--out_dir={out}", f"--dataset={dataset}", "--device=cpu"])
    assert status == 0 and "perplexity" in output


@pytest.mark.parametrize("fields", [{}, dict(weights="bfloat16", recompute=True)])
def test_a_run_resumed_at_step_3_of_6_is_bitwise_the_same(base, tmp_path, fields):
    dataset, model_dir, whole = base
    fields = lora_fields(model_dir, **fields)
    if "weights" in fields:
        whole = tmp_path / "whole"
        assert run_train(dataset, whole, **fields) == 0
    assert run_train(dataset, tmp_path / "out", **fields | dict(max_iters=3)) == 0
    assert run_train(dataset, tmp_path / "out", **fields | dict(init_from="resume")) == 0
    assert_same_run(tmp_path / "out", whole)


def test_two_ranks_stopped_and_resumed_equal_one_process(base, tmp_path):
    """Only rank 0 reads the base and the adapters."""
    dataset, model_dir, _ = base
    fields = lora_fields(model_dir, weights="bfloat16")
    assert run_train(dataset, tmp_path / "one", **fields) == 0
    for changes in (dict(max_iters=3), dict(init_from="resume")):
        statuses, output = run_ranks(2, arguments(dataset, tmp_path / "two", **fields | changes),
                                     tmp_path / "logs")
        assert statuses == [0, 0], output
    assert_same_run(tmp_path / "one", tmp_path / "two", rel=1e-6)


def test_a_lora_run_can_be_the_base_of_another(base, tmp_path):
    dataset, _, out = base
    assert run_train(dataset, tmp_path / "next", **lora_fields(out, max_iters=1)) == 0
    model, _ = checkpoint.load_model(tmp_path / "next")
    assert len(model.state_dict()) == len(checkpoint.load_model(out)[0].state_dict())


def test_a_base_that_changed_or_is_gone_is_refused(tmp_path, monkeypatch, capsys):
    dataset = write_dataset(tmp_path / "chars")
    assert run_train(dataset, tmp_path / "base", max_iters=1) == 0
    assert run_train(dataset, tmp_path / "out", **lora_fields(tmp_path / "base", max_iters=1)) == 0
    assert run_train(dataset, tmp_path / "base", max_iters=2, init_from="resume") == 0
    with pytest.raises(UserError, match="hash differs"):
        checkpoint.load_model(tmp_path / "out")
    status, _, error = run_script(monkeypatch, capsys, train.main, arguments(
        dataset, tmp_path / "out", **lora_fields("resume")))
    assert status == 1 and "hash differs" in error
    (tmp_path / "base" / "ckpt.pt").unlink()
    with pytest.raises(UserError, match="which cannot be loaded"):
        checkpoint.load_model(tmp_path / "out")


def test_the_hash_depends_on_the_weights_and_not_on_their_path(tmp_path):
    hashes = []
    for name, weights in (("one", b"weights"), ("copy", b"weights"), ("other", b"weightz")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"name": "{name}"}}')
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        hashes.append(checkpoint.hash_of(str(tmp_path / name)))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("fields, message", [
    (dict(init_from="scratch"), "--lora_rank freezes the weights"),
    (dict(lora_rank=-1), "must be at least 0"),
    (dict(out_dir="BASE", overwrite=True), "is also the base of this LoRA run"),
    (dict(optimizer="adamw8bit"), "optimizer=adamw8bit and lora=yes cannot be combined"),
])
def test_options_that_lora_excludes_are_refused(base, tmp_path, monkeypatch, capsys, fields,
                                                message):
    dataset, model_dir, _ = base
    if "out_dir" in fields:
        fields = fields | dict(out_dir=model_dir)
    before = (model_dir / "ckpt.pt").read_bytes()
    status, _, error = run_script(monkeypatch, capsys, train.main, arguments(
        dataset, tmp_path / "out", **lora_fields(model_dir, **fields)))
    assert status == 1 and error.startswith("error: ") and message in error
    assert error.count("\n") == 1
    assert (model_dir / "ckpt.pt").read_bytes() == before


def test_a_resume_cannot_change_the_rank(base, monkeypatch, capsys):
    dataset, _, out = base
    status, _, error = run_script(monkeypatch, capsys, train.main, arguments(
        dataset, out, **lora_fields("resume", lora_rank=4)))
    assert status == 1 and "was started with lora_rank=2, which a resume cannot change" in error


def test_adapters_that_do_not_fit_the_base_are_refused(base, tmp_path):
    _, _, out = base
    data = files.load(out / "ckpt.pt")
    data["model"].popitem()
    (tmp_path / "cut").mkdir()
    files.save(tmp_path / "cut" / "ckpt.pt", data)
    with pytest.raises(UserError, match="its adapters do not fit"):
        checkpoint.load_model(tmp_path / "cut")
