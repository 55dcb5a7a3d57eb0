"""Exact resume: a run that is killed and goes on is bitwise the run that never was."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_RUN

from tinyllm_jax import train
from tinyllm_jax.config import TokenizerConfig
from tinyllm_jax.data import files
from tinyllm_jax.data.tokenizer import train_tokenizer
from tinyllm_jax.data.toy_stories import generate_stories
from tinyllm_jax.training import start
from tinyllm_jax.training.checkpoint import read_checkpoint, write_step_folder
from tinyllm_jax.training.metrics import read_metrics
from tinyllm_jax.training.optim import Moments
from tinyllm_jax.training.step_folders import find_checkpoint

# Checkpoints away from evaluations and from writes of the metrics file.
INTERVALS = ["--checkpoint.interval_steps", "28", "--train.eval_interval_steps", "50"]
VARIANTS = {
    "plain": [],
    "accumulation and dropout": [
        *("--train.gradient_accumulation_steps", "3"),
        *("--model.residual_dropout", "0.1"),
        *("--model.attention_dropout", "0.1"),
        *("--model.embedding_dropout", "0.1"),
        *("--model.mlp_dropout", "0.1"),
    ],
    "stream": ["--data.packing", "stream"],
}


@pytest.fixture(autouse=True)
def one_data_folder(monkeypatch, prepared_folder):
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))


def reproducible(run: Path) -> list[dict]:
    """Read the metrics that hold no clock."""
    rows = read_metrics(run / "metrics.jsonl")
    return [row for row in rows if row["kind"] != "speed"]


def assert_same_run(actual: Path, expected: Path, *, step: int) -> None:
    """Compare weights, moments, counters and metrics bit by bit."""
    left, right = (read_checkpoint(run / "checkpoints" / str(step)) for run in (actual, expected))
    assert (left.step, int(left.moments.count)) == (right.step, int(right.moments.count))
    assert left.best == right.best
    for one, other in (
        (left.weights, right.weights),
        (left.moments.first, right.moments.first),
        (left.moments.second, right.moments.second),
    ):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    assert reproducible(actual) == reproducible(expected)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_stopped_at_90_and_resumed_is_bitwise_the_run_of_200_steps(
    variant, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL_RUN, *INTERVALS, *VARIANTS[variant]]
    assert train.main([*flags, "--max-steps", "200", "--out", "whole"]) == 0
    stopped_at = stop_at(90)
    code = train.main([*flags, "--max-steps", "200", "--out", "parts"])
    assert code == 128 + signal.SIGTERM
    assert find_checkpoint(Path("parts"), on_damaged=pytest.fail).name == "90"
    stopped_at.undo()
    assert train.main(["--resume", "parts"]) == 0
    steps = [row["step"] for row in reproducible(Path("parts")) if row["kind"] == "train"]
    assert steps == list(range(1, 201))
    assert_same_run(Path("parts"), Path("whole"), step=200)


def stop_at(step: int) -> pytest.MonkeyPatch:
    """Send this process a SIGTERM when the bar reaches a step."""
    from tinyllm_jax.training.progress import Progress

    patch = pytest.MonkeyPatch()
    advance = Progress.advance

    def advance_and_stop(self: Progress, now: int) -> None:
        advance(self, now)
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(Progress, "advance", advance_and_stop)
    return patch


@pytest.mark.slow
def test_runs_killed_with_sigkill_also_during_a_save_resume_bitwise(tmp_path, monkeypatch, command):
    """Kill after a checkpoint, twice while one is half on the disk, and once more."""
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL_RUN, *VARIANTS["accumulation and dropout"], "--max-steps", "60"]
    flags += ["--checkpoint.interval_steps", "7", "--train.eval_interval_steps", "10"]
    assert train.main([*flags, "--out", "whole"]) == 0
    checkpoints = tmp_path / "parts/checkpoints"
    kills = {
        "a finished checkpoint": "[0-9]*/checksums.json",
        "arrays half written": ".*.partial/state*",
        "files without checksums": ".*.partial/meta.json",
        "another finished checkpoint": "[0-9]*/checksums.json",
    }
    for pattern in kills.values():
        before = set(checkpoints.glob(pattern))  # what an earlier process left
        process = command.start("train", *flags, "--out", "parts", "--auto-resume")
        kill_when(process, lambda p=pattern, b=before: set(checkpoints.glob(p)) - b)
    assert train.main([*flags, "--out", "parts", "--auto-resume"]) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole", step=60)
    assert not list(checkpoints.glob(".*"))


def kill_when(process: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    """Send SIGKILL at the moment that something holds."""
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.001)
    process.kill()
    process.communicate()


def test_a_damaged_newest_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(
    run_copy, tmp_path, capsys
):
    whole = tmp_path / "whole"
    run_copy.rename(whole)
    shutil.copytree(whole, run_copy, symlinks=True)
    weights = next((run_copy / "checkpoints/20/state").rglob("ocdbt.process_0/d/*"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert train.main(["--resume", str(run_copy)]) == 0
    printed = capsys.readouterr().err
    assert "20: damaged checkpoint (state/ocdbt.process_0/d/" in printed
    assert "exactly where step 10 ended" in printed
    assert_same_run(run_copy, whole, step=20)
    assert (run_copy / "checkpoints/20.damaged.1").is_dir()


def test_a_finished_run_says_so_and_more_steps_go_on(run_copy, capsys):
    assert train.main(["--resume", str(run_copy)]) == 0
    assert "the run is finished at step 20" in capsys.readouterr().err
    before = reproducible(run_copy)
    assert train.main(["--resume", str(run_copy), "--max-steps", "23"]) == 0
    printed = capsys.readouterr().err
    assert "note: train.max_steps was 20 and is 23 from step 20 on." in printed
    assert reproducible(run_copy)[: len(before)] == before
    steps = [row["step"] for row in reproducible(run_copy) if row["kind"] == "train"]
    assert steps == list(range(1, 24))


def test_a_resumed_run_can_branch_off_from_an_older_checkpoint(run_copy, tmp_path, capsys):
    older = run_copy / "checkpoints/10"
    with pytest.raises(ValueError, match=r"20 is newer.*--out NEW to branch off"):
        train.main(["--resume", str(older)])
    branch = tmp_path / "branch"
    assert train.main(["--resume", str(older), "--out", str(branch)]) == 0
    assert_same_run(branch, run_copy, step=20)


def test_a_fresh_start_sets_an_earlier_run_aside(run_copy, prepared_folder):
    flags = [*SMALL_RUN, "--max-steps", "2", "--out", str(run_copy)]
    before = reproducible(run_copy)
    assert train.main(flags) == 0
    assert train.main([*flags, "--resume", "none"]) == 0
    assert reproducible(Path(f"{run_copy}.1")) == before
    assert len([row for row in reproducible(Path(f"{run_copy}.2")) if row["kind"] == "train"]) == 2


def test_weights_of_another_run_start_a_new_one_from_step_0(run_copy, tmp_path):
    out = tmp_path / "fine"
    flags = ["--init-from", str(run_copy), "--max-steps", "1", "--learning-rate", "1e-12"]
    flags += ["--optimizer.min_learning_rate", "0"]
    assert train.main([*SMALL_RUN, *flags, "--out", str(out)]) == 0
    new, old = read_checkpoint(out / "checkpoints/1"), read_checkpoint(run_copy / "best")
    assert int(new.moments.count) == 1
    assert new.tokenizer_hash == old.tokenizer_hash
    newest_weights = read_checkpoint(run_copy / "checkpoints/20").weights
    for name, weight in new.weights.items():
        np.testing.assert_allclose(weight, newest_weights[name], atol=1e-9)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--config", "tiny", "--model.hidden_size", "64"],
            r"written with .*model.hidden_size=32 \(this run has 64\).*Use .*--model.hidden_size 32",
        ),
        (["--model.rope_theta", "777"], r"model.rope_theta=10000.0 \(this run has 777.0\)"),
        (["--data.toy_seed", "5"], r"trained on the data [0-9a-f]{64}, and these are [0-9a-f]{64}"),
        (["--retrain-tokenizer"], "would change what its ids mean"),
    ],
)
def test_what_does_not_fit_the_checkpoint_is_refused(run_copy, flags, message):
    before = sorted(path.name for path in run_copy.rglob("*"))
    with pytest.raises(ValueError, match=message):
        train.main(["--resume", str(run_copy), "--max-steps", "30", *flags])
    assert sorted(path.name for path in run_copy.rglob("*")) == before


def test_another_tokenizer_is_refused_with_both_hashes(run_copy, tmp_path, prepared_folder):
    stories = generate_stories(seed=9, start=0, stop=300)
    other = train_tokenizer(stories, config=TokenizerConfig(), vocab_size=512)
    path = other.save(tmp_path / "other")
    expected = read_checkpoint(run_copy / "best").tokenizer_hash
    with pytest.raises(
        ValueError, match=f"made with the tokenizer {expected}, this one is {other.hash}"
    ):
        train.main(["--resume", str(run_copy), "--max-steps", "30", "--tokenizer.path", str(path)])


def damage_newest(run: Path, step: int) -> None:
    path = run / f"checkpoints/{step}/meta.json"
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.slow
def test_damage_at_the_same_step_twice_is_no_obstacle(run_copy, capsys):
    for _ in range(2):
        damage_newest(run_copy, 20)
        assert train.main(["--resume", str(run_copy)]) == 0
    names = sorted(path.name for path in (run_copy / "checkpoints").iterdir())
    assert names == ["10", "20", "20.damaged.1", "20.damaged.2"]


def test_a_checkpoint_that_is_written_before_the_lock_is_free_is_not_missed(
    run_copy, tmp_path, monkeypatch, capsys
):
    away = (run_copy / "checkpoints/20").rename(tmp_path / "20")
    locked = files.locked

    @contextlib.contextmanager
    def another_process_just_ended(path, *, on_wait):
        if path.name == ".run.lock":
            away.rename(run_copy / "checkpoints/20")
        with locked(path, on_wait=on_wait):
            yield

    monkeypatch.setattr(files, "locked", another_process_just_ended)
    assert train.main(["--resume", str(run_copy)]) == 0
    assert "the run is finished at step 20" in capsys.readouterr().err


def test_a_run_that_trained_its_tokenizer_again_goes_on(tmp_path):
    out = str(tmp_path / "run")
    assert train.main([*SMALL_RUN, "--retrain-tokenizer", "--max-steps", "1", "--out", out]) == 0
    assert train.main(["--resume", out, "--max-steps", "2"]) == 0


def test_what_copying_and_file_managers_do_to_a_run_is_no_obstacle(run_copy):
    target = (run_copy / "best").resolve()
    (run_copy / "best").unlink()
    shutil.copytree(target, run_copy / "best")
    for place in ("checkpoints", "checkpoints/20", "."):
        (run_copy / place / ".DS_Store").write_bytes(b"x")
    assert train.main(["--resume", str(run_copy), "--max-steps", "21"]) == 0
    assert (run_copy / "best").is_symlink()
    assert (run_copy / "best.1").is_dir()
    assert (run_copy / "checkpoints/.DS_Store").is_file()


@pytest.mark.slow
def test_best_and_a_step_named_from_inside_mean_their_run(run_copy, tmp_path, monkeypatch):
    assert train.main(["--resume", str(run_copy / "best"), "--max-steps", "21"]) == 0
    monkeypatch.chdir(run_copy / "checkpoints")
    assert train.main(["--resume", "21", "--max-steps", "22"]) == 0
    steps = [row["step"] for row in reproducible(run_copy) if row["kind"] == "train"]
    assert steps == list(range(1, 23))
    assert not (run_copy / "checkpoints/checkpoints").exists()


def test_a_branch_has_a_best_of_its_own(run_copy, tmp_path):
    branch = tmp_path / "branch"
    flags = ["--resume", str(run_copy / "checkpoints/10"), "--out", str(branch)]
    assert train.main([*flags, "--learning-rate", "10", "--max-steps", "12"]) == 0
    found = read_checkpoint(find_checkpoint(branch / "best", on_damaged=pytest.fail))
    assert found.best is not None
    assert found.best["step"] == found.step == 12


def test_a_missing_best_is_marked_again(run_copy):
    expected = (run_copy / "best").resolve().name
    (run_copy / "best").unlink()
    # One more step, so short of an evaluation that it cannot become the best.
    flags = ["--max-steps", "21", "--learning-rate", "1e3"]
    assert train.main(["--resume", str(run_copy), *flags]) == 0
    assert (run_copy / "best").resolve().name in (expected, "21")


def test_auto_resume_without_a_preset_keeps_the_runs_own_settings(run_copy):
    assert train.main(["--auto-resume", "--out", str(run_copy), "--max-steps", "21"]) == 0
    assert read_checkpoint(run_copy / "checkpoints/21").config.model.hidden_size == 32


def test_an_interrupted_start_does_not_block_the_next_one(tmp_path, monkeypatch):
    flags = [*SMALL_RUN, "--max-steps", "1", "--out", str(tmp_path / "run")]
    write_file = start.write_file

    def full_disk(path: Path, content: bytes) -> None:
        if path.name == "dataset_stats.json":
            raise OSError(28, "No space left on device", str(path))
        write_file(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(start, "write_file", full_disk)
        with pytest.raises(OSError, match="No space left"):
            train.main(flags)
    assert train.main(flags) == 0


def test_an_earlier_run_stays_where_it_is_until_the_new_one_can_start(run_copy):
    flags = ["--model.attention", "cudnn", "--model.compute_dtype", "bfloat16"]
    with pytest.raises(ValueError, match="cudnn"):
        train.main([*SMALL_RUN, *flags, "--out", str(run_copy)])
    assert not Path(f"{run_copy}.1").exists()
    assert reproducible(run_copy)


def test_a_link_to_a_run_is_locked_as_the_run(run_copy, tmp_path):
    (tmp_path / "link").symlink_to(run_copy)
    with (
        files.locked(tmp_path / ".run.lock", on_wait=pytest.fail),
        pytest.raises(ValueError, match="another process is training there"),
    ):
        train.main([*SMALL_RUN, "--out", str(tmp_path / "link")])


def test_weights_without_moments_cannot_be_resumed_but_started_from(run_copy, tmp_path):
    whole = read_checkpoint(run_copy / "checkpoints/20")
    folder = tmp_path / "weights"
    write_step_folder(
        folder,
        weights=whole.weights,
        moments=Moments(whole.moments.count, {}, {}),
        step=np.int32(20),
        nonfinite_streak=np.int32(0),
        config=whole.config,
        tokenizer=whole.tokenizer,
        dataset_hash="",
        best=None,
        remarks={},
    )
    flags = ["--max-steps", "21", "--out", str(tmp_path / "new")]
    with pytest.raises(ValueError, match="holds weights only.*--init-from"):
        train.main(["--resume", str(folder), *flags])
    assert train.main([*SMALL_RUN, "--init-from", str(folder), *flags, "--max-steps", "1"]) == 0


@pytest.mark.slow
def test_a_run_resumed_in_float64_computes_and_keeps_float64(run_copy):
    import jax

    with jax.enable_x64(True):
        flags = ["--resume", str(run_copy), "--max-steps", "21"]
        assert train.main([*flags, "--model.compute_dtype", "float64"]) == 0
    found = read_checkpoint(run_copy / "checkpoints/21")
    assert {array.dtype for array in found.weights.values()} == {np.dtype("float64")}
    assert {array.dtype for array in found.moments.first.values()} == {np.dtype("float64")}


def test_a_broken_line_inside_the_metrics_is_named(run_copy):
    path = run_copy / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], "{broken\n", *lines[3:]]))
    with pytest.raises(ValueError, match=r"metrics.jsonl:4: not JSON"):
        train.main(["--resume", str(run_copy), "--max-steps", "21"])


STRETCH = ["--model.rope_type", "yarn", "--model.rope_factor", "2"]


@pytest.mark.slow
def test_a_new_run_may_stretch_the_positions_of_old_weights_and_a_resumed_one_may_not(
    run_copy, tmp_path
):
    longer = ["--model.max_position_embeddings", "128", "--data.sequence_length", "128"]
    flags = [*STRETCH, *longer, "--init-from", str(run_copy), "--max-steps", "1"]
    assert train.main([*SMALL_RUN, *flags, "--out", str(tmp_path / "longer")]) == 0
    found = read_checkpoint(tmp_path / "longer" / "checkpoints" / "1").config.model
    assert (found.rope_type, found.rope_original_max_position_embeddings) == ("yarn", 64)
    with pytest.raises(ValueError, match="written with model.rope_type=default") as caught:
        train.main([*SMALL_RUN, *STRETCH, "--resume", str(run_copy), "--out", str(run_copy)])
    assert "--model.rope_type default" in str(caught.value)
