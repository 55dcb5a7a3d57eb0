"""Batches that are left out, as settings and rows of metrics name them: such as 419 and 410-419.

This module imports no framework.
"""

from collections.abc import Iterable

Span = tuple[int, int]  # its first and last number


def merge_spans(spans: Iterable[str]) -> list[Span]:
    """Put spans in order, those that touch as one: the same numbers always read the same."""
    merged: list[Span] = []
    for first, last in sorted(map(_as_numbers, spans)):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


def span_as_text(span: Span) -> str:
    """Write a span as settings do."""
    first, last = span
    return str(first) if first == last else f"{first}-{last}"


def _as_numbers(span: str) -> Span:
    first, _, last = span.partition("-")
    return int(first), int(last or first)
