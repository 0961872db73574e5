// The view of one execution, at an address of its own: `#/executions/787?node=Plan`.

import { call } from "./api.js";
import { followAgain, remove, showState, tick } from "./board.js";
import { byId, clone, copyWith, make, notify, part, show, write } from "./dom.js";
import { criticalPath } from "./critical.js";
import { Detail } from "./detail.js";
import { readContainer } from "./json.js";
import { board, runs } from "./model.js";
import { GraphPanel } from "./panel.js";
import { go, replace } from "./router.js";
import { matches, Rows } from "./rows.js";
import { showSnippets } from "./snippets.js";
import { STATUSES, UNKNOWN } from "./statuses.js";
import { runAgain } from "./again.js";
import { offerComparison } from "./compare.js";
import { ago, clock, duration, fully, machine } from "./times.js";
import { Tree } from "./tree.js";

const MARKS = {
  succeeded: STATUSES.get("SUCCESS").mark,
  failed: STATUSES.get("FAILED").mark,
  lost: UNKNOWN.mark,
};

let page = null; // of the execution that is shown

export const runView = {
  element: byId("view-run"),

  show([, id], params) {
    const run = runs.get(id);
    if (page?.id !== id || page.run !== (run ?? null)) page = new RunPage(id, run ?? null);
    page.read(params);
    page.update();
  },

  hide() {
    page = null;
    byId("run").replaceChildren();
  },

  onBoard() {
    if (page === null || (page.run !== null && runs.get(page.id) === page.run)) return;
    if (runs.has(page.id)) {
      const { params } = page;
      page = new RunPage(page.id, runs.get(page.id));
      page.read(params);
      page.update();
    } else if (board.returning.has(page.id)) {
      return;
    } else if (page.run !== null) {
      go("#/"); // it was removed
    } else {
      page.load();
    }
  },

  onNodes(run, names) {
    if (run === page?.run) page.onNodes(names);
  },

  onExecution(run) {
    if (run === page?.run) page.update();
  },

  tick() {
    if (["running", "waiting"].includes(page?.run?.data.state)) tick(page, page.run);
  },

  title() {
    if (page === null || page.run === null) return "Executions";
    const { name, data } = page.run;
    return `${MARKS[data.state] ?? `${data.final}/${data.total}`} ${name}`;
  },

  run: () => page?.run ?? null,
};

class RunPage {
  constructor(id, run) {
    this.id = id;
    this.run = run;
    this.params = new URLSearchParams();
    this.selected = null;
    this.opened = new Set();
    this.isChosen = false; // somebody, or the address, has chosen a node
    this.isLoading = false;
    this.inputs = null;
    this.outputs = new Map();
    const root = make("div", { class: "run" });
    root.append(clone("run-template"));
    this.root = root;
    byId("run").replaceChildren(root);
    write(part(root, "crumb"), `Execution ${id}`);
    const onToggle = (name, isOpen) => this.toggled(name, isOpen);
    const shown = run ?? { nodes: new Map(), now: () => 0 };
    this.rows = new Rows(shown, part(root, "nodes"), part(root, "axis"), onToggle);
    this.graph = new GraphPanel(root, id, (name) => this.select(name), () => this.onDrawn());
    this.listen();
    showSnippets(part(root, "snippets"), id, board.server);
    if (run === null) this.showMissing();
    else this.fill();
  }

  listen() {
    const at = (name) => part(this.root, name);
    at("remove").addEventListener("click", async () => (await remove(this.id)) && go("#/"));
    at("again").addEventListener("click", () =>
      this.run === null ? this.load() : followAgain(this.id, at("again")),
    );
    at("rerun").addEventListener("click", () => runAgain(this.run));
    offerComparison(this.root, () => this.run);
    at("filter").addEventListener("input", () => this.filter());
    at("sort").addEventListener("change", () => this.sort());
    copyWith(at("copy-inputs"), at("inputs-copied"), () => this.inputs);
    at("download").addEventListener("click", () => this.download());
  }

  // An execution that is not followed: it is asked for, and then it is.
  showMissing() {
    write(part(this.root, "title"), `Execution ${this.id}`);
    for (const name of ["rerun", "compare", "remove"]) part(this.root, name).hidden = true;
    for (const name of ["columns", "graph-panel"]) part(this.root, name).hidden = true;
    if (board.isKnown) this.load();
  }

