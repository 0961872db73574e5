// @ts-check
// The graph of a workflow as SVG: nodes in layers, live statuses, and the edges that the run took.
// Scrolling and dragging pan it. Its buttons, Ctrl and the wheel, or + and - zoom it. In a large
// graph, like nodes are one box, which unfolds.

import { draw, makeSvg, write } from "../library/dom.js";
import { fold } from "../library/fold.js";
import { layOut } from "../library/layout.js";
import { isFinal, spanOf, statusOf, wordOf } from "../library/model.js";
import { counted, duration } from "../library/times.js";

const WIDTH = 176;
const HEIGHT = 54;
const MARGIN = 14;
const NARROW = 640;
const READABLE = 0.75; // the first scale of a graph that does not fit
const SMALL = 0.62; // the smallest first scale that shows all of a graph
const LEAST = 0.1;
const FILLED = 0.45; // the scale below which nobody reads a text: a box is its status
const NAME_WIDTH = WIDTH - 44;
const BAR_WIDTH = WIDTH - 16;
// What a folded box shows as its own status: the first of these that one of its nodes has.
const LOOKS = ["failed", "unknown", "running", "queued", "success", "skipped"];

const canvas = document.createElement("canvas").getContext("2d");

export class Graph {
  // `onFold()` is called after boxes were folded or unfolded.
  constructor(container, onSelect, onFold) {
    this.container = container;
    this.onFold = onFold;
    this.onSelect = onSelect;
    this.nodes = new Map(); // by the key of a box, which of a single node is its name
    this.boxOf = new Map(); // by the name of a node: the key
    this.opened = new Set(); // keys of boxes that somebody has unfolded
    this.edges = [];
    this.critical = [];
    this.scale = 1;
    this.selected = null;
    this.followed = null; // the node to keep in sight, until somebody moves the graph
    this.isMoved = false;
    this.listen();
  }

  listen() {
    const { container } = this;
    new ResizeObserver(() => this.onResize()).observe(container);
    for (const kind of ["pointerdown", "wheel", "keydown"]) {
      container.addEventListener(kind, () => (this.isMoved = true), { passive: true });
    }
    container.addEventListener("keydown", (event) => this.onKey(event));
    container.addEventListener(
      "wheel",
      (event) => {
        if (!event.ctrlKey && !event.metaKey) return;
        event.preventDefault();
        this.zoom(event.deltaY < 0 ? 1.1 : 1 / 1.1, event);
      },
      { passive: false },
    );
    // Touch screens scroll, and a mouse drags.
    container.addEventListener("pointerdown", (event) => {
      if (event.pointerType !== "mouse" || event.button !== 0) return;
      const from = [event.clientX + container.scrollLeft, event.clientY + container.scrollTop];
      this.isDragged = false;
      const move = (to) => {
        const [x, y] = [from[0] - to.clientX, from[1] - to.clientY];
        if (Math.abs(x - container.scrollLeft) + Math.abs(y - container.scrollTop) > 4) {
          this.isDragged = true;
          container.classList.add("dragging");
        }
        if (this.isDragged) container.scrollTo(x, y);
      };
      const end = () => {
        removeEventListener("pointermove", move);
        container.classList.remove("dragging");
      };
      addEventListener("pointermove", move);
      addEventListener("pointerup", end, { once: true });
    });
  }

  draw(definition) {
    const { nodes } = definition;
    const { layers, edges, boxes } = fold(definition, this.opened);
    this.definition = definition;
    this.isVertical = this.container.clientWidth < NARROW;
    const [along, across] = this.isVertical ? [HEIGHT, WIDTH] : [WIDTH, HEIGHT];
    const sizes = { along, across, gapAlong: this.isVertical ? 38 : 48, gapAcross: 14 };
    this.layout = layOut(layers, edges, sizes);
    this.nodes.clear();
    this.boxOf.clear();
    const { length, breadth } = this.layout;
    this.size = this.flip([length, breadth]).map((one) => one + 2 * MARGIN);
    this.svg = makeSvg("svg", {
      role: "group",
      "aria-label": "Graph of the workflow; the arrow keys follow its edges",
      viewBox: `${-MARGIN} ${-MARGIN} ${this.size[0]} ${this.size[1]}`,
    });
    this.edges = edges.map((edge, index) => this.makeEdge(edge, this.layout.routes[index]));
    this.svg.append(...this.edges.map((edge) => edge.element));
    for (const key of this.layout.rows.flat()) {
      const box = boxes.get(key);
      for (const name of box.names) this.boxOf.set(name, key);
      this.makeNode(box, nodes[box.names[0]]);
    }
    for (const edge of edges) {
      this.nodes.get(edge.source).after.push(edge.target);
      this.nodes.get(edge.target).before.push(edge.source);
    }
    this.container.replaceChildren(this.svg);
    this.focusable = this.layout.rows.flat()[0];
    this.nodes.get(this.focusable)?.element.setAttribute("tabindex", "0");
    this.isFitted = true;
    this.width = this.container.clientWidth;
    this.resize(this.readable());
    this.container.scrollTo(0, 0);
    if (this.boxOf.has(this.followed)) this.reveal(this.boxOf.get(this.followed));
  }

