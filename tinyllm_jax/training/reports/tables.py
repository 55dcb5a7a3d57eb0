"""The words and tables of one run's report, as HTML; what nothing is known of is left out."""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from tinyllm_jax.config import Config, RunConfig, config_to_table
from tinyllm_jax.settings import flatten
from tinyllm_jax.training.reports.page import folded, show, show_seconds, table, tiles, written_at
from tinyllm_jax.training.reports.run import WARNINGS, Row, Run, is_finite

# How many warnings and samples are shown at once; more of them fold away, and of very many some.
SHOWN, MOST_WARNINGS, MOST_SAMPLES, MOST_FILES = 3, 60, 24, 100

# A run is given up where so many times in a row its page was not written anew, and half an hour for
# a slow evaluation, or the programs of a run that was resumed. Nothing is known of its speed at first.
MISSED, SPARE_SECONDS, LONGEST_START = 4, 1800.0, 3600.0


def summarise(rows: Sequence[Row]) -> str:
    """Say the newest numbers in one sentence."""
    looks = [row for row in rows if row["kind"] == "eval" and "loss" in row]
    if not looks:
        return "No evaluation yet."
    last = looks[-1]

    def told(name: str) -> float:
        return last[name] if is_finite(last.get(name)) else math.nan

    def best(name: str, choose: Callable[..., Row]) -> Row:
        finite = [row for row in looks if is_finite(row.get(name))]
        return choose(finite, key=lambda row: row[name]) if finite else {}

    if "reward" in last:
        text = f"Answers to held-out prompts had a mean reward of {told('reward'):.4g} at step "
        text += f"{last['step']}."
        if found := best("reward", max):
            text += f" The highest was {found['reward']:.4g}, at step {found['step']}."
        return text
    if "accuracy" in last:
        return (
            f"{told('accuracy'):.1%} of the validation pairs were the right way round at step "
            f"{last['step']}, with a loss of {told('loss'):.4f}."
        )
    text = (
        f"Validation loss {told('loss'):.4f} nats per token ({told('bits_per_byte'):.4f} bits per "
        f"byte) at step {last['step']}."
    )
    if found := best("loss", min):
        text += f" The lowest was {found['loss']:.4f}, at step {found['step']}."
    if "above_floor_share" in last:
        text += (
            f" The entropy floor of the validation text is "
            f"{told('entropy_floor_bits_per_byte'):.4f} bits per byte: the model is "
            f"{told('above_floor_share'):.1%} above the best that any model can do."
        )
    return text


def status(run: Run, *, goes_on: bool, now: float) -> str:
    """Say how far the run is."""
    whole = run.max_steps
    state = "Training" if goes_on else "Finished" if run.step >= whole else "Stopped"
    text = f"{state} at step {run.step:,} of {whole:,}, mode {run.mode}."
    written, marks = f"Written {written_at(now)}.", ""
    if goes_on:
        written = f"{written[:-1]}; this page loads itself anew while training goes on."
        late = (
            f"Not refreshed since {written_at(now)}: training has ended without a word, or is slow."
        )
        late += " Load the page again to look."
        marks = f' id="written" data-until="{now + patience(run):.0f}" data-late="{late}"'
    return f'<p>{html.escape(text)} <span class="soft"{marks}>{written}</span></p>'


def patience(run: Run) -> float:
    """Give the seconds after which the page of a run in training must have been written anew.

    It is, at every evaluation and checkpoint.
    """
    names = ("train.eval_interval_steps", "checkpoint.interval_steps")
    intervals = [run.config[name] for name in names if is_finite(run.config.get(name))]
    if run.clock is None or not intervals:
        return LONGEST_START
    steps, seconds = run.clock
    done = steps[-1] - steps[0]
    if done <= 0:
        return LONGEST_START
    return SPARE_SECONDS + MISSED * min(intervals) * float(seconds[-1] - seconds[0]) / float(done)


def key_numbers(run: Run) -> str:
    """Show the newest numbers large."""
    found = []
    for name, what, form, best in (
        ("reward", "Reward", "{:.4g}", max),
        ("accuracy", "Pairs right", "{:.1%}", max),
        ("loss", "Validation loss", "{:.4f}", min),
        ("bits_per_byte", "Bits per byte", "{:.4f}", min),
    ):
        steps, values = run.series("eval", name)
        if len(values) and not (name == "loss" and len(run.series("eval", "reward")[0])):
            place = int(np.argmin(values) if best is min else np.argmax(values))
            remark = (
                f"{'lowest' if best is min else 'highest'} {form.format(values[place])} at step "
            )
            found.append((what, form.format(values[-1]), f"{remark}{steps[place]:,.0f}"))
    above = run.series("eval", "above_floor_share")[1]
    if len(above):
        found.append(("Above the floor", f"{above[-1]:.1%}", "which no model goes below"))
    speeds, mfus = run.series("speed", "tokens_per_second")[1], run.series("speed", "mfu")[1]
    if len(speeds):
        remark = f"MFU {mfus[-1]:.1%}" if len(mfus) else ""
        found.append(("Tokens a second", f"{speeds[-1]:,.0f}", remark))
    if run.learnt is not None:
        learnt = float(run.learnt[1][-1])
        found.append((f"{run.unit.capitalize()} learnt from", f"{learnt:,.0f}", ""))
    if run.clock is not None:
        starts = len(run.starts)
        found.append(("Time", show_seconds(run.seconds), f"{starts} starts" if starts > 1 else ""))
    if lost := len(run.lost_steps):
        found.append(("Steps left out", f"{lost:,}", "loss or gradient not finite"))
    return tiles(found) if found else ""


