"""Looks at layers, warnings, and runs that go back by themselves and leave batches out."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, SMALL_RUN, flags_for_devices
from test_resume import assert_same_run, reproducible

from tinyllm_jax import train
from tinyllm_jax.config import Config, load_config
from tinyllm_jax.data.batches import Batches
from tinyllm_jax.data.files import sha256_of_file
from tinyllm_jax.data.prepare import PreparedData
from tinyllm_jax.data.tokenizer import Tokenizer
from tinyllm_jax.errors import InputError
from tinyllm_jax.model import transformer
from tinyllm_jax.model.attention import segment_mask
from tinyllm_jax.model.rope import rope_tables
from tinyllm_jax.model.weights import initial_weights, merge_weights, model_structure
from tinyllm_jax.objectives.pretrain import count_targets, next_token_loss
from tinyllm_jax.training import loop, start
from tinyllm_jax.training.checkpoint import read_checkpoint
from tinyllm_jax.training.layer_look import describe_activations, make_layer_look, part_of
from tinyllm_jax.training.metrics import MetricsFile, read_metrics
from tinyllm_jax.training.monitor import Monitor, Trouble, robust_z
from tinyllm_jax.training.progress import Progress, Silent
from tinyllm_jax.training.rewind import Course, go_back, keep_left_out, rows_leading_to
from tinyllm_jax.training.step import NOTHING_FIXED, make_train_step, new_state
from tinyllm_jax.training.step_log import StepLog
from tinyllm_torch import train as torch_train
from tinyllm_torch.training import loop as torch_loop
from tinyllm_torch.training import start as torch_start
from tinyllm_torch.training.checkpoint import read_checkpoint as torch_read_checkpoint

# Settings that this file shows to have an effect, for the test that every setting has one.
MONITOR_SETTINGS = (
    *("monitor.interval_steps", "monitor.spike_z", "monitor.spike_window", "monitor.rewinds"),
    *("monitor.rewind_batches", "monitor.skip_batches"),
)
TRAINERS = {"jax": train, "torch": torch_train}


def config_of(*flags: str) -> Config:
    preset, overrides, problems = train.read_command([*SMALL_RUN, *flags])
    return load_config(preset or "tiny", overrides, problems)


# Losses that jump ----------------------------------------------------------------------------------


def test_a_robust_z_is_that_of_median_and_absolute_deviation():
    usual, z = robust_z(5.0, [1.0, 2.0, 3.0, 100.0])
    assert usual == 2.5
    assert z == pytest.approx((5.0 - 2.5) / (1.4826 * 1.0))
    assert robust_z(2.02, [2.0] * 9)[1] == pytest.approx(1.0)  # a hundredth is not a jump


def judged(losses: list[float], *flags: str) -> tuple[list[dict], list[str], Monitor]:
    said: list[str] = []
    config = config_of("--monitor.spike_window", "10", *flags)
    monitor = Monitor(config, past=[], note=said.append)
    rows = [
        warning
        for step, loss in enumerate(losses, start=1)
        for warning in monitor.judge({"kind": "train", "step": step, "loss": loss}, streak=0)
    ]
    return rows, said, monitor


FALLING = [*np.linspace(6.0, 3.0, 60)]


def test_a_spike_is_told_with_what_to_try_and_once_while_it_lasts():
    rows, said, _ = judged([*FALLING, 9.1, 9.0, *FALLING[-9:], 9.0])
    assert [row["step"] for row in rows] == [61, 62, 72]
    assert [line.split(":")[0] for line in said] == ["step 61", "step 72"]
    assert "loss spike 9.1 where 3.229 is usual (robust z 31)" in said[0]
    assert "lower --learning-rate" in said[0]
    assert "--monitor.rewinds 2" in said[0]
    assert rows[0]["name"] == "loss_spike"


def test_a_loss_that_falls_or_is_new_to_the_run_or_is_no_number_is_no_spike():
    assert not judged([9.0, 5.0, 1.0, *FALLING, float("nan"), 2.0])[0]
    assert not judged([*FALLING, 9.0], "--monitor.spike_z", "0")[0]
    assert not judged([*FALLING, 9.0], "--monitor.spike_z", "100")[0]


@pytest.mark.parametrize(("window", "first"), [("10", 6), ("30", 16), ("100", 21), ("1000", 21)])
def test_spikes_are_seen_from_half_a_window_or_twenty_losses_on(window: str, first: int):
    for before in range(1, 30):
        found, _, _ = judged([1.0] * before + [9.0], "--monitor.spike_window", window)
        assert bool(found) == (before + 1 >= first), before


def test_a_loss_that_is_no_number_is_seen_from_the_first_step_on(tmp_path, capfd):
    config = config_of("--monitor.rewinds", "1", "--train.max_nonfinite_steps", "1")
    with (
        Progress(first_step=0, max_steps=9) as progress,
        MetricsFile(tmp_path / "metrics.jsonl", resume_step=0) as metrics,
    ):
        monitor = Monitor(config, past=[], note=progress.note)
        log = StepLog(
            tmp_path,
            config=config,
            train_batch=lambda number: {"tokens": np.full(3, number)},
            describe_step=lambda _: {},
            course=Course(config, past=[]),
            monitor=monitor,
            devices=1,
            metrics=metrics,
            progress=progress,
        )
        told = {"loss": float("nan"), "learning_rate": 0.1, "nonfinite_streak": 1}
        told = {name: jnp.asarray([value]) for name, value in told.items()}
        log.add(range(1, 2), told, waited_seconds=0.0)
        log.write(leave=0)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["kind"], row["step"]) for row in rows[:2]] == [("train", 1), ("nonfinite", 1)]
    assert "step 1: loss or gradient not finite" in capfd.readouterr().err
    assert (monitor.trouble.first, monitor.trouble.last) == (1, 1)


def test_a_level_that_stays_is_new_only_at_first():
    rows, _, _ = judged([*FALLING, *[9.0 + 0.001 * n for n in range(40)]])
    assert 4 <= len(rows) <= 6


def test_what_is_thought_of_a_row_depends_on_the_rows_before_alone():
    losses = [*FALLING, 9.1, 3.1, 9.0]
    whole, _, _ = judged(losses)
    rows = [{"kind": "train", "step": n, "loss": loss} for n, loss in enumerate(losses, start=1)]
    later = Monitor(config_of("--monitor.spike_window", "10"), past=rows[:61], note=lambda _: None)
    found = [each for row in rows[61:] for each in later.judge(row, streak=0)]
    assert found == whole[1:]


def test_trouble_is_only_where_a_run_may_go_back_and_the_first_counts():
    assert judged([*FALLING, 9.0])[2].trouble is None
    trouble = judged([*FALLING, 9.0, 9.5], "--monitor.rewinds", "1")[2].trouble
    assert (trouble.first, trouble.last) == (61, 61)
    config = config_of("--monitor.rewinds", "1", "--train.max_nonfinite_steps", "3")
    monitor = Monitor(config, past=[], note=lambda _: None)
    for step, streak in enumerate([0, 1, 2, 3, 4]):
        monitor.judge({"kind": "train", "step": step, "loss": float("nan")}, streak=streak)
    assert (monitor.trouble.first, monitor.trouble.last) == (1, 3)


# Numbers of layers ---------------------------------------------------------------------------------

USUAL = {
    "kind": "monitor",
    "step": 5,
    "gradient_norm": {"embed_tokens": 0.0, "layers.0": 1.0},
    "update_ratio": {"layers.0": 0.01},
    "activation_rms": {"layers.0": 1.0},
    "attention_logit_max": {"layers.0": 3.0},
}


@pytest.mark.parametrize(
    ("changed", "name", "text"),
    [
        ({}, None, ""),
        ({"attention_logit_max": {"layers.0": 3.0, "layers.1": 150.0}}, "large_logits", "layers.1 reach 150"),
        ({"activation_rms": {"layers.0": float("nan")}}, "large_activations", "layers.0"),
        ({"update_ratio": {"norm": 0.5, "layers.0": 0.4}}, "large_updates", "norm changes by 0.5"),
        ({"gradient_norm": {"layers.0": 0.0}}, "no_gradient", "no gradient reaches layers.0"),
    ],
)  # fmt: skip
def test_a_layer_whose_numbers_are_unusual_is_named_once_while_it_lasts(changed, name, text):
    said: list[str] = []
    monitor = Monitor(config_of(), past=[], note=said.append)
    for _ in range(2):
        found = monitor.judge_layers(USUAL | changed)
        assert [row["name"] for row in found] == ([name] if name else [])
    assert len(said) == bool(name)
    if name:
        assert text in said[0]
        assert "Try" in said[0]
    monitor.judge_layers(USUAL)
    monitor.judge_layers(USUAL | changed)
    assert len(said) == 2 * bool(name)


def random_batch(config: Config, *, rows: int) -> dict[str, Any]:
    numbers = np.random.default_rng(1)
    tokens = numbers.integers(0, config.model.vocab_size, (rows, 65), dtype=np.int32)
    mask = np.arange(64) < numbers.integers(20, 64, (rows, 1))
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": mask}


@pytest.mark.parametrize(
    "flags", [[], pytest.param(["--model.scan_layers", "true"], marks=pytest.mark.slow)]
)
def test_a_look_tells_what_the_step_then_does(flags):
    config = config_of(
        *flags, "--train.gradient_accumulation_steps", "2", "--train.batch_size", "2"
    )
    batch = random_batch(config, rows=4)
    state = new_state(config, initial_weights(config.model, seed=3))
    structure, _ = model_structure(config.model)
    look = make_layer_look(config, next_token_loss, count_targets, None)
    stacked = {name: np.stack([rows, rows[::-1]]) for name, rows in batch.items()}
    told = jax.device_get(jax.jit(look)((state, NOTHING_FIXED), stacked))
    step = jax.jit(make_train_step(config, structure, next_token_loss, count_targets))
    after, numbers = step(state, batch)

    def norm(arrays: dict[str, Any], part: str) -> float:
        own = [
            np.asarray(a, np.float64).ravel() for name, a in arrays.items() if part_of(name) == part
        ]
        return float(np.linalg.norm(np.concatenate(own)))

    parts = ["embed_tokens", "layers.0", "layers.1", "norm"]
    assert sorted(told["weight_norm"]) == parts
    changes = {name: after.weights[name] - state.weights[name] for name in state.weights}
    for part in parts:
        size = norm(state.weights, part)
        assert told["weight_norm"][part] == pytest.approx(size, rel=1e-5)
        assert told["update_ratio"][part] == pytest.approx(norm(changes, part) / size, rel=1e-4)
    squares = sum(float(each) ** 2 for each in told["gradient_norm"].values())
    assert squares**0.5 == pytest.approx(float(numbers["grad_norm"]), rel=1e-5)


def test_activations_are_those_of_the_forward_pass(monkeypatch):
    """Against the blocks one after another, and the very queries and keys that attention gets."""
    config = config_of("--model.qk_norm", "true").model
    batch = random_batch(config_of(), rows=3)
    batch["segment_ids"] = np.sort(np.random.default_rng(2).integers(1, 4, (3, 64)), axis=1)
    batch = jax.tree.map(jax.numpy.asarray, batch)
    structure, _ = model_structure(config)
    model = merge_weights(structure, initial_weights(config, seed=0))
    told = jax.device_get(describe_activations(model, batch))
    logits: list[float] = []
    attend = transformer.attention

    def watched(query: Any, key: Any, value: Any, *, mask: Any, **options: Any) -> Any:
        key_of_head = np.repeat(np.asarray(key), query.shape[2] // key.shape[2], axis=2)
        scores = np.einsum("bqhd,bkhd->bhqk", np.asarray(query), key_of_head)
        scores = scores[np.broadcast_to(np.asarray(mask)[:, None], scores.shape)]
        logits.append(float(scores.max()) * config.head_dim**-0.5)
        return attend(query, key, value, mask=mask, **options)

    monkeypatch.setattr(transformer, "attention", watched)
    places = jax.numpy.broadcast_to(jax.numpy.arange(64)[None], (3, 64))
    rope = rope_tables(places, config, dtype=np.dtype("float32"))
    mask, counted = segment_mask(batch["segment_ids"]), batch["loss_mask"]
    x, sizes = model.embed_tokens(batch["tokens"], dtype=np.dtype("float32")), []
    for layer in model.layers:
        x, _, _ = layer(
            x, rope, mask, cache=None, positions=places, counted=counted, dropout_key=None
        )
        sizes.append(float(np.sqrt(np.mean(np.asarray(x, np.float64) ** 2))))
    np.testing.assert_allclose([*told["attention_logit_max"].values()], logits, rtol=1e-5)
    np.testing.assert_allclose([*told["activation_rms"].values()], sizes, rtol=1e-5)


def rows_of(run: str, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(Path(run) / "metrics.jsonl") if row["kind"] == kind]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--train.steps_per_dispatch", "3"]])
def test_a_run_that_is_looked_at_computes_the_same_numbers(
    flags, tmp_path, prepared_folder, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
    monkeypatch.setattr(loop, "write_report", lambda *_, **__: None)
    flags = [*SMALL_RUN, *flags, "--max-steps", "7"]
    assert train.main([*flags, "--out", "plain"]) == 0
    assert train.main([*flags, "--monitor.interval_steps", "3", "--out", "looked_at"]) == 0
    assert rows_of("looked_at", "train") == rows_of("plain", "train")
    assert not rows_of("plain", "monitor")
    looks = rows_of("looked_at", "monitor")
    assert [row["step"] for row in looks] == ([1, 4] if "3" in flags[-4:] else [3, 6])
    for row in looks:
        [step] = [each for each in rows_of("plain", "train") if each["step"] == row["step"]]
        norm = sum(each**2 for each in row["gradient_norm"].values()) ** 0.5
        assert norm == pytest.approx(step["grad_norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--parallel.fsdp", "2"], ["--parallel.strategy", "pmap"]])
def test_devices_together_find_what_one_finds(flags, command, tmp_path):
    looks = {}
    for devices, more in (("1", []), ("4", flags)):
        command.options["env"]["XLA_FLAGS"] = flags_for_devices(devices)
        words = [*SMALL_RUN, *more, "--max-steps", "2", "--monitor.interval_steps", "2"]
        done = command.run("train", *words, "--out", devices)
        assert done.returncode == 0, done.stderr
        [looks[devices]] = rows_of(str(tmp_path / devices), "monitor")
    for name, parts in looks["1"].items():
        if isinstance(parts, dict):
            assert looks["4"][name] == pytest.approx(parts, rel=1e-3), name


# Batches that are left out -------------------------------------------------------------------------


@pytest.mark.parametrize("spans", [[], ["0"], ["3-5"], ["7", "0-1", "2-2"], ["5-9", "8-11", "20"]])
def test_numbers_close_up_over_those_that_are_left_out(spans):
    out = {
        number
        for span in spans
        for number in range(int(span.split("-")[0]), int(span.split("-")[-1]) + 1)
    }
    course = Course(config_of("--monitor.skip_batches", *spans) if spans else config_of(), past=[])
    expected = [number for number in range(40) if number not in out][:20]
    assert [course.batch(step) for step in range(1, 21)] == expected


def test_what_is_left_out_later_changes_no_earlier_step():
    course = Course(config_of("--monitor.skip_batches", "3"), past=[])
    before = [course.batch(step) for step in range(1, 8)]
    assert course.leave_out(8, 10) == "8-10"
    assert [course.batch(step) for step in range(1, 9)] == [*before, 11]
    kept = course.write_into(config_of()).monitor.skip_batches
    assert kept == ("3", "8-10")
    rows = [{"kind": "rewind", "step": 7, "batches": "8-10"}]
    for named, past in ((kept, []), (kept, rows), (("3",), rows)):
        again = Course(config_of("--monitor.skip_batches", *named), past=past)
        assert [again.batch(step) for step in range(1, 9)] == [*before, 11]


def test_a_resumed_run_leaves_out_only_batches_that_are_still_to_come():
    def resumed(*spans: str, earlier: tuple[str, ...] = ()) -> tuple[str, ...]:
        before = config_of("--monitor.skip_batches", *earlier) if earlier else config_of()
        config = config_of("--monitor.skip_batches", *spans)
        return keep_left_out(config, before, step=40).monitor.skip_batches

    assert resumed("40-50") == ("40-50",)
    assert resumed("11", "43", earlier=("10-12",)) == ("11", "43", "10-12")  # step 40 took batch 42
    for spans, earlier, newest in ((["3"], (), 39), (["39-45"], (), 39), (["42"], ("10-12",), 42)):
        with pytest.raises(InputError, match=f"Name batches from {newest + 1} on"):
            resumed(*spans, earlier=earlier)


@pytest.mark.parametrize("words", [["x"], ["5-3"], ["-3"], ["1-2-3"], ["4", "²"]])
def test_what_is_no_span_is_refused(words):
    with pytest.raises(InputError, match="is no number or span of batches"):
        load_config("tiny", {"monitor.skip_batches": tuple(words)}, [])


def test_answers_cannot_be_left_out():
    for setting in ({"monitor.rewinds": 1}, {"monitor.skip_batches": ("3",)}):
        with pytest.raises(InputError, match=r"--mode rlhf"):
            load_config("rlhf", {"run.mode": "rlhf", "rlhf.reward": "a:b", **setting}, [])


def test_rewinds_count_and_leave_out_whatever_rows_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def rewound(step: int, batches: str) -> dict[str, Any]:
        return {"kind": "rewind", "step": step, "batches": batches}

    with MetricsFile(path, resume_step=0) as metrics:
        metrics.write({"kind": "train", "step": step, "loss": 1.0} for step in range(1, 34))
        metrics.go_back(30, rewound(30, "31-32"))
        metrics.write({"kind": "train", "step": step, "loss": 1.0} for step in range(31, 34))
        metrics.go_back(20, rewound(20, "28-30"))
        with MetricsFile(path, resume_step=10) as again:
            rows = again.rows()
    assert [row["step"] for row in rows] == [*range(1, 11), 10, 10]
    assert Course(config_of(), past=rows).batch(29) == 33
    assert Monitor(config_of(), past=rows, note=lambda _: None).rewinds == 2


def test_numbers_of_layers_that_are_none_are_written_as_json(tmp_path):
    path, norms = tmp_path / "metrics.jsonl", {"layers.0": float("nan"), "layers.1": float("inf")}
    with MetricsFile(path, resume_step=0) as metrics:
        metrics.write([{"kind": "monitor", "step": 1, "gradient_norm": norms}])

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row["gradient_norm"] == {"layers.0": "nan", "layers.1": "inf"}


@pytest.mark.parametrize("has_best", [True, False])
def test_the_best_that_counts_after_going_back_is_one_that_is_there(has_best, tmp_path):
    for step in (20, 30) if has_best else (30,):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    best = {"step": 20, "loss": 3.5}
    meta = tmp_path / "checkpoints/30/meta.json"
    meta.write_text(json.dumps({"best": best}))
    sums = {"meta.json": sha256_of_file(meta)}
    meta.with_name("checksums.json").write_text(json.dumps(sums))
    (tmp_path / "best").symlink_to("checkpoints/35")
    config = config_of("--monitor.rewinds", "1")
    monitor, course = Monitor(config, past=[], note=lambda _: None), Course(config, past=[])
    with (
        MetricsFile(tmp_path / "metrics.jsonl", resume_step=35) as metrics,
        Silent(first_step=0, max_steps=44) as progress,
    ):
        chosen = go_back(
            *(tmp_path, config, Trouble(34, 34, "a jump"), course, monitor, metrics, progress),
            once=lambda work: work(),
        )
    expected = best if has_best else None
    assert chosen == (tmp_path / "checkpoints/30", expected)
    assert (tmp_path / "best").is_symlink() == has_best
    # As a run that is killed then, and goes on, has it.
    for module in (start, torch_start):
        assert module.still_there(tmp_path, best) == expected


# Runs that go back ---------------------------------------------------------------------------------

BAD = 33  # the batch of step 34
FLAGS = [
    *SMALL_RUN,
    *("--max-steps", "44", "--train.eval_interval_steps", "22"),
    *("--checkpoint.interval_steps", "10", "--learning-rate", "2e-3"),
    *("--monitor.spike_window", "10", "--monitor.rewind_batches", "3", "--monitor.rewinds", "1"),
]


@pytest.fixture
def bad_batches(monkeypatch, tmp_path, prepared_folder) -> set[int]:
    """Give the numbers of batches that ask for what never comes, to change."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
    for module in (loop, torch_loop):
        monkeypatch.setattr(module, "write_report", lambda _, **__: None)
    bad, read = {BAD}, Batches.batch

    def batch(self: Batches, number: int, **options: Any) -> Any:
        found = read(self, number, **options)
        if number not in bad:
            return found
        return dataclasses.replace(found, targets=np.zeros_like(found.targets))

    monkeypatch.setattr(Batches, "batch", batch)
    return bad


