// @ts-check
// Which runs failed for one cause, and whom that hits.

import { ago, clock, counted, universal } from "./times.js";

const FEW = 3; // inputs, and values of each, to name
const MANY = 10; // executions to name in a summary
const MOST = 20; // values of each input in a summary
const WHOLE = 12; // inputs, of which the viewer sends no more
const LONG = 40; // characters of an input on a line

// A cause is a workflow, the node that failed, and the reason without what differs from run to run.
// Returns it as text, or null if the run did not fail or nobody knows its workflow.
export function keyOf({ data: { state, workflow, failed_node: node, cause } }) {
  if (state !== "failed" || workflow === null || cause === null) return null;
  return JSON.stringify([workflow, node ?? "", cause]);
}

// The runs by cause, in their order, of causes with at least two. The largest cause comes first.
export function causesOf(runs) {
  const found = new Map();
  for (const run of runs) {
    const key = keyOf(run);
    if (key !== null) found.set(key, [...(found.get(key) ?? []), run]);
  }
  const several = [...found].filter(([, members]) => members.length > 1);
  return new Map(several.sort(([, one], [, other]) => other.length - one.length));
}

const cut = (text) => (text.length > LONG ? `${text.slice(0, LONG)}…` : text);

const stopped = (text) => (/[.!?…]$/.test(text) ? text : `${text}.`);
// A value in a sentence, without its own full stop.
const inList = (text) => cut(text).replace(/\.$/, "");

// The inputs of a run on one line, or "" if they are not known.
export function shortInputs(inputs) {
  return Object.entries(inputs ?? {})
    .slice(0, 4)
    .map(([name, value]) => `${name}: ${cut(value)}`)
    .join(" · ");
}

// Whom a cause hits: the inputs in which its runs differ, and those that all of them share.
// `all` has the inputs of each run, or null, and `few` is how many values of each to name.
export function hitBy(all, few = FEW) {
  const known = all.filter((inputs) => inputs !== null);
  const names = [...new Set(known.flatMap((inputs) => Object.keys(inputs)))];
  const values = (name) => [...new Set(known.filter((one) => name in one).map((one) => one[name]))];
  const differing = names.filter((name) => values(name).length > 1).slice(0, FEW);
  const isShared = (name) => values(name).length === 1 && known.every((one) => name in one);
  const shared = known.length > 1 ? names.filter(isShared).slice(0, FEW) : [];

  const hit = differing.map((name) => {
    const distinct = values(name);
    const rest = distinct.length - few;
    return `${name}: ${distinct.slice(0, few).map(inList).join(", ")}${rest > 0 ? ` and ${rest} more` : ""}`;
  });
  const words = hit.length > 0 ? [stopped(`Hits ${hit.join("; ")}`)] : [];
  if (shared.length > 0) {
    const every = shared.map((name) => `${name}: ${inList(known[0][name])}`);
    words.push(stopped(`All have ${every.join(", ")}`));
  }
  return words.join(" ");
}

// How many different inputs these are, or null if some are not known as a whole.
export function countInputs(all) {
  const isWhole = (inputs) =>
    inputs !== null && Object.keys(inputs).length < WHOLE && !Object.values(inputs).some((value) => value.endsWith("…"));
  return all.every(isWhole) ? new Set(all.map((inputs) => JSON.stringify(inputs))).size : null;
}

// What failed runs share, and the last success does not: "version 2 ← 1; load customer: seats 0 ← 12".
// "" if nothing differs.
export function differenceText(differences) {
  const text = (value) => (value === null ? "(none)" : cut(value));
  const all = (differences ?? []).map(({ where, now, before }) => `${where} ${text(now)} ← ${text(before)}`);
  return all.length === 0 ? "" : `Differs from the last success in ${all.join("; ")}`;
}

// "all 9 runs failed for this reason", "3 of 12 runs failed for this reason", of those since it began.
export function shareText({ count, total }) {
  const runs = count === total ? `all ${counted(total, "run")}` : `${count} of ${counted(total, "run")}`;
  return `${count === 1 && total === 1 ? "the only run" : runs} failed for this reason`;
}

// "It also happened once before on Nov 29, which was another incident." `write` writes a moment.
export function earlierText(earlier, write = clock) {
  if (earlier.length === 0) return "";
  const often = earlier.length === 1 ? "once before" : `${earlier.length} times before, last`;
  return `It also happened ${often} on ${write(earlier[0])}, which was another incident.`;
}

const isLocal = (address) => ["127.0.0.1", "localhost", "[::1]"].includes(new URL(address).hostname);

// A paragraph for a colleague, who may read it elsewhere and later. `success` is the last one, if known.
export function summaryText(page, success, difference, address) {
  const { workflow, failed_node: node, cause, first, latest, earlier, execution_ids: ids, problem, runs } = page;
  const reason = node === "" ? problem : problem.replace(`${node}: `, ""); // with what differs from run to run
  const where = node === "" ? "" : ` in ${node}`;
  const rest = ids.length - MANY;
  const words = [
    stopped(`${workflow} fails${where}: ${cause}`),
    `From ${universal(first)} to ${universal(latest)}, ${shareText(page)}.`,
    earlierText(earlier, universal),
    success === undefined ? "" : `${successWords(success, latest)} execution ${success.execution_id} at ${universal(success.ended)}.`,
    hitBy(runs.filter((run) => run.began >= first).map((run) => run.inputs), MOST),
    difference === "" ? "" : stopped(difference),
    reason === cause ? "" : stopped(`The whole error of execution ${ids[0]}: ${reason}`),
    `Failed executions: ${ids.slice(0, MANY).join(", ")}${rest > 0 ? ` and ${rest} more` : ""}.`,
    isLocal(address) ? `${address} (on the machine of the viewer only)` : address,
  ];
  return words.filter((text) => text !== "").join(" ");
}

// "The last success was 2 hours ago.", or that a run succeeded after the latest failure.
export function successText(success, latest) {
  if (success === undefined) return "";
  const words = success.ended > latest ? "A later run succeeded" : "The last success was";
  return `${words} ${ago(success.ended)}.`;
}

const successWords = (success, latest) => (success.ended > latest ? "A later run succeeded:" : "The last success was");
