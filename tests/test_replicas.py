"""Engines side by side answer as one does, share weights and fail alone."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest
from conftest import run_python

from tinyllm_jax.config import EngineConfig, ServeConfig
from tinyllm_jax.errors import InputError
from tinyllm_jax.inference import replicas
from tinyllm_jax.inference.replicas import best_for_cpu, make_cpu_devices, replica_devices
from tinyllm_jax.settings import build

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process with two devices found."""
    path = tmp_path_factory.mktemp("replicas") / "found.json"
    ended = run_python(str(ROOT / "tests" / "replicas_program.py"), str(path), timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stderr.count("Traceback") == 1
    assert ended.stderr.endswith("\nZeroDivisionError\n")
    return json.loads(path.read_text())


def test_texts_are_those_of_one_engine(found: dict[str, Any]) -> None:
    assert found["devices"] == 2
    assert found["texts"] == found["expected"]
    assert len({*found["texts"]}) > 15
    assert found["engines that told"] == ["CpuDevice(id=0)}", "CpuDevice(id=1)}"]
    assert found["after"] == [8, 0, 0]


def test_the_first_engine_answers_while_other_programs_are_compiled(found: dict[str, Any]) -> None:
    assert found["while one compiles"]
    assert found["then"] == [1, True]
    assert found["ready in the end"] == 2


def test_no_question_waits_beside_a_free_slot(found: dict[str, Any]) -> None:
    assert not found["waited beside a free slot"]


def test_a_question_that_no_engine_has_can_be_cancelled(found: dict[str, Any]) -> None:
    assert found["cancelled in the queue"] == [False, ""]


def test_engines_of_a_cpu_read_the_same_weights(found: dict[str, Any]) -> None:
    assert found["same memory"]


def test_an_engine_that_fails_takes_only_its_answers_with_it(found: dict[str, Any]) -> None:
    assert found["ends"] == found["of the second"]
    assert {*found["ends"]} == {True, False}
    assert not found["well"]
    assert not found["drained"]


@pytest.mark.parametrize(
    ("cores", "slots", "expected"),
    [(2, 16, 2), (1, 16, 1), (2, 4, 1), (2, 1, 1), (16, 16, 4), (3, 16, 2), (64, 100, 25)],
)
def test_a_cpu_has_an_engine_for_each_core_and_few_slots_are_not_divided(
    cores: int, slots: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "available_cores", lambda: cores)
    assert best_for_cpu(EngineConfig(slots=slots)) == expected


def test_a_process_that_made_no_devices_has_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "available_cores", lambda: 2)
    assert len(replica_devices(EngineConfig(slots=16))) == 1


def test_a_process_that_has_used_jax_keeps_its_devices() -> None:
    before = jax.devices()
    make_cpu_devices(EngineConfig(slots=16, replicas=2))
    assert jax.devices() == before


def test_more_replicas_than_devices_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"engine.replicas=2 needs as many devices, and there are 1"
    ):
        replica_devices(EngineConfig(slots=16, replicas=2))


def test_slots_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"engine.slots=16 is no multiple of engine.replicas=3.* 18"
    ):
        build(ServeConfig, [("", {"engine.replicas": 3})])
