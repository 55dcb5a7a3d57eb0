// The page: what is asked, what came back, and what the browser keeps of it.

import { ApiError, answer, getModel } from "./api.js";
import { ExchangeView } from "./exchange.js";
import { Sliders } from "./sliders.js";
import * as store from "./store.js";
import { Look } from "./tokens.js";

const ALTERNATIVES = 8;
const CHARACTERS_OF_A_TURN = 24; // its role and what stands round it, about
const TOKENS_PER_CHARACTER = 0.35; // until an answer tells
const WORDS = {
  chat: {
    title: "What would you like to ask?",
    text: "What you write goes to this server, and is kept in this browser alone.",
    examples: ["Tell me a story about a brave little cat.", "Write a story with the words: moon, boat, friend.", "Tell me a story."],
    placeholder: "Ask something",
    label: "Your question",
    said: "The answer has ended.",
  },
  story: {
    title: "How does it begin?",
    text: "The model goes on with the text that you give it, one token after another.",
    examples: ["Once upon a time", "One day, a little girl named Lily", "The dragon was sad because"],
    placeholder: "The beginning of a story",
    label: "The beginning of a story",
    said: "The story has ended.",
  },
};

const at = (id) => document.getElementById(id);
const wide = matchMedia("(min-width: 60.01rem)");
const finePointer = matchMedia("(pointer: fine)");
const dark = matchMedia("(prefers-color-scheme: dark)");
const sliders = new Sliders(at("sliders"));
const kept = { chat: store.loadExchanges("chat"), story: store.loadExchanges("story") };
let key = store.loadKey();
let model = null; // as the server tells of it
let mode = store.load("mode", "chat") === "story" ? "story" : "chat";
let views = [];
let running = null; // the AbortController of the answer that is being made
let follows = true; // the newest line stays in sight
let undone = null; // what was cleared last
let again = null; // what "Try again" beside an error does

const look = new Look({
  find: (span) => views.find((view) => view.element.contains(span))?.find(span),
  pick: ({ view, number }) => (mode === "story" && !running ? (name) => branch(view, number, name) : null),
});
const context = () => model?.context_tokens ?? Infinity;

// The model --------------------------------------------------------------------------------------

async function connect() {
  showError("");
  try {
    model = await getModel(key);
  } catch (error) {
    showFailure(error, connect);
    render();
    return;
  }
  at("key-form").hidden = true;
  at("model").textContent = model.id;
  document.title = `${model.id} · tinyllm`;
  sliders.setModel({ context: model.context_tokens, defaults: model.sampling });
  const chat = at("mode-chat");
  if (model.can_chat) chat.removeAttribute("aria-disabled");
  else chat.setAttribute("aria-disabled", "true");
  chat.title = model.can_chat ? "" : "This model has read no conversations.";
  setMode(model.can_chat ? mode : "story", { isChoice: false });
}

function setMode(name, { isChoice }) {
  mode = name;
  if (isChoice) store.save("mode", mode);
  render();
}

// What is shown ----------------------------------------------------------------------------------

function render() {
  const words = WORDS[mode];
  look.hide();
  document.body.classList.toggle("chat", mode === "chat");
  at("mode-chat").setAttribute("aria-pressed", String(mode === "chat"));
  at("mode-story").setAttribute("aria-pressed", String(mode === "story"));
  at("ask").placeholder = words.placeholder;
  at("ask-label").textContent = words.label;
  at("empty-title").textContent = words.title;
  at("empty-text").textContent = words.text;
  at("no-chat").hidden = model?.can_chat !== false;
  at("examples").replaceChildren(
    ...words.examples.map((text) => {
      const item = document.createElement("li");
      item.append(makeButton(text, () => ask(text)));
      return item;
    }),
  );
  views = kept[mode].map((exchange) => new ExchangeView(exchange, { isStory: mode === "story" }));
  at("exchanges").replaceChildren(...views.map((view) => view.element));
  follows = true;
  refresh();
}