def rewinds_of(run: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(Path(run) / "metrics.jsonl") if row["kind"] == "rewind"]


def weights_of(run: str, step: int) -> dict[str, np.ndarray]:
    folder = Path(run) / "checkpoints" / str(step)
    if (folder / "state").is_dir():
        return read_checkpoint(folder).weights
    return {name: each.numpy() for name, each in torch_read_checkpoint(folder).weights.items()}


@pytest.mark.slow
@pytest.mark.parametrize("package", ["jax", "torch"])
def test_a_run_that_went_back_is_bitwise_one_that_never_saw_those_batches(
    package, bad_batches, capsys
):
    main = TRAINERS[package].main
    assert main([*FLAGS, "--out", "back"]) == 0
    [row] = rewinds_of("back")
    assert (row["step"], row["first_step"], row["last_step"]) == (30, 32, 34)
    assert row["batches"] == "31-33"
    said = capsys.readouterr().err
    assert "step 34: loss spike" in said
    assert "Back to step 30; the batches of steps 32 to 34 (31-33) are left out." in said
    flags = ["--monitor.rewinds", "0", "--monitor.skip_batches", "31-33"]
    assert main([*FLAGS, *flags, "--out", "never"]) == 0
    for name, weight in weights_of("never", 44).items():
        np.testing.assert_array_equal(weight, weights_of("back", 44)[name], err_msg=name)
    rows = {
        run: [r for r in reproducible(Path(run)) if r["kind"] == "train"]
        for run in ("back", "never")
    }
    assert rows["back"] == rows["never"]
    assert [row["step"] for row in rows["back"]] == [*range(1, 45)]
    saved = json.loads(Path("back/checkpoints/44/meta.json").read_text())
    assert saved["config"]["monitor"]["skip_batches"] == ["31-33"]
    # A command line with a preset takes over what the checkpoint leaves out, which needs no metrics.
    lose_rewinds("back")
    more = ["--max-steps", "45", "--optimizer.decay_steps", "44", "--auto-resume", "--out", "back"]
    assert main([*FLAGS, *more]) == 0
    saved = json.loads(Path("back/checkpoints/45/meta.json").read_text())
    assert saved["config"]["monitor"]["skip_batches"] == ["31-33"]


