"""Errors that end a script with one line, and their messages. Imports only the standard library."""
import errno


class UserError(Exception):
    """An error that the user can fix. The message is one line: what is wrong and what to do."""


class NonFiniteLoss(UserError):
    """Training diverged: the loss or the gradient is NaN or infinite."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type's name if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def out_of_memory(e: BaseException) -> str | None:
    """The line to print if the exception means that memory ran out, on the device or the host;
    else None. Host allocations fail as MemoryError (Python, numpy), RuntimeError (torch) or ENOMEM
    (mmap)."""
    text = str(e)
    device = type(e).__name__ == "OutOfMemoryError" or (  # RuntimeError: Metal, parts of CUDA
        isinstance(e, RuntimeError) and "out of memory" in text)
    host = (isinstance(e, MemoryError) or getattr(e, "errno", None) == errno.ENOMEM
            or "allocate memory" in text or "bad_alloc" in text)
    if not (device or host):
        return None
    where = "the device" if device else "this machine"
    reason = f" ({' '.join(text.split())[:160]})" if text else ""
    return (f"out of memory on {where}{reason}; lower --batch_size, and raise "
            "--gradient_accumulation_steps by the same factor to keep the global batch; or lower "
            "--block_size, use a smaller model, or --parallel=fsdp on more processes")
