"""Prompts and completions: read from CSV or JSONL, masked, and used in the loss of train.py."""
import importlib.util
import itertools
import json
import re
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_gpt
from tiny import losses, run_train
from torch.nn import functional as F

import train
from nanotune.errors import UserError
from nanotune.formats import checkpoint
from nanotune.text.loader import TokenBin
from nanotune.text.tokenizer import tokenizer_of_dataset

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "data"))
import fetch  # noqa: E402


def script(path):
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_")[:-3], REPO / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(name, **fields):
    script(f"data/{name}/prepare.py").main([f"--{k}={v}" for k, v in fields.items()])


@pytest.fixture
def gpt2(gpt2_vocabulary):
    return fetch.choose_tokenizer("gpt2").load()


def tokens(folder, split="train"):
    return np.fromfile(folder / f"{split}.bin", "<u2")


def mask(folder, split="train"):
    return np.fromfile(folder / f"{split}.mask.bin", "u1")


def documents(folder, gpt2, split="train"):
    return gpt2.decode(tokens(folder, split).tolist()).split("<|endoftext|>")[:-1]


# -----------------------------------------------------------------------------
# twitter_sentiment

def tweets_csv(path, rows, encoding="utf-8"):
    """Rows of (target, text) in Sentiment140's six columns."""
    lines = [f'"{target}","{i}","Mon Apr 06 2009","NO_QUERY","user","{text}"\n'
             for i, (target, text) in enumerate(rows)]
    path.write_bytes("".join(lines).encode(encoding))
    return path


@pytest.fixture
def tweets(tmp_path):
    """200 sad and 180 glad tweets, sorted by label as Sentiment140 is, in latin-1."""
    sad = [("0", f"sad caf\u00e9 {i} &amp; rain") for i in range(200)]
    glad = [("4", f"glad {i} @user") for i in range(180)]
    return tweets_csv(tmp_path / "tweets.csv", sad + glad, "latin-1")


def test_tweets_are_split_mixed_and_balanced(gpt2, tweets, tmp_path, capsys):
    out = tmp_path / "out"
    prepare("twitter_sentiment", input=tweets, out_dir=out, samples=300, test_fraction=0.1)
    test = [json.loads(line) for line in (out / "test.jsonl").open(encoding="utf-8")]
    train, val = documents(out, gpt2), documents(out, gpt2, "val")
    assert (len(train), len(val), len(test)) == (256, 14, 30)
    assert "300 tweets drawn, 150 of each label\n" in capsys.readouterr().out
    texts = train + val + [row["prompt"] + row["completion"] for row in test]
    assert len(set(texts)) == 300
    for part in (train, val, texts[270:]):
        assert sum(text.endswith("\nSentiment: negative") for text in part) == len(part) / 2
    for text in texts:
        sad = "Tweet: sad caf\u00e9" in text and "& rain\nSentiment: negative" in text
        assert sad or ("Tweet: glad" in text and "@user\nSentiment: positive" in text)
    assert {row["completion"] for row in test} == {" positive", " negative"}
    # the labels must be mixed; otherwise a window would contain only one of them
    labels = [text.endswith("positive") for text in train]
    assert 90 < sum(a != b for a, b in itertools.pairwise(labels)) < 170


def test_only_the_answers_count_in_the_loss(gpt2, tweets, tmp_path):
    prepare("twitter_sentiment", input=tweets, out_dir=tmp_path / "out")
    for split in ("train", "val"):
        ids, counts = tokens(tmp_path / "out", split), mask(tmp_path / "out", split)
        answer = {gpt2.encode(" positive")[0], gpt2.encode(" negative")[0], 50256}
        assert set(ids[counts == 1].tolist()) == answer
        assert set(counts.tolist()) == {0, 1}
        ends = np.flatnonzero(ids == 50256)
        assert counts.sum() == 2 * len(ends) and counts[ends].all() and counts[ends - 1].all()
    prepare("twitter_sentiment", input=tweets, out_dir=tmp_path / "out", loss_on="all")
    assert not list((tmp_path / "out").glob("*.mask.bin"))  # the old masks are deleted


