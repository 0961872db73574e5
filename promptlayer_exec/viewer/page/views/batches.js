// @ts-check
// The view of the batches in the local database: `#/batches`, and one of them: `#/batches/night`.

import { get } from "../library/api.js";
import { byId, find, findAll, iconOf, make, show, timeOf, write } from "../library/dom.js";
import { checkKey } from "../library/key.js";
import { serverProblem, STATES, STATES_OF_ITEMS } from "../library/model.js";
import { commandOf } from "../parts/command.js";
import { writePieces } from "../parts/progress.js";
import { addressOf, addressOfRun, replace } from "../library/router.js";
import { itemSentenceOf } from "../library/sentence.js";
import { counted, duration, fully } from "../library/times.js";

const UNFINISHED = ["waiting", "sending", "following"]; // the states of items that have not finished
const EVERY = 5000; // milliseconds
const STARTING = 15; // seconds in which a new batch need not have a worker yet
const PAGE = 200;
const PAUSE = 150; // milliseconds without typing until it filters
// By the state of items, as the commands name it: the colour of its segment.
const SEGMENTS = { failed: "failed", unknown: "unknown", following: "running", sending: "running", waiting: "queued", succeeded: "success" };

let name = null;
let timer = 0;
let shown = ""; // what is on the page, as JSON, to leave it alone if nothing is new
let filters = { kind: "", reason: "", text: "" };
let count = PAGE; // items on the page
let typing = 0;
let isKeyTried = false; // a refused key may be why nobody works on the batch

export const batchesView = {
  element: byId("view-batches"),

  show([, chosen], params) {
    name = chosen ?? null;
    filters = { kind: "", reason: "", text: "" };
    for (const one of Object.keys(filters)) filters[one] = params.get(one) ?? "";
    byId("batch-filter").value = filters.text;
    byId("batch-form").hidden = true;
    count = PAGE;
    shown = "";
    isKeyTried = false;
    write(byId("batches-title"), name === null ? "Batches" : `Batch ${name}`);
    byId("batches-crumb").hidden = name === null;
    for (const id of ["batches", "batch-items"]) byId(id).replaceChildren();
    write(byId("batches-empty"), "Reading the database …");
    clearInterval(timer);
    timer = setInterval(load, EVERY);
    return load();
  },

  hide() {
    clearInterval(timer);
    clearTimeout(typing);
  },

  title: () => (name === null ? "Batches · Executions" : `Batch ${name} · Executions`),

  keys: {
    items: () => findAll("#batches .batch-name a, #batch-items .item a.name"),
    isWanted: (item) => item.closest("[data-kind=failed], [data-kind=unknown]") !== null,
  },
};

async function load() {
  const asked = name;
  const query = queryOf(asked);
  let found;
  try {
    found = await get(asked === null ? "api/batches" : `api/batch?${query}`);
  } catch (error) {
    write(byId("batches-empty"), "");
    const none = "Batches need another extra: install promptlayer-exec[dbos] where the viewer runs.";
    return show(byId("batches-problem"), error.status === 404 ? none : error.message);
  }
  if (asked !== name || query !== queryOf(asked)) return; // somebody has chosen something else
  show(byId("batches-problem"), found.problem ?? null);
  if (asked !== null && isIdle(found) && !isKeyTried) {
    isKeyTried = true;
    checkKey().then(load);
  }
  const minute = Math.floor(Date.now() / 60_000); // "3 minutes ago"
  const text = `${minute} ${isKeyRefused()} ${JSON.stringify(found)}`;
  if (text === shown) return;
  shown = text;

  // Restores the focus and the fold after drawing again.
  const focus = find("#view-batches :focus")?.closest("[data-focus]")?.dataset.focus;
  const isUnfolded = find("#batches details")?.open ?? false;
  if (asked === null) showAll(found);
  else showOne(found, isUnfolded);
  if (focus !== undefined) find(`#view-batches [data-focus="${CSS.escape(focus)}"]`)?.focus({ preventScroll: true });
}

function queryOf(asked) {
  const query = new URLSearchParams({ name: asked, count: String(count) });
  for (const [key, value] of Object.entries(filters)) if (value !== "") query.set(key, value);
  return query.toString();
}

byId("batch-form").addEventListener("submit", (event) => event.preventDefault());
byId("batch-filter").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => choose({ text: byId("batch-filter").value.trim() }), PAUSE);
});

