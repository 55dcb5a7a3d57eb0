"""The command `evaluate`, its twin and transformers give the same numbers, and the right ones."""

import copy
import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command

import convert
from convert.transformers_side import TransformersSide
from tinyllm_jax import evaluate as command
from tinyllm_jax.data.chat import ASSISTANT, USER, Message
from tinyllm_jax.data.chat_template import CONTROL_TOKENS, ChatTemplate
from tinyllm_jax.data.tokenizer import Tokenizer, extend_tokenizer
from tinyllm_jax.data.toy_stories import generate_stories
from tinyllm_jax.errors import InputError
from tinyllm_jax.evaluation.scorer import TokenScorer
from tinyllm_jax.inference import language_model
from tinyllm_jax.inference.language_model import LanguageModel, load
from tinyllm_torch import evaluate as torch_command
from tinyllm_torch.inference import language_model as torch_language_model

# What the issue asks of all sides; float32 itself allows less.
TOLERANCE = 1e-4
CONTEXT = 64
STORIES = list(generate_stories(seed=9, start=0, stop=12))
# One that needs several windows, and one whose letters are bytes.
DOCUMENTS = [*STORIES[:3], " ".join(STORIES[3:6]), "Zoë saw a 猫.", "A cat sat."]
QUESTIONS = [
    {"query": f"{story[:40]}", "choices": [story[40:60], "a zebra", "it"], "gold": number % 3}
    for number, story in enumerate(STORIES)
]
# Cut on the left, so that the answers fit.
QUESTIONS += [{"question": " ".join(STORIES), "choices": ["Yes.", "No."], "answer": "A"}]
PAIRS = [
    {"good": story[:50], "bad": story[:25] + story[30:55], "phenomenon": f"kind {number % 2}"}
    for number, story in enumerate(STORIES)
]
PAIRS += [{"good": "The same.", "bad": "The same.", "phenomenon": "none"}]
TURNS = [
    {"role": USER, "content": "A story?"},
    {"role": ASSISTANT, "content": "A cat sat."},
    {"role": USER, "content": "More?"},
    {"role": ASSISTANT, "content": "A dog ran."},
]


