"""The data scripts: good input gives the right tokens, bad input one clear error and no file."""
import importlib.util
import json
import os
import pickle
import shlex
import subprocess
import sys
import threading
import types
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
import fetch

from configurator import configure
from model import GPTConfig
from nanotune.errors import UserError
from nanotune.training.run import set_max_iters
from nanotune.training.settings import write_settings
from train import Config

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
SCRIPTS = ("shakespeare", "shakespeare_char", "openwebtext", "text", "python_docs")
TEXT = "".join(f"Line {i} of a text, and what's more: it ends.\n" for i in range(100))
repeatable = settings(max_examples=50, derandomize=True, database=None, deadline=None)


def script(name):
    """data/NAME/prepare.py as a module."""
    path = ROOT / "data" / name / "prepare.py"
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(name, **arguments):
    script(name).main([f"--{key}={value}" for key, value in arguments.items()])


def tokens(folder):
    """The ids of train.bin and of val.bin, as lists."""
    return [np.fromfile(folder / f"{split}.bin", "<u2").tolist() for split in ("train", "val")]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def shakespeare_txt():
    path = SHARED / "tinyshakespeare" / "input.txt"
    if not path.exists():
        pytest.skip("no ../shared/data/tinyshakespeare")
    return path


@pytest.fixture(scope="module")
def gpt2():
    """tiktoken's encoding of GPT-2."""
    with pytest.MonkeyPatch.context() as patch:
        if "TIKTOKEN_CACHE_DIR" not in os.environ and (SHARED / "tiktoken").exists():
            patch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))
        try:
            encoding = fetch.choose_tokenizer("gpt2").load()
        except UserError as error:
            pytest.skip(f"no GPT-2 vocabulary: {error.__cause__!r:.80}; set TIKTOKEN_CACHE_DIR")
        yield encoding


# -----------------------------------------------------------------------------
# download