function choose(chosen) {
  filters = { ...filters, ...chosen };
  count = PAGE;
  const params = new URLSearchParams(Object.entries(filters).filter(([, value]) => value !== ""));
  replace(["batches", name], params);
  load();
}

function showAll(found) {
  const { batches, database } = found;
  const none = `There is no batch in ${database}.\nThis begins one: promptlayer-exec batch run FILE --workflow NAME`;
  write(byId("batches-empty"), batches.length === 0 ? none : "");
  const list = make("ul", { class: "batches" }, ...batches.map((batch) => make("li", {}, headOf(batch, true))));
  byId("batches").replaceChildren(...(batches.length > 0 ? [list] : []), ...keysOf(found));
}

// Counts, failed and unknown first, and who works on it.
function headOf(batch, isLink) {
  const link = make("a", { href: addressOf(["batches", batch.name]), "data-focus": batch.name }, batch.name);
  const counts = Object.entries(SEGMENTS).filter(([state]) => batch.counts[state] > 0);
  const bar = make("span", { class: "segments", "aria-hidden": "true" });
  for (const [state, status] of counts) {
    const segment = make("span", { "data-status": status });
    segment.style.flexGrow = String(batch.counts[state]);
    bar.append(segment);
  }
  const words = counts.map(([state]) => {
    const text = `${batch.counts[state].toLocaleString("en")} ${state}`;
    return make("span", { class: "count", "data-kind": state }, text);
  });
  const { workers } = batch;
  const total = totalOf(batch);
  const nobody = isNew(batch) ? "its worker is starting" : "nobody works on it";
  const who = workers === 0 ? nobody : counted(workers, "worker");
  return make(
    "div",
    { class: "batch" },
    ...(isLink ? [make("p", { class: "batch-name" }, link)] : []),
    bar,
    make("p", { class: "counts" }, ...words),
    make("p", { class: isIdle(batch) ? "idle" : "muted" }, isOpen(batch) ? `${counted(total, "item")}, ${who}` : counted(total, "item")),
    ...(isLink ? [datesOf(batch)] : []),
  );
}

const isKeyRefused = () => serverProblem()?.kind === "refused";
const openOf = ({ counts }) => counts.waiting + counts.sending + counts.following;
const totalOf = ({ counts }) => Object.values(counts).reduce((sum, count) => sum + count, 0);
const isOpen = (batch) => openOf(batch) > 0;
const isNew = ({ created }) => Date.now() / 1000 - created < STARTING;
const isIdle = (batch) => isOpen(batch) && batch.workers === 0 && !isNew(batch);

// When it began, and when its latest item finished.
function datesOf({ created, latest }) {
  const words = ["Began ", timeOf(created)];
  if (latest !== null) words.push(", the latest item finished ", timeOf(latest));
  return make("p", { class: "muted dates" }, ...words);
}

function showOne(batch, isUnfolded) {
  write(byId("batches-empty"), "");
  const label = filters.kind === "" ? (batch.found === undefined ? "Finished items" : "Items that match") : `Items that are ${filters.kind}`;
  const items = make("ol", { class: "items", "aria-label": label });
  items.append(...batch.items.map(itemOf));
  const note = batch.is_whole || batch.problem !== null ? [] : [make("p", { class: "muted" }, PARTLY)];
  byId("batches").replaceChildren(
    headOf(batch, false),
    ...paceOf(batch),
    ...nextOf(batch, isUnfolded),
    ...keysOf(batch),
    ...groupsOf(batch),
  );
  byId("batch-form").hidden = false;
  byId("batch-items").replaceChildren(
    chipsOf(batch),
    ...note,
    ...(batch.items.length > 0 ? [items] : []),
    ...(batch.items.length === 0 && filters.text !== "" ? [make("p", { class: "empty" }, "No item matches.")] : []),
    ...moreOf(batch),
  );
}

const PARTLY = "Not every item is shown: promptlayer-exec batch export writes them all.";

// The rate, the time left and the latest item, while there is something to do.
function paceOf(batch) {
  const { workers, latest, rate, left } = batch;
  const open = openOf(batch);
  if (latest === null) return [];
  const words = ["The latest item finished ", timeOf(latest), "."];
  if (open > 0 && workers > 0 && left !== null) {
    words.push(` ${(60 * rate).toFixed(1)} items a minute: about ${duration(left, true)} left.`);
  }
  return [make("p", { class: "muted pace" }, ...words)];
}

