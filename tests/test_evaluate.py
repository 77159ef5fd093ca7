"""The reported loss equals that of a plain loop over transformers' model, for any batch size and
number of processes."""
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import hf_model, tiny_gpt
from torch.nn import functional as F

from evaluate import main
from model import GPT
from nanotune.errors import UserError
from nanotune.evaluation import perplexity
from nanotune.evaluation.perplexity import evaluate_loss
from nanotune.text.loader import TokenBin
from nanotune.training.distributed import World

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
T, N = 24, 500


@pytest.fixture
def val_bin(tmp_path):
    path = tmp_path / "val.bin"
    np.random.RandomState(0).randint(0, 61, N).astype("<u2").tofile(path)
    return path


def loss_of(model, data, eval_iters=0, batch_size=3, world=ALONE, dtype=torch.float32):
    windows = data.windows(eval_iters * batch_size)
    return evaluate_loss(model, data, windows, batch_size, world, dtype)


@torch.no_grad()
def plain_loop(theirs, tokens, starts):
    """The mean loss over all targets of the windows that begin at `starts`."""
    total, count = 0.0, 0
    for start in starts:
        window = torch.from_numpy(tokens[start:start + T + 1].astype(np.int64))
        logits = theirs(window[None, :-1]).logits[0]
        total += F.cross_entropy(logits.double(), window[1:], reduction="sum").item()
        count += len(window) - 1
    return total / count