def warning_section(rows: Sequence[Row]) -> list[str]:
    """Show what went wrong, the newest first."""
    found = [row for row in reversed(rows) if row["kind"] in WARNINGS]
    texts = [f'<p class="warning">{html.escape(str(row.get("text", "")))}</p>' for row in found]
    if not texts:
        return []
    rest = [folded(f"{len(texts) - SHOWN} earlier ones", "".join(texts[SHOWN:MOST_WARNINGS]))]
    return ["<h2>Warnings</h2>", *texts[:SHOWN], *(rest if len(texts) > SHOWN else [])]


def evaluation_table(run: Run) -> str:
    """Tell the evaluations as numbers."""
    looks = run.of_kind("eval")
    names = list(dict.fromkeys(name for row in looks for name in row if name != "kind"))
    names = [name for name in names if not any(isinstance(row.get(name), list) for row in looks)]
    if not looks:
        return ""
    newest = looks[::-1][:200]
    rows = [[row.get(name) for name in names] for row in newest]
    return folded("Evaluations as numbers", table([name.replace("_", " ") for name in names], rows))


def sample_section(run: Run) -> list[str]:
    """Show what the model wrote, the newest first; of many, some from all the way."""
    rows = run.of_kind("sample")
    if not rows:
        return []
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MOST_SAMPLES)).astype(int))
    texts = [
        f"<p><small>Step {rows[place]['step']:,}</small></p>"
        f'<div class="sample">{html.escape(str(rows[place].get("text", "")))}</div>'
        for place in reversed(chosen)
    ]
    rest = [folded(f"{len(texts) - SHOWN} earlier ones", "".join(texts[SHOWN:]))]
    return ["<h2>What it writes</h2>", *texts[:SHOWN], *(rest if len(texts) > SHOWN else [])]


def data_section(run: Run) -> list[str]:
    """Tell what it learns from."""
    splits = run.stats.get("splits", {})
    if not splits:
        return []
    rows = [
        [name.replace("_", " "), *(each.get(name) for each in splits.values())]
        for name in dict.fromkeys(chain(*splits.values()))
    ]
    found = ["<h2>Data</h2>", table(["", *splits], rows)]
    if files := run.stats.get("files", []):
        keys = list(dict.fromkeys(chain(*files)))
        names = [key.replace("_", " ") for key in keys]
        listed = [[each.get(key) for key in keys] for each in files[:MOST_FILES]]
        what = f"Files ({len(files):,}{f', the first {MOST_FILES}' if len(files) > MOST_FILES else ''})"
        found.append(folded(what, table(names, listed)))
    rest = {key: value for key, value in run.stats.items() if key not in ("splits", "files")}
    found.append(folded("How it was prepared", table(["", "value"], sorted(flatten(rest).items()))))
    return found


def setting_section(run: Run) -> list[str]:
    """Tell the settings that differ from the preset, and fold away all of them."""
    name, usual = usual_settings(run)
    rows = [
        [key, value, usual.get(key)]
        for key, value in sorted(run.config.items())
        if not key.startswith("run.") and value != usual.get(key)
    ]
    text = f"All as {name} has them." if not rows else ""
    return [
        "<h2>Settings</h2>",
        table(["setting", "this run", name], rows) if rows else f"<p>{html.escape(text)}</p>",
        folded("All settings", table(["setting", "value"], sorted(run.config.items()))),
    ]


def usual_settings(run: Run) -> tuple[str, dict[str, Any]]:
    """Give the settings of the preset that the run began with; the defaults where none is known."""
    usual = flatten(config_to_table(Config(run=RunConfig(mode=run.mode))))
    preset = next((start for start in reversed(run.starts) if start.get("preset")), None)
    if preset is None:
        return "the defaults", usual
    named = preset.get("preset_settings", {})
    # A list of one text may be written as the text in TOML.
    named = {
        key: [value] if isinstance(usual.get(key), list) and isinstance(value, str) else value
        for key, value in named.items()
    }
    return f"preset {preset['preset']}", usual | named


def environment_section(run: Run) -> list[str]:
    """Tell with what the run was started, the newest start first."""
    if not run.starts:
        return []
    newest, *earlier = reversed(run.starts)
    found = ["<h2>Environment</h2>", start_table(newest)]
    if earlier:
        tables = "".join(start_table(start) for start in earlier)
        found.append(folded(f"{len(earlier)} earlier starts", tables))
    return found


def start_table(start: Mapping[str, Any]) -> str:
    """Tell one start."""
    shown = {
        "started": f"{written_at(start['time'])}, at step {start['step']:,}",
        **{
            key: value
            for key, value in start.items()
            if key not in ("time", "step", "preset_settings")
        },
    }
    return table(["", "value"], [(key, show(value)) for key, value in shown.items() if value])
