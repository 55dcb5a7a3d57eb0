"""Bad input, drawn by hypothesis: it is read or refused in lines that a person can read."""

import importlib.util
import os
import random
from pathlib import Path

import bad_input_campaign as campaign
import pytest
from bad_input_kinds import KINDS, Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyllm_jax.errors import InputError

OWN = [name for name, kind in KINDS.items() if not kind.foreign]
FOREIGN = [name for name, kind in KINDS.items() if kind.foreign]
# Of each kind, by default as many as take a second or two.
EXAMPLES = int(os.environ.get("TINYLLM_BAD_INPUTS", "0"))
MOST, FEW = 100, {"checkpoint": 20, "own .pt": 30, "llama2.c .pt": 30}
# The others need JAX or PyTorch in a process of their own, which takes seconds to import.
QUICK = ("SentencePiece", "tokenizer.json", "parquet")


@pytest.mark.parametrize("name", OWN)
def test_what_python_reads_is_read_or_refused(name: str, tmp_path: Path):
    kind, told = KINDS[name], []

    @settings(
        max_examples=EXAMPLES or 20,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[*HealthCheck],
    )
    @given(st.integers(0, 2**32))
    def check(seed: int) -> None:
        path = kind.make(tmp_path, random.Random(seed))
        try:
            kind.read(path)
        except InputError as error:
            told.append(str(error))
        except OSError as error:
            if error.errno not in campaign.ADVICE:
                raise

    check()
    assert told
    assert not any(campaign.message_problem(each) for each in told)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow][: name not in QUICK]) for name in FOREIGN]
)
def test_what_other_libraries_read_is_read_or_refused(name: str):
    for library in KINDS[name].libraries:
        if not importlib.util.find_spec(library):
            pytest.skip(f"no {library}")
    count = EXAMPLES or FEW.get(name, MOST)
    results = campaign.run_kind(name, 0, count)
    found = [
        (each.number, each.verdict, each.told) for each in results if campaign.is_finding(each)
    ]
    assert len(results) == count
    assert not found


def test_the_campaign_tells_what_it_finds(tmp_path: Path):
    watch = campaign.Watch()

    def runs_a_command(path: Path) -> None:
        os.system("true")

    def fails(path: Path) -> None:
        raise KeyError("x")

    def swells(path: Path) -> None:
        bytearray(400 << 20)

    def says_nothing(path: Path) -> None:
        raise InputError("")

    expected = {
        runs_a_command: "began something",
        fails: "raised KeyError",
        swells: "memory",
        says_nothing: "message: empty",
    }
    for read, verdict in expected.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(KINDS, "x", Kind(KINDS["flags"].make, read))
            assert campaign.try_one("x", 0, tmp_path, watch).verdict.startswith(verdict)
