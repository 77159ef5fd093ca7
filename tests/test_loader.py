"""Batches of plain text are a pure function of seed and step; bad .bin files are refused."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotune.errors import UserError
from nanotune.text import bin_files, loader
from nanotune.text.loader import TokenBin, dataset_folder

SIZES = st.tuples(st.integers(2, 400), st.integers(1, 60)).filter(lambda s: s[0] >= s[1] + 1)
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def count_up(tmp_path_factory):
    """count_up(n, T, ...): a TokenBin of the tokens 0, 1, ..., n - 1: each id is its position."""
    folder = tmp_path_factory.mktemp("bins")

    def make(n, block_size, mask=None, **options):
        path = folder / f"{n}-{mask is not None}.bin"
        np.arange(n, dtype="<u2").tofile(path)
        if mask is not None:
            np.asarray(mask, dtype=np.uint8).tofile(path.with_suffix(".mask.bin"))
        return TokenBin(path, block_size, vocab_size=n, **options)
    return make


def write(path, ids):
    np.array(ids, dtype="<u2").tofile(path)
    return path


# -----------------------------------------------------------------------------
# training

@given(SIZES, SEEDS, st.integers(0, 5))
def test_each_token_except_at_the_edges_is_a_target_once_an_epoch(count_up, sizes, seed, epoch):
    n, T = sizes
    data = count_up(n, T, seed=seed)
    x, y = data.batch(epoch * data.n_blocks, data.n_blocks)
    assert x.shape == y.shape == (data.n_blocks, T) and x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1)  # the targets are the next tokens
    targets = y.flatten().tolist()
    assert len(set(targets)) == len(targets)
    assert set(targets) <= set(range(1, n))
    left = (n - 1) - len(targets)
    assert left < 2 * T
    # the tokens left out are at the edges
    assert sorted(targets) == list(range(min(targets), max(targets) + 1))


@settings(max_examples=12)
@given(st.tuples(st.integers(2, 60), st.integers(1, 12)).filter(lambda s: s[0] >= s[1] + 1), SEEDS)
def test_each_token_is_a_target_in_some_epoch(count_up, sizes, seed):
    n, T = sizes
    data = count_up(n, T, seed=seed)
    seen = set()
    for epoch in range(20 * T):
        seen.update(data.batch(epoch * data.n_blocks, data.n_blocks)[1].flatten().tolist())
    assert seen == set(range(1, n))


@given(SIZES, SEEDS, st.integers(0, 300), st.integers(1, 4), st.integers(1, 6))
def test_a_global_batch_is_the_same_however_it_is_split(count_up, sizes, seed, step, micros, size):
    n, T = sizes
    whole = count_up(n, T, seed=seed).batch(step * micros * size, micros * size)
    fresh = count_up(n, T, seed=seed)
    parts = [fresh.batch(step * micros * size + micro * size, size)
             for micro in reversed(range(micros))][::-1]
    for i in (0, 1):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])


@given(SIZES, SEEDS, st.integers(1, 120))
def test_a_step_can_be_read_without_the_steps_before_it(count_up, sizes, seed, far):
    n, T = sizes
    walked = count_up(n, T, seed=seed)
    for first in range(0, far + 1, 7):
        last = walked.batch(first, 7)
    direct = count_up(n, T, seed=seed).batch(far // 7 * 7, 7)
    assert all(torch.equal(a, b) for a, b in zip(last, direct))


def test_the_order_differs_among_seeds_and_epochs(count_up):
    data, other = count_up(400, 8, seed=1), count_up(400, 8, seed=2)
    N = data.n_blocks
    first, second = data.batch(0, N)[0], data.batch(N, N)[0]
    assert not torch.equal(first, second) and not torch.equal(first, other.batch(0, N)[0])
    phases = {data.epoch_order(epoch)[0] for epoch in range(200)}
    assert phases == set(range(data.n_phases))


def test_the_order_is_the_same_in_every_version():
    """A run must resume exactly under a later version, so the positions are fixed here."""
    data = object.__new__(TokenBin)
    data.seed, data.n_phases, data.n_blocks, data.block_size = 1337, 16, 10, 8
    expected = np.random.RandomState([1337, 3])
    phase, order = expected.randint(16), expected.permutation(10)
    assert [data.position(30 + i) for i in range(10)] == [phase + 8 * b for b in order]
    assert data.position(30) == 65


def test_a_batch_can_span_two_epochs(count_up):
    data = count_up(100, 10, seed=3)
    N = data.n_blocks
    across = data.batch(N - 2, 5)[0]
    assert torch.equal(across[:2], count_up(100, 10, seed=3).batch(N - 2, 2)[0])
    assert torch.equal(across[2:], count_up(100, 10, seed=3).batch(N, 3)[0])


def test_a_file_of_exactly_one_block_gives_that_block_in_each_row(count_up):
    data = count_up(11, 10)
    x, y = data.batch(0, 3)
    assert x.tolist() == [list(range(10))] * 3 and y.tolist() == [list(range(1, 11))] * 3
    assert data.windows(5) == data.windows() == [(0, 0)]


# -----------------------------------------------------------------------------
# evaluation

@given(SIZES)
def test_the_windows_of_a_whole_split_have_each_target_once(count_up, sizes):
    n, T = sizes
    data = count_up(n, T)
    starts = data.windows(0)
    x, y = data.read(starts)
    assert y[y != -1].tolist() == list(range(1, n))
    assert torch.equal(x[y != -1] + 1, y[y != -1]) and (x >= 0).all()
    assert (y == -1).sum() == len(starts) * T - (n - 1) < T


@given(SIZES, st.integers(1, 40), SEEDS)
def test_windows_are_evenly_spaced_and_the_same_for_any_seed(count_up, sizes, count, seed):
    n, T = sizes
    windows = count_up(n, T, seed=seed).windows(count)
    assert windows == count_up(n, T, seed=0).windows(count)
    starts = [start for start, first in windows]
    assert not any(first for _, first in windows)
    if count * T >= n - 1:
        assert starts == list(range(0, n - 1, T))
        return
    assert len(starts) == count and starts[0] == 0
    if count > 1:
        assert starts[-1] + T == n - 1  # the last window ends with the file
        gaps = np.diff(starts)
        assert gaps.min() >= T and gaps.max() - gaps.min() <= 1


def test_reading_for_evaluation_does_not_change_the_training_order(count_up):
    data = count_up(200, 8, seed=5)
    before = data.batch(10, 4)
    data.read(data.windows(7))
    assert torch.equal(before[0], data.batch(10, 4)[0])


# -----------------------------------------------------------------------------
# masks

@given(SIZES, st.integers(0, 40), st.integers(1, 9), st.randoms(use_true_random=False))
def test_masked_tokens_are_not_targets(count_up, sizes, first, size, random):
    n, T = sizes
    mask = [random.choice((0, 1, 255)) for _ in range(n)]
    plain, masked = count_up(n, T, seed=4), count_up(n, T, mask, seed=4)
    for (x, y), (mx, my) in ((plain.batch(first, size), masked.batch(first, size)),
                             (plain.read(plain.windows()), masked.read(masked.windows()))):
        assert torch.equal(x, mx)
        kept = torch.tensor([[t != -1 and mask[t] > 0 for t in row] for row in y.tolist()])
        assert torch.equal(my, torch.where(kept, y, -1))
    assert masked.count_targets(first, size) == int((masked.batch(first, size)[1] != -1).sum())
    assert plain.count_targets(first, size) == size * T


# -----------------------------------------------------------------------------
# bad files

@pytest.fixture
def bin_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    return (tmp_path / "data" / "mine" / "train.bin").relative_to(tmp_path)


def refuse(path, message, block_size=4, vocab_size=50):
    with pytest.raises(UserError, match=message) as error:
        TokenBin(path, block_size, vocab_size)
    assert "\n" not in str(error.value) and "train.bin" in str(error.value)


def test_missing_empty_odd_and_short_files_are_refused(bin_path):
    text = r"run: python data/text/prepare.py --input=FILE_OR_FOLDER --out_dir=data/mine"
    refuse(bin_path, f"train.bin does not exist; {text}")
    bin_path.write_bytes(b"")
    refuse(bin_path, f"train.bin is empty; {text}")
    bin_path.write_bytes(b"123456789")
    refuse(bin_path, f"odd size, 9 bytes, .*{text}")
    bin_path.with_name("prepare.py").touch()
    refuse(bin_path, r"odd size.*run: python data/mine/prepare.py$")
    write(bin_path, range(4))
    refuse(bin_path, "has 4 tokens; block_size=4 needs 5: use --block_size=3 or less")
    assert TokenBin(bin_path, 3, 50).n_blocks == 1
    write(bin_path, [7])
    with pytest.raises(UserError, match=r"has 1 tokens.*needs more text") as error:
        TokenBin(bin_path, 4, 50)
    assert "--block_size" not in str(error.value)  # no block size would fit


def test_an_id_beyond_the_vocabulary_is_refused(bin_path, monkeypatch):
    write(bin_path, list(range(40)) + [49, 50, 65535] + [0] * 40)
    refuse(bin_path, r"train.bin: token 41 is 50, beyond the model's vocabulary of 50")
    assert len(TokenBin(bin_path, 4, 65536)) == 83
    monkeypatch.setattr(loader, "SCAN_LIMIT", 10)  # larger files are checked when they are read
    data = TokenBin(bin_path, 4, 50)
    data.read([(0, 0), (36, 0)])
    for start in (37, 38, 41):
        with pytest.raises(UserError, match="token 41 is 50"):
            data.read([(0, 0), (start, 0)])


@pytest.mark.parametrize("length", [0, 9, 11, 20])
def test_a_mask_of_another_length_is_refused(bin_path, length):
    write(bin_path, range(10))
    bin_path.with_suffix(".mask.bin").write_bytes(b"\1" * length)
    refuse(bin_path, rf"train.mask.bin has {length} entries for the 10 tokens")


def test_the_fingerprint_changes_with_any_token_or_mask(tmp_path, monkeypatch):
    path, tokens = tmp_path / "train.bin", np.arange(100, dtype="<u2")

    def fingerprint(tokens, mask=None):
        tokens.tofile(path)
        path.with_suffix(".mask.bin").unlink(missing_ok=True)
        if mask is not None:
            mask.tofile(path.with_suffix(".mask.bin"))
        return TokenBin(path, 4, 200).fingerprint

    for piece in (2**19, 7):
        monkeypatch.setattr(bin_files, "PIECE", piece)
        changed = [tokens[:99], np.append(tokens, 7).astype("<u2"), tokens[::-1].copy()]
        for at in (0, 50, 99):
            changed.append(tokens.copy())
            changed[-1][at] = 150
        masks = [np.ones(100, np.uint8), np.eye(1, 100, dtype=np.uint8)[0]]
        found = [*map(fingerprint, [tokens, *changed]), *(fingerprint(tokens, m) for m in masks)]
        assert len(set(found)) == len(found) and fingerprint(tokens) == found[0]


def test_the_fingerprint_of_a_large_file_reads_only_parts_of_it(monkeypatch):
    sizes = []
    monkeypatch.setattr(bin_files.zlib, "crc32", lambda data, crc: sizes.append(data.nbytes) or 0)
    data = TokenBin("a name", 4, 2, tokens=np.broadcast_to(np.uint16(1), 10**9))
    assert data.fingerprint == (10**9, 0)
    assert 32 * 2**20 < sum(sizes) * 3 / 2 <= 64 * 2**20  # 3 / 2: a mask adds half as much


def test_a_dataset_is_found_by_name_or_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "books" / "old").mkdir(parents=True)
    write(tmp_path / "data" / "books" / "old" / "train.bin", [1, 2])
    assert str(dataset_folder("books/old")) == "data/books/old"
    assert dataset_folder("data/books").samefile(tmp_path / "data" / "books")
    assert dataset_folder(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match=r"data/none does not exist; run: python \S+prepare.py .*"
                                         r"\(prepared already: books/old\)"):
        dataset_folder("none")
    (tmp_path / "data" / "books" / "prepare.py").touch()
    with pytest.raises(UserError, match=r"run: python data/books/prepare.py"):
        dataset_folder("books/new")
