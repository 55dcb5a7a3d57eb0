"""Token shards on disk: written document by document, read through memory maps.

A shard holds one split of one piece of the corpus as `.npy` files:

- stream: `NAME.npy`, all tokens in a line;
- padded: `NAME.npy`, one document a row, and `NAME.lengths.npy`, the tokens of each row;
- packed: `NAME.npy`, and `NAME.segments.npy`, for each token the number of its document in the row.

Rows of which not all is learnt have `NAME.learn.npy` besides: for each token whether it is a target.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Bool, Integer

from tinyllm_jax.config import DataConfig
from tinyllm_jax.data.files import replacing, sha256_of_file
from tinyllm_jax.data.packing import (
    TOKENS_AT_ONCE,
    PackedRows,
    PaddedRows,
    Row,
    cut_document,
    fill_rows,
    token_dtype,
)
from tinyllm_jax.data.tokenizer import Tokenizer
from tinyllm_jax.errors import InputError

# Held in memory before they are written.
ROWS_AT_ONCE = 256
DOCUMENTS_AT_ONCE = 256
# Ids leave the highest bit free; while rows are packed it says that a token is learnt.
LEARN_BIT = np.uint32(1 << 31)


class GrowingArray:
    """A `.npy` file that takes rows behind its last one."""

    def __init__(self, file: BinaryIO, *, dtype: np.dtype, row_shape: tuple[int, ...]):
        """Begin an array with no rows at the start of an empty file."""
        self._file = file
        self._dtype = dtype
        self._row_shape = row_shape
        self._rows = 0
        self._header_bytes = self.write_header()

    def write_header(self) -> int:
        """Write the shape so far; NumPy pads the header, so a longer shape takes the same room."""
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._rows, *self._row_shape),
        }
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(self._file, header)
        written = self._file.tell()
        self._file.seek(0, 2)
        return written

    def append(self, rows: np.ndarray) -> None:
        """Write rows behind the others."""
        assert rows.shape[1:] == self._row_shape, (rows.shape, self._row_shape)
        self._file.write(np.ascontiguousarray(rows, self._dtype).data)
        self._rows += len(rows)

    def finish(self) -> None:
        """Write the final shape."""
        assert self.write_header() == self._header_bytes


@contextlib.contextmanager
def growing_array(
    path: Path, *, dtype: np.dtype, row_shape: tuple[int, ...]
) -> Iterator[GrowingArray]:
    """Write a `.npy` file that appears whole when the block ends well, or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        array = GrowingArray(file, dtype=dtype, row_shape=row_shape)
        yield array
        array.finish()


@dataclass
class ShardRecord:
    """What the manifest says of one shard."""

    name: str
    split: str
    files: dict[str, dict[str, int | str]]  # file name to its size in bytes and sha256
    documents: int = 0
    text_bytes: int = 0  # UTF-8 bytes of the documents
    tokens: int = 0  # of the documents, bos and eos included
    rows: int = 0  # 0 in a stream
    filled_tokens: int = 0  # stored tokens that are no padding; counts a repeated token twice
    long_documents: int = 0  # documents longer than a row
    truncated_tokens: int = 0  # left out of rows
    learnt_tokens: int = 0  # targets, where a row says for each token whether it is one


