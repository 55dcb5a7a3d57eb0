"""Texts as windows of a model's context, windows side by side in rows, and their log-probabilities.

A window is read whole, and its last tokens are scored. Windows share rows and never see each other,
so one compiled program, for rows of one width, scores texts of every length.
"""

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int32

# Rows are not made shorter than this, so that short texts fill them well.
SMALLEST_WIDTH = 512
# Windows that are packed at once: more fill rows hardly better and wait longer.
TOKENS_AT_ONCE = 1 << 16


class Scorer(Protocol):
    """A model, as far as log-probabilities go."""

    def __call__(
        self,
        tokens: Int32[np.ndarray, "rows width"],
        targets: Int32[np.ndarray, "rows width"],
        positions: Int32[np.ndarray, "rows width"],
        segment_ids: Int32[np.ndarray, "rows width"],
    ) -> tuple[Float[np.ndarray, "rows width"], Bool[np.ndarray, "rows width"]]:
        """Give log p(target) in nats, and whether the target is the likeliest token."""
        ...


@dataclass(frozen=True)
class Window:
    """Tokens that are read together; the model reads all but the last."""

    ids: Sequence[int]
    start: int  # first of the ids that is scored, 1 or more


@dataclass(frozen=True)
class Text:
    """Tokens to score, from `start` on, in windows as they are needed."""

    ids: Sequence[int]
    start: int


@dataclass(frozen=True)
class Scored:
    """What a model says of the scored tokens of a text."""

    log_probs: Float[np.ndarray, " tokens"]  # nats, float64
    is_greedy: bool  # each of them is the likeliest
    windows: int

    @property
    def total(self) -> float:
        """The log-likelihood, in nats."""
        return float(self.log_probs.sum())


def cut(text: Text, *, context: int, overlap: int) -> list[Window]:
    """Cut a text into windows so that each token is scored once.

    The first window reads `context` tokens, and so does each later one: the last `overlap` tokens that
    were read before, or more in the last window, and then new ones.
    """
    windows, done, end = [], text.start, max(context + 1, text.start + context - overlap)
    assert 0 <= overlap < context
    while done < len(text.ids):
        end = min(end, len(text.ids))
        begin = max(0, end - 1 - context)
        windows.append(Window(text.ids[begin:end], done - begin))
        done, end = end, end + context - overlap
    return windows


def keep_end(text: Text, *, context: int) -> Text:
    """Leave out the beginning of what is only read, where all that is scored still fits a window."""
    too_many = len(text.ids) - 1 - context
    if 0 < too_many < text.start:
        return Text(text.ids[too_many:], text.start - too_many)
    return text


class Reader:
    """Scores texts with a model.

    Args:
        scorer: The model.
        context: Tokens that one window reads at most.
        overlap: Tokens that a later window of a text reads again.
        batch_size: Rows that are computed together.
    """

    def __init__(self, scorer: Scorer, *, context: int, overlap: int, batch_size: int):
        self._scorer = scorer
        self.context, self._overlap = context, overlap
        self._shape = (batch_size, max(context, SMALLEST_WIDTH))
        self.tokens = 0  # read so far, without padding
        self.batches = 0

    def warm_up(self) -> None:
        """Compile, so that it is no part of what is timed."""
        self._score_rows([])

    def score(
        self, texts: Iterable[Text], *, on_progress: Callable[[], None] = lambda: None
    ) -> Iterator[Scored]:
        """Score texts in order, some thousands of tokens at a time.

        Args:
            on_progress: Called now and then.
        """
        for group in _groups(texts):
            windows = [cut(text, context=self.context, overlap=self._overlap) for text in group]
            found = self._score_windows(list(itertools.chain(*windows)), on_progress)
            for text, mine in zip(group, windows, strict=True):
                parts = list(itertools.islice(found, len(mine)))
                log_probs = np.concatenate([np.zeros(0), *(part[0] for part in parts)])
                assert len(log_probs) == max(len(text.ids) - text.start, 0)
                yield Scored(log_probs, all(part[1].all() for part in parts), len(mine))

    def _score_windows(
        self, windows: list[Window], on_progress: Callable[[], None]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rows_at_once, width = self._shape
        rows = pack([len(window.ids) - 1 for window in windows], width=width)
        found: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0), np.zeros(0))] * len(windows)
        for start in range(0, len(rows), rows_at_once):
            batch = [
                [(number, windows[number]) for number in row]
                for row in rows[start : start + rows_at_once]
            ]
            for number, part in self._score_rows(batch):
                found[number] = part
            on_progress()
        return iter(found)

    def _score_rows(
        self, rows: list[list[tuple[int, Window]]]
    ) -> list[tuple[int, tuple[np.ndarray, np.ndarray]]]:
        tokens, targets, positions, segment_ids = (
            np.zeros(self._shape, np.int32) for _ in range(4)
        )
        places = []
        for row, windows in enumerate(rows):
            offset = 0
            for segment, (number, window) in enumerate(windows, 1):
                end = offset + len(window.ids) - 1
                tokens[row, offset:end] = window.ids[:-1]
                targets[row, offset:end] = window.ids[1:]
                positions[row, offset:end] = np.arange(end - offset)
                segment_ids[row, offset:end] = segment
                places.append((number, row, slice(offset + window.start - 1, end)))
                offset = end
            self.tokens += offset
        log_probs, greedy = self._scorer(tokens, targets, positions, segment_ids)
        self.batches += bool(rows)
        return [
            (number, (log_probs[row, place].astype(np.float64), greedy[row, place]))
            for number, row, place in places
        ]


def pack(lengths: Sequence[int], *, width: int) -> list[list[int]]:
    """Share rows of `width` among pieces, the longest first, each where the least room stays.

    Returns:
        For each row the numbers of its pieces.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, row), sorted
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        assert 0 < length <= width
        place = bisect.bisect_left(rooms, (length, 0))
        if place == len(rooms):
            room, row = width, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(place)
        rows[row].append(number)
        bisect.insort(rooms, (room - length, row))
    return rows


def _groups(texts: Iterable[Text]) -> Iterator[list[Text]]:
    group, tokens = [], 0
    for text in texts:
        group.append(text)
        tokens += len(text.ids)
        if tokens >= TOKENS_AT_ONCE:
            yield group
            group, tokens = [], 0
    if group:
        yield group
