"""What is asked of everything that a file says, before any of it is used.

Whoever made a file may have put anything into it: numbers that are texts, tables a thousand deep,
names of a megabyte. Here it becomes the right value, or one `InputError` of one short line.
"""

import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import numpy as np

from tinyllm_jax.config import Config, config_from_table
from tinyllm_jax.errors import InputError
from tinyllm_jax.settings import convert_value, flatten

MOST_LISTED = 20
LONGEST_SHOWN = 200
# Counters are int32 in a run folder.
LARGEST_COUNT = 2**31 - 1
# Far above any model; rules between settings look through all numbers up to a width.
LARGEST_SIZE = 2**24
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "num_experts",
    "num_shared_experts",
    "moe_intermediate_size",
)
# A snapshot has about eighty settings; each unknown one is compared with all of them.
MOST_SETTINGS = 1000
_WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}


def shown(value: Any) -> str:
    """Show a value in one printable line of bounded length."""
    try:
        text = value if isinstance(value, str) else reprlib.repr(value)
    except ValueError:  # Python does not write whole numbers of thousands of digits
        text = f"a {type(value).__name__}"
    if len(text) > LONGEST_SHOWN:
        text = f"{text[:LONGEST_SHOWN]}..."
    return text if text.isprintable() else ascii(text)[1:-1]


def listed(words: Iterable[Any], *, between: str = ", ") -> str:
    """List names or sentences: the first twenty, and how many more there are."""
    words = list(words)
    more = [f"and {len(words) - MOST_LISTED:,} more"] if len(words) > MOST_LISTED else []
    return between.join([*map(shown, words[:MOST_LISTED]), *more])


def parse_json(text: bytes | str, *, origin: str) -> Any:
    """Read JSON as the standard has it: UTF-8, no NaN, and no deeper than Python can go.

    Raises:
        InputError: it is not JSON.
    """
    try:
        return json.loads(
            text.decode() if isinstance(text, bytes) else text, parse_constant=_no_json
        )
    except (ValueError, RecursionError, TypeError) as error:
        raise InputError(f"{origin}: not JSON ({shown(str(error))}). Get the file again.") from None


def plain_value(value: Any) -> Any:
    """Give the number that an array of one number holds, and anything else as it is."""
    is_one = isinstance(value, (np.ndarray, np.generic)) and value.size == 1
    return value.item() if is_one else value


def finite_number(value: Any) -> float | None:
    """Give a number that a float holds, and None for anything else."""
    value = plain_value(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def plain_table(table: Mapping[Any, Any]) -> dict[str, Any]:
    """Give what a table holds under names, with numbers and lists where tensors stood."""
    return {
        key: plain_table(value)
        if isinstance(value, Mapping)
        else plain_value(value).tolist()[:LONGEST_SHOWN]
        if isinstance(plain_value(value), np.ndarray)
        else plain_value(value)
        for key, value in table.items()
        if isinstance(key, str)
    }


def read_number(value: Any, kind: type, *, what: str, origin: str) -> Any:
    """Bring a value of a file to the type it must have: int, float, bool or str.

    Raises:
        InputError: it is none.
    """
    try:
        found = convert_value(plain_value(value), kind)
        if kind is not float or math.isfinite(found):
            return found
    except (ValueError, OverflowError):
        pass
    raise InputError(f"{origin}: {what}={shown(value)} is not {_WORDS[kind]}. Get the file again.")


def read_count(value: Any, *, what: str, origin: str) -> int:
    """Read a counter: a whole number, not negative, of at most 31 bits."""
    count = read_number(value, int, what=what, origin=origin)
    if not 0 <= count <= LARGEST_COUNT:
        raise InputError(
            f"{origin}: {what}={shown(count)} is not between 0 and {LARGEST_COUNT}. Get the file "
            "again."
        )
    return count


def run_settings(table: Any, *, origin: str) -> Config:
    """Make the settings of a run of the table that a file holds.

    Raises:
        InputError: every problem found, in one line.
    """
    try:
        if not isinstance(table, Mapping):
            raise InputError(f"{shown(table)} is no table. Get the file again.")
        flat = flatten(table)
        if len(flat) > MOST_SETTINGS:
            raise InputError(f"{len(flat):,} of them, which no run has. Get the file again.")
        large = [name for name in SIZES if _size(flat.get(f"model.{name}")) > LARGEST_SIZE]
        if large:
            raise InputError(f"{listed(large)} above {LARGEST_SIZE}. Get the file again.")
        return config_from_table(table, origin="")
    except InputError as error:
        problems = str(error).splitlines()
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        problems = [f"they cannot be read ({shown(str(error))}). Get the file again."]
    raise InputError(f"{origin}: its settings: {listed(problems, between=' ')}")


def _size(value: Any) -> float:
    try:
        return convert_value(value, float)
    except (ValueError, OverflowError):
        return 0.0 if isinstance(value, (str, type(None))) else float("inf")


def _no_json(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")
