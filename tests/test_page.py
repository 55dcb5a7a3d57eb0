"""The page of `serve`, in a real browser: Chromium without a window."""

import contextlib
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright: pip install 'tinyllm[test]'"
)
pytest.importorskip("uvicorn", reason="needs the server: pip install 'tinyllm[serve]'")

from serving import chat_model, running, settings_of, wait_for  # noqa: E402

from tinyllm_jax.errors import InputError  # noqa: E402
from tinyllm_jax.inference.language_model import load  # noqa: E402
from tinyllm_jax.inference.service import (  # noqa: E402
    Alternative,
    Piece,
    Service,
    ServiceStats,
    ToldToken,
)

pytestmark = pytest.mark.slow

HOSTILE = (
    '<img src=x onerror="window.harmed=1"> </script><script>window.harmed=1</script> '
    "<b onmouseover='window.harmed=1'>bold</b> &lt; javascript:window.harmed=1"
)
# Contrast of a text with what lies behind it, as WCAG counts it, for each element that has text.
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const found = rgba(getComputedStyle(at).backgroundColor);
      if (found[3] === 255) return found;
      if (found[3] !== 0) throw new Error("half-transparent");
    }
    throw new Error("nothing behind");
  };
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode.parentElement;
    const box = node.getBoundingClientRect();
    if (!texts.currentNode.data.trim() || !node.checkVisibility() || box.width < 2) continue;
    const [one, two] = [light(rgba(getComputedStyle(node).color)), light(behind(node))];
    found.push([(Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05),
      `${node.tagName}.${node.className}#${node.id}: ${texts.currentNode.data.trim().slice(0, 20)}`]);
  }
  return found;
}"""


class Scripted:
    """A service that says what a test tells it to, when it is told to.

    Attributes:
        said: What it answers: a list of texts, each one token.
        asked: Number of prompt tokens and settings of each request, as they came.
        hold: Where set, tokens wait in it for `let`.
    """

    can_chat = True
    context = 256
    places = 1000
    is_well = True

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.said: Sequence[str] = ["Yes", "."]
        self.ended = "eos"
        self.asked: list[Any] = []
        self.cancelled = threading.Event()
        self.is_held = False
        self.room = 10**6
        self._gate = threading.Semaphore(0)

    def let(self, tokens: int) -> None:
        """Let so many held tokens out."""
        self._gate.release(tokens)

    def ask(self, asked: Any, *, on_piece: Callable[[Piece], None], **rest: Any) -> Any:
        if len(asked.ids) > self.room:
            raise InputError(f"The prompt has {len(asked.ids)} tokens. Send a shorter one.")
        self.asked.append((asked, rest))
        self.cancelled.clear()
        threading.Thread(target=self._say, args=(on_piece,), daemon=True).start()
        return SimpleNamespace(prompt_tokens=len(asked.ids), cancel=self.cancelled.set)

    def _say(self, on_piece: Callable[[Piece], None]) -> None:
        for number, text in enumerate(self.said):
            if not self._may_go_on():
                on_piece(Piece("", (), 0, "cancelled"))
                return
            likely = [0.95, 0.6, 0.3, 0.1, 0.02, 0.001][number % 6]
            own = Alternative(number, text, text.encode(), math.log(likely))
            other = Alternative(999, " other", b" other", math.log(0.04))
            told = ToldToken(own, (own, other) if likely > 0.04 else (other,))
            on_piece(Piece(text, (told,), 1, ""))
        self._may_go_on()
        on_piece(Piece("", (), 1, self.ended))

    def _may_go_on(self) -> bool:
        while self.is_held and not self._gate.acquire(timeout=0.02):
            if self.cancelled.is_set():
                return False
        return True

    def stats(self) -> ServiceStats:
        return ServiceStats(1, 1, 0, 0, 0, 0, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def tokenizer(trained_run: Any) -> Any:
    return chat_model(load(trained_run), context=64).tokenizer


@pytest.fixture
def scripted(tokenizer: Any) -> Scripted:
    return Scripted(tokenizer)


@contextlib.contextmanager
def opened(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """Open the page; whatever the browser complains of fails the test."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    context.set_default_timeout(15_000)
    page = context.new_page()
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda said: page.complaints.append(said.text))
    page.goto(url)
    wait(page, "document.querySelector('#model').textContent !== ''")
    yield page
    assert page.complaints == []
    context.close()


