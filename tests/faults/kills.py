"""SIGKILL at random moments of runs of one and of two processes, each gone on with until its end.

A moment is an amount of processor time, so it falls on the same work on a machine that is busy. Most
fall on steps, saves and evaluations, the others on what a process does before its first step.
"""

import contextlib
import functools
import os
import random
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import forked
from harness import (
    ELSE,
    EXACT,
    SAVE_EVERY,
    STEPS,
    Trial,
    differences,
    flags_of_mode,
    half_written,
)

from tinyllm_jax.training.step_folders import step_folders

# Mode, processes, and its share of the kills. What learns from its own answers does so in one process.
SHARES = {
    ("pretrain", 1): 28,
    ("sft", 1): 20,
    ("grpo", 1): 14,
    ("ppo", 1): 10,
    ("pretrain", 2): 18,
    ("sft", 2): 10,
}
# Shares of the kills by what the process is at: the others fall on steps, saves and evaluations.
DURING_START, BEFORE_STEPS = 0.15, 0.15
POLL_SECONDS = 0.002
END_SECONDS = 600
# Processes that miss each other on a machine that is too busy stop with a line, and are started again.
STARVED = 5
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Kill:
    """What one kill met."""

    moment: str
    saved: int  # newest checkpoint at that moment
    was_saving: bool
    problem: str = ""
    survivors: list[str] = field(default_factory=list)


def cpu_seconds(process: BaseProcess) -> float:
    """Tell the processor time of a process with all its threads; 0 when it is gone."""
    try:
        text = Path(f"/proc/{process.pid}/stat").read_text()
    except OSError:
        return 0.0
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def free_port() -> int:
    """Find a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Attempt:
    """The processes of a run, from a start or a resume to their end or a kill."""

    def __init__(self, folder: Path, flags: list[str], out: str, *, processes: int):
        self.run, self._begin = folder / out, time.monotonic()
        environment = {
            "TINYLLM_DATA_DIR": str(folder / "data"),
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        }
        meeting = ["--distributed.coordinator", f"127.0.0.1:{free_port()}"]
        meeting += ["--distributed.num_processes", str(processes)]
        meeting += ["--distributed.heartbeat_timeout_seconds", "30"]
        self.logs = [folder / f"{out}.{index}.log" for index in range(processes)]
        self._metrics = self.run / "metrics.jsonl"
        self._opened_before = self._stamp()
        self._size: int | None = None  # of the metrics when they were opened
        self._saved_before, self._partial_before = newest(self.run), stamps_of_partial(self.run)
        self.processes = []
        for index, log in enumerate(self.logs):
            log.write_bytes(b"")  # here, since a process may be killed before it opens its own
            mine = [*meeting, "--distributed.process_id", str(index)] if processes > 1 else []
            words = [*flags, *mine, "--out", out, "--auto-resume"]
            process = forked.start(words, folder=folder, log=log, environment=environment)
            self.processes.append(process)

    def _stamp(self) -> tuple[int, ...]:
        try:
            status = self._metrics.stat()
        except OSError:
            return ()
        return status.st_ino, status.st_mtime_ns

    def is_open(self) -> bool:
        """Tell that this attempt has begun to write to the run folder."""
        return self._stamp() != self._opened_before

    def has_stepped(self) -> bool:
        """Tell that this attempt has told of steps of its own."""
        if not self.is_open():
            return False
        with contextlib.suppress(OSError):  # an earlier run is being set aside
            size = self._metrics.stat().st_size
            if self._size is None:
                self._size = size
            return size > self._size
        return False

    def has_saved(self, count: int) -> bool:
        """Tell that this attempt has finished so many checkpoints."""
        return newest(self.run) >= self._saved_before + count * SAVE_EVERY

    def is_saving(self) -> bool:
        """Tell that a checkpoint of this attempt is half written."""
        return bool(stamps_of_partial(self.run) - self._partial_before)

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Wait for something; False when a process has ended before it."""
        while not condition():
            if any(process.exitcode is not None for process in self.processes):
                return False
            if time.monotonic() - self._begin > END_SECONDS:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def seconds(self) -> float:
        """Tell the processor time of the first process."""
        return cpu_seconds(self.processes[0])

    def seconds_to_the_end(self) -> float:
        """Wait until the first process ends, and tell its processor time."""
        last = 0.0
        while self.processes[0].exitcode is None and time.monotonic() < self._begin + END_SECONDS:
            last = max(last, self.seconds())
            time.sleep(POLL_SECONDS)
        return last

    def kill(self, indices: list[int]) -> None:
        """Send SIGKILL to some of the processes at once."""
        for index in indices:
            self.processes[index].kill()

    def finish(self) -> list[int]:
        """Wait for the end of all; what lasts too long is killed, and its code says so."""
        for process in self.processes:
            left = END_SECONDS - (time.monotonic() - self._begin)
            process.join(timeout=max(left, 1))
            if process.exitcode is None:
                process.kill()
                process.join()
        return [process.exitcode or 0 for process in self.processes]

    def said(self, index: int = 0) -> str:
        """Give what a process has told."""
        return self.logs[index].read_text(errors="replace")


@dataclass(frozen=True)
class Pace:
    """Processor time that a whole run takes."""

    start: float  # until the run folder is open
    programs: float  # from then until the first steps are told
    steps: float  # from then to the end