def stop_when(
    condition: Callable[[int, int], bool], action: Callable[[], None]
) -> pytest.MonkeyPatch:
    """Do something when the bar reaches a step for a time, counted from 1."""
    patch, advance, times = pytest.MonkeyPatch(), Progress.advance, {}

    def advance_and_act(self: Progress, step: int) -> None:
        advance(self, step)
        times[step] = times.get(step, 0) + 1
        if condition(step, times[step]):
            action()

    patch.setattr(Progress, "advance", advance_and_act)
    return patch


class KilledError(Exception):
    pass


def kill() -> None:
    raise KilledError


def lose_rewinds(run: str) -> None:
    path = Path(run) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"kind": "rewind"' not in line))


def check_killed(at: tuple[int, int], *, metrics_are: str) -> None:
    """Kill a run when its bar reaches a step for a time, go on, and compare with `whole`."""
    patch = stop_when(lambda *now: now == at, kill)
    out = f"killed_{at[0]}_{metrics_are}"
    with pytest.raises(KilledError):
        train.main([*FLAGS, "--out", out])
    patch.undo()
    if metrics_are == "lost":
        lose_rewinds(out)
    assert train.main(["--resume", out]) == 0
    if metrics_are == "lost" and at == (42, 1):  # the row has gone, but not what is left out
        lose_rewinds("whole")
    assert_same_run(Path(out), Path("whole"), step=44)


