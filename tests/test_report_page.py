"""The pages of runs in a real browser: Chromium without a window."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright: pip install 'tinyllm[test]'"
)

from tinyllm_jax.training.report import report_of  # noqa: E402
from tinyllm_jax.training.reports.compare import comparison_of  # noqa: E402
from tinyllm_jax.training.reports.run import Run, read_run  # noqa: E402

HARM = '<script>window.harmed=1</script><img src=x onerror="window.harmed=1">'
# Names of things at the axes that lie over each other.
OVERLAPS = """() => [...document.querySelectorAll(".frame")].flatMap((frame) => {
  const boxes = [...frame.querySelectorAll("span")].filter((each) => each.checkVisibility())
    .map((each) => [each.textContent, each.getBoundingClientRect()]);
  return boxes.flatMap(([one, a], n) => boxes.slice(n + 1).filter(([two, b]) => a.left < b.right
    && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom)
    .map(([two]) => `${one} and ${two}`));
})"""


def full_run(name: str) -> Run:
    """Make a run of which everything is known, with texts that would do harm."""
    rows: list[dict[str, Any]] = []
    for step in range(1, 401):
        loss = 1 + 6 * math.exp(-step / 99)
        rows.append({"kind": "train", "step": step, "loss": loss, "grad_norm": 1e4 / step})
        rows[-1] |= {"learning_rate": 1e-5 * step, "targets": 262_144.0, "router_z_loss": loss}
        if step in (200, 201):
            rows[-1] |= {"loss": "nan", "skipped": True}
        if step % 50:
            continue
        parts = {f"layers.{n}": step * 10.0**-n for n in range(8)} | {"embed_tokens": 9.0}
        rows += [
            {
                "kind": "speed",
                "step": step,
                "time": 1e9 + 40 * step,
                "tokens_per_second": 123_456.0,
            },
            {
                "kind": "eval",
                "step": step,
                "loss": loss + 0.1,
                "perplexity": 9.0,
                "bits_per_byte": loss / 3,
            },
            {"kind": "sample", "step": step, "text": HARM + "word" * 90},
            {"kind": "warning", "step": step, "text": HARM},
            {"kind": "monitor", "step": step, "gradient_norm": parts, "attention_logit_max": parts},
        ]
        rows[-4] |= {"expert_load": [[1 / 16] * 16] * 8}
    start = {"time": 1e9, "step": 0, "command": f"train --prompt {HARM}", "git": "a" * 40}
    config = {"run.mode": "pretrain", "train.max_steps": 400, "data.paths": ["/a/long/path" * 9]}
    splits = {split: {"documents": 10**9, HARM: 1} for split in ("train", "validation")}
    return Run(Path(name), rows, config, {"splits": splits, "dataset_hash": "b" * 64}, [start])


def pages(trained_run: Path) -> dict[str, str]:
    """Write the pages that are looked at."""
    one, two, empty = (
        full_run("one"),
        full_run(HARM.replace("/", "")),
        Run(Path("e"), [], {}, {}, []),
    )
    names = [Path(name) for name in ("a", "b", "c")]
    return {
        "full": report_of(one, goes_on=True, now=time.time()),
        "trained": report_of(read_run(trained_run), goes_on=False, now=0.0),
        "empty": report_of(empty, goes_on=True, now=0.0),
        "comparison": comparison_of(names, [one, two, empty], now=0.0),
    }


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Open pages; whatever the browser complains of fails the test."""
    contexts, complaints = [], []

    def open_page(content: str, at: float | None = None, **options: Any) -> Any:
        path = tmp_path / "page.html"
        path.write_text(content)
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.complaints = complaints
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text))
        page.clock.install(time=at)
        page.goto(path.as_uri())
        return page

    yield open_page
    assert complaints == []
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", [320, 390, 1100])
def test_pages_fit_the_window_and_nothing_lies_over_anything(
    width: int, opened: Any, trained_run: Path
):
    for name, content in pages(trained_run).items():
        page = opened(content, viewport={"width": width, "height": 700})
        page.evaluate("document.querySelectorAll('details').forEach((each) => each.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert page.evaluate(OVERLAPS) == [], name
        outside = "all => all.filter((each) => each.getBoundingClientRect().left < 0).map((e) => e.textContent)"
        assert page.locator(".frame span:visible").evaluate_all(outside) == [], name


def test_nothing_of_what_a_run_says_runs(opened: Any, trained_run: Path):
    for content in pages(trained_run).values():
        page = opened(content)
        assert page.evaluate("window.harmed") is None
        assert page.locator("body :is(img, script)").count() == 0
    page = opened(pages(trained_run)["full"])
    assert HARM in page.locator(".sample").first.text_content()


def test_even_a_script_that_got_into_the_page_does_not_run(opened: Any):
    for goes_on in (True, False):
        content = report_of(full_run("one"), goes_on=goes_on, now=0.0)
        page = opened(content.replace("</body>", f"{HARM}</body>"))
        page.wait_for_timeout(100)
        assert page.evaluate("window.harmed") is None
        assert all("Content Security Policy" in said for said in page.complaints)
        assert len(page.complaints) >= 2
        page.complaints.clear()


def test_curves_go_over_what_the_reader_chooses_also_after_loading_anew(
    opened: Any, trained_run: Path
):
    page = opened(pages(trained_run)["full"])
    frame = page.locator(".frame").first
    chosen = (
        "() => [...document.querySelectorAll('.switch a')].map((a) => getComputedStyle(a).color)"
    )

    def shown() -> list[str]:
        return frame.locator(".what:visible").all_text_contents()

    assert shown() == ["steps"]
    colors = page.evaluate(chosen)
    assert colors[0] != colors[1] == colors[2]
    page.evaluate("scrollTo(0, 200)")
    page.click(".switch a[href$=tokens]")
    assert shown() == ["tokens"]
    assert page.evaluate(chosen) == [colors[1], colors[0], colors[1]]
    page.click(".switch a[href$=time]")
    assert shown() == ["hours"]
    page.evaluate("scrollTo(0, 300)")
    with page.expect_event("load"):
        page.clock.fast_forward(30_001)
    assert shown() == ["hours"]
    assert page.evaluate("scrollY") == 300


def test_a_page_that_nobody_writes_any_more_says_so_and_stays(opened: Any):
    """As after SIGKILL: 4 intervals of 50 steps of 40 seconds are missed, with half an hour to spare."""
    run, written = full_run("one"), 1_700_000_000.0
    run.config.update({"train.eval_interval_steps": 50, "checkpoint.interval_steps": 100})
    allowed = 4 * 50 * 40 + 1800
    content = report_of(run, goes_on=True, now=written)
    for age, is_late in ((allowed - 20, False), (allowed + 2, True)):
        page = opened(content, at=written + age)
        assert ("Not refreshed since 2023-11-14 22:13 UTC" in page.inner_text("body")) == is_late
        assert ("this page loads itself anew" in page.inner_text("body")) != is_late
        page.evaluate("window.kept = 1")
        if is_late:
            page.clock.fast_forward(600_000)
            page.wait_for_timeout(100)
            assert page.evaluate("window.kept") == 1
        else:
            with page.expect_event("load"):
                page.clock.fast_forward(30_001)
            assert "Not refreshed since" in page.inner_text("body")  # by now it is too late


def test_a_finished_run_stays_as_it_is(opened: Any, trained_run: Path):
    page = opened(pages(trained_run)["trained"])
    page.evaluate("window.kept = 1")
    page.clock.fast_forward(600_000)
    page.wait_for_timeout(100)
    assert page.evaluate("window.kept") == 1
    assert page.locator("path.dashed").count() > 0  # the floor


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_words_can_be_read(scheme: str, opened: Any, trained_run: Path):
    contrasts = pytest.importorskip("test_page").CONTRASTS
    for name, content in pages(trained_run).items():
        page = opened(content, color_scheme=scheme)
        page.evaluate("document.querySelectorAll('details').forEach((each) => each.open = true)")
        page.evaluate("document.querySelectorAll('td.heat').forEach((each) => each.remove())")
        low = [what for contrast, what in page.evaluate(contrasts) if contrast < 4.5]
        assert low == [], name
