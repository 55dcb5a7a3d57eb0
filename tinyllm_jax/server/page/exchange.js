// One question (or beginning of a story) on the page, and the answer to it as it grows.
// It is { ask, text, tokens, end, usage, seconds, leftOut }; tokens are null where none are known.

import { TokenReader, makeToken } from "./tokens.js";

const ENDS = { stop: "", stopped: "stopped by you", broken: "broken off" };

export class ExchangeView {
  #text = document.createElement("div");
  #after = document.createElement("div");
  #reader = new TokenReader();

  constructor(exchange, { isStory }) {
    this.exchange = exchange;
    this.isStory = isStory;
    this.element = document.createElement("article");
    this.element.className = "exchange";
    this.#text.className = "answer";
    this.#text.setAttribute("role", "group");
    this.#text.setAttribute("aria-label", `${isStory ? "Story" : "Answer"}; arrow keys go through its tokens`);
    this.#after.className = "after";
    const ask = document.createElement(isStory ? "span" : "p");
    ask.className = isStory ? "given" : "question";
    ask.textContent = exchange.ask;
    if (isStory) this.#text.append(ask);
    else this.element.append(ask);
    this.element.append(this.#text, this.#after);
    if (exchange.tokens) this.#append(exchange.tokens);
    this.#mend();
  }

  get isBusy() {
    return this.element.classList.contains("busy");
  }

  begin() {
    this.#reader = new TokenReader();
    this.element.classList.add("busy");
    this.#text.setAttribute("aria-busy", "true");
    this.#after.replaceChildren();
  }

  add({ text, tokens }) {
    const { exchange } = this;
    exchange.text += text;
    if (exchange.tokens && (tokens.length > 0 || !text)) {
      const read = tokens.map((token) => this.#reader.read(token));
      exchange.tokens.push(...read);
      this.#append(read);
    } else if (text) {
      this.#text.append(text);
    }
  }

  finish(buttons, { context }) {
    this.element.classList.remove("busy");
    this.#text.removeAttribute("aria-busy");
    this.#mend();
    this.tell(buttons, { context });
  }

  // Writes what became of the answer, and what can be done next.
  tell(buttons, { context }) {
    const { end, usage, seconds } = this.exchange;
    const facts = [];
    if (usage) {
      facts.push(`${usage.made} token${usage.made === 1 ? "" : "s"}`);
      if (usage.made > 5 && seconds > 0) facts.push(`${Math.round(usage.made / seconds)} a second`);
    }
    if (end === "stop" && !this.exchange.text.trim()) facts.push("the model ended at once");
    if (this.isFull(context)) facts.push(`the model's ${context} tokens are full`);
    else if (end === "length") facts.push("cut at the longest answer");
    else if (ENDS[end]) facts.push(ENDS[end]);
    const told = document.createElement("span");
    told.className = "facts";
    told.textContent = facts.join(" · ");
    this.#after.replaceChildren(told, ...buttons);
  }

  isFull(context) {
    const { end, usage } = this.exchange;
    return end === "length" && Boolean(usage) && usage.prompt + usage.made >= context;
  }

  find(span) {
    const { tokens } = this.exchange;
    if (!tokens) return null;
    const place = [...this.#text.querySelectorAll(".token")].indexOf(span);
    return tokens[place] ? { token: tokens[place], place: { view: this, number: place } } : null;
  }

  #append(tokens) {
    const spans = tokens.map(makeToken);
    if (spans[0] && !this.#text.querySelector(".token")) spans[0].tabIndex = 0;
    this.#text.append(...spans);
  }

  // Shows the text where the tokens do not make it up; what was half a character may be missing.
  #mend() {
    const { exchange } = this;
    const known = (exchange.tokens ?? []).map((token) => token[0]).join("");
    const given = this.isStory ? exchange.ask.length : 0;
    if (this.#text.textContent.length - given === exchange.text.length) return;
    if (exchange.tokens && exchange.text.startsWith(known)) {
      this.#text.append(exchange.text.slice(known.length));
      return;
    }
    exchange.tokens = null;
    for (const span of this.#text.querySelectorAll(".token")) span.remove();
    this.#text.append(exchange.text);
  }
}