// Brings everything that hangs on the exchanges up to date.
function refresh() {
  at("empty").hidden = views.length > 0;
  at("clear-button").disabled = views.length === 0 || running !== null;
  at("send").hidden = running !== null;
  at("stop").hidden = running === null;
  at("mode-chat").disabled = at("mode-story").disabled = running !== null;
  showSend();
  for (const view of views) {
    if (!view.isBusy) view.tell(buttonsOf(view), { context: context() });
  }
  document.querySelector(".left-out")?.remove();
  const leftOut = mode === "chat" ? (views.at(-1)?.exchange.leftOut ?? 0) : 0;
  if (leftOut > 0 && views[leftOut]) {
    const line = document.createElement("p");
    line.className = "left-out";
    line.textContent = `What stands above no longer fits the model's ${context()} tokens.`;
    views[leftOut].element.before(line);
  }
  follow();
}

const showSend = () => (at("send").disabled = at("ask").value.trim() === "");

function buttonsOf(view) {
  if (running) return [];
  const { exchange } = view;
  const found = [];
  if (mode === "story") {
    const canGoOn = exchange.end !== "stop" && !view.isFull(context());
    if (canGoOn) found.push(makeButton("Go on", () => run(view)));
    found.push(makeButton("Another", () => ask(exchange.ask)));
  } else if (view === views.at(-1)) {
    found.push(makeButton("Try again", () => askAgain(view)));
  }
  const all = mode === "story" ? exchange.ask + exchange.text : exchange.text;
  if (navigator.clipboard) found.push(makeButton("Copy", (button) => copy(all, button)));
  return found;
}

function makeButton(text, act) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.addEventListener("click", () => act(button));
  return button;
}

async function copy(text, button) {
  await navigator.clipboard.writeText(text);
  button.textContent = "Copied";
}

function follow() {
  const scroller = at("scroller");
  // Nothing moves under the pointer while somebody looks at a token.
  if (follows && !look.isOpen) scroller.scrollTop = scroller.scrollHeight;
  at("newest").hidden = follows;
}

function showError(text, { act = null } = {}) {
  at("error").hidden = text === "";
  at("error-text").textContent = text;
  at("error-again").hidden = act === null;
  again = act;
}

function showFailure(error, act) {
  if (!(error instanceof ApiError)) throw error;
  if (error.status === 401) {
    showError(key ? "That key is not one of the server's." : "");
    at("key-form").hidden = false;
    at("key").focus();
    return;
  }
  showError(error.message, { act });
}

function showNote(text, { undo = false } = {}) {
  at("note").hidden = text === "";
  at("note-text").textContent = text;
  at("note-undo").hidden = !undo;
}

// Asking -----------------------------------------------------------------------------------------

function ask(text) {
  if (running || text.trim() === "") return;
  const leftOut = kept[mode].at(-1)?.leftOut ?? 0;
  const exchange = { ask: text, text: "", tokens: [], end: "", usage: null, seconds: 0, leftOut };
  const view = new ExchangeView(exchange, { isStory: mode === "story" });
  kept[mode].push(exchange);
  views.push(view);
  at("exchanges").append(view.element);
  at("ask").value = "";
  follows = true;
  run(view);
}

function askAgain(view) {
  drop(view);
  ask(view.exchange.ask);
}

// Goes on with another token than the one that was drawn.
function branch(view, number, name) {
  const before = view.exchange.tokens.slice(0, number).map((token) => token[0]);
  ask(view.exchange.ask + before.join("") + name);
}

function drop(view) {
  kept[mode] = kept[mode].filter((exchange) => exchange !== view.exchange);
  views = views.filter((other) => other !== view);
  view.element.remove();
}

