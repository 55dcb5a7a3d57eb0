// Settings of sampling, each with its range, how its value is shown, and what it does.

import * as store from "./store.js";

const SLIDERS = [
  {
    name: "temperature", title: "Temperature", min: 0, max: 2, step: 0.05,
    show: (value) => (value === 0 ? "greedy" : value.toFixed(2)),
    hint: "Low: safe and alike. High: surprising.",
  },
  {
    name: "top_p", title: "Top-p", min: 0.05, max: 1, step: 0.01,
    show: (value) => (value === 1 ? "all" : value.toFixed(2)),
    hint: "Only the likeliest tokens that together reach this probability.",
  },
  {
    name: "top_k", title: "Top-k", min: 0, max: 200, step: 1,
    show: (value) => (value === 0 ? "all" : String(value)),
    hint: "Only so many of the likeliest tokens.",
  },
  {
    name: "repetition_penalty", title: "Repetition penalty", min: 1, max: 2, step: 0.05,
    show: (value) => (value === 1 ? "none" : value.toFixed(2)),
    hint: "Makes tokens that were there already less likely.",
  },
  {
    name: "max_tokens", title: "Longest answer", min: 1, max: 512, step: 1,
    show: (value) => `${value} tokens`,
    hint: "A token is a word or a part of one.",
  },
];

export class Sliders {
  #inputs = {};
  #defaults = { temperature: 0.8, top_p: 0.95, top_k: 0, repetition_penalty: 1, max_tokens: 200 };
  #chosen = store.load("sampling", {});

  constructor(place) {
    for (const slider of SLIDERS) place.append(this.#make(slider));
    this.#showAll();
  }

  // Takes over what the server does where a request says nothing.
  setModel({ context, defaults }) {
    this.#inputs.max_tokens.input.max = context;
    for (const name of Object.keys(this.#defaults)) {
      if (typeof defaults?.[name] === "number") this.#defaults[name] = defaults[name];
    }
    this.#defaults.max_tokens = Math.min(this.#defaults.max_tokens, context);
    this.#showAll();
  }

  get values() {
    return Object.fromEntries(SLIDERS.map(({ name }) => [name, Number(this.#inputs[name].input.value)]));
  }

  reset() {
    this.#chosen = {};
    store.save("sampling", {});
    this.#showAll();
  }

  #make({ name, title, min, max, step, show, hint }) {
    const field = document.createElement("label");
    field.className = "field";
    const top = document.createElement("span");
    top.className = "top";
    const named = document.createElement("span");
    named.className = "name";
    named.textContent = title;
    const output = document.createElement("output");
    const input = document.createElement("input");
    Object.assign(input, { type: "range", id: name, min, max, step });
    const told = document.createElement("span");
    told.className = "hint";
    told.id = `${name}-hint`;
    told.textContent = hint;
    input.setAttribute("aria-label", title);
    input.setAttribute("aria-describedby", told.id);
    input.addEventListener("input", () => {
      this.#chosen[name] = Number(input.value);
      store.save("sampling", this.#chosen);
      this.#show(name);
    });
    top.append(named, output);
    field.append(top, input, told);
    this.#inputs[name] = { input, output, show };
    return field;
  }

  #showAll() {
    for (const { name } of SLIDERS) {
      this.#inputs[name].input.value = this.#chosen[name] ?? this.#defaults[name];
      this.#show(name);
    }
  }

  #show(name) {
    const { input, output, show } = this.#inputs[name];
    output.textContent = show(Number(input.value));
    input.setAttribute("aria-valuetext", output.textContent);
  }
}
