"""Tokenizers (GPT-2's, characters, tokenizer.json): ids as in transformers, bad files refused."""
import json
import pickle
import shutil

import pytest
from conftest import PAD, START, TEXT, save_tokenizer, tiny_json, write_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanotune.errors import UserError
from nanotune.text.tokenizer import (
    EOT,
    CharTokenizer,
    GPT2Tokenizer,
    JsonTokenizer,
    check_same_tokenizer,
    library_errors,
    limit_rows,
    tokenizer_from_spec,
    tokenizer_of_dataset,
    tokenizer_of_folder,
    tokenizer_of_source,
    without_end,
)
from nanotune.text.tokenizer_files import json_of_vocab_and_merges

# tiktoken's cached files are OpenAI's, which transformers names vocab.json and merges.txt
VOCAB, MERGES = ("data/tiktoken/6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
                 "data/tiktoken/6d1cbeee0f20b3d9449abfede4726ed8212e3aee")


@pytest.fixture
def gpt2_folder(shared, tmp_path):
    """A folder with vocab.json and merges.txt, as in OpenAI's repositories."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    shutil.copyfile(shared(VOCAB), folder / "vocab.json")
    shutil.copyfile(shared(MERGES), folder / "merges.txt")
    return folder


def assert_same(first, second):
    assert type(first) is type(second)
    for name in ("n_vocab", "eot", "identity", "name", "spec"):
        assert getattr(first, name) == getattr(second, name)
    assert first.encode("Line 7") == second.encode("Line 7")


# -----------------------------------------------------------------------------
# GPT-2

def test_gpt2s_tokenizer_encodes_and_decodes(gpt2_vocabulary):
    gpt2 = GPT2Tokenizer()
    assert gpt2.encode("Hello, world!\n") == [15496, 11, 995, 0, 198]
    assert gpt2.encode(f"a{EOT}b") == [64, 50256, 65] and gpt2.eot == 50256
    assert gpt2.n_vocab == gpt2.load().n_vocab == 50257
    assert gpt2.encode("") == [] and gpt2.decode([]) == ""
    for text in (TEXT, "naïve 日本語 🙂\r\n\t", "  two  spaces "):
        assert gpt2.decode(gpt2.encode(text)) == text
    assert_same(tokenizer_from_spec(json.loads(json.dumps(gpt2.spec))), gpt2)


def test_gpt2s_vocabulary_is_recognized_in_each_format(gpt2_folder, gpt2_vocabulary, tmp_path):
    """In vocab.json with merges.txt, and in tokenizer.json; not with one more token."""
    from tokenizers import Tokenizer
    assert_same(tokenizer_of_folder(gpt2_folder), GPT2Tokenizer())
    theirs = JsonTokenizer(json_of_vocab_and_merges(gpt2_folder / "vocab.json",
                                                    gpt2_folder / "merges.txt"))
    text = f"Hello, world!{EOT}naïve 日本語 🙂\r\n  x"
    assert theirs.encode(text) == GPT2Tokenizer().encode(text)
    assert theirs.decode(theirs.encode(text)) == text
    (tmp_path / "tokenizer.json").write_text(theirs.spec["json"], encoding="utf-8")
    assert_same(tokenizer_of_folder(tmp_path), GPT2Tokenizer())
    more = Tokenizer.from_str(theirs.spec["json"])
    more.add_special_tokens(["<|pad|>"])
    (gpt2_folder / "tokenizer.json").write_text(more.to_str(), encoding="utf-8")
    found = tokenizer_of_folder(gpt2_folder)
    assert isinstance(found, JsonTokenizer) and found.n_vocab == 50258
    with pytest.raises(UserError, match="prepare the text again"):
        check_same_tokenizer(found, GPT2Tokenizer(), "out", "data/x")


def test_a_vocabulary_that_cannot_be_downloaded_is_a_one_line_error(tmp_path, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (tmp_path / "none").read_bytes())
    with pytest.raises(UserError, match=r"cannot download GPT-2's vocabulary "
                                        r"\(FileNotFoundError\).*TIKTOKEN_CACHE_DIR.*--tokenizer=train"):
        GPT2Tokenizer().encode("a")


# -----------------------------------------------------------------------------
# characters and tokenizer.json

@given(st.lists(st.characters(), min_size=1, max_size=40, unique=True), st.data())
def test_a_character_tokenizer_encodes_decodes_and_is_restored(itos, data):
    chars = CharTokenizer(itos)
    text = "".join(data.draw(st.lists(st.sampled_from(itos))))
    ids = chars.encode(text)
    assert chars.decode(ids) == text and [itos[i] for i in ids] == list(text)
    assert chars.n_vocab == len(itos) and chars.eot is None
    again = tokenizer_from_spec(chars.spec)
    assert again.itos == itos and again.identity == chars.identity


def test_an_unknown_character_is_refused():
    chars = CharTokenizer("ab\n")
    said = r"the character 'é' is not in .* of 3; use only these: 'ab\\n'"
    with pytest.raises(UserError, match=said) as error:
        chars.encode("baéx")
    assert "\n" not in str(error.value)


JSON = JsonTokenizer(tiny_json())


@given(st.text())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_a_tokenizer_json_decodes_what_it_encodes(text):
    assert JSON.decode(JSON.encode(text)) == text


def test_a_tokenizer_json_encodes_end_of_text_as_one_token():
    ids = JSON.encode(f"Line{EOT}ends")
    assert ids.count(JSON.eot) == 1 and JSON.decode(ids) == f"Line{EOT}ends"
    assert max(JSON.encode(TEXT)) < JSON.n_vocab <= 300
    assert len(JSON.encode(TEXT)) < len(TEXT) / 2  # merges are applied
    assert_same(tokenizer_from_spec(json.loads(json.dumps(JSON.spec))), JSON)


def test_a_vocabulary_without_end_of_text_has_no_eot():
    from tokenizers import ByteLevelBPETokenizer
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=280, show_progress=False)
    assert JsonTokenizer(tokenizer.to_str()).eot is None


# -----------------------------------------------------------------------------
# one encoder: data, prompts and transformers give the same ids

N = JSON.n_vocab  # the id of START; that of PAD is N + 1


@pytest.fixture(scope="module", params=["added", "truncated", "old", "unigram", "words"])
def odd(request, tmp_path_factory):
    """(kind, folder, tokenizer) for each kind of save_tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    save_tokenizer(folder, request.param)
    return request.param, folder, tokenizer_of_folder(folder)


