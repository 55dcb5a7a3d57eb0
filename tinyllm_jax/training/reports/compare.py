"""A page that puts runs beside each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm_jax.config import Config, config_to_table
from tinyllm_jax.errors import InputError
from tinyllm_jax.settings import flatten
from tinyllm_jax.training.reports.page import (
    page,
    show_seconds,
    switch,
    table,
    unit_of_time,
    written_at,
)
from tinyllm_jax.training.reports.plot import Line, averaged, draw
from tinyllm_jax.training.reports.run import Run, is_finite

COLORS = 8
# Kind of row, name, title, and whether heights go by their logarithm or begin at 0.
SHARED = (
    ("eval", "reward", "mean reward of an answer, held out", ""),
    ("eval", "accuracy", "share of pairs the right way round, validation", ""),
    ("eval", "loss", "validation loss", "log"),
    ("eval", "bits_per_byte", "bits per byte", ""),
    ("train", "loss", "training loss", "log"),
    ("rollout", "reward", "mean reward of an answer, in training", ""),
    ("train", "grad_norm", "gradient norm, before clipping", "log"),
    ("train", "learning_rate", "learning rate", "zero"),
    ("speed", "tokens_per_second", "tokens a second", "zero"),
    ("speed", "mfu", "MFU: share of the peak", "zero"),
)
# Where a run lies, not what it is.
PLACES = ("run.out", "run.resume", "run.auto_resume")


def comparison_of(folders: Sequence[Path], runs: Sequence[Run], *, now: float) -> str:
    """Write a page that compares runs.

    Args:
        folders: What the person calls them.
        now: Seconds since 1970, which the page tells.

    Raises:
        InputError: a run is named twice.
    """
    named = named_runs(folders, runs)
    axes = shared_axes(runs)
    body = [
        f'<p class="soft">Written {written_at(now)}.</p>',
        *(f'<p class="warning">{text}</p>' for text in cautions(runs)),
        "<h2>Final numbers</h2>",
        final_numbers(named),
        "<h2>Curves</h2>",
        switch(axes),
        *(overlaid(named, *each, axes=axes) for each in SHARED),
        *differences("Settings that differ", named, {n: settings_of(r) for n, r in named.items()}),
        *differences("Data that differ", named, {n: data_of(r) for n, r in named.items()}),
        *differences("Environments that differ", named, {n: start_of(r) for n, r in named.items()}),
    ]
    heading = f"{len(runs)} runs"
    return page(f"{heading}: {', '.join(named)}", heading=heading, body=body, refreshes=False)


def named_runs(folders: Sequence[Path], runs: Sequence[Run]) -> dict[str, Run]:
    """Name runs by their folders; by whole paths where folders have the same name."""
    places = [folder.resolve() for folder in folders]
    twice = [folder for place, folder in enumerate(folders) if places[place] in places[:place]]
    if twice:
        raise InputError(f"{twice[0]}: named twice. Name each run once.")
    names = [run.name for run in runs]
    if len({*names}) < len(names):
        names = [str(folder) for folder in folders]
    return dict(zip(names, runs, strict=True))


def shared_axes(runs: Sequence[Run]) -> dict[str, str]:
    """Name what the curves of all runs can go over."""
    found = {"step": "steps"}
    units = {run.unit for run in runs}
    if len(units) == 1 and all(run.learnt is not None for run in runs):
        found["tokens"] = units.pop()
    if all(run.clock is not None for run in runs):
        found["time"] = unit_of_time(max(run.seconds for run in runs))[1]
    return found


def cautions(runs: Sequence[Run]) -> list[str]:
    """Say what makes the losses of runs no numbers to compare."""
    if len({run.mode for run in runs}) > 1:
        return ["These runs learn in different ways (run.mode), whose losses say different things."]
    tokenizers = {run.stats.get("tokenizer_hash") for run in runs}
    if len(tokenizers) > 1:
        return [
            "These runs have different tokenizers: compare bits per byte, not losses per token."
        ]
    if len({run.stats.get("dataset_hash") for run in runs}) > 1:
        return ["These runs have different data, so their losses may be of different texts."]
    return []


def final_numbers(named: Mapping[str, Run]) -> str:
    """Put the newest numbers of runs side by side; what none has is left out."""
    found = [numbers_of(run) for run in named.values()]
    keys = dict.fromkeys(key for each in found for key in each)
    rows = [[key, *(each.get(key) for each in found)] for key in keys]
    rows = [row for row in rows if any(value is not None for value in row[1:])]
    return table(["", *named], rows, colors=colors(len(named)))


def colors(count: int) -> list[str]:
    """Give a colour to each of so many runs; after the eighth they come again."""
    return [f"var(--c{place % COLORS + 1})" for place in range(count)]


def numbers_of(run: Run) -> dict[str, Any]:
    """Tell the newest numbers of a run, and its best."""

    def last(kind: str, name: str) -> float | None:
        values = run.series(kind, name)[1]
        return float(values[-1]) if len(values) else None

    found: dict[str, Any] = {"mode": run.mode, "steps": run.step}
    steps, losses = run.series("eval", "loss")
    rewards = run.series("eval", "reward")[1]
    if len(losses) and not len(rewards):
        found |= {"validation loss": float(losses[-1]), "lowest": float(losses.min())}
        found["at step"] = int(steps[losses.argmin()])
    if len(rewards):
        found |= {"reward": float(rewards[-1]), "highest reward": float(rewards.max())}
    found |= {
        "pairs right": last("eval", "accuracy"),
        "bits per byte": last("eval", "bits_per_byte"),
        "above the floor": last("eval", "above_floor_share"),
        "training loss": last("train", "loss"),
        f"{run.unit} learnt from": int(run.learnt[1][-1]) if run.learnt is not None else None,
        "time": show_seconds(run.seconds) if run.clock is not None else None,
        "tokens a second": last("speed", "tokens_per_second"),
        "MFU": last("speed", "mfu"),
    }
    counts = {"steps left out": len(run.lost_steps)}
    counts |= {f"{kind}s": len(run.of_kind(kind)) for kind in ("warning", "rewind")}
    return found | {name: count or None for name, count in counts.items()}


def overlaid(
    named: Mapping[str, Run],
    kind: str,
    name: str,
    title: str,
    scale: str,
    *,
    axes: Mapping[str, str],
) -> str:
    """Draw the same number of all runs; long curves by their means."""
    size, _ = unit_of_time(max(run.seconds for run in named.values()))
    lines, floors = [], set()
    for place, (label, run) in enumerate(named.items()):
        if name == "loss" and kind == "eval" and len(run.series("eval", "reward")[0]):
            continue  # the reward turned round
        color = colors(place + 1)[-1]
        form = "dots" if kind == "eval" else "line" if place < COLORS else "dashed"
        line = run.line(kind, name, f"{label}, {{}}", color, form)
        line = averaged(line, label=line.label) or line
        if "time" in line.x:
            line = Line(line.label, {**line.x, "time": line.x["time"] / size}, line.y, color, form)
        lines.append(line)
        floors.add(floor_of(run, name) if kind == "eval" else None)
    if len(floors) == 1 and (floor := floors.pop()) is not None:
        lines.append(
            Line(f"entropy floor {floor:.4g}", {}, np.array([floor]), "var(--soft)", "level")
        )
    positive = all(np.all(line.y > 0) for line in lines)
    return draw(
        title,
        lines,
        axes=axes,
        log=scale == "log" and positive,
        from_zero=scale == "zero",
        is_small=kind != "eval",
    )


def floor_of(run: Run, name: str) -> float | None:
    """Give the entropy floor of what a run is evaluated on, to four digits, where it is known."""
    looks = run.of_kind("eval")
    key = {"loss": "above_floor_share", "bits_per_byte": "entropy_floor_bits_per_byte"}.get(name)
    if not (looks and key and is_finite(looks[-1].get(key)) and is_finite(looks[-1].get("loss"))):
        return None
    floor = looks[-1][key] if name != "loss" else looks[-1]["loss"] / (1 + looks[-1][key])
    return float(f"{floor:.4g}")


def settings_of(run: Run) -> dict[str, Any]:
    """Give the settings of a run, but where it lies."""
    # What a run does not know was not there yet, and is as it was then.
    known = flatten(config_to_table(Config())) | run.config
    return {key: value for key, value in known.items() if key not in PLACES}


def data_of(run: Run) -> dict[str, Any]:
    """Give what is known of the data of a run, but the single files."""
    return flatten({key: value for key, value in run.stats.items() if key != "files"})


def start_of(run: Run) -> dict[str, Any]:
    """Give with what a run was started the last time."""
    if not run.starts:
        return {}
    start = {
        key: value
        for key, value in run.starts[-1].items()
        if key not in ("preset_settings", "step")
    }
    return flatten(start | {"time": written_at(start["time"])})


def differences(
    heading: str, named: Mapping[str, Run], found: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """List what is not alike in all runs."""
    keys = sorted(dict.fromkeys(key for each in found.values() for key in each))
    rows = [[key, *(found[name].get(key) for name in named)] for key in keys]
    rows = [row for row in rows if any(value != row[1] for value in row[2:])]
    return [f"<h2>{heading}</h2>", table(["", *named], rows)] if rows else []