@pytest.fixture
def server(monkeypatch):
    """A local web server. The path selects the answer; server.asked lists the requested paths."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    done = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            if self.path == "/slow":
                done.wait(30)
            kind = "text/html" if self.path == "/html" else "text/plain"
            self.send_response(404 if self.path == "/missing" else 200)
            self.send_header("Content-Type", kind)
            if self.path != "/endless":
                length = len(TEXT) + (100 if self.path == "/truncated" else 0)
                self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(TEXT.encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield server
    done.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["/good", "/endless"])
def test_a_download_is_written_and_not_repeated(server, tmp_path, path):
    file = tmp_path / "new" / "input.txt"
    for _ in range(2):      # the second time the file exists
        assert fetch.download(server.url + path, file, len(TEXT)) == file
        assert file.read_text() == TEXT
    assert server.asked == [path] and names(file.parent) == ["input.txt"]


@pytest.mark.parametrize("path, size, sha256, message", [
    ("/truncated", None, None, f"{len(TEXT):,} of {len(TEXT) + 100:,} bytes|IncompleteRead"),
    ("/endless", len(TEXT) + 1, None, f"received {len(TEXT):,} of {len(TEXT) + 1:,} bytes"),
    ("/good", len(TEXT) + 1, None, f"it has {len(TEXT):,} bytes, not {len(TEXT) + 1:,}"),
    ("/good", None, "0" * 64, "its sha256 is not 0000"),
    ("/html", None, None, "sent a web page"),
    ("/missing", None, None, "HTTP Error 404: Not Found"),
    ("/slow", None, None, "timed out"),
])
def test_a_bad_download_is_one_error_and_no_file(server, tmp_path, path, size, sha256, message):
    with pytest.raises(UserError, match=message) as info:
        fetch.download(server.url + path, tmp_path / "f", size, sha256, timeout=0.2)
    assert "pass --input=FILE" in str(info.value)
    assert names(tmp_path) == []


def test_a_download_without_a_server_is_one_error_and_no_file(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"cannot download .*refused"):
        fetch.download(server.url + "/good", tmp_path / "f", timeout=5)
    assert names(tmp_path) == []


def test_a_download_that_cannot_be_renamed_leaves_no_file(server, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: raise_(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        fetch.download(server.url + "/good", tmp_path / "f")
    assert names(tmp_path) == []


def test_a_download_keeps_the_users_own_file(server, tmp_path):
    (tmp_path / "input.txt").write_text("mine")
    with pytest.raises(UserError, match=r"it has 4 bytes.*pass --input=.*input\.txt"):
        fetch.download(server.url + "/good", tmp_path / "input.txt", len(TEXT))
    assert (tmp_path / "input.txt").read_text() == "mine" and server.asked == []


def raise_(error):
    raise error


# -----------------------------------------------------------------------------
# reading and splitting

@repeatable
@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.floats(0.05, 0.6))
def test_documents_are_split_by_the_fraction_and_at_most_one_is_cut(lengths, fraction):
    documents = [f"{i:02}" + "." * n for i, n in enumerate(lengths)]
    train, val = fetch.split_documents(documents, fraction)
    assert (train, val) == fetch.split_documents(documents, fraction)
    total, have = sum(map(len, documents)), sum(len(text) for text, _ in val)
    assert fraction * total / 2 <= have <= fraction * total + 1
    cut = [text for text, ends in train if not ends]
    if cut:         # join the two parts of the one document that was cut
        assert len(cut) == 1
        train[train.index((cut[0], False))] = (cut[0] + val.pop()[0], True)
    assert sorted(train + val) == sorted((text, True) for text in documents)


def test_a_single_document_is_split_by_characters():
    assert fetch.split_documents(["0123456789"]) == ([("012345678", False)], [("9", True)])
    assert fetch.split_text("0123456789") == ([("012345678", False)], [("9", False)])


# -----------------------------------------------------------------------------
# encoding

def test_each_document_ends_with_one_end_of_text(gpt2):
    # the first is cut into slices
    pieces = [(TEXT * 100, True), ("cut here", False), ("end", True)]
    tokenizer = fetch.choose_tokenizer("gpt2")
    ids = np.concatenate([ids for ids, _ in fetch.encode(
        tokenizer, fetch.read_texts(pieces, True), 0, "")])
    expected = [i for text, ends in pieces for i in gpt2.encode_ordinary(text) + [50256] * ends]
    assert ids.dtype == "<u2" and ids.tolist() == expected


# -----------------------------------------------------------------------------
# writing

IDS = np.arange(2000, dtype="<u2")
OLD = {"train.bin": b"old", "val.bin": b"old", "meta.pkl": b"old", "train.mask.bin": b"old"}


@pytest.fixture
def old(tmp_path):
    """A folder with an older dataset and a script."""
    for name, content in {**OLD, "prepare.py": b""}.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_write_dataset_replaces_all_files_of_an_older_one(old):
    files = {"tokenizer.json": b"{}"}
    assert fetch.write_dataset(old, [IDS, IDS], iter([IDS]), files) == (4000, 2000)
    assert names(old) == ["prepare.py", "tokenizer.json", "train.bin", "val.bin"]
    low_byte_first = bytes(b for i in range(2000) for b in (i % 256, i // 256))
    assert (old / "val.bin").read_bytes() == low_byte_first


def test_a_write_that_fails_midway_keeps_the_older_dataset(old):
    def broken():
        yield IDS
        raise OSError("disk full")

    for train, val in ((broken(), [IDS]), ([IDS], broken())):
        with pytest.raises(OSError, match="disk full"):
            fetch.write_dataset(old, train, val, {"tokenizer.json": b"{}"})
        assert {p.name: p.read_bytes() for p in old.iterdir()} == {**OLD, "prepare.py": b""}


@pytest.mark.parametrize("works", [0, 1, 2])
def test_a_write_that_fails_while_renaming_leaves_no_dataset(old, monkeypatch, works):
    replace, left = os.replace, iter(range(works))
    monkeypatch.setattr(os, "replace", lambda *paths: (
        replace(*paths) if next(left, None) is not None else raise_(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        fetch.write_dataset(old, [IDS], [IDS], {"tokenizer.json": b"{}"})
    assert names(old) == ["prepare.py"]


def test_a_kill_at_any_moment_leaves_a_whole_dataset_or_none(old, monkeypatch):
    """After each file operation: if train.bin or a new val.bin exists, all other files are new."""
    (old / "tokenizer.json").write_bytes(b"old")
    seen = []

    def watched(function):
        def call(*args, **kwargs):
            function(*args, **kwargs)
            seen.append({p.name: p.read_bytes() == b"old" for p in old.iterdir()
                         if not p.name.endswith(".part") and p.suffix != ".py"})
        return call

    monkeypatch.setattr(os, "replace", watched(os.replace))
    monkeypatch.setattr(Path, "unlink", watched(Path.unlink))
    files = {"tokenizer.json": b"new", "tokenizer_config.json": b"new", "train.mask.bin": b"new"}
    fetch.write_dataset(old, [IDS], [IDS], files)
    assert len(seen) > 10 and "train.bin" not in seen[0]
    for found in seen:
        if "train.bin" in found or not found.get("val.bin", True):
            assert found == dict.fromkeys([*files, "val.bin"], False) | (
                {"train.bin": False} if "train.bin" in found else {})


def test_write_dataset_refuses_too_little_text(old):
    with pytest.raises(UserError, match=r"too little text: 2000 training tokens and 7"):
        fetch.write_dataset(old, [IDS], [IDS[:7]], {})
    assert (old / "val.bin").read_bytes() == b"old"


def test_a_short_split_is_reported(tmp_path, capsys):
    fetch.write_dataset(tmp_path, [IDS], [IDS[:100]], {})
    assert "--block_size=99 or less" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# the scripts

@pytest.mark.parametrize("name", SCRIPTS)
def test_help_works_from_any_folder(name, tmp_path):
    path = ROOT / "data" / name / "prepare.py"
    result = subprocess.run([sys.executable, path, "--help"], cwd=tmp_path, capture_output=True,
                            text=True)
    assert result.returncode == 0 and f"python data/{name}/prepare.py" in result.stdout
    assert names(tmp_path) == []


def test_an_error_is_one_line_and_status_1(tmp_path):
    path = ROOT / "data" / "text" / "prepare.py"
    result = subprocess.run([sys.executable, path, "--input=gone", "--out_dir=mine"], cwd=tmp_path,
                            capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: --input=gone: no such file or folder\n"
    assert names(tmp_path) == []


def test_ctrl_c_prints_one_line(capsys):
    with pytest.raises(SystemExit) as info:
        fetch.run(lambda argv: raise_(KeyboardInterrupt()))
    assert info.value.code == 130 and capsys.readouterr().err.count("\n") == 1


def test_shakespeare_has_the_known_number_of_tokens(gpt2, shakespeare_txt, tmp_path):
    (tmp_path / "meta.pkl").write_bytes(b"of an earlier run by characters")
    prepare("shakespeare", input=shakespeare_txt, out_dir=tmp_path)
    train, val = tokens(tmp_path)
    assert (len(train), len(val)) == (301_966, 36_059)
    assert names(tmp_path) == ["train.bin", "val.bin"]
    assert gpt2.decode(train + val) == shakespeare_txt.read_text(encoding="utf-8")


def test_shakespeare_char_has_the_known_number_of_tokens_and_characters(shakespeare_txt, tmp_path):
    prepare("shakespeare_char", input=shakespeare_txt, out_dir=tmp_path)
    train, val = tokens(tmp_path)
    meta = pickle.loads((tmp_path / "meta.pkl").read_bytes())
    assert (len(train), len(val), meta["vocab_size"]) == (1_003_854, 111_540, 65)
    assert set(meta) == {"vocab_size", "itos", "stoi"} and meta["itos"][0] == "\n"
    assert all(meta["stoi"][meta["itos"][i]] == i for i in range(65))
    text = shakespeare_txt.read_text(encoding="utf-8")
    assert "".join(meta["itos"][i] for i in train + val) == text


def test_shakespeare_checks_its_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "SHAKESPEARE", server.url + "/good")
    with pytest.raises(UserError, match=r"it has .* bytes, not 1,115,394"):
        prepare("shakespeare_char", out_dir=tmp_path)
    assert names(tmp_path) == []


def test_shakespeare_refuses_an_empty_file(tmp_path):
    (tmp_path / "input.txt").write_text("\n")
    with pytest.raises(UserError, match=r"input\.txt is empty"):
        prepare("shakespeare", input=tmp_path / "input.txt", out_dir=tmp_path)


# -----------------------------------------------------------------------------
# data/text

@pytest.fixture
def folder(tmp_path):
    """Four documents in three files, and files to skip: empty, hidden or of another type."""
    source = tmp_path / "texts"
    (source / "sub").mkdir(parents=True)
    (source / ".git").mkdir()
    (source / "b.txt").write_bytes(b"\xef\xbb\xbfBee\r\n" * 1 + TEXT.encode())
    (source / "sub" / "a.MD").write_text("Sub\n" + TEXT)
    (source / "c.txt").write_text(f"First<|endoftext|>\n{TEXT}\n<|endoftext|>\n")
    (source / "empty.txt").write_text(" \n")
    (source / "d.py").write_text("code")
    (source / ".git" / "e.txt").write_text("hidden")
    return source


def test_text_reads_the_documents_of_a_folder(gpt2, folder, tmp_path, capsys):
    prepare("text", input=folder, out_dir=tmp_path / "mine", val_fraction=0.4)
    train, val = tokens(tmp_path / "mine")
    documents = gpt2.decode(train).split("<|endoftext|>") + gpt2.decode(val).split("<|endoftext|>")
    assert sorted(filter(None, documents)) == sorted([
        "Bee\n" + TEXT, "First", TEXT.strip("\n"), "Sub\n" + TEXT])
    assert train.count(50256) + val.count(50256) == 4
    assert names(tmp_path / "mine") == ["train.bin", "val.bin"]
    out = capsys.readouterr().out
    assert "documents 4," in out and "skipped 1 files with other extensions (.py 1)" in out
    cfg = next_config(out)
    assert (cfg.dataset, cfg.init_from, cfg.out_dir) == (
        str(tmp_path / "mine"), "gpt2", "out-mine")
    assert cfg.block_size is None and cfg.patience == 0  # config/finetune_little_data.py
    assert steps_of(cfg, len(train)) >= 30
    assert fetch.dataset_name(ROOT / "data" / "mine") == "mine"


def next_config(out):
    """The train.Config of the command in the last line of a prepare.py's output."""
    python, script_name, *argv = shlex.split(out.splitlines()[-1].removeprefix("next: "))
    assert (python, script_name) == ("python", "train.py")
    return configure(Config, [str(ROOT / argv[0]), *argv[1:]])


