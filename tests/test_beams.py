"""Beam search finds the same answers as transformers, in batches, with each model and script."""
import json
from collections import Counter

import pytest
import torch
from conftest import hf_model, hf_t5, tiny_gpt
from tiny import run_script

import evaluate
import sample
from nanotune.evaluation import tasks
from nanotune.formats.checkpoint import load_model
from nanotune.generation.beams import beam_search
from nanotune.generation.fast import Decoder
from nanotune.generation.generate import stream
from t5 import T5Config

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [50, 3], [20, 21, 22]]
END = 1


@pytest.fixture(params=["gpt2", "neo", "t5", "v1.1"])
def both(request, write_hf):
    """(our model, transformers' model with the same weights, an end token that is frequent in the
    answers)."""
    if request.param == "gpt2":
        theirs = hf_model(n_positions=40)
    elif request.param == "neo":
        theirs = hf_model(neo=True, max_position_embeddings=40)
    else:
        theirs = hf_t5(tied=request.param == "t5", feed_forward_proj=(
            "relu" if request.param == "t5" else "gated-gelu"))
    folder = write_hf(theirs, {name: t.clone() for name, t in theirs.state_dict().items()})
    ours = load_model(str(folder))[0].eval()
    counts = Counter(id for ids in beam_search(ours, PROMPTS, 12, 4) for id in set(ids[2:]))
    return ours, theirs, counts.most_common(1)[0][0]


def their_beams(model, prompt, new, end, **options):
    """transformers' answer to a prompt, as ids that include the end token."""
    pairs = model.config.is_encoder_decoder
    ids = torch.tensor([[*prompt, END] if pairs else prompt])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                           do_sample=False, eos_token_id=end, pad_token_id=0, **options)[0]
    found = found[1 if pairs else len(prompt):].tolist()
    return found[:found.index(end) + 1] if end in found else found


@pytest.mark.parametrize("options", [
    dict(num_beams=4), dict(num_beams=2, length_penalty=0.0),
    dict(num_beams=5, length_penalty=2.5), dict(num_beams=3, length_penalty=-1.0)])
def test_answers_equal_those_of_transformers(both, options):
    ours, theirs, end = both
    found = beam_search(ours, PROMPTS, 12, stop_token=end, **options)
    assert found == [their_beams(theirs, prompt, 12, end, **options) for prompt in PROMPTS]


def test_some_answers_end_early_and_some_differ_from_greedy_ones(both):
    """Otherwise the test above would prove little."""
    ours, _, end = both
    found = [beam_search(ours, [prompt], 12, 4, penalty, end)[0]
             for prompt in PROMPTS for penalty in (0.0, 1.0, 2.5)]
    greedy = [torch.stack(list(stream(ours, [prompt], 12, temperature=0, stop_token=end)), 1)[0]
              for prompt in PROMPTS]
    assert len({len(ids) for ids in found}) > 1 and any(ids[-1] == end for ids in found)
    assert any(ids != row.tolist()[:len(ids)] for ids, row in zip(found[1::3], greedy))


def test_a_search_stops_when_the_best_answers_have_ended(both):
    ours, _, end = both
    steps, whole = [], ours.step
    ours.step = lambda idx, cache: (steps.append(idx), whole(idx, cache))[1]
    counts = []
    for prompt in PROMPTS:
        before = len(steps)
        beam_search(ours, [prompt], 36, 2, 0.0, end)
        counts.append(len(steps) - before)
    assert min(counts) < 20 and max(counts) <= 36


def test_without_an_end_token_answers_are_full_length_with_ids_below_n_vocab(both):
    ours, _, _ = both
    assert [len(ids) for ids in beam_search(ours, PROMPTS, 7, 3)] == [7] * 4
    found = beam_search(ours, PROMPTS, 7, 3, n_vocab=30)
    assert max(max(ids) for ids in found) < 30


