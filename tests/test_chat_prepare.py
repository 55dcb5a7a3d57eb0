"""Prepared conversations, pairs and prompts: only answers are learnt, whole turns, all counted."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllm_jax.config import ChatConfig, Config, DataConfig, ModelConfig, TokenizerConfig
from tinyllm_jax.data import shards
from tinyllm_jax.data.batches import Batches, EvaluationBatches
from tinyllm_jax.data.chat import ChatCounts, read_conversations
from tinyllm_jax.data.chat_template import CONTROL_TOKENS, ChatTemplate
from tinyllm_jax.data.prepare_chat import prepare_conversations, prepare_preferences
from tinyllm_jax.data.prepare_prompts import prepare_prompts
from tinyllm_jax.data.shards import Split
from tinyllm_jax.data.tokenizer import Tokenizer, extend_tokenizer, train_tokenizer
from tinyllm_jax.data.toy_stories import generate_stories
from tinyllm_jax.errors import InputError

STORIES = [*generate_stories(seed=7, start=0, stop=60)]
SEQUENCE = 128


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture(scope="module", params=["sentencepiece", "bytelevel"])
def tokenizer(request) -> Tokenizer:
    config = TokenizerConfig(kind=request.param)
    return extend_tokenizer(train_tokenizer(STORIES, config=config, vocab_size=450), CONTROL_TOKENS)


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    made = train_tokenizer(STORIES, config=TokenizerConfig(), vocab_size=450)
    return extend_tokenizer(made, CONTROL_TOKENS)


def make_config(*paths: Path, chat: ChatConfig | None = None, **data: Any) -> Config:
    settings = {"packing": "packed", "sequence_length": SEQUENCE, "validation_fraction": 0.2}
    settings |= {"paths": tuple(map(str, paths)), **data}
    return Config(
        data=DataConfig(**settings),
        model=ModelConfig(),
        chat=ChatConfig() if chat is None else chat,
    )


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def sentence(number: int) -> str:
    return STORIES[number % 60][:30] + str(number)


def conversations(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Make conversations of one or two exchanges, each of its own."""
    return [
        {"messages": turns(*(f"{word} {n}?" if i % 2 == 0 else sentence(100 * i + n)
                             for i, word in enumerate(["Tell", "", "More", ""][: 2 + 2 * (n % 2)])))}
        for n in range(first, first + count)
    ]  # fmt: skip


def pairs(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Tell {n}", "chosen": sentence(n), "rejected": sentence(n + 1), "number": n}
        for n in range(first, first + count)
    ]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def learnt(split: Split, tokenizer: Tokenizer) -> list[str]:
    """Read every answer that a whole evaluation learns, in order."""
    template = ChatTemplate(tokenizer)
    found: list[str] = []
    for batch in EvaluationBatches(split, batch_size=3, count=0):
        for targets, mask in zip(batch.targets, batch.loss_mask, strict=True):
            answer: list[int] = []
            for id in targets[mask].tolist():
                answer.append(id)
                if id == template.end_id:
                    found.append(template.decode_answer(answer))
                    answer = []
            assert not answer, "an answer without its end"
    return found


def answers(records: list[dict[str, Any]]) -> list[str]:
    rows = [turn for record in records for turn in record["messages"]]
    return [turn["content"] for turn in rows if turn["role"] == "assistant"]


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_every_answer_is_learnt_once_and_nothing_else(packing, tokenizer, tmp_path):
    records = conversations(60)
    path = write(tmp_path / "chat.jsonl", records)
    config = make_config(path, packing=packing)
    prepared = prepare_conversations(config, tokenizer=tokenizer, progress=False)
    found = [learnt(split, tokenizer) for split in (prepared.train, prepared.validation)]
    assert sorted([*found[0], *found[1]]) == sorted(answers(records))
    assert found[0]
    assert found[1]
    for split in (prepared.train, prepared.validation):
        batches = EvaluationBatches(split, batch_size=2, count=0)
        assert sum(int(batch.loss_mask.sum()) for batch in batches) == split.learnt_tokens
        stated = prepared.stats["splits"][split.name]
        assert stated["learnt_tokens"] == split.learnt_tokens
    sizes = [sum(len(answer.encode()) for answer in each) for each in found]
    assert [prepared.train.text_bytes, prepared.validation.text_bytes] == sizes
    prepared.verify()


