"""The PyTorch twin trains as JAX does: schedule, optimizer, one step, fifty steps, and a run of its own."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from conftest import SMALL_RUN, run_python
from llama_oracle import random_weights
from parity import (
    FLOAT32_NORM_AFTER_50_STEPS,
    PACKINGS,
    assert_equal_in,
    precision,
    prepared_data,
    real_batch,
    relative_error,
    small_config,
)
from safetensors import safe_open

from tinyllm_jax import train as jax_train
from tinyllm_jax.config import Config
from tinyllm_jax.model import weights as jax_weights
from tinyllm_jax.objectives import pretrain as jax_pretrain
from tinyllm_jax.training import optim as jax_optim
from tinyllm_jax.training import step as jax_step
from tinyllm_jax.training.metrics import read_metrics
from tinyllm_jax.training.step_folders import find_checkpoint
from tinyllm_torch import train
from tinyllm_torch.model import weights as torch_weights
from tinyllm_torch.objectives import pretrain as torch_pretrain
from tinyllm_torch.training import optim as torch_optim
from tinyllm_torch.training import step as torch_step
from tinyllm_torch.training.checkpoint import read_checkpoint, save_checkpoint

OPTIMIZED = True

# Clips now and then, decays visibly, and goes through warm-up, cosine and floor within 50 steps.
RECIPE: dict[str, Any] = {
    "train__max_steps": 50,
    "train__batch_size": 4,
    "optimizer__warmup_steps": 10,
    "optimizer__decay_steps": 40,
    "optimizer__learning_rate": 3e-3,
    "optimizer__min_learning_rate": 3e-4,
    "optimizer__weight_decay": 0.3,
    "optimizer__max_grad_norm": 0.8,
}


def recipe(packing: str, **settings: Any) -> Config:
    return small_config(packing, **RECIPE, **settings)


class JaxSide:
    """A run in JAX, one step at a time."""

    def __init__(self, config: Config, weights: Any):
        self.config = config
        with precision(config.model):
            structure, _ = jax_weights.model_structure(config.model)
            self.state = jax_step.new_state(config, jax.tree.map(jnp.asarray, dict(weights)))
            self._step = jax.jit(
                jax_step.make_train_step(
                    config, structure, jax_pretrain.next_token_loss, jax_pretrain.count_targets
                )
            )

    def step(self, batch: Any) -> dict[str, float]:
        with precision(self.config.model):
            self.state, numbers = self._step(self.state, batch)
        return {name: float(value) for name, value in numbers.items()}

    def arrays(self) -> dict[str, np.ndarray]:
        """Give weights and moments under the twin's names."""
        moments = jax_optim.read_moments(self.state.optimizer_state)
        return named(
            torch_weights.from_jax_weights(self.state.weights),
            torch_weights.from_jax_weights(moments.first),
            torch_weights.from_jax_weights(moments.second),
        )


class TorchSide:
    """The same run in the twin."""

    def __init__(self, config: Config, weights: Any):
        structure, _ = torch_weights.model_structure(config.model)
        tensors = torch_weights.as_tensors(
            torch_weights.from_jax_weights(weights), config.model, device="cpu"
        )
        self.state = torch_step.new_state(config, tensors)
        self._step = torch_step.make_train_step(
            config, structure, torch_pretrain.next_token_loss, torch_pretrain.count_targets
        )

    def step(self, batch: Any) -> dict[str, float]:
        self.state, numbers = self._step(self.state, batch)
        return {name: float(value) for name, value in numbers.items()}

    def arrays(self) -> dict[str, np.ndarray]:
        moments = self.state.optimizer_state
        return named(self.state.weights, moments.first, moments.second)


def named(weights: Any, first: Any, second: Any) -> dict[str, np.ndarray]:
    groups = {"weights": weights, "first": first, "second": second}
    return {
        f"{group} {name}": array.numpy() if isinstance(array, torch.Tensor) else array
        for group, arrays in groups.items()
        for name, array in arrays.items()
    }


