// @ts-check
// The graph of an execution's page. It asks for the workflow of a run added by its id.

import { call, get } from "../library/api.js";
import { part, write } from "../library/dom.js";
import { counted } from "../library/times.js";
import { handle, listWorkflows, showErrors } from "./forms.js";
import { Graph } from "./graph.js";

const AGAIN = 30_000; // milliseconds

export class GraphPanel {
  constructor(root, id, onSelect, onDrawn) {
    this.root = root;
    this.id = id;
    this.onDrawn = onDrawn;
    this.definition = null;
    this.state = "none"; // none, loading, loaded
    this.after = 0; // when to try again, after a failure
    this.asked = null; // the workflow as it was known when the page asked
    this.graph = new Graph(part(root, "graph"), onSelect, () => this.showFold());
    part(root, "zoom-in").addEventListener("click", () => this.graph.zoom(1.25));
    part(root, "zoom-out").addEventListener("click", () => this.graph.zoom(0.8));
    part(root, "zoom-fit").addEventListener("click", () => this.graph.fit());
    part(root, "fold-nodes").addEventListener("click", () => {
      if (this.graph.hasFolded) this.graph.unfold(null);
      else this.graph.foldAgain();
    });
    part(root, "of-workflow").addEventListener("focus", listWorkflows);
    handle(part(root, "workflow-form"), () => this.choose());
    part(root, "accept").addEventListener("click", () => this.accept());
  }

  // Loads the definition, once there are nodes to draw in it, and again once the workflow is known.
  async load(run) {
    const isNewlyKnown = this.asked === null && run.data.workflow !== null;
    if (this.state === "loaded" && this.definition === null && isNewlyKnown) {
      this.state = "none";
      this.after = 0;
    }
    if (this.state !== "none" || run.nodes.size === 0 || performance.now() < this.after) return;
    this.state = "loading";
    this.run = run;
    this.asked = run.data.workflow;
    this.say("Loading the definition of its workflow …");
    try {
      this.take(await get(`api/executions/${this.id}/graph`));
    } catch (error) {
      this.say(`There is no graph: ${error.message}`);
    }
    const isMissing = this.definition === null && this.asked !== null;
    this.state = isMissing ? "none" : "loaded";
    this.after = performance.now() + AGAIN;
    if (this.asked === null) this.load(this.run); // it may be known by now
  }

  take({ definition, reason }) {
    const isAsking = this.run.data.workflow === null && definition === null;
    part(this.root, "workflow-form").hidden = !isAsking;
    if (isAsking) this.suggest();
    if (definition === null) return this.say(reason ?? "");
    this.definition = definition;
    const dependencies = new Map();
    for (const { source, target } of definition.edges) {
      dependencies.set(target, [...(dependencies.get(target) ?? []), source]);
    }
    this.run.dependencies = dependencies;
    /** @type {Part[]} */
    const drawn = ["graph", "graph-tools", "legend"];
    for (const name of drawn) part(this.root, name).hidden = false;
    this.graph.draw(definition);
    this.showFold();
    this.graph.update(this.run);
    this.graph.select(this.selected ?? null);
    this.graph.follow(this.run.action()?.name ?? null);
    const unknown = [...this.run.nodes.keys()].filter((name) => !(name in definition.nodes));
    const { name, version } = definition;
    const which = `${name}${version === null ? "" : `, version ${version}`}`;
    const missing = unknown.length > 0 ? `. Not in it: ${unknown.join(", ")}` : "";
    this.say(which + missing);
    this.onDrawn();
  }

  // Like nodes of a large graph are folded at first.
  showFold() {
    const { hasFolded, opened } = this.graph;
    const button = part(this.root, "fold-nodes");
    button.hidden = !hasFolded && opened.size === 0;
    write(button, hasFolded ? "Unfold all" : "Fold");
  }

  // Nodes with the same names suggest a workflow.
  async suggest() {
    const { workflow, shared } = await get(`api/executions/${this.id}/suggestion`).catch(() => ({ workflow: null }));
    part(this.root, "suggestion").hidden = workflow === null;
    if (workflow === null) return;
    const count = counted(this.run.nodes.size, "node");
    write(part(this.root, "likely"), `Probably ${workflow}: ${shared} of the ${count} have the same names.`);
    write(part(this.root, "accept"), `Use ${workflow}`);
    this.suggested = workflow;
  }

  accept() {
    part(this.root, "of-workflow").value = this.suggested;
    part(this.root, "workflow-form").requestSubmit();
  }

  async choose() {
    const workflow = part(this.root, "of-workflow").value.trim();
    try {
      const response = await call("PUT", `api/executions/${this.id}/workflow`, { workflow });
      this.take(await response.json());
      part(this.root, "workflow-form").hidden = true;
    } catch (error) {
      showErrors(part(this.root, "workflow-form"), { message: error.message, field: "workflow" });
    }
  }

  say(text) {
    write(part(this.root, "graph-note"), text);
  }

  update(run, names = null) {
    this.run = run;
    this.load(run);
    if (this.definition === null) return;
    this.graph.update(run, names);
    this.graph.follow(run.action()?.name ?? null);
  }

  select(name) {
    this.selected = name;
    this.graph.select(name);
  }

  tick(run) {
    if (this.definition !== null) this.graph.tick(run);
  }

  markCritical(names) {
    this.graph.markCritical(names);
  }
}
