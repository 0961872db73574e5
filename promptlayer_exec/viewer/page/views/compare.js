// @ts-check
// The view of two executions of one workflow side by side: `#/compare/787/788`.

import { call, get, getInputs, getText } from "../library/api.js";
import { byId, findAll, iconOf, make, show, write } from "../library/dom.js";
import { diffLines, diffWords } from "../library/diff.js";
import { board, differingSettings, runs, settingsOf, spanOf, STATES, statusOf, wordOf } from "../library/model.js";
import { addressOf, go, replace } from "../library/router.js";
import { clock, duration } from "../library/times.js";

const LARGE = 1_000_000;
const FEW = 8; // equal lines around differences
const INPUTS = ""; // stands for the inputs among names of nodes
const NOTABLE = 0.2; // share by which durations must differ to be marked, and at least 0.2 s

let ids = [];
let asked = "";
let opened = new Set();
let changed = new Set();
let hasOtherInputs = false;
let isOpenedOnce = false; // what differs first is open at first
let pending = null;
let isUnfolded = false; // the nodes that are equal
let red = 0; // the side whose differences are red: that which failed, or else the left one

export const compareView = {
  element: byId("view-compare"),

  show([, left = "", right = ""], params) {
    if (ids[0] !== left || ids[1] !== right) {
      opened = new Set(params.getAll("open"));
      isOpenedOnce = params.has("open");
    }
    ids = [left, right];
    isUnfolded = params.get("equal") === "1";
    byId("durations").checked = params.get("durations") === "1";
    byId("compare").replaceChildren();
    asked = "";
    if (board.isKnown) this.onBoard();
  },

  hide() {
    ids = [];
    byId("compare").replaceChildren();
  },

  async onBoard() {
    const missing = ids.filter((id) => id !== "" && !runs.has(id) && !asked.includes(`,${id},`));
    show(byId("compare-problem"), null);
    for (const id of missing) {
      asked += `,${id},`;
      try {
        await call("POST", "api/executions", { execution_id: id });
      } catch (error) {
        show(byId("compare-problem"), error.message);
      }
    }
    schedule();
  },

  onNodes: (run) => ids.includes(run.id) && schedule(),
  onExecution: (run) => ids.includes(run.id) && schedule(),
  title: () => `Compare ${ids.join(" and ")} · Executions`,

  keys: {
    items: () => findAll("#compare .pair > details > summary").filter((item) => item.checkVisibility()),
    isWanted: (item) => item.closest(".differs") !== null,
  },
};

// Updates come in bursts, so it requests the differences of values once for each burst.
function schedule() {
  pending ??= setTimeout(async () => {
    pending = null;
    const [left, right] = ids.map((id) => runs.get(id));
    if (!left?.nodes.size || !right?.nodes.size) return;
    try {
      const found = await get(`api/compare/${ids[0]}/${ids[1]}`);
      changed = new Set(found.changed);
      hasOtherInputs = found.inputs_differ;
    } catch (error) {
      return show(byId("compare-problem"), error.message);
    }
    if (ids[0] === left.id && ids[1] === right.id) render(left, right);
  }, 100);
}

function render(left, right) {
  red = right.data.state === "failed" && left.data.state !== "failed" ? 1 : 0;
  const names = [...left.nodes.keys()];
  // A node of the right alone comes after the one that it follows there.
  [...right.nodes.keys()].forEach((name, index, all) => {
    if (!left.nodes.has(name)) names.splice(names.indexOf(all[index - 1]) + 1, 0, name);
  });
  const rows = names.map((name) => compareNodes(name, left, right));
  const differing = rows.filter((row) => row.marks.length > 0);
  const equal = rows.filter((row) => row.marks.length === 0);
  // A failed node is where a difference became visible. It began where a value differs.
  const first = differing.find(hasOtherValue);
  const failed = differing.find(({ marks }) => marks.includes("error"));
  const telling = [first, failed].filter((row) => row !== undefined);
  if (!isOpenedOnce && hasOtherInputs) opened.add(INPUTS);
  if (!isOpenedOnce) telling.forEach(({ name }) => opened.add(name));
  isOpenedOnce ||= hasOtherInputs || telling.length > 0;
  const list = make("ol", { class: "nodes", "aria-label": "Nodes of both executions" });
  list.append(...differing.map((row) => rowOf(row, left, right)));
  if (equal.length > 0) list.append(foldOfEqual(equal, left, right));
  const focused = findAll(".pair").find((one) => one.contains(document.activeElement))?.dataset.name;
  const hasInputs = left.data.has_inputs || right.data.has_inputs;
  if (hasInputs) list.prepend(inputsRow(left, right));
  const card = make("div", { class: "pairs" }, headOf(left, right), list);
  // Where the values are below each other, they have these names.
  [left, right].forEach(({ id, data }, side) => {
    card.style.setProperty(side === 0 ? "--left" : "--right", JSON.stringify(`Execution ${id}: ${STATES[data.state][0].toLowerCase()}`));
  });
  byId("compare").replaceChildren(card);
  if (focused !== undefined) {
    findAll(".pair", list).find((one) => one.dataset.name === focused)?.querySelector("summary").focus();
  }
  const isOther = left.data.workflow && right.data.workflow && left.data.workflow !== right.data.workflow;
  const other = isOther ? " These are runs of different workflows." : "";
  const settings = differingSettings(left, right);
  write(byId("compare-summary"), summaryOf(differing.length, names.length, settings) + other);
}

