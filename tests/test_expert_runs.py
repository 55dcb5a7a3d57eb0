"""A run with experts from end to end: what its metrics and report say, and all that reads it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL_RUN
from test_resume import assert_same_run

import tinyllm_jax
from tinyllm_jax import generate, inspect, train
from tinyllm_jax.model.weights import count_active_parameters
from tinyllm_jax.training.checkpoint import read_checkpoint
from tinyllm_jax.training.metrics import read_metrics
from tinyllm_torch import generate as torch_generate
from tinyllm_torch import train as torch_train

pytestmark = pytest.mark.slow  # the file as a whole

LAYERS, EXPERTS = 2, 4
FLAGS = [
    *SMALL_RUN,
    *("--model.num_experts", str(EXPERTS)),
    *("--model.num_shared_experts", "1"),
    *("--model.moe_intermediate_size", "24"),
    *("--model.router_z_loss_coef", "0.001"),
    *("--model.residual_dropout", "0.1"),
    *("--max-steps", "12"),
    *("--train.eval_interval_steps", "4"),
    *("--checkpoint.interval_steps", "6"),
]
TRAINERS = {"jax": train, "torch": torch_train}


@pytest.fixture(autouse=True)
def one_data_folder(monkeypatch: pytest.MonkeyPatch, prepared_folder: Path) -> None:
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, prepared_folder: Path) -> dict[str, Path]:
    """Give a run of 12 steps of either package; tests only read them."""
    folder = tmp_path_factory.mktemp("experts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
        for package, module in TRAINERS.items():
            assert module.main([*FLAGS, "--out", str(folder / package)]) == 0
    return {package: folder / package for package in TRAINERS}


def rows_of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == kind]


@pytest.mark.parametrize("package", TRAINERS)
def test_every_evaluation_tells_each_experts_share_of_its_layers_choices(
    package: str, runs: dict[str, Path]
) -> None:
    looks = rows_of(runs[package], "eval")
    assert [row["step"] for row in looks] == [4, 8, 12]
    for row in looks:
        shares = np.array(row["expert_load"])
        assert shares.shape == (LAYERS, EXPERTS)
        assert (shares >= 0).all()
        np.testing.assert_allclose(shares.sum(axis=1), 1.0, rtol=1e-5)
        # Two of four experts pass each token, so none can have more than half of the choices.
        assert shares.max() <= 0.5 + 1e-6
        assert row["router_balance_loss"] >= 1 - 1e-4
        assert row["router_z_loss"] > 0


@pytest.mark.parametrize("package", TRAINERS)
def test_steps_tell_what_the_routers_add_and_the_newest_tells_its_layers(
    package: str, runs: dict[str, Path]
) -> None:
    steps = rows_of(runs[package], "train")
    assert [row["step"] for row in steps] == list(range(1, 13))
    for row in steps:
        assert 1 - 1e-4 <= row["router_balance_loss"] < EXPERTS
        assert row["router_z_loss"] > 0
        assert "expert_load" not in row, "of every step it would fill the file"
        assert row["loss"] == pytest.approx(np.log(512), abs=0.5), "the cross-entropy alone"
    layers = rows_of(runs[package], "layers")
    assert layers[-1]["step"] == 12
    for row in layers:
        np.testing.assert_allclose(np.sum(row["expert_load"], axis=1), [1.0] * LAYERS, rtol=1e-5)


@pytest.mark.parametrize("package", TRAINERS)
def test_the_report_shows_experts_only_where_there_are_any(
    package: str, runs: dict[str, Path], trained_run: Path
) -> None:
    report = (runs[package] / "report.html").read_text()
    assert "<h2>Experts</h2>" in report
    assert f"{EXPERTS} is all of them." in report
    assert "<h2>Experts</h2>" not in (trained_run / "report.html").read_text()


def test_a_run_is_inspected(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main(["--checkpoint", str(runs["jax"])]) == 0
    printed = capsys.readouterr().out
    config = read_checkpoint(runs["jax"] / "checkpoints/12").config
    assert f"{count_active_parameters(config.model):,} parameters active" in printed
    for name in ("mlp.gate.kernel", "mlp.experts.down_proj.kernel", "shared_experts"):
        assert name in printed
    assert "One optimizer step" in printed
    assert "nan" not in printed


def test_both_packages_generate_from_it(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint", str(runs["jax"]), "--greedy", "--max-new-tokens", "12"]
    texts = []
    for command in (generate, torch_generate):
        assert command.main(flags) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(texts[0]) > len("Once upon a time")
    (loaded,) = tinyllm_jax.load(runs["jax"]).generate(
        "Once upon a time", greedy=True, max_new_tokens=12
    )
    assert loaded == texts[0].rstrip("\n")


def test_a_resumed_run_is_bitwise_the_one_that_never_stopped(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    parts = Path(shutil.copytree(runs["jax"], tmp_path / "parts", symlinks=True))
    for path in (parts / "checkpoints").iterdir():
        if int(path.name) > 6:
            shutil.rmtree(path)
    assert train.main(["--resume", str(parts)]) == 0
    assert_same_run(parts, runs["jax"], step=12)
