"""Perplexity, classification, LAMBADA and ROUGE compared with transformers and plain arithmetic."""
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import greedy_reference, hf_model, tiny_gpt
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import evaluate
from model import GPT
from nanotune.errors import UserError
from nanotune.evaluation import perplexity, tasks
from nanotune.generation.generate import stream
from nanotune.text.loader import TokenBin
from nanotune.training.distributed import World

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
NEO = dict(attn_scale=1.0, qkv_bias=False, local_window=5, n_layer=3)


def make_jsonl(path, lines):
    """Write lines: dicts as JSON, strings unchanged."""
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def ids(n, seed=0, vocab=61):
    return np.random.RandomState(seed).randint(1, vocab, n)


def bin_of(tokens, block_size, vocab_size=61):
    return TokenBin("a text", block_size, vocab_size, tokens=tokens)


def one_byte(ids):
    return len(ids)


def run(*argv):
    evaluate.main([*map(str, argv), "--device=cpu", "--dtype=float32"])


# -----------------------------------------------------------------------------
# perplexity

@given(st.integers(2, 200), st.integers(1, 40), st.data())
def test_each_token_is_a_target_once(n, block_size, data):
    stride = data.draw(st.integers(1, block_size))
    bin = bin_of(np.arange(n), block_size, vocab_size=n)
    x, y = bin.read(bin.windows(stride=stride))
    rows, columns = (y >= 0).nonzero(as_tuple=True)
    assert sorted(y[rows, columns].tolist()) == list(range(1, n))
    assert torch.equal(x[rows, columns] + 1, y[rows, columns])
    later = rows > 0  # except in the first window, each target has at least this much context
    assert not later.any() or int(columns[later].min()) >= block_size - stride


@torch.no_grad()
def strided_loop(theirs, tokens, block_size, stride):
    """-log p of each token but the first, computed with transformers one window at a time."""
    losses, done = [], 0
    for start in range(0, len(tokens) - 1, stride):
        window = torch.from_numpy(tokens[start:start + block_size + 1])
        logits = theirs(window[None, :-1]).logits[0].double()
        fresh = F.cross_entropy(logits, window[1:], reduction="none")[done - start:]
        losses += fresh.tolist()
        done = start + len(window) - 1
        if done == len(tokens) - 1:
            return losses
    raise AssertionError("the loop ends at the last token")


