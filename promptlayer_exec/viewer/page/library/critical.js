// @ts-check
// The critical path: the nodes that the execution waited for, one after the other.

import { isFinal, spanOf } from "./model.js";

const SLACK = 0.01; // seconds: one poll sees one node finish and the next one begin

// Starts at the node that finished last, and goes back to the one that it waited for longest.
// Without `dependencies` (name -> names), that is the one that finished just before it began. Nodes
// that were too quick for a poll to see them running are part of the path if it leads through them.
export function criticalPath(nodes, dependencies, time) {
  const spans = new Map();
  for (const node of nodes.values()) {
    const span = spanOf(node, time);
    if (span?.isTimed) spans.set(node.name, span);
  }
  const last = latest([...spans.keys()], spans);
  const path = last === null ? [] : [last];
  while (path.length > 0) {
    const ways = dependencies === null ? endedBefore(path[0], spans) : waysTo(path[0], spans, dependencies);
    const next = latest([...ways.keys()], spans);
    if (next === null || path.includes(next)) break;
    path.unshift(next, ...ways.get(next).filter((name) => isQuick(nodes.get(name))));
  }
  return dependencies === null ? path : [...path, ...quickAfter(last, nodes, spans, dependencies)];
}

const isQuick = (node) => node !== undefined && isFinal(node) && node.status !== "SKIPPED";

// The nodes after the last one that a poll saw running.
function quickAfter(last, nodes, spans, dependencies) {
  const found = [];
  const follows = (node, name) => (dependencies.get(node.name) ?? []).includes(name);
  const isNext = (node, here) => follows(node, here) && isQuick(node) && !spans.has(node.name) && !found.includes(node.name);
  let here = last;
  while (here !== undefined) {
    const before = here;
    here = [...nodes.values()].find((node) => isNext(node, before))?.name;
    if (here !== undefined) found.push(here);
  }
  return found;
}

function endedBefore(name, spans) {
  const { start } = spans.get(name);
  const found = [...spans].filter(([, one]) => one.start < start && one.end <= start + SLACK);
  return new Map(found.map(([one]) => [one, []]));
}

// The nodes that one waited for and that were seen running, each with those between the two.
function waysTo(name, spans, dependencies) {
  const found = new Map();
  const seen = new Set([name]);
  const open = (dependencies.get(name) ?? []).map((one) => [one, []]);
  while (open.length > 0) {
    const [one, between] = open.shift();
    if (seen.has(one)) continue;
    seen.add(one);
    if (spans.has(one)) found.set(one, between);
    else open.push(...(dependencies.get(one) ?? []).map((next) => [next, [one, ...between]]));
  }
  return found;
}

function latest(names, spans) {
  return names.reduce(
    (best, one) => (best === null || spans.get(one).end > spans.get(best).end ? one : best),
    null,
  );
}
