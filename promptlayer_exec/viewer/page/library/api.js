// @ts-check
// The token, and requests with it. It comes from the fragment, which is sent to no server, or from
// another tab.

import { announceToken, askToken, offerToken } from "./tabs.js";

let token = sessionStorage.getItem("token");
let isProven = false;
/** @type {(reason: string) => void} */
let onRefused = () => {};

// Finds the token, and returns whether there is one.
export async function findToken() {
  takeToken();
  if (token === null) {
    const given = await askToken();
    if (given !== null) keepToken(given);
  }
  offerToken(
    () => (isProven ? token : null),
    (given) => {
      if (given === token) return;
      keepToken(given);
      location.reload();
    },
  );
  return token !== null;
}

export function whenRefused(callback) {
  onRefused = callback;
}

export function keepToken(given) {
  token = given;
  sessionStorage.setItem("token", given);
}

// Takes the token out of the address bar, so that nobody sees or bookmarks it.
export function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given === null) return false;
  keepToken(given);
  history.replaceState(null, "", location.pathname);
  return true;
}

class Refusal extends Error {
  constructor(message, { field = null, status = 0, isUnknown = false } = {}) {
    super(message);
    this.field = field;
    this.status = status;
    this.isUnknown = isUnknown;
  }
}

// Sends other tabs a token that works. Any site could link to a wrong one.
export function shareToken() {
  isProven = true;
  announceToken(token);
}

export function request(path, options = {}) {
  const headers = { Authorization: `Bearer ${token}`, ...options.headers };
  return fetch(path, { cache: "no-store", ...options, headers });
}

export async function call(method, path, content, hint = "Is it still running?") {
  const options = { method };
  if (content !== undefined) {
    options.body = JSON.stringify(content);
    options.headers = { "Content-Type": "application/json" };
  }
  let response;
  try {
    response = await request(path, options);
  } catch {
    throw new Refusal(`The viewer did not respond. ${hint}`);
  }
  if (response.ok) return response;
  const { message, field, is_unknown } = await response.json().catch(() => ({}));
  const { status } = response;
  if (status === 401) onRefused(message);
  const text = message ?? `The viewer responded with ${status}.`;
  throw new Refusal(text, { field, status, isUnknown: is_unknown ?? false });
}

export async function get(path) {
  return (await call("GET", path)).json();
}

export async function getText(path) {
  return (await call("GET", path)).text();
}

export const getInputs = (id) => getText(`api/executions/${id}/inputs`);

// The latest lines of the history, the newest first, or none if there is no history.
export async function getRemembered(filters = {}) {
  const { entries } = await get(`api/history?${new URLSearchParams(filters)}`).catch(() => ({ entries: [] }));
  return entries;
}
