"""Pairs of a source and a target: batches, bad files, data/pairs/prepare.py."""
import itertools
import json
import runpy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import save_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tiny import REPO, write_pairs

from model import GPTConfig
from nanotune.errors import UserError
from nanotune.text.loader import PairBin, open_dataset, padded_length
from nanotune.text.tokenizer import tokenizer_of_dataset
from t5 import T5Config

CONFIG = T5Config(vocab_size=61, source_length=30, target_length=10)


def rows(x, y):
    return [(tuple(a[a >= 0].tolist()), tuple(b[b >= 0].tolist())) for a, b in zip(x, y)]


@pytest.mark.parametrize("global_batch", [1, 6, 7, 40, 64])
def test_each_pair_is_read_once_an_epoch(tmp_path, global_batch):
    pairs = write_pairs(tmp_path, n=41)
    data = open_dataset(tmp_path / "train.bin", CONFIG, seed=3, global_batch=global_batch)
    expected = sorted((tuple(s), tuple(t)) for s, t in pairs)
    epochs = [rows(*data.batch(41 * epoch, 41)) for epoch in range(4)]
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = open_dataset(tmp_path / "train.bin", CONFIG, seed=3, global_batch=global_batch)
    assert rows(*again.batch(2 * 41, 41)) == epochs[2]  # only the seed and the sample number count
    assert rows(*data.batch(30, 20)) == (epochs[0] + epochs[1])[30:50]
    other = open_dataset(tmp_path / "train.bin", CONFIG, seed=4, global_batch=global_batch)
    assert rows(*other.batch(0, 41)) != epochs[0]


@given(n=st.integers(1, 60), size=st.integers(1, 20), epoch=st.integers(0, 9))
def test_batches_of_similar_lengths_may_span_two_epochs(n, size, epoch):
    """For any sizes, an epoch is a permutation, and its full batches do not overlap in length."""
    rng = np.random.RandomState(n)
    data = SimpleNamespace(lengths=np.zeros((n, 2)), seed=0, global_batch=size,
                           read_lengths=rng.randint(1, 100, (n, 2)))
    order = PairBin.epoch_order(data, epoch)
    assert sorted(order) == list(range(n))
    first = -epoch * n % size  # this many pairs complete the last batch of the previous epoch
    batches = [data.read_lengths[order[i:i + size], 0] for i in range(first, n - size + 1, size)]
    spans = sorted((batch.min(), batch.max()) for batch in batches)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_a_global_batch_is_the_same_however_it_is_split(tmp_path):
    """1 x 8, 8 x 1 and 2 x 4 read the same pairs in the same order and count the same targets."""
    write_pairs(tmp_path)
    data = open_dataset(tmp_path / "train.bin", CONFIG, global_batch=8)
    for step in (0, 3, 7):
        whole = rows(*data.batch(8 * step, 8))
        for size in (1, 4):
            parts = [rows(*data.batch(n, size)) for n in range(8 * step, 8 * step + 8, size)]
            assert [row for part in parts for row in part] == whole
        assert data.count_targets(8 * step, 8) == sum(len(target) for _, target in whole)


def test_batches_have_few_lengths_and_little_padding(tmp_path):
    assert {padded_length(n) for n in range(1, 513)} == {
        *range(1, 17), *range(18, 33, 2), *range(36, 65, 4), *range(72, 129, 8),
        *range(144, 257, 16), *range(288, 513, 32)}
    write_pairs(tmp_path, n=640, longest=(24, 2))
    data = open_dataset(tmp_path / "train.bin", CONFIG, global_batch=16)
    sources = [data.batch(n, 16)[0] for n in range(0, 640, 16)]
    assert float(torch.cat([(x < 0).flatten() for x in sources]).float().mean()) < 0.12