def test_the_seed_decides_the_split(gpt2, tweets, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare("twitter_sentiment", input=tweets, out_dir=tmp_path / name, seed=seed)
    for file in ("train.bin", "train.mask.bin", "val.bin", "test.jsonl"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b
        assert a != c or "mask" in file


def test_rows_that_are_left_out_are_counted(gpt2, tmp_path, capsys):
    """Rows that differ only in spaces are repeats. Neutral rows and empty ones are left out."""
    rows = [("0", f"sad {i % 40}  x") for i in range(60)] + [("4", f"glad {i}") for i in range(50)]
    rows += [("0", "sad 3 x "), ("4", "sad 5 x"), ("2", "neutral"), ("", "no label"), ("4", " ")]
    path = tweets_csv(tmp_path / "t.csv", rows)
    prepare("twitter_sentiment", input=path, out_dir=tmp_path / "out")
    out = capsys.readouterr().out
    assert "115 rows; left out: 3 without a label or text, 22 duplicates" in out
    assert ("80 tweets drawn, 40 of each label, fewer than --samples=10000: only 40 distinct "
            "tweets are negative") in out
    texts = documents(tmp_path / "out", gpt2) + documents(tmp_path / "out", gpt2, "val")
    texts += [json.loads(line)["prompt"] for line in (tmp_path / "out/test.jsonl").open()]
    assert len(texts) == 80 == len({text.partition("\n")[0] for text in texts})


def test_tweets_are_read_from_sentiment140s_zip(gpt2, tweets, tmp_path):
    module = script("data/twitter_sentiment/prepare.py")
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.write(tweets, module.MEMBER)
    tokenizer = fetch.choose_tokenizer("gpt2")
    assert module.read_tweets(tmp_path / "t.zip", tokenizer) == (
        module.read_tweets(tweets, tokenizer))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.write(tweets, "x.csv")
    with pytest.raises(UserError, match=r"other.zip does not contain training.1600000"):
        module.read_tweets(tmp_path / "other.zip", tokenizer)


GOOD = '"0","1","date","q","user","sad"\n"4","2","date","q","user","glad"\n'


@pytest.mark.parametrize("content, message", [
    ("", r"t.csv is empty"),
    (GOOD + '"0","1","sad"\n', r"t.csv, line 3: 3 columns, but Sentiment140 has 6"),
    ("target,ids,date,flag,user,text\n" + GOOD, r"t.csv, line 1: the target, .* is 'target'"),
    (GOOD + '"0","1","date","q","user","sad\n"4","2","date","q","user","glad"\n',
     r"t.csv, line 4: "),
    (GOOD.splitlines()[0], r"no tweet is positive, and both labels are needed"),
    (GOOD, r"1 tweets per label leave a split empty"),
])
def test_a_bad_csv_is_refused(gpt2, content, message, tmp_path):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        prepare("twitter_sentiment", input=tmp_path / "t.csv", out_dir=tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_too_few_samples_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--samples=-5: must be at least 6, one per label"):
        prepare("twitter_sentiment", input=tmp_path / "t.csv", out_dir=tmp_path, samples=-5)


def test_the_real_tweets_have_the_known_counts(gpt2, shared, tmp_path, capsys):
    path = shared("data/sentiment140/tweets.csv")
    prepare("twitter_sentiment", input=path, out_dir=tmp_path)
    assert "9,924 tweets drawn, 4,962 of each label, fewer than" in capsys.readouterr().out
    assert tokens(tmp_path).max() == 50256 and (mask(tmp_path).sum() == 2 * 8956)


# -----------------------------------------------------------------------------
# jsonl

PAIRS = [{"prompt": f"Question {i}:", "completion": f" answer {i}"} for i in range(60)]


def write_lines(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n"
                            for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("loss_on", ["all", "completion"])
def test_prompts_and_completions_are_read_from_jsonl_and_csv(gpt2, kind, loss_on, tmp_path, capsys):
    path = tmp_path / f"f.{kind}"
    if kind == "jsonl":
        write_lines(path, [*PAIRS, "", PAIRS[3]])
    else:
        rows = [f'"{p["completion"]}",x,"{p["prompt"]}"' for p in [*PAIRS, PAIRS[3]]]
        write_lines(path, ["Completion,other, prompt", *rows])
    prepare("jsonl", input=path, out_dir=tmp_path / "out", loss_on=loss_on, test_fraction=0.1)
    out = capsys.readouterr().out
    assert "1 duplicate examples" in out and "48 train, 6 val, 6 test" in out
    texts = documents(tmp_path / "out", gpt2) + documents(tmp_path / "out", gpt2, "val")
    test = [json.loads(line) for line in (tmp_path / "out/test.jsonl").open()]
    texts += [row["prompt"] + row["completion"] for row in test]
    assert sorted(texts) == sorted(p["prompt"] + p["completion"] for p in PAIRS)
    if loss_on == "all":
        assert not (tmp_path / "out/train.mask.bin").exists()
        return
    learnt = tokens(tmp_path / "out")[mask(tmp_path / "out") == 1].tolist()
    expected = [text.partition(":")[2] for text in documents(tmp_path / "out", gpt2)]
    assert gpt2.decode(learnt).split("<|endoftext|>")[:-1] == expected


def test_texts_are_read_from_jsonl_and_from_a_single_csv_column(gpt2, tmp_path, capsys):
    write_lines(tmp_path / "t.jsonl", [{"text": f"Text {i}\nof two lines"} for i in range(40)])
    prepare("jsonl", input=tmp_path / "t.jsonl", out_dir=tmp_path / "a")
    write_lines(tmp_path / "t.csv", ["tweets", *(f'"Text {i}\nof two lines"' for i in range(40))])
    prepare("jsonl", input=tmp_path / "t.csv", out_dir=tmp_path / "b")
    assert "the first row, 'tweets', is used as the name" in capsys.readouterr().out
    assert tokens(tmp_path / "a").tolist() == tokens(tmp_path / "b").tolist()
    assert len(documents(tmp_path / "a", gpt2)) == 36
    with pytest.raises(UserError, match=r"texts without prompts.*--loss_on=all"):
        prepare("jsonl", input=tmp_path / "t.jsonl", out_dir=tmp_path / "a", loss_on="completion")


def test_all_tokens_of_a_text_among_pairs_count(gpt2, tmp_path):
    write_lines(tmp_path / "f.jsonl", [{"text": f"Text {i}"} for i in range(30)] + PAIRS[:30])
    prepare("jsonl", input=tmp_path / "f.jsonl", out_dir=tmp_path, loss_on="completion")
    learnt = gpt2.decode(tokens(tmp_path)[mask(tmp_path) == 1].tolist())
    assert "Text" in learnt and "answer" in learnt and "Question" not in learnt


def test_a_space_between_prompt_and_completion_is_reported(gpt2, tmp_path, capsys):
    pairs = [{"prompt": "Question: ", "completion": f"a{i}"} for i in range(40)]
    write_lines(tmp_path / "f.jsonl", [*pairs, {"prompt": "Question:", "completion": "b"}])
    prepare("jsonl", input=tmp_path / "f.jsonl", out_dir=tmp_path)
    assert "40 prompts end in a space and 1 completions begin" in capsys.readouterr().out


def test_long_examples_are_reported_and_kept(gpt2, tmp_path, capsys):
    long = [{"prompt": f"Q{i}:", "completion": " word" * 60} for i in range(3)]
    write_lines(tmp_path / "f.jsonl", [*PAIRS, *long])
    prepare("jsonl", input=tmp_path / "f.jsonl", out_dir=tmp_path, loss_on="completion",
            block_size=50)
    out = capsys.readouterr().out
    assert "3 of 63 examples are longer than --block_size=50: they are kept" in out
    texts = documents(tmp_path, gpt2) + documents(tmp_path, gpt2, "val")
    assert sum(text.count(" word") == 60 for text in texts) == 3
    # train.py counts the examples that are longer than its block_size
    data = TokenBin(tmp_path / "train.bin", 50, 50257)
    longer = sum(len(gpt2.encode(text)) + 1 > 50 for text in documents(tmp_path, gpt2))
    assert data.count_long(50256) == (longer, len(documents(tmp_path, gpt2)))


@pytest.mark.parametrize("name, content", [
    ("f.jsonl", '{"source_text": "Q%d", "target_text": " A"}'),
    ("f.jsonl", '{"question": "Q%d", "answer": " A", "id": [1]}'),
    ("f.tsv", "prompt\tcompletion\nQ%d\t A"), ("f.csv", "Completion;Prompt\n A;Q%d"),
    ("f.csv", 'id,question,answer\n1,"Q%d", A'),
    ("f.csv", "prompt\tcompletion\nQ%d\t A"),
])
def test_common_column_names_and_separators_are_recognised(gpt2, name, content, tmp_path, capsys):
    header, _, row = content.rpartition("\n")
    write_lines(tmp_path / name, filter(None, [header, *(row % i for i in range(40))]))
    prepare("jsonl", input=tmp_path / name, out_dir=tmp_path, loss_on="completion")
    texts = documents(tmp_path, gpt2) + documents(tmp_path, gpt2, "val")
    assert sorted(texts) == sorted(f"Q{i} A" for i in range(40))
    assert set(gpt2.decode(tokens(tmp_path)[mask(tmp_path) == 1]).split("<|endoftext|>")) == {
        " A", ""}
    reported = "separated by" in capsys.readouterr().out
    assert reported == (name == "f.csv" and "," not in content)


def test_alpacas_columns_get_alpacas_prompt(gpt2, tmp_path):
    lines = [{"instruction": f"Add {i}.", "input": "2" if i % 2 else "", "output": str(i)}
             for i in range(40)]
    write_lines(tmp_path / "f.jsonl", lines)
    prepare("jsonl", input=tmp_path / "f.jsonl", out_dir=tmp_path, loss_on="completion")
    for text in documents(tmp_path, gpt2):
        number = int(text.rpartition("\n")[2])
        middle = "\n\n### Input:\n2" if number % 2 else ""
        assert text.endswith(f"### Instruction:\nAdd {number}.{middle}\n\n### Response:\n{number}")
        assert text.startswith("Below is an instruction") and (" paired with an input" in text) == (
            number % 2)
    learnt = gpt2.decode(tokens(tmp_path)[mask(tmp_path) == 1])
    assert set(learnt.split("<|endoftext|>")) <= {"", *map(str, range(40))}


def test_columns_are_chosen_by_name_and_may_have_numbers(gpt2, tmp_path):
    lines = [{"review": f"Film {i}:", "stars": i % 5, "score": 0.5 * i}
             for i in range(40)]
    write_lines(tmp_path / "f.jsonl", lines)
    for column, expected in (("stars", lambda i: str(i % 5)), ("score", lambda i: str(0.5 * i))):
        prepare("jsonl", input=tmp_path / "f.jsonl", out_dir=tmp_path, prompt_column="review",
                completion_column=column)
        texts = documents(tmp_path, gpt2) + documents(tmp_path, gpt2, "val")
        assert sorted(texts) == sorted(f"Film {i}:{expected(i)}" for i in range(40))
    prepare("jsonl", input=tmp_path / "f.jsonl", out_dir=tmp_path, completion_column="review")
    assert "Film 3:" in documents(tmp_path, gpt2) + documents(tmp_path, gpt2, "val")
    with pytest.raises(UserError, match="line 1: must have review and sta; it has review, stars"):
        prepare("jsonl", input=tmp_path / "f.jsonl", out_dir=tmp_path, prompt_column="review",
                completion_column="sta")


def test_a_dataset_is_read_from_the_hub(gpt2, tmp_path, monkeypatch):
    """Uses a stand-in for the datasets package, which may not be installed."""
    def load_dataset(name, split):
        if name != "someone/pairs":
            raise FileNotFoundError(f"{name} is not on the hub")
        return PAIRS

    stub = types.SimpleNamespace(
        load_dataset=load_dataset,
        exceptions=types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {})))
    monkeypatch.setitem(sys.modules, "datasets", stub)
    prepare("jsonl", hub="someone/pairs", out_dir=tmp_path)
    assert len(documents(tmp_path, gpt2)) == 54
    with pytest.raises(UserError, match="datasets cannot load no/such: no/such is not on the hub"):
        prepare("jsonl", hub="no/such", out_dir=tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        prepare("jsonl", hub="someone/pairs", out_dir=tmp_path)


def test_validation_examples_may_be_in_their_own_file(gpt2, tmp_path, capsys):
    write_lines(tmp_path / "f.jsonl", PAIRS)
    write_lines(tmp_path / "val.csv", ["prompt,completion", "Mine:, yes", "Question 3:, answer 3"])
    prepare("jsonl", input=tmp_path / "f.jsonl", val_input=tmp_path / "val.csv", out_dir=tmp_path)
    assert documents(tmp_path, gpt2, "val") == ["Mine: yes", "Question 3: answer 3"]
    assert len(documents(tmp_path, gpt2)) == 59  # no example is in both
    out = capsys.readouterr().out
    assert "next: python train.py config/finetune_task.py" in out
    assert "--separate_documents=True" in out.splitlines()[-1]


def test_the_next_command_separates_documents_only_if_end_of_text_exists(tmp_path, capsys):
    write_lines(tmp_path / "f.jsonl", PAIRS)
    (tmp_path / "chars").mkdir()
    (tmp_path / "chars" / "meta.pkl").write_bytes(
        fetch.CharTokenizer(sorted(set("\n" + "".join(map(str, PAIRS))))).files["meta.pkl"])
    prepare("jsonl", input=tmp_path / "f.jsonl", out_dir=tmp_path, tokenizer=tmp_path / "chars")
    assert "--separate_documents" not in capsys.readouterr().out


def test_end_of_text_in_a_text_separates_documents(gpt2, tmp_path):
    """At the end of an example, end-of-text is dropped, because one is added to each example."""
    lines = [{"prompt": f"Q{i}:", "completion": f" a{i}<|endoftext|>"} for i in range(30)]
    lines += [{"text": f"One {i}<|endoftext|>\nTwo {i}<|endoftext|>"} for i in range(30)]
    write_lines(tmp_path / "f.jsonl", lines)
    prepare("jsonl", input=tmp_path / "f.jsonl", out_dir=tmp_path, test_fraction=0.1)
    texts = documents(tmp_path, gpt2) + documents(tmp_path, gpt2, "val")
    texts += [row["prompt"] + row["completion"] for row in map(
        json.loads, (tmp_path / "test.jsonl").read_text().splitlines())]
    assert sorted(texts) == sorted(text for i in range(30) for text in (
        f"Q{i}: a{i}", f"One {i}", f"Two {i}"))


def test_end_of_text_may_have_another_name(tmp_path, make_dataset):
    from tokenizers import Tokenizer
    folder, _ = make_dataset("json")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<start>", "<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    start, end = tokenizer.token_to_id("<start>"), tokenizer.token_to_id("<end>")
    write_lines(tmp_path / "f.jsonl", [{"text": f"<start>Line {i}:<end>ends<|endoftext|> {i}"}
                                       for i in range(40)])
    (tmp_path / "f.txt").write_text("<start>Line: it ends.<end>" * 40)
    for script_name, source in (("jsonl", "f.jsonl"), ("text", "f.txt")):
        for name in (folder, folder / "tokenizer.json"):
            out = tmp_path / script_name
            prepare(script_name, input=tmp_path / source, out_dir=out, tokenizer=name)
            ids = [*tokens(out), *tokens(out, "val")]
            assert tokens(out)[-1] == tokens(out, "val")[-1] == end
            assert ids.count(start) == 40
            assert ids.count(end) == (80 if script_name == "jsonl" else 40)
            data_tokenizer = tokenizer_of_dataset(out)
            assert data_tokenizer.eot == end


@pytest.mark.parametrize("fields, message", [
    ({"prompt": "a<|endoftext|>b", "completion": "c"}, r"line 2: its prompt holds <\|endoftext"),
    ({"prompt": "a<|endoftext|>", "completion": "c"}, r"line 2: its prompt holds <\|endoftext"),
    ({"prompt": "a", "completion": "c<|endoftext|>d"}, "line 2: its completion holds"),
    ({"prompt": "a", "completion": "<|endoftext|>"}, "line 2: its completion is empty"),
    ({"text": "<|endoftext|><|endoftext|>"}, "line 2: its text is empty"),
])
def test_end_of_text_inside_a_prompt_or_completion_is_refused(fields, message, tmp_path):
    write_lines(tmp_path / "f.jsonl", [{"text": "fine"}, fields])
    with pytest.raises(UserError, match=message):
        prepare("jsonl", input=tmp_path / "f.jsonl", out_dir=tmp_path / "out")


def test_a_tweet_with_end_of_text_is_refused(tmp_path):
    path = tweets_csv(tmp_path / "t.csv", [("0", "sad"), ("4", "glad <|endoftext|> x")])
    with pytest.raises(UserError, match=r"t.csv, line 2: its tweet holds <\|endoftext\|>"):
        prepare("twitter_sentiment", input=path, out_dir=tmp_path / "out")


def test_examples_may_be_encoded_with_a_tokenizer_json(make_dataset, tmp_path):
    folder, tokenizer = make_dataset("json")
    write_lines(tmp_path / "f.jsonl", PAIRS)
    prepare("jsonl", input=tmp_path / "f.jsonl", out_dir=tmp_path / "out", loss_on="completion",
            tokenizer=folder / "tokenizer.json")
    ids = tokens(tmp_path / "out").tolist()
    assert (tmp_path / "out/tokenizer.json").is_file()
    assert tokenizer.decode(ids).count("<|endoftext|>") == 54
    # the prompt has the same ids as when it is encoded alone
    first = tokenizer.decode(ids[:ids.index(tokenizer.eot)])
    prompt = first[:first.index(":") + 1]
    assert ids[:len(tokenizer.encode(prompt))] == tokenizer.encode(prompt)


@pytest.mark.parametrize("name, content, message", [
    ("f.jsonl", "", r"f.jsonl is empty; it must have one example per line"),
    ("f.jsonl", '{"text": "a"}\n{"text": "b"\n', r"f.jsonl, line 2: malformed JSON \(.*column 13"),
    ("f.jsonl", '{"text": "a"}\n\n[1]\n', r"f.jsonl, line 3: must be a JSON object, not \[1\]"),
    ("f.jsonl", '{"prompt": "a"}\n', r"f.jsonl, line 1: must have .*it has prompt"),
    ("f.jsonl", '{"prompt": "a", "completion": null}\n', r"line 1: its completion is null, not a"),
    ("f.jsonl", '{"prompt": "a", "completion": true}\n', r"line 1: its completion is true, not a"),
    ("f.jsonl", '{"prompt": "a", "completion": NaN}\n', r"line 1: its completion is NaN, not a"),
    ("f.jsonl", '{"prompt": ["a"], "completion": "b"}\n', r'line 1: its prompt is \["a"\], not a'),
    ("f.jsonl", '{"instruction": "a", "input": {}, "output": "b"}\n', r"its input is \{\}, not"),
    ("f.jsonl", '{"prompt": "a", "completion": " "}\n', r"line 1: its completion is empty"),
    ("f.jsonl", '{"text": "a"}\n', r"1 examples leave none for training"),
    ("f.csv", "", r"f.csv is empty"),
    ("f.csv", "a,b\nx,y\n", r"f.csv, line 2: must have the columns prompt and .*has a, b"),
    ("f.csv", "prompt,prompt,completion\nx,y,z\n", r"line 1: two columns have the same name"),
    ("f.csv", "prompt,completion\nx,y\nz\n", r"f.csv, line 3: 1 fields, but .* has 2"),
    ("f.csv", 'text\nx\n"y\nz\n', r"f.csv, line 4: malformed CSV"),
    ("f.csv", 'prompt,completion\nx,"y" z\n', r"f.csv, line 2: malformed CSV"),
    ("gone.jsonl", None, r"gone.jsonl: no such file"),
])
def test_bad_examples_are_refused(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        prepare("jsonl", input=tmp_path / name, out_dir=tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_bad_arguments_are_refused(tmp_path):
    for fields, message in (({}, "pass either --input=FILE or --hub="),
                            ({"val_fraction": 1.5}, "--val_fraction=1.5: must be between 0 and 1"),
                            ({"val_fraction": 0}, "--val_fraction=0.0: must be between 0 and 1"),
                            ({"test_fraction": 1}, "--test_fraction=1.0: must be at least 0"),
                            ({"tokenizer": "x.json"}, "--tokenizer=x.json: x.json: no such")):
        with pytest.raises(UserError, match=message):
            prepare("jsonl", **({"input": "f.jsonl"} if fields else {}), **fields)


# -----------------------------------------------------------------------------
# the mask in the loss

def test_the_loss_counts_only_the_unmasked_targets(tmp_path):
    """Loss and gradients equal those of PyTorch's cross entropy on the targets that count."""
    rng = np.random.RandomState(0)
    rng.randint(0, 61, 200).astype("<u2").tofile(tmp_path / "train.bin")
    (rng.rand(200) < 0.2).astype("u1").tofile(tmp_path / "train.mask.bin")
    data, model = TokenBin(tmp_path / "train.bin", 16, 61), tiny_gpt(61)
    x, y = data.batch(0, 4)
    assert 0 < (y >= 0).sum() == data.count_targets(0, 4) < 32
    losses, grads = [], []
    plain = F.cross_entropy(model.logits(x).flatten(0, 1), y.flatten(), reduction="sum",
                            ignore_index=-1)
    for loss in (model(x, y), plain):
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        grads.append([p.grad.clone() for p in model.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(grads[0], grads[1])
    model.zero_grad()
    nothing = model(x, torch.full_like(y, -1))  # no target at all: the loss is 0, not NaN
    nothing.backward()
    assert nothing.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_mask_of_another_length_is_refused(tmp_path):
    np.zeros(100, "<u2").tofile(tmp_path / "val.bin")
    np.zeros(99, "u1").tofile(tmp_path / "val.mask.bin")
    with pytest.raises(UserError, match=r"val.mask.bin has 99 entries for the 100 tokens"):
        TokenBin(tmp_path / "val.bin", 8, 61)


@pytest.mark.parametrize("fields", [{}, dict(attn_scale=1.0, qkv_bias=False, local_window=3)],
                         ids=["gpt2", "neo"])
@torch.no_grad()
def test_separate_documents_do_not_attend_to_each_other(fields):
    """Three documents packed into one row get the same logits as each alone. Without `doc_end` they
    do not. Prompts in a cache are not separated."""
    model = tiny_gpt(61, n_layer=3, **fields)
    documents = [torch.tensor(ids) for ids in ([5, 6, 7, 8, 0], [9, 0], [1, 2, 3, 4, 9, 8, 7])]
    packed = torch.stack([torch.cat(documents), torch.cat(documents[::-1])])
    plain = model.logits(packed)
    model.config = replace(model.config, doc_end=0)
    for row, order in zip(model.logits(packed), (documents, documents[::-1])):
        order = [torch.cat(order[:2]), order[2]] if order[0][-1] != 0 else order
        for logits, document in zip(row.split([len(d) for d in order]), order):
            torch.testing.assert_close(logits, model.logits(document[None])[0])
    apart = (model.logits(packed)[0] - plain[0]).abs()
    assert apart[:5].max() < 1e-5 < 0.1 < apart[5:].max()  # nothing precedes the first document
    cached = model.step(packed, model.new_cache(2))
    torch.testing.assert_close(cached, plain[:, -1])


def test_a_run_reports_how_many_examples_are_too_long(make_dataset, tmp_path, capsys):
    text = "".join(f"Line {i}: what's more{' it ends' * (i % 2 * 9)}<|endoftext|>"
                   for i in range(99))
    folder, _ = make_dataset("json", text=text)
    size = len(np.fromfile(folder / "train.bin", "<u2"))
    run_train(folder, tmp_path / "plain", max_iters=1)
    assert "examples are longer" not in capsys.readouterr().out  # without a mask, windows cut texts
    np.ones(size, "u1").tofile(folder / "train.mask.bin")
    run_train(folder, tmp_path / "masked", max_iters=1)
    found = re.search(r"warning: (\d+) of (\d+) examples are longer than block_size=16: they do ",
                      capsys.readouterr().out)
    assert 40 < int(found[1]) < int(found[2]) == 89


def test_separate_documents_changes_the_loss_and_needs_end_of_text(make_dataset, tmp_path):
    """The option is also stored in the checkpoint."""
    text = "".join(f"Line {i}: what's more<|endoftext|>" for i in range(100))
    folder, tokenizer = make_dataset("json", text=text)
    assert np.fromfile(folder / "train.bin", "<u2").tolist().count(tokenizer.eot) > 50
    for name in ("True", "False"):
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert run_train(folder, tmp_path / name, max_iters=2, eval_interval=1,
                         separate_documents=name) == 0
        assert torch.backends.cuda.cudnn_sdp_enabled() == (name == "False")
    assert losses(tmp_path / "True") != losses(tmp_path / "False")
    model, _ = checkpoint.load_model(str(tmp_path / "True"))
    assert model.config.doc_end == tokenizer.eot
    folder, _ = make_dataset("chars", name="chars")
    with pytest.raises(UserError, match="separate_documents needs end-of-text"):
        train.main([f"--dataset={folder}", f"--out_dir={tmp_path / 'x'}", "--device=cpu",
                    "--separate_documents=True", "--n_layer=1", "--n_head=1", "--n_embd=8",
                    "--block_size=8"])