PIECES = st.sampled_from([EOT, START, PAD, "</s>", "[END]", "<pad>", "Line 7: it ends.", "a",
                          " ", "  ", "\n", "\r\n", "é", "日本", "🙂", "<|", "|>", "<|endoftext"])


def test_ids_and_special_tokens_equal_those_of_transformers(odd):
    from transformers import AutoTokenizer
    _, folder, ours = odd
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (ours.eot, ours.special["eos_token"]) == (theirs.eos_token_id, theirs.eos_token)
    for key in ("bos_token", "pad_token", "unk_token"):
        assert ours.special.get(key) == getattr(theirs, key)

    @given(st.lists(PIECES, max_size=8).map("".join))
    def agree(text):
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ours.encode_batch([text, "Line"])[0].tolist() == ids
    agree()


def test_a_long_text_is_not_cut_and_a_short_one_not_padded(odd):
    text = "Line 7: it ends.\n" * 50
    assert len(odd[2].encode(text)) > 8 * len(odd[2].encode("Line 7: it ends.\n")) >= 8
    assert len(odd[2].encode("Line")) < 8  # not padded


def test_a_dataset_and_a_checkpoint_keep_the_tokenizer(odd, tmp_path):
    """Also the name of its end-of-text token, which tokenizer.json does not contain."""
    _, _, ours = odd
    for name, content in ours.files.items():
        (tmp_path / name).write_bytes(content)
    assert_same(tokenizer_of_dataset(tmp_path), ours)
    assert_same(tokenizer_from_spec(json.loads(json.dumps(ours.spec))), ours)
    assert_same(tokenizer_of_source(str(tmp_path)), ours)
    assert_same(tokenizer_of_source(str(tmp_path / "tokenizer.json")), ours)