def say(page: Any, text: str) -> None:
    """Ask, and wait for the end of the answer."""
    page.fill("#ask", text)
    page.press("#ask", "Enter")
    page.wait_for_selector("#send", state="visible")


def wait(page: Any, expression: str) -> None:
    """Wait until something is so; Playwright's own way is forbidden by the page's policy."""
    wait_for(lambda: page.evaluate(expression))


def texts(page: Any, what: str = ".answer") -> list[str]:
    return page.locator(what).evaluate_all("all => all.map((each) => each.textContent)")


# With a model -------------------------------------------------------------------------------------


def test_a_chat_streams_and_is_there_after_reloading(browser: Any, trained_run: Any) -> None:
    service = Service(chat_model(load(trained_run), context=256), settings_of().engine)
    service.start()
    with running(service, settings_of()) as url, opened(browser, url) as page:
        assert page.get_attribute("#mode-chat", "aria-pressed") == "true"
        page.fill("#seed", "3")
        say(page, "Hello")
        say(page, "Again")
        before = texts(page)
        assert all(before)
        assert len(before) == 2
        made = "".join(texts(page, ".exchange:first-child .token"))
        assert before[0].removeprefix(made) in ("", "\N{REPLACEMENT CHARACTER}")  # half a character
        assert "12 tokens" in texts(page, ".facts")[0]
        page.reload()
        page.wait_for_selector(".exchange")
        assert texts(page) == before
        assert texts(page, ".question") == ["Hello", "Again"]
    service.stop()


def test_a_base_model_tells_stories_and_says_why_it_does_not_chat(
    browser: Any, trained_run: Any
) -> None:
    service = Service(load(trained_run), settings_of().engine)
    service.start()
    with running(service, settings_of()) as url, opened(browser, url) as page:
        assert page.get_attribute("#mode-chat", "aria-disabled") == "true"
        assert page.get_attribute("#mode-story", "aria-pressed") == "true"
        assert "has read no conversations" in page.inner_text("#no-chat")
        page.click("#mode-chat", force=True)
        assert page.get_attribute("#mode-story", "aria-pressed") == "true"
        assert "has read no conversations" in page.inner_text("#note")
        page.fill("#seed", "7")
        say(page, "Once upon a time")
        (first,) = texts(page)
        assert first.startswith("Once upon a time")
        assert len(first) > len("Once upon a time")
        page.click(".exchange >> text=Another")
        page.wait_for_selector("#send", state="visible")
        assert texts(page) == [first, first]
        page.click(".exchange:last-child >> text=Go on")
        page.wait_for_selector("#send", state="visible")
        assert texts(page)[1].startswith(first)
        assert len(texts(page)[1]) > len(first)
        say(page, "long " * 100)
        assert "tokens" in page.inner_text("#error-text")
        assert page.input_value("#ask") == "long " * 100
        page.complaints.clear()  # the browser notes each answer that is an error
    service.stop()


# With what a test says ----------------------------------------------------------------------------


def test_what_a_model_writes_is_text_and_nothing_of_it_runs(
    browser: Any, scripted: Scripted
) -> None:
    scripted.said = [HOSTILE[n : n + 7] for n in range(0, len(HOSTILE), 7)]
    with running(scripted, settings_of()) as url, opened(browser, url) as page:
        for mode in ("chat", "story"):
            page.click(f"#mode-{mode}")
            say(page, HOSTILE)
            assert HOSTILE in texts(page)[0]
            page.reload()
            page.wait_for_selector(".exchange")
            assert HOSTILE in texts(page)[0]
            assert page.locator("#exchanges :is(img, script, b)").count() == 0
            page.locator(".answer .token").nth(3).hover()
            assert page.inner_text("#look b") == scripted.said[3].replace(" ", "␣")
        assert page.evaluate("window.harmed") is None
        # Even what gets into the page does not run.
        page.evaluate(
            "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"harmed=1\">')"
        )
        page.wait_for_timeout(200)
        assert page.evaluate("window.harmed") is None
        assert any("Content Security Policy" in said for said in page.complaints)
        page.complaints.clear()