def test_packed_conversations_stand_side_by_side_and_never_see_each_other(tokenizer, tmp_path):
    path = write(tmp_path / "chat.jsonl", conversations(60))
    prepared = prepare_conversations(make_config(path), tokenizer=tokenizer, progress=False)
    split = prepared.train
    rows = sum(len(shard.tokens) for shard in split.shards)
    assert rows < split.documents
    batch = Batches(split, rows_per_step=4, seed=0).batch(0)
    assert batch.segment_ids is not None
    assert batch.positions is not None
    starts = batch.positions == 0
    assert (batch.tokens[starts & (batch.segment_ids > 0)] == tokenizer.bos_id).all()
    assert not batch.loss_mask[batch.segment_ids == 0].any()
    # A target is in the document of the token before it.
    assert not (
        batch.loss_mask[:, :-1] & (batch.segment_ids[:, 1:] != batch.segment_ids[:, :-1])
    ).any()


def test_a_set_is_made_once_and_again_for_another_setting(sentencepiece, tmp_path, monkeypatch):
    path = write(tmp_path / "chat.jsonl", conversations(30))
    config = make_config(path)
    first = prepare_conversations(config, tokenizer=sentencepiece, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(ChatTemplate, "encode_many", None)
        again = prepare_conversations(config, tokenizer=sentencepiece, progress=False)
    assert again.folder == first.folder
    assert again.dataset_hash == first.dataset_hash
    changed = dataclasses.replace(config, chat=ChatConfig(system="Be kind."))
    other = prepare_conversations(changed, tokenizer=sentencepiece, progress=False)
    assert other.folder != first.folder
    assert other.dataset_hash != first.dataset_hash
    write(path, conversations(31))
    newer = prepare_conversations(config, tokenizer=sentencepiece, progress=False)
    assert newer.dataset_hash != first.dataset_hash


def test_long_conversations_end_with_the_last_answer_that_fits(sentencepiece, tmp_path, capsys):
    template = ChatTemplate(sentencepiece)
    long = turns(*[sentence(number) for number in range(12)])
    hopeless = turns("Hi", STORIES[0] * 3)
    records = [{"messages": long}, {"messages": hopeless}, *conversations(40)]
    path = write(tmp_path / "chat.jsonl", records)
    prepared = prepare_conversations(make_config(path), tokenizer=sentencepiece, progress=False)
    (counts,) = prepared.stats["files"]
    assert (counts["records_read"], counts["records_kept"]) == (42, 41)
    assert (counts["too_long"], counts["cut"]) == (1, 1)
    kept = 12 - counts["cut_turns"]
    assert kept % 2 == 0
    found = [*learnt(prepared.train, sentencepiece), *learnt(prepared.validation, sentencepiece)]
    expected = [turn["content"] for turn in long[1:kept:2]]
    assert sorted(found) == sorted([*answers(records[2:]), *expected])

    def size(count: int) -> int:
        prompt = [turn["content"] for turn in long[:count]]
        record = write(tmp_path / "one.jsonl", [{"messages": turns(*prompt)}])
        source = read_conversations(
            str(record), data=DataConfig(), chat=ChatConfig(), counts=ChatCounts()
        )
        return len(template.encode(next(source).messages)[0])

    assert size(kept) <= SEQUENCE + 1 < size(kept + 2)
    said = capsys.readouterr().err
    assert "1 left out, too long" in said
    assert "1 cut at a turn" in said


def test_a_conversation_that_fills_a_row_is_whole_and_one_token_less_cuts_it(
    sentencepiece, tmp_path
):
    long = {"messages": turns(*[sentence(number) for number in range(4)])}
    path = write(tmp_path / "chat.jsonl", [long, *conversations(20)])
    messages = next(
        read_conversations(str(path), data=DataConfig(), chat=ChatConfig(), counts=ChatCounts())
    ).messages
    size = len(ChatTemplate(sentencepiece).encode(messages)[0])
    for sequence_length, cut in ((size - 1, 0), (size - 2, 1)):
        config = make_config(path, sequence_length=sequence_length)
        prepared = prepare_conversations(config, tokenizer=sentencepiece, progress=False)
        assert prepared.stats["files"][0]["cut"] == cut


def test_masks_do_not_touch_the_ids_of_large_vocabularies(sentencepiece, tmp_path, monkeypatch):
    config = make_config(write(tmp_path / "chat.jsonl", conversations(20)))
    small = prepare_conversations(config, tokenizer=sentencepiece, progress=False)
    monkeypatch.setattr(shards, "token_dtype", lambda _: np.dtype(np.uint32))
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(tmp_path / "other"))
    large = prepare_conversations(config, tokenizer=sentencepiece, progress=False)
    assert large.train.shards[0].tokens.dtype == np.uint32
    assert large.train.shards[0].tokens.tolist() == small.train.shards[0].tokens.tolist()


