"""Do to tiny runs what machines do, and count how they end: `python tests/faults/campaign.py --kills 100`.

Every trial must end in exact continuation, compared bit by bit with a run that was left alone, or in
one line that says what to do. Disks that are full or read-only are small ones in memory, which takes
the right to mount (root, or `unshare -rm` before the command); without it these trials are left out.
"""

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import damage
import disks
import harness
import memory
from harness import ELSE, Trial, as_json, make_base, table, work_folder
from kills import kill_runs, shares


def main(words: Sequence[str] | None = None) -> int:
    """Run the trials that are asked for; gives 1 when one ended in another way."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs (default 100; 0 for none)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all moments and places")
    parser.add_argument("--at-once", type=int, default=1, help="runs that are killed side by side")
    parser.add_argument("--only", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--out", type=Path, help="JSON file with every trial")
    parser.add_argument("--work", type=Path, help="existing folder for the runs (default: /tmp)")
    arguments = parser.parse_args(words)
    kinds = arguments.only if arguments.only is not None else list(KINDS)
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--only {' '.join(sorted(unknown))}: choose of {', '.join(KINDS)}")
    begin, trials = time.monotonic(), []
    with work_folder(arguments.work) as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
        make_base(folder)
        for kind in kinds:
            trials += KINDS[kind](folder, arguments.seed, arguments.kills, arguments.at_once)
    facts = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} "
        f"{platform.release()}, Python {platform.python_version()}",
        "seconds": round(time.monotonic() - begin),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(as_json(trials, facts), indent=1) + "\n")
    print(table(trials))
    print(f"\n{len(trials)} trials in {facts['seconds']} s on {facts['machine']}, {facts['date']}.")
    bad = [trial for trial in trials if trial.verdict == ELSE]
    for trial in bad:
        print(f"- {trial.fault}: {trial.what}: {trial.told}")
    return 1 if bad else 0


def kills(folder: Path, seed: int, count: int, at_once: int) -> list[Trial]:
    """SIGKILL at random moments."""
    # Those that take longest first.
    todo = [(mode, processes, own) for mode, processes, own in shares(count) if own][::-1]

    def done(each: tuple[str, int, int]) -> list[Trial]:
        mode, processes, own = each
        return kill_runs(folder, mode, processes=processes, kills=own, seed=seed, say=say)

    with ThreadPoolExecutor(at_once) as pool:
        found = [*pool.map(done, todo)]
    return [trial for trials in found[::-1] for trial in trials]


def without_count(
    kind: Callable[[Path, int], list[Trial]],
) -> Callable[[Path, int, int, int], list[Trial]]:
    """Take a kind that does not ask how many SIGKILLs are wanted."""

    def called(folder: Path, seed: int, *_: int) -> list[Trial]:
        begin, trials = time.monotonic(), kind(folder, seed)
        for trial in trials:
            say(f"{trial.fault}: {trial.what}: {trial.verdict} {trial.told[:200]}")
        say(f"{kind.__name__}: {len(trials)} trials in {time.monotonic() - begin:.0f} s")
        return trials

    return called


def say(text: str) -> None:
    """Tell how far it is, on stderr."""
    print(text, file=sys.stderr, flush=True)


SINGLY = {**damage.KINDS, **disks.KINDS, **memory.KINDS}
KINDS: dict[str, Callable[[Path, int, int, int], list[Trial]]] = {
    "kills": kills,
    **{name: without_count(kind) for name, kind in SINGLY.items()},
}

if __name__ == "__main__":
    assert harness.TESTS.is_dir()
    sys.exit(main())
