// @ts-check
// What an opened node shows: its times, its errors, and its whole value.

import { getText } from "../library/api.js";
import { clone, copyWith, part, show, write } from "../library/dom.js";
import { isFinal } from "../library/model.js";
import { linked } from "./links.js";
import { clock, duration, fully } from "../library/times.js";
import { Value } from "./value.js";

export class Detail {
  // `title` names the value for people who do not see its place. By default the node's name.
  constructor(run, container, title = null) {
    this.run = run;
    this.title = title;
    this.root = clone("detail-template").firstElementChild;
    this.node = null;
    this.value = null;
    /** @type {(name: Part) => any} */
    const at = (name) => part(this.root, name);
    copyWith(at("copy-error"), at("error-copied"), () => this.node.error_message);
    copyWith(at("copy-trace"), at("error-copied"), () => this.node.raw_error_message);
    container.append(this.root);
  }

  update(node) {
    const { root } = this;
    if (this.node === null) this.label(this.title ?? node.name);
    this.node = node;
    this.showTimes();
    this.showError();
    part(root, "failure").hidden = node.error_message === null && node.raw_error_message === null;
    part(root, "copy-error").hidden = node.error_message === null;
    part(root, "copy-trace").hidden = node.raw_error_message === null;
    part(root, "result").hidden = node.value === null;
    if (node.value !== null) this.value.show(node.value, { length: node.length, isText: node.is_text });
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
    const whole = () => getText(`api/executions/${this.run.id}/nodes/${this.node.index}`);
    this.value = new Value(part(this.root, "result"), `the value of ${name}`, whole);
    part(this.root, "copy-error").setAttribute("aria-label", `Copy the error of ${name}`);
    part(this.root, "copy-trace").setAttribute("aria-label", `Copy the traceback of ${name}`);
    part(this.root, "trace").setAttribute("aria-label", `Error details of ${name}`);
  }

  showTimes() {
    const { since } = this.run.data;
    const times = part(this.root, "times");
    const { running, final } = this.node;
    const at = (seconds) => (since === null ? "" : ` (${clock(since + seconds)})`);
    const after = (seconds) => `${seconds < 1 ? `${seconds.toFixed(1)} s` : duration(seconds)}${at(seconds)}`;
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
}
