// @ts-check
// The view of the batches in the local database: `#/batches`, and one of them: `#/batches/night`.

import { get } from "../library/api.js";
import { byId, clone, copyWith, find, findAll, iconOf, make, part, show, timeOf, write } from "../library/dom.js";
import { STATES } from "../library/model.js";
import { writePieces } from "../parts/progress.js";
import { addressOf, replace } from "../library/router.js";
import { itemSentenceOf } from "../library/sentence.js";
import { counted, duration, fully } from "../library/times.js";

const EVERY = 5000; // milliseconds
const STARTING = 15; // seconds in which a new batch need not have a worker yet
const PAGE = 200;
const KINDS = { failed: "failed", unknown: "unknown", running: "running", waiting: "queued", succeeded: "success" };

let name = null;
let timer = 0;
let shown = ""; // what is on the page, as JSON, to leave it alone if nothing is new
let filters = { kind: "", reason: "" };
let count = PAGE; // items on the page

export const batchesView = {
  element: byId("view-batches"),

  show([, chosen], params) {
    name = chosen ?? null;
    filters = { kind: params.get("kind") ?? "", reason: params.get("reason") ?? "" };
    count = PAGE;
    shown = "";
    write(byId("batches-title"), name === null ? "Batches" : `Batch ${name}`);
    byId("batches-crumb").hidden = name === null;
    byId("batches").replaceChildren();
    write(byId("batches-empty"), "Reading the database …");
    clearInterval(timer);
    timer = setInterval(load, EVERY);
    return load();
  },

  hide() {
    clearInterval(timer);
  },

  title: () => (name === null ? "Batches · Executions" : `Batch ${name} · Executions`),

  keys: {
    items: () => findAll("#batches .batch-name a, #batches .item a[data-focus]"),
    isWanted: (item) => item.closest("[data-kind=failed], [data-kind=unknown]") !== null,
  },
};

async function load() {
  const asked = name;
  let found;
  try {
    found = await get(asked === null ? "api/batches" : `api/batch?${queryOf(asked)}`);
  } catch (error) {
    write(byId("batches-empty"), "");
    const none = "Batches need another extra: install promptlayer-exec[dbos] where the viewer runs.";
    return show(byId("batches-problem"), error.status === 404 ? none : error.message);
  }
  if (asked !== name) return;
  show(byId("batches-problem"), found.problem ?? null);
  const minute = Math.floor(Date.now() / 60_000); // "3 minutes ago"
  const text = `${minute} ${JSON.stringify(found)}`;
  if (text === shown) return;
  shown = text;

  // Restores the focus and the fold after drawing again.
  const focus = find("#batches :focus")?.closest("[data-focus]")?.dataset.focus;
  const isUnfolded = find("#batches details")?.open ?? false;
  if (asked === null) showAll(found);
  else showOne(found, isUnfolded);
  if (focus !== undefined) find(`#batches [data-focus="${CSS.escape(focus)}"]`)?.focus({ preventScroll: true });
}

function queryOf(asked) {
  const query = new URLSearchParams({ name: asked, count: String(count) });
  for (const [key, value] of Object.entries(filters)) if (value !== "") query.set(key, value);
  return query;
}

function choose(chosen) {
  filters = { ...filters, ...chosen };
  count = PAGE;
  const params = new URLSearchParams(Object.entries(filters).filter(([, value]) => value !== ""));
  replace(["batches", name], params);
  load();
}

function showAll({ batches, database }) {
  const none = `There is no batch in ${database}.\nThis begins one: promptlayer-exec batch run FILE --workflow NAME`;
  write(byId("batches-empty"), batches.length === 0 ? none : "");
  const list = make("ul", { class: "batches" }, ...batches.map((batch) => make("li", {}, headOf(batch, true))));
  byId("batches").replaceChildren(...(batches.length > 0 ? [list] : []));
}

// Counts, failed and unknown first, and who works on it.
function headOf(batch, isLink) {
  const link = make("a", { href: addressOf(["batches", batch.name]), "data-focus": batch.name }, batch.name);
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
  const { workers, total, created } = batch;
  const isOpen = batch.waiting + batch.running > 0;
  const isNew = Date.now() / 1000 - created < STARTING;
  const nobody = isNew ? "its worker is starting" : "nobody works on it";
  const who = workers === 0 ? nobody : counted(workers, "worker");
  return make(
    "div",
    { class: "batch" },
    ...(isLink ? [make("p", { class: "batch-name" }, link)] : []),
    bar,
    make("p", { class: "counts" }, ...words),
    make("p", { class: workers === 0 && isOpen && !isNew ? "idle" : "muted" }, isOpen ? `${counted(total, "item")}, ${who}` : counted(total, "item")),
    ...(isLink ? [datesOf(batch)] : []),
  );
}

// When it began, and when its latest item finished.
function datesOf({ created, latest }) {
  const words = ["Began ", timeOf(created)];
  if (latest !== null) words.push(", the latest item finished ", timeOf(latest));
  return make("p", { class: "muted dates" }, ...words);
}