// What differs: settings and inputs first, then nodes.
function summaryOf(differing, all, settings) {
  const found = settings.map((name) => `the ${name}`);
  if (hasOtherInputs) found.push("the inputs");
  if (differing === 0 && found.length === 0) return "No node differs.";
  if (differing > 0) found.push(`${differing} of ${all} nodes`);
  const words = new Intl.ListFormat("en").format(found);
  const isOne = found.length === 1 && settings.length === 1;
  const only = differing === 0 ? `Only ${words}` : words[0].toUpperCase() + words.slice(1);
  return `${only} ${isOne ? "differs" : "differ"}.`;
}

function headOf(left, right) {
  const column = (run) => {
    const [word, icon] = STATES[run.data.state];
    const link = make("a", { href: addressOf(["executions", run.id]) }, run.name);
    const moment = run.data.started ?? run.data.since;
    const length = run.length();
    const about = [`Execution ${run.id}`, moment === null ? "" : clock(moment)];
    if (length !== null) about.push(duration(length));
    about.push(...settingsOf(run));
    const state = make("p", { class: "status" }, iconOf(icon), word);
    const text = about.filter((one) => one !== "").join(" · ");
    const head = make("div", { class: "side" }, make("h3", {}, link), state, make("p", { class: "muted" }, text));
    head.dataset.state = run.data.state;
    return head;
  };
  return make("header", { class: "pair-head" }, make("span", {}), column(left), column(right));
}

function compareNodes(name, left, right) {
  const [one, other] = [left.nodes.get(name), right.nodes.get(name)];
  const marks = [];
  if (!one || !other) marks.push(one ? "only left" : "only right");
  else {
    if (one.status !== other.status) marks.push("status");
    const isValue = changed.has(name) && (one.status === other.status || one.value !== other.value);
    if (isValue) marks.push("value");
    if (one.error_message !== other.error_message) marks.push("error");
    const isTimed = byId("durations").checked;
    if (isTimed && differInTime(lengthOf(one, left), lengthOf(other, right))) marks.push("duration");
  }
  return { name, one, other, marks };
}

// Whether both have values, which differ.
function hasOtherValue({ one, other, marks }) {
  return marks.includes("value") && one.value !== null && other.value !== null;
}

// One line for all equal nodes.
function foldOfEqual(rows, left, right) {
  const text = rows.length === 1 ? "1 node is equal" : `${rows.length} nodes are equal`;
  const list = make("ol", { class: "nodes", "aria-label": "Nodes that are equal" });
  list.append(...rows.map((row) => rowOf(row, left, right)));
  const details = make("details", { open: isUnfolded }, make("summary", {}, text), list);
  details.addEventListener("toggle", () => {
    isUnfolded = details.open;
    remember();
  });
  return make("li", { class: "node equal" }, details);
}

function lengthOf(node, run) {
  const span = node === undefined ? null : spanOf(node, run.now());
  return span?.isTimed ? span.end - span.start : null;
}

function differInTime(one, other) {
  if (one === null || other === null) return false;
  const difference = Math.abs(one - other);
  return difference >= 0.2 && difference > NOTABLE * Math.max(one, other);
}

function rowOf({ name, one, other, marks }, left, right) {
  const item = make("li", { class: marks.length > 0 ? "node pair differs" : "node pair" });
  item.dataset.name = name;
  const tags = marks.map(tagOf);
  const summary = make(
    "summary",
    {},
    make("span", { class: "name" }, name, " ", ...tags),
    sideOf(one, left, marks),
    sideOf(other, right, marks),
  );
  item.append(foldOf(name, summary, () => valuesOf(name, one, other, left, right)));
  return item;
}

const tagOf = (mark) => make("span", { class: "tag differs-tag" }, mark);

// Compares the inputs like the value of a node. A node may have their name.
function inputsRow(left, right) {
  const word = (run) => make("span", { class: "muted side" }, run.data.has_inputs ? "" : "Not known here");
  const tags = hasOtherInputs ? [tagOf("differ")] : [];
  const name = make("span", { class: "name" }, "Inputs ", ...tags);
  const summary = make("summary", {}, name, word(left), word(right));
  const textOf = async (run) => (run.data.has_inputs ? getInputs(run.id) : "");
  const fill = () => {
    const place = make("div", { class: "detail pair-values" });
    Promise.all([textOf(left), textOf(right)]).then(
      (texts) => place.replaceChildren(...linesOf("inputs", ...texts)),
      (error) => place.replaceChildren(make("p", { class: "error" }, error.message)),
    );
    return place;
  };
  return make("li", { class: hasOtherInputs ? "node pair inputs differs" : "node pair inputs" }, foldOf(INPUTS, summary, fill));
}

