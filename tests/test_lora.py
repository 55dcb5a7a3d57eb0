"""Adapters: what they compute, what is trained, stored and merged, in every mode; and PEFT's own."""

import dataclasses
import json
import math
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import Command, run_python
from mode_runs import MODES, SHORT, assert_same_run, flags_of, rows_of, write_data
from test_resume import stop_at

from convert.__main__ import main as convert_command
from tinyllm_jax import inspect, load, train
from tinyllm_jax.cli import run
from tinyllm_jax.config import ALL_PROJECTIONS, LoraConfig, ModelConfig
from tinyllm_jax.errors import InputError
from tinyllm_jax.model.lora import (
    LoraLinear,
    adapted_structure,
    initial_adapters,
    is_adapter,
    merge_adapters,
    trained_names,
)
from tinyllm_jax.model.weights import (
    Weights,
    count_parameters,
    initial_weights,
    merge_weights,
    model_structure,
)
from tinyllm_jax.training import dry_run
from tinyllm_jax.training.adaptation import for_conversations
from tinyllm_jax.training.checkpoint import open_checkpoint, read_checkpoint
from tinyllm_jax.training.start_rules import SNAPSHOT
from tinyllm_torch import train as torch_train

LORA = {"lora.rank": 4, "lora.alpha": 8}
MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    compute_dtype="float32",
)
# Each setting, and its other value.
LORA_CHANGES = {
    "rank": 3,
    "alpha": 4.0,
    "targets": ("q_proj",),
    "dropout": 0.5,
    "embeddings": True,
}
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12), dtype=np.int32)


def moved(adapters: Weights, *, by: float) -> Weights:
    """Give adapters off their start, B among them."""
    numbers = np.random.default_rng(1)
    return {
        name: w + by * numbers.standard_normal(w.shape).astype(w.dtype)
        for name, w in adapters.items()
    }


def unmerged_logits(model: ModelConfig, lora: LoraConfig, weights: Any, **beside: Any) -> Any:
    structure, _ = adapted_structure(model, lora)
    merged: Any = merge_weights(structure, weights)
    return np.asarray(merged(jnp.asarray(TOKENS), **beside))


def plain_logits(model: ModelConfig, weights: Any) -> Any:
    structure, _ = model_structure(model)
    return np.asarray(merge_weights(structure, weights)(jnp.asarray(TOKENS)))


# What adapters compute --------------------------------------------------------------------------------


def test_at_the_start_a_model_with_adapters_is_the_model() -> None:
    lora, weights = LoraConfig(rank=3), initial_weights(MODEL, seed=0)
    adapters = initial_adapters(MODEL, lora, seed=0)
    actual = unmerged_logits(MODEL, lora, weights | adapters)
    np.testing.assert_array_equal(actual, plain_logits(MODEL, weights))


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
    ("targets", "scan_layers"),
    [(ALL_PROJECTIONS, False), (ALL_PROJECTIONS, True), (("down_proj", "k_proj"), False)],
)
def test_merged_adapters_compute_what_they_do_beside_the_model(
    targets: tuple[str, ...], scan_layers: bool
) -> None:
    model = dataclasses.replace(MODEL, scan_layers=scan_layers)
    lora, weights = LoraConfig(rank=3, alpha=6.0, targets=targets), initial_weights(model, seed=0)
    adapters = moved(initial_adapters(model, lora, seed=0), by=0.05)
    assert len(adapters) == 2 * 2 * len(targets)
    whole = merge_adapters(weights, adapters, lora=lora)
    assert whole.keys() == weights.keys()
    changed = [name for name in whole if not np.array_equal(whole[name], weights[name])]
    assert len(changed) == 2 * len(targets)
    actual = plain_logits(model, whole)
    np.testing.assert_allclose(actual, unmerged_logits(model, lora, weights | adapters), atol=1e-5)
    assert np.abs(actual - plain_logits(model, weights)).max() > 1e-3


