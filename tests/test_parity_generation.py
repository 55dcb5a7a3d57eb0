"""The PyTorch twin generates what JAX generates: filters, greedy texts, and how they end."""

import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, run_python
from llama_oracle import SMALL, changed, random_weights, transformers_llama
from parity import precision

import convert
import tinyllm_torch
from tinyllm_jax.config import ModelConfig, SamplingConfig
from tinyllm_jax.errors import InputError
from tinyllm_jax.inference import generate as jax_generate
from tinyllm_jax.inference import sampling as jax_sampling
from tinyllm_torch import generate as command
from tinyllm_torch import train
from tinyllm_torch.inference import generate as torch_generate
from tinyllm_torch.inference import sampling as torch_sampling
from tinyllm_torch.inference.language_model import bundle_from_model, model_from_bundle
from tinyllm_torch.model import weights as torch_weights
from tinyllm_torch.training.checkpoint import read_checkpoint

OPTIMIZED = True

CONTEXT = changed(SMALL, max_position_embeddings=256, tie_word_embeddings=False)
PROMPTS = [[1, 5, 9, 2, 40], [7], [3] * 17 + [8]]


def continuations(
    config: ModelConfig, sampling: SamplingConfig, *, eos_id: int, std: float = 0.3
) -> tuple[Any, Any]:
    """Continue the prompts in (the twin, JAX), as rows of (tokens, why it ended)."""
    weights = random_weights(config, std=std)
    with precision(config):
        theirs = jax_generate.Generator(config).generate(
            {name: jnp.asarray(value) for name, value in weights.items()},
            PROMPTS,
            sampling=sampling,
            eos_id=eos_id,
        )
    tensors = torch_weights.as_tensors(
        torch_weights.from_jax_weights(weights), config, device="cpu"
    )
    ours = torch_generate.Generator(config).generate(
        tensors, PROMPTS, sampling=sampling, eos_id=eos_id
    )
    return tuple(
        [[(sample.token_ids.tolist(), sample.ended) for sample in samples] for samples in side]
        for side in (ours, theirs)
    )


# Greedy -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_two_hundred_greedy_tokens_are_those_of_jax_and_transformers(dtype: str) -> None:
    config = changed(CONTEXT, compute_dtype=dtype)
    sampling = SamplingConfig(greedy=True, max_new_tokens=200)
    actual, expected = continuations(config, sampling, eos_id=-1)
    assert actual == expected
    assert all(len(tokens) == 200 for samples in actual for tokens, _ in samples)
    assert len(set(actual[0][0][0])) > 10, "a text of few tokens hides a wrong one"
    llama = transformers_llama(config, random_weights(config, std=0.3))
    for prompt, ((tokens, _),) in zip(PROMPTS, actual, strict=True):
        theirs = llama.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=200,
        )
        assert theirs[0, len(prompt) :].tolist() == tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "eos_id"),
    [
        ({"repetition_penalty": 1.7}, -1),
        ({"slide": True}, -1),
        ({}, -1),
        ({"num_samples": 2, "slide": True, "repetition_penalty": 1.3}, "seen"),
    ],
)
def test_penalties_sliding_and_ends_are_those_of_jax(settings: dict[str, Any], eos_id: Any) -> None:
    config = changed(CONTEXT, compute_dtype="float64", max_position_embeddings=32)
    sampling = SamplingConfig(greedy=True, max_new_tokens=70, **settings)
    if eos_id == "seen":
        found, _ = continuations(config, sampling, eos_id=-1)
        eos_id = found[0][0][0][45]
    actual, expected = continuations(config, sampling, eos_id=eos_id)
    assert actual == expected
    ends = {ended for samples in actual for _, ended in samples}
    if eos_id >= 0:
        assert "eos" in ends
    elif not sampling.slide:
        assert ends == {"context"}
    else:
        assert ends == {"length"}


# Filters ------------------------------------------------------------------------------------------


def settings_of(rows: list[tuple[float, int, float, float]], seed: int) -> tuple[Any, Any]:
    columns = [np.array(column, np.float32) for column in zip(*rows, strict=True)]
    temperature, top_k, top_p, penalty = columns
    numbers = np.arange(len(rows))
    arrays = [temperature, top_k.astype(np.int32), top_p, penalty]
    seeds = np.full(len(rows), seed)
    ours = torch_sampling.RowSettings(
        *(torch.from_numpy(array) for array in arrays),
        torch.from_numpy(seeds),
        torch.from_numpy(numbers),
    )
    theirs = jax_sampling.RowSettings(
        *(jnp.asarray(array) for array in arrays),
        jnp.asarray(seeds.astype(np.uint32)),
        jnp.asarray(numbers.astype(np.int32)),
    )
    return ours, theirs