def measure(folder: Path, flags: list[str], out: str, *, processes: int) -> Pace:
    """Make a run that is left alone, and tell what it took."""
    for _ in range(STARVED):
        attempt = Attempt(folder, flags, out, processes=processes)
        opened = attempt.wait_until(attempt.is_open)
        start = attempt.seconds()
        opened = opened and attempt.wait_until(attempt.has_stepped)
        stepped = attempt.seconds()
        last = attempt.seconds_to_the_end()
        if opened and not any(attempt.finish()):
            return Pace(start, stepped - start, max(last - stepped, 0.05))
        for path in folder.glob(f"{out}*/"):
            shutil.rmtree(path)
    raise RuntimeError(f"a run that was left alone failed: {attempt.said()}")


def kill_runs(
    folder: Path, mode: str, *, processes: int, kills: int, seed: int, say: Callable[[str], None]
) -> list[Trial]:
    """Kill runs of a mode until there are so many kills, and compare every one that ends."""
    fault = f"SIGKILL, {mode}, {processes} process{'es' if processes > 1 else ''}"
    flags = flags_of_mode(mode)
    name = f"{mode}{processes}"
    measure(folder, flags, f"{name}.first", processes=processes)  # compiles
    pace = measure(folder, flags, f"{name}.whole", processes=processes)
    chance, done, number = random.Random(f"{seed} {fault}"), [], 0
    while len(done) < kills:
        out = f"{name}.{number}"
        met, problem = kill_until_the_end(
            folder, flags, out, processes, pace, chance, left=kills - len(done)
        )
        differs = problem or differences(folder / out, folder / f"{name}.whole")
        for kill in met:
            bad = kill.problem or differs
            done.append(Trial(fault, describe(kill), ELSE if bad else EXACT, bad))
            say(f"{fault}, run {number}: {describe(kill)}: {bad or 'exact'}")
        number += 1
    return done


def describe(kill: Kill) -> str:
    """Say when a kill came."""
    saving = ", a checkpoint half written" if kill.was_saving else ""
    return f"{kill.moment}, step {kill.saved} saved{saving}"


def kill_until_the_end(
    folder: Path,
    flags: list[str],
    out: str,
    processes: int,
    pace: Pace,
    chance: random.Random,
    *,
    left: int,
) -> tuple[list[Kill], str]:
    """Kill one run again and again until it has ended by itself; gives the kills and what is wrong."""
    run, met, starved = folder / out, [], 0
    while True:
        saved = newest(run)
        attempt = Attempt(folder, flags, out, processes=processes)
        kill = None
        if len(met) < left:
            kill = strike(attempt, pace, chance)
        codes = attempt.finish()
        text = attempt.said()
        # What this process went on from is the newest checkpoint that the last one left.
        found = re.search(r"exactly where step (\d+) ended", text)
        if found and int(found[1]) != saved:
            return met, f"went on from step {found[1]}, and step {saved} was saved"
        if kill is None:
            if (
                any(codes)
                and (starved := starved + 1) <= STARVED
                and not what_is_wrong(attempt, codes, run)
            ):
                continue
            return met, f"exit {codes}: {text[-300:]}" if any(codes) else ""
        kill.problem = what_is_wrong(attempt, codes, run)
        met.append(kill)


def strike(attempt: Attempt, pace: Pace, chance: random.Random) -> Kill | None:
    """Kill at a random moment; None where the run had ended by itself before."""
    count = len(attempt.processes)
    victims = list(range(count))
    kind = chance.random()
    if kind < DURING_START:
        moment, after, seconds = "at the start", None, pace.start
    elif kind < DURING_START + BEFORE_STEPS:
        moment, after, seconds = "before the first step", attempt.is_open, pace.programs
    else:
        # The steps of a few checkpoints, since looks and programs take longer than they do.
        done = chance.choice((0, 1, 1, 2))
        moment, seconds = "at work", 2 * pace.steps * SAVE_EVERY / STEPS
        after = functools.partial(attempt.has_saved, done) if done else attempt.has_stepped
    if after and count > 1 and chance.random() < 0.5:  # else the machine loses its power
        victims = [chance.randrange(count)]
        moment += f", process {victims[0]} alone"
    seconds *= chance.random()
    is_due = after is None or attempt.wait_until(after)
    begin = attempt.seconds() if after else 0.0
    is_due = is_due and attempt.wait_until(lambda: attempt.seconds() >= begin + seconds)
    if not is_due:
        return None
    attempt.kill(victims)
    for victim in victims:
        attempt.processes[victim].join()
    return Kill(moment, newest(attempt.run), attempt.is_saving())


def what_is_wrong(attempt: Attempt, codes: list[int], run: Path) -> str:
    """Check what a kill has left: whole checkpoints, and processes that say why they end."""
    damaged = [each for each in half_written(run) if not Path(each).name.startswith(".")]
    if damaged:
        return damaged[0]
    for index, code in enumerate(codes):
        if code in (0, -9):
            continue
        lines = [line for line in attempt.said(index).splitlines() if line.startswith("error: ")]
        if code not in (1, 2) or len(lines) != 1:
            return f"process {index} was left and ended with {code}: {attempt.said(index)[-300:]}"
    return ""


def stamps_of_partial(run: Path) -> set[tuple[int, int]]:
    """Tell the folders of checkpoints that are half written from others of the same name."""
    found = set()
    for path in (run / "checkpoints").glob(".*.partial"):
        with contextlib.suppress(OSError):
            status = path.stat()
            found.add((status.st_ino, status.st_ctime_ns))
    return found


def newest(run: Path) -> int:
    """Give the step of the newest checkpoint."""
    return max((step for step, _ in step_folders(run)), default=0)


def shares(kills: int) -> Iterator[tuple[str, int, int]]:
    """Divide kills between modes and numbers of processes."""
    total, given, whole = sum(SHARES.values()), 0, 0
    for (mode, processes), share in SHARES.items():
        whole += share
        upto = round(kills * whole / total)
        yield mode, processes, upto - given
        given = upto