@pytest.mark.parametrize("neo", [False, True])
@pytest.mark.parametrize("stride", [24, 10, 1])
def test_perplexity_equals_that_of_transformers(neo, stride, write_hf):
    theirs, tokens = hf_model(neo=neo), ids(170)
    ours = GPT.from_pretrained(str(write_hf(theirs))).eval()
    expected = strided_loop(theirs, tokens, 24, stride)
    data = bin_of(tokens, 24)
    windows = data.windows(stride=stride)
    r = perplexity.perplexity_of_sums(
        perplexity.perplexity_sums(ours, data, windows, 3, ALONE, one_byte))
    assert r["loss"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert r["tokens"] == 169 and r["windows"] == len(windows)
    assert r["bits_per_byte"] == pytest.approx(np.mean(expected) / math.log(2), abs=1e-4)


def test_windows_are_shared_among_ranks():
    model, data = tiny_gpt(61), bin_of(ids(200), 16)
    whole, *shares = [
        perplexity.perplexity_sums(model, data, data.windows(stride=7), 2, world, one_byte)
        for world in (ALONE, *(World(rank, 3, ALONE.device) for rank in range(3)))]
    np.testing.assert_allclose(np.sum(shares, 0), whole, rtol=1e-6)


def test_the_standard_error_is_that_of_a_jackknife_over_windows():
    """Windows differ in length and loss, so the error is that of a ratio, not of single tokens."""
    rng = np.random.RandomState(0)
    n = rng.randint(20, 30, 400)
    loss = n * rng.normal(3, 0.5, 400)
    sums = [400, n.sum(), loss.sum(), (loss**2).sum(), (loss * n).sum(), (n**2).sum(), 1]
    left_out = (loss.sum() - loss) / (n.sum() - n)
    jackknife = math.sqrt(399 * np.var(left_out))
    error = perplexity.perplexity_of_sums(sums)["standard_error"]
    assert error == pytest.approx(jackknife, rel=0.02)
    assert math.isnan(perplexity.perplexity_of_sums([1, 5, 9, 81, 45, 25, 1])["standard_error"])


def test_masked_targets_do_not_count():
    tokens, mask = ids(60), np.zeros(60, dtype=np.uint8)
    mask[[7, 20, 41]] = 1
    data = bin_of(tokens, 16)
    data.mask = mask
    _, y = data.read(data.windows(stride=5))
    assert sorted(y[y >= 0].tolist()) == sorted(tokens[[7, 20, 41]].tolist())
    with pytest.raises(UserError, match="no target counts"):
        perplexity.perplexity_of_sums([0, 0, 0, 0, 0, 0, 0])


def test_perplexity_of_a_file_per_token_byte_and_word(make_dataset, make_run, tmp_path, capsys):
    """Words are separated by whitespace."""
    _, tokenizer = make_dataset("chars")
    out_dir, model = make_run(tokenizer)
    text = "Line 3: what's more, it ends.\n"
    (tmp_path / "f.txt").write_text(text)
    run(f"--out_dir={out_dir}", f"--input={tmp_path / 'f.txt'}", "--stride=1")
    out = capsys.readouterr().out
    tokens = torch.tensor(tokenizer.encode(text))
    nats = sum(
        F.cross_entropy(model.logits(tokens[None, max(0, t - 16):t])[0, -1], tokens[t]).item()
        for t in range(1, len(tokens)))
    n = len(text) - 1
    assert f"loss {nats / n:.4f} nats per token, perplexity {math.exp(nats / n):.2f}, " in out
    assert f"{nats / n / math.log(2):.4f} bits per byte; {n} tokens counted" in out
    per_word = float(re.search(r"perplexity ([\d.]+) per word; 6 words", out)[1])
    assert per_word == pytest.approx(math.exp(nats / 6), rel=1e-4)
    assert "windows of 16 every 1" in out


def test_the_bytes_of_each_token_add_up_to_those_of_the_text(make_dataset):
    """Also for tokens that are parts of a character. End-of-text has no bytes."""
    text = "na\u00efve \U0001f600 caf\u00e9"
    _, chars = make_dataset("chars", text=text * 9)
    _, json_tokenizer = make_dataset("json", name="json")
    for tokenizer in (chars, json_tokenizer):
        ids = tokenizer.encode(text)
        assert tokenizer.n_bytes(ids) == len(text.encode())
        assert sum(tokenizer.n_bytes([i]) for i in ids) == len(text.encode())
    assert json_tokenizer.n_bytes([json_tokenizer.eot]) == 0


def test_the_bytes_of_gpt2s_tokens_add_up_to_those_of_the_text(gpt2_vocabulary):
    from nanotune.text.tokenizer import GPT2Tokenizer
    tokenizer, text = GPT2Tokenizer(), "na\u00efve \U0001f600"
    ids = tokenizer.encode(text)
    assert sum(tokenizer.n_bytes([i]) for i in [*ids, 50256]) == len(text.encode())


# -----------------------------------------------------------------------------
# batches of prompts

@pytest.mark.parametrize("fields", [{}, NEO], ids=["gpt2", "neo"])
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_batched_answers_equal_those_of_single_prompts(fields, batch_size):
    model = tiny_gpt(61, block_size=24, **fields)
    prompts = [ids(n, seed=n).tolist() for n in [3, 17, 9, 3, 1, 12, 8]]
    alone = []
    for prompt in prompts:
        new = greedy_reference(model, torch.tensor([prompt]), 7)[0, len(prompt):].tolist()
        alone.append(new[:new.index(5)] if 5 in new else new)
    assert tasks.answer(model, prompts, 7, 5, 61, batch_size)[0] == alone
    assert len({tuple(a) for a in alone}) > 3  # the answers differ


@pytest.mark.parametrize("neo", [False, True])
def test_answers_equal_those_of_transformers(neo, write_hf):
    theirs = hf_model(neo=neo)
    ours = GPT.from_pretrained(str(write_hf(theirs))).eval()
    prompts = [ids(n, seed=n).tolist() for n in [3, 14, 9, 2]]
    for prompt, new in zip(prompts, tasks.answer(ours, prompts, 8, None, 61, 4)[0]):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False,
                                   attention_mask=torch.ones(1, len(prompt)), eos_token_id=None,
                                   pad_token_id=0)
        assert prompt + new == expected[0].tolist()


def test_the_window_of_padded_prompts_slides():
    """If the context is full, its start is dropped, padding included, and generation continues."""
    model = tiny_gpt(61, block_size=8)
    prompts = [ids(6).tolist(), ids(2, 1).tolist()]
    new = torch.stack(list(stream(model, prompts, 9, temperature=0)), 1)
    alone = torch.stack(list(stream(model, prompts[:1], 9, temperature=0)), 1)
    assert torch.equal(new[:1], alone) and new.max() < 61


