"""Bytes of checkpoints, of a run folder and of token shards flipped, cut off or gone; clocks that jump."""

import contextlib
import functools
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness import (
    BASE,
    ELSE,
    EXACT,
    REFUSED,
    STEPS,
    Ended,
    Trial,
    call,
    differences,
    flags_of_mode,
    inside,
    verdict_on,
)

Harm = Callable[[Path], None]
DAY_SECONDS = 86_400.0
LAST, BEFORE_LAST = f"checkpoints/{STEPS}", STEPS - 2


def flip(path: Path, *, share: float, bit: int = 1) -> None:
    """Flip a bit of the byte at a share of the way through a file."""
    content = bytearray(path.read_bytes())
    content[min(int(share * len(content)), len(content) - 1)] ^= bit
    path.write_bytes(content)


def cut(path: Path, *, share: float) -> None:
    """Leave only the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


HARMS: dict[str, Harm] = {
    "first byte flipped": functools.partial(flip, share=0.0),
    "a byte in the middle flipped": functools.partial(flip, share=0.5),
    "highest bit of a byte flipped": functools.partial(flip, share=0.4, bit=128),
    "last byte flipped": functools.partial(flip, share=1.0),
    "cut in half": functools.partial(cut, share=0.5),
    "empty": functools.partial(cut, share=0.0),
    "gone": Path.unlink,
}


def files_below(folder: Path) -> list[str]:
    """List the files that have content."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    return sorted(path.relative_to(folder).as_posix() for path in paths)


@contextlib.contextmanager
def copied(folder: Path, run: str) -> Iterator[Path]:
    """Give a copy of a run that may be broken."""
    copy = folder / "broken"
    shutil.copytree(folder / run, copy, symlinks=True)
    try:
        yield copy
    finally:
        for path in folder.glob("broken*"):
            shutil.rmtree(path)


def checkpoint_bytes(folder: Path, seed: int, *, places: float = 0.5) -> list[Trial]:
    """Harm every file of the newest checkpoint; the run must go on from the one before.

    Args:
        places: Share of all pairs of a file and a harm that are tried.
    """
    chance = random.Random(seed)
    pairs = [(name, what) for name in files_below(folder / BASE / LAST) for what in HARMS]
    return [harmed_checkpoint(folder, *pair) for pair in pairs if chance.random() < places]


def harmed_checkpoint(folder: Path, name: str, what: str) -> Trial:
    """Resume a run with one file of its newest checkpoint harmed."""
    fault = "checkpoint: bytes flipped, files cut or removed"
    with copied(folder, BASE) as run:
        HARMS[what](run / LAST / name)
        ended = call("--resume", str(run))
        what = f"{name}: {what}"
        trial = verdict_on(ended, fault=fault, what=what, run=run, whole=folder / BASE)
    if trial.verdict == EXACT and f"where step {BEFORE_LAST} ended" not in ended.said:
        return Trial(fault, what, ELSE, "the damage was not noticed")
    return trial


def all_checkpoints(folder: Path, _: int) -> list[Trial]:
    """Harm all checkpoints, or the one that is named; and take a whole step folder away."""
    fault, found = "checkpoint: no good one where it is looked for", []
    with copied(folder, BASE) as run:
        for step in run.glob("checkpoints/*"):
            flip(step / "meta.json", share=0.5)
        for named in (run, run / LAST):
            ended = call("--resume", str(named))
            verdict = REFUSED if ended.is_refusal else ELSE
            what = f"{named.relative_to(run)} named, all damaged"
            found.append(Trial(fault, what, verdict, ended.said[-300:]))
    with copied(folder, BASE) as run:
        shutil.rmtree(run / LAST)
        ended = call("--resume", str(run))
        what = "the newest folder is gone"
        found.append(verdict_on(ended, fault=fault, what=what, run=run, whole=folder / BASE))
    return found


def run_folder(folder: Path, seed: int) -> list[Trial]:
    """Harm what lies in a run folder beside its checkpoints; the run goes on, or says which line is bad."""
    fault, found = "run folder: metrics, settings and pages damaged", []
    chance = random.Random(seed)
    names = [name for name in files_below(folder / BASE) if not name.startswith("checkpoints/")]
    for name in names:
        harms = dict(HARMS)
        for n in range(4 if name == "metrics.jsonl" else 0):
            share, bit = chance.random(), 1 << chance.randrange(8)
            harms[f"bit {bit} at {share:.2f}"] = functools.partial(flip, share=share, bit=bit)
            harms[f"cut, number {n}"] = functools.partial(cut, share=chance.random())
        for what, harm in harms.items():
            with copied(folder, BASE) as run:
                shutil.rmtree(run / LAST)
                harm(run / name)
                ended = call("--resume", str(run))
                found.append(
                    of_checkpoints(ended, fault, f"{name}: {what}", run=run, whole=folder / BASE)
                )
    return found


def of_checkpoints(ended: Ended, fault: str, what: str, *, run: Path, whole: Path) -> Trial:
    """Judge by the checkpoints alone where the earlier rows of the metrics were harmed."""
    if ended.code == 0:
        differs = [
            each
            for each in differences(run, whole).split("; ")
            if each and not each.startswith("metrics.jsonl")
        ]
        return Trial(fault, what, ELSE if differs else EXACT, "; ".join(differs))
    return verdict_on(ended, fault=fault, what=what, run=run, whole=whole)


# Shards -------------------------------------------------------------------------------------------


