"""Disks that are full or read-only, and folders that vanish, before a run and in the middle of one."""

import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from harness import (
    BASE,
    ELSE,
    EXACT,
    STEPS,
    Ended,
    Trial,
    call,
    differences,
    flags_of_mode,
    half_written,
    inside,
    verdict_on,
)

from tinyllm_jax.training.progress import Progress

ENOUGH_BYTES = 64 << 20
PAGE_BYTES = 4096
LAST = f"checkpoints/{STEPS}"


class NoMountsError(Exception):
    """This user may not mount."""


@contextlib.contextmanager
def small_disk(place: Path, *, size: int) -> Iterator[Callable[[str], None]]:
    """Mount a disk in memory with so many bytes; gives what changes its options."""

    def mount(options: str) -> None:
        words = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise NoMountsError(done.stderr.strip())

    place.mkdir(parents=True, exist_ok=True)
    mount(f"size={size}")
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()


@contextlib.contextmanager
def at_step(step: int, action: Callable[[], object]) -> Iterator[None]:
    """Do something when a run in this process has made a step."""
    advance = Progress.advance

    def advance_and_act(self: Progress, now: int) -> None:
        advance(self, now)
        if now == step:
            action()

    Progress.advance = advance_and_act
    try:
        yield
    finally:
        Progress.advance = advance


