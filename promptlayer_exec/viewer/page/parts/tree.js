// @ts-check
// A JSON value as a tree to fold and search. It makes a branch when you open it. A list of objects
// with the same keys is a table.

import { make, stepTo, write } from "../library/dom.js";
import { readContainer } from "../library/json.js";
import { counted } from "../library/times.js";
import { linked } from "./links.js";

const CHUNK = 100; // children to make together
const FIRST = 4; // members of an object in its preview
const SHORT = 40; // characters of each
const LONG = 400; // characters of a string to show at first
const COLUMNS = 12; // keys of objects that fit into a table
const DEEPEST_TEXT = 200_000; // characters of a string to read as JSON
const MOST = 1000; // results of a search

export class Tree {
  constructor(container, root) {
    this.root = root;
    this.branches = new Map(); // by JSON node: the element of a branch that was made
    this.leaves = new Map();
    this.results = [];
    this.current = -1;
    const list = make("ul");
    list.append(this.item(null, root));
    container.replaceChildren(list);
    this.branches.get(root)?.open();
  }

  item(key, node) {
    const item = make("li");
    const name = key === null ? [] : [make("span", { class: "key" }, key), ": "];
    const children = childrenOf(node);
    if (children === null) {
      const leaf = make("span", { class: `leaf ${node.kind}` }, ...name, ...leafOf(node));
      this.leaves.set(node, leaf);
      item.append(leaf);
      return item;
    }
    const summary = make("summary", {}, ...name, make("span", { class: "muted" }, sizeOf(node)), make("span", { class: "muted peek" }, previewOf(node)));
    const details = make("details", {}, summary);
    const names = columnsOf(node);
    const branch = names === null ? new Branch(this, details, children) : new TableBranch(this, details, children, names);
    this.branches.set(node, branch);
    details.addEventListener("toggle", () => details.open && branch.open());
    item.append(details);
    return item;
  }

  // Finds keys and values that contain a text, and returns how many.
  search(text) {
    const wanted = text.trim().toLowerCase();
    this.results = [];
    this.current = -1;
    if (wanted !== "") this.collect(this.root, null, [], wanted);
    this.mark(null);
    return this.results.length;
  }

  collect(node, key, path, wanted) {
    if (this.results.length >= MOST) return;
    const children = childrenOf(node);
    const text = children === null ? (node.value ?? node.text) : "";
    if (`${key ?? ""}\n${text}`.toLowerCase().includes(wanted)) this.results.push([...path, node]);
    const here = [...path, node];
    for (const [name, child] of children ?? []) this.collect(child, name, here, wanted);
  }

  // Opens the branches of the next result, or the one before, and scrolls to it.
  step(by) {
    if (this.results.length === 0) return;
    this.current = stepTo(this.current, by, this.results.length);
    const path = this.results[this.current];
    path.slice(0, -1).forEach((node, index) => this.branches.get(node).reveal(path[index + 1]));
    const last = path.at(-1);
    const found = this.leaves.get(last) ?? this.branches.get(last).details.firstElementChild;
    this.mark(found);
    found.scrollIntoView({ block: "nearest" });
  }

  mark(element) {
    this.marked?.classList.remove("found");
    this.marked = element;
    element?.classList.add("found");
  }
}

// It shows a window of its children, and grows it on demand. A search moves it.
class Branch {
  constructor(tree, details, children) {
    this.tree = tree;
    this.details = details;
    this.children = children;
    this.from = 0;
    this.until = 0;
    this.list = make("ul");
    this.frame = this.list;
    this.earlier = this.buttonFor(-1);
    this.later = this.buttonFor(1);
    details.append(this.list);
  }

  open() {
    this.details.open = true;
    if (this.until === 0) this.show(0, CHUNK);
  }

  show(from, until) {
    const isLonger = from === this.from && until > this.until;
    const elements = (one, other) => this.children.slice(one, other).map(([key, node]) => this.childOf(key, node));
    until = Math.min(until, this.children.length);
    if (isLonger) this.list.append(...elements(this.until, until));
    else this.list.replaceChildren(...elements(from, until));
    this.from = from;
    this.until = until;
    this.offer(this.earlier, "earlier", from, () => this.frame.before(this.earlier));
    this.offer(this.later, "more", this.children.length - until, () => this.frame.after(this.later));
  }

  childOf(key, node) {
    return this.tree.item(key, node);
  }

  offer(button, word, rest, place) {
    button.remove();
    if (rest === 0) return;
    write(button, `Show ${Math.min(CHUNK, rest)} of ${rest.toLocaleString("en")} ${word}`);
    place();
  }

