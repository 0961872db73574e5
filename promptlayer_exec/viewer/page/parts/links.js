// @ts-check
// Links in values.

import { make } from "../library/dom.js";

export const LONGEST = 200_000; // characters that are read as Markdown, or searched for links
const URL_IN_TEXT = /https?:\/\/[^\s<>"'`\\)\]}]*[^\s<>"'`\\)\]}.,;:!?]/g;

// A link leads out of the page, and to nothing but a page.
export function linkOf(href, content) {
  if (!/^(https?:|mailto:)/i.test(href)) return content;
  return make("a", { href, target: "_blank", rel: "noopener noreferrer" }, ...content);
}

// A text with its links.
export function linked(text) {
  if (text.length > LONGEST) return [text];
  const parts = [];
  let at = 0;
  for (const found of text.matchAll(URL_IN_TEXT)) {
    parts.push(text.slice(at, found.index), linkOf(found[0], [found[0]]));
    at = found.index + found[0].length;
  }
  parts.push(text.slice(at));
  return parts.filter((one) => one !== "");
}
