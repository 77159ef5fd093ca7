"""GPT-2's BPE, characters and tokenizer.json behind one interface; bad files refused, not run."""
import json
import pickle
import shutil

import pytest
from conftest import TEXT, tiny_json, write_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanotune.errors import UserError
from nanotune.text.tokenizer import (
    EOT,
    CharTokenizer,
    GPT2Tokenizer,
    JsonTokenizer,
    check_same_tokenizer,
    from_vocab_and_merges,
    tokenizer_from_spec,
    tokenizer_of_dataset,
    tokenizer_of_folder,
)

# tiktoken's own files are those of OpenAI's: the ones that transformers calls by these names
VOCAB, MERGES = ("data/tiktoken/6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
                 "data/tiktoken/6d1cbeee0f20b3d9449abfede4726ed8212e3aee")


@pytest.fixture
def gpt2_folder(shared, tmp_path):
    """vocab.json and merges.txt, as OpenAI's repos hold them."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    shutil.copyfile(shared(VOCAB), folder / "vocab.json")
    shutil.copyfile(shared(MERGES), folder / "merges.txt")
    return folder


def same(first, second):
    assert type(first) is type(second)
    for name in ("n_vocab", "eot", "identity", "name", "spec"):
        assert getattr(first, name) == getattr(second, name)
    assert first.encode("Line 7") == second.encode("Line 7")


# -----------------------------------------------------------------------------
# GPT-2

def test_gpt2(gpt2_vocabulary):
    gpt2 = GPT2Tokenizer()
    assert gpt2.encode("Hello, world!\n") == [15496, 11, 995, 0, 198]
    assert gpt2.encode(f"a{EOT}b") == [64, 50256, 65] and gpt2.eot == 50256
    assert gpt2.n_vocab == gpt2.load().n_vocab == 50257
    assert gpt2.encode("") == [] and gpt2.decode([]) == ""
    for text in (TEXT, "naïve 日本語 🙂\r\n\t", "  two  spaces "):
        assert gpt2.decode(gpt2.encode(text)) == text
    same(tokenizer_from_spec(json.loads(json.dumps(gpt2.spec))), gpt2)


def test_gpt2_is_recognised(gpt2_folder, gpt2_vocabulary, tmp_path):
    """In vocab.json with merges.txt and in a tokenizer.json; one token more makes it another."""
    from tokenizers import Tokenizer
    same(tokenizer_of_folder(gpt2_folder), GPT2Tokenizer())
    theirs = from_vocab_and_merges(gpt2_folder / "vocab.json",
                                              gpt2_folder / "merges.txt")
    assert isinstance(theirs, JsonTokenizer)
    text = f"Hello, world!{EOT}naïve 日本語 🙂\r\n  x"
    assert theirs.encode(text) == GPT2Tokenizer().encode(text)
    assert theirs.decode(theirs.encode(text)) == text
    (tmp_path / "tokenizer.json").write_text(theirs.spec["json"], encoding="utf-8")
    same(tokenizer_of_folder(tmp_path), GPT2Tokenizer())
    more = Tokenizer.from_str(theirs.spec["json"])
    more.add_special_tokens(["<|pad|>"])
    (gpt2_folder / "tokenizer.json").write_text(more.to_str(), encoding="utf-8")
    found = tokenizer_of_folder(gpt2_folder)
    assert isinstance(found, JsonTokenizer) and found.n_vocab == 50258
    with pytest.raises(UserError, match="prepare the text again"):
        check_same_tokenizer(found, GPT2Tokenizer(), "out", "data/x")


def test_gpt2_without_a_network(tmp_path, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (tmp_path / "none").read_bytes())
    with pytest.raises(UserError, match=r"cannot fetch GPT-2's vocabulary \(FileNotFoundError\).*"
                                         "TIKTOKEN_CACHE_DIR"):
        GPT2Tokenizer().encode("a")


# -----------------------------------------------------------------------------
# characters and tokenizer.json

@given(st.lists(st.characters(), min_size=1, max_size=40, unique=True), st.data())
def test_characters(itos, data):
    chars = CharTokenizer(itos)
    text = "".join(data.draw(st.lists(st.sampled_from(itos))))
    ids = chars.encode(text)
    assert chars.decode(ids) == text and [itos[i] for i in ids] == list(text)
    assert chars.n_vocab == len(itos) and chars.eot is None
    again = tokenizer_from_spec(chars.spec)
    assert again.itos == itos and again.identity == chars.identity


def test_an_unknown_character():
    chars = CharTokenizer("ab\n")
    with pytest.raises(UserError, match=r"the character 'é' is not in .* of 3: 'ab\\n'") as error:
        chars.encode("baéx")
    assert "\n" not in str(error.value)


JSON = JsonTokenizer(tiny_json())


@given(st.text())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_tokenizer_json(text):
    assert JSON.decode(JSON.encode(text)) == text


def test_the_end_of_text_of_a_tokenizer_json():
    ids = JSON.encode(f"Line{EOT}ends")
    assert ids.count(JSON.eot) == 1 and JSON.decode(ids) == f"Line{EOT}ends"
    assert max(JSON.encode(TEXT)) < JSON.n_vocab <= 300
    assert len(JSON.encode(TEXT)) < len(TEXT) / 2  # merges are made use of
    same(tokenizer_from_spec(json.loads(json.dumps(JSON.spec))), JSON)


def test_a_vocabulary_without_end_of_text():
    from tokenizers import ByteLevelBPETokenizer
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=280, show_progress=False)
    assert JsonTokenizer(tokenizer.to_str()).eot is None


# -----------------------------------------------------------------------------
# folders

def test_the_tokenizer_of_a_folder(tmp_path):
    assert tokenizer_of_folder(tmp_path) is None
    assert isinstance(tokenizer_of_dataset(tmp_path), GPT2Tokenizer)
    chars = write_tokenizer(tmp_path / "chars", "chars")
    assert isinstance(chars, CharTokenizer) and chars.itos == sorted(set(TEXT))
    same(write_tokenizer(tmp_path / "json", "json"), JSON)
    same(tokenizer_of_folder(tmp_path / "chars"), chars)


def test_identity_is_what_decides():
    check_same_tokenizer(CharTokenizer("abc"), CharTokenizer(["a", "b", "c"]), "out", "data/x")
    for other in (CharTokenizer("acb"), CharTokenizer("abcd"), JSON, GPT2Tokenizer()):
        with pytest.raises(UserError, match=r"out reads a character vocabulary \(3 tokens\), "
                                             r"data/x was made with .*prepare the text again"):
            check_same_tokenizer(CharTokenizer("abc"), other, "out", "data/x")
    with pytest.raises(UserError, match=r"hf has no tokenizer file.*put its tokenizer.json"):
        check_same_tokenizer(None, GPT2Tokenizer(), "hf", "data/x")


@pytest.mark.parametrize("itos", [{0: "a", 1: "é", 2: "\n"}, ["a", "é", "\n"]])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_nanogpts_meta(itos, protocol, tmp_path):
    meta = {"vocab_size": 3, "itos": itos, "stoi": {"a": 0, "é": 1, "\n": 2}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    assert tokenizer_of_folder(tmp_path).itos == ["a", "é", "\n"]


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_meta_that_carries_code_is_refused_and_not_run(protocol, tmp_path):
    for meta in ({"itos": {0: Code(str(tmp_path / "run"))}}, Code(str(tmp_path / "run"))):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
        with pytest.raises(UserError, match=r"meta.pkl is no plain character vocabulary \(it "
                                             r"refers to \w+.open\); run its prepare.py again"):
            tokenizer_of_folder(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [
    b"", b"garbage", pickle.dumps({"stoi": {}}), pickle.dumps([1]), pickle.dumps({"itos": 3}),
    pickle.dumps({"itos": {0: "a", 2: "b"}}), pickle.dumps({"itos": [1, 2]}),
    pickle.dumps({"itos": {0: "a"}})[:-4],
])
def test_a_damaged_meta(content, tmp_path):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError, match=r"meta.pkl is no plain character vocabulary"):
        tokenizer_of_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1", b"\xff\xfe"])
def test_a_damaged_tokenizer_json(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer.json is no tokenizer.json"):
        tokenizer_of_folder(tmp_path)


def test_a_damaged_vocab_json(tmp_path):
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match=r"vocab.json and merges.txt are no vocabulary"):
        tokenizer_of_folder(tmp_path)


@pytest.mark.parametrize("spec", [{}, {"kind": "words"}, None, "gpt2"])
def test_an_unknown_spec(spec):
    with pytest.raises(UserError, match="unknown kind"):
        tokenizer_from_spec(spec)
