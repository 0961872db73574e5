// @ts-check
// The graph of a workflow as SVG: nodes in layers, live statuses, and the edges that the run took.
// Scrolling and dragging pan it. Its buttons, Ctrl and the wheel, or + and - zoom it.

import { draw, makeSvg, write } from "../library/dom.js";
import { layOut } from "../library/layout.js";
import { isFinal, spanOf, statusOf, wordOf } from "../library/model.js";
import { duration } from "../library/times.js";

const WIDTH = 176;
const HEIGHT = 54;
const MARGIN = 14;
const NARROW = 640;
const READABLE = 0.75; // the first scale of a graph that does not fit
const SMALL = 0.62; // the smallest first scale that shows all of a graph
const LEAST = 0.1;
const NAME_WIDTH = WIDTH - 44;

const canvas = document.createElement("canvas").getContext("2d");

export class Graph {
  constructor(container, onSelect) {
    this.container = container;
    this.onSelect = onSelect;
    this.nodes = new Map();
    this.edges = [];
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
    const { layers, nodes, edges } = definition;
    this.definition = definition;
    this.isVertical = this.container.clientWidth < NARROW;
    const [along, across] = this.isVertical ? [HEIGHT, WIDTH] : [WIDTH, HEIGHT];
    const sizes = { along, across, gapAlong: this.isVertical ? 38 : 48, gapAcross: 14 };
    this.layout = layOut(layers, edges, sizes);
    this.nodes.clear();
    const { length, breadth } = this.layout;
    this.size = this.flip([length, breadth]).map((one) => one + 2 * MARGIN);
    this.svg = makeSvg("svg", {
      role: "group",
      "aria-label": "Graph of the workflow; the arrow keys follow its edges",
      viewBox: `${-MARGIN} ${-MARGIN} ${this.size[0]} ${this.size[1]}`,
    });
    this.edges = edges.map((edge, index) => this.makeEdge(edge, this.layout.routes[index]));
    this.svg.append(...this.edges.map((edge) => edge.element));
    for (const name of this.layout.rows.flat()) this.makeNode(name, nodes[name]);
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
    if (this.followed !== null && this.nodes.has(this.followed)) this.reveal(this.followed);
  }

  // Keeps a node in sight: the one that runs, or that failed.
  follow(name) {
    if (name === this.followed || !this.nodes.has(name)) return;
    this.followed = name;
    if (!this.isMoved && this.selected === null) this.reveal(name);
  }

  // If somebody turns or widens the window, the graph fits it again, unless somebody has zoomed.
  onResize() {
    const width = this.container.clientWidth;
    if (this.definition === undefined || width === 0 || width === this.width) return;
    this.width = width;
    if (this.isVertical !== width < NARROW) {
      const critical = [...this.nodes].filter(([, { element }]) => element.classList.contains("critical"));
      this.draw(this.definition);
      if (this.run !== undefined) this.update(this.run);
      this.markCritical(critical.map(([name]) => name));
      this.select(this.selected);
    } else if (this.isFitted) {
      this.resize(this.readable());
      if (this.selected !== null && this.nodes.has(this.selected)) this.reveal(this.selected);
    }
  }

  flip([along, across]) {
    return this.isVertical ? [across, along] : [along, across];
  }

  makeNode(name, { type, is_output }) {
    const [x, y] = this.flip(this.layout.positions.get(name));
    const icon = makeSvg("use", { x: -WIDTH / 2 + 10, y: -8, width: 16, height: 16 });
    const label = makeSvg("text", { class: "gname", x: -WIDTH / 2 + 34, y: type ? -9 : -3 }, shortened(name));
    const state = makeSvg("text", { class: "gstate", x: -WIDTH / 2 + 34, y: type ? 6 : 14 });
    const kind = makeSvg("text", { class: "gstate gtype", x: -WIDTH / 2 + 34, y: 20 }, wordsOf(type));
    const element = makeSvg(
      "g",
      {
        class: is_output ? "gnode output" : "gnode",
        role: "button",
        tabindex: "-1",
        "data-node": name,
        "data-status": "",
        transform: `translate(${x} ${y})`,
      },
      makeSvg("title", {}, type ? `${name} (${type})` : name),
      makeSvg("rect", { x: -WIDTH / 2, y: -HEIGHT / 2, width: WIDTH, height: HEIGHT, rx: 8 }),
      icon,
      label,
      state,
      kind,
    );
    element.addEventListener("click", () => {
      if (!this.isDragged) this.onSelect(name);
    });
    element.addEventListener("focus", () => this.moveTabStop(name));
    element.addEventListener("pointerenter", () => this.highlight(name));
    element.addEventListener("pointerleave", () => this.highlight(this.selected));
    this.nodes.set(name, { element, icon, state, before: [], after: [], type, status: null });
    this.svg.append(element);
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
    for (const name of names ?? this.nodes.keys()) {
      const node = this.nodes.get(name);
      if (node) this.showStatus(name, node, run.nodes.get(name), time);
    }
    for (const edge of this.edges) this.showEdge(edge, run);
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
    const time_ = span?.isTimed ? ` · ${duration(Math.max(0, span.end - span.start))}` : "";
    write(node.state, text + time_);
    const label = `${name}: ${text}${node.isRunning ? "" : time_}`;
    if (element.getAttribute("aria-label") !== label) element.setAttribute("aria-label", label);
  }

  // How long nodes have been running.
  tick(run) {
    const time = run.now();
    for (const [name, node] of this.nodes) {
      if (node.isRunning) this.showStatus(name, node, run.nodes.get(name), time);
    }
  }

  showEdge({ source, target, path, element }, run) {
    const [from, to] = [run.nodes.get(source), run.nodes.get(target)];
    let state = "pending";
    if (from?.status === "SKIPPED" || to?.status === "SKIPPED") state = "skipped";
    else if (from?.status === "SUCCESS" && to && to.status !== "QUEUED") state = "taken";
    if (path.dataset.edge === state) return;
    path.dataset.edge = state;
    element.dataset.edge = state;
  }

  markCritical(names) {
    const set = new Set(names);
    for (const [name, { element }] of this.nodes) element.classList.toggle("critical", set.has(name));
    for (const { source, target, path } of this.edges) {
      path.classList.toggle("critical", set.has(source) && set.has(target));
    }
  }

  select(name) {
    this.selected = name;
    for (const [one, { element }] of this.nodes) {
      element.classList.toggle("selected", one === name);
      element.setAttribute("aria-pressed", String(one === name));
    }
    this.highlight(name);
    if (this.nodes.has(name)) {
      this.moveTabStop(name);
      this.reveal(name);
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
      return this.onSelect(name);
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
  }
}

// "PROMPT_TEMPLATE" as people write it.
function wordsOf(type) {
  return type.toLowerCase().replaceAll("_", " ").slice(0, 26);
}

function shortened(name) {
  canvas.font = `600 13px ${getComputedStyle(document.body).fontFamily}`;
  const fits = (text) => canvas.measureText(text).width <= NAME_WIDTH;
  if (fits(name)) return name;
  let [low, high] = [0, Math.min(name.length, 60)];
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (fits(`${name.slice(0, middle)}…`)) low = middle;
    else high = middle - 1;
  }
  return `${name.slice(0, low)}…`;
}
