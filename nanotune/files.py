"""Files that are whole or not there: atomic writes, checked reads.

What is written goes to a temporary file or folder, is synced, and is renamed: a crash leaves the
old one. What torch.save wrote is checked bit by bit before use, and read as plain data: no code in
it is run.
"""
import os
import pickle
import shutil
import warnings
import zipfile
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import torch

from nanotune.errors import UserError, first_line, out_of_memory


class WriteError(UserError):
    """The disk did not take a file; what stood there before is untouched."""


def write_atomic(path, write, keep=1):
    """Calls write(file) on a temporary file beside `path`, syncs it and renames it to `path`. With
    `keep` above 1 what stood there becomes NAME.1.pt, and so on: that many stay in all.

    Raises WriteError where the disk does not take it; what stood at `path` is then still there.
    """
    temporary = f"{path}.tmp"
    try:
        try:
            with open(temporary, "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            make_older(Path(path), keep)
            os.replace(temporary, path)
            sync_folder(os.path.dirname(path) or ".")
        finally:  # a second Ctrl-C in the middle leaves no half file either
            Path(temporary).unlink(missing_ok=True)
    except (OSError, RuntimeError) as e:  # RuntimeError: torch's zip writer, over an OSError
        reasons = [getattr(error, "strerror", None) for error in (e, e.__context__)]
        raise WriteError(f"cannot write {path} ({next(filter(None, reasons), first_line(e))}); "
                         "what stood there before is untouched: free space or choose another "
                         "--out_dir") from e


def make_older(path, keep):
    """Shifts NAME.1.pt to NAME.2.pt and so on; a second name for `path` becomes NAME.1.pt, so that
    there is no moment without a file at `path`."""
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
        except OSError:  # a file system without hard links: then there is such a moment
            os.replace(path, aged(1))


def sync_folder(folder):
    """Makes a rename in the folder survive a power cut; Windows has no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def write_folder(path, write, replaceable, overwrite=False):
    """Calls write(folder) on a temporary folder beside `path` and renames it to `path`: so that it
    is there whole or not at all.

    A folder that stands at `path` and is not empty is replaced only with `overwrite`, and only if
    each file in it is named by one of the patterns of `replaceable`. Raises UserError for one
    that must stay, and where the disk does not take the new one: the old one is then untouched.
    """
    path = Path(path)
    check_replaceable(path, replaceable, overwrite)
    temporary = path.with_name(f"{path.name}.new-{os.getpid()}")
    old = path.with_name(f"{path.name}.old-{os.getpid()}")
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
        raise UserError(f"cannot write {path} ({e.strerror or e}); nothing was left there or "
                        "changed: free space or choose another folder") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(path, replaceable, overwrite):
    """Raises UserError where the folder at `path` holds what must not be replaced."""
    if not path.exists():
        return
    held = sorted(p.name for p in path.iterdir()) if path.is_dir() else None
    if held is None:
        raise UserError(f"{path} is a file; give a folder that does not exist yet")
    foreign = [name for name in held if not any(fnmatch(name, p) for p in replaceable)]
    if held and not overwrite:
        raise UserError(f"{path} is not empty ({held[0]}{', ...' if held[1:] else ''}); choose "
                        "another folder, or replace it by --overwrite=True")
    if foreign:
        raise UserError(f"{path} holds {foreign[0]}, which no export writes: it is not replaced, "
                        "with --overwrite=True neither; choose another folder")


def save(path, data, keep=1):
    """torch.save, atomically. Tensors go to disk one by one: the whole is never held twice."""
    write_atomic(path, lambda f: torch.save(data, f), keep)


def load(path):
    """A checkpoint file as a dict of plain data and CPU tensors. Raises UserError for one that is
    missing, damaged (a flipped bit too: torch.load alone lets that through) or carries code."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the --out_dir of a run that has saved")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        with warnings.catch_warnings(action="ignore"):  # of odd pickles, which are refused
            if damaged is None:
                data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} carries code or objects beside plain data; refused, none of it "
                        "was run") from None
    except Exception as e:  # a damaged archive or pickle can raise nearly anything
        if out_of_memory(e):
            raise
        raise UserError(f"{path} is truncated, damaged or no checkpoint ({first_line(e)}); use "
                        "another copy of it") from None
    if damaged is not None:
        raise UserError(f"{path} is damaged (in {damaged}); use another copy of it")
    if not isinstance(data, dict) or not {"model", "model_args"} <= data.keys():
        raise UserError(f"{path} is no checkpoint of nanotune or nanoGPT: it lacks 'model' or "
                        "'model_args'")
    return data


@contextmanager
def checked_parse(path):
    """Turns any exception while parsing a whole file's content into UserError."""
    try:
        yield
    except Exception as e:
        if isinstance(e, UserError) or out_of_memory(e):
            raise
        raise UserError(f"{path} is no checkpoint of nanotune or nanoGPT ({type(e).__name__}: "
                        f"{first_line(e)}); use another copy of it") from None
