"""What an evaluation computes: windows, shapes of records, accuracies, errors, stories."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllm_jax.config import EvaluateConfig, TokenizerConfig
from tinyllm_jax.data.chat_records import BadRecord
from tinyllm_jax.data.tokenizer import train_tokenizer
from tinyllm_jax.data.toy_stories import generate_stories
from tinyllm_jax.errors import InputError
from tinyllm_jax.evaluation import harness
from tinyllm_jax.evaluation.files import DataSet, find_data_sets
from tinyllm_jax.evaluation.measures import mean, ratio
from tinyllm_jax.evaluation.records import Pair, Question, kind_of, pair_of, question_of
from tinyllm_jax.evaluation.stories import Story, measure_stories, words_of
from tinyllm_jax.evaluation.tasks import measure, open_job
from tinyllm_jax.evaluation.windows import Reader, Text, cut, keep_end, pack
from tinyllm_jax.settings import build

# Windows --------------------------------------------------------------------------------------------

lengths = st.integers(0, 60)


@given(lengths, st.integers(1, 60), st.integers(1, 12), st.integers(0, 11))
def test_windows_score_each_token_once_behind_as_much_context_as_was_asked(
    count: int, start: int, context: int, overlap: int
) -> None:
    overlap = min(overlap, context - 1)
    text = Text(list(range(count)), start)
    scored = []
    for number, window in enumerate(cut(text, context=context, overlap=overlap)):
        assert 1 < len(window.ids) <= context + 1
        assert window.ids == list(range(window.ids[0], window.ids[-1] + 1))
        assert 1 <= window.start < len(window.ids)
        before = window.ids[window.start]  # tokens of the text before the first scored one
        assert window.start >= min(overlap + 1, before) or number == 0
        scored += window.ids[window.start :]
    assert scored == list(range(start, count))


@pytest.mark.parametrize("overlap", [0, 1, 3, 6])
@pytest.mark.parametrize("count", [1, 6, 7, 8, 9, 20, 35])
def test_windows_of_documents_are_those_of_lm_evaluation_harness(count: int, overlap: int) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    tokens = list(range(count))
    rolling = utils.get_rolling_token_windows(
        token_list=tokens, prefix_token=-1, max_seq_len=7, context_len=overlap + 1
    )
    expected = [([*read, scored[-1]], scored) for read, scored in rolling]
    windows = cut(Text([-1, *tokens], 1), context=7, overlap=overlap)
    assert [(window.ids, window.ids[window.start :]) for window in windows] == expected


@given(st.lists(st.integers(1, 30)))
def test_packing_takes_every_piece_once_and_overfills_no_row(sizes: list[int]) -> None:
    rows = pack(sizes, width=30)
    assert sorted(number for row in rows for number in row) == list(range(len(sizes)))
    assert all(sum(sizes[number] for number in row) <= 30 for row in rows)
    # No two rows would have fitted into one.
    totals = sorted(sum(sizes[number] for number in row) for row in rows)
    assert len(totals) < 2 or totals[0] + totals[1] > 30


def test_only_what_is_read_beforehand_is_cut_to_the_context() -> None:
    assert keep_end(Text(list(range(9)), 7), context=5) == Text([3, 4, 5, 6, 7, 8], 4)
    fits, scored_whole = Text(list(range(6)), 3), Text(list(range(9)), 2)
    assert keep_end(fits, context=5) is fits
    assert keep_end(scored_whole, context=5) is scored_whole


class BigramScorer:
    """A model whose log-probabilities are a table: log p(b after a), and so easily known."""

    table = np.log(np.random.default_rng(0).dirichlet(np.ones(50), 50))

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(
        self, tokens: np.ndarray, targets: np.ndarray, positions: np.ndarray, segments: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        self.shapes.append(tokens.shape)
        for row in range(len(tokens)):
            for segment in range(1, segments[row].max() + 1):
                mine = positions[row][segments[row] == segment]
                np.testing.assert_array_equal(mine, np.arange(len(mine)))
        log_probs = self.table[tokens, targets]
        return log_probs.astype(np.float32), self.table[tokens].argmax(-1) == targets


def test_texts_come_back_in_order_with_their_own_log_probabilities() -> None:
    numbers = np.random.default_rng(1)
    texts = [
        Text(numbers.integers(0, 50, size).tolist(), int(numbers.integers(1, size)))
        for size in numbers.integers(2, 1500, 60)
    ]
    table = BigramScorer.table
    greedy = [0]
    for _ in range(5):
        greedy.append(int(table[greedy[-1]].argmax()))
    texts.append(Text(greedy, 1))
    scorer = BigramScorer()
    reader = Reader(scorer, context=100, overlap=30, batch_size=3)
    found = list(reader.score(texts))
    for text, scored in zip(texts, found, strict=True):
        expected = [table[text.ids[i - 1], text.ids[i]] for i in range(text.start, len(text.ids))]
        np.testing.assert_allclose(scored.log_probs, expected, rtol=1e-6)
        assert scored.total == pytest.approx(sum(expected), rel=1e-6)
    assert [scored.is_greedy for scored in found] == [False] * 60 + [True]
    assert set(scorer.shapes) == {(3, 512)}, "one program for all"
    assert reader.batches == len(scorer.shapes)
    assert reader.tokens < 0.97 * 3 * 512 * reader.batches < 1.2 * reader.tokens


# Numbers --------------------------------------------------------------------------------------------


def test_a_mean_has_the_usual_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=40)
    expected = np.std(values, ddof=1) / math.sqrt(40)
    assert mean(list(values)) == pytest.approx((values.mean(), expected))
    assert mean([2.0]) == (2.0, None)


def test_the_standard_error_of_a_ratio_is_what_the_ratio_varies_by() -> None:
    numbers = np.random.default_rng(0)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        wholes = numbers.integers(20, 200, 300).astype(float)
        return wholes * numbers.normal(2, 0.3, 300) + numbers.normal(0, 5, 300), wholes

    found = [ratio(*draw()) for _ in range(400)]
    varies = np.std([each.value for each in found])
    told = np.mean([each.stderr or 0 for each in found])
    assert told == pytest.approx(varies, rel=0.1)  # 400 draws tell a deviation to 3.5 %


# Records --------------------------------------------------------------------------------------------

CUED = "Question: Why?\nAnswer:"
SHAPES: list[tuple[dict[str, Any], str, tuple[str, ...], int]] = [
    # As llm-foundry gives them
    ({"query": "The man fell, so", "choices": ["a", "b"], "gold": 1}, "The man fell, so", ("a", "b"), 1),
    ({"query": "Question: Why?\n", "choices": ["a", "b"], "gold": 0}, CUED, ("a", "b"), 0),
    # ARC on the hub, and of its authors
    (
        {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        CUED, ("x", "y"), 1,
    ),
    (
        {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        CUED, ("x", "y"), 1,
    ),
    (
        {
            "question": {
                "stem": "Why?",
                "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}],
            },
            "answerKey": "A",
        },
        CUED, ("x", "y"), 0,
    ),
    # A whole number that is a label is no place
    (
        {"question": "Why?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]},
         "answerKey": 2},
        CUED, ("x", "y", "z"), 1,
    ),
    (
        {"question": "Why?", "choices": {"text": ["x", "y"], "label": [1, 2]}, "answerKey": 1},
        CUED, ("x", "y"), 0,
    ),
    # OpenBookQA
    (
        {"question_stem": "Cats eat", "choices": {"text": ["x", "y"], "label": ["A", "B"]},
         "answerKey": "B"},
        "Cats eat", ("x", "y"), 1,
    ),
    # PIQA
    ({"goal": "Why?", "sol1": "x", "sol2": "y", "label": 1}, CUED, ("x", "y"), 1),
    # COPA
    (
        {"premise": "It broke.", "choice1": "It fell.", "choice2": "I ran.", "question": "cause",
         "label": 0},
        "It broke because", ("it fell.", "i ran."), 0,
    ),
    (
        {"premise": "It broke.", "choice1": "It fell.", "choice2": "I ran.", "question": "effect",
         "label": "1"},
        "It broke therefore", ("it fell.", "i ran."), 1,
    ),
    # HellaSwag
    (
        {"activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "ctx": "A man sits. he",
         "endings": ["falls [substeps] down.", "sings."], "label": "1"},
        "Roof: A man sits. He", ("falls down.", "sings."), 1,
    ),
    # SciQ
    (
        {"question": "Why?", "distractor1": "a", "distractor2": "b", "distractor3": "c",
         "correct_answer": "d", "support": " Since."},
        f"Since.\n{CUED}", ("a", "b", "c", "d"), 3,
    ),
    # MMLU, and other usual names
    ({"question": "Why?", "choices": ["a", "b", "c"], "answer": 2}, CUED, ("a", "b", "c"), 2),
    ({"question": "Why?", "options": ["4", "2", "0"], "answer": "2"}, CUED, ("4", "2", "0"), 1),
    ({"question": "Why?", "options": ["x", "y"], "answer": "b"}, CUED, ("x", "y"), 1),
    ({"question": "Why?", "choices": [4, 2, 0], "gold": "2"}, CUED, ("4", "2", "0"), 2),
    ({"context": "Go", "endings": ["x", "y"], "label": 0}, "Go", ("x", "y"), 0),
]  # fmt: skip


@pytest.mark.parametrize(("record", "prompt", "choices", "gold"), SHAPES)
def test_questions_of_every_shape_are_read(
    record: dict[str, Any], prompt: str, choices: tuple[str, ...], gold: int
) -> None:
    assert kind_of(record, text_field="text") == "choices"
    question = question_of(record)
    assert (question.prompt(""), question.choices, question.gold) == (prompt, choices, gold)


def test_what_supports_an_answer_is_read_by_a_user_too() -> None:
    record = next(record for record, *_ in SHAPES if "support" in record)
    question = question_of(record)
    assert question.asked == "Since.\nWhy?"
    assert question.prompt("Q: {question} A:") == "Since.\nQ: Why? A:"


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("choices", {"query": "Go", "choices": ["x", "y"], "gold": 0}),
        ("pairs", {"good": "He goes.", "bad": "He go."}),
    ],
)
def test_a_model_that_gives_no_numbers_is_told(
    kind: str, record: dict[str, Any], tmp_path: Path
) -> None:
    path = lines(tmp_path / "data.jsonl", record)
    tokenizer = train_tokenizer(
        [*generate_stories(seed=3, start=0, stop=20)],
        config=TokenizerConfig(kind="bytelevel"),
        vocab_size=300,
    )

    def broken(tokens: np.ndarray, *_: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.full(tokens.shape, np.nan, np.float32), np.zeros(tokens.shape, bool)

    config = build(EvaluateConfig, [("", {"data.paths": (path,)})])
    (data_set,) = find_data_sets(config, say=str)
    assert data_set.kind == kind
    reader = Reader(broken, context=16, overlap=8, batch_size=2)
    with pytest.raises(InputError, match="log-likelihoods are no numbers"):
        measure(
            open_job(data_set, config),
            reader=reader,
            tokenizer=tokenizer,
            on_progress=lambda _: None,
        )


def test_a_cue_of_ones_own_stands_round_the_question() -> None:
    question = Question("Why {?", "Question: {question}\nAnswer:", ("a", "b"), 0)
    assert question.prompt("Q: {question} A:") == "Q: Why {? A:"


def test_pairs_are_read_as_their_authors_give_them() -> None:
    blimp = {"sentence_good": "A", "sentence_bad": "B", "UID": "island", "field": "syntax"}
    assert pair_of(blimp) == Pair("A", "B", "island")
    assert pair_of({"good": "A", "bad": "B"}) == Pair("A", "B", "")
    assert kind_of(blimp, text_field="text") == "pairs"


WRONG = [
    ({"query": "Go", "choices": ["x", "y"]}, "nothing says which answer is right; fields: query, choi"),
    ({"query": "Go", "choices": ["x", "y"], "gold": 2}, "'gold' is 2, and there are 2 answers"),
    ({"query": "Go", "choices": ["x", "y"], "gold": -1}, "Test splits often come without answers"),
    ({"ctx": "Go", "endings": ["x", "y"], "label": ""}, "Test splits often come without answers"),
    ({"query": "Go", "choices": ["x", "y"], "answer": "z z"}, "'answer' is 'z z'"),
    ({"query": "Go", "choices": ["x"], "gold": 0}, "no list of two answers or more"),
    ({"query": "Go", "choices": "xy", "gold": 0}, "no list of two answers or more"),
    ({"query": "Go", "choices": ["x", ""], "gold": 0}, "answer 2 of 'choices'\" is empty"),
    ({"query": "Go", "choices": ["x", None], "gold": 0}, "is a JSON NoneType, not text"),
    ({"query": " ", "choices": ["x", "y"], "gold": 0}, "'query' is empty"),
    ({"choices": ["x", "y"], "gold": 0}, "nothing says a question"),
    ({"query": "Go", "choices": {"text": ["x", "y"], "label": ["A"]}, "gold": 0}, "2 answers and 1 lab"),
    ({"premise": "P.", "choice1": "a", "choice2": "b", "label": 0}, "Use 'cause' or 'effect'"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "message"), WRONG)
def test_a_wrong_question_says_what_is_wrong(record: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecord) as caught:
        question_of(record)
    assert message in str(caught.value)


# Files ----------------------------------------------------------------------------------------------


def sets_of(*words: str, **settings: Any) -> list[DataSet]:
    values = {"data.paths": words, **settings}
    return find_data_sets(build(EvaluateConfig, [("", values)]), say=lambda _: None)


def lines(path: Path, *records: dict[str, Any]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


PAIR = {"good": "A b.", "bad": "B a.", "phenomenon": "order"}
CHOICE = {"query": "Go", "choices": ["x", "y"], "gold": 0}


def test_what_a_file_holds_is_seen_in_its_first_record(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    records = {
        "choices": CHOICE, "corpus": {"text": "Once."}, "conversations": {"messages": turns},
        "pairs": PAIR,
    }  # fmt: skip
    for kind, record in records.items():
        lines(tmp_path / "all" / f"{kind}.jsonl", record)
    (tmp_path / "all" / "more.txt").write_text("Twice.")
    folder = str(tmp_path / "all")
    found = {each.kind: each for each in sets_of(folder)}
    assert sorted(found) == sorted(records)
    # Documents count as one corpus, everything else by file.
    assert found["corpus"].name == folder
    assert [Path(path).name for path in found["corpus"].paths] == ["corpus.jsonl", "more.txt"]
    assert found["pairs"].name == str(tmp_path / "all" / "pairs.jsonl")
    named = sets_of(str(tmp_path / "all" / "pairs.jsonl"), **{"evaluate.kind": "corpus"})
    assert [each.kind for each in named] == ["corpus"]


def test_of_a_folder_with_splits_the_held_out_one_is_read(tmp_path: Path) -> None:
    for name in ("train-0", "validation-0", "test-0"):
        lines(tmp_path / "set" / f"{name}.jsonl", {"text": name})
    said = []
    values = {"data.paths": (str(tmp_path / "set"),)}
    (found,) = find_data_sets(build(EvaluateConfig, [("", values)]), say=said.append)
    assert [Path(path).name for path in found.paths] == ["validation-0.jsonl"]
    assert "1 of 3 files are read, those for validation" in said[0]
    explicit = str(tmp_path / "set" / "train-0.jsonl")
    assert sets_of(explicit) == [DataSet(explicit, "corpus", (explicit,))]


# Stories --------------------------------------------------------------------------------------------


def told(texts: Sequence[str], *, prompt: str = "", ended: str = "eos") -> dict[str, Any]:
    return measure_stories([Story(prompt, text, ended) for text in texts])


def test_words_are_counted_without_the_prompt() -> None:
    found = told(["Once upon a cat. The cat sat.", "Once upon a dog."], prompt="Once upon a")
    assert found["words"] == 2.5  # "cat the cat sat", "dog"
    assert found["distinct_1"] == 4 / 5
    assert found["distinct_2"] == 1.0
    assert found["self_repetition"] == 0.0
    found = words_of("Tim's dog, the \u201cRex\u201d, isn\u2019t 12!")
    assert found == ["tim's", "dog", "the", "rex", "isn\u2019t", "12"]


def test_a_story_that_goes_in_circles_repeats_itself() -> None:
    words = "one two three four five "
    assert told([words * 3])["self_repetition"] == pytest.approx(7 / 12)
    # What another story says is no repetition, but no new word either.
    found = told([words, words])
    assert found["self_repetition"] == 0.0
    assert found["distinct_3"] == 0.5


def test_the_grammar_knows_its_own_stories_and_their_sentences() -> None:
    stories = list(generate_stories(seed=5, start=0, stop=6))
    found = told(stories)
    assert found["grammatical_sentences"] == found["grammatical_stories"] == 1.0
    assert found["ended_share"] == 1.0
    other = told([stories[0], "My xylophone is out of tune. It is."])
    assert other["grammatical_stories"] == 0.5
    assert 0.5 < other["grammatical_sentences"] < 1.0
    # The last sentence of a story that was cut off is nobody's fault.
    cut_off = told([stories[0][:-3]], ended="length")
    assert cut_off["grammatical_sentences"] == 1.0
    assert cut_off["grammatical_stories"] == cut_off["ended_share"] == 0.0
    assert told(["Nothing of it"], ended="length")["grammatical_sentences"] == 0.0


# lm-evaluation-harness ------------------------------------------------------------------------------


def test_without_the_harness_its_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(InputError, match=r"pip install 'tinyllm\[eval\]'"):
        harness.main()
