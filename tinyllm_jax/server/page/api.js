// What the page asks of the server, which speaks OpenAI's API. Addresses are relative, so the page
// works behind any prefix.

export class ApiError extends Error {
  constructor(message, { status = 0, code = "" } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

async function send(path, { key, body, signal }) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {
      method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it still running?");
  }
  if (answer.ok) return answer;
  let found = {};
  try {
    found = (await answer.json()).error ?? {};
  } catch {
    // Something between the page and the server answered; the status says what there is to say.
  }
  const message = found.message || `The server answered ${answer.status} and says no more.`;
  throw new ApiError(message, { status: answer.status, code: found.code });
}

export async function getModel(key) {
  const answer = await send("v1/models", { key });
  return (await answer.json()).data[0];
}

// Gives the JSON of each server-sent event up to the last.
async function* events(answer, signal) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      part = { done: true };
    }
    if (part.done) throw new ApiError("The connection was lost before the answer ended.");
    const lines = (rest + part.value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// Text of the token's bytes comes as numbers from chat, and inside the name from completions.
const BYTES = /^(?:<0x[0-9A-F]{2}>)+$/;
function bytesOf(name) {
  if (!BYTES.test(name)) return new TextEncoder().encode(name);
  return Uint8Array.from(name.slice(3, -1).split("><0x"), (digits) => parseInt(digits, 16));
}

// Control tokens have no text; only where a token's text begins and ends tells them from others.
function isControl(n, { tokens, text_offset: places }, text) {
  if (!/^<.+>$/s.test(tokens[n]) || BYTES.test(tokens[n])) return false;
  return n + 1 < tokens.length ? places[n] === places[n + 1] : !text.endsWith(tokens[n]);
}

function tokensOf(logprobs, text) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((each) => ({
      name: each.token,
      bytes: Uint8Array.from(each.bytes ?? []),
      logprob: each.logprob,
      others: each.top_logprobs.map((other) => [other.token, other.logprob]),
    }));
  }
  return (logprobs.tokens ?? []).map((name, n) => ({
    name,
    bytes: isControl(n, logprobs, text) ? new Uint8Array() : bytesOf(name),
    logprob: logprobs.token_logprobs[n],
    others: Object.entries(logprobs.top_logprobs[n]).sort((one, two) => two[1] - one[1]),
  }));
}

// Gives pieces of one answer: { text, tokens, end, usage }.
export async function* answer(path, body, { key, signal }) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await send(path, { key, signal, body: asked });
  for await (const event of events(response, signal)) {
    if (event.error) throw new ApiError(event.error.message, { code: event.error.code });
    const choice = event.choices?.[0];
    const text = choice?.delta?.content ?? choice?.text ?? "";
    yield {
      text,
      tokens: tokensOf(choice?.logprobs, text),
      end: choice?.finish_reason ?? "",
      usage: event.usage ?? null,
    };
  }
}