@pytest.mark.parametrize("fields", [{}, NEO], ids=["gpt2", "neo"])
@torch.no_grad()
def test_label_scores_equal_those_of_whole_forward_passes(fields):
    """Also for labels of several tokens, and one label that is the beginning of another."""
    model = tiny_gpt(61, block_size=24, **fields)
    prompts = [ids(n, seed=n).tolist() for n in [3, 17, 9, 1]]

    def plain(prompt, label):
        logp = model.logits(torch.tensor([prompt + label])).log_softmax(-1)[0]
        return sum(logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(label))

    for labels, ends in (([[4], [7, 8, 9]], []), ([[4], [4, 9]], [5])):
        scores = tasks.score_labels(model, prompts, labels, 5, 3)
        expected = [[plain(prompt, label + ends) for label in labels] for prompt in prompts]
        np.testing.assert_allclose(scores, expected, atol=1e-4)


# -----------------------------------------------------------------------------
# classification

def test_a_label_is_recognized_in_an_answer():
    labels = ["negative", "very good"]
    for text, label in ((" negative", "negative"), (" Very Good\nTweet: x", "very good"),
                        ("", None), ("negatively", None), ("not negative", None)):
        assert tasks.parse_label(text, labels) == label


def test_accuracy_and_macro_f1_equal_those_computed_by_hand():
    """With two classes and one answer that is not a label."""
    pytest.importorskip("sklearn")
    truth = ["a", "a", "a", "b", "b", "b"]
    r = tasks.classification_scores(truth, ["a", "a", "b", "b", None, "a"], ["a", "b"])
    assert r["confusion"] == [[2, 1, 0], [1, 1, 1]] and r["no_label"] == 1
    assert r["accuracy"] == 0.5
    f1_a, f1_b = 2 * 2 / (3 + 3), 2 * 1 / (2 + 3)
    assert r["macro_f1"] == pytest.approx((f1_a + f1_b) / 2)


@pytest.fixture
def task(make_dataset, make_run):
    """(dataset with a test.jsonl of three labels, out_dir of a tiny run, its model, tokenizer)."""
    folder, tokenizer = make_dataset("chars")
    out_dir, model = make_run(tokenizer, block_size=20)
    make_jsonl(folder / "test.jsonl", [
        {"prompt": f"Line {i}: {'m' * (i % 7)}", "completion": (" end", " more", " it")[i % 3]}
        for i in range(9)])
    return folder, out_dir, model, tokenizer


def test_classify_prints_scores_and_writes_predictions(task, capsys):
    pytest.importorskip("sklearn")
    folder, out_dir, model, tokenizer = task
    argv = [f"--out_dir={out_dir}", f"--dataset={folder}", "--task=classify"]
    saved = {}
    for method in ("generate", "likelihood"):
        run(*argv, f"--method={method}", "--batch_size=4")
        out = capsys.readouterr().out
        rows = [json.loads(line) for line in (out_dir / "predictions.jsonl").open()]
        right = np.mean([row["predicted"] == row["label"] for row in rows])
        assert f"by {method}: accuracy {right:.2%}, macro F1" in out and "9 prompts" in out
        assert [row["label"] for row in rows] == ["end", "more", "it"] * 3
        assert len(re.findall(r"(?m)^(end|it|more) .*\d$", out)) == 3
        saved[method] = rows
    assert all(row["predicted"] in ("end", "more", "it") for row in saved["likelihood"])
    prompt = torch.tensor([tokenizer.encode(saved["generate"][0]["prompt"])])
    new = list(stream(model, prompt, 6, temperature=0))  # the tokens of " more" and one after it
    assert saved["generate"][0]["answer"] == tokenizer.decode([int(t) for t in new])


def test_predictions_of_another_model_do_not_replace_those_of_the_run(task, tmp_path, capsys):
    pytest.importorskip("sklearn")
    folder, out_dir, _, _ = task
    (tmp_path / "mine").mkdir()
    for argv, name in (([], "predictions.jsonl"), ([f"--init_from={out_dir}"],
                                                   f"predictions-{out_dir.name}.jsonl")):
        out = tmp_path / "mine" if argv else out_dir
        run(f"--out_dir={out}", f"--dataset={folder}", "--task=classify", *argv)
        assert f"; wrote {out / name}\n" in capsys.readouterr().out
        assert (out / name).read_text().count("\n") == 9


