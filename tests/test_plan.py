"""What a run will take."""
import torch

from distributed import World
from plan import describe, matmul_peak, spell_bytes


def test_bytes_are_spelled():
    assert [spell_bytes(n) for n in (0, 999, 1000, 27_400, 999_400_000, 1_494_000_000)] == [
        "0 bytes", "999 bytes", "1 kB", "27 kB", "999 MB", "1.49 GB"]


def test_the_plan_of_finetuning_gpt2_xl(tmp_path):
    """nanoGPT's config/finetune_shakespeare.py says: 1 epoch is 9.2 iterations."""
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    text = "\n".join(describe(1_557_611_200, 32 * 1024, 20, 301_966, 36_059, world, torch.bfloat16,
                              True, tmp_path, "shakespeare"))
    for part in ("1557.61M parameters, cpu, bfloat16, compiled", "301,966 training tokens",
                 "36,059 for validation", "tokens per iteration: 32,768",
                 "20 iterations make 2.17 epochs (1 epoch = 9.2 iterations)",
                 "6.23 GB (ckpt.pt) + 18.69 GB (state.pt)", str(tmp_path)):
        assert part in text


def test_the_plan_names_several_processes(tmp_path):
    world = World(rank=0, size=4, local_rank=0, device=torch.device("cpu"))
    text = "\n".join(describe(1000, 64, 0, 500, 100, world, torch.float32, False, tmp_path, "x"))
    assert "cpu x 4 processes, float32\n" in text
    assert "0 iterations make 0.00 epochs" in text


def test_the_peak_is_that_of_a_product():
    cpu = torch.device("cpu")
    assert 1e8 < matmul_peak(cpu, torch.float32) < 1e14
    # a CPU without instructions for it has a far lower one, and does not take minutes to say so
    assert 1e6 < matmul_peak(cpu, torch.float16) < 1e14
