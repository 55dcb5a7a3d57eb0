"""Batches as a pure function of (seed, step): no iterator state, so resuming is exact.

Training reads a stream in windows at random places. Of the other packings, every row comes once an
epoch, in an order of its own for each epoch. A host may ask for its own rows of a batch alone.
"""

import contextlib
import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt64

from tinyllm_jax.data.shards import Shard, Split

S = TypeVar("S")
T = TypeVar("T")
Rows = slice | Int64[np.ndarray, " rows"]  # of a batch, by their places in it
# Four rounds make a good permutation of a cipher's round function; ours is only a mixer.
FEISTEL_ROUNDS = 6
SORTED_ROWS = 1024


@dataclass(frozen=True)
class Batch:
    """Rows of one pass: the model reads `tokens` and predicts `targets` where `loss_mask` is True.

    `positions` begin at 0 in every document of a row, and `segment_ids` number the documents from
    1, with 0 for padding. Both are None where plain causal attention is right: in a stream and with
    one document a row.
    """

    tokens: Int32[np.ndarray, "rows seq"]
    targets: Int32[np.ndarray, "rows seq"]
    loss_mask: Bool[np.ndarray, "rows seq"]
    positions: Int32[np.ndarray, "rows seq"] | None
    segment_ids: Int32[np.ndarray, "rows seq"] | None


class Batches:
    """Training batches: `batch(step)` is the same whenever, and in whatever parts, it is asked."""

    def __init__(self, split: Split, *, rows_per_step: int, seed: int):
        """Take the split, the rows of one optimizer step, and the seed of their order."""
        self._split = split
        self._rows_per_step = rows_per_step
        self._seed = seed
        self._reader = RowReader(split, stride=1, whole_windows=True)

    @property
    def rows(self) -> int:
        """Rows to choose from: windows of a stream, or the stored rows, which make an epoch."""
        return self._reader.rows

    def batch(self, step: int, *, rows: Rows | None = None) -> Batch:
        """Read the batch of one step, counted from 0, or some of its rows."""
        return self._reader.read(self._chosen(step)[slice(None) if rows is None else rows])

    def places(self, step: int) -> Int64[np.ndarray, " rows"]:
        """Say where the rows of one step are when all shards are laid end to end.

        Returns:
            The first token of each window of a stream, else the numbers of the stored rows.
        """
        return self._reader.places(self._chosen(step))

    def _chosen(self, step: int) -> Int64[np.ndarray, " rows"]:
        size = self._rows_per_step
        if self._split.packing == "stream":
            return random_places(size, count=self.rows, seed=self._seed, step=step)
        return epoch_rows(step * size, size=size, count=self.rows, seed=self._seed)


