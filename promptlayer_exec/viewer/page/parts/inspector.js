// @ts-check
// The selection on the page of an execution: a node, or else its inputs and its output.

import { getInputs } from "../library/api.js";
import { Detail } from "./detail.js";
import { draw, iconOf, make, oneLine, part, write } from "../library/dom.js";
import { statusOf, wordOf } from "../library/model.js";
import { addressOf } from "../library/router.js";
import { Value } from "./value.js";

export class Inspector {
  // `onChoose(name, isByKey)` selects another node.
  constructor(root, run, onClose, onChoose) {
    this.root = root;
    this.run = run;
    this.onChoose = onChoose;
    this.name = null;
    this.detail = null;
    this.inputs = null;
    this.outputs = new Map();
    this.shown = ""; // what is on the page of the nodes that the selected one depends on, as JSON
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
    this.showSources();
  }

  // What the workflow's definition tells.
  showDefinition() {
    this.detail?.showTimes();
    this.showSources();
  }

  // The nodes on which the selected one depends, with the beginning of what each put out.
  showSources() {
    const names = this.run.dependencies?.get(this.name) ?? [];
    const known = names.map((name) => this.run.nodes.get(name)).filter((node) => node !== undefined);
    this.at("received").hidden = known.length === 0;
    const text = JSON.stringify(known.map((node) => [node.name, node.status, node.value, node.error_message]));
    if (this.shown === text) return;
    this.shown = text; // else a link would lose the focus
    this.at("sources").replaceChildren(...known.map((node) => this.sourceOf(node)));
  }

  sourceOf(node) {
    const link = make("a", { href: addressOf(["executions", this.run.id], { node: node.name }) }, node.name);
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      this.onChoose(node.name, event.detail === 0);
    });
    const status = make("span", { class: "status" }, iconOf(statusOf(node)), wordOf(node));
    const value = oneLine(node.error_message ?? node.value ?? "");
    const source = make("li", {}, link, status, make("code", { class: "preview" }, value));
    source.dataset.status = statusOf(node);
    return source;
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
