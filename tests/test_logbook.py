"""Training output: printed lines, the progress bar, metrics.jsonl, loss.png, wandb."""
import io
import json
import sys

import pytest

from nanotune.errors import UserError
from nanotune.training import logbook
from nanotune.training.logbook import Logbook, draw, kept_entries


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def log(tmp_path):
    return Logbook(str(tmp_path), 0, 10, is_main=True)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_iteration_is_logged_and_prints_nanogpts_line(tmp_path, log, capsys):
    log.iteration(5, 2.34567, 3e-5, 0.1234, 4096, 0.4321, memory=2**20)
    assert capsys.readouterr().out == (
        "iter 5: loss 2.3457, time 123.40ms, tok/s 33,193, mfu 43.21%\n")
    assert lines(tmp_path) == [{"iter": 5, "loss": 2.34567, "lr": 3e-5, "ms": 123.4,
                                "tok_s": 33192.9, "mfu": 0.4321, "memory": 2**20}]


def test_mfu_is_left_out_if_the_peak_is_unknown(tmp_path, log, capsys):
    log.iteration(5, 2.0, 3e-5, 0.5, 100)
    assert capsys.readouterr().out == "iter 5: loss 2.0000, time 500.00ms, tok/s 200\n"
    assert lines(tmp_path)[0]["mfu"] is None


def test_skipped_steps_are_shown(log, capsys):
    log.iteration(5, 2.0, 3e-5, 0.5, 100, skipped=4)
    assert capsys.readouterr().out.endswith("tok/s 200, 4 steps skipped by the scaler\n")


def test_an_evaluation_prints_nanogpts_line_and_draws_loss_png_again(tmp_path, log, capsys):
    log.evaluation(0, 3.23408, 3.21561)
    assert capsys.readouterr().out == "step 0: train loss 3.2341, val loss 3.2156\n"
    assert lines(tmp_path) == [{"step": 0, "train_loss": 3.23408, "val_loss": 3.21561}]
    assert not (tmp_path / "loss.png").exists()  # not drawn for one point
    log.evaluation(5, 3.1, 3.2)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_warning_starts_with_the_word_warning(log, capsys):
    log.warn("look out")
    assert capsys.readouterr().out == "warning: look out\n"


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = Logbook(str(tmp_path), 0, 10, is_main=False)
    log.say("x")
    log.warn("x")
    log.evaluation(0, 1.0, 1.0)
    log.iteration(0, 1.0, 1e-3, 0.1, 10)
    log.close()
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_each_line_is_written_at_once(tmp_path, log):
    for step in range(3):
        log.iteration(step, 1.0, 1e-3, 0.1, 10)
        assert len(lines(tmp_path)) == step + 1


EVALUATION = {"step": 0, "train_loss": 3.5, "val_loss": 3}
ENTRIES = [EVALUATION, *({"iter": step, "loss": 3.0} for step in range(3)),
           EVALUATION | {"step": 3}, *({"iter": step, "loss": 3.0} for step in (3, 4))]


@pytest.mark.parametrize("start, kept", [(0, 1), (2, 3), (3, 5), (4, 6), (5, 7), (9, 7)])
def test_metrics_after_the_start_step_are_dropped(tmp_path, start, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in ENTRIES) + '{"iter": 1, "lo')
    assert kept_entries(str(path), start) == ENTRIES[:kept]
    Logbook(str(tmp_path), start, 10, is_main=True).begin()
    assert lines(tmp_path) == ENTRIES[:kept]


DAMAGED = [
    b"", b"{", b'{"iter": 1, "lo', b"null", b"7", b"[]", b'"step"', b"{}", b"[" * 10**5,
    b"\xff\xfe", b'{"iter": 1, "lors": 2.0}', b'{"iter": "1", "loss": 2.0}',
    b'{"iter": 1, "loss": "2.0"}', b'{"iter": 1, "loss": NaN}', b'{"iter": 1.5, "loss": 2.0}',
    b'{"step": 1, "val_loss": 2.0}', b'{"step": null, "train_loss": 2, "val_loss": 2}',
    b'{"iter": [], "loss": {}}',
    b'{"step": 1, "train_loss": 2, "val_loss": 1' + b"0" * 400 + b"}",
    b'{"iter": 1' + b"0" * 5000 + b', "loss": 2}', b'{"iter": 0, \x00"loss": 1}']


def test_damaged_lines_are_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps(entry).encode() for entry in ENTRIES]
    path.write_bytes(b"\n".join(good[:2] + DAMAGED + good[2:]) + b'\n{"iter": 5')
    assert kept_entries(path, 9) == ENTRIES
    log = Logbook(str(tmp_path), 9, 10, is_main=True)
    log.begin()
    draw(log.entries, tmp_path / "loss.png")
    assert lines(tmp_path) == ENTRIES


def test_a_missing_metrics_file_has_no_entries(tmp_path):
    assert kept_entries(str(tmp_path / "metrics.jsonl"), 5) == []


def test_the_progress_bar_is_drawn_only_on_a_terminal(tmp_path, monkeypatch):
    for kind, shown in ((Terminal, True), (io.StringIO, False)):
        stream = kind()
        monkeypatch.setattr(sys, "stderr", stream)
        log = Logbook(str(tmp_path), 3, 10, is_main=True)
        log.bar.update(1)
        log.say("a line")
        log.close()
        assert ("| 4/10 [" in stream.getvalue()) == shown
        assert ("| 3/10 [" in stream.getvalue()) == shown  # at the start


def test_loss_png_is_drawn_from_only_iterations_or_only_evaluations(tmp_path):
    evaluation = {"step": 0, "train_loss": 3.0, "val_loss": 3.1}
    for entries in ([{"iter": 0, "loss": 3.0}], [evaluation]):
        draw(entries, tmp_path / "loss.png")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "loss.png").unlink()


def test_wandb_gets_no_unknown_values(tmp_path):
    class Run:
        logged = []  # noqa: RUF012

        def log(self, entry, step):
            self.logged.append((entry, step))

        def finish(self, exit_code):
            self.logged.append("finished")

    log = Logbook(str(tmp_path), 0, 10, is_main=True, wandb_run=Run())
    log.iteration(4, 2.0, 1e-3, 0.5, 100)
    log.close()
    assert Run.logged == [({"iter": 4, "loss": 2.0, "lr": 1e-3, "ms": 500.0, "tok_s": 200.0}, 4),
                          "finished"]


def test_wandb_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        logbook.check_wandb()
