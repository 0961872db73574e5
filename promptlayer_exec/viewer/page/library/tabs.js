// @ts-check
// All tabs of a browser share one token and one connection: browsers open at most six to a server.
// One tab leads: it has the connection, and passes its events on.

const ANSWER = 500; // milliseconds in which another tab gives the token
const LOCK = "stream";

const channel = new BroadcastChannel("viewer");
const me = Math.random();
const listeners = new Map(); // by kind of message
let isLeading = false;

// Whether this tab acts for all of them.
export const leads = () => isLeading;

channel.addEventListener("message", ({ data: { kind, to, data } }) => {
  if (to === undefined || to === me) listeners.get(kind)?.(data);
});

function listen(kind, callback) {
  listeners.set(kind, callback);
}

function send(kind, data, to) {
  channel.postMessage({ kind, data, to });
}

// The token

export function offerToken(current, onNew) {
  listen("ask-token", (to) => current() !== null && send("token", current(), to));
  listen("new-token", onNew);
}

export const announceToken = (token) => send("new-token", token);

// Returns the token of another tab, or null.
export function askToken() {
  send("ask-token", me);
  return new Promise((resolve) => {
    listen("token", resolve);
    setTimeout(() => resolve(null), ANSWER);
  });
}

// The connection: calls `follow(on)` once this tab leads. Until then, `on` gets what the leading
// tab passes on. `replay()` returns all that a new tab needs, as [kind, data].
export async function shareStream(follow, on, replay) {
  listen("event", ([kind, data]) => !isLeading && on[kind]?.(data));
  listen("ask-events", (to) => {
    if (isLeading) for (const event of replay()) send("event", event, to);
  });
  send("ask-events", me);
  const relayed = Object.fromEntries(
    Object.keys(on).map((kind) => [
      kind,
      (data) => {
        on[kind](data);
        if (kind !== "refused") send("event", [kind, data]); // another tab may have another token
      },
    ]),
  );
  if (navigator.locks === undefined) return lead(follow, relayed);
  await navigator.locks.request(LOCK, () => {
    isLeading = true;
    return follow(relayed);
  });
}

// Over plain http from another machine there are no locks. Then each tab asks every second which one
// leads, and leads itself if none replies. Of two that lead, the one with the larger number stays.
// Browsers slow down timers in hidden tabs, but not replies.
function lead(follow, on) {
  let isAnswered = false;
  let connected = null;
  listen("ask-lead", () => isLeading && send("lead", me));
  listen("lead", (other) => {
    isAnswered = true;
    if (!isLeading) return;
    if (other < me) return send("lead", me);
    isLeading = false;
    connected.abort();
    connected = null;
  });
  const turn = async () => {
    setTimeout(turn, 1000);
    if (connected !== null) return;
    if (isAnswered) {
      isAnswered = false;
      return send("ask-lead");
    }
    const { signal } = (connected = new AbortController());
    isLeading = true;
    send("lead", me);
    await follow(on, signal);
    if (!signal.aborted) isLeading = false; // a refused token: this tab does not lead again
  };
  send("ask-lead");
  setTimeout(turn, ANSWER);
}
