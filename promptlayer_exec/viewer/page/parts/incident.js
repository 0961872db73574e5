// @ts-check
// The line of a cause: several runs that failed for one reason. It unfolds into their lines.

import { differenceText, hitBy } from "../library/causes.js";
import { get } from "../library/api.js";
import { clone, part, show, write, writeTime } from "../library/dom.js";
import { board } from "../library/model.js";
import { causeAddress, comparisonOf } from "../library/router.js";
import { ago, clock, counted } from "../library/times.js";
import { usualOf } from "../library/usual.js";
import { runAllAgain } from "./again.js";

const differences = new Map(); // by the ids of a failed run and a success: what differs first

export class Incident {
  // `onFold(isOpen)` shows or hides the lines of its runs.
  constructor(key, onFold) {
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
    part(this.root, "run-all").addEventListener("click", () => runAllAgain(workflow, this.runs.map(contentOf)));
  }

  // Shows how many runs there are, the newest of them first.
  update(runs, isOpen) {
    this.runs = runs;
    const { root } = this;
    const count = counted(runs.length, "run");
    write(part(root, "state"), `${runs.length} failed`);
    part(root, "fold").setAttribute("aria-expanded", String(isOpen));
    part(root, "fold").setAttribute("aria-label", `The ${count} of ${this.workflow} that failed for this reason`);
    write(part(root, "hits"), hitBy(runs.map((run) => run.data.inputs)));
    part(root, "run-all").hidden = !runs.some((run) => run.data.has_inputs);
    part(root, "run-all").setAttribute("aria-label", `Run all ${runs.length} again: ${this.workflow}`);
    this.tick();
  }

  // What changes with time, and what the history knows.
  tick() {
    const { root, runs, workflow, node, cause } = this;
    const [newest] = runs;
    const usual = usualOf(newest);
    const known = usual.causes.find((one) => one.cause === cause && one.failed_node === node);
    const ends = runs.map((run) => run.endedAt()).filter((moment) => moment !== null);
    const first = Math.min(...ends, known?.first ?? Infinity);
    const since = Number.isFinite(first) ? `Since ${clock(first)} (${ago(first)})` : "";
    const often = known === undefined ? "" : `${known.count} of the latest ${counted(usual.total, "run")} failed for this reason`;
    write(part(root, "since"), [since, often].filter((text) => text !== "").join(": ") + (since || often ? "." : ""));
    const latest = Math.max(0, ...ends);
    if (latest > 0) writeTime(part(root, "when"), latest, ago(latest));

    const title = part(root, "title");
    if (board.hasHistory) title.href = causeAddress({ workflow, failed_node: node, cause });
    const success = usual.successes.find((one) => !runs.some((run) => run.id === one.execution_id));
    part(root, "compare").hidden = success === undefined;
    if (success === undefined) return;
    part(root, "compare").href = comparisonOf(newest.id, success.execution_id);
    part(root, "compare").setAttribute("aria-label", `Compare with the last success: ${workflow}`);
    this.showDifference(newest.id, success.execution_id);
  }

  showDifference(failed, success) {
    const place = part(this.root, "difference");
    differenceOf(failed, success).then((difference) => {
      const text = differenceText(difference);
      show(place, text === "" ? null : `Differs first from the last success in ${text}`);
    });
  }
}

// The viewer reads the success again for it, once.
export function differenceOf(failed, success) {
  const key = `${failed} ${success}`;
  if (!differences.has(key)) {
    differences.set(key, get(`api/executions/${failed}/difference/${success}`).catch(() => null));
  }
  return differences.get(key);
}

function contentOf({ id, data: { label, version, metadata, has_inputs } }) {
  return { path: has_inputs ? `api/executions/${id}/inputs` : null, label, version, metadata };
}