def test_classify_takes_many_labels_if_they_repeat(task, capsys):
    """21 labels, twice each; such a table is too wide to print."""
    pytest.importorskip("sklearn")
    folder, out_dir, _, _ = task
    make_jsonl(folder / "test.jsonl", [
        {"prompt": "Line", "completion": f" {i % 21}"} for i in range(42)])
    run(f"--out_dir={out_dir}", f"--dataset={folder}", "--task=classify", "--batch_size=42")
    out = capsys.readouterr().out
    assert "42 prompts" in out and "no table of the 21 labels" in out and "answered" not in out


@pytest.mark.parametrize("lines, message", [
    ([{"prompt": "Line", "completion": " it"}] * 2, r"test.jsonl: every completion is 'it'; .*two"),
    (["{"], r"test.jsonl, line 1: malformed JSON \(.*column 2\)"),
    (["", '{"prompt": 1, "completion": "x"}'], r"line 2: must be a JSON object with prompt and"),
    (["[]"], r"line 1: must be a JSON object"),
    ([], r"test.jsonl is empty"),
    ([{"prompt": "L" * 19, "completion": " it"}, {"prompt": "L", "completion": " end"}],
     r"test.jsonl, line 1: the prompt has 19 tokens; with the longest label it must have 1 to 16"),
    ([{"prompt": "Line", "completion": f" {i}"} for i in range(21)],
     r"test.jsonl: 21 of 21 completions differ: these look like free answers, .*--task=generate"),
])
def test_bad_test_files_are_refused(lines, message, task):
    pytest.importorskip("sklearn")
    folder, out_dir, _, _ = task
    make_jsonl(folder / "test.jsonl", lines)
    with pytest.raises(UserError, match=message):
        run(f"--out_dir={out_dir}", f"--dataset={folder}", "--task=classify")
    assert not (out_dir / "predictions.jsonl").exists()


def test_a_missing_test_file_or_another_tokenizer_is_refused(task, make_dataset):
    pytest.importorskip("sklearn")
    folder, out_dir, _, _ = task
    (folder / "test.jsonl").unlink()
    with pytest.raises(UserError, match=r"jsonl does not exist: --task=classify needs held-out "
                                         r"prompts .*--test_fraction=0.05; for plain text"):
        run(f"--out_dir={out_dir}", f"--dataset={folder}", "--task=classify")
    other, _ = make_dataset("json", name="other")
    make_jsonl(other / "test.jsonl", [{"prompt": "a", "completion": c} for c in "bc"])
    with pytest.raises(UserError, match=r"was made with a tokenizer.json"):
        run(f"--out_dir={out_dir}", f"--dataset={other}", "--task=classify")


@pytest.mark.parametrize("argv, message", [
    (["--task=bleu"],
     "--task=bleu is not supported; use perplexity, classify, generate or lambada"),
    (["--task=classify", "--method=beam"],
     "--method=beam is not supported; use generate or likelihood"),
    (["--task=lambada"], "--task=lambada needs --input=FILE"),
    (["--detokenize=True"], "--detokenize needs a text file"),
    (["--input=gone.txt"], "--input=gone.txt: no such file"),
    (["--stride=0"], "--stride=0 must be at least 1"),
    (["--stride=21"], "--stride=21 would skip tokens: windows have 20 tokens"),
    (["--stride=2", "--eval_iters=1"], "leave --input and --stride out"),
])
def test_bad_options_are_refused(argv, message, task):
    folder, out_dir, _, _ = task
    with pytest.raises(UserError, match=message) as error:
        run(f"--out_dir={out_dir}", f"--dataset={folder}", *argv)
    assert "\n" not in str(error.value)


