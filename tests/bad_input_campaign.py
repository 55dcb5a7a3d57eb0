"""Read bad input by the thousand, each in a watched process: `python tests/bad_input_campaign.py`.

    --examples 1000   of each kind
    --only KIND...    kinds to try (default all)
    --first N         number of the first example; NUMBER of KIND is always the same input
    --keep DIR        keep what made a finding

An example must end in an `InputError` of printable lines or in what was read. Anything else that is
raised, a crash, more than 20 seconds, more memory than 64 times the input and 300 MB (2.4 GB for
parquet), or a process, a
command or a connection begun meanwhile is a finding. `--atheris KIND` lets atheris, where it is
installed, look for inputs by the lines of Python that they reach, in this process.
"""

import argparse
import collections
import contextlib
import datetime
import faulthandler
import importlib.util
import multiprocessing
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from bad_input_kinds import KINDS  # noqa: E402

from tinyllm_jax.cli import _ADVICE as ADVICE  # noqa: E402
from tinyllm_jax.cli import lines_to_show  # noqa: E402
from tinyllm_jax.errors import InputError  # noqa: E402

SECONDS = 20
MEMORY_FACTOR = 64
# More address space than a process that has imported everything needs.
ADDRESS_SPACE = 6 << 30
# What reading a file never does.
FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect"),
    *("os.kill", "ctypes.dlopen", "webbrowser.open", "urllib.Request"),
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """How an example ended."""

    kind: str
    number: int
    verdict: str  # "read", "refused", or what was found
    told: str = ""
    seconds: float = 0.0
    memory: int = 0  # bytes that the peak rose by
    size: int = 0  # bytes of the input


class Slow(BaseException):
    """An example took too long."""


class Watch:
    """Notes what an example begins, and keeps it from doing so."""

    def __init__(self) -> None:
        self.on, self.seen = False, ""  # a hook cannot be taken away again
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if self.on and event in FORBIDDEN:
            self.seen = f"{event} {arguments!r:.80}"
            raise PermissionError(self.seen)  # which no reader takes for a bad file


def peak_memory() -> int:
    """Give the most memory that was resident since `forget_peak`, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    return 0


def resident() -> int:
    """Give the memory that is resident now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def size_of(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())


def try_one(kind: str, number: int, folder: Path, watch: Watch) -> Result:
    """Make an example, read it, and tell how that ended."""
    path = KINDS[kind].make(folder, random.Random(f"{kind} {number}"))
    size, told, verdict = size_of(path), "", "read"
    forget_peak()
    before, begin = resident(), time.monotonic()
    watch.seen, watch.on = "", True
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            KINDS[kind].read(path)
    except InputError as error:
        told, verdict = str(error), "refused"
        problem = message_problem(told)
        if problem:
            verdict, told = f"message: {problem}", told[:300]
    except Slow:
        verdict = "slow"
    except OSError as error:
        if error.errno in ADVICE:  # such as a name that is too long: commands say so in one line
            verdict = "refused"
        else:
            verdict, told = f"raised {type(error).__name__}", last_lines(error)
    except BaseException as error:
        verdict = f"raised {type(error).__name__}"
        told = last_lines(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        watch.on = False
    seconds, memory = time.monotonic() - begin, max(peak_memory() - before, 0)
    if watch.seen:
        verdict, told = "began something", watch.seen
    elif memory > KINDS[kind].memory + MEMORY_FACTOR * size:
        verdict, told = f"memory {memory >> 20} MiB", told
    return Result(kind, number, verdict, told, seconds, memory, size)


def last_lines(error: BaseException) -> str:
    """Write where something was raised, and what."""
    frames = traceback.format_tb(error.__traceback__)
    own = [frame for frame in frames if "tests" not in frame.split(",")[0]]
    return "".join([*own[:2], *own[-3:]])[-1500:] + f"{type(error).__name__}: {error!s:.200}"


def message_problem(told: str) -> str:
    """Say what is wrong with a message, or ""."""
    if not all(line.isprintable() for line in lines_to_show(told)):
        return "unprintable"
    if len(lines_to_show(told)) > 400:
        return "many lines"
    return "" if told.strip() else "empty"


def work(kind: str, first: int, stop: int, folder: str, here: Any, pipe: Any) -> None:
    """Try examples in a process of its own."""
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()

    def too_slow(*_: object) -> None:
        raise Slow

    signal.signal(signal.SIGALRM, too_slow)
    watch = Watch()
    random_first = random.Random(f"{kind} 0")  # what is made once is made without a limit
    KINDS[kind].make(Path(folder), random_first)
    with contextlib.suppress(BaseException):
        KINDS[kind].read(Path(folder) / "nothing")
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ADDRESS_SPACE,) * 2)
    for number in range(first, stop):
        here.value = number
        result = try_one(kind, number, Path(folder), watch)
        if os.path.exists("pickle_was_run"):
            result = Result(kind, number, "a pickle was run")
        pipe.send(result)
    pipe.send(None)


