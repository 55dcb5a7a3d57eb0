"""The promise of `make tiny`: near the entropy floor, a story that the grammar could have told, and
the same story wherever its checkpoint is taken."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import Command

import tinyllm_jax
import tinyllm_torch
from convert.__main__ import main as convert_main
from tinyllm_jax.data.toy_stories import sentence_is_grammatical, split_sentences
from tinyllm_jax.training.checkpoint import read_checkpoint
from tinyllm_jax.training.metrics import read_metrics

OPTIMIZED = True

PROMPT = "Once upon a time"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, prepared_folder: Path) -> Command:
    return Command(tmp_path_factory.mktemp("tiny"), prepared_folder)


@pytest.fixture(scope="module")
def tiny_run(home: Command) -> tuple[Path, str]:
    """Give the run folder of the whole preset, and what the command printed."""
    done = home.run("train", "--config", "tiny", timeout=1500)
    assert done.returncode == 0, done.stderr
    return home.options["cwd"] / "checkpoints/pretrain_tiny", done.stderr


def test_the_tiny_preset_comes_within_a_tenth_of_the_floor_and_tells_a_grammatical_story(
    home: Command, tiny_run: tuple[Path, str]
):
    run, printed = tiny_run
    rows = read_metrics(run / "metrics.jsonl")
    last = [row for row in rows if row["kind"] == "eval"][-1]
    assert 0 < last["above_floor_share"] < 0.10
    waits = [row["data_wait_share"] for row in rows if row["kind"] == "speed"]
    assert sorted(waits)[len(waits) // 2] < 0.03
    story = [row for row in rows if row["kind"] == "sample"][-1]["text"]
    assert story in printed
    assert_grammatical(story)
    written = home.run(
        "generate", "--checkpoint", str(run), "--prompt", PROMPT, "--temperature", "0.5"
    )
    assert written.returncode == 0, written.stderr
    assert_grammatical(written.stdout.strip())


def test_its_checkpoint_goes_round_the_formats_bitwise_and_tells_one_story_everywhere(
    tiny_run: tuple[Path, str], tmp_path: Path
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _ = tiny_run
    stops = [run / "best", tmp_path / "story.pt", tmp_path / "hf", tmp_path / "jax"]
    stops += [tmp_path / "story.bin", tmp_path / "back"]
    formats = ["torch", "hf", "orbax", "llama2c", "orbax"]
    for (source, target), to in zip(pairwise(stops), formats, strict=True):
        assert convert_main([str(source), str(target), "--to", to]) == 0
    before = read_checkpoint((run / "best").resolve()).weights
    (last,) = (tmp_path / "back" / "checkpoints").iterdir()
    after = read_checkpoint(last).weights
    assert before.keys() == after.keys()
    for name, weight in before.items():
        np.testing.assert_array_equal(after[name], weight, err_msg=name)

    longest = {"max_new_tokens": 160, "greedy": True}
    story = tinyllm_jax.load(run / "best").generate(PROMPT, **longest)[0]
    assert len(split_sentences(story)) >= 5, story
    for place in ("hf", "story.bin", "back"):
        assert tinyllm_jax.load(tmp_path / place).generate(PROMPT, **longest)[0] == story
    for place in ("story.pt", "hf"):
        assert tinyllm_torch.load(tmp_path / place).generate(PROMPT, **longest)[0] == story
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    rows = theirs.generate(
        **tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=160, do_sample=False
    )
    assert tokenizer.decode(rows[0], skip_special_tokens=True) == story


def assert_grammatical(story: str) -> None:
    sentences = split_sentences(story)
    assert len(sentences) >= 5, story
    for sentence in sentences:
        assert sentence_is_grammatical(sentence), (sentence, story)
