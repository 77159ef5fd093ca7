"""How a script ends: one line for what a user can fix, a traceback for a bug."""
import json
import subprocess
import sys

import pytest
import torch
from tiny import REPO, run_script

import train
from configurator import configure
from nanotune import cli
from nanotune.errors import NonFiniteLoss, UserError, first_line, out_of_memory


def test_a_user_error_is_one_line(monkeypatch, capsys):
    def main(argv):
        configure(train.Config, ["--batch_size=0"])

    assert run_script(monkeypatch, capsys, main, []) == (
        1, "", "error: --batch_size=0 must be at least 1 and at most 65536\n")


def test_an_error_of_a_library_keeps_its_traceback(monkeypatch, capsys):
    with pytest.raises(json.JSONDecodeError):  # a ValueError, but raised in a library
        run_script(monkeypatch, capsys, lambda argv: json.loads("{"), [])


def test_ctrl_c_ends_without_a_traceback(monkeypatch, capsys):
    def main(argv):
        raise KeyboardInterrupt

    assert run_script(monkeypatch, capsys, main, []) == (130, "", "")


def test_other_ranks_wait_before_they_print_an_error(monkeypatch, capsys, ranks):
    waits = []
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    for rank in (0, 1):
        ranks(rank, 2)
        status, _, err = run_script(monkeypatch, capsys, train.main, ["--nonsense=1"])
        assert status == 1 and err.startswith("error: --nonsense")
        assert len(waits) == rank


@pytest.mark.parametrize("error", [
    ValueError("not enough values to unpack (expected 2, got 1)"), KeyError("n_layer"),
    TypeError("unhashable"), AssertionError(), RuntimeError("mat1 and mat2 shapes")],
    ids=lambda error: type(error).__name__)
def test_an_error_that_is_a_bug_keeps_its_traceback(monkeypatch, capsys, error):
    """Even if it is raised in a file of the project."""
    def main(argv):
        raise error

    with pytest.raises(type(error)):
        run_script(monkeypatch, capsys, main, [])


@pytest.mark.parametrize("error, line", [
    (UserError("do this"), "error: do this\n"),
    (NonFiniteLoss("step 3: the loss is nan"), "error: step 3: the loss is nan\n"),
    (MemoryError(), "error: out of memory on this machine;"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), "error: out of memory on the device (C"),
    (OSError(12, "Cannot allocate memory"), "error: out of memory on this machine ("),
    (torch.distributed.DistNetworkError("Connection reset by peer"), "error: process 0 of 1: ano"),
], ids=["user error", "non-finite loss", "MemoryError", "GPU memory", "ENOMEM", "lost process"])
def test_user_memory_and_lost_process_errors_are_one_line(monkeypatch, capsys, error, line):
    def main(argv):
        raise error

    status, out, err = run_script(monkeypatch, capsys, main, [])
    assert (status, out, err.count("\n")) == (1, "", 1) and err.startswith(line)


def test_first_line_returns_a_line_of_the_message_or_else_the_type_of_the_error():
    assert first_line(RuntimeError("\n  one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
    assert out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is another error there")
@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_closed_pipe_ends_a_script_quietly(lines):
    """`python train.py ... | head -1`. Output that fits in the buffer is written only at exit."""
    code = ("from nanotune.cli import run\n"
            f"run(lambda argv: [print('line') for _ in range({lines})])")
    script = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE)
    script.stdout.close()
    assert script.stderr.read() == b"" and script.wait() == cli.SIGPIPE_STATUS
    script.stderr.close()


def test_cli_does_not_import_torch():
    """The data scripts use nanotune.cli too, and start in 0.1 s."""
    code = "import sys\nimport nanotune.cli\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)
