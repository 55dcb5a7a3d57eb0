"""Documents out of JSONL and plain text, in flat memory and from any byte on."""

import contextlib
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import zstandard

from tinyllm_jax.data.sources import is_json
from tinyllm_jax.errors import InputError

# Longest document, before JSON is taken apart: bounds memory where no separator ever comes.
MAX_DOCUMENT_BYTES = 16 << 20
CHUNK_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"

# Called with a function that makes the message, since finding a line's number reads the file.
OnBad = Callable[[Callable[[], str]], None]


class ZstdFile(io.RawIOBase):
    """A zstd file read as a stream, which notices when the file ends too early.

    `zstandard`'s own stream reader takes a cut-off file for a whole one.
    """

    # Four bytes can hold a block of 128 KiB, so this bounds a step to 8 MiB of text.
    _STEP_BYTES = 256

    def __init__(self, file: io.BufferedIOBase):
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside = False  # a frame has begun and not ended
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._frame.unused_data or self._file.read(self._STEP_BYTES)
            if not packed:
                if self._inside:
                    raise EOFError("the file ends in the middle of a frame")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(packed))
            self._inside = not self._frame.eof
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


@contextlib.contextmanager
def open_text(path: str, compression: str) -> Iterator[tuple[io.BufferedIOBase, io.BufferedIOBase]]:
    """Open the bytes of a text file as (text, file as it lies on the disk).

    Raises:
        InputError: the compressed data is of another kind, cut off or damaged.
    """
    with open(path, "rb") as file:
        try:
            if compression == "gzip":
                with gzip.GzipFile(fileobj=file, mode="rb") as stream:
                    yield io.BufferedReader(stream, CHUNK_BYTES), file  # type: ignore[arg-type]
            elif compression == "zstd":
                yield io.BufferedReader(ZstdFile(file), CHUNK_BYTES), file
            else:
                yield file, file
        except EOFError:
            raise InputError(
                f"{path}: the {compression} data is cut off. Get or write the file again."
            ) from None
        except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise InputError(
                f"{path}: not {compression} data, or damaged ({error}). Get or write the file "
                "again, or rename it if it is not compressed."
            ) from None


def check_content(path: str, compression: str) -> None:
    """Refuse a file that begins like something else than its name says.

    Raises:
        InputError: the message says what it looks like.
    """
    with open_text(path, compression) as (stream, _):
        head = stream.read(64)
    looks = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet"}
    for magic, suffix in looks.items():
        if head.startswith(magic):
            raise InputError(f"{path}: begins like a {suffix} file. Rename it so that it ends so.")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path}: UTF-16 text. Save it as UTF-8.")
    if is_json(path) and head.removeprefix(BOM).lstrip().startswith(b"["):
        raise InputError(
            f"{path}: one JSON array, which cannot be read bit by bit. Write one object a line "
            "(jq -c '.[]' OLD.json > NEW.jsonl)."
        )


def measure_text(path: str, compression: str) -> int:
    """Give the size of a file's text in bytes, estimated from its beginning where compressed."""
    size = os.path.getsize(path)
    if not compression:
        return size
    with open_text(path, compression) as (stream, file):
        text_bytes = len(stream.read(4 * CHUNK_BYTES))
        more = bool(stream.read(1))
        return int(size * text_bytes / file.tell()) if more else text_bytes


def line_number(path: str, compression: str, offset: int) -> int:
    """Count the line, from 1, that a byte of the text stands in."""
    number = 1
    with open_text(path, compression) as (stream, _):
        while offset > 0 and (chunk := stream.read(min(offset, CHUNK_BYTES))):
            number += chunk.count(b"\n")
            offset -= len(chunk)
    return number


def read_jsonl(
    path: str, compression: str, *, start: int, stop: int, field: str, on_bad: OnBad
) -> Iterator[str]:
    """Read one field of the lines that start in [start, stop); blank lines are nothing.

    Args:
        stop: Where to stop, in bytes of the text; -1 is its end.
        on_bad: Called for a line that holds no such text; when it returns, the line is left out.
    """
    with open_text(path, compression) as (stream, _):
        after = start
        if start > 0:
            stream.seek(start - 1)
            after += skip_line(stream) - 1
        while stop < 0 or after < stop:
            offset = after
            line = stream.readline(MAX_DOCUMENT_BYTES + 1)
            if not line:
                return
            after += len(line)
            if offset == 0:
                line = line.removeprefix(BOM)
            try:
                if len(line) > MAX_DOCUMENT_BYTES:
                    if not line.endswith(b"\n"):
                        after += skip_line(stream)
                    raise BadRecord(
                        f"a line of more than {MAX_DOCUMENT_BYTES >> 20} MiB. Cut its document"
                    )
                if line.strip():
                    yield text_field(line, field, offset=offset)
            except BadRecord as error:
                on_bad(
                    lambda offset=offset, error=error: (
                        f"{path}:{line_number(path, compression, offset)}: {error}, or pass "
                        "--data.on_bad_record skip to leave such lines out and count them."
                    )
                )