def test_a_begins_uniform_within_one_over_the_root_of_its_inputs_and_b_with_zero() -> None:
    adapters = initial_adapters(MODEL, LoraConfig(rank=64), seed=0)
    for name, array in adapters.items():
        if "lora_B" in name:
            assert not np.asarray(array).any()
            continue
        limit = array.shape[0] ** -0.5
        assert 0.98 * limit < float(jnp.abs(array).max()) <= limit
        np.testing.assert_allclose(float(array.std()), limit / 3**0.5, rtol=0.05)
    first, second = (adapters[f"layers.{n}.mlp.up_proj.lora_A.kernel"] for n in (0, 1))
    assert not np.array_equal(first, second)


def test_dropout_falls_on_the_input_of_the_adapter_and_nowhere_else() -> None:
    lora, weights = LoraConfig(rank=3, dropout=0.5), initial_weights(MODEL, seed=0)
    start, key = initial_adapters(MODEL, lora, seed=0), jax.random.key(1)
    plain = plain_logits(MODEL, weights)
    # B is zero: whatever the adapter's input, nothing comes out.
    np.testing.assert_array_equal(
        unmerged_logits(MODEL, lora, weights | start, dropout_key=key), plain
    )
    adapters = weights | moved(start, by=0.05)
    still = unmerged_logits(MODEL, lora, adapters)
    assert np.abs(unmerged_logits(MODEL, lora, adapters, dropout_key=key) - still).max() > 1e-3

    structure, _ = adapted_structure(MODEL, lora)
    layer: Any = merge_weights(structure, adapters)
    layer = layer.layers[0].mlp.up_proj
    assert isinstance(layer, LoraLinear)
    a, b = (np.asarray(side.kernel[...]) for side in (layer.lora_A, layer.lora_B))
    x = np.ones((1, 1, 32), np.float32)
    added = np.asarray(layer(jnp.asarray(x), adapter_key=key) - x @ layer.kernel[...])[0, 0]
    # Some inputs are zero, and the others twice as large.
    kept = np.asarray(jax.random.bernoulli(key, 0.5, x.shape))[0, 0]
    assert 5 < kept.sum() < 27
    np.testing.assert_allclose(added, lora.alpha / 3 * (2.0 * kept) @ a @ b, atol=1e-5)


def test_every_place_has_dropout_of_its_own() -> None:
    lora, weights = LoraConfig(rank=3, dropout=0.5), initial_weights(MODEL, seed=0)
    adapters = weights | initial_adapters(MODEL, lora, seed=0)
    structure, _ = adapted_structure(MODEL, lora)
    seen: list[Any] = []
    call = LoraLinear.__call__

    def record(self: Any, x: Any, *, adapter_key: Any = None) -> Any:
        seen.append(jax.random.key_data(adapter_key).tolist())
        return call(self, x, adapter_key=adapter_key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoraLinear, "__call__", record)
        # Not compiled, where all blocks are one trace.
        merge_weights(structure, adapters)(jnp.asarray(TOKENS), dropout_key=jax.random.key(1))
    assert len({*map(tuple, seen)}) == len(seen) == 2 * len(ALL_PROJECTIONS)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_gradients_are_those_of_the_matrix_beside_by_the_chain_rule() -> None:
    """dA = s dW B^T and dB = s A^T dW, with dW of the merged model, in float64."""
    model = dataclasses.replace(MODEL, compute_dtype="float64")
    lora = LoraConfig(rank=3, alpha=6.0)
    with jax.enable_x64(True):
        weights = initial_weights(model, seed=0)
        adapters = moved(initial_adapters(model, lora, seed=0), by=0.05)
        whole = merge_adapters(weights, adapters, lora=lora)

        def loss(structure: Any, weights: Any) -> Any:
            return jnp.mean(jnp.square(merge_weights(structure, weights)(jnp.asarray(TOKENS))))

        structure, _ = adapted_structure(model, lora)
        plain, _ = model_structure(model)
        actual = jax.jit(jax.grad(lambda a: loss(structure, {**weights, **a})))(adapters)
        of_matrix = jax.jit(jax.grad(lambda w: loss(plain, w)))(whole)
        for name, gradient in actual.items():
            stem, side = name.removesuffix(".kernel").rsplit(".lora_", 1)
            a, b = (np.asarray(adapters[f"{stem}.lora_{letter}.kernel"]) for letter in "AB")
            change = np.asarray(of_matrix[f"{stem}.kernel"])
            expected = 2.0 * (change @ b.T if side == "A" else a.T @ change)
            assert np.abs(expected).max() > 1e-8
            np.testing.assert_allclose(gradient, expected, rtol=1e-8, atol=1e-14, err_msg=name)


