"""Groups of corpus parts, each tokenised by one process into shards of its own."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllm_jax.config import DataConfig
from tinyllm_jax.data.corpus import Counts, Part, read_documents, split_of
from tinyllm_jax.data.files import write_file
from tinyllm_jax.data.shards import ShardRecord, ShardWriter, check_checksums, shard_writer
from tinyllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from tinyllm_jax.errors import InputError
from tinyllm_jax.host import available_cores

# Text that is tokenised in one library call.
BATCH_BYTES = 1 << 18


@dataclass(frozen=True)
class Group:
    """Neighbouring parts whose documents share shards, so that small files make no small shards.

    Groups depend on the corpus alone, so any number of processes writes the same shards.
    """

    name: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """Source bytes, for progress."""
        return sum(part.bytes for part in self.parts)


@dataclass
class SourceRecord:
    """What one part gave."""

    path: str
    counts: dict[str, int]  # documents read, kept and left out, by reason
    tokens: int
    text_bytes: int


@dataclass
class GroupRecord:
    """What one group gave: its shards, and an account of each part."""

    shards: list[ShardRecord]
    sources: list[SourceRecord]


def plan_groups(parts: Sequence[Part], *, group_bytes: int) -> list[Group]:
    """Join neighbouring parts of a split up to about `group_bytes` of source.

    A group has at least half of that where the split does, since a stream shorter than a window is
    never trained on.
    """
    joined: list[list[Part]] = []
    for split in sorted({part.split for part in parts}):
        own: list[list[Part]] = []
        size = 0
        for part in (part for part in parts if part.split == split):
            if not own or (size >= group_bytes / 2 and size + part.bytes > group_bytes):
                own.append([])
                size = 0
            own[-1].append(part)
            size += part.bytes
        if len(own) > 1 and size < group_bytes / 2:
            last = own.pop()
            own[-1] += last
        joined += own
    return [Group(name=f"{index:05d}", parts=tuple(own)) for index, own in enumerate(joined)]


def tokenise_group(
    group: Group,
    *,
    data: DataConfig,
    tokenizer: Tokenizer,
    folder: Path,
    on_progress: Callable[[int], object],
) -> GroupRecord:
    """Tokenise a group into shards in `folder`, and write its record once they are whole.

    Args:
        on_progress: Called with the source bytes of each part done.
    """
    sources = []
    with contextlib.ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        for part in group.parts:
            counts = Counts()
            tokens = text_bytes = 0
            for batch in batches_of(read_documents(part, data, counts)):
                for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                    split = part.split or split_of(text, data)
                    if split not in writers:
                        writers[split] = stack.enter_context(
                            shard_writer(
                                folder,
                                f"{group.name}.{split}",
                                split=split,
                                data=data,
                                tokenizer=tokenizer,
                                masked=False,
                            )
                        )
                    ids = [tokenizer.bos_id, *ids, tokenizer.eos_id]
                    size = len(text.encode())
                    writers[split].add(ids, text_bytes=size)
                    tokens += len(ids)
                    text_bytes += size
            sources.append(SourceRecord(part.path, counts.to_table(), tokens, text_bytes))
            on_progress(part.bytes)
    record = GroupRecord([writer.record for writer in writers.values()], sources)
    content = json.dumps(dataclasses.asdict(record), indent=1)
    write_file(folder / f"{group.name}.json", content.encode())
    return record


def batches_of(documents: Iterable[str]) -> Iterator[list[str]]:
    """Gather documents up to `BATCH_BYTES` characters, so that memory stays flat."""
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def finished_group(group: Group, *, folder: Path) -> GroupRecord | None:
    """Read the record of a group that an earlier run finished whole, or give None."""
    path = folder / f"{group.name}.json"
    if not path.is_file():
        return None
    try:
        record = group_record(json.loads(path.read_bytes()))
        for shard in record.shards:
            check_checksums(folder, shard)
    except (InputError, ValueError, TypeError, KeyError):
        return None  # damaged: the group is done again
    return record


def group_record(table: dict[str, Any]) -> GroupRecord:
    """Rebuild a record from its JSON."""
    return GroupRecord(
        shards=[ShardRecord(**shard) for shard in table["shards"]],
        sources=[SourceRecord(**source) for source in table["sources"]],
    )


def tokenise_groups(
    groups: Sequence[Group],
    *,
    data: DataConfig,
    tokenizer: Tokenizer,
    tokenizer_path: Path,
    folder: Path,
    on_progress: Callable[[int], object],
) -> list[GroupRecord]:
    """Tokenise every group that is not done yet, where `data.runner` says.

    Args:
        tokenizer_path: File of `tokenizer`, for the other processes to load.
        on_progress: Called with source bytes as they are done.

    Returns:
        One record a group, in order.
    """
    records = {group.name: finished_group(group, folder=folder) for group in groups}
    todo = [group for group in groups if records[group.name] is None]
    on_progress(sum(group.bytes for group in groups if records[group.name] is not None))
    if data.runner == "ray":
        from tinyllm_jax.data.ray_groups import run_on_ray as runner
    else:
        runner = run_here
    done = runner(
        todo,
        data=data,
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path,
        folder=folder,
        on_progress=on_progress,
    )
    with contextlib.closing(done):
        for group, record in done:
            records[group.name] = record
    return [record for record in records.values() if record is not None]


def run_here(
    todo: Sequence[Group],
    *,
    data: DataConfig,
    tokenizer: Tokenizer,
    tokenizer_path: Path,
    folder: Path,
    on_progress: Callable[[int], object],
) -> Generator[tuple[Group, GroupRecord], None, None]:
    """Tokenise groups in processes of this machine, and give each with its record as it is done."""
    processes = min(data.workers or available_cores(), len(todo))
    if processes <= 1:  # starting a process takes longer than a small corpus
        for group in todo:
            record = tokenise_group(
                group, data=data, tokenizer=tokenizer, folder=folder, on_progress=on_progress
            )
            yield group, record
        return
    # Spawn, since JAX's threads in this process would be cut off in the middle by a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=start_worker) as pool:
        jobs = {
            pool.submit(run_worker, group, data, tokenizer_path, folder): group for group in todo
        }
        try:
            for job in as_completed(jobs):
                record = job.result()
                on_progress(jobs[job].bytes)
                yield jobs[job], record
        except BrokenProcessPool:
            raise InputError(
                "A process that prepared text was killed, probably for lack of memory. Use "
                f"--data.workers {processes // 2} or another smaller number; what is done is kept."
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def is_toy(path: str) -> bool:
    """Tell the built-in stories, whose parts are no files, from files."""
    return path.startswith("toy:")


def start_worker() -> None:
    """Set up a worker process: one core each, and gone when the parent is."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C reaches the whole process group; the parent then lets each worker end its group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def run_worker(group: Group, data: DataConfig, tokenizer_path: Path, folder: Path) -> GroupRecord:
    """Tokenise one group in a worker process."""
    return tokenise_group(
        group,
        data=data,
        tokenizer=load_tokenizer(tokenizer_path),
        folder=folder,
        on_progress=lambda _: None,
    )