@pytest.mark.parametrize("kind", ["added", "truncated", "old"])
def test_added_tokens_have_the_ids_after_the_vocabulary(kind, tmp_path):
    save_tokenizer(tmp_path, kind)
    tokenizer = tokenizer_of_folder(tmp_path)
    line = tokenizer.encode("Line")
    assert tokenizer.encode(f"{START}Line{PAD}") == [N, *line, N + 1]
    assert tokenizer.n_bytes([*line, N, tokenizer.eot]) == len(f"Line{START}")


@pytest.mark.parametrize("file, key", [
    ("tokenizer_config.json", "eos_token"), ("special_tokens_map.json", "eos_token"),
    ("generation_config.json", "eos_token_id"), ("config.json", "eos_token_id")])
def test_any_file_may_name_end_of_text(file, key, tmp_path):
    save_tokenizer(tmp_path, "added")
    (tmp_path / "tokenizer_config.json").unlink()
    assert tokenizer_of_folder(tmp_path).special == {"eos_token": EOT}
    for value in ((N, [N, 0]) if key.endswith("id") else (
            START, {"content": START, "lstrip": False})):
        (tmp_path / file).write_text(json.dumps({key: value, "bos_token_id": 999}))
        found = tokenizer_of_folder(tmp_path)
        assert found.eot == N and found.special == {"eos_token": START}


def test_an_added_token_with_another_id_is_refused(tmp_path):
    save_tokenizer(tmp_path, "old")
    (tmp_path / "added_tokens.json").write_text(json.dumps({START: N + 5}))
    with pytest.raises(UserError, match=r"'<\|startoftext\|>' has the id \d+, but the next free"):
        tokenizer_of_folder(tmp_path)


def test_a_token_beyond_the_rows_of_the_model_is_refused_when_it_is_used(tmp_path):
    """Tokens such as [PAD] are often added to a tokenizer whose model has no rows for them."""
    save_tokenizer(tmp_path, "added")
    tokenizer = tokenizer_of_folder(tmp_path)
    limit_rows(tokenizer, N + 2, "out")
    assert tokenizer.encode(PAD) == [N + 1]
    limit_rows(tokenizer, N + 1, "out")
    assert tokenizer.encode(f"Line{START}")[-1] == N
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["a", text])):
        with pytest.raises(UserError, match=rf"'<\|pad\|>', whose id {N + 1} is beyond the"):
            encode(f"Line{PAD}")
    for other, rows in ((tokenizer, N - 1), (CharTokenizer("abc"), 2), (GPT2Tokenizer(), 50256)):
        with pytest.raises(UserError, match=r"out: its tokenizer has .* rows; they belong to"):
            limit_rows(other, rows, "out")


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "Lowercase"}}, {"normalizer": {"type": "NFC"}},
    {"pre_tokenizer": None}, {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True,
                                                "trim_offsets": True, "use_regex": True}}],
    ids=["lowercase", "NFC", "no pre-tokenizer", "prefix space"])
def test_gpt2s_vocabulary_with_other_rules_is_not_gpt2(change, gpt2_vocabulary, tmp_path):
    from transformers import AutoTokenizer
    data = json.loads(GPT2Tokenizer().to_json())
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    assert isinstance(tokenizer_of_folder(tmp_path), GPT2Tokenizer)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data | change), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOT}))
    found, theirs = tokenizer_of_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "Hi There, it's\nE\u0301"
    assert found.encode(text) == theirs(text).input_ids != GPT2Tokenizer().encode(text)