def test_copies_of_validation_conversations_are_not_trained_on(sentencepiece, tmp_path):
    train = write(tmp_path / "a-train.jsonl", conversations(20))
    held_out = write(tmp_path / "a-validation.jsonl", conversations(10, first=15))
    config = make_config(train, held_out)
    prepared = prepare_conversations(config, tokenizer=sentencepiece, progress=False)
    assert prepared.validation.documents == 10
    assert prepared.train.documents == 15
    counts = {Path(file["path"]).name: file for file in prepared.stats["files"]}
    assert counts["a-train.jsonl"]["also_in_validation"] == 5
    assert not {*learnt(prepared.train, sentencepiece)} & {*answers(conversations(10, first=15))}


def test_copies_fall_on_the_same_side(sentencepiece, tmp_path):
    path = write(tmp_path / "chat.jsonl", conversations(30) * 2)
    prepared = prepare_conversations(make_config(path), tokenizer=sentencepiece, progress=False)
    for split in (prepared.train, prepared.validation):
        found = learnt(split, sentencepiece)
        assert sorted(found) == sorted([*{*found}] * 2)


def test_what_asks_the_same_falls_on_the_same_side(sentencepiece, tmp_path):
    """Of each question there are several answers, under several system prompts, as pairs too."""
    systems = [[], [{"role": "system", "content": "Be kind."}]]
    answered = [
        {"messages": [*systems[n % 2], *turns(f"Tell {n % 20}?", sentence(n))]} for n in range(100)
    ]
    paired = [
        {"prompt": f" Tell {n % 20}?", "chosen": sentence(n), "rejected": sentence(n + 1)}
        for n in range(100)
    ]
    files = {
        "chat": write(tmp_path / "chat.jsonl", answered),
        "pairs": write(tmp_path / "pairs.jsonl", paired),
    }
    kept = {"tokenizer": sentencepiece, "progress": False}
    pieces = prepare_conversations(make_config(files["chat"]), **kept)
    chosen = prepare_preferences(make_config(files["pairs"]), **kept)
    asked = prepare_prompts(make_config(files["pairs"]), **kept)
    answer_of = {sentence(n): n % 20 for n in range(100)}
    template = ChatTemplate(sentencepiece)
    found: list[list[set[int]]] = [[], [], []]
    for name in ("train", "validation"):
        found[0].append({answer_of[text] for text in learnt(getattr(pieces, name), sentencepiece)})
        split = getattr(chosen, name)
        rows = split.read(range(split.pairs))
        found[1].append(
            {
                answer_of[template.decode_answer(targets[mask])]
                for targets, mask in zip(rows["chosen_targets"], rows["chosen_mask"], strict=True)
            }
        )
        prompts = getattr(asked, name).prompts
        found[2].append({int(each.messages[0].content.strip(" Tel?")) for each in prompts})
    for train, validation in found:
        assert train
        assert validation
        assert not train & validation
    assert found[0] == found[1] == found[2]


def test_validation_files_of_the_person_keep_their_questions_and_that_is_told(
    sentencepiece, tmp_path, capsys
):
    same = {"messages": turns("Tell 3 ?", "Another one.")}
    write(tmp_path / "a-train.jsonl", [*conversations(20), same])
    write(tmp_path / "a-validation.jsonl", [{"messages": turns("Tell 3 ?", "This one.")}])
    config = make_config(tmp_path / "a-train.jsonl", tmp_path / "a-validation.jsonl")
    prepared = prepare_conversations(config, tokenizer=sentencepiece, progress=False)
    assert prepared.train.documents == 21
    assert sum(file["asked_in_validation"] for file in prepared.stats["files"]) == 1
    said = capsys.readouterr().err
    assert "1 ask what validation asks, too" in said


def test_bad_records_stop_or_are_counted(sentencepiece, tmp_path, capsys):
    path = write(tmp_path / "chat.jsonl", [*conversations(30), {"messages": turns("only")}])
    with pytest.raises(InputError, match=r"chat.jsonl:31: no assistant turn"):
        prepare_conversations(make_config(path), tokenizer=sentencepiece, progress=False)
    config = make_config(path, on_bad_record="skip")
    prepared = prepare_conversations(config, tokenizer=sentencepiece, progress=False)
    assert prepared.stats["files"][0]["bad_records"] == 1
    assert "1 broken records left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"packing": "stream"}, "data.packing=stream cuts text anywhere"),
        ({"paths": ("toy",)}, "--data toy: stories, not conversations"),
        ({"sequence_length": 4}, "30 are longer than data.sequence_length=4"),
        ({"validation_fraction": 1e-9}, "leaves none for the validation split"),
    ],
)
def test_settings_that_leave_nothing_are_refused(data, message, sentencepiece, tmp_path):
    path = write(tmp_path / "chat.jsonl", conversations(30))
    config = make_config(path, **data)
    with pytest.raises(InputError, match=message):
        prepare_conversations(config, tokenizer=sentencepiece, progress=False)


