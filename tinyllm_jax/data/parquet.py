"""Documents out of one text column of parquet files, in flat memory."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from tinyllm_jax.data.parquet_pages import LargePage, NoPage, check_pages
from tinyllm_jax.errors import InputError

# Text of one batch, as far as the file's own averages tell.
BATCH_BYTES = 4 << 20
MAX_BATCH_ROWS = 4096
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class RowGroup:
    """What the footer says about one row group."""

    rows: int
    text_bytes: int


@contextlib.contextmanager
def open_parquet(path: str, column: str) -> Iterator[pq.ParquetFile]:
    """Open a parquet file that has a text column.

    Raises:
        InputError: it is no parquet, is damaged, or has no such column of text.
    """
    try:
        # Without pre_buffer and with a small read buffer a column is never in memory as a whole.
        with pq.ParquetFile(
            path, memory_map=False, pre_buffer=False, buffer_size=READ_BYTES
        ) as file:
            check_column(path, file.schema_arrow, column)
            yield file
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # of the machine, rather than of the file's content
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(
            f"{path}: not parquet, or damaged ({reason}). Get or write the file again."
        ) from None


def check_column(path: str, schema: pa.Schema, column: str) -> None:
    """Refuse a file without the column, or with numbers or lists in it.

    Raises:
        InputError: lists the columns there are.
    """
    names = ", ".join(schema.names) or "none"
    if column not in schema.names:
        raise InputError(
            f"{path}: no column {column!r}; columns: {names}. Use --data.text_field COLUMN."
        )
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)
    if not any(is_kind(kind) for is_kind in (*texts, pa.types.is_large_binary)):
        raise InputError(
            f"{path}: column {column!r} is {kind}, not text; columns: {names}. Use "
            "--data.text_field COLUMN."
        )


def row_groups(path: str, column: str) -> list[RowGroup]:
    """List the row groups with the size of their text.

    Raises:
        InputError: it is no parquet, is damaged, or has no such column of text.
    """
    with open_parquet(path, column) as file:
        return describe_groups(file.metadata, column)


def describe_groups(metadata: pq.FileMetaData, column: str) -> list[RowGroup]:
    """List the same for a file whose footer is read."""
    place = column_place(metadata, column)
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    return [
        RowGroup(group.num_rows, group.column(place).total_uncompressed_size) for group in groups
    ]


def check_sizes(
    path: str, metadata: pq.FileMetaData, column: str, *, start: int, stop: int
) -> None:
    """Refuse row groups in [start, stop) whose pages would take too much memory.

    Raises:
        InputError: names the row group and the size.
    """
    place = column_place(metadata, column)
    with open(path, "rb") as content:
        for index in range(start, min(stop, metadata.num_row_groups)):
            chunk = metadata.row_group(index).column(place)
            if chunk.num_values == 0:
                continue  # writers make no page of data then, and say that it begins at 0
            begins = [chunk.data_page_offset]
            if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                begins.append(chunk.dictionary_page_offset)
            first = min(begins)
            try:
                check_pages(content, start=first, stop=first + chunk.total_compressed_size)
            except LargePage as error:
                raise InputError(
                    f"{path}: row group {index} has in column {column!r} {error}."
                ) from None
            except NoPage:
                raise InputError(
                    f"{path}: not parquet, or damaged (in row group {index}, column {column!r}, there "
                    "is no page where one begins). Get or write the file again."
                ) from None


def column_place(metadata: pq.FileMetaData, column: str) -> int:
    """Find a column among those that the file stores."""
    return [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(column)


def read_parquet(
    path: str,
    *,
    start: int,
    stop: int,
    column: str,
    on_bad: Callable[[Callable[[], str]], None],
) -> Iterator[str]:
    """Read the text column of the row groups in [start, stop).

    Args:
        on_bad: Called for a row that holds no text; when it returns, the row is left out.
    """
    with open_parquet(path, column) as file:
        groups = describe_groups(file.metadata, column)
        check_sizes(path, file.metadata, column, start=start, stop=stop)
        row = sum(group.rows for group in groups[:start])
        chosen = groups[start:stop]
        rows = sum(group.rows for group in chosen)
        row_bytes = sum(group.text_bytes for group in chosen) // max(rows, 1)
        batches = file.iter_batches(
            batch_size=min(MAX_BATCH_ROWS, max(1, BATCH_BYTES // max(row_bytes, 1))),
            row_groups=list(range(start, stop)),
            columns=[column],
            use_threads=False,
        )
        for batch in batches:
            for value in as_bytes(batch.column(0)).to_pylist():
                row += 1
                problem = None
                if value is None:
                    problem = "holds no value. Fill it"
                else:
                    try:
                        yield value.decode()
                    except UnicodeDecodeError as error:
                        problem = f"is not UTF-8 (byte {error.start}). Write it as UTF-8"
                if problem:
                    on_bad(
                        lambda row=row, problem=problem: (
                            f"{path}: row {row}: column {column!r} {problem}, or pass "
                            "--data.on_bad_record skip to leave such rows out and count them."
                        )
                    )


def as_bytes(column: pa.Array) -> pa.Array:
    """Bring a text column to bytes, since one broken text would spoil its whole batch."""
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    large = pa.types.is_large_string(column.type) or pa.types.is_large_binary(column.type)
    return column.cast(pa.large_binary() if large else pa.binary())