  buttonFor(direction) {
    const button = make("button", { type: "button", class: "quiet" });
    button.addEventListener("click", () => {
      const first = direction < 0 ? 0 : this.list.children.length;
      if (direction < 0) this.show(Math.max(0, this.from - CHUNK), this.until);
      else this.show(this.from, this.until + CHUNK);
      (this.list.children[first]?.querySelector("summary, button") ?? button).focus();
    });
    return button;
  }

  reveal(node) {
    this.details.open = true;
    const index = this.children.findIndex((child) => child[1] === node);
    const start = index - (index % CHUNK);
    if (this.until === 0 && start === 0) this.show(0, CHUNK);
    else if (index < this.from || index >= this.until) this.show(start, start + CHUNK);
  }
}

// A row for each object, and a column for each key.
class TableBranch extends Branch {
  constructor(tree, details, children, names) {
    super(tree, details, children);
    this.names = names;
    this.list.remove();
    this.list = make("tbody");
    const head = names.map((name) => make("th", { scope: "col" }, name));
    const table = make("table", {}, make("thead", {}, make("tr", {}, make("td"), ...head)), this.list);
    this.frame = make("div", { class: "rows", tabindex: "0", role: "region", "aria-label": "Table" }, table);
    details.append(this.frame);
  }

  childOf(key, node) {
    const index = make("td", { class: "index" }, key);
    const values = new Map(node.entries);
    const cells = this.names.map((name) => make("td", {}, this.cellOf(values.get(name))));
    // A search finds a row as if it were a branch.
    this.tree.branches.set(node, { details: make("div"), reveal() {} });
    this.tree.leaves.set(node, index);
    return make("tr", {}, index, ...cells);
  }

  cellOf(node) {
    if (childrenOf(node) !== null) return make("ul", {}, this.tree.item(null, node));
    const leaf = make("span", { class: `leaf ${node.kind}` }, ...leafOf(node, false));
    this.tree.leaves.set(node, leaf);
    return leaf;
  }
}

// The keys of a list of objects that all have the same ones, or null.
function columnsOf(node) {
  const inner = innerOf(node) ?? node;
  if (inner.kind !== "array" || inner.items.length < 2) return null;
  const names = inner.items[0].entries?.map(([key]) => key) ?? [];
  const wanted = new Set(names);
  const isLike = ({ entries }) => entries?.length === names.length && entries.every(([key]) => wanted.has(key));
  const isTable = names.length > 0 && wanted.size === names.length && names.length <= COLUMNS;
  return isTable && inner.items.every(isLike) ? names : null;
}

// A string that contains JSON is also a branch. It reads the string once.
function innerOf(node) {
  if (node.kind !== "string") return null;
  if (node.inner === undefined) {
    node.inner = node.value.length > DEEPEST_TEXT ? null : readContainer(node.value);
  }
  return node.inner;
}

function childrenOf(node) {
  const inner = innerOf(node);
  if (inner !== null) return childrenOf(inner);
  if (node.kind === "object") return node.entries;
  if (node.kind === "array") return node.items.map((item, index) => [String(index), item]);
  return null;
}

function sizeOf(node) {
  const inner = innerOf(node);
  if (inner !== null) return `JSON in a string: ${sizeOf(inner)}`;
  const isObject = node.kind === "object";
  const [count, noun, brackets] = isObject ? [node.entries.length, "key", "{}"] : [node.items.length, "item", "[]"];
  return count === 0 ? brackets : `${brackets} ${counted(count, noun)}`;
}

// The first members of an object, such as ": id 7, name Ann". A list of objects is then readable
// without opening each of them.
function previewOf(node) {
  if (node.kind !== "object") return "";
  const plain = node.entries.filter(([, { kind }]) => kind !== "object" && kind !== "array").slice(0, FIRST);
  if (plain.length === 0) return "";
  const words = plain.map(([key, value]) => `${key} ${value.kind === "string" ? shortened(value.value) : value.text}`);
  return `: ${words.join(", ")}`;
}

function shortened(text) {
  const line = text.slice(0, 2 * SHORT).replace(/\s+/g, " ");
  return line.length > SHORT ? `${line.slice(0, SHORT)}…` : line;
}

// In a table, a string has no quotes.
function leafOf(node, isQuoted = true) {
  if (node.kind !== "string") return [node.text];
  const mark = isQuoted ? '"' : "";
  if (node.value.length <= LONG) return [mark, ...linked(node.value), mark];
  const text = make("span", {}, `${mark}${node.value.slice(0, LONG)}…`);
  const button = make("button", { type: "button", class: "quiet" }, "Show the whole string");
  button.addEventListener("click", () => {
    text.replaceChildren(mark, ...linked(node.value), mark);
    button.remove();
  });
  return [text, " ", button];
}
