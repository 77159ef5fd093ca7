"""Reading text and .jsonl files: byte order marks, Windows line ends, encodings, bad bytes."""
import subprocess

import pytest

from nanotune.errors import UserError
from nanotune.text import read
from nanotune.text.read import check_surrogates, read_jsonl, read_text

TEXT = "one\ntwo é 漢\n"


@pytest.mark.parametrize("content", [
    TEXT.encode(), TEXT.encode("utf-8-sig"), TEXT.replace("\n", "\r\n").encode(),
    TEXT.replace("\n", "\r\n").encode("utf-8-sig")],
    ids=["plain", "mark", "line ends", "mark and line ends"])
def test_byte_order_marks_and_windows_line_ends_are_removed(content, tmp_path):
    (tmp_path / "f").write_bytes(content)
    assert read_text(tmp_path / "f") == TEXT


@pytest.mark.parametrize("encoding, name", [
    ("utf-16", "UTF-16"), ("utf-32", "UTF-32"), ("utf-16-le", "UTF-16LE"),
    ("utf-16-be", "UTF-16BE"), ("cp1252", "WINDOWS-1252")])
def test_the_printed_command_for_another_encoding_works(encoding, name, tmp_path):
    text = "Café. One line, and another.\n"
    file = tmp_path / "my text.txt"
    file.write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match=f"not UTF-8.* iconv -f {name} -t UTF-8 ") as error:
        read_text(file)
    command = str(error.value).split("convert it: ")[1]
    subprocess.run(command, shell=True, check=True)
    assert read_text(tmp_path / "my text-utf8.txt") == text


def test_the_byte_order_of_utf16_is_read_from_its_mark(tmp_path):
    for mark, encoding in ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        (tmp_path / "f").write_bytes(mark + "漢字".encode(encoding))
        with pytest.raises(UserError, match="iconv -f UTF-16 "):
            read_text(tmp_path / "f")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
def test_a_text_read_in_blocks_of_any_size_is_the_same(size, tmp_path, monkeypatch):
    """Also if a line end or a character of several bytes crosses the end of a block."""
    monkeypatch.setattr(read, "BLOCK", size)
    for content, text in (("\ufeffa\r\r\né\r\n漢😀\r", "a\r\né\n漢😀\r"), ("a\r\rb\r", "a\n\nb\n"),
                          ("", ""), ("\ufeff", ""), ("one line", "one line")):
        (tmp_path / "f").write_bytes(content.encode())
        assert read_text(tmp_path / "f") == text
        assert all(len(part) <= size + 1 for part in read.stream_text(tmp_path / "f"))


@pytest.mark.parametrize("size", [1, 4, 64])
@pytest.mark.parametrize("content, message", [
    (b"ab\xe9cd", "byte 0xe9 at offset 2;"), (b"\xef\xbb\xbfab\xe9cd", "byte 0xe9 at offset 5;"),
    (b"0123456789" * 10 + "é".encode() + b"\xff", "byte 0xff at offset 102;"),
    (b"a" * 20 + "漢".encode()[:2], "byte 0xe6 at offset 20;")],
    ids=["in a text", "after a mark", "after a long text", "incomplete at the end"])
def test_a_bad_byte_is_reported_with_its_offset(size, content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(read, "BLOCK", size)
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_text(tmp_path / "f")


def test_text_full_of_nul_is_refused(tmp_path):
    """Such text results from iconv -f WINDOWS-1252 on UTF-16. One NUL in a long text is allowed."""
    wrong = "One line.\n".encode("utf-16").decode("cp1252").encode()
    (tmp_path / "f").write_bytes(wrong)
    with pytest.raises(UserError, match=r"f is UTF-16LE, not UTF-8|characters are NUL"):
        read_text(tmp_path / "f")
    (tmp_path / "f").write_bytes(b"ab\0\0" * 10)
    with pytest.raises(UserError, match="f is not text: 20 of its 40 characters are NUL"):
        read_text(tmp_path / "f")
    (tmp_path / "f").write_bytes(b"a line\n" * 20 + b"\0")
    assert "\0" in read_text(tmp_path / "f")


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "gone", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            read_text(path)


def test_jsonl_lines_have_their_numbers_and_blank_lines_are_skipped(tmp_path):
    (tmp_path / "f").write_bytes('{"a": "é"}\r\n\r\n \n{"b": 1}\n'.encode("utf-8-sig"))
    assert list(read_jsonl(tmp_path / "f")) == [
        (f"{tmp_path / 'f'}, line 1", {"a": "é"}), (f"{tmp_path / 'f'}, line 4", {"b": 1})]


@pytest.mark.parametrize("line, message", [
    ('{"a": ', r"line 2: malformed JSON \(Expecting value at column 7\)"),
    ("[1]", r"line 2: must be a JSON object, not \[1\]"),
    ('{"a": ' + "[" * 200_000, "line 2: malformed JSON .*recursion"),
    ('{"a": ' + "1" * 5000 + "}", r"line 2: malformed JSON .*5000 digits"),
    (r'{"a": "ab\ud83d"}', r"line 2: character 3 is \\ud83d, half of a surrogate pair"),
])
def test_a_bad_line_is_refused_with_its_number(line, message, tmp_path):
    (tmp_path / "f").write_text('{"a": "fine \\ud83d\\ude00"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        list(read_jsonl(tmp_path / "f"))


def test_half_a_surrogate_pair_in_an_argument_is_refused():
    check_surrogates("é 😀", "--start")
    with pytest.raises(UserError, match=r"--start: character 2 is \\udcff"):
        check_surrogates("a\udcff", "--start")
