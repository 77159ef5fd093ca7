"""Checkpoints are written whole or not at all, and refused if they are damaged or contain code;
those of nanoGPT are read."""
import errno
import io
import os
import pickle
import random
import shutil
import zipfile

import pytest
import torch
from tiny import nanogpt_checkpoint, write_dataset
from torch.nn import functional as F

import evaluate
import sample
from model import GPT, GPTConfig
from nanotune import files
from nanotune.errors import UserError
from nanotune.formats import checkpoint
from nanotune.training import state_dicts
from nanotune.training.distributed import read_world

CONFIG = GPTConfig(block_size=16, vocab_size=18, n_layer=2, n_head=2, n_embd=16)
ALONE = read_world("cpu")


class PowerCut(BaseException):
    """Simulates the end of the process: the code under test does not catch it."""


class Trap:
    """An object whose pickle creates a folder when it is loaded."""
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def data(fill=1.0):
    return {"model": {"w": torch.full((4, 8), fill)}, "model_args": {"n_layer": 2}}


def folder_is_clean(folder, *names):
    return sorted(os.listdir(folder)) == sorted(names)


def refused(path):
    """The one-line error that loading a checkpoint raises."""
    with pytest.raises(UserError) as e:
        files.load(path)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)
    return str(e.value)


# -----------------------------------------------------------------------------
# writing

def test_a_loaded_checkpoint_equals_the_saved_one(tmp_path):
    path = tmp_path / "ckpt.pt"
    saved = data() | {"iter_num": 3, "best_val_loss": 1.5, "config": {"dataset": "x", "n": None},
                      "tokenizer": {"kind": "characters", "itos": ["a", "é", "\n"]}}
    files.save(path, saved)
    loaded = files.load(path)
    assert torch.equal(loaded.pop("model")["w"], saved.pop("model")["w"])
    assert loaded == saved
    assert folder_is_clean(tmp_path, "ckpt.pt")


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_crash_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "ckpt.pt"
    files.save(path, data(1.0))

    def crash(*_):
        raise PowerCut

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(files.os, moment, crash)
        files.save(path, data(2.0))
    assert files.load(path)["model"]["w"][0, 0] == 1.0
    files.save(path, data(3.0))
    assert files.load(path)["model"]["w"][0, 0] == 3.0
    assert folder_is_clean(tmp_path, "ckpt.pt")


def test_the_new_file_is_synced_to_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(files.os, name,
                            lambda *a, name=name, real=real: (order.append(name), real(*a)))
    files.save(tmp_path / "ckpt.pt", data())
    assert order == ["fsync", "replace", "fsync"]  # the last one syncs the folder


@pytest.mark.parametrize("limit", [100, 70_000, 1_000_000, 1_048_700])
def test_a_full_disk_is_a_one_line_error_and_keeps_the_old_file(tmp_path, limit):
    path = tmp_path / "ckpt.pt"
    files.save(path, data(1.0))
    big = data() | {"model": {"w": torch.ones(512, 512)}}  # 1,048,576 bytes of weights
    resource = pytest.importorskip("resource", reason="limits on files are POSIX's")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError) as e:
            files.save(path, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(path) in str(e.value)
    assert "free space or choose another --out_dir" in str(e.value)
    assert "\n" not in str(e.value)
    assert files.load(path)["model"]["w"][0, 0] == 1.0
    assert folder_is_clean(tmp_path, "ckpt.pt")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   RuntimeError("PytorchStreamWriter failed\nwriting file")],
                         ids=["disk full", "torch's writer"])
def test_a_failed_write_is_a_one_line_error_and_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "state.pt"
    path.write_bytes(b"old")

    def write(f):
        f.write(b"half of it")
        raise error

    with pytest.raises(UserError, match="cannot write") as e:
        files.write_atomic(path, write)
    assert "\n" not in str(e.value)
    assert path.read_bytes() == b"old"
    assert folder_is_clean(tmp_path, "state.pt")