@pytest.mark.parametrize("neo", [False, True], ids=["gpt2", "neo"])
def test_the_loss_equals_that_of_transformers(neo, val_bin, write_hf):
    theirs = hf_model(neo=neo)
    ours = GPT.from_pretrained(str(write_hf(theirs)))
    data, tokens = TokenBin(val_bin, T, 61), np.fromfile(val_bin, "<u2")
    whole = plain_loop(theirs, tokens, range(0, N - 1, T))  # the last window is cut short
    assert loss_of(ours, data) == pytest.approx(whole, abs=1e-4)
    spaced = [round(i * (N - 1 - T) // 5) for i in range(6)]
    assert loss_of(ours, data, 2, 3) == pytest.approx(plain_loop(theirs, tokens, spaced), abs=1e-4)
    assert abs(whole - plain_loop(theirs, tokens, spaced)) > 1e-3  # the two losses differ


def test_a_compiled_model_sees_batches_of_one_shape(val_bin):
    model, data = tiny_gpt(61, block_size=T), TokenBin(val_bin, T, 61)
    plain, shapes = loss_of(model, data, batch_size=4), set()  # 21 windows

    def forward(x, y):
        shapes.add(x.shape)
        return model.forward(x, y)

    model._compiled_call_impl = forward  # what model.compile() sets
    assert loss_of(model, data, batch_size=4) == pytest.approx(plain, rel=1e-6)
    assert shapes == {(4, T)}


def test_a_mask_leaves_targets_out(val_bin, write_hf):
    theirs = hf_model()
    ours = GPT.from_pretrained(str(write_hf(theirs)))
    mask = np.zeros(N, dtype=np.uint8)
    mask[1 + T:1 + 3 * T] = 1  # the second and third window
    mask.tofile(val_bin.with_suffix(".mask.bin"))
    expected = plain_loop(theirs, np.fromfile(val_bin, "<u2"), [T, 2 * T])
    assert loss_of(ours, TokenBin(val_bin, T, 61)) == pytest.approx(expected, abs=1e-4)


def test_a_mask_that_leaves_no_target_is_refused(val_bin):
    val_bin.with_suffix(".mask.bin").write_bytes(bytes(N))
    with pytest.raises(UserError, match=r"val.bin: no target in the windows read"):
        loss_of(tiny_gpt(61), TokenBin(val_bin, 16, 61))


@pytest.mark.parametrize("eval_windows", [0, 12])
def test_the_batch_size_does_not_change_the_loss(val_bin, eval_windows):
    model, data = tiny_gpt(61), TokenBin(val_bin, 16, 61)
    expected = loss_of(model, data, eval_windows, 1)
    for size in (2, 3, 4, 12):
        assert loss_of(model, data, eval_windows // size, size) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_evaluation_changes_no_mode_gradient_or_random_state(val_bin, training):
    model, data = tiny_gpt(61, dropout=0.5).train(training), TokenBin(val_bin, 16, 61, seed=7)
    model.transformer.wte.weight.grad = torch.ones(61, 16)
    before, batch = torch.get_rng_state(), data.batch(5, 2)[0]
    first, second = loss_of(model, data), loss_of(model, data)
    assert first == second == loss_of(model.eval(), data)  # no dropout
    model.train(training)
    loss_of(model, data)
    assert all(part.training == training for part in model.modules())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(data.batch(5, 2)[0], batch)
    assert torch.equal(model.transformer.wte.weight.grad, torch.ones(61, 16))


@pytest.mark.parametrize("size", [2, 3, 50])
def test_ranks_share_the_windows(val_bin, size, monkeypatch):
    """The sums over all ranks equal those of one process."""
    model, data, sums = tiny_gpt(61), TokenBin(val_bin, 16, 61), []
    expected = loss_of(model, data)

    def keep(loss, count, device):
        sums.append((loss, count))
        return [0.0, 1.0]
    monkeypatch.setattr(perplexity, "sum_over_ranks", keep)
    for rank in range(size):
        loss_of(model, data, world=World(rank, size, torch.device("cpu")))
    loss, count = map(sum, zip(*sums))
    assert count == N - 1 and loss / count == pytest.approx(expected, abs=1e-6)


def test_the_loss_under_bfloat16_autocast_is_close_to_float32(val_bin):
    model, data = tiny_gpt(61), TokenBin(val_bin, 16, 61)
    exact, rough = loss_of(model, data), loss_of(model, data, dtype=torch.bfloat16)
    assert exact != rough and rough == pytest.approx(exact, abs=0.02)


# -----------------------------------------------------------------------------
# the command

@pytest.fixture
def run(make_dataset, make_run):
    folder, tokenizer = make_dataset("chars")
    return folder, *make_run(tokenizer)


def test_the_command_prints_the_loss_of_a_split(run, capsys):
    folder, out_dir, model = run
    argv = [f"--out_dir={out_dir}", f"--dataset={folder}", "--device=cpu", "--dtype=float32"]
    for split in ("val", "train"):
        main([*argv, f"--split={split}"])
        expected = loss_of(model, TokenBin(folder / f"{split}.bin", 16, model.config.vocab_size))
        line = capsys.readouterr().out
        found = re.search(r"loss ([\d.]+) nats per token, perplexity ([\d.]+), windows of 16", line)
        assert float(found[1]) == pytest.approx(expected, abs=6e-5)
        assert float(found[2]) == pytest.approx(math.exp(expected), abs=6e-3)
    main([*argv, "--block_size=5", "--eval_iters=6", "--batch_size=3"])
    model.crop_block_size(5)
    expected = loss_of(model, TokenBin(folder / "val.bin", 5, model.config.vocab_size), 2, 3)
    assert f"loss {expected:.4f} nats per token" in capsys.readouterr().out


@pytest.mark.parametrize("arg, message", [
    ("--split=dev", "dev.bin does not exist; run: python"),
    ("--dataset=none", "the dataset folder data/none does not exist"),
    ("--out_dir=out-none", "out-none does not exist"),
    ("--block_size=17", "block_size=17 is more than the 16 positions"),
    ("--block_size=0", "block_size=0 must be at least 1"),
    ("--batch_size=0", "--batch_size=0 must be at least 1"),
    ("--eval_iters=-1", "--eval_iters=-1 must be at least 0"),
])
def test_bad_options_are_refused(run, arg, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, out_dir, _ = run
    with pytest.raises(UserError, match=message) as error:
        main([f"--out_dir={out_dir}", f"--dataset={folder}", "--device=cpu", arg])
    assert "\n" not in str(error.value)


def test_data_from_another_tokenizer_is_refused(run, make_dataset):
    _, out_dir, _ = run
    other, _ = make_dataset("json", name="other")
    with pytest.raises(UserError, match=r"out-tiny uses a character vocabulary .* was made with "
                                         r"a tokenizer.json .*prepare the text again"):
        main([f"--out_dir={out_dir}", f"--dataset={other}", "--device=cpu"])


def test_a_real_model_predicts_real_text(shared, gpt2_vocabulary, tmp_path, capsys):
    """The loss is at least 4 nats below that of a uniform guess."""
    from nanotune.text.tokenizer import GPT2Tokenizer
    text = shared("data/tinyshakespeare/input.txt").read_text(encoding="utf-8")[:4000]
    ids = GPT2Tokenizer().encode(text)
    np.array(ids, dtype="<u2").tofile(tmp_path / "val.bin")
    folder = shared("models/gutenberg-17m")
    main([f"--init_from={folder}", f"--dataset={tmp_path}", "--device=cpu", "--dtype=float32"])
    loss = float(re.search(r"loss ([\d.]+)", capsys.readouterr().out)[1])
    assert loss < math.log(json.loads((folder / "config.json").read_text())["vocab_size"]) - 4
