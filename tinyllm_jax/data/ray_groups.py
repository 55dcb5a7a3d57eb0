"""Groups tokenised on a Ray cluster: the same work as in local processes, a group a task.

Nothing but records travels through Ray. Every node reads the text, and writes its shards, where the
driver does, so all of them need one shared file system; each task looks before it works.
"""

import contextlib
import itertools
import os
import socket
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tinyllm_jax.config import DataConfig
from tinyllm_jax.data.files import sha256_of_file
from tinyllm_jax.data.groups import Group, GroupRecord, is_toy, run_worker
from tinyllm_jax.data.tokenizer import Tokenizer
from tinyllm_jax.errors import InputError

# How often a group is begun again after its process or its machine was lost.
RETRIES = 3
# Tasks handed over at least where `data.workers` sets no bound, so that a cluster that starts machines
# on demand sees a demand; else two for each core, so that none waits for the driver.
IN_FLIGHT = 16
# Seconds that a shared file system may take to show one machine what another has written.
VISIBLE_SECONDS = 30.0
# Seconds that a cluster may take to answer at all.
CONNECT_SECONDS = 10.0
# What turns text into tokens and bytes: another version elsewhere would write other shards unseen.
LIBRARIES = ("numpy", "pyarrow", "sentencepiece", "tokenizers")


@dataclass(frozen=True)
class Shared:
    """What the driver sees, and every node must see too."""

    cwd: str
    folder: Path
    tokenizer_path: Path
    tokenizer_hash: str
    files: dict[str, tuple[int, int]]  # bytes and mtime of the files of one group
    libraries: dict[str, str]


def run_on_ray(
    todo: Sequence[Group],
    *,
    data: DataConfig,
    tokenizer: Tokenizer,
    tokenizer_path: Path,
    folder: Path,
    on_progress: Callable[[int], object],
) -> Generator[tuple[Group, GroupRecord], None, None]:
    """Tokenise groups on a Ray cluster, and give each with its record as it is done.

    A task whose process or machine is lost is begun again elsewhere, up to three times.

    Raises:
        InputError: Ray or a cluster is missing, a node does not see the files, or a group failed;
            the message names the file.
    """
    ray = import_ray()
    is_callers = ray.is_initialized()
    with contextlib.nullcontext() if is_callers else connected(ray, data.ray_address):
        task = ray.remote(max_retries=RETRIES, num_cpus=1)(run_task)
        pending: dict[Any, Group] = {}
        waiting = iter(todo)
        try:
            while True:
                room = (data.workers or in_flight(ray)) - len(pending)
                for group in itertools.islice(waiting, max(room, 0)):
                    shared = describe(group, tokenizer, tokenizer_path, folder)
                    pending[task.remote(group, data, shared)] = group
                if not pending:
                    return
                done, _ = ray.wait(list(pending), num_returns=1)
                for job in done:
                    record = result_of(ray, job, pending[job])
                    group = pending.pop(job)
                    wait_for_shards(folder, group, record)
                    on_progress(group.bytes)
                    yield group, record
        finally:
            # Tasks end with our own connection. In a caller's they are waited for, as in processes
            # of this machine: to cancel a task as it ends brings Ray 2.60 down.
            if pending and is_callers:
                ray.wait(list(pending), num_returns=len(pending))


def import_ray() -> Any:
    """Import Ray, which is an extra.

    Raises:
        InputError: it is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise InputError(
            "data.runner=ray needs the package ray, which is not installed. Use "
            "pip install 'tinyllm[ray]', or --data.runner local."
        ) from None
    return ray


@contextlib.contextmanager
def connected(ray: Any, address: str) -> Iterator[None]:
    """Join a cluster, or start one on this machine for as long as the block lasts.

    Raises:
        InputError: there is none to join.
    """
    options = {"log_to_driver": False, "configure_logging": False, "logging_level": "error"}
    if address == "local":
        options |= {"address": "local", "include_dashboard": False}
    else:
        options |= {"address": address}
    try:
        check_listening(address)
        ray.init(**options)
    except (OSError, ValueError, RuntimeError) as error:
        if address == "local":
            raise
        raise InputError(
            f"data.ray_address={address} leads to no Ray cluster "
            f"({one_line(error)}). Start one with `ray start --head`, give its HOST:PORT, or use "
            "--data.ray_address local for one on this machine."
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def check_listening(address: str) -> None:
    """Knock at a cluster's door, since Ray itself waits for minutes before it gives up.

    Raises:
        OSError: nobody answers.
    """
    named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, _, port = named.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


def in_flight(ray: Any) -> int:
    """Count the tasks to hand over at a time, of a cluster that may be growing."""
    return max(2 * int(ray.cluster_resources().get("CPU", 0)), IN_FLIGHT)


def describe(group: Group, tokenizer: Tokenizer, tokenizer_path: Path, folder: Path) -> Shared:
    """Note what this machine sees of a group's files."""
    paths = {part.path for part in group.parts if not is_toy(part.path)}
    return Shared(
        os.getcwd(),
        folder,
        tokenizer_path,
        tokenizer.hash,
        {path: size_and_time(path) for path in sorted(paths)},
        library_versions(),
    )


