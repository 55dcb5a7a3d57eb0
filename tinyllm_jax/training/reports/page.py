"""What pages of runs share: their look, and tables. Nothing is loaded from elsewhere."""

import base64
import hashlib
import html
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

REFRESH_SECONDS = 30
# No script runs in the page, whatever a model writes into it, but the one of these letters.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
# By itself `refresh` would forget what the reader chose, or, where the address names it, do nothing. A page
# that nobody has written anew for so long is of a run that was killed; it says so and stays.
RELOAD = f"""addEventListener("DOMContentLoaded", () => {{
  const note = document.getElementById("written"), until = note.dataset.until;
  if (Date.now() > 1000 * until) note.textContent = note.dataset.late;
  else setTimeout(() => location.reload(), {1000 * REFRESH_SECONDS});
}})"""
RELOAD_HASH = base64.b64encode(hashlib.sha256(RELOAD.encode()).digest()).decode()
REFRESH = (
    f"<script>{RELOAD}</script>\n<noscript>"
    f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}"></noscript>\n'
)
STYLE = """
:root { color-scheme: light dark; --paper: #fbfbf9; --card: #fff; --ink: #1d2126; --soft: #5c6570;
  --line: #e3e5e3; --first: #0e7c86; --last: #b8327a; --c1: #1f66b5; --c2: #c2520a; --c3: #23833f;
  --c4: #7b4cc0; --c5: #c8323c; --c6: #0e7c86; --c7: #8a5a2b; --c8: #bf3989; --warn: #fdf0dc;
  --warn-line: #d99a3a }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --card: #1b1f24; --ink: #e6e8ea;
  --soft: #9aa4af; --line: #2d333a; --first: #3fb6c0; --last: #ee7fb4; --c1: #6cb2f7; --c2: #f29a5f;
  --c3: #5cc27a; --c4: #b99af6; --c5: #f7797f; --c6: #4fc4cf; --c7: #cfa06f; --c8: #f08cc4;
  --warn: #35290f; --warn-line: #a8782d } }
* { box-sizing: border-box }
body { font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .2rem }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem }
p { margin: .4rem 0 }
.soft, small { color: var(--soft); font-size: .875rem }
dl.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem;
  margin: 1rem 0 }
.tiles div, .plot, details, .sample { background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem }
.tiles div { padding: .5rem .8rem }
.tiles dt, .tiles dd small { color: var(--soft); font-size: .8rem }
.tiles dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums }
.tiles dd small { display: block; line-height: 1.3 }
.plot { margin: 0 0 .8rem; padding: .7rem .8rem .4rem; min-width: 0 }
.plot figcaption { font-size: .85rem; line-height: 1.6 }
.plot figcaption b { margin-right: .8rem }
.key { display: inline-block; margin-right: .9rem; color: var(--soft) }
.key i { display: inline-block; width: 1.1rem; border-top: 2px solid var(--c); margin-right: .35rem;
  vertical-align: .25em }
.key i.faint { opacity: .45 }
.key i.level, .key i.dashed { border-top-style: dashed }
.key i.dots { border-top-width: 4px; border-radius: 2px }
.key i.marks { width: 2px; border: 0; height: .8em; background: var(--c); vertical-align: -.05em }
.key i.scale { width: 5rem; border: 0; height: .5em; border-radius: 2px; vertical-align: 0;
  background: linear-gradient(in oklab to right, var(--first), var(--last)) }
.frame { position: relative; height: 18rem; margin: .7rem .8rem 2.4rem 2.9rem }
.small .frame { height: 10rem }
.grids { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr));
  gap: .8rem; margin: .8rem 0 }
.grids .plot { margin: 0 }
svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible }
.frame span { position: absolute; font-size: .75rem; color: var(--soft); white-space: nowrap;
  font-variant-numeric: tabular-nums }
.frame .y { right: 100%; transform: translate(-.4rem, -50%) }
.frame .x { top: 100%; transform: translate(-50%, .25rem) }
.frame .what { top: 100%; right: 0; transform: translateY(1.35rem) }
path { fill: none; stroke: var(--c); stroke-width: 1.75; vector-effect: non-scaling-stroke;
  stroke-linejoin: round }
path.grid { stroke: var(--line); stroke-width: 1 }
path.faint { opacity: .45; stroke-width: 1 }
path.dashed { stroke-dasharray: 6 4 }
path.dot { stroke-width: 7; stroke-linecap: round }
path.marks { stroke-width: 2 }
.by-tokens, .by-time { display: none }
body:has(#by-tokens:target) .by-step, body:has(#by-time:target) .by-step { display: none }
body:has(#by-tokens:target) .by-tokens, body:has(#by-time:target) .by-time { display: block }
.switch { margin: 0 0 .7rem; font-size: .875rem }
.switch i { position: fixed; top: 0; left: 0 }
.switch a { display: inline-block; padding: .15rem .8rem; margin-right: .35rem; border-radius: 1rem;
  border: 1px solid var(--line); background: var(--card); color: var(--ink); text-decoration: none }
.switch:not(:has(:target)) a:first-of-type, .switch:has(#by-step:target) a[href$=step],
.switch:has(#by-tokens:target) a[href$=tokens], .switch:has(#by-time:target) a[href$=time] {
  background: var(--ink); border-color: var(--ink); color: var(--paper) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
td, th { padding: .2rem 1.2rem .2rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line) }
td, th { overflow-wrap: break-word }
td { min-width: 3rem; max-width: 34rem }
td:first-child:not(.heat) { min-width: 9rem }
th { font-weight: 600; vertical-align: bottom }
td.number { text-align: right; white-space: nowrap }
th.number { text-align: right }
td.heat { padding: .1rem .35rem; text-align: right; border: 1px solid var(--card); min-width: 0 }
details { margin: .6rem 0; padding: .4rem .8rem }
summary { cursor: pointer; font-size: .9rem }
details[open] summary { margin-bottom: .5rem }
.sample { margin: .3rem 0 1rem; padding: .6rem .9rem; white-space: pre-wrap; border-left: 3px solid
  var(--c1) }
.warning { background: var(--warn); border-left: 3px solid var(--warn-line); border-radius: .3rem;
  padding: .35rem .8rem; font-size: .9rem }
code { font-size: .85rem }
:focus-visible { outline: 2px solid var(--c1); outline-offset: 2px }
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{refresh}<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{heading}</h1>
{body}
</body>
</html>
"""


