"""Several real processes make one run: losses, rows, checkpoints, and what happens when one dies."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, SMALL_RUN, flags_for_devices

from tinyllm_jax import train
from tinyllm_jax.config import Config, DistributedConfig, load_config
from tinyllm_jax.errors import InputError
from tinyllm_jax.settings import setting_fields
from tinyllm_jax.training.checkpoint import open_checkpoint
from tinyllm_jax.training.distributed import initialise
from tinyllm_jax.training.metrics import read_metrics
from tinyllm_jax.training.parallel import check_processes

Layout = tuple[int, int, list[str]]  # processes, devices of each, and flags
Event = tuple[int, int, signal.Signals]  # process, training batch, and what it gets then
NOTHING: Event = (-1, -1, signal.SIGKILL)
# Losses of a run that is divided otherwise.
TOLERANCE = 1e-5
# Everything ends within this.
STOP_SECONDS = 60
QUICKLY_MISSED = ["--distributed.heartbeat_timeout_seconds", "6"]
STEPS = [
    *(
        "--max-steps",
        "20",
        "--checkpoint.interval_steps",
        "10",
        "--train.eval_interval_steps",
        "10",
    ),
    *("--train.gradient_accumulation_steps", "2", "--max-new-tokens", "4", "--warmup-steps", "4"),
    *("--model.num_hidden_layers", "1"),
]
# Weights are divided inside each process, or across processes.
ALONE: Layout = (1, 1, [])
TWO: Layout = (2, 2, ["--parallel.fsdp", "2"])
FOUR: Layout = (4, 1, ["--parallel.fsdp", "4"])
# The second never comes.
FIRST_OF_TWO = [
    *("--distributed.num_processes", "2", "--distributed.process_id", "0"),
    *("--distributed.start_timeout_seconds", "2"),
]
# Each setting of how processes meet, and the test here that sees it.
DISTRIBUTED_CHANGES = {
    "coordinator": "test_processes_that_cannot_meet_say_so",
    "num_processes": "test_processes_that_cannot_meet_say_so",
    "process_id": "test_processes_that_cannot_meet_say_so",
    "start_timeout_seconds": "test_processes_that_cannot_meet_say_so",
    "heartbeat_timeout_seconds": "test_a_process_that_is_silent_is_missed",
}


@dataclass(frozen=True)
class Ended:
    """How the processes of a run ended."""

    folder: Path
    codes: list[int]
    said: list[str]  # stderr of each
    reads: list[list[Any]]  # of each: kind, number and rows of every batch, in order
    seconds: float


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Processes:
    """Starts the processes of a run on this machine and waits for them."""

    def __init__(self, folder: Path, data: Path):
        self.folder, self.data = folder, data

    def start(
        self, layout: Layout, *flags: str, event: Event = NOTHING, differing: Sequence[str] = ()
    ) -> list[subprocess.Popen[bytes]]:
        """Start them; one sends itself a signal at a training batch, or has flags of its own."""
        count, devices, divided = layout
        environment = os.environ | {
            "TINYLLM_DATA_DIR": str(self.data),
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": flags_for_devices(devices),
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        }
        meeting = ["--distributed.coordinator", f"127.0.0.1:{free_port()}"]
        meeting += ["--distributed.num_processes", str(count)]
        started = []
        for index in range(count):
            mine = [*meeting, "--distributed.process_id", str(index)] if count > 1 else []
            mine += differing if index == event[0] else []
            rows, batch = self.folder / f"rows.{index}", event[1] if index == event[0] else -1
            rows.unlink(missing_ok=True)
            words = [sys.executable, str(ROOT / "tests/hosts_program.py"), str(rows), str(batch)]
            words += [
                str(int(event[2])),
                *SMALL_RUN,
                *STEPS,
                "--out",
                "run",
                *divided,
                *mine,
                *flags,
            ]
            with open(self.folder / f"said.{index}", "wb") as said:
                started.append(
                    subprocess.Popen(
                        words, cwd=self.folder, env=environment, stdout=said, stderr=said
                    )
                )
        return started

    def wait(self, started: list[subprocess.Popen[bytes]], *, but: int = -1) -> Ended:
        """Wait until all but one have ended, and kill that one."""
        begin = time.monotonic()
        try:
            for process in started[:but] + started[but + 1 :] if but >= 0 else started:
                process.wait(timeout=180)
        finally:
            for process in started:
                process.kill()
        codes = [process.wait() for process in started]
        numbers = range(len(started))
        rows = [self.folder / f"rows.{index}" for index in numbers]
        return Ended(
            folder=self.folder / "run",
            codes=codes,
            said=[(self.folder / f"said.{index}").read_text() for index in numbers],
            reads=[
                [json.loads(line) for line in path.read_text().splitlines()]
                if path.exists()
                else []
                for path in rows
            ],
            seconds=time.monotonic() - begin,
        )

    def run(self, layout: Layout, *flags: str, event: Event = NOTHING) -> Ended:
        """Start them and wait."""
        stopped = event[0] if event[2] == signal.SIGSTOP else -1
        return self.wait(self.start(layout, *flags, event=event), but=stopped)


@pytest.fixture
def processes(tmp_path: Path, prepared_folder: Path) -> Processes:
    return Processes(tmp_path, prepared_folder)


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, prepared_folder: Path
) -> dict[str, Ended]:
    """Give the same run made by one and by two processes."""
    found = {
        name: Processes(tmp_path_factory.mktemp(name), prepared_folder).run(layout)
        for name, layout in {"one": ALONE, "two": TWO}.items()
    }
    assert found["one"].codes == [0], found["one"].said
    assert found["two"].codes == [0, 0], found["two"].said
    return found


@pytest.fixture(scope="module")
def cut_short(tmp_path_factory: pytest.TempPathFactory, prepared_folder: Path) -> Ended:
    """Give a run of two processes of which one was killed after the checkpoint of step 10."""
    here = Processes(tmp_path_factory.mktemp("cut"), prepared_folder)
    return here.run(TWO, *QUICKLY_MISSED, event=(1, 14, signal.SIGKILL))


@pytest.fixture(scope="module")
def gone_on(
    cut_short: Ended, tmp_path_factory: pytest.TempPathFactory, prepared_folder: Path
) -> dict[str, Ended]:
    """Give that run gone on with by one, two and four processes."""
    found = {}
    for name, (count, devices, divided) in {"one": ALONE, "two": TWO, "four": FOUR}.items():
        here = Processes(tmp_path_factory.mktemp(f"on_{name}"), prepared_folder)
        shutil.copytree(cut_short.folder, here.folder / "run", symlinks=True)
        grid = divided or ["--parallel.fsdp", "1"]
        found[name] = here.run((count, devices, grid), "--auto-resume")
        assert found[name].codes == [0] * count, found[name].said
    return found


def told(folder: Path, kind: str, name: str) -> list[Any]:
    return [row[name] for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == kind]


def arrays_of(folder: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(folder, on_damaged=pytest.fail)
    first = {f"first {name}": array for name, array in checkpoint.moments.first.items()}
    second = {f"second {name}": array for name, array in checkpoint.moments.second.items()}
    return {**checkpoint.weights, **first, **second}


def one_line(text: str) -> str:
    """Give the one line that says why a process ended."""
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    return lines[0]


# The same run ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(undisturbed: Any) -> None:
    alone, other = undisturbed["one"].folder, undisturbed["two"].folder
    for kind, what in [("train", "loss"), ("train", "grad_norm"), ("eval", "loss")]:
        expected = told(alone, kind, what)
        assert len(expected) == (20 if kind == "train" else 2)
        np.testing.assert_allclose(told(other, kind, what), expected, rtol=TOLERANCE)
    assert told(alone, "train", "loss")[-1] < 0.95 * told(alone, "train", "loss")[0]
    assert told(other, "train", "targets") == told(alone, "train", "targets")
    assert told(other, "sample", "text")[0].startswith("Once upon a time")
    for place, array in arrays_of(alone).items():
        np.testing.assert_allclose(arrays_of(other)[place], array, atol=1e-4, err_msg=place)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "four"])
def test_each_process_reads_its_own_rows_and_no_others(
    name: str, undisturbed: Any, gone_on: Any
) -> None:
    def rows_by_batch(reads: list[Any], kind: str) -> dict[int, list[int]]:
        # Process 0 reads all validation rows once more, to say what is known of them.
        return {number: rows for each, number, rows in reads if each == kind}

    for kind, passes in [("train", 2), ("evaluation", 1)]:
        whole = rows_by_batch(undisturbed["one"].reads[0], kind)
        parts = [rows_by_batch(reads, kind) for reads in gone_on[name].reads]
        expected = [*range(10, 20)] if kind == "train" else [0, 1]
        for part in parts:
            assert sorted(part) == expected
        for number in expected:
            cut = np.reshape([part[number] for part in parts], (len(parts), passes, -1))
            assert cut.swapaxes(0, 1).reshape(-1).tolist() == whole[number]
    for reads in gone_on[name].reads[1:]:
        assert {len(rows) for kind, _, rows in reads if kind == "evaluation"} == {4 // len(parts)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "four"])
def test_one_process_speaks_and_writes(name: str, gone_on: Any) -> None:
    ended = gone_on[name]
    assert "Finished." in ended.said[0]
    for said in ended.said[1:]:
        # Threads of the runtime write such lines in pieces, which may come in any order.
        gloo = ("[Gloo]", "connected peer ranks")
        assert [line for line in said.splitlines() if not any(word in line for word in gloo)] == []
    assert told(ended.folder, "train", "step") == list(range(1, 21))
    assert sorted(path.name for path in ended.folder.glob("checkpoints/*")) == ["10", "20"]


# One is gone ----------------------------------------------------------------------------------------


def check_that_it_stopped(ended: Ended, *, gone: int) -> None:
    """Check the line of the one that is left of two processes."""
    (left,) = {0, 1} - {gone}
    assert ended.codes[left] == 1
    line = one_line(ended.said[left])
    # The runtime's own words name it where the connection itself has not told.
    words = f"unhealthy (stopped sending heartbeats):\n{gone}\n"
    assert f"process {gone} of 2" in line or words in ended.said[left]
    assert line.endswith("with --resume run.")
    assert ended.seconds < STOP_SECONDS


@pytest.mark.slow
def test_when_one_process_is_killed_the_others_stop_and_say_what_to_type(cut_short: Ended) -> None:
    check_that_it_stopped(cut_short, gone=1)
    assert cut_short.codes[1] == -signal.SIGKILL
    assert sorted(path.name for path in cut_short.folder.glob("checkpoints/*")) == ["10"]


@pytest.mark.slow
def test_when_process_0_is_killed_the_others_stop_too(processes: Processes) -> None:
    ended = processes.run((2, 1, []), event=(0, 2, signal.SIGKILL))
    check_that_it_stopped(ended, gone=0)


@pytest.mark.slow
def test_a_process_that_is_silent_is_missed(processes: Processes) -> None:
    ended = processes.run((2, 1, []), *QUICKLY_MISSED, event=(1, 2, signal.SIGSTOP))
    check_that_it_stopped(ended, gone=1)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step_with_a_checkpoint(
    processes: Processes,
) -> None:
    ended = processes.run((2, 1, []), "--max-steps", "5000", event=(1, 5, signal.SIGTERM))
    assert ended.codes == [128 + signal.SIGTERM] * 2, ended.said
    (saved,) = {path.name for path in ended.folder.glob("checkpoints/*") if int(path.name) % 10}
    assert told(ended.folder, "train", "step") == list(range(1, int(saved) + 1))
    assert f"step {saved} is saved" in ended.said[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "two", "four"])
def test_a_run_goes_on_with_any_number_of_processes(
    name: str, gone_on: Any, undisturbed: Any
) -> None:
    ended, whole = gone_on[name].folder, undisturbed["two"].folder
    assert told(ended, "train", "targets") == told(whole, "train", "targets")
    assert told(ended, "sample", "text")[-1].startswith("Once upon a time")
    losses, expected = told(ended, "train", "loss"), told(whole, "train", "loss")
    assert losses[:10] == expected[:10]
    np.testing.assert_allclose(losses, expected, rtol=TOLERANCE)
    alone = told(undisturbed["one"].folder, "train", "loss")
    np.testing.assert_allclose(losses, alone, rtol=TOLERANCE)
    if name == "two":
        assert losses == expected
        found = arrays_of(ended)
        for place, array in arrays_of(whole).items():
            np.testing.assert_array_equal(found[place], array, err_msg=place)


# They do not fit together ---------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_that_cannot_meet_say_so(processes: Processes) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    with pytest.raises(InputError, match=f"{nowhere}: nobody listens there after 1 s"):
        initialise(
            DistributedConfig(
                coordinator=nowhere, num_processes=2, process_id=1, start_timeout_seconds=1
            )
        )
    ended = processes.run((1, 1, []), *("--distributed.coordinator", nowhere), *FIRST_OF_TWO)
    assert ended.codes == [2]
    assert re.search(
        f"not all processes came to {nowhere} within 2 s. Start all of them \\(2\\)",
        one_line(ended.said[0]),
    )
    ended = processes.run((1, 1, []), *("--distributed.coordinator", "auto"))
    assert ended.codes == [2]
    assert "the cluster does not say who is there" in one_line(ended.said[0])


@pytest.mark.slow
def test_processes_with_other_settings_are_refused_by_all(processes: Processes) -> None:
    started = processes.start((2, 1, []), event=(1, -1, signal.SIGKILL), differing=["--seed", "7"])
    ended = processes.wait(started)
    assert ended.codes == [2, 2]
    for said in ended.said:
        assert "train.seed is 7 in process 1" in one_line(said)
        assert "42 in process 0" in said
    assert not ended.folder.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distributed.coordinator", "10.0.0.1"], "10.0.0.1 is no HOST:PORT"),
        (["--distributed.coordinator", "10.0.0.1:99999"], "10.0.0.1:99999 is no HOST:PORT"),
        (["--distributed.process_id", "0"], "Add --distributed.coordinator HOST:PORT"),
        (
            ["--distributed.coordinator", "a:1", "--distributed.num_processes", "2"]
            + ["--distributed.process_id", "2"],
            "process_id=2 is not below distributed.num_processes=2. Use 0 to 1",
        ),
    ],
)
def test_settings_that_no_processes_could_meet_with_are_refused(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(message)):
        train.main([*SMALL_RUN, *flags])


@pytest.mark.parametrize(
    ("flags", "sizes", "message"),
    [
        (["--parallel.strategy", "pmap"], {"data": 4}, "Use --parallel.strategy mesh"),
        (["--batch-size", "6"], {"data": 3}, "Use --batch-size 8, or sizes with a product of 4"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    flags: list[str], sizes: dict[str, int], message: str
) -> None:
    preset, overrides, problems = train.read_command([*SMALL_RUN, *flags])
    config = load_config(preset or "tiny", overrides, problems)
    whole = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1} | sizes
    with pytest.raises(InputError, match=message):
        check_processes(config, whole, devices=4)


def test_every_setting_of_meeting_has_a_test() -> None:
    fields = {key for key in setting_fields(Config) if key.startswith("distributed.")}
    assert fields == {f"distributed.{name}" for name in DISTRIBUTED_CHANGES}
    assert set(DISTRIBUTED_CHANGES.values()) <= set(globals())