class EvaluationBatches:
    """The same rows in the same order every time, each target once.

    All batches have one shape: the last is filled up with rows whose `loss_mask` is False.
    """

    def __init__(self, split: Split, *, batch_size: int, count: int):
        """Take the first `count` batches of `batch_size` rows, or all of them when it is 0."""
        self._batch_size = batch_size
        self._reader = RowReader(split, stride=split.sequence_length, whole_windows=False)
        whole = -(-self._reader.rows // batch_size)
        self._count = min(count, whole) if count else whole

    def __len__(self) -> int:
        """Count the batches."""
        return self._count

    def batch(self, index: int, *, rows: Rows | None = None) -> Batch:
        """Read one batch, counted from 0, or some of its rows."""
        chosen = np.arange(index * self._batch_size, (index + 1) * self._batch_size)
        chosen[chosen >= self._reader.rows] = -1
        return self._reader.read(chosen[slice(None) if rows is None else rows])

    def __iter__(self) -> Iterator[Batch]:
        """Read all batches in order."""
        return map(self.batch, range(len(self)))


class RowReader:
    """Number the rows of all shards and read any of them as a batch.

    Row i of a stream's shard is the window that begins at token `i * stride`; windows never cross
    shards. Where windows need not be whole, the last one of a shard is padded.
    """

    def __init__(self, split: Split, *, stride: int, whole_windows: bool):
        """Count the rows of every shard."""
        self._split = split
        self._stride = stride
        self._masked = any(shard.learn is not None for shard in split.shards)
        counts = [self._count(shard, whole_windows=whole_windows) for shard in split.shards]
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self.rows = int(self._ends[-1])

    def _count(self, shard: Shard, *, whole_windows: bool) -> int:
        if self._split.packing != "stream":
            return len(shard.tokens)
        first_tokens = len(shard.tokens) - (self._split.sequence_length if whole_windows else 1)
        return max(0, -(-first_tokens // self._stride))

    def places(self, rows: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
        """Say where rows are when all shards are laid end to end."""
        if self._split.packing != "stream":
            return rows
        sizes = np.cumsum([0, *(len(shard.tokens) for shard in self._split.shards)])
        shards = np.searchsorted(self._ends, rows, side="right")
        return sizes[shards] + (rows - self._starts[shards]) * self._stride

    def read(self, rows: Int64[np.ndarray, " rows"]) -> Batch:
        """Read rows by number; -1 gives a row of padding."""
        shards = np.searchsorted(self._ends, rows, side="right")
        places = rows - self._starts[shards]
        shape = (len(rows), self._split.sequence_length + 1)
        tokens = np.full(shape, self._split.pad_id, np.int32)
        lengths = np.zeros(len(rows), np.int32)
        segments = np.zeros(shape, np.int32) if self._split.packing == "packed" else None
        learn = np.ones(shape, bool) if self._masked else None
        for row, (index, place) in enumerate(zip(shards.tolist(), places.tolist(), strict=True)):
            if rows[row] < 0:
                continue
            shard = self._split.shards[index]
            if self._split.packing == "stream":
                start = place * self._stride
                window = shard.tokens[start : start + shape[1]]
                tokens[row, : len(window)] = window
                lengths[row] = len(window)
                continue
            tokens[row] = shard.tokens[place]
            if shard.lengths is not None:
                lengths[row] = shard.lengths[place]
            if segments is not None and shard.segments is not None:
                segments[row] = shard.segments[place]
            if learn is not None and shard.learn is not None:
                learn[row] = shard.learn[place]
        if segments is not None:
            batch = segment_batch(tokens, segments)
        else:
            batch = length_batch(tokens, lengths)
        if learn is None:
            return batch
        return dataclasses.replace(batch, loss_mask=batch.loss_mask & learn[:, 1:])


def length_batch(
    tokens: Int32[np.ndarray, "rows width"], lengths: Int32[np.ndarray, " rows"]
) -> Batch:
    """Make a batch of rows that hold `lengths` tokens each and padding behind."""
    targets = np.ascontiguousarray(tokens[:, 1:])
    return Batch(
        tokens=np.ascontiguousarray(tokens[:, :-1]),
        targets=targets,
        loss_mask=np.arange(1, tokens.shape[1]) < lengths[:, None],
        positions=None,
        segment_ids=None,
    )


def segment_batch(
    tokens: Int32[np.ndarray, "rows width"], segments: Int32[np.ndarray, "rows width"]
) -> Batch:
    """Make a batch of rows that hold several documents, whose last tokens predict nothing."""
    width = tokens.shape[1]
    before, after = segments[:, :-1], segments[:, 1:]
    starts = np.zeros(before.shape, np.int32)
    places = np.arange(width - 1, dtype=np.int32)
    np.multiply(before[:, 1:] != before[:, :-1], places[1:], out=starts[:, 1:])
    return Batch(
        tokens=np.ascontiguousarray(tokens[:, :-1]),
        targets=np.ascontiguousarray(tokens[:, 1:]),
        loss_mask=(before == after) & (after > 0),
        positions=places - np.maximum.accumulate(starts, axis=1),
        segment_ids=np.ascontiguousarray(before),
    )


def random_places(size: int, *, count: int, seed: int, step: int) -> Int64[np.ndarray, " size"]:
    """Draw `size` numbers below `count`, as a function of (seed, step) alone.

    The raw bits of Philox are the same in every NumPy, which its `integers` does not promise. The
    remainder favours small numbers by less than `count / 2**64`.

    Source:
        Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    bits = np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(size)
    return (bits % np.uint64(count)).astype(np.int64)


def epoch_rows(first: int, *, size: int, count: int, seed: int) -> Int64[np.ndarray, " size"]:
    """Pick `size` rows of an endless run of epochs, each with `count` rows in an order of its own.

    Args:
        first: Rows that came before.
    """
    chosen, last = [], first + size
    while first < last:
        epoch, place = divmod(first, count)
        stop = min(place + last - first, count)
        chosen.append(permute(np.arange(place, stop), count=count, seed=seed, epoch=epoch))
        first += stop - place
    return np.concatenate(chosen)


def permute(
    numbers: Int64[np.ndarray, " size"], *, count: int, seed: int, epoch: int
) -> Int64[np.ndarray, " size"]:
    """Look numbers below `count` up in the permutation that belongs to (seed, epoch).

    No table is made: a Feistel network permutes the next power of 2, and a number that lands
    outside goes through again until it is inside, which makes a permutation still. Only small sets,
    whose few bits it mixes unevenly, are sorted by hash.

    Source:
        Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 4 (cycle walking).
    """
    key = mix(mix(np.array([seed], np.uint64)) + np.uint64(epoch))
    if count <= SORTED_ROWS:
        return np.argsort(mix(key + np.arange(count, dtype=np.uint64)), kind="stable")[numbers]
    keys = mix(key + np.arange(FEISTEL_ROUNDS, dtype=np.uint64))
    bits = (count - 1).bit_length()
    permuted = feistel(numbers.astype(np.uint64), bits=bits, keys=keys)
    while (outside := np.flatnonzero(permuted >= count)).size:
        permuted[outside] = feistel(permuted[outside], bits=bits, keys=keys)
    return permuted.astype(np.int64)


def feistel(
    numbers: UInt64[np.ndarray, " size"], *, bits: int, keys: UInt64[np.ndarray, " rounds"]
) -> UInt64[np.ndarray, " size"]:
    """Permute numbers of so many bits: each round changes one half by a hash of the other.

    The halves trade places, and of an odd number of bits their sizes, every round; after an even
    number of rounds each is back where it was.
    """
    assert len(keys) % 2 == 0
    low_bits, high_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    high = numbers >> low_bits
    low = numbers & ((np.uint64(1) << low_bits) - np.uint64(1))
    shift_of = [np.uint64(64) - high_bits, np.uint64(64) - low_bits]
    for turn in range(len(keys)):
        high, low = low, high ^ (mix(low + keys[turn : turn + 1]) >> shift_of[turn % 2])
    return (high << low_bits) | low


def mix(numbers: UInt64[np.ndarray, " size"]) -> UInt64[np.ndarray, " size"]:
    """Scatter the bits of each number over all 64.

    Source:
        Steele et al. 2014, "Fast splittable pseudorandom number generators": splitmix64.
    """
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers ^= numbers >> np.uint64(30)
    numbers *= np.uint64(0xBF58476D1CE4E5B9)
    numbers ^= numbers >> np.uint64(27)
    numbers *= np.uint64(0x94D049BB133111EB)
    numbers ^= numbers >> np.uint64(31)
    return numbers


@contextlib.contextmanager
def prefetch(
    function: Callable[[S], T], inputs: Iterable[S], *, depth: int
) -> Iterator[Iterator[T]]:
    """Compute `function` of each input, in order, in a thread, `depth` ahead.

    What `function` raises comes out of the `next` that asks for its result. When the block ends, the
    thread does too.
    """
    waiting = iter(inputs)
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as executor:
        ahead = deque(executor.submit(function, each) for each in itertools.islice(waiting, depth))

        def results() -> Iterator[T]:
            while ahead:
                ahead.extend(
                    executor.submit(function, each) for each in itertools.islice(waiting, 1)
                )
                yield ahead.popleft().result()

        try:
            yield results()
        finally:
            executor.shutdown(cancel_futures=True)