def both_runs(config: Config, folder: Path) -> tuple[TorchSide, JaxSide, list[dict[str, Any]]]:
    """Train both from the same weights, each on the batches that it reads itself.

    Returns:
        The twin's side, JAX's side, and the numbers of every step of (the twin, JAX).
    """
    prepared = prepared_data(config, folder)
    theirs_reads = jax_pretrain.make_pretraining(config, prepared).train_batch
    ours_reads = torch_pretrain.make_pretraining(config, prepared).train_batch
    with precision(config.model):
        weights = jax_weights.initial_weights(config.model, seed=0)
    ours, theirs = TorchSide(config, weights), JaxSide(config, weights)
    actual, expected = [], []
    for number in range(config.train.max_steps):
        batch = ours_reads(number)
        for name, rows in theirs_reads(number).items():
            np.testing.assert_array_equal(batch[name], rows)
        actual.append(ours.step(batch))
        expected.append(theirs.step(batch))
    curves = [
        {name: [row[name] for row in rows] for name in rows[0]} for rows in (actual, expected)
    ]
    return ours, theirs, curves


# Schedule and optimizer ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer__warmup_steps": 0},
        {"optimizer__warmup_steps": 1, "optimizer__decay_steps": 0},
        {"optimizer__warmup_steps": 60},
        {"optimizer__min_learning_rate": 0.0, "optimizer__decay_steps": 1000},
    ],
)
def test_the_learning_rate_of_every_update_is_that_of_jax(settings: dict[str, Any]) -> None:
    config = small_config("packed", **{**RECIPE, **settings})
    with jax.enable_x64(True):
        expected = [float(jax_optim.learning_rate_schedule(config)(u)) for u in range(1, 61)]
    schedule = torch_optim.learning_rate_schedule(config)
    actual = [schedule(update) for update in range(1, 61)]
    assert relative_error(actual, expected) < 1e-14


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.8, 1e6])
def test_the_optimizer_makes_of_the_same_gradients_the_same_weights(max_grad_norm: float) -> None:
    config = small_config("packed", **{**RECIPE, "optimizer__max_grad_norm": max_grad_norm})
    rng = np.random.default_rng(0)
    start = {"matrix": 0.1 * rng.standard_normal((7, 5)), "norm": 1 + rng.standard_normal(5)}
    ours = {name: torch.from_numpy(value) for name, value in start.items()}
    optimizer = torch_optim.make_optimizer(config)
    moments = optimizer.init(ours)
    with jax.enable_x64(True):
        chain = jax_optim.make_optimizer(config)
        theirs = jax.tree.map(jnp.asarray, start)
        state = chain.init(theirs)
        for _ in range(12):
            gradients = {name: rng.standard_normal(value.shape) for name, value in start.items()}
            updates, state = chain.update(jax.tree.map(jnp.asarray, gradients), state, theirs)
            theirs = optax.apply_updates(theirs, updates)
            tensors = {name: torch.from_numpy(value) for name, value in gradients.items()}
            changes, moments = optimizer.update(tensors, moments, ours)
            ours = {name: weight + changes[name] for name, weight in ours.items()}
        expected = jax_optim.read_moments(state)
    assert moments.count == int(expected.count) == 12
    assert_equal_in("float64", ours, theirs)
    assert_equal_in("float64", moments.first, expected.first)
    assert_equal_in("float64", moments.second, expected.second)