# What does not fit ------------------------------------------------------------------------------------

REFUSED = {
    "a setting that says nothing": ({"lora.alpha": 4}, "lora.alpha says nothing without adapters"),
    "an unknown matrix": (
        {**LORA, "lora.targets": "query"},
        "lora.targets=query is no list of matrices. Use some of q_proj k_proj",
    ),
    "no model to adapt": (LORA, "Name it with --init-from"),
    "experts": (
        {**LORA, "model.num_experts": 4, "model.moe_intermediate_size": 32},
        "experts take no adapters, and model.num_experts=4. Use --lora.targets q_proj",
    ),
    "Muon": ({**LORA, "optimizer.name": "muon"}, "trains none of them. Use --optimizer.name adamw"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_in_a_line(
    what: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags, message = REFUSED[what]
    assert message in refused(capsys, *flags_of(flags))
    assert not list(tmp_path.glob("**/[!.]*.*"))


def refused(capsys: Any, *flags: str, command: Any = train.main) -> str:
    with pytest.raises(SystemExit) as caught:
        run(lambda: command(list(flags)))
    assert caught.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, errors
    return errors[0]


def test_the_twin_trains_no_adapters(
    capsys: Any, tmp_path: Path, trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = json.loads((trained_run / SNAPSHOT).read_text())["model"]
    model = {f"model.{key}": value for key, value in sizes.items()}
    flags = flags_of({**LORA, **model, "run.init_from": trained_run, "data.sequence_length": 64})
    assert "the twin trains no adapters" in refused(capsys, *flags, command=torch_train.main)


# Runs of every mode -----------------------------------------------------------------------------------

PRETRAIN = {"run.mode": "pretrain", "data.paths": "toy", "data.toy_documents": 400}
RUNS: dict[str, dict[str, Any]] = {**MODES, "pretrain": {**PRETRAIN, "model.vocab_size": 512}}


@pytest.fixture(scope="module")
def runs(trained_run: Path, tmp_path_factory: Any, prepared_folder: Path) -> Path:
    """Give a folder with a finished run of each mode, with adapters, begun with the same model."""
    folder = tmp_path_factory.mktemp("lora")
    write_data(folder)
    (folder / "base").symlink_to(trained_run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
        patch.chdir(folder)
        # Adapters need a model that knows turns.
        whole = {**SHORT, **MODES["sft"], "run.init_from": "base", "run.out": "talks"}
        assert train.main(flags_of({**whole, "train.max_steps": 1})) == 0
        for name in MODES:
            assert train.main(flags_for(name, name)) == 0
    return folder


def flags_for(name: str, out: str, **changed: Any) -> list[str]:
    settings = {**SHORT, **MODES[name], **LORA, "run.init_from": "talks", "run.out": out, **changed}
    return flags_of(settings)


@pytest.fixture
def beside(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared_folder: Path
) -> Path:
    """Let a test begin in a folder of its own with the data and links to the runs."""
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    for name in ("base", "talks", *MODES):
        (tmp_path / name).symlink_to((runs / name).resolve())
    return tmp_path


def of_begin(name: str) -> Any:
    begun = open_checkpoint(Path("talks"), on_damaged=pytest.fail)
    seed = read_checkpoint(Path(name) / "checkpoints/8").config.train.seed
    return for_conversations(begun, scores=name in ("reward", "ppo"), seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODES)
def test_only_adapters_are_trained_and_stored(name: str, beside: Path) -> None:
    kept = read_checkpoint(Path(name) / "checkpoints/8")
    model = kept.config.model
    expected = {*trained_names(model, kept.config.lora)}
    scores = {"score.kernel"} if name in ("reward", "ppo") else set()
    assert {key for key in expected if not is_adapter(key)} == scores
    assert len(expected) == 2 * 2 * 7 + len(scores)
    for stored in (kept.weights, kept.moments.first, kept.moments.second):
        assert stored.keys() == expected
    reference = read_checkpoint(Path(name) / "reference")
    assert reference.config.lora.rank == 0
    begun = of_begin(name)
    assert reference.weights.keys() == begun.weights.keys()
    for key, array in begun.weights.items():
        np.testing.assert_array_equal(reference.weights[key], array, err_msg=key)
    whole = open_checkpoint(Path(name), on_damaged=pytest.fail)
    assert whole.weights.keys() == begun.weights.keys()
    changed = {k for k in begun.weights if not np.array_equal(whole.weights[k], begun.weights[k])}
    assert {key.removesuffix("_proj.kernel") != key for key in changed - scores} == {True}
    assert len(changed) == 2 * 7 + len(scores)


@pytest.mark.slow
def test_a_checkpoint_takes_the_place_of_its_adapters_alone(beside: Path) -> None:
    # Each number has two moments; the step and what is counted with it are three more.
    assert stored_numbers(Path("sft/checkpoints/8")) == 3 * 4096 + 3
    assert stored_numbers(Path("base/checkpoints/20")) == 3 * 34_976 + 3


def stored_numbers(folder: Path) -> int:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        found: Any = checkpointer.metadata(folder.resolve() / "state").item_metadata
    leaves = jax.tree.leaves(found.tree, is_leaf=lambda leaf: not isinstance(leaf, dict))
    return sum(math.prod(leaf.shape) for leaf in leaves)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODES)
def test_every_mode_learns_with_adapters(name: str, beside: Path) -> None:
    rows = rows_of(Path(name), "train")
    assert all(np.isfinite([row["loss"], row["grad_norm"]]).all() for row in rows)
    assert not any(row["skipped"] for row in rows)
    looks = {row["step"]: row["loss"] for row in rows_of(Path(name), "eval")}
    if name in ("sft", "dpo", "reward"):
        assert looks[8] < looks[4]
    if name in ("dpo", "grpo", "ppo"):  # the reference is the frozen model
        first = rows[0]
        assert first.get("kl", first.get("margin")) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.slow
def test_rollouts_are_of_the_adapters_as_they_are(beside: Path) -> None:
    for name in ("grpo", "ppo"):
        ratios = [row["ratio"] for row in rows_of(Path(name), "train")]
        assert np.abs(np.array(ratios[::2]) - 1).max() < 1e-5 < abs(ratios[1] - 1)
        divergences = [row["answer_kl"] for row in rows_of(Path(name), "rollout")]
        assert abs(divergences[0]) < 1e-6 < abs(divergences[-1])


@pytest.mark.slow
def test_the_validation_loss_is_that_of_the_merged_model(beside: Path) -> None:
    """A new run from the merged weights, which learns nothing, begins where the other ended."""
    still = {"optimizer.learning_rate": 1e-30, "optimizer.min_learning_rate": 0.0}
    changed = {"run.init_from": "sft", "train.max_steps": 1, "lora.rank": 0, "lora.alpha": 16}
    assert train.main(flags_for("sft", "new", **changed, **still)) == 0
    actual, expected = (rows_of(Path(name), "eval")[-1]["loss"] for name in ("new", "sft"))
    assert actual == pytest.approx(expected, abs=1e-5)
    assert not Path("new/reference").exists()


@pytest.mark.slow
def test_pretraining_goes_on_with_adapters(beside: Path) -> None:
    settings = {**SHORT, **RUNS["pretrain"], **LORA, "run.init_from": "base", "run.out": "new"}
    sizes = json.loads((Path("base") / SNAPSHOT).read_text())["model"]
    settings |= {f"model.{key}": value for key, value in sizes.items()}
    settings |= {"data.sequence_length": 64, "data.validation_fraction": 0.1}
    assert train.main(flags_of(settings)) == 0
    assert len(read_checkpoint(Path("new/checkpoints/8")).weights) == 28
    first = rows_of(Path("base"), "eval")[-1]["loss"]
    assert rows_of(Path("new"), "eval")[-1]["loss"] < first + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", LORA_CHANGES)
def test_a_setting_of_adapters_changes_what_a_run_tells(name: str, beside: Path) -> None:
    words = LORA_CHANGES[name]
    changed = {f"lora.{name}": " ".join(words) if isinstance(words, tuple) else words}
    assert train.main(flags_for("sft", "new", **changed, **{"train.max_steps": 3})) == 0
    actual, expected = (
        [row["loss"] for row in rows_of(Path(run), "train")][:3] for run in ("new", "sft")
    )
    assert actual[0] == pytest.approx(expected[0], abs=1e-5)  # B is zero
    assert actual[1:] != expected[1:]


# Going on ----------------------------------------------------------------------------------------------

GOING_ON = {"lora.dropout": 0.2, "train.gradient_accumulation_steps": 2}


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_exactly(beside: Path, command: Command) -> None:
    flags = flags_for("sft", "whole", **GOING_ON, **{"checkpoint.interval_steps": 2})
    assert train.main(flags) == 0
    for part in (beside / "base", beside / "chat.jsonl"):
        assert part.exists()
    words = [*flags, "--out", "parts", "--auto-resume"]
    process = command.start("train", *words)
    deadline = time.monotonic() + 120
    while not list((beside / "parts/checkpoints").glob("[0-9]*")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (beside / "parts/checkpoints/8").exists()
    ended = command.run("train", *words)
    assert ended.returncode == 0, ended.stderr
    assert "exactly where step" in ended.stderr
    assert_same_run(beside / "parts", beside / "whole", step=8)


@pytest.mark.slow
def test_a_stopped_run_of_rollouts_goes_on_exactly_with_adapters(beside: Path) -> None:
    patch = stop_at(4)
    assert train.main(flags_for("ppo", "parts")) == 128 + signal.SIGTERM
    patch.undo()
    assert train.main(["--resume", "parts"]) == 0
    assert_same_run(Path("parts"), Path("ppo"), step=8)


STAYS = {
    "lora.rank": ("2", "trained with lora.rank=4, and this run has 2. Use --lora.rank 4"),
    "lora.alpha": ("2", "trained with lora.alpha=8, and this run has 2"),
    "lora.targets": ("q_proj", "Use --lora.targets q_proj k_proj v_proj o_proj gate_proj"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STAYS)
def test_a_run_does_not_go_on_with_other_adapters(name: str, beside: Path, capsys: Any) -> None:
    value, message = STAYS[name]
    words = ["--resume", "sft", "--max-steps", "12", f"--{name}", value]
    assert message in refused(capsys, *words)


@pytest.mark.slow
def test_adapters_without_their_model_are_refused(beside: Path, capsys: Any) -> None:
    shutil.copytree("sft", "mine", symlinks=True)
    shutil.rmtree("mine/reference")
    shutil.copytree("sft/checkpoints/8", "alone")
    before = sorted(Path("mine").rglob("*"))
    assert "(it is not there). Put the whole run" in refused(
        capsys, "--resume", "mine", "--max-steps", "12"
    )
    assert sorted(Path("mine").rglob("*")) == before
    for path in ("mine", "alone"):
        with pytest.raises(InputError, match="holds adapters of the model in"):
            open_checkpoint(Path(path), on_damaged=pytest.fail)
        error = refused(capsys, path, "out.gguf", command=convert_command)
        assert "holds adapters of the model in" in error
        assert not Path("out.gguf").exists()
    weights = next(Path("sft/reference/state").rglob("d/*"))
    shutil.copytree("sft/reference", "mine/reference")
    (Path("mine/reference") / weights.relative_to("sft/reference")).write_bytes(b"cut")
    with pytest.raises(InputError, match="does not have its checksum"):
        open_checkpoint(Path("mine"), on_damaged=pytest.fail)


@pytest.mark.slow
def test_a_branch_takes_the_model_along(beside: Path) -> None:
    assert train.main(["--resume", "sft", "--max-steps", "10", "--out", "branch"]) == 0
    assert read_checkpoint(Path("branch/reference")).weights.keys()
    assert open_checkpoint(Path("branch"), on_damaged=pytest.fail).step == 10
    assert len(read_checkpoint(Path("branch/checkpoints/10")).weights) == 28


# What runs are used for -------------------------------------------------------------------------------


@pytest.mark.slow
def test_inspection_shows_the_step_of_adapters(beside: Path, capsys: Any) -> None:
    words = flags_of({**SHORT, **MODES["reward"], **LORA, "run.init_from": "talks"})
    assert inspect.main(words) == 0
    shown = capsys.readouterr().out
    assert "in adapters of rank 4, the score head" in shown
    step = shown.split("== One optimizer step")[1]
    assert "layers.1.mlp.down_proj.lora_B.kernel" in step
    assert "embed_tokens" not in step


@pytest.mark.slow
def test_a_dry_run_counts_moments_of_adapters_alone(
    beside: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "TIMING_SECONDS", 0.0)
    assert train.main([*flags_for("sft", "new"), "--dry-run"]) == 0
    assert "in adapters of rank 4" in capsys.readouterr().err
    assert not Path("new").exists()
    config = read_checkpoint(Path("sft/checkpoints/8")).config
    counted = 4 * (count_parameters(config.model)[0] + 3 * adapter_count("sft"))
    assert counted < dry_run.compile_step(config).state < counted + 100


def adapter_count(name: str) -> int:
    return sum(w.size for w in read_checkpoint(Path(name) / "checkpoints/8").weights.values())


@pytest.mark.slow
def test_exports_are_of_the_merged_model(beside: Path) -> None:
    ours = load("sft")
    tokens = np.arange(3, 23).reshape(2, 10)
    for name, to in (("a.pt", "torch"), ("b.safetensors", "safetensors"), ("c", "orbax")):
        assert convert_command(["sft", name, "--to", to]) == 0
        again = load(name)
        np.testing.assert_array_equal(again.logits(tokens), ours.logits(tokens))
        assert again.tokenizer.hash == ours.tokenizer.hash
    assert convert_command(["sft", "d.gguf"]) == 0


# PEFT ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exports(runs: Path) -> list[Path]:
    """Give adapters and the models that they adapt, as the note of a conversion says to get them."""
    found = []
    for name in ("sft", "reward"):
        target = runs / f"{name}_peft"
        assert convert_command([str(runs / name), str(target), "--to", "peft"]) == 0
        words = [str(runs / name / "reference"), f"{target}_base", "--to", "hf"]
        assert convert_command(words) == 0
        found += [target, target.with_name(f"{name}_peft_base")]
    return found


@pytest.fixture
def exported(beside: Path, exports: list[Path]) -> Path:
    for path in exports:
        (beside / path.name).symlink_to(path)
    return beside


def peft_model(name: str, kind: str, dtype: str) -> tuple[Any, Any]:
    import peft
    import torch
    import transformers

    auto = getattr(transformers, kind)
    base = auto.from_pretrained(f"{name}_peft_base", dtype=getattr(torch, dtype))
    with warnings.catch_warnings():
        # Some versions call transformers by a name that is going.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = peft.PeftModel.from_pretrained(base, f"{name}_peft", is_trainable=True)
    return adapted.eval(), peft


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_peft_loads_adapters_and_merges_them_to_our_logits(exported: Path) -> None:
    import torch

    model, _ = peft_model("sft", "AutoModelForCausalLM", "float32")
    tokens = np.random.default_rng(0).integers(3, 500, (2, 20))
    expected = load("sft").logits(tokens)
    with torch.no_grad():
        beside = model(torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(beside, expected, atol=1e-5)
        with model.disable_adapter():
            assert np.abs(model(torch.tensor(tokens)).logits.numpy() - expected).max() > 1e-3
        merged = model.merge_and_unload()(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(merged, expected, atol=1e-5)


@pytest.mark.slow
def test_peft_loads_the_trained_head_of_a_reward_model(exported: Path) -> None:
    import torch
    import transformers

    model, _ = peft_model("reward", "AutoModelForSequenceClassification", "float32")
    assert convert_command(["reward", "merged", "--to", "hf"]) == 0
    auto = transformers.AutoModelForSequenceClassification
    whole = auto.from_pretrained("merged", dtype=torch.float32).eval()
    tokens = torch.tensor(np.random.default_rng(0).integers(3, 500, (2, 20)))
    with torch.no_grad():
        actual, expected = (each(tokens).logits.numpy() for each in (model, whole))
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert np.abs(expected).max() > 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_gradients_are_those_of_peft_in_float64(exported: Path) -> None:
    import torch

    from convert.formats.peft import peft_name

    model, _ = peft_model("sft", "AutoModelForCausalLM", "float64")
    tokens = np.random.default_rng(0).integers(3, 500, (2, 20))
    model.double()(torch.tensor(tokens), labels=torch.tensor(tokens)).loss.backward()
    found = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    kept = read_checkpoint(Path("sft/checkpoints/8").resolve())
    frozen = read_checkpoint(Path("sft/reference").resolve()).weights
    config = dataclasses.replace(kept.config.model, compute_dtype="float64")
    with jax.enable_x64(True):
        structure, _ = adapted_structure(config, kept.config.lora)
        wide = {name: jnp.asarray(w, jnp.float64) for name, w in frozen.items()}
        adapters = {name: jnp.asarray(w, jnp.float64) for name, w in kept.weights.items()}

        def loss(adapters: Weights) -> Any:
            whole: Any = merge_weights(structure, {**wide, **adapters})
            logits = jax.nn.log_softmax(whole(jnp.asarray(tokens[:, :-1])))
            return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1))

        gradients = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(adapters))
    assert {peft_name(name) for name in gradients} == found.keys()
    for name, gradient in gradients.items():
        expected = found[peft_name(name)].T
        assert np.abs(expected).max() > 1e-6
        # transformers makes its rotary tables in float32.
        error = np.abs(gradient - expected).max() / np.abs(expected).max()
        assert error < 3e-6, f"{name} {error}"


@pytest.mark.slow
def test_what_has_no_adapters_is_not_written_for_peft(exported: Path, capsys: Any) -> None:
    for source in ("base", "sft_peft_base", "sft/reference"):
        error = refused(capsys, source, "new", "--to", "peft", command=convert_command)
        assert "holds no adapters" in error
        assert not Path("new").exists()
    error = refused(capsys, "sft_peft", "new.gguf", command=convert_command)
    assert "without the model that they adapt" in error
    words = ["sft", "new", "--to", "peft", "--dtype", "float16"]
    assert "--dtype float16: says nothing" in refused(capsys, *words, command=convert_command)


# Many devices ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_devices() -> dict[str, Any]:
    ended = run_python(
        str(Path(__file__).parent / "lora_program.py"), timeout=280, OMP_NUM_THREADS="1"
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["data 2 x fsdp 2 x tensor 2", "pmap"])
def test_several_devices_train_adapters_as_one_does(grid: str, on_devices: Any) -> None:
    actual, expected = on_devices[grid], on_devices["one"]
    assert actual["grid"] != expected["grid"]
    assert actual["frozen_alike"]
    np.testing.assert_allclose(actual["told"]["loss"], expected["told"]["loss"], atol=2e-6)
    for kind in ("adapters", "whole"):
        for name, array in expected[kind].items():
            np.testing.assert_allclose(actual[kind][name], array, atol=2e-5, err_msg=name)
    # Each device holds its part of an adapter, as it does of the matrix beside it.
    assert {*actual["parts"].values()} == ({0.5} if "fsdp" in grid else {1.0})


# New tokens --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_adapters_alone_are_not_let_loose_on_tokens_that_are_new(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared_folder: Path
) -> None:
    """A frozen row that begins as the mean of all has the mean logit, whatever adapters do."""
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    settings = {**SHORT, **MODES["sft"], **LORA, "run.init_from": str(trained_run)}
    with pytest.raises(InputError, match="knows no turns.*--lora.embeddings true"):
        train.main(flags_of({**settings, "run.out": "refused"}))
    assert not Path("refused").exists()
    settings |= {"lora.embeddings": "true", "run.out": "new"}
    assert train.main(flags_of(settings)) == 0
    frozen, merged = (
        open_checkpoint(Path(name), on_damaged=pytest.fail).weights
        for name in ("new/reference", "new")
    )
    moved = {name for name, weight in merged.items() if (weight != frozen[name]).any()}
    assert "embed_tokens.weight" in moved
    assert not {name for name in moved if name.endswith("norm.weight")}
    with pytest.raises(InputError, match="trained whole.*--to hf"):
        convert_command(["new", "adapters", "--to", "peft"])