function messagesFor(exchange) {
  const earlier = kept.chat.slice(exchange.leftOut, kept.chat.indexOf(exchange));
  const system = at("system").value.trim();
  const turns = earlier
    .filter((each) => each.text.trim() !== "")
    .flatMap((each) => [
      { role: "user", content: each.ask },
      { role: "assistant", content: each.text },
    ]);
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...turns,
    { role: "user", content: exchange.ask },
  ];
}

const lengthOf = (messages) =>
  messages.reduce((sum, { content }) => sum + content.length + CHARACTERS_OF_A_TURN, 0);

// Leaves out the oldest turns that would leave no room for an answer. The page counts no tokens:
// earlier answers told how many there are to a character.
function leaveOut(exchange, { max_tokens }) {
  const room = context() - Math.min(max_tokens, Math.floor(context() / 4));
  const known = kept.chat.findLast((each) => each.tokensPerCharacter);
  const rate = known?.tokensPerCharacter ?? TOKENS_PER_CHARACTER;
  const last = kept.chat.indexOf(exchange);
  while (exchange.leftOut < last && lengthOf(messagesFor(exchange)) * rate > room) exchange.leftOut++;
}

function request(view) {
  const { exchange } = view;
  const body = { ...sliders.values };
  const seed = at("seed").value.trim();
  body.seed = /^\d{1,15}$/.test(seed) ? Number(seed) : Math.floor(Math.random() * 2 ** 32);
  if (mode === "story") {
    return ["v1/completions", { ...body, prompt: exchange.ask + exchange.text, logprobs: ALTERNATIVES }];
  }
  const messages = messagesFor(exchange);
  return ["v1/chat/completions", { ...body, messages, logprobs: true, top_logprobs: ALTERNATIVES }];
}

// Gets the answer, or more of it, and shows it as it comes.
async function run(view) {
  const { exchange } = view;
  const before = exchange.text;
  running = new AbortController();
  showError("");
  showNote("");
  // The button that was pressed goes away; on a phone the keyboard would come up.
  if (finePointer.matches) at("ask").focus({ preventScroll: true });
  view.begin();
  if (mode === "chat") leaveOut(exchange, sliders.values);
  refresh();
  const started = performance.now();
  let failure = null;
  try {
    await receive(view);
  } catch (error) {
    exchange.end = error.name === "AbortError" ? "stopped" : "broken";
    if (exchange.end === "broken") failure = error;
  }
  exchange.seconds = (performance.now() - started) / 1000;
  running = null;
  view.finish([], { context: context() });
  if (exchange.text === "" && exchange.end !== "stop" && exchange.end !== "length") {
    // Nothing came of it: the question goes back to where it was typed.
    drop(view);
    if (at("ask").value === "") at("ask").value = exchange.ask;
  }
  refresh();
  at("said").textContent = failure ? "" : WORDS[mode].said;
  if (!store.saveExchanges(mode, kept[mode])) {
    showNote("This browser keeps nothing: what stands here is gone when the page is closed.");
  }
  if (failure) showFailure(failure, exchange.text === before ? () => retry(view) : null);
}

function retry(view) {
  if (views.includes(view)) run(view);
  else ask(at("ask").value || view.exchange.ask);
}

async function receive(view) {
  const { exchange } = view;
  const { signal } = running;
  while (true) {
    const [path, body] = request(view);
    try {
      let made = 0;
      for await (const piece of answer(path, body, { key, signal })) {
        view.add(piece);
        made += piece.tokens.length;
        if (piece.end) exchange.end = piece.end;
        exchange.usage = { prompt: exchange.usage?.prompt ?? 0, made };
        if (piece.usage) {
          const { prompt_tokens: prompt, completion_tokens } = piece.usage;
          exchange.usage = { prompt, made: completion_tokens };
          if (body.messages) exchange.tokensPerCharacter = prompt / lengthOf(body.messages);
        }
        follow();
      }
      return;
    } catch (error) {
      const isTooLong = error.code === "context_length_exceeded" && body.messages;
      if (!isTooLong || exchange.leftOut >= kept.chat.indexOf(exchange)) throw error;
      exchange.leftOut++;
    }
  }
}

