// @ts-check
// Links in values.

import { make } from "../library/dom.js";
import { board } from "../library/model.js";

export const LONGEST = 200_000; // characters that are read as Markdown, or searched for links
const URL_IN_TEXT = /https?:\/\/[^\s<>"'`\\)\]}]*[^\s<>"'`\\)\]}.,;:!?]/g;

// A link leads out of the page, and to nothing but a page.
export function linkOf(href, content) {
  if (!/^(https?:|mailto:)/i.test(href)) return content;
  return make("a", { href, target: "_blank", rel: "noopener noreferrer" }, ...content);
}

// A browser has no key for the API, which errors name.
const isOfApi = (url) => url === board.server || url.startsWith(`${board.server}/`);

// A text with its links.
export function linked(text) {
  if (text.length > LONGEST) return [text];
  const parts = [];
  let at = 0;
  for (const found of text.matchAll(URL_IN_TEXT)) {
    const link = isOfApi(found[0]) ? found[0] : linkOf(found[0], [found[0]]);
    parts.push(text.slice(at, found.index), link);
    at = found.index + found[0].length;
  }
  parts.push(text.slice(at));
  return parts.filter((one) => one !== "");
}
