"""The curves of one run's report, as HTML; what nothing is known of is left out."""

import dataclasses
import html
import re
from collections.abc import Sequence
from itertools import chain

import numpy as np

from tinyllm_jax.training.reports.page import folded, unit_of_time
from tinyllm_jax.training.reports.plot import Line, averaged, draw, shades
from tinyllm_jax.training.reports.run import WARNINGS, Row, Run, is_finite

TRAIN, HELD_OUT, FLOOR, PLAIN, BAD = "var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)"
BY_STEP = {"step": "steps"}
# What a run is after where that is not its loss: name, rows of training, and what it is called.
GOALS = (
    ("reward", "rollout", "mean reward of an answer"),
    ("accuracy", "train", "share of pairs the right way round"),
)
# Numbers that have a plot of their own, or say nothing as a curve.
TOLD = (
    *("kind", "step", "time", "loss", "learning_rate", "grad_norm", "targets", "skipped"),
    *("perplexity", "bits_per_byte", "entropy_floor_bits_per_byte", "above_floor_share"),
)
# Of a look at the layers, each by layer; the bool says that its scale is logarithmic.
LAYER_NUMBERS = {
    "gradient_norm": ("gradient norm, before clipping", True),
    "update_ratio": ("change of a step over size of the weights", True),
    "weight_norm": ("norm of the weights", False),
    "activation_rms": ("activations, root mean square", True),
    "attention_logit_max": ("largest attention logit", False),
}


def axes_of(run: Run) -> dict[str, str]:
    """Name what the curves of a run can go over."""
    found = {"step": "steps"}
    if run.learnt is not None:
        found["tokens"] = run.unit
    if run.clock is not None:
        found["time"] = unit_of_time(run.seconds)[1]
    return found


def in_units(run: Run, line: Line) -> Line:
    """Bring the seconds of a curve to the unit that the time axis of the run is in."""
    if "time" not in line.x:
        return line
    size, _ = unit_of_time(run.seconds)
    return dataclasses.replace(line, x={**line.x, "time": line.x["time"] / size})


def curves(run: Run) -> list[str]:
    """Draw what the run is after: its loss, bits per byte, rewards, pairs the right way round."""
    axes = axes_of(run)
    plots = [
        draw(
            label,
            [in_units(run, line) for line in _training_and_held_out(run, kind, name)],
            axes=axes,
        )
        for name, kind, label in GOALS
        if any(name in row for row in run.of_kind("eval"))
    ]
    looks = run.of_kind("eval")
    lines = _training_and_held_out(run, "train", "loss")
    if any("reward" in row for row in looks):
        lines = lines[:-1]  # there it is the reward turned round
    floor_lines = []
    if looks and all(is_finite(looks[-1].get(name)) for name in ("loss", "above_floor_share")):
        floor = looks[-1]["loss"] / (1 + looks[-1]["above_floor_share"])
        floor_lines = [Line(f"entropy floor {floor:.3f}", {}, np.array([floor]), FLOOR, "level")]
    lost = run.lost_steps
    marks = [Line("not finite", run.places(lost), np.zeros(len(lost)), BAD, "marks")]
    told = np.array([row["step"] for row in run.rows if row["kind"] in WARNINGS], np.float64)
    marks.append(
        Line("warning", run.places(told), np.zeros(len(told)), "var(--warn-line)", "marks")
    )
    is_per_token = any("perplexity" in row for row in looks)
    positive = all(np.all(line.y > 0) for line in [*lines, *floor_lines])
    shown = [in_units(run, line) for line in [*lines, *floor_lines, *marks]]
    title = "loss, nats per token" if is_per_token else "loss"
    plots.append(draw(title, shown, axes=axes, log=positive))
    bits = [run.line("eval", "bits_per_byte", "validation, last {}", HELD_OUT, "dots")]
    floor = run.series("eval", "entropy_floor_bits_per_byte")[1]
    if len(floor):
        bits.append(Line(f"entropy floor {floor[-1]:.4f}", {}, floor, FLOOR, "level"))
    bits = [in_units(run, line) for line in bits]
    plots.append(draw("bits per byte", bits, axes=axes, is_small=True))
    drawn = [plot for plot in plots if plot]
    return drawn or ["<p>No step has been written yet, so there is nothing to draw.</p>"]


def _training_and_held_out(run: Run, kind: str, name: str) -> list[Line]:
    """Give the curve of training and that of evaluations."""
    raw = run.line(kind, name, "in training, last {}", TRAIN, "line")
    lines = with_mean(raw, label="mean of a hundredth of the steps")
    return [*lines, run.line("eval", name, "validation, last {}", HELD_OUT, "dots")]


def with_mean(line: Line, *, label: str) -> list[Line]:
    """Give a curve, which is faint under its mean where it is long."""
    mean = averaged(line, label=label)
    return [line] if mean is None else [dataclasses.replace(line, form="faint"), mean]


def step_section(run: Run) -> list[str]:
    """Draw learning rate, gradient norm and speed."""
    plots = [
        _small(run, "train", "learning_rate", "learning rate", PLAIN, from_zero=True),
        _small(run, "train", "grad_norm", "gradient norm, before clipping", PLAIN, log=True),
        _small(run, "speed", "tokens_per_second", "tokens a second", FLOOR, from_zero=True),
        _small(run, "speed", "mfu", "MFU: share of the peak", FLOOR, from_zero=True),
        _small(
            run,
            "speed",
            "data_wait_share",
            "share of time waiting for batches",
            FLOOR,
            from_zero=True,
        ),
    ]
    return grid("Steps", plots)