def skip_line(stream: io.BufferedIOBase) -> int:
    """Go on to the next line in flat memory; give the bytes gone over."""
    skipped = 0
    while rest := stream.readline(CHUNK_BYTES):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped


class BadRecord(Exception):  # noqa: N818 -- says what it is, and never leaves this module
    """A record that holds no document; the message says why and what to do."""


def text_field(line: bytes, field: str, *, offset: int) -> str:
    """Take the document out of one line of JSONL.

    Raises:
        BadRecord: the line holds none.
    """
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"not UTF-8 (byte {offset + error.start} of the text). Save it as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise BadRecord(f"not JSON ({error.msg} at column {error.colno}). Fix the line") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not JSON that can be read ({error}). Fix the line") from None
    if not isinstance(record, dict):
        raise BadRecord(
            f"a JSON {type(record).__name__}, not an object with {field!r}. Write one object a line"
        )
    if field not in record:
        fields = ", ".join(list(record)[:20]) or "none"
        raise BadRecord(f"no field {field!r}; fields: {fields}. Use --data.text_field FIELD")
    text = record[field]
    if not isinstance(text, str):
        raise BadRecord(f"field {field!r} is {type(text).__name__}, not text. Fix the line")
    if b"\\u" in line:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRecord(
                f"field {field!r} has half of a surrogate pair, which is no character. Fix the line"
            ) from None
    return text


def read_text(
    path: str, compression: str, *, start: int, stop: int, separator: str, on_bad: OnBad
) -> Iterator[str]:
    """Read the documents of plain text that start in [start, stop); blank ones are nothing.

    A document starts right after a separator. One newline after a separator, and one before a
    separator or the end, belong to it; all else is the document's.

    Args:
        stop: Where to stop, in bytes of the text; -1 is its end.
        on_bad: Called for a document that is no text; when it returns, the document is left out.
    """
    mark = separator.encode()
    with open_text(path, compression) as (stream, _):
        scan = 0
        if start > 0:
            scan = scanning_point(stream, max(0, start - len(mark)), mark)
            stream.seek(scan)
        for offset, piece in split_stream(stream, mark, scan):
            if 0 <= stop <= offset:
                return
            if offset < start:  # owned by the part before, or only the end of a document
                continue
            if piece is None:
                on_bad(
                    lambda offset=offset: (
                        f"{path}: no {separator!r} in the {MAX_DOCUMENT_BYTES >> 20} MiB after "
                        f"byte {offset}, and longer documents are not read. Use "
                        "--data.document_separator TEXT with what stands between the documents."
                    )
                )
                continue
            body = trim(piece, first=offset == 0)
            try:
                text = piece[body].decode()
            except UnicodeDecodeError as error:
                place = offset + body.start + error.start
                on_bad(lambda place=place: f"{path}: not UTF-8 at byte {place}. Save it as UTF-8.")
                continue
            if text and not text.isspace():
                yield text


def trim(piece: bytes, *, first: bool) -> slice:
    """Find the document in what stands between two separators: less a newline on either side."""
    begin, end = 0, len(piece)
    if first:
        begin = len(BOM) if piece.startswith(BOM) else 0
    elif piece.startswith((b"\n", b"\r\n")):
        begin = piece.index(b"\n") + 1
    if piece.endswith(b"\n", begin):
        end -= 2 if piece.endswith(b"\r\n", begin) else 1
    return slice(begin, end)


def scanning_point(stream: io.BufferedIOBase, position: int, mark: bytes) -> int:
    """Step back from `position` to where no occurrence of `mark` lies across.

    A separator such as two newlines can overlap itself, so a scan that began inside a run of them
    would cut it otherwise than a scan from the start of the file.
    """
    while position > 0:
        low = max(0, position - len(mark) + 1)
        stream.seek(low)
        if mark not in stream.read(position - low + len(mark) - 1):
            break
        position -= 1
    return position


def split_stream(
    stream: io.BufferedIOBase, mark: bytes, offset: int
) -> Iterator[tuple[int, bytes | None]]:
    """Cut a stream at `mark` into (offset, piece); a piece that is too long comes as None.

    Args:
        offset: Where the stream stands, in bytes of the text.
    """
    tail, too_long = b"", False
    while chunk := stream.read(CHUNK_BYTES):
        *pieces, tail = (tail + chunk).split(mark)
        for piece in pieces:
            if not too_long:
                yield offset, piece if len(piece) <= MAX_DOCUMENT_BYTES else None
            too_long = False
            offset += len(piece) + len(mark)
        if not too_long and len(tail) > MAX_DOCUMENT_BYTES:
            yield offset, None
            too_long = True
        if too_long:
            # All but what may be the first bytes of a separator that the chunk's end cut in two.
            drop = max(0, len(tail) - len(mark) + 1)
            offset += drop
            tail = tail[drop:]
    if tail and not too_long:
        yield offset, tail