def test_the_packing_of_pretraining_is_a_stream_unless_it_is_named():
    assert Config().data.packing == "stream"
    assert Config(data=DataConfig(packing="packed")).data.packing == "packed"


def test_pairs_come_by_number_with_their_answers_alone_learnt(tokenizer, tmp_path):
    records = pairs(40)
    path = write(tmp_path / "pairs.jsonl", records)
    data = prepare_preferences(make_config(path), tokenizer=tokenizer, progress=False)
    assert data.train.pairs + data.validation.pairs == 40
    assert data.train.pairs
    assert data.validation.pairs
    template = ChatTemplate(tokenizer)
    found = []
    for split in (data.train, data.validation):
        rows = split.read(range(split.pairs))
        assert {array.shape for array in rows.values()} == {(split.pairs, SEQUENCE)}
        for n in range(split.pairs):
            texts = []
            for side in ("chosen", "rejected"):
                targets, mask = rows[f"{side}_targets"][n], rows[f"{side}_mask"][n]
                assert targets[mask][-1] == template.end_id
                texts.append(template.decode_answer(targets[mask]))
                first = np.flatnonzero(mask)[0]
                assert rows[f"{side}_tokens"][n][1:].tolist() == targets[:-1].tolist()
                texts.append(tokenizer.decode(rows[f"{side}_tokens"][n][: first + 1]))
            assert texts[1] == texts[3]
            assert "Tell" in texts[1]
            found.append((texts[0], texts[2]))
        alone = split.read([split.pairs - 1, -1])
        for name, array in alone.items():
            assert array[0].tolist() == rows[name][-1].tolist()
        assert not alone["chosen_mask"][1].any()
        assert not alone["rejected_mask"][1].any()
        assert (alone["chosen_tokens"][1] == tokenizer.pad_id).all()
    expected = [(record["chosen"], record["rejected"]) for record in records]
    assert sorted(found) == sorted(expected)
    order = [expected.index(pair) for pair in found[: data.train.pairs]]
    assert order == sorted(order), "numbers follow the files"


def test_a_pair_with_a_side_too_long_is_left_out_whole(sentencepiece, tmp_path):
    long = {"prompt": "Tell", "chosen": "No.", "rejected": STORIES[0] * 3}
    path = write(tmp_path / "pairs.jsonl", [long, *pairs(30)])
    data = prepare_preferences(make_config(path), tokenizer=sentencepiece, progress=False)
    assert data.stats["files"][0]["too_long"] == 1
    assert data.train.pairs + data.validation.pairs == 30


def test_prompts_end_with_the_head_of_an_answer_and_keep_their_fields(tokenizer, tmp_path):
    path = write(tmp_path / "pairs.jsonl", [*pairs(30), {"prompt": "word " * 300}])
    config = make_config(path)
    data = prepare_prompts(config, tokenizer=tokenizer, progress=False)
    assert data.train.count + data.validation.count == 30
    assert data.stats["files"][0]["too_long"] == 1
    template = ChatTemplate(tokenizer)
    first, second = data.train.read([0, 1])
    assert first.ids.tolist() == template.encode_prompt(first.messages).tolist()
    assert first.messages[-1].content == f"Tell {first.metadata['number']}"
    assert first.metadata["number"] < second.metadata["number"]
    again = prepare_prompts(config, tokenizer=tokenizer, progress=False)
    assert again.dataset_hash == data.dataset_hash
    write(path, pairs(29))
    fewer = prepare_prompts(config, tokenizer=tokenizer, progress=False)
    assert fewer.dataset_hash != data.dataset_hash


def test_real_conversations_and_pairs_are_all_accounted_for(sentencepiece, shared_data):
    config = make_config(
        shared_data / "chat/alpaca_zh_demo.json",
        shared_data / "chat/sharegpt_toolcall_en_demo.json",
        sequence_length=1024,
    )
    prepared = prepare_conversations(config, tokenizer=sentencepiece, progress=False)
    files = prepared.stats["files"]
    assert [file["records_read"] for file in files] == [1000, 300]
    left_out = [file["bad_records"] + file["too_long"] for file in files]
    assert [file["records_kept"] for file in files] == [1000 - left_out[0], 300 - left_out[1]]
    assert prepared.train.documents + prepared.validation.documents == 1300 - sum(left_out)
    assert files[1]["cut"] > 0
    config = make_config(shared_data / "preference/dpo_en_demo.json", sequence_length=1024)
    data = prepare_preferences(config, tokenizer=sentencepiece, progress=False)
    assert data.train.pairs + data.validation.pairs == data.stats["files"][0]["records_kept"] > 50
