"""Encodes many texts to arrays of ids: with a thread per core, or with a table of characters."""
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from nanotune.errors import UserError


def encode_in_threads(encode: Callable[[str], np.ndarray], texts: Sequence[str],
                      ) -> list[np.ndarray]:
    """Returns encode(text) for each text; `encode` must release the GIL. Short texts share a task.
    """
    threads = os.cpu_count() or 1
    size = len(texts) // (64 * threads) + 1
    with ThreadPoolExecutor(threads) as pool:
        groups = pool.map(lambda i: [*map(encode, texts[i:i + size])], range(0, len(texts), size))
        return [ids for group in groups for ids in group]


def encode_characters(stoi: dict[str, int], texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the ids of each text's characters, (n,) int32. Raises UserError for a character
    without an id."""
    known = {ord(c): i for c, i in stoi.items() if len(c) == 1}
    table = np.full(max(known, default=0) + 2, -1, np.int32)  # the last entry: all others
    table[list(known)] = list(known.values())
    found = []
    for text in texts:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        found.append(table[np.minimum(points, len(table) - 1)])
        if len(text) and found[-1].min() < 0:
            raise UserError(f"the character {text[found[-1].argmin()]!r} is not in the model's "
                            f"vocabulary of {len(stoi)}; use only these: {''.join(stoi)!r}")
    return found
