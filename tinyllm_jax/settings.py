"""Turn frozen dataclasses into a settings language: TOML in, command line over it, all problems at once.

A section is a frozen dataclass whose fields are made with `setting`. A settings class is a frozen
dataclass whose fields are sections. Keys are dotted (`model.hidden_size`), in TOML as tables.
"""

import argparse
import dataclasses
import difflib
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from tinyllm_jax.errors import InputError

T = TypeVar("T")
# What the arrays that settings become can hold.
LARGEST = 2**63 - 1
# Of a value in a message, in characters.
LONGEST_SHOWN = 100


def setting(
    default: Any,
    help: str,
    *,
    unit: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: Sequence[str] | None = None,
    flag: str | None = None,
) -> Any:
    """Declare one setting of a section.

    Args:
        default: Value when neither file nor command line names it; a tuple takes several words.
        help: What it does, in one line.
        unit: What one unit of the value is, such as "steps".
        minimum: Smallest allowed value.
        maximum: Largest allowed value.
        above: The value must be strictly larger than this.
        choices: The only allowed words.
        flag: A short command-line flag beside `--section.key`.
    """
    metadata = {
        "help": help,
        "unit": unit,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "choices": tuple(choices) if choices else None,
        "flag": flag,
    }
    return dataclasses.field(default=default, metadata=metadata)