def test_tokens_show_their_probability_and_what_else_could_have_come(
    browser: Any, scripted: Scripted
) -> None:
    scripted.said = ["A", " few", " words", " to", " look", " at", "\n"]
    with running(scripted, settings_of()) as url, opened(browser, url) as page:
        say(page, "Hello")
        classes = page.locator(".answer .token").evaluate_all(
            "all => all.map((one) => one.className)"
        )
        assert classes == [f"token l{n}" for n in (0, 1, 2, 3, 4, 5, 0)]
        page.locator(".answer .token").nth(1).hover()
        assert page.inner_text("#look .chosen").split() == ["␣few", "60.0", "%"]
        rows = page.locator("#look tr").evaluate_all("all => all.map((one) => one.innerText)")
        assert [row.split() for row in rows] == [["␣few", "60.0", "%"], ["␣other", "4.0", "%"]]
        page.mouse.move(5, 5)
        page.wait_for_selector("#look", state="hidden")
        # One stop of Tab for all of them, and the arrows between.
        page.locator(".answer .token").nth(0).focus()
        assert page.inner_text("#look b") == "A"
        for _ in range(4):
            page.keyboard.press("ArrowRight")
        assert page.inner_text("#look b") == "␣look"
        assert "Drawn from below the first 1." in page.inner_text("#look .hint")
        assert page.locator(".answer [tabindex='0']").count() == 1
        page.keyboard.press("Escape")
        assert page.is_hidden("#look")
        page.click("#look-button")
        page.locator(".answer .token").nth(2).hover()
        assert page.is_hidden("#look")


def test_a_story_goes_on_with_another_token(browser: Any, scripted: Scripted) -> None:
    scripted.said = [" was", " a", " cat"]
    with running(scripted, settings_of()) as url, opened(browser, url) as page:
        page.click("#mode-story")
        say(page, "There")
        page.locator(".answer .token").nth(1).hover()
        page.click("#look button")
        page.wait_for_selector("#send", state="visible")
        assert texts(page) == ["There was a cat", "There was other was a cat"]
        assert scripted.asked[1][0].text([]) == "There was other"


@pytest.mark.parametrize("way", ["key", "button"])
def test_stop_keeps_what_came_and_frees_the_server(
    way: str, browser: Any, scripted: Scripted
) -> None:
    scripted.said, scripted.is_held = [" word"] * 50, True
    with running(scripted, settings_of()) as url, opened(browser, url) as page:
        page.fill("#ask", "Hello")
        page.press("#ask", "Enter")
        scripted.let(3)
        wait(page, "document.querySelectorAll('.answer .token').length === 3")
        assert page.is_disabled("#mode-story")
        if way == "key":
            page.keyboard.press("Escape")
        else:
            page.click("#stop")
        page.wait_for_selector("#send", state="visible")
        assert scripted.cancelled.wait(timeout=5)
        assert texts(page) == [" word word word"]
        assert "stopped by you" in texts(page, ".facts")[0]


def test_nothing_jumps_while_an_answer_comes(browser: Any, scripted: Scripted) -> None:
    scripted.said, scripted.is_held = [" some words"] * 160, True
    with running(scripted, settings_of()) as url, opened(browser, url) as page:
        page.evaluate(
            "window.shifts = []; new PerformanceObserver((list) => shifts.push(...list.getEntries()"
            ".map((each) => each.value))).observe({ type: 'layout-shift', buffered: false })"
        )
        frame = (
            "['header', '#composer', '#legend'].map((name) => {const box = document.querySelector"
        )
        frame += "(name).getBoundingClientRect(); return [box.x, box.y, box.width, box.height]})"
        page.fill("#ask", "Hello")
        before = page.evaluate(frame)
        page.press("#ask", "Enter")
        scroller = "document.querySelector('#scroller')"
        rest = f"{scroller}.scrollHeight - {scroller}.scrollTop - {scroller}.clientHeight"
        for n in range(1, 9):
            scripted.let(15)
            wait(page, f"document.querySelectorAll('.answer .token').length === {15 * n}")
            assert page.evaluate(frame) == before
            assert page.evaluate(rest) < 2  # the newest line is in sight
        # Who has scrolled up to read stays there.
        page.evaluate(f"{scroller}.scrollTop = 40")
        page.wait_for_selector("#newest", state="visible")
        scripted.let(20)
        wait(page, "document.querySelectorAll('.answer .token').length === 140")
        assert page.evaluate(f"{scroller}.scrollTop") == 40
        page.click("#newest")
        assert page.evaluate(rest) < 2
        scripted.let(21)
        page.wait_for_selector("#send", state="visible")
        assert page.evaluate(frame) == before
        assert sum(page.evaluate("shifts")) < 0.01