def page(title: str, *, heading: str, body: Iterable[str], refreshes: bool) -> str:
    """Write a page.

    Args:
        title: Plain text, for the tab.
        heading: Plain text.
        body: HTML.
        refreshes: It loads itself again and again.
    """
    return PAGE.format(
        policy=f"{POLICY}; script-src 'sha256-{RELOAD_HASH}'" if refreshes else POLICY,
        refresh=REFRESH if refreshes else "",
        title=html.escape(title),
        style=STYLE,
        heading=html.escape(heading),
        body="\n".join(part for part in body if part),
    )


def switch(axes: Mapping[str, str]) -> str:
    """Let the reader choose what the plots go over, without a script."""
    if len(axes) < 2:
        return ""
    # Links, since the place that they name outlives loading the page anew. What they lead to is fixed
    # to the window, so that nothing scrolls.
    places = "".join(f'<i id="by-{axis}"></i>' for axis in axes)
    links = "".join(f'<a href="#by-{axis}">{html.escape(what)}</a>' for axis, what in axes.items())
    return f'<nav class="switch" aria-label="Curves go over">{places}{links}</nav>'


def tiles(found: Iterable[tuple[str, str, str]]) -> str:
    """Show numbers large: name, number and a remark, as plain text."""
    cells = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(number)}"
        f"{f'<small>{html.escape(remark)}</small>' if remark else ''}</dd></div>"
        for name, number, remark in found
    )
    return f'<dl class="tiles">{cells}</dl>'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, colors: Sequence[str] = ()) -> str:
    """Write an HTML table of plain values.

    Args:
        colors: In CSS, of the columns after the first.
    """
    listed = [*rows]
    # Columns of numbers alone are set to the right.
    kinds = [
        ' class="number"'
        if all(is_number(row[place]) or row[place] is None for row in listed)
        else ""
        for place in range(len(head))
    ]

    marks = ["", *(f' style="border-top:3px solid {color}"' for color in colors)]
    marks += [""] * (len(head) - len(marks))
    cells = zip(kinds, marks, map(breakable, head), strict=True)
    lines = ["".join(f"<th{kind}{mark}>{name}</th>" for kind, mark, name in cells)]
    for row in listed:
        cells = zip(kinds, map(breakable, map(show, row)), strict=True)
        lines.append("".join(f"<td{kind}>{text}</td>" for kind, text in cells))
    return (
        f'<div class="scroll"><table>{"".join(f"<tr>{each}</tr>" for each in lines)}</table></div>'
    )


def breakable(text: str) -> str:
    """Write plain text so that a name in it may go on in the next line after a `_` or a `.`."""
    return re.sub(r"(?<=[^\W\d][_.])(?=[^\W\d])", "<wbr>", html.escape(text))


def folded(summary: str, content: str) -> str:
    """Fold HTML away under a line of plain text."""
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def is_number(value: Any) -> bool:
    """Tell numbers, which stand at the right of their column."""
    return type(value) in (int, float)


def show(value: Any) -> str:
    """Write a value for people: thousands apart, few digits, lists as words."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {show(each)}" for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(show, value))
    text = str(value)
    return f"{text[:12]}..." if re.fullmatch("[0-9a-f]{40,}", text) else text


def show_seconds(seconds: float) -> str:
    """Write how long something took."""
    size, name = unit_of_time(seconds)
    return f"{seconds / size:.3g} {name}"


def unit_of_time(seconds: float) -> tuple[float, str]:
    """Choose a unit in which a time is a handy number, as its seconds and its name."""
    units = ((172_800, 86_400, "days"), (7_200, 3_600, "hours"), (180, 60, "minutes"))
    return next(((size, name) for least, size, name in units if seconds >= least), (1, "seconds"))


def written_at(moment: float) -> str:
    """Write a moment, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))
