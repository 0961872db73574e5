// @ts-check
// Which runs failed for one cause, and whom that hits.

const FEW = 3; // inputs, and values of each, to name
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

// The inputs of a run on one line, or "" if they are not known.
export function shortInputs(inputs) {
  return Object.entries(inputs ?? {})
    .slice(0, 4)
    .map(([name, value]) => `${name}: ${cut(value)}`)
    .join(" · ");
}

// Whom a cause hits: the inputs in which its runs differ, and those that all of them share.
// `all` has the inputs of each run, or null.
export function hitBy(all) {
  const known = all.filter((inputs) => inputs !== null);
  const names = [...new Set(known.flatMap((inputs) => Object.keys(inputs)))];
  const values = (name) => [...new Set(known.filter((one) => name in one).map((one) => one[name]))];
  const differing = names.filter((name) => values(name).length > 1).slice(0, FEW);
  const isShared = (name) => values(name).length === 1 && known.every((one) => name in one);
  const shared = known.length > 1 ? names.filter(isShared).slice(0, FEW) : [];

  const hit = differing.map((name) => {
    const distinct = values(name);
    const rest = distinct.length - FEW;
    return `${name}: ${distinct.slice(0, FEW).map(cut).join(", ")}${rest > 0 ? ` and ${rest} more` : ""}`;
  });
  const words = hit.length > 0 ? [`Hits ${hit.join("; ")}.`] : [];
  if (shared.length > 0) {
    const every = shared.map((name) => `${name}: ${cut(known[0][name])}`);
    words.push(`All have ${every.join(", ")}.`);
  }
  return words.join(" ");
}

// "seats 0 ← 12" in a node, or "" if nothing differs.
export function differenceText(difference) {
  if (difference === null) return "";
  const { node, path, now, before } = difference;
  return `${node}: ${path === "" ? "" : `${path} `}${cut(now)} ← ${cut(before)}`;
}
