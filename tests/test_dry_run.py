"""`train --dry-run`: memory and time before anything is read or written, and what to type instead."""

import functools
import math
import shlex
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import SMALL_RUN
from parity import PACKINGS, prepared_data, small_config

from tinyllm_jax import train
from tinyllm_jax.cli import run
from tinyllm_jax.config import Config, load_config
from tinyllm_jax.model.weights import model_structure
from tinyllm_jax.objectives.pretrain import make_pretraining
from tinyllm_jax.training import dry_run
from tinyllm_jax.training.optim import has_second_moment
from tinyllm_torch import train as torch_train

SHALLOW = [*SMALL_RUN, "--model.num_hidden_layers", "1"]
EXPERTS = ["--model.num_experts", "4", "--model.num_shared_experts", "1"]
VARIANTS = {
    "dense": [],
    "stream in three passes": [
        "--data.packing",
        "stream",
        "--train.gradient_accumulation_steps",
        "3",
    ],
    "experts": EXPERTS,
    "experts under muon": [*EXPERTS, "--optimizer.name", "muon", "--data.packing", "padded"],
}
RECOMPUTE = ["--model.activation_checkpointing", "full", "--model.scan_layers", "true"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Work in an empty folder, without real text anywhere, and without a long look at the clock."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(tmp_path / "no-data"))
    monkeypatch.setattr(dry_run, "TIMING_SECONDS", 0.0)
    # A test asks for the same sizes as the command.
    monkeypatch.setattr(dry_run, "compile_step", functools.cache(dry_run.compile_step))
    return tmp_path


def dry(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, str]:
    """Run the command with data that does not exist, and give its lines by their first word."""
    assert train.main([*SHALLOW, "--data", "nowhere/*.parquet", "--dry-run", *flags]) == 0
    lines = capsys.readouterr().err.splitlines()
    return {line.split()[0]: line for line in lines}


def config_of(*words: str) -> Config:
    preset, overrides, problems = train.read_command(words)
    return load_config(preset or "tiny", overrides, problems)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_dry_run_says_what_a_run_takes_and_leaves_nothing(variant, folder, capsys):
    lines = dry(capsys, "--max-steps", "77", *VARIANTS[variant])
    assert list(lines) == ["Device", "Model", "Work", "Compiled", "Memory", "Speed", "Run"]
    config = config_of(*SHALLOW, *VARIANTS[variant])
    assert f"{config.rows_per_step * 64:,} tokens a step, 77 steps" in lines["Work"]
    assert ("active for each token" in lines["Model"]) == ("experts" in variant)
    assert "for 77 steps" in lines["Run"]
    assert list(folder.iterdir()) == []
    words = [*SHALLOW, "--data", "nowhere/*.parquet", "--dry-run", "--max-steps", "77"]
    check_memory(config_of(*words, *VARIANTS[variant]), lines["Memory"])


def check_memory(config: Config, said: str) -> None:
    """Compare what is said of a configuration's memory with counting and with the compiler."""
    compiled = dry_run.compile_step(config)
    _, shapes = model_structure(config.model)
    sizes = {name: math.prod(shape.shape) for name, shape in shapes.items()}
    second = [size for name, size in sizes.items() if has_second_moment(name, config)]
    assert (len(second) < len(sizes)) == (config.optimizer.name == "muon")
    counted = 4 * (2 * sum(sizes.values()) + sum(second))  # float32
    # Counters and a few constants are there besides, and take less than any weight.
    assert counted < compiled.state < counted + 4 * min(sizes.values())
    assert compiled.working > 4 * sum(sizes.values()), "the gradients alone take so much"
    words = said.replace(":", "").split()
    held, working, total, limit = (float(word) * 1e9 for word in words if word[0].isdigit())
    assert held == pytest.approx(compiled.state, rel=0.01)
    assert held + working == pytest.approx(total, rel=0.02)
    assert total == pytest.approx(compiled.total, rel=0.01)
    assert limit == pytest.approx(dry_run.memory_limit(), rel=0.01)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("double", [False, True])
def test_made_up_rows_have_the_form_of_real_ones(packing, double, prepared_folder):
    config = small_config(packing, train__gradient_accumulation_steps=2)
    real = make_pretraining(config, prepared_data(config, prepared_folder)).train_batch(0)
    with jax.enable_x64(double):
        made_up = dry_run.made_up_batches(config)
    form = {name: ((1, *rows.shape), rows.dtype) for name, rows in real.items()}
    assert {name: (rows.shape, rows.dtype) for name, rows in made_up.items()} == form
    assert 0 <= int(made_up["tokens"].min()) <= int(made_up["tokens"].max()) < 512


def test_what_does_not_fit_gets_flags_to_type_that_have_the_memory_they_say(
    folder, capsys, monkeypatch
):
    words = [*SHALLOW, "--batch-size", "16", "--data", "nowhere", "--dry-run"]
    passes = "--train.gradient_accumulation_steps"
    sizes = [
        dry_run.compile_step(config_of(*words, "--batch-size", rows, passes, number)).total
        for rows, number in (("16", "1"), ("8", "2"), ("4", "4"))
    ]
    assert sizes[0] > sizes[1] > sizes[2]
    limit = (sizes[1] + sizes[2]) // 2
    monkeypatch.setattr(dry_run, "memory_limit", lambda: limit)
    assert train.main(words) == 1
    printed = capsys.readouterr().err
    assert "Speed" not in printed
    _, advice = printed.split("It does not fit.")
    offers = [line.strip() for line in advice.splitlines()[1:]]
    assert [offer.rsplit(": ", 1)[0] for offer in offers] == [
        "--model.activation_checkpointing full --model.scan_layers true",
        "--batch-size 8 --train.gradient_accumulation_steps 2",
        "--batch-size 4 --train.gradient_accumulation_steps 4",
    ]
    for offer in offers:
        flags, said = offer.rsplit(": ", 1)
        config = config_of(*words, *shlex.split(flags))
        assert config.rows_per_step == 16, "the same rows make a step"
        size = dry_run.compile_step(config).total
        assert float(said.split()[0]) == pytest.approx(size / 1e9, rel=0.01)
        assert said.endswith("fits" if size <= limit else "does not fit either")
    assert offers[-1].endswith("GB, fits"), "the list ends where a smaller batch fits"
    assert list(folder.iterdir()) == []


@pytest.fixture
def nothing_fits(monkeypatch) -> None:
    """Let every step take a petabyte, without compiling it."""
    giant = dry_run.Compiled(steps=None, state=10**15, batch=0, working=0)
    monkeypatch.setattr(dry_run, "compile_step", lambda _: giant)


@pytest.mark.usefixtures("nothing_fits")
def test_where_nothing_fits_the_model_must_shrink(capsys):
    words = [*SHALLOW, "--dry-run", "--batch-size", "2"]
    assert train.main(words) == 1
    printed = capsys.readouterr().err
    assert printed.count("does not fit either") == 3  # recomputing, one row, both
    assert "Otherwise use a smaller model or a smaller --data.sequence_length." in printed
    lightest = ["--batch-size", "1", "--train.gradient_accumulation_steps", "2", *RECOMPUTE]
    assert train.main([*words, *lightest]) == 1
    printed = capsys.readouterr().err
    assert "It does not fit. Use a smaller model or a smaller --data.sequence_length." in printed


def test_a_resumed_run_counts_the_steps_that_are_left_and_stays_as_it_is(run_copy, capsys):
    before = {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()}
    assert train.main(["--resume", str(run_copy), "--max-steps", "50", "--dry-run"]) == 0
    assert "for 30 steps" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()} == before
    assert [path.name for path in run_copy.parent.iterdir()] == ["run"]


