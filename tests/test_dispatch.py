"""Several steps at once, rows read on the device, and traces: the same run, handed over otherwise."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import SMALL_RUN

from tinyllm_jax import train
from tinyllm_jax.config import Config, load_config
from tinyllm_jax.data.batches import Batches
from tinyllm_jax.data.prepare import PreparedData, prepare
from tinyllm_jax.errors import InputError
from tinyllm_jax.objectives import device_rows
from tinyllm_jax.objectives.device_rows import corpus_arrays, lies_on_device, row_reader
from tinyllm_jax.objectives.pretrain import make_pretraining
from tinyllm_jax.training import loop, parallel
from tinyllm_jax.training.checkpoint import open_checkpoint
from tinyllm_jax.training.loop import dispatches
from tinyllm_jax.training.metrics import read_metrics
from tinyllm_torch import train as torch_train

OPTIMIZED = True

# Settings that this file shows to have an effect, for the test that every setting has one.
DISPATCH_SETTINGS = ("train.steps_per_dispatch", "train.corpus_on_device", "run.profile")
PACKINGS = ("stream", "padded", "packed")


def config_of(*flags: str) -> Config:
    preset, overrides, problems = train.read_command([*SMALL_RUN, *flags])
    return load_config(preset or "tiny", overrides, problems)


def prepared_of(config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch) -> PreparedData:
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(folder))
    return prepare(config, progress=False)


@pytest.fixture
def small(prepared_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give what trains a small run in a folder and tells its rows of metrics."""
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "write_report", lambda _, **__: None)

    def run(*flags: str, out: str, code: int = 0) -> list[dict[str, Any]]:
        assert train.main([*SMALL_RUN, *flags, "--out", out]) == code
        return read_metrics(Path(out) / "metrics.jsonl")

    return run


# Which steps go together ---------------------------------------------------------------------------


def sizes(*, first_step: int, steps: int, look: int, save: int, size: int) -> list[list[int]]:
    config = config_of(
        *("--max-steps", str(steps), "--train.eval_interval_steps", str(look)),
        *("--checkpoint.interval_steps", str(save), "--train.steps_per_dispatch", str(size)),
    )
    return [[*each] for each in dispatches(config, first_step=first_step)]


def test_steps_go_together_up_to_the_next_look_save_or_end():
    assert sizes(first_step=0, steps=11, look=6, save=100, size=4) == [
        [1, 2, 3, 4], [5], [6], [7], [8], [9], [10], [11],
    ]  # fmt: skip
    assert sizes(first_step=0, steps=12, look=8, save=12, size=4) == [
        [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12],
    ]  # fmt: skip
    assert sizes(first_step=2, steps=4, look=9, save=9, size=1) == [[3], [4]]


@pytest.mark.parametrize("look", [3, 7, 8])
@pytest.mark.parametrize("save", [5, 8])
def test_a_resumed_run_hands_over_the_same_steps_together(look, save):
    whole = sizes(first_step=0, steps=40, look=look, save=save, size=4)
    assert [step for together in whole for step in together] == [*range(1, 41)]
    for place, together in enumerate(whole):
        rest = sizes(first_step=together[-1], steps=40, look=look, save=save, size=4)
        assert rest == whole[place + 1 :]


@pytest.mark.slow
def test_several_steps_at_once_are_the_same_run(small):
    flags = ["--max-steps", "10", "--train.eval_interval_steps", "8"]
    alone = small(*flags, out="alone")
    together = small(*flags, "--train.steps_per_dispatch", "4", out="together")
    for kind in ("train", "eval"):
        one, other = ([row for row in rows if row["kind"] == kind] for rows in (alone, together))
        assert [row["step"] for row in one] == [row["step"] for row in other]
        for key in ("loss", "grad_norm", "learning_rate", "targets"):
            if key in one[0]:
                np.testing.assert_allclose(
                    [row[key] for row in other], [row[key] for row in one], rtol=2e-5, err_msg=key
                )


@pytest.mark.slow
def test_steps_at_once_are_handed_over_at_once_and_resume_bitwise(small, monkeypatch):
    handed: list[int] = []
    place = parallel.OneDevice.place_steps

    def counted(self: Any, batches: Any, *, passes: int) -> Any:
        handed.append(len(batches))
        return place(self, batches, passes=passes)

    monkeypatch.setattr(parallel.OneDevice, "place_steps", counted)
    flags = ["--train.steps_per_dispatch", "3", "--train.eval_interval_steps", "6"]
    flags += ["--checkpoint.interval_steps", "6", "--seed", "7"]
    small(*flags, "--max-steps", "12", "--optimizer.decay_steps", "12", out="whole")
    assert handed == [3, 3, 3, 3]
    small(*flags, "--max-steps", "6", "--optimizer.decay_steps", "12", out="half")
    assert train.main(["--resume", "half", "--max-steps", "12"]) == 0
    whole, half = (
        open_checkpoint(Path(name), on_damaged=pytest.fail) for name in ("whole", "half")
    )
    assert whole.step == half.step == 12
    for name, weight in whole.weights.items():
        np.testing.assert_array_equal(weight, half.weights[name], err_msg=name)
    rows = [read_metrics(Path(name) / "metrics.jsonl") for name in ("whole", "half")]
    losses = [[row["loss"] for row in each if row["kind"] == "train"] for each in rows]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12


