"""Run a script on several ranks with torchrun's environment. The ranks are forks of one process
that has imported everything, which saves 3 seconds of imports per start.

multiprocessing's fork server creates the forks, because a process that has run a backward pass
cannot be forked. Each rank writes its output to its own file.
"""
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = ["train", "torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg",
             "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torchao.optim"]


def fork_context():
    """The multiprocessing context that forks processes with PRELOADED already imported."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    os.environ["OMP_NUM_THREADS"] = "1"
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("no forkserver here, as on Windows")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Job:
    """`size` ranks that run main(argv) of a script; each calls hook(rank) first."""
    def __init__(self, size, argv, folder, hook=None, script="train"):
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank{rank}.log" for rank in range(size)]
        port, context = free_port(), fork_context()
        self.ranks = [context.Process(target=work, args=(
            rank, size, port, script, [str(arg) for arg in argv], str(log), hook))
            for rank, log in enumerate(self.logs)]
        for process in self.ranks:
            process.start()

    def kill(self, *ranks):
        for rank in ranks or range(len(self.ranks)):
            os.kill(self.ranks[rank].pid, signal.SIGKILL)

    def alive(self):
        return any(process.is_alive() for process in self.ranks)

    def wait(self, seconds=120):
        """Wait; return the exit statuses, negative signal numbers for ranks killed by a signal."""
        end = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        late = [process for process in self.ranks if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        assert not late, f"still running after {seconds} s:\n{self.output()}"
        return [process.exitcode for process in self.ranks]

    def end(self, seconds):
        """Wait `seconds` for each rank, kill it as torchrun does, and return the exit statuses."""
        for process in self.ranks:
            process.join(seconds)
            process.kill()
        return self.wait()

    def output(self, rank=None):
        logs = self.logs if rank is None else [self.logs[rank]]
        return "".join(log.read_text() for log in logs if log.exists())


def work(rank, size, port, script, argv, log, hook):
    """Run one rank, in a fork: set torchrun's environment, then run the script as a shell does."""
    if size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
                          LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout.reconfigure(line_buffering=True)
    import torch

    from nanotune.cli import run
    from nanotune.training import logbook
    torch.set_num_threads(1)
    logbook.draw = lambda *_: None  # takes half a second; test_curves.py tests it
    module = __import__(script)
    if hook is not None:
        hook(rank)
    sys.argv = [f"{script}.py", *argv]
    run(module.main)


def run_ranks(size, argv, folder, hook=None, seconds=120):
    """Run a Job; return (exit statuses, the output of all ranks)."""
    job = Job(size, argv, folder, hook)
    return job.wait(seconds), job.output()
