// @ts-check
// The events of all executions, on one connection, which reconnects when it is lost.

import { request, shareToken } from "./api.js";

const RETRY = 1000; // milliseconds until the next attempt to connect
const SILENCE = 45_000; // milliseconds without data, not even heartbeats, until it reconnects

// Calls `on.board`, `on.nodes`, `on.execution`, `on.connection` and `on.refused`, until `signal`
// aborts.
export async function follow(on, signal = new AbortController().signal) {
  let state = "connecting";
  const change = (now) => {
    if (now !== state) on.connection(now);
    state = now;
  };
  while (!signal.aborted) {
    const abort = new AbortController();
    signal.addEventListener("abort", () => abort.abort(), { signal: abort.signal });
    try {
      const response = await request("api/events", { signal: abort.signal });
      if (response.status === 401) {
        return on.refused(
          "The viewer was restarted and has a new token, or this token is incomplete.",
        );
      }
      if (!response.ok) throw new Error(`${response.status}`);
      shareToken();
      for await (const [kind, data] of events(response, abort)) {
        if (kind === "board") change("live");
        if (kind === "end") change("ended");
        else on[kind]?.(data);
      }
    } catch (error) {
      if (!(error instanceof TypeError) && error.name !== "AbortError") console.warn(error);
    }
    abort.abort();
    if (signal.aborted) return;
    if (state !== "ended") change("reconnecting");
    await new Promise((resolve) => setTimeout(resolve, RETRY));
  }
}

async function* events(response, abort) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  while (true) {
    const watchdog = setTimeout(() => abort.abort(), SILENCE);
    const { value, done } = await reader.read().finally(() => clearTimeout(watchdog));
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const found = /^event: (.*)\ndata: (.*)$/.exec(block);
      if (found) yield [found[1], JSON.parse(found[2])];
    }
  }
}