def test_settings_reach_the_server_and_are_kept(browser: Any, scripted: Scripted) -> None:
    settings = settings_of(sampling__temperature=0.7, sampling__top_k=5)
    with running(scripted, settings) as url, opened(browser, url) as page:
        say(page, "One")
        sampling = scripted.asked[0][1]["sampling"]
        assert (sampling.temperature, sampling.top_k, sampling.max_new_tokens) == (0.7, 5, 12)
        for name, value in (
            ("temperature", "1.5"),
            ("top_p", "0.5"),
            ("top_k", "40"),
            ("repetition_penalty", "1.2"),
            ("max_tokens", "33"),
        ):
            page.fill(f"#{name}", value)
        page.fill("#seed", "11")
        page.fill("#system", "Be kind.")
        page.reload()
        page.wait_for_selector(".exchange")
        say(page, "Two")
        asked, rest = scripted.asked[1]
        sampling = rest["sampling"]
        found = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty)
        assert found == (1.5, 0.5, 40, 1.2)
        assert (sampling.max_new_tokens, sampling.seed) == (33, 11)
        told = scripted.tokenizer.decode(asked.ids)
        assert "Be kind." in told
        assert told.index("One") < told.index("Yes.") < told.index("Two")
        page.click("#reset")
        say(page, "Three")
        assert scripted.asked[2][1]["sampling"].temperature == 0.7


def test_the_oldest_turns_are_left_out_when_the_context_is_full(
    browser: Any, scripted: Scripted
) -> None:
    with running(scripted, settings_of()) as url, opened(browser, url) as page:
        say(page, "FIRST " + "word " * 20)
        scripted.room = len(scripted.asked[0][0].ids) + 40  # less than the page knows of
        for name in ("SECOND ", "THIRD "):
            say(page, name + "word " * 20)
        told = scripted.tokenizer.decode(scripted.asked[-1][0].ids)
        assert "THIRD" in told
        assert "FIRST" not in told
        assert "no longer fits the model's 256 tokens" in page.inner_text(".left-out")
        page.complaints.clear()


def test_a_key_is_asked_for_where_the_server_wants_one(browser: Any, scripted: Scripted) -> None:
    with running(scripted, settings_of(), keys=(b"secret",)) as url:
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        page.wait_for_selector("#key-form", state="visible")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.wait_for_selector("#error", state="visible")
        assert page.inner_text("#error-text") == "That key is not one of the server's."
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        page.wait_for_selector("#key-form", state="hidden")
        assert page.is_hidden("#error")
        say(page, "Hello")
        assert texts(page) == ["Yes."]
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
        page.reload()
        page.wait_for_selector(".exchange")
        assert page.is_hidden("#key-form")
        context.close()


def test_errors_are_one_line_and_the_question_is_not_lost(browser: Any, scripted: Scripted) -> None:
    with running(scripted, settings_of()) as url, opened(browser, url) as page:
        page.route("**/v1/chat/completions", lambda route: route.abort())
        say(page, "Hello")
        assert page.inner_text("#error-text") == "The server does not answer. Is it still running?"
        assert page.input_value("#ask") == "Hello"
        assert texts(page) == []
        body = json.dumps({"error": {"message": "Too many wait.", "code": "queue_full"}})
        page.unroute("**/v1/chat/completions")
        page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, body=body))
        page.click("#error-again")
        wait(page, "document.querySelector('#error-text').textContent === 'Too many wait.'")
        page.unroute("**/v1/chat/completions")
        page.click("#error-again")
        page.wait_for_selector(".exchange .facts")
        assert texts(page) == ["Yes."]
        assert page.is_hidden("#error")
        scripted.ended, scripted.is_held = "failed", True
        page.fill("#ask", "More")
        page.press("#ask", "Enter")
        scripted.let(2)
        wait(page, "document.querySelectorAll('.answer .token').length === 4")
        scripted.let(1)
        page.wait_for_selector("#send", state="visible")
        assert page.inner_text("#error-text")
        assert texts(page)[1] == "Yes."
        assert "broken off" in texts(page, ".facts")[1]
        page.complaints.clear()


