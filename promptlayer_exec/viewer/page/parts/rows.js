// @ts-check
// The nodes of one execution: a row each, with a bar on a time line.

import { clone, draw, make, oneLine, part, placeAt, write } from "../library/dom.js";
import { isFinal, spanOf, statusOf, wordOf } from "../library/model.js";
import { clock, duration, tickLabel, ticks } from "../library/times.js";

const ORDERS = {
  start: (row) => row.span?.start ?? Infinity,
  duration: (row) => -(row.span ? row.span.end - row.span.start : -1),
};

export class Rows {
  // `hrefOf(name)` is the address of a node. If there is `onChoose(name, isByKey)`, the rows call
  // it instead of going there. `scroller` is what scrolls to a row, if that is not the page.
  constructor(run, list, axis, { hrefOf, onChoose = null, scroller = null }) {
    this.run = run;
    this.list = list;
    this.axis = axis;
    this.rows = new Map();
    this.hrefOf = hrefOf;
    this.onChoose = onChoose;
    this.order = "";
    this.text = "";
    this.isWhole = true;
    this.scale = 0;
    this.scroller = scroller;
    this.followed = null; // the node to keep in sight, until somebody uses the list
    this.isUsed = false;
    if (scroller !== null) this.listen();
  }

  listen() {
    for (const kind of ["pointerdown", "wheel", "focusin"]) {
      this.scroller.addEventListener(kind, () => (this.isUsed = true), { passive: true });
    }
    // Rows have their true height only after drawing.
    new ResizeObserver(() => {
      if (!this.isUsed && this.rows.has(this.followed)) this.reveal(this.followed);
    }).observe(this.list);
  }

  // Keeps a node in sight: the one that runs, or that failed.
  follow(name) {
    if (name === this.followed || this.isUsed || !this.rows.has(name)) return;
    this.followed = name;
    this.reveal(name);
  }

  // Scrolls the list, and not the page, to a row that is not in sight, with one row above it.
  reveal(name) {
    const frame = this.scroller.getBoundingClientRect();
    const top = frame.top + this.axis.parentElement.offsetHeight; // below the heads of the columns
    const row = this.rows.get(name).root.getBoundingClientRect();
    const isSeen = row.top >= top && row.bottom <= Math.min(frame.bottom, innerHeight);
    if (!isSeen) this.scroller.scrollTop += row.top - top - row.height;
  }

  // Shows the nodes of these names, or all of them.
  update(names = null) {
    const { nodes } = this.run;
    if (names === null) {
      for (const [name, row] of this.rows) {
        if (!nodes.has(name)) {
          row.root.remove();
          this.rows.delete(name);
        }
      }
    }
    for (const name of names ?? nodes.keys()) this.show(nodes.get(name));
    this.sort();
  }

  show(node) {
    const row = this.rows.get(node.name) ?? this.make(node.name);
    const { root } = row;
    const status = statusOf(node);
    row.node = node;
    root.dataset.status = status;
    draw(row.icon, status);
    write(row.status, wordOf(node));
    row.output.hidden = !node.is_output_node;
    write(row.preview, oneLine(node.error_message ?? node.value ?? ""));
    this.place(row, this.run.now());
    this.filterRow(row);
  }

  make(name) {
    const root = clone("node-template").firstElementChild;
    /** @type {Part[]} */
    const parts = ["row", "icon", "status", "output", "preview", "time", "stretch", "critical"];
    const row = { root, node: null, span: null };
    for (const one of parts) row[one] = part(root, one);
    write(part(root, "name"), name);
    row.row.href = this.hrefOf(name);
    row.row.addEventListener("click", (event) => {
      const isElsewhere = event.ctrlKey || event.metaKey || event.shiftKey;
      if (this.onChoose === null || isElsewhere) return;
      event.preventDefault();
      this.onChoose(name, event.detail === 0);
    });
    this.rows.set(name, row);
    this.list.append(root);
    return row;
  }

  select(name) {
    for (const [one, { root, row }] of this.rows) {
      root.classList.toggle("selected", one === name);
      if (one === name) row.setAttribute("aria-current", "true");
      else row.removeAttribute("aria-current");
    }
  }

  markCritical(names) {
    for (const [name, row] of this.rows) {
      row.critical.hidden = !names.includes(name);
      row.root.classList.toggle("critical", names.includes(name));
    }
  }

  // Moves only rows that are out of place, so that the focus and the scroll position stay.
  sort() {
    const rows = [...this.rows.values()];
    const key = ORDERS[this.order];
    rows.sort((one, other) => one.node.index - other.node.index);
    if (key) rows.sort((one, other) => key(one) - key(other));
    if (this.order === "name") {
      rows.sort((one, other) => one.node.name.localeCompare(other.node.name));
    }
    rows.forEach((row, index) => placeAt(this.list, index, row.root));
  }

  filter(text, isWhole = false) {
    if (text === this.text && isWhole === this.isWhole) return;
    this.text = text;
    this.isWhole = isWhole;
    for (const row of this.rows.values()) this.filterRow(row);
  }

  filterRow({ root, node }) {
    root.hidden = !this.isWhole && !matches(node, this.text);
  }

  // Bars have positions in seconds, so that only the length of the axis changes with time.
  tick(time) {
    const scale = Math.max(time, 0.001);
    if (scale === this.scale) return;
    this.scale = scale;
    this.list.style.setProperty("--scale", scale.toFixed(3));
    this.showAxis(scale);
    for (const row of this.rows.values()) {
      const { node } = row;
      if (node.running !== null && node.final === null && !isFinal(node)) this.place(row, time);
    }
  }

  place(row, time) {
    const span = spanOf(row.node, time);
    row.span = span;
    row.stretch.hidden = span === null;
    write(row.time, span?.isTimed ? duration(Math.max(0, span.end - span.start), !isFinal(row.node)) : "");
    if (span === null) return;
    const { style } = row.stretch;
    if (row.from !== span.start) style.setProperty("--from", span.start.toFixed(3));
    if (row.to !== span.end) style.setProperty("--to", span.end.toFixed(3));
    row.from = span.start;
    row.to = span.end;
    if (isFinal(row.node)) row.stretch.title = this.momentsOf(span);
  }

  // What the pointer sees at a bar.
  momentsOf({ start, end }) {
    const { since } = this.run.data;
    const at = (seconds) => `${duration(seconds)}${since === null ? "" : ` (${clock(since + seconds)})`}`;
    return `${at(start)} to ${at(end)}, ${duration(end - start)}`;
  }

  showAxis(scale) {
    const moments = ticks(scale);
    const step = moments[1] ?? scale;
    if (this.step !== step || this.axis.children.length !== moments.length) {
      const labels = moments.map((moment) => make("span", {}, tickLabel(moment)));
      labels.forEach((label, index) => label.style.setProperty("--at", String(moments[index])));
      this.axis.replaceChildren(...labels);
      this.step = step;
    }
    this.axis.style.setProperty("--scale", scale.toFixed(3));
    this.list.style.setProperty("--step", String(step));
  }
}

// Searches the first characters of a value, which are all of most.
export function matches(node, text) {
  const texts = [node.name, node.status, node.error_message, node.value];
  return texts.some((one) => one !== null && one.toLowerCase().includes(text));
}
