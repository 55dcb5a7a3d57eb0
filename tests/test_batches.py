"""Batches are a pure function of (seed, step) and show every row or target as often as promised."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllm_jax.data.batches import (
    Batches,
    EvaluationBatches,
    permute,
    prefetch,
    random_places,
    segment_batch,
)
from tinyllm_jax.data.shards import Shard, Split

PACKINGS = ["stream", "padded", "packed"]
SEQUENCE_LENGTH = 7
WIDTH = SEQUENCE_LENGTH + 1

# What these functions gave when the first runs were made.
RANDOM_PLACES = [104869564, 77992108, 306158901, 323117530]
EPOCH_ORDER = {10: [7, 2, 3, 9, 8, 6], 10000: [8304, 2770, 3726, 295, 273, 4945]}


def make_split(packing: str, sizes: list[int]) -> Split:
    """Make shards of so many tokens (stream) or rows, with ids that never repeat."""
    shards, first = [], 1
    for size in sizes:
        count = size if packing == "stream" else size * WIDTH
        tokens = np.arange(first, first + count).astype(np.uint16)
        first += count
        lengths = segments = None
        if packing != "stream":
            tokens = tokens.reshape(size, WIDTH)
        if packing == "padded":
            lengths = np.arange(size, dtype=np.uint32) % (WIDTH - 1) + 2
        if packing == "packed":
            segments = np.tile(np.array([1, 1, 1, 2, 2, 3, 3, 0], np.uint16), (size, 1))
        shards.append(Shard(tokens=tokens, lengths=lengths, segments=segments))
    return Split(
        name="train",
        packing=packing,
        sequence_length=SEQUENCE_LENGTH,
        pad_id=0,
        shards=tuple(shards),
        documents=0,
        text_bytes=0,
        tokens=0,
    )


def arrays(batch) -> list[np.ndarray]:
    fields = [batch.tokens, batch.targets, batch.loss_mask, batch.positions, batch.segment_ids]
    return [field for field in fields if field is not None]


def assert_same(expected, actual):
    assert len(arrays(expected)) == len(arrays(actual))
    for one, other in zip(arrays(expected), arrays(actual), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_batch_depends_on_seed_and_step_alone(packing):
    split = make_split(packing, [40, 3, 57])
    batches = Batches(split, rows_per_step=6, seed=1)
    late = batches.batch(1000)
    for step in (0, 3):
        batches.batch(step)
    assert_same(late, batches.batch(1000))
    assert_same(late, Batches(split, rows_per_step=6, seed=1).batch(1000))
    other_seed = Batches(split, rows_per_step=6, seed=2).batch(1000)
    assert not np.array_equal(late.tokens, other_seed.tokens)
    assert not np.array_equal(late.tokens, batches.batch(1001).tokens)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_range_of_rows_is_that_range_of_the_whole_batch(packing):
    split = make_split(packing, [40, 57])
    for batches in (
        Batches(split, rows_per_step=8, seed=1),
        EvaluationBatches(split, batch_size=8, count=0),
    ):
        whole = batches.batch(1)
        for rows in (slice(0, 3), slice(3, 8), slice(2, 2)):
            for full, part in zip(arrays(whole), arrays(batches.batch(1, rows=rows)), strict=True):
                np.testing.assert_array_equal(full[rows], part)


@pytest.mark.parametrize("packing", PACKINGS)
def test_arrays_have_the_shapes_and_types_that_training_compiles_for(packing):
    split = make_split(packing, [40])
    for batch in (
        Batches(split, rows_per_step=6, seed=1).batch(0),
        EvaluationBatches(split, batch_size=6, count=0).batch(0),
    ):
        for array in arrays(batch):
            assert array.shape == (6, SEQUENCE_LENGTH)
            assert array.flags["C_CONTIGUOUS"]
        types = [str(array.dtype) for array in arrays(batch)]
        assert types == ["int32", "int32", "bool", "int32", "int32"][: len(types)]
        assert (batch.segment_ids is None) == (batch.positions is None) == (packing != "packed")


def test_stream_windows_begin_anywhere_and_never_cross_shards():
    split = make_split("stream", [20, 5, 8, 30])  # 13, 0, 1 and 23 window starts
    batches = Batches(split, rows_per_step=64, seed=0)
    assert batches.rows == 37
    seen: set[int] = set()
    for step in range(30):
        batch = batches.batch(step)
        np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        np.testing.assert_array_equal(batch.targets - batch.tokens, 1)
        assert batch.loss_mask.all()
        seen |= set(batch.tokens[:, 0].tolist())
    starts = [*range(1, 14), 26, *range(34, 57)]
    assert sorted(seen) == starts


def test_stream_windows_are_drawn_evenly():
    counts = np.bincount(
        np.concatenate(
            [random_places(1000, count=50, seed=3, step=s).astype(np.int64) for s in range(100)]
        ),
        minlength=50,
    )
    chi_squared = ((counts - 2000) ** 2 / 2000).sum()
    assert chi_squared < 94  # 49 degrees of freedom exceed it once in ten thousand


def test_random_places_never_change_with_numpy():
    actual = random_places(4, count=1_000_000_007, seed=42, step=7).tolist()
    assert actual == RANDOM_PLACES, "Runs made before would not resume exactly."


@pytest.mark.parametrize("packing", ["padded", "packed"])
@pytest.mark.parametrize("rows_per_step", [1, 4, 7, 250])
def test_every_row_comes_once_an_epoch_although_steps_straddle_epochs(packing, rows_per_step):
    split = make_split(packing, [40, 3, 57])
    batches = Batches(split, rows_per_step=rows_per_step, seed=5)
    assert batches.rows == 100
    steps = -(-300 // rows_per_step)
    first_tokens = np.concatenate([batches.batch(step).tokens[:, 0] for step in range(steps)])
    epochs = first_tokens[:300].reshape(3, 100)
    expected = np.arange(100) * WIDTH + 1
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), expected)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], expected)


@pytest.mark.parametrize("count", [1, 2, 3, 17, 1024, 1025, 2048, 4097])
def test_the_order_of_an_epoch_is_a_permutation(count):
    numbers = np.arange(count)
    orders = [
        permute(numbers, count=count, seed=seed, epoch=epoch)
        for seed in (0, 1)
        for epoch in (0, 1, 2**40)
    ]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), numbers)
    if count >= 16:
        assert len({order.tobytes() for order in orders}) == len(orders)


@pytest.mark.parametrize("count", [1000, 1025, 2048, 30_000])
def test_the_order_of_an_epoch_has_no_pattern(count):
    numbers = np.arange(count)
    order = permute(numbers, count=count, seed=9, epoch=0)
    four_deviations = 4 / count**0.5
    for lag in (1, 2, 100):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < four_deviations
    assert abs(np.corrcoef(order, numbers)[0, 1]) < four_deviations
    assert np.count_nonzero(order == numbers) < 8  # one is expected


def test_small_epochs_reach_every_order_about_evenly():
    for count, orders_there_are, limit in ((3, 6, 25.7), (5, 120, 184.0)):
        drawn = [
            permute(np.arange(count), count=count, seed=1, epoch=epoch)
            for epoch in range(50 * orders_there_are)
        ]
        _, counts = np.unique(drawn, axis=0, return_counts=True)
        assert len(counts) == orders_there_are
        # Chi-squared with one degree of freedom less than orders: once in ten thousand above.
        assert ((counts - 50) ** 2 / 50).sum() < limit


@pytest.mark.parametrize("count", [10, 10_000])
def test_the_order_of_an_epoch_never_changes(count):
    actual = permute(np.arange(6), count=count, seed=42, epoch=3).tolist()
    assert actual == EPOCH_ORDER[count], "Runs made before would not resume exactly."


def test_rows_of_a_huge_set_need_no_table():
    count = 10**12
    order = permute(np.arange(1000), count=count, seed=1, epoch=0)
    assert len(np.unique(order)) == 1000
    assert order.max() < count


def test_padded_rows_are_masked_by_length_and_not_by_the_pad_id():
    tokens = np.array([[5, 0, 6, 0, 0, 0, 0, 0]], np.uint16)  # id 0 is also a real token here
    shard = Shard(tokens=tokens, lengths=np.array([4], np.uint32), segments=None)
    split = make_split("padded", [1])
    split = Split(**{**vars(split), "shards": (shard,)})
    batch = Batches(split, rows_per_step=1, seed=0).batch(0)
    assert batch.targets[0].tolist() == [0, 6, 0, 0, 0, 0, 0]
    assert batch.loss_mask[0].tolist() == [True] * 3 + [False] * 4


def test_packed_rows_restart_positions_and_mask_the_ends_of_documents():
    tokens = np.array([[1, 11, 12, 2, 1, 13, 2, 0, 0]], np.int32)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]], np.int32)
    batch = segment_batch(tokens, segments)
    assert batch.tokens[0].tolist() == [1, 11, 12, 2, 1, 13, 2, 0]
    assert batch.targets[0].tolist() == [11, 12, 2, 1, 13, 2, 0, 0]
    assert batch.segment_ids is not None
    assert batch.positions is not None
    assert batch.segment_ids[0].tolist() == [1, 1, 1, 1, 2, 2, 2, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert batch.loss_mask[0].tolist() == [True, True, True, False, True, True, False, False]


@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=5),
    st.integers(1, 9),
    st.sampled_from(PACKINGS),
)
@settings(max_examples=150, deadline=None)
def test_a_whole_evaluation_sees_every_target_once_in_order(sizes, batch_size, packing):
    split = make_split(packing, sizes)
    batches = list(EvaluationBatches(split, batch_size=batch_size, count=0))
    actual = np.concatenate([batch.targets[batch.loss_mask] for batch in batches])
    expected = []
    for shard in split.shards:
        if packing == "stream":
            expected += shard.tokens[1:].tolist()
        elif packing == "padded":
            assert shard.lengths is not None
            for row, length in zip(shard.tokens, shard.lengths, strict=True):
                expected += row[1:length].tolist()
        else:
            expected += shard.tokens[:, [1, 2, 4, 6]].ravel().tolist()
    assert actual.tolist() == expected
    assert {batch.tokens.shape for batch in batches} == {(batch_size, SEQUENCE_LENGTH)}


@pytest.mark.parametrize(("tokens", "windows"), [(2, 1), (8, 1), (9, 2), (15, 2), (16, 3)])
def test_evaluation_has_no_window_without_a_target(tokens, windows):
    split = make_split("stream", [tokens])
    assert len(EvaluationBatches(split, batch_size=1, count=0)) == windows


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_short_evaluation_is_the_beginning_of_the_whole_one(packing):
    split = make_split(packing, [50, 60])
    whole = EvaluationBatches(split, batch_size=4, count=0)
    short = EvaluationBatches(split, batch_size=4, count=3)
    assert len(short) == len(list(short)) == 3
    for index, batch in enumerate(short):
        assert_same(whole.batch(index), batch)
    assert len(EvaluationBatches(split, batch_size=4, count=10_000)) == len(whole)


def test_rows_beyond_the_last_are_padding_without_loss():
    split = make_split("packed", [5])
    last = EvaluationBatches(split, batch_size=4, count=0).batch(1)
    assert last.loss_mask[0].any()
    assert not last.loss_mask[1:].any()
    assert last.segment_ids is not None
    assert not last.segment_ids[1:].any()
    assert not last.tokens[1:].any()


def test_prefetched_results_come_in_order_and_ahead():
    computed = []

    def function(step: int) -> int:
        computed.append(step)
        return step * step

    with prefetch(function, range(5, 100), depth=2) as results:
        assert [next(results) for _ in range(4)] == [25, 36, 49, 64]
        wait_until(lambda: len(computed) == 6)
    assert computed == [5, 6, 7, 8, 9, 10]


def test_what_is_prefetched_ends_with_its_inputs():
    with prefetch(abs, [-1, -2, -3], depth=2) as results:
        assert list(results) == [1, 2, 3]
    with prefetch(abs, [], depth=2) as results:
        assert list(results) == []


def test_an_error_while_prefetching_reaches_the_one_who_asks():
    def function(step: int) -> int:
        if step == 2:
            raise KeyError("no such row")
        return step

    with prefetch(function, range(9), depth=3) as results:
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(KeyError, match="no such row"):
            next(results)


def test_the_prefetching_thread_ends_with_its_block():
    before = threading.active_count()

    def fail_inside() -> None:
        with prefetch(abs, range(9), depth=4) as results:
            next(results)
            assert threading.active_count() == before + 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert threading.active_count() == before


def test_what_was_not_yet_prefetched_is_given_up_with_the_block():
    computed = []

    def slow(step: int) -> int:
        computed.append(step)
        time.sleep(0.01)
        return step

    with prefetch(slow, range(2000), depth=1000) as results:
        next(results)
    assert len(computed) < 100


def wait_until(condition, *, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
