// @ts-check
// A text of any length. It draws one window of it at a time, but searches all of it.

import { make, part, stepTo, write } from "../library/dom.js";
import { linked } from "./links.js";

const WINDOW = 100_000; // characters to draw together
const MOST = 1000; // results of a search

export class Text {
  // `root` has the parts `value`, `pages`, `earlier`, `later` and `where`.
  constructor(root) {
    this.root = root;
    this.text = "";
    this.at = 0;
    this.results = [];
    this.current = -1;
    part(root, "earlier").addEventListener("click", () => this.move(-WINDOW));
    part(root, "later").addEventListener("click", () => this.move(WINDOW));
  }

  show(text) {
    this.text = text;
    this.at = 0;
    this.results = [];
    this.current = -1;
    this.draw();
  }

  get isLong() {
    return this.text.length > WINDOW;
  }

  move(by) {
    this.current = -1;
    this.at = Math.max(0, Math.min(this.at + by, this.text.length - 1));
    this.draw();
    part(this.root, "value").scrollTo(0, 0);
  }

  draw() {
    const { text, at } = this;
    const end = Math.min(text.length, at + WINDOW);
    const found = this.results[this.current];
    const shown = found === undefined ? linked(text.slice(at, end)) : this.marked(found, end);
    part(this.root, "value").replaceChildren(...shown);
    part(this.root, "pages").hidden = !this.isLong;
    part(this.root, "earlier").disabled = at === 0;
    part(this.root, "later").disabled = end === text.length;
    const number = (one) => one.toLocaleString("en");
    write(part(this.root, "where"), `Characters ${number(at + 1)} to ${number(end)} of ${number(text.length)}`);
  }

  marked(found, end) {
    const { text, at } = this;
    this.mark = make("mark", {}, text.slice(found, found + this.length));
    return [text.slice(at, found), this.mark, text.slice(found + this.length, end)];
  }

  // Finds a text, in lower case, and returns how often, up to a limit.
  search(wanted) {
    this.results = [];
    this.current = -1;
    this.length = wanted.length;
    const lower = wanted === "" ? "" : this.text.toLowerCase();
    // A few letters change their length in lower case: then it searches the text as it is.
    const text = lower.length === this.text.length ? lower : this.text;
    for (let at = 0; wanted !== "" && this.results.length < MOST; at += this.length) {
      at = text.indexOf(wanted, at);
      if (at < 0) break;
      this.results.push(at);
    }
    if (wanted === "") this.draw();
    return this.results.length;
  }

  step(by) {
    if (this.results.length === 0) return;
    this.current = stepTo(this.current, by, this.results.length);
    const found = this.results[this.current];
    const isDrawn = found >= this.at && found + this.length <= this.at + WINDOW;
    if (!isDrawn) this.at = Math.max(0, found - WINDOW / 2);
    this.draw();
    this.mark.scrollIntoView({ block: "nearest" });
  }
}