def test_a_special_token_that_is_not_listed_as_added_is_found(tmp_path):
    """End-of-text is in the vocabulary, but not among the added tokens of tokenizer.json."""
    data = json.loads(tiny_json())
    data["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOT}))
    found = tokenizer_of_folder(tmp_path)
    assert found.encode(f"Line{EOT}") == [*JSON.encode("Line"), JSON.eot]
    assert found.special_ids["eos_token"] == JSON.eot


@pytest.mark.parametrize("flag", ["lstrip", "rstrip"])
@pytest.mark.parametrize("kind", ["old", "base"])
def test_files_next_to_the_vocabulary_add_tokens_with_flags(kind, flag, tmp_path):
    from transformers import AutoTokenizer
    save_tokenizer(tmp_path, "old" if kind == "old" else "added")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    token = {"content": "<X>", "lstrip": False, "rstrip": False, "single_word": False,
             "normalized": False, "special": True, flag: True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        config | {"added_tokens_decoder": {str(N + 2): token}}))
    ours = tokenizer_of_folder(tmp_path)
    line = [*JSON.encode("Line"), *JSON.encode(" ")] if flag == "rstrip" else JSON.encode("Line")
    ends = JSON.encode("ends") if flag == "rstrip" else JSON.encode(" ends")
    assert ours.encode("Line <X> ends") == [*line, N + 2, *ends]
    if kind == "base":  # in the old layout transformers gives it another id
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        assert ours.encode("Line <X> ends") == theirs("Line <X> ends",
                                                      add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", ["vocab.json", "vocab.txt", "tokenizer.model"])
def test_an_incomplete_tokenizer_is_refused_and_not_replaced_by_gpt2s(name, tmp_path):
    (tmp_path / name).write_text("{}")
    (tmp_path / "config.json").write_text('{"vocab_size": 50257}')
    with pytest.raises(UserError, match=f"has {name}, but no tokenizer can be read"):
        tokenizer_of_source(str(tmp_path))


def test_numbers_that_are_not_ids_are_ignored(tmp_path):
    save_tokenizer(tmp_path, "added")
    (tmp_path / "config.json").write_text('{"pad_token_id": -1, "eos_token_id": 99999999999}')
    assert tokenizer_of_folder(tmp_path).special["pad_token"] == PAD


def test_the_dropout_of_a_bpe_is_switched_off(tmp_path):
    data = json.loads(tiny_json())
    data["model"]["dropout"] = 0.9
    ours = JsonTokenizer(json.dumps(data))
    assert ours.encode(TEXT) == ours.encode(TEXT) == JSON.encode(TEXT)


def test_an_end_of_text_beyond_the_rows_of_the_model_is_refused():
    tokenizer = JsonTokenizer(tiny_json())
    with pytest.raises(UserError, match=r"the id of end-of-text|belong to different models"):
        limit_rows(tokenizer, tokenizer.eot, "out")


def test_without_end_removes_end_of_text_from_the_end_only():
    assert without_end(f"a{EOT}", JSON) == without_end(f"a{EOT}\n", JSON) == "a"
    assert without_end(f"a{EOT}b\n", JSON) == f"a{EOT}b\n"
    assert without_end(f"a{EOT}", CharTokenizer("a")) == f"a{EOT}"


BAD = {"version": "1.0", "added_tokens": [],
       "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}}


@pytest.mark.parametrize("change, message", [
    ({"model": BAD["model"] | {"vocab": {}}}, "empty vocabulary"),
    ({"model": BAD["model"] | {"type": "None"}}, "is not a tokenizer.json"),
    ({"normalizer": {"type": "Sequence", "normalizers": [[]]}}, "is not a tokenizer.json"),
    ({"model": {"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]]}}, "is not a tokenizer.json"),
])
def test_a_tokenizer_json_that_cannot_be_used_is_refused(change, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(BAD | change))
    with pytest.raises(UserError, match=message):
        tokenizer_of_folder(tmp_path)
    with pytest.raises(UserError, match=message):
        tokenizer_from_spec({"kind": "json", "json": json.dumps(BAD | change)})


def test_a_text_that_the_vocabulary_cannot_express_is_refused():
    tokenizer = JsonTokenizer(json.dumps(BAD))
    for text in ("b", "\ud83d"):
        with pytest.raises(UserError, match="cannot be encoded by the model's tokenizer"):
            tokenizer.encode(text)
        with pytest.raises(UserError, match="cannot be encoded by the model's tokenizer"):
            tokenizer.encode_batch(["a", text])


def test_a_panic_of_the_library_is_a_one_line_error():
    """A panic of Rust code is raised as a BaseException."""
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(UserError, match=r"x is bad \(index out of bounds\)"), \
            library_errors("x is bad"):
        raise panic("index out of bounds")
    for error in (KeyboardInterrupt, MemoryError):
        with pytest.raises(error), library_errors("x"):
            raise error


@pytest.mark.parametrize("name, content", [
    *((name, content) for content in ("{", "[]", "[" * 100_000) for name in (
        "tokenizer_config.json", "added_tokens.json", "config.json", "special_tokens_map.json")),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
    ("added_tokens.json", '{"a": "x"}'),
], ids=lambda text: text[:40])
def test_damaged_files_next_to_the_vocabulary_are_refused(name, content, tmp_path):
    save_tokenizer(tmp_path, "old")
    assert tokenizer_of_folder(tmp_path).n_vocab == N + 2
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="damaged"):
        tokenizer_of_folder(tmp_path)


# -----------------------------------------------------------------------------
# folders

def test_each_kind_of_tokenizer_is_found_in_its_folder(tmp_path):
    assert tokenizer_of_folder(tmp_path) is None
    assert isinstance(tokenizer_of_dataset(tmp_path), GPT2Tokenizer)
    chars = write_tokenizer(tmp_path / "chars", "chars")
    assert isinstance(chars, CharTokenizer) and chars.itos == sorted(set(TEXT))
    assert_same(write_tokenizer(tmp_path / "json", "json"), JSON)
    assert_same(tokenizer_of_folder(tmp_path / "chars"), chars)


def test_a_dataset_with_another_tokenizer_than_the_model_is_refused(tmp_path):
    check_same_tokenizer(CharTokenizer("abc"), CharTokenizer(["a", "b", "c"]), "out", "data/x")
    for other in (CharTokenizer("acb"), CharTokenizer("abcd"), JSON, GPT2Tokenizer()):
        with pytest.raises(UserError, match=r"out uses a character vocabulary \(3 tokens\), but "
                                             r"data/x was made with .*again with --tokenizer=out$"):
            check_same_tokenizer(CharTokenizer("abc"), other, "out", "data/x")
    (tmp_path / "ckpt.pt").touch()
    # for the path of a checkpoint, the message names its folder
    with pytest.raises(UserError, match=f"--tokenizer={tmp_path}$"):
        check_same_tokenizer(CharTokenizer("abc"), JSON, str(tmp_path / "ckpt.pt"), "data/x")
    with pytest.raises(UserError, match=r"hf has no tokenizer file.*put its tokenizer.json"):
        check_same_tokenizer(None, GPT2Tokenizer(), "hf", "data/x")


@pytest.mark.parametrize("itos", [{0: "a", 1: "é", 2: "\n"}, ["a", "é", "\n"]],
                         ids=["dict", "list"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_nanogpts_meta_pkl_is_read(itos, protocol, tmp_path):
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
        with pytest.raises(UserError, match=r"meta.pkl is not a plain character vocabulary \(it "
                                             r"refers to \w+.open\); run its prepare.py again"):
            tokenizer_of_folder(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [
    b"", b"garbage", pickle.dumps({"stoi": {}}), pickle.dumps([1]), pickle.dumps({"itos": 3}),
    pickle.dumps({"itos": {0: "a", 2: "b"}}), pickle.dumps({"itos": [1, 2]}),
    pickle.dumps({"itos": {0: "a"}})[:-4],
])
def test_a_damaged_meta_is_refused(content, tmp_path):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError, match=r"meta.pkl is not a plain character vocabulary"):
        tokenizer_of_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1", b"\xff\xfe"])
def test_a_damaged_tokenizer_json_is_refused(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer.json is not a tokenizer.json"):
        tokenizer_of_folder(tmp_path)


def test_a_damaged_vocab_json_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match=r"vocab.json and merges.txt are not a vocabulary"):
        tokenizer_of_folder(tmp_path)


@pytest.mark.parametrize("spec", [{}, {"kind": "words"}, None, "gpt2"])
def test_an_unknown_spec_is_refused(spec):
    with pytest.raises(UserError, match="is of kind"):
        tokenizer_from_spec(spec)
