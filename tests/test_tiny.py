"""The promise of `make tiny`: near the entropy floor, and a story that the grammar could have told."""

import pytest
from conftest import Command

from tinyllm_jax.data.toy_stories import sentence_is_grammatical, split_sentences
from tinyllm_jax.training.metrics import read_metrics


@pytest.mark.slow
def test_the_tiny_preset_comes_within_a_tenth_of_the_floor_and_tells_a_grammatical_story(
    command: Command,
):
    done = command.run("train", "--config", "tiny", timeout=1500)
    assert done.returncode == 0, done.stderr
    run = command.options["cwd"] / "checkpoints/pretrain_tiny"
    rows = read_metrics(run / "metrics.jsonl")
    last = [row for row in rows if row["kind"] == "eval"][-1]
    assert 0 < last["above_floor_share"] < 0.10
    waits = [row["data_wait_share"] for row in rows if row["kind"] == "speed"]
    assert sorted(waits)[len(waits) // 2] < 0.03
    story = [row for row in rows if row["kind"] == "sample"][-1]["text"]
    assert story in done.stderr
    assert_grammatical(story)
    written = command.run(
        "generate", "--checkpoint", str(run), "--prompt", "Once upon a time", "--temperature", "0.5"
    )
    assert written.returncode == 0, written.stderr
    assert_grammatical(written.stdout.strip())


def assert_grammatical(story: str) -> None:
    sentences = split_sentences(story)
    assert len(sentences) >= 5, story
    for sentence in sentences:
        assert sentence_is_grammatical(sentence), (sentence, story)