def test_long_texts_are_cut_and_counted_in_a_warning(tmp_path):
    pairs = write_pairs(tmp_path)
    data = PairBin(tmp_path / "train.bin", T5Config(vocab_size=61, source_length=5,
                                                    target_length=4))
    for (source, target), (read, wrote) in zip(pairs, rows(*data.read(list(range(40))))):
        assert read == tuple(source if len(source) <= 5 else [*source[:4], 1])
        assert wrote == tuple(target[:4])  # a target that is cut has no end token
    long = [sum(len(pair[i]) > most for pair in pairs) for i, most in ((0, 5), (1, 4))]
    assert [line.split(" are longer")[0] for line in data.warnings(1)] == [
        f"{long[0]} of 40 sources", f"{long[1]} of 40 targets"]
    assert "source_length=5" in data.warnings(1)[0]
    whole = PairBin(tmp_path / "train.bin", CONFIG)
    assert whole.warnings(1) == []
    assert whole.tokens_per_sample == len(whole) / 40
    largest = whole.largest(CONFIG)
    assert (largest.source_length, largest.target_length) == (24, 9 + 1) or (
        largest.source_length <= 24 and largest.target_length <= 10)


def test_evaluation_reads_all_or_evenly_spaced_pairs_the_longest_first(tmp_path):
    write_pairs(tmp_path)
    data = open_dataset(tmp_path / "train.bin", CONFIG, seed=9, global_batch=3)
    assert sorted(data.windows()) == sorted(data.windows(40)) == list(range(40))
    assert sorted(data.windows(4)) == [0, 13, 26, 39]
    lengths = [int(data.lengths[i, 0]) for i in data.windows()]
    assert lengths == sorted(lengths, reverse=True)
    assert data.windows(1) == [0]


def spoil_ids(folder):
    tokens = np.fromfile(folder / "train.bin", "<u2")
    tokens[7] = 61
    tokens.tofile(folder / "train.bin")


def test_bad_files_are_refused(tmp_path):
    def refused(spoil, *parts):
        write_pairs(tmp_path)
        spoil(tmp_path)
        with pytest.raises(UserError) as error:
            open_dataset(tmp_path / "train.bin", CONFIG)
        assert all(part in str(error.value) for part in parts)

    lengths = tmp_path / "train.pairs.bin"
    refused(spoil_ids, "token 7 is 61", "vocabulary of 61")
    refused(lambda folder: lengths.write_bytes(lengths.read_bytes()[:-8]), "from different runs")
    refused(lambda folder: lengths.write_bytes(b"\0" * 7), "from different runs")
    refused(lambda folder: lengths.unlink(), "plain text", "data/pairs/prepare.py")
    write_pairs(tmp_path)
    with pytest.raises(UserError, match=r"holds pairs .* T5.* data/jsonl/prepare.py"):
        open_dataset(tmp_path / "train.bin", GPTConfig(block_size=4, vocab_size=61))


# -----------------------------------------------------------------------------
# data/pairs/prepare.py

@pytest.fixture
def prepare(tmp_path):
    """prepare(content, *argv) runs the script on a file with that content; returns its out_dir."""
    save_tokenizer(tmp_path / "t5", "unigram")
    main = runpy.run_path(str(REPO / "data" / "pairs" / "prepare.py"))["main"]

    def run(content, *argv, name="pairs.csv"):
        (tmp_path / name).write_text(content, encoding="utf-8")
        main([f"--input={tmp_path / name}", f"--tokenizer={tmp_path / 't5'}",
              f"--out_dir={tmp_path / 'data'}", *argv])
        return tmp_path / "data"
    return run


CSV = "source_text,target_text\n" + "".join(
    f'"Line {"abcdefghij"[i % 10] * (1 + i // 10)}",{"good" if i % 2 else "bad"}\n'
    for i in range(40))


