"""Documents of token ids into rows, without losing or doubling a prediction.

A row holds `sequence_length + 1` tokens: the model reads all but the last and predicts all but the
first. So a document that goes on in another row repeats one token there, and each of its tokens is
predicted once. Every document comes as bos, text, eos.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Integer

# Tokens that packing chooses among; more of them fill rows better by less than 0.1 %.
TOKENS_AT_ONCE = 1 << 21


@dataclass
class Row:
    """A row being filled: whole pieces of documents side by side."""

    room: int  # tokens it still takes
    pieces: list[np.ndarray] = field(default_factory=list)

    def add(self, piece: np.ndarray) -> None:
        """Put one piece behind the others."""
        assert len(piece) <= self.room
        self.pieces.append(piece)
        self.room -= len(piece)


class PaddedRows:
    """Give each piece a row of its own."""

    def __init__(self, *, row_width: int):
        """Begin with no rows."""
        self._row_width = row_width

    def add(self, piece: np.ndarray) -> list[Row]:
        """Take one piece and give the rows that are done."""
        row = Row(room=self._row_width)
        row.add(piece)
        return [row]

    def finish(self) -> list[Row]:
        """Give the remaining rows: none."""
        return []


class PackedRows:
    """Gather pieces up to a number of tokens, then pack them as well as can be."""

    def __init__(self, *, row_width: int, tokens_at_once: int):
        """Begin with no pieces."""
        self._row_width = row_width
        self._tokens_at_once = tokens_at_once
        self._pieces: list[np.ndarray] = []
        self._tokens = 0

    def add(self, piece: np.ndarray) -> list[Row]:
        """Take one piece and give the rows that are done."""
        self._pieces.append(piece)
        self._tokens += len(piece)
        return self.finish() if self._tokens >= self._tokens_at_once else []

    def finish(self) -> list[Row]:
        """Give the remaining rows."""
        rows = best_fit(self._pieces, row_width=self._row_width)
        self._pieces, self._tokens = [], 0
        return rows


def best_fit(pieces: Sequence[np.ndarray], *, row_width: int) -> list[Row]:
    """Put each piece, longest first, into the row with the least room that still takes it.

    Rows come in the order in which their longest pieces came, so that the first of them are no
    other sample of the text than the last. The same pieces give the same rows.

    Source:
        Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830, section
        3.2: best-fit-decreasing.
    """
    rows: dict[int, Row] = {}
    by_room: list[tuple[int, int]] = []  # (room, number of the row), least room first
    for number in sorted(range(len(pieces)), key=lambda number: -len(pieces[number])):
        place = bisect.bisect_left(by_room, (len(pieces[number]), 0))
        if place < len(by_room):
            row_number = by_room.pop(place)[1]
        else:
            row_number = number
            rows[row_number] = Row(room=row_width)
        rows[row_number].add(pieces[number])
        bisect.insort(by_room, (rows[row_number].room, row_number))
    return [rows[number] for number in sorted(rows)]


def cut_document(
    tokens: Integer[np.ndarray, " tokens"], *, row_width: int, long_documents: str
) -> tuple[list[np.ndarray], int]:
    """Cut a document into pieces that fit a row.

    Args:
        tokens: The document, at least 2 tokens.
        row_width: Tokens that a row holds.
        long_documents: "split" gives every piece, each beginning with the last token of the piece
            before it; "truncate" gives the first one.

    Returns:
        The pieces, and how many tokens are in none of them.
    """
    if len(tokens) <= row_width:
        return [tokens], 0
    if long_documents == "truncate":
        return [tokens[:row_width]], len(tokens) - row_width
    starts = range(0, len(tokens) - 1, row_width - 1)
    return [tokens[start : start + row_width] for start in starts], 0


def fill_rows(
    rows: Sequence[Row], *, row_width: int, pad_id: int, dtype: np.dtype
) -> tuple[Integer[np.ndarray, "rows width"], Integer[np.ndarray, "rows width"]]:
    """Write rows as arrays.

    Returns:
        Tokens, with `pad_id` behind the last piece; and for each token the number of its piece
        within the row, from 1, with 0 for padding.
    """
    tokens = np.full((len(rows), row_width), pad_id, dtype)
    segments = np.zeros((len(rows), row_width), np.uint16)
    for index, row in enumerate(rows):
        start = 0
        for number, piece in enumerate(row.pieces, 1):
            stop = start + len(piece)
            tokens[index, start:stop] = piece
            segments[index, start:stop] = number
            start = stop
    return tokens, segments


def token_dtype(vocab_size: int) -> np.dtype:
    """Choose the type of stored ids: 2 bytes up to 65,536 of them, else 4."""
    return np.dtype(np.uint16 if vocab_size <= 65_536 else np.uint32)
