"""Runs a script's main(): prints one line for an error that a user can fix, a traceback for a bug.

    if __name__ == "__main__":
        run(main)

Uses torch only if the script has imported it: the data scripts run without torch.
"""
import contextlib
import errno
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TextIO

from nanotune.errors import UserError, out_of_memory

SIGPIPE_STATUS = 128 + 13  # as a shell reports a process that SIGPIPE ended


def run(main: Callable[[list[str]], object]) -> None:
    """Calls main(argv) and ends the process.

    If main() raises a UserError, runs out of memory, uses a path that the system refuses, or loses
    another rank, prints one line on stderr and exits with status 1. Any other exception is a bug
    and keeps its traceback. If the reader of stdout is gone (`| head`), the script ends
    without a message. Under torchrun rank 0 prints a UserError; the other ranks print it after 5 s,
    unless rank 0 has ended the job by then. If torchrun is gone, all ranks stop as after SIGTERM.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=stop_with, args=(os.getppid(),), daemon=True).start()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="replace")  # a Windows console's code page lacks most characters
    status = 0
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except SystemExit as end:
        status = end.code or 0
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = SIGPIPE_STATUS
        silence(sys.stdout)
    except Exception as e:
        status, line = 1, last_line(e)
        if line is None and not in_process_group():
            raise
        if line is None:
            traceback.print_exc()
        else:
            say(f"error: {line}", sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        say("", stream, end="")  # flushes
    if in_process_group():
        end_now(status)
    if status:
        sys.exit(status)


def stop_with(parent):
    """Sends SIGTERM to this process when its parent is gone; no effect on Windows, where getppid()
    does not change."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def say(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Prints a line and flushes it, on stdout by default. If the pipe's reader or the terminal is
    gone, this and all later lines of the stream are discarded."""
    try:
        print(text, end=end, file=stream, flush=True)
    except (OSError, ValueError):
        silence(stream or sys.stdout)


def silence(stream):
    """Redirects a stream to os.devnull, so that Python's flush at exit does not print an error."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file, in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def in_process_group() -> bool:
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def end_now(status: int) -> None:
    """Ends a process of a process group without running destructors: in torch 2.13 with gloo, DDP's
    destructor can wait forever for a thread that waits for the GIL. After an error it does not wait
    for the other ranks either."""
    if status == 0:
        sys.modules["torch.distributed"].destroy_process_group()
    os._exit(status)


def last_line(e: Exception) -> str | None:
    """The line to print, or None for a bug. On a UserError, ranks other than 0 wait 5 s here, since
    rank 0 prints the same line."""
    if not isinstance(e, UserError):
        return out_of_memory(e) or bad_path(e) or lost_rank(e)
    if int(os.environ.get("RANK", 0)) != 0:
        time.sleep(5)
    return str(e)


def bad_path(e: Exception) -> str | None:
    """The line to print if the exception means that the system refuses a path; else None."""
    refused = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR,
               errno.ELOOP)
    if not isinstance(e, OSError) or e.errno not in refused or e.filename is None:
        return None
    path = str(e.filename)
    return f"{path if len(path) < 200 else path[:200] + '...'}: {e.strerror}; give another path"


def lost_rank(e: Exception) -> str | None:
    """The line to print if the exception means that another process is gone or silent; else
    None."""
    text = " ".join(str(e).split())
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe",
             "Connection refused", "timed out", "Timed out", "No route to host", "store")
    dist = sys.modules.get("torch.distributed")
    from_torch = dist is not None and (isinstance(e, dist.DistError) or "gloo" in text)
    sign = next((sign for sign in signs if sign in text), None)
    if not from_torch or sign is None:
        return None
    rank, size = os.environ.get("RANK", 0), os.environ.get("WORLD_SIZE", 1)
    return (f"process {rank} of {size}: another process is gone or did not answer in time "
            f"({text[text.index(sign):][:80]}); see the message of that process, above or in its "
            "terminal. The saved states are intact: start the job again with --auto_resume=True")


class StopSignals:
    """A context in which Ctrl-C, SIGTERM and SIGHUP request a stop at the end of the step:
    `received` is the signal's number, or 0. A closed terminal sends SIGHUP; under nohup SIGHUP
    stays ignored. A second Ctrl-C stops at once, but not under torchrun, which sends a second
    signal itself."""
    def __enter__(self) -> "StopSignals":
        self.received = 0
        stops = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            stops.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self.handle) for number in stops}
        return self

    def handle(self, number, frame):
        if self.received and number == signal.SIGINT and "RANK" not in os.environ:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *exc):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def resume_command(out_dir: str) -> str:
    """Returns the command that resumes a stopped run of train.py."""
    size = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = f"torchrun --standalone --nproc_per_node={size}" if size else "python"
    return f"{launcher} train.py {shlex.join([f'--out_dir={out_dir}', '--init_from=resume'])}"