def run_kind(kind: str, first: int, stop: int, *, keep: Path | None = None) -> list[Result]:
    """Try examples of a kind, going on behind those that end their process."""
    context = multiprocessing.get_context("spawn")
    results: list[Result] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        while first < stop:
            here = context.Value("q", first - 1)
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(kind, first, stop, name, here, writer))
            process.start()
            writer.close()
            ended = collect(reader, results, process)
            process.join(5)
            if ended:
                break
            if process.is_alive():
                process.kill()
                process.join()
            reason = "hung" if process.exitcode == -signal.SIGKILL else f"crash {process.exitcode}"
            if here.value < first:
                raise RuntimeError(f"{kind}: no example could be tried ({reason})")
            results.append(Result(kind, here.value, reason))
            first = here.value + 1
    if keep is not None:
        for result in results:
            if is_finding(result):
                target = keep / f"{kind}-{result.number}".replace("/", "_").replace(" ", "_")
                target.mkdir(parents=True, exist_ok=True)
                KINDS[kind].make(target, random.Random(f"{kind} {result.number}"))
                (target / "told.txt").write_text(result.told, errors="replace")
    return results


def collect(reader: Any, results: list[Result], process: Any) -> bool:
    """Take results until the process is done, dead, or silent for too long."""
    while True:
        waited = 120 if not results else 3 * SECONDS
        try:
            if not reader.poll(waited):
                process.kill()
                return False
            result = reader.recv()
        except EOFError:
            return False
        if result is None:
            return True
        results.append(result)


def is_finding(result: Result) -> bool:
    return result.verdict not in ("read", "refused")


def usable() -> list[str]:
    """List the kinds whose libraries are here."""
    return [
        name
        for name, kind in KINDS.items()
        if all(importlib.util.find_spec(library) for library in kind.libraries)
    ]


def summary(results: Sequence[Result]) -> str:
    """Write one line of numbers about the examples of a kind."""
    verdicts = collections.Counter(result.verdict for result in results)
    slowest = max(results, key=lambda each: each.seconds)
    largest = max(results, key=lambda each: each.memory)
    found = sum(map(is_finding, results))
    return (
        f"| {results[0].kind} | {len(results):,} | {verdicts['refused']:,} | {verdicts['read']:,} | "
        f"{found} | {slowest.seconds:.1f} s | {largest.memory / 2**20:.0f} MiB of "
        f"{largest.size / 2**10:.0f} KiB |"
    )


def main(words: Sequence[str] | None = None) -> int:
    """Run the campaign; gives 1 when something was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count = int(os.environ.get("TINYLLM_BAD_INPUTS", "1000"))
    parser.add_argument("--examples", type=int, default=count)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=None, metavar="KIND")
    parser.add_argument("--keep", type=Path, default=None)
    parser.add_argument("--atheris", metavar="KIND", default=None)
    arguments = parser.parse_args(words)
    if arguments.atheris:
        return with_atheris(arguments.atheris, seconds=arguments.examples)
    kinds = arguments.only if arguments.only is not None else usable()
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--only {' '.join(sorted(unknown))}: choose of {', '.join(KINDS)}")
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python "
          f"{platform.python_version()}\n")  # fmt: skip
    print("| kind | examples | refused | read | findings | slowest | largest rise of memory |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    bad: list[Result] = []
    for kind in kinds:
        stop = arguments.first + arguments.examples
        results = run_kind(kind, arguments.first, stop, keep=arguments.keep)
        print(summary(results), flush=True)
        bad += filter(is_finding, results)
    groups = collections.defaultdict(list)
    for each in bad:
        last = each.told.strip().splitlines()[-1:] or [""]
        groups[each.kind, each.verdict, last[0][:60]].append(each)
    for (kind, verdict, _), each in groups.items():
        numbers = [one.number for one in each[:5]]
        print(f"\n{kind}: {verdict}, {len(each)} times, such as {numbers}\n{each[0].told}")
    return 1 if bad else 0


def with_atheris(kind: str, *, seconds: int) -> int:
    """Let coverage guide the bytes behind a kind's one file, for so many seconds.

    Kinds of one file only. libFuzzer ends the process at its first finding and writes the input.
    """
    import atheris

    folder = Path(tempfile.mkdtemp())
    corpus = folder / "corpus"
    corpus.mkdir()
    path = None
    for number in range(50):
        path = KINDS[kind].make(folder, random.Random(f"{kind} {number}"))
        shutil.copy(path, corpus / f"{number}")
    assert path is not None
    atheris.instrument_all()
    seen = folder / path.name

    def one(content: bytes) -> None:
        seen.write_bytes(content)
        with contextlib.suppress(InputError):
            KINDS[kind].read(seen)

    atheris.Setup(
        [sys.argv[0], str(corpus), f"-max_total_time={seconds}", "-timeout=20", "-close_fd_mask=1"],
        one,
    )
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
