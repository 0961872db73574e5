// @ts-check
// The line of a cause: several runs that failed for one reason. It unfolds into their lines.

import { countInputs, differenceText, hitBy, shareText, successText } from "../library/causes.js";
import { get } from "../library/api.js";
import { clone, part, show, write, writeTime } from "../library/dom.js";
import { board } from "../library/model.js";
import { causeAddress, comparisonWith } from "../library/router.js";
import { ago, clock, counted } from "../library/times.js";
import { usualOf } from "../library/usual.js";
import { runAllAgain } from "./again.js";

const COMPARED = 5; // failed runs, besides the newest, that must share a difference
const differences = new Map(); // by the ids of the runs

export class Incident {
  // `onFold(isOpen)` shows or hides the lines of its runs. `onStarted()` is called after they run again.
  constructor(key, onFold, onStarted) {
    const [workflow, node, cause] = JSON.parse(key);
    this.key = key;
    this.workflow = workflow;
    this.node = node;
    this.cause = cause;
    this.runs = [];
    this.root = clone("incident-template").firstElementChild;
    this.root.dataset.key = key;
    const title = part(this.root, "title");
    write(title, workflow);
    write(part(this.root, "where"), node === "" ? "" : `in ${node}`);
    write(part(this.root, "reason"), cause);
    const fold = part(this.root, "fold");
    fold.addEventListener("click", () => onFold(fold.getAttribute("aria-expanded") !== "true"));
    part(this.root, "run-all").addEventListener("click", async () => {
      if (await runAllAgain(workflow, this.runs.map(({ id }) => id))) onStarted();
    });
  }

  // Shows how many runs there are, the newest of them first.
  update(runs, isOpen) {
    this.runs = runs;
    const { root } = this;
    const count = counted(runs.length, "run");
    const inputs = countInputs(runs.map((run) => run.data.inputs));
    const distinct = inputs === null || inputs === runs.length ? "" : `, ${counted(inputs, "input")}`;
    write(part(root, "state"), `${runs.length} failed${distinct}`);
    part(root, "state").title = distinct === "" ? "" : "Some runs have the same inputs";
    part(root, "fold").setAttribute("aria-expanded", String(isOpen));
    part(root, "fold").setAttribute("aria-label", `The ${count} of ${this.workflow} that failed for this reason`);
    write(part(root, "hits"), hitBy(runs.map((run) => run.data.inputs)));
    part(root, "run-all").hidden = !runs.some((run) => run.data.has_inputs);
    part(root, "run-all").setAttribute("aria-label", `Run all again: ${this.workflow}`);
    this.tick();
  }

  // What changes with time, and what the history knows.
  tick() {
    const { root, runs, workflow, node, cause } = this;
    const [newest] = runs;
    const usual = usualOf(newest);
    const known = usual.causes.find((one) => one.cause === cause && one.failed_node === node);
    const ends = runs.map((run) => run.endedAt()).filter((moment) => moment !== null);
    const latest = Math.max(0, ...ends);
    const first = known?.incident.first ?? Math.min(...ends);
    const since = Number.isFinite(first) ? `Since ${clock(first)} (${ago(first)})` : "";
    const often = known === undefined ? "" : shareText(known.incident);
    const facts = [since, often].filter((text) => text !== "").join(", ");
    const success = usual.successes.find((one) => !runs.some((run) => run.id === one.execution_id));
    write(part(root, "since"), [facts === "" ? "" : `${facts}.`, successText(success, latest)].filter((text) => text !== "").join(" "));
    if (latest > 0) writeTime(part(root, "when"), latest, ago(latest));

    const title = part(root, "title");
    if (board.hasHistory) title.href = causeAddress({ workflow, failed_node: node, cause });
    part(root, "compare").hidden = success === undefined;
    if (success === undefined) return;
    part(root, "compare").href = comparisonWith(success.execution_id, newest);
    part(root, "compare").setAttribute("aria-label", `Compare with the last success: ${workflow}`);
    this.showDifference(runs.map((run) => run.id), success.execution_id);
  }

  showDifference(failed, success) {
    const place = part(this.root, "difference");
    differencesOf(failed, success).then((differences) => show(place, differenceText(differences) || null));
  }
}

// What the failed runs share, and the success does not. The viewer reads the success again for it, once.
export function differencesOf([newest, ...all], success) {
  const others = all.slice(0, COMPARED);
  const key = [newest, success, ...others].join(" ");
  if (!differences.has(key)) {
    const params = new URLSearchParams(others.map((id) => ["others", id]));
    differences.set(key, get(`api/executions/${newest}/differences/${success}?${params}`).catch(() => null));
  }
  return differences.get(key);
}
