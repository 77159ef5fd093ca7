"""A run continues, saves and ends normally if its output is a closed pipe or terminal."""
import os
import signal
import subprocess
import sys
import time

import pytest
from ranks import run_ranks
from tiny import REPO, arguments, run_train

import train
from nanotune import cli, files
from nanotune.training import resume

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no SIGHUP, no terminals of this kind")


def at_step(step, act):
    real = train.forward_backward

    def forward_backward(r, now):
        if now == step:
            act()
        return real(r, now)

    train.forward_backward = forward_backward


def redirect(handle):
    """Redirect stdout and stderr to a file descriptor. Replace sys.stdout too, because the old one
    expects a file in which it can seek."""
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, closefd=False) for n in (1, 2))


def no_reader(rank):
    """stdout and stderr are a pipe without a reader, as after `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    redirect(writer)


def ctrl_c_under_a_pipe(rank):
    """Ctrl-C in `train.py 2>&1 | tee log` ends tee before the run."""
    at_step(3, lambda: (no_reader(rank), signal.raise_signal(signal.SIGINT)))


def closed_terminal(rank):
    """The run has a terminal and a progress bar; the terminal is closed in step 3."""
    import fcntl
    import pty
    import termios
    while os.open(os.devnull, os.O_RDWR) < 3:  # a forked process has no stdin
        pass
    master, slave = pty.openpty()
    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    redirect(slave)
    os.close(slave)

    def close():
        os.close(master)
        stop = signal.getsignal(signal.SIGHUP).__self__
        deadline = time.monotonic() + 20
        while not stop.received and time.monotonic() < deadline:  # some kernels send SIGHUP late
            time.sleep(.01)

    at_step(3, close)


def saved(out):
    return files.load(out / "state.pt")["iter_num"], resume.read_run_file(out)["status"]


@pytest.mark.parametrize("hook, status, ended", [
    (no_reader, 0, (6, "done")), (ctrl_c_under_a_pipe, 130, (4, "stopped")),
    (closed_terminal, 129, (4, "stopped"))])
def test_a_print_that_fails_does_not_end_a_run(dataset, tmp_path, hook, status, ended):
    out = tmp_path / "out"
    statuses, output = run_ranks(1, arguments(dataset, out), tmp_path / "log", hook)
    assert statuses == [status], output
    assert saved(out) == ended


def nobody_reads_rank_0(rank):
    if rank == 0:
        no_reader(rank)


def test_a_print_that_fails_on_rank_0_ends_no_rank(dataset, tmp_path):
    statuses, output = run_ranks(2, arguments(dataset, tmp_path / "out"), tmp_path / "log",
                                 nobody_reads_rank_0)
    assert (statuses, saved(tmp_path / "out")) == ([0, 0], (6, "done")), output


def test_the_state_is_saved_before_the_stop_is_printed(dataset, tmp_path, monkeypatch):
    order = []
    real = files.save
    monkeypatch.setattr(files, "save", lambda path, *args: (order.append(path.name),
                                                            real(path, *args)))
    monkeypatch.setattr(train.logbook, "say", lambda text: order.append(text))
    forward_backward = train.forward_backward
    monkeypatch.setattr(train, "forward_backward", lambda r, step: (
        signal.raise_signal(signal.SIGTERM), forward_backward(r, step))[1])
    assert run_train(dataset, tmp_path / "out") == 143
    assert order[-2] == "state.pt" and order[-1].startswith("stopped by a signal after step 0")


def test_a_stop_signal_that_was_ignored_stays_ignored(monkeypatch):
    """nohup ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cli.StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.received == 0
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with cli.StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.received == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams_cause_no_traceback(closed):
    code = ("from nanotune.cli import run; from nanotune.errors import UserError\n"
            "def main(argv):\n    print('out')\n    raise UserError('this')\n"
            "run(main)")
    script = subprocess.run(["sh", "-c", f'"{sys.executable}" -c "$0" {closed}', code], cwd=REPO,
                            capture_output=True, text=True)
    assert script.returncode == 1 and "Traceback" not in script.stderr + script.stdout