def write_lines(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write small files of every kind."""
    folder = tmp_path_factory.mktemp("data")
    write_lines(folder / "stories.jsonl", [{"text": text, "story": "Go."} for text in DOCUMENTS])
    write_lines(folder / "questions.jsonl", QUESTIONS)
    write_lines(folder / "pairs.jsonl", PAIRS)
    write_lines(folder / "chat.jsonl", [{"messages": TURNS}, {"messages": TURNS[:2]}])
    write_lines(folder / "broken.jsonl", [QUESTIONS[0], {"query": "Go", "choices": ["a", "b"]}])
    (folder / "stories.txt").write_text("Once.<|endoftext|>Twice upon a time.\n\nHi.")
    return folder


@pytest.fixture(scope="module")
def model(trained_run: Path) -> LanguageModel:
    return load(trained_run)


@pytest.fixture(scope="module")
def chat_run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a model that has tokens for turns, of which it knows nothing."""
    bundle = convert.read(trained_run, prefer_best=True)
    assert bundle.tokenizer is not None
    bundle.tokenizer = extend_tokenizer(bundle.tokenizer, CONTROL_TOKENS)
    rows = np.random.default_rng(0).normal(0, 0.02, (2, bundle.model.hidden_size))
    weights = dict(bundle.weights)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = np.concatenate([weights[name], rows.astype(np.float32)])
    bundle.weights = weights
    bundle.model = dataclasses.replace(bundle.model, vocab_size=bundle.tokenizer.vocab_size)
    folder = tmp_path_factory.mktemp("chat") / "hf"
    convert.write(bundle, folder, to="hf")
    return folder


@pytest.fixture(autouse=True, scope="module")
def models_are_loaded_once() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for module in (language_model, torch_language_model):
            patch.setattr(module, "load", functools.cache(module.load))
        yield


COMMANDS = {"jax": command, "torch": torch_command}


def results_of(run: Path, out: Path, *flags: Any, package: str = "jax") -> dict[str, Any]:
    words = ["--checkpoint", str(run), "--out", str(out), *map(str, flags)]
    assert COMMANDS[package].main(words) == 0
    return json.loads(out.read_text())


# Right numbers --------------------------------------------------------------------------------------

Logits = Callable[[np.ndarray], np.ndarray]


def log_probs_of(logits: Logits, ids: list[int], start: int) -> np.ndarray:
    """Score one text of at most the context, a token at a time."""
    scores = logits(np.array([ids[:-1]], np.int32))[0].astype(np.float64)
    found = []
    for place in range(start, len(ids)):
        row = scores[place - 1]
        found.append(row[ids[place]] - row.max() - math.log(np.exp(row - row.max()).sum()))
    return np.array(found)


def expected_corpus(logits: Logits, tokenizer: Tokenizer) -> dict[str, float]:
    nats, ends, tokens, text_bytes = 0.0, 0.0, 0, 0
    for text in DOCUMENTS:
        ids = tokenizer.encode(text, bos=True, eos=True)
        # Windows of 64 tokens, each later one beginning 32 tokens after the one before.
        found = log_probs_of(logits, ids[: CONTEXT + 1], 1).tolist()
        done = CONTEXT + 1
        while done < len(ids):
            end = min(done + CONTEXT // 2, len(ids))
            begin = end - CONTEXT - 1
            found += log_probs_of(logits, ids[begin:end], done - begin).tolist()
            done = end
        assert len(found) == len(ids) - 1
        nats -= sum(found)
        ends -= found[-1]
        tokens += len(found)
        text_bytes += len(text.encode("utf-8"))
    return {
        "loss": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / text_bytes,
        "bits_per_byte_without_end": (nats - ends) / math.log(2) / text_bytes,
        "tokens": tokens,
        "bytes": text_bytes,
        "documents": 6,
        "documents_in_windows": 4,
    }


def expected_questions(logits: Logits, tokenizer: Tokenizer) -> dict[str, float]:
    right = {"acc": 0, "acc_norm": 0, "acc_bytes": 0}
    for question in QUESTIONS:
        prompt = question.get("query") or f"Question: {question['question']}\nAnswer:"
        prompt, blanks = prompt.rstrip(), prompt[len(prompt.rstrip()) :]
        first = tokenizer.encode(prompt, bos=True)
        totals = []
        for choice in question["choices"]:
            ids = tokenizer.encode(f"{prompt}{blanks} {choice}", bos=True)
            assert ids[: len(first)] == first
            cut = max(0, len(ids) - 1 - CONTEXT)
            totals.append(log_probs_of(logits, ids[cut:], len(first) - cut).sum())
        gold = question.get("gold", 0)
        characters = [len(choice) for choice in question["choices"]]
        octets = [len(choice.encode()) for choice in question["choices"]]
        right["acc"] += int(np.argmax(totals)) == gold
        right["acc_norm"] += int(np.argmax(np.divide(totals, characters))) == gold
        right["acc_bytes"] += int(np.argmax(np.divide(totals, octets))) == gold
    return {name: count / len(QUESTIONS) for name, count in right.items()} | {"questions_cut": 1}


def expected_pairs(logits: Logits, tokenizer: Tokenizer) -> dict[str, float]:
    right = []
    for pair in PAIRS:
        good, bad = (
            log_probs_of(logits, tokenizer.encode(pair[name], bos=True), 1).sum()
            for name in ("good", "bad")
        )
        right.append(good > bad)
    return {"acc": np.mean(right), "ties": 1, "pairs": len(PAIRS)}


@pytest.mark.parametrize("side", ["jax", "torch"])
def test_all_numbers_are_those_of_transformers(
    side: str, trained_run: Path, data: Path, model: LanguageModel, tmp_path: Path
) -> None:
    files = [data / f"{name}.jsonl" for name in ("stories", "questions", "pairs")]
    found = results_of(trained_run, tmp_path / "out.json", "--data", *files, package=side)
    oracle = TransformersSide(convert.read(trained_run, prefer_best=True), dtype="float32")
    makers = (expected_corpus, expected_questions, expected_pairs)
    for actual, make in zip(found["results"], makers, strict=True):
        for name, expected in make(oracle.logits, model.tokenizer).items():
            assert actual[name] == pytest.approx(expected, rel=TOLERANCE), name
    assert 0 < found["results"][1]["acc"] < 1
    assert found["results"][1]["acc"] != found["results"][1]["acc_norm"]
    assert found["results"][2]["phenomena"]["none"] == {
        "acc": 0.0, "acc_stderr": None, "pairs": 1,
    }  # fmt: skip


def test_the_twin_and_the_export_give_the_same_table(
    trained_run: Path, data: Path, tmp_path: Path
) -> None:
    convert.write(convert.read(trained_run, prefer_best=True), tmp_path / "hf", to="hf")
    flags = ["--data", "toy", data / "stories.txt", "--data.toy_documents", 9]
    tables = [
        results_of(run, tmp_path / "out.json", *flags, package=package)["results"]
        for package, run in (("jax", trained_run), ("torch", trained_run), ("jax", tmp_path / "hf"))
    ]
    for table in tables:
        for row in table:
            for name in ("seconds", "tokens_per_second"):
                assert row.pop(name) > 0
    for other in tables[1:]:
        for actual, expected in zip(other, tables[0], strict=True):
            assert actual.keys() == expected.keys()
            for name, value in expected.items():
                near = value if isinstance(value, str) else pytest.approx(value, rel=TOLERANCE)
                assert actual[name] == near, name
    toy = tables[0][0]
    assert toy["entropy_floor_bits_per_byte"] < toy["bits_per_byte"] < 8
    # Text files give their documents; blanks round them belong to them.
    assert tables[0][1]["bytes"] == len("Once.Twice upon a time.\n\nHi.")


def test_a_loss_is_the_one_of_training(trained_run: Path, tmp_path: Path) -> None:
    """A run's own validation rows cut documents elsewhere, so the numbers are near, not equal."""
    flags = ["--data", "toy", "--data.toy_documents", 100]
    found = results_of(trained_run, tmp_path / "out.json", *flags)["results"][0]
    rows = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    trained = [row["loss"] for row in rows if row["kind"] == "eval"][-1]
    assert found["loss"] == pytest.approx(trained, rel=0.1)


def test_float64_models_stay_float64(model: LanguageModel) -> None:
    ids = np.array([[2, 5, 7, 9]], np.int32)
    places = np.arange(3, dtype=np.int32)[None]
    wide = LanguageModel(
        dataclasses.replace(model.config, compute_dtype="float64"),
        {name: np.asarray(value, np.float64) for name, value in model.weights.items()},
        model.tokenizer,
    )
    found = {}
    for name, each in (("float32", model), ("float64", wide)):
        scorer = TokenScorer(each, compute_dtype="float32")
        log_probs, _ = scorer(ids[:, :-1], ids[:, 1:], places, np.ones((1, 3), np.int32))
        found[name] = log_probs
        assert log_probs.dtype == name
    np.testing.assert_allclose(found["float32"], found["float64"], rtol=1e-5)


# Conversations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", COMMANDS)
def test_answers_alone_are_scored_in_conversations(
    package: str, chat_run: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    found = results_of(chat_run, out, "--data", data / "chat.jsonl", package=package)
    chatter = load(chat_run)
    template = ChatTemplate(chatter.tokenizer)
    nats, tokens = 0.0, 0
    for turns in (TURNS, TURNS[:2]):
        ids, learn = template.encode([Message(turn["role"], turn["content"]) for turn in turns])
        log_probs = log_probs_of(chatter.logits, ids.tolist(), 1)
        nats -= log_probs[learn[1:]].sum()
        tokens += int(learn.sum())
    (actual,) = found["results"]
    assert actual["loss"] == pytest.approx(nats / tokens, rel=TOLERANCE)
    assert actual["tokens"] == tokens
    assert actual["bytes"] == 2 * len("A cat sat.") + len("A dog ran.")


def test_questions_are_asked_as_a_user(chat_run: Path, data: Path, tmp_path: Path) -> None:
    flags = ["--data", data / "questions.jsonl", "--chat", "--max-documents", 12]
    found = results_of(chat_run, tmp_path / "out.json", *flags)
    chatter = load(chat_run)
    template = ChatTemplate(chatter.tokenizer)
    right = 0
    for question in QUESTIONS[:12]:
        asked = template.encode_prompt([Message(USER, question["query"])]).tolist()
        totals = []
        for choice in question["choices"]:
            ids, _ = template.encode([Message(USER, question["query"]), Message(ASSISTANT, choice)])
            end = ids.tolist().index(template.end_id, len(asked))
            ids = ids.tolist()[:end]
            cut = max(0, len(ids) - 1 - CONTEXT)
            totals.append(log_probs_of(chatter.logits, ids[cut:], len(asked) - cut).sum())
        right += int(np.argmax(totals)) == question["gold"]
    assert found["results"][0]["acc"] == pytest.approx(right / 12)


# Stories ---------------------------------------------------------------------------------------------


def test_stories_are_written_and_measured(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--stories", 3, "--max-new-tokens", 20, "--prompt", "Once"]
    found = results_of(trained_run, tmp_path / "out.json", *flags)
    assert found["results"] == []
    stories = found["stories"]
    assert stories["stories"] == 3
    assert 0 < stories["words"] <= 20
    assert "3 stories that the model wrote" in capsys.readouterr().out


# Every setting ---------------------------------------------------------------------------------------

BASE: dict[str, Any] = {"data.paths": "stories.jsonl"}
WRITES: dict[str, Any] = {"evaluate.stories": 2, "sampling.max_new_tokens": 12}
ASKS: dict[str, Any] = {"data.paths": "questions.jsonl", "evaluate.max_documents": 12}
CHATS: dict[str, Any] = {"data.paths": "chat.jsonl"}
# Another value of each setting, and what must be set besides for it to show.
EVALUATE_SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "evaluate.kind": ("corpus", {"data.paths": "both.jsonl"}),
    "evaluate.prompt": ("{question} zebra", ASKS),
    "evaluate.chat": ("true", ASKS),
    "evaluate.max_documents": (2, BASE),
    "evaluate.stories": (1, WRITES),
    "evaluate.context": (32, BASE),
    "evaluate.overlap": (0, BASE),
    "evaluate.compute_dtype": ("model", BASE),
    "evaluate.batch_size": (1, BASE),
    "evaluate.out": ("other.json", BASE),
    "data.paths": ("questions.jsonl", BASE),
    "data.text_field": ("story", BASE),
    "data.document_separator": ("\n\n", {"data.paths": "stories.txt"}),
    "data.min_document_characters": (11, BASE),
    "data.on_bad_record": ("skip", {"data.paths": "broken.jsonl"}),
    "data.toy_documents": (3, {"data.paths": "toy", "data.toy_documents": 4}),
    "data.toy_seed": (2, {"data.paths": "toy", "data.toy_documents": 4}),
    "data.download_source": ("modelscope", {"data.paths": "tinystories"}),
    "chat.format": ("alpaca", CHATS),
    "chat.system": ("Be kind.", CHATS),
    "sampling.prompt": ("The dog", WRITES),
    "sampling.max_new_tokens": (9, WRITES),
    "sampling.temperature": (3.0, WRITES),
    "sampling.top_k": (1, WRITES),
    "sampling.top_p": (0.01, WRITES),
    "sampling.repetition_penalty": (5.0, {**WRITES, "sampling.greedy": "true"}),
    "sampling.greedy": ("true", WRITES),
    "sampling.seed": (1, WRITES),
    "sampling.num_samples": (2, WRITES),  # is refused
    "sampling.slide": ("true", {**WRITES, "sampling.max_new_tokens": 90}),
}


@pytest.mark.slow
def test_every_setting_changes_what_is_told(
    chat_run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:10")
    monkeypatch.setattr("time.sleep", lambda _: None)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for file in data.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write_lines(tmp_path / "both.jsonl", [{"text": "Once.", **PAIRS[0]}])
    # What the model's own settings say must differ from float32.
    chatter = copy.copy(language_model.load(chat_run))
    chatter.config = dataclasses.replace(chatter.config, compute_dtype="bfloat16")
    monkeypatch.setattr(language_model, "load", lambda _: chatter)
    known: dict[str, Any] = {}

    def told(settings: dict[str, Any]) -> Any:
        key = str(sorted(settings.items()))
        if key not in known:
            known[key] = tell(settings, tmp_path)
        return known[key]

    for name, (changed, beside) in EVALUATE_SETTINGS.items():
        assert told({**beside, name: changed}) != told(beside), name
    assert tell(BASE, tmp_path) == told(BASE), "it changes by itself"
    assert tell(WRITES, tmp_path) == told(WRITES), "it changes by itself"


def tell(settings: dict[str, Any], folder: Path) -> Any:
    """Evaluate, and give what is told but times, and the file's name; or the refusal."""
    flags = ["--checkpoint", "run", "--out", "out.json"]
    for key, value in settings.items():
        flags += [f"--{key}", str(value)]
    try:
        command.main(flags)
    except InputError as error:
        return str(error)
    (file,) = (path for name in ("out", "other") if (path := folder / f"{name}.json").exists())
    table = json.loads(file.read_text())
    file.unlink()
    for row in table["results"]:
        del row["seconds"], row["tokens_per_second"], row["name"]
    return file.name, table["results"], table.get("stories")


# What a person sees -----------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_says_on_stderr_what_it_does(
    trained_run: Path, data: Path, command: Command
) -> None:
    files = [str(data / f"{name}.jsonl") for name in ("questions", "pairs")]
    done = command.run("evaluate", "--checkpoint", str(trained_run), "--data", *files)
    assert done.returncode == 0, done.stderr
    assert "questions.jsonl (choices): 13 questions, 1 cut to the context" in done.stdout
    assert "by chance 0.3462" in done.stdout
    assert "pairs.jsonl (pairs): 13 pairs, 1 ties" in done.stdout
    assert "kind 1" in done.stdout
    assert "Compiled in" in done.stderr
    assert "step 20" in done.stderr or "step 10" in done.stderr


def test_nothing_said_is_answered_with_what_to_type(command: Command) -> None:
    done = command.run("evaluate")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --checkpoint is missing. Type python -m tinyllm_jax.eval")
    assert done.stderr.count("\n") == 1


REFUSALS = [
    ([], "--data is missing. Name files or folders"),
    (["--data", "nowhere"], "--data 'nowhere': no such file or folder"),
    (["--data", "{data}/broken.jsonl"], r"broken.jsonl:2: nothing says which answer is right"),
    (["--data", "{data}/chat.jsonl"], "This tokenizer has no control tokens"),
    (["--data", "{data}/questions.jsonl", "--chat"], "This tokenizer has no control tokens"),
    (["--data", "{data}/stories.jsonl", "--evaluate.kind", "pairs"], "stories.jsonl:1: no fields 'go"),
    (["--data", "{data}/stories.txt", "--evaluate.kind", "pairs"], "stories.txt: documents, not rec"),
    (["--data", "{data}/stories.jsonl", "--data.text_field", "no"], "stories.jsonl:1: no text, conv"),
    (["--data", "{data}/stories.jsonl", "--evaluate.context", "65"], "evaluate.context=65 is more than"),
    (["--data", "{data}/stories.jsonl", "--evaluate.overlap", "64"], "evaluate.overlap=64 leaves noth"),
    (["--data", "toy", "--evaluate.prompt", "Q"], "evaluate.prompt='Q' has no {question}"),
    (["--data", "toy", "--out", "{data}"], "a folder. Name a file"),
    (["--data", "toy", "--sampling.num_samples", "4"], "Use --stories 4"),
    (["--data", "toy", "--storys", "4"], "--storys: no such flag. Did you mean '--stories'?"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "message"), REFUSALS)
def test_what_cannot_be_done_is_one_line(
    flags: list[str], message: str, trained_run: Path, data: Path, capsys: Any
) -> None:
    words = [word.replace("{data}", str(data)) for word in flags]
    with pytest.raises(InputError) as caught:
        command.main(["--checkpoint", str(trained_run), *words])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_broken_records_can_be_left_out_and_are_counted(
    trained_run: Path, data: Path, tmp_path: Path
) -> None:
    flags = ["--data", data / "broken.jsonl", "--data.on_bad_record", "skip"]
    (found,) = results_of(trained_run, tmp_path / "out.json", *flags)["results"]
    assert (found["questions"], found["bad_records"]) == (1, 1)


def test_questions_are_read_from_parquet_too(trained_run: Path, data: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(QUESTIONS[:12]), tmp_path / "test-0.parquet")
    flags = ["--max-documents", 12, "--data"]
    tables = [
        results_of(trained_run, tmp_path / "out.json", *flags, path)["results"][0]
        for path in (tmp_path / "test-0.parquet", data / "questions.jsonl")
    ]
    assert tables[0]["acc_norm"] == tables[1]["acc_norm"]
    assert tables[0]["questions"] == 12


def test_real_questions_and_pairs_are_read(
    shared_data: Path, trained_run: Path, tmp_path: Path
) -> None:
    flags = ["--data", shared_data / "eval", "--max-documents", 4]
    found = results_of(trained_run, tmp_path / "out.json", *flags)["results"]
    kinds = {Path(each["name"]).stem: each["kind"] for each in found}
    assert kinds == {
        "blimp_tenth": "pairs",
        **dict.fromkeys(("arc_easy", "copa", "openbook_qa", "piqa"), "choices"),
    }
