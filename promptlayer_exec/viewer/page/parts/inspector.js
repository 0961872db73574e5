// @ts-check
// The selection on the page of an execution: a node, or else its inputs and its output.

import { getInputs } from "../library/api.js";
import { Detail } from "./detail.js";
import { draw, make, oneLine, part, write } from "../library/dom.js";
import { statusOf, wordOf } from "../library/model.js";
import { Value } from "./value.js";

export class Inspector {
  constructor(root, run, onClose) {
    this.root = root;
    this.run = run;
    this.name = null;
    this.detail = null;
    this.inputs = null;
    this.outputs = new Map();
    this.at("close").addEventListener("click", onClose);
  }

  /** @param {Part} name */
  at(name) {
    return part(this.root, name);
  }

  // Shows a node, or none.
  select(name) {
    this.name = name;
    this.detail = null;
    this.at("node-detail").replaceChildren();
    this.at("inspector").scrollTo(0, 0);
    this.at("inspector").classList.toggle("has-node", name !== null);
    this.at("node-view").hidden = name === null;
    this.update();
  }

  update() {
    const node = this.name === null ? undefined : this.run.nodes.get(this.name);
    if (node === undefined) return;
    this.detail ??= new Detail(this.run, this.at("node-detail"));
    this.detail.update(node);
    this.at("node-view").dataset.status = statusOf(node);
    write(this.at("node-title"), node.name);
    write(this.at("node-status"), wordOf(node));
    draw(this.at("node-icon"), statusOf(node));
  }

  showTimes() {
    this.detail?.showTimes();
  }

  focus() {
    this.at("node-title").focus({ preventScroll: true });
  }

  async showInputs() {
    if (this.inputs !== null) return;
    this.inputs = "";
    try {
      this.inputs = await getInputs(this.run.id);
    } catch {
      return;
    }
    this.at("short-inputs").replaceChildren(make("span", { class: "muted" }, "Inputs "), oneLine(this.inputs));
    this.at("inputs").replaceChildren();
    new Value(this.at("inputs"), "inputs").show(this.inputs, { isText: true });
    this.at("inputs-panel").hidden = false;
  }

  // Of several outputs, the first is open, and the others are an index of their names.
  foldOf(node, outputs) {
    const summary = make("summary", { class: "output-name" }, node.name);
    const details = make("details", { open: node === outputs[0] }, summary);
    this.at("outputs").append(details);
    return details;
  }

  // What the execution was for: the values of its output nodes.
  showOutputs() {
    const nodes = [...this.run.nodes.values()];
    const outputs = nodes.filter((node) => node.is_output_node && node.status === "SUCCESS");
    this.at("output-panel").hidden = !this.run.isEnded || outputs.length === 0;
    if (this.at("output-panel").hidden) return;
    for (const node of outputs) {
      if (!this.outputs.has(node.name)) {
        const place = outputs.length > 1 ? this.foldOf(node, outputs) : this.at("outputs");
        this.outputs.set(node.name, new Detail(this.run, place, `the output ${node.name}`));
      }
      this.outputs.get(node.name).update(node);
    }
  }
}