def test_a_run_goes_on_with_what_a_dry_run_offers(run_copy, prepared_folder, monkeypatch):
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
    flags = [*RECOMPUTE, "--batch-size", "2", "--train.gradient_accumulation_steps", "2"]
    assert train.main(["--resume", str(run_copy), "--max-steps", "21", *flags]) == 0
    assert (run_copy / "checkpoints/21").is_dir()


def test_settings_that_break_rules_are_refused_as_in_a_run():
    with pytest.raises(ValueError, match="no such preset or file"):
        train.main(["--config", "tinny", "--dry-run"])
    with pytest.raises(ValueError, match="is longer than model.max_position_embeddings=64"):
        train.main([*SHALLOW, "--dry-run", "--data.sequence_length", "65"])
    with pytest.raises(ValueError, match="run.dry_run='perhaps' does not fit. Give true or false"):
        train.main([*SMALL_RUN, "--dry-run", "perhaps"])


def test_a_learning_rate_that_breaks_the_numbers_is_no_obstacle(capsys):
    lines = dry(capsys, "--learning-rate", "1e38", "--warmup-steps", "0")
    assert "Speed" in lines


@pytest.mark.usefixtures("nothing_fits")
def test_a_file_may_ask_for_a_dry_run_and_the_command_line_may_decline(folder, capsys):
    Path("mine.toml").write_text("[run]\ndry_run = true\n[model]\nvocab_size = 512\n")
    words = [*SHALLOW, "--config", "mine.toml", "--data", "nowhere"]
    assert train.main(words) == 1
    assert "It does not fit." in capsys.readouterr().err
    with pytest.raises(ValueError, match="no such file or folder"):
        train.main([*words, "--dry-run", "false"])
    assert "Compiled" not in capsys.readouterr().err


def test_the_twin_refuses_a_dry_run_and_names_the_command_that_can(folder, capsys):
    with pytest.raises(SystemExit) as stop:
        run(lambda: torch_train.main([*SMALL_RUN, "--data", "nowhere", "--dry-run"]))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "python -m tinyllm_jax.train --dry-run" in line
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(7, "7 seconds"), (300, "5.0 minutes"), (9000, "2.5 hours"), (864000, "10.0 days")],
)
def test_times_are_said_as_people_do(seconds: Any, expected: str):
    assert dry_run.in_words(np.float64(seconds)) == expected
