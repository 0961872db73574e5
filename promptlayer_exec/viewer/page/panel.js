// The graph of an execution's page: its definition, and which workflow that may be.

import { call, get } from "./api.js";
import { make, part, write } from "./dom.js";
import { Graph } from "./graph.js";

export class GraphPanel {
  constructor(root, id, onSelect, onDrawn) {
    this.root = root;
    this.id = id;
    this.onDrawn = onDrawn;
    this.definition = null;
    this.state = "none"; // none, loading, loaded
    this.graph = new Graph(part(root, "graph"), onSelect);
    part(root, "zoom-in").addEventListener("click", () => this.graph.zoom(1.25));
    part(root, "zoom-out").addEventListener("click", () => this.graph.zoom(0.8));
    part(root, "zoom-fit").addEventListener("click", () => this.graph.fit());
    part(root, "candidates").addEventListener("change", (event) => this.choose(event.target.value));
  }

  // Loads the definition, once there are nodes to compare it with.
  async load(run) {
    if (this.state !== "none" || run.nodes.size === 0) return;
    this.state = "loading";
    this.run = run;
    this.say("Looking for the definition of its workflow …");
    try {
      this.take(await get(`api/executions/${this.id}/graph`));
    } catch (error) {
      this.say(`There is no graph: ${error.message}`);
    }
    this.state = "loaded";
  }

  take(answer) {
    this.showCandidates(answer);
    const { definition } = answer;
    if (definition === null) return this.say(answer.reason ?? "");
    this.definition = definition;
    const dependencies = new Map();
    for (const { source, target } of definition.edges) {
      dependencies.set(target, [...(dependencies.get(target) ?? []), source]);
    }
    this.run.dependencies = dependencies;
    for (const name of ["graph", "graph-tools", "legend"]) part(this.root, name).hidden = false;
    this.graph.draw(definition);
    this.graph.update(this.run);
    this.graph.select(this.selected ?? null);
    const unknown = [...this.run.nodes.keys()].filter((name) => !(name in definition.nodes));
    const { name, version } = definition;
    const which = `${name}${version === null ? "" : `, version ${version}`}`;
    const missing = unknown.length > 0 ? `. Not in it: ${unknown.join(", ")}` : "";
    this.say(answer.is_guess ? `${which}: its nodes fit this execution${missing}` : which + missing);
    this.onDrawn();
  }

  showCandidates({ candidates, definition }) {
    const choice = part(this.root, "workflow-choice");
    choice.hidden = candidates.length === 0 || (candidates.length === 1 && definition !== null);
    if (choice.hidden) return;
    const options = candidates.map(({ id, name }) => make("option", { value: id }, name));
    const none = make("option", { value: "" }, `${candidates.length} workflows fit: choose one`);
    const select = part(this.root, "candidates");
    select.replaceChildren(none, ...options);
    select.value = definition === null ? "" : definition.id;
  }

  async choose(workflow) {
    if (workflow === "") return;
    try {
      const response = await call("PUT", `api/executions/${this.id}/workflow`, { workflow });
      this.take(await response.json());
    } catch (error) {
      this.say(error.message);
    }
  }

  say(text) {
    write(part(this.root, "graph-note"), text);
  }

  update(run, names = null) {
    this.run = run;
    this.load(run);
    if (this.definition !== null) this.graph.update(run, names);
  }

  select(name) {
    this.selected = name;
    this.graph.select(name);
  }

  markCritical(names) {
    this.graph.markCritical(names);
  }
}
