"""The newcomer's look: every part of it is printed, and its numbers are those of training."""

from pathlib import Path

import pytest
from conftest import SMALL_RUN

from tinyllm_jax import inspect
from tinyllm_jax.errors import InputError
from tinyllm_jax.training.metrics import read_metrics


@pytest.fixture(autouse=True)
def one_data_folder(monkeypatch, prepared_folder):
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))


def test_the_step_shown_is_the_first_step_of_training(capsys, trained_run: Path):
    assert inspect.main([*SMALL_RUN, "--max-steps", "20"]) == 0
    printed = capsys.readouterr().out
    first = read_metrics(trained_run / "metrics.jsonl")[0]
    assert f"loss {first['loss']:.4f} nats per token" in printed
    assert f"gradient norm {first['grad_norm']:.4f}" in printed
    for words in ("cpu: cpu", "tokens                int32   [4, 64]", "segment_ids", "embed_tokens.weight",
                  "parameters", "|gradient|", "Continuation of 'Once upon a time'"):  # fmt: skip
        assert words in printed


def test_a_trained_run_is_shown_with_its_own_settings(capsys, trained_run: Path):
    assert inspect.main(["--checkpoint", str(trained_run)]) == 0
    printed = capsys.readouterr().out
    assert "512 x 32" in printed
    assert "untrained" not in printed


def test_a_continuation_may_be_sampled_in_other_ways_than_the_runs_of_a_mode(trained_run: Path):
    """Answers that are learnt from are always sampled at temperature 1."""
    words = ["--checkpoint", str(trained_run), "--mode", "rlhf", "--rlhf.reward", "a:b"]
    start = inspect.read_command([*words, "--temperature", "0.3"])
    assert (start.config.run.mode, start.config.sampling.temperature) == ("rlhf", 0.3)
    with pytest.raises(InputError, match="sampling.temperature=-1"):
        inspect.read_command([*words, "--temperature", "-1"])


def test_settings_that_do_not_fit_the_checkpoint_are_refused(trained_run: Path):
    with pytest.raises(InputError, match="model.hidden_size=32 .this run has 64."):
        inspect.main(["--checkpoint", str(trained_run), "--model.hidden_size", "64"])
    with pytest.raises(InputError, match="Leave one of them out"):
        inspect.main(["--checkpoint", str(trained_run), "--config", "tiny"])
