"""The page of a run, the page that compares runs, and with what a run says it was started."""

import html
import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL_RUN, Command, run_python

from tinyllm_jax import report, train
from tinyllm_jax.data.files import locked
from tinyllm_jax.errors import InputError
from tinyllm_jax.training import loop
from tinyllm_jax.training.environment import add_start, describe_git, read_starts
from tinyllm_jax.training.report import report_of, write_report
from tinyllm_jax.training.reports.compare import comparison_of
from tinyllm_jax.training.reports.curves import axes_of, expert_section
from tinyllm_jax.training.reports.page import show, table
from tinyllm_jax.training.reports.plot import (
    MOST_POINTS,
    Line,
    Scale,
    averaged,
    draw,
    round_numbers,
    short,
    thin,
)
from tinyllm_jax.training.reports.run import Run, read_run
from tinyllm_jax.training.reports.tables import summarise, usual_settings
from tinyllm_torch import train as torch_train
from tinyllm_torch.training import loop as torch_loop

Row = dict[str, Any]
HARM = '<script>alert(1)</script><img src=x onerror="alert(1)">'
LOOK: Row = {"kind": "eval", "step": 5, "loss": 1.0, "perplexity": 2.7, "bits_per_byte": 0.5}
FLOOR = {"entropy_floor_bits_per_byte": 0.4, "above_floor_share": 0.25}


def train_rows(count: int, **other: Any) -> list[Row]:
    return [
        {"kind": "train", "step": n, "loss": 1 / n, "grad_norm": 1.0, "targets": 100.0, **other}
        for n in range(1, count + 1)
    ]


def speed(step: int, moment: float) -> Row:
    return {"kind": "speed", "step": step, "time": moment, "tokens_per_second": 9.0, "mfu": 0.3}


def run_of(rows: list[Row], **other: Any) -> Run:
    """Make a run without its folder."""
    config = {"run.mode": "pretrain", "train.max_steps": 100, **other.pop("config", {})}
    known = {"folder": Path("some_run"), "config": config, "stats": {}, "starts": [], **other}
    return Run(rows=rows, **known)


def start(moment: float, step: int, **other: Any) -> Row:
    return {"time": moment, "step": step, **other}


def page_of(run: Run, *, goes_on: bool = False) -> str:
    return report_of(run, goes_on=goes_on, now=0.0)


def write_run(folder: Path, rows: list[Row], **files: Any) -> Path:
    """Write a run folder of small files."""
    folder.mkdir()
    snapshot = {"run": {"mode": "pretrain"}, "train": {"max_steps": 9, "batch_size": 4}}
    (folder / "training_config_snapshot.json").write_text(json.dumps(snapshot))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