function clear() {
  undone = { mode, exchanges: kept[mode] };
  kept[mode] = [];
  store.saveExchanges(mode, []);
  showError("");
  render();
  showNote(undone.mode === "chat" ? "The conversation is cleared." : "The stories are cleared.", { undo: true });
  at("ask").focus();
}

function undo() {
  kept[undone.mode] = [...undone.exchanges, ...kept[undone.mode]];
  store.saveExchanges(undone.mode, kept[undone.mode]);
  showNote("");
  setMode(undone.mode, { isChoice: false });
}

// Controls ---------------------------------------------------------------------------------------

function openSettings(isOpen, { isChoice }) {
  document.body.classList.toggle("settings-open", isOpen);
  at("settings-button").setAttribute("aria-expanded", String(isOpen));
  at("main").inert = isOpen && !wide.matches;
  if (wide.matches && isChoice) store.save("settings", isOpen);
  if (isChoice) (isOpen ? at("settings-close") : at("settings-button")).focus();
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
}

function on(id, kind, act) {
  at(id).addEventListener(kind, act);
}

on("composer", "submit", (event) => {
  event.preventDefault();
  ask(at("ask").value);
});
on("ask", "input", showSend);
on("ask", "keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask(at("ask").value);
  } else if (event.key === "ArrowUp" && at("ask").value === "" && views.length > 0) {
    event.preventDefault();
    at("ask").value = views.at(-1).exchange.ask;
    showSend();
  }
});
on("stop", "click", () => {
  running?.abort();
  at("ask").focus();
});
on("mode-chat", "click", () => {
  if (model?.can_chat !== false) setMode("chat", { isChoice: true });
  else showNote("Chat is off: this model has read no conversations, so it only goes on with texts.");
});
on("mode-story", "click", () => setMode("story", { isChoice: true }));
on("look-button", "click", () => {
  const isOn = document.body.classList.toggle("looking");
  at("look-button").setAttribute("aria-pressed", String(isOn));
  store.save("looking", isOn);
  look.hide();
});
on("clear-button", "click", clear);
on("note-undo", "click", undo);
on("theme-button", "click", () => {
  const now = document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
  setTheme(now === "dark" ? "light" : "dark");
  store.save("theme", document.documentElement.dataset.theme);
});
on("settings-button", "click", () =>
  openSettings(!document.body.classList.contains("settings-open"), { isChoice: true }));
on("settings-close", "click", () => openSettings(false, { isChoice: true }));
on("backdrop", "click", () => openSettings(false, { isChoice: true }));
on("reset", "click", () => {
  sliders.reset();
  for (const id of ["seed", "system"]) {
    at(id).value = "";
    store.save(id, "");
  }
});
on("error-close", "click", () => showError(""));
on("error-again", "click", () => again?.());
on("key-form", "submit", (event) => {
  event.preventDefault();
  key = at("key").value.trim();
  store.saveKey(key);
  connect();
});
on("newest", "click", () => {
  follows = true;
  follow();
});
on("scroller", "scroll", () => {
  const { scrollHeight, scrollTop, clientHeight } = at("scroller");
  follows = scrollHeight - scrollTop - clientHeight < 40;
  at("newest").hidden = follows;
});
for (const id of ["seed", "system"]) {
  at(id).value = store.load(id, "");
  on(id, "input", () => store.save(id, at(id).value));
}
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (!wide.matches && document.body.classList.contains("settings-open")) {
    openSettings(false, { isChoice: true });
  } else {
    running?.abort();
  }
});
wide.addEventListener("change", () => openSettings(wide.matches && store.load("settings", true), { isChoice: false }));
new ResizeObserver(follow).observe(at("scroller"));

setTheme(store.load("theme", ""));
openSettings(wide.matches && store.load("settings", true), { isChoice: false });
if (!store.load("looking", true)) at("look-button").click();
connect();