def steps_of(cfg, train_tokens, pairs=0):
    """The number of steps that train.py takes, for plain text or a number of pairs."""
    samples = pairs or max(1, (train_tokens - 1) // (cfg.block_size or 1024) - 1)
    data = {"train": types.SimpleNamespace(n_blocks=samples)}
    set_max_iters(cfg, data)
    return cfg.max_iters


@pytest.mark.parametrize("config, epochs", [
    ("finetune_task", 3), ("finetune_chat", None), ("finetune_little_data", None),
    ("finetune_t5", None), ("finetune_domain", None)])
@pytest.mark.parametrize("train", [10**3, 10**4, 10**5, 10**6])
def test_the_next_command_takes_enough_steps_on_any_data(tmp_path, capsys, config, epochs, train):
    pairs = train // 20 if config == "finetune_t5" else 0
    fetch.print_next(config, tmp_path, (train, train // 9), "--init_from=M", pairs=pairs,
                     epochs=epochs)
    cfg = next_config(capsys.readouterr().out)
    steps, samples = steps_of(cfg, train, pairs), cfg.batch_size * cfg.gradient_accumulation_steps
    assert steps >= 30 and (not cfg.decay_lr or cfg.warmup_iters < steps / 2)
    assert steps // cfg.eval_interval >= 3
    assert steps * samples <= 21 * (pairs or train / (cfg.block_size or 1024) + 2)


def test_the_next_command_keeps_the_config_for_enough_data(tmp_path, capsys):
    """Also for pretraining, which takes many epochs."""
    for config, counts, pairs in (("finetune_shakespeare", (301_966, 36_059), 0),
                                  ("finetune_t5", (10**6, 10**5), 9000),
                                  ("train_shakespeare_char", (10**4, 10**4), 0)):
        fetch.print_next(config, tmp_path, counts, pairs=pairs)
        assert capsys.readouterr().out == (
            f"next: python train.py config/{config}.py --dataset={tmp_path}\n")
    # many examples: only the given number of epochs is added
    fetch.print_next("finetune_task", tmp_path, (10**7, 10**6), epochs=3)
    assert capsys.readouterr().out.endswith(" --epochs=3\n")


@pytest.mark.parametrize("count, config", [
    (0, "finetune_little_data"), (249_999, "finetune_little_data"), (250_000, "finetune_task"),
    (12_000_000, "finetune_domain"), (10**10, "finetune_domain")])
def test_the_config_fits_the_size_of_the_text(count, config):
    assert fetch.finetuning_config(count) == config
    assert (ROOT / "config" / f"{config}.py").is_file()


def test_the_next_command_is_quoted(tmp_path, capsys):
    fetch.print_next("finetune_task", tmp_path / "my texts", (5000, 2000), "--init_from=a b")
    cfg = next_config(capsys.readouterr().out)
    assert (cfg.dataset, cfg.init_from, cfg.block_size) == (
        str(tmp_path / "my texts"), "a b", None)
    fetch.print_next("finetune_task", tmp_path, (5000, 200))  # shorter than GPT-2's context
    assert next_config(capsys.readouterr().out).block_size == 199


def test_text_names_every_bad_file(folder, tmp_path):
    (folder / "a.txt").write_bytes("é".encode("latin-1"))
    (folder / "sub" / "z.txt").write_bytes("é".encode("utf-16"))
    with pytest.raises(UserError, match=r"2 files cannot be read: .*a\.txt is not UTF-8.*; "
                                        r".*z\.txt is UTF-16") as error:
        prepare("text", input=folder, out_dir=tmp_path / "mine")
    assert "\n" not in str(error.value) and not (tmp_path / "mine").exists()


def test_text_may_have_a_separate_validation_file(gpt2, folder, tmp_path):
    (tmp_path / "val.txt").write_text(f"Mine.<|endoftext|>{TEXT}")
    prepare("text", input=folder, val_input=tmp_path / "val.txt", out_dir=tmp_path / "out")
    train_ids, val_ids = tokens(tmp_path / "out")
    assert gpt2.decode(val_ids) == f"Mine.<|endoftext|>{TEXT.strip()}<|endoftext|>"
    assert train_ids.count(50256) == 4


def test_text_reads_files_in_the_order_of_their_paths(folder):
    files = script("text").find_files(folder, "txt, .md")
    assert [f.relative_to(folder).as_posix() for f in files] == [
        "b.txt", "c.txt", "empty.txt", "sub/a.MD"]
    assert [f.name for f in script("text").find_files(folder, ".py")] == ["d.py"]


def test_text_may_be_separated_by_another_mark_or_none(folder, tmp_path):
    def read(*args):
        found = script("text").find_documents(*args)
        return ["".join(parts) for parts, _ in fetch.read_pieces([(d, True) for d in found])]

    assert read(folder / "c.txt", "", "") == [f"First<|endoftext|>\n{TEXT}\n<|endoftext|>\n"]
    (tmp_path / "f").write_text("one\n\n====\n\ntwo\n====\n")
    assert read(tmp_path / "f", "", "====") == ["one", "two"]


def test_text_may_be_encoded_by_characters(folder, tmp_path):
    prepare("text", input=folder / "b.txt", out_dir=tmp_path, tokenizer="char")
    train, val = tokens(tmp_path)
    itos = pickle.loads((tmp_path / "meta.pkl").read_bytes())["itos"]
    # a newline is written in place of the end-of-text of the one document
    assert "".join(itos[i] for i in train + val) == "Bee\n" + TEXT + "\n"
    assert len(train) == int(0.9 * len("Bee\n" + TEXT))


def test_text_takes_the_tokenizer_of_a_run(folder, tmp_path, capsys):
    """The tokenizer is that of the dataset named in the run's settings.json."""
    prepare("text", input=folder, out_dir=tmp_path / "1", tokenizer="train", vocab_size=300)
    run = tmp_path / "run"
    run.mkdir()
    cfg = Config(out_dir=str(run), dataset=str(tmp_path / "1"))
    write_settings(cfg, asdict(cfg), [], GPTConfig())
    prepare("text", input=folder, out_dir=tmp_path / "2", tokenizer=run)
    assert next_config(capsys.readouterr().out).init_from == str(run)
    assert fetch.tokenizer_of_dataset(tmp_path / "2").identity == (
        fetch.tokenizer_of_dataset(tmp_path / "1").identity)
    assert (tmp_path / "2" / "train.bin").read_bytes() == (
        (tmp_path / "1" / "train.bin").read_bytes())
    (tmp_path / "1").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="the dataset of this run, does not exist"):
        fetch.choose_tokenizer(str(run))
    (run / "settings.json").write_text("{}")
    with pytest.raises(UserError, match=r"settings\.json names no dataset"):
        fetch.choose_tokenizer(str(run))


def test_text_trains_a_tokenizer_or_reads_one_from_a_file(folder, tmp_path, capsys):
    from tokenizers import Tokenizer
    prepare("text", input=folder, out_dir=tmp_path / "1", tokenizer="train", vocab_size=300)
    assert next_config(capsys.readouterr().out).init_from == "scratch"
    file = tmp_path / "1" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    train, val = tokens(tmp_path / "1")
    assert tokenizer.get_vocab_size() == 300 and max(train) < 300
    assert tokenizer.token_to_id("<|endoftext|>") == 0 and (train + val).count(0) == 4
    assert TEXT in tokenizer.decode(train)
    # the truncation and padding of a tokenizer file are ignored
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=2000)
    tokenizer.save(str(tmp_path / "cut.json"))
    prepare("text", input=folder, out_dir=tmp_path / "2", tokenizer=tmp_path / "cut.json")
    assert tokens(tmp_path / "2") == [train, val]
    written = Tokenizer.from_file(str(tmp_path / "2" / "tokenizer.json"))
    assert written.truncation is written.padding is None


