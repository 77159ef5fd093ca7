"""One run at a time writes to a folder, and a run does not outlive its torchrun."""
import errno
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from tiny import REPO, arguments, run_script, run_train

import export
import sample
import train
from nanotune import files
from nanotune.errors import UserError
from nanotune.training import logbook


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(files, "RETRY", 0.2)
    monkeypatch.setattr(logbook, "draw", lambda *args: None)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def no_locks_here(*args):
    raise OSError(errno.ENOLCK, "No locks available")


def without_flock(monkeypatch, how):
    """Simulate Windows, which has no fcntl, or a file system without locks."""
    if how == "windows":
        monkeypatch.setattr(files, "fcntl", None)
    elif how == "no locks":
        monkeypatch.setattr(files.fcntl, "flock", no_locks_here)


WAYS = pytest.mark.parametrize("way", [
    pytest.param("flock", marks=pytest.mark.skipif(os.name == "nt", reason="no flock")),
    "windows",
    pytest.param("no locks", marks=pytest.mark.skipif(os.name == "nt", reason="no flock"))])


@WAYS
def test_a_second_run_in_a_folder_is_refused(dataset, tmp_path, monkeypatch, capsys, way):
    """The error names the host and pid of the first run; the folder is not changed."""
    out = tmp_path / "out"
    run_train(dataset, out)
    without_flock(monkeypatch, way)
    before = content(out)
    with files.lock(out):
        for fields in (dict(overwrite=True), dict(auto_resume=True), dict(init_from="resume")):
            argv = arguments(dataset, out, max_iters=8, **fields)
            status, output, err = run_script(monkeypatch, capsys, train.main, argv)
            assert (status, output, err.count("\n")) == (1, "", 1)
            assert f"{out} is in use: process {os.getpid()} on {socket.gethostname()} is" in err
            assert content(out) == before
    assert run_train(dataset, out, max_iters=8, init_from="resume") == 0


def test_reading_a_run_needs_no_lock(dataset, tmp_path):
    out = tmp_path / "out"
    run_train(dataset, out)
    with files.lock(out):
        sample.main([f"--out_dir={out}", "--max_new_tokens=2", "--num_samples=1", "--device=cpu"])
        export.main([f"--out_dir={out}", f"--export_dir={tmp_path / 'hf'}"])
        train.main(arguments(dataset, out, init_from="resume", eval_only=True))


def test_a_run_that_fails_to_start_releases_the_lock(dataset, tmp_path, monkeypatch, capsys):
    argv = arguments(dataset, tmp_path / "out", sample_interval=1, sample_start="")
    with pytest.raises(UserError, match="sample_start has no tokens"):
        train.main(argv)
    assert run_train(dataset, tmp_path / "out", max_iters=0) == 0


def test_a_new_run_waits_for_one_that_is_about_to_end(tmp_path, monkeypatch):
    first = files.lock(tmp_path)
    first.__enter__()
    waited = []
    monkeypatch.setattr(files.time, "sleep", lambda seconds: (
        waited.append(seconds), first.__exit__(None, None, None)))
    with files.lock(tmp_path):
        assert len(waited) == 1


def test_without_flock_a_heartbeat_keeps_the_lock(dataset, tmp_path, monkeypatch):
    """A process keeps its lock as long as it runs; the lock of a killed process expires."""
    monkeypatch.setattr(files, "fcntl", None)
    with monkeypatch.context() as patch:
        patch.setattr(files, "STALE", 0.6)
        with files.lock(tmp_path):
            time.sleep(1)  # without the heartbeat the lock would be stale
            with pytest.raises(UserError, match="is in use"), files.lock(tmp_path):
                pass
    (tmp_path / ".lock").write_text("process 1 on a machine that went down")
    with pytest.raises(UserError, match="process 1 on a machine that went down is running"):
        files.lock(tmp_path).__enter__()
    os.utime(tmp_path / ".lock", (0, time.time() - files.STALE - 1))
    assert run_train(dataset, tmp_path, max_iters=0) == 0


def test_a_lock_file_that_cannot_be_opened_is_a_one_line_error(dataset, tmp_path, monkeypatch,
                                                               capsys):
    (tmp_path / "out/.lock").mkdir(parents=True)
    status, _, err = run_script(monkeypatch, capsys, train.main,
                                arguments(dataset, tmp_path / "out"))
    assert status == 1 and err.startswith("error: --out_dir=") and err.count("\n") == 1


def test_two_writers_of_one_file_write_two_temporary_files(tmp_path):
    path = tmp_path / "state.pt"

    def write(f):
        f.write(b"the first")
        files.write_atomic(path, lambda other: other.write(b"the second, whole"))
        assert path.read_bytes() == b"the second, whole"

    files.write_atomic(path, write)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("state.pt", b"the first")]


def test_temporary_files_of_an_interrupted_save_are_removed(dataset, tmp_path):
    out = tmp_path / "out"
    run_train(dataset, out, max_iters=0)
    for name in ("state.pt.tmp", "ckpt.pt.0123abcd.tmp", "run.json.0.tmp", "metrics.jsonl.0.tmp"):
        (out / name).write_bytes(b"half")
    (out / "mine.tmp").write_bytes(b"not ours")
    run_train(dataset, out, max_iters=1, init_from="resume")
    assert [path.name for path in out.glob("*.tmp")] == ["mine.tmp"]


@pytest.mark.skipif(os.name == "nt", reason="on Windows getppid() does not change")
def test_a_rank_stops_when_its_torchrun_is_killed(tmp_path):
    rank = ("import signal, sys, time; from nanotune.cli import run\n"
            "def main(argv):\n"
            "    signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('stopped')))\n"
            "    print('began', flush=True); time.sleep(600)\n"
            "run(main)")
    launcher = subprocess.Popen(
        [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])",
         sys.executable, "-c", rank], stdout=subprocess.PIPE, text=True, cwd=REPO,
        env=os.environ | {"TORCHELASTIC_RUN_ID": "none"})
    assert launcher.stdout.readline() == "began\n"
    launcher.send_signal(signal.SIGKILL)
    assert launcher.communicate(timeout=60)[0] == "stopped\n"  # at EOF the rank has ended
