"""train.py with a T5 on pairs: compared with transformers, resumed, on ranks, refused options."""
import shutil

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny import arguments, losses, run_script, run_train, write_dataset

import train
from nanotune import files
from nanotune.formats import checkpoint
from nanotune.formats.checkpoint import load_model
from nanotune.text.loader import open_dataset
from nanotune.training import plan
from nanotune.training.distributed import World
from t5 import T5Config

torch.set_num_threads(1)


@pytest.fixture
def fields(t5_folders):
    """The fields that tiny.arguments() needs for a run of T5."""
    return dict(init_from=t5_folders[0], dataset=t5_folders[1], block_size=None, eval_iters=0,
                keep_states=1, gradient_accumulation_steps=4, weight_decay=0.01, decay_lr=False)


def on_ranks(size, out, **fields):
    argv = arguments(fields.pop("dataset"), out, **fields)
    statuses, output = run_ranks(size, argv, out.with_suffix(f".log{size}"))
    assert statuses == [0] * size, output
    return output


def weights_of(out):
    return files.load(out / checkpoint.STATE_FILE)["model"]


def assert_same_weights(a, b):
    ours, theirs = weights_of(a), weights_of(b)
    assert ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)


def test_twenty_steps_equal_those_of_a_loop_with_transformers(t5_folders, fields, tmp_path):
    """AdamW on the mean loss over the target tokens of a global batch, with clipped gradients."""
    from transformers import AutoModelForSeq2SeqLM
    model, data = t5_folders
    run_train(fields.pop("dataset"), tmp_path / "out", **fields | dict(
        batch_size=2, max_iters=20, eval_interval=20, dropout=0.0))
    ours = [entry["loss"] for entry in losses(tmp_path / "out") if "loss" in entry]
    theirs = AutoModelForSeq2SeqLM.from_pretrained(model).train()
    pairs = open_dataset(data / "train.bin", checkpoint.model_config(str(model)), 1337,
                         global_batch=8)
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in theirs.parameters() if p.dim() >= 2]},
         {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01)
    for step, loss in enumerate(ours):
        x, y = pairs.batch(8 * step, 8)
        expected = theirs(input_ids=x.clamp(min=0), attention_mask=(x >= 0).long(),
                          labels=y.masked_fill(y < 0, -100)).loss
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        expected.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert len(ours) == 20 and ours[-1] < ours[0]


@pytest.mark.parametrize("options", [
    {}, dict(recompute=True), dict(weights="bfloat16"), dict(lora_rank=2),
    dict(optimizer="adamw8bit"), dict(optimizer="adafactor"),
    dict(source_length=8, target_length=3)])