class ShardWriter:
    """Turn documents into the rows, or the line, of one shard."""

    def __init__(
        self,
        record: ShardRecord,
        arrays: list[GrowingArray],
        *,
        data: DataConfig,
        tokenizer: Tokenizer,
        masked: bool,
    ):
        """Take the arrays to write to and the record to count in."""
        self.record = record
        self._arrays = arrays
        self._data = data
        self._pad_id = tokenizer.pad_id
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._masked = masked
        self._row_width = data.sequence_length + 1
        self._packer = (
            PackedRows(row_width=self._row_width, tokens_at_once=TOKENS_AT_ONCE)
            if data.packing == "packed"
            else PaddedRows(row_width=self._row_width)
        )
        self._rows: list[Row] = []
        self._line: list[np.ndarray] = []

    def add(self, ids: list[int], *, text_bytes: int) -> None:
        """Write one document: bos, text and eos."""
        document = np.asarray(ids, self._dtype)
        record = self.record
        record.documents += 1
        record.text_bytes += text_bytes
        record.tokens += len(document)
        if self._data.packing == "stream":
            self._line.append(document)
            if len(self._line) >= DOCUMENTS_AT_ONCE:
                self._write_line()
            return
        pieces, cut = cut_document(
            document, row_width=self._row_width, long_documents=self._data.long_documents
        )
        record.long_documents += len(document) > self._row_width
        record.truncated_tokens += cut
        for piece in pieces:
            self._rows += self._packer.add(piece)
        if len(self._rows) >= ROWS_AT_ONCE:
            self._write_rows()

    def add_masked(
        self,
        ids: Integer[np.ndarray, " tokens"],
        learn: Bool[np.ndarray, " tokens"],
        *,
        text_bytes: int,
    ) -> None:
        """Write one document of a row at most, with what of it is learnt.

        Args:
            text_bytes: UTF-8 bytes of what is learnt.
        """
        assert self._masked
        assert len(ids) <= self._row_width
        record = self.record
        record.documents += 1
        record.text_bytes += text_bytes
        record.tokens += len(ids)
        record.learnt_tokens += int(np.count_nonzero(learn))
        self._rows += self._packer.add(ids.astype(np.uint32) | learn * LEARN_BIT)
        if len(self._rows) >= ROWS_AT_ONCE:
            self._write_rows()

    def _write_line(self) -> None:
        tokens = np.concatenate([np.empty(0, self._dtype), *self._line])
        self._arrays[0].append(tokens)
        self.record.filled_tokens += len(tokens)
        self._line = []

    def _write_rows(self) -> None:
        dtype = np.dtype(np.uint32) if self._masked else self._dtype
        tokens, segments = fill_rows(
            self._rows, row_width=self._row_width, pad_id=self._pad_id, dtype=dtype
        )
        if self._masked:
            self._arrays[2].append(tokens >= LEARN_BIT)
            tokens = tokens & ~LEARN_BIT
        lengths = np.count_nonzero(segments, axis=1)
        self._arrays[0].append(tokens)
        self._arrays[1].append(lengths if self._data.packing == "padded" else segments)
        self.record.rows += len(tokens)
        self.record.filled_tokens += int(lengths.sum())
        self._rows = []

    def finish(self) -> None:
        """Write what is still held back."""
        if self._data.packing == "stream":
            self._write_line()
        else:
            self._rows += self._packer.finish()
            self._write_rows()