def test_a_vocabulary_may_be_smaller_than_the_number_of_beams():
    assert beam_search(tiny_gpt(1), [[0]], 3, 4) == [[0, 0, 0]]
    assert beam_search(tiny_gpt(1), [[0]], 3, 4, stop_token=0) == [[0]]
    assert len(beam_search(tiny_gpt(2), [[0], [1, 0]], 5, 7, stop_token=1)) == 2


def best_by_hand(model, prompt, new):
    """The most likely of all continuations of `new` tokens."""
    beams = [(0.0, [])]
    for _ in range(new):
        rows = [[*prompt, *ids][-model.config.block_size:] for _, ids in beams]
        with torch.no_grad():
            logp = model.logits(torch.tensor(rows))[:, -1].log_softmax(-1)
        beams = [(score + float(logp[i, token]), [*ids, token])
                 for i, (score, ids) in enumerate(beams) for token in range(logp.size(1))]
    return max(beams)[1]


def test_enough_beams_find_the_most_likely_answer():
    model = tiny_gpt(5)
    assert beam_search(model, [[1, 2]], 4, 5 ** 3) == [best_by_hand(model, [1, 2], 4)]


def test_beams_continue_after_the_context_is_full():
    """The window slides as in stream(). Large weights make one token much more likely than
    the others, so the search equals greedy generation."""
    model = tiny_gpt(9)
    with torch.no_grad():
        model.lm_head.weight *= 30
    expected = torch.stack(list(stream(model, PROMPTS[:1], 40, temperature=0)), 1)[0].tolist()
    assert model.config.block_size < 40 and beam_search(model, [[5, 6, 7, 8]], 40, 2)[0] == expected


def test_recorded_steps_give_the_same_answers(monkeypatch):
    """A step is recorded again for another number of rows, and reads the reordered cache."""
    model = tiny_gpt(61, block_size=40)
    recorded = []

    def capture(step):
        recorded.append(step)
        return step
    prompts = [row[:1] for row in PROMPTS] * 2
    assert (beam_search(Decoder(model, capture), prompts, 12, 3, 1.0, END)
            == beam_search(model, prompts, 12, 3, 1.0, END))
    assert len(recorded) == 2  # for one row per prompt, and for all beams


@pytest.mark.parametrize("family", ["gpt", "t5"])
def test_onnx_models_give_the_same_answers(tmp_path, family):
    pytest.importorskip("onnxruntime", reason="needs requirements-export.txt")
    pytest.importorskip("onnx", reason="needs requirements-export.txt")
    from test_onnx_t5 import tiny_t5

    from nanotune.formats import onnx_gpt, onnx_t5
    from nanotune.formats.onnx_model import open_onnx
    if family == "t5":
        model = tiny_t5()
        path = onnx_t5.write_onnx(model, tmp_path)
    else:
        model, path = tiny_gpt(61, n_embd=32, block_size=24), tmp_path / "model.onnx"
        onnx_gpt.write_onnx(model, path)
    found = beam_search(open_onnx(str(path))[0], PROMPTS, 30, 3, 1.0, END)
    assert found == beam_search(model, PROMPTS, 30, 3, 1.0, END)


def test_beams_of_a_t5_share_the_encoders_output(monkeypatch):
    """Reordering the beams does not copy the keys and values of the encoder's output."""
    from t5 import T5, T5Cache
    torch.manual_seed(0)
    model, pointers = T5(T5Config(vocab_size=61, n_layer=1, n_decoder_layer=1, n_head=2, n_embd=16,
                              head_size=8, n_inner=16)).eval(), []
    reorder = T5Cache.reorder

    def watched(cache, rows):
        reorder(cache, rows)
        pointers.append(cache.source_kv[0][0].data_ptr())
    monkeypatch.setattr(T5Cache, "reorder", watched)
    beam_search(model, PROMPTS, 8, 3)
    assert len(pointers) == 8 and len(set(pointers)) == 1


# -----------------------------------------------------------------------------
# in the scripts

@pytest.fixture
def trained(make_dataset, make_run):
    """(a run of a tiny GPT, its dataset with a test.jsonl)."""
    folder, tokenizer = make_dataset("json")
    (folder / "test.jsonl").write_text("".join(
        json.dumps({"prompt": f"Line {i}", "completion": "abc"[i % 3]}) + "\n" for i in range(5)))
    return make_run(tokenizer, block_size=32)[0], folder


