"""Which files are scored, what each holds, and its records with the place they stand in."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from tinyllm_jax.config import EvaluateConfig
from tinyllm_jax.data import chat, sources
from tinyllm_jax.data.chat_records import BadRecord, holds_array, read_records
from tinyllm_jax.data.corpus import Counts, cut, read_documents
from tinyllm_jax.data.sources import TOY, Found, Source, file_format
from tinyllm_jax.errors import InputError
from tinyllm_jax.evaluation.records import kind_of

T = TypeVar("T")
# Text of one part of a file: parts are read one after another here, so one is as good as many.
PART_BYTES = 1 << 40


@dataclass(frozen=True)
class DataSet:
    """What is scored together and told as one."""

    name: str  # as a person named it, or the file's path
    kind: str  # corpus, conversations, choices or pairs
    paths: tuple[str, ...]


def find_data_sets(config: EvaluateConfig, *, say: Callable[[str], None]) -> list[DataSet]:
    """Find what `data.paths` names: the documents behind a word together, other files one by one.

    Where a folder or glob holds files for training beside others, by their names, those for
    validation are taken, or else those for testing.

    Args:
        say: Told which files were left out.

    Raises:
        InputError: nothing is there, or a file holds nothing that can be scored.
    """
    sets: list[DataSet] = []
    seen: set[str] = set()
    for word in config.data.paths:
        found = sources.find_files([word], config.documents, flag="--data")
        chosen = held_out(found)
        if len(chosen) < len(found):
            kinds = sources.kinds_of(chosen)
            say(
                f"{word}: {len(chosen)} of {len(found)} files are read, those for "
                f"{kinds[chosen[0]]} by their names. Name other files themselves to score them."
            )
        corpus, others = [], []
        for path in (each.path for each in chosen if each.path not in seen):
            seen.add(path)
            kind = find_kind(path, config)
            if kind == "corpus":
                corpus.append(path)
            else:
                others.append(DataSet(path, kind, (path,)))
        sets += [DataSet(word, "corpus", tuple(corpus))] if corpus else []
        sets += others
    return sets


def held_out(found: list[Found]) -> list[Found]:
    """Leave out the files of a folder or glob that are for training, where others are not."""
    kinds = sources.kinds_of(found)
    for kind in ("validation", "test"):
        if any(kinds[each] == kind and not each.explicit for each in found):
            return [each for each in found if each.explicit or kinds[each] == kind]
    return found


def find_kind(path: str, config: EvaluateConfig) -> str:
    """Tell what a file holds, by its first record, where the settings do not say it."""
    if config.evaluate.kind != "auto":
        return config.evaluate.kind
    known = file_format(path)
    if path == TOY or known is None or known[0] == "text":
        return "corpus"
    for place, record in _records(path, lambda *_: None):
        try:
            kind = kind_of(record, text_field=config.data.text_field)
        except BadRecord as error:
            raise InputError(f"{place}: {error}.") from None
        if kind == "corpus" and known[0] == "jsonl" and holds_array(path, known[1]):
            raise InputError(
                f"{path}: one JSON array of documents, which are read one a line only. Write one "
                "object a line (jq -c '.[]' OLD.json > NEW.jsonl)."
            )
        return kind
    raise InputError(f"{path}: no records in it. Give a file that holds some.")


def read(
    data_set: DataSet,
    config: EvaluateConfig,
    counts: Counts,
    make: Callable[[Mapping[str, Any]], T],
) -> Iterator[T]:
    """Make something of each record of a data set, as many as `evaluate.max_documents` allows.

    Raises:
        InputError: a record is broken and `data.on_bad_record` is "error"; the message names file
            and line.
    """

    def on_bad(place: str, error: BadRecord) -> None:
        if config.data.on_bad_record == "error":
            raise InputError(
                f"{place}: {error}, or pass --data.on_bad_record skip to leave such records out and "
                "count them."
            )
        counts.documents_read += 1
        counts.bad_records += 1

    def made() -> Iterator[T]:
        for path in data_set.paths:
            for place, record in _records(path, on_bad):
                try:
                    one = make(record)
                except BadRecord as error:
                    on_bad(place, error)
                    continue
                counts.documents_read += 1
                counts.documents_kept += 1
                yield one

    return islice(made(), config.evaluate.max_documents or None)


def read_texts(data_set: DataSet, config: EvaluateConfig, counts: Counts) -> Iterator[str]:
    """Read the documents of a data set, as many as `evaluate.max_documents` allows."""
    data = config.documents

    def texts() -> Iterator[str]:
        for path in data_set.paths:
            for part in cut(Source(path, ""), data, part_bytes=PART_BYTES):
                yield from read_documents(part, data, counts)

    return islice(texts(), config.evaluate.max_documents or None)


def conversation_reader(config: EvaluateConfig) -> Callable[[Mapping[str, Any]], Any]:
    """Give what makes a conversation of a record."""
    return lambda record: chat.conversation_of(record, config.chat, "")


def _records(
    path: str, on_bad: Callable[[str, BadRecord], None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the records of a file, each with its place for messages."""
    known = file_format(path)
    if path == TOY or known is None or known[0] == "text":
        raise InputError(
            f"{path}: documents, not records. Leave --evaluate.kind out, or give JSONL or parquet."
        )
    if known[0] == "parquet":
        yield from _parquet_records(path)
        return
    for line, record in read_records(path, on_bad=lambda n, error: on_bad(f"{path}:{n}", error)):
        yield f"{path}:{line}", record


def _parquet_records(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # Here, so that Arrow is loaded only where parquet is read.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        row = 0
        with pq.ParquetFile(path, memory_map=False) as file:
            for batch in file.iter_batches(batch_size=256, use_threads=False):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{path}: row {row}", record
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # of the machine, rather than of the file's content
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(
            f"{path}: not parquet, or damaged ({reason}). Get or write the file again."
        ) from None