def bytes_of(*folders: Path) -> int:
    """Count what the files of folders take, in whole pages as on the disk."""
    sizes = [path.stat().st_size for folder in folders for path in folder.rglob("*")]
    return sum(-size // PAGE_BYTES * -PAGE_BYTES for size in sizes)


def full_while_preparing(folder: Path, seed: int, *, trials: int = 6) -> list[Trial]:
    """Give tokenizer and shards a disk that is too small; then a larger one."""
    chance, found = random.Random(seed), []
    fault = "disk full while data are prepared"
    for _ in range(trials):
        size = int(chance.uniform(0.05, 0.95) * bytes_of(folder / "data"))
        run, small = folder / "run", folder / "small"
        with inside(small_parent(small)), small_disk(small / "data", size=size) as remount:
            flags = flags_of_mode("pretrain", **{"run.out": run})

            def go_on(remount=remount, flags=flags) -> Ended:
                remount(f"size={ENOUGH_BYTES}")
                return call(*flags, "--auto-resume")

            ended = call(*flags)
            what = f"{size} bytes"
            found.append(
                verdict_on(
                    ended, fault=fault, what=what, run=run, whole=folder / BASE, go_on=go_on,
                    looked_at=[small, run],
                )
            )  # fmt: skip
        clean(folder, "run")
    return found


def small_parent(folder: Path) -> Path:
    """Make a folder in which a disk can be mounted as its data folder."""
    folder.mkdir(exist_ok=True)
    return folder


def clean(folder: Path, name: str) -> None:
    """Remove a run and those that were set aside for it."""
    for path in folder.glob(f"{name}*"):
        shutil.rmtree(path)


def full_while_saving(folder: Path, seed: int, *, trials: int = 10) -> list[Trial]:
    """Give the run folder a disk that is too small, or fill it in the middle; then make room."""
    chance, found = random.Random(seed), []
    need, fault = bytes_of(folder / BASE), "disk full while checkpoints and metrics are written"
    for number in range(trials):
        disk, run = folder / "disk", folder / "disk/run"
        filled = number % 2 == 1
        step = chance.randint(1, STEPS - 1)
        left = int(chance.uniform(0.0, 0.3) * need)
        size = ENOUGH_BYTES if filled else int(chance.uniform(0.05, 1.0) * need)
        flags = flags_of_mode("pretrain", **{"run.out": run})
        with inside(folder), small_disk(disk, size=size) as remount:

            def fill(disk: Path = disk, left: int = left, size: int = size) -> None:
                space = os.statvfs(disk)
                (disk / "filler").write_bytes(bytes(space.f_bavail * space.f_frsize - left))

            def go_on(remount=remount, flags=flags, disk=disk) -> Ended:
                (disk / "filler").unlink(missing_ok=True)
                remount(f"size={ENOUGH_BYTES}")
                return call(*flags, "--auto-resume")

            with at_step(step, fill) if filled else contextlib.nullcontext():
                ended = call(*flags)
            what = f"{left} bytes left at step {step}" if filled else f"{size} bytes"
            found.append(
                verdict_on(
                    ended, fault=fault, what=what, run=run, whole=folder / BASE, go_on=go_on,
                    looked_at=[run],
                )
            )  # fmt: skip
    return found


def read_only(folder: Path, _: int) -> list[Trial]:
    """Resume with data on a disk that takes no writes, and train into a folder on one."""
    fault, found = "disk read-only", []
    with inside(folder):
        shutil.copytree(folder / BASE, folder / "run", symlinks=True)
        shutil.rmtree(folder / "run" / LAST)
        other = small_parent(folder / "other")
        with small_disk(other / "data", size=ENOUGH_BYTES) as remount, inside(other):
            shutil.copytree(folder / "data", other / "data", dirs_exist_ok=True)
            remount("ro")
            ended = call("--resume", str(folder / "run"))
            whole = folder / BASE
            found.append(
                verdict_on(ended, fault=fault, what="data", run=folder / "run", whole=whole)
            )
        clean(folder, "run")
        with small_disk(folder / "disk", size=ENOUGH_BYTES) as remount:
            run = folder / "disk/run"
            for what in ("run folder, resumed", "run folder, new"):
                if "resumed" in what:
                    shutil.copytree(folder / BASE, run, symlinks=True)
                    shutil.rmtree(run / LAST)
                else:
                    remount("rw")
                    shutil.rmtree(run)
                remount("ro")

                def go_on(remount=remount, run=run) -> Ended:
                    remount("rw")
                    return call(
                        *flags_of_mode("pretrain", **{"run.out": run, "run.auto_resume": "true"})
                    )

                found.append(
                    verdict_on(
                        go_nowhere(run), fault=fault, what=what, run=run, whole=folder / BASE,
                        go_on=go_on, looked_at=[run],
                    )
                )  # fmt: skip
    return found


def go_nowhere(run: Path) -> Ended:
    """Train where nothing can be written."""
    return call(*flags_of_mode("pretrain", **{"run.out": run, "run.auto_resume": "true"}))


def vanishing(folder: Path, seed: int) -> list[Trial]:
    """Take data away before a resume and in the middle of a run, and the run folder itself."""
    chance, fault, found = random.Random(seed), "folder vanishes", []
    run, away = folder / "run", folder / "away"
    resumed = flags_of_mode("sft", **{"run.out": run})
    with inside(folder):
        whole = folder / "sft"
        if not whole.exists():
            assert call(*flags_of_mode("sft", **{"run.out": "sft"})).code == 0
        for name in ("data", "data/prepared", "chat.jsonl", "chat_held.jsonl"):
            shutil.copytree(whole, run, symlinks=True)
            shutil.rmtree(run / LAST)
            status = (folder / name).stat()
            (folder / name).rename(away)

            def put_back(name: str = name) -> Ended:
                away.rename(folder / name)
                return call("--resume", str(run))

            ended = call("--resume", str(run))
            what = f"{name}, before a resume"
            found.append(
                verdict_on(
                    ended, fault=fault, what=what, run=run, whole=whole, go_on=put_back,
                    looked_at=[run],
                )
            )  # fmt: skip
            if away.exists():
                shutil.rmtree(folder / name, ignore_errors=True)
                away.rename(folder / name)
            if (folder / name).is_file():
                os.utime(folder / name, ns=(status.st_atime_ns, status.st_mtime_ns))
            clean(folder, "run")
        for name in ("data", "chat.jsonl", "base"):
            step = chance.randint(1, STEPS - 1)
            with at_step(step, lambda name=name: (folder / name).rename(away)):
                ended = call(*resumed)
            away.rename(folder / name)
            what = f"{name}, at step {step}"
            found.append(verdict_on(ended, fault=fault, what=what, run=run, whole=whole))
            clean(folder, "run")
        found.append(run_vanishes(folder, step=chance.randint(1, STEPS - 1)))
    return found


def run_vanishes(folder: Path, *, step: int) -> Trial:
    """Take the run folder away in the middle; what is written then must be whole, and rows that are lost told."""
    run, away = folder / "run", folder / "away"
    flags = flags_of_mode("pretrain", **{"run.out": run})
    with at_step(step, lambda: run.rename(away)):
        ended = call(*flags)
    fault, what = "folder vanishes", f"the run folder, at step {step}"
    try:
        # Runs that other trials killed may stand beside it.
        left = half_written(run, away)
        if ended.is_refusal and not left:
            shutil.rmtree(run, ignore_errors=True)
            away.rename(run)
            again = call("--resume", str(run)) if any(run.glob("checkpoints/*")) else call(*flags)
            differs = again.said[-300:] if again.code else differences(run, folder / BASE)
            return Trial(fault, what, ELSE if differs else EXACT, differs or ended.errors[0])
        return Trial(fault, what, ELSE, f"exit {ended.code}; {left}; {ended.said[-300:]}")
    finally:
        clean(folder, "run")
        clean(folder, "away")


def if_mounts(kind: Callable[[Path, int], list[Trial]]) -> Callable[[Path, int], list[Trial]]:
    """Leave a kind out where this user may not mount."""

    def called(folder: Path, seed: int) -> list[Trial]:
        try:
            return kind(folder, seed)
        except NoMountsError as error:
            print(f"{kind.__name__}: left out, since mounting failed ({error}).")
            return []

    called.__name__ = kind.__name__
    return called


KINDS = {
    "disk-prepare": if_mounts(full_while_preparing),
    "disk-save": if_mounts(full_while_saving),
    "disk-read-only": if_mounts(read_only),
    "vanishing": vanishing,
}
