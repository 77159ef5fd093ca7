"""Opens the files of a dataset, and checks them.

NAME.bin has the tokens, NAME.mask.bin a byte per token (1: a target), NAME.pairs.bin the lengths of
pairs. A UserError says which file is wrong and what to do.
"""
import shlex
import zlib
from pathlib import Path

import numpy as np

from nanotune.errors import UserError

PIECE, PIECES = 2**19, 40  # checksum() reads about PIECES pieces of PIECE tokens of a large file


def open_tokens(path: Path, block_size: int) -> np.ndarray:
    """Returns a .bin file as a read-only memory map, (n,) uint16. Raises UserError if it is
    missing, damaged or shorter than block_size + 1 tokens."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; " + how_to_prepare(path))
    size = path.stat().st_size
    if size == 0 or size % 2:
        wrong = "is empty" if size == 0 else f"has an odd size, {size} bytes, for 2-byte tokens"
        raise UserError(f"{path} {wrong}; " + how_to_prepare(path))
    if size // 2 < block_size + 1:
        fits = f"use --block_size={size // 2 - 1} or less, or more text"
        raise UserError(f"{path} has {size // 2} tokens; block_size={block_size} needs "
                        f"{block_size + 1}: {fits if size > 2 else 'it needs more text'}")
    return np.memmap(path, dtype="<u2", mode="r")


def open_mask(path: Path, length: int) -> np.ndarray | None:
    """Returns the mask of a .bin file of `length` tokens, (length,) uint8, or None."""
    mask_path = path.with_suffix(".mask.bin")
    if not mask_path.is_file():
        return None
    size = mask_path.stat().st_size
    if size != length:
        raise UserError(f"{mask_path} has {size} entries for the {length} tokens of {path}: they "
                        "are from different runs of prepare.py; run it again, or delete the mask "
                        "to train on every token")
    return np.memmap(mask_path, dtype=np.uint8, mode="r")


def open_lengths(path: Path, n_tokens: int) -> np.ndarray:
    """Returns the lengths of the sources and targets of a .bin file of pairs, (N, 2) int64."""
    file = path.with_suffix(".pairs.bin")
    lengths = np.frombuffer(file.read_bytes()[:file.stat().st_size // 8 * 8], "<u4")
    lengths = lengths.reshape(-1, 2).astype(np.int64)
    if not len(lengths) or lengths.min() < 1 or int(lengths.sum()) != n_tokens:
        raise UserError(f"{file} has lengths of {int(lengths.sum())} tokens for the {n_tokens} of "
                        f"{path}, or a length of 0: they are from different runs of prepare.py; "
                        "run it again")
    return lengths


def checksum(tokens: np.ndarray, extra: np.ndarray | None) -> int:
    """Returns the CRC-32 of pieces of a file's tokens and of `extra`, its mask or lengths."""
    crc, n = 0, len(tokens)
    for start in range(0, n, max(PIECE, n // PIECES)):
        crc = zlib.crc32(tokens[start:start + PIECE], crc)
        if extra is not None:
            crc = zlib.crc32(extra[start:start + PIECE], crc)
    return crc


def check_length(path: Path, *arrays: np.ndarray | None) -> None:
    """Raises UserError if a memory-mapped file was cut short: reading it would end in SIGBUS."""
    for array in arrays:
        if isinstance(array, np.memmap) and array.base.size() < array.nbytes:
            raise UserError(f"{path} or its mask was cut short while it was in use; put "
                            "the old files back and resume")


def check_ids(path: Path, tokens: np.ndarray, start: int, vocab_size: int) -> None:
    """Raises UserError if a token is not below vocab_size. tokens[0] is token `start` of the file.
    """
    if int(tokens.max()) < vocab_size:
        return
    at = int(np.argmax(tokens >= vocab_size))
    raise UserError(f"{path}: token {start + at} is {tokens[at]}, beyond the model's "
                    f"vocabulary of {vocab_size}; the file was made with another "
                    "tokenizer, or is damaged: run its prepare.py again")


def how_to_prepare(path: Path) -> str:
    """Returns 'run: python FOLDER/prepare.py' with the nearest prepare.py, else data/text's."""
    for folder in (path.parent, path.parent.parent):
        if (folder / "prepare.py").is_file():
            return f"run: {shlex.join(['python', str(folder / 'prepare.py')])}"
    return ("run: python data/text/prepare.py --input=FILE_OR_FOLDER "
            + shlex.quote(f"--out_dir={path.parent}"))
