// What the browser keeps. A key for the server is kept by the tab alone.

const PREFIX = "tinyllm.";

export function load(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

// Tells whether it was kept; some browsers keep nothing, and all have a limit.
export function save(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

// Where there is too much, the alternatives of the oldest answers go first, then the answers.
export function saveExchanges(name, exchanges) {
  const kept = [...exchanges];
  for (let n = 0; n < kept.length; n++) {
    if (save(name, kept)) return true;
    kept[n] = { ...kept[n], tokens: null };
  }
  while (kept.length > 0) {
    if (save(name, kept)) return true;
    kept.shift();
  }
  return save(name, []);
}

export function loadExchanges(name) {
  const found = load(name, []);
  const sound = (each) => typeof each?.ask === "string" && typeof each?.text === "string";
  return Array.isArray(found) ? found.filter(sound) : [];
}

export function loadKey() {
  try {
    return sessionStorage.getItem(PREFIX + "key") ?? "";
  } catch {
    return "";
  }
}

export function saveKey(key) {
  try {
    sessionStorage.setItem(PREFIX + "key", key);
  } catch {
    // The page goes on with the key that it has in hand.
  }
}
