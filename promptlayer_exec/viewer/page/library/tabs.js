// @ts-check
// All tabs of a browser share one token and one connection: browsers open at most six to a server.
// A tab leads as long as it holds the lock: it has the connection, and passes its events on.

const ANSWER = 500; // milliseconds in which another tab gives the token
const LOCK = "stream";

const channel = new BroadcastChannel("viewer");
const me = Math.random();
const listeners = new Map(); // by kind of message
// Without a lock, as over plain http from another machine, each tab has a connection of its own.
let isLeading = navigator.locks === undefined;

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

// The connection: `follow(on)` is called once this tab leads; until then, `on` gets what the leading
// tab passes on. `replay()` returns all that a tab needs to know at first, as [kind, data].
export async function shareStream(follow, on, replay) {
  if (isLeading) return follow(on);
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
  await navigator.locks.request(LOCK, () => {
    isLeading = true;
    return follow(relayed);
  });
}
