// @ts-check
// Whether PromptLayer accepts the viewer's key, if no execution shows it.

import { get } from "./api.js";
import { board } from "./model.js";

// Tries the key. If PromptLayer refuses it, the banner then shows that.
export async function checkKey() {
  const { kind, reason } = await get("api/key").catch(() => ({ kind: null, reason: null }));
  if (kind === "refused") board.refusal ??= { kind, text: reason, since: Date.now() / 1000, until: null };
}
