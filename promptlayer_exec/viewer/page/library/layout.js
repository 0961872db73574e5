// @ts-check
// Where to draw the nodes and edges of a layered graph. The layers are given. This module orders
// each so that few edges cross, and straightens the edges. Edges over several layers go through
// points between the nodes.

const SWEEPS = 8;
const MOST_POINTS = 2000; // between the nodes, after which edges go straight
const MOST_EDGES = 1000; // from one layer to the next, to look for crossings

// `along` and `across` are the sizes of a node in the direction of the layers and across it.
// Returns positions of the nodes' centres, [along, across], and the points of each edge.
export function layOut(layers, edges, { along, across, gapAlong, gapAcross }) {
  const items = new Map(); // by name, or by edge and layer for a point between nodes
  const rows = layers.map((names, layer) =>
    names.map((name) => {
      const item = { name, layer, size: across, up: [], down: [], at: 0 };
      items.set(name, item);
      return item;
    }),
  );
  let points = 0;
  const routes = edges.map((edge) => {
    const route = connect(edge, items, rows, MOST_POINTS - points);
    points += route.length - 2;
    return route;
  });
  orderRows(rows);
  placeRows(rows, gapAcross);
  const least = Math.min(...rows.flat().map((item) => item.at - item.size / 2), Infinity);
  const positions = new Map();
  const pointOf = (item) => [
    item.layer * (along + gapAlong) + along / 2,
    item.at - (Number.isFinite(least) ? least : 0),
  ];
  for (const [name, item] of items) positions.set(name, pointOf(item));
  const most = Math.max(...rows.flat().map((item) => pointOf(item)[1] + item.size / 2), 0);
  return {
    positions,
    routes: routes.map((route) => route.map(pointOf)),
    length: Math.max(0, layers.length * (along + gapAlong) - gapAlong),
    breadth: most,
    layerOf: new Map([...items].map(([name, item]) => [name, item.layer])),
    rows: rows.map((row) => row.filter((item) => item.name !== null).map((item) => item.name)),
  };
}

function connect({ source, target }, items, rows, most) {
  const [from, to] = [items.get(source), items.get(target)];
  const route = [from];
  if (to.layer - from.layer - 1 > most) return [from, to];
  for (let layer = from.layer + 1; layer < to.layer; layer += 1) {
    const point = { name: null, layer, size: 16, up: [], down: [], at: 0 };
    rows[layer].push(point);
    route.push(point);
  }
  route.push(to);
  // Edges within a layer, or back, are part of a cycle, and do not order anything.
  if (to.layer > from.layer) {
    for (let index = 1; index < route.length; index += 1) {
      route[index - 1].down.push(route[index]);
      route[index].up.push(route[index - 1]);
    }
  }
  return route;
}

function orderRows(rows) {
  number(rows);
  const edges = rows.map((row) => row.reduce((sum, item) => sum + item.down.length, 0));
  if (Math.max(...edges, 0) > MOST_EDGES) return;
  let best = rows.map((row) => [...row]);
  let fewest = crossings(rows);
  for (let sweep = 0; sweep < SWEEPS && fewest > 0; sweep += 1) {
    const isDown = sweep % 2 === 0;
    for (const row of isDown ? rows : [...rows].reverse()) {
      const key = new Map(row.map((item) => [item, middle(isDown ? item.up : item.down, item)]));
      row.sort((one, other) => key.get(one) - key.get(other));
      row.forEach((item, index) => (item.index = index));
    }
    const found = crossings(rows);
    if (found < fewest) {
      fewest = found;
      best = rows.map((row) => [...row]);
    }
  }
  best.forEach((row, layer) => (rows[layer] = row));
  number(rows);
}

function number(rows) {
  for (const row of rows) row.forEach((item, index) => (item.index = index));
}

function middle(neighbours, item) {
  if (neighbours.length === 0) return item.index;
  return neighbours.reduce((sum, one) => sum + one.index, 0) / neighbours.length;
}

function crossings(rows) {
  let count = 0;
  for (const row of rows) {
    const edges = row.flatMap((item) => item.down.map((other) => [item.index, other.index]));
    for (let one = 0; one < edges.length; one += 1) {
      for (let other = one + 1; other < edges.length; other += 1) {
        const [a, b] = [edges[one], edges[other]];
        if ((a[0] - b[0]) * (a[1] - b[1]) < 0) count += 1;
      }
    }
  }
  return count;
}

// Each item is drawn to the middle of its neighbours, as far as the order and the gaps allow.
function placeRows(rows, gap) {
  for (const row of rows) settle(row, row.map(() => 0), gap);
  for (let sweep = 0; sweep < SWEEPS * 2; sweep += 1) {
    const isDown = sweep % 2 === 0;
    for (const row of isDown ? rows : [...rows].reverse()) {
      const wanted = row.map((item) => {
        const both = sweep < SWEEPS ? (isDown ? item.up : item.down) : [...item.up, ...item.down];
        if (both.length === 0) return item.at;
        return both.reduce((sum, one) => sum + one.at, 0) / both.length;
      });
      settle(row, wanted, gap);
    }
  }
}

// The positions nearest to those wanted that keep the order and the gaps: isotonic regression.
function settle(row, wanted, gap) {
  const offsets = [];
  row.forEach((item, index) => {
    const before = row[index - 1];
    offsets.push(index === 0 ? 0 : offsets[index - 1] + (before.size + item.size) / 2 + gap);
  });
  const blocks = [];
  wanted.forEach((value, index) => {
    let block = { sum: value - offsets[index], count: 1 };
    while (blocks.length > 0 && blocks.at(-1).sum / blocks.at(-1).count > block.sum / block.count) {
      const before = blocks.pop();
      block = { sum: before.sum + block.sum, count: before.count + block.count };
    }
    blocks.push(block);
  });
  let index = 0;
  for (const { sum, count } of blocks) {
    for (let step = 0; step < count; step += 1, index += 1) {
      row[index].at = sum / count + offsets[index];
    }
  }
}