@contextlib.contextmanager
def shard_writer(
    folder: Path,
    name: str,
    *,
    split: str,
    data: DataConfig,
    tokenizer: Tokenizer,
    masked: bool,
) -> Iterator[ShardWriter]:
    """Write one shard; its files appear, and its record is complete, when the block ends well.

    Args:
        masked: Documents come with what of them is learnt (`add_masked`); not for a stream.
    """
    width = data.sequence_length + 1
    tokens = token_dtype(tokenizer.vocab_size)
    files: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    if data.packing == "stream":
        files[f"{name}.npy"] = (tokens, ())
    elif data.packing == "padded":
        files[f"{name}.npy"] = (tokens, (width,))
        files[f"{name}.lengths.npy"] = (np.dtype(np.uint32), ())
    else:
        files[f"{name}.npy"] = (tokens, (width,))
        files[f"{name}.segments.npy"] = (np.dtype(np.uint16), (width,))
    if masked:
        assert data.packing != "stream"
        files[f"{name}.learn.npy"] = (np.dtype(bool), (width,))
    record = ShardRecord(name=name, split=split, files={})
    with contextlib.ExitStack() as stack:
        arrays = [
            stack.enter_context(growing_array(folder / file_name, dtype=dtype, row_shape=shape))
            for file_name, (dtype, shape) in files.items()
        ]
        writer = ShardWriter(record, arrays, data=data, tokenizer=tokenizer, masked=masked)
        yield writer
        writer.finish()
    for file_name in files:
        path = folder / file_name
        record.files[file_name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


@dataclass(frozen=True)
class Shard:
    """The arrays of one shard, mapped from disk."""

    tokens: Integer[np.ndarray, " tokens"] | Integer[np.ndarray, "rows width"]
    lengths: Integer[np.ndarray, " rows"] | None
    segments: Integer[np.ndarray, "rows width"] | None
    learn: Bool[np.ndarray, "rows width"] | None = None  # None: every token is learnt


@dataclass(frozen=True)
class Split:
    """All shards of the training or the validation split."""

    name: str
    packing: str
    sequence_length: int  # tokens of a row that the model reads; rows hold one more
    pad_id: int
    shards: tuple[Shard, ...]
    documents: int
    text_bytes: int
    tokens: int
    learnt_tokens: int = 0  # 0 where all are learnt

    @property
    def unreachable_tokens(self) -> int:
        """Count the tokens of streams shorter than a window, which training never draws."""
        if self.packing != "stream":
            return 0
        sizes = (len(shard.tokens) for shard in self.shards)
        return sum(size for size in sizes if size <= self.sequence_length)


def open_split(
    folder: Path, records: list[ShardRecord], *, name: str, data: DataConfig, pad_id: int
) -> Split:
    """Map the shards of one split, checking that every file is byte for byte what was written.

    It reads them all, a second for a gigabyte or two: a run would learn from damaged text otherwise, and
    one that goes on would no longer be the run that it was.

    Raises:
        InputError: a file is missing or damaged.
    """
    own = [record for record in records if record.split == name]
    for record in own:
        check_checksums(folder, record)
    return Split(
        name=name,
        packing=data.packing,
        sequence_length=data.sequence_length,
        pad_id=pad_id,
        shards=tuple(open_shard(folder, record, packing=data.packing) for record in own),
        documents=sum(record.documents for record in own),
        text_bytes=sum(record.text_bytes for record in own),
        tokens=sum(record.tokens for record in own),
        learnt_tokens=sum(record.learnt_tokens for record in own),
    )


def open_shard(folder: Path, record: ShardRecord, *, packing: str) -> Shard:
    """Map the arrays of one shard."""

    def array(suffix: str) -> np.ndarray:
        # A plain view: indexing `np.memmap` itself costs several times more.
        path = folder / f"{record.name}{suffix}.npy"
        try:
            return np.asarray(np.load(path, mmap_mode="r"))
        except (ValueError, EOFError, FileNotFoundError) as error:
            raise InputError(f"{path}: damaged ({error}). {prepare_again(folder)}") from None

    return Shard(
        tokens=array(""),
        lengths=array(".lengths") if packing == "padded" else None,
        segments=array(".segments") if packing == "packed" else None,
        learn=array(".learn") if f"{record.name}.learn.npy" in record.files else None,
    )


def check_sizes(folder: Path, record: ShardRecord) -> None:
    """Refuse a shard with a missing file or one of another size than it was written with."""
    for name, known in record.files.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: a token shard is missing. {prepare_again(folder)}")
        if (found := path.stat().st_size) != known["bytes"]:
            raise InputError(
                f"{path}: has {found} bytes, was written with {known['bytes']}. "
                f"{prepare_again(folder)}"
            )


def check_checksums(folder: Path, record: ShardRecord) -> None:
    """Refuse a shard that is not byte for byte what was written; reads all of it."""
    check_sizes(folder, record)
    for name, known in record.files.items():
        if (found := sha256_of_file(folder / name)) != known["sha256"]:
            raise InputError(
                f"{folder / name}: has sha256 {found}, was written with {known['sha256']}. "
                f"{prepare_again(folder)}"
            )


def prepare_again(folder: Path) -> str:
    """Say what to do about a damaged set of shards."""
    return f"Delete {folder} and run again: the data is then prepared afresh."
