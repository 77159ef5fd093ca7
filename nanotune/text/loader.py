"""Reads token files as batches: a batch is a pure function of (seed, sample number).

A .bin file holds uint16 token ids end to end, without a header. An optional .mask.bin holds one
byte per token, 0 if the token is not a target of the loss. If there is a .pairs.bin, the .bin file
holds pairs for T5. The .pairs.bin has two uint32 per pair: the numbers of tokens of the source and
of the target.

Sample n belongs to epoch n // N. Each epoch cuts the file into N blocks of T tokens, from a random
offset on (the phase), and shuffles them; both depend on the seed. So each token is a target once
per epoch, except for less than two blocks at the edges. A resumed run needs only its step. A global
batch is the same for any number of ranks and micro-steps. Each pair comes once per epoch.
"""
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanotune.errors import UserError
from nanotune.text.bin_files import (
    check_ids,
    check_length,
    checksum,
    how_to_prepare,
    open_lengths,
    open_mask,
    open_tokens,
)

IGNORED = -1         # a target that does not count in the loss
SPLITS = ("train", "val")
SCAN_LIMIT = 2**28   # tokens: a file up to this size is checked when it is opened (0.2 s)
SORTED = 32          # global batches of pairs that are sorted by length together


class TokenBin:
    """One split of a dataset, read in blocks of block_size inputs and as many targets.

    `tokens`, if given, are used instead of the file's; `path` is then only a name for messages.
    Raises UserError, here or on reading, if the file is unusable or an id is not below vocab_size.
    """
    def __init__(self, path: str | Path, block_size: int, vocab_size: int, seed: int = 0,
                 tokens: np.ndarray | None = None) -> None:
        self.path, self.block_size = Path(path), block_size
        self.vocab_size, self.seed, self.mask = vocab_size, seed, None
        if tokens is None:
            self.tokens = open_tokens(self.path, block_size)
            self.mask = open_mask(self.path, len(self.tokens))
        else:
            self.tokens = tokens
        if len(self.tokens) <= SCAN_LIMIT:
            check_ids(self.path, self.tokens, 0, self.vocab_size)
        targets = len(self.tokens) - 1
        self.n_blocks = max(1, targets // block_size - 1)
        # possible offsets of the first block: with the largest, the file's last token is read
        self.n_phases = targets - self.n_blocks * block_size + 1
        self.epoch_order = lru_cache(maxsize=2)(self.epoch_order)  # a batch may span two epochs

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def fingerprint(self) -> tuple[int, int]:
        """(Number of tokens, CRC-32 of tokens and mask); reads at most 64 MB, spread evenly."""
        return len(self.tokens), checksum(self.tokens, self.mask)

    @property
    def tokens_per_sample(self) -> int:
        return self.block_size

    def largest(self, config: Any) -> Any:
        """Returns the model's config for the largest batch: unchanged, since all have one shape."""
        return config

    def epoch_order(self, epoch: int) -> tuple[int, np.ndarray]:
        """(phase, order of the blocks). Uses RandomState, whose streams numpy never changes: a run
        resumes with the same data under another version of numpy."""
        rng = np.random.RandomState([self.seed, epoch])
        phase = rng.randint(self.n_phases)
        return phase, rng.permutation(self.n_blocks)

    def position(self, n: int) -> int:
        """The index of sample n's first token."""
        phase, order = self.epoch_order(n // self.n_blocks)
        return int(phase + order[n % self.n_blocks] * self.block_size)

    def batch(self, first: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns inputs and targets of samples first to first + size - 1, (size, T) int64 each."""
        return self.read([(self.position(n), 0) for n in range(first, first + size)])

    def count_targets(self, first: int, size: int) -> int:
        """Returns how many targets of these samples count in the loss; reads only the mask."""
        if self.mask is None:
            return size * self.block_size
        check_length(self.path, self.mask)
        starts = (self.position(n) + 1 for n in range(first, first + size))
        return sum(int(np.count_nonzero(self.mask[s:s + self.block_size])) for s in starts)

    def count_long(self, eot: int) -> tuple[int, int]:
        """Returns (examples of more than block_size tokens, all examples); eot ends an example."""
        ends = np.flatnonzero(self.tokens == eot)
        return int((np.diff(ends, prepend=-1) > self.block_size).sum()), len(ends)

    def warnings(self, eot: int | None) -> list[str]:
        """Returns a line on long examples, if there are prompts and completions."""
        long, examples = (0, 0) if self.mask is None or eot is None else self.count_long(eot)
        return [f"{long:,} of {examples:,} examples are longer than block_size={self.block_size}: "
                "they do not fit in a window, so the model sees their end without their "
                "beginning; raise --block_size or shorten them"] if long else []

    def windows(self, count: int = 0, stride: int | None = None) -> list[tuple[int, int]]:
        """Returns [(start, first), ...]: a window has block_size inputs from token `start` on, and
        its targets count from index `first` on. `count` windows are evenly spaced. If count is 0
        or they would overlap, windows every `stride` tokens cover the split: each token but the
        first is a target once, with at least block_size - stride tokens of context, except near the
        start."""
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
        """Returns inputs and targets of these windows, (B, T) int64 each. Targets that do not count
        are -1. A block cut short by the end of the file is padded with input 0 and target -1."""
        check_length(self.path, self.tokens, self.mask)
        x = np.zeros((len(windows), self.block_size), dtype=np.int64)
        y = np.full((len(windows), self.block_size), IGNORED, dtype=np.int64)
        for row, (start, first) in enumerate(windows):
            block = self.tokens[start:start + self.block_size + 1]
            check_ids(self.path, block, start, self.vocab_size)
            x[row, :len(block) - 1] = block[:-1]
            y[row, first:len(block) - 1] = block[first + 1:]
            if self.mask is not None:
                keep = self.mask[start + 1:start + len(block)]
                y[row, :len(keep)][keep == 0] = IGNORED
        return torch.from_numpy(x), torch.from_numpy(y)


class PairBin:
    """One split of a dataset of pairs, each a source and a target, both with their end token.

    `config` is a T5Config. A source longer than source_length is cut but keeps its end token; a
    target longer than target_length is cut. A global batch of `global_batch` pairs is drawn first
    and then divided among ranks and micro-steps. Raises UserError as TokenBin does.
    """
    def __init__(self, path: str | Path, config: Any, seed: int = 0,
                 global_batch: int = 1) -> None:
        self.path, self.seed, self.global_batch = Path(path), seed, global_batch
        self.vocab_size = config.vocab_size
        self.most = np.array([config.source_length, config.target_length])
        self.tokens = open_tokens(self.path, 1)
        self.lengths = open_lengths(self.path, len(self.tokens))  # (N, 2)
        self.starts = self.lengths.sum(1).cumsum() - self.lengths.sum(1)
        self.read_lengths = np.minimum(self.lengths, self.most)
        self.n_blocks = len(self.lengths)  # samples of an epoch
        if len(self.tokens) <= SCAN_LIMIT:
            check_ids(self.path, self.tokens, 0, self.vocab_size)
        self.epoch_order = lru_cache(maxsize=2)(self.epoch_order)  # a batch may span two epochs

    def __len__(self) -> int:
        return int(self.read_lengths.sum())

    @cached_property
    def fingerprint(self) -> tuple[int, int]:
        """As TokenBin's, of tokens and lengths."""
        return len(self.tokens), checksum(self.tokens, self.lengths)

    @property
    def tokens_per_sample(self) -> float:
        return float(self.read_lengths.sum(1).mean())

    def largest(self, config: Any) -> Any:
        """Returns the model's config with the lengths of the largest batch, for the plan."""
        source, target = map(padded_length, self.read_lengths.max(0).tolist())
        return replace(config, source_length=source, target_length=target)

    def warnings(self, eot: int | None) -> list[str]:
        """Returns a line if sources are cut, and a line if targets are cut."""
        cut = (self.lengths > self.most).sum(0)
        return [f"{n:,} of {len(self.lengths):,} {name}s are longer than {name}_length={most} and "
                f"are cut; raise --{name}_length or shorten them"
                for name, n, most in zip(("source", "target"), cut, self.most) if n]

    def epoch_order(self, epoch: int) -> np.ndarray:
        """The pairs in the order of an epoch, (N,). Pairs are sorted by length within groups of
        SORTED global batches, so that a batch has little padding; then the batches are shuffled.
        The pairs of a batch that two epochs share are not sorted."""
        rng = np.random.RandomState([self.seed, epoch])
        n, size = len(self.lengths), self.global_batch
        order = rng.permutation(n)
        begin = min(-epoch * n % size, n)  # pairs that fill the previous epoch's last batch
        end = begin + (n - begin) // size * size
        batches = order[begin:end].copy()
        for group in np.split(batches, range(SORTED * size, len(batches), SORTED * size)):
            source, target = self.read_lengths[group].T
            group[:] = group[np.lexsort((target, source))]
        batches = batches.reshape(-1, size)
        batches = batches[rng.permutation(len(batches))]
        return np.concatenate([order[:begin], batches.ravel(), order[end:]])

    def pairs(self, first: int, size: int) -> list[int]:
        """The numbers of the pairs that are samples first to first + size - 1."""
        n = len(self.lengths)
        return [int(self.epoch_order(i // n)[i % n]) for i in range(first, first + size)]

    def batch(self, first: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As TokenBin's; sources and targets as read()."""
        return self.read(self.pairs(first, size))

    def count_targets(self, first: int, size: int) -> int:
        """As TokenBin's."""
        return int(self.read_lengths[self.pairs(first, size), 1].sum())

    def windows(self, count: int = 0, stride: int | None = None) -> list[int]:
        """Returns the numbers of `count` pairs, evenly spaced in the file, or of all if count is 0
        or too large. The longest come first, for little padding. `stride` is not used."""
        n = len(self.lengths)
        chosen = np.arange(n)
        if 0 < count < n:
            chosen = np.arange(count) * (n - 1) // max(1, count - 1)
        source, target = -self.read_lengths[chosen].T
        return chosen[np.lexsort((target, source))].tolist()

    def read(self, pairs: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns sources (B, S) and targets (B, T) of these pairs, int64, padded with -1."""
        check_length(self.path, self.tokens)
        S, T = map(padded_length, self.read_lengths[pairs].max(0).tolist())
        x = np.full((len(pairs), S), IGNORED, dtype=np.int64)
        y = np.full((len(pairs), T), IGNORED, dtype=np.int64)
        for row, pair in enumerate(pairs):
            start, (n_source, n_target) = int(self.starts[pair]), self.lengths[pair].tolist()
            ids = self.tokens[start:start + n_source + n_target]
            check_ids(self.path, ids, start, self.vocab_size)
            source, target = self.read_lengths[pair].tolist()
            x[row, :source] = ids[:source]
            x[row, source - 1] = ids[n_source - 1]  # a source that is cut keeps its end token
            y[row, :target] = ids[n_source:n_source + target]
        return torch.from_numpy(x), torch.from_numpy(y)


def padded_length(n: int) -> int:
    """Returns the length that n tokens are padded to. There are 8 lengths per power of 2, so at
    most a ninth is padding, and torch.compile and the allocator see few shapes."""
    step = max(1, 1 << n.bit_length() >> 4)
    return -(-n // step) * step


def open_dataset(path: str | Path, config: Any, seed: int = 0, tokens: np.ndarray | None = None,
                 global_batch: int = 1) -> TokenBin | PairBin:
    """Returns the dataset of a .bin file, or of a text in memory (see TokenBin), for a model's
    config. This is the only place that chooses the class. Raises UserError as TokenBin does, and if
    the model takes pairs and the data is plain text, or the other way round."""
    path = Path(path)
    has_pairs = tokens is None and path.with_suffix(".pairs.bin").is_file()
    if has_pairs and not config.takes_pairs:
        raise UserError(f"{path} holds pairs of a source and a target, for T5: use a T5 "
                        "(--init_from=google-t5/t5-small), or for a GPT prepare them with "
                        "data/jsonl/prepare.py")
    if config.takes_pairs and not has_pairs:
        raise UserError(f"{path} holds plain text, but T5 takes pairs of a source and a target; "
                        "run: python data/pairs/prepare.py --input=FILE --tokenizer=MODEL "
                        f"--out_dir={path.parent}")
    if has_pairs:
        return PairBin(path, config, seed, global_batch)
    return TokenBin(path, config.block_size, config.vocab_size, seed, tokens)


def dataset_folder(dataset: str) -> Path:
    """Returns data/DATASET, or else the folder DATASET. Raises UserError if neither exists."""
    for folder in (Path("data") / dataset, Path(dataset)):
        if folder.is_dir():
            return folder
    raise UserError(f"the dataset folder {Path('data') / dataset} does not exist; "
                    + how_to_prepare(Path("data") / dataset / "train.bin") + prepared())


def prepared() -> str:
    """' (prepared already: A, B)' with the datasets in data/, or ''."""
    known = sorted(str(p.parent.relative_to("data")) for p in Path("data").glob("**/train.bin"))
    return f" (prepared already: {', '.join(known)})" if known else ""