@pytest.mark.slow
def test_a_run_killed_anywhere_around_a_rewind_ends_bitwise_alike(bad_batches):
    assert train.main([*FLAGS, "--out", "whole"]) == 0
    assert len(rewinds_of("whole")) == 1
    check_killed((34, 1), metrics_are="kept")  # before the spike is seen
    check_killed((30, 2), metrics_are="kept")  # while it goes back
    check_killed((33, 2), metrics_are="lost")  # before the next checkpoint
    check_killed((33, 2), metrics_are="kept")
    check_killed((42, 1), metrics_are="kept")  # after it
    stop = stop_when(lambda *now: now == (34, 1), lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train.main([*FLAGS, "--out", "stopped"]) == 128 + signal.SIGTERM
    stop.undo()
    assert len(rewinds_of("stopped")) == 1  # first it went back
    assert train.main(["--resume", "stopped"]) == 0
    assert_same_run(Path("stopped"), Path("whole"), step=44)
    check_killed((42, 1), metrics_are="lost")


@pytest.mark.slow
def test_after_so_many_rewinds_a_run_stops_with_what_it_had_before(bad_batches, capsys):
    bad_batches.add(40)
    assert train.main([*FLAGS, "--out", "twice"]) == 1
    assert len(rewinds_of("twice")) == 1
    said = capsys.readouterr().err
    assert "error: stopped at step 38: loss spike" in said
    assert "all 1 rewinds are used up" in said
    steps = [int(path.name) for path in Path("twice/checkpoints").iterdir()]
    assert max(steps) == 30
    assert train.main(["--resume", "twice", "--monitor.rewinds", "2"]) == 0
    assert len(rewinds_of("twice")) == 2


def test_checkpoints_from_between_are_set_aside_and_not_gone_on_from(bad_batches):
    flags = ["--monitor.rewind_batches", "20", "--checkpoint.keep", "9"]
    assert train.main([*FLAGS, *flags, "--out", "far"]) == 0
    [row] = rewinds_of("far")
    assert (row["step"], row["first_step"], row["batches"]) == (10, 15, "14-33")
    names = sorted(path.name for path in Path("far/checkpoints").iterdir())
    assert [name for name in names if "rewound" in name] == [
        "20.rewound.1",
        "22.rewound.1",
        "30.rewound.1",
    ]
    best = read_checkpoint(Path("far/checkpoints/44")).best
    assert best["step"] == int(Path("far/best").resolve().name)


@pytest.mark.slow
@pytest.mark.parametrize("package", ["jax", "torch"])
def test_what_a_rewind_set_aside_goes_on_as_if_there_had_been_none(package, bad_batches, capsys):
    """A person may think that a warning was a false alarm."""
    main = TRAINERS[package].main
    flags = ["--monitor.rewind_batches", "20", "--checkpoint.keep", "9"]
    assert main([*FLAGS, *flags, "--out", "far"]) == 0
    capsys.readouterr()
    more = ["--resume", "far/checkpoints/30.rewound.1", "--monitor.rewinds", "0", "--out", "branch"]
    assert main(more) == 0
    said = capsys.readouterr().err
    assert "before the rewind to step 10, so batches 14-33 are not left out" in said
    assert main([*FLAGS, *flags, "--monitor.rewinds", "0", "--out", "never"]) == 0
    for name, weight in weights_of("never", 44).items():
        np.testing.assert_array_equal(weight, weights_of("branch", 44)[name], err_msg=name)
    rows = [
        {row["step"]: row["loss"] for row in read_metrics(Path(run) / "metrics.jsonl")
         if row["kind"] == "train"} for run in ("branch", "never")
    ]  # fmt: skip
    assert [*rows[0]] == [*range(1, 11), *range(31, 45)]
    assert rows[0] == {step: rows[1][step] for step in rows[0]}
    # One from after the rewind leaves out what it did, also in a new folder.
    assert main(["--resume", "far/checkpoints/20", "--out", "other"]) == 0
    for name, weight in weights_of("far", 44).items():
        np.testing.assert_array_equal(weight, weights_of("other", 44)[name], err_msg=name)


def some(cls: type, **fields: Any) -> Any:
    """Make an object of which only some fields are looked at."""
    made = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


@pytest.mark.parametrize("package", [start, torch_start])
def test_a_rewind_to_the_first_step_is_forgotten_by_what_it_set_aside(package, tmp_path):
    """Nothing is left of metrics then, and an empty file must replace the old one."""
    config = config_of()
    path = tmp_path / "run" / "checkpoints" / "30.rewound.1"
    path.mkdir(parents=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    rewind = {"kind": "rewind", "step": 0, "first_step": 15, "batches": "12-31", "number": 1}
    metrics.write_text(
        "".join(json.dumps(row) + "\n" for row in (rewind, {"kind": "train", "step": 1}))
    )
    rest = dict.fromkeys([field.name for field in dataclasses.fields(package.Checkpoint)])
    resumed = some(package.Checkpoint, **rest | {"folder": path, "step": 30, "config": config})
    nothing = {"stats": {}, "tokenizer": some(Tokenizer, save=lambda _: None)}
    prepared = some(type("NoData", (PreparedData,), nothing))
    said: list[str] = []
    opened = package.Start(config, tmp_path / "run", resumed=resumed, initial=None, preset=None)
    package.open_folder(opened, prepared, say=said.append)
    assert "before the rewind to step 0, so batches 12-31 are not left out" in said[0]
    assert read_metrics(metrics) == []
    assert Course(config, past=read_metrics(metrics)).batch(31) == 30


def test_a_rewind_that_a_checkpoint_comes_after_stays_with_it():
    row = {"kind": "rewind", "step": 10, "batches": "14-33"}
    rows = [{"kind": "train", "step": 10}, row, {"kind": "train", "step": 11}]
    before, after = config_of(), config_of("--monitor.skip_batches", "5", "14-33")
    assert rows_leading_to(rows, before, step=14) == (rows, "")  # learned from batch 13, the last
    assert rows_leading_to(rows, after, step=40) == (rows, "")
    assert rows_leading_to(rows, before, step=15)[0] == rows[:1]


@pytest.mark.slow
def test_all_rewinds_together_are_no_more_than_may_be(bad_batches, capsys):
    """The second goes back further than the first."""
    bad_batches |= {34, 40, 41, 42}
    flags = ["--monitor.rewinds", "2", "--checkpoint.keep", "9", "--monitor.rewind_batches", "1"]
    patch = stop_when(lambda *now: now == (31, 2), lambda: damage_checkpoint("many", 30))
    code = train.main([*FLAGS, *flags, "--out", "many"])
    patch.undo()
    assert code == 1
    assert "all 2 rewinds are used up" in capsys.readouterr().err
    rows = rewinds_of("many")
    assert [row["number"] for row in rows] == [1, 2]
    assert [row["step"] for row in rows] == [22, 22]
    assert "Back to step 30" in rows[0]["text"]


def damage_checkpoint(run: str, step: int) -> None:
    (Path(run) / "checkpoints" / str(step) / "meta.json").write_text("{}")


# A process of a run whose batches ask for what never comes, and which writes down what it reads.
PROCESS = """
import dataclasses, sys
import numpy as np
from tinyllm_jax import train
from tinyllm_jax.data.batches import Batches
from tinyllm_jax.training import loop
read, (log, bad) = Batches.batch, sys.argv[1:3]
def batch(self, number, **options):
    found = read(self, number, **options)
    print(number, file=open(log, "a"))
    is_bad = str(number) == bad
    return dataclasses.replace(found, targets=np.zeros_like(found.targets)) if is_bad else found
Batches.batch, loop.write_report = batch, lambda *_, **__: None
sys.exit(train.main(sys.argv[3:]))
"""


def run_two_processes(folder: Path, data: Path, *flags: str, bad: str) -> list[list[int]]:
    """Run them, and give the training batches that each has read."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "TINYLLM_DATA_DIR": str(data),
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": flags_for_devices(1),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    meeting = ["--distributed.coordinator", f"127.0.0.1:{port}"]
    meeting += ["--distributed.num_processes", "2", "--distributed.process_id"]
    processes, logs = [], [folder / "reads.0", folder / "reads.1"]
    for index, log in enumerate(logs):
        log.write_text("")
        words = [sys.executable, "-c", PROCESS, str(log), bad, *flags, *meeting, str(index)]
        with open(folder / f"said.{index}", "w") as said:
            processes.append(
                subprocess.Popen(words, cwd=folder, env=environment, stdout=said, stderr=said)
            )
    try:
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0], [(folder / f"said.{index}").read_text() for index in (0, 1)]
    return [[*map(int, log.read_text().split())] for log in logs]


@pytest.mark.slow
def test_processes_of_a_resumed_run_go_back_together_and_leave_out_the_same(
    tmp_path, prepared_folder
):
    flags = [*FLAGS, "--optimizer.decay_steps", "44", "--out", "run", "--auto-resume"]
    run_two_processes(tmp_path, prepared_folder, *flags, "--max-steps", "30", bad="")
    first, second = run_two_processes(
        tmp_path, prepared_folder, *flags, "--max-steps", "36", bad=str(BAD)
    )
    assert first[-3:] == second[-3:] == [36, 37, 38]
    run = str(tmp_path / "run")
    [row] = rewinds_of(run)
    assert (row["step"], row["batches"]) == (30, "31-33")
    # Killed before the first checkpoint after it: only the row says what is left out.
    (tmp_path / "run/checkpoints/36").rename(tmp_path / "gone")
    first, second = run_two_processes(
        tmp_path, prepared_folder, *flags, "--max-steps", "36", bad=str(BAD)
    )
    for reads in (first, second):
        assert [number for number in reads if number >= 30] == [30, *range(34, 39)]
    assert len(rewinds_of(run)) == 1


@pytest.mark.slow
def test_a_run_without_a_checkpoint_yet_goes_back_to_its_beginning(bad_batches):
    flags = ["--checkpoint.interval_steps", "100", "--train.eval_interval_steps", "44"]
    assert train.main([*FLAGS, *flags, "--out", "first"]) == 0
    [row] = rewinds_of("first")
    assert (row["step"], row["batches"]) == (0, "31-33")
    flags += ["--monitor.rewinds", "0", "--monitor.skip_batches", "31-33"]
    assert train.main([*FLAGS, *flags, "--out", "never"]) == 0
    for name, weight in weights_of("never", 44).items():
        np.testing.assert_array_equal(weight, weights_of("first", 44)[name], err_msg=name)


@pytest.fixture
def broken_batches(bad_batches, monkeypatch) -> set[int]:
    """Give the numbers of batches with losses that are no numbers, to change."""
    bad_batches.clear()
    makes = loop.make_train_step

    def make_train_step(config: Config, *parts: Any) -> Any:
        step = makes(config, *parts)

        def poisoned(state: Any, batch: Any, fixed: Any) -> Any:
            # Targets that no batch has otherwise stand for a row that breaks the arithmetic.
            broken = jax.numpy.where(batch["tokens"][0, 0] == 0, jax.numpy.nan, 1.0)
            weights = {name: weight * broken for name, weight in state.weights.items()}
            new, numbers = step(state._replace(weights=weights), batch, fixed)
            kept = jax.tree.map(
                lambda new, old: jax.numpy.where(jax.numpy.isnan(broken), old, new),
                new.weights,
                state.weights,
            )
            return new._replace(weights=kept), numbers

        return poisoned

    read, broken = Batches.batch, set()

    def batch(self: Batches, number: int, **options: Any) -> Any:
        found = read(self, number, **options)
        if number not in broken:
            return found
        return dataclasses.replace(found, tokens=np.zeros_like(found.tokens))

    monkeypatch.setattr(Batches, "batch", batch)
    monkeypatch.setattr(loop, "make_train_step", make_train_step)
    return broken


@pytest.mark.slow
def test_a_checkpoint_among_failing_steps_pushes_none_from_before_out(broken_batches):
    broken_batches |= {25, 26, 27, 28, 29, 30}
    flags = ["--train.max_nonfinite_steps", "6", "--monitor.spike_z", "0", "--checkpoint.keep", "1"]
    flags += ["--monitor.rewind_batches", "1", "--train.eval_interval_steps", "44"]
    flags += ["--checkpoint.interval_steps", "4"]
    assert train.main([*FLAGS, *flags, "--out", "kept"]) == 0
    [row] = rewinds_of("kept")
    assert (row["step"], row["batches"]) == (24, "25-30")
    names = sorted(path.name for path in Path("kept/checkpoints").iterdir())
    assert names == ["28.rewound.1", "44"]


@pytest.mark.slow
def test_steps_with_losses_that_are_no_numbers_are_left_out_too(broken_batches):
    broken_batches |= {25, 26, 27}
    flags = ["--train.max_nonfinite_steps", "3", "--monitor.spike_z", "0"]
    flags += ["--monitor.rewind_batches", "1"]
    assert train.main([*FLAGS, *flags, "--out", "bad"]) == 0
    [row] = rewinds_of("bad")
    assert (row["step"], row["batches"]) == (22, "25-27")
    rows = [r for r in reproducible(Path("bad")) if r["kind"] == "train"]
    assert [row["step"] for row in rows] == [*range(1, 45)]
    assert not any(row["skipped"] for row in rows)
    assert train.main([*FLAGS, *flags, "--monitor.rewinds", "0", "--out", "stopped"]) == 1
