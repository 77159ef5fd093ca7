"""train.py on several ranks as torchrun would start them, forked from one process that has imported
everything: a start costs a fork, not 3 seconds of imports.

A server process (multiprocessing's) does the forking, since a pytest process that has run a
backward pass cannot be forked. Each rank writes what it says to a file of its own.
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
WARM = ["train", "torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg",
        "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torchao.optim"]


def server():
    """The context whose processes are forks of a warm one."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    os.environ["OMP_NUM_THREADS"] = "1"
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("no forkserver here, as on Windows")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WARM)
    return context


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Job:
    """`size` ranks of `train.main(argv)`; hook(rank) is called before it, in each."""
    def __init__(self, size, argv, folder, hook=None, script="train"):
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank{rank}.log" for rank in range(size)]
        port, context = free_port(), server()
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
        """The exit statuses; a rank killed by a signal has its number, negative."""
        end = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        late = [process for process in self.ranks if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        assert not late, f"still running after {seconds} s:\n{self.said()}"
        return [process.exitcode for process in self.ranks]

    def end(self, seconds):
        """The exit statuses; what is left after so long is killed, as torchrun does."""
        for process in self.ranks:
            process.join(seconds)
            process.kill()
        return self.wait()

    def said(self, rank=None):
        logs = self.logs if rank is None else [self.logs[rank]]
        return "".join(log.read_text() for log in logs if log.exists())


def work(rank, size, port, script, argv, log, hook):
    """One rank's life, in a fork: torchrun's environment, then the script as the shell runs it."""
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
    logbook.draw = lambda *_: None  # half a second each, and tested elsewhere
    module = __import__(script)
    if hook is not None:
        hook(rank)
    sys.argv = [f"{script}.py", *argv]
    run(module.main)


def run_ranks(size, argv, folder, hook=None, seconds=120):
    """(exit statuses, what all ranks said)."""
    job = Job(size, argv, folder, hook)
    return job.wait(seconds), job.said()
