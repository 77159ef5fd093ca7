"""sample.py on tiny runs: the output for each option, and refused input."""
import io
import json
import os
import re
from contextlib import redirect_stdout
from itertools import accumulate

import huggingface_hub
import pytest
from conftest import TEXT, tiny_json
from hypothesis import example, given
from hypothesis import strategies as st

import sample
from nanotune.errors import UserError
from nanotune.generation import generate
from nanotune.generation.generate import TextPieces
from nanotune.text.tokenizer import EOT, CharTokenizer, JsonTokenizer
from sample import main

RULE = "\n" + "-" * 15 + "\n"


@pytest.fixture
def chars(make_run):
    return make_run(CharTokenizer(sorted(set(TEXT))))[0]


@pytest.fixture
def json_run(make_run):
    return make_run(JsonTokenizer(tiny_json()), block_size=64)[0]


@pytest.fixture
def samples(capsys):
    """samples(out_dir, **options) runs sample.py; returns the texts that it prints."""
    def run(out_dir, **options):
        options = dict(device="cpu", dtype="float32", max_new_tokens=12) | options
        main([f"--out_dir={out_dir}", *(f"--{k}={v}" for k, v in options.items())])
        out = capsys.readouterr().out
        assert out.endswith(RULE)
        return out.removesuffix(RULE).split(RULE)
    return run


# -----------------------------------------------------------------------------
# output

def test_several_samples_differ_and_a_seed_repeats_them(chars, samples):
    texts = samples(chars, start="Line ", num_samples=4)
    assert len(texts) == len(set(texts)) == 4
    assert all(text.startswith("Line ") and len(text) == 5 + 12 for text in texts)
    assert samples(chars, start="Line ", num_samples=4) == texts
    assert samples(chars, start="Line ", num_samples=4, seed=1) != texts


def test_temperature_top_k_and_top_p_take_effect(chars, samples):
    greedy = samples(chars, start="Line", num_samples=3, temperature=0)
    assert len(set(greedy)) == 1
    assert samples(chars, start="Line", num_samples=2, top_k=1) == greedy[:2]
    assert samples(chars, start="Line", num_samples=2, top_p=1e-6) == greedy[:2]
    wild = dict(start="Line", num_samples=3, temperature=5.0)
    assert samples(chars, **wild, top_k=0) == samples(chars, **wild, top_k=99)
    assert samples(chars, **wild, top_k=0) != samples(chars, **wild, top_k=2)


def test_greedy_sampling_prints_one_sample_by_default(chars, samples):
    assert samples(chars, start="Line", temperature=0) == (
        samples(chars, start="Line", temperature=0, num_samples=2)[:1])
    assert len(samples(chars, start="Line", temperature=0.1)) == 10


def test_the_smallest_temperature_and_top_p_are_greedy(chars, samples):
    """Float32 rounds them to 0, and such a 0 once drew an id beyond the vocabulary."""
    greedy = samples(chars, start="Line", num_samples=2, temperature=0)
    for small in (1e-30, 1e-40, 1e-300):
        assert samples(chars, start="Line", num_samples=2, temperature=small) == greedy
        assert samples(chars, start="Line", num_samples=2, top_p=small) == greedy


def test_a_sample_can_be_longer_than_the_context(chars, samples):
    text, = samples(chars, start="Line", num_samples=1, max_new_tokens=50)
    assert len(text) == 54


def test_init_from_is_used_instead_of_out_dir(chars, samples):
    assert samples("nothing", init_from=chars, start="L") == samples(chars, start="L")


def test_ids_that_only_pad_the_vocabulary_are_never_drawn(make_run, samples):
    out_dir, _ = make_run(CharTokenizer("ab"), vocab_size=64)
    for text in samples(out_dir, start="a", max_new_tokens=40, temperature=3.0):
        assert len(text) == 41 and set(text) <= {"a", "b"}


def test_a_prompt_is_read_from_a_file(chars, samples, tmp_path):
    (tmp_path / "prompt.txt").write_text("Line 1:", encoding="utf-8")
    path = f"FILE:{tmp_path / 'prompt.txt'}"
    assert samples(chars, start=path) == samples(chars, start="Line 1:")


def test_a_prompt_is_read_from_a_windows_file(chars, samples, tmp_path):
    """A byte order mark is not part of the text, and \\r\\n is one line end."""
    prompts = []
    for name, content in (("bom", b"\xef\xbb\xbfLine 1:\r\nit"), ("plain", b"Line 1:\nit")):
        (tmp_path / name).write_bytes(content)
        prompts.append(samples(chars, start=f"FILE:{tmp_path / name}", temperature=0))
    assert prompts[0] == prompts[1] and prompts[0][0].startswith("Line 1:\nit")