  // Whether boxes are folded, or could be again.
  get hasFolded() {
    return [...this.nodes.values()].some(({ names }) => names.length > 1);
  }

  // Draws the nodes of a box apart, or with null, those of all boxes.
  unfold(key) {
    const folded = [...this.nodes].filter(([, { names }]) => names.length > 1);
    for (const [one] of folded) if (key === null || one === key) this.opened.add(one);
    this.redraw();
  }

  foldAgain() {
    this.opened.clear();
    this.redraw();
  }

  redraw() {
    const critical = this.critical;
    this.draw(this.definition);
    if (this.run !== undefined) this.update(this.run);
    this.markCritical(critical);
    this.select(this.selected);
    this.onFold();
  }

  // Keeps a node in sight: the one that runs, or that failed.
  follow(name) {
    if (name === this.followed || !this.boxOf.has(name)) return;
    this.followed = name;
    if (!this.isMoved && this.selected === null) this.reveal(this.boxOf.get(name));
  }

  // If somebody turns or widens the window, the graph fits it again, unless somebody has zoomed.
  onResize() {
    const width = this.container.clientWidth;
    if (this.definition === undefined || width === 0 || width === this.width) return;
    this.width = width;
    if (this.isVertical !== width < NARROW) {
      this.redraw();
    } else if (this.isFitted) {
      this.resize(this.readable());
      if (this.boxOf.has(this.selected)) this.reveal(this.boxOf.get(this.selected));
    }
  }

  flip([along, across]) {
    return this.isVertical ? [across, along] : [along, across];
  }

  makeNode({ key, names, label }, { type, is_output }) {
    const [x, y] = this.flip(this.layout.positions.get(key));
    const isFolded = names.length > 1;
    const left = -WIDTH / 2 + 34;
    const hasThird = type || isFolded;
    const icon = makeSvg("use", { x: -WIDTH / 2 + 10, y: -8, width: 16, height: 16 });
    const title = makeSvg("text", { class: "gname", x: left, y: hasThird ? -9 : -3 }, shortened(label));
    const state = makeSvg("text", { class: "gstate", x: left, y: hasThird ? 6 : 14 });
    const kind = makeSvg("text", { class: "gstate gtype", x: left, y: 20 }, wordsOf(type));
    const frame = { x: -WIDTH / 2, y: -HEIGHT / 2, width: WIDTH, height: HEIGHT, rx: 8 };
    const element = makeSvg(
      "g",
      {
        class: `gnode${is_output ? " output" : ""}${isFolded ? " folded" : ""}`,
        role: "button",
        tabindex: "-1",
        "data-node": key,
        "data-status": "",
        "aria-expanded": isFolded ? "false" : null,
        transform: `translate(${x} ${y})`,
      },
      makeSvg("title", {}, titleOf(names, type)),
      ...(isFolded ? [makeSvg("rect", { ...frame, class: "behind", x: frame.x + 4, y: frame.y + 4 })] : []),
      makeSvg("rect", { ...frame, class: "box" }),
      icon,
      title,
      state,
      kind,
    );
    const bar = isFolded ? LOOKS.map((look) => makeSvg("rect", { class: "share", "data-look": look, y: HEIGHT / 2 - 5, height: 4 })) : [];
    element.append(...bar);
    element.addEventListener("click", () => {
      if (!this.isDragged) this.choose(key);
    });
    element.addEventListener("focus", () => this.moveTabStop(key));
    element.addEventListener("pointerenter", () => this.highlight(key));
    element.addEventListener("pointerleave", () => this.highlight(this.boxOf.get(this.selected) ?? null));
    this.nodes.set(key, { element, icon, state, kind, bar, names, label, before: [], after: [], status: null });
    this.svg.append(element);
  }

