// @ts-check
// Values as people read them: Markdown, links, and chat messages. It makes elements and text, never
// markup.

import { make } from "../library/dom.js";
import { readContainer } from "../library/json.js";
import { lexer } from "../vendor/marked.esm.js";
import { linked, linkOf, LONGEST } from "./links.js";
import { Tree } from "./tree.js";

const PLAIN = new Set(["space", "paragraph", "text", "html", "escape", "br", "def"]);
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', "#39": "'", nbsp: "\u00a0" };

// Returns the elements of a text that is Markdown, and null for any other.
export function markdownOf(text) {
  if (text.length > LONGEST) return null;
  const tokens = lexer(text, { gfm: true, breaks: true });
  if (!tokens.some(isMarked)) return null;
  const top = Math.min(...tokens.filter((it) => it.type === "heading").map((it) => it.depth), 6);
  return make("div", { class: "markdown" }, ...blocks(tokens, top));
}

// Whether a token is more than text. A bare link is not, because other texts also have some.
function isMarked(token) {
  if (token.type === "link") return !token.autolink;
  return !PLAIN.has(token.type) || (token.tokens ?? []).some(isMarked);
}

function blocks(tokens, top) {
  return tokens.flatMap((token) => {
    const inner = () => blocks(token.tokens ?? [], top);
    switch (token.type) {
      case "space":
      case "def":
        return [];
      case "heading": {
        const level = Math.min(6, 4 + token.depth - top);
        return make("p", { class: "heading", role: "heading", "aria-level": level }, ...inner());
      }
      case "paragraph":
        return make("p", {}, ...inner());
      case "code":
        return make("pre", { tabindex: "0", role: "region", "aria-label": "Code" }, token.text);
      case "blockquote":
        return make("blockquote", {}, ...inner());
      case "hr":
        return make("hr");
      case "list":
        return listOf(token, top);
      case "checkbox":
        return token.checked ? "[x] " : "[ ] ";
      case "table":
        return tableOf(token, top);
      default:
        return inline(token, inner);
    }
  });
}

function inline(token, inner) {
  const tags = { strong: "strong", em: "em", del: "del" };
  if (token.type in tags) return make(tags[token.type], {}, ...inner());
  if (token.type === "br") return make("br");
  if (token.type === "codespan") return make("code", {}, token.text);
  if (token.type === "link") return linkOf(token.href, inner());
  if (token.type === "image") return linkOf(token.href, [token.text || token.href]);
  if (token.tokens) return inner();
  return token.type === "text" ? decoded(token.text) : token.text;
}

function listOf({ items, ordered, start }, top) {
  const list = make(ordered ? "ol" : "ul", { start: ordered ? start : null });
  list.append(...items.map((item) => make("li", {}, ...blocks(item.tokens, top))));
  return list;
}

function tableOf({ header, rows }, top) {
  const row = (cells, tag) => make("tr", {}, ...cells.map((cell) => make(tag, {}, ...blocks(cell.tokens, top))));
  const table = make("table", {}, row(header, "th"), ...rows.map((cells) => row(cells, "td")));
  return make("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, table);
}

const decoded = (text) => text.replace(/&(amp|lt|gt|quot|#39|nbsp);/g, (_, name) => ENTITIES[name]);

const member = (node, name) => node.entries?.find(([key]) => key === name)?.[1];

// Returns the elements of a list of chat messages, or null if a value is none.
export function chatOf(root) {
  const list = root.kind === "array" ? root : member(root, "messages");
  const isMessage = (it) => member(it, "role")?.kind === "string" && member(it, "content") !== undefined;
  if (list?.kind !== "array" || list.items.length === 0 || !list.items.every(isMessage)) return null;
  const others = root === list ? [] : root.entries.filter(([, value]) => value !== list);
  const chat = make("div", { class: "chat" }, ...list.items.map(messageOf));
  if (others.length > 0) chat.append(treeOf({ kind: "object", entries: others }));
  return chat;
}

function messageOf(message) {
  const others = message.entries.filter(([key]) => !["role", "content"].includes(key));
  const content = member(message, "content");
  const parts = content.kind === "array" ? content.items : [content];
  return make(
    "div",
    { class: "message" },
    make("p", { class: "role" }, member(message, "role").value),
    ...parts.map((part) => contentOf(part.kind === "object" ? (member(part, "text") ?? part) : part)),
    ...(others.length > 0 ? [treeOf({ kind: "object", entries: others })] : []),
  );
}

function contentOf(node) {
  if (node.kind !== "string") return node.text === "null" ? "" : treeOf(node);
  const json = readContainer(node.value);
  if (json !== null) return treeOf(json);
  return markdownOf(node.value) ?? make("p", { class: "plain" }, ...linked(node.value));
}

function treeOf(node) {
  const place = make("div", { class: "tree" });
  new Tree(place, node);
  return place;
}
