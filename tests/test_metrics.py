"""The metrics file, and what the terminal shows."""

import json
import math
import resource

import pytest

from tinyllm_jax.training.devices import PEAK_TFLOPS, known_peak_tflops, measured_tflops
from tinyllm_jax.training.metrics import MetricsFile, read_metrics
from tinyllm_jax.training.progress import Progress


def rows_until(step: int) -> list[dict]:
    return [{"kind": "train", "step": number, "loss": 1 / number} for number in range(1, step + 1)]


def test_a_resumed_file_holds_every_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, resume_step=0) as metrics:
        metrics.write(rows_until(9))
    with MetricsFile(path, resume_step=6) as metrics:
        metrics.write(rows_until(8)[6:])
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "st')
    assert read_metrics(path) == [{"kind": "train", "step": 1}]
    with MetricsFile(path, resume_step=1) as metrics:
        metrics.write([{"kind": "train", "step": 2}])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_new_run_begins_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n')
    with MetricsFile(path, resume_step=0):
        pass
    assert path.read_text() == ""


def test_what_does_not_fit_on_the_disk_is_told_with_the_name_of_the_file(tmp_path):
    """What could not be written is tried once more when the file is closed, and fails again."""
    path = tmp_path / "metrics.jsonl"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write() -> None:
        with MetricsFile(path, resume_step=0) as metrics:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, old[1]))
            metrics.write(rows_until(9))

    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert caught.value.filename == str(path)


def test_numbers_that_are_none_are_written_as_json_allows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, resume_step=0) as metrics:
        metrics.write([{"kind": "train", "step": 1, "loss": math.nan, "grad_norm": math.inf}])

    def refuse(word: str) -> None:
        raise AssertionError(word)

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert (row["loss"], row["grad_norm"]) == ("nan", "inf")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA T400", None),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("Tesla T4", 65.0),
        ("TPU v4", 275.0),
        ("TPU v5 lite", 197.0),
        ("TPU v5p", 459.0),
        ("TPU v6 lite", 918.0),
        ("cpu", None),
    ],
)
def test_each_device_gets_its_own_peak(kind, expected):
    assert known_peak_tflops(kind) == expected


def test_no_name_of_the_table_hides_a_later_one():
    for name, peak in PEAK_TFLOPS.items():
        assert known_peak_tflops(name) == peak


def test_the_measured_peak_of_this_machine_is_plausible():
    assert 0.001 < measured_tflops(seconds=0.05) < 100


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("tinyllm_jax.training.progress.time.monotonic", lambda: clock[0])
    numbers = {"loss": 1.5, "learning_rate": 1e-3, "tokens_per_second": 12345.0, "mfu": 0.25}
    with Progress(first_step=0, max_steps=10) as progress:
        for step in range(1, 11):
            clock[0] += 4.0
            progress.advance(step)
            progress.show(step=step, **numbers, seconds_left=61.0)
    lines = capsys.readouterr().err.splitlines()
    expected = "| loss 1.500 | lr 1.0e-03 | 12,345 tok/s | MFU 25% | 1:01 left"
    assert lines == [f"step {step}/10 {expected}" for step in (3, 6, 9)]
