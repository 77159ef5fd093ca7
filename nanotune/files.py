"""Writes files and folders atomically, locks a folder, checks checkpoint files as it reads them.

A write goes to a temporary file or folder, which is synced and then renamed: after a crash the old
file is intact. Loading checks the CRC of each entry of a torch.save file, reads only plain data,
and runs no code from the file.
"""
import contextlib
import os
import pickle
import shutil
import socket
import threading
import time
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

import torch

from nanotune.errors import UserError, first_line, out_of_memory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MOST_UNPACKED = 100  # a checkpoint that unpacks to more than this many times its size is refused

LOCK_FILE = ".lock"
RETRY = 30.0  # seconds to wait for a lock: a run that is ending may still hold it
STALE = 60.0  # seconds; without flock, a lock file that is older counts as free


class WriteError(UserError):
    """Writing a file failed; the previous file at that path is intact."""


def temporary_name(path):
    """A unique name in the folder of `path`."""
    return f"{path}.{uuid.uuid4().hex[:8]}.tmp"


def write_atomic(path: str | Path, write: Callable[[IO[bytes]], object], keep: int = 1) -> None:
    """Calls write(file) on a temporary file next to `path`, syncs it and renames it to `path`.

    With `keep` above 1 the previous file becomes NAME.1.pt, the one before NAME.2.pt and so on,
    `keep` files in all. Raises WriteError if writing fails; the previous file is then intact.
    """
    temporary = temporary_name(path)
    try:
        try:
            with open(temporary, "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            make_older(Path(path), keep)
            os.replace(temporary, path)
            sync_folder(os.path.dirname(path) or ".")
        finally:  # also after a second Ctrl-C
            Path(temporary).unlink(missing_ok=True)
    except (OSError, RuntimeError) as e:  # RuntimeError: torch's zip writer, over an OSError
        reasons = [getattr(error, "strerror", None) for error in (e, e.__context__)]
        raise WriteError(f"cannot write {path} ({next(filter(None, reasons), first_line(e))}); "
                         "the previous file is intact; free space or choose another --out_dir"
                         ) from e


def make_older(path, keep):
    """Renames NAME.1.pt to NAME.2.pt and so on, and makes NAME.1.pt a hard link to `path`.

    A link, not a rename, so that there is always a file at `path`.
    """
    def aged(age):
        return path.with_suffix(f".{age}{path.suffix}")

    if not path.is_file():
        return
    for age in range(keep - 1, 1, -1):
        if aged(age - 1).is_file():
            os.replace(aged(age - 1), aged(age))
    if keep > 1:
        aged(1).unlink(missing_ok=True)
        try:
            os.link(path, aged(1))
        except OSError:  # no hard links: for a moment there is no file at `path`
            os.replace(path, aged(1))


def link(source: Path, target: Path) -> None:
    """Makes `target` a hard link to the file `source`, atomically, or a copy if the file system has
    no hard links. Raises WriteError if the disk is full."""
    try:
        temporary = temporary_name(target)
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError:
        with open(source, "rb") as f:
            write_atomic(target, lambda copy: shutil.copyfileobj(f, copy))


def sync_folder(folder):
    """Syncs the folder, so that a rename in it survives a power cut; does nothing on Windows."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def write_folder(path: str | Path, write: Callable[[Path], object], replaceable: Sequence[str],
                 overwrite: bool = False) -> None:
    """Calls write(folder) on a temporary folder next to `path`, syncs it and renames it to `path`.

    A folder at `path` that is not empty is replaced only with `overwrite`, and only if it has only
    plain files whose names match a pattern of `replaceable` (fnmatch's). A link is never followed.
    Raises UserError if the folder must not be replaced or writing fails; the old folder is then
    intact.
    """
    path = Path(path)
    check_replaceable(path, replaceable, overwrite)
    unique = uuid.uuid4().hex[:8]
    temporary = path.with_name(f"{path.name}.new-{unique}")
    old = path.with_name(f"{path.name}.old-{unique}")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for file in temporary.iterdir():
            with open(file, "rb+") as f:
                os.fsync(f.fileno())
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        if old.exists() and not path.exists():
            old.rename(path)
        raise UserError(f"cannot write {path} ({e.strerror or e}); nothing was changed "
                        "there; free space or choose another folder") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(path: Path, replaceable: Sequence[str], overwrite: bool) -> None:
    """Raises UserError if `path` is a file, a link, or a folder that is not empty and either
    `overwrite` is False or not all its entries are plain files that match `replaceable`."""
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link; give the folder that it points to")
    if not path.name:
        raise UserError(f"the folder {path} cannot be replaced; give one with a name")
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file; give a folder that does not exist yet")
    present = sorted(path.iterdir())
    foreign = [p.name for p in present if p.is_symlink() or not p.is_file()
               or not any(fnmatch(p.name, pattern) for pattern in replaceable)]
    if present and not overwrite:
        raise UserError(f"{path} is not empty ({present[0].name}{', ...' if present[1:] else ''}); "
                        "choose another folder, or replace it with --overwrite=True")
    if foreign:
        raise UserError(f"{path} holds {foreign[0]}, which is not from an export: --overwrite=True "
                        "does not replace it; choose another folder")


@contextlib.contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """A context that holds the folder's lock, so that one process at a time writes to the folder.

    The lock is flock on LOCK_FILE, which also works over NFS; the system frees it if the process
    is killed. Without flock, as on Windows, a thread touches the file, and the lock is free if the
    file is older than STALE. After RETRY seconds without the lock, raises UserError with the host
    and pid of the process that holds it.
    """
    # NFS needs a file that is open for writing; opening it keeps its modification time
    with open(Path(folder, LOCK_FILE), "a+", errors="replace") as f:
        end = time.monotonic() + RETRY
        while not try_lock(f):
            if time.monotonic() > end:
                f.seek(0)
                raise UserError(f"{folder} is in use: {f.read(200) or 'a process'} is running; "
                                "stop it, wait until it ends, or choose another folder")
            time.sleep(0.1)
        ended = threading.Event()
        with contextlib.suppress(OSError):  # a full disk: then the lock names no process
            f.truncate(0)
            os.write(f.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        threading.Thread(target=touch_until, args=(f.name, ended), daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            with contextlib.suppress(OSError):
                f.truncate(0)


def try_lock(f):
    """Locks an open file if it is free; returns whether that worked. Without flock, returns whether
    the file is empty or older than STALE."""
    if fcntl is not None:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
    info = os.fstat(f.fileno())
    return info.st_size == 0 or time.time() - info.st_mtime > STALE


def touch_until(path, ended):
    while not ended.wait(STALE / 6):
        with contextlib.suppress(OSError):
            os.utime(path)


def save(path: str | Path, data: dict, keep: int = 1) -> None:
    """Writes a checkpoint with torch.save and write_atomic, to which `keep` is passed.

    Tensors are written one by one, so the data is never in memory twice. Raises WriteError if
    writing fails.
    """
    write_atomic(path, lambda f: torch.save(data, f), keep)


def load(path: str | Path) -> dict:
    """Returns the content of a checkpoint file: a dict of plain data and CPU tensors.

    Raises UserError if the file is missing, damaged, contains code, or lacks 'model' or
    'model_args'. A flipped bit counts as damage; torch.load alone does not detect it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the --out_dir of a run that has saved")
    try:
        with zipfile.ZipFile(path) as archive:
            check_size(archive, path)
            damaged = archive.testzip()
        with warnings.catch_warnings(action="ignore"):  # about odd pickles, refused below
            if damaged is None:
                data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} contains code or objects other than plain data, which were not "
                        "run; use a checkpoint without them") from None
    except Exception as e:  # a damaged archive or pickle can raise nearly anything
        if out_of_memory(e) or isinstance(e, UserError):
            raise
        raise UserError(f"{path} is truncated, damaged or not a checkpoint ({first_line(e)}); use "
                        "another copy of it") from None
    if damaged is not None:
        raise UserError(f"{path} is damaged (in {damaged}); use another copy of it")
    if not isinstance(data, dict) or not {"model", "model_args"} <= data.keys():
        raise UserError(f"{path} is not a checkpoint of nanotune or nanoGPT: it lacks 'model' or "
                        "'model_args'")
    return data


def peek(path: str | Path) -> dict:
    """Returns the content of a checkpoint file, with tensors that are memory-mapped, not read.
    Checks only the index: for a damaged file raises UserError or any error of torch.load."""
    with zipfile.ZipFile(path) as archive:
        check_size(archive, path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def check_size(archive, path):
    unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > MOST_UNPACKED * os.path.getsize(path):
        raise UserError(f"{path} unpacks to {unpacked:,} bytes, far more than its size, but "
                        "nanotune's checkpoints are not compressed; use another file")


@contextlib.contextmanager
def checked_parse(path: str | Path) -> Iterator[None]:
    """A context for parsing the content of a file that loaded without error.

    Turns any exception inside it into UserError, unless memory ran out.
    """
    try:
        yield
    except Exception as e:
        if isinstance(e, UserError) or out_of_memory(e):
            raise
        raise UserError(f"{path} is damaged, or not a checkpoint of nanotune or nanoGPT "
                        f"({type(e).__name__}: {first_line(e)}); use another copy of it") from None