def test_sample_prints_the_best_answer(trained, tmp_path, capsys):
    out_dir, _ = trained
    model, tokenizer = load_model(str(out_dir))
    argv = [f"--out_dir={out_dir}", "--num_beams=3", "--length_penalty=0.5",
            "--max_new_tokens=9", "--device=cpu", "--dtype=float32"]
    texts = []
    for line in ("Line 1", "it ends"):
        ids = beam_search(model.eval(), [tokenizer.encode(line)], 9, 3, 0.5, tokenizer.eot)[0]
        texts.append(tokenizer.decode([id for id in ids if id != tokenizer.eot]))
        sample.main([*argv, f"--start={line}"])
        captured = capsys.readouterr()
        assert captured.out == f"{line}{texts[-1]}\n{'-' * 15}\n" and "a second" not in captured.err
    (tmp_path / "prompts.txt").write_text("Line 1\nit ends\n")
    sample.main([*argv, f"--start=LINES:{tmp_path / 'prompts.txt'}"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["samples"] for row in rows] == [[text] for text in texts]
    sample.main([*argv, "--start=Line 1", f"--stop={texts[0][2:4]}"])
    assert capsys.readouterr().out == f"Line 1{texts[0][:2]}\n{'-' * 15}\n"


def test_evaluate_answers_with_beam_search(trained, tmp_path, capsys):
    out_dir, folder = trained
    model, tokenizer = load_model(str(out_dir))
    prompts, _ = tasks.read_targets(folder / "test.jsonl", tokenizer, 32)
    found, cut = tasks.answer(model.eval(), prompts, 6, tokenizer.eot, tokenizer.n_vocab, 2,
                              num_beams=3, length_penalty=0.5)
    common = [f"--out_dir={out_dir}", f"--dataset={folder}", "--num_beams=3",
              "--length_penalty=0.5", "--max_new_tokens=6", "--device=cpu", "--dtype=float32"]
    evaluate.main([*common, "--task=generate"])
    rows = [json.loads(line) for line in (out_dir / "predictions.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == list(map(tokenizer.decode, found))
    assert [row["cut"] for row in rows] == cut
    evaluate.main([*common, "--task=classify"])
    rows = [json.loads(line) for line in (out_dir / "predictions.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == list(map(tokenizer.decode, found))


@pytest.mark.parametrize("module, argv, message", [
    *((sample, ["--num_beams=4", f"--{name}={value}"],
       f"--num_beams and --{name} contradict each other") for name, value in (
        ("temperature", 0.7), ("top_k", 5), ("top_p", 0.5), ("repetition_penalty", 1.2))),
    (sample, ["--num_beams=4", "--num_samples=2"], "one answer per prompt"),
    (sample, ["--num_beams=4", "--chat"], "leave --num_beams out"),
    (sample, ["--num_beams=1"], "--num_beams=1 must be at least 2"),
    (sample, ["--num_beams=2.5"], "--num_beams must be an integer"),
    (sample, ["--length_penalty=2"], "--length_penalty ranks beams: give --num_beams"),
    (sample, ["--num_beams=4", "--length_penalty=99"], "--length_penalty=99"),
    (evaluate, ["--length_penalty=2", "--task=generate"], "give --num_beams"),
    (evaluate, ["--num_beams=4"], "--num_beams is for generated answers"),
    (evaluate, ["--num_beams=4", "--task=lambada", f"--input={__file__}"], "generated answers"),
    (evaluate, ["--num_beams=4", "--task=classify", "--method=likelihood"], "generated answers"),
], ids=lambda value: getattr(value, "__name__", str(value)[:60]))
def test_options_that_contradict_beams_are_refused(monkeypatch, capsys, module, argv, message):
    status, _, err = run_script(monkeypatch, capsys, module.main, argv)
    assert status == 1 and message in err and err.count("\n") == 1, err