# One step and fifty -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("passes", [1, 4])
def test_one_step_changes_every_weight_and_moment_alike(passes: int, prepared_folder: Path) -> None:
    config = recipe(
        "packed",
        model__compute_dtype="float64",
        model__tie_word_embeddings=False,
        train__gradient_accumulation_steps=passes,
    )
    weights = random_weights(config.model)
    batch = dict(real_batch("packed", prepared_folder))
    # Passes of very different fill, so that a mean of means would show.
    batch["loss_mask"] = batch["loss_mask"] & (np.arange(len(batch["loss_mask"])) % 4 > 0)[:, None]
    ours, theirs = TorchSide(config, weights), JaxSide(config, weights)
    assert_equal_in("float64", ours.step(batch), theirs.step(batch))
    assert_equal_in("float64", ours.arrays(), theirs.arrays())


@pytest.mark.slow
def test_a_step_that_is_no_number_changes_nothing_but_the_streak(prepared_folder: Path) -> None:
    config = recipe("packed")
    objective = torch_pretrain.make_pretraining(config, prepared_data(config, prepared_folder))
    batch = objective.train_batch(0)
    weights = random_weights(config.model)
    ours, theirs = TorchSide(config, weights), JaxSide(config, weights)
    for side in (ours, theirs):
        side.step(batch)
    token = int(batch["tokens"][0, 0])
    before = ours.state.weights["embed_tokens.weight"].clone()
    before[token] = torch.nan
    ours.state.weights["embed_tokens.weight"] = before
    table = theirs.state.weights["embed_tokens.weight"]
    theirs.state.weights["embed_tokens.weight"] = table.at[token].set(jnp.nan)
    kept = {name: array.copy() for name, array in ours.arrays().items()}
    for streak in (1, 2):
        numbers, expected = ours.step(batch), theirs.step(batch)
        assert numbers["nonfinite_streak"] == expected["nonfinite_streak"] == streak
        assert numbers["learning_rate"] == pytest.approx(expected["learning_rate"])
        assert not np.isfinite(numbers["loss"])
    assert ours.state.step == int(theirs.state.step) == 3
    for name, array in ours.arrays().items():
        np.testing.assert_array_equal(array, kept[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packing", "dtype"), [*((packing, "float64") for packing in PACKINGS), ("packed", "float32")]
)
def test_fifty_steps_on_the_same_batches_stay_together(
    packing: str, dtype: str, prepared_folder: Path
) -> None:
    config = recipe(packing, model__compute_dtype=dtype)
    ours, theirs, curves = both_runs(config, prepared_folder)
    losses, norms = curves[1]["loss"], curves[1]["grad_norm"]
    if dtype == "float64":
        assert_equal_in(dtype, ours.arrays(), theirs.arrays())
    else:
        norm_error = relative_error(curves[0].pop("grad_norm"), curves[1].pop("grad_norm"))
        assert norm_error < FLOAT32_NORM_AFTER_50_STEPS
    assert_equal_in(dtype, *curves)
    assert losses[-1] < losses[0] - 0.5, "a run that learns nothing shows nothing"
    assert min(norms) < 0.8 < max(norms), "clipping is not seen at work"


def test_both_evaluate_to_the_same_loss(prepared_folder: Path) -> None:
    from tinyllm_jax.training.loop import evaluate as jax_evaluate
    from tinyllm_torch.training.loop import evaluate as torch_evaluate

    config = recipe("stream", model__compute_dtype="float64")
    prepared = prepared_data(config, prepared_folder)
    weights = random_weights(config.model)
    ours, theirs = TorchSide(config, weights), JaxSide(config, weights)
    objective = jax_pretrain.make_pretraining(config, prepared)
    with precision(config.model):
        structure, _ = jax_weights.model_structure(config.model)
        step = jax_step.make_evaluation_step(structure, objective.loss_sums, objective.loss_weight)
        expected = jax_evaluate(jax.jit(step), theirs.state.weights, objective.evaluation_batches())
    twin = torch_pretrain.make_pretraining(config, prepared)
    step = torch_step.make_evaluation_step(
        torch_weights.model_structure(config.model)[0], twin.loss_sums, twin.loss_weight
    )
    actual = torch_evaluate(step, ours.state.weights, twin.evaluation_batches())
    assert actual == pytest.approx(expected, rel=1e-10)
    described = objective.describe_loss(expected["loss"])
    for name, value in twin.describe_loss(actual["loss"]).items():
        assert value == pytest.approx(described[name], rel=1e-9)


def test_dropout_differs_between_steps_and_repeats_with_the_seed(prepared_folder: Path) -> None:
    config = recipe("packed", model__residual_dropout=0.5)
    objective = torch_pretrain.make_pretraining(config, prepared_data(config, prepared_folder))
    batch, weights = objective.train_batch(0), random_weights(config.model)

    def loss(config: Config, step: int) -> float:
        side = TorchSide(config, weights)
        side.state = side.state._replace(step=step)
        return side.step(batch)["loss"]

    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1))
    assert loss(config, 0) == loss(config, 0)
    assert len({loss(config, 0), loss(config, 1), loss(config, 2**32), loss(other, 0)}) == 4