def edit(path: Path, *, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit a manifest as a person would, with what JSON allows."""
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table, indent=1))


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another dataset_hash": lambda table: table.update(dataset_hash="0" * 64),
    "another tokenizer_hash": lambda table: table.update(tokenizer_hash="0" * 64),
    "no shards": lambda table: table.update(shards=[]),
    "no key shards": lambda table: table.pop("shards"),
    "no key tokenizer_file": lambda table: table.pop("tokenizer_file"),
    "shards in another order": lambda table: table["shards"].reverse(),
    "more text_bytes": lambda table: table["shards"][0].update(text_bytes=1),
    "another split": lambda table: table["shards"][0].update(split="test"),
    "another size": lambda table: next(iter(table["shards"][0]["files"].values())).update(bytes=1),
}


def shards(folder: Path, seed: int, *, places: float = 0.5) -> list[Trial]:
    """Harm files of prepared data; going on must be refused, and right once it is prepared again.

    Args:
        places: Share of all pairs of a file and a harm that are tried.
    """
    chance, found = random.Random(seed), []
    modes = ("pretrain", "sft")
    with inside(folder):
        sft = call(*flags_of_mode("sft", **{"run.out": "sft"}))
    assert sft.code == 0, sft.said
    for mode, whole in zip(modes, (BASE, "sft"), strict=True):
        with copied(folder, whole) as run:
            shutil.rmtree(run / LAST)
            for name in files_of_set(folder, whole):
                harms = dict(HARMS)
                if name.endswith("manifest.json"):
                    for what, change in EDITS.items():
                        harms[what] = functools.partial(edit, change=change)
                for what, harm in harms.items():
                    if chance.random() < places:
                        told = f"{mode}, {Path(name).name}: {what}"
                        found.append(harmed_shard(folder, whole, name, harm, what=told))
    return found


def files_of_set(folder: Path, run: str) -> list[str]:
    """List the files of the prepared data that a run was made of, and of its trained tokenizer."""
    wanted = json.loads((folder / run / "dataset_stats.json").read_text())["dataset_hash"]
    for manifest in folder.glob("data/prepared/*/manifest.json"):
        if json.loads(manifest.read_text())["dataset_hash"] == wanted:
            names = [
                f"prepared/{manifest.parent.name}/{name}" for name in files_below(manifest.parent)
            ]
            trained = [f"tokenizers/{name}" for name in files_below(folder / "data/tokenizers")]
            return names + (trained if run == BASE else [])
    raise AssertionError(f"{run}: no prepared data")


def harmed_shard(folder: Path, whole: str, name: str, harm: Harm, *, what: str) -> Trial:
    """Resume a run with one file of its data harmed, and again as the refusal says."""
    away, run = folder / "data.whole", folder / "harmed"
    shutil.copytree(folder / whole, run, symlinks=True)
    shutil.rmtree(run / LAST)
    shutil.copytree(folder / "data", away)
    try:
        with inside(folder):
            harm(folder / "data" / name)

            def go_on() -> Ended:
                shutil.rmtree((folder / "data" / name).parent)
                return call("--resume", str(run))

            return verdict_on(
                call("--resume", str(run)),
                fault="token shards: bytes flipped, files cut or removed, manifest edited",
                what=what,
                run=run,
                whole=folder / whole,
                go_on=go_on,
                looked_at=[folder / "data", run],
            )
    finally:
        shutil.rmtree(run)
        shutil.rmtree(folder / "data")
        away.rename(folder / "data")


# Clocks -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def jumping_clock(seed: int, offsets: tuple[float, ...]) -> Iterator[None]:
    """Let the wall clock jump to one of some offsets at random calls."""
    chance, real, offset = random.Random(seed), time.time, offsets[0]

    def jumping() -> float:
        nonlocal offset
        if chance.random() < 0.3:
            offset = chance.choice(offsets)
        return real() + offset

    time.time = jumping
    try:
        yield
    finally:
        time.time = real


def clocks(
    folder: Path, seed: int, *, modes: tuple[str, ...] = ("pretrain", "sft", "grpo")
) -> list[Trial]:
    """Let the clock jump by a day while a run is made, and between its parts."""
    found = []
    jumps = {
        "a day back": (0.0, -DAY_SECONDS),
        "a day on": (0.0, DAY_SECONDS),
        "to and fro": (0.0, -DAY_SECONDS, DAY_SECONDS, -1.0),
        "1970": (-time.time(),),
    }
    with inside(folder):
        for mode in modes:
            whole = folder / f"{mode}.clock"
            ended = call(*flags_of_mode(mode, **{"run.out": whole}))
            assert ended.code == 0, ended.said
            for what, offsets in jumps.items():
                run = folder / "jumping"
                with jumping_clock(seed, offsets):
                    first = call(*flags_of_mode(mode, **{"run.out": run}))
                    if first.code == 0:
                        shutil.rmtree(run / LAST)
                        first = call("--resume", str(run))
                told = f"{mode}: {what}"
                found.append(
                    verdict_on(first, fault="clock jumps by a day", what=told, run=run, whole=whole)
                )
                shutil.rmtree(run)
            shutil.rmtree(whole)
    return found


KINDS = {
    "checkpoint": checkpoint_bytes,
    "all-checkpoints": all_checkpoints,
    "run-folder": run_folder,
    "shards": shards,
    "clocks": clocks,
}
assert os.sep == "/", "paths in a run folder are written with slashes"
