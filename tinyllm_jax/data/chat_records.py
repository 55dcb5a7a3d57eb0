"""JSON objects out of files, each with the line it stands in: JSONL, or one JSON array a file."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from tinyllm_jax.data.readers import BOM, CHUNK_BYTES, MAX_DOCUMENT_BYTES, open_text, skip_line
from tinyllm_jax.data.sources import file_format
from tinyllm_jax.errors import InputError


class BadRecord(Exception):  # noqa: N818 -- says what it is, and never leaves this room
    """A record that cannot be used; the message says why and what to do."""


# Called with the line of a record, from 1, and what is wrong with it.
OnBadRecord = Callable[[int, BadRecord], None]


def read_records(path: str, *, on_bad: OnBadRecord) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the objects of a file in order, each with its line, from 1.

    A file of one JSON array is held in memory whole; lines of JSON are not.

    Args:
        on_bad: Called for what is no object; when it returns, that is left out.

    Raises:
        InputError: it is no file of JSON, or an array is broken, so that what follows is unknown.
    """
    known = file_format(path)
    if known is None or known[0] != "jsonl":
        raise InputError(
            f"{path}: no file of JSON, and conversations are read from .jsonl, .ndjson and .json "
            "only, each also with .gz or .zst. Write one object a line into such a file."
        )
    if holds_array(path, known[1]):
        records = array_records(path, known[1])
    else:
        records = line_records(path, known[1], on_bad=on_bad)
    for line, record in records:
        if isinstance(record, dict):
            yield line, record
        else:
            kind = type(record).__name__
            on_bad(line, BadRecord(f"a JSON {kind}, not an object. Write one object a record"))


def holds_array(path: str, compression: str) -> bool:
    """Tell a file whose first character is a bracket."""
    with open_text(path, compression) as (stream, _):
        while head := stream.read(CHUNK_BYTES):
            if text := head.removeprefix(BOM).lstrip():
                return text.startswith(b"[")
    return False


def line_records(path: str, compression: str, *, on_bad: OnBadRecord) -> Iterator[tuple[int, Any]]:
    """Read one JSON value a line; blank lines are nothing."""
    with open_text(path, compression) as (stream, _):
        number = 0
        while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(BOM)
            try:
                if len(line) > MAX_DOCUMENT_BYTES:
                    if not line.endswith(b"\n"):
                        skip_line(stream)
                    raise BadRecord(
                        f"a line of more than {MAX_DOCUMENT_BYTES >> 20} MiB. Cut its record"
                    )
                if line.strip():
                    yield number, json_value(line)
            except BadRecord as error:
                on_bad(number, error)


def json_value(line: bytes) -> Any:
    """Read one line.

    Raises:
        BadRecord: it is not JSON.
    """
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 (byte {error.start} of the line). Save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadRecord(f"not JSON ({error.msg} at column {error.colno}). Fix the line") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not JSON that can be read ({error}). Fix the line") from None


def array_records(path: str, compression: str) -> Iterator[tuple[int, Any]]:
    """Read the values of one JSON array.

    Raises:
        InputError: it is broken somewhere; the message names the line.
    """
    with open_text(path, compression) as (stream, _):
        content = stream.read()
    try:
        text = content.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}. Save it as UTF-8.") from None
    del content
    decoder = json.JSONDecoder()
    place, counted, line = _skip(text, text.index("[") + 1), 0, 1
    try:
        while text[place : place + 1] != "]":
            line += text.count("\n", counted, place)
            counted = place
            value, place = decoder.raw_decode(text, place)
            yield line, value
            place = _skip(text, place)
            if text[place : place + 1] == ",":
                place = _skip(text, place + 1)
            elif text[place : place + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
        if rest := text[place + 1 :].strip():
            raise json.JSONDecodeError(
                f"{rest[:20]!r} behind the array's end", text, _skip(text, place + 1)
            )
    except (ValueError, RecursionError) as error:  # a number, too, may be too long to read
        at = error.lineno if isinstance(error, json.JSONDecodeError) else line
        what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(
            f"{path}:{at}: a broken JSON array ({what}). Fix it there; what follows cannot be told, "
            "so it is not skipped."
        ) from None


def _skip(text: str, place: int) -> int:
    """Go over blanks."""
    while text[place : place + 1] in (" ", "\t", "\r", "\n"):
        place += 1
    return place