// One thing to do next. What leads out of each other state is folded. Nothing is due for failed and
// unknown items while others wait.
function nextOf(batch, isUnfolded) {
  const ways = batch.states
    .filter(({ state }) => batch.counts[state] > 0)
    .flatMap(({ state, ways }) => ways.map((way) => ({ ...way, state })));
  if (ways.length === 0) return [];

  const isDue = ({ state }) => (isOpen(batch) ? isIdle(batch) && UNFINISHED.includes(state) : state !== "succeeded");
  const first = ways.find(isDue);
  const seen = new Set(first === undefined ? [] : [first.command]);
  const others = ways.filter(({ command }) => !seen.has(command) && seen.add(command));
  const summary = make("summary", { "data-focus": "commands" }, first === undefined ? "Commands for each state" : "Other commands");
  const groups = batch.states.map(({ state }) => groupOf(batch, state, others.filter((way) => way.state === state)));
  const more = make("details", { open: isUnfolded }, summary, ...groups.flat());
  const key = "PromptLayer refuses the key of this viewer. If the batch uses the same one, first mend the key.";
  const mend = isIdle(batch) && isKeyRefused() ? [make("p", { class: "mend" }, key)] : [];
  const head = first === undefined ? [] : [make("h3", {}, "What next"), ...mend, ...groupOf(batch, first.state, [first])];
  return [make("section", { class: "next" }, ...head, ...(others.length > 0 ? [more] : []))];
}

// The commands for the items in one state.
function groupOf(batch, state, ways) {
  if (ways.length === 0) return [];
  const nobody = isIdle(batch) && UNFINISHED.includes(state) ? ", and nobody works on them" : "";
  const title = `${batch.counts[state].toLocaleString("en")} ${state}${nobody}`;
  const commands = ways.map(({ what, command }) => commandOf({ what: `${what[0].toUpperCase()}${what.slice(1)}:`, command }));
  return [make("h4", {}, title), ...commands];
}

// Keys of single runs, in the same database, whose response was lost.
function keysOf({ unknown_keys: count, unknown_keys_command: command }) {
  if (count === 0) return [];
  const what = `${counted(count, "key")} of single runs ${count === 1 ? "is" : "are"} unknown: each may have started a run, and you may be billed. List them with:`;
  return [make("section", { class: "next unknown-keys" }, commandOf({ what, command }))];
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
  // With a filter, items match it in any state.
  const { found } = batch;
  const counts = found ?? batch.counts;
  const number = (state) => counts[state] ?? 0;
  const finished = number("succeeded") + number("failed") + number("unknown");
  const all = [found === undefined ? ["", "finished", finished] : ["", "all", totalOf({ counts })]];
  for (const { state } of batch.states) {
    if (number(state) > 0 || state === filters.kind) all.push([state, state, number(state)]);
  }
  const chips = all.map(([kind, word, number]) => {
    const label = `${word[0].toUpperCase()}${word.slice(1)} ${number.toLocaleString("en")}`;
    const isOn = filters.kind === kind && filters.reason === "";
    const chip = make("button", { type: "button", class: "chip", "aria-pressed": String(isOn), "data-focus": `chip ${kind}` }, label);
    chip.addEventListener("click", () => choose({ kind, reason: "" }));
    return chip;
  });
  return make("div", { class: "actions kinds", role: "group", "aria-label": "Show items that" }, ...chips);
}

function moreOf({ matching, items, counts }) {
  const all = matching ?? counts[filters.kind]; // all of an unfinished kind
  const rest = all - items.length;
  if (rest <= 0) return [];
  const button = make("button", { type: "button", "data-focus": "more" }, `Show more (${rest.toLocaleString("en")} left)`);
  button.addEventListener("click", () => {
    count += PAGE;
    load();
  });
  return [button];
}

function itemOf(entry) {
  const { key, kind, execution_id: id, error, finished } = entry;
  const [word, icon] = STATES_OF_ITEMS[kind] ?? STATES[kind];
  const sentence = make("p", { class: "sentence", title: error ?? fully(finished) });
  const run = addressOfRun(name, key, id);
  writePieces(sentence, itemSentenceOf(entry).pieces, { id, item: { batch: name, item: key } });
  const item = make(
    "li",
    { class: "item" },
    make("span", { class: "status" }, iconOf(icon), word),
    make("a", { class: "name", href: addressOf(["item", name, key]), "data-focus": `item ${key}` }, key),
    sentence,
    make("span", {}, id === null ? "" : make("a", { href: run, "data-focus": `run ${key}` }, `Execution ${id}`)),
  );
  item.dataset.kind = kind;
  return item;
}