  // Selects a node, or unfolds a box and goes to the first of its nodes that failed or runs.
  choose(key) {
    const { names } = this.nodes.get(key);
    if (names.length === 1) return this.onSelect(key);
    const statuses = ["FAILED", "RUNNING"];
    const wanted = statuses.map((status) => names.find((name) => this.run?.nodes.get(name)?.status === status));
    this.unfold(key);
    const first = wanted.find((name) => name !== undefined) ?? names[0];
    this.reveal(first);
    this.nodes.get(first).element.focus({ preventScroll: true });
  }

  makeEdge(edge, points) {
    const path = this.pathOf(points);
    const parts = [makeSvg("path", { class: "edge", d: path.text })];
    if (edge.conditional) {
      const [x, y] = path.middle;
      const diamond = `M${x} ${y - 6}l6 6-6 6-6-6z`;
      parts.push(
        makeSvg("path", { class: "diamond", d: diamond }, makeSvg("title", {}, "Conditional")),
      );
    }
    const element = makeSvg("g", {
      class: edge.conditional ? "gedge conditional" : "gedge",
      "data-source": edge.source,
      "data-target": edge.target,
    });
    element.append(...parts);
    return { ...edge, element, path: parts[0] };
  }

  // From one node's far side to the near side of the next, curved in between.
  pathOf(points) {
    const half = (this.isVertical ? HEIGHT : WIDTH) / 2;
    const ends = points.flatMap(([along, across], index) => {
      if (index === 0) return [[along + half, across]];
      if (index === points.length - 1) return [[along - half, across]];
      return [[along - half, across], [along + half, across]]; // straight past the nodes beside it
    });
    const isBack = ends.at(-1)[0] <= ends[0][0];
    if (isBack) ends.splice(1, 0, [ends[0][0] + 24, (ends[0][1] + ends.at(-1)[1]) / 2 + 36]);
    const place = (point) => this.flip(point).map((one) => Number(one.toFixed(1))).join(" ");
    let text = `M${place(ends[0])}`;
    for (let index = 1; index < ends.length; index += 1) {
      const [from, to] = [ends[index - 1], ends[index]];
      const turn = (from[0] + to[0]) / 2;
      text += `C${place([turn, from[1]])} ${place([turn, to[1]])} ${place(to)}`;
    }
    const at = Math.floor((ends.length - 1) / 2);
    const [one, other] = [ends[at], ends[at + 1]];
    return { text, middle: this.flip([(one[0] + other[0]) / 2, (one[1] + other[1]) / 2]) };
  }

  // Shows the statuses of some nodes, or of all.
  update(run, names = null) {
    this.run = run;
    const time = run.now();
    const keys = names === null ? this.nodes.keys() : new Set(names.map((name) => this.boxOf.get(name)));
    for (const key of keys) {
      const node = this.nodes.get(key);
      if (node) this.showBox(key, node, run, time);
    }
    for (const edge of this.edges) this.showEdge(edge, run);
  }

  showBox(key, node, run, time) {
    if (node.names.length === 1) this.showStatus(key, node, run.nodes.get(key), time);
    else this.showFolded(node, run);
  }

  showStatus(name, node, known, time) {
    const { element } = node;
    const status = known === undefined ? "" : known.status;
    const look = known === undefined ? "queued" : statusOf(known);
    const span = known === undefined ? null : spanOf(known, time);
    const text = known === undefined ? "Not in this execution" : wordOf(known);
    node.isRunning = known !== undefined && span?.isTimed && !isFinal(known);
    if (element.dataset.status !== status || node.status === null) {
      element.dataset.status = status;
      element.dataset.look = known === undefined ? "absent" : look;
      draw(node.icon, look);
    }
    node.status = status;
    const time_ = span?.isTimed ? ` · ${duration(Math.max(0, span.end - span.start), node.isRunning)}` : "";
    write(node.state, text + time_);
    const label = `${name}: ${text}${node.isRunning ? "" : time_}`;
    if (element.getAttribute("aria-label") !== label) element.setAttribute("aria-label", label);
  }