def test_ctrl_c_during_a_save_leaves_no_partial_file(tmp_path):
    def write(f):
        f.write(b"half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(tmp_path / "state.pt", write)
    assert folder_is_clean(tmp_path)


# -----------------------------------------------------------------------------
# damage and code

@pytest.fixture
def saved_bytes(tmp_path):
    path = tmp_path / "good.pt"
    model = GPT(CONFIG)
    files.save(path, {"model": model.state_dict(), "model_args": {"n_layer": 2},
                           "config": {"dataset": "x"}, "iter_num": 3})
    return path.read_bytes()


def test_a_truncated_checkpoint_is_refused(tmp_path, saved_bytes):
    path = tmp_path / "cut.pt"
    size = len(saved_bytes)
    for length in (0, 1, 100, size // 2, size - 1000, size - 22, size - 1):
        path.write_bytes(saved_bytes[:length])
        refused(path)


def test_a_flipped_bit_is_refused_or_harmless(tmp_path, saved_bytes):
    path = tmp_path / "flipped.pt"
    path.write_bytes(saved_bytes)
    good = files.load(path)
    rng = random.Random(0)
    central = saved_bytes.index(b"PK\x01\x02")  # the zip's directory, after the records
    places = [*(rng.randrange(central) for _ in range(150)),
              *(rng.randrange(central, len(saved_bytes)) for _ in range(150)),
              *range(120), *range(len(saved_bytes) - 100, len(saved_bytes))]
    n_refused = 0
    for place in places:
        altered = bytearray(saved_bytes)
        altered[place] ^= 1 << rng.randrange(8)
        path.write_bytes(altered)
        try:
            loaded = files.load(path)
        except UserError as e:
            assert "\n" not in str(e)
            assert str(path) in str(e)
            n_refused += 1
            continue
        # some bytes of a zip have no effect: padding, dates, attributes
        assert loaded.keys() == good.keys()
        assert all(torch.equal(loaded["model"][k], good["model"][k]) for k in good["model"])
        assert loaded["config"] == good["config"] and loaded["iter_num"] == 3
    assert n_refused > 100


def test_a_flipped_bit_in_any_weight_is_refused(tmp_path, saved_bytes):
    path = tmp_path / "flipped.pt"
    path.write_bytes(saved_bytes)
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
        contents = archive.read(record)
    begin = saved_bytes.index(contents)
    rng = random.Random(1)
    for _ in range(25):
        altered = bytearray(saved_bytes)
        altered[begin + rng.randrange(len(contents))] ^= 1 << rng.randrange(8)
        path.write_bytes(altered)
        assert "damaged" in refused(path)


def code_in_torch_zip(path, trap):
    torch.save(data() | {"config": trap}, path)


def code_as_the_whole_zip(path, trap):
    torch.save(trap, path)


def code_in_a_raw_pickle(path, trap):
    path.write_bytes(pickle.dumps(data()["model_args"] | {"config": trap}))


def code_in_torchs_old_format(path, trap):
    torch.save(data() | {"config": trap}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [code_in_torch_zip, code_as_the_whole_zip, code_in_a_raw_pickle,
                                   code_in_torchs_old_format])
def test_code_is_refused_and_not_run(tmp_path, write):
    path, marker = tmp_path / "ckpt.pt", tmp_path / "code was run"
    write(path, Trap(marker))
    message = refused(path)
    assert not marker.exists()
    if "zip" in write.__name__:
        assert "code" in message
    else:
        assert "not a checkpoint" in message


@pytest.mark.parametrize("pickled", [
    b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",      # a call
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",          # an allowed call, bad arguments
    b"\x80\x02}X\x01\x00\x00\x00aX\x01\x00\x00\x00bs",        # without STOP
    b"\x80\x02h\x07.", b"\x80\x02].", b"\x80\x02N.", b"", b"R.", b"\x80\x02(u."])
def test_a_hostile_pickle_in_a_valid_archive_is_a_one_line_error(tmp_path, saved_bytes, pickled):
    good, path = tmp_path / "good.pt", tmp_path / "hostile.pt"
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            hostile = info.filename.endswith("/data.pkl")
            new.writestr(info.filename, pickled if hostile else old.read(info))
    refused(path)


@pytest.mark.parametrize("content", [{"weights": 1}, {"model": {}}, [1, 2], "text"])
def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "ckpt.pt")
    assert "not a checkpoint" in refused(tmp_path / "ckpt.pt")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "does not exist" in refused(tmp_path / "ckpt.pt")
    assert "does not exist" in refused(tmp_path)


def test_weights_that_do_not_fit_model_args_are_refused(tmp_path):
    model = GPT(CONFIG)
    args = dict(vars(CONFIG))
    for wrong in ({"n_embd": 32}, {"n_layer": 3}, {"vocab_size": 19}, {"colour": "red"}):
        stored = {"model": model.state_dict(), "model_args": args | wrong}
        with pytest.raises(UserError) as e:
            checkpoint.model_from(stored, "out/ckpt.pt")
        assert "out/ckpt.pt" in str(e.value) and "model_args" in str(e.value)
        assert "\n" not in str(e.value)


# -----------------------------------------------------------------------------
# load_model

def save_model(folder, model):
    class Tokenizer:
        spec = {"kind": "characters", "itos": list("abcdefghijklmnopqr")}  # noqa: RUF012
    folder.mkdir(exist_ok=True)
    files.save(folder / "ckpt.pt", checkpoint.model_data(model, 3, 1.0, {}, Tokenizer))


def test_load_model_returns_the_model_and_the_tokenizer_of_a_run(tmp_path):
    torch.manual_seed(0)
    model = GPT(CONFIG)
    save_model(tmp_path / "run", model)
    loaded, tokenizer = checkpoint.load_model(str(tmp_path / "run"), dropout=0.25)
    assert tokenizer.decode([0, 17]) == "ar"
    assert loaded.config.dropout == 0.25
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    idx = torch.arange(16)[None]
    assert torch.equal(loaded.eval().logits(idx), model.eval().logits(idx))
    assert all(p.requires_grad for p in loaded.parameters())

    cropped, _ = checkpoint.load_model(str(tmp_path / "run"), block_size=4)
    assert cropped.config.block_size == 4
    assert torch.allclose(cropped.eval().logits(idx[:, :4]), model.logits(idx)[:, :4], atol=1e-6)
    with pytest.raises(UserError, match="block_size=17"):
        checkpoint.load_model(str(tmp_path / "run"), block_size=17)


def test_load_model_refuses_a_source_without_a_model(tmp_path):
    with pytest.raises(UserError, match=r"neither ckpt\.pt .* nor config\.json"):
        checkpoint.load_model(str(tmp_path))
    for source in (str(tmp_path / "none"), "./none", "out-none"):
        with pytest.raises(UserError, match="does not exist"):
            checkpoint.load_model(source)


# -----------------------------------------------------------------------------
# optimizer state

def stepped(model, steps=2, **options):
    optimizer = torch.optim.AdamW(model.param_groups(0.1), lr=1e-3, **options)
    torch.manual_seed(1)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_optimizer_state_is_loaded_by_parameter_name(fused):
    model = GPT(CONFIG)
    before = state_dicts.optimizer_state(model, stepped(model, fused=fused))
    assert before.keys() == dict(model.named_parameters()).keys()
    # the order in the file does not matter
    shuffled = dict(sorted(before.items(), reverse=True))
    optimizer = torch.optim.AdamW(model.param_groups(0.1), lr=5e-4, fused=fused)
    state_dicts.load_optimizer_state(model, optimizer, shuffled, "state.pt", ALONE)
    after = state_dicts.optimizer_state(model, optimizer)
    for name in before:
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(after[name][key], before[name][key]), (name, key)
    assert optimizer.param_groups[0]["lr"] == 5e-4  # options come from the run, not the file


def test_optimizer_state_before_the_first_step_is_empty_and_loads():
    model = GPT(CONFIG)
    fresh = torch.optim.AdamW(model.param_groups(0.1))
    state = state_dicts.optimizer_state(model, fresh)
    state_dicts.load_optimizer_state(model, fresh, state, "x", ALONE)
    assert not fresh.state


def test_optimizer_state_of_other_parameters_is_refused():
    model = GPT(CONFIG)
    state = state_dicts.optimizer_state(model, stepped(model))
    del state["transformer.wpe.weight"]
    with pytest.raises(UserError, match=r"state\.pt.*transformer\.wpe\.weight"):
        state_dicts.load_optimizer_state(model, torch.optim.AdamW(model.parameters()), state,
                                         "state.pt", ALONE)
    state = stepped(model).state_dict()
    del state["state"][3]
    with pytest.raises(UserError, match=r"ckpt\.pt.* parameters"):
        state_dicts.load_optimizer_state(model, torch.optim.AdamW(model.parameters()), state,
                                         "ckpt.pt", ALONE)


def test_moments_are_cropped_with_the_position_embeddings():
    model = GPT(CONFIG)
    state = state_dicts.optimizer_state(model, stepped(model))
    model.crop_block_size(6)
    optimizer = torch.optim.AdamW(model.param_groups(0.1), fused=True)
    state_dicts.load_optimizer_state(model, optimizer, state, "state.pt", ALONE)
    name = "transformer.wpe.weight"
    loaded = optimizer.state[dict(model.named_parameters())[name]]
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(loaded[key], state[name][key][:6])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


# -----------------------------------------------------------------------------
# nanoGPT's files

def exact_gelu_logits(data, idx):
    """The logits of a nanoGPT checkpoint, computed from its tensors with the exact GELU."""
    w = {key.removeprefix("_orig_mod."): t for key, t in data["model"].items()}
    args = data["model_args"]
    C, nh, T = args["n_embd"], args["n_head"], idx.size(1)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, (C,), w[f"{name}.weight"], w.get(f"{name}.bias"), 1e-5)

    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][:T]
    for i in range(args["n_layer"]):
        h = f"transformer.h.{i}"
        q, k, v = (t.view(1, T, nh, C // nh).transpose(1, 2)
                   for t in linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(C, 2))
        scores = (q @ k.transpose(2, 3)) / (C // nh) ** 0.5
        scores = scores.masked_fill(~torch.ones(T, T).tril().bool(), float("-inf"))
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(1, T, C),
                       f"{h}.attn.c_proj")
        z = linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")
        x = x + linear(0.5 * z * (1 + torch.erf(z / 2**0.5)), f"{h}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


def nanogpt_out_dir(folder, **options):
    stored, order = nanogpt_checkpoint(**options)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(stored, folder / "ckpt.pt")
    return stored, order


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("bias", [False, True], ids=["no biases", "biases"])
def test_nanogpts_checkpoint_gives_nanogpts_logits(tmp_path, bias, compiled):
    stored, _ = nanogpt_out_dir(tmp_path / "run", bias=bias, compiled=compiled)
    model, _ = checkpoint.load_model(str(tmp_path / "run"))
    idx = torch.arange(16)[None]
    with torch.no_grad():
        difference = model.eval().logits(idx) - exact_gelu_logits(stored, idx)
    assert difference.abs().max() < 1e-5  # the tanh GELU would be off by 1e-3
    assert model.lm_head.weight is model.transformer.wte.weight


def test_nanogpts_mask_buffers_are_ignored(tmp_path):
    stored, _ = nanogpt_out_dir(tmp_path / "run", bias=True)
    for i in range(2):  # nanoGPT stores them if it has no scaled_dot_product_attention
        stored["model"][f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    torch.save(stored, tmp_path / "run" / "ckpt.pt")
    model, _ = checkpoint.load_model(str(tmp_path / "run"))
    idx = torch.arange(16)[None]
    assert (model.eval().logits(idx) - exact_gelu_logits(stored, idx)).abs().max() < 1e-5


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("bias", [False, True], ids=["no biases", "biases"])
def test_nanogpts_moments_are_loaded_for_the_right_parameters(tmp_path, bias, compiled):
    stored, order = nanogpt_out_dir(tmp_path / "run", bias=bias, compiled=compiled)
    loaded = files.load(tmp_path / "run" / "ckpt.pt")
    model = checkpoint.model_from(loaded, "ckpt.pt")
    optimizer = torch.optim.AdamW(model.param_groups(0.1), fused=True)
    state_dicts.load_optimizer_state(model, optimizer, loaded["optimizer"], "ckpt.pt", ALONE)
    state = state_dicts.optimizer_state(model, optimizer)
    assert state.keys() == set(order)
    for i, name in enumerate(order):
        theirs = stored["optimizer"]["state"][i]
        assert torch.equal(state[name]["exp_avg"], theirs["exp_avg"]), name
        assert torch.equal(state[name]["exp_avg_sq"], theirs["exp_avg_sq"]), name
        assert state[name]["step"] == 4


def test_sample_and_evaluate_read_nanogpts_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data" / "chars")
    stored, _ = nanogpt_out_dir(tmp_path / "out-chars", bias=True, compiled=True)
    sample.main(["--out_dir=out-chars", "--start=ab", "--num_samples=2", "--max_new_tokens=20",
                 "--device=cpu"])
    samples = capsys.readouterr().out.split("-" * 15 + "\n")
    assert [len(text) for text in samples] == [23, 23, 0]
    assert all(text.startswith("ab") for text in samples[:2])
    assert set("".join(samples)) <= set("\n abcdefghijklmnop")

    evaluate.main(["--out_dir=out-chars", "--dataset=chars", "--device=cpu", "--dtype=float32"])
    line = capsys.readouterr().out
    tokens = torch.frombuffer(bytearray((tmp_path / "data/chars/val.bin").read_bytes()),
                              dtype=torch.int16).long()
    total = sum(F.cross_entropy(exact_gelu_logits(stored, tokens[None, i:i + 16])[0],
                                tokens[i + 1:i + 17], reduction="sum")
                for i in range(0, 384, 16))
    total += F.cross_entropy(exact_gelu_logits(stored, tokens[None, 384:399])[0], tokens[385:400],
                             reduction="sum")
    assert f"loss {total / 399:.4f} nats per token" in line


def test_nanogpts_tokenizer_is_its_datasets_or_gpt2s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nanogpt_out_dir(tmp_path / "run")
    assert checkpoint.load_model("./run")[1] is None  # no dataset, and not GPT-2's size
    write_dataset(tmp_path / "data" / "chars")
    assert checkpoint.load_model("./run")[1].encode("a\n") == [2, 0]
    shutil.rmtree(tmp_path / "data")
    nanogpt_out_dir(tmp_path / "run", vocab_size=50304)
    assert checkpoint.load_model("./run")[1].name == "GPT-2's BPE"


def test_saving_copies_no_moments_and_stores_a_tied_head_once():
    """optimizer_state() returns the optimizer's own tensors."""
    model = GPT(CONFIG)
    optimizer = stepped(model)
    state = state_dicts.optimizer_state(model, optimizer)
    name, p = next(iter(model.named_parameters()))
    assert state[name]["exp_avg"] is optimizer.state[p]["exp_avg"]
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict()}, buffer)
    assert buffer.tell() < 4 * 1.5 * model.num_params() + 20_000  # the tied head is stored once