  async load() {
    if (this.isLoading) return;
    this.isLoading = true;
    const { root } = this;
    write(part(root, "state"), "Asking PromptLayer for it");
    show(part(root, "problem"), null);
    part(root, "again").hidden = true;
    try {
      await call("POST", "api/executions", { execution_id: this.id });
    } catch (error) {
      write(part(root, "state"), "Not found");
      show(part(root, "problem"), error.message);
      write(part(root, "again"), "Try again");
      part(root, "again").hidden = false;
    }
    this.isLoading = false;
  }

  fill() {
    this.rows.update();
    this.graph.load(this.run);
  }

  // Takes what the address says.
  read(params) {
    this.params = params;
    part(this.root, "filter").value = params.get("filter") ?? "";
    part(this.root, "sort").value = params.get("sort") ?? "";
    this.rows.order = part(this.root, "sort").value;
    this.rows.sort();
    this.applyFilter();
    const node = params.get("node");
    const open = params.getAll("open");
    this.isChosen = node !== null || open.length > 0;
    this.wanted = [...open, ...(node === null ? [] : [node])];
    this.wantedNode = node;
    this.openWanted();
  }

  // Opens the nodes of the address; their rows may come later.
  openWanted() {
    for (const name of this.wanted.filter((one) => this.rows.rows.has(one))) {
      this.wanted = this.wanted.filter((one) => one !== name);
      this.opened.add(name);
      this.rows.open(name, true);
      if (name === this.wantedNode) this.mark(name, true);
    }
  }

  onNodes(names) {
    this.rows.update(names);
    this.applyFilter();
    this.openWanted();
    this.graph.update(this.run, names);
    if (!this.isChosen) this.openFailed();
    this.showCritical();
  }

  onDrawn() {
    for (const { detail } of this.rows.rows.values()) detail?.showTimes();
    this.showCritical();
  }

  openFailed() {
    const failed = [...this.run.nodes.values()].find((node) => node.status === "FAILED");
    if (!failed || this.opened.has(failed.name)) return;
    this.opened.add(failed.name);
    this.rows.open(failed.name, true);
    this.mark(failed.name, true);
    this.write();
  }

  update() {
    const { run, root } = this;
    if (run === null) return;
    showState(root, run);
    const { workflow, label, version } = run.data;
    part(root, "rerun").hidden = workflow === null;
    const about = [workflow === null ? null : `Execution ${this.id}`];
    if (version !== null) about.push(`version ${version}`);
    if (label !== null) about.push(`label ${label}`);
    write(part(root, "subtitle"), about.filter((one) => one !== null).join(" · "));
    tick(this, run);
    // Once it has ended, its duration is among the facts, and counts from its start.
    part(root, "elapsed").hidden = ["succeeded", "failed"].includes(run.data.state);
    this.showFacts();
    if (run.data.has_inputs && this.inputs === null) this.showInputs();
    this.showOutputs();
    this.graph.load(run);
    if (!this.isChosen) this.openFailed();
    this.showCritical();
  }

  showFacts() {
    const { run } = this;
    const { since, started } = run.data;
    const facts = [];
    const moment = started ?? since;
    if (moment !== null) {
      const time = make("time", { datetime: machine(moment), title: fully(moment) }, clock(moment));
      facts.push([started === null ? "Followed since" : "Started", [time, ` (${ago(moment)})`]]);
    }
    if (["succeeded", "failed"].includes(run.data.state)) {
      const { elapsed } = run.data;
      if (since !== null && elapsed !== null) {
        const end = since + elapsed;
        const time = make("time", { datetime: machine(end), title: fully(end) }, clock(end));
        facts.push(["Ended", [time]]);
      }
      const least = started === null ? "at least " : "";
      const length = run.data.duration;
      const unseen = "not known: the run was over before this viewer saw it";
      facts.push(["Duration", [length === null ? unseen : least + duration(length)]]);
    }
    if (this.path?.length > 1) facts.push(["Critical path", [this.pathText()]]);
    const list = facts.map(([name, content]) =>
      make("div", {}, make("dt", {}, name), make("dd", {}, ...content)),
    );
    part(this.root, "facts").replaceChildren(...list);
  }

