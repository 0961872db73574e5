// @ts-check
// The critical path: the nodes that the execution waited for, one after the other.

import { spanOf } from "./model.js";

const SLACK = 0.01; // seconds: one poll sees the end of a node and the start of the next

// Starts at the node that ended last, and goes back to the one that it waited for longest.
// Without `dependencies` (name -> names), that is the one that ended just before it began.
export function criticalPath(nodes, dependencies, time) {
  const spans = new Map();
  for (const node of nodes.values()) {
    const span = spanOf(node, time);
    if (span?.isTimed) spans.set(node.name, span);
  }
  const path = [];
  let next = latest([...spans.keys()], spans);
  while (next !== null && !path.includes(next)) {
    path.unshift(next);
    next = latest(before(next, spans, dependencies), spans);
  }
  return path;
}

// The nodes that one waited for: through those that were not seen running, to those that were.
function before(name, spans, dependencies) {
  if (dependencies === null) {
    const { start } = spans.get(name);
    const isBefore = (one) => one.start < start && one.end <= start + SLACK;
    return [...spans.keys()].filter((one) => isBefore(spans.get(one)));
  }
  const found = new Set();
  const open = [...(dependencies.get(name) ?? [])];
  const seen = new Set([name]);
  while (open.length > 0) {
    const one = open.pop();
    if (seen.has(one)) continue;
    seen.add(one);
    if (spans.has(one)) found.add(one);
    else open.push(...(dependencies.get(one) ?? []));
  }
  return [...found];
}

function latest(names, spans) {
  return names.reduce(
    (best, one) => (best === null || spans.get(one).end > spans.get(best).end ? one : best),
    null,
  );
}
