"""Token files as batches: a batch is a pure function of (seed, sample number).

A .bin file holds uint16 token ids end to end, without a header; a .mask.bin beside it, where there
is one, holds a byte a token, 0 for those that are no target of the loss.

Sample n belongs to epoch n // N. Each epoch cuts the file anew into N blocks of T tokens, from a
seeded phase on, and takes them in a seeded order. So each token is a target once an epoch, but for
less than two blocks at the edges; a resumed run needs its step alone; and a global batch is the
same however ranks and micro-steps share it.
"""
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from nanotune.errors import UserError

IGNORED = -1         # the target that model.py's loss does not count
SPLITS = ("train", "val")
SCAN_LIMIT = 2**28   # tokens: up to here (0.2 s) a whole file's ids are checked at the start


class TokenBin:
    """One split of a dataset, read in blocks of block_size inputs and as many targets.

    vocab_size is the model's: an id beyond it raises UserError with its file and position. A text
    in memory is given as `tokens`, its ids; `path` is then what it is called.
    """
    def __init__(self, path: str | Path, block_size: int, vocab_size: int, seed: int = 0,
                 tokens: np.ndarray | None = None):
        self.path, self.block_size = Path(path), block_size
        self.vocab_size, self.seed, self.mask = vocab_size, seed, None
        if tokens is None:
            self.tokens = open_tokens(self.path, block_size)
            self.mask = open_mask(self.path, len(self.tokens))
        else:
            self.tokens = tokens
        if len(self.tokens) <= SCAN_LIMIT:
            self.check_ids(self.tokens, 0)
        targets = len(self.tokens) - 1
        self.n_blocks = max(1, targets // block_size - 1)
        # how far the first block may be moved: so far that some epoch reads the file's last token
        self.n_phases = targets - self.n_blocks * block_size + 1
        self.epoch_order = lru_cache(maxsize=2)(self.epoch_order)  # a batch may span two epochs

    def __len__(self):
        return len(self.tokens)

    def epoch_order(self, epoch):
        """(phase, order of the blocks). RandomState, since numpy has frozen its streams: a run
        resumes on the same data under another numpy."""
        rng = np.random.RandomState([self.seed, epoch])
        phase = rng.randint(self.n_phases)
        return phase, rng.permutation(self.n_blocks)

    def position(self, n):
        """Where sample n begins in the file."""
        phase, order = self.epoch_order(n // self.n_blocks)
        return int(phase + order[n % self.n_blocks] * self.block_size)

    def batch(self, first, size):
        """Samples first to first + size: inputs and targets, (size, T) int64 each."""
        return self.read([(self.position(n), 0) for n in range(first, first + size)])

    def count_targets(self, first, size):
        """How many targets of these samples count in the loss; reads the mask alone."""
        if self.mask is None:
            return size * self.block_size
        starts = (self.position(n) + 1 for n in range(first, first + size))
        return sum(int(np.count_nonzero(self.mask[s:s + self.block_size])) for s in starts)

    def count_long(self, eot):
        """(how many examples have more than block_size tokens, how many there are); end-of-text
        ends each."""
        ends = np.flatnonzero(self.tokens == eot)
        return int((np.diff(ends, prepend=-1) > self.block_size).sum()), len(ends)

    def windows(self, count: int = 0, stride: int | None = None) -> list[tuple[int, int]]:
        """[(start, first), ...]: each window reads block_size inputs from `start`, and its targets
        from the first-th on count. `count` of them lie evenly over the split, the same at each
        call. With 0, or if that many would overlap, they cover all of it: each token but the first
        is a target once, behind at least block_size - stride tokens, the beginning aside."""
        targets = len(self.tokens) - 1
        if count and count * self.block_size < targets:
            return [(i * (targets - self.block_size) // max(1, count - 1), 0)
                    for i in range(count)]
        windows, end, stride = [], 0, stride or self.block_size
        for start in range(0, targets, stride):
            windows.append((start, end - start))
            end = min(start + self.block_size, targets)
            if end == targets:
                break
        return windows

    def read(self, windows: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of these windows, (B, T) int64 each. Targets that do not count are -1;
        a last block that the end of the file cuts short is padded with 0 and such targets."""
        x = np.zeros((len(windows), self.block_size), dtype=np.int64)
        y = np.full((len(windows), self.block_size), IGNORED, dtype=np.int64)
        for row, (start, first) in enumerate(windows):
            block = self.tokens[start:start + self.block_size + 1]
            self.check_ids(block, start)
            x[row, :len(block) - 1] = block[:-1]
            y[row, first:len(block) - 1] = block[first + 1:]
            if self.mask is not None:
                keep = self.mask[start + 1:start + len(block)]
                y[row, :len(keep)][keep == 0] = IGNORED
        return torch.from_numpy(x), torch.from_numpy(y)

    def check_ids(self, tokens, start):
        if int(tokens.max()) < self.vocab_size:
            return
        at = int(np.argmax(tokens >= self.vocab_size))
        raise UserError(f"{self.path}: token {start + at} is {tokens[at]}, beyond the model's "
                        f"vocabulary of {self.vocab_size}; the file was made with another "
                        "tokenizer, or is damaged: run its prepare.py again")


def open_dataset(folder: Path, config, seed: int) -> dict[str, TokenBin]:
    """{split: dataset} of a prepared folder, for a model with this config. The one place that
    chooses the class."""
    return {split: TokenBin(folder / f"{split}.bin", config.block_size, config.vocab_size, seed)
            for split in SPLITS}


def dataset_folder(dataset):
    """data/DATASET, or DATASET itself where that is a path to a folder. UserError without one."""
    for folder in (Path("data") / dataset, Path(dataset)):
        if folder.is_dir():
            return folder
    known = sorted(str(p.parent.relative_to("data")) for p in Path("data").glob("**/train.bin"))
    raise UserError(f"the dataset folder data/{dataset} does not exist; "
                    + how_to_prepare(Path("data") / dataset / "train.bin")
                    + (f" (prepared already: {', '.join(known)})" if known else ""))


def open_tokens(path, block_size):
    """The file as a read-only memory map; UserError where it cannot serve."""
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


def open_mask(path, length):
    mask_path = path.with_suffix(".mask.bin")
    if not mask_path.is_file():
        return None
    size = mask_path.stat().st_size
    if size != length:
        raise UserError(f"{mask_path} has {size} entries for the {length} tokens of {path}: they "
                        "are not of one run of prepare.py; run it again, or delete the mask to "
                        "learn every token")
    return np.memmap(mask_path, dtype=np.uint8, mode="r")


def how_to_prepare(path):
    """'run python data/X/prepare.py', for the nearest folder that has one, else data/text's."""
    for folder in (path.parent, path.parent.parent):
        if (folder / "prepare.py").is_file():
            return f"run: python {folder / 'prepare.py'}"
    return f"run: python data/text/prepare.py --input=FILE_OR_FOLDER --out_dir={path.parent}"