def size_and_time(path: str) -> tuple[int, int]:
    """Give what changes when a file does."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def library_versions() -> dict[str, str]:
    """Give the versions of what decides which tokens a text becomes."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # installed in another way than from a package
            continue
    return found


def run_task(group: Group, data: DataConfig, shared: Shared) -> GroupRecord:
    """Tokenise one group on whichever machine Ray chose."""
    # One core a task is what Ray was told.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    check_shared(shared)
    return run_worker(group, data, shared.tokenizer_path, shared.folder)


def check_shared(shared: Shared) -> None:
    """Refuse to work on a machine that has other files or libraries than the driver.

    Raises:
        InputError: names the machine and what it lacks.
    """
    node = socket.gethostname()
    if (mine := library_versions()) != shared.libraries:
        raise InputError(
            f"The machine {node} has {mine}, and the one that asks has {shared.libraries}. "
            "Install the same versions on all, since shards could differ."
        )
    advice = (
        "All machines of a Ray cluster need the text and TINYLLM_DATA_DIR under the same paths, on "
        "a shared file system."
    )
    try:
        os.chdir(shared.cwd)  # relative paths are meant from there
    except OSError:
        paths = [*shared.files, str(shared.folder)]
        if not all(map(os.path.isabs, paths)):
            raise InputError(
                f"The machine {node} does not have the folder {shared.cwd}, from which paths are "
                f"given. {advice}"
            ) from None
    path = shared.tokenizer_path
    wait_until(path.is_file)
    if not path.is_file() or sha256_of_file(path) != shared.tokenizer_hash:
        raise InputError(f"The machine {node} does not see {path} as it was written. {advice}")
    for name, expected in shared.files.items():
        try:
            found = size_and_time(name)
        except OSError:
            found = None
        if found != expected:
            seen = "does not see it" if found is None else "sees another file there"
            raise InputError(f"{name}: the machine {node} {seen}. {advice}")


def wait_until(condition: Callable[[], bool]) -> None:
    """Give a shared file system time to show what has been written elsewhere."""
    end = time.monotonic() + VISIBLE_SECONDS
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)


def wait_for_shards(folder: Path, group: Group, record: GroupRecord) -> None:
    """Check that what another machine wrote is here.

    Raises:
        InputError: it is not.
    """
    names = [f"{group.name}.json"]
    names += [name for shard in record.shards for name in shard.files]
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return
    wait_until(lambda: all((folder / name).is_file() for name in missing))
    if not all((folder / name).is_file() for name in missing):
        raise InputError(
            f"{folder / missing[0]}: written by a machine of the Ray cluster, and not seen here. "
            "Give a TINYLLM_DATA_DIR that all machines share."
        )


def result_of(ray: Any, job: Any, group: Group) -> GroupRecord:
    """Take a task's record, or raise what stopped it.

    Raises:
        InputError: the text is wrong, or process or machine were lost again and again.
    """
    errors = ray.exceptions
    try:
        return ray.get(job)
    except errors.RayTaskError as error:
        cause = error.cause
        if not isinstance(cause, (InputError, OSError)):
            error.add_note(f"while preparing {files_of(group)}")
            raise
        if isinstance(cause, OSError):
            cause.add_note(f"while preparing {files_of(group)}")
        raise cause from None
    except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError) as error:
        raise InputError(
            f"{files_of(group)}: the process that prepared it was lost {RETRIES + 1} times, "
            f"probably for lack of memory ({type(error).__name__}). Use --data.workers with fewer "
            "processes than the cluster has cores; what is done is kept."
        ) from None
    except errors.RayError as error:
        raise InputError(
            f"{files_of(group)}: Ray could not run it ({one_line(error)}). What is done is kept: "
            "the same command goes on. All machines need the same tinyllm installed."
        ) from None


def files_of(group: Group) -> str:
    """Name the files of a group, the first ones where they are many."""
    names = list(dict.fromkeys(part.path for part in group.parts))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def one_line(error: BaseException) -> str:
    """Give the first words of an error, whose text may fill a screen."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