def test_a_run_resumed_at_step_3_of_6_is_bitwise_the_same(fields, tmp_path, monkeypatch, options):
    """With dropout; the epoch of 60 pairs ends within the run."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # for torchao's update
    data, fields = fields.pop("dataset"), fields | options | dict(batch_size=4)
    run_train(data, tmp_path / "whole", **fields)
    run_train(data, tmp_path / "half", **fields | dict(max_iters=3))
    run_train(data, tmp_path / "half", **fields | dict(init_from="resume"))
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")
    assert_same_weights(tmp_path / "half", tmp_path / "whole")
    model, _ = load_model(str(tmp_path / "whole"))
    assert model.config.source_length == options.get("source_length", 512)


def assert_same_run(a, b):
    """Compare losses and weights within rounding errors, as sums are in another order."""
    for ours, theirs in zip(losses(a), losses(b), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    for key, tensor in weights_of(b).items():
        torch.testing.assert_close(weights_of(a)[key], tensor, rtol=0, atol=2e-3)


def test_any_split_into_micro_steps_gives_the_same_run(fields, tmp_path):
    data, fields = fields.pop("dataset"), fields | dict(dropout=0.0)
    run_train(data, tmp_path / "8", **fields | dict(batch_size=8, gradient_accumulation_steps=1))
    run_train(data, tmp_path / "1", **fields | dict(batch_size=1, gradient_accumulation_steps=8))
    assert_same_run(tmp_path / "1", tmp_path / "8")


@pytest.mark.slow
def test_two_ranks_with_adafactor_resume_bitwise(fields, tmp_path):
    fields |= dict(optimizer="adafactor")
    on_ranks(2, tmp_path / "whole", **fields)
    on_ranks(2, tmp_path / "half", **fields | dict(max_iters=3))
    on_ranks(2, tmp_path / "half", **fields | dict(init_from="resume"))
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")
    assert_same_weights(tmp_path / "half", tmp_path / "whole")


def test_two_ranks_equal_one_process_and_resume_bitwise(fields, tmp_path):
    """With DDP, also resumed; with FSDP, also while drawing samples. Dropout is on: it depends on
    the micro-step, not on the rank."""
    alone = {name: value for name, value in fields.items() if name != "dataset"}
    run_train(fields["dataset"], tmp_path / "one", **alone)
    on_ranks(2, tmp_path / "ddp", **fields)
    on_ranks(2, tmp_path / "half", **fields | dict(max_iters=3))
    on_ranks(2, tmp_path / "half", **fields | dict(init_from="resume"))
    assert losses(tmp_path / "half") == losses(tmp_path / "ddp")
    assert_same_weights(tmp_path / "half", tmp_path / "ddp")
    sharded = dict(parallel="fsdp", sample_interval=1, sample_start="Line a")
    assert "--- sample ---\nLine a\n" in on_ranks(2, tmp_path / "fsdp", **fields | sharded)
    for name in ("ddp", "fsdp"):
        assert_same_run(tmp_path / name, tmp_path / "one")


def test_a_t5_compiles_as_one_graph(t5_folders):
    model, _ = load_model(str(t5_folders[0]))
    data = open_dataset(t5_folders[1] / "train.bin", model.config)
    batch = data.batch(0, 4)
    loss = model(*batch)
    model.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(*batch), loss)  # the compiled head has other chunks


@pytest.mark.slow
def test_a_compiled_run_equals_an_eager_one(fields, tmp_path, capsys):
    """With Inductor and batches of several lengths; this takes minutes."""
    data = fields.pop("dataset")
    run_train(data, tmp_path / "eager", **fields | dict(dropout=0.0))
    run_train(data, tmp_path / "compiled", **fields | dict(dropout=0.0, compile=True))
    assert "float32, compiled" in capsys.readouterr().out
    assert_same_run(tmp_path / "compiled", tmp_path / "eager")


def test_the_plan_counts_epochs_of_pairs_and_warns_of_long_sources(fields, tmp_path, capsys):
    run_train(fields.pop("dataset"), tmp_path / "out", **fields | dict(
        source_length=8, max_iters=15, eval_interval=15))
    out = capsys.readouterr().out
    assert "15 iterations make 2.00 epochs (1 epoch = 7.5 iterations)" in out
    assert "of 60 sources are longer than source_length=8 and are cut" in out
    assert "targets are longer" not in out


def test_the_predicted_memory_depends_on_the_lengths_of_the_data(t5_folders, fields, tmp_path,
                                                                 monkeypatch, capsys):
    """Not on the limits, which are 512 tokens for sources and for targets."""
    monkeypatch.setattr(plan, "device_memory", lambda device: 350 * 10**6)
    run_train(fields.pop("dataset"), tmp_path / "out", **fields | dict(batch_size=8, max_iters=1))
    assert "may be too small" not in capsys.readouterr().out


def test_a_dry_run_prints_the_plan_and_writes_nothing(fields, tmp_path, capsys):
    train.main(arguments(fields.pop("dataset"), tmp_path, **fields, dry_run=True))
    assert "7.5 iterations" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("options, message", [
    (dict(dtype="float16"), "T5 overflows in float16; use --dtype=bfloat16"),
    (dict(block_size=16), "T5 takes --source_length and --target_length"),
    (dict(separate_documents=True), "--separate_documents is for models of plain text"),
    (dict(init_from="scratch", separate_documents=True), "holds pairs of a source and a target"),
    (dict(init_from="scratch"), "holds pairs of a source and a target, for T5"),
    (dict(sample_interval=1, sample_start=""), "--sample_start has no tokens"),
    (dict(target_length=0), "--target_length=0 must be at least 1"),
])
def test_options_that_a_t5_excludes_are_refused(fields, tmp_path, monkeypatch, capsys, options,
                                                message):
    argv = arguments(fields.pop("dataset"), tmp_path / "out", **fields | options)
    status, _, err = run_script(monkeypatch, capsys, train.main, argv)
    assert status == 1 and message in err and err.count("\n") == 1, err


def test_t5_refuses_plain_text_and_a_gpt_refuses_options_of_pairs(t5_folders, fields, tmp_path,
                                                                  monkeypatch, capsys):
    text = tmp_path / "text"
    shutil.copytree(t5_folders[1], text, ignore=shutil.ignore_patterns("*.pairs.bin"))
    argv = arguments(text, tmp_path / "out", **{k: v for k, v in fields.items() if k != "dataset"})
    _, _, err = run_script(monkeypatch, capsys, train.main, argv)
    assert "holds plain text, but T5 takes pairs" in err and err.count("\n") == 1
    argv = arguments(write_dataset(tmp_path / "chars"), tmp_path / "out", source_length=8)
    _, _, err = run_script(monkeypatch, capsys, train.main, argv)
    assert "--source_length is for models of pairs, such as T5" in err and err.count("\n") == 1


def test_a_resume_with_other_lengths_is_refused(fields, tmp_path, monkeypatch, capsys):
    data = fields.pop("dataset")
    run_train(data, tmp_path / "out", **fields | dict(source_length=8, max_iters=3))
    argv = arguments(data, tmp_path / "out", **fields | dict(init_from="resume", source_length=9))
    _, _, err = run_script(monkeypatch, capsys, train.main, argv)
    assert "source_length was 8, now 9" in err
    run_train(data, tmp_path / "out", **fields | dict(init_from="resume", max_iters=4))


@pytest.mark.parametrize("batch_size, dtype, dropout, measured", [
    (8, torch.float32, 0.1, 4.745), (32, torch.float32, 0.1, 6.962),
    (16, torch.float32, 0.0, 4.795), (32, torch.bfloat16, 0.1, 6.194)])
def test_the_predicted_memory_of_t5_base_is_within_10_percent(batch_size, dtype,
                                                              dropout, measured):
    """Peak GB of train.py on a CPU, for pairs of 64 + 8 tokens and one micro-step."""
    config = T5Config(n_layer=12, n_decoder_layer=12, n_head=12, n_embd=768, n_inner=3072,
                      source_length=64, target_length=8)
    cfg = train.Config(batch_size=batch_size, gradient_accumulation_steps=1, dropout=dropout)
    world = World(rank=0, size=1, device=torch.device("cpu"))
    predicted = sum(plan.memory(config, cfg, world, dtype).values()) / 1e9
    assert predicted == pytest.approx(measured, rel=0.1)


def test_the_plan_uses_the_longest_pairs_of_the_data(t5_folders):
    """Memory depends on the lengths of the data, not on the limits."""
    model, data = t5_folders
    config = checkpoint.model_config(str(model))
    longest = open_dataset(data / "train.bin", config).largest(config)
    cfg = train.Config(batch_size=64, dropout=0.1)
    world = World(rank=0, size=1, device=torch.device("cuda"))
    sums = [sum(plan.memory(c, cfg, world, torch.bfloat16).values()) for c in (longest, config)]
    assert sums[0] < sums[1] / 5
    assert np.isfinite(sums).all()
    saving = [change for change in plan.changes(config, cfg, world) if "source_length" in change]
    assert saving == [{"source_length": 256}]
    assert plan.advise(config, cfg, world, torch.bfloat16, 1.0, sums[1])[-2].startswith(
        "  --source_length=256 saves")