def test_end_of_text_ends_a_sample(json_run, samples, monkeypatch):
    eot = JsonTokenizer(tiny_json()).eot
    fed = iter([[5, 6, eot], [7, eot, eot], [eot, eot, eot], [9, 9, 9]])

    def stream(model, idx, max_new_tokens, stop_token=None, **options):
        assert stop_token == eot
        for row in fed:
            yield sample.torch.tensor(row)
    monkeypatch.setattr(sample, "stream", stream)
    decode = JsonTokenizer(tiny_json()).decode
    texts = samples(json_run, start="Line", num_samples=3)
    assert texts == ["Line" + decode([5, 7]), "Line" + decode([6]), "Line"]
    assert next(fed) == [9, 9, 9]  # nothing is drawn after all samples ended


def test_a_sample_is_printed_when_it_ends(json_run, monkeypatch, capsys):
    """It does not wait for other samples. An incomplete character at its end is left out."""
    tokenizer = JsonTokenizer(tiny_json())
    eot, (first, *_) = tokenizer.eot, tokenizer.encode("\U0001f642")
    seen = []

    def stream(*args, **options):
        for row in [[5, 6], [eot, 7], [eot, first]]:
            yield sample.torch.tensor(row)
            seen.append(capsys.readouterr().out)
    monkeypatch.setattr(sample, "stream", stream)
    main([f"--out_dir={json_run}", "--device=cpu", "--start=Line", "--num_samples=2"])
    assert seen[0] == "" and seen[1] == "Line" + tokenizer.decode([5]) + RULE
    assert capsys.readouterr().out == "Line" + tokenizer.decode([6, 7]) + RULE


def test_an_empty_prompt_means_end_of_text(json_run, samples):
    started = samples(json_run, start="", num_samples=2, temperature=0)
    assert all(text and EOT not in text for text in started)
    assert samples(json_run, start=EOT, num_samples=2, temperature=0) == [
        EOT + text for text in started]


def test_a_stop_text_may_span_tokens(chars, samples):
    free = samples(chars, start="L", num_samples=6, max_new_tokens=40)
    stop = free[2][20:23]
    stopped = samples(chars, start="L", num_samples=6, max_new_tokens=40, stop=stop)
    assert stopped == [text[0] + text[1:].partition(stop)[0] for text in free]
    assert stopped != free and stop not in stopped[2][1:]


def test_a_stop_text_in_the_prompt_stops_nothing(chars, samples):
    assert samples(chars, start="Line", stop="Line") == samples(chars, start="Line")


@pytest.mark.skipif(os.name != "posix", reason="pseudo terminals are POSIX's")
def test_on_a_terminal_each_character_is_printed_once(json_run, samples):
    options = dict(start="Line é", num_samples=1, max_new_tokens=50, temperature=1.5, top_k=0)
    text, = samples(json_run, **options)
    assert "\ufffd" in text  # some bytes are not a character
    ours, theirs = os.openpty()
    with open(theirs, "w", encoding="utf-8") as terminal, redirect_stdout(terminal):
        main([f"--out_dir={json_run}", "--device=cpu", "--dtype=float32",
              *(f"--{k}={v}" for k, v in options.items())])
    shown = b""
    while chunk := read_or_eof(ours):
        shown += chunk
    os.close(ours)
    assert re.sub("\r+\n", "\n", shown.decode()) == re.sub("\r+\n", "\n", text) + "\n"


def read_or_eof(handle):
    try:
        return os.read(handle, 65536)
    except OSError:  # on Linux, if the other end is closed
        return b""


class BytesTokenizer:
    """A tokenizer whose tokens are any bytes, also parts of characters."""
    eot = None

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, ids):
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")


@example("é", [b"\xf0\x9f", b"\x99\x82", b"\xe6\x97a"], [], 1)  # half characters
@example("a", [b"xa", b"a\n", b"aa"], ["a\naa"], 1)                # a stop text, token by token
@given(st.text("aé日🙂\n", max_size=8),
       st.lists(st.binary(min_size=1, max_size=4) | st.text("aé日🙂\n", min_size=1, max_size=3)
                .map(str.encode), max_size=12),
       st.lists(st.sampled_from(["a", "aa", "日", "🙂\n", "a\naé"]), max_size=1),
       st.integers(1, 3))
def test_each_part_of_a_growing_sample_is_printed_once(prompt, new, stops, cut):
    data = b"".join(new)
    pieces = [prompt.encode()] + [data[i:i + cut] for i in range(0, len(data), cut)]
    text, printed = TextPieces(BytesTokenizer(pieces), [0], stops), prompt
    whole = data.decode("utf-8", "replace")
    stopped = stops and stops[0] in whole
    expected = prompt + (whole.partition(stops[0])[0] if stopped else whole.rstrip("\ufffd"))
    for token in range(1, len(pieces)):
        printed += text.add(token)
        assert expected.startswith(printed)
    assert printed + text.rest() == expected


