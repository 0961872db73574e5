// @ts-check
// The view of the batches in the local database: `#/batches`, and one of them: `#/batches/night`.

import { get } from "./api.js";
import { byId, clone, copyWith, draw, findAll, make, makeSvg, part, show, write } from "./dom.js";
import { STATES } from "./model.js";
import { addressOf } from "./router.js";
import { clock, fully, machine } from "./times.js";

const EVERY = 5000; // milliseconds
const KINDS = { failed: "failed", unknown: "unknown", running: "running", waiting: "queued", succeeded: "success" };

let name = null;
let timer = 0;
let shown = ""; // what is on the page, as JSON: it is left alone if nothing is new

export const batchesView = {
  element: byId("view-batches"),

  show([, chosen]) {
    name = chosen ?? null;
    shown = "";
    write(byId("batches-title"), name === null ? "Batches" : `Batch ${name}`);
    byId("batches-crumb").hidden = name === null;
    byId("batches").replaceChildren();
    write(byId("batches-empty"), "Reading the database …");
    clearInterval(timer);
    timer = setInterval(load, EVERY);
    load();
  },

  hide() {
    clearInterval(timer);
  },

  title: () => (name === null ? "Batches · Executions" : `Batch ${name} · Executions`),

  keys: {
    items: () => findAll("#batches .batch-name a, #batches .item a"),
    isWanted: (item) => item.closest("[data-kind=failed], [data-kind=unknown]") !== null,
  },
};

async function load() {
  const asked = name;
  let found;
  try {
    found = await get(asked === null ? "api/batches" : `api/batch?${new URLSearchParams({ name: asked })}`);
  } catch (error) {
    write(byId("batches-empty"), "");
    const none = "Batches need another extra: install promptlayer-exec[dbos] where the viewer runs.";
    return show(byId("batches-problem"), error.status === 404 ? none : error.message);
  }
  if (asked !== name) return;
  show(byId("batches-problem"), found.problem ?? null);
  const text = JSON.stringify(found);
  if (text === shown) return;
  shown = text;
  if (asked === null) showAll(found);
  else showOne(found);
}

function showAll({ batches, database }) {
  const none = `There is no batch in ${database}.\nThis begins one: promptlayer-exec batch run FILE --workflow NAME`;
  write(byId("batches-empty"), batches.length === 0 ? none : "");
  const list = make("ul", { class: "batches" }, ...batches.map((batch) => make("li", {}, headOf(batch, true))));
  byId("batches").replaceChildren(...(batches.length > 0 ? [list] : []));
}

// Counts, failed and unknown first, and who works on it.
function headOf(batch, isLink) {
  const link = make("a", { href: addressOf(["batches", batch.name]) }, batch.name);
  const counts = Object.entries(KINDS).filter(([kind]) => batch[kind] > 0);
  const bar = make("span", { class: "segments", "aria-hidden": "true" });
  for (const [kind, status] of counts) {
    const segment = make("span", { "data-status": status });
    segment.style.flexGrow = String(batch[kind]);
    bar.append(segment);
  }
  const words = counts.map(([kind]) => {
    const text = `${batch[kind].toLocaleString("en")} ${kind}`;
    return make("span", { class: "count", "data-kind": kind }, text);
  });
  const { workers, total } = batch;
  const isOpen = batch.waiting + batch.running > 0;
  const who = workers === 0 && isOpen ? "nobody works on it" : `${workers} worker${workers === 1 ? "" : "s"}`;
  const items = `${total.toLocaleString("en")} item${total === 1 ? "" : "s"}`;
  return make(
    "div",
    { class: "batch" },
    ...(isLink ? [make("p", { class: "batch-name" }, link)] : []),
    bar,
    make("p", { class: "counts" }, ...words),
    make("p", { class: workers === 0 && isOpen ? "idle" : "muted" }, `${items}, ${who}`),
  );
}

function showOne(batch) {
  write(byId("batches-empty"), "");
  const commands = commandsOf(batch).map(({ command, what }) => {
    const root = clone("command-template").firstElementChild;
    write(part(root, "what"), what);
    write(part(root, "command"), command);
    part(root, "copy").setAttribute("aria-label", `Copy: ${command}`);
    copyWith(part(root, "copy"), part(root, "copied"), () => command, () => part(root, "command"));
    return root;
  });
  const items = make("ol", { class: "items", "aria-label": "Items that ended" });
  items.append(...batch.items.map(itemOf));
  const isAll = batch.is_whole && batch.items.length >= batch.succeeded + batch.failed + batch.unknown;
  const rest = isAll || batch.problem !== null ? "" : "Not every item is shown: promptlayer-exec batch export writes them all.";
  const part_ = batch.items.length > 0 ? [items] : [];
  byId("batches").replaceChildren(headOf(batch, false), ...commands, make("p", { class: "muted" }, rest), ...part_);
}

// What goes on with a batch.
function commandsOf({ name, waiting, running, workers, failed, unknown }) {
  const quoted = /^[\w./:@%+=,-]+$/.test(name) ? name : `'${name.replaceAll("'", "'\\''")}'`;
  const all = [
    [waiting + running > 0 && workers === 0, "work", "Nobody works on it now. This goes on:"],
    [failed > 0, "retry --failed", "This starts the failed items again, which costs again:"],
    [failed > 0, "recheck", "This follows runs again that have no output, and starts none:"],
    [unknown > 0, "retry --unknown", "This starts the unknown items again, which may pay for them twice:"],
  ];
  const wanted = all.filter(([isWanted]) => isWanted);
  return wanted.map(([, verb, what]) => ({ what, command: `promptlayer-exec batch ${verb} --name ${quoted}` }));
}

function itemOf({ key, kind, execution_id, error, finished }) {
  const [word, icon] = STATES[kind];
  const use = makeSvg("use");
  draw(use, icon);
  const symbol = makeSvg("svg", { class: "icon", "aria-hidden": "true" }, use);
  const id = execution_id === null ? "" : make("a", { href: addressOf(["executions", execution_id]) }, `Execution ${execution_id}`);
  const time = make("time", { class: "muted", datetime: machine(finished), title: fully(finished) }, clock(finished));
  const item = make(
    "li",
    { class: "item" },
    make("span", { class: "status" }, symbol, kind === "unknown" ? "Unknown" : word),
    make("span", { class: "name" }, key),
    make("span", { class: "item-error", title: error }, error ?? ""),
    make("span", {}, id),
    time,
  );
  item.dataset.kind = kind;
  return item;
}
