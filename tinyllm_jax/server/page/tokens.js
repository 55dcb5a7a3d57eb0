// Tokens as one sees them: coloured by probability, and a table of what could have stood there.
// A stored token is [text, log-probability, [[name, log-probability], ...], name].

const LEAST = [0.9, 0.5, 0.2, 0.05, 0.01]; // of each colour but the last; the legend says the same

const NO_TEXT = /^<.*>$/; // control tokens, and bytes that are no character by themselves

export const probability = (logprob) => Math.exp(logprob);
const level = (p) => LEAST.findIndex((least) => p >= least);
const round = (number) => Math.round(number * 1e4) / 1e4;

// Turns tokens into stored ones. A character of several tokens stands in the last of them.
export class TokenReader {
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });

  read({ name, bytes, logprob, others }) {
    const text = this.#decoder.decode(bytes, { stream: true });
    return [text, round(logprob), others.map(([other, value]) => [other, round(value)]), name];
  }
}

// Model output is text: it never becomes markup.
export function makeToken(token) {
  const span = document.createElement("span");
  const found = level(probability(token[1]));
  span.className = `token l${found < 0 ? LEAST.length : found}${token[0] ? "" : " part"}`;
  // Blanks keep no colour, so that words stay apart.
  const blanks = token[0].match(/^\s*/)[0];
  span.append(blanks, element("span", "ink", token[0].slice(blanks.length)));
  span.tabIndex = -1;
  return span;
}

export function percent(p) {
  if (p >= 0.9995) return "100 %";
  if (p < 0.0001) return "< 0.01 %";
  return `${(p * 100).toFixed(p < 0.01 ? 2 : 1)} %`;
}

// Blanks that would not be seen.
export const visible = (name) =>
  name.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";

function element(kind, className, text) {
  const made = document.createElement(kind);
  made.className = className;
  made.textContent = text;
  return made;
}

function row([name, logprob], { own, onPick }) {
  const p = probability(logprob);
  const made = element("tr", own ? "own" : "", "");
  const bar = element("div", "bar", "");
  bar.style.setProperty("--p", p);
  const cells = [element("td", "", ""), element("td", "", ""), element("td", "", percent(p))];
  if (onPick && !NO_TEXT.test(name)) {
    const button = element("button", "", visible(name));
    button.type = "button";
    button.tabIndex = -1;
    button.addEventListener("click", () => onPick(name));
    cells[0].append(button);
  } else {
    cells[0].textContent = visible(name);
  }
  cells[1].append(bar);
  made.append(...cells);
  return made;
}

export class Look {
  #box = document.getElementById("look");
  #span = null;
  #pinned = false;
  #timer = 0;

  constructor({ find, pick }) {
    this.find = find; // gives { token, place } of a span
    this.pick = pick; // gives what is done with an alternative, or null where nothing can be
    const over = (event) => event.target.closest?.(".answer .token");
    document.addEventListener("pointerover", (event) => {
      const span = over(event);
      if (span && !this.#pinned) this.show(span);
      else if (event.target.closest?.("#look")) clearTimeout(this.#timer);
      else if (!this.#pinned) this.#hideSoon();
    });
    document.addEventListener("focusin", (event) => {
      const span = over(event);
      if (span) this.show(span, { pinned: true });
      else if (!event.target.closest?.("#look")) this.hide();
    });
    document.addEventListener("pointerdown", (event) => {
      if (!over(event) && !event.target.closest?.("#look")) this.hide();
    });
    document.addEventListener("keydown", (event) => this.#key(event));
    document.getElementById("scroller").addEventListener("scroll", (event) => this.#follow(event.target));
    addEventListener("resize", () => this.hide());
  }

  get isOpen() {
    return !this.#box.hidden;
  }

  show(span, { pinned = false } = {}) {
    clearTimeout(this.#timer);
    const found = document.body.classList.contains("looking") && this.find(span);
    if (!found) return;
    this.hide();
    this.#span = span;
    this.#pinned = pinned;
    span.classList.add("seen");
    span.setAttribute("aria-describedby", "look");
    this.#fill(found);
    this.#box.hidden = false;
    this.#place(span.getClientRects()[0] ?? span.getBoundingClientRect());
  }

  hide() {
    clearTimeout(this.#timer);
    this.#span?.classList.remove("seen");
    this.#span?.removeAttribute("aria-describedby");
    this.#span = null;
    this.#pinned = false;
    this.#box.hidden = true;
  }

  #hideSoon() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.hide(), 150);
  }

  #follow(scroller) {
    if (!this.#span) return;
    const at = this.#span.getBoundingClientRect();
    const around = scroller.getBoundingClientRect();
    if (at.bottom < around.top || at.top > around.bottom) this.hide();
    else this.#place(this.#span.getClientRects()[0] ?? at);
  }

  #fill({ token, place }) {
    const [, logprob, others, name] = token;
    const onPick = this.pick(place);
    const chosen = element("div", "chosen", "");
    chosen.append(element("b", "", visible(name)), element("span", "", percent(probability(logprob))));
    const table = document.createElement("table");
    const shown = others.some(([other]) => other === name) ? others : [...others, [name, logprob]];
    for (const other of shown) {
      const own = other[0] === name;
      table.append(row(other, { own, onPick: own ? null : onPick }));
    }
    const outside = shown !== others ? `Drawn from below the first ${others.length}. ` : "";
    const go = onPick ? " Click one to go on with it." : "";
    const hint = `${outside}Before temperature and filters.${go}`;
    this.#box.replaceChildren(chosen, table, element("p", "hint", hint));
  }

  #place(at) {
    const { offsetWidth: width, offsetHeight: height } = this.#box;
    const left = Math.min(Math.max(at.left + at.width / 2 - width / 2, 8), innerWidth - width - 8);
    const below = at.bottom + 6;
    const above = at.top - height - 6;
    const top = below + height <= innerHeight - 8 || above < 8 ? below : above;
    this.#box.style.left = `${left}px`;
    this.#box.style.top = `${Math.max(8, Math.min(top, innerHeight - height - 8))}px`;
  }

  // Tokens of an answer are one stop of Tab; the arrows go from one to the next.
  #key(event) {
    if (event.key === "Escape" && this.isOpen) {
      event.preventDefault();
      event.stopImmediatePropagation();
      this.hide();
      return;
    }
    const span = document.activeElement?.closest?.(".answer .token");
    if (!span || event.ctrlKey || event.altKey || event.metaKey) return;
    const all = [...span.parentElement.querySelectorAll(".token")];
    const here = all.indexOf(span);
    const next = {
      ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: all.length - 1,
    }[event.key];
    if (next === undefined || !all[next]) return;
    event.preventDefault();
    span.tabIndex = -1;
    all[next].tabIndex = 0;
    all[next].scrollIntoView({ block: "nearest" });
    all[next].focus({ preventScroll: true });
  }
}