@given(st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=12),
       st.lists(st.sampled_from(["a", "ab", "bab", "\n\n", "b\nb"]), min_size=1, max_size=4))
def test_of_several_stop_texts_the_first_to_occur_ends_the_sample(new, stops):
    text, printed = TextPieces(BytesTokenizer([piece.encode() for piece in new]), [], stops), ""
    for token, so_far in enumerate(accumulate(new)):
        printed += text.add(token)
        found = [so_far.index(stop) for stop in stops if stop in so_far]
        assert text.done == bool(found)
        if found:
            assert printed + text.rest() == so_far[:min(found)]
            return
        assert not any(stop in printed for stop in stops)
    assert printed + text.rest() == "".join(new)


def test_for_each_new_token_only_a_few_tokens_are_decoded():
    """Each token is decoded with at most CONTEXT tokens before it, for any length of text."""
    lengths = []

    class Counted(BytesTokenizer):
        def decode(self, ids):
            lengths.append(len(ids))
            return super().decode(ids)

    text = TextPieces(Counted([b"one "] * 1000), [0] * 500)
    assert "".join(text.add(i) for i in range(1000)) + text.rest() == "one " * 1000
    assert max(lengths) <= TextPieces.CONTEXT + 1


# -----------------------------------------------------------------------------
# many prompts: in a file, or typed

