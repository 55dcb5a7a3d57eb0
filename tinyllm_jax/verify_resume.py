"""Prove exact resuming on this machine: `python -m tinyllm_jax.verify_resume --config tiny`.

The run is made twice with the same settings: once whole, and once killed (SIGKILL) at random moments
and resumed each time. Checkpoints and metrics of both are compared bit by bit.
"""

import argparse
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tinyllm_jax.cli import run, say
from tinyllm_jax.config import Config, load_config
from tinyllm_jax.errors import InputError
from tinyllm_jax.settings import Parser
from tinyllm_jax.train import read_command
from tinyllm_jax.training.metrics import read_metrics
from tinyllm_jax.training.step_folders import step_folders

# A run is cut to this length where its own is not asked for: enough for several checkpoints.
SHORT_STEPS = 40
CHECKPOINTS = 5
POLL_SECONDS = 0.02
SHOWN_DIFFERENCES = 10


def main(words: Sequence[str] | None = None) -> int:
    """Kill, resume and compare as the command line says.

    Returns:
        0 when both runs are the same bits, 1 when they differ.
    """
    arguments, rest = parse(words)
    flags = [*rest, *shortened(rest)]
    config = check(flags)
    parent = Path(arguments.keep) if arguments.keep else Path(tempfile.mkdtemp(prefix="resume_"))
    if arguments.keep and parent.exists() and any(parent.iterdir()):
        raise InputError(f"{parent}: not empty. Name a new folder with --keep.")
    parent.mkdir(parents=True, exist_ok=True)
    say(f"Run      {config.train.max_steps} steps, a checkpoint every "
        f"{config.checkpoint.interval_steps}: train {shlex.join(flags)}")  # fmt: skip
    whole, killed = parent / "whole", parent / "killed"
    Attempt(flags, whole).finish()
    # Now that data are prepared and programs compiled, another run tells how long one takes.
    measured = Attempt(flags, parent / "measured")
    seconds = measured.finish()
    startup = min(measured.startup_seconds(), seconds)
    say(f"Whole    {seconds:.1f} s, {startup:.1f} s of them before the first steps")
    kills, cut = kill_and_resume(
        flags,
        killed,
        kills=arguments.kills,
        startup_seconds=startup,
        step_seconds=(seconds - startup) / config.train.max_steps,
        steps=config.train.max_steps,
        seed=arguments.kill_seed,
    )
    if kills == 0:
        raise InputError(
            "The run had ended before it could be killed. Make it longer with --max-steps, or give "
            f"another --kill-seed; {parent} keeps what was made."
        )
    return tell(whole, killed, kills=kills, cut=cut, parent=parent, keep=bool(arguments.keep))


