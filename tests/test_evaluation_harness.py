"""lm-evaluation-harness finds on our models what we find: its tasks, its windows, its accuracies."""

import json
from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="no lm-evaluation-harness: the extra 'eval'")

from tinyllm_jax import evaluate as command  # noqa: E402
from tinyllm_jax.data.toy_stories import generate_stories  # noqa: E402
from tinyllm_jax.errors import InputError  # noqa: E402
from tinyllm_jax.evaluation.harness_model import (  # noqa: E402
    HarnessModel,
    LanguageModel,
    as_sampling,
    up_to,
)
from tinyllm_jax.inference.language_model import load  # noqa: E402

# The harness's own code, and what it imports, warn of what is none of our business.
pytestmark = pytest.mark.filterwarnings("ignore")

STORIES = list(generate_stories(seed=4, start=0, stop=8))
QUESTIONS = [
    {"query": story[:40] + " " * (number % 2), "choices": [story[40:60], "a zoo", "it"], "gold": 0}
    for number, story in enumerate(STORIES)
]
PAIRS = [{"good": story[:50], "bad": story[:25] + story[30:55]} for story in STORIES]
TASKS = {
    "questions": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
    },
    "pairs": {
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "target_delimiter": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[good, bad]}}",
        "metric_list": [{"metric": "acc"}],
    },
    "stories": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="module")
def model(trained_run: Path) -> LanguageModel:
    return load(trained_run)


@pytest.mark.slow
def test_the_harness_and_our_command_give_the_same_numbers(
    trained_run: Path, model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = {"questions": QUESTIONS, "pairs": PAIRS, "stories": [{"text": t} for t in STORIES]}
    tasks: list[Any] = []
    for name, records in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        files = {"data_files": {"test": str(path)}}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        tasks.append(task | TASKS[name])
    theirs = lm_eval.simple_evaluate(HarnessModel(model), tasks=tasks)["results"]
    # The harness's windows do not overlap.
    flags = ["--evaluate.overlap", "0", "--out", str(tmp_path / "out.json"), "--data"]
    files = [str(tmp_path / f"{name}.jsonl") for name in rows]
    assert command.main(["--checkpoint", str(trained_run), *flags, *files]) == 0
    ours = {
        Path(row["name"]).stem: row
        for row in json.loads((tmp_path / "out.json").read_text())["results"]
    }
    for name in ("acc", "acc_norm", "acc_bytes"):
        assert ours["questions"][name] == theirs["questions"][f"{name},none"]
        assert ours["questions"][f"{name}_stderr"] == pytest.approx(
            theirs["questions"][f"{name}_stderr,none"]
        )
    assert ours["pairs"]["acc"] == theirs["pairs"]["acc,none"]
    # Our last windows read one token less of the beginning, since eos is scored, too.
    assert ours["stories"]["bits_per_byte_without_end"] == pytest.approx(
        theirs["stories"]["bits_per_byte,none"], rel=1e-4
    )
    assert 0 < ours["pairs"]["acc"] < 1


class Request:
    """What the harness hands over."""

    def __init__(self, *args: Any):
        self.args = args


def test_answers_end_before_a_stop_string(model: LanguageModel) -> None:
    harness = HarnessModel(model, batch_size=2, device="cpu")
    settings = {"until": ["."], "max_gen_toks": 12}
    prompts = ["Once upon", "The dog", " ".join(STORIES)]  # the last fills the context
    found = harness.generate_until([Request(prompt, settings) for prompt in prompts])
    assert len(found) == 3
    assert not any("." in text for text in found)
    (whole,) = model.generate("The dog", max_new_tokens=12, greedy=True, slide=True)
    assert found[1] == whole.removeprefix("The dog").split(".")[0]


def test_settings_of_tasks_are_understood() -> None:
    sampling, stops = as_sampling({"until": "x", "do_sample": True, "temperature": 0.5})
    assert (sampling.greedy, sampling.temperature, stops) == (False, 0.5, ["x"])
    sampling, stops = as_sampling({"max_gen_toks": 9})
    assert (sampling.greedy, sampling.max_new_tokens, stops) == (True, 9, [])
    assert up_to("a b c d", ["c", "b"]) == "a "


def test_an_unknown_argument_is_refused(model: LanguageModel) -> None:
    with pytest.raises(InputError, match="--model_args colour: no such setting. Use checkpoint"):
        HarnessModel(model, colour="red")
