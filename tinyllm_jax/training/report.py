"""`report.html`: one file that shows a run, with its plot inside and nothing loaded from elsewhere."""

import html
import io
import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tinyllm_jax.data.files import write_file
from tinyllm_jax.settings import flatten
from tinyllm_jax.training.metrics import read_metrics

# Grey that reads on white and on black alike, since the page follows the reader's theme.
INK, TRAIN, VALIDATION, FLOOR = "#808080", "#6ea8dc", "#e07b39", "#3f9b5f"
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto; padding: 0 1rem }}
svg {{ width: 100%; height: auto }}
blockquote {{ margin: .5rem 0 1.5rem; padding-left: 1rem; border-left: 3px solid #8886;
  white-space: pre-wrap; overflow-wrap: anywhere }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; display: block;
  overflow-x: auto }}
td, th {{ padding: .15rem 1rem .15rem 0; text-align: left; border-bottom: 1px solid #8884 }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def write_report(folder: Path) -> None:
    """Write `report.html` of a run folder from the files that lie in it."""
    rows = read_metrics(folder / "metrics.jsonl")
    config = json.loads((folder / "training_config_snapshot.json").read_text())
    stats = json.loads((folder / "dataset_stats.json").read_text())
    title = f"{folder.name}: step {max((row['step'] for row in rows), default=0)}"
    body = [
        f"<p>{summarise(rows)}</p>",
        *measure_section(rows),
        plot_svg(draw_losses(rows)),
        *expert_section(rows),
        "<h2>What it writes</h2>",
        *(
            f"<p>Step {row['step']}</p><blockquote>{html.escape(row['text'])}</blockquote>"
            for row in newest_first([row for row in rows if row["kind"] == "sample"])
        ),
        "<h2>Data</h2>",
        table(["split", *next(iter(stats["splits"].values()))], split_rows(stats["splits"])),
        "<h2>Settings</h2>",
        table(["setting", "value"], sorted(flatten(config).items())),
    ]
    page = PAGE.format(title=html.escape(title), body="\n".join(body))
    write_file(folder / "report.html", page.encode())


def summarise(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say the newest numbers in one sentence."""
    looks = [row for row in rows if row["kind"] == "eval"]
    if not looks:
        return "No evaluation yet."
    last = looks[-1]
    if "reward" in last:
        best = max(looks, key=lambda row: row["reward"])
        return (
            f"Answers to held-out prompts had a mean reward of {last['reward']:.4g} at step "
            f"{last['step']}. The highest was {best['reward']:.4g}, at step {best['step']}."
        )
    if "accuracy" in last:
        return (
            f"{float(last['accuracy']):.1%} of the validation pairs were the right way round at step "
            f"{last['step']}, with a loss of {float(last['loss']):.4f}."
        )
    text = (
        f"Validation loss {float(last['loss']):.4f} nats per token "
        f"({float(last['bits_per_byte']):.4f} bits per byte) at step {last['step']}."
    )
    if finite := [row for row in looks if is_number(row["loss"])]:
        best = min(finite, key=lambda row: row["loss"])
        text += f" The lowest was {best['loss']:.4f}, at step {best['step']}."
    if "above_floor_share" in last:
        text += (
            f" The entropy floor of the validation text is "
            f"{float(last['entropy_floor_bits_per_byte']):.4f} bits per byte: the model is "
            f"{float(last['above_floor_share']):.1%} above the best that any model can do."
        )
    return text


def measure_section(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Show what a run is after where that is not its loss: rewards, or pairs the right way round."""
    for name, kind, label in (
        ("reward", "rollout", "mean reward of an answer"),
        ("accuracy", "train", "share of pairs the right way round"),
    ):
        if any(name in row for row in rows if row["kind"] == "eval"):
            return [plot_svg(draw_measure(rows, name, train_kind=kind, label=label))]
    return []


def draw_measure(
    rows: Sequence[Mapping[str, Any]], name: str, *, train_kind: str, label: str
) -> Figure:
    """Plot a number of training rows and of evaluations against steps."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for kind, style, color, what in (
        (train_kind, "-", TRAIN, "in training"),
        ("eval", "o-", VALIDATION, "held out"),
    ):
        found = [(row["step"], row[name]) for row in rows if row["kind"] == kind and name in row]
        found = [(step, value) for step, value in found if is_number(value)]
        if found:
            steps, values = np.array(found).T
            shown = f"{what}, last {values[-1]:.3g}"
            axes.plot(steps, values, style, color=color, linewidth=1, markersize=4, label=shown)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.legend(frameon=False, labelcolor=INK)
    dress(axes)
    return figure


def expert_section(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Show how evenly experts are loaded, where the model has any."""
    loads = [row for row in rows if row["kind"] == "eval" and "expert_load" in row]
    if not loads:
        return []
    text = (
        "Shares of its layer's choices that an expert gets, on the validation set; 1 is an even "
        f"share, {len(loads[-1]['expert_load'][0])} is all of them."
    )
    return ["<h2>Experts</h2>", f"<p>{text}</p>", plot_svg(draw_experts(loads))]


def plot_svg(figure: Figure) -> str:
    """Draw a figure as SVG text."""
    # Text stays text: it can be selected, and the page's font draws it.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tinyllm"}):
        file = io.StringIO()
        metadata = dict.fromkeys(["Creator", "Date", "Format", "Type"])
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    drawing = file.getvalue()
    return drawing[drawing.index("<svg") :]


def draw_losses(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot training and validation loss against steps, and the entropy floor where it is known."""
    train = [row for row in rows if row["kind"] == "train" and is_number(row["loss"])]
    looks = [row for row in rows if row["kind"] == "eval" and is_number(row["loss"])]
    looks = [row for row in looks if "reward" not in row]  # whose loss is the reward turned round
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    if train:
        steps, losses = np.array([(row["step"], row["loss"]) for row in train]).T
        axes.plot(steps, losses, color=TRAIN, linewidth=1, label="training batch")
    if looks:
        steps, losses = np.array([(row["step"], row["loss"]) for row in looks]).T
        label = f"validation, last {losses[-1]:.3f}"
        axes.plot(steps, losses, "o-", color=VALIDATION, markersize=4, label=label)
    if looks and "above_floor_share" in looks[-1]:
        floor = looks[-1]["loss"] / (1 + looks[-1]["above_floor_share"])
        axes.axhline(floor, color=FLOOR, linestyle="--", label=f"entropy floor {floor:.3f}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token" if "perplexity" in {*chain(*looks)} else "loss")
    if (train or looks) and all(row["loss"] > 0 for row in [*train, *looks]):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    if train or looks:
        axes.legend(frameon=False, labelcolor=INK)
    dress(axes)
    return figure


def draw_experts(looks: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the busiest expert of every layer against steps, and the newest load of each expert."""
    # A load that was no number is not drawn.
    finite = [
        row
        for row in looks
        if is_number(row["loss"]) and all(map(is_number, chain(*row["expert_load"])))
    ]
    steps = [row["step"] for row in finite]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    if not finite:
        return figure
    shares = np.array([row["expert_load"] for row in finite])
    shares *= shares.shape[-1]
    over_time, newest = figure.subplots(1, 2)
    layers = shares.shape[1]
    colors = colormaps["viridis"](np.linspace(0.2, 0.9, layers))
    for layer in range(layers):
        busiest = shares[:, layer].max(axis=-1)
        over_time.plot(steps, busiest, "o-", markersize=3, color=colors[layer], label=f"{layer}")
    over_time.axhline(1.0, color=FLOOR, linestyle="--")
    over_time.set_xlabel("step")
    over_time.set_ylabel("share of the busiest expert")
    if layers <= 12:
        over_time.legend(
            title="layer", frameon=False, labelcolor=INK, ncols=2, fontsize=7
        ).get_title().set_color(INK)
    image = newest.imshow(shares[-1], aspect="auto", cmap="viridis", vmin=0.0)
    newest.set_xlabel(f"expert, at step {steps[-1]}")
    newest.set_ylabel("layer")
    for axis in (newest.xaxis, newest.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(image, ax=newest)
    bar.ax.tick_params(colors=INK)
    bar.outline.set_edgecolor(INK)
    for axes in (over_time, newest):
        dress(axes)
    return figure


def dress(axes: Axes) -> None:
    """Give axes the colours of the page."""
    axes.tick_params(colors=INK, which="both")
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)


def is_number(loss: float | str) -> bool:
    """Tell a loss from one that was not finite, which the metrics file holds as text."""
    return not isinstance(loss, str)


def newest_first(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Take the newest ten rows."""
    return list(reversed(rows))[:10]


def split_rows(splits: Mapping[str, Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Turn the account of each split into rows of a table."""
    return [(name, *values.values()) for name, values in splits.items()]


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Write an HTML table."""

    def cells(values: Sequence[Any], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(show(value))}</{tag}>" for value in values)

    lines = [f"<tr>{cells([name.replace('_', ' ') for name in head], 'th')}</tr>"]
    lines += [f"<tr>{cells(row, 'td')}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def show(value: Any) -> str:
    """Write a value for people: thousands apart, few digits, lists as words."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
