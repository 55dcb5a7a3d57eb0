"""The command as a person meets it: what it prints and leaves, and what bad input gets."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SMALL_RUN, Command, run_python

from tinyllm_jax import train
from tinyllm_jax.cli import run
from tinyllm_jax.data.toy_stories import generate_stories
from tinyllm_jax.training import loop
from tinyllm_jax.training.metrics import read_metrics
from tinyllm_jax.training.step_log import StepLog

STORIES = list(generate_stories(seed=1, start=0, stop=300))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Work in an empty folder, with a data folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TINYLLM_DATA_DIR", raising=False)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    """Run the command, which must end with exit code 2, and give its lines without `error: `."""
    with pytest.raises(SystemExit) as stop:
        run(lambda: train.main([*SMALL_RUN, "--max-steps", "2", "--out", "run", *flags]))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines), lines
    assert not list(Path().rglob("manifest.json")), "nothing half-written may look whole"
    assert not Path("run").exists()
    return [line.removeprefix("error: ") for line in lines]


def write_stories(path: Path, stories: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    return str(path)


def test_a_run_leaves_everything_that_is_promised(trained_run):
    names = {path.name for path in trained_run.iterdir()}
    assert names == {
        *("training_config_snapshot.json", "dataset_stats.json", "metrics.jsonl"),
        *("environment.json", "report.html", "tokenizer.model", "checkpoints", "best"),
    }
    rows = read_metrics(trained_run / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 21))
    looks = [row for row in rows if row["kind"] == "eval"]
    assert [row["step"] for row in looks] == [10, 20]
    assert looks[1]["loss"] < looks[0]["loss"]
    validation = json.loads((trained_run / "dataset_stats.json").read_text())["splits"][
        "validation"
    ]
    targets = validation["tokens"] - validation["documents"]  # every token but bos
    bits = looks[1]["loss"] / math.log(2) * targets
    assert looks[1]["bits_per_byte"] == pytest.approx(bits / validation["text_bytes"])
    expected = looks[1]["bits_per_byte"] / looks[1]["entropy_floor_bits_per_byte"] - 1
    assert looks[1]["above_floor_share"] == pytest.approx(expected)
    assert looks[1]["entropy_floor_bits_per_byte"] == pytest.approx(0.2056, rel=0.05)
    assert [row["step"] for row in rows if row["kind"] == "sample"] == [10, 20]
    speeds = [row for row in rows if row["kind"] == "speed"]
    assert all(0 <= row["data_wait_share"] < 1 for row in speeds)
    assert speeds[-1]["tokens_per_second"] > 0
    snapshot = json.loads((trained_run / "training_config_snapshot.json").read_text())
    assert snapshot["model"]["hidden_size"] == 32
    report = (trained_run / "report.html").read_text()
    assert "entropy floor" in report
    assert "http://" not in report.replace("http://www.w3.org", "")


@pytest.mark.slow
def test_the_command_says_what_it_does_and_how_to_go_on(command: Command):
    done = command.run("train", *SMALL_RUN, "--max-steps", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    for words in (
        "Device",
        "parameters",
        "tokens of",
        "validation loss",
        "Finished.",
        "report.html",
    ):
        assert words in done.stderr
    assert (
        "tinyllm_jax.generate --checkpoint checkpoints/pretrain_tiny --prompt 'Once" in done.stderr
    )


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(command: Command):
    process = command.start("train", *SMALL_RUN, "--max-steps", "100000", "--out", "run")
    metrics = Path(command.options["cwd"]) / "run/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        pass
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    step = int(max(metrics.parent.glob("checkpoints/*")).name)
    assert f"Stopped by SIGINT; step {step} is saved." in printed
    assert "--resume run" in printed
    assert read_metrics(metrics)[-1]["step"] <= step


def test_losses_that_are_no_numbers_stop_the_run_with_a_message(folder, monkeypatch, capsys):
    from tinyllm_jax.objectives import pretrain

    sound = pretrain.next_token_loss

    def unsound(*inputs):
        return tuple(jax.tree.map(lambda x: x * float("nan"), sound(*inputs)))

    monkeypatch.setattr(pretrain, "next_token_loss", unsound)
    flags = ["--max-steps", "50", "--out", "run", "--train.max_nonfinite_steps", "4"]
    assert train.main([*SMALL_RUN, *flags]) == 1
    printed = capsys.readouterr().err
    assert "steps in a row had a loss or gradient that is not finite" in printed
    assert "--learning-rate" in printed
    rows = read_metrics(Path("run/metrics.jsonl"))
    bad = [row for row in rows if row["kind"] == "nonfinite"]
    assert len(bad) >= 4
    assert [row["batch"] for row in bad[:2]] == [0, 1]
    assert all(row["loss"] == "nan" for row in rows if row["kind"] == "train")
    kept = np.load(Path("run/nonfinite") / bad[0]["file"])
    assert kept["tokens"].shape == (4, 64)


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-steps", "8", "--train.log_interval_steps", "100"],  # seen in the last write only
        ["--max-steps", "50", "--train.log_interval_steps", "40"],  # ended before it is seen
    ],
)
def test_a_streak_that_is_seen_late_stops_the_run_all_the_same(flags, folder, monkeypatch):
    bad_steps = range(1, 6)

    def poison(self: StepLog, steps: range, numbers: dict, **options) -> None:
        streaks = [bad_steps.index(step) + 1 if step in bad_steps else 0 for step in steps]
        add(self, steps, numbers | {"nonfinite_streak": np.array(streaks)}, **options)

    add = StepLog.add
    monkeypatch.setattr(StepLog, "add", poison)
    limit = ["--train.max_nonfinite_steps", "4", "--out", "run"]
    assert train.main([*SMALL_RUN, *limit, *flags]) == 1


def test_a_validation_loss_that_is_no_number_is_reported_and_never_the_best(folder, monkeypatch):
    losses = iter([float("nan"), 2.0, 3.0])
    monkeypatch.setattr(loop, "evaluate", lambda *_: {"loss": next(losses)})
    flags = ["--max-steps", "3", "--train.eval_interval_steps", "1", "--out", "run"]
    assert train.main([*SMALL_RUN, *flags]) == 0
    looks = [row for row in read_metrics(Path("run/metrics.jsonl")) if row["kind"] == "eval"]
    assert [row["loss"] for row in looks] == ["nan", 2.0, 3.0]
    assert Path("run/best").resolve().name == "2"
    assert "The lowest was 2.0000, at step 2." in Path("run/report.html").read_text()


def test_several_data_flags_add_up(folder):
    _, overrides, problems = train.read_command(["--data", "a", "b", "--data", "c"])
    assert (overrides["data.paths"], problems) == (["a", "b", "c"], [])


def test_all_problems_of_a_command_line_are_reported_at_once(folder, capsys):
    lines = refused(
        capsys,
        *("--model.hidden_size", "30.5", "--batch-size", "0", "--modle.hidden_size", "3"),
        *("--data.packing", "tight"),
    )
    assert len(lines) == 4
    text = "\n".join(lines)
    assert "model.hidden_size='30.5' does not fit. Give a whole number." in text
    assert "train.batch_size=0 is too small. Use 1 rows or more." in text
    assert "--modle.hidden_size: no such flag. Did you mean '--model.hidden_size'?" in text
    assert "data.packing=tight is not one of the choices." in text


def test_an_unknown_preset_names_those_there_are(folder, capsys):
    line, other = refused(capsys, "--config", "tinny", "--batch-sze", "3")
    assert other == "--batch-sze: no such flag. Did you mean '--batch-size'?"
    assert line.startswith("--config 'tinny': no such preset or file. Presets: ")
    assert "tiny" in line


def test_an_unknown_key_of_a_file_names_the_nearest(folder, capsys):
    Path("mine.toml").write_text("[model]\nrope_tetha = 5.0\n")
    (line,) = refused(capsys, "--config", "mine.toml")
    assert line == "mine.toml: unknown key model.rope_tetha. Did you mean 'model.rope_theta'?"


BAD_FILES = {
    "a file that is not parquet": ("bad.parquet", b"PAR0 nonsense", "parquet"),
    "broken JSON, with its line": (
        "bad.jsonl",
        json.dumps({"text": "a story long enough"}).encode() + b"\n{broken\n",
        "bad.jsonl:2: not JSON",
    ),
    "text that is not UTF-8": ("bad.txt", b"a story long enough \xff\xfe", "UTF-8"),
    "a cut gzip file": ("bad.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00", "bad.jsonl.gz"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_file_is_refused_by_name(what, folder, capsys):
    name, content, expected = BAD_FILES[what]
    Path(name).write_bytes(content)
    (line,) = refused(capsys, "--data", name)
    assert name in line
    assert expected in line


def test_a_missing_column_is_refused_with_those_there_are(folder, capsys):
    pq.write_table(pa.table({"story": ["a story long enough"], "id": [1]}), "bad.parquet")
    (line,) = refused(capsys, "--data", "bad.parquet")
    assert "text" in line
    assert "story" in line


def test_an_empty_folder_and_a_missing_path_are_refused(folder, capsys):
    Path("empty").mkdir()
    (line,) = refused(capsys, "--data", "empty")
    assert "empty" in line
    (line,) = refused(capsys, "--data", "nowhere/*.jsonl")
    assert "nowhere/*.jsonl" in line


def test_a_vocabulary_larger_than_the_corpus_allows_is_refused(folder, capsys):
    path = write_stories(folder / "few.jsonl", STORIES[:30])
    (line,) = refused(capsys, "--data", path, "--model.vocab_size", "9000")
    assert "vocab_size=9000" in line


def test_a_validation_set_shorter_than_one_window_is_refused(folder, capsys):
    train_file = write_stories(folder / "mine.jsonl", STORIES)
    short = write_stories(folder / "short.jsonl", ["Once there was a cat."])
    with pytest.raises(SystemExit) as stop:
        run(
            lambda: train.main(
                [*SMALL_RUN, "--data", train_file, "--data.validation_paths", short]
                + ["--data.packing", "stream", "--out", "run", "--max-steps", "2"]
            )
        )
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "data.sequence_length=64 needs windows of 65 tokens, and the validation split" in line
    assert not Path("run").exists()


def test_a_folder_that_is_no_run_is_never_written_to(folder, capsys):
    Path("run").mkdir()
    Path("run/thesis.txt").write_text("mine")
    with pytest.raises(SystemExit):
        run(lambda: train.main([*SMALL_RUN, "--out", "run"]))
    assert "run: holds files that are no run." in capsys.readouterr().err
    assert [path.name for path in Path("run").iterdir()] == ["thesis.txt"]
    Path("file").write_text("mine")
    with pytest.raises(SystemExit):
        run(lambda: train.main([*SMALL_RUN, "--out", "file"]))
    assert "file: a file. Name a folder with --out." in capsys.readouterr().err


def test_a_second_process_in_the_same_folder_is_refused(folder, capsys):
    from tinyllm_jax.data.files import locked

    with locked(Path(".run.lock"), on_wait=lambda: None):
        (line,) = refused(capsys)
    assert line.startswith("run: another process is training there.")


def test_a_read_only_output_folder_is_refused(folder, capsys):
    read_only = folder / "read_only"
    read_only.mkdir()
    read_only.chmod(0o555)
    if os.geteuid() == 0:  # may write anywhere but where the kernel forbids it
        read_only = Path("/sys/kernel")
    (line,) = refused(capsys, "--out", str(read_only / "run"))
    assert line.startswith(f"{read_only}/")
    assert "Name another folder with --out" in line


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [4, 20, 60])
def test_no_space_left_ends_in_one_line_and_nothing_that_looks_whole(
    kilobytes, folder, command: Command
):
    """A limit on the size of files stands for the full disk: tokenizer, shard, checkpoint."""
    stories = write_stories(folder / "mine.jsonl", STORIES)
    environment = command.options["env"] | {
        "TINYLLM_DATA_DIR": str(folder / "data"),
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    flags = [*SMALL_RUN, "--data", stories, "--out", "run", "--max-steps", "2"]
    flags += ["--data.validation_fraction", "0.2"]
    words = [sys.executable, "-m", "tinyllm_jax.train", *flags]
    limited = ["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "limited", *words]
    done = subprocess.run(limited, **command.options | {"env": environment, "timeout": 120})
    assert done.returncode == 2, done.stderr
    # Tasks that Orbax leaves behind may complain around it, at whatever moment they are collected.
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "larger than this process may write" in errors[0]
    assert not list(folder.rglob("*.tmp"))
    assert not list(folder.glob("run/checkpoints/*"))
    again = command.run("train", *flags, env=environment | {"JAX_ENABLE_COMPILATION_CACHE": "true"})
    assert again.returncode == 0, again.stderr


def test_help_shows_every_setting_with_its_unit_and_starts_fast(command: Command):
    done = command.run("train", "--help")
    assert done.returncode == 0
    for words in ("--optimizer.warmup_steps", "--learning-rate", "(steps; 0 or more; default 100)"):
        assert words in done.stdout
    script = "import sys, tinyllm_jax.train as t; t.read_command(['--seed', '1']); print('jax' in sys.modules)"
    done = run_python("-c", script)
    assert done.stdout.strip() == "False", done.stderr