def setting_fields(cls: type) -> dict[str, tuple[dataclasses.Field, type]]:
    """List every setting under its dotted key, with its type."""
    found: dict[str, tuple[dataclasses.Field, type]] = {}
    hints = get_type_hints(cls)
    for section in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[section.name]):
            section_hints = get_type_hints(hints[section.name])
            for field in dataclasses.fields(hints[section.name]):
                found[f"{section.name}.{field.name}"] = (field, section_hints[field.name])
        else:
            found[section.name] = (section, hints[section.name])
    return found


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested tables into dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file as dotted keys; a file that is not TOML is an `InputError`."""
    try:
        return flatten(tomllib.loads(path.read_text(encoding="utf-8")))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason}). Save it as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not TOML ({error}). Fix that line.") from None
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{path}: not TOML that can be read ({error}). Fix it.") from None
    except RecursionError:
        raise InputError(
            f"{path}: tables or lists in each other to a depth that cannot be read. Settings are "
            "at most one table deep."
        ) from None


def convert_value(value: Any, kind: type) -> Any:
    """Bring a TOML value or a command-line word to the type of its setting.

    Raises:
        ValueError: the value does not read as that type; the message names the expected type.
    """
    if kind is bool:
        words = {"true": True, "false": False}
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        raise ValueError("true or false")
    if kind is int:
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, str):
            value = value.replace("_", "")
        if isinstance(value, (int, str)) and not isinstance(value, bool):
            try:
                return int(value)
            except ValueError:
                raise ValueError("a whole number") from None
        raise ValueError("a whole number")
    if kind is float:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except (ValueError, OverflowError):
                raise ValueError("a number") from None
        raise ValueError("a number")
    if kind is str:
        if isinstance(value, str):
            return value
        raise ValueError("text in quotes")
    if isinstance(value, str):
        return (value,)
    if isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value):
        return tuple(value)
    raise ValueError("a list of texts")


def range_problem(key: str, value: Any, field: dataclasses.Field) -> str | None:
    """Say which bound of its declaration a value breaks, or None."""
    rule = field.metadata
    shown = f"{key}={as_text(value)}"
    unit = f" {rule['unit']}" if rule["unit"] else ""
    if rule["choices"] and value not in rule["choices"]:
        return f"{shown} is not one of the choices. Use one of {', '.join(rule['choices'])}."
    if isinstance(value, float) and not math.isfinite(value):
        return f"{shown} is not a finite number. Give one."
    if isinstance(value, int) and value > LARGEST:
        return f"{shown} is too large. Use {LARGEST} or less."
    if rule["minimum"] is not None and value < rule["minimum"]:
        return f"{shown} is too small. Use {rule['minimum']}{unit} or more."
    if rule["above"] is not None and value <= rule["above"]:
        return f"{shown} is too small. Use more than {rule['above']}{unit}."
    if rule["maximum"] is not None and value > rule["maximum"]:
        return f"{shown} is too large. Use {rule['maximum']}{unit} or less."
    return None


def as_text(value: Any, write: Callable[[Any], str] = str) -> str:
    """Write a value for a message, in a line that a person can take in."""
    try:
        text = write(value)
    except (ValueError, RecursionError):  # Python writes no numbers of thousands of digits
        return f"a value of type {type(value).__name__} that is too large to show"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def closest(word: str, known: Iterable[str]) -> str:
    """Suggest the known word nearest to a mistyped one, as a sentence, or nothing."""
    if len(word) > LONGEST_SHOWN:  # comparing takes the square of the length
        return ""
    known = list(known)
    last = word.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not near:
        by_last = {key.rsplit(".", 1)[-1]: key for key in known}
        near = [by_last[k] for k in difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)]
    return f" Did you mean '{near[0]}'?" if near else ""


def build(
    cls: type[T],
    sources: Sequence[tuple[str, Mapping[str, Any]]],
    problems: Sequence[str] = (),
    more_rules: Callable[[T], list[str]] | None = None,
) -> T:
    """Merge sources of dotted keys, later over earlier, into one checked settings object.

    Args:
        cls: The settings class.
        sources: Pairs of (where the values come from, values); the origin opens each message.
        problems: What was already found wrong, to be reported with the rest.
        more_rules: Lists what is wrong besides `problems()` of the class.

    Raises:
        InputError: one line for each problem: unknown keys, types, ranges and, when each value by
            itself is right, the rules between settings (`problems()` of the class).
    """
    known = setting_fields(cls)
    values: dict[str, Any] = {}
    problems = list(problems)
    for origin, table in sources:
        where = f"{origin}: " if origin else ""
        for key, raw in table.items():
            if key not in known:
                problems.append(f"{where}unknown key {as_text(key)}.{closest(key, known)}")
                continue
            field, kind = known[key]
            try:
                value = convert_value(raw, kind)
            except ValueError as error:
                problems.append(f"{where}{key}={as_text(raw, repr)} does not fit. Give {error}.")
                continue
            problem = range_problem(key, value, field)
            if problem:
                problems.append(where + problem)
            values[key] = value
    if not problems:
        settings = construct(cls, values)
        problems = list(settings.problems())  # type: ignore[attr-defined]
        problems += more_rules(settings) if more_rules else []
        if not problems:
            return settings
    raise InputError("\n".join(problems))


def construct(cls: type[T], values: Mapping[str, Any]) -> T:
    """Make the settings object from converted values under dotted keys."""
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for section in dataclasses.fields(cls):  # type: ignore[arg-type]
        kind = hints[section.name]
        if dataclasses.is_dataclass(kind):
            prefix = f"{section.name}."
            mine = {k[len(prefix) :]: v for k, v in values.items() if k.startswith(prefix)}
            arguments[section.name] = kind(**mine)  # type: ignore[operator]
        elif section.name in values:
            arguments[section.name] = values[section.name]
    return cls(**arguments)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `InputError`s, so that they print as one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message[:1].upper()}{message[1:]}. Add --help to see every flag.")


def add_flags(parser: argparse.ArgumentParser, cls: type) -> None:
    """Give every setting of `cls` its `--section.key` flag, with help, unit, range and default."""
    groups: dict[str, Any] = {}
    for key, (field, kind) in setting_fields(cls).items():
        section = key.split(".")[0] if "." in key else "settings"
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        names = [f"--{key}"]
        if "_" in key:
            names.append(f"--{key.replace('_', '-')}")
        if field.metadata["flag"]:
            names.append(field.metadata["flag"])
        extra: dict[str, Any] = {"nargs": "?", "const": "true"} if kind is bool else {}
        if kind not in (bool, int, float, str):
            extra = {"nargs": "+", "action": "extend"}
        groups[section].add_argument(
            *names,
            dest=key,
            default=argparse.SUPPRESS,
            metavar=metavar(field, kind),
            help=describe(field).replace("%", "%%"),
            **extra,
        )


def metavar(field: dataclasses.Field, kind: type) -> str:
    """Name the kind of value for the help page."""
    if field.metadata["choices"]:
        return "{" + ",".join(field.metadata["choices"]) + "}"
    return {bool: "true|false", int: "N", float: "X", str: "TEXT"}.get(kind, "TEXT")


def describe(field: dataclasses.Field) -> str:
    """Write the help line of one setting: meaning, unit, range, default."""
    rule = field.metadata
    bounds = []
    if rule["minimum"] is not None and rule["maximum"] is not None:
        bounds.append(f"{rule['minimum']} to {rule['maximum']}")
    elif rule["minimum"] is not None:
        bounds.append(f"{rule['minimum']} or more")
    elif rule["maximum"] is not None:
        bounds.append(f"at most {rule['maximum']}")
    if rule["above"] is not None:
        bounds.append(f"above {rule['above']}")
    details = [part for part in (rule["unit"], ", ".join(bounds)) if part]
    default = field.default
    if isinstance(default, tuple):
        default = " ".join(default)
    if default != "":
        details.append(f"default {str(default).lower() if default in (True, False) else default}")
    return f"{rule['help']} ({'; '.join(details)})" if details else rule["help"]


def add_checkpoint_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag of commands that use a trained model."""
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="run folder (its best checkpoint, else its newest), step folder, or anything that "
        "convert reads",
    )


