"""The Twitter sentiment experiment, from the CSV to the table, with tiny models."""
from pathlib import Path

import pytest
from conftest import hf_model
from test_examples import script, tweets_csv

import evaluate
import train
from nanotune.errors import UserError

REPO = Path(__file__).resolve().parents[1]
TINY = ("--max_iters=2 --eval_interval=1 --block_size=32 --batch_size=2 --warmup_iters=0 "
        "--device=cpu --dtype=float32 --eval_iters=1")


@pytest.fixture
def experiment(monkeypatch):
    """(module, commands): the scripts run in this process; `commands` lists their names."""
    module, commands = script("experiments/twitter_sentiment.py"), []

    def command(name, *options):
        commands.append(name)
        monkeypatch.chdir(REPO)
        options = [str(option) for option in options]
        if name == "train.py":
            with pytest.raises(SystemExit) as end:
                train.main(options)
            assert not end.value.code
        elif name == "evaluate.py":
            evaluate.main([*options, "--device=cpu", "--dtype=float32"])
        else:
            script(name).main(options)
    monkeypatch.setattr(module, "command", command)
    return module, commands


@pytest.fixture
def arguments(tmp_path, write_hf, gpt2_vocabulary):
    """The arguments for tweets whose label depends on one word, and for a tiny GPT-2 and a tiny
    GPT-Neo with GPT-2's vocabulary."""
    pytest.importorskip("sklearn")
    rows = [("04"[i % 2], f"{('sad', 'glad')[i % 2]} tweet {i}") for i in range(200)]
    path = tweets_csv(tmp_path / "t.csv", rows)
    sizes = dict(vocab_size=50257, bos_token_id=50256, eos_token_id=50256)
    models = [write_hf(hf_model(n_positions=40, n_embd=8, **sizes), name="tiny-gpt2"),
              write_hf(hf_model(neo=True, max_position_embeddings=40, hidden_size=8, **sizes),
                       layout="pytorch_model.bin", name="tiny-neo")]
    return [f"--input={path}", f"--models={models[0]},{models[1]}", "--splits=2",
            f"--out_dir={tmp_path / 'out'}", f"--train={TINY}"]


def test_the_experiment_resumes_where_it_stopped(
        experiment, arguments, tmp_path, monkeypatch, capsys):
    module, commands = experiment
    inner = module.command

    def stop_at(name):
        def command(script, *options):
            if script == name:
                raise SystemExit(130)
            inner(script, *options)
        return command

    monkeypatch.setattr(module, "command", stop_at("evaluate.py"))
    with pytest.raises(SystemExit):
        module.main(arguments)
    assert commands == ["data/twitter_sentiment/prepare.py"] * 2 + ["train.py"]
    monkeypatch.setattr(module, "command", inner)
    module.main(arguments)  # the run that was not evaluated is resumed, not restarted
    assert commands[3:] == ["train.py", "evaluate.py"] * 4
    first = (tmp_path / "out/results.md").read_text()
    assert first.startswith("| macro F1, % | split 0 | split 1 | mean | standard error | "
                            "standard deviation |\n")
    assert [line.split(" | ")[0] for line in first.splitlines()[2:]] == [
        "| TF-IDF + logistic regression", "| tiny-gpt2", "| tiny-neo"]
    # one word decides the label, so TF-IDF is perfect; in two steps a tiny model learns nothing
    assert first.splitlines()[2].endswith("| 100.0 | 100.0 | 100.0 | 0.0 | 0.0 |")
    del commands[:]
    module.main(arguments)
    assert commands == [] and (tmp_path / "out/results.md").read_text() == first
    with pytest.raises(UserError, match=r"has runs with other settings \(--samples was 10000\)"):
        module.main([*arguments, "--samples=50"])
    with pytest.raises(UserError, match=r"--input=gone.csv: no such file"):
        module.main([*arguments, "--input=gone.csv"])
    with pytest.raises(UserError, match=r"cannot be reached for gone/model"):
        module.main([*arguments, "--models=gone/model"])  # before anything is trained
    assert commands == []


def test_a_t5_is_trained_on_pairs(experiment, arguments, t5_folders, tmp_path, capsys):
    """Pairs of the same tweets, encoded with the T5's tokenizer."""
    module, commands = experiment
    options = TINY.replace("--block_size=32 ", "")
    module.main([arguments[0], f"--models={t5_folders[0]}", "--splits=1",
                 f"--out_dir={tmp_path / 'out'}", f"--train={options}"])
    prepare = "data/twitter_sentiment/prepare.py"
    assert commands == [prepare, prepare, "train.py", "evaluate.py"]
    assert "| model |" in (tmp_path / "out/results.md").read_text()
    text, pairs = ((tmp_path / "out" / f"split-0{name}" / "test.jsonl").read_text().splitlines()
                   for name in ("", "-model"))
    assert len(text) == len(pairs) and "sst2 sentence: " in pairs[0]


def test_the_table_has_means_and_errors():
    module = script("experiments/twitter_sentiment.py")
    rows = module.table({"a": [0.70, 0.72, 0.77], "b": [0.5, 0.5, 0.5]}, 500).splitlines()
    assert rows[2] == "| a | 70.0 | 72.0 | 77.0 | 73.0 | 1.1 | 3.6 |"
    assert rows[3] == "| b | 50.0 | 50.0 | 50.0 | 50.0 | 1.3 | 0.0 |"
    assert module.table({"a": [0.8]}, 500).endswith("| a | 80.0 | 80.0 | 1.8 | - |\n")


def test_the_config_file_is_valid_for_train():
    from configurator import configure
    cfg = configure(train.Config, [str(REPO / "config/finetune_twitter_sentiment.py")])
    assert cfg.dataset == "twitter_sentiment" and cfg.init_from == "gpt2"
