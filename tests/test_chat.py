"""Conversations are read from every shape people have, and what is none is told by file and line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tinyllm_jax.config import ChatConfig, DataConfig
from tinyllm_jax.data.chat import (
    ChatCounts,
    Message,
    read_conversations,
    read_preferences,
    read_questions,
)
from tinyllm_jax.errors import InputError

HI = {"role": "user", "content": "你好 <|im_end|>"}
YES = {"role": "assistant", "content": "Yes.\n"}
TURNS = (Message("user", "你好 <|im_end|>"), Message("assistant", "Yes.\n"))
READERS = {
    "conversations": read_conversations,
    "preferences": read_preferences,
    "questions": read_questions,
}


def written(folder: Path, *records: Any, name: str = "chat.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return str(path)


def read(path: str, *, kind: str = "conversations", skip: bool = False, **chat: str) -> list[Any]:
    data = DataConfig(on_bad_record="skip" if skip else "error")
    return [*READERS[kind](path, data=data, chat=ChatConfig(**chat), counts=ChatCounts())]


SHAPES = {
    "messages": {"messages": [HI, YES]},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": HI["content"]},
            {"from": "gpt", "value": YES["content"]},
        ]
    },
    "alpaca": {"instruction": HI["content"], "input": "", "output": YES["content"]},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", ["auto", "named"])
def test_each_shape_gives_the_same_turns(shape, format, tmp_path):
    path = written(tmp_path, SHAPES[shape])
    found = read(path, format=shape if format == "named" else "auto")
    assert [conversation.messages for conversation in found] == [TURNS]
    assert found[0].place == f"{path}:1"


def test_a_named_shape_is_the_one_that_is_read(tmp_path):
    path = written(tmp_path, {**SHAPES["messages"], "instruction": "Go.", "output": "Gone."})
    assert read(path)[0].messages == TURNS
    other = (Message("user", "Go."), Message("assistant", "Gone."))
    assert read(path, format="alpaca")[0].messages == other
    with pytest.raises(InputError, match=r"chat.jsonl:1: no field 'conversations'; fields: messa"):
        read(path, format="sharegpt")


def test_alpaca_joins_its_input_and_begins_with_its_history(tmp_path):
    record = {"instruction": "Add.", "input": "1 + 1", "output": "2", "history": [["a", "b"]]}
    assert read(written(tmp_path, record | {"system": "Be exact."}))[0].messages == (
        Message("system", "Be exact."),
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "Add.\n1 + 1"),
        Message("assistant", "2"),
    )


def test_turns_of_tools_are_told_and_their_descriptions_stand_in_the_system_prompt(tmp_path):
    names = ["human", "function_call", "observation", "observation", "gpt"]
    turns = [{"from": name, "value": name} for name in names]
    record = {"conversations": turns, "tools": '[{"name": "f"}]'}
    found = read(written(tmp_path, record), system="Help.")[0].messages
    assert found[0] == Message("system", 'Help.\n\n[{"name": "f"}]')
    roles = ["user", "assistant", "tool", "tool", "assistant"]
    assert [message.role for message in found[1:]] == roles


def test_the_default_system_prompt_is_only_for_those_without_one(tmp_path):
    own, empty = ({"role": "system", "content": text} for text in ("Own.", ""))
    rows = [{"messages": [*first, HI, YES]} for first in ([], [own], [empty])]
    path = written(tmp_path, *rows)
    firsts = [conversation.messages[0] for conversation in read(path, system="Default.")]
    assert firsts == [Message("system", text) for text in ("Default.", "Own.", "")]
    assert read(path)[0].messages == TURNS


def test_tools_that_a_system_turn_holds_stand_below_it(tmp_path):
    first = {"role": "system", "content": "Help.", "tools": [{"name": "f"}]}
    found = read(written(tmp_path, {"messages": [first, HI, YES]}))[0].messages
    assert found == (Message("system", 'Help.\n\n[{"name": "f"}]'), *TURNS)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.zst", "a.jsonl.gz", "a.ndjson"])
@pytest.mark.parametrize("begin", ["", "\ufeff", " \n"])
def test_arrays_and_lines_are_read_compressed_or_not_with_their_lines(name, begin, tmp_path):
    rows = [SHAPES["messages"], SHAPES["alpaca"]]
    if ".json" in name and ".jsonl" not in name:
        text, lines = json.dumps(rows, indent=1, ensure_ascii=False), (2, 14)
    else:
        text, lines = "\n".join(json.dumps(row) for row in rows), (1, 2)
    content = (begin + text).encode()
    content = gzip.compress(content) if name.endswith("gz") else content
    content = zstandard.compress(content) if name.endswith("zst") else content
    (tmp_path / name).write_bytes(content)
    found = read(str(tmp_path / name))
    assert [conversation.messages for conversation in found] == [TURNS, TURNS]
    shift = begin.count("\n")
    places = [f"{tmp_path / name}:{line + shift}" for line in lines]
    assert [conversation.place for conversation in found] == places


ASK = {"role": "user", "content": "?"}
BAD = {
    "turn 2 is of 'user' after 'user', where 'assistant' must come": {"messages": [ASK, ASK]},
    "turn 1 is of 'assistant' at the beginning": {"messages": [YES, ASK, YES]},
    "turn 3 is of 'assistant' after 'assistant'": {"messages": [HI, YES, YES]},
    "turn 2 is of 'system' after 'user'": {
        "messages": [ASK, {"role": "system", "content": "x"}, YES]
    },
    "turn 2 is an empty answer": {"messages": [ASK, {"role": "assistant", "content": " \n"}]},
    "no assistant turn": {"messages": [ASK]},
    "the last turn is of 'user', and nothing answers it": {"messages": [HI, YES, ASK]},
    "no user turn": {"messages": [{"role": "system", "content": "x"}]},
    "'messages' is no list of turns": {"messages": []},
    "turn 1 of 'messages' has the role 'wizard'": {"messages": [{"role": "wizard", "content": ""}]},
    "turn 1 of 'messages' has no 'role'": {"messages": [{"who": "user"}]},
    "turn 1 of 'messages' is a JSON str": {"messages": ["hello"]},
    "'content' of turn 2 of 'messages' is a JSON int": {
        "messages": [ASK, {"role": "assistant", "content": 3}]
    },
    "has 'tool_calls', which are not read": {
        "messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [{}]}]
    },
    "half of a surrogate pair": {"messages": [ASK, {"role": "assistant", "content": "\ud83d"}]},
    "no field 'messages' or 'conversations' or 'instruction'; fields: text": {"text": "x"},
    "a JSON list, not an object": [1],
    "exchange 1 of 'history' is no pair": {"instruction": "x", "output": "y", "history": ["ab"]},
    "'history' is a JSON int": {"instruction": "x", "output": "y", "history": 3},
    "output is a JSON list, not text": {"instruction": "x", "output": ["y"]},
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_no_conversation_is_refused_with_its_line_or_counted(message, tmp_path):
    path = tmp_path / "chat.jsonl"
    lines = [json.dumps(row) for row in (SHAPES["messages"], BAD[message], SHAPES["alpaca"])]
    path.write_text("\n\n".join(lines))
    with pytest.raises(InputError) as caught:
        read(str(path))
    said = str(caught.value)
    assert said.startswith(f"{path}:3: ")
    assert message in said
    assert "--data.on_bad_record skip" in said
    counts = ChatCounts()
    data = DataConfig(on_bad_record="skip")
    kept = [*read_conversations(str(path), data=data, chat=ChatConfig(), counts=counts)]
    assert [conversation.messages for conversation in kept] == [TURNS, TURNS]
    assert (counts.records_read, counts.bad_records) == (3, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"messages": \n', r"chat.jsonl:1: not JSON \(Expecting value"),
        (b'{"a": "\xff"}\n', r"chat.jsonl:1: not UTF-8 \(byte 7"),
        (b"[" * 100000 + b"\n", "chat.jsonl:1: a broken JSON array"),
        (b'[{"a": 1},\n {"a" 2}]', r"chat.jsonl:\d: "),
        (b'[{"instruction": "a", "output": "b"}\n', "chat.jsonl:2: a broken JSON array"),
        (b'[{"instruction": "a", "output": "b"}\n] {}', "chat.jsonl:2: a broken JSON array"),
    ],
)
def test_broken_json_is_told_by_its_line(content, message, tmp_path):
    (tmp_path / "chat.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(str(tmp_path / "chat.jsonl"))


def test_a_broken_array_is_never_skipped(tmp_path):
    (tmp_path / "chat.json").write_text('[{"instruction": "a", "output": "b"}, {"x" 1}]')
    with pytest.raises(InputError, match="not skipped"):
        read(str(tmp_path / "chat.json"), skip=True)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "chat.txt").write_text("hello")
    with pytest.raises(InputError, match="conversations are read from .jsonl"):
        read(str(tmp_path / "chat.txt"))


A, B = ({"role": "assistant", "content": text} for text in ("good", "bad"))
PAIRS = {
    "prompt and texts": {"prompt": "?", "chosen": "good", "rejected": "bad"},
    "prompt of turns": {"prompt": [ASK], "chosen": [A], "rejected": [B]},
    "messages": {"messages": [ASK], "chosen": A, "rejected": B},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "?"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "alpaca": {"instruction": "?", "input": "", "chosen": "good", "rejected": "bad"},
    "whole conversations": {"chosen": [ASK, A], "rejected": [ASK, B]},
    "whole conversations beside a prompt": {
        "prompt": "?",
        "chosen": [ASK, A],
        "rejected": [ASK, B],
    },
}


@pytest.mark.parametrize("shape", PAIRS)
def test_pairs_of_every_shape_are_the_same(shape, tmp_path):
    (found,) = read(written(tmp_path, PAIRS[shape]), kind="preferences")
    assert found.prompt == (Message("user", "?"),)
    assert found.chosen == (Message("assistant", "good"),)
    assert found.rejected == (Message("assistant", "bad"),)


def test_pairs_part_at_the_first_answer_that_differs(tmp_path):
    chosen, rejected = [ASK, YES, ASK, A, ASK, A], [ASK, YES, ASK, B]
    (found,) = read(written(tmp_path, {"chosen": chosen, "rejected": rejected}), kind="preferences")
    assert [len(part) for part in (found.prompt, found.chosen, found.rejected)] == [3, 3, 1]


BAD_PAIRS = {
    "chosen and rejected are the same": {"prompt": "?", "chosen": "x", "rejected": "x"},
    "no field 'rejected'; fields: prompt, chosen": {"prompt": "?", "chosen": "x"},
    "chosen: turn 2 is an empty answer": {"prompt": "?", "chosen": " ", "rejected": "x"},
    "rejected: turn 2 is an empty answer": {"prompt": "?", "chosen": "x", "rejected": ""},
    "part at turn 1, which is not an answer in both": {
        "chosen": [ASK, A],
        "rejected": [HI, A],
    },
    "part at turn 3, which": {"chosen": [ASK, A, ASK, A], "rejected": [ASK, A]},
    "no field 'messages' or": {"chosen": "x", "rejected": "y"},
    "chosen does not end with an answer": {"chosen": [ASK, A, ASK], "rejected": [ASK, B]},
    "rejected is a JSON int": {"prompt": "?", "chosen": "x", "rejected": {"role": "gpt", "content": 3}},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_PAIRS)
def test_what_is_no_pair_is_refused_with_its_line_or_left_out(message, tmp_path):
    path = written(tmp_path, PAIRS["messages"], BAD_PAIRS[message])
    wanted = (
        message if "rejected is a JSON" not in message else "turn 1 of 'rejected' is a JSON int"
    )
    with pytest.raises(InputError) as caught:
        read(path, kind="preferences")
    assert str(caught.value).startswith(f"{path}:2: ")
    assert wanted in str(caught.value)
    assert len(read(path, kind="preferences", skip=True)) == 1


@pytest.mark.parametrize(
    ("record", "turns", "answer", "metadata"),
    [
        ({"prompt": "?", "gold": 3}, 1, "", {"gold": 3}),
        ({"messages": [HI, YES, ASK, A], "words": ["a"]}, 3, "good", {"words": ["a"]}),
        ({"messages": [HI, YES, ASK]}, 3, "", {}),
        ({"instruction": "x", "input": "y"}, 1, "", {}),
        ({"instruction": "x", "output": "z"}, 1, "z", {}),
        (PAIRS["prompt and texts"], 1, "", {"chosen": "good", "rejected": "bad"}),
    ],
)
def test_prompts_keep_what_else_a_record_says(record, turns, answer, metadata, tmp_path):
    (found,) = read(written(tmp_path, record), kind="questions")
    assert (len(found.messages), found.answer, found.metadata) == (turns, answer, metadata)
    assert found.messages[-1].role == "user"


@pytest.mark.parametrize("record", [{"messages": [YES]}, {"prompt": []}, {"prompt": [YES, ASK]}])
def test_a_record_without_a_turn_to_answer_is_no_prompt(record, tmp_path):
    with pytest.raises(InputError, match=r"chat.jsonl:1: "):
        read(written(tmp_path, record), kind="questions")


@pytest.mark.parametrize(("answer", "kept"), [("42", "42"), (42, "42"), (None, "")])
def test_a_prompt_has_the_answer_that_its_record_names(tmp_path: Path, answer: Any, kept: str):
    path = tmp_path / "sums.jsonl"
    path.write_text(json.dumps({"prompt": "6 * 7?", "answer": answer, "level": 1}) + "\n")
    settings = {"data": DataConfig(), "chat": ChatConfig(), "counts": ChatCounts()}
    [question] = read_questions(str(path), **settings)
    assert question.answer == kept
    assert question.metadata == {"level": 1}


def test_an_array_with_a_number_too_long_to_read_is_named(tmp_path: Path):
    path = tmp_path / "long.json"
    path.write_text('[\n{"prompt": "Hi", "id": ' + "7" * 5000 + "}]")
    settings = {"data": DataConfig(), "chat": ChatConfig(), "counts": ChatCounts()}
    with pytest.raises(InputError, match=r"long.json:2: a broken JSON array"):
        [*read_questions(str(path), **settings)]