class Tags(HTMLParser):
    """Gathers the tags of a page, and fails where they are not closed in order."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "wbr"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def names(self) -> set[str]:
        return {tag for tag, _ in self.found}


# Curves -----------------------------------------------------------------------------------------------


def test_a_long_curve_keeps_its_ends_and_extremes_in_a_thousand_points():
    values = np.random.default_rng(0).normal(size=54_321)
    values[[777, 40_001]] = 50.0, -50.0
    chosen = thin(values)
    assert {0, 777, 40_001, 54_320} <= {*chosen}
    assert 990 <= len(chosen) <= MOST_POINTS
    assert all(np.diff(chosen) > 0)
    np.testing.assert_array_equal(thin(values[:1000]), np.arange(1000))


def test_a_mean_curve_is_of_equal_stretches_and_only_of_long_curves():
    x = np.arange(1.0, 1001.0)
    mean = averaged(Line("a", {"step": x}, x**2, "red"), label="b")
    assert mean is not None
    assert len(mean.y) == 100
    assert mean.x["step"][0] == pytest.approx(5.5)
    assert mean.y[0] == pytest.approx(np.mean(x[:10] ** 2))
    assert averaged(Line("a", {"step": x[:299]}, x[:299], "red"), label="b") is None


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (Scale(0.0, 10.0, False), [0, 2, 4, 6, 8, 10]),
        (Scale(-0.03, 0.06, False), [-0.02, 0, 0.02, 0.04, 0.06]),
        (Scale(0.7, 30.0, True), [1, 2, 5, 10, 20]),
        (Scale(1.2, 1.9, True), [1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9]),
        (Scale(1e-6, 1e6, True), [1e-6, 1e-4, 1e-2, 1, 100, 1e4, 1e6]),
    ],
)
def test_ticks_are_round_numbers_within_the_scale(scale: Scale, expected: list[float]):
    assert scale.ticks() == pytest.approx(expected, abs=1e-12)


def test_ticks_are_few_whatever_the_range():
    generator = np.random.default_rng(1)
    for _ in range(500):
        low = generator.normal() * 10 ** generator.uniform(-8, 8)
        high = low + 10 ** generator.uniform(-3, 8)
        assert 3 <= len(round_numbers(low, high)) <= 9


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, "0"), (5e-5, "5e-5"), (2500.0, "2500"), (20_000.0, "20k"), (1.5e6, "1.5M"), (3e9, "3G")],
)
def test_numbers_at_ticks_are_short(value: float, expected: str):
    assert short(value) == expected


def test_points_lie_where_their_numbers_are():
    line = Line("a", {"step": np.array([0.0, 5.0, 10.0])}, np.array([0.0, 10.0, 5.0]), "red")
    drawing = draw("t", [line], axes={"step": "steps"}, from_zero=True)
    # The scale goes from 0 to 4 % above the highest.
    assert 'd="M0 1000L1000 38L2000 519"' in drawing
    assert draw("t", [], axes={"step": "steps"}) == ""


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-12, 1e29])
@pytest.mark.parametrize("log", [False, True])
def test_a_curve_of_one_number_is_drawn(value: float, log: bool):
    for count in (1, 2):
        line = Line("a", {"step": np.arange(count) * 1.0}, np.full(count, value), "red")
        drawing = draw("t", [line], axes={"step": "steps"}, log=log)
        assert "nan" not in drawing
        Tags(drawing)


def test_a_run_is_drawn_over_steps_tokens_and_time():
    rows = [*train_rows(4), speed(2, 1010.0), speed(4, 1030.0)]
    run = run_of(rows, starts=[start(1000.0, 0)])
    assert axes_of(run) == {"step": "steps", "tokens": "tokens", "time": "seconds"}
    line = run.line("train", "loss", "loss {}", "red", "line")
    assert line.label == "loss 0.25"
    np.testing.assert_allclose(line.x["tokens"], [100, 200, 300, 400])
    np.testing.assert_allclose(line.x["time"], [5, 10, 20, 30])
    page = page_of(run)
    assert page.count('class="view by-time"') == page.count('class="view by-step"') == 1
    Tags(page)


def test_no_time_passes_while_a_run_is_stopped():
    rows = [speed(10, 1100.0), speed(20, 9100.0), speed(30, 9300.0)]
    told = run_of(rows, starts=[start(1000.0, 0), start(9000.0, 10)])
    assert told.clock is not None
    np.testing.assert_allclose(told.clock[0], [0, 10, 10, 20, 30])
    np.testing.assert_allclose(told.clock[1], [0, 100, 100, 200, 400])
    assert run_of(rows).seconds == 8200.0
    # Metrics that came along from a run whose starts are not known.
    assert run_of(rows, starts=[start(9000.0, 10)]).seconds == 300.0


def test_axes_that_are_not_known_are_not_offered():
    assert axes_of(run_of([{"kind": "train", "step": 1, "loss": 2.0}])) == {"step": "steps"}
    pairs = run_of(train_rows(2), config={"run.mode": "dpo"})
    assert axes_of(pairs) == {"step": "steps", "tokens": "pairs"}


# The page of a run ------------------------------------------------------------------------------------


def test_the_page_tells_losses_the_floor_and_where_the_best_was():
    page = page_of(run_of([*train_rows(5), LOOK | FLOOR]))
    for text in (
        *("entropy floor 0.800", "entropy floor 0.4000", "in training, last 0.2"),
        *("25.0% above the best", "loss, nats per token", "Finished at step 5 of 5"),
    ):
        assert (text in page) == (text != "Finished at step 5 of 5"), text
    assert "Stopped at step 5 of 100" in page
    assert "The lowest was 1.0000, at step 5." in summarise([LOOK, LOOK | {"loss": "nan"}])


def test_a_page_of_no_steps_yet_is_a_page(trained_run: Path, tmp_path: Path):
    for name in ("training_config_snapshot.json", "dataset_stats.json"):
        (tmp_path / name).write_bytes((trained_run / name).read_bytes())
    write_report(tmp_path, goes_on=True)
    page = (tmp_path / "report.html").read_text()
    assert "No evaluation yet." in page
    assert "nothing to draw" in page
    assert "Training at step 0" in page
    Tags(page)


def test_only_a_run_that_goes_on_has_a_page_that_loads_itself_anew():
    run = run_of(train_rows(3))
    meta = {"http-equiv": "refresh", "content": "30"}
    for goes_on in (True, False):
        page = page_of(run, goes_on=goes_on)
        tags = Tags(page)
        assert (("meta", meta) in tags.found) is goes_on
        assert ("script" in tags.names()) is goes_on
        assert ("Training at step 3" in page) is goes_on


def test_no_text_of_a_run_becomes_markup():
    rows = [
        *train_rows(2, **{HARM: 1.0}),
        LOOK | {HARM: 2.0},
        *({"kind": kind, "step": 1, "text": HARM} for kind in ("sample", "warning", "rewind")),
        {
            "kind": "monitor",
            "step": 1,
            "gradient_norm": {HARM: 1.0},
            "weight_norm": {"layers.0": 1.0},
        },
    ]
    stats = {
        "splits": {HARM: {HARM: HARM}},
        "files": [{"path": HARM, HARM: HARM}],
        "settings": {HARM: HARM},
    }
    told = start(
        0.0, 0, command=HARM, git=HARM, preset=HARM, variables={HARM: HARM}, **{HARM: HARM}
    )
    config = {"run.mode": HARM, HARM: HARM}
    run = run_of(rows, folder=Path(HARM), config=config, stats=stats, starts=[told])
    for page in (page_of(run), comparison_of([Path(HARM), Path("b")], [run, run_of([])], now=0.0)):
        tags = Tags(page)
        assert not tags.names() & {"script", "img"}
        assert not any(name.startswith("on") for _, names in tags.found for name in names)
        assert "alert(1)" in html.unescape(page)


def test_steps_that_were_no_numbers_are_marked_and_counted():
    rows = train_rows(9)
    rows[4] |= {"loss": "nan", "grad_norm": "inf", "skipped": True}
    rows[5] |= {"skipped": True}
    rows.append(LOOK | {"loss": "nan", "bits_per_byte": "nan", "perplexity": "nan"})
    page = page_of(run_of(rows))
    assert "<dt>Steps left out</dt><dd>2<small>" in page
    assert "not finite</span>" in page
    # Two marks at steps 5 and 6 of 9.
    assert 'd="M1111 1000v-70M1333 1000v-70"' in page
    Tags(page)


def test_what_went_wrong_is_told_the_newest_first_and_marked():
    rows = train_rows(9)
    for step, kind in ((2, "warning"), (4, "warning"), (6, "rewind"), (8, "warning")):
        rows.append({"kind": kind, "step": step, "text": f"trouble {step}."})
    page = page_of(run_of(rows))
    section = page[page.index("<h2>Warnings</h2>") : page.index("<h2>Curves</h2>")]
    places = [section.index(f"trouble {step}.") for step in (8, 6, 4, 2)]
    assert places == sorted(places)
    assert "1 earlier ones" in section
    assert 'd="M444 1000v-70M889 1000v-70M1333 1000v-70M1778 1000v-70"' in page
    assert "<h2>Warnings</h2>" not in page_of(run_of(train_rows(9)))


def test_experts_are_shown_by_their_shares_of_an_even_one():
    loads = [[[0.25, 0.75], [0.5, 0.5]], [[0.4, 0.6], [0.1, 0.9]]]
    rows = [LOOK | {"step": n, "expert_load": load} for n, load in enumerate(loads, start=1)]
    lost = LOOK | {"step": 3, "loss": "nan", "expert_load": [["nan"] * 2] * 2}
    heading, text, plot, _, shares = expert_section([*rows, lost])
    assert (heading, "2 is all of them" in text) == ("<h2>Experts</h2>", True)
    assert [f">{each:.2f}</td>" in shares for each in (0.8, 1.2, 0.2, 1.8)] == [True] * 4
    assert ", 1: 1.5</title>" in plot
    assert ", 2: 1.8</title>" in plot
    assert expert_section([LOOK]) == []
    assert len(expert_section([lost])) == 2


def test_layers_are_drawn_where_they_were_looked_at():
    parts = {f"layers.{n}": 1.0 + n for n in range(12)} | {"norm": 0.5}
    rows = [{"kind": "monitor", "step": n, "update_ratio": parts} for n in (10, 20)]
    page = page_of(run_of(rows))
    assert "change of a step over size of the weights" in page
    assert "layer 0 <i" in page
    assert "layer 11</span>" in page
    assert "<h2>Layers</h2>" not in page_of(run_of(train_rows(3)))


def test_every_other_number_is_drawn_too():
    rows = [row | {"kl": 0.5, "entropy": 2.0} for row in train_rows(2)]
    page = page_of(run_of(rows))
    assert "<b>kl</b>" in page
    assert "<b>entropy</b>" in page
    assert "<b>targets</b>" not in page


def test_samples_of_a_long_run_are_of_all_its_parts():
    rows = [{"kind": "sample", "step": n, "text": f"story {n}."} for n in range(1, 101)]
    page = page_of(run_of(rows))
    assert page.index("story 100.") < page.index("story 1.")
    assert page.count('class="sample"') == 24
    assert "21 earlier ones" in page


def test_settings_are_told_as_differences_from_the_preset():
    config = {"optimizer.learning_rate": 0.1, "train.batch_size": 7, "data.paths": ["toy"]}
    named = {"train.batch_size": 7, "data.paths": "toy"}
    run = run_of([], config=config, starts=[start(0.0, 0, preset="mine", preset_settings=named)])
    page = page_of(run).replace(' class="number"', "")
    differing = page[page.index("<h2>Settings</h2>") : page.index("All settings")]
    assert "preset mine" in differing
    assert "learning_<wbr>rate</td><td>0.1</td>" in differing
    assert "batch" not in differing
    assert "data" not in differing
    assert usual_settings(run_of([]))[0] == "the defaults"


def long_run(folder: Path, steps: int) -> Path:
    generator, rows = np.random.default_rng(0), []
    for row in train_rows(steps, learning_rate=1e-3, skipped=False):
        step = row["step"]
        rows.append(row | {"loss": 1 + math.exp(-step / 999) + 0.1 * generator.random()})
        if step % 10 == 0:
            rows.append(speed(step, 1e9 + step))
    return write_run(folder, rows)


def calls_of_a_page(folder: Path) -> int:
    """Count what is called, of Python and of C, to write the page: the same number each time."""
    count = 0

    def look(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(look)
    try:
        write_report(folder, goes_on=True)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.slow
def test_a_page_of_20_000_steps_is_small_and_five_times_the_steps_are_five_times_the_calls(
    tmp_path: Path,
):
    short, long = long_run(tmp_path / "short", 4_000), long_run(tmp_path / "long", 20_000)
    assert calls_of_a_page(long) < 5 * calls_of_a_page(short)
    assert (long / "report.html").stat().st_size < 300_000


def test_the_report_needs_neither_jax_nor_matplotlib():
    script = (
        "import sys, tinyllm_jax.report, tinyllm_jax.training.environment; "
        "print([n for n in ('jax', 'flax', 'torch', 'matplotlib') if n in sys.modules])"
    )
    done = run_python("-c", script)
    assert done.stdout.strip() == "[]", done.stderr


# Comparing --------------------------------------------------------------------------------------------


def test_runs_are_compared_by_curves_final_numbers_and_what_differs():
    one = run_of(
        [*train_rows(5), LOOK | FLOOR],
        folder=Path("a/one"),
        config={"optimizer.learning_rate": 0.1},
    )
    two = run_of([*train_rows(4), LOOK | FLOOR | {"loss": 2.0}], folder=Path("b/two"))
    page = comparison_of([Path("a/one"), Path("b/two")], [one, two], now=0.0)
    Tags(page)
    page = page.replace(' class="number"', "")
    for text in (
        *("one, 1</span>", "two, 2</span>", "learning_<wbr>rate</td><td>0.1</td>"),
        *("entropy floor 0.4</span>", "<td>tokens learnt from</td><td>500</td><td>400</td>"),
        "<td>lowest</td><td>1</td><td>2</td>",
    ):
        assert text in page, text
    # The floors of the losses differ, so neither is drawn.
    assert page.count("entropy floor") == 1
    assert "max_<wbr>steps" not in page


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({}, None),
        ({"config": {"run.mode": "dpo"}}, "different ways"),
        ({"stats": {"tokenizer_hash": "b"}}, "compare bits per byte"),
        ({"stats": {"tokenizer_hash": "a", "dataset_hash": "c"}}, "different texts"),
    ],
)
def test_losses_that_say_different_things_are_named(other: Row, expected: str | None):
    stats = {"tokenizer_hash": "a", "dataset_hash": "b"}
    runs = [run_of([LOOK], stats=stats), run_of([LOOK], **{"stats": stats, **other})]
    page = comparison_of([Path("a"), Path("b")], runs, now=0.0)
    assert ('class="warning"' in page) is (expected is not None)
    assert (expected or "") in page


def test_runs_of_the_same_name_are_told_apart_and_one_run_is_not_compared_with_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    runs = [run_of([], folder=Path(f"{parent}/run")) for parent in "ab"]
    page = comparison_of([Path("a/run"), Path("b/run")], runs, now=0.0)
    assert "<th>a/run</th>" in page.replace(' style="border-top:3px solid var(--c1)"', "").replace(
        ' class="number"', ""
    )
    monkeypatch.chdir(write_run(tmp_path / "mine", train_rows(2)))
    with pytest.raises(InputError, match=r"mine: named twice"):
        report.main([".", "../mine"])


# The command ------------------------------------------------------------------------------------------


def test_the_command_writes_the_report_of_one_run_anew_and_compares_several(
    command: Command, trained_run: Path, run_copy: Path
):
    (run_copy / "report.html").unlink()
    done = command.run("report", "run")
    assert (done.returncode, done.stdout) == (0, "run/report.html\n"), done.stderr
    page = (run_copy / "report.html").read_text()
    assert "Finished at step 20 of 20" in page
    assert "<h2>Environment</h2>" in page
    done = command.run("report", "run", str(trained_run))
    assert (done.returncode, done.stdout) == (0, "comparison.html\n"), done.stderr
    text = (run_copy.parent / "comparison.html").read_text()
    assert "2 runs" in text
    done = command.run("report", "run", "--out", "pages/one.html")
    assert (done.returncode, done.stdout) == (0, "pages/one.html\n"), done.stderr


def test_a_run_in_training_has_a_page_that_loads_itself_anew(tmp_path: Path):
    folder = write_run(tmp_path / "run", train_rows(2))
    with locked(tmp_path / ".run.lock", on_wait=lambda: None):
        report.main([str(folder)])
        assert "Training at step 2" in (folder / "report.html").read_text()
    report.main([str(folder)])
    assert "Stopped at step 2" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"nonsense\n", r"metrics\.jsonl:3: not JSON .*Remove that line"),
        (b"[1]\n", r"metrics\.jsonl:3: no row of metrics"),
        (b'{"kind": "train"}\n', r"metrics\.jsonl:3: no row of metrics"),
        (b'{"kind": "train", "step": "1"}\n', r"metrics\.jsonl:3: no row of metrics"),
        (b'{"kind": 3, "step": 1}\n', r"metrics\.jsonl:3: no row of metrics"),
        (b'\n\n{"kind": 3, "step": 1}\n', r"metrics\.jsonl:5: no row of metrics"),
        (b'{"kind": "\xff"}\n', r"metrics\.jsonl:3: not UTF-8"),
    ],
)
def test_a_damaged_line_of_metrics_is_named(tmp_path: Path, line: bytes, expected: str):
    folder = write_run(tmp_path / "run", train_rows(2))
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(line)
    with pytest.raises(InputError, match=expected):
        report.main([str(folder)])


@pytest.mark.parametrize(
    "row",
    [
        *({"kind": kind, "step": 3} for kind in ("train", "eval", "speed", "sample", "warning")),
        *({"kind": kind, "step": 3} for kind in ("rollout", "monitor", "layers", "news")),
        LOOK | {"loss": [1.0], "bits_per_byte": {"a": 1}, "perplexity": None},
        LOOK | {"reward": "nan"},
        LOOK | {"accuracy": None},
        LOOK | {"expert_load": 3},
        LOOK | {"expert_load": [[]]},
        {"kind": "train", "step": 3, "loss": 1e300, "targets": -1e300, "grad_norm": -1.0},
        {"kind": "monitor", "step": 3, "gradient_norm": {"layers.x": 1, "": "nan", "layers.": 2}},
        {"kind": "speed", "step": -2, "time": "now", "mfu": True},
    ],
)
def test_rows_of_another_make_are_read_as_far_as_they_go(tmp_path: Path, row: Row):
    folder = write_run(tmp_path / "run", [*train_rows(2), row, LOOK])
    report.main([str(folder)])
    report.main([str(folder), str(write_run(tmp_path / "b", [row])), "--out", str(tmp_path / "c")])
    for path in (folder / "report.html", tmp_path / "c"):
        Tags(path.read_text())


@pytest.mark.parametrize("name", ["training_config_snapshot", "dataset_stats", "environment"])
@pytest.mark.parametrize(
    "content", [b"{", b"[1]", b"\xff\xfe", b'{"starts": 1}', b'{"starts": [1]}']
)
def test_a_damaged_file_of_a_run_is_named(tmp_path: Path, name: str, content: bytes):
    folder = write_run(tmp_path / "run", train_rows(2))
    (folder / f"{name}.json").write_bytes(content)
    if name != "environment" and content.startswith(b'{"'):
        report.main([str(folder)])
        return
    with pytest.raises(InputError, match=rf"{name}\.json: "):
        report.main([str(folder)])


def test_what_is_no_run_is_refused_in_one_line(command: Command, tmp_path: Path):
    for words, expected in (
        (["."], "error: .: no run folder (it has no training_config_snapshot.json)."),
        (["nowhere"], "error: nowhere: no run folder"),
        ([], "error: The following arguments are required: RUN."),
    ):
        done = command.run("report", *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(expected)
        assert done.stderr.count("\n") == 1
    assert not [*tmp_path.iterdir()]


# The environment --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_of_a_run_goes_on_until_its_end_also_in_the_twin(
    prepared_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
    for package, module in ((train, loop), (torch_train, torch_loop)):
        told: list[bool] = []

        def write(folder: Path, *, goes_on: bool, told: list[bool] = told) -> None:
            told.append(goes_on)
            write_report(folder, goes_on=goes_on)

        monkeypatch.setattr(module, "write_report", write)
        flags = ["--max-steps", "2", "--train.eval_interval_steps", "1", "--out", package.__name__]
        assert package.main([*SMALL_RUN, *flags]) == 0
        assert told == [True, True, False]
        (only,) = read_starts(Path(package.__name__))
        assert only["preset"] == "tiny"
        page = (tmp_path / package.__name__ / "report.html").read_text()
        assert "Finished at step 2 of 2" in page
        assert 'http-equiv="refresh"' not in page
    assert "torch" in only["versions"]


@pytest.mark.slow
def test_each_start_of_a_run_is_written_down(
    prepared_folder: Path, run_copy: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(run_copy.parent)
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(prepared_folder))
    assert train.main(["--resume", "run", "--max-steps", "21"]) == 0
    branched = ["--resume", "run/checkpoints/21", "--max-steps", "22", "--out", "branch"]
    assert train.main(branched) == 0
    first, second, third = read_starts(Path("branch"))
    assert read_starts(Path("run")) == [first, second]
    assert [each["step"] for each in (first, second, third)] == [0, 20, 21]
    assert [each["preset"] for each in (first, second, third)] == ["tiny"] * 3
    assert first["preset_settings"]["model.hidden_size"] == 256
    assert third["preset_settings"] == first["preset_settings"]
    assert third["folder"] == str(run_copy.parent)
    assert third["versions"].keys() >= {"jax", "flax", "numpy"}
    assert third["variables"]["TINYLLM_DATA_DIR"] == str(prepared_folder)
    assert third["device"].endswith("x cpu")
    assert third["command"]
    page = Path("branch/report.html").read_text()
    for text in ("2 earlier starts", "<small>3 starts</small>", "preset tiny", "step 22 of 22"):
        assert text in page, text


def test_a_start_tells_the_commit_of_the_folder_it_was_made_in(tmp_path: Path):
    def git(*words: str) -> str:
        config = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *config, *words],
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    assert describe_git(tmp_path) == ""
    git("init", "--quiet")
    assert describe_git(tmp_path) == ""  # no commit yet
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "--quiet", "-m", "one")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("1")
    assert describe_git(tmp_path) == commit
    (tmp_path / "a.py").write_text("2")
    assert describe_git(tmp_path) == f"{commit}, with changes"


def test_a_machine_without_git_starts_a_run_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    add_start(tmp_path, earlier=[], step=3, preset=None, device="1 x abacus", packages=("no-such",))
    (told,) = read_starts(tmp_path)
    assert (told["git"], told["step"], told["device"]) == ("", 3, "1 x abacus")
    assert "no-such" not in told["versions"]


# Tables -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((None, "-"), (True, "true"), (1234567, "1,234,567"), (0.00012345, "0.0001234")),
        *((54321.9, "54,322"), (1e20, "1e+20"), (("a", 2), "a 2"), ({"a": 0.5}, "a 0.5")),
        *(("0" * 40, "000000000000..."), ("abc", "abc"), ("nan", "nan")),
    ],
)
def test_values_are_written_for_people(value: Any, expected: str):
    assert show(value) == expected


def test_columns_of_numbers_are_set_to_the_right():
    drawn = table(["a", "b_c"], [["x", 1], ["y", None]])
    assert '<th class="number">b_<wbr>c</th>' in drawn
    assert drawn.count('<td class="number">') == 2


def test_a_run_folder_is_read_by_any_of_its_names(tmp_path: Path):
    folder = write_run(tmp_path / "run", train_rows(2))
    (tmp_path / "link").symlink_to(folder)
    assert read_run(tmp_path / "link").name == "run"