  // How many nodes of a box are of which status, and the first that failed.
  showFolded({ element, icon, state, kind, bar, names, label }, run) {
    const counts = Object.fromEntries(LOOKS.map((look) => [look, 0]));
    for (const name of names) {
      const node = run.nodes.get(name);
      counts[node === undefined ? "queued" : statusOf(node)] += 1;
    }
    const look = LOOKS.find((one) => counts[one] > 0);
    element.dataset.look = look;
    element.dataset.status = look.toUpperCase();
    draw(icon, look);
    const all = counted(names.length, "node");
    const notable = look === "success" && counts.skipped > 0 ? "skipped" : look;
    const word = notable === "success" ? "succeeded" : notable;
    write(state, counts[notable] === names.length ? `${all} ${word}` : `${all}, ${counts[notable]} ${word}`);
    const failed = names.find((name) => run.nodes.get(name)?.status === "FAILED");
    if (failed !== undefined) write(kind, shortened(failed));
    const parts = LOOKS.filter((one) => counts[one] > 0).map((one) => `${counts[one]} ${one === "success" ? "succeeded" : one}`);
    const text = `${label}: ${all}, ${parts.join(", ")}. Unfold`;
    if (element.getAttribute("aria-label") !== text) element.setAttribute("aria-label", text);

    let at = -BAR_WIDTH / 2;
    LOOKS.forEach((one, index) => {
      const width = (BAR_WIDTH * counts[one]) / names.length;
      bar[index].setAttribute("x", at.toFixed(1));
      bar[index].setAttribute("width", width.toFixed(1));
      at += width;
    });
  }

  // How long nodes have been running.
  tick(run) {
    const time = run.now();
    for (const [key, node] of this.nodes) {
      if (node.isRunning) this.showStatus(key, node, run.nodes.get(key), time);
    }
  }

  // An edge between boxes was taken if one between their nodes was.
  showEdge({ pairs, path, element }, run) {
    const states = new Set(pairs.map((pair) => stateOfEdge(pair, run)));
    const state = ["taken", "pending", "skipped"].find((one) => states.has(one));
    if (path.dataset.edge === state) return;
    path.dataset.edge = state;
    element.dataset.edge = state;
  }

  markCritical(names) {
    this.critical = names;
    const keys = new Set(names.map((name) => this.boxOf.get(name)));
    for (const [key, { element }] of this.nodes) element.classList.toggle("critical", keys.has(key));
    for (const { source, target, path } of this.edges) {
      path.classList.toggle("critical", keys.has(source) && keys.has(target));
    }
  }

  select(name) {
    this.selected = name;
    const chosen = this.boxOf.get(name) ?? null;
    for (const [key, { element, names }] of this.nodes) {
      element.classList.toggle("selected", key === chosen);
      if (names.length === 1) element.setAttribute("aria-pressed", String(key === chosen));
    }
    this.highlight(chosen);
    if (chosen !== null) {
      this.moveTabStop(chosen);
      this.reveal(chosen);
    }
  }

  // The edges of a node stand out: that of the pointer, or else the selected one.
  highlight(name) {
    for (const { source, target, path } of this.edges) {
      path.classList.toggle("adjacent", name !== null && (source === name || target === name));
    }
  }

  moveTabStop(name) {
    this.nodes.get(this.focusable)?.element.setAttribute("tabindex", "-1");
    this.focusable = name;
    this.nodes.get(name).element.setAttribute("tabindex", "0");
  }

  // Scrolls the graph, and not the page.
  reveal(name) {
    const { container } = this;
    const [x, y] = this.flip(this.layout.positions.get(name)).map((one) => (one + MARGIN) * this.scale);
    const [width, height] = [container.clientWidth, container.clientHeight];
    const isSeen =
      x > container.scrollLeft + (WIDTH / 2) * this.scale &&
      x < container.scrollLeft + width - (WIDTH / 2) * this.scale &&
      y > container.scrollTop + (HEIGHT / 2) * this.scale &&
      y < container.scrollTop + height - (HEIGHT / 2) * this.scale;
    if (!isSeen) container.scrollTo(x - width / 2, y - height / 2);
  }