def _small(
    run: Run,
    kind: str,
    name: str,
    title: str,
    color: str,
    *,
    log: bool = False,
    from_zero: bool = False,
) -> str:
    lines = with_mean(run.line(kind, name, "last {}", color, "line"), label="")
    positive = bool(np.all(lines[0].y > 0))
    return draw(
        title, lines, axes=BY_STEP, log=log and positive, from_zero=from_zero, is_small=True
    )


def grid(heading: str, plots: Sequence[str]) -> list[str]:
    """Put small plots beside each other."""
    drawn = "".join(plots)
    return [f"<h2>{heading}</h2>", f'<div class="grids">{drawn}</div>'] if drawn else []


def layer_section(run: Run) -> list[str]:
    """Draw what looks at the layers found."""
    rows, plots = run.of_kind("monitor"), []
    for name, (title, is_log) in LAYER_NUMBERS.items():
        looks = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), dict)]
        parts = list(dict.fromkeys(part for _, found in looks for part in found))
        layers = sorted(
            (part for part in parts if re.fullmatch("layers.[0-9]+", part)),
            key=lambda part: int(part.removeprefix("layers.")),
        )
        others = [part for part in parts if part not in layers]
        shade, lines = shades(len(layers)), []
        for part in parts:
            found = [(step, each[part]) for step, each in looks if is_finite(each.get(part))]
            steps, values = np.array(found, np.float64).reshape(-1, 2).T
            if part in layers:
                color, form = shade(layers.index(part)), "line"
            else:
                color, form = f"var(--c{others.index(part) % 8 + 1})", "dashed"
            lines.append(Line(part, {"step": steps}, values, color, form))
        positive = all(np.all(line.y > 0) for line in lines)
        legend = layer_legend(layers, [line for line in lines if line.form == "dashed"])
        plots.append(
            draw(title, lines, axes=BY_STEP, log=is_log and positive, legend=legend, is_small=True)
        )
    return grid("Layers", plots)


def layer_legend(layers: Sequence[str], others: Sequence[Line]) -> str:
    """Name the first and the last layer on the scale of their colours, and all that is none."""
    found = ""
    if layers:
        names = [layer.replace("layers.", "layer ") for layer in (layers[0], layers[-1])]
        found = f'<span class="key">{html.escape(names[0])} <i class="scale"></i>'
        found += f"{html.escape(names[1])}</span>"
    return found + "".join(
        f'<span class="key"><i class="dashed" style="--c:{line.color}"></i>{html.escape(line.label)}'
        "</span>"
        for line in others
    )


def expert_section(rows: Sequence[Row]) -> list[str]:
    """Show how evenly experts are loaded, where the model has any."""
    loads = [row for row in rows if row["kind"] == "eval" and "expert_load" in row]
    shapes = {np.shape(row["expert_load"]) for row in loads}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or 0 in shape:
        return []
    experts = shape[1]
    text = (
        "Shares of its layer's choices that an expert gets, on the validation set; 1 is an even "
        f"share, {experts} is all of them."
    )
    # A load that was no number is not drawn.
    finite = [row for row in loads if all(map(is_finite, chain(*row["expert_load"])))]
    if not finite:
        return ["<h2>Experts</h2>", f"<p>{text}</p>"]
    steps = np.array([row["step"] for row in finite], np.float64)
    shares = np.array([row["expert_load"] for row in finite], np.float64) * experts
    layers = [f"layers.{layer}" for layer in range(shares.shape[1])]
    shade = shades(len(layers))
    lines = [
        Line(name, {"step": steps}, shares[:, layer].max(axis=-1), shade(layer), "dots")
        for layer, name in enumerate(layers)
    ]
    lines.append(Line("even", {}, np.ones(1), FLOOR, "level"))
    legend = layer_legend(layers, [lines[-1]])
    plot = draw("share of the busiest expert", lines, axes=BY_STEP, legend=legend, is_small=True)
    return [
        "<h2>Experts</h2>",
        f"<p>{text}</p>",
        plot,
        f'<p class="soft">Of each layer (down) and expert (across) at step {steps[-1]:,.0f}:</p>',
        heat(shares[-1]),
    ]


def heat(shares: np.ndarray) -> str:
    """Write shares as a table whose cells are the darker the larger they are."""
    most = max(float(shares.max()), 1e-9)
    rows = "".join(
        f"<tr><th>{layer}</th>"
        + "".join(
            f'<td class="heat" style="background:color-mix(in oklab,var(--c1) {45 * each / most:.0f}%,'
            f'transparent)">{each:.2f}</td>'
            for each in row
        )
        + "</tr>"
        for layer, row in enumerate(shares)
    )
    return f'<div class="scroll"><table>{rows}</table></div>'


def other_numbers(run: Run) -> list[str]:
    """Draw all other numbers, of training and of evaluations, folded away."""
    told = {*TOLD, *(name for name, _, _ in GOALS)}
    names = dict.fromkeys(
        name
        for kind in ("train", "rollout", "eval")
        for row in run.of_kind(kind)
        for name, value in row.items()
        if name not in told and is_finite(value)
    )
    plots = [
        draw(
            name.replace("_", " "),
            [
                run.line("train", name, "in training, last {}", TRAIN, "line"),
                run.line("rollout", name, "of rollouts, last {}", PLAIN, "line"),
                run.line("eval", name, "validation, last {}", HELD_OUT, "dots"),
            ],
            axes=BY_STEP,
            is_small=True,
        )
        for name in names
    ]
    drawn = "".join(plots)
    if not drawn:
        return []
    return [folded("All other numbers as curves", f'<div class="grids">{drawn}</div>')]
