// @ts-check
// Like nodes of a large graph as one box, such as the shards of a stage.

const LARGE = 80; // nodes of a graph, from which like ones fold
const FEWEST = 4; // like nodes that are worth a box

// What like nodes of a layer have in common: their names without the last number, or without any
// number, or else all that they depend on and all that depends on them.
const LIKENESSES = [
  (name) => name.replace(/\d+(?=\D*$)/, "#"),
  (name) => name.replace(/\d+/g, "#"),
  (name, { before, after }) => JSON.stringify([before.sort(), after.sort()]),
];

/** @typedef {{ key: string, names: string[], label: string }} Box */

// Returns what to draw: { layers, edges, boxes }. The first two have keys of boxes in place of names,
// and an edge has the `pairs` of nodes that it connects. Boxes whose keys are in `opened` stay apart.
export function fold({ layers, nodes, edges }, opened = new Set()) {
  const neighbours = new Map(Object.keys(nodes).map((name) => [name, { before: [], after: [] }]));
  for (const { source, target } of edges) {
    neighbours.get(source).after.push(target);
    neighbours.get(target).before.push(source);
  }

  /** @type {Map<string, Box>} */
  const boxes = new Map();
  const boxOf = new Map(); // by name: the key
  const isLarge = neighbours.size >= LARGE;
  for (const layer of layers) {
    const groups = isLarge ? groupsOf(layer, nodes, neighbours) : [];
    for (const names of [...groups, ...layer.map((name) => [name])]) {
      const key = names.length === 1 ? names[0] : JSON.stringify(names);
      if (boxOf.has(names[0]) || opened.has(key)) continue;
      boxes.set(key, { key, names, label: names.length === 1 ? key : labelOf(names) });
      for (const name of names) boxOf.set(name, key);
    }
  }

  const merged = new Map();
  for (const { source, target, conditional } of edges) {
    const [from, to] = [boxOf.get(source), boxOf.get(target)];
    if (from === to && boxes.get(from).names.length > 1) continue;
    const key = JSON.stringify([from, to]);
    const edge = merged.get(key) ?? { source: from, target: to, conditional: false, pairs: [] };
    edge.conditional ||= conditional;
    edge.pairs.push([source, target]);
    merged.set(key, edge);
  }
  const folded = layers.map((layer) => [...new Set(layer.map((name) => boxOf.get(name)))]);
  return { layers: folded, edges: [...merged.values()], boxes };
}

// The groups of like nodes in a layer, each as a list of names in their order.
function groupsOf(layer, nodes, neighbours) {
  const found = [];
  let rest = layer;
  for (const likeness of LIKENESSES) {
    const groups = new Map();
    for (const name of rest) {
      const { type, is_output } = nodes[name];
      const key = JSON.stringify([type, is_output, likeness(name, neighbours.get(name))]);
      groups.set(key, [...(groups.get(key) ?? []), name]);
    }
    found.push(...[...groups.values()].filter((names) => names.length >= FEWEST));
    const grouped = new Set(found.flat());
    rest = rest.filter((name) => !grouped.has(name));
  }
  return found;
}

// "stage 2 shard …": what the names share at their start and end, up to the number that differs.
function labelOf(names) {
  const [first] = names;
  const shared = (at) => {
    let length = 0;
    while (length < first.length && names.every((name) => name.at(at(length)) === first.at(at(length)))) length += 1;
    return length;
  };
  const start = first.slice(0, shared((index) => index)).replace(/\d+$/, "");
  const end = first.slice(first.length - shared((index) => -1 - index)).replace(/^\d+/, "");
  if (`${start}${end}`.trim().length < 3) return `${first} and ${names.length - 1} others`;
  return start.length + end.length >= first.length ? start.trim() : `${start}…${end}`;
}