def test_a_file_of_prompts_is_sampled_in_batches_and_printed_as_jsonl(chars, capsys, tmp_path,
                                                                      monkeypatch):
    (tmp_path / "prompts.txt").write_text("Line 1\n\nL\r\nLine 22\n", encoding="utf-8")
    batches = []

    def stream(model, prompts, *args, **options):
        batches.append(len(prompts))
        return generate.stream(model, prompts, *args, **options)
    monkeypatch.setattr(sample, "stream", stream)
    main([f"--out_dir={chars}", f"--start=LINES:{tmp_path / 'prompts.txt'}", "--num_samples=2",
          "--batch_size=5", "--temperature=0", "--max_new_tokens=7", "--device=cpu"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert batches == [4, 2]
    assert [(line["line"], line["prompt"]) for line in found] == [
        (1, "Line 1"), (3, "L"), (4, "Line 22")]
    assert all(len(line["samples"]) == 2 for line in found)
    assert all(len(text) == 7 for line in found for text in line["samples"])


def test_a_prompt_in_a_batch_gets_the_same_text_as_alone(chars, samples, capsys, tmp_path):
    prompts = ["Line 1", "L", "Line 22: wh"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    alone = [samples(chars, start=prompt, num_samples=1, temperature=0)[0] for prompt in prompts]
    main([f"--out_dir={chars}", f"--start=LINES:{tmp_path / 'prompts.txt'}", "--num_samples=1",
          "--temperature=0", "--max_new_tokens=12", "--device=cpu", "--dtype=float32"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] + line["samples"][0] for line in found] == alone


def test_interactive_mode_answers_each_line(chars, samples, capsys, monkeypatch):
    """The texts equal those of one command per prompt. A bad prompt prints a one-line error."""
    alone = [samples(chars, start=prompt, num_samples=2) for prompt in ("Line ", "L")]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Line \né\n{'L' * 17}\nL\n"))
    main([f"--out_dir={chars}", "--interactive", "--num_samples=2", "--max_new_tokens=12",
          "--device=cpu", "--dtype=float32"])
    out, err = capsys.readouterr()
    assert out == "".join(text + RULE for text in (*alone[0], *alone[1]))
    assert "error: the character 'é' is not in the model's vocabulary" in err
    assert "error: the prompt has 17 tokens, the model reads at most 16" in err


def test_ctrl_c_ends_the_sample_and_not_the_session(chars, capsys, monkeypatch):
    calls = []

    def stream(model, prompts, *args, **options):
        calls.append(prompts)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return generate.stream(model, prompts, *args, **options)
    monkeypatch.setattr(sample, "stream", stream)
    monkeypatch.setattr("sys.stdin", io.StringIO("L\nLine\n"))
    main([f"--out_dir={chars}", "--interactive", "--num_samples=1", "--device=cpu"])
    assert len(calls) == 2 and "Line" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# refused input

def refuse(out_dir, message, *argv):
    with pytest.raises(UserError, match=message) as error:
        main([f"--out_dir={out_dir}", "--device=cpu", "--dtype=float32", *argv])
    assert "\n" not in str(error.value)


def test_bad_prompts_are_refused(chars, tmp_path):
    refuse(chars, "the character 'é' is not in the model's vocabulary", "--start=é")
    refuse(chars, r"--start: character 1 is .udcff, half of a surrogate pair", "--start=\udcff")
    refuse(chars, "--start is empty", "--start=")
    refuse(chars, "--start has 17 tokens, the model reads at most 16", f"--start={'L' * 17}")
    refuse(chars, "none.txt: no such file", f"--start=FILE:{tmp_path / 'none.txt'}")
    (tmp_path / "latin1.txt").write_bytes("Line, café".encode("latin-1"))
    refuse(chars, "latin1.txt is not UTF-8: byte 0xe9 at offset 9",
           f"--start=FILE:{tmp_path / 'latin1.txt'}")
    (tmp_path / "prompts.txt").write_text("Line\n" + "L" * 17, encoding="utf-8")
    refuse(chars, "line 2 of --start has 17 tokens", f"--start=LINES:{tmp_path / 'prompts.txt'}")


def test_interactive_mode_refuses_start(chars):
    refuse(chars, "--interactive asks for prompts; leave --start out", "--interactive", "--start=L")


def test_a_prompt_may_fill_the_context(chars, samples):
    text, = samples(chars, start="L" * 16, num_samples=1)
    assert len(text) == 16 + 12


@pytest.mark.parametrize("arg, message", [
    ("--num_samples=0", "--num_samples=0 must be at least 1"),
    ("--max_new_tokens=0", "--max_new_tokens=0 must be at least 1"),
    ("--temperature=-0.1", "--temperature=-0.1 must be at least 0"),
    ("--top_k=-1", "--top_k=-1 must be at least 0"), ("--seed=-1", "--seed=-1 must be at least 0"),
    ("--top_p=0", r"--top_p=0.0 must be in \(0, 1\]"), ("--top_p=1.1", "--top_p=1.1 must be in"),
    ("--dtype=int8", "--dtype=int8 is not supported; use auto"),
    ("--device=tpu9", "--device=tpu9 is not supported; use auto"),
    ("--compile=fast", "--compile=fast is not supported; use auto, True or False"),
])
def test_bad_options_are_refused(chars, arg, message):
    refuse(chars, message, arg)


def test_the_path_of_a_checkpoint_is_accepted_as_a_model(chars, samples):
    assert samples(chars / "ckpt.pt", start="L") == samples("x", init_from=chars / "ckpt.pt",
                                                            start="L") == samples(chars, start="L")


@pytest.mark.parametrize("options, message", [
    ({"out_dir": "runs/mine_v1"}, r"--out_dir=runs/mine_v1 does not exist; runs here: out-tiny; "),
    ({"out_dir": "gpt2"}, r"--out_dir=gpt2 does not exist"),
    ({"init_from": "out-tinny"}, r"out-tinny does not exist"),
    ({"init_from": "out-tiny/best.pt"}, r"out-tiny/best.pt does not exist"),
    ({"init_from": "x.pt"}, r"x.pt does not exist"), ({"init_from": "note.txt"}, "is a file"),
    ({"init_from": "a/b/c"}, "a/b/c does not exist"), ({"init_from": ""}, " does not exist|holds"),
    ({"init_from": "../gpt2"}, "../gpt2 does not exist"),
])
def test_a_name_that_is_not_a_hub_id_is_never_downloaded(chars, options, message, tmp_path,
                                                         monkeypatch):
    def asked(*args, **kwargs):
        pytest.fail("asked the hub")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", asked)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.txt").write_text("x")
    with pytest.raises(UserError, match=message):
        main([f"--{name}={value}" for name, value in options.items()])


def test_a_folder_without_a_model_is_refused(tmp_path):
    refuse(tmp_path / "none", "none does not exist")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "holds neither ckpt.pt .* nor config.json")


def test_a_model_without_a_tokenizer_is_refused(write_hf):
    from conftest import hf_model
    refuse(write_hf(hf_model()), "has no tokenizer file: put its tokenizer.json")


def test_speed_is_given_for_all_tokens_and_for_the_later_half():
    times = [0.0, 4.0, 5.0, 6.0, 7.0, 7.5, 8.0, 8.5, 9.0]  # the first took four seconds
    assert sample.speed(times, 10) == "80 tokens in 9.00 s, 8.9 per second (second half: 20.0)"
    assert sample.speed([0.0, 2.0], 1) == "1 tokens in 2.00 s, 0.5 per second"


def test_speed_is_printed(chars, capsys):
    main([f"--out_dir={chars}", "--device=cpu", "--max_new_tokens=4", "--num_samples=3"])
    err = capsys.readouterr().err
    assert re.search(r"^12 tokens in [\d.]+ s, [\d.,]+ per second \(second half: ", err, re.M)