function foldOf(name, summary, fill) {
  const details = make("details", {}, summary);
  details.addEventListener("toggle", () => {
    if (details.open) opened.add(name);
    else opened.delete(name);
    remember();
    if (details.open && details.children.length === 1) details.append(fill());
  });
  details.open = opened.has(name);
  return details;
}

function sideOf(node, run, marks) {
  if (node === undefined) return make("span", { class: "muted side" }, "Not in this execution");
  const look = statusOf(node);
  const length = lengthOf(node, run);
  const time = make("span", { class: marks.includes("duration") ? "time changed" : "time" });
  write(time, length === null ? "" : duration(length));
  const state = make("span", { class: marks.includes("status") ? "status changed" : "status" }, iconOf(look), wordOf(node));
  const side = make("span", { class: "side" }, state, time);
  side.dataset.status = look;
  return side;
}

// Both values, or errors, with marks on the lines that differ.
function valuesOf(name, one, other, left, right) {
  const place = make("div", { class: "detail pair-values" });
  const fill = async (isAsked) => {
    const large = [one, other].some((node) => (node?.length ?? 0) > LARGE);
    if (large && !isAsked) {
      const button = make("button", { type: "button" }, "Load both values, which are large");
      button.addEventListener("click", () => fill(true));
      return place.replaceChildren(button);
    }
    try {
      const texts = await Promise.all([textOf(one, left), textOf(other, right)]);
      // Nothing in an error corresponds to a part of a value.
      const isPair = (one?.value == null) === (other?.value == null);
      const boxes = isPair ? linesOf(`value of ${name}`, ...texts) : [boxFor(name, one, texts[0]), boxFor(name, other, texts[1])];
      place.replaceChildren(...boxes);
    } catch (error) {
      place.replaceChildren(make("p", { class: "error" }, error.message));
    }
  };
  fill(false);
  return place;
}

async function textOf(node, run) {
  if (node === undefined) return "";
  if (node.value === null) return node.raw_error_message ?? node.error_message ?? "";
  if (node.length <= node.value.length) return node.value;
  return getText(`api/executions/${run.id}/nodes/${node.index}`);
}

function linesOf(what, left, right) {
  if (left === right) {
    const line = make("span", { class: "diff" }, left);
    const note = make("p", { class: "muted" }, "Both are the same:");
    return [note, boxOf(`The same ${what}`, [line])];
  }
  const sides = [[], []];
  const pairs = diffLines(left, right);
  const isNear = nearOf(pairs);
  let skipped = 0;
  const flush = () => {
    const text = `… ${skipped} equal lines`;
    if (skipped > 0) for (const side of sides) side.push(make("span", { class: "diff gap" }, text));
    skipped = 0;
  };
  pairs.forEach((pair, index) => {
    if (!isNear(index)) return (skipped += 1);
    flush();
    const [one, other] = pair;
    const words = one !== other && one !== null && other !== null ? diffWords(one, other) : null;
    pair.forEach((line, side) => sides[side].push(lineOf(line, one === other, words?.[side])));
  });
  flush();
  return sides.map((lines, side) => {
    const box = boxOf(`${side === 0 ? "Left" : "Right"} ${what}`, lines);
    box.classList.add(side === red ? "red" : "green");
    return box;
  });
}

function nearOf(pairs) {
  const near = new Set();
  pairs.forEach(([one, other], index) => {
    if (one === other) return;
    for (let at = index - FEW; at <= index + FEW; at += 1) near.add(at);
  });
  return (index) => near.has(index);
}

function lineOf(line, isSame, words) {
  if (line === null) return make("span", { class: "diff absent" }, "\u00a0");
  if (words) {
    const parts = words.map(([text, isChanged]) => (isChanged ? make("mark", {}, text) : text));
    return make("span", { class: "diff changed" }, ...parts);
  }
  return make("span", { class: isSame ? "diff" : "diff changed" }, line === "" ? "\u00a0" : line);
}

// The value or the error of one side alone.
function boxFor(name, node, text) {
  const what = node?.value == null ? "error" : "value";
  return boxOf(`The ${what} of ${name}`, [make("span", { class: "diff" }, text === "" ? "\u00a0" : text)]);
}

function boxOf(label, lines) {
  return make("pre", { tabindex: "0", role: "region", "aria-label": label }, ...lines);
}

function remember() {
  const params = new URLSearchParams();
  for (const name of opened) params.append("open", name);
  if (isUnfolded) params.set("equal", "1");
  if (byId("durations").checked) params.set("durations", "1");
  if (ids.length === 2) replace(["compare", ...ids], params);
}

byId("durations").addEventListener("change", () => {
  remember();
  schedule();
});
byId("swap").addEventListener("click", () => go(addressOf(["compare", ...[...ids].reverse()])));
