"""Several devices: the same numbers as one, each device with its part, and what does not divide.

What needs eight devices runs once, in `sharding_program.py`, whose JSON the slow tests look at.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ROOT, SMALL_RUN, run_python

from tinyllm_jax import train
from tinyllm_jax.config import Config, LoraConfig, ParallelConfig, load_config, preset_names
from tinyllm_jax.errors import InputError
from tinyllm_jax.model.lora import trained_names
from tinyllm_jax.model.weights import model_structure
from tinyllm_jax.training.devices import PEAK_TFLOPS, peak_flops
from tinyllm_jax.training.parallel import OneDevice, grid_sizes, make_parallel
from tinyllm_jax.training.sharding import SPECS, weight_spec
from tinyllm_torch import train as torch_train

TOLERANCE = 1e-5
# Each setting of its section, another value, and what the run of eight devices says then.
PARALLEL_CHANGES = {
    "strategy": ("pmap", "pmap over 8 devices"),
    "data": (4, "mesh data 4, 4 of 8 devices"),
    "fsdp": (2, "mesh data 4 x fsdp 2"),
    "tensor": (2, "mesh data 4 x tensor 2"),
    "expert": (2, "mesh data 4 x expert 2"),
}
SHAPE = ["--model.num_attention_heads", "4", "--model.num_key_value_heads", "2"]


def config_of(*flags: str) -> Config:
    preset, overrides, problems = train.read_command([*SMALL_RUN, *SHAPE, *flags])
    return load_config(preset or "tiny", overrides, problems)


def sizes_of(*flags: str, devices: int) -> dict[str, int]:
    """Give the axes of the grid that are longer than 1."""
    sizes = grid_sizes(config_of(*flags), devices=devices)
    return {axis: size for axis, size in sizes.items() if size > 1}


# The table of weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("experts", [False, True])
def test_every_weight_of_every_preset_has_a_row_that_fits_its_shape(preset, experts):
    changes: dict[str, Any] = {
        "model.qk_norm": True,
        "model.tie_word_embeddings": False,
        "model.num_experts": 4 if experts else 0,
        "model.num_shared_experts": 1 if experts else 0,
    }
    _, shapes = model_structure(load_config(preset, changes).model)
    assert ("layers.0.mlp.shared_experts.up_proj.kernel" in shapes) == experts
    for name, shape in shapes.items():
        divided = [axis for axis in weight_spec(name) if axis]
        assert len(weight_spec(name)) in (0, len(shape.shape)), name
        assert len(divided) == len(set(divided))
        is_small = len(shape.shape) == 1 or name.endswith("mlp.gate.kernel")
        assert (divided == []) == is_small, f"{name} is divided along {divided}"


def test_no_row_of_the_table_is_without_a_weight():
    names = set()
    for experts in (0, 4):
        changes = {"model.num_experts": experts, "model.num_shared_experts": experts}
        model = load_config("tiny", changes | {"model.tie_word_embeddings": False}).model
        names |= set(model_structure(model)[1])
    names |= set(trained_names(load_config("tiny").model, LoraConfig(rank=2)))
    specs = [weight_spec(name) for name in names]
    assert all(spec in specs for spec in SPECS.values())


@pytest.mark.parametrize("name", ["layers.0.mlp.new_proj.kernel", "bias", "my_embed_tokens.weight"])
def test_a_weight_without_a_row_is_an_error_that_names_it(name):
    with pytest.raises(LookupError, match=rf"^{name}: no row"):
        weight_spec(name)


# Sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "devices", "expected"),
    [
        ("", 1, {}),
        ("", 4, {"data": 4}),
        ("--train.batch_size 6", 4, {"data": 3}),
        ("--train.batch_size 7", 4, {}),
        ("--parallel.data 2", 8, {"data": 2}),
        ("--parallel.tensor 2", 4, {"data": 2, "tensor": 2}),
        ("--parallel.fsdp 2", 8, {"data": 2, "fsdp": 2}),
        ("--parallel.data 1 --parallel.fsdp -1", 4, {"fsdp": 4}),
        ("--parallel.data 1 --parallel.tensor -1", 2, {"tensor": 2}),
        ("--model.num_experts 4 --parallel.expert 4", 8, {"expert": 4}),
    ],
)
def test_data_takes_the_devices_that_are_left_and_can_divide_the_rows(flags, devices, expected):
    assert sizes_of(*flags.split(), devices=devices) == expected


REFUSED = {
    "--parallel.data 8": "parallel.data x fsdp x expert = 8 does not divide train.batch_size=4 (rows "
    "of a pass). Use --batch-size 8, or sizes with a product of [1, 2, 4].",
    "--parallel.data 16 --train.batch_size 16": "parallel: data 16 x fsdp 1 x expert 1 x tensor 1 = "
    "16 do not fit the 8 devices that are here. Use sizes with a product of [1, 2, 4, 8].",
    "--parallel.fsdp 3 --train.batch_size 6 --model.hidden_size 48 --model.head_dim 8": "parallel: "
    "fsdp 3 x expert 1 x tensor 1 = 3 do not divide the 8 devices that are here. Use sizes with a "
    "product of [1, 2, 4, 8].",
    "--parallel.data 0": "parallel.data=0 leaves no device. Use 1, or -1 for all that are left.",
    "--parallel.fsdp -1": "parallel.data=-1, parallel.fsdp=-1: only one size can be all that are "
    "left. Add --parallel.data 1, or other numbers.",
    "--parallel.tensor 4": "parallel.tensor=4 does not divide model.num_key_value_heads=2. Use one of "
    "[1, 2].",
    "--parallel.data 1 --parallel.tensor -1": "parallel.tensor=8 does not divide "
    "model.num_attention_heads=4. Use one of [1, 2].",
    "--parallel.tensor 2 --model.intermediate_size 63": "parallel.tensor=2 does not divide "
    "model.intermediate_size=63. Use one of [1].",
    "--parallel.tensor 2 --model.vocab_size 511": "parallel.tensor=2 does not divide "
    "model.vocab_size=511. Use one of [1].",
    "--parallel.fsdp 4 --model.hidden_size 30 --model.head_dim 8": "parallel.fsdp=4 does not divide "
    "model.hidden_size=30. Use one of [1, 2, 3, 5, 6, 10, 15, 30].",
    "--parallel.expert 2": "parallel.expert=2 does not divide model.num_experts=0. Use one of [1].",
    "--parallel.expert 4 --model.num_experts 6": "parallel.expert=4 does not divide "
    "model.num_experts=6. Use one of [1, 2, 3, 6].",
    "--parallel.strategy pmap --parallel.fsdp 2": "parallel.strategy=pmap only divides rows, and "
    "parallel.fsdp=2. Use --parallel.strategy mesh, or --parallel.fsdp 1.",
    "--parallel.strategy pmap --model.num_experts 4": "parallel.strategy=pmap trains no experts, and "
    "model.num_experts=4: their load must be known over all rows. Use --parallel.strategy mesh.",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_does_not_divide_is_refused_with_the_numbers_that_would(flags):
    with pytest.raises(InputError) as refused:
        grid_sizes(config_of(*flags.split()), devices=8)
    assert str(refused.value) == REFUSED[flags]


def test_too_many_devices_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(tmp_path / "data"))
    with pytest.raises(InputError, match="do not fit the 1 devices"):
        train.main([*SMALL_RUN, "--parallel.data", "2"])
    assert [path.name for path in tmp_path.rglob("*") if path.suffix != ".lock"] in (
        [],
        ["checkpoints"],
    )


def test_on_one_device_nothing_is_divided():
    parallel = make_parallel(config_of())
    assert isinstance(parallel, OneDevice)
    assert parallel.description == ""
    batch = {"tokens": np.zeros((4, 8), np.int32)}
    placed = parallel.place_steps([batch], passes=2)
    assert placed["tokens"].shape == (1, 4, 8)
    assert np.shares_memory(placed["tokens"], batch["tokens"])


def test_the_twin_refuses_to_be_divided(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="parallel: the twin trains on one device. Add --parallel"):
        torch_train.main([*SMALL_RUN, "--parallel.data", "2"])


def test_the_peak_is_that_of_all_devices_where_it_is_known(monkeypatch):
    class Device:
        device_kind = "NVIDIA A100-SXM4-80GB"

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert peak_flops(devices=4) == 4 * PEAK_TFLOPS["a100"] * 1e12


# Eight devices -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, prepared_folder: Path) -> dict[str, Any]:
    """Run everything on eight devices of the CPU, and give what was found."""
    folder = tmp_path_factory.mktemp("sharding")
    done = run_python(
        str(ROOT / "tests" / "sharding_program.py"),
        str(folder / "runs"),
        folder=folder,
        timeout=1200,
        TINYLLM_DATA_DIR=str(prepared_folder),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Involuntary" not in done.stderr, (
        "the compiler has moved whole arrays for want of a plan"
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_every_setting_has_a_case():
    fields = {field.name for field in dataclasses.fields(ParallelConfig)}
    assert set(PARALLEL_CHANGES) == fields


@pytest.mark.slow
def test_every_setting_changes_the_grid(found):
    assert found["described"] == {name: said for name, (_, said) in PARALLEL_CHANGES.items()}


@pytest.mark.slow
def test_fifty_steps_have_the_losses_of_one_device_on_every_grid(found):
    for name, run in found["trained"].items():
        alone = found["trained"][f"{name.split(',')[0]}, one"]
        assert run["step"] == list(range(1, 51))
        assert run["targets"] == alone["targets"], name
        assert run["loss"][-1] < 0.9 * run["loss"][0]
        np.testing.assert_allclose(run["loss"], alone["loss"], rtol=TOLERANCE, err_msg=name)
        np.testing.assert_allclose(run["evaluation"], alone["evaluation"], rtol=TOLERANCE)
        assert run["sample"].startswith("Once upon a time")


@pytest.mark.slow
def test_a_run_goes_on_on_another_grid_with_the_same_rows_and_losses(found):
    unbroken = found["trained"]["dense, fsdp 8"]
    assert len(found["resumed"]) == 2
    for name, run in found["resumed"].items():
        assert run["step"] == unbroken["step"]
        assert run["targets"] == unbroken["targets"], name
        assert run["loss"][:25] == unbroken["loss"][:25]
        np.testing.assert_allclose(run["loss"], unbroken["loss"], rtol=TOLERANCE, err_msg=name)


@pytest.mark.slow
def test_a_checkpoint_comes_back_bitwise_on_another_grid(found):
    assert len(found["restored"]) == 3
    assert set(found["restored"].values()) == {0.0}


@pytest.mark.slow
def test_each_device_holds_its_part_of_weights_and_moments_and_nothing_else(found):
    axes = {
        "dense": {"fsdp": 2, "tensor": 2, "expert": 1},
        "experts": {"fsdp": 2, "tensor": 1, "expert": 2},
    }
    for kind, parts in found["parts"].items():
        for name, (whole, part) in parts["shapes"].items():
            spec = [*weight_spec(name), *[None] * len(whole)][: len(whole)]
            expected = [
                size // axes[kind].get(axis, 1) for size, axis in zip(whole, spec, strict=True)
            ]
            assert part == expected, name
        assert parts["initial"] == 0.0, "the first weights depend on the grid"
    assert found["parts"]["dense"]["state_bytes"] < 0.26 * found["parts"]["dense"]["whole_bytes"]


@pytest.mark.slow
def test_weights_travel_along_fsdp_and_activations_do_not(found):
    moved = found["collectives"]
    assert set(moved) <= {"all-gather", "all-reduce", "reduce-scatter"}
    weights = {(512, 32), (32, 16), (32, 32), (32, 64), (64, 32)}
    assert {tuple(shape) for shape in moved["all-gather"]} == weights
    # Seven matrices in each of two blocks, once forward and once backward, and the embedding once.
    assert len(moved["all-gather"]) == 2 * 2 * 7 + 1


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing_on_any_device(found):
    assert found["nonfinite"] == [[True, 1, 1]] * 2


@pytest.mark.slow
def test_sizes_that_do_not_divide_are_refused_before_anything_is_written(found):
    for message in found["refused"]:
        assert " Use --batch-size " in message


@pytest.mark.slow
def test_a_checkpoint_of_a_grid_is_converted_and_begun_from_like_any_other(found):
    assert found["converted"]
    assert found["initialised"] == 0
