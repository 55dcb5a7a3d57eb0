"""Runs in a process of its own, whose CPU becomes two devices; prints what it found as a line of JSON."""

import dataclasses
import json
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import jax
from test_service import WAIT_SECONDS, Asker
from test_service import model as model_fixture

from tinyllm_jax.config import EngineConfig, SamplingConfig
from tinyllm_jax.inference.engine import Engine
from tinyllm_jax.inference.replicas import make_cpu_devices, replica_devices
from tinyllm_jax.inference.service import Service

SETTINGS = EngineConfig(slots=8, replicas=2, tokens_per_dispatch=2)
PROMPTS = ["One day", "", "Tim", "The dog and", "A small girl saw a"]
DRAWN = SamplingConfig(temperature=1.0, max_new_tokens=60)


def ask_all(service: Service, *, count: int = 20, **fields: Any) -> list[Asker]:
    """Ask for more answers than there are slots, each with a seed of its own."""
    return [
        Asker(
            service,
            PROMPTS[number % len(PROMPTS)],
            sampling=dataclasses.replace(DRAWN, seed=number, **fields),
        )
        for number in range(count)
    ]


def waits_beside_a_free_slot(service: Service) -> bool:
    """Tell whether a question waits while an engine has less to do than it could."""
    with service._changed:
        free = any(replica.open < replica.engine.slots for replica in service._replicas)
        return bool(service._waiting) and free


def wait_until_ready(service: Service) -> None:
    """Wait for all that is compiled while the first engine answers."""
    for _ in range(int(WAIT_SECONDS * 10)):
        if service.stats().missing_programs == 0:
            return
        threading.Event().wait(0.1)
    raise AssertionError("programs are missing")


def main() -> dict[str, Any]:
    """Ask one engine, then two, then two of which one fails."""
    make_cpu_devices(SETTINGS)
    found: dict[str, Any] = {"devices": len(replica_devices(SETTINGS))}
    model = model_fixture.__wrapped__()
    alone = Service(model, dataclasses.replace(SETTINGS, replicas=1))
    alone.start()
    found["expected"] = [asker.wait() for asker in ask_all(alone)]
    alone.stop()

    told: Counter[str] = Counter()
    tell = Engine._tell

    def count(engine: Engine, *rest: Any) -> None:
        told[threading.current_thread().name + str(engine._rows.token.devices())] += 1
        tell(engine, *rest)

    Engine._tell = count
    service = Service(model, SETTINGS)
    engine, has_answered = service._replicas[1].engine, threading.Event()
    compile_some = engine.compile
    engine.compile = lambda **rest: has_answered.wait() and compile_some(**rest)  # type: ignore[method-assign]
    service.start()
    found["while one compiles"] = Asker(service, "", sampling=DRAWN).wait()
    stats = service.stats()
    found["then"] = (stats.replicas, stats.missing_programs > 0)
    has_answered.set()
    wait_until_ready(service)
    found["ready in the end"] = service.stats().replicas
    asked = ask_all(service)
    found["texts"] = [asker.wait() for asker in asked]
    found["engines that told"] = sorted({name.partition("{")[2] for name in told})
    buffers = [
        {name: value.unsafe_buffer_pointer() for name, value in replica.engine._weights.items()}
        for replica in service._replicas
    ]
    found["same memory"] = buffers[0] == buffers[1]
    stats = service.stats()
    found["after"] = (stats.slots, stats.busy_slots, stats.waiting)

    asked = [
        asker
        for _ in range(10)
        for tokens in (1, 60)
        for asker in ask_all(service, count=2, max_new_tokens=tokens)
    ]
    waited = False
    while not all(asker.done.wait(0.001) for asker in asked):
        waited |= waits_beside_a_free_slot(service)
    found["waited beside a free slot"] = waited
    asked = ask_all(service, count=30)
    asked[-1].ticket.cancel()  # no engine has it yet
    found["cancelled in the queue"] = (asked[-1].ticket.replica is None, asked[-1].wait())
    for asker in asked:
        asker.wait()

    second, all_are_asked = service._replicas[1], threading.Event()

    def fail(*_: Any) -> None:
        all_are_asked.wait(WAIT_SECONDS)
        raise ZeroDivisionError

    second.engine._tell = fail  # type: ignore[method-assign]
    asked = ask_all(service, count=8)
    all_are_asked.set()
    found["ends"] = [(asker.wait(), asker.ended)[1] == "failed" for asker in asked]
    found["of the second"] = [asker.ticket.replica is second for asker in asked]
    found["well"] = service.is_well
    found["drained"] = service.drain(seconds=WAIT_SECONDS)
    service.stop()
    return found


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    Path(sys.argv[1]).write_text(json.dumps(main()))