def words(count):
    """A tokenizer.json of `count` words, without end-of-text."""
    vocab = {f"w{i}": i for i in range(count)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}
    return json.dumps({"version": "1.0", "model": model, "added_tokens": []})


@pytest.mark.parametrize("arguments, message", [
    ({}, "no text is given; pass --input="),
    ({"input": "gone"}, "gone: no such file or folder"),
    ({"input": "empty.txt"}, r"empty\.txt is empty"),
    ({"input": "nothing"}, r"no \.md \.txt files in that folder; --ext="),
    ({"input": "latin.txt"}, r"latin\.txt is not UTF-8: byte 0xe9 at offset 1,003"),
    ({"input": "utf16.txt"}, r"utf16\.txt is UTF-16, not UTF-8; convert it: iconv -f UTF-16 "),
    ({"input": "short.txt", "tokenizer": "char"}, "too little text"),
    ({"input": "good.txt", "val_fraction": 1.5}, "--val_fraction=1.5: must be between 0 and 1"),
    ({"input": "good.txt", "tokenizer": "nothing"}, "--tokenizer=nothing has no tokenizer.json"),
    ({"input": "good.txt", "tokenizer": "gone.json"}, r"gone\.json: no such file"),
    ({"input": "good.txt", "tokenizer": "bad.json"}, r"bad\.json is not a tokenizer.json"),
    ({"input": "good.txt", "tokenizer": "big.json"}, r"big\.json: ids up to 65,536 do not fit"),
    ({"input": "good.txt", "tokenizer": "train", "vocab_size": 99}, "--vocab_size=99: must be"),
])
def test_text_refuses_bad_input(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("nothing").mkdir()
    for name, content in {
            "empty.txt": b"\n", "short.txt": b"A few words.", "good.txt": TEXT.encode(),
            "latin.txt": b"." * 1003 + "é".encode("latin-1"), "bad.json": b"{}",
            "utf16.txt": TEXT.encode("utf-16"),
            "big.json": words(65537).encode() if "big" in message else b""}.items():
        Path(name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare("text", **arguments, out_dir="mine")
    assert not Path("mine").exists() or names(Path("mine")) == []


def test_without_end_of_text_a_newline_separates_documents():
    """If the vocabulary has no newline either, nothing separates them."""
    lines = fetch.char_tokenizer([("ab\n", True)])
    assert fetch.document_end(lines) == lines.encode("\n") == [0]
    assert fetch.document_end(fetch.char_tokenizer([("ab", True)])) == []


# -----------------------------------------------------------------------------
# data/python_docs

@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library: 1,003 docstrings, and others that must be left out."""
    root = tmp_path / "lib"
    for name in ("pkg", "test", "site-packages"):
        (root / name).mkdir(parents=True)
        (root / name / "m.py").write_text(f'"""Module {name}."""')
    many = "".join(f"def f{i}():\n    'Returns the number {i}.'\n" for i in range(1000))
    (root / "a.py").write_text(many + '''
try:
    class C:
        """Class C.

        Text.
            indented
        """
        async def g(self):
            "Class C."
        def h(self):
            x = "not a docstring"
            """Nor this, \\d."""
except ImportError:
    pass
''')
    module = script("python_docs")
    monkeypatch.setattr(module.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return module


def test_docstrings_of_functions_classes_and_modules_are_read(library):
    docstrings = library.read_docstrings(library.read_library())
    assert docstrings[:2] == ["Returns the number 0.", "Returns the number 1."]
    assert docstrings[1000:] == ["Class C.\n\nText.\n    indented", "Class C.", "Module pkg."]


def test_python_docs_writes_the_same_two_datasets_each_time(library, tmp_path):
    from tokenizers import Tokenizer
    for run in "12":
        library.main([f"--out_dir={tmp_path / run}", "--vocab_size=500"])
    first, again = tmp_path / "1", tmp_path / "2"
    for name in ("docstrings", "topics"):
        assert names(first / name) == ["tokenizer.json", "tokenizer_config.json", "train.bin",
                                       "val.bin"]
        for file in names(first / name):
            assert (first / name / file).read_bytes() == (again / name / file).read_bytes()
    both = [(first / name / "tokenizer.json").read_bytes() for name in ("docstrings", "topics")]
    assert both[0] == both[1]
    tokenizer = Tokenizer.from_str(both[0].decode())
    train, val = tokens(first / "docstrings")
    assert train.count(0) + val.count(0) == 1003 and train[-1] == val[-1] == 0
    assert "Returns the number" in tokenizer.decode(val)
    train, val = (set(tokenizer.decode(ids, skip_special_tokens=False).split("<|endoftext|>"))
                  for ids in tokens(first / "topics"))
    assert len(train) > 20 and len(val) > 2 and train & val == {""}


def test_repeated_docstrings_are_dropped():
    long = [f"Paragraph {i} is long enough to tell a text from others." for i in range(4)]
    whole = "\n\n".join(long)
    documents = ["short", "\n\n".join(long[1:3]), whole, "short", "short too", whole]
    assert script("python_docs").drop_repeats(documents) == ["short", whole, "short too"]


def test_a_python_without_sources_or_topics_is_refused(library, monkeypatch, tmp_path):
    monkeypatch.setattr(library.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "gone")})
    with pytest.raises(UserError, match=r"only 0 docstrings in .*gone"):
        library.main([f"--out_dir={tmp_path}"])
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match=r"no pydoc_data\.topics; install"):
        library.main([f"--out_dir={tmp_path}"])


# -----------------------------------------------------------------------------
# data/openwebtext

def test_openwebtext_encodes_each_text_and_its_end(gpt2):
    class Tokenized(list):
        """The part of datasets.Dataset that main() uses."""
        def iter(self, batch_size):
            for i in range(0, len(self), 2):
                yield {"ids": self[i:i + 2]}

    module = script("openwebtext")
    texts = ["Hello world", "", "<|endoftext|> is plain text here"]
    tokenized = Tokenized(module.tokenize({"text": texts})["ids"])
    ids = np.concatenate(list(module.arrays(tokenized, "")))
    assert ids.tolist() == [i for text in texts for i in [*gpt2.encode_ordinary(text), 50256]]


def test_openwebtext_without_the_datasets_package_is_refused(gpt2, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        prepare("openwebtext", out_dir=tmp_path / "out")
    assert names(tmp_path) == []


def test_openwebtext_reads_a_file_and_refuses_bad_ones(gpt2, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("datasets", reason="needs the optional package datasets")
    for name, key in (("good", "text"), ("bad", "txt")):
        lines = (json.dumps({key: f"Document {i}. {TEXT}"}) + "\n" for i in range(10))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    out = tmp_path / "out"
    prepare("openwebtext", input=tmp_path / "good.jsonl", out_dir=out, num_proc=1)
    train, val = tokens(out)
    assert (train.count(50256), val.count(50256)) == (9, 1)
    documents = gpt2.decode(train + val).split("<|endoftext|>")[:-1]
    assert sorted(documents) == [f"Document {i}. {TEXT}" for i in range(10)]
    for name, message in (("bad", 'no column "text"'), ("broken", "datasets cannot load"),
                          ("gone", "no such file"), ("good.txt", "must be .jsonl or .parquet")):
        (tmp_path / "good.txt").write_text(TEXT)
        source = tmp_path / (name if "." in name else f"{name}.jsonl")
        with pytest.raises(UserError, match=message):
            prepare("openwebtext", input=source, out_dir=out)
    assert tokens(out) == [train, val]