def test_a_bad_batch_is_kept_also_when_it_was_one_of_several(small):
    flags = ["--optimizer.learning_rate", "1e38", "--optimizer.warmup_steps", "0"]
    flags += ["--max-steps", "12", "--train.max_nonfinite_steps", "3"]
    rows = small(*flags, "--train.steps_per_dispatch", "4", out="bad", code=1)
    bad = [row for row in rows if row["kind"] == "nonfinite"]
    assert [row["step"] for row in bad] == [*range(bad[0]["step"], bad[0]["step"] + len(bad))]
    assert len(bad) >= 3
    for row in bad:
        assert np.load(Path("bad/nonfinite") / row["file"])["tokens"].shape == (4, 64)


# Rows read on the device ---------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_the_device_reads_the_rows_that_the_host_does(packing, shape, prepared_folder, monkeypatch):
    config = config_of("--data.packing", packing, "--data.sequence_length", "48")
    split = prepared_of(config, prepared_folder, monkeypatch).train
    # The same documents in several shards, which no window crosses.
    cut = len(split.shards[0].tokens) // 3
    shards = [
        dataclasses.replace(
            shard,
            **{
                name: array[part]
                for name, array in vars(shard).items()
                if isinstance(array, np.ndarray)
            },
        )
        for shard in split.shards
        for part in (slice(0, cut), slice(cut, None))
    ]
    split = dataclasses.replace(split, shards=tuple(shards))
    assert len(split.shards) > 1
    batches = Batches(split, rows_per_step=4, seed=5)
    corpus = jax.tree.map(jax.numpy.asarray, corpus_arrays(split))
    read = jax.jit(row_reader(split))
    for step in range(6):
        places = batches.places(step).astype(np.int32).reshape(shape)
        found = read(corpus, {"places": jax.numpy.asarray(places)})
        wanted = {k: v for k, v in vars(batches.batch(step)).items() if v is not None}
        assert found.keys() == wanted.keys()
        for name, rows in wanted.items():
            assert found[name].dtype == rows.dtype, name
            np.testing.assert_array_equal(np.asarray(found[name]).reshape(rows.shape), rows, name)


@pytest.mark.slow
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_run_is_the_same_whoever_reads_its_rows(packing, small, monkeypatch):
    placed: list[set[str]] = []
    place = parallel.OneDevice.place_steps

    def watched(self: Any, batches: Any, *, passes: int) -> Any:
        placed.append({*batches[0]})
        return place(self, batches, passes=passes)

    monkeypatch.setattr(parallel.OneDevice, "place_steps", watched)
    flags = ["--max-steps", "4", "--data.packing", packing]
    flags += ["--train.batch_size", "2", "--train.gradient_accumulation_steps", "2"]
    host = small(*flags, out="host")
    assert all("tokens" in names for names in placed)
    placed.clear()
    device = small(*flags, "--train.corpus_on_device", "always", out="device")
    assert placed
    assert all(names == {"places"} for names in placed)
    one, other = ([row for row in rows if row["kind"] == "train"] for rows in (host, device))
    assert [row["targets"] for row in one] == [row["targets"] for row in other]
    np.testing.assert_allclose(
        [row["loss"] for row in one], [row["loss"] for row in other], rtol=2e-5
    )


class Memory:
    platform = "gpu"

    def __init__(self, limit: int):
        self.limit = limit

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": self.limit}


def test_by_itself_a_corpus_lies_on_the_device_where_it_fits(prepared_folder, monkeypatch):
    config = config_of()
    split = prepared_of(config, prepared_folder, monkeypatch).train
    assert not lies_on_device(config, split), "a CPU has nothing to gain"
    size = sum(array.nbytes for array in corpus_arrays(split).values())
    for limit, fits in ((8 * size, True), (8 * size - 8, False)):
        monkeypatch.setattr(device_rows.jax, "local_devices", lambda limit=limit: [Memory(limit)])
        assert lies_on_device(config, split) is fits
    never = config_of("--train.corpus_on_device", "never")
    assert not lies_on_device(never, split)
    assert make_pretraining(never, prepared_of(never, prepared_folder, monkeypatch)).corpus is None


def test_a_corpus_that_cannot_lie_on_the_device_is_refused_by_name(prepared_folder, monkeypatch):
    config = config_of("--train.corpus_on_device", "always", "--parallel.strategy", "pmap")
    split = prepared_of(config, prepared_folder, monkeypatch).train
    with pytest.raises(
        InputError, match=r"corpus_on_device=always: parallel.strategy=pmap .* auto"
    ):
        lies_on_device(config, split)


# Traces --------------------------------------------------------------------------------------------


def test_a_trace_is_written_for_as_many_steps_as_asked(small, capsys):
    small("--max-steps", "6", "--profile", "2", out="traced")
    [trace] = Path("traced/profile").rglob("perfetto_trace.json.gz")
    assert trace.stat().st_size > 1000
    assert [*Path("traced/profile").rglob("*.xplane.pb")]
    assert "trace of steps: traced/profile" in capsys.readouterr().err
    assert (
        json.loads(Path("traced/training_config_snapshot.json").read_text())["run"]["profile"] == 2
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--profile", "2"],
        ["--train.steps_per_dispatch", "2"],
        ["--train.corpus_on_device", "always"],
    ],
)
def test_the_twin_refuses_what_only_a_compiler_can_do(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"{flags[0][2:].split('.')[-1]}.*twin"):
        torch_train.main([*SMALL_RUN, *flags])
