"""What every kind of fault shares: tiny runs, a verdict on how one ended, and the count of verdicts."""

import contextlib
import gc
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(TESTS), str(TESTS.parent)) if path not in sys.path]

# Before JAX: all processes share compiled programs, also those that compile in no time.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from conftest import SMALL_RUN  # noqa: E402
from mode_runs import MODES, SHORT, flags_of, write_data  # noqa: E402

from tinyllm_jax import train  # noqa: E402
from tinyllm_jax.cli import run as run_command  # noqa: E402
from tinyllm_jax.training.resume_check import compare_runs  # noqa: E402
from tinyllm_jax.training.step_folders import damage, step_folders  # noqa: E402

EXACT, REFUSED, ELSE = "exact", "refused in one line", "anything else"
VERDICTS = (EXACT, REFUSED, ELSE)
STEPS, SAVE_EVERY = 12, 2
INTERVALS = {
    "train.max_steps": STEPS,
    "checkpoint.interval_steps": SAVE_EVERY,
    "train.eval_interval_steps": 4,
    "train.log_interval_steps": 3,
}
# A model that chats, in 2 steps of learning from a run of pretraining.
BASE = "base"
# Files that a process writes beside the one that it is to become.
HALF_WRITTEN = (".*.tmp", ".*.partial")


@dataclass(frozen=True)
class Trial:
    """One fault, and how the run that it met ended."""

    fault: str
    what: str
    verdict: str
    told: str  # the line of a refusal, or what is wrong


@dataclass(frozen=True)
class Ended:
    """How a command ended, in this process or in one of its own."""

    code: int | None  # negative: the signal that ended it
    said: str  # stderr

    @property
    def errors(self) -> list[str]:
        """The lines that say what a person is to do."""
        return [line for line in self.said.splitlines() if line.startswith("error: ")]

    @property
    def is_refusal(self) -> bool:
        """Tell one line and exit code 2, with no traceback before or after it."""
        return self.code == 2 and len(self.errors) == 1 and "Traceback" not in self.said


def flags_of_mode(mode: str, **changed: Any) -> list[str]:
    """Give the flags of a tiny run of a mode, in a folder that holds `write_data` and the base run."""
    if mode == "pretrain":
        return [*SMALL_RUN, *flags_of({**INTERVALS, **changed})]
    settings = {**SHORT, **MODES[mode], **INTERVALS, "run.init_from": BASE, **changed}
    return flags_of(settings)


def call(*flags: str) -> Ended:
    """Train in this process, ending as the command would; also what libraries tell is read."""
    with tempfile.TemporaryFile() as said:
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(said.fileno(), 2)
        stream = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (not to be closed)
        try:
            with contextlib.redirect_stderr(stream):
                code = ended_with(flags)
                gc.collect()  # what a failed save left ends here, as it would with its process
            stream.flush()
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        said.seek(0)
        return Ended(code, said.read().decode(errors="replace"))


def ended_with(flags: Sequence[str]) -> int:
    """Give the exit code of a command; an exception that would end it is printed."""
    try:
        run_command(lambda: train.main(flags))
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    return 1


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder, with the data folder there."""
    before = os.environ.get("TINYLLM_DATA_DIR")
    os.environ["TINYLLM_DATA_DIR"] = str(folder / "data")
    with contextlib.chdir(folder):
        try:
            yield
        finally:
            os.environ.pop("TINYLLM_DATA_DIR")
            if before is not None:
                os.environ["TINYLLM_DATA_DIR"] = before


def make_base(folder: Path) -> None:
    """Write the data of all modes, and the run that they begin with."""
    write_data(folder)
    with inside(folder):
        ended = call(*flags_of_mode("pretrain", **{"run.out": BASE}))
        assert ended.code == 0, ended.said


def half_written(*folders: Path) -> list[str]:
    """List what looks like the beginning of a file or a checkpoint, and checkpoints with damage."""
    found = [
        str(path)
        for folder in folders
        for pattern in HALF_WRITTEN
        for path in folder.rglob(pattern)
    ]
    for folder in folders:
        for _, path in step_folders(folder):
            if problem := damage(path):
                found.append(f"{path}: {problem}")
    return found


def differences(run: Path, whole: Path) -> str:
    """Say what differs between a run that a fault met and the one that was left alone."""
    found = compare_runs(whole, run).differences
    return "; ".join(found[:3])


def verdict_on(
    ended: Ended,
    *,
    fault: str,
    what: str,
    run: Path,
    whole: Path,
    go_on: Callable[[], Ended] | None = None,
    looked_at: Sequence[Path] = (),
) -> Trial:
    """Judge a run that met a fault.

    Args:
        go_on: Starts it once more when the fault is over; it must then end as the whole run did.
        looked_at: Folders in which nothing half-written may be left by a refusal.
    """

    def trial(verdict: str, told: str) -> Trial:
        return Trial(fault, what, verdict, told)

    if ended.code == 0:
        differs = differences(run, whole)
        return trial(ELSE if differs else EXACT, differs)
    if ended.is_refusal:
        left = half_written(*looked_at)
        if left:
            return trial(ELSE, f"left behind: {', '.join(left[:3])}")
        verdict, told = REFUSED, ended.errors[0]
    elif ended.code is not None and ended.code < 0 and go_on:
        verdict, told = EXACT, f"ended by signal {-ended.code}"
    else:
        return trial(ELSE, f"exit {ended.code}: {' | '.join(ended.said.splitlines()[-4:])}")
    if go_on:
        again = go_on()
        if again.code != 0:
            return trial(ELSE, f"does not go on: {' | '.join(again.said.splitlines()[-3:])}")
        if differs := differences(run, whole):
            return trial(ELSE, f"goes on otherwise: {differs}")
    return trial(verdict, told)


@contextlib.contextmanager
def work_folder(parent: Path | None) -> Iterator[Path]:
    """Give an empty folder for all runs of a campaign."""
    with tempfile.TemporaryDirectory(prefix="faults_", dir=parent) as name:
        yield Path(name).resolve()


def table(trials: Sequence[Trial]) -> str:
    """Count the verdicts of each fault, as a table in Markdown."""
    rows = [("fault", "trials", *VERDICTS)]
    for fault in dict.fromkeys(trial.fault for trial in trials):
        own = [trial.verdict for trial in trials if trial.fault == fault]
        rows.append((fault, str(len(own)), *(str(own.count(each)) for each in VERDICTS)))
    rows.insert(1, ("---", *("---:",) * 4))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def as_json(trials: Sequence[Trial], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Give all that a campaign found, for a file."""
    return {**facts, "trials": [vars(trial) for trial in trials]}
