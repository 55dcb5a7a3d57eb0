"""`verify_resume` says EXACT of runs that are, and finds every bit that is not."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL_RUN, Command

from tinyllm_jax import verify_resume
from tinyllm_jax.errors import InputError
from tinyllm_jax.training import resume_check
from tinyllm_jax.training.resume_check import compare_runs
from tinyllm_jax.training.step_folders import mark_best

SHORT = [*SMALL_RUN, "--max-steps", "8"]


@pytest.mark.slow
def test_a_run_killed_at_random_moments_is_proved_exact(command: Command, tmp_path: Path) -> None:
    flags = ["--kills", "2", "--kill-seed", "3", "--keep", "both"]
    flags += ["--train.gradient_accumulation_steps", "2", "--model.residual_dropout", "0.1"]
    ended = command.run("verify_resume", *SHORT, *flags)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("EXACT after 2 kills, ")
    assert " past the last checkpoint: 3 checkpoints with " in ended.stdout
    assert ended.stderr.count("goes on from step") == 2
    rows = (tmp_path / "both/killed/metrics.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, rows) if row["kind"] == "train"]
    assert steps == [*range(1, 9)]


def test_equal_runs_have_no_differences(trained_run: Path, run_copy: Path) -> None:
    found = compare_runs(trained_run, run_copy)
    assert found.differences == []
    assert found.steps == [10, 20]
    assert found.arrays > 100
    assert found.numbers > 10_000
    assert found.rows > 20


def test_another_last_step_is_a_difference(trained_run: Path, run_copy: Path) -> None:
    shutil.rmtree(run_copy / "checkpoints/20")
    found = compare_runs(trained_run, run_copy).differences
    assert "checkpoints of steps [10, 20] and [10]" in found


def test_another_best_is_a_difference(trained_run: Path, run_copy: Path) -> None:
    before = (run_copy / "best").resolve().name
    other = "10" if before == "20" else "20"
    mark_best(run_copy, int(other))
    assert compare_runs(trained_run, run_copy).differences == [f"best is {before} and {other}"]


def test_a_damaged_checkpoint_is_a_difference(trained_run: Path, run_copy: Path) -> None:
    (run_copy / "checkpoints/20/meta.json").write_text("{}")
    found = compare_runs(trained_run, run_copy).differences
    assert any("checkpoints/20" in each for each in found)


def test_the_smallest_other_number_in_a_checkpoint_is_found(
    trained_run: Path, run_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = resume_check.read_checkpoint

    def changed(folder: Path) -> resume_check.Checkpoint:
        checkpoint = read(folder)
        if folder.is_relative_to(run_copy):
            moments = checkpoint.moments.second
            name = sorted(moments)[0]
            array = np.array(moments[name])
            array.flat[0] = np.nextafter(array.flat[0], np.float32(np.inf))
            moments[name] = array
        return checkpoint

    monkeypatch.setattr(resume_check, "read_checkpoint", changed)
    found = compare_runs(trained_run, run_copy).differences
    assert len(found) == 2
    assert found[0].startswith("step 10: second moment of ")


def test_another_number_in_the_metrics_is_found(trained_run: Path, run_copy: Path) -> None:
    path = run_copy / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    row = next(row for row in rows if row["kind"] == "train" and row["step"] == 13)
    row["loss"] = float(np.nextafter(row["loss"], 9.0))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [found] = compare_runs(trained_run, run_copy).differences
    assert found.startswith("metrics.jsonl, step 13: ")


def test_a_missing_row_is_found(trained_run: Path, run_copy: Path) -> None:
    path = run_copy / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    assert any("rows" in each for each in compare_runs(trained_run, run_copy).differences)


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("dataset_hash", "another", "data"),
        ("tokenizer_hash", "another", "tokenizer"),
        ("seed", 99, "settings"),
    ],
)
def test_other_data_tokenizers_and_settings_are_found(
    trained_run: Path, run_copy: Path, key: str, value: object, found: str
) -> None:
    folder = run_copy / "checkpoints/20"
    meta = json.loads((folder / "meta.json").read_text())
    (meta["config"]["train"] if key == "seed" else meta)[key] = value
    (folder / "meta.json").write_text(json.dumps(meta))
    sums = json.loads((folder / "checksums.json").read_text())
    sums["meta.json"] = hashlib.sha256((folder / "meta.json").read_bytes()).hexdigest()
    (folder / "checksums.json").write_text(json.dumps(sums))
    assert compare_runs(trained_run, run_copy).differences == [f"step 20: {found}"]


def test_differing_runs_are_told_and_kept(
    trained_run: Path, run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run_copy / "checkpoints/20")
    code = verify_resume.tell(trained_run, run_copy, kills=3, cut=1, parent=tmp_path, keep=False)
    assert code == 1
    assert capsys.readouterr().out.startswith("DIFFERENT after 3 kills: ")
    assert run_copy.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kills", "0"], "--kills 0 is less than 1"),
        (["--out", "there"], "run.out is chosen by this command"),
        (["--lerning-rate", "1"], "Did you mean '--learning-rate'"),
        (["--max-steps", "-1"], "train.max_steps"),
    ],
)
def test_bad_flags_are_refused_before_anything_runs(flags: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        verify_resume.main(["--config", "tiny", *flags])


def test_a_run_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(InputError, match=r"training ended with code 2; .*whole\.log"):
        verify_resume.main(["--config", "tiny", "--data", "nothing.jsonl", "--keep", "both"])


def test_runs_are_shortened_only_where_nobody_says_how_long() -> None:
    assert verify_resume.shortened(["--config", "tiny"]) == [
        *("--max-steps", "40"),
        *("--checkpoint.interval_steps", "8"),
        *("--train.eval_interval_steps", "8"),
    ]
    flags = ["--max-steps", "100", "--checkpoint.interval_steps", "7"]
    assert verify_resume.shortened(flags) == ["--train.eval_interval_steps", "20"]


def test_a_run_that_could_not_be_killed_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Quick:
        def __init__(self, _: object, folder: Path):
            folder.mkdir(exist_ok=True)

        def finish(self) -> float:
            return 0.1

        def startup_seconds(self) -> float:
            return 0.1

        def kill_after(self, _: float) -> bool:
            return False

    monkeypatch.setattr(verify_resume, "Attempt", Quick)
    with pytest.raises(InputError, match="ended before it could be killed"):
        verify_resume.main(["--config", "tiny", "--keep", str(tmp_path / "both")])
