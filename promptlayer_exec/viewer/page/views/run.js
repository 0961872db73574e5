// @ts-check
// The view of one execution, at its own address: `#/executions/787?node=Plan`.

import { call } from "../library/api.js";
import { followAgain, remove } from "../parts/actions.js";
import { byId, clone, findAll, make, notify, part, show, timeOf, write } from "../library/dom.js";
import { criticalPath } from "../library/critical.js";
import { Inspector } from "../parts/inspector.js";
import { board, runs, settingsOf } from "../library/model.js";
import { GraphPanel } from "../parts/panel.js";
import { showSegments, showSentence, showState, showTime } from "../parts/progress.js";
import { addressOf, go, replace } from "../library/router.js";
import { matches, Rows } from "../parts/rows.js";
import { showSnippets } from "../parts/snippets.js";
import { STATUSES, UNKNOWN } from "../statuses.js";
import { runAgain } from "../parts/again.js";
import { offerComparison } from "../parts/comparison.js";
import { ago, clock, duration } from "../library/times.js";
import { usualOf } from "../library/usual.js";

const MARKS = {
  succeeded: STATUSES.get("SUCCESS").mark,
  failed: STATUSES.get("FAILED").mark,
  lost: UNKNOWN.mark,
};

const BRIEF = 100; // least characters of a reason in the headline: the detail of the node has all of it
const CHARACTER = 10; // pixels
// A wide window has room for more of the reason.
const briefNow = () => Math.max(BRIEF, Math.floor(innerWidth / CHARACTER));

let page = null; // of the current execution

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
      go("#/"); // somebody removed it
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

  tick(isWhole) {
    if (page?.run?.isDue(isWhole)) page.tick();
  },

  refresh() {
    if (page?.run) page.update();
  },

  title() {
    if (page === null || page.run === null) return "Executions";
    const { name, data } = page.run;
    return `${MARKS[data.state] ?? `${data.final}/${data.total}`} ${name}`;
  },

  run: () => page?.run ?? null,

  keys: {
    items: () => findAll(".run .node > .row"),
    isWanted: (item) => item.parentElement.dataset.status === "failed",
    onMove: (item) => page.choose(part(item, "name").textContent),
  },
};

class RunPage {
  constructor(id, run) {
    this.id = id;
    this.run = run;
    this.params = new URLSearchParams();
    this.selected = null;
    this.isChosen = false; // somebody, or the address, has chosen a node, or none
    this.isLoading = false;
    const root = make("div", { class: "run" });
    root.append(clone("run-template"));
    this.root = root;
    byId("run").replaceChildren(root);
    write(part(root, "crumb"), `Execution ${id}`);
    this.isTold = false; // the viewer knows of which item of a batch this is the run
    const shown = run ?? { nodes: new Map(), now: () => 0 };
    this.rows = new Rows(shown, part(root, "nodes"), part(root, "axis"), {
      hrefOf: (node) => addressOf(["executions", id], { node }),
      onChoose: (name, isByKey) => this.choose(name, isByKey),
      scroller: part(root, "scroller"),
    });
    this.graph = new GraphPanel(root, id, (name) => this.choose(name), () => this.onDrawn());
    this.inspector = new Inspector(root, shown, () => this.close(), (name, isByKey) => this.choose(name, isByKey));
    this.listen();
    showSnippets(part(root, "snippets"), id, board.server);
    if (run === null) this.showMissing();
    else this.fill();
  }

