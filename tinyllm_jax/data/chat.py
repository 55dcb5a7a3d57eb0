"""Conversations, preferences and prompts out of records, in the shapes that people have."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from tinyllm_jax.config import ChatConfig, DataConfig
from tinyllm_jax.data.chat_records import BadRecord, read_records
from tinyllm_jax.errors import InputError

T = TypeVar("T")

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"
# What others call the roles; a function call is something the assistant says.
ROLES = {
    **dict.fromkeys(("system", "developer"), SYSTEM),
    **dict.fromkeys(("user", "human"), USER),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "function_call"), ASSISTANT),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), TOOL),
}
# Which roles may come next.
FOLLOWERS = {
    "": (SYSTEM, USER),
    SYSTEM: (USER,),
    USER: (ASSISTANT,),
    ASSISTANT: (USER, TOOL),
    TOOL: (TOOL, ASSISTANT),
}
# The field that holds the turns, by the name of the shape.
FIELDS = {"messages": "messages", "sharegpt": "conversations", "alpaca": "instruction"}


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str  # system, user, assistant or tool
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns in a possible order, the last of them an answer."""

    messages: tuple[Message, ...]
    place: str  # file:line


@dataclass(frozen=True)
class Preference:
    """Two ways to go on with a prompt, each beginning and ending with an answer."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    place: str  # file:line


@dataclass(frozen=True)
class Question:
    """Turns that an answer comes after."""

    messages: tuple[Message, ...]
    answer: str  # the one that the record has; "" where it has none
    metadata: dict[str, Any]  # the other fields of the record, as they are
    place: str  # file:line


@dataclass
class ChatCounts:
    """What became of the records of a file."""

    records_read: int = 0
    records_kept: int = 0
    bad_records: int = 0  # left out
    also_in_validation: int = 0  # left out
    asked_in_validation: int = 0  # not left out for that: the first user turn stands there, too
    too_long: int = 0  # left out: not even the first answer fits a row
    cut: int = 0  # kept up to a turn
    cut_turns: int = 0  # left out of those that were cut
    longest_tokens: int = 0  # sequence_length at which nothing would be too long

    def leave_out_long(self, tokens: int) -> None:
        """Count a record that needs rows of so many tokens."""
        self.too_long += 1
        self.longest_tokens = max(self.longest_tokens, tokens)

    def to_table(self) -> dict[str, int]:
        """Give the counts by name."""
        return asdict(self)


def read_conversations(
    path: str, *, data: DataConfig, chat: ChatConfig, counts: ChatCounts
) -> Iterator[Conversation]:
    """Read the conversations of a file of JSONL, or of one JSON array.

    Args:
        counts: Filled while reading.

    Raises:
        InputError: the file is damaged, or a record is no conversation and `data.on_bad_record` is
            "error"; the message names file and line.
    """
    return _read(path, data, counts, lambda record, place: conversation_of(record, chat, place))


def read_preferences(
    path: str, *, data: DataConfig, chat: ChatConfig, counts: ChatCounts
) -> Iterator[Preference]:
    """Read the pairs of a file; arguments and errors as of `read_conversations`."""
    return _read(path, data, counts, lambda record, place: preference_of(record, chat, place))


def read_questions(
    path: str, *, data: DataConfig, chat: ChatConfig, counts: ChatCounts
) -> Iterator[Question]:
    """Read the prompts of a file; arguments and errors as of `read_conversations`."""
    return _read(path, data, counts, lambda record, place: question_of(record, chat, place))


def _read(
    path: str,
    data: DataConfig,
    counts: ChatCounts,
    make: Callable[[Mapping[str, Any], str], T],
) -> Iterator[T]:
    def on_bad(line: int, error: BadRecord) -> None:
        if data.on_bad_record == "error":
            raise InputError(
                f"{path}:{line}: {error}, or pass --data.on_bad_record skip to leave such records "
                "out and count them."
            )
        counts.records_read += 1
        counts.bad_records += 1

    for line, record in read_records(path, on_bad=on_bad):
        try:
            made = make(record, f"{path}:{line}")
        except BadRecord as error:
            on_bad(line, error)
            continue
        counts.records_read += 1
        yield made


def conversation_of(record: Mapping[str, Any], chat: ChatConfig, place: str) -> Conversation:
    """Make a conversation of a record.

    Raises:
        BadRecord: it holds none, or its turns are in no possible order.
    """
    messages = with_system(turns_of(record, chat), record, chat)
    check_turns(messages)
    if not any(message.role == ASSISTANT for message in messages):
        raise BadRecord("no assistant turn, so there is nothing to learn. Add the answer")
    if messages[-1].role != ASSISTANT:
        raise BadRecord(
            f"the last turn is of {messages[-1].role!r}, and nothing answers it. Add the answer or "
            "leave the turn out"
        )
    return Conversation(messages, place)


def preference_of(record: Mapping[str, Any], chat: ChatConfig, place: str) -> Preference:
    """Make a pair of a record with `chosen` and `rejected`, which may repeat the prompt.

    The prompt is what both have in common.

    Raises:
        BadRecord: there are no two answers to one prompt.
    """
    for name in ("chosen", "rejected"):
        if name not in record:
            raise BadRecord(
                f"no field {name!r}; {fields_of(record)}. Write a prompt with 'chosen' and "
                "'rejected'"
            )
    answers = {name: answer_turns(record[name], name) for name in ("chosen", "rejected")}
    whole = {}
    for name, turns in answers.items():
        begins = () if turns[0].role != ASSISTANT else prompt_turns(record, chat)
        whole[name] = with_system((*begins, *turns), record, chat)
        try:
            check_turns(whole[name])
        except BadRecord as error:
            raise BadRecord(f"{name}: {error}") from None
        if whole[name][-1].role != ASSISTANT:
            raise BadRecord(f"{name} does not end with an answer. Add it")
    chosen, rejected = whole["chosen"], whole["rejected"]
    if chosen == rejected:
        raise BadRecord("chosen and rejected are the same. Leave the record out")
    pairs = list(zip(chosen, rejected, strict=False))
    same = next((n for n, (one, other) in enumerate(pairs) if one != other), len(pairs))
    if same == len(pairs) or {chosen[same].role, rejected[same].role} != {ASSISTANT}:
        raise BadRecord(
            f"chosen and rejected part at turn {same + 1}, which is not an answer in both. Give two "
            "answers to the same turns"
        )
    return Preference(chosen[:same], chosen[same:], rejected[same:], place)


def question_of(record: Mapping[str, Any], chat: ChatConfig, place: str) -> Question:
    """Make a prompt of a record: all its turns but a last answer.

    Raises:
        BadRecord: there is no turn to answer, or the turns are in no possible order.
    """
    turns = prompt_turns(record, chat)
    answer = ""
    if turns and turns[-1].role == ASSISTANT:
        turns, answer = turns[:-1], turns[-1].content
    elif record.get("answer") is not None:  # a number, too, is an answer to compare with
        answer = str(record["answer"])
    messages = with_system(turns, record, chat)
    check_turns(messages)
    if messages[-1].role not in (USER, TOOL):
        raise BadRecord("no turn that an answer could come after. Add one")
    used = {*FIELDS.values(), "prompt", "input", "output", "history", "system", "tools", "answer"}
    metadata = {name: value for name, value in record.items() if name not in used}
    return Question(messages, answer, metadata, place)


def prompt_turns(record: Mapping[str, Any], chat: ChatConfig) -> tuple[Message, ...]:
    """Take the turns of a `prompt` field, or of any other shape."""
    if "prompt" not in record or chat.format != "auto":
        return turns_of(record, chat)
    prompt = record["prompt"]
    if isinstance(prompt, str):
        return (Message(USER, checked_text(prompt, "prompt")),)
    return list_turns(prompt, "prompt")


def answer_turns(value: Any, name: str) -> tuple[Message, ...]:
    """Take the turns of `chosen` or `rejected`: a text, one turn, or several."""
    if isinstance(value, str):
        return (Message(ASSISTANT, checked_text(value, name)),)
    return list_turns([value] if isinstance(value, dict) else value, name)


def turns_of(record: Mapping[str, Any], chat: ChatConfig) -> tuple[Message, ...]:
    """Take the turns of a record in the shape that is named, or the one that its fields show.

    Raises:
        BadRecord: it has no such fields, or they hold something else.
    """
    shapes = [chat.format] if chat.format != "auto" else list(FIELDS)
    for shape in shapes:
        field = FIELDS[shape]
        if field in record:
            return alpaca_turns(record) if shape == "alpaca" else list_turns(record[field], field)
    wanted = " or ".join(repr(FIELDS[shape]) for shape in shapes)
    advice = "--chat.format auto, or rename the field" if len(shapes) == 1 else "one of them"
    raise BadRecord(f"no field {wanted}; {fields_of(record)}. Use {advice}")


def alpaca_turns(record: Mapping[str, Any]) -> tuple[Message, ...]:
    """Take earlier exchanges, then instruction and input on lines of their own, then the output."""
    turns: list[Message] = []
    history = record.get("history") or []
    if not isinstance(history, list):
        raise BadRecord(f"'history' is a JSON {type(history).__name__}, no list. Fix the record")
    for number, exchange in enumerate(history, 1):
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise BadRecord(f"exchange {number} of 'history' is no pair of texts. Fix it")
        texts = [checked_text(text, "history") for text in exchange]
        turns += [Message(USER, texts[0]), Message(ASSISTANT, texts[1])]
    asked = [checked_text(record.get(name) or "", name) for name in ("instruction", "input")]
    turns.append(Message(USER, "\n".join(text for text in asked if text)))
    if record.get("output") is not None:
        turns.append(Message(ASSISTANT, checked_text(record["output"], "output")))
    return tuple(turns)


def list_turns(value: Any, field: str) -> tuple[Message, ...]:
    """Take a list of turns, each with role and content, or with from and value.

    Raises:
        BadRecord: something is not so; the message names the turn, from 1.
    """
    if not isinstance(value, list) or not value:
        raise BadRecord(f"{field!r} is no list of turns, or an empty one. Fix the record")
    turns = []
    for number, turn in enumerate(value, 1):
        where = f"turn {number} of {field!r}"
        if not isinstance(turn, dict):
            raise BadRecord(f"{where} is a JSON {type(turn).__name__}, no object. Fix it")
        names = ("from", "value") if "from" in turn else ("role", "content")
        if names[0] not in turn:
            raise BadRecord(f"{where} has no 'role' or 'from'; {fields_of(turn)}. Fix it")
        role = turn[names[0]]
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise BadRecord(f"{where} has the role {role!r}. Use one of {', '.join(ROLES)}")
        turns.append(Message(ROLES[role.lower()], content_of(turn, names[1], where)))
    return tuple(turns)


def content_of(turn: Mapping[str, Any], name: str, where: str) -> str:
    """Take the text of a turn, which some write as a list of parts."""
    if turn.get("tool_calls"):
        raise BadRecord(
            f"{where} has 'tool_calls', which are not read. Write the call into {name!r}"
        )
    content: Any = turn.get(name)
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        content = "".join(checked_text(part.get("text"), where) for part in content)
    text = checked_text(content, f"{name!r} of {where}")
    return with_tools(text, turn)


def with_tools(system: str, holder: Mapping[str, Any]) -> str:
    """Put the `tools` of a record or turn, described as they are there, below a system prompt."""
    tools = holder.get("tools")
    if not tools:
        return system
    text = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
    return "\n\n".join(part for part in (system, checked_text(text, "tools")) if part)


def with_system(
    messages: Sequence[Message], record: Mapping[str, Any], chat: ChatConfig
) -> tuple[Message, ...]:
    """Put the system prompt of the record, or the default one, first, and its `tools` below."""
    system, rest = "", tuple(messages)
    has_own = bool(rest) and rest[0].role == SYSTEM
    if has_own:
        system, rest = rest[0].content, rest[1:]
    elif isinstance(record.get("system"), str) and record["system"]:
        system = checked_text(record["system"], "system")
    else:
        system = chat.system
    system = with_tools(system, record)
    return (Message(SYSTEM, system), *rest) if system or has_own else rest


def check_turns(messages: Sequence[Message]) -> None:
    """Refuse turns out of order and empty answers.

    Raises:
        BadRecord: the message names the turn, from 1, a system prompt included.
    """
    before = ""
    for number, message in enumerate(messages, 1):
        if message.role not in FOLLOWERS[before]:
            after = f"after {before!r}" if before else "at the beginning"
            wanted = " or ".join(map(repr, FOLLOWERS[before]))
            raise BadRecord(
                f"turn {number} is of {message.role!r} {after}, where {wanted} must come. Fix the "
                "order of the turns"
            )
        if message.role == ASSISTANT and not message.content.strip():
            raise BadRecord(f"turn {number} is an empty answer. Write one or leave the record out")
        before = message.role
    if before in ("", SYSTEM):
        raise BadRecord("no user turn. Add one")


def checked_text(value: Any, name: str) -> str:
    """Refuse what is no text, or none that UTF-8 can hold.

    Raises:
        BadRecord: it is something else.
    """
    if not isinstance(value, str):
        raise BadRecord(f"{name} is a JSON {type(value).__name__}, not text. Fix the record")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecord(
            f"{name} has half of a surrogate pair, which is no character. Fix the record"
        ) from None
    return value


def fields_of(record: Mapping[str, Any]) -> str:
    """List the fields of a record, for messages."""
    return f"fields: {', '.join(list(record)[:20]) or 'none'}"