# The command --------------------------------------------------------------------------------------


@pytest.fixture
def quick_run(tmp_path: Path, prepared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL_RUN, "--model.residual_dropout", "0.1", "--train.eval_interval_steps", "8"]
    return lambda *more: train.main([*flags, *more])


def reproducible(run: Path) -> list[dict[str, Any]]:
    rows = read_metrics(run / "metrics.jsonl")
    return [row for row in rows if row["kind"] != "speed"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["--resume", "--auto-resume"])
def test_a_run_that_goes_on_is_bitwise_the_run_that_never_stopped(quick_run: Any, way: str) -> None:
    assert quick_run("--max-steps", "16", "--out", "whole") == 0
    decay = ["--optimizer.decay_steps", "16"]
    assert quick_run("--max-steps", "7", "--out", "parts", *decay) == 0
    kept = [row for row in reproducible(Path("parts")) if row["kind"] == "train"]
    assert [row["step"] for row in kept] == list(range(1, 8))
    if way == "--resume":
        assert train.main(["--resume", "parts", "--max-steps", "16"]) == 0
    else:
        flags = ["--auto-resume", "--max-steps", "16", "--out", "parts", *decay]
        assert quick_run(*flags) == 0
    actual, expected = (read_checkpoint(Path(run) / "checkpoints/16") for run in ("parts", "whole"))
    assert actual.moments.count == expected.moments.count == 16
    for one, other in (
        (actual.weights, expected.weights),
        (actual.moments.first, expected.moments.first),
        (actual.moments.second, expected.moments.second),
    ):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    rows = [
        [row for row in reproducible(Path(run)) if row["kind"] == "train"]
        for run in ("parts", "whole")
    ]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_run_begun_in_jax_goes_on_here_with_the_losses_it_has_there(
    trained_run: Path, tmp_path: Path, prepared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
    curves = {}
    for package, main in (("jax", jax_train.main), ("torch", train.main)):
        out = tmp_path / package
        assert main(["--resume", str(trained_run), "--max-steps", "32", "--out", str(out)]) == 0
        rows = read_metrics(out / "metrics.jsonl")
        curves[package] = [row["loss"] for row in rows if row["kind"] == "train"]
    assert len(curves["jax"]) == len(curves["torch"]) == 32
    assert relative_error(curves["torch"][20:], curves["jax"][20:]) < 2e-5


def test_a_checkpoint_of_weights_alone_begins_a_run_but_does_not_go_on(
    quick_run: Any, tmp_path: Path
) -> None:
    assert quick_run("--max-steps", "3", "--out", "run") == 0
    folder = Path("run/checkpoints/3")
    (folder / "optimizer.safetensors").unlink()
    sums = json.loads((folder / "checksums.json").read_text())
    del sums["optimizer.safetensors"]
    (folder / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(ValueError, match="--init-from"):
        train.main(["--resume", "run", "--max-steps", "5"])
    assert quick_run("--init-from", "run", "--max-steps", "1", "--out", "new") == 0
    begun = read_checkpoint(Path("new/checkpoints/1"))
    assert begun.moments.count == 1


def test_a_checkpoint_holds_what_converters_need_and_no_pickle(quick_run: Any) -> None:
    assert quick_run("--max-steps", "4", "--out", "run") == 0
    folder = Path("run/checkpoints/4")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("model.safetensors", "optimizer.safetensors", "meta.json", "checksums.json"),
        "tokenizer.model",
    }
    with safe_open(folder / "model.safetensors", "pt") as file:
        weights = set(file.keys())
        assert "layers.1.mlp.down_proj.weight" in weights
        assert "lm_head.weight" not in weights
    with safe_open(folder / "optimizer.safetensors", "pt") as file:
        moments = {f"{kind}_moments.{name}" for kind in ("first", "second") for name in weights}
        assert set(file.keys()) == moments
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["step"], meta["count"], meta["nonfinite_streak"], meta["format"]) == (4, 4, 0, 1)
    assert meta["data_position"] == {"next_step": 4, "rows_per_step": 4}
    assert {"seed", "config", "tokenizer_hash", "dataset_hash", "best"} <= set(meta)


