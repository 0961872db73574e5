// @ts-check
// What an opened node shows: its times, its errors, and its whole value.

import { getText } from "../library/api.js";
import { clone, copyWith, make, part, show, write } from "../library/dom.js";
import { readContainer } from "../library/json.js";
import { isFinal } from "../library/model.js";
import { linked } from "./links.js";
import { chatOf, markdownOf } from "./rich.js";
import { Text } from "./text.js";
import { clock, duration, fully } from "../library/times.js";
import { Tree } from "./tree.js";

const LARGE = 1_000_000; // characters that the page fetches only on demand, and shows as plain text
const FOLDED = 120; // characters of JSON that need no tree
const SHORT = 1000; // characters of text that need no search

export class Detail {
  // `title` names the value for people who do not see its place. By default the node's name.
  constructor(run, container, title = null) {
    this.run = run;
    this.title = title;
    this.root = clone("detail-template").firstElementChild;
    this.node = null;
    this.text = null; // the whole value
    this.tree = null;
    this.isRaw = false;
    this.raw = new Text(this.root);
    /** @type {(name: Part) => any} */
    const at = (name) => part(this.root, name);
    copyWith(at("copy"), at("copied"), () => this.whole(), () => at("value"));
    copyWith(at("copy-error"), at("error-copied"), () => this.node.error_message);
    copyWith(at("copy-trace"), at("error-copied"), () => this.node.raw_error_message);
    at("show-all").addEventListener("click", () => this.load(true));
    at("as-raw").addEventListener("click", () => this.switchTo(!this.isRaw));
    at("find").addEventListener("input", () => this.search());
    at("find").addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault();
      this.step(event.shiftKey ? -1 : 1);
    });
    container.append(this.root);
  }

  update(node) {
    const { root } = this;
    const isNew = this.node === null || this.node.value !== node.value || this.node.length !== node.length;
    if (this.node === null) this.label(this.title ?? node.name);
    this.node = node;
    this.showTimes();
    this.showError();
    part(root, "failure").hidden = node.error_message === null && node.raw_error_message === null;
    part(root, "copy-error").hidden = node.error_message === null;
    part(root, "copy-trace").hidden = node.raw_error_message === null;
    part(root, "result").hidden = node.value === null;
    if (!isNew || node.value === null) return;
    this.text = node.length <= node.value.length ? node.value : null;
    this.render(node.value);
    if (this.text === null && node.length <= LARGE) this.load(false);
  }

  // A traceback opens at its last line. If that has the message, the message stands there alone.
  showError() {
    const { error_message: message, raw_error_message: details } = this.node;
    const trace = part(this.root, "trace");
    const isNew = trace.textContent !== (details ?? "");
    part(this.root, "error").replaceChildren(...linked(message ?? ""));
    part(this.root, "error").hidden = details !== null && details.trimEnd().endsWith(message ?? "");
    show(trace, details);
    if (isNew && details !== null) {
      requestAnimationFrame(() => trace.scrollTo({ top: trace.scrollHeight, behavior: "instant" }));
    }
  }

  label(name) {
    /** @type {[Part, string][]} */
    const labels = [
      ["copy", `Copy the value of ${name}`],
      ["copy-error", `Copy the error of ${name}`],
      ["copy-trace", `Copy the traceback of ${name}`],
      ["value", `Value of ${name}`],
      ["trace", `Error details of ${name}`],
      ["find", `Search the value of ${name}`],
    ];
    for (const [which, label] of labels) {
      part(this.root, which).setAttribute("aria-label", label);
    }
  }

  showTimes() {
    const { since } = this.run.data;
    const times = part(this.root, "times");
    const { running, final } = this.node;
    const at = (seconds) => (since === null ? "" : ` (${clock(since + seconds)})`);
    const after = (seconds) => `${duration(seconds)}${at(seconds)}`;
    let text = "Not seen running yet.";
    if (running !== null) {
      const isUnseen = final === null && isFinal(this.node);
      const end = final === null ? "." : `, and final at ${after(final)}.`;
      text = `First seen running at ${after(running)}${isUnseen ? ". The viewer did not see it finish." : end}`;
    } else if (final !== null) {
      text = `First seen at ${after(final)}, already final.`;
    } else if (isFinal(this.node)) {
      text = "It was over before this viewer saw the run, so its times are unknown.";
    }
    if (this.node.status === "SKIPPED") text = this.run.whySkipped(this.node.name);
    write(times, text);
    if (since !== null) times.title = `Seconds since ${fully(since)}`;
  }

  // Shows a value, or its first characters, with the rest to be fetched later.
  render(text) {
    const { root, node } = this;
    const isWhole = this.text !== null;
    this.tree = null;
    const rich = isWhole && text.length <= LARGE ? this.richOf(text) : null;
    part(root, "rich").replaceChildren(...(rich === null ? [] : [rich]));
    this.raw.show(text);
    part(root, "as-raw").hidden = rich === null;
    part(root, "value-tools").hidden = !isWhole || (rich === null && text.length <= SHORT);
    part(root, "find").value = "";
    write(part(root, "found"), "");
    this.switchTo(rich === null);
    const more = part(root, "show-all");
    more.hidden = isWhole;
    write(more, `Show all ${node.length.toLocaleString("en")} characters`);
  }

  // The value as people read it, or null if that is what it is.
  richOf(text) {
    const json = text.length > FOLDED || this.node.is_text ? readContainer(text) : null;
    if (json === null) return this.node.is_text ? markdownOf(text) : null;
    const chat = chatOf(json);
    if (chat !== null) return chat;
    const place = make("div", { class: "tree" });
    this.tree = new Tree(place, json);
    return place;
  }

  switchTo(isRaw) {
    this.isRaw = isRaw;
    const { root } = this;
    part(root, "rich").hidden = isRaw;
    part(root, "value").hidden = !isRaw;
    part(root, "pages").hidden = !isRaw || !this.raw.isLong;
    part(root, "as-raw").setAttribute("aria-pressed", String(isRaw));
  }

  async whole() {
    if (this.text !== null) return this.text;
    return getText(`api/executions/${this.run.id}/nodes/${this.node.index}`);
  }

  async load(isAsked) {
    const { node } = this;
    try {
      const text = await this.whole();
      if (this.node.value !== node.value) return; // it has changed in the meantime
      this.text = text;
      this.render(text);
      if (isAsked) part(this.root, this.isRaw ? "value" : "find").focus();
    } catch (error) {
      write(part(this.root, "copied"), error.message);
    }
  }

  // In the tree, or in the text: what is neither is searched as text.
  search() {
    const wanted = part(this.root, "find").value.trim().toLowerCase();
    if (this.tree === null && wanted !== "" && !this.isRaw) this.switchTo(true);
    this.searched = this.isRaw ? this.raw : this.tree;
    const count = this.searched?.search(wanted) ?? 0;
    if (count > 0) return this.step(1);
    write(part(this.root, "found"), wanted ? "Nothing found" : "");
  }

  step(by) {
    const { searched } = this;
    if (!searched) return;
    searched.step(by);
    const { current, results } = searched;
    if (results.length) write(part(this.root, "found"), `${current + 1} of ${results.length}`);
  }
}
