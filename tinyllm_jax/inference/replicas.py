"""Engines side by side, each on a device and a thread of its own, that share the slots of a service.

A program of few rows leaves a part of a CPU idle, and so do the Python between two programs and the
reading of a prompt; two engines with half of the rows each fill it. On several accelerators each
engine is a copy of the model (data parallelism).
"""

import contextlib
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax

from tinyllm_jax.config import EngineConfig
from tinyllm_jax.errors import InputError
from tinyllm_jax.host import available_cores
from tinyllm_jax.inference.engine import CHUNKS_AT_ONCE, Engine, Job

# Fewer slots than these are not divided: a program of four rows takes little longer than one of two.
FEWEST_SLOTS = 4


def make_cpu_devices(settings: EngineConfig) -> None:
    """Let a CPU be as many devices as there shall be replicas.

    In a process that has used JAX already its devices stay as they are.
    """
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", settings.replicas or best_for_cpu(settings))


def replica_devices(settings: EngineConfig) -> list[Any]:
    """Choose a device for each replica.

    Raises:
        InputError: more replicas are asked for than there are devices.
    """
    there = jax.local_devices()
    if settings.replicas > len(there):
        raise InputError(
            f"engine.replicas={settings.replicas} needs as many devices, and there are {len(there)} "
            f"({there[0].device_kind}). Use {len(there)} or less."
        )
    on_cpu = there[0].platform == "cpu"
    wanted = settings.replicas or (best_for_cpu(settings) if on_cpu else 1)
    # A process that made no devices for them has one.
    return there[:wanted] if wanted <= len(there) else there[:1]


def best_for_cpu(settings: EngineConfig) -> int:
    """Count the replicas that are best for the cores: one each, with a few slots at least."""
    most = max(1, min(available_cores(), settings.slots // FEWEST_SLOTS))
    return next(count for count in range(most, 0, -1) if settings.slots % count == 0)


class Replica:
    """An engine at work on a thread of its own.

    Args:
        engine: Compiled, as far as it must be, before `start`.
        precision: What surrounds all that the thread does.
        on_failure: Called on the thread, which ends, when the engine fails.

    Attributes:
        open: Jobs that were put and have not ended, as the service counts them.
        is_ready: Whether jobs are answered at once.
        room: How many jobs are of use to it: some wait for the slot that is free next.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        precision: Callable[[], AbstractContextManager[Any]],
        on_failure: Callable[["Replica"], None],
    ):
        self.engine = engine
        self.open = 0
        self.room = engine.slots + CHUNKS_AT_ONCE
        self.is_ready = False
        self._precision = precision
        self._on_failure = on_failure
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self.is_ready = True
        self._thread.start()

    def put(self, job: Job) -> None:
        """Take a job, from any thread."""
        self._inbox.put(job)

    def stop(self) -> None:
        """End the thread once its jobs have ended; returns at once."""
        self._inbox.put(None)

    def join(self) -> None:
        """Wait for the end of the thread."""
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        try:
            with self._precision():
                self._answer_all()
        except BaseException:
            # A defect of ours: everybody hears of it, and so does whoever runs the service.
            traceback.print_exc(file=sys.stderr)
            self.is_ready = False
            self._on_failure(self)

    def _answer_all(self) -> None:
        is_stopping, is_busy = False, False
        while is_busy or not is_stopping:
            # Sleep while there is nothing to do.
            while not self._inbox.empty() or not (is_busy or is_stopping):
                job = self._inbox.get()
                if job is None:
                    is_stopping = True
                else:
                    self.engine.admit(job)
                    is_busy = True
            is_busy = self.engine.step()
