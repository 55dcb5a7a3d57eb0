"""Training that changes the framework half-way is the training that never did, and so is its story."""

from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_RUN

import convert
import tinyllm_jax
import tinyllm_jax.train
import tinyllm_torch
import tinyllm_torch.train
from tinyllm_jax.training.metrics import read_metrics

OPTIMIZED = True

# Nats per token; two frameworks add floats in another order, and 200 steps amplify that.
LARGEST_DIFFERENCE = 1e-4
TRAIN = {"jax": tinyllm_jax.train.main, "torch": tinyllm_torch.train.main}


def losses(run: Path) -> np.ndarray:
    """Read the loss of every step and, at its end, of every evaluation."""
    rows = read_metrics(run / "metrics.jsonl")
    steps = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in steps] == list(range(1, 201))
    return np.array([row["loss"] for row in [*steps, *rows] if row["kind"] in ("train", "eval")])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, prepared_folder: Path) -> dict[str, Path]:
    """Train 200 steps in each framework, and the last 100 of each once more in the other."""
    folder = tmp_path_factory.mktemp("switch")
    flags = [*SMALL_RUN, "--checkpoint.interval_steps", "100", "--train.eval_interval_steps", "100"]
    flags += ["--optimizer.decay_steps", "200", "--learning-rate", "2e-3", "--batch-size", "16"]
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
        patch.chdir(folder)
        # The same first weights for all: each framework draws others from a seed.
        assert TRAIN["jax"]([*SMALL_RUN, "--max-steps", "1", "--out", "first"]) == 0
        start = ["--init-from", "first"]
        for first, second in (("jax", "torch"), ("torch", "jax")):
            whole, both = folder / first, folder / f"{first}_then"
            long = [*flags, *start, "--max-steps", "200"]
            assert TRAIN[first]([*long, "--out", str(whole)]) == 0
            resume = ["--resume", str(whole / "checkpoints/100"), "--out", str(both)]
            assert TRAIN[second](resume) == 0
            found |= {first: whole, f"{first} then {second}": both}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "jax then torch", "torch then jax"])
def test_the_loss_curve_of_200_steps_does_not_tell_the_framework(name, runs):
    expected = losses(runs["jax"])
    assert expected[199] < expected[0] - 1.5
    np.testing.assert_allclose(losses(runs[name]), expected, rtol=0, atol=LARGEST_DIFFERENCE)


@pytest.mark.slow
def test_a_checkpoint_that_went_through_every_format_tells_the_same_story(runs, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = runs["jax"]
    stations = [
        ("torch", "a.pt"),
        ("hf", "b"),
        ("orbax", "c"),
        ("llama2c", "d.bin"),
        ("orbax", "e"),
    ]
    path = source
    first = convert.read(source)
    for to, name in stations:
        target = tmp_path / name
        # llama2.c's file holds no tokenizer that could be read back as ours.
        tokenizer = source / "tokenizer.model" if path.suffix == ".bin" else None
        convert.write(convert.read(path, tokenizer), target, to=to)
        path = target
    last = convert.read(path)
    assert last.weights.keys() == first.weights.keys()
    for name, weight in first.weights.items():
        np.testing.assert_array_equal(last.weights[name], weight, err_msg=name)
    prompt, options = (
        "Once upon a time",
        {"greedy": True, "max_new_tokens": 40, "repetition_penalty": 1.5},
    )
    (story,) = tinyllm_jax.load(path).generate([prompt], **options)
    assert len(set(story.split())) > 8, story
    assert tinyllm_torch.load(tmp_path / "a.pt").generate([prompt], **options) == [story]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "b")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=40, do_sample=False, repetition_penalty=1.5)
    assert tokenizer.decode(written[0], skip_special_tokens=True) == story