ROWS = [
    (0.8, 0, 1.0, 1.0),
    (0.8, 5, 1.0, 1.3),
    (1.0, 0, 0.9, 1.0),
    (1.7, 40, 0.5, 0.7),
    (0.3, 1, 0.95, 1.0),
    (0.0, 3, 0.5, 1.1),
    (1.0, 100_000, 0.999999, 1.0),
    (1.0, 0, 1e-6, 1.0),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["normal", "ties", "one token takes all", "equal"])
def test_filters_leave_the_same_tokens_with_the_same_logits(kind: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    logits = (4 * rng.standard_normal((len(ROWS), 301))).astype(dtype)
    if kind == "ties":
        logits = np.round(logits)
    elif kind == "one token takes all":
        logits[:, 17] = 400
    elif kind == "equal":
        logits[:] = -2.5
    present = rng.random(logits.shape) < 0.3
    ours, theirs = settings_of(ROWS, seed=0)

    def stages(sampling: Any, logits: Any, present: Any, settings: Any) -> dict[str, Any]:
        penalised = sampling.penalise_repetition(
            logits, present=present, penalty=settings.repetition_penalty
        )
        return {
            "penalty": penalised,
            "top-k": sampling.keep_top_k(logits, top_k=settings.top_k),
            "top-p": sampling.keep_top_p(logits, top_p=settings.top_p),
            "all": sampling.filtered(penalised, settings=settings),
        }

    with jax.enable_x64(dtype == "float64"):
        expected = jax.jit(lambda *inputs: stages(jax_sampling, *inputs))(
            jnp.asarray(logits), jnp.asarray(present), theirs
        )
    actual = stages(torch_sampling, torch.from_numpy(logits), torch.from_numpy(present), ours)
    for name, kept in actual.items():
        kept, wanted = kept.numpy(), np.asarray(expected[name])
        np.testing.assert_array_equal(np.isinf(kept), np.isinf(wanted), err_msg=name)
        # Equal to the last bit or the one before: XLA multiplies where torch divides.
        np.testing.assert_allclose(kept, wanted, rtol=1e-6 if dtype == "float32" else 1e-14)
    if kind == "normal":
        assert int(torch.isinf(actual["all"]).any(dim=1).sum()) >= 5, (
            "filters that leave all show nothing"
        )


# Drawing, whose bits differ -----------------------------------------------------------------------


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    draws = 6000
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0, 0.5]])
    settings, _ = settings_of([(0.8, 4, 0.97, 1.0)] * draws, seed=5)
    picked = torch_sampling.next_tokens(
        logits.expand(draws, -1),
        present=torch.zeros(draws, 6, dtype=torch.bool),
        settings=settings,
        token_number=torch.zeros(draws, dtype=torch.long),
    )
    one_row = torch_sampling.RowSettings(*(field[:1] for field in settings))
    expected = torch.softmax(torch_sampling.filtered(logits, settings=one_row), dim=-1)[0]
    shares = torch.bincount(picked, minlength=6) / draws
    spread = torch.sqrt(expected * (1 - expected) / draws)
    assert (torch.abs(shares - expected) <= 4 * spread).all(), (shares, expected)
    assert shares[3] == 0


def test_a_drawn_text_depends_on_its_own_row_alone_and_on_the_seed() -> None:
    config = changed(CONTEXT, compute_dtype="float64")
    weights = torch_weights.initial_weights(config, seed=0)
    generator = torch_generate.Generator(config)

    def draw(prompts: list[list[int]], **settings: Any) -> list[list[list[int]]]:
        sampling = SamplingConfig(temperature=1.0, max_new_tokens=20, **settings)
        found = generator.generate(weights, prompts, sampling=sampling, eos_id=-1)
        return [[sample.token_ids.tolist() for sample in samples] for samples in found]

    alone = draw(PROMPTS[:1], num_samples=3)
    beside = draw(PROMPTS, num_samples=3)
    assert beside[0] == alone[0]
    assert len({tuple(text) for text in alone[0]}) == 3
    assert draw(PROMPTS[:1], seed=1)[0][0] != alone[0][0]
    assert draw(PROMPTS[:1], seed=2**32 - 1)[0][0] != alone[0][0]


