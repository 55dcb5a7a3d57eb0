"""Presets, files and flags become settings, and settings become tables."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyllm_jax.config.mode_rules import named_in_vain
from tinyllm_jax.config.run import Config
from tinyllm_jax.errors import InputError
from tinyllm_jax.settings import build, flatten, read_toml, to_table


def presets_dir() -> Path:
    """Find the folder of preset files: inside an installed package, beside it in a checkout."""
    inside = Path(__file__).parents[1] / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "configs"


def preset_names() -> list[str]:
    """List the presets by name."""
    return sorted(path.stem for path in presets_dir().glob("*.toml"))


def mode_names() -> list[str]:
    """List the ways to learn that have settings of their own, for any model."""
    return sorted(path.stem for path in (presets_dir() / "modes").glob("*.toml"))


def data_dir() -> Path:
    """Name the folder that relative data paths and downloads live in (`TINYLLM_DATA_DIR`)."""
    return Path(os.environ.get("TINYLLM_DATA_DIR") or "data")


def is_preset(name: str) -> bool:
    """Tell a preset, by its name or its path, from a file of one's own."""
    shipped = (presets_dir(), presets_dir() / "modes")
    path = Path(name)
    is_named = name in (*preset_names(), *mode_names())
    return is_named or path.resolve().parent in [folder.resolve() for folder in shipped]


def read_preset(name: str) -> tuple[str, dict[str, Any]]:
    """Read `--config NAME|FILE.toml` as (where it stands, dotted keys).

    Raises:
        InputError: there is no such preset or file, or it is not TOML.
    """
    path = Path(name)
    if name in preset_names():
        path = presets_dir() / f"{name}.toml"
        return f"configs/{name}.toml", read_toml(path)
    if name in mode_names():
        return f"configs/modes/{name}.toml", read_toml(presets_dir() / "modes" / f"{name}.toml")
    if path.is_file():
        return str(path), read_toml(path)
    raise InputError(
        f"--config {name!r}: no such preset or file. Presets: {', '.join(preset_names())}."
    )


def merge_settings(
    taken_over: Sequence[tuple[str, Mapping[str, Any]]],
    named: Sequence[tuple[str, Mapping[str, Any]]],
    problems: Sequence[str],
) -> Config:
    """Put what somebody named for a run over what it takes over from a preset or a checkpoint.

    Args:
        taken_over: Pairs of (where the values come from, values), which may hold settings of any mode.
        named: Such pairs of flags, and of files for this mode; what the mode never reads is refused.

    Raises:
        InputError: every problem found, one a line.
    """
    return build(
        Config, [*taken_over, *named], problems, lambda config: named_in_vain(config, named)
    )


def load_config(
    name: str,
    overrides: Mapping[str, Any] | None = None,
    problems: Sequence[str] = (),
    below: tuple[str, Mapping[str, Any]] = ("", {}),
) -> Config:
    """Read a preset or file and put dotted overrides over it.

    Args:
        below: Settings that the preset, too, goes over, and where they come from.

    Raises:
        InputError: every problem found, one a line.
    """
    preset, flags = read_preset(name), ("", overrides or {})
    if is_preset(name) or not is_for_one_mode(preset[1], flags[1]):
        return merge_settings([below, preset], [flags], problems)
    return merge_settings([below], [preset, flags], problems)


def is_for_one_mode(table: Mapping[str, Any], flags: Mapping[str, Any]) -> bool:
    """Tell whether a file of one's own is for the mode of this run alone, as it says itself.

    One that names no mode, or another than the flags, may serve several runs, one after the other.
    """
    mode = table.get("run.mode")
    return mode is not None and flags.get("run.mode", mode) == mode


def config_from_table(table: Mapping[str, Any], *, origin: str) -> Config:
    """Rebuild a config from the nested table of a snapshot; `origin` names it in messages."""
    return build(Config, [(origin, flatten(table))])


def config_to_table(config: Config) -> dict[str, Any]:
    """Write a config as nested plain tables, the form of `training_config_snapshot.json`."""
    return to_table(config)