  onKey(event) {
    const name = event.target.dataset?.node;
    if (event.key === "+" || event.key === "=") return this.zoom(1.25);
    if (event.key === "-") return this.zoom(0.8);
    if (event.key === "0") return this.fit();
    if (name === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      return this.choose(name);
    }
    const next = this.neighbour(name, event.key);
    if (next === undefined) return;
    event.preventDefault();
    if (next === null) return;
    this.reveal(next);
    this.nodes.get(next).element.focus({ preventScroll: true });
  }

  // Returns null where there is none, and undefined for a key of no meaning here.
  neighbour(name, key) {
    const keys = this.isVertical
      ? { ArrowDown: "after", ArrowUp: "before", ArrowRight: 1, ArrowLeft: -1 }
      : { ArrowRight: "after", ArrowLeft: "before", ArrowDown: 1, ArrowUp: -1 };
    const all = this.layout.rows.flat();
    if (key === "Home") return all[0];
    if (key === "End") return all.at(-1);
    const way = keys[key];
    if (way === undefined) return undefined;
    if (typeof way === "number") {
      const row = this.layout.rows[this.layout.layerOf.get(name)];
      return row[row.indexOf(name) + way] ?? null;
    }
    const here = this.layout.positions.get(name)[1];
    const distance = (one) => Math.abs(this.layout.positions.get(one)[1] - here);
    const found = [...this.nodes.get(name)[way]].sort((a, b) => distance(a) - distance(b));
    return found[0] ?? null;
  }

  zoom(factor, at = null) {
    const { container } = this;
    const box = container.getBoundingClientRect();
    const x = at === null ? box.width / 2 : at.clientX - box.left;
    const y = at === null ? box.height / 2 : at.clientY - box.top;
    const before = this.scale;
    this.isFitted = false;
    this.resize(this.scale * factor);
    const ratio = this.scale / before;
    container.scrollTo((container.scrollLeft + x) * ratio - x, (container.scrollTop + y) * ratio - y);
  }

  // All of it, however small that is.
  fit() {
    const [width, height] = [this.container.clientWidth, parseFloat(getComputedStyle(this.container).maxHeight)];
    this.isFitted = false;
    this.resize(Math.min(1, width / this.size[0], height / this.size[1]));
    this.container.scrollTo(0, 0);
  }

  // As large as fits, but readable: people scroll to the rest.
  readable() {
    const fitting = Math.min(1, this.container.clientWidth / this.size[0]);
    return fitting >= SMALL ? fitting : READABLE;
  }

  resize(scale) {
    this.scale = Math.min(2.5, Math.max(LEAST, scale));
    this.svg.setAttribute("width", (this.size[0] * this.scale).toFixed(1));
    this.svg.setAttribute("height", (this.size[1] * this.scale).toFixed(1));
    this.svg.classList.toggle("small", this.scale < FILLED);
  }
}

// "PROMPT_TEMPLATE" as people write it.
function wordsOf(type) {
  return type.toLowerCase().replaceAll("_", " ").slice(0, 26);
}

function stateOfEdge([source, target], run) {
  const [from, to] = [run.nodes.get(source), run.nodes.get(target)];
  if (from?.status === "SKIPPED" || to?.status === "SKIPPED") return "skipped";
  return from?.status === "SUCCESS" && to && to.status !== "QUEUED" ? "taken" : "pending";
}

// What the pointer sees at a box.
function titleOf(names, type) {
  if (names.length > 1) return names.join("\n");
  return type ? `${names[0]} (${type})` : names[0];
}

// A name cut in the middle, with more of its end: there, names of like nodes differ.
function shortened(name) {
  canvas.font = `600 13px ${getComputedStyle(document.body).fontFamily}`;
  const fits = (text) => canvas.measureText(text).width <= NAME_WIDTH;
  if (fits(name)) return name;
  const cut = (kept) => {
    const start = Math.ceil(kept / 3);
    return `${name.slice(0, start).trimEnd()}…${name.slice(name.length - kept + start).trimStart()}`;
  };
  let [low, high] = [0, Math.min(name.length, 60)];
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (fits(cut(middle))) low = middle;
    else high = middle - 1;
  }
  return cut(low);
}
