"""Content that is wrong in every way: bytes flipped, JSON and TOML with values that nobody expects."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

# Written into JSON as they are, in place of a value.
RAW_JSON = (
    *("9" * 5000, "-" + "9" * 5000, "1e400", "-1e400", "NaN", "Infinity", "-0", "1e-400", "0.1e+"),
    *('"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"\\u2028"', '"\x00"', '"\\x41"', "'a'", "tru"),
    *("[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000, "[" * 100_000, "[" * 960 + "]" * 960),
    *('{"a":' * 970 + "1" + "}" * 970, '"' + "9" * 5000 + '"', '"²"', '"٣"', "[1,]", '{"a":1,"a":2}'),
    *("", " ", "\ufeff", "//", '"' + "x" * 70_000 + '"', '"two\\nlines"', '"\x1b[31mred"'),
    *("[" + "0," * 5000 + "0]", "18446744073709551616", "9007199254740993", "1" + "0" * 300 + ".5"),
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**70), 0.5, 1e300, -0.0, 1e-320),
    *("", "a", "true", "4", "\u2581", "\ufeff", "😀", "x" * 3000, "ﬁ", "\x7f", "a\nb", "{question}"),
    *([], {}, [[]], [None], ["a", 1], [1, 2], {"a": {"b": 1}}, {"": ""}, ["a"] * 40, [{}], ["", ""]),
    *("<|im_end|>", "</s>", "../../x", "/etc/passwd", "con:system", "os:system", "{{ 7 * 7 }}"),
)  # fmt: skip


def somewhere(table: Any, dice: random.Random) -> tuple[Any, Any] | None:
    """Choose a table or list, anywhere in nested ones, and a place in it; None where there is none."""
    while True:
        places = list(table) if isinstance(table, dict) else list(range(len(table)))
        if not places:
            return None
        place = dice.choice(places)
        inner = table[place]
        if not (isinstance(inner, (dict, list)) and inner and dice.random() < 0.8):
            return table, place
        table = inner


def change_somewhere(table: Any, dice: random.Random) -> dict[str, str]:
    """Change one entry, anywhere in nested tables and lists; gives marks that stand for raw text."""
    found = somewhere(table, dice)
    if found is None:
        return {}
    table, place = found
    inner, kind = table[place], dice.randrange(8)
    if kind == 0:
        del table[place]
    elif kind == 1 and isinstance(table, dict):
        table[dice.choice(["", "a\nb", "x" * 3000, "\ud800", "\x00", "model", "é"])] = table.pop(
            place
        )
    elif kind == 2 and isinstance(table, list):
        table.insert(place, copy.deepcopy(inner))
    elif kind == 3:
        table[place] = [inner] if dice.random() < 0.5 else {"text": inner}
    elif kind in (4, 5):
        mark = f"@@{dice.randrange(10**6)}@@"
        table[place] = mark
        return {mark: dice.choice(RAW_JSON)}
    else:
        table[place] = copy.deepcopy(dice.choice(VALUES))
    return {}


def json_text(value: Any, dice: random.Random, *, most: int = 3) -> str:
    """Write a value as JSON with some entries changed."""
    value = copy.deepcopy(value)
    raw: dict[str, str] = {}
    if isinstance(value, (dict, list)):
        for _ in range(dice.choice([1, 1, most])):
            raw |= change_somewhere(value, dice)
    text = json.dumps(value, ensure_ascii=dice.random() < 0.5)
    for mark, content in raw.items():
        text = text.replace(f'"{mark}"', content)
    return text


def encode(text: str) -> bytes:
    """Write text as UTF-8, and halves of surrogate pairs as the bytes they would have."""
    return text.encode("utf-8", "surrogatepass")


def change_bytes(content: bytes, dice: random.Random) -> bytes:
    """Flip, cut out, put in or repeat some bytes, most often near an end, where the headers are."""
    changed = bytearray(content)
    for _ in range(dice.choice([1, 1, 2, 8])):
        if len(changed) < 3:
            break
        near = dice.choice([60, 600, len(changed)])
        place = min(dice.randrange(near), len(changed) - 1)
        place = place if dice.random() < 0.6 else len(changed) - 1 - place
        kind = dice.randrange(9)
        if kind == 0:
            del changed[place : place + dice.choice([1, 8, 1000])]
        elif kind == 1:
            changed[place:place] = dice.randbytes(dice.choice([1, 8]))
        elif kind == 2:
            del changed[place:]
        elif kind == 3:
            changed[place : place + 8] = dice.choice(
                [b"\xff" * 8, b"\x00" * 8, b"\xff" * 7 + b"\x7f"]
            )
        elif kind == 4:
            changed[place:place] = changed[place : place + dice.choice([4, 100])]
        else:
            changed[place] = dice.choice([0, 1, 255, 0x7F, 0x80, ord("9"), 10, dice.randrange(256)])
    return bytes(changed)


def lines_of(records: list[Any], dice: random.Random) -> bytes:
    """Write records as JSONL or one array, some of them broken."""
    lines = [
        json_text(dice.choice(records), dice)
        if dice.random() < 0.5
        else json.dumps(dice.choice(records))
        for _ in range(dice.choice([0, 1, 3, 3, 10]))
    ]
    kind = dice.random()
    if kind < 0.25:
        ends = dice.choice(
            [("[", "]"), ("[", ""), ("[", "]]"), ("[\n", ",]"), ("\ufeff[", "]\n x")]
        )
        content = encode(ends[0] + ",\n".join(lines) + ends[1])
    else:
        content = encode(dice.choice(["\n", "\n", "\r\n", "\n\n", "\r", "\u2028"]).join(lines))
    if dice.random() < 0.1:
        content = b"\xef\xbb\xbf" + content
    if dice.random() < 0.25:
        content = change_bytes(content, dice)
    return content


RAW_TOML = (
    *("nan", "-inf", "inf", "1e400", "9" * 30, "9" * 5000, "0x" + "f" * 6000, "0o" + "7" * 99, "1_0"),
    *("'text'", '"a\\u0000b"', '"\\ud800"', '""', "'" + "x" * 5000 + "'", '"""\ntwo\nlines"""', "true"),
    *("[]", "[1, 2]", "['a', 'b']", "['a', 1]", "[[[]]]", "{}", "{a = 1}", "1979-05-27T07:32:00Z"),
    *("07:32:00", "[" * 3000 + "]" * 3000, "[" * 100, "{a=" * 900 + "1" + "}" * 900, "-1", "0", "1", "2.0"),
    *("1e300", "1e-300", "1000000007", "2305843009213693951", "9223372036854775808", "'auto'", "'²'", "'٣'"),
    *("'..'", "'/'", "'a:b'", "'pretrain'", "'rlhf'", "'toy'", "['toy']", "['\\u0000']", '["\\u0000"]'),
    *("4096", "16777216", "123456789", "'" + "8" * 5000 + "'", "['1-2', '" + "7" * 5000 + "']"),
)  # fmt: skip
LINES_TOML = (
    *("a.b.c = 1", "[model]", "[model", "[[model]]", "= 1", "\x00", "'' = 1", '"a\\nb" = 1', "é = 1"),
    *(".".join("a" * 3000) + " = 1", "[" + ".".join("b" * 2000) + "]", "x" * 3000 + " = 1", "#" * 9999),
    *("model = 3", "model.hidden_size = 64\nmodel.hidden_size = 65", "'model.hidden_size' = 'x'"),
    *("[model.hidden_size]", "run = 'x'", "train.max_steps.x = 1", "\ufeff", "'\ud800' = 1", '"\x1b[31m" = 1'),
    "\n".join(f"k{n} = {n}" for n in range(300)),
)  # fmt: skip


def toml_text(keys: list[str], dice: random.Random) -> bytes:
    """Write settings as TOML, some of them with values that do not fit."""
    lines = []
    for _ in range(dice.choice([1, 1, 2, 5])):
        if dice.random() < 0.15:
            lines.append(dice.choice(LINES_TOML))
        else:
            lines.append(f"{dice.choice(keys)} = {dice.choice(RAW_TOML)}")
    content = encode("\n".join(lines))
    return change_bytes(content, dice) if dice.random() < 0.1 else content


Bytes = Callable[[random.Random], bytes]