def test_a_csv_becomes_pairs(prepare, capsys):
    folder = prepare(CSV, "--prefix=Line: ", "--test_fraction=0.1")
    out = capsys.readouterr().out
    assert "pairs: 32 train, 4 val, 4 test" in out and "config/finetune_t5.py" in out
    tokenizer = tokenizer_of_dataset(folder)
    data = open_dataset(folder / "train.bin", T5Config(vocab_size=tokenizer.n_vocab))
    for source, target in rows(*data.read(list(range(32)))):
        assert source[-1] == target[-1] == tokenizer.eot
        assert tokenizer.decode(source[:-1]).startswith("Line: Line ")
    test = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    assert len(test) == 4 and test[0]["prompt"].startswith("Line: Line ")


def test_jsonl_and_other_names_of_columns_are_read(prepare):
    lines = [json.dumps({"prompt": f"Line {c}", "completion": c * 2}) for c in "abcdefgh"]
    folder = prepare("\n".join(lines), name="pairs.jsonl")
    assert len(np.fromfile(folder / "train.pairs.bin", "<u4")) == 2 * 7
    prepare(CSV.replace("source_text,target_text", "in,out"), "--prompt_column=in",
            "--completion_column=out")
    assert not (folder / "test.jsonl").exists()


def test_unknown_characters_and_long_texts_are_counted(prepare, capsys):
    prepare(CSV + '"{x}",bad\n', "--source_length=4")
    out = capsys.readouterr().out
    assert "sources are longer than --source_length=4" in out
    assert "tokens are <unk>, for characters that the vocabulary lacks" in out
    assert "GPT-2" not in out


@pytest.mark.parametrize("content, message", [
    ("a,b\n1,2\n", "line 2: must have the columns source_text and target_text"),
    ('source_text,target_text\nx,""\n', "line 2: its target_text is empty"),
    ('source_text,target_text\n" ",x\n', "line 2: its source_text is empty"),
    ("source_text,target_text\nx,a</s>b\n", "line 2: its target_text holds </s>"),
    ("source_text,target_text\n", "is empty; it must have one pair per line"),
])
def test_a_bad_row_is_refused_with_its_line(prepare, content, message):
    with pytest.raises(UserError, match=message) as error:
        prepare(content)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_an_end_token_is_refused(prepare, tmp_path):
    (tmp_path / "words").mkdir()
    from tokenizers import Tokenizer, models
    Tokenizer(models.WordLevel({"Line": 0, "x": 1}, "x")).save(
        str(tmp_path / "words" / "tokenizer.json"))
    with pytest.raises(UserError, match="has no end token"):
        prepare(CSV, f"--tokenizer={tmp_path / 'words'}")
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        prepare(CSV, f"--tokenizer={tmp_path}")


def test_tweets_can_be_prepared_as_pairs(tmp_path, capsys):
    """The tweets and the split are those of the GPT's data; the prompts have T5's form."""
    save_tokenizer(tmp_path / "t5", "unigram")
    main = runpy.run_path(str(REPO / "data" / "twitter_sentiment" / "prepare.py"))["main"]
    (tmp_path / "tweets.csv").write_text("".join(
        f'"{4 * (i % 2)}","{i}","date","query","user","a tweet {i}"\n' for i in range(80)))
    examples = []
    for name, more in (("gpt", []), ("pairs", ["--pairs"])):
        main([f"--input={tmp_path / 'tweets.csv'}", f"--tokenizer={tmp_path / 't5'}",
              f"--out_dir={tmp_path / name}", *more])
        rows = map(json.loads, (tmp_path / name / "test.jsonl").read_text().splitlines())
        examples.append([(row["prompt"], row["completion"]) for row in rows])
    assert "config/finetune_t5_sentiment.py" in capsys.readouterr().out
    assert examples[1] == [
        ("sst2 sentence: " + prompt.split(": ")[1].split("\n")[0], answer.strip())
        for prompt, answer in examples[0]]
    assert (tmp_path / "pairs" / "train.pairs.bin").stat().st_size == 8 * 72