# The command and `load` ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch_run(tmp_path_factory: pytest.TempPathFactory, prepared_folder: Path) -> Path:
    """Give a finished run of the twin, with checkpoints at 5 and 10; tests only read it."""
    folder = tmp_path_factory.mktemp("torch") / "run"
    flags = ["--max-steps", "10", "--checkpoint.interval_steps", "5", "--out", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
        assert train.main([*SMALL_RUN, *flags]) == 0
    return folder


def test_the_command_prints_the_story_that_the_loaded_model_writes(
    torch_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tinyllm_torch.load(torch_run)
    story = model.generate("Once upon", max_new_tokens=12, greedy=True)
    assert story[0].startswith("Once upon")
    capsys.readouterr()
    flags = ["--checkpoint", str(torch_run), "--prompt", "Once upon", "--max-new-tokens", "12"]
    assert command.main([*flags, "--greedy"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{story[0]}\n"
    assert "step 10" in printed.err
    assert command.main([*flags, "--num-samples", "2", "--seed", "3", "--temperature", "1"]) == 0
    drawn = model.generate("Once upon", max_new_tokens=12, num_samples=2, seed=3, temperature=1.0)
    assert capsys.readouterr().out == f"\n{command.SEPARATOR}\n".join(drawn) + "\n"


@pytest.mark.slow
def test_a_loaded_model_has_the_logits_and_the_story_of_jax_with_its_weights(
    torch_run: Path,
) -> None:
    from tinyllm_jax.inference.language_model import LanguageModel

    ours = tinyllm_torch.load(torch_run / "checkpoints" / "10")
    weights = torch_weights.to_jax_weights(read_checkpoint(torch_run / "best").weights)
    theirs = LanguageModel(ours.config, weights, ours.tokenizer)
    tokens = np.random.default_rng(0).integers(0, ours.config.vocab_size, (2, 9))
    actual, expected = ours.logits(tokens), theirs.logits(tokens)
    assert actual.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    prompts = ["Once upon a time", "The cat", ""]
    assert ours.generate(prompts, greedy=True, max_new_tokens=30) == (
        theirs.generate(prompts, greedy=True, max_new_tokens=30)
    )


def test_a_run_of_jax_loads_here_with_its_logits(trained_run: Path) -> None:
    import tinyllm_jax

    ours, theirs = tinyllm_torch.load(trained_run), tinyllm_jax.load(trained_run)
    tokens = np.random.default_rng(0).integers(0, ours.config.vocab_size, (2, 9))
    actual, expected = ours.logits(tokens), theirs.logits(tokens)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert ours.tokenizer.hash == theirs.tokenizer.hash


def test_a_bundle_becomes_a_model_and_comes_back_bitwise(torch_run: Path) -> None:
    bundle = convert.read(torch_run)
    model = model_from_bundle(bundle)
    again = bundle_from_model(model, bundle.tokenizer)
    assert again.model == bundle.model
    assert again.weights.keys() == bundle.weights.keys()
    for name, array in bundle.weights.items():
        np.testing.assert_array_equal(again.weights[name], array, err_msg=name)
    assert set(again.layout) <= set(bundle.layout)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[600]], "Use the tokenizer"),
        ([1, 2], r"Give whole numbers as \[batch, seq\]"),
        ([[1] * 65], "Cut the rows"),
        ([[1], [1, 2]], "Pad them"),
    ],
)
def test_logits_of_unfit_tokens_are_refused(torch_run: Path, tokens: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tinyllm_torch.load(torch_run).logits(tokens)


def test_a_damaged_best_gives_way_to_the_newest(
    torch_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    copy = Path(shutil.copytree(torch_run, tmp_path / "run", symlinks=True))
    (copy / "checkpoints/10/model.safetensors").unlink()
    tinyllm_torch.load(copy)
    said = capsys.readouterr().err
    assert "damaged checkpoint" in said
    assert "checkpoints/5: step 5" in said


def test_flags_are_those_of_jax_and_bad_ones_are_one_line(tmp_path: Path) -> None:
    def run(package: str, *flags: str) -> subprocess.CompletedProcess[str]:
        return run_python(
            "-m", f"{package}.generate", *flags, folder=tmp_path, timeout=120, COLUMNS="80"
        )

    shown = [run(package, "--help").stdout for package in ("tinyllm_torch", "tinyllm_jax")]
    flags = [
        sorted(set(filter(lambda word: word.startswith("--"), text.split()))) for text in shown
    ]
    assert flags[0] == flags[1]
    wrong = run("tinyllm_torch", "--temprature", "1", "--top-p", "2")
    assert wrong.returncode == 2
    assert wrong.stderr.count("error: ") == len(wrong.stderr.splitlines()) == 3