def test_what_is_cleared_comes_back_with_undo(browser: Any, scripted: Scripted) -> None:
    with running(scripted, settings_of()) as url, opened(browser, url) as page:
        say(page, "Hello")
        page.click("#clear-button")
        assert texts(page) == []
        assert page.is_visible("#empty")
        page.click("#note-undo")
        assert texts(page) == ["Yes."]
        page.reload()
        page.wait_for_selector(".exchange")


def test_a_full_browser_keeps_the_newest(browser: Any, scripted: Scripted) -> None:
    with running(scripted, settings_of()) as url, opened(browser, url) as page:
        kept = page.evaluate("""async () => {
          const store = await import("./store.js");
          const made = (n) => ({ ask: `${n}`, text: "a", tokens: [["a", 0, [["b".repeat(9e5), -1]]]] });
          const isKept = store.saveExchanges("chat", [...Array(9).keys()].map(made));
          return [isKept, store.loadExchanges("chat").map((each) => [each.ask, Boolean(each.tokens)])];
        }""")
        assert kept[0]
        assert [number for number, _ in kept[1]] == [str(n) for n in range(9)]
        told = [has_tokens for _, has_tokens in kept[1]]
        assert told == sorted(told)
        assert any(told)
        assert not all(told)


# How it looks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(
    theme: str, browser: Any, scripted: Scripted
) -> None:
    scripted.said = ["A", " few", " words", " to", " look", " at", " · "]
    with running(scripted, settings_of()) as url, opened(browser, url, color_scheme=theme) as page:
        low = [each for each in page.evaluate(CONTRASTS) if each[0] < 4.5]
        for mode in ("chat", "story"):
            page.click(f"#mode-{mode}")
            say(page, "Hello")
            page.locator(".answer .token").nth(3).hover()
            low += [each for each in page.evaluate(CONTRASTS) if each[0] < 4.5]
        page.route("**/v1/completions", lambda route: route.abort())
        say(page, "More")
        found = page.evaluate(CONTRASTS)
        assert any("The server does not" in each[1] for each in found)
        assert [*low, *(each for each in found if each[0] < 4.5)] == []
        page.complaints.clear()


def test_light_and_dark_are_chosen_and_kept(browser: Any, scripted: Scripted) -> None:
    back = "getComputedStyle(document.documentElement).backgroundColor"
    with running(scripted, settings_of()) as url:
        with opened(browser, url, color_scheme="dark") as page:
            dark = page.evaluate(back)
            page.click("#theme-button")
            light = page.evaluate(back)
            assert light != dark
            page.reload()
            assert page.evaluate(back) == light
        with opened(browser, url, color_scheme="light") as page:
            assert page.evaluate(back) == light


@pytest.mark.parametrize("width", [320, 390, 768])
def test_it_fits_a_phone(width: int, browser: Any, scripted: Scripted) -> None:
    scripted.said = [" " + "Averylongwordwithoutanyblank" * 9, " and", " more"]
    viewport = {"width": width, "height": 640}
    with (
        running(scripted, settings_of()) as url,
        opened(browser, url, viewport=viewport, has_touch=True) as page,
    ):
        say(page, "Hello " * 40)
        page.locator(".answer .token").nth(2).tap()
        box = page.locator("#look").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        overflow = (
            "const one = document.querySelector('#scroller'); one.scrollWidth - one.clientWidth"
        )
        assert page.evaluate(f"(() => {{ {overflow.replace('; one', '; return one')} }})()") <= 0
        page.click("#settings-button")
        assert page.evaluate("document.activeElement.id") == "settings-close"
        assert page.evaluate("document.querySelector('#main').inert")
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.id") == "settings-button"
        small = page.locator("button:visible").evaluate_all(
            "all => all.filter((each) => each.getBoundingClientRect().height < 24).map((each) => each.id)"
        )
        assert small == []