  pathText() {
    const spans = this.path.map((name) => this.rows.rows.get(name)?.span);
    const sum = spans.reduce((total, span) => total + (span ? span.end - span.start : 0), 0);
    const guess = this.run.dependencies === null ? " (judged by the times alone)" : "";
    const { length } = this.path;
    const names = length <= 5 ? this.path : [...this.path.slice(0, 2), "…", ...this.path.slice(-2)];
    const count = length <= 5 ? "" : `${length} nodes: `;
    return `${count}${names.join(" → ")}, ${duration(sum)} of ${duration(this.run.now())}${guess}`;
  }

  showCritical() {
    const { run } = this;
    if (run === null) return;
    const isDone = run.isEnded;
    this.path = isDone ? criticalPath(run.nodes, this.run.dependencies, run.now()) : [];
    const isPath = this.path.length > 1;
    this.rows.markCritical(isPath ? this.path : []);
    this.graph.markCritical(isPath ? this.path : []);
    if (isDone) this.showFacts();
  }

  // What the execution was for: the values of its output nodes, beside its inputs.
  showOutputs() {
    const nodes = [...this.run.nodes.values()];
    const outputs = nodes.filter((node) => node.is_output_node && node.status === "SUCCESS");
    part(this.root, "output-panel").hidden = !this.run.isEnded || outputs.length === 0;
    if (part(this.root, "output-panel").hidden) return;
    for (const node of outputs) {
      if (!this.outputs.has(node.name)) {
        const place = part(this.root, "outputs");
        if (outputs.length > 1) place.append(make("h4", { class: "output-name" }, node.name));
        this.outputs.set(node.name, new Detail(this.run, place, `the output ${node.name}`));
      }
      this.outputs.get(node.name).update(node);
    }
  }

  async download() {
    try {
      const response = await call("GET", `api/executions/${this.id}/snapshot`);
      const href = URL.createObjectURL(await response.blob());
      make("a", { href, download: `execution-${this.id}.json` }).click();
      URL.revokeObjectURL(href);
    } catch (error) {
      notify(error.message);
    }
  }

  async showInputs() {
    this.inputs = "";
    try {
      const response = await call("GET", `api/executions/${this.id}/inputs`);
      this.inputs = await response.text();
    } catch {
      return;
    }
    const json = readContainer(this.inputs);
    const place = make("div", { class: "tree" });
    if (json === null) place.append(make("pre", {}, this.inputs));
    else new Tree(place, json);
    part(this.root, "inputs").replaceChildren(place);
    part(this.root, "inputs-panel").hidden = false;
  }

  toggled(name, isOpen) {
    if (isOpen) this.opened.add(name);
    else this.opened.delete(name);
    this.mark(isOpen || this.selected !== name ? name : null, false);
    this.isChosen = true;
    this.write();
  }

  // A click in the graph selects the node everywhere, and opens its row.
  select(name) {
    this.isChosen = true;
    this.opened.add(name);
    this.rows.open(name, true);
    this.mark(name, true);
    this.write();
  }

  mark(name, isScrolling) {
    this.selected = name;
    this.rows.select(name);
    this.graph.select(name);
    const row = this.rows.rows.get(name);
    if (isScrolling && row) row.root.scrollIntoView({ block: "nearest" });
  }

  filter() {
    this.applyFilter();
    this.write();
  }

  applyFilter() {
    const text = part(this.root, "filter").value.trim().toLowerCase();
    this.rows.filter(text, text === "");
    const { nodes } = this.rows.run;
    const isFound = [...nodes.values()].some((node) => matches(node, text));
    part(this.root, "no-nodes").hidden = isFound || nodes.size === 0;
  }

  sort() {
    this.rows.order = part(this.root, "sort").value;
    this.rows.sort();
    this.write();
  }

  write() {
    const params = new URLSearchParams();
    if (this.selected !== null) params.set("node", this.selected);
    for (const name of this.opened) if (name !== this.selected) params.append("open", name);
    for (const name of ["filter", "sort"]) {
      const { value } = part(this.root, name);
      if (value !== "") params.set(name, value);
    }
    this.params = params;
    replace(["executions", this.id], params);
  }
}
