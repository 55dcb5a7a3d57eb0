"""Draw what each stage of docs/assistant.md improves, from the metrics of finished runs.

python -m benchmarks.assistant checkpoints/sft_stories checkpoints/dpo_stories checkpoints/rlhf_stories
"""

import argparse
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from tinyllm_jax.training.metrics import read_metrics

# What a run of each mode is after: the number, the kind of training row that has it too, and its name.
MEASURES = {
    "sft": ("loss", "train", "nats per token of the answers"),
    "dpo": ("accuracy", "train", "share of pairs the right way round"),
    "reward": ("accuracy", "train", "share of pairs the right way round"),
    "rlhf": ("reward", "rollout", "mean reward of an answer"),
}
# Grey that reads on white and on black alike.
INK, TRAIN, VALIDATION = "#808080", "#6ea8dc", "#e07b39"
MEAN_OVER = 10  # training rows that one point is the mean of


def main() -> None:
    """Draw one panel for each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path("docs/images/assistant.svg"))
    arguments = parser.parse_args()
    figure = Figure(figsize=(4 * len(arguments.runs), 3.4), layout="constrained")
    panels = figure.subplots(1, len(arguments.runs), squeeze=False)[0]
    for axes, run in zip(panels, arguments.runs, strict=True):
        mode = run.name.partition("_")[0]
        name, train_kind, label = MEASURES[mode]
        rows = read_metrics(run / "metrics.jsonl")
        # At the first step every pair is a tie, which says nothing.
        looks = [
            (row["step"], row[name])
            for row in rows
            if row["kind"] == "eval" and not (name == "accuracy" and row["step"] == 0)
        ]
        steps = [(row["step"], row[name]) for row in rows if row["kind"] == train_kind]
        size = MEAN_OVER if train_kind == "train" else 1
        means = [
            (
                steps[start + size - 1][0],
                sum(value for _, value in steps[start : start + size]) / size,
            )
            for start in range(0, len(steps) - size + 1, size)
        ]
        axes.plot(*zip(*means, strict=True), color=TRAIN, label="in training")
        axes.plot(*zip(*looks, strict=True), "o-", color=VALIDATION, label="held out")
        axes.set_title(f"--mode {mode}", color=INK, fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.legend(frameon=False, labelcolor=INK)
        axes.tick_params(colors=INK, which="both")
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        print(f"{run}: " + ", ".join(f"step {step} {value:.4g}" for step, value in looks))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tinyllm"}):
        figure.savefig(arguments.out, transparent=True, metadata={"Date": None})
    print(f"Written: {arguments.out}")


if __name__ == "__main__":
    main()