def parse(words: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into what is ours and what is `train`'s."""
    parser = Parser(
        prog="python -m tinyllm_jax.verify_resume",
        description="Kill a run at random moments, resume it, and compare it bit by bit with a run "
        "that was left alone.",
        epilog=f"Every flag of `train` is taken, too. Without --max-steps, {SHORT_STEPS} steps are "
        "made.",
        allow_abbrev=False,  # what is left are flags of another parser
    )
    parser.add_argument("--kills", type=int, default=4, metavar="N", help="SIGKILLs (default 4)")
    parser.add_argument(
        "--kill-seed", type=int, default=0, metavar="N", help="seed of the moments (default 0)"
    )
    parser.add_argument(
        "--keep", metavar="DIR", help="new folder that keeps both runs (default: a temporary one)"
    )
    arguments, rest = parser.parse_known_args(words)
    if arguments.kills < 1:
        raise InputError(f"--kills {arguments.kills} is less than 1. Use 1 or more.")
    return arguments, rest


def shortened(flags: Sequence[str]) -> list[str]:
    """Give the flags that make a run short where the person does not say how long it is."""
    preset, overrides, _ = read_command(flags)
    # With problems there is nothing to shorten; `check` tells them.
    try:
        config = load_config(preset or "tiny", overrides)
    except InputError:
        return []
    steps = config.train.max_steps
    more = []
    if "train.max_steps" not in overrides:
        steps = min(steps, SHORT_STEPS)
        more += ["--max-steps", str(steps)]
    often = max(steps // CHECKPOINTS, 1)
    for key in ("checkpoint.interval_steps", "train.eval_interval_steps"):
        if key not in overrides:
            more += [f"--{key}", str(often)]
    return more


def check(flags: Sequence[str]) -> Config:
    """Check all settings before anything is started.

    Raises:
        InputError: a setting is wrong, or says where the run lies.
    """
    preset, overrides, problems = read_command(flags)
    for key in ("run.out", "run.resume", "run.auto_resume"):
        if key in overrides:
            problems.append(
                f"{key} is chosen by this command. Leave it out; --keep DIR keeps both."
            )
    return load_config(preset or "tiny", overrides, problems)


class Attempt:
    """One process that trains, from a start or a resume to its end or its kill."""

    def __init__(self, flags: Sequence[str], folder: Path):
        command = [sys.executable, "-m", "tinyllm_jax.train", *flags, "--out", str(folder)]
        self._log = open(folder.parent / f"{folder.name}.log", "ab")  # noqa: SIM115
        self._folder = folder
        self._start, self._began = time.monotonic(), time.time()
        self._process = subprocess.Popen(
            [*command, "--auto-resume"], stdout=self._log, stderr=self._log
        )

    def finish(self) -> float:
        """Wait for the end; gives the seconds it took.

        Raises:
            InputError: training failed; its last lines are in the message.
        """
        try:
            code = self._process.wait()
        finally:
            self._stop()
        if code != 0:
            path = Path(self._log.name)
            last = path.read_text(errors="replace").strip().splitlines()[-3:]
            text = "\n".join(last)
            raise InputError(f"training ended with code {code}; {path} holds all of it.\n{text}")
        return time.monotonic() - self._start

    def startup_seconds(self) -> float:
        """Tell how long it took until the first steps stood in the metrics."""
        rows = read_metrics(self._folder / "metrics.jsonl")
        return next(row["time"] for row in rows if row["kind"] == "speed") - self._began

    def kill_after(self, seconds: float) -> bool:
        """Kill it at a moment; False when it had ended before."""
        try:
            while time.monotonic() - self._start < seconds:
                if self._process.poll() is not None:
                    return False
                time.sleep(POLL_SECONDS)
            return True
        finally:
            self._stop()

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


def kill_and_resume(
    flags: Sequence[str],
    folder: Path,
    *,
    kills: int,
    startup_seconds: float,
    step_seconds: float,
    steps: int,
    seed: int,
) -> tuple[int, int]:
    """Run, kill and resume, then let it end.

    Each moment is somewhere in what is left of the run, the second half of its start included.

    Returns:
        How many kills met it at work, and after how many of them steps had to be made again.

    Args:
        startup_seconds: From the command to the first steps.
        step_seconds: What a step takes, with its share of evaluations and checkpoints.
        steps: Length of the run.
        seed: Seed of the moments.
    """
    chance, done, cut, saved = random.Random(seed), 0, 0, 0
    for number in range(1, kills + 1):
        left = step_seconds * (steps - saved)
        moment = chance.uniform(startup_seconds / 2, startup_seconds + left)
        if saved >= steps or not Attempt(flags, folder).kill_after(moment):
            break
        done += 1
        reached = [row["step"] for row in read_metrics(folder / "metrics.jsonl")]
        saved = max((step for step, _ in step_folders(folder)), default=0)
        cut += max(reached, default=0) > saved
        say(
            f"Kill {number:<3} after {moment:.1f} s; metrics reached step "
            f"{max(reached, default=0)}, goes on from step {saved}"
        )
    Attempt(flags, folder).finish()
    return done, cut


def tell(whole: Path, killed: Path, *, kills: int, cut: int, parent: Path, keep: bool) -> int:
    """Compare both runs and print the verdict; gives the exit code."""
    from tinyllm_jax.training.resume_check import compare_runs

    found = compare_runs(whole, killed)
    if found.differences:
        print(f"DIFFERENT after {kills} kills: {len(found.differences)} differences.")
        for difference in found.differences[:SHOWN_DIFFERENCES]:
            print(f"  {difference}")
        print(f"Both runs are kept in {parent}.")
        return 1
    print(
        f"EXACT after {kills} kills, {cut} of them past the last checkpoint: {len(found.steps)} checkpoints with {found.arrays:,} arrays of "
        f"{found.numbers:,} numbers, and {found.rows:,} rows of metrics.jsonl, are the same bits."
    )
    if keep:
        say(f"Both runs are kept in {parent}.")
    else:
        shutil.rmtree(parent)
    return 0


if __name__ == "__main__":
    run(main)
