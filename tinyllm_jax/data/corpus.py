"""Documents out of files, once each and in flat memory, in parts that can be read side by side."""

import functools
import hashlib
import heapq
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from tinyllm_jax.config import DataConfig
from tinyllm_jax.data import readers, toy_stories
from tinyllm_jax.data.sources import TOY, Source, file_format, find_sources
from tinyllm_jax.errors import InputError


@dataclass(frozen=True)
class Part:
    """A contiguous piece of one source file: the unit of work that can be done on its own.

    Parquet counts in row groups, JSONL and text in bytes (a part owns the documents that start in
    it), the built-in stories in stories. A compressed file is one part, whose stop is -1.
    """

    split: str  # "train", "validation", or "" = every document is split by hash
    path: str  # "toy:SEED:START:STOP" for the built-in stories
    start: int
    stop: int  # exclusive; -1 is the end
    bytes: int  # of text, estimated where the file is compressed
    held_out: tuple["Part", ...] = ()  # validation files whose documents are not trained on


@dataclass
class Counts:
    """What became of the documents of a part; the last four are left out, in that order."""

    documents_read: int = 0
    documents_kept: int = 0
    bad_records: int = 0
    too_short: int = 0
    also_in_validation: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        mine, more = asdict(self), asdict(other)
        return Counts(**{name: mine[name] + more[name] for name in mine})

    def to_table(self) -> dict[str, int]:
        """Give the counts by name."""
        return asdict(self)


def find_parts(data: DataConfig, *, part_bytes: int) -> list[Part]:
    """Plan the reading of a corpus: its files, told apart into splits and cut into parts.

    The plan depends on the files and settings alone; `sources.find_sources` says how file names
    choose the split.

    Args:
        part_bytes: Text of one part, as far as a file can be cut.

    Raises:
        InputError: nothing matches, a file is not what its name says, or a split has no text.
    """
    if not data.document_separator:
        raise InputError(
            "data.document_separator is empty. Give the text that stands between documents, such "
            "as --data.document_separator '<|endoftext|>'."
        )
    sources = find_sources(data)
    parts = [part for source in sources for part in cut(source, data, part_bytes=part_bytes)]
    for split in sorted({source.split for source in sources}):
        if not any(part.split == split for part in parts):
            names = ", ".join(source.path for source in sources if source.split == split)
            raise InputError(f"{names}: no documents in it. Give files that hold text.")
    held_out = tuple(part for part in parts if part.split == "validation")
    return [
        Part(part.split, part.path, part.start, part.stop, part.bytes, held_out)
        if part.split == "train"
        else part
        for part in parts
    ]


def cut(source: Source, data: DataConfig, *, part_bytes: int) -> list[Part]:
    """Cut one source into parts; one without text has none."""
    split, path = source.split, source.path
    if path == TOY:
        return cut_toy(split, data, part_bytes=part_bytes)
    if not os.path.isfile(path):
        raise InputError(f"{path}: a broken link, or no regular file. Bring the file or remove it.")
    known = file_format(path)
    assert known is not None
    format, compression = known
    if format == "parquet":
        return cut_parquet(split, path, data.text_field, part_bytes=part_bytes)
    readers.check_content(path, compression)
    size = readers.measure_text(path, compression)
    if size == 0:
        return []
    if compression:
        return [Part(split, path, 0, -1, size)]
    starts = range(0, size, part_bytes)
    stops = [*starts[1:], size]
    return [Part(split, path, *ends, ends[1] - ends[0]) for ends in zip(starts, stops, strict=True)]


def cut_toy(split: str, data: DataConfig, *, part_bytes: int) -> list[Part]:
    """Cut the built-in stories into parts of about `part_bytes`."""
    story_bytes = toy_stories.expected_bytes()
    step = max(1, int(part_bytes / story_bytes))
    parts = []
    for start in range(0, data.toy_documents, step):
        stop = min(start + step, data.toy_documents)
        path = f"{TOY}:{data.toy_seed}:{start}:{stop}"
        parts.append(Part(split, path, start, stop, int((stop - start) * story_bytes)))
    return parts


def cut_parquet(split: str, path: str, column: str, *, part_bytes: int) -> list[Part]:
    """Cut a parquet file between row groups, into parts of `part_bytes` or one row group."""
    # Here, so that Arrow is loaded only where parquet is read.
    from tinyllm_jax.data.parquet import row_groups

    parts, start, size = [], 0, 0
    groups = row_groups(path, column)
    for index, group in enumerate(groups):
        if size and size + group.text_bytes > part_bytes:
            parts.append(Part(split, path, start, index, size))
            start, size = index, 0
        size += group.text_bytes
    if sum(group.rows for group in groups[start:]):
        parts.append(Part(split, path, start, len(groups), size))
    return parts


