// @ts-check
// What is usual for a workflow, from the history. The page requests it once, and again after each
// of its runs.

import { get } from "./api.js";
import { board } from "./model.js";
import { NOTHING_USUAL } from "./sentence.js";

const PAUSE = 500; // milliseconds in which the viewer records a finished run

const known = new Map(); // by workflow
const awaited = new Set(); // workflows to request again soon
/** @type {() => void} */
let onLoaded = () => {};

export function whenUsualIsKnown(callback) {
  onLoaded = callback;
}

// Returns { duration, nodes: { name: seconds }, successes: [{ execution_id, ended }, …], failed, total,
// causes: [{ failed_node, cause, count, first }, …] }: the latter are of the latest runs.
export function usualOf(run) {
  const { workflow } = run.data;
  if (workflow === null || !board.hasHistory) return NOTHING_USUAL;
  if (!known.has(workflow)) {
    known.set(workflow, NOTHING_USUAL);
    load(workflow);
  }
  return known.get(workflow);
}

export function usualMayChange(run) {
  const { workflow } = run.data;
  if (!known.has(workflow) || awaited.has(workflow)) return;
  awaited.add(workflow);
  setTimeout(() => {
    awaited.delete(workflow);
    load(workflow);
  }, PAUSE);
}

async function load(workflow) {
  try {
    known.set(workflow, await get(`api/history/usual?${new URLSearchParams({ workflow })}`));
    onLoaded();
  } catch {
    known.delete(workflow);
  }
}
