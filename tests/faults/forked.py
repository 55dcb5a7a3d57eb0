"""Processes that train, forked from one that has imported everything, since imports take most of a start."""

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

# What the command imports only when it runs; none of it starts a thread or a device.
import convert  # noqa: F401
import tinyllm_jax.inference.generate
import tinyllm_jax.objectives.rollouts
import tinyllm_jax.tasks
import tinyllm_jax.training.dry_run
import tinyllm_jax.training.loop
import tinyllm_jax.training.start  # noqa: F401
from tinyllm_jax import train
from tinyllm_jax.cli import run


def start(
    flags: Sequence[str], *, folder: Path, log: Path, environment: Mapping[str, str]
) -> BaseProcess:
    """Start a training command in a folder; what it tells goes to a file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["forked"])
    # The server looks for modules where the environment says.
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    process = context.Process(target=_train, args=([*flags], folder, log, dict(environment)))
    process.start()
    return process


def _train(flags: list[str], folder: Path, log: Path, environment: Mapping[str, str]) -> None:
    with open(log, "wb") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv = ["train", *flags]
    run(train.main)