def read_documents(part: Part, data: DataConfig, counts: Counts) -> Iterator[str]:
    """Read the documents of a part as they are, in order, leaving out what cannot be trained on.

    Documents of a part with `held_out` files are left out where those hold the same text.

    Args:
        counts: Filled while reading.

    Raises:
        InputError: the file is damaged, or a record holds no text and `data.on_bad_record` is
            "error"; the message names file and place.
    """

    def on_bad(message: Callable[[], str]) -> None:
        if data.on_bad_record == "error":
            raise InputError(message())
        counts.documents_read += 1
        counts.bad_records += 1

    held_out = held_out_hashes(part.held_out, data)
    for text in raw_documents(part, data, on_bad):
        counts.documents_read += 1
        if len(text.strip()) < data.min_document_characters:
            counts.too_short += 1
        elif held_out and text_hash(text, "split") in held_out:
            counts.also_in_validation += 1
        else:
            counts.documents_kept += 1
            yield text


def raw_documents(
    part: Part, data: DataConfig, on_bad: Callable[[Callable[[], str]], None]
) -> Iterator[str]:
    """Read every document of a part, whatever its length."""
    if part.path.startswith(f"{TOY}:"):
        seed = int(part.path.split(":")[1])
        return toy_stories.generate_stories(seed=seed, start=part.start, stop=part.stop)
    known = file_format(part.path)
    assert known is not None
    format, compression = known
    place = {"start": part.start, "stop": part.stop, "on_bad": on_bad}
    if format == "parquet":
        from tinyllm_jax.data.parquet import read_parquet

        return read_parquet(part.path, column=data.text_field, **place)
    if format == "jsonl":
        return readers.read_jsonl(part.path, compression, field=data.text_field, **place)
    return readers.read_text(part.path, compression, separator=data.document_separator, **place)


def text_hash(text: str, purpose: str) -> int:
    """Hash a document to 64 bits, without the blanks round it; each purpose hashes differently."""
    hashed = hashlib.blake2b(text.strip().encode(), digest_size=8, person=purpose.encode())
    return int.from_bytes(hashed.digest(), "big")


def split_of(text: str, data: DataConfig) -> str:
    """Choose the split of a document by its hash, so that its copies go the same way."""
    held_out = text_hash(text, "split") < data.validation_fraction * 2**64
    return "validation" if held_out else "train"


def held_out_hashes(parts: tuple[Part, ...], data: DataConfig) -> frozenset[int]:
    """Hash every document of the validation files: about 90 bytes of memory each."""
    states = [os.stat(part.path) for part in parts if not part.path.startswith(f"{TOY}:")]
    fingerprint = tuple((state.st_size, state.st_mtime_ns) for state in states)
    return _held_out_hashes(parts, data, fingerprint)


@functools.lru_cache(maxsize=1)
def _held_out_hashes(
    parts: tuple[Part, ...],
    data: DataConfig,
    fingerprint: tuple,  # noqa: ARG001 -- makes a changed file another key
) -> frozenset[int]:
    return frozenset(
        text_hash(text, "split") for part in parts for text in read_documents(part, data, Counts())
    )


def sample_documents(parts: Sequence[Part], data: DataConfig, *, max_bytes: int) -> Iterator[str]:
    """Read training documents, up to `max_bytes` of text, which are held in memory.

    Of a larger corpus come the documents with the smallest hashes, as many as fit: an even sample,
    whatever the order and however the files are cut.

    Raises:
        InputError: as `read_documents`, there is no document to train on, or none is small enough.
    """
    # Largest hash first; as UTF-8, since one emoji makes a `str` four times as large.
    kept: list[tuple[int, int, bytes]] = []
    counts, training, size, limit = Counts(), 0, 0, 2**64
    for part in parts:
        if part.split == "validation":
            continue
        for text in read_documents(part, data, counts):
            if part.split == "" and split_of(text, data) != "train":
                continue
            training += 1
            hashed = text_hash(text, "sample")
            if hashed >= limit:
                continue
            content = text.encode()
            heapq.heappush(kept, (-hashed, training, content))
            size += len(content)
            while size > max_bytes:
                limit = -kept[0][0]
                while kept and -kept[0][0] == limit:  # all copies of a document
                    size -= len(heapq.heappop(kept)[2])
    if not training:
        raise InputError(
            f"--data {' '.join(data.paths)}: nothing to train on. Of {counts.documents_read} "
            f"documents, {counts.bad_records} are broken records, {counts.too_short} are shorter "
            f"than data.min_document_characters={data.min_document_characters}, "
            f"{counts.also_in_validation} are validation text too and the rest fell to the "
            "validation split. Give more text, or check --data.text_field."
        )
    if not kept:
        raise InputError(
            f"tokenizer.max_sample_bytes={max_bytes} is less than a single document has. Use "
            f"--tokenizer.max_sample_bytes {10 * max_bytes} or more."
        )
    kept.sort(key=lambda entry: -entry[1])
    while kept:  # each is forgotten once it is given
        yield kept.pop()[2].decode()
