"""The plan that a run prints: size, epochs, disk, memory per process; and matmul_peak()."""
import collections
import types

import torch

from model import GPT, GPTConfig
from nanotune.device import matmul_peak
from nanotune.training import plan
from nanotune.training.distributed import World
from nanotune.training.plan import describe_saves, format_bytes, plan_lines
from train import Config

XL = GPTConfig(vocab_size=50257, n_layer=48, n_head=25, n_embd=1600)
CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, device=CPU)
FOUR = World(rank=0, size=4, device=CPU)


def test_bytes_are_printed_with_a_unit_and_at_most_three_digits():
    assert [format_bytes(n) for n in (0, 999, 1000, 27_400, 999_400_000, 1_494_000_000)] == [
        "0 bytes", "999 bytes", "1 kB", "27 kB", "999 MB", "1.49 GB"]


def test_the_plan_of_finetuning_gpt2_xl(tmp_path):
    """As in nanoGPT's config/finetune_shakespeare.py, 1 epoch is 9.2 iterations."""
    cfg = Config(out_dir=str(tmp_path), dataset="shakespeare", batch_size=1, max_iters=20,
                 gradient_accumulation_steps=32)
    text = "\n".join(plan_lines(cfg, XL, ALONE, torch.bfloat16, True, 301_966, 36_059))
    for part in ("1557.61M parameters, cpu, bfloat16, compiled", "301,966 training tokens",
                 "36,059 for validation", "tokens per iteration: 32,768",
                 "20 iterations make 2.17 epochs (1 epoch = 9.2 iterations)",
                 "6.23 GB (ckpt.pt, and as much for best.pt) + 18.69 GB (state.pt)", str(tmp_path)):
        assert part in text


def test_the_plan_shows_the_number_of_processes():
    config = GPTConfig(16, 61, n_layer=1, n_head=2, n_embd=16)
    cfg = Config(batch_size=1, gradient_accumulation_steps=4, max_iters=0)
    text = "\n".join(plan_lines(cfg, config, FOUR, torch.float32, False, 500, 100))
    assert "cpu x 4 processes, float32\n" in text
    assert "0 iterations make 0.00 epochs" in text
    cfg = Config(batch_size=1, gradient_accumulation_steps=4, max_iters=1)
    text = "\n".join(plan_lines(cfg, config, FOUR, torch.float32, False, 500, 100))
    assert "1 iteration makes 0.13 epochs" in text


def test_few_steps_of_epochs_give_a_warning_that_names_a_field():
    def warnings(**fields):
        data = types.SimpleNamespace(warnings=lambda eot: [])
        return plan.warnings(Config(**fields, decay_lr=False), data, None)

    assert warnings(epochs=3, max_iters=1) == [
        "only 1 step: lower --gradient_accumulation_steps or raise --epochs"]
    fields = dict(epochs=3, gradient_accumulation_steps=1)
    assert warnings(**fields, max_iters=9) == ["only 9 steps: lower --batch_size or raise --epochs"]
    assert warnings(**fields, max_iters=9, batch_size=1) == ["only 9 steps: raise --epochs"]
    assert warnings(**fields, max_iters=10) == warnings(max_iters=1) == []


def test_a_disk_too_small_for_the_saves_gets_a_warning(tmp_path, monkeypatch):
    """Old states stay while a new one is written: 2 * 6.23 + 3 * 18.69 GB with keep_states=2."""
    def lines(keep_states):
        return describe_saves(model, Config(out_dir=str(tmp_path), keep_states=keep_states), ALONE)

    usage, model = collections.namedtuple("usage", "free"), GPT.empty(XL, "meta")
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: usage(68_600_000_000))
    assert not any("warning" in line for line in lines(2))
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: usage(68_430_000_000))
    *_, last = lines(2)
    assert last.startswith("warning: ") and "free 105 MB, lower --keep_states" in last
    assert len(lines(1)) == 1


def test_the_plan_shows_the_memory_of_a_model_sharded_by_fsdp(tmp_path):
    """Each of four processes has a quarter of weights, gradients and two moments, in float32."""
    model = torch.nn.Linear(1000, 1000, bias=False)
    _, line = describe_saves(model, Config(out_dir=str(tmp_path), parallel="fsdp"), FOUR)
    assert "each process holds 4 MB of weights, gradients and moments, 1/4" in line
    assert "rank 0 gathers 12 MB in its CPU memory" in line


def test_the_matmul_peak_is_plausible():
    cpu = torch.device("cpu")
    assert 1e8 < matmul_peak(cpu, torch.float32) < 1e14
    # a CPU without float16 instructions is far slower
    assert 1e6 < matmul_peak(cpu, torch.float16) < 1e14
