// @ts-check
// Reads JSON as Python writes it, without rounding: JSON.parse rounds integers beyond 2**53, and
// refuses NaN. A node of the result has a `kind`: object (`entries`), array (`items`), string
// (`value`), or other (`text`).

const SPACE = /[ \t\n\r]*/y;
const STRING = /"(?:[^"\\\u0000-\u001f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"/y;
const OTHER = /(?:-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null|NaN|-?Infinity)/y;
const DEEPEST = 200;

export class NotJson extends Error {}

export function readJson(text) {
  const reader = new Reader(text);
  const node = reader.value(0);
  reader.take(SPACE);
  if (reader.at < text.length) throw new NotJson(`unexpected text at ${reader.at}`);
  return node;
}

// Returns null in place of an error, and for what would not be worth folding.
export function readContainer(text) {
  if (!/^\s*[[{]/.test(text)) return null;
  try {
    return readJson(text);
  } catch (error) {
    if (error instanceof NotJson) return null;
    throw error;
  }
}

class Reader {
  constructor(text) {
    this.text = text;
    this.at = 0;
  }

  take(pattern) {
    pattern.lastIndex = this.at;
    const found = pattern.exec(this.text);
    if (found === null) return null;
    this.at = pattern.lastIndex;
    return found[0];
  }

  has(character) {
    this.take(SPACE);
    if (this.text[this.at] !== character) return false;
    this.at += 1;
    return true;
  }

  expect(character) {
    if (!this.has(character)) throw new NotJson(`expected ${character} at ${this.at}`);
  }

  string() {
    this.take(SPACE);
    const found = this.take(STRING);
    return found === null ? null : JSON.parse(found);
  }

  value(depth) {
    if (depth > DEEPEST) throw new NotJson("nested too deeply");
    if (this.has("{")) return { kind: "object", entries: this.entries(depth) };
    if (this.has("[")) return { kind: "array", items: this.items(depth) };
    const value = this.string();
    if (value !== null) return { kind: "string", value };
    const text = this.take(OTHER);
    if (text === null) throw new NotJson(`expected a value at ${this.at}`);
    return { kind: "other", text };
  }

  entries(depth) {
    const entries = [];
    if (this.has("}")) return entries;
    do {
      const key = this.string();
      if (key === null) throw new NotJson(`expected a key at ${this.at}`);
      this.expect(":");
      entries.push([key, this.value(depth + 1)]);
    } while (this.has(","));
    this.expect("}");
    return entries;
  }

  items(depth) {
    const items = [];
    if (this.has("]")) return items;
    do items.push(this.value(depth + 1));
    while (this.has(","));
    this.expect("]");
    return items;
  }
}

export function writeJson(node) {
  if (node.kind === "string") return JSON.stringify(node.value);
  if (node.kind === "other") return node.text;
  if (node.kind === "array") return `[${node.items.map(writeJson).join(", ")}]`;
  const entries = node.entries.map(([key, item]) => `${JSON.stringify(key)}: ${writeJson(item)}`);
  return `{${entries.join(", ")}}`;
}
