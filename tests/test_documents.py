"""Documents read in parts: the documents and ids equal those of the whole text in memory."""
import json
from itertools import chain, pairwise

import numpy as np
import pytest
from conftest import tiny_json
from hypothesis import example, given
from hypothesis import strategies as st

from nanotune.errors import UserError
from nanotune.text import documents, read
from nanotune.text.documents import Document, encode, find_documents, read_pieces, read_texts
from nanotune.text.tokenizer import EOT, CharTokenizer, GPT2Tokenizer, JsonTokenizer

LETTERS = "ab1 .'s\n\n\r\té\u3000漢😀\x1c"
TEXTS = st.lists(st.sampled_from([*LETTERS, EOT, "==", "a b", "\n" * 9]), max_size=40).map("".join)


@pytest.fixture(scope="module")
def small():
    """Set the sizes of blocks, edges and batches to a few characters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "BLOCK", 7)
        patch.setattr(documents, "EDGE", 16)
        patch.setattr(documents, "BATCH", 20)
        yield


def whole(text, mark, end):
    """The documents of a text in memory."""
    parts = text.split(mark) if mark else [text]
    parts = [part.strip("\n") for part in parts] if len(parts) > 1 else parts
    parts = [part.rstrip().removesuffix(end) if part.rstrip().endswith(end) else part
             for part in parts]
    return [part for part in parts if part.strip()]


def text_of(found):
    return ["".join(parts) for parts, _ in read_pieces([(document, True) for document in found])]


@pytest.mark.parametrize("mark, end", [(None, EOT), (EOT, EOT), ("==", EOT), ("\n", "b")])
def test_documents_equal_those_of_the_whole_text(small, tmp_path, mark, end):
    @given(TEXTS)
    @example(" " * 50 + "a" + " " * 50 + EOT + "\n" * 50 + "==" * 9 + "=" + "ab " * 50 + EOT + "  ")
    def check(text):
        (tmp_path / "f").write_bytes(text.encode())
        found = list(find_documents(tmp_path / "f", mark, end))
        expected = whole(read.read_text(tmp_path / "f"), mark, end)
        assert list(map(len, found)) == list(map(len, expected))
        assert text_of(found) == expected
    check()


def test_a_document_is_sliced_like_a_string(small, tmp_path):
    (tmp_path / "f").write_text("one two three")
    document, = find_documents(tmp_path / "f", None)
    cut = [document[4:], document[:3], document[4:][:3], document[50:], document[3:2]]
    assert [len(part) for part in cut] == [9, 3, 3, 0, 0]
    assert text_of(cut) == ["two three", "one", "two", "", ""]     # in any order


def test_a_file_that_becomes_shorter_is_refused(small, tmp_path):
    (tmp_path / "f").write_text("one two three")
    with pytest.raises(UserError, match=r"f became shorter while it was read; run this again"):
        text_of([Document(tmp_path / "f", 0, 14)])


def tokenizers():
    yield pytest.param(GPT2Tokenizer(), id="gpt2")
    yield pytest.param(CharTokenizer(sorted({*LETTERS, *EOT, "="})), id="characters")
    yield pytest.param(JsonTokenizer(tiny_json()), id="json")
    prefix = changed(pre_tokenizer={"add_prefix_space": True})
    yield pytest.param(JsonTokenizer(prefix), id="json with a prefix space")


def changed(token=(), **parts):
    """tiny_json() with these fields replaced."""
    data = json.loads(tiny_json())
    for name, fields in parts.items():
        data[name] = {**(data[name] or {}), **fields}
    data["added_tokens"][0] |= dict(token)
    return json.dumps(data)


@pytest.mark.parametrize("tokenizer", [*tokenizers()])
def test_ids_equal_those_of_the_whole_text(
        small, gpt2_vocabulary, tokenizer, tmp_path, monkeypatch):
    in_slices = documents.slices
    monkeypatch.setattr(documents, "slices", lambda parts: in_slices(parts, 3))
    end = np.array(documents.document_end(tokenizer))

    @given(TEXTS, TEXTS)
    def check(first, second):
        (tmp_path / "f").write_bytes(f"{first}\nb{EOT}{second}a".encode())
        found = list(find_documents(tmp_path / "f", EOT))
        pieces = [*((document, True) for document in found), (first, False), (second, True)]
        got = list(encode(tokenizer, read_texts(pieces, tokenizer.sliceable), 0, ""))
        expected = [[*tokenizer.encode(text), *(end if ends else ())] for text, ends in
                    zip([*text_of(found), first, second], [ends for _, ends in pieces])]
        assert np.concatenate([ids for ids, _ in got]).tolist() == list(chain(*expected))
        lengths = np.concatenate([lengths for _, lengths in got])
        assert lengths.sum() == sum(map(len, expected)) and len(lengths) >= len(pieces)
    check()


def test_a_text_is_sliced_only_after_whole_words():
    text = "one two\nthree  four\n\n" * 3 + "x" * 30 + " end"
    parts = list(documents.slices(iter([text[:40], text[40:]]), 8))
    assert "".join(parts) == text and len(parts) > 5
    assert all(not a[-1].isspace() and b[0] in " \n" for a, b in pairwise(parts))


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "NFC"}}, {"pre_tokenizer": {"add_prefix_space": True}},
    {"pre_tokenizer": {"use_regex": False}}, {"pre_tokenizer": {"type": "Whitespace"}},
    {"token": {"rstrip": True}}, {"token": {"content": "a b"}}])
def test_a_tokenizer_that_may_join_slices_is_not_sliceable(change):
    assert JsonTokenizer(tiny_json()).sliceable
    assert not JsonTokenizer(changed(**change)).sliceable


def test_a_batch_of_many_or_no_texts_is_encoded_like_each_text(gpt2_vocabulary):
    tokenizer, texts = GPT2Tokenizer(), [f"text {i}" for i in range(1000)] + [""]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == list(
        map(tokenizer.encode, texts))
    assert tokenizer.encode_batch([]) == []


def test_an_unknown_character_is_named():
    for text, name in (("ab\nz", "z"), ("a😀", "😀"), ("\ud83d", "\\ud83d")):
        with pytest.raises(UserError, match="the character") as error:
            CharTokenizer("ab\n").encode_batch(["ab", text])
        assert f"character '{name}' is not in the model's vocabulary of 3" in str(error.value)
