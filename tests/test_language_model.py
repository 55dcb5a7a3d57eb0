"""A loaded model writes and scores text, and the command prints its story and nothing else."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_python
from llama_oracle import SMALL, changed, random_weights

import tinyllm_jax
from tinyllm_jax import generate as command
from tinyllm_jax.config import Config, DataConfig, SamplingConfig, TokenizerConfig
from tinyllm_jax.data.tokenizer import Tokenizer, train_tokenizer
from tinyllm_jax.errors import InputError
from tinyllm_jax.inference.language_model import LanguageModel, load
from tinyllm_jax.model.weights import merge_weights, model_structure
from tinyllm_jax.training.checkpoint import save_checkpoint
from tinyllm_jax.training.step import new_state
from tinyllm_jax.training.step_folders import mark_best

STORIES = ["Once upon a time there was a dog named Tim.", "The cat sat on the red mat."] * 20
CONTEXT = 48


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(STORIES, config=TokenizerConfig(kind="bytelevel"), vocab_size=290)


@pytest.fixture(scope="module")
def config(tokenizer: Tokenizer) -> Config:
    model = changed(
        SMALL, vocab_size=tokenizer.vocab_size, max_position_embeddings=CONTEXT, num_hidden_layers=1
    )
    return Config(model=model, data=DataConfig(sequence_length=CONTEXT))


def write(run: Path, step: int, config: Config, tokenizer: Tokenizer) -> Path:
    """Save a checkpoint whose weights are a function of its step."""
    weights = random_weights(config.model, seed=step, std=0.5)
    state = new_state(config, jax.tree.map(jnp.asarray, weights))
    state = state._replace(step=jnp.asarray(step))
    return save_checkpoint(
        run, state, config=config, tokenizer=tokenizer, dataset_hash="none", best=None
    )


@pytest.fixture(scope="module")
def run(config: Config, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run with steps 3 and 7, of which 3 is the best."""
    folder = tmp_path_factory.mktemp("run")
    for step in (3, 7):
        write(folder, step, config, tokenizer)
    mark_best(folder, 3)
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> LanguageModel:
    return load(run)


# Which checkpoint ---------------------------------------------------------------------------------


