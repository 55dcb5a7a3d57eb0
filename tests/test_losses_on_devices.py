"""Pairs and sampled answers over several devices: the same numbers as on one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run_python
from parity import relative_error

pytestmark = pytest.mark.slow  # it compiles nine steps

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    ended = run_python(
        str(Path(__file__).parent / "losses_program.py"), timeout=280, OMP_NUM_THREADS="1"
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("grid", ["data 2 x fsdp 2 x tensor 2", "pmap"])
@pytest.mark.parametrize("name", ["preference", "reward", "ppo"])
def test_several_devices_tell_and_learn_what_one_does(name: str, grid: str, found: Any) -> None:
    actual, expected = found[f"{name}, {grid}"], found[f"{name}, one"]
    assert expected["grid"] != actual["grid"]
    assert actual["told"].keys() == expected["told"].keys()
    for key, values in expected["told"].items():
        assert relative_error(np.array(actual["told"][key]), np.array(values)) < TOLERANCE, key
    for key, weight in expected["weights"].items():
        error = np.abs(np.array(actual["weights"][key]) - np.array(weight)).max()
        assert error < TOLERANCE, f"{key} {error}"
