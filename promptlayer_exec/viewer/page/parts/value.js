// @ts-check
// One value: as a tree, a table, Markdown or chat messages, or as text. To search, and to copy.

import { clone, copyWith, make, part, write } from "../library/dom.js";
import { readContainer } from "../library/json.js";
import { chatOf, markdownOf } from "./rich.js";
import { Text } from "./text.js";
import { Tree } from "./tree.js";

const LARGE = 2_000_000; // characters of a value that the page fetches only on demand
const LARGEST = 10_000_000; // characters of a value that it shows as plain text
const FOLDED = 120; // characters of JSON that need no tree
const SHORT = 1000; // characters of text that need no search

export class Value {
  // `name` is for people who do not see its place. `fetchWhole` returns the text of a value of which
  // `show` got only the beginning.
  constructor(container, name, fetchWhole = null) {
    this.root = clone("value-template").firstElementChild;
    this.fetchWhole = fetchWhole;
    this.given = null; // what `show` got
    this.text = null; // the whole value
    this.tree = null;
    this.isRaw = false;
    this.raw = new Text(this.root);
    copyWith(this.at("copy"), this.at("copied"), () => this.whole(), () => this.at("value"));
    this.at("show-all").addEventListener("click", () => this.load(true));
    this.at("as-raw").addEventListener("click", () => this.switchTo(!this.isRaw));
    this.at("find").addEventListener("input", () => this.search());
    this.at("find").addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault();
      this.step(event.shiftKey ? -1 : 1);
    });
    this.label(name);
    container.append(this.root);
  }

  /** @type {(name: Part) => any} */
  at(name) {
    return part(this.root, name);
  }

  label(name) {
    const title = name.replace(/^the /, "");
    this.at("copy").setAttribute("aria-label", `Copy ${name}`);
    this.at("find").setAttribute("aria-label", `Search ${name}`);
    this.at("value").setAttribute("aria-label", title[0].toUpperCase() + title.slice(1));
  }

  // Shows a text, or the beginning of one with `length` characters. `isText` says that the value is a
  // string, which may contain JSON or Markdown.
  show(text, { length = text.length, isText = false } = {}) {
    if (this.given?.text === text && this.given.length === length) return;
    this.given = { text, length, isText };
    this.text = length <= text.length ? text : null;
    this.render(text);
    if (this.text === null && length <= LARGE) this.load(false);
  }

  render(text) {
    const isWhole = this.text !== null;
    this.tree = null;
    const rich = isWhole && text.length <= LARGEST ? this.richOf(text) : null;
    this.at("rich").replaceChildren(...(rich === null ? [] : [rich]));
    this.raw.show(text);
    this.at("as-raw").hidden = rich === null;
    this.at("value-tools").hidden = !isWhole || (rich === null && text.length <= SHORT);
    this.at("find").value = "";
    write(this.at("found"), "");
    this.switchTo(rich === null);
    this.at("show-all").hidden = isWhole;
    write(this.at("show-all"), `Show all ${this.given.length.toLocaleString("en")} characters`);
  }

  // The value as people read it, or null if that is what it is.
  richOf(text) {
    const { isText } = this.given;
    const json = text.length > FOLDED || isText ? readContainer(text) : null;
    if (json === null) return isText ? markdownOf(text) : null;
    const chat = chatOf(json);
    if (chat !== null) return chat;
    const place = make("div", { class: "tree" });
    this.tree = new Tree(place, json);
    return place;
  }

  switchTo(isRaw) {
    this.isRaw = isRaw;
    this.at("rich").hidden = isRaw;
    this.at("value").hidden = !isRaw;
    this.at("pages").hidden = !isRaw || !this.raw.isLong;
    this.at("as-raw").setAttribute("aria-pressed", String(isRaw));
  }

  async whole() {
    return this.text ?? this.fetchWhole();
  }

  async load(isAsked) {
    const { given } = this;
    try {
      const text = await this.whole();
      if (this.given !== given) return; // it has changed in the meantime
      this.text = text;
      this.render(text);
      if (isAsked) this.at(this.isRaw ? "value" : "find").focus();
    } catch (error) {
      write(this.at("copied"), error.message);
    }
  }

  // In the tree, or in the text: what is neither is searched as text.
  search() {
    const wanted = this.at("find").value.trim().toLowerCase();
    if (this.tree === null && wanted !== "" && !this.isRaw) this.switchTo(true);
    this.searched = this.isRaw ? this.raw : this.tree;
    const count = this.searched?.search(wanted) ?? 0;
    if (count > 0) return this.step(1);
    write(this.at("found"), wanted ? "Nothing found" : "");
  }

  step(by) {
    const { searched } = this;
    if (!searched) return;
    searched.step(by);
    const { current, results } = searched;
    if (results.length) write(this.at("found"), `${current + 1} of ${results.length}`);
  }
}
