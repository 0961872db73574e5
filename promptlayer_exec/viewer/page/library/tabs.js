// @ts-check
// All tabs of a browser share one token and one connection: browsers open at most six to a server.
// One tab leads: it has the connection, and passes its events on.

const ANSWER = 500; // milliseconds in which another tab gives the token
const LOCK = "stream";
const SILENCE = 3000; // milliseconds after which a tab without locks takes over

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

// The connection: `follow(on)` is called once this tab leads; until then, `on` gets what the leading
// tab passes on. `replay()` returns all that a tab needs to know at first, as [kind, data].
export async function shareStream(follow, on, replay) {
  listen("event", ([kind, data]) => !isLeading && on[kind]?.(data));
  listen("ask-events", (to) => {
    if (!isLeading) return;
    send("lead");
    for (const event of replay()) send("event", event, to);
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

// Over plain http from another machine there are no locks. Then a tab leads as long as it says so every
// second; another one takes over once it is silent. Of two tabs that lead, both stop, and try again.
function lead(follow, on) {
  let heard = -SILENCE;
  let connected = null;
  let timer = 0;
  listen("lead", () => {
    heard = performance.now();
    isLeading = false;
    connected?.abort();
    connected = null;
  });
  const turn = async () => {
    timer = setTimeout(turn, 1000 + 500 * Math.random());
    if (performance.now() - heard < SILENCE) return;
    send("lead");
    if (connected !== null) return;
    const { signal } = (connected = new AbortController());
    isLeading = true;
    await follow(on, signal);
    if (signal.aborted) return;
    clearTimeout(timer); // the token was refused
    isLeading = false;
  };
  timer = setTimeout(turn, ANSWER);
}
