"""Rows predict every token of every document once, and never one document from another."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllm_jax.data.batches import length_batch, segment_batch
from tinyllm_jax.data.packing import (
    PackedRows,
    PaddedRows,
    best_fit,
    cut_document,
    fill_rows,
    token_dtype,
)

PAD = 0


def make_documents(lengths: list[int]) -> list[np.ndarray]:
    """Give every token of every document an id of its own, so that each prediction is one pair."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length + 1, end + 1) for end, length in zip(ends, lengths, strict=True)]


def pack(documents, *, packing: str, row_width: int, long_documents: str, tokens_at_once: int):
    packer = (
        PackedRows(row_width=row_width, tokens_at_once=tokens_at_once)
        if packing == "packed"
        else PaddedRows(row_width=row_width)
    )
    rows, cut_tokens = [], 0
    for document in documents:
        pieces, cut = cut_document(document, row_width=row_width, long_documents=long_documents)
        cut_tokens += cut
        for piece in pieces:
            rows += packer.add(piece)
    rows += packer.finish()
    tokens, segments = fill_rows(rows, row_width=row_width, pad_id=PAD, dtype=np.dtype(np.uint32))
    return tokens, segments, cut_tokens


def predictions(tokens, segments, *, packing: str) -> list[tuple[int, int]]:
    """List (token, next token) wherever the loss looks, as training sees the rows."""
    if packing == "packed":
        batch = segment_batch(tokens.astype(np.int32), segments.astype(np.int32))
    else:
        lengths = np.count_nonzero(segments, axis=1).astype(np.int32)
        batch = length_batch(tokens.astype(np.int32), lengths)
    mask = batch.loss_mask
    return list(zip(batch.tokens[mask].tolist(), batch.targets[mask].tolist(), strict=True))


document_lengths = st.lists(st.integers(3, 60), min_size=1, max_size=80)
packings = st.sampled_from(["padded", "packed"])


@given(document_lengths, packings, st.integers(2, 33), st.integers(1, 2000))
@settings(max_examples=300, deadline=None)
def test_every_prediction_inside_a_document_comes_exactly_once(
    lengths, packing, row_width, tokens_at_once
):
    documents = make_documents(lengths)
    tokens, segments, cut_tokens = pack(
        documents,
        packing=packing,
        row_width=row_width,
        long_documents="split",
        tokens_at_once=tokens_at_once,
    )
    expected = [pair for d in documents for pair in itertools.pairwise(d.tolist())]
    actual = predictions(tokens, segments, packing=packing)
    assert sorted(actual) == expected
    assert len(actual) == sum(lengths) - len(lengths)
    assert cut_tokens == 0


@given(document_lengths, packings, st.integers(3, 33))
@settings(max_examples=100, deadline=None)
def test_truncated_documents_keep_their_first_row_and_count_the_rest(lengths, packing, row_width):
    documents = make_documents(lengths)
    tokens, segments, cut_tokens = pack(
        documents,
        packing=packing,
        row_width=row_width,
        long_documents="truncate",
        tokens_at_once=200,
    )
    kept = [d[:row_width] for d in documents]
    expected = [pair for d in kept for pair in itertools.pairwise(d.tolist())]
    assert sorted(predictions(tokens, segments, packing=packing)) == expected
    assert cut_tokens == sum(lengths) - sum(map(len, kept))


@given(document_lengths, packings, st.integers(2, 33))
@settings(max_examples=100, deadline=None)
def test_padding_is_what_no_segment_covers(lengths, packing, row_width):
    tokens, segments, _ = pack(
        make_documents(lengths),
        packing=packing,
        row_width=row_width,
        long_documents="split",
        tokens_at_once=200,
    )
    assert np.array_equal(segments == 0, tokens == PAD)
    for row in segments:
        used = row[row > 0]
        assert np.array_equal(row[: len(used)], used)  # padding stands behind
        assert np.array_equal(np.unique(used), np.arange(1, used.max() + 1))
        assert (np.diff(used) >= 0).all()


def test_pieces_of_a_long_document_share_one_token():
    pieces, cut = cut_document(np.arange(10), row_width=4, long_documents="split")
    assert [piece.tolist() for piece in pieces] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert cut == 0
    pieces, _ = cut_document(np.arange(5), row_width=4, long_documents="split")
    assert [piece.tolist() for piece in pieces] == [[0, 1, 2, 3], [3, 4]]
    pieces, _ = cut_document(np.arange(4), row_width=4, long_documents="split")
    assert [piece.tolist() for piece in pieces] == [[0, 1, 2, 3]]


def test_best_fit_takes_long_pieces_first_and_the_fullest_row_that_has_room():
    rows = best_fit([np.zeros(length) for length in (3, 5, 4, 7, 1)], row_width=10)
    # 7 and 5 open rows; 4 fits only beside 5; 3 fills up the 7; 1 goes beside 5 and 4.
    assert [[len(piece) for piece in row.pieces] for row in rows] == [[5, 4, 1], [7, 3]]


def test_the_first_rows_are_no_other_sample_than_the_last():
    lengths = np.random.default_rng(0).integers(30, 200, 4000)
    rows = best_fit([np.zeros(length) for length in lengths], row_width=257)
    longest = [len(row.pieces[0]) for row in rows]
    half = len(rows) // 2
    assert abs(np.mean(longest[:half]) - np.mean(longest[half:])) < 5


def test_pieces_of_one_length_keep_their_order():
    pieces = [np.full(3, number) for number in range(5)]
    rows = best_fit(pieces, row_width=6)
    assert [[int(piece[0]) for piece in row.pieces] for row in rows] == [[0, 1], [2, 3], [4]]


def test_packing_holds_no_more_than_so_many_tokens_back():
    packer = PackedRows(row_width=10, tokens_at_once=20)
    assert packer.add(np.zeros(9)) == packer.add(np.zeros(9)) == []
    assert len(packer.add(np.zeros(2))) == 3
    assert packer.finish() == []


def test_best_fit_fills_rows_of_story_lengths_to_nearly_all():
    lengths = np.random.default_rng(0).integers(30, 200, 4000).tolist()
    _, segments, _ = pack(
        make_documents(lengths),
        packing="packed",
        row_width=257,
        long_documents="split",
        tokens_at_once=1 << 18,
    )
    assert np.count_nonzero(segments) / segments.size > 0.99


@pytest.mark.parametrize(("vocab_size", "expected"), [(65_536, "uint16"), (65_537, "uint32")])
def test_ids_are_stored_in_the_smallest_type_that_holds_them(vocab_size, expected):
    assert token_dtype(vocab_size) == np.dtype(expected)
