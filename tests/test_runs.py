"""runs.py: a table of runs, the options in which they differ, their loss curves."""
import json

import pytest
from tiny import run_train, write_dataset

import runs
from nanotune.errors import UserError
from nanotune.training import settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs out-a (3 steps) and out-b (6 steps), and a dataset, which is not a run."""
    folder = tmp_path_factory.mktemp("runs")
    dataset = write_dataset(folder / "words")
    assert run_train(dataset, folder / "out-a", max_iters=3) == 0
    assert run_train(dataset, folder / "out-b", max_iters=6, learning_rate=5e-3) == 0
    return folder


def test_the_table_lists_runs_and_the_options_in_which_they_differ(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    runs.main([])
    header, a, b, blank, *fields = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["run", "init_from", "dataset", "steps"] and blank == ""
    run_a = runs.read_run(folder / "out-a")
    assert a.split()[:5] == ["out-a", "scratch", str(folder / "words"), "3",
                             str(3 * run_a.tokens_per_step)]
    assert f"{run_a.best[0]:.4f} at {run_a.best[1]}" in a and b.split()[3] == "6"
    differ = {line.split()[0]: line.split()[1:] for line in fields if line and "png" not in line}
    assert differ["learning_rate"] == ["0.01", "0.005"] and differ["max_iters"] == ["3", "6"]
    assert differ.keys() == {"field", "learning_rate", "max_iters"}
    assert (folder / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_shows_the_sizes_of_its_pretrained_model_and_no_unused_field(folder, tmp_path):
    """The fields n_layer, n_head and n_embd of a run from a pretrained model have no effect."""
    fields = dict(max_iters=1, init_from=folder / "out-a", n_layer=7, n_embd=7, block_size=None,
                  decay_lr=False, warmup_iters=5)
    assert run_train(folder / "words", tmp_path / "out", **fields) == 0
    expected = {name: runs.read_run(folder / "out-a").config[name] for name in settings.SIZES}
    found = runs.read_run(tmp_path / "out").config
    assert {name: found[name] for name in settings.SIZES} == expected
    assert expected["n_layer"] == 2 and expected["block_size"] == 16
    assert "warmup_iters" not in found and "min_lr" not in found
    written = json.loads((tmp_path / "out" / "settings.json").read_text())["settings"]
    values = {name: value for section in written.values() for name, value in section.items()}
    assert {name: values[name] for name in settings.SIZES} == expected
    resumed = dict(n_layer=7, init_from="resume", max_iters=2)  # the same command line
    assert run_train(folder / "words", tmp_path / "out", **fields | resumed) == 0


def test_one_run_has_no_comparison_and_the_picture_can_be_named(folder, tmp_path, capsys):
    runs.main([str(folder / "out-b"), f"--picture={tmp_path / 'b.png'}"])
    assert "field" not in capsys.readouterr().out and (tmp_path / "b.png").is_file()


def test_folders_without_a_run_are_refused(folder, tmp_path, monkeypatch):
    for path in (folder / "words", tmp_path / "none"):
        with pytest.raises(UserError, match=r"is not a run: it has no readable ckpt\.pt"):
            runs.main([str(path)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run in the current folder"):
        runs.main([])