function showOne(batch, isUnfolded) {
  write(byId("batches-empty"), "");
  const items = make("ol", { class: "items", "aria-label": "Finished items" });
  items.append(...batch.items.map(itemOf));
  const note = batch.is_whole || batch.problem !== null ? [] : [make("p", { class: "muted" }, PARTLY)];
  byId("batches").replaceChildren(
    headOf(batch, false),
    ...paceOf(batch),
    ...nextOf(commandsOf(batch), isUnfolded),
    ...groupsOf(batch),
    chipsOf(batch),
    ...note,
    ...(batch.items.length > 0 ? [items] : []),
    ...moreOf(batch),
  );
}

const PARTLY = "Not every item is shown: promptlayer-exec batch export writes them all.";

// The rate, the time left and the latest item, while there is something to do.
function paceOf({ waiting, running, workers, latest, rate }) {
  const open = waiting + running;
  if (latest === null) return [];
  const words = ["The latest item finished ", timeOf(latest), "."];
  if (open > 0 && workers > 0 && rate !== null) {
    words.push(` ${(60 * rate).toFixed(1)} items a minute: about ${duration(open / rate, true)} left.`);
  }
  return [make("p", { class: "muted pace" }, ...words)];
}

// One thing to do next. Everything else you could do is folded.
function nextOf(commands, isUnfolded) {
  if (commands.length === 0) return [];
  const [first, ...others] = commands.map(commandOf);
  const more = make("details", { open: isUnfolded }, make("summary", { "data-focus": "commands" }, "Other commands"), ...others);
  return [make("section", { class: "next" }, make("h3", {}, "What next"), first, ...(others.length > 0 ? [more] : []))];
}

function commandOf({ command, what }) {
  const root = clone("command-template").firstElementChild;
  write(part(root, "what"), what);
  write(part(root, "command"), command);
  part(root, "copy").setAttribute("aria-label", `Copy: ${command}`);
  part(root, "copy").dataset.focus = command;
  copyWith(part(root, "copy"), part(root, "copied"), () => command, () => part(root, "command"));
  return root;
}

// Equal errors, counted. Each selects its items.
function groupsOf({ groups }) {
  if (groups.length === 0) return [];
  const buttons = groups.map((group) => {
    const isOn = filters.reason === group.text;
    const text = `${group.count.toLocaleString("en")} × ${group.text}`;
    const button = make("button", { type: "button", "aria-pressed": String(isOn), "data-focus": `group ${group.text}` }, text);
    button.addEventListener("click", () => choose({ reason: isOn ? "" : group.text, kind: "" }));
    return make("li", {}, button);
  });
  return [make("h3", {}, "Why items did not succeed"), make("ul", { class: "groups" }, ...buttons)];
}

function chipsOf(batch) {
  const all = [["", "All", batch.succeeded + batch.failed + batch.unknown]];
  for (const kind of ["failed", "unknown", "succeeded"]) all.push([kind, kind, batch[kind]]);
  const chips = all.map(([kind, word, number]) => {
    const label = `${word[0].toUpperCase()}${word.slice(1)} ${number.toLocaleString("en")}`;
    const isOn = filters.kind === kind && filters.reason === "";
    const chip = make("button", { type: "button", class: "chip", "aria-pressed": String(isOn), "data-focus": `chip ${kind}` }, label);
    chip.addEventListener("click", () => choose({ kind, reason: "" }));
    return chip;
  });
  return make("div", { class: "actions kinds", role: "group", "aria-label": "Show items that" }, ...chips);
}

function moreOf({ matching, items }) {
  const rest = matching - items.length;
  if (rest <= 0) return [];
  const button = make("button", { type: "button", "data-focus": "more" }, `Show more (${rest.toLocaleString("en")} left)`);
  button.addEventListener("click", () => {
    count += PAGE;
    load();
  });
  return [button];
}

// What people do next with a batch. Nothing is due for failed items while others wait.
function commandsOf({ name, created, waiting, running, workers, failed, unknown }) {
  const isOpen = waiting + running > 0;
  const isNew = Date.now() / 1000 - created < STARTING;
  const quoted = /^[\w./:@%+=,-]+$/.test(name) ? name : `'${name.replaceAll("'", "'\\''")}'`;
  const all = [
    [isOpen && workers === 0 && !isNew, "work", "Nobody works on it now. Continue it with:"],
    [failed > 0 && !isOpen, "retry --failed", "Start the failed items again, which costs again:"],
    [failed > 0 && !isOpen, "recheck", "Follow the runs without an output again, and start none:"],
    [unknown > 0 && !isOpen, "retry --unknown", "Start the unknown items again, which may cost twice:"],
  ];
  const wanted = all.filter(([isWanted]) => isWanted);
  return wanted.map(([, verb, what]) => ({ what, command: `promptlayer-exec batch ${verb} --name ${quoted}` }));
}

function itemOf(entry) {
  const { key, kind, execution_id, error, finished } = entry;
  const [word, icon] = STATES[kind];
  const sentence = make("p", { class: "sentence", title: error ?? fully(finished) });
  writePieces(sentence, itemSentenceOf(entry).pieces, { id: execution_id });
  const link = { href: addressOf(["executions", execution_id ?? ""]), "data-focus": `item ${key}` };
  const item = make(
    "li",
    { class: "item" },
    make("span", { class: "status" }, iconOf(icon), kind === "unknown" ? "Unknown" : word),
    make("span", { class: "name" }, key),
    sentence,
    make("span", {}, execution_id === null ? "" : make("a", link, `Execution ${execution_id}`)),
  );
  item.dataset.kind = kind;
  return item;
}
