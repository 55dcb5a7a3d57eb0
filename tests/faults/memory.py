"""Memory that runs out: as Python and JAX say it, at a random call, and as a limit on a whole process."""

import contextlib
import random
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from harness import BASE, STEPS, Ended, Trial, call, flags_of_mode, inside, verdict_on
from kills import Attempt, measure

from tinyllm_jax.data import shards
from tinyllm_jax.training import checkpoint, loop, metrics

# Where memory is taken, how often a run comes there, and as what a lack of it shows.
JAX_WORDS = "RESOURCE_EXHAUSTED: Out of memory allocating 137438953472 bytes."
PLACES: dict[str, tuple[Any, str, int]] = {
    "writing a checkpoint": (checkpoint, "read_moments", STEPS // 2),
    "finishing a checkpoint": (checkpoint, "finish_step_folder", STEPS // 2),
    "placing a batch": (loop._Feed, "_read", STEPS // 4),
    "an evaluation": (loop, "evaluate", STEPS // 4),
    "a report": (loop, "write_report", STEPS // 4),
    "rows of metrics": (metrics, "_line", STEPS),
    "opening shards": (shards, "open_shard", 2),
}
LIMITS = 6


@contextlib.contextmanager
def raising(owner: Any, name: str, *, call_number: int, error: Exception) -> Iterator[None]:
    """Let a function fail once, at one of its calls."""
    real, calls = getattr(owner, name), 0

    def failing(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call_number:
            raise error
        return real(*arguments, **named)

    setattr(owner, name, failing)
    try:
        yield
    finally:
        setattr(owner, name, real)
    assert calls >= call_number, f"{name} was called {calls} times"


def raised(folder: Path, seed: int) -> list[Trial]:
    """Raise what a lack of memory raises; then go on with enough."""
    chance, found = random.Random(seed), []
    run = folder / "run"
    flags = [*flags_of_mode("pretrain", **{"run.out": run}), "--auto-resume"]
    errors = {"MemoryError": MemoryError(), "JAX": jax.errors.JaxRuntimeError(JAX_WORDS)}
    with inside(folder):
        for what, (owner, name, often) in PLACES.items():
            for kind, error in errors.items():
                number = chance.randint(1, often)
                with raising(owner, name, call_number=number, error=error):
                    ended = call(*flags)
                found.append(
                    verdict_on(
                        ended, fault="out of memory, raised", what=f"{kind}: {what}, time {number}",
                        run=run, whole=folder / BASE, go_on=lambda: call(*flags), looked_at=[run],
                    )
                )  # fmt: skip
                for path in folder.glob("run*"):
                    shutil.rmtree(path)
    return found


def limited(folder: Path, seed: int) -> list[Trial]:
    """Stop a process's memory from growing (RLIMIT_AS) at a random moment; then let it go on freely."""
    chance, found = random.Random(seed), []
    flags = flags_of_mode("pretrain")
    pace = measure(folder, flags, "limited.whole", processes=1)
    for number in range(LIMITS):
        out = f"limited.{number}"
        attempt = Attempt(folder, flags, out, processes=1)
        moment = chance.uniform(0.0, pace.start + pace.programs + 0.8 * pace.steps)
        reached = attempt.wait_until(lambda a=attempt, m=moment: a.seconds() >= m)
        pid, used = attempt.processes[0].pid, 0
        if reached and pid:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
            used = pages * resource.getpagesize() + chance.randrange(1 << 24)
            resource.prlimit(pid, resource.RLIMIT_AS, (used, used))
        (code,) = attempt.finish()
        ended = Ended(code, attempt.said())

        def go_on(out: str = out) -> Ended:
            again = Attempt(folder, flags, out, processes=1)
            (code,) = again.finish()
            return Ended(code, again.said())

        what = f"{used >> 20} MiB at {moment:.1f} s of processor time"
        found.append(
            verdict_on(
                ended, fault="out of memory, by a limit", what=what, run=folder / out,
                whole=folder / BASE, go_on=go_on, looked_at=[folder / out],
            )
        )  # fmt: skip
    return found


KINDS = {"memory": raised, "memory-limit": limited}