def test_a_damaged_checkpoint_is_passed_over_and_a_missing_one_named(
    quick_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quick_run("--max-steps", "6", "--checkpoint.interval_steps", "3", "--out", "run") == 0
    newest = Path("run/checkpoints/6/model.safetensors")
    newest.write_bytes(newest.read_bytes()[:-1])
    said: list[str] = []
    assert find_checkpoint(Path("run"), on_damaged=said.append).name == "3"
    assert "model.safetensors does not have its checksum" in said[0]
    with pytest.raises(ValueError, match="no such folder"):
        find_checkpoint(Path("nowhere"), on_damaged=said.append)
    with pytest.raises(ValueError, match="would overwrite it"):
        train.main(["--resume", "run/checkpoints/3", "--max-steps", "9"])
    with pytest.raises(ValueError, match="holds an earlier run"):
        quick_run("--max-steps", "6", "--out", "run")
    with pytest.raises(ValueError, match=r"Use --model.hidden_size 32"):
        quick_run("--resume", "run/checkpoints/3", "--out", "new", "--model.hidden_size", "16")


def test_a_failed_save_leaves_the_earlier_checkpoint_and_nothing_else(
    quick_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quick_run("--max-steps", "4", "--out", "run") == 0
    good = read_checkpoint(Path("run/checkpoints/4"))
    state = torch_step.TrainState(5, good.weights, good.moments, 0)
    monkeypatch.setattr("tinyllm_torch.training.checkpoint.save_file", raise_full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(
            Path("run"),
            state,
            config=good.config,
            tokenizer=good.tokenizer,
            dataset_hash=good.dataset_hash,
            best=None,
        )
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["4"]


def raise_full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.slow
def test_the_twin_trains_without_importing_jax(tmp_path: Path, prepared_folder: Path) -> None:
    program = (
        "import sys\n"
        "from tinyllm_torch import generate, train\n"
        "import tinyllm_torch.inference.language_model\n"
        "assert train.main(sys.argv[1:]) == 0\n"
        "heavy = ('jax', 'jaxlib', 'flax', 'optax', 'orbax')\n"
        "print([name for name in sys.modules if name.split('.')[0] in heavy])\n"
    )
    places = {"TINYLLM_DATA_DIR": str(prepared_folder), "OMP_NUM_THREADS": "1"}
    flags = [*SMALL_RUN, "--max-steps", "2", "--out", "run"]
    result = run_python("-c", program, *flags, folder=tmp_path, **places)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_importing_the_package_imports_no_framework() -> None:
    program = "import sys, tinyllm_torch; print({'torch', 'jax', 'numpy'} & set(sys.modules))"
    result = run_python("-c", program)
    assert result.stdout.strip() == "set()", result.stderr