  listen() {
    /** @type {(name: Part) => any} */
    const at = (name) => part(this.root, name);
    at("remove").addEventListener("click", async () => (await remove(this.id)) && go("#/"));
    at("again").addEventListener("click", () =>
      this.run === null ? this.load() : followAgain(this.id, at("again")),
    );
    at("rerun").addEventListener("click", () => runAgain(this.run));
    offerComparison(this.root, () => this.run);
    at("filter").addEventListener("input", () => this.filter());
    at("sort").addEventListener("change", () => this.sort());
    at("download").addEventListener("click", () => this.download());
    at("sentence").addEventListener("click", (event) => {
      const link = event.target.closest("[data-piece=node]");
      if (link === null || event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      this.choose(link.textContent, event.detail === 0);
    });
    this.root.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.selected !== null && !event.target.matches("input")) this.close();
    });
  }

  // Asks the viewer to follow an execution that is not on the board.
  showMissing() {
    write(part(this.root, "title"), `Execution ${this.id}`);
    /** @type {Part[]} */
    const absent = ["rerun", "compare", "remove", "progress", "graph-panel"];
    for (const name of absent) part(this.root, name).hidden = true;
    this.root.querySelector(".split").hidden = true;
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
      if (this.params.has("batch")) await this.tell();
      else await call("POST", "api/executions", { execution_id: this.id });
    } catch (error) {
      write(part(root, "state"), "Not found");
      show(part(root, "problem"), error.message);
      write(part(root, "again"), "Try again");
      part(root, "again").hidden = false;
    }
    this.isLoading = false;
  }

  // Lets the viewer fill in what a batch knows of its run: workflow, inputs and times.
  async tell() {
    this.isTold = true;
    const content = { batch: this.params.get("batch"), item: this.params.get("item") ?? "", execution_id: this.id };
    await call("POST", "api/item/run", content);
  }

  fill() {
    this.rows.update();
    this.graph.load(this.run);
  }

  // The list shows the selection, or else the node that people come for.
  showAction() {
    this.rows.follow(this.selected ?? this.run.action()?.name ?? null);
  }

  // Selects what the address names.
  read(params) {
    this.params = params;
    const isUntold = params.has("batch") && this.run !== null && this.run.data.item === null;
    if (isUntold && !this.isTold) this.tell().catch((error) => notify(error.message));
    part(this.root, "filter").value = params.get("filter") ?? "";
    part(this.root, "sort").value = params.get("sort") ?? "";
    this.rows.order = part(this.root, "sort").value;
    this.rows.sort();
    this.applyFilter();
    this.isChosen = params.has("node");
    if (this.isChosen) this.select(params.get("node"));
  }

  onNodes(names) {
    this.rows.update(names);
    this.rows.select(this.selected);
    this.applyFilter();
    this.inspector.update();
    this.graph.update(this.run, names);
    this.showFailed();
    this.showAction();
    this.showCritical();
  }

  onDrawn() {
    this.inspector.showDefinition();
    this.showCritical();
  }

  // The failed node is what people come for, unless they have chosen another one.
  showFailed() {
    const failed = this.isChosen ? null : this.run.firstFailed();
    if (failed === null || this.selected === failed.name) return;
    this.select(failed.name);
    this.write();
  }

  update() {
    const { run, root } = this;
    if (run === null) return;
    showState(root, run);
    showSegments(root, run);
    part(root, "progress").hidden = run.isEnded || run.data.total === 0;
    part(root, "columns").hidden = run.data.total === 0;
    part(root, "remove").hidden = !run.isListed;
    const { workflow } = run.data;
    part(root, "rerun").hidden = workflow === null;
    const about = [...(workflow === null ? [] : [`Execution ${this.id}`]), ...settingsOf(run)];
    write(part(root, "subtitle"), about.join(" · "));
    this.showBatch();
    this.tick();
    this.showHeadline();
    this.showFacts();
    if (run.data.has_inputs) this.inspector.showInputs();
    this.inspector.showOutputs();
    this.inspector.update();
    this.graph.load(run);
    this.showFailed();
    this.showAction();
    this.showCritical();
  }

  tick() {
    const { root, run } = this;
    // Nobody saw when the nodes ran: values take the place of empty tracks.
    const isTimed = [...run.nodes.values()].some((node) => node.running !== null || node.final !== null);
    root.classList.toggle("timeless", run.isEnded && !isTimed);
    const problem = showTime(root, run);
    show(part(root, "problem"), run.data.state === "lost" ? null : problem);
    showSentence(root, run, briefNow(), false);
    const { duration: usual } = usualOf(run);
    write(part(root, "usual"), usual === null ? "" : `usually ${duration(usual)}`);
    this.rows.tick(this.run.now());
    this.graph.tick(this.run);
  }

  // The way back to the item of a batch.
  showBatch() {
    const { batch, item } = this.run.data;
    const place = part(this.root, "of-batch");
    if (item === null || !place.hidden) return;
    place.hidden = false;
    place.append(
      make("a", { href: addressOf(["batches", batch]) }, `Batch ${batch}`),
      " / ",
      make("a", { href: addressOf(["item", batch, item]) }, `Item ${item}`),
      " / ",
    );
  }

  // How many nodes did what.
  showHeadline() {
    const { run } = this;
    const counts = run.counts();
    const { total } = run.data;
    const words = [`${counts.success} of ${total} nodes succeeded`];
    for (const status of ["failed", "skipped", "running", "queued", "unknown"]) {
      if (counts[status] > 0) words.push(`${counts[status]} ${status}`);
    }
    write(part(this.root, "count"), total === 0 ? "" : `${words.join(", ")}.`);
  }

  showFacts() {
    const { run } = this;
    const { since, started } = run.data;
    const facts = [];
    const moment = started ?? since;
    if (moment !== null) {
      const words = [timeOf(moment, clock(moment)), ` (${ago(moment)})`];
      facts.push([started === null ? "Followed since" : "Started", words]);
    }
    if (["succeeded", "failed"].includes(run.data.state)) {
      const end = run.endedAt();
      if (end !== null) {
        facts.push(["Ended", [timeOf(end, clock(end))]]);
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
    const spans = new Map(this.path.map((name) => [name, this.rows.rows.get(name)?.span ?? null]));
    const sum = [...spans.values()].reduce((total, span) => total + (span ? span.end - span.start : 0), 0);
    const guess = this.run.dependencies === null ? " (judged by the times alone)" : "";
    const { length } = this.path;
    const all = this.path.map((name) => (spans.get(name)?.isTimed ? name : `${name} (too quick to be seen running)`));
    const names = length <= 5 ? all : [...all.slice(0, 2), "…", ...all.slice(-2)];
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

  // Selects a node everywhere, for somebody. The page does not scroll.
  choose(name, isByKey = false) {
    this.isChosen = true;
    this.select(name);
    this.write();
    if (isByKey) this.inspector.focus();
  }

  close() {
    const row = this.rows.rows.get(this.selected)?.row;
    const hadFocus = part(this.root, "inspector").contains(document.activeElement);
    this.choose(null);
    if (hadFocus) (row ?? byId("run-title")).focus({ preventScroll: true });
  }

  select(name) {
    this.selected = name;
    this.rows.select(name);
    if (this.rows.rows.has(name)) this.rows.reveal(name);
    this.graph.select(name);
    this.inspector.select(name);
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
    for (const name of ["batch", "item"]) if (this.params.has(name)) params.set(name, this.params.get(name));
    if (this.selected !== null) params.set("node", this.selected);
    /** @type {Part[]} */
    const remembered = ["filter", "sort"];
    for (const name of remembered) {
      const { value } = part(this.root, name);
      if (value !== "") params.set(name, value);
    }
    this.params = params;
    replace(["executions", this.id], params);
  }
}