def test_without_scikit_learn_the_command_to_install_it_is_printed(task, monkeypatch):
    folder, out_dir, _, _ = task
    monkeypatch.setitem(__import__("sys").modules, "sklearn.metrics", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        run(f"--out_dir={out_dir}", f"--dataset={folder}", "--task=classify")


# -----------------------------------------------------------------------------
# LAMBADA

@torch.no_grad()
def test_lambada_scores_equal_those_of_single_forward_passes():
    """Without batches, one word at a time."""
    model = tiny_gpt(61, block_size=24)
    rng = np.random.RandomState(3)
    pairs = [(rng.randint(0, 61, n).tolist(), rng.randint(0, 61, m).tolist())
             for n, m in [(5, 1), (9, 2), (20, 4), (1, 1)]]
    best = [model.logits(torch.tensor([context]))[0, -1].topk(2).indices.tolist()
            for context, _ in pairs]
    stop = [best[0][0], best[1][0]]
    # the most probable token, and the second most probable
    pairs += [(context, [token]) for (context, _), two in zip(pairs, best) for token in two]
    losses, hits, filtered = tasks.lambada(model, pairs, stop, 3, "cpu")
    for i, (context, word) in enumerate(pairs):
        logits = model.logits(torch.tensor([context + word]))[0, len(context) - 1:-1]
        assert losses[i] == pytest.approx(F.cross_entropy(
            logits, torch.tensor(word), reduction="sum").item(), abs=1e-4)
        assert bool(hits[i]) == (logits.argmax(-1).tolist() == word)
        logits[0, stop] = -math.inf
        assert bool(filtered[i]) == (logits.argmax(-1).tolist() == word)
    assert hits.any() and filtered.any() and not torch.equal(hits, filtered)


def test_evaluate_prints_lambada_and_names_a_bad_line(gpt2_vocabulary, shared, tmp_path, capsys):
    """The filter excludes stop words; an error gives the number of the line."""
    from nanotune.text.tokenizer import GPT2Tokenizer
    ids = tasks.stop_word_ids(GPT2Tokenizer())
    assert GPT2Tokenizer().encode(" the")[0] in ids and GPT2Tokenizer().encode(" dog")[0] not in ids
    assert tasks.split_last_word("She fed the dog\n", GPT2Tokenizer())[1] == [3290]
    texts = ["He came up to the house and opened the door",
             "It was the best of times , it was the worst of times"]
    make_jsonl(tmp_path / "l.jsonl", [{"text": text} for text in texts])
    model = shared("models/gutenberg-17m")
    argv = ["--task=lambada", f"--init_from={model}", f"--input={tmp_path / 'l.jsonl'}"]
    run(*argv)
    assert re.search(r"accuracy \d+.00% .*filter \d+.00%; .* 2 texts", capsys.readouterr().out)
    make_jsonl(tmp_path / "l.jsonl", [{"text": "One two"}, {"text": "word "}])
    with pytest.raises(UserError, match=r"l.jsonl, line 2: needs at least two words"):
        run(*argv)
    make_jsonl(tmp_path / "l.jsonl", [{"text": "word " * 600}])
    with pytest.raises(UserError, match=r"line 1: has 600 tokens, the model reads at most 512"):
        run(*argv)


# -----------------------------------------------------------------------------
# WikiText

@pytest.mark.parametrize("tokenised, plain", [
    (" = = Early life = = ", "== Early life =="),
    (" a well @-@ known 9 @,@ 500 km ( 4 @.@ 5 mi ) road ; it 's open .",
     "a well-known 9,500 km (4.5 mi) road; it's open."),
    (' role as " Craig " in " Teddy \'s Story " ,', 'role as "Craig" in "Teddy\'s Story",'),
    (" the ships ' hulls did n't last 2006 \u2013 07 , $ 5 ?",
     "the ships' hulls didn't last 2006\u201307, $5?"),
    (" A <unk> / B \n \n C ", "A <unk> / B\n\nC"),
])
def test_wikitext_is_detokenized(tokenised, plain):
    assert perplexity.detokenize_wikitext(tokenised) == plain


def test_detokenizing_loses_no_word_and_lowers_the_perplexity(gpt2_vocabulary, shared, tmp_path,
                                                              capsys):
    """For a model trained on plain text, the perplexity per word at least halves."""
    text = shared("data/wikitext-2/test.txt").read_text(encoding="utf-8")[:4000]
    letters = re.sub(r"[\s@]", "", text)
    assert re.sub(r"[\s@]", "", perplexity.detokenize_wikitext(text)) == letters
    (tmp_path / "w.txt").write_text(text, encoding="utf-8")
    found = []
    for detokenize in (False, True):
        run(f"--init_from={shared('models/gutenberg-17m')}", f"--input={tmp_path / 'w.txt'}",
            f"--detokenize={detokenize}")
        found.append(float(re.search(r"perplexity ([\d.]+) per word", capsys.readouterr().out)[1]))
    assert found[1] < found[0] / 2


def test_windows_files_give_the_same_results(task, tmp_path, capsys):
    """With a byte order mark and \\r\\n, in a text, in LAMBADA's lines and in test.jsonl."""
    pytest.importorskip("sklearn")
    folder, out_dir, _, _ = task
    plain = [json.dumps({"text": "Line it ends", "prompt": "Line", "completion": c}) + "\n"
             for c in (" it", " ends")]
    found = {}
    for name, mark, end in (("plain", "", "\n"), ("windows", "\ufeff", "\r\n")):
        for file, lines in (("in.txt", ["Line 1:\n", "it ends\n"] * 9), ("in.jsonl", plain),
                            (folder / "test.jsonl", plain)):
            (tmp_path / file).write_bytes((mark + "".join(lines).replace("\n", end)).encode())
        for options in ([f"--input={tmp_path / 'in.txt'}"],
                        ["--task=lambada", f"--input={tmp_path / 'in.jsonl'}"],
                        ["--task=classify", f"--dataset={folder}"]):
            run(f"--out_dir={out_dir}", *options)
        found[name] = re.sub(r"[\d.]+ s, [\d,.]+ prompts per second", "", capsys.readouterr().out)
    assert found["plain"] == found["windows"]


def test_end_of_text_after_an_answer_does_not_count(make_run, make_dataset, capsys):
    """In test.jsonl and in LAMBADA's texts, as in training data."""
    pytest.importorskip("sklearn")
    folder, tokenizer = make_dataset("json")
    out_dir, _ = make_run(tokenizer, block_size=32)
    found = []
    for end in ("", "<|endoftext|>", "<|endoftext|>\n"):
        make_jsonl(folder / "test.jsonl", [
            {"text": f"Line it ends{end}", "prompt": "Line", "completion": c + end}
            for c in (" it", " ends")])
        for options in (["--task=classify", f"--dataset={folder}"],
                        ["--task=lambada", f"--input={folder / 'test.jsonl'}"]):
            run(f"--out_dir={out_dir}", *options)
        found.append(re.sub(r"[\d.]+ s, [\d,.]+ prompts per second", "", capsys.readouterr().out))
    assert found[0] == found[1] == found[2]


def test_a_file_that_is_not_utf8_is_refused(task, tmp_path):
    _, out_dir, _, _ = task
    Path(tmp_path / "l.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match=r"l.txt is not UTF-8: byte 0xe9 at offset 3; .*iconv"):
        run(f"--out_dir={out_dir}", f"--input={tmp_path / 'l.txt'}")


def test_a_long_prompt_does_not_shorten_other_answers():
    """The longest prompt limits only the answers of its own batch."""
    model = tiny_gpt(61)  # block_size 16
    prompts = [[1] * 16, [2, 3]]
    answers, cut = tasks.answer(model, prompts, 9, None, 61, batch_size=1)
    assert [len(ids) for ids in answers] == [1, 9] and cut == [True, True]


def test_rouge_equals_that_computed_by_hand():
    """The stemmer reads cats as cat; each line is a sentence."""
    pytest.importorskip("rouge_score", reason="needs requirements-dev.txt")
    found = tasks.rouge_scores(["the cat sat on the mat\nit slept", "a b c"],
                               ["the cats sat\nit was here", ""])
    # 4 common words of 6 and 8, 2 common bigrams of 5 and 7
    assert found[0] == pytest.approx({"rouge1": 8 / 14, "rouge2": 4 / 12, "rougeLsum": 8 / 14})
    assert found[1] == {"rouge1": 0, "rouge2": 0, "rougeLsum": 0}


@pytest.mark.parametrize("installed", [True, False])
def test_evaluate_prints_rouge_if_it_is_installed(make_dataset, make_run, monkeypatch, capsys,
                                                  installed):
    if installed:
        pytest.importorskip("rouge_score", reason="needs requirements-dev.txt")
    else:
        monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    folder, tokenizer = make_dataset("json")
    (folder / "test.jsonl").write_text("".join(
        json.dumps({"prompt": f"Line {i}", "completion": "it ends"}) + "\n" for i in range(3)))
    out_dir, _ = make_run(tokenizer, block_size=32)
    evaluate.main([f"--out_dir={out_dir}", f"--dataset={folder}", "--task=generate",
                   "--max_new_tokens=5", "--device=cpu", "--dtype=float32"])
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in (out_dir / "predictions.jsonl").read_text().splitlines()]
    expected = {"rouge1", "rouge2", "rougeLsum"}
    assert (expected <= rows[0].keys()) == installed
    if installed:
        mean, error = tasks.mean_and_error([row["rouge2"] for row in rows])
        assert f"ROUGE-2 {mean:.2%} (standard error {error:.2%}), ROUGE-Lsum" in out
    else:
        assert "for ROUGE: pip install rouge-score" in out
