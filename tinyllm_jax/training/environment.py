"""With what a run was started: command, machine, versions and the state of the folder's own code.

Shared with the twin: imports no framework.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllm_jax.data.files import write_file
from tinyllm_jax.errors import InputError

ENVIRONMENT = "environment.json"
# Variables that change what is computed, where, or with which files.
VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "TINYLLM_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
GIT_SECONDS = 5.0


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Read with what a run was started, each time.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / ENVIRONMENT
    if not path.is_file():
        return []
    try:
        starts = json.loads(path.read_bytes())["starts"]
        starts = [
            {
                **start,
                "time": float(start["time"]),
                "step": int(start["step"]),
                "preset_settings": {**start.get("preset_settings", {})},
            }
            for start in starts
        ]
        for start in starts:
            time.gmtime(start["time"])  # a time that can be written
        return sorted(starts, key=lambda start: start["time"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise InputError(f"{path}: damaged. Remove it; nothing else needs it.") from None


def add_start(
    folder: Path,
    *,
    earlier: Sequence[Mapping[str, Any]],
    step: int,
    preset: tuple[str, Mapping[str, Any]] | None,
    device: str,
    packages: Sequence[str],
) -> None:
    """Write down with what a run is started now, after its earlier starts.

    Args:
        earlier: Those; a start without a preset goes on with theirs.
        step: The run has these steps already.
        preset: Name of the preset and what it sets.
        device: What computes.
        packages: What else to tell the version of.
    """
    names = ("tinyllm", "numpy", *packages)
    versions = {name: found for name in names if (found := _version(name))}
    name, table = preset or _last_preset(earlier)
    start = {
        "time": time.time(),
        "step": step,
        "command": shlex.join(sys.orig_argv),
        "folder": os.getcwd(),
        "preset": name,
        "preset_settings": {**table},
        "device": device,
        "host": platform.node(),
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "variables": {
            key: value for key, value in sorted(os.environ.items()) if key.startswith(VARIABLES)
        },
        "git": describe_git(Path.cwd()),
    }
    text = json.dumps({"starts": [*earlier, start]}, indent=1)
    write_file(folder / ENVIRONMENT, text.encode())


def describe_git(folder: Path) -> str:
    """Name the commit that a folder is at, and whether tracked files differ; "" where there is none."""

    def git(*words: str) -> str:
        # Git must not write into the person's repository, which another program may be using.
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
            timeout=GIT_SECONDS,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--verify", "--quiet", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):  # no git, no repository, or a very slow one
        return ""
    return f"{commit}, with changes" if changed else commit


def _last_preset(starts: Sequence[Mapping[str, Any]]) -> tuple[str, Mapping[str, Any]]:
    if not starts:
        return "", {}
    return str(starts[-1].get("preset", "")), starts[-1].get("preset_settings", {})


def processor_name() -> str:
    """Name the processor; Linux says it in a file alone."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