def has_weights_of(model: LanguageModel, step: int) -> bool:
    expected = random_weights(model.config, seed=step, std=0.5)
    return all(np.array_equal(model.weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("below", "step"), [("", 3), ("best", 3), ("checkpoints/3", 3), ("checkpoints/7", 7)]
)
def test_a_run_means_its_best_checkpoint_and_a_step_folder_itself(
    run: Path, below: str, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert has_weights_of(load(run / below), step)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"step {step}\n" in captured.err


def test_of_a_run_that_was_copied_the_best_checkpoint_is_enough(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "best", tmp_path / "best")
    assert has_weights_of(load(tmp_path), 3)


def test_a_run_without_a_best_checkpoint_means_its_newest(
    config: Config, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for step in (1, 2):
        write(tmp_path, step, config, tokenizer)
    assert has_weights_of(load(tmp_path), 2)


def test_a_damaged_best_checkpoint_is_named_and_the_newest_good_one_taken(
    config: Config, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        write(tmp_path, step, config, tokenizer)
    mark_best(tmp_path, 1)
    (tmp_path / "best" / "meta.json").write_text("{}")
    assert has_weights_of(load(str(tmp_path)), 2)
    message = capsys.readouterr().err
    assert "best: damaged checkpoint (meta.json does not have its checksum)" in message
    assert "step 2" in message


def test_no_checkpoint_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load(tmp_path / "nothing")
    with pytest.raises(InputError, match="neither config.json nor checkpoints"):
        load(tmp_path)


def test_a_model_trained_with_cudnn_loads_without_a_gpu(
    config: Config, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    trained = dataclasses.replace(config.model, attention="cudnn", compute_dtype="bfloat16")
    write(tmp_path, 1, dataclasses.replace(config, model=trained), tokenizer)
    assert load(tmp_path).logits([[1, 2]]).shape == (1, 2, trained.vocab_size)


# Logits -------------------------------------------------------------------------------------------


def test_logits_are_those_of_the_model_whatever_the_length(model: LanguageModel) -> None:
    small = LanguageModel(model.config, random_weights(model.config), model.tokenizer)
    structure, _ = model_structure(model.config)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, CONTEXT))
    expected = jax.jit(lambda tokens: merge_weights(structure, small.weights)(tokens))(tokens)
    for seq in (1, 31, 33, CONTEXT):
        actual = small.logits(tokens[:, :seq].tolist())
        assert isinstance(actual, np.ndarray)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected[:, :seq], rtol=0, atol=1e-5)
    assert small.logits(np.zeros((0, 3), int)).shape == (0, 3, model.config.vocab_size)


def test_a_float64_model_computes_in_float64_without_the_users_doing(
    config: Config, tokenizer: Tokenizer
) -> None:
    double = changed(config.model, compute_dtype="float64")
    model = LanguageModel(double, random_weights(double), tokenizer)
    assert {weight.dtype.name for weight in model.weights.values()} == {"float64"}
    assert model.logits([[1, 2, 3]]).dtype == np.float32
    assert model.generate("Once", max_new_tokens=2)[0].startswith("Once")
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize(
    ("token_ids", "words"),
    [
        ([1, 2], r"shape \(2,\)"),
        ([[0.5]], "type float64"),
        ([[0, 9999]], "goes from 0 to 9999, and model.vocab_size="),
        ([[-1]], "goes from -1"),
        ([[1] * (CONTEXT + 1)], f"{CONTEXT + 1} tokens.*max_position_embeddings={CONTEXT}"),
    ],
)
def test_token_ids_that_do_not_fit_say_why(
    model: LanguageModel, token_ids: Any, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        model.logits(token_ids)


# Text ---------------------------------------------------------------------------------------------


def test_texts_begin_with_their_prompt_and_stand_side_by_side(model: LanguageModel) -> None:
    texts = model.generate(["Once upon", "The cat"], num_samples=2, max_new_tokens=10)
    assert [text[: len("The cat")] for text in texts[2:]] == ["The cat"] * 2
    assert all(text.startswith("Once upon") for text in texts[:2])
    assert len(set(texts)) == 4
    assert texts == model.generate(["Once upon", "The cat"], num_samples=2, max_new_tokens=10)


def test_one_prompt_needs_no_list_and_an_empty_one_begins_a_document(model: LanguageModel) -> None:
    assert model.generate("Once", greedy=True) == model.generate(["Once"], greedy=True)
    (text,) = model.generate("", greedy=True, max_new_tokens=5)
    logits = model.logits([[model.tokenizer.bos_id]])
    assert text.startswith(model.tokenizer.decode([int(logits[0, 0].argmax())]))


def test_the_defaults_are_those_of_the_sampling_config(model: LanguageModel) -> None:
    expected = model.continue_texts(["Once"], sampling=SamplingConfig(), chat=False)
    assert model.generate("Once") == [expected[0][0]]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"top_p": 1.5}, "top_p=1.5 is too large"),
        ({"temperature": -1.0}, "temperature=-1.0 is too small"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is too small"),
        ({"seed": -1}, "seed=-1 is too small"),
    ],
)
def test_settings_out_of_range_are_refused(
    model: LanguageModel, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        model.generate("Once", **fields)


# The package --------------------------------------------------------------------------------------


def test_importing_the_package_imports_no_framework() -> None:
    code = (
        "import sys, tinyllm_jax, tinyllm_jax.generate\n"
        "heavy = {'jax', 'flax', 'numpy', 'torch', 'orbax', 'optax'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert callable(tinyllm_jax.load) and tinyllm_jax.model.Transformer\n"
        "assert 'jax' in sys.modules\n"
    )
    run_python("-c", code, check=True)


def test_the_package_knows_what_it_has() -> None:
    assert tinyllm_jax.load is load
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        tinyllm_jax.lod  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


# The command --------------------------------------------------------------------------------------


def test_the_command_prints_the_story_and_nothing_else_on_stdout(
    run: Path, model: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--checkpoint",
        str(run),
        "--prompt",
        "The cat",
        "--max-new-tokens",
        "8",
        "--seed",
        "4",
    ]
    assert command.main(words) == 0
    captured = capsys.readouterr()
    assert captured.out == model.generate("The cat", max_new_tokens=8, seed=4)[0] + "\n"
    assert "step 3" in captured.err
    assert "context" not in captured.err


def test_every_flag_of_the_command_reaches_the_sampler(
    run: Path, model: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--temperature 0.7 --top-k 9 --top-p 0.9 --repetition-penalty 1.2 --num-samples 3"
    flags += " --max-new-tokens 60 --slide --sampling.seed 2"
    command.main(["--checkpoint", str(run), "--prompt", "The", *flags.split()])
    expected = model.generate(
        "The",
        temperature=0.7,
        top_k=9,
        top_p=0.9,
        repetition_penalty=1.2,
        num_samples=3,
        max_new_tokens=60,
        slide=True,
        seed=2,
    )
    captured = capsys.readouterr()
    assert captured.out == f"\n{command.SEPARATOR}\n".join(expected) + "\n"
    command.main(["--checkpoint", str(run), "--prompt", "The", "--greedy"])
    assert capsys.readouterr().out == model.generate("The", greedy=True)[0] + "\n"


def test_a_full_context_is_said_on_stderr(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--checkpoint", str(run), "--max-new-tokens", "500", "--greedy"])
    assert f"context of {CONTEXT} tokens" in capsys.readouterr().err
    command.main(["--checkpoint", str(run), "--max-new-tokens", "60", "--greedy", "--slide"])
    assert "context" not in capsys.readouterr().err


def test_the_command_says_all_problems_at_once_in_lines_and_exits_with_2(run: Path) -> None:
    flags = ["--top-p", "3", "--temprature", "1", "--max-new-tokens", "x"]
    result = run_python("-m", "tinyllm_jax.generate", *flags, PYTHONWARNINGS="error")
    assert result.returncode == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("error: ") for line in lines)
    assert "Did you mean '--temperature'?" in result.stderr
    assert "--checkpoint is missing" in result.stderr


def test_a_prompt_too_long_for_the_context_is_refused_unless_it_may_slide(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", str(run), "--prompt", "The cat sat. " * 40, "--max-new-tokens", "3"]
    with pytest.raises(InputError, match=rf"tokens, and model.max_position_embeddings={CONTEXT}"):
        command.main(words)
    command.main([*words, "--slide"])
    assert capsys.readouterr().out.startswith("The cat sat. " * 40)
