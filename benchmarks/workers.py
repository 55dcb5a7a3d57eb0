"""Processes that are measured in turns: JAX and PyTorch share no memory pool and no threads."""

import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from benchmarks.report import gpu_names


def serve(measure: Callable[[], float]) -> None:
    """Be a worker: give one measurement for each line that comes in."""
    print("ready", flush=True)
    for _ in sys.stdin:
        print(measure(), flush=True)


class Worker:
    """A process that serves; it is not alive if it ended before it was ready.

    One that runs out of memory, or lacks a package, ends so.
    """

    def __init__(self, words: Sequence[str]):
        """Start `python -m WORDS`."""
        self.seconds: list[float] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.alive = self._read() == "ready"

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def measure(self) -> None:
        """Ask for one measurement."""
        assert self._process.stdin is not None
        print("go", file=self._process.stdin, flush=True)
        told = self._read()
        self.alive = bool(told)
        if told:
            self.seconds.append(float(told))

    def end(self) -> None:
        """Let it go, with its memory."""
        self._process.communicate()


def median_seconds(jobs: Mapping[str, Sequence[str]], *, rounds: int) -> dict[str, float]:
    """Give the median measurement of each worker; those that could not are left out.

    They take turns on a CPU; each has a GPU to itself, since JAX takes most of its memory.
    """
    groups = [[name] for name in jobs] if gpu_names() else [list(jobs)]
    found = {}
    for group in groups:
        workers = {name: Worker(jobs[name]) for name in group}
        for _ in range(rounds):
            for worker in workers.values():
                if worker.alive:
                    worker.measure()
        for name, worker in workers.items():
            worker.end()
            if worker.seconds:
                found[name] = statistics.median(worker.seconds)
    return found