def parse_checkpoint_flags(
    parser: argparse.ArgumentParser,
    cls: type[T],
    words: Sequence[str] | None,
    *,
    missing: str = "Name a run folder or one of its checkpoints.",
) -> tuple[argparse.Namespace, T]:
    """Read a command line with `--checkpoint` as the parser's own arguments and checked settings.

    Args:
        missing: What to type where no checkpoint is named.

    Raises:
        InputError: no checkpoint is named, or a setting is wrong; all problems, one a line.
    """
    arguments, settings, problems = parse_flags(parser, cls, words)
    if not arguments.checkpoint:
        problems.append(f"--checkpoint is missing. {missing}")
    return arguments, build(cls, [("", settings)], problems)


def parse_flags(
    parser: argparse.ArgumentParser, cls: type, words: Sequence[str] | None
) -> tuple[argparse.Namespace, dict[str, Any], list[str]]:
    """Split a command line into the parser's own arguments, the settings it names, and problems.

    An unknown flag becomes a problem with the nearest flag there is, for `build` to report beside
    every other one.
    """
    arguments, unknown = parser.parse_known_args(words)
    known = setting_fields(cls)
    settings = {key: value for key, value in vars(arguments).items() if key in known}
    for key in settings:
        delattr(arguments, key)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    problems = []
    for before, word in zip(["", *unknown], unknown, strict=False):
        if word.startswith("--"):
            name = word.split("=")[0]
            problems.append(f"{name}: no such flag.{closest(name, flags)}")
        elif not before.startswith("--"):
            problems.append(f"'{word}': a word with no flag before it. --help shows every flag.")
    return arguments, settings, problems


def to_table(settings: Any) -> dict[str, Any]:
    """Turn a settings object into nested plain tables (tuples become lists), ready for JSON."""
    return {
        key: to_table(value)
        if dataclasses.is_dataclass(value)
        else list(value)
        if isinstance(value, tuple)
        else value
        for key, value in (
            (f.name, getattr(settings, f.name)) for f in dataclasses.fields(settings)
        )
    }
